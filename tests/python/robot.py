"""Plays a ROS 2 robot without ROS: a camera, odometry and a goal over Zenoh, as rmw_zenoh or zenoh-bridge-ros2dds
would put them on the wire. Messages are made and read by the rosbags package, keys and tokens by this file.

    robot.py --connect tcp/127.0.0.1:7447 [--style rmw_zenoh|ros2dds] [--camera plain|buffer-aware]
             [--expect pose|answer] [--goal "find the red chair"] [--seconds 30]

--expect pose: the other side must publish /goal_pose; its key, hash, attachment (sequence, GID) and its node and
topics in the liveliness graph are checked. --expect answer: it must publish a JSON answer on /mindseye/status.
Exit status 0 and a last line "ok ..." when everything holds, else 1 and what does not.
"""

import argparse
import json
import struct
import sys
import threading
import time
import zlib

import numpy as np
import xxhash
import zenoh
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
T = STORE.types
IMAGE = "sensor_msgs/msg/CompressedImage"
ODOM = "nav_msgs/msg/Odometry"
INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"
TEXT = "std_msgs/msg/String"


def dds(name):
    pkg, kind, last = name.split("/")
    return f"{pkg}::{kind}::dds_::{last}_"


def fail(what):
    print(f"FAIL {what}", flush=True)
    sys.exit(1)


def png(width, height, phase):
    """A picture with moving stripes, so that frames differ."""
    x = np.arange(width)[None, :, None]
    y = np.arange(height)[:, None, None]
    c = np.arange(3)[None, None, :]
    rgb = ((x * 3 + y * 2 + c * 80 + phase * 7) % 256).astype(np.uint8)
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


