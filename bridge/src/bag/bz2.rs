//! Decompression of bzip2, written for speed: Huffman codes by table, one pass per stage. Damage is found by the
//! CRC of each block (900 kB at most); the blocks before it are kept.
//!
//! The format has no specification by its author; Joe Tsai's "BZIP2 format specification" (2016) describes it.

use std::cell::RefCell;

/// A block holds at most this many bytes before the last stage.
const BLOCK_MAX: usize = 900_000;
const BLOCK_MAGIC: u64 = 0x3141_5926_5359;
const END_MAGIC: u64 = 0x1772_4538_5090;
/// Symbols that share one selector.
const GROUP: usize = 50;
const CODE_MAX: usize = 20;
/// Codes up to this many bits are found in one step.
const FAST_BITS: usize = 10;
/// 256 values, less the first of the list, two symbols of runs, and the end of the block.
const ALPHABET_MAX: usize = 258;

const RUN_A: u16 = 0;
const RUN_B: u16 = 1;

/// Bits from the most significant on. Past the end come zeros, and [`Bits::ended`] says so.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, left-aligned.
    buffer: u64,
    filled: u32,
    /// Zero bits that were made up.
    beyond: u32,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, buffer: 0, filled: 0, beyond: 0 }
    }

    /// At least 56 bits are there afterwards.
    #[inline(always)]
    fn refill(&mut self) {
        if let Some(word) = self.bytes.get(self.at..self.at + 8) {
            let word = u64::from_be_bytes(word.try_into().unwrap_or_default());
            self.buffer |= word >> self.filled;
            let taken = (63 - self.filled) / 8;
            self.at += taken as usize;
            self.filled += taken * 8;
            return;
        }
        while self.filled <= 56 {
            match self.bytes.get(self.at) {
                Some(byte) => {
                    self.buffer |= u64::from(*byte) << (56 - self.filled);
                    self.at += 1;
                }
                None => self.beyond = self.beyond.saturating_add(8),
            }
            self.filled += 8;
        }
    }

    #[inline(always)]
    fn skip(&mut self, n: u32) {
        self.buffer <<= n;
        self.filled -= n;
    }

    /// The next `n` bits, 1 to 48.
    fn take(&mut self, n: u32) -> u64 {
        self.refill();
        let value = self.buffer >> (64 - n);
        self.skip(n);
        value
    }

    fn bit(&mut self) -> bool {
        self.take(1) == 1
    }

    /// True when bits past the end were taken.
    fn ended(&self) -> bool {
        self.beyond > self.filled
    }

    fn align(&mut self) {
        self.skip(self.filled % 8);
    }

    /// Bytes that were not taken.
    fn left(&self) -> usize {
        (self.bytes.len() - self.at) + (self.filled.saturating_sub(self.beyond) / 8) as usize
    }
}

/// One Huffman code.
struct Code {
    /// By the next [`FAST_BITS`] bits: symbol and length, 0 for longer codes.
    fast: [u16; 1 << FAST_BITS],
    /// By length: the first code that is longer, left-aligned in [`CODE_MAX`] bits.
    limit: [u32; CODE_MAX + 2],
    /// By length: to be added to a code to get the place of its symbol.
    offset: [i32; CODE_MAX + 1],
    symbols: [u16; ALPHABET_MAX],
    longest: usize,
}

impl Code {
    const EMPTY: Self = Self {
        fast: [0; 1 << FAST_BITS],
        limit: [0; CODE_MAX + 2],
        offset: [0; CODE_MAX + 1],
        symbols: [0; ALPHABET_MAX],
        longest: 0,
    };

