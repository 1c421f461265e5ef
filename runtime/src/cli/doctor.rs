//! `mindseye doctor`: is everything there that a goal needs?

use super::run::configure;
use super::{one_line, say};
use crate::ground::Mind;
use crate::image::RgbImage;
use crate::imagine::{Budget, Clock, ContextLatents, Flow, NoClock, Prompt, imagine};
use crate::mind::{Pipeline, find_bundle};
use crate::node::MonotonicClock;
use anyhow::Context;
use clap::Args;
use mindseye_bridge::ros::RosSession;
use mindseye_engines::count::count_denoiser;
use mindseye_engines::cuda;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  mindseye doctor\n  mindseye doctor --config configs/robots/sim.toml --json"
)]
pub struct DoctorArgs {
    /// Robot configuration to check.
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// Directory of the model bundle.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Seconds to wait for the robot's topics.
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    wait: f64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What was looked at.
struct Finding {
    what: &'static str,
    verdict: Verdict,
    text: String,
    /// Without this no goal can be answered, though nothing is broken: a robot that is not there yet.
    needed: bool,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, verdict: Verdict, text: impl Into<String>) {
        self.0.push(Finding { what, verdict, text: text.into(), needed: false });
    }

    /// Something without which no goal can be answered is not there.
    fn missing(&mut self, what: &'static str, text: impl Into<String>) {
        self.0.push(Finding { what, verdict: Verdict::Warn, text: text.into(), needed: true });
    }

    fn healthy(&self) -> bool {
        self.0.iter().all(|f| f.verdict != Verdict::Fail)
    }

    fn ready(&self) -> bool {
        self.healthy() && self.0.iter().all(|f| !f.needed)
    }

    fn to_json(&self) -> serde_json::Value {
        let checks = self
            .0
            .iter()
            .map(|f| serde_json::json!({"check": f.what, "verdict": f.verdict.word(), "text": f.text}));
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "healthy": self.healthy(),
            "ready": self.ready(),
            "checks": checks.collect::<Vec<_>>(),
        })
    }

    /// One line a finding, and what it comes to.
    fn to_text(&self) -> String {
        let mut text = String::new();
        for f in &self.0 {
            text += &format!("{:<4}  {:<14} {}\n", f.verdict.word(), f.what, f.text);
        }
        let named = |wanted: &dyn Fn(&Finding) -> bool| {
            self.0.iter().filter(|f| wanted(f)).map(|f| f.what).collect::<Vec<_>>().join(", ")
        };
        let conclusion = if !self.healthy() {
            format!("something needs attention: {}", named(&|f| f.verdict == Verdict::Fail))
        } else if !self.ready() {
            format!("not ready, no goal can be answered yet: {}", named(&|f| f.needed))
        } else if self.0.iter().any(|f| f.verdict == Verdict::Warn) {
            format!("ready, with warnings: {}", named(&|f| f.verdict == Verdict::Warn))
        } else {
            "ready".to_owned()
        };
        text + "\n" + &conclusion
    }
}

