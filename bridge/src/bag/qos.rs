//! Qualities of service as rosbag2 stores them.

/// Quality of service that one publisher offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct QosProfile {
    /// Lost samples are sent again.
    pub reliable: bool,
    /// The last messages are kept for late subscribers.
    pub transient_local: bool,
    /// Number of messages that are kept; `None`: all.
    pub depth: Option<u32>,
}

/// Depth of a profile that does not name one, as ROS has it.
const DEPTH: u32 = 10;

/// The profiles of rosbag2's YAML list, names or numbers; entries that are not known are as ROS's default.
pub(super) fn profiles(text: &str) -> Vec<QosProfile> {
    let mut profiles = Vec::new();
    let mut keep_all = false;
    for line in text.lines() {
        let entry = line.trim_start();
        if entry.starts_with('-') {
            profiles.push(QosProfile { reliable: true, transient_local: false, depth: Some(DEPTH) });
            keep_all = false;
        }
        let Some(profile) = profiles.last_mut() else { continue };
        let Some((name, value)) = entry.trim_start_matches(['-', ' ']).split_once(':') else { continue };
        let value = value.trim().trim_matches(['"', '\'']);
        match name.trim_end() {
            "history" => {
                keep_all = matches!(value, "2" | "keep_all");
                if keep_all {
                    profile.depth = None;
                }
            }
            "depth" if !keep_all => {
                profile.depth = Some(value.parse().ok().filter(|d| *d > 0).unwrap_or(DEPTH));
            }
            "reliability" => profile.reliable = !matches!(value, "2" | "best_effort"),
            "durability" => profile.transient_local = matches!(value, "1" | "transient_local"),
            _ => {}
        }
    }
    profiles
}

/// True for the offered quality of service of a transient-local publisher.
pub(super) fn offers_transient_local(text: &str) -> bool {
    profiles(text).iter().any(|p| p.transient_local)
}

impl std::fmt::Display for QosProfile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.reliable { "reliable" } else { "best effort" })?;
        if self.transient_local {
            f.write_str(", transient local")?;
        }
        match self.depth {
            Some(depth) => write!(f, ", depth {depth}"),
            None => f.write_str(", keep all"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_read_by_name_and_by_number() {
        let shown = |text: &str| profiles(text).iter().map(ToString::to_string).collect::<Vec<_>>();
        let own = crate::bag::offered_qos(true, true, 1);
        // text, profiles
        let cases: [(&str, &[&str]); 4] = [
            (&own, &["reliable, transient local, depth 1"]),
            (
                "- history: keep_last\n  depth: 5\n  reliability: best_effort\n  durability: volatile\n- history: keep_all\n  \
                 depth: 0\n  reliability: reliable\n  durability: transient_local\n",
                &["best effort, depth 5", "reliable, transient local, keep all"],
            ),
            ("- history: 3\n  depth: 0\n  reliability: 2\n  durability: 2\n", &["best effort, depth 10"]),
            ("", &[]),
        ];
        for (text, want) in cases {
            assert_eq!(shown(text), want, "{text}");
        }
    }
}
