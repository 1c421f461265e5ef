//! What the tensors of a component are called, in both published layouts, and which shapes they have.
//!
//! The canonical names are those of diffusers and transformers; the original names (Wan-Video/Wan2.2, `wan/modules`)
//! are derived from them. Shapes are the same in both. The norm before cross-attention is called `norm2` in one layout
//! and `norm3` in the other: the layout is decided once for all tensors, so the two cannot be mixed.
//!
//! Files made by other programs put something before all names ([`PREFIXES`]) or store matrices as 8-bit floats, with
//! or without a factor beside each ([`Located::scale`]).

use std::path::Path;

use super::{Checkpoint, CheckpointError, Dtype};
use mindseye_engines::count::{count_denoiser, count_text, count_vae_decoder, count_vae_encoder};
use mindseye_engines::model::vae::{Chunk, VaeConfig};
use mindseye_engines::model::{ParamSpec, dit::DitConfig, umt5::Umt5Config};

/// Most names listed in one error message.
const MAX_LISTED: usize = 6;

/// A network whose weights can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// The diffusion transformer.
    Dit,
    /// The video autoencoder.
    Vae,
    /// The text encoder.
    TextEncoder,
}

/// A way of naming tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// diffusers and transformers: the canonical names.
    Diffusers,
    /// The original Wan release.
    Original,
}

/// What may stand before all names of a network, in order of preference: nothing; ComfyUI; trainers that store the
/// network they distil beside its moving average (which is the one to use) and others; wrappers of PyTorch.
pub const PREFIXES: [&str; 10] = [
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "generator_ema.model.",
    "generator_ema.",
    "generator.model.",
    "generator.",
    "model.",
    "module.",
    "state_dict.",
];

/// A tensor that a component needs, and where it is in a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// Canonical name and shape.
    pub spec: ParamSpec,
    /// Its name in the checkpoint.
    pub source: String,
    /// Its element type there.
    pub dtype: Dtype,
    /// What its values are to be multiplied with, for 8-bit floats that are stored with a factor.
    pub scale: Option<f32>,
}

impl Located {
    /// The smallest type that holds all its values exactly: its own; F16 for 8-bit floats, F32 where those are scaled.
    #[must_use]
    pub fn exact_dtype(&self) -> Dtype {
        match (self.dtype.is_float8(), self.scale) {
            (false, _) => self.dtype,
            (true, None) => Dtype::F16,
            (true, Some(_)) => Dtype::F32,
        }
    }
}

/// A network found in a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Location {
    /// How its tensors are named.
    pub layout: Layout,
    /// What stands before all names.
    pub prefix: &'static str,
    /// All its tensors.
    pub tensors: Vec<Located>,
    /// Tensors under other prefixes: other networks in the same file.
    pub others: usize,
}

/// Weights of a Wan2.2 diffusion transformer, without the additions of this project (camera, lift, guide).
#[must_use]
pub fn dit_params(cfg: &DitConfig) -> Vec<ParamSpec> {
    let published = DitConfig {
        camera_channels: 0,
        pooled_text: false,
        lift: false,
        attributes: 0,
        guide: None,
        ..cfg.clone()
    };
    count_denoiser(&published, 1, 0, 1).params().to_vec()
}

/// Weights of the projection of camera rays, which published checkpoints lack; none without camera conditioning.
#[must_use]
pub fn camera_params(cfg: &DitConfig) -> Vec<ParamSpec> {
    let (dim, channels) = (cfg.dim(), cfg.camera_channels);
    [("weight", vec![dim, channels]), ("bias", vec![dim])]
        .into_iter()
        .filter(|_| channels > 0)
        .map(|(part, shape)| ParamSpec { name: format!("camera_embedding.{part}"), shape })
        .collect()
}

/// Weights of the lift heads, which published checkpoints lack; none where there are no heads.
#[must_use]
pub fn head_params(cfg: &DitConfig) -> Vec<ParamSpec> {
    let heads = count_denoiser(&DitConfig { attributes: 0, ..cfg.clone() }, 1, 0, 1);
    heads.params().iter().filter(|spec| spec.name.starts_with("lift.")).cloned().collect()
}

/// Weights of an autoencoder.
#[must_use]
pub fn vae_params(cfg: &VaeConfig) -> Vec<ParamSpec> {
    // Chunks after the first one use all of them, at any size of the latents.
    let (encoder, decoder) =
        (count_vae_encoder(cfg, [1, 1], Chunk::Next), count_vae_decoder(cfg, [1, 1], Chunk::Next));
    [encoder.params(), decoder.params()].concat()
}

/// Weights of a text encoder.
#[must_use]
pub fn umt5_params(cfg: &Umt5Config) -> Vec<ParamSpec> {
    count_text(cfg, 1).params().to_vec()
}

/// The original name of a canonical one.
#[must_use]
pub fn original_name(component: Component, canonical: &str) -> String {
    match component {
        Component::Dit => original_dit(canonical),
        Component::Vae => original_vae(canonical),
        Component::TextEncoder => original_umt5(canonical),
    }
}

