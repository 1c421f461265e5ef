//! What can be computed by hand: a rotated covariance, and the CRC of a recording's summary.

use mindseye_bridge::bag::{McapWriter, OpenOptions, ReadOptions, offered_qos, open, schema};
use mindseye_bridge::geometry::Covariance6;
use mindseye_bridge::msg::{RosType, StringMsg};
use nalgebra::{UnitQuaternion, Vector3};

#[test]
fn a_covariance_turns_with_its_axes() {
    // Standard deviations 0.3 m along x and 0.1 m along y; the axes stand 30 degrees to the left in the others.
    let narrow = Covariance6::planar(0.09, 0.01, 0.04);
    let turn = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), 30f64.to_radians());
    let c = narrow.rotated(&turn).0;
    // R C R^T: xx = .09 cos^2 + .01 sin^2, yy = .09 sin^2 + .01 cos^2, xy = (.09 - .01) sin cos.
    for (at, wanted) in [(0, 0.07), (7, 0.03), (1, 0.02 * 3f64.sqrt()), (6, 0.02 * 3f64.sqrt()), (35, 0.04)] {
        assert!((c[at] - wanted).abs() < 1e-12, "[{at}] = {} instead of {wanted}", c[at]);
    }
    // A quarter turn exchanges the axes.
    let quarter = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), 90f64.to_radians());
    let c = narrow.rotated(&quarter).0;
    assert!((c[0] - 0.01).abs() < 1e-12 && (c[7] - 0.09).abs() < 1e-12 && c[1].abs() < 1e-12);
}

/// A recording of ten texts; the position of its summary, from the footer.
fn recording(path: &std::path::Path) -> (Vec<u8>, usize) {
    let mut writer = McapWriter::create(path).expect("a file");
    let text = schema::ros2msg(StringMsg::NAME).expect("a definition");
    let qos = offered_qos(true, false, 10);
    let channel =
        writer.add_channel("/said", StringMsg::NAME, text, Some(StringMsg::HASH), &qos).expect("a channel");
    for k in 0..10i64 {
        let message = StringMsg { data: format!("text {k}") };
        writer.write(channel, k, k, &message.encode()).expect("a message");
    }
    writer.finish().expect("a whole file");
    let bytes = std::fs::read(path).expect("the file");
    // Footer: 1 + 8 bytes of head, start of the summary, start of its offsets, CRC; then the magic.
    let footer = bytes.len() - 8 - 20;
    let start = u64::from_le_bytes(bytes[footer..footer + 8].try_into().expect("eight bytes"));
    let crc = u32::from_le_bytes(bytes[footer + 16..footer + 20].try_into().expect("four bytes"));
    assert!(start > 0 && crc != 0, "the writer writes a summary and its CRC");
    (bytes, start as usize)
}

#[test]
fn a_summary_with_a_wrong_crc_is_not_believed() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.mcap");
    let (bytes, start) = recording(&path);
    let count = || {
        let bag = open(&path, &OpenOptions::default()).expect("it opens");
        let read = bag.messages(&ReadOptions::default()).count();
        (read, bag.info().damage.len(), bag.info().topics.iter().map(|t| t.name.clone()).collect::<Vec<_>>())
    };
    assert_eq!(count(), (10, 0, vec!["/said".to_owned()]));
    // The topic's name in the summary, and nowhere else, becomes another one: still well formed.
    let at = start
        + bytes[start..].windows(5).position(|w| w == b"/said").expect("the summary repeats the channel");
    let mut changed = bytes.clone();
    changed[at..at + 5].copy_from_slice(b"/sung");
    std::fs::write(&path, &changed).expect("a file");
    let (read, damage, topics) = count();
    assert_eq!(read, 10, "what was recorded is still there");
    assert_eq!(topics, ["/said"], "the name is read from the data");
    assert!(damage > 0, "and the damage is named");
}
