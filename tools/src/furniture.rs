//! `mindseye-tools world furniture`: reduces models of Sweet Home 3D's library "Blend Swap CC-0" to the furniture file of
//! the procedural house.
//!
//! The library is `BlendSwap-CC-0.sh3f`, a ZIP file in Debian's package `sweethome3d-furniture`; the command wants the
//! folder that it was unpacked to. A model is taken only if a licence file in its own folder says Creative Commons Zero:
//! the library also holds models without one, and two whose file says Creative Commons Attribution.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use mindseye_base::file::replace;
use mindseye_bridge::image::{ImageError, Limits, decode_compressed_rgb8};
use mindseye_world::Shape;
use mindseye_world::furniture::{
    Face, LICENCE, Material, Model, Original, ReduceError, Source, reduce, write,
};

/// Arguments of `world furniture`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools world furniture unpacked/ --out tools/world/furniture.bin\n\
                        Prints a table of the models with author, licence and source.")]
pub struct FurnitureArgs {
    /// The unpacked library: the folder that holds PluginFurnitureCatalog.properties.
    folder: PathBuf,
    /// The furniture file.
    #[arg(long)]
    out: PathBuf,
}

/// Why furniture could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FurnitureImportError {
    /// A file cannot be read or written.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The catalogue lacks a model or one of its sizes.
    #[error("{path}: model {model:?}: {what}")]
    Catalogue {
        /// The catalogue.
        path: PathBuf,
        /// The model.
        model: String,
        /// What is missing.
        what: String,
    },
    /// A model has no licence line, or another licence.
    #[error("{folder}: no licence file there says \"Creative Commons Zero\": leave the model out")]
    Licence {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A line of a model or of its materials makes no sense.
    #[error("{path}, line {line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A texture cannot be decoded.
    #[error("{path}")]
    Texture {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// A model cannot be reduced.
    #[error("{path}")]
    Reduce {
        /// The model.
        path: PathBuf,
        /// Why.
        #[source]
        source: ReduceError,
    },
}

use FurnitureImportError as Error;

/// A model of the library in a piece of furniture.
struct Piece {
    /// Its folder and file name.
    model: &'static str,
    /// Width, depth and height (m); the catalogue's times `scale` where 0.
    size_m: [f32; 3],
    scale: f32,
    /// Height that it stands at (m).
    raise_m: f32,
}

/// A piece of furniture: what it is called, of what it is made, and how finely.
struct Recipe {
    kind: Shape,
    pieces: &'static [Piece],
    triangles: usize,
    /// Parts of the names of materials that never take the object's colour.
    fixed: &'static [&'static str],
}

const fn piece(model: &'static str, scale: f32) -> Piece {
    Piece { model, size_m: [0.0; 3], scale, raise_m: 0.0 }
}

const fn one(
    kind: Shape,
    pieces: &'static [Piece],
    triangles: usize,
    fixed: &'static [&'static str],
) -> Recipe {
    Recipe { kind, pieces, triangles, fixed }
}

