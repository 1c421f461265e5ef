//! Keys, liveliness tokens, QoS text, attachments and GIDs of `rmw_zenoh` (release 0.2.10 for Jazzy and
//! newer); all pure functions.

use super::config::{Distro, KeyStyle};
use crate::msg::{HASH_NOT_SUPPORTED, dds_name, ros_name};

/// Chunk that opens every token.
pub const TOKEN_PREFIX: &str = "@ros2_lv";
/// Bytes of an attachment.
pub const ATTACHMENT_LEN: usize = 33;
/// The depth that rmw_zenoh leaves out of its QoS text.
const DEFAULT_DEPTH: usize = 42;

/// A name that cannot be used in a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?}: {cause}")]
pub struct KeyError {
    /// Topic, node, ...
    pub what: &'static str,
    /// The name.
    pub name: String,
    /// What is wrong.
    pub cause: &'static str,
}

/// Whether lost samples are sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reliability {
    /// Wire number 1.
    #[default]
    Reliable,
    /// Wire number 2.
    BestEffort,
}

/// Whether late subscribers get old samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Durability {
    /// Wire number 1: the last `depth` samples are kept for late subscribers ("latched").
    TransientLocal,
    /// Wire number 2.
    #[default]
    Volatile,
}

/// How many samples wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum History {
    /// Wire number 1, with a depth.
    KeepLast(usize),
    /// Wire number 2: a reliable publisher then waits for its subscribers instead of dropping.
    KeepAll,
}

/// Quality of service of one endpoint. The default is ROS's: reliable, volatile, keep last 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Qos {
    /// Whether lost samples are sent again.
    pub reliability: Reliability,
    /// Whether late subscribers get old samples.
    pub durability: Durability,
    /// How many samples wait.
    pub history: History,
}

impl Default for Qos {
    fn default() -> Self {
        Self {
            reliability: Reliability::Reliable,
            durability: Durability::Volatile,
            history: History::KeepLast(10),
        }
    }
}

impl Qos {
    /// Best effort, volatile, keep last 5: cameras.
    pub const SENSOR_DATA: Self = Self {
        reliability: Reliability::BestEffort,
        durability: Durability::Volatile,
        history: History::KeepLast(5),
    };

    /// Reliable, kept for late subscribers: tf_static, maps, latched goals.
    #[must_use]
    pub const fn latched(depth: usize) -> Self {
        Self {
            reliability: Reliability::Reliable,
            durability: Durability::TransientLocal,
            history: History::KeepLast(depth),
        }
    }

    /// What a subscription says in its token whatever it is used for: best effort, volatile, keep last 10.
    /// It matches every publisher, which buffer-aware ones (Lyrical and newer) need to see before they send
    /// images on the plain key.
    pub(crate) const ANY_PUBLISHER: Self = Self {
        reliability: Reliability::BestEffort,
        durability: Durability::Volatile,
        history: History::KeepLast(10),
    };

    /// Samples kept, at most what memory is given for.
    #[must_use]
    pub fn depth(&self) -> usize {
        match self.history {
            History::KeepLast(n) => n.clamp(1, 10_000),
            History::KeepAll => 1_000,
        }
    }

    /// The text in tokens, e.g. `2::,5:,:,:,,`.
    #[must_use]
    pub fn token_text(&self) -> String {
        let reliability = match self.reliability {
            Reliability::Reliable => "",
            Reliability::BestEffort => "2",
        };
        let durability = match self.durability {
            Durability::TransientLocal => "1",
            Durability::Volatile => "",
        };
        let history = match self.history {
            History::KeepLast(DEFAULT_DEPTH) => ",".to_owned(),
            History::KeepLast(n) => format!(",{n}"),
            History::KeepAll => "2,".to_owned(),
        };
        format!("{reliability}:{durability}:{history}:,:,:,,")
    }

