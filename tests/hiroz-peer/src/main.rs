//! PoseStamped and Image between mindseye-bridge and hiroz, both ways, over TCP on the loopback. Exit
//! status 0 and one line per exchange when every message arrived whole.

use hiroz::Builder;
use hiroz::context::ZContextBuilder;
use hiroz_msgs::builtin_interfaces::Time;
use hiroz_msgs::geometry_msgs::{Point, Pose, PoseStamped, Quaternion};
use hiroz_msgs::sensor_msgs::Image;
use hiroz_msgs::std_msgs::Header;
use mindseye_bridge::Timestamp;
use mindseye_bridge::msg;
use mindseye_bridge::ros::{History, Qos, QueuePolicy, RosConfig, RosSession};
use std::error::Error;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);
const COUNT: u8 = 20;

fn header() -> Header {
    Header { stamp: Time { sec: 12, nanosec: 34 }, frame_id: "map".into() }
}

fn our_header() -> msg::Header {
    msg::Header::new(Timestamp::from_ros(12, 34), "map")
}

fn our_image(i: u8) -> msg::Image {
    msg::Image {
        header: our_header(),
        height: 240,
        width: 320,
        encoding: "rgb8".into(),
        is_bigendian: 0,
        step: 960,
        data: (0..240 * 960).map(|n| (n as u8).wrapping_add(i)).collect(),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let mut config = RosConfig::in_process("ours");
    config.zenoh.listen = Some(vec![endpoint.clone()]);
    let ours = RosSession::open(&config)?;
    let context = ZContextBuilder::default()
        .with_mode("peer")
        .disable_multicast_scouting()
        .with_connect_endpoints([endpoint])
        .build()
        .map_err(|e| e.to_string())?;
    let node = context.create_node("theirs").build().map_err(|e| e.to_string())?;

    // Theirs to ours.
    let poses =
        ours.subscriber::<msg::PoseStamped>("/theirs/pose", &Qos::default(), QueuePolicy::KeepLast(64))?;
    let images =
        ours.subscriber::<msg::Image>("/theirs/image", &Qos::default(), QueuePolicy::KeepLast(64))?;
    let pose_pub = node.create_pub::<PoseStamped>("/theirs/pose").build().map_err(|e| e.to_string())?;
    let image_pub = node.create_pub::<Image>("/theirs/image").build().map_err(|e| e.to_string())?;
    let graph = ours.graph().ok_or("rmw_zenoh style has a graph")?;
    if !graph.wait_until(LONG, |g| {
        g.nodes().iter().any(|n| n.name == "theirs")
            && g.publishers_of("/theirs/pose")
                .iter()
                .any(|e| e.hash == <msg::PoseStamped as msg::RosType>::HASH)
            && g.publishers_of("/theirs/image").iter().any(|e| e.hash == <msg::Image as msg::RosType>::HASH)
    }) {
        return Err("hiroz's node and topics did not appear in our graph with our hashes".into());
    }
    std::thread::sleep(Duration::from_millis(500));
    for i in 0..COUNT {
        pose_pub
            .publish(&PoseStamped {
                header: header(),
                pose: Pose {
                    position: Point { x: f64::from(i), y: -1.5, z: 0.25 },
                    orientation: Quaternion { x: 0.0, y: 0.0, z: 0.6, w: 0.8 },
                },
            })
            .map_err(|e| e.to_string())?;
        let image = our_image(i);
        image_pub
            .publish(&Image {
                header: header(),
                height: image.height,
                width: image.width,
                encoding: image.encoding,
                is_bigendian: image.is_bigendian,
                step: image.step,
                data: image.data.into(),
            })
            .map_err(|e| e.to_string())?;

        let got = poses.recv_timeout(LONG)?.ok_or("a pose of hiroz did not arrive")?;
        let p = &got.message.pose;
        let want = (f64::from(i), -1.5, 0.25, 0.6, 0.8);
        if (p.position.x, p.position.y, p.position.z, p.orientation.z, p.orientation.w) != want
            || got.message.header != our_header()
        {
            return Err(format!("pose {i} of hiroz arrived as {:?}", got.message).into());
        }
        let a = got.info.attachment.ok_or("hiroz attached nothing that we can read")?;
        let known = graph.entities().iter().any(|e| e.gid == a.gid);
        if a.sequence != i64::from(i) + 1 || !known {
            return Err(format!("attachment {i} of hiroz: {a:?}, GID in the graph: {known}").into());
        }
        let got = images.recv_timeout(LONG)?.ok_or("an image of hiroz did not arrive")?;
        if got.message != our_image(i) {
            return Err(format!("image {i} of hiroz arrived changed").into());
        }
    }
    println!("hiroz -> ours: {COUNT} PoseStamped, {COUNT} Image (230 kB), sequence, GID and hashes agree");

    // Ours to theirs.
    let pose_sub = node.create_sub::<PoseStamped>("/ours/pose").build().map_err(|e| e.to_string())?;
    let image_sub = node.create_sub::<Image>("/ours/image").build().map_err(|e| e.to_string())?;
    let poses = ours.publisher::<msg::PoseStamped>("/ours/pose", &Qos::default())?;
    let images =
        ours.publisher::<msg::Image>("/ours/image", &Qos { history: History::KeepAll, ..Qos::default() })?;
    if !poses.wait_for_subscribers(LONG) || !images.wait_for_subscribers(LONG) {
        return Err("hiroz's subscriptions did not match ours".into());
    }
    let seen = |topic: &str| {
        graph.wait_until(LONG, |g| g.topics().iter().any(|t| t.name == topic && t.subscriptions == 1))
    };
    if !seen("/ours/pose") || !seen("/ours/image") {
        return Err("hiroz's subscriptions did not appear in our graph".into());
    }
    for i in 0..COUNT {
        let mut p = msg::PoseStamped { header: our_header(), ..Default::default() };
        p.pose.position.x = f64::from(i);
        poses.publish(&p)?;
        images.publish_owned(our_image(i))?;
        let got = pose_sub.recv_timeout(LONG).map_err(|e| e.to_string())?;
        if got.pose.position.x != f64::from(i)
            || got.header.frame_id != "map"
            || got.header.stamp.nanosec != 34
        {
            return Err(format!("our pose {i} arrived at hiroz as {got:?}").into());
        }
        let got = image_sub.recv_timeout(LONG).map_err(|e| e.to_string())?;
        let want = our_image(i);
        let bytes: Vec<u8> = got.data.to_vec();
        if (got.width, got.height, got.step) != (want.width, want.height, want.step)
            || got.encoding != want.encoding
            || bytes != want.data
        {
            return Err(format!("our image {i} arrived at hiroz changed").into());
        }
    }
    println!("ours -> hiroz: {COUNT} PoseStamped, {COUNT} Image (230 kB)");
    Ok(())
}
