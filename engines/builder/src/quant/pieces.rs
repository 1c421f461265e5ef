//! Graphs of any size on the CPU: block by block, with the weights of one block in memory.
//!
//! A graph whose weights are small runs whole. A larger one is cut where its blocks end: the nodes of block `N`, with the
//! constants that they read, are a graph of their own. Each piece is loaded once and run over all items before the next
//! one is; what later pieces need of earlier ones (the residual, text rows, modulation) waits in a folder. A measurement
//! that was stopped goes on there, and a finished one is kept and not made again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::float::value_types;
use super::rewrite::hash_inputs;
use super::spool::{read_tensors, write_tensors};
use super::{CalibrationSource, Inputs, QuantError, Scratch, SuppliedError, Tell, Work, go_on};
use mindseye_base::file::{hex, write_atomically};
use mindseye_engines::backend::{Backend, BackendError, Elements, PrepareOptions, Session, Tensor};
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::{
    Attribute, DataType, Dim, ExternalData, Initializer, Model, Node, SaveOptions, TensorData, ValueInfo,
};

/// Most memory that measuring and comparing may take where nobody says otherwise, bytes. Synthetic inputs are made as large
/// as it allows ([`frames_within`]).
pub const MEMORY_BYTES: u64 = 8_000_000_000;
/// Graphs with more bytes of weights run block by block.
const WHOLE_BYTES: u64 = 256 << 20;
/// How often a stop is looked for while a graph runs.
const LOOK: Duration = Duration::from_millis(100);
/// A measurement that is stopped loses the run under way, and what was measured in so long.
const SAVED_EVERY: Duration = Duration::from_secs(1);

/// Memory that running `frames` latents through one block takes, bytes: its weights, as they are read and as the kernels
/// want them; scores of all heads, with their exponentials and one copy; and the rows of tokens in use at once.
fn block_bytes(c: &DitConfig, frames: usize) -> u64 {
    let (d, f, t) = (c.dim() as u64, c.ffn_dim as u64, (frames * c.tokens_per_frame()) as u64);
    let weights = 8 * d * d + 2 * d * f;
    let scores = 3 * c.heads as u64 * t * t.max(c.text_len as u64);
    4 * (3 * weights + scores + t * (16 * d + 3 * f))
}

/// The most latents that a denoiser can be measured with in `memory` bytes, not more than `frames`; at least two.
#[must_use]
pub fn frames_within(c: &DitConfig, frames: usize, memory: u64) -> usize {
    // The process, the quantised weights of earlier blocks and the inputs want a share.
    (2..=frames).rev().find(|&n| block_bytes(c, n) <= memory / 4 * 3).unwrap_or(2.min(frames))
}

/// Runs graphs for calibration and comparison.
#[derive(Clone)]
pub struct Runner {
    backend: Arc<dyn Backend>,
    /// Graphs with more bytes of weights run block by block.
    pub whole_bytes: u64,
    /// Folder in which measurements are kept, and go on after a stop.
    pub cache: Option<PathBuf>,
    /// Hash of the graph's files; measurements of graphs without one are not kept.
    graph: Option<String>,
}

