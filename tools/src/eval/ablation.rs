//! `eval ablation`: what each part of the recipe is worth, on the house world: the paper's Table 1, Table 3 and Figures
//! 8, 13 and 14 from one command.
//!
//! All variants use the same weights and change only how they are sampled from; rows that would need other weights (no
//! box in training, another training context, no pretraining) are named and left empty. Each house is done with all
//! variants before the next, and written to `ablation.jsonl` in the output directory, from where a run goes on after a
//! stop. `ablation.json`, `ablation.md` and `ablation.png` are made from it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mindseye::context::spread;
use mindseye::ground::Mind;
use mindseye::imagine::{
    Budget, ContextLatents, Dropped, Flow, NoClock, Prompt, RolloutSettings, Rope, choose_context, imagine,
    pick,
};
use mindseye_world::{Camera, Pose2, Rng, goal_pose, project_box, wrap_angle};
use serde::{Deserialize, Serialize};

use super::examiner::Examiner;
use super::judge::{Judge, Rules, Scores, Verdict, centred, true_drive};
use super::plot::{Chart, Series, draw};
use super::report::{Table, write_atomically};
use super::stats::{Figure, median, share};
use super::visit::{Bench, CommonArgs, Tools, Visit, calibration};

/// Arguments of `eval ablation`.
#[derive(clap::Args, Debug, Clone)]
pub struct AblationArgs {
    /// Shared arguments.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Directory for `ablation.jsonl` (the state), `.json`, `.md` and `.png`.
    #[arg(long, default_value = "runs/ablation")]
    pub out: PathBuf,
    /// Begin no house after this many minutes, and report on those that are done.
    #[arg(long)]
    pub minutes: Option<f64>,
}

/// Which context a variant sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ContextChoice {
    /// The runtime's: half by the mask, the rest spread.
    Runtime(usize),
    /// Evenly spread over the recording.
    Spread(usize),
    /// At random without repetition, in order.
    Random(usize),
    /// A random run of neighbours.
    Contiguous(usize),
    /// The first picture alone.
    Nothing,
}

/// One way to sample.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    key: String,
    label: String,
    steps: usize,
    choice: ContextChoice,
    guidance: f32,
    dropped: Dropped,
    rope: Rope,
    gap: f64,
    repeat: u64,
}

/// What one variant came to in one house.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct VariantResult {
    verdict: Verdict,
    /// Passes through the denoiser for the drive, and how long they took (ms).
    passes: usize,
    ms: f64,
    /// Heading (degrees) and place (m) of the pose head at the end of the drive.
    end: Option<[f64; 2]>,
    /// From the pose that the head gives for the end, the named object would be seen with the centre of its box
    /// within 0.6 of the half size: IF without pictures and boxes.
    by_pose: bool,
}

/// A line of the state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Line {
    house: u64,
    goal: String,
    results: BTreeMap<String, VariantResult>,
}

/// The first line: what the state was made with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    bundle: String,
    seed: u64,
    difficulty: String,
    steps: usize,
    examiner_houses: usize,
    variants: Vec<String>,
}

const REPEATS: u64 = 5;

impl Variant {
    /// As the bundle says, with the runtime's choice of context.
    pub(super) fn shipped(settings: &RolloutSettings, trained: usize) -> Self {
        Self {
            key: "base".into(),
            label: "as shipped".into(),
            steps: settings.steps,
            choice: ContextChoice::Runtime(trained),
            guidance: settings.guidance,
            dropped: Dropped::Both,
            rope: Rope::Source,
            gap: settings.gap,
            repeat: 0,
        }
    }
}

/// Numbers of denoising steps to try.
const STEPS: [usize; 6] = [1, 2, 3, 4, 8, 12];

fn key_of_steps(steps: usize, guided: bool, shipped: &RolloutSettings) -> String {
    match (steps == shipped.steps, guided == (shipped.guidance != 1.0), guided) {
        (true, true, _) => "base".to_owned(),
        (true, false, false) => "no_cfg".to_owned(),
        (_, _, true) => format!("steps_{steps}"),
        (_, _, false) => format!("steps_{steps}_no_cfg"),
    }
}

