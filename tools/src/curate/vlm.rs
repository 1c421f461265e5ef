//! Asking a vision-language model behind an OpenAI-compatible endpoint: a small HTTP/1.1 client with limits, the
//! questions, and the reading of answers that may be nonsense.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest reply that is read (bytes).
const REPLY_MAX: usize = 4 << 20;
/// Longest header of a reply (bytes).
const HEAD_MAX: usize = 64 << 10;
/// Longest pause before a request is sent again.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why the endpoint gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VlmError {
    /// The address cannot be used.
    #[error("endpoint {url:?}: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No connection, or it broke.
    #[error("endpoint {host}: {source}")]
    Io {
        /// Host and port.
        host: String,
        /// What happened.
        source: io::Error,
    },
    /// Nothing, or not all, came in time.
    #[error("endpoint {host}: no answer within {secs} s")]
    Timeout {
        /// Host and port.
        host: String,
        /// The limit (s).
        secs: f64,
    },
    /// The server refused.
    #[error("endpoint {host}: status {status}: {start}")]
    Status {
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
        /// Start of what it said.
        start: String,
    },
    /// Not HTTP, too long, or not a chat completion.
    #[error("endpoint {host}: {source}")]
    Reply {
        /// Host and port.
        host: String,
        /// What is wrong.
        source: ReplyError,
    },
}

/// What is wrong with a reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
    /// The header does not end.
    #[error("header too long")]
    Header,
    /// Another protocol.
    #[error("not HTTP/1: {0:?}")]
    NotHttp(String),
    /// Its length is no number.
    #[error("content-length {0:?}")]
    Length(String),
    /// The length of a chunk is no number.
    #[error("chunk size {0:?}")]
    ChunkSize(String),
    /// Longer than is read.
    #[error("reply of {0} bytes; the limit is {REPLY_MAX}")]
    TooLong(usize),
    /// The connection was closed before all had come.
    #[error("connection closed in the middle of the reply")]
    Cut,
    /// The body is no JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The body is no chat completion.
    #[error("no choices[0].message.content in the reply")]
    NoContent,
}

impl VlmError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn passing(&self) -> bool {
        match self {
            Self::Url { .. } => false,
            Self::Io { .. } | Self::Timeout { .. } | Self::Reply { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
        }
    }

    /// Whether every other request would be refused as well: a wrong address, key or model.
    #[must_use]
    pub fn lasting(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::Status { status: 401 | 403 | 404, .. })
    }
}

/// A chat-completions endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    path: String,
    model: String,
    key: Option<String>,
    timeout: Duration,
    retries: usize,
}

