//! Reading speed of bags against the bare `mcap` crate and the Python packages `mcap` and `rosbags`.
//!
//! `cargo bench -p mindseye-tests --bench bags` writes bags of the same 640x480 RGB images (200 MB; another size
//! with `BAGS_MB`), reads each with ours and with the others in turn, and prints the best rate of each and their
//! ratio; "CPU ratio" is that of the CPU seconds of all rounds, which other work on the machine disturbs less. Ours reads
//! ahead on two threads: with two free cores the wall ratio comes near twice the CPU ratio where decompression dominates.
//! The Python packages are left out when `python3` (or `PYTHON`) does not have them.
//!
//! Every side gives all messages one by one and adds up their lengths. Ours checks the CRC of each MCAP chunk (it then
//! skips the checksum of the LZ4 frame inside), the checksum of LZ4 frames in `.bag` and the CRC of bzip2 blocks; Python
//! mcap and the bare crate's MessageStream leave the CRC out by default but check that of the LZ4 frame. Files are read
//! with `pread`, not mapped: a failing disk must be an error and not a signal.

#![allow(clippy::unwrap_used)] // A helper that fails ends the run, as it should.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use mindseye_bridge::bag::{OpenOptions, ReadOptions, open, schema};

const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
const START_NS: u64 = 1_700_000_000_000_000_000;
const STEP_NS: u64 = 33_000_000;

/// A smooth picture that moves, with a few bits of noise, as a camera gives it.
fn pixels(frame: usize) -> Vec<u8> {
    let mut noise = 0x9e37_79b9u32.wrapping_mul(frame as u32 + 1) | 1;
    (0..WIDTH * HEIGHT * 3)
        .map(|i| {
            noise ^= noise << 13;
            noise ^= noise >> 17;
            noise ^= noise << 5;
            let (x, y) = (i / 3 % WIDTH, i / 3 / WIDTH);
            let shade = (x + 3 * frame as u32) / 4 + y / 3 + 40 * (i % 3);
            (shade as u8).wrapping_add((noise & 3) as u8)
        })
        .collect()
}

/// `sensor_msgs/msg/Image` as CDR.
fn cdr(frame: usize, pixels: &[u8]) -> Vec<u8> {
    let mut out = vec![0, 1, 0, 0];
    let stamp = START_NS + frame as u64 * STEP_NS;
    for word in [(stamp / 1_000_000_000) as u32, (stamp % 1_000_000_000) as u32, 4] {
        out.extend(word.to_le_bytes());
    }
    out.extend(*b"cam\0");
    for word in [HEIGHT, WIDTH, 5] {
        out.extend(word.to_le_bytes());
    }
    out.extend(*b"rgb8\0\0\0\0");
    for word in [WIDTH * 3, pixels.len() as u32] {
        out.extend(word.to_le_bytes());
    }
    out.extend(pixels);
    out
}

/// The same in ROS 1 serialisation.
fn ros1(frame: usize, pixels: &[u8]) -> Vec<u8> {
    let stamp = START_NS + frame as u64 * STEP_NS;
    let mut out = Vec::with_capacity(pixels.len() + 64);
    for word in [frame as u32, (stamp / 1_000_000_000) as u32, (stamp % 1_000_000_000) as u32, 3] {
        out.extend(word.to_le_bytes());
    }
    out.extend(*b"cam");
    for word in [HEIGHT, WIDTH, 4] {
        out.extend(word.to_le_bytes());
    }
    out.extend(*b"rgb8\0");
    for word in [WIDTH * 3, pixels.len() as u32] {
        out.extend(word.to_le_bytes());
    }
    out.extend(pixels);
    out
}

fn write_mcap(path: &Path, compression: Option<mcap::Compression>, frames: usize) {
    let options = mcap::WriteOptions::new().profile("ros2").compression(compression).compression_threads(0);
    let mut writer = options.create(BufWriter::new(File::create(path).unwrap())).unwrap();
    let text = schema::ros2msg("sensor_msgs/msg/Image").unwrap();
    let id = writer.add_schema("sensor_msgs/msg/Image", "ros2msg", text.as_bytes()).unwrap();
    let channel = writer.add_channel(id, "/camera/image_raw", "cdr", &Default::default()).unwrap();
    for frame in 0..frames {
        let stamp = START_NS + frame as u64 * STEP_NS;
        let header = mcap::records::MessageHeader {
            channel_id: channel,
            sequence: frame as u32,
            log_time: stamp,
            publish_time: stamp,
        };
        writer.write_to_known_channel(&header, &cdr(frame, &pixels(frame))).unwrap();
    }
    writer.finish().unwrap();
}

