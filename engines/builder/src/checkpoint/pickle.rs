//! PyTorch `.pth` archives: a zip file of raw storages and a pickle that says which tensor lies where.
//!
//! The pickle is interpreted by a machine that can build dictionaries, lists, tuples, numbers, strings and tensor
//! descriptions, and nothing else. Any other opcode or global is an error that names it; nothing is ever called.

use std::{collections::HashMap, fs::File, path::Path, rc::Rc};

use super::zip::Archive;
use super::{CheckpointError, Dtype, Entry};

/// Largest pickle that is read.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Deepest nesting of tuples.
const MAX_DEPTH: usize = 32;
/// Most values ever made (stack, tuples, dictionaries together).
const MAX_VALUES: usize = 1 << 22;

/// Why the description of the tensors was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PickleError {
    /// A newer format.
    #[error("pickle protocol {protocol}, at most 5 is read")]
    Protocol {
        /// The version that it asks for.
        protocol: u64,
    },
    /// The bytes end too early.
    #[error("it ends in the middle of byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// Bytes that should be text.
    #[error("text at {at} is not UTF-8")]
    Text {
        /// Where.
        at: usize,
    },
    /// It would call something.
    #[error("it asks for {}.{}; only tensors are read", module.escape_debug(), name.escape_debug())]
    Global {
        /// Python module.
        module: String,
        /// Name in it.
        name: String,
    },
    /// It does something that no description of tensors needs.
    #[error(
        "opcode 0x{op:02x}{} at byte {at}; only tensors are read",
        if op.is_ascii_graphic() { format!(" ({})", char::from(*op)) } else { String::new() }
    )]
    Opcode {
        /// Which one.
        op: u8,
        /// Where.
        at: usize,
    },
    /// A value is of another kind than it must be.
    #[error("{what} is {got}, expected {wanted}")]
    Kind {
        /// Which value.
        what: String,
        /// Its kind.
        got: &'static str,
        /// The right kind.
        wanted: &'static str,
    },
    /// More of something than a checkpoint ever has.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        limit: usize,
    },
    /// The instructions do not fit each other.
    #[error("{what} at byte {at}")]
    Broken {
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// A value is recalled that was never kept.
    #[error("memo {key} was never set")]
    Memo {
        /// Its number.
        key: u64,
    },
    /// A storage whose name could be a path.
    #[error("storage key {key:?}")]
    Key {
        /// The name.
        key: String,
    },
    /// Two tensors have one name.
    #[error("tensor {name:?} is there twice")]
    Twice {
        /// The name.
        name: String,
    },
}

