#!/bin/sh
# Builds (several minutes the first time) and runs the exchange with hiroz.
set -eu
cd "$(dirname "$0")"
exec cargo run --release --locked
