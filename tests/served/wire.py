"""A bad line between two network interfaces of this namespace, where the kernel has no netem: what comes in at one goes out
at the other, later or never. Standard library only, needs root.

Usage: wire.py ONE OTHER DELAY_MS LOSS_PERCENT [SEED]
       wire.py plain NAME
The second makes an interface that leads to such a line send whole packets of its own size, and ends.
"""

import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time
from array import array

SIOCETHTOOL = 0x8946
# Checksums and segmentation are left to hardware that is not there: packets would be incomplete and too long.
ETHTOOL_OFF = [0x17, 0x1F, 0x24, 0x2C]  # transmit checksums, TSO, GSO, GRO
LONGEST = 1 << 16


def opened(name):
    side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    side.bind((name, 0))
    for command in ETHTOOL_OFF:
        value = array("B", struct.pack("II", command, 0))
        fcntl.ioctl(side, SIOCETHTOOL, struct.pack("16sP", name.encode(), value.buffer_info()[0]))
    return side


if sys.argv[1] == "plain":
    opened(sys.argv[2])
    sys.exit()
names, (delay_ms, loss_percent) = sys.argv[1:3], map(float, sys.argv[3:5])
draw = random.Random(int(sys.argv[5]) if len(sys.argv) > 5 else 1).random
sides = [opened(name) for name in names]
waiting, order, carried, lost = [], 0, 0, 0
print("carrying", flush=True)
while True:
    left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
    for side in select.select(sides, [], [], left)[0]:
        packet, source = side.recvfrom(LONGEST)
        if source[2] == socket.PACKET_OUTGOING:
            continue
        if draw() * 100 < loss_percent:
            lost += 1
            continue
        order += 1
        other = sides[1 - sides.index(side)]
        heapq.heappush(waiting, (time.monotonic() + delay_ms / 1e3, order, other, packet))
    while waiting and waiting[0][0] <= time.monotonic():
        _, _, other, packet = heapq.heappop(waiting)
        try:
            other.send(packet)
            carried += 1
        except OSError:
            lost += 1
