#!/bin/sh
# Builds the fuzz targets of bags, images and messages with a stable toolchain and runs them all at the same time, each
# for SECONDS (default 660) at low priority: run.sh [SECONDS]. Only our own code is instrumented (it is compiled into the
# targets), so that the dependencies need no second build. Corpora, logs and what crashes stay in WORK (default
# target/fuzz). A target that crashed is named, and the exit status is 1.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
seconds=${1:-660}
work=${WORK:-$root/target/fuzz}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Copt-level=1 -Cdebug-assertions -Coverflow-checks
    --cfg fuzzing"
targets="bags/rosbag1 bags/mcap bags/sqlite_pages bags/metadata bags/image cdr/cdr cdr/goal"
mkdir -p "$work"
for target in $targets; do
    name=${target#*/}
    # shellcheck disable=SC2086 # the flags are words
    (cd "$here/${target%/*}" && cargo rustc --release --locked --quiet --bin "$name" -- $flags)
    cp "$CARGO_TARGET_DIR/release/$name" "$work/$name"
    mkdir -p "$work/corpus-$name"
done
data=$root/tests/data
find "$data/bags" -name '*.bag' -size -300k -exec cp {} "$work/corpus-rosbag1/" \;
find "$data/bags" "$data/runtime" -name '*.mcap' -size -300k -exec cp {} "$work/corpus-mcap/" \;
find "$data/bags" -name '*.db3' -size -300k -exec cp {} "$work/corpus-sqlite_pages/" \;
find "$data/bags" -name 'metadata.yaml' | while read -r file; do
    cp "$file" "$work/corpus-metadata/$(echo "$file" | cksum | cut -d' ' -f1).yaml"
done
cd "$work"
for target in $targets; do
    name=${target#*/}
    nice -n 15 "./$name" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=2048 -max_len=300000 -print_final_stats=1 \
        -artifact_prefix="crash-$name-" "corpus-$name" >"log-$name" 2>&1 &
    eval "pid_$name=$!"
done
status=0
for target in $targets; do
    name=${target#*/}
    eval "wait \$pid_$name" || { echo "CRASH $name: see $work/log-$name"; status=1; }
    echo "$name: $(sed -n 's/^Done \(.*\)$/\1/p' "log-$name")"
done
exit $status
