//! Cleaning of prompts as Wan does it: `ftfy.fix_text`, HTML unescape twice, strip, runs of white space to one space.
//!
//! Of `ftfy.fix_text` (default configuration) everything is done except the repair of mojibake (text decoded in the
//! wrong encoding, such as `cafÃ©`), which is guesswork about statistics of bad text: such prompts stay as they are.
//! Lone surrogates cannot occur in a Rust string.

use std::{collections::HashMap, sync::LazyLock};

use unicode_normalization::UnicodeNormalization;

/// HTML named character references: name (with `;` where it has one) to text, and whether only `ftfy` knows it.
static ENTITIES: LazyLock<HashMap<&'static str, (String, bool)>> = LazyLock::new(|| {
    let lines = include_str!("entities.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let (name, codes) = line.split_once(' ')?;
            let text =
                codes.split(' ').filter_map(|c| char::from_u32(u32::from_str_radix(c, 16).ok()?)).collect();
            Some(match name.strip_prefix('^') {
                Some(name) => (name, (text, true)),
                None => (name, (text, false)),
            })
        })
        .collect()
});

/// Code points of bytes 0x80..=0x9f in Windows-1252; unassigned bytes map to themselves.
const WINDOWS_1252: [char; 32] = [
    '\u{20ac}', '\u{81}', '\u{201a}', '\u{192}', '\u{201e}', '\u{2026}', '\u{2020}', '\u{2021}', '\u{2c6}',
    '\u{2030}', '\u{160}', '\u{2039}', '\u{152}', '\u{8d}', '\u{17d}', '\u{8f}', '\u{90}', '\u{2018}',
    '\u{2019}', '\u{201c}', '\u{201d}', '\u{2022}', '\u{2013}', '\u{2014}', '\u{2dc}', '\u{2122}', '\u{161}',
    '\u{203a}', '\u{153}', '\u{9d}', '\u{17e}', '\u{178}',
];

/// Cleans a prompt.
///
/// ```
/// assert_eq!(mindseye_engines::text::clean("  caf\u{e9} &amp;amp;\n th\u{e9} "), "caf\u{e9} & th\u{e9}");
/// ```
#[must_use]
pub fn clean(text: &str) -> String {
    let text = unescape(&unescape(&fix_text(text)));
    let mut out = String::with_capacity(text.len());
    for word in text.split(is_space).filter(|word| !word.is_empty()) {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// White space as Python's `str.isspace` and `\s` see it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The lines of a text, fixed one by one.
fn fix_text(text: &str) -> String {
    let mut unescape_html = true;
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        unescape_html &= !line.contains('<');
        let mut line = line.to_owned();
        loop {
            let fixed = fix_once(&line, unescape_html);
            if fixed == line {
                break;
            }
            line = fixed;
        }
        out.push_str(&line);
    }
    out
}

/// One round of all fixes; repeated until nothing changes.
fn fix_once(line: &str, unescape_html: bool) -> String {
    let line = if unescape_html { unescape_strictly(line) } else { line.to_owned() };
    let line: String = line
        .chars()
        .map(|c| match c {
            '\u{80}'..='\u{9f}' => WINDOWS_1252[c as usize - 0x80],
            _ => c,
        })
        .collect();
    let mut wide = String::with_capacity(line.len());
    for c in line.chars() {
        match ligature(c) {
            Some(letters) => wide.push_str(letters),
            None => wide.push(c),
        }
    }
    let mut narrow = String::with_capacity(wide.len());
    for c in wide.chars() {
        match c {
            '\u{3000}' => narrow.push(' '),
            '\u{ff01}'..='\u{ffef}' => narrow.extend(std::iter::once(c).nfkc()),
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => narrow.push('\''),
            '\u{201c}'..='\u{201f}' => narrow.push('"'),
            _ => narrow.push(c),
        }
    }
    let broken = narrow.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
    let mut plain = without_terminal_escapes(&broken);
    plain.retain(|c| {
        !matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}')
    });
    plain.nfc().collect()
}

/// Letters of a Latin ligature or digraph character.
fn ligature(c: char) -> Option<&'static str> {
    Some(match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// Removes `ESC [ digits and semicolons letter`.
fn without_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let after = escape[2..].trim_start_matches(|c: char| c == ';' || c.is_ascii_digit());
        if after.starts_with(|c: char| c.is_ascii_alphabetic()) {
            rest = &after[1..];
        } else {
            out.push_str(&escape[..2]);
            rest = &escape[2..];
        }
    }
    out.push_str(rest);
    out
}