fn write_db3(dir: &Path, frames: usize) {
    fs::create_dir(dir).unwrap();
    let db = rusqlite::Connection::open(dir.join("images.db3")).unwrap();
    db.execute_batch(
        "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,
         serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);
         CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL,
         data BLOB NOT NULL);
         CREATE INDEX timestamp_idx ON messages (timestamp ASC);
         INSERT INTO topics VALUES (1, '/camera/image_raw', 'sensor_msgs/msg/Image', 'cdr', '');
         BEGIN;",
    )
    .unwrap();
    for frame in 0..frames {
        let stamp = (START_NS + frame as u64 * STEP_NS) as i64;
        db.execute(
            "INSERT INTO messages(topic_id, timestamp, data) VALUES (1, ?1, ?2)",
            rusqlite::params![stamp, cdr(frame, &pixels(frame))],
        )
        .unwrap();
    }
    db.execute_batch("COMMIT").unwrap();
    let span = frames as u64 * STEP_NS;
    let yaml = format!(
        "rosbag2_bagfile_information:\n  version: 5\n  storage_identifier: sqlite3\n  duration:\n    \
         nanoseconds: {span}\n  starting_time:\n    nanoseconds_since_epoch: {START_NS}\n  message_count: {frames}\n  \
         topics_with_message_count:\n    - topic_metadata:\n        name: /camera/image_raw\n        \
         type: sensor_msgs/msg/Image\n        serialization_format: cdr\n        offered_qos_profiles: \"\"\n      \
         message_count: {frames}\n  compression_format: \"\"\n  compression_mode: \"\"\n  \
         relative_file_paths:\n    - images.db3\n  files:\n    - path: images.db3\n      starting_time:\n        \
         nanoseconds_since_epoch: {START_NS}\n      duration:\n        nanoseconds: {span}\n      \
         message_count: {frames}\n"
    );
    fs::write(dir.join("metadata.yaml"), yaml).unwrap();
}

/// A rosbag record: header fields, data.
fn record(fields: &[(&str, Vec<u8>)], data: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    for (name, value) in fields {
        header.extend(((name.len() + 1 + value.len()) as u32).to_le_bytes());
        header.extend(name.as_bytes());
        header.push(b'=');
        header.extend(value);
    }
    let mut out = (header.len() as u32).to_le_bytes().to_vec();
    out.extend(header);
    out.extend((data.len() as u32).to_le_bytes());
    out.extend(data);
    out
}

