//! The denoiser as a backend's session, and what its graph's inputs and outputs are called.
//!
//! | name | type | shape | in |
//! |---|---|---|---|
//! | `latents` | f32 | `[batch, in_channels, frames, height, width]` | all |
//! | `time` | f32 | `[timesteps, freq_dim]` | all |
//! | `rows` | i64 | `[batch, frames]` | all |
//! | `row_batch` | i64 | `[timesteps]` | with pooled text |
//! | `text` | f32 | `[batch, text_len, text_dim]` | all |
//! | `cos`, `sin` | f32 | `[tokens, head_dim / 2]` | all |
//! | `camera` | f32 | `[batch, frames, tokens per frame, camera_channels]` | with camera conditioning |
//! | `guide` | f32 | `[batch, frames, tokens per frame, guide_channels]` | with a guide |
//! | `bias` | f32 | `[1, 1, tokens, tokens]` | masked |
//! | `memory.{i}.k`, `memory.{i}.v` | f32 | `[batch, context_tokens, heads, head_dim]` | cached (in), prefill (out) |
//! | `sample` | f32 | `[batch, out_channels, frames, height, width]` | joint, masked, cached (out) |
//! | `pose`, `mask`, `locate` | f32 | `[batch, frames, 4]`, `[batch, frames, tokens per frame, 1]`, `[.., 2]` | with lift heads (out; for their own frames) |

use crate::backend::{BackendError, Resident, SampleStep, Session, State, Tensor};
use crate::denoise::{
    Denoise, DenoiseError, DenoiseStep, Denoised, HostInputs, Walk, WalkPlan, frames_first, sinusoid,
};
use crate::model::dit::{DitConfig, Prediction};
use crate::onnx::Dim;
use crate::sampler::{Schedule, Solver};

/// Which part of the forward pass a graph holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenoiserKind {
    /// Context and targets attend to each other.
    Joint,
    /// As joint, with a bias on the scores as one more input.
    Masked,
    /// Context alone; results are its keys and values.
    Prefill,
    /// Targets alone, which also look at keys and values made by [`DenoiserKind::Prefill`].
    Cached,
}

impl DenoiserKind {
    /// Name of the component in a bundle.
    pub fn component(self) -> &'static str {
        match self {
            DenoiserKind::Joint => "denoiser",
            DenoiserKind::Masked => "denoiser_masked",
            DenoiserKind::Prefill => "denoiser_prefill",
            DenoiserKind::Cached => "denoiser_cached",
        }
    }
}

/// The named tensors that every denoiser graph takes, for one step at batch 1.
///
/// # Errors
/// A size of the step disagrees with the configuration.
pub fn step_tensors(cfg: &DitConfig, step: &DenoiseStep<'_>) -> Result<Vec<(String, Tensor)>, DenoiseError> {
    let host = HostInputs::new(cfg, step)?;
    let (f, steps, per_frame) = (step.frames(), step.timesteps.len(), cfg.tokens_per_frame());
    let (tokens, half) = (f * per_frame, cfg.head_dim / 2);
    let mut tensors: Vec<(String, Tensor)> = vec![
        (
            "latents".into(),
            Tensor::f32(&[1, cfg.in_channels, f, cfg.latent_height, cfg.latent_width], host.latents),
        ),
        ("time".into(), Tensor::f32(&[steps, cfg.freq_dim], host.time)),
        ("rows".into(), Tensor::i64(&[1, f], host.rows)),
        ("text".into(), Tensor::f32(&[1, cfg.text_len, cfg.text_dim], step.text.to_vec())),
        ("cos".into(), Tensor::f32(&[tokens, half], host.cos)),
        ("sin".into(), Tensor::f32(&[tokens, half], host.sin)),
    ];
    if cfg.pooled_text {
        tensors.push(("row_batch".into(), Tensor::i64(&[steps], vec![0; steps])));
    }
    if cfg.camera_channels > 0 {
        tensors.push(("camera".into(), Tensor::f32(&[1, f, per_frame, cfg.camera_channels], host.camera)));
    }
    if cfg.guide_channels() > 0 {
        tensors.push(("guide".into(), Tensor::f32(&[1, f, per_frame, cfg.guide_channels()], host.guide)));
    }
    Ok(tensors)
}

