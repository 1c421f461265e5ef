//! PyTorch `.pth` archives: a zip file of raw storages and a pickle that says which tensor lies where.
//!
//! The pickle is interpreted by a machine that can build dictionaries, lists, tuples, numbers, strings and tensor
//! descriptions, and nothing else. Any other opcode or global is an error that names it; nothing is ever called.

use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::Path, rc::Rc};

use super::{CheckpointError, Dtype, Entry};

/// Largest pickle that is read.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Largest central directory that is read.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Deepest nesting of tuples.
const MAX_DEPTH: usize = 32;
/// Most values ever made (stack, tuples, dictionaries together).
const MAX_VALUES: usize = 1 << 22;

/// A file inside a zip archive, stored without compression.
#[derive(Clone, Copy, Debug)]
struct Stored {
    /// Offset of the local header.
    header: u64,
    size: u64,
    compressed: bool,
}

/// Reads the directory and the pickle of a `.pth` file and appends its tensors.
pub(super) fn read_archive(
    path: &Path,
    file: usize,
    out: &mut Vec<(String, Entry)>,
) -> Result<(), CheckpointError> {
    let bad = |what: String| CheckpointError::Malformed { path: path.to_owned(), what };
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let open = File::open(path).map_err(io)?;
    let size = open.metadata().map_err(io)?.len();
    let archive = Archive { file: &open, size };
    let entries = archive.directory().map_err(&bad)?;
    let mut pickles = entries.keys().filter(|name| name.ends_with("/data.pkl") || *name == "data.pkl");
    let (Some(pickle), None) = (pickles.next(), pickles.next()) else {
        return Err(bad(
            "no single data.pkl in the archive; expected a file written by torch.save".to_owned()
        ));
    };
    let root = &pickle[..pickle.len() - "data.pkl".len()];
    if let Some(order) = entries.get(&format!("{root}byteorder")) {
        let text = archive.read(order, 16).map_err(&bad)?;
        if text != b"little" {
            return Err(bad(format!("byte order {:?}, only little is read", String::from_utf8_lossy(&text))));
        }
    }
    let code = archive.read(&entries[pickle], MAX_PICKLE_BYTES).map_err(&bad)?;
    for (name, tensor) in run(&code).map_err(|e| bad(format!("data.pkl: {e}")))? {
        let bad = |what: String| bad(format!("tensor {name}: {what}"));
        let key = format!("{root}data/{}", tensor.key);
        let stored = entries.get(&key).ok_or_else(|| bad(format!("no storage {key} in the archive")))?;
        if stored.compressed {
            return Err(bad(format!("storage {key} is compressed")));
        }
        let (shape, bytes) = super::checked_shape(&tensor.shape, tensor.dtype)
            .ok_or_else(|| bad(format!("shape {:?} is too large", tensor.shape)))?;
        if !row_major(&tensor.shape, &tensor.stride) {
            return Err(bad(format!("strides {:?} of {:?} are not row-major", tensor.stride, tensor.shape)));
        }
        let from = tensor.offset.checked_mul(tensor.dtype.size() as u64);
        let Some(from) = from.filter(|from| from.checked_add(bytes).is_some_and(|end| end <= stored.size))
        else {
            return Err(bad(format!(
                "{bytes} bytes from element {} do not fit storage {key} of {} bytes",
                tensor.offset, stored.size
            )));
        };
        let start = archive.start(stored).map_err(&bad)?;
        let entry = Entry { file, offset: start + from, dtype: tensor.dtype, shape };
        out.push((name, entry));
    }
    Ok(())
}

/// Whether the strides are those of a dense row-major tensor (axes of size one may have any).
fn row_major(shape: &[u64], stride: &[u64]) -> bool {
    if shape.len() != stride.len() {
        return false;
    }
    let mut expected = 1u64;
    for (size, stride) in shape.iter().zip(stride).rev() {
        if *size > 1 && *stride != expected {
            return false;
        }
        expected = expected.saturating_mul((*size).max(1));
    }
    true
}

struct Archive<'a> {
    file: &'a File,
    size: u64,
}

fn u16_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u16::from_le_bytes(*b.get(at..)?.first_chunk()?)))
}

