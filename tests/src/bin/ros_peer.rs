//! Our side of the wire for `tests/python/robot.py`: takes camera frames and odometry, and answers a goal text with a
//! pose one metre ahead of the robot, stamped with the frame it came from. Prints `ready ENDPOINT`.
//!
//! `ros_peer [--listen ENDPOINT] [--style rmw_zenoh|ros2dds] [--seconds N]`

use mindseye_bridge::answer::{FramedPose2, Status};
use mindseye_bridge::geometry::Pose2;
use mindseye_bridge::goal::Goal;
use mindseye_bridge::msg::{self, flags};
use mindseye_bridge::ros::{CameraIntake, KeyStyle, Qos, QueuePolicy, RosConfig, RosSession};
use mindseye_bridge::{Answer, FramePool, clock};
use std::error::Error;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let mut listen = None;
    let mut style = KeyStyle::RmwZenoh;
    let mut seconds = 60.0f64;
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or("an option lacks its value")?;
        match (name.as_str(), value.as_str()) {
            ("--listen", v) => listen = Some(v.to_owned()),
            ("--style", "rmw_zenoh") => style = KeyStyle::RmwZenoh,
            ("--style", "ros2dds") => style = KeyStyle::Ros2Dds,
            ("--seconds", v) => seconds = v.parse()?,
            _ => return Err(format!("unknown option {name} {value}").into()),
        }
    }
    let endpoint = match listen {
        Some(e) => e,
        None => format!("tcp/127.0.0.1:{}", std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()),
    };
    let mut config = RosConfig::in_process("ros_peer");
    config.key_style = style;
    config.zenoh.listen = Some(vec![endpoint.clone()]);
    let session = RosSession::open(&config)?;
    let camera =
        CameraIntake::subscribe(&session, "/camera/image_raw/compressed", FramePool::new(4))?.spawn(2)?;
    let odometry = session.subscriber::<msg::Odometry>("/odom", &Qos::SENSOR_DATA, QueuePolicy::Latest)?;
    let asked = session.subscriber::<msg::StringMsg>(
        "/mindseye/goal/text",
        &Qos::default(),
        QueuePolicy::KeepLast(4),
    )?;
    let goals = session.publisher::<msg::PoseStamped>("/goal_pose", &Qos::default())?;
    let status = session.publisher::<msg::StringMsg>("/mindseye/status", &Qos::default())?;
    println!("ready {endpoint}");

    let until = clock::monotonic().as_secs_f64() + seconds;
    let (mut frames, mut newest, mut base, mut count) = (0u32, None, None, 0u32);
    while clock::monotonic().as_secs_f64() < until {
        if let Some(frame) = camera.recv_timeout(Duration::from_millis(20)) {
            frames += 1;
            newest = Some(frame.captured_at);
        }
        if let Some(got) = odometry.try_recv()? {
            let wrong =
                flags("/odom", &got.message, &msg::Limits { now: Some(clock::now()), ..Default::default() });
            if !wrong.is_empty() {
                return Err(format!("odometry is flagged: {}", wrong[0]).into());
            }
            base = Some(got.message.pose.pose.isometry()?);
        }
        let Some(text) = asked.try_recv()? else { continue };
        let (Some(stamp), Some(base), true) = (newest, base, frames >= 3) else { continue };
        count += 1;
        let goal = Goal::text(format!("g{count}"), &text.message.data)?;
        let ahead = base * ahead_of_base(1.0);
        let pose = msg::Pose::from_isometry(&ahead);
        goals.publish(&msg::PoseStamped { header: msg::Header::new(stamp, "odom"), pose: pose.clone() })?;
        let mut answer = Answer::new(goal.id, Status::Found, None);
        answer.pose = Some(FramedPose2::new("odom", Pose2::new(pose.position.x, pose.position.y, 0.0)));
        answer.stamp_ns = Some(stamp.0);
        status.publish(&msg::StringMsg { data: answer.to_json() })?;
    }
    Ok(())
}

fn ahead_of_base(metres: f64) -> mindseye_bridge::geometry::Isometry3<f64> {
    Pose2::new(metres, 0.0, 0.0).to_isometry()
}
