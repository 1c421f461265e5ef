#!/usr/bin/env bash
# Builds mindseye-tools with libtorch beside its own interpreter, on a machine with Rust, a C++ compiler and pip:
#
#   tools/train/torch/build.sh            # -> tools/train/torch/target/release/mindseye-tools
#   tools/train/torch/build.sh test       # its tests: trains, is killed, goes on, ships, is evaluated
#   tools/train/torch/build.sh test --no-default-features     # those of the interpreter alone: a tenth of the time
#
# libtorch is that of PyTorch 2.11.0, which tch 0.24 binds and no other: the package `torch` that MINDSEYE_LIBTORCH names
# (of an installed PyTorch: python3 -c 'import torch; print(torch.__path__[0])'), or else the wheels of PyPI (530 MB),
# unpacked below target/. The program finds it where it was built; elsewhere LD_LIBRARY_PATH names its folder lib.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
version=2.11.0
target=${CARGO_TARGET_DIR:-$PWD/target}
if [ -n "${MINDSEYE_LIBTORCH:-}" ]; then
    torch=$(realpath -m "$MINDSEYE_LIBTORCH")
else
    torch=$target/libtorch/torch
    if [ ! -e "$torch/lib/libtorch_cpu.so" ]; then
        mkdir -p "$target/libtorch"
        wheels=$(mktemp -d "$target/wheels.XXXX")
        trap 'rm -rf "$wheels"' EXIT
        # libtorch_cpu.so asks for the last two even where there is no GPU.
        python3 -m pip download --quiet --no-deps --disable-pip-version-check -d "$wheels" \
            "torch==$version" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
        for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$target/libtorch"; done
    fi
fi
found=$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$torch/version.py" 2>/dev/null || true)
if [ ! -e "$torch/lib/libtorch_cpu.so" ] || [ "$found" != "$version" ]; then
    echo "error: $torch is not PyTorch $version (found: ${found:-none}); name one with MINDSEYE_LIBTORCH" >&2
    exit 1
fi

# Libraries of CUDA are opened when a device asks for them: what is linked has none.
view=$target/link
rm -rf "$view" && mkdir -p "$view/lib"
ln -s "$torch/include" "$view/include"
ln -s "$torch"/lib/libtorch.so "$torch"/lib/libtorch_cpu.so "$torch"/lib/libc10.so "$view/lib/"
export LIBTORCH=$view LIBTORCH_BYPASS_VERSION_CHECK=1 MINDSEYE_LIBTORCH_LIB=$torch/lib
if [ $# = 0 ]; then
    cargo build --release
    echo "$target/release/mindseye-tools"
else
    release=--release
    [ "$1" = bench ] && release=
    cargo "$1" $release "${@:2}"
fi
