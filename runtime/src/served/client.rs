//! The robot's side of one piece of work as a state machine: whom to ask, when to ask again, when to give up.
//!
//! Invariant: an errand ends exactly once ([`Do::End`]), by its deadline; without one, when no server is found for its
//! patience, or none says anything.

use super::ServedError;
use super::wire::{Offer, Told, Word};
use mindseye_bridge::time::TimeDelta;
use std::collections::BTreeMap;

/// A server that says nothing for so long has lost the question or its answer.
const SILENT: TimeDelta = TimeDelta::from_millis(900);
/// Times in a row that a silent server is asked again before another is looked for.
const STRIKES: u32 = 2;
/// A question that ended without an answer is asked again after this.
const AGAIN: TimeDelta = TimeDelta::from_millis(50);
/// A busy server is asked again after this, a silent one after the other.
const BUSY_AGAIN: TimeDelta = TimeDelta::from_millis(150);
const GONE_AGAIN: TimeDelta = TimeDelta::from_millis(1000);
/// Offers are waited for this long after the first one.
const OFFERS_WITHIN: TimeDelta = TimeDelta::from_millis(30);
/// Nobody offered: looked for again after this.
const LOOK_AGAIN: TimeDelta = TimeDelta::from_millis(200);
/// Without a deadline, an errand of which nothing is said for so long is over.
const QUIET_MAX: TimeDelta = TimeDelta::from_millis(20_000);
/// Times that latents are sent for one errand.
const LATENTS_SENT_MAX: u32 = 64;

/// What happens to an errand.
#[derive(Clone, Debug)]
pub enum Heard {
    /// A server offers.
    Offer(Offer),
    /// Everybody who was asked for an offer has answered or is gone.
    Offered,
    /// A server is not there any more.
    Gone(String),
    /// A reply to an attempt.
    Told(u32, Box<Told>),
    /// An attempt's question is over.
    Over(u32),
    /// Nobody wants it any more.
    Stop,
    /// Time passed.
    Tick,
}

/// What the robot has to do.
#[derive(Debug)]
pub enum Do {
    /// Ask all servers for their offers.
    Look,
    /// Ask a server; `left` is the time that it has.
    Ask {
        /// Whom.
        server: String,
        /// What replies are told apart by.
        attempt: u32,
        /// For the job.
        left: Option<TimeDelta>,
    },
    /// Send the latents of these indices, before anything that follows.
    SendLatents(Vec<u64>),
    /// Tell a server that it is not wanted any more.
    Cancel(String),
    /// Tell of progress.
    Give(Word),
    /// It is over.
    End(Result<Word, ServedError>),
}

enum State {
    /// Since when, and what was offered; whether everybody has answered.
    Looking {
        since: TimeDelta,
        first: Option<TimeDelta>,
        offers: Vec<Offer>,
        all: bool,
    },
    /// Until when.
    Pausing(TimeDelta),
    /// Who was asked, and when something was heard last. `again`: the question ended without an answer.
    Asked {
        server: String,
        heard_at: TimeDelta,
        again: Option<TimeDelta>,
    },
    Ended,
}

/// See the module.
pub struct Errand {
    name: String,
    number: u64,
    /// Bundle that the robot has.
    bundle: String,
    /// The robot's process: robots with the same choice choose differently.
    session: u64,
    began: TimeDelta,
    until: Option<TimeDelta>,
    /// How long servers are looked for in vain.
    patience: TimeDelta,
    state: State,
    attempt: u32,
    asked: Option<String>,
    strikes: u32,
    sequence: u64,
    latents_sent: u32,
    /// When servers may be asked again; `None`: never.
    not_before: BTreeMap<String, Option<TimeDelta>>,
    refused: Option<String>,
    busy: bool,
    heard_of_any: bool,
    /// Since when nobody was found.
    alone_since: TimeDelta,
    /// When anything was said of it.
    heard_last: TimeDelta,
}

