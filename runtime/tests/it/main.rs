//! Integration tests of the runtime, in one binary. Most run against a fake model (named so), because they are
//! about threads, topics and deadlines; those in `shipped` need the bundle of the repository.

#![allow(clippy::unwrap_used)] // tests may

mod bags;
mod by_hand;
mod detector;
mod engine;
mod fake;
mod flat;
mod links;
mod node;
mod served;
mod shipped;
#[cfg(feature = "top")]
mod top;
#[cfg(feature = "view")]
mod view;