/// Runs and reads the outputs of a graph that has `sample`.
fn evaluate(
    cfg: &DitConfig,
    session: &mut dyn Session,
    inputs: &[(&str, &Tensor)],
    memory: Option<&State>,
    buffers: &mut Buffers,
    frames: usize,
) -> Result<Denoised, BackendError> {
    let mut outputs: Vec<(&str, &mut Tensor)> = vec![("sample", &mut buffers.sample)];
    if cfg.lift {
        outputs.push(("pose", &mut buffers.pose));
        outputs.push(("mask", &mut buffers.mask));
        outputs.push(("locate", &mut buffers.locate));
    }
    session.run_with_state(inputs, &mut outputs, memory, None)?;
    let hw = cfg.latent_height * cfg.latent_width;
    let sample = floats("sample", &buffers.sample, frames * cfg.out_channels * hw)?;
    let mut result =
        Denoised { prediction: frames_first(&sample, cfg.out_channels, frames, hw), ..Denoised::default() };
    if cfg.lift {
        read_heads(cfg, buffers, frames, &mut result)?;
    }
    Ok(result)
}

fn floats(name: &str, tensor: &Tensor, count: usize) -> Result<Vec<f32>, BackendError> {
    match tensor.as_f32() {
        Some(values) if values.len() == count => Ok(values.to_vec()),
        _ => Err(BackendError::Output {
            name: name.to_owned(),
            expected: format!("{count} values of f32"),
            got: format!("{} {:?}", tensor.data.dtype().name(), tensor.shape),
        }),
    }
}

/// What the lift heads wrote about `frames` frames.
fn read_heads(
    cfg: &DitConfig,
    buffers: &Buffers,
    frames: usize,
    result: &mut Denoised,
) -> Result<(), BackendError> {
    let tokens = frames * cfg.tokens_per_frame();
    let pose = floats("pose", &buffers.pose, 4 * frames)?;
    result.pose = pose.chunks_exact(4).map(|p| [p[0], p[1], p[2], p[3]]).collect();
    result.mask = floats("mask", &buffers.mask, tokens)?;
    let locate = floats("locate", &buffers.locate, 2 * tokens)?;
    result.locate = locate.chunks_exact(2).map(|p| [p[0], p[1]]).collect();
    Ok(())
}

struct Buffers {
    sample: Tensor,
    pose: Tensor,
    mask: Tensor,
    locate: Tensor,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            sample: Tensor::empty(),
            pose: Tensor::empty(),
            mask: Tensor::empty(),
            locate: Tensor::empty(),
        }
    }
}

fn backend_error(error: BackendError) -> DenoiseError {
    DenoiseError::Backend(error.to_string())
}

/// Refuses an engine whose inputs and outputs are not those of the configuration.
fn check_ports(cfg: &DitConfig, session: &dyn Session, wanted: &[&str]) -> Result<(), DenoiseError> {
    cfg.validate()?;
    let engine = session.engine();
    let ports = || engine.inputs().iter().chain(engine.outputs());
    for name in wanted {
        let Some(port) = ports().find(|p| p.name == *name) else {
            return Err(DenoiseError::Backend(format!(
                "the engine has no {name:?}, the configuration asks for it"
            )));
        };
        let sizes: &[(usize, usize)] = match *name {
            "latents" => &[(1, cfg.in_channels), (3, cfg.latent_height), (4, cfg.latent_width)],
            "sample" => &[(1, cfg.out_channels), (3, cfg.latent_height), (4, cfg.latent_width)],
            "time" => &[(1, cfg.freq_dim)],
            "text" => &[(1, cfg.text_len), (2, cfg.text_dim)],
            "cos" => &[(1, cfg.head_dim / 2)],
            "camera" => &[(2, cfg.tokens_per_frame()), (3, cfg.camera_channels)],
            "guide" => &[(2, cfg.tokens_per_frame()), (3, cfg.guide_channels())],
            _ => &[],
        };
        for &(axis, size) in sizes {
            match port.shape.get(axis) {
                Some(Dim::Fixed(got)) if *got != size => {
                    return Err(DenoiseError::Backend(format!(
                        "{name:?} has size {got} on axis {axis}, the configuration says {size}"
                    )));
                }
                Some(_) => {}
                None => {
                    return Err(DenoiseError::Backend(format!("{name:?} has no axis {axis}")));
                }
            }
        }
    }
    Ok(())
}

