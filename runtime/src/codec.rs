//! Frames to latents and back: the stateless codec of the small models, and the streaming video autoencoder of the
//! Wan2.2 family, behind one interface.
//!
//! | bundle has | frames of a latent | state |
//! |---|---|---|
//! | `vae_encoder`, `vae_decoder` | always four | none |
//! | `vae_encoder_first`, `_next`, `vae_decoder_first`, `_next` | one for the first of a stream, then four | caches: outputs `new_cache.{i}` are the next inputs `cache.{i}` |
//!
//! A stream begins with a segment: its first frame is a latent of its own, as in the reference (Wan2.2: `1 + 4 k`
//! frames). Each frame is encoded once; the caches are the only state, of one size whatever the stream's length.

use crate::context::{EncodeError, GROUP, GroupEncoder};
use crate::image::RgbImage;
use mindseye_engines::backend::{BackendError, Engine, Session, State, Tensor};
use mindseye_engines::bundle::Manifest;
use std::sync::Arc;

/// Why a codec cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// What one graph of a stream leaves is not what the next one takes.
    #[error(
        "bundle: {component}_{part}: output {output:?} does not have the shape of {component}_next's input {input:?}; \
         export the bundle again"
    )]
    Cache {
        /// `vae_encoder` or `vae_decoder`.
        component: String,
        /// `first` or `next`.
        part: &'static str,
        /// Name of the output.
        output: String,
        /// Name of the input.
        input: String,
    },
    /// A graph gives another number of values than its pictures have.
    #[error("decoder: gave {got} values, expected {expected}")]
    Size {
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// The engines of a bundle that encode or decode, shared by all threads.
#[derive(Clone)]
pub(crate) enum CodecEngines {
    /// Without state.
    Plain(Arc<dyn Engine>),
    /// The first chunk, and every later one.
    Stream(Arc<dyn Engine>, Arc<dyn Engine>),
}

/// A graph with state: what it gives as `new_cache.{i}` it is given as `cache.{i}` the next time.
struct Stream {
    first: Box<dyn Session>,
    next: Box<dyn Session>,
    /// Names of the frames or latents that go in and come out.
    ports: (&'static str, &'static str),
    /// Caches that the last chunk left, and memory for those of the next; where the backend keeps them.
    caches: State,
    fresh: State,
    started: bool,
}

impl Stream {
    fn new(
        (first, next): (&dyn Engine, &dyn Engine),
        component: &str,
        ports: (&'static str, &'static str),
    ) -> Result<Self, CodecError> {
        let count = next.inputs().iter().filter(|p| p.name.starts_with("cache.")).count();
        for i in 0..count {
            let (out, into) = (format!("new_cache.{i}"), format!("cache.{i}"));
            let wanted = next.inputs().iter().find(|p| p.name == into).map(|p| &p.shape);
            for (part, engine) in [("first", first), ("next", next)] {
                let given = engine.outputs().iter().find(|p| p.name == out).map(|p| &p.shape);
                if wanted.is_none() || given != wanted {
                    let component = component.to_owned();
                    return Err(CodecError::Cache { component, part, output: out, input: into });
                }
            }
        }
        let (caches, fresh) = (State::default(), State::default());
        Ok(Self { first: first.session()?, next: next.session()?, ports, caches, fresh, started: false })
    }

    /// One chunk. After an error the state is what it was.
    fn step(&mut self, input: &Tensor, output: &mut Tensor) -> Result<(), BackendError> {
        let (session, from) =
            if self.started { (&mut self.next, Some(&self.caches)) } else { (&mut self.first, None) };
        let fresh = Some(&mut self.fresh);
        session.run_with_state(&[(self.ports.0, input)], &mut [(self.ports.1, output)], from, fresh)?;
        std::mem::swap(&mut self.caches, &mut self.fresh);
        self.started = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.started = false;
    }
}

enum Half {
    Plain(Box<dyn Session>),
    Stream(Box<Stream>),
}

impl Half {
    fn new(
        engines: &CodecEngines,
        component: &str,
        ports: (&'static str, &'static str),
    ) -> Result<Self, CodecError> {
        Ok(match engines {
            CodecEngines::Plain(engine) => Self::Plain(engine.session()?),
            CodecEngines::Stream(first, next) => {
                Self::Stream(Box::new(Stream::new((first.as_ref(), next.as_ref()), component, ports)?))
            }
        })
    }
}

/// Sizes that both halves need.
#[derive(Clone)]
struct Sizes {
    width: usize,
    height: usize,
    /// Channels, rows and columns of a latent.
    latent: [usize; 3],
}

impl Sizes {
    fn of(manifest: &Manifest) -> Self {
        let (image, latent) = (&manifest.image, &manifest.latent);
        Self {
            width: image.width,
            height: image.height,
            latent: [latent.channels, latent.height, latent.width],
        }
    }

    fn plane(&self) -> usize {
        self.width * self.height
    }

    fn latent_len(&self) -> usize {
        self.latent.iter().product()
    }
}

/// Encodes frames, for one thread.
pub(crate) struct Encoder {
    half: Half,
    /// The encoder of stills, where that is a graph of its own.
    still: Option<Box<dyn Session>>,
    sizes: Sizes,
    /// Latents are `(value - mean) / std` of what a plain encoder gives; streams give them so.
    mean: Vec<f32>,
    std: Vec<f32>,
    output: Tensor,
}

impl Encoder {
    pub(crate) fn new(engines: &CodecEngines, manifest: &Manifest) -> Result<Self, CodecError> {
        let still = match engines {
            CodecEngines::Plain(_) => None,
            CodecEngines::Stream(first, _) => Some(first.session()?),
        };
        Ok(Self {
            half: Half::new(engines, "vae_encoder", ("frames", "latent"))?,
            still,
            sizes: Sizes::of(manifest),
            mean: manifest.latent.mean.clone(),
            std: manifest.latent.std.clone(),
            output: Tensor::empty(),
        })
    }

    /// `(frame, colour, row, column)`, -1..1.
    fn pixels(&self, frames: &[&RgbImage]) -> Result<Vec<f32>, EncodeError> {
        let plane = self.sizes.plane();
        let mut pixels = vec![0.0f32; frames.len() * 3 * plane];
        for (t, frame) in frames.iter().enumerate() {
            if frame.data.len() != 3 * plane {
                let (expected, got) = (3 * plane, frame.data.len());
                return Err(EncodeError::Size { what: "frame", expected, got });
            }
            for (p, rgb) in frame.data.chunks_exact(3).enumerate() {
                for (c, value) in rgb.iter().enumerate() {
                    pixels[(t * 3 + c) * plane + p] = f32::from(*value) / 127.5 - 1.0;
                }
            }
        }
        Ok(pixels)
    }

    fn put(&self, latent: &mut [f32]) -> Result<(), EncodeError> {
        let values = self.output.as_f32().unwrap_or_default();
        if values.len() != latent.len() {
            let (expected, got) = (latent.len(), values.len());
            return Err(EncodeError::Size { what: "latent", expected, got });
        }
        latent.copy_from_slice(values);
        if matches!(self.half, Half::Plain(_)) {
            let cells = self.sizes.latent[1] * self.sizes.latent[2];
            for (i, value) in latent.iter_mut().enumerate() {
                let channel = i / cells;
                *value = (*value - self.mean[channel]) / self.std[channel];
            }
        }
        Ok(())
    }

    fn run(&mut self, frames: &[&RgbImage], still: bool, latent: &mut [f32]) -> Result<(), EncodeError> {
        let pixels = self.pixels(frames)?;
        let Sizes { width, height, .. } = self.sizes;
        let result = match &mut self.half {
            Half::Plain(session) => {
                let input = Tensor::f32(&[1, frames.len(), 3, height, width], pixels);
                session.run_into(&[("frames", &input)], &mut [("latent", &mut self.output)])
            }
            Half::Stream(stream) => {
                let input = Tensor::f32(&[frames.len(), 3, height, width], pixels);
                match self.still.as_mut().filter(|_| still) {
                    Some(session) => {
                        session.run_into(&[("frames", &input)], &mut [("latent", &mut self.output)])
                    }
                    None => stream.step(&input, &mut self.output),
                }
            }
        };
        result?;
        self.put(latent)
    }
}

impl GroupEncoder for Encoder {
    fn latent_len(&self) -> usize {
        self.sizes.latent_len()
    }

    fn group_len(&self) -> usize {
        match &self.half {
            Half::Stream(stream) if !stream.started => 1,
            _ => GROUP,
        }
    }

    fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        if frames.len() != self.group_len() {
            return Err(EncodeError::Size { what: "group", expected: self.group_len(), got: frames.len() });
        }
        self.run(&frames.iter().collect::<Vec<_>>(), false, latent)
    }

    fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
        let count = if self.still.is_some() { 1 } else { GROUP };
        self.run(&vec![frame; count], true, latent)
    }

    fn reset(&mut self) {
        if let Half::Stream(stream) = &mut self.half {
            stream.reset();
        }
    }
}

