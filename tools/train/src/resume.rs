//! Whether a run may go on from a checkpoint: what must agree, and what is said when it does not.

use toml::{Table, Value};

use crate::config::TrainConfig;
use crate::family::HouseModel;

/// Fields that may change while a run goes on: how long, how fast, what is written. Where files lie is no part of
/// a run either.
const FREE: [&str; 13] = [
    "model",
    "steps",
    "warmup",
    "decay_from",
    "optim.lr",
    "checkpoint_every",
    "log_every",
    "eval_every",
    "eval_houses",
    "data.path",
    "data.cache",
    "distill.teacher",
    "codec_blocks", // the codec is among the weights
];

/// Where the configuration of a checkpoint differs from the one that it would go on with, one sentence per field;
/// `stored` and `stored_model` are TOML.
#[must_use]
pub fn differences(
    stored: &str,
    stored_model: &str,
    config: &TrainConfig,
    model: &HouseModel,
) -> Vec<String> {
    let mut out = Vec::new();
    // Through the types, so that a field that the checkpoint does not know yet has its default.
    match toml::from_str::<TrainConfig>(stored) {
        Ok(there) => compare("", table(&there), table(config), &mut out),
        Err(e) => out.push(format!("its configuration cannot be read ({})", e.message())),
    }
    if !stored_model.is_empty() {
        match toml::from_str::<HouseModel>(stored_model) {
            Ok(there) => compare("model.", table(&there), table(model), &mut out),
            Err(e) => out.push(format!("its model cannot be read ({})", e.message())),
        }
    }
    out
}

fn table<T: serde::Serialize>(value: &T) -> Table {
    Table::try_from(value).unwrap_or_default()
}

fn compare(prefix: &str, there: Table, mut here: Table, out: &mut Vec<String>) {
    for (key, a) in there {
        let name = format!("{prefix}{key}");
        let b = here.remove(&key);
        if FREE.contains(&name.as_str()) || b.as_ref() == Some(&a) {
            continue;
        }
        match (a, b) {
            (Value::Table(a), Some(Value::Table(b))) => compare(&format!("{name}."), a, b, out),
            (a, Some(b)) => out.push(format!("{name} = {a} there, {b} here")),
            (a, None) => out.push(format!("{name} = {a} there, not set here")),
        }
    }
    for (key, b) in here {
        let name = format!("{prefix}{key}");
        if !FREE.contains(&name.as_str()) {
            out.push(format!("{name} not set there, {b} here"));
        }
    }
}