/// What is taken. Small things are enlarged to what a robot sees on a floor; very large ones are made smaller.
const RECIPES: &[Recipe] = &[
    one(Shape::Chair, &[piece("oakChair", 1.0)], 420, &[]),
    one(Shape::Chair, &[piece("plasticChair", 1.1)], 320, &[]),
    one(Shape::Chair, &[piece("chairWithCushion", 1.0)], 360, &[]),
    one(Shape::Chair, &[piece("antiqueChair", 1.0)], 380, &[]),
    one(Shape::Chair, &[piece("osakaChair", 1.1)], 300, &[]),
    one(Shape::Chair, &[piece("chair2", 1.0)], 300, &[]),
    one(Shape::Table, &[piece("oakTable", 0.95)], 320, &[]),
    one(Shape::Table, &[piece("table", 0.72)], 260, &[]),
    one(Shape::Table, &[piece("tableWithTablecloth", 1.1)], 360, &[]),
    one(Shape::Lamp, &[piece("desklamp", 2.6)], 260, &[]),
    one(Shape::Plant, &[piece("plant", 1.0)], 900, &["ground", "pot"]),
    one(Shape::Ball, &[piece("basketball", 1.9)], 400, &[]),
    one(Shape::Box, &[piece("crate", 0.95)], 864, &[]),
    one(Shape::Box, &[piece("box", 0.75)], 260, &[]),
    one(Shape::Bed, &[piece("bed1", 0.9)], 420, &["structure"]),
    one(Shape::Bed, &[piece("bed2", 0.9)], 520, &[]),
    one(Shape::Bed, &[piece("bed3", 0.85)], 820, &[]),
    one(Shape::Couch, &[piece("sofa2", 1.05)], 360, &[]),
    one(Shape::Couch, &[piece("couch", 0.9)], 420, &["Chrome"]),
    one(Shape::Couch, &[piece("couch2", 0.85)], 260, &[]),
    one(Shape::Armchair, &[piece("armchair2", 1.0)], 360, &[]),
    one(Shape::Armchair, &[piece("modernArmchair", 1.0)], 360, &[]),
    one(Shape::Desk, &[piece("desk", 1.0)], 340, &[]),
    one(Shape::Refrigerator, &[piece("refrigerator", 1.0)], 300, &[]),
    one(
        Shape::Tv,
        &[
            Piece { model: "bedsideTable2", size_m: [1.25, 0.42, 0.46], scale: 1.0, raise_m: 0.0 },
            Piece { model: "led_tv", size_m: [0.0; 3], scale: 1.15, raise_m: 0.46 },
        ],
        300,
        &["screen"],
    ),
    one(Shape::Sink, &[piece("washbasin", 1.0)], 360, &[]),
    one(Shape::Sink, &[piece("modernVanity", 1.0)], 320, &[]),
    one(Shape::Toilet, &[piece("toiletsUnit", 1.0)], 360, &[]),
    one(Shape::Oven, &[piece("doubleOven", 1.0)], 320, &["vidro"]),
    one(Shape::Bookcase, &[piece("bookcase", 1.0)], 320, &[]),
    one(Shape::Bookcase, &[piece("verticalShelves", 1.0)], 220, &[]),
    one(Shape::Wardrobe, &[piece("wardrobeWithSlidingDoors", 0.72)], 200, &[]),
    one(Shape::Wardrobe, &[piece("cupboard", 1.05)], 320, &[]),
    one(Shape::Bench, &[piece("bench", 0.85)], 260, &[]),
    one(Shape::Piano, &[piece("pianoAQueue", 0.9)], 460, &[]),
    one(Shape::Nightstand, &[piece("bedsideTable2", 1.1)], 138, &[]),
    one(Shape::Stool, &[piece("stool", 0.9)], 280, &[]),
    one(Shape::Stool, &[piece("silla2", 1.0)], 300, &[]),
    one(Shape::Teddy, &[piece("teddyBear", 1.9)], 700, &[]),
    one(Shape::Barrel, &[piece("barrel", 0.75)], 260, &[]),
    one(Shape::Bin, &[piece("dustbin", 1.7)], 480, &[]),
    one(Shape::Suitcase, &[piece("briefcase", 1.7)], 280, &[]),
    one(Shape::Guitar, &[piece("electricGuitar", 1.05)], 420, &[]),
    one(Shape::Speaker, &[piece("speaker3", 1.5)], 260, &[]),
    one(Shape::Umbrella, &[piece("umbrellaFolded", 1.1)], 280, &[]),
    one(Shape::Whiteboard, &[piece("whiteBoard", 1.0)], 240, &[]),
    one(Shape::Cradle, &[piece("babyRockingBed", 1.0)], 760, &[]),
    one(Shape::Radiator, &[piece("radiator3", 1.2)], 380, &[]),
];