fn common_ports(cfg: &DitConfig) -> Vec<&'static str> {
    let mut wanted = vec!["latents", "time", "rows", "text", "cos", "sin"];
    wanted.extend(cfg.pooled_text.then_some("row_batch"));
    wanted.extend((cfg.camera_channels > 0).then_some("camera"));
    wanted.extend((cfg.guide_channels() > 0).then_some("guide"));
    wanted
}

fn output_ports(cfg: &DitConfig) -> Vec<&'static str> {
    let mut wanted = vec!["sample"];
    if cfg.lift {
        wanted.extend(["pose", "mask", "locate"]);
    }
    wanted
}

/// [`Denoise`] over a session of the [`DenoiserKind::Joint`] graph.
pub struct SessionDenoiser {
    config: DitConfig,
    session: Box<dyn Session>,
    buffers: Buffers,
}

impl SessionDenoiser {
    /// Takes a session whose inputs and outputs are those of the configuration.
    ///
    /// # Errors
    /// [`DenoiseError::Backend`] naming the input or output that does not fit.
    pub fn new(config: DitConfig, session: Box<dyn Session>) -> Result<Self, DenoiseError> {
        check_ports(&config, session.as_ref(), &[common_ports(&config), output_ports(&config)].concat())?;
        Ok(Self { config, session, buffers: Buffers::default() })
    }
}

impl Denoise for SessionDenoiser {
    fn config(&self) -> &DitConfig {
        &self.config
    }

    fn denoise(&mut self, step: &DenoiseStep<'_>) -> Result<Denoised, DenoiseError> {
        let tensors = step_tensors(&self.config, step)?;
        let inputs: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        evaluate(&self.config, self.session.as_mut(), &inputs, None, &mut self.buffers, step.frames())
            .map_err(backend_error)
    }

    fn walk<'s>(&'s mut self, plan: &WalkPlan<'_>) -> Result<Option<Box<dyn Walk + 's>>, DenoiseError> {
        let Some(session) = self.session.resident() else { return Ok(None) };
        let branches: Vec<Pass<'_, '_>> =
            plan.branches.iter().map(|step| Pass { memory: None, step: step.clone() }).collect();
        Ok(Some(Box::new(SessionWalk::begin(&self.config, session, plan, &branches, None)?)))
    }
}

/// Keys and values of some context, and what the heads said about its frames.
#[derive(Default)]
struct Memory {
    /// Keys and values, where the backend keeps them.
    state: State,
    heads: Denoised,
}

/// The two halves of a denoiser trained with the one-way mask: context once, targets at every step.
pub struct CachedDenoiser {
    config: DitConfig,
    prefill: Box<dyn Session>,
    cached: Box<dyn Session>,
    memory: Memory,
    buffers: Buffers,
}

impl CachedDenoiser {
    /// Takes sessions of the [`DenoiserKind::Prefill`] and [`DenoiserKind::Cached`] graphs.
    ///
    /// # Errors
    /// [`DenoiseError::Backend`] naming the input or output that does not fit.
    pub fn new(
        config: DitConfig,
        prefill: Box<dyn Session>,
        cached: Box<dyn Session>,
    ) -> Result<Self, DenoiseError> {
        check_ports(&config, prefill.as_ref(), &common_ports(&config))?;
        check_ports(&config, cached.as_ref(), &[common_ports(&config), output_ports(&config)].concat())?;
        for i in 0..config.layers {
            for part in ["k", "v"] {
                let name = format!("memory.{i}.{part}");
                if !prefill.engine().outputs().iter().any(|p| p.name == name)
                    || !cached.engine().inputs().iter().any(|p| p.name == name)
                {
                    return Err(DenoiseError::Backend(format!("the engines do not share {name:?}")));
                }
            }
        }
        if config.lift {
            check_ports(&config, prefill.as_ref(), &output_ports(&config)[1..])?;
        }
        Ok(Self { config, prefill, cached, memory: Memory::default(), buffers: Buffers::default() })
    }

