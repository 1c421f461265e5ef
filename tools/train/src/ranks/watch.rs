//! Where ranks meet, and how they notice that one is lost: every rank holds a TCP connection to the first, over which each
//! side gives a sign of life. The first one tells the others whom it has lost.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mindseye_base::sync::lock;

use super::{Place, RankError};

const MAGIC: [u8; 4] = *b"mrk1";
/// Signs: of life, of an orderly end, and that a rank (four bytes) is lost.
const ALIVE: u8 = b'h';
const END: u8 = b'e';
const LOST: u8 = b'x';

struct Shared {
    lost: AtomicBool,
    ended: AtomicBool,
    who: Mutex<Option<usize>>,
    told: Condvar,
    peers: Mutex<Vec<(usize, TcpStream)>>,
    abort: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl Shared {
    fn lose(&self, rank: usize) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        {
            let mut who = lock(&self.who);
            if who.is_some() {
                return;
            }
            *who = Some(rank);
        }
        self.lost.store(true, Ordering::Relaxed);
        self.told.notify_all();
        let sign = [&[LOST][..], &(rank as u32).to_le_bytes()].concat();
        for (_, stream) in lock(&self.peers).iter_mut().filter(|(peer, _)| *peer != rank) {
            // One that does not hear it loses us.
            let _ = stream.write_all(&sign);
        }
        if let Some(abort) = lock(&self.abort).as_ref() {
            abort();
        }
    }

    /// Reads the signs of a peer until it ends.
    fn listen(&self, peer: usize, mut stream: TcpStream) {
        loop {
            let (mut sign, mut rank) = ([0], [0; 4]);
            match stream.read_exact(&mut sign).map(|()| sign[0]) {
                Ok(ALIVE) => {}
                Ok(END) => return,
                Ok(LOST) => {
                    let who =
                        stream.read_exact(&mut rank).map_or(peer, |()| u32::from_le_bytes(rank) as usize);
                    return self.lose(who);
                }
                Ok(_) | Err(_) => return self.lose(peer),
            }
        }
    }

    /// Gives signs of life until the end.
    fn beat(&self, every: Duration) {
        while !self.ended.load(Ordering::Relaxed) {
            for (_, stream) in lock(&self.peers).iter_mut() {
                // Who cannot be written to is noticed by reading.
                let _ = stream.write_all(&[ALIVE]);
            }
            drop(self.told.wait_timeout(lock(&self.who), every));
        }
    }
}

/// This rank's view of the others.
pub(super) struct Watch {
    shared: Arc<Shared>,
}

/// A first connection: the peer's rank and number of ranks; none of a process that speaks of something else.
fn hello(stream: &mut TcpStream) -> Option<(usize, usize)> {
    let mut said = [0; 12];
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.read_exact(&mut said).ok()?;
    let number =
        |at: usize| u32::from_le_bytes([said[at], said[at + 1], said[at + 2], said[at + 3]]) as usize;
    (said[..4] == MAGIC).then(|| (number(4), number(8)))
}

