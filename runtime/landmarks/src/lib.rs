//! Poses from pictures, without anything that was trained.
//!
//! While a robot keeps frames, [`Extractor`] finds features in them, and [`LandmarkMap::insert`] makes landmarks of what
//! several frames see, by the frames' poses and the [`Camera`]'s calibration. [`LandmarkMap::register`] then places any
//! picture of the same place: where its camera was, with a covariance, or a typed reason why that cannot be said.
//!
//! ```
//! use mindseye_landmarks::{Camera, Extractor, ExtractorConfig, Gray, LandmarkMap, MapConfig, RegisterConfig, Unregistered};
//!
//! let camera = Camera::pinhole(64, 48, 50.0, 50.0, 31.5, 23.5)?;
//! let grey = Gray::new(64, 48, vec![0.5; 64 * 48]);
//! let features = Extractor::new(ExtractorConfig::default()).extract(&grey);
//! let mut map = LandmarkMap::new(MapConfig::default());
//! let placed = map.register(&features, &camera, None, &RegisterConfig::default());
//! assert_eq!(placed, Err(Unregistered::NoFeatures { features: 0 }), "a grey picture shows nothing");
//! # Ok::<(), mindseye_landmarks::CameraError>(())
//! ```
//!
//! [`GeometricLift`] judges imagined drives with it and makes goal poses of them. [`ObjectMap`] makes things in the map of
//! the boxes that a detector draws in such frames.
//!
//! For pictures too small for features, [`Carrier`] carries remembered pictures with their depth into other views, and
//! [`Placer`] finds the place from which that looks most like a picture.
//!
//! # Frames and units
//! Metres and radians. A camera's axes: x right, y down, z forward. Poses are `map_from_camera`. Residuals are taken in
//! the plane `z = 1` before the camera and multiplied by its focal length: pixels of an undistorted picture.
//!
//! # Why no library
//! `kornia-imgproc` and `kornia-3d` 0.2 have all of it. Measured at 416 x 312 on a kitchen's photographs: their SIFT at
//! the picture's own size takes about 100 ms of a core for 200 to 350 features, against the 30 ms that a robot has here
//! (their ORB takes 20 ms, but ORB lost frames that SIFT places); and they add 150 s (`kornia-imgproc` alone) to 390 s
//! of CPU to a build, with a second version of nalgebra, where this crate takes a few.

pub mod camera;
pub mod carry;
pub mod features;
mod grid;
mod index;
pub mod lift;
pub mod map;
pub mod objects;
pub mod place;
pub mod pnp;
pub mod register;
pub mod triangulate;

pub use camera::{Camera, CameraError, Distortion};
pub use carry::{Carried, Carrier, CarryConfig, CarryError, Remembered};
pub use features::{Descriptor, Extractor, ExtractorConfig, Features, Gray, Keypoint, Picture};
pub use lift::{
    GeometricLift, Hole, ImaginedFrame, Inconsistent, Lift, LiftConfig, LiftedGoal, PictureLift,
    PosedPicture, Standing, stand_before,
};
pub use map::{Inserted, Landmark, LandmarkMap, MapConfig, MapCounts};
pub use objects::{MapObject, ObjectConfig, ObjectCounts, ObjectMap, SeenBox};
pub use place::{Look, PlaceConfig, Placed, Placer};
pub use register::{RegisterConfig, Registration, Unregistered};
