//! mindseye: camera frames in, an imagined drive, a grounded goal pose out.
//!
//! ```
//! use mindseye::planar::{Pose2, point_from};
//! // Where the base stood, and what it saw two metres ahead of it.
//! let odom_from_base = Pose2::new(1.0, 2.0, std::f64::consts::FRAC_PI_2);
//! let (x, y) = point_from(odom_from_base, 2.0, 0.0);
//! assert!((x - 1.0).abs() < 1e-12 && (y - 4.0).abs() < 1e-12);
//! ```
//!
//! The pure core takes values and a time and returns values; it reads no clock, file or socket:
//! * [`context`]: what the robot has seen, as a fixed ring of video latents;
//! * [`imagine`]: the sampler over the denoiser, with joint guidance, deadlines and cancellation;
//! * [`recall`]: what was seen, carried into other views: imagined drives are read against it;
//! * [`guide`]: the drive that is shown, held to what was seen;
//! * [`lift`], [`boxes`]: where the base should stand, and whether to believe it;
//! * [`geometric`]: the same for models without heads, by landmarks;
//! * [`ground`]: one goal from end to end, over a model behind [`ground::Mind`]; [`interpose`]: what watches or changes one;
//! * [`agent`]: goals, pre-emption, staleness, deadlines, drives and arrivals as a step function;
//! * [`senses`]: ROS messages to memory, for live robots and bags alike, with [`topics`] (which are which), [`stamps`] (one
//!   clock), [`frames`] (names in the transform tree) and [`watch`] (frozen cameras); [`replay`]: a whole bag and one goal.
//!
//! * [`study`]: kept frames in full, for landmarks and a detector; [`witness`]: what the detector's things say of a goal.
//!
//! The shell around it:
//! * [`mind`]: a model bundle on a backend;
//! * [`node`]: threads, Zenoh and nav2's action; [`record`]: MCAP; [`config`]: robots; [`profile`]: stage times;
//! * [`visit`]: rendered houses as a robot knows them, for `engine` and evaluations;
//! * [`cli`]: the `mindseye` command.

pub mod agent;
pub mod boxes;
pub mod cli;
mod codec;
pub mod config;
pub mod context;
pub mod frames;
pub mod geometric;
pub mod ground;
pub mod guide;
pub mod image;
pub mod imagine;
pub mod interpose;
pub mod lift;
pub mod mind;
mod no_model;
pub mod node;
pub mod overview;
pub mod planar;
pub mod profile;
pub mod recall;
pub mod record;
pub mod replay;
pub mod senses;
pub mod stamps;
pub mod study;
#[cfg(feature = "top")]
pub mod top;
pub mod topics;
#[cfg(feature = "view")]
pub mod view;
#[cfg(feature = "world")]
pub mod visit;
pub mod watch;
pub mod witness;
