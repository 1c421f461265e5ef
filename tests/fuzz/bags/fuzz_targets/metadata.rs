//! Reads arbitrary text as metadata.yaml, and as message definitions.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");

libfuzzer_sys::fuzz_target!(|text: &str| {
    bag::parses_as_metadata(text);
    let _ = bag::schema::ros2msg_from_ros1("p/T", text);
});
