//! Low-rank adaptations (LoRA): small matrices whose product is added to a weight.
//!
//! `W + strength * alpha / rank * up * down` (Hu et al. 2021), as kohya's, ComfyUI's and PEFT's files hold it: `down`
//! (or `lora_A`) of shape `[rank, in]`, `up` (or `lora_B`) of shape `[out, rank]`, and `alpha`, which is the rank where
//! it is missing.

use std::collections::BTreeMap;

use super::names::{Component, original_name};
use super::{Checkpoint, CheckpointError};
use mindseye_engines::model::ParamSpec;

/// What may stand before the names of layers.
const PREFIXES: [&str; 5] =
    ["diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", ""];
/// Names of the two matrices, and which they are.
const PARTS: [(&str, bool); 4] = [
    (".lora_down.weight", true),
    (".lora_A.weight", true),
    (".lora_up.weight", false),
    (".lora_B.weight", false),
];

/// What is added to one matrix.
#[derive(Clone, Debug, Default)]
struct Adapter {
    /// `[rank, in]`.
    down: Option<(Vec<usize>, Vec<f32>)>,
    /// `[out, rank]`.
    up: Option<(Vec<usize>, Vec<f32>)>,
    alpha: Option<f32>,
}

/// The product of two matrices that fit each other and a weight.
#[derive(Clone, Debug)]
struct Product {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
    columns: usize,
    factor: f32,
}

/// A LoRA that fits a network, at a strength.
#[derive(Clone, Debug)]
pub struct Lora {
    by_weight: BTreeMap<String, Product>,
}

impl Lora {
    /// Reads all adapters; each must belong to a matrix among `specs` and have its sizes.
    ///
    /// # Errors
    /// [`CheckpointError::AdapterMismatch`] naming the tensor that belongs to no layer, that is no adapter, or whose
    /// sizes do not fit; [`CheckpointError::NotFinite`].
    pub fn read(
        checkpoint: &Checkpoint,
        component: Component,
        specs: &[ParamSpec],
        strength: f32,
    ) -> Result<Self, CheckpointError> {
        let fail = |name: &str, what: String| CheckpointError::AdapterMismatch {
            path: checkpoint.path().to_owned(),
            name: name.to_owned(),
            what,
        };
        if !strength.is_finite() {
            return Err(fail("strength", format!("{strength} is no strength")));
        }
        // Layers by both their names.
        let mut layers: BTreeMap<String, &ParamSpec> = BTreeMap::new();
        for spec in specs.iter().filter(|s| s.shape.len() == 2) {
            for name in [spec.name.clone(), original_name(component, &spec.name)] {
                layers.insert(name.trim_end_matches(".weight").to_owned(), spec);
            }
        }
        let mut adapters: BTreeMap<&str, (&ParamSpec, Adapter)> = BTreeMap::new();
        for (name, entry) in checkpoint.tensors() {
            let part = PARTS.iter().find_map(|(part, down)| Some((name.strip_suffix(part)?, Some(*down))));
            let alpha = name.strip_suffix(".alpha").map(|layer| (layer, None));
            let Some((layer, kind)) = part.or(alpha) else {
                return Err(fail(
                    name,
                    "neither lora_down, lora_up, lora_A, lora_B nor alpha of a layer".into(),
                ));
            };
            let spec = PREFIXES.iter().find_map(|p| layers.get(layer.strip_prefix(p)?));
            let Some(spec) = spec else {
                return Err(fail(name, "the network has no linear layer of this name".into()));
            };
            let mut values = vec![0.0; entry.count()];
            checkpoint.read_finite(name, 0, &mut values)?;
            let (_, adapter) = adapters.entry(&spec.name).or_insert((spec, Adapter::default()));
            let taken = match kind {
                Some(true) => adapter.down.replace((entry.shape.clone(), values)).is_some(),
                Some(false) => adapter.up.replace((entry.shape.clone(), values)).is_some(),
                None => match values.as_slice() {
                    &[one] => adapter.alpha.replace(one).is_some(),
                    _ => return Err(fail(name, format!("{} values, expected one", values.len()))),
                },
            };
            if taken {
                return Err(fail(name, "the layer is there under two names".into()));
            }
        }
        let mut by_weight = BTreeMap::new();
        for (weight, (spec, adapter)) in adapters {
            let (Some((up_shape, up)), Some((down_shape, down))) = (adapter.up, adapter.down) else {
                return Err(fail(weight, "one of its two matrices is missing".into()));
            };
            let (&[rows, rank], &[same, columns]) = (up_shape.as_slice(), down_shape.as_slice()) else {
                return Err(fail(weight, format!("{up_shape:?} and {down_shape:?} are no matrices")));
            };
            if rank != same || rank == 0 || spec.shape != [rows, columns] {
                let what = format!("{up_shape:?} times {down_shape:?} does not give {:?}", spec.shape);
                return Err(fail(weight, what));
            }
            let factor = strength * adapter.alpha.unwrap_or(rank as f32) / rank as f32;
            by_weight.insert(weight.to_owned(), Product { up, down, rank, columns, factor });
        }
        Ok(Self { by_weight })
    }

    /// Number of matrices that it changes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_weight.len()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_weight.is_empty()
    }

    /// Whether it changes this weight.
    #[must_use]
    pub fn changes(&self, weight: &str) -> bool {
        self.by_weight.contains_key(weight)
    }

    /// Adds the adapter's product to `values`, the elements of a weight from number `from` on. Nothing happens to
    /// weights that it does not change.
    pub fn add_to(&self, weight: &str, from: u64, values: &mut [f32]) {
        let Some(p) = self.by_weight.get(weight) else { return };
        for (i, value) in values.iter_mut().enumerate() {
            let at = usize::try_from(from).unwrap_or(usize::MAX).saturating_add(i);
            let (row, column) = (at / p.columns, at % p.columns);
            let Some(up) = p.up.get(row * p.rank..(row + 1) * p.rank) else { return };
            let product: f32 = up.iter().enumerate().map(|(r, u)| u * p.down[r * p.columns + column]).sum();
            *value += p.factor * product;
        }
    }
}
