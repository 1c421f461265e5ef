// The bridge's sources that need neither Zenoh nor files.
#[path = "../../../../bridge/src/camera.rs"]
mod camera;
#[path = "../../../../bridge/src/cdr.rs"]
mod cdr;
#[path = "../../../../bridge/src/geometry.rs"]
mod geometry;
#[path = "../../../../bridge/src/goal.rs"]
mod goal;
#[path = "../../../../bridge/src/msg/mod.rs"]
mod msg;
#[path = "../../../../bridge/src/time.rs"]
mod time;
