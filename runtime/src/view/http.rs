//! HTTP/1.1 and WebSocket connections, as far as the page and Foxglove need them: one thread for each connection, of which
//! there are few. Who gets in is decided here.

use super::websocket::{Incoming, Received, accept_key, ping_frame};
use super::{ViewError, new_token};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A viewer gets new contents this often at most.
const PERIOD: Duration = Duration::from_millis(100);
/// A viewer that takes longer for one content is let go of.
const PATIENCE: Duration = Duration::from_secs(10);
/// A request's head must have come within this.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// A viewer of whom nothing was heard for so long is asked whether it is there, and after three times as long let go of.
const SILENCE: Duration = Duration::from_secs(20);
/// What a client still sends after an answer is read for so long at most: closing on it would destroy the answer.
const LINGER: Duration = Duration::from_millis(500);
/// Largest head of a request, bytes.
const HEAD_MAX: usize = 16 << 10;
/// Connections at a time, viewers among them.
const CONNECTIONS_MAX: usize = 64;
/// Holds the token after the first page.
const COOKIE: &str = "mindseye_token";

/// For every answer: nothing from elsewhere, in no frame of another page, kept by nobody.
const HEADERS: &str = "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n\
     X-Content-Type-Options: nosniff\r\n\
     X-Frame-Options: DENY\r\n\
     Referrer-Policy: no-referrer\r\n\
     Cache-Control: no-store\r\n\
     Connection: close\r\n";

/// The head of a request.
pub(super) struct Head {
    pub method: String,
    pub path: String,
    query: String,
    headers: Vec<(String, String)>,
}

impl Head {
    /// `None`: not HTTP.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if !version.starts_with("HTTP/1.") || words.next().is_some() || !target.starts_with('/') {
            return None;
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        let headers: Vec<(String, String)> =
            lines.take_while(|line| !line.is_empty()).map(header).collect::<Option<_>>()?;
        // What decides who gets in must be said once.
        let once = |wanted: &str| headers.iter().filter(|(name, _)| name == wanted).count() <= 1;
        if !(once("host") && once("origin")) {
            return None;
        }
        Some(Self { method: method.into(), path: path.into(), query: query.into(), headers })
    }

    /// The first header of this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The token in the address.
    pub fn token(&self) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix("token="))
    }

    /// Whether the request comes from a page of this server, from one of `others`, or from no page at all.
    fn is_from(&self, others: &[&str]) -> bool {
        let Some(origin) = self.get("origin") else { return true };
        if others.contains(&origin) {
            return true;
        }
        let host = self.get("host").unwrap_or_default();
        origin.strip_prefix("http://").is_some_and(|authority| authority.eq_ignore_ascii_case(host))
    }
}

/// Who gets in.
pub(super) struct Gate {
    token: Option<String>,
    is_loopback: bool,
    origins: &'static [&'static str],
}

/// Status and reason of a refusal.
type Refusal = (&'static str, &'static str);

impl Gate {
    /// On a loopback address everybody of this machine, elsewhere who has the token that is made here; of pages the
    /// server's own and those of `origins`.
    ///
    /// # Errors
    /// [`ViewError::Token`].
    pub fn new(address: SocketAddr, origins: &'static [&'static str]) -> Result<Self, ViewError> {
        let is_loopback = address.ip().is_loopback();
        Ok(Self { token: (!is_loopback).then(new_token).transpose()?, is_loopback, origins })
    }

    pub fn is_loopback(&self) -> bool {
        self.is_loopback
    }

    /// The address to go to, with the token where one is needed.
    pub fn url(&self, scheme: &str, address: SocketAddr) -> String {
        match &self.token {
            None => format!("{scheme}://{address}/"),
            Some(token) => format!("{scheme}://{address}/?token={token}"),
        }
    }

    /// Why a request gets nothing.
    pub fn admits(&self, head: &Head) -> Result<(), Refusal> {
        if self.is_loopback && !is_local_name(head.get("host").unwrap_or_default()) {
            return Err(("403 Forbidden", "this is served to this machine only, under its own names"));
        }
        if !head.is_from(self.origins) {
            return Err(("403 Forbidden", "pages of other origins get nothing here"));
        }
        let cookie =
            || head.get("cookie")?.split(';').find_map(|c| c.trim().strip_prefix(COOKIE)?.strip_prefix('='));
        let has_token = |token: &String| head.token().or_else(cookie).is_some_and(|given| same(given, token));
        if !self.token.as_ref().is_none_or(has_token) {
            return Err((
                "401 Unauthorized",
                "wrong or missing token: use the address that was printed at the start",
            ));
        }
        if head.method != "GET" {
            return Err(("405 Method Not Allowed", "only GET is known"));
        }
        Ok(())
    }

    /// The header that keeps the token of an address for the page's other requests.
    pub fn cookie(&self, head: &Head) -> String {
        match &self.token {
            Some(token) if head.token().is_some() => {
                format!("Set-Cookie: {COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/\r\n")
            }
            _ => String::new(),
        }
    }
}