impl Endpoint {
    /// An endpoint such as `http://127.0.0.1:8000/v1`. `timeout` bounds one whole request, `retries` how often a
    /// request that failed is sent again.
    ///
    /// # Errors
    /// Not an `http://` address.
    pub fn new(url: &str, model: &str, timeout: Duration, retries: usize) -> Result<Self, VlmError> {
        let bad = |reason| VlmError::Url { url: url.to_owned(), reason };
        let Some(rest) = url.strip_prefix("http://") else {
            return Err(bad(if url.starts_with("https://") {
                "https is not spoken; put a local proxy in front and give its http:// address"
            } else {
                "wanted http://host:port/v1"
            }));
        };
        if url.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(bad("spaces are not allowed"));
        }
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        if host.is_empty() || host.starts_with(':') {
            return Err(bad("no host"));
        }
        let port_given = host.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok());
        let host = if port_given { host.to_owned() } else { format!("{host}:80") };
        let path = path.trim_end_matches('/');
        let slash = if path.is_empty() { "" } else { "/" };
        Ok(Self {
            host,
            path: format!("{slash}{path}/chat/completions"),
            model: model.to_owned(),
            key: None,
            timeout,
            retries,
        })
    }

    /// With a bearer token.
    #[must_use]
    pub fn with_key(mut self, key: Option<String>) -> Self {
        self.key = key.filter(|k| !k.is_empty() && !k.chars().any(char::is_control));
        self
    }

    /// Asks a question about pictures (PNG bytes) and returns the text of the answer.
    ///
    /// # Errors
    /// [`VlmError`] after the last retry.
    pub fn ask(&self, question: &str, pictures: &[Vec<u8>]) -> Result<String, VlmError> {
        let mut content = vec![json!({"type": "text", "text": question})];
        for picture in pictures {
            let url = format!("data:image/png;base64,{}", base64(picture));
            content.push(json!({"type": "image_url", "image_url": {"url": url}}));
        }
        let body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1024,
        })
        .to_string();
        let mut pause = Duration::from_millis(100);
        let mut tried = 0;
        loop {
            match self.post(&body) {
                Err(e) if e.passing() && tried < self.retries => {
                    tracing::debug!(error = %e, "asking again");
                    tried += 1;
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                done => return done,
            }
        }
    }

    fn post(&self, body: &str) -> Result<String, VlmError> {
        let until = Instant::now() + self.timeout;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                VlmError::Timeout { host: self.host.clone(), secs: self.timeout.as_secs_f64() }
            }
            _ => VlmError::Io { host: self.host.clone(), source },
        };
        let mut stream = self.connect(until).map_err(failed)?;
        let key = self.key.as_ref().map(|k| format!("Authorization: Bearer {k}\r\n")).unwrap_or_default();
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{key}\
             Accept: application/json\r\nConnection: close\r\n\r\n",
            self.path,
            self.host,
            body.len()
        );
        for mut rest in [head.as_bytes(), body.as_bytes()] {
            while !rest.is_empty() {
                stream.set_write_timeout(Some(left(until).map_err(failed)?)).map_err(failed)?;
                match stream.write(&rest[..rest.len().min(1 << 16)]).map_err(failed)? {
                    0 => return Err(failed(io::ErrorKind::WriteZero.into())),
                    n => rest = &rest[n..],
                }
            }
        }
        let wrong = |source: ReplyError| VlmError::Reply { host: self.host.clone(), source };
        let mut reply = Vec::new();
        let mut buffer = vec![0u8; 1 << 14];
        let mut whole = false;
        while !whole {
            stream.set_read_timeout(Some(left(until).map_err(failed)?)).map_err(failed)?;
            match stream.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => reply.extend_from_slice(&buffer[..n]),
            }
            if reply.len() > REPLY_MAX {
                return Err(wrong(ReplyError::TooLong(reply.len())));
            }
            whole = parse(&reply).map_err(wrong)?.is_some_and(|r| r.whole);
        }
        let parsed = parse(&reply).map_err(wrong)?.ok_or_else(|| wrong(ReplyError::Cut))?;
        if !(200..300).contains(&parsed.status) {
            let start: String = String::from_utf8_lossy(&parsed.body).chars().take(200).collect();
            let start = start.replace(|c: char| c.is_control(), " ");
            return Err(VlmError::Status { host: self.host.clone(), status: parsed.status, start });
        }
        if !parsed.whole && !parsed.until_close {
            return Err(wrong(ReplyError::Cut));
        }
        let document: Value = serde_json::from_slice(&parsed.body).map_err(|e| wrong(e.into()))?;
        match document.pointer("/choices/0/message/content") {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Array(parts)) => {
                Ok(parts.iter().filter_map(|p| p.get("text").and_then(Value::as_str)).collect())
            }
            _ => Err(wrong(ReplyError::NoContent)),
        }
    }

    fn connect(&self, until: Instant) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
        for address in self.host.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, left(until)?) {
                Ok(stream) => return Ok(stream),
                Err(e) => last = e,
            }
        }
        Err(last)
    }
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    status: u16,
    body: Vec<u8>,
    /// All that the header promised is there.
    whole: bool,
    /// The body ends when the connection does.
    until_close: bool,
}

