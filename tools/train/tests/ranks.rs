//! Several ranks, each a process, over a fake NCCL: the same run as one rank, and what happens when one is lost.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mindseye_train::autograd::{Device, DeviceError, EagerDevice, Settings};
use mindseye_train::config::TrainConfig;
use mindseye_train::eager::Eager;
use mindseye_train::error::TrainError;
use mindseye_train::ranks::{Collective, Library, Patience, Place, RankError, Ranks};
use mindseye_train::trainer::{OpenOptions, Trainer};

const MODEL: &str = include_str!("../../../tests/data/train/model.toml");
const TRAIN: &str = include_str!("../../../tests/data/train/train.toml");

/// The CPU with [`FakeNccl`] between processes.
struct FakeDevice;

impl Device for FakeDevice {
    type Interpreter = Eager;

    fn interpreter(&self, settings: Settings<'_>) -> Result<Eager, DeviceError> {
        EagerDevice.interpreter(settings)
    }

    fn library(&self, _: &Place) -> Result<Box<dyn Library>, RankError> {
        Ok(Box::new(FakeLibrary { listener: Mutex::default() }))
    }
}

struct FakeLibrary {
    listener: Mutex<Option<TcpListener>>,
}

fn failed(error: std::io::Error) -> RankError {
    RankError::Library(format!("fake NCCL: {error}"))
}

impl Library for FakeLibrary {
    fn identity(&self) -> Result<Vec<u8>, RankError> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        *self.listener.lock().expect("one thread") = Some(listener);
        Ok(address.into_bytes())
    }

    fn collective(&self, place: &Place, identity: &[u8]) -> Result<Box<dyn Collective>, RankError> {
        let mut peers = Vec::new();
        if let Some(listener) = self.listener.lock().expect("one thread").take() {
            for _ in 1..place.ranks {
                let (mut stream, _) = listener.accept().map_err(failed)?;
                let mut rank = [0];
                stream.read_exact(&mut rank).map_err(failed)?;
                peers.push((rank[0], stream));
            }
            peers.sort_by_key(|(rank, _)| *rank);
        } else {
            let address = String::from_utf8_lossy(identity).into_owned();
            let mut stream = TcpStream::connect(address).map_err(failed)?;
            stream.write_all(&[place.rank as u8]).map_err(failed)?;
            peers.push((0, stream));
        }
        peers.iter().try_for_each(|(_, s)| s.set_nodelay(true)).map_err(failed)?;
        Ok(Box::new(FakeNccl { rank: place.rank, peers: peers.into_iter().map(|(_, s)| s).collect() }))
    }
}

/// Every rank has a connection to the first one, which adds up.
struct FakeNccl {
    rank: usize,
    peers: Vec<TcpStream>,
}

fn give(stream: &mut TcpStream, values: &[f32]) -> Result<(), String> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    stream.write_all(&bytes).map_err(|e| e.to_string())
}

fn take(stream: &mut TcpStream, values: &mut [f32]) -> Result<(), String> {
    let mut bytes = vec![0; 4 * values.len()];
    stream.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    for (v, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
        *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
    Ok(())
}

impl Collective for FakeNccl {
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), String> {
        if self.rank > 0 {
            give(&mut self.peers[0], values)?;
            return take(&mut self.peers[0], values);
        }
        let mut theirs = vec![0.0; values.len()];
        for peer in &mut self.peers {
            take(peer, &mut theirs)?;
            values.iter_mut().zip(&theirs).for_each(|(sum, v)| *sum += v);
        }
        self.peers.iter_mut().try_for_each(|peer| give(peer, values))
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), String> {
        if self.rank == root && root > 0 {
            return give(&mut self.peers[0], values);
        }
        if self.rank > 0 {
            return take(&mut self.peers[0], values);
        }
        if root > 0 {
            take(&mut self.peers[root - 1], values)?;
        }
        let others = self.peers.iter_mut().enumerate().filter(|(i, _)| i + 1 != root);
        others.map(|(_, peer)| peer).try_for_each(|peer| give(peer, values))
    }

    fn aborter(&self) -> Box<dyn Fn() + Send> {
        let streams: Vec<TcpStream> = self.peers.iter().filter_map(|s| s.try_clone().ok()).collect();
        Box::new(move || streams.iter().for_each(|s| drop(s.shutdown(Shutdown::Both))))
    }
}

