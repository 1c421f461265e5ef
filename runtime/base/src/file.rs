//! Files that are written whole or not at all, and their hashes.

use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::Path;

/// Writes a file under a hidden temporary name in the same folder, flushes it to the disk and puts it in the place
/// of `path`.
///
/// ```
/// use std::io::Write;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("a.txt");
/// mindseye_base::file::write_atomically(&path, |out| out.write_all(b"whole"))?;
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// The file cannot be created, written, flushed or renamed, or `write` fails. What stood at `path` before is still
/// there then, and nothing is left beside it.
pub fn write_atomically<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file", path.display()))
    })?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    // Without this only the owner could read the file; the process's mask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let (file, temporary) = builder.tempfile_in(folder)?.into_parts();
    let mut out = BufWriter::new(file);
    write(&mut out)?;
    out.flush()?;
    out.get_ref().sync_all()?;
    temporary.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// [`write_atomically`] of bytes that are at hand.
///
/// # Errors
/// As [`write_atomically`].
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_atomically(path, |out| out.write_all(bytes))
}

/// SHA-256 of bytes, 64 lowercase hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&sha256_bytes(bytes))
}

/// SHA-256 of bytes.
#[must_use]
pub fn sha256_bytes(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// SHA-256 of a file's content, 64 lowercase hexadecimal digits; the file is read in pieces.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lowercase hexadecimal digits, two per byte.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    hex::encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).expect("the folder can be read");
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_failed_write_keeps_what_was_there_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("kept");
        replace(&path, b"before").expect("written");
        let failed = write_atomically(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::other("the source ended"))
        });
        assert_eq!(failed.expect_err("fails").to_string(), "the source ended");
        assert_eq!(std::fs::read(&path).expect("readable"), b"before");
        assert_eq!(names(folder.path()), ["kept"]);
        replace(&path, b"after").expect("written");
        assert_eq!(std::fs::read(&path).expect("readable"), b"after");
        assert_eq!(names(folder.path()), ["kept"]);
    }

    #[test]
    fn a_path_without_a_name_or_a_folder_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(replace(Path::new("/"), b"").expect_err("fails").kind(), io::ErrorKind::InvalidInput);
        assert!(replace(&folder.path().join("absent/file"), b"").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_mask_allows() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        replace(&ours, b"").expect("written");
        std::fs::write(&plain, b"").expect("written");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    /// Vectors of FIPS 180-2, appendix B.
    #[test]
    fn sha256_of_known_texts() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("abc");
        std::fs::write(&path, b"abc").expect("written");
        assert_eq!(sha256_of_file(&path).expect("readable"), abc);
        let long = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        std::fs::write(&path, vec![b'a'; 1_000_000]).expect("written");
        assert_eq!(sha256_of_file(&path).expect("readable"), long);
        assert_eq!(hex(&[0, 15, 255]), "000fff");
    }
}
