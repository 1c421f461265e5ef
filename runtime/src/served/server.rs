//! The server's side as a state machine: what it holds, whose turn it is, and what it says.
//!
//! Invariant: every question gets exactly one end ([`Word::is_end`]), unless another question for the same work takes its
//! place or the server goes; silence is never an answer. Memory, queue and kept results are bounded by [`Limits`].

use super::wire::{Cancel, Job, Kind, Latents, Network, Offer, Seen, Told, Word, Work, hash_of};
use mindseye_bridge::time::TimeDelta;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// Bounds of what a server takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of latents that are held.
    pub memory: usize,
    /// Jobs that wait, beside those in work.
    pub waiting: usize,
    /// Jobs of one robot that wait or are in work.
    pub waiting_of_robot: usize,
    /// Jobs in work at once.
    pub at_once: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: 512 << 20, waiting: 64, waiting_of_robot: 4, at_once: 1 }
    }
}

/// Results that are kept for whoever asks again: at most so many, of so many bytes.
const RESULTS_MAX: (usize, usize) = (256, 64 << 20);
/// Numbers of jobs that were cancelled, kept in case the job comes after its cancel.
const CANCELLED_MAX: usize = 256;
/// Robots whose last turn is remembered.
const TURNS_MAX: usize = 1024;
/// Whoever waits hears at least this often that it is not forgotten.
pub const WORKING_EVERY: TimeDelta = TimeDelta::from_millis(250);

/// What a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Its name in keys.
    pub server: String,
    /// The bundle that it runs.
    pub bundle: String,
    /// What runs it.
    pub engine: String,
    /// Values of a latent.
    pub latent_len: usize,
}

/// A job's session and number.
type Key = (u64, u64);

/// A latent that is held.
struct Held {
    values: Arc<[f32]>,
    session: u64,
    segment: u32,
    used: u64,
}

/// Latents by content, whoever saw them. When there is no room, the robot that holds the most loses one: of its oldest
/// segment, the one that was not used for the longest time.
#[derive(Default)]
struct Store {
    held: HashMap<u64, Held>,
    of_session: BTreeMap<u64, usize>,
    bytes: usize,
    used: u64,
    evicted: u64,
}

impl Store {
    fn insert(&mut self, session: u64, seen: Seen, at_most: usize) {
        self.used += 1;
        let hash = hash_of(&seen.values);
        if let Some(held) = self.held.get_mut(&hash) {
            held.used = self.used;
            return;
        }
        let bytes = 4 * seen.values.len();
        if bytes > at_most {
            return;
        }
        while self.bytes + bytes > at_most && self.evict() {}
        let held = Held { values: seen.values.into(), session, segment: seen.segment, used: self.used };
        self.held.insert(hash, held);
        *self.of_session.entry(session).or_default() += 1;
        self.bytes += bytes;
    }

    /// Lets go of one; false when there is none.
    fn evict(&mut self) -> bool {
        let most = self.of_session.iter().max_by_key(|(session, held)| (**held, **session)).map(|(s, _)| *s);
        let whose = |held: &&Held| Some(held.session) == most;
        let oldest = self.held.iter().filter(|(_, held)| whose(held));
        let Some(hash) = oldest.min_by_key(|(_, held)| (held.segment, held.used)).map(|(hash, _)| *hash)
        else {
            return false;
        };
        if let Some(held) = self.held.remove(&hash) {
            self.bytes -= 4 * held.values.len();
            self.evicted += 1;
            if let Some(count) = self.of_session.get_mut(&held.session) {
                *count -= 1;
                if *count == 0 {
                    self.of_session.remove(&held.session);
                }
            }
        }
        true
    }

    /// The latents of a job, or the indices of those that are not held.
    fn find(&mut self, network: &Network) -> Result<Vec<Arc<[f32]>>, Vec<u64>> {
        let missing: Vec<u64> = network
            .index
            .iter()
            .zip(&network.hashes)
            .filter(|(_, hash)| !self.held.contains_key(hash))
            .map(|(index, _)| *index)
            .collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        self.used += 1;
        let used = self.used;
        let touch = |held: &mut Held| {
            held.used = used;
            held.values.clone()
        };
        Ok(network.hashes.iter().filter_map(|hash| self.held.get_mut(hash).map(touch)).collect())
    }
}

