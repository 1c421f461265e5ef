//! Cases that need no network: schedules, camera rays, tables, tokenizer.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use mindseye_engines::{
    denoise::sinusoid,
    model::dit::{DitConfig, Prediction},
    plucker::{Intrinsics, Pose, features, pose, rays, relative},
    sampler::{Grid, Sampler, Schedule, Solver, training_table},
    text::{Tokenizer, clean},
};
use serde::Deserialize;

use super::{Case, Report, Vectors};

const SCHEDULE_TOLERANCE: f64 = 2e-5;
const PLUCKER_TOLERANCE: f64 = 1e-5;
const ROPE_TOLERANCE: f64 = 1e-5;
/// The reference computes the angles in f32: up to 4e-5 at t = 1000.
const SINUSOID_TOLERANCE: f64 = 1e-4;

/// `n50_shift5` as steps and shift.
fn steps_and_shift(key: &str) -> anyhow::Result<(usize, f64)> {
    let parsed = key.strip_prefix('n').and_then(|rest| rest.split_once("_shift"));
    let (n, shift) = parsed.with_context(|| format!("{key} is not of the form n50_shift5"))?;
    Ok((n.parse()?, shift.parse()?))
}

/// Velocity of normal data `N(0.4, 0.7^2)` plus a small nonlinear term: the field of the reference trajectories.
fn field(x: f32, s: f32) -> f32 {
    let (m, q, s, x) = (0.4, 0.7, f64::from(s), f64::from(x));
    let den = (1.0 - s).powi(2) * q * q + s * s;
    let r = x - (1.0 - s) * m;
    (s / den * r - (m + q * q * (1.0 - s) / den * r) + 0.05 * (2.0 * x + 3.0 * s).sin()) as f32
}

pub(super) fn schedules(dir: &Path, report: &mut Report) {
    let dir = dir.join("sched");
    let path = dir.join("tables.safetensors");
    if path.exists() {
        report.case("host", Case::new("sched/tables", SCHEDULE_TOLERANCE), |case| tables(&path, case));
    }
    let path = dir.join("trajectories.safetensors");
    if path.exists() {
        report.case("host", Case::new("sched/trajectories", SCHEDULE_TOLERANCE), |case| {
            trajectories(&path, case)
        });
    }
    let path = dir.join("training.safetensors");
    if path.exists() {
        report.case("host", Case::new("sched/training", SCHEDULE_TOLERANCE), |case| {
            let v = Vectors::open(&path)?;
            for name in v.names().filter(|name| name.ends_with(".sigma")) {
                let key = name.trim_end_matches(".sigma");
                let shift: f64 = key.strip_prefix("shift").context("expected shift5.sigma")?.parse()?;
                let (sigma, weight) = training_table(shift)?;
                case.compare(name, &sigma, &v.f32(name)?)?;
                let name = format!("{key}.weight");
                case.compare(&name, &weight, &v.f32(&name)?)?;
            }
            Ok(())
        });
    }
}

fn tables(path: &Path, case: &mut Case) -> anyhow::Result<()> {
    let v = Vectors::open(path)?;
    for name in v.names().filter(|name| name.ends_with(".sigmas")) {
        let key = name.trim_end_matches(".sigmas");
        let (grid, key) =
            key.split_once('.').with_context(|| format!("{name}: expected grid.n50_shift5.sigmas"))?;
        let Some(grid) = Grid::ALL.into_iter().find(|g| g.name() == grid) else {
            bail!("{name}: unknown grid")
        };
        let (steps, shift) = steps_and_shift(key)?;
        let schedule = Schedule::new(grid, steps, shift)?;
        case.compare(name, &schedule.sigmas, &v.f32(name)?)?;
        let name = format!("{}.{key}.timesteps", grid.name());
        match v.f32(&name) {
            // Real timesteps are compared on the scale of sigmas: one f32 step at 1000 is more than the tolerance.
            Ok(t) => {
                let scaled = |t: &[f32]| t.iter().map(|t| t / 1000.0).collect::<Vec<f32>>();
                case.compare(&name, &scaled(&schedule.timesteps), &scaled(&t))?;
            }
            Err(_) => {
                let wanted: Vec<f32> = v.i64(&name)?.iter().map(|t| *t as f32).collect();
                case.equal(&name, &schedule.timesteps, &wanted)?;
            }
        }
    }
    Ok(())
}