    /// Reads the text of a token; `None` when it does not parse.
    #[must_use]
    pub fn from_token_text(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let [reliability, durability, history, _deadline, _lifespan, _liveliness] = parts[..] else {
            return None;
        };
        let (kind, depth) = history.split_once(',')?;
        Some(Self {
            reliability: match reliability {
                "" | "0" | "1" => Reliability::Reliable,
                "2" => Reliability::BestEffort,
                _ => return None,
            },
            durability: match durability {
                "1" => Durability::TransientLocal,
                "" | "0" | "2" => Durability::Volatile,
                _ => return None,
            },
            history: match kind {
                "" | "0" | "1" if depth.is_empty() => History::KeepLast(DEFAULT_DEPTH),
                "" | "0" | "1" => History::KeepLast(depth.parse().ok()?),
                "2" => History::KeepAll,
                _ => return None,
            },
        })
    }
}

/// What a token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndpointKind {
    /// `NN`.
    Node,
    /// `MP`.
    Publisher,
    /// `MS`.
    Subscription,
    /// `SS`.
    Service,
    /// `SC`.
    Client,
}

impl EndpointKind {
    /// The two letters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Node => "NN",
            Self::Publisher => "MP",
            Self::Subscription => "MS",
            Self::Service => "SS",
            Self::Client => "SC",
        }
    }

    fn from_code(code: &str) -> Option<Self> {
        [Self::Node, Self::Publisher, Self::Subscription, Self::Service, Self::Client]
            .into_iter()
            .find(|k| k.code() == code)
    }
}

/// A liveliness token of the ROS graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token {
    /// ROS_DOMAIN_ID.
    pub domain: u32,
    /// Session id, lower-case hex.
    pub zid: String,
    /// Node number within the session.
    pub nid: u32,
    /// Entity number within the session; the node's own for a node.
    pub eid: u32,
    /// Node, publisher, ...
    pub kind: EndpointKind,
    /// Namespace of the node, `/` for the root.
    pub namespace: String,
    /// Name of the node.
    pub node: String,
    /// What the endpoint is about; `None` for a node.
    pub endpoint: Option<TokenEndpoint>,
}

/// The part of a token that nodes do not have.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenEndpoint {
    /// Topic or service, with its leading slash.
    pub topic: String,
    /// `pkg/msg/Name`.
    pub type_name: String,
    /// `RIHS01_...` or `TypeHashNotSupported`.
    pub hash: String,
    /// Quality of service; `None` when the text did not parse (others would then ignore the token).
    pub qos: Option<Qos>,
    /// What follows `backends:` (Lyrical and newer).
    pub backends: Option<String>,
}

impl Token {
    /// The key to declare.
    #[must_use]
    pub fn key(&self) -> String {
        let mut key = format!(
            "{TOKEN_PREFIX}/{}/{}/{}/{}/{}/%/{}/{}",
            self.domain,
            self.zid,
            self.nid,
            self.eid,
            self.kind.code(),
            mangle(&self.namespace),
            self.node
        );
        if let Some(e) = &self.endpoint {
            let qos = e.qos.unwrap_or_default().token_text();
            key += &format!("/{}/{}/{}/{qos}", mangle(&e.topic), dds_name(&e.type_name), e.hash);
            if let Some(b) = &e.backends {
                key += &format!("/backends:{b}");
            }
        }
        key
    }

    /// Reads a token's key; `None` when it is none.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let mut chunks = key.split('/');
        if chunks.next()? != TOKEN_PREFIX {
            return None;
        }
        let domain = chunks.next()?.parse().ok()?;
        let zid = chunks.next()?.to_owned();
        let nid = chunks.next()?.parse().ok()?;
        let eid = chunks.next()?.parse().ok()?;
        let kind = EndpointKind::from_code(chunks.next()?)?;
        let _enclave = chunks.next()?;
        let namespace = demangle(chunks.next()?);
        let node = chunks.next()?.to_owned();
        let endpoint = match kind {
            EndpointKind::Node => None,
            _ => Some(TokenEndpoint {
                topic: demangle(chunks.next()?),
                type_name: {
                    let dds = chunks.next()?;
                    ros_name(dds).unwrap_or_else(|| dds.to_owned())
                },
                hash: chunks.next()?.to_owned(),
                qos: Qos::from_token_text(chunks.next()?),
                backends: chunks.next().and_then(|c| c.strip_prefix("backends:")).map(str::to_owned),
            }),
        };
        Some(Self { domain, zid, nid, eid, kind, namespace, node, endpoint })
    }
}

