//! The whole loop: ids, text encoder, joint guidance with context, UniPC, decoder; every step is compared.

use std::path::Path;

use anyhow::ensure;
use mindseye_engines::sampler::{Grid, NOISED_CONTEXT_T, Sampler, Schedule, Solver, branch, guide};

use super::{
    Case, Json, Report, Vectors,
    engine::{Engine, Via},
    networks::{DitCase, decode_all, frame_range, mask_lengths, run_dit, run_umt5, swap_axes},
};

const TOLERANCE: f64 = 5e-4;

pub(super) fn pipeline(dir: &Path, via: Via, report: &mut Report) {
    let path = dir.join("pipeline/case.safetensors");
    if path.exists() {
        report.case(via.name(), Case::new("pipeline", via.tolerance(TOLERANCE)), |case| {
            run(dir, &path, via, case)
        });
    }
}

fn run(dir: &Path, path: &Path, via: Via, case: &mut Case) -> anyhow::Result<()> {
    let v = Vectors::open(path)?;
    let network = |name: &str| {
        let dir = dir.join(name);
        let weights = Vectors::open(&dir.join("weights.safetensors"))?;
        anyhow::Ok((Json::open(&dir.join("config.json"))?, Engine::new(via, &weights)?))
    };

    let (json, mut engine) = network("umt5")?;
    let umt5 = json.umt5()?;
    let mut text = |ids: &str, mask: &str, out: &str| {
        let rows = run_umt5(&mut engine, &umt5, v.rows(ids)?, &mask_lengths(&v.i64(mask)?, 1)?)?;
        let rows = rows.data("rows")?.to_vec();
        case.compare(out, &rows, &v.f32(out)?)?;
        anyhow::Ok(rows)
    };
    let prompt = text("in.ids", "in.mask", "txt")?;
    let null = text("in.null_ids", "in.null_mask", "txt_null")?;
    let [_, text_len, _] = v.sizes("txt")?;

    let [_, channels, targets, h, w] = v.sizes("in.noise")?;
    let [_, _, context_len, _, _] = v.sizes("in.ctx")?;
    let (json, mut engine) = network("dit")?;
    let dit = json.dit([h, w], text_len)?;
    // Frames first, as the sampler's helpers want them.
    let frames = |name: &str, count: usize| anyhow::Ok(swap_axes(&v.f32(name)?, channels, count));
    let (context, first) = (frames("in.ctx", context_len)?, frames("in.first_frame", 1)?);
    let (z_context, z_first) = (frames("in.z_ctx", context_len)?, frames("in.z_first", 1)?);
    let mut x = frames("in.noise", targets)?;
    let t_index: Vec<f64> = v.i64("in.t_index")?.iter().map(|i| *i as f64).collect();
    ensure!(t_index.len() == context_len + targets, "in.t_index does not fit");

    let (steps, shift, weight) = (v.number("steps")?, v.number("shift")?, v.number("cfg_w")? as f32);
    let schedule = Schedule::new(Grid::UnipcDiffusers, steps as usize, shift)?;
    case.compare("sigmas", &schedule.sigmas, &v.f32("sigmas")?)?;
    let mut sampler = Sampler::new(schedule, Solver::UniPc);
    let plane = h * w;
    while let Some(step) = sampler.next_step() {
        let mut velocity = |context: &[f32], first: &[f32], t_given: f32, text: &[f32], out: &str| {
            let b = branch(context, first, &x, channels * plane, t_given, step.timestep);
            let count = b.timesteps.len();
            let latents = swap_axes(&b.latents, count, channels);
            let pass = DitCase {
                latents: &latents,
                batch: 1,
                frames: count,
                timesteps: &b.timesteps,
                t_index: &t_index,
                text,
                mask: None,
                memory: &[],
            };
            let all = run_dit(&mut engine, &dit, &pass, false)?;
            let v_target = frame_range(all.data("sample")?, channels, count, context_len, count);
            case.compare(out, &v_target, &v.f32(out)?)?;
            anyhow::Ok(swap_axes(&v_target, channels, targets))
        };
        let i = step.index;
        let conditional = velocity(&context, &first, 0.0, &prompt, &format!("step{i}.v_cond"))?;
        let mut v_all =
            velocity(&z_context, &z_first, NOISED_CONTEXT_T, &null, &format!("step{i}.v_uncond"))?;
        guide(&mut v_all, &conditional, weight);
        sampler.step(&v_all, &mut x)?;
        if sampler.next_step().is_none() {
            // The given frame is put back at the end; the file holds the last step after that.
            x[..first.len()].copy_from_slice(&first);
        }
        let name = format!("step{i}.x");
        case.compare(&name, &swap_axes(&x, targets, channels), &v.f32(&name)?)?;
    }
    let latents = swap_axes(&x, targets, channels);
    case.compare("out.latent_norm", &latents, &v.f32("out.latent_norm")?)?;

    let (json, mut engine) = network("vae")?;
    let video = decode_all(&json.vae()?, &mut engine, &latents, targets, [h, w], |_, _| Ok(()))?;
    let clamped: Vec<f32> = video.iter().map(|x| x.clamp(-1.0, 1.0)).collect();
    case.compare("out.video", &clamped, &v.f32("out.video")?)
}
