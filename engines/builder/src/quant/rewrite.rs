//! Finding layers, calibrating and rewriting the graph.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::sync::Arc;

use half::{bf16, f16};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::calibrate::{Calibrator, Observer};
use super::pieces::{Measured, Runner};
use super::{CalibrationSource, Inputs, QuantError, SuppliedError, Tell, Work, e4m3, go_on};
use mindseye_base::file::hex;
use mindseye_engines::backend::{Elements, Tensor};
use mindseye_engines::onnx::{
    Attribute, DataType, Dim, Initializer, LazyTensor, Model, Node, TensorData, ValueInfo,
};
use mindseye_engines::target::Precision;

/// How to quantise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantConfig {
    /// `int8`, `fp8` or `int4w`.
    pub precision: Precision,
    /// SmoothQuant's alpha (INT8 only): how much of the activations' range moves into the weights; none leaves the
    /// graph as it is.
    pub smooth_alpha: Option<f32>,
    /// Choice of activation ranges (INT8; FP8 always takes the largest magnitude).
    pub calibrator: Calibrator,
    /// Weights per scale of INT4, along the inner axis: 64 or 128.
    pub block: usize,
    /// Blocks kept in float at the start.
    pub keep_first_blocks: usize,
    /// Blocks kept in float at the end.
    pub keep_last_blocks: usize,
    /// Further layers kept in float: names, or parts of names (`attn2.to_k`).
    pub keep: Vec<String>,
    /// FP8: quantise attention products too, where the head size (given here) is a multiple of 16.
    pub attention_head_dim: Option<usize>,
}

impl QuantConfig {
    /// The recipe for a precision: SmoothQuant 0.5 (its paper's default; 0.8 smooths too much
    /// where activations have few outliers) and the largest magnitude; first and last block kept high.
    #[must_use]
    pub fn new(precision: Precision) -> Self {
        QuantConfig {
            precision,
            smooth_alpha: (precision == Precision::Int8).then_some(0.5),
            calibrator: Calibrator::Max,
            block: 128,
            keep_first_blocks: 1,
            keep_last_blocks: 1,
            keep: Vec::new(),
            attention_head_dim: None,
        }
    }

    /// Whether attention products are quantised.
    fn attention_products(&self) -> bool {
        self.precision == Precision::Fp8 && self.attention_head_dim.is_some_and(|d| d > 0 && d % 16 == 0)
    }

    /// Refuses what no graph can be quantised with.
    fn check(&self) -> Result<(), QuantError> {
        if !matches!(self.precision, Precision::Int8 | Precision::Fp8 | Precision::Int4w) {
            return Err(QuantError::Unsupported(format!("{} is not a quantised precision", self.precision)));
        }
        if self.precision == Precision::Int4w && !matches!(self.block, 64 | 128) {
            let block = self.block;
            return Err(QuantError::Unsupported(format!("int4w blocks have 64 or 128 weights, not {block}")));
        }
        if self.smooth_alpha.is_some_and(|a| !(0.0..=1.0).contains(&a)) {
            return Err(QuantError::Unsupported("SmoothQuant's alpha must lie between 0 and 1".into()));
        }
        if let Calibrator::Percentile(p) = self.calibrator
            && !(p > 0.0 && p <= 100.0)
        {
            return Err(QuantError::Unsupported(format!("percentile {p} must lie above 0 and up to 100")));
        }
        Ok(())
    }
}

/// One scale factor or vector of them, as written to the graph.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScaleRecord {
    /// Initializer's name.
    pub name: String,
    /// Smallest scale.
    pub min: f32,
    /// Largest scale.
    pub max: f32,
    /// How many.
    pub count: usize,
}

/// A quantised graph, twice.
#[derive(Clone, Debug)]
pub struct Quantised {
    /// With Q/DQ nodes and packed weights; float parts still fp32 (see [`super::to_float16`]).
    pub deploy: Model,
    /// The same arithmetic in float operators, for CPU backends.
    pub emulated: Model,
    /// All scales.
    pub scales: Vec<ScaleRecord>,
    /// SHA-256 of all scales, in order.
    pub scales_sha256: String,
    /// SHA-256 of the calibration inputs; none where no activations were calibrated.
    pub calibration_sha256: Option<String>,
    /// What the calibration inputs were.
    pub calibration: Option<String>,
    /// Quantised layers.
    pub layers: Vec<String>,
    /// Linear layers of the blocks that stay in float.
    pub kept: Vec<String>,
    /// Attention products quantised (FP8).
    pub attention_products: usize,
    /// What activations were quantised with, for other graphs of the same layers ([`quantise_half`]).
    pub ranges: Ranges,
}

/// Ranges of activations by the layer that reads them, so that they hold for every graph with these layers.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    layers: HashMap<String, ActivationRange>,
    products: HashMap<Operand, f32>,
    /// What they were measured with, and the hash of it.
    calibration: Option<(String, String)>,
}

impl Ranges {
    /// The layer whose inputs go furthest past the range that they are quantised with, and how many times that range they
    /// reach; none where all stay within. `seen` is what was observed of `model`.
    pub(super) fn exceeded(&self, model: &Model, seen: &Observed) -> Option<(String, f32)> {
        let reach = |site: Site| {
            let known = self.layers.get(&site.layer).filter(|known| known.range > 0.0)?;
            let most = seen.values.get(&site.input)?.smoothed_max(known.smooth.as_deref());
            Some((site.layer, most / known.range))
        };
        let furthest = sites(model).into_iter().filter_map(reach).max_by(|a, b| a.1.total_cmp(&b.1));
        furthest.filter(|(_, times)| *times > 1.0)
    }
}

#[derive(Clone, Debug)]
struct ActivationRange {
    /// Of the smoothed values.
    range: f32,
    /// SmoothQuant's factor of each channel.
    smooth: Option<Arc<[f32]>>,
}

