#!/usr/bin/env sh
# Writes docs/plans.md: plans of the large model for every target and precision.
set -eu
cd "$(dirname "$0")/.."
mindseye=${MINDSEYE:-target/release/mindseye}
{
    cat <<'TEXT'
# Plans of wan22-5b

Written by `docs/plans.sh` (`mindseye engine plan configs/models/wan22-5b.toml --compare`). Work, weights, activations and state are counted
by running the networks on the counting interpreter; nothing here was measured on the machines. *Context cached* needs weights trained
with the one-way mask, which the published ones are not. *Parts loaded* is what stays in memory between its uses: `all`; `halves` (the
text encoder is unloaded after encoding, of two halves the one in use is loaded); `one` (text encoder, denoiser and decoder take turns).
Loading from disk counts at 2 GB/s in the time of an answer. Times are rooflines at the rates of data sheets (`configs/targets`); the
last column is twice the arithmetic, as real engines reach about half of a roofline.

TEXT
    "$mindseye" engine plan configs/models/wan22-5b.toml --compare
} >docs/plans.md.new
mv docs/plans.md.new docs/plans.md
