"""Plays a ROS 2 robot without ROS: a camera, odometry and a goal over Zenoh, as rmw_zenoh or zenoh-bridge-ros2dds
would put them on the wire. Messages are made and read by the rosbags package, keys and tokens by this file.

    robot.py --connect tcp/127.0.0.1:7447 --recording room.mcap --goal "find the yellow cone" [--goal ...]
             [--style rmw_zenoh|ros2dds] [--camera plain|buffer-aware] [--node mindseye] [--seconds 60]

The robot drives as the recording (raw rgb8 images, odometry, CameraInfo, tf_static) shows, with the stamps of now and
its pictures as PNG, then stands still and asks, for the next thing when an answer withholds the pose. The other side
must publish /goal_pose: its key, hash, attachment (sequence, GID), its node and its topics in the liveliness graph are
checked, and the pose itself against the recording's truth (room.truth.json): it stands before the thing that was asked for
and looks at it.
Exit status 0 and a last line "ok ..." when everything holds, else 1 and what does not.
"""

import argparse
import json
import math
import pathlib
import struct
import sys
import threading
import time
import zlib

import numpy as np
import xxhash
import zenoh
from mcap.reader import make_reader
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
T = STORE.types
IMAGE = "sensor_msgs/msg/CompressedImage"
ODOM = "nav_msgs/msg/Odometry"
INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"
TEXT = "std_msgs/msg/String"
TF = "tf2_msgs/msg/TFMessage"
RAW = "sensor_msgs/msg/Image"


def dds(name):
    pkg, kind, last = name.split("/")
    return f"{pkg}::{kind}::dds_::{last}_"


def fail(what):
    print(f"FAIL {what}", flush=True)
    sys.exit(1)


def png(rgb):
    """RGB8 pixels of shape (height, width, 3) as PNG."""
    height, width, _ = rgb.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rgb.reshape(height, -1)], axis=1).tobytes()

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


class Token:
    """A liveliness token of rmw_zenoh, read."""

    def __init__(self, key):
        self.key = key
        parts = key.split("/")
        self.kind = parts[5]
        self.node = parts[8]
        self.topic = parts[9].replace("%", "/") if len(parts) > 9 else None
        self.type = parts[10] if len(parts) > 10 else None
        self.hash = parts[11] if len(parts) > 11 else None
        self.qos = parts[12] if len(parts) > 12 else None
        self.backends = len(parts) > 13 and parts[13].startswith("backends:")
        self.gid = xxhash.xxh3_128_intdigest(key.encode()).to_bytes(16, "little")


