//! Reads arbitrary text as metadata.yaml, and as message definitions, whose type hashes it computes.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = bag::parses_as_metadata(text);
    let _ = bag::schema::ros2msg_from_ros1("p/T", text);
    for (name, encoding) in [("p/T", "ros1msg"), ("visualization_msgs/Marker", "ros2msg"), ("std_msgs/Header", "ros1msg")] {
        let mut topic = bag::TopicInfo::new("/t", name, bag::Encoding::Cdr);
        topic.schema = Some(bag::SchemaText { encoding: encoding.into(), data: text.as_bytes().into() });
        topic.offered_qos = text.to_owned();
        let _ = (bag::type_key(&topic, &[]), topic.qos_profiles());
    }
});
