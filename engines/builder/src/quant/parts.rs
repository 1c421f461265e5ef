//! Inputs for every part of a bundle without a recording: seeded noise of the right shapes for the denoiser and for what
//! surrounds it, and the joint denoiser's inputs, cut in two, for its cached halves. Good enough to build, compare and
//! time; ranges that matter come from rendered scenes or bags.

use std::collections::BTreeMap;

use super::{CalibrationSource, Inputs, SuppliedError};
use mindseye_base::random::{Rng, SplitMix64};
use mindseye_engines::backend::{Elements, Session, Tensor};
use mindseye_engines::denoise::DenoiseStep;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5;
use mindseye_engines::onnx::{DataType, Dim, Model};
use mindseye_engines::session_denoiser::step_tensors;

/// Seeded inputs of a graph around the denoiser: noise for images and latents, random tokens of random lengths for
/// texts, and for the streaming halves of a codec the caches that its first half gives for such inputs.
pub struct PartInputs {
    inputs: Vec<(String, Vec<usize>, DataType)>,
    /// Number of rows of the embedding table.
    vocabulary: i64,
    /// Gives caches.
    first: Option<Box<dyn Session>>,
    items: u64,
    seed: u64,
    position: u64,
}

impl PartInputs {
    /// `items` inputs for `model`; `sizes` are those of its symbols, 1 where one is not among them.
    #[must_use]
    pub fn new(model: &Model, sizes: &BTreeMap<String, usize>, items: u64, seed: u64) -> Self {
        let size = |dim: &Dim| match dim {
            Dim::Fixed(n) => *n,
            Dim::Symbol(name) => sizes.get(name).copied().unwrap_or(1),
            Dim::Unknown => 1,
        };
        let inputs = model.graph.inputs.iter().map(|i| {
            let shape = i.shape.iter().flatten().map(size).collect();
            (i.name.clone(), shape, i.dtype.unwrap_or(DataType::F32))
        });
        let table = model.graph.nodes.iter().find(|n| n.op_type == "Gather" && n.inputs[1..] == ["ids"]);
        let rows = table.and_then(|n| model.graph.initializer(&n.inputs[0])?.shape.first().copied());
        Self {
            inputs: inputs.collect(),
            vocabulary: rows.map_or(1, |n| n as i64),
            first: None,
            items,
            seed,
            position: 0,
        }
    }

    /// With caches from a session of the codec's first half.
    #[must_use]
    pub fn after(mut self, first: Box<dyn Session>) -> Self {
        self.first = Some(first);
        self
    }

    fn tensor(&self, name: &str, shape: &[usize], dtype: DataType, used: usize, rng: &mut Rng) -> Tensor {
        let count: usize = shape.iter().product();
        let length = shape.iter().copied().max().unwrap_or(1);
        let is_used = |i: usize| i % length < used;
        match (name, dtype) {
            ("ids", _) => {
                let mut id =
                    |i: usize| if is_used(i) { rng.below(self.vocabulary as usize) as i64 } else { 0 };
                Tensor::i64(shape, (0..count).map(&mut id).collect())
            }
            ("keep", _) => Tensor::f32(shape, (0..count).map(|i| f32::from(u8::from(is_used(i)))).collect()),
            ("mask_bias", _) => {
                let bias = |i| if is_used(i) { 0.0 } else { umt5::MASKED };
                Tensor::f32(shape, (0..count).map(bias).collect())
            }
            ("frames" | "picture", _) => {
                Tensor::f32(shape, (0..count).map(|_| rng.normal().tanh() as f32).collect())
            }
            (_, DataType::F32) => Tensor::f32(shape, (0..count).map(|_| rng.normal() as f32).collect()),
            _ => Tensor::i64(shape, vec![0; count]),
        }
    }
}

impl CalibrationSource for PartInputs {
    fn describe(&self) -> String {
        format!("seeded inputs, {} items, seed {}", self.items, self.seed)
    }