fn variants(settings: &RolloutSettings, trained: usize, allowed: usize) -> Vec<Variant> {
    let base = Variant::shipped(settings, trained);
    let with = |key: &str, label: &str, change: &dyn Fn(&mut Variant)| {
        let mut v = Variant { key: key.into(), label: label.into(), ..base.clone() };
        change(&mut v);
        v
    };
    let mut out = vec![
        base.clone(),
        with("first_only", "only the first picture", &|v| v.choice = ContextChoice::Nothing),
        with("no_context_cfg", "no context CFG (instruction only)", &|v| v.dropped = Dropped::Instruction),
        with("context_cfg_only", "context CFG only (instruction kept)", &|v| v.dropped = Dropped::Context),
        with("vanilla_rope", "vanilla RoPE (0, 1, 2, ..., no gap)", &|v| {
            v.rope = Rope::Consecutive;
            v.gap = 1.0;
        }),
        with("consecutive_rope", "consecutive context indices, gap kept", &|v| v.rope = Rope::Consecutive),
        with("non_contiguous", "non-contiguous context (random)", &|v| {
            v.choice = ContextChoice::Random(trained)
        }),
        with("contiguous", "contiguous context (a random run)", &|v| {
            v.choice = ContextChoice::Contiguous(trained)
        }),
    ];
    if settings.guidance != 1.0 {
        out.insert(2, with("no_cfg", "no CFG", &|v| v.guidance = 1.0));
    }
    for steps in STEPS {
        for guided in [true, false] {
            let key = key_of_steps(steps, guided, settings);
            if out.iter().all(|v| v.key != key) && (guided || settings.guidance != 1.0) {
                out.push(with(&key, "", &|v| {
                    v.steps = steps;
                    if !guided {
                        v.guidance = 1.0;
                    }
                }));
            }
        }
    }
    for w in 1..=7u8 {
        if f32::from(w) != settings.guidance && w != 1 {
            out.push(with(&format!("cfg_{w}"), &format!("CFG {w}"), &|v| v.guidance = f32::from(w)));
        }
    }
    for n in lengths(trained, allowed) {
        out.push(with(&format!("context_{n}"), &format!("{n} context latents, spread"), &|v| {
            v.choice = ContextChoice::Spread(n);
        }));
    }
    for r in 1..REPEATS {
        out.push(with(&format!("repeat_{r}"), &format!("repeat {}", r + 1), &|v| v.repeat = r));
    }
    out
}

/// Context lengths from 1 to twice the trained one, as far as the bundle allows.
fn lengths(trained: usize, allowed: usize) -> Vec<usize> {
    let end = (2 * trained).min(allowed);
    let mut out: Vec<usize> =
        [1, trained / 3, 2 * trained / 3, trained, 4 * trained / 3, 5 * trained / 3, 2 * trained]
            .into_iter()
            .filter(|n| (1..=end).contains(n))
            .collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn key_of_guidance(w: u8, shipped: f32) -> String {
    if f32::from(w) == shipped {
        "base".to_owned()
    } else if w == 1 {
        "no_cfg".to_owned()
    } else {
        format!("cfg_{w}")
    }
}

/// One goal in one house, ready to be sampled in many ways.
struct Case<'a> {
    visit: &'a Visit,
    camera: &'a Camera,
    object: usize,
    /// The true goal pose in the map.
    truth: Option<Pose2>,
    prompt: Prompt<'a>,
    memory: ContextLatents,
    /// As the bundle says, with one candidate and this house's seed.
    settings: RolloutSettings,
    latent_len: usize,
    /// For contexts at random: all positions in a random order, and where a run of neighbours starts (0..1).
    order: Vec<usize>,
    start: f64,
}

const NO_LIMIT: Budget<'static> = Budget { clock: &NoClock, until: None };

