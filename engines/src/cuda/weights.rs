//! Constants on the device: where they lie, and how they come there.
//!
//! Bytes are read from their file a few megabytes at a time into one of two page-locked buffers, converted on the way
//! where the kernels want another type, while the other buffer is on its way to the device.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;

use super::kernels::Element;
use super::program::Program;
use super::{CudaError, Device, Memory, Pinned};
use crate::onnx::{DataType, Initializer};

const ALIGNMENT: usize = 256;
/// Bytes of one of the two buffers.
const STAGING_BYTES: usize = 16 << 20;

/// Why weights cannot be put on the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum WeightsError {
    #[error(transparent)]
    Read(#[from] crate::onnx::OnnxError),
    #[error(transparent)]
    Device(#[from] CudaError),
    #[error("weight {name:?} has integers of more than 32 bits, which the kernels take")]
    Integer { name: String },
    #[error("weights of {bytes} bytes, the limit is {limit}")]
    Limit { bytes: u64, limit: u64 },
}

/// A constant on the device.
pub(super) struct Weight {
    pub name: String,
    pub offset: usize,
    pub element: Element,
    pub shape: Vec<usize>,
    /// Whether rows and columns have changed places.
    transposed: bool,
}

/// All constants that steps read, in one piece of memory.
pub(super) struct Weights {
    pub memory: Memory,
    pub all: Vec<Weight>,
}

impl Weights {
    /// Puts them there. `tell` gets how many bytes are on the device, of how many.
    pub fn load(
        device: &Arc<dyn Device>,
        constants: &[Initializer],
        program: &Program,
        bf16: bool,
        limit: Option<u64>,
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<Weights, WeightsError> {
        let (all, bytes) = layout(constants, program, bf16);
        if let Some(limit) = limit.filter(|&l| bytes as u64 > l) {
            return Err(WeightsError::Limit { bytes: bytes as u64, limit });
        }
        let memory = Memory::new(device, bytes, "weights")?;
        let mut loader = Loader::new(device, bytes, tell)?;
        for (constant, weight) in &all {
            loader.begin(memory.address() + weight.offset as u64)?;
            loader.load(constant, weight)?;
        }
        loader.finish()?;
        Ok(Weights { memory, all: all.into_iter().map(|(_, w)| w).collect() })
    }
}

/// Places of the constants that steps read, one after the other, and how many bytes they take together.
pub(super) fn layout<'c>(
    constants: &'c [Initializer],
    program: &Program,
    bf16: bool,
) -> (Vec<(&'c Initializer, Weight)>, usize) {
    let read = |name: &str| program.steps.iter().any(|s| s.inputs.iter().any(|i| i == name));
    let mut all = Vec::new();
    let mut bytes = 0;
    for constant in constants.iter().filter(|c| read(&c.name)) {
        let element = match constant.dtype {
            DataType::I64 | DataType::I32 => Element::I32,
            DataType::I8 => Element::I8,
            DataType::F8E4M3 => Element::Bf16, // which has all of its values
            _ if bf16 && program.products.contains(&constant.name) => Element::Bf16,
            _ => Element::F32,
        };
        let count = constant.shape.iter().product::<usize>();
        let (name, shape) = (constant.name.clone(), constant.shape.clone());
        let transposed = program.transposed.contains(&name);
        all.push((constant, Weight { name, offset: bytes, element, shape, transposed }));
        bytes += (count * element.bytes()).next_multiple_of(ALIGNMENT);
    }
    (all, bytes)
}

/// Bytes of elements of `from` as those of `to`. Also for a part of a tensor, in whole elements.
fn converted(from: DataType, to: Element, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    let as_it_is = match to {
        Element::F32 => DataType::F32,
        Element::Bf16 => DataType::BF16,
        Element::I32 => DataType::I32,
        Element::I8 => DataType::I8,
    };
    if from == as_it_is {
        return Some(Cow::Borrowed(bytes));
    }
    if to == Element::I32 {
        let narrow = |c: &[u8]| i32::try_from(i64::from_le_bytes(c.try_into().ok()?)).ok();
        let all: Option<Vec<[u8; 4]>> =
            bytes.chunks_exact(8).map(|c| Some(narrow(c)?.to_le_bytes())).collect();
        return Some(Cow::Owned(all?.concat()));
    }
    // The same elements as a small tensor, of which only the type counts.
    let count = bytes.len() / usize::try_from(from.bytes_for(1)?).ok()?.max(1);
    let values = Initializer::from_bytes("", from, &[count], bytes.to_vec()).to_f32().ok()?;
    Some(Cow::Owned(match to {
        Element::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }))
}

/// Two page-locked buffers that take turns.
struct Loader<'a> {
    device: &'a Arc<dyn Device>,
    buffers: [Pinned; 2],
    /// The one that is filled, and how far.
    turn: usize,
    filled: usize,
    /// Where its first byte goes.
    to: u64,
    done: u64,
    of: u64,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Loader<'a> {
    fn new(
        device: &'a Arc<dyn Device>,
        bytes: usize,
        tell: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, CudaError> {
        let buffer = || Pinned::new(device, STAGING_BYTES.min(bytes.max(1)));
        let buffers = [buffer()?, buffer()?];
        Ok(Loader { device, buffers, turn: 0, filled: 0, to: 0, done: 0, of: bytes as u64, tell })
    }

    /// Goes on at another place.
    fn begin(&mut self, to: u64) -> Result<(), CudaError> {
        // Neighbours go together: the gap between them is never read.
        let gap = to.checked_sub(self.to + self.filled as u64).and_then(|gap| usize::try_from(gap).ok());
        let room = self.buffers[self.turn].bytes().len() - self.filled;
        match gap.filter(|gap| *gap < ALIGNMENT && *gap <= room && self.filled > 0) {
            Some(gap) => self.filled += gap,
            None => {
                self.flush()?;
                self.to = to;
            }
        }
        Ok(())
    }

    fn load(&mut self, constant: &Initializer, weight: &Weight) -> Result<(), WeightsError> {
        if weight.transposed {
            let (bytes, columns) = (constant.bytes()?, weight.shape.last().copied().unwrap_or(1).max(1));
            let turned: Vec<u8> =
                (0..columns).flat_map(|c| bytes.iter().skip(c).step_by(columns).copied()).collect();
            return Ok(self.push(&turned)?);
        }
        let unit = constant.dtype.bytes_for(1).and_then(|n| usize::try_from(n).ok()).unwrap_or(1).max(1);
        let (from, to) = (constant.dtype, weight.element);
        let mut sink = Sink { loader: self, from, to, unit, rest: Vec::new(), failed: None };
        let written = constant.write_to(&mut sink);
        match sink.failed {
            Some(Failed::Device(e)) => Err(e.into()),
            Some(Failed::Integer) => Err(WeightsError::Integer { name: constant.name.clone() }),
            None => Ok(written?),
        }
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), CudaError> {
        while !bytes.is_empty() {
            let buffer = self.buffers[self.turn].bytes_mut();
            let now = bytes.len().min(buffer.len() - self.filled);
            buffer[self.filled..self.filled + now].copy_from_slice(&bytes[..now]);
            self.filled += now;
            bytes = &bytes[now..];
            if self.filled == self.buffers[self.turn].bytes().len() {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Sends what is filled on its way, and waits for what was sent before.
    fn flush(&mut self) -> Result<(), CudaError> {
        if self.filled > 0 {
            self.device.synchronize()?;
            let from = self.buffers[self.turn].bytes().as_ptr();
            // SAFETY: `to` is a place in the weights' memory with room for it; the buffer is written again only after
            // the next `synchronize`.
            unsafe { self.device.copy_in(self.to, from, self.filled)? };
            self.done += self.filled as u64;
            (self.tell)(self.done, self.of);
        }
        self.to += self.filled as u64;
        (self.turn, self.filled) = (1 - self.turn, 0);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), CudaError> {
        self.flush()?;
        self.device.synchronize()?;
        (self.tell)(self.of, self.of);
        Ok(())
    }
}

impl Drop for Loader<'_> {
    /// A copy may be on its way when something else failed: the buffers must live as long.
    fn drop(&mut self) {
        if let Err(e) = self.device.synchronize() {
            tracing::warn!("{e}");
        }
    }
}

enum Failed {
    Device(CudaError),
    Integer,
}

/// Takes the bytes of one constant.
struct Sink<'l, 'a> {
    loader: &'l mut Loader<'a>,
    from: DataType,
    to: Element,
    /// Bytes of an element.
    unit: usize,
    /// The beginning of an element, of which the rest is still to come.
    rest: Vec<u8>,
    failed: Option<Failed>,
}

impl Sink<'_, '_> {
    fn take(&mut self, whole: &[u8]) -> io::Result<()> {
        let failed = match converted(self.from, self.to, whole) {
            None => Failed::Integer,
            Some(bytes) => match self.loader.push(&bytes) {
                Ok(()) => return Ok(()),
                Err(e) => Failed::Device(e),
            },
        };
        self.failed = Some(failed);
        Err(io::Error::other("stopped"))
    }
}

impl Write for Sink<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut given = bytes;
        if !self.rest.is_empty() {
            let missing = (self.unit - self.rest.len()).min(given.len());
            self.rest.extend_from_slice(&given[..missing]);
            given = &given[missing..];
            if self.rest.len() == self.unit {
                let whole = std::mem::take(&mut self.rest);
                self.take(&whole)?;
            }
        }
        let whole = given.len() / self.unit * self.unit;
        if whole > 0 {
            self.take(&given[..whole])?;
        }
        self.rest.extend_from_slice(&given[whole..]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostDevice;
    use super::super::kernels::Activation;
    use super::super::program::{Codes, Op, Step};
    use super::*;
    use crate::target::ComputeCapability;

    /// Every type of a file comes as the kernels take it, whole, in order, with its progress; larger than the buffers.
    #[test]
    fn constants_of_every_type_come_to_the_device() {
        let large: Vec<f32> = (0..5_000_000).map(|i| (i % 9973) as f32 * 0.25).collect();
        let floats = [1.5f32, -2.0, 0.1, 3e5, 0.0, -0.0];
        let halves: Vec<u8> = floats.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let brains: Vec<u8> = floats.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let bytes: Vec<u8> = (0..96u8).collect();
        let constants = [
            Initializer::from_f32("large", &[5_000_000], &large),
            Initializer::from_f32("product", &[6], &floats),
            Initializer::from_bytes("half", DataType::F16, &[6], halves),
            Initializer::from_bytes("brain", DataType::BF16, &[6], brains),
            Initializer::from_i64("index", &[3], &[-7, 0, 1 << 30]),
            Initializer::from_bytes("codes", DataType::I8, &[16, 6], bytes.clone()),
            Initializer::from_bytes("e4m3", DataType::F8E4M3, &[3], vec![0x38, 0x01, 0xfe]),
            Initializer::from_f32("nobody reads it", &[1], &[9.0]),
        ];
        let names = ["large", "product", "half", "brain", "index", "codes", "e4m3"];
        let op = Op::Coded { codes: Codes::Byte, scale: 1.0, activation: Activation::None };
        let inputs = names.map(str::to_owned).to_vec();
        let mut program =
            Program { steps: vec![Step { op, inputs, output: "y".into() }], ..Program::default() };
        program.products.insert("product".into());
        program.transposed.insert("codes".into());
        let device = HostDevice::open(ComputeCapability { major: 8, minor: 0 }, 1 << 30);
        let mut told = Vec::new();
        let mut tell = |done, of| told.push((done, of));
        let weights = Weights::load(&device, &constants, &program, true, None, &mut tell).unwrap();
        assert_eq!(weights.all.iter().map(|w| w.name.as_str()).collect::<Vec<_>>(), names);
        let total = weights.memory.bytes() as u64;
        assert!(told.len() > 2 && told.windows(2).all(|w| w[0].0 <= w[1].0), "{told:?}");
        assert!(told.iter().all(|t| t.1 == total) && told.last() == Some(&(total, total)), "{told:?}");

        let read = |name: &str| {
            let weight = weights.all.iter().find(|w| w.name == name).unwrap();
            let mut out = vec![0u8; weight.shape.iter().product::<usize>() * weight.element.bytes()];
            let from = weights.memory.address() + weight.offset as u64;
            // SAFETY: both ranges are `out.len()` long.
            unsafe { device.copy_out(out.as_mut_ptr(), from, out.len()).unwrap() };
            (weight.element, out)
        };
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let bf16s = |values: &[f32]| {
            values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>()
        };
        assert!(read("large") == (Element::F32, f32s(&large)));
        assert_eq!(read("product"), (Element::Bf16, bf16s(&floats)));
        let through = |round: fn(f32) -> f32| f32s(&floats.map(round));
        assert_eq!(read("half"), (Element::F32, through(|v| half::f16::from_f32(v).to_f32())));
        assert_eq!(read("brain"), (Element::F32, through(|v| half::bf16::from_f32(v).to_f32())));
        let index: Vec<u8> = [-7i32, 0, 1 << 30].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read("index"), (Element::I32, index));
        let turned: Vec<u8> = (0..6).flat_map(|c| (0..16).map(move |r| 6 * r + c)).collect();
        assert_eq!(read("codes"), (Element::I8, turned));
        assert_eq!(read("e4m3"), (Element::Bf16, bf16s(&[1.0, 2f32.powi(-9), -448.0])));
    }

    #[test]
    fn wide_integers_and_too_many_bytes_are_refused() {
        let constants = [Initializer::from_i64("wide", &[1], &[1 << 40])];
        let step = Step { op: Op::Gather, inputs: vec!["wide".into()], output: "y".into() };
        let program = Program { steps: vec![step], ..Program::default() };
        let device = HostDevice::open(ComputeCapability { major: 8, minor: 0 }, 1 << 20);
        let load = |limit| {
            Weights::load(&device, &constants, &program, true, limit, &mut |_, _| ()).map(|_| ()).unwrap_err()
        };
        assert!(load(None).to_string().contains("\"wide\""), "{}", load(None));
        assert_eq!(load(Some(100)).to_string(), "weights of 256 bytes, the limit is 100");
        assert_eq!(device.free_bytes().unwrap(), 1 << 20, "everything is given back");
    }
}
