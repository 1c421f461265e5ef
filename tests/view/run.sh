#!/bin/sh
# The live page in a real browser: `mindseye demo --view` and `replay --view` in headless Chromium, by the keyboard only;
# then the reports that they wrote, offline.
# Usage: run.sh [FOLDER]. With a folder, screenshots are left there. Without Chromium or Python it says SKIP and ends with
# status 0.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$chromium" ] || ! command -v python3 >/dev/null; then
    echo "SKIP: no Chromium (Debian: chromium) or no Python 3: the page is not tried in a browser"
    exit 0
fi
bin=${CARGO_TARGET_DIR:-$root/target}/release
[ -x "$bin/mindseye" ] || cargo build ${MINDSEYE_CARGO_CONFIG:+--config "$MINDSEYE_CARGO_CONFIG"} --release --quiet --locked --manifest-path "$root/Cargo.toml" --workspace --bin mindseye
exec python3 "$here/browser.py" "$chromium" "$bin/mindseye" "$root" "${1:-}"
