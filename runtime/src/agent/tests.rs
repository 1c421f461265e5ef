//! Stories: what happens, and what the agent does about it.

use super::*;
use mindseye_bridge::answer::FramedPose2;
use mindseye_bridge::ros::{CancelOutcome, GoalState, NavResult};
use proptest::prelude::*;
use std::collections::HashMap;

const fn ms(millis: i64) -> TimeDelta {
    TimeDelta::from_millis(millis)
}

fn agent() -> Agent {
    driven(false)
}

/// With nav2: 3 s to accept, 60 s at most, 10 s of silence.
fn driven(drives: bool) -> Agent {
    Agent::new(AgentConfig {
        drives: drives.then(|| DriveLimits {
            action: "/navigate_to_pose".into(),
            accept: ms(3000),
            longest: ms(60_000),
            contact: ms(10_000),
            within_m: 0.1,
            within_rad: 0.2,
        }),
        stamp: GoalStamp::Robot,
        tf_buffer: ms(10_000),
        deadline: ms(5000),
        max_frame_age: ms(500),
        reserve: ms(300),
        republish_after: ms(10_000),
    })
}

fn goal(ticket: u64, id: &str) -> Event {
    Event::Goal {
        ticket: Ticket(ticket),
        goal: Goal::text(id, "find the red chair").unwrap(),
        publish: true,
        wait: false,
    }
}

fn with_deadline(ticket: u64, millis: i64) -> Event {
    let mut goal = Goal::text(format!("g{ticket}"), "find the red chair").unwrap();
    goal.deadline = Some(ms(millis));
    Event::Goal { ticket: Ticket(ticket), goal, publish: true, wait: false }
}

fn found(x: f64) -> Box<Answer> {
    let mut answer = Answer::new("g", Status::Found, None);
    answer.imagined = true;
    answer.pose = Some(FramedPose2::new("odom", Pose2::new(x, 0.0, 0.0)));
    Box::new(answer)
}

fn frame() -> Event {
    Event::Frame { captured_at: Timestamp(5) }
}

/// Actions in words: "begin 1", "halt 1", "found 1", "publish", "send 1", "ask 1", "cancel 1". The reply that comes with
/// every answer is left out; one that was waited for is "reply 1 arrived", with the drive's state.
fn words(actions: &[Action]) -> Vec<String> {
    let mut answered = None;
    let mut words = Vec::new();
    for action in actions {
        let word = match action {
            Action::Begin { ticket, .. } => format!("begin {}", ticket.0),
            Action::Halt { ticket } => format!("halt {}", ticket.0),
            Action::Answer { ticket, answer } => {
                answered = Some(*ticket);
                format!("{} {}", answer.status, ticket.0)
            }
            Action::Reply { ticket, .. } if answered == Some(*ticket) => continue,
            Action::Reply { ticket, drive, .. } => match drive {
                Some(drive) => format!("reply {} {}", ticket.0, state(drive)),
                None => format!("reply {}", ticket.0),
            },
            Action::PublishGoal { .. } => "publish".into(),
            Action::Leave { ticket } => format!("leave {}", ticket.0),
            Action::StartDrive { ticket, .. } => format!("send {}", ticket.0),
            Action::Drive { ticket, command: DriveCommand::AskResult } => format!("ask {}", ticket.0),
            Action::Drive { ticket, command: DriveCommand::Cancel } => format!("cancel {}", ticket.0),
            Action::DriveChanged { drive } => state(drive),
            Action::AskAgain { goal } => format!("again {}", goal.id),
            // Comes with every arrival.
            Action::LookAgain { .. } => continue,
        };
        words.push(word);
    }
    words
}

fn state(drive: &Drive) -> String {
    serde_json::to_value(drive.state).unwrap().as_str().unwrap().to_owned()
}

fn play(name: &str, script: Vec<(i64, Event, &[&str])>) -> Agent {
    play_on(agent(), name, script)
}

fn play_on(mut agent: Agent, name: &str, script: Vec<(i64, Event, &[&str])>) -> Agent {
    for (i, (at, event, want)) in script.into_iter().enumerate() {
        let shown = format!("{event:?}");
        let got = words(&agent.step(event, ms(at)));
        assert_eq!(got, want, "{name}, step {i} at {at} ms: {shown}");
    }
    agent
}

