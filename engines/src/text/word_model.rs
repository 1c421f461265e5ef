//! A tokenizer for a model that knows a list of words.

use super::proto::{UNIGRAM, model, normalizer, piece, trainer};
use crate::protobuf::Writer;

/// Pieces before the words, each with its type in the file: padding, end, begin, unknown. Their order is that of the
/// umT5 vocabulary.
const SPECIAL: [(&str, i64); 4] = [("<pad>", 3), ("</s>", 3), ("<s>", 3), ("<unk>", 2)];

/// A SentencePiece unigram model (`tokenizer.model`) whose pieces are whole words; ids of words follow four special
/// ones. The same words give the same bytes.
#[must_use]
pub fn word_model(words: &[String]) -> Vec<u8> {
    let mut out = Writer::default();
    let words = words.iter().map(|w| (format!("\u{2581}{w}"), 1));
    for (text, kind) in SPECIAL.into_iter().map(|(p, k)| (p.to_owned(), k)).chain(words) {
        out.message(model::PIECES, |w| {
            w.data(piece::PIECE, text.as_bytes());
            w.float(piece::SCORE, -1.0);
            w.int(piece::TYPE, kind);
        });
    }
    out.message(model::TRAINER_SPEC, |w| {
        w.int(trainer::MODEL_TYPE, UNIGRAM.cast_signed());
        w.int(trainer::UNK_ID, 3);
        w.int(trainer::BOS_ID, 2);
        w.int(trainer::EOS_ID, 1);
        w.int(trainer::PAD_ID, 0);
    });
    // A space before the text, spaces joined and escaped.
    out.message(model::NORMALIZER_SPEC, |w| {
        w.data(normalizer::NAME, b"identity");
        w.int(normalizer::ADD_DUMMY_PREFIX, 1);
        w.int(normalizer::REMOVE_EXTRA_WHITESPACES, 1);
        w.int(normalizer::ESCAPE_WHITESPACES, 1);
    });
    out.bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;

    #[test]
    fn words_are_pieces() {
        let bytes = word_model(&["red".to_owned(), "cone".to_owned()]);
        let tokenizer = Tokenizer::from_bytes(&bytes).unwrap();
        assert_eq!(tokenizer.vocabulary(), 6);
        assert_eq!((tokenizer.pad(), tokenizer.end(), tokenizer.unknown()), (0, 1, 3));
        assert_eq!(tokenizer.encode(" red  cone").unwrap(), [4, 5]);
        // Bytes of a known model: what is written must not change with the writer.
        let one = word_model(&["a".to_owned()]);
        assert_eq!(&one[..16], b"\x0a\x0e\x0a\x05<pad>\x15\x00\x00\x80\xbf\x18\x03");
    }
}
