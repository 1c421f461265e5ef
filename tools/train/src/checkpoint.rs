//! Everything that a run needs to go on where it stopped, and its file.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use mindseye_base::file::replace;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clips::Clips;
use crate::codec_fit::{BASIS, MEAN, fit_codec, fit_codec_to};
use crate::config::TrainConfig;
use crate::data::{Codec, Source, Worlds};
use crate::eager::Params;
use crate::error::{TrainError, io};
use crate::family::HouseModel;
use crate::net::{self, Losses};
use crate::optim::Moments;
use crate::resume;

/// The table of words.
const WORDS: &str = "text.shared.weight";

/// Everything that a run needs to go on where it stopped.
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Weights, the codec's included.
    pub params: Arc<Params>,
    /// Averaged weights.
    pub ema: Params,
    pub(crate) moments: Vec<Moments>,
    /// What belongs to the next line of the metrics file.
    pub(crate) pending: Pending,
    /// What a checkpoint was written with.
    pub(crate) origin: Origin,
}

/// What a checkpoint was written with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// Configuration (TOML).
    pub(crate) config: String,
    /// Model (TOML).
    pub(crate) model: String,
    /// Identity of the clips; empty without clips.
    pub(crate) data: String,
}

/// Sums since the last line of the metrics file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Pending {
    pub(crate) losses: Losses,
    pub(crate) norm_max: f64,
    pub(crate) steps: u64,
}

impl Pending {
    /// Exact text: the bits of every number.
    fn to_text(self) -> String {
        self.losses
            .values()
            .iter()
            .chain([&self.norm_max])
            .fold(self.steps.to_string(), |text, v| format!("{text} {:016x}", v.to_bits()))
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let steps = words.next()?.parse().ok()?;
        let mut next = || u64::from_str_radix(words.next()?, 16).ok().map(f64::from_bits);
        let mut losses = Losses::default().values();
        for value in &mut losses {
            *value = next()?;
        }
        Some(Self { losses: Losses::from_values(&losses), norm_max: next()?, steps })
    }
}

/// The configuration (TOML) that a checkpoint was written with.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn configuration(path: &Path) -> Result<String, TrainError> {
    let data = fs::read(path).map_err(io(path))?;
    let (_, meta) = safetensors::SafeTensors::read_metadata(&data)
        .map_err(|source| TrainError::Damaged { path: path.into(), source })?;
    Ok(meta.metadata().as_ref().and_then(|m| m.get("config")).cloned().unwrap_or_default())
}

impl State {
    /// Fresh weights; the codec is fitted to houses.
    ///
    /// # Panics
    /// As [`fit_codec`].
    #[must_use]
    pub fn new(config: &TrainConfig, model: &HouseModel, worlds: impl Into<Worlds>) -> Self {
        Self::with_codec(config, model, fit_codec(model, worlds, config.seed, config.codec_blocks))
    }

    /// Fresh weights; the codec is fitted to clips, and to houses where they are mixed in.
    ///
    /// # Errors
    /// When pixels of clips cannot be read.
    ///
    /// # Panics
    /// As [`fit_codec_to`].
    pub fn from_clips(
        config: &TrainConfig,
        model: &HouseModel,
        worlds: impl Into<Worlds>,
        clips: &Clips,
    ) -> Result<Self, TrainError> {
        let seed = config.seed ^ 0xc0dec;
        let houses = (config.codec_blocks as f64 * config.data.house) as usize;
        let mut blocks = clips.blocks(seed, config.codec_blocks - houses)?;
        if houses > 0 {
            blocks.extend(Source::new(model, worlds, None).blocks(seed, houses));
        }
        Ok(Self::with_codec(config, model, fit_codec_to(model, config.seed, blocks)))
    }

    fn with_codec(config: &TrainConfig, model: &HouseModel, codec: Codec) -> Self {
        let mut params = net::init(model, config.seed);
        let k = model.codec.block_values();
        params.insert(BASIS, &[model.codec.channels, k], codec.basis);
        params.insert(MEAN, &[k], codec.mean);
        Self::fresh(params)
    }

    /// The start of a run with these weights.
    pub(crate) fn fresh(params: Params) -> Self {
        let ema = params.clone();
        Self {
            step: 0,
            moments: vec![Moments::default(); params.len()],
            params: Arc::new(params),
            ema,
            pending: Pending::default(),
            origin: Origin::default(),
        }
    }

    /// Takes the weights of a finished run or bundle in place of fresh ones; moments and step stay at their start.
    /// Weights that `from` lacks (heads that only training has), or has in another shape, stay fresh: those are returned,
    /// by name and shapes. Of words there may be more than `from` has: lists of words begin alike, and the rows of those that
    /// both have are taken.
    ///
    /// # Errors
    /// When no weight fits.
    pub fn start_from(&mut self, from: &Params, path: &Path) -> Result<Vec<String>, TrainError> {
        let (mut params, mut fresh) = ((*self.params).clone(), Vec::new());
        for i in 0..params.len() {
            let (name, shape, _) = params.get(i);
            let (name, shape) = (name.to_string(), shape.to_vec());
            let Some(at) = from.position(&name) else {
                fresh.push(format!("{name} {shape:?}"));
                continue;
            };
            let (_, have, values) = from.get(at);
            // A graph may store a 1x1x1 convolution as the matrix that it is.
            let sides = |s: &[usize]| s.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
            let fewer = name == WORDS && have.get(1) == shape.get(1) && have.first() < shape.first();
            if sides(have) == sides(&shape) {
                params.insert(&name, &shape, values.to_vec());
            } else if fewer {
                let mut longer = params.get(i).2.to_vec();
                longer[..values.len()].copy_from_slice(values);
                params.insert(&name, &shape, longer);
                fresh.push(format!("{name} {shape:?} from row {} on", have[0]));
            } else {
                fresh.push(format!("{name} {shape:?} (it has {have:?})"));
            }
        }
        if fresh.len() == params.len() {
            return Err(TrainError::Checkpoint {
                path: path.into(),
                reason: "it has no weight that fits this model".into(),
            });
        }
        self.ema = params.clone();
        self.params = Arc::new(params);
        Ok(fresh)
    }

