//! What ranks do together on libtorch's devices: NCCL.

use std::sync::Arc;

use mindseye_train::ranks::{Collective, Library, Place, RankError};
use tch::{Kind, Tensor};

use crate::ffi::nccl::{Communicator, Nccl, UniqueId, use_gpu};

/// Names a library that stands in for NCCL on `--device cpu`, for tests.
pub const FAKE: &str = "MINDSEYE_FAKE_NCCL";

/// NCCL for one device.
pub(crate) struct NcclLibrary {
    nccl: Arc<Nccl>,
    device: tch::Device,
}

impl NcclLibrary {
    pub(crate) fn open(device: tch::Device, place: &Place) -> Result<Self, RankError> {
        let name = match device {
            tch::Device::Cuda(_) => "libnccl.so.2".to_owned(),
            _ => std::env::var(FAKE).map_err(|_| RankError::Alone { ranks: place.ranks })?,
        };
        let failed = |source| RankError::Library(format!("{name}: {source}; it comes with PyTorch's CUDA wheels (nvidia-nccl)"));
        if let tch::Device::Cuda(number) = device {
            use_gpu(number).map_err(failed)?;
        }
        Ok(Self { nccl: Arc::new(Nccl::open(&name).map_err(failed)?), device })
    }
}

impl Library for NcclLibrary {
    fn identity(&self) -> Result<Vec<u8>, RankError> {
        self.nccl.unique_id().map(|id| id.0.to_vec()).map_err(RankError::Library)
    }

    fn collective(&self, place: &Place, identity: &[u8]) -> Result<Box<dyn Collective>, RankError> {
        let wrong = || RankError::Library(format!("NCCL: rank 0 sent {} bytes, not an identity", identity.len()));
        let id = UniqueId(identity.try_into().map_err(|_| wrong())?);
        let communicator = self.nccl.clone().communicator(place.ranks, place.rank, id);
        let communicator = communicator.map_err(RankError::Library)?;
        Ok(Box::new(NcclRanks { communicator, device: self.device }))
    }
}

/// Values are on the host: they go to the device, through NCCL, and back.
struct NcclRanks {
    communicator: Communicator,
    device: tch::Device,
}

impl NcclRanks {
    fn through(
        &self,
        values: &mut [f32],
        call: impl FnOnce(&Tensor) -> Result<(), String>,
    ) -> Result<(), String> {
        let said = |e: tch::TchError| e.to_string().lines().next().unwrap_or_default().to_owned();
        let on_device = Tensor::f_from_slice(values)
            .and_then(|x| x.f_to_device_(self.device, Kind::Float, false, true))
            .map_err(said)?;
        call(&on_device)?;
        let n = values.len();
        on_device.f_copy_data(values, n).map_err(said)
    }
}

impl Collective for NcclRanks {
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), String> {
        self.through(values, |x| self.communicator.all_reduce(x))
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), String> {
        self.through(values, |x| self.communicator.broadcast(x, root))
    }

    fn aborter(&self) -> Box<dyn Fn() + Send> {
        let communicator = self.communicator.clone();
        Box::new(move || communicator.abort())
    }
}
