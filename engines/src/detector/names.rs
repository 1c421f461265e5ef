//! Names of a detector's classes.

use std::path::{Path, PathBuf};

use super::DetectorError;

/// Names, and where they are from: the given file, the model's metadata, a text file beside the model.
pub(super) fn names(
    model: &Path,
    given: Option<&Path>,
    metadata: &[(String, String)],
) -> Result<(Vec<String>, PathBuf), DetectorError> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|source| DetectorError::Classes { path: path.to_owned(), source })
    };
    if let Some(path) = given {
        return match listed(&read(path)?) {
            names if names.is_empty() => {
                Err(DetectorError::NoClasses { path: model.to_owned(), looked: vec![path.to_owned()] })
            }
            names => Ok((names, path.to_owned())),
        };
    }
    for key in ["names", "classes", "labels", "class_names"] {
        let found = metadata.iter().find(|(k, _)| k == key).map(|(_, text)| of_metadata(text));
        if let Some(names) = found.filter(|names| !names.is_empty()) {
            return Ok((names, model.to_owned()));
        }
    }
    let beside = |name: &str| model.with_file_name(name);
    let looked = vec![
        model.with_extension("txt"),
        model.with_extension("names"),
        beside("classes.txt"),
        beside("coco_classes.txt"),
        beside("coco.names"),
    ];
    for path in looked.iter().filter(|p| p.is_file()) {
        let names = listed(&read(path)?);
        if !names.is_empty() {
            return Ok((names, path.clone()));
        }
    }
    Err(DetectorError::NoClasses { path: model.to_owned(), looked })
}

/// One name a line; empty lines at the end do not count.
fn listed(text: &str) -> Vec<String> {
    let mut names: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    while names.last().is_some_and(String::is_empty) {
        names.pop();
    }
    names
}

/// `{0: 'person', 1: 'bicycle'}` (Python, as ultralytics writes it), the same in JSON, a list of strings, or names by
/// line or comma.
fn of_metadata(text: &str) -> Vec<String> {
    let text = text.trim();
    let inner = |open, close| text.strip_prefix(open).and_then(|t: &str| t.strip_suffix(close));
    if let Some(inner) = inner('{', '}') {
        let mut names: Vec<String> = Vec::new();
        for (number, name) in pairs(inner) {
            // More classes than any detector has would only be a way to fill the memory.
            if number >= 100_000 {
                return Vec::new();
            }
            if names.len() <= number {
                names.resize(number + 1, String::new());
            }
            names[number] = name;
        }
        return names;
    }
    if let Some(inner) = inner('[', ']') {
        let mut names = Vec::new();
        let mut rest = inner;
        while let Some((name, after)) = quoted(rest) {
            names.push(name);
            rest = after;
        }
        return names;
    }
    match text.contains('\n') {
        true => listed(text),
        false => text.split(',').map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()).collect(),
    }
}

/// Numbers and quoted names.
fn pairs(mut rest: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    while let Some((key, after)) = rest.split_once(':') {
        let number = key.trim_matches(|c: char| !c.is_ascii_digit()).parse();
        let (Ok(number), Some((name, after))) = (number, quoted(after)) else { break };
        all.push((number, name));
        rest = after;
    }
    all
}

/// The first quoted text, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let at = text.find(['\'', '"'])?;
    let mark = text[at..].chars().next()?;
    let mut name = String::new();
    let mut chars = text[at + 1..].char_indices();
    while let Some((k, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            c if c == mark => return Some((name, &text[at + 1 + k + 1..])),
            c => name.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_exporters_write_them() {
        for (text, want) in [
            ("{0: 'person', 1: 'traffic light'}", &["person", "traffic light"][..]),
            ("{\"0\": \"person\", \"1\": \"it's\"}", &["person", "it's"]),
            ("{1: 'b', 0: 'a\\'s'}", &["a's", "b"]),
            ("['a', \"b\"]", &["a", "b"]),
            ("a\nb\n", &["a", "b"]),
            ("a, b", &["a", "b"]),
            ("{0: 'a', 99999999: 'b'}", &[]),
            ("{", &["{"]),
        ] {
            assert_eq!(of_metadata(text), want, "{text}");
        }
    }
}
