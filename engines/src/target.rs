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
    /// All of them, in the order in which they are listed to people.
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

impl FromStr for ComputeCapability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (major, minor) =
            text.split_once('.').ok_or_else(|| format!("{text:?} is not of the form 8.7"))?;
        match (major.parse(), minor.parse()) {
            (Ok(major), Ok(minor)) if (1..100).contains(&major) && minor < 10 => Ok(Self { major, minor }),
            _ => Err(format!("{text:?} is not of the form 8.7")),
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    name: String,
    title: String,
    compute_capability: Option<ComputeCapability>,
    memory_gb: f64,
    reserved_gb: f64,
    bandwidth_gb_per_sec: Option<f64>,
    precisions: Vec<Precision>,
    tensorrt_majors: Vec<u32>,
    tensorrt_rtx: bool,
    builds_on_target_only: bool,
    dense_tera_per_sec: BTreeMap<Precision, f64>,
    limits: Limits,
}

/// A machine that engines are built for. Figures are positive and finite, checked when it is read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// Name on the command line.
    pub name: String,
    /// Name for people.
    pub title: String,
    /// Compute capability; none for a CPU.
    pub compute_capability: Option<ComputeCapability>,
    /// Device memory, bytes (on a Jetson: all memory, which the CPU shares).
    pub memory_bytes: u64,
    /// Bytes of it that are left to the rest of the system.
    pub reserved_bytes: u64,
    /// Memory bandwidth, bytes per second.
    pub bandwidth_bytes_per_sec: Option<f64>,
    /// Precisions with hardware for them.
    pub precisions: Vec<Precision>,
    /// Majors of TensorRT that run on it.
    pub tensorrt_majors: Vec<u32>,
    /// True when TensorRT-RTX knows its compute capability: then engines build on a machine without a GPU.
    pub tensorrt_rtx: bool,
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

const BUILT_IN: [(&str, &str); 10] = [
    ("orin-agx", include_str!("../../configs/targets/orin-agx.toml")),
    ("orin-nx", include_str!("../../configs/targets/orin-nx.toml")),
    ("orin-nano", include_str!("../../configs/targets/orin-nano.toml")),
    ("a100", include_str!("../../configs/targets/a100.toml")),
    ("l4", include_str!("../../configs/targets/l4.toml")),
    ("rtx-4090", include_str!("../../configs/targets/rtx-4090.toml")),
    ("h100", include_str!("../../configs/targets/h100.toml")),
    ("h200", include_str!("../../configs/targets/h200.toml")),
    ("thor", include_str!("../../configs/targets/thor.toml")),
    ("cpu", include_str!("../../configs/targets/cpu.toml")),
];

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
        let positive = |key: &str, v: f64| {
            if v.is_finite() && v > 0.0 {
                Ok(v)
            } else {
                Err(bad(format!("{key} = {v} is not a positive number")))
            }
        };
        let memory_gb = positive("memory_gb", wire.memory_gb)?;
        if !(wire.reserved_gb >= 0.0 && wire.reserved_gb < memory_gb) {
            return Err(bad(format!("reserved_gb = {} is not between 0 and memory_gb", wire.reserved_gb)));
        }
        for (key, v) in [
            ("limits.output_relative_l2", wire.limits.output_relative_l2),
            ("limits.block_relative_l2", wire.limits.block_relative_l2),
            ("limits.int4w_factor", wire.limits.int4w_factor),
            ("limits.fp8_factor", wire.limits.fp8_factor),
        ] {
            positive(key, v)?;
        }
        let mut dense_per_sec = BTreeMap::new();
        for (p, rate) in wire.dense_tera_per_sec {
            dense_per_sec.insert(p, positive(&format!("dense_tera_per_sec.{p}"), rate)? * 1e12);
        }
        if wire.precisions.is_empty() {
            return Err(bad("precisions is empty".into()));
        }
        if let Some(cc) = wire.compute_capability {
            let has = |p| wire.precisions.contains(&p);
            if has(Precision::Fp8) && cc < ComputeCapability::FIRST_WITH_FP8 {
                return Err(bad(format!(
                    "precisions lists fp8, which compute capability {cc} does not have"
                )));
            }
            for p in &wire.precisions {
                if !dense_per_sec.contains_key(&p.compute()) {
                    return Err(bad(format!("dense_tera_per_sec.{} is missing", p.compute())));
                }
            }
            if wire.bandwidth_gb_per_sec.is_none() {
                return Err(bad("bandwidth_gb_per_sec is missing".into()));
            }
        }
        let bandwidth_bytes_per_sec = match wire.bandwidth_gb_per_sec {
            Some(v) => Some(positive("bandwidth_gb_per_sec", v)? * 1e9),
            None => None,
        };
        Ok(Target {
            name: wire.name,
            title: wire.title,
            compute_capability: wire.compute_capability,
            memory_bytes: (memory_gb * 1e9) as u64,
            reserved_bytes: (wire.reserved_gb * 1e9) as u64,
            bandwidth_bytes_per_sec,
            precisions: wire.precisions,
            tensorrt_majors: wire.tensorrt_majors,
            tensorrt_rtx: wire.tensorrt_rtx,
            builds_on_target_only: wire.builds_on_target_only,
            dense_per_sec,
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
    fn precision_table_of_the_design() {
        // design section 10: fp8 from 8.9 on, everything else everywhere (GPU).
        for (name, best, fp8) in [
            ("orin-agx", Precision::Int8, false),
            ("orin-nx", Precision::Int8, false),
            ("orin-nano", Precision::Int8, false),
            ("a100", Precision::Int8, false),
            ("l4", Precision::Fp8, true),
            ("rtx-4090", Precision::Fp8, true),
            ("h100", Precision::Fp8, true),
            ("h200", Precision::Fp8, true),
            ("thor", Precision::Fp8, true),
        ] {
            let t = Target::named(name).unwrap();
            assert_eq!(t.resolve(PrecisionRequest::Auto).unwrap(), best, "{name}");
            assert_eq!(t.check_precision(Precision::Fp8).is_ok(), fp8, "{name}");
            for p in [Precision::Fp16, Precision::Bf16, Precision::Int8, Precision::Int4w] {
                t.check_precision(p).unwrap();
            }
        }
        assert_eq!(Target::all().len(), 10);
        assert_eq!(Target::named("cpu").unwrap().best_precision(), Precision::Fp32);
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
        let good = BUILT_IN[3].1;
        for (from, to, want) in [
            ("memory_gb = 80.0", "memory_gb = -1.0", "memory_gb"),
            ("memory_gb = 80.0", "memory_gb = nan", "memory_gb"),
            ("reserved_gb = 1.0", "reserved_gb = 90.0", "reserved_gb"),
            ("int8 = 624.0", "int8 = 0.0", "dense_tera_per_sec.int8"),
            ("int8 = 624.0", "", "dense_tera_per_sec.int8 is missing"),
            ("\"int4w\"]", "\"int4w\", \"fp8\"]", "fp8"),
            ("title =", "titel =", "titel"),
            ("\"8.0\"", "\"eight\"", "eight"),
            ("output_relative_l2 = 0.05", "output_relative_l2 = inf", "limits.output_relative_l2"),
        ] {
            assert!(good.contains(from), "{from}");
            let text = Target::parse("t", &good.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(text.contains(want), "{want}: {text}");
        }
        assert!(Target::named("orin").unwrap_err().to_string().contains("orin-agx"));
        assert!("int3".parse::<PrecisionRequest>().is_err());
    }
}
