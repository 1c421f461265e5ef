//! Plans as text: one plan's table, a refusal with what would fit, many plans in one table.

use std::fmt::Write as _;

use super::{Plan, PlanOptions, Workload, passes, plan, plan_of};
use crate::plan::ModelSpec;
use mindseye_engines::residency::Keep;
use mindseye_engines::target::{Precision, Target, TargetError};

pub(super) fn gb(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 0.995e8 => format!("{:.2} GB", b / 1e9),
        b => format!("{:.2} MB", b / 1e6),
    }
}

fn time(s: Option<f64>) -> String {
    match s {
        None => "-".into(),
        Some(s) if s < 1e-4 => format!("{:.2} us", s * 1e6),
        Some(s) if s < 0.1 => format!("{:.2} ms", s * 1e3),
        Some(s) if s < 1000.0 => format!("{s:.2} s"),
        Some(s) => format!("{s:.0} s"),
    }
}

/// `85 + 46 latents, 50 steps of 2 branches, 1 candidate, joint`.
#[must_use]
pub fn workload_line(w: &Workload) -> String {
    format!(
        "{} + {} latents, {} steps of {} branch{}, {} candidate{}, context {}",
        w.context_latents,
        w.target_latents,
        w.steps,
        w.branches,
        if w.branches == 1 { "" } else { "es" },
        w.candidates,
        if w.candidates == 1 { "" } else { "s" },
        if w.cached_context { "cached" } else { "joint" }
    )
}

/// A residency policy in words.
fn keep_line(keep: Keep) -> &'static str {
    match keep {
        Keep::All => "every part stays loaded",
        Keep::Halves => "the text encoder is unloaded after encoding, of two halves one is loaded",
        Keep::One => "text encoder, denoiser and decoder take turns",
    }
}

/// A configuration that fits where another does not.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The options of `engine plan` that make it.
    pub options: String,
    /// Its plan.
    pub plan: Plan,
}

/// What would fit instead of a plan that does not: another precision, cached or joint, fewer context latents; each
/// alone, the least change of its kind.
///
/// # Errors
/// None in practice: precisions are those of the target.
pub fn alternatives(
    model: &ModelSpec,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> Result<Vec<Choice>, TargetError> {
    let free = PlanOptions { keep: None, ..options.clone() };
    let mut found = Vec::new();
    let mut consider = |name: String, model: &ModelSpec, precision: Precision| -> Result<bool, TargetError> {
        let planned = plan(model, target, precision, &free)?;
        let fits = planned.fits;
        if fits {
            found.push(Choice { options: name, plan: planned });
        }
        Ok(fits)
    };
    if options.keep.is_some() {
        consider("--keep-loaded auto".into(), model, precision)?;
    }
    for &p in target.precisions.iter().filter(|p| **p != precision && **p != Precision::Fp32) {
        consider(format!("--precision {p}"), model, p)?;
    }
    let mut other = model.clone();
    other.workload.cached_context ^= true;
    let name = if other.workload.cached_context { "--cached" } else { "--joint" };
    consider(name.into(), &other, precision)?;
    let (mut least, mut most) = (0, model.workload.context_latents);
    let mut shorter = model.clone();
    while least + 1 < most {
        shorter.workload.context_latents = least.midpoint(most);
        let fits = plan(&shorter, target, precision, &free)?.fits;
        *(if fits { &mut least } else { &mut most }) = shorter.workload.context_latents;
    }
    if least > 0 {
        shorter.workload.context_latents = least;
        consider(format!("--context {least}"), &shorter, precision)?;
    }
    Ok(found)
}

impl Plan {
    /// Why the plan cannot be built, with the arithmetic; none when it fits.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        if self.fits {
            return None;
        }
        let m = &self.memory;
        let staging = if m.staging > 0 { format!(" + copies {}", gb(m.staging)) } else { String::new() };
        let text = if m.text_total > m.run_total {
            format!("; {} while a text is encoded", gb(m.text_total))
        } else {
            String::new()
        };
        Some(format!(
            "{} in {} does not fit {}: weights {} + activations {} + context K/V and caches {} + workspace {}{staging} \
             = {}{text}, {} usable ({})",
            self.model,
            self.precision,
            self.target,
            gb(m.weights),
            gb(m.activations),
            gb(m.state),
            gb(m.workspace),
            gb(m.run_total),
            gb(m.usable),
            keep_line(m.keep)
        ))
    }

    /// The plan as a text table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!(
            "{} on {} in {}: {}\n",
            self.model,
            self.target,
            self.precision,
            workload_line(&self.workload)
        );
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<17} {:<20} {:<5} {:>11} {:>11} {:>11} {:>11} {:>10} {:>6} {:>11} {:>11} {:>11}",
            "component",
            "one call",
            "prec",
            "weights",
            "activations",
            "in and out",
            "state",
            "TFLOP",
            "calls",
            "roofline",
            "at rate",
            "copies"
        );
        for c in &self.components {
            let _ = writeln!(
                out,
                "{:<17} {:<20} {:<5} {:>11} {:>11} {:>11} {:>11} {:>10} {:>6} {:>11} {:>11} {:>11}{}",
                c.name,
                c.unit,
                c.precision.name(),
                gb(c.weight_bytes),
                gb(c.activation_bytes),
                gb(c.io_bytes),
                gb(c.state_bytes),
                if c.teraflop >= 0.01 { format!("{:.2}", c.teraflop) } else { format!("{:.2e}", c.teraflop) },
                c.calls,
                time(c.seconds),
                time(c.seconds_all_at_rate),
                time(c.copy_seconds),
                if c.memory_bound { " (memory)" } else { "" }
            );
        }
        self.memory_lines(&mut out);
        out
    }

    fn memory_lines(&self, out: &mut String) {
        let m = &self.memory;
        let _ = writeln!(
            out,
            "memory: weights {} + activations, in and out {} + context K/V and caches {} + workspace {} + copies {} = {}; \
             {} while a text is encoded; usable {}",
            gb(m.weights),
            gb(m.activations),
            gb(m.state),
            gb(m.workspace),
            gb(m.staging),
            gb(m.run_total),
            gb(m.text_total),
            gb(m.usable)
        );
        let turns = if m.loaded_per_answer > 0 {
            format!(": {} loaded for each answer, {}", gb(m.loaded_per_answer), time(Some(m.load_seconds)))
        } else {
            String::new()
        };
        let _ = writeln!(out, "loaded (--keep-loaded {}): {}{turns}", m.keep, keep_line(m.keep));
        let _ = writeln!(
            out,
            "build: engines of {}, about {} on two cores with TensorRT-RTX, {} of host memory; on a device, where kernels \
             are timed, longer",
            gb(self.build.engine_bytes),
            time(Some(self.build.seconds)),
            gb(self.build.host_bytes)
        );
        let _ = writeln!(
            out,
            "one answer: denoiser {:.1} TFLOP; {} from goal to answer at best, {} with the frames of its context (engines \
             reach 40 to 60 % of a roofline)",
            self.denoiser_teraflop_total,
            time(self.seconds_answer),
            time(self.seconds_total)
        );
    }
}

