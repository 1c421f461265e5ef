//! The whole loop: ids, text encoder, joint guidance with context, UniPC, decoder; every step is compared.

use std::path::Path;

use anyhow::ensure;
use mindseye::imagine::{ContextLatents, Dropped, Prompt, RolloutSettings, Rope, guided_velocity};
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::sampler::{Grid, Sampler, Schedule, Solver};

use super::{
    Case, Json, Report, Vectors,
    engine::{Engine, Via},
    networks::{DitCase, decode_all, mask_lengths, run_dit, run_umt5, swap_axes},
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

/// The case's network, as [`mindseye::imagine`] calls it; keeps what it predicted.
struct Denoiser<'a> {
    engine: &'a mut Engine,
    cfg: DitConfig,
    /// `[frames, channels, height, width]` of each call.
    predictions: Vec<Vec<f32>>,
}

impl Denoise for Denoiser<'_> {
    fn config(&self) -> &DitConfig {
        &self.cfg
    }

    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        let (frames, channels) = (step.frames(), self.cfg.in_channels);
        let timesteps: Vec<f32> = step.rows.iter().map(|row| step.timesteps[*row] as f32).collect();
        let pass = DitCase {
            latents: &swap_axes(step.latents, frames, channels),
            batch: 1,
            frames,
            timesteps: &timesteps,
            t_index: step.t_index,
            text: step.text,
            mask: None,
            memory: &[],
        };
        let mut run = || {
            let out = run_dit(self.engine, &self.cfg, &pass, false)?;
            anyhow::Ok(swap_axes(out.data("sample")?, channels, frames))
        };
        let prediction = run().map_err(|e| DenoiseError::Backend(format!("{e:#}")))?;
        self.predictions.push(prediction.clone());
        Ok(Denoised { prediction, ..Denoised::default() })
    }
}

fn rollout_settings(v: &Vectors, targets: usize, gap: f64) -> anyhow::Result<RolloutSettings> {
    Ok(RolloutSettings {
        target_latents: targets,
        gap,
        max_span: None,
        steps: v.number("steps")? as usize,
        min_steps: 1,
        guidance: v.number("cfg_w")? as f32,
        dropped: Dropped::Both,
        rope: Rope::Source,
        grid: Grid::UnipcDiffusers,
        shift: v.number("shift")?,
        solver: Solver::UniPc,
        glance_timestep: 0.0,
        candidates: 1,
        seed: 0,
    })
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
    // Frames first, as the runtime has them.
    let frames = |name: &str, count: usize| anyhow::Ok(swap_axes(&v.f32(name)?, channels, count));
    let noise = [frames("in.z_ctx", context_len)?, frames("in.z_first", 1)?].concat();
    let mut x = frames("in.noise", targets)?;
    let t_index = v.i64("in.t_index")?;
    ensure!(context_len > 0 && t_index.len() == context_len + targets, "in.t_index does not fit");
    let (context_index, target_index) = t_index.split_at(context_len);
    let seen = ContextLatents {
        index: context_index.iter().map(|i| *i as u64).collect(),
        latents: frames("in.ctx", context_len)?,
        first: frames("in.first_frame", 1)?,
    };

    let gap = (target_index[0] - context_index[context_len - 1]) as f64;
    let settings = rollout_settings(&v, targets, gap)?;
    let schedule = Schedule::new(settings.grid, settings.steps, settings.shift)?;
    case.compare("sigmas", &schedule.sigmas, &v.f32("sigmas")?)?;
    let mut sampler = Sampler::new(schedule, settings.solver);
    let mut denoiser = Denoiser { engine: &mut engine, cfg: dit, predictions: Vec::new() };
    let prompt = Prompt { text: &prompt, null_text: &null, camera: None };
    while let Some(step) = sampler.next_step() {
        let i = step.index;
        denoiser.predictions.clear();
        let velocity = guided_velocity(&mut denoiser, &seen, prompt, &settings, &x, step, &noise)?;
        ensure!(denoiser.predictions.len() == 2, "both branches of the guidance are evaluated");
        for (branch, prediction) in ["v_cond", "v_uncond"].into_iter().zip(&denoiser.predictions) {
            let name = format!("step{i}.{branch}");
            let target = swap_axes(&prediction[seen.latents.len()..], targets, channels);
            case.compare(&name, &target, &v.f32(&name)?)?;
        }
        sampler.step(&velocity, &mut x)?;
        if sampler.next_step().is_none() {
            // The given frame is put back at the end; the file holds the last step after that.
            x[..seen.first.len()].copy_from_slice(&seen.first);
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
