"""PoseStamped and Image both ways between `ros_peer` (our side) and zenoh-ros2-sdk of ROBOTIS, an rmw_zenoh
implementation that others wrote: its keys, type hashes, CDR (by rosbags), attachments, liveliness tokens and discovery.

    rmw_peer.py tcp/127.0.0.1:7447 [COUNT] [humble|jazzy|lyrical]

humble: no type hashes, `TypeHashNotSupported` in their place. jazzy: hashes that the SDK computes. lyrical: publishers that
know buffer backends: another chunk at the end of their tokens, and images on the plain key only while the graph holds a
subscription without such a chunk.

ros_peer gives back what it gets. Exit status 0 and a last line "ok ..." when every message came back whole and the other
implementation's discovery finds our topics with its own hashes, else 1 and what does not hold.
"""

import os
import pathlib
import sys
import tempfile
import threading
import time
import types

import numpy as np
import zenoh
import zenoh_ros2_sdk.publisher
from zenoh_ros2_sdk import ROS2Publisher, ROS2Subscriber
from zenoh_ros2_sdk.message_registry import get_registry
from zenoh_ros2_sdk.session import ZenohSession

# The SDK looks for congestion control where zenoh had it once, and would drop pictures on a busy machine.
zenoh.qos = types.SimpleNamespace(CongestionControl=zenoh.CongestionControl)

# The SDK fetches definitions from the network unless it finds them in a directory.
DEFINITIONS = {
    "builtin_interfaces/msg/Time": "int32 sec\nuint32 nanosec\n",
    "std_msgs/msg/Header": "builtin_interfaces/Time stamp\nstring frame_id\n",
    "geometry_msgs/msg/Point": "float64 x\nfloat64 y\nfloat64 z\n",
    "geometry_msgs/msg/Quaternion": "float64 x 0\nfloat64 y 0\nfloat64 z 0\nfloat64 w 1\n",
    "geometry_msgs/msg/Pose": "Point position\nQuaternion orientation\n",
    "geometry_msgs/msg/PoseStamped": "std_msgs/Header header\nPose pose\n",
    "sensor_msgs/msg/Image": "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\n"
    "uint8 is_bigendian\nuint32 step\nuint8[] data\n",
}
POSE, IMAGE = "geometry_msgs/msg/PoseStamped", "sensor_msgs/msg/Image"


def fail(what):
    print(f"FAIL {what}", flush=True)
    os._exit(1)


def wait(what, done, seconds=30):
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            fail(f"{what} did not happen within {seconds} s")
        time.sleep(0.05)


def main():
    host, port = sys.argv[1].removeprefix("tcp/").rsplit(":", 1)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    distro = sys.argv[3] if len(sys.argv) > 3 else "jazzy"
    hashed = {"type_hash": "TypeHashNotSupported"} if distro == "humble" else {}
    if distro == "lyrical":
        plain = zenoh_ros2_sdk.publisher.endpoint_liveliness_keyexpr
        zenoh_ros2_sdk.publisher.endpoint_liveliness_keyexpr = lambda end: plain(end) + "/backends:cpu:"
    place = pathlib.Path(tempfile.mkdtemp())
    for name, text in DEFINITIONS.items():
        file = place / f"{name}.msg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    session = ZenohSession.get_instance(host, int(port))
    get_registry(str(place))
    there = {"router_ip": host, "router_port": int(port), **hashed}
    got = {POSE: [], IMAGE: []}
    more = threading.Condition()

    def taker(name):
        def take(message):
            with more:
                got[name].append(message)
                more.notify_all()

        return take

    subs = [
        ROS2Subscriber("/ours/pose", POSE, taker(POSE), **there),
        ROS2Subscriber("/ours/image", IMAGE, taker(IMAGE), **there),
    ]
    pubs = {
        POSE: ROS2Publisher("/theirs/pose", POSE, **there),
        IMAGE: ROS2Publisher("/theirs/image", IMAGE, **there),
    }

    def graph():
        replies = session.liveliness.get("@ros2_lv/0/**")
        return [str(r.ok.key_expr) for r in replies if r.ok is not None]

    def ours():
        keys = [k for k in graph() if f"/{session.session_id}/" not in k]
        wanted = [("MP", "%ours%pose"), ("MP", "%ours%image"), ("MS", "%theirs%pose"), ("MS", "%theirs%image")]
        return keys, [w for w in wanted if not any(f"/{w[0]}/" in k and f"/{w[1]}/" in k for k in keys)]

    wait("discovery of our endpoints", lambda: not ours()[1])
    for key in ours()[0]:
        for name, pub in pubs.items():
            # The hash that the SDK computed from the definitions, and not ours, is what must be in our tokens.
            if f"/{pub.dds_type_name}/" in key and f"/{pub.type_hash}/" not in key:
                fail(f"{key} does not carry {pub.type_hash}")
        if "/MS/" in key and key.split("/")[-1].startswith("backends:"):
            fail(f"{key} names buffer backends: publishers that know them would not send us anything")
    if distro == "humble" and any(pub.type_hash != "TypeHashNotSupported" for pub in pubs.values()):
        fail("the SDK put a hash where Humble has none")
    # The routes that the declarations opened are found within a moment.
    time.sleep(1.0)

    t = session.store.types
    header = lambda i: t["std_msgs/msg/Header"](t["builtin_interfaces/msg/Time"](12 + i, 34), "map")
    pixels = np.arange(240 * 960, dtype=np.uint64)
    for i in range(count):
        point = t["geometry_msgs/msg/Point"](float(i), -1.5, 0.25)
        turn = t["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.6, 0.8)
        pubs[POSE].publish(header=header(i), pose=t["geometry_msgs/msg/Pose"](point, turn))
        data = ((pixels + i) % 251).astype(np.uint8)
        picture = dict(height=240, width=320, encoding="rgb8", is_bigendian=0, step=960, data=data)
        pubs[IMAGE].publish(header=header(i), **picture)
        with more:
            if not more.wait_for(lambda: len(got[POSE]) > i and len(got[IMAGE]) > i, timeout=20):
                fail(f"message {i} did not come back: {len(got[POSE])} poses, {len(got[IMAGE])} images")
        pose, image = got[POSE][i], got[IMAGE][i]
        p, q = pose.pose.position, pose.pose.orientation
        if (p.x, p.y, p.z, q.x, q.y, q.z, q.w) != (float(i), -1.5, 0.25, 0.0, 0.0, 0.6, 0.8):
            fail(f"pose {i} came back as {pose}")
        for message in (pose, image):
            head = message.header
            if (head.stamp.sec, head.stamp.nanosec, head.frame_id) != (12 + i, 34, "map"):
                fail(f"header {i} came back as {head}")
        if any(getattr(image, k) != v for k, v in picture.items() if k != "data"):
            fail(f"image {i} came back with other fields")
        if not np.array_equal(image.data, data):
            fail(f"image {i} came back with other pixels")
    print(f"ok zenoh-ros2-sdk as {distro}: {count} PoseStamped and {count} Image (230 kB) there and back", flush=True)
    del subs
    # The SDK's session keeps the interpreter from ending.
    os._exit(0)


if __name__ == "__main__":
    main()
