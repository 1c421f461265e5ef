//! Both sides without threads, sockets and clocks: tables of single cases, and a simulated fleet over a network that loses,
//! doubles and delays, with servers that die.

use super::ServedError;
use super::client::{self, Errand};
use super::server::{self, About, Heard, Limits, Server};
use super::wire::*;
use crate::imagine::tests::settings;
use crate::imagine::{Heads, Imagined, Rollout};
use mindseye_base::random::Rng;
use mindseye_bridge::time::TimeDelta;
use std::collections::{BTreeMap, HashSet};

const LEN: usize = 4;

fn ms(millis: i64) -> TimeDelta {
    TimeDelta::from_millis(millis)
}

fn about(server: &str) -> About {
    About { server: server.into(), bundle: "b1".into(), engine: "e".into(), latent_len: LEN }
}

fn latent(robot: u64, index: u64) -> Vec<f32> {
    vec![robot as f32, index as f32, 0.5, -1.0]
}

fn seen(robot: u64, index: u64) -> Seen {
    Seen { index, segment: 0, values: latent(robot, index) }
}

fn latents(robot: u64, indices: impl IntoIterator<Item = u64>) -> Latents {
    let seen = indices.into_iter().map(|i| seen(robot, i)).collect();
    Latents { robot: format!("r{robot}"), session: robot, bundle: "b1".into(), seen }
}

fn job(robot: u64, number: u64, indices: &[u64]) -> Job {
    let network = Network {
        kind: Kind::Imagine,
        settings: settings(),
        index: indices.to_vec(),
        hashes: indices.iter().map(|i| hash_of(&latent(robot, *i))).collect(),
        first: latent(robot, 1000 + number),
        text: vec![1.0],
        null_text: vec![],
        camera: None,
        x: vec![],
    };
    Job {
        robot: format!("r{robot}"),
        session: robot,
        number,
        bundle: "b1".into(),
        left: Some(ms(2000)),
        work: Work::Network(Box::new(network)),
    }
}

/// What a mind in these tests finds: something that depends on all that it was given.
fn result_of(task: &server::Task) -> Word {
    let Work::Network(network) = &task.work else { return Word::Text(vec![]) };
    let sum = task.latents.iter().flat_map(|l| l.iter()).chain(&network.first).sum();
    Word::Guided(vec![sum, task.number as f32], Heads::default())
}

fn wanted(robot: u64, number: u64, indices: &[u64]) -> Word {
    let sum = indices.iter().flat_map(|i| latent(robot, *i)).chain(latent(robot, 1000 + number)).sum();
    Word::Guided(vec![sum, number as f32], Heads::default())
}

/// The last word that was told to someone, of what a step does.
fn told<A: PartialEq + Clone>(todo: &[server::Do<A>], to: &A) -> Option<Word> {
    todo.iter().rev().find_map(|todo| match todo {
        server::Do::Tell(asker, bytes) if asker == to => Some(Told::from_bytes(bytes).unwrap().word),
        _ => None,
    })
}

fn begun<A>(todo: &[server::Do<A>]) -> Vec<(u64, u64)> {
    let task = |todo: &server::Do<A>| match todo {
        server::Do::Begin(task) => Some((task.session, task.number)),
        _ => None,
    };
    todo.iter().filter_map(task).collect()
}

