"""What is recorded and sent for Foxglove, read with Foxglove's own published schemas and the Python MCAP reader.

Usage: foxglove.py RECORDING | ws://HOST:PORT/
"""

import base64
import importlib
import json
import os
import socket
import struct
import sys
import time

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from mcap.reader import make_reader

KINDS = ["CompressedImage", "PosesInFrame", "SceneUpdate", "Log"]
failures = []


def check(name, value, detail=""):
    print(f"{'ok' if value else 'FAILED'}: {name}{'' if value else f' ({detail})'}", flush=True)
    if not value:
        failures.append(name)


def published(name):
    """The published class of a schema."""
    short = name.removeprefix("foxglove.")
    return getattr(importlib.import_module(f"foxglove_schemas_protobuf.{short}_pb2"), short)


def shape(descriptor, seen):
    """Names, numbers and types of all fields that a message reaches."""
    if descriptor.full_name in seen:
        return
    seen[descriptor.full_name] = sorted(
        (f.number, f.name, f.type, f.is_repeated if hasattr(f, "is_repeated") else f.label == 3,
         f.message_type.full_name if f.message_type else "",
         [(v.name, v.number) for v in f.enum_type.values] if f.enum_type else [])
        for f in descriptor.fields)
    for field in descriptor.fields:
        if field.message_type:
            shape(field.message_type, seen)


