//! Few-step distillation: a student learns to go in one step where its guided teacher goes in several.
//!
//! The noise levels `1 = s_0 > s_1 > ... > s_T = 0` are those of the plain grid with the configured shift. The student's
//! `steps` divide the teacher's `teacher_steps`; from the student's level `s_k` the teacher makes `T / steps` Euler steps
//! `x <- r x + (1 - r) x_0`, `r = s' / s`, with the clean sample `x_0 = u + g (c - u)` of joint guidance (context, first
//! image and instruction dropped together in `u`). The student is asked for the one clean sample that leads from where
//! the teacher began to where it ended, `x_0* = (x_end - r x) / (1 - r)` (progressive distillation, Salimans and Ho 2022,
//! for flow matching), without guidance: one pass a step instead of two.
//!
//! Samples that are not distilled (the rest of `share`) are trained on as ever, so that the heads and the levels in
//! between stay what they were.

use std::sync::Arc;

use mindseye_engines::model::dit::Prediction;
use mindseye_engines::sampler::{Grid, SamplerError, Schedule};
use mindseye_world::Rng;

use crate::autograd::Autograd;
use crate::config::DistillConfig;
use crate::data::{Sample, Task};
use crate::eager::Params;
use crate::family::HouseModel;
use crate::net::{self, Draw};

/// Why a teacher cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistillError {
    /// A weight is missing or of another shape.
    #[error("distill.teacher: {name}: expected shape {expected:?}, got {}", shape_or_none(.got.as_deref()))]
    Weight {
        /// Its name.
        name: String,
        /// Shape that the model wants.
        expected: Vec<usize>,
        /// Shape that the teacher has.
        got: Option<Vec<usize>>,
    },
    /// Its noise levels make no sense.
    #[error(transparent)]
    Schedule(#[from] SamplerError),
}

fn shape_or_none(shape: Option<&[usize]>) -> String {
    shape.map_or("none".to_owned(), |s| format!("{s:?}"))
}

/// A trained model that answers for the student's targets.
pub struct Teacher {
    config: DistillConfig,
    model: HouseModel,
    params: Arc<Params>,
    sigmas: Vec<f32>,
}

impl Teacher {
    /// A teacher of this family; `shift` is that of its noise levels. It needs no head that only training has.
    ///
    /// # Errors
    /// Weights that are missing or of another shape, a schedule that makes no sense.
    pub fn new(
        config: &DistillConfig,
        model: &HouseModel,
        shift: f64,
        params: &Params,
    ) -> Result<Self, DistillError> {
        let mut model = model.clone();
        model.dit.attributes = 0;
        let wanted = net::collect(&model);
        let mut own = Params::new();
        for i in 0..wanted.len() {
            let (name, shape, values) = wanted.get(i);
            let have = params.position(name).map(|at| params.get(at));
            // A graph may store a 1x1x1 convolution as the matrix that it is.
            match have {
                Some((_, _, have)) if have.len() == values.len() => own.insert(name, shape, have.to_vec()),
                _ => {
                    return Err(DistillError::Weight {
                        name: name.to_owned(),
                        expected: shape.to_vec(),
                        got: have.map(|(_, shape, _)| shape.to_vec()),
                    });
                }
            }
        }
        let schedule = Schedule::new(Grid::Plain, config.teacher_steps, shift)?;
        Ok(Self { config: config.clone(), model, params: Arc::new(own), sigmas: schedule.sigmas })
    }

    /// Chooses the samples that the teacher answers for, puts them on levels of the student and gives them their
    /// targets.
    ///
    /// # Panics
    /// When samples do not fit the model.
    pub fn teach<A: Autograd>(&self, e: &mut A, rng: &mut Rng, samples: &[Sample], draws: &mut [Draw]) {
        e.no_grad(|e| self.answer(e, rng, samples, draws));
    }

