//! Which parts of a bundle are in memory together: one description, read by the runtime that loads them and by the
//! plan that adds them up.
//!
//! A part belongs to a *slot*. Parts of one slot take turns: loading one unloads the other. A part also has a session
//! in each *lane* that uses it. Lanes run at the same time as each other, the parts of one lane one after the other,
//! so that a lane needs one arena: that of its largest part.
//!
//! ```
//! use mindseye_engines::residency::{Keep, parts};
//! let has = |component: &str| ["text_encoder", "vae_encoder", "vae_decoder", "denoiser"].contains(&component);
//! let all = parts(Keep::All, &has);
//! assert_eq!(all.iter().map(|p| p.slot).collect::<Vec<_>>(), [0, 1, 2, 3], "nothing takes turns");
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use mindseye_base::sync::lock;
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendError, Engine, Port, PrepareOptions, Session, State, Tensor};

/// How much of a bundle stays in memory between its uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Every part, from the start on.
    #[default]
    All,
    /// The text encoder is unloaded when it has encoded, and of two halves (first and next of the decoder, prefill and
    /// cached of the denoiser) the one in use is loaded.
    Halves,
    /// What one goal uses takes turns: text encoder, denoiser, decoder. The encoder of frames stays: a camera does not
    /// wait.
    One,
}

impl Keep {
    /// From most memory to least.
    pub const ALL: [Keep; 3] = [Keep::All, Keep::Halves, Keep::One];

    /// The name used on the command line and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Keep::All => "all",
            Keep::Halves => "halves",
            Keep::One => "one",
        }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not a way to keep parts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no way to keep parts in memory: use all, halves or one")]
pub struct UnknownKeep {
    /// What was given.
    pub given: String,
}

impl FromStr for Keep {
    type Err = UnknownKeep;

    fn from_str(text: &str) -> Result<Self, UnknownKeep> {
        let found = Keep::ALL.into_iter().find(|k| k.name() == text);
        found.ok_or_else(|| UnknownKeep { given: text.to_owned() })
    }
}

/// File in a folder of engines that says how they were built, and what is kept in memory between uses (`keep_loaded`).
pub const SETTINGS_FILE: &str = "build.json";

/// What the runtime needs of [`SETTINGS_FILE`].
#[derive(Deserialize)]
struct BuildFile {
    #[serde(default)]
    keep_loaded: Option<Keep>,
}

/// What to keep in memory of a folder of engines: what its build planned; every part where it does not say.
///
/// # Errors
/// The file cannot be read, or is not what a build writes.
pub fn keep_of(folder: &Path) -> std::io::Result<Keep> {
    let file = std::fs::File::open(folder.join(SETTINGS_FILE))?;
    let read: BuildFile = serde_json::from_reader(std::io::BufReader::new(file))?;
    Ok(read.keep_loaded.unwrap_or_default())
}

/// What runs at the same time as something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Frames of the camera are encoded.
    Intake,
    /// A goal is worked on.
    Goal,
}

/// One graph or engine that the runtime loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Component of the bundle.
    pub component: &'static str,
    /// Lanes with a session of it.
    pub lanes: &'static [Lane],
    /// Parts with the same number take turns.
    pub slot: usize,
    /// True when it is unloaded after each use, even where nothing takes its turn.
    pub unloaded_after_use: bool,
    /// True when the results of its last few inputs are kept, so that it need not be loaded for them again.
    pub remembers: bool,
}

/// Results that a part keeps which [`Part::remembers`].
pub const REMEMBERED: usize = 4;

const GOAL: &[Lane] = &[Lane::Goal];
const INTAKE: &[Lane] = &[Lane::Intake];
const BOTH: &[Lane] = &[Lane::Intake, Lane::Goal];