impl Runner {
    /// On a backend, keeping nothing.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Runner { backend, whole_bytes: WHOLE_BYTES, cache: None, graph: None }
    }

    /// Keeps measurements in a folder.
    #[must_use]
    pub fn keeping(self, cache: Option<PathBuf>) -> Self {
        Runner { cache, ..self }
    }

    /// For a graph whose files have this hash.
    #[must_use]
    pub fn of_graph(&self, hash: &str) -> Self {
        Runner { graph: Some(hash.to_owned()), ..self.clone() }
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// Runs a graph over at most `limit` items. `each` gets the number of an item and some of its outputs; a graph that is
    /// cut gives an item's outputs in several calls, and all items of one piece before those of the next.
    pub(super) fn run(
        &self,
        model: &Model,
        source: &mut dyn CalibrationSource,
        limit: u64,
        tell: &mut Tell<'_>,
        work: fn(u64, u64) -> Work,
        each: &mut Each<'_>,
    ) -> Result<(), QuantError> {
        let pass = Pass::new(self, model, None)?;
        let of = source.count().map_or(limit, |count| count.min(limit));
        for piece in 0..pass.pieces.len() {
            pass.run(piece, 0, of, source, tell, work, each)?;
        }
        crate::memory::release_freed_memory();
        Ok(())
    }

    /// Measures a graph over at most `limit` items, or takes what was measured before: the hash of the items.
    ///
    /// # Errors
    /// The backend or the source fails, the source gives nothing, an input is not a number.
    pub(super) fn measure(
        &self,
        model: &Model,
        source: &mut dyn CalibrationSource,
        limit: u64,
        tell: &mut Tell<'_>,
        measured: &mut dyn Measured,
    ) -> Result<String, QuantError> {
        let work = |done, of| Work::Calibrate { done, of: Some(of) };
        let (items, sha256) = hash_source(source, limit, tell)?;
        let place = self.place(model, &sha256, measured.kind());
        let pass = Pass::new(self, model, place.as_ref().map(|p| p.folder.join("work")))?;
        let known =
            place.as_ref().and_then(|p| p.load(measured, &|piece, item| pass.can_go_on(piece, item, items)));
        let (mut piece, mut from) = known.unwrap_or((0, 0));
        while piece < pass.pieces.len() {
            let mut saved = Instant::now();
            pass.run(piece, from, items, source, tell, work, &mut |item, outputs| {
                measured.add(outputs)?;
                if let Some(place) = place.as_ref().filter(|_| saved.elapsed() > SAVED_EVERY) {
                    place.save(measured, piece, item + 1)?;
                    saved = Instant::now();
                }
                Ok(())
            })?;
            (piece, from) = (piece + 1, 0);
            if let Some(place) = &place {
                place.save(measured, piece, 0)?;
            }
            pass.forget(piece);
        }
        crate::memory::release_freed_memory();
        Ok(sha256)
    }

    /// Where a measurement is kept: none without a cache, or while another process makes the same one.
    fn place(&self, model: &Model, inputs: &str, kind: &str) -> Option<Place> {
        let (cache, graph) = (self.cache.as_ref()?, self.graph.as_ref()?);
        let mut key = Sha256::new();
        for part in ["1", kind, self.backend.name(), graph, inputs] {
            key.update(part);
            key.update([0]);
        }
        for node in &model.graph.nodes {
            key.update(format!("{node:?}"));
        }
        // The rest is in the hash of the graph's files.
        for constant in &model.graph.initializers {
            key.update(format!("{} {:?} {:?}", constant.name, constant.dtype, constant.shape));
            if let TensorData::Memory(bytes, range) = &constant.data {
                key.update(&bytes[range.clone()]);
            }
        }
        let folder = cache.join(&hex(&key.finalize())[..32]);
        let open = || {
            std::fs::create_dir_all(folder.join("work"))?;
            let lock = File::create(folder.join("lock"))?;
            lock.try_lock().map_err(std::io::Error::from)?;
            Ok::<_, std::io::Error>(lock)
        };
        match open() {
            Ok(lock) => Some(Place { folder, _lock: lock }),
            Err(e) => {
                tracing::warn!("{}: what is measured will not be kept: {e}", folder.display());
                None
            }
        }
    }
}

/// Gets the number of an item and some of its outputs.
pub(super) type Each<'a> = dyn FnMut(u64, Vec<(String, Tensor)>) -> Result<(), QuantError> + 'a;

/// What is measured while a graph runs, as tensors that can be kept.
pub(super) trait Measured {
    /// What is measured, and by which method.
    fn kind(&self) -> &'static str;
    /// Adds outputs of one item.
    fn add(&mut self, outputs: Vec<(String, Tensor)>) -> Result<(), QuantError>;
    /// As tensors.
    fn save(&self) -> Inputs;
    /// From tensors; false, and nothing is changed, where they are not those of [`Measured::save`].
    fn load(&mut self, tensors: Inputs) -> bool;
}

/// Number and hash of the items, at most `limit`; refuses inputs that are not numbers.
fn hash_source(
    source: &mut dyn CalibrationSource,
    limit: u64,
    tell: &mut Tell<'_>,
) -> Result<(u64, String), QuantError> {
    source.restart().map_err(QuantError::Source)?;
    let (mut hash, mut items) = (Sha256::new(), 0);
    while items < limit {
        let Some(inputs) = source.next().map_err(QuantError::Source)? else { break };
        for (name, tensor) in &inputs {
            if tensor.as_f32().is_some_and(|v| v.iter().any(|x| !x.is_finite())) {
                return Err(QuantError::InputNotFinite { input: name.clone() });
            }
        }
        hash_inputs(&mut hash, &inputs);
        items += 1;
        go_on(tell, Work::Inputs { done: items, of: source.count() })?;
    }
    if items == 0 {
        return Err(QuantError::Source(SuppliedError::new("the source gave no inputs")));
    }
    Ok((items, hex(&hash.finalize())))
}

/// The folder of one measurement, locked.
struct Place {
    folder: PathBuf,
    _lock: File,
}