/// One of the two operands of an attention product: its block, its number in the block, and which of the two.
type Operand = (usize, usize, usize);

/// A linear layer: `MatMul` with a constant matrix.
struct Site {
    node: usize,
    input: String,
    weight: String,
    layer: String,
    k: usize,
    n: usize,
    block: Option<usize>,
}

fn block_of(name: &str) -> Option<usize> {
    name.strip_prefix("blocks.")?.split('.').next()?.parse().ok()
}

fn layer_name(weight: &str) -> String {
    weight.trim_end_matches(".T").trim_end_matches(".weight").to_owned()
}

fn sites(model: &Model) -> Vec<Site> {
    let constants: HashMap<&str, &Initializer> =
        model.graph.initializers.iter().map(|i| (i.name.as_str(), i)).collect();
    let mut found = Vec::new();
    for (node, n) in model.graph.nodes.iter().enumerate() {
        let [input, weight] = n.inputs.as_slice() else { continue };
        let Some(w) = constants.get(weight.as_str()) else { continue };
        if n.op_type != "MatMul" || w.dtype != DataType::F32 || constants.contains_key(input.as_str()) {
            continue;
        }
        if let [k, columns] = w.shape[..] {
            found.push(Site {
                node,
                input: input.clone(),
                weight: weight.clone(),
                layer: layer_name(weight),
                k,
                n: columns,
                block: block_of(weight),
            });
        }
    }
    found
}

/// Names of all linear layers inside `blocks.N`.
#[must_use]
pub fn layers(model: &Model) -> Vec<String> {
    sites(model).into_iter().filter(|s| s.block.is_some()).map(|s| s.layer).collect()
}

/// The scale that a range gives, as the float format of the engine can hold it: positive and finite whatever the
/// range, and rounded up so that the range is not clipped. A dead range (all zeros) gets the scale 1.
fn representable(range: f32, levels: f32, float: Precision) -> f32 {
    if !(range.is_finite() && range > 0.0) {
        return 1.0;
    }
    let wanted = range / levels;
    match float {
        Precision::Fp16 => {
            // Halves below 2^-20 hold fewer than four bits; an activation that small is as good as zero.
            let mut h = f16::from_f32(wanted.clamp(2f32.powi(-20), 65_504.0));
            if h.to_f32() < wanted && h < f16::MAX {
                h = f16::from_bits(h.to_bits() + 1);
            }
            h.to_f32()
        }
        Precision::Bf16 => {
            let mut h = bf16::from_f32(wanted.clamp(2f32.powi(-100), 2f32.powi(100)));
            if h.to_f32() < wanted {
                h = bf16::from_bits(h.to_bits() + 1);
            }
            h.to_f32()
        }
        _ => wanted.clamp(2f32.powi(-100), 2f32.powi(100)),
    }
}

/// The float format that the deployed graph of a precision is converted to.
fn float_of(precision: Precision) -> Precision {
    precision.float()
}

/// Adds outputs to a graph: each value reshaped to `[-1, width]`, or to one row where the width is not known.
pub(super) fn with_outputs(model: &Model, values: &[(String, Option<usize>)]) -> (Model, Vec<String>) {
    let mut model = model.clone();
    let mut names = Vec::new();
    for (i, (value, width)) in values.iter().enumerate() {
        let (name, shape_name) = (format!("observed.{i}"), format!("observed.{i}.shape"));
        let (dims, shape) = match width {
            Some(w) => (vec![-1, *w as i64], vec![Dim::Unknown, Dim::Fixed(*w)]),
            None => (vec![-1], vec![Dim::Unknown]),
        };
        model.graph.initializers.push(Initializer::from_i64(&shape_name, &[dims.len()], &dims));
        model.graph.nodes.push(Node::new(&name, "Reshape", &[value, &shape_name], &[&name]));
        model.graph.outputs.push(ValueInfo {
            name: name.clone(),
            dtype: Some(DataType::F32),
            shape: Some(shape),
        });
        names.push(name);
    }
    (model, names)
}

/// What is calibrated: one value of the graph that several layers may read.
struct Group {
    value: String,
    /// Channels (last axis), none for attention operands.
    width: Option<usize>,
    sites: Vec<usize>,
    /// Of the first attention product that reads it.
    operand: Option<Operand>,
    /// Probabilities: their scale is 1/448, not measured.
    softmax: bool,
}

pub(super) fn hash_inputs(hash: &mut Sha256, inputs: &Inputs) {
    for (name, tensor) in inputs {
        hash.update(name.as_bytes());
        for d in &tensor.shape {
            hash.update((*d as u64).to_le_bytes());
        }
        match &tensor.data {
            Elements::F32(v) => v.iter().for_each(|x| hash.update(x.to_le_bytes())),
            Elements::I64(v) => v.iter().for_each(|x| hash.update(x.to_le_bytes())),
            Elements::I32(v) => v.iter().for_each(|x| hash.update(x.to_le_bytes())),
        }
    }
}

/// What is seen of values while a graph runs.
struct Observers {
    /// By name of the output that was added for the value: the value and what was seen.
    seen: BTreeMap<String, (String, Observer)>,
}

impl Measured for Observers {
    fn kind(&self) -> &'static str {
        "largest magnitude of each channel, histogram of 2048 bins"
    }

    fn add(&mut self, outputs: Vec<(String, Tensor)>) -> Result<(), QuantError> {
        for (name, tensor) in outputs {
            if let (Some((value, observer)), Some(values)) = (self.seen.get_mut(&name), tensor.as_f32()) {
                observer.add(value, values)?;
            }
        }
        Ok(())
    }

    fn save(&self) -> Inputs {
        self.seen.values().flat_map(|(_, observer)| observer.save()).collect()
    }

    fn load(&mut self, tensors: Inputs) -> bool {
        let saved = tensors.chunks(4).zip(self.seen.values());
        let all: Option<Vec<Observer>> = saved.map(|(part, (_, observer))| observer.load(part)).collect();
        let Some(all) = all.filter(|all| all.len() == self.seen.len()) else { return false };
        self.seen.values_mut().zip(all).for_each(|((_, observer), loaded)| *observer = loaded);
        true
    }
}

