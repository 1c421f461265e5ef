#[path = "../../../../bridge/src/bag/mod.rs"]
mod bag;
// Inside a module with the path of the folder, so that the parts of `image` are found in theirs.
#[path = "../../../../bridge/src"]
mod bridge {
    pub mod cdr;
    pub mod geometry;
    pub mod image;
    pub mod msg;
    pub mod time;
}
use bridge::{cdr, geometry, image, msg, time};