    /// Computes the keys and values of the context frames; steps after it look at them.
    ///
    /// # Errors
    /// As [`Denoise::denoise`].
    pub fn set_context(&mut self, context: &DenoiseStep<'_>) -> Result<(), DenoiseError> {
        let before = std::mem::take(&mut self.memory);
        self.memory = self.prefill(context, before.state)?;
        Ok(())
    }

    /// Keys and values of a context, in the memory of `spare`, which are not needed any more.
    fn prefill(&mut self, context: &DenoiseStep<'_>, spare: State) -> Result<Memory, DenoiseError> {
        let tensors = step_tensors(&self.config, context)?;
        let inputs: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut memory = Memory { state: spare, heads: Denoised::default() };
        let mut of_heads = Buffers::default();
        let mut outputs: Vec<(&str, &mut Tensor)> = Vec::new();
        if self.config.lift {
            outputs.push(("pose", &mut of_heads.pose));
            outputs.push(("mask", &mut of_heads.mask));
            outputs.push(("locate", &mut of_heads.locate));
        }
        self.prefill
            .run_with_state(&inputs, &mut outputs, None, Some(&mut memory.state))
            .map_err(backend_error)?;
        if self.config.lift {
            read_heads(&self.config, &of_heads, context.frames(), &mut memory.heads)
                .map_err(backend_error)?;
        }
        Ok(memory)
    }

    fn targets(&mut self, step: &DenoiseStep<'_>, memory: &Memory) -> Result<Denoised, DenoiseError> {
        let tensors = step_tensors(&self.config, step)?;
        let inputs: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let (session, buffers) = (self.cached.as_mut(), &mut self.buffers);
        evaluate(&self.config, session, &inputs, Some(&memory.state), buffers, step.frames())
            .map_err(backend_error)
    }
}

impl Denoise for CachedDenoiser {
    fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Evaluates target frames only; the context is that of [`CachedDenoiser::set_context`].
    fn denoise(&mut self, step: &DenoiseStep<'_>) -> Result<Denoised, DenoiseError> {
        if self.memory.state.is_empty() {
            return Err(DenoiseError::Backend("no context: call set_context first".into()));
        }
        let memory = std::mem::take(&mut self.memory);
        let result = self.targets(step, &memory);
        self.memory = memory;
        result
    }
}

/// A context that keys and values were computed for: the inputs of its prefill, to be compared bit by bit.
#[derive(PartialEq)]
struct ContextKey {
    latents: Vec<u32>,
    timestep: u64,
    t_index: Vec<u64>,
    text: Vec<u32>,
    camera: Option<Vec<u32>>,
}

impl ContextKey {
    fn of(step: &DenoiseStep<'_>) -> Self {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect();
        Self {
            latents: bits(step.latents),
            timestep: step.timesteps[step.rows[0]].to_bits(),
            t_index: step.t_index.iter().map(|t| t.to_bits()).collect(),
            text: bits(step.text),
            camera: step.camera.map(bits),
        }
    }

    fn is(&self, step: &DenoiseStep<'_>) -> bool {
        let same = |ours: &[u32], theirs: &[f32]| {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| *a == b.to_bits())
        };
        self.timestep == step.timesteps[step.rows[0]].to_bits()
            && self.t_index.len() == step.t_index.len()
            && self.t_index.iter().zip(step.t_index).all(|(a, b)| *a == b.to_bits())
            && match (&self.camera, step.camera) {
                (None, None) => true,
                (Some(ours), Some(theirs)) => same(ours, theirs),
                _ => false,
            }
            && same(&self.latents, step.latents)
            && same(&self.text, step.text)
    }
}