/// Runs `world furniture`.
///
/// # Errors
/// See [`FurnitureImportError`].
pub fn run(args: &FurnitureArgs) -> Result<(), FurnitureImportError> {
    let library = Library::open(&args.folder)?;
    let made = RECIPES.iter().map(|r| library.make(r)).collect::<Result<Vec<_>, _>>()?;
    let (models, originals): (Vec<Model>, Vec<usize>) = made.into_iter().unzip();
    let bytes = write(&models);
    replace(&args.out, &bytes).map_err(|source| Error::Io { path: args.out.clone(), source })?;
    println!("| kind | model | author | triangles (original) | source |\n|---|---|---|---|---|");
    for (m, original) in models.iter().zip(originals) {
        let s = &m.source;
        println!(
            "| {} | {} | {} | {} ({original}) | {} |",
            m.kind.name(),
            s.model,
            s.author,
            m.triangles.len(),
            s.source
        );
    }
    let triangles: usize = models.iter().map(|m| m.triangles.len()).sum();
    println!(
        "\n{} models, {triangles} triangles, {} bytes, all {LICENCE}: {}",
        models.len(),
        bytes.len(),
        args.out.display()
    );
    Ok(())
}

/// The unpacked library.
struct Library {
    folder: PathBuf,
    catalogue: PathBuf,
    /// Fields of the catalogue by the name of the model's file.
    entries: HashMap<String, HashMap<String, String>>,
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Text of a file in UTF-8 or, where that fails, with other bytes replaced.
fn read_text(path: &Path) -> Result<String, Error> {
    Ok(String::from_utf8_lossy(&read_bytes(path)?).into_owned())
}

impl Library {
    fn open(folder: &Path) -> Result<Self, Error> {
        let catalogue = folder.join("PluginFurnitureCatalog.properties");
        let mut by_number: HashMap<&str, HashMap<String, String>> = HashMap::new();
        let text = read_text(&catalogue)?;
        for line in text.lines() {
            if let Some((name, value)) = line.split_once('=')
                && let Some((field, number)) = name.split_once('#')
            {
                by_number.entry(number.trim()).or_default().insert(field.to_owned(), value.trim().to_owned());
            }
        }
        let entries = by_number
            .into_values()
            .filter_map(|fields| {
                let file = fields.get("model")?.rsplit('/').next()?.strip_suffix(".obj")?.to_owned();
                Some((file, fields))
            })
            .collect();
        Ok(Self { folder: folder.to_owned(), catalogue, entries })
    }

    fn field(&self, model: &str, field: &str) -> Result<&str, Error> {
        let missing =
            |what: String| Error::Catalogue { path: self.catalogue.clone(), model: model.to_owned(), what };
        let entry = self.entries.get(model).ok_or_else(|| missing("is not in the catalogue".into()))?;
        entry.get(field).map(String::as_str).ok_or_else(|| missing(format!("has no {field}")))
    }

    /// Path of a model's file.
    fn path(&self, model: &str) -> Result<PathBuf, Error> {
        Ok(self.folder.join(self.field(model, "model")?.trim_start_matches('/')))
    }

    /// A piece of furniture, and the number of triangles of its originals.
    fn make(&self, recipe: &Recipe) -> Result<(Model, usize), Error> {
        let mut whole = Original::default();
        let mut sources: Vec<Source> = Vec::new();
        let mut path = PathBuf::new();
        for piece in recipe.pieces {
            path = self.path(piece.model)?;
            sources.push(self.source(piece.model, &path)?);
            let mut obj = Obj::read(&path)?;
            self.place(piece, &mut obj)?;
            for m in &mut obj.materials {
                m.fixed = recipe.fixed.iter().any(|part| m.name.contains(part));
            }
            let (points, materials) = (whole.points.len() as u32, whole.materials.len());
            whole.points.extend(obj.points);
            whole.materials.extend(obj.materials);
            whole.faces.extend(obj.faces.into_iter().map(|f| Face {
                vertices: f.vertices.map(|v| v + points),
                material: f.material + materials,
                ..f
            }));
        }
        let joined = |text: fn(&Source) -> &String| {
            let mut all: Vec<&str> = sources.iter().map(|s| text(s).as_str()).collect();
            all.dedup();
            all.join(", ")
        };
        let source = Source {
            model: joined(|s| &s.model),
            author: joined(|s| &s.author),
            licence: LICENCE.to_owned(),
            source: joined(|s| &s.source),
        };
        let model = reduce(&whole, recipe.kind, source, recipe.triangles)
            .map_err(|source| Error::Reduce { path, source })?;
        Ok((model, whole.faces.len()))
    }

