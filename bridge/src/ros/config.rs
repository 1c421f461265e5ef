//! How a session is configured: a table of ours, Zenoh's own JSON5 file, and the environment names that
//! ROS users know.
//!
//! A goal topic drives a machine, so on a shared network the session should be encrypted and know its
//! peers. That is Zenoh's own: mutual TLS, and user and password. A session file for a client of the
//! robot's router (name it in `zenoh.config_file` or `ZENOH_SESSION_CONFIG_URI`):
//!
//! ```
//! # use mindseye_bridge::ros::RosConfig;
//! # let dir = std::env::temp_dir().join(format!("mindseye-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir)?;
//! # let path = dir.join("session.json5");
//! let session_json5 = r#"{
//!   mode: "client",
//!   connect: { endpoints: ["tls/robot.local:7447"] },
//!   transport: {
//!     link: { tls: {
//!       root_ca_certificate: "/etc/mindseye/ca.pem",
//!       enable_mtls: true,                            // the router asks for our certificate
//!       connect_certificate: "/etc/mindseye/agent.pem",
//!       connect_private_key: "/etc/mindseye/agent.key",
//!     } },
//!     auth: { usrpwd: { user: "agent", password: "change me" } },
//!   },
//! }"#;
//! # std::fs::write(&path, session_json5)?;
//! let mut config = RosConfig::robot("agent");
//! config.zenoh.config_file = Some(path);
//! config.zenoh.connect = None; // as the file says
//! config.zenoh.listen = None;
//! let zenoh = config.to_zenoh()?;
//! assert_eq!(zenoh.get_json("transport/link/tls/enable_mtls")?, "true");
//! # config.zenoh.config_file = None;
//!
//! // The router: robots and their server say and hear everything, a display hears how they are, nobody else anything. Above
//! // all memories that robots share (`mindseye/shared/**`: pictures of the place) stay among them.
//! let router_json5 = r#"{
//!   mode: "router",
//!   transport: { auth: { usrpwd: { dictionary_file: "/etc/mindseye/users" } } },
//!   access_control: {
//!     enabled: true,
//!     default_permission: "deny",
//!     rules: [
//!       { id: "all", permission: "allow", key_exprs: ["**"], flows: ["ingress", "egress"],
//!         messages: ["put", "delete", "declare_subscriber", "query", "declare_queryable", "reply",
//!                    "liveliness_token", "declare_liveliness_subscriber", "liveliness_query"] },
//!       { id: "status", permission: "allow", key_exprs: ["mindseye/*/status"], flows: ["ingress", "egress"],
//!         messages: ["query", "reply"] },
//!     ],
//!     subjects: [
//!       { id: "robots", usernames: ["robot1", "robot2", "hall"] },
//!       { id: "displays", usernames: ["display"] },
//!     ],
//!     policies: [
//!       { rules: ["all"], subjects: ["robots"] },
//!       { rules: ["status"], subjects: ["displays"] },
//!     ],
//!   },
//! }"#;
//! # let path = dir.join("router.json5");
//! # std::fs::write(&path, router_json5)?;
//! # config.zenoh.config_file = Some(path);
//! # assert_eq!(config.to_zenoh()?.get_json("access_control/default_permission")?, "\"deny\"");
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! The router lists the users with `transport/auth/usrpwd/dictionary_file`, one `name:password` a line,
//! and its access control must let `**/@adv/**` and `@ros2_lv/**` through.

use super::ZenohCause;
use serde::Deserialize;
use std::path::PathBuf;
use zenoh::Config;

/// How topics become Zenoh keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyStyle {
    /// As `rmw_zenoh`: domain, topic, type and hash; attachments and liveliness tokens.
    #[default]
    RmwZenoh,
    /// As `zenoh-bridge-ros2dds`: the topic's name only; no attachments, no tokens of ours.
    #[serde(rename = "ros2dds", alias = "ros2_dds")]
    Ros2Dds,
    /// The topic's name is the key.
    Raw,
}

/// Which ROS distribution keys and tokens are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distro {
    /// Has no type hashes: keys say `TypeHashNotSupported`.
    Humble,
    /// Jazzy and everything newer.
    #[default]
    #[serde(alias = "kilted", alias = "lyrical", alias = "rolling")]
    Jazzy,
}

/// Role in the Zenoh network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Talks to peers directly and to routers.
    #[default]
    Peer,
    /// Talks through one router.
    Client,
    /// Relays for others.
    Router,
}

impl Mode {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Client => "client",
            Self::Router => "router",
        }
    }
}

/// The Zenoh side of a session.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ZenohSettings {
    /// A Zenoh configuration in JSON5 (TLS, user and password, access control are Zenoh's own settings).
    /// What follows overrides it where given.
    pub config_file: Option<PathBuf>,
    /// Role; `None`: the file's, or peer.
    pub mode: Option<Mode>,
    /// Endpoints to connect to, e.g. `tcp/robot.local:7447`.
    pub connect: Option<Vec<String>>,
    /// Endpoints to listen on, e.g. `tcp/[::]:0`.
    pub listen: Option<Vec<String>>,
    /// Multicast scouting; off by default.
    pub multicast: Option<bool>,
    /// Shared memory between processes of one machine; off by default.
    pub shared_memory: Option<bool>,
    /// Further settings as `key=value;key=value` with JSON5 values, as in `ZENOH_CONFIG_OVERRIDE`.
    pub overrides: Option<String>,
}

