//! The emulated driver, for tests that include this file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `libcuda.so.1` of the emulator, compiled once; `None`, with the reason printed, where g++ is missing.
pub fn driver() -> Option<&'static Path> {
    static DRIVER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = DRIVER.get_or_init(|| {
        // Tests run at once as programs of their own.
        let name = format!("emulated-driver-{}", std::process::id());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (out, emulator) = (folder.join("libcuda.so.1"), tests.join("cuda-emulator"));
        let mut gxx = Command::new("g++");
        gxx.args(["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]);
        gxx.arg("-I").arg(tests.join("../engines/src/cuda/kernels")).arg("-I").arg(&emulator);
        match gxx.arg("-o").arg(&out).arg(emulator.join("driver.cpp")).output() {
            Err(e) => {
                println!("SKIP: kernels are emulated by programs that g++ compiles: {e}");
                None
            }
            Ok(done) => {
                assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
                Some(out)
            }
        }
    });
    made.as_deref()
}
