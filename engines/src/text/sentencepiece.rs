//! SentencePiece unigram models: the `.model` file, its normaliser, and the best segmentation of a text.
//!
//! Formats: `sentencepiece_model.proto` and the double-array trie of the compiled normalisation rules
//! (google/sentencepiece, Apache-2.0); the segmentation is the Viterbi search of its `unigram_model`, in f32 as there.

use std::{collections::HashMap, path::Path};

use super::proto::{UNIGRAM, model, normalizer, piece, trainer};
use crate::protobuf::{Reader, Value, WireError};

/// Largest model file that is read.
const MAX_MODEL_BYTES: u64 = 64 << 20;
/// Longest piece that is accepted, in bytes.
const MAX_PIECE_BYTES: usize = 1024;
/// Longest prompt, in bytes (512 tokens never need more).
const MAX_TEXT_BYTES: usize = 16 << 10;
/// How much worse an unknown character is than the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;
/// The visible space.
const SPACE: &str = "\u{2581}";

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file could not be read.
    #[error("tokenizer {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than a model ever is.
    #[error("tokenizer {path}: {bytes} bytes, more than the {MAX_MODEL_BYTES} that are accepted")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// The bytes are not valid protobuf.
    #[error("tokenizer model: {0}")]
    Wire(#[from] WireError),
    /// The bytes are not a SentencePiece model.
    #[error("tokenizer model: {0}")]
    Malformed(String),
    /// The model is of a kind that is not supported.
    #[error("tokenizer model: {0}; a unigram model is needed")]
    Unsupported(String),
    /// The prompt is too long.
    #[error("prompt of {0} bytes, at most {MAX_TEXT_BYTES} are accepted")]
    TextTooLong(usize),
    /// No room for even the end token.
    #[error("token length must be at least 1")]
    NoRoom,
}

fn malformed(what: impl Into<String>) -> TokenizerError {
    TokenizerError::Malformed(what.into())
}

/// Token ids of a prompt at a fixed length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Ids, the end token last, then padding.
    pub ids: Vec<u32>,
    /// How many of them are not padding.
    pub length: usize,
}

/// Ids by piece.
type Ids = HashMap<Vec<u8>, u32>;

/// Ids of the pieces that texts are split into, and of control, unknown and byte pieces.
fn index(pieces: &[String], kinds: &[Kind]) -> Result<(Ids, Ids), TokenizerError> {
    let (mut ids, mut reserved) = (Ids::new(), Ids::new());
    for (at, (piece, kind)) in pieces.iter().zip(kinds).enumerate() {
        let map = match kind {
            Kind::Normal | Kind::UserDefined | Kind::Unused => &mut ids,
            Kind::Unknown | Kind::Control | Kind::Byte => &mut reserved,
        };
        if map.insert(piece.clone().into_bytes(), at as u32).is_some() {
            return Err(malformed(format!("piece {at} is there twice")));
        }
    }
    ids.retain(|_, id| kinds[*id as usize] != Kind::Unused);
    Ok((ids, reserved))
}

/// Ids of the byte-fallback pieces, by byte.
fn byte_pieces(reserved: &Ids) -> Result<Box<[u32; 256]>, TokenizerError> {
    let mut table = Box::new([0; 256]);
    for (byte, id) in table.iter_mut().enumerate() {
        let name = format!("<0x{byte:02X}>");
        let known = reserved.get(name.as_bytes());
        *id = *known.ok_or_else(|| malformed(format!("byte fallback without piece {name}")))?;
    }
    Ok(table)
}

/// What the file says, before anything is made of it.
struct RawModel {
    pieces: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<Kind>,
    normalizer: Normalizer,
    model_type: u64,
    unknown: i64,
    end: i64,
    pad: i64,
    byte_fallback: bool,
}

impl RawModel {
    fn read(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let mut out = Self {
            pieces: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            normalizer: Normalizer::default(),
            model_type: UNIGRAM,
            unknown: 0,
            end: 2,
            pad: -1,
            byte_fallback: false,
        };
        let mut r = Reader::new(bytes, "ModelProto");
        while let Some((field, value)) = r.next()? {
            match (field, value) {
                (model::PIECES, Value::Bytes(..)) => {
                    out.piece(r.message(field, value, "SentencePiece")?)?
                }
                (model::TRAINER_SPEC, Value::Bytes(..)) => {
                    out.trainer(r.message(field, value, "TrainerSpec")?)?;
                }
                (model::NORMALIZER_SPEC, Value::Bytes(..)) => {
                    out.normalizer = Normalizer::read(r.message(field, value, "NormalizerSpec")?)?;
                }
                _ => {}
            }
        }
        Ok(out)
    }