#[test]
fn messages_come_back_as_they_were() {
    let heads = Heads {
        context: 2,
        pose: vec![[1.0, 2.0, 0.5, -0.25]; 3],
        mask: vec![0.1; 6],
        locate: vec![[1.0, 2.0]; 6],
    };
    let imagined = Imagined {
        glances: vec![heads.clone(), Heads::default()],
        rollouts: vec![Rollout {
            latents: vec![f32::MIN_POSITIVE, -0.0, 1e30],
            heads: heads.clone(),
            steps: 7,
        }],
        steps: 8,
        reduced: Some("7 of 8".into()),
        evaluations: 30,
        step_times: vec![TimeDelta(1), TimeDelta(i64::MAX)],
    };
    let words = [
        Word::Working { ahead: 3 },
        Word::Glanced(heads.clone()),
        Word::Scanned(1, 2),
        Word::Stepped { candidate: 1, candidates: 2, step: 3, steps: 4, estimate: vec![0.1, 0.2] },
        Word::Text(vec![0.3]),
        Word::Chosen(vec![1, 5]),
        Word::Glances(vec![heads.clone()]),
        Word::Imagined(Box::new(imagined)),
        Word::Guided(vec![1.0], heads),
        Word::Missing(vec![u64::MAX]),
        Word::Busy { waiting: 64 },
        Word::Refused("no".into()),
        Word::Failed("\"quoted\"\n".into()),
        Word::Late,
        Word::Cancelled,
    ];
    for (sequence, word) in words.into_iter().enumerate() {
        let told = Told { number: u64::MAX, sequence: sequence as u64, word };
        assert_eq!(Told::from_bytes(&told.to_bytes()).unwrap(), told);
    }
    let mut asked = job(1, 2, &[3, 9]);
    assert_eq!(Job::from_bytes(&asked.to_bytes()).unwrap(), asked);
    asked.work = Work::Text("the red chair".into());
    assert_eq!(Job::from_bytes(&asked.to_bytes()).unwrap(), asked);
    let sent = latents(1, [1, 2, 7]);
    assert_eq!(Latents::from_bytes(&sent.to_bytes()).unwrap(), sent);
}

#[test]
fn what_is_no_message_is_refused() {
    let good = job(1, 2, &[3, 9]).to_bytes();
    let check = |name: &str, change: &dyn Fn(&mut Vec<u8>), want: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let error = Job::from_bytes(&bytes).expect_err(name).to_string();
        assert!(error.contains(want), "{name}: {error}");
    };
    check("nothing", &|b| b.clear(), "none of mindseye's");
    check("another's", &|b| b[0] = b'x', "none of mindseye's");
    check("a later version", &|b| b[4] = 9, "version 9; wanted 1");
    check("a header past the end", &|b| b[8..12].copy_from_slice(&100_000u32.to_le_bytes()), "header");
    check("a huge header", &|b| b[8..12].copy_from_slice(&u32::MAX.to_le_bytes()), "at most 1048576");
    check("a number too few", &|b| b.truncate(b.len() - 4), "there is room for");
    check("a byte too many", &|b| b.push(0), "bytes after the message");
    let changed = |change: &dyn Fn(&mut Job)| {
        let mut job = job(1, 2, &[3, 9]);
        change(&mut job);
        Job::from_bytes(&job.to_bytes()).expect_err("refused").to_string()
    };
    let network = |change: &dyn Fn(&mut Network)| {
        changed(&|job: &mut Job| {
            if let Work::Network(network) = &mut job.work {
                change(network);
            }
        })
    };
    assert!(changed(&|job| job.robot = "a/b".into()).contains("robot is \"a/b\""));
    assert!(changed(&|job| job.work = Work::Text("x".repeat(10_000))).contains("text is 10000"));
    assert!(network(&|n| n.settings.candidates = 1 << 40).contains("settings.candidates"));
    assert!(network(&|n| n.settings.steps = 0).contains("settings.steps"));
    assert!(network(&|n| n.hashes.truncate(1)).contains("hashes is 1"));
    // Sizes that overflow when they are multiplied.
    let header = format!(r#"{{"robot":"r","session":1,"bundle":"b","seen":[[0,0]],"len":{}}}"#, usize::MAX);
    let mut huge = b"mind".to_vec();
    huge.extend(VERSION.to_le_bytes());
    huge.extend((header.len() as u32).to_le_bytes());
    huge.extend(header.as_bytes());
    assert!(matches!(Latents::from_bytes(&huge), Err(WireError::Size { .. })));
}