/// Contexts whose keys and values are kept: the two branches of joint guidance.
const CONTEXTS_KEPT: usize = 2;

/// The cached halves behind the interface of the whole network, for callers that give context and targets together.
///
/// The *given* frames are those at the front of a step that share the first one's row of timesteps: context and first
/// target frame. Their keys and values are computed when they are seen for the first time; as long as given frames,
/// text and indices stay the same, further steps only evaluate the other frames. The newest two contexts are kept,
/// one per branch of joint guidance. `prediction` is zero for given frames, which no caller uses: they are known.
pub struct SplitDenoiser {
    halves: CachedDenoiser,
    /// Newest first.
    kept: Vec<(ContextKey, Memory)>,
    prefills: u64,
}

impl SplitDenoiser {
    /// Takes the two halves.
    #[must_use]
    pub fn new(halves: CachedDenoiser) -> Self {
        Self { halves, kept: Vec::with_capacity(CONTEXTS_KEPT + 1), prefills: 0 }
    }

    /// How many times keys and values of a context were computed.
    #[must_use]
    pub fn prefills(&self) -> u64 {
        self.prefills
    }

    /// Keys and values of a context, taken out of those kept or computed.
    fn recall(&mut self, context: &DenoiseStep<'_>) -> Result<(ContextKey, Memory), DenoiseError> {
        if let Some(at) = self.kept.iter().position(|(key, _)| key.is(context)) {
            return Ok(self.kept.remove(at));
        }
        self.prefills += 1;
        // The oldest makes room before the new one is computed: no more are ever in memory.
        let full = self.kept.len() >= CONTEXTS_KEPT;
        let spare = if full { self.kept.pop() } else { None };
        let spare = spare.map(|(_, memory)| memory.state).unwrap_or_default();
        Ok((ContextKey::of(context), self.halves.prefill(context, spare)?))
    }
}

impl Denoise for SplitDenoiser {
    fn config(&self) -> &DitConfig {
        &self.halves.config
    }

    fn denoise(&mut self, step: &DenoiseStep<'_>) -> Result<Denoised, DenoiseError> {
        let [context, targets] = halves_of(&self.halves.config, step)?;
        let (key, memory) = self.recall(&context)?;
        let result = self.halves.targets(&targets, &memory);
        let heads = result.is_ok().then(|| memory.heads.clone());
        self.kept.insert(0, (key, memory));
        let mut result = result?;
        let cfg = &self.halves.config;
        let known = context.frames() * cfg.out_channels * cfg.latent_height * cfg.latent_width;
        result.prediction.splice(0..0, std::iter::repeat_n(0.0, known));
        if let Some(heads) = heads {
            put_before(&heads, &mut result);
        }
        Ok(result)
    }

    fn walk<'s>(&'s mut self, plan: &WalkPlan<'_>) -> Result<Option<Box<dyn Walk + 's>>, DenoiseError> {
        if self.halves.cached.resident().is_none() {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for step in &plan.branches {
            let halves = halves_of(&self.halves.config, step)?;
            let remembered = self.recall(&halves[0])?;
            self.kept.insert(0, remembered);
            parts.push(halves);
        }
        let kept = &self.kept;
        let memory = |context: &DenoiseStep<'_>| {
            let found = kept.iter().find(|(key, _)| key.is(context)).map(|(_, memory)| memory);
            found.ok_or_else(|| DenoiseError::Backend("a context was forgotten at once".into()))
        };
        let mut branches = Vec::new();
        for [context, targets] in &parts {
            branches.push(Pass { memory: Some(&memory(context)?.state), step: targets.clone() });
        }
        let heads = match parts.first() {
            Some([context, _]) => Some(&memory(context)?.heads),
            None => None,
        };
        let CachedDenoiser { config, cached, .. } = &mut self.halves;
        let Some(session) = cached.resident() else { return Ok(None) };
        Ok(Some(Box::new(SessionWalk::begin(config, session, plan, &branches, heads)?)))
    }
}

