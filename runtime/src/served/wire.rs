//! What goes over the network.
//!
//! Every message is `b"mind"`, the version (u32), the length of a header (u32), the header in JSON, and then numbers: f32,
//! then bytes, as many as the header says, all little-endian and with nothing after them. Unknown fields, other versions
//! and other sizes are refused, and sizes are checked before anything is taken from them: at most [`HEADER_MAX`] bytes of
//! header, [`MESSAGE_MAX`] in all. Latents travel in f32, as they are held: what comes back is to the last bit what the
//! robot would have imagined itself (a 5B latent of 48 x 15 x 26 values is 75 KB).

use crate::imagine::{Heads, Imagined, Rollout, RolloutSettings};
use mindseye_bridge::goal::{MAX_CANDIDATES, MAX_TEXT_CHARS};
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::sampler::Step;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of the format; others are refused.
pub const VERSION: u32 = 1;
/// Largest header, bytes.
pub const HEADER_MAX: usize = 1 << 20;
/// Largest message, bytes.
pub const MESSAGE_MAX: usize = 256 << 20;
/// Most latents that one message names.
pub const LATENTS_MAX: usize = 4096;
/// Longest name of a robot, bytes.
const NAME_MAX: usize = 64;
const MAGIC: [u8; 4] = *b"mind";
const FIXED: usize = 12;

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not one of ours.
    #[error("a message of {got} bytes is none of mindseye's")]
    Foreign {
        /// Its length.
        got: usize,
    },
    /// Another version.
    #[error("a message of version {got}; wanted {VERSION}: both sides must be of one release")]
    Version {
        /// Its version.
        got: u32,
    },
    /// Too long.
    #[error("{what} of {got} bytes; at most {most} are read")]
    Long {
        /// What.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The limit.
        most: usize,
    },
    /// The header is not what is wanted.
    #[error("header: {0}")]
    Header(#[from] serde_json::Error),
    /// The numbers are not as many as the header says.
    #[error("{what}: the header says {expected}, there is room for {got}")]
    Size {
        /// Of what.
        what: &'static str,
        /// As the header says.
        expected: usize,
        /// As it is.
        got: usize,
    },
    /// A value out of range.
    #[error("{what} is {got}; wanted {want}")]
    Range {
        /// Which.
        what: &'static str,
        /// What it is.
        got: String,
        /// What would be right.
        want: &'static str,
    },
}

/// Writes a message.
pub(super) fn write(header: &impl Serialize, floats: &[&[f32]], bytes: &[&[u8]]) -> Vec<u8> {
    // Numbers, strings and lists of them always serialise.
    let header = serde_json::to_vec(header).unwrap_or_default();
    let numbers =
        floats.iter().map(|f| 4 * f.len()).sum::<usize>() + bytes.iter().map(|b| b.len()).sum::<usize>();
    let mut out = Vec::with_capacity(FIXED + header.len() + numbers);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(header.len() as u32).to_le_bytes());
    out.extend_from_slice(&header);
    for values in floats {
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    bytes.iter().for_each(|b| out.extend_from_slice(b));
    out
}

/// Reads a message: its header, and its numbers.
pub(super) fn read<H: DeserializeOwned>(message: &[u8]) -> Result<(H, Numbers<'_>), WireError> {
    let got = message.len();
    if got > MESSAGE_MAX {
        return Err(WireError::Long { what: "message", got, most: MESSAGE_MAX });
    }
    let word = |at: usize| message.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let (Some(version), Some(length)) = (word(4), word(8)) else { return Err(WireError::Foreign { got }) };
    if message[..4] != MAGIC {
        return Err(WireError::Foreign { got });
    }
    if version != VERSION {
        return Err(WireError::Version { got: version });
    }
    let length = length as usize;
    if length > HEADER_MAX {
        return Err(WireError::Long { what: "header", got: length, most: HEADER_MAX });
    }
    let (header, numbers) = message[FIXED..].split_at_checked(length).ok_or(WireError::Size {
        what: "header",
        expected: length,
        got: got - FIXED,
    })?;
    Ok((serde_json::from_slice(header)?, Numbers(numbers)))
}

/// The numbers of a message that were not taken yet.
pub(super) struct Numbers<'a>(&'a [u8]);

