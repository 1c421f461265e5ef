//! Cases of the three networks.

use std::path::Path;

use anyhow::{Context, ensure};
use mindseye_engines::{
    count::{vae_decoder_caches, vae_encoder_caches},
    denoise::sinusoid,
    model::{
        Ops,
        dit::{self, DitConfig, DitInputs},
        umt5::{self, Umt5Config, Umt5Inputs},
        vae::{self, Chunk, VaeConfig},
    },
    onnx::Dim,
    sampler::guide,
};

use super::{
    Case, Json, Report, Vectors,
    engine::{Array, Engine, Inputs, Outputs, Program, Via},
};

const TOLERANCE: f64 = 1e-4;
/// Added to the score of a key that may not be seen.
const MASKED: f32 = -1e9;

// ---------------------------------------------------------------------------------------------- transformer

/// One forward pass of the transformer.
pub(super) struct DitProgram {
    pub(super) cfg: DitConfig,
    /// A mask is given.
    pub(super) bias: bool,
    /// Keys and values of earlier tokens are given.
    pub(super) memory: bool,
    /// Keys and values are wanted.
    pub(super) keep: bool,
}

impl Program for DitProgram {
    fn key(&self) -> String {
        format!("dit bias={} memory={} keep={} {:?}", self.bias, self.memory, self.keep, self.cfg)
    }

    fn dims(&self, input: &str, shape: &[usize]) -> Vec<Dim> {
        let symbols: &[(usize, &str)] = match input {
            "latents" => &[(2, "frames")],
            "rows" => &[(1, "frames")],
            "time" => &[(0, "timesteps")],
            "cos" | "sin" => &[(0, "tokens")],
            "bias" => &[(2, "tokens"), (3, "keys")],
            "text" => &[],
            _ => &[(1, "memory")],
        };
        let mut dims: Vec<Dim> = shape.iter().map(|s| Dim::Fixed(*s)).collect();
        for (axis, symbol) in symbols {
            dims[*axis] = Dim::Symbol((*symbol).to_owned());
        }
        dims
    }

    fn rank(&self, output: &str) -> usize {
        if output == "sample" { 5 } else { 4 }
    }

    fn build<O: Ops>(&self, o: &mut O, t: &[O::Tensor], i: &[O::Index]) -> Vec<(String, O::Tensor)> {
        let [latents, time, text, cos, sin, rest @ ..] = t else {
            unreachable!("five inputs are always given")
        };
        let (bias, rest) = if self.bias { (rest.first(), &rest[1..]) } else { (None, rest) };
        let memory: Vec<_> = rest.as_chunks::<2>().0.iter().map(|[k, v]| (k.clone(), v.clone())).collect();
        let inputs = DitInputs {
            latents,
            time,
            rows: &i[0],
            row_batch: None,
            text,
            cos,
            sin,
            camera: None,
            guide: None,
            bias,
            memory: self.memory.then_some(memory.as_slice()),
        };
        let out = dit::forward(o, &self.cfg, &inputs);
        let mut named = vec![("sample".to_owned(), out.sample)];
        if self.keep {
            for (layer, (k, v)) in out.memory.into_iter().enumerate() {
                named.push((format!("k{layer}"), k));
                named.push((format!("v{layer}"), v));
            }
        }
        named
    }
}

/// What one forward pass is given.
pub(super) struct DitCase<'a> {
    /// `[batch, channels, frames, h, w]`.
    pub(super) latents: &'a [f32],
    pub(super) batch: usize,
    pub(super) frames: usize,
    /// Timestep of every `[batch, frame]`.
    pub(super) timesteps: &'a [f32],
    /// Temporal index of every frame.
    pub(super) t_index: &'a [f64],
    /// `[batch, text_len, text_dim]`.
    pub(super) text: &'a [f32],
    /// `[tokens, tokens]`, nonzero where a query (row) may look.
    pub(super) mask: Option<&'a [i64]>,
    /// Keys and values of earlier tokens, each with its shape.
    pub(super) memory: &'a [Array],
}