fn trajectories(path: &Path, case: &mut Case) -> anyhow::Result<()> {
    let v = Vectors::open(path)?;
    let start = v.f32("x_init")?;
    for name in v.names().filter(|name| name.ends_with(".x")) {
        let key = name.trim_end_matches(".x");
        let (kind, key) =
            key.split_once('.').with_context(|| format!("{name}: expected kind.n50_shift5.x"))?;
        let (grid, solver) = match kind {
            "unipc" => (Grid::UnipcDiffusers, Solver::UniPc),
            "euler" => (Grid::EulerDiffusers, Solver::Euler),
            "euler_plain" => (Grid::Plain, Solver::Euler),
            _ => bail!("{name}: unknown solver"),
        };
        let (steps, shift) = steps_and_shift(key)?;
        let schedule = Schedule::new(grid, steps, shift)?;
        let sigmas = format!("{kind}.{key}.sigmas");
        case.compare(&sigmas, &schedule.sigmas, &v.f32(&sigmas)?)?;
        let mut sampler = Sampler::new(schedule, solver);
        let mut x = start.clone();
        let mut path = Vec::new();
        while let Some(step) = sampler.next_step() {
            let velocity: Vec<f32> = x.iter().map(|x| field(*x, step.sigma)).collect();
            sampler.step(&velocity, &mut x)?;
            path.extend_from_slice(&x);
        }
        case.compare(name, &path, &v.f32(name)?)?;
    }
    Ok(())
}

pub(super) fn plucker(dir: &Path, report: &mut Report) {
    let path = dir.join("plucker/case.safetensors");
    if path.exists() {
        report.case("host", Case::new("plucker", PLUCKER_TOLERANCE), |case| plucker_case(&path, case));
    }
}

fn plucker_case(path: &Path, case: &mut Case) -> anyhow::Result<()> {
    let v = Vectors::open(path)?;
    let (ypr, position) = (v.f64("in.ypr")?, v.f64("in.pos")?);
    let poses: Vec<Pose> = ypr
        .as_chunks::<3>()
        .0
        .iter()
        .zip(position.as_chunks::<3>().0)
        .map(|([yaw, pitch, roll], p)| pose(*yaw, *pitch, *roll, *p))
        .collect();
    case.compare("c2w", poses.as_flattened().as_flattened(), &v.f64("c2w")?)?;
    let k = v.f64("in.K")?;
    let &[fx, fy, cx, cy] = k.as_slice() else { bail!("in.K holds {} numbers, expected 4", k.len()) };
    let k = Intrinsics { fx, fy, cx, cy };
    let ref_index = v.rows("ref_index")?;
    ensure!(ref_index.len() == 1, "one reference index is expected");
    for (tag, reference) in [("ref0", 0), ("refR", ref_index[0])] {
        let origin = poses.get(reference).context("the reference index is out of range")?;
        let rel: Vec<Pose> = poses.iter().map(|p| relative(origin, p)).collect();
        let name = format!("{tag}.rel");
        case.compare(&name, rel.as_flattened().as_flattened(), &v.f64(&name)?)?;
        let [_, height, width] = v.sizes("ref0.plucker_frame_last")?;
        let name = format!("{tag}.plucker_frame_last");
        if v.has(&name) {
            let last = rel.last().context("no poses")?;
            case.compare(&name, &rays(last, &k, height, width), &v.f64(&name)?)?;
        }
        let name = format!("{tag}.pooled");
        let [_, _, rows, _] = v.sizes(&name)?;
        let pooled = features(&poses, reference, &k, height, width, height / rows)?;
        case.compare(&name, &pooled, &v.f64(&name)?)?;
    }
    Ok(())
}

