//! `mindseye-tools bag`: a recording of a dataset as a bag that the runtime replays.
//!
//! The base is the camera: its x axis looks where the camera looks. Odometry has the camera's full pose, in a frame whose z
//! axis is up.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use mindseye_base::picture::RgbImage;
use mindseye_bridge::bag::McapWriter;
use mindseye_bridge::geometry::{Covariance6, body_from_optical};
use mindseye_bridge::msg::{
    CameraInfo, CompressedImage, Header, Odometry, Pose, PoseWithCovariance, RosType, TFMessage,
    TransformStamped,
};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use nalgebra::{Isometry3, Translation3, UnitQuaternion, Vector3};

use crate::curate::dataset::{Dataset, DatasetError, Recording};
use crate::eval::localise::{Span, chosen};
use crate::world::{FIRST_STAMP, channel};

/// Arguments of `bag`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools bag kitchen --frames 0:1000:3 --out kitchen.mcap")]
pub struct BagArgs {
    /// Directory of the dataset.
    pub dataset: PathBuf,
    /// Recording of the dataset; may be left out where there is only one.
    #[arg(long)]
    pub recording: Option<String>,
    /// Frames, A:B:STEP: from index A, before index B, every STEP-th.
    #[arg(long)]
    pub frames: Span,
    /// Frames a second of the recording.
    #[arg(long, default_value_t = 30.0)]
    pub rate: f64,
    /// The bag (MCAP).
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs `bag`.
///
/// # Errors
/// A dataset or recording that cannot be read, no frame with a pose and intrinsics, a file that cannot be written.
pub fn run(args: &BagArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.rate.is_finite() && args.rate > 0.0, "--rate {}: wanted more than 0", args.rate);
    let dataset = Dataset::open(&args.dataset)?;
    let recording = chosen(&dataset, args.recording.as_deref())?;
    let (written, left_out) = write(&dataset, recording, args.frames, args.rate, &args.out)?;
    println!(
        "{}: {written} frames, {left_out} left out (unreadable, without pose or intrinsics)",
        args.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

const ODOM: &str = "odom";
const BASE: &str = "base_link";
const OPTICAL: &str = "camera_optical_frame";

/// Up in the map: the recording's, else the mean of what is up in its pictures.
fn up(recording: &Recording) -> Vector3<f64> {
    let mean = || -> Vector3<f64> {
        recording.frames.iter().filter_map(|f| f.map_from_camera).map(|p| p.rotation * -Vector3::y()).sum()
    };
    let up = recording.up.map_or_else(mean, Vector3::from);
    up.try_normalize(1e-6).unwrap_or_else(Vector3::z)
}

/// Format and bytes of a picture that is a file of its own: they go into the bag as they are.
fn stored_picture(path: &Path) -> anyhow::Result<(&'static str, Vec<u8>)> {
    let png = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    let data = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok((if png { "png" } else { "jpeg" }, data))
}

/// Writes frames; returns how many, and how many were left out.
fn write(
    dataset: &Dataset,
    recording: &Recording,
    frames: Span,
    rate: f64,
    out: &Path,
) -> anyhow::Result<(usize, usize)> {
    let level = UnitQuaternion::rotation_between(&up(recording), &Vector3::z())
        .unwrap_or_else(|| UnitQuaternion::from_axis_angle(&Vector3::x_axis(), std::f64::consts::PI));
    let odom_from_map = Isometry3::from_parts(Translation3::identity(), level);
    let base_from_camera = Isometry3::from_parts(Translation3::identity(), body_from_optical());
    let mut writer = McapWriter::create(out)?;
    let tf_static = channel::<TFMessage>(&mut writer, "/tf_static", true)?;
    let odom = channel::<Odometry>(&mut writer, "/odom", false)?;
    let info = channel::<CameraInfo>(&mut writer, "/camera/camera_info", false)?;
    let image = channel::<CompressedImage>(&mut writer, "/camera/image_raw/compressed", false)?;
    let first = FIRST_STAMP.as_nanos();
    let mounted = TransformStamped::new(FIRST_STAMP, BASE, OPTICAL, &base_from_camera);
    writer.write(tf_static, first, first, &TFMessage { transforms: vec![mounted] }.encode())?;
    let (mut written, mut left_out) = (0, 0);
    let mut failure = None;
    let wanted = |at: usize| frames.contains(recording.frames[at].index);
    dataset.pictures_at(recording, &wanted, &mut |at, picture| {
        let frame = &recording.frames[at];
        let (Ok(picture), Some(map_from_camera), Some([fx, fy, cx, cy]), None) =
            (picture, frame.map_from_camera, frame.intrinsics, &failure)
        else {
            left_out += 1;
            return Ok(());
        };
        let stamp: Timestamp = FIRST_STAMP + TimeDelta::from_secs_f64(frame.index as f64 / rate);
        let odom_from_base = odom_from_map * map_from_camera * base_from_camera.inverse();
        let camera_info = CameraInfo {
            header: Header::new(stamp, OPTICAL),
            height: picture.height as u32,
            width: picture.width as u32,
            k: [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
            r: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
            p: [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
            ..CameraInfo::default()
        };
        let odometry = Odometry {
            header: Header::new(stamp, ODOM),
            child_frame_id: BASE.to_owned(),
            pose: PoseWithCovariance {
                pose: Pose::from_isometry(&odom_from_base),
                covariance: Covariance6::from_diagonal([1e-4; 6]).into(),
            },
            ..Odometry::default()
        };
        let stored = dataset.beside(recording, frame, "", "");
        let written_so_far = (|| {
            let (format, data) = match stored {
                Some(path) => stored_picture(&path)?,
                None => {
                    let rgb = RgbImage::from_rgb(picture.width, picture.height, picture.rgb);
                    ("png", rgb.context("an empty picture")?.to_png()?)
                }
            };
            let image_message =
                CompressedImage { header: Header::new(stamp, OPTICAL), format: format.into(), data };
            let ns = stamp.as_nanos();
            writer.write(odom, ns, ns, &odometry.encode())?;
            writer.write(info, ns, ns, &camera_info.encode())?;
            writer.write(image, ns, ns, &image_message.encode())?;
            anyhow::Ok(())
        })();
        match written_so_far {
            Ok(()) => written += 1,
            Err(e) => failure = Some(e),
        }
        Ok::<(), DatasetError>(())
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    anyhow::ensure!(written > 0, "no frame has a picture, a pose and intrinsics");
    writer.finish()?;
    Ok((written, left_out))
}
