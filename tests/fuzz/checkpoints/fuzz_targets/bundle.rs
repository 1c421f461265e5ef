//! Reads arbitrary text as the manifest of a bundle.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mindseye_engines::bundle::{Bundle, MANIFEST};

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join(MANIFEST), bytes).expect("a temporary file");
    if let Ok(bundle) = Bundle::load(dir.path()) {
        assert!(bundle.manifest().component.is_empty(), "there are no files");
    }
});
