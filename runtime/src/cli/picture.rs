//! `imagination.png`: what the robot saw, what it imagined, and where that leads. Large enough to be read at two
//! thirds of its size.

use crate::image::RgbImage;
use crate::planar::Pose2;
use mindseye_world::draw::{Canvas, text_width};
use mindseye_world::{House, MapView, draw_path, draw_pose, draw_robot, top_down_named};

/// What is drawn.
pub struct Picture<'a> {
    /// The goal's text.
    pub goal: &'a str,
    /// One or two lines about how it went.
    pub lines: &'a [String],
    /// Latents in memory, of which `context` was used.
    pub remembered: usize,
    /// Frames of the memory that were used.
    pub context: &'a [RgbImage],
    /// Frames of the imagined drive, four per latent.
    pub imagined: &'a [RgbImage],
    /// Box in the last imagined frames, in their pixels.
    pub found_box: Option<[f64; 4]>,
    /// What the camera really sees where the robot stands now, [`VIEW`] pixels.
    pub view: Option<&'a RgbImage>,
    /// Whether the robot has gone anywhere.
    pub moved: bool,
    /// The house.
    pub house: &'a House,
    /// Where the robot was when it asked.
    pub asked_at: Pose2,
    /// Path really driven.
    pub driven: &'a [Pose2],
    /// Path of the imagined drive.
    pub path: &'a [Pose2],
    /// Goal pose of the answer.
    pub answer: Option<Pose2>,
    /// Goal pose by the truth.
    pub truth: Option<Pose2>,
    /// Object's place according to the answer.
    pub object: Option<(f64, f64)>,
    /// Landmarks, where they are kept.
    pub landmarks: &'a [(f64, f64)],
    /// Where the imagined frames were registered among what was seen, or by landmarks.
    pub registered: &'a [Pose2],
}

const PAPER: [u8; 3] = [250, 249, 246];
const INK: [u8; 3] = [32, 34, 40];
const SOFT: [u8; 3] = [96, 100, 110];
const IMAGINED: [u8; 3] = [214, 40, 57];
const DRIVEN: [u8; 3] = [24, 100, 200];
const TRUTH: [u8; 3] = [30, 150, 80];
const BOX: [u8; 3] = [255, 214, 10];
const MARGIN: usize = 32;
const WIDTH: usize = 1280;
const INNER: usize = WIDTH - 2 * MARGIN;
/// Height of a line of text of [`LABEL`] size, with what is around it.
const LINE: usize = 36;
const LABEL: usize = 3;
/// Most frames in a row.
const IN_A_ROW: usize = 8;
/// Size of the view.
pub const VIEW: (usize, usize) = (576, 384);

fn world(p: Pose2) -> mindseye_world::Pose2 {
    mindseye_world::Pose2::unwrapped(p.x, p.y, p.yaw)
}

/// At most [`IN_A_ROW`] of these, evenly, the first and the last among them.
fn shown<T: Copy>(all: &[T]) -> Vec<T> {
    crate::context::spread(all.len(), IN_A_ROW).into_iter().map(|i| all[i]).collect()
}

/// Where the frames of a row lie: left edges, and the size of one.
struct Row {
    lefts: Vec<usize>,
    size: (usize, usize),
}

impl Row {
    /// Small frames are enlarged by whole pixels, large ones shrunk, so that `count` of them fill the width.
    fn new(frame: &RgbImage, count: usize) -> Self {
        let count = count.max(1);
        let room = ((INNER + 12) / count.max(4)).saturating_sub(12).max(1);
        let size = match room / frame.width.max(1) {
            0 => (room, (room * frame.height / frame.width.max(1)).max(1)),
            zoom => (frame.width * zoom, frame.height * zoom),
        };
        let gap = if count < 4 { 12 } else { (INNER - count * size.0) / (count - 1) };
        Self { lefts: (0..count).map(|i| MARGIN + i * (size.0 + gap.min(24))).collect(), size }
    }
}

