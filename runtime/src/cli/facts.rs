//! What a report says of the program, the model and the configuration that it was made with.

use crate::config::RobotConfig;
use crate::mind::Pipeline;
use mindseye_base::file::sha256_of_file;
use std::ffi::OsString;
use std::path::Path;

/// A titled table.
pub type Table = (String, Vec<(String, String)>);

fn table(title: &str, rows: impl IntoIterator<Item = (&'static str, String)>) -> Table {
    (title.to_owned(), rows.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// The command of this process, as a shell takes it; the program is called by its name.
pub fn command(arguments: impl Iterator<Item = OsString>) -> String {
    let rest = arguments.skip(1).map(|argument| quoted(&argument.to_string_lossy()));
    std::iter::once("mindseye".to_owned()).chain(rest).collect::<Vec<_>>().join(" ")
}

fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', "'\\''"))
}

/// The program, and the model where there is one.
pub fn program(pipeline: Option<&Pipeline>) -> Vec<Table> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let machine = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    let mut out = vec![table("Program", [("mindseye", version), ("machine", machine)])];
    if let Some(pipeline) = pipeline {
        let spec = pipeline.spec();
        out.push(table(
            "Model",
            [
                ("name", pipeline.bundle().manifest().name.clone()),
                ("folder", pipeline.bundle().directory().display().to_string()),
                ("bundle, SHA-256", spec.bundle_sha256.clone()),
                ("engine, SHA-256", spec.engine_sha256.clone()),
                ("settings", format!("{:?}", spec.settings)),
            ],
        ));
    }
    out
}

/// What was configured, without the session: it may hold passwords.
pub fn configuration(config: &RobotConfig, file: Option<&Path>) -> Table {
    let from = file.map_or("defaults".into(), |path| format!("{} {}", path.display(), hash(path)));
    table(
        "Configuration",
        [
            ("from", from),
            ("topics", format!("{:?}", config.topics)),
            ("frames", format!("{:?}", config.frames)),
            ("odometry", format!("{:?}", config.odometry)),
            ("context", format!("{:?}", config.context)),
            ("goals", format!("{:?}", config.goals)),
            ("model", format!("{:?}", config.model)),
            ("detector", format!("{:?}", config.detector)),
            ("camera", format!("{:?}", config.camera)),
        ],
    )
}

/// "SHA-256 ..." of a file, or why there is none.
pub fn hash(path: &Path) -> String {
    sha256_of_file(path).map_or_else(|error| format!("(not read: {error})"), |hash| format!("SHA-256 {hash}"))
}

/// The files of a bag with their sizes and hashes.
pub fn recording(bag: &Path) -> Table {
    let mut files = vec![bag.to_owned()];
    if bag.is_dir() {
        let entries = std::fs::read_dir(bag).into_iter().flatten().flatten();
        files = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
    }
    let row = |path: &std::path::PathBuf| {
        let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
        (path.display().to_string(), format!("{bytes} bytes, {}", hash(path)))
    };
    ("Recording".into(), files.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_go_back_into_a_shell() {
        let arguments = ["/opt/x/mindseye", "replay", "a b.mcap", "--goal", "it's $HOME", "--seed=3", ""];
        let said = command(arguments.into_iter().map(OsString::from));
        assert_eq!(said, "mindseye replay 'a b.mcap' --goal 'it'\\''s $HOME' --seed=3 ''");
        let script = format!("mindseye() {{ printf '%s\\n' \"$@\"; }}; {said}");
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let lines = String::from_utf8(out.stdout).unwrap();
        assert_eq!(lines.lines().collect::<Vec<_>>(), arguments[1..]);
    }

    #[test]
    fn a_bag_in_a_folder_has_a_row_for_each_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("b.mcap"), b"abc").unwrap();
        std::fs::write(folder.path().join("a.yaml"), b"").unwrap();
        let (_, rows) = recording(folder.path());
        assert!(rows[0].0.ends_with("a.yaml") && rows[1].0.ends_with("b.mcap"));
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(rows[1].1, format!("3 bytes, SHA-256 {abc}"));
        assert!(recording(&folder.path().join("none")).1[0].1.contains("not read"));
    }

    #[test]
    fn the_session_stays_out() {
        // A session's settings may hold passwords.
        let mut config = RobotConfig { status_period_ms: 77, ..RobotConfig::default() };
        config.ros.zenoh.connect = Some(vec!["tls/secret.example:7447".into()]);
        config.context.capacity = 1234;
        let (_, rows) = configuration(&config, None);
        let said = rows.iter().map(|(_, value)| value.as_str()).collect::<String>();
        assert!(said.contains("capacity: 1234") && !said.contains("secret.example"), "{said}");
    }
}