/// Runs the transformer; timesteps are computed once per distinct value.
pub(super) fn run_dit(
    engine: &mut Engine,
    cfg: &DitConfig,
    case: &DitCase,
    keep: bool,
) -> anyhow::Result<Outputs> {
    let mut distinct: Vec<f32> = Vec::new();
    let mut rows = Vec::new();
    for t in case.timesteps {
        let at = distinct.iter().position(|d| d == t).unwrap_or_else(|| {
            distinct.push(*t);
            distinct.len() - 1
        });
        rows.push(at);
    }
    ensure!(rows.len() == case.batch * case.frames, "{} timesteps for {} frames", rows.len(), case.frames);
    let (cos, sin) = cfg.rotary_tables(case.t_index);
    let mut inputs = Inputs::default();
    let latent_shape = [case.batch, cfg.in_channels, case.frames, cfg.latent_height, cfg.latent_width];
    inputs.tensor("latents", &latent_shape, case.latents.to_vec());
    let time = distinct.iter().flat_map(|t| sinusoid(f64::from(*t), cfg.freq_dim)).collect();
    inputs.tensor("time", &[distinct.len(), cfg.freq_dim], time);
    inputs.tensor("text", &[case.batch, cfg.text_len, cfg.text_dim], case.text.to_vec());
    let tokens = case.frames * cfg.tokens_per_frame();
    inputs.tensor("cos", &[tokens, cfg.head_dim / 2], cos);
    inputs.tensor("sin", &[tokens, cfg.head_dim / 2], sin);
    if let Some(mask) = case.mask {
        let bias = mask.iter().map(|m| if *m == 0 { MASKED } else { 0.0 }).collect();
        inputs.tensor("bias", &[1, 1, tokens, tokens], bias);
    }
    for (i, (shape, data)) in case.memory.iter().enumerate() {
        inputs.tensor(&format!("past_{}{}", ["k", "v"][i % 2], i / 2), shape, data.clone());
    }
    inputs.index("rows", &[case.batch, case.frames], rows);
    let program =
        DitProgram { cfg: cfg.clone(), bias: case.mask.is_some(), memory: !case.memory.is_empty(), keep };
    engine.run(&program, &inputs)
}

/// A case file of the transformer, read.
struct DitVectors {
    v: Vectors,
    cfg: DitConfig,
    latents: Vec<f32>,
    batch: usize,
    frames: usize,
    timesteps: Vec<f32>,
    t_index: Vec<f64>,
    text: Vec<f32>,
    mask: Option<Vec<i64>>,
}

impl DitVectors {
    fn open(json: &Json, path: &Path) -> anyhow::Result<Self> {
        let v = Vectors::open(path)?;
        let [batch, _, frames, height, width] = v.sizes("in.hidden_states")?;
        let [_, text_len, _] = v.sizes("in.encoder_hidden_states")?;
        let cfg = json.dit([height, width], text_len)?;
        let given = v.f32("in.timestep")?;
        // One per batch entry, or one per token: then every frame's first token stands for the frame.
        let timesteps: Vec<f32> = if v.shape("in.timestep")?.len() == 1 {
            given.iter().flat_map(|t| std::iter::repeat_n(*t, frames)).collect()
        } else {
            given.chunks(cfg.tokens_per_frame()).map(|tokens| tokens[0]).collect()
        };
        let t_index = v.i64("in.t_index")?.iter().map(|i| *i as f64).collect();
        Ok(Self {
            latents: v.f32("in.hidden_states")?,
            text: v.f32("in.encoder_hidden_states")?,
            mask: v.has("in.attn_mask").then(|| v.i64("in.attn_mask")).transpose()?,
            v,
            cfg,
            batch,
            frames,
            timesteps,
            t_index,
        })
    }

    fn case(&self) -> DitCase<'_> {
        DitCase {
            latents: &self.latents,
            batch: self.batch,
            frames: self.frames,
            timesteps: &self.timesteps,
            t_index: &self.t_index,
            text: &self.text,
            mask: self.mask.as_deref(),
            memory: &[],
        }
    }
}

