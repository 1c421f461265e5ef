//! `mindseye serve`: imagination for robots that have no denoiser, until a signal stops it.

use super::run::configure;
use super::{ModelArgs, say, stop_flag};
use crate::mind::{Pipeline, find_bundle};
use crate::served::server::Limits;
use crate::served::{Link, Serving, ServingConfig, served_mind};
use crate::{ground::Mind, mind::LoadError};
use anyhow::Context;
use clap::Args;
use mindseye_bridge::ros::{RosConfig, RosSession};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The name of servers, in one part of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedName(pub String);

/// Not a name of servers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServedNameError {
    /// It cannot be in a key.
    #[error("{0:?} is no name of a server; wanted letters, digits, _ and -")]
    Name(String),
    /// Minds are nowhere else.
    #[error("{0:?} names no mind; wanted zenoh:NAME, NAME being that of `mindseye serve --name NAME`")]
    Scheme(String),
}

impl FromStr for ServedName {
    type Err = ServedNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        match !text.is_empty() && text.len() <= 64 && text.chars().all(fits) {
            true => Ok(Self(text.to_owned())),
            false => Err(ServedNameError::Name(text.to_owned())),
        }
    }
}

fn mind_elsewhere(text: &str) -> Result<ServedName, ServedNameError> {
    text.strip_prefix("zenoh:").ok_or_else(|| ServedNameError::Scheme(text.to_owned()))?.parse()
}

/// Who imagines.
#[derive(Args, Clone, Debug)]
pub struct MindArgs {
    /// Let servers imagine (`mindseye serve --name NAME`): the robot's bundle needs no denoiser.
    #[arg(long, value_name = "zenoh:NAME", value_parser = mind_elsewhere)]
    mind: Option<ServedName>,
    /// A small bundle with the same codec that answers when no server does; the answer says so.
    #[arg(long, value_name = "DIR", requires = "mind")]
    fallback: Option<PathBuf>,
}

/// What runs the bundles: their backend and threads of one evaluation.
type Runs<'a> = (&'a str, usize);

/// A mind that servers imagine for.
pub struct Served {
    link: Arc<Link>,
    fallback: Option<Pipeline>,
}

impl MindArgs {
    /// Whether servers imagine.
    pub fn is_served(&self) -> bool {
        self.mind.is_some()
    }

    /// The robot's own parts of a bundle: all of them, or what servers do not do in their place.
    pub fn load(
        &self,
        directory: &std::path::Path,
        (backend, threads): Runs<'_>,
    ) -> Result<Pipeline, LoadError> {
        match self.mind {
            Some(_) => Pipeline::load_served(directory, backend, threads),
            None => Pipeline::load(directory, backend, threads),
        }
    }

    /// The link to the servers; `None` where the robot imagines itself.
    pub fn open(
        &self,
        session: Option<&RosSession>,
        robot: &str,
        pipeline: Option<&Pipeline>,
        (backend, threads): Runs<'_>,
    ) -> anyhow::Result<Option<Served>> {
        let (Some(ServedName(name)), Some(session), Some(pipeline)) = (&self.mind, session, pipeline) else {
            return Ok(None);
        };
        let load = |dir: &PathBuf| Pipeline::load(dir, backend, threads);
        let fallback = self.fallback.as_ref().map(load).transpose()?;
        fallback.as_ref().map(|other| pipeline.check_same_codec(other)).transpose()?;
        let link = Link::open(session, name, robot, pipeline.bundle().hash())?;
        Ok(Some(Served { link, fallback }))
    }
}

impl Served {
    /// The link.
    pub fn link(&self) -> Arc<Link> {
        self.link.clone()
    }

    /// A mind for one thread; `seed` is used by goals that give none.
    pub fn mind(&self, pipeline: &Pipeline, seed: u64) -> Result<Box<dyn Mind>, LoadError> {
        let fallback = self.fallback.as_ref().map(|fallback| fallback.mind(seed)).transpose()?;
        Ok(served_mind(pipeline.mind(seed)?, self.link(), pipeline.has_text_encoder(), fallback))
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye serve --name hall --listen tcp/0.0.0.0:7447\n  \
                        mindseye run --mind zenoh:hall --connect tcp/server.local:7447 --fallback models/house-tiny\n\n\
                        Any number of servers may have one name: robots go to the one with the least to do. The bundle \
                        must be the robots' own.")]
pub struct ServeArgs {
    /// Name that robots ask for.
    #[arg(long, default_value = "mindseye")]
    name: ServedName,
    /// Endpoint to connect to; may be repeated [default: the router on this machine].
    #[arg(long, value_name = "ENDPOINT")]
    connect: Vec<String>,
    /// Endpoint to listen on; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    listen: Vec<String>,
    /// Goals in work at once; each takes the memory of a mind's sessions.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    at_once: u8,
    /// Goals that wait; more are told that the server is busy.
    #[arg(long, default_value_t = 64, value_name = "N")]
    waiting: usize,
    /// MiB of robots' latents that are kept.
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    memory_mb: usize,
    /// Stop by itself after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// At the end, print counts as one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let directory = find_bundle(args.model.bundle.as_deref(), |name| std::env::var(name).ok())?;
    let pipeline = args.model.load_from(&directory)?;
    let minds = (0..args.at_once).map(|_| pipeline.mind(0)).collect::<Result<Vec<_>, _>>()?;
    let ros =
        RosConfig { node: "mindseye_serve".into(), ..configure(None, &args.connect, &args.listen)?.ros };
    let session = RosSession::open(&ros).context("cannot open the Zenoh session")?;
    let limits =
        Limits { memory: args.memory_mb.saturating_mul(1 << 20), waiting: args.waiting, ..Limits::default() };
    let ServedName(name) = args.name.clone();
    let serving = Serving::start(&session, &ServingConfig { name: name.clone(), limits }, minds)?;
    eprintln!("mindseye: imagining for robots as {name:?} with {}; Ctrl-C stops", directory.display());
    eprintln!("mindseye: on a robot: mindseye run --mind zenoh:{name}");
    let began = Instant::now();
    let mut told = serving.counts();
    while !stop.load(Ordering::Relaxed) && args.seconds.is_none_or(|s| began.elapsed().as_secs_f64() < s) {
        std::thread::sleep(Duration::from_millis(50));
        let counts = serving.counts();
        if counts.refused > told.refused {
            tracing::warn!(refused = counts.refused, "a robot with another bundle, or sizes that do not fit");
        }
        told = counts;
    }
    let counts = serving.counts();
    drop(serving);
    if let Err(error) = session.close() {
        tracing::warn!(%error, "the session did not close cleanly");
    }
    if args.json {
        say(&serde_json::to_string(&counts)?)?;
    }
    Ok(ExitCode::SUCCESS)
}
