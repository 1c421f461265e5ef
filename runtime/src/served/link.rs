//! A robot's link to the servers of a name, and the mind that imagines over it.

use super::client::{Do, Errand, Heard};
use super::wire::{Cancel, Job, Kind, Latents, Network, Offer, Seen, Told, Word, Work, hash_of, trimmed};
use super::{Imagine, Inputs, News, ServedError};
use crate::ground::{Mind, MindError};
use crate::imagine::{ContextLatents, Flow, Heads, ImagineError, Imagined, Stage};
use crate::interpose::{Interpose, Interposed};
use mindseye_base::sync::lock;
use mindseye_bridge::clock;
use mindseye_bridge::ros::{Declared, RosError, RosSession};
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::sampler::Step;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Servers are looked for this long, with a fallback and without.
const PATIENCE: [TimeDelta; 2] = [TimeDelta::from_millis(500), TimeDelta::from_millis(3000)];
/// Events are waited for this long before the time is looked at.
const TICK: Duration = Duration::from_millis(20);
/// Offers are waited for at most this long.
const OFFER_WITHIN: Duration = Duration::from_millis(1000);
/// Whoever waits for a goal is asked this often whether it is still wanted.
const ASK_CALLER_EVERY: TimeDelta = TimeDelta::from_millis(100);
/// Rows of a text may take this long.
const TEXT_WITHIN: TimeDelta = TimeDelta::from_millis(5000);
/// One guided step may take this long: the drive that it shows is not worth a goal's whole time.
const STEP_WITHIN: TimeDelta = TimeDelta::from_millis(5000);
/// Texts whose rows are kept: the empty one, and those of the newest goals.
const TEXTS_KEPT: usize = 8;
/// Indices whose segment is remembered.
const SEGMENTS_KEPT: usize = 8192;
/// Zenoh lets go of a question without a deadline after this.
const QUESTION_MAX: Duration = Duration::from_secs(600);

/// See the module.
pub struct Link {
    session: RosSession,
    name: String,
    robot: String,
    /// This process.
    process: u64,
    bundle: String,
    next: AtomicU64,
    /// Where the last errand was done.
    server: Mutex<Option<String>>,
    /// Who hears of servers that are gone.
    errand: Arc<Mutex<Option<Sender<Heard>>>>,
    segments: Mutex<BTreeMap<u64, u32>>,
    _watch: Declared,
}

impl Link {
    /// A link of a robot to the servers of a name, for latents and work of this bundle.
    ///
    /// # Errors
    /// [`RosError`].
    pub fn open(session: &RosSession, name: &str, robot: &str, bundle: &str) -> Result<Arc<Self>, RosError> {
        static OPENED: AtomicU64 = AtomicU64::new(1);
        let opened = OPENED.fetch_add(1, Ordering::Relaxed);
        let process = format!("{} {opened} {}", session.zid(), clock::now().as_nanos());
        let errand: Arc<Mutex<Option<Sender<Heard>>>> = Arc::default();
        let hears = errand.clone();
        let watch = session.who_is_here(&format!("mindseye/served/{name}/*/here"), move |key, here| {
            if let (false, Some(server)) = (here, key.rsplit('/').nth(1))
                && let Some(errand) = lock(&hears).as_ref()
            {
                let _ = errand.send(Heard::Gone(server.to_owned()));
            }
        })?;
        Ok(Arc::new(Self {
            session: session.clone(),
            name: name.into(),
            robot: robot.into(),
            process: xxhash_rust::xxh3::xxh3_64(process.as_bytes()),
            bundle: bundle.into(),
            next: AtomicU64::new(1),
            server: Mutex::default(),
            errand,
            segments: Mutex::default(),
            _watch: watch,
        }))
    }

    /// Sends latents to every server of the name; those that get lost are asked for.
    pub fn send_latents(&self, seen: Vec<Seen>) {
        self.send(seen, false);
    }

    fn send(&self, seen: Vec<Seen>, asked_for: bool) {
        let mut segments = lock(&self.segments);
        segments.extend(seen.iter().map(|s| (s.index, s.segment)));
        while segments.len() > SEGMENTS_KEPT {
            segments.pop_first();
        }
        drop(segments);
        let (robot, bundle) = (self.robot.clone(), self.bundle.clone());
        let latents = Latents { robot, session: self.process, bundle, seen };
        if let Err(error) = self.session.put(&self.key("latents"), latents.to_bytes(), asked_for) {
            tracing::debug!(%error, "latents were not sent");
        }
    }

