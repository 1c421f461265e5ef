//! Whether a run may go on from a checkpoint: what must agree, and what is said when it does not.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Fields that may change while a run goes on: how long, how fast, what is written. Where files lie is no part of
/// a run either.
const FREE: [&str; 15] = [
    "model",
    "steps",
    "warmup",
    "decay_from",
    "optim.lr",
    "checkpoint_every",
    "log_every",
    "eval_every",
    "eval_houses",
    "checkpoint_blocks",
    "render_threads",
    "data.path",
    "data.cache",
    "distill.teacher",
    "codec_blocks", // the codec is among the weights
];

/// Where what a checkpoint was written with differs from what it would go on with, one sentence per field; `stored` is
/// TOML, `prefix` comes before the names of its fields.
#[must_use]
pub fn differences<T: Serialize + DeserializeOwned>(
    prefix: &str,
    what: &str,
    stored: &str,
    here: &T,
) -> Vec<String> {
    let mut out = Vec::new();
    match toml::from_str::<T>(stored) {
        Ok(there) => compare(prefix, table(&there), table(here), &mut out),
        Err(e) => out.push(format!("its {what} cannot be read ({})", e.message())),
    }
    out
}

fn table<T: Serialize>(value: &T) -> Table {
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
