//! Slot tables: where each virtual method that we call lies in TensorRT's vtables.
//!
//! TensorRT's public C++ classes (`IBuilder`, ...) hold one pointer to an implementation (`apiv::VBuilder`, ...) whose
//! virtual methods carry out the calls. On the Itanium C++ ABI (Linux, x86-64 and aarch64) the method at index `i` of
//! the declaration lies at slot `i + 2`, since two destructor slots come first. The numbers were generated from the
//! public Apache-2.0 headers at these tags, and a test holds them against the generated lists:
//!
//! | table | headers | libraries it serves |
//! |---|---|---|
//! | [`V10`] | `NVIDIA/TensorRT` v10.0.1 to v10.16 (append only among them) | TensorRT 10.0 to 10.16 |
//! | [`V11`] | `NVIDIA/TensorRT` v11.0, v11.1 and 11.4 | TensorRT 11.0 to 11.4 |
//! | [`RTX17`] | TensorRT-RTX 1.7 | TensorRT-RTX 1.7 |

/// Which binary interface a loaded library speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Abi {
    /// TensorRT 10.
    V10,
    /// TensorRT 11.
    V11,
    /// TensorRT-RTX 1.7.
    Rtx17,
}

/// A library's own version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Version {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Patch.
    pub patch: u32,
    /// Build.
    pub build: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}.{}", self.major, self.minor, self.patch, self.build)
    }
}

/// Vtable slots of one binary interface. Field names are `class_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Slots {
    pub builder_create_config: usize,
    pub builder_create_network: usize,
    pub builder_create_profile: usize,
    pub builder_build_serialized: usize,
    pub config_set_flag: usize,
    pub config_add_profile: usize,
    pub config_set_profiling_verbosity: usize,
    pub config_create_timing_cache: usize,
    pub config_set_timing_cache: usize,
    pub config_get_timing_cache: usize,
    pub config_set_memory_pool_limit: usize,
    pub config_set_optimization_level: usize,
    pub config_set_hardware_compatibility: usize,
    pub config_set_progress_monitor: usize,
    /// Only TensorRT-RTX can build for a compute capability that is not the machine's.
    pub config_compute_capabilities: Option<ComputeCapabilitySlots>,
    /// Only TensorRT-RTX compiles kernels while an engine runs, and keeps them.
    pub runtime_cache: Option<RuntimeCacheSlots>,
    pub network_get_nb_layers: usize,
    pub network_get_nb_inputs: usize,
    pub network_get_input: usize,
    pub network_get_nb_outputs: usize,
    pub network_get_output: usize,
    pub tensor_get_name: usize,
    pub tensor_get_dimensions: usize,
    pub tensor_get_type: usize,
    pub profile_set_dimensions: usize,
    pub profile_is_valid: usize,
    pub memory_data: usize,
    pub memory_size: usize,
    pub timing_cache_serialize: usize,
    pub timing_cache_combine: usize,
    pub runtime_deserialize: usize,
    pub runtime_set_host_code_allowed: usize,
    pub engine_create_context: usize,
    pub engine_get_nb_layers: usize,
    pub engine_get_nb_profiles: usize,
    pub engine_create_inspector: usize,
    pub engine_get_tensor_shape: usize,
    pub engine_get_tensor_dtype: usize,
    pub engine_get_tensor_io_mode: usize,
    pub engine_get_profile_shape: usize,
    pub engine_get_nb_io_tensors: usize,
    pub engine_get_io_tensor_name: usize,
    pub engine_get_device_memory_size: usize,
    pub context_set_device_memory: usize,
    pub context_set_profile_async: usize,
    pub context_set_input_shape: usize,
    pub context_get_tensor_shape: usize,
    pub context_set_tensor_address: usize,
    pub context_infer_shapes: usize,
    pub context_enqueue_v3: usize,
    pub inspector_engine_information: usize,
    pub parser_parse_from_file: usize,
    pub parser_get_nb_errors: usize,
    pub parser_get_error: usize,
    /// Slot of `IParser`'s deleting destructor (declared in the middle of the class, unlike elsewhere).
    pub parser_delete: usize,
    pub parser_error_code: usize,
    pub parser_error_desc: usize,
    pub parser_error_node: usize,
    pub parser_error_node_name: usize,
    pub parser_error_node_operator: usize,
}