    /// Author, licence and place of a model, from the licence file in its folder.
    fn source(&self, model: &str, path: &Path) -> Result<Source, Error> {
        let folder = path.parent().unwrap_or(&self.folder);
        let refused = || Error::Licence { folder: folder.to_owned() };
        let listing = fs::read_dir(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        let mut files: Vec<PathBuf> = listing.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let named = |p: &&PathBuf| {
            p.file_name().is_some_and(|n| n.to_string_lossy().to_lowercase().contains("license"))
        };
        let text = read_text(files.iter().find(named).ok_or_else(refused)?)?;
        if !text.contains("Creative Commons Zero") {
            return Err(refused());
        }
        let number = ["blends/view/", "Blend #"].iter().find_map(|mark| {
            let digits: String = text.split_once(mark)?.1.chars().take_while(char::is_ascii_digit).collect();
            (!digits.is_empty()).then_some(digits)
        });
        Ok(Source {
            model: model.to_owned(),
            author: self.field(model, "creator")?.to_owned(),
            licence: LICENCE.to_owned(),
            source: number.map_or_else(
                || "Sweet Home 3D, Blend Swap CC-0".to_owned(),
                |n| format!("https://www.blendswap.com/blend/{n}"),
            ),
        })
    }

    /// Moves a model from its own units (x right, y up, z to the front) to the object's frame at its size.
    fn place(&self, piece: &Piece, obj: &mut Original) -> Result<(), Error> {
        let (mut lo, mut hi) = ([f32::MAX; 3], [f32::MIN; 3]);
        for p in &obj.points {
            (0..3).for_each(|k| (lo[k], hi[k]) = (lo[k].min(p[k]), hi[k].max(p[k])));
        }
        let mut size = piece.size_m;
        for (k, field) in ["width", "depth", "height"].iter().enumerate() {
            if size[k] == 0.0 {
                let text = self.field(piece.model, field)?;
                let cm: f32 = text.parse().map_err(|_| Error::Catalogue {
                    path: self.catalogue.clone(),
                    model: piece.model.to_owned(),
                    what: format!("{field} {text:?} is no number"),
                })?;
                size[k] = 0.01 * cm * piece.scale;
            }
        }
        // Width is along the file's x, depth along its z, height along its y.
        let scale = [size[0], size[2], size[1]];
        let scale: [f32; 3] = std::array::from_fn(|k| scale[k] / (hi[k] - lo[k]).max(1e-6));
        for p in &mut obj.points {
            let centred = [0, 2].map(|k| (p[k] - 0.5 * (lo[k] + hi[k])) * scale[k]);
            *p = [centred[1], centred[0], (p[1] - lo[1]) * scale[1] + piece.raise_m];
        }
        Ok(())
    }
}

/// Reading of Wavefront files.
struct Obj;

impl Obj {
    /// Reads a model and its materials. Polygons become fans of triangles; faces of two corners, which some exporters
    /// write for loose edges, and what lets more than half of the light through are left out.
    fn read(path: &Path) -> Result<Original, Error> {
        let text = read_text(path)?;
        let wrong = |line: usize, what: String| Error::Line { path: path.to_owned(), line: line + 1, what };
        let mut out = Original::default();
        let mut clear: Vec<bool> = Vec::new();
        let mut uvs: Vec<[f32; 2]> = Vec::new();
        let mut material = 0;
        for (k, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("v") => {
                    out.points.push(numbers(words).ok_or_else(|| wrong(k, "expected x y z".into()))?)
                }
                Some("vt") => uvs.push(numbers(words).ok_or_else(|| wrong(k, "expected u v".into()))?),
                Some("mtllib") => {
                    let name = line.trim_start()[6..].trim();
                    let file = path.with_file_name(name);
                    (out.materials, clear) = materials(&file)?;
                }
                Some("usemtl") => {
                    let name = line.trim_start()[6..].trim();
                    // A material that its library lacks is grey, as other readers have it.
                    let known = out.materials.iter().position(|m| m.name == name);
                    material = known.unwrap_or_else(|| {
                        out.materials.push(Material::grey(name));
                        clear.push(false);
                        out.materials.len() - 1
                    });
                }
                Some("f") => {
                    let corners = words
                        .map(|word| corner(word, out.points.len(), uvs.len()))
                        .collect::<Option<Vec<_>>>()
                        .ok_or_else(|| wrong(k, "expected vertices that came before".into()))?;
                    if out.materials.is_empty() {
                        return Err(wrong(k, "a face before any material".into()));
                    }
                    if clear[material] {
                        continue;
                    }
                    for i in 1..corners.len().max(2) - 1 {
                        let three = [corners[0], corners[i], corners[i + 1]];
                        out.faces.push(Face {
                            vertices: three.map(|c| c.0),
                            uv: three.map(|c| c.1.map_or([0.0; 2], |t| uvs[t])),
                            material,
                        });
                    }
                }
                _ => {}
            }
        }
        Ok(out)
    }
}

fn numbers<'a, const N: usize>(words: impl Iterator<Item = &'a str>) -> Option<[f32; N]> {
    let all: Vec<f32> = words.take(N).map_while(|w| w.parse().ok()).filter(|v: &f32| v.is_finite()).collect();
    all.try_into().ok()
}