fn write_bag(path: &Path, compression: &str, frames: usize) {
    let u32s = |v: usize| (v as u32).to_le_bytes().to_vec();
    let time = |frame: usize| {
        let stamp = START_NS + frame as u64 * STEP_NS;
        let mut out = ((stamp / 1_000_000_000) as u32).to_le_bytes().to_vec();
        out.extend(((stamp % 1_000_000_000) as u32).to_le_bytes());
        out
    };
    let line = "=".repeat(80);
    let definition = format!(
        "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\n\
         uint8[] data\n{line}\nMSG: std_msgs/Header\nuint32 seq\ntime stamp\nstring frame_id\n"
    );
    let mut about = Vec::new();
    for (name, value) in [
        ("topic", "/camera/image_raw"),
        ("type", "sensor_msgs/Image"),
        ("md5sum", "060021388200f6f0f447d0fcd9c64743"),
        ("message_definition", &definition),
    ] {
        about.extend(((name.len() + 1 + value.len()) as u32).to_le_bytes());
        about.extend(format!("{name}={value}").as_bytes());
    }
    let connection =
        record(&[("op", vec![7]), ("conn", u32s(0)), ("topic", b"/camera/image_raw".to_vec())], &about);
    let mut out = BufWriter::new(File::create(path).unwrap());
    let head = |index_pos: u64, chunks: usize| {
        let fields = [
            ("op", vec![3]),
            ("index_pos", index_pos.to_le_bytes().to_vec()),
            ("conn_count", u32s(1)),
            ("chunk_count", u32s(chunks)),
        ];
        let short = record(&fields, &[]).len();
        record(&fields, &vec![b' '; 4096 - short])
    };
    out.write_all(b"#ROSBAG V2.0\n").unwrap();
    out.write_all(&head(0, 0)).unwrap();
    let mut at = 13 + 4096;
    let mut infos = Vec::new();
    for frame in 0..frames {
        // One image is larger than the 768 KiB of a chunk.
        let mut content = if frame == 0 { connection.clone() } else { Vec::new() };
        let offset = content.len();
        let fields = [("op", vec![2]), ("conn", u32s(0)), ("time", time(frame))];
        content.extend(record(&fields, &ros1(frame, &pixels(frame))));
        let packed = match compression {
            "lz4" => {
                let mut encoder = lz4::EncoderBuilder::new().build(Vec::new()).unwrap();
                encoder.write_all(&content).unwrap();
                let (packed, result) = encoder.finish();
                result.unwrap();
                packed
            }
            _ => {
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
                encoder.write_all(&content).unwrap();
                encoder.finish().unwrap()
            }
        };
        let chunk = record(
            &[("op", vec![5]), ("compression", compression.into()), ("size", u32s(content.len()))],
            &packed,
        );
        let mut entry = time(frame);
        entry.extend(u32s(offset));
        let index =
            record(&[("op", vec![4]), ("ver", u32s(1)), ("conn", u32s(0)), ("count", u32s(1))], &entry);
        infos.push((at as u64, time(frame)));
        out.write_all(&chunk).unwrap();
        out.write_all(&index).unwrap();
        at += chunk.len() + index.len();
    }
    out.write_all(&connection).unwrap();
    for (place, time) in infos {
        let mut counts = u32s(0);
        counts.extend(u32s(1));
        let fields = [
            ("op", vec![6]),
            ("ver", u32s(1)),
            ("chunk_pos", place.to_le_bytes().to_vec()),
            ("start_time", time.clone()),
            ("end_time", time),
            ("count", u32s(1)),
        ];
        out.write_all(&record(&fields, &counts)).unwrap();
    }
    out.flush().unwrap();
    drop(out);
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&head(at as u64, frames), 13).unwrap();
}

/// What reading a bag once took.
struct Once {
    /// Bytes of all messages.
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
}

type Measured = Option<Once>;

/// CPU time of this process, all threads, in steps of 10 ms.
fn cpu() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn timed(read: impl FnOnce() -> u64) -> Measured {
    let (start, before) = (Instant::now(), cpu());
    let bytes = read();
    Some(Once { bytes, seconds: start.elapsed().as_secs_f64(), cpu_seconds: cpu() - before })
}

fn ours(path: &Path) -> Measured {
    timed(|| read_ours(path))
}

fn read_ours(path: &Path) -> u64 {
    let bag = open(path, &OpenOptions::default()).unwrap();
    let mut messages = bag.messages(&ReadOptions::default());
    let bytes = (&mut messages).map(|m| m.data.len() as u64).sum();
    assert!(messages.damage().is_empty(), "{:?}", messages.damage());
    bytes
}

fn bare_mcap(path: &Path) -> Measured {
    timed(|| read_bare_mcap(path))
}

#[allow(unsafe_code)]
fn read_bare_mcap(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    // SAFETY: the file was written by this program into its own temporary directory; nobody changes it.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let stream = mcap::MessageStream::new(&map).unwrap();
    stream.map(|m| m.unwrap().data.len() as u64).sum()
}

const PYTHON_MCAP: &str = "
import sys, time
from mcap.reader import make_reader
t, c = time.perf_counter(), time.process_time()
with open(sys.argv[1], 'rb') as f:
    n = sum(len(m.data) for _, _, m in make_reader(f).iter_messages())
print(n, time.perf_counter() - t, time.process_time() - c)
";

const PYTHON_ROSBAGS: &str = "
import sys, time
from pathlib import Path
if sys.argv[1].endswith('.bag'):
    from rosbags.rosbag1 import Reader
else:
    from rosbags.rosbag2 import Reader
t, c = time.perf_counter(), time.process_time()
with Reader(Path(sys.argv[1])) as r:
    n = sum(len(d) for _, _, d in r.messages())
print(n, time.perf_counter() - t, time.process_time() - c)
";