/// Reads the directory and the pickle of a `.pth` file and appends its tensors; those of dictionaries inside a
/// dictionary (`generator`, `generator_ema`) have its key and a dot before their names.
pub(super) fn read_archive(
    path: &Path,
    file: usize,
    out: &mut Vec<(String, Entry)>,
) -> Result<(), CheckpointError> {
    let bad = |what: String| CheckpointError::Malformed { path: path.to_owned(), what };
    let zip = |source| CheckpointError::Zip { path: path.to_owned(), source };
    let open = File::open(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    let archive = Archive::new(&open).map_err(zip)?;
    let entries = archive.directory().map_err(zip)?;
    let mut pickles = entries.keys().filter(|name| name.ends_with("/data.pkl") || *name == "data.pkl");
    let (Some(pickle), None) = (pickles.next(), pickles.next()) else {
        return Err(bad(
            "no single data.pkl in the archive; expected a file written by torch.save".to_owned()
        ));
    };
    let root = &pickle[..pickle.len() - "data.pkl".len()];
    if let Some(order) = entries.get(&format!("{root}byteorder")) {
        let text = archive.read(order, 16).map_err(zip)?;
        if text != b"little" {
            return Err(bad(format!("byte order {:?}, only little is read", String::from_utf8_lossy(&text))));
        }
    }
    let code = archive.read(&entries[pickle], MAX_PICKLE_BYTES).map_err(zip)?;
    let tensors = run(&code).map_err(|source| CheckpointError::Pickle { path: path.to_owned(), source })?;
    for (name, tensor) in tensors {
        super::check_name(path, &name)?;
        let bad = |what: String| bad(format!("tensor {name}: {what}"));
        let key = format!("{root}data/{}", tensor.key);
        let stored = entries.get(&key).ok_or_else(|| bad(format!("no storage {key:?} in the archive")))?;
        if stored.compressed {
            return Err(bad(format!("storage {key:?} is compressed")));
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
                "{bytes} bytes from element {} do not fit storage {key:?} of {} bytes",
                tensor.offset, stored.size
            )));
        };
        let start = archive.start(stored).map_err(zip)?;
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
    fn new(module: &str, name: &str) -> Result<Self, PickleError> {
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
            ("torch", "Float8_e4m3fnStorage") => Self::Storage(Dtype::F8E4M3),
            ("torch", "Float8_e5m2Storage") => Self::Storage(Dtype::F8E5M2),
            _ => return Err(PickleError::Global { module: module.to_owned(), name: name.to_owned() }),
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

/// Runs a pickle; its result must be a dictionary of tensors, or of dictionaries of tensors.
fn run(code: &[u8]) -> Result<Vec<(String, Tensor)>, PickleError> {
    let mut m = Machine { code, at: 0, stack: vec![], memo: HashMap::new(), dicts: vec![], made: 0 };
    let result = loop {
        if let Some(value) = m.step()? {
            break value;
        }
    };
    let Value::Dict(dict) = result else {
        let (what, wanted) = ("the whole".to_owned(), "a dictionary of tensors");
        return Err(PickleError::Kind { what, got: result.kind(), wanted });
    };
    let mut out = Vec::new();
    let items = std::mem::take(&mut m.dicts[dict]);
    let holds_tensors = |value: &Value| {
        let Value::Dict(inner) = value else { return false };
        m.dicts[*inner].iter().any(|(_, v)| matches!(v, Value::Tensor(_)))
    };
    // A trainer's file holds several networks side by side, and numbers of its own beside them.
    let nested = items.iter().any(|(_, value)| holds_tensors(value));
    for (key, value) in items {
        let name = name_of(&key)?;
        match value {
            Value::Tensor(tensor) => out.push((name.to_owned(), (*tensor).clone())),
            Value::Dict(inner) if nested => {
                for (key, value) in &m.dicts[inner] {
                    if let (Value::Str(inner), Value::Tensor(tensor)) = (key, value) {
                        out.push((format!("{name}.{inner}"), (**tensor).clone()));
                    }
                }
            }
            _ if nested => {}
            other => {
                let what = name.escape_debug().to_string();
                return Err(PickleError::Kind { what, got: other.kind(), wanted: "a tensor" });
            }
        }
        if out.len() > MAX_VALUES {
            return Err(PickleError::Limit { what: "tensors", limit: MAX_VALUES });
        }
    }
    let mut names: Vec<&String> = out.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(PickleError::Twice { name: twice[0].clone() });
    }
    Ok(out)
}

fn name_of(key: &Value) -> Result<&str, PickleError> {
    match key {
        Value::Str(name) => Ok(name),
        other => Err(PickleError::Kind { what: "a key".to_owned(), got: other.kind(), wanted: "a name" }),
    }
}

