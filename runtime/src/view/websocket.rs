//! The part of the WebSocket protocol (RFC 6455) that a server needs: the answer to a handshake, frames out, frames in.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// Largest message of a client, bytes.
pub(super) const MESSAGE_MAX: usize = 64 << 10;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// `Sec-WebSocket-Accept` for a client's `Sec-WebSocket-Key`.
pub(super) fn accept_key(key: &str) -> String {
    // The constant of RFC 6455, section 1.3.
    let digest = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    STANDARD.encode(digest)
}

fn frame(opcode: u8, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 10);
    out.push(0x80 | opcode);
    match content.len() {
        n @ 0..126 => out.push(n as u8),
        n @ 126..0x1_0000 => {
            out.push(126);
            out.extend((n as u16).to_be_bytes());
        }
        n => {
            out.push(127);
            out.extend((n as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(content);
    out
}

/// A text message as it goes out.
pub(super) fn text_frame(text: &str) -> Vec<u8> {
    frame(TEXT, text.as_bytes())
}

/// What a client is asked to answer when nothing was heard of it for long.
pub(super) fn ping_frame() -> Vec<u8> {
    frame(PING, &[])
}

/// A binary message as it goes out.
pub(super) fn binary_frame(content: &[u8]) -> Vec<u8> {
    frame(BINARY, content)
}

/// What a client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Text(String),
    Binary,
    /// To be sent back.
    Pong(Vec<u8>),
    /// It is there still.
    Alive,
    /// The end; a frame to be sent before.
    Close(Vec<u8>),
}

/// Frames of a client, put together out of pieces as they come.
#[derive(Default)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
    message: Vec<u8>,
    /// Whether the message that has begun is a text; none has begun.
    open: Option<bool>,
}

/// Length of the content, place of the mask; `None` when more bytes are needed.
fn head(bytes: &[u8]) -> Option<(u64, usize)> {
    match bytes.get(1)? & 0x7f {
        126 => Some((u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4)),
        127 => Some((u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?), 10)),
        n => Some((u64::from(n), 2)),
    }
}

