//! `bundle.toml`: its tables, and what of them can be checked without the files.
//!
//! These types are the only definition of the manifest: tools write them, the runtime reads them. A key that is unknown,
//! missing or of another type is an error that names file, table, key, what was wanted and what was got; nothing is
//! filled in. Tables that only some bundles have are optional as a whole.

use std::collections::BTreeMap;
use std::path::{Component as PathPart, Path};

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{BundleError, COMPONENTS, FORMAT, MANIFEST, field, reader};
use crate::backend::{Port, describe};
use crate::model::codec::LinearCodecConfig;
use crate::model::depth::DepthConfig;
use crate::model::dit::{DitConfig, Prediction};
use crate::model::umt5::Umt5Config;
use crate::model::vae::VaeConfig;
use crate::onnx::{DataType, Dim};
use crate::sampler::{Grid, Solver};

/// `bundle.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the model.
    pub name: String,
    /// Element type of weights and arithmetic: `f32`, `f16`, `bf16`, `int8`, …
    pub precision: String,
    /// What it was built for: `cpu`, `sm_87`, …
    pub target: String,
    /// SPDX expression.
    pub license: String,
    /// The images.
    pub image: ImageSpec,
    /// The latents.
    pub latent: LatentSpec,
    /// Temporal positions.
    pub rope: RopeSpec,
    /// How much it was trained for, and how much is let through.
    pub limits: Limits,
    /// How to sample when the caller does not say.
    pub sampler: SamplerSpec,
    /// Where it comes from.
    pub provenance: Provenance,
    /// The denoiser's sizes.
    pub dit: DitConfig,
    /// What surrounds the denoiser.
    pub networks: Networks,
    /// The box in the last imagined frames.
    pub bounding_box: BoundingBoxSpec,
    /// Calibration of the lift; there exactly where the denoiser has lift heads.
    pub lift: Option<LiftParams>,
    /// What was measured before it was shipped.
    pub evaluation: Evaluation,
    /// The files.
    pub component: BTreeMap<String, Component>,
}

/// Configurations of what surrounds the denoiser. A bundle holds those tables that its parts need.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Networks {
    /// The training camera. Without it the model takes pictures of any camera, scaled and cropped.
    pub camera: Option<CameraSpec>,
    /// How a rollout is laid out; needed to run.
    pub layout: Option<LayoutSpec>,
    /// How a goal becomes token ids. Without it the `tokenizer` component takes the goal as it is.
    pub text: Option<TextSpec>,
    /// Sizes of the linear codec.
    pub codec: Option<LinearCodecConfig>,
    /// Sizes of the video autoencoder.
    pub vae: Option<VaeConfig>,
    /// Sizes of the text encoder.
    pub umt5: Option<Umt5Config>,
    /// Sizes of the depth reader.
    pub depth: Option<DepthConfig>,
}

/// The camera of the training pictures, level but for its pitch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CameraSpec {
    /// Full horizontal field of view, degrees.
    pub horizontal_fov_deg: f64,
    /// Downward pitch, degrees.
    pub pitch_deg: f64,
    /// Height above the floor, metres.
    pub height_m: f64,
}

/// How a rollout is laid out, in latents; the given first latent comes before these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutSpec {
    /// Latents of motion.
    pub motion_latents: usize,
    /// Latents with the box, at the end.
    pub box_latents: usize,
    /// Images of one training recording, which bound the distance between context indices. Absent where training did
    /// not bound it: then source indices are kept as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recording_images: Option<usize>,
}

/// How a goal becomes token ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum TextSpec {
    /// A list of words, with the ids [`crate::text::FIRST_WORD`], ...
    Closed {
        /// Lower case, in the order of the ids.
        words: Vec<String>,
        /// Groups of them, such as colours and kinds: goals of training name one of each. None where any will do.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        attributes: Vec<Vec<String>>,
    },
    /// The `tokenizer` component, on a sentence around the goal.
    Sentence {
        /// The training's sentence, with `{}` once, in the place of what is wanted.
        prompt: String,
    },
}

/// The red box that the model draws around the goal in the last imagined frames.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundingBoxSpec {
    /// Smallest score of a box that is reported: how much redder its outline is than what it encloses and what lies
    /// around it, 0..1.
    pub score_min: f64,
}

