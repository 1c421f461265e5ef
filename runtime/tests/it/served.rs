//! Imagination served over Zenoh on the loopback: robots and servers of this process, and of others.

use crate::fake::{
    FakeEncoder, FakeMind, FakeRobot, OBJECT_AHEAD_M, STANDOFF_M, config, free_port, session,
    wait_for_latents,
};
use crate::shipped::program;
use mindseye::context::{ContextLatent, LatentInfo};
use mindseye::ground::{Grounded, Mind, Scene, Stage, ground};
use mindseye::image::RgbImage;
use mindseye::imagine::Flow;
use mindseye::mind::Pipeline;
use mindseye::node::{MonotonicClock, Node, NodeParts};
use mindseye::planar::Pose2;
use mindseye::served::server::Limits;
use mindseye::served::shared::{Others, ShareConfig, SharedGroup};
use mindseye::served::{Link, Serving, ServingConfig, served_mind};
use mindseye::visit::{SWEEP, Visit, picture, plain_pose};
use mindseye_bridge::answer::Status;
use mindseye_bridge::clock;
use mindseye_bridge::goal::Goal;
use mindseye_bridge::ros::{Mode, RosConfig, RosSession, ZenohSettings};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::denoise::Denoised;
use mindseye_world::{Camera, Difficulty, Frame, House, Rng, goal_pose};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn scene(robot: usize) -> Scene {
    let here = Pose2::new(1.0, 2.0, 0.5);
    let picture = RgbImage::filled(24, 16, [90; 3]);
    let memory = (0..5).map(|k| ContextLatent {
        info: LatentInfo {
            index: k,
            segment: 0,
            captured_at: Timestamp(1_000_000_000 * k as i64),
            odom_from_base: Some(here),
        },
        latent: vec![0.1 * k as f32 + robot as f32; 12],
        picture: picture.clone(),
        detail: None,
        by: None,
    });
    Scene {
        memory: memory.collect(),
        newest: picture.clone(),
        newest_detail: None,
        captured_at: Timestamp(5_000_000_000),
        odom_from_base: Some(here),
        odom_frame: "odom".into(),
        base_frame: "base_link".into(),
        base_from_camera: None,
        odometry_noise: Default::default(),
        intrinsics: None,
        studied: Default::default(),
    }
}

/// A session in the network: where it listens, and whom it connects to.
fn in_network(node: &str, mode: Mode, listen: &[&str], connect: &[&str]) -> RosSession {
    let owned = |all: &[&str]| Some(all.iter().map(|e| (*e).to_owned()).collect());
    let (listen, connect) = (owned(listen), owned(connect));
    let zenoh = ZenohSettings { mode: Some(mode), listen, connect, ..ZenohSettings::default() };
    RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process(node) }).unwrap()
}

/// A router, as robots and servers meet at one.
pub fn router() -> (RosSession, u16) {
    let port = free_port();
    (in_network("router", Mode::Router, &[&at(port)], &[]), port)
}

pub fn client(node: &str, port: u16) -> RosSession {
    in_network(node, Mode::Client, &[], &[&at(port)])
}

pub fn at(port: u16) -> String {
    format!("tcp/127.0.0.1:{port}")
}

fn serve(session: &RosSession, delay_ms: u64) -> Serving {
    let config = ServingConfig { name: "hall".into(), limits: Limits::default() };
    Serving::start(session, &config, vec![Box::new(FakeMind::new(Duration::from_millis(delay_ms)))]).unwrap()
}

/// A robot whose own network must never be asked.
fn robot(name: &str, session: &RosSession, bundle: &str, fallback: Option<Box<dyn Mind>>) -> Box<dyn Mind> {
    let mut own = FakeMind::saying(|_| panic!("the robot's own denoiser was asked"));
    own.spec.bundle_sha256 = bundle.into();
    served_mind(Box::new(own), Link::open(session, "hall", name, bundle).unwrap(), true, fallback)
}

