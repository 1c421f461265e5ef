//! Furniture: reduced triangle models with a licence each, and the file that holds them.
//!
//! # File
//! Little endian. `mefurn01`; the header's length (u32); the header, UTF-8, one line per model with the tab-separated
//! fields kind, model, author, licence, source, vertices, triangles, colours; then the models' data in that order:
//! * extent along x, y, z (3 f32, m);
//! * vertices: x, y, z as shares of the extent (3 u16), then their openness to the sky (u8, 255 = open);
//! * colours: r, g, b, tinted (4 u8; of a tinted colour, r is its brightness against the middle of the tinted, 128 = 1);
//! * triangles: three vertices (3 u16) and the lattice's steps per side `n` (u8), then `(n + 1)(n + 2) / 2` colours (u8).
//!
//! The object's frame: origin in the middle of the footprint on the floor, x to the front, z up.
//!
//! Colours lie on a lattice in each triangle: row `i` of `0 ..= n` is at weight `1 - i / n` of the first vertex, its
//! `i + 1` entries go from the second vertex's side to the third's.

use crate::house::Shape;
pub use crate::reduce::{Face, Material, Original, ReduceError, reduce};
use std::sync::OnceLock;

/// The only licence that models in the file may have.
pub const LICENCE: &str = "CC0-1.0";

const MAGIC: &[u8; 8] = b"mefurn01";
/// Bounds of what a file may say.
const MODELS_MAX: usize = 1024;
const VERTICES_MAX: usize = 65_535;
const TRIANGLES_MAX: usize = 20_000;
const EXTENT_MAX_M: f32 = 6.0;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name in the collection that it was taken from.
    pub model: String,
    /// Who made it.
    pub author: String,
    /// SPDX name of its licence.
    pub licence: String,
    /// Where it was published.
    pub source: String,
}

/// A colour of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Paint {
    /// As it is (sRGB).
    Own([u8; 3]),
    /// The object's colour at this brightness; about 1 in the middle.
    Tinted(f32),
}

/// A triangle: vertices, and where its colours begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Triangle {
    /// Indices of its vertices.
    pub vertices: [u16; 3],
    /// Steps of its colour lattice per side.
    pub steps: u8,
    /// First of its colours in [`Model::lattice`].
    pub first: u32,
}

/// A reduced model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// What it is.
    pub kind: Shape,
    /// Where it comes from.
    pub source: Source,
    /// Full extent along x, y, z (m).
    pub extent: [f32; 3],
    /// Vertices (m).
    pub points: Vec<[f32; 3]>,
    /// Openness of each vertex to the sky, 0 to 1.
    pub open: Vec<f32>,
    /// Its colours.
    pub paints: Vec<Paint>,
    /// Its triangles.
    pub triangles: Vec<Triangle>,
    /// Colours of the triangles' lattices, indices into [`Model::paints`].
    pub lattice: Vec<u8>,
    /// Normals at each triangle's corners: smooth over gentle edges.
    pub normals: Vec<[[f32; 3]; 3]>,
}

/// Why a furniture file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FurnitureError {
    /// It is something else.
    #[error("is no furniture file: it does not begin with \"mefurn01\"; make one with `world furniture`")]
    Magic,
    /// It ends too early.
    #[error("ends at byte {at} within {what}: the file was cut off; copy or make it again")]
    Short {
        /// What was being read.
        what: String,
        /// The file's length (bytes).
        at: usize,
    },
    /// Its header cannot be read.
    #[error("header, line {line}: {what}")]
    Header {
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A model has no licence, or one under which it may not be here.
    #[error(
        "model {model:?}: licence {licence:?}: only models with the licence line \"CC0-1.0\" may be in the file"
    )]
    Licence {
        /// The model.
        model: String,
        /// What it says.
        licence: String,
    },
    /// A model's data make no sense.
    #[error("model {model:?}: {what}")]
    Model {
        /// The model.
        model: String,
        /// What is wrong.
        what: String,
    },
    /// More bytes than models.
    #[error("{bytes} bytes follow the last model: the header and the data disagree")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// Samples of a lattice with so many steps.
