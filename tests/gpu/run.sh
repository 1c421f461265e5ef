#!/usr/bin/env bash
# Everything that is measured on a machine with a GPU, in the order of its worth, each part with a limit of its own.
# Nothing is downloaded, and nothing needs to be installed but a driver (555 or newer); cuBLASLt is used where it is found.
#
#   cargo build --release -p mindseye-tests --bin gpu     # where the sources are compiled
#   tests/gpu/run.sh                                      # where the GPU is
#   tests/gpu/run.sh --rehearse                           # anywhere: every step on the CPU, in small
#   tests/gpu/run.sh --rehearse --whole                   # and the shipped model at its whole size (minutes)
#
# With the program itself (cargo build --release) a whole goal is asked, too.
#
# Output goes to $OUT, or to docs/gpu/ of this tree: one JSON document by card and date, and the log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rehearse=false
whole=
for argument in "$@"; do
    case $argument in
        --rehearse) rehearse=true ;;
        --whole) whole=--whole ;;
        *)
            echo "$argument is not known: --rehearse and --whole are"
            exit 2
            ;;
    esac
done
out=${OUT:-docs/gpu}
$rehearse && out=$(mktemp -d)
mkdir -p "$out"
date=$(date -u +%Y-%m-%d)
failed=0

# part SECONDS NAME COMMAND...: runs a command with a limit; what fails does not keep the next from running.
part() {
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    printf '\n== %s (at %ss, at most %ss)\n' "$name" "$SECONDS" "$limit"
    timeout "$limit" "$@" 2>&1 | tee -a "$out/$card-$date.log"
    local code=${PIPESTATUS[0]}
    printf '== %s: status %s after %ss\n' "$name" "$code" "$((SECONDS - began))"
    [ "$code" = 0 ] || failed=1
}

if $rehearse; then
    card=rehearsal
    arguments=(--small $whole)
    driver=$(mktemp -d)
    if ! command -v g++ >/dev/null; then
        echo "SKIP: g++ is missing, which compiles the emulator"
        exit 0
    fi
    g++ -O2 -std=c++17 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas -I engines/src/cuda/kernels \
        -I tests/cuda-emulator -o "$driver/libcuda.so.1" tests/cuda-emulator/driver.cpp || exit 1
    # A fake of cuBLASLt, so that its calls are rehearsed, too.
    g++ -O2 -std=c++17 -shared -fPIC -fvisibility=hidden -o "$driver/libcublasLt.so.13" \
        tests/cuda-emulator/cublaslt.cpp || exit 1
    export MINDSEYE_CUDA_LIBRARY="$driver"
else
    arguments=()
    if ! command -v nvidia-smi >/dev/null; then
        echo "no nvidia-smi: this machine has no GPU; --rehearse needs none"
        exit 1
    fi
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -cs '[:alnum:]' '-' | sed 's/-*$//')
fi
gpu=${MINDSEYE_GPU_PROGRAM:-target/release/gpu}
if [ ! -x "$gpu" ]; then
    echo "no $gpu: build it with cargo build --release -p mindseye-tests --bin gpu"
    exit 1
fi

# Part 1: inference.
if ! $rehearse; then
    part 10 "the card" nvidia-smi
fi
limit=300
[ -n "$whole" ] && limit=1800
part $limit "kernels, the shipped model, blocks of the large one" "$gpu" "${arguments[@]}" --out "$out/$card-$date.json"
mindseye=${MINDSEYE_PROGRAM:-target/release/mindseye}
if [ -x "$mindseye" ]; then
    part 60 "doctor" "$mindseye" doctor
    part 120 "the large model's memory" "$mindseye" engine plan configs/models/wan22-5b.toml --backend cuda
    if $rehearse; then
        echo "SKIP: a whole goal of the shipped model takes too long in the emulator"
    else
        goal=$(mktemp -d)
        part 60 "a whole goal by rten" "$mindseye" demo --fast --json --out "$goal"
        part 60 "the same goal by cuda" "$mindseye" demo --fast --json --out "$goal" --backend cuda
        part 60 "the same goal by cuda again" "$mindseye" demo --fast --json --out "$goal" --backend cuda
    fi
else
    echo "SKIP: no $mindseye; no whole goal was asked"
fi
python=${PYTHON:-python3}
if "$python" -c 'import torch' 2>/dev/null; then
    if $rehearse; then
        part 60 "the large model's blocks in PyTorch" "$python" tests/gpu/anchor_dit.py --small --device cpu
    else
        part 60 "the large model in PyTorch" "$python" tests/gpu/anchor_dit.py
        part 120 "the large model in compiled PyTorch" "$python" tests/gpu/anchor_dit.py --compile
    fi
else
    echo "SKIP: $python has no torch; nothing to compare with"
fi

# Part 2: training by libtorch, stopped when its time is up; what it has learnt by then is shipped and evaluated.
trainer=${MINDSEYE_TORCH_PROGRAM:-tools/train/torch/target/release/mindseye-tools}
config=${MINDSEYE_TRAIN_CONFIG:-configs/train/house-tiny-gpu.toml}
train() {
    timeout --signal=TERM "$1" "$trainer" train "$config" --out "$run" --device "$2" "${@:3}"
    local code=$?
    [ "$code" = 124 ] || return "$code"
}
export -f train
run=$out/run bundle=$out/bundle
export trainer config run
if [ ! -x "$trainer" ]; then
    echo "SKIP: no $trainer: build it with tools/train/torch/build.sh; nothing is trained"
else
    if $rehearse; then
        # Two steps of the same recipe, then as many of the smallest model as the time allows.
        part 300 "two steps of training" bash -c 'train 290 cpu --init models/house-tiny --until 2'
        part 60 "what was learnt, as a bundle" "$trainer" ship "$run" --config "$config" --out "$bundle"
        config=tests/data/train/train.toml run=$out/smallest-run bundle=$out/smallest
        part 120 "training, in small" bash -c 'train 100 cpu'
        houses=2
    else
        part 540 "training" bash -c 'train 520 cuda:0 --init models/house-tiny'
        houses=50
    fi
    part 60 "what was learnt, as a bundle" "$trainer" ship "$run" --config "$config" --out "$bundle"
    part 240 "goals in unseen houses" "$trainer" eval grounding --bundle "$bundle" --houses $houses --quick
fi

printf '\nwritten to %s\n' "$out"
exit $failed
