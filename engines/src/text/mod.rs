//! From a prompt to token ids: cleaning and a SentencePiece unigram tokenizer.

mod clean;
mod sentencepiece;

pub use clean::clean;
pub use sentencepiece::{Encoded, Tokenizer, TokenizerError};
