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
    let view = |by: usize| Carried {
        width: 24 * by,
        height: 16 * by,
        rgb: vec![rgb; 384 * by * by],
        trust: vec![trust; 384 * by * by],
        depth_m: vec![2.0; 384 * by * by],
    };
    Carry { views: vec![view(1); views], finer: vec![view(2); views], boxed, drawn: None }
}

#[test]
fn the_box_is_that_of_the_drive_before() {
    let mut before = RgbImage::filled(24, 16, [60; 3]);
    for (x, y) in (8..16).flat_map(|x| [(x, 4), (x, 12)]).chain((4..13).flat_map(|y| [(8, y), (15, y)])) {
        let at = (y * 24 + x) * 3;
        before.data[at..at + 3].copy_from_slice(&[250, 10, 10]);
    }
    let found = FoundBox { x0: 8, y0: 4, x1: 15, y1: 12, score: 0.9 };
    let held = |drawn: Option<(FoundBox, Vec<RgbImage>)>| {
        let carry = Carry { drawn, ..carry([1.0; 3], 1.0, 2 * GROUP, GROUP) };
        let mut frames = vec![RgbImage::filled(24, 16, [100; 3]); 3 * GROUP];
        carry.hold(&mut frames, 0.3);
        let detail = carry.in_detail(&frames, None, 0.3);
        (frames, detail)
    };
    let (frames, detail) = held(Some((found, vec![before; GROUP])));
    assert_eq!(frames[2 * GROUP - 1].pixel(8, 4), [255; 3], "none on the way");
    assert_eq!([(8, 4), (12, 12), (9, 5)].map(|(x, y)| frames[3 * GROUP - 1].pixel(x, y)[1]), [10, 10, 255]);
    assert_eq!(
        [(16, 8), (31, 25), (18, 10)].map(|(x, y)| detail[3 * GROUP - 1].pixel(x, y)[1]),
        [10, 10, 255]
    );
    assert_eq!(held(None).0[3 * GROUP - 1], RgbImage::filled(24, 16, [255; 3]), "nobody drew one");
}

#[test]
fn a_drive_is_shown_in_the_pixels_of_what_is_remembered() {
    let mut frames = vec![RgbImage::filled(24, 16, [100; 3]); 3 * GROUP];
    for (k, pixel) in frames[GROUP].data.chunks_exact_mut(3).enumerate() {
        pixel.fill(10 * (k % 24) as u8);
    }
    for frame in &mut frames[2 * GROUP..] {
        for (x, y) in (8..16).flat_map(|x| [(x, 4), (x, 12)]).chain((4..13).flat_map(|y| [(8, y), (15, y)])) {
            let at = (y * 24 + x) * 3;
            frame.data[at..at + 3].copy_from_slice(&[250, 10, 10]);
        }
    }
    let first = RgbImage::filled(48, 32, [7; 3]);
    let shown = |trust: f32, first: Option<&RgbImage>| {
        let carry = carry([1.0; 3], trust, 2 * GROUP, GROUP);
        let shown = carry.in_detail(&frames, first, 0.3);
        assert!(shown.len() == frames.len() && shown.iter().all(|f| (f.width, f.height) == (48, 32)));
        shown
    };
    let never_seen = shown(0.0, Some(&first));
    assert!(never_seen[..GROUP].iter().all(|f| *f == first));
    // A quarter and three quarters of the way between the middles of pixels; the ends have no neighbour.
    let row: Vec<u8> = (0..6).map(|x| never_seen[GROUP].pixel(x, 9)[0]).collect();
    assert_eq!(row, [0, 3, 8, 13, 18, 23]);
    assert_eq!(never_seen[GROUP].pixel(47, 31), [230; 3]);
    let seen = shown(1.0, None);
    assert_eq!(seen[0], RgbImage::filled(48, 32, [100; 3]), "no picture of that size is known: the model's");
    assert_eq!(seen[GROUP], RgbImage::filled(48, 32, [255; 3]));
    // The box stays, each of its pixels four.
    let last = &seen[3 * GROUP - 1];
    for (x, y, rgb) in [(16, 8, [250, 10, 10]), (17, 9, [250, 10, 10]), (18, 10, [255; 3]), (15, 8, [255; 3])]
    {
        assert_eq!(last.pixel(x, y), rgb, "({x}, {y})");
    }
}

#[test]
fn frames_are_held_as_far_as_what_was_seen_is_trusted() {
    // A quarter counts: a quarter of 200 and three quarters of 100.
    let mut frames = vec![RgbImage::filled(24, 16, [100; 3]); 2 * GROUP];
    carry([200.0 / 255.0; 3], 0.25 / TRUSTED, GROUP, 0).hold(&mut frames, 0.3);
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