/// A job that was taken on.
struct Open<A> {
    key: Key,
    job: Job,
    /// Who is told; whoever asked last.
    asker: A,
    until: Option<TimeDelta>,
    in_work: bool,
    told_at: TimeDelta,
    sequence: u64,
}

/// What happens to a server. `A` is where replies to a question go.
#[derive(Clone, Debug)]
pub enum Heard<A> {
    /// Latents came.
    Latents(Latents),
    /// Work is asked for.
    Asked(A, Box<Job>),
    /// It is not wanted any more.
    Cancelled(Cancel),
    /// What a mind says of the work that it was given.
    Said(u64, u64, Word),
    /// Time passed.
    Tick,
}

/// What a mind is to do.
#[derive(Clone, Debug)]
pub struct Task {
    /// Whose.
    pub session: u64,
    /// Its number.
    pub number: u64,
    /// What.
    pub work: Work,
    /// Values of the context latents, in the order of the job's indices.
    pub latents: Vec<Arc<[f32]>>,
    /// When it must be ready.
    pub until: Option<TimeDelta>,
}

/// What a server has to do.
#[derive(Clone, Debug)]
pub enum Do<A> {
    /// Tell; after an end the question is over.
    Tell(A, Arc<Vec<u8>>),
    /// Give a mind that has none something to do. What it says comes back as [`Heard::Said`]; its last word is an end.
    Begin(Box<Task>),
    /// Stop that mind between two steps; its last word is still waited for.
    Halt(u64, u64),
}

/// Counts so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ServerCounts {
    /// Questions for work.
    pub asked: u64,
    /// Pieces of work done.
    pub done: u64,
    /// Questions that were told busy.
    pub busy: u64,
    /// Questions that were refused.
    pub refused: u64,
    /// Questions that were asked again for latents.
    pub missing: u64,
    /// Pieces of work that were cancelled or came too late.
    pub given_up: u64,
    /// Latents held.
    pub latents: u64,
    /// Latents that left for others.
    pub evicted: u64,
}

/// See the module.
pub struct Server<A> {
    about: About,
    limits: Limits,
    store: Store,
    open: Vec<Open<A>>,
    /// Jobs that were given to a mind, wanted or not.
    minds: Vec<Key>,
    /// When each robot had its last turn.
    turns: BTreeMap<u64, u64>,
    turn: u64,
    results: VecDeque<(Key, Arc<Vec<u8>>)>,
    cancelled: VecDeque<Key>,
    counts: ServerCounts,
}

impl<A: Clone> Server<A> {
    /// A server that holds nothing.
    pub fn new(about: About, limits: Limits) -> Self {
        Self {
            about,
            limits,
            store: Store::default(),
            open: Vec::new(),
            minds: Vec::new(),
            turns: BTreeMap::new(),
            turn: 0,
            results: VecDeque::new(),
            cancelled: VecDeque::new(),
            counts: ServerCounts::default(),
        }
    }

    /// What it offers now.
    pub fn offer(&self) -> Offer {
        let About { server, bundle, engine, .. } = self.about.clone();
        Offer { server, bundle, engine, waiting: self.open.len(), waiting_max: self.limits.waiting }
    }

    /// Counts so far.
    pub fn counts(&self) -> ServerCounts {
        ServerCounts { latents: self.store.held.len() as u64, evicted: self.store.evicted, ..self.counts }
    }