/// Rank 0: waits for the others and gives them the identity.
fn receive(place: &Place, identity: &[u8]) -> Result<Vec<(usize, TcpStream)>, RankError> {
    let failed = |source| RankError::Meet { rank: place.rank, address: place.address.clone(), source };
    let local = place.address.to_socket_addrs().map_err(failed)?.next();
    // A name of this machine need not be an address of it.
    let (port, loopback) = local.map_or((0, false), |a| (a.port(), a.ip().is_loopback()));
    let listener =
        TcpListener::bind((if loopback { "127.0.0.1" } else { "0.0.0.0" }, port)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let began = Instant::now();
    let mut peers: Vec<(usize, TcpStream)> = Vec::new();
    while peers.len() + 1 < place.ranks {
        if began.elapsed() > place.patience.meet {
            let missing = (1..place.ranks).filter(|r| !peers.iter().any(|(p, _)| p == r)).collect();
            return Err(RankError::Absent { missing, seconds: place.patience.meet.as_secs_f64() });
        }
        match listener.accept() {
            Ok((mut stream, _)) => {
                let Some((rank, ranks)) = hello(&mut stream) else { continue };
                let known = rank == 0 || rank >= place.ranks || peers.iter().any(|(p, _)| *p == rank);
                if ranks != place.ranks || known {
                    return Err(RankError::Stranger { rank, ranks, wanted: place.ranks });
                }
                peers.push((rank, stream));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => return Err(failed(e)),
        }
    }
    for (_, stream) in &mut peers {
        let all = [&(identity.len() as u32).to_le_bytes()[..], identity].concat();
        stream.write_all(&all).map_err(failed)?;
    }
    Ok(peers)
}

/// Any other rank: reaches the first one and gets the identity.
fn reach(place: &Place) -> Result<(TcpStream, Vec<u8>), RankError> {
    let failed = |source| RankError::Meet { rank: place.rank, address: place.address.clone(), source };
    let began = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(&place.address) {
            Ok(stream) => break stream,
            Err(e) if began.elapsed() > place.patience.meet => return Err(failed(e)),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let said = [&MAGIC[..], &(place.rank as u32).to_le_bytes(), &(place.ranks as u32).to_le_bytes()].concat();
    stream.write_all(&said).map_err(failed)?;
    stream.set_read_timeout(Some(place.patience.meet)).map_err(failed)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).map_err(failed)?;
    let mut identity = vec![0; (u32::from_le_bytes(length) as usize).min(1 << 16)];
    stream.read_exact(&mut identity).map_err(failed)?;
    Ok((stream, identity))
}

impl Watch {
    /// Meets the others; `identity` is rank 0's, and all get it.
    pub(super) fn meet(place: &Place, identity: Option<Vec<u8>>) -> Result<(Self, Vec<u8>), RankError> {
        let (peers, identity) = match identity {
            Some(identity) => (receive(place, &identity)?, identity),
            None => {
                let (stream, identity) = reach(place)?;
                (vec![(0, stream)], identity)
            }
        };
        let failed = |source| RankError::Meet { rank: place.rank, address: place.address.clone(), source };
        let mut ears = Vec::new();
        for (peer, stream) in &peers {
            stream.set_nodelay(true).map_err(failed)?;
            stream.set_read_timeout(Some(place.patience.silence)).map_err(failed)?;
            stream.set_write_timeout(Some(place.patience.beat)).map_err(failed)?;
            ears.push((*peer, stream.try_clone().map_err(failed)?));
        }
        let shared = Arc::new(Shared {
            lost: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            who: Mutex::new(None),
            told: Condvar::new(),
            peers: Mutex::new(peers),
            abort: Mutex::new(None),
        });
        for (peer, stream) in ears {
            let shared = shared.clone();
            std::thread::spawn(move || shared.listen(peer, stream));
        }
        let (beating, every) = (shared.clone(), place.patience.beat);
        std::thread::spawn(move || beating.beat(every));
        Ok((Self { shared }, identity))
    }

    /// What is done when a rank is lost.
    pub(super) fn on_loss(&self, abort: Box<dyn Fn() + Send>) {
        *lock(&self.shared.abort) = Some(abort);
        if self.lost().load(Ordering::Relaxed)
            && let Some(abort) = lock(&self.shared.abort).as_ref()
        {
            abort();
        }
    }

    pub(super) fn lost(&self) -> &AtomicBool {
        &self.shared.lost
    }

    /// Who is lost, if that is known within a time.
    pub(super) fn who(&self, within: Duration) -> Option<usize> {
        let who = lock(&self.shared.who);
        let waited = self.shared.told.wait_timeout_while(who, within, |who| who.is_none());
        *waited.map_or_else(|e| e.into_inner().0, |(who, _)| who)
    }

    /// Says goodbye.
    pub(super) fn leave(&self) {
        if !self.shared.ended.swap(true, Ordering::Relaxed) {
            for (_, stream) in lock(&self.shared.peers).iter_mut() {
                let _ = stream.write_all(&[END]);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.told.notify_all();
        for (_, stream) in lock(&self.shared.peers).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
