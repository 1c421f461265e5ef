//! The TensorRT binding against a fake library (`tests/fake-tensorrt`), through both binary interfaces: build and
//! run, the log, progress, cancelling, the timing cache, and everything that can go wrong.
#![allow(unsafe_code)] // one dlsym, to count the fake's objects
#![allow(clippy::unwrap_used)] // a failed step is a failed test

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mindseye_base::file::sha256_of_file;
use mindseye_engines::backend::{Backend, BackendError, PrepareOptions, Tensor};
use mindseye_engines::cuda::{CudaError, DeviceInfo, DriverInfo, HostDevice};
use mindseye_engines::passport::{FORMAT, Passport};
use mindseye_engines::target::{ComputeCapability, Precision};
use mindseye_engines::trt::abi::Abi;
use mindseye_engines::trt::{
    BuildError, BuildOptions, InputProfile, Library, LibraryError, LoadOptions, Progress, RunError,
    RunOptions, TensorRtBackend, TrtEngine, build, is_engine, runtime_cache_path,
};

const ORIN: ComputeCapability = ComputeCapability { major: 8, minor: 7 };

/// Compiles the fake once per interface and puts it beside a copy of itself under the parser's name.
fn fake(folder: &Path, cfgs: &[&str], core: &str, parser: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake-tensorrt/fake.rs");
    let out = folder.join(core);
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        "fake_tensorrt",
        "--check-cfg",
    ]);
    rustc.arg("cfg(v10, v11, rtx, broken)").arg("-o").arg(&out).arg(source);
    for cfg in cfgs {
        rustc.args(["--cfg", cfg]);
    }
    let done = rustc.output().expect("rustc runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // One library plays both parts: the loader must find the same objects in it.
    std::os::unix::fs::symlink(&out, folder.join(parser)).unwrap();
    out
}

fn driver(cc: ComputeCapability) -> DriverInfo {
    let device = DeviceInfo {
        ordinal: 0,
        name: "fake GPU".into(),
        compute_capability: cc,
        total_bytes: 1 << 30,
        multiprocessors: 1,
    };
    DriverInfo { cuda_version: 12_060, devices: vec![device] }
}

fn load(path: &Path, cc: ComputeCapability) -> Library {
    let probe: mindseye_engines::trt::Probe = Arc::new(move || Ok(driver(cc)));
    Library::find(&LoadOptions { path: Some(path.to_owned()), probe }).unwrap()
}

fn profile() -> InputProfile {
    InputProfile { name: "x".into(), min: vec![1, 4], opt: vec![2, 4], max: vec![8, 4] }
}

fn options() -> BuildOptions {
    BuildOptions { profiles: vec![profile()], compute_capability: Some(ORIN), ..BuildOptions::default() }
}