/// Calibration of the lift, measured by `eval grounding --calibrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LiftParams {
    /// Timestep (0..1000) of the single pass whose heads are read.
    pub glance_timestep: f64,
    /// Distance from the object's centre at which training rollouts end, metres.
    pub standoff_m: f64,
    /// The object counts as seen when some token's mask logit reaches this.
    pub mask_present: f64,
    /// Tokens whose mask logit reaches this vote for the object's place.
    pub mask_vote: f64,
    /// Standard deviation of the plan's object place, metres.
    pub plan_sigma_m: f64,
    /// Standard deviation of the memory's object place, metres.
    pub memory_sigma_m: f64,
    /// Standard deviation of the rollout's object place, metres.
    pub rollout_sigma_m: f64,
    /// Standard deviation of the final heading, radians.
    pub yaw_sigma_rad: f64,
    /// Plan and memory may differ by this many of their combined spreads.
    pub agree_max: f64,
    /// Typical error with which the pose head places context frames, metres.
    pub localisation_sigma_m: f64,
    /// Largest median error of that kind that is believed, metres.
    pub localisation_max_m: f64,
    /// Smallest consistency figure that is believed, 0..1.
    pub consistency_min: f64,
    /// What the sampled drive has to show.
    pub drive: DriveRule,
    /// What the drive's pictures are worth when they are registered against what was seen. Absent where it was not
    /// measured: then they are only compared with the nearest remembered view.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration: Option<RegistrationParams>,
    /// What the variances of the place are multiplied by, so that the 90 % ellipse holds 90 % of true goals: witnesses
    /// read the same pictures and are not independent. 1 before it is measured.
    pub variance_scale: f64,
    /// Standard deviation of what all witnesses are off together, metres: they read the same small pictures, and however well
    /// they agree, the place is known no better. Its square is added to the scaled variance. Absent where it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_sigma_m: Option<f64>,
    /// Largest mean absolute error (0..1) with which the codec may reproduce camera frames; pictures that it
    /// cannot reproduce are unlike those of training. Absent where it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconstruction_max: Option<f64>,
    /// Spreads for a robot without odometry, where they were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub without_odometry: Option<Spreads>,
    /// Standoffs by a word of the goal, where they differ from [`Self::standoff_m`], metres.
    pub standoff_by_word_m: BTreeMap<String, f64>,
}

/// What the sampled drive has to show for a pose to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveRule {
    /// A drive was sampled and shows the thing, in its place, and a way there through what was seen. Where the deadline
    /// left no time to sample one, the other witnesses answer, and the answer says so.
    Required,
    /// A drive that shows something else makes the answer less consistent.
    Optional,
}

/// How well the pictures of right drives are registered. Errors are shares of a picture that are not explained, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrationParams {
    /// Standard deviation of the object's position as estimated from the drive's end, metres.
    pub sigma_m: f64,
    /// Standard deviation of the end's heading, radians.
    pub yaw_sigma_rad: f64,
    /// Largest error of the last pictures.
    pub end_error_max: f64,
    /// Largest error of the worst picture on the way.
    pub way_error_max: f64,
    /// Largest error of what the box holds.
    pub thing_error_max: f64,
    /// The drive's end and the other witnesses may differ by this many of their combined spreads.
    pub agree_max: f64,
}

impl RegistrationParams {
    /// Values to begin with, before calibration.
    #[must_use]
    pub fn uncalibrated() -> Self {
        Self {
            sigma_m: 0.2,
            yaw_sigma_rad: 0.1,
            end_error_max: 0.4,
            way_error_max: 0.5,
            thing_error_max: 0.6,
            agree_max: 5.0,
        }
    }
}

/// Spreads of plan and memory when nothing but the pose head places the context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spreads {
    /// As [`LiftParams::plan_sigma_m`].
    pub plan_sigma_m: f64,
    /// As [`LiftParams::memory_sigma_m`].
    pub memory_sigma_m: f64,
    /// As [`LiftParams::yaw_sigma_rad`].
    pub yaw_sigma_rad: f64,
    /// As [`LiftParams::variance_scale`].
    pub variance_scale: f64,
}

impl LiftParams {
    /// With the spreads for a robot without odometry in the place of the others; as they are where none were measured.
    #[must_use]
    pub fn unposed(&self) -> Self {
        let mut out = self.clone();
        if let Some(s) = self.without_odometry {
            out.plan_sigma_m = s.plan_sigma_m;
            out.memory_sigma_m = s.memory_sigma_m;
            out.yaw_sigma_rad = s.yaw_sigma_rad;
            out.variance_scale = s.variance_scale;
        }
        out
    }

    /// Values to begin with, before calibration.
    #[must_use]
    pub fn uncalibrated() -> Self {
        Self {
            glance_timestep: 970.0,
            standoff_m: 1.2,
            mask_present: 0.0,
            mask_vote: -1.0,
            plan_sigma_m: 0.3,
            memory_sigma_m: 0.25,
            rollout_sigma_m: 0.4,
            yaw_sigma_rad: 0.2,
            agree_max: 3.5,
            localisation_sigma_m: 0.4,
            localisation_max_m: 1.2,
            consistency_min: 0.2,
            drive: DriveRule::Required,
            registration: Some(RegistrationParams::uncalibrated()),
            variance_scale: 1.0,
            shared_sigma_m: None,
            reconstruction_max: None,
            without_odometry: None,
            standoff_by_word_m: BTreeMap::new(),
        }
    }

