//! Export, shipping, evaluation, curation and golden checks; training lives in `mindseye-train`.

pub mod curate;
pub mod eval;
pub mod export;
pub mod golden;
pub mod import;
pub mod model_cost;
pub mod ship;
pub mod train;
pub mod world;

pub use mindseye_train::eager;

/// An error and its causes as one line; a cause that the line has said already is not said again.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !line.contains(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    line
}