/// Decodes latents, for one thread.
pub(crate) struct Decoder {
    half: Half,
    sizes: Sizes,
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl Decoder {
    pub(crate) fn new(engines: &CodecEngines, manifest: &Manifest) -> Result<Self, CodecError> {
        Ok(Self {
            half: Half::new(engines, "vae_decoder", ("latent", "frames"))?,
            sizes: Sizes::of(manifest),
            mean: manifest.latent.mean.clone(),
            std: manifest.latent.std.clone(),
        })
    }

    /// Whether latents out of the middle of a stream can be decoded by themselves.
    pub(crate) fn is_stateless(&self) -> bool {
        matches!(self.half, Half::Plain(_))
    }

    /// A clip `[n, channels, height, width]` to `4 n` frames. Frame `4 i + 3` is the last one of latent `i`: the
    /// single frame of a stream's first latent is given four times.
    pub(crate) fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, CodecError> {
        let len = self.sizes.latent_len();
        let [channels, rows, columns] = self.sizes.latent;
        let (plane, mut frames) = (self.sizes.plane(), Vec::new());
        let mut out = Tensor::empty();
        let mut take = |out: &mut Tensor, wanted: usize, copies: usize| {
            let pixels = std::mem::replace(out, Tensor::empty()).into_f32().unwrap_or_default();
            if pixels.len() != wanted * 3 * plane {
                return Err(CodecError::Size { expected: wanted * 3 * plane, got: pixels.len() });
            }
            for values in pixels.chunks_exact(3 * plane) {
                frames.extend(std::iter::repeat_n(picture(&self.sizes, values), copies));
            }
            Ok(())
        };
        match &mut self.half {
            _ if latents.len() < len => {}
            Half::Plain(session) => {
                let count = latents.len() / len;
                let cells = rows * columns;
                let channel = |i: usize| i / cells % channels;
                let whole = latents[..count * len].iter().enumerate();
                let z = whole.map(|(i, v)| v * self.std[channel(i)] + self.mean[channel(i)]).collect();
                let z = Tensor::f32(&[count, channels, 1, rows, columns], z);
                session.run_into(&[("latent", &z)], &mut [("frames", &mut out)])?;
                take(&mut out, count * GROUP, 1)?;
            }
            Half::Stream(stream) => {
                stream.reset();
                for (i, z) in latents.chunks_exact(len).enumerate() {
                    let z = Tensor::f32(&[1, channels, rows, columns], z.to_vec());
                    stream.step(&z, &mut out)?;
                    if i == 0 { take(&mut out, 1, GROUP)? } else { take(&mut out, GROUP, 1)? }
                }
            }
        }
        Ok(frames)
    }
}

/// `[3, height, width]` in -1..1 to a picture; values outside are clamped, as the reference does.
fn picture(sizes: &Sizes, values: &[f32]) -> RgbImage {
    let plane = sizes.plane();
    let mut data = vec![0u8; 3 * plane];
    for (c, channel) in values.chunks_exact(plane).enumerate() {
        for (p, v) in channel.iter().enumerate() {
            data[p * 3 + c] = ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
        }
    }
    RgbImage { width: sizes.width, height: sizes.height, data }
}
