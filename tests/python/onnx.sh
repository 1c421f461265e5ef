#!/bin/sh
# Quantised graphs of the shipped model in other people's tools: the official ONNX checker and onnxruntime.
# Usage: onnx.sh [VENV]. Without the Python packages it says SKIP and ends with status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$here/venv.sh"
want "numpy, onnx, onnxruntime" numpy onnx onnxruntime
graphs=$(mktemp -d)
trap 'rm -rf "$graphs"' EXIT
MINDSEYE_ONNX_OUT=$graphs cargo test ${MINDSEYE_CARGO_CONFIG:+--config "$MINDSEYE_CARGO_CONFIG"} --release --quiet \
    --manifest-path "$root/Cargo.toml" --workspace --test engine_build -- --ignored --exact write_graphs_for_other_tools
# Values on a rounding boundary may fall either way between two libraries (a step of fp8 is 6 % of its value), and
# 16-bit floats lose some: one part in 20 of the largest value at most.
"$venv/bin/python" "$here/check_onnx.py" "$graphs" --tolerance 5e-2
