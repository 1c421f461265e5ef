//! Asking a vision-language model behind an OpenAI-compatible endpoint: one bounded HTTP request for each question, the
//! questions, and the reading of answers that may be nonsense.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

/// Longest reply that is read (bytes).
const REPLY_MAX: u64 = 4 << 20;
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
    /// No connection, it broke, its certificate is not trusted, or what came is not HTTP.
    #[error("endpoint {host}: {source}")]
    Connection {
        /// Host and port.
        host: String,
        /// What happened.
        source: Box<ureq::Error>,
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
    /// Not a chat completion.
    #[error("endpoint {host}: {source}")]
    Reply {
        /// Host and port.
        host: String,
        /// What is wrong.
        source: ReplyError,
    },
    /// A file of certificates cannot be used.
    #[error("certificates {path}: {source}")]
    Certificates {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// What is wrong with a reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
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
            Self::Url { .. } | Self::Certificates { .. } => false,
            Self::Connection { .. } | Self::Timeout { .. } | Self::Reply { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
        }
    }

    /// Whether every other request would be refused as well: a wrong address, key or model.
    #[must_use]
    pub fn lasting(&self) -> bool {
        matches!(
            self,
            Self::Url { .. } | Self::Certificates { .. } | Self::Status { status: 401 | 403 | 404, .. }
        )
    }
}

/// A chat-completions endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    url: String,
    model: String,
    key: Option<String>,
    timeout: Duration,
    retries: usize,
    agent: Agent,
}

impl Endpoint {
    /// An endpoint such as `http://127.0.0.1:8000/v1` or `https://models.example.org/v1`. `timeout` bounds one whole
    /// request, `retries` how often a request that failed is sent again. Whom https trusts is the operating system's
    /// choice, unless [`Self::with_certificates`] says otherwise.
    ///
    /// # Errors
    /// Not an `http://` or `https://` address.
    pub fn new(url: &str, model: &str, timeout: Duration, retries: usize) -> Result<Self, VlmError> {
        let bad = |reason| VlmError::Url { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|_| bad("not an address; wanted http(s)://host:port/v1"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad("wanted http(s)://host:port/v1"));
        }
        if uri.query().is_some() {
            return Err(bad("a query is not allowed"));
        }
        let host = uri.authority().map(|a| a.as_str().to_owned()).filter(|host| !host.starts_with(':'));
        Ok(Self {
            host: host.ok_or_else(|| bad("no host"))?,
            url: format!("{}/chat/completions", url.trim_end_matches('/')),
            model: model.to_owned(),
            key: None,
            timeout,
            retries,
            agent: agent(timeout, RootCerts::PlatformVerifier),
        })
    }

    /// With a bearer token.
    #[must_use]
    pub fn with_key(mut self, key: Option<String>) -> Self {
        self.key = key.filter(|k| !k.is_empty() && !k.chars().any(char::is_control));
        self
    }

    /// Trusts the certificates of this PEM text, read from `path`, and no others.
    ///
    /// # Errors
    /// No certificate in it.
    pub fn with_certificates(mut self, path: &str, pem: &[u8]) -> Result<Self, VlmError> {
        let bad = |source| VlmError::Certificates { path: path.to_owned(), source };
        let found = ureq::tls::parse_pem(pem)
            .filter_map(|item| match item {
                Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(Ok(certificate)),
                Ok(_) => None,
                Err(e) => Some(Err(e)),
            })
            .collect::<Result<Vec<Certificate<'static>>, _>>()
            .map_err(|e| bad(e.into()))?;
        if found.is_empty() {
            return Err(bad("no certificate in it".into()));
        }
        self.agent = agent(self.timeout, RootCerts::Specific(Arc::new(found)));
        Ok(self)
    }

    /// Asks a question about pictures (PNG bytes) and returns the text of the answer.
    ///
    /// # Errors
    /// [`VlmError`] after the last retry.
    pub fn ask(&self, question: &str, pictures: &[Vec<u8>]) -> Result<String, VlmError> {
        let mut content = vec![json!({"type": "text", "text": question})];
        for picture in pictures {
            let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(picture));
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
        let mut request = self.agent.post(&self.url).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut reply = request.send(body).map_err(|e| self.failed(e))?;
        let status = reply.status();
        let body =
            reply.body_mut().with_config().limit(REPLY_MAX).read_to_vec().map_err(|e| self.failed(e))?;
        if !status.is_success() {
            let start: String = String::from_utf8_lossy(&body).chars().take(200).collect();
            let start = start.replace(|c: char| c.is_control(), " ");
            return Err(VlmError::Status { host: self.host.clone(), status: status.as_u16(), start });
        }
        let wrong = |source| VlmError::Reply { host: self.host.clone(), source };
        let document: Value = serde_json::from_slice(&body).map_err(|e| wrong(e.into()))?;
        match document.pointer("/choices/0/message/content") {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Array(parts)) => {
                Ok(parts.iter().filter_map(|p| p.get("text").and_then(Value::as_str)).collect())
            }
            _ => Err(wrong(ReplyError::NoContent)),
        }
    }

    fn failed(&self, source: ureq::Error) -> VlmError {
        let host = self.host.clone();
        let late = match &source {
            ureq::Error::Timeout(_) => true,
            ureq::Error::Io(e) => matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock),
            _ => false,
        };
        if late {
            VlmError::Timeout { host, secs: self.timeout.as_secs_f64() }
        } else {
            VlmError::Connection { host, source: Box::new(source) }
        }
    }
}

/// Sends one request at a time on a connection of its own, follows no redirections (the token would go along) and knows
/// no proxies. ring signs and checks, as in Zenoh's TLS.
fn agent(timeout: Duration, trusted: RootCerts) -> Agent {
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(trusted)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_idle_connections(0)
        .proxy(None)
        .tls_config(tls)
        .build()
        .new_agent()
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
    fn addresses() {
        let new = |url| Endpoint::new(url, "m", Duration::from_secs(1), 0);
        for (url, host, whole) in [
            ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
            ("http://vlm/v1/", "vlm", "http://vlm/v1/chat/completions"),
            ("https://vlm/v1", "vlm", "https://vlm/v1/chat/completions"),
            ("http://vlm:1", "vlm:1", "http://vlm:1/chat/completions"),
        ] {
            let e = new(url).unwrap();
            assert_eq!((e.host.as_str(), e.url.as_str()), (host, whole));
        }
        for url in [
            "vlm:80",
            "ftp://vlm/v1",
            "http:///v1",
            "http://a b/",
            "http://a\r\nx: y/",
            "http://a/v1?k=1",
            "/v1",
        ] {
            assert!(matches!(new(url), Err(VlmError::Url { .. })), "{url:?}");
        }
    }

    #[test]
    fn certificates_that_are_none() {
        let endpoint = || Endpoint::new("https://vlm/v1", "m", Duration::from_secs(1), 0).unwrap();
        for pem in ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
            let refused = endpoint().with_certificates("ca.pem", pem.as_bytes()).unwrap_err();
            assert!(refused.to_string().starts_with("certificates ca.pem: "), "{refused}");
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
