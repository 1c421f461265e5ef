//! A procedural house, a fast software renderer and a simulated differential-drive robot. Pure Rust, no training
//! framework, no clock, no files: everything is a function of seeds and arguments.
//!
//! ```
//! use mindseye_world::{Camera, Difficulty, Frame, House, Rng};
//! use mindseye_world::{approach, draw_box, exploration_sweep, project_box, random_pose, render};
//!
//! let house = House::generate(7, &Difficulty::plain());
//! let mut rng = Rng::new(7);
//! let camera = Camera::new(24, 16);
//! let mut frame = Frame::new(); // reused: rendering allocates nothing after the first frame
//! for pose in exploration_sweep(&house, &mut rng, 96) {
//!     render(&house, pose, &camera, &mut frame);
//!     assert_eq!(frame.rgb.len(), 24 * 16 * 3);
//! }
//! let drive = approach(&house, random_pose(&house, &mut rng), 0, 17);
//! render(&house, drive.final_pose, &camera, &mut frame);
//! if let Some(area) = project_box(&house, drive.final_pose, &camera, 0) {
//!     draw_box(&mut frame.rgb, camera.width, area, [255, 0, 0]);
//! }
//! println!("find the {}", house.objects[0].name);
//! ```
//!
//! # Frames and units
//! Map: x and y on the floor, z up, metres; yaw counter-clockwise from x, radians (REP-103). The map's origin is the
//! house's middle. Camera: x right, y down, z forward; see [`Camera`] for pixels.
//!
//! # Tour
//! * [`House::generate`] with a [`Difficulty`]: rooms, doors, [`Object`]s with a name, a place and a size.
//! * [`render`], [`render_with`]: RGB, planar depth and instance ids into a reused [`Frame`]. Colours come from
//!   [`House::palette`] by index; [`Colour::permuted`] says what an object is called after swapping channels.
//! * [`exploration_sweep`], [`exploration_drive`], [`approach`], [`random_drive`]: base poses, one per frame.
//! * [`Robot`] with odometry and collisions, and [`Controller`], which drives it to a pose.
//! * [`top_down`] with [`MapView`], and [`draw`]: maps, paths, text, scaled copies.
//! * [`project_box`], [`visible_fraction`], [`draw_box`]: the red box; [`scenic_pose`]: a good view for a picture.

mod blind;
mod decor;
pub mod draw;
mod drive;
pub mod furniture;
mod geom;
mod house;
mod map;
mod plan;
mod reduce;
mod render;
mod robot;
mod view;

pub use blind::BlindController;
pub use drive::{
    Approach, DRIVE_MARGIN_M, DRIVE_SPEED_MPS, RANDOM_DRIVE_DT_SECS, STANDOFF_M, TURN_RATE_RADPS, approach,
    exploration_drive, exploration_sweep, goal_pose, random_drive, random_drive_from, random_pose,
    random_pose_beside, standoff_m,
};
pub use geom::{Camera, Pose2, wrap_angle};
pub use house::{
    CEILING_M, Colour, DOOR_HEIGHT_M, Difficulty, Door, FloorPattern, House, Object, Palette, ROBOT_RADIUS_M,
    Rect, Room, Shape, WALL_THICKNESS_M, WallPattern,
};
pub use map::{MapView, draw_path, draw_pose, draw_robot, draw_view, top_down, top_down_named};
pub use mindseye_base::random::Rng;
pub use plan::NavGrid;
pub use render::{Frame, Quality, RenderOptions, render, render_from, render_with};
pub use robot::{Controller, ControllerLimits, ControllerState, OdometryNoise, Robot, odometry_of};
pub use view::{draw_box, project_box, project_box_in, scenic_pose, visible_fraction};
