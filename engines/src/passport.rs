//! The passport: a JSON file beside each engine that says what it was made from, for which machine, and how well it
//! was checked. The runtime refuses an engine whose passport does not match, and names the field.
//!
//! The passport carries the SHA-256 of its own fields, so that a file edited by hand is noticed, that of the engine
//! file, and that of every other file that is read with it (a graph's weights lie beside it).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mindseye_base::file::{replace, sha256, sha256_of_file};
use serde::{Deserialize, Serialize};

use crate::onnx::{Model, OnnxError};
use crate::target::{ComputeCapability, Precision};

/// Version of the format; other versions are refused.
pub const FORMAT: u32 = 2;

/// Passports are small; a larger file is not one.
const MAX_BYTES: u64 = 16 << 20;

/// Figures of the check of a quantised graph against fp32.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verification {
    /// Relative L2 error of each output.
    pub outputs: BTreeMap<String, f64>,
    /// Relative L2 error at the end of each block.
    pub blocks: BTreeMap<String, f64>,
    /// Number of inputs that the figures are over.
    pub samples: u64,
    /// Figures of the task, where it was run (success, consistency, number of scenes).
    #[serde(default)]
    pub task: BTreeMap<String, f64>,
}

/// All fields of a passport.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passport {
    /// [`FORMAT`].
    pub format: u32,
    /// Component of the bundle.
    pub component: String,
    /// SHA-256 of `bundle.toml`.
    pub bundle_sha256: String,
    /// SHA-256 of the component's ONNX graph in the bundle.
    pub graph_sha256: String,
    /// SHA-256 of its weights (external data), that of the graph where they are inside it.
    pub weights_sha256: String,
    /// SHA-256 of the calibration inputs; none without calibration.
    pub calibration_sha256: Option<String>,
    /// SHA-256 of all scales of the quantised graph; none without.
    pub scales_sha256: Option<String>,
    /// SHA-256 of the engine file.
    pub engine_sha256: String,
    /// SHA-256 of every other file that is read with it, by name; they lie in the same folder.
    pub files: BTreeMap<String, String>,
    /// Precision of the large matrix products.
    pub precision: Precision,
    /// Layers kept in the float format, by name.
    pub kept_high: Vec<String>,
    /// Target name.
    pub target: String,
    /// Compute capability that the engine is for.
    pub compute_capability: Option<ComputeCapability>,
    /// `tensorrt` or `tensorrt-rtx`.
    pub library: String,
    /// The library's version.
    pub library_version: String,
    /// Operating system that it was built on, as Rust names it (`linux`).
    pub os: String,
    /// CPU architecture that it was built on, as Rust names it (`x86_64`, `aarch64`).
    pub arch: String,
    /// Release of the Jetson's board support that it was built on (`R36, REVISION: 4.0`); none elsewhere.
    pub jetson_release: Option<String>,
    /// CUDA version of the driver at build time, `1000 major + 10 minor`; none where there was none.
    pub driver_version: Option<i32>,
    /// Builder options, as text.
    pub builder_flags: BTreeMap<String, String>,
    /// Figures of the check.
    pub verification: Option<Verification>,
    /// Seconds that parsing and building took.
    pub build_seconds: f64,
    /// Size of the engine file.
    pub engine_bytes: u64,
    /// Version of this program.
    pub tool_version: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    passport: Passport,
    passport_sha256: String,
}

/// What an engine is about to be used with.
#[derive(Clone, Debug, Default)]
pub struct Present<'a> {
    /// SHA-256 of the bundle in use.
    pub bundle_sha256: Option<&'a str>,
    /// Compute capability of the GPU.
    pub compute_capability: Option<ComputeCapability>,
    /// `tensorrt` or `tensorrt-rtx`.
    pub library: Option<&'a str>,
    /// The loaded library's version.
    pub library_version: Option<&'a str>,
    /// CUDA version of the driver.
    pub driver_version: Option<i32>,
    /// Release of the Jetson's board support, where this is one.
    pub jetson_release: Option<&'a str>,
}