/// A corner of a face, `v`, `v/t`, `v//n` or `v/t/n`, counted from 1 or backwards from the end.
fn corner(word: &str, points: usize, uvs: usize) -> Option<(u32, Option<usize>)> {
    let index = |text: &str, n: usize| {
        let k: i64 = text.parse().ok()?;
        let at = if k < 0 { n as i64 + k } else { k - 1 };
        (0..n as i64).contains(&at).then_some(at as usize)
    };
    let mut parts = word.split('/');
    let v = index(parts.next()?, points)?;
    let t = match parts.next() {
        None | Some("") => None,
        Some(text) => Some(index(text, uvs)?),
    };
    Some((v as u32, t))
}

/// Materials of a library, and which of them let more than half of the light through.
fn materials(path: &Path) -> Result<(Vec<Material>, Vec<bool>), Error> {
    let text = read_text(path)?;
    let wrong = |line: usize, what: String| Error::Line { path: path.to_owned(), line: line + 1, what };
    let (mut out, mut clear): (Vec<Material>, Vec<bool>) = (Vec::new(), Vec::new());
    for (k, line) in text.lines().enumerate() {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        if word == "newmtl" {
            out.push(Material::grey(rest.trim()));
            clear.push(false);
            continue;
        }
        let (Some(material), Some(clear)) = (out.last_mut(), clear.last_mut()) else { continue };
        match word {
            "Kd" => {
                let c: [f32; 3] =
                    numbers(rest.split_whitespace()).ok_or_else(|| wrong(k, "expected r g b".into()))?;
                material.colour = c.map(|v| (v.clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
            }
            "d" => {
                let [d]: [f32; 1] =
                    numbers(rest.split_whitespace()).ok_or_else(|| wrong(k, "expected a number".into()))?;
                *clear = d < 0.5;
            }
            "map_Kd" => {
                let file = path.with_file_name(rest.trim());
                // Some name files on their author's disk.
                if file.exists() {
                    let mut rgb = Vec::new();
                    let size = decode_compressed_rgb8(&read_bytes(&file)?, &Limits::default(), &mut rgb)
                        .map_err(|source| Error::Texture { path: file, source })?;
                    material.texture = Some((size.width as usize, size.height as usize, rgb));
                }
            }
            _ => {}
        }
    }
    Ok((out, clear))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUBE: &str = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nusemtl m\nf 1 2 3 4\n";

    fn folder(obj: &str, mtl: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("a.obj"), obj).expect("written");
        fs::write(folder.path().join("a.mtl"), mtl).expect("written");
        folder
    }

    fn read(obj: &str, mtl: &str) -> Result<Original, String> {
        let folder = folder(obj, mtl);
        let said = Obj::read(&folder.path().join("a.obj")).map_err(|e| e.to_string());
        said.map_err(|e| e.replace(&format!("{}/", folder.path().display()), ""))
    }

    #[test]
    fn polygons_become_triangles_and_clear_materials_are_left_out() {
        let seen = read(CUBE, "newmtl m\nKd 1 0.5 0\n").expect("it parses");
        assert_eq!((seen.points.len(), seen.faces.len()), (4, 2));
        assert_eq!(seen.materials[0].colour, [255, 128, 0]);
        assert_eq!(seen.faces[1].vertices, [0, 2, 3]);
        assert_eq!(read(CUBE, "newmtl other\n").expect("it parses").materials[1].colour, [200; 3]);
        let edge = CUBE.replace("f 1 2 3 4", "f 1 2");
        assert_eq!(read(&edge, "newmtl m\n").expect("it parses").faces.len(), 0);
        assert_eq!(read(CUBE, "newmtl m\nd 0.3\n").expect("it parses").faces.len(), 0);
        let backwards = CUBE.replace("f 1 2 3 4", "f -4 -3 -2");
        assert_eq!(read(&backwards, "newmtl m\n").expect("it parses").faces[0].vertices, [0, 1, 2]);
    }

    #[test]
    fn what_does_not_parse_is_refused_with_file_and_line() {
        for (obj, mtl, want) in [
            (CUBE.replace("v 1 1 0", "v 1 x 0"), "newmtl m\n", "a.obj, line 4: expected x y z"),
            (CUBE.replace("v 1 1 0", "v 1 nan 0"), "newmtl m\n", "a.obj, line 4: expected x y z"),
            (CUBE.replace("3 4", "3 5"), "newmtl m\n", "a.obj, line 7: expected vertices that came before"),
            (CUBE.to_owned(), "newmtl m\nKd 1 0\n", "a.mtl, line 2: expected r g b"),
        ] {
            assert_eq!(read(&obj, mtl).expect_err("refused"), want);
        }
    }

    #[test]
    fn models_without_a_licence_line_are_refused_by_name() {
        let folder = folder(CUBE, "newmtl m\n");
        let model = folder.path().join("a.obj");
        fs::write(
            folder.path().join("PluginFurnitureCatalog.properties"),
            "model#1=/a.obj\ncreator#1=Somebody\nwidth#1=1\n",
        )
        .expect("written");
        let library = Library::open(folder.path()).expect("a catalogue");
        let refusal = library.source("a", &model).expect_err("no licence file").to_string();
        assert!(refusal.contains(&folder.path().display().to_string()), "{refusal}");
        let licence = folder.path().join("LICENSE.html");
        fs::write(&licence, "Released under Creative Commons Attribution 3.0").expect("written");
        assert!(matches!(library.source("a", &model), Err(Error::Licence { .. })));
        fs::write(&licence, "Blend #12: released under Creative Commons Zero").expect("written");
        let source = library.source("a", &model).expect("a licence");
        assert_eq!((source.author.as_str(), source.licence.as_str()), ("Somebody", LICENCE));
        assert_eq!(source.source, "https://www.blendswap.com/blend/12");
        assert!(library.field("b", "width").expect_err("unknown").to_string().contains("\"b\""));
    }
}