#[must_use]
pub fn lattice_len(steps: u8) -> usize {
    let n = usize::from(steps);
    (n + 1) * (n + 2) / 2
}

/// A file under reading.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, what: &dyn Fn() -> String) -> Result<&'a [u8], FurnitureError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(FurnitureError::Short { what: what(), at: self.bytes.len() });
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }
}

fn u16_at(bytes: &[u8], k: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * k], bytes[2 * k + 1]])
}

/// One line of the header.
struct Entry {
    kind: Shape,
    source: Source,
    vertices: usize,
    triangles: usize,
    paints: usize,
}

impl Entry {
    fn read(number: usize, line: &str) -> Result<Self, FurnitureError> {
        let wrong = |what: String| FurnitureError::Header { line: number, what };
        let fields: Vec<&str> = line.split('\t').collect();
        let [kind, model, author, licence, source, counts @ ..] = fields.as_slice() else {
            return Err(wrong(format!("{} fields, expected 8", fields.len())));
        };
        let [vertices, triangles, paints] = counts else {
            return Err(wrong(format!("{} fields, expected 8", fields.len())));
        };
        if *licence != LICENCE {
            return Err(FurnitureError::Licence {
                model: (*model).to_owned(),
                licence: (*licence).to_owned(),
            });
        }
        let number = |text: &str, what: &str, most: usize| match text.parse::<usize>() {
            Ok(n) if (1..=most).contains(&n) => Ok(n),
            _ => Err(wrong(format!("{text:?} {what}, expected 1 to {most}"))),
        };
        Ok(Self {
            kind: Shape::named(kind).ok_or_else(|| wrong(format!("kind {kind:?} is not known")))?,
            source: Source {
                model: (*model).to_owned(),
                author: (*author).to_owned(),
                licence: (*licence).to_owned(),
                source: (*source).to_owned(),
            },
            vertices: number(vertices, "vertices", VERTICES_MAX)?,
            triangles: number(triangles, "triangles", TRIANGLES_MAX)?,
            paints: number(paints, "colours", 256)?,
        })
    }
}

/// Reads a furniture file.
///
/// # Errors
/// It is no such file, is cut off or longer than it says, a model lacks its licence line, or its data make no sense.
pub fn read(bytes: &[u8]) -> Result<Vec<Model>, FurnitureError> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(8, &|| "its first word".into()).ok() != Some(MAGIC.as_slice()) {
        return Err(FurnitureError::Magic);
    }
    let length = reader.take(4, &|| "the header's length".into())?;
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    let header = reader.take(length, &|| "the header".into())?;
    let header = std::str::from_utf8(header)
        .map_err(|e| FurnitureError::Header { line: 1, what: format!("is not UTF-8: {e}") })?;
    if header.lines().count() > MODELS_MAX {
        return Err(FurnitureError::Header { line: MODELS_MAX, what: "more models than 1024".into() });
    }
    let entries = header.lines().enumerate().map(|(k, line)| Entry::read(k + 1, line));
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    let models = entries.into_iter().map(|entry| model(&mut reader, entry));
    let models = models.collect::<Result<Vec<_>, _>>()?;
    match bytes.len() - reader.at {
        0 => Ok(models),
        bytes => Err(FurnitureError::Trailing { bytes }),
    }
}