    fn answer<A: Autograd>(&self, e: &mut A, rng: &mut Rng, samples: &[Sample], draws: &mut [Draw]) {
        let parts = self.config.teacher_steps / self.config.steps;
        let chosen: Vec<(usize, usize)> = (0..samples.len())
            .filter(|i| samples[*i].task != Task::Absent && !draws[*i].dropped)
            .filter_map(|i| {
                let begin = parts * rng.below(self.config.steps);
                rng.chance(self.config.share).then_some((i, begin))
            })
            .collect();
        if chosen.is_empty() {
            return;
        }
        let own: Vec<Sample> = chosen.iter().map(|(i, _)| samples[*i].clone()).collect();
        for (i, begin) in &chosen {
            draws[*i].s = f64::from(self.sigmas[*begin]);
        }
        let start: Vec<Vec<f32>> = own.iter().zip(&chosen).map(|(s, (i, _))| noised(s, &draws[*i])).collect();
        let mut x = start.clone();
        for part in 0..parts {
            let level = |begin: usize| (self.sigmas[begin + part], self.sigmas[begin + part + 1]);
            let now: Vec<Draw> = chosen
                .iter()
                .zip(own.iter().zip(&x))
                .map(|((i, begin), (sample, x))| {
                    let s = level(*begin).0;
                    Draw {
                        s: f64::from(s),
                        noise: self.noise_to(sample, x, s, &draws[*i]),
                        ..draws[*i].clone()
                    }
                })
                .collect();
            let clean = self.guided(e, &own, &now, &x);
            for ((x, clean), (_, begin)) in x.iter_mut().zip(&clean).zip(&chosen) {
                let (s, next) = level(*begin);
                let r = next / s;
                for (x, c) in x.iter_mut().zip(clean) {
                    *x = r * *x + (1.0 - r) * c;
                }
            }
        }
        for (((i, begin), start), end) in chosen.iter().zip(start).zip(x) {
            let r = self.sigmas[begin + parts] / self.sigmas[*begin];
            draws[*i].target =
                Some(start.iter().zip(end).map(|(x, end)| (end - r * x) / (1.0 - r)).collect());
        }
    }

    /// The noise with which `sample` at level `s` is `x`; context and first image keep theirs.
    fn noise_to(&self, sample: &Sample, x: &[f32], s: f32, draw: &Draw) -> Vec<f32> {
        let cfg = &self.model.dit;
        let given =
            (self.model.layout.context_latents + 1) * cfg.in_channels * cfg.latent_height * cfg.latent_width;
        let mut out = draw.noise.clone();
        for at in given..out.len() {
            out[at] = (x[at] - (1.0 - s) * sample.latents[at]) / s;
        }
        out
    }

    /// Guided clean samples, `[latents, channels, h, w]` each.
    fn guided<A: Autograd>(
        &self,
        e: &mut A,
        samples: &[Sample],
        draws: &[Draw],
        x: &[Vec<f32>],
    ) -> Vec<Vec<f32>> {
        let mut clean = self.clean(e, samples, draws, x);
        if self.config.guidance == 1.0 {
            return clean;
        }
        let blind: Vec<Draw> = draws.iter().map(|d| Draw { dropped: true, ..d.clone() }).collect();
        for (c, u) in clean.iter_mut().zip(self.clean(e, samples, &blind, x)) {
            for (c, u) in c.iter_mut().zip(u) {
                *c = u + self.config.guidance * (*c - u);
            }
        }
        clean
    }

    fn clean<A: Autograd>(
        &self,
        e: &mut A,
        samples: &[Sample],
        draws: &[Draw],
        x: &[Vec<f32>],
    ) -> Vec<Vec<f32>> {
        let cfg = &self.model.dit;
        let (f, c, hw) = (self.model.latents(), cfg.in_channels, cfg.latent_height * cfg.latent_width);
        e.restart(self.params.clone());
        let out = net::forward(e, &self.model, samples, draws);
        let values = e.value(&out.sample);
        draws
            .iter()
            .zip(x)
            .enumerate()
            .map(|(i, (draw, x))| {
                let s = draw.s as f32;
                (0..f * c * hw)
                    .map(|at| {
                        let (t, ch, p) = (at / (c * hw), at / hw % c, at % hw);
                        let v = values[((i * c + ch) * f + t) * hw + p];
                        match cfg.prediction {
                            Prediction::X0 => v,
                            Prediction::Velocity => x[at] - s * v,
                        }
                    })
                    .collect()
            })
            .collect()
    }
}