    /// The standoff for a goal, metres: that of the last of its words that has one of its own.
    #[must_use]
    pub fn standoff_for(&self, goal: &str) -> f64 {
        let words = goal.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase);
        words.filter_map(|w| self.standoff_by_word_m.get(&w)).next_back().copied().unwrap_or(self.standoff_m)
    }

    fn validate(&self, networks: &Networks) -> Result<(), BundleError> {
        let finite = [("mask_present", self.mask_present), ("mask_vote", self.mask_vote)];
        if let Some((name, value)) = finite.into_iter().find(|(_, v)| !v.is_finite()) {
            return Err(field(format!("lift.{name}"), "a finite number", value));
        }
        positive(
            "lift.",
            [
                ("glance_timestep", self.glance_timestep),
                ("standoff_m", self.standoff_m),
                ("plan_sigma_m", self.plan_sigma_m),
                ("memory_sigma_m", self.memory_sigma_m),
                ("rollout_sigma_m", self.rollout_sigma_m),
                ("yaw_sigma_rad", self.yaw_sigma_rad),
                ("agree_max", self.agree_max),
                ("localisation_sigma_m", self.localisation_sigma_m),
                ("localisation_max_m", self.localisation_max_m),
                ("variance_scale", self.variance_scale),
                ("shared_sigma_m", self.shared_sigma_m.unwrap_or(1.0)),
                ("reconstruction_max", self.reconstruction_max.unwrap_or(1.0)),
            ],
        )?;
        if let Some(r) = &self.registration {
            positive(
                "lift.registration.",
                [
                    ("sigma_m", r.sigma_m),
                    ("yaw_sigma_rad", r.yaw_sigma_rad),
                    ("end_error_max", r.end_error_max),
                    ("way_error_max", r.way_error_max),
                    ("thing_error_max", r.thing_error_max),
                    ("agree_max", r.agree_max),
                ],
            )?;
        }
        if !(0.0..=1.0).contains(&self.consistency_min) {
            return Err(field("lift.consistency_min", "a number from 0 to 1", self.consistency_min));
        }
        if let Some(s) = &self.without_odometry {
            positive(
                "lift.without_odometry.",
                [
                    ("plan_sigma_m", s.plan_sigma_m),
                    ("memory_sigma_m", s.memory_sigma_m),
                    ("yaw_sigma_rad", s.yaw_sigma_rad),
                    ("variance_scale", s.variance_scale),
                ],
            )?;
        }
        for (word, metres) in &self.standoff_by_word_m {
            if let Some(TextSpec::Closed { words, .. }) = &networks.text
                && !words.contains(word)
            {
                let key = format!("lift.standoff_by_word_m.{word}");
                return Err(field(
                    key,
                    format!("one of {}", words.join(", ")),
                    "a word that the model lacks",
                ));
            }
            positive("lift.standoff_by_word_m.", [(word.as_str(), *metres)])?;
        }
        Ok(())
    }
}

/// Refuses numbers that are not positive and finite, by the names of their table and key.
fn positive<'a>(table: &str, numbers: impl IntoIterator<Item = (&'a str, f64)>) -> Result<(), BundleError> {
    match numbers.into_iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
        Some((name, value)) => Err(field(format!("{table}{name}"), "a positive number", value)),
        None => Ok(()),
    }
}

impl Networks {
    fn validate(&self) -> Result<(), BundleError> {
        if let Some(camera) = &self.camera {
            let ranges = [
                ("horizontal_fov_deg", camera.horizontal_fov_deg, 1.0..=179.0),
                ("pitch_deg", camera.pitch_deg, -90.0..=90.0),
                ("height_m", camera.height_m, 0.0..=100.0),
            ];
            for (name, value, range) in ranges {
                if !range.contains(&value) {
                    let wanted = format!("a number from {} to {}", range.start(), range.end());
                    return Err(field(format!("networks.camera.{name}"), wanted, value));
                }
            }
        }
        if let Some(layout) = &self.layout {
            let counts = [
                ("motion_latents", layout.motion_latents, 0),
                ("box_latents", layout.box_latents, 1),
                ("recording_images", layout.recording_images.unwrap_or(9), 9),
            ];
            for (name, count, least) in counts {
                if !(least..=1 << 16).contains(&count) {
                    let wanted = format!("{least} to 65536");
                    return Err(field(format!("networks.layout.{name}"), wanted, count));
                }
            }
        }
        match &self.text {
            Some(TextSpec::Closed { words, attributes }) => {
                let plain = |w: &String| !w.is_empty() && *w == w.to_lowercase();
                if let Some(bad) = words.iter().find(|w| !plain(w)) {
                    return Err(field(
                        "networks.text.closed.words",
                        "words in lower case",
                        format!("{bad:?}"),
                    ));
                }
                if words.is_empty() {
                    return Err(field("networks.text.closed.words", "at least one word", 0));
                }
                if let Some(other) = attributes.iter().flatten().find(|word| !words.contains(word)) {
                    let wanted = format!("some of {}", words.join(", "));
                    return Err(field("networks.text.closed.attributes", wanted, format!("{other:?}")));
                }
                if attributes.iter().any(Vec::is_empty) {
                    return Err(field(
                        "networks.text.closed.attributes",
                        "groups of one word or more",
                        "an empty one",
                    ));
                }
            }
            Some(TextSpec::Sentence { prompt }) if prompt.matches("{}").count() != 1 => {
                let wanted = "a sentence with {} once";
                return Err(field("networks.text.sentence.prompt", wanted, format!("{prompt:?}")));
            }
            _ => {}
        }
        if let Some(depth) = &self.depth {
            depth.validate().map_err(|e| field(format!("networks.{}", e.field), &e.wanted, &e.got))?;
        }
        Ok(())
    }
}

