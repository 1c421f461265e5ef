//! `mindseye-tools world`: pictures and recordings of the procedural house.
//!
//! * `world render` draws one house: a fine picture with names, the map from above, and one turn of exploration.
//! * `world record` writes what a ROS 2 robot would record while it explores: an MCAP file, and beside it the truth.
//!
//! Both are functions of their arguments: the same seed gives the same bytes.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use mindseye_base::file::write_atomically;
use mindseye_base::picture::save_png;
use mindseye_bridge::bag::{ChannelId, McapWriter, offered_qos, schema};
use mindseye_bridge::geometry::{Covariance6, planar_isometry};
use mindseye_bridge::msg::{
    CameraInfo, Header, Image, Odometry, Pose, PoseWithCovariance, RosType, TFMessage, TransformStamped,
    Twist, TwistWithCovariance, Vector3,
};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_world::draw::{Canvas, text_width};
use mindseye_world::{
    Camera, Difficulty, Frame, House, MapView, Pose2, RANDOM_DRIVE_DT_SECS, RenderOptions, Rng, draw_path,
    draw_robot, draw_view, exploration_sweep, random_drive_from, render_with, scenic_pose, top_down,
    wrap_angle,
};
use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion};
use serde::Serialize;
use serde_json::json;

/// Stamp of a recording's first message: 2023-11-14 22:13:20 UTC.
pub const FIRST_STAMP: Timestamp = Timestamp(1_700_000_000 * 1_000_000_000);

/// Time of one exploration turn in one room at natural speed (s): 97 frames at 10 Hz, about 3.75 degrees each.
pub const TURN_SECS: f64 = 9.6;

/// Arguments of `world`.
#[derive(clap::Args, Debug)]
pub struct WorldArgs {
    #[command(subcommand)]
    command: WorldCommand,
}

#[derive(clap::Subcommand, Debug)]
enum WorldCommand {
    /// A picture of a house with a map from above.
    Render(RenderArgs),
    /// A ROS 2 recording of a robot that explores a house, and the truth beside it.
    Record(RecordArgs),
    /// Makes the furniture file of furnished houses from a library of models.
    Furniture(crate::furniture::FurnitureArgs),
}

