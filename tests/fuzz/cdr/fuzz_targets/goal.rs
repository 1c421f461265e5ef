//! Reads arbitrary bytes as a goal's JSON.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("vocabulary.rs");

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(goal) = goal::Goal::from_json("g", bytes) {
        match goal.kind {
            goal::GoalKind::Text(text) => assert!(!text.is_empty() && text.chars().count() <= goal::MAX_TEXT_CHARS),
            goal::GoalKind::Waypoints(poses) => {
                assert!(!poses.is_empty() && poses.len() <= goal::MAX_WAYPOINTS);
                assert!(poses.iter().all(|p| p.translation.vector.norm() <= goal::MAX_WAYPOINT_DISTANCE_M));
            }
        }
    }
});
