//! The live page: what the robot sees, remembers and imagines, in a browser, while it happens.
//!
//! ```text
//! node's threads ─ NodeEvent ─► Tap (newest only, bounded) ─► view thread ─► Hub (slots) ─► a thread per viewer ─► page
//! ```
//!
//! The robot's threads only copy what is new under a short lock; pictures are reduced, decoded and encoded by a thread of
//! the page's own, ten times a second at most, and only what somebody looks at. A viewer that is slow skips contents.
//!
//! Who may look: on a loopback address everybody of this machine, elsewhere who has the token that is made at each start.
//! Who may ask and cancel: on a loopback address the same, elsewhere nobody unless the control was switched on. Pages of
//! other origins are refused, and so are names of other hosts on a loopback address (a web page can point its own name
//! at this machine). The page loads nothing from elsewhere.
//!
//! A [`Reporter`] hears the same events and keeps what a viewer would have been sent, with a recording of the camera: the
//! page as one file.

pub mod foxglove;
mod http;
mod hub;
mod report;
mod server;
mod story;
mod tap;
mod websocket;
mod words;

pub use hub::{VIEWERS_MAX, ViewerCounts};
pub use report::{ReportFacts, Reporter, data_url, still_page};
pub use story::GOALS_KEPT;
pub use tap::Tap;

use crate::mind::LatentDecoder;
use crate::node::Requester;
use http::Gate;
use hub::{Hub, Payload, Slot};
use mindseye_base::file::hex;
use mindseye_bridge::goal::{Goal, MAX_TEXT_CHARS};
use serde::Serialize;
use server::Server;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

/// Where the page is served unless another address is given.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:8642";

/// What the page is about, and who may do what.
pub struct ViewConfig {
    /// Where to listen; port 0: any free one.
    pub address: SocketAddr,
    /// Viewers may ask and cancel on an address that is not loopback.
    pub control: bool,
    /// What is told to every viewer first.
    pub about: About,
    /// Shows drives while they are imagined, where the model's latents can be decoded at any time.
    pub decoder: Option<LatentDecoder>,
}

/// What is told to every viewer first.
#[derive(Clone, Debug, Default, Serialize)]
pub struct About {
    /// The robot's name.
    pub robot: String,
    /// The model's name.
    pub model: String,
    /// Words that the model knows; empty: any.
    pub words: Vec<String>,
    /// Frames at the end of an imagined drive that show the box.
    pub boxed_frames: usize,
    /// Pixels across the model's pictures, in which a box's edges are; 0 where that is not known.
    pub width: usize,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The address is taken, or not of this machine.
    #[error("cannot listen on {address}: {source}; choose another address with {option}=ADDR")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The option that chooses the address.
        option: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The system gave no random numbers for a token.
    #[error("cannot make a token: {0}")]
    Token(#[source] std::io::Error),
    /// The system gave no thread.
    #[error("cannot start the {0} thread: {1}")]
    Thread(&'static str, #[source] std::io::Error),
}

/// What a viewer wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Go there.
    Ask(Goal),
    /// Stop the goal in work.
    Cancel,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Too many wait.
    #[error("busy: too many requests are waiting; ask again")]
    Busy,
    /// Nobody takes requests yet, or any more.
    #[error("nothing can be asked now: the runtime is starting, or ending")]
    Closed,
}

/// Takes requests; must not block.
pub type Handler = Box<dyn Fn(Request) -> Result<(), RequestError> + Send + Sync>;

/// Hands requests to a node of this process.
pub fn to_node(requester: Requester) -> Handler {
    Box::new(move |request| {
        let handed = match request {
            Request::Ask(goal) => requester.ask(goal),
            Request::Cancel => requester.cancel(String::new()),
        };
        handed.map_err(|_busy| RequestError::Busy)
    })
}

/// A page that is being served. Dropping it ends that.
pub struct View {
    hub: Arc<Hub>,
    tap: Arc<Tap>,
    handler: Arc<OnceLock<Handler>>,
    address: SocketAddr,
    url: String,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl View {
    /// Begins to serve the page.
    ///
    /// # Errors
    /// [`ViewError`].
    pub fn start(config: ViewConfig) -> Result<Self, ViewError> {
        let ViewConfig { address, control, about, decoder } = config;
        let (listener, address) = bind(address, "--view")?;
        let gate = Gate::new(address, &[])?;
        let (url, may_ask) = (gate.url("http", address), gate.is_loopback() || control);

        let hub = Arc::new(Hub::default());
        hub.put(Slot::Hello, hello(&about, may_ask));
        let tap = Arc::new(Tap::new(hub.clone(), decoder.is_some()));
        let past = story::Past::default();
        let handler = Arc::new(OnceLock::new());
        let stop = Arc::new(AtomicBool::new(false));
        let server = Server {
            hub: hub.clone(),
            past: past.clone(),
            handler: handler.clone(),
            gate,
            may_ask,
            stop: stop.clone(),
        };
        let story = story::Story::new(hub.clone(), tap.clone(), decoder, past);
        let mut threads = Vec::new();
        let mut spawn = |name: &'static str, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(body);
            threads.push(thread.map_err(|e| ViewError::Thread(name, e))?);
            Ok::<(), ViewError>(())
        };
        spawn("view", Box::new(move || story.run()))?;
        let stopped = stop.clone();
        spawn(
            "page",
            Box::new(move || {
                http::listen(
                    &listener,
                    &stopped,
                    Arc::new(move |stream: &mut TcpStream| server.connection(stream)),
                )
            }),
        )?;
        Ok(Self { hub, tap, handler, address, url, stop, threads })
    }

    /// Where the page hears of the robot: to be handed to the node's observer.
    pub fn tap(&self) -> Arc<Tap> {
        self.tap.clone()
    }

    /// Who takes requests from now on; the first one counts.
    pub fn handle_requests(&self, handler: Handler) {
        // A second handler would have nothing to do.
        let _ = self.handler.set(handler);
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The page's address, with the token where one is needed.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Viewers so far.
    pub fn counts(&self) -> ViewerCounts {
        self.hub.counts()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.tap.close();
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the page panicked");
            }
        }
    }
}

/// Listens, without waiting for connections.
fn bind(address: SocketAddr, option: &'static str) -> Result<(TcpListener, SocketAddr), ViewError> {
    let failed = |source| ViewError::Listen { address, option, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// What is told first.
fn hello(about: &About, may_ask: bool) -> Payload {
    let hello = serde_json::json!({"kind": "hello", "about": about, "control": may_ask,
                                   "version": env!("CARGO_PKG_VERSION"), "goal_chars_max": MAX_TEXT_CHARS});
    Payload::Document(hello.to_string().into())
}

/// 128 random bits of the system.
fn new_token() -> Result<String, ViewError> {
    let mut bytes = [0; 16];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    random.map_err(ViewError::Token)?;
    Ok(hex(&bytes))
}
