//! `cargo bench -p mindseye-tests --bench served`: what having goals imagined by a server costs, over TCP on the loopback.
//!
//! * Added time: the same goal, answered at home and by a server in turns. With the shipped model, and with its network's
//!   outputs played back at no cost, so that nothing but the way is left.
//! * Goodput: 1 to 32 robots at one server whose network takes a fixed time and no processor (as a GPU would): goals a second,
//!   the slowest of a hundred, and how far that is from what the network allows. Goals are evaluated one by one: batches are
//!   of 1.
//! * What batches could bring: an evaluation over twice as many frames, which has the tokens of two goals, against two.

use mindseye::context::GroupEncoder;
use mindseye::ground::{Mind, Scene, ground};
use mindseye::imagine::{Budget, ContextLatents, Flow, ImagineError, NoClock, Prompt, pick};
use mindseye::interpose::{Interpose, Interposed};
use mindseye::mind::Pipeline;
use mindseye::node::MonotonicClock;
use mindseye::served::server::Limits;
use mindseye::served::{Inputs, Link, Serving, ServingConfig, served_mind};
use mindseye::visit::{SWEEP, Visit};
use mindseye_base::stats::median;
use mindseye_bridge::goal::Goal;
use mindseye_bridge::ros::{RosConfig, RosSession};
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::sampler::Step;
use mindseye_world::{Camera, Difficulty, House, Rng};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Goals of each kind in turns.
const PAIRS: usize = 6;
const PAIRS_FREE: usize = 20;
const ERRANDS: usize = 100;
/// Time of one evaluation of the server's network, and goals of each robot.
const EVALUATION: Duration = Duration::from_micros(100);
const GOALS: usize = 10;

/// A network's outputs, by order; asked for more than there are, it begins anew.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<Denoised>>>);

/// Records a tape, or plays one, at a fixed cost.
struct Player {
    tape: Tape,
    at: Option<usize>,
    cost: Duration,
}

impl Interpose for Player {
    fn denoise(&mut self, denoiser: &mut dyn Denoise, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        let Some(at) = self.at.as_mut() else {
            let said = denoiser.denoise(step)?;
            self.tape.0.lock().unwrap().push(said.clone());
            return Ok(said);
        };
        if !self.cost.is_zero() {
            std::thread::sleep(self.cost);
        }
        let tape = self.tape.0.lock().unwrap();
        *at += 1;
        Ok(tape[(*at - 1) % tape.len()].clone())
    }
}

fn playing(mind: Box<dyn Mind>, tape: &Tape, cost: Duration) -> Box<dyn Mind> {
    Box::new(Interposed::new(mind, Player { tape: tape.clone(), at: Some(0), cost }))
}

struct Hall {
    endpoint: String,
    session: RosSession,
}

impl Hall {
    fn new() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let endpoint = format!("tcp/127.0.0.1:{port}");
        let mut config = RosConfig::in_process("hall");
        config.zenoh.listen = Some(vec![endpoint.clone()]);
        Self { session: RosSession::open(&config).unwrap(), endpoint }
    }

    fn serve(&self, name: &str, mind: Box<dyn Mind>) -> Serving {
        let config = ServingConfig { name: name.into(), limits: Limits::default() };
        Serving::start(&self.session, &config, vec![mind]).unwrap()
    }

    fn robot(&self, name: &str) -> RosSession {
        let mut config = RosConfig::in_process(name);
        config.zenoh.connect = Some(vec![self.endpoint.clone()]);
        RosSession::open(&config).unwrap()
    }
}

fn millis(mind: &mut dyn Mind, scene: &Scene, goal: &Goal) -> f64 {
    let began = Instant::now();
    let done = ground(mind, scene, goal, &MonotonicClock, None, &mut |_| Flow::Continue).unwrap();
    assert!(done.answer.imagined, "{:?}", done.answer.reason);
    began.elapsed().as_secs_f64() * 1e3
}