fn mangle(name: &str) -> String {
    if name.is_empty() { "%".to_owned() } else { name.replace('/', "%") }
}

fn demangle(name: &str) -> String {
    name.replace('%', "/")
}

/// GID of an entity: XXH3-128 (seed 0) of its token's key, low 64 bits first, both little-endian.
#[must_use]
pub fn gid_of(token_key: &str) -> [u8; 16] {
    xxhash_rust::xxh3::xxh3_128(token_key.as_bytes()).to_le_bytes()
}

/// What travels beside every publication, request and reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// From 1, one more each.
    pub sequence: i64,
    /// When it was sent, nanoseconds since the epoch.
    pub source_stamp_ns: i64,
    /// Who sent it.
    pub gid: [u8; 16],
}

impl Attachment {
    /// The 33 bytes: two little-endian i64, the length 16, the GID.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ATTACHMENT_LEN] {
        let mut out = [0; ATTACHMENT_LEN];
        out[..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8..16].copy_from_slice(&self.source_stamp_ns.to_le_bytes());
        out[16] = 16;
        out[17..].copy_from_slice(&self.gid);
        out
    }

    /// Reads them; `None` when they are something else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ATTACHMENT_LEN] = bytes.try_into().ok()?;
        if bytes[16] != 16 {
            return None;
        }
        Some(Self {
            sequence: i64::from_le_bytes(bytes[..8].try_into().ok()?),
            source_stamp_ns: i64::from_le_bytes(bytes[8..16].try_into().ok()?),
            gid: bytes[17..].try_into().ok()?,
        })
    }
}

/// Checks a fully qualified topic or service name and returns it with exactly one leading slash.
/// Plain (`raw`) keys may hold more characters than ROS names.
pub(super) fn check_name(what: &'static str, name: &str, style: KeyStyle) -> Result<String, KeyError> {
    let error = |cause| Err(KeyError { what, name: name.to_owned(), cause });
    let plain = name.trim_start_matches('/').trim_end_matches('/');
    if plain.is_empty() {
        return error("is empty; wanted something like /goal_pose");
    }
    if plain.len() > 255 {
        return error("is longer than 255 characters");
    }
    if plain.split('/').any(str::is_empty) {
        return error("has an empty part between slashes");
    }
    let allowed: fn(char) -> bool = match style {
        KeyStyle::Raw => |c| !matches!(c, '*' | '$' | '?' | '#' | ' ') && !c.is_control(),
        _ => |c| c.is_ascii_alphanumeric() || matches!(c, '_' | '/'),
    };
    if !plain.chars().all(allowed) {
        return error("has characters that are not letters, digits, _ or /");
    }
    Ok(format!("/{plain}"))
}

/// The key of a topic. `hash` is what the last chunk says in `rmw_zenoh` style: a type hash, or `*` to
/// subscribe whatever the sender's distribution; Humble has no hashes and overrides it.
///
/// # Errors
/// [`KeyError`] when the name is none.
pub fn topic_key(
    style: KeyStyle,
    distro: Distro,
    domain: u32,
    topic: &str,
    type_name: &str,
    hash: &str,
) -> Result<String, KeyError> {
    let name = check_name("topic", topic, style)?;
    let plain = &name[1..];
    Ok(match style {
        KeyStyle::RmwZenoh => {
            let hash = if hash == "*" { hash } else { distro.hash(hash) };
            format!("{domain}/{plain}/{}/{hash}", dds_name(type_name))
        }
        KeyStyle::Ros2Dds | KeyStyle::Raw => plain.to_owned(),
    })
}

/// The key of a service; `rmw_zenoh` style needs the service type's hash.
///
/// # Errors
/// [`KeyError`] when the name is none.
pub fn service_key(
    style: KeyStyle,
    distro: Distro,
    domain: u32,
    service: &str,
    type_name: &str,
    hash: &str,
) -> Result<String, KeyError> {
    topic_key(style, distro, domain, service, type_name, hash)
}

