//! Headers of safetensors files, read with suspicion.
//!
//! Layout: `u64` little-endian header length, a JSON object (`name -> {dtype, shape, data_offsets}`), then data.
//! The tensors must cover the data exactly: no gap, no overlap, nothing beyond the end.

use std::{collections::BTreeMap, fmt, fs::File, io::Read, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{CheckpointError, Dtype, Entry};

/// Longest header that is read.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// One tensor as the header describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header, in order, duplicates kept so that they can be refused; and the metadata.
struct Header(Vec<(String, Wire)>, BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut out = Vec::new();
                let mut metadata = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        metadata = map.next_value()?;
                    } else {
                        out.push((name, map.next_value()?));
                    }
                }
                Ok(Header(out, metadata))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads the header of `path` and appends its tensors; offsets are from the start of the file. Gives the metadata.
pub(super) fn read_header(
    path: &Path,
    file: usize,
    out: &mut Vec<(String, Entry)>,
) -> Result<BTreeMap<String, String>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let bad = |what: String| CheckpointError::Malformed { path: path.to_owned(), what };
    let mut reader = File::open(path).map_err(io)?;
    let size = reader.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(bad(format!("{size} bytes are too few for a header length")));
    }
    reader.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size - 8 {
        return Err(bad(format!(
            "the header claims {length} bytes, the file has {size} (at most {MAX_HEADER_BYTES} are read)"
        )));
    }
    let mut json = vec![0; usize::try_from(length).unwrap_or_default()];
    reader.read_exact(&mut json).map_err(io)?;
    let Header(tensors, metadata) = serde_json::from_slice(&json).map_err(|e| bad(format!("header: {e}")))?;
    let start = 8 + length;
    let data = size - start;
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, wire) in tensors {
        super::check_name(path, &name)?;
        let Some(dtype) = Dtype::from_safetensors(&wire.dtype) else {
            return Err(bad(format!("tensor {name}: dtype {} is not supported", wire.dtype.escape_debug())));
        };
        let [from, to] = wire.data_offsets;
        let (shape, bytes) = super::checked_shape(&wire.shape, dtype)
            .ok_or_else(|| bad(format!("tensor {name}: shape {:?} is too large", wire.shape)))?;
        if to < from || to > data || to - from != bytes {
            return Err(bad(format!(
                "tensor {name}: bytes {from}..{to} of {data} do not hold {:?} of {}",
                wire.shape, wire.dtype
            )));
        }
        entries.push((name, Entry { file, offset: start + from, dtype, shape }));
    }
    let mut order: Vec<(u64, u64, &str)> = entries
        .iter()
        .map(|(name, e)| (e.offset - start, e.offset - start + e.bytes(), name.as_str()))
        .collect();
    order.sort_unstable();
    let mut end = 0;
    for (from, to, name) in order {
        if from != end {
            let word = if from < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(bad(format!("tensor {name} at bytes {from}..{to} {word} (which ends at {end})")));
        }
        end = to;
    }
    if end != data {
        return Err(bad(format!("{} bytes after the last tensor", data - end)));
    }
    out.extend(entries);
    Ok(metadata)
}
