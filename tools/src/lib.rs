//! Export, shipping, evaluation, curation and golden checks; training lives in `mindseye-train`.

pub mod cli;
pub mod clips;
pub mod curate;
pub mod eval;
pub mod export;
pub mod furniture;
pub mod golden;
pub mod import;
pub mod model;
pub mod replayable;
pub mod retrain;
pub mod ship;
pub mod train;
pub mod world;

pub use mindseye_train::eager;