    fn piece(&mut self, mut r: Reader<'_>) -> Result<(), TokenizerError> {
        let (mut text, mut score, mut kind) = (&[][..], 0.0, Kind::Normal);
        while let Some((field, value)) = r.next()? {
            match (field, value) {
                (piece::PIECE, Value::Bytes(..)) => text = r.bytes(field, value)?,
                (piece::SCORE, Value::Fixed32(bits)) => score = f32::from_bits(bits),
                (piece::TYPE, Value::Varint(v)) => kind = Kind::new(v)?,
                _ => {}
            }
        }
        let at = self.pieces.len();
        let text = std::str::from_utf8(text).map_err(|_| malformed(format!("piece {at} is not UTF-8")))?;
        if text.is_empty() || text.len() > MAX_PIECE_BYTES {
            return Err(malformed(format!("piece {at} has {} bytes", text.len())));
        }
        if !score.is_finite() {
            return Err(malformed(format!("score of piece {at} is {score}")));
        }
        self.pieces.push(text.to_owned());
        self.scores.push(score);
        self.kinds.push(kind);
        Ok(())
    }

    fn trainer(&mut self, mut r: Reader<'_>) -> Result<(), TokenizerError> {
        while let Some((field, value)) = r.next()? {
            let Value::Varint(v) = value else { continue };
            match field {
                trainer::MODEL_TYPE => self.model_type = v,
                trainer::TREAT_WHITESPACE_AS_SUFFIX if v != 0 => {
                    return Err(TokenizerError::Unsupported("white space as suffix".to_owned()));
                }
                trainer::BYTE_FALLBACK => self.byte_fallback = v != 0,
                // Negative ids are ten-byte varints: the cast brings the sign back.
                trainer::UNK_ID => self.unknown = v.cast_signed(),
                trainer::EOS_ID => self.end = v.cast_signed(),
                trainer::PAD_ID => self.pad = v.cast_signed(),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A SentencePiece unigram model.
///
/// Id of padding, end and unknown are read from the file. Where the model has byte pieces, an unknown character
/// becomes its UTF-8 bytes (as SentencePiece itself does; some other readers of these files give the unknown id).
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Vec<String>,
    scores: Vec<f32>,
    /// Pieces that text can be cut into.
    ids: HashMap<Vec<u8>, u32>,
    user_defined: Vec<bool>,
    longest_piece: usize,
    min_score: f32,
    max_score: f32,
    bytes: Option<Box<[u32; 256]>>,
    unknown: u32,
    end: u32,
    pad: u32,
    normalizer: Normalizer,
}

impl Tokenizer {
    /// Reads a `.model` file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a unigram model.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        let failed = |source| TokenizerError::Read { path: path.display().to_string(), source };
        let bytes = std::fs::metadata(path).map_err(failed)?.len();
        if bytes > MAX_MODEL_BYTES {
            return Err(TokenizerError::TooLarge { path: path.display().to_string(), bytes });
        }
        Self::from_bytes(&std::fs::read(path).map_err(failed)?)
    }

    /// Reads a model from memory.
    ///
    /// # Errors
    /// When the bytes are not a unigram model.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let RawModel {
            pieces,
            scores,
            kinds,
            mut normalizer,
            model_type,
            mut unknown,
            end,
            pad,
            byte_fallback,
        } = RawModel::read(bytes)?;
        if model_type != UNIGRAM {
            return Err(TokenizerError::Unsupported(format!("model type {model_type}")));
        }
        if pieces.is_empty() {
            return Err(malformed("it holds no pieces"));
        }
        // The file may leave the ids at their defaults; the pieces' kinds and names say what is true.
        let by_name = |name: &str| pieces.iter().position(|piece| piece == name).map(|id| id as i64);
        if let Some(id) = kinds.iter().position(|kind| *kind == Kind::Unknown) {
            unknown = id as i64;
        }
        let id = |what: &str, id: i64| {
            let found = u32::try_from(id).ok().filter(|id| (*id as usize) < pieces.len());
            found.ok_or_else(|| malformed(format!("id {id} of {what} is not among {} pieces", pieces.len())))
        };
        let unknown = id("unknown", unknown)?;
        let end = id("end of text", by_name("</s>").unwrap_or(end))?;
        let pad = if pad >= 0 { id("padding", pad)? } else { id("padding", by_name("<pad>").unwrap_or(0))? };

        let (ids, reserved) = index(&pieces, &kinds)?;
        let normal = || kinds.iter().zip(&scores).filter(|(kind, _)| **kind == Kind::Normal).map(|(_, s)| *s);
        let bytes = byte_fallback.then(|| byte_pieces(&reserved)).transpose()?;
        let user_defined: Vec<bool> = kinds.iter().map(|kind| *kind == Kind::UserDefined).collect();
        normalizer.keep = kinds
            .iter()
            .zip(&pieces)
            .filter(|(kind, _)| **kind == Kind::UserDefined)
            .map(|(_, piece)| piece.clone())
            .collect();
        normalizer.keep.sort_by_key(|piece| std::cmp::Reverse(piece.len()));
        Ok(Self {
            pieces,
            longest_piece: ids.keys().map(Vec::len).max().unwrap_or(0),
            min_score: normal().fold(f32::MAX, f32::min),
            max_score: normal().fold(f32::MIN, f32::max),
            scores,
            ids,
            user_defined,
            bytes,
            unknown,
            end,
            pad,
            normalizer,
        })
    }

