//! What a part of a bundle becomes in a 16-bit float format, and inputs to compare every part with.

use std::collections::{BTreeMap, HashSet};

use super::float::value_types;
use super::pieces::{Measured, Runner};
use super::{CalibrationSource, HalfInputs, Inputs, MEASURED_LIMIT, PartInputs, QuantError, Tell, session};
use mindseye_engines::backend::Tensor;
use mindseye_engines::bundle::Bundle;
use mindseye_engines::onnx::{Attribute, DataType, Model, Node, ValueInfo};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::Precision;

/// Seed of the inputs around the denoiser.
const SEED: u64 = 20_260_728;
/// Inputs for a part: those of the joint denoiser, the same cut in two for its cached halves, and seeded ones for
/// everything else. Streaming halves of a codec get the caches that their first half makes.
///
/// # Errors
/// A graph that makes another one's inputs cannot be read or run.
pub fn part_inputs<'a>(
    bundle: &Bundle,
    component: &str,
    fp32: &Model,
    runner: &Runner,
    joint: &'a mut dyn CalibrationSource,
    items: u64,
) -> Result<Box<dyn CalibrationSource + 'a>, QuantError> {
    let tokens = bundle.manifest().dit.tokens_per_frame();
    let open = |component: &str| -> Result<_, QuantError> {
        let path = bundle.path(component).map_err(|e| QuantError::Unsupported(e.to_string()))?;
        session(&Model::load(path)?, runner.backend())
    };
    Ok(if component == DenoiserKind::Joint.component() {
        Box::new(Forwarded(joint))
    } else if component == DenoiserKind::Prefill.component() {
        Box::new(HalfInputs::context(joint, tokens))
    } else if component == DenoiserKind::Cached.component() {
        Box::new(HalfInputs::targets(joint, tokens, open(DenoiserKind::Prefill.component())?))
    } else {
        let sizes = BTreeMap::from([("groups".to_owned(), 2)]);
        let inputs = PartInputs::new(fp32, &sizes, items, SEED);
        match component.strip_suffix("_next") {
            Some(part) => Box::new(inputs.after(open(&format!("{part}_first"))?)),
            None => Box::new(inputs),
        }
    })
}

/// A borrowed source as an owned one.
struct Forwarded<'a>(&'a mut dyn CalibrationSource);

impl CalibrationSource for Forwarded<'_> {
    fn describe(&self) -> String {
        self.0.describe()
    }
    fn count(&self) -> Option<u64> {
        self.0.count()
    }
    fn restart(&mut self) -> Result<(), super::SuppliedError> {
        self.0.restart()
    }
    fn next(&mut self) -> Result<Option<super::Inputs>, super::SuppliedError> {
        self.0.next()
    }
}

/// Values of the fp32 graph that come near the largest half over at most `samples` inputs; they must stay in fp32.
///
/// # Errors
/// [`QuantError::NotFinite`] naming the first value that is NaN or infinite in fp32 itself; the backend or the source.
pub fn large_values(
    fp32: &Model,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    samples: u64,
    tell: &mut Tell<'_>,
) -> Result<HashSet<String>, QuantError> {
    let mut graph = fp32.clone();
    let types = value_types(fp32);
    for node in &fp32.graph.nodes {
        let Some(value) = node.outputs.first().filter(|v| types.get(*v) == Some(&DataType::F32)) else {
            continue;
        };
        let (size, most) = (format!("{value}/measured.size"), format!("{value}{MEASURED}"));
        graph.graph.nodes.push(Node::new(&size, "Abs", &[value], &[&size]));
        let reduce = Node::new(&most, "ReduceMax", &[&size], &[&most]).with(Attribute::int("keepdims", 0));
        graph.graph.nodes.push(reduce);
        graph.graph.outputs.push(ValueInfo { name: most, dtype: Some(DataType::F32), shape: Some(vec![]) });
    }
    graph.graph.outputs.retain(|o| o.name.ends_with(MEASURED));
    graph.graph.drop_dead_nodes();
    let mut largest = Largest::default();
    runner.measure(&graph, source, samples, tell, &mut largest)?;
    let large = largest.0.into_iter().filter(|(_, most)| *most >= MEASURED_LIMIT);
    Ok(large.map(|(value, _)| value).collect())
}

/// End of the names of outputs that hold a value's largest magnitude.
const MEASURED: &str = "/measured.most";

/// The largest magnitude of each value.
#[derive(Default)]
struct Largest(BTreeMap<String, f32>);

impl Measured for Largest {
    fn kind(&self) -> &'static str {
        "largest magnitude"
    }

    fn add(&mut self, outputs: Vec<(String, Tensor)>) -> Result<(), QuantError> {
        for (name, tensor) in outputs {
            let Some(value) = name.strip_suffix(MEASURED) else { continue };
            let most = tensor.as_f32().and_then(|v| v.first().copied()).unwrap_or_default();
            if !most.is_finite() {
                return Err(QuantError::NotFinite { value: value.to_owned() });
            }
            let known = self.0.entry(value.to_owned()).or_default();
            *known = most.max(*known);
        }
        Ok(())
    }

    fn save(&self) -> Inputs {
        self.0.iter().map(|(value, most)| (value.clone(), Tensor::f32(&[1], vec![*most]))).collect()
    }

    fn load(&mut self, tensors: Inputs) -> bool {
        let all = tensors.into_iter().map(|(value, t)| Some((value, t.as_f32()?.first().copied()?)));
        let Some(all) = all.collect::<Option<_>>() else { return false };
        self.0 = all;
        true
    }
}

/// What of a part must stay in fp32 when its floats are put into `float`: [`large_values`] for halves, nothing for other
/// formats.
///
/// # Errors
/// As [`large_values`].
pub fn kept_high(
    fp32: &Model,
    float: Precision,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    samples: u64,
    tell: &mut Tell<'_>,
) -> Result<HashSet<String>, QuantError> {
    if float != Precision::Fp16 {
        return Ok(HashSet::new());
    }
    large_values(fp32, runner, source, samples, tell)
}