fn u32_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u32::from_le_bytes(*b.get(at..)?.first_chunk()?)))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*b.get(at..)?.first_chunk()?))
}

impl Archive<'_> {
    fn at(&self, offset: u64, len: u64) -> Result<Vec<u8>, String> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(format!(
                "zip: {len} bytes at {offset} lie beyond the end of the file ({} bytes)",
                self.size
            ));
        }
        let mut out = vec![0; usize::try_from(len).map_err(|e| e.to_string())?];
        self.file.read_exact_at(&mut out, offset).map_err(|e| e.to_string())?;
        Ok(out)
    }

    /// The central directory, zip64 included.
    fn directory(&self) -> Result<HashMap<String, Stored>, String> {
        let broken = || "zip: broken central directory".to_owned();
        let tail_len = self.size.min(22 + 0xffff);
        let tail_at = self.size - tail_len;
        let tail = self.at(tail_at, tail_len)?;
        let Some(end) = tail.windows(4).rposition(|w| w == b"PK\x05\x06") else {
            return Err("no zip archive; .pth files written before PyTorch 1.6 must be converted".to_owned());
        };
        let record = &tail[end..];
        let mut count = u16_at(record, 10).ok_or_else(broken)?;
        let mut len = u32_at(record, 12).ok_or_else(broken)?;
        let mut offset = u32_at(record, 16).ok_or_else(broken)?;
        if count == 0xffff || len == 0xffff_ffff || offset == 0xffff_ffff {
            let at = (tail_at + end as u64).checked_sub(20).ok_or_else(broken)?;
            let locator = self.at(at, 20)?;
            if &locator[..4] != b"PK\x06\x07" {
                return Err(broken());
            }
            let record = self.at(u64_at(&locator, 8).ok_or_else(broken)?, 56)?;
            if &record[..4] != b"PK\x06\x06" {
                return Err(broken());
            }
            count = u64_at(&record, 32).ok_or_else(broken)?;
            len = u64_at(&record, 40).ok_or_else(broken)?;
            offset = u64_at(&record, 48).ok_or_else(broken)?;
        }
        if len > MAX_DIRECTORY_BYTES {
            return Err(format!("zip: directory of {len} bytes, at most {MAX_DIRECTORY_BYTES} are read"));
        }
        let bytes = self.at(offset, len)?;
        let mut rest = bytes.as_slice();
        let mut out = HashMap::new();
        for _ in 0..count {
            let (name, stored, used) = directory_entry(rest).ok_or_else(broken)?;
            rest = &rest[used..];
            if out.insert(name.clone(), stored).is_some() {
                return Err(format!("zip: {name} is there twice"));
            }
        }
        Ok(out)
    }

    /// First byte of an entry's data.
    fn start(&self, entry: &Stored) -> Result<u64, String> {
        let header = self.at(entry.header, 30)?;
        let broken = || format!("zip: broken local header at {}", entry.header);
        if &header[..4] != b"PK\x03\x04" {
            return Err(broken());
        }
        let skip = 30 + u16_at(&header, 26).ok_or_else(broken)? + u16_at(&header, 28).ok_or_else(broken)?;
        let start = entry.header + skip;
        if start.checked_add(entry.size).is_none_or(|end| end > self.size) {
            return Err(format!("zip: entry at {} lies beyond the end of the file", entry.header));
        }
        Ok(start)
    }

    fn read(&self, entry: &Stored, limit: u64) -> Result<Vec<u8>, String> {
        if entry.compressed || entry.size > limit {
            return Err(format!("zip: entry of {} bytes is compressed or larger than {limit}", entry.size));
        }
        self.at(self.start(entry)?, entry.size)
    }
}