pub fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut findings = Findings::default();
    let config = match configure(args.config.as_ref(), &[], &[]) {
        Ok(config) => {
            let what = args.config.as_ref().map_or("defaults".into(), |p| p.display().to_string());
            findings.add("configuration", Verdict::Ok, what);
            Some(config)
        }
        Err(error) => {
            findings.add("configuration", Verdict::Fail, one_line(&error));
            None
        }
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    findings.add("cores", if cores >= 2 { Verdict::Ok } else { Verdict::Warn }, cores.to_string());

    gpu(&mut findings);

    let given = args.bundle.clone().or_else(|| config.as_ref().and_then(|c| c.model.bundle.clone()));
    match find_bundle(given.as_deref(), |name| std::env::var(name).ok()) {
        Ok(directory) => model(&directory, config.as_ref().map_or(2, |c| c.model.threads), &mut findings),
        Err(error) => findings.add("bundle", Verdict::Fail, error.to_string()),
    }
    if let Some(config) = &config {
        match RosSession::open(&config.ros) {
            Ok(session) => {
                network(&session, config, args.wait, &mut findings);
                // Nothing hangs on how this session ends.
                let _ = session.close();
            }
            Err(error) => findings.add("zenoh", Verdict::Fail, error.to_string()),
        }
    }

    if args.json {
        say(&findings.to_json().to_string())?;
    } else {
        say(&findings.to_text())?;
    }
    Ok(if findings.healthy() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A machine needs no GPU; what is missing for one is told all the same.
fn gpu(findings: &mut Findings) {
    let found = cuda::probe().and_then(|driver| Ok((driver, cuda::library()?)));
    match found {
        Err(error) => findings.add("gpu", Verdict::Ok, format!("none, the CPU is used: {error}")),
        Ok((driver, library)) => {
            let one = |d: &cuda::DeviceInfo| {
                format!("{} ({}, {:.0} GB)", d.name, d.compute_capability, d.total_bytes as f64 / 1e9)
            };
            let devices = driver.devices.iter().map(one).collect::<Vec<_>>().join(", ");
            let (major, minor) = (driver.cuda_version / 1000, driver.cuda_version % 1000 / 10);
            // Kernels are loaded, not only looked for: a driver or a device may be too old for them.
            let began = MonotonicClock.now();
            let runs = match cuda::CudaDevice::with_kernels(0, None) {
                Ok(device) => {
                    let millis = (MonotonicClock.now() - began).as_millis_f64();
                    let kernels = cuda::Kernel::ALL.len();
                    let products = device.products().unwrap_or_else(|| {
                        format!("no cuBLASLt was found ({} may name it)", cuda::PRODUCTS_VARIABLE)
                    });
                    format!(
                        "--backend cuda runs on the first one with {kernels} kernels of its own (loaded in {millis:.0} ms); products: {products}; cuDNN is not used"
                    )
                }
                Err(error) => format!("the CPU is used: {error}"),
            };
            let text = format!("{devices}, CUDA {major}.{minor} by {}; {runs}", library.display());
            findings.add("gpu", Verdict::Ok, text);
        }
    }
}

fn model(directory: &std::path::Path, threads: usize, findings: &mut Findings) {
    let began = MonotonicClock.now();
    let pipeline = match Pipeline::load(directory, "rten", threads) {
        Ok(pipeline) => pipeline,
        Err(error) => return findings.add("bundle", Verdict::Fail, error.to_string()),
    };
    let manifest = pipeline.bundle().manifest();
    findings.add(
        "bundle",
        Verdict::Ok,
        format!(
            "{} {} for {} in {}, {}x{} pixels, loaded in {:.0} ms, sha256 {}",
            manifest.name,
            manifest.precision,
            manifest.target,
            directory.display(),
            manifest.image.width,
            manifest.image.height,
            (MonotonicClock.now() - began).as_millis_f64(),
            &pipeline.bundle().hash()[..12],
        ),
    );
    let dit = &manifest.dit;
    let joined = |parts: [&str; 3]| parts.join(", ");
    findings.add(
        "model",
        Verdict::Ok,
        joined([
            &format!(
                "denoiser of {} layers, width {}, {} parameters",
                dit.layers,
                dit.dim(),
                grouped(count_denoiser(dit, 2, 0, 2).parameters())
            ),
            if pipeline.is_streaming() {
                "streaming video autoencoder (1 + 4 k frames)"
            } else {
                "stateless codec (4 frames a latent)"
            },
            if pipeline.caches_context() {
                "context computed once per goal (one-way mask)"
            } else {
                "context seen at every step"
            },
        ]),
    );
    if dit.lift {
        findings.add("lift", Verdict::Ok, "heads for pose, mask and place: goals get metric poses");
    } else {
        let text = "no heads for pose, mask and place: goals are imagined, but no pose can be given";
        findings.add("lift", Verdict::Warn, text);
    }
    match pipeline.pieces() {
        Some(pieces) => {
            findings.add("vocabulary", Verdict::Ok, format!("open, SentencePiece of {pieces} pieces"));
        }
        None => findings.add("vocabulary", Verdict::Ok, pipeline.words().join(", ")),
    }
    let work = goal_flops(&pipeline);
    if work > TRIAL_MAX_FLOP {
        let text = format!(
            "{:.0} TFLOP; not tried on the CPU. Build engines for a GPU: mindseye engine build",
            work / 1e12
        );
        return findings.add("one goal", Verdict::Warn, text);
    }
    match pipeline.mind(0).map_err(Into::into).and_then(|mut mind| trial(mind.as_mut())) {
        Ok(millis) => {
            let verdict = if millis < 10_000.0 { Verdict::Ok } else { Verdict::Warn };
            findings.add("one goal", verdict, format!("{millis:.0} ms on this machine, full steps"));
        }
        Err(error) => findings.add("one goal", Verdict::Fail, one_line(&error)),
    }
}

/// More arithmetic than this is not tried: on two cores it takes minutes.
const TRIAL_MAX_FLOP: f64 = 10e12;

/// Arithmetic of the denoiser for one goal at full context, both branches, all steps and candidates.
fn goal_flops(pipeline: &Pipeline) -> f64 {
    let (spec, dit) = (pipeline.spec(), &pipeline.bundle().manifest().dit);
    let s = &spec.settings;
    let steps = (s.candidates * s.steps) as f64 * if s.guidance == 1.0 { 1.0 } else { 2.0 };
    let flops = |frames, memory| count_denoiser(dit, frames, memory, 2).flops().products();
    if pipeline.caches_context() {
        let given = spec.context_max + 1;
        2.0 * flops(given, 0) + steps * flops(s.target_latents - 1, given)
    } else {
        steps * flops(spec.context_max + s.target_latents, 0)
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// Imagines one rollout from grey frames, and gives the milliseconds that it took.
fn trial(mind: &mut dyn Mind) -> anyhow::Result<f64> {
    let spec = mind.spec().clone();
    let began = MonotonicClock.now();
    let text = mind.encode_text("")?;
    let grey = RgbImage::filled(spec.camera.width, spec.camera.height, [128; 3]);
    let first = mind.encode_still(&grey)?;
    let seen = ContextLatents {
        index: (0..spec.context_max as u64).collect(),
        latents: first.repeat(spec.context_max),
        first,
    };
    let prompt = Prompt { text: &text, null_text: &text, camera: None };
    let budget = Budget { clock: &NoClock, until: None };
    let imagined = imagine(mind.denoiser(), &seen, prompt, &spec.settings, budget, &mut |_| Flow::Continue)?;
    let rollout = imagined.rollouts.first().context("no rollout was imagined")?;
    mind.decode(&rollout.latents)?;
    Ok((MonotonicClock.now() - began).as_millis_f64())
}

fn network(
    session: &RosSession,
    config: &crate::config::RobotConfig,
    wait_secs: f64,
    findings: &mut Findings,
) {
    std::thread::sleep(Duration::from_secs_f64(wait_secs.clamp(0.0, 60.0)));
    let links = session.links();
    let where_to = config.ros.zenoh.connect.clone().unwrap_or_default().join(", ");
    if links == 0 {
        let text =
            format!("session open, but connected to nobody (connect = [{where_to}]); is the router running?");
        return findings.missing("zenoh", text);
    }
    findings.add("zenoh", Verdict::Ok, format!("{links} links ({where_to})"));
    let Some(graph) = session.graph() else {
        return findings.add("topics", Verdict::Ok, "this key style announces no topics; not checked");
    };
    let t = &config.topics;
    let present: Vec<String> =
        graph.topics().into_iter().filter(|t| t.publishers > 0).map(|t| t.name).collect();
    let camera = [&t.image, &t.compressed].into_iter().find(|name| present.contains(name));
    match camera {
        Some(name) => findings.add("camera", Verdict::Ok, name.clone()),
        None => {
            let text = format!("nobody publishes {} or {}", t.image, t.compressed);
            findings.missing("camera", text);
        }
    }
    for (what, name, without) in [
        ("odometry", &t.odom, "answers will be relative to the base"),
        ("camera_info", &t.camera_info, "the model's own field of view is assumed"),
    ] {
        if present.contains(name) {
            findings.add(what, Verdict::Ok, name.clone());
        } else {
            findings.add(what, Verdict::Warn, format!("nobody publishes {name}: {without}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Findings, Verdict, grouped};

    #[test]
    fn it_is_ready_only_when_a_goal_can_be_answered() {
        let check = |fill: &dyn Fn(&mut Findings), want: &str, ready: bool| {
            let mut findings = Findings::default();
            findings.add("bundle", Verdict::Ok, "x");
            fill(&mut findings);
            assert!(findings.to_text().ends_with(want), "{}", findings.to_text());
            assert_eq!(findings.to_json()["ready"], ready);
        };
        check(&|_| {}, "\n\nready", true);
        check(&|f| f.add("odometry", Verdict::Warn, "none"), "\n\nready, with warnings: odometry", true);
        check(
            &|f| f.missing("zenoh", "connected to nobody"),
            "not ready, no goal can be answered yet: zenoh",
            false,
        );
        let broken = |f: &mut Findings| {
            f.missing("zenoh", "connected to nobody");
            f.add("configuration", Verdict::Fail, "wrong");
        };
        check(&broken, "something needs attention: configuration", false);
    }

    #[test]
    fn thousands_are_apart() {
        for (number, want) in [(7, "7"), (1234, "1 234"), (4_999_787_712, "4 999 787 712")] {
            assert_eq!(grouped(number), want);
        }
    }
}
