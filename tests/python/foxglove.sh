#!/bin/sh
# What `mindseye demo` sends and records for Foxglove, read with Foxglove's published schemas.
# Usage: foxglove.sh [VENV]. Without the Python packages it says SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/venv.sh"
want "mcap, foxglove_schemas_protobuf" mcap==1.6.0 foxglove-schemas-protobuf==0.4.0
bin=${CARGO_TARGET_DIR:-$root/target}/release
[ -x "$bin/mindseye" ] || cargo build ${MINDSEYE_CARGO_CONFIG:+--config "$MINDSEYE_CARGO_CONFIG"} --release --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --bin mindseye
work=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; rm -rf "$work"' EXIT
port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$bin/mindseye" demo --fast --foxglove="127.0.0.1:$port" --out "$work" --bundle "$root/models/house-tiny" >"$work/log" 2>&1 &
pid=$!
# It stays until it is told to end.
until grep -q "channels stay open" "$work/log"; do
    kill -0 "$pid" 2>/dev/null || { cat "$work/log"; exit 1; }
    sleep 0.2
done
status=0
"$venv/bin/python" "$here/foxglove.py" "ws://127.0.0.1:$port/" || status=1
kill -INT "$pid"
wait "$pid" || status=1
pid=
"$venv/bin/python" "$here/foxglove.py" "$work/demo.foxglove.mcap" || status=1
[ "$status" = 0 ] || cat "$work/log"
exit $status