/// Configuration of a [`super::RosSession`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RosConfig {
    /// ROS_DOMAIN_ID, 0 to 232.
    #[serde(default)]
    pub domain_id: u32,
    /// Namespace of the node and of relative topic names, `/` for the root.
    #[serde(default = "root")]
    pub namespace: String,
    /// Name of the node in the ROS graph.
    #[serde(default = "node_name")]
    pub node: String,
    /// How topics become keys.
    #[serde(default)]
    pub key_style: KeyStyle,
    /// Humble, or newer.
    #[serde(default)]
    pub distro: Distro,
    /// The Zenoh side.
    #[serde(default)]
    pub zenoh: ZenohSettings,
}

fn node_name() -> String {
    "mindseye".to_owned()
}

fn root() -> String {
    "/".to_owned()
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a domain.
    #[error("{from}: {value:?} is no ROS domain; wanted a number from 0 to 232")]
    Domain {
        /// Where it was read.
        from: &'static str,
        /// What it said.
        value: String,
    },
    /// The JSON5 file does not load.
    #[error("zenoh configuration {path:?}: {cause}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Zenoh's words.
        #[source]
        cause: ZenohCause,
    },
    /// One setting is wrong.
    #[error("zenoh setting {key}={value}: {cause}")]
    Setting {
        /// Path of the setting.
        key: String,
        /// Its JSON5 value.
        value: String,
        /// Zenoh's words.
        #[source]
        cause: ZenohCause,
    },
    /// An override without `=`.
    #[error("ZENOH_CONFIG_OVERRIDE part {0:?} is no key=value")]
    Override(String),
}

impl RosConfig {
    /// A robot or a tool on the robot's machine, as ROS nodes with `rmw_zenoh` are by default: a peer that
    /// connects to the router on port 7447 of this machine and listens on a free loopback port.
    #[must_use]
    pub fn robot(node: impl Into<String>) -> Self {
        Self {
            zenoh: ZenohSettings {
                connect: Some(vec!["tcp/localhost:7447".to_owned()]),
                listen: Some(vec!["tcp/localhost:0".to_owned()]),
                ..ZenohSettings::default()
            },
            ..Self::in_process(node)
        }
    }

    /// Reaches nobody outside the process: no connection, no port, no scouting.
    #[must_use]
    pub fn in_process(node: impl Into<String>) -> Self {
        Self {
            domain_id: 0,
            namespace: root(),
            node: node.into(),
            key_style: KeyStyle::default(),
            distro: Distro::default(),
            zenoh: ZenohSettings { connect: Some(vec![]), listen: Some(vec![]), ..ZenohSettings::default() },
        }
    }

    /// Takes over what the environment says: `ROS_DOMAIN_ID`, `ZENOH_SESSION_CONFIG_URI`,
    /// `ZENOH_CONFIG_OVERRIDE`, and `ROS_DISTRO=humble`. The caller passes the way to read a variable,
    /// usually `|name| std::env::var(name).ok()`.
    ///
    /// A session file named by the environment is used as it is: connect and listen of this
    /// configuration then give way to the file's.
    ///
    /// # Errors
    /// [`ConfigError::Domain`].
    pub fn with_env(mut self, var: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let set = |name: &str| var(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        if let Some(value) = set("ROS_DOMAIN_ID") {
            self.domain_id = value
                .parse()
                .ok()
                .filter(|d| *d <= 232)
                .ok_or(ConfigError::Domain { from: "ROS_DOMAIN_ID", value })?;
        }
        if let Some(path) = set("ZENOH_SESSION_CONFIG_URI") {
            self.zenoh.config_file = Some(path.into());
            self.zenoh.connect = None;
            self.zenoh.listen = None;
            self.zenoh.mode = None;
        }
        if let Some(more) = set("ZENOH_CONFIG_OVERRIDE") {
            self.zenoh.overrides = Some(match self.zenoh.overrides.take() {
                Some(first) => format!("{first};{more}"),
                None => more,
            });
        }
        if set("ROS_DISTRO").is_some_and(|d| d == "humble") {
            self.distro = Distro::Humble;
        }
        Ok(self)
    }

    /// The Zenoh configuration that results. Timestamping is always on, since caches for late
    /// subscribers need it.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or the setting.
    pub fn to_zenoh(&self) -> Result<Config, ConfigError> {
        if self.domain_id > 232 {
            return Err(ConfigError::Domain { from: "domain_id", value: self.domain_id.to_string() });
        }
        let z = &self.zenoh;
        let mut config = match &z.config_file {
            Some(path) => Config::from_file(path)
                .map_err(|e| ConfigError::File { path: path.clone(), cause: ZenohCause::new(&e) })?,
            None => {
                let mut c = Config::default();
                put(&mut c, "scouting/multicast/enabled", "false")?;
                c
            }
        };
        if let Some(mode) = z.mode.or(z.config_file.is_none().then_some(Mode::Peer)) {
            put(&mut config, "mode", &format!("{:?}", mode.as_str()))?;
        }
        for (key, list) in [("connect/endpoints", &z.connect), ("listen/endpoints", &z.listen)] {
            if let Some(list) = list {
                put(&mut config, key, &serde_json::Value::from(list.clone()).to_string())?;
            }
        }
        if let Some(on) = z.multicast {
            put(&mut config, "scouting/multicast/enabled", &on.to_string())?;
        }
        if z.shared_memory.is_some() || z.config_file.is_none() {
            let on = z.shared_memory.unwrap_or(false);
            put(&mut config, "transport/shared_memory/enabled", &on.to_string())?;
        }
        put(&mut config, "timestamping/enabled", "true")?;
        for part in z.overrides.iter().flat_map(|o| o.split(';')).filter(|p| !p.trim().is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(ConfigError::Override(part.to_owned()));
            };
            put(&mut config, key.trim().trim_matches('/'), value.trim())?;
        }
        Ok(config)
    }
}

