//! Where to compute: found out at run time, then named explicitly. A GPU backend is in the program
//! only with the feature `gpu` (Vulkan, WebGPU) or `cuda`; the CPU backend (flex) always is.
//!
//! A GPU that fails to start is an error of this worker (reason `system`, tried again elsewhere),
//! not of the run.

use burn::tensor::Device;
use emberline_common::spec::kinds::train::Backend;

use crate::error::TrainError;

/// A device to compute on, and its name for people.
#[derive(Debug, Clone)]
pub struct Compute {
    /// The device, without differentiation.
    pub device: Device,
    /// E.g. `cpu (flex)` or `gpu (vulkan, NVIDIA H200)`. Where it is another one, numbers are rounded otherwise.
    pub name: String,
}

impl Compute {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            device: Device::flex(),
            name: "cpu (flex)".to_owned(),
        }
    }

    /// What the spec asks for, given how many GPUs the task has reserved.
    ///
    /// # Errors
    /// If a GPU is asked for and there is none.
    pub fn choose(backend: Backend, reserved_gpus: u32) -> Result<Self, TrainError> {
        match backend {
            Backend::Cpu => Ok(Self::cpu()),
            Backend::Auto if reserved_gpus == 0 => Ok(Self::cpu()),
            Backend::Auto => Ok(Self::gpu()?.unwrap_or_else(Self::cpu)),
            Backend::Gpu => Self::gpu()?.ok_or_else(|| {
                TrainError::Backend(if cfg!(any(feature = "gpu", feature = "cuda")) {
                    "`backend: gpu` is set, but this worker's program finds no GPU: look at its drivers, and start it with `--gpus 0` if it has none; set `resources.gpu` so that the task comes to a worker that has".to_owned()
                } else {
                    "`backend: gpu` is set, but this worker's program has no GPU backend; build it with `--features gpu`, or set `backend: auto`".to_owned()
                })
            }),
        }
    }

    #[cfg(not(any(feature = "gpu", feature = "cuda")))]
    #[allow(clippy::unnecessary_wraps, reason = "the other builds can fail")]
    const fn gpu() -> Result<Option<Self>, TrainError> {
        Ok(None)
    }

    /// The first GPU that answers. Starting one panics inside the drivers' crates when it is not as
    /// it says, so that is caught here.
    #[cfg(any(feature = "gpu", feature = "cuda"))]
    fn gpu() -> Result<Option<Self>, TrainError> {
        use burn::tensor::{DeviceType, Tensor};

        let probe = || {
            #[cfg(feature = "cuda")]
            if let Some(device) = Device::enumerate(DeviceType::Cuda).into_iter().next() {
                return Some((device, "cuda"));
            }
            #[cfg(feature = "gpu")]
            for device in Device::enumerate(DeviceType::Vulkan) {
                // A software renderer shows itself as a CPU; flex is faster than that.
                if !format!("{device:?}").contains("Cpu") {
                    return Some((device, "vulkan"));
                }
            }
            None
        };
        let start = || {
            probe().map(|(device, api)| {
                let one = Tensor::<1>::ones([1], &device).try_into_scalar::<f32>();
                let card = device.identity().map(|identity| identity.name);
                one.map(|_| Self {
                    device,
                    name: match card {
                        Some(card) => format!("gpu ({api}, {card})"),
                        None => format!("gpu ({api})"),
                    },
                })
                .map_err(TrainError::backend)
            })
        };
        match std::panic::catch_unwind(start) {
            Ok(found) => found.transpose(),
            Err(_) => Err(TrainError::Backend(
                "a GPU was found but does not start: look at this worker's drivers".to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_reserved_gpu_auto_is_the_cpu() {
        let compute = Compute::choose(Backend::Auto, 0).map(|c| c.name);
        assert_eq!(compute.ok().as_deref(), Some("cpu (flex)"));
    }

    #[cfg(not(any(feature = "gpu", feature = "cuda")))]
    #[test]
    fn a_gpu_that_the_program_cannot_use_is_an_error_of_the_worker() {
        let error = Compute::choose(Backend::Gpu, 1).err();
        assert!(
            matches!(error, Some(TrainError::Backend(text)) if text.contains("--features gpu"))
        );
    }
}