/// What was measured before a bundle was shipped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// By `eval grounding --store`.
    pub grounding: Option<Measured>,
}

/// Figures of one command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The command.
    pub command: String,
    /// Hash of the bundle that was measured, which storing these figures changes.
    pub measured_bundle: String,
    /// `[value, low, high]` by name, with the ends of the 95 % interval. A record: names are those of the command's
    /// document.
    pub figures: BTreeMap<String, [f64; 3]>,
}

/// The images that the model sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Every how many camera frames one is kept.
    pub frame_stride: usize,
    /// Camera frames per second that the stride was chosen for.
    pub frames_per_second: f64,
}

/// The latents that the denoiser sees: `(z - mean) / std` of what the encoder gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// Channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Kept frames per latent.
    pub frames: usize,
    /// Per channel.
    pub mean: Vec<f32>,
    /// Per channel.
    pub std: Vec<f32>,
}

/// Temporal positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeSpec {
    /// Targets start this far after the last context latent.
    pub gap: f64,
}

/// Numbers of latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Context latents in training.
    pub context_trained: usize,
    /// Context latents allowed at most.
    pub context_allowed: usize,
    /// Target latents in training.
    pub target_trained: usize,
    /// Target latents allowed at most.
    pub target_allowed: usize,
}

/// Defaults of the sampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerSpec {
    /// Noise levels.
    pub grid: Grid,
    /// Update rule.
    pub solver: Solver,
    /// Shift of the noise levels.
    pub shift: f64,
    /// Steps.
    pub steps: usize,
    /// Weight of the joint guidance; 1 is none.
    pub guidance: f64,
    /// What the network predicts; the same as the denoiser's own field.
    pub prediction: Prediction,
    /// What the drive that is shown is held to.
    pub guide: Guide,
}

/// What the drive that is shown is held to while it is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guide {
    /// Remembered pictures, carried into its views by their depth and poses; where these are unknown, nothing.
    Warp,
    /// Nothing: the drive is the network's alone.
    None,
}

/// Where a bundle comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// `trained`, or the checkpoint that was imported.
    pub source: String,
    /// The training configuration, whole: a record that nothing reads.
    pub training: toml::Table,
    /// Seeds of the data.
    pub seeds: Vec<u64>,
    /// Revision of the code.
    pub revision: String,
}

/// How a component is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComponentFormat {
    /// An ONNX graph, perhaps with weights beside it.
    Onnx,
    /// Weights only.
    Safetensors,
    /// A built TensorRT engine.
    Tensorrt,
    /// A SentencePiece model.
    Sentencepiece,
    /// Something that its reader knows.
    Other,
}

/// One component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Component {
    /// What the main file is.
    pub format: ComponentFormat,
    /// The main file first.
    pub files: Vec<FileSpec>,
    /// Inputs of a graph.
    pub inputs: Vec<PortSpec>,
    /// Outputs of a graph.
    pub outputs: Vec<PortSpec>,
}

/// A file of a component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Name in the bundle's directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash, 64 hexadecimal digits.
    pub sha256: String,
}

/// A size in the manifest: a number or a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum SizeSpec {
    /// Always the same.
    Fixed(usize),
    /// Differs between calls.
    Named(String),
}

impl<'de> Deserialize<'de> for SizeSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = SizeSpec;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a size or the name of one")
            }

            fn visit_i64<E: serde::de::Error>(self, size: i64) -> Result<SizeSpec, E> {
                let fixed = usize::try_from(size).map(SizeSpec::Fixed);
                fixed.map_err(|_| E::invalid_value(Unexpected::Signed(size), &self))
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<SizeSpec, E> {
                Ok(SizeSpec::Named(name.to_owned()))
            }
        }
        deserializer.deserialize_any(Size)
    }
}

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Name.
    pub name: String,
    /// Element type: `f32`, `i64`, …
    pub dtype: String,
    /// Shape, slowest axis first.
    pub shape: Vec<SizeSpec>,
}