#[test]
fn stories() {
    let ready = || Event::ContextReady { latents: 3 };
    let done = |ticket, x| Event::Done { ticket: Ticket(ticket), answer: found(x) };
    let cancel = |id: &str| Event::Cancel { id: id.into() };
    let fault = |reason: Option<&str>| Event::CameraFault { reason: reason.map(str::to_owned) };
    play(
        "a frozen camera",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, fault(Some("frozen")), &[]),
            (20, frame(), &[]),
            (20, goal(1, "a"), &["stale 1"]),
            (30, fault(None), &[]),
            (30, frame(), &[]),
            (40, goal(2, "b"), &["begin 2"]),
        ],
    );
    play(
        "a goal is met",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, goal(1, "a"), &["begin 1"]),
            (900, done(1, 1.0), &["publish", "found 1"]),
            (910, done(1, 1.0), &[]),
        ],
    );
    play("nothing was seen", vec![(0, goal(1, "a"), &["stale 1"])]);
    play("one frame only", vec![(0, frame(), &[]), (1, goal(1, "a"), &["failed 1"])]);
    play(
        "the camera stalls",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (501, goal(1, "a"), &["stale 1"]),
            (502, frame(), &[]),
            (503, goal(2, "a"), &["begin 2"]),
        ],
    );
    play(
        "a newer goal pre-empts",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, goal(1, "a"), &["begin 1"]),
            (20, goal(2, "a"), &["halt 1", "cancelled 1", "begin 2"]),
            (30, done(1, 1.0), &[]),
            (40, done(2, 2.0), &["publish", "found 2"]),
        ],
    );
    play(
        "cancelling",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, goal(1, "a"), &["begin 1"]),
            (20, cancel("b"), &[]),
            (30, cancel("a"), &["halt 1", "cancelled 1"]),
            (40, cancel("a"), &[]),
            (50, goal(2, "b"), &["begin 2"]),
            (60, cancel(""), &["halt 2", "cancelled 2"]),
        ],
    );
    play(
        "too late",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, with_deadline(1, 50), &["begin 1"]),
            (59, Event::Tick, &[]),
            (60, Event::Tick, &["halt 1", "late 1"]),
            (61, done(1, 1.0), &[]),
            (70, with_deadline(2, 50), &["begin 2"]),
            // Even without a tick: the answer came after the deadline.
            (125, done(2, 1.0), &["halt 2", "late 2"]),
        ],
    );
    play(
        "a broken goal leaves the one in work alone",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (10, goal(1, "a"), &["begin 1"]),
            (20, Event::BadGoal { ticket: Ticket(2), id: "b".into(), reason: "empty".into() }, &["failed 2"]),
            (30, done(1, 1.0), &["publish", "found 1"]),
        ],
    );
    play(
        "the same pose is not published twice in a row",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (1, goal(1, "a"), &["begin 1"]),
            (2, done(1, 1.0), &["publish", "found 1"]),
            (3, goal(2, "a"), &["begin 2"]),
            (4, done(2, 1.001), &["found 2"]),
            (5, goal(3, "a"), &["begin 3"]),
            (6, done(3, 1.1), &["publish", "found 3"]),
            (10_100, frame(), &[]),
            (10_101, goal(4, "a"), &["begin 4"]),
            (10_102, done(4, 1.1), &["publish", "found 4"]),
        ],
    );
    let ask = Event::Goal {
        ticket: Ticket(1),
        goal: Goal::text("a", "find the red chair").unwrap(),
        publish: false,
        wait: false,
    };
    play(
        "a question moves nobody",
        vec![(0, frame(), &[]), (0, ready(), &[]), (1, ask, &["begin 1"]), (2, done(1, 1.0), &["found 1"])],
    );
    play(
        "after the memory was lost",
        vec![
            (0, frame(), &[]),
            (0, ready(), &[]),
            (1, Event::ContextLost, &[]),
            (2, goal(1, "a"), &["failed 1"]),
        ],
    );
}

#[test]
fn late_answers_carry_the_best_so_far() {
    let mut agent = agent();
    agent.step(frame(), ms(0));
    agent.step(Event::ContextReady { latents: 3 }, ms(0));
    let began = agent.step(with_deadline(1, 100), ms(0));
    let [Action::Begin { until, .. }] = began.as_slice() else { panic!("{began:?}") };
    assert_eq!(*until, ms(80), "a fifth is kept back");
    assert_eq!(agent.next_tick(), Some(ms(100)));
    agent.step(Event::Draft { ticket: Ticket(1), answer: found(4.0) }, ms(50));
    let actions = agent.step(Event::Tick, ms(100));
    let Some(Action::Reply { answer, .. }) = actions.last() else { panic!("{actions:?}") };
    assert_eq!(answer.status, Status::Late);
    assert_eq!(answer.pose.as_ref().unwrap().x, 4.0);
    assert!(answer.reason.as_ref().unwrap().contains("not published"));
    assert_eq!(agent.next_tick(), None);
}

