use super::*;

fn at(secs: f64, x: f64, yaw: f64) -> (Timestamp, Pose2) {
    let stamp = Timestamp::ZERO + mindseye_bridge::time::TimeDelta::from_secs_f64(secs);
    (stamp, Pose2::new(x, 0.0, yaw))
}

#[test]
fn views_before_a_jump_do_not_count() {
    let check = |poses: &[(Timestamp, Pose2)], want: usize| assert_eq!(since_jump(poses), want, "{poses:?}");
    check(&[], 0);
    check(&[at(0.0, 0.0, 0.0)], 1);
    check(&[at(0.0, 0.0, 0.0), at(0.4, 0.3, 0.2), at(0.8, 0.6, 0.4)], 3);
    // 0.4 s: up to 0.5 + 0.4 * 5 = 2.5 m can have been driven, and 0.5 + 0.4 * 6 = 2.9 rad turned.
    check(&[at(0.0, 0.0, 0.0), at(0.4, 2.4, 0.0), at(0.8, 2.4, 2.8)], 3);
    check(&[at(0.0, 0.0, 0.0), at(0.4, 2.6, 0.0), at(0.8, 2.6, 0.0)], 2);
    check(&[at(0.0, 0.0, 0.0), at(0.4, 0.0, 0.0), at(0.8, 0.0, 3.0)], 1);
    // Of two jumps the last one counts.
    check(&[at(0.0, 0.0, 0.0), at(0.4, 9.0, 0.0), at(0.8, 0.0, 0.0), at(1.2, 0.1, 0.0)], 2);
    // A pause gives time to drive.
    check(&[at(0.0, 0.0, 0.0), at(4.0, 9.0, 0.0)], 2);
}

#[test]
fn red_beside_an_outline_is_of_it() {
    let mut picture = RgbImage::filled(24, 16, [90; 3]);
    let mut paint = |x: usize, y: usize, rgb: [u8; 3]| {
        let at = (y * 24 + x) * 3;
        picture.data[at..at + 3].copy_from_slice(&rgb);
    };
    paint(9, 5, [200, 60, 60]);
    paint(11, 7, [200, 60, 60]);
    let found = FoundBox { x0: 8, y0: 4, x1: 15, y1: 12, score: 0.5 };
    let outline = Outline::of(&found, &[&picture]);
    for (x, y, want) in [
        (8, 4, true),
        (15, 12, true),
        (12, 4, true),
        (8, 8, true),
        // Just inside: red or not.
        (9, 5, true),
        (10, 5, false),
        // Two pixels inside red is the thing.
        (11, 7, false),
        (7, 3, false),
        (0, 0, false),
    ] {
        assert_eq!(outline.holds(x, y), want, "({x}, {y})");
    }
}

#[test]
fn what_lies_between_surfaces_is_left_out() {
    // A step from 1 m to 2 m with a pixel in between, and a slope; below, a row that only the pixel above may spoil.
    let depth = [1.0, 1.5, 2.05, 2.1, 1.0, 1.02, 2.05, 2.1];
    let kept: Vec<bool> = surfaces(&depth, 4).iter().map(|d| d.is_finite()).collect();
    assert_eq!(kept, [true, false, true, true, true, true, true, true]);
    assert_eq!(surfaces(&[1.0, 1.1, 1.2, 1.3], 4), [1.0, 1.1, 1.2, 1.3], "a slope is a surface");
    assert!(surfaces(&[], 4).is_empty());
}

#[test]
fn carried_pictures_have_a_whole_number_of_times_the_models_pixels() {
    assert_eq!(finer((48, 32), (24, 16)), 2);
    assert_eq!(finer((24, 16), (24, 16)), 1);
    for detail in [(48, 30), (12, 8), (40, 32), (0, 0)] {
        assert_eq!(finer(detail, (24, 16)), 1, "{detail:?}");
    }
    assert_eq!(finer((48, 32), (832, 480)), 1);
}

#[test]
fn halves_keep_colours_and_surfaces() {
    let picture = RgbImage { width: 4, height: 2, data: (0..8u8).flat_map(|i| [10 * i; 3]).collect() };
    // 0 1 | 2 3 over 4 5 | 6 7: means of 0, 10, 40, 50 and of 20, 30, 60, 70.
    let (small, depth) = halved(&picture, &[1.0, 3.0, 2.0, 2.0, 3.1, 3.2, 2.0, f32::NAN]);
    assert_eq!((small.width, small.height, small.data), (2, 1, vec![25, 25, 25, 45, 45, 45]));
    assert_eq!(depth, [3.0, 2.0]);
}