impl Incoming {
    /// Takes bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message that is complete. What breaks the protocol, or is too long, is a [`Received::Close`], and nothing
    /// may be asked for after one.
    pub fn next(&mut self) -> Option<Received> {
        let close = |code: u16| Some(Received::Close(frame(CLOSE, &code.to_be_bytes())));
        loop {
            let (length, mask_at) = head(&self.bytes)?;
            let (first, second) = (self.bytes[0], self.bytes[1]);
            let (is_last, opcode) = (first & 0x80 != 0, first & 0x0f);
            let allowed = match opcode {
                // These come whole, between the parts of a message, too.
                CLOSE | PING | PONG => is_last && length <= 125,
                CONTINUATION => self.open.is_some(),
                TEXT | BINARY => self.open.is_none(),
                _ => false,
            };
            // Clients mask, and extensions were not agreed on.
            if second & 0x80 == 0 || first & 0x70 != 0 || !allowed {
                return close(1002);
            }
            // A part is never longer than what is left of a message: no sum can overflow.
            if length > MESSAGE_MAX.saturating_sub(self.message.len()) as u64 {
                return close(1009);
            }
            let end = mask_at + 4 + length as usize;
            if self.bytes.len() < end {
                return None;
            }
            let rest = self.bytes.split_off(end);
            let whole = std::mem::replace(&mut self.bytes, rest);
            let (mask, masked) = (&whole[mask_at..mask_at + 4], &whole[mask_at + 4..]);
            let content = masked.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask);
            match opcode {
                CLOSE => {
                    // The code that came goes back; its words do not.
                    let content: Vec<u8> = content.collect();
                    return match content.len() {
                        0 => Some(Received::Close(frame(CLOSE, &[]))),
                        1 => close(1002),
                        _ => Some(Received::Close(frame(CLOSE, &content[..2]))),
                    };
                }
                PING => return Some(Received::Pong(frame(PONG, &content.collect::<Vec<_>>()))),
                PONG => return Some(Received::Alive),
                _ => {
                    self.message.extend(content);
                    self.open = self.open.or(Some(opcode == TEXT));
                }
            }
            if is_last {
                let message = std::mem::take(&mut self.message);
                if self.open.take() == Some(false) {
                    return Some(Received::Binary);
                }
                return match String::from_utf8(message) {
                    Ok(text) => Some(Received::Text(text)),
                    Err(_) => close(1007),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(first: u8, content: &[u8]) -> Vec<u8> {
        let mut out = frame(0, content);
        (out[0], out[1]) = (first, out[1] | 0x80);
        let at = out.len() - content.len();
        let mask = [1, 2, 3, 4];
        out.iter_mut().skip(at).enumerate().for_each(|(i, byte)| *byte ^= mask[i % 4]);
        out.splice(at..at, mask);
        out
    }

    #[test]
    fn the_handshake_of_the_standard() {
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn messages_come_whole_whatever_the_pieces() {
        let long = "x".repeat(300);
        let mut stream = masked(0x81, b"hello");
        stream.extend(masked(0x89, b"p"));
        stream.extend(masked(0x01, b"ab"));
        stream.extend(masked(0x8a, b""));
        stream.extend(masked(0x80, b"cd"));
        stream.extend(masked(0x82, &[1, 2]));
        stream.extend(masked(0x81, long.as_bytes()));
        let want = [
            Received::Text("hello".into()),
            Received::Pong(vec![0x8a, 1, b'p']),
            Received::Alive,
            Received::Text("abcd".into()),
            Received::Binary,
            Received::Text(long),
        ];
        for piece in [1, 7, 1000] {
            let mut incoming = Incoming::default();
            let mut got = Vec::new();
            for bytes in stream.chunks(piece) {
                incoming.push(bytes);
                got.extend(std::iter::from_fn(|| incoming.next()));
            }
            assert_eq!(got, want, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_breaks_the_protocol_ends_it() {
        let mut huge = vec![0x81, 0xff];
        huge.extend(u64::MAX.to_be_bytes());
        // The rest of a message that has begun, so long that the sum of both would overflow.
        let overflowing = [&masked(0x01, b"a")[..], &[0x80, 0xff], &u64::MAX.to_be_bytes(), &[0; 8]].concat();
        let halves = |second: u8| [masked(0x01, b"a"), masked(second, b"b")].concat();
        let cases = [
            (frame(TEXT, b"not masked"), 1002),
            (masked(0xc1, b"an extension"), 1002),
            (masked(0x83, b"no such opcode"), 1002),
            (masked(0x81, &[0xff, 0xfe]), 1007),
            (masked(0x88, &1000u16.to_be_bytes()), 1000),
            (masked(0x88, b"\x03\xe9going away"), 1001),
            (masked(0x88, b"1"), 1002),
            (masked(0x80, b"the rest of nothing"), 1002),
            (halves(0x81), 1002),
            (halves(0x82), 1002),
            (masked(0x09, b"a ping in parts"), 1002),
            (masked(0x89, &[0; 126]), 1002),
            (masked(0x88, &[0; 126]), 1002),
            (masked(0x82, &[0; MESSAGE_MAX + 1]), 1009),
            ([masked(0x02, &[0; MESSAGE_MAX]), masked(0x80, b"x")].concat(), 1009),
            (overflowing, 1009),
            (huge, 1009),
        ];
        for (bytes, code) in cases {
            let mut incoming = Incoming::default();
            incoming.push(&bytes);
            let want = frame(CLOSE, &u16::to_be_bytes(code));
            assert_eq!(incoming.next(), Some(Received::Close(want)), "{code}");
        }
        let mut incoming = Incoming::default();
        incoming.push(&masked(0x88, b""));
        assert_eq!(incoming.next(), Some(Received::Close(frame(CLOSE, b""))), "no code, none back");
        let mut whole = Incoming::default();
        whole.push(&masked(0x82, &[0; MESSAGE_MAX]));
        assert_eq!(whole.next(), Some(Received::Binary), "the longest message");
        for length in [0, 125, 126, 0xffff, 0x1_0000] {
            let out = frame(BINARY, &vec![7; length]);
            assert_eq!(head(&out).map(|(n, at)| (n as usize, at + length)), Some((length, out.len())));
        }
    }
}
