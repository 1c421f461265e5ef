//! Directory bags: `metadata.yaml` (versions 1 to 9) with one or more files, or the files alone.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_yaml_ng::Value;

use super::{Bag, Damage, OpenBagError, OpenOptions, assemble, offers_transient_local, open_file};

/// Larger files are not believed to be metadata.
const METADATA_BYTES_MAX: u64 = 16 << 20;

/// What is used of `metadata.yaml`.
#[derive(Debug, Default)]
struct Metadata {
    files: Vec<String>,
    counts: HashMap<String, u64>,
    /// Type hash and quality of service by topic.
    topics: HashMap<String, (Option<String>, String)>,
}

/// Reads the text of a `metadata.yaml`; `None` when it is not one.
fn parse(text: &str) -> Option<Metadata> {
    let value: Value = serde_yaml_ng::from_str(text).ok()?;
    let root = value.get("rosbag2_bagfile_information")?;
    let mut metadata = Metadata::default();
    let text_of = |v: &Value| v.as_str().map(str::to_owned);
    let list = |v: Option<&Value>| v.and_then(Value::as_sequence).cloned().unwrap_or_default();
    metadata.files = list(root.get("relative_file_paths")).iter().filter_map(text_of).collect();
    for file in list(root.get("files")) {
        let (path, count) = (file.get("path").and_then(text_of), file.get("message_count"));
        if let (Some(path), Some(count)) = (path, count.and_then(Value::as_u64)) {
            metadata.counts.insert(path, count);
        }
    }
    if metadata.files.is_empty() {
        metadata.files = metadata.counts.keys().cloned().collect();
        metadata.files.sort();
    }
    for topic in list(root.get("topics_with_message_count")) {
        let Some(topic) = topic.get("topic_metadata") else { continue };
        let Some(name) = topic.get("name").and_then(text_of) else { continue };
        let hash = topic.get("type_description_hash").and_then(text_of);
        // A YAML text up to version 8, a list since version 9.
        let qos = match topic.get("offered_qos_profiles") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Sequence(list)) if !list.is_empty() => {
                serde_yaml_ng::to_string(list).unwrap_or_default()
            }
            _ => String::new(),
        };
        metadata.topics.insert(name, (hash.filter(|h| h.starts_with("RIHS")), qos));
    }
    Some(metadata)
}

fn is_bag(name: &str) -> bool {
    let plain = name.strip_suffix(".zstd").unwrap_or(name);
    [".mcap", ".db3", ".bag"].iter().any(|ending| plain.ends_with(ending))
}

/// `bag_10` after `bag_9`.
fn natural_key(name: &str) -> (String, u64) {
    let stem = name.split('.').next().unwrap_or(name);
    let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (head, tail) = stem.split_at(stem.len() - digits);
    (head.to_owned(), tail.parse().unwrap_or(0))
}

fn files_of(dir: &Path) -> Result<Vec<PathBuf>, OpenBagError> {
    let io = |source| OpenBagError::Io { path: dir.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_bag(&name) && !name.starts_with('.') && entry.path().is_file() {
            names.push(name);
        }
    }
    // The plain file of a pair `x.db3`, `x.db3.zstd` is enough.
    let all = names.clone();
    names.retain(|n| n.strip_suffix(".zstd").is_none_or(|plain| !all.iter().any(|o| o == plain)));
    names.sort_by_key(|name| (natural_key(name), name.clone()));
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// The file that `metadata.yaml` means: older versions name it with the directory, and some without the
/// ending of the compression.
fn find(dir: &Path, named: &str) -> Option<PathBuf> {
    let name = Path::new(named).file_name()?.to_str()?;
    let without = name.strip_suffix(".zstd").unwrap_or(name);
    [name.to_owned(), format!("{name}.zstd"), without.to_owned()]
        .into_iter()
        .map(|n| dir.join(n))
        .find(|path| path.is_file())
}

pub(super) fn open(dir: &Path, options: &OpenOptions) -> Result<Bag, OpenBagError> {
    let path = dir.join("metadata.yaml");
    let mut damage = Vec::new();
    let small = fs::metadata(&path).is_ok_and(|m| m.len() <= METADATA_BYTES_MAX);
    let text = if small { fs::read(&path).ok() } else { None };
    let metadata = text.and_then(|bytes| {
        let parsed = parse(&String::from_utf8_lossy(&bytes));
        if parsed.is_none() {
            let what =
                Damage::new("metadata.yaml", "the file cannot be understood; the bag files are used alone");
            damage.push(what.messages(Some(0)));
        }
        parsed
    });
    let mut paths = Vec::new();
    if let Some(metadata) = &metadata {
        for named in &metadata.files {
            match find(dir, named) {
                Some(path) if !paths.contains(&path) => paths.push(path),
                Some(_) => {}
                None => {
                    let what = Damage::new(named, "the file is named by metadata.yaml and absent");
                    damage.push(what.messages(metadata.counts.get(named).copied()));
                }
            }
        }
    }
    if paths.is_empty() {
        paths = files_of(dir)?;
    }
    if paths.is_empty() {
        return Err(OpenBagError::NoFiles { path: dir.to_path_buf() });
    }
    let (mut opened, mut used) = (Vec::new(), Vec::new());
    let mut first_error = None;
    for path in paths {
        match open_file(&path, options) {
            Ok(one) => {
                opened.push(one);
                used.push(path);
            }
            Err(e) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let count = metadata.as_ref().and_then(|m| m.counts.get(&name)).copied();
                damage.push(Damage::new(&name, e.to_string()).messages(count));
                first_error.get_or_insert(e);
            }
        }
    }
    if let (true, Some(error)) = (opened.is_empty(), first_error) {
        return Err(error);
    }
    if let Some(metadata) = metadata {
        for topic in opened.iter_mut().flat_map(|o| &mut o.topics) {
            let Some((hash, qos)) = metadata.topics.get(&topic.name) else { continue };
            topic.type_hash = topic.type_hash.take().or_else(|| hash.clone());
            if topic.offered_qos.is_empty() {
                topic.offered_qos.clone_from(qos);
                topic.latched |= offers_transient_local(qos);
            }
        }
    }
    Ok(assemble(opened, used, damage))
}

/// Reads a `metadata.yaml` text and says whether it is one; for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn parses_as_metadata(text: &str) -> bool {
    parse(text).is_some()
}