/// Entities that end in a semicolon, as `ftfy` reads them: `&#?[0-9A-Za-z]{1,24};`.
fn unescape_strictly(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let body = rest[1..].strip_prefix('#').unwrap_or(&rest[1..]);
        let name = body.len() - body.trim_start_matches(|c: char| c.is_ascii_alphanumeric()).len();
        if !(1..=24).contains(&name) || !body[name..].starts_with(';') {
            out.push('&');
            rest = &rest[1..];
            continue;
        }
        let len = rest.len() - body.len() + name + 1;
        let entity = &rest[..len];
        let decoded = if entity.starts_with("&#") {
            Some(unescape(entity)).filter(|decoded| !decoded.contains(';'))
        } else {
            ENTITIES.get(&entity[1..]).map(|(text, _)| text.clone())
        };
        out.push_str(decoded.as_deref().unwrap_or(entity));
        rest = &rest[len..];
    }
    out.push_str(rest);
    out
}

/// HTML unescape by the rules of HTML 5, references without a semicolon included.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let used = match rest.strip_prefix('#') {
            Some(number) => numeric(number, &mut out).map(|used| used + 1),
            None => named(rest, &mut out),
        };
        match used {
            Some(used) => rest = &rest[used..],
            None => out.push('&'),
        }
    }
    out.push_str(rest);
    out
}

/// Decodes what follows `&#`; the bytes used, or `None` when it is not a number.
fn numeric(text: &str, out: &mut String) -> Option<usize> {
    let (prefix, radix) = if text.starts_with(['x', 'X']) { (1, 16) } else { (0, 10) };
    let digits = &text[prefix..];
    let count = digits.bytes().take_while(|b| (*b as char).is_digit(radix)).count();
    if count == 0 {
        return None;
    }
    // Numbers too long for u32 are out of range anyway.
    let code = u32::from_str_radix(&digits[..count], radix).unwrap_or(u32::MAX);
    match code {
        0 => out.push('\u{fffd}'),
        0x80..=0x9f => out.push(WINDOWS_1252[code as usize - 0x80]),
        0x1..=0x8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => {}
        _ if code & 0xfffe == 0xfffe && code <= 0x10_ffff => {}
        _ => out.push(char::from_u32(code).unwrap_or('\u{fffd}')),
    }
    Some(prefix + count + usize::from(digits[count..].starts_with(';')))
}

/// Decodes what follows `&`; the bytes used, or `None` when it is not a known name.
fn named(text: &str, out: &mut String) -> Option<usize> {
    let stop = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | ' ' | '<' | '&' | '#' | ';');
    let mut end = text
        .char_indices()
        .take(32)
        .find(|(_, c)| stop(*c))
        .map_or_else(|| text.char_indices().nth(32).map_or(text.len(), |(at, _)| at), |(at, _)| at);
    if end == 0 {
        return None;
    }
    if text[end..].starts_with(';') {
        end += 1;
    }
    let known = |name: &str| ENTITIES.get(name).filter(|(_, ftfy_only)| !ftfy_only).map(|(text, _)| text);
    if let Some(decoded) = known(&text[..end]) {
        out.push_str(decoded);
        return Some(end);
    }
    // The longest known prefix of at least two characters.
    let ends: Vec<usize> = text[..end].char_indices().map(|(at, _)| at).skip(2).collect();
    for &at in ends.iter().rev() {
        if let Some(decoded) = known(&text[..at]) {
            out.push_str(decoded);
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_agree_with_the_reference() {
        // prompt, what ftfy 6.3.1 and Python's html make of it
        let cases = [
            ("P&EACUTE;REZ &notit; &amp;lt;b&gt;", "PÉREZ ¬it; <b>"),
            ("a < b &amp; c &EACUTE;", "a < b & c &EACUTE;"),
            ("“quoted” ‘single’ \u{1b}[31mred\u{1b}[0m", "\"quoted\" 'single' red"),
            ("ﬀ ﬃ Ǆ \u{3000}Ａ１ ｶﾞ", "ff ffi DŽ A1 ガ"),
            ("&#150;&#0;&#xD800;&#1;|&#x110000;", "–\u{fffd}\u{fffd}|\u{fffd}"),
            ("e\u{301} \u{feff}x\u{7f}", "é x"),
            ("&", "&"),
            ("&;&#;&#x;", "&;&#;&#x;"),
            ("\u{85}a\u{2028}b\r\nc", "…a b c"),
        ];
        for (prompt, wanted) in cases {
            assert_eq!(clean(prompt), wanted, "{prompt:?}");
        }
    }
}