impl<'a> Numbers<'a> {
    /// The next `count` bytes.
    pub fn bytes(&mut self, what: &'static str, count: usize) -> Result<&'a [u8], WireError> {
        let got = self.0.len();
        let (taken, rest) =
            self.0.split_at_checked(count).ok_or(WireError::Size { what, expected: count, got })?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next `count` floats.
    pub fn floats(&mut self, what: &'static str, count: usize) -> Result<Vec<f32>, WireError> {
        let got = self.0.len() / 4;
        let bytes = count.checked_mul(4).ok_or(WireError::Size { what, expected: count, got })?;
        let taken = self.bytes(what, bytes).map_err(|_| WireError::Size { what, expected: count, got })?;
        Ok(taken.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), WireError> {
        match self.0.len() {
            0 => Ok(()),
            got => Err(WireError::Size { what: "bytes after the message", expected: 0, got }),
        }
    }
}

/// By what a latent is known: its values, whoever saw it.
pub fn hash_of(latent: &[f32]) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    latent.iter().for_each(|v| hasher.update(&v.to_le_bytes()));
    hasher.digest()
}

fn name(what: &'static str, name: &str) -> Result<(), WireError> {
    let fits = !name.is_empty() && name.len() <= NAME_MAX && !name.contains(['/', '*', '$', '?', '#']);
    let want = "1 to 64 bytes without / * $ ? #";
    if fits { Ok(()) } else { Err(WireError::Range { what, got: format!("{name:?}"), want }) }
}

fn range(
    what: &'static str,
    got: usize,
    ok: std::ops::RangeInclusive<usize>,
    want: &'static str,
) -> Result<(), WireError> {
    if ok.contains(&got) { Ok(()) } else { Err(WireError::Range { what, got: got.to_string(), want }) }
}

/// What a server offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The server, as in its keys.
    pub server: String,
    /// The bundle that it runs.
    pub bundle: String,
    /// What runs it.
    pub engine: String,
    /// Jobs that wait or are in work.
    pub waiting: usize,
    /// The most that may wait.
    pub waiting_max: usize,
}

impl Offer {
    /// As a message.
    pub fn to_bytes(&self) -> Vec<u8> {
        write(self, &[], &[])
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (offer, numbers): (Self, _) = read(message)?;
        numbers.end()?;
        name("server", &offer.server)?;
        Ok(offer)
    }
}

/// Work is not wanted any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Whose.
    pub session: u64,
    /// Its number.
    pub number: u64,
}

impl Cancel {
    /// As a message.
    pub fn to_bytes(&self) -> Vec<u8> {
        write(self, &[], &[])
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (cancel, numbers) = read(message)?;
        numbers.end()?;
        Ok(cancel)
    }
}

/// A latent that was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Its index in the source video.
    pub index: u64,
    /// Its segment.
    pub segment: u32,
    /// `[channels, height, width]`.
    pub values: Vec<f32>,
}

/// Latents on their way to every server of a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Latents {
    /// The robot's name.
    pub robot: String,
    /// The robot's process: another number each time that it starts.
    pub session: u64,
    /// The bundle whose codec made them.
    pub bundle: String,
    /// All of one size.
    pub seen: Vec<Seen>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LatentsHeader {
    robot: String,
    session: u64,
    bundle: String,
    /// Index and segment of each.
    seen: Vec<(u64, u32)>,
    /// Values of each.
    len: usize,
}

impl Latents {
    /// As a message.
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = LatentsHeader {
            robot: self.robot.clone(),
            session: self.session,
            bundle: self.bundle.clone(),
            seen: self.seen.iter().map(|s| (s.index, s.segment)).collect(),
            len: self.seen.first().map_or(0, |s| s.values.len()),
        };
        write(&header, &self.seen.iter().map(|s| s.values.as_slice()).collect::<Vec<_>>(), &[])
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (header, mut numbers): (LatentsHeader, _) = read(message)?;
        name("robot", &header.robot)?;
        range("latents", header.seen.len(), 0..=LATENTS_MAX, "at most 4096")?;
        let mut seen = Vec::with_capacity(header.seen.len());
        for (index, segment) in header.seen {
            seen.push(Seen { index, segment, values: numbers.floats("latent", header.len)? });
        }
        numbers.end()?;
        Ok(Self { robot: header.robot, session: header.session, bundle: header.bundle, seen })
    }
}

/// Which piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Kind {
    /// As [`crate::imagine::choose_context`], so many.
    Choose {
        /// Wanted.
        count: usize,
    },
    /// As [`crate::imagine::glance`].
    Glance,
    /// As [`crate::imagine::imagine`].
    Imagine,
    /// As [`crate::imagine::guided`].
    Guided {
        /// Whose noise.
        candidate: usize,
        /// As [`Step::index`].
        index: usize,
        /// As [`Step::sigma`].
        sigma: f32,
        /// As [`Step::timestep`].
        timestep: f32,
    },
}