/// A goal whose client waits for the arrival.
fn wait_for(ticket: u64, id: &str) -> Event {
    Event::Goal {
        ticket: Ticket(ticket),
        goal: Goal::text(id, "find the red chair").unwrap(),
        publish: true,
        wait: true,
    }
}

fn heard(ticket: u64, news: DriveNews) -> Event {
    Event::Drive { ticket: Ticket(ticket), news }
}

fn feedback(ticket: u64) -> Event {
    heard(ticket, DriveNews::Feedback { distance_remaining_m: Some(1.25), recoveries: 0 })
}

fn status(ticket: u64, state: GoalState) -> Event {
    heard(ticket, DriveNews::Status(state))
}

fn result(ticket: u64, result: NavResult) -> Event {
    heard(ticket, DriveNews::Result(result))
}

fn no_result(ticket: u64) -> Event {
    heard(ticket, DriveNews::ResultUnanswered { reason: "the question ended".into() })
}

fn cancel_answer(ticket: u64, outcome: CancelOutcome) -> Event {
    heard(ticket, DriveNews::Cancel(outcome))
}

fn done(ticket: u64) -> Event {
    Event::Done { ticket: Ticket(ticket), answer: found(1.0) }
}

/// An agent that drives, with goal 1 found at 0 ms and sent; its client waits for the arrival. `script` goes on.
fn on_the_way(name: &str, script: Vec<(i64, Event, &[&str])>) -> Agent {
    let start: Vec<(i64, Event, &[&str])> = vec![
        (0, frame(), &[]),
        (0, Event::ContextReady { latents: 3 }, &[]),
        (0, wait_for(1, "a"), &["begin 1"]),
        (0, done(1), &["send 1", "found 1"]),
    ];
    play_on(driven(true), name, start.into_iter().chain(script).collect())
}

fn reason(agent: &Agent, at: i64) -> String {
    agent.drive(ms(at)).unwrap().reason.unwrap_or_default()
}

#[test]
fn drives_and_arrivals() {
    let accepted = || heard(1, DriveNews::Accepted);
    let cancel = |id: &str| Event::Cancel { id: id.into() };
    let agent = on_the_way(
        "the robot arrives",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (500, feedback(1), &[]),
            (8000, result(1, NavResult::Succeeded), &["reply 1 arrived", "arrived"]),
            (8001, cancel(""), &[]),
        ],
    );
    let drive = agent.drive(ms(9000)).unwrap();
    assert_eq!((drive.elapsed_ms, drive.distance_remaining_m), (8000.0, Some(1.25)), "the time stands still");
    let agent = on_the_way(
        "it gets stuck",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (
                900,
                result(1, NavResult::Aborted { code: 204, message: "no path".into() }),
                &["reply 1 failed", "failed"],
            ),
        ],
    );
    assert_eq!(reason(&agent, 900), "the navigation server gave up: no path (code 204)");
    on_the_way(
        "the server refuses",
        vec![(40, heard(1, DriveNews::Rejected { reason: "no".into() }), &["reply 1 rejected", "rejected"])],
    );
    let agent = on_the_way(
        "there is no server",
        vec![(
            2400,
            heard(1, DriveNews::NotSent { reason: "is nav2 running?".into() }),
            &["reply 1 failed", "failed"],
        )],
    );
    assert_eq!(
        (reason(&agent, 9000), agent.next_tick()),
        ("is nav2 running?".into(), None),
        "nothing to watch"
    );
    on_the_way(
        "a client cancels, by id and by any",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (50, cancel("b"), &[]),
            (60, cancel("a"), &["cancel 1"]),
            (61, cancel(""), &[]),
            (70, cancel_answer(1, CancelOutcome::Canceling), &[]),
            (90, result(1, NavResult::Canceled), &["reply 1 cancelled", "cancelled"]),
        ],
    );
    on_the_way(
        "a newer goal pre-empts the drive when it comes, not when it is found; asking only does not",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (50, goal(2, "b"), &["cancel 1", "begin 2"]),
            (60, cancel_answer(1, CancelOutcome::Canceling), &[]),
            (70, result(1, NavResult::Canceled), &["reply 1 cancelled", "cancelled"]),
            (80, done(2), &["send 2", "found 2"]),
            (90, heard(2, DriveNews::Accepted), &["ask 2", "driving"]),
            (
                100,
                Event::Goal {
                    ticket: Ticket(3),
                    goal: Goal::text("c", "a chair").unwrap(),
                    publish: false,
                    wait: false,
                },
                &["begin 3"],
            ),
            (110, done(3), &["found 3"]),
            (120, result(2, NavResult::Succeeded), &["arrived"]),
            (130, goal(4, "d"), &["begin 4"]),
            (140, done(4), &["send 4", "found 4"]),
        ],
    );
    let agent = on_the_way(
        "the end of an older drive is not the newer one's",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (50, goal(2, "b"), &["cancel 1", "begin 2"]),
            (80, done(2), &["send 2", "found 2"]),
            (90, heard(2, DriveNews::Accepted), &["ask 2", "driving"]),
            (95, result(1, NavResult::Canceled), &["reply 1 cancelled", "cancelled"]),
            (100, cancel(""), &["cancel 2"]),
        ],
    );
    assert_eq!(agent.drive(ms(100)).unwrap().goal_id, "b");
    on_the_way(
        "the node stops: nobody waits, and the robot is cancelled",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (50, Event::Stop, &["cancel 1", "reply 1 cancelled", "cancelled"]),
        ],
    );
    on_the_way(
        "a drive that lasts too long",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (59_999, Event::Tick, &[]),
            (60_000, Event::Tick, &["cancel 1"]),
            (60_010, cancel_answer(1, CancelOutcome::Canceling), &[]),
            (60_020, result(1, NavResult::Canceled), &["reply 1 cancelled", "cancelled"]),
        ],
    );
}