/// Runs the fp32 graph over the calibration inputs and observes values.
fn observe(
    model: &Model,
    values: &[(String, Option<usize>)],
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    tell: &mut Tell<'_>,
) -> Result<(Vec<Observer>, String), QuantError> {
    let (mut augmented, names) = with_outputs(model, values);
    augmented.graph.outputs.retain(|o| names.contains(&o.name));
    augmented.graph.drop_dead_nodes();
    let new = |(value, width): &(String, Option<usize>)| (value.clone(), Observer::new(width.unwrap_or(1)));
    let mut all = Observers { seen: names.iter().cloned().zip(values.iter().map(new)).collect() };
    let sha256 = runner.measure(&augmented, source, u64::MAX, tell, &mut all)?;
    let observers = names.iter().filter_map(|name| all.seen.remove(name)).map(|(_, observer)| observer);
    Ok((observers.collect(), sha256))
}

/// What was seen of a graph's values over calibration inputs, for any choice of layers to quantise.
#[derive(Clone, Debug)]
pub struct Observed {
    values: HashMap<String, Observer>,
    sha256: String,
    description: String,
}

/// Runs the fp32 graph over the calibration inputs, once, and observes every value that a quantised layer of
/// `config.precision` could read.
///
/// # Errors
/// [`QuantError`]; [`QuantError::Cancelled`] when `tell` returns false.
pub fn observe_all(
    model: &Model,
    config: &QuantConfig,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    tell: &mut Tell<'_>,
) -> Result<Observed, QuantError> {
    let mut values: Vec<(String, Option<usize>)> = Vec::new();
    for site in sites(model).into_iter().filter(|s| s.block.is_some()) {
        if !values.iter().any(|(v, _)| *v == site.input) {
            values.push((site.input, Some(site.k)));
        }
    }
    if config.attention_products() {
        let mut groups = Vec::new();
        attention_groups(model, &|_| false, &mut groups);
        for group in groups.into_iter().filter(|g| !g.softmax) {
            if !values.iter().any(|(v, _)| *v == group.value) {
                values.push((group.value, None));
            }
        }
    }
    let (observers, sha256) = observe(model, &values, runner, source, tell)?;
    let values = values.into_iter().map(|(v, _)| v).zip(observers).collect();
    Ok(Observed { values, sha256, description: source.describe() })
}

/// Calibrates and rewrites. `source` is needed for `int8` and `fp8`.
///
/// # Errors
/// [`QuantError`]; [`QuantError::Cancelled`] when `tell` returns false.
pub fn calibrate_and_quantise(
    model: &Model,
    config: &QuantConfig,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    tell: &mut Tell<'_>,
) -> Result<Quantised, QuantError> {
    config.check()?;
    let observed = match config.precision {
        Precision::Int4w => None,
        _ => Some(observe_all(model, config, runner, source, tell)?),
    };
    quantise_observed(model, config, observed.as_ref(), runner, source, tell)
}

/// Rewrites with ranges that were observed before. The inputs are run through once more only where ranges of smoothed
/// values are not known from the largest magnitudes (percentile and entropy).
///
/// # Errors
/// As [`calibrate_and_quantise`].
pub fn quantise_observed(
    model: &Model,
    config: &QuantConfig,
    observed: Option<&Observed>,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    tell: &mut Tell<'_>,
) -> Result<Quantised, QuantError> {
    config.check()?;
    check_keep(model, config)?;
    let parts = Parts::new(model, config)?;
    let ranges = match observed.filter(|_| config.precision != Precision::Int4w) {
        None => Ranges::default(),
        Some(observed) => parts.ranges(model, config, observed, runner, source, tell)?,
    };
    parts.rewritten(model, config, ranges, tell)
}

/// Quantises a graph with the layers of another one that was quantised before, with the same ranges: the cached halves
/// of a denoiser, whose inputs no calibration source gives.
///
/// # Errors
/// [`QuantError::Unsupported`] naming a layer that the other graph has not quantised.
pub fn quantise_half(
    model: &Model,
    config: &QuantConfig,
    ranges: &Ranges,
    tell: &mut Tell<'_>,
) -> Result<Quantised, QuantError> {
    config.check()?;
    Parts::new(model, config)?.rewritten(model, config, ranges.clone(), tell)
}

/// Refuses names to keep that no layer has: a layer would be quantised that was meant to be kept.
fn check_keep(model: &Model, config: &QuantConfig) -> Result<(), QuantError> {
    let all = layers(model);
    let missing = |name: &&String| !name.is_empty() && !all.iter().any(|l| l.contains(name.as_str()));
    match config.keep.iter().find(missing) {
        None => Ok(()),
        Some(name) => Err(QuantError::NoSuchLayer {
            name: name.clone(),
            example: all.first().cloned().unwrap_or_default(),
        }),
    }
}

/// What of a graph is quantised.
struct Parts {
    chosen: Vec<Site>,
    kept: Vec<String>,
    groups: Vec<Group>,
    products: Vec<usize>,
}