impl PortSpec {
    pub(super) fn from_port(port: &Port) -> Self {
        let size = |d: &Dim| match d {
            Dim::Fixed(size) => SizeSpec::Fixed(*size),
            Dim::Symbol(name) => SizeSpec::Named(name.clone()),
            Dim::Unknown => SizeSpec::Named("?".into()),
        };
        Self {
            name: port.name.clone(),
            dtype: port.dtype.name().into(),
            shape: port.shape.iter().map(size).collect(),
        }
    }

    /// As a backend describes it.
    ///
    /// # Errors
    /// [`BundleError::Field`] for an element type that is not known.
    pub fn to_port(&self) -> Result<Port, BundleError> {
        let dtype = DataType::from_name(&self.dtype).ok_or_else(|| {
            field(format!("{:?}.dtype", self.name), "an element type such as f32", &self.dtype)
        })?;
        let shape = self
            .shape
            .iter()
            .map(|s| match s {
                SizeSpec::Fixed(size) => Dim::Fixed(*size),
                SizeSpec::Named(name) if name == "?" => Dim::Unknown,
                SizeSpec::Named(name) => Dim::Symbol(name.clone()),
            })
            .collect();
        Ok(Port { name: self.name.clone(), dtype, shape })
    }
}

impl Manifest {
    /// Reads the text of a manifest and checks everything that can be checked without the files. `file` is where the
    /// text is from, for errors.
    ///
    /// # Errors
    /// [`BundleError::Syntax`], [`BundleError::Key`] for a key that is unknown, missing or of another type,
    /// [`BundleError::Field`] for a value that does not fit.
    pub fn from_toml(text: &str, file: &Path) -> Result<Self, BundleError> {
        let table: toml::Table = toml::from_str(text).map_err(|source| {
            let line = source.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            BundleError::Syntax { file: file.to_owned(), line, source }
        })?;
        // Other versions have other keys: say so before they are looked at.
        if let Some(format) = table.get("format")
            && format.as_integer().is_some_and(|format| format != i64::from(FORMAT))
        {
            return Err(field("format", FORMAT, format));
        }
        let manifest: Self = reader::read(&table).map_err(|mismatch| {
            let (table, key) = mismatch.place();
            let (wanted, got) = (mismatch.wanted, mismatch.got);
            BundleError::Key { file: file.to_owned(), table, key, wanted, got }
        })?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The text of a manifest.
    ///
    /// # Errors
    /// [`BundleError::Write`] for values that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, BundleError> {
        Ok(toml::to_string_pretty(self)?)
    }