class Robot:
    def __init__(self, session, style, camera):
        self.session, self.style, self.camera = session, style, camera
        self.zid = str(session.info.zid())
        self.ids = 1
        self.tokens = {}
        self.held = []
        self.lock = threading.Lock()
        if style == "rmw_zenoh":
            self.watch = session.liveliness().declare_subscriber("@ros2_lv/0/**", self.seen, history=True)
            self.declare_token(f"@ros2_lv/0/{self.zid}/0/0/NN/%/%/py_robot")

    def seen(self, sample):
        key = str(sample.key_expr)
        with self.lock:
            if sample.kind == zenoh.SampleKind.PUT:
                self.tokens[key] = Token(key)
            else:
                self.tokens.pop(key, None)

    def graph(self):
        with self.lock:
            return [t for t in self.tokens.values() if f"/{self.zid}/" not in t.key]

    def declare_token(self, key):
        self.held.append(self.session.liveliness().declare_token(key))

    def key(self, topic, name, any_hash=False):
        if self.style == "ros2dds":
            return topic.lstrip("/")
        last = "*" if any_hash else STORE.hash_rihs01(name)
        return f"0/{topic.lstrip('/')}/{dds(name)}/{last}"

    def endpoint(self, kind, topic, name, qos):
        """Declares a token; gives the GID."""
        eid, self.ids = self.ids, self.ids + 1
        mangled = topic.replace("/", "%")
        hash_ = STORE.hash_rihs01(name)
        key = f"@ros2_lv/0/{self.zid}/0/{eid}/{kind}/%/%/py_robot/{mangled}/{dds(name)}/{hash_}/{qos}"
        if self.style == "rmw_zenoh":
            self.declare_token(key)
        return xxhash.xxh3_128_intdigest(key.encode()).to_bytes(16, "little")

    def publisher(self, topic, name, qos="::,10:,:,:,,"):
        gid = self.endpoint("MP", topic, name, qos)
        pub = self.session.declare_publisher(self.key(topic, name))
        count = 0

        def publish(message):
            nonlocal count
            count += 1
            # The struct is written out: this side must not depend on zenoh-ext's serialiser.
            attachment = struct.pack("<qqB", count, time.time_ns(), 16) + gid
            cdr = bytes(STORE.serialize_cdr(message, name))
            pub.put(cdr, attachment=attachment if self.style == "rmw_zenoh" else None)

        return publish

    def camera_is_wanted(self, topic):
        """What a publisher of Lyrical or newer asks before it writes to the plain key."""
        if self.camera == "plain" or self.style != "rmw_zenoh":
            return True
        for t in self.graph():
            # Best effort and volatile: a reliable or transient-local subscription does not match this camera.
            if t.kind == "MS" and t.topic == topic and t.type == dds(IMAGE) and not t.backends:
                if t.qos.split(":")[0] == "2" and t.qos.split(":")[1] in ("", "2"):
                    return True
        return False


class Recording:
    """A drive: moments of (seconds from the start, picture, odometry, camera), and the static transforms."""

    def __init__(self, path):
        self.moments, self.statics = [], None
        odometry = info = None
        with open(path, "rb") as file:
            for schema, channel, message in make_reader(file).iter_messages():
                value = STORE.deserialize_cdr(message.data, schema.name)
                if channel.topic == "/tf_static":
                    self.statics = value
                elif schema.name == ODOM:
                    odometry = value
                elif schema.name == INFO:
                    info = value
                elif schema.name == RAW:
                    rgb = np.asarray(value.data).reshape(value.height, value.step)[:, : value.width * 3]
                    picture = (value.header.frame_id, png(rgb.reshape(value.height, value.width, 3)))
                    self.moments.append((message.log_time, picture, odometry, info))
        first = self.moments[0][0]
        self.moments = [((t - first) * 1e-9, *rest) for t, *rest in self.moments]