    /// The first offer of any server; `None` when nobody offers within a second.
    pub fn first_offer(&self) -> Option<Offer> {
        let (offers_in, offers) = channel();
        let began = Instant::now();
        // A session that was opened just now does not know who is there yet.
        while began.elapsed() < OFFER_WITHIN {
            let offers_in = offers_in.clone();
            self.look(move |heard| drop(offers_in.send(heard)));
            if let Ok(Heard::Offer(offer)) = offers.recv_timeout(OFFER_WITHIN) {
                return Some(offer);
            }
            std::thread::sleep(TICK);
        }
        None
    }

    fn key(&self, end: &str) -> String {
        format!("mindseye/served/{}/{end}", self.name)
    }

    fn look(&self, hear: impl Fn(Heard) + Send + Sync + 'static) {
        let heard = move |reply: Option<Vec<u8>>| match reply.map(|bytes| Offer::from_bytes(&bytes)) {
            Some(Ok(offer)) => hear(Heard::Offer(offer)),
            Some(Err(error)) => tracing::warn!(%error, "an offer cannot be read"),
            None => hear(Heard::Offered),
        };
        if let Err(error) = self.session.ask(&self.key("*/offer"), Vec::new(), OFFER_WITHIN, heard) {
            tracing::debug!(%error, "servers cannot be asked");
        }
    }

    /// Has a piece of work done; latents are those of `seen`. `give` gets progress and may stop it.
    fn run(
        &self,
        work: Work,
        seen: Option<&ContextLatents>,
        (patience, left): (TimeDelta, Option<TimeDelta>),
        give: &mut dyn FnMut(Word) -> Flow,
    ) -> Result<Word, ImagineError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (robot, bundle) = (self.robot.clone(), self.bundle.clone());
        let mut job = Job { robot, session: self.process, number, bundle, left, work };
        let (events_in, events) = channel::<Heard>();
        *lock(&self.errand) = Some(events_in.clone());
        let now = clock::monotonic();
        let server = lock(&self.server).clone();
        let until = left.map(|left| now + left);
        let of = ((self.name.as_str(), number), (self.bundle.as_str(), self.process));
        let (mut errand, todo) = Errand::new(of.0, of.1, server, patience, until, now);
        let mut todo = VecDeque::from(todo);
        let mut asked_at = now;
        loop {
            while let Some(next) = todo.pop_front() {
                match next {
                    Do::Look => {
                        let events = events_in.clone();
                        self.look(move |heard| drop(events.send(heard)));
                    }
                    Do::Ask { server, attempt, left } => {
                        job.left = left;
                        self.ask(&server, attempt, &job, events_in.clone());
                    }
                    Do::SendLatents(indices) => self.send_again(&indices, seen),
                    Do::Cancel(server) => self.cancel(&server, number),
                    Do::Give(word) => {
                        if give(word) == Flow::Stop {
                            return self.stop(&mut errand, number);
                        }
                    }
                    Do::End(result) => {
                        let asked = errand.asked().map(str::to_owned);
                        *lock(&self.server) = asked.filter(|_| result.is_ok());
                        return result.map_err(ImagineError::from);
                    }
                }
            }
            let heard = events.recv_timeout(TICK).unwrap_or(Heard::Tick);
            let now = clock::monotonic();
            // A goal may be cancelled while nothing is said of it.
            if now - asked_at >= ASK_CALLER_EVERY {
                asked_at = now;
                if give(Word::Working { ahead: 0 }) == Flow::Stop {
                    return self.stop(&mut errand, number);
                }
            }
            todo.extend(errand.step(heard, now));
        }
    }

    fn stop(&self, errand: &mut Errand, number: u64) -> Result<Word, ImagineError> {
        for last in errand.step(Heard::Stop, clock::monotonic()) {
            if let Do::Cancel(server) = last {
                self.cancel(&server, number);
            }
        }
        Err(ImagineError::Stopped)
    }

    fn ask(&self, server: &str, attempt: u32, job: &Job, events: Sender<Heard>) {
        let number = job.number;
        let heard = move |reply: Option<Vec<u8>>| {
            let heard = match reply {
                None => Heard::Over(attempt),
                Some(bytes) => {
                    let unread = |error: super::wire::WireError| Told {
                        number,
                        sequence: 0,
                        word: Word::Refused(error.to_string()),
                    };
                    Heard::Told(attempt, Box::new(Told::from_bytes(&bytes).unwrap_or_else(unread)))
                }
            };
            let _ = events.send(heard);
        };
        let within =
            job.left.map_or(QUESTION_MAX, |left| Duration::from_nanos(left.0.max(0) as u64) + OFFER_WITHIN);
        if let Err(error) =
            self.session.ask(&self.key(&format!("{server}/work")), job.to_bytes(), within, heard)
        {
            tracing::debug!(%error, server, "a server cannot be asked");
        }
    }

    fn cancel(&self, server: &str, number: u64) {
        let cancel = Cancel { session: self.process, number };
        if let Err(error) = self.session.put(&self.key(&format!("{server}/cancel")), cancel.to_bytes(), true)
        {
            tracing::debug!(%error, server, "work cannot be cancelled");
        }
    }

    fn send_again(&self, indices: &[u64], seen: Option<&ContextLatents>) {
        let Some(seen) = seen.filter(|seen| !seen.index.is_empty()) else { return };
        let segments = lock(&self.segments).clone();
        let newest = segments.last_key_value().map_or(0, |(_, segment)| *segment);
        let len = seen.latents.len() / seen.index.len();
        let found = seen.index.iter().zip(seen.latents.chunks_exact(len.max(1)));
        let wanted = found.filter(|(index, _)| indices.contains(index)).map(|(index, values)| Seen {
            index: *index,
            segment: segments.get(index).copied().unwrap_or(newest),
            values: values.to_vec(),
        });
        self.send(wanted.collect(), true);
    }
}