/// What has come of a reply; none while the header is not complete.
fn parse(reply: &[u8]) -> Result<Option<Parsed>, ReplyError> {
    let Some(end) = reply.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if reply.len() > HEAD_MAX { Err(ReplyError::Header) } else { Ok(None) };
    };
    let head = String::from_utf8_lossy(&reply[..end]);
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first
        .strip_prefix("HTTP/1.")
        .and_then(|l| l.split(' ').nth(1))
        .and_then(|s| s.parse::<u16>().ok())
        .ok_or_else(|| ReplyError::NotHttp(first.chars().take(60).collect()))?;
    let (mut length, mut chunked) = (None, false);
    for (name, value) in lines.filter_map(|l| l.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse::<usize>().map_err(|_| ReplyError::Length(value.to_owned()))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.to_ascii_lowercase().contains("chunked");
        }
    }
    let rest = &reply[end + 4..];
    if (100..200).contains(&status) {
        return parse(rest);
    }
    if chunked {
        let (body, whole) = unchunk(rest)?;
        return Ok(Some(Parsed { status, body, whole, until_close: false }));
    }
    Ok(Some(match length {
        Some(n) if n > REPLY_MAX => return Err(ReplyError::TooLong(n)),
        Some(n) => Parsed {
            status,
            body: rest[..n.min(rest.len())].to_vec(),
            whole: rest.len() >= n,
            until_close: false,
        },
        None => Parsed { status, body: rest.to_vec(), whole: false, until_close: true },
    }))
}

fn unchunk(mut rest: &[u8]) -> Result<(Vec<u8>, bool), ReplyError> {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { return Ok((body, false)) };
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(|_| ReplyError::ChunkSize(size.to_owned()))?;
        if size > REPLY_MAX {
            return Err(ReplyError::TooLong(size));
        }
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok((body, true));
        }
        if rest.len() < size + 2 {
            body.extend_from_slice(&rest[..size.min(rest.len())]);
            return Ok((body, false));
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

/// RFC 4648 with padding.
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for k in 0..4 {
            if k <= chunk.len() {
                out.push(char::from(DIGITS[(word >> (18 - 6 * k)) as usize & 63]));
            } else {
                out.push('=');
            }
        }
    }
    out
}

/// Asks for objects with boxes in thousandths of the picture.
pub const DETECT: &str = "List the distinct, clearly visible objects in this picture that a person could be asked \
    to find (furniture, devices, plants, bags; not walls, floors or ceilings). Answer with a JSON array only, one \
    entry per object: {\"label\": a short phrase that tells it from the others, \"bbox_2d\": [x1, y1, x2, y2]}, \
    with coordinates from 0 to 1000 relative to the picture's width and height.";

/// Asks for the two parts of an instruction.
#[must_use]
pub fn caption_question(object: &str) -> String {
    format!(
        "These pictures are frames of one video, in order. In the last one, {object:?} is in the centre. Answer \
         with a JSON object only: {{\"scene\": a phrase that describes the place that the camera moves across, \
         \"object\": a phrase that tells this object from others there}}."
    )
}

/// An instruction in the form that the model is trained on (Video4Spatial, section 4.1).
#[must_use]
pub fn instruction(scene: &str, object: &str) -> String {
    let clean = |t: &str| t.trim().trim_end_matches('.').to_owned();
    format!(
        "The camera moves across {}. Finally, it focuses on {} in the center of the frame.",
        clean(scene),
        clean(object)
    )
}

/// An object that was seen: label, and box as shares of width and height.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    /// What it is.
    pub label: String,
    /// `[x0, y0, x1, y1]`, 0 to 1.
    pub area: [f64; 4],
}

/// The first JSON value in a text that starts with one of these characters.
fn embedded(text: &str, opening: &[char]) -> Option<Value> {
    text.match_indices(opening).take(64).find_map(|(at, _)| {
        serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>().next().and_then(Result::ok)
    })
}

