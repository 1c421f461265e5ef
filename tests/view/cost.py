"""What the live page costs the robot: processor time and memory of `mindseye run` without it, with it and no viewer, and
with one viewer, while a bag is played. Standard library only.

Usage: cost.py MINDSEYE BAG [SECONDS] [extra arguments of run, e.g. --foxglove]
"""

import base64
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

mindseye, bag = sys.argv[1:3]
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 15
TICK = os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def used(pid):
    """Processor seconds and resident bytes."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    with open(f"/proc/{pid}/status") as status:
        resident = int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)) * 1024
    return (int(fields[11]) + int(fields[12])) / TICK, resident


class Viewer(threading.Thread):
    """Reads all that comes, as a browser does."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.pictures = self.bytes = 0
        self.socket = socket.create_connection(("127.0.0.1", port), 20)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
        self.start()

    def exactly(self, n):
        data = b""
        while len(data) < n:
            piece = self.socket.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def run(self):
        try:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += self.exactly(1)
            while True:
                first, length = self.exactly(2)
                if length > 125:
                    length = int.from_bytes(self.exactly(2 if length == 126 else 8), "big")
                content = self.exactly(length)
                self.bytes += len(content)
                self.pictures += first & 15 == 2
        except (EOFError, OSError):
            pass


def measure(name, view, watch):
    zenoh, page = free_port(), free_port()
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(f'[ros.zenoh]\nconnect = []\nlisten = ["tcp/127.0.0.1:{zenoh}"]\n')
        config.flush()
        more = [f"--view=127.0.0.1:{page}"] if view else []
        run = subprocess.Popen([mindseye, "run", "--config", config.name, *more, *sys.argv[4:]], stdout=log, stderr=log)
        play = None
        try:
            while "Ctrl-C stops" not in open(log.name).read():
                if run.poll() is not None:
                    sys.exit(open(log.name).read())
                time.sleep(0.1)
            play = subprocess.Popen([mindseye, "bag", "play", bag, "--loop", "--connect", f"tcp/127.0.0.1:{zenoh}"],
                                    stdout=subprocess.DEVNULL, stderr=log)
            time.sleep(4)
            viewer = Viewer(page) if watch else None
            time.sleep(1)
            before, _ = used(run.pid)
            pictures = viewer.pictures if viewer else 0
            began = time.time()
            time.sleep(seconds)
            after, resident = used(run.pid)
            passed = time.time() - began
            share = 100 * (after - before) / passed
            rate = f", {(viewer.pictures - pictures) / passed:.1f} pictures/s" if viewer else ""
            print(f"{name:<28}{share:6.1f} % of a core{resident / 1e6:8.1f} MB{rate}", flush=True)
            return share, resident
        finally:
            for process in filter(None, [play, run]):
                process.terminate()
                process.wait(20)


rows = [measure("without the page", False, False), measure("with the page, no viewer", True, False),
        measure("with one viewer", True, True)]
for name, (share, resident) in zip(["no viewer", "one viewer"], rows[1:]):
    print(f"{name} adds {share - rows[0][0]:+.1f} % of a core and {(resident - rows[0][1]) / 1e6:+.1f} MB")
