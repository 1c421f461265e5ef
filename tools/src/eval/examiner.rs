//! The examiner: what a picture shows, said without knowing which house it should show.
//!
//! The paper reads points out of imagined frames with VGGT and asks a vision-language model what they show. At the
//! size of the house world neither works, so two small networks take their place. They are trained on the spot, from
//! renders of houses whose seeds no evaluation uses, sent through the codec of the bundle that is examined:
//! * **depth**: one picture to the planar depth of each of its pixels (m);
//! * **name**: what a box holds to the probabilities of the six colours and eight shapes.
//!
//! Neither sees the house under evaluation nor anything of the model but its pictures. How good they are is
//! measured on further houses and reported with every evaluation ([`Quality`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mindseye::image::RgbImage;
use mindseye_engines::model::Ops;
use mindseye_engines::model::dit::dense;
use mindseye_train::eager::backward::accumulate;
use mindseye_train::eager::{Eager, Params, Var};
use mindseye_train::optim::{self, Moments, OptimConfig, Rule};
use mindseye_world::{
    Camera, Colour, Difficulty, Frame, House, Pose2, RenderOptions, Rng, Shape, approach, draw_box,
    goal_pose, project_box, random_drive, random_pose, render_with, wrap_angle,
};
use safetensors::tensor::TensorView;
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Sends groups of pictures through the codec and back.
pub trait Coder {
    /// The pictures as they come out, four for each four that go in.
    ///
    /// # Errors
    /// When the codec fails.
    fn coded(&mut self, frames: &[RgbImage]) -> anyhow::Result<Vec<RgbImage>>;
}

/// How much the examiner is trained.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Houses that pictures are made in.
    pub houses: usize,
    /// Times that each picture is learned from, blurred differently each time.
    pub epochs: usize,
}

impl Default for Effort {
    fn default() -> Self {
        Self { houses: 5000, epochs: 12 }
    }
}

/// How good the examiner is, on houses that it was not trained on.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Quality {
    /// Median relative error of the depth of true, coded pictures.
    pub depth_relative_median: f64,
    /// Share of true boxed things whose colour and shape are both named rightly.
    pub named: f64,
    /// Pictures that depth was measured on.
    pub pictures: usize,
    /// Boxed things.
    pub things: usize,
}

/// Pixels of the cut-out that names are read from.
const CUT: usize = 10;
/// Rows of one share of a batch, and shares of a batch.
const ROWS: usize = 32;
const SHARES: usize = 2;
const BATCH: usize = ROWS * SHARES;
/// Seeds of houses that only the examiner sees.
const SEEDS: u64 = 0x0e8a_0000_0000;

/// See the module.
#[derive(Clone)]
pub struct Examiner {
    depth: Arc<Params>,
    name: Arc<Params>,
    width: usize,
    height: usize,
    nouns: usize,
    /// See [`Quality`].
    pub quality: Quality,
}

/// Pictures and what they show.
#[derive(Default)]
struct Lessons {
    pictures: Vec<(Vec<u8>, Vec<f32>)>,
    things: Vec<(Vec<f32>, usize, usize)>,
}

/// `[rows, inputs]` to `[rows, outputs]`: a layer, two residual layers, a layer.
fn network(e: &mut Eager, x: &Var, name: &str, inputs: usize, hidden: usize, outputs: usize) -> Var {
    e.set_prefix(name);
    let h = dense(e, x, "first", inputs, hidden);
    let mut h = e.gelu_tanh(&h);
    for block in ["second", "third"] {
        let r = e.layer_norm(&h, 1e-5);
        let r = dense(e, &r, block, hidden, hidden);
        let r = e.gelu_tanh(&r);
        h = e.add(&h, &r);
    }
    let h = e.layer_norm(&h, 1e-5);
    let out = dense(e, &h, "last", hidden, outputs);
    e.set_prefix("");
    out
}

#[derive(Clone, Copy)]
struct Shape3 {
    name: &'static str,
    inputs: usize,
    hidden: usize,
    outputs: usize,
}