    fn count(&self) -> Option<u64> {
        Some(self.items)
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.position = 0;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        if self.position == self.items {
            return Ok(None);
        }
        self.position += 1;
        let mut rng = Rng::new(self.seed.wrapping_mul(1_000_003).wrapping_add(self.position));
        let length = self.inputs.iter().find(|(n, ..)| n == "ids").map_or(1, |(_, s, _)| s.iter().product());
        let used = 1 + rng.below(length);
        let mut item: Inputs = Vec::new();
        for (name, shape, dtype) in self.inputs.iter().filter(|(n, ..)| !n.starts_with("cache.")) {
            item.push((name.clone(), self.tensor(name, shape, *dtype, used, &mut rng)));
        }
        if let Some(first) = &mut self.first {
            let port = &first.engine().inputs()[0];
            let shape: Vec<usize> =
                port.shape.iter().map(|d| if let Dim::Fixed(n) = d { *n } else { 1 }).collect();
            let name = port.name.clone();
            let count = shape.iter().product();
            let start = Tensor::f32(&shape, (0..count).map(|_| rng.normal().tanh() as f32).collect());
            for (output, tensor) in first.run(&[(&name, &start)]).map_err(SuppliedError::new)? {
                if let Some(cache) = output.strip_prefix("new_") {
                    item.push((cache.to_owned(), tensor));
                }
            }
        }
        for (name, shape, dtype) in &self.inputs {
            if !item.iter().any(|(known, _)| known == name) {
                item.push((name.clone(), self.tensor(name, shape, *dtype, used, &mut rng)));
            }
        }
        Ok(Some(item))
    }
}

/// The joint denoiser's inputs, cut into those of one of the cached halves: frames that share the first timestep are
/// context, the others targets.
pub struct HalfInputs<'a> {
    joint: &'a mut dyn CalibrationSource,
    tokens_per_frame: usize,
    /// Gives the context's keys and values; none for the half that makes them.
    prefill: Option<Box<dyn Session>>,
}

impl<'a> HalfInputs<'a> {
    /// The context alone: inputs of `denoiser_prefill`.
    #[must_use]
    pub fn context(joint: &'a mut dyn CalibrationSource, tokens_per_frame: usize) -> Self {
        Self { joint, tokens_per_frame, prefill: None }
    }

    /// The targets with the context's keys and values, which a session of `denoiser_prefill` makes: inputs of
    /// `denoiser_cached`.
    #[must_use]
    pub fn targets(
        joint: &'a mut dyn CalibrationSource,
        tokens_per_frame: usize,
        prefill: Box<dyn Session>,
    ) -> Self {
        Self { joint, tokens_per_frame, prefill: Some(prefill) }
    }

    /// The frames `from..to` of all inputs that have frames.
    fn cut(&self, item: &Inputs, from: usize, to: usize) -> Inputs {
        let per_frame = self.tokens_per_frame;
        let one = |(name, tensor): &(String, Tensor)| {
            let part = match name.as_str() {
                "latents" => sliced(tensor, 2, from, to),
                "rows" | "camera" | "guide" => sliced(tensor, 1, from, to),
                "cos" | "sin" => sliced(tensor, 0, from * per_frame, to * per_frame),
                _ => tensor.clone(),
            };
            (name.clone(), part)
        };
        item.iter().map(one).collect()
    }
}

/// The part `from..to` of an axis.
fn sliced(tensor: &Tensor, axis: usize, from: usize, to: usize) -> Tensor {
    fn part<T: Copy>(values: &[T], row: usize, from: usize, to: usize) -> Vec<T> {
        values.chunks(row.max(1)).flat_map(|r| &r[from..to]).copied().collect()
    }
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let (row, start, end) = (tensor.shape[axis] * inner, from * inner, to * inner);
    let mut shape = tensor.shape.clone();
    shape[axis] = to - from;
    let data = match &tensor.data {
        Elements::F32(v) => Elements::F32(part(v, row, start, end)),
        Elements::I64(v) => Elements::I64(part(v, row, start, end)),
        Elements::I32(v) => Elements::I32(part(v, row, start, end)),
    };
    Tensor { shape, data }
}