    /// One step: what to do about `heard` at the monotonic time `now`.
    pub fn step(&mut self, heard: Heard<A>, now: TimeDelta) -> Vec<Do<A>> {
        let mut todo = Vec::new();
        match heard {
            Heard::Latents(latents) => self.take(latents),
            Heard::Asked(asker, job) => self.asked(asker, *job, now, &mut todo),
            Heard::Cancelled(cancel) => self.cancel((cancel.session, cancel.number), &mut todo),
            Heard::Said(session, number, word) => self.said((session, number), word, now, &mut todo),
            Heard::Tick => {}
        }
        self.pass_time(now, &mut todo);
        self.begin(now, &mut todo);
        todo
    }

    fn take(&mut self, latents: Latents) {
        // A codec of another bundle, or numbers that are none: nothing that a network should look at.
        if latents.bundle != self.about.bundle {
            return;
        }
        for seen in latents.seen {
            if seen.values.len() == self.about.latent_len && seen.values.iter().all(|v| v.is_finite()) {
                self.store.insert(latents.session, seen, self.limits.memory);
            }
        }
    }

    /// Why a job is not for this server.
    fn refusal(&self, job: &Job) -> Option<String> {
        let About { bundle, latent_len, .. } = &self.about;
        let short = |hash: &str| hash.get(..12).unwrap_or(hash).to_owned();
        if job.bundle != *bundle {
            let (runs, wanted) = (short(bundle), short(&job.bundle));
            return Some(format!(
                "it runs bundle {runs}, the robot's is {wanted}; give both the same bundle"
            ));
        }
        let Work::Network(network) = &job.work else { return None };
        let targets = match network.kind {
            Kind::Guided { .. } => network.settings.target_latents * latent_len,
            _ => 0,
        };
        for (what, expected, got) in
            [("first latent", *latent_len, network.first.len()), ("sample", targets, network.x.len())]
        {
            if expected != got {
                return Some(format!("{what} has {got} values, expected {expected}"));
            }
        }
        let bytes = network.index.len() * latent_len * 4;
        (bytes > self.limits.memory).then(|| {
            let (latents, memory) = (network.index.len(), self.limits.memory);
            format!(
                "a context of {latents} latents takes {bytes} bytes; at most {memory} are held (--memory-mb)"
            )
        })
    }

    fn asked(&mut self, asker: A, job: Job, now: TimeDelta, todo: &mut Vec<Do<A>>) {
        self.counts.asked += 1;
        let key = (job.session, job.number);
        let tell = |word: Word| {
            let told = Told { number: key.1, sequence: 0, word };
            Do::Tell(asker.clone(), Arc::new(told.to_bytes()))
        };
        if let Some(reason) = self.refusal(&job) {
            self.counts.refused += 1;
            return todo.push(tell(Word::Refused(reason)));
        }
        if self.cancelled.contains(&key) {
            return todo.push(tell(Word::Cancelled));
        }
        if let Some((_, result)) = self.results.iter().find(|(done, _)| *done == key) {
            return todo.push(Do::Tell(asker, result.clone()));
        }
        let ahead = self.open.len();
        if let Some(open) = self.open.iter_mut().find(|open| open.key == key) {
            (open.asker, open.told_at) = (asker, now);
            return Self::tell(open, Word::Working { ahead: 0 }, now, todo);
        }
        let of_robot = self.open.iter().filter(|open| open.key.0 == key.0).count();
        if ahead >= self.limits.waiting + self.limits.at_once || of_robot >= self.limits.waiting_of_robot {
            self.counts.busy += 1;
            return todo.push(tell(Word::Busy { waiting: ahead }));
        }
        if let Work::Network(network) = &job.work
            && let Err(missing) = self.store.find(network)
        {
            self.counts.missing += 1;
            return todo.push(tell(Word::Missing(missing)));
        }
        let until = job.left.map(|left| now + left);
        self.open.push(Open { key, job, asker, until, in_work: false, told_at: now, sequence: 0 });
    }

    fn tell(open: &mut Open<A>, word: Word, now: TimeDelta, todo: &mut Vec<Do<A>>) {
        open.sequence += 1;
        open.told_at = now;
        let told = Told { number: open.key.1, sequence: open.sequence, word };
        todo.push(Do::Tell(open.asker.clone(), Arc::new(told.to_bytes())));
    }

