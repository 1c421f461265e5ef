//! Checking a quantised graph against fp32, on the CPU.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use serde::Serialize;

use super::pieces::Runner;
use super::rewrite::{
    Observed, QuantConfig, Quantised, Ranges, layers, observe_all, quantise_observed, with_outputs,
};
use super::spool::{read_tensors, write_tensors};
use super::{CalibrationSource, QuantError, Scratch, SuppliedError, Tell, Work, go_on};
use mindseye_engines::backend::Tensor;
use mindseye_engines::onnx::Model;
use mindseye_engines::passport::Verification;
use mindseye_engines::target::{Limits, Precision};

/// Errors of a quantised graph against fp32.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Relative L2 error of each output over all samples.
    pub outputs: BTreeMap<String, f64>,
    /// Relative L2 error at the end of each block, `blocks.N`.
    pub blocks: BTreeMap<String, f64>,
    /// Number of inputs.
    pub samples: u64,
    /// What the task says, where it was run.
    pub task: Option<TaskChange>,
}

/// What the task says of a graph.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskFigures {
    /// Share of scenes in which the goal was reached, 0 to 1.
    pub success: f64,
    /// Mean consistency with what was seen, 0 to 1.
    pub consistency: f64,
    /// Number of scenes.
    pub scenes: u64,
    /// The scenes one by one, in the same order at every call.
    #[serde(skip)]
    pub answers: Vec<TaskAnswer>,
}

/// What became of one scene.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskAnswer {
    /// The goal was reached.
    pub succeeded: bool,
    /// The answer's status.
    pub status: String,
    /// Its pose: x and y in metres, yaw in radians.
    pub pose: Option<[f64; 3]>,
}

/// What quantisation changes in the task: the same scenes and seeds with both graphs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskChange {
    /// With the fp32 graph.
    pub fp32: TaskFigures,
    /// With the quantised graph.
    pub quantised: TaskFigures,
    /// Scenes whose success changed, in either direction.
    pub success_changed: u64,
    /// Scenes whose status changed.
    pub status_changed: u64,
    /// Median distance between the two poses where both gave one, metres.
    pub pose_shift_m: Option<f64>,
    /// Median angle between them, degrees.
    pub pose_shift_deg: Option<f64>,
}

impl TaskChange {
    /// Compares scene by scene.
    #[must_use]
    pub fn new(fp32: TaskFigures, quantised: TaskFigures) -> Self {
        let pairs = || fp32.answers.iter().zip(&quantised.answers);
        let count = |differs: fn(&TaskAnswer, &TaskAnswer) -> bool| {
            pairs().filter(|(a, b)| differs(a, b)).count() as u64
        };
        let (mut metres, mut degrees) = (Vec::new(), Vec::new());
        for (a, b) in pairs() {
            if let (Some(a), Some(b)) = (a.pose, b.pose) {
                metres.push((a[0] - b[0]).hypot(a[1] - b[1]));
                let turn = (a[2] - b[2]).rem_euclid(std::f64::consts::TAU);
                degrees.push(turn.min(std::f64::consts::TAU - turn).to_degrees());
            }
        }
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        TaskChange {
            success_changed: count(|a, b| a.succeeded != b.succeeded),
            status_changed: count(|a, b| a.status != b.status),
            pose_shift_m: median(metres),
            pose_shift_deg: median(degrees),
            fp32,
            quantised,
        }
    }
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
    fn evaluate(&self, denoiser: &Path) -> Result<TaskFigures, SuppliedError>;
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
        if let Some(change) = &self.task {
            for (prefix, f) in [("fp32", &change.fp32), ("quantised", &change.quantised)] {
                task.insert(format!("{prefix}_success"), f.success);
                task.insert(format!("{prefix}_consistency"), f.consistency);
            }
            task.insert("scenes".into(), change.quantised.scenes as f64);
            task.insert("success_changed".into(), change.success_changed as f64);
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

/// Outputs of a graph over some inputs, in a temporary file: those of a large graph are more than memory holds.
struct Store {
    file: File,
    /// Where each begins.
    starts: HashMap<(u64, String), u64>,
    _folder: Scratch,
}

impl Store {
    fn new() -> std::io::Result<Store> {
        let folder = Scratch::new()?;
        let file = File::options().create_new(true).read(true).write(true).open(folder.0.join("outputs"))?;
        Ok(Store { file, starts: HashMap::new(), _folder: folder })
    }

    fn put(&mut self, item: u64, name: String, tensor: Tensor) -> std::io::Result<()> {
        self.starts.insert((item, name), self.file.seek(SeekFrom::End(0))?);
        let mut sink = BufWriter::new(&self.file);
        write_tensors(&mut sink, &vec![(String::new(), tensor)])?;
        sink.flush()
    }

    fn get(&self, item: u64, name: &str) -> std::io::Result<Option<Tensor>> {
        let Some(&start) = self.starts.get(&(item, name.to_owned())) else { return Ok(None) };
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start))?;
        Ok(read_tensors(&mut BufReader::new(file))?.pop().map(|(_, tensor)| tensor))
    }
}

