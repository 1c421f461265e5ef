//! Closed vocabularies of small models: a list of words with consecutive ids.

/// Id of the end of a text, in the umT5 vocabulary and in closed ones.
pub const END: usize = 1;
/// Id of the first word of a closed vocabulary, after padding, end, begin and unknown.
pub const FIRST_WORD: usize = 4;

/// Words that carry no meaning for a goal: what one says around the name of a thing.
const FILLERS: &[&str] = &[
    "a", "again", "all", "an", "and", "any", "approach", "are", "around", "at", "away", "back", "be",
    "before", "bring", "by", "can", "check", "closest", "color", "colored", "colour", "coloured", "come",
    "could", "do", "drive", "face", "find", "finding", "for", "forward", "from", "front", "get", "give",
    "go", "goal", "going", "have", "head", "here", "hey", "how", "i", "in", "is", "it", "its", "just", "let",
    "locate", "look", "looking", "lying", "me", "move", "my", "navigate", "near", "nearest", "next", "now",
    "object", "of", "on", "one", "ones", "or", "our", "over", "place", "please", "reach", "robot", "room",
    "search", "see", "seek", "should", "show", "side", "so", "some", "standing", "stand", "stop", "take",
    "target", "than", "that", "the", "their", "then", "there", "thing", "this", "to", "toward", "towards",
    "travel", "turn", "up", "us", "visit", "walk", "want", "was", "we", "what", "where", "which", "will",
    "with", "would", "you", "your",
];

/// The words of a text, in lower case.
pub fn spoken(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase)
}

/// Ids of the known words of a text in the order of the vocabulary (colours come before shapes there), without an end
/// or padding. Plurals count; other words are left out.
#[must_use]
pub fn word_ids(words: &[String], text: &str) -> Vec<usize> {
    let spoken: Vec<String> = spoken(text).collect();
    let said = |word: &String| spoken.iter().any(|s| means(s, word));
    words.iter().enumerate().filter(|(_, word)| said(word)).map(|(i, _)| FIRST_WORD + i).collect()
}

/// Whether a spoken word is a known one or its plural.
fn means(spoken: &str, word: &str) -> bool {
    spoken.strip_prefix(word).is_some_and(|end| ["", "s", "es"].contains(&end))
}

/// A word that a vocabulary lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWord {
    /// In lower case.
    pub word: String,
    /// The known word nearest to it by edit distance, transpositions counted once; the first of several.
    pub nearest: String,
}

/// The words of a text that carry meaning and are not known, each once, in the order of the text.
#[must_use]
pub fn unknown_words(words: &[String], text: &str) -> Vec<UnknownWord> {
    let mut unknown: Vec<UnknownWord> = Vec::new();
    for word in spoken(text) {
        let known = FILLERS.contains(&word.as_str()) || words.iter().any(|w| means(&word, w));
        if known || unknown.iter().any(|u| u.word == word) {
            continue;
        }
        let nearest =
            words.iter().min_by_key(|w| strsim::osa_distance(w, &word)).cloned().unwrap_or_default();
        unknown.push(UnknownWord { word, nearest });
    }
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> Vec<String> {
        ["red", "yellow", "cone", "box", "bed"].map(String::from).to_vec()
    }

    #[test]
    fn known_words_get_their_ids_in_the_order_of_the_vocabulary() {
        for (text, want) in [
            ("find the yellow cone", &[5, 6][..]),
            ("CONES that are red", &[4, 6]),
            ("boxes", &[7]),
            ("boxer bedding", &[]),
            ("", &[]),
        ] {
            assert_eq!(word_ids(&vocabulary(), text), want, "{text}");
        }
    }

    #[test]
    fn unknown_words_come_with_the_nearest_known_one() {
        for (text, want) in [
            ("find the yelow cone", &[("yelow", "yellow")][..]),
            ("the yellow coen", &[("coen", "cone")]),
            ("Please, could you drive to the red boxes?", &[]),
            ("box bxo bxo", &[("bxo", "box")]),
            ("bad rod", &[("bad", "bed"), ("rod", "red")]),
            ("", &[]),
        ] {
            let got = unknown_words(&vocabulary(), text);
            let got: Vec<(&str, &str)> = got.iter().map(|u| (u.word.as_str(), u.nearest.as_str())).collect();
            assert_eq!(got, want, "{text}");
        }
    }
}
