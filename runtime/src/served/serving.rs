//! The server's threads and keys around [`Server`].
//!
//! ```text
//! questions, latents, cancels (Zenoh's threads) ─ bounded ─► core ─► minds, one thread each
//!                                                             │  ◄─ words ──┘
//!                                                             └─► posts (bounded, by robot) ─► replies
//! ```

use super::server::{About, Do, Heard, Limits, Server, ServerCounts, Task};
use super::wire::{Cancel, Job, Kind, Latents, MESSAGE_MAX, Network, Told, Word, Work, trimmed};
use super::{Imagine, Inputs, News, ServedError, spawn};
use crate::ground::Mind;
use crate::imagine::{Budget, Clock, ContextLatents, Flow, ImagineError, Prompt, Stage};
use crate::node::MonotonicClock;
use mindseye_base::sync::lock;
use mindseye_bridge::clock;
use mindseye_bridge::ros::{Declared, Question, RosSession};
use mindseye_engines::sampler::Step;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Messages that wait for the core; those that come meanwhile are let go of, which whoever sent them notices.
const WAITING: usize = 1024;
/// Threads that send replies, so that a robot with a slow link holds up few others, and what waits for each.
const POSTS: usize = 4;
const POST_WAITING: usize = 64;
/// The core looks at the time this often.
const TICK: Duration = Duration::from_millis(20);
/// Largest estimate that is told of while work is done, values: it is for people to look at.
const ESTIMATE_MAX: usize = 1 << 16;

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServingConfig {
    /// The name that robots ask for: letters, digits, `_`, `-`.
    pub name: String,
    /// Bounds.
    pub limits: Limits,
}

/// What comes to the core.
enum In {
    Latents(Vec<u8>),
    Asked(Arc<Question>),
    Offer(Question),
    Cancel(Vec<u8>),
    Said(u64, u64, Word),
}

/// A running server. Dropping it stops it.
pub struct Serving {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    declared: Vec<Declared>,
    counts: Arc<Mutex<ServerCounts>>,
    /// What is declared ends with its session.
    _session: RosSession,
}

impl Serving {
    /// Serves what these minds imagine, each at one job at a time; all of one bundle.
    ///
    /// # Errors
    /// [`ServedError::Ros`] where a key cannot be declared, [`ServedError::Thread`].
    pub fn start(
        session: &RosSession,
        config: &ServingConfig,
        minds: Vec<Box<dyn Mind>>,
    ) -> Result<Self, ServedError> {
        static STARTED: AtomicU64 = AtomicU64::new(1);
        let server = format!("{}-{}", session.zid(), STARTED.fetch_add(1, Ordering::Relaxed));
        let spec = minds.first().map(|mind| mind.spec().clone());
        let about = About {
            server: server.clone(),
            bundle: spec.as_ref().map(|s| s.bundle_sha256.clone()).unwrap_or_default(),
            engine: spec.as_ref().map(|s| s.engine_sha256.clone()).unwrap_or_default(),
            latent_len: spec.map_or(0, |s| s.latent_len),
        };
        let limits = Limits { at_once: minds.len(), ..config.limits };
        let (inbox, messages) = sync_channel::<In>(WAITING);
        let stop = Arc::new(AtomicBool::new(false));
        let counts: Arc<Mutex<ServerCounts>> = Arc::default();
        let mut threads = Vec::new();
        let mut hands = Vec::new();
        for mind in minds {
            let wanted: Arc<Mutex<Option<(u64, u64)>>> = Arc::default();
            let (tasks_in, tasks) = sync_channel::<Box<Task>>(1);
            let hand = Worker { mind, tasks, wanted: wanted.clone(), inbox: inbox.clone() };
            threads.push(spawn("mind", move || hand.run())?);
            hands.push(Hand { tasks: tasks_in, wanted });
        }
        let mut posts = Vec::new();
        for _ in 0..POSTS {
            let (post, letters) = sync_channel::<(Arc<Question>, Arc<Vec<u8>>)>(POST_WAITING);
            threads.push(spawn("post", move || {
                while let Ok((question, bytes)) = letters.recv() {
                    if let Err(error) = question.reply(bytes.to_vec()) {
                        tracing::debug!(%error, "a robot is gone before its reply");
                    }
                }
            })?);
            posts.push(post);
        }
        let core = Core {
            server: Server::new(about, limits),
            messages,
            hands,
            posts,
            stop: stop.clone(),
            counts: counts.clone(),
        };
        threads.push(spawn("serve", move || core.run())?);

        let base = format!("mindseye/served/{}", config.name);
        let own = format!("{base}/{server}");
        let to = |make: fn(Question) -> In| {
            let inbox = inbox.clone();
            // When the core cannot keep up the question ends here, and whoever asked asks again.
            move |question: Question| drop(inbox.try_send(make(question)))
        };
        let put = |make: fn(Vec<u8>) -> In| {
            let inbox = inbox.clone();
            move |_: &str, bytes: Vec<u8>| drop(inbox.try_send(make(bytes)))
        };
        let declared = vec![
            session.questions(&format!("{own}/work"), to(|q| In::Asked(Arc::new(q))))?,
            session.questions(&format!("{own}/offer"), to(In::Offer))?,
            session.hear(&format!("{own}/cancel"), 4096, put(In::Cancel))?,
            session.hear(&format!("{base}/latents"), MESSAGE_MAX, put(In::Latents))?,
            // Last: whoever sees it can ask.
            session.be_here(&format!("{own}/here"))?,
        ];
        Ok(Self { stop, threads, declared, counts, _session: session.clone() })
    }