#[test]
fn losing_contact_is_no_end() {
    let accepted = || heard(1, DriveNews::Accepted);
    let agent = on_the_way(
        "accepted late: cancelled when the time is up, and again when it is accepted",
        vec![
            (2999, Event::Tick, &[]),
            (3000, Event::Tick, &["cancel 1", "reply 1 failed", "failed"]),
            (3010, cancel_answer(1, CancelOutcome::UnknownGoal), &[]),
            (4500, accepted(), &["cancel 1"]),
            (4510, cancel_answer(1, CancelOutcome::Canceling), &[]),
            (4520, feedback(1), &[]),
        ],
    );
    assert_eq!(agent.drive(ms(9000)).unwrap().elapsed_ms, 3000.0);
    assert!(
        reason(&agent, 9000).contains("did not accept the goal within 3.0 s"),
        "{}",
        reason(&agent, 9000)
    );
    assert_eq!(agent.next_tick(), None, "the server confirmed: nothing more to watch");
    on_the_way(
        "accepted while the cancellation is under way, which did not know the goal yet",
        vec![
            (3000, Event::Tick, &["cancel 1", "reply 1 failed", "failed"]),
            (3005, accepted(), &[]),
            (3010, cancel_answer(1, CancelOutcome::UnknownGoal), &[]),
            (4005, Event::Tick, &["cancel 1"]),
        ],
    );
    on_the_way(
        "the acceptance got lost, the status topic tells",
        vec![
            (100, heard(1, DriveNews::SendUnanswered), &[]),
            (200, status(1, GoalState::Executing), &["ask 1", "driving"]),
            (900, status(1, GoalState::Succeeded), &[]),
            (950, result(1, NavResult::Succeeded), &["reply 1 arrived", "arrived"]),
        ],
    );
    on_the_way(
        "the acceptance got lost, and so did the status: found on the status topic later, and cancelled",
        vec![
            (3000, Event::Tick, &["cancel 1", "reply 1 failed", "failed"]),
            (3010, heard(1, DriveNews::CancelUnanswered { reason: "away".into() }), &[]),
            (6000, status(1, GoalState::Executing), &["cancel 1"]),
            (6010, cancel_answer(1, CancelOutcome::Canceling), &[]),
        ],
    );
    let agent = on_the_way(
        "the question for the result ends unanswered, and is asked again until it is answered",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (309, Event::Tick, &[]),
            (310, Event::Tick, &["ask 1"]),
            (320, no_result(1), &[]),
            (820, Event::Tick, &["ask 1"]),
            (5000, result(1, NavResult::Succeeded), &["reply 1 arrived", "arrived"]),
        ],
    );
    assert_eq!(agent.drive(ms(9000)).unwrap().elapsed_ms, 5000.0);
    let agent = on_the_way(
        "a question that the server keeps open is contact",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (310, Event::Tick, &["ask 1"]),
            (30_000, Event::Tick, &[]),
            (40_000, result(1, NavResult::Succeeded), &["reply 1 arrived", "arrived"]),
        ],
    );
    assert_eq!(reason(&agent, 0), "");
    on_the_way(
        "the status topic knows the end, and the result does not come",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (70, status(1, GoalState::Succeeded), &["ask 1"]),
            (80, no_result(1), &[]),
            (330, Event::Tick, &["ask 1"]),
            (2070, Event::Tick, &["reply 1 arrived", "arrived"]),
        ],
    );
    let agent = on_the_way(
        "nothing is heard: the goal is cancelled by its id before the drive is called failed",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (5000, Event::Tick, &["ask 1"]),
            (5001, no_result(1), &[]),
            (10_060, Event::Tick, &["ask 1", "cancel 1"]),
            (10_070, no_result(1), &[]),
            (10_080, cancel_answer(1, CancelOutcome::Canceling), &["ask 1"]),
            (10_090, result(1, NavResult::Canceled), &["reply 1 failed", "failed"]),
        ],
    );
    assert_eq!(reason(&agent, 0), "no contact with the navigation server for 10.0 s: cancelled by its id");
    on_the_way(
        "feedback is contact",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (9000, feedback(1), &["ask 1"]),
            (9010, no_result(1), &[]),
            (18_000, Event::Tick, &["ask 1"]),
            (18_001, no_result(1), &[]),
            (18_100, feedback(1), &[]),
            (28_000, Event::Tick, &["ask 1"]),
        ],
    );
    let agent = on_the_way(
        "a server that is away gets the cancellation when it comes back",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (50, Event::Cancel { id: "a".into() }, &["cancel 1"]),
            (60, heard(1, DriveNews::CancelUnanswered { reason: "no server".into() }), &[]),
            (1060, Event::Tick, &["cancel 1"]),
            (1061, heard(1, DriveNews::CancelUnanswered { reason: "no server".into() }), &[]),
            (2061, Event::Tick, &["cancel 1"]),
            (5050, Event::Tick, &["reply 1 failed", "failed"]),
            (5060, heard(1, DriveNews::CancelUnanswered { reason: "no server".into() }), &[]),
            (10_060, Event::Tick, &["cancel 1"]),
            (10_070, cancel_answer(1, CancelOutcome::Canceling), &[]),
        ],
    );
    assert!(reason(&agent, 0).contains("did not say that it stopped (no server)"), "{}", reason(&agent, 0));
    assert_eq!(agent.next_tick(), None);
    let agent = on_the_way(
        "a restarted server does not know the goal",
        vec![
            (40, accepted(), &["ask 1", "driving"]),
            (60, no_result(1), &[]),
            (400, Event::Tick, &["ask 1"]),
            (410, result(1, NavResult::Unknown), &["reply 1 failed", "failed"]),
        ],
    );
    assert!(reason(&agent, 0).contains("was it restarted"));
}