fn put(config: &mut Config, key: &str, value: &str) -> Result<(), ConfigError> {
    config.insert_json5(key, value).map_err(|e| ConfigError::Setting {
        key: key.to_owned(),
        value: value.to_owned(),
        cause: ZenohCause::new(&e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env<'a>(vars: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
    }

    #[test]
    fn environment() {
        let c = RosConfig::robot("n")
            .with_env(env(&[
                ("ROS_DOMAIN_ID", "7"),
                ("ZENOH_CONFIG_OVERRIDE", "mode=\"client\";connect/endpoints=[\"tcp/10.0.0.1:7447\"]"),
                ("ROS_DISTRO", "humble"),
            ]))
            .unwrap();
        assert_eq!((c.domain_id, c.distro), (7, Distro::Humble));
        let z = c.to_zenoh().unwrap();
        assert_eq!(z.get_json("mode").unwrap(), "\"client\"");
        assert_eq!(z.get_json("connect/endpoints").unwrap(), "[\"tcp/10.0.0.1:7447\"]");
        assert_eq!(z.get_json("timestamping/enabled").unwrap(), "true");
        assert_eq!(z.get_json("scouting/multicast/enabled").unwrap(), "false");

        for bad in ["x", "-1", "233", "4294967296"] {
            assert!(RosConfig::robot("n").with_env(env(&[("ROS_DOMAIN_ID", bad)])).is_err(), "{bad}");
        }
        assert_eq!(RosConfig::robot("n").with_env(|_| None).unwrap(), RosConfig::robot("n"));
    }

    #[test]
    fn session_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session.json5");
        std::fs::write(&path, "{ mode: 'client', connect: { endpoints: ['tcp/bot:7447'] } }").unwrap();
        let uri = path.to_str().unwrap();
        let z = RosConfig::robot("n")
            .with_env(env(&[("ZENOH_SESSION_CONFIG_URI", uri)]))
            .unwrap()
            .to_zenoh()
            .unwrap();
        assert_eq!(z.get_json("mode").unwrap(), "\"client\"");
        assert_eq!(z.get_json("connect/endpoints").unwrap(), "[\"tcp/bot:7447\"]");
        assert_eq!(z.get_json("timestamping/enabled").unwrap(), "true");
        std::fs::write(&path, "{ mode: ").unwrap();
        let error = RosConfig::robot("n")
            .with_env(env(&[("ZENOH_SESSION_CONFIG_URI", uri)]))
            .unwrap()
            .to_zenoh()
            .unwrap_err();
        assert!(matches!(error, ConfigError::File { .. }), "{error}");
    }

    #[test]
    fn bad_settings() {
        let with = |overrides: &str| {
            let mut c = RosConfig::in_process("n");
            c.zenoh.overrides = Some(overrides.to_owned());
            c.to_zenoh().map(drop)
        };
        assert!(matches!(with("nothing"), Err(ConfigError::Override(_))));
        assert!(matches!(with("no/such/key=1"), Err(ConfigError::Setting { .. })));
        assert!(matches!(with("mode=\"boat\""), Err(ConfigError::Setting { .. })));
        assert!(with(";;").is_ok());
        let mut c = RosConfig::in_process("n");
        c.domain_id = 300;
        assert!(c.to_zenoh().is_err());
    }

    #[test]
    fn toml_is_strict() {
        let c: RosConfig = toml::from_str(
            "node = 'agent'\nkey_style = 'ros2dds'\ndistro = 'kilted'\n[zenoh]\nlisten = []\nshared_memory = true",
        )
        .unwrap();
        assert_eq!((c.key_style, c.distro), (KeyStyle::Ros2Dds, Distro::Jazzy));
        assert!(toml::from_str::<RosConfig>("node = 'a'\ncolour = 'red'").is_err());
        assert!(toml::from_str::<RosConfig>("domain_id = 'one'").is_err());
        let c: RosConfig = toml::from_str("domain_id = 1").unwrap();
        assert_eq!(c.domain_id, 1);
        assert!(!c.node.is_empty(), "a node has a name by default");
    }
}