    /// Counts so far.
    pub fn counts(&self) -> ServerCounts {
        *lock(&self.counts)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.declared.clear();
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the server panicked");
            }
        }
    }
}

/// What the core knows of a mind's thread.
struct Hand {
    tasks: SyncSender<Box<Task>>,
    /// The work that is still wanted of it.
    wanted: Arc<Mutex<Option<(u64, u64)>>>,
}

/// A reply on its way: whose, and its bytes.
type Post = (Arc<Question>, Arc<Vec<u8>>);

struct Core {
    server: Server<Arc<Question>>,
    messages: Receiver<In>,
    hands: Vec<Hand>,
    posts: Vec<SyncSender<Post>>,
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<ServerCounts>>,
}

impl Core {
    fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let heard = match self.messages.recv_timeout(TICK) {
                Ok(message) => self.heard(message),
                Err(RecvTimeoutError::Timeout) => Some(Heard::Tick),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let Some(heard) = heard else { continue };
            for todo in self.server.step(heard, clock::monotonic()) {
                self.carry_out(todo);
            }
            *lock(&self.counts) = self.server.counts();
        }
        for hand in &self.hands {
            *lock(&hand.wanted) = None;
        }
    }

    fn heard(&mut self, message: In) -> Option<Heard<Arc<Question>>> {
        match message {
            In::Latents(bytes) => match Latents::from_bytes(&bytes) {
                Ok(latents) => Some(Heard::Latents(latents)),
                Err(error) => {
                    tracing::debug!(%error, "latents were let go of");
                    None
                }
            },
            In::Asked(question) => {
                let job = match question.len() {
                    got if got > MESSAGE_MAX => {
                        Err(super::wire::WireError::Long { what: "job", got, most: MESSAGE_MAX })
                    }
                    _ => Job::from_bytes(&question.body()),
                };
                match job {
                    Ok(job) => Some(Heard::Asked(question, Box::new(job))),
                    Err(error) => {
                        let told = Told { number: 0, sequence: 0, word: Word::Refused(error.to_string()) };
                        self.post(&question, Arc::new(told.to_bytes()), 0);
                        None
                    }
                }
            }
            In::Offer(question) => {
                self.post(&Arc::new(question), Arc::new(self.server.offer().to_bytes()), 0);
                None
            }
            In::Cancel(bytes) => Cancel::from_bytes(&bytes).ok().map(Heard::Cancelled),
            In::Said(session, number, word) => Some(Heard::Said(session, number, word)),
        }
    }

    fn post(&self, to: &Arc<Question>, bytes: Arc<Vec<u8>>, robot: u64) {
        let post = &self.posts[robot as usize % POSTS];
        // Letters pile up for a slow link: whoever waits for this one asks again.
        if post.try_send((to.clone(), bytes)).is_err() {
            tracing::debug!("a reply was let go of: too many wait");
        }
    }

    fn carry_out(&mut self, todo: Do<Arc<Question>>) {
        match todo {
            Do::Tell(to, bytes) => {
                let robot = Arc::as_ptr(&to) as usize as u64 >> 6;
                self.post(&to, bytes, robot);
            }
            Do::Begin(task) => {
                let key = (task.session, task.number);
                if let Some(hand) = self.hands.iter().find(|hand| lock(&hand.wanted).is_none()) {
                    *lock(&hand.wanted) = Some(key);
                    // It waits for one: the core gives out no more than there are hands.
                    let _ = hand.tasks.try_send(task);
                }
            }
            Do::Halt(session, number) => {
                for hand in &self.hands {
                    lock(&hand.wanted).take_if(|wanted| *wanted == (session, number));
                }
            }
        }
    }
}