pub(super) fn dit(dir: &Path, via: Via, report: &mut Report) {
    let dir = dir.join("dit");
    let Ok(listing) = std::fs::read_dir(&dir) else { return };
    let mut names: Vec<String> = listing
        .filter_map(|entry| entry.ok()?.file_name().to_str().map(str::to_owned))
        .filter_map(|name| Some(name.strip_prefix("case_")?.strip_suffix(".safetensors")?.to_owned()))
        .collect();
    names.sort();
    let opened = || {
        anyhow::Ok((Json::open(&dir.join("config.json"))?, Vectors::open(&dir.join("weights.safetensors"))?))
    };
    let tolerance = via.tolerance(TOLERANCE);
    for name in names {
        let path = |name: &str| dir.join(format!("case_{name}.safetensors"));
        report.case(via.name(), Case::new(format!("dit/{name}"), tolerance), |case| {
            let (json, weights) = opened()?;
            let mut engine = Engine::new(via, &weights)?;
            if name == "joint_cfg" {
                return joint_cfg(&json, &mut engine, &dir, case);
            }
            let d = DitVectors::open(&json, &path(&name))?;
            let out = run_dit(&mut engine, &d.cfg, &d.case(), false)?;
            case.compare("out.sample", out.data("sample")?, &d.v.f32("out.sample")?)?;
            compare_marks(&d.v, &out, case)
        });
        let masked = Vectors::open(&path(&name)).is_ok_and(|v| v.has("in.attn_mask"));
        if masked {
            let case = Case::new(format!("dit/{name} (prefill + cached)"), tolerance);
            report.case(via.name(), case, |case| {
                let (json, weights) = opened()?;
                let mut engine = Engine::new(via, &weights)?;
                prefill_cached(&DitVectors::open(&json, &path(&name))?, &mut engine, case)
            });
        }
    }
}

/// Intermediate values that our network names too.
fn compare_marks(v: &Vectors, out: &Outputs, case: &mut Case) -> anyhow::Result<()> {
    for (mark, (_, data)) in &out.marks {
        let name = match mark.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
            Some((layer, "out")) => format!("mid.block{layer}.out"),
            Some((layer, part)) => format!("mid.block{layer}.{part}_out"),
            None => format!("mid.{mark}"),
        };
        if v.has(&name) {
            case.compare(&name, data, &v.f32(&name)?)?;
        }
    }
    Ok(())
}

/// Frames `from..to` of `x[batch, channels, frames, ..]`.
pub(super) fn frame_range(x: &[f32], outer: usize, frames: usize, from: usize, to: usize) -> Vec<f32> {
    let plane = x.len() / (outer * frames);
    x.chunks(frames * plane).flat_map(|c| &c[from * plane..to * plane]).copied().collect()
}

/// Both branches of the joint guidance from their own cases, their target frames, and the combination.
fn joint_cfg(json: &Json, engine: &mut Engine, dir: &Path, case: &mut Case) -> anyhow::Result<()> {
    let v = Vectors::open(&dir.join("case_joint_cfg.safetensors"))?;
    let weight = v.number("w")? as f32;
    let [_, _, targets, _, _] = v.sizes("out.v")?;
    let mut branch = |name: &str| {
        let d = DitVectors::open(json, &dir.join(format!("case_{name}.safetensors")))?;
        let out = run_dit(engine, &d.cfg, &d.case(), false)?;
        let outer = d.batch * d.cfg.out_channels;
        anyhow::Ok(frame_range(out.data("sample")?, outer, d.frames, d.frames - targets, d.frames))
    };
    let conditional = branch("ctx_gap50_cond")?;
    let mut velocity = branch("ctx_gap50_uncond_t1000")?;
    case.compare("v_cond", &conditional, &v.f32("v_cond")?)?;
    case.compare("v_uncond", &velocity, &v.f32("v_uncond")?)?;
    guide(&mut velocity, &conditional, weight);
    case.compare("out.v", &velocity, &v.f32("out.v")?)
}

