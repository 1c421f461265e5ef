//! Our side of the wire for `tests/python/rmw_peer.py`: gives back every PoseStamped and Image that it gets, decoded and
//! encoded again, and checks attachment and sender of each. Prints `ready ENDPOINT`; ends with `ok ...` and status 0 when
//! COUNT of both have come.
//!
//! `ros_peer [--count COUNT] [--seconds N] [--distro humble|jazzy]`

use mindseye_bridge::msg::{Image, PoseStamped, RosType};
use mindseye_bridge::ros::{
    Attachment, Distro, History, Publisher, Qos, QueuePolicy, RosConfig, RosSession, SampleInfo, Subscriber,
};
use std::error::Error;
use std::time::{Duration, Instant};

type Failure = Box<dyn Error>;

/// One topic in and one out.
struct Echo<T: RosType> {
    from: Subscriber<T>,
    to: Publisher<T>,
    count: i64,
    /// Sequence number of the first message; rmw_zenoh says 1, others begin with 0.
    first: i64,
    distro: Distro,
}

impl<T: RosType> Echo<T> {
    fn new(session: &RosSession, name: &str, distro: Distro) -> Result<Self, Failure> {
        let from =
            session.subscriber(&format!("/theirs/{name}"), &Qos::default(), QueuePolicy::KeepLast(64))?;
        // Waits instead of dropping, so that a busy machine loses nothing.
        let lossless = Qos { history: History::KeepAll, ..Qos::default() };
        let to = session.publisher(&format!("/ours/{name}"), &lossless)?;
        Ok(Self { from, to, count: 0, first: 0, distro })
    }

    fn step(&mut self, session: &RosSession) -> Result<(), Failure> {
        let Some(got) = self.from.recv_timeout(Duration::from_millis(10))? else { return Ok(()) };
        self.count += 1;
        self.check(session, &got.info)?;
        self.to.publish(&got.message)?;
        Ok(())
    }

    /// The attachment counts by ones, and its sender is a publisher of the graph with our hash of the type.
    fn check(&mut self, session: &RosSession, info: &SampleInfo) -> Result<(), Failure> {
        let topic = self.from.raw().topic();
        let Some(Attachment { sequence, gid, .. }) = info.attachment else {
            return Err(format!("{topic}: a message without an attachment").into());
        };
        if self.count == 1 {
            self.first = sequence;
        }
        if sequence != self.first + self.count - 1 || !(0..=1).contains(&self.first) {
            return Err(format!("{topic}: message {} has sequence {sequence}", self.count).into());
        }
        let graph = session.graph().ok_or("no graph")?;
        let known = graph.publishers_of(topic);
        if !known.iter().any(|p| p.hash == self.distro.hash(T::HASH)) {
            return Err(format!("{topic}: no publisher with our hash in the graph: {known:?}").into());
        }
        if !graph.entities().iter().any(|e| e.gid == gid) {
            // Told, not refused: this implementation draws its GIDs at random.
            if self.count == 1 {
                println!("note: the GID of {topic} is not the digest of its token");
            }
        }
        Ok(())
    }
}

fn main() -> Result<(), Failure> {
    let (mut count, mut seconds, mut distro) = (20, 60.0f64, Distro::Jazzy);
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or("an option lacks its value")?;
        match name.as_str() {
            "--count" => count = value.parse()?,
            "--seconds" => seconds = value.parse()?,
            "--distro" if value == "humble" => distro = Distro::Humble,
            "--distro" if value == "jazzy" => {}
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let mut config = RosConfig::in_process("ros_peer");
    config.zenoh.listen = Some(vec![endpoint.clone()]);
    config.distro = distro;
    let session = RosSession::open(&config)?;
    let mut poses = Echo::<PoseStamped>::new(&session, "pose", distro)?;
    let mut images = Echo::<Image>::new(&session, "image", distro)?;
    println!("ready {endpoint}");
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    while poses.count < count || images.count < count {
        if Instant::now() > until {
            let got = format!("{} poses and {} images", poses.count, images.count);
            return Err(format!("{got} within {seconds} s, {count} of each were wanted").into());
        }
        poses.step(&session)?;
        images.step(&session)?;
    }
    // The last ones are still on their way.
    std::thread::sleep(Duration::from_secs(2));
    println!("ok {count} PoseStamped and {count} Image came in and went back");
    Ok(())
}