/// The smallest run, in shorter and shorter-lived ranks.
fn configure(dir: &Path, steps: u64, workers: usize) {
    let train = TRAIN
        .replace("steps = 240", &format!("steps = {steps}"))
        .replace("workers = 2", &format!("workers = {workers}"))
        .replace("log_every = 40", "log_every = 2")
        .replace("checkpoint_every = 80", "checkpoint_every = 4");
    std::fs::write(dir.join("model.toml"), MODEL).expect("the model file is written");
    std::fs::write(dir.join("train.toml"), train).expect("the configuration is written");
}

fn open<D: Device>(
    device: &D,
    dir: &Path,
    run: &str,
    ranks: Option<Ranks>,
) -> Result<Trainer<D>, TrainError> {
    let (config, model) = TrainConfig::load(&dir.join("train.toml"))?;
    Trainer::open_on(device, config, model, &dir.join(run), OpenOptions { ranks, ..OpenOptions::default() })
}

fn one_rank(dir: &Path, run: &str) {
    let mut trainer = open(&EagerDevice, dir, run, None).expect("it opens");
    trainer.run(&AtomicBool::new(false), |_, _| ()).expect("it runs");
}

/// The process of one rank.
#[test]
#[ignore = "is started by the tests below, with the environment of a rank"]
fn rank_process() {
    let set = |name: &str| std::env::var(name).ok();
    let dir = set("MINDSEYE_TEST_RUN").expect("where the run is");
    let mut place = Place::from_environment(set).expect("a place").expect("several ranks");
    let number = |name: &str| set(name).and_then(|text| text.parse().ok());
    let silence = number("MINDSEYE_TEST_SILENCE").unwrap_or(30);
    let [meet, beat, silence] = [60_000, 100, 1000 * silence].map(Duration::from_millis);
    place.patience = Patience { meet, beat, silence };
    let trained = Ranks::join(place, &FakeDevice).map_err(TrainError::from).and_then(|ranks| {
        let mut trainer =
            open(&FakeDevice, Path::new(&dir), &set("MINDSEYE_TEST_NAME").expect("a name"), Some(ranks))?;
        trainer.config.steps = number("MINDSEYE_TEST_UNTIL").unwrap_or(trainer.config.steps);
        trainer.run(&AtomicBool::new(false), |_, _| ())
    });
    if let Err(error) = trained {
        // In one line, without the words of a failed test.
        eprintln!("rank: {error}");
        std::process::exit(3);
    }
}

/// A port after which the next is free, too.
fn port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its number").port();
    free - 1
}

fn start(dir: &Path, run: &str, rank: usize, ranks: usize, port: u16) -> Child {
    command(dir, run, rank, ranks, port).spawn().expect("it starts")
}

fn command(dir: &Path, run: &str, rank: usize, ranks: usize, port: u16) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["--exact", "rank_process", "--ignored", "--nocapture"])
        .env("MINDSEYE_TEST_RUN", dir)
        .env("MINDSEYE_TEST_NAME", run)
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", ranks.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Runs as many ranks, until a step.
fn run(dir: &Path, name: &str, ranks: usize, until: u64) -> Vec<Output> {
    let port = port();
    let until = until.to_string();
    let begin = |rank| command(dir, name, rank, ranks, port).env("MINDSEYE_TEST_UNTIL", &until).spawn();
    let started: Vec<Child> = (0..ranks).map(|rank| begin(rank).expect("it starts")).collect();
    started.into_iter().map(|child| child.wait_with_output().expect("it ends")).collect()
}

fn succeed(ended: &[Output]) {
    for out in ended {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// Name, shape and values of every tensor of a checkpoint.
fn checkpoint(dir: &Path, run: &str) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let data = std::fs::read(dir.join(run).join("checkpoint.safetensors")).expect("a checkpoint");
    let file = safetensors::SafeTensors::deserialize(&data).expect("it is whole");
    let mut all: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (name, t.shape().to_vec(), values.collect())
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Weights, averages and moments agree.
fn same(dir: &Path, a: &str, b: &str) {
    let (a, b) = (checkpoint(dir, a), checkpoint(dir, b));
    assert!(a.len() > 60 && a.len() == b.len(), "{} and {} tensors", a.len(), b.len());
    for ((name, shape, x), (other, its, y)) in a.iter().zip(&b) {
        assert_eq!((name, shape), (other, its));
        let scale = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        let off = x.iter().zip(y).fold(0f32, |most, (x, y)| most.max((x - y).abs()));
        assert!(off <= 1e-5 * scale, "{name}: {off:.1e} of {scale:.1e}");
    }
}

#[test]
fn two_and_four_ranks_train_as_one_with_the_same_batch_and_go_on_from_each_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, 20, 2);
    one_rank(dir, "one");
    succeed(&run(dir, "two", 2, 20));
    same(dir, "one", "two");
    let metrics = |run: &str| std::fs::read_to_string(dir.join(run).join("metrics.jsonl")).expect("metrics");
    assert_eq!(metrics("two").lines().count(), 10);
    // Ten steps by four ranks, then one goes on.
    configure(dir, 20, 4);
    one_rank(dir, "one of four");
    succeed(&run(dir, "mixed", 4, 10));
    one_rank(dir, "mixed");
    same(dir, "one of four", "mixed");
}