pub(super) fn rope_time(dir: &Path, report: &mut Report) {
    let path = dir.join("rope_time/tables.safetensors");
    if !path.exists() {
        return;
    }
    report.case("host", Case::new("rope_time/rope", ROPE_TOLERANCE), |case| {
        let v = Vectors::open(&path)?;
        let index = v.rows("index")?;
        for name in v.names().filter(|name| name.ends_with(".dims")) {
            let head = name.trim_end_matches(".dims");
            let head_dim: usize = head.strip_prefix("hd").context("expected hd128.dims")?.parse()?;
            rope(&v, head, head_dim, &index, case)?;
        }
        Ok(())
    });
    report.case("host", Case::new("rope_time/sinusoids", SINUSOID_TOLERANCE), |case| {
        let v = Vectors::open(&path)?;
        let timesteps = v.f32("timesteps")?;
        for name in v.names().filter(|name| name.starts_with("sinusoid")) {
            let width: usize = name.trim_start_matches("sinusoid").parse()?;
            let ours: Vec<f32> = timesteps.iter().flat_map(|t| sinusoid(f64::from(*t), width)).collect();
            case.compare(name, &ours, &v.f32(name)?)?;
        }
        Ok(())
    });
}

/// The tables hold, per index, the temporal, vertical and horizontal parts at that same index, each value twice.
fn rope(v: &Vectors, head: &str, head_dim: usize, index: &[usize], case: &mut Case) -> anyhow::Result<()> {
    // Rows and columns are reached by making the grid large enough; only small indices, so that it stays small.
    let side = index.iter().copied().filter(|i| *i <= 200).max().unwrap_or(0) + 1;
    let config = |side: usize| DitConfig {
        latent_height: side,
        latent_width: side,
        head_dim,
        prediction: Prediction::Velocity,
        ..DitConfig::SMALLEST
    };
    let half = head_dim / 2;
    let split = config(1).rotary_split();
    case.equal(&format!("{head}.dims"), split.to_vec(), v.rows(&format!("{head}.dims"))?)?;
    let t_index: Vec<f64> = index.iter().map(|i| *i as f64).collect();
    let temporal = config(1).rotary_tables(&t_index);
    let grid = config(side).rotary_tables(&[0.0]);
    for (name, temporal, grid) in [("cos", &temporal.0, &grid.0), ("sin", &temporal.1, &grid.1)] {
        let name = format!("{head}.{name}");
        let wanted = v.f32(&name)?;
        for (row, i) in index.iter().enumerate() {
            let pairs: Vec<f32> =
                wanted[row * head_dim..(row + 1) * head_dim].chunks(2).map(|p| p[0]).collect();
            let t = split[0] / 2;
            case.compare(&name, &temporal[row * half..row * half + t], &pairs[..t])?;
            if *i < side {
                let token = (i * side + i) * half;
                case.compare(&name, &grid[token + t..token + half], &pairs[t..])?;
            }
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Row {
    prompt: String,
    cleaned: String,
    pieces: Vec<String>,
    ids: Vec<u32>,
    length: usize,
    #[serde(flatten)]
    other: std::collections::BTreeMap<String, Vec<u32>>,
}

pub(super) fn tokenizer(dir: &Path, report: &mut Report) {
    let dir = dir.join("tokenizer");
    let cases = dir.join("cases.json");
    if !cases.exists() {
        return;
    }
    report.case("host", Case::new("tokenizer", 0.0), |case| {
        let mut models = Vec::new();
        for entry in std::fs::read_dir(&dir)? {
            models.push(entry?.path());
        }
        models.retain(|path| path.extension().is_some_and(|e| e == "model"));
        let [model] = models.as_slice() else { bail!("{} .model files, expected one", models.len()) };
        let tokenizer = Tokenizer::open(model)?;
        let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(&cases)?)?;
        for row in &rows {
            let what = format!("{:?}", row.prompt);
            case.equal(&what, clean(&row.prompt), row.cleaned.clone())?;
            let mut ids = tokenizer.encode(&row.cleaned)?;
            let pieces: Vec<String> =
                ids.iter().map(|id| tokenizer.piece(*id).unwrap_or_default().to_owned()).collect();
            case.equal(&what, &pieces, &row.pieces)?;
            ids.push(tokenizer.end());
            case.equal(&what, &ids, &row.ids)?;
            for (name, padded) in row.other.iter().filter(|(name, _)| name.starts_with("padded")) {
                let length: usize = name["padded".len()..].parse()?;
                let encoded = tokenizer.encode_prompt(&row.prompt, length)?;
                case.equal(&what, &encoded.ids, padded)?;
                case.equal(&what, encoded.length, row.length)?;
            }
        }
        Ok(())
    });
}