/// Name, place and length of one central directory record.
fn directory_entry(b: &[u8]) -> Option<(String, Stored, usize)> {
    if b.get(..4)? != b"PK\x01\x02" {
        return None;
    }
    let method = u16_at(b, 10)?;
    let packed = u32_at(b, 20)?;
    let mut size = u32_at(b, 24)?;
    let (name_len, extra_len, comment_len) =
        (u16_at(b, 28)? as usize, u16_at(b, 30)? as usize, u16_at(b, 32)? as usize);
    let mut header = u32_at(b, 42)?;
    let name = String::from_utf8(b.get(46..46 + name_len)?.to_vec()).ok()?;
    let mut extra = b.get(46 + name_len..46 + name_len + extra_len)?;
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0)?, u16_at(extra, 2)? as usize);
        let mut body = extra.get(4..4 + len)?;
        if id == 1 {
            let mut next = || {
                let value = u64_at(body, 0)?;
                body = &body[8..];
                Some(value)
            };
            if size == 0xffff_ffff {
                size = next()?;
            }
            if packed == 0xffff_ffff {
                next()?;
            }
            if header == 0xffff_ffff {
                header = next()?;
            }
        }
        extra = &extra[4 + len..];
    }
    let used = 46 + name_len + extra_len + comment_len;
    b.get(..used)?;
    Some((name, Stored { header, size, compressed: method != 0 }, used))
}

/// A tensor as the pickle describes it.
#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    key: Rc<str>,
    dtype: Dtype,
    offset: u64,
    shape: Vec<u64>,
    stride: Vec<u64>,
}

/// The globals that may be named; none of them is ever called by us as code.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn new(module: &str, name: &str) -> Result<Self, String> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::Bf16),
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Self::Storage(Dtype::Bool),
            _ => return Err(format!("it asks for {module}.{name}; only tensors are read")),
        })
    }
}

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Int(i64),
    Float,
    Str(Rc<str>),
    Tuple(Rc<[Value]>, usize),
    Dict(usize),
    List,
    Global(Global),
    Storage { key: Rc<str>, dtype: Dtype },
    Tensor(Rc<Tensor>),
    Mark,
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Int(_) => "a number",
            Self::Float => "a float",
            Self::Str(_) => "a string",
            Self::Tuple(..) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::List => "a list",
            Self::Global(_) => "a class",
            Self::Storage { .. } => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::Mark => "a mark",
        }
    }

    fn depth(&self) -> usize {
        if let Self::Tuple(_, depth) = self { *depth } else { 0 }
    }
}

/// The pickle machine.
struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<u64, Value>,
    dicts: Vec<Vec<(Value, Value)>>,
    made: usize,
}

/// Runs a pickle; its result must be a dictionary of tensors.
fn run(code: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let mut m = Machine { code, at: 0, stack: vec![], memo: HashMap::new(), dicts: vec![], made: 0 };
    let result = loop {
        if let Some(value) = m.step()? {
            break value;
        }
    };
    let Value::Dict(dict) = result else {
        return Err(format!("it holds {}, expected a dictionary of tensors", result.kind()));
    };
    let mut out = Vec::new();
    for (key, value) in std::mem::take(&mut m.dicts[dict]) {
        let Value::Str(name) = key else {
            return Err(format!("a key is {}, expected a name", key.kind()));
        };
        let Value::Tensor(tensor) = value else {
            return Err(format!("{name} is {}, expected a tensor", value.kind()));
        };
        if out.iter().len() >= MAX_VALUES {
            return Err("too many tensors".to_owned());
        }
        out.push((name.to_string(), (*tensor).clone()));
    }
    let mut names: Vec<&String> = out.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("tensor {} is there twice", twice[0]));
    }
    Ok(out)
}