/// Reads an answer to [`DETECT`]; none when it is nonsense. Entries that are no boxes are left out, unless that
/// leaves none of several.
#[must_use]
pub fn detections(answer: &str) -> Option<Vec<Detection>> {
    let value = embedded(answer, &['['])?;
    let entries = value.as_array()?;
    let good: Vec<Detection> = entries
        .iter()
        .take(256)
        .filter_map(|entry| {
            let label = phrase(entry.get("label")?)?;
            let v: Vec<f64> = entry
                .get("bbox_2d")
                .or_else(|| entry.get("bbox"))?
                .as_array()?
                .iter()
                .filter_map(Value::as_f64)
                .collect();
            let [x0, y0, x1, y1] = v[..] else { return None };
            let area = [x0, y0, x1, y1].map(|c| c / 1000.0);
            let inside = area.iter().all(|c| (-0.005..=1.005).contains(c));
            (inside && area[2] - area[0] > 1e-3 && area[3] - area[1] > 1e-3)
                .then(|| Detection { label, area: area.map(|c| c.clamp(0.0, 1.0)) })
        })
        .collect();
    (entries.is_empty() || !good.is_empty()).then_some(good)
}

/// A phrase of 1 to 300 characters on one line.
fn phrase(value: &Value) -> Option<String> {
    let text = value.as_str()?.split_whitespace().collect::<Vec<_>>().join(" ");
    (!text.is_empty() && text.chars().count() <= 300 && text.chars().any(char::is_alphabetic)).then_some(text)
}

/// What an answer to [`caption_question`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caption {
    /// Scene and object.
    Phrases(String, String),
    /// The right form with nothing in it.
    Empty,
    /// Something else.
    Nonsense,
}

/// Reads an answer to [`caption_question`].
#[must_use]
pub fn caption(answer: &str) -> Caption {
    if answer.trim().is_empty() {
        return Caption::Empty;
    }
    let Some(value) = embedded(answer, &['{']) else { return Caption::Nonsense };
    match (value.get("scene"), value.get("object")) {
        (Some(Value::String(s)), Some(Value::String(o))) if s.trim().is_empty() || o.trim().is_empty() => {
            Caption::Empty
        }
        (Some(s), Some(o)) => match (phrase(s), phrase(o)) {
            (Some(s), Some(o)) => Caption::Phrases(s, o),
            _ => Caption::Nonsense,
        },
        _ => Caption::Nonsense,
    }
}

