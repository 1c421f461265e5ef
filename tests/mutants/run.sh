#!/usr/bin/env bash
# Mutations of the code that computes what is printed and what the robot is given, found by cargo-mutants instead of thought
# up as in tests/faults: each changed line is built and tested on its own. Slow (hours: one build of two crates for each of
# some hundred mutants), so not part of CI.
#
#   tests/mutants/run.sh                 all of them; needs `cargo install cargo-mutants`
#   tests/mutants/run.sh --list          what would be changed
#   tests/mutants/run.sh --shard 0/20    the first twentieth; any other option of cargo-mutants, too
#
# Survivors go to mutants.out/missed.txt. A survivor is a test that is missing, unless reasons.txt beside this script names it
# with the reason why nothing can tell it from the right code; the script fails on any other.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
cargo mutants --version > /dev/null 2>&1 || { echo "cargo-mutants is not installed: cargo install cargo-mutants"; exit 2; }

files=(
    tools/src/eval/judge.rs
    tools/src/eval/stats.rs
    tools/src/eval/grounding/calibrate.rs
    tools/src/eval/grounding/figures.rs
    tools/src/eval/grounding/odometry.rs
    runtime/src/lift.rs
)
args=()
for file in "${files[@]}"; do args+=(--file "$file"); done
# The library tests of the two crates, and the answers by hand: what should tell a mutant from the code.
status=0
cargo mutants --no-shuffle --profile release "${args[@]}" --test-package mindseye --test-package mindseye-tools "$@" -- \
    --lib --test it || status=$?
# 2: mutants survived; anything else but 0 is a failure of its own.
[ $status -eq 0 ] || [ $status -eq 2 ] || exit $status
[ -e mutants.out/missed.txt ] || exit 0
new=$(grep -vxFf <(sed 's/ *#.*//; /^$/d' "$here/reasons.txt") mutants.out/missed.txt || true)
[ -z "$new" ] || { echo "survived, without a reason in reasons.txt:"; echo "$new"; exit 1; }
