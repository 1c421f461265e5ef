//! The guide of a target: remembered pictures carried into its views, as a robot would carry them.
//!
//! A robot keeps pictures at twice the model's size. Their depth is read by a network and their poses come from odometry,
//! so both are noisy here. What was carried is encoded by the codec; it and its trust are laid out as
//! [`mindseye_engines::model::dit::DitConfig::guide_channels`] says.

use mindseye_base::picture::RgbImage;
use mindseye_engines::model::codec::{GROUP, LinearCodec};
use mindseye_engines::model::dit::DitConfig;
use mindseye_landmarks::{Camera as Lens, Carrier, Remembered};
use mindseye_world::{Camera, Frame, House, Pose2, RenderOptions, Rng, render_with};
use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion};
use serde::{Deserialize, Serialize};

use crate::config::SettingError;
use crate::data::{Codec, Look, encode_blocks};
use crate::family::HouseModel;

/// `[guide]` of a training configuration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuideConfig {
    /// Share of samples without a guide, where the model predicts alone.
    pub dropped: f64,
    /// Standard deviation of depth as a share of it: half of the variance is common to a picture, half is of each pixel.
    pub depth_noise: f64,
    /// Standard deviation of the poses of remembered pictures, along each axis (m).
    pub position_noise_m: f64,
    /// The same of their headings (degrees).
    pub turn_noise_deg: f64,
}

impl GuideConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`SettingError`] names the field.
    pub fn validate(&self) -> Result<(), SettingError> {
        let least_zero = "a number from 0 on";
        for (name, value, most, expected) in [
            ("guide.dropped", self.dropped, 1.0, "0 to 1"),
            ("guide.depth_noise", self.depth_noise, 1.0, "0 to 1"),
            ("guide.position_noise_m", self.position_noise_m, f64::MAX, least_zero),
            ("guide.turn_noise_deg", self.turn_noise_deg, f64::MAX, least_zero),
        ] {
            if !(0.0..=most).contains(&value) {
                return Err(SettingError::Range { name, value: value.to_string(), expected });
            }
        }
        Ok(())
    }
}

/// Times the model's size at which pictures are remembered.
const FINER: usize = 2;

/// Makes guides; holds the buffers that rendering and carrying reuse.
pub(crate) struct Guides {
    config: GuideConfig,
    /// The remembered pictures' camera and the model's, as the world and as geometry see them.
    remembered: (Camera, Lens),
    seen: (Camera, Lens),
    frame: Frame,
    carrier: Carrier,
}

/// The lens of a camera of the world.
fn lens(camera: &Camera) -> Option<Lens> {
    let [fx, fy, cx, cy] = camera.intrinsics();
    Lens::pinhole(camera.width as u32, camera.height as u32, fx, fy, cx, cy).ok()
}

fn map_from_camera(camera: &Camera, base: Pose2) -> Isometry3<f64> {
    let (r, t) = camera.map_from_camera(base);
    let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| r[i][j]));
    Isometry3::from_parts(Translation3::from(t), UnitQuaternion::from_rotation_matrix(&rotation))
}

impl Guides {
    /// For a model whose images `seen` takes; none where that is no camera of geometry.
    pub(crate) fn new(config: GuideConfig, seen: &Camera) -> Option<Self> {
        let finer = Camera { width: FINER * seen.width, height: FINER * seen.height, ..*seen };
        Some(Self {
            config,
            remembered: (finer, lens(&finer)?),
            seen: (*seen, lens(seen)?),
            frame: Frame::new(),
            carrier: Carrier::default(),
        })
    }

    /// The memory of pictures taken from these poses, of which the last is known exactly.
    fn remember(&mut self, house: &House, poses: &[Pose2], supersample: usize, rng: &mut Rng) -> Remembered {
        let (camera, lens) = &self.remembered;
        let mut memory = Remembered::new(poses.len() * camera.width * camera.height);
        let options = RenderOptions { supersample, depth: true, ..RenderOptions::rgb_only() };
        let part = self.config.depth_noise * std::f64::consts::FRAC_1_SQRT_2;
        for (k, pose) in poses.iter().enumerate() {
            render_with(house, *pose, camera, options, &mut self.frame);
            let common = 1.0 + part * rng.normal();
            let depth: Vec<f32> = self
                .frame
                .depth
                .iter()
                .map(|d| (f64::from(*d) * common * (1.0 + part * rng.normal())) as f32)
                .collect();
            let mut off = || self.config.position_noise_m * rng.normal();
            let at = (pose.x + off(), pose.y + off());
            let turn = self.config.turn_noise_deg.to_radians() * rng.normal();
            let known = k + 1 == poses.len();
            let believed = if known { *pose } else { Pose2::unwrapped(at.0, at.1, pose.yaw + turn) };
            let picture =
                RgbImage { width: camera.width, height: camera.height, data: self.frame.rgb.clone() };
            // Sizes and poses fit by construction; a picture that did not would only be missing.
            let _ = memory.insert(&picture, &depth, lens, &map_from_camera(camera, believed));
        }
        memory
    }