    /// Number of pieces.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.pieces.len()
    }

    /// Id of padding.
    #[must_use]
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Id of the end token.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Id of an unknown character.
    #[must_use]
    pub fn unknown(&self) -> u32 {
        self.unknown
    }

    /// Text of a piece.
    #[must_use]
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(String::as_str)
    }

    /// Ids of a text, without end token. The text is normalised, but not cleaned.
    ///
    /// # Errors
    /// [`TokenizerError::TextTooLong`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TokenizerError::TextTooLong(text.len()));
        }
        Ok(self.segment(&self.normalizer.normalize(text)))
    }

    /// Cleans a prompt and turns it into exactly `length` ids: at most `length - 1` of text, the end token, padding.
    ///
    /// # Errors
    /// [`TokenizerError::TextTooLong`], [`TokenizerError::NoRoom`].
    pub fn encode_prompt(&self, prompt: &str, length: usize) -> Result<Encoded, TokenizerError> {
        if prompt.len() > MAX_TEXT_BYTES {
            return Err(TokenizerError::TextTooLong(prompt.len()));
        }
        if length == 0 {
            return Err(TokenizerError::NoRoom);
        }
        let mut ids = self.encode(&super::clean(prompt))?;
        ids.truncate(length - 1);
        ids.push(self.end);
        let used = ids.len();
        ids.resize(length, self.pad);
        Ok(Encoded { ids, length: used })
    }

    /// The best segmentation of normalised text.
    fn segment(&self, text: &str) -> Vec<u32> {
        #[derive(Clone, Copy)]
        struct Node {
            id: u32,
            score: f32,
            start: Option<usize>,
        }
        let bytes = text.as_bytes();
        let mut best = vec![Node { id: self.unknown, score: 0.0, start: None }; bytes.len() + 1];
        for (start, c) in text.char_indices() {
            let so_far = best[start].score;
            let one = c.len_utf8();
            let mut single = false;
            let mut relax = |end: usize, id: u32, score: f32| {
                let total = so_far + score;
                if best[end].start.is_none() || total > best[end].score {
                    best[end] = Node { id, score: total, start: Some(start) };
                }
            };
            let last = bytes.len().min(start + self.longest_piece);
            for end in start + one..=last {
                if !text.is_char_boundary(end) {
                    continue;
                }
                let Some(&id) = self.ids.get(&bytes[start..end]) else {
                    continue;
                };
                let score = if self.user_defined[id as usize] {
                    (end - start) as f32 * self.max_score - 0.1
                } else {
                    self.scores[id as usize]
                };
                relax(end, id, score);
                single |= end == start + one;
            }
            if !single {
                relax(start + one, self.unknown, self.min_score - UNKNOWN_PENALTY);
            }
        }
        let mut path = Vec::new();
        let mut end = bytes.len();
        while end > 0 {
            // Every character boundary was reached: by a piece or as an unknown character.
            let Some(start) = best[end].start else { break };
            path.push((best[end].id, start..end));
            end = start;
        }
        let mut ids = Vec::with_capacity(path.len());
        let mut after_unknown = false;
        for (id, range) in path.into_iter().rev() {
            let is_unknown = id == self.unknown;
            match &self.bytes {
                Some(table) if is_unknown => ids.extend(bytes[range].iter().map(|b| table[*b as usize])),
                // A run of unknown characters is one unknown piece.
                None if is_unknown && after_unknown => {}
                _ => ids.push(id),
            }
            after_unknown = is_unknown;
        }
        ids
    }
}

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn new(value: u64) -> Result<Self, TokenizerError> {
        Ok(match value {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return Err(malformed(format!("piece type {value}"))),
        })
    }
}

