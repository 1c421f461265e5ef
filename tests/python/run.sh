#!/bin/sh
# 1. A robot written in Python against the real `mindseye run`, three times: rmw_zenoh keys, ros2dds keys, and a camera
#    that sends only when it sees a subscription without buffer backends.
# 2. zenoh-ros2-sdk, an rmw_zenoh implementation of others, against our publishers and subscribers: with Humble's keys, with
#    hashes, and with the tokens of publishers that know buffer backends.
# Usage: run.sh [VENV]. Without the Python packages it says SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/venv.sh"
want "mcap, zenoh, rosbags, xxhash, zenoh_ros2_sdk" -r "$here/requirements.txt"
# What the tests have built; the whole workspace is named so that nothing is built a second time with other features.
cargo build ${MINDSEYE_CARGO_CONFIG:+--config "$MINDSEYE_CARGO_CONFIG"} --release --quiet --locked \
    --manifest-path "$root/Cargo.toml" --workspace --bin mindseye --bin ros_peer
bin=${CARGO_TARGET_DIR:-$root/target}/release
work=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; rm -rf "$work"' EXIT
status=0
for case in "rmw_zenoh plain" "ros2dds plain" "rmw_zenoh buffer-aware"; do
    set -- $case
    port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    cat >"$work/robot.toml" <<END
robot = "python"
[ros]
key_style = "$1"
[ros.zenoh]
connect = []
listen = ["tcp/127.0.0.1:$port"]
[model]
bundle = "$root/models/house-tiny"
END
    : >"$work/log" # what the last one said is no sign that this one is ready
    "$bin/mindseye" run --config "$work/robot.toml" --seconds 120 >"$work/log" 2>&1 &
    pid=$!
    while ! grep -q "Ctrl-C stops" "$work/log" && kill -0 "$pid" 2>/dev/null; do
        sleep 0.1
    done
    if ! "$venv/bin/python" "$here/robot.py" --connect "tcp/127.0.0.1:$port" --style "$1" --camera "$2" \
        --recording "$root/tests/data/runtime/room.mcap" --goal "find the yellow cone" --goal "find the cyan chair" \
        --goal "find the blue box"; then
        status=1
        cat "$work/log"
    fi
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    pid=
done
for distro in humble jazzy lyrical; do
    keys=$distro
    [ "$keys" = lyrical ] && keys=jazzy
    : >"$work/log"
    "$bin/ros_peer" --count 20 --seconds 90 --distro "$keys" >"$work/log" 2>&1 &
    pid=$!
    while ! grep -q "^ready" "$work/log" && kill -0 "$pid" 2>/dev/null; do
        sleep 0.1
    done
    "$venv/bin/python" "$here/rmw_peer.py" "$(sed -n 's/^ready //p' "$work/log")" 20 $distro || status=1
    wait "$pid" || status=1
    pid=
    sed -n '/^ready/!p' "$work/log"
done
exit $status