/// `(1 - s) x_0 + s n`.
fn noised(sample: &Sample, draw: &Draw) -> Vec<f32> {
    let s = draw.s as f32;
    sample.latents.iter().zip(&draw.noise).map(|(x, n)| (1.0 - s) * x + s * n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::State;
    use crate::codec_fit::codec_of;
    use crate::config::TrainConfig;
    use crate::data::Source;
    use crate::eager::Eager;
    use mindseye_world::Difficulty;
    use std::path::PathBuf;

    /// A model with weights that are not zero anywhere, two samples and their draws.
    fn stage() -> (HouseModel, TrainConfig, Params, Vec<Sample>, Vec<Draw>) {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("model.toml"), include_str!("../../../tests/data/train/model.toml"))
            .expect("the model is written");
        let path = dir.path().join("train.toml");
        std::fs::write(&path, include_str!("../../../tests/data/train/train.toml"))
            .expect("the recipe is written");
        let (config, model) = TrainConfig::load(&path).expect("the recipe is valid");
        let plain = Difficulty::plain();
        let state = State::new(&config, &model, &plain);
        let mut params = (*state.params).clone();
        let mut rng = Rng::new(4);
        for values in params.all_values_mut() {
            for v in values {
                *v += 0.05 * rng.normal() as f32;
            }
        }
        let mut source = Source::new(&model, plain, codec_of(&state.params));
        let samples = vec![source.sample(1, Task::Ground, true), source.sample(2, Task::Navigate, true)];
        let draws =
            samples.iter().map(|s| Draw::new(&mut rng, s.latents.len(), 0.3, 3.0, 0.0, false)).collect();
        (model, config, params, samples, draws)
    }

    fn distill(guidance: f32, teacher_steps: usize, steps: usize) -> DistillConfig {
        DistillConfig { teacher: PathBuf::new(), guidance, teacher_steps, steps, share: 1.0 }
    }

    #[test]
    fn a_student_with_as_many_steps_is_asked_for_what_its_teacher_says() {
        let (model, config, params, samples, mut draws) = stage();
        let teacher = Teacher::new(&distill(1.0, 4, 4), &model, config.shift, &params).expect("it fits");
        let mut e = Eager::new(Arc::default(), false);
        teacher.teach(&mut e, &mut Rng::new(9), &samples, &mut draws);
        let x: Vec<Vec<f32>> = samples.iter().zip(&draws).map(|(s, d)| noised(s, d)).collect();
        let says = teacher.clean(&mut e, &samples, &draws, &x);
        for (draw, says) in draws.iter().zip(&says) {
            assert!(teacher.sigmas.iter().any(|s| f64::from(*s) == draw.s), "{} is no level", draw.s);
            let target = draw.target.as_ref().expect("all samples are distilled");
            let worst = target.iter().zip(says).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{worst}");
        }
    }

    #[test]
    fn one_step_to_the_target_ends_where_the_guided_teacher_ends() {
        let (model, config, params, samples, mut draws) = stage();
        let teacher = Teacher::new(&distill(2.0, 6, 2), &model, config.shift, &params).expect("it fits");
        let mut e = Eager::new(Arc::default(), false);
        let noise = draws.clone();
        teacher.teach(&mut e, &mut Rng::new(9), &samples, &mut draws);
        for (i, draw) in draws.iter().enumerate() {
            // The same way with its own arithmetic: sample by sample, velocities instead of clean samples.
            let begin = teacher.sigmas.iter().position(|s| f64::from(*s) == draw.s).expect("a level");
            let sample = std::slice::from_ref(&samples[i]);
            let start = noised(&samples[i], draw);
            let mut x = start.clone();
            for k in begin..begin + 3 {
                let (s, next) = (teacher.sigmas[k], teacher.sigmas[k + 1]);
                let seen = Draw {
                    s: f64::from(s),
                    noise: teacher.noise_to(&samples[i], &x, s, &noise[i]),
                    target: None,
                    ..noise[i].clone()
                };
                let blind = Draw { dropped: true, ..seen.clone() };
                let velocity = |e: &mut Eager, d: &Draw| -> Vec<f32> {
                    let clean = teacher.clean(e, sample, std::slice::from_ref(d), std::slice::from_ref(&x));
                    x.iter().zip(&clean[0]).map(|(x, c)| (x - c) / s).collect()
                };
                let (c, u) = (velocity(&mut e, &seen), velocity(&mut e, &blind));
                for ((x, c), u) in x.iter_mut().zip(c).zip(u) {
                    *x += (next - s) * (u + 2.0 * (c - u));
                }
            }
            let r = teacher.sigmas[begin + 3] / teacher.sigmas[begin];
            let target = draw.target.as_ref().expect("all samples are distilled");
            let worst = (start.iter().zip(target))
                .zip(&x)
                .map(|((x, t), end)| (r * x + (1.0 - r) * t - end).abs())
                .fold(0.0, f32::max);
            let way = start.iter().zip(&x).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-3 && way > 0.1, "off by {worst} on a way of {way}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused_by_name() {
        assert!(distill(2.0, 12, 5).validate().unwrap_err().to_string().contains("distill.steps = 5"));
        let share = DistillConfig { share: 1.5, ..distill(2.0, 12, 4) };
        assert!(share.validate().unwrap_err().to_string().contains("distill.share = 1.5"));
        let (model, config, _, _, _) = stage();
        let refused = Teacher::new(&distill(2.0, 4, 2), &model, config.shift, &Params::new()).err();
        assert!(refused.expect("no weights").to_string().contains("expected shape"));
    }
}
