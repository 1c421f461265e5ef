//! Machines that engines are built for: compute capability, memory, bandwidth, dense rates, precisions.
//!
//! One TOML file per machine (`configs/targets/*.toml`); the shipped files are also compiled in, so that the binary
//! works alone. Unknown keys are refused, and figures are checked when a file is read.
//!
//! ```
//! use mindseye_engines::target::{Precision, Target};
//! let orin = Target::named("orin-agx").unwrap();
//! assert_eq!(orin.best_precision(), Precision::Int8);
//! let refused = orin.check_precision(Precision::Fp8).unwrap_err();
//! assert!(refused.to_string().contains("--precision int8"));
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number format for weights and matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// 32-bit floats.
    Fp32,
    /// 16-bit IEEE floats.
    Fp16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers, weights per channel and activations per tensor, by explicit Q/DQ.
    Int8,
    /// 4-bit integer weights by blocks, 16-bit float arithmetic.
    Int4w,
    /// 8-bit floats E4M3, per tensor.
    Fp8,
}

impl Precision {
    /// All of them, in display order.
    pub const ALL: [Precision; 6] = [
        Precision::Fp32,
        Precision::Fp16,
        Precision::Bf16,
        Precision::Int8,
        Precision::Int4w,
        Precision::Fp8,
    ];

    /// The name used on the command line and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
            Precision::Int4w => "int4w",
            Precision::Fp8 => "fp8",
        }
    }

    /// Bytes that one weight of a quantised layer takes, scales aside.
    #[must_use]
    pub fn weight_bytes(self) -> f64 {
        match self {
            Precision::Fp32 => 4.0,
            Precision::Fp16 | Precision::Bf16 => 2.0,
            Precision::Int8 | Precision::Fp8 => 1.0,
            // 4 bits and one 16-bit scale per block of 128.
            Precision::Int4w => 0.5 + 2.0 / 128.0,
        }
    }

    /// The 16- or 32-bit float format that unquantised parts of a graph of this precision use.
    #[must_use]
    pub fn float(self) -> Precision {
        match self {
            Precision::Fp32 => Precision::Fp32,
            Precision::Bf16 => Precision::Bf16,
            _ => Precision::Fp16,
        }
    }

    /// The format in which matrix products of a graph of this precision are computed.
    #[must_use]
    pub fn compute(self) -> Precision {
        match self {
            Precision::Int4w => Precision::Fp16,
            other => other,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a person asks for: a precision, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrecisionRequest {
    /// The best that the target has: INT8 below compute capability 8.9, FP8 from there on, fp32 on a CPU.
    Auto,
    /// This one or nothing.
    Exactly(Precision),
}

impl FromStr for PrecisionRequest {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if text == "auto" {
            return Ok(PrecisionRequest::Auto);
        }
        Precision::ALL
            .into_iter()
            .find(|p| p.name() == text)
            .map(PrecisionRequest::Exactly)
            .ok_or_else(|| TargetError::UnknownPrecision { given: text.to_owned() })
    }
}

/// CUDA compute capability, as `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// Generation (8: Ampere and Ada, 9: Hopper).
    pub major: u32,
    /// Variant in the generation.
    pub minor: u32,
}

impl ComputeCapability {
    /// The first compute capability with FP8 matrix units (Ada).
    pub const FIRST_WITH_FP8: ComputeCapability = ComputeCapability { major: 8, minor: 9 };
    /// The first with bf16 and INT4 weight-only kernels (Ampere).
    pub const FIRST_WITH_BF16: ComputeCapability = ComputeCapability { major: 8, minor: 0 };

    /// True for the GPUs that are in Jetson modules only.
    #[must_use]
    pub fn is_jetson(self) -> bool {
        [(7, 2), (8, 7), (10, 1), (11, 0)].contains(&(self.major, self.minor))
    }