impl Kind {
    /// One guided step.
    pub fn guided(candidate: usize, step: Step) -> Self {
        Self::Guided { candidate, index: step.index, sigma: step.sigma, timestep: step.timestep }
    }
}

/// Work for the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Which.
    pub kind: Kind,
    /// How to imagine.
    pub settings: RolloutSettings,
    /// Source index of every context latent, ascending.
    pub index: Vec<u64>,
    /// [`hash_of`] each.
    pub hashes: Vec<u64>,
    /// The first target latent.
    pub first: Vec<f32>,
    /// Rows of the text, without the zeros at the end.
    pub text: Vec<f32>,
    /// Rows of the empty text, without the zeros at the end.
    pub null_text: Vec<f32>,
    /// Camera rays of the targets.
    pub camera: Option<Vec<f32>>,
    /// The sample of a guided step; empty otherwise.
    pub x: Vec<f32>,
}

/// What is asked of a server.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Rows of a text.
    Text(String),
    /// The network.
    Network(Box<Network>),
}

/// A piece of work that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The robot's name.
    pub robot: String,
    /// The robot's process: another number each time that it starts.
    pub session: u64,
    /// Its number, unique within the session. The same number is the same work.
    pub number: u64,
    /// The bundle that is wanted.
    pub bundle: String,
    /// Time left for it when it was sent; `None`: no limit.
    pub left: Option<TimeDelta>,
    /// What.
    pub work: Work,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobHeader {
    robot: String,
    session: u64,
    number: u64,
    bundle: String,
    left_ns: Option<i64>,
    work: WorkHeader,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum WorkHeader {
    Text(String),
    Network {
        kind: Kind,
        settings: RolloutSettings,
        index: Vec<u64>,
        hashes: Vec<u64>,
        /// Values of first, text, empty text, camera and sample.
        sizes: [usize; 4],
        camera: Option<usize>,
    },
}

/// Rows without the zeros at their end.
pub fn trimmed(rows: &[f32]) -> &[f32] {
    &rows[..rows.iter().rposition(|v| *v != 0.0).map_or(0, |last| last + 1)]
}

impl Job {
    /// As a message.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (work, floats) = match &self.work {
            Work::Text(text) => (WorkHeader::Text(text.clone()), vec![]),
            Work::Network(n) => {
                let sizes = [n.first.len(), n.text.len(), n.null_text.len(), n.x.len()];
                let header = WorkHeader::Network {
                    kind: n.kind,
                    settings: n.settings.clone(),
                    index: n.index.clone(),
                    hashes: n.hashes.clone(),
                    sizes,
                    camera: n.camera.as_ref().map(Vec::len),
                };
                let camera = n.camera.as_deref().unwrap_or_default();
                (header, vec![&n.first[..], &n.text, &n.null_text, &n.x, camera])
            }
        };
        let header = JobHeader {
            robot: self.robot.clone(),
            session: self.session,
            number: self.number,
            bundle: self.bundle.clone(),
            left_ns: self.left.map(|left| left.0),
            work,
        };
        write(&header, &floats, &[])
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (header, mut numbers): (JobHeader, _) = read(message)?;
        name("robot", &header.robot)?;
        let work = match header.work {
            WorkHeader::Text(text) => {
                range("text", text.chars().count(), 0..=MAX_TEXT_CHARS, "at most 1000 characters")?;
                Work::Text(text)
            }
            WorkHeader::Network { kind, settings, index, hashes, sizes, camera } => {
                range("latents", index.len(), 0..=LATENTS_MAX, "at most 4096")?;
                range("hashes", hashes.len(), index.len()..=index.len(), "one for each index")?;
                range("settings.candidates", settings.candidates, 1..=MAX_CANDIDATES as usize, "1 to 64")?;
                range("settings.steps", settings.steps, 1..=1000, "1 to 1000")?;
                range("settings.target_latents", settings.target_latents, 2..=1024, "2 to 1024")?;
                let [first, text, null_text, x] = sizes;
                Work::Network(Box::new(Network {
                    kind,
                    settings,
                    index,
                    hashes,
                    first: numbers.floats("first latent", first)?,
                    text: numbers.floats("text", text)?,
                    null_text: numbers.floats("empty text", null_text)?,
                    x: numbers.floats("sample", x)?,
                    camera: camera.map(|n| numbers.floats("camera rays", n)).transpose()?,
                }))
            }
        };
        numbers.end()?;
        Ok(Self {
            robot: header.robot,
            session: header.session,
            number: header.number,
            bundle: header.bundle,
            left: header.left_ns.map(TimeDelta),
            work,
        })
    }
}