    /// Checks every field that can be checked without the files.
    ///
    /// # Errors
    /// [`BundleError::Field`] for the first that does not fit.
    pub fn validate(&self) -> Result<(), BundleError> {
        if self.format != FORMAT {
            return Err(field("format", FORMAT, self.format));
        }
        for (name, value) in [("name", &self.name), ("precision", &self.precision), ("target", &self.target)]
        {
            if value.is_empty() {
                return Err(field(name, "a word", "nothing"));
            }
        }
        self.dit.validate().map_err(|e| field(e.field, e.wanted, e.got))?;
        self.validate_sizes()?;
        if let Some(bad) = self.latent.std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(field("latent.std", "positive numbers", bad));
        }
        if let Some(bad) = self.latent.mean.iter().find(|m| !m.is_finite()) {
            return Err(field("latent.mean", "finite numbers", bad));
        }
        positive(
            "",
            [
                ("image.frames_per_second", self.image.frames_per_second),
                ("sampler.shift", self.sampler.shift),
                ("sampler.guidance", self.sampler.guidance),
            ],
        )?;
        if !(self.rope.gap.is_finite() && self.rope.gap >= 0.0) {
            return Err(field("rope.gap", "a number from 0 on", self.rope.gap));
        }
        if self.sampler.prediction != self.dit.prediction {
            let name = |p: Prediction| match p {
                Prediction::Velocity => "velocity",
                Prediction::X0 => "x0",
            };
            return Err(field(
                "sampler.prediction",
                name(self.dit.prediction),
                name(self.sampler.prediction),
            ));
        }
        self.networks.validate()?;
        if !(0.0..=1.0).contains(&self.bounding_box.score_min) {
            return Err(field("bounding_box.score_min", "a number from 0 to 1", self.bounding_box.score_min));
        }
        match &self.lift {
            Some(lift) if self.dit.lift => lift.validate(&self.networks)?,
            None if !self.dit.lift => {}
            Some(_) => return Err(field("lift", "no table: the denoiser has no lift heads", "a table")),
            None => return Err(field("lift", "a table: the denoiser has lift heads", "nothing")),
        }
        for (name, component) in &self.component {
            component.validate(name)?;
        }
        self.validate_depth()
    }

    /// Sizes agree with those of the denoiser and with each other.
    fn validate_sizes(&self) -> Result<(), BundleError> {
        let same = [
            ("latent.channels", self.dit.out_channels, self.latent.channels),
            ("latent.height", self.dit.latent_height, self.latent.height),
            ("latent.width", self.dit.latent_width, self.latent.width),
            ("latent.mean (length)", self.latent.channels, self.latent.mean.len()),
            ("latent.std (length)", self.latent.channels, self.latent.std.len()),
        ];
        for (name, wanted, got) in same {
            if wanted != got {
                return Err(field(name, wanted, got));
            }
        }
        for (name, size) in [
            ("image.width", self.image.width),
            ("image.height", self.image.height),
            ("image.frame_stride", self.image.frame_stride),
            ("latent.frames", self.latent.frames),
            ("limits.context_allowed", self.limits.context_allowed),
            ("limits.target_allowed", self.limits.target_allowed),
            ("sampler.steps", self.sampler.steps),
        ] {
            if !(1..=1 << 16).contains(&size) {
                return Err(field(name, "1 to 65536", size));
            }
        }
        for (name, pixels, latents) in [
            ("image.width", self.image.width, self.latent.width),
            ("image.height", self.image.height, self.latent.height),
        ] {
            if pixels % latents != 0 {
                return Err(field(name, format!("a multiple of {latents} latent pixels"), pixels));
            }
        }
        Ok(())
    }

    /// The depth reader sees what the denoiser's images show, in its own number of pixels; its graph is of the sizes that
    /// its table states.
    fn validate_depth(&self) -> Result<(), BundleError> {
        let (component, table) = (self.component.get("depth"), &self.networks.depth);
        let Some(depth) = table else {
            return match component {
                Some(_) => Err(field("networks.depth", "a table: there is a component depth", "nothing")),
                None => Ok(()),
            };
        };
        if depth.width * self.image.height != depth.height * self.image.width {
            let wanted = format!(
                "the shape of image.width, image.height: {}, {}",
                self.image.width, self.image.height
            );
            let got = format!("{}, {}", depth.width, depth.height);
            return Err(field("networks.depth.width, networks.depth.height", wanted, got));
        }
        let Some(component) = component else { return Ok(()) };
        let port = |name: &str, shape: &[usize]| Port {
            name: name.into(),
            dtype: DataType::F32,
            shape: shape.iter().map(|n| Dim::Fixed(*n)).collect(),
        };
        let (h, w) = (depth.height, depth.width);
        component.check_ports("depth", &[port("picture", &[1, 3, h, w])], &[port("log_depth", &[1, h, w])])
    }
}

impl Component {
    pub(super) fn validate(&self, name: &str) -> Result<(), BundleError> {
        if !COMPONENTS.contains(&name) {
            return Err(field("component", format!("one of {}", COMPONENTS.join(", ")), name));
        }
        let at = |part: &str| format!("component.{name}.{part}");
        if self.files.is_empty() {
            return Err(field(at("files"), "at least one file", 0));
        }
        for file in &self.files {
            if !is_plain_name(&file.name) {
                return Err(field(at("files.name"), "a plain file name", &file.name));
            }
            if file.sha256.len() != 64 || !file.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(field(at("files.sha256"), "64 hexadecimal digits", &file.sha256));
            }
        }
        for (side, ports) in [("inputs", &self.inputs), ("outputs", &self.outputs)] {
            for (i, port) in ports.iter().enumerate() {
                port.to_port()?;
                if ports[..i].iter().any(|p| p.name == port.name) {
                    return Err(field(at(side), "names that differ", &port.name));
                }
            }
        }
        Ok(())
    }

    /// Compares the manifest's inputs and outputs with those that a graph or an engine really has.
    ///
    /// # Errors
    /// [`BundleError::Field`] naming the input or output.
    pub fn check_ports(&self, name: &str, inputs: &[Port], outputs: &[Port]) -> Result<(), BundleError> {
        for (side, stated, real) in [("inputs", &self.inputs, inputs), ("outputs", &self.outputs, outputs)] {
            for spec in stated {
                let port = spec.to_port()?;
                let at = format!("component.{name}.{side}.{}", port.name);
                match real.iter().find(|p| p.name == port.name) {
                    None => return Err(field(at, describe(&port), "nothing of this name")),
                    Some(found) if found.dtype != port.dtype || !same_shape(&found.shape, &port.shape) => {
                        return Err(field(at, describe(&port), describe(found)));
                    }
                    Some(_) => {}
                }
            }
            if let Some(extra) = real.iter().find(|p| !stated.iter().any(|s| s.name == p.name)) {
                return Err(field(
                    format!("component.{name}.{side}.{}", extra.name),
                    "nothing of this name",
                    describe(extra),
                ));
            }
        }
        Ok(())
    }
}