/// Slots of `VBuilderConfig` that exist in TensorRT-RTX only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ComputeCapabilitySlots {
    pub set_count: usize,
    pub set: usize,
}

/// Slots of the cache of kernels, which exists in TensorRT-RTX only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct RuntimeCacheSlots {
    pub engine_create_runtime_config: usize,
    pub engine_create_context: usize,
    pub config_set_allocation_strategy: usize,
    pub config_create_cache: usize,
    pub config_set_cache: usize,
    pub cache_serialize: usize,
    pub cache_deserialize: usize,
}

/// Slot of the deleting destructor of every class that begins with `INoCopy`.
pub const DELETE_SLOT: usize = 1;

/// TensorRT 10.0 to 10.16.
pub const V10: Slots = Slots {
    builder_create_config: 7,
    builder_create_network: 8,
    builder_create_profile: 9,
    builder_build_serialized: 14,
    config_set_flag: 11,
    config_add_profile: 25,
    config_set_profiling_verbosity: 27,
    config_create_timing_cache: 40,
    config_set_timing_cache: 41,
    config_get_timing_cache: 42,
    config_set_memory_pool_limit: 43,
    config_set_optimization_level: 47,
    config_set_hardware_compatibility: 49,
    config_set_progress_monitor: 56,
    config_compute_capabilities: None,
    runtime_cache: None,
    network_get_nb_layers: 12,
    network_get_nb_inputs: 14,
    network_get_input: 15,
    network_get_nb_outputs: 16,
    network_get_output: 17,
    tensor_get_name: 3,
    tensor_get_dimensions: 5,
    tensor_get_type: 7,
    profile_set_dimensions: 2,
    profile_is_valid: 9,
    memory_data: 2,
    memory_size: 3,
    timing_cache_serialize: 2,
    timing_cache_combine: 3,
    runtime_deserialize: 3,
    runtime_set_host_code_allowed: 21,
    engine_create_context: 5,
    engine_get_nb_layers: 3,
    engine_get_nb_profiles: 10,
    engine_create_inspector: 18,
    engine_get_tensor_shape: 19,
    engine_get_tensor_dtype: 20,
    engine_get_tensor_io_mode: 23,
    engine_get_profile_shape: 29,
    engine_get_nb_io_tensors: 30,
    engine_get_io_tensor_name: 31,
    engine_get_device_memory_size: 7,
    context_set_device_memory: 10,
    context_set_profile_async: 17,
    context_set_input_shape: 21,
    context_get_tensor_shape: 22,
    context_set_tensor_address: 24,
    context_infer_shapes: 28,
    context_enqueue_v3: 37,
    inspector_engine_information: 6,
    parser_parse_from_file: 1,
    parser_get_nb_errors: 5,
    parser_get_error: 6,
    parser_delete: 9,
    parser_error_code: 0,
    parser_error_desc: 1,
    parser_error_node: 5,
    parser_error_node_name: 6,
    parser_error_node_operator: 7,
};

/// TensorRT 11.0 to 11.4.
pub const V11: Slots = Slots {
    builder_create_config: 5,
    builder_create_network: 6,
    builder_create_profile: 7,
    builder_build_serialized: 11,
    config_set_flag: 9,
    config_add_profile: 23,
    config_set_profiling_verbosity: 25,
    config_create_timing_cache: 29,
    config_set_timing_cache: 30,
    config_get_timing_cache: 31,
    config_set_memory_pool_limit: 32,
    config_set_optimization_level: 36,
    config_set_hardware_compatibility: 38,
    config_set_progress_monitor: 45,
    config_compute_capabilities: None,
    runtime_cache: None,
    tensor_get_type: 6,
    profile_is_valid: 7,
    runtime_set_host_code_allowed: 20,
    engine_create_context: 5,
    engine_get_nb_layers: 3,
    engine_get_nb_profiles: 8,
    engine_create_inspector: 14,
    engine_get_tensor_shape: 15,
    engine_get_tensor_dtype: 16,
    engine_get_tensor_io_mode: 19,
    engine_get_profile_shape: 25,
    engine_get_nb_io_tensors: 26,
    engine_get_io_tensor_name: 27,
    engine_get_device_memory_size: 44,
    context_set_device_memory: 48,
    context_set_profile_async: 16,
    context_set_input_shape: 20,
    context_get_tensor_shape: 21,
    context_set_tensor_address: 23,
    context_infer_shapes: 27,
    context_enqueue_v3: 36,
    parser_get_nb_errors: 3,
    parser_get_error: 4,
    parser_delete: 7,
    ..V10
};

