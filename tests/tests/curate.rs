//! Curation against a stand-in endpoint and small scans written here.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use mindseye_base::picture::save_png;
use mindseye_tools::curate::dataset::Dataset;
use mindseye_tools::curate::layout::{self, SourceLayout};
use mindseye_tools::curate::vlm::{Endpoint, VlmError};
use mindseye_tools::curate::{Counts, CurateOptions, Report, curate};
use mindseye_tools::train::{self, TrainArgs};
use serde_json::{Value, json};

const CENTRED: &str = r#"```json
[{"label": "a lamp", "bbox_2d": [0, 0, 100, 100]}, {"label": "the red chair", "bbox_2d": [400, 300, 700, 700]}]
```"#;
const ASIDE: &str = r#"[{"label": "a lamp", "bbox_2d": [0, 0, 100, 100]}]"#;
const CAPTION: &str = r#"{"scene": "a small office", "object": "the red chair by the desk"}"#;

/// What the stand-in says to one request.
#[derive(Clone)]
enum Say {
    Text(String),
    /// The same in chunks.
    Chunked(String),
    Status(u16),
    /// Not HTTP.
    Garbage,
    /// Closes in the middle.
    Cut,
    /// Keeps silent until the client has gone.
    Silence,
}

fn say(text: &str) -> Say {
    Say::Text(text.to_owned())
}

/// A chat-completions server; `answer(n, request)` decides what the n-th request gets.
struct StandIn {
    port: u16,
    asked: Arc<AtomicUsize>,
    problems: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    fn start(answer: impl Fn(usize, &Value) -> Say + Send + 'static) -> Self {
        Self::start_with(None, answer)
    }

    /// With TLS, where a server's configuration is given; a client that breaks its handshake off is no problem then.
    fn start_with(
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: impl Fn(usize, &Value) -> Say + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (asked, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let problems = Arc::new(Mutex::new(Vec::new()));
        let (count, ended, wrong) = (asked.clone(), stop.clone(), problems.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let serve = |asked: Value| answer(count.fetch_add(1, Ordering::SeqCst), &asked);
                match &tls {
                    None => match request(&mut stream) {
                        Ok(asked) => reply(&mut stream, serve(asked)),
                        Err(reason) => wrong.lock().unwrap().push(reason),
                    },
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                        let mut stream = rustls::StreamOwned::new(connection, stream);
                        if let Ok(asked) = request(&mut stream) {
                            reply(&mut stream, serve(asked));
                            stream.conn.send_close_notify();
                            let _ = stream.flush();
                        }
                    }
                }
            }
        });
        Self { port, asked, problems, stop, thread: Some(thread) }
    }

    fn endpoint(&self, timeout_ms: u64, retries: usize) -> Endpoint {
        let url = format!("http://127.0.0.1:{}/v1", self.port);
        Endpoint::new(&url, "stand-in", Duration::from_millis(timeout_ms), retries).unwrap()
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        let problems = self.problems.lock().unwrap();
        if !std::thread::panicking() {
            assert!(problems.is_empty(), "{problems:?}");
        }
    }
}

/// Reads one request and checks its form.
fn request(stream: &mut impl Read) -> Result<Value, String> {
    let (mut bytes, mut buffer) = (Vec::new(), [0u8; 4096]);
    let head_end = loop {
        if let Some(k) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break k + 4;
        }
        let n = stream.read(&mut buffer).map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("closed in the header".into());
        }
        bytes.extend_from_slice(&buffer[..n]);
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    if !head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n") {
        return Err(format!("unexpected request {head:?}"));
    }
    let fields = || head.lines().filter_map(|l| l.split_once(": "));
    let length = fields().find(|(name, _)| name.eq_ignore_ascii_case("content-length")).ok_or("no length")?;
    let length: usize = length.1.parse().map_err(|_| "bad length")?;
    while bytes.len() < head_end + length {
        let n = stream.read(&mut buffer).map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("closed in the body".into());
        }
        bytes.extend_from_slice(&buffer[..n]);
    }
    let body: Value = serde_json::from_slice(&bytes[head_end..]).map_err(|e| e.to_string())?;
    if body["model"] != "stand-in" || body["temperature"] != 0 {
        return Err(format!("model or temperature: {body}"));
    }
    for part in body["messages"][0]["content"].as_array().ok_or("no content")? {
        let url = part.pointer("/image_url/url").and_then(Value::as_str);
        // The PNG signature in base64.
        if part["type"] == "image_url"
            && !url.is_some_and(|u| u.starts_with("data:image/png;base64,iVBORw0KGgo"))
        {
            return Err("a picture that is no PNG".into());
        }
    }
    Ok(body)
}

fn pictures(request: &Value) -> usize {
    let content = request["messages"][0]["content"].as_array().unwrap();
    content.iter().filter(|p| p["type"] == "image_url").count()
}

fn reply(stream: &mut (impl Read + Write), say: Say) {
    let completion =
        |text: &str| json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string();
    let text = match say {
        Say::Text(text) => {
            let body = completion(&text);
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }
        Say::Chunked(text) => {
            let body = completion(&text);
            let (a, b) = body.split_at(10);
            format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n",
                a.len(),
                b.len()
            )
        }
        Say::Status(status) => format!("HTTP/1.1 {status} no\r\nContent-Length: 4\r\n\r\nbusy"),
        Say::Garbage => "\u{1}\u{2}hello\r\n\r\n".to_owned(),
        Say::Cut => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"cho".to_owned(),
        Say::Silence => {
            let mut sink = [0u8; 64];
            while matches!(stream.read(&mut sink), Ok(n) if n > 0) {}
            return;
        }
    };
    let _ = stream.write_all(text.as_bytes());
}

/// Answers every question well.
fn good(_: usize, request: &Value) -> Say {
    if pictures(request) == 1 { say(CENTRED) } else { Say::Chunked(CAPTION.to_owned()) }
}

const WIDTH: usize = 24;
const HEIGHT: usize = 18;

/// Picture number `k`, encoded once for all tests.
fn picture(path: &Path, k: usize) {
    static ENCODED: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let encoded = ENCODED.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let one = |k: usize| {
            let rgb: Vec<u8> = (0..WIDTH * HEIGHT * 3).map(|i| ((i * 7 + k * 3) % 256) as u8).collect();
            let path = dir.path().join("x.png");
            save_png(&path, WIDTH, HEIGHT, &rgb).unwrap();
            fs::read(path).unwrap()
        };
        (0..16).map(one).collect()
    });
    fs::write(path, &encoded[k % encoded.len()]).unwrap();
}

/// Turned by 2 degrees about y and moved by 1 cm along x per frame.
fn pose(k: usize) -> [[f64; 4]; 4] {
    let (s, c) = (k as f64 * 2f64.to_radians()).sin_cos();
    [[c, 0.0, s, 0.01 * k as f64], [0.0, 1.0, 0.0, 0.0], [-s, 0.0, c, 0.0], [0.0, 0.0, 0.0, 1.0]]
}

/// A ScanNet++ recording of `frames` frames; `edit` may spoil entries.
fn scannetpp(root: &Path, scene: &str, frames: usize, edit: impl Fn(usize, &mut Value)) {
    let dir = root.join("data").join(scene).join("iphone");
    fs::create_dir_all(dir.join("rgb")).unwrap();
    let mut entries = serde_json::Map::new();
    for k in 0..frames {
        let name = format!("frame_{k:06}");
        picture(&dir.join(format!("rgb/{name}.jpg")), k);
        let mut entry = json!({
            "timestamp": k as f64 / 60.0,
            "pose": [[9.0, 0.0, 0.0, 0.0]],
            "aligned_pose": pose(k),
            "intrinsic": [[20.0, 0.0, 11.5], [0.0, 20.0, 8.5], [0.0, 0.0, 1.0]],
        });
        edit(k, &mut entry);
        entries.insert(name, entry);
    }
    fs::write(
        dir.join("pose_intrinsic_imu.json"),
        Value::Object(entries).to_string().replace("\"NAN\"", "NaN"),
    )
    .unwrap();
}

/// An ARKitScenes recording: pictures at 30 Hz, poses at 10 Hz.
fn arkitscenes(root: &Path, video: &str, frames: usize, hole: Option<usize>) {
    let dir = root.join("raw/Training").join(video);
    fs::create_dir_all(dir.join("lowres_wide")).unwrap();
    fs::create_dir_all(dir.join("lowres_wide_intrinsics")).unwrap();
    let mut trajectory = String::new();
    for k in 0..frames {
        let at = 1000.0 + k as f64 / 30.0;
        if hole.is_some_and(|h| (h..h + 12).contains(&k)) {
            continue;
        }
        picture(&dir.join(format!("lowres_wide/{video}_{at:.3}.png")), k);
        fs::write(dir.join(format!("lowres_wide_intrinsics/{video}_{at:.3}.pincam")), "24 18 20 20 11.5 8.5")
            .unwrap();
        if k % 3 == 0 || k + 1 == frames {
            // camera_from_map: the rotation turned back, and its translation.
            let angle = k as f64 * 2f64.to_radians();
            let x = -0.01 * k as f64;
            let (tx, tz) = (angle.cos() * x, angle.sin() * x);
            trajectory += &format!("{at:.6} 0 {} 0 {tx} 0 {tz}\n", -angle);
        }
    }
    fs::write(dir.join("lowres_wide.traj"), trajectory).unwrap();
}

fn options(layout: SourceLayout, root: &Path, out: &Path) -> CurateOptions {
    CurateOptions {
        layout,
        root: root.to_path_buf(),
        out: out.to_path_buf(),
        scenes: Vec::new(),
        interval: 3,
        clip_frames: 9,
        center_ratio: 0.3,
        ask_every: 1,
    }
}

fn go(options: &CurateOptions, endpoint: &Endpoint) -> Report {
    curate(options, Some(endpoint), &mut |_| {}).unwrap()
}

#[test]
fn both_layouts_become_clips_that_decode() {
    for layout in [SourceLayout::Scannetpp, SourceLayout::Arkitscenes] {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("source"), dir.path().join("out"));
        match layout {
            SourceLayout::Scannetpp => scannetpp(&root, "0a1b", 36, |_, _| {}),
            _ => {
                arkitscenes(&root, "41", 36, None);
                arkitscenes(&root, "42", 36, None);
                let table = "video_id,visit_id,fold\n41,7.0,Training\n42,7.0,Training\n";
                fs::write(root.join("raw/metadata.csv"), table).unwrap();
            }
        }
        let server = StandIn::start(good);
        let report = go(&options(layout, &root, &out), &server.endpoint(5000, 0));
        assert_eq!(report.problems, Vec::<String>::new());
        let videos = report.scenes as u64;
        // 12 kept frames: the last 4 have 8 before them.
        let wanted =
            Counts { frames: 12 * videos, asked: 4 * videos, clips: 4 * videos, ..Counts::default() };
        assert_eq!(report.counts, wanted, "{layout:?}");
        assert_eq!(server.asked() as u64, 8 * videos, "two questions per clip");

        let dataset = Dataset::open(&out).unwrap();
        assert_eq!(dataset.rejected, Vec::<String>::new());
        assert_eq!(dataset.clips.len() as u64, 4 * videos);
        let clip = &dataset.clips[0];
        assert_eq!(
            clip.caption,
            "The camera moves across a small office. Finally, it focuses on the red chair by the desk in the \
             center of the frame."
        );
        // Box in thousandths of the answer; half-size pictures would see it at half the place.
        assert_eq!(clip.area, Some([0.4, 0.3, 0.7, 0.7]));
        let recording = dataset.recordings().next().unwrap();
        let mut decoded = 0;
        dataset
            .pictures(recording, &mut |at, picture| {
                let picture = picture?;
                assert_eq!((at, picture.width, picture.height), (decoded, WIDTH, HEIGHT));
                decoded += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(decoded, 12);
        // Kept frame k is frame 3 k of the source: 6 degrees and 3 cm each.
        let frames = dataset.frames(clip);
        let first = frames[0].map_from_camera.unwrap();
        for (k, frame) in frames.iter().enumerate() {
            assert_eq!(frame.intrinsics, Some([20.0, 20.0, 11.5, 8.5]));
            let first_from_camera = first.inverse() * frame.map_from_camera.unwrap();
            let angle = first_from_camera.rotation.angle().to_degrees();
            assert!((angle - 6.0 * k as f64).abs() < 0.01, "{layout:?} frame {k}: {angle}");
            let t = first_from_camera.translation.vector;
            assert!((t.norm() - 0.03 * k as f64).abs() < 1e-4, "{layout:?} frame {k}: {t:?}");
            assert!(t.x >= 0.0 && t.y.abs() < 1e-9);
        }
        let places: BTreeSet<_> = dataset.recordings().map(|r| r.environment.clone()).collect();
        assert_eq!(places.len(), 1);

        // What is finished is not asked again.
        let asked = server.asked();
        let again = go(&options(layout, &root, &out), &server.endpoint(5000, 0));
        assert_eq!((again.counts, again.scenes_resumed), (report.counts, report.scenes));
        assert_eq!(server.asked(), asked);
        // Other settings do not mix.
        let other = CurateOptions { clip_frames: 8, ..options(layout, &root, &out) };
        let error = curate(&other, Some(&server.endpoint(5000, 0)), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("other settings"), "{error}");
    }
}

#[test]
fn faults_of_recordings_are_counted() {
    type Edit = fn(usize, &mut Value);
    let check = |edit: Edit, remove: &[usize], broken: &[usize], wanted: Counts| {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("source"), dir.path().join("out"));
        scannetpp(&root, "s", 60, edit);
        for k in remove {
            fs::remove_file(root.join(format!("data/s/iphone/rgb/frame_{k:06}.jpg"))).unwrap();
        }
        for k in broken {
            fs::write(root.join(format!("data/s/iphone/rgb/frame_{k:06}.jpg")), b"\xff\xd8\xffnot a picture")
                .unwrap();
        }
        let server = StandIn::start(good);
        let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(5000, 0));
        assert_eq!(report.counts, wanted);
        assert_eq!(Dataset::open(&out).unwrap().clips.len() as u64, wanted.clips);
    };
    // 20 kept frames, 12 with 8 before them.
    let full = Counts { frames: 20, asked: 12, clips: 12, ..Counts::default() };
    check(|_, _| {}, &[], &[], full);
    // Kept frame 4 (frame 12) is missing: of the 15 after it, 7 remain.
    let hole = Counts { asked: 7, clips: 7, ..full };
    check(|_, _| {}, &[12, 13], &[], Counts { missing_image: 1, ..hole });
    check(
        |k, e| {
            if k == 12 {
                e["aligned_pose"][0][3] = json!("NAN");
            }
        },
        &[],
        &[],
        Counts { bad_pose: 1, ..hole },
    );
    check(
        |k, e| {
            if k == 12 {
                e["aligned_pose"][0][0] = json!(3.0);
            }
        },
        &[],
        &[],
        Counts { bad_pose: 1, ..hole },
    );
    check(
        |k, e| {
            if k == 12 {
                e.as_object_mut().unwrap().retain(|key, _| !key.ends_with("pose"));
            }
        },
        &[],
        &[],
        Counts { missing_pose: 1, ..hole },
    );
    check(
        |k, e| {
            if k == 12 {
                e["intrinsic"] = json!([]);
            }
        },
        &[],
        &[],
        Counts { missing_intrinsics: 1, ..hole },
    );
    // The last frame cannot be decoded: nothing is asked about it.
    check(|_, _| {}, &[], &[57], Counts { asked: 11, clips: 11, unreadable_image: 1, ..full });
}

#[test]
fn recordings_that_cannot_be_used_are_named() {
    let check = |spoil: fn(&Path), wanted: &str| {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("source"), dir.path().join("out"));
        scannetpp(&root, "bad", 30, |_, _| {});
        scannetpp(&root, "good", 30, |_, _| {});
        spoil(&root.join("data/bad/iphone"));
        let server = StandIn::start(good);
        let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(5000, 0));
        assert_eq!((report.scenes, report.scenes_done), (2, 1));
        assert!(report.problems.len() == 1 && report.problems[0].contains(wanted), "{:?}", report.problems);
        assert_eq!(report.counts.clips, 2);
    };
    check(
        |dir| {
            fs::remove_dir_all(dir.join("rgb")).unwrap();
            fs::write(dir.join("rgb.mkv"), b"video").unwrap();
        },
        "ffmpeg -i rgb.mkv",
    );
    check(
        |dir| fs::write(dir.join("pose_intrinsic_imu.json"), "{\"frame_0").unwrap(),
        "pose_intrinsic_imu.json",
    );
    check(|dir| fs::write(dir.join("pose_intrinsic_imu.json"), "[]").unwrap(), "wanted an object");
    check(|dir| fs::remove_file(dir.join("pose_intrinsic_imu.json")).unwrap(), "transforms.json");
    let empty = tempfile::tempdir().unwrap();
    let server = StandIn::start(good);
    let options = options(SourceLayout::Arkitscenes, empty.path(), &empty.path().join("out"));
    let error = curate(&options, Some(&server.endpoint(1000, 0)), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("no recordings"), "{error}");
}

#[test]
fn holes_of_arkit_recordings_break_clips() {
    let dir = tempfile::tempdir().unwrap();
    arkitscenes(dir.path(), "41", 90, Some(36));
    let scene = &layout::scenes(SourceLayout::Arkitscenes, dir.path()).unwrap()[0];
    let mut counts = Counts::default();
    let recording = layout::read(SourceLayout::Arkitscenes, scene, dir.path(), 3, &mut counts).unwrap();
    assert_eq!((counts.frames, counts.missing_image, counts.missing_pose), (26, 1, 0));
    let index: Vec<usize> = recording.frames.iter().map(|f| f.index).collect();
    assert_eq!(index[11..13], [11, 13], "the frame after the hole does not follow");
    // Nerfstudio's cameras look the other way.
    let dslr = dir.path().join("nerf/s/dslr");
    fs::create_dir_all(dslr.join("resized_images")).unwrap();
    fs::create_dir_all(dslr.join("nerfstudio")).unwrap();
    picture(&dslr.join("resized_images/DSC1.JPG"), 1);
    let document = json!({
        "fl_x": 10.0, "fl_y": 11.0, "cx": 12.0, "cy": 9.0,
        "frames": [{"file_path": "DSC1.JPG", "transform_matrix": pose(0)},
                   {"file_path": "DSC2.JPG", "transform_matrix": pose(0)}],
    });
    fs::write(dslr.join("nerfstudio/transforms.json"), document.to_string()).unwrap();
    let root = dir.path().join("nerf");
    let scene = &layout::scenes(SourceLayout::Scannetpp, &root).unwrap()[0];
    let mut counts = Counts::default();
    let recording = layout::read(SourceLayout::Scannetpp, scene, &root, 1, &mut counts).unwrap();
    assert_eq!((recording.frames.len(), counts.missing_image), (1, 1));
    let wanted = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0];
    let got = recording.frames[0].map_from_camera;
    assert!(got.iter().zip(wanted).all(|(a, b)| f64::abs(a - b) < 1e-9), "{got:?}");
    assert_eq!(recording.frames[0].intrinsics, [10.0, 11.0, 12.0, 9.0]);
}

#[test]
fn answers_are_counted_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (root, out) = (dir.path().join("source"), dir.path().join("out"));
    scannetpp(&root, "s", 42, |_, _| {}); // 6 possible last frames
    let turns = AtomicUsize::new(0);
    let server = StandIn::start(move |_, request| {
        if pictures(request) > 1 {
            return say(match turns.load(Ordering::SeqCst) {
                4 => r#"{"scene": "", "object": " "}"#,
                5 => "I would rather not.",
                _ => CAPTION,
            });
        }
        match turns.fetch_add(1, Ordering::SeqCst) {
            0 => say(CENTRED),
            1 => say(ASIDE),
            2 => say("There is a chair in the middle."),
            _ => say(CENTRED),
        }
    });
    let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(5000, 0));
    let wanted = Counts {
        frames: 14,
        asked: 6,
        clips: 2,
        no_centred_object: 1,
        nonsense: 2,
        empty_caption: 1,
        ..Counts::default()
    };
    assert_eq!(report.counts, wanted);
    assert_eq!(Dataset::open(&out).unwrap().clips.len(), 2);
}

#[test]
fn requests_that_fail_are_sent_again_and_then_left_for_later() {
    let check = |fault: Say, passing: bool| {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("source"), dir.path().join("out"));
        scannetpp(&root, "s", 36, |_, _| {});
        // Every other request fails: with one retry all goes well.
        let broken = fault.clone();
        let server = StandIn::start(move |n, r| if n % 2 == 0 { broken.clone() } else { good(n, r) });
        let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(400, 1));
        if passing {
            assert_eq!((report.counts.clips, report.endpoint_failures, report.stopped), (4, 0, None));
        } else {
            assert!(report.stopped.is_some_and(|s| s.contains("status 40")), "not asked again");
            assert_eq!(server.asked(), 1);
        }
        drop(server);
        // All fail: the run ends by itself, the recording is not called done, the next run asks again.
        let out = dir.path().join("other");
        let server = StandIn::start(move |_, _| fault.clone());
        let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(150, 0));
        assert_eq!((report.counts.clips, report.scenes_done), (0, 0));
        assert!(report.stopped.is_some());
        assert_eq!(report.endpoint_failures, if passing { 4 } else { 1 });
        drop(server);
        let server = StandIn::start(good);
        let report = go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(5000, 0));
        assert_eq!((report.counts.clips, report.scenes_done, report.scenes_resumed), (4, 1, 0));
    };
    check(Say::Status(503), true);
    check(Say::Status(429), true);
    check(Say::Garbage, true);
    check(Say::Cut, true);
    check(Say::Silence, true);
    check(Say::Status(401), false);
    check(Say::Status(404), false);
    // Nobody is there.
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("source");
    scannetpp(&root, "s", 36, |_, _| {});
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint =
        Endpoint::new(&format!("http://127.0.0.1:{port}/v1"), "m", Duration::from_secs(1), 0).unwrap();
    let report = go(&options(SourceLayout::Scannetpp, &root, &dir.path().join("out")), &endpoint);
    assert!(report.stopped.is_some());
}

#[test]
fn an_https_endpoint_is_asked_where_its_certificate_is_trusted() {
    let own = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
        rcgen::generate_simple_self_signed(names).unwrap()
    };
    let (right, other) = (own(&["localhost"]), own(&["localhost"]));
    let served = |of: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = rustls::pki_types::PrivateKeyDer::try_from(of.signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![of.cert.der().clone()], key)
            .unwrap();
        Some(Arc::new(config))
    };
    let server = StandIn::start_with(served(&right), good);
    let endpoint = |host: &str, trusted: Option<&rcgen::CertifiedKey<rcgen::KeyPair>>| {
        let url = format!("https://{host}:{}/v1", server.port);
        let endpoint = Endpoint::new(&url, "stand-in", Duration::from_secs(5), 0).unwrap();
        match trusted {
            Some(of) => endpoint.with_certificates("ca.pem", of.cert.pem().as_bytes()).unwrap(),
            None => endpoint,
        }
    };
    let picture = b"\x89PNG\r\n\x1a\n".to_vec();
    assert_eq!(
        endpoint("localhost", Some(&right)).ask("?", std::slice::from_ref(&picture)).unwrap(),
        CENTRED
    );
    // Another authority, that of the system, or another name: refused before anything is said.
    for refused in [
        endpoint("localhost", Some(&other)),
        endpoint("localhost", None),
        endpoint("127.0.0.1", Some(&right)),
    ] {
        let reason = refused.ask("?", std::slice::from_ref(&picture)).unwrap_err();
        assert!(matches!(reason, VlmError::Connection { .. }), "{reason}");
    }
    assert_eq!(server.asked(), 1);
}

#[test]
fn a_stopped_run_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (root, whole, broken) =
        (dir.path().join("source"), dir.path().join("whole"), dir.path().join("broken"));
    for scene in ["a", "b"] {
        scannetpp(&root, scene, 48, |_, _| {}); // 8 possible last frames each
    }
    let files = |out: &Path| -> BTreeSet<(String, Vec<u8>)> {
        let mut found = BTreeSet::new();
        for part in ["clips", "recordings"] {
            for entry in fs::read_dir(out.join(part)).unwrap() {
                let path = entry.unwrap().path();
                found.insert((
                    path.file_name().unwrap().to_string_lossy().into_owned(),
                    fs::read(&path).unwrap(),
                ));
            }
        }
        found
    };
    let server = StandIn::start(good);
    let unbroken = go(&options(SourceLayout::Scannetpp, &root, &whole), &server.endpoint(5000, 0));
    assert_eq!((unbroken.counts.clips, server.asked()), (16, 32));
    drop(server);

    // The endpoint goes away after the third clip of the second recording.
    let server = StandIn::start(|n, r| if n < 22 { good(n, r) } else { Say::Status(500) });
    let report = go(&options(SourceLayout::Scannetpp, &root, &broken), &server.endpoint(5000, 0));
    assert_eq!((report.counts.clips, report.scenes_done), (11, 1));
    assert!(report.stopped.is_some());
    drop(server);
    // And the last line was cut off by a crash.
    let state = broken.join("state.jsonl");
    let text = fs::read(&state).unwrap();
    fs::write(&state, &text[..text.len() - 5]).unwrap();
    let server = StandIn::start(good);
    let report = go(&options(SourceLayout::Scannetpp, &root, &broken), &server.endpoint(5000, 0));
    assert_eq!((report.counts, report.scenes_done, report.scenes_resumed), (unbroken.counts, 2, 1));
    assert_eq!(server.asked(), 2 * (5 + 1), "five left, and the one whose line was cut off");
    assert_eq!(files(&broken), files(&whole));
    let lines = fs::read_to_string(&state).unwrap();
    assert!(lines.lines().all(|l| serde_json::from_str::<Value>(l).is_ok()));
    // A state that is not ours is refused.
    fs::write(&state, "hello\n").unwrap();
    let error = curate(
        &options(SourceLayout::Scannetpp, &root, &broken),
        Some(&server.endpoint(5000, 0)),
        &mut |_| {},
    )
    .unwrap_err();
    assert!(error.to_string().contains("state.jsonl: line 1"), "{error}");
}

#[test]
fn a_damaged_dataset_is_read_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (root, out) = (dir.path().join("source"), dir.path().join("out"));
    scannetpp(&root, "s", 36, |_, _| {});
    let server = StandIn::start(good);
    go(&options(SourceLayout::Scannetpp, &root, &out), &server.endpoint(5000, 0));
    let check = |path: &str, edit: &dyn Fn(&mut Value), clips: usize, reason: &str| {
        let path = out.join(path);
        let before = fs::read(&path).unwrap();
        let mut value: Value = serde_json::from_slice(&before).unwrap();
        edit(&mut value);
        fs::write(&path, value.to_string()).unwrap();
        let dataset = Dataset::open(&out).unwrap();
        assert_eq!(dataset.clips.len(), clips, "{reason}");
        assert!(dataset.rejected.iter().any(|r| r.contains(reason)), "{reason}: {:?}", dataset.rejected);
        fs::write(&path, before).unwrap();
    };
    let clip = "clips/s-000011.json";
    check(clip, &|v| v["caption"] = json!(" "), 3, "empty caption");
    check(clip, &|v| v["area"][0] = json!(0.9), 3, "area");
    check(clip, &|v| v["first"] = json!(700), 3, "no such consecutive frames");
    check(clip, &|v| v["first"] = json!(u64::MAX), 3, "no such consecutive frames");
    check(clip, &|v| v["frames"] = json!(10), 3, "10 frames");
    check(clip, &|v| v["recording"] = json!("../s"), 3, "no such consecutive frames");
    check(clip, &|v| *v = json!([]), 3, "s-000011.json");
    let recording = "recordings/s.json";
    // What is known of a frame is used, the rest is not.
    check(recording, &|v| v["frames"][5]["map_from_camera"][0] = json!(7.0), 4, "its pose is no pose");
    check(recording, &|v| v["frames"][5]["map_from_camera"][3] = json!(null), 4, "its pose is no pose");
    check(recording, &|v| v["frames"][5]["intrinsics"][0] = json!(-1.0), 4, "intrinsics");
    check(recording, &|v| v["frames"][5]["file"] = json!("gone.jpg"), 0, "gone.jpg: missing");
    check(recording, &|v| v["id"] = json!("../s"), 0, "file name");
    check(recording, &|v| v["frames"] = json!(null), 0, "either");
    check(recording, &|v| v["video"] = json!("x"), 0, "either");
    check(recording, &|v| v["frames"][5]["index"] = json!(2), 0, "ascending");
    // A picture that is gone, and one that is damaged.
    let file = root.join("data/s/iphone/rgb/frame_000033.jpg");
    fs::write(&file, b"\x89PNG\r\n\x1a\nnothing").unwrap();
    let dataset = Dataset::open(&out).unwrap();
    assert_eq!(dataset.clips.len(), 4);
    let mut broken = 0;
    dataset
        .pictures(dataset.recordings().next().unwrap(), &mut |_, picture| {
            broken += usize::from(picture.is_err());
            Ok(())
        })
        .unwrap();
    assert_eq!(broken, 1);
    fs::remove_file(&file).unwrap();
    let dataset = Dataset::open(&out).unwrap();
    assert_eq!((dataset.clips.len(), dataset.rejected.len()), (3, 2));
    assert_eq!((dataset.faults.missing_images, dataset.faults.clips), (1, 1));
    fs::write(out.join("dataset.json"), "{\"format\": 2}").unwrap();
    assert!(Dataset::open(&out).is_err());
}

/// The smallest model and run, for pictures of 12x8 pixels and four words, on clips.
fn smallest() -> (String, String) {
    let model = include_str!("../data/train/model.toml")
        .replace("block = 8", "block = 4")
        .replace("height = 16", "height = 8")
        .replace("width = 24", "width = 12");
    let (head, rest) = model.split_once("words = [").unwrap();
    let (_, rest) = rest.split_once(']').unwrap();
    let model = format!("{head}words = [\"red\", \"green\", \"chair\", \"table\"]{rest}");
    let train = include_str!("../data/train/train.toml")
        .replace("steps = 240", "steps = 120")
        .replace("decay_from = 200", "decay_from = 100")
        .replace("checkpoint_every = 80", "checkpoint_every = 50")
        .replace("log_every = 40", "log_every = 20")
        .replace("eval_every = 240", "eval_every = 120")
        .replace("eval_houses = 2", "eval_houses = 8");
    (model, train + "[data]\nkind = \"clips\"\npath = \"clips\"\n")
}

fn train_args(dir: &Path, run: &str) -> TrainArgs {
    TrainArgs {
        config: dir.join("train.toml"),
        out: Some(dir.join(run)),
        plan: false,
        target: "h100".to_owned(),
        devices: 1,
        device: train::EAGER.to_owned(),
        init: None,
        until: None,
        prepare: false,
        other_configuration: false,
        json: false,
    }
}

#[test]
fn what_curate_writes_trains() {
    for layout in [SourceLayout::Scannetpp, SourceLayout::Arkitscenes] {
        let dir = tempfile::tempdir().unwrap();
        let (root, out) = (dir.path().join("source"), dir.path().join("clips"));
        match layout {
            SourceLayout::Scannetpp => {
                scannetpp(&root, "a", 90, |_, _| {});
                scannetpp(&root, "b", 90, |_, _| {});
            }
            _ => {
                arkitscenes(&root, "41", 60, None);
                arkitscenes(&root, "42", 60, None);
                let table = "video_id,visit_id,fold\n41,7.0,Training\n42,7.0,Training\n";
                fs::write(root.join("raw/metadata.csv"), table).unwrap();
            }
        }
        let server = StandIn::start(good);
        let report = go(&options(layout, &root, &out), &server.endpoint(5000, 0));
        assert!(report.counts.clips > 20, "{:?}", report.counts);
        let (model, train) = smallest();
        fs::write(dir.path().join("model.toml"), model).unwrap();
        fs::write(dir.path().join("train.toml"), train).unwrap();
        train::run(&train_args(dir.path(), "run")).unwrap();
        let text = fs::read_to_string(dir.path().join("run/metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 6);
        let loss = |k: usize, name: &str| lines[k]["losses"][name].as_f64().unwrap();
        for name in ["total", "video", "target_pose"] {
            assert!(
                loss(5, name) < 0.8 * loss(0, name),
                "{layout:?} {name}: {} {}",
                loss(0, name),
                loss(5, name)
            );
        }
        // Clips have no such labels.
        for name in ["mask", "locate", "attributes"] {
            assert_eq!(loss(5, name), 0.0, "{name}");
        }
        // The recordings of ARKitScenes have maps of their own: context has no pose in the target's.
        assert_eq!(loss(5, "context_pose") == 0.0, layout == SourceLayout::Arkitscenes);
        assert!(dir.path().join("run/curve.png").is_file());
    }
}