/// Given frames, which share the first one's timestep, and the others.
fn halves_of<'a>(cfg: &DitConfig, step: &DenoiseStep<'a>) -> Result<[DenoiseStep<'a>; 2], DenoiseError> {
    let frame = cfg.in_channels * cfg.latent_height * cfg.latent_width;
    let rays = cfg.tokens_per_frame() * cfg.camera_channels;
    let carried = cfg.tokens_per_frame() * cfg.guide_channels();
    let frames = step.frames();
    let check = |name, expected: usize, got: usize| {
        if expected == got { Ok(()) } else { Err(DenoiseError::Size { name, expected, got }) }
    };
    check("latents", frames * frame, step.latents.len())?;
    check("t_index", frames, step.t_index.len())?;
    if let Some(bad) = step.rows.iter().find(|r| **r >= step.timesteps.len()) {
        return Err(DenoiseError::Size { name: "rows", expected: step.timesteps.len(), got: *bad });
    }
    if let Some(camera) = step.camera {
        check("camera", frames * rays, camera.len())?;
    }
    if let Some(guide) = step.guide {
        check("guide", frames * carried, guide.len())?;
    }
    let given = step.rows.iter().take_while(|r| **r == step.rows[0]).count();
    if given == frames {
        let what = "all frames have one timestep: nothing tells given frames from targets";
        return Err(DenoiseError::Backend(what.into()));
    }
    let part = |from: usize, to: usize| DenoiseStep {
        latents: &step.latents[from * frame..to * frame],
        timesteps: step.timesteps,
        rows: &step.rows[from..to],
        t_index: &step.t_index[from..to],
        text: step.text,
        camera: step.camera.map(|c| &c[from * rays..to * rays]),
        guide: step.guide.map(|g| &g[from * carried..to * carried]),
    };
    Ok([part(0, given), part(given, frames)])
}

/// Puts what the heads said about given frames before what they said about the others.
fn put_before(given: &Denoised, result: &mut Denoised) {
    result.pose.splice(0..0, given.pose.iter().copied());
    result.mask.splice(0..0, given.mask.iter().copied());
    result.locate.splice(0..0, given.locate.iter().copied());
}

/// A pass of one branch: keys and values that it looks at, and the rest.
struct Pass<'s, 'p> {
    memory: Option<&'s State>,
    step: DenoiseStep<'p>,
}

/// What a branch has on the device.
struct OnDevice<'s> {
    memory: Option<&'s State>,
    inputs: State,
    outputs: State,
}

/// [`Walk`] over a session whose tensors stay on its device: text, rays, rotary tables, timesteps, the sample and what
/// the sampler remembers are copied there once.
struct SessionWalk<'s> {
    config: &'s DitConfig,
    session: &'s mut dyn Resident,
    branches: Vec<OnDevice<'s>>,
    sample: State,
    schedule: Schedule,
    solver: Solver,
    guidance: f32,
    /// Steps made.
    done: usize,
    frames: usize,
    pass_frames: usize,
    /// As [`SampleStep::first`].
    first: i32,
    /// What the heads said about frames that are in no pass.
    given: Option<&'s Denoised>,
}