fn model(reader: &mut Reader<'_>, entry: Entry) -> Result<Model, FurnitureError> {
    let name = entry.source.model.clone();
    let within = |what: &'static str| {
        let name = name.clone();
        move || format!("{what} of model {name:?}")
    };
    let wrong = |what: String| FurnitureError::Model { model: name.clone(), what };
    let extent = reader.take(12, &within("the extent"))?;
    let extent: [f32; 3] = std::array::from_fn(|k| {
        f32::from_le_bytes([extent[4 * k], extent[4 * k + 1], extent[4 * k + 2], extent[4 * k + 3]])
    });
    if !extent.iter().all(|e| *e > 0.0 && *e <= EXTENT_MAX_M) {
        return Err(wrong(format!("extent {extent:?} m, expected above 0 and at most {EXTENT_MAX_M}")));
    }
    let raw = reader.take(7 * entry.vertices, &within("the vertices"))?;
    let (mut points, mut open) = (Vec::with_capacity(entry.vertices), Vec::with_capacity(entry.vertices));
    for v in raw.chunks_exact(7) {
        let share = |k: usize| f32::from(u16_at(v, k)) / 65_535.0;
        points.push([(share(0) - 0.5) * extent[0], (share(1) - 0.5) * extent[1], share(2) * extent[2]]);
        open.push(f32::from(v[6]) / 255.0);
    }
    let raw = reader.take(4 * entry.paints, &within("the colours"))?;
    let paints =
        raw.chunks_exact(4)
            .map(|c| {
                if c[3] > 0 { Paint::Tinted(f32::from(c[0]) / 128.0) } else { Paint::Own([c[0], c[1], c[2]]) }
            })
            .collect::<Vec<_>>();
    let (mut triangles, mut lattice) = (Vec::with_capacity(entry.triangles), Vec::new());
    for t in 0..entry.triangles {
        let raw = reader.take(7, &within("the triangles"))?;
        let vertices = [0, 1, 2].map(|k| u16_at(raw, k));
        if let Some(v) = vertices.iter().find(|v| usize::from(**v) >= points.len()) {
            return Err(wrong(format!("triangle {t} has vertex {v} of {}", points.len())));
        }
        let colours = reader.take(lattice_len(raw[6]), &within("the triangles' colours"))?;
        if let Some(c) = colours.iter().find(|c| usize::from(**c) >= paints.len()) {
            return Err(wrong(format!("triangle {t} has colour {c} of {}", paints.len())));
        }
        triangles.push(Triangle { vertices, steps: raw[6], first: lattice.len() as u32 });
        lattice.extend_from_slice(colours);
    }
    let normals = corner_normals(&points, &triangles);
    Ok(Model {
        kind: entry.kind,
        source: entry.source,
        extent,
        points,
        open,
        paints,
        triangles,
        lattice,
        normals,
    })
}

