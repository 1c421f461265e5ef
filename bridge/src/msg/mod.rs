//! ROS 2 message types, as far as the runtime speaks them, with their RIHS01 type hashes.
//!
//! Field names and order are those of the .msg files; Rust keywords aside. Images have borrowed views
//! ([`ImageView`], [`CompressedImageView`]) so that their pixels are not copied.

mod hashes;
mod types;

pub use hashes::{HASH_NOT_SUPPORTED, type_hash};
pub use types::*;

use crate::cdr::{CdrError, CdrRead, CdrReader, CdrWrite, CdrWriter};

/// A ROS type that can travel.
pub trait RosType: CdrWrite + for<'a> CdrRead<'a> {
    /// `pkg/msg/Name` (or `srv`, `action`).
    const NAME: &'static str;
    /// `RIHS01_` and 64 hex digits.
    const HASH: &'static str;
    /// Whether newer versions of the type append fields, so that bytes after the last field are not an error.
    const OPEN_ENDED: bool = false;

    /// The message as CDR, header included.
    fn encode(&self) -> Vec<u8> {
        let mut w = CdrWriter::with_capacity(self.size_hint());
        self.write(&mut w);
        w.finish()
    }

    /// The message as CDR in two pieces: a head, and the bytes of a picture, which are moved instead of
    /// copied. The tail is empty for most types.
    fn encode_split(self) -> (Vec<u8>, Vec<u8>) {
        (self.encode(), Vec::new())
    }

    /// Reads a message of `total` bytes that lies in several pieces, if the type has a way that copies less
    /// than putting them together.
    fn decode_pieces(_pieces: &mut dyn Iterator<Item = &[u8]>, _total: usize) -> Pieced<Self> {
        Pieced::Gather
    }

    /// Reads a whole message.
    ///
    /// # Errors
    /// [`CdrError`] with the field and the offset.
    fn decode(message: &[u8]) -> Result<Self, CdrError> {
        let mut r = CdrReader::new(message)?;
        let value = Self::read(&mut r)?;
        if !Self::OPEN_ENDED {
            r.finish()?;
        }
        Ok(value)
    }
}

/// The name used in keys and tokens: `geometry_msgs/msg/Pose` is `geometry_msgs::msg::dds_::Pose_`.
/// Two-part names of old bags get `msg` in the middle.
#[must_use]
pub fn dds_name(ros_name: &str) -> String {
    let mut parts = ros_name.splitn(3, '/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(pkg), Some(kind), Some(name)) => format!("{pkg}::{kind}::dds_::{name}_"),
        (Some(pkg), Some(name), None) => format!("{pkg}::msg::dds_::{name}_"),
        _ => ros_name.to_owned(),
    }
}

/// The way back from [`dds_name`]; `None` when it is not such a name.
#[must_use]
pub fn ros_name(dds_name: &str) -> Option<String> {
    let (path, name) = dds_name.split_once("::dds_::")?;
    let name = name.strip_suffix('_')?;
    let (pkg, kind) = path.split_once("::")?;
    Some(format!("{pkg}/{kind}/{name}"))
}
