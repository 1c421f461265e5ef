//! Directory bags: `metadata.yaml` (versions 1 to 9) with one or more files, or the files alone.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_yaml_ng::Value;

use super::qos::offers_transient_local;
use super::side::Attachment;
use super::{Bag, Damage, OpenBagError, OpenOptions, Opened, assemble, open_file};

/// Larger files are not believed to be metadata.
const METADATA_BYTES_MAX: u64 = 16 << 20;

/// What is used of `metadata.yaml`.
#[derive(Debug, Default)]
struct Metadata {
    files: Vec<String>,
    counts: HashMap<String, u64>,
    /// Messages of all files.
    messages: Option<u64>,
    /// Type hash and quality of service by topic.
    topics: HashMap<String, (Option<String>, String)>,
}

/// Reads the text of a `metadata.yaml`; `None` when it is not one.
fn parse(text: &str) -> Option<Metadata> {
    let value: Value = serde_yaml_ng::from_str(text).ok()?;
    let root = value.get("rosbag2_bagfile_information")?;
    let mut metadata = Metadata::default();
    let text_of = |v: &Value| v.as_str().map(str::to_owned);
    metadata.messages = root.get("message_count").and_then(Value::as_u64);
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

/// Name and number of a part of a split recording: `drive_3.mcap` of rosbag2, `drive_2024-05-01-10-00-00_3.bag` of
/// `rosbag record --split`, whose parts carry their own dates.
fn part_of(name: &str) -> Option<(String, u64, String)> {
    let plain = name.strip_suffix(".zstd").unwrap_or(name);
    let (stem, ending) = plain.rsplit_once('.')?;
    let (head, number) = stem.rsplit_once('_')?;
    let number = number.parse().ok()?;
    let date = head.rsplit_once('_').filter(|(_, date)| {
        date.len() == "2024-05-01-10-00-00".len() && date.bytes().all(|b| b.is_ascii_digit() || b == b'-')
    });
    let head = date.map_or(head, |(head, _)| head);
    Some((head.to_owned(), number, ending.to_owned()))
}

/// True for the files of one recording: one file, or parts with the same name and different numbers.
fn is_one_recording(names: &[String]) -> bool {
    let parts: Option<Vec<_>> = names.iter().map(|name| part_of(name)).collect();
    let Some(mut parts) = parts else { return names.len() <= 1 };
    parts.sort();
    names.len() <= 1 || parts.windows(2).all(|w| w[0].0 == w[1].0 && w[0].1 != w[1].1 && w[0].2 == w[1].2)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
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
    let metadata = text.as_ref().and_then(|bytes| {
        let parsed = parse(&String::from_utf8_lossy(bytes));
        if parsed.is_none() {
            let what =
                Damage::new("metadata.yaml", "the file cannot be understood; the bag files are used alone");
            damage.push(what.messages(Some(0)));
        }
        parsed
    });
    let paths = choose_files(dir, metadata.as_ref(), &mut damage)?;
    let (mut opened, mut used) = (Vec::new(), Vec::new());
    let mut first_error = None;
    for path in paths {
        match open_file(&path, options) {
            Ok(one) => {
                opened.push(one);
                used.push(path);
            }
            Err(e) => {
                let name = name_of(&path);
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
        compare_counts(&metadata, &opened, &mut damage);
        for topic in opened.iter_mut().flat_map(|o| &mut o.topics) {
            let Some((hash, qos)) = metadata.topics.get(&topic.name) else { continue };
            topic.type_hash = topic.type_hash.take().or_else(|| hash.clone());
            if topic.offered_qos.is_empty() {
                topic.offered_qos.clone_from(qos);
                topic.latched |= offers_transient_local(qos);
            }
        }
        if let (Some(text), Some(first)) = (text, opened.first_mut())
            && !first.side.attachments.iter().any(|a| a.name == "metadata.yaml")
        {
            let whole = Attachment::in_memory("metadata.yaml", "application/yaml", text);
            first.side.attachments.push(whole);
        }
    }
    Ok(assemble(opened, used, damage))
}

/// The files that the metadata name, or those of the directory.
fn choose_files(
    dir: &Path,
    metadata: Option<&Metadata>,
    damage: &mut Vec<Damage>,
) -> Result<Vec<PathBuf>, OpenBagError> {
    let mut paths = Vec::new();
    for named in metadata.iter().flat_map(|m| &m.files) {
        match find(dir, named) {
            Some(path) if !paths.contains(&path) => paths.push(path),
            Some(_) => {}
            None => {
                let what = Damage::new(named, "the file is named by metadata.yaml and absent");
                let count = metadata.and_then(|m| m.counts.get(named)).copied();
                damage.push(what.messages(count));
            }
        }
    }
    let present = files_of(dir)?;
    if paths.is_empty() {
        let names: Vec<String> = present.iter().map(|path| name_of(path)).collect();
        return match names.len() {
            0 => Err(OpenBagError::NoFiles { path: dir.to_path_buf() }),
            _ if is_one_recording(&names) => Ok(present),
            _ => Err(OpenBagError::Unrelated { path: dir.to_path_buf(), files: names }),
        };
    }
    // A recorder that was killed may have begun a part that the metadata do not name yet.
    let mut names: Vec<String> = paths.iter().map(|path| name_of(path)).collect();
    for path in present.into_iter().filter(|path| !paths.contains(path)) {
        let name = name_of(&path);
        names.push(name.clone());
        let part = names.iter().all(|n| part_of(n).is_some()) && is_one_recording(&names);
        names.pop();
        if part {
            let what = "the file is a part of the recording that metadata.yaml does not name; it is left out";
            damage.push(Damage::new(&name, what));
        }
    }
    Ok(paths)
}

/// Tells when the files hold another number of messages than the metadata say, and nothing else explains it.
fn compare_counts(metadata: &Metadata, opened: &[Opened], damage: &mut Vec<Damage>) {
    let Some(stated) = metadata.messages else { return };
    let found: u64 = opened.iter().flat_map(|o| &o.topics).map(|t| t.count).sum();
    let known = || damage.iter().chain(opened.iter().flat_map(|o| &o.damage));
    let lost: u64 = known().filter_map(|d| d.messages_lost).sum();
    if known().any(|d| d.messages_lost.is_none()) || found + lost == stated {
        return;
    }
    let what = format!("metadata.yaml counts {stated} messages, the files hold {found}");
    let missing = stated.saturating_sub(found + lost);
    damage.push(Damage::new("metadata.yaml", what).messages(Some(missing)));
}

/// Reads a `metadata.yaml` text and says whether it is one; for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn parses_as_metadata(text: &str) -> bool {
    parse(text).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_recording_are_known_by_name() {
        // names, one recording
        let cases: [(&[&str], bool); 8] = [
            (&["a.mcap"], true),
            (&["drive_0.mcap", "drive_1.mcap", "drive_10.mcap"], true),
            (&["drive_0.db3.zstd", "drive_1.db3"], true),
            (&["d_2024-05-01-10-00-00_0.bag", "d_2024-05-01-10-05-00_1.bag"], true),
            (&["a.mcap", "b.mcap"], false),
            (&["a_0.mcap", "b_1.mcap"], false),
            (&["a_0.mcap", "a_1.db3"], false),
            (&["2024-05-01-10-00-00.bag", "2024-05-01-10-05-00.bag"], false),
        ];
        for (names, want) in cases {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            assert_eq!(is_one_recording(&names), want, "{names:?}");
        }
    }
}