impl Case<'_> {
    /// Positions in the memory that a variant sees. `looked` keeps what the runtime picks, which does not depend on the
    /// guidance.
    fn positions(
        &self,
        tools: &mut Tools,
        choice: ContextChoice,
        looked: &mut BTreeMap<usize, Vec<usize>>,
    ) -> anyhow::Result<Vec<usize>> {
        let len = self.visit.memory.len();
        Ok(match choice {
            ContextChoice::Nothing => Vec::new(),
            ContextChoice::Spread(n) => spread(len, n),
            ContextChoice::Random(n) => {
                let mut some = self.order[..n.min(len)].to_vec();
                some.sort_unstable();
                some
            }
            ContextChoice::Contiguous(n) => run_of(len, n, self.start),
            ContextChoice::Runtime(n) => match looked.get(&n) {
                Some(known) => known.clone(),
                None => {
                    let found = choose_context(
                        tools.mind.denoiser(),
                        &self.memory,
                        self.prompt,
                        &self.settings,
                        n,
                        NO_LIMIT,
                        &mut |_| Flow::Continue,
                    )?;
                    looked.insert(n, found.clone());
                    found
                }
            },
        })
    }

    fn sample(
        &self,
        tools: &mut Tools,
        judge: &mut Judge<'_>,
        variant: &Variant,
        positions: &[usize],
    ) -> anyhow::Result<VariantResult> {
        let seen = pick(&self.memory, positions, self.latent_len);
        let settings = RolloutSettings {
            steps: variant.steps,
            guidance: variant.guidance,
            dropped: variant.dropped,
            rope: variant.rope,
            gap: variant.gap,
            seed: self.settings.seed.wrapping_add(variant.repeat << 40),
            ..self.settings.clone()
        };
        let began = Instant::now();
        let denoiser = tools.mind.denoiser();
        let imagined = imagine(denoiser, &seen, self.prompt, &settings, NO_LIMIT, &mut |_| Flow::Continue)?;
        let (passes, all) = (imagined.evaluations - imagined.glances.len(), imagined.evaluations.max(1));
        let ms = began.elapsed().as_secs_f64() * 1e3 * passes as f64 / all as f64;
        let drive = imagined.rollouts.first().context("no drive was sampled")?;
        let frames = tools.mind.decode(&drive.latents)?;
        let verdict = judge.verdict(&frames, &mut tools.eager, None)?;
        let end = drive.heads.pose.last().map(|h| {
            let [x, y, c, s] = h.map(f64::from);
            self.visit.here.compose(Pose2::unwrapped(x, y, s.atan2(c)))
        });
        let off = end.zip(self.truth).map(|(p, t)| pose_error(p, t));
        Ok(VariantResult { verdict, passes, ms, end: off, by_pose: end.is_some_and(|p| self.by_pose(p)) })
    }

    /// See [`VariantResult::by_pose`].
    fn by_pose(&self, end: Pose2) -> bool {
        let size = [self.camera.width as f64, self.camera.height as f64];
        project_box(&self.visit.house, end, self.camera, self.object)
            .is_some_and(|edges| centred(edges.map(f64::from), size))
    }
}

/// Heading (degrees) and place (m) of a pose against the truth.
fn pose_error(pose: Pose2, truth: Pose2) -> [f64; 2] {
    [wrap_angle(pose.yaw - truth.yaw).abs().to_degrees(), pose.distance(truth)]
}

/// `n` neighbours of `len` positions, all of them when there are fewer; `start` (0..1) says which.
fn run_of(len: usize, n: usize, start: f64) -> Vec<usize> {
    let n = n.min(len);
    let from = ((len - n + 1) as f64 * start) as usize;
    (from..from + n).collect()
}

pub(super) fn one_house(
    bench: &Bench,
    tools: &mut Tools,
    examiner: &Examiner,
    variants: &[Variant],
    seed: u64,
) -> anyhow::Result<Line> {
    let camera = &bench.camera;
    let mut v = bench.visit(seed, tools.encoder.as_mut())?;
    let object = v.rng.below(v.house.objects.len());
    let name = v.house.objects[object].name.clone();
    let spec = tools.mind.spec().clone();
    let targets = spec.settings.target_latents;
    let lift = calibration(&spec)?;
    let rules =
        Rules { camera, examiner: Some(examiner), box_latents: spec.box_latents, box_min: spec.box_min };
    let mut judge = Judge::new(rules, &v.house, v.here, object, targets);
    let truth = goal_pose(&v.house, v.here, object);
    let text = tools.mind.encode_text(&format!("find the {name}"))?;
    let null_text = tools.mind.encode_text("")?;
    let mut settings = spec.settings.clone();
    settings.glance_timestep = lift.glance_timestep;
    settings.candidates = 1;
    settings.seed = seed;
    let mut rng = Rng::new(seed ^ 0xab1a);
    let mut order: Vec<usize> = (0..v.memory.len()).collect();
    rng.shuffle(&mut order);
    let case = Case {
        visit: &v,
        camera,
        object,
        truth,
        prompt: Prompt { text: &text, null_text: &null_text, camera: None },
        memory: ContextLatents {
            index: v.memory.iter().map(|c| c.info.index).collect(),
            latents: v.memory.iter().flat_map(|c| c.latent.iter().copied()).collect(),
            first: tools.mind.encode_still(&v.newest)?,
        },
        settings,
        latent_len: spec.latent_len,
        order,
        start: rng.unit(),
    };
    let mut looked = BTreeMap::new();
    let mut results = BTreeMap::new();
    for variant in variants {
        let positions = case.positions(tools, variant.choice, &mut looked)?;
        results.insert(variant.key.clone(), case.sample(tools, &mut judge, variant, &positions)?);
    }
    let frames = tools.coded_drive(&true_drive(&v.house, v.here, object, &rules, targets))?;
    let verdict = judge.verdict(&frames, &mut tools.eager, None)?;
    let end = truth.map(|_| [0.0, 0.0]);
    let by_pose = truth.is_some();
    results.insert("truth".into(), VariantResult { verdict, passes: 0, ms: 0.0, end, by_pose });
    Ok(Line { house: seed, goal: name, results })
}

