//! Our kernels, as launches: which one, on what grid, with which arguments. What they compute is in `kernels/*.cu`.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))] // devices know kernels that only the engine calls

use std::ffi::c_void;

use super::CudaError;

/// The kernels as PTX 8.5 for compute capability 8.0, made by `tests/gpu/compile.py`; ends with a NUL.
///
/// # Errors
/// The program was built without them.
#[cfg(feature = "cuda")]
pub(super) fn ptx() -> Result<String, CudaError> {
    use std::io::Read;
    let mut text = String::new();
    let packed = include_bytes!("kernels/kernels.ptx.gz");
    let read = flate2::read::GzDecoder::new(packed.as_slice()).read_to_string(&mut text);
    let failed = |e: std::io::Error| CudaError::Call { call: "unpacking the kernels", reason: e.to_string() };
    read.map_err(failed)?;
    text.push('\0');
    Ok(text)
}

/// As with the feature `cuda`, of which this program was built without.
#[cfg(not(feature = "cuda"))]
pub(super) fn ptx() -> Result<String, CudaError> {
    Err(CudaError::LeftOut)
}

/// A kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Kernel {
    /// Matrix product of bf16 on the tensor cores, blocks of 128 x 128.
    GemmBf16x128,
    /// The same, blocks of 64 x 64.
    GemmBf16x64,
    /// Matrix product in f32, any types, sizes and strides.
    GemmAny,
    /// Matrix product of signed bytes on the tensor cores, blocks of 128 x 128.
    GemmInt8x128,
    /// The same, blocks of 64 x 64.
    GemmInt8x64,
    /// Convolution of bf16 on the tensor cores, 1 x 1, blocks of 128 channels by 128 pixels.
    Conv1Bf16x128,
    /// The same, blocks of 64 x 64.
    Conv1Bf16x64,
    /// Convolution of bf16 on the tensor cores, 3 x 3, blocks of 128 channels by 128 pixels.
    Conv3Bf16x128,
    /// The same, blocks of 64 x 64.
    Conv3Bf16x64,
    /// Convolution in f32, any types and sizes.
    ConvAny,
    /// Attention of bf16 on the tensor cores, heads of 48.
    AttentionBf16x48,
    /// The same, heads of 64.
    AttentionBf16x64,
    /// The same, heads of 128.
    AttentionBf16x128,
    /// Attention in f32, heads of at most 256.
    AttentionAny,
    /// Layer and RMS norm, with weights and modulation.
    NormRows,
    /// Softmax.
    SoftmaxRows,
    /// Means and lengths along one axis.
    ReduceAxis,
    /// Norm over the channels of pictures.
    NormChannels,
    /// Rotary positions.
    RotateHeads,
    /// Rows of a table.
    GatherRows,
    /// Arithmetic by element; copies with other strides.
    Elementwise,
    /// A sampler's step.
    SamplerStep,
}

/// Most channels of a head that [`Kernel::AttentionAny`] takes; for larger ones there are products and a softmax.
pub(super) const HEAD_MOST: usize = 256;

impl Kernel {
    /// All of them, in the order of their numbers.
    pub const ALL: [Kernel; 22] = [
        Kernel::GemmBf16x128,
        Kernel::GemmBf16x64,
        Kernel::GemmAny,
        Kernel::GemmInt8x128,
        Kernel::GemmInt8x64,
        Kernel::Conv1Bf16x128,
        Kernel::Conv1Bf16x64,
        Kernel::Conv3Bf16x128,
        Kernel::Conv3Bf16x64,
        Kernel::ConvAny,
        Kernel::AttentionBf16x48,
        Kernel::AttentionBf16x64,
        Kernel::AttentionBf16x128,
        Kernel::AttentionAny,
        Kernel::NormRows,
        Kernel::SoftmaxRows,
        Kernel::ReduceAxis,
        Kernel::NormChannels,
        Kernel::RotateHeads,
        Kernel::GatherRows,
        Kernel::Elementwise,
        Kernel::SamplerStep,
    ];

