//! Latents and text rows of many samples, encoded once and kept in sharded files, so that training reads them instead of running
//! the autoencoder and the text encoder.
//!
//! A directory holds `latents.json` and shards `00000.safetensors`, ... A shard is whole or not listed, so encoding goes on
//! where it was stopped. Every shard has its SHA-256, which is checked when the directory is opened; latents of another
//! autoencoder, text encoder or recipe are refused by the identity in `latents.json`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use mindseye_base::file::{replace, sha256};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

const MANIFEST: &str = "latents.json";

/// Why latents cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LatentError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The list of shards makes no sense.
    #[error("{path}: {source}; remove the directory and encode again")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A shard is no safetensors file, or lacks a tensor.
    #[error("{path}: {source}; remove the directory and encode again")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A shard is not what was written.
    #[error("{path}: its SHA-256 is {got}, but {wanted} was written; remove the directory and encode again")]
    Checksum {
        /// The file.
        path: PathBuf,
        /// As it was written.
        wanted: String,
        /// As it is.
        got: String,
    },
    /// Latents of another autoencoder, text encoder or recipe.
    #[error(
        "{path}: latents of another autoencoder, text encoder or recipe ({there}, here {here}); remove the directory to \
         encode again, or name the run that they were made with"
    )]
    Other {
        /// The directory.
        path: PathBuf,
        /// Identity that they were made with.
        there: String,
        /// Identity here.
        here: String,
    },
    /// Encoding was stopped.
    #[error("{path}: {have} of {wanted} samples are encoded; run the same command again to go on")]
    Stopped {
        /// The directory.
        path: PathBuf,
        /// Samples that are there.
        have: u64,
        /// Samples that are wanted.
        wanted: u64,
    },
}

fn failed(path: &Path) -> impl Fn(io::Error) -> LatentError + '_ {
    move |source| LatentError::Io { path: path.to_path_buf(), source }
}

/// One sample: latents `[latents, z, h, w]`, text rows `[text_len, text_dim]`, and what lift heads learn from (see
/// [`crate::wan::Labels`]), empty where it is not known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LatentSample {
    /// The recording.
    pub context: Vec<f32>,
    /// First image, motion, box.
    pub target: Vec<f32>,
    /// What is asked for.
    pub text: Vec<f32>,
    /// Base poses in the map, x, y (m) and yaw (rad) `[latents, 3]`: of the recording, then of the target.
    pub poses: Vec<f32>,
    /// Share of each token that shows the thing `[latents, tokens]`: of the recording, then of the first image.
    pub seen: Vec<f32>,
    /// The thing's centre in the map (m).
    pub place: Vec<f32>,
}