/// One row of frames; the box is drawn over the last one. Returns its height.
fn strip(canvas: &mut Canvas, top: usize, frames: &[&RgbImage], found_box: Option<[f64; 4]>) -> usize {
    let Some(first) = frames.first() else { return 0 };
    let row = Row::new(first, frames.len());
    let (width, height) = row.size;
    for (frame, left) in frames.iter().zip(&row.lefts) {
        let (x, y) = (*left as i64, top as i64);
        if width >= frame.width {
            canvas.blit(x, y, &frame.data, frame.width, width / frame.width.max(1));
        } else {
            canvas.blit_scaled(x, y, width, height, (&frame.data, frame.width));
        }
    }
    if let (Some(edges), Some(left)) = (found_box, row.lefts.last()) {
        let scale = width as f64 / first.width as f64;
        let at = |v: f64| (v * scale).round() as i64;
        let (x0, y0) = (*left as i64 + at(edges[0]), top as i64 + at(edges[1]));
        let (x1, y1) = (*left as i64 + at(edges[2]), top as i64 + at(edges[3]));
        for (inset, colour) in [(-6i64, INK), (-4, BOX)] {
            let size = |a: i64, b: i64| (b - a - 2 * inset).max(1) as usize;
            canvas.outline_rect(x0 + inset, y0 + inset, size(x0, x1), size(y0, y1), 4, colour);
        }
    }
    height
}

/// A row with its label.
fn labelled(
    canvas: &mut Canvas,
    top: usize,
    label: &str,
    frames: &[&RgbImage],
    found_box: Option<[f64; 4]>,
) -> usize {
    canvas.text(MARGIN as i64, top as i64, label, LABEL, SOFT);
    let top = top + LINE;
    if frames.is_empty() {
        canvas.text(MARGIN as i64, top as i64, "(nothing)", LABEL, SOFT);
        return 2 * LINE;
    }
    LINE + strip(canvas, top, frames, found_box) + 24
}

fn row_height(frames: &[&RgbImage]) -> usize {
    frames.first().map_or(2 * LINE, |f| LINE + Row::new(f, frames.len()).size.1 + 24)
}

/// Draws it.
pub fn draw(p: &Picture<'_>) -> Option<RgbImage> {
    let context = shown(&p.context.iter().collect::<Vec<_>>());
    let imagined = shown(&p.imagined.iter().skip(3).step_by(4).collect::<Vec<_>>());
    let legend = legend(p);
    // Beside the map: label, view, legend.
    let right = LINE + VIEW.1 + 28 + legend.len() * LINE;
    let map_width = INNER - VIEW.0 - MARGIN;
    let head = 28 + 44 + p.lines.len() * LINE + 12;
    let map_top = head + row_height(&context) + row_height(&imagined);
    let height = map_top + right + MARGIN - 8;
    let mut canvas = Canvas::new(WIDTH, height, PAPER);
    let left = MARGIN as i64;

    let title = format!("\"{}\"", shorten(p.goal, INNER / (6 * 5) - 2));
    canvas.text(left, 28, &title, 5, INK);
    for (i, line) in p.lines.iter().enumerate() {
        let line = shorten(line, INNER / (6 * LABEL));
        canvas.text(left, (28 + 48 + i * LINE) as i64, &line, LABEL, INK);
    }
    let label = format!("What it remembers: {} of {} moments", p.context.len(), p.remembered);
    let mut top = head;
    top += labelled(&mut canvas, top, &label, &context, None);
    let label = "What it imagines: the way there, then a red box around it";
    top += labelled(&mut canvas, top, label, &imagined, p.found_box);

    canvas.text(left, top as i64, "The house from above", LABEL, SOFT);
    let map_height = right - LINE;
    let map = map(p, map_width, map_height);
    canvas.blit(left, (top + LINE) as i64, &map.rgb, map_width, 1);

    let x = (MARGIN + map_width + MARGIN) as i64;
    let label = if p.moved { "What its camera sees there" } else { "What its camera sees now" };
    canvas.text(x, top as i64, label, LABEL, SOFT);
    let mut y = (top + LINE) as i64;
    match p.view {
        Some(view) => canvas.blit(x, y, &view.data, view.width, 1),
        None => canvas.fill_rect(x, y, VIEW.0, VIEW.1, [226, 224, 218]),
    }
    y += VIEW.1 as i64 + 28;
    for (sign, text) in legend {
        let middle = (x as f32 + 26.0, y as f32 + 11.0);
        let ends = ((middle.0 - 22.0, middle.1), (middle.0 + 22.0, middle.1));
        match sign {
            Sign::Way(colour) => canvas.line(ends.0, ends.1, 5.0, colour),
            Sign::Pose(colour) => canvas.arrow(ends.0, ends.1, 5.0, colour),
            Sign::Dart(colour) => draw_dart(&mut canvas, middle, 0.0, 26.0, colour),
            Sign::Ring(colour) => canvas.circle(middle, 11.0, 4.0, colour),
            Sign::Robot(colour) => canvas.disc(middle, 12.0, colour),
            Sign::Frame(colour) => {
                canvas.outline_rect(middle.0 as i64 - 16, middle.1 as i64 - 12, 32, 24, 6, INK);
                canvas.outline_rect(middle.0 as i64 - 15, middle.1 as i64 - 11, 30, 22, 4, colour);
            }
        }
        canvas.text(x + 64, y, text, LABEL, INK);
        y += LINE as i64;
    }
    RgbImage::from_rgb(canvas.width, canvas.height, canvas.rgb)
}

