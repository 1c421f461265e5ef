//! Recordings that are bags: the images of one topic, with intrinsics and odometry where they were recorded.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use mindseye_bridge::bag::{self, Bag, CdrConverter, OpenOptions, ReadOptions};
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_bridge::geometry::TfTree;
use mindseye_bridge::image::{
    Limits, RawImage, Size, decode_compressed_rgb8, decode_raw_rgb8, is_depth_encoding,
};
use mindseye_bridge::msg::{
    CameraInfo, CompressedImage, CompressedImageView, Image, ImageView, Odometry, RosType, TFMessage,
};
use mindseye_bridge::time::Timestamp;
use nalgebra::Isometry3;

use super::dataset::{DatasetError, Picture, invalid};
use super::layout::pose_at;

/// One image of a bag, not decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Listed {
    /// `odom_from_camera`, from odometry around the image's stamp and the camera's mount in `/tf_static`.
    pub pose: Option<Isometry3<f64>>,
    /// `[fx, fy, cx, cy]` in the image's pixels, integers being pixel centres.
    pub intrinsics: Option<[f64; 4]>,
}

fn open(path: &Path) -> Result<Bag, DatasetError> {
    bag::open(path, &OpenOptions::default()).map_err(|e| match e {
        bag::OpenBagError::Io { source, .. } => DatasetError::Io { path: path.to_path_buf(), source },
        // These name the path themselves.
        other => DatasetError::Bag(other.to_string()),
    })
}

/// The image topic: the one that is named, else the only one.
fn image_topic(path: &Path, bag: &Bag, wanted: Option<&str>) -> Result<(String, bool), DatasetError> {
    let images: Vec<(&str, bool)> = bag
        .info()
        .topics
        .iter()
        .filter(|t| t.type_name == Image::NAME || t.type_name == CompressedImage::NAME)
        .filter(|t| !t.name.contains("epth")) // depth is no picture
        .map(|t| (t.name.as_str(), t.type_name == CompressedImage::NAME))
        .collect();
    let found = match wanted {
        Some(name) => images.iter().find(|(n, _)| *n == name),
        None if images.len() > 1 => {
            let names: Vec<&str> = images.iter().map(|(n, _)| *n).collect();
            let names = names.join(", ");
            return Err(invalid(path, format!("several image topics ({names}); name one as \"topic\"")));
        }
        None => images.first(),
    };
    found.map(|(name, compressed)| ((*name).to_owned(), *compressed)).ok_or_else(|| match wanted {
        Some(name) => invalid(path, format!("no image topic {name:?}")),
        None => invalid(path, "no image topic"),
    })
}

