use super::*;

#[test]
fn a_path_is_bent_to_its_end_and_divided() {
    let straight: Vec<Pose2> = [0.0, 1.0, 2.0, 2.0].map(|x| Pose2::new(x, 0.0, 0.0)).to_vec();
    // Two latents of motion and one with the box: it arrives with the second one.
    let poses = along(&straight, 1, Some(Pose2::new(2.0, 0.4, 0.2)));
    assert_eq!(poses.len(), 1 + 3 * GROUP);
    let check = |i: usize, x: f64, y: f64, yaw: f64| {
        let p = poses[i];
        let near = (p.x - x).abs() < 1e-9 && (p.y - y).abs() < 1e-9 && (p.yaw - yaw).abs() < 1e-9;
        assert!(near, "{i}: {p:?} instead of {x} {y} {yaw}");
    };
    check(0, 0.0, 0.0, 0.0);
    check(2, 0.5, 0.1, 0.05);
    check(4, 1.0, 0.2, 0.1);
    check(8, 2.0, 0.4, 0.2);
    check(12, 2.0, 0.4, 0.2);
    assert_eq!(along(&straight, 1, None)[4], straight[1]);
    assert!(along(&[], 1, None).is_empty());
}

fn carry(rgb: [f32; 3], trust: f32, views: usize, boxed: usize) -> Carry {
    let view = Carried {
        width: 24,
        height: 16,
        rgb: vec![rgb; 384],
        trust: vec![trust; 384],
        depth_m: vec![2.0; 384],
    };
    Carry { views: vec![view; views], boxed }
}

#[test]
fn frames_are_held_as_far_as_what_was_seen_is_trusted() {
    // A quarter of 200 and three quarters of 100.
    let mut frames = vec![RgbImage::filled(24, 16, [100; 3]); 2 * GROUP];
    carry([200.0 / 255.0; 3], 0.25, GROUP, 0).hold(&mut frames, 0.3);
    assert_eq!(frames[0], RgbImage::filled(24, 16, [100; 3]), "the given frame is what it is");
    assert_eq!(frames[GROUP], RgbImage::filled(24, 16, [125; 3]));
    assert_eq!(frames[2 * GROUP - 1], RgbImage::filled(24, 16, [125; 3]));
}

#[test]
fn the_box_is_the_networks() {
    let mut frames = vec![RgbImage::filled(24, 16, [100; 3]); 3 * GROUP];
    for frame in &mut frames[2 * GROUP..] {
        for (x, y) in (8..16).flat_map(|x| [(x, 4), (x, 12)]).chain((4..13).flat_map(|y| [(8, y), (15, y)])) {
            let at = (y * 24 + x) * 3;
            frame.data[at..at + 3].copy_from_slice(&[250, 10, 10]);
        }
    }
    carry([0.0; 3], 1.0, 2 * GROUP, GROUP).hold(&mut frames, 0.3);
    assert_eq!(frames[GROUP].pixel(8, 4), [0; 3], "on the way there is no box");
    assert_eq!(frames[2 * GROUP].pixel(8, 4), [250, 10, 10]);
    assert_eq!((frames[2 * GROUP].pixel(11, 8), frames[2 * GROUP].pixel(0, 0)), ([0; 3], [0; 3]));
}