impl Distro {
    /// What stands in keys and tokens in place of a hash.
    #[must_use]
    pub fn hash(self, hash: &str) -> &str {
        match self {
            Self::Humble => HASH_NOT_SUPPORTED,
            Self::Jazzy => hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msg::{PoseStamped, RosType};
    use proptest::prelude::*;

    const ZID: &str = "3cf5aa978abc2ab2a55a3378637a82fb";

    #[test]
    fn topic_keys() {
        let check = |style, distro, topic: &str, hash: &str, want: &str| {
            let got = topic_key(style, distro, 0, topic, PoseStamped::NAME, hash).unwrap();
            assert_eq!(got, want);
        };
        use {Distro::*, KeyStyle::*};
        check(
            RmwZenoh,
            Jazzy,
            "/goal_pose",
            PoseStamped::HASH,
            "0/goal_pose/geometry_msgs::msg::dds_::PoseStamped_/RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8",
        );
        check(
            RmwZenoh,
            Humble,
            "goal_pose/",
            PoseStamped::HASH,
            "0/goal_pose/geometry_msgs::msg::dds_::PoseStamped_/TypeHashNotSupported",
        );
        check(RmwZenoh, Humble, "/a/b", "*", "0/a/b/geometry_msgs::msg::dds_::PoseStamped_/*");
        check(Ros2Dds, Jazzy, "/bot1/goal_pose", PoseStamped::HASH, "bot1/goal_pose");
        check(Raw, Jazzy, "bot-1/goal", PoseStamped::HASH, "bot-1/goal");
        for bad in ["", "/", "a//b", "a b", "a/*", "goal-pose", "grün", &"x".repeat(300)] {
            assert!(topic_key(RmwZenoh, Jazzy, 0, bad, "a/msg/B", "*").is_err(), "{bad:?}");
        }
        assert!(topic_key(Raw, Jazzy, 0, "a/**", "a/msg/B", "*").is_err());
    }

    #[test]
    fn qos_text() {
        let check = |qos: Qos, text: &str| {
            assert_eq!(qos.token_text(), text);
            assert_eq!(Qos::from_token_text(text), Some(qos), "{text}");
        };
        check(Qos::default(), "::,10:,:,:,,");
        check(Qos::SENSOR_DATA, "2::,5:,:,:,,");
        check(Qos::latched(1), ":1:,1:,:,:,,");
        check(Qos::ANY_PUBLISHER, "2::,10:,:,:,,");
        check(Qos { history: History::KeepLast(42), ..Qos::default() }, "::,:,:,:,,");
        check(Qos { history: History::KeepAll, ..Qos::default() }, "::2,:,:,:,,");
        for bad in ["", "::", "9::,1:,:,:,,", "::,x:,:,:,,", ":5:,1:,:,:,,", "::1:,:,:,,", "::,10:,:,:,,:"] {
            assert_eq!(Qos::from_token_text(bad), None, "{bad:?}");
        }
    }

    fn publisher_token() -> Token {
        Token {
            domain: 0,
            zid: ZID.into(),
            nid: 0,
            eid: 10,
            kind: EndpointKind::Publisher,
            namespace: "/".into(),
            node: "agent".into(),
            endpoint: Some(TokenEndpoint {
                topic: "/goal_pose".into(),
                type_name: PoseStamped::NAME.into(),
                hash: PoseStamped::HASH.into(),
                qos: Some(Qos::default()),
                backends: None,
            }),
        }
    }

    #[test]
    fn tokens() {
        let node = Token { endpoint: None, kind: EndpointKind::Node, eid: 0, ..publisher_token() };
        let lyrical = {
            let mut t = Token { kind: EndpointKind::Subscription, ..publisher_token() };
            t.namespace = "/bot/arm".into();
            t.endpoint.as_mut().unwrap().backends = Some("cpu:v1;cuda:".into());
            t
        };
        for (token, want) in [
            (
                publisher_token(),
                format!(
                    "@ros2_lv/0/{ZID}/0/10/MP/%/%/agent/%goal_pose/geometry_msgs::msg::dds_::PoseStamped_/RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8/::,10:,:,:,,"
                ),
            ),
            (node, format!("@ros2_lv/0/{ZID}/0/0/NN/%/%/agent")),
            (
                lyrical,
                format!(
                    "@ros2_lv/0/{ZID}/0/10/MS/%/%bot%arm/agent/%goal_pose/geometry_msgs::msg::dds_::PoseStamped_/RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8/::,10:,:,:,,/backends:cpu:v1;cuda:"
                ),
            ),
        ] {
            assert_eq!(token.key(), want);
            assert_eq!(Token::parse(&want).unwrap(), token);
        }
        for bad in [
            "",
            "@ros2_lv",
            "0/goal",
            "@ros2_lv/x/z/0/0/NN/%/%/n",
            "@ros2_lv/0/z/0/0/QQ/%/%/n",
            "@ros2_lv/0/z/0/1/MP/%/%/n/%t",
        ] {
            assert_eq!(Token::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn attachment_bytes() {
        let a = Attachment { sequence: 1, source_stamp_ns: 0x0102_0304_0506_0708, gid: [0xAB; 16] };
        let bytes = a.to_bytes();
        let mut want = vec![1, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0x10];
        want.extend([0xAB; 16]);
        assert_eq!(bytes.to_vec(), want);
        assert_eq!(Attachment::from_bytes(&bytes), Some(a));
        // The same bytes as zenoh-ext's own serialisation.
        let ext = zenoh_ext::z_serialize(&(a.sequence, a.source_stamp_ns, a.gid));
        assert_eq!(ext.to_bytes().to_vec(), want);
        assert_eq!(Attachment::from_bytes(&bytes[..32]), None);
        let mut wrong = bytes;
        wrong[16] = 15;
        assert_eq!(Attachment::from_bytes(&wrong), None);
    }

    #[test]
    fn gid_is_xxh3_of_the_token() {
        // XXH3-128 of the empty input is 99aa06d3014798d86001c324468d497f (high half first; the algorithm's
        // own specification); the GID has the low half first, each half little-endian.
        assert_eq!(
            gid_of(""),
            [0x7f, 0x49, 0x8d, 0x46, 0x24, 0xc3, 0x01, 0x60, 0xd8, 0x98, 0x47, 0x01, 0xd3, 0x06, 0xaa, 0x99]
        );
        assert_ne!(gid_of(&publisher_token().key()), gid_of("x"));
    }

    proptest! {
        #[test]
        fn any_token_survives(domain in 0u32..233, nid in any::<u32>(), eid in any::<u32>(), kind in 1usize..5,
            names in prop::array::uniform3("[a-z_][a-z0-9_]{0,8}"), depth in 0usize..2000, best in any::<bool>(),
            local in any::<bool>()) {
            let kinds = [EndpointKind::Node, EndpointKind::Publisher, EndpointKind::Subscription,
                EndpointKind::Service, EndpointKind::Client];
            let mut t = publisher_token();
            t.domain = domain;
            t.nid = nid;
            t.eid = eid;
            t.kind = kinds[kind];
            t.namespace = format!("/{}", names[0]);
            t.node = names[1].clone();
            let e = t.endpoint.as_mut().unwrap();
            e.topic = format!("/{}/{}", names[0], names[2]);
            e.qos = Some(Qos {
                reliability: if best { Reliability::BestEffort } else { Reliability::Reliable },
                durability: if local { Durability::TransientLocal } else { Durability::Volatile },
                history: History::KeepLast(depth),
            });
            prop_assert_eq!(Token::parse(&t.key()), Some(t));
        }

        #[test]
        fn parsing_never_panics(key in ".{0,200}", qos in "[0-9:,]{0,20}") {
            let _ = Token::parse(&key);
            let _ = Token::parse(&format!("@ros2_lv/0/z/0/1/MP/%/%/n/%t/a::msg::dds_::B_/h/{qos}"));
            let _ = Attachment::from_bytes(key.as_bytes());
        }
    }
}