/// What the fp32 graph gives for some inputs: its outputs and the values at the ends of its blocks.
pub struct Reference {
    values: Vec<(String, Option<usize>)>,
    /// Names of the added outputs, in the order of `values`.
    names: Vec<String>,
    wanted: Store,
    samples: u64,
}

impl Reference {
    /// Runs the fp32 graph over the source, at most `limit` items.
    ///
    /// # Errors
    /// The backend or the source fails, or the source gives nothing.
    pub fn new(
        fp32: &Model,
        runner: &Runner,
        source: &mut dyn CalibrationSource,
        limit: u64,
        tell: &mut Tell<'_>,
    ) -> Result<Reference, QuantError> {
        let values = block_ends(fp32);
        let (graph, names) = with_outputs(fp32, &values);
        let mut all = Reference { values, names, wanted: Store::new()?, samples: 0 };
        // One graph at a time: the weights of two large ones may not fit side by side.
        runner.run(&graph, source, limit, tell, compared, &mut |item, outputs| {
            for (name, tensor) in outputs {
                if !is_finite(&tensor) {
                    return Err(QuantError::NotFinite { value: all.value_of(&name).to_owned() });
                }
                all.wanted.put(item, name, tensor)?;
            }
            all.samples = all.samples.max(item + 1);
            Ok(())
        })?;
        if all.samples == 0 {
            return Err(QuantError::Source(SuppliedError::new("the source gave no inputs")));
        }
        Ok(all)
    }

    /// The value behind an output: that at the end of a block, or the output itself.
    fn value_of<'a>(&'a self, output: &'a str) -> &'a str {
        let added = self.names.iter().position(|n| n == output);
        added.map_or(output, |i| &self.values[i].0)
    }

    /// Runs another graph over the same inputs and compares.
    ///
    /// # Errors
    /// The backend or the source fails; an output is not a number.
    pub fn compare(
        &self,
        quantised: &Model,
        runner: &Runner,
        source: &mut dyn CalibrationSource,
        tell: &mut Tell<'_>,
    ) -> Result<Report, QuantError> {
        let (graph, _) = with_outputs(quantised, &self.values);
        let mut errors: BTreeMap<String, Error> = BTreeMap::new();
        let mut not_finite = None;
        runner.run(&graph, source, self.samples, tell, compared, &mut |item, outputs| {
            for (name, got) in outputs {
                let wanted = self.wanted.get(item, &name)?;
                if let (Some(w), Some(g)) = (wanted.as_ref().and_then(Tensor::as_f32), got.as_f32()) {
                    if !is_finite(&got) {
                        not_finite.get_or_insert_with(|| self.value_of(&name).to_owned());
                    }
                    errors.entry(name).or_default().add(w, g);
                }
            }
            Ok(())
        })?;
        if let Some(output) = not_finite {
            return Err(QuantError::OutputNotFinite { output });
        }
        let mut report = Report { samples: self.samples, ..Report::default() };
        for (name, error) in errors {
            let value = self.value_of(&name);
            match value == name {
                true => report.outputs.insert(name, error.relative()),
                false => report.blocks.insert(value.trim_end_matches(".out").to_owned(), error.relative()),
            };
        }
        Ok(report)
    }
}

fn compared(done: u64, of: u64) -> Work {
    Work::Compare { done, of }
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.as_f32().is_none_or(|v| v.iter().all(|x| x.is_finite()))
}

/// Runs both graphs over the source, at most `limit` items.
///
/// # Errors
/// A backend fails, or the source does.
pub fn verify(
    fp32: &Model,
    quantised: &Model,
    runner: &Runner,
    source: &mut dyn CalibrationSource,
    limit: u64,
    tell: &mut Tell<'_>,
) -> Result<Report, QuantError> {
    Reference::new(fp32, runner, source, limit, tell)?.compare(quantised, runner, source, tell)
}

/// What graphs are calibrated and compared with.
pub struct Checks<'a> {
    /// Runs the graphs.
    pub runner: &'a Runner,
    /// Calibration inputs.
    pub calibration: &'a mut dyn CalibrationSource,
    /// Inputs for the comparison with fp32: others than those of the calibration.
    pub held_out: &'a mut dyn CalibrationSource,
    /// Number of inputs of the comparison.
    pub samples: u64,
    /// Called with progress.
    pub tell: &'a mut Tell<'a>,
}