def header(frame):
    now = time.time_ns()
    return T["std_msgs/msg/Header"](T["builtin_interfaces/msg/Time"](now // 10**9, now % 10**9), frame)


def odometry(x):
    point = T["geometry_msgs/msg/Point"](x, 0.0, 0.0)
    turn = T["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    pose = T["geometry_msgs/msg/Pose"](point, turn)
    zero = T["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
    flat = np.zeros(36)
    return T[ODOM](
        header("odom"),
        "base_link",
        T["geometry_msgs/msg/PoseWithCovariance"](pose, flat),
        T["geometry_msgs/msg/TwistWithCovariance"](T["geometry_msgs/msg/Twist"](zero, zero), flat),
    )


def camera_info(width, height):
    k = np.array([width, 0, width / 2, 0, width, height / 2, 0, 0, 1], dtype=np.float64)
    p = np.array([width, 0, width / 2, 0, 0, width, height / 2, 0, 0, 0, 1, 0], dtype=np.float64)
    roi = T["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return T[INFO](
        header("camera_optical_frame"), height, width, "plumb_bob", np.zeros(5), k, np.eye(3).ravel(), p, 0, 0, roi
    )


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--connect", required=True)
    args.add_argument("--style", choices=["rmw_zenoh", "ros2dds"], default="rmw_zenoh")
    args.add_argument("--camera", choices=["plain", "buffer-aware"], default="plain")
    args.add_argument("--expect", choices=["pose", "answer"], default="pose")
    args.add_argument("--goal", default="find the red chair")
    args.add_argument("--seconds", type=float, default=30.0)
    args.add_argument("--size", default="96x64")
    args = args.parse_args()
    width, height = (int(v) for v in args.size.split("x"))

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
        goal_pub = robot.publisher("/mindseye/goal/text", TEXT)
        poses, answers = [], []
        robot.endpoint("MS", "/goal_pose", POSE, "::,10:,:,:,,")
        subs = [
            session.declare_subscriber(robot.key("/goal_pose", POSE, any_hash=True), poses.append),
            session.declare_subscriber(robot.key("/mindseye/status", TEXT, any_hash=True), answers.append),
        ]

        def answer():
            for s in list(answers):
                text = STORE.deserialize_cdr(s.payload.to_bytes(), TEXT).data
                try:
                    found = json.loads(text)
                except ValueError:
                    fail(f"/mindseye/status carries no JSON: {text[:200]}")
                for candidate in (found, found.get("answer"), found.get("last_answer")):
                    if isinstance(candidate, dict) and "goal_id" in candidate and "status" in candidate:
                        return candidate
            return None

        sent = skipped = 0
        asked_at = -10.0
        start = time.monotonic()
        done = None
        while done is None:
            now = time.monotonic() - start
            if now > args.seconds:
                fail(f"no {args.expect} within {args.seconds} s ({sent} frames sent, {skipped} not wanted)")
            odom_pub(odometry(0.1 * now))
            info_pub(camera_info(width, height))
            if robot.camera_is_wanted(image_topic):
                data = np.frombuffer(png(width, height, sent), dtype=np.uint8)
                image_pub(T[IMAGE](header("camera_optical_frame"), "png", data))
                sent += 1
            else:
                skipped += 1
            if sent >= 5 and now - asked_at > 5.0:
                asked_at = now
                goal_pub(T[TEXT](args.goal))
            time.sleep(0.1)
            if args.expect == "pose" and poses:
                done = poses[0]
            elif args.expect == "answer":
                done = answer()
        if args.expect == "pose":
            check_pose(robot, done)
        if args.style == "rmw_zenoh":
            check_graph(robot, image_topic)
        what = done if isinstance(done, dict) else str(done.key_expr)
        print(f"ok {args.style} {args.camera} {args.expect}: {sent} frames, {skipped} not wanted, {what}", flush=True)
        del subs


def check_pose(robot, sample):
    message = STORE.deserialize_cdr(sample.payload.to_bytes(), POSE)
    q = message.pose.orientation
    norm = (q.x**2 + q.y**2 + q.z**2 + q.w**2) ** 0.5
    if message.header.frame_id not in ("map", "odom") or abs(norm - 1) > 1e-6 or (q.x, q.y) != (0.0, 0.0):
        fail(f"goal pose is not planar in map or odom: {message}")
    if robot.style == "ros2dds":
        if str(sample.key_expr) != "goal_pose":
            fail(f"key {sample.key_expr}")
        return
    want = f"0/goal_pose/{dds(POSE)}/{STORE.hash_rihs01(POSE)}"
    if str(sample.key_expr) != want:
        fail(f"key {sample.key_expr}, wanted {want}")
    if sample.attachment is None:
        fail("no attachment: an rmw_zenoh subscription would drop the goal")
    raw = sample.attachment.to_bytes()
    if len(raw) != 33 or raw[16] != 16:
        fail(f"attachment {raw.hex()}")
    sequence, stamp = struct.unpack_from("<qq", raw)
    if sequence != 1 or abs(time.time_ns() - stamp) > 60e9:
        fail(f"attachment: sequence {sequence}, stamp {stamp}")
    publishers = [t for t in robot.graph() if t.kind == "MP" and t.topic == "/goal_pose"]
    if len(publishers) != 1:
        fail(f"{len(publishers)} publishers of /goal_pose in the graph")
    token = publishers[0]
    if token.gid != raw[17:]:
        fail(f"GID {raw[17:].hex()} is not that of {token.key}")
    if (token.type, token.hash) != (dds(POSE), STORE.hash_rihs01(POSE)):
        fail(f"token {token.key}")


def check_graph(robot, image_topic):
    graph = robot.graph()
    nodes = {t.node for t in graph if t.kind == "NN"}
    if not nodes:
        fail("no node of the other side in the graph")
    for kind, topic, name in [
        ("MS", image_topic, IMAGE),
        ("MS", "/odom", ODOM),
        ("MS", "/mindseye/goal/text", TEXT),
        ("MP", "/goal_pose", POSE),
    ]:
        rows = [t for t in graph if (t.kind, t.topic) == (kind, topic)]
        if not rows:
            fail(f"no {kind} {topic} in the graph")
        for t in rows:
            if (t.type, t.hash) != (dds(name), STORE.hash_rihs01(name)) or t.qos.count(":") != 5:
                fail(f"token {t.key}")


if __name__ == "__main__":
    main()