/// Text normalisation: the compiled rules of the model, white space, the space mark.
#[derive(Clone, Debug)]
struct Normalizer {
    /// Units of a double-array trie; empty without rules.
    trie: Vec<u32>,
    /// Replacements, each ended by a zero byte.
    replacements: Vec<u8>,
    add_dummy_prefix: bool,
    remove_extra_spaces: bool,
    escape_spaces: bool,
    /// User-defined pieces, longest first: they are never rewritten.
    keep: Vec<String>,
}

impl Default for Normalizer {
    fn default() -> Self {
        Self {
            trie: vec![],
            replacements: vec![],
            add_dummy_prefix: true,
            remove_extra_spaces: true,
            escape_spaces: true,
            keep: vec![],
        }
    }
}

impl Normalizer {
    fn read(mut r: Reader<'_>) -> Result<Self, TokenizerError> {
        let mut out = Self::default();
        while let Some((field, value)) = r.next()? {
            match (field, value) {
                (normalizer::PRECOMPILED_CHARSMAP, Value::Bytes(..)) => out.rules(r.bytes(field, value)?)?,
                (normalizer::ADD_DUMMY_PREFIX, Value::Varint(v)) => out.add_dummy_prefix = v != 0,
                (normalizer::REMOVE_EXTRA_WHITESPACES, Value::Varint(v)) => out.remove_extra_spaces = v != 0,
                (normalizer::ESCAPE_WHITESPACES, Value::Varint(v)) => out.escape_spaces = v != 0,
                _ => {}
            }
        }
        Ok(out)
    }

    /// Takes the compiled rules: size of the trie in bytes, the trie, the replacements.
    fn rules(&mut self, blob: &[u8]) -> Result<(), TokenizerError> {
        if blob.is_empty() {
            return Ok(());
        }
        let size = blob.first_chunk::<4>().map(|b| u32::from_le_bytes(*b) as usize);
        let size = size.filter(|size| *size <= blob.len() - 4 && size.is_multiple_of(4) && *size > 0);
        let Some(size) = size else {
            return Err(malformed("the size of the normalisation trie does not fit"));
        };
        let (trie, replacements) = blob[4..].split_at(size);
        self.trie = trie.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        self.replacements = replacements.to_vec();
        Ok(())
    }