impl LatentSample {
    const PARTS: [&'static str; 6] = ["context", "target", "text", "poses", "seen", "place"];

    fn parts(&self) -> [&Vec<f32>; 6] {
        [&self.context, &self.target, &self.text, &self.poses, &self.seen, &self.place]
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    identity: String,
    shards: Vec<Shard>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shard {
    file: String,
    samples: u64,
    sha256: String,
}

const FORMAT: u32 = 2;

impl Manifest {
    /// The list of a directory; an empty one where there is none yet.
    fn read(dir: &Path, identity: &str) -> Result<Self, LatentError> {
        let path = dir.join(MANIFEST);
        let fresh = || Self { format: FORMAT, identity: identity.to_owned(), shards: Vec::new() };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            Err(source) => return Err(LatentError::Io { path, source }),
        };
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|source| LatentError::Manifest { path, source })?;
        let there = format!("{} of format {}", manifest.identity, manifest.format);
        let here = format!("{identity} of format {FORMAT}");
        if there != here {
            return Err(LatentError::Other { path: dir.to_path_buf(), there, here });
        }
        Ok(manifest)
    }

    fn samples(&self) -> u64 {
        self.shards.iter().map(|shard| shard.samples).sum()
    }
}

/// Where a sample's values are: file, and first byte and number of values of each part.
#[derive(Clone, Debug)]
struct Place {
    shard: usize,
    parts: [(u64, usize); 6],
}

/// Pre-encoded samples in a directory, whole.
#[derive(Debug)]
pub struct Latents {
    files: Vec<PathBuf>,
    places: Vec<Place>,
    identity: String,
}

impl Latents {
    /// Encodes until there are `samples` samples, `per_shard` in a file, and opens them; `make` makes the sample of a number.
    /// What is there already is checked and kept.
    ///
    /// # Errors
    /// [`LatentError`]; when `stop` was set, after the shard at work was given up.
    pub fn encode<E: From<LatentError>>(
        dir: &Path,
        identity: &str,
        (samples, per_shard): (u64, u64),
        stop: &AtomicBool,
        mut make: impl FnMut(u64) -> Result<LatentSample, E>,
    ) -> Result<Self, E> {
        fs::create_dir_all(dir).map_err(failed(dir))?;
        let mut manifest = Manifest::read(dir, identity)?;
        while manifest.samples() < samples {
            let (have, number) = (manifest.samples(), manifest.shards.len());
            let mut made = Vec::new();
            for n in have..samples.min(have + per_shard.max(1)) {
                if stop.load(Ordering::Relaxed) {
                    return Err(LatentError::Stopped { path: dir.into(), have, wanted: samples }.into());
                }
                made.push(make(n)?);
            }
            let file = format!("{number:05}.safetensors");
            let path = dir.join(&file);
            let bytes =
                serialise(&made).map_err(|source| LatentError::Shard { path: path.clone(), source })?;
            replace(&path, &bytes).map_err(failed(&path))?;
            manifest.shards.push(Shard { file, samples: made.len() as u64, sha256: sha256(&bytes) });
            let path = dir.join(MANIFEST);
            let text = serde_json::to_vec_pretty(&manifest)
                .map_err(|source| LatentError::Manifest { path: path.clone(), source })?;
            replace(&path, &text).map_err(failed(&path))?;
        }
        Ok(Self::open(dir, identity)?)
    }

    /// Opens what was encoded, after checking every shard.
    ///
    /// # Errors
    /// [`LatentError`] names the file.
    pub fn open(dir: &Path, identity: &str) -> Result<Self, LatentError> {
        let manifest = Manifest::read(dir, identity)?;
        let mut out = Self { files: Vec::new(), places: Vec::new(), identity: identity.to_owned() };
        for shard in &manifest.shards {
            let path = dir.join(&shard.file);
            let bytes = fs::read(&path).map_err(failed(&path))?;
            let got = sha256(&bytes);
            if got != shard.sha256 {
                return Err(LatentError::Checksum { path, wanted: shard.sha256.clone(), got });
            }
            let broken = |source| LatentError::Shard { path: path.clone(), source };
            let (header, meta) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
            for i in 0..shard.samples {
                let mut parts = [(0, 0); 6];
                for (part, name) in parts.iter_mut().zip(LatentSample::PARTS) {
                    let name = format!("{i}.{name}");
                    let info = meta.info(&name).ok_or(safetensors::SafeTensorError::TensorNotFound(name));
                    let (from, to) = info.map_err(broken)?.data_offsets;
                    *part = ((8 + header + from) as u64, (to - from) / 4);
                }
                out.places.push(Place { shard: out.files.len(), parts });
            }
            out.files.push(path);
        }
        Ok(out)
    }