/// Replaces the first matching beginning.
fn replace_start(name: &str, table: &[(&str, &str)]) -> Option<String> {
    table.iter().find_map(|(from, to)| name.strip_prefix(from).map(|rest| format!("{to}{rest}")))
}

fn original_dit(name: &str) -> String {
    let Some((layer, part)) = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) else {
        let table = [
            ("scale_shift_table", "head.modulation"),
            ("proj_out.", "head.head."),
            ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
            ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
            ("condition_embedder.time_proj.", "time_projection.1."),
            ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
            ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
        ];
        return replace_start(name, &table).unwrap_or_else(|| name.to_owned());
    };
    let table = [
        ("scale_shift_table", "modulation"),
        ("norm2.", "norm3."),
        ("ffn.net.0.proj.", "ffn.0."),
        ("ffn.net.2.", "ffn.2."),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
    ];
    let mut part = replace_start(part, &table).unwrap_or_else(|| part.to_owned());
    for (from, to) in [(".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o.")] {
        part = part.replace(from, to);
    }
    format!("blocks.{layer}.{part}")
}

fn original_vae(name: &str) -> String {
    if let Some(out) = replace_start(name, &[("quant_conv.", "conv1."), ("post_quant_conv.", "conv2.")]) {
        return out;
    }
    let Some((coder, part)) = name.split_once('.') else { return name.to_owned() };
    let table = [
        ("conv_in.", "conv1."),
        ("norm_out.", "head.0."),
        ("conv_out.", "head.2."),
        ("mid_block.resnets.0.", "middle.0."),
        ("mid_block.attentions.0.", "middle.1."),
        ("mid_block.resnets.1.", "middle.2."),
    ];
    let part = replace_start(part, &table).unwrap_or_else(|| stage(part).unwrap_or_else(|| part.to_owned()));
    // Inside a residual block.
    let table = [
        (".norm1.gamma", ".residual.0.gamma"),
        (".conv1.", ".residual.2."),
        (".norm2.gamma", ".residual.3.gamma"),
        (".conv2.", ".residual.6."),
        (".conv_shortcut.", ".shortcut."),
    ];
    let mut part = part;
    if name.contains(".resnets.") {
        for (from, to) in table {
            part = part.replace(from, to);
        }
    }
    format!("{coder}.{part}")
}

/// `down_blocks.s.resnets.r.` and `up_blocks.s.resnets.r.`, and the resamplers.
fn stage(part: &str) -> Option<String> {
    let (blocks, rest) = part.split_once('.')?;
    let (blocks, resampler) = match blocks {
        "down_blocks" => ("downsamples", "2"),
        "up_blocks" => ("upsamples", "3"),
        _ => return None,
    };
    let (stage, rest) = rest.split_once('.')?;
    let rest = if let Some(rest) = rest.strip_prefix("resnets.") {
        rest.to_owned()
    } else {
        let (_, rest) = rest.split_once('.')?;
        format!("{resampler}.{rest}")
    };
    Some(format!("{blocks}.{stage}.{blocks}.{rest}"))
}

fn original_umt5(name: &str) -> String {
    let table = [("shared.", "token_embedding."), ("encoder.final_layer_norm.", "norm.")];
    if let Some(out) = replace_start(name, &table) {
        return out;
    }
    let Some((layer, part)) = name.strip_prefix("encoder.block.").and_then(|rest| rest.split_once(".layer."))
    else {
        return name.to_owned();
    };
    let table = [
        ("0.SelfAttention.relative_attention_bias.", "pos_embedding.embedding."),
        ("0.SelfAttention.", "attn."),
        ("0.layer_norm.", "norm1."),
        ("1.DenseReluDense.wi_0.", "ffn.gate.0."),
        ("1.DenseReluDense.wi_1.", "ffn.fc1."),
        ("1.DenseReluDense.wo.", "ffn.fc2."),
        ("1.layer_norm.", "norm2."),
    ];
    format!("blocks.{layer}.{}", replace_start(part, &table).unwrap_or_else(|| part.to_owned()))
}

/// Parts of names that only the adapters of a low-rank adaptation (LoRA) have.
const ADAPTERS: [&str; 5] = [".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1"];