impl Errand {
    /// An errand that begins `now`: first at `server`, where one is known.
    pub fn new(
        (name, number): (&str, u64),
        (bundle, session): (&str, u64),
        server: Option<String>,
        patience: TimeDelta,
        until: Option<TimeDelta>,
        now: TimeDelta,
    ) -> (Self, Vec<Do>) {
        let mut errand = Self {
            name: name.into(),
            number,
            bundle: bundle.into(),
            session,
            began: now,
            until,
            patience,
            state: State::Pausing(now),
            attempt: 0,
            asked: None,
            strikes: 0,
            sequence: 0,
            latents_sent: 0,
            not_before: BTreeMap::new(),
            refused: None,
            busy: false,
            heard_of_any: false,
            alone_since: now,
            heard_last: now,
        };
        let mut todo = Vec::new();
        match server {
            Some(server) => errand.ask(server, now, &mut todo),
            None => errand.look(now, &mut todo),
        }
        (errand, todo)
    }

    /// The server that was asked last.
    pub fn asked(&self) -> Option<&str> {
        self.asked.as_deref()
    }

    /// The server that was asked, while an answer is waited for.
    fn server(&self) -> Option<&str> {
        match &self.state {
            State::Asked { server, .. } => Some(server),
            _ => None,
        }
    }

    /// One step: what to do about `heard` at the monotonic time `now`.
    pub fn step(&mut self, heard: Heard, now: TimeDelta) -> Vec<Do> {
        let mut todo = Vec::new();
        if matches!(self.state, State::Ended) {
            return todo;
        }
        match heard {
            Heard::Offer(offer) => self.offered(offer, now),
            Heard::Offered => {
                if let State::Looking { all, .. } = &mut self.state {
                    *all = true;
                }
            }
            Heard::Gone(server) => {
                if self.server() == Some(&server) {
                    self.leave(GONE_AGAIN, now, &mut todo);
                }
            }
            Heard::Told(attempt, told) => self.told(attempt, *told, now, &mut todo),
            Heard::Over(attempt) => {
                if let State::Asked { again, .. } = &mut self.state
                    && attempt == self.attempt
                {
                    *again = Some(now + AGAIN);
                }
            }
            Heard::Stop => {
                let server = self.server().map(str::to_owned);
                todo.extend(server.map(Do::Cancel));
                self.state = State::Ended;
                return todo;
            }
            Heard::Tick => {}
        }
        self.pass_time(now, &mut todo);
        todo
    }

    fn offered(&mut self, offer: Offer, now: TimeDelta) {
        if offer.bundle != self.bundle {
            let short = |hash: &str| hash.get(..12).unwrap_or(hash).to_owned();
            let (runs, own) = (short(&offer.bundle), short(&self.bundle));
            self.refused =
                Some(format!("it runs bundle {runs}, this robot's is {own}; give both the same bundle"));
            self.not_before.insert(offer.server, None);
        } else if let State::Looking { first, offers, .. } = &mut self.state {
            self.heard_of_any = true;
            first.get_or_insert(now);
            offers.retain(|known| known.server != offer.server);
            offers.push(offer);
        }
    }

    fn told(&mut self, attempt: u32, told: Told, now: TimeDelta, todo: &mut Vec<Do>) {
        // What an earlier attempt says of progress is old; a result is a result.
        let current = attempt == self.attempt;
        // A job that cannot be read has no number.
        let ours = told.number == self.number || (told.number == 0 && matches!(told.word, Word::Refused(_)));
        if !ours || (!current && !told.word.is_result()) {
            return;
        }
        self.heard_of_any = true;
        self.heard_last = now;
        if let State::Asked { heard_at, .. } = &mut self.state
            && current
        {
            *heard_at = now;
            self.strikes = 0;
        }
        match told.word {
            Word::Working { .. } => {}
            word if !word.is_end() => {
                if told.sequence > self.sequence {
                    self.sequence = told.sequence;
                    todo.push(Do::Give(word));
                }
            }
            Word::Missing(indices) => {
                self.latents_sent += 1;
                if self.latents_sent > LATENTS_SENT_MAX {
                    let reason =
                        "it does not keep the latents that it is sent; give it more memory (--memory-mb)";
                    return self.end(Err(self.failed(reason.into())), todo);
                }
                let Some(server) = self.server().map(str::to_owned) else { return };
                todo.push(Do::SendLatents(indices));
                self.ask(server, now, todo);
            }
            Word::Busy { .. } => {
                self.busy = true;
                self.leave(BUSY_AGAIN, now, todo);
            }
            Word::Refused(reason) => {
                if let Some(server) = self.server().map(str::to_owned) {
                    self.refused = Some(reason);
                    self.not_before.insert(server, None);
                    self.look(now, todo);
                }
            }
            Word::Failed(reason) => self.end(Err(self.failed(reason)), todo),
            Word::Late => self.end(Err(self.late(now)), todo),
            Word::Cancelled => self.end(Err(self.failed("the work was cancelled".into())), todo),
            word => self.end(Ok(word), todo),
        }
    }