/// Whether two shapes agree; sizes that one of them does not know agree with all. (An engine has lost the names of sizes
/// that differ between calls.)
fn same_shape(a: &[Dim], b: &[Dim]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || *a == Dim::Unknown || *b == Dim::Unknown)
}

fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    name != MANIFEST && matches!((parts.next(), parts.next()), (Some(PathPart::Normal(p)), None) if p == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use toml::{Table, Value};

    /// Tables whose keys are data: names of settings, words, figures, components.
    const OPEN: [&str; 5] = [
        "provenance.training",
        "lift.standoff_by_word_m",
        "evaluation.grounding.figures",
        "component",
        "networks.text",
    ];

    fn shipped() -> String {
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny/bundle.toml"))
            .unwrap()
    }

    fn load(text: &str) -> Result<Manifest, BundleError> {
        Manifest::from_toml(text, Path::new("dir/bundle.toml"))
    }

    /// A bundle of the full family, with the tables that the small one lacks.
    fn large() -> Manifest {
        let mut manifest = load(&shipped()).unwrap();
        let vae = VaeConfig {
            base_dim: 4,
            decoder_base_dim: 4,
            z_dim: 4,
            dim_mult: vec![1, 2],
            num_res_blocks: 1,
            temporal_downsample: vec![true],
            patch_size: 2,
            latents_mean: vec![0.0; 4],
            latents_std: vec![1.0; 4],
        };
        manifest.dit.lift = false;
        manifest.lift = None;
        manifest.evaluation = Evaluation::default();
        let prompt = "It looks at {} in the end.".to_owned();
        manifest.networks = Networks {
            vae: Some(vae),
            camera: None,
            codec: None,
            text: Some(TextSpec::Sentence { prompt }),
            ..manifest.networks
        };
        manifest
    }

    /// All tables of a document by their names, the tables in arrays included.
    fn tables(value: &Value, name: &str, into: &mut Vec<String>) {
        match value {
            Value::Table(table) => {
                into.push(name.to_owned());
                for (key, value) in table {
                    tables(value, [name, key].join(".").trim_start_matches('.'), into);
                }
            }
            Value::Array(values) => {
                for (i, value) in values.iter().enumerate() {
                    tables(value, &format!("{name}.{i}"), into);
                }
            }
            _ => {}
        }
    }

    fn table_at<'a>(root: &'a mut Table, name: &str) -> &'a mut Table {
        let mut parts = name.split('.').filter(|p| !p.is_empty());
        let Some(first) = parts.next() else { return root };
        let mut at = root.get_mut(first).unwrap();
        for part in parts {
            at = match at {
                Value::Array(values) => &mut values[part.parse::<usize>().unwrap()],
                other => other.get_mut(part).unwrap(),
            };
        }
        at.as_table_mut().unwrap()
    }

    #[test]
    fn every_key_of_every_table_is_held_to_its_name_and_type() {
        let mut counts = [0; 3];
        for text in [shipped(), large().to_toml().unwrap()] {
            let whole: Table = text.parse().unwrap();
            let mut names = Vec::new();
            tables(&Value::Table(whole.clone()), "", &mut names);
            for name in &names {
                let open = OPEN.iter().any(|o| name == o || name.starts_with("provenance.training."));
                let keys: Vec<String> = table_at(&mut whole.clone(), name).keys().cloned().collect();
                for key in keys {
                    let check = |what: &str, key: &str, edit: &dyn Fn(&mut Table)| {
                        let mut edited = whole.clone();
                        edit(table_at(&mut edited, name));
                        let error = load(&toml::to_string(&edited).unwrap()).expect_err(what);
                        let BundleError::Key { file, table, key: at, wanted, got } = &error else {
                            panic!("[{name}] {key} {what}: {error}");
                        };
                        let place = if table.is_empty() { at.clone() } else { format!("{table}.{at}") };
                        let expected = format!("{name}.{key}");
                        assert!(
                            place.starts_with(expected.trim_start_matches('.')),
                            "[{name}] {key} {what}: {error}"
                        );
                        assert_eq!(file, Path::new("dir/bundle.toml"));
                        assert!(!wanted.is_empty() && !got.is_empty(), "{error}");
                        for part in ["dir/bundle.toml", at, wanted, got] {
                            assert!(error.to_string().contains(part), "{error}");
                        }
                    };
                    // The number of images of a recording, the codec's limit, what witnesses share, registration, the spreads
                    // without odometry and groups of words are the only optional keys.
                    let measured =
                        ["reconstruction_max", "shared_sigma_m", "registration", "without_odometry"];
                    let optional = key == "recording_images"
                        || measured.contains(&key.as_str())
                        || ["networks", "evaluation"].contains(&name.as_str())
                        || (name.is_empty() && key == "lift")
                        || (name == "networks.text.closed" && key == "attributes");
                    if !open {
                        let misspelt = format!("{key}x");
                        check("misspelt", &misspelt, &|table| {
                            let value = table.remove(&key).unwrap();
                            table.insert(misspelt.clone(), value);
                        });
                        counts[0] += 1;
                        if !optional {
                            check("missing", &key, &|table| {
                                table.remove(&key);
                            });
                            counts[1] += 1;
                        }
                    }
                    if !name.starts_with("provenance.training") {
                        check("of another type", &key, &|table| {
                            let other = match &table[&key] {
                                Value::String(_) => Value::Integer(7),
                                Value::Array(_) => Value::Boolean(true),
                                _ => Value::String("seven".into()),
                            };
                            table.insert(key.clone(), other);
                        });
                        counts[2] += 1;
                    }
                }
            }
        }
        assert!(counts.iter().all(|n| *n > 150), "{counts:?} edits were tried");
    }

    #[test]
    fn errors_are_sentences() {
        let cases = [
            (
                "height_m = 1.0",
                "hight_m = 1.0",
                "dir/bundle.toml: [networks.camera] hight_m: wanted one of horizontal_fov_deg, pitch_deg, height_m, \
                 got a key that does not exist",
            ),
            (
                "height_m = 1.0\n",
                "",
                "dir/bundle.toml: [networks.camera] height_m: wanted a value, got nothing",
            ),
            (
                "height_m = 1.0",
                "height_m = \"one\"",
                "dir/bundle.toml: [networks.camera] height_m: wanted a number, got string \"one\"",
            ),
            (
                "camera_channels = 24\n",
                "",
                "dir/bundle.toml: [dit] camera_channels: wanted a value, got nothing",
            ),
            (
                "\"red\",",
                "3,",
                "dir/bundle.toml: [networks.text.closed.words] 0: wanted a string, got integer 3",
            ),
            ("format = 2", "format = 1", "bundle: format: wanted 2, got 1"),
            ("drive = \"required\"", "drive = \"perhaps\"", "dir/bundle.toml: [lift] drive: wanted"),
            (
                "agree_max = 3.968",
                "agree_max = nan",
                "bundle: lift.agree_max: wanted a positive number, got NaN",
            ),
            (
                "pitch_deg = 14.0",
                "pitch_deg = 140.0",
                "networks.camera.pitch_deg: wanted a number from -90 to 90",
            ),
            (
                "[lift.standoff_by_word_m]",
                "[lift.standoff_by_word_m]\nsofa = 1.5",
                "standoff_by_word_m.sofa: wanted one of",
            ),
            ("[rope]", "[rope", "dir/bundle.toml: line "),
        ];
        for (from, to, want) in cases {
            let edited = shipped().replacen(from, to, 1);
            assert_ne!(edited, shipped(), "{from}");
            let error = load(&edited).unwrap_err().to_string();
            assert!(error.contains(want), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn lift_table_and_lift_heads_come_together() {
        let mut manifest = load(&shipped()).unwrap();
        manifest.lift = None;
        assert!(manifest.validate().unwrap_err().to_string().contains("lift: wanted a table"));
        manifest.dit.lift = false;
        manifest.validate().unwrap();
        manifest.lift = Some(LiftParams::uncalibrated());
        assert!(manifest.validate().unwrap_err().to_string().contains("no table"));
        let mut sentence = large();
        sentence.validate().unwrap();
        sentence.networks.text = Some(TextSpec::Sentence { prompt: "no place".into() });
        assert!(sentence.validate().unwrap_err().to_string().contains("{} once"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let manifest = load(&shipped()).unwrap();
        assert!(manifest.lift.as_ref().is_some_and(|lift| lift.standoff_by_word_m.len() > 2));
        assert_eq!(load(&manifest.to_toml().unwrap()).unwrap(), manifest);
        assert_eq!(load(&large().to_toml().unwrap()).unwrap(), large());
    }

    #[test]
    fn standoffs_are_chosen_by_the_last_word_that_has_one() {
        let mut lift = LiftParams::uncalibrated();
        lift.standoff_by_word_m = [("bed".to_owned(), 1.9), ("table".to_owned(), 1.5)].into();
        for (goal, want) in [
            ("find the red chair", 1.2),
            ("Find the BED!", 1.9),
            ("the bed beside the table", 1.5),
            ("embed", 1.2),
            ("", 1.2),
        ] {
            assert_eq!(lift.standoff_for(goal), want, "{goal}");
        }
    }
}