impl Place {
    fn save(&self, measured: &dyn Measured, piece: usize, item: u64) -> Result<(), QuantError> {
        let mut tensors = measured.save();
        tensors.push((String::new(), Tensor::i64(&[2], vec![piece as i64, item as i64])));
        Ok(write_atomically(&self.folder.join("measured"), |out| write_tensors(out, &tensors))?)
    }

    /// The next piece and item; none where nothing usable is there.
    fn load(&self, measured: &mut dyn Measured, usable: &dyn Fn(usize, u64) -> bool) -> Option<(usize, u64)> {
        let file = File::open(self.folder.join("measured")).ok()?;
        let mut tensors = read_tensors(&mut BufReader::new(file)).ok()?;
        let at = tensors.pop()?.1;
        let Elements::I64(at) = at.data else { return None };
        let &[piece, item] = at.as_slice() else { return None };
        let (piece, item) = (usize::try_from(piece).ok()?, u64::try_from(item).ok()?);
        (usable(piece, item) && measured.load(tensors)).then_some((piece, item))
    }
}

/// A part of a graph that runs on its own.
struct Piece {
    /// Its inputs are those of the whole graph.
    model: Model,
    /// Values of earlier pieces that it reads, with their element types; they become inputs when their ranks are known.
    reads: Vec<(String, DataType)>,
    /// Values of earlier pieces that later ones read.
    passes_on: Vec<String>,
}

/// End of the names of outputs that later pieces read. Backends state the rank of what leaves a graph, and that of a
/// value in between is not known: such an output is one row of the rank, the sizes, and the elements.
const CARRIED: &str = "/carried";

/// Nodes that make the row of a value.
fn carrying(value: &str, dtype: DataType) -> Vec<Node> {
    let n = |part: &str| format!("{value}{CARRIED}{part}");
    let op = |part: &str, op: &str, inputs: &[&str]| Node::new(&n(part), op, inputs, &[&n(part)]);
    let cast = |part: &str, from: &str| op(part, "Cast", &[from]).with(Attribute::int("to", dtype as i64));
    vec![
        op(".sizes", "Shape", &[value]),
        op(".rank", "Shape", &[&n(".sizes")]),
        cast(".own_sizes", &n(".sizes")),
        cast(".own_rank", &n(".rank")),
        op(".elements", "Reshape", &[value, FLAT]),
        op("", "Concat", &[&n(".own_rank"), &n(".own_sizes"), &n(".elements")])
            .with(Attribute::int("axis", 0)),
    ]
}

/// The constant that [`carrying`] flattens with.
const FLAT: &str = "carried.flat";

/// The tensor of a row.
fn unpacked(row: &Tensor) -> Option<Tensor> {
    fn cut<T: Copy>(row: &[T], whole: fn(T) -> usize) -> Option<(Vec<usize>, Vec<T>)> {
        let (&rank, rest) = row.split_first()?;
        let (sizes, elements) = rest.split_at_checked(whole(rank))?;
        let shape: Vec<usize> = sizes.iter().map(|&d| whole(d)).collect();
        (shape.iter().product::<usize>() == elements.len()).then(|| (shape, elements.to_vec()))
    }
    let (shape, data) = match &row.data {
        Elements::F32(v) => cut(v, |x| x as usize).map(|(s, v)| (s, Elements::F32(v)))?,
        Elements::I64(v) => cut(v, |x| x as usize).map(|(s, v)| (s, Elements::I64(v)))?,
        Elements::I32(v) => cut(v, |x| x as usize).map(|(s, v)| (s, Elements::I32(v)))?,
    };
    Some(Tensor { shape, data })
}

/// The number of the block that a constant belongs to, from 1; 0 outside blocks.
fn block_number(constant: &str) -> usize {
    let mut parts = constant.split('.').skip_while(|p| !p.ends_with("blocks") && *p != "block");
    parts.nth(1).and_then(|n| n.parse::<usize>().ok()).map_or(0, |n| n + 1)
}

