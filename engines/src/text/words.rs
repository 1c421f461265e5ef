//! Closed vocabularies of small models: a list of words with consecutive ids.

/// Id of the end of a text, in the umT5 vocabulary and in closed ones.
pub const END: usize = 1;
/// Id of the first word of a closed vocabulary, after padding, end, begin and unknown.
pub const FIRST_WORD: usize = 4;

/// The words of a text, in lower case.
pub fn spoken(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase)
}

/// Ids of the known words of a text in the order of the vocabulary (colours come before shapes there), without an end
/// or padding. Plurals count; other words are left out.
#[must_use]
pub fn word_ids(words: &[String], text: &str) -> Vec<usize> {
    let spoken: Vec<String> = spoken(text).collect();
    let said = |word: &String| spoken.iter().any(|s| s == word || s.strip_suffix('s') == Some(word));
    words.iter().enumerate().filter(|(_, word)| said(word)).map(|(i, _)| FIRST_WORD + i).collect()
}