/// Reads the state; a last line that was cut off is dropped.
fn resume(path: &Path, head: &Head) -> anyhow::Result<Vec<Line>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    };
    let mut lines = text.lines();
    let mut kept = serde_json::to_string(head)? + "\n";
    let mut done = Vec::new();
    if let Some(first) = lines.next() {
        let old: Option<Head> = serde_json::from_str(first).ok();
        if old.as_ref() != Some(head) {
            bail!(
                "{}: was made with another bundle, seed or setting; give another --out or remove it",
                path.display()
            );
        }
        let count = text.lines().count();
        for (k, line) in lines.enumerate() {
            match serde_json::from_str::<Line>(line) {
                Ok(value) => {
                    kept += line;
                    kept.push('\n');
                    done.push(value);
                }
                Err(_) if k + 2 == count => {}
                Err(e) => bail!("{}: line {}: {e}", path.display(), k + 2),
            }
        }
    }
    write_atomically(path, kept.as_bytes())?;
    Ok(done)
}

/// The figures of one variant.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    passes: Figure,
    ms: Figure,
    #[serde(flatten)]
    scores: Scores,
    by_pose: Figure,
    heading_deg_median: Figure,
    position_m_median: Figure,
}

pub(super) fn summary(lines: &[Line], key: &str) -> Summary {
    let all: Vec<VariantResult> = lines.iter().filter_map(|l| l.results.get(key).copied()).collect();
    let verdicts: Vec<Verdict> = all.iter().map(|r| r.verdict).collect();
    Summary {
        passes: median(all.iter().map(|r| r.passes as f64)),
        ms: median(all.iter().map(|r| r.ms)),
        scores: Scores::of(&verdicts),
        by_pose: share(all.iter().map(|r| r.by_pose)),
        heading_deg_median: median(all.iter().filter_map(|r| r.end).map(|e| e[0])),
        position_m_median: median(all.iter().filter_map(|r| r.end).map(|e| e[1])),
    }
}

/// Share of houses where any of the first `n` repeats passes.
fn any_of(lines: &[Line], n: u64, pass: impl Fn(&Verdict) -> bool) -> Figure {
    let key = |r: u64| if r == 0 { "base".to_owned() } else { format!("repeat_{r}") };
    share(lines.iter().map(|l| (0..n).filter_map(|r| l.results.get(&key(r))).any(|r| pass(&r.verdict))))
}