/// Signs of the legend, as they are on the map.
enum Sign {
    Way([u8; 3]),
    Pose([u8; 3]),
    Dart([u8; 3]),
    Ring([u8; 3]),
    Robot([u8; 3]),
    Frame([u8; 3]),
}

/// Only what is there.
fn legend(p: &Picture<'_>) -> Vec<(Sign, &'static str)> {
    let entries = [
        (true, Sign::Robot(DRIVEN), "the robot when it was asked"),
        (!p.landmarks.is_empty(), Sign::Robot(SOFT), "landmarks"),
        (!p.path.is_empty(), Sign::Way(IMAGINED), "the way it imagined"),
        (!p.registered.is_empty(), Sign::Dart(BOX), "its frames, registered"),
        (p.answer.is_some(), Sign::Pose(IMAGINED), "its answer: stand here"),
        (p.object.is_some(), Sign::Ring(IMAGINED), "where it says the thing is"),
        (p.truth.is_some(), Sign::Pose(TRUTH), "the true goal"),
        (p.moved, Sign::Way(DRIVEN), "the way it drove"),
        (p.found_box.is_some(), Sign::Frame(BOX), "the box that was found"),
    ];
    entries.into_iter().filter(|(there, ..)| *there).map(|(_, sign, text)| (sign, text)).collect()
}

fn map(p: &Picture<'_>, width: usize, height: usize) -> Canvas {
    let view = MapView::fit(p.house, width, height);
    let mut map = Canvas::new(width, height, PAPER);
    top_down_named(p.house, &view, &mut map, 2);
    let convert = |poses: &[Pose2]| poses.iter().copied().map(world).collect::<Vec<_>>();
    if p.moved {
        draw_path(&view, &mut map, &convert(p.driven), 0, DRIVEN);
    }
    for (x, y) in p.landmarks {
        map.disc(view.pixel(*x, *y), 1.2, SOFT);
    }
    draw_robot(&view, &mut map, world(p.asked_at), DRIVEN);
    draw_path(&view, &mut map, &convert(p.path), 0, IMAGINED);
    for pose in p.registered {
        draw_dart(&mut map, view.pixel(pose.x, pose.y), pose.yaw as f32, 26.0, BOX);
    }
    if let Some(truth) = p.truth {
        draw_pose(&view, &mut map, world(truth), 0.5, TRUTH);
    }
    if let Some(answer) = p.answer {
        draw_pose(&view, &mut map, world(answer), 0.5, IMAGINED);
    }
    if let Some((x, y)) = p.object {
        map.circle(view.pixel(x, y), view.length(0.22), 4.0, IMAGINED);
    }
    map
}