    /// Number of samples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// What they were made with.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Reads one sample.
    ///
    /// # Errors
    /// When its file cannot be read.
    ///
    /// # Panics
    /// When there is no such sample.
    pub fn sample(&self, number: usize) -> Result<LatentSample, LatentError> {
        let place = &self.places[number];
        let path = &self.files[place.shard];
        let file = File::open(path).map_err(failed(path))?;
        let read = |(at, n): (u64, usize)| {
            let mut bytes = vec![0; 4 * n];
            file.read_exact_at(&mut bytes, at).map_err(failed(path))?;
            Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let [context, target, text, poses, seen, place] = place.parts;
        Ok(LatentSample {
            context: read(context)?,
            target: read(target)?,
            text: read(text)?,
            poses: read(poses)?,
            seen: read(seen)?,
            place: read(place)?,
        })
    }
}

fn serialise(samples: &[LatentSample]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let parts = samples.iter().enumerate().flat_map(|(i, sample)| {
        LatentSample::PARTS.iter().zip(sample.parts()).map(move |(name, values)| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (format!("{i}.{name}"), values.len(), bytes)
        })
    });
    let owned: Vec<(String, usize, Vec<u8>)> = parts.collect();
    let views: Vec<(&str, TensorView<'_>)> = owned
        .iter()
        .map(|(name, n, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![*n], bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()?;
    safetensors::serialize(views, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(n: u64) -> LatentSample {
        let values = |k: u64, len: usize| (0..len).map(|i| (n * 100 + k * 10) as f32 + i as f32).collect();
        let (context, target, text) = (values(1, 4), values(2, 3), values(3, 2));
        // Every other sample knows no poses.
        let poses = if n.is_multiple_of(2) { values(4, 6) } else { Vec::new() };
        LatentSample { context, target, text, seen: poses.clone(), place: poses.clone(), poses }
    }

    fn encode(dir: &Path, samples: u64, from: u64) -> Result<Latents, LatentError> {
        let go = AtomicBool::new(false);
        Latents::encode(dir, "a", (samples, 2), &go, |n| {
            assert!(n >= from, "sample {n} is there");
            Ok::<_, LatentError>(made(n))
        })
    }

    #[test]
    fn samples_come_back_and_encoding_goes_on_where_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(encode(dir.path(), 4, 0).expect("it encodes").len(), 4);
        let all = encode(dir.path(), 5, 4).expect("it goes on");
        assert_eq!(all.len(), 5);
        for n in 0..5 {
            assert_eq!(all.sample(n).expect("it reads"), made(n as u64));
        }
        // Stopped in the middle of a shard: those before stay.
        let stop = AtomicBool::new(false);
        let stopped = Latents::encode(dir.path(), "a", (9, 2), &stop, |n| {
            stop.store(n == 7, Ordering::Relaxed);
            Ok::<_, LatentError>(made(n))
        });
        let said = stopped.expect_err("it was stopped").to_string();
        assert!(said.contains("7 of 9 samples are encoded"), "{said}");
        assert_eq!(encode(dir.path(), 9, 7).expect("it goes on").len(), 9);
        assert_eq!(Latents::open(dir.path(), "a").expect("it opens").sample(8).expect("it reads"), made(8));
    }

    #[test]
    fn shards_that_changed_and_latents_of_another_autoencoder_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        encode(dir.path(), 4, 0).expect("it encodes");
        let said = Latents::open(dir.path(), "b").expect_err("another").to_string();
        assert!(
            said.contains("latents of another autoencoder") && said.contains("here b of format 2"),
            "{said}"
        );
        let path = dir.path().join("00001.safetensors");
        let mut bytes = fs::read(&path).expect("it is there");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).expect("it is written");
        let said = encode(dir.path(), 4, 4).expect_err("changed").to_string();
        assert!(said.contains("00001.safetensors: its SHA-256 is"), "{said}");
        fs::remove_file(&path).expect("it is removed");
        let said = Latents::open(dir.path(), "a").expect_err("missing").to_string();
        assert!(said.contains("00001.safetensors: No such file"), "{said}");
        fs::write(dir.path().join(MANIFEST), "{").expect("it is written");
        let said = Latents::open(dir.path(), "a").expect_err("no list").to_string();
        assert!(said.contains("latents.json: EOF"), "{said}");
    }
}