#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools world render --seed 7 --difficulty house --out house.png")]
struct RenderArgs {
    /// Seed of the house.
    #[arg(long)]
    seed: u64,
    /// The picture (PNG).
    #[arg(long)]
    out: PathBuf,
    /// `plain`: one room; `house`: two to four rooms joined by doors; `furnished`: one room with real furniture;
    /// `apartment`: furnished rooms joined by doors.
    #[arg(long, default_value = "plain", value_parser = Difficulty::NAMES)]
    difficulty: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools world record --seed 7 --seconds 20 --out explore.mcap\n\
                        The truth is written to explore.truth.json.")]
struct RecordArgs {
    /// Seed of the house and of the drive.
    #[arg(long)]
    seed: u64,
    /// Length (s). One turn in a room takes 9.6 s at natural speed; with less time it turns faster, with more
    /// time the robot drives about afterwards.
    #[arg(long)]
    seconds: f64,
    /// The recording (MCAP).
    #[arg(long)]
    out: PathBuf,
    /// `plain`: one room; `house`: two to four rooms joined by doors; `furnished`: one room with real furniture;
    /// `apartment`: furnished rooms joined by doors.
    #[arg(long, default_value = "plain", value_parser = Difficulty::NAMES)]
    difficulty: String,
    /// Size of the camera images (pixels).
    #[arg(long, default_value = "96x64", value_parser = parse_size)]
    size: (usize, usize),
    /// Camera images per second.
    #[arg(long, default_value_t = 10.0)]
    rate: f64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// A size that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?}: wanted WIDTHxHEIGHT from 8x8 to 1920x1280, for example 416x256")]
struct SizeError(String);

fn parse_size(text: &str) -> Result<(usize, usize), SizeError> {
    let (w, h) = text.split_once('x').unwrap_or((text, ""));
    match (w.parse(), h.parse()) {
        (Ok(w), Ok(h)) if (8..=1920).contains(&w) && (8..=1280).contains(&h) => Ok((w, h)),
        _ => Err(SizeError(text.to_owned())),
    }
}

/// Runs `world`.
///
/// # Errors
/// A file that cannot be written, a length or rate out of range.
pub fn run(args: WorldArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        WorldCommand::Render(args) => {
            let difficulty = named(&args.difficulty)?;
            let house = House::generate(args.seed, &difficulty);
            let canvas = picture(&house, &args.difficulty);
            save_png(&args.out, canvas.width, canvas.height, &canvas.rgb)
                .with_context(|| args.out.display().to_string())?;
            if args.json {
                let report = json!({
                    "out": args.out, "seed": args.seed, "difficulty": args.difficulty,
                    "width": canvas.width, "height": canvas.height, "rooms": house.rooms.len(),
                    "objects": house.objects.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(),
                });
                println!("{report}");
            } else {
                println!("{}", args.out.display());
            }
        }
        WorldCommand::Furniture(args) => crate::furniture::run(&args)?,
        WorldCommand::Record(args) => {
            let options = RecordOptions {
                seed: args.seed,
                difficulty: args.difficulty,
                seconds: args.seconds,
                rate: args.rate,
                width: args.size.0,
                height: args.size.1,
            };
            let done = record(&args.out, &options)?;
            if args.json {
                println!("{}", serde_json::to_string(&done)?);
            } else {
                println!("{}: {} frames, {} messages", done.out.display(), done.frames, done.messages);
                println!("{}", done.truth.display());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn named(difficulty: &str) -> anyhow::Result<Difficulty> {
    Difficulty::named(difficulty)
        .with_context(|| format!("difficulty {difficulty:?}: wanted one of {}", Difficulty::NAMES.join(", ")))
}

// ---------------------------------------------------------------------------------------------------- pictures

const INK: [u8; 3] = [44, 46, 54];
const FADED: [u8; 3] = [112, 114, 122];
const PAPER: [u8; 3] = [247, 245, 240];
const ROBOT: [u8; 3] = [32, 104, 214];
const VIEW: (usize, usize) = (1248, 768);
const MAP_WIDTH: usize = 600;
const EDGE: usize = 24;

/// The picture of a house: a fine view with names, the map, one turn of exploration. `label` is printed in the title.
#[must_use]
pub fn picture(house: &House, label: &str) -> Canvas {
    const HEAD: usize = 48;
    const THUMBS: usize = 10;
    const THUMB: (usize, usize) = (180, 120);
    let width = EDGE * 3 + VIEW.0 + MAP_WIDTH;
    let strip_top = EDGE + HEAD + VIEW.1 + EDGE;
    let height = strip_top + 26 + THUMB.1 + EDGE;
    let mut canvas = Canvas::new(width, height, PAPER);

    let rooms = match house.rooms.len() {
        1 => "one room".to_owned(),
        n => format!("{n} rooms"),
    };
    let title = format!("House {}", house.seed);
    let end = canvas.text(EDGE as i64, EDGE as i64 - 2, &title, 4, INK);
    let facts = format!("{label}, {rooms}, {} objects", house.objects.len());
    canvas.text(end + 12, EDGE as i64 + 10, &facts, 2, FADED);

    // The view.
    let camera = Camera::new(VIEW.0, VIEW.1);
    let pose = scenic_pose(house, &camera);
    let mut frame = Frame::new();
    let options = RenderOptions { ids: true, ..RenderOptions::picture() };
    render_with(house, pose, &camera, options, &mut frame);
    let mut view = Canvas { width: VIEW.0, height: VIEW.1, rgb: std::mem::take(&mut frame.rgb) };
    label_objects(house, &frame.ids, &mut view);
    framed(&mut canvas, EDGE, EDGE + HEAD, &view);

    let sweep = exploration_sweep(house, &mut Rng::new(house.seed), sweep_frames(house, 10.0));
    map_and_list(house, &mut canvas, &camera, pose, &sweep, EDGE + HEAD);

    // One turn of exploration.
    let what = "What the robot sees while it explores, at equal times";
    canvas.text(EDGE as i64, strip_top as i64, what, 2, FADED);
    let small = Camera::new(THUMB.0, THUMB.1);
    let step = (width - 2 * EDGE - THUMB.0) as f64 / (THUMBS - 1) as f64;
    for k in 0..THUMBS {
        let seen = sweep[(k * sweep.len() / THUMBS).min(sweep.len() - 1)];
        render_with(house, seen, &small, RenderOptions::rgb_only(), &mut frame);
        let thumb = Canvas { width: THUMB.0, height: THUMB.1, rgb: frame.rgb.clone() };
        framed(&mut canvas, EDGE + (k as f64 * step).round() as usize, strip_top + 24, &thumb);
    }
    canvas
}

/// The map with one turn of exploration and the place of the view, and below it the scale and the list of objects.
fn map_and_list(
    house: &House,
    canvas: &mut Canvas,
    camera: &Camera,
    pose: Pose2,
    sweep: &[Pose2],
    top: usize,
) {
    let columns = if house.objects.len() > 6 { 2 } else { 1 };
    let lines = house.objects.len().div_ceil(columns);
    let list = lines * 26 + 14;
    let b = &house.bounds;
    let natural = (MAP_WIDTH as f64 * (b.depth() + 0.7) / (b.width() + 0.7)) as usize;
    let map_height = natural.clamp(160, VIEW.1 - list - 44);
    let mut map = Canvas::new(MAP_WIDTH, map_height, PAPER);
    let place = MapView::fit(house, MAP_WIDTH, map_height);
    top_down(house, &place, &mut map);
    large_names(house, &place, &mut map);
    draw_path(&place, &mut map, sweep, 0, [150, 152, 164]);
    draw_view(&place, &mut map, pose, camera.hfov_rad, 1.4, ROBOT);
    draw_robot(&place, &mut map, pose, ROBOT);
    let left = EDGE * 2 + VIEW.0;
    framed(canvas, left, top, &map);
    // Scale, and what the marks mean.
    let under = (top + map_height + 10) as i64;
    let metre = place.length(1.0);
    let bar = (left as f32 + 2.0, under as f32 + 7.0);
    canvas.line(bar, (bar.0 + metre, bar.1), 3.0, INK);
    for x in [bar.0, bar.0 + metre] {
        canvas.line((x, bar.1 - 5.0), (x, bar.1 + 5.0), 2.0, INK);
    }
    let mut at = canvas.text((bar.0 + metre) as i64 + 10, under, "1 m", 2, INK) + 24;
    canvas.disc((at as f32, bar.1), 7.0, ROBOT);
    at = canvas.text(at + 14, under, "this view", 2, INK) + 24;
    canvas.line((at as f32 - 6.0, bar.1), (at as f32 + 14.0, bar.1), 3.0, [150, 152, 164]);
    canvas.text(at + 24, under, "exploration", 2, INK);
    for (k, o) in house.objects.iter().enumerate() {
        let x = (left + (k / lines) * MAP_WIDTH / columns) as i64;
        let y = under + 34 + ((k % lines) * 26) as i64;
        canvas.disc((x as f32 + 9.0, y as f32 + 7.0), 9.0, INK);
        canvas.disc((x as f32 + 9.0, y as f32 + 7.0), 7.5, house.palette.objects[o.colour.index()]);
        canvas.text(x + 26, y, &o.name, 2, INK);
        if columns == 1 {
            let text = format!(
                "{:.1} m from here, {:.2} m high",
                pose.distance(Pose2::unwrapped(o.x, o.y, 0.0)),
                o.size[2]
            );
            canvas.text((left + MAP_WIDTH - text_width(&text, 2)) as i64, y, &text, 2, FADED);
        }
    }
}

/// The map's names over its small ones, in letters that can be read from a distance.
fn large_names(house: &House, place: &MapView, map: &mut Canvas) {
    for o in &house.objects {
        let (x, y) = place.pixel(o.x, o.y);
        let width = text_width(&o.name, 2);
        let left = (x as i64 - width as i64 / 2).clamp(4, (map.width as i64 - width as i64 - 4).max(4));
        let below = (y + place.length(o.radius)) as i64 + 2;
        let top = if below + 20 > map.height as i64 { y as i64 - 8 } else { below };
        map.fill_rect_cover(left - 4, top, width + 6, 20, [255; 3], 0.94);
        map.text(left, top + 3, &o.name, 2, INK);
    }
}

fn framed(canvas: &mut Canvas, x: usize, y: usize, part: &Canvas) {
    let (w, h) = (part.width, part.height);
    for (grow, cover) in [(4, 0.05), (3, 0.06), (2, 0.08)] {
        let (x, y) = (x as i64 - grow + 1, y as i64 - grow + 2);
        canvas.fill_rect_cover(x, y, w + 2 * grow as usize, h + 2 * grow as usize, [0; 3], cover);
    }
    canvas.blit(x as i64, y as i64, &part.rgb, w, 1);
    canvas.outline_rect(x as i64 - 1, y as i64 - 1, w + 2, h + 2, 1, [70, 72, 80]);
}

/// Names above what is seen of each object, moved up where they would cover each other.
fn label_objects(house: &House, ids: &[u8], view: &mut Canvas) {
    struct Label {
        object: usize,
        area: [usize; 4],
        pixels: usize,
    }
    let mut seen: Vec<Label> = (0..house.objects.len())
        .map(|object| Label { object, area: [usize::MAX, usize::MAX, 0, 0], pixels: 0 })
        .collect();
    for (k, id) in ids.iter().enumerate().filter(|(_, id)| **id > 0) {
        let Some(s) = seen.get_mut(usize::from(*id) - 1) else { continue };
        let (x, y) = (k % view.width, k / view.width);
        s.area = [s.area[0].min(x), s.area[1].min(y), s.area[2].max(x), s.area[3].max(y)];
        s.pixels += 1;
    }
    seen.retain(|s| s.pixels >= 250);
    // The nearest (lowest in the picture) get their place first.
    seen.sort_by_key(|s| (std::cmp::Reverse(s.area[3]), s.object));
    let mut taken: Vec<[i64; 4]> = Vec::new();
    for s in &seen {
        let name = &house.objects[s.object].name;
        let (w, h) = (text_width(name, 2) as i64 + 34, 26);
        let centre = ((s.area[0] + s.area[2]) / 2) as i64;
        let left = (centre - w / 2).clamp(6, view.width as i64 - w - 6);
        let mut top = (s.area[1] as i64 - h - 16).max(6);
        for _ in 0..view.height {
            let meets = |t: &&[i64; 4]| {
                left < t[2] + 4 && t[0] < left + w + 4 && top < t[3] + 4 && t[1] < top + h + 4
            };
            match taken.iter().find(meets) {
                Some(t) if t[1] - h - 5 >= 6 => top = t[1] - h - 5,
                Some(t) => top = t[3] + 5,
                None => break,
            }
        }
        taken.push([left, top, left + w, top + h]);
        let foot = (s.area[1] as f32 + 3.0).max((top + h) as f32);
        if foot > (top + h) as f32 + 2.0 {
            let from = (centre.clamp(left + 8, left + w - 8) as f32, (top + h) as f32);
            view.line_cover(from, (centre as f32, foot), 2.0, [255; 3], 0.9);
        }
        view.fill_rect_cover(left + 2, top + 2, w as usize, h as usize, [0; 3], 0.18);
        view.fill_rect_cover(left, top, w as usize, h as usize, [255; 3], 0.9);
        let dot = (left as f32 + 14.0, top as f32 + 13.0);
        view.disc(dot, 7.5, INK);
        view.disc(dot, 6.0, house.palette.objects[house.objects[s.object].colour.index()]);
        view.text(left + 28, top + 6, name, 2, INK);
    }
}

// -------------------------------------------------------------------------------------------------- recordings

/// What [`record`] records.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordOptions {
    /// Seed of the house and of the drive.
    pub seed: u64,
    /// One of [`Difficulty::NAMES`].
    pub difficulty: String,
    /// Length (s), 0.5 to 3600.
    pub seconds: f64,
    /// Camera images per second, 0.5 to 60.
    pub rate: f64,
    /// Width of the images (pixels).
    pub width: usize,
    /// Height of the images (pixels).
    pub height: usize,
}

/// What [`record`] wrote.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recorded {
    /// The recording.
    pub out: PathBuf,
    /// The truth.
    pub truth: PathBuf,
    /// Seed of the house.
    pub seed: u64,
    /// Camera images.
    pub frames: usize,
    /// Messages of all topics.
    pub messages: u64,
    /// Size of the recording (bytes).
    pub bytes: u64,
}

/// Time for the way from one room to the next at natural speed (s).
const WAY_SECS: f64 = 6.0;

/// Frames of one exploration at natural speed: [`TURN_SECS`] per room, and the ways between them.
fn sweep_frames(house: &House, rate: f64) -> usize {
    let rooms = house.rooms.len() as f64;
    ((TURN_SECS * rooms + WAY_SECS * (rooms - 1.0)) * rate).round() as usize + 1
}

/// Base poses of a recording, one per frame, in the map: the exploration, then random drives.
#[must_use]
pub fn drive(house: &House, seed: u64, frames: usize, rate: f64) -> Vec<Pose2> {
    let mut rng = Rng::new(seed);
    let sweep = sweep_frames(house, rate).min(frames);
    let mut poses = exploration_sweep(house, &mut rng, sweep);
    if frames > sweep
        && let Some(last) = poses.last().copied()
    {
        let secs = (frames - sweep) as f64 / rate;
        let coarse =
            random_drive_from(house, &mut rng, last, (secs / RANDOM_DRIVE_DT_SECS).ceil() as usize + 1);
        poses.extend((1..=frames - sweep).map(|k| {
            let at = k as f64 / rate / RANDOM_DRIVE_DT_SECS;
            let i = (at as usize).min(coarse.len() - 1);
            let (a, b) = (coarse[i], coarse[(i + 1).min(coarse.len() - 1)]);
            between(a, b, at - i as f64)
        }));
    }
    poses
}

fn between(a: Pose2, b: Pose2, k: f64) -> Pose2 {
    let k = k.clamp(0.0, 1.0);
    Pose2::unwrapped(
        a.x + (b.x - a.x) * k,
        a.y + (b.y - a.y) * k,
        wrap_angle(a.yaw + wrap_angle(b.yaw - a.yaw) * k),
    )
}

/// The path of the truth beside a recording: `x.mcap` has `x.truth.json`.
#[must_use]
pub fn truth_path(recording: &Path) -> PathBuf {
    recording.with_extension("truth.json")
}

fn camera_isometry(rotation: [[f64; 3]; 3], translation: [f64; 3]) -> Isometry3<f64> {
    let r = Matrix3::from_fn(|i, j| rotation[i][j]);
    Isometry3::from_parts(
        Translation3::new(translation[0], translation[1], translation[2]),
        UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(r)),
    )
}

/// A channel for a message type, as a driver offers it.
pub(crate) fn channel<T: RosType>(
    writer: &mut McapWriter,
    topic: &str,
    transient_local: bool,
) -> anyhow::Result<ChannelId> {
    let text = schema::ros2msg(T::NAME).with_context(|| format!("no definition of {}", T::NAME))?;
    let qos = offered_qos(true, transient_local, if transient_local { 1 } else { 10 });
    Ok(writer.add_channel(topic, T::NAME, text, Some(T::HASH), &qos)?)
}

const ODOM: &str = "odom";
const BASE: &str = "base_link";
const OPTICAL: &str = "camera_optical_frame";

impl RecordOptions {
    fn check(&self) -> anyhow::Result<()> {
        let Self { seconds, rate, width, height, .. } = *self;
        if !(0.5..=3600.0).contains(&seconds) {
            bail!("seconds = {seconds}: wanted 0.5 to 3600");
        }
        if !(0.5..=60.0).contains(&rate) {
            bail!("rate = {rate}: wanted 0.5 to 60 images per second");
        }
        if width == 0 || height == 0 || width > 4096 || height > 4096 {
            bail!("images of {width}x{height}: wanted 1x1 to 4096x4096");
        }
        Ok(())
    }
}

/// Records one exploration as a ROS 2 MCAP and writes the truth beside it.
///
/// Topics: `/camera/image_raw` (rgb8), `/camera/camera_info`, `/odom` and `/tf` (`odom` to `base_link`, the frame
/// `odom` being the house's map), `/tf_static` (`base_link` to `camera_optical_frame`: x right, y down, z forward,
/// tilted down). All messages of a frame carry the same stamp; the first is [`FIRST_STAMP`].
///
/// # Errors
/// A length, rate or difficulty that cannot be used, a file that cannot be written.
pub fn record(out: &Path, options: &RecordOptions) -> anyhow::Result<Recorded> {
    options.check()?;
    let RecordOptions { seed, seconds, rate, width, height, .. } = *options;
    let house = House::generate(seed, &named(&options.difficulty)?);
    let camera = Camera::new(width, height);
    let frames = (seconds * rate).floor() as usize + 1;
    let poses = drive(&house, seed, frames, rate);
    let mut recorder = Recorder::create(out, &camera)?;
    let mut frame = Frame::new();
    let mut truth = Vec::with_capacity(poses.len());
    for (k, pose) in poses.iter().enumerate() {
        let at = FIRST_STAMP + TimeDelta::from_secs_f64(k as f64 / rate);
        render_with(&house, *pose, &camera, RenderOptions::rgb_only(), &mut frame);
        recorder.frame(at, *pose, twist(&poses, k, rate), &mut frame.rgb)?;
        let (r, t) = camera.map_from_camera(*pose);
        let q = camera_isometry(r, t).rotation.coords;
        truth.push(json!({
            "stamp_ns": at.as_nanos(),
            "base": {"x": pose.x, "y": pose.y, "yaw": pose.yaw},
            "camera": {"position": t, "quaternion_xyzw": [q.x, q.y, q.z, q.w]},
        }));
    }
    let document = truth_document(&house, &options.difficulty, &camera, truth);
    let messages = recorder.writer.finish()?;
    let truth = truth_path(out);
    write_atomically(&truth, |file| {
        serde_json::to_writer_pretty(&mut *file, &document)?;
        file.write_all(b"\n")
    })
    .with_context(|| truth.display().to_string())?;
    let bytes = fs::metadata(out).with_context(|| out.display().to_string())?.len();
    Ok(Recorded { out: out.to_path_buf(), truth, seed, frames: poses.len(), messages, bytes })
}

/// Writes what a robot's drivers would publish.
struct Recorder {
    writer: McapWriter,
    tf: ChannelId,
    odom: ChannelId,
    info: ChannelId,
    image: ChannelId,
    camera: Camera,
}

impl Recorder {
    /// Opens the file and writes the camera's mount.
    fn create(out: &Path, camera: &Camera) -> anyhow::Result<Self> {
        let mut writer = McapWriter::create(out)?;
        let tf_static = channel::<TFMessage>(&mut writer, "/tf_static", true)?;
        let tf = channel::<TFMessage>(&mut writer, "/tf", false)?;
        let odom = channel::<Odometry>(&mut writer, "/odom", false)?;
        let info = channel::<CameraInfo>(&mut writer, "/camera/camera_info", false)?;
        let image = channel::<Image>(&mut writer, "/camera/image_raw", false)?;
        let (r, t) = camera.base_from_camera();
        let mounted = TransformStamped::new(FIRST_STAMP, BASE, OPTICAL, &camera_isometry(r, t));
        let first = FIRST_STAMP.as_nanos();
        writer.write(tf_static, first, first, &TFMessage { transforms: vec![mounted] }.encode())?;
        Ok(Self { writer, tf, odom, info, image, camera: *camera })
    }