/// Context alone, its keys and values kept, then the targets alone: the same as the masked joint forward.
fn prefill_cached(d: &DitVectors, engine: &mut Engine, case: &mut Case) -> anyhow::Result<()> {
    let mask = d.mask.as_deref().context("a masked case is needed")?;
    let per_frame = d.cfg.tokens_per_frame();
    let tokens = d.frames * per_frame;
    ensure!(d.batch == 1, "one batch entry is expected");
    // The context is what the first token may see; the mask must be the one-way mask of that context.
    let context_tokens = mask[..tokens].iter().filter(|m| **m != 0).count();
    let context = context_tokens / per_frame;
    for (i, m) in mask.iter().enumerate() {
        let (query, key) = (i / tokens, i % tokens);
        ensure!((*m != 0) == (query >= context_tokens || key < context_tokens), "not a one-way mask");
    }
    let all = d.v.f32("out.sample")?;
    let mut run = |from: usize, to: usize, memory: &[Array], keep: bool| {
        let latents = frame_range(&d.latents, d.cfg.in_channels, d.frames, from, to);
        let wanted = frame_range(&all, d.cfg.out_channels, d.frames, from, to);
        let pass = DitCase {
            latents: &latents,
            batch: 1,
            frames: to - from,
            timesteps: &d.timesteps[from..to],
            t_index: &d.t_index[from..to],
            text: &d.text,
            mask: None,
            memory,
        };
        anyhow::Ok((run_dit(engine, &d.cfg, &pass, keep)?, wanted))
    };
    let (prefill, wanted) = run(0, context, &[], true)?;
    case.compare("out.sample of the context", prefill.data("sample")?, &wanted)?;
    let mut memory = Vec::new();
    for layer in 0..d.cfg.layers {
        memory.push(prefill.get(&format!("k{layer}"))?.clone());
        memory.push(prefill.get(&format!("v{layer}"))?.clone());
    }
    let (cached, wanted) = run(context, d.frames, &memory, false)?;
    case.compare("out.sample of the targets", cached.data("sample")?, &wanted)
}

// --------------------------------------------------------------------------------------------- text encoder

struct Umt5Program(Umt5Config);

impl Program for Umt5Program {
    fn key(&self) -> String {
        format!("umt5 {:?}", self.0)
    }

    fn rank(&self, _: &str) -> usize {
        3
    }

    fn build<O: Ops>(&self, o: &mut O, t: &[O::Tensor], i: &[O::Index]) -> Vec<(String, O::Tensor)> {
        let inputs = Umt5Inputs { ids: &i[0], buckets: &i[1], mask_bias: &t[0], keep: &t[1] };
        let out = umt5::encode(o, &self.0, &inputs);
        vec![("hidden".to_owned(), out.hidden), ("rows".to_owned(), out.rows)]
    }
}

/// Runs the text encoder on `ids[batch, length]` of which `lengths` are tokens.
pub(super) fn run_umt5(
    engine: &mut Engine,
    cfg: &Umt5Config,
    ids: Vec<usize>,
    lengths: &[usize],
) -> anyhow::Result<Outputs> {
    let (batch, length) = (lengths.len(), ids.len() / lengths.len());
    let (bias, keep) = umt5::host_inputs(lengths, length);
    let mut inputs = Inputs::default();
    inputs.tensor("mask_bias", &[batch, 1, 1, length], bias);
    inputs.tensor("keep", &[batch, length, 1], keep);
    inputs.index("ids", &[batch, length], ids);
    inputs.index("buckets", &[length, length], cfg.bucket_table(length));
    engine.run(&Umt5Program(cfg.clone()), &inputs)
}

/// Tokens per batch entry of a mask that is ones, then zeros.
pub(super) fn mask_lengths(mask: &[i64], batch: usize) -> anyhow::Result<Vec<usize>> {
    let rows = mask.chunks(mask.len() / batch);
    rows.map(|row| {
        let used = row.iter().filter(|m| **m != 0).count();
        ensure!(row[..used].iter().all(|m| *m != 0), "the mask is not ones, then zeros");
        Ok(used)
    })
    .collect()
}