impl Machine<'_> {
    fn bytes(&mut self, count: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.code.len());
        let end = end.ok_or_else(|| format!("it ends in the middle of byte {}", self.at))?;
        let out = &self.code[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn number(&mut self, count: usize) -> Result<u64, String> {
        Ok(self.bytes(count)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn text(&mut self, count: usize) -> Result<Rc<str>, String> {
        let at = self.at;
        let text =
            std::str::from_utf8(self.bytes(count)?).map_err(|_| format!("text at {at} is not UTF-8"))?;
        Ok(text.into())
    }

    fn line(&mut self) -> Result<Rc<str>, String> {
        let len = self.code[self.at..].iter().position(|b| *b == b'\n');
        let text = self.text(len.ok_or("an unfinished line")?)?;
        self.at += 1;
        Ok(text)
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        self.made += 1;
        if self.made > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| format!("an empty stack at byte {}", self.at))
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark)).ok_or("a missing mark")?;
        let out = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(out)
    }

    fn push_tuple(&mut self, values: Vec<Value>) -> Result<(), String> {
        let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(format!("tuples nested more than {MAX_DEPTH} deep"));
        }
        self.made += values.len();
        self.push(Value::Tuple(values.into(), depth))
    }

    fn push_dict(&mut self) -> Result<(), String> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    fn set_items(&mut self, items: Vec<Value>) -> Result<(), String> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err("items set on something that is no dictionary".to_owned());
        };
        let mut items = items.into_iter();
        while let Some(key) = items.next() {
            let value = items.next().ok_or("a key without a value")?;
            self.dicts[*dict].push((key, value));
        }
        Ok(())
    }

    fn memoize(&mut self, key: u64) -> Result<(), String> {
        let top = self.stack.last().ok_or("an empty stack")?.clone();
        if self.memo.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} memo entries"));
        }
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), String> {
        let value = self.memo.get(&key).ok_or_else(|| format!("memo {key} was never set"))?.clone();
        self.push(value)
    }

    /// Executes one opcode; the result at STOP.
    fn step(&mut self) -> Result<Option<Value>, String> {
        let place = self.at;
        let op = self.bytes(1)?[0];
        match op {
            0x80 => {
                let protocol = self.number(1)?;
                if protocol > 5 {
                    return Err(format!("pickle protocol {protocol}, at most 5 is read"));
                }
            }
            0x95 => {
                self.bytes(8)?; // FRAME
            }
            b'}' => self.push_dict()?,
            b']' => self.push(Value::List)?,
            b')' => self.push_tuple(vec![])?,
            b'(' => self.push(Value::Mark)?,
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool)?,
            b'J' => {
                let n = self.number(4)? as u32;
                self.push(Value::Int(i64::from(n.cast_signed())))?;
            }
            b'K' => {
                let n = self.number(1)?;
                self.push(Value::Int(n.cast_signed()))?;
            }
            b'M' => {
                let n = self.number(2)?;
                self.push(Value::Int(n.cast_signed()))?;
            }
            0x8a => {
                let len = self.number(1)? as usize;
                if len > 8 {
                    return Err(format!("a number of {len} bytes"));
                }
                let n = self.number(len)?;
                let shift = 64 - 8 * len as u32;
                let n = if len == 0 { 0 } else { (n << shift).cast_signed() >> shift };
                self.push(Value::Int(n))?;
            }
            b'G' => {
                self.bytes(8)?;
                self.push(Value::Float)?;
            }
            b'X' => {
                let len = self.number(4)? as usize;
                let text = self.text(len)?;
                self.push(Value::Str(text))?;
            }
            0x8c => {
                let len = self.number(1)? as usize;
                let text = self.text(len)?;
                self.push(Value::Str(text))?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(Value::Global(Global::new(&module, &name)?))?;
            }
            0x93 => {
                let (Value::Str(name), Value::Str(module)) = (self.pop()?, self.pop()?) else {
                    return Err("a global without names".to_owned());
                };
                self.push(Value::Global(Global::new(&module, &name)?))?;
            }
            b'q' => {
                let key = self.number(1)?;
                self.memoize(key)?;
            }
            b'r' => {
                let key = self.number(4)?;
                self.memoize(key)?;
            }
            0x94 => self.memoize(self.memo.len() as u64)?,
            b'h' => {
                let key = self.number(1)?;
                self.recall(key)?;
            }
            b'j' => {
                let key = self.number(4)?;
                self.recall(key)?;
            }
            b't' => {
                let values = self.since_mark()?;
                self.push_tuple(values)?;
            }
            0x85..=0x87 => {
                let count = usize::from(op - 0x84);
                let from = self.stack.len().checked_sub(count).ok_or("an empty stack")?;
                let values = self.stack.split_off(from);
                self.push_tuple(values)?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set_items(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![key, value])?;
            }
            // Lists only occur inside metadata: what is in them is not kept.
            b'e' => {
                self.since_mark()?;
                if !matches!(self.stack.last(), Some(Value::List)) {
                    return Err("values appended to something that is no list".to_owned());
                }
            }
            b'a' => {
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::List)) {
                    return Err("a value appended to something that is no list".to_owned());
                }
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = storage(&id)?;
                self.push(storage)?;
            }
            b'R' => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                self.reduce(&callee, &arguments)?;
            }
            // State of a dictionary (`_metadata` of a state dict) is dropped.
            b'b' => {
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err(format!("opcode BUILD at byte {place} on something that is no dictionary"));
                }
            }
            b'.' => return Ok(Some(self.pop()?)),
            _ => {
                return Err(format!(
                    "opcode 0x{op:02x}{} at byte {place}; only tensors are read",
                    if op.is_ascii_graphic() { format!(" ({})", op as char) } else { String::new() }
                ));
            }
        }
        Ok(None)
    }

    /// What calling one of the known globals would have given.
    fn reduce(&mut self, callee: &Value, arguments: &Value) -> Result<(), String> {
        let Value::Tuple(arguments, _) = arguments else {
            return Err("a call without a tuple of arguments".to_owned());
        };
        match (callee, &**arguments) {
            (Value::Global(Global::OrderedDict), [] | [Value::List]) => self.push_dict(),
            (
                Value::Global(Global::RebuildTensor),
                [
                    Value::Storage { key, dtype },
                    Value::Int(offset),
                    Value::Tuple(shape, _),
                    Value::Tuple(stride, _),
                    ..,
                ],
            ) => {
                let sizes = |values: &[Value]| {
                    let one = |v: &Value| match v {
                        Value::Int(n) => u64::try_from(*n).ok(),
                        _ => None,
                    };
                    values.iter().map(one).collect::<Option<Vec<u64>>>()
                };
                let bad = || "a tensor with a negative or missing size".to_owned();
                let tensor = Tensor {
                    key: key.clone(),
                    dtype: *dtype,
                    offset: u64::try_from(*offset).map_err(|_| bad())?,
                    shape: sizes(shape).ok_or_else(bad)?,
                    stride: sizes(stride).ok_or_else(bad)?,
                };
                self.push(Value::Tensor(Rc::new(tensor)))
            }
            (Value::Global(Global::RebuildParameter), [Value::Tensor(tensor), ..]) => {
                self.push(Value::Tensor(tensor.clone()))
            }
            (Value::Global(global), _) => Err(format!("a call of {global:?} with arguments that do not fit")),
            (other, _) => Err(format!("a call of {}", other.kind())),
        }
    }
}