/// Compares without telling by the time taken where two texts differ.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

/// Whether a host's name, with or without a port, is this machine's own.
fn is_local_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Reads the head of a request, and what came after it; `None` when it does not come in time, is too long, or is not
/// HTTP.
pub(super) fn read_head(stream: &mut TcpStream) -> Option<(Head, Vec<u8>)> {
    let until = Instant::now() + HEAD_WITHIN;
    let (mut bytes, mut piece) = (Vec::new(), [0; 1024]);
    loop {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        stream.set_read_timeout(Some(left)).ok()?;
        let read = stream.read(&mut piece).ok().filter(|n| *n > 0)?;
        // The end may lie across two pieces.
        let looked_at = bytes.len().saturating_sub(3);
        bytes.extend_from_slice(&piece[..read]);
        if let Some(at) = bytes[looked_at..].windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = bytes.split_off(looked_at + at + 4);
            let head = bytes.get(..bytes.len() - 2)?;
            return Some((Head::parse(std::str::from_utf8(head).ok()?)?, rest));
        }
        if bytes.len() > HEAD_MAX {
            return None;
        }
    }
}

/// Sends all of it within [`PATIENCE`], however slowly the other side takes it.
pub(super) fn send(stream: &mut TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends a connection so that what was sent last arrives.
fn part(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let (until, mut piece) = (Instant::now() + LINGER, [0; 4096]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        if stream.read(&mut piece)? == 0 {
            return Ok(());
        }
    }
}

pub(super) fn respond(
    stream: &mut TcpStream,
    status: &str,
    kind: &str,
    more: &str,
    body: &str,
) -> std::io::Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{HEADERS}{more}\r\n"
    );
    send(stream, head.as_bytes())?;
    send(stream, body.as_bytes())
}

pub(super) fn refuse(stream: &mut TcpStream, status: &str, why: &str) -> std::io::Result<()> {
    respond(stream, status, "text/plain; charset=utf-8", "", &format!("{why}\n"))
}

/// A connection's place; given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection.
pub(super) type Connection = dyn Fn(&mut TcpStream) -> std::io::Result<()> + Send + Sync;

/// Serves connections until it is told to stop, each on a thread of its own.
pub(super) fn listen(listener: &TcpListener, stop: &AtomicBool, each: Arc<Connection>) {
    let connections = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::debug!(%error, "a connection failed");
                }
                std::thread::sleep(PERIOD / 5);
                continue;
            }
        };
        let more = |n: usize| (n < CONNECTIONS_MAX).then_some(n + 1);
        if stream.set_nonblocking(false).is_err() {
            continue;
        }
        if connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            // Whoever is refused may be gone already.
            let _ = refuse(&mut stream, "503 Service Unavailable", "too many connections");
            continue;
        }
        let (each, place) = (each.clone(), Place(connections.clone()));
        let spawned = std::thread::Builder::new().name("viewer".into()).spawn(move || {
            let _place = place;
            if let Err(error) = each(&mut stream).and_then(|()| part(&mut stream)) {
                tracing::debug!(%error, "a viewer is gone");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a viewer");
        }
    }
}