/// The parts that the runtime loads of a bundle that has the components for which `has` is true, in the order of their
/// use.
#[must_use]
pub fn parts(keep: Keep, has: &dyn Fn(&str) -> bool) -> Vec<Part> {
    let mut used: Vec<(&'static str, &'static [Lane], &'static str)> = vec![("text_encoder", GOAL, "text")];
    if has("vae_encoder") {
        used.push(("vae_encoder", BOTH, "encoder"));
    } else {
        // A goal encodes stills, each of them the first frame of a stream of its own.
        used.extend([("vae_encoder_first", BOTH, "encoder"), ("vae_encoder_next", INTAKE, "encoder next")]);
    }
    if has("denoiser_prefill") && has("denoiser_cached") {
        used.extend([("denoiser_prefill", GOAL, "denoiser"), ("denoiser_cached", GOAL, "denoiser")]);
    } else {
        used.push(("denoiser", GOAL, "denoiser"));
    }
    if has("vae_decoder") {
        used.push(("vae_decoder", GOAL, "decoder"));
    } else {
        used.extend([("vae_decoder_first", GOAL, "decoder"), ("vae_decoder_next", GOAL, "decoder")]);
    }
    if has("depth") {
        used.push(("depth", GOAL, "depth"));
    }
    let mut slots: Vec<&str> = Vec::new();
    let place = |&(component, lanes, role): &(&'static str, &'static [Lane], &'static str)| {
        let name = match keep {
            Keep::All => component,
            Keep::Halves => role,
            Keep::One if lanes == GOAL => "goal",
            Keep::One => role,
        };
        let slot = slots.iter().position(|s| *s == name).unwrap_or_else(|| {
            slots.push(name);
            slots.len() - 1
        });
        let text = role == "text";
        Part {
            component,
            lanes,
            slot,
            unloaded_after_use: keep == Keep::Halves && text,
            remembers: keep != Keep::All && text,
        }
    };
    used.iter().map(place).collect()
}

/// What is loaded in a slot: which of its parts, and the session that all share.
struct Loaded {
    component: &'static str,
    session: Box<dyn Session>,
}

type Slot = Arc<Mutex<Option<Loaded>>>;

/// Prepares parts as a [`Keep`] says: parts that take turns are loaded when they run.
pub struct Residency {
    parts: Vec<Part>,
    slots: Vec<Slot>,
}

/// Where a part comes from.
pub struct Source {
    /// What runs it.
    pub backend: Arc<dyn Backend>,
    /// Its file.
    pub file: PathBuf,
    /// How it is prepared.
    pub options: PrepareOptions,
    /// Its inputs, as the bundle states them.
    pub inputs: Vec<Port>,
    /// Its outputs, as the bundle states them.
    pub outputs: Vec<Port>,
}

impl Residency {
    /// For a bundle that has the components for which `has` is true.
    #[must_use]
    pub fn new(keep: Keep, has: &dyn Fn(&str) -> bool) -> Self {
        let parts = parts(keep, has);
        let count = parts.iter().map(|p| p.slot + 1).max().unwrap_or(0);
        Residency { slots: (0..count).map(|_| Slot::default()).collect(), parts }
    }

    /// The parts.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Prepares a part: at once where it stays in memory, else when it runs.
    ///
    /// # Errors
    /// As [`Backend::prepare`], for parts that stay; [`BackendError::Unavailable`] for a component that is not among
    /// [`Residency::parts`].
    pub fn prepare(&self, component: &str, source: Source) -> Result<Arc<dyn Engine>, BackendError> {
        let Some(part) = self.parts.iter().find(|p| p.component == component) else {
            let what = format!("{component} is no part that is run");
            return Err(BackendError::Unavailable { backend: source.backend.name(), what });
        };
        let alone = self.parts.iter().filter(|p| p.slot == part.slot).count() == 1;
        if alone && !part.unloaded_after_use {
            return source.backend.prepare(&source.file, &source.options);
        }
        Ok(Arc::new(TurnEngine {
            component: part.component,
            unloaded_after_use: part.unloaded_after_use,
            remembered: part.remembers.then(Arc::default),
            slot: Arc::clone(&self.slots[part.slot]),
            source: Arc::new(source),
        }))
    }
}

/// Inputs and the outputs that were made of them, newest first.
type Remembered = Vec<(Vec<(String, Tensor)>, Vec<(String, Tensor)>)>;

/// An engine that is loaded when it runs.
#[derive(Clone)]
struct TurnEngine {
    component: &'static str,
    unloaded_after_use: bool,
    remembered: Option<Arc<Mutex<Remembered>>>,
    slot: Slot,
    source: Arc<Source>,
}

impl Engine for TurnEngine {
    fn inputs(&self) -> &[Port] {
        &self.source.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.source.outputs
    }

    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        Ok(Box::new(TurnSession { engine: self.clone() }))
    }
}

