#!/bin/sh
# The Python robot against our side of the wire, three times: rmw_zenoh keys, ros2dds keys, and a camera that sends
# only when it sees a subscription without buffer backends. Usage: run.sh [VENV]. Without the Python packages it says
# SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${1:-$root/target/python}
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" || { echo "SKIP: python3 with venv is not there"; exit 0; }
fi
if ! "$venv/bin/python" -c 'import zenoh, rosbags, xxhash' 2>/dev/null; then
    "$venv/bin/pip" install --quiet -r "$here/requirements.txt" || { echo "SKIP: eclipse-zenoh, rosbags and xxhash cannot be had"; exit 0; }
fi
peer=${ROS_PEER:-}
if [ -z "$peer" ]; then
    cargo build --release --quiet --manifest-path "$root/Cargo.toml" -p mindseye-tests --bin ros_peer
    peer=${CARGO_TARGET_DIR:-$root/target}/release/ros_peer
fi
status=0
for case in "rmw_zenoh plain" "ros2dds plain" "rmw_zenoh buffer-aware"; do
    set -- $case
    log=$(mktemp)
    "$peer" --style "$1" --seconds 60 >"$log" 2>&1 &
    pid=$!
    endpoint=
    for _ in $(seq 100); do
        endpoint=$(sed -n 's/^ready //p' "$log")
        [ -n "$endpoint" ] && break
        sleep 0.1
    done
    if [ -z "$endpoint" ]; then
        echo "FAIL: the peer did not start: $(cat "$log")"
        status=1
    else
        "$venv/bin/python" "$here/robot.py" --connect "$endpoint" --style "$1" --camera "$2" || { status=1; cat "$log"; }
    fi
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    rm -f "$log"
done
exit $status