#[test]
fn a_server_answers_every_question_once_whatever_it_is() {
    let mut server = Server::new(about("s"), Limits { waiting: 2, waiting_of_robot: 2, ..Limits::default() });
    let mut ask = |to: u32, job: Job| server.step(Heard::Asked(to, Box::new(job)), ms(0));
    let refused = |word: Option<Word>, want: &str| match word {
        Some(Word::Refused(reason)) => assert!(reason.contains(want), "{reason}"),
        other => panic!("{want}: {other:?}"),
    };
    refused(told(&ask(1, Job { bundle: "b2".into(), ..job(1, 1, &[]) }), &1), "bundle b1, the robot's is b2");
    let mut wrong = job(1, 2, &[]);
    if let Work::Network(network) = &mut wrong.work {
        network.first.push(0.0);
    }
    refused(told(&ask(2, wrong), &2), "first latent has 5 values, expected 4");
    assert_eq!(told(&ask(3, job(1, 3, &[4, 5])), &3), Some(Word::Missing(vec![4, 5])));
    // In work, two that wait, and then it is full, for one robot and for all.
    assert_eq!(begun(&ask(4, job(1, 4, &[]))), [(1, 4)]);
    assert!(ask(5, job(1, 5, &[])).is_empty());
    assert_eq!(told(&ask(6, job(1, 6, &[])), &6), Some(Word::Busy { waiting: 2 }));
    assert!(ask(7, job(2, 7, &[])).is_empty());
    assert_eq!(told(&ask(8, job(3, 8, &[])), &8), Some(Word::Busy { waiting: 3 }));
    // Asked again, the first is told to whoever asked last, and only once done.
    assert_eq!(told(&ask(9, job(1, 4, &[])), &9), Some(Word::Working { ahead: 0 }));
    let result = Word::Text(vec![]);
    let todo = server.step(Heard::Said(1, 4, result.clone()), ms(1));
    assert_eq!((told(&todo, &4), told(&todo, &9)), (None, Some(result.clone())));
    assert_eq!(begun(&todo), [(2, 7)], "the other robot's turn comes first");
    assert_eq!(told(&server.step(Heard::Asked(10, Box::new(job(1, 4, &[]))), ms(2)), &10), Some(result));
    // Nobody waits in silence, and nothing waits for ever.
    let todo = server.step(Heard::Tick, ms(300));
    assert_eq!(told(&todo, &7), Some(Word::Working { ahead: 0 }));
    assert_eq!(told(&server.step(Heard::Tick, ms(2001)), &5), Some(Word::Late));
    // Cancelled in work: told at once, and the mind is stopped. Cancelled before it came: not begun.
    let todo = server.step(Heard::Cancelled(Cancel { session: 2, number: 7 }), ms(2002));
    assert_eq!(told(&todo, &7), Some(Word::Cancelled));
    assert!(todo.iter().any(|todo| matches!(todo, server::Do::Halt(2, 7))));
    server.step(Heard::Cancelled(Cancel { session: 3, number: 9 }), ms(2003));
    let todo = server.step(Heard::Asked(11, Box::new(job(3, 9, &[]))), ms(2004));
    assert_eq!(told(&todo, &11), Some(Word::Cancelled));
    assert!(begun(&server.step(Heard::Said(2, 7, Word::Cancelled), ms(2005))).is_empty());
}