/// Runs `eval ablation`.
///
/// # Errors
/// A bundle or a file that cannot be used; a state of another run.
pub fn run(args: &AblationArgs) -> anyhow::Result<ExitCode> {
    let common = &args.common;
    if args.minutes.is_some_and(|m| !(m.is_finite() && m > 0.0)) {
        bail!("--minutes must be a positive number");
    }
    let bench = Bench::new(common)?;
    bench.knows_things()?;
    let spec = bench.pipeline.spec().clone();
    let limits = &bench.pipeline.bundle().manifest().limits;
    let (trained, allowed) = (spec.context_max, limits.context_allowed);
    let all = variants(&spec.settings, trained, allowed);
    let head = Head {
        bundle: bench.pipeline.bundle().hash().to_owned(),
        seed: common.seed,
        difficulty: common.difficulty.clone(),
        steps: spec.settings.steps,
        examiner_houses: common.examiner_houses,
        variants: all.iter().map(|v| format!("{} {:?}", v.key, v.choice)).collect(),
    };
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let path = args.out.join("ablation.jsonl");
    let mut lines = resume(&path, &head)?;
    lines.retain(|l| (common.seed..common.seed.saturating_add(common.houses as u64)).contains(&l.house));
    let before = lines.len();
    let began = Instant::now();
    if before < common.houses {
        let examiner = bench.examiner(common)?;
        let file =
            fs::OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        let file = Mutex::new(file);
        let limit = args.minutes.map(|m| Duration::from_secs_f64(60.0 * m));
        let new = bench.each(common, |tools, seed| {
            if lines.iter().any(|l| l.house == seed) || limit.is_some_and(|l| began.elapsed() >= l) {
                return Ok(None);
            }
            let line = one_house(&bench, tools, &examiner, &all, seed)?;
            let text = serde_json::to_string(&line)? + "\n";
            let mut file = file.lock().map_err(|_| anyhow::anyhow!("another worker panicked"))?;
            file.write_all(text.as_bytes()).with_context(|| path.display().to_string())?;
            eprintln!("house {seed} done, {:.0} s", began.elapsed().as_secs_f64());
            Ok(Some(line))
        })?;
        lines.extend(new.into_iter().flatten());
    }
    lines.sort_by_key(|l| l.house);
    if lines.is_empty() {
        bail!("no house was finished in --minutes {}; give more", args.minutes.unwrap_or_default());
    }
    Report::of(args, &bench, &lines, &all, began.elapsed().as_secs_f64(), before).write()?;
    Ok(ExitCode::SUCCESS)
}

/// A table of variants, or of bundles.
pub(super) fn table(first: &str, rows: &[(String, Option<Summary>)]) -> String {
    let mut t = Table::new(&[
        first,
        "SD (m)",
        "IF",
        "IF(SD<0.2)",
        "IF(SD<0.1)",
        "in place",
        "named",
        "boxed",
        "by pose",
        "PSNR (dB)",
        "heading (deg)",
        "position (m)",
        "passes",
        "ms",
    ]);
    for (label, s) in rows {
        let cells = match s {
            Some(s) => vec![
                label.clone(),
                s.scores.sd_m.text(3),
                s.scores.instruction_followed.text(2),
                s.scores.followed_sd_0_2.text(2),
                s.scores.followed_sd_0_1.text(2),
                s.scores.in_place.text(2),
                s.scores.named.text(2),
                s.scores.box_centred.text(2),
                s.by_pose.text(2),
                s.scores.psnr_db.text(1),
                s.heading_deg_median.text(1),
                s.position_m_median.text(2),
                format!("{:.0}", s.passes.value),
                format!("{:.0}", s.ms.value),
            ],
            None => vec![label.clone(), NOT_HERE.to_owned()],
        };
        t.row(cells);
    }
    t.text()
}

const NOT_HERE: &str = "needs other weights: not measured";

/// All figures of a run, and what they were measured on.
struct Report<'a> {
    /// Bundle, difficulty and number of houses at a time.
    bundle: &'a str,
    args: &'a AblationArgs,
    houses: usize,
    seconds: f64,
    resumed: usize,
    /// As the bundle ships.
    shipped: &'a RolloutSettings,
    trained: usize,
    lengths: Vec<usize>,
    labels: BTreeMap<String, String>,
    /// By key of the variant, the true drive included.
    figures: BTreeMap<String, Summary>,
    /// IF, IF(SD < 0.2), IF(SD < 0.1) and in place when any of so many repeats may pass.
    repeats: Vec<(u64, [Figure; 4])>,
}

impl<'a> Report<'a> {
    fn of(
        args: &'a AblationArgs,
        bench: &'a Bench,
        lines: &[Line],
        all: &[Variant],
        seconds: f64,
        resumed: usize,
    ) -> Self {
        let spec = bench.pipeline.spec();
        let manifest = bench.pipeline.bundle().manifest();
        let keys = all.iter().map(|v| v.key.as_str()).chain(["truth"]);
        let repeat = |n: u64| {
            let passes: [fn(&Verdict) -> bool; 4] =
                [|v| v.followed, |v| v.followed_within(0.2), |v| v.followed_within(0.1), |v| v.in_place];
            (n, passes.map(|pass| any_of(lines, n, pass)))
        };
        Self {
            bundle: bench.pipeline.bundle().hash(),
            args,
            houses: lines.len(),
            seconds,
            resumed,
            shipped: &spec.settings,
            trained: spec.context_max,
            lengths: lengths(spec.context_max, manifest.limits.context_allowed),
            labels: all.iter().map(|v| (v.key.clone(), v.label.clone())).collect(),
            figures: keys.map(|key| (key.to_owned(), summary(lines, key))).collect(),
            repeats: (1..=REPEATS).map(repeat).collect(),
        }
    }

