//! Opens arbitrary bytes as a .pth file and reads whatever is in it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mindseye_builder::checkpoint::Checkpoint;

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("x.pth");
    std::fs::write(&path, bytes).expect("a temporary file");
    if let Ok(checkpoint) = Checkpoint::open(&path) {
        for (name, entry) in checkpoint.tensors() {
            assert!(entry.bytes() <= bytes.len() as u64);
            let _ = checkpoint.read_f32(name);
        }
    }
});
