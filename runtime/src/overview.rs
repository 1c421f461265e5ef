//! What was placed, from above: landmarks, things of the detector, kept frames, imagined frames that were registered, the
//! answer. Beside the map is a legend, where the program has letters (feature `world`).

use crate::ground::{Grounded, Scene};
use crate::image::RgbImage;
use crate::planar::Pose2;
use mindseye_base::scale::Scaler;
use nalgebra::Vector2;

const PAPER: [u8; 3] = [250, 249, 246];
const INK: [u8; 3] = [32, 34, 40];
const LANDMARK: [u8; 3] = [140, 142, 150];
const KEPT: [u8; 3] = [120, 165, 215];
const THING: [u8; 3] = [30, 150, 80];
const ROBOT: [u8; 3] = [24, 100, 200];
const FRAME: [u8; 3] = [232, 156, 0];
const ANSWER: [u8; 3] = [214, 40, 57];
/// Around what is drawn (pixels).
const MARGIN: f64 = 20.0;

/// How a place is drawn; sizes in pixels.
#[derive(Clone, Copy)]
enum Sign {
    /// A disc of a radius.
    Dot(f64, [u8; 3]),
    /// A circle of a radius.
    Ring(f64, [u8; 3]),
    /// A dart of a length that points where the pose looks.
    Dart(f64, [u8; 3]),
}

/// Places of one kind.
struct Layer {
    sign: Sign,
    /// For the legend, whose letters are the world's.
    #[cfg_attr(not(feature = "world"), expect(dead_code))]
    text: &'static str,
    places: Vec<Pose2>,
}

/// What there is, in the order in which it is drawn; kinds without a place are left out.
fn layers(grounded: &Grounded, scene: &Scene) -> Vec<Layer> {
    let studied = &scene.studied;
    let at = |x: f64, y: f64| Pose2::new(x, y, 0.0);
    let landmarks = studied.landmarks.iter().flat_map(|map| map.landmarks());
    let landmarks = landmarks.map(|l| at(l.position.x, l.position.y)).collect();
    let kept = scene.memory.iter().filter_map(|seen| seen.info.odom_from_base).collect();
    let things = studied.objects.iter().map(|o| at(o.position.x, o.position.y)).collect();
    let object = grounded.object.iter().map(|(x, y)| at(*x, *y)).collect();
    let answer = grounded.answer.pose.iter().map(|p| p.pose2()).collect();
    let robot = scene.odom_from_base.into_iter().collect();
    let layer = |sign, text, places| Layer { sign, text, places };
    let all = [
        layer(LANDMARK_SIGN, "landmarks", landmarks),
        layer(Sign::Dot(2.5, KEPT), "where remembered frames were taken", kept),
        layer(Sign::Ring(6.0, THING), "things that the detector placed", things),
        layer(Sign::Ring(12.0, ROBOT), "the robot when it was asked", robot),
        layer(Sign::Dart(18.0, FRAME), "imagined frames, where registered", grounded.registered.clone()),
        layer(Sign::Ring(10.0, ANSWER), "where the thing is said to be", object),
        layer(Sign::Dart(24.0, ANSWER), "the answer: stand here", answer),
    ];
    all.into_iter().filter(|l| !l.places.is_empty()).collect()
}

const LANDMARK_SIGN: Sign = Sign::Dot(1.2, LANDMARK);

/// Draws the map, `side` pixels high, y up, and the legend beside it; `None` where there is neither a landmark nor a thing nor a
/// registered frame.
pub fn overview(grounded: &Grounded, scene: &Scene, side: usize) -> Option<RgbImage> {
    let studied = &scene.studied;
    let known = studied.landmarks.as_ref().is_some_and(|map| !map.is_empty()) || !studied.objects.is_empty();
    if !known && grounded.registered.is_empty() {
        return None;
    }
    let layers = layers(grounded, scene);
    let map = draw(&layers, side);
    Some(with_legend(&map, &layers, grounded))
}

fn draw(layers: &[Layer], side: usize) -> RgbImage {
    let places = |of_landmarks: bool| -> Vec<Vector2<f64>> {
        let chosen = layers.iter().filter(|l| matches!(l.sign, Sign::Dot(_, LANDMARK)) == of_landmarks);
        chosen.flat_map(|l| l.places.iter().map(|p| Vector2::new(p.x, p.y))).collect()
    };
    let view = View::around(&places(false), &places(true), side);
    let mut picture = RgbImage::filled(side, side, PAPER);
    for layer in layers {
        for pose in &layer.places {
            layer.sign.draw(&mut picture, view.pixel(Vector2::new(pose.x, pose.y)), pose.yaw);
        }
    }
    // A metre.
    let (half, low) = (0.5 * view.scale, side as f64 - 0.5 * MARGIN);
    paint(&mut picture, Vector2::new(MARGIN + half, low), half, INK, |d| {
        d.x.abs() <= half && d.y.abs() <= 1.0
    });
    for x in [MARGIN, MARGIN + view.scale] {
        paint(&mut picture, Vector2::new(x, low), 5.0, INK, |d| d.x.abs() <= 1.0 && d.y.abs() <= 5.0);
    }
    picture
}

