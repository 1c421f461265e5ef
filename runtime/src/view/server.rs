//! The page's files and its WebSocket.

use super::http::{Gate, Head, converse, read_head, refuse, respond, send, websocket_answer};
use super::hub::{Hub, Known, Payload, Seat, VIEWERS_MAX};
use super::story::Past;
use super::websocket::{Received, binary_frame, text_frame};
use super::{Handler, Request, RequestError};
use mindseye_base::sync::lock;
use mindseye_bridge::goal::Goal;
use serde_json::{Value, json};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// The page's files, embedded.
const FILES: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("page.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page.js")),
];

pub(super) struct Server {
    pub hub: Arc<Hub>,
    pub past: Past,
    pub handler: Arc<OnceLock<Handler>>,
    pub gate: Gate,
    pub may_ask: bool,
    pub stop: Arc<AtomicBool>,
}

impl Server {
    /// Serves one connection.
    pub fn connection(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let Some((head, rest)) = read_head(stream) else {
            return refuse(stream, "400 Bad Request", "this is no request");
        };
        if let Err((status, why)) = self.gate.admits(&head) {
            return refuse(stream, status, why);
        }
        if head.path == "/live" {
            return self.live(stream, &head, &rest);
        }
        if let Some(number) = head.path.strip_prefix("/goal/") {
            let document = number.parse().ok().and_then(|number: u64| lock(&self.past).get(&number).cloned());
            return match document {
                Some(document) => respond(stream, "200 OK", "application/json", "", &document),
                None => refuse(stream, "404 Not Found", "this goal is not kept, or not over"),
            };
        }
        match FILES.iter().find(|(path, ..)| *path == head.path) {
            Some((_, kind, text)) => respond(stream, "200 OK", kind, &self.gate.cookie(&head), text),
            None => refuse(stream, "404 Not Found", "there is no such page"),
        }
    }

    fn live(&self, stream: &mut TcpStream, head: &Head, rest: &[u8]) -> std::io::Result<()> {
        let Some(answer) = websocket_answer(head, None) else {
            return refuse(stream, "400 Bad Request", "this address speaks WebSocket, version 13");
        };
        let Some(seat) = self.hub.enter() else {
            let why = format!("there are {VIEWERS_MAX} viewers already; close one of their pages");
            return refuse(stream, "503 Service Unavailable", &why);
        };
        send(stream, answer.as_bytes())?;
        self.watch(stream, rest, seat)
    }

    /// Serves one viewer until it goes, or is too slow.
    fn watch(&self, stream: &mut TcpStream, rest: &[u8], _seat: Seat) -> std::io::Result<()> {
        let mut known = Known::new();
        let mut due = || {
            let frame = |payload| match payload {
                Payload::Document(text) => text_frame(&text),
                Payload::Picture(file) => binary_frame(&file),
            };
            self.hub.newer(&mut known).into_iter().map(frame).collect()
        };
        let mut hear = |received| {
            let reply = match received {
                Received::Text(text) => self.reply(&text),
                _ => refusal("binary messages mean nothing here"),
            };
            Some(text_frame(&reply.to_string()))
        };
        converse(stream, rest, &self.stop, &mut due, &mut hear)
    }

    /// Does what a viewer wants; gives what to tell it.
    fn reply(&self, text: &str) -> Value {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        if !self.may_ask {
            return refusal("asking is switched off here; the runtime was started without --view-control");
        }
        let wanted: Value = match serde_json::from_str(text) {
            Ok(value) => value,
            Err(error) => return refusal(&format!("not JSON: {error}")),
        };
        let request = match (wanted.get("ask"), wanted.get("cancel")) {
            (Some(Value::String(text)), None) => {
                let id = format!("page-{}", NEXT.fetch_add(1, Ordering::Relaxed));
                match Goal::text(id, text) {
                    Ok(goal) => Request::Ask(goal),
                    Err(error) => return refusal(&error.to_string()),
                }
            }
            (None, Some(Value::Bool(true))) => Request::Cancel,
            _ => return refusal("known requests: {\"ask\": TEXT} and {\"cancel\": true}"),
        };
        let id = if let Request::Ask(goal) = &request { Some(goal.id.clone()) } else { None };
        let handled = self.handler.get().ok_or(RequestError::Closed).and_then(|handle| handle(request));
        match handled {
            Ok(()) => json!({"kind": "reply", "ok": true, "id": id}),
            Err(error) => refusal(&error.to_string()),
        }
    }
}

fn refusal(why: &str) -> Value {
    json!({"kind": "reply", "ok": false, "reason": why})
}