/// What a server says of a job. The second half ends it.
#[derive(Clone, Debug, PartialEq)]
pub enum Word {
    /// It is not forgotten: jobs that come before it.
    Working {
        /// 0: it is in work.
        ahead: usize,
    },
    /// The heads at one more glance.
    Glanced(Heads),
    /// Part of the memory was looked through, of so many.
    Scanned(usize, usize),
    /// A step was done.
    Stepped {
        /// Candidate, from 0.
        candidate: usize,
        /// Candidates planned.
        candidates: usize,
        /// Steps done.
        step: usize,
        /// Steps planned.
        steps: usize,
        /// The estimate of the clean rollout.
        estimate: Vec<f32>,
    },
    /// Rows of a text, without the zeros at the end.
    Text(Vec<f32>),
    /// Positions.
    Chosen(Vec<usize>),
    /// What the heads said.
    Glances(Vec<Heads>),
    /// The rollouts.
    Imagined(Box<Imagined>),
    /// Velocity and heads.
    Guided(Vec<f32>, Heads),
    /// Latents of these indices are not held: send them, and ask again.
    Missing(Vec<u64>),
    /// Too many wait.
    Busy {
        /// So many.
        waiting: usize,
    },
    /// It will not be done here.
    Refused(String),
    /// It could not be done.
    Failed(String),
    /// Its time was up before it was begun.
    Late,
    /// It was cancelled.
    Cancelled,
}

impl Word {
    /// Whether nothing comes after it.
    pub fn is_end(&self) -> bool {
        !matches!(self, Self::Working { .. } | Self::Glanced(_) | Self::Scanned(..) | Self::Stepped { .. })
    }

    /// Whether it is the result of work that was done.
    pub fn is_result(&self) -> bool {
        matches!(
            self,
            Self::Text(_)
                | Self::Chosen(_)
                | Self::Glances(_)
                | Self::Imagined(_)
                | Self::Guided(..)
                | Self::Failed(_)
        )
    }
}

/// One reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// The number of the job.
    pub number: u64,
    /// Counts what is told of it: a later word has a larger one.
    pub sequence: u64,
    /// What.
    pub word: Word,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ToldHeader {
    number: u64,
    sequence: u64,
    word: WordHeader,
}

/// Sizes of what the heads said.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadsHeader {
    context: usize,
    pose: usize,
    mask: usize,
    locate: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum WordHeader {
    Working(usize),
    Glanced(HeadsHeader),
    Scanned(usize, usize),
    Stepped {
        candidate: usize,
        candidates: usize,
        step: usize,
        steps: usize,
        estimate: usize,
    },
    Text(usize),
    Chosen(Vec<usize>),
    Glances(Vec<HeadsHeader>),
    Imagined {
        glances: Vec<HeadsHeader>,
        /// Values, heads and steps of each.
        rollouts: Vec<(usize, HeadsHeader, usize)>,
        steps: usize,
        reduced: Option<String>,
        evaluations: usize,
        step_ns: Vec<i64>,
    },
    Guided(usize, HeadsHeader),
    Missing(Vec<u64>),
    Busy(usize),
    Refused(String),
    Failed(String),
    Late,
    Cancelled,
}

impl HeadsHeader {
    fn of(heads: &Heads, floats: &mut Vec<f32>) -> Self {
        floats.extend(heads.pose.iter().flatten());
        floats.extend(&heads.mask);
        floats.extend(heads.locate.iter().flatten());
        let Heads { context, pose, mask, locate } = heads;
        Self { context: *context, pose: pose.len(), mask: mask.len(), locate: locate.len() }
    }

    fn read(self, numbers: &mut Numbers<'_>) -> Result<Heads, WireError> {
        let pose = numbers.floats("poses", self.pose.saturating_mul(4))?;
        let mask = numbers.floats("mask", self.mask)?;
        let locate = numbers.floats("places", self.locate.saturating_mul(2))?;
        Ok(Heads {
            context: self.context,
            pose: pose.chunks_exact(4).map(|p| [p[0], p[1], p[2], p[3]]).collect(),
            mask,
            locate: locate.chunks_exact(2).map(|p| [p[0], p[1]]).collect(),
        })
    }
}

fn heads_of(all: &[Heads], floats: &mut Vec<f32>) -> Vec<HeadsHeader> {
    all.iter().map(|heads| HeadsHeader::of(heads, floats)).collect()
}

fn read_heads(all: Vec<HeadsHeader>, numbers: &mut Numbers<'_>) -> Result<Vec<Heads>, WireError> {
    range("glances", all.len(), 0..=MAX_CANDIDATES as usize, "at most 64")?;
    all.into_iter().map(|heads| heads.read(numbers)).collect()
}