/// The pictures one above the other. A first one that is wider than the second is reduced to its width.
pub fn stacked(above: Option<RgbImage>, below: Option<RgbImage>) -> Option<RgbImage> {
    let (Some(first), Some(second)) = (&above, &below) else { return above.or(below) };
    let first = &reduced(first, second.width);
    let mut out =
        RgbImage::filled(first.width.max(second.width), first.height + 4 + second.height, [20, 20, 24]);
    out.paste_scaled(first, 0, 0, 1);
    out.paste_scaled(second, 0, first.height + 4, 1);
    Some(out)
}

/// A picture at most so wide, of the same shape.
fn reduced(picture: &RgbImage, width: usize) -> RgbImage {
    let (from, height) = (picture.width, picture.height);
    if from <= width {
        return picture.clone();
    }
    let to = (width, (height * width / from).max(1));
    let mut data = Vec::with_capacity(3 * to.0 * to.1);
    // The picture is of its own size.
    let _ = Scaler::new((from, height), to)
        .scale(&picture.data, |rgb| data.extend(rgb.map(|v| v.round().clamp(0.0, 255.0) as u8)));
    RgbImage::from_rgb(to.0, to.1, data).unwrap_or_else(|| picture.clone())
}

/// Letters are `6 * ZOOM` pixels wide; a line is this high.
#[cfg(feature = "world")]
const ZOOM: usize = 2;
#[cfg(feature = "world")]
const LINE: usize = 28;

/// The map, and what its signs mean and what was answered beside it.
#[cfg(feature = "world")]
fn with_legend(map: &RgbImage, layers: &[Layer], grounded: &Grounded) -> RgbImage {
    let letters = map.width / (6 * ZOOM) - 4;
    let mut lines = vec![format!("From above: {}", grounded.answer.status)];
    lines.extend(grounded.answer.reason.iter().flat_map(|reason| wrapped(reason, letters)));
    let mut picture = RgbImage::filled(2 * map.width, map.height, PAPER);
    picture.paste_scaled(map, 0, 0, 1);
    let left = map.width + 12;
    let top = LINE * (lines.len() + 1);
    let row = |k: usize| top + k * LINE;
    for (k, layer) in layers.iter().enumerate() {
        // A single landmark would be too small to be seen.
        let sign = if let Sign::Dot(radius, colour) = layer.sign {
            Sign::Dot(radius + 1.5, colour)
        } else {
            layer.sign
        };
        sign.draw(&mut picture, Vector2::new(left as f64 + 18.0, row(k) as f64 + 7.0), 0.0);
    }
    let RgbImage { width, height, data } = picture;
    let Some(mut canvas) = mindseye_world::draw::Canvas::from_rgb(width, height, data) else {
        return map.clone();
    };
    let mut write = |x: usize, y: usize, text: &str| {
        canvas.text(x as i64, y as i64, text, ZOOM, INK);
    };
    for (k, line) in lines.iter().enumerate() {
        write(left, LINE / 2 + k * LINE, line);
    }
    for (k, layer) in layers.iter().enumerate() {
        let count = match layer.places.len() {
            1 => String::new(),
            n => format!(" ({n})"),
        };
        write(left + 44, row(k), &format!("{}{count}", layer.text));
    }
    write(left + 44, row(layers.len()), "the bar on the map is 1 m");
    RgbImage::from_rgb(width, height, canvas.rgb).unwrap_or_else(|| map.clone())
}

#[cfg(not(feature = "world"))]
fn with_legend(map: &RgbImage, _: &[Layer], _: &Grounded) -> RgbImage {
    map.clone()
}

/// A text in lines of at most so many letters, where its words allow that.
#[cfg(feature = "world")]
fn wrapped(text: &str, letters: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= letters => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Where places lie on the map.
struct View {
    middle: Vector2<f64>,
    /// Pixels per metre.
    scale: f64,
    side: usize,
}

impl View {
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
        let scale = (side as f64 - 2.0 * MARGIN).max(1.0) / span;
        Self { middle: 0.5 * (ends[0] + ends[1]), scale, side }
    }

    fn pixel(&self, place: Vector2<f64>) -> Vector2<f64> {
        let off = (place - self.middle) * self.scale;
        Vector2::new(off.x, -off.y) + Vector2::repeat(0.5 * self.side as f64)
    }
}