/// Writes a furniture file: what [`read`] reads. Normals are not written; places are rounded to a 65 535th of the
/// extent.
#[must_use]
pub fn write(models: &[Model]) -> Vec<u8> {
    let mut header = String::new();
    for m in models {
        let s = &m.source;
        let clean = |text: &str| text.replace(['\t', '\n', '\r'], " ");
        header += &format!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\n",
            m.kind.name(),
            clean(&s.model),
            clean(&s.author),
            clean(&s.licence),
            clean(&s.source),
            m.points.len(),
            m.triangles.len(),
            m.paints.len()
        );
    }
    let mut out = MAGIC.to_vec();
    out.extend((header.len() as u32).to_le_bytes());
    out.extend(header.as_bytes());
    for m in models {
        m.extent.iter().for_each(|e| out.extend(e.to_le_bytes()));
        for (p, open) in m.points.iter().zip(&m.open) {
            for k in 0..3 {
                let share = p[k] / m.extent[k] + if k < 2 { 0.5 } else { 0.0 };
                out.extend(((share.clamp(0.0, 1.0) * 65_535.0 + 0.5) as u16).to_le_bytes());
            }
            out.push((open.clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
        }
        for paint in &m.paints {
            out.extend(match *paint {
                Paint::Own([r, g, b]) => [r, g, b, 0],
                Paint::Tinted(gain) => [(gain * 128.0 + 0.5).clamp(0.0, 255.0) as u8, 0, 0, 1],
            });
        }
        for t in &m.triangles {
            t.vertices.iter().for_each(|v| out.extend(v.to_le_bytes()));
            out.push(t.steps);
            out.extend(&m.lattice[t.first as usize..][..lattice_len(t.steps)]);
        }
    }
    out
}

/// Normals at the corners of triangles: the mean, by area, of the neighbours that turn away by less than 45 degrees.
/// Triangles without area point up.
pub(crate) fn corner_normals(points: &[[f32; 3]], triangles: &[Triangle]) -> Vec<[[f32; 3]; 3]> {
    const CREASE_COS: f32 = 0.707;
    let faces: Vec<[f32; 3]> = triangles
        .iter()
        .map(|t| {
            let [a, b, c] = t.vertices.map(|v| points[usize::from(v)]);
            cross(sub(b, a), sub(c, a))
        })
        .collect();
    let mut around: Vec<Vec<u32>> = vec![Vec::new(); points.len()];
    for (k, t) in triangles.iter().enumerate() {
        t.vertices.iter().for_each(|v| around[usize::from(*v)].push(k as u32));
    }
    let length = |v: [f32; 3]| dot(v, v).sqrt();
    triangles
        .iter()
        .zip(&faces)
        .map(|(t, mine)| {
            let size = length(*mine);
            t.vertices.map(|v| {
                let mut sum = [0.0f32; 3];
                for other in &around[usize::from(v)] {
                    let n = faces[*other as usize];
                    if dot(n, *mine) >= CREASE_COS * size * length(n) {
                        (0..3).for_each(|k| sum[k] += n[k]);
                    }
                }
                let long = length(sum);
                if long > 1e-12 { sum.map(|s| s / long) } else { [0.0, 0.0, 1.0] }
            })
        })
        .collect()
}

pub(crate) fn sub(a: [f32; 3], b: [f32; 3]) -> [f32; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

pub(crate) fn dot(a: [f32; 3], b: [f32; 3]) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

pub(crate) fn cross(a: [f32; 3], b: [f32; 3]) -> [f32; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

/// The models that come with this crate, read at first use.
pub fn shipped() -> &'static [Model] {
    static SHIPPED: OnceLock<Vec<Model>> = OnceLock::new();
    // That the file can be read is tested; without it rooms would stand empty.
    SHIPPED.get_or_init(|| read(include_bytes!("../furniture.bin")).unwrap_or_default())
}

/// The kinds of the shipped models, in index order.
pub fn kinds() -> &'static [Shape] {
    static KINDS: OnceLock<Vec<Shape>> = OnceLock::new();
    KINDS.get_or_init(|| {
        let mut kinds: Vec<Shape> = shipped().iter().map(|m| m.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tetrahedron() -> Model {
        let points = vec![[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]];
        let triangles: Vec<Triangle> = [[0, 1, 3], [1, 2, 3], [2, 0, 3]]
            .iter()
            .zip([(1, 0), (0, 3), (2, 4)])
            .map(|(vertices, (steps, first))| Triangle { vertices: *vertices, steps, first })
            .collect();
        let normals = corner_normals(&points, &triangles);
        Model {
            kind: Shape::Stool,
            source: Source {
                model: "tent".into(),
                author: "nobody".into(),
                licence: LICENCE.into(),
                source: "here".into(),
            },
            extent: [1.0; 3],
            points,
            open: vec![1.0, 0.0, 0.2, 1.0],
            paints: vec![Paint::Own([1, 2, 3]), Paint::Tinted(0.5)],
            triangles,
            lattice: vec![0, 1, 0, 1, 0, 1, 1, 0, 0, 1],
            normals,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let wrote = tetrahedron();
        let read = read(&write(&[wrote.clone(), wrote.clone()])).expect("it was written here");
        assert_eq!(read.len(), 2);
        let got = &read[1];
        assert_eq!((got.kind, &got.source, got.extent), (wrote.kind, &wrote.source, wrote.extent));
        assert_eq!(
            (&got.paints, &got.triangles, &got.lattice),
            (&wrote.paints, &wrote.triangles, &wrote.lattice)
        );
        for (a, b) in got.points.iter().zip(&wrote.points) {
            assert!((0..3).all(|k| (a[k] - b[k]).abs() < 2e-5), "{a:?} {b:?}");
        }
        // Its sides meet at sharp edges: each corner has its face's normal, outwards.
        let n = got.normals[0][0];
        assert!(n[1] < -0.8 && (n[1] * n[1] + n[2] * n[2] - 1.0).abs() < 1e-3, "{n:?}");
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let good = write(&[tetrahedron()]);
        let said = |bytes: &[u8]| read(bytes).expect_err("it is damaged").to_string();
        assert!(said(b"solid").contains("no furniture file"));
        assert!(said(b"").contains("no furniture file"));
        for cut in [9, 20, 60, good.len() - 1] {
            assert!(said(&good[..cut]).contains("ends at byte"), "{cut}: {}", said(&good[..cut]));
        }
        assert!(said(&good[..good.len() - 1]).contains("\"tent\""));
        assert!(said(&[good.as_slice(), &[0]].concat()).contains("1 bytes follow"));
        let with = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let at = good.windows(from.len()).position(|w| w == from.as_bytes()).expect("it is there");
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            said(&bytes)
        };
        let licence = with("CC0-1.0", "CC-BY-3");
        assert!(licence.contains("\"tent\"") && licence.contains("CC-BY-3"), "{licence}");
        assert!(with("CC0-1.0", "       ").contains("licence"));
        assert!(with("stool", "stoel").contains("\"stoel\" is not known"));
        assert!(with("\t4\t3", "\t0\t3").contains("\"0\" vertices"));
        assert!(with("\t4\t3", "\t3\t3").contains("\"tent\""));
        // An extent that is no number, and a vertex that is not there.
        let mut bytes = good.clone();
        let data = 12 + u32::from_le_bytes([good[8], good[9], good[10], good[11]]) as usize;
        bytes[data..data + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(said(&bytes).contains("extent"));
        let mut bytes = good.clone();
        let triangles = data + 12 + 4 * 7 + 2 * 4;
        bytes[triangles] = 9;
        assert!(said(&bytes).contains("triangle 0 has vertex 9 of 4"), "{}", said(&bytes));
        bytes[triangles] = good[triangles];
        bytes[triangles + 7] = 7;
        assert!(said(&bytes).contains("triangle 0 has colour 7 of 2"), "{}", said(&bytes));
    }

    #[test]
    fn the_shipped_furniture_is_free_small_and_takes_colours() {
        let bytes = include_bytes!("../furniture.bin");
        assert!(bytes.len() < 1_500_000, "{} bytes", bytes.len());
        let models = read(bytes).expect("the shipped file");
        let mut kinds: Vec<Shape> = models.iter().map(|m| m.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        assert!(kinds.len() >= 24, "{} kinds", kinds.len());
        for m in &models {
            let name = &m.source.model;
            assert!(m.source.licence == LICENCE && m.source.source.starts_with("https://"), "{name}");
            assert!(m.triangles.len() <= 1000, "{name}: {} triangles", m.triangles.len());
            // Most of what is seen takes the object's colour: leaves show both sides, pots keep their own.
            let (mut tinted, mut all) = (0.0, 0.0);
            for t in &m.triangles {
                let [a, b, c] = t.vertices.map(|v| m.points[usize::from(v)]);
                let n = cross(sub(b, a), sub(c, a));
                let colours = &m.lattice[t.first as usize..][..lattice_len(t.steps)];
                let mine = colours.iter().filter(|c| matches!(m.paints[usize::from(**c)], Paint::Tinted(_)));
                let area = dot(n, n).sqrt();
                tinted += area * mine.count() as f32 / colours.len() as f32;
                all += area;
            }
            assert!(tinted > 0.4 * all, "{name}: {} of the surface", tinted / all);
        }
    }
}
