//! Checking a quantised graph against fp32, on the CPU.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::rewrite::{QuantConfig, Quantised, calibrate_and_quantise, layers, with_outputs};
use super::{CalibrationSource, QuantError, session};
use crate::backend::{Backend, Tensor};
use crate::onnx::Model;
use crate::passport::Verification;
use crate::target::Limits;

/// Errors of a quantised graph against fp32.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Relative L2 error of each output over all samples.
    pub outputs: BTreeMap<String, f64>,
    /// Relative L2 error at the end of each block, `blocks.N`.
    pub blocks: BTreeMap<String, f64>,
    /// Number of inputs.
    pub samples: u64,
    /// Figures of the task with fp32 and with the quantised graph, where it was run.
    pub task: Option<(TaskFigures, TaskFigures)>,
}

/// What the task says of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TaskFigures {
    /// Share of scenes in which the goal was found, 0 to 1.
    pub success: f64,
    /// Mean consistency with what was seen, 0 to 1.
    pub consistency: f64,
    /// Number of scenes.
    pub scenes: u64,
}

/// The task that engines are for, as far as it can be measured on the CPU: the grounding evaluation.
///
/// It is given a denoiser as an ONNX file for CPU backends and runs the rest of the bundle around it. Implementors
/// must use the same scenes and seeds at each call.
pub trait TaskEvaluation {
    /// Runs the task with this denoiser.
    ///
    /// # Errors
    /// Why it could not be run.
    fn evaluate(&self, denoiser: &Path) -> Result<TaskFigures, String>;
}

impl Report {
    /// The first output or block past its limit: name, error, limit.
    #[must_use]
    pub fn past(&self, limits: &Limits) -> Option<(String, f64, f64)> {
        let outputs = self.outputs.iter().map(|(n, e)| (n, *e, limits.output_relative_l2));
        let blocks = self.blocks.iter().map(|(n, e)| (n, *e, limits.block_relative_l2));
        // `!(e <= limit)` also catches NaN.
        outputs
            .chain(blocks)
            .find(|(_, e, limit)| e.partial_cmp(limit).is_none_or(std::cmp::Ordering::is_gt))
            .map(|(n, e, limit)| (n.clone(), e, limit))
    }