/// A dart of a length (pixels) that points where a pose looks, with a dark edge: paper swallows its colour.
fn draw_dart(canvas: &mut Canvas, at: (f32, f32), yaw: f32, length: f32, colour: [u8; 3]) {
    let (sin, cos) = yaw.sin_cos();
    for (length, colour) in [(length + 8.0, INK), (length, colour)] {
        let corner = |ahead: f32, aside: f32| {
            (at.0 + length * (ahead * cos - aside * sin), at.1 - length * (ahead * sin + aside * cos))
        };
        canvas.polygon(&[corner(0.6, 0.0), corner(-0.4, 0.36), corner(-0.4, -0.36)], colour);
    }
}

/// A text that is cut off where it is too long.
fn shorten(text: &str, chars: usize) -> String {
    debug_assert!(text_width("a", 1) == 6, "lines are measured in characters of six pixels");
    if text.chars().count() <= chars {
        return text.to_owned();
    }
    text.chars().take(chars.saturating_sub(3)).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fit_whatever_the_frames() {
        for (width, height) in [(24, 16), (416, 256), (96, 64), (2000, 3)] {
            let frame = RgbImage::filled(width, height, [9; 3]);
            for count in 1..=IN_A_ROW {
                let row = Row::new(&frame, count);
                let last = row.lefts[count - 1] + row.size.0;
                assert!(row.size.0 > 0 && row.size.1 > 0);
                assert!(last <= MARGIN + INNER, "{count} of {width}x{height} end at {last}");
                assert!(row.lefts.windows(2).all(|w| w[1] >= w[0] + row.size.0), "they do not overlap");
            }
        }
    }

    #[test]
    fn texts_are_cut_and_frames_are_few() {
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("abcdefgh", 6), "abc...");
        let numbers: Vec<usize> = (0..46).collect();
        let few = shown(&numbers);
        assert_eq!((few.len(), few[0], few[7]), (8, 0, 45));
    }

    #[test]
    fn a_goal_without_an_answer_is_drawn_too() {
        let house = House::generate(3, &mindseye_world::Difficulty::plain());
        let frames = vec![RgbImage::filled(24, 16, [50, 90, 130]); 24];
        let mut picture = Picture {
            goal: "find the red chair that stands beside the very long table in the far corner",
            lines: &["not_in_context".into()],
            remembered: 0,
            context: &[],
            imagined: &[],
            found_box: None,
            view: None,
            moved: false,
            house: &house,
            asked_at: Pose2::default(),
            driven: &[],
            path: &[],
            answer: None,
            truth: None,
            object: None,
            landmarks: &[],
            registered: &[],
        };
        let bare = draw(&picture).unwrap();
        assert_eq!(bare.width, WIDTH);
        picture.context = &frames[..6];
        picture.imagined = &frames;
        picture.found_box = Some([3.0, 2.0, 9.0, 8.0]);
        let full = draw(&picture).unwrap();
        assert!(full.height > bare.height);
        let landmarks: Vec<(f64, f64)> = (0..40).map(|k| (0.1 * f64::from(k), 1.0)).collect();
        picture.landmarks = &landmarks;
        let placed = draw(&picture).unwrap();
        let count = |p: &RgbImage, colour: [u8; 3]| p.data.chunks(3).filter(|c| *c == colour).count();
        assert!(count(&placed, SOFT) > count(&full, SOFT), "landmarks are on the map");
        let registered = [Pose2::new(house.bounds.centre().0, house.bounds.centre().1, 0.5)];
        picture.registered = &registered;
        let marked = draw(&picture).unwrap();
        assert!(
            count(&marked, BOX) > count(&placed, BOX) + 100,
            "registered frames are on the map and in the legend"
        );
    }
}
