//! What a part of a bundle becomes in a 16-bit float format, and inputs to compare every part with.

use std::collections::{BTreeMap, HashSet};

use super::{CalibrationSource, HalfInputs, MEASURED_LIMIT, PartInputs, QuantError, Tell, session};
use mindseye_engines::backend::Backend;
use mindseye_engines::bundle::Bundle;
use mindseye_engines::onnx::{Attribute, DataType, Model, Node, ValueInfo};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::Precision;

/// fp32 weights up to which values are measured before a part is put into halves; in larger parts only the layers that
/// are known to overflow stay in fp32. The graph is run on the CPU, with its weights in memory.
const MEASURED_BYTES: u64 = 8 << 30;
/// Seed of the inputs around the denoiser.
const SEED: u64 = 20_260_728;
/// Operators that make no floats.
const NO_FLOATS: [&str; 12] = [
    "Shape",
    "Size",
    "NonZero",
    "ArgMax",
    "ArgMin",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "And",
    "Not",
];

/// Inputs for a part: those of the joint denoiser, the same cut in two for its cached halves, and seeded ones for
/// everything else. Streaming halves of a codec get the caches that their first half makes.
///
/// # Errors
/// A graph that makes another one's inputs cannot be read or run.
pub fn part_inputs<'a>(
    bundle: &Bundle,
    component: &str,
    fp32: &Model,
    backend: &dyn Backend,
    joint: &'a mut dyn CalibrationSource,
    items: u64,
) -> Result<Box<dyn CalibrationSource + 'a>, QuantError> {
    let tokens = bundle.manifest().dit.tokens_per_frame();
    let open = |component: &str| -> Result<_, QuantError> {
        let path = bundle.path(component).map_err(|e| QuantError::Unsupported(e.to_string()))?;
        session(&Model::load(path)?, backend)
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
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
    samples: u64,
    tell: &mut Tell<'_>,
) -> Result<HashSet<String>, QuantError> {
    let mut graph = fp32.clone();
    let mut values: Vec<String> = Vec::new();
    for node in &fp32.graph.nodes {
        if NO_FLOATS.contains(&node.op_type.as_str()) || node.op_type == "Cast" {
            continue;
        }
        let Some(value) = node.outputs.first() else { continue };
        let (size, most) = (format!("{value}/measured.size"), format!("{value}/measured.most"));
        graph.graph.nodes.push(Node::new(&size, "Abs", &[value], &[&size]));
        let reduce = Node::new(&most, "ReduceMax", &[&size], &[&most]).with(Attribute::int("keepdims", 0));
        graph.graph.nodes.push(reduce);
        graph.graph.outputs.push(ValueInfo { name: most, dtype: Some(DataType::F32), shape: Some(vec![]) });
        values.push(value.clone());
    }
    let mut session = session(&graph, backend)?;
    source.restart().map_err(QuantError::Source)?;
    let mut large = HashSet::new();
    for sample in 0..samples {
        let Some(inputs) = source.next().map_err(QuantError::Source)? else { break };
        let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        for (name, tensor) in session.run(&views)? {
            let Some(value) = name.strip_suffix("/measured.most") else { continue };
            let most = tensor.as_f32().and_then(|v| v.first().copied()).unwrap_or_default();
            if !most.is_finite() {
                return Err(QuantError::NotFinite { value: value.to_owned() });
            }
            if most >= MEASURED_LIMIT {
                large.insert(value.to_owned());
            }
        }
        super::go_on(tell, super::Work::Calibrate { done: sample + 1, of: Some(samples) })?;
    }
    Ok(large)
}

/// What of a part must stay in fp32 when its floats are put into `float`: [`large_values`] for halves, unless its
/// weights are too many to be run on the CPU; nothing for other formats.
///
/// # Errors
/// As [`large_values`].
pub fn kept_high(
    fp32: &Model,
    float: Precision,
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
    samples: u64,
    tell: &mut Tell<'_>,
) -> Result<HashSet<String>, QuantError> {
    if float != Precision::Fp16 {
        return Ok(HashSet::new());
    }
    if fp32.weight_bytes() > MEASURED_BYTES {
        tracing::warn!(
            graph = fp32.graph.name,
            "too large to measure: only layers known to overflow stay in fp32"
        );
        return Ok(HashSet::new());
    }
    large_values(fp32, backend, source, samples, tell)
}
