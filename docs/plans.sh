#!/usr/bin/env sh
# Writes the plans of docs/plans.md and docs/training.md: the large model on every target, and its fine-tune.
set -eu
cd "$(dirname "$0")/.."
MINDSEYE_WRITE_DOCS=1 cargo test --release -p mindseye-builder --lib the_documented_plans_are_those_of_the_program
MINDSEYE_WRITE_DOCS=1 cargo test --release -p mindseye-train --lib the_documented_training_plans_are_those_of_the_program