    /// `10 major + minor`, the number in `sm_87`.
    #[must_use]
    pub fn sm(self) -> u32 {
        self.major * 10 + self.minor
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A text that is not two numbers with a point between them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not of the form {like}")]
pub struct ParseNumberError {
    /// What was given.
    pub given: String,
    /// An example of what is wanted.
    pub like: &'static str,
}

fn major_minor(text: &str, like: &'static str) -> Result<(u32, u32), ParseNumberError> {
    let digits = |part: &str| {
        let plain = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        part.parse().ok().filter(|_| plain)
    };
    let parts = text.split_once('.').and_then(|(major, minor)| Some((digits(major)?, digits(minor)?)));
    parts.ok_or_else(|| ParseNumberError { given: text.to_owned(), like })
}

impl FromStr for ComputeCapability {
    type Err = ParseNumberError;

    fn from_str(text: &str) -> Result<Self, ParseNumberError> {
        let (major, minor) = major_minor(text, "8.7")?;
        if (1..100).contains(&major) && minor < 10 {
            Ok(Self { major, minor })
        } else {
            Err(ParseNumberError { given: text.to_owned(), like: "8.7" })
        }
    }
}

impl Serialize for ComputeCapability {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ComputeCapability {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Largest errors that a quantised graph may show against fp32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Relative L2 error allowed at each output of a component.
    pub output_relative_l2: f64,
    /// Relative L2 error allowed at the end of each block.
    pub block_relative_l2: f64,
    /// Factor on both for INT4 weights.
    pub int4w_factor: f64,
    /// As `int4w_factor`, for FP8: three bits of mantissa round coarser than eight of an integer.
    pub fp8_factor: f64,
}

impl Limits {
    /// The limits of a precision.
    #[must_use]
    pub fn of(&self, precision: Precision) -> Limits {
        let factor = match precision {
            Precision::Int4w => self.int4w_factor,
            Precision::Fp8 => self.fp8_factor,
            _ => 1.0,
        };
        Limits {
            output_relative_l2: self.output_relative_l2 * factor,
            block_relative_l2: self.block_relative_l2 * factor,
            int4w_factor: 1.0,
            fp8_factor: 1.0,
        }
    }
}

/// A release of TensorRT, as `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Release {
    /// 10 or 11.
    pub major: u32,
    /// 0 to 99.
    pub minor: u32,
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Release {
    type Err = ParseNumberError;

    fn from_str(text: &str) -> Result<Self, ParseNumberError> {
        let (major, minor) = major_minor(text, "10.3")?;
        if (10..=11).contains(&major) && minor < 100 {
            Ok(Self { major, minor })
        } else {
            Err(ParseNumberError { given: text.to_owned(), like: "10.3" })
        }
    }
}

impl Serialize for Release {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Release {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    name: String,
    title: String,
    compute_capability: Option<ComputeCapability>,
    memory_gb: f64,
    unified_memory: bool,
    reserved_gb: f64,
    bandwidth_gb_per_sec: Option<f64>,
    host_link_gb_per_sec: Option<f64>,
    precisions: Vec<Precision>,
    tensorrt: Vec<Release>,
    tensorrt_rtx: bool,
    tensorrt_rtx_supported: bool,
    builds_on_target_only: bool,
    dense_tera_per_sec: BTreeMap<Precision, f64>,
    limits: Limits,
}

/// A machine that engines are built for. Figures are positive and finite, checked when it is read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// Name on the command line.
    pub name: String,
    /// Display name.
    pub title: String,
    /// Compute capability; none for a CPU.
    pub compute_capability: Option<ComputeCapability>,
    /// Device memory, bytes (on a Jetson: all memory, which the CPU shares).
    pub memory_bytes: u64,
    /// True where the CPU shares the memory.
    pub unified_memory: bool,
    /// Bytes of it that are left to the rest of the system.
    pub reserved_bytes: u64,
    /// Memory bandwidth, bytes per second.
    pub bandwidth_bytes_per_sec: Option<f64>,
    /// Rate of copies between host and device, bytes per second in one direction: the link's, or half of the
    /// bandwidth where memory is shared.
    pub host_link_bytes_per_sec: Option<f64>,
    /// Precisions with hardware for them.
    pub precisions: Vec<Precision>,
    /// Lowest release of each major of TensorRT that runs on it.
    pub tensorrt: Vec<Release>,
    /// Majors of TensorRT that run on it.
    pub tensorrt_majors: Vec<u32>,
    /// True when TensorRT-RTX knows its compute capability: then engines build on a machine without a GPU.
    pub tensorrt_rtx: bool,
    /// True when TensorRT-RTX's support matrix lists it: engines for other machines build, without support.
    pub tensorrt_rtx_supported: bool,
    /// True when engines must be built on the machine itself.
    pub builds_on_target_only: bool,
    /// Dense rates, operations per second (1 multiply-add = 2 operations).
    pub dense_per_sec: BTreeMap<Precision, f64>,
    /// Error limits for `engine verify` and `engine build`.
    pub limits: Limits,
}

/// Why a target or a precision is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No target file and no built-in target of this name.
    #[error("unknown target {given:?}: use one of {known}, or the path of a target file")]
    UnknownTarget {
        /// What was asked for.
        given: String,
        /// Names that exist.
        known: String,
    },
    /// Not a precision.
    #[error("unknown precision {given:?}: use one of fp32, fp16, bf16, int8, int4w, fp8, auto")]
    UnknownPrecision {
        /// What was asked for.
        given: String,
    },
    /// A file that could not be read.
    #[error("target file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file with a wrong key or value.
    #[error("target {name}: {reason}")]
    Invalid {
        /// File or built-in name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A release of TensorRT that does not run on the target.
    #[error("TensorRT {found} does not run on {target}: wanted {wanted}")]
    TensorRtRefused {
        /// What there is.
        found: Release,
        /// The target's name.
        target: String,
        /// What is needed.
        wanted: String,
    },
    /// The target has no hardware for the precision.
    #[error("{asked} cannot run on {target}{at}: {reason}; use --precision {alternative}")]
    PrecisionRefused {
        /// What was asked for.
        asked: Precision,
        /// The target's name.
        target: String,
        /// Its compute capability, in brackets.
        at: String,
        /// Why.
        reason: &'static str,
        /// What to use instead.
        alternative: Precision,
    },
}

const BUILT_IN: [(&str, &str); 20] = [
    ("orin-agx", include_str!("../../configs/targets/orin-agx.toml")),
    ("orin-agx-32", include_str!("../../configs/targets/orin-agx-32.toml")),
    ("orin-nx", include_str!("../../configs/targets/orin-nx.toml")),
    ("orin-nx-super", include_str!("../../configs/targets/orin-nx-super.toml")),
    ("orin-nano", include_str!("../../configs/targets/orin-nano.toml")),
    ("orin-nano-super", include_str!("../../configs/targets/orin-nano-super.toml")),
    ("thor", include_str!("../../configs/targets/thor.toml")),
    ("t4000", include_str!("../../configs/targets/t4000.toml")),
    ("gb10", include_str!("../../configs/targets/gb10.toml")),
    ("a100", include_str!("../../configs/targets/a100.toml")),
    ("a100-40", include_str!("../../configs/targets/a100-40.toml")),
    ("l4", include_str!("../../configs/targets/l4.toml")),
    ("l40s", include_str!("../../configs/targets/l40s.toml")),
    ("rtx-3090", include_str!("../../configs/targets/rtx-3090.toml")),
    ("rtx-4090", include_str!("../../configs/targets/rtx-4090.toml")),
    ("rtx-5090", include_str!("../../configs/targets/rtx-5090.toml")),
    ("h100", include_str!("../../configs/targets/h100.toml")),
    ("h200", include_str!("../../configs/targets/h200.toml")),
    ("b200", include_str!("../../configs/targets/b200.toml")),
    ("cpu", include_str!("../../configs/targets/cpu.toml")),
];

/// One file while it is checked.
struct Checked<'a> {
    file: &'a str,
    wire: &'a Wire,
}

impl Checked<'_> {
    fn bad(&self, reason: impl Into<String>) -> TargetError {
        TargetError::Invalid { name: self.file.to_owned(), reason: reason.into() }
    }

    fn between(&self, key: &str, v: f64, [least, most]: [f64; 2]) -> Result<(), TargetError> {
        if v >= least && v <= most {
            return Ok(());
        }
        Err(self.bad(format!("{key} = {v:?} is not between {least} and {most}")))
    }

    /// Says which key is wrong and why. Figures are held between a tenth of what the smallest machine has and ten
    /// times what the largest has: what lies outside is a slip of units.
    fn check(&self) -> Result<(), TargetError> {
        let wire = self.wire;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if wire.name.is_empty() || !wire.name.bytes().all(plain) {
            return Err(self.bad(format!("name = {:?} is not a word of letters, digits and -_.", wire.name)));
        }
        self.between("memory_gb", wire.memory_gb, [0.5, 4096.0])?;
        if !(wire.reserved_gb >= 0.0 && wire.reserved_gb < wire.memory_gb) {
            return Err(
                self.bad(format!("reserved_gb = {} is not between 0 and memory_gb", wire.reserved_gb))
            );
        }
        let rates = [
            ("bandwidth_gb_per_sec", wire.bandwidth_gb_per_sec),
            ("host_link_gb_per_sec", wire.host_link_gb_per_sec),
        ];
        for (key, v) in rates {
            v.map_or(Ok(()), |v| self.between(key, v, [1.0, 100_000.0]))?;
        }
        for (p, &rate) in &wire.dense_tera_per_sec {
            self.between(&format!("dense_tera_per_sec.{p}"), rate, [0.01, 100_000.0])?;
        }
        self.between("limits.output_relative_l2", wire.limits.output_relative_l2, [1e-9, 1.0])?;
        self.between("limits.block_relative_l2", wire.limits.block_relative_l2, [1e-9, 1.0])?;
        self.between("limits.int4w_factor", wire.limits.int4w_factor, [1.0, 100.0])?;
        self.between("limits.fp8_factor", wire.limits.fp8_factor, [1.0, 100.0])?;
        if wire.precisions.is_empty() {
            return Err(self.bad("precisions is empty"));
        }
        let mut majors: Vec<u32> = wire.tensorrt.iter().map(|r| r.major).collect();
        majors.dedup();
        if majors.len() != wire.tensorrt.len() || !majors.is_sorted() {
            return Err(self.bad("tensorrt lists a major twice, or not in ascending order"));
        }
        if wire.tensorrt_rtx_supported && !wire.tensorrt_rtx {
            return Err(self.bad("tensorrt_rtx_supported is true and tensorrt_rtx is not"));
        }
        match wire.compute_capability {
            Some(cc) => self.check_gpu(cc),
            None => Ok(()),
        }
    }

    fn check_gpu(&self, cc: ComputeCapability) -> Result<(), TargetError> {
        let wire = self.wire;
        if wire.precisions.contains(&Precision::Fp8) && cc < ComputeCapability::FIRST_WITH_FP8 {
            return Err(
                self.bad(format!("precisions lists fp8, which compute capability {cc} does not have"))
            );
        }
        if let Some(p) = wire.precisions.iter().find(|p| !wire.dense_tera_per_sec.contains_key(&p.compute()))
        {
            return Err(self.bad(format!("dense_tera_per_sec.{} is missing", p.compute())));
        }
        if wire.bandwidth_gb_per_sec.is_none() {
            return Err(self.bad("bandwidth_gb_per_sec is missing"));
        }
        if !wire.unified_memory && wire.host_link_gb_per_sec.is_none() {
            return Err(self.bad("host_link_gb_per_sec is missing: memory is not shared with the CPU"));
        }
        Ok(())
    }
}

/// Target files are small; a larger one is not a target file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

impl Target {
    /// The shipped targets, in a fixed order.
    ///
    /// # Panics
    /// Never: the built-in texts are covered by tests.
    #[must_use]
    pub fn all() -> Vec<Target> {
        BUILT_IN
            .iter()
            .map(|(name, text)| Target::parse(name, text).expect("built-in targets are tested"))
            .collect()
    }

