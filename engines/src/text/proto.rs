//! Field numbers of `sentencepiece_model.proto` (google/sentencepiece, Apache-2.0), as far as they are used.

/// `TrainerSpec.ModelType.UNIGRAM`.
pub(super) const UNIGRAM: u64 = 1;

/// `ModelProto`.
pub(super) mod model {
    pub const PIECES: u32 = 1;
    pub const TRAINER_SPEC: u32 = 2;
    pub const NORMALIZER_SPEC: u32 = 3;
}

/// `ModelProto.SentencePiece`.
pub(super) mod piece {
    pub const PIECE: u32 = 1;
    pub const SCORE: u32 = 2;
    pub const TYPE: u32 = 3;
}

/// `TrainerSpec`.
pub(super) mod trainer {
    pub const MODEL_TYPE: u32 = 3;
    pub const TREAT_WHITESPACE_AS_SUFFIX: u32 = 24;
    pub const BYTE_FALLBACK: u32 = 35;
    pub const UNK_ID: u32 = 40;
    pub const BOS_ID: u32 = 41;
    pub const EOS_ID: u32 = 42;
    pub const PAD_ID: u32 = 43;
}

/// `NormalizerSpec`.
pub(super) mod normalizer {
    pub const NAME: u32 = 1;
    pub const PRECOMPILED_CHARSMAP: u32 = 2;
    pub const ADD_DUMMY_PREFIX: u32 = 3;
    pub const REMOVE_EXTRA_WHITESPACES: u32 = 4;
    pub const ESCAPE_WHITESPACES: u32 = 5;
}