/// A mind's thread.
struct Worker {
    mind: Box<dyn Mind>,
    tasks: Receiver<Box<Task>>,
    wanted: Arc<Mutex<Option<(u64, u64)>>>,
    inbox: SyncSender<In>,
}

impl Worker {
    fn run(mut self) {
        while let Ok(task) = self.tasks.recv() {
            let key = (task.session, task.number);
            let (wanted, inbox) = (self.wanted.clone(), self.inbox.clone());
            let mut say = |word: Word| {
                // Progress is a courtesy; the result is not.
                let _ = inbox.try_send(In::Said(key.0, key.1, word));
                if *lock(&wanted) == Some(key) { Flow::Continue } else { Flow::Stop }
            };
            let word = perform(self.mind.as_mut(), &task, &MonotonicClock, &mut say);
            // Free before the core hears of it, and gives out the next.
            *lock(&self.wanted) = None;
            if self.inbox.send(In::Said(key.0, key.1, word)).is_err() {
                return;
            }
        }
    }
}

/// Does a task; `say` gets what happens meanwhile, and may stop it between two steps. The result is an end.
pub fn perform(
    mind: &mut dyn Mind,
    task: &Task,
    clock: &dyn Clock,
    say: &mut dyn FnMut(Word) -> Flow,
) -> Word {
    let network = match &task.work {
        Work::Network(network) => network,
        Work::Text(text) => {
            return match mind.encode_text(text) {
                Ok(rows) => Word::Text(trimmed(&rows).to_vec()),
                Err(error) => Word::Failed(error.to_string()),
            };
        }
    };
    let rows = {
        let config = mind.denoiser().config();
        config.text_len * config.text_dim
    };
    if let Some(got) = [&network.text, &network.null_text].map(Vec::len).into_iter().find(|got| *got > rows) {
        return Word::Failed(format!("text has {got} values, expected at most {rows}"));
    }
    let padded = |given: &[f32]| {
        let mut all = given.to_vec();
        all.resize(rows, 0.0);
        all
    };
    let (text, null_text) = (padded(&network.text), padded(&network.null_text));
    let prompt = Prompt { text: &text, null_text: &null_text, camera: network.camera.as_deref() };
    let seen = ContextLatents {
        index: network.index.clone(),
        latents: task.latents.concat(),
        first: network.first.clone(),
    };
    let budget = Budget { clock, until: task.until };
    let inputs = Inputs { seen: &seen, prompt, settings: &network.settings, budget };
    match done(mind.imaginer().as_mut(), network, inputs, say) {
        Ok(word) => word,
        Err(ImagineError::Stopped) => Word::Cancelled,
        Err(error) => Word::Failed(error.to_string()),
    }
}

fn done(
    imaginer: &mut dyn Imagine,
    network: &Network,
    inputs: Inputs<'_>,
    say: &mut dyn FnMut(Word) -> Flow,
) -> Result<Word, ImagineError> {
    let mut news = |news: News<'_>| match news {
        News::Glanced([.., heads]) => say(Word::Glanced(heads.clone())),
        News::Stage(Stage::Scan(part, parts)) => say(Word::Scanned(part, parts)),
        News::Stage(Stage::Step { candidate, candidates, step, steps, estimate }) => {
            let estimate = if estimate.len() > ESTIMATE_MAX { Vec::new() } else { estimate.to_vec() };
            say(Word::Stepped { candidate, candidates, step, steps, estimate })
        }
        _ => Flow::Continue,
    };
    Ok(match network.kind {
        Kind::Choose { count } => {
            let mut stage = |stage: Stage<'_>| news(News::Stage(stage));
            Word::Chosen(imaginer.choose_context(inputs, count, &mut stage)?)
        }
        Kind::Glance => Word::Glances(imaginer.glance(inputs)?),
        Kind::Imagine => Word::Imagined(Box::new(imaginer.imagine(inputs, &mut news)?)),
        Kind::Guided { candidate, index, sigma, timestep } => {
            let step = Step { index, sigma, timestep };
            let (velocity, heads) = imaginer.guided(inputs, candidate, (&network.x, step))?;
            Word::Guided(velocity, heads)
        }
    })
}
