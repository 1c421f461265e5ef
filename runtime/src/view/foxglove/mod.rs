//! The same as Foxglove's standard schemas, for who has that tool: in a file beside recordings, and live for its WebSocket.
//!
//! | topic | schema | what |
//! |---|---|---|
//! | `/mindseye/foxglove/camera` | `foxglove.CompressedImage` | what the camera sees, ten times a second at most |
//! | `/mindseye/foxglove/imagined` | `foxglove.CompressedImage` | the imagined drive, picture by picture |
//! | `/mindseye/foxglove/way` | `foxglove.PosesInFrame` | the way driven |
//! | `/mindseye/foxglove/imagined_way` | `foxglove.PosesInFrame` | the imagined way |
//! | `/mindseye/foxglove/goal` | `foxglove.PosesInFrame` | where to stand; no pose where none was given |
//! | `/mindseye/foxglove/scene` | `foxglove.SceneUpdate` | what the page's map shows |
//! | `/mindseye/foxglove/log` | `foxglove.Log` | goals, answers with their reasons, what left the memory, faults |
//!
//! Everything is made by a thread of its own out of a [`Tap`]; the robot's threads only copy. The wire is written here, as
//! the page's is: the `foxglove` crate would change the features of crates that Zenoh shares.

mod channels;
mod feed;
mod messages;
mod schema;
mod server;

pub use channels::Topic;
pub use schema::Kind;

use super::http::{Gate, listen};
use super::hub::{Hub, Seat};
use super::tap::Tap;
use super::{ViewError, bind};
use crate::record::RecordSender;
use channels::Channels;
use feed::Feed;
use server::{ORIGINS, Server};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Where Foxglove's clients look.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:8765";

/// Who gets the channels.
pub struct FoxgloveConfig {
    /// Where to listen; nowhere, when none.
    pub address: Option<SocketAddr>,
    /// Where to record.
    pub record: Option<RecordSender>,
    /// The frame that poses are in, unless an answer names another.
    pub odom_frame: String,
}

/// Channels that are being fed. Dropping it sends what waits, and ends that.
pub struct Foxglove {
    tap: Arc<Tap>,
    url: Option<String>,
    address: Option<SocketAddr>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// A recording looks all the time.
    _seat: Option<Seat>,
}

impl Foxglove {
    /// Begins to feed the channels.
    ///
    /// # Errors
    /// [`ViewError`].
    pub fn start(config: FoxgloveConfig) -> Result<Self, ViewError> {
        let FoxgloveConfig { address, record, odom_frame } = config;
        let hub = Arc::new(Hub::default());
        let seat = record.as_ref().and_then(|_| hub.enter());
        let tap = Arc::new(Tap::new(hub.clone(), false));
        let channels = Arc::new(Channels::default());
        let stop = Arc::new(AtomicBool::new(false));
        let feed = Feed::new(tap.clone(), channels.clone(), record, odom_frame);
        let mut foxglove =
            Self { tap, url: None, address: None, stop: stop.clone(), threads: Vec::new(), _seat: seat };
        if let Some(address) = address {
            let (listener, address) = bind(address, "--foxglove")?;
            let gate = Gate::new(address, ORIGINS)?;
            foxglove.url = Some(gate.url("ws", address));
            foxglove.address = Some(address);
            let server = Server { gate, hub, channels, stop: stop.clone() };
            foxglove.spawn("foxglove page", move || {
                listen(&listener, &stop, Arc::new(move |stream: &mut TcpStream| server.connection(stream)));
            })?;
        }
        foxglove.spawn("foxglove", move || feed.run())?;
        Ok(foxglove)
    }

    fn spawn(&mut self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<(), ViewError> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(body);
        self.threads.push(thread.map_err(|e| ViewError::Thread(name, e))?);
        Ok(())
    }

    /// Where the channels hear of the robot: to be handed to the node's observer.
    pub fn tap(&self) -> Arc<Tap> {
        self.tap.clone()
    }

    /// Where it listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// The address to connect to, with the token where one is needed.
    pub fn url(&self) -> Option<&str> {
        self.url.as_deref()
    }
}

impl Drop for Foxglove {
    fn drop(&mut self) {
        self.tap.close();
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the Foxglove channels panicked");
            }
        }
    }
}
