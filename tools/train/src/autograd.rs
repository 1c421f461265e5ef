//! What training asks of an interpreter beyond the operations of networks: inputs, values, gradients.
//!
//! [`Eager`] is the default and the reference. Another interpreter has to give the same gradients up to the order of its
//! sums; everything else of a run (samples, losses, optimiser, checkpoint) is outside, so a run can go on on another
//! [`Device`] from the same checkpoint.

use std::borrow::Cow;
use std::sync::Arc;

use mindseye_engines::model::Ops;

use crate::eager::{Eager, IndexVar, Params, Var};
use crate::ranks::{Library, Place, RankError};

/// Outputs with their gradients.
pub type OutputGrads<T> = Vec<(T, Vec<f32>)>;

/// An interpreter that computes gradients of weights.
///
/// A failure of its device, such as a lack of memory, is no value of an operation: an interpreter then unwinds with a
/// [`DeviceError`] (see [`DeviceError::raise`]), and the trainer ends with it.
pub trait Autograd: Ops {
    /// Forgets what was computed and takes new weights. Gradients that were summed stay.
    fn restart(&mut self, params: Arc<Params>);

    /// Forgets what was computed and the weights.
    fn clear(&mut self);

    /// Puts this before the name of every weight that networks ask for from now on.
    fn set_prefix(&mut self, prefix: &str);

    /// An input.
    fn input(&mut self, shape: &[usize], data: Vec<f32>) -> Self::Tensor;

    /// Row numbers.
    fn index(&mut self, shape: &[usize], rows: Vec<usize>) -> Self::Index;

    /// Values, row-major.
    fn value<'a>(&'a self, x: &'a Self::Tensor) -> Cow<'a, [f32]>;

    /// Goes back from outputs and their gradients, once for what was computed since [`Autograd::restart`]; the gradients
    /// of weights are added to those of earlier calls.
    fn backward(&mut self, outputs: OutputGrads<Self::Tensor>);

    /// The summed gradients, one vector per weight in the order of [`Params`] (empty = none); they start again from
    /// nothing.
    fn take_grads(&mut self) -> Vec<Vec<f32>>;

    /// Until [`Autograd::restart`], linear layers with the weight `w` `[out, in]` have a term of low rank, too: their input
    /// through `down` `[rank, in]` and `up` `[out, rank]`, times `scale` (LoRA).
    fn adapt(&mut self, w: &Self::Tensor, down: Self::Tensor, up: Self::Tensor, scale: f32);

    /// What `compute` does needs no gradients, and keeps nothing for them.
    fn no_grad<R>(&mut self, compute: impl FnOnce(&mut Self) -> R) -> R;
}

/// How an interpreter is to compute.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings<'a> {
    /// Weights whose gradients are wanted (see [`crate::eager::is_chosen`]).
    pub only: &'a [String],
    /// Only what passes from one block of a network to the next is kept for gradients; the rest is computed again. An
    /// interpreter without this keeps everything.
    pub checkpoint_blocks: bool,
    /// Products in bfloat16; weights, sums and norms stay f32.
    pub bf16: bool,
}

/// Where a run computes.
pub trait Device: Sync {
    /// Its interpreter, one per worker.
    type Interpreter: Autograd + Send;

    /// An interpreter with gradients.
    ///
    /// # Errors
    /// Settings that the device cannot follow.
    fn interpreter(&self, settings: Settings<'_>) -> Result<Self::Interpreter, DeviceError>;

    /// What ranks on this device compute together with.
    ///
    /// # Errors
    /// A device that computes alone, a library that is not there.
    fn library(&self, place: &Place) -> Result<Box<dyn Library>, RankError> {
        Err(RankError::Alone { ranks: place.ranks })
    }
}

/// The CPU by [`Eager`]: one worker is one thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct EagerDevice;

impl Device for EagerDevice {
    type Interpreter = Eager;

    fn interpreter(&self, settings: Settings<'_>) -> Result<Eager, DeviceError> {
        if settings.bf16 {
            return Err(DeviceError::Bf16 { device: "eager".to_owned() });
        }
        Ok(Eager::new(Arc::default(), true).of_only(settings.only))
    }
}

/// What a device could not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// An operation failed.
    #[error("{device}: {operation} of {shape:?}: {reason}{}", hint(reason))]
    Operation {
        /// The device.
        device: String,
        /// The operation.
        operation: &'static str,
        /// Shape of its first tensor.
        shape: Vec<usize>,
        /// What the device's library said, in one line.
        reason: String,
    },
    /// Products in bfloat16 were asked for.
    #[error("--device {device} computes in f32: remove bf16 = true, or choose a device of libtorch")]
    Bf16 {
        /// The device.
        device: String,
    },
}

fn hint(reason: &str) -> &'static str {
    if reason.contains("out of memory") || reason.contains("not enough memory") {
        "; raise accumulate (smaller passes, the same step) or set checkpoint_blocks = true"
    } else {
        ""
    }
}

impl DeviceError {
    /// Unwinds to the trainer, quietly.
    pub fn raise(self) -> ! {
        std::panic::resume_unwind(Box::new(self))
    }
}

