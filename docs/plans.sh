#!/usr/bin/env sh
# Writes the table of docs/plans.md: plans of the large model for every target and precision.
set -eu
cd "$(dirname "$0")/.."
MINDSEYE_WRITE_DOCS=1 cargo test --release -p mindseye-builder --lib the_documented_plans_are_those_of_the_program