    /// A shipped target by name, or the file at that path when the text ends in `.toml`.
    ///
    /// # Errors
    /// [`TargetError::UnknownTarget`], or what is wrong with the file.
    pub fn named(name: &str) -> Result<Target, TargetError> {
        if name.ends_with(".toml") {
            return Target::read(Path::new(name));
        }
        match BUILT_IN.iter().find(|(n, _)| *n == name) {
            Some((n, text)) => Target::parse(n, text),
            None => Err(TargetError::UnknownTarget {
                given: name.to_owned(),
                known: BUILT_IN.map(|(n, _)| n).join(", "),
            }),
        }
    }

    /// Reads a target file.
    ///
    /// # Errors
    /// The file is missing, too large, or has a wrong key or value.
    pub fn read(path: &Path) -> Result<Target, TargetError> {
        let name = path.display().to_string();
        let read = |source| TargetError::Read { path: name.clone(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
            return Err(TargetError::Invalid { name, reason: "larger than 64 KiB".into() });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Target::parse(&name, &text)
    }

    /// Parses the text of a target file; `name` is used in errors.
    ///
    /// # Errors
    /// [`TargetError::Invalid`] names the key.
    pub fn parse(name: &str, text: &str) -> Result<Target, TargetError> {
        let bad = |reason: String| TargetError::Invalid { name: name.to_owned(), reason };
        let wire: Wire = toml::from_str(text).map_err(|e| bad(e.to_string().trim().replace('\n', " ")))?;
        Checked { file: name, wire: &wire }.check()?;
        let bandwidth = wire.bandwidth_gb_per_sec.map(|v| v * 1e9);
        let mut tensorrt_majors: Vec<u32> = wire.tensorrt.iter().map(|r| r.major).collect();
        tensorrt_majors.dedup();
        Ok(Target {
            name: wire.name,
            title: wire.title,
            compute_capability: wire.compute_capability,
            memory_bytes: (wire.memory_gb * 1e9) as u64,
            unified_memory: wire.unified_memory,
            reserved_bytes: (wire.reserved_gb * 1e9) as u64,
            bandwidth_bytes_per_sec: bandwidth,
            host_link_bytes_per_sec: match wire.host_link_gb_per_sec {
                Some(v) => Some(v * 1e9),
                None if wire.unified_memory => bandwidth.map(|b| b / 2.0),
                None => None,
            },
            precisions: wire.precisions,
            tensorrt: wire.tensorrt,
            tensorrt_majors,
            tensorrt_rtx: wire.tensorrt_rtx,
            tensorrt_rtx_supported: wire.tensorrt_rtx_supported,
            builds_on_target_only: wire.builds_on_target_only,
            dense_per_sec: wire.dense_tera_per_sec.into_iter().map(|(p, rate)| (p, rate * 1e12)).collect(),
            limits: wire.limits,
        })
    }

    /// The precision that `auto` means here: FP8 where there are units for it, else INT8; fp32 on a CPU.
    #[must_use]
    pub fn best_precision(&self) -> Precision {
        match self.compute_capability {
            None => Precision::Fp32,
            Some(_) => [Precision::Fp8, Precision::Int8, Precision::Fp16]
                .into_iter()
                .find(|p| self.precisions.contains(p))
                .unwrap_or(Precision::Fp32),
        }
    }

    /// Checks that the target has hardware for a precision.
    ///
    /// # Errors
    /// [`TargetError::PrecisionRefused`], with the reason and the best alternative.
    pub fn check_precision(&self, asked: Precision) -> Result<(), TargetError> {
        if self.precisions.contains(&asked) {
            return Ok(());
        }
        let reason = match (asked, self.compute_capability) {
            (_, None) => "a CPU engine runs in fp32 or int8 only",
            (Precision::Fp8, Some(_)) => {
                "8-bit float matrix units exist from compute capability 8.9 (Ada) on, and there is no weight-only \
                 fp8 below it either"
            }
            (Precision::Bf16 | Precision::Int4w, Some(_)) => {
                "its kernels exist from compute capability 8.0 on"
            }
            _ => "the target file does not list it",
        };
        Err(TargetError::PrecisionRefused {
            asked,
            target: self.name.clone(),
            at: self.compute_capability.map(|cc| format!(" (compute capability {cc})")).unwrap_or_default(),
            reason,
            alternative: self.best_precision(),
        })
    }

    /// Checks that a release of TensorRT runs here.
    ///
    /// # Errors
    /// [`TargetError::TensorRtRefused`] with what does run here.
    pub fn check_tensorrt(&self, found: Release) -> Result<(), TargetError> {
        if self.tensorrt.iter().any(|r| r.major == found.major && r.minor <= found.minor) {
            return Ok(());
        }
        let wanted: Vec<String> =
            self.tensorrt.iter().map(|r| format!("{r} or a later {}.x", r.major)).collect();
        Err(TargetError::TensorRtRefused {
            found,
            target: self.name.clone(),
            wanted: if wanted.is_empty() { "none".into() } else { wanted.join(", or ") },
        })
    }

    /// Turns what was asked for into a precision that the target has.
    ///
    /// # Errors
    /// As [`Target::check_precision`].
    pub fn resolve(&self, request: PrecisionRequest) -> Result<Precision, TargetError> {
        let precision = match request {
            PrecisionRequest::Auto => self.best_precision(),
            PrecisionRequest::Exactly(p) => p,
        };
        self.check_precision(precision).map(|()| precision)
    }

    /// Dense operations per second in a precision; none where it is not known (CPU).
    #[must_use]
    pub fn rate(&self, precision: Precision) -> Option<f64> {
        self.dense_per_sec.get(&precision.compute()).copied()
    }

    /// Seconds at best: the larger of arithmetic (FLOP by the precision of its products) and bytes at the bandwidth;
    /// and whether it is the bytes. None where rates are not known.
    #[must_use]
    pub fn roofline(&self, flop: &[(f64, Precision)], bytes: f64) -> Option<(f64, bool)> {
        let traffic = bytes / self.bandwidth_bytes_per_sec?;
        let compute = flop.iter().map(|&(flop, p)| Some(flop / self.rate(p)?)).sum::<Option<f64>>()?;
        Some((compute.max(traffic), traffic > compute))
    }

    /// Bytes that an engine may take: memory less what is reserved.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.memory_bytes - self.reserved_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_begins_with_compute_capability_8_9() {
        for target in Target::all() {
            let Some(cc) = target.compute_capability else { continue };
            let fp8 = cc >= ComputeCapability::FIRST_WITH_FP8;
            let best = if fp8 { Precision::Fp8 } else { Precision::Int8 };
            assert_eq!(target.resolve(PrecisionRequest::Auto).unwrap(), best, "{}", target.name);
            assert_eq!(target.check_precision(Precision::Fp8).is_ok(), fp8, "{}", target.name);
            for p in [Precision::Fp16, Precision::Bf16, Precision::Int8, Precision::Int4w] {
                target.check_precision(p).unwrap();
            }
        }
        assert_eq!(Target::named("cpu").unwrap().best_precision(), Precision::Fp32);
    }

    #[test]
    fn every_machine_that_is_deployed_to_is_there() {
        let names: Vec<String> = Target::all().into_iter().map(|t| t.name).collect();
        assert_eq!(names, BUILT_IN.map(|(n, _)| n), "a file's name is its target's");
        for name in [
            "orin-nano-super",
            "orin-nx-super",
            "orin-agx-32",
            "a100-40",
            "l40s",
            "rtx-3090",
            "rtx-5090",
            "gb10",
            "b200",
            "t4000",
        ] {
            assert!(names.iter().any(|n| n == name), "{name}");
        }
    }

    /// Each file names where its figures come from.
    #[test]
    fn figures_have_a_source() {
        for (name, text) in BUILT_IN.iter().filter(|(name, _)| *name != "cpu") {
            assert!(text.contains("# Source: NVIDIA"), "{name}");
        }
    }

    #[test]
    fn machines_of_one_chip_have_one_rate() {
        for (a, b) in [("h100", "h200"), ("a100", "a100-40")] {
            let rates = |name| Target::named(name).unwrap().dense_per_sec;
            assert_eq!(rates(a), rates(b), "{a} {b}");
        }
    }

    #[test]
    fn releases_of_tensorrt_are_checked_by_minor() {
        for (target, release, runs) in [
            ("orin-agx", "10.3", true),
            ("orin-agx", "10.2", false),
            ("orin-agx", "11.4", true),
            ("orin-agx", "11.1", false),
            ("orin-nx", "10.16", true),
            ("orin-nx", "11.4", false),
            ("orin-nano", "11.4", false),
            ("thor", "10.3", false),
            ("thor", "10.13", true),
            ("t4000", "10.3", false),
            ("rtx-5090", "10.3", false),
            ("a100", "11.0", true),
            ("cpu", "10.3", false),
        ] {
            let checked = Target::named(target).unwrap().check_tensorrt(release.parse().unwrap());
            assert_eq!(checked.is_ok(), runs, "{target} {release}: {checked:?}");
        }
        let orin = Target::named("orin-nx").unwrap();
        let text = orin.check_tensorrt("11.4".parse().unwrap()).unwrap_err().to_string();
        assert_eq!(text, "TensorRT 11.4 does not run on orin-nx: wanted 10.3 or a later 10.x");
        let a100 = Target::named("a100").unwrap();
        assert!(a100.tensorrt_rtx && !a100.tensorrt_rtx_supported, "builds, and is not supported");
    }

    #[test]
    fn refusal_names_reason_and_alternative() {
        for name in ["a100", "orin-agx"] {
            let text = Target::named(name).unwrap().check_precision(Precision::Fp8).unwrap_err().to_string();
            assert!(text.contains("compute capability 8.9") && text.ends_with("--precision int8"), "{text}");
        }
    }

    #[test]
    fn bad_files_are_refused_with_the_key() {
        let good = BUILT_IN.iter().find(|(name, _)| *name == "a100").unwrap().1;
        for (from, to, want) in [
            ("memory_gb = 80.0", "memory_gb = -1.0", "memory_gb"),
            ("memory_gb = 80.0", "memory_gb = nan", "memory_gb"),
            ("memory_gb = 80.0", "memory_gb = 1e300", "memory_gb"),
            ("memory_gb = 80.0", "memory_gb = 1e-12", "memory_gb"),
            ("reserved_gb = 1.0", "reserved_gb = 90.0", "reserved_gb"),
            ("= 2039.0", "= 0.0", "bandwidth_gb_per_sec"),
            ("= 2039.0", "= 2.0e12", "bandwidth_gb_per_sec"),
            ("host_link_gb_per_sec = 31.5", "", "host_link_gb_per_sec is missing"),
            ("int8 = 624.0", "int8 = 0.0", "dense_tera_per_sec.int8"),
            ("int8 = 624.0", "int8 = 624e12", "dense_tera_per_sec.int8"),
            ("int8 = 624.0", "", "dense_tera_per_sec.int8 is missing"),
            ("\"int4w\"]", "\"int4w\", \"fp8\"]", "fp8"),
            ("title =", "titel =", "titel"),
            ("name = \"a100\"", "name = \"\"", "name"),
            ("name = \"a100\"", "name = \"\\u001b[31m\"", "name"),
            ("\"8.0\"", "\"eight\"", "eight"),
            ("\"8.0\"", "\"8.10\"", "8.10"),
            ("\"8.0\"", "\"+8.0\"", "+8.0"),
            ("\"10.0\"", "\"9.3\"", "9.3"),
            ("[\"10.0\"", "[\"10.0\", \"10.3\"", "tensorrt"),
            ("tensorrt_rtx = true", "tensorrt_rtx = false", "tensorrt_rtx"),
            ("output_relative_l2 = 0.05", "output_relative_l2 = inf", "limits.output_relative_l2"),
        ] {
            assert!(good.contains(from), "{from}");
            let mut text = good.replacen(from, to, 1);
            if from == "tensorrt_rtx = true" {
                text = text.replacen("tensorrt_rtx_supported = false", "tensorrt_rtx_supported = true", 1);
            }
            let text = Target::parse("t", &text).unwrap_err().to_string();
            assert!(text.contains(want), "{want}: {text}");
        }
        assert!(Target::named("orin").unwrap_err().to_string().contains("orin-agx"));
        assert!("int3".parse::<PrecisionRequest>().is_err());
    }
}
