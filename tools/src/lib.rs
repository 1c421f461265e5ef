//! Export, evaluation, curation and golden checks; training lives in `mindseye-train`.

pub use mindseye_train::eager;