/// TensorRT-RTX 1.7.
pub const RTX17: Slots = Slots {
    config_compute_capabilities: Some(ComputeCapabilitySlots { set_count: 55, set: 57 }),
    runtime_cache: Some(RuntimeCacheSlots {
        engine_create_runtime_config: 48,
        engine_create_context: 47,
        config_set_allocation_strategy: 3,
        config_create_cache: 5,
        config_set_cache: 6,
        cache_serialize: 2,
        cache_deserialize: 3,
    }),
    context_set_device_memory: 48,
    ..V11
};

impl Abi {
    /// The slot table.
    #[must_use]
    pub fn slots(self) -> &'static Slots {
        match self {
            Abi::V10 => &V10,
            Abi::V11 => &V11,
            Abi::Rtx17 => &RTX17,
        }
    }

    /// True for the data-centre and Jetson library, which wants a CUDA driver before anything else.
    #[must_use]
    pub fn needs_driver(self) -> bool {
        !matches!(self, Abi::Rtx17)
    }

    /// Flags of `createNetworkV2` for a strongly typed network: a bit in 10.x, the only style from 11 on.
    #[must_use]
    pub fn strongly_typed(self) -> u32 {
        match self {
            Abi::V10 => 1 << 1,
            Abi::V11 | Abi::Rtx17 => 0,
        }
    }

    /// `BuilderFlag::kVERSION_COMPATIBLE`; the numbering shifted at 11.0.
    #[must_use]
    pub fn flag_version_compatible(self) -> i32 {
        match self {
            Abi::V10 => 13,
            Abi::V11 | Abi::Rtx17 => 12,
        }
    }

    /// True when `setDeviceMemory` of the table takes a size beside the pointer.
    #[must_use]
    pub fn device_memory_has_size(self) -> bool {
        !matches!(self, Abi::V10)
    }

    /// Chooses the interface from a library's version; `rtx` says that its file name is TensorRT-RTX's, which counts
    /// its versions separately.
    ///
    /// # Errors
    /// [`UnknownVersion`]: too old, or newer than this program knows.
    pub fn of(version: Version, rtx: bool) -> Result<Abi, UnknownVersion> {
        match (rtx, version.major, version.minor) {
            (true, 1, 7) => Ok(Abi::Rtx17),
            (false, 10, 0..=16) => Ok(Abi::V10),
            (false, 11, 0..=4) => Ok(Abi::V11),
            (true, ..) => Err(UnknownVersion::Rtx(version)),
            (false, 10 | 11, _) => Err(UnknownVersion::TooNew(version)),
            (false, ..) => Err(UnknownVersion::Unsupported(version)),
        }
    }
}