fn ask(
    mind: &mut dyn Mind,
    scene: &Scene,
    within_ms: i64,
    watch: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Option<Grounded> {
    let goal = Goal::text("g", "find the chair").unwrap();
    let until = Some(clock::monotonic() + TimeDelta::from_millis(within_ms));
    ground(mind, scene, &goal, &MonotonicClock, until, watch).ok()
}

#[test]
#[ignore = "real time over a router: ten seconds of two cores"]
fn a_served_goal_is_answered_as_one_at_home() {
    let (_router, port) = router();
    let server = client("server", port);
    let serving = serve(&server, 0);
    let at_robot = client("robot", port);
    let mut served = robot("r1", &at_robot, "fake", None);
    let (mut drafts, mut steps) = (0, 0);
    let got = ask(served.as_mut(), &scene(1), 5000, &mut |stage| {
        drafts += usize::from(matches!(stage, Stage::Draft(_)));
        steps += usize::from(matches!(stage, Stage::Step { estimate, .. } if estimate.len() == 36));
        Flow::Continue
    });
    let got = got.unwrap();
    let want = ask(&mut FakeMind::new(Duration::ZERO), &scene(1), 5000, &mut |_| Flow::Continue).unwrap();
    assert_eq!((got.answer.status, drafts, steps), (Status::Found, 1, 10), "{:?}", got.answer.reason);
    let plain = |g: &Grounded| {
        let mut answer = g.answer.clone();
        answer.timings_ms.clear();
        answer.to_json()
    };
    assert_eq!(plain(&got), plain(&want));
    assert_eq!(got.lifted, want.lifted);
    // Latents were missing once, and are held from then on.
    let first = serving.counts();
    assert_eq!((first.missing, first.latents), (1, 5), "{first:?}");
    ask(served.as_mut(), &scene(1), 5000, &mut |_| Flow::Continue).unwrap();
    assert_eq!(serving.counts().missing, 1);

    // Stopped in the middle: the server stops within a step, and takes the next goal.
    let slow = serve(&client("slow", port), 40);
    drop(serving);
    let mut asked_at = None;
    let stopped = ask(served.as_mut(), &scene(1), 10_000, &mut |stage| match stage {
        Stage::Step { .. } => {
            asked_at.get_or_insert_with(Instant::now);
            Flow::Stop
        }
        _ => Flow::Continue,
    });
    assert!(stopped.is_none());
    while slow.counts().given_up == 0 {
        assert!(asked_at.unwrap().elapsed() < Duration::from_secs(2), "{:?}", slow.counts());
        std::thread::sleep(Duration::from_millis(5));
    }

    // Another bundle is refused by name.
    let mut other = robot("r2", &at_robot, "0123456789abcdef", None);
    let refused = ask(other.as_mut(), &scene(2), 3000, &mut |_| Flow::Continue).unwrap().answer;
    assert_eq!(refused.status, Status::Failed);
    let reason = refused.reason.unwrap();
    assert!(reason.contains("it runs bundle fake, this robot's is 0123456789ab"), "{reason}");
}

#[test]
#[ignore = "real time over a router: ten seconds of two cores"]
fn a_server_that_dies_in_mid_goal_is_replaced_by_another_or_by_the_fallback() {
    let (_router, port) = router();
    let hub = client("hub", port);
    let dying = client("dying", port);
    let serving = serve(&dying, 10);
    let fleet: Vec<_> = (0..3)
        .map(|r| {
            std::thread::spawn(move || {
                let at_robot = client(&format!("r{r}"), port);
                let mut served = robot(&format!("r{r}"), &at_robot, "fake", None);
                let mut answers = Vec::new();
                for _ in 0..3 {
                    let began = Instant::now();
                    let got = ask(served.as_mut(), &scene(r), 6000, &mut |_| Flow::Continue).unwrap().answer;
                    answers.push((got, began.elapsed()));
                }
                answers
            })
        })
        .collect();
    // Dead in the middle of the first goals; the next one comes a little later.
    let began = Instant::now();
    while serving.counts().asked < 3 {
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", serving.counts());
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(serving);
    dying.close().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let again = client("again", port);
    let serving = serve(&again, 3);
    for robot in fleet {
        let answers = robot.join().unwrap();
        assert_eq!(answers.len(), 3);
        for (answer, took) in answers {
            assert_eq!((answer.status, &answer.fallback), (Status::Found, &None), "{:?}", answer.reason);
            assert!(took < Duration::from_millis(6000), "{took:?}");
        }
    }
    assert!(serving.counts().done >= 6, "{:?}", serving.counts());
    drop(serving);
    // Nobody is left: the small model here answers in time, and says why.
    let mut alone = robot("r9", &hub, "fake", Some(Box::new(FakeMind::new(Duration::from_millis(1)))));
    let began = Instant::now();
    let answer = ask(alone.as_mut(), &scene(1), 3000, &mut |_| Flow::Continue).unwrap().answer;
    assert_eq!(answer.status, Status::Found, "{:?}", answer.reason);
    let why = answer.fallback.clone().unwrap();
    assert!(why.contains("no server \"hall\" was found"), "{why}");
    assert!(began.elapsed() < Duration::from_millis(3000));
    assert!(answer.to_json().contains("\"fallback\":\"no server"));
}

/// The server has the only mind at work for longer than this robot has: neither the text's rows nor the drives come. Half of
/// the time is the fallback's, and however many candidates are asked for it answers within that.
#[test]
fn the_fallback_answers_by_the_deadline_whatever_is_asked_for() {
    let port = free_port();
    let hall = session("hall", Some(port), None);
    let _serving = serve(&hall, 3000);
    let at_robot = session("robot", None, Some(port));
    let busy = at_robot.clone();
    let other = std::thread::spawn(move || {
        let mut first = robot("r1", &busy, "fake", None);
        ask(first.as_mut(), &scene(1), 1500, &mut |_| Flow::Continue).unwrap().answer.status
    });
    std::thread::sleep(Duration::from_millis(500));
    for has_text in [false, true] {
        let own = FakeMind::saying(|_| panic!("the robot's own denoiser was asked"));
        let link = Link::open(&at_robot, "hall", "r2", "fake").unwrap();
        let small = FakeMind::new(Duration::from_millis(5));
        let mut served = served_mind(Box::new(own), link, has_text, Some(Box::new(small)));
        let goal = Goal { candidates: Some(64), ..Goal::text("g", "find the chair").unwrap() };
        let began = Instant::now();
        let until = Some(clock::monotonic() + TimeDelta::from_millis(1000));
        let scene = scene(2);
        let got = ground(served.as_mut(), &scene, &goal, &MonotonicClock, until, &mut |_| Flow::Continue);
        let (answer, took) = (got.unwrap().answer, began.elapsed());
        assert_eq!(answer.status, Status::Found, "{:?}", answer.reason);
        assert!(
            answer.fallback.as_ref().unwrap().contains("no result within 0.5 s"),
            "{:?}",
            answer.fallback
        );
        assert!(took < Duration::from_millis(1400), "{took:?}");
    }
    assert_eq!(other.join().unwrap(), Status::Failed);
}

/// A mind whose answers differ with what was seen.
fn telling(delay_ms: u64) -> FakeMind {
    FakeMind::saying(move |step| {
        std::thread::sleep(Duration::from_millis(delay_ms));
        let (frames, tokens) = (step.frames(), 6);
        let mut pose = vec![[0.0, 0.0, 1.0, 0.0]; frames];
        let way = (OBJECT_AHEAD_M - STANDOFF_M) as f32;
        pose[frames - 1] = [way + 0.001 * step.latents[0], 0.0, 1.0, 0.0];
        Denoised {
            prediction: step.latents.iter().map(|x| 0.5 + 0.1 * x).collect(),
            pose,
            mask: vec![5.0; frames * tokens],
            locate: vec![[OBJECT_AHEAD_M as f32, 0.0]; frames * tokens],
        }
    })
}

/// What a process beside a test does until it is killed: MINDSEYE_IT_BESIDE is "router LISTEN[,LISTEN]
/// [CONNECT]" or "server CONNECT".
#[test]
#[ignore = "not a test: a process that others start"]
fn beside() {
    let role = std::env::var("MINDSEYE_IT_BESIDE").unwrap_or_default();
    let words: Vec<&str> = role.split(' ').collect();
    let router = |listen: &str, connect: &[&str]| {
        (in_network("router", Mode::Router, &listen.split(',').collect::<Vec<_>>(), connect), None)
    };
    let _here: (RosSession, Option<Serving>) = match words[..] {
        ["router", listen] => router(listen, &[]),
        ["router", listen, connect] => router(listen, &[connect]),
        ["server", connect] => {
            let session = in_network("server", Mode::Client, &[], &[connect]);
            let config = ServingConfig { name: "hall".into(), limits: Limits::default() };
            let serving = Serving::start(&session, &config, vec![Box::new(telling(2))]).unwrap();
            (session, Some(serving))
        }
        _ => {
            eprintln!("SKIP: MINDSEYE_IT_BESIDE does not say what to do");
            return;
        }
    };
    // Whoever started it may have been killed.
    let parent = std::os::unix::process::parent_id();
    while std::os::unix::process::parent_id() == parent {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// As `beside`, in another process.
fn start_beside(role: &str) -> Killed {
    let via = std::env::var("MINDSEYE_FLEET_VIA").unwrap_or_default();
    let program = std::env::current_exe().unwrap();
    let mut words = via.split_whitespace().map(str::to_owned).chain([program.to_str().unwrap().to_owned()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--ignored", "--exact", "served::beside"]);
    let quiet = command.env("MINDSEYE_IT_BESIDE", role).stdout(Stdio::null()).stderr(Stdio::null());
    Killed(quiet.spawn().unwrap())
}

/// 32 robots and one server, which is killed in the middle of goals and begins anew. On the loopback; `tests/served/run.sh`
/// puts two routers and a line with delay and loss between them, and says by MINDSEYE_FLEET_ROBOTS and MINDSEYE_FLEET_SERVER
/// where either connects, and by MINDSEYE_FLEET_VIA how the server is started.
#[test]
#[ignore = "real time with 32 robots: half a minute"]
fn a_fleet_is_answered_while_its_server_dies_and_comes_back() {
    const ROBOTS: usize = 32;
    const GOALS: usize = 4;
    const WITHIN_MS: i64 = 8000;
    let local = router();
    let env = |name: &str| std::env::var(name).unwrap_or_else(|_| at(local.1));
    let (robots_at, server_at) = (env("MINDSEYE_FLEET_ROBOTS"), env("MINDSEYE_FLEET_SERVER"));
    let server = start_beside(&format!("server {server_at}"));
    let (done_in, done) = std::sync::mpsc::channel();
    let began = Instant::now();
    let fleet: Vec<_> = (0..ROBOTS)
        .map(|r| {
            let (robots_at, done_in) = (robots_at.clone(), done_in.clone());
            std::thread::spawn(move || {
                let name = format!("r{r}");
                let session = in_network(&name, Mode::Client, &[], &[&robots_at]);
                let link = Link::open(&session, "hall", &name, "fake").unwrap();
                let own = FakeMind::saying(|_| panic!("the robot's own denoiser was asked"));
                let mut served = served_mind(Box::new(own), link, true, Some(Box::new(telling(0))));
                let scene = scene(r);
                for _ in 0..GOALS {
                    let asked_at = Instant::now();
                    let got = ask(served.as_mut(), &scene, WITHIN_MS, &mut |_| Flow::Continue).unwrap();
                    done_in.send((r, asked_at.elapsed().as_secs_f64() * 1e3, got)).unwrap();
                }
            })
        })
        .collect();
    drop(done_in);
    let home: Vec<Grounded> = (0..ROBOTS)
        .map(|r| ask(&mut telling(0), &scene(r), WITHIN_MS, &mut |_| Flow::Continue).unwrap())
        .collect();
    let (mut took, mut answered, mut by_fallback, mut server) =
        (Vec::new(), vec![0; ROBOTS], 0, Some(server));
    let mut again = None;
    for (r, millis, got) in done {
        answered[r] += 1;
        took.push(millis);
        let mut answer = got.answer;
        by_fallback += usize::from(answer.fallback.take().is_some());
        answer.timings_ms.clear();
        let mut want = home[r].answer.clone();
        want.timings_ms.clear();
        assert_eq!(answer, want, "robot {r}");
        assert_eq!(got.lifted, home[r].lifted, "robot {r}");
        assert!(millis < WITHIN_MS as f64, "robot {r}: {millis} ms");
        // All robots have asked by now, and most wait.
        if took.len() == ROBOTS {
            drop(server.take());
            std::thread::sleep(Duration::from_millis(500));
            again = Some(start_beside(&format!("server {server_at}")));
        }
    }
    let all = began.elapsed().as_secs_f64();
    fleet.into_iter().for_each(|robot| robot.join().unwrap());
    drop(again);
    assert_eq!(answered, vec![GOALS; ROBOTS]);
    // It came back: whoever asked in the meantime is not left to the fallback for ever.
    assert!(by_fallback <= 2 * ROBOTS, "{by_fallback}");
    took.sort_by(f64::total_cmp);
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
    println!(
        "{ROBOTS} robots, {} goals, each answered once and as at home in {all:.1} s ({:.1} goals/s): p50 {:.0} ms, p99 {:.0} ms; \
         server killed and back after 0.5 s: {by_fallback} answered by the fallback",
        took.len(),
        took.len() as f64 / all,
        at(50),
        at(99)
    );
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program and the shipped bundle: what a server imagines is what the robot would have imagined, byte for byte.
#[test]
fn the_program_serves_and_a_bag_is_answered_from_there() {
    let port = free_port();
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let bag = repository().join("tests/data/runtime/house.mcap");
    let served = || {
        let child = program()
            .args(["serve", "--name", "hall", "--listen", &endpoint, "--connect", "tcp/127.0.0.1:1"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "the server listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        Killed(child)
    };
    let replay = |extra: &[&str]| {
        let output = program()
            .args(["replay", bag.to_str().unwrap(), "--goal", "find the red chair", "--seed", "1", "--json"])
            .args(extra)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut document: serde_json::Value = serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("{e}: {text} {}", String::from_utf8_lossy(&output.stderr)));
        document["answer"]["timings_ms"] = serde_json::Value::Null;
        document
    };
    // A robot's bundle without what the server has.
    let robots = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(repository().join("models/house-tiny")).unwrap() {
        let file = entry.unwrap();
        if !file.file_name().to_string_lossy().starts_with("denoiser") {
            std::fs::copy(file.path(), robots.path().join(file.file_name())).unwrap();
        }
    }
    let (robots, small) =
        (robots.path().to_str().unwrap().to_owned(), repository().join("models/house-tiny"));
    let server = served();
    let from = ["--mind", "zenoh:hall", "--connect", &endpoint, "--bundle", &robots];
    let got = replay(&from);
    assert_eq!(got, replay(&["--bundle", small.to_str().unwrap()]));
    drop(server);
    let answer = replay(&[&from[..], &["--fallback", small.to_str().unwrap()]].concat())["answer"].clone();
    assert!(answer["fallback"].as_str().unwrap().contains("no server \"hall\" was found"), "{answer}");
    assert_eq!((&answer["pose"], &answer["status"]), (&got["answer"]["pose"], &got["answer"]["status"]));
}

fn shared(robot: &str, bundle: &str, seen: ContextLatent) -> SharedGroup {
    SharedGroup { robot: robot.into(), process: 1, bundle: bundle.into(), frame: "map".into(), seen }
}

/// The shipped model: robot b stands with its back to the thing and has seen nothing of it; robot a has looked around.
#[test]
fn what_one_robot_has_seen_another_finds() {
    let pipeline = Pipeline::load(&repository().join("models/house-tiny"), "rten", 2).unwrap();
    let (spec, mut encoder) = (pipeline.spec().clone(), pipeline.encoder().unwrap());
    let camera = Camera::new(spec.camera.width, spec.camera.height);
    let house = House::generate(10, &Difficulty::plain());
    let a = Visit::new(house, Rng::new(10), &camera, encoder.as_mut(), SWEEP).unwrap();
    let (object, stand) =
        (0..a.house.objects.len()).find_map(|i| Some((i, goal_pose(&a.house, a.here, i)?))).unwrap();
    let thing = &a.house.objects[object];
    let away = f64::atan2(a.here.y - thing.y, a.here.x - thing.x);
    let map_from_b = mindseye_world::Pose2::unwrapped(a.here.x, a.here.y, away);
    let b = a.moved_to(map_from_b, &camera);
    // Where the odometry of b began is anywhere.
    let odom_from_map = Pose2::new(3.0, -2.0, 1.0);
    let mut scene = b.scene();
    scene.odom_from_base = Some(odom_from_map.compose(plain_pose(map_from_b)));
    let frames = vec![picture(&a.house, map_from_b, &camera, &mut Frame::new()); 4];
    let mut latent = vec![0.0; spec.latent_len];
    encoder.encode_group(&frames, &mut latent).unwrap();
    let own = |k: u64| ContextLatent {
        info: LatentInfo { index: k, odom_from_base: scene.odom_from_base, ..a.memory[0].info },
        latent: latent.clone(),
        picture: frames[0].clone(),
        detail: Some(b.newest_detail.clone()),
        by: None,
    };
    scene.memory = vec![own(1), own(2)];
    let goal = Goal::text("g", &format!("find the {}", thing.name)).unwrap();
    let mut mind = pipeline.mind(0).unwrap();
    let mut ask = |scene: &Scene| {
        ground(mind.as_mut(), scene, &goal, &MonotonicClock, None, &mut |_| Flow::Continue).unwrap().answer
    };
    let alone = ask(&scene);
    assert!(alone.status != Status::Found && alone.eyes.is_empty(), "{alone:?}");

    let mut others = Others::new(ShareConfig::of("b", "map", &spec));
    for seen in &a.memory {
        let bytes = shared("a", &spec.bundle_sha256, seen.clone()).to_bytes().unwrap();
        others.take(SharedGroup::from_bytes(&bytes).unwrap()).unwrap();
    }
    others.join(&mut scene, odom_from_map.inverse());
    let together = ask(&scene);
    assert_eq!(together.status, Status::Found, "{:?}", together.reason);
    assert_eq!(together.eyes, ["a"]);
    let off = together.pose.unwrap().pose2().distance(odom_from_map.compose(plain_pose(stand)));
    assert!(off < 0.35, "{off} m off");
}

#[test]
fn shared_memories_are_checked_and_bounded() {
    let pipeline = FakeMind::new(Duration::ZERO);
    let mut others = Others::new(ShareConfig::of("b", "map", &pipeline.spec));
    let seen = |index: u64| {
        let mut seen = scene(1).memory[0].clone();
        seen.info.index = index;
        seen
    };
    others.take(shared("b", "fake", seen(0))).unwrap();
    assert!(others.robots().is_empty(), "its own memories are its own");
    for index in (0..200).chain([5]) {
        others.take(shared("a", "fake", seen(index))).unwrap();
    }
    assert_eq!(others.robots()["a"], 64, "an even spread of more");
    let mut check = |group: SharedGroup, want: &str| {
        let error = others.take(group).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    check(shared("c", "other", seen(0)), "of bundle other; this one has fake");
    check(SharedGroup { frame: "odom".into(), ..shared("c", "fake", seen(0)) }, "in frame \"odom\"");
    check(shared("c", "fake", ContextLatent { latent: vec![f32::NAN; 12], ..seen(0) }), "not finite");
    check(shared("c", "fake", ContextLatent { latent: vec![0.0; 13], ..seen(0) }), "13 values, expected 12");
    for robot in 0..6 {
        others.take(shared(&format!("r{robot}"), "fake", seen(0))).unwrap();
    }
    let error = others.take(shared("r9", "fake", seen(0))).unwrap_err().to_string();
    assert!(error.contains("one more than the 8"), "{error}");
    // A robot that began anew, at index 0 again, begins anew.
    others.take(SharedGroup { process: 2, ..shared("a", "fake", seen(0)) }).unwrap();
    assert_eq!(others.robots()["a"], 1);
    // A group without a pose, and one cut short, are none.
    let mut lost = seen(0);
    lost.info.odom_from_base = None;
    assert!(shared("a", "fake", lost).to_bytes().is_none());
    let bytes = shared("a", "fake", seen(0)).to_bytes().unwrap();
    for end in [0, 11, 20, bytes.len() - 1] {
        assert!(SharedGroup::from_bytes(&bytes[..end]).is_err(), "{end}");
    }
}

/// Two nodes: the second one, which comes later, is told what the first has seen.
#[test]
#[ignore = "real time over a router: ten seconds of two cores"]
fn nodes_share_what_they_see() {
    let (_router, port) = router();
    let start = |robot: &str, session: &RosSession| {
        let mut config = config();
        (config.robot, config.context.share) = (robot.into(), "odom".into());
        let (mind, encoder) = (Box::new(FakeMind::new(Duration::ZERO)), Box::new(FakeEncoder));
        Node::start(session, NodeParts { config, mind, encoder, record: None, observer: None }).unwrap()
    };
    let (first, second) = (client("a", port), client("b", port));
    let a = start("a", &first);
    let camera = client("camera", port);
    let _robot = FakeRobot::start(&camera, 40.0);
    wait_for_latents(&a, 4);
    let b = start("b", &second);
    let began = Instant::now();
    loop {
        let memory = b.context().scene().map(|scene| scene.memory).unwrap_or_default();
        let of_a: Vec<u64> =
            memory.iter().filter(|c| c.by.as_deref() == Some("a")).map(|c| c.info.index & 0xffff).collect();
        // What was seen before b came, and what is seen now; its own come last.
        if of_a.first() == Some(&0) && of_a.len() >= 6 && memory.last().is_some_and(|c| c.by.is_none()) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{of_a:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