#[test]
fn memory_is_bounded_and_what_left_is_asked_for_again() {
    // Room for four latents.
    let limits = Limits { memory: 4 * 4 * LEN, ..Limits::default() };
    let mut server: Server<u32> = Server::new(about("s"), limits);
    server.step(Heard::Latents(latents(1, 0..3)), ms(0));
    server.step(Heard::Latents(latents(1, [2])), ms(0));
    assert_eq!((server.counts().latents, server.counts().evicted), (3, 0), "twice is once");
    server.step(Heard::Latents(latents(2, [0, 1])), ms(0));
    // The robot that held most lost the one that was unused for longest.
    let ask = |server: &mut Server<u32>, robot: u64, indices: &[u64]| {
        let todo = server.step(Heard::Asked(1, Box::new(job(robot, 50 + indices[0], indices))), ms(1));
        (told(&todo, &1), begun(&todo).len())
    };
    assert_eq!(ask(&mut server, 1, &[0, 1, 2]), (Some(Word::Missing(vec![0])), 0));
    server.step(Heard::Latents(latents(1, [0])), ms(2));
    assert_eq!(server.counts().latents, 4);
    assert!(
        matches!(ask(&mut server, 1, &[0, 1, 2, 3, 4]), (Some(Word::Refused(r)), 0) if r.contains("--memory-mb"))
    );
    // What no network should look at is not taken: another codec, another size, numbers that are none.
    let mut empty: Server<u32> = Server::new(about("s"), Limits::default());
    empty.step(Heard::Latents(Latents { bundle: "b2".into(), ..latents(1, [0]) }), ms(0));
    for values in [vec![0.0; LEN + 1], vec![f32::NAN; LEN]] {
        let seen = vec![Seen { index: 0, segment: 0, values }];
        empty.step(Heard::Latents(Latents { seen, ..latents(1, []) }), ms(0));
    }
    assert_eq!(empty.counts().latents, 0);
    // Of two segments the older one leaves first, though it was used last.
    let mut two: Server<u32> = Server::new(about("s"), limits);
    let of = |segment, index| Seen { segment, ..seen(1, index) };
    two.step(
        Heard::Latents(Latents { seen: vec![of(1, 2), of(1, 3), of(0, 0), of(0, 1)], ..latents(1, []) }),
        ms(0),
    );
    two.step(Heard::Latents(Latents { seen: vec![of(1, 4)], ..latents(1, []) }), ms(0));
    assert_eq!(ask(&mut two, 1, &[0, 1, 2, 3, 4]).0.map(|w| w.is_end()), Some(true));
    assert_eq!(ask(&mut two, 1, &[2, 3, 4]), (None, 1));
}

/// Who is asked, of what an errand's step does.
fn asked(todo: &[client::Do]) -> Option<(&str, u32)> {
    todo.iter().find_map(|todo| match todo {
        client::Do::Ask { server, attempt, .. } => Some((server.as_str(), *attempt)),
        _ => None,
    })
}

fn ended(todo: Vec<client::Do>) -> Option<Result<Word, ServedError>> {
    todo.into_iter().find_map(|todo| match todo {
        client::Do::End(result) => Some(result),
        _ => None,
    })
}

fn offer(server: &str, bundle: &str, waiting: usize) -> client::Heard {
    let (server, bundle, engine) = (server.into(), bundle.into(), "e".into());
    client::Heard::Offer(Offer { server, bundle, engine, waiting, waiting_max: 4 })
}

fn says(attempt: u32, number: u64, word: Word) -> client::Heard {
    client::Heard::Told(attempt, Box::new(Told { number, sequence: 1, word }))
}

fn errand(server: Option<&str>, until: Option<i64>) -> (Errand, Vec<client::Do>) {
    let until = until.map(ms);
    Errand::new(("hall", 7), ("b1", 1), server.map(String::from), ms(500), until, ms(0))
}

#[test]
fn the_server_with_the_least_to_do_is_asked_and_others_when_it_is_busy() {
    let (mut errand, todo) = errand(None, Some(10_000));
    assert!(matches!(todo[..], [client::Do::Look]));
    for heard in [offer("a", "b1", 3), offer("b", "b1", 1), offer("c", "b2", 0)] {
        assert!(asked(&errand.step(heard, ms(1))).is_none());
    }
    assert_eq!(asked(&errand.step(client::Heard::Offered, ms(2))), Some(("b", 1)), "c has another bundle");
    let todo = errand.step(says(1, 7, Word::Busy { waiting: 9 }), ms(3));
    assert!(matches!(todo[..], [client::Do::Look]));
    errand.step(offer("a", "b1", 3), ms(4));
    errand.step(offer("b", "b1", 1), ms(4));
    assert_eq!(asked(&errand.step(client::Heard::Offered, ms(5))), Some(("a", 2)));
    // What the first attempt says of progress is old, and what is said of other work is not ours.
    assert!(errand.step(says(1, 7, Word::Scanned(1, 2)), ms(6)).is_empty());
    assert!(errand.step(says(2, 8, Word::Text(vec![])), ms(6)).is_empty());
    let todo = errand.step(says(2, 7, Word::Missing(vec![4])), ms(7));
    assert!(
        matches!(&todo[..], [client::Do::SendLatents(i), client::Do::Ask { attempt: 3, .. }] if *i == [4])
    );
    let result = ended(errand.step(says(3, 7, Word::Text(vec![1.0])), ms(8))).unwrap().unwrap();
    assert_eq!(result, Word::Text(vec![1.0]));
    // Told once more, it is not ended twice.
    assert!(errand.step(says(3, 7, Word::Text(vec![1.0])), ms(9)).is_empty());
}