    /// The guide of a drive: `[latents, tokens, guide_channels]`, zero for the context and the first image. `poses` are
    /// those of the remembered pictures, the last of which is the drive's first image.
    pub(crate) fn guide(
        &mut self,
        model: &HouseModel,
        codec: &Codec,
        house: &House,
        poses: &[Pose2],
        drive: &[Pose2],
        look: &Look,
        supersample: usize,
        rng: &mut Rng,
    ) -> Vec<f32> {
        let memory = self.remember(house, poses, supersample, rng);
        let [rows, cols] = model.dit.grid();
        let (w, tokens) = (self.seen.0.width, rows * cols);
        let cell = [self.seen.0.height / rows, w / cols];
        let (mut blocks, mut group, mut trust) = (Vec::new(), Vec::new(), Vec::new());
        let share = 1.0 / (GROUP * cell[0] * cell[1]) as f32;
        for images in drive[1..].chunks_exact(GROUP) {
            group.clear();
            let mut trusted = vec![0.0; tokens];
            let mut last = None;
            for image in images {
                if last != Some(*image) {
                    let pose = map_from_camera(&self.seen.0, *image);
                    self.carrier.carry(&memory, &self.seen.1, &pose).fill();
                    last = Some(*image);
                }
                let carried = self.carrier.carried();
                look.floats(&carried.rgb, w, &mut group);
                for (at, t) in carried.trust.iter().enumerate() {
                    let (y, x) = (at / w, at % w);
                    let x = if look.mirror { w - 1 - x } else { x };
                    trusted[y / cell[0] * cols + x / cell[1]] += t * share;
                }
            }
            blocks.extend(LinearCodec::blocks(&model.codec, &group));
            trust.extend(trusted);
        }
        lay_out(model, &encode_blocks(&model.codec, codec, blocks), &trust)
    }
}

/// Where value `k` of a token's carried latents is in latents `[frames, channels, h, w]`; tokens are counted over frames.
fn place(cfg: &DitConfig, token: usize, k: usize) -> usize {
    let ([_, cols], [ph, pw], tokens) = (cfg.grid(), cfg.patch, cfg.tokens_per_frame());
    let (frame, token) = (token / tokens, token % tokens);
    let (pixel, channel) = (k / cfg.out_channels, k % cfg.out_channels);
    let (row, column) = (token / cols * ph + pixel / pw, token % cols * pw + pixel % pw);
    ((frame * cfg.out_channels + channel) * cfg.latent_height + row) * cfg.latent_width + column
}

/// Latents `[targets, channels, h, w]` and trust `[targets, tokens]` of the last latents of a sample as its guide
/// `[latents, tokens, guide_channels]`.
fn lay_out(model: &HouseModel, latents: &[f32], trust: &[f32]) -> Vec<f32> {
    let (cfg, channels) = (&model.dit, model.dit.guide_channels());
    let tokens = model.latents() * cfg.tokens_per_frame();
    let mut out = vec![0.0; tokens * channels];
    let given = (tokens - trust.len()) * channels;
    for (token, (values, trust)) in out[given..].chunks_exact_mut(channels).zip(trust).enumerate() {
        for (k, value) in values.iter_mut().take(channels - 1).enumerate() {
            *value = latents[place(cfg, token, k)];
        }
        values[channels - 1] = *trust;
    }
    out
}