/// What was seen over the calibration inputs; none where the precision needs none.
///
/// # Errors
/// As [`observe_all`].
pub fn observe_for(
    model: &Model,
    config: &QuantConfig,
    checks: &mut Checks<'_>,
) -> Result<Option<Observed>, QuantError> {
    if config.precision == Precision::Int4w {
        return Ok(None);
    }
    observe_all(model, config, checks.runner, checks.calibration, checks.tell).map(Some)
}

/// Error of the outputs (the largest among them) when one layer alone is quantised, for each of `quantised_layers`,
/// worst first. One held-out input is used for the comparison.
///
/// # Errors
/// As [`super::quantise`] and [`verify`].
pub fn sensitivities(
    model: &Model,
    config: &QuantConfig,
    observed: Option<&Observed>,
    quantised_layers: &[String],
    checks: &mut Checks<'_>,
) -> Result<Vec<(String, f64)>, QuantError> {
    let all = layers(model);
    let reference = Reference::new(model, checks.runner, checks.held_out, 1, checks.tell)?;
    let mut found = Vec::new();
    for (i, layer) in quantised_layers.iter().enumerate() {
        let mut alone = config.clone();
        // Every other layer is kept by its full name; `keep` matches parts of names, so a layer whose name is part
        // of another's cannot occur: names end in the layer's own part.
        alone.keep = all.iter().filter(|l| *l != layer).cloned().collect();
        if alone.keep.iter().any(|k| layer.contains(k.as_str())) {
            continue;
        }
        alone.attention_head_dim = None;
        let work = Work::Layers { done: i as u64, of: quantised_layers.len() as u64 };
        let tell = &mut |_| (checks.tell)(work);
        let (runner, calibration) = (checks.runner, &mut *checks.calibration);
        let one = quantise_observed(model, &alone, observed, runner, calibration, tell)?;
        let report = reference.compare(&one.emulated, runner, checks.held_out, tell)?;
        found.push((layer.clone(), report.outputs.values().copied().fold(0.0, f64::max)));
        go_on(checks.tell, Work::Layers { done: i as u64 + 1, of: quantised_layers.len() as u64 })?;
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
    checks: &mut Checks<'_>,
) -> Result<(Quantised, Report, QuantConfig), QuantError> {
    let mut config = config.clone();
    let observed = observe_for(model, &config, checks)?;
    let reference = Reference::new(model, checks.runner, checks.held_out, checks.samples, checks.tell)?;
    let attempt = |config: &QuantConfig, checks: &mut Checks<'_>| {
        let (runner, calibration) = (checks.runner, &mut *checks.calibration);
        let made = quantise_observed(model, config, observed.as_ref(), runner, calibration, checks.tell)?;
        let report = reference.compare(&made.emulated, runner, checks.held_out, checks.tell)?;
        Ok::<_, QuantError>((made, report))
    };
    let (first, mut report) = attempt(&config, checks)?;
    let mut ranges = first.ranges.clone();
    if report.past(limits).is_none() {
        return Ok((first, report, config));
    }
    let worst = sensitivities(model, &config, observed.as_ref(), &first.layers, checks)?;
    drop(first);
    let step = (worst.len() / 10).max(1);
    for end in (step..=worst.len() / 2).step_by(step) {
        config.keep.extend(worst[end - step..end].iter().map(|(l, _)| l.clone()));
        let (next, checked) = attempt(&config, checks)?;
        report = checked;
        if report.past(limits).is_none() {
            return Ok((next, report, config));
        }
        ranges = next.ranges;
    }
    let past = report.past(limits).unwrap_or_default();
    Err(past_limit(model, &config, &ranges, past, &worst, checks)?)
}

/// Why a graph was refused: the limit that it passes (name, error, limit), its worst layers, and, where the compared inputs
/// leave the calibrated ranges, by how much.
///
/// # Errors
/// As [`observe_all`].
pub(crate) fn past_limit(
    model: &Model,
    config: &QuantConfig,
    ranges: &Ranges,
    (what, got, limit): (String, f64, f64),
    worst: &[(String, f64)],
    checks: &mut Checks<'_>,
) -> Result<QuantError, QuantError> {
    let exceeded = match config.precision {
        Precision::Int4w => None,
        _ => {
            let seen = observe_all(model, config, checks.runner, checks.held_out, checks.tell)?;
            ranges.exceeded(model, &seen)
        }
    };
    let advice = exceeded.map_or(String::new(), |(layer, times)| {
        format!(
            "; other inputs reach {times:.2} times the range that {layer} has from {}: calibrate with more items",
            checks.calibration.describe()
        )
    });
    let worst: Vec<String> = worst.iter().take(5).map(|(l, e)| format!("{l} ({e:.4})")).collect();
    Ok(QuantError::Limit { what, got, limit, worst: worst.join(", "), advice })
}
