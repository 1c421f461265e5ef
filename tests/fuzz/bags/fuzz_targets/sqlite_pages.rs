//! Reads arbitrary bytes as the pages of a sqlite3 bag.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");
include!("read.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read(b"SQLite format 3\0", bytes));