    /// Its name in the PTX, NUL included.
    pub(super) fn name_with_nul(self) -> &'static str {
        match self {
            Kernel::GemmBf16x128 => "gemm_bf16_128\0",
            Kernel::GemmBf16x64 => "gemm_bf16_64\0",
            Kernel::GemmAny => "gemm_any\0",
            Kernel::GemmInt8x128 => "gemm_int8_128\0",
            Kernel::GemmInt8x64 => "gemm_int8_64\0",
            Kernel::Conv1Bf16x128 => "conv_bf16_1x1_128\0",
            Kernel::Conv1Bf16x64 => "conv_bf16_1x1_64\0",
            Kernel::Conv3Bf16x128 => "conv_bf16_3x3_128\0",
            Kernel::Conv3Bf16x64 => "conv_bf16_3x3_64\0",
            Kernel::ConvAny => "conv_any\0",
            Kernel::AttentionBf16x48 => "attention_bf16_48\0",
            Kernel::AttentionBf16x64 => "attention_bf16_64\0",
            Kernel::AttentionBf16x128 => "attention_bf16_128\0",
            Kernel::AttentionAny => "attention_any\0",
            Kernel::NormRows => "norm_rows\0",
            Kernel::SoftmaxRows => "softmax_rows\0",
            Kernel::ReduceAxis => "reduce_axis\0",
            Kernel::NormChannels => "norm_channels\0",
            Kernel::RotateHeads => "rotate_heads\0",
            Kernel::GatherRows => "gather_rows\0",
            Kernel::Elementwise => "elementwise\0",
            Kernel::SamplerStep => "sampler_step\0",
        }
    }

    /// Its name in the PTX.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.name_with_nul().trim_end_matches('\0')
    }

    /// Threads of a block.
    pub(super) fn threads(self) -> u32 {
        match self {
            Kernel::GemmBf16x128
            | Kernel::GemmAny
            | Kernel::GemmInt8x128
            | Kernel::Conv1Bf16x128
            | Kernel::Conv3Bf16x128
            | Kernel::ConvAny
            | Kernel::Elementwise
            | Kernel::SamplerStep => 256,
            _ => 128,
        }
    }

    /// Most shared memory of a block, bytes.
    pub(super) fn shared_bytes_most(self) -> u32 {
        match self {
            Kernel::GemmBf16x128 | Kernel::GemmInt8x128 => 49_152,
            Kernel::GemmBf16x64 | Kernel::GemmInt8x64 => 24_576,
            Kernel::GemmAny | Kernel::ConvAny => 8_704,
            Kernel::Conv1Bf16x128 | Kernel::Conv3Bf16x128 => 32_768,
            Kernel::Conv1Bf16x64 | Kernel::Conv3Bf16x64 => 16_384,
            Kernel::NormChannels => 512,
            Kernel::AttentionBf16x48 | Kernel::AttentionBf16x64 => 32_768,
            Kernel::AttentionBf16x128 => 65_536,
            Kernel::AttentionAny => 16 * HEAD_MOST as u32,
            _ => 0,
        }
    }

    /// The tensor-core attention for heads of this size, where there is one.
    pub(super) fn attention_bf16(head: usize) -> Option<Kernel> {
        match head {
            48 => Some(Kernel::AttentionBf16x48),
            64 => Some(Kernel::AttentionBf16x64),
            128 => Some(Kernel::AttentionBf16x128),
            _ => None,
        }
    }

    /// The tensor-core convolutions for a square kernel of this side, with large and with small blocks, where there are.
    pub(super) fn conv_bf16(side: usize) -> Option<[Kernel; 2]> {
        match side {
            1 => Some([Kernel::Conv1Bf16x128, Kernel::Conv1Bf16x64]),
            3 => Some([Kernel::Conv3Bf16x128, Kernel::Conv3Bf16x64]),
            _ => None,
        }
    }
}

/// A kernel with its grid and arguments.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Which.
    pub kernel: Kernel,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Arguments, in the kernel's order.
    pub arguments: Arguments,
}

/// Arguments of a kernel, each at a multiple of eight bytes.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    /// Adds one argument of these words, the first byte first.
    pub(super) fn push(&mut self, words: &[u64]) {
        self.starts.push(self.words.len());
        self.words.extend_from_slice(words);
    }

    /// Where each argument lies, for the driver to copy. Valid while `self` is not changed.
    pub(super) fn pointers(&self) -> Vec<*mut c_void> {
        self.starts.iter().map(|&s| self.words[s..].as_ptr().cast_mut().cast()).collect()
    }
}

/// Types of elements on the device, by their numbers in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub(super) enum Element {
    F32 = 0,
    Bf16 = 1,
    I32 = 2,
    I8 = 3,
}

impl Element {
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::I8 => 1,
            Element::Bf16 => 2,
            Element::F32 | Element::I32 => 4,
        }
    }
}

/// What a matrix product does after the bias, by the numbers in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Activation {
    None = 0,
    GeluTanh = 1,
    Silu = 2,
}

/// Operations by element, by their numbers in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum ElementOp {
    Copy = 0,
    Negate = 1,
    Sqrt = 2,
    Reciprocal = 3,
    Sigmoid = 4,
    Silu = 5,
    GeluTanh = 6,
    Square = 7,
    Add = 8,
    Subtract = 9,
    Multiply = 10,
    Divide = 11,
    Maximum = 12,
    /// `a + b c`.
    AddProduct = 13,
    /// `a / b` as a signed byte.
    ToByte = 14,
    /// `a / b` as a value of E4M3.
    ToE4m3 = 15,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of the kernels are places in a table, and every one is in the PTX, once.
    #[cfg(feature = "cuda")]
    #[test]
    fn every_kernel_is_in_the_ptx() {
        let ptx = ptx().unwrap();
        assert!(ptx.contains(".version 8.5") && ptx.contains(".target sm_80") && ptx.ends_with('\0'));
        for (place, kernel) in Kernel::ALL.into_iter().enumerate() {
            assert_eq!(kernel as usize, place);
            assert_eq!(ptx.matches(&format!(".entry {}(", kernel.name())).count(), 1, "{kernel:?}");
            let bounds = format!(".maxntid {}, 1, 1", kernel.threads());
            let entry = &ptx[ptx.find(&format!(".entry {}(", kernel.name())).unwrap()..];
            assert!(entry[..entry.find('{').unwrap()].contains(&bounds), "{kernel:?}: {bounds}");
        }
        assert_eq!(ptx.matches(".entry ").count(), Kernel::ALL.len());
    }

    #[test]
    fn arguments_lie_where_they_are_pointed_at() {
        let mut arguments = Arguments::default();
        arguments.push(&[1]);
        arguments.push(&[2, 3, 4]);
        arguments.push(&[5]);
        let first = arguments.pointers()[0] as usize;
        let places: Vec<usize> = arguments.pointers().iter().map(|&p| p as usize - first).collect();
        assert_eq!(places, [0, 8, 32]);
    }
}