impl<'s> SessionWalk<'s> {
    fn begin(
        config: &'s DitConfig,
        session: &'s mut dyn Resident,
        plan: &WalkPlan<'_>,
        passes: &[Pass<'s, '_>],
        given: Option<&'s Denoised>,
    ) -> Result<Self, DenoiseError> {
        let pixels = config.latent_height * config.latent_width;
        let frames = plan.sample.len() / (config.in_channels * pixels).max(1);
        let (expected, got) = (frames * config.in_channels * pixels, plan.sample.len());
        if expected != got || frames == 0 {
            return Err(DenoiseError::Size { name: "sample", expected, got });
        }
        let pass_frames = passes.first().map_or(0, |p| p.step.frames());
        // The sample's frames are the last of a pass; of one that leaves out what is given, all but the first.
        let first =
            i32::try_from(pass_frames).unwrap_or(i32::MAX) - i32::try_from(frames).unwrap_or(i32::MAX);
        let mut sample = State::default();
        let mut put = |state: &mut State, name: &str, tensor: &Tensor| {
            session.put(state, name, tensor).map_err(backend_error)
        };
        put(&mut sample, "x", &Tensor::f32(&[got], plan.sample.to_vec()))?;
        for name in ["m1", "m2", "previous"] {
            put(&mut sample, name, &Tensor::f32(&[got], vec![0.0; got]))?;
        }
        let mut branches = Vec::new();
        for (number, pass) in passes.iter().enumerate() {
            if pass.step.frames() != pass_frames {
                let (expected, got) = (pass_frames, pass.step.frames());
                return Err(DenoiseError::Size { name: "frames", expected, got });
            }
            let mut inputs = State::default();
            for (name, tensor) in step_tensors(config, &pass.step)? {
                put(&mut inputs, &name, &tensor)?;
            }
            let of_given = pass.step.timesteps.first().copied().unwrap_or_default();
            let times: Vec<f32> = plan
                .schedule
                .timesteps
                .iter()
                .flat_map(|&t| [of_given, f64::from(t)])
                .flat_map(|t| sinusoid(t, config.freq_dim))
                .collect();
            put(&mut sample, &format!("times.{number}"), &Tensor::f32(&[times.len()], times))?;
            branches.push(OnDevice { memory: pass.memory, inputs, outputs: State::default() });
        }
        let (schedule, solver, guidance) = (plan.schedule.clone(), plan.solver, plan.guidance);
        let done = 0;
        Ok(Self {
            config,
            session,
            branches,
            sample,
            schedule,
            solver,
            guidance,
            done,
            frames,
            pass_frames,
            first,
            given,
        })
    }
}

impl Walk for SessionWalk<'_> {
    fn step(&mut self) -> Result<Vec<f32>, DenoiseError> {
        if self.done >= self.schedule.steps() {
            return Err(DenoiseError::Backend(format!("all {} steps were made already", self.done)));
        }
        let config = self.config;
        for (number, branch) in self.branches.iter_mut().enumerate() {
            let wanted: &[&str] = match config.lift && number == 0 {
                true => &["sample", "pose", "mask", "locate"],
                false => &["sample"],
            };
            let from: Vec<&State> = branch.memory.into_iter().chain([&branch.inputs]).collect();
            self.session.queue(&from, wanted, &mut branch.outputs).map_err(backend_error)?;
        }
        let branches: Vec<[&State; 2]> = self.branches.iter().map(|b| [&b.outputs, &b.inputs]).collect();
        let step = SampleStep {
            sample: &self.sample,
            branches: &branches,
            shape: [self.frames, config.in_channels, config.latent_height * config.latent_width],
            pass_frames: self.pass_frames,
            first: self.first,
            factors: self.schedule.factors(self.solver, self.done),
            predicts_clean: config.prediction == Prediction::X0,
            guidance: self.guidance,
            next: Some(self.done + 1).filter(|next| *next < self.schedule.steps()),
        };
        self.session.sample(&step).map_err(backend_error)?;
        self.done += 1;
        let clean = self.session.get(&self.sample, "m1").map_err(backend_error)?;
        Ok(clean.into_f32().unwrap_or_default())
    }

    fn end(&mut self) -> Result<(Vec<f32>, Denoised), DenoiseError> {
        let Some(outputs) = self.branches.first().map(|b| &b.outputs).filter(|_| self.done > 0) else {
            return Err(DenoiseError::Backend("no step was made".into()));
        };
        let mut heads = Denoised::default();
        let mut get = |from: &State, name: &str| self.session.get(from, name).map_err(backend_error);
        let x = get(&self.sample, "x")?.into_f32().unwrap_or_default();
        if self.config.lift {
            let [pose, mask, locate] = ["pose", "mask", "locate"].map(|name| get(outputs, name));
            let buffers = Buffers { pose: pose?, mask: mask?, locate: locate?, ..Buffers::default() };
            read_heads(self.config, &buffers, self.pass_frames, &mut heads).map_err(backend_error)?;
        }
        if let Some(given) = self.given {
            put_before(given, &mut heads);
        }
        Ok((x, heads))
    }
}
