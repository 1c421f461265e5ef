//! Recorded bags.

pub mod schema;
mod writer;

pub use writer::{ChannelId, ForeignSchema, McapWriter, WriteBagError, offered_qos};
