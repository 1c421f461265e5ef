#!/bin/bash
# Imagination served over a bad network: robots and a server in network namespaces, a Zenoh router on either side, and 20 ms and
# 1 % loss each way on the line between the routers. A bag is answered by the server as at home; a server is killed in the middle
# of a goal, and the robot's small model answers and says so; and 32 robots are each answered once while their server is killed
# and begins anew.
# Without root or ip, or where namespaces are not allowed, it says SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
bin=${MINDSEYE:-${CARGO_TARGET_DIR:-$root/target}/release/mindseye}
skip() { echo "SKIP: $1: imagination is not tried over a bad network"; exit 0; }
[ "$(id -u)" = 0 ] || skip "not root"
command -v ip >/dev/null || skip "no ip (Debian: iproute2)"
command -v python3 >/dev/null || skip "no Python 3"
# shellcheck disable=SC2086
cargo_() { command cargo "$@" ${MINDSEYE_CARGO_CONFIG:+--config "$MINDSEYE_CARGO_CONFIG"}; }
[ -x "$bin" ] || cargo_ build --release --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --bin mindseye
fleet=${MINDSEYE_IT:-$(cargo_ test --release --locked --no-run --message-format=json --manifest-path "$root/Cargo.toml" --workspace \
    --test it 2>/dev/null | python3 -c '
import json, sys
lines = [json.loads(line) for line in sys.stdin if line.startswith("{")]
print(next(l["executable"] for l in lines if l.get("executable") and l["target"]["name"] == "it"))')}
n=me$$
jobs=()
clean() {
    for job in "${jobs[@]}"; do { kill -9 "$job" && wait "$job"; } 2>/dev/null || true; done
    for side in robot r1 line r2 hall; do ip netns del "$n-$side" 2>/dev/null || true; done
    rm -rf "$out"
}
out=$(mktemp -d)
trap clean EXIT
# robot 10.77.1.1 - 10.77.1.2 r1 10.77.2.1 - line - 10.77.2.2 r2 10.77.3.2 - 10.77.3.1 hall; a Zenoh router in r1 and r2
for side in robot r1 line r2 hall; do ip netns add "$n-$side" 2>/dev/null || skip "no network namespaces"; done
in_() { ip netns exec "$n-$1" "${@:2}"; }
wire() { # one side and its address, the other and its
    ip -n "$n-$1" link add "to-$3" type veth peer name "to-$1" netns "$n-$3" 2>/dev/null || skip "no veth"
    [ -z "$2" ] || ip -n "$n-$1" addr add "$2/24" dev "to-$3"
    [ -z "$4" ] || ip -n "$n-$3" addr add "$4/24" dev "to-$1"
    ip -n "$n-$1" link set "to-$3" up; ip -n "$n-$3" link set "to-$1" up
}
wire robot 10.77.1.1 r1 10.77.1.2
wire r1 10.77.2.1 line ""
wire line "" r2 10.77.2.2
wire r2 10.77.3.2 hall 10.77.3.1
for side in robot r1 line r2 hall; do ip -n "$n-$side" link set lo up; done
for side in r1 r2; do in_ "$side" python3 "$here/wire.py" plain to-line || skip "no raw sockets"; done
ip netns exec "$n-line" python3 "$here/wire.py" to-r1 to-r2 20 1 >"$out/wire" 2>&1 </dev/null &
jobs+=($!)
for _ in $(seq 100); do grep -q carrying "$out/wire" && break; sleep 0.1; done
grep -q carrying "$out/wire" || { cat "$out/wire"; skip "no raw sockets"; }

beside() { # side, role
    MINDSEYE_IT_BESIDE=$2 ip netns exec "$n-$1" "$fleet" --ignored --exact served::beside >"$out/$1" 2>&1 </dev/null &
    jobs+=($!)
}
beside r2 "router tcp/10.77.3.2:7447,tcp/10.77.2.2:7447"
beside r1 "router tcp/10.77.1.2:7447 tcp/10.77.2.2:7447"

serve() {
    ip netns exec "$n-hall" "$bin" serve --name hall --connect tcp/10.77.3.2:7447 --bundle "$root/models/house-tiny" \
        >/dev/null 2>"$out/serve" </dev/null &
    server=$!
    jobs+=("$server")
    for _ in $(seq 200); do grep -q "Ctrl-C stops" "$out/serve" && return; sleep 0.1; done
    echo "FAIL: the server does not start"; cat "$out/serve"; exit 1
}
replay() { # seed, file, and what else
    in_ robot "$bin" replay "$root/tests/data/runtime/house.mcap" --goal "find the red chair" --seed "$1" --json \
        --bundle "$root/models/house-tiny" "${@:3}" >"$out/$2"
}
served="--mind zenoh:hall --connect tcp/10.77.1.2:7447"
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
{ kill -9 "$server" && wait "$server"; } 2>/dev/null || true
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
if killed["timings_ms"]["total"] > 30000:
    sys.exit(f"FAIL: answered too late: {killed}")
print(f"three goals over 2 x 20 ms and 1 % loss: the answers of home, {min(added):.0f} to {max(added):.0f} ms added")
print(f"server killed: {killed['status']} after {killed['timings_ms']['total']:.0f} ms; fallback: {why}")
PY
in_ robot env MINDSEYE_FLEET_ROBOTS=tcp/10.77.1.2:7447 MINDSEYE_FLEET_SERVER=tcp/10.77.3.2:7447 \
    MINDSEYE_FLEET_VIA="nsenter --net=/run/netns/$n-hall" "$fleet" --ignored --exact --nocapture \
    served::a_fleet_is_answered_while_its_server_dies_and_comes_back | grep -E "robots,|panicked|robot [0-9]|^test result"
