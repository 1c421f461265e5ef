//! Messages of the schemas, as bytes.

use crate::planar::Pose2;
use mindseye_engines::protobuf::Writer;

/// Red, green, blue, opacity: 0 to 1.
pub type Colour = [f64; 4];

/// What a line of the log is worth (`foxglove.Log.Level`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Fine detail.
    Debug = 1,
    /// What happens.
    Info = 2,
    /// What should not last.
    Warning = 3,
}

fn time(out: &mut Writer, field: u32, stamp_ns: i64) {
    out.message(field, |t| {
        t.int(1, stamp_ns.div_euclid(1_000_000_000));
        t.int(2, stamp_ns.rem_euclid(1_000_000_000));
    });
}

/// `Vector3`, `Point3`.
fn triple(out: &mut Writer, field: u32, xyz: [f64; 3]) {
    out.message(field, |v| (1..).zip(xyz).for_each(|(i, x)| v.double(i, x)));
}

fn pose(out: &mut Writer, field: u32, p: Pose2, z: f64) {
    out.message(field, |out| {
        triple(out, 1, [p.x, p.y, z]);
        let half = p.yaw / 2.0;
        out.message(2, |q| (1..).zip([0.0, 0.0, half.sin(), half.cos()]).for_each(|(i, x)| q.double(i, x)));
    });
}

fn colour(out: &mut Writer, field: u32, rgba: Colour) {
    out.message(field, |c| (1..).zip(rgba).for_each(|(i, x)| c.double(i, x)));
}

/// `foxglove.CompressedImage`; `format` is `jpeg`, `png` or another that people's viewers read.
pub fn compressed_image(stamp_ns: i64, frame: &str, format: &str, file: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    time(&mut out, 1, stamp_ns);
    out.data(2, file);
    out.text(3, format);
    out.text(4, frame);
    out.bytes
}

/// `foxglove.PosesInFrame`.
pub fn poses_in_frame(stamp_ns: i64, frame: &str, poses: impl IntoIterator<Item = Pose2>) -> Vec<u8> {
    let mut out = Writer::default();
    time(&mut out, 1, stamp_ns);
    out.text(2, frame);
    poses.into_iter().for_each(|p| pose(&mut out, 3, p, 0.0));
    out.bytes
}

/// `foxglove.Log`.
pub fn log(stamp_ns: i64, level: Level, name: &str, message: &str) -> Vec<u8> {
    let mut out = Writer::default();
    time(&mut out, 1, stamp_ns);
    out.int(2, level as i64);
    out.text(3, message);
    out.text(4, name);
    out.bytes
}

/// `foxglove.SceneUpdate`: entities that take the place of all before.
pub struct Scene<'a> {
    out: Writer,
    stamp_ns: i64,
    frame: &'a str,
}

impl<'a> Scene<'a> {
    /// An empty scene.
    pub fn new(stamp_ns: i64, frame: &'a str) -> Self {
        let mut out = Writer::default();
        out.message(1, |deletion| {
            time(deletion, 1, stamp_ns);
            deletion.int(2, 1); // all
        });
        Self { out, stamp_ns, frame }
    }

    fn entity(&mut self, id: &str, build: impl FnOnce(&mut Writer)) {
        let (stamp_ns, frame) = (self.stamp_ns, self.frame);
        self.out.message(2, |out| {
            time(out, 1, stamp_ns);
            out.text(2, frame);
            out.text(3, id);
            build(out);
        });
    }

    /// An arrow of half a metre.
    pub fn arrow(&mut self, id: &str, at: Pose2, rgba: Colour) {
        self.entity(id, |out| {
            out.message(7, |arrow| {
                pose(arrow, 1, at, 0.05);
                (2..).zip([0.35, 0.06, 0.15, 0.14]).for_each(|(field, metres)| arrow.double(field, metres));
                colour(arrow, 6, rgba);
            });
        });
    }

    /// A ball with a name above it.
    pub fn ball(&mut self, id: &str, (x, y): (f64, f64), diameter_m: f64, rgba: Colour, name: &str) {
        self.entity(id, |out| {
            let at = Pose2::new(x, y, 0.0);
            out.message(9, |ball| {
                pose(ball, 1, at, diameter_m / 2.0);
                triple(ball, 2, [diameter_m; 3]);
                colour(ball, 3, rgba);
            });
            out.message(13, |text| {
                pose(text, 1, at, diameter_m + 0.15);
                text.int(2, 1); // turned to whoever looks
                text.double(3, 0.15);
                colour(text, 5, rgba);
                text.text(6, name);
            });
        });
    }

    /// A line along points, closed or not.
    pub fn line(&mut self, id: &str, points: &[(f64, f64)], is_closed: bool, rgba: Colour) {
        self.entity(id, |out| {
            out.message(11, |line| {
                line.int(1, i64::from(is_closed));
                pose(line, 2, Pose2::default(), 0.0);
                line.double(3, 0.03);
                points.iter().for_each(|(x, y)| triple(line, 5, [*x, *y, 0.02]));
                colour(line, 6, rgba);
            });
        });
    }

    /// Many small cubes.
    pub fn dots(&mut self, id: &str, points: &[(f64, f64)], rgba: Colour) {
        self.entity(id, |out| {
            for (x, y) in points {
                out.message(8, |cube| {
                    pose(cube, 1, Pose2::new(*x, *y, 0.0), 0.02);
                    triple(cube, 2, [0.03; 3]);
                    colour(cube, 3, rgba);
                });
            }
        });
    }

    /// The message.
    pub fn bytes(self) -> Vec<u8> {
        self.out.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_as_it_is_on_the_wire() {
        // By hand: timestamp { 1, 500 }, data "ab", format "png", frame_id "f".
        let want = b"\x0a\x05\x08\x01\x10\xf4\x03\x12\x02ab\x1a\x03png\x22\x01f";
        assert_eq!(compressed_image(1_000_000_500, "f", "png", b"ab"), want);
        // A quarter turn: the sine and the cosine of an eighth.
        let bytes = poses_in_frame(0, "odom", [Pose2::new(1.0, 2.0, std::f64::consts::FRAC_PI_2)]);
        let near = |w: &&[u8]| (f64::from_le_bytes((*w).try_into().unwrap()) - 0.5f64.sqrt()).abs() < 1e-12;
        assert_eq!(bytes.windows(8).filter(near).count(), 2, "sine and cosine of half the angle");
    }
}