#[test]
fn an_errand_ends_in_time_and_says_why() {
    let end_of = |mut errand: Errand, mut heard: Vec<(i64, client::Heard)>| {
        for now in (0..30_000).step_by(10) {
            while heard.first().is_some_and(|(at, _)| *at <= now) {
                let (_, next) = heard.remove(0);
                if let Some(end) = ended(errand.step(next, ms(now))) {
                    return (now, end.unwrap_err().to_string());
                }
            }
            let todo = errand.step(client::Heard::Tick, ms(now));
            if todo.iter().any(|t| matches!(t, client::Do::Look)) {
                heard.insert(0, (now + 10, client::Heard::Offered));
            }
            if let Some(end) = ended(todo) {
                return (now, end.unwrap_err().to_string());
            }
        }
        panic!("it does not end");
    };
    let check = |name: &str,
                 server: Option<&str>,
                 until: Option<i64>,
                 heard: Vec<(i64, client::Heard)>,
                 by: i64,
                 want: &str| {
        let (at, error) = end_of(errand(server, until).0, heard);
        assert!(at <= by && error.contains(want), "{name}: {error} after {at} ms");
    };
    check("nobody", None, Some(10_000), vec![], 1200, "no server \"hall\" was found");
    check("nobody, and no time", None, Some(100), vec![], 100, "no server");
    check("a silent server", Some("a"), Some(1500), vec![], 1500, "no server");
    check("no deadline", Some("a"), None, vec![], 20_000, "no server");
    let slow = vec![(10, says(1, 7, Word::Working { ahead: 2 }))];
    check("a slow server", Some("a"), Some(800), slow, 800, "no result within 0.8 s");
    let busy = vec![(10, says(1, 7, Word::Busy { waiting: 9 }))];
    check("a busy server", Some("a"), Some(300), busy, 300, "every server was busy");
    let other = vec![(10, offer("c", "b2", 0)), (11, client::Heard::Offered)];
    check("another bundle", None, Some(9000), other, 300, "it runs bundle b2, this robot's is b1");
    let refused = vec![(10, says(1, 7, Word::Refused("no".into())))];
    check("a refusal", Some("a"), Some(9000), refused, 300, "refused: no");
    let failed = vec![(10, says(1, 7, Word::Failed("out of memory".into())))];
    check("a failure", Some("a"), Some(9000), failed, 20, "failed: out of memory");
    let gone = vec![(10, client::Heard::Gone("a".into()))];
    check("a server that is gone", Some("a"), Some(700), gone, 710, "no server");
    let (mut errand, _) = errand(Some("a"), None);
    let todo = errand.step(client::Heard::Stop, ms(5));
    assert!(matches!(&todo[..], [client::Do::Cancel(server)] if server == "a"));
    assert!(errand.step(says(1, 7, Word::Text(vec![])), ms(6)).is_empty());
}

/// A network and what is on it: events at times.
struct Net {
    rng: Rng,
    loss: f64,
    twice: f64,
    late_ms: u64,
    order: u64,
    events: BTreeMap<(i64, u64), Ev>,
}

#[derive(Clone)]
enum Ev {
    /// To a server that may be gone by then: its name, and what.
    Server(String, Heard<(usize, u32)>),
    /// To a robot, for its errand of this number.
    Robot(usize, u64, client::Heard),
    /// A robot asks for offers.
    Look(usize, u64),
    Crash(usize),
    Start(usize),
}

impl Net {
    fn at(&mut self, now: i64, after: i64, ev: Ev) {
        self.order += 1;
        self.events.insert((now + after, self.order), ev);
    }