struct TurnSession {
    engine: TurnEngine,
}

impl TurnEngine {
    fn load(&self) -> Result<Loaded, BackendError> {
        let source = &self.source;
        let engine = source.backend.prepare(&source.file, &source.options)?;
        for (stated, real) in [(&source.inputs, engine.inputs()), (&source.outputs, engine.outputs())] {
            if let Some(port) = stated.iter().find(|p| !real.iter().any(|r| r.name == p.name)) {
                return Err(BackendError::Prepare {
                    backend: source.backend.name(),
                    path: source.file.clone(),
                    what: format!("it has no {:?}, which the bundle states", port.name),
                });
            }
        }
        Ok(Loaded { component: self.component, session: engine.session()? })
    }
}

impl TurnEngine {
    /// Runs, loading what is not there.
    fn run(
        &self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
        from: Option<&State>,
        to: Option<&mut State>,
    ) -> Result<(), BackendError> {
        let mut slot = lock(&self.slot);
        let loaded = match slot.take().filter(|l| l.component == self.component) {
            Some(loaded) => slot.insert(loaded),
            // What was there is dropped by now, before the other is loaded.
            None => slot.insert(self.load()?),
        };
        let done = loaded.session.run_with_state(inputs, outputs, from, to);
        if self.unloaded_after_use {
            *slot = None;
        }
        done
    }
}

/// Writes remembered results to `outputs`; false when there are none for these inputs.
fn recall(known: &Remembered, inputs: &[(&str, &Tensor)], outputs: &mut [(&str, &mut Tensor)]) -> bool {
    let same = |kept: &[(String, Tensor)]| {
        kept.len() == inputs.len() && kept.iter().zip(inputs).all(|((a, x), (b, y))| a == b && x == *y)
    };
    let Some((_, results)) = known.iter().find(|(kept, _)| same(kept)) else { return false };
    if !outputs.iter().all(|(name, _)| results.iter().any(|(n, _)| n == name)) {
        return false;
    }
    for (name, out) in outputs.iter_mut() {
        if let Some((_, result)) = results.iter().find(|(n, _)| n == name) {
            result.clone_into(out);
        }
    }
    true
}