/// Why a library's version cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownVersion {
    /// Of TensorRT-RTX.
    #[error("TensorRT-RTX {0} is not supported; install 1.7")]
    Rtx(Version),
    /// A later minor version of a known major one: its slots may differ.
    #[error("TensorRT {0} is newer than this program knows (10.0 to 10.16, 11.0 to 11.4)")]
    TooNew(Version),
    /// Another major version.
    #[error("TensorRT {0} is not supported; install 10.0 to 10.16 or 11.0 to 11.4")]
    Unsupported(Version),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    type Lists = BTreeMap<String, BTreeMap<String, Vec<String>>>;

    /// Generated from the headers; see SOURCES.md beside it.
    const GENERATED: &str = include_str!("../../../tests/data/tensorrt/slots.json");

    fn lists() -> Lists {
        let value: serde_json::Value = serde_json::from_str(GENERATED).unwrap();
        serde_json::from_value(value["versions"].clone()).unwrap()
    }

    fn index(lists: &Lists, version: &str, class: &str, method: &str) -> usize {
        lists[version][class]
            .iter()
            .position(|m| m == method)
            .unwrap_or_else(|| panic!("{version} {class} has no {method}"))
    }

    #[test]
    fn slots_agree_with_the_generated_lists() {
        let lists = lists();
        for (abi, version) in
            [(Abi::V10, "v10.3.0"), (Abi::V10, "v10.16"), (Abi::V11, "v11.4"), (Abi::Rtx17, "rtx1.7")]
        {
            let s = abi.slots();
            let v = |class: &str, method: &str| index(&lists, version, class, method) + 2;
            for (got, class, method) in [
                (s.builder_create_config, "VBuilder", "createBuilderConfig"),
                (s.builder_create_network, "VBuilder", "createNetworkV2"),
                (s.builder_create_profile, "VBuilder", "createOptimizationProfile"),
                (s.builder_build_serialized, "VBuilder", "buildSerializedNetwork"),
                (s.config_set_flag, "VBuilderConfig", "setFlag"),
                (s.config_add_profile, "VBuilderConfig", "addOptimizationProfile"),
                (s.config_set_profiling_verbosity, "VBuilderConfig", "setProfilingVerbosity"),
                (s.config_create_timing_cache, "VBuilderConfig", "createTimingCache"),
                (s.config_set_timing_cache, "VBuilderConfig", "setTimingCache"),
                (s.config_get_timing_cache, "VBuilderConfig", "getTimingCache"),
                (s.config_set_memory_pool_limit, "VBuilderConfig", "setMemoryPoolLimit"),
                (s.config_set_optimization_level, "VBuilderConfig", "setBuilderOptimizationLevel"),
                (s.config_set_hardware_compatibility, "VBuilderConfig", "setHardwareCompatibilityLevel"),
                (s.config_set_progress_monitor, "VBuilderConfig", "setProgressMonitor"),
                (s.network_get_nb_layers, "VNetworkDefinition", "getNbLayers"),
                (s.network_get_nb_inputs, "VNetworkDefinition", "getNbInputs"),
                (s.network_get_input, "VNetworkDefinition", "getInput"),
                (s.network_get_nb_outputs, "VNetworkDefinition", "getNbOutputs"),
                (s.network_get_output, "VNetworkDefinition", "getOutput"),
                (s.tensor_get_name, "VTensor", "getName"),
                (s.tensor_get_dimensions, "VTensor", "getDimensions"),
                (s.tensor_get_type, "VTensor", "getType"),
                (s.profile_set_dimensions, "VOptimizationProfile", "setDimensions"),
                (s.profile_is_valid, "VOptimizationProfile", "isValid"),
                (s.memory_data, "VHostMemory", "data"),
                (s.memory_size, "VHostMemory", "size"),
                (s.timing_cache_serialize, "VTimingCache", "serialize"),
                (s.timing_cache_combine, "VTimingCache", "combine"),
                (s.runtime_deserialize, "VRuntime", "deserializeCudaEngine"),
                (s.runtime_set_host_code_allowed, "VRuntime", "setEngineHostCodeAllowed"),
                (s.engine_create_context, "VCudaEngine", "createExecutionContext"),
                (s.engine_get_nb_layers, "VCudaEngine", "getNbLayers"),
                (s.engine_get_nb_profiles, "VCudaEngine", "getNbOptimizationProfiles"),
                (s.engine_create_inspector, "VCudaEngine", "createEngineInspector"),
                (s.engine_get_tensor_shape, "VCudaEngine", "getTensorShape"),
                (s.engine_get_tensor_dtype, "VCudaEngine", "getTensorDataType"),
                (s.engine_get_tensor_io_mode, "VCudaEngine", "getTensorIOMode"),
                (s.engine_get_profile_shape, "VCudaEngine", "getProfileShape"),
                (s.engine_get_nb_io_tensors, "VCudaEngine", "getNbIOTensors"),
                (s.engine_get_io_tensor_name, "VCudaEngine", "getIOTensorName"),
                (
                    s.engine_get_device_memory_size,
                    "VCudaEngine",
                    if abi == Abi::V10 { "getDeviceMemorySize" } else { "getDeviceMemorySizeV2" },
                ),
                (
                    s.context_set_device_memory,
                    "VExecutionContext",
                    if abi.device_memory_has_size() { "setDeviceMemoryV2" } else { "setDeviceMemory" },
                ),
                (s.context_set_profile_async, "VExecutionContext", "setOptimizationProfileAsync"),
                (s.context_set_input_shape, "VExecutionContext", "setInputShape"),
                (s.context_get_tensor_shape, "VExecutionContext", "getTensorShape"),
                (s.context_set_tensor_address, "VExecutionContext", "setTensorAddress"),
                (s.context_infer_shapes, "VExecutionContext", "inferShapes"),
                (s.context_enqueue_v3, "VExecutionContext", "enqueueV3"),
                (s.inspector_engine_information, "VEngineInspector", "getEngineInformation"),
            ] {
                assert_eq!(got, v(class, method), "{version} {class}::{method}");
            }
            if version != "v10.3.0" {
                // The parser and its errors have no implementation class: slot = index.
                for (got, class, method) in [
                    (s.parser_parse_from_file, "IParser", "parseFromFile"),
                    (s.parser_get_nb_errors, "IParser", "getNbErrors"),
                    (s.parser_get_error, "IParser", "getError"),
                    (s.parser_delete - 1, "IParser", "~IParser"),
                    (s.parser_error_code, "IParserError", "code"),
                    (s.parser_error_desc, "IParserError", "desc"),
                    (s.parser_error_node, "IParserError", "node"),
                    (s.parser_error_node_name, "IParserError", "nodeName"),
                    (s.parser_error_node_operator, "IParserError", "nodeOperator"),
                ] {
                    assert_eq!(got, index(&lists, version, class, method), "{version} {class}::{method}");
                }
            }
            assert_eq!(
                s.config_compute_capabilities.map(|c| (c.set_count, c.set)),
                (abi == Abi::Rtx17).then(|| (
                    v("VBuilderConfig", "setNbComputeCapabilities"),
                    v("VBuilderConfig", "setComputeCapability")
                ))
            );
            assert_eq!(
                s.runtime_cache,
                (abi == Abi::Rtx17).then(|| RuntimeCacheSlots {
                    engine_create_runtime_config: v("VCudaEngine", "createRuntimeConfig"),
                    engine_create_context: v("VCudaEngine", "createExecutionContextWithRuntimeConfig"),
                    config_set_allocation_strategy: v(
                        "VRuntimeConfig",
                        "setExecutionContextAllocationStrategy"
                    ),
                    config_create_cache: v("VRuntimeConfig", "createRuntimeCache"),
                    config_set_cache: v("VRuntimeConfig", "setRuntimeCache"),
                    cache_serialize: v("VRuntimeCache", "serialize"),
                    cache_deserialize: v("VRuntimeCache", "deserialize"),
                })
            );
        }
    }

    #[test]
    fn counts_of_methods_and_append_only_history() {
        let lists = lists();
        for (version, class, count) in [
            ("v10.3.0", "VBuilder", 18),
            ("v10.16", "VBuilder", 21),
            ("v11.4", "VBuilder", 18),
            ("rtx1.7", "VBuilder", 16),
            ("v10.3.0", "VBuilderConfig", 58),
            ("v10.16", "VBuilderConfig", 66),
            ("v11.4", "VBuilderConfig", 58),
            ("rtx1.7", "VBuilderConfig", 60),
            ("v10.16", "VExecutionContext", 52),
            ("v11.4", "VExecutionContext", 51),
            ("rtx1.7", "VExecutionContext", 52),
        ] {
            assert_eq!(lists[version][class].len(), count, "{version} {class}");
        }
        for (class, old) in &lists["v10.3.0"] {
            assert_eq!(&lists["v10.16"][class][..old.len()], &old[..], "{class} is append only in 10.x");
        }
    }

    #[test]
    fn versions_choose_a_table_or_are_refused() {
        let v = |major, minor| Version { major, minor, patch: 0, build: 0 };
        for (version, rtx, want) in [
            (v(10, 0), false, Some(Abi::V10)),
            (v(10, 3), false, Some(Abi::V10)),
            (v(10, 16), false, Some(Abi::V10)),
            (v(10, 17), false, None),
            (v(11, 0), false, Some(Abi::V11)),
            (v(11, 4), false, Some(Abi::V11)),
            (v(11, 5), false, None),
            (v(8, 6), false, None),
            (v(12, 0), false, None),
            (v(1, 7), true, Some(Abi::Rtx17)),
            (v(1, 3), true, None),
            (v(1, 8), true, None),
        ] {
            assert_eq!(Abi::of(version, rtx).ok(), want, "{version} rtx {rtx}");
        }
    }
}