impl Parts {
    fn new(model: &Model, config: &QuantConfig) -> Result<Self, QuantError> {
        let all = sites(model);
        let blocks = all.iter().filter_map(|s| s.block).max().map_or(0, |b| b + 1);
        let ends =
            |block: usize| block < config.keep_first_blocks || block + config.keep_last_blocks >= blocks;
        let keeps = |block: usize, layer: &str| {
            ends(block) || config.keep.iter().any(|k| !k.is_empty() && layer.contains(k.as_str()))
        };
        let (mut chosen, mut kept) = (Vec::new(), Vec::new());
        for site in all {
            let Some(block) = site.block else { continue };
            let fits = config.precision != Precision::Int4w || site.k % 64 == 0;
            if keeps(block, &site.layer) || !fits {
                kept.push(site.layer);
            } else {
                chosen.push(site);
            }
        }
        if chosen.is_empty() {
            return Err(QuantError::Unsupported(format!(
                "no layer is left to quantise: {blocks} blocks, {} kept at the start and {} at the end",
                config.keep_first_blocks, config.keep_last_blocks
            )));
        }
        let mut groups: Vec<Group> = Vec::new();
        let mut products = Vec::new();
        if config.precision != Precision::Int4w {
            for (i, site) in chosen.iter().enumerate() {
                match groups.iter_mut().find(|g| g.value == site.input) {
                    Some(g) => g.sites.push(i),
                    None => groups.push(Group {
                        value: site.input.clone(),
                        width: Some(site.k),
                        sites: vec![i],
                        operand: None,
                        softmax: false,
                    }),
                }
            }
            if config.attention_products() {
                products = attention_groups(model, &ends, &mut groups);
            }
        }
        Ok(Self { chosen, kept, groups, products })
    }

    /// Ranges from what was observed, after smoothing.
    fn ranges(
        &self,
        model: &Model,
        config: &QuantConfig,
        observed: &Observed,
        runner: &Runner,
        source: &mut dyn CalibrationSource,
        tell: &mut Tell<'_>,
    ) -> Result<Ranges, QuantError> {
        let groups = &self.groups;
        let measured: Vec<usize> = (0..groups.len()).filter(|&i| !groups[i].softmax).collect();
        let values: Vec<_> = measured.iter().map(|&i| (groups[i].value.clone(), groups[i].width)).collect();
        let observers: Vec<&Observer> = values
            .iter()
            .map(|(v, _)| {
                observed
                    .values
                    .get(v)
                    .ok_or_else(|| QuantError::Source(SuppliedError::new(format!("{v:?} was not observed"))))
            })
            .collect::<Result<_, _>>()?;
        let smoothing = smoothing(model, config, groups, &measured, &self.chosen, &observers, tell)?;
        // Smoothed values have other ranges: known exactly for the largest magnitude, else seen again.
        let ranges: Vec<f32> = match (config.calibrator, config.precision) {
            (Calibrator::Max, _) | (_, Precision::Fp8) => {
                observers.iter().zip(&smoothing).map(|(o, s)| o.smoothed_max(s.as_deref())).collect()
            }
            (calibrator, _) => {
                let (smoothed, values) = smoothed_values(model, &values, &smoothing);
                let (observers, _) = observe(&smoothed, &values, runner, source, tell)?;
                observers.iter().map(|o| o.range(calibrator)).collect()
            }
        };
        let calibration = Some((observed.description.clone(), observed.sha256.clone()));
        let mut all = Ranges { calibration, ..Ranges::default() };
        for ((&g, range), smooth) in measured.iter().zip(ranges).zip(smoothing) {
            let one = ActivationRange { range, smooth: smooth.map(Arc::from) };
            for &site in &groups[g].sites {
                all.layers.insert(self.chosen[site].layer.clone(), one.clone());
            }
            if let Some(operand) = groups[g].operand {
                all.products.insert(operand, range);
            }
        }
        Ok(all)
    }

    /// Both graphs, with these ranges.
    fn rewritten(
        self,
        model: &Model,
        config: &QuantConfig,
        ranges: Ranges,
        tell: &mut Tell<'_>,
    ) -> Result<Quantised, QuantError> {
        let of = self.chosen.len() as u64;
        let mut done = 0;
        let mut packed = || {
            done += 1;
            go_on(tell, Work::Pack { done, of })
        };
        let mut build = Rewriter::new(model, config.precision);
        let missing = |what: String| {
            QuantError::Unsupported(format!("{what} was not calibrated: the joint denoiser lacks it"))
        };
        for group in self.groups.iter().filter(|g| !g.softmax) {
            let layer = group.sites.first().map(|&s| &self.chosen[s].layer);
            let one = match (layer, group.operand) {
                (Some(layer), _) => {
                    ranges.layers.get(layer).cloned().ok_or_else(|| missing(layer.clone()))?
                }
                (None, operand) => {
                    let range = operand.and_then(|o| ranges.products.get(&o));
                    let range = *range.ok_or_else(|| missing(format!("value {:?}", group.value)))?;
                    ActivationRange { range, smooth: None }
                }
            };
            build.activation(group, one.range, one.smooth.as_deref());
            for &s in &group.sites {
                build.weight(model, &self.chosen[s], one.smooth.as_deref())?;
                packed()?;
            }
        }
        for group in self.groups.iter().filter(|g| g.softmax) {
            build.activation(group, 1.0, None);
        }
        if config.precision == Precision::Int4w {
            for site in &self.chosen {
                build.weight_int4(model, site, config.block)?;
                packed()?;
            }
        }
        let attention_products = self.products.len();
        build.products = self.products;
        let layers = self.chosen.iter().map(|s| s.layer.clone()).collect();
        let nodes: Vec<usize> = self.chosen.iter().map(|s| s.node).collect();
        let (deploy, emulated, scales, scales_sha256) = build.finish(model, &nodes);
        Ok(Quantised {
            deploy,
            emulated,
            scales,
            scales_sha256,
            calibration_sha256: ranges.calibration.as_ref().map(|(_, hash)| hash.clone()),
            calibration: ranges.calibration.as_ref().map(|(what, _)| what.clone()),
            layers,
            kept: self.kept,
            attention_products,
            ranges,
        })
    }
}