/// First line of the file in which a Jetson states the release of its board support (L4T): `R36, REVISION: 4.0`.
#[must_use]
pub fn jetson_release() -> Option<String> {
    parse_jetson_release(&std::fs::read_to_string("/etc/nv_tegra_release").ok()?)
}

/// `# R36 (release), REVISION: 4.0, GCID: ...` to `R36, REVISION: 4.0`.
fn parse_jetson_release(text: &str) -> Option<String> {
    let line = text.lines().next()?.trim_start_matches('#').trim();
    let mut parts = line.split(',').map(str::trim);
    let (release, revision) = (parts.next()?.replace(" (release)", ""), parts.next()?);
    revision.starts_with("REVISION").then(|| format!("{release}, {revision}"))
}

/// Names of the files that a graph reads besides its own, in its folder.
///
/// # Errors
/// The graph cannot be read.
pub fn files_read_by(graph: &Path) -> Result<BTreeSet<String>, OnnxError> {
    Ok(Model::load(graph)?.external_files())
}

/// Why an engine is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassportError {
    /// No engine lies in a folder of engines.
    #[error("{folder} holds no engines")]
    NoEngines {
        /// The folder.
        folder: String,
    },
    /// The file cannot be read.
    #[error("passport {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a passport.
    #[error("passport {path}: {reason}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// An engine or graph without a passport.
    #[error("{path} has no passport; build it again with `mindseye engine build`")]
    NoPassport {
        /// The engine.
        path: String,
    },
    /// The engine is not there, or is empty.
    #[error("engine {path} is {what}; build it again with `mindseye engine build`")]
    NoEngine {
        /// The engine.
        path: String,
        /// `missing` or `empty`.
        what: &'static str,
    },
    /// A graph that cannot be read.
    #[error("engine {path}: {source}")]
    Graph {
        /// The graph.
        path: String,
        /// The cause.
        #[source]
        source: OnnxError,
    },
    /// A graph reads a file that the passport does not cover.
    #[error("engine {path} reads {file:?}, which its passport does not cover")]
    Uncovered {
        /// The graph.
        path: String,
        /// The file.
        file: String,
    },
    /// A field differs from what is there.
    #[error(
        "engine {path} does not match: {field} is {got} and must be {want}; build it again with `mindseye engine build`"
    )]
    Mismatch {
        /// The engine.
        path: String,
        /// The field of the passport.
        field: String,
        /// What the passport says.
        got: String,
        /// What is there.
        want: String,
    },
}