pub(super) fn umt5(dir: &Path, via: Via, report: &mut Report) {
    let dir = dir.join("umt5");
    let path = dir.join("case.safetensors");
    if !path.exists() {
        return;
    }
    report.case(via.name(), Case::new("umt5", via.tolerance(TOLERANCE)), |case| {
        let cfg = Json::open(&dir.join("config.json"))?.umt5()?;
        let mut engine = Engine::new(via, &Vectors::open(&dir.join("weights.safetensors"))?)?;
        let v = Vectors::open(&path)?;
        let [batch, _] = v.sizes("in.ids")?;
        let lengths = mask_lengths(&v.i64("in.mask")?, batch)?;
        let out = run_umt5(&mut engine, &cfg, v.rows("in.ids")?, &lengths)?;
        case.compare("out.last_hidden_state", out.data("hidden")?, &v.f32("out.last_hidden_state")?)?;
        case.compare("out.zero_padded", out.data("rows")?, &v.f32("out.zero_padded")?)?;
        if v.has("mid.bucket.rel") {
            let ours: Vec<usize> = v.i64("mid.bucket.rel")?.iter().map(|r| cfg.bucket(*r)).collect();
            case.equal("mid.bucket.id", ours, v.rows("mid.bucket.id")?)?;
        }
        for layer in 0..cfg.num_layers {
            let name = format!("mid.block{layer}.out");
            if let Some((_, data)) = out.marks.get(&format!("encoder.block.{layer}.out"))
                && v.has(&name)
            {
                case.compare(&name, data, &v.f32(&name)?)?;
            }
            let name = format!("mid.block{layer}.pos_bias");
            if let Some((shape, data)) = out.marks.get(&format!("encoder.block.{layer}.positions"))
                && v.has(&name)
            {
                // The file keeps the first query rows only.
                let [_, rows, keys] = v.sizes(&name)?;
                let first: Vec<f32> =
                    data.chunks(shape[1] * keys).flat_map(|head| &head[..rows * keys]).copied().collect();
                case.compare(&name, &first, &v.f32(&name)?)?;
            }
        }
        Ok(())
    });
}

// ---------------------------------------------------------------------------------------------- autoencoder

/// One chunk through the encoder or the decoder.
struct VaeProgram {
    cfg: VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    decode: bool,
}

impl Program for VaeProgram {
    fn key(&self) -> String {
        format!("vae decode={} {:?} {:?} {:?}", self.decode, self.chunk, self.latent, self.cfg)
    }

    fn rank(&self, _: &str) -> usize {
        4
    }

    fn build<O: Ops>(&self, o: &mut O, t: &[O::Tensor], _: &[O::Index]) -> Vec<(String, O::Tensor)> {
        let (mut named, caches) = if self.decode {
            let out = vae::decode(o, &self.cfg, self.latent, self.chunk, &t[0], &t[1..]);
            (vec![("frames".to_owned(), out.frames)], out.caches)
        } else {
            let out = vae::encode(o, &self.cfg, self.latent, self.chunk, &t[0], &t[1..]);
            (vec![("moments".to_owned(), out.moments), ("latent".to_owned(), out.latent)], out.caches)
        };
        named.extend(caches.into_iter().enumerate().map(|(i, c)| (format!("cache_out{i}"), c)));
        named
    }
}

/// A running encoder or decoder.
pub(super) struct VaeStream<'a> {
    pub(super) cfg: &'a VaeConfig,
    pub(super) latent: [usize; 2],
    pub(super) decode: bool,
    caches: Vec<Array>,
}

impl<'a> VaeStream<'a> {
    pub(super) fn new(cfg: &'a VaeConfig, latent: [usize; 2], decode: bool) -> Self {
        Self { cfg, latent, decode, caches: Vec::new() }
    }

