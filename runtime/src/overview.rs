//! What was placed, from above: landmarks, things of the detector, the robot, imagined frames that were registered, answer.

use crate::ground::{Grounded, Scene};
use crate::image::RgbImage;
use crate::planar::Pose2;
use mindseye_bridge::geometry::planar_pose;
use mindseye_landmarks::PictureLift;
use nalgebra::Vector2;

const PAPER: [u8; 3] = [250, 249, 246];
const LANDMARK: [u8; 3] = [150, 152, 158];
const THING: [u8; 3] = [30, 150, 80];
const ROBOT: [u8; 3] = [24, 100, 200];
const IMAGINED: [u8; 3] = [214, 40, 57];
/// Around what is drawn (pixels).
const MARGIN: f64 = 16.0;

/// Planar poses of a lift's cameras that were placed, x ahead.
pub fn placed_cameras(lifted: &PictureLift) -> Vec<Pose2> {
    let ahead = mindseye_bridge::geometry::body_from_optical();
    let level = |pose: nalgebra::Isometry3<f64>| planar_pose(&(pose * ahead.inverse()));
    lifted.frames.iter().filter_map(|f| f.placed.ok()).map(|p| level(p.map_from_camera)).collect()
}

/// Draws the map, `side` pixels wide and high, y up; `None` where there is neither a landmark nor a thing.
pub fn overview(grounded: &Grounded, scene: &Scene, side: usize) -> Option<RgbImage> {
    let studied = &scene.studied;
    let landmarks: Vec<Vector2<f64>> =
        studied.landmarks.iter().flat_map(|map| map.landmarks()).map(|l| l.position.coords.xy()).collect();
    let things: Vec<Vector2<f64>> = studied.objects.iter().map(|o| o.position.coords.xy()).collect();
    if landmarks.is_empty() && things.is_empty() {
        return None;
    }
    let cameras = grounded.geometry.as_ref().map(placed_cameras).unwrap_or_default();
    let at = |p: &Pose2| Vector2::new(p.x, p.y);
    let answer = grounded.answer.pose.as_ref().map(|p| p.pose2());
    let poses = cameras.iter().chain(&scene.odom_from_base).chain(&answer).map(at);
    let all: Vec<Vector2<f64>> = poses.chain(things.iter().copied()).collect();
    let mut map = Map::around(&all, &landmarks, side);
    for place in &landmarks {
        map.disc(*place, 0.8, LANDMARK);
    }
    for place in &things {
        map.ring(*place, 5.0, THING);
    }
    for pose in &cameras {
        map.arrow(pose, IMAGINED);
    }
    if let Some(base) = scene.odom_from_base {
        map.disc(at(&base), 5.0, ROBOT);
        map.arrow(&base, ROBOT);
    }
    if let Some((x, y)) = grounded.object {
        map.ring(Vector2::new(x, y), 9.0, IMAGINED);
    }
    if let Some(pose) = answer {
        map.disc(at(&pose), 5.0, IMAGINED);
        map.arrow(&pose, IMAGINED);
    }
    Some(map.picture)
}

/// The pictures one above the other, the second below the first; the wider one says how wide.
pub fn stacked(above: Option<RgbImage>, below: Option<RgbImage>) -> Option<RgbImage> {
    let (Some(first), Some(second)) = (&above, &below) else { return above.or(below) };
    let mut out =
        RgbImage::filled(first.width.max(second.width), first.height + 4 + second.height, [20, 20, 24]);
    out.paste_scaled(first, 0, 0, 1);
    out.paste_scaled(second, 0, first.height + 4, 1);
    Some(out)
}

struct Map {
    picture: RgbImage,
    middle: Vector2<f64>,
    /// Pixels per metre.
    scale: f64,
}