/// The latents of a guide, `[latents, channels, h, w]`.
pub(crate) fn latents(cfg: &DitConfig, guide: &[f32]) -> Vec<f32> {
    let channels = cfg.guide_channels();
    let mut out = vec![0.0; guide.len() / channels * (channels - 1)];
    for (token, values) in guide.chunks_exact(channels).enumerate() {
        for (k, value) in values[..channels - 1].iter().enumerate() {
            out[place(cfg, token, k)] = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::codec_fit::codec_of;
    use crate::config::TrainConfig;
    use crate::data::{Sample, Source, Task};
    use crate::eager::{Eager, Params};
    use crate::net::{self, Draw};
    use mindseye_world::{Difficulty, random_pose};

    const EXACT: GuideConfig =
        GuideConfig { dropped: 0.0, depth_noise: 0.0, position_noise_m: 0.0, turn_noise_deg: 0.0 };

    /// The smallest model with a guide, and its recipe.
    fn recipe(dir: &std::path::Path) -> (TrainConfig, HouseModel) {
        let model = include_str!("../../../tests/data/train/model.toml")
            .replace("attributes = 14", "attributes = 14\nguide = \"warp\"");
        let train = format!(
            "{}\n[guide]\ndropped = 0.5\ndepth_noise = 0.03\nposition_noise_m = 0.02\nturn_noise_deg = 1.0\n",
            include_str!("../../../tests/data/train/train.toml").replace("[loss]", "[loss]\nholes = 2.0")
        );
        std::fs::write(dir.join("model.toml"), model).expect("it is written");
        std::fs::write(dir.join("train.toml"), train).expect("it is written");
        TrainConfig::load(&dir.join("train.toml")).expect("the recipe is valid")
    }

    /// A model with weights that are not zero anywhere, and a guided sample.
    fn stage() -> (TrainConfig, HouseModel, Params, Sample, Draw) {
        let dir = tempfile::tempdir().expect("a directory");
        let (config, model) = recipe(dir.path());
        let state = crate::checkpoint::State::new(&config, &model, Difficulty::plain());
        let codec = codec_of(&state.params);
        let mut source = Source::new(&model, Difficulty::plain(), codec).guided(config.guide);
        let sample = source.sample(1, Task::Navigate, true);
        let mut draw = Draw::new(&mut Rng::new(2), sample.latents.len(), 0.3, 3.0, 0.0, false);
        draw.guided = true;
        (config, model, (*state.params).clone(), sample, draw)
    }

    fn shaken(params: &Params) -> Params {
        let (mut params, mut rng) = (params.clone(), Rng::new(4));
        params.all_values_mut().flatten().for_each(|v| *v += 0.1 * rng.normal() as f32);
        params
    }

    fn predict(model: &HouseModel, params: &Params, sample: &Sample, draw: &Draw) -> Vec<f32> {
        let mut e = Eager::new(Arc::new(params.clone()), false);
        let out = net::forward(&mut e, model, std::slice::from_ref(sample), std::slice::from_ref(draw));
        let (c, hw) = (model.dit.in_channels, model.dit.latent_height * model.dit.latent_width);
        mindseye_engines::denoise::frames_first(e.value(out.sample).1, c, model.latents(), hw)
    }

    #[test]
    fn fresh_weights_carry_what_was_seen_and_leave_the_rest_to_the_network() {
        let (_, model, params, sample, draw) = stage();
        let (c, hw) = (model.dit.in_channels, model.dit.latent_height * model.dit.latent_width);
        let alone = predict(&model, &params, &sample, &Draw { guided: false, ..draw.clone() });
        let with = predict(&model, &params, &sample, &draw);
        let carried = latents(&model.dit, &sample.guide);
        let channels = model.dit.guide_channels();
        let trust = |frame: usize, p: usize| sample.guide[(frame * hw + p) * channels + channels - 1];
        let mut seen = 0;
        for (at, got) in with.iter().enumerate() {
            let (frame, p) = (at / (c * hw), at % hw);
            let g = trust(frame, p);
            let wanted = g * carried[at] + (1.0 - g) * alone[at];
            assert!((got - wanted).abs() < 1e-4, "{got} {wanted}");
            assert!((0.0..=1.001).contains(&g) && (frame > model.layout.context_latents || g == 0.0));
            seen += usize::from(g > 0.3);
        }
        assert!(seen > with.len() / 8, "{seen} of {} values were carried", with.len());
        let blind = predict(&model, &params, &sample, &Draw { dropped: true, ..draw.clone() });
        let blind_alone = predict(&model, &params, &sample, &Draw { dropped: true, guided: false, ..draw });
        assert_eq!(blind, blind_alone, "a sample whose context is dropped has no guide");
    }

    #[test]
    fn gradients_of_a_guided_pass_are_those_of_finite_differences() {
        let (config, model, params, sample, draw) = stage();
        let params = shaken(&params);
        let loss = |params: &Params| {
            let mut e = Eager::new(Arc::new(params.clone()), true);
            let (samples, draws) = (std::slice::from_ref(&sample), std::slice::from_ref(&draw));
            let out = net::forward(&mut e, &model, samples, draws);
            let (losses, grads) = net::losses(&e, &model, samples, draws, &out, &config.loss, 1);
            e.backward(grads);
            (losses.total, e.take_grads())
        };
        let (_, grads) = loss(&params);
        let mut checked = 0;
        for name in [
            "guide.embedding.weight",
            "guide.trust.weight",
            "guide.trust.bias",
            "guide.correction.weight",
            "proj_out.weight",
        ] {
            let i = params.position(name).unwrap_or_else(|| panic!("{name}"));
            let values = params.get(i).2.len();
            for at in [0, values / 3, values - 1] {
                let moved = |by: f32| {
                    let mut params = params.clone();
                    params.values_mut(i)[at] += by;
                    loss(&params).0
                };
                let h = 1e-2;
                let wanted = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                let got = f64::from(grads[i][at]);
                assert!((got - wanted).abs() < 2e-3 + 0.02 * wanted.abs(), "{name}[{at}]: {got}, {wanted}");
                checked += usize::from(wanted.abs() > 1e-3);
            }
        }
        assert!(checked >= 6, "only {checked} gradients are not zero");
    }

    #[test]
    fn what_is_seen_from_where_it_was_remembered_is_carried_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let (config, model) = recipe(dir.path());
        let state = crate::checkpoint::State::new(&config, &model, Difficulty::plain());
        let codec = codec_of(&state.params).expect("a codec");
        let camera = Camera::new(model.codec.width, model.codec.height);
        let house = House::generate(3, &Difficulty::plain());
        let pose = random_pose(&house, &mut Rng::new(3));
        let mut guides = Guides::new(EXACT, &camera).expect("a camera");
        let drive = vec![pose; 1 + GROUP * (model.target_latents() - 1)];
        let mut rng = Rng::new(1);
        let [plain, mirrored] = [false, true].map(|mirror| {
            let mut look = Look::draw(&mut Rng::new(5), false);
            look.mirror = mirror;
            let guide = guides.guide(&model, &codec, &house, &[pose], &drive, &look, 2, &mut rng);
            let mut frame = Frame::new();
            let options = RenderOptions { supersample: 4, ..RenderOptions::rgb_only() };
            render_with(&house, pose, &camera, options, &mut frame);
            let mut group = Vec::new();
            (0..GROUP).for_each(|_| look.pixels(&frame, &mut group));
            let wanted = encode_blocks(&model.codec, &codec, LinearCodec::blocks(&model.codec, &group));
            let carried = latents(&model.dit, &guide);
            let last = &carried[carried.len() - wanted.len()..];
            let (error, size) = last
                .iter()
                .zip(&wanted)
                .fold((0.0, 0.0), |(e, s), (a, b)| (e + f64::from(a - b).powi(2), s + f64::from(*b).powi(2)));
            assert!(error < 0.03 * size, "{error} of {size}, mirrored: {mirror}");
            let channels = model.dit.guide_channels();
            assert!(guide.chunks_exact(channels).rev().take(6).all(|t| t[channels - 1] > 0.8));
            guide
        });
        assert_ne!(plain, mirrored);
    }

    #[test]
    fn a_guide_changes_no_other_part_of_a_sample() {
        let (config, model, params, sample, _) = stage();
        let mut source = Source::new(&model, Difficulty::plain(), codec_of(&params));
        let alone = source.sample(1, Task::Navigate, true);
        assert!(alone.guide.is_empty());
        assert_eq!(
            (&alone.latents, &alone.camera, &alone.pose),
            (&sample.latents, &sample.camera, &sample.pose)
        );
        let mut again = Source::new(&model, Difficulty::plain(), codec_of(&params)).guided(config.guide);
        assert_eq!(again.sample(1, Task::Navigate, true).guide, sample.guide, "a function of the seed");
    }

    #[test]
    fn a_guide_alone_is_trained_and_the_model_without_one_stays_as_it_is() {
        use crate::trainer::Trainer;
        use std::sync::atomic::AtomicBool;
        let dir = tempfile::tempdir().expect("a directory");
        let (mut config, model) = recipe(dir.path());
        config.only = vec!["guide.".to_owned()];
        (config.steps, config.eval_every) = (6, 100);
        let mut trainer = Trainer::open(config, model.clone(), &dir.path().join("run")).expect("it opens");
        let before = trainer.state.params.clone();
        trainer.run(&AtomicBool::new(false), |_, _| {}).expect("it goes on");
        let after = trainer.state.params.clone();
        for i in 0..before.len() {
            let (name, _, values) = before.get(i);
            assert_eq!(values != after.get(i).2, name.starts_with("guide."), "{name}");
        }
        let (_, _, _, sample, draw) = stage();
        let alone = Draw { guided: false, ..draw.clone() };
        assert_eq!(predict(&model, &before, &sample, &alone), predict(&model, &after, &sample, &alone));
        assert_ne!(predict(&model, &before, &sample, &draw), predict(&model, &after, &sample, &draw));
    }

    #[test]
    fn a_guided_run_goes_on_as_if_it_had_not_stopped() {
        use crate::trainer::{Metrics, Trainer};
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().expect("a directory");
        let until = |run: &str, step: u64| {
            let (mut config, model) = recipe(dir.path());
            (config.eval_every, config.log_every, config.checkpoint_every) = (20, 10, 20);
            let mut trainer = Trainer::open(config, model, &dir.path().join(run)).expect("it opens");
            let stop = AtomicBool::new(false);
            trainer.run(&stop, |m, _| stop.store(m.step >= step, Ordering::Relaxed)).expect("it goes on");
        };
        let metrics =
            |run: &str| std::fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).expect("lines");
        until("whole", 20);
        until("stopped", 10);
        until("stopped", 20);
        assert_eq!(metrics("whole"), metrics("stopped"));
        let line: Metrics =
            serde_json::from_str(metrics("whole").lines().last().expect("a line")).expect("JSON");
        let eval = line.eval.expect("an evaluation");
        let (guided, carried) = (eval.guided.expect("a guide"), eval.carried.expect("a guide"));
        // Twenty steps teach a network nothing that the memory does not know better.
        assert!(guided.psnr_db > eval.paths.psnr_db + 1.0, "{eval:?}");
        assert!(carried.psnr_db > carried.psnr_worst_db && guided.psnr_worst_db > 5.0, "{eval:?}");
    }

    #[test]
    fn a_guide_that_does_not_fit_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let (config, _) = recipe(dir.path());
        let check = |change: &dyn Fn(&mut GuideConfig), wanted: &str| {
            let mut config = config.clone();
            change(config.guide.as_mut().expect("a guide"));
            let said = config.validate().expect_err(wanted).to_string();
            assert!(said.contains(wanted), "{said}");
        };
        check(&|g| g.dropped = 1.5, "guide.dropped = 1.5: expected 0 to 1");
        check(&|g| g.turn_noise_deg = f64::NAN, "guide.turn_noise_deg = NaN");
        check(&|g| g.position_noise_m = -0.1, "guide.position_noise_m = -0.1: expected a number from 0 on");
        // A model without, a recipe with one; and the other way round.
        let path = dir.path().join("train.toml");
        let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("it is there");
        let (model, train) = (text("model.toml"), text("train.toml"));
        std::fs::write(dir.path().join("model.toml"), model.replace("guide = \"warp\"\n", ""))
            .expect("written");
        let said = TrainConfig::load(&path).expect_err("no guide").to_string();
        assert!(said.contains("[dit] has no guide"), "{said}");
        std::fs::write(dir.path().join("model.toml"), &model).expect("written");
        std::fs::write(&path, &train[..train.find("[guide]").expect("a table")]).expect("written");
        let said = TrainConfig::load(&path).expect_err("no table").to_string();
        assert!(said.contains("[guide] is missing"), "{said}");
        let velocity = model.replace("prediction = \"x0\"", "prediction = \"velocity\"");
        std::fs::write(dir.path().join("model.toml"), velocity).expect("written");
        let said = TrainConfig::load(&path).expect_err("velocity").to_string();
        assert!(said.contains("dit.guide") && said.contains("prediction = \"x0\""), "{said}");
    }
}