    /// Pushes frames `[n, 3, H, W]` or one latent `[1, z, h, w]`.
    pub(super) fn push(
        &mut self,
        engine: &mut Engine,
        shape: &[usize],
        data: Vec<f32>,
    ) -> anyhow::Result<Outputs> {
        let chunk = if self.caches.is_empty() { Chunk::First } else { Chunk::Next };
        let program = VaeProgram { cfg: self.cfg.clone(), latent: self.latent, chunk, decode: self.decode };
        let mut inputs = Inputs::default();
        inputs.tensor("x", shape, data);
        for (i, (shape, data)) in self.caches.iter().enumerate() {
            inputs.tensor(&format!("cache_in{i}"), shape, data.clone());
        }
        let out = engine.run(&program, &inputs)?;
        let shapes = if self.decode {
            vae_decoder_caches(self.cfg, self.latent)
        } else {
            vae_encoder_caches(self.cfg, self.latent)
        };
        self.caches.clear();
        for (i, wanted) in shapes.iter().enumerate() {
            let cache = out.get(&format!("cache_out{i}"))?;
            ensure!(cache.0 == *wanted, "cache {i} has shape {:?}, expected {wanted:?}", cache.0);
            self.caches.push(cache.clone());
        }
        Ok(out)
    }
}

/// `[outer, inner, plane]` to `[inner, outer, plane]`.
pub(super) fn swap_axes(x: &[f32], outer: usize, inner: usize) -> Vec<f32> {
    let plane = x.len() / (outer * inner);
    let mut out = Vec::with_capacity(x.len());
    for i in 0..inner {
        for o in 0..outer {
            out.extend_from_slice(&x[(o * inner + i) * plane..][..plane]);
        }
    }
    out
}

pub(super) fn vae(dir: &Path, via: Via, report: &mut Report) {
    let dir = dir.join("vae");
    let opened = || {
        anyhow::Ok((
            Json::open(&dir.join("config.json"))?.vae()?,
            Vectors::open(&dir.join("weights.safetensors"))?,
        ))
    };
    let tolerance = via.tolerance(TOLERANCE);
    let path = dir.join("case_encode.safetensors");
    if path.exists() {
        report.case(via.name(), Case::new("vae/encode", tolerance), |case| {
            let (cfg, weights) = opened()?;
            encode_case(&cfg, &mut Engine::new(via, &weights)?, &Vectors::open(&path)?, case)
        });
    }
    let path = dir.join("case_decode.safetensors");
    if path.exists() {
        report.case(via.name(), Case::new("vae/decode", tolerance), |case| {
            let (cfg, weights) = opened()?;
            decode_case(&cfg, &mut Engine::new(via, &weights)?, &Vectors::open(&path)?, case)
        });
    }
}

/// Marks of our network against `{prefix}.act.*`, frames and channels swapped.
fn compare_acts(v: &Vectors, prefix: &str, out: &Outputs, case: &mut Case) -> anyhow::Result<()> {
    for (mark, (shape, data)) in &out.marks {
        let Some((_, part)) = mark.split_once('.') else { continue };
        let part =
            part.replace("down_blocks.", "down").replace("up_blocks.", "up").replace("mid_block", "mid");
        let name = format!("{prefix}.act.{part}");
        if v.has(&name) {
            case.compare(&name, &swap_axes(data, shape[0], shape[1]), &v.f32(&name)?)?;
        }
    }
    Ok(())
}