/// Waits until a run has written this many lines of metrics.
fn lines(dir: &Path, run: &str, count: usize) {
    let until = Instant::now() + Duration::from_secs(120);
    let metrics = dir.join(run).join("metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < count {
        assert!(Instant::now() < until, "no line {count}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_rank_that_dies_or_stands_still_ends_the_others_and_the_checkpoint_is_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, 100_000, 3);
    let text = std::fs::read_to_string(dir.join("train.toml")).expect("it is there");
    std::fs::write(dir.join("train.toml"), text.replace("batch = 4", "batch = 3")).expect("it is written");
    // Lost: the second, which only the first hears; the first, which all hear; the last, which lives but stands still.
    for (victim, signal, least) in [(1, "-KILL", 0.0), (0, "-KILL", 0.0), (2, "-STOP", 1.0)] {
        let (run, port) = (format!("lost{victim}"), port());
        let begin = |rank| command(dir, &run, rank, 3, port).env("MINDSEYE_TEST_SILENCE", "3").spawn();
        let mut ranks: Vec<Child> = (0..3).map(|rank| begin(rank).expect("it starts")).collect();
        lines(dir, &run, 3);
        let pid = ranks[victim].id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().expect("kill").success());
        let began = Instant::now();
        let mut lost = ranks.remove(victim);
        for rank in ranks {
            let out = rank.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.code(), Some(3), "{said}");
            assert!(said.contains(&format!("rank: rank {victim} is lost")), "{said}");
        }
        let seconds = began.elapsed().as_secs_f64();
        assert!((least..20.0).contains(&seconds), "{seconds} s");
        lost.kill().expect("it is ended");
        lost.wait().expect("it ends");
        let checkpoint = checkpoint(dir, &run);
        assert!(checkpoint.iter().any(|(name, ..)| name.starts_with("second.")), "{run}");
        assert!(checkpoint.iter().all(|(_, shape, values)| shape.iter().product::<usize>() == values.len()));
    }
}

#[test]
fn ranks_that_do_not_fit_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    // Two workers for three ranks.
    configure(dir, 4, 2);
    // The first that sees it ends; the others may hear of its end before they see it themselves.
    let said: Vec<String> =
        run(dir, "run", 3, 4).iter().map(|out| String::from_utf8_lossy(&out.stderr).into_owned()).collect();
    let named = |said: &String| said.contains("workers = 2 must be a multiple of the number of ranks, 3");
    assert!(said.iter().any(named), "{said:?}");
    assert!(said.iter().all(|said| named(said) || said.contains("is lost")), "{said:?}");
    // The second has another configuration.
    let other = dir.join("other");
    std::fs::create_dir(&other).expect("a directory");
    configure(&other, 5, 2);
    let port = port();
    let ranks = [start(dir, "run", 0, 2, port), start(&other, "run", 1, 2, port)];
    for rank in ranks {
        let out = rank.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("rank 1 has another configuration or checkpoint"), "{said}");
    }
    // Three are said to come, or two.
    let port = self::port();
    let ranks = [start(dir, "run", 0, 2, port), start(dir, "run", 1, 3, port)];
    let said: Vec<String> = ranks
        .map(|rank| String::from_utf8_lossy(&rank.wait_with_output().expect("it ends").stderr).into_owned())
        .into();
    assert!(said[0].contains("a process came as rank 1 of 3, but this is a run of 2"), "{}", said[0]);
    // The interpreter of this program computes alone.
    let place =
        Place { rank: 1, ranks: 2, local: 0, address: "127.0.0.1:1".into(), patience: Patience::default() };
    let alone = Ranks::join(place, &EagerDevice).err().expect("no library").to_string();
    assert!(alone.starts_with("WORLD_SIZE=2: several ranks need NCCL"), "{alone}");
}