/// Odometry on the robot's clock, at `x` metres.
fn odometry(frame: &str, stamp_ms: i64, x: f64) -> Event {
    Event::Odometry(OdometryHeard {
        frame: frame.into(),
        base: "base_link".into(),
        stamp: Timestamp(ms(stamp_ms).as_nanos()),
        pose: Pose2::new(x, 0.0, 0.0),
    })
}

fn stamps(actions: &[Action]) -> Vec<i64> {
    let of = |action: &Action| match action {
        Action::PublishGoal { stamp, .. } | Action::StartDrive { stamp, .. } => Some(stamp.as_nanos()),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

/// Simulated time: the robot's clock is at a hundred seconds, whatever this machine's says.
#[test]
fn goals_are_stamped_by_the_robots_clock() {
    let captured = |stamp_ns: i64| {
        let mut answer = found(1.0);
        answer.stamp_ns = Some(stamp_ns);
        Event::Done { ticket: Ticket(1), answer }
    };
    let camera = |stamp_ms: i64| Event::Frame { captured_at: Timestamp(ms(stamp_ms).as_nanos()) };
    let check =
        |name: &str, drives: bool, stamp: GoalStamp, events: Vec<Event>, frame: &str, want_ms: i64| {
            let mut agent = driven(drives);
            agent.config.stamp = stamp;
            agent.step(Event::ContextReady { latents: 3 }, ms(0));
            for event in events {
                agent.step(event, ms(10));
            }
            agent.step(goal(1, "a"), ms(10));
            let Event::Done { ticket, mut answer } = captured(ms(100_000).as_nanos()) else { panic!() };
            if let Some(pose) = &mut answer.pose {
                pose.frame = frame.into();
            }
            let actions = agent.step(Event::Done { ticket, answer }, ms(400));
            assert_eq!(stamps(&actions), [ms(want_ms).as_nanos()], "{name}: {actions:?}");
        };
    let both = || vec![camera(100_000), odometry("odom", 100_200, 0.0)];
    for drives in [false, true] {
        check("odometry's stamp", drives, GoalStamp::Robot, both(), "odom", 100_200);
        check("zero", drives, GoalStamp::Zero, both(), "odom", 0);
        let unstamped = vec![camera(100_000), odometry("odom", 0, 0.0)];
        check("odometry without stamps: the camera's", drives, GoalStamp::Robot, unstamped, "odom", 100_000);
        // The base has moved since: the pose means something only at the picture's time.
        check("relative to the base", drives, GoalStamp::Robot, both(), "base_link", 100_000);
        check("relative to the base, zero", drives, GoalStamp::Zero, both(), "base_link", 100_000);
        check("no odometry", drives, GoalStamp::Robot, vec![camera(100_000)], "base_link", 100_000);
    }
}

#[test]
fn a_pose_whose_frame_is_gone_is_refused_with_the_reason() {
    let check = |name: &str, meanwhile: Vec<(i64, Event)>, want: Option<(Status, &str)>| {
        for publish in [true, false] {
            let mut agent = driven(true);
            let start = [
                frame(),
                Event::ContextReady { latents: 3 },
                odometry("odom", 100_000, 0.0),
                Event::Goal {
                    ticket: Ticket(1),
                    goal: Goal::text("a", "a chair").unwrap(),
                    publish,
                    wait: false,
                },
            ];
            for event in start {
                agent.step(event, ms(0));
            }
            let mut at = 0;
            for (millis, event) in meanwhile.clone() {
                at = millis;
                agent.step(event, ms(millis));
            }
            let actions = agent.step(done(1), ms(at + 1));
            let Some(Action::Reply { answer, .. }) = actions.last() else { panic!("{name}: {actions:?}") };
            // Asking only moves nobody: a silent frame is the client's affair, one that is another is not.
            let want = want.filter(|(status, _)| publish || *status == Status::Failed);
            let (status, reason) = want.unwrap_or((Status::Found, ""));
            assert_eq!(answer.status, status, "{name}: {answer:?}");
            assert!(answer.reason.as_deref().unwrap_or_default().contains(reason), "{name}: {answer:?}");
            assert_eq!(answer.pose.is_some(), status == Status::Found, "{name}");
            assert_eq!(stamps(&actions).len(), usize::from(publish && want.is_none()), "{name}");
        }
    };
    check("nothing happens", vec![], None);
    check("the robot drives on", vec![(200, odometry("odom", 100_200, 0.2))], None);
    check(
        "localisation is restarted under another name",
        vec![(200, odometry("map", 100_200, 0.0))],
        Some((Status::Failed, "changed from \"odom\" to \"map\"")),
    );
    check(
        "and comes back",
        vec![(200, odometry("map", 100_200, 0.0)), (300, odometry("odom", 100_300, 0.0))],
        Some((Status::Failed, "changed")),
    );
    check(
        "odometry begins anew at the origin",
        vec![(200, odometry("odom", 100_200, -4.0))],
        Some((Status::Failed, "jumped by 4.0 m")),
    );
    check("the memory is lost", vec![(200, Event::ContextLost)], Some((Status::Failed, "began anew")));
    check("a short silence", vec![(4000, frame())], None);
    let silent: Vec<(i64, Event)> = vec![(4000, frame())];
    let mut agent = driven(true);
    agent.config.tf_buffer = ms(1000);
    for event in [frame(), Event::ContextReady { latents: 3 }, odometry("odom", 100_000, 0.0), goal(1, "a")] {
        agent.step(event, ms(0));
    }
    for (at, event) in silent {
        agent.step(event, ms(at));
    }
    let actions = agent.step(done(1), ms(4001));
    let Some(Action::Reply { answer, drive: None, .. }) = actions.last() else { panic!("{actions:?}") };
    assert_eq!((answer.status, answer.pose.is_some()), (Status::Stale, false));
    assert!(answer.reason.as_ref().unwrap().contains("nothing was heard of the frame \"odom\" for 4.0 s"));
}

#[test]
fn of_two_nodes_with_one_name_the_earlier_one_answers_and_publishes() {
    let rival = |name: Option<&str>| Event::Rival { name: name.map(str::to_owned) };
    play(
        "another node was there first",
        vec![
            (0, frame(), &[]),
            (0, Event::ContextReady { latents: 3 }, &[]),
            (1, goal(1, "a"), &["begin 1"]),
            (2, rival(Some("3cf5-1")), &[]),
            (3, goal(2, "b"), &["leave 2"]),
            (4, Event::BadGoal { ticket: Ticket(3), id: "x".into(), reason: "y".into() }, &["leave 3"]),
            // What was in work is answered, and not published.
            (5, done(1), &["failed 1"]),
            (6, rival(None), &[]),
            (7, goal(4, "c"), &["begin 4"]),
            (8, done(4), &["publish", "found 4"]),
        ],
    );
}

#[test]
fn a_goal_that_the_worker_does_not_take_is_answered_with_its_id() {
    let mut agent = driven(true);
    agent.step(frame(), ms(0));
    agent.step(Event::ContextReady { latents: 3 }, ms(0));
    agent.step(wait_for(1, "mine"), ms(0));
    let actions = agent.step(Event::NoAnswer { ticket: Ticket(1), reason: "busy".into() }, ms(1));
    let [Action::Answer { answer, .. }, Action::Reply { answer: told, drive: None, .. }] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!((answer.goal_id.as_str(), answer.status), ("mine", Status::Failed));
    assert_eq!((answer, answer.reason.as_deref()), (told, Some("busy")));
    assert_eq!(agent.step(Event::NoAnswer { ticket: Ticket(1), reason: "busy".into() }, ms(2)), []);
}

#[test]
fn a_server_that_confirms_nothing_leaves_nobody_waiting_for_ever() {
    let mut agent = driven(true);
    agent.step(frame(), ms(0));
    agent.step(Event::ContextReady { latents: 3 }, ms(0));
    let mut replies = 0;
    for ticket in 1..=100 {
        agent.step(wait_for(ticket, "a"), ms(0));
        let actions = agent.step(done(ticket), ms(0));
        replies += actions.iter().filter(|a| matches!(a, Action::Reply { .. })).count();
        assert_eq!(agent.waiting.len(), ticket as usize - replies);
        assert!(agent.waiting.len() <= 16, "{}", agent.waiting.len());
    }
}

proptest! {
    /// Whatever happens in whatever order: one goal in work at a time, one answer and one reply for each, the reply not
    /// before the answer; and a drive that was sent is cancelled or ended before it is forgotten.
    #[test]
    fn exactly_one_answer_and_one_reply_per_goal(
        drives in any::<bool>(),
        script in proptest::collection::vec((0u8..20, 0i64..400, 0u64..6), 1..300),
    ) {
        let mut agent = driven(drives);
        let (mut now, mut next) = (0, 0u64);
        let mut book = Book::default();
        for (kind, wait, which) in script {
            now += wait;
            let recent = next.saturating_sub(which);
            let event = match kind {
                0 | 1 => frame(),
                2 => Event::ContextReady { latents: which as usize },
                3 => { next += 1; goal(next, &format!("g{which}")) }
                4 => { next += 1; with_deadline(next, 100) }
                5 => Event::Cancel { id: format!("g{which}") },
                6 | 7 => Event::Done { ticket: Ticket(recent), answer: found(which as f64) },
                8 => { next += 1; Event::BadGoal { ticket: Ticket(next), id: "x".into(), reason: "y".into() } }
                9 => { next += 1; wait_for(next, &format!("g{which}")) }
                10 => Event::NoAnswer { ticket: Ticket(recent), reason: "busy".into() },
                11 => heard(recent, DriveNews::Accepted),
                12 => no_result(recent),
                13 => result(recent, [NavResult::Succeeded, NavResult::Canceled, NavResult::Unknown][which as usize % 3].clone()),
                14 => status(recent, [GoalState::Executing, GoalState::Succeeded, GoalState::Canceled][which as usize % 3]),
                15 => cancel_answer(recent, [
                    CancelOutcome::Canceling, CancelOutcome::UnknownGoal, CancelOutcome::Rejected, CancelOutcome::AlreadyOver,
                ][which as usize % 4]),
                16 => heard(recent, DriveNews::CancelUnanswered { reason: "z".into() }),
                17 => odometry(if which == 5 { "map" } else { "odom" }, now, 0.1 * which as f64),
                18 => Event::Rival { name: (which == 5).then(|| "earlier".into()) },
                _ => Event::Tick,
            };
            book.take(&agent.step(event, ms(now)));
        }
        // Time passes until nobody waits any more.
        for _ in 0..20 {
            now += 100_000;
            book.take(&agent.step(Event::Tick, ms(now)));
        }
        for ticket in 1..=next {
            prop_assert_eq!(book.answers.get(&ticket), Some(&1), "answers to goal {}", ticket);
            prop_assert_eq!(book.replies.get(&ticket), Some(&1), "replies to goal {}", ticket);
        }
        prop_assert_eq!(agent.counts().goals, agent.counts().answers);
        prop_assert!(agent.waiting.is_empty());
        prop_assert_eq!(agent.next_tick(), None, "nothing is watched for ever");
    }
}

/// What the agent's actions add up to.
#[derive(Default)]
struct Book {
    working: Option<u64>,
    answers: HashMap<u64, u32>,
    replies: HashMap<u64, u32>,
}

impl Book {
    fn take(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Begin { ticket, .. } => {
                    assert!(self.working.is_none(), "one goal at a time");
                    self.working = Some(ticket.0);
                }
                Action::Halt { ticket } => assert_eq!(self.working.take(), Some(ticket.0)),
                Action::Answer { ticket, .. } => {
                    *self.answers.entry(ticket.0).or_default() += 1;
                    self.working.take_if(|working| *working == ticket.0);
                }
                Action::Leave { ticket } => {
                    self.answers.insert(ticket.0, 1);
                    self.replies.insert(ticket.0, 1);
                }
                Action::Reply { ticket, .. } => {
                    assert!(self.answers.contains_key(&ticket.0), "a reply before the answer");
                    *self.replies.entry(ticket.0).or_default() += 1;
                }
                _ => {}
            }
        }
    }
}