/// Puts servers in the denoiser's place.
pub struct ServedImaginer {
    link: Arc<Link>,
    /// The text encoder is here, too.
    has_text: bool,
    fallback: Option<Box<dyn Mind>>,
    /// When a goal's work must be had; half of its time is the fallback's.
    until: Option<TimeDelta>,
    /// Why a goal's work could not be had.
    lost: Option<String>,
    texts: VecDeque<(String, Vec<f32>)>,
}

/// A mind whose denoiser is `link`'s servers. It keeps the codec, the depth reader and, where it `has_text`, the text
/// encoder of `mind`. A fallback, whose latents must be of the same codec, answers goals whose work cannot be had.
pub fn served_mind(
    mind: Box<dyn Mind>,
    link: Arc<Link>,
    has_text: bool,
    fallback: Option<Box<dyn Mind>>,
) -> Box<dyn Mind> {
    let engine = link.first_offer().map(|offer| offer.engine).unwrap_or_default();
    let texts = VecDeque::with_capacity(TEXTS_KEPT);
    let by = ServedImaginer { link, has_text, fallback, until: None, lost: None, texts };
    let mut mind = Interposed::new(mind, by);
    mind.spec.engine_sha256 = engine;
    Box::new(mind)
}

impl ServedImaginer {
    fn run(
        &mut self,
        work: Work,
        seen: Option<&ContextLatents>,
        left: Option<TimeDelta>,
        give: &mut dyn FnMut(Word) -> Flow,
    ) -> Result<Word, ImagineError> {
        let patience = PATIENCE[usize::from(self.fallback.is_none())];
        let result = self.link.run(work, seen, (patience, left), give);
        if let Err(ImagineError::Served(error)) = &result {
            self.lost = Some(error.to_string());
        }
        result
    }

    /// Of the time left, what may pass before the fallback's turn.
    fn until_fallback(&self, left: Option<TimeDelta>) -> Option<TimeDelta> {
        let own = self.until.map(|until| until - clock::monotonic());
        own.map_or(left, |own| Some(left.map_or(own, |left| left.min(own))))
    }

    /// An answer to something else than was asked.
    fn confused(&self) -> ImagineError {
        let reason = "its result is not of the work that was asked for".into();
        ServedError::Failed { name: self.link.name.clone(), reason }.into()
    }
}

impl Interpose for ServedImaginer {
    fn denoise(&mut self, denoiser: &mut dyn Denoise, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        denoiser.denoise(step)
    }

    fn begin(&mut self, left: Option<TimeDelta>) {
        self.lost = None;
        let own = left.map(|left| if self.fallback.is_some() { TimeDelta(left.0 / 2) } else { left });
        self.until = own.map(|own| clock::monotonic() + own);
    }

    fn encode_text(&mut self, mind: &mut dyn Mind, text: &str) -> Result<Vec<f32>, MindError> {
        if self.has_text {
            return mind.encode_text(text);
        }
        if let Some((_, rows)) = self.texts.iter().find(|(known, _)| known == text) {
            return Ok(rows.clone());
        }
        let work = Work::Text(text.to_owned());
        let expected = {
            let config = mind.denoiser().config();
            config.text_len * config.text_dim
        };
        let mut rows =
            match self.run(work, None, self.until_fallback(Some(TEXT_WITHIN)), &mut |_| Flow::Continue) {
                Ok(Word::Text(rows)) => rows,
                Ok(_) => return Err(MindError::TextRows { expected, got: 0 }),
                Err(ImagineError::Served(error)) => return Err(error.into()),
                Err(_) => return Err(MindError::NoModel),
            };
        if rows.len() > expected {
            return Err(MindError::TextRows { expected, got: rows.len() });
        }
        rows.resize(expected, 0.0);
        if self.texts.len() == TEXTS_KEPT {
            self.texts.pop_front();
        }
        self.texts.push_back((text.to_owned(), rows.clone()));
        Ok(rows)
    }

