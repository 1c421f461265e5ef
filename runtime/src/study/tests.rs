//! Threads, bounds and jumps of the study.

use super::*;
use crate::imagine::NoClock;
use nalgebra::Vector3;

fn camera() -> Camera {
    Camera::pinhole(208, 156, 170.0, 170.0, 103.5, 77.5).unwrap()
}

/// Noise that moves with the camera: something to find features in.
fn frame(millis: i64, x: f64) -> FullFrame {
    let (w, h) = (208usize, 156usize);
    let shift = (x * 80.0) as usize;
    let value = |k: usize| {
        let (i, j) = ((k % w + shift) / 6, (k / w) / 6);
        ((i * 7919 + j * 104_729).wrapping_mul(2_654_435_761) >> 13) as u8
    };
    FullFrame {
        rgb: (0..w * h).flat_map(|k| [value(k); 3]).collect(),
        size: (w, h),
        captured_at: Timestamp(1_000_000_000) + TimeDelta::from_millis(millis),
        camera: camera(),
        odom_from_camera: Isometry3::translation(x, 0.0, 0.0),
    }
}

fn config(landmarks_max: usize) -> StudyConfig {
    StudyConfig { landmarks_max: Some(landmarks_max), ..StudyConfig::default() }
}

#[test]
fn jumps_and_segments_forget_and_gaps_do_not() {
    let mut study = Study::inline(config(5000), None);
    let results = study.results();
    for k in 0..10i64 {
        study.offer(frame(200 * k, 0.1 * k as f64), &NoClock);
    }
    let before = results.counts();
    assert!(before.landmarks > 50 && before.studied == 10 && before.jumps == 0, "{before:?}");
    study.segment(SegmentReason::Gap { lasted: TimeDelta::from_millis(3000) });
    assert_eq!(results.counts().landmarks, before.landmarks);
    study.offer(frame(2000, 40.0), &NoClock);
    let after = results.counts();
    assert_eq!((after.jumps, after.landmarks), (1, 0), "{after:?}");
    for k in 0..10i64 {
        study.offer(frame(2200 + 200 * k, 40.0 + 0.1 * k as f64), &NoClock);
    }
    assert!(results.counts().landmarks > 50);
    study.segment(SegmentReason::ClockBackwards { by: TimeDelta::from_millis(5000) });
    assert!(results.studied().landmarks.is_none_or(|map| map.is_empty()));
}

#[test]
fn a_thread_takes_the_newest_and_counts_the_others() {
    let mut study = Study::threaded(config(5000), None, NoClock).unwrap();
    let results = study.results();
    for k in 0..60i64 {
        // Faster than features are found: offering never waits.
        study.offer(frame(200 * k, 0.02 * k as f64), &NoClock);
    }
    for _ in 0..1000 {
        let counts = results.counts();
        if counts.studied + counts.dropped == 60 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let counts = results.counts();
    assert_eq!(counts.studied + counts.dropped, 60, "{counts:?}");
    assert!(counts.studied >= 1 && counts.dropped >= 1, "{counts:?}");
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn landmarks_stay_bounded_over_an_hour_of_stamps() {
    let mut study = Study::inline(config(400), None);
    let results = study.results();
    let mut at_the_middle = 0;
    // One frame every thirty seconds of stamps is the same work as the bound meets at ten a second.
    for k in 0..120i64 {
        let x = 3.0 * (k as f64 * 0.05).sin();
        let mut seen = frame(30_000 * k, x);
        seen.odom_from_camera.translation.vector += Vector3::new(0.0, 0.0, 0.01 * (k % 7) as f64);
        study.offer(seen, &NoClock);
        assert!(results.counts().landmarks <= 400);
        if k == 60 {
            at_the_middle = resident();
        }
    }
    let grown = resident().saturating_sub(at_the_middle);
    assert!(grown < 8 << 20, "{grown} bytes more after the second half");
    let map = results.studied().landmarks.unwrap();
    assert!(map.counts().frames == 120 && map.counts().dropped > 0, "{:?}", map.counts());
}