#[test]
fn build_and_run_through_both_interfaces() {
    for (cfg, abi, version, core, parser) in [
        ("v10", Abi::V10, "10.3.0.30", "libnvinfer.so.10", "libnvonnxparser.so.10"),
        ("v11", Abi::V11, "11.4.0.30", "libnvinfer.so.11", "libnvonnxparser.so.11"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = fake(folder.path(), &[cfg], core, parser);
        // By folder and by file.
        let library = load(folder.path(), ORIN);
        assert_eq!(library.path(), path);
        assert_eq!((library.abi(), library.version().to_string().as_str()), (abi, version));
        building(folder.path(), &library);
        running(folder.path(), Arc::new(library));
    }
}

fn building(folder: &Path, library: &Library) {
    let (onnx, out, cache) = (folder.join("m.onnx"), folder.join("m.engine"), folder.join("timing.cache"));
    std::fs::write(&onnx, "a model").unwrap();
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let shared = Arc::clone(&seen);
    let mut o = options();
    o.timing_cache = Some(cache.clone());
    (o.workspace_bytes, o.version_compatible, o.hardware_compatible) = (Some(1 << 20), true, true);
    o.optimization_level = Some(3);
    o.progress = Some(Arc::new(move |p| shared.lock().unwrap().push(p)));
    let built = build(library, &onnx, &out, &o).unwrap();
    assert_eq!(built.inputs, [("x".to_owned(), vec![-1, 4])]);
    assert_eq!(built.outputs, ["y"]);
    assert!(is_engine(&std::fs::read(&out).unwrap()));
    let step = Progress::Step { name: "Fake phase".into(), done: 2, steps: 2 };
    assert!(seen.lock().unwrap().contains(&step), "{seen:?}");
    // The timing cache is written, read back, added to; one of another machine is replaced.
    assert_eq!(std::fs::read(&cache).unwrap(), b"fake cache+");
    build(library, &onnx, &out, &o).unwrap();
    assert_eq!(std::fs::read(&cache).unwrap(), b"fake cache++");
    std::fs::write(&cache, b"foreign").unwrap();
    build(library, &onnx, &out, &o).unwrap();
    assert_eq!(std::fs::read(&cache).unwrap(), b"fake cache+");

    // What goes wrong: each a clear error, and nothing at the output path.
    let refused = folder.join("refused.engine");
    let check = |model: &str, o: &BuildOptions, wants: &[&str]| {
        std::fs::write(&onnx, model).unwrap();
        let text = build(library, &onnx, &refused, o).unwrap_err().to_string();
        for want in wants {
            assert!(text.contains(want), "{want}: {text}");
        }
        assert!(!refused.exists());
    };
    check("UNSUPPORTED", &options(), &["blocks.0/Frobnicate", "node 17", "(Frobnicate)", "no importer"]);
    check("BUILDFAIL", &options(), &["could not build", "blocks.3/MatMul"]);
    let with = |p: InputProfile| BuildOptions { profiles: vec![p], ..options() };
    check("m", &BuildOptions { profiles: vec![], ..options() }, &["\"x\"", "missing"]);
    check("m", &with(InputProfile { name: "z".into(), ..profile() }), &["\"z\"", "no such input"]);
    check("m", &with(InputProfile { max: vec![8, 5], ..profile() }), &["does not fit", "[8, 5]"]);
    check("m", &with(InputProfile { max: vec![1, 4], ..profile() }), &["not in order"]);
    let a100 = ComputeCapability { major: 8, minor: 0 };
    check("m", &BuildOptions { compute_capability: Some(a100), ..options() }, &["8.0", "8.7", "fake GPU"]);
    let cancel = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&cancel);
    let o = BuildOptions {
        cancel,
        progress: Some(Arc::new(move |p| {
            if matches!(p, Progress::Step { done: 1, .. }) {
                shared.store(true, Ordering::Relaxed);
            }
        })),
        ..options()
    };
    check("m", &o, &["cancelled"]);
    std::fs::remove_file(&onnx).unwrap();
    assert!(matches!(build(library, &onnx, &refused, &options()), Err(BuildError::Io { .. })));
    std::fs::write(&onnx, "m").unwrap();
    let nowhere = folder.join("no/such/folder/m.engine");
    assert!(matches!(build(library, &onnx, &nowhere, &options()), Err(BuildError::Io { .. })));
    assert_eq!(alive(library), 0, "every object that was made is deleted");
}

fn alive(library: &Library) -> i64 {
    // SAFETY: the library is a fake that is loaded already.
    unsafe { fake_alive(library.path())() }
}

/// `fakeAlive` of a loaded fake, through the C library's dlopen.
///
/// # Safety
/// `path` is a fake.
unsafe fn fake_alive(path: &Path) -> extern "C" fn() -> i64 {
    unsafe extern "C" {
        fn dlopen(name: *const std::ffi::c_char, flags: i32) -> *mut std::ffi::c_void;
        fn dlsym(handle: *mut std::ffi::c_void, name: *const std::ffi::c_char) -> *mut std::ffi::c_void;
    }
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the library is loaded already; the symbol is `extern "C" fn() -> i64` in fake.rs.
    unsafe {
        let symbol = dlsym(dlopen(name.as_ptr(), 2), c"fakeAlive".as_ptr());
        assert!(!symbol.is_null());
        std::mem::transmute(symbol)
    }
}

fn passport(engine: &Path, library: &Library) -> Passport {
    Passport {
        format: FORMAT,
        component: "denoiser".into(),
        bundle_sha256: "b".into(),
        graph_sha256: "g".into(),
        weights_sha256: "w".into(),
        calibration_sha256: None,
        scales_sha256: None,
        engine_sha256: sha256_of_file(engine).unwrap(),
        precision: Precision::Fp16,
        kept_high: vec![],
        target: "orin-agx".into(),
        compute_capability: Some(ORIN),
        library: "tensorrt".into(),
        files: Default::default(),
        library_version: library.version().to_string(),
        os: std::env::consts::OS.into(),
        arch: std::env::consts::ARCH.into(),
        jetson_release: None,
        driver_version: Some(12_060),
        builder_flags: Default::default(),
        verification: None,
        build_seconds: 1.0,
        engine_bytes: 18,
        tool_version: "0".into(),
    }
}