/// The detection nearest to the picture's middle among those whose centre is within `ratio` of the half size:
/// `|x - W/2| <= ratio W/2` and `|y - H/2| <= ratio H/2`.
#[must_use]
pub fn centred(found: &[Detection], ratio: f64) -> Option<&Detection> {
    let off = |d: &Detection| {
        let (x, y) = ((d.area[0] + d.area[2]) - 1.0, (d.area[1] + d.area[3]) - 1.0);
        (x.abs(), y.abs())
    };
    found
        .iter()
        .filter(|d| off(d).0 <= ratio && off(d).1 <= ratio)
        .min_by(|a, b| off(a).0.hypot(off(a).1).total_cmp(&off(b).0.hypot(off(b).1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_vectors() {
        // RFC 4648, section 10.
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn replies() {
        let check = |reply: &str, wanted: Result<Option<(u16, &str, bool)>, ()>| {
            let got = parse(reply.as_bytes());
            match (got, wanted) {
                (Ok(None), Ok(None)) | (Err(_), Err(())) => {}
                (Ok(Some(p)), Ok(Some((status, body, whole)))) => {
                    assert_eq!(
                        (p.status, p.body.as_slice(), p.whole),
                        (status, body.as_bytes(), whole),
                        "{reply:?}"
                    );
                }
                (got, _) => panic!("{reply:?}: {got:?}"),
            }
        };
        check("HTTP/1.1 200 OK\r\n", Ok(None));
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", Ok(Some((200, "hi", true))));
        check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi", Ok(Some((200, "hi", false))));
        check("HTTP/1.0 503 no\r\n\r\nbusy", Ok(Some((503, "busy", false))));
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3;x=y\r\n yo\r\n0\r\n\r\n",
            Ok(Some((200, "hi yo", true))),
        );
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", Ok(Some((200, "hi", false))));
        check(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 OK\r\nContent-Length: 0\r\n\r\n",
            Ok(Some((204, "", true))),
        );
        check("SSH-2.0-x\r\n\r\n", Err(()));
        check("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", Err(()));
        check("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", Err(()));
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", Err(()));
    }

    #[test]
    fn addresses() {
        let new = |url| Endpoint::new(url, "m", Duration::from_secs(1), 0);
        for (url, host, path) in [
            ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", "/v1/chat/completions"),
            ("http://vlm/v1/", "vlm:80", "/v1/chat/completions"),
            ("http://vlm:1", "vlm:1", "/chat/completions"),
        ] {
            let e = new(url).unwrap();
            assert_eq!((e.host.as_str(), e.path.as_str()), (host, path));
        }
        for url in ["https://vlm/v1", "vlm:80", "http:///v1", "http://a b/", "http://a\r\nx: y/"] {
            assert!(new(url).is_err(), "{url:?}");
        }
    }

    #[test]
    fn answers() {
        let boxes = |text: &str| detections(text).map(|d| d.len());
        assert_eq!(boxes("```json\n[{\"label\":\"chair\",\"bbox_2d\":[400,400,600,700]}]\n```"), Some(1));
        assert_eq!(boxes("[]"), Some(0));
        assert_eq!(
            boxes("I see [a chair]. [{\"label\":\"x\",\"bbox_2d\":[1,2,300,400]},{\"label\":\"\"}]"),
            Some(1)
        );
        for nonsense in [
            "",
            "no objects",
            "{\"label\":\"chair\"}",
            "[{\"label\":\"chair\",\"bbox_2d\":[600,400,400,700]}]",
            "[{\"label\":\"chair\",\"bbox_2d\":[0,0,4000,700]}]",
            "[{\"label\":\"chair\",\"bbox_2d\":[0,0,null,700]}]",
            "[{\"label\":\"???\",\"bbox_2d\":[0,0,100,100]}]",
            "[1, 2",
        ] {
            assert_eq!(boxes(nonsense), None, "{nonsense:?}");
        }
        let given = |s: &str, o: &str| Caption::Phrases(s.to_owned(), o.to_owned());
        for (text, wanted) in [
            (
                "{\"scene\":\"an office\",\"object\":\"the red\\n chair\"}",
                given("an office", "the red chair"),
            ),
            ("Sure: {\"scene\":\"a\",\"object\":\"b\"}!", given("a", "b")),
            ("", Caption::Empty),
            ("{\"scene\":\"\",\"object\":\"chair\"}", Caption::Empty),
            ("{\"scene\":1,\"object\":\"chair\"}", Caption::Nonsense),
            ("a chair", Caption::Nonsense),
        ] {
            assert_eq!(caption(text), wanted, "{text:?}");
        }
        assert_eq!(
            instruction("a bright office.", "the red chair"),
            "The camera moves across a bright office. Finally, it focuses on the red chair in the center of the frame."
        );
    }

    #[test]
    fn centre() {
        let at =
            |x: f64, y: f64| Detection { label: format!("{x}"), area: [x - 0.1, y - 0.1, x + 0.1, y + 0.1] };
        let check = |found: &[Detection], ratio: f64, wanted: Option<usize>| {
            assert_eq!(centred(found, ratio), wanted.map(|k| &found[k]));
        };
        check(&[], 0.3, None);
        check(&[at(0.5, 0.5)], 0.0, Some(0));
        check(&[at(0.66, 0.5)], 0.3, None);
        check(&[at(0.64, 0.5), at(0.5, 0.45)], 0.3, Some(1));
        check(&[at(0.5, 0.2)], 0.6, Some(0));
    }
}