/// Finds every tensor of a component in a checkpoint and says in which layout it is, and under which prefix.
///
/// # Errors
/// [`CheckpointError::Mismatch`] naming missing, extra and misshapen tensors, those that are no floats, and scales
/// that are not one positive number; [`CheckpointError::Adapters`] where the file holds a LoRA.
pub fn locate(
    component: Component,
    specs: &[ParamSpec],
    checkpoint: &Checkpoint,
) -> Result<Location, CheckpointError> {
    let (layout, prefix, found) = naming(component, specs, checkpoint);
    if 2 * found < specs.len() {
        let is_adapter = |name: &str| ADAPTERS.iter().any(|part| name.contains(part));
        if let Some((name, _)) = checkpoint.tensors().find(|(name, _)| is_adapter(name)) {
            return Err(CheckpointError::Adapters {
                path: checkpoint.path().to_owned(),
                name: name.to_owned(),
            });
        }
    }
    let mut faults = Faults::default();
    let mut out = Vec::with_capacity(specs.len());
    let mut used = std::collections::BTreeSet::new();
    for spec in specs {
        let mut source = source_name(component, layout, prefix, spec);
        // Tied weights: transformers stores the embedding under either name, or both.
        if component == Component::TextEncoder && spec.name == "shared.weight" && layout == Layout::Diffusers
        {
            let other = format!("{prefix}encoder.embed_tokens.weight");
            if checkpoint.get(&other).is_some() {
                used.insert(other.clone());
                if checkpoint.get(&source).is_none() {
                    source = other;
                }
            }
        }
        used.insert(source.clone());
        let Some(entry) = checkpoint.get(&source) else {
            faults.add(format!("{source} is missing (shape {:?})", spec.shape));
            continue;
        };
        if entry.shape != spec.shape {
            faults.add(format!("{source} has shape {:?}, expected {:?}", entry.shape, spec.shape));
            continue;
        }
        let mut scale = None;
        match entry.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => {}
            Dtype::F8E4M3 | Dtype::F8E5M2 => {
                scale = scale_of(checkpoint, &source, &mut used, &mut faults)?;
            }
            other => {
                faults
                    .add(format!("{source} is {}, expected F32, F16, BF16 or an 8-bit float", other.name()));
            }
        }
        out.push(Located { spec: spec.clone(), source, dtype: entry.dtype, scale });
    }
    let (mut others, float8) = (0, out.iter().any(|t| t.dtype.is_float8()));
    for (name, _) in checkpoint.tensors().filter(|(name, _)| !used.contains(*name)) {
        match name.strip_prefix(prefix) {
            None => others += 1,
            // ComfyUI marks files of scaled 8-bit floats with an empty tensor, and puts the tokenizer into the text
            // encoder's file.
            Some("scaled_fp8") if float8 => {}
            Some("spiece_model") if component == Component::TextEncoder => {}
            Some(_) => faults.add(format!("{name} is not a tensor of this network")),
        }
    }
    faults.into_error(checkpoint.path())?;
    Ok(Location { layout, prefix, tensors: out, others })
}

fn source_name(component: Component, layout: Layout, prefix: &str, spec: &ParamSpec) -> String {
    match layout {
        Layout::Diffusers => format!("{prefix}{}", spec.name),
        Layout::Original => format!("{prefix}{}", original_name(component, &spec.name)),
    }
}

/// The layout and the prefix under which most tensors are found, and how many.
fn naming(
    component: Component,
    specs: &[ParamSpec],
    checkpoint: &Checkpoint,
) -> (Layout, &'static str, usize) {
    let mut best = (Layout::Diffusers, "", 0);
    for prefix in PREFIXES {
        for layout in [Layout::Diffusers, Layout::Original] {
            let is_there =
                |s: &&ParamSpec| checkpoint.get(&source_name(component, layout, prefix, s)).is_some();
            let found = specs.iter().filter(is_there).count();
            if found > best.2 {
                best = (layout, prefix, found);
            }
        }
    }
    best
}

/// The factor stored beside a matrix of 8-bit floats: `x.scale_weight` or `x.weight_scale` of `x.weight`. Factors of
/// the activations beside it have no use here.
fn scale_of(
    checkpoint: &Checkpoint,
    weight: &str,
    used: &mut std::collections::BTreeSet<String>,
    faults: &mut Faults,
) -> Result<Option<f32>, CheckpointError> {
    let layer = weight.strip_suffix("weight").unwrap_or(weight);
    for activation in ["scale_input", "input_scale"] {
        used.insert(format!("{layer}{activation}"));
    }
    let mut scale = None;
    for name in ["scale_weight", "weight_scale"].map(|part| format!("{layer}{part}")) {
        if checkpoint.get(&name).is_none() {
            continue;
        }
        match checkpoint.read_f32(&name)?.as_slice() {
            &[k] if k.is_finite() && k > 0.0 && scale.is_none() => scale = Some(k),
            values => faults.add(format!("{name} holds {} values, expected one above zero", values.len())),
        }
        used.insert(name);
    }
    Ok(scale)
}

/// What does not fit, with only the first few spelt out.
#[derive(Default)]
struct Faults {
    first: Vec<String>,
    more: usize,
}

impl Faults {
    fn add(&mut self, fault: String) {
        if self.first.len() < MAX_LISTED {
            self.first.push(fault);
        } else {
            self.more += 1;
        }
    }

    fn into_error(self, path: &Path) -> Result<(), CheckpointError> {
        if self.first.is_empty() {
            return Ok(());
        }
        let mut what = self.first.join("; ");
        if self.more > 0 {
            what += &format!("; and {} more", self.more);
        }
        Err(CheckpointError::Mismatch { path: path.to_owned(), what })
    }
}