/// The term that [`Autograd::adapt`] adds to a linear layer: `x` through two matrices, times `scale`.
pub fn low_rank<O: Ops>(
    o: &mut O,
    x: &O::Tensor,
    (down, up, scale): (&O::Tensor, &O::Tensor, f32),
) -> O::Tensor {
    let low = o.linear(x, down, None);
    let low = o.linear(&low, up, None);
    o.scale(&low, scale)
}

impl Autograd for Eager {
    fn restart(&mut self, params: Arc<Params>) {
        Self::restart(self, params);
    }

    fn clear(&mut self) {
        Self::clear(self);
    }

    fn set_prefix(&mut self, prefix: &str) {
        Self::set_prefix(self, prefix);
    }

    fn input(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        Self::input(self, shape, data)
    }

    fn index(&mut self, shape: &[usize], rows: Vec<usize>) -> IndexVar {
        Self::index(self, shape, rows)
    }

    fn value<'a>(&'a self, x: &'a Var) -> Cow<'a, [f32]> {
        Cow::Borrowed(Self::value(self, *x).1)
    }

    fn backward(&mut self, outputs: OutputGrads<Var>) {
        Self::backward(self, outputs);
    }

    fn take_grads(&mut self) -> Vec<Vec<f32>> {
        Self::take_grads(self)
    }

    fn adapt(&mut self, w: &Var, down: Var, up: Var, scale: f32) {
        Self::adapt(self, *w, down, up, scale);
    }

    fn no_grad<R>(&mut self, compute: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.record(false);
        let out = compute(self);
        self.record(before);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_no_gradients_leaves_none() {
        let weights = || {
            let mut params = Params::new();
            params.insert("w", &[1, 1], vec![3.0]);
            Arc::new(params)
        };
        let mut e = EagerDevice.interpreter(Settings::default()).expect("it is always there");
        let pass = |e: &mut Eager, x: f32| {
            Autograd::restart(e, weights());
            let (x, w) = (Autograd::input(e, &[1, 1], vec![x]), e.param("w", &[1, 1]));
            e.linear(&x, &w, None)
        };
        let y = e.no_grad(|e| pass(e, 7.0));
        assert_eq!(Autograd::value(&e, &y)[0], 21.0);
        Autograd::backward(&mut e, vec![(y, vec![1.0])]);
        assert!(Autograd::take_grads(&mut e).iter().all(Vec::is_empty));
        // Two passes are summed until they are taken.
        for x in [2.0, 5.0] {
            let y = pass(&mut e, x);
            Autograd::backward(&mut e, vec![(y, vec![10.0])]);
        }
        assert_eq!(Autograd::take_grads(&mut e), [[70.0]]);
        assert!(Autograd::take_grads(&mut e).is_empty());
    }

    #[test]
    fn an_adapted_layer_is_the_layer_and_a_product_of_low_rank() {
        let mut params = Params::new();
        params.insert("w", &[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        params.insert("down", &[1, 2], vec![5.0, 6.0]);
        params.insert("up", &[2, 1], vec![7.0, 8.0]);
        let params = Arc::new(params);
        let only = ["down".to_owned(), "up".to_owned()];
        let settings = Settings { only: &only, ..Settings::default() };
        let mut e = EagerDevice.interpreter(settings).expect("it is always there");
        let pass = |e: &mut Eager, adapted: bool| {
            Autograd::restart(e, params.clone());
            let (x, w) = (Autograd::input(e, &[1, 2], vec![1.0, -1.0]), e.param("w", &[2, 2]));
            if adapted {
                let (down, up) = (e.param("down", &[1, 2]), e.param("up", &[2, 1]));
                Autograd::adapt(e, &w, down, up, 0.5);
            }
            e.linear(&x, &w, None)
        };
        let y = pass(&mut e, true);
        // w x = (-1, -1), down x = -1.
        assert_eq!(Autograd::value(&e, &y)[..], [-1.0 - 3.5, -1.0 - 4.0]);
        Autograd::backward(&mut e, vec![(y, vec![1.0, 10.0])]);
        // Of down: x (7 + 80) / 2; of up: the gradient times -1 / 2; of w none.
        let grads = Autograd::take_grads(&mut e);
        assert_eq!(grads, [vec![], vec![43.5, -43.5], vec![-0.5, -5.0]]);
        let y = pass(&mut e, false);
        assert_eq!(Autograd::value(&e, &y)[..], [-1.0, -1.0]);
    }

    #[test]
    fn a_device_without_memory_says_what_to_lower() {
        let error = |reason: &str| DeviceError::Operation {
            device: "cuda:0".into(),
            operation: "attention",
            shape: vec![24, 520, 12, 16],
            reason: reason.into(),
        };
        let said = error("CUDA out of memory. Tried to allocate 2.00 GiB").to_string();
        assert!(said.starts_with("cuda:0: attention of [24, 520, 12, 16]: CUDA out of memory"), "{said}");
        assert!(said.contains("raise accumulate"), "{said}");
        assert!(!error("no kernel image is available").to_string().contains("accumulate"));
        let refused = EagerDevice.interpreter(Settings { bf16: true, ..Settings::default() }).err();
        assert!(refused.expect("f32 only").to_string().contains("remove bf16 = true"));
    }
}