/// Refuses weights that are NaN or infinite: no precision makes anything of them.
///
/// # Errors
/// [`QuantError::WeightNotFinite`] naming the first one; a constant that cannot be read.
pub fn check_weights(model: &Model, tell: &mut Tell<'_>) -> Result<(), QuantError> {
    let of = model.graph.initializers.len() as u64;
    for (done, constant) in model.graph.initializers.iter().enumerate() {
        go_on(tell, Work::Weights { done: done as u64, of })?;
        let is_float =
            matches!(constant.dtype, DataType::F32 | DataType::F16 | DataType::BF16 | DataType::F64);
        if is_float && constant.to_f32()?.iter().any(|v| !v.is_finite()) {
            return Err(QuantError::WeightNotFinite { weight: constant.name.clone() });
        }
    }
    Ok(())
}

/// Adds a group for each operand of the attention products in blocks that are not kept. Returns the products' nodes.
fn attention_groups(model: &Model, keeps: &dyn Fn(usize) -> bool, groups: &mut Vec<Group>) -> Vec<usize> {
    let constant: std::collections::HashSet<&str> =
        model.graph.initializers.iter().map(|i| i.name.as_str()).collect();
    let mut block = None;
    let mut products = Vec::new();
    let mut of_block: HashMap<usize, usize> = HashMap::new();
    for (index, node) in model.graph.nodes.iter().enumerate() {
        // Products carry no weight: they belong to the block of the last layer before them.
        if let Some(b) =
            node.inputs.iter().find_map(|i| constant.contains(i.as_str()).then(|| block_of(i)).flatten())
        {
            block = Some(b);
        }
        let is_product =
            node.op_type == "MatMul" && node.inputs.iter().all(|i| !constant.contains(i.as_str()));
        let Some(b) = block.filter(|_| is_product) else { continue };
        if keeps(b) {
            continue;
        }
        products.push(index);
        let number = of_block.entry(b).or_default();
        let product = *number;
        *number += 1;
        for (side, input) in node.inputs.iter().enumerate() {
            let softmax =
                model.graph.producer(input).is_some_and(|p| model.graph.nodes[p].op_type == "Softmax");
            if !groups.iter().any(|g| g.value == *input) {
                groups.push(Group {
                    value: input.clone(),
                    width: None,
                    sites: Vec::new(),
                    operand: Some((b, product, side)),
                    softmax,
                });
            }
        }
    }
    products
}

/// SmoothQuant (Xiao et al. 2023, equation 4): `s_j = max|x_j|^a / max|w_j|^(1-a)`, one per channel; 1 for channels
/// that are dead in the activations or in all weights.
fn smoothing(
    model: &Model,
    config: &QuantConfig,
    groups: &[Group],
    measured: &[usize],
    chosen: &[Site],
    observers: &[&Observer],
    tell: &mut Tell<'_>,
) -> Result<Vec<Option<Vec<f32>>>, QuantError> {
    let Some(alpha) = config.smooth_alpha.filter(|_| config.precision == Precision::Int8) else {
        return Ok(vec![None; measured.len()]);
    };
    let mut all = Vec::new();
    for (&g, observer) in measured.iter().zip(observers) {
        let group = &groups[g];
        if group.sites.is_empty() {
            all.push(None);
            continue;
        }
        let mut weight_max = vec![0f32; observer.channel_max.len()];
        for &s in &group.sites {
            go_on(tell, Work::Smooth { done: all.len() as u64, of: measured.len() as u64 })?;
            let values = weight(model, &chosen[s])?;
            for (row, m) in values.chunks(chosen[s].n.max(1)).zip(&mut weight_max) {
                *m = row.iter().fold(*m, |m, v| m.max(v.abs()));
            }
        }
        all.push(Some(
            observer
                .channel_max
                .iter()
                .zip(&weight_max)
                .map(|(&x, &w)| {
                    let s = x.powf(alpha) / w.powf(1.0 - alpha);
                    if x > 0.0 && w > 0.0 && s.is_finite() {
                        // As the deployed graph's float format holds it, so that both graphs use the same factor.
                        f16::from_f32(s.clamp(1.0 / 1024.0, 1024.0)).to_f32()
                    } else {
                        1.0
                    }
                })
                .collect(),
        ));
    }
    Ok(all)
}

/// The graph with smoothed copies of values, and their names.
fn smoothed_values(
    model: &Model,
    values: &[(String, Option<usize>)],
    smoothing: &[Option<Vec<f32>>],
) -> (Model, Vec<(String, Option<usize>)>) {
    let mut model = model.clone();
    let mut names = Vec::new();
    for ((value, width), s) in values.iter().zip(smoothing) {
        let name = match s {
            None => value.clone(),
            Some(s) => {
                let inverse: Vec<f32> = s.iter().map(|s| 1.0 / s).collect();
                let (by, out) = (format!("{value}/unsmooth"), format!("{value}/smoothed"));
                model.graph.initializers.push(Initializer::from_f32(&by, &[inverse.len()], &inverse));
                model.graph.nodes.push(Node::new(&out, "Mul", &[value, &by], &[&out]));
                out
            }
        };
        names.push((name, *width));
    }
    (model, names)
}

fn weight(model: &Model, site: &Site) -> Result<Vec<f32>, QuantError> {
    let w = model.graph.initializer(&site.weight);
    let values = w.map_or(Ok(Vec::new()), Initializer::to_f32)?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(QuantError::WeightNotFinite { weight: site.weight.clone() });
    }
    Ok(values)
}

/// Nodes of one graph that make a value's quantised form, and that form's name.
struct Replacement {
    nodes: Vec<Node>,
    value: String,
}

/// A matrix as its packed form gives it back, made when it is written: the emulated graph costs no more memory than
/// the packed weights that it shares with the deployed one.
struct Restored {
    codes: Arc<Vec<u8>>,
    scales: Vec<f32>,
    precision: Precision,
    columns: usize,
    /// Rows that share a scale (INT4); all otherwise.
    block: usize,
}