impl Map {
    /// Shows all these places, and nine tenths of the landmarks along each axis.
    fn around(all: &[Vector2<f64>], landmarks: &[Vector2<f64>], side: usize) -> Self {
        let mut ends = [Vector2::repeat(f64::INFINITY), Vector2::repeat(f64::NEG_INFINITY)];
        let mut take = |p: Vector2<f64>| ends = [ends[0].inf(&p), ends[1].sup(&p)];
        all.iter().for_each(|p| take(*p));
        let sorted = |axis: usize| {
            let mut values: Vec<f64> = landmarks.iter().map(|p| p[axis]).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (x, y) = (sorted(0), sorted(1));
        for k in [landmarks.len() / 20, landmarks.len() - landmarks.len().div_ceil(20)] {
            if let (Some(x), Some(y)) = (x.get(k), y.get(k)) {
                take(Vector2::new(*x, *y));
            }
        }
        let span = (ends[1] - ends[0]).max().max(0.5);
        Self {
            picture: RgbImage::filled(side, side, PAPER),
            middle: 0.5 * (ends[0] + ends[1]),
            scale: (side as f64 - 2.0 * MARGIN).max(1.0) / span,
        }
    }

    fn pixel(&self, place: Vector2<f64>) -> Vector2<f64> {
        let off = (place - self.middle) * self.scale;
        Vector2::new(off.x, -off.y) + Vector2::repeat(0.5 * self.picture.width as f64)
    }

    /// Paints pixels around a place whose distance from it (pixels) is wanted.
    fn paint(&mut self, pixel: Vector2<f64>, reach: f64, colour: [u8; 3], wanted: impl Fn(f64) -> bool) {
        let side = self.picture.width as f64 - 1.0;
        let range = |v: f64| {
            (v - reach).floor().clamp(0.0, side) as usize..=(v + reach).ceil().clamp(0.0, side) as usize
        };
        for y in range(pixel.y) {
            for x in range(pixel.x) {
                if wanted((Vector2::new(x as f64, y as f64) - pixel).norm()) {
                    let k = 3 * (y * self.picture.width + x);
                    self.picture.data[k..k + 3].copy_from_slice(&colour);
                }
            }
        }
    }

    fn disc(&mut self, place: Vector2<f64>, radius: f64, colour: [u8; 3]) {
        self.paint(self.pixel(place), radius, colour, |d| d <= radius);
    }

    fn ring(&mut self, place: Vector2<f64>, radius: f64, colour: [u8; 3]) {
        self.paint(self.pixel(place), radius, colour, |d| d <= radius && d > radius - 2.5);
    }

    /// From a pose some way ahead.
    fn arrow(&mut self, pose: &Pose2, colour: [u8; 3]) {
        let from = self.pixel(Vector2::new(pose.x, pose.y));
        let ahead = Vector2::new(pose.yaw.cos(), -pose.yaw.sin());
        self.paint(from, 3.0, colour, |d| d <= 3.0);
        for step in 0..28 {
            self.paint(from + ahead * 0.5 * f64::from(step), 1.0, colour, |d| d <= 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_drawn_where_they_are() {
        let all = [Vector2::new(0.0, 0.0), Vector2::new(4.0, 2.0)];
        let mut map = Map::around(&all, &[], 232);
        // 200 pixels for 4 m; the middle (2, 1) is at pixel 116.
        assert_eq!((map.scale, map.pixel(all[1])), (50.0, Vector2::new(216.0, 66.0)));
        map.disc(all[0], 2.0, ROBOT);
        assert_eq!((map.picture.pixel(16, 166), map.picture.pixel(16, 170)), (ROBOT, PAPER));
        map.arrow(&Pose2::new(2.0, 1.0, std::f64::consts::FRAC_PI_2), IMAGINED);
        assert_eq!((map.picture.pixel(116, 104), map.picture.pixel(116, 128)), (IMAGINED, PAPER));
        map.disc(Vector2::new(900.0, -900.0), 2.0, ROBOT);
    }

    #[test]
    fn pictures_are_stacked() {
        let (a, b) = (RgbImage::filled(6, 2, [1; 3]), RgbImage::filled(4, 3, [2; 3]));
        let both = stacked(Some(a.clone()), Some(b)).unwrap();
        assert_eq!((both.width, both.height, both.pixel(3, 8)), (6, 9, [2; 3]));
        assert_eq!(stacked(Some(a.clone()), None), Some(a));
        assert_eq!(stacked(None, None), None);
    }
}
