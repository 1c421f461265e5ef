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
use mindseye::imagine::{
    Budget, Dropped, Flow, NoClock, Prompt, Rope, ContextLatents, RolloutSettings, choose_context, imagine, pick,
};
use mindseye_world::{Pose2, Rng, goal_pose, project_box, wrap_angle};
use serde::{Deserialize, Serialize};

use super::examiner::Examiner;
use super::judge::{CENTRE, Judge, Rules, Scores, Verdict, true_drive};
use super::plot::{Chart, Series, draw};
use super::report::{Table, write_atomically};
use super::stats::{Figure, median, share};
use super::visit::{Bench, CommonArgs, Tools, calibration, visit};

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
pub(super) enum Choice {
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
    choice: Choice,
    guidance: f32,
    dropped: Dropped,
    rope: Rope,
    gap: f64,
    repeat: u64,
}

/// What one variant came to in one house.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Result {
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
    results: BTreeMap<String, Result>,
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
            choice: Choice::Runtime(trained),
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
        with("first_only", "only the first picture", &|v| v.choice = Choice::Nothing),
        with("no_context_cfg", "no context CFG (instruction only)", &|v| v.dropped = Dropped::Instruction),
        with("context_cfg_only", "context CFG only (instruction kept)", &|v| v.dropped = Dropped::Context),
        with("vanilla_rope", "vanilla RoPE (0, 1, 2, ..., no gap)", &|v| {
            v.rope = Rope::Consecutive;
            v.gap = 1.0;
        }),
        with("consecutive_rope", "consecutive context indices, gap kept", &|v| v.rope = Rope::Consecutive),
        with("non_contiguous", "non-contiguous context (random)", &|v| v.choice = Choice::Random(trained)),
        with("contiguous", "contiguous context (a random run)", &|v| v.choice = Choice::Contiguous(trained)),
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
            v.choice = Choice::Spread(n);
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