#[test]
fn an_arrival_beside_the_goal_is_asked_again_once() {
    let arrive = |agent: &mut Agent, ticket: u64, at: i64| {
        agent.step(done(ticket), ms(at));
        agent.step(heard(ticket, DriveNews::Accepted), ms(at + 1));
        let actions = agent.step(result(ticket, NavResult::Succeeded), ms(at + 2));
        let looks = |a: &Action| matches!(a, Action::LookAgain { ticket: t, .. } if *t == Ticket(ticket));
        assert!(actions.iter().any(looks), "{actions:?}");
    };
    // Within 10 cm and 0.2 radians; beside it by a hair; turned away; nothing like it seen.
    let [here, beside, turned] = [(0.06, 0.079, 0.2), (0.08, 0.07, 0.0), (0.0, 0.0, -0.21)]
        .map(|(x, y, yaw)| Some(Pose2::new(x, y, yaw)));
    let told = |agent: &mut Agent, ticket: u64, base_from_goal: Option<Pose2>, at: i64| {
        let said = words(&agent.step(Event::Looked { ticket: Ticket(ticket), base_from_goal }, ms(at)));
        (said, agent.drive(ms(at)).and_then(|drive| drive.arrival))
    };
    let mut agent = driven(true);
    agent.step(frame(), ms(1));
    agent.step(Event::ContextReady { latents: 3 }, ms(2));
    agent.step(goal(1, "a"), ms(3));
    arrive(&mut agent, 1, 10);
    let (said, arrival) = told(&mut agent, 1, beside, 20);
    assert_eq!((said, arrival), (vec!["arrived".into(), "again a".into()], Some(Arrival::Reasked)));
    assert_eq!(told(&mut agent, 1, beside, 21).0, Vec::<String>::new(), "told already");
    // The same goal comes again, and again the robot does not stand there: that is told.
    agent.step(goal(2, "a"), ms(30));
    arrive(&mut agent, 2, 40);
    assert_eq!(told(&mut agent, 2, turned, 50), (vec!["arrived".into()], Some(Arrival::Missed)));
    // Another goal may be asked again for itself.
    agent.step(goal(3, "b"), ms(60));
    arrive(&mut agent, 3, 70);
    assert_eq!(told(&mut agent, 3, here, 80), (vec!["arrived".into()], Some(Arrival::Confirmed)));
    agent.step(goal(4, "c"), ms(90));
    arrive(&mut agent, 4, 100);
    assert_eq!(told(&mut agent, 4, None, 110).1, Some(Arrival::Reasked));
    // A newer goal is not disturbed.
    agent.step(goal(5, "d"), ms(120));
    arrive(&mut agent, 5, 130);
    agent.step(goal(6, "e"), ms(140));
    assert_eq!(told(&mut agent, 5, None, 150).1, Some(Arrival::Missed));
}
