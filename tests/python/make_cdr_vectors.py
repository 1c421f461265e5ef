"""Writes tests/data/ros/cdr_vectors.txt: messages serialised by the rosbags package (Apache-2.0), an
implementation independent of ours. One line each: case, type, RIHS01 hash, little-endian hex, big-endian hex.
The values are written down once more in tests/tests/ros_cdr.rs. Run with rosbags and numpy installed:

    python3 tests/python/make_cdr_vectors.py > tests/data/ros/cdr_vectors.txt
"""

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

VISION = {
    "vision_msgs/msg/Point2D": "float64 x\nfloat64 y\n",
    "vision_msgs/msg/Pose2D": "vision_msgs/Point2D position\nfloat64 theta\n",
    "vision_msgs/msg/BoundingBox2D": "vision_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n",
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score\n",
    "vision_msgs/msg/ObjectHypothesisWithPose": "vision_msgs/ObjectHypothesis hypothesis\n"
    "geometry_msgs/PoseWithCovariance pose\n",
    "vision_msgs/msg/Detection2D": "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
    "vision_msgs/BoundingBox2D bbox\nstring id\n",
    "vision_msgs/msg/Detection2DArray": "std_msgs/Header header\nvision_msgs/Detection2D[] detections\n",
}

store = get_typestore(Stores.ROS2_JAZZY)
for name, text in VISION.items():
    store.register(get_types_from_msg(text, name))
T = store.types


def header(frame="map"):
    return T["std_msgs/msg/Header"](T["builtin_interfaces/msg/Time"](1764000000, 123456789), frame)


def point(x, y, z):
    return T["geometry_msgs/msg/Point"](x, y, z)


def vector(x, y, z):
    return T["geometry_msgs/msg/Vector3"](x, y, z)


def quaternion():
    return T["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.6, 0.8)


def pose():
    return T["geometry_msgs/msg/Pose"](point(1.5, -2.25, 0.125), quaternion())


def covariance():
    return np.arange(36, dtype=np.float64) / 4


def pose_cov():
    return T["geometry_msgs/msg/PoseWithCovariance"](pose(), covariance())


def twist():
    return T["geometry_msgs/msg/Twist"](vector(0.5, 0.0, 0.0), vector(0.0, 0.0, -0.25))


def transform(child):
    t = T["geometry_msgs/msg/Transform"](vector(1.5, -2.25, 0.125), quaternion())
    return T["geometry_msgs/msg/TransformStamped"](header("odom"), child, t)


pixels = np.arange(24, dtype=np.uint8)
cases = {
    "text": ("std_msgs/msg/String", lambda t: t("find the red chair")),
    "empty_text": ("std_msgs/msg/String", lambda t: t("")),
    "clock": ("rosgraph_msgs/msg/Clock", lambda t: t(T["builtin_interfaces/msg/Time"](-5, 999999999))),
    "pose": ("geometry_msgs/msg/PoseStamped", lambda t: t(header(), pose())),
    "target": ("geometry_msgs/msg/PoseWithCovarianceStamped", lambda t: t(header("odom"), pose_cov())),
    "twist": ("geometry_msgs/msg/Twist", lambda t: twist()),
    "twist_stamped": ("geometry_msgs/msg/TwistStamped", lambda t: t(header("base_link"), twist())),
    "tf": ("tf2_msgs/msg/TFMessage", lambda t: t([transform("base_link"), transform("b")])),
    "odometry": (
        "nav_msgs/msg/Odometry",
        lambda t: t(
            header("odom"),
            "base_link",
            pose_cov(),
            T["geometry_msgs/msg/TwistWithCovariance"](twist(), covariance()),
        ),
    ),
    "path": (
        "nav_msgs/msg/Path",
        lambda t: t(header(), [T["geometry_msgs/msg/PoseStamped"](header(f), pose()) for f in ("map", "", "odom")]),
    ),
    "camera_info": (
        "sensor_msgs/msg/CameraInfo",
        lambda t: t(
            header("cam"),
            480,
            640,
            "plumb_bob",
            np.array([0.1, -0.2, 0.001, 0.002, 0.0]),
            np.arange(9, dtype=np.float64),
            np.arange(9, dtype=np.float64) * 2,
            np.arange(12, dtype=np.float64) * 3,
            1,
            2,
            T["sensor_msgs/msg/RegionOfInterest"](3, 4, 5, 6, True),
        ),
    ),
    "image": ("sensor_msgs/msg/Image", lambda t: t(header("cam"), 2, 4, "rgb8", 0, 12, pixels)),
    "compressed": ("sensor_msgs/msg/CompressedImage", lambda t: t(header("cam"), "jpeg", pixels[:7])),
    "diagnostics": (
        "diagnostic_msgs/msg/DiagnosticArray",
        lambda t: t(
            header(""),
            [
                T["diagnostic_msgs/msg/DiagnosticStatus"](
                    2, "agent", "stale", "hw", [T["diagnostic_msgs/msg/KeyValue"]("age", "1.5")]
                )
            ],
        ),
    ),
    "detections": (
        "vision_msgs/msg/Detection2DArray",
        lambda t: t(
            header("cam"),
            [
                T["vision_msgs/msg/Detection2D"](
                    header("cam"),
                    [
                        T["vision_msgs/msg/ObjectHypothesisWithPose"](
                            T["vision_msgs/msg/ObjectHypothesis"]("chair", 0.875), pose_cov()
                        )
                    ],
                    T["vision_msgs/msg/BoundingBox2D"](
                        T["vision_msgs/msg/Pose2D"](T["vision_msgs/msg/Point2D"](10.5, 20.5), 0.0), 5.0, 6.0
                    ),
                    "g1",
                )
            ],
        ),
    ),
}

for name, (typename, make) in cases.items():
    message = make(T[typename])
    little = bytes(store.serialize_cdr(message, typename, little_endian=True))
    big = bytes(store.serialize_cdr(message, typename, little_endian=False))
    print(name, typename, store.hash_rihs01(typename), little.hex(), big.hex())