impl Shape3 {
    fn depth(pixels: usize) -> Self {
        Self { name: "depth.", inputs: 3 * pixels, hidden: 512, outputs: pixels }
    }

    /// For so many nouns.
    fn name(nouns: usize) -> Self {
        Self { name: "name.", inputs: 3 * CUT * CUT + 4, hidden: 256, outputs: Colour::ALL.len() + nouns }
    }

    fn run(&self, e: &mut Eager, rows: usize, x: Vec<f32>) -> Var {
        let x = e.input(&[rows, self.inputs], x);
        network(e, &x, self.name, self.inputs, self.hidden, self.outputs)
    }

    fn fresh(&self, rng: &mut Rng) -> Params {
        let mut e = Eager::collecting();
        self.run(&mut e, 1, vec![0.0; self.inputs]);
        let mut params = e.params().clone();
        for i in 0..params.len() {
            let shape = params.get(i).1.to_vec();
            if let [_, fan] = shape[..] {
                let k = 1.0 / (fan as f32).sqrt();
                params.values_mut(i).iter_mut().for_each(|v| *v = rng.normal() as f32 * k);
            }
        }
        params
    }

    /// Trains on batches with so many workers: `batch(rng)` gives rows and inputs, `gradient(place in the batch, row,
    /// output, to fill)` the gradient of a row.
    fn train(
        &self,
        seed: u64,
        steps: usize,
        workers: usize,
        batch: impl Fn(&mut Rng) -> (Vec<usize>, Vec<f32>) + Sync,
        gradient: impl Fn(usize, usize, &[f32], &mut [f32]) + Sync,
    ) -> Params {
        let mut params = Arc::new(self.fresh(&mut Rng::new(seed)));
        let config = OptimConfig {
            lr: 1.5e-3,
            weight_decay: 0.01,
            momentum: 0.95,
            betas: [0.9, 0.99],
            clip: 1.0,
            muon: false,
        };
        let mut moments = vec![Moments::default(); params.len()];
        let mut interpreters: Vec<Eager> = (0..workers).map(|_| Eager::new(Arc::default(), true)).collect();
        for step in 1..=steps {
            // Shares are drawn by their number, not by who works on them: the result does not depend on the workers.
            let share = |e: &mut Eager, number: usize| {
                let mut rng = Rng::new(seed ^ ((step * SHARES + number) as u64) << 8);
                let (rows, x) = batch(&mut rng);
                e.restart(params.clone());
                let out = self.run(e, rows.len(), x);
                let values = e.value(out).1;
                let mut g = vec![0.0; values.len()];
                let outputs = values.chunks(self.outputs).zip(g.chunks_mut(self.outputs));
                for (k, (row, (v, g))) in rows.iter().zip(outputs).enumerate() {
                    gradient(k, *row, v, g);
                }
                g.iter_mut().for_each(|g| *g /= (rows.len() * SHARES) as f32);
                e.backward(vec![(out, g)]);
                let grads = e.take_grads();
                e.clear();
                grads
            };
            let mut parts: Vec<(usize, Vec<Vec<f32>>)> = std::thread::scope(|scope| {
                let share = &share;
                let handles: Vec<_> = interpreters
                    .iter_mut()
                    .enumerate()
                    .map(|(w, e)| {
                        scope.spawn(move || {
                            (w..SHARES).step_by(workers).map(|n| (n, share(e, n))).collect::<Vec<_>>()
                        })
                    })
                    .collect();
                handles.into_iter().flat_map(|h| h.join().expect("an examiner's worker panicked")).collect()
            });
            parts.sort_by_key(|(n, _)| *n);
            let mut grads: Vec<Vec<f32>> = Vec::new();
            for (_, part) in parts {
                if grads.is_empty() {
                    grads = part;
                } else {
                    grads.iter_mut().zip(&part).for_each(|(sum, g)| accumulate(sum, g));
                }
            }
            let k = step as f64 / steps as f64;
            let lr = config.lr * (step as f64 / 50.0).min(1.0) * (1.0 - k).max(0.0).powf(0.7);
            let weights = Arc::make_mut(&mut params);
            for (i, (grad, moments)) in grads.iter().zip(&mut moments).enumerate() {
                let shape = weights.get(i).1.to_vec();
                let rule = if shape.len() == 2 { Rule::Matrix } else { Rule::Vector };
                optim::update(&config, rule, &shape, weights.values_mut(i), grad, moments, lr, step as u64);
            }
        }
        Arc::unwrap_or_clone(params)
    }
}

