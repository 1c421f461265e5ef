//! Where examiners are kept, since training one takes minutes and is the same every time.
//!
//! A file's name is the hash of everything that its examiner depends on ([`super::examiner::made_for`]), so another world,
//! codec or version of the training never meets it. Files are written whole or not at all; one that is damaged all the
//! same is made again.

use std::path::{Path, PathBuf};

use mindseye_world::Camera;

use super::examiner::Examiner;

/// Where examiners are kept by default: `mindseye/examiner` in `XDG_CACHE_HOME`, or in `.cache` of `HOME`; none when
/// neither is an absolute path. `variable` reads the environment.
#[must_use]
pub fn default_folder(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("mindseye/examiner"))
}

/// The examiner that is kept in a folder, or the one that `train` makes, which is then kept there. `say` gets a line for
/// a person about what was done; a folder that cannot be written is no error.
///
/// # Errors
/// Those of `train`.
pub fn kept_or_trained(
    folder: &Path,
    made_for: &str,
    camera: &Camera,
    train: impl FnOnce() -> anyhow::Result<Examiner>,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<Examiner> {
    let hash = mindseye_base::file::sha256(made_for.as_bytes());
    let path = folder.join(format!("{}.safetensors", &hash[..32]));
    if path.exists() {
        match Examiner::load(&path, made_for, camera) {
            Ok(Some(known)) => return Ok(known),
            Ok(None) => say(format!("examiner {}: was made for something else; made again", path.display())),
            Err(e) => say(format!("examiner {e}; made again")),
        }
    } else {
        say("training the examiner, some minutes; it is kept for the next time".to_owned());
    }
    let made = train()?;
    let kept = std::fs::create_dir_all(folder).map_err(anyhow::Error::from);
    if let Err(e) = kept.and_then(|()| Ok(made.save(&path, made_for)?)) {
        say(format!("the examiner cannot be kept in {}: {e}", folder.display()));
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::examiner::Effort;
    use crate::eval::examiner::tests::Plain;
    use mindseye_world::Difficulty;
    use std::sync::LazyLock;

    static TRAINED: LazyLock<Examiner> = LazyLock::new(|| {
        let effort = Effort { houses: 1, epochs: 1 };
        Examiner::train(&Difficulty::plain(), &Camera::new(24, 16), effort, vec![Plain]).expect("it trains")
    });

    /// Asks for an examiner; whether it was trained, and what was said.
    fn ask(folder: &Path, made_for: &str) -> (bool, String) {
        let camera = Camera::new(24, 16);
        let (mut trained, mut said) = (false, String::new());
        let train = || {
            trained = true;
            Ok(TRAINED.clone())
        };
        let got = kept_or_trained(folder, made_for, &camera, train, &mut |line| said += &line);
        assert!(got.expect("an examiner").quality.pictures > 0);
        (trained, said)
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect()
    }

    #[test]
    fn an_examiner_is_trained_once_and_again_when_it_is_damaged() {
        let dir = tempfile::tempdir().expect("a directory");
        let folder = dir.path().join("a/b");
        assert!(ask(&folder, "one").0);
        assert_eq!(ask(&folder, "one"), (false, String::new()), "kept");
        assert!(ask(&folder, "two").0, "made for something else");
        let all = files(&folder);
        assert_eq!(all.len(), 2);
        let good: Vec<Vec<u8>> = all.iter().map(|p| std::fs::read(p).expect("a file")).collect();
        type Spoil = fn(&mut Vec<u8>);
        let spoil: [(&str, Spoil); 4] = [
            ("a bit of a weight", |b| {
                let last = b.len() - 8;
                b[last] ^= 1;
            }),
            ("cut off", |b| b.truncate(b.len() / 2)),
            ("empty", Vec::clear),
            ("nonsense", |b| b.iter_mut().for_each(|v| *v = 7)),
        ];
        for (what, spoil) in spoil {
            for (path, good) in all.iter().zip(&good) {
                let mut bytes = good.clone();
                spoil(&mut bytes);
                std::fs::write(path, bytes).expect("a file");
            }
            let (trained, said) = ask(&folder, "one");
            assert!(trained && said.contains("made again"), "{what}: {said}");
            assert!(all.iter().any(|p| said.contains(&p.display().to_string())), "{what}: {said}");
            assert_eq!(ask(&folder, "one"), (false, String::new()), "{what}: whole again");
            assert_eq!(files(&folder).len(), 2, "{what}: nothing is left beside");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_said_and_no_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        std::fs::write(&file, "x").expect("a file");
        let (trained, said) = ask(&file.join("folder"), "one");
        assert!(trained && said.contains("cannot be kept in") && said.contains("folder"), "{said}");
    }

    #[test]
    fn the_folder_follows_the_environment() {
        let folder = |xdg: Option<&str>, home: Option<&str>| {
            default_folder(|name| match name {
                "XDG_CACHE_HOME" => xdg.map(str::to_owned),
                _ => home.map(str::to_owned),
            })
        };
        let path = |p: &str| Some(PathBuf::from(p));
        assert_eq!(folder(Some("/c"), Some("/h")), path("/c/mindseye/examiner"));
        assert_eq!(folder(None, Some("/h")), path("/h/.cache/mindseye/examiner"));
        assert_eq!(folder(Some("relative"), Some("/h")), path("/h/.cache/mindseye/examiner"));
        assert_eq!(folder(Some(""), None), None);
    }
}