fn running(folder: &Path, library: Arc<Library>) {
    let path = folder.join("m.engine");
    let device = HostDevice::open(ORIN, 1 << 20);
    {
        let engine = TrtEngine::load(&library, &device, &path, false).unwrap();
        assert_eq!(engine.io().len(), 2);
        assert_eq!(engine.io()[0].limits, Some((vec![1, 4], vec![8, 4])));
        assert_eq!((engine.activation_bytes(), engine.layers()), (1000, 1));
        assert_eq!(engine.inspect().unwrap(), "{\"Layers\": [\"fake\"]}");
        // One arena: x and y at their largest, 256-byte aligned, and the scratch memory.
        let limited = RunOptions { memory_limit: Some(1200), ..RunOptions::default() };
        let Err(RunError::Memory { needed, activations, io, limit }) = engine.context(&limited) else {
            panic!("the limit was passed over")
        };
        assert_eq!((needed, activations, io, limit), (1512, 1000, 512, 1200));
        let small = HostDevice::open(ORIN, 1000);
        let crowded = TrtEngine::load(&library, &small, &path, false).unwrap();
        let Err(RunError::Cuda(CudaError::OutOfMemory { wanted, .. })) =
            crowded.context(&RunOptions::default())
        else {
            panic!("more memory than there is")
        };
        assert_eq!(wanted, 1512);
        let mut context = engine.context(&RunOptions::default()).unwrap();
        assert_eq!(context.device_bytes(), 1512);
        for rows in [1i64, 8, 3, 3, 3] {
            let x: Vec<f32> = (0..rows * 4).map(|i| i as f32 - 2.0).collect();
            let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
            let mut y = Vec::new();
            context
                .run(&[("x", &[rows, 4], &bytes)], &mut |io, shape, bytes| {
                    assert_eq!((io.name.as_str(), shape), ("y", &[rows, 4][..]));
                    y = bytes.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
                })
                .unwrap();
            assert_eq!(y, x.iter().map(|v| 2.0 * v).collect::<Vec<f32>>());
        }
        assert!(!context.uses_graph(), "this device has no graphs: the context falls back");
        assert_eq!(context.times(), None, "runs are not timed unless that is asked for");
        let timed = RunOptions { timed: true, ..RunOptions::default() };
        let mut timed = engine.context(&timed).unwrap();
        let started = std::time::Instant::now();
        timed.run(&[("x", &[8, 4], &[0; 128])], &mut |_, _, _| {}).unwrap();
        let times = timed.times().unwrap();
        assert!(times.compute > std::time::Duration::ZERO);
        assert!(times.copy_in + times.compute + times.copy_out <= started.elapsed());
        let zeros = [0u8; 16];
        for (inputs, want) in [
            (vec![], "not given"),
            (vec![("x", &[9i64, 4][..], &zeros[..])], "outside"),
            (vec![("x", &[1, 4][..], &zeros[..8])], "8 bytes given"),
            (vec![("x", &[1, 4][..], &zeros[..]), ("q", &[1][..], &zeros[..4])], "no such input"),
        ] {
            let text = context.run(&inputs, &mut |_, _, _| {}).unwrap_err().to_string();
            assert!(text.contains(want), "{want}: {text}");
        }
        let bad: Vec<u8> = [666f32, 0.0, 0.0, 0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let text = context.run(&[("x", &[1, 4], &bad)], &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(text.contains("fake kernel failed"), "{text}");
    }
    // Engines of other machines and other files.
    let other = folder.join("other.engine");
    std::fs::write(&other, b"ftrt of another device").unwrap();
    let text = TrtEngine::load(&library, &device, &other, false).err().unwrap().to_string();
    assert!(text.contains("not compatible with this device") && text.contains("rebuild"), "{text}");
    std::fs::write(&other, b"PK\x03\x04").unwrap();
    assert!(matches!(TrtEngine::load(&library, &device, &other, false), Err(RunError::NotAnEngine { .. })));

    // Through the traits that all backends share; the passport is asked first.
    let mut backend = TensorRtBackend::new(Arc::clone(&library), device);
    let prepare = |b: &TensorRtBackend| b.prepare(&path, &PrepareOptions::default());
    assert!(prepare(&backend).err().unwrap().to_string().contains("passport"));
    passport(&path, &library).write(&path).unwrap();
    {
        let engine = prepare(&backend).unwrap();
        let x = Tensor::f32(&[2, 4], (0..8).map(|i| i as f32).collect());
        let mut session = engine.session().unwrap();
        let out = session.run(&[("x", &x)]).unwrap();
        assert_eq!(out[0].1, Tensor::f32(&[2, 4], (0..8).map(|i| 2.0 * i as f32).collect()));
        let wrong = Tensor::i64(&[2, 4], vec![0; 8]);
        assert!(matches!(session.run(&[("x", &wrong)]), Err(BackendError::Input { .. })));
    }
    // An engine that brings host code of its own opens because its passport says so.
    let compatible = folder.join("compatible.engine");
    std::fs::write(&compatible, b"ftrt a fake engine with host code").unwrap();
    let mut said = passport(&compatible, &library);
    said.write(&compatible).unwrap();
    let open = || backend.prepare(&compatible, &PrepareOptions::default()).map(drop);
    assert!(open().unwrap_err().to_string().contains("setEngineHostCodeAllowed was not called"));
    said.builder_flags.insert("version_compatible".into(), "true".into());
    said.write(&compatible).unwrap();
    open().unwrap();
    backend.bundle_sha256 = Some("another bundle".into());
    let text = prepare(&backend).err().unwrap().to_string();
    assert!(text.contains("bundle_sha256 is b and must be another bundle"), "{text}");
    let a100 = HostDevice::open(ComputeCapability { major: 8, minor: 0 }, 1 << 20);
    let text = prepare(&TensorRtBackend::new(Arc::clone(&library), a100)).err().unwrap().to_string();
    assert!(text.contains("compute_capability is 8.7 and must be 8.0"), "{text}");
    assert_eq!(alive(&library), 0);
}

/// TensorRT-RTX compiles kernels when it sees shapes; they are kept beside the engine and taken from there again.
#[test]
fn kernels_of_rtx_are_kept_beside_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let path = fake(folder.path(), &["rtx"], "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1");
    let library = Arc::new(load(&path, ORIN));
    assert_eq!(library.abi(), Abi::Rtx17);
    let file = folder.path().join("m.engine");
    std::fs::write(&file, b"vtrt a fake engine").unwrap();
    let kept = runtime_cache_path(&file);
    let device = HostDevice::open(ORIN, 1 << 20);
    let run = |options: &RunOptions, rows: &[i64]| {
        let engine = TrtEngine::load(&library, &device, &file, false).unwrap();
        let mut context = engine.context(options).unwrap();
        for &rows in rows {
            let bytes = vec![0; 16 * rows as usize];
            context.run(&[("x", &[rows, 4], &bytes)], &mut |_, _, _| {}).unwrap();
        }
    };
    let kernels = |rows: &[u8]| [b"fake kernels:".as_slice(), rows].concat();
    run(&RunOptions { runtime_cache: false, ..RunOptions::default() }, &[1]);
    assert!(!kept.exists());
    run(&RunOptions::default(), &[1, 3, 1]);
    assert_eq!(std::fs::read(&kept).unwrap(), kernels(&[1, 3]));
    run(&RunOptions::default(), &[3, 8]);
    assert_eq!(std::fs::read(&kept).unwrap(), kernels(&[1, 3, 8]));
    // Those of another machine are refused by the library, and replaced.
    std::fs::write(&kept, b"of another driver").unwrap();
    run(&RunOptions::default(), &[2]);
    assert_eq!(std::fs::read(&kept).unwrap(), kernels(&[2]));
    // A folder that cannot be written stops nothing.
    std::fs::remove_file(&kept).unwrap();
    std::fs::create_dir(&kept).unwrap();
    run(&RunOptions::default(), &[2]);
    assert_eq!(alive(&library), 0);
}

#[test]
fn missing_driver_broken_creation_and_unknown_versions() {
    let folder = tempfile::tempdir().unwrap();
    let path = fake(folder.path(), &["v10", "broken"], "libnvinfer.so.10", "libnvonnxparser.so.10");
    let probe: mindseye_engines::trt::Probe = Arc::new(|| Err(CudaError::NoDriver));
    let error = Library::find(&LoadOptions { path: Some(path.clone()), probe }).unwrap_err();
    assert!(matches!(error, LibraryError::Cuda { .. }));
    assert!(error.to_string().contains("TensorRT 10.3.0.30 needs a GPU: no CUDA driver"), "{error}");
    // A driver that lies: creation returns 0x228, which is no pointer.
    let library = Arc::new(load(&path, ORIN));
    let onnx = folder.path().join("m.onnx");
    std::fs::write(&onnx, "m").unwrap();
    let text = build(&library, &onnx, &folder.path().join("e"), &options()).unwrap_err().to_string();
    assert!(text.contains("could not create its builder") && text.contains("error: 35"), "{text}");
    let engine = folder.path().join("m.engine");
    std::fs::write(&engine, b"ftrt a fake engine").unwrap();
    let device = HostDevice::open(ORIN, 1 << 20);
    let text = TrtEngine::load(&library, &device, &engine, false).err().unwrap().to_string();
    assert!(text.contains("could not create its runtime"), "{text}");
    // Under the name of TensorRT-RTX its version is not one that there is a table for.
    let rtx = folder.path().join("libtensorrt_rtx.so.1");
    std::fs::copy(&path, &rtx).unwrap();
    let text = Library::find(&LoadOptions::at(Some(rtx))).unwrap_err().to_string();
    assert!(text.contains("TensorRT-RTX 10.3.0.30 is not supported; install 1.7"), "{text}");
}