def same_schema(name, file_set):
    """Whether the descriptors that came say the same as the published ones."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(file_set).file:
        pool.Add(file)
    ours, theirs = {}, {}
    shape(pool.FindMessageTypeByName(name), ours)
    shape(published(name).DESCRIPTOR, theirs)
    check(f"the schema of {name} is the published one", ours == theirs, f"{ours} != {theirs}")
    # And it is complete: a reader that knows nothing else makes a class of it.
    message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def no_unknown(message):
    """Whether every byte of a message belongs to a field of its schema: what was not known would be lost or kept aside."""
    return message.SerializeToString(deterministic=True) is not None and not unknown_fields(message)


def unknown_fields(message):
    try:
        from google.protobuf.unknown_fields import UnknownFieldSet
        if len(UnknownFieldSet(message)):
            return True
    except ImportError:
        pass
    for field, value in message.ListFields():
        if field.message_type and not field.message_type.GetOptions().map_entry:
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
            if any(unknown_fields(v) for v in (value if repeated else [value])):
                return True
    return False


def is_picture(image):
    return (image.format == "png" and image.data.startswith(b"\x89PNG")) or (
        image.format == "jpeg" and image.data.startswith(b"\xff\xd8"))


def recording(path):
    decoded, schemas = {}, {}
    with open(path, "rb") as file:
        for schema, channel, message in make_reader(file).iter_messages():
            if schema is None or not schema.name.startswith("foxglove."):
                continue
            if schema.name not in schemas:
                check(f"{schema.name} is recorded as protobuf", (schema.encoding, channel.message_encoding) == ("protobuf",) * 2)
                same_schema(schema.name, schema.data)
            schemas[schema.name] = True
            decoded.setdefault(channel.topic, []).append((message.log_time, published(schema.name).FromString(message.data)))
    check("all four schemas are recorded", sorted(schemas) == sorted(f"foxglove.{k}" for k in KINDS), sorted(schemas))
    check("nothing is in them that the schemas do not know", all(no_unknown(m) for all_ in decoded.values() for _, m in all_))
    of = lambda name: [m for _, m in decoded.get(f"/mindseye/foxglove/{name}", [])]
    camera, imagined = of("camera"), of("imagined")
    check("camera pictures", len(camera) >= 10 and all(map(is_picture, camera)), len(camera))
    check("with stamps and frames", all(m.timestamp.seconds > 1e9 and m.frame_id for m in camera))
    times = [t for t, _ in decoded.get("/mindseye/foxglove/camera", [])]
    check("ten a second at most", len(times) < 2 or len(times) <= 11 * (max(times) - min(times)) / 1e9 + 2, len(times))
    check("the imagined drive, picture by picture", len(imagined) >= 10 and all(map(is_picture, imagined)), len(imagined))
    check("the way driven", max((len(m.poses) for m in of("way")), default=0) > 10)
    check("the imagined way", max((len(m.poses) for m in of("imagined_way")), default=0) > 2)
    goals = [m for m in of("goal") if m.poses]
    check("where to stand", goals and goals[0].frame_id == "odom" and abs(
        goals[0].poses[0].orientation.z ** 2 + goals[0].poses[0].orientation.w ** 2 - 1) < 1e-9)
    scene = of("scene")
    ids = {e.id for m in scene for e in m.entities}
    check("the scene has goal, spread, thing, witnesses and way",
          {"goal", "goal, 90 %", "thing", "plan", "memory", "imagined way"} <= ids, ids)
    check("each scene takes the place of the one before", scene and all(m.deletions[0].type == 1 for m in scene))
    lines = [m.message for m in of("log")]
    check("the log says what was asked and answered",
          any(t.startswith("asked: ") for t in lines) and any(t.startswith("answer: found") for t in lines), lines)


class Socket:
    """A client of a WebSocket, as far as it is needed."""

    def __init__(self, host, port, protocol, origin=None):
        self.socket = socket.create_connection((host, port), 20)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["GET / HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade",
                 "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
        lines += [f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []
        lines += [f"Origin: {origin}"] if origin else []
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self.socket.recv(1)
            if not byte:
                break
            head += byte
        self.head = head.decode()

    def exactly(self, n):
        data = b""
        while len(data) < n:
            piece = self.socket.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def read(self):
        first, length = self.exactly(2)
        if length == 126:
            length = struct.unpack(">H", self.exactly(2))[0]
        elif length == 127:
            length = struct.unpack(">Q", self.exactly(8))[0]
        return first & 15, self.exactly(length)

    def send(self, text):
        data, mask = text.encode(), os.urandom(4)
        head = bytes([0x81, 0x80 | len(data)]) if len(data) < 126 else bytes([0x81, 0xFE]) + struct.pack(">H", len(data))
        self.socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))


def live(url):
    host, port = url.split("/")[2].split(":")
    port = int(port)
    check("without the protocol nothing is served", " 400 " in Socket(host, port, None).head.split("\r\n")[0])
    check("pages of other origins are refused",
          " 403 " in Socket(host, port, "foxglove.sdk.v1", "https://evil.example").head.split("\r\n")[0])
    client = Socket(host, port, "other, foxglove.sdk.v1", "https://app.foxglove.dev")
    check("the protocol is agreed on", " 101 " in client.head and "Sec-WebSocket-Protocol: foxglove.sdk.v1\r\n" in client.head,
          client.head)
    info = json.loads(client.read()[1])
    check("the server names itself", info["op"] == "serverInfo" and info["name"].startswith("mindseye") and info["capabilities"] == [])
    offered = json.loads(client.read()[1])
    channels = {c["id"]: c for c in offered["channels"]}
    check("seven channels are offered", offered["op"] == "advertise" and len(channels) == 7)
    for channel in channels.values():
        same_schema(channel["schemaName"], base64.b64decode(channel["schema"]))
    client.send(json.dumps({"op": "subscribe", "subscriptions": [{"id": 100 + i, "channelId": i} for i in channels]}))
    seen, until = set(), time.time() + 60
    wanted = {c["topic"] for c in channels.values()}
    while seen != wanted and time.time() < until:
        opcode, data = client.read()
        if opcode != 2:
            continue
        kind, subscription, stamp = struct.unpack("<BIQ", data[:13])
        channel = channels[subscription - 100]
        message = published(channel["schemaName"]).FromString(data[13:])
        assert kind == 1 and stamp > 1e18 and no_unknown(message)
        seen.add(channel["topic"])
    check("messages of every channel come and are what they claim", seen == wanted, wanted - seen)


(live if sys.argv[1].startswith("ws://") else recording)(sys.argv[1])
print(f"{len(failures)} failed" if failures else "Foxglove's schemas read it all")
sys.exit(1 if failures else 0)