/// Engines of a folder with their passports, by name.
///
/// # Errors
/// The folder cannot be read or holds no engines, a passport is not in order, or an engine or graph has none. Whether
/// passports are true is not looked at: see [`Passport::check`].
pub fn engines_in(folder: &Path) -> Result<Vec<(PathBuf, Passport)>, PassportError> {
    let io = |source| PassportError::Io { path: folder.display().to_string(), source };
    let (mut found, mut engines) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(engine) = name.strip_suffix(".passport.json") {
            let engine = path.with_file_name(engine);
            found.push((engine.clone(), Passport::read(&engine)?));
        } else if name.ends_with(".engine") {
            engines.push(path);
        } else if let Some(component) = name.strip_suffix(".onnx") {
            // A graph that was left beside its engine is not run.
            let engine = path.with_file_name(format!("{component}.engine"));
            if !engine.exists() && !Passport::path_for(&engine).exists() {
                engines.push(path);
            }
        }
    }
    if let Some(bare) = engines.into_iter().find(|e| !found.iter().any(|(path, _)| path == e)) {
        return Err(PassportError::NoPassport { path: bare.display().to_string() });
    }
    if found.is_empty() {
        return Err(PassportError::NoEngines { folder: folder.display().to_string() });
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

impl Passport {
    /// The passport's place: the engine's path with `.passport.json` added.
    #[must_use]
    pub fn path_for(engine: &Path) -> PathBuf {
        let mut name = engine.as_os_str().to_owned();
        name.push(".passport.json");
        name.into()
    }

    /// With all figures rounded to seven digits. Written passports are rounded, since longer decimals may not come
    /// back from JSON to the last bit, and the passport's own hash would not match.
    #[must_use]
    pub fn rounded(mut self) -> Self {
        let round = |v: &mut f64| *v = format!("{v:.6e}").parse().unwrap_or(*v);
        round(&mut self.build_seconds);
        if let Some(v) = &mut self.verification {
            for map in [&mut v.outputs, &mut v.blocks, &mut v.task] {
                map.values_mut().for_each(round);
            }
        }
        self
    }

    fn seal(&self) -> String {
        // Maps are ordered and short decimals make the round trip, so the same fields give the same text.
        sha256(serde_json::to_string(self).unwrap_or_default().as_bytes())
    }

    /// Writes the passport of an engine, atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, engine: &Path) -> Result<(), PassportError> {
        let path = Passport::path_for(engine);
        let shown = path.display().to_string();
        let passport = self.clone().rounded();
        let sealed = Sealed { passport_sha256: passport.seal(), passport };
        let text = serde_json::to_string_pretty(&sealed)
            .map_err(|e| PassportError::Malformed { path: shown.clone(), reason: e.to_string() })?;
        replace(&path, text.as_bytes()).map_err(|source| PassportError::Io { path: shown, source })
    }

    /// Reads the passport of an engine. Its own hash is checked, the engine's is not: see [`Passport::check`].
    ///
    /// # Errors
    /// No such file, not a passport, another format, or edited by hand.
    pub fn read(engine: &Path) -> Result<Passport, PassportError> {
        let path = Passport::path_for(engine);
        let shown = path.display().to_string();
        let io = |source| PassportError::Io { path: shown.clone(), source };
        let bad = |reason: String| PassportError::Malformed { path: shown.clone(), reason };
        if std::fs::metadata(&path).map_err(io)?.len() > MAX_BYTES {
            return Err(bad("larger than 16 MiB".into()));
        }
        let text = std::fs::read_to_string(&path).map_err(io)?;
        let sealed: Sealed = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if sealed.passport.format != FORMAT {
            return Err(bad(format!("format {} is not {FORMAT}", sealed.passport.format)));
        }
        let (want, got) = (sealed.passport.seal(), sealed.passport_sha256);
        if want != got {
            return Err(PassportError::Mismatch { path: shown, field: "passport_sha256".into(), got, want });
        }
        Ok(sealed.passport)
    }

    /// Checks the engine, the files that are read with it and what is present against the passport, field by field.
    ///
    /// An engine is for one operating system and CPU architecture, for one compute capability (of another, only where
    /// it was built hardware-compatible: for Ampere and later, and for no Jetson, where TensorRT has no such mode),
    /// for the very library version that built it (another of the same major only where built version-compatible),
    /// and for a driver no older than the one it was built with. TensorRT-RTX engines run on any 1.7. A graph
    /// (`library` is `onnx`) is bound to no machine.
    ///
    /// # Errors
    /// [`PassportError::Mismatch`] with the first field that differs, or a file is missing, empty, uncovered, or
    /// cannot be read.
    pub fn check(&self, engine: &Path, present: &Present<'_>) -> Result<(), PassportError> {
        let differs = |field: &str, got: &dyn std::fmt::Display, want: &dyn std::fmt::Display| {
            mismatch(engine, field, got, want)
        };
        if let Some(want) = present.bundle_sha256.filter(|w| *w != self.bundle_sha256) {
            return Err(differs("bundle_sha256", &self.bundle_sha256, &want));
        }
        if self.library != "onnx" {
            self.check_machine(present, &differs)?;
        }
        self.check_files(engine)
    }

    /// Compares with the machine that the engine is about to run on.
    fn check_machine(
        &self,
        present: &Present<'_>,
        differs: &dyn Fn(&str, &dyn std::fmt::Display, &dyn std::fmt::Display) -> PassportError,
    ) -> Result<(), PassportError> {
        let flag = |name: &str| self.builder_flags.get(name).is_some_and(|v| v == "true");
        for (field, got, want) in
            [("os", &self.os, std::env::consts::OS), ("arch", &self.arch, std::env::consts::ARCH)]
        {
            if got != want {
                return Err(differs(field, got, &want));
            }
        }
        if let (Some(got), Some(want)) = (&self.jetson_release, present.jetson_release)
            && got != want
            && !flag("version_compatible")
        {
            return Err(differs("jetson_release", got, &want));
        }
        if let (Some(want), Some(got)) = (present.compute_capability, self.compute_capability) {
            let compatible = flag("hardware_compatible")
                && want.major >= 8
                && want >= got
                && !want.is_jetson()
                && !got.is_jetson();
            if want != got && !compatible {
                return Err(differs("compute_capability", &got, &want));
            }
        }
        if let Some(want) = present.library.filter(|w| *w != self.library) {
            return Err(differs("library", &self.library, &want));
        }
        if let Some(want) = present.library_version.filter(|w| *w != self.library_version) {
            let parts = |v: &str| v.split('.').map(str::to_owned).collect::<Vec<_>>();
            let (got, now) = (parts(&self.library_version), parts(want));
            let same = |n: usize| got.get(..n).is_some() && got.get(..n) == now.get(..n);
            let compatible = (self.library == "tensorrt-rtx" && same(2))
                || (flag("version_compatible") && same(1) && number(&now) >= number(&got));
            if !compatible {
                return Err(differs("library_version", &self.library_version, &want));
            }
        }
        if let (Some(want), Some(got)) = (present.driver_version, self.driver_version)
            && want < got
        {
            return Err(differs("driver_version", &got, &format!("at most {want}")));
        }
        Ok(())
    }

    /// Checks the bytes: of the engine, and of every file that is read with it.
    ///
    /// # Errors
    /// As [`Passport::check`].
    pub fn check_files(&self, engine: &Path) -> Result<(), PassportError> {
        let shown = engine.display().to_string();
        let length = std::fs::metadata(engine).map(|m| m.len());
        match length {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(PassportError::NoEngine { path: shown, what: "missing" });
            }
            Err(source) => return Err(PassportError::Io { path: shown, source }),
            Ok(0) => return Err(PassportError::NoEngine { path: shown, what: "empty" }),
            Ok(_) => {}
        }
        let hash = |path: &Path| {
            let io = |source| PassportError::Io { path: path.display().to_string(), source };
            sha256_of_file(path).map_err(io)
        };
        let want = hash(engine)?;
        if want != self.engine_sha256 {
            return Err(mismatch(engine, "engine_sha256", &self.engine_sha256, &want));
        }
        for (name, got) in &self.files {
            let want = hash(&engine.with_file_name(name))?;
            if want != *got {
                return Err(mismatch(engine, &format!("files.{name:?}"), got, &want));
            }
        }
        if self.library == "onnx" {
            let read = files_read_by(engine)
                .map_err(|source| PassportError::Graph { path: shown.clone(), source })?;
            if let Some(file) = read.into_iter().find(|name| !self.files.contains_key(name)) {
                return Err(PassportError::Uncovered { path: shown, file });
            }
        }
        Ok(())
    }
}

