//! From a prompt to token ids: cleaning and a SentencePiece unigram tokenizer, or a closed list of words.

mod classes;
mod clean;
mod proto;
mod sentencepiece;
mod word_model;
mod words;

pub use classes::{ClassError, class_of};
pub use clean::clean;
pub use sentencepiece::{Encoded, Tokenizer, TokenizerError};
pub use word_model::word_model;
pub use words::{END, FIRST_WORD, UnknownWord, spoken, unknown_words, word_ids};