    fn failed(&self, reason: String) -> ServedError {
        ServedError::Failed { name: self.name.clone(), reason }
    }

    fn late(&self, now: TimeDelta) -> ServedError {
        let waited = now - self.began;
        if self.heard_of_any {
            ServedError::Late { name: self.name.clone(), waited, busy: self.busy }
        } else {
            ServedError::NoServer { name: self.name.clone(), waited }
        }
    }

    fn end(&mut self, result: Result<Word, ServedError>, todo: &mut Vec<Do>) {
        self.state = State::Ended;
        todo.push(Do::End(result));
    }

    fn look(&mut self, now: TimeDelta, todo: &mut Vec<Do>) {
        self.state = State::Looking { since: now, first: None, offers: Vec::new(), all: false };
        todo.push(Do::Look);
    }

    fn ask(&mut self, server: String, now: TimeDelta, todo: &mut Vec<Do>) {
        self.attempt += 1;
        self.sequence = 0;
        self.asked = Some(server.clone());
        // A tenth is kept for the way.
        let left = self.until.map(|until| TimeDelta((until - now).0 / 10 * 9));
        self.state = State::Asked { server: server.clone(), heard_at: now, again: None };
        todo.push(Do::Ask { server, attempt: self.attempt, left });
    }

    /// Looks for another server than the one that was asked.
    fn leave(&mut self, again: TimeDelta, now: TimeDelta, todo: &mut Vec<Do>) {
        if let Some(server) = self.server().map(str::to_owned) {
            self.not_before.insert(server, Some(now + again));
        }
        self.strikes = 0;
        self.look(now, todo);
    }

    fn pass_time(&mut self, now: TimeDelta, todo: &mut Vec<Do>) {
        if matches!(self.state, State::Ended) {
            return;
        }
        if self.until.unwrap_or(self.heard_last + QUIET_MAX) <= now {
            let server = self.server().map(str::to_owned);
            todo.extend(server.map(Do::Cancel));
            return self.end(Err(self.late(now)), todo);
        }
        match &mut self.state {
            State::Looking { since, first, all, .. } => {
                let enough = first.is_some_and(|first| now - first >= OFFERS_WITHIN);
                if *all || enough || now - *since >= LOOK_AGAIN {
                    self.choose(now, todo);
                }
            }
            State::Pausing(until) if *until <= now => self.look(now, todo),
            State::Asked { server, heard_at, again } => {
                let silent = now - *heard_at >= SILENT;
                if silent || again.is_some_and(|again| again <= now) {
                    let server = server.clone();
                    self.strikes += 1;
                    if self.strikes > STRIKES {
                        self.leave(GONE_AGAIN, now, todo);
                    } else {
                        self.ask(server, now, todo);
                    }
                }
            }
            State::Pausing(_) | State::Ended => {}
        }
    }

    /// Asks the server with the least waiting of those that offered; pauses where there is none.
    fn choose(&mut self, now: TimeDelta, todo: &mut Vec<Do>) {
        let State::Looking { offers, .. } = &self.state else { return };
        let may = |offer: &&Offer| {
            self.not_before.get(&offer.server).is_none_or(|at| at.is_some_and(|at| at <= now))
        };
        let mix = |server: &str| xxhash_rust::xxh3::xxh3_64_with_seed(server.as_bytes(), self.session);
        let best = offers.iter().filter(may).min_by_key(|offer| (offer.waiting, mix(&offer.server)));
        if let Some(server) = best.map(|offer| offer.server.clone()) {
            self.alone_since = now;
            return self.ask(server, now, todo);
        }
        if offers.is_empty() {
            if let Some(reason) = self.refused.clone() {
                return self.end(Err(ServedError::Refused { name: self.name.clone(), reason }), todo);
            }
            if now - self.alone_since >= self.patience {
                return self.end(Err(self.late(now)), todo);
            }
        } else {
            self.alone_since = now;
        }
        let soonest = self.not_before.values().flatten().filter(|at| **at > now).min().copied();
        self.state = State::Pausing(soonest.unwrap_or(now + LOOK_AGAIN).min(now + LOOK_AGAIN));
    }
}