fn mismatch(
    engine: &Path,
    field: &str,
    got: &dyn std::fmt::Display,
    want: &dyn std::fmt::Display,
) -> PassportError {
    PassportError::Mismatch {
        path: engine.display().to_string(),
        field: field.to_owned(),
        got: got.to_string(),
        want: want.to_string(),
    }
}

fn number(parts: &[String]) -> Vec<u32> {
    parts.iter().map(|p| p.parse().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(engine: &Path) -> Passport {
        Passport {
            format: FORMAT,
            component: "denoiser".into(),
            bundle_sha256: "b".into(),
            graph_sha256: "g".into(),
            weights_sha256: "w".into(),
            calibration_sha256: None,
            scales_sha256: None,
            engine_sha256: sha256_of_file(engine).unwrap(),
            files: BTreeMap::new(),
            precision: Precision::Int8,
            kept_high: vec![],
            target: "orin-agx".into(),
            compute_capability: Some(ComputeCapability { major: 8, minor: 7 }),
            library: "tensorrt".into(),
            library_version: "10.3.0.30".into(),
            os: std::env::consts::OS.into(),
            arch: std::env::consts::ARCH.into(),
            jetson_release: Some("R36, REVISION: 4.0".into()),
            driver_version: Some(12_060),
            builder_flags: BTreeMap::new(),
            verification: None,
            build_seconds: 1.5,
            engine_bytes: 6,
            tool_version: "0".into(),
        }
    }

    #[test]
    fn mismatches_name_the_field() {
        let folder = tempfile::tempdir().unwrap();
        let engine = folder.path().join("denoiser.engine");
        std::fs::write(&engine, b"engine").unwrap();
        let passport = sample(&engine);
        passport.write(&engine).unwrap();
        assert_eq!(Passport::read(&engine).unwrap(), passport);
        let mut thirds = passport.clone();
        thirds.build_seconds = 1.0 / 3.0;
        let outputs = BTreeMap::from([("sample".to_owned(), 2.0 / 300.0), ("pose".to_owned(), 1e-9 / 7.0)]);
        thirds.verification = Some(Verification { outputs, ..Verification::default() });
        thirds.write(&engine).unwrap();
        assert_eq!(Passport::read(&engine).unwrap(), thirds.clone().rounded());
        passport.write(&engine).unwrap();
        let here = Present {
            bundle_sha256: Some("b"),
            compute_capability: Some(ComputeCapability { major: 8, minor: 7 }),
            library: Some("tensorrt"),
            library_version: Some("10.3.0.30"),
            driver_version: Some(12_060),
            jetson_release: Some("R36, REVISION: 4.0"),
        };
        passport.check(&engine, &here).unwrap();
        for (present, field) in [
            (Present { bundle_sha256: Some("other"), ..here.clone() }, "bundle_sha256"),
            (
                Present {
                    compute_capability: Some(ComputeCapability { major: 8, minor: 0 }),
                    ..here.clone()
                },
                "compute_capability",
            ),
            (Present { library: Some("tensorrt-rtx"), ..here.clone() }, "library"),
            (Present { library_version: Some("10.16.2.10"), ..here.clone() }, "library_version"),
            (Present { driver_version: Some(12_020), ..here.clone() }, "driver_version"),
            (Present { jetson_release: Some("R36, REVISION: 3.0"), ..here.clone() }, "jetson_release"),
        ] {
            let text = passport.check(&engine, &present).unwrap_err().to_string();
            assert!(text.contains(&format!("{field} is ")), "{field}: {text}");
        }
        let mut compatible = passport.clone();
        compatible.builder_flags.insert("version_compatible".into(), "true".into());
        compatible.check(&engine, &Present { library_version: Some("10.16.2.10"), ..here.clone() }).unwrap();
        compatible
            .check(&engine, &Present { library_version: Some("10.0.1.6"), ..here.clone() })
            .unwrap_err();
        let elsewhere = |os: &str, arch: &str| {
            let passport = Passport { os: os.into(), arch: arch.into(), ..passport.clone() };
            passport.check(&engine, &here).unwrap_err().to_string()
        };
        assert!(elsewhere("windows", std::env::consts::ARCH).contains("os is windows"));
        assert!(elsewhere(std::env::consts::OS, "riscv64").contains("arch is riscv64"));
        std::fs::write(&engine, b"another").unwrap();
        let text = passport.check(&engine, &here).unwrap_err().to_string();
        assert!(text.contains("engine_sha256"), "{text}");
        std::fs::write(&engine, b"").unwrap();
        assert!(passport.check(&engine, &here).unwrap_err().to_string().contains("is empty"));
        std::fs::remove_file(&engine).unwrap();
        assert!(passport.check(&engine, &here).unwrap_err().to_string().contains("is missing"));
    }

    /// TensorRT's mode for Ampere and later is not there on a Jetson.
    #[test]
    fn hardware_compatible_engines_run_on_later_cards_and_on_no_jetson() {
        let folder = tempfile::tempdir().unwrap();
        let engine = folder.path().join("denoiser.engine");
        std::fs::write(&engine, b"engine").unwrap();
        let cc = |text: &str| Some(text.parse().unwrap());
        for (built, runs_on, want) in [
            ("8.0", "8.0", true),
            ("8.0", "8.6", true),
            ("8.0", "12.0", true),
            ("8.6", "8.0", false),
            ("8.0", "8.7", false),
            ("8.0", "11.0", false),
            ("8.7", "8.9", false),
        ] {
            let mut passport = sample(&engine);
            passport.compute_capability = cc(built);
            passport.builder_flags.insert("hardware_compatible".into(), "true".into());
            let here = Present { compute_capability: cc(runs_on), ..Present::default() };
            assert_eq!(passport.check(&engine, &here).is_ok(), want, "{built} on {runs_on}");
        }
    }

    #[test]
    fn a_jetson_says_its_release() {
        let text = "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n# more\n";
        assert_eq!(parse_jetson_release(text).unwrap(), "R36, REVISION: 4.0");
        assert_eq!(parse_jetson_release("something else"), None);
    }

    /// A graph's weights lie beside it: every byte of them counts.
    #[test]
    fn files_beside_a_graph_are_covered() {
        use crate::onnx::{
            DataType, Dim, ExternalData, Graph, Initializer, Model, Node, SaveOptions, ValueInfo,
        };
        let folder = tempfile::tempdir().unwrap();
        let graph = folder.path().join("denoiser.onnx");
        let value = |name: &str| ValueInfo {
            name: name.into(),
            dtype: Some(DataType::F32),
            shape: Some(vec![Dim::Fixed(1), Dim::Fixed(64)]),
        };
        let weights = vec![63u8; 4 * 64 * 64];
        let model = Model::new(Graph {
            name: "denoiser".into(),
            nodes: vec![Node::new("product", "MatMul", &["x", "w"], &["y"])],
            initializers: vec![Initializer::from_bytes("w", DataType::F32, &[64, 64], weights)],
            inputs: vec![value("x")],
            outputs: vec![value("y")],
            value_infos: Vec::new(),
        });
        model
            .save(&graph, &SaveOptions { external: ExternalData::Always, ..SaveOptions::default() })
            .unwrap();
        let read = files_read_by(&graph).unwrap();
        assert_eq!(read.iter().collect::<Vec<_>>(), ["denoiser.onnx.data"]);
        let data = folder.path().join("denoiser.onnx.data");
        let mut passport = sample(&graph);
        passport.library = "onnx".into();
        let text = passport.check(&graph, &Present::default()).unwrap_err().to_string();
        assert!(text.contains("reads \"denoiser.onnx.data\", which its passport does not cover"), "{text}");
        passport.files.insert("denoiser.onnx.data".into(), sha256_of_file(&data).unwrap());
        passport.check(&graph, &Present::default()).unwrap();
        let mut bytes = std::fs::read(&data).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&data, bytes).unwrap();
        let text = passport.check(&graph, &Present::default()).unwrap_err().to_string();
        assert!(text.contains("denoiser.onnx.data"), "{text}");
    }

    #[test]
    fn a_passport_edited_by_hand_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let engine = folder.path().join("e.engine");
        std::fs::write(&engine, b"engine").unwrap();
        sample(&engine).write(&engine).unwrap();
        let path = Passport::path_for(&engine);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, want) in [
            ("orin-agx", "a100", "passport_sha256"),
            ("\"8.7\"", "\"8.0\"", "passport_sha256"),
            ("\"format\": 2", "\"format\": 1", "format 1"),
            ("\"target\"", "\"traget\"", "traget"),
        ] {
            assert!(text.contains(from), "{from}");
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let error = Passport::read(&engine).unwrap_err().to_string();
            assert!(error.contains(want), "{want}: {error}");
        }
    }
}