/// Why an examiner cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExaminerFileError {
    /// The file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The file is no safetensors file.
    #[error("{path}: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SafeTensorError,
    },
    /// Its weights are not those that were written, or it holds other networks.
    #[error("{path}: damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// How good it is cannot be read or written.
    #[error("{path}: quality: {source}")]
    Quality {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Version of the networks and of how they are trained: whoever changes either changes this, so that examiners
/// that were kept are made again.
const VERSION: u32 = 3;
/// Houses that stand for the world in [`made_for`].
const FINGERPRINT_HOUSES: u64 = 3;

/// Everything that an examiner depends on, as text: version of its training, effort, and a hash of what it would be
/// shown in a few houses. The pictures went through renderer and codec, so another world, camera, difficulty or codec
/// gives another text.
///
/// # Errors
/// When the codec fails.
pub fn made_for(
    difficulty: &Difficulty,
    camera: &Camera,
    effort: Effort,
    coder: &mut dyn Coder,
) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    for house in 0..FINGERPRINT_HOUSES {
        let shown = lessons(difficulty, camera, house, coder)?;
        for (rgb, depth) in &shown.pictures {
            hash.update(rgb);
            depth.iter().for_each(|d| hash.update(d.to_le_bytes()));
        }
        for (cut, colour, shape) in &shown.things {
            cut.iter().for_each(|v| hash.update(v.to_le_bytes()));
            hash.update([*colour as u8, *shape as u8]);
        }
    }
    let shown = mindseye_base::file::hex(&hash.finalize());
    Ok(format!(
        "{VERSION} {}x{} {difficulty:?} {effort:?} seeds {SEEDS:x} shown {shown}",
        camera.width, camera.height
    ))
}

impl Examiner {
    /// Trains the two networks; `coders` gives each worker its codec. The result does not depend on their number.
    ///
    /// # Errors
    /// When the codec fails.
    pub fn train<C: Coder + Send>(
        difficulty: &Difficulty,
        camera: &Camera,
        effort: Effort,
        coders: Vec<C>,
    ) -> anyhow::Result<Self> {
        let workers = coders.len().max(1);
        let (train, test) = all_lessons(difficulty, camera, effort, coders)?;
        let (width, height) = (camera.width, camera.height);
        let nouns = difficulty.nouns().len();
        let name = train_names(&train, effort, workers, nouns);
        let depth = train_depth(&train, effort, workers, width, height);
        let mut out = Self {
            depth: Arc::new(depth),
            name: Arc::new(name),
            width,
            height,
            nouns,
            quality: Quality {
                depth_relative_median: f64::NAN,
                named: f64::NAN,
                pictures: test.pictures.len(),
                things: test.things.len(),
            },
        };
        out.quality(&test);
        Ok(out)
    }

