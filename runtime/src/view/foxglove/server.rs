//! The WebSocket that Foxglove connects to: subprotocol `foxglove.sdk.v1`. Channels are advertised at the start, and the
//! newest messages of those that are subscribed to are sent; nothing is taken from clients but subscriptions.

use super::channels::{Channels, Topic};
use crate::view::http::{Gate, converse, read_head, refuse, send, websocket_answer};
use crate::view::hub::{Hub, VIEWERS_MAX};
use crate::view::websocket::{Received, binary_frame, text_frame};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// As clients offer it.
const PROTOCOL: &str = "foxglove.sdk.v1";
/// Pages that may connect besides those without an origin: Foxglove's own, and its program on the desk.
pub(super) const ORIGINS: &[&str] = &["https://app.foxglove.dev", "file://"];
/// Subscriptions of one client.
const SUBSCRIPTIONS_MAX: usize = 64;

pub(super) struct Server {
    pub gate: Gate,
    pub hub: Arc<Hub>,
    pub channels: Arc<Channels>,
    pub stop: Arc<AtomicBool>,
}

/// What one client wants: the topic of each subscription, and the messages that it has had.
#[derive(Default)]
struct Subscriptions(BTreeMap<u32, (Topic, u64)>);

impl Server {
    /// Serves one connection.
    pub fn connection(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let Some((head, rest)) = read_head(stream) else {
            return refuse(stream, "400 Bad Request", "this is no request");
        };
        if let Err((status, why)) = self.gate.admits(&head) {
            return refuse(stream, status, why);
        }
        let offered = head.get("sec-websocket-protocol").unwrap_or_default();
        if !offered.split(',').any(|protocol| protocol.trim() == PROTOCOL) {
            let why =
                format!("this address speaks WebSocket, subprotocol {PROTOCOL}: connect to it from Foxglove");
            return refuse(stream, "400 Bad Request", &why);
        }
        let Some(_seat) = self.hub.enter() else {
            let why = format!("there are {VIEWERS_MAX} clients already");
            return refuse(stream, "503 Service Unavailable", &why);
        };
        let Some(answer) = websocket_answer(&head, Some(PROTOCOL)) else {
            return refuse(stream, "400 Bad Request", "this address speaks WebSocket, version 13");
        };
        send(stream, answer.as_bytes())?;
        let mut first = vec![text_frame(&greeting().to_string()), text_frame(&advertisement().to_string())];
        let subscriptions = RefCell::new(Subscriptions::default());
        let mut due = || {
            let mut frames = std::mem::take(&mut first);
            frames.extend(subscriptions.borrow_mut().due(&self.channels));
            frames
        };
        let mut hear = |received| match received {
            Received::Text(text) => {
                let refused = subscriptions.borrow_mut().hear(&text).err();
                refused
                    .map(|why| text_frame(&json!({"op": "status", "level": 1, "message": why}).to_string()))
            }
            _ => None,
        };
        converse(stream, &rest, &self.stop, &mut due, &mut hear)
    }
}

/// The first message of a server.
fn greeting() -> Value {
    let name = format!("mindseye {}", env!("CARGO_PKG_VERSION"));
    json!({"op": "serverInfo", "name": name, "capabilities": []})
}

/// All channels; their numbers are their places.
fn advertisement() -> Value {
    let channel = |(id, topic): (usize, Topic)| {
        let schema = topic.schema();
        json!({
            "id": id,
            "topic": topic.name(),
            "encoding": schema.message_encoding,
            "schemaName": schema.schema_name,
            "schema": STANDARD.encode(schema.schema),
            "schemaEncoding": schema.schema_encoding,
        })
    };
    let channels: Vec<Value> = Topic::ALL.into_iter().enumerate().map(channel).collect();
    json!({"op": "advertise", "channels": channels})
}

impl Subscriptions {
    /// Takes a client's message; why it cannot be taken.
    fn hear(&mut self, text: &str) -> Result<(), String> {
        let wanted: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
        let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        match wanted["op"].as_str() {
            Some("subscribe") => {
                for subscription in wanted["subscriptions"].as_array().into_iter().flatten() {
                    let topic = subscription["channelId"].as_u64().and_then(|id| Topic::ALL.get(id as usize));
                    let Some((id, topic)) = number(&subscription["id"]).zip(topic) else {
                        return Err(format!("no such channel: {subscription}"));
                    };
                    if self.0.len() >= SUBSCRIPTIONS_MAX && !self.0.contains_key(&id) {
                        return Err(format!("at most {SUBSCRIPTIONS_MAX} subscriptions"));
                    }
                    self.0.insert(id, (*topic, 0));
                }
                Ok(())
            }
            Some("unsubscribe") => {
                let ids = wanted["subscriptionIds"].as_array().into_iter().flatten().filter_map(number);
                for id in ids {
                    self.0.remove(&id);
                }
                Ok(())
            }
            // Clients may ask for what was not offered.
            _ => Err("only subscriptions are taken here".into()),
        }
    }

    /// What is to be sent now.
    fn due(&mut self, channels: &Channels) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for (id, (topic, known)) in &mut self.0 {
            for message in channels.newer(*topic, known) {
                let mut content = vec![1]; // message data
                content.extend(id.to_le_bytes());
                content.extend(message.stamp_ns.max(0).to_le_bytes());
                content.extend_from_slice(&message.bytes);
                frames.push(binary_frame(&content));
            }
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_offered_with_their_schemas() {
        let offered = advertisement();
        let channels = offered["channels"].as_array().unwrap();
        assert_eq!(channels.len(), Topic::ALL.len());
        assert_eq!((&channels[6]["id"], &channels[6]["schemaName"]), (&6.into(), &"foxglove.Log".into()));
        let schema = STANDARD.decode(channels[5]["schema"].as_str().unwrap()).unwrap();
        assert_eq!(schema, Topic::Scene.kind().descriptors());
    }

    #[test]
    fn only_what_is_subscribed_to_is_sent() {
        let (channels, mut client) = (Channels::default(), Subscriptions::default());
        channels.put(Topic::Scene, 7, b"scene".to_vec());
        channels.put(Topic::Log, 8, b"one".to_vec());
        assert!(client.due(&channels).is_empty());
        client.hear("{\"op\": \"subscribe\", \"subscriptions\": [{\"id\": 300, \"channelId\": 5}]}").unwrap();
        // By hand: a binary frame of 18 bytes, message data, subscription 300, stamp 7.
        let want = b"\x82\x12\x01\x2c\x01\0\0\x07\0\0\0\0\0\0\0scene".to_vec();
        assert_eq!(client.due(&channels), [want]);
        assert!(client.due(&channels).is_empty(), "once");
        client.hear("{\"op\": \"unsubscribe\", \"subscriptionIds\": [300, 9]}").unwrap();
        channels.put(Topic::Scene, 9, b"scene".to_vec());
        assert!(client.due(&channels).is_empty());
        for bad in [
            "[]",
            "{",
            "{\"op\": \"advertise\"}",
            "{\"op\": \"subscribe\", \"subscriptions\": [{\"id\": 1, \"channelId\": 7}]}",
            "{\"op\": \"subscribe\", \"subscriptions\": [{\"id\": -1, \"channelId\": 0}]}",
        ] {
            assert!(client.hear(bad).is_err(), "{bad}");
        }
    }
}
