//! mindseye: camera frames in, an imagined drive, a grounded goal pose out.
//!
//! The pure core takes values and a time and returns values:
//! * [`context`]: what the robot has seen, as a fixed ring of video latents;
//! * [`imagine`]: the sampler over the denoiser;
//! * [`ground`]: one goal from end to end;
//! * [`lift`]: where the base should stand, and whether to believe it;
//! * [`agent`]: goals, deadlines and cancellation as a step function.

pub mod agent;
pub mod boxes;
pub mod cli;
pub mod config;
pub mod context;
pub mod ground;
pub mod image;
pub mod imagine;
pub mod lift;
pub mod mind;
pub mod node;
pub mod planar;
pub mod profile;
pub mod record;
pub mod senses;