/// Plans of a model for several targets, in every precision that each has, with the context joint and cached.
///
/// # Errors
/// None in practice: precisions are those of the targets.
pub fn compare(
    model: &ModelSpec,
    targets: &[Target],
    options: &PlanOptions,
) -> Result<Vec<Plan>, TargetError> {
    let mut plans = Vec::new();
    let ways: Vec<_> = [false, true]
        .map(|cached_context| {
            let workload = Workload { cached_context, ..model.workload.clone() };
            let model = ModelSpec { workload, ..model.clone() };
            let counted = passes(&model);
            (model, counted)
        })
        .into();
    for target in targets {
        for &precision in &target.precisions {
            for (model, counted) in &ways {
                plans.push(plan_of(model, counted.clone(), target, precision, options)?);
            }
        }
    }
    Ok(plans)
}

/// A table of plans in Markdown, and of each target the fastest that fits.
#[must_use]
pub fn compared(plans: &[Plan]) -> String {
    let mut out = String::from(
        "| target | precision | context | parts loaded | peak | usable | fits | one answer at best | at 50 % of it |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for p in plans {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            p.target,
            p.precision,
            if p.workload.cached_context { "cached" } else { "joint" },
            p.memory.keep,
            gb(p.memory.peak),
            gb(p.memory.usable),
            if p.fits { "yes" } else { "**no**" },
            time(p.seconds_answer),
            time(at_half(p))
        );
    }
    let mut targets: Vec<&str> = plans.iter().map(|p| p.target.as_str()).collect();
    targets.dedup();
    out.push_str("\nFastest that fits:\n\n");
    for target in targets {
        let lines = [false, true].map(|cached| {
            let fitting =
                plans.iter().filter(|p| p.target == target && p.fits && p.workload.cached_context == cached);
            let context = if cached { "cached" } else { "joint" };
            match fitting.min_by(|a, b| key(a).total_cmp(&key(b))) {
                None => format!("context {context}: nothing fits"),
                Some(p) => format!(
                    "context {context}: {}, --keep-loaded {}, {} of {}, {} at best, {} at half of the roofline",
                    p.precision,
                    p.memory.keep,
                    gb(p.memory.peak),
                    gb(p.memory.usable),
                    time(p.seconds_answer),
                    time(at_half(p))
                ),
            }
        });
        let _ = writeln!(out, "* {target}\n  * {}\n  * {}", lines[0], lines[1]);
    }
    out
}

/// At half of the roofline; the time for loading parts stays as it is.
fn at_half(p: &Plan) -> Option<f64> {
    p.seconds_answer.map(|s| 2.0 * s - p.memory.load_seconds)
}

/// Fast before slow; without times, little memory before much.
fn key(p: &Plan) -> f64 {
    p.seconds_answer.unwrap_or(p.memory.peak as f64)
}

/// The document of plans of a model for every target and precision (`docs/plans.md` for the large one).
///
/// # Errors
/// As [`compare`].
pub fn compared_document(
    model: &ModelSpec,
    targets: &[Target],
    options: &PlanOptions,
) -> Result<String, TargetError> {
    let mut run = model.workload.clone();
    run.cached_context = false;
    let what = workload_line(&run).replace(", context joint", "");
    let plans = compare(model, targets, options)?;
    Ok(format!("Plans of {}: {what}.\n\n{}", model.name, compared(&plans)))
}