impl LazyTensor for Restored {
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()> {
        let per_byte = if self.precision == Precision::Int4w { 2 } else { 1 };
        let rows = self.codes.len() * per_byte / self.columns.max(1);
        let mut bytes = Vec::with_capacity(4 * self.columns);
        for row in 0..rows {
            bytes.clear();
            for column in 0..self.columns {
                let at = row * self.columns + column;
                let v = match self.precision {
                    Precision::Int8 => f32::from(self.codes[at].cast_signed()) * self.scales[column],
                    Precision::Fp8 => e4m3::to_f32(self.codes[at]) * self.scales[0],
                    _ => {
                        let nibble = (self.codes[at / 2] >> (4 * (at % 2))) & 0xf;
                        // Sign extension of four bits.
                        let value = (nibble << 4).cast_signed() >> 4;
                        f32::from(value) * self.scales[row / self.block * self.columns + column]
                    }
                };
                bytes.extend(v.to_le_bytes());
            }
            sink.write_all(&bytes)?;
        }
        Ok(())
    }
}

fn shared(name: &str, dtype: DataType, shape: &[usize], codes: &Arc<Vec<u8>>) -> Initializer {
    let data = TensorData::Memory(Arc::clone(codes), 0..codes.len());
    Initializer { name: name.to_owned(), dtype, shape: shape.to_vec(), data, origin: None }
}

struct Rewriter {
    precision: Precision,
    float: Precision,
    /// By original value: what layers read instead.
    deploy: BTreeMap<String, Replacement>,
    emulated: BTreeMap<String, Replacement>,
    /// By original weight.
    deploy_weights: BTreeMap<String, Replacement>,
    deploy_constants: Vec<Initializer>,
    emulated_constants: Vec<Initializer>,
    products: Vec<usize>,
    scales: Vec<ScaleRecord>,
    hash: Sha256,
}

impl Rewriter {
    fn new(model: &Model, precision: Precision) -> Self {
        let mut build = Rewriter {
            precision,
            float: float_of(precision),
            deploy: BTreeMap::new(),
            emulated: BTreeMap::new(),
            deploy_weights: BTreeMap::new(),
            deploy_constants: Vec::new(),
            emulated_constants: Vec::new(),
            products: Vec::new(),
            scales: Vec::new(),
            hash: Sha256::new(),
        };
        // Constants of the emulation, shared by all values.
        let constant = |name: &str, v: f32| Initializer::from_f32(name, &[], &[v]);
        match precision {
            Precision::Int8 => {
                build.emulated_constants.push(constant("quant.min", -128.0));
                build.emulated_constants.push(constant("quant.max", 127.0));
            }
            Precision::Fp8 => {
                build.emulated_constants.extend(e4m3_constants());
            }
            _ => {}
        }
        debug_assert!(model.graph.initializer("quant.min").is_none());
        build
    }

    fn record(&mut self, name: &str, scales: &[f32]) {
        self.hash.update(name.as_bytes());
        scales.iter().for_each(|s| self.hash.update(s.to_le_bytes()));
        self.scales.push(ScaleRecord {
            name: name.to_owned(),
            min: scales.iter().copied().fold(f32::INFINITY, f32::min),
            max: scales.iter().copied().fold(0.0, f32::max),
            count: scales.len(),
        });
    }

    fn zero_point(&self, name: &str, count: Option<usize>) -> Initializer {
        let dtype = if self.precision == Precision::Fp8 { DataType::F8E4M3 } else { DataType::I8 };
        let shape: Vec<usize> = count.into_iter().collect();
        Initializer::from_bytes(name, dtype, &shape, vec![0; count.unwrap_or(1)])
    }

    /// Quantised form of an activation.
    fn activation(&mut self, group: &Group, range: f32, smooth: Option<&[f32]>) {
        let levels = if self.precision == Precision::Fp8 { e4m3::MAX } else { 127.0 };
        let scale = representable(range, levels, self.float);
        let v = &group.value;
        let n = |part: &str| format!("{v}/{part}");
        let (scale_name, zero) = (n("scale"), n("zero"));
        self.record(&scale_name, &[scale]);
        let (mut deploy, mut emulated) = (Vec::new(), Vec::new());
        let mut source = v.clone();
        if let Some(s) = smooth {
            let inverse: Vec<f32> = s.iter().map(|s| 1.0 / s).collect();
            let by = Initializer::from_f32(n("unsmooth"), &[inverse.len()], &inverse);
            self.deploy_constants.push(by.clone());
            self.emulated_constants.push(by);
            let node = Node::new(&n("smooth"), "Mul", &[v, &n("unsmooth")], &[&n("smoothed")]);
            deploy.push(node.clone());
            emulated.push(node);
            source = n("smoothed");
        }
        let constant = Initializer::from_f32(&scale_name, &[], &[scale]);
        self.deploy_constants.push(constant.clone());
        self.deploy_constants.push(self.zero_point(&zero, None));
        self.emulated_constants.push(constant);
        deploy.push(Node::new(
            &n("quantize"),
            "QuantizeLinear",
            &[&source, &scale_name, &zero],
            &[&n("quantized")],
        ));
        deploy.push(Node::new(
            &n("dequantize"),
            "DequantizeLinear",
            &[&n("quantized"), &scale_name, &zero],
            &[&n("dequantized")],
        ));
        emulated.push(Node::new(&n("scaled"), "Div", &[&source, &scale_name], &[&n("scaled")]));
        if self.precision == Precision::Fp8 {
            emulated.extend(e4m3_nodes(&n("scaled"), &n("rounded"), v));
        } else {
            emulated.push(Node::new(&n("whole"), "Round", &[&n("scaled")], &[&n("whole")]));
            emulated.push(Node::new(
                &n("clip"),
                "Clip",
                &[&n("whole"), "quant.min", "quant.max"],
                &[&n("rounded")],
            ));
        }
        emulated.push(Node::new(&n("restore"), "Mul", &[&n("rounded"), &scale_name], &[&n("restored")]));
        self.deploy.insert(v.clone(), Replacement { nodes: deploy, value: n("dequantized") });
        self.emulated.insert(v.clone(), Replacement { nodes: emulated, value: n("restored") });
    }