impl Sign {
    /// At a pixel; `yaw` is counted from the right towards the top.
    fn draw(self, picture: &mut RgbImage, at: Vector2<f64>, yaw: f64) {
        match self {
            Self::Dot(radius, colour) => paint(picture, at, radius, colour, |d| d.norm() <= radius),
            Self::Ring(radius, colour) => {
                paint(picture, at, radius, colour, |d| (radius - 2.5..=radius).contains(&d.norm()));
            }
            Self::Dart(length, colour) => {
                // A third of it lies behind the place; white around it keeps it apart from others.
                let (ahead, aside) =
                    (Vector2::new(yaw.cos(), -yaw.sin()), Vector2::new(yaw.sin(), yaw.cos()));
                let within = |d: Vector2<f64>, grown: f64| {
                    let along = d.dot(&ahead) + length / 3.0;
                    along >= -grown
                        && along <= length + grown
                        && d.dot(&aside).abs() <= 0.35 * (length - along) + grown
                };
                paint(picture, at, length + 2.0, [255; 3], |d| within(d, 1.5));
                paint(picture, at, length, colour, |d| within(d, 0.0));
            }
        }
    }
}

/// Paints what is wanted of the pixels around a place, by their offset from it (pixels): each by the share of it.
fn paint(
    picture: &mut RgbImage,
    at: Vector2<f64>,
    reach: f64,
    colour: [u8; 3],
    wanted: impl Fn(Vector2<f64>) -> bool,
) {
    const PARTS: [f64; 3] = [-1.0 / 3.0, 0.0, 1.0 / 3.0];
    let range = |v: f64, size: usize| {
        let end = size as f64;
        (v - reach - 1.0).floor().clamp(0.0, end) as usize..(v + reach + 2.0).ceil().clamp(0.0, end) as usize
    };
    let width = picture.width;
    for y in range(at.y, picture.height) {
        for x in range(at.x, width) {
            let offset = Vector2::new(x as f64, y as f64) - at;
            let parts = PARTS.iter().flat_map(|dy| PARTS.map(|dx| Vector2::new(dx, *dy)));
            let hit = parts.filter(|part| wanted(offset + part)).count();
            for (value, wanted) in picture.data[3 * (y * width + x)..].iter_mut().zip(colour) {
                let mixed = hit * usize::from(wanted) + (9 - hit) * usize::from(*value);
                *value = (mixed as f64 / 9.0).round() as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(x: f64, y: f64) -> Pose2 {
        Pose2::new(x, y, 0.0)
    }

    #[test]
    fn places_are_drawn_where_they_are() {
        let view = View::around(&[Vector2::new(0.0, 0.0), Vector2::new(4.0, 2.0)], &[], 240);
        // 200 pixels for 4 m; the middle (2, 1) is at pixel 120.
        assert_eq!((view.scale, view.pixel(Vector2::new(4.0, 2.0))), (50.0, Vector2::new(220.0, 70.0)));
        let layer = |sign, places| Layer { sign, text: "", places };
        let up = Pose2::new(2.0, 1.0, std::f64::consts::FRAC_PI_2);
        let mut landmarks = vec![place(3.0, 1.0); 30];
        landmarks.push(place(900.0, -900.0));
        let layers = [
            layer(LANDMARK_SIGN, landmarks),
            layer(Sign::Ring(6.0, THING), vec![place(0.0, 0.0)]),
            layer(Sign::Dart(18.0, FRAME), vec![up, place(4.0, 2.0)]),
        ];
        let picture = draw(&layers, 240);
        // The one far away is not among the nine tenths that are shown.
        assert_eq!(picture.pixel(170, 120), LANDMARK);
        assert_eq!((picture.pixel(20, 165), picture.pixel(20, 170)), (THING, PAPER));
        // The dart points up: nothing below its end, and its colour above the place.
        assert_eq!((picture.pixel(120, 116), picture.pixel(120, 132)), (FRAME, PAPER));
    }

    #[test]
    fn pictures_are_stacked_and_the_wider_is_reduced() {
        let (a, b) = (RgbImage::filled(8, 4, [1; 3]), RgbImage::filled(4, 3, [2; 3]));
        let both = stacked(Some(a.clone()), Some(b.clone())).unwrap();
        assert_eq!((both.width, both.height, both.pixel(3, 1), both.pixel(3, 7)), (4, 9, [1; 3], [2; 3]));
        let both = stacked(Some(b), Some(a.clone())).unwrap();
        assert_eq!((both.width, both.height, both.pixel(3, 2), both.pixel(7, 8)), (8, 11, [2; 3], [1; 3]));
        assert_eq!(stacked(Some(a.clone()), None), Some(a));
        assert_eq!(stacked(None, None), None);
    }

    #[cfg(feature = "world")]
    #[test]
    fn texts_are_broken_between_words() {
        assert_eq!(wrapped("one two three  four", 8), ["one two", "three", "four"]);
        assert_eq!(wrapped("unbreakable", 4), ["unbreakable"]);
    }
}