    fn figures(&self, key: &str) -> Option<Summary> {
        self.figures.get(key).cloned()
    }

    /// A row under the variant's own label.
    fn row(&self, key: &str) -> (String, Option<Summary>) {
        (self.labels.get(key).map_or(key, String::as_str).to_owned(), self.figures(key))
    }

    fn guided(&self) -> Vec<(u8, Summary)> {
        (1..=7).filter_map(|w| Some((w, self.figures(&key_of_guidance(w, self.shipped.guidance))?))).collect()
    }

    /// By number of context latents, 0 for the first picture alone.
    fn by_length(&self) -> Vec<(usize, Option<Summary>)> {
        let more = self.lengths.iter().map(|n| (*n, self.figures(&format!("context_{n}"))));
        std::iter::once((0, self.figures("first_only"))).chain(more).collect()
    }

    fn markdown(&self) -> String {
        let common = &self.args.common;
        let guidance = self.shipped.guidance;
        let mut text = format!(
            "Ablations: {} houses ({}) from seed {}, bundle {}, {:.0} s ({} houses from an earlier run). The weights are \
             the same in all rows; only sampling differs. 95 % intervals in brackets; passes through the network and milliseconds (median, with {} \
             houses at a time) are those of one drive.\n\n",
            self.houses, common.difficulty, common.seed, self.bundle, self.seconds, self.resumed, common.jobs
        );
        let table = |rows: &[(String, Option<Summary>)]| table("variant", rows);
        text += "Table 1 of the paper:\n\n";
        text += &table(&self.recipe());
        text += "\nTable 3 (the paper trains with each; here one model, trained non-contiguously, is given each):\n\n";
        text += &table(&[self.row("non_contiguous"), self.row("contiguous")]);
        text += &format!(
            "\nFigure 8a, context latents ({} in training; 0 is the first picture alone):\n\n",
            self.trained
        );
        let rows: Vec<_> = self.by_length().into_iter().map(|(n, s)| (n.to_string(), s)).collect();
        text += &table(&rows);
        text += "\nFigure 8b (training with other context lengths): needs other weights: not measured.\n";
        text += "\nFigure 13, repeats (a case passes when any repeat does):\n\n";
        let mut t = Table::new(&["repeats", "IF", "IF(SD<0.2)", "IF(SD<0.1)", "in place"]);
        for (n, f) in &self.repeats {
            t.row(std::iter::once(n.to_string()).chain(f.iter().map(|f| f.text(2))));
        }
        text += &t.text();
        text += &format!("\nFigure 14, CFG weight ({guidance} as shipped; 1 is none):\n\n");
        let rows: Vec<_> = self.guided().into_iter().map(|(w, s)| (w.to_string(), Some(s))).collect();
        text += &table(&rows);
        text += "\nDenoising steps, with guidance as shipped and without:\n\n";
        text += &table(&self.by_steps());
        text
    }

    /// The rows of the paper's Table 1.
    fn recipe(&self) -> Vec<(String, Option<Summary>)> {
        let plain = key_of_guidance(1, self.shipped.guidance);
        vec![
            ("the true drive through the codec".to_owned(), self.figures("truth")),
            self.row("base"),
            ("no pretraining".to_owned(), None),
            self.row("first_only"),
            ("no CFG".to_owned(), self.figures(&plain)),
            self.row("no_context_cfg"),
            self.row("context_cfg_only"),
            (
                "no auxiliary box (column \"by pose\" needs none, but these weights learned with it)"
                    .to_owned(),
                None,
            ),
            self.row("vanilla_rope"),
            self.row("consecutive_rope"),
        ]
    }