/// In turns, so that what the machine does beside hits both; the difference of each pair.
fn compare(what: &str, home: &mut dyn Mind, served: &mut dyn Mind, scene: &Scene, goal: &Goal, pairs: usize) {
    let (mut at_home, mut at_server, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..=pairs {
        let (here, there) = (millis(home, scene, goal), millis(served, scene, goal));
        // The first one sends the latents.
        if pair > 0 {
            at_home.push(here);
            at_server.push(there);
            added.push(there - here);
        }
    }
    let (here, there) = (median(&mut at_home), median(&mut at_server));
    println!(
        "{what:<42} home {here:8.1} ms   served {there:8.1} ms   added p50 {:6.2} ms   ratio {:.3}",
        median(&mut added),
        there / here
    );
}

fn added(pipeline: &Pipeline, scene: &Scene, goal: &Goal) -> Tape {
    let hall = Hall::new();
    let bundle = &pipeline.spec().bundle_sha256;
    let mind = || pipeline.mind(0).unwrap();
    let tape = Tape::default();
    let mut recorder = Interposed::new(mind(), Player { tape: tape.clone(), at: None, cost: Duration::ZERO });
    millis(&mut recorder, scene, goal);
    let evaluations = tape.0.lock().unwrap().len();
    println!("one goal: {evaluations} evaluations");
    let robot = hall.robot("robot");
    let served =
        |name: &str| served_mind(mind(), Link::open(&robot, name, "robot", bundle).unwrap(), true, None);
    let _free = hall.serve("free", playing(mind(), &tape, Duration::ZERO));
    let mut home = playing(mind(), &tape, Duration::ZERO);
    errands(home.as_mut(), served("free").as_mut(), pipeline, scene, goal);
    compare(
        "network played back at no cost",
        home.as_mut(),
        served("free").as_mut(),
        scene,
        goal,
        PAIRS_FREE,
    );
    let _real = hall.serve("real", mind());
    compare("the shipped model", mind().as_mut(), served("real").as_mut(), scene, goal, PAIRS);
    tape
}

/// What each piece of a goal's work costs more by a server, the network being free: what the way costs, without the work at
/// both ends that a busy machine makes longer now and then.
fn errands(home: &mut dyn Mind, served: &mut dyn Mind, pipeline: &Pipeline, scene: &Scene, goal: &Goal) {
    let spec = pipeline.spec().clone();
    let settings = &spec.settings;
    let words = mindseye::node::goal_in_words(goal);
    let (text, null_text) = (home.encode_text(&words).unwrap(), home.encode_text("").unwrap());
    let prompt = Prompt { text: &text, null_text: &null_text, camera: None };
    let memory = ContextLatents {
        index: scene.memory.iter().map(|c| c.info.index).collect(),
        latents: scene.memory.iter().flat_map(|c| c.latent.iter().copied()).collect(),
        first: home.encode_still(&scene.newest).unwrap(),
    };
    let few = spec.context_max.min(memory.index.len());
    let seen = pick(&memory, &(0..few).collect::<Vec<_>>(), spec.latent_len);
    let x = vec![0.1; settings.target_latents * spec.latent_len];
    let step = Step { index: 0, sigma: 0.9, timestep: 900.0 };
    let budget = Budget { clock: &NoClock, until: None };
    let of = |seen| Inputs { seen, prompt, settings, budget };
    let mut choose = |mind: &mut dyn Mind| {
        mind.imaginer().choose_context(of(&memory), spec.context_max, &mut |_| Flow::Continue).map(drop)
    };
    let mut imagine =
        |mind: &mut dyn Mind| mind.imaginer().imagine(of(&seen), &mut |_| Flow::Continue).map(drop);
    let mut guided = |mind: &mut dyn Mind| mind.imaginer().guided(of(&seen), 0, (&x, step)).map(drop);
    type Errand<'a> = &'a mut dyn FnMut(&mut dyn Mind) -> Result<(), ImagineError>;
    let all: [(&str, usize, Errand<'_>); 3] = [
        ("choosing the context", 1, &mut choose),
        ("all rollouts", 1, &mut imagine),
        ("one guided step", settings.steps, &mut guided),
    ];
    let mut of_goal = 0.0;
    for (what, times, errand) in all {
        let mut took = |mind: &mut dyn Mind| {
            let began = Instant::now();
            errand(mind).unwrap();
            began.elapsed().as_secs_f64() * 1e3
        };
        let mut added: Vec<f64> = (0..=ERRANDS)
            .map(|_| {
                let here = took(&mut *home);
                took(&mut *served) - here
            })
            .collect();
        // The first one sends the latents.
        let added = median(&mut added[1..]);
        of_goal += times as f64 * added;
        println!("{what:<42} added p50 {added:6.2} ms, {times} of them in a goal");
    }
    println!("{:<42} added p50 {of_goal:6.2} ms", "a goal, by its pieces");
}

fn goodput(pipeline: &Pipeline, tape: &Tape, scene: &Scene) {
    let spec = pipeline.spec().clone();
    let mut mind = pipeline.mind(0).unwrap();
    let (text, null_text) = (mind.encode_text("red chair").unwrap(), mind.encode_text("").unwrap());
    let first = mind.encode_still(&scene.newest).unwrap();
    let take = scene.memory.len().min(spec.context_max);
    let memory = &scene.memory[..take];
    println!(
        "\n{GOALS} goals of each robot, {} steps, {} candidates, {EVALUATION:?} an evaluation",
        spec.settings.steps, spec.settings.candidates
    );
    let mut alone = 0.0;
    for robots in [1, 2, 4, 8, 16, 32] {
        let hall = Hall::new();
        let serving = hall.serve("hall", playing(pipeline.mind(0).unwrap(), tape, EVALUATION));
        let sessions: Vec<RosSession> = (0..robots.min(8)).map(|k| hall.robot(&format!("r{k}"))).collect();
        let mut threads = Vec::new();
        let began = Instant::now();
        for robot in 0..robots {
            let link = Link::open(
                &sessions[robot % sessions.len()],
                "hall",
                &format!("r{robot}"),
                &spec.bundle_sha256,
            );
            let mut mind = served_mind(pipeline.mind(0).unwrap(), link.unwrap(), true, None);
            // Each robot has seen something else.
            let seen = ContextLatents {
                index: memory.iter().map(|c| c.info.index).collect(),
                latents: memory
                    .iter()
                    .flat_map(|c| c.latent.iter().map(|v| v + 0.001 * robot as f32))
                    .collect(),
                first: first.clone(),
            };
            let (text, null_text, settings) = (text.clone(), null_text.clone(), spec.settings.clone());
            threads.push(std::thread::spawn(move || {
                let prompt = Prompt { text: &text, null_text: &null_text, camera: None };
                let budget = Budget { clock: &NoClock, until: None };
                let mut took = Vec::new();
                for _ in 0..GOALS {
                    let began = Instant::now();
                    let inputs = Inputs { seen: &seen, prompt, settings: &settings, budget };
                    let got = mind.imaginer().imagine(inputs, &mut |_| Flow::Continue);
                    assert_eq!(got.unwrap().rollouts.len(), settings.candidates);
                    took.push(began.elapsed().as_secs_f64() * 1e3);
                }
                took
            }));
        }
        let mut took: Vec<f64> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        let rate = (robots * GOALS) as f64 / began.elapsed().as_secs_f64();
        took.sort_by(f64::total_cmp);
        let p99 = took[(took.len() * 99 / 100).min(took.len() - 1)];
        if robots == 1 {
            alone = rate;
        }
        // The last answer is counted when it is told.
        let told = Instant::now();
        while (serving.counts().done as usize) < robots * GOALS && told.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let counts = serving.counts();
        assert_eq!(counts.done as usize, robots * GOALS, "{counts:?}");
        println!(
            "{robots:>3} robots   {rate:7.1} goals/s ({:.2} of one robot's)   p50 {:7.1} ms   p99 {p99:7.1} ms   batches of 1   busy {}",
            rate / alone,
            took[took.len() / 2],
            counts.busy
        );
    }
}

/// What evaluating two goals at once could bring on this machine.
fn batching(pipeline: &Pipeline) {
    let spec = pipeline.spec().clone();
    let mut mind = pipeline.mind(0).unwrap();
    let denoiser = mind.denoiser();
    let config = denoiser.config().clone();
    let frame = config.in_channels * config.latent_height * config.latent_width;
    let frames = spec.context_max + spec.settings.target_latents;
    let text = vec![0.1; config.text_len * config.text_dim];
    let mut evaluate = |frames: usize| {
        let t_index: Vec<f64> = (0..frames).map(|i| i as f64).collect();
        let step = DenoiseStep {
            latents: &vec![0.1; frames * frame],
            timesteps: &[0.0, 900.0],
            rows: &vec![1; frames],
            t_index: &t_index,
            text: &text,
            camera: None,
            guide: None,
        };
        let began = Instant::now();
        denoiser.denoise(&step).unwrap();
        began.elapsed().as_secs_f64() * 1e3
    };
    let (mut one, mut ratios) = (Vec::new(), Vec::new());
    for round in 0..=PAIRS_FREE {
        let (alone, together) = (evaluate(frames), evaluate(2 * frames));
        if round > 0 {
            one.push(alone);
            ratios.push(together / (2.0 * alone));
        }
    }
    println!(
        "an evaluation of {frames} frames {:.1} ms; of twice as many, over two evaluations: {:.3}",
        median(&mut one),
        median(&mut ratios)
    );
}

fn main() {
    // `cargo test --benches` passes --test: only show that it runs.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let pipeline = Pipeline::load(&bundle, "rten", 1).unwrap();
    let camera = Camera::new(pipeline.spec().camera.width, pipeline.spec().camera.height);
    let mut encoder: Box<dyn GroupEncoder + Send> = pipeline.encoder().unwrap();
    let house = House::generate(10, &Difficulty::plain());
    let visit = Visit::new(house, Rng::new(10), &camera, encoder.as_mut(), SWEEP).unwrap();
    let goal = Goal::text("bench", &format!("find the {}", visit.house.objects[0].name)).unwrap();
    let scene = visit.scene();
    batching(&pipeline);
    let tape = added(&pipeline, &scene, &goal);
    goodput(&pipeline, &tape, &scene);
}
