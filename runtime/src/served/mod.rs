//! Imagination served: a robot that keeps camera, context, codec, lift and gate, and a machine with the network.
//!
//! # The seam
//! What is asked for is a piece of work of many evaluations ([`Imagine`]): which remembered latents to look at, what the
//! heads say at a glance, a goal's whole rollouts, and one guided step of a drive that is held to what was seen (between
//! such steps the robot decodes, carries and encodes). [`Here`] does it with the denoiser at hand, [`ServedImaginer`] asks a
//! server for it; [`crate::ground`] knows no difference, and the same noise from the same seed gives the same answer to the
//! last bit where both run the same backend. A goal that was looked at whole takes one round trip for its rollouts and one
//! for each step of the shown drive; evaluations by themselves would take one each, some sixty.
//!
//! ```text
//! robot                                                       server
//! context ── latents as they come, once (put) ──────────────► store: by content, bounded
//! ground ── work: refs of latents, rows of text, settings ──► queue by robot, bounded ─► mind
//!        ◄─ glances (drafts), steps, result (replies) ──────
//! ```
//!
//! # Keys
//! | key | what |
//! |---|---|
//! | `mindseye/served/NAME/SERVER/here` | liveliness: this server is here |
//! | `mindseye/served/NAME/SERVER/offer` | question without a body: [`wire::Offer`] |
//! | `mindseye/served/NAME/SERVER/work` | question with a [`wire::Job`]: any number of [`wire::Told`], the last one an end |
//! | `mindseye/served/NAME/SERVER/cancel` | put: [`wire::Cancel`] |
//! | `mindseye/served/NAME/latents` | put: [`wire::Latents`]; every server of the name hears it |
//!
//! A robot asks all servers of a name for their offer and goes to the one with the least waiting, and stays there as long
//! as it answers. Formats: [`wire`].
//!
//! # What may go wrong
//! Both sides are state machines without a clock ([`client::Errand`], [`server::Server`]). Work has a number: asked again
//! (a message was lost, the server fell silent), it goes on, or its result is told once more, and is not done twice by one
//! server. Another server begins it anew, with the same result. A latent that a server does not hold (lost, evicted, or the
//! server began anew) is asked for by its index. Whatever happens, an errand ends exactly once, by its deadline. Where a
//! server is out of reach and the robot has a fallback, the goal is answered by that, and [`Answer::fallback`] says why.
//!
//! # What a server does not do
//! It evaluates one goal at a time for each of its minds, one robot after the other. There are no batches: the graphs take one
//! temporal index for a whole batch, and on a CPU little would be gained. An evaluation over twice as many frames takes .93 of
//! the time of two (`cargo bench --bench served`; not measured on a GPU). Keys and values of a one-way model are kept for the two contexts of the goal in
//! work, as on a robot, not for each robot.
//!
//! [`Answer::fallback`]: mindseye_bridge::answer::Answer::fallback

pub mod client;
mod feed;
mod link;
pub mod server;
mod serving;
pub mod shared;
pub mod wire;

pub use feed::Feed;
pub use link::{Link, ServedImaginer, served_mind};
pub use serving::{Serving, ServingConfig, perform};

use crate::imagine::{
    self, Budget, ContextLatents, Flow, Heads, Imagination, ImagineError, Imagined, Prompt, RolloutSettings,
    Stage,
};
use mindseye_bridge::ros::RosError;
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::denoise::Denoise;
use mindseye_engines::sampler::Step;
use std::thread::JoinHandle;

/// Why a server's work could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServedError {
    /// Nobody serves this name.
    #[error(
        "no server {name:?} was found within {:.1} s; is `mindseye serve --name {name}` running, and on this network?",
        waited.as_secs_f64()
    )]
    NoServer {
        /// The name.
        name: String,
        /// How long it was looked for.
        waited: TimeDelta,
    },
    /// No result in time.
    #[error("server {name:?}: no result within {:.1} s{}", waited.as_secs_f64(), because(busy))]
    Late {
        /// The name.
        name: String,
        /// How long it was waited for.
        waited: TimeDelta,
        /// Whether every server was busy when it was last asked.
        busy: bool,
    },
    /// The server will not do it.
    #[error("server {name:?} refused: {reason}")]
    Refused {
        /// The name.
        name: String,
        /// Its words.
        reason: String,
    },
    /// The server tried, and could not.
    #[error("server {name:?} failed: {reason}")]
    Failed {
        /// The name.
        name: String,
        /// Its words.
        reason: String,
    },
    /// The network refused.
    #[error(transparent)]
    Ros(#[from] RosError),
    /// The system gave no thread.
    #[error("cannot start the {0} thread: {1}")]
    Thread(&'static str, #[source] std::io::Error),
}

/// Starts a thread.
fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServedError> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(|error| ServedError::Thread(name, error))
}