    /// Over the network: perhaps not, perhaps twice, some time later.
    fn send(&mut self, now: i64, ev: &Ev) {
        let copies =
            if self.rng.unit() < self.loss { 0 } else { 1 + usize::from(self.rng.unit() < self.twice) };
        for _ in 0..copies {
            let after = 1 + (self.rng.unit() * self.late_ms as f64) as i64;
            self.at(now, after, ev.clone());
        }
    }
}

/// A robot that has one piece of work done after the other.
struct Robot {
    number: u64,
    errand: Option<Errand>,
    until: i64,
    indices: Vec<u64>,
    server: Option<String>,
    ended: usize,
    good: usize,
}

/// A server that runs, by its name.
type Running = Option<(String, Server<(usize, u32)>)>;

/// Plays a fleet for half a minute; gives errands that ended, and those with a result. Longer than others: one loop over all
/// kinds of events, which share the fleet, the servers and the network.
fn play(seed: u64, robots: usize, servers: usize, loss: f64, crashes: &[(i64, usize)]) -> (usize, usize) {
    let mut net =
        Net { rng: Rng::new(seed), loss, twice: loss, late_ms: 60, order: 0, events: BTreeMap::new() };
    let limits = Limits { memory: 16 * LEN * 40, waiting: 8, ..Limits::default() };
    let mut running: Vec<Running> = (0..servers).map(|_| None).collect();
    let mut generation = 0;
    let mut fleet: Vec<Robot> = (0..robots)
        .map(|_| Robot {
            number: 0,
            errand: None,
            until: 0,
            indices: vec![],
            server: None,
            ended: 0,
            good: 0,
        })
        .collect();
    (0..servers).for_each(|s| net.at(0, 1, Ev::Start(s)));
    for (at, server) in crashes {
        net.at(*at, 0, Ev::Crash(*server));
        net.at(*at, 300, Ev::Start(*server));
    }
    let mut done: HashSet<(String, u64, u64)> = HashSet::new();
    for now in 0..30_000 {
        let mut events = Vec::new();
        while let Some(first) = net.events.first_entry().filter(|first| first.key().0 <= now) {
            events.push(first.remove());
        }
        if now % 10 == 0 {
            for (r, robot) in fleet.iter().enumerate() {
                events.push(Ev::Robot(r, robot.number, client::Heard::Tick));
            }
            let names: Vec<String> = running.iter().flatten().map(|(name, _)| name.clone()).collect();
            events.extend(names.into_iter().map(|name| Ev::Server(name, Heard::Tick)));
        }
        for ev in events {
            match ev {
                Ev::Start(s) => {
                    generation += 1;
                    let name = format!("s{s}-{generation}");
                    running[s] = Some((name.clone(), Server::new(about(&name), limits)));
                }
                Ev::Crash(s) => {
                    let Some((name, _)) = running[s].take() else { continue };
                    for (r, robot) in fleet.iter().enumerate() {
                        let gone = Ev::Robot(r, robot.number, client::Heard::Gone(name.clone()));
                        net.send(now, &gone);
                    }
                }
                Ev::Look(r, number) => {
                    let offers: Vec<Offer> =
                        running.iter().flatten().map(|(_, server)| server.offer()).collect();
                    for offer in offers {
                        net.send(now, &Ev::Robot(r, number, client::Heard::Offer(offer)));
                    }
                    net.at(now, 130, Ev::Robot(r, number, client::Heard::Offered));
                }
                Ev::Server(name, heard) => {
                    let Some((_, server)) = running.iter_mut().flatten().find(|(n, _)| *n == name) else {
                        continue;
                    };
                    for todo in server.step(heard, ms(now)) {
                        match todo {
                            server::Do::Tell((r, attempt), bytes) => {
                                let told = Told::from_bytes(&bytes).unwrap();
                                let (number, ends) = (told.number, told.word.is_end());
                                let told = client::Heard::Told(attempt, Box::new(told));
                                net.send(now, &Ev::Robot(r, number, told));
                                if ends {
                                    net.at(now, 70, Ev::Robot(r, number, client::Heard::Over(attempt)));
                                }
                            }
                            server::Do::Begin(task) => {
                                let key = (name.clone(), task.session, task.number);
                                assert!(done.insert(key), "seed {seed}: the same work twice by one server");
                                let step = Word::Scanned(1, 2);
                                let (session, number, word) = (task.session, task.number, result_of(&task));
                                net.at(now, 15, Ev::Server(name.clone(), Heard::Said(session, number, step)));
                                net.at(now, 30, Ev::Server(name.clone(), Heard::Said(session, number, word)));
                            }
                            server::Do::Halt(..) => {}
                        }
                    }
                }
                Ev::Robot(r, number, heard) => {
                    let robot = &mut fleet[r];
                    let (session, mut todo) = (r as u64 + 1, Vec::new());
                    if robot.errand.is_none() && now < 27_000 {
                        robot.number += 1;
                        robot.indices = (0..3).map(|k| 2 * robot.number + k).collect();
                        robot.until = now + 2000;
                        let of = (("hall", robot.number), ("b1", session));
                        let (errand, first) = Errand::new(
                            of.0,
                            of.1,
                            robot.server.clone(),
                            ms(800),
                            Some(ms(robot.until)),
                            ms(now),
                        );
                        (robot.errand, todo) = (Some(errand), first);
                    }
                    if let Some(errand) = robot.errand.as_mut().filter(|_| number == robot.number) {
                        todo.extend(errand.step(heard, ms(now)));
                    }
                    for todo in todo {
                        match todo {
                            client::Do::Look => net.at(now, 1, Ev::Look(r, robot.number)),
                            client::Do::Ask { server, attempt, left } => {
                                let job = Job { left, ..job(session, robot.number, &robot.indices) };
                                net.send(now, &Ev::Server(server, Heard::Asked((r, attempt), Box::new(job))));
                            }
                            client::Do::SendLatents(indices) => {
                                for (name, _) in running.iter().flatten() {
                                    let heard = Heard::Latents(latents(session, indices.clone()));
                                    net.send(now, &Ev::Server(name.clone(), heard));
                                }
                            }
                            client::Do::Cancel(server) => {
                                let cancel = Cancel { session, number: robot.number };
                                net.send(now, &Ev::Server(server, Heard::Cancelled(cancel)));
                            }
                            client::Do::Give(_) => {}
                            client::Do::End(result) => {
                                assert!(now <= robot.until + 10, "seed {seed}: robot {r} at {now}");
                                let asked = robot.errand.take().expect("ends once").asked().map(String::from);
                                robot.server = asked.filter(|_| result.is_ok());
                                robot.ended += 1;
                                if let Ok(word) = result {
                                    assert_eq!(
                                        word,
                                        wanted(session, robot.number, &robot.indices),
                                        "seed {seed}"
                                    );
                                    robot.good += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(fleet.iter().all(|robot| robot.errand.is_none()), "seed {seed}: something never ended");
    assert!(fleet.iter().all(|robot| robot.ended as u64 == robot.number), "seed {seed}: each ends once");
    (fleet.iter().map(|r| r.ended).sum(), fleet.iter().map(|r| r.good).sum())
}

#[test]
fn a_fleet_on_a_good_network_gets_all_it_asks_for() {
    for (robots, servers) in [(1, 1), (3, 1), (8, 2)] {
        let (ended, good) = play(1, robots, servers, 0.0, &[]);
        assert!(ended >= 60, "{robots} robots: {ended}");
        assert_eq!(ended, good, "{robots} robots");
    }
}

#[test]
fn lost_doubled_and_late_messages_and_dying_servers_cost_time_and_nothing_else() {
    for seed in 0..6 {
        let crashes = [(3000 + 700 * seed as i64, 0), (12_000, 1), (12_100, 0), (20_000, 1)];
        let (ended, good) = play(seed, 4, 2, 0.15, &crashes);
        assert!(ended > 100 && good * 10 >= ended * 7, "seed {seed}: {good} of {ended}");
    }
}