impl Machine<'_> {
    fn broken(&self, what: &'static str) -> PickleError {
        PickleError::Broken { what, at: self.at }
    }

    fn bytes(&mut self, count: usize) -> Result<&[u8], PickleError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.code.len());
        let end = end.ok_or(PickleError::Truncated { at: self.at })?;
        let out = &self.code[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn number(&mut self, count: usize) -> Result<u64, PickleError> {
        Ok(self.bytes(count)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn text(&mut self, count: usize) -> Result<Rc<str>, PickleError> {
        let at = self.at;
        let text = std::str::from_utf8(self.bytes(count)?).map_err(|_| PickleError::Text { at })?;
        Ok(text.into())
    }

    fn line(&mut self) -> Result<Rc<str>, PickleError> {
        let len = self.code[self.at..].iter().position(|b| *b == b'\n');
        let text = self.text(len.ok_or(self.broken("an unfinished line"))?)?;
        self.at += 1;
        Ok(text)
    }

    fn push(&mut self, value: Value) -> Result<(), PickleError> {
        self.made += 1;
        if self.made > MAX_VALUES {
            return Err(PickleError::Limit { what: "values", limit: MAX_VALUES });
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, PickleError> {
        self.stack.pop().ok_or(self.broken("an empty stack"))
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, PickleError> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark));
        let mark = mark.ok_or(self.broken("a missing mark"))?;
        let out = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(out)
    }

    fn push_tuple(&mut self, values: Vec<Value>) -> Result<(), PickleError> {
        let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(PickleError::Limit { what: "tuples deep in each other", limit: MAX_DEPTH });
        }
        self.made += values.len();
        self.push(Value::Tuple(values.into(), depth))
    }

    fn push_dict(&mut self) -> Result<(), PickleError> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    fn set_items(&mut self, items: Vec<Value>) -> Result<(), PickleError> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err(self.broken("items set on something that is no dictionary"));
        };
        let mut items = items.into_iter();
        while let Some(key) = items.next() {
            let value =
                items.next().ok_or(PickleError::Broken { what: "a key without a value", at: self.at })?;
            self.dicts[*dict].push((key, value));
        }
        Ok(())
    }

    fn memoize(&mut self, key: u64) -> Result<(), PickleError> {
        let top = self.stack.last().ok_or(self.broken("an empty stack"))?.clone();
        if self.memo.len() >= MAX_VALUES {
            return Err(PickleError::Limit { what: "memo entries", limit: MAX_VALUES });
        }
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), PickleError> {
        let value = self.memo.get(&key).ok_or(PickleError::Memo { key })?.clone();
        self.push(value)
    }

    /// Executes one opcode; the result at STOP. Long, since the protocols have that many opcodes: one arm for each.
    fn step(&mut self) -> Result<Option<Value>, PickleError> {
        let place = self.at;
        let op = self.bytes(1)?[0];
        match op {
            0x80 => {
                let protocol = self.number(1)?;
                if protocol > 5 {
                    return Err(PickleError::Protocol { protocol });
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
            b'K' | b'M' => {
                let n = self.number(if op == b'K' { 1 } else { 2 })?;
                self.push(Value::Int(n.cast_signed()))?;
            }
            0x8a => {
                let len = self.number(1)? as usize;
                if len > 8 {
                    return Err(self.broken("a number of more than eight bytes"));
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
            b'X' | 0x8c => {
                let len = self.number(if op == b'X' { 4 } else { 1 })? as usize;
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
                    return Err(self.broken("a global without names"));
                };
                self.push(Value::Global(Global::new(&module, &name)?))?;
            }
            b'q' | b'r' => {
                let key = self.number(if op == b'q' { 1 } else { 4 })?;
                self.memoize(key)?;
            }
            0x94 => self.memoize(self.memo.len() as u64)?,
            b'h' | b'j' => {
                let key = self.number(if op == b'h' { 1 } else { 4 })?;
                self.recall(key)?;
            }
            b't' => {
                let values = self.since_mark()?;
                self.push_tuple(values)?;
            }
            0x85..=0x87 => {
                let count = usize::from(op - 0x84);
                let from = self.stack.len().checked_sub(count).ok_or(self.broken("an empty stack"))?;
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
                    return Err(self.broken("values appended to something that is no list"));
                }
            }
            b'a' => {
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::List)) {
                    return Err(self.broken("a value appended to something that is no list"));
                }
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = storage(&id, place)?;
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
                    return Err(self.broken("opcode BUILD on something that is no dictionary"));
                }
            }
            b'.' => return Ok(Some(self.pop()?)),
            _ => {
                return Err(PickleError::Opcode { op, at: place });
            }
        }
        Ok(None)
    }

    /// What calling one of the known globals would have given.
    fn reduce(&mut self, callee: &Value, arguments: &Value) -> Result<(), PickleError> {
        let Value::Tuple(arguments, _) = arguments else {
            return Err(self.broken("a call without a tuple of arguments"));
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
                let bad = || self.broken("a tensor with a negative or missing size");
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
            (Value::Global(_), _) => Err(self.broken("a call with arguments that do not fit")),
            (other, _) => {
                let what = "what is called".to_owned();
                Err(PickleError::Kind { what, got: other.kind(), wanted: "a class" })
            }
        }
    }
}

/// The storage that a persistent id `('storage', class, key, location, count)` names.
fn storage(id: &Value, at: usize) -> Result<Value, PickleError> {
    if let Value::Tuple(parts, _) = id
        && let [Value::Str(tag), Value::Global(Global::Storage(dtype)), Value::Str(key), ..] = &**parts
        && &**tag == "storage"
    {
        // Keys are plain numbers; anything else could point elsewhere in the archive.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(PickleError::Key { key: key.to_string() });
        }
        return Ok(Value::Storage { key: key.clone(), dtype: *dtype });
    }
    Err(PickleError::Broken { what: "a persistent id that is no storage", at })
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
            let error = run(code).unwrap_err().to_string();
            assert!(error.contains(word), "{error} should say {word}");
        }
    }

    #[test]
    fn networks_side_by_side_have_their_key_before_their_names() {
        let tensor: &[u8] =
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0\
              0X\x03\0\0\0cpuK\x04tQK\0K\x02K\x02\x86K\x02K\x01\x86\x89Nt";
        let code = [
            &b"\x80\x02}(X\x04\0\0\0stepK\x07X\x01\0\0\0a}X\x01\0\0\0w"[..],
            tensor,
            b"RsX\x01\0\0\0b}X\x01\0\0\0w",
            tensor,
            b"Rsu.",
        ]
        .concat();
        let names: Vec<String> = run(&code).unwrap().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["a.w", "b.w"]);
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