pub(super) fn one_house(
    bench: &Bench,
    tools: &mut Tools,
    examiner: &Examiner,
    variants: &[Variant],
    seed: u64,
) -> anyhow::Result<Line> {
    let camera = &bench.camera;
    let mut v = visit(seed, &bench.difficulty, camera, tools.encoder.as_mut(), bench.images)?;
    let object = v.rng.below(v.house.objects.len());
    let name = v.house.objects[object].name.clone();
    let spec = tools.mind.spec().clone();
    let targets = spec.settings.target_latents;
    let rules = Rules {
        camera,
        examiner: Some(examiner),
        box_latents: spec.box_latents,
        box_min: spec.box_min,
    };
    let mut judge = Judge::new(rules, &v.house, v.here, object, targets);
    let truth = goal_pose(&v.house, v.here, object);
    let text = tools.mind.encode_text(&format!("find the {name}"))?;
    let null_text = tools.mind.encode_text("")?;
    let prompt = Prompt { text: &text, null_text: &null_text, camera: None };
    let memory = ContextLatents {
        index: v.memory.iter().map(|c| c.info.index).collect(),
        latents: v.memory.iter().flat_map(|c| c.latent.iter().copied()).collect(),
        first: tools.mind.encode_still(&v.newest)?,
    };
    let len = v.memory.len();
    let budget = Budget { clock: &NoClock, until: None };
    let mut base = spec.settings.clone();
    base.glance_timestep = calibration(&spec)?.glance_timestep;
    base.candidates = 1;
    base.seed = seed;
    // The runtime looks through the memory once; what it picks does not depend on the guidance.
    let mut looked: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut rng = Rng::new(seed ^ 0xab1a);
    let mut order: Vec<usize> = (0..len).collect();
    rng.shuffle(&mut order);
    let start = rng.unit();
    let mut results = BTreeMap::new();
    for variant in variants {
        let positions = match variant.choice {
            Choice::Nothing => Vec::new(),
            Choice::Spread(n) => spread(len, n),
            Choice::Random(n) => {
                let mut some = order[..n.min(len)].to_vec();
                some.sort_unstable();
                some
            }
            Choice::Contiguous(n) => {
                let n = n.min(len);
                let from = ((len - n + 1) as f64 * start) as usize;
                (from..from + n).collect()
            }
            Choice::Runtime(n) => match looked.get(&n) {
                Some(known) => known.clone(),
                None => {
                    let found = choose_context(
                        tools.mind.denoiser(),
                        &memory,
                        prompt,
                        &base,
                        n,
                        budget,
                        &mut |_| Flow::Continue,
                    )?;
                    looked.insert(n, found.clone());
                    found
                }
            },
        };
        let seen = pick(&memory, &positions, spec.latent_len);
        let settings = RolloutSettings {
            steps: variant.steps,
            guidance: variant.guidance,
            dropped: variant.dropped,
            rope: variant.rope,
            gap: variant.gap,
            seed: seed.wrapping_add(variant.repeat << 40),
            ..base.clone()
        };
        let began = Instant::now();
        let imagined =
            imagine(tools.mind.denoiser(), &seen, prompt, &settings, budget, &mut |_| Flow::Continue)?;
        let (passes, all) = (imagined.evaluations - imagined.glances.len(), imagined.evaluations.max(1));
        let ms = began.elapsed().as_secs_f64() * 1e3 * passes as f64 / all as f64;
        let drive = imagined.rollouts.first().context("no drive was sampled")?;
        let frames = tools.mind.decode(&drive.latents)?;
        let verdict = judge.verdict(&frames, &mut tools.eager, None)?;
        let end = drive.heads.pose.last().map(|h| {
            let [x, y, c, s] = h.map(f64::from);
            v.here.compose(Pose2::unwrapped(x, y, s.atan2(c)))
        });
        let by_pose = end.is_some_and(|p| {
            project_box(&v.house, p, camera, object).is_some_and(|[x0, y0, x1, y1]| {
                let (w, h) = (camera.width as f32, camera.height as f32);
                let near = |lo: f32, hi: f32, size: f32| ((lo + hi) / size - 1.0).abs() <= CENTRE as f32;
                near(x0, x1, w) && near(y0, y1, h)
            })
        });
        let off = end.zip(truth).map(|(p, t)| [wrap_angle(p.yaw - t.yaw).abs().to_degrees(), p.distance(t)]);
        results.insert(variant.key.clone(), Result { verdict, passes, ms, end: off, by_pose });
    }
    let frames = tools.coded_drive(&true_drive(&v.house, v.here, object, &rules, targets))?;
    let verdict = judge.verdict(&frames, &mut tools.eager, None)?;
    let end = truth.map(|_| [0.0, 0.0]);
    results.insert("truth".into(), Result { verdict, passes: 0, ms: 0.0, end, by_pose: truth.is_some() });
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
    let all: Vec<Result> = lines.iter().filter_map(|l| l.results.get(key).copied()).collect();
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
    report(args, &bench, &lines, &all, began.elapsed().as_secs_f64(), before)
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

fn report(
    args: &AblationArgs,
    bench: &Bench,
    lines: &[Line],
    all: &[Variant],
    seconds: f64,
    resumed: usize,
) -> anyhow::Result<ExitCode> {
    let spec = bench.pipeline.spec();
    let (shipped, trained) = (spec.settings.guidance, spec.context_max);
    let of = |key: &str| summary(lines, key);
    let label = |key: &str| all.iter().find(|v| v.key == key).map_or(key, |v| v.label.as_str()).to_owned();
    let row = |key: &str| (label(key), Some(of(key)));
    let mut text = format!(
        "Ablations: {} houses ({}) from seed {}, bundle {}, {:.0} s ({resumed} houses from an earlier run). The weights are \
         the same in all rows; only sampling differs. 95 % intervals in brackets; passes through the network and milliseconds (median, with {} \
         houses at a time) are those of one drive.\n\n",
        lines.len(),
        args.common.difficulty,
        args.common.seed,
        bench.pipeline.bundle().hash(),
        seconds,
        args.common.jobs
    );
    text += "Table 1 of the paper:\n\n";
    let table = |rows: &[(String, Option<Summary>)]| table("variant", rows);
    text += &table(&[
        ("the true drive through the codec".to_owned(), Some(of("truth"))),
        row("base"),
        ("no pretraining".to_owned(), None),
        row("first_only"),
        ("no CFG".to_owned(), Some(of(&key_of_guidance(1, shipped)))),
        row("no_context_cfg"),
        row("context_cfg_only"),
        (
            "no auxiliary box (column \"by pose\" needs none, but these weights learned with it)".to_owned(),
            None,
        ),
        row("vanilla_rope"),
        row("consecutive_rope"),
    ]);
    text += "\nTable 3 (the paper trains with each; here one model, trained non-contiguously, is given each):\n\n";
    text += &table(&[row("non_contiguous"), row("contiguous")]);
    text +=
        &format!("\nFigure 8a, context latents ({trained} in training; 0 is the first picture alone):\n\n");
    let lengths = lengths(trained, bench.pipeline.bundle().manifest().limits.context_allowed);
    let mut rows = vec![("0".to_owned(), Some(of("first_only")))];
    rows.extend(lengths.iter().map(|n| (n.to_string(), Some(of(&format!("context_{n}"))))));
    text += &table(&rows);
    text += "\nFigure 8b (training with other context lengths): needs other weights: not measured.\n";
    text += "\nFigure 13, repeats (a case passes when any repeat does):\n\n";
    let mut t = Table::new(&["repeats", "IF", "IF(SD<0.2)", "IF(SD<0.1)", "in place"]);
    let repeats: Vec<(u64, [Figure; 4])> = (1..=REPEATS)
        .map(|n| {
            let f = [
                any_of(lines, n, |v| v.followed),
                any_of(lines, n, |v| v.followed_within(0.2)),
                any_of(lines, n, |v| v.followed_within(0.1)),
                any_of(lines, n, |v| v.in_place),
            ];
            (n, f)
        })
        .collect();
    for (n, f) in &repeats {
        let mut cells = vec![n.to_string()];
        cells.extend(f.iter().map(|f| f.text(2)));
        t.row(cells);
    }
    text += &t.text();
    text += &format!("\nFigure 14, CFG weight ({shipped} as shipped; 1 is none):\n\n");
    let guided: Vec<(u8, Summary)> = (1..=7).map(|w| (w, of(&key_of_guidance(w, shipped)))).collect();
    text += &table(&guided.iter().map(|(w, s)| (w.to_string(), Some(s.clone()))).collect::<Vec<_>>());

    text += "\nDenoising steps, with guidance as shipped and without:\n\n";
    let mut steps = Vec::new();
    for n in STEPS {
        for guided in [true, false] {
            if guided || shipped != 1.0 {
                let how = if guided { format!("CFG {shipped}") } else { "no CFG".to_owned() };
                let label = format!("{n} step{}, {how}", if n == 1 { "" } else { "s" });
                steps.push((label, Some(of(&key_of_steps(n, guided, &spec.settings)))));
            }
        }
    }
    text += &table(&steps);

    // The picture.
    let curve = |name: &str, points: Vec<(f64, Figure)>| Series { name: name.to_owned(), points };
    type Get = fn(&Summary) -> Figure;
    let shown: [(&str, Get); 4] = [
        ("IF", |s| s.scores.instruction_followed),
        ("IF(SD<0.2)", |s| s.scores.followed_sd_0_2),
        ("in place", |s| s.scores.in_place),
        ("SD (m)", |s| s.scores.sd_m),
    ];
    let lines_of = |points: &[(f64, Summary)]| -> Vec<Series> {
        shown
            .iter()
            .map(|(name, get)| curve(name, points.iter().map(|(x, s)| (*x, get(s))).collect()))
            .collect()
    };
    let by_length: Vec<(f64, Summary)> = rows
        .iter()
        .zip(std::iter::once(&0).chain(&lengths))
        .filter_map(|((_, s), n)| Some((*n as f64, s.clone()?)))
        .collect();
    let by_guidance: Vec<(f64, Summary)> = guided.iter().map(|(w, s)| (f64::from(*w), s.clone())).collect();
    // The same colours as in the other charts.
    let by_repeat = [("IF", 0), ("IF(SD<0.2)", 1), ("in place", 3), ("IF(SD<0.1)", 2)]
        .into_iter()
        .map(|(name, k)| curve(name, repeats.iter().map(|(n, f)| (*n as f64, f[k])).collect()))
        .collect();
    let plain = key_of_guidance(1, shipped);
    let bars = ["base", "first_only", plain.as_str(), "no_context_cfg", "vanilla_rope", "contiguous"];
    let by_variant: Vec<(f64, Summary)> =
        bars.iter().enumerate().map(|(i, key)| (i as f64, of(key))).collect();
    let charts = [
        Chart {
            title: "Recipe (Tables 1 and 3)".into(),
            axis: String::new(),
            names: ["shipped", "1st only", "no CFG", "no ctx CFG", "vanilla", "contig."]
                .map(String::from)
                .to_vec(),
            series: lines_of(&by_variant),
        },
        Chart {
            title: "Context latents (Figure 8a)".into(),
            axis: format!("context latents, {trained} in training"),
            names: Vec::new(),
            series: lines_of(&by_length),
        },
        Chart {
            title: "Repeats (Figure 13)".into(),
            axis: "repeats, any of which may pass".into(),
            names: Vec::new(),
            series: by_repeat,
        },
        Chart {
            title: "Guidance (Figure 14)".into(),
            axis: format!("CFG weight, {shipped} as shipped"),
            names: Vec::new(),
            series: lines_of(&by_guidance),
        },
    ];
    draw(&charts, &args.out.join("ablation.png"))?;
    let keys: BTreeMap<&str, Summary> =
        all.iter().map(|v| v.key.as_str()).chain(["truth"]).map(|k| (k, of(k))).collect();
    let document = serde_json::json!({
        "bundle": bench.pipeline.bundle().hash(),
        "houses": lines.len(),
        "houses_asked": args.common.houses,
        "seed": args.common.seed,
        "difficulty": args.common.difficulty,
        "guidance": shipped,
        "context_trained": trained,
        "variants": keys,
        "repeats": repeats.iter().map(|(n, f)| serde_json::json!({
            "repeats": n, "instruction_followed": f[0], "followed_sd_0_2": f[1], "followed_sd_0_1": f[2],
            "in_place": f[3],
        })).collect::<Vec<_>>(),
        "not_measured": ["no pretraining", "no auxiliary box", "context length in training"],
        "seconds": seconds,
        "resumed_houses": resumed,
    });
    write_atomically(&args.out.join("ablation.json"), serde_json::to_string_pretty(&document)?.as_bytes())?;
    write_atomically(&args.out.join("ablation.md"), text.as_bytes())?;
    if let Some(path) = &args.common.markdown {
        write_atomically(path, text.as_bytes())?;
    }
    if args.common.json {
        println!("{document}");
    } else {
        print!("{text}");
        println!("\nwrote {0}/ablation.json, {0}/ablation.md, {0}/ablation.png", args.out.display());
    }
    Ok(ExitCode::SUCCESS)
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