    fn imaginer(interposed: &mut Interposed<Self>) -> Box<dyn Imagine + '_> {
        let has_heads = interposed.denoiser().config().lift;
        Box::new(Elsewhere { by: &mut interposed.by, has_heads })
    }

    fn instead(&mut self) -> Option<(&mut dyn Mind, String)> {
        let why = self.lost.take()?;
        Some((self.fallback.as_mut()?.as_mut(), why))
    }
}

/// Asks a server for one piece of work.
struct Elsewhere<'a> {
    by: &'a mut ServedImaginer,
    has_heads: bool,
}

impl Elsewhere<'_> {
    /// `x` is the sample of a guided step.
    fn run(
        &mut self,
        kind: Kind,
        Inputs { seen, prompt, settings, budget }: Inputs<'_>,
        x: &[f32],
        give: &mut dyn FnMut(Word) -> Flow,
    ) -> Result<Word, ImagineError> {
        let len = seen.first.len().max(1);
        let network = Network {
            kind,
            settings: settings.clone(),
            index: seen.index.clone(),
            hashes: seen.latents.chunks_exact(len).map(hash_of).collect(),
            first: seen.first.clone(),
            text: trimmed(prompt.text).to_vec(),
            null_text: trimmed(prompt.null_text).to_vec(),
            camera: prompt.camera.map(<[f32]>::to_vec),
            x: x.to_vec(),
        };
        let left = match kind {
            Kind::Guided { .. } => Some(budget.left().unwrap_or(STEP_WITHIN).min(STEP_WITHIN)),
            _ => self.by.until_fallback(budget.left()),
        };
        self.by.run(Work::Network(Box::new(network)), Some(seen), left, give)
    }
}

impl Imagine for Elsewhere<'_> {
    fn choose_context(
        &mut self,
        inputs: Inputs<'_>,
        count: usize,
        progress: &mut dyn FnMut(Stage<'_>) -> Flow,
    ) -> Result<Vec<usize>, ImagineError> {
        let len = inputs.seen.index.len();
        if len <= count || count < 2 || !self.has_heads {
            return Ok(crate::context::spread(len, count));
        }
        let mut give = |word: Word| match word {
            Word::Scanned(part, parts) => progress(Stage::Scan(part, parts)),
            _ => progress(Stage::Waiting),
        };
        match self.run(Kind::Choose { count }, inputs, &[], &mut give)? {
            Word::Chosen(at) if at.is_sorted() && at.last().is_none_or(|last| *last < len) => Ok(at),
            _ => Err(self.by.confused()),
        }
    }

    fn glance(&mut self, inputs: Inputs<'_>) -> Result<Vec<Heads>, ImagineError> {
        match self.run(Kind::Glance, inputs, &[], &mut |_| Flow::Continue)? {
            Word::Glances(glances) => Ok(glances),
            _ => Err(self.by.confused()),
        }
    }

    fn imagine(
        &mut self,
        inputs: Inputs<'_>,
        news: &mut dyn FnMut(News<'_>) -> Flow,
    ) -> Result<Imagined, ImagineError> {
        let mut glances = Vec::new();
        let mut give = |word: Word| match word {
            Word::Glanced(heads) => {
                glances.push(heads);
                news(News::Glanced(&glances))
            }
            Word::Stepped { candidate, candidates, step, steps, estimate } => {
                news(News::Stage(Stage::Step { candidate, candidates, step, steps, estimate: &estimate }))
            }
            _ => news(News::Stage(Stage::Waiting)),
        };
        let values = inputs.settings.target_latents * inputs.seen.first.len();
        match self.run(Kind::Imagine, inputs, &[], &mut give)? {
            Word::Imagined(imagined) if imagined.rollouts.iter().all(|r| r.latents.len() == values) => {
                Ok(*imagined)
            }
            _ => Err(self.by.confused()),
        }
    }

    fn guided(
        &mut self,
        inputs: Inputs<'_>,
        candidate: usize,
        (x, step): (&[f32], Step),
    ) -> Result<(Vec<f32>, Heads), ImagineError> {
        match self.run(Kind::guided(candidate, step), inputs, x, &mut |_| Flow::Continue)? {
            Word::Guided(velocity, heads) if velocity.len() == x.len() => Ok((velocity, heads)),
            _ => Err(self.by.confused()),
        }
    }
}