    /// Quantised form of a matrix `[k, n]`: per column (INT8) or per tensor (FP8).
    fn weight(&mut self, model: &Model, site: &Site, smooth: Option<&[f32]>) -> Result<(), QuantError> {
        if self.deploy_weights.contains_key(&site.weight) {
            return Ok(());
        }
        let mut w = weight(model, site)?;
        if let Some(s) = smooth {
            for (row, s) in w.chunks_mut(site.n).zip(s) {
                row.iter_mut().for_each(|v| *v *= s);
            }
        }
        let per_column = self.precision == Precision::Int8;
        let scales: Vec<f32> = if per_column {
            let mut max = vec![0f32; site.n];
            for row in w.chunks(site.n) {
                max.iter_mut().zip(row).for_each(|(m, v)| *m = m.max(v.abs()));
            }
            max.into_iter().map(|m| representable(m, 127.0, self.float)).collect()
        } else {
            let max = w.iter().fold(0f32, |m, v| m.max(v.abs()));
            vec![representable(max, e4m3::MAX, self.float)]
        };
        let mut codes = Vec::with_capacity(w.len());
        for row in w.chunks(site.n) {
            for (j, v) in row.iter().enumerate() {
                let scale = scales[if per_column { j } else { 0 }];
                if per_column {
                    let q = (*v / scale).round_ties_even().clamp(-127.0, 127.0);
                    codes.push((q as i8).cast_unsigned());
                } else {
                    codes.push(e4m3::from_f32(*v / scale));
                }
            }
        }
        let n = |part: &str| format!("{}/{part}", site.weight);
        let (packed, scale_name, zero) = (n("packed"), n("scale"), n("zero"));
        self.record(&scale_name, &scales);
        let dtype = if per_column { DataType::I8 } else { DataType::F8E4M3 };
        let shape: &[usize] = if per_column { &[site.n] } else { &[] };
        let codes = Arc::new(codes);
        self.deploy_constants.push(shared(&packed, dtype, &[site.k, site.n], &codes));
        self.deploy_constants.push(Initializer::from_f32(&scale_name, shape, &scales));
        self.deploy_constants.push(self.zero_point(&zero, per_column.then_some(site.n)));
        let mut node = Node::new(
            &n("dequantize"),
            "DequantizeLinear",
            &[&packed, &scale_name, &zero],
            &[&n("dequantized")],
        );
        if per_column {
            node = node.with(Attribute::int("axis", 1));
        }
        let restored = Restored { codes, scales, precision: self.precision, columns: site.n, block: site.k };
        self.replace_weight(site, node, restored);
        Ok(())
    }

    /// Quantised form of a matrix `[k, n]` in 4 bits, one scale per `block` rows of a column.
    fn weight_int4(&mut self, model: &Model, site: &Site, block: usize) -> Result<(), QuantError> {
        if self.deploy_weights.contains_key(&site.weight) {
            return Ok(());
        }
        let block = if site.k.is_multiple_of(block) { block } else { 64 };
        let w = weight(model, site)?;
        let (mut scales, mut values) = (Vec::new(), vec![0i8; w.len()]);
        for (b, rows) in w.chunks(block * site.n).enumerate() {
            let mut max = vec![0f32; site.n];
            for row in rows.chunks(site.n) {
                max.iter_mut().zip(row).for_each(|(m, v)| *m = m.max(v.abs()));
            }
            let of_block: Vec<f32> = max.into_iter().map(|m| representable(m, 7.0, self.float)).collect();
            for (i, v) in rows.iter().enumerate() {
                let scale = of_block[i % site.n];
                let q = (*v / scale).round_ties_even().clamp(-8.0, 7.0);
                values[b * block * site.n + i] = q as i8;
            }
            scales.extend(of_block);
        }
        let codes = values
            .chunks(2)
            .map(|p| (p[0].cast_unsigned() & 0xf) | (p.get(1).map_or(0, |h| h.cast_unsigned() & 0xf) << 4))
            .collect();
        let n = |part: &str| format!("{}/{part}", site.weight);
        let (packed, scale_name) = (n("packed"), n("scale"));
        self.record(&scale_name, &scales);
        let codes: Arc<Vec<u8>> = Arc::new(codes);
        self.deploy_constants.push(shared(&packed, DataType::I4, &[site.k, site.n], &codes));
        self.deploy_constants.push(Initializer::from_f32(&scale_name, &[site.k / block, site.n], &scales));
        let node =
            Node::new(&n("dequantize"), "DequantizeLinear", &[&packed, &scale_name], &[&n("dequantized")])
                .with(Attribute::int("axis", 0))
                .with(Attribute::int("block_size", block as i64));
        let restored = Restored { codes, scales, precision: Precision::Int4w, columns: site.n, block };
        self.replace_weight(site, node, restored);
        Ok(())
    }

    fn replace_weight(&mut self, site: &Site, node: Node, restored: Restored) {
        let value = node.outputs[0].clone();
        self.deploy_weights.insert(site.weight.clone(), Replacement { nodes: vec![node], value });
        self.emulated_constants.push(Initializer {
            name: format!("{}/restored", site.weight),
            dtype: DataType::F32,
            shape: vec![site.k, site.n],
            data: TensorData::Lazy(Arc::new(restored)),
            origin: None,
        });
    }

