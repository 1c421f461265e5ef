//! Reads arbitrary bytes as a SentencePiece model and tokenizes with it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mindseye_engines::text::{Tokenizer, clean};

fuzz_target!(|input: (&[u8], &str)| {
    let (model, text) = input;
    if text.len() < 1 << 12 {
        let _ = clean(text);
    }
    if let Ok(tokenizer) = Tokenizer::from_bytes(model) {
        let _ = tokenizer.encode(text);
    }
});
