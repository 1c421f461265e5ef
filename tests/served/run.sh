#!/bin/bash
# Imagination served over a bad network: a robot and a server in network namespaces with two routers between them, 20 ms and
# 1 % loss each way on the line between the routers. A bag is answered by the server as at home; then the server is killed in
# the middle of a goal, and the robot's small model answers and says so.
# Without root, ip or tc, or where namespaces are not allowed, it says SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
bin=${CARGO_TARGET_DIR:-$root/target}/release/mindseye
skip() { echo "SKIP: $1: imagination is not tried over a bad network"; exit 0; }
[ "$(id -u)" = 0 ] || skip "not root"
command -v ip >/dev/null && command -v tc >/dev/null || skip "no ip or no tc (Debian: iproute2)"
command -v python3 >/dev/null || skip "no Python 3"
[ -x "$bin" ] || cargo build --release --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --bin mindseye
n=me$$
server=
clean() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    for side in robot r1 r2 hall; do ip netns del "$n-$side" 2>/dev/null || true; done
    rm -rf "$out"
}
out=$(mktemp -d)
trap clean EXIT
# robot 10.77.1.1 - 10.77.1.2 r1 10.77.2.1 - 10.77.2.2 r2 10.77.3.1 - 10.77.3.2 hall
for side in robot r1 r2 hall; do ip netns add "$n-$side" 2>/dev/null || skip "no network namespaces"; done
in_() { ip netns exec "$n-$1" "${@:2}"; }
wire() {
    ip -n "$n-$1" link add "to-$2" type veth peer name "to-$1" netns "$n-$2" 2>/dev/null || skip "no veth"
    ip -n "$n-$1" addr add "$3/24" dev "to-$2"; ip -n "$n-$2" addr add "$4/24" dev "to-$1"
    ip -n "$n-$1" link set "to-$2" up; ip -n "$n-$2" link set "to-$1" up
}
wire robot r1 10.77.1.1 10.77.1.2
wire r1 r2 10.77.2.1 10.77.2.2
wire r2 hall 10.77.3.1 10.77.3.2
for side in robot r1 r2 hall; do ip -n "$n-$side" link set lo up; done
for side in r1 r2; do in_ "$side" sysctl -qw net.ipv4.ip_forward=1; done
ip -n "$n-robot" route add default via 10.77.1.2
ip -n "$n-r1" route add 10.77.3.0/24 via 10.77.2.2
ip -n "$n-r2" route add 10.77.1.0/24 via 10.77.2.1
ip -n "$n-hall" route add default via 10.77.3.1
in_ r1 tc qdisc add dev to-r2 root netem delay 20ms loss 1% 2>/dev/null || skip "no netem"
in_ r2 tc qdisc add dev to-r1 root netem delay 20ms loss 1%

serve() {
    ip netns exec "$n-hall" "$bin" serve --name hall --listen tcp/10.77.3.2:7447 --connect tcp/127.0.0.1:1 --bundle "$root/models/house-tiny" 2>"$out/serve" &
    server=$!
    for _ in $(seq 200); do grep -q "Ctrl-C stops" "$out/serve" && return; sleep 0.1; done
    echo "FAIL: the server does not start"; cat "$out/serve"; exit 1
}
replay() { # seed, file, and what else
    in_ robot "$bin" replay "$root/tests/data/runtime/house.mcap" --goal "find the red chair" --seed "$1" --json \
        --bundle "$root/models/house-tiny" "${@:3}" >"$out/$2"
}
served="--mind zenoh:hall --connect tcp/10.77.3.2:7447"
serve
for seed in 1 2 3; do
    replay $seed home-$seed
    # shellcheck disable=SC2086
    replay $seed served-$seed $served
done
# shellcheck disable=SC2086
(replay 4 killed $served --fallback "$root/models/house-tiny" --deadline-ms 30000 --candidates 32) &
goal=$!
sleep 4
kill -9 "$server"
server=
wait "$goal" || { echo "FAIL: the goal in the middle of which the server was killed was not answered"; exit 1; }
python3 - "$out" <<'PY'
import json, sys
folder, added = sys.argv[1], []
for seed in (1, 2, 3):
    home, served = (json.load(open(f"{folder}/{side}-{seed}"))["answer"] for side in ("home", "served"))
    at = [answer.pop("timings_ms")["total"] for answer in (home, served)]
    if home != served:
        sys.exit(f"FAIL: another answer over the network: {served}, at home {home}")
    added.append(at[1] - at[0])
killed = json.load(open(f"{folder}/killed"))["answer"]
why = killed["fallback"]
if killed["status"] not in ("found", "not_in_context", "inconsistent") or why is None:
    sys.exit(f"FAIL: not answered by the fallback: {killed}")
print(f"three goals over 2 x 20 ms and 1 % loss: the answers of home, {min(added):.0f} to {max(added):.0f} ms added")
print(f"server killed: {killed['status']} after {killed['timings_ms']['total']:.0f} ms; fallback: {why}")
PY