impl Told {
    /// As a message.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut floats = Vec::new();
        let word = match &self.word {
            Word::Working { ahead } => WordHeader::Working(*ahead),
            Word::Glanced(heads) => WordHeader::Glanced(HeadsHeader::of(heads, &mut floats)),
            Word::Scanned(part, parts) => WordHeader::Scanned(*part, *parts),
            Word::Stepped { candidate, candidates, step, steps, estimate } => {
                floats.extend(estimate);
                let (candidate, candidates, step, steps) = (*candidate, *candidates, *step, *steps);
                WordHeader::Stepped { candidate, candidates, step, steps, estimate: estimate.len() }
            }
            Word::Text(rows) => {
                floats.extend(rows);
                WordHeader::Text(rows.len())
            }
            Word::Chosen(positions) => WordHeader::Chosen(positions.clone()),
            Word::Glances(glances) => WordHeader::Glances(heads_of(glances, &mut floats)),
            Word::Imagined(imagined) => {
                let glances = heads_of(&imagined.glances, &mut floats);
                let rollout = |r: &Rollout| {
                    floats.extend(&r.latents);
                    (r.latents.len(), HeadsHeader::of(&r.heads, &mut floats), r.steps)
                };
                WordHeader::Imagined {
                    glances,
                    rollouts: imagined.rollouts.iter().map(rollout).collect(),
                    steps: imagined.steps,
                    reduced: imagined.reduced.clone(),
                    evaluations: imagined.evaluations,
                    step_ns: imagined.step_times.iter().map(|t| t.0).collect(),
                }
            }
            Word::Guided(velocity, heads) => {
                floats.extend(velocity);
                WordHeader::Guided(velocity.len(), HeadsHeader::of(heads, &mut floats))
            }
            Word::Missing(indices) => WordHeader::Missing(indices.clone()),
            Word::Busy { waiting } => WordHeader::Busy(*waiting),
            Word::Refused(reason) => WordHeader::Refused(reason.clone()),
            Word::Failed(reason) => WordHeader::Failed(reason.clone()),
            Word::Late => WordHeader::Late,
            Word::Cancelled => WordHeader::Cancelled,
        };
        write(&ToldHeader { number: self.number, sequence: self.sequence, word }, &[&floats], &[])
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (header, mut numbers): (ToldHeader, _) = read(message)?;
        let n = &mut numbers;
        let word = match header.word {
            WordHeader::Working(ahead) => Word::Working { ahead },
            WordHeader::Glanced(heads) => Word::Glanced(heads.read(n)?),
            WordHeader::Scanned(part, parts) => Word::Scanned(part, parts),
            WordHeader::Stepped { candidate, candidates, step, steps, estimate } => {
                let estimate = n.floats("estimate", estimate)?;
                Word::Stepped { candidate, candidates, step, steps, estimate }
            }
            WordHeader::Text(rows) => Word::Text(n.floats("text", rows)?),
            WordHeader::Chosen(positions) => Word::Chosen(positions),
            WordHeader::Glances(glances) => Word::Glances(read_heads(glances, n)?),
            WordHeader::Imagined { glances, rollouts, steps, reduced, evaluations, step_ns } => {
                range("rollouts", rollouts.len(), 0..=MAX_CANDIDATES as usize, "at most 64")?;
                let glances = read_heads(glances, n)?;
                let rollout =
                    |(len, heads, steps): (usize, HeadsHeader, usize)| -> Result<Rollout, WireError> {
                        Ok(Rollout { latents: n.floats("rollout", len)?, heads: heads.read(n)?, steps })
                    };
                Word::Imagined(Box::new(Imagined {
                    glances,
                    rollouts: rollouts.into_iter().map(rollout).collect::<Result<_, _>>()?,
                    steps,
                    reduced,
                    evaluations,
                    step_times: step_ns.into_iter().map(TimeDelta).collect(),
                }))
            }
            WordHeader::Guided(velocity, heads) => {
                Word::Guided(n.floats("velocity", velocity)?, heads.read(n)?)
            }
            WordHeader::Missing(indices) => Word::Missing(indices),
            WordHeader::Busy(waiting) => Word::Busy { waiting },
            WordHeader::Refused(reason) => Word::Refused(reason),
            WordHeader::Failed(reason) => Word::Failed(reason),
            WordHeader::Late => Word::Late,
            WordHeader::Cancelled => Word::Cancelled,
        };
        numbers.end()?;
        Ok(Self { number: header.number, sequence: header.sequence, word })
    }
}
