//! Reads arbitrary bytes as rosbag v2.0.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");
include!("read.rs");

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| read(b"#ROSBAG V2.0\n", bytes));