impl Session for TurnSession {
    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        let Some(remembered) = &self.engine.remembered else {
            return self.engine.run(inputs, outputs, None, None);
        };
        let mut known = lock(remembered);
        if recall(&known, inputs, outputs) {
            return Ok(());
        }
        self.engine.run(inputs, outputs, None, None)?;
        let given = inputs.iter().map(|(name, x)| ((*name).to_owned(), (*x).clone())).collect();
        let results = outputs.iter().map(|(name, x)| ((*name).to_owned(), (**x).clone())).collect();
        known.insert(0, (given, results));
        known.truncate(REMEMBERED);
        Ok(())
    }

    fn run_with_state(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
        from: Option<&State>,
        to: Option<&mut State>,
    ) -> Result<(), BackendError> {
        self.engine.run(inputs, outputs, from, to)
    }

    fn engine(&self) -> &dyn Engine {
        &self.engine
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts what is loaded: "files" are names, and each takes one unit.
    #[derive(Default)]
    struct Counting {
        loaded: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
        loads: AtomicUsize,
    }

    struct Unit(Arc<AtomicUsize>);

    impl Drop for Unit {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[derive(Clone)]
    struct Fake {
        _unit: Arc<Unit>,
    }

    impl Backend for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }

        fn version(&self) -> String {
            "0".into()
        }

        fn prepare(&self, _: &Path, _: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
            self.loads.fetch_add(1, Ordering::SeqCst);
            let now = self.loaded.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            let unit = Arc::new(Unit(Arc::clone(&self.loaded)));
            Ok(Arc::new(Fake { _unit: unit }))
        }
    }

    impl Engine for Fake {
        fn inputs(&self) -> &[Port] {
            &[]
        }

        fn outputs(&self) -> &[Port] {
            &[]
        }

        fn session(&self) -> Result<Box<dyn Session>, BackendError> {
            Ok(Box::new(self.clone()))
        }
    }

    impl Session for Fake {
        fn run_into(
            &mut self,
            _: &[(&str, &Tensor)],
            _: &mut [(&str, &mut Tensor)],
        ) -> Result<(), BackendError> {
            Ok(())
        }

        fn engine(&self) -> &dyn Engine {
            self
        }
    }

    fn split(component: &str) -> bool {
        component != "vae_encoder" && component != "vae_decoder" && component != "denoiser"
    }

    #[test]
    fn slots_are_those_of_the_way_to_keep() {
        let names = |keep, slot: usize| {
            let all = parts(keep, &split);
            all.into_iter().filter(|p| p.slot == slot).map(|p| p.component).collect::<Vec<_>>()
        };
        assert_eq!(parts(Keep::All, &split).len(), 8);
        assert!((0..8).all(|slot| names(Keep::All, slot).len() == 1));
        assert_eq!(names(Keep::Halves, 3), ["denoiser_prefill", "denoiser_cached"]);
        assert_eq!(names(Keep::Halves, 4), ["vae_decoder_first", "vae_decoder_next"]);
        assert_eq!(names(Keep::One, 0).len(), 6);
        assert_eq!(names(Keep::One, 1), ["vae_encoder_first"], "a camera does not wait");
    }

    #[test]
    fn parts_of_one_slot_are_never_loaded_together() {
        for (keep, at_start, most) in [(Keep::All, 8, 8), (Keep::Halves, 3, 6), (Keep::One, 2, 3)] {
            let backend = Arc::new(Counting::default());
            let residency = Residency::new(keep, &split);
            let engines: Vec<Arc<dyn Engine>> = residency
                .parts()
                .iter()
                .map(|p| {
                    let source = Source {
                        backend: backend.clone(),
                        file: p.component.into(),
                        options: PrepareOptions::default(),
                        inputs: Vec::new(),
                        outputs: Vec::new(),
                    };
                    residency.prepare(p.component, source).unwrap()
                })
                .collect();
            assert_eq!(backend.loaded.load(Ordering::SeqCst), at_start, "{keep}");
            let mut sessions: Vec<_> = engines.iter().map(|e| e.session().unwrap()).collect();
            for word in 0..3 {
                let ids = Tensor::i64(&[1], vec![word]);
                sessions.iter_mut().for_each(|s| s.run_into(&[("ids", &ids)], &mut []).unwrap());
            }
            assert_eq!(backend.most.load(Ordering::SeqCst), most, "{keep}");
            // The same part again: nothing is loaded.
            let before = backend.loads.load(Ordering::SeqCst);
            let last = sessions.len() - 1;
            sessions[last].run_into(&[], &mut []).unwrap();
            assert_eq!(backend.loads.load(Ordering::SeqCst), before, "{keep}");
            drop((sessions, engines, residency));
            assert_eq!(backend.loaded.load(Ordering::SeqCst), 0, "{keep}");
        }
    }

    #[test]
    fn texts_that_were_encoded_need_no_encoder() {
        let backend = Arc::new(Counting::default());
        let residency = Residency::new(Keep::Halves, &split);
        let source = Source {
            backend: backend.clone(),
            file: "text_encoder".into(),
            options: PrepareOptions::default(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        let mut session = residency.prepare("text_encoder", source).unwrap().session().unwrap();
        let mut run = |word: i64| {
            let (ids, mut rows) = (Tensor::i64(&[1], vec![word]), Tensor::empty());
            session.run_into(&[("ids", &ids)], &mut [("rows", &mut rows)]).unwrap();
            backend.loads.load(Ordering::SeqCst)
        };
        assert_eq!([run(1), run(2), run(1), run(2)], [1, 2, 2, 2]);
        assert_eq!([run(3), run(4), run(5), run(6)], [3, 4, 5, 6]);
        assert_eq!(run(1), 7, "only the last few are kept");
    }
}