fn python(script: &str, path: &Path) -> Measured {
    let program = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let out = Command::new(program).args(["-c", script]).arg(path).output().ok()?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        eprintln!("  python: {}", text.lines().last().unwrap_or("failed"));
        return None;
    }
    let text = String::from_utf8(out.stdout).ok()?;
    let mut parts = text.split_whitespace();
    let bytes = parts.next()?.parse().ok()?;
    let mut number = || parts.next()?.parse().ok();
    Some(Once { bytes, seconds: number()?, cpu_seconds: number()? })
}

/// Another reader: its name, the ratio wanted, how it reads.
type Other<'a> = (&'a str, f64, fn(&Path) -> Measured);

struct Row<'a> {
    name: &'a str,
    path: PathBuf,
    rounds: usize,
    others: Vec<Other<'a>>,
}

fn main() {
    // `cargo test --benches` calls without --bench: nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let megabytes: usize = std::env::var("BAGS_MB").ok().and_then(|v| v.parse().ok()).unwrap_or(200);
    let frames = (megabytes * 1_000_000 / (WIDTH * HEIGHT * 3) as usize).max(4);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    eprintln!("writing {frames} images of {WIDTH}x{HEIGHT} in six formats");
    write_mcap(&at("none.mcap"), None, frames);
    write_mcap(&at("lz4.mcap"), Some(mcap::Compression::Lz4), frames);
    write_mcap(&at("zstd.mcap"), Some(mcap::Compression::Zstd), frames);
    write_db3(&at("db3"), frames);
    write_bag(&at("lz4.bag"), "lz4", frames);
    write_bag(&at("bz2.bag"), "bz2", frames);

    let mcap_others: Vec<Other<'_>> =
        vec![("mcap crate", 0.9, bare_mcap), ("python mcap", 2.0, |p| python(PYTHON_MCAP, p))];
    let rosbags =
        |target: f64| -> Vec<Other<'_>> { vec![("python rosbags", target, |p| python(PYTHON_ROSBAGS, p))] };
    let rows = [
        Row { name: "MCAP none", path: at("none.mcap"), rounds: 7, others: mcap_others.clone() },
        Row { name: "MCAP lz4", path: at("lz4.mcap"), rounds: 7, others: mcap_others.clone() },
        Row { name: "MCAP zstd", path: at("zstd.mcap"), rounds: 5, others: mcap_others },
        Row { name: "db3", path: at("db3"), rounds: 5, others: rosbags(1.0) },
        Row { name: "bag lz4", path: at("lz4.bag"), rounds: 5, others: rosbags(2.0) },
        Row { name: "bag bz2", path: at("bz2.bag"), rounds: 2, others: rosbags(1.8) },
    ];
    println!(
        "{:<10} {:>10}   {:<15} {:>10} {:>7} {:>7} {:>10}",
        "bag", "ours MB/s", "other", "MB/s", "ratio", "wanted", "CPU ratio"
    );
    for row in rows {
        let (mut best, mut cpu) = (f64::INFINITY, 0.0);
        let mut others = vec![(f64::INFINITY, 0.0); row.others.len()];
        let mut bytes = 0;
        for _ in 0..row.rounds {
            if let Some(once) = ours(&row.path) {
                bytes = once.bytes;
                best = best.min(once.seconds);
                cpu += once.cpu_seconds;
            }
            for ((name, _, measure), (best, cpu)) in row.others.iter().zip(&mut others) {
                if let Some(once) = measure(&row.path) {
                    assert_eq!(once.bytes, bytes, "{name} reads other bytes");
                    *best = best.min(once.seconds);
                    *cpu += once.cpu_seconds;
                }
            }
        }
        let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
        for ((name, wanted, _), (other, other_cpu)) in row.others.iter().zip(others) {
            let ours = rate(best);
            if !other.is_finite() {
                println!("{:<10} {ours:>10.0}   {name:<15} {:>10}", row.name, "not there");
                continue;
            }
            let ratio = other / best;
            let verdict = if ratio >= *wanted { "" } else { "  missed" };
            println!(
                "{:<10} {ours:>10.0}   {name:<15} {:>10.0} {ratio:>7.2} {wanted:>7.2} {:>10.2}{verdict}",
                row.name,
                rate(other),
                other_cpu / cpu,
            );
        }
    }
}