impl CalibrationSource for HalfInputs<'_> {
    fn describe(&self) -> String {
        self.joint.describe()
    }

    fn count(&self) -> Option<u64> {
        self.joint.count()
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.joint.restart()
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        let Some(item) = self.joint.next()? else { return Ok(None) };
        let rows = item.iter().find(|(name, _)| name == "rows").map(|(_, t)| &t.data);
        let Some(Elements::I64(rows)) = rows else {
            return Err(SuppliedError::new("the inputs have no rows of timesteps"));
        };
        let given = rows.iter().take_while(|r| **r == rows[0]).count();
        if given == rows.len() {
            return Err(SuppliedError::new("an input in which nothing tells context from targets"));
        }
        let (frames, context) = (rows.len(), self.cut(&item, 0, given));
        let Some(prefill) = &mut self.prefill else { return Ok(Some(context)) };
        let views: Vec<(&str, &Tensor)> = context.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let made = prefill.run(&views).map_err(SuppliedError::new)?;
        let mut targets = self.cut(&item, given, frames);
        targets.extend(made.into_iter().filter(|(name, _)| name.starts_with("memory.")));
        Ok(Some(targets))
    }
}

/// Inputs of the joint denoiser: normal latents and text rows, context clean, targets at a random timestep.
#[derive(Clone, Debug)]
pub struct SyntheticDenoiser {
    config: DitConfig,
    context: usize,
    targets: usize,
    gap: f64,
    items: u64,
    seed: u64,
    position: u64,
}

impl SyntheticDenoiser {
    /// `items` inputs of `context` and `targets` latents.
    #[must_use]
    pub fn new(config: DitConfig, context: usize, targets: usize, gap: f64, items: u64, seed: u64) -> Self {
        SyntheticDenoiser { config, context, targets, gap, items, seed, position: 0 }
    }
}

fn normal(mix: &mut SplitMix64, n: usize) -> Vec<f32> {
    (0..n).map(|_| mix.normal_pair().0 as f32).collect()
}

impl CalibrationSource for SyntheticDenoiser {
    fn describe(&self) -> String {
        format!(
            "synthetic noise, {} items of {} + {} latents, seed {}",
            self.items, self.context, self.targets, self.seed
        )
    }

    fn count(&self) -> Option<u64> {
        Some(self.items)
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.position = 0;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        if self.position == self.items {
            return Ok(None);
        }
        self.position += 1;
        let c = &self.config;
        let mut noise = SplitMix64::new(self.seed.wrapping_mul(1_000_003).wrapping_add(self.position));
        let frames = self.context + self.targets;
        let latents = normal(&mut noise, frames * c.in_channels * c.latent_height * c.latent_width);
        let text = normal(&mut noise, c.text_len * c.text_dim);
        let camera = normal(&mut noise, frames * c.tokens_per_frame() * c.camera_channels);
        // Targets have carried latents, trusted anywhere between not at all and wholly.
        let mut guide = normal(&mut noise, frames * c.tokens_per_frame() * c.guide_channels());
        for (i, token) in guide.chunks_exact_mut(c.guide_channels().max(1)).enumerate() {
            if i < self.context * c.tokens_per_frame() {
                token.fill(0.0);
            } else if let Some(trust) = token.last_mut() {
                *trust = 0.5 + 0.5 * trust.tanh();
            }
        }
        let timesteps = [0.0, 1000.0 * noise.unit_above_zero()];
        let rows: Vec<usize> = (0..frames).map(|f| usize::from(f >= self.context)).collect();
        let t_index: Vec<f64> = (0..frames)
            .map(|f| if f < self.context { f as f64 } else { f as f64 - 1.0 + self.gap })
            .collect();
        let step = DenoiseStep {
            latents: &latents,
            timesteps: &timesteps,
            rows: &rows,
            t_index: &t_index,
            text: &text,
            camera: (c.camera_channels > 0).then_some(&camera),
            guide: (c.guide_channels() > 0).then_some(&guide),
        };
        step_tensors(c, &step).map(Some).map_err(SuppliedError::new)
    }
}