    fn finish(self, model: &Model, chosen: &[usize]) -> (Model, Model, Vec<ScaleRecord>, String) {
        let rewrite =
            |activations: &BTreeMap<String, Replacement>, deploy: bool, constants: Vec<Initializer>| {
                let mut out = model.clone();
                out.graph.value_infos.clear();
                let mut done = std::collections::HashSet::new();
                let mut nodes = Vec::with_capacity(out.graph.nodes.len() * 2);
                for (index, mut node) in std::mem::take(&mut out.graph.nodes).into_iter().enumerate() {
                    if chosen.contains(&index) || self.products.contains(&index) {
                        for input in &mut node.inputs {
                            if let Some(r) = activations.get(input.as_str()) {
                                if done.insert(input.clone()) {
                                    nodes.extend(r.nodes.iter().cloned());
                                }
                                input.clone_from(&r.value);
                            } else if let Some(r) = self.deploy_weights.get(input.as_str()) {
                                if !deploy {
                                    *input = format!("{input}/restored");
                                    continue;
                                }
                                if done.insert(input.clone()) {
                                    nodes.extend(r.nodes.iter().cloned());
                                }
                                input.clone_from(&r.value);
                            }
                        }
                    }
                    nodes.push(node);
                }
                out.graph.nodes = nodes;
                out.graph.initializers.extend(constants);
                out.graph.drop_unused_initializers();
                out
            };
        let deploy = rewrite(&self.deploy, true, self.deploy_constants);
        let emulated = rewrite(&self.emulated, false, self.emulated_constants);
        (deploy, emulated, self.scales, hex(&self.hash.finalize()))
    }
}

/// Constants of [`e4m3_nodes`].
pub(super) fn e4m3_constants() -> Vec<Initializer> {
    let mut all = vec![
        Initializer::from_f32("e4m3.max", &[], &[e4m3::MAX]),
        Initializer::from_f32("e4m3.min", &[], &[-e4m3::MAX]),
        Initializer::from_f32("e4m3.one", &[], &[1.0]),
        Initializer::from_f32("e4m3.least", &[], &[2f32.powi(-6)]),
        Initializer::from_f32("e4m3.step", &[], &[2f32.powi(-9)]),
    ];
    for k in [8, 4, 2, 1] {
        all.push(Initializer::from_f32(format!("e4m3.at.{k}"), &[], &[2f32.powi(k - 6)]));
        all.push(Initializer::from_f32(format!("e4m3.down.{k}"), &[], &[2f32.powi(-k)]));
        all.push(Initializer::from_f32(format!("e4m3.up.{k}"), &[], &[2f32.powi(k)]));
    }
    all
}

/// E4M3 rounding in float operators, exact for all floats: the magnitude is clipped to the largest finite value, its
/// binade is found by comparing with powers of two (8, 4, 2, 1 binades at a time), and it is rounded to whole steps
/// of that binade. Scaling by powers of two is exact, so only `Round` (ties to even) changes a value.
pub(super) fn e4m3_nodes(input: &str, output: &str, prefix: &str) -> Vec<Node> {
    let n = |part: String| format!("{prefix}/e4m3.{part}");
    let mut nodes = vec![
        Node::new(&n("clip".into()), "Clip", &[input, "e4m3.min", "e4m3.max"], &[&n("clipped".into())]),
        Node::new(&n("abs".into()), "Abs", &[&n("clipped".into())], &[&n("abs".into())]),
        // From the least normal value up; smaller ones share its step.
        Node::new(&n("floor".into()), "Max", &[&n("abs".into()), "e4m3.least"], &[&n("m.16".into())]),
    ];
    let (mut m, mut step) = (n("m.16".into()), "e4m3.step".to_owned());
    for k in [8, 4, 2, 1] {
        let (cond, down, up) = (n(format!("cond.{k}")), n(format!("down.{k}")), n(format!("up.{k}")));
        nodes.push(Node::new(&cond, "GreaterOrEqual", &[&m, &format!("e4m3.at.{k}")], &[&cond]));
        nodes.push(Node::new(&down, "Where", &[&cond, &format!("e4m3.down.{k}"), "e4m3.one"], &[&down]));
        nodes.push(Node::new(&up, "Where", &[&cond, &format!("e4m3.up.{k}"), "e4m3.one"], &[&up]));
        let (next, wider) = (n(format!("m.{k}")), n(format!("step.{k}")));
        nodes.push(Node::new(&next, "Mul", &[&m, &down], &[&next]));
        nodes.push(Node::new(&wider, "Mul", &[&step, &up], &[&wider]));
        (m, step) = (next, wider);
    }
    nodes.push(Node::new(&n("steps".into()), "Div", &[&n("clipped".into()), &step], &[&n("steps".into())]));
    nodes.push(Node::new(&n("round".into()), "Round", &[&n("steps".into())], &[&n("whole".into())]));
    nodes.push(Node::new(&n("value".into()), "Mul", &[&n("whole".into()), &step], &[output]));
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_positive_finite_and_do_not_clip() {
        for float in [Precision::Fp16, Precision::Bf16, Precision::Fp32] {
            for range in [0.0, 1e-30, 1e-8, 1e-3, 0.7, 3.0, 1e4, 1e30, f32::NAN, f32::INFINITY] {
                let s = representable(range, 127.0, float);
                assert!(s.is_finite() && s > 0.0, "{range} {float}");
                if (1e-4..1e6).contains(&range) {
                    assert!(
                        s * 127.0 >= range * 0.999_999 && s * 127.0 <= range * 1.02,
                        "{range} {float} {s}"
                    );
                }
                match float {
                    Precision::Fp16 => assert_eq!(f16::from_f32(s).to_f32(), s),
                    Precision::Bf16 => assert_eq!(bf16::from_f32(s).to_f32(), s),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn names_give_blocks_and_layers() {
        assert_eq!(block_of("blocks.12.attn1.to_q.weight.T"), Some(12));
        assert_eq!(block_of("proj_out.weight.T"), None);
        assert_eq!(layer_name("blocks.12.attn1.to_q.weight.T"), "blocks.12.attn1.to_q");
    }
}