def stamped(message, frame=None):
    """The message with the time of now."""
    now = time.time_ns()
    stamp = T["builtin_interfaces/msg/Time"](now // 10**9, now % 10**9)
    message.header = T["std_msgs/msg/Header"](stamp, frame or message.header.frame_id)
    return message


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--connect", required=True)
    args.add_argument("--recording", required=True)
    args.add_argument("--style", choices=["rmw_zenoh", "ros2dds"], default="rmw_zenoh")
    args.add_argument("--camera", choices=["plain", "buffer-aware"], default="plain")
    args.add_argument("--goal", action="append", required=True)
    args.add_argument("--node", default="mindseye")
    args.add_argument("--seconds", type=float, default=60.0)
    args = args.parse_args()
    drive = Recording(args.recording)

    config = zenoh.Config()
    config.insert_json5("mode", '"peer"')
    config.insert_json5("connect/endpoints", json.dumps([args.connect]))
    config.insert_json5("listen/endpoints", "[]")
    config.insert_json5("scouting/multicast/enabled", "false")
    with zenoh.open(config) as session:
        robot = Robot(session, args.style, args.camera)
        image_topic = "/camera/image_raw/compressed"
        image_pub = robot.publisher(image_topic, IMAGE, "2::,5:,:,:,,")
        odom_pub = robot.publisher("/odom", ODOM)
        info_pub = robot.publisher("/camera/camera_info", INFO)
        # A plain publisher of a transient-local topic: it repeats itself instead of keeping a cache.
        static_pub = robot.publisher("/tf_static", TF, ":1:,1:,:,:,,")
        goal_pub = robot.publisher("/mindseye/goal/text", TEXT)
        poses, states = [], []
        robot.endpoint("MS", "/goal_pose", POSE, "::,10:,:,:,,")
        robot.endpoint("MS", "/mindseye/status", TEXT, "::,10:,:,:,,")
        subs = [
            session.declare_subscriber(robot.key("/goal_pose", POSE, any_hash=True), poses.append),
            session.declare_subscriber(robot.key("/mindseye/status", TEXT, any_hash=True), states.append),
        ]

        sent = skipped = at = asked = 0
        start = time.monotonic()
        while not poses:
            now = time.monotonic() - start
            if now > args.seconds:
                fail(f"no pose within {args.seconds} s ({sent} frames sent, {skipped} not wanted): {said(states)}")
            if at % 10 == 0:
                static_pub(drive.statics)
            # At the end of the drive the robot stands still.
            _, (frame, data), odometry, info = drive.moments[min(at, len(drive.moments) - 1)]
            odom_pub(stamped(odometry))
            info_pub(stamped(info))
            if robot.camera_is_wanted(image_topic):
                image = T[IMAGE](None, "png", np.frombuffer(data, dtype=np.uint8))
                image_pub(stamped(image, frame))
                sent += 1
                at += 1
            else:
                skipped += 1
            if at > len(drive.moments) + 3 and asked <= answered(states):
                if asked == len(args.goal):
                    fail(f"no pose for any of {args.goal}: {said(states)}")
                goal_pub(T[TEXT](args.goal[asked]))
                asked += 1
            step = drive.moments[1][0] - drive.moments[0][0]
            time.sleep(max(0.0, start + (sent + skipped) * step - time.monotonic()))
        time.sleep(0.2)
        pose = check_pose(robot, poses[0])
        check_place(pose, args.recording, args.goal[asked - 1])
        if args.style == "rmw_zenoh":
            check_graph(robot, image_topic, args.node)
            check_sequences(robot, states)
        where = f"x {pose.position.x:.2f} y {pose.position.y:.2f}"
        what = f"{sent} frames, {skipped} not wanted, {args.goal[asked - 1]!r} stands at {where}"
        print(f"ok {args.style} {args.camera}: {what}", flush=True)
        del subs


def answered(states):
    """How many goals the newest state counts as answered and over; the pose of one that was found is still on its way."""
    if not states:
        return 0
    state = json.loads(STORE.deserialize_cdr(states[-1].payload.to_bytes(), TEXT).data)
    found = (state.get("last_answer") or {}).get("status") == "found"
    return state["goals"]["answers"] - (1 if found else 0)


def said(states):
    """The last answer that the status topic carried."""
    for sample in reversed(states):
        answer = json.loads(STORE.deserialize_cdr(sample.payload.to_bytes(), TEXT).data).get("last_answer")
        if answer:
            return f"answered {answer['status']}, {answer.get('reason')}"
    return f"no answer in {len(states)} states"


def check_pose(robot, sample):
    message = STORE.deserialize_cdr(sample.payload.to_bytes(), POSE)
    q = message.pose.orientation
    norm = (q.x**2 + q.y**2 + q.z**2 + q.w**2) ** 0.5
    if message.header.frame_id not in ("map", "odom") or abs(norm - 1) > 1e-6 or (q.x, q.y) != (0.0, 0.0):
        fail(f"goal pose is not planar in map or odom: {message}")
    if robot.style == "ros2dds":
        if str(sample.key_expr) != "goal_pose" or sample.attachment is not None:
            fail(f"key {sample.key_expr}, attachment {sample.attachment}")
        return message.pose
    want = f"0/goal_pose/{dds(POSE)}/{STORE.hash_rihs01(POSE)}"
    if str(sample.key_expr) != want:
        fail(f"key {sample.key_expr}, wanted {want}")
    if sample.attachment is None:
        fail("no attachment: an rmw_zenoh subscription would drop the goal")
    sequence = check_attachment(robot, sample, "/goal_pose", POSE)
    if sequence != 1:
        fail(f"the first goal pose has sequence {sequence}")
    return message.pose


def check_place(pose, recording, goal):
    """Odometry is the map of the recording: the pose faces the thing within 25 degrees, from less than 2 m."""
    truth = json.loads(pathlib.Path(recording).with_suffix(".truth.json").read_text())
    named = [o for o in truth["objects"] if o["name"] in goal]
    if len(named) != 1:
        fail(f"{goal!r} names {len(named)} things of the recording")
    dx, dy = named[0]["position"][0] - pose.position.x, named[0]["position"][1] - pose.position.y
    yaw = 2.0 * math.atan2(pose.orientation.z, pose.orientation.w)
    off = math.degrees(math.atan2(dy, dx) - yaw)
    off = abs((off + 180.0) % 360.0 - 180.0)
    far = math.hypot(dx, dy)
    if not (far < 2.0 and off < 25.0):
        at = f"x {pose.position.x:.2f} y {pose.position.y:.2f}"
        fail(f"the pose at {at} is {far:.2f} m from the {named[0]['name']} and looks {off:.0f} degrees past it")


def check_attachment(robot, sample, topic, name):
    """Sequence, time and GID; the GID must be that of the only publisher in the graph, with the right hash."""
    raw = sample.attachment.to_bytes()
    if len(raw) != 33 or raw[16] != 16:
        fail(f"{topic}: attachment {raw.hex()}")
    sequence, stamp = struct.unpack_from("<qq", raw)
    if abs(time.time_ns() - stamp) > 120e9:
        fail(f"{topic}: source stamp {stamp}")
    publishers = [t for t in robot.graph() if t.kind == "MP" and t.topic == topic]
    if len(publishers) != 1:
        fail(f"{len(publishers)} publishers of {topic} in the graph")
    token = publishers[0]
    if token.gid != raw[17:]:
        fail(f"{topic}: GID {raw[17:].hex()} is not that of {token.key}")
    if (token.type, token.hash) != (dds(name), STORE.hash_rihs01(name)):
        fail(f"token {token.key}")
    return sequence


def check_sequences(robot, states):
    """The status comes every second: its numbers follow each other."""
    numbers = [check_attachment(robot, s, "/mindseye/status", TEXT) for s in list(states)]
    if len(numbers) < 3 or any(b != a + 1 for a, b in zip(numbers, numbers[1:])):
        fail(f"sequence numbers of /mindseye/status: {numbers}")


def check_graph(robot, image_topic, node):
    graph = robot.graph()
    nodes = {t.node for t in graph if t.kind == "NN"}
    if nodes != {node}:
        fail(f"nodes of the other side in the graph: {nodes}")
    for kind, topic, name in [
        ("MS", image_topic, IMAGE),
        ("MS", "/camera/camera_info", INFO),
        ("MS", "/odom", ODOM),
        ("MS", "/tf_static", TF),
        ("MS", "/mindseye/goal/text", TEXT),
        ("MP", "/goal_pose", POSE),
        ("MP", "/mindseye/status", TEXT),
    ]:
        rows = [t for t in graph if (t.kind, t.topic) == (kind, topic)]
        if len(rows) != 1:
            fail(f"{len(rows)} of {kind} {topic} in the graph")
        for t in rows:
            if (t.type, t.hash) != (dds(name), STORE.hash_rihs01(name)) or t.qos.count(":") != 5 or t.node != node:
                fail(f"token {t.key}")
            if t.kind == "MS" and t.backends:
                fail(f"token {t.key} claims buffer backends")


if __name__ == "__main__":
    main()