/// Cuts a graph where its blocks end. One piece where a value that would go from piece to piece can not.
fn cut(model: &Model, whole_bytes: u64) -> Vec<Piece> {
    let whole = || vec![Piece { model: model.clone(), reads: Vec::new(), passes_on: Vec::new() }];
    if model.weight_bytes() <= whole_bytes {
        return whole();
    }
    let graph = &model.graph;
    let constants: HashSet<&str> = graph.initializers.iter().map(|i| i.name.as_str()).collect();
    // Each node runs with the last block that it depends on.
    let mut made_in: HashMap<&str, usize> = HashMap::new();
    let mut stage_of = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let of = |i: &String| match constants.contains(i.as_str()) {
            true => block_number(i),
            false => made_in.get(i.as_str()).copied().unwrap_or(0),
        };
        let stage = node.inputs.iter().map(of).max().unwrap_or(0);
        stage_of.push(stage);
        made_in.extend(node.outputs.iter().map(|o| (o.as_str(), stage)));
    }
    let mut last_read: BTreeMap<&str, usize> = BTreeMap::new();
    for (node, &stage) in graph.nodes.iter().zip(&stage_of) {
        for value in node.inputs.iter().filter(|i| made_in.get(i.as_str()).is_some_and(|&m| m < stage)) {
            let last = last_read.entry(value).or_default();
            *last = stage.max(*last);
        }
    }
    let types = value_types(model);
    let movable = |v: &&str| matches!(types.get(*v), Some(DataType::F32 | DataType::I64 | DataType::I32));
    if let Some(value) = last_read.keys().find(|v| !movable(v)) {
        tracing::warn!("graph {:?} runs whole: {value:?} cannot go from block to block", graph.name);
        return whole();
    }
    let stages: BTreeSet<usize> = stage_of.iter().copied().collect();
    let piece = |&stage: &usize| {
        let mut part = Model { graph: Default::default(), ..model.clone() };
        part.graph.initializers.clone_from(&graph.initializers);
        part.graph.initializers.push(Initializer::from_i64(FLAT, &[1], &[-1]));
        let (mut read, mut passes_on, mut leave) = (Vec::new(), Vec::new(), Vec::new());
        let own: Vec<&Node> =
            graph.nodes.iter().zip(&stage_of).filter(|(_, s)| **s == stage).map(|(n, _)| n).collect();
        let reads: HashSet<&str> = own.iter().flat_map(|n| &n.inputs).map(String::as_str).collect();
        part.graph.inputs =
            graph.inputs.iter().filter(|i| reads.contains(i.name.as_str())).cloned().collect();
        for (&value, &last) in &last_read {
            let (made, dtype) = (made_in[value], types[value]);
            if made < stage && reads.contains(value) {
                read.push((value.to_owned(), dtype));
            } else if made == stage {
                leave.extend(carrying(value, dtype));
                let name = format!("{value}{CARRIED}");
                part.graph.outputs.push(ValueInfo {
                    name,
                    dtype: Some(dtype),
                    shape: Some(vec![Dim::Unknown]),
                });
            }
            if made < stage && last > stage {
                passes_on.push(value.to_owned());
            }
        }
        let made_here = |o: &&ValueInfo| made_in.get(o.name.as_str()).is_some_and(|m| *m == stage);
        part.graph.outputs.extend(graph.outputs.iter().filter(made_here).cloned());
        part.graph.nodes = own.into_iter().cloned().chain(leave).collect();
        part.graph.drop_unused_initializers();
        Piece { model: part, reads: read, passes_on }
    };
    stages.iter().map(piece).collect()
}

/// A graph in pieces, and the folder in which values wait between them.
struct Pass<'a> {
    runner: &'a Runner,
    pieces: Vec<Piece>,
    folder: PathBuf,
    _scratch: Option<Scratch>,
}

impl<'a> Pass<'a> {
    fn new(runner: &'a Runner, model: &Model, folder: Option<PathBuf>) -> Result<Self, QuantError> {
        let (folder, scratch) = match folder {
            Some(folder) => (folder, None),
            None => {
                let scratch = Scratch::new()?;
                (scratch.0.clone(), Some(scratch))
            }
        };
        Ok(Pass { runner, pieces: cut(model, runner.whole_bytes), folder, _scratch: scratch })
    }

    fn carried(&self, piece: usize, item: u64) -> PathBuf {
        self.folder.join(format!("{piece}-{item}"))
    }

    /// Whether all that piece `piece` needs from item `from` on is there.
    fn can_go_on(&self, piece: usize, from: u64, items: u64) -> bool {
        let last = self.pieces.len();
        piece == last
            || (piece < last && (piece == 0 || (from..items).all(|i| self.carried(piece - 1, i).is_file())))
    }

