//! Which frames of the transform tree are odometry's and the base's.
//!
//! Robots prefix their frames (`robot1/odom`), and some call the base `base_footprint`. The configured names count where
//! the tree has them; otherwise the tree is asked.

use mindseye_bridge::geometry::TfTree;
use mindseye_bridge::time::Timestamp;
use nalgebra::Isometry3;

/// The two frames that a base's pose is told in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseFrames {
    /// The frame that odometry is in.
    pub odom: String,
    /// The base.
    pub base: String,
}

/// Names of bases, the best first, after the configured one.
const BASES: [&str; 3] = ["base_link", "base_footprint", "base"];
/// Names of frames that odometry may be in, the best first, after the configured one.
const WORLDS: [&str; 4] = ["odom", "odom_combined", "world", "map"];

/// The part of a frame's name after its prefix.
fn last_part(frame: &str) -> &str {
    frame.rsplit('/').next().unwrap_or(frame)
}

/// The prefix of a frame's name with its slash, or nothing.
fn prefix(frame: &str) -> &str {
    frame.rfind('/').map_or("", |at| &frame[..=at])
}

/// Finds the frames that move against each other as the configured names would: those themselves where `tf` connects
/// them, else the same names behind a prefix, else other usual names. With a `camera` frame, only bases that carry it.
pub fn find(tf: &TfTree, configured: &BaseFrames, camera: Option<&str>) -> Option<BaseFrames> {
    if tf.lookup(&configured.odom, &configured.base, Timestamp::ZERO).is_ok() {
        return Some(configured.clone());
    }
    let rank = |names: &[&str], first: &str, frame: &str| {
        let part = last_part(frame);
        if part == last_part(first) {
            return Some(0);
        }
        names.iter().position(|name| *name == part).map(|i| i + 1)
    };
    let carries = |base: &str| {
        let Some(camera) = camera.and_then(|c| in_tree(tf, c, base)) else { return true };
        camera == base || tf.above(&camera).any(|frame| frame == base)
    };
    let mut best: Option<((usize, usize), BaseFrames)> = None;
    for (_, base, _) in tf.edges() {
        let Some(base_rank) = rank(&BASES, &configured.base, base) else { continue };
        if !carries(base) {
            continue;
        }
        for odom in tf.above(base) {
            let Some(odom_rank) = rank(&WORLDS, &configured.odom, odom) else { continue };
            let ranks = (odom_rank, base_rank);
            if best.as_ref().is_none_or(|(other, _)| ranks < *other) {
                best = Some((ranks, BaseFrames { odom: odom.to_owned(), base: base.to_owned() }));
            }
        }
    }
    best.map(|(_, frames)| frames)
}

/// A frame's name as `tf` has it: itself, else behind the prefix of `near`, else the only one with the same last part.
pub fn in_tree(tf: &TfTree, frame: &str, near: &str) -> Option<String> {
    let frame = frame.trim_start_matches('/');
    if tf.knows(frame) {
        return Some(frame.to_owned());
    }
    let prefixed = format!("{}{}", prefix(near), last_part(frame));
    if tf.knows(&prefixed) {
        return Some(prefixed);
    }
    let mut same: Vec<&str> = tf
        .edges()
        .flat_map(|(parent, child, _)| [parent, child])
        .filter(|name| last_part(name) == last_part(frame))
        .collect();
    same.sort_unstable();
    same.dedup();
    match same.as_slice() {
        [only] => Some((*only).to_owned()),
        _ => None,
    }
}

/// Where the camera is mounted, `base_from_camera`, if `tf` knows it under these or prefixed names.
pub fn mounting(tf: &TfTree, base: &str, camera: &str) -> Option<Isometry3<f64>> {
    let camera = in_tree(tf, camera, base)?;
    let base = in_tree(tf, base, &camera)?;
    tf.lookup(&base, &camera, Timestamp::ZERO).ok()
}

/// Whether a transform to `child` moves the base: it lies between the two frames.
pub fn moves(tf: &TfTree, frames: &BaseFrames, child: &str) -> bool {
    let child = child.trim_start_matches('/');
    child != frames.odom
        && std::iter::once(frames.base.as_str())
            .chain(tf.above(&frames.base))
            .take_while(|frame| *frame != frames.odom)
            .any(|frame| frame == child)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(edges: &[(&str, &str, bool)]) -> TfTree {
        let mut tf = TfTree::new();
        for (parent, child, is_static) in edges {
            let iso = Isometry3::translation(1.0, 0.0, 0.0);
            tf.insert_isometry(parent, child, Timestamp(1_000_000_000), iso, *is_static).unwrap();
        }
        tf
    }

    #[test]
    fn frames_are_found_under_the_names_that_robots_give_them() {
        let configured = BaseFrames { odom: "odom".into(), base: "base_link".into() };
        let check = |edges: &[(&str, &str, bool)], camera: Option<&str>, want: Option<(&str, &str)>| {
            let got = find(&tree(edges), &configured, camera);
            let want = want.map(|(odom, base)| BaseFrames { odom: odom.into(), base: base.into() });
            assert_eq!(got, want, "{edges:?}");
        };
        let plain = [("map", "odom", false), ("odom", "base_link", false), ("base_link", "cam", true)];
        check(&plain, Some("cam"), Some(("odom", "base_link")));
        check(
            &[("odom", "base_footprint", false), ("base_footprint", "base_link", true)],
            None,
            Some(("odom", "base_link")),
        );
        check(
            &[("robot1/odom", "robot1/base_link", false), ("robot1/base_link", "robot1/cam", true)],
            Some("cam"),
            Some(("robot1/odom", "robot1/base_link")),
        );
        // Two robots: the camera tells which.
        let two = [
            ("a/odom", "a/base_link", false),
            ("b/odom", "b/base_link", false),
            ("b/base_link", "b/cam", true),
        ];
        check(&two, Some("b/cam"), Some(("b/odom", "b/base_link")));
        check(&[("odom", "base_footprint", false)], None, Some(("odom", "base_footprint")));
        check(&[("map", "base_link", false)], None, Some(("map", "base_link")));
        check(&[("base_link", "cam", true)], Some("cam"), None);
        check(&[], None, None);
    }

    #[test]
    fn cameras_are_found_behind_a_prefix() {
        let tf = tree(&[("r/odom", "r/base_link", false), ("r/base_link", "r/cam", true)]);
        for (base, camera) in [("r/base_link", "r/cam"), ("r/base_link", "cam"), ("base_link", "/r/cam")] {
            assert!(mounting(&tf, base, camera).is_some(), "{base}, {camera}");
        }
        assert!(mounting(&tf, "r/base_link", "other").is_none());
        let frames = BaseFrames { odom: "r/odom".into(), base: "r/base_link".into() };
        assert!(moves(&tf, &frames, "/r/base_link") && !moves(&tf, &frames, "r/cam"));
        assert!(!moves(&tf, &frames, "r/odom"));
    }
}
