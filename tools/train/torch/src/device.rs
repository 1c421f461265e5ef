//! Where libtorch computes.

use mindseye_train::autograd::{Device, DeviceError, Settings};
use mindseye_train::ranks::{Library, Place, RankError};

use crate::ffi;
use crate::ops::TorchOps;
use crate::ranks::NcclLibrary;

/// A device of libtorch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TorchDevice {
    device: tch::Device,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenDeviceError {
    /// No such name.
    #[error("--device {0}: expected eager, cpu, cuda or cuda:N")]
    Name(String),
    /// This libtorch cannot use CUDA.
    #[error(
        "--device {name}: {source}; the PyTorch 2.11 that this was built with, or LD_LIBRARY_PATH, must have \
         libtorch_cuda.so and what it needs"
    )]
    Library {
        /// The device that was asked for.
        name: String,
        /// Why its library could not be opened.
        source: libloading::Error,
    },
    /// There is no such GPU.
    #[error("--device {name}: {count} CUDA devices found; is the driver there (nvidia-smi)?")]
    Missing {
        /// The device that was asked for.
        name: String,
        /// How many there are.
        count: i64,
    },
}

impl TorchDevice {
    /// The CPU. One worker computes on one thread, so a run has the same numbers on every machine with this libtorch.
    #[must_use]
    pub fn cpu() -> Self {
        tch::set_num_threads(1);
        Self { device: tch::Device::Cpu }
    }

    /// The device `cpu`, `cuda` or `cuda:N`; `cuda` is the GPU that `LOCAL_RANK` numbers where a launcher of several ranks
    /// set it, else the first.
    ///
    /// # Errors
    /// [`OpenDeviceError`] says what is missing.
    pub fn open(name: &str) -> Result<Self, OpenDeviceError> {
        let wrong = || OpenDeviceError::Name(name.to_owned());
        let number = match name.split_once(':') {
            None if name == "cpu" => return Ok(Self::cpu()),
            None if name == "cuda" => {
                std::env::var("LOCAL_RANK").ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
            }
            Some(("cuda", number)) => number.parse().map_err(|_| wrong())?,
            _ => return Err(wrong()),
        };
        ffi::open_cuda().map_err(|source| OpenDeviceError::Library { name: name.to_owned(), source })?;
        let count = tch::Cuda::device_count();
        if i64::try_from(number).is_ok_and(|n| n < count) {
            tch::set_num_threads(1);
            return Ok(Self { device: tch::Device::Cuda(number) });
        }
        Err(OpenDeviceError::Missing { name: name.to_owned(), count })
    }
}

impl Device for TorchDevice {
    type Interpreter = TorchOps;

    fn interpreter(&self, settings: Settings<'_>) -> Result<TorchOps, DeviceError> {
        Ok(TorchOps::new(self.device, settings))
    }

    fn library(&self, place: &Place) -> Result<Box<dyn Library>, RankError> {
        Ok(Box::new(NcclLibrary::open(self.device, place)?))
    }
}
