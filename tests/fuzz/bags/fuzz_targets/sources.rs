#[path = "../../../../bridge/src/bag/mod.rs"]
mod bag;
#[path = "../../../../bridge/src/image.rs"]
mod image;