    /// Canonical code of these lengths, each 1 to [`CODE_MAX`].
    fn build(&mut self, lengths: &[u8]) -> Result<(), &'static str> {
        let mut count = [0u32; CODE_MAX + 2];
        for length in lengths {
            count[usize::from(*length)] += 1;
        }
        self.fast.fill(0);
        self.limit.fill(0);
        self.longest = usize::from(lengths.iter().copied().max().unwrap_or(0));
        let mut place = 0;
        for length in 1..=CODE_MAX {
            for (symbol, l) in lengths.iter().enumerate() {
                if usize::from(*l) == length {
                    self.symbols[place] = symbol as u16;
                    place += 1;
                }
            }
        }
        let (mut code, mut place) = (0u32, 0u32);
        for (length, count) in count.into_iter().enumerate().take(CODE_MAX + 1).skip(1) {
            self.offset[length] = place as i32 - code as i32;
            for _ in 0..count {
                if code >> length != 0 {
                    return Err("a code is over-full");
                }
                if length <= FAST_BITS {
                    let first = (code as usize) << (FAST_BITS - length);
                    let entry = self.symbols[place as usize] << 5 | length as u16;
                    self.fast[first..first + (1 << (FAST_BITS - length))].fill(entry);
                }
                code += 1;
                place += 1;
            }
            self.limit[length] = code << (CODE_MAX - length);
            code <<= 1;
        }
        Ok(())
    }

    /// The next symbol; [`CODE_MAX`] bits must be there.
    #[inline(always)]
    fn symbol(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let entry = self.fast[(bits.buffer >> (64 - FAST_BITS)) as usize];
        if entry != 0 {
            bits.skip(u32::from(entry & 31));
            return Some(entry >> 5);
        }
        self.long_symbol(bits)
    }

    #[cold]
    #[inline(never)]
    fn long_symbol(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let next = (bits.buffer >> (64 - CODE_MAX)) as u32;
        let length = (1..=self.longest).find(|length| next < self.limit[*length])?;
        let code = (next >> (CODE_MAX - length)) as i32;
        bits.skip(length as u32);
        self.symbols.get(usize::try_from(code + self.offset[length]).ok()?).copied()
    }
}

/// The CRC of bzip2: that of Ethernet, most significant bit first.
const CRC_TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = (i as u32) << 24;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc >> 31 == 1 { crc << 1 ^ 0x04c1_1db7 } else { crc << 1 };
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut t = 1;
    while t < 8 {
        let mut i = 0;
        while i < 256 {
            let before = tables[t - 1][i];
            tables[t][i] = before << 8 ^ tables[0][(before >> 24) as usize];
            i += 1;
        }
        t += 1;
    }
    tables
};

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    let mut eights = bytes.chunks_exact(8);
    for eight in &mut eights {
        let word = u64::from_be_bytes(eight.try_into().unwrap_or_default()) ^ u64::from(crc) << 32;
        crc = 0;
        for (at, table) in CRC_TABLES.iter().enumerate() {
            crc ^= table[(word >> (8 * at)) as usize & 255];
        }
    }
    for byte in eights.remainder() {
        crc = crc << 8 ^ CRC_TABLES[0][(crc >> 24) as usize ^ usize::from(*byte)];
    }
    !crc
}

/// Memory that is used again for the next block.
struct Scratch {
    /// By place in the sorted block: the symbol in the low 8 bits, above them the place of the symbol that follows it in
    /// the text.
    after: Vec<u32>,
    /// The same, with the place of the symbol that precedes it.
    before: Vec<u32>,
    /// A block before its runs are undone.
    text: Vec<u8>,
    codes: Vec<Code>,
    selectors: Vec<u8>,
}

impl Scratch {
    const NEW: Self = Self {
        after: Vec::new(),
        before: Vec::new(),
        text: Vec::new(),
        codes: Vec::new(),
        selectors: Vec::new(),
    };

    fn prepare(&mut self, block_max: usize) {
        if self.text.len() < block_max {
            self.after.resize(block_max, 0);
            self.before.resize(block_max, 0);
            self.text.resize(block_max, 0);
        }
        while self.codes.len() < 6 {
            self.codes.push(Code::EMPTY);
        }
    }
}

/// What a block says of itself; its symbols are in [`Scratch::after`].
struct Block {
    len: usize,
    origin: usize,
    counts: [u32; 256],
}