    /// Removes the values that no piece from `piece` on reads.
    fn forget(&self, piece: usize) {
        let keeps =
            if piece < self.pieces.len() { format!("{}-", piece.saturating_sub(1)) } else { "/".into() };
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if !entry.file_name().to_string_lossy().starts_with(&keeps) {
                // Best effort: what stays is overwritten or never read.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Runs one piece over the items from `from` on.
    fn run(
        &self,
        piece: usize,
        from: u64,
        items: u64,
        source: &mut dyn CalibrationSource,
        tell: &mut Tell<'_>,
        work: fn(u64, u64) -> Work,
        each: &mut Each<'_>,
    ) -> Result<(), QuantError> {
        let Piece { model, reads, passes_on } = &self.pieces[piece];
        let all = items.saturating_mul(self.pieces.len() as u64);
        let done = |item: u64| work(piece as u64 * items + item, all);
        source.restart().map_err(QuantError::Source)?;
        let mut ready: Option<Box<dyn Session>> = None;
        for item in 0..items {
            let Some(inputs) = source.next().map_err(QuantError::Source)? else { break };
            if item < from {
                continue;
            }
            let mut given: Inputs = Vec::new();
            if piece > 0 {
                let file = File::open(self.carried(piece - 1, item))?;
                given = read_tensors(&mut BufReader::new(file))?;
            }
            let of = |names: &mut dyn Iterator<Item = &String>| -> Inputs {
                names.filter_map(|name| given.iter().find(|(n, _)| n == name).cloned()).collect()
            };
            let mut passed = of(&mut passes_on.iter());
            let mut given = of(&mut reads.iter().map(|(name, _)| name));
            let mut session = match ready.take() {
                Some(session) => session,
                None => {
                    let (backend, mut model) = (Arc::clone(&self.runner.backend), model.clone());
                    let port =
                        |((name, dtype), (_, t)): (&(String, DataType), &(String, Tensor))| ValueInfo {
                            name: name.clone(),
                            dtype: Some(*dtype),
                            shape: Some(vec![Dim::Unknown; t.shape.len()]),
                        };
                    model.graph.inputs.extend(reads.iter().zip(&given).map(port));
                    let path = self.folder.join(format!("{piece}.onnx"));
                    watched(move || open(&model, backend.as_ref(), &path), tell, done(item))??
                }
            };
            given.extend(inputs.into_iter().filter(|(n, _)| model.graph.inputs.iter().any(|i| i.name == *n)));
            let run = move || {
                let views: Vec<_> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
                let outputs = session.run(&views);
                (session, outputs)
            };
            let (session, outputs) = watched(run, tell, done(item))?;
            let (carried, outputs) =
                outputs?.into_iter().partition::<Inputs, _>(|(n, _)| n.ends_with(CARRIED));
            if piece + 1 < self.pieces.len() {
                for (name, row) in carried {
                    let broken = || BackendError::Run {
                        backend: "cpu",
                        what: format!("{name:?} is no row of a tensor"),
                    };
                    let tensor = unpacked(&row).ok_or_else(broken)?;
                    passed.push((name.trim_end_matches(CARRIED).to_owned(), tensor));
                }
                let mut file = BufWriter::new(File::create(self.carried(piece, item))?);
                write_tensors(&mut file, &passed).and_then(|()| file.flush())?;
            }
            ready = Some(session);
            each(item, outputs)?;
            go_on(tell, done(item + 1))?;
        }
        Ok(())
    }
}

/// A session of a graph, through a file that is gone afterwards.
fn open(model: &Model, backend: &dyn Backend, path: &Path) -> Result<Box<dyn Session>, QuantError> {
    // Large weights beside the graph: readers then take one tensor at a time.
    let external = if model.weight_bytes() > 64 << 20 { ExternalData::Always } else { ExternalData::Auto };
    let saved = model.save(path, &SaveOptions { external, ..SaveOptions::default() })?;
    let session = backend.prepare(path, &PrepareOptions::default()).and_then(|e| e.session());
    for file in [Some(saved.model), saved.data].into_iter().flatten() {
        std::fs::remove_file(file)?;
    }
    Ok(session?)
}

/// Runs something that cannot be stopped on a thread of its own, and looks for a stop meanwhile. A job that nobody waits
/// for any more ends by itself, and its result is dropped.
fn watched<T: Send + 'static>(
    job: impl FnOnce() -> T + Send + 'static,
    tell: &mut Tell<'_>,
    work: Work,
) -> Result<T, QuantError> {
    let (give, result) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("graph".into()).spawn(move || {
        // Nobody waits any more after a stop.
        let _ = give.send(job());
    })?;
    loop {
        match result.recv_timeout(LOOK) {
            Ok(value) => return Ok(value),
            Err(mpsc::RecvTimeoutError::Timeout) => go_on(tell, work)?,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let what = "the thread that runs the graph panicked".into();
                return Err(BackendError::Run { backend: "cpu", what }.into());
            }
        }
    }
}
