//! RVL: run lengths and variable-length differences of 16-bit depth (A. D. Wilson, "Fast Lossless Depth Image
//! Compression", 2017), as `compressed_depth_image_transport` sends it.

/// Why RVL bytes give no picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RvlError {
    /// The bytes end before the last pixel.
    Short { pixels: usize },
    /// A run is longer than what is left of the picture.
    LongRun { run: u64, left: usize },
}

impl std::fmt::Display for RvlError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Short { pixels } => write!(f, "the data end after {pixels} pixels"),
            Self::LongRun { run, left } => write!(f, "a run of {run} pixels where {left} are left"),
        }
    }
}

/// Nibbles of little-endian 32-bit words, the highest first.
struct Nibbles<'a> {
    bytes: &'a [u8],
    /// Nibbles taken so far.
    at: usize,
}

impl Nibbles<'_> {
    fn next(&mut self) -> Option<u8> {
        let (word, place) = (self.at / 8, self.at % 8);
        // The highest nibble is the high half of the fourth byte.
        let byte = *self.bytes.get(word * 4 + 3 - place / 2)?;
        self.at += 1;
        Some(if place.is_multiple_of(2) { byte >> 4 } else { byte & 0xf })
    }

    /// A number in groups of three bits, the lowest first; the high bit of a nibble says that another follows.
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..33).step_by(3) {
            let nibble = self.next()?;
            value |= u64::from(nibble & 7) << shift;
            if nibble & 8 == 0 {
                return Some(value);
            }
        }
        Some(u64::MAX)
    }
}

/// Decodes `out.len()` samples.
pub(super) fn decode(bytes: &[u8], out: &mut [u16]) -> Result<(), RvlError> {
    let mut nibbles = Nibbles { bytes, at: 0 };
    let mut done = 0;
    let mut previous = 0u16;
    let run = |n: Option<u64>, done: usize, total: usize| {
        let run = n.ok_or(RvlError::Short { pixels: done })?;
        let left = total - done;
        usize::try_from(run).ok().filter(|run| *run <= left).ok_or(RvlError::LongRun { run, left })
    };
    let mut idle = 0;
    while done < out.len() {
        let zeros = run(nibbles.number(), done, out.len())?;
        out[done..done + zeros].fill(0);
        done += zeros;
        // The encoder writes the second length of a pair also at the end of the picture.
        let others = match run(nibbles.number(), done, out.len()) {
            Err(RvlError::Short { .. }) if done == out.len() => 0,
            other => other?,
        };
        idle = if zeros + others == 0 { idle + 1 } else { 0 };
        if idle > 1 {
            return Err(RvlError::Short { pixels: done });
        }
        for sample in &mut out[done..done + others] {
            let folded = nibbles.number().ok_or(RvlError::Short { pixels: done })? as u32;
            let step = (folded >> 1) as i32 ^ -((folded & 1) as i32);
            previous = i32::from(previous).wrapping_add(step) as u16;
            *sample = previous;
        }
        done += others;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The encoder, written after the paper.
    pub fn encode(samples: &[u16]) -> Vec<u8> {
        let mut nibbles = Vec::new();
        let mut number = |mut value: u32| {
            loop {
                let nibble = (value & 7) as u8;
                value >>= 3;
                nibbles.push(if value == 0 { nibble } else { nibble | 8 });
                if value == 0 {
                    break;
                }
            }
        };
        let (mut at, mut previous) = (0, 0i32);
        while at < samples.len() {
            let zeros = samples[at..].iter().take_while(|s| **s == 0).count();
            at += zeros;
            let others = samples[at..].iter().take_while(|s| **s != 0).count();
            number(zeros as u32);
            number(others as u32);
            for sample in &samples[at..at + others] {
                let step = i32::from(*sample) - previous;
                number(((step << 1) ^ (step >> 31)) as u32);
                previous = i32::from(*sample);
            }
            at += others;
        }
        let mut bytes = Vec::new();
        for word in nibbles.chunks(8) {
            let value = word.iter().enumerate().fold(0u32, |sum, (i, n)| sum | u32::from(*n) << (28 - 4 * i));
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn samples_come_back() {
        let cases: [&[u16]; 6] = [
            &[0; 9],
            &[1000],
            &[0, 0, 1000, 1001, 998, 0, 65_535, 1, 0],
            &[5, 0, 5, 0, 5],
            &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
            &[65_535, 0, 65_535],
        ];
        for samples in cases {
            let mut out = vec![7; samples.len()];
            decode(&encode(samples), &mut out).unwrap();
            assert_eq!(out, samples);
        }
        // By hand: no zeros, two samples, 3 (folded 6) and 2 (folded 1): nibbles 0 2 6 1.
        let mut out = [0; 2];
        decode(&0x0261_0000u32.to_le_bytes(), &mut out).unwrap();
        assert_eq!(out, [3, 2]);
    }

    #[test]
    fn damage_is_refused() {
        let whole = encode(&[9, 8, 0, 7, 300, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]);
        for length in 0..whole.len() - 3 {
            assert!(decode(&whole[..length], &mut [0; 17]).is_err(), "{length} bytes");
        }
        assert_eq!(decode(&[0xff; 64], &mut [0; 4]), Err(RvlError::LongRun { run: u64::MAX, left: 4 }));
        assert!(decode(&[0; 4096], &mut [0; 4]).is_err(), "runs of nothing end");
    }
}