    fn by_steps(&self) -> Vec<(String, Option<Summary>)> {
        let shipped = self.shipped.guidance;
        let mut rows = Vec::new();
        for n in STEPS {
            for guided in [true, false] {
                if guided || shipped != 1.0 {
                    let how = if guided { format!("CFG {shipped}") } else { "no CFG".to_owned() };
                    let label = format!("{n} step{}, {how}", if n == 1 { "" } else { "s" });
                    rows.push((label, self.figures(&key_of_steps(n, guided, self.shipped))));
                }
            }
        }
        rows
    }

    fn charts(&self) -> [Chart; 4] {
        // The same colours in all charts.
        let by_repeat = [("IF", 0), ("IF(SD<0.2)", 1), ("in place", 3), ("IF(SD<0.1)", 2)]
            .into_iter()
            .map(|(name, k)| Series {
                name: name.to_owned(),
                points: self.repeats.iter().map(|(n, f)| (*n as f64, f[k])).collect(),
            })
            .collect();
        let plain = key_of_guidance(1, self.shipped.guidance);
        let bars = ["base", "first_only", plain.as_str(), "no_context_cfg", "vanilla_rope", "contiguous"];
        let by_variant: Vec<(f64, Summary)> =
            bars.iter().enumerate().filter_map(|(i, key)| Some((i as f64, self.figures(key)?))).collect();
        let by_length: Vec<(f64, Summary)> =
            self.by_length().into_iter().filter_map(|(n, s)| Some((n as f64, s?))).collect();
        let by_guidance: Vec<(f64, Summary)> =
            self.guided().into_iter().map(|(w, s)| (f64::from(w), s)).collect();
        [
            Chart {
                title: "Recipe (Tables 1 and 3)".into(),
                axis: String::new(),
                names: ["shipped", "1st only", "no CFG", "no ctx CFG", "vanilla", "contig."]
                    .map(String::from)
                    .to_vec(),
                series: curves(&by_variant),
            },
            Chart {
                title: "Context latents (Figure 8a)".into(),
                axis: format!("context latents, {} in training", self.trained),
                names: Vec::new(),
                series: curves(&by_length),
            },
            Chart {
                title: "Repeats (Figure 13)".into(),
                axis: "repeats, any of which may pass".into(),
                names: Vec::new(),
                series: by_repeat,
            },
            Chart {
                title: "Guidance (Figure 14)".into(),
                axis: format!("CFG weight, {} as shipped", self.shipped.guidance),
                names: Vec::new(),
                series: curves(&by_guidance),
            },
        ]
    }

    fn document(&self) -> serde_json::Value {
        let common = &self.args.common;
        let repeat = |(n, f): &(u64, [Figure; 4])| {
            serde_json::json!({
                "repeats": n, "instruction_followed": f[0], "followed_sd_0_2": f[1], "followed_sd_0_1": f[2],
                "in_place": f[3],
            })
        };
        serde_json::json!({
            "bundle": self.bundle,
            "houses": self.houses,
            "houses_asked": common.houses,
            "seed": common.seed,
            "difficulty": common.difficulty,
            "guidance": self.shipped.guidance,
            "context_trained": self.trained,
            "variants": self.figures,
            "repeats": self.repeats.iter().map(repeat).collect::<Vec<_>>(),
            "not_measured": ["no pretraining", "no auxiliary box", "context length in training"],
            "seconds": self.seconds,
            "resumed_houses": self.resumed,
        })
    }

    /// Writes `ablation.json`, `.md` and `.png`, and prints one of the first two.
    fn write(&self) -> anyhow::Result<()> {
        let (out, common) = (&self.args.out, &self.args.common);
        let (text, document) = (self.markdown(), self.document());
        draw(&self.charts(), &out.join("ablation.png"))?;
        write_atomically(&out.join("ablation.json"), serde_json::to_string_pretty(&document)?.as_bytes())?;
        write_atomically(&out.join("ablation.md"), text.as_bytes())?;
        if let Some(path) = &common.markdown {
            write_atomically(path, text.as_bytes())?;
        }
        if common.json {
            println!("{document}");
        } else {
            print!("{text}");
            println!("\nwrote {0}/ablation.json, {0}/ablation.md, {0}/ablation.png", out.display());
        }
        Ok(())
    }
}