fn because(busy: &bool) -> &'static str {
    if *busy { ": every server was busy" } else { "" }
}

/// What is done on the way to a goal's rollouts.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// What the heads said of the candidates glanced at so far.
    Glanced(&'a [Heads]),
    /// A step was done.
    Stage(Stage<'a>),
}

/// What a piece of work begins with.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// The context and the first latent.
    pub seen: &'a ContextLatents,
    /// What is asked for.
    pub prompt: Prompt<'a>,
    /// How to imagine.
    pub settings: &'a RolloutSettings,
    /// Time left for it.
    pub budget: Budget<'a>,
}

/// Pieces of work of many evaluations, done here or elsewhere. The same inputs give the same results.
pub trait Imagine {
    /// As [`imagine::choose_context`], `seen` being the whole memory.
    ///
    /// # Errors
    /// [`ImagineError`].
    fn choose_context(
        &mut self,
        inputs: Inputs<'_>,
        count: usize,
        progress: &mut dyn FnMut(Stage<'_>) -> Flow,
    ) -> Result<Vec<usize>, ImagineError>;

    /// As [`imagine::glance`].
    ///
    /// # Errors
    /// [`ImagineError`].
    fn glance(&mut self, inputs: Inputs<'_>) -> Result<Vec<Heads>, ImagineError>;

    /// As [`imagine::imagine`], glances told of as they come.
    ///
    /// # Errors
    /// [`ImagineError`].
    fn imagine(
        &mut self,
        inputs: Inputs<'_>,
        news: &mut dyn FnMut(News<'_>) -> Flow,
    ) -> Result<Imagined, ImagineError>;

    /// As [`imagine::guided`].
    ///
    /// # Errors
    /// [`ImagineError`].
    fn guided(
        &mut self,
        inputs: Inputs<'_>,
        candidate: usize,
        at: (&[f32], Step),
    ) -> Result<(Vec<f32>, Heads), ImagineError>;
}

/// The denoiser at hand.
pub struct Here<'a>(pub &'a mut dyn Denoise);

impl Imagine for Here<'_> {
    fn choose_context(
        &mut self,
        Inputs { seen, prompt, settings, budget }: Inputs<'_>,
        count: usize,
        progress: &mut dyn FnMut(Stage<'_>) -> Flow,
    ) -> Result<Vec<usize>, ImagineError> {
        imagine::choose_context(self.0, seen, prompt, settings, count, budget, progress)
    }

    fn glance(&mut self, inputs: Inputs<'_>) -> Result<Vec<Heads>, ImagineError> {
        imagine::glance(self.0, inputs.seen, inputs.prompt, inputs.settings, inputs.budget)
    }

    fn imagine(
        &mut self,
        Inputs { seen, prompt, settings, budget }: Inputs<'_>,
        news: &mut dyn FnMut(News<'_>) -> Flow,
    ) -> Result<Imagined, ImagineError> {
        let mut imagination = Imagination::new(self.0, seen, prompt, settings, budget)?;
        imagination.glance(&mut |glances| news(News::Glanced(glances)))?;
        imagination.roll_out(&mut |stage| news(News::Stage(stage)))
    }

    fn guided(
        &mut self,
        inputs: Inputs<'_>,
        candidate: usize,
        at: (&[f32], Step),
    ) -> Result<(Vec<f32>, Heads), ImagineError> {
        imagine::guided(self.0, inputs.seen, inputs.prompt, inputs.settings, candidate, at)
    }
}

#[cfg(test)]
mod tests;