    /// The longest rule that matches the start of `text`: bytes used and where its replacement begins.
    fn longest(&self, text: &[u8]) -> Option<(usize, usize)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut unit = *self.trie.first()?;
        let mut at = offset(unit);
        let mut found = None;
        for (i, &byte) in text.iter().enumerate() {
            at ^= usize::from(byte);
            unit = *self.trie.get(at)?;
            if unit & ((1 << 31) | 0xff) != u32::from(byte) {
                break;
            }
            at ^= offset(unit);
            if (unit >> 8) & 1 == 1 {
                let Some(leaf) = self.trie.get(at) else { break };
                found = Some((i + 1, (leaf & 0x7fff_ffff) as usize));
            }
        }
        found
    }

    /// The first step of normalising `text`: what its start becomes, and how many bytes that start is.
    fn step<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some(piece) = self.keep.iter().find(|piece| text.starts_with(piece.as_str())) {
            return (piece, piece.len());
        }
        if let Some((used, at)) = self.longest(text.as_bytes()) {
            let tail = self.replacements.get(at..).unwrap_or_default();
            let len = tail.iter().position(|b| *b == 0).unwrap_or(tail.len());
            // Rules that cut characters or are not UTF-8 are ignored.
            if let (true, Ok(new)) = (text.is_char_boundary(used), std::str::from_utf8(&tail[..len])) {
                return (new, used);
            }
        }
        let one = text.chars().next().map_or(0, char::len_utf8);
        (&text[..one], one)
    }

    fn normalize(&self, text: &str) -> String {
        let space = if self.escape_spaces { SPACE } else { " " };
        let mut rest = text;
        if self.remove_extra_spaces {
            while !rest.is_empty() {
                let (new, used) = self.step(rest);
                if new != " " {
                    break;
                }
                rest = &rest[used..];
            }
        }
        if rest.is_empty() {
            return String::new();
        }
        let mut out = String::with_capacity(rest.len() * 2);
        if self.add_dummy_prefix {
            out.push_str(space);
        }
        let mut after_space = self.remove_extra_spaces;
        while !rest.is_empty() {
            let (new, used) = self.step(rest);
            rest = &rest[used..];
            let new = if after_space { new.trim_start_matches(' ') } else { new };
            if !new.is_empty() {
                for c in new.chars() {
                    if c == ' ' {
                        out.push_str(space);
                    } else {
                        out.push(c);
                    }
                }
                after_space = new.ends_with(' ');
            }
            if !self.remove_extra_spaces {
                after_space = false;
            }
        }
        if self.remove_extra_spaces {
            while out.ends_with(space) {
                out.truncate(out.len() - space.len());
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model file with these pieces `(text, score, kind)`.
    fn model(pieces: &[(&str, f32, u8)], trainer: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for (text, score, kind) in pieces {
            let mut piece = vec![0x0a, text.len() as u8];
            piece.extend_from_slice(text.as_bytes());
            piece.push(0x15);
            piece.extend_from_slice(&score.to_le_bytes());
            piece.extend_from_slice(&[0x18, *kind]);
            out.extend_from_slice(&[0x0a, piece.len() as u8]);
            out.extend_from_slice(&piece);
        }
        out.extend_from_slice(&[0x12, trainer.len() as u8]);
        out.extend_from_slice(trainer);
        out
    }

    const PIECES: [(&str, f32, u8); 6] = [
        ("<unk>", 0.0, 2),
        ("</s>", 0.0, 3),
        ("\u{2581}", -2.0, 1),
        ("a", -1.0, 1),
        ("ab", -2.5, 1),
        ("b", -1.0, 1),
    ];

    #[test]
    fn the_best_path_wins_and_unknown_runs_merge() {
        let t = Tokenizer::from_bytes(&model(&PIECES, &[])).unwrap();
        // "a" + "b" (-2) beats "ab" (-2.5)
        assert_eq!(t.encode("ab  xy a ").unwrap(), [2, 3, 5, 2, 0, 2, 3]);
        assert_eq!(t.encode("").unwrap(), [] as [u32; 0]);
        assert_eq!(t.encode_prompt("abab", 3).unwrap(), Encoded { ids: vec![2, 3, 1], length: 3 });
        assert_eq!((t.pad(), t.end(), t.unknown()), (0, 1, 0));
    }

    #[test]
    fn broken_models_are_refused() {
        let good = model(&PIECES, &[]);
        let cases: [(Vec<u8>, &str); 6] = [
            (good[..good.len() - 3].to_vec(), "bytes, only"),
            (vec![], "no pieces"),
            (model(&PIECES, &[0x18, 2]), "model type 2"),
            (model(&PIECES, &[0x98, 0x02, 1]), "byte fallback without piece <0x00>"),
            (model(&[PIECES[0], PIECES[1], PIECES[3], PIECES[3]], &[]), "twice"),
            (model(&[("", 0.0, 1)], &[]), "0 bytes"),
        ];
        for (bytes, word) in cases {
            let error = Tokenizer::from_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error} should say {word}");
        }
        let t = Tokenizer::from_bytes(&good).unwrap();
        assert!(matches!(t.encode(&"a".repeat(MAX_TEXT_BYTES + 1)), Err(TokenizerError::TextTooLong(_))));
        assert!(matches!(t.encode_prompt("a", 0), Err(TokenizerError::NoRoom)));
    }

    #[test]
    fn arbitrary_bytes_never_panic() {
        let good = model(&PIECES, &[]);
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(t) = Tokenizer::from_bytes(&bytes) {
                    let _ = t.encode("ab xé a");
                }
            }
        }
    }
}
