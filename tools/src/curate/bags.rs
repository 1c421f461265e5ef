//! Recordings that are bags: the images of one topic, with intrinsics and odometry where they were recorded.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use mindseye_bridge::bag::{self, Bag, CdrConverter, ConvertError, OpenOptions, ReadOptions, TopicId};
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_bridge::cdr::CdrError;
use mindseye_bridge::geometry::TfTree;
use mindseye_bridge::image::{
    ImageError, Limits, RawImage, Size, decode_compressed_rgb8, decode_raw_rgb8, is_depth_encoding,
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
        other => DatasetError::Bag(Box::new(other)),
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
    let mut found = Gathered::new(compressed);
    let mut messages = bag.messages(&ReadOptions { topics: Some(topics), ..ReadOptions::default() });
    for message in &mut messages {
        let about = bag.info().topic(message.topic);
        let is_image = about.name == topic;
        match converter.convert(&message) {
            Ok(cdr) if is_image => found.image(cdr),
            Ok(cdr) if about.type_name == Odometry::NAME => found.odometry(message.topic, cdr),
            Ok(cdr) if about.type_name == CameraInfo::NAME => found.camera(cdr),
            Ok(cdr) => {
                if let Ok(transforms) = TFMessage::decode(cdr) {
                    found.mounts.insert_message(&transforms, true);
                }
            }
            Err(_) if is_image => found.images.push(None),
            Err(_) => {}
        }
    }
    let damage = bag
        .info()
        .damage
        .iter()
        .chain(messages.damage())
        .map(|d| format!("{}: {d}", path.display()))
        .collect();
    Ok((found.listed(), damage))
}

/// Stamp (ns), frame and size of an image; a size of 0 where it is not known before decoding.
type ImageHeader = (i64, String, [u32; 2]);

/// What has been read of a bag.
struct Gathered {
    compressed: bool,
    images: Vec<Option<ImageHeader>>,
    /// `odom_from_base` by stamp (microseconds).
    poses: BTreeMap<i64, Isometry3<f64>>,
    cameras: HashMap<String, CameraIntrinsics>,
    base: String,
    odometry_topic: Option<TopicId>,
    mounts: TfTree,
}

impl Gathered {
    fn new(compressed: bool) -> Self {
        Self {
            compressed,
            images: Vec::new(),
            poses: BTreeMap::new(),
            cameras: HashMap::new(),
            base: String::new(),
            odometry_topic: None,
            mounts: TfTree::new(),
        }
    }

    fn image(&mut self, cdr: &[u8]) {
        let header = if self.compressed {
            CompressedImageView::decode(cdr).map(|m| (m.header.to_owned(), [0, 0]))
        } else {
            ImageView::decode(cdr).map(|m| (m.header.to_owned(), [m.width, m.height]))
        };
        self.images.push(header.ok().map(|(h, size)| (h.stamp.timestamp().as_nanos(), h.frame_id, size)));
    }

    /// One topic of odometry, the first that is seen.
    fn odometry(&mut self, topic: TopicId, cdr: &[u8]) {
        if *self.odometry_topic.get_or_insert(topic) == topic
            && let Ok(odometry) = Odometry::decode(cdr)
            && let Ok(pose) = odometry.pose.pose.isometry()
        {
            self.base = odometry.child_frame_id;
            self.poses.insert(odometry.header.stamp.timestamp().as_nanos() / 1000, pose);
        }
    }

    fn camera(&mut self, cdr: &[u8]) {
        let info = CameraInfo::decode(cdr).ok();
        if let Some(k) = info.and_then(|i| CameraIntrinsics::from_camera_info(&i).ok()) {
            self.cameras.insert(k.frame_id.clone(), k);
        }
    }

    /// Every image with its pose and intrinsics, as far as they are known.
    fn listed(self) -> Vec<Listed> {
        let mut mounted: HashMap<String, Option<Isometry3<f64>>> = HashMap::new();
        self.images
            .into_iter()
            .map(|image| {
                let Some((at_ns, camera, [width, height])) = image else {
                    return Listed { pose: None, intrinsics: None };
                };
                let base_from_camera = *mounted
                    .entry(camera.clone())
                    .or_insert_with(|| self.mounts.lookup(&self.base, &camera, Timestamp::ZERO).ok());
                let odom_from_base = pose_at(&self.poses, at_ns as f64 * 1e-9);
                let intrinsics = self.cameras.get(&camera).map(|k| {
                    let k = if width > 0 && height > 0 { k.resized(width, height) } else { k.clone() };
                    [k.fx, k.fy, k.cx, k.cy]
                });
                Listed { pose: odom_from_base.zip(base_from_camera).map(|(a, b)| a * b), intrinsics }
            })
            .collect()
    }
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
        let decoded = converter
            .convert(&message)
            .map_err(PictureError::from)
            .and_then(|cdr| if compressed { compressed_picture(cdr) } else { raw_picture(cdr) });
        take(k, decoded.map_err(|source| invalid(path, format!("image {k}: {source}"))))?;
    }
    Ok(())
}

/// Why a message gives no picture.
#[derive(Debug, thiserror::Error)]
enum PictureError {
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error(transparent)]
    Message(#[from] CdrError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("a depth image")]
    Depth,
    #[error("an empty picture")]
    Empty,
}

fn compressed_picture(cdr: &[u8]) -> Result<Picture, PictureError> {
    let image = CompressedImageView::decode(cdr)?;
    let mut rgb = Vec::new();
    let size = decode_compressed_rgb8(image.data, &Limits::default(), &mut rgb)?;
    sized(size, rgb)
}

fn raw_picture(cdr: &[u8]) -> Result<Picture, PictureError> {
    let image = ImageView::decode(cdr)?;
    if is_depth_encoding(image.encoding) {
        return Err(PictureError::Depth);
    }
    let mut rgb = Vec::new();
    let size = decode_raw_rgb8(&RawImage::from(&image), &Limits::default(), &mut rgb)?;
    sized(size, rgb)
}

fn sized(Size { width, height }: Size, rgb: Vec<u8>) -> Result<Picture, PictureError> {
    if width == 0 || height == 0 {
        return Err(PictureError::Empty);
    }
    Ok(Picture { width: width as usize, height: height as usize, rgb })
}