    /// Writes the networks as safetensors, whole or not at all; `made_for` says for what.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, made_for: &str) -> Result<(), ExaminerFileError> {
        let format = |source| ExaminerFileError::Format { path: path.to_path_buf(), source };
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = [&self.depth, &self.name]
            .into_iter()
            .flat_map(|p| (0..p.len()).map(|i| p.get(i)))
            .map(|(name, shape, v)| {
                (name.to_owned(), shape.to_vec(), v.iter().flat_map(|v| v.to_le_bytes()).collect())
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, shape, data)| {
                let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
                Ok((name.as_str(), view.map_err(format)?))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let quality = serde_json::to_string(&self.quality)
            .map_err(|source| ExaminerFileError::Quality { path: path.to_path_buf(), source })?;
        let about = [
            ("made_for".to_owned(), made_for.to_owned()),
            ("nouns".to_owned(), self.nouns.to_string()),
            ("quality".to_owned(), quality),
            ("weights".to_owned(), self.weights_hash()),
        ];
        let data = safetensors::serialize(views, Some(about.into_iter().collect())).map_err(format)?;
        mindseye_base::file::replace(path, &data)
            .map_err(|source| ExaminerFileError::Io { path: path.to_path_buf(), source })
    }

    /// SHA-256 of all weights in their order.
    fn weights_hash(&self) -> String {
        let mut hash = Sha256::new();
        for params in [&self.depth, &self.name] {
            for i in 0..params.len() {
                params.get(i).2.iter().for_each(|v| hash.update(v.to_le_bytes()));
            }
        }
        mindseye_base::file::hex(&hash.finalize())
    }

    /// Reads what [`Examiner::save`] wrote; none when it was made for something else.
    ///
    /// # Errors
    /// A file that cannot be read, holds other networks, or is not as it was written.
    pub fn load(path: &Path, made_for: &str, camera: &Camera) -> Result<Option<Self>, ExaminerFileError> {
        let at = || path.to_path_buf();
        let format = |source| ExaminerFileError::Format { path: at(), source };
        let damaged = |what: String| ExaminerFileError::Damaged { path: at(), what };
        let bytes = std::fs::read(path).map_err(|source| ExaminerFileError::Io { path: at(), source })?;
        let (_, head) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let about = head.metadata().clone().unwrap_or_default();
        if about.get("made_for").map(String::as_str) != Some(made_for) {
            return Ok(None);
        }
        let quality = about.get("quality").ok_or_else(|| damaged("no quality".to_owned()))?;
        let quality = serde_json::from_str(quality)
            .map_err(|source| ExaminerFileError::Quality { path: at(), source })?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let take = |net: Shape3| -> Result<Arc<Params>, ExaminerFileError> {
            let mut params = net.fresh(&mut Rng::new(0));
            for i in 0..params.len() {
                let (name, shape, _) = params.get(i);
                let found = tensors.tensor(name).map_err(format)?;
                if found.shape() != shape || found.dtype() != safetensors::Dtype::F32 {
                    let got = found.shape();
                    return Err(damaged(format!("{name} is {got:?}, expected f32 {shape:?}")));
                }
                let values =
                    found.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                *params.values_mut(i) = values.collect();
            }
            Ok(Arc::new(params))
        };
        let (width, height) = (camera.width, camera.height);
        // Examiners of plain worlds do not say how many nouns they know.
        let nouns =
            about.get("nouns").and_then(|n| n.parse::<usize>().ok()).filter(|n| *n <= Shape::ALL.len());
        let nouns = nouns.unwrap_or(Shape::PLAIN.len());
        let (depth, name) = (take(Shape3::depth(width * height))?, take(Shape3::name(nouns))?);
        let out = Self { depth, name, width, height, nouns, quality };
        if about.get("weights") != Some(&out.weights_hash()) {
            return Err(damaged("its weights are not those that were written".to_owned()));
        }
        Ok(Some(out))
    }

    fn quality(&mut self, test: &Lessons) {
        let mut e = Eager::new(Arc::default(), false);
        let mut errors = Vec::new();
        for (rgb, truth) in &test.pictures {
            let image = RgbImage { width: self.width, height: self.height, data: rgb.clone() };
            let depth = self.depth(&mut e, &[&image]);
            errors.extend(depth[0].iter().zip(truth).map(|(d, t)| f64::from((d / t - 1.0).abs())));
        }
        self.quality.depth_relative_median = mindseye_base::stats::median(&mut errors);
        let right = test
            .things
            .iter()
            .filter(|(cut, colour, shape)| {
                let (c, s) = self.names(&mut e, cut.clone());
                best(&c) == *colour && best(&s) == *shape
            })
            .count();
        self.quality.named = right as f64 / test.things.len().max(1) as f64;
    }

    /// Planar depth (m) of every pixel of every picture.
    pub fn depth(&self, e: &mut Eager, pictures: &[&RgbImage]) -> Vec<Vec<f32>> {
        // As it is and mirrored, the mean of both logarithms.
        let value = |v: &u8| f32::from(*v) / 127.5 - 1.0;
        let mut x: Vec<f32> = pictures.iter().flat_map(|p| p.data.iter().map(value)).collect();
        for p in pictures {
            for row in p.data.chunks_exact(3 * self.width) {
                x.extend(row.rchunks_exact(3).flatten().map(value));
            }
        }
        e.restart(self.depth.clone());
        let pixels = self.width * self.height;
        let out = Shape3::depth(pixels).run(e, 2 * pictures.len(), x);
        let (plain, mirrored) = e.value(out).1.split_at(pictures.len() * pixels);
        plain
            .chunks(self.width)
            .zip(mirrored.chunks(self.width))
            .flat_map(|(a, b)| a.iter().zip(b.iter().rev()).map(|(a, b)| (0.5 * (a + b)).exp()))
            .collect::<Vec<f32>>()
            .chunks(pixels)
            .map(<[f32]>::to_vec)
            .collect()
    }

    /// Probabilities of the colours and of the shapes of what a box holds; `edges` are `x0, y0, x1, y1` in
    /// continuous pixels.
    pub fn name(&self, e: &mut Eager, picture: &RgbImage, edges: [f64; 4]) -> (Vec<f32>, Vec<f32>) {
        self.names(e, cut_out(picture, edges))
    }

    fn names(&self, e: &mut Eager, cut: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
        e.restart(self.name.clone());
        let out = Shape3::name(self.nouns).run(e, 1, cut);
        let v = e.value(out).1;
        (softmax(&v[..Colour::ALL.len()]), softmax(&v[Colour::ALL.len()..]))
    }
}

/// Lessons of all houses, to train on and kept apart: a fixed share of the houses for each worker, joined in their order.
fn all_lessons<C: Coder + Send>(
    difficulty: &Difficulty,
    camera: &Camera,
    effort: Effort,
    coders: Vec<C>,
) -> anyhow::Result<(Lessons, Lessons)> {
    let held_out = (effort.houses / 20).clamp(4, 60);
    let all = effort.houses + held_out;
    let workers = coders.len().max(1);
    let parts: Vec<anyhow::Result<Vec<(usize, Lessons)>>> = std::thread::scope(|scope| {
        let handles: Vec<_> = coders
            .into_iter()
            .enumerate()
            .map(|(w, mut coder)| {
                scope.spawn(move || {
                    (w..all)
                        .step_by(workers)
                        .map(|h| Ok((h, lessons(difficulty, camera, h as u64, &mut coder)?)))
                        .collect()
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().expect("an examiner's worker panicked")).collect()
    });
    let mut made = Vec::new();
    for part in parts {
        made.extend(part?);
    }
    made.sort_by_key(|(h, _)| *h);
    let (mut train, mut test) = (Lessons::default(), Lessons::default());
    for (h, l) in made {
        let to = if h < effort.houses { &mut train } else { &mut test };
        to.pictures.extend(l.pictures);
        to.things.extend(l.things);
    }
    Ok((train, test))
}

/// The network that names what a box holds: cross-entropy of colour and shape.
fn train_names(train: &Lessons, effort: Effort, workers: usize, nouns: usize) -> Params {
    let count = train.things.len().max(1);
    let batch = |rng: &mut Rng| {
        let rows: Vec<usize> = (0..ROWS).map(|_| rng.below(count)).collect();
        let mut x = Vec::new();
        for r in &rows {
            let (cut, k, shift) = (&train.things[*r].0, 0.06 * rng.unit(), rng.range(-0.08, 0.08));
            x.extend(cut.iter().map(|v| v + (k * rng.normal() + shift) as f32));
        }
        (rows, x)
    };
    let steps = (effort.epochs * count / BATCH).clamp(1, 8000);
    Shape3::name(nouns).train(2, steps, workers, batch, |_, row, v, g| {
        let (_, colour, shape) = train.things[row];
        let (a, b) = g.split_at_mut(Colour::ALL.len());
        for (g, v, wanted) in [(a, &v[..Colour::ALL.len()], colour), (b, &v[Colour::ALL.len()..], shape)] {
            g.copy_from_slice(&softmax(v));
            g[wanted] -= 1.0;
        }
    })
}

/// The network that gives the depth of every pixel: about the absolute error in metres, since that is what SD is made of.
fn train_depth(train: &Lessons, effort: Effort, workers: usize, width: usize, height: usize) -> Params {
    let count = train.pictures.len().max(1);
    let batch = |rng: &mut Rng| {
        let rows: Vec<usize> = (0..ROWS).map(|_| rng.below(count)).collect();
        let mut x = Vec::new();
        for (k, r) in rows.iter().enumerate() {
            // Every second row is mirrored, here and in its answer.
            soften(rng, &train.pictures[*r].0, width, k % 2 == 1, &mut x);
        }
        (rows, x)
    };
    let steps = effort.epochs * count / BATCH + 1;
    Shape3::depth(width * height).train(1, steps, workers, batch, |k, row, v, g| {
        for (p, (g, v)) in g.iter_mut().zip(v).enumerate() {
            let from = if k % 2 == 1 { p / width * width + width - 1 - p % width } else { p };
            let want = train.pictures[row].1[from];
            let d = v - want.ln();
            *g = want * d / (d * d + 0.0009).sqrt() / (2.5 * (width * height) as f32);
        }
    })
}

/// Index of the largest value.
#[must_use]
pub fn best(v: &[f32]) -> usize {
    v.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i)
}

fn softmax(v: &[f32]) -> Vec<f32> {
    let top = v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f32> = v.iter().map(|v| (v - top).exp()).collect();
    let sum: f32 = e.iter().sum();
    e.into_iter().map(|v| v / sum).collect()
}

/// A picture in -1..1, blended with a blurred copy and with some noise: imagined pictures are not sharp.
fn soften(rng: &mut Rng, rgb: &[u8], width: usize, mirrored: bool, out: &mut Vec<f32>) {
    let height = rgb.len() / 3 / width;
    let (k, noise) = (rng.unit() as f32, 0.05 * rng.unit());
    for y in 0..height {
        for i in 0..width {
            let x = if mirrored { width - 1 - i } else { i };
            for c in 0..3 {
                let at = |x: usize, y: usize| f32::from(rgb[(y * width + x) * 3 + c]);
                let (mut sum, mut n) = (0.0, 0.0);
                for v in y.saturating_sub(1)..(y + 2).min(height) {
                    for u in x.saturating_sub(1)..(x + 2).min(width) {
                        sum += at(u, v);
                        n += 1.0;
                    }
                }
                let v = (1.0 - k) * at(x, y) + k * sum / n;
                out.push(v / 127.5 - 1.0 + (noise * rng.normal()) as f32);
            }
        }
    }
}

/// What a box holds with a margin of one pixel, resampled to [`CUT`] squared, and the box's place and size.
fn cut_out(picture: &RgbImage, [x0, y0, x1, y1]: [f64; 4]) -> Vec<f32> {
    let (w, h) = (picture.width as f64, picture.height as f64);
    let mut out = Vec::with_capacity(3 * CUT * CUT + 4);
    for j in 0..CUT {
        for i in 0..CUT {
            let place =
                |lo: f64, hi: f64, k: usize| lo - 1.0 + (hi - lo + 2.0) * (k as f64 + 0.5) / CUT as f64 - 0.5;
            let (x, y) = (place(x0, x1, i).clamp(0.0, w - 1.0), place(y0, y1, j).clamp(0.0, h - 1.0));
            let (a, b) = (x.floor(), y.floor());
            let (fx, fy) = (x - a, y - b);
            for c in 0..3 {
                let at = |x: f64, y: f64| {
                    let (x, y) = ((x as usize).min(picture.width - 1), (y as usize).min(picture.height - 1));
                    f64::from(picture.data[(y * picture.width + x) * 3 + c])
                };
                let top = at(a, b) * (1.0 - fx) + at(a + 1.0, b) * fx;
                let low = at(a, b + 1.0) * (1.0 - fx) + at(a + 1.0, b + 1.0) * fx;
                out.push(((top * (1.0 - fy) + low * fy) / 127.5 - 1.0) as f32);
            }
        }
    }
    out.extend([(x0 + x1) / w - 1.0, (y0 + y1) / h - 1.0, (x1 - x0) / w, (y1 - y0) / h].map(|v| v as f32));
    out
}

/// What one house teaches.
fn lessons(
    difficulty: &Difficulty,
    camera: &Camera,
    index: u64,
    coder: &mut dyn Coder,
) -> anyhow::Result<Lessons> {
    let house = House::generate(SEEDS + index, difficulty);
    let mut rng = Rng::new(SEEDS ^ index);
    let mut frame = Frame::new();
    let mut out = Lessons::default();
    let still = |house: &House, pose: Pose2, frame: &mut Frame| {
        let options = RenderOptions { ids: false, ..RenderOptions::default() };
        render_with(house, pose, camera, options, frame);
        let image = RgbImage { width: camera.width, height: camera.height, data: frame.rgb.clone() };
        (image, frame.depth.clone())
    };
    // Drives, as they are imagined: there and about.
    let object = rng.below(house.objects.len());
    let there = approach(&house, random_pose(&house, &mut rng), object, 17).poses;
    let about = random_drive(&house, &mut rng, 9);
    for group in there[1..].chunks_exact(4).chain(about[1..].chunks_exact(4)) {
        let (images, depths): (Vec<RgbImage>, Vec<Vec<f32>>) =
            group.iter().map(|p| still(&house, *p, &mut frame)).unzip();
        let coded = coder.coded(&images)?;
        out.pictures.extend(coded.into_iter().map(|c| c.data).zip(depths));
    }
    // Things in their boxes, from about where drives end.
    for (i, o) in house.objects.iter().enumerate() {
        let start = random_pose(&house, &mut rng);
        let Some(goal) = goal_pose(&house, start, i) else { continue };
        let pose = Pose2::unwrapped(
            goal.x + 0.15 * rng.normal(),
            goal.y + 0.15 * rng.normal(),
            wrap_angle(goal.yaw + 0.12 * rng.normal()),
        );
        if house.clearance(pose.x, pose.y) < 0.15 {
            continue;
        }
        let Some(area) = project_box(&house, pose, camera, i) else { continue };
        let (mut image, depth) = still(&house, pose, &mut frame);
        draw_box(&mut image.data, camera.width, area, [255, 0, 0]);
        let coded = coder.coded(&[image.clone(), image.clone(), image.clone(), image])?;
        let Some(shown) = coded.into_iter().next() else { continue };
        // The outline's pixels, found to within one.
        let edges: [f64; 4] = std::array::from_fn(|k| {
            let v = f64::from(area[k]);
            (if k < 2 { v.floor() } else { v.ceil() }) + [-1.0, 0.0, 0.0, 0.0, 0.0, 1.0][rng.below(6)]
        });
        out.things.push((cut_out(&shown, edges), o.colour.index(), o.shape.index()));
        out.pictures.push((shown.data, depth));
    }
    Ok(out)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A codec that changes nothing.
    pub(in crate::eval) struct Plain;

    impl Coder for Plain {
        fn coded(&mut self, frames: &[RgbImage]) -> anyhow::Result<Vec<RgbImage>> {
            Ok(frames.to_vec())
        }
    }

    /// A codec that darkens.
    struct Dark;

    impl Coder for Dark {
        fn coded(&mut self, frames: &[RgbImage]) -> anyhow::Result<Vec<RgbImage>> {
            let dark = |f: &RgbImage| RgbImage { data: f.data.iter().map(|v| v / 2).collect(), ..*f };
            Ok(frames.iter().map(dark).collect())
        }
    }

    #[test]
    fn what_an_examiner_is_made_for_changes_with_everything_that_it_depends_on() {
        let (plain, camera) = (Difficulty::plain(), Camera::new(24, 16));
        let effort = Effort { houses: 4, epochs: 1 };
        let of = |difficulty: &Difficulty, camera: &Camera, effort: Effort, coder: &mut dyn Coder| {
            made_for(difficulty, camera, effort, coder).expect("the codec works")
        };
        let first = of(&plain, &camera, effort, &mut Plain);
        assert_eq!(first, of(&plain, &camera, effort, &mut Plain));
        let house = Difficulty::named("house").expect("it is known");
        let other = [
            of(&house, &camera, effort, &mut Plain),
            of(&plain, &Camera::new(48, 32), effort, &mut Plain),
            of(&plain, &Camera { pitch_rad: camera.pitch_rad + 0.1, ..camera }, effort, &mut Plain),
            of(&plain, &camera, Effort { houses: 5, ..effort }, &mut Plain),
            of(&plain, &camera, Effort { epochs: 2, ..effort }, &mut Plain),
            of(&plain, &camera, effort, &mut Dark),
        ];
        for (k, text) in other.iter().enumerate() {
            assert!(*text != first && !other[..k].contains(text), "{k}: {text}");
        }
    }

    #[test]
    fn cut_outs_and_chances_by_hand() {
        // The left half is red, the right half blue; a box over the whole picture.
        let mut picture = RgbImage::filled(8, 4, [255, 0, 0]);
        for at in 0..32 {
            if at % 8 >= 4 {
                picture.data[3 * at..3 * at + 3].copy_from_slice(&[0, 0, 255]);
            }
        }
        let cut = cut_out(&picture, [0.0, 0.0, 8.0, 4.0]);
        assert_eq!(cut.len(), 3 * CUT * CUT + 4);
        assert_eq!(
            (&cut[..3], &cut[3 * (CUT - 1)..3 * CUT]),
            (&[1.0, -1.0, -1.0][..], &[-1.0, -1.0, 1.0][..])
        );
        // Centre in -1..1, size as shares.
        assert_eq!(cut[3 * CUT * CUT..], [0.0, 0.0, 1.0, 1.0]);
        let p = softmax(&[0.0, 0.0, std::f32::consts::LN_2]);
        assert!((p[0] - 0.25).abs() < 1e-6 && (p[2] - 0.5).abs() < 1e-6, "{p:?}");
        assert_eq!((best(&[0.1, 0.7, 0.2]), best(&[])), (1, 0));
    }

    #[test]
    fn depth_is_the_mean_of_a_picture_and_its_mirror() {
        let (difficulty, camera) = (Difficulty::plain(), Camera::new(24, 16));
        let effort = Effort { houses: 2, epochs: 1 };
        let examiner = Examiner::train(&difficulty, &camera, effort, vec![Plain]).expect("it trains");
        let mut e = Eager::new(Arc::default(), false);
        let image = RgbImage {
            data: (0..24 * 16 * 3).map(|i| (i * 7 % 251) as u8).collect(),
            ..RgbImage::filled(24, 16, [0; 3])
        };
        let mirrored = RgbImage {
            data: image
                .data
                .chunks(72)
                .flat_map(|r| r.rchunks(3).flatten().copied().collect::<Vec<u8>>())
                .collect(),
            ..image
        };
        let both = examiner.depth(&mut e, &[&image, &mirrored]);
        for (row, back) in both[0].chunks(24).zip(both[1].chunks(24)) {
            for (a, b) in row.iter().zip(back.iter().rev()) {
                assert!((a / b - 1.0).abs() < 1e-4, "{a} {b}");
            }
        }
        // The number of workers does not matter.
        let two = Examiner::train(&difficulty, &camera, effort, vec![Plain, Plain]).expect("it trains");
        assert_eq!(two.weights_hash(), examiner.weights_hash());
        // By hand: the quality is that of the held-out pictures, each counted once.
        assert!(examiner.quality.pictures > 0 && examiner.quality.depth_relative_median > 0.0);
    }
}
