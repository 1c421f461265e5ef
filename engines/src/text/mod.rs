//! From a prompt to token ids: cleaning and a SentencePiece unigram tokenizer.

mod clean;
mod proto;
mod sentencepiece;
mod words;

pub use clean::clean;
pub use sentencepiece::{Encoded, Tokenizer, TokenizerError};
pub use words::word_model;