    /// Ends an open job with its last word.
    fn end(&mut self, at: usize, word: Word, todo: &mut Vec<Do<A>>) {
        let open = self.open.swap_remove(at);
        let is_result = word.is_result();
        let told = Told { number: open.key.1, sequence: open.sequence + 1, word };
        let message = Arc::new(told.to_bytes());
        todo.push(Do::Tell(open.asker, message.clone()));
        if !is_result {
            self.counts.given_up += 1;
            return;
        }
        self.counts.done += 1;
        self.results.push_back((open.key, message));
        let bytes =
            |results: &VecDeque<(Key, Arc<Vec<u8>>)>| results.iter().map(|(_, r)| r.len()).sum::<usize>();
        while self.results.len() > RESULTS_MAX.0 || bytes(&self.results) > RESULTS_MAX.1 {
            self.results.pop_front();
        }
    }

    fn cancel(&mut self, key: Key, todo: &mut Vec<Do<A>>) {
        if self.cancelled.len() == CANCELLED_MAX {
            self.cancelled.pop_front();
        }
        self.cancelled.push_back(key);
        if let Some(at) = self.open.iter().position(|open| open.key == key) {
            self.end(at, Word::Cancelled, todo);
        }
        if self.minds.contains(&key) {
            todo.push(Do::Halt(key.0, key.1));
        }
    }

    fn said(&mut self, key: Key, word: Word, now: TimeDelta, todo: &mut Vec<Do<A>>) {
        if word.is_end() {
            self.minds.retain(|mind| *mind != key);
        }
        let Some(at) = self.open.iter().position(|open| open.key == key && open.in_work) else { return };
        if word.is_end() {
            self.end(at, word, todo);
        } else {
            Self::tell(&mut self.open[at], word, now, todo);
        }
    }

    fn pass_time(&mut self, now: TimeDelta, todo: &mut Vec<Do<A>>) {
        let late = |open: &Open<A>| !open.in_work && open.until.is_some_and(|until| until <= now);
        while let Some(at) = self.open.iter().position(late) {
            self.end(at, Word::Late, todo);
        }
        let ahead = self.open.len();
        for open in &mut self.open {
            if now - open.told_at >= WORKING_EVERY {
                let ahead = if open.in_work { 0 } else { ahead };
                Self::tell(open, Word::Working { ahead }, now, todo);
            }
        }
    }

    /// Gives minds that have nothing to do the jobs of those robots whose last turn is longest ago.
    fn begin(&mut self, now: TimeDelta, todo: &mut Vec<Do<A>>) {
        while self.minds.len() < self.limits.at_once {
            let turn = |open: &Open<A>| self.turns.get(&open.key.0).copied().unwrap_or(0);
            let waiting = self.open.iter().enumerate().filter(|(_, open)| !open.in_work);
            let Some((at, _)) = waiting.min_by_key(|(_, open)| (turn(open), open.key.1, open.key.0)) else {
                return;
            };
            let latents = match &self.open[at].job.work {
                Work::Text(_) => Ok(Vec::new()),
                Work::Network(network) => self.store.find(network),
            };
            let latents = match latents {
                Ok(latents) => latents,
                Err(missing) => {
                    // Others' latents took their place while it waited.
                    self.counts.missing += 1;
                    self.end(at, Word::Missing(missing), todo);
                    continue;
                }
            };
            let open = &mut self.open[at];
            (open.in_work, open.told_at) = (true, now);
            let (session, number) = open.key;
            let task = Task { session, number, work: open.job.work.clone(), latents, until: open.until };
            self.minds.push(open.key);
            self.turn += 1;
            if self.turns.len() >= TURNS_MAX {
                // Who was not heard of for longest counts as new.
                let oldest = self.turns.iter().min_by_key(|(_, turn)| **turn).map(|(session, _)| *session);
                oldest.map(|session| self.turns.remove(&session));
            }
            self.turns.insert(session, self.turn);
            todo.push(Do::Begin(Box::new(task)));
        }
    }
}