/// The figures that are drawn, over what is varied.
fn curves(points: &[(f64, Summary)]) -> Vec<Series> {
    type Get = fn(&Summary) -> Figure;
    let shown: [(&str, Get); 4] = [
        ("IF", |s| s.scores.instruction_followed),
        ("IF(SD<0.2)", |s| s.scores.followed_sd_0_2),
        ("in place", |s| s.scores.in_place),
        ("SD (m)", |s| s.scores.sd_m),
    ];
    shown
        .iter()
        .map(|(name, get)| Series {
            name: (*name).to_owned(),
            points: points.iter().map(|(x, s)| (*x, get(s))).collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_reach_twice_the_trained_one_where_allowed() {
        assert_eq!(lengths(6, 12), [1, 2, 4, 6, 8, 10, 12]);
        assert_eq!(lengths(6, 9), [1, 2, 4, 6, 8]);
        assert_eq!(lengths(1, 2), [1, 2]);
    }

    #[test]
    fn runs_of_neighbours_stay_inside() {
        assert_eq!(run_of(10, 3, 0.0), [0, 1, 2]);
        assert_eq!(run_of(10, 3, 0.999), [7, 8, 9]);
        assert_eq!(run_of(10, 3, 0.5), [4, 5, 6]);
        assert_eq!(run_of(2, 6, 0.7), [0, 1]);
        assert_eq!(run_of(0, 6, 0.7), [0usize; 0]);
    }

    fn result(followed: bool, sd: f64, end: Option<[f64; 2]>) -> VariantResult {
        let verdict = Verdict { followed, in_place: followed, sd: Some(sd), ..Verdict::default() };
        VariantResult { verdict, passes: 12, ms: 40.0, end, by_pose: followed }
    }

    #[test]
    fn any_of_more_repeats_may_pass_and_a_variant_is_summed_up() {
        let line = |house: u64, repeats: [(bool, f64); 3]| Line {
            house,
            goal: String::new(),
            results: ["base", "repeat_1", "repeat_2"]
                .into_iter()
                .zip(repeats)
                .map(|(key, (followed, sd))| (key.to_owned(), result(followed, sd, Some([10.0 * sd, sd]))))
                .collect(),
        };
        let lines = [
            line(1, [(true, 0.3), (false, 0.1), (true, 0.15)]),
            line(2, [(false, 0.1), (true, 0.3), (false, 0.1)]),
            line(3, [(false, 0.1), (false, 0.1), (false, 0.5)]),
        ];
        let followed = |n| any_of(&lines, n, |v| v.followed).value;
        assert_eq!([followed(1), followed(2), followed(3)].map(|v| (3.0 * v).round()), [1.0, 2.0, 2.0]);
        // One repeat has to pass both.
        let joint = |n| any_of(&lines, n, |v| v.followed_within(0.2)).value;
        assert_eq!([joint(1), joint(2), joint(3)].map(|v| (3.0 * v).round()), [0.0, 0.0, 1.0]);
        let s = summary(&lines, "base");
        assert!((s.scores.sd_m.value - 0.5 / 3.0).abs() < 1e-12 && s.passes.value == 12.0);
        assert_eq!((s.heading_deg_median.value, s.position_m_median.value), (1.0, 0.1));
        assert!((s.by_pose.value - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(summary(&lines, "absent").passes.n, 0);
    }

    #[test]
    fn a_state_is_resumed_only_by_its_own_run() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("ablation.jsonl");
        let head = Head {
            bundle: "b".into(),
            seed: 1,
            difficulty: "plain".into(),
            steps: 2,
            examiner_houses: 3,
            variants: vec!["base".into()],
        };
        assert!(resume(&path, &head)?.is_empty());
        let line = Line { house: 1, goal: "red box".into(), results: BTreeMap::new() };
        let whole = serde_json::to_string(&line)?;
        let text = fs::read_to_string(&path)? + &whole + "\n" + &whole[..whole.len() / 2];
        fs::write(&path, text)?;
        assert_eq!(resume(&path, &head)?.len(), 1, "the line that was cut off is dropped");
        let other = Head { seed: 2, ..head.clone() };
        let error = resume(&path, &other).expect_err("another run");
        assert!(error.to_string().contains("another --out"), "{error}");
        assert_eq!(resume(&path, &head)?.len(), 1, "and left as it was");
        fs::write(&path, serde_json::to_string(&head)? + "\nnonsense\n" + &whole + "\n")?;
        let error = resume(&path, &head).expect_err("a broken line");
        assert!(error.to_string().contains("line 2"), "{error}");
        Ok(())
    }
}
