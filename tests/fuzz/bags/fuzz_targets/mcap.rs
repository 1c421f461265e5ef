//! Reads arbitrary bytes as MCAP.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");
include!("read.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read(b"\x89MCAP0\r\n", bytes));