/// The storage that a persistent id `('storage', class, key, location, count)` names.
fn storage(id: &Value) -> Result<Value, String> {
    if let Value::Tuple(parts, _) = id
        && let [Value::Str(tag), Value::Global(Global::Storage(dtype)), Value::Str(key), ..] = &**parts
        && &**tag == "storage"
    {
        // Keys are plain numbers; anything else could point elsewhere in the archive.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(format!("storage key {key:?}"));
        }
        return Ok(Value::Storage { key: key.clone(), dtype: *dtype });
    }
    Err("a persistent id that is no storage".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_pickles_are_named() {
        let nested = [vec![0x80, 2, b')'], [0x85].repeat(40), vec![b'.']].concat();
        let cases: [(&[u8], &str); 11] = [
            (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00lsR.", "os.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
            (b"\x80\x02i", "opcode 0x69 (i)"),
            (b"\x80\x02\x81", "opcode 0x81"),
            (b"\x80\x09", "protocol 9"),
            (b"\x80\x02}X\xff\xff\xff\x7fa", "in the middle"),
            (b"\x80\x02K\x01.", "a number, expected a dictionary"),
            (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "a is a number, expected a tensor"),
            (b"\x80\x02)\x85Q.", "no storage"),
            (b"\x80\x02h\x05.", "memo 5"),
            (&nested, "deep"),
        ];
        for (code, word) in cases {
            let error = run(code).unwrap_err();
            assert!(error.contains(word), "{error} should say {word}");
        }
    }

    #[test]
    fn strides() {
        let cases: [(&[u64], &[u64], bool); 5] = [
            (&[2, 3], &[3, 1], true),
            (&[2, 3], &[1, 2], false),
            (&[2, 1, 3], &[3, 77, 1], true),
            (&[], &[], true),
            (&[2], &[], false),
        ];
        for (shape, stride, dense) in cases {
            assert_eq!(row_major(shape, stride), dense, "{shape:?} {stride:?}");
        }
    }
}