/// Moves the byte at `at` to the front of the list, in steps of many bytes; gives it.
#[inline(always)]
fn to_front(list: &mut [u8; 256], at: usize) -> u8 {
    let value = list[at];
    let mut end = at;
    while end >= 16 {
        let bytes: [u8; 16] = list[end - 16..end].try_into().unwrap_or_default();
        list[end - 15..=end].copy_from_slice(&bytes);
        end -= 16;
    }
    if end >= 8 {
        let bytes: [u8; 8] = list[end - 8..end].try_into().unwrap_or_default();
        list[end - 7..=end].copy_from_slice(&bytes);
        end -= 8;
    }
    let word = u64::from_le_bytes(list[..8].try_into().unwrap_or_default());
    let moved = u64::MAX >> (56 - 8 * end);
    let word = word << 8 & moved | word & !moved | u64::from(value);
    list[..8].copy_from_slice(&word.to_le_bytes());
    value
}

/// Reads a block up to its end, without its magic and CRC.
fn read_block(bits: &mut Bits<'_>, block_max: usize, scratch: &mut Scratch) -> Result<Block, &'static str> {
    let Scratch { after, codes, selectors, .. } = scratch;
    if bits.bit() {
        return Err("randomised blocks (bzip2 before 0.9.5) are not supported");
    }
    let origin = bits.take(24) as usize;
    let mut list = [0u8; 256];
    let mut used = 0;
    let rows = bits.take(16);
    for row in 0..16 {
        if rows >> (15 - row) & 1 == 1 {
            let columns = bits.take(16);
            for column in 0..16 {
                if columns >> (15 - column) & 1 == 1 {
                    list[used] = (row * 16 + column) as u8;
                    used += 1;
                }
            }
        }
    }
    if used == 0 {
        return Err("a block uses no symbol");
    }
    let alphabet = used + 2;
    let groups = bits.take(3) as usize;
    let selector_count = bits.take(15) as usize;
    if !(2..=6).contains(&groups) || selector_count == 0 {
        return Err("a block has no codes");
    }
    selectors.clear();
    let mut order = [0u8, 1, 2, 3, 4, 5];
    for _ in 0..selector_count {
        let mut at = 0;
        while bits.bit() {
            at += 1;
            if at >= groups {
                return Err("a selector is out of range");
            }
        }
        if bits.ended() {
            return Err("the data ends inside a block");
        }
        order[..=at].rotate_right(1);
        selectors.push(order[0]);
    }
    for code in &mut codes[..groups] {
        let mut lengths = [0u8; ALPHABET_MAX];
        let mut length = bits.take(5) as usize;
        for slot in &mut lengths[..alphabet] {
            loop {
                if !(1..=CODE_MAX).contains(&length) {
                    return Err("the length of a code is out of range");
                }
                if !bits.bit() {
                    break;
                }
                // Past the end come zeros, so that this ends.
                length = if bits.bit() { length - 1 } else { length + 1 };
            }
            *slot = length as u8;
        }
        code.build(&lengths[..alphabet])?;
    }
    let end = (alphabet - 1) as u16;
    let mut counts = [0u32; 256];
    let mut len = 0;
    let (mut run, mut weight) = (0usize, 1usize);
    let links = &mut after[..block_max];
    for selector in selectors.iter() {
        let code = &codes[usize::from(*selector)];
        for _ in 0..GROUP / 2 {
            bits.refill();
            // Two codes fit into what is there.
            for _ in 0..2 {
                let symbol = code.symbol(bits).ok_or("a code stands for no symbol")?;
                if symbol <= RUN_B {
                    run += weight << (symbol - RUN_A);
                    weight <<= 1;
                    if run > block_max {
                        return Err("a block is longer than it may be");
                    }
                    continue;
                }
                if run > 0 {
                    let value = list[0];
                    let Some(slots) = links.get_mut(len..len + run) else {
                        return Err("a block is longer than it may be");
                    };
                    slots.fill(u32::from(value));
                    counts[usize::from(value)] += run as u32;
                    len += run;
                    (run, weight) = (0, 1);
                }
                if symbol == end {
                    if bits.ended() {
                        return Err("the data ends inside a block");
                    }
                    if origin >= len {
                        return Err("a block starts outside itself");
                    }
                    return Ok(Block { len, origin, counts });
                }
                let at = usize::from((symbol - 1) as u8);
                let value = to_front(&mut list, at);
                counts[usize::from(value)] += 1;
                let Some(slot) = links.get_mut(len) else {
                    return Err("a block is longer than it may be");
                };
                *slot = u32::from(value);
                len += 1;
            }
        }
        if bits.ended() {
            return Err("the data ends inside a block");
        }
    }
    Err("a block does not end")
}

/// Undoes the sorting of a block. What costs is waiting for memory that is read in an order nobody foresees; so the
/// text is followed from both ends at once, which halves the waiting.
fn unsort(block: &Block, scratch: &mut Scratch) {
    let (after, before) = (&mut scratch.after[..block.len], &mut scratch.before[..block.len]);
    let text = &mut scratch.text[..block.len];
    let mut next = [0u32; 256];
    let mut sum = 0;
    for (slot, count) in next.iter_mut().zip(block.counts) {
        *slot = sum;
        sum += count;
    }
    for at in 0..after.len() {
        let symbol = after[at] & 255;
        let slot = &mut next[symbol as usize];
        before[at] = *slot << 8 | symbol;
        if let Some(link) = after.get_mut(*slot as usize) {
            *link |= (at as u32) << 8;
        }
        *slot += 1;
    }
    let mut left = (after[block.origin] >> 8) as usize;
    let mut right = block.origin;
    let half = text.len() / 2;
    let (first, last) = text.split_at_mut(half);
    let mut backward = last.iter_mut().rev();
    for slot in first {
        // Every place is below the length: the links are a permutation.
        let (l, r) = (after.get(left).copied().unwrap_or(0), before.get(right).copied().unwrap_or(0));
        *slot = l as u8;
        left = (l >> 8) as usize;
        if let Some(slot) = backward.next() {
            *slot = r as u8;
            right = (r >> 8) as usize;
        }
    }
    if let Some(slot) = backward.next() {
        *slot = before[right] as u8;
    }
}

/// Undoes the runs of a block: four equal bytes are followed by the number of further ones. Appends to `out` up to
/// `size` bytes in all; false when there was more.
fn expand(text: &[u8], size: usize, out: &mut Vec<u8>) -> bool {
    let room = |out: &Vec<u8>| size.saturating_sub(out.len());
    let mut rest = text;
    loop {
        // Up to four equal bytes, or to the end.
        let run = rest.windows(4).position(|w| w[0] == w[1] && w[0] == w[2] && w[0] == w[3]);
        let plain = run.map_or(rest.len(), |at| at + 4);
        let taken = plain.min(room(out));
        out.extend_from_slice(&rest[..taken]);
        if taken < plain {
            return false;
        }
        let (Some(_), Some(count)) = (run, rest.get(plain)) else { return true };
        let (count, value) = (usize::from(*count), rest[plain - 1]);
        let taken = count.min(room(out));
        out.resize(out.len() + taken, value);
        if taken < count {
            return false;
        }
        rest = &rest[plain + 1..];
    }
}

/// Decompresses into `out`, whose content is replaced, up to `size` bytes. Says what is wrong; what came before it is
/// in `out`.
pub(super) fn decompress(bytes: &[u8], size: usize, out: &mut Vec<u8>) -> Option<String> {
    thread_local! {
        static SCRATCH: RefCell<Scratch> =
            const { RefCell::new(Scratch::NEW) };
    }
    out.clear();
    SCRATCH.with_borrow_mut(|scratch| streams(bytes, size, scratch, out).err().map(str::to_owned))
}

fn streams(
    mut bytes: &[u8],
    size: usize,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    while !bytes.is_empty() && out.len() < size {
        let level = match bytes {
            [b'B', b'Z', b'h', level @ b'1'..=b'9', ..] => usize::from(level - b'0'),
            _ => return Err("there is no bzip2 stream here"),
        };
        let block_max = level * (BLOCK_MAX / 9);
        scratch.prepare(block_max);
        let mut bits = Bits::new(&bytes[4..]);
        let mut combined = 0u32;
        loop {
            let magic = bits.take(48);
            let wanted = bits.take(32) as u32;
            if bits.ended() {
                return Err("the data ends between two blocks");
            }
            if magic == END_MAGIC {
                if wanted != combined {
                    return Err("the CRC of the stream is wrong");
                }
                break;
            }
            if magic != BLOCK_MAGIC {
                return Err("there is no block where one should be");
            }
            let block = read_block(&mut bits, block_max, scratch)?;
            let before = out.len();
            unsort(&block, scratch);
            let text = &scratch.text[..block.len];
            let whole = expand(text, size, out);
            if !whole {
                // More than the header announced: it counts only if the block is good (47 MB at most).
                out.truncate(before);
                expand(text, usize::MAX, out);
            }
            if crc(&out[before..]) != wanted {
                out.truncate(before);
                return Err("the CRC of a block is wrong");
            }
            if !whole {
                out.truncate(size);
                return Ok(());
            }
            combined = combined.rotate_left(1) ^ wanted;
        }
        bits.align();
        bytes = &bytes[bytes.len() - bits.left()..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn packed(content: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::new(level));
        encoder.write_all(content).expect("memory");
        encoder.finish().expect("memory")
    }

    fn noise(len: usize, mask: u32) -> Vec<u8> {
        let mut state = 0x9e37_79b9u32;
        (0..len)
            .map(|i| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (i as u8 / 8).wrapping_add((state & mask) as u8)
            })
            .collect()
    }

    fn contents() -> Vec<(&'static str, Vec<u8>)> {
        let runs: Vec<u8> = (0..3000u32).flat_map(|i| vec![(i % 7) as u8; (i % 300) as usize]).collect();
        let mut ends_in_four = noise(1000, 255);
        ends_in_four.extend([9; 4]);
        vec![
            ("nothing", Vec::new()),
            ("one byte", vec![7]),
            ("one symbol", vec![0; 2_000_000]),
            ("runs", runs),
            ("four at the end", ends_in_four),
            ("two symbols", noise(5000, 1).into_iter().map(|v| v & 1).collect()),
            ("noise", noise(1_300_000, 255)),
            ("picture", noise(950_000, 3)),
            ("long codes", (0..20u32).flat_map(|i| vec![(i * 12) as u8; 1 << i.min(17)]).collect()),
            ("text", b"Round the ragged rock. ".repeat(9999)),
        ]
    }

    #[test]
    fn gives_back_what_was_packed() {
        let mut out = Vec::new();
        for (name, content) in contents() {
            for level in [1, 9] {
                let bytes = packed(&content, level);
                assert_eq!(decompress(&bytes, content.len(), &mut out), None, "{name}");
                assert!(out == content, "{name} at level {level}");
                // Smaller and larger claims.
                assert_eq!(decompress(&bytes, content.len() + 9, &mut out), None, "{name}");
                assert!(out == content, "{name}");
                decompress(&bytes, content.len() / 2, &mut out);
                assert!(out == content[..content.len() / 2], "{name}");
            }
        }
        let (a, b) = (noise(70_000, 15), vec![3; 500]);
        let both = [packed(&a, 5), packed(&b, 1)].concat();
        assert_eq!(decompress(&both, 1 << 20, &mut out), None);
        assert!(out == [a, b].concat(), "two streams");
    }

    #[test]
    fn damage_is_said_and_what_came_before_is_kept() {
        let content = noise(450_000, 31);
        let bytes = packed(&content, 1);
        let mut out = Vec::new();
        for cut in [0, 3, 4, 9, 14, 100, 5000, bytes.len() / 2, bytes.len() - 12, bytes.len() - 1] {
            let error = decompress(&bytes[..cut], content.len(), &mut out);
            assert_eq!(error.is_some(), cut > 0, "cut at {cut}");
            // Whole blocks of 100 kB.
            let kept = if cut < 5001 { 0 } else { 150_000 };
            assert!(content.starts_with(&out) && out.len() >= kept, "cut at {cut}: {}", out.len());
            assert!(cut >= 5001 || out.is_empty(), "cut at {cut}: {}", out.len());
        }
        let mut silent = 0;
        for at in (4..bytes.len()).step_by(997) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            silent += u32::from(decompress(&changed, content.len(), &mut out).is_none() && out != content);
            assert!(content.starts_with(&out), "byte {at} changed");
        }
        assert_eq!(silent, 0, "changes that nobody noticed");
        let junk = [&b"BZh9"[..], &BLOCK_MAGIC.to_be_bytes()[2..], &noise(400, 255)].concat();
        assert!(decompress(&junk, 1 << 20, &mut out).is_some());
    }
}