fn encode_case(cfg: &VaeConfig, engine: &mut Engine, v: &Vectors, case: &mut Case) -> anyhow::Result<()> {
    let [_, _, total, height, width] = v.sizes("in.video")?;
    let video = v.f32("in.video")?;
    let factor = cfg.spatial_factor();
    let latent = [height / factor, width / factor];
    let frames = |from: usize, to: usize| swap_axes(&frame_range(&video, 3, total, from, to), 3, to - from);
    let groups = 1 + (total - 1) / cfg.temporal_factor();
    let mut stream = VaeStream::new(cfg, latent, false);
    let (mut moments, mut latents) = (Vec::new(), Vec::new());
    for group in 0..groups {
        let from = if group == 0 { 0 } else { 1 + (group - 1) * cfg.temporal_factor() };
        let to = if group == 0 { 1 } else { from + cfg.temporal_factor() };
        let out = stream.push(engine, &[to - from, 3, height, width], frames(from, to))?;
        let prefix = format!("enc.stream.{group}");
        let name = format!("{prefix}.moments");
        if v.has(&name) {
            case.compare(&name, out.data("moments")?, &v.f32(&name)?)?;
        }
        compare_acts(v, &prefix, &out, case)?;
        if group == 0 {
            if v.has("enc.image_only_moments") {
                case.compare(
                    "enc.image_only_moments",
                    out.data("moments")?,
                    &v.f32("enc.image_only_moments")?,
                )?;
            }
            if let Some((_, data)) = out.marks.get("encoder.patchify")
                && v.has("enc.patchified_frame0")
            {
                case.compare("enc.patchified_frame0", data, &v.f32("enc.patchified_frame0")?)?;
            }
            // The reference reserves more slots than it uses; every slot in the file must be one of ours.
            for name in v.names().filter(|name| name.contains(".cache.")) {
                let slot: usize = name.rsplit('.').next().unwrap_or_default().parse()?;
                ensure!(slot < stream.caches.len(), "{name}: there are only {} caches", stream.caches.len());
            }
        }
        for (i, (shape, data)) in stream.caches.iter().enumerate() {
            let name = format!("{prefix}.cache.{i:02}");
            if !v.has(&name) {
                continue;
            }
            // The reference keeps one frame where there is no more past; ours keeps a zero frame before it.
            let [_, channels, kept, _, _] = v.sizes(&name)?;
            let missing = shape[0] - kept;
            let (zeros, rest) = data.split_at(data.len() / shape[0] * missing);
            ensure!(zeros.iter().all(|x| *x == 0.0), "{name}: the missing past is not zero");
            case.compare(&name, &swap_axes(rest, kept, channels), &v.f32(&name)?)?;
        }
        moments.extend_from_slice(out.data("moments")?);
        latents.extend_from_slice(out.data("latent")?);
    }
    case.compare("enc.moments", &swap_axes(&moments, groups, 2 * cfg.z_dim), &v.f32("enc.moments")?)?;
    case.compare("enc.latent_norm", &swap_axes(&latents, groups, cfg.z_dim), &v.f32("enc.latent_norm")?)
}

/// Normalised latents `[z, n, h, w]` to frames `[3, frames, H, W]`, not clamped.
pub(super) fn decode_all(
    cfg: &VaeConfig,
    engine: &mut Engine,
    latents: &[f32],
    count: usize,
    size: [usize; 2],
    mut each: impl FnMut(usize, &Outputs) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f32>> {
    let mut stream = VaeStream::new(cfg, size, true);
    let by_frame = swap_axes(latents, cfg.z_dim, count);
    let shape = [1, cfg.z_dim, size[0], size[1]];
    let mut video = Vec::new();
    let mut frames = 0;
    for (i, z) in by_frame.chunks(by_frame.len() / count).enumerate() {
        let out = stream.push(engine, &shape, z.to_vec())?;
        each(i, &out)?;
        let (shape, data) = out.get("frames")?;
        frames += shape[0];
        video.extend_from_slice(data);
    }
    Ok(swap_axes(&video, frames, 3))
}

fn decode_case(cfg: &VaeConfig, engine: &mut Engine, v: &Vectors, case: &mut Case) -> anyhow::Result<()> {
    let [_, _, count, h, w] = v.sizes("dec.in_latent_norm")?;
    let video = decode_all(cfg, engine, &v.f32("dec.in_latent_norm")?, count, [h, w], |i, out| {
        let prefix = format!("dec.stream.{i}");
        let name = format!("{prefix}.unclamped");
        if v.has(&name) {
            let (shape, data) = out.get("frames")?;
            case.compare(&name, &swap_axes(data, shape[0], shape[1]), &v.f32(&name)?)?;
        }
        compare_acts(v, &prefix, out, case)
    })?;
    let clamped: Vec<f32> = video.iter().map(|x| x.clamp(-1.0, 1.0)).collect();
    case.compare("dec.video", &clamped, &v.f32("dec.video")?)
}