/// The images of a bag in the order in which they were recorded. Messages that cannot be read count as images
/// without pose and intrinsics: [`pictures`] says what is wrong with them.
///
/// Also gives what of the bag is damaged.
pub(super) fn list(path: &Path, topic: Option<&str>) -> Result<(Vec<Listed>, Vec<String>), DatasetError> {
    let bag = open(path)?;
    let (topic, compressed) = image_topic(path, &bag, topic)?;
    let topics = bag
        .info()
        .topics
        .iter()
        .filter(|t| {
            t.name == topic
                || t.type_name == Odometry::NAME
                || t.type_name == CameraInfo::NAME
                || (t.type_name == TFMessage::NAME && t.name.ends_with("tf_static"))
        })
        .map(|t| t.name.clone())
        .collect();
    let mut converter = CdrConverter::new(bag.info());
    let mut images: Vec<Option<(i64, String, [u32; 2])>> = Vec::new();
    let mut poses: BTreeMap<i64, Isometry3<f64>> = BTreeMap::new();
    let mut cameras: HashMap<String, CameraIntrinsics> = HashMap::new();
    let (mut base, mut odometry_topic) = (String::new(), None);
    let mut mounts = TfTree::new();
    let mut messages = bag.messages(&ReadOptions { topics: Some(topics), ..ReadOptions::default() });
    for message in &mut messages {
        let about = bag.info().topic(message.topic);
        let is_image = about.name == topic;
        let Ok(cdr) = converter.convert(&message) else {
            if is_image {
                images.push(None);
            }
            continue;
        };
        if is_image {
            let header = if compressed {
                CompressedImageView::decode(cdr).map(|m| (m.header.to_owned(), [0, 0]))
            } else {
                ImageView::decode(cdr).map(|m| (m.header.to_owned(), [m.width, m.height]))
            };
            images.push(header.ok().map(|(h, size)| (h.stamp.timestamp().as_nanos(), h.frame_id, size)));
        } else if about.type_name == Odometry::NAME {
            // One topic of odometry, the first that is seen.
            if *odometry_topic.get_or_insert(message.topic) == message.topic
                && let Ok(odometry) = Odometry::decode(cdr)
                && let Ok(pose) = odometry.pose.pose.isometry()
            {
                base = odometry.child_frame_id;
                poses.insert(odometry.header.stamp.timestamp().as_nanos() / 1000, pose);
            }
        } else if about.type_name == CameraInfo::NAME {
            if let Some(k) =
                CameraInfo::decode(cdr).ok().and_then(|i| CameraIntrinsics::from_camera_info(&i).ok())
            {
                cameras.insert(k.frame_id.clone(), k);
            }
        } else if let Ok(transforms) = TFMessage::decode(cdr) {
            mounts.insert_message(&transforms, true);
        }
    }
    let damage = bag
        .info()
        .damage
        .iter()
        .chain(messages.damage())
        .map(|d| format!("{}: {d}", path.display()))
        .collect();
    let mut mounted: HashMap<String, Option<Isometry3<f64>>> = HashMap::new();
    let listed = images
        .into_iter()
        .map(|image| {
            let Some((at_ns, camera, [width, height])) = image else {
                return Listed { pose: None, intrinsics: None };
            };
            let base_from_camera = *mounted
                .entry(camera.clone())
                .or_insert_with(|| mounts.lookup(&base, &camera, Timestamp::ZERO).ok());
            let odom_from_base = pose_at(&poses, at_ns as f64 * 1e-9);
            let intrinsics = cameras.get(&camera).map(|k| {
                let k = if width > 0 && height > 0 { k.resized(width, height) } else { k.clone() };
                [k.fx, k.fy, k.cx, k.cy]
            });
            Listed { pose: odom_from_base.zip(base_from_camera).map(|(a, b)| a * b), intrinsics }
        })
        .collect();
    Ok((listed, damage))
}

/// Decodes the images of a bag, every `interval`-th, in order; `take` gets the number of the image.
pub(super) fn pictures(
    path: &Path,
    topic: Option<&str>,
    interval: usize,
    take: &mut dyn FnMut(usize, Result<Picture, DatasetError>) -> Result<(), DatasetError>,
) -> Result<(), DatasetError> {
    let bag = open(path)?;
    let (topic, compressed) = image_topic(path, &bag, topic)?;
    let mut converter = CdrConverter::new(bag.info());
    let options = ReadOptions { topics: Some(vec![topic]), ..ReadOptions::default() };
    for (k, message) in bag.messages(&options).enumerate() {
        if k % interval != 0 {
            continue;
        }
        let decoded = converter.convert(&message).map_err(|e| e.to_string()).and_then(|cdr| {
            let mut rgb = Vec::new();
            let size = if compressed {
                let image = CompressedImageView::decode(cdr).map_err(|e| e.to_string())?;
                decode_compressed_rgb8(image.data, &Limits::default(), &mut rgb).map_err(|e| e.to_string())?
            } else {
                let image = ImageView::decode(cdr).map_err(|e| e.to_string())?;
                if is_depth_encoding(image.encoding) {
                    return Err("a depth image".to_owned());
                }
                decode_raw_rgb8(&RawImage::from(&image), &Limits::default(), &mut rgb)
                    .map_err(|e| e.to_string())?
            };
            let Size { width, height } = size;
            if width == 0 || height == 0 {
                return Err("an empty picture".to_owned());
            }
            Ok(Picture { width: width as usize, height: height as usize, rgb })
        });
        take(k, decoded.map_err(|reason| invalid(path, format!("image {k}: {reason}"))))?;
    }
    Ok(())
}