    /// The figures as a passport holds them.
    #[must_use]
    pub fn for_passport(&self) -> Verification {
        let mut task = BTreeMap::new();
        if let Some((fp32, quantised)) = &self.task {
            for (prefix, f) in [("fp32", fp32), ("quantised", quantised)] {
                task.insert(format!("{prefix}_success"), f.success);
                task.insert(format!("{prefix}_consistency"), f.consistency);
            }
            task.insert("scenes".into(), quantised.scenes as f64);
        }
        Verification {
            outputs: self.outputs.clone(),
            blocks: self.blocks.clone(),
            samples: self.samples,
            task,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Error {
    difference: f64,
    reference: f64,
}

impl Error {
    fn add(&mut self, reference: &[f32], got: &[f32]) {
        if reference.len() != got.len() {
            self.difference = f64::INFINITY;
            return;
        }
        for (&r, &g) in reference.iter().zip(got) {
            self.difference += (f64::from(g) - f64::from(r)).powi(2);
            self.reference += f64::from(r).powi(2);
        }
    }

    /// `|got - reference| / |reference|`; the difference alone where the reference is zero.
    fn relative(self) -> f64 {
        if self.reference > 0.0 { (self.difference / self.reference).sqrt() } else { self.difference.sqrt() }
    }
}

/// Values named `blocks.N.out` with their width, which is that of the last weight before them.
fn block_ends(model: &Model) -> Vec<(String, Option<usize>)> {
    let made: std::collections::HashSet<&str> =
        model.graph.nodes.iter().flat_map(|n| n.outputs.iter().map(String::as_str)).collect();
    (0..)
        .map(|b| format!("blocks.{b}.out"))
        .take_while(|n| made.contains(n.as_str()))
        .map(|n| (n, None))
        .collect()
}

/// Runs both graphs over the source, at most `limit` items.
///
/// # Errors
/// A backend fails, or the source does.
pub fn verify(
    fp32: &Model,
    quantised: &Model,
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
    limit: u64,
) -> Result<Report, QuantError> {
    let values = block_ends(fp32);
    // One graph at a time: the weights of two large ones may not fit side by side.
    let (reference, names) = with_outputs(fp32, &values);
    let mut wanted = Vec::new();
    run_all(&reference, backend, source, limit, &mut |_, outputs| wanted.push(outputs))?;
    let (candidate, _) = with_outputs(quantised, &values);
    let mut errors: BTreeMap<String, Error> = BTreeMap::new();
    run_all(&candidate, backend, source, limit, &mut |sample, got| {
        for ((name, w), (_, g)) in wanted.get(sample).into_iter().flatten().zip(&got) {
            if let (Some(w), Some(g)) = (w.as_f32(), g.as_f32()) {
                errors.entry(name.clone()).or_default().add(w, g);
            }
        }
    })?;
    let samples = wanted.len() as u64;
    if samples == 0 {
        return Err(QuantError::Source("the source gave no inputs".into()));
    }
    let mut report = Report { samples, ..Report::default() };
    for (name, error) in errors {
        match names.iter().position(|n| *n == name) {
            Some(i) => {
                report.blocks.insert(values[i].0.trim_end_matches(".out").to_owned(), error.relative())
            }
            None => report.outputs.insert(name, error.relative()),
        };
    }
    Ok(report)
}

/// Runs a graph over at most `limit` items.
fn run_all(
    model: &Model,
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
    limit: u64,
    each: &mut dyn FnMut(usize, Vec<(String, Tensor)>),
) -> Result<(), QuantError> {
    let mut session = session(model, backend)?;
    source.restart().map_err(QuantError::Source)?;
    for sample in 0..usize::try_from(limit).unwrap_or(usize::MAX) {
        let Some(inputs) = source.next().map_err(QuantError::Source)? else { break };
        let views: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        each(sample, session.run(&views)?);
    }
    drop(session);
    crate::trt::release_freed_memory();
    Ok(())
}

/// Error of the outputs (the largest among them) when one layer alone is quantised, for each layer that `config`
/// quantises, worst first. One calibration item is used for the comparison.
///
/// # Errors
/// As [`calibrate_and_quantise`] and [`verify`].
pub fn sensitivities(
    model: &Model,
    config: &QuantConfig,
    quantised_layers: &[String],
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
) -> Result<Vec<(String, f64)>, QuantError> {
    let all = layers(model);
    let mut found = Vec::new();
    for layer in quantised_layers {
        let mut alone = config.clone();
        // Every other layer is kept by its full name; `keep` matches parts of names, so a layer whose name is part
        // of another's cannot occur: names end in the layer's own part.
        alone.keep = all.iter().filter(|l| *l != layer).cloned().collect();
        if alone.keep.iter().any(|k| layer.contains(k.as_str())) {
            continue;
        }
        alone.attention_head_dim = None;
        let one = calibrate_and_quantise(model, &alone, backend, source, &mut |_, _| true)?;
        let report = verify(model, &one.emulated, backend, source, 1)?;
        found.push((layer.clone(), report.outputs.values().copied().fold(0.0, f64::max)));
    }
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(found)
}

/// Quantises, and where the limits are passed, keeps the worst layers high, a tenth of the layers at a time, until
/// they are met.
///
/// # Errors
/// [`QuantError::Limit`] with the worst layers when half of the layers are kept and the limits are still passed.
pub fn auto_exclude(
    model: &Model,
    config: &QuantConfig,
    limits: &Limits,
    backend: &dyn Backend,
    source: &mut dyn CalibrationSource,
    samples: u64,
) -> Result<(Quantised, Report, QuantConfig), QuantError> {
    let mut config = config.clone();
    let first = calibrate_and_quantise(model, &config, backend, source, &mut |_, _| true)?;
    let mut report = verify(model, &first.emulated, backend, source, samples)?;
    if report.past(limits).is_none() {
        return Ok((first, report, config));
    }
    let worst = sensitivities(model, &config, &first.layers, backend, source)?;
    let step = (worst.len() / 10).max(1);
    for end in (step..=worst.len() / 2).step_by(step) {
        config.keep.extend(worst[end - step..end].iter().map(|(l, _)| l.clone()));
        let next = calibrate_and_quantise(model, &config, backend, source, &mut |_, _| true)?;
        report = verify(model, &next.emulated, backend, source, samples)?;
        if report.past(limits).is_none() {
            return Ok((next, report, config));
        }
    }
    let (what, got, limit) = report.past(limits).unwrap_or_default();
    Err(QuantError::Limit { what, got, limit, worst: name_worst(&worst) })
}

/// The five worst layers as text.
pub(crate) fn name_worst(worst: &[(String, f64)]) -> String {
    worst.iter().take(5).map(|(l, e)| format!("{l} ({e:.4})")).collect::<Vec<_>>().join(", ")
}
