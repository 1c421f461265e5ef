//! Where Python keeps the packages in which libraries come that are opened at run time.

use std::path::{Path, PathBuf};

/// Folders of packages in the Python environments of this user and machine: the active environment first, of several versions
/// the newest name first.
pub(crate) fn python_packages() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        roots.extend(std::env::var_os(variable).map(PathBuf::from));
    }
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from) {
        roots.push(home.join(".local"));
        roots.extend(children(&home.join(".pyenv/versions")));
    }
    roots.extend(["/usr/local", "/usr", "/opt/venv"].map(PathBuf::from));
    let mut folders = Vec::new();
    for root in roots {
        let python = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"));
        let mut versions: Vec<PathBuf> = children(&root.join("lib")).filter(python).collect();
        versions.sort();
        for version in versions.into_iter().rev() {
            folders.extend(["site-packages", "dist-packages"].map(|packages| version.join(packages)));
        }
    }
    folders
}

/// What lies in a folder; nothing where it cannot be read.
pub(crate) fn children(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path())
}