    /// Writes a checkpoint: to a temporary name, then renamed.
    ///
    /// # Errors
    /// When the file cannot be written; an older checkpoint stays as it was.
    pub fn save(&self, path: &Path, config: &impl Serialize) -> Result<(), TrainError> {
        use safetensors::tensor::{Dtype, TensorView};
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut owned: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for i in 0..self.params.len() {
            let (name, shape, data) = self.params.get(i);
            owned.push((format!("weights.{name}"), shape.to_vec(), bytes(data)));
            owned.push((format!("ema.{name}"), shape.to_vec(), bytes(self.ema.get(i).2)));
            for (kind, m) in [("first", &self.moments[i].first), ("second", &self.moments[i].second)] {
                if !m.is_empty() {
                    owned.push((format!("{kind}.{name}"), shape.to_vec(), bytes(m)));
                }
            }
        }
        let views: Vec<(&str, TensorView)> = owned
            .iter()
            .map(|(n, s, d)| {
                (n.as_str(), TensorView::new(Dtype::F32, s.clone(), d).expect("sizes come from the tensors"))
            })
            .collect();
        let meta = std::collections::HashMap::from([
            ("step".to_string(), self.step.to_string()),
            ("config".to_string(), toml::to_string(config).unwrap_or_default()),
            ("model".to_string(), self.origin.model.clone()),
            ("data".to_string(), self.origin.data.clone()),
            ("pending".to_string(), self.pending.to_text()),
        ]);
        let data = safetensors::serialize(views, Some(meta))
            .map_err(|source| TrainError::Damaged { path: path.into(), source })?;
        replace(path, &data).map_err(io(path))
    }

    /// Refuses to go on with another configuration or other data.
    pub(crate) fn agrees(
        &self,
        path: &Path,
        config: &(impl Serialize + DeserializeOwned),
        model: &(impl Serialize + DeserializeOwned),
        identity: &str,
    ) -> Result<(), TrainError> {
        // Through the types, so that a field that the checkpoint does not know yet has its default.
        let mut found = resume::differences("", "configuration", &self.origin.config, config);
        if !self.origin.model.is_empty() {
            found.extend(resume::differences("model.", "model", &self.origin.model, model));
        }
        if self.origin.data != identity {
            found.push("the clips have changed".to_owned());
        }
        if found.is_empty() {
            return Ok(());
        }
        Err(TrainError::Other { path: path.to_path_buf(), differences: found.join("; ") })
    }

    /// Reads a checkpoint of a run with this model.
    ///
    /// # Errors
    /// When it cannot be read or is of another model: names the tensor.
    pub fn load(path: &Path, model: &HouseModel) -> Result<Self, TrainError> {
        let mut wanted = net::collect(model);
        let k = model.codec.block_values();
        wanted.insert(BASIS, &[model.codec.channels, k], vec![0.0; model.codec.channels * k]);
        wanted.insert(MEAN, &[k], vec![0.0; k]);
        Self::read(path, &wanted)
    }

    /// Reads a checkpoint that has the weights `wanted`.
    pub(crate) fn read(path: &Path, wanted: &Params) -> Result<Self, TrainError> {
        let fail = |reason: String| TrainError::Checkpoint { path: path.into(), reason };
        let data = fs::read(path).map_err(io(path))?;
        let damaged = |source| TrainError::Damaged { path: path.into(), source };
        let (_, meta) = safetensors::SafeTensors::read_metadata(&data).map_err(damaged)?;
        let file = safetensors::SafeTensors::deserialize(&data).map_err(damaged)?;
        let note = |key: &str| meta.metadata().as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default();
        let step = note("step").parse().map_err(|_| fail("no step recorded".into()))?;
        let pending = Pending::from_text(&note("pending")).unwrap_or_default();
        let origin = Origin { config: note("config"), model: note("model"), data: note("data") };
        let get = |kind: &str, name: &str, shape: &[usize]| -> Result<Option<Vec<f32>>, TrainError> {
            let Ok(t) = file.tensor(&format!("{kind}.{name}")) else { return Ok(None) };
            if t.shape() != shape || t.dtype() != safetensors::Dtype::F32 {
                return Err(fail(format!(
                    "{name}: expected f32 {shape:?}, got {:?} {:?}",
                    t.dtype(),
                    t.shape()
                )));
            }
            Ok(Some(t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
        };
        let (mut params, mut ema, mut moments) = (Params::new(), Params::new(), Vec::new());
        for i in 0..wanted.len() {
            let (name, shape, _) = wanted.get(i);
            let missing = || fail(format!("{name}: missing"));
            params.insert(name, shape, get("weights", name, shape)?.ok_or_else(missing)?);
            ema.insert(name, shape, get("ema", name, shape)?.ok_or_else(missing)?);
            moments.push(Moments {
                first: get("first", name, shape)?.unwrap_or_default(),
                second: get("second", name, shape)?.unwrap_or_default(),
            });
        }
        Ok(Self { step, params: Arc::new(params), ema, moments, pending, origin })
    }
}