/// Whether a request asks for a WebSocket as it is spoken here; what it is answered with.
pub(super) fn websocket_answer(head: &Head, protocol: Option<&str>) -> Option<String> {
    let is_websocket = head.get("upgrade").is_some_and(|u| u.eq_ignore_ascii_case("websocket"));
    let key = head.get("sec-websocket-key").filter(|_| is_websocket)?;
    let is_key = STANDARD.decode(key).is_ok_and(|bytes| bytes.len() == 16);
    if !is_key || head.get("sec-websocket-version") != Some("13") {
        return None;
    }
    let accept = accept_key(key);
    let protocol = protocol.map(|p| format!("Sec-WebSocket-Protocol: {p}\r\n")).unwrap_or_default();
    Some(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{protocol}\r\n"
    ))
}

/// Serves one viewer of a WebSocket until it goes, is too slow, or is to be let go of: sends the frames that `due` gives
/// now and then, and what `hear` answers to messages. `rest` came with the request.
pub(super) fn converse(
    stream: &mut TcpStream,
    rest: &[u8],
    stop: &AtomicBool,
    due: &mut dyn FnMut() -> Vec<Vec<u8>>,
    hear: &mut dyn FnMut(Received) -> Option<Vec<u8>>,
) -> std::io::Result<()> {
    let (mut incoming, mut bytes) = (Incoming::default(), [0; 4096]);
    incoming.push(rest);
    let mut next = Instant::now();
    let (mut heard, mut asked) = (next, next);
    while !stop.load(Ordering::Relaxed) {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            next = Instant::now() + PERIOD;
            for frame in due() {
                send(stream, &frame)?;
            }
            if heard.elapsed() > 3 * SILENCE {
                return Err(ErrorKind::TimedOut.into());
            }
            if heard.elapsed() > SILENCE && asked.elapsed() > SILENCE {
                asked = Instant::now();
                send(stream, &ping_frame())?;
            }
            continue;
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                heard = Instant::now();
                incoming.push(&bytes[..n]);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error),
        }
        while let Some(received) = incoming.next() {
            match received {
                Received::Pong(frame) => send(stream, &frame)?,
                Received::Alive => {}
                Received::Close(frame) => return send(stream, &frame),
                message => {
                    if let Some(frame) = hear(message) {
                        send(stream, &frame)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["localhost", "LOCALHOST:8642", "127.0.0.1:80", "127.3.4.5", "[::1]:8642", "[::1]"] {
            assert!(is_local_name(host), "{host}");
        }
        for host in
            ["", "evil.example:8642", "127.0.0.1.evil.example", "10.0.0.1:8642", "[::2]:1", "localhost.evil"]
        {
            assert!(!is_local_name(host), "{host}");
        }
    }

    #[test]
    fn only_pages_of_this_server_get_in() {
        let of = |origin: &str| {
            let text = format!("GET /live HTTP/1.1\r\nHost: 127.0.0.1:8642\r\n{origin}\r\n");
            Head::parse(&text).unwrap().is_from(&["https://friend.example"])
        };
        assert!(of("Origin: https://friend.example\r\n") && !of("Origin: http://friend.example\r\n"));
        assert!(of(""));
        assert!(of("Origin: http://127.0.0.1:8642\r\n"));
        for origin in
            ["null", "http://127.0.0.1:9", "http://evil.example", "https://127.0.0.1:8642", "file://", ""]
        {
            assert!(!of(&format!("ORIGIN: {origin}\r\n")), "{origin}");
        }
    }

    #[test]
    fn heads_are_read_or_refused() {
        let head =
            Head::parse("GET /goal/3?x=1&token=abcd HTTP/1.1\r\nHost:  h \r\nCookie: a=b\r\n").unwrap();
        assert_eq!(
            (head.path.as_str(), head.token(), head.get("host")),
            ("/goal/3", Some("abcd"), Some("h"))
        );
        for text in [
            "",
            "GET",
            "GET / HTTP/2\r\n",
            "GET http://x/ HTTP/1.1\r\n",
            "GET / x HTTP/1.1\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n",
            "GET / HTTP/1.1\r\nHost: localhost\r\nhost: evil.example\r\n",
            "GET / HTTP/1.1\r\nOrigin: http://a\r\nOrigin: http://b\r\n",
            "\u{0}\u{1}",
        ] {
            assert!(Head::parse(text).is_none(), "{text:?}");
        }
        assert!(same("abcd", "abcd") && !same("abcd", "abce") && !same("abc", "abcd") && !same("", "a"));
    }
}