    /// One image with its transform, odometry and intrinsics; `rgb` is lent and comes back as it was.
    fn frame(&mut self, at: Timestamp, pose: Pose2, twist: Twist, rgb: &mut Vec<u8>) -> anyhow::Result<()> {
        let ns = at.as_nanos();
        let odom_from_base = mindseye_bridge::geometry::Pose2::new(pose.x, pose.y, pose.yaw);
        let moved = TransformStamped::new(at, ODOM, BASE, &planar_isometry(odom_from_base));
        self.writer.write(self.tf, ns, ns, &TFMessage { transforms: vec![moved] }.encode())?;
        let odometry = Odometry {
            header: Header::new(at, ODOM),
            child_frame_id: BASE.to_owned(),
            pose: PoseWithCovariance {
                pose: Pose::from_pose2(odom_from_base),
                covariance: Covariance6::planar(1e-6, 1e-6, 1e-6).into(),
            },
            twist: TwistWithCovariance { twist, covariance: Covariance6::planar(1e-4, 1e-4, 1e-4).into() },
        };
        self.writer.write(self.odom, ns, ns, &odometry.encode())?;
        let [fx, fy, cx, cy] = self.camera.intrinsics();
        let (width, height) = (self.camera.width as u32, self.camera.height as u32);
        let camera_info = CameraInfo {
            header: Header::new(at, OPTICAL),
            height,
            width,
            distortion_model: "plumb_bob".to_owned(),
            d: vec![0.0; 5],
            k: [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
            r: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
            p: [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
            ..Default::default()
        };
        self.writer.write(self.info, ns, ns, &camera_info.encode())?;
        let picture = Image {
            header: Header::new(at, OPTICAL),
            height,
            width,
            encoding: "rgb8".to_owned(),
            is_bigendian: 0,
            step: 3 * width,
            data: std::mem::take(rgb),
        };
        self.writer.write(self.image, ns, ns, &picture.encode())?;
        *rgb = picture.data;
        Ok(())
    }
}

/// `x.truth.json`: what is where, and where the robot was.
fn truth_document(
    house: &House,
    difficulty: &str,
    camera: &Camera,
    frames: Vec<serde_json::Value>,
) -> serde_json::Value {
    let objects: Vec<_> = house
        .objects
        .iter()
        .map(|o| {
            json!({
                "name": o.name, "colour": o.colour, "shape": o.shape, "room": o.room,
                "position": [o.x, o.y, o.z], "yaw": o.yaw, "size": o.size,
            })
        })
        .collect();
    json!({
        "format": 1,
        "seed": house.seed,
        "difficulty": difficulty,
        "frame": ODOM,
        "units": "metres, radians; positions are centres, sizes full extents along the object's own axes",
        "rooms": house.rooms.iter().map(|r| r.rect).collect::<Vec<_>>(),
        "objects": objects,
        "camera": {
            "frame": OPTICAL, "width": camera.width, "height": camera.height, "intrinsics": camera.intrinsics(),
            "hfov_rad": camera.hfov_rad, "pitch_rad": camera.pitch_rad,
            "mount_height_m": camera.mount_height_m, "mount_forward_m": camera.mount_forward_m,
        },
        "frames": frames,
    })
}

/// Velocity of the base in its own frame at frame `k`, from its neighbours.
fn twist(poses: &[Pose2], k: usize, rate: f64) -> Twist {
    let (i, j) = (k.saturating_sub(1), (k + 1).min(poses.len() - 1));
    if i == j {
        return Twist::default();
    }
    let secs = (j - i) as f64 / rate;
    let (a, b) = (poses[i], poses[j]);
    let (s, c) = poses[k].yaw.sin_cos();
    let (vx, vy) = ((b.x - a.x) / secs, (b.y - a.y) / secs);
    Twist {
        linear: Vector3 { x: c * vx + s * vy, y: c * vy - s * vx, z: 0.0 },
        angular: Vector3 { x: 0.0, y: 0.0, z: wrap_angle(b.yaw - a.yaw) / secs },
    }
}
