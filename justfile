# Short verbs; the logic is in the tools.

# The main job.
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

# What CI runs.
ci:
    .ci/run

test:
    cargo test --release --workspace

lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps

# Train the first of the six parts of the shipped model's recipe (models/house-tiny/CARD.md has the others) and pack it
# beside the run; it gives poses only after `eval grounding --calibrate`.
train:
    cargo run --release -p mindseye-tools -- train configs/train/house-tiny.toml --out runs/house-tiny
    cargo run --release -p mindseye-tools -- ship runs/house-tiny --config configs/train/house-tiny.toml --out runs/house-tiny/bundle

eval:
    cargo run --release -p mindseye-tools -- eval grounding --houses 200 --seed 900000
    cargo run --release -p mindseye-tools -- eval navigation --houses 100 --seed 900000

bench:
    cargo bench -p mindseye-tests
