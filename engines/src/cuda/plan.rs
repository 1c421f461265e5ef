//! Steps and the shapes of one call become kernel calls, and places of all values in one arena.
//!
//! Values are views: shape and strides over a buffer, so that transposing, cutting and most reshaping costs nothing
//! until a kernel wants its elements in order. A buffer lives from the first to the last call that names it, and
//! buffers whose lives do not meet share memory.

use std::collections::HashMap;

use super::kernels::{Activation, Arguments, Element, ElementOp, HEAD_MOST, Kernel, Launch};
use super::products::{LEAST_ROWS, Product, ProductShape};
use super::program::{Codes, Op, Program, Step};
use super::{CudaError, Device};

/// Axes that the kernel of elements takes.
const MAX_AXES: usize = 8;
/// Blocks of 128 x 128 that keep a device busy; fewer are made smaller.
const BLOCKS_ENOUGH: usize = 64;
/// Buffers start at multiples of this many bytes.
const ALIGNMENT: usize = 256;

/// A buffer, by its number, and a place in it in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub slot: usize,
    pub offset: usize,
}

/// What a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// A part of the arena, of this many bytes.
    Arena(usize),
    /// Memory that belongs to somebody else: the weights, or state, by its number.
    Outside(usize),
}

/// Elements in a buffer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub place: Place,
    pub element: Element,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<i64>,
}

/// Strides of elements in order.
fn in_order(shape: &[usize]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i] as i64;
    }
    strides
}

impl View {
    pub fn new(place: Place, element: Element, shape: &[usize]) -> View {
        View { place, element, shape: shape.to_vec(), strides: in_order(shape) }
    }

    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn bytes(&self) -> usize {
        self.count() * self.element.bytes()
    }

    fn is_in_order(&self) -> bool {
        let axes = self.shape.iter().zip(&self.strides).zip(in_order(&self.shape));
        self.count() == 0 || axes.into_iter().all(|((&size, &stride), wanted)| size == 1 || stride == wanted)
    }

    fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, lead)| lead.iter().product())
    }

    /// Strides as seen from a shape that this one broadcasts to.
    fn broadcast(&self, shape: &[usize]) -> Option<Vec<i64>> {
        let missing = shape.len().checked_sub(self.shape.len())?;
        let own = self.shape.iter().zip(&self.strides).zip(&shape[missing..]);
        let own = own.map(|((&size, &stride), &wanted)| match size {
            _ if size == wanted => Some(stride),
            1 => Some(0),
            _ => None,
        });
        std::iter::repeat_n(Some(0), missing).chain(own).collect()
    }
}

/// Parts side by side as one view, where they lie in memory as they are to be joined: nothing has to be copied then.
fn side_by_side(parts: &[View], axis: usize) -> Option<View> {
    let [first, second, ..] = parts else { return None };
    let alike = |p: &View| {
        (p.place.slot, p.element) == (first.place.slot, first.element)
            && p.shape == first.shape
            && p.strides == first.strides
    };
    let apart = second.place.offset.checked_sub(first.place.offset)?;
    let even = parts.windows(2).all(|w| w[1].place.offset.checked_sub(w[0].place.offset) == Some(apart));
    let (stride, size) = ((apart / first.element.bytes()) as i64, first.shape[axis]);
    let whole = size == 1 || stride == size as i64 * first.strides[axis];
    (parts.iter().all(alike) && even && whole).then(|| {
        let mut out = first.clone();
        out.shape[axis] = size * parts.len();
        if size == 1 {
            out.strides[axis] = stride;
        }
        out
    })
}

/// Strides of the same elements under another shape of as many, where nothing has to be copied for it.
fn strides_under(view: &View, shape: &[usize]) -> Option<Vec<i64>> {
    let own: Vec<(usize, i64)> =
        view.shape.iter().copied().zip(view.strides.iter().copied()).filter(|(size, _)| *size != 1).collect();
    let mut strides = vec![1; shape.len()];
    let (mut i, mut j) = (0, 0);
    while j < shape.len() {
        if shape[j] == 1 {
            j += 1;
            continue;
        }
        // The fewest axes of both that hold as many elements.
        let (first, first_new) = (i, j);
        let (mut old, mut new) = (own.get(i)?.0, shape[j]);
        (i, j) = (i + 1, j + 1);
        while old != new {
            if old < new {
                old *= own.get(i)?.0;
                i += 1;
            } else {
                new *= shape.get(j)?;
                j += 1;
            }
        }
        let as_one = own[first..i].windows(2).all(|w| w[0].1 == w[1].1 * w[1].0 as i64);
        let mut stride = own[i - 1].1;
        for at in (first_new..j).rev() {
            strides[at] = stride;
            stride *= shape[at] as i64;
        }
        as_one.then_some(())?;
    }
    (i == own.len()).then_some(strides)
}

/// An argument of a kernel, before addresses are known.
#[derive(Clone, Debug, PartialEq)]
enum Argument {
    Int(i32),
    Float(f32),
    Long(i64),
    /// Null where there is none.
    Address(Option<Place>),
    /// A structure: an address where there is one, then words.
    Structure(Option<Option<Place>>, Vec<u64>),
}

/// A call, before addresses are known.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    what: What,
    arguments: Vec<Argument>,
}

/// Who does the work of a call.
#[derive(Clone, Debug, PartialEq)]
enum What {
    Kernel {
        kernel: Kernel,
        grid: [u32; 3],
        shared_bytes: u32,
    },
    /// The library of products; its arguments are `x`, `w`, bias, result and scratch memory.
    Product(ProductShape),
}

/// A call with its addresses.
#[derive(Clone, Debug)]
pub(super) enum Queued {
    Kernel(Launch),
    Product(Product),
}

impl Queued {
    /// Queues it.
    ///
    /// # Safety
    /// The addresses are those of buffers as they were planned.
    pub unsafe fn run(&self, device: &dyn Device) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; the planner gives each its own arguments.
        unsafe {
            match self {
                Queued::Kernel(launch) => device.run(launch),
                Queued::Product(product) => device.multiply(product),
            }
        }
    }

    /// What does it, by name.
    pub fn name(&self) -> &'static str {
        match self {
            Queued::Kernel(launch) => launch.kernel.name(),
            Queued::Product(_) => PRODUCT_NAME,
        }
    }
}

/// What a product by the library is called beside kernels.
pub(super) const PRODUCT_NAME: &str = "cublasLtMatmul";

impl Call {
    /// The call, where `address` gives the start of a buffer.
    pub fn at(&self, address: &dyn Fn(usize) -> u64) -> Queued {
        let at = |place: &Option<Place>| place.map_or(0, |p| address(p.slot) + p.offset as u64);
        let (kernel, grid, shared_bytes) = match self.what {
            What::Kernel { kernel, grid, shared_bytes } => (kernel, grid, shared_bytes),
            What::Product(shape) => {
                let address = |i: usize| match self.arguments.get(i) {
                    Some(Argument::Address(place)) => at(place),
                    _ => 0,
                };
                let operands = [0, 1, 2, 3].map(address);
                return Queued::Product(Product { shape, operands, workspace: address(4) });
            }
        };
        let mut arguments = Arguments::default();
        for argument in &self.arguments {
            match argument {
                Argument::Int(v) => arguments.push(&[u64::from(v.cast_unsigned())]),
                Argument::Float(v) => arguments.push(&[u64::from(v.to_bits())]),
                Argument::Long(v) => arguments.push(&[v.cast_unsigned()]),
                Argument::Address(place) => arguments.push(&[at(place)]),
                Argument::Structure(None, words) => arguments.push(words),
                Argument::Structure(Some(place), words) => {
                    arguments.push(&[&[at(place)], &words[..]].concat())
                }
            }
        }
        Queued::Kernel(Launch { kernel, grid, threads: kernel.threads(), shared_bytes, arguments })
    }

    fn slots(&self) -> impl Iterator<Item = usize> {
        self.arguments.iter().filter_map(|a| match a {
            Argument::Address(place) | Argument::Structure(Some(place), _) => place.map(|p| p.slot),
            _ => None,
        })
    }
}

/// Calls for one set of shapes.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub calls: Vec<Call>,
    pub slots: Vec<Slot>,
    /// Where each part of the arena starts, by slot.
    pub offsets: Vec<usize>,
    pub arena_bytes: usize,
    /// Values by name.
    pub values: HashMap<String, View>,
    /// Indices: name of the value, rows of the table that it is used on.
    pub index_limits: Vec<(String, usize)>,
}

/// Makes a [`Plan`].
pub(super) struct Planner<'a> {
    program: &'a Program,
    /// Whether products run in bf16.
    bf16: bool,
    /// Whose library of products is asked.
    library: Option<&'a dyn Device>,
    plan: Plan,
    /// Slots that the caller reads when all is done.
    kept: Vec<usize>,
    /// What is worked on, for errors.
    place: String,
}

impl<'a> Planner<'a> {
    pub fn new(program: &'a Program, bf16: bool) -> Self {
        let (plan, kept, place) = (Plan::default(), Vec::new(), String::new());
        Planner { program, bf16, library: None, plan, kept, place }
    }

    /// Leaves products to the library behind a device, where there is one that takes them.
    pub fn with_products_of(mut self, device: &'a dyn Device) -> Self {
        self.library = Some(device);
        self
    }

    /// A value that lies outside of the arena.
    pub fn outside(&mut self, name: &str, number: usize, offset: usize, element: Element, shape: &[usize]) {
        let view = self.outside_view(number, offset, element, shape);
        self.plan.values.insert(name.to_owned(), view);
    }

    fn outside_view(&mut self, number: usize, offset: usize, element: Element, shape: &[usize]) -> View {
        let known = self.plan.slots.iter().position(|s| *s == Slot::Outside(number));
        let slot = known.unwrap_or_else(|| {
            self.plan.slots.push(Slot::Outside(number));
            self.plan.slots.len() - 1
        });
        View::new(Place { slot, offset }, element, shape)
    }

    /// An input that the caller copies in before the first call.
    pub fn input(&mut self, name: &str, element: Element, shape: &[usize]) {
        let view = self.buffer(element, shape);
        self.kept.push(view.place.slot); // it may be read again by the next run of the same calls
        self.plan.values.insert(name.to_owned(), view);
    }

    /// Plans all steps.
    pub fn steps(&mut self) -> Result<(), CudaError> {
        let program = self.program;
        for step in &program.steps {
            self.place.clone_from(&step.output);
            let view = self.step(step)?;
            self.plan.values.insert(step.output.clone(), view);
        }
        Ok(())
    }

    /// A value as the caller copies it out: in order, in f32 where it is no integer.
    pub fn output(&mut self, name: &str) -> Result<View, CudaError> {
        let view = self.value(name)?;
        let element = if view.element == Element::I32 { Element::I32 } else { Element::F32 };
        let mut out = self.ordered(&view, Some(element))?;
        if matches!(self.plan.slots[out.place.slot], Slot::Outside(_)) {
            out = self.buffer(element, &view.shape);
            self.copy(&out, &view)?;
        }
        self.kept.push(out.place.slot);
        Ok(out)
    }

    /// Copies a value to memory outside of the arena, in its own element type, which is returned with its shape.
    pub fn state(&mut self, name: &str, number: usize) -> Result<(Element, Vec<usize>), CudaError> {
        let from = self.value(name)?;
        let to = self.outside_view(number, 0, from.element, &from.shape);
        self.copy(&to, &from)?;
        Ok((from.element, from.shape))
    }

    /// The finished plan, with a place for every buffer.
    pub fn finish(mut self) -> Plan {
        let last = self.plan.calls.len();
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; self.plan.slots.len()];
        for (time, call) in self.plan.calls.iter().enumerate() {
            for slot in call.slots() {
                let life = lives[slot].get_or_insert((time, time));
                life.1 = time;
            }
        }
        for &slot in &self.kept {
            lives[slot] = Some((0, last));
        }
        let mut placed: Vec<(usize, usize, (usize, usize))> = Vec::new();
        self.plan.offsets = vec![0; self.plan.slots.len()];
        let mut largest_first: Vec<(usize, usize)> = Vec::new();
        for (slot, kind) in self.plan.slots.iter().enumerate() {
            if let Slot::Arena(bytes) = kind {
                largest_first.push((slot, bytes.next_multiple_of(ALIGNMENT)));
            }
        }
        largest_first.sort_by_key(|&(slot, bytes)| (std::cmp::Reverse(bytes), slot));
        for (slot, bytes) in largest_first {
            let Some(life) = lives[slot] else { continue };
            let mut taken: Vec<(usize, usize)> = placed
                .iter()
                .filter(|(_, _, other)| life.0 <= other.1 && other.0 <= life.1)
                .map(|&(start, end, _)| (start, end))
                .collect();
            taken.sort_unstable();
            let mut start = 0;
            for (from, to) in taken {
                if start + bytes <= from {
                    break;
                }
                start = start.max(to);
            }
            placed.push((start, start + bytes, life));
            self.plan.offsets[slot] = start;
            self.plan.arena_bytes = self.plan.arena_bytes.max(start + bytes);
        }
        self.plan
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, CudaError> {
        Err(CudaError::Shapes { place: self.place.clone(), what: what.into() })
    }

    fn value(&self, name: &str) -> Result<View, CudaError> {
        match self.plan.values.get(name) {
            Some(view) => Ok(view.clone()),
            None => self.fail(format!("reads {name:?}, which nothing makes")),
        }
    }

    fn buffer(&mut self, element: Element, shape: &[usize]) -> View {
        self.plan.slots.push(Slot::Arena(shape.iter().product::<usize>() * element.bytes()));
        View::new(Place { slot: self.plan.slots.len() - 1, offset: 0 }, element, shape)
    }

    /// A buffer for the result of a step, in the type that its readers want.
    fn result(&mut self, step: &Step, shape: &[usize]) -> View {
        let bf16 = self.bf16 && self.program.products.contains(&step.output);
        let element = match step.op {
            Op::Element(ElementOp::ToByte) => Element::I8,
            Op::Element(ElementOp::ToE4m3) => Element::Bf16,
            _ if bf16 => Element::Bf16,
            _ => Element::F32,
        };
        self.buffer(element, shape)
    }

    fn call(
        &mut self,
        kernel: Kernel,
        grid: [usize; 3],
        shared_bytes: usize,
        arguments: Vec<Argument>,
    ) -> Result<(), CudaError> {
        let [x, y, z] = grid;
        if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
            return self.fail(format!("{} on {grid:?} blocks: more than a device takes", kernel.name()));
        }
        if grid.contains(&0) {
            return Ok(()); // nothing to make
        }
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let what = What::Kernel { kernel, grid, shared_bytes: shared_bytes as u32 };
        self.plan.calls.push(Call { what, arguments });
        Ok(())
    }

    fn int(&self, size: usize) -> Result<Argument, CudaError> {
        i32::try_from(size).map(Argument::Int).or_else(|_| self.fail(format!("a size of {size}")))
    }

    /// The same elements in order, of a given type; copied only where they are not.
    fn ordered(&mut self, view: &View, element: Option<Element>) -> Result<View, CudaError> {
        let element = element.unwrap_or(view.element);
        if view.is_in_order() && view.element == element {
            return Ok(View::new(view.place, element, &view.shape));
        }
        let to = self.buffer(element, &view.shape);
        self.copy(&to, view)?;
        Ok(to)
    }

    fn copy(&mut self, to: &View, from: &View) -> Result<(), CudaError> {
        self.element(ElementOp::Copy, to, &[from])
    }

    /// One call of the kernel of elements; inputs broadcast to the shape of `to`.
    fn element(&mut self, op: ElementOp, to: &View, from: &[&View]) -> Result<(), CudaError> {
        let mut strides = vec![to.strides.clone()];
        for view in from {
            match view.broadcast(&to.shape) {
                Some(s) => strides.push(s),
                None => return self.fail(format!("{:?} does not broadcast to {:?}", view.shape, to.shape)),
            }
        }
        strides.resize(4, vec![0; to.shape.len()]);
        let Ok(count) = i32::try_from(to.count()) else {
            return self.fail(format!("{} elements in one call", to.count()));
        };
        let (sizes, strides) = joined_axes(&to.shape, &strides);
        if sizes.len() > MAX_AXES {
            return self.fail(format!("{} axes that cannot be joined", sizes.len()));
        }
        let mut ints = [0i32; 2 + MAX_AXES];
        ints[0] = sizes.len() as i32;
        for (to, &size) in ints[1..].iter_mut().zip(&sizes) {
            *to = size as i32;
        }
        let word =
            |pair: &[i32]| u64::from(pair[0].cast_unsigned()) | u64::from(pair[1].cast_unsigned()) << 32;
        let mut axes: Vec<u64> = ints.chunks_exact(2).map(word).collect();
        for list in &strides {
            axes.extend((0..MAX_AXES).map(|i| list.get(i).copied().unwrap_or(0).cast_unsigned()));
        }
        let mut arguments = vec![Argument::Int(op as i32), address(to), kind(to)];
        for i in 0..3 {
            let view = from.get(i);
            arguments.push(Argument::Address(view.map(|v| v.place)));
            arguments.push(Argument::Int(view.map_or(0, |v| v.element as i32)));
        }
        arguments.extend([Argument::Int(count), Argument::Structure(None, axes)]);
        self.call(Kernel::Elementwise, [to.count().div_ceil(256).min(1 << 16), 1, 1], 0, arguments)
    }

    /// Plans one step; long, since it is one short arm for each kind of step.
    fn step(&mut self, step: &Step) -> Result<View, CudaError> {
        let mut inputs = Vec::with_capacity(step.inputs.len());
        for name in &step.inputs {
            inputs.push(if name.is_empty() { None } else { Some(self.value(name)?) });
        }
        let given = |i: usize| inputs.get(i).and_then(Option::as_ref);
        let Some(x) = given(0) else { return self.fail("has no input") };
        match &step.op {
            Op::Linear(activation) => {
                let Some(w) = given(1) else { return self.fail("has no weight") };
                let tensor_cores = w.element == Element::Bf16 && x.last() % 8 == 0 && w.last() % 8 == 0;
                let rows = self.ordered(x, tensor_cores.then_some(Element::Bf16))?;
                let flat = View::new(rows.place, rows.element, &[rows.rows(), rows.last()]);
                let shape = [&x.shape[..x.shape.len().saturating_sub(1)], &[w.last()]].concat();
                let out = self.result(step, &shape);
                self.product(&flat, w, given(2), &out, *activation)?;
                Ok(out)
            }
            Op::Coded { codes, scale, activation } => {
                let Some(w) = given(1) else { return self.fail("has no weight") };
                self.coded(step, [x, w], [given(2), given(3)], (*codes, *scale), *activation)
            }
            Op::MatMul => {
                let Some(b) = given(1) else { return self.fail("has no second matrix") };
                let (ra, rb) = (x.shape.len(), b.shape.len());
                if ra < 2 || rb < 2 {
                    return self.fail("a product of vectors");
                }
                let lead = self.common(&[&x.shape[..ra - 2], &b.shape[..rb - 2]])?;
                let out = self.result(step, &[&lead[..], &[x.shape[ra - 2], b.shape[rb - 1]]].concat());
                self.product(x, b, None, &out, Activation::None)?;
                Ok(out)
            }
            Op::Attention { scale, rows_of } => {
                let (Some(k), Some(v)) = (given(1), given(2)) else {
                    return self.fail("has no keys and values");
                };
                let Some(heads) = rows_of else { return self.attention(step, [x, k, v], given(3), *scale) };
                let [q, k, v] = [x, k, v].map(|rows| self.in_heads(rows, *heads));
                let out = self.attention(step, [&q?, &k?, &v?], given(3), *scale)?;
                self.reshaped(&out, &x.shape, None)
            }
            Op::Norm { centred, epsilon } => {
                let rest = [given(1), given(2), given(3), given(4)];
                self.norm(step, x, rest, *centred, *epsilon)
            }
            Op::Rotate { rows_of } => {
                let (Some(cos), Some(sin)) = (given(1), given(2)) else { return self.fail("has no tables") };
                let Some(heads) = rows_of else { return self.rotate(step, x, cos, sin) };
                let of_batch = |table: &View| match table.shape[..] {
                    [1, tokens, half] => self.reshaped_view(table, &[tokens, half]),
                    _ => self.fail(format!("a table of {:?}", table.shape)),
                };
                let (cos, sin) = (of_batch(cos)?, of_batch(sin)?);
                let out = self.rotate(step, &self.in_heads(x, *heads)?, &cos, &sin)?;
                Ok(View::new(out.place, out.element, &x.shape))
            }
            Op::Softmax => {
                let x = self.ordered(x, None)?;
                let out = self.result(step, &x.shape);
                self.softmax(&x, &out, 1.0)?;
                Ok(out)
            }
            Op::Conv { strides, pads, enlarged } => {
                let Some(weights) = given(1) else { return self.fail("has no weights") };
                self.conv(step, [x, weights], given(2), *strides, *pads, *enlarged)
            }
            Op::ChannelNorm { least, silu } => {
                let Some(gamma) = given(1) else { return self.fail("has no gains") };
                self.channel_norm(step, x, gamma, *least, *silu)
            }
            Op::Enlarge => self.enlarge(step, x),
            Op::Reduce { axis, keep, root_of_squares } => {
                self.reduce(step, x, *axis, *keep, *root_of_squares)
            }
            Op::Gather => {
                let Some(index) = given(1) else { return self.fail("has no indices") };
                self.gather(step, x, index)
            }
            Op::Element(op) => {
                let views: Vec<&View> = inputs.iter().flatten().collect();
                let shapes: Vec<&[usize]> = views.iter().map(|v| v.shape.as_slice()).collect();
                let shape = self.common(&shapes)?;
                let out = self.result(step, &shape);
                self.element(*op, &out, &views)?;
                Ok(out)
            }
            Op::Reshape(sizes) => {
                let shape = self.sizes(&x.shape, sizes)?;
                let wanted = self.bf16 && self.program.products.contains(&step.output) && !x.is_in_order();
                let element = wanted.then_some(Element::Bf16).filter(|_| x.element != Element::I32);
                self.reshaped(x, &shape, element)
            }
            Op::Transpose(perm) => {
                let mut order = perm.clone();
                order.sort_unstable();
                if order != (0..x.shape.len()).collect::<Vec<_>>() {
                    return self.fail(format!("{perm:?} is no order of {:?}", x.shape));
                }
                let pick = |i: &usize| (x.shape[*i], x.strides[*i]);
                let (shape, strides) = perm.iter().map(pick).unzip();
                Ok(View { shape, strides, ..x.clone() })
            }
            Op::Slice { axis, start, end } => self.slice(x, *axis, *start, *end),
            Op::Concat { axis } => {
                let parts: Vec<View> = inputs.into_iter().flatten().collect();
                self.concat(step, &parts, *axis)
            }
        }
    }

    /// The same elements under another shape; copied, as this type where one is given, only where it must be.
    fn reshaped(&mut self, x: &View, shape: &[usize], element: Option<Element>) -> Result<View, CudaError> {
        if let Some(strides) = strides_under(x, shape).filter(|_| element.is_none() && x.count() > 0) {
            return Ok(View { shape: shape.to_vec(), strides, ..x.clone() });
        }
        let x = self.ordered(x, element)?;
        Ok(View::new(x.place, x.element, shape))
    }

    /// As [`Planner::reshaped`], where nothing has to be copied.
    fn reshaped_view(&self, x: &View, shape: &[usize]) -> Result<View, CudaError> {
        match strides_under(x, shape) {
            Some(strides) => Ok(View { shape: shape.to_vec(), strides, ..x.clone() }),
            None => self.fail(format!("{:?} cannot become {shape:?}", x.shape)),
        }
    }

    /// `[batch, tokens, heads * d]` as `[batch, tokens, heads, d]`.
    fn in_heads(&self, rows: &View, heads: usize) -> Result<View, CudaError> {
        match rows.shape[..] {
            [batch, tokens, width] if width % heads == 0 && rows.count() > 0 => {
                self.reshaped_view(rows, &[batch, tokens, heads, width / heads])
            }
            _ => self.fail(format!("{heads} heads in rows of {:?}", rows.shape)),
        }
    }

    fn axis(&self, axis: i64, rank: usize) -> Result<usize, CudaError> {
        let at = if axis < 0 { axis + rank as i64 } else { axis };
        match usize::try_from(at) {
            Ok(at) if at < rank => Ok(at),
            _ => self.fail(format!("axis {axis} of {rank}")),
        }
    }

    /// The shape that all broadcast to.
    fn common(&self, shapes: &[&[usize]]) -> Result<Vec<usize>, CudaError> {
        let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
        let mut out = vec![1; rank];
        for shape in shapes {
            for (to, &size) in out[rank - shape.len()..].iter_mut().zip(*shape) {
                match (*to, size) {
                    (1, _) => *to = size,
                    (a, b) if a == b || b == 1 => {}
                    _ => return self.fail(format!("{shapes:?} do not fit each other")),
                }
            }
        }
        Ok(out)
    }

    fn sizes(&self, shape: &[usize], wanted: &[i64]) -> Result<Vec<usize>, CudaError> {
        let total: usize = shape.iter().product();
        let wrong = || format!("{shape:?} cannot become {wanted:?}");
        let mut out = Vec::with_capacity(wanted.len());
        for (i, &size) in wanted.iter().enumerate() {
            match (size, shape.get(i)) {
                (0, Some(&own)) => out.push(own),
                (-1, _) => out.push(1),
                (size, _) => match usize::try_from(size) {
                    Ok(size) if size > 0 => out.push(size),
                    _ => return self.fail(wrong()),
                },
            }
        }
        if let Some(hole) = wanted.iter().position(|&d| d == -1) {
            let rest: usize = out.iter().product();
            out[hole] = total.checked_div(rest).unwrap_or(0);
        }
        if out.iter().product::<usize>() == total { Ok(out) } else { self.fail(wrong()) }
    }

    fn slice(&self, x: &View, axis: i64, start: i64, end: i64) -> Result<View, CudaError> {
        let axis = self.axis(axis, x.shape.len())?;
        let size = x.shape[axis] as i64;
        let at = |p: i64| (if p < 0 { p.saturating_add(size) } else { p }).clamp(0, size);
        let (start, end) = (at(start), at(end));
        let mut out = x.clone();
        out.shape[axis] = usize::try_from(end - start).unwrap_or(0);
        out.place.offset += (start * x.strides[axis]) as usize * x.element.bytes();
        Ok(out)
    }

    fn concat(&mut self, step: &Step, parts: &[View], axis: i64) -> Result<View, CudaError> {
        let Some(first) = parts.first() else { return self.fail("joins nothing") };
        let axis = self.axis(axis, first.shape.len())?;
        let fits = |p: &View| {
            p.shape.len() == first.shape.len()
                && p.shape.iter().zip(&first.shape).enumerate().all(|(i, (a, b))| i == axis || a == b)
        };
        if !parts.iter().all(fits) {
            return self.fail("joins parts of other shapes");
        }
        if let Some(view) = side_by_side(parts, axis) {
            return Ok(view);
        }
        let mut shape = first.shape.clone();
        shape[axis] = parts.iter().map(|p| p.shape[axis]).sum();
        let out = self.result(step, &shape);
        let mut start = 0;
        for part in parts {
            let end = start + part.shape[axis] as i64;
            let to = self.slice(&out, axis as i64, start, end)?;
            self.copy(&to, part)?;
            start = end;
        }
        Ok(out)
    }

    /// A product of codes, which are scaled afterwards.
    fn coded(
        &mut self,
        step: &Step,
        [x, w]: [&View; 2],
        [bias, scales]: [Option<&View>; 2],
        (codes, scale): (Codes, f32),
        activation: Activation,
    ) -> Result<View, CudaError> {
        let (x, &[k, n]) = (self.ordered(x, None)?, &w.shape[..]) else {
            return self.fail(format!("a weight of {:?}", w.shape));
        };
        let element = if codes == Codes::Byte { Element::I8 } else { Element::Bf16 };
        if x.last() != k || [&x, w].iter().any(|v| v.element != element) {
            return self.fail(format!("codes {:?} times {:?}", x.shape, w.shape));
        }
        let out = self.result(step, &[&x.shape[..x.shape.len().saturating_sub(1)], &[n]].concat());
        let bias = bias.map(|b| self.ordered(b, Some(Element::F32))).transpose()?;
        let m = x.rows();
        let blocks = m.div_ceil(128) * n.div_ceil(128);
        let large = blocks >= BLOCKS_ENOUGH;
        let tile = if large { 128 } else { 64 };
        let (kernel, middle) = match codes {
            Codes::Byte => {
                let Some(scales) = scales else { return self.fail("has no scales") };
                let scales = self.ordered(scales, Some(Element::F32))?;
                let kernel = if large { Kernel::GemmInt8x128 } else { Kernel::GemmInt8x64 };
                (kernel, vec![address(&scales), Argument::Float(scale)])
            }
            Codes::E4m3 => (if large { Kernel::GemmBf16x128 } else { Kernel::GemmBf16x64 }, vec![]),
        };
        let mut arguments = vec![address(&x), address(w)];
        arguments.extend(middle);
        arguments.extend([Argument::Address(bias.map(|b| b.place)), address(&out), kind(&out)]);
        arguments.extend([self.int(m)?, self.int(n)?, self.int(k)?]);
        if codes == Codes::E4m3 {
            arguments.extend([Argument::Long(0), Argument::Long(0)]);
        }
        arguments.push(Argument::Int(activation as i32));
        arguments.extend((codes == Codes::E4m3).then_some(Argument::Float(scale)));
        let shared = kernel.shared_bytes_most() as usize;
        self.call(kernel, [n.div_ceil(tile), m.div_ceil(tile), 1], shared, arguments)?;
        Ok(out)
    }

    /// `out = activation(a b + bias)`; leading axes broadcast. Long, since both kernels need the same preparation.
    fn product(
        &mut self,
        a: &View,
        b: &View,
        bias: Option<&View>,
        out: &View,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let (ra, rb, lead) = (a.shape.len(), b.shape.len(), &out.shape[..out.shape.len().saturating_sub(2)]);
        // A linear layer has its rows in one axis, whatever the shape of its result.
        let lead = if ra == 2 && rb == 2 { &[] } else { lead };
        let (m, k, n) = (a.shape[ra - 2], a.shape[ra - 1], b.shape[rb - 1]);
        if b.shape[rb - 2] != k {
            return self.fail(format!("{:?} times {:?}", a.shape, b.shape));
        }
        let bias = match bias {
            Some(bias) => Some(self.ordered(bias, Some(Element::F32))?.place),
            None => None,
        };
        let batch: usize = lead.iter().product();
        let outer = |view: &View, rank: usize| {
            let leading = View {
                shape: view.shape[..rank - 2].to_vec(),
                strides: view.strides[..rank - 2].to_vec(),
                ..view.clone()
            };
            leading.broadcast(lead)
        };
        let (Some(oa), Some(ob)) = (outer(a, ra), outer(b, rb)) else {
            return self.fail(format!("{:?} times {:?}", a.shape, b.shape));
        };
        let (sizes, strides) = joined_axes(lead, &[oa, ob]);
        let (m_arg, n_arg, k_arg) = (self.int(m)?, self.int(n)?, self.int(k)?);
        let rows_in_order = |v: &View, rank: usize| {
            v.strides[rank - 1] == 1 && v.strides[rank - 2] == v.shape[rank - 1] as i64
        };
        let aligned = |v: &View, stride: i64| v.place.offset.is_multiple_of(16) && stride % 8 == 0;
        let tensor_cores =
            a.element == Element::Bf16 && b.element == Element::Bf16 && k % 8 == 0 && n % 8 == 0;
        let stride = |of: usize| if sizes.is_empty() { 0 } else { strides[of][0] };
        if tensor_cores
            && sizes.len() <= 1
            && rows_in_order(a, ra)
            && rows_in_order(b, rb)
            && aligned(a, stride(0))
            && aligned(b, stride(1))
        {
            let bf16 = out.element == Element::Bf16;
            let gelu = activation == Activation::GeluTanh;
            let shape = ProductShape { m, n, k, bf16, bias: bias.is_some(), gelu };
            let offered = batch == 1 && m >= LEAST_ROWS && k > 0 && activation != Activation::Silu;
            let library = self.library.filter(|_| offered);
            if let Some(bytes) = library.and_then(|device| device.product_workspace(&shape)) {
                return self.library_product([a, b, out], bias, shape, bytes);
            }
            let blocks = m.div_ceil(128) * n.div_ceil(128) * batch;
            // Enough large blocks to keep a device busy, or small ones.
            let (kernel, tile) =
                if blocks >= BLOCKS_ENOUGH { (Kernel::GemmBf16x128, 128) } else { (Kernel::GemmBf16x64, 64) };
            let arguments = vec![
                address(a),
                address(b),
                Argument::Address(bias),
                address(out),
                kind(out),
                m_arg,
                n_arg,
                k_arg,
                Argument::Long(stride(0)),
                Argument::Long(stride(1)),
                Argument::Int(activation as i32),
                Argument::Float(1.0),
            ];
            let shared = kernel.shared_bytes_most() as usize;
            return self.call(kernel, [n.div_ceil(tile), m.div_ceil(tile), batch], shared, arguments);
        }
        if sizes.len() > 2 {
            if a.is_in_order() && b.is_in_order() {
                return self.fail(format!("{} leading axes that cannot be joined", sizes.len()));
            }
            let (a, b) = (self.ordered(a, None)?, self.ordered(b, None)?);
            let bias = bias.map(|place| View::new(place, Element::F32, &[n]));
            return self.product(&a, &b, bias.as_ref(), out, activation);
        }
        let inner = sizes.last().copied().unwrap_or(1);
        let operand = |view: &View, of: usize, rank: usize| {
            let at = |from_end: usize| sizes.len().checked_sub(from_end).map_or(0, |i| strides[of][i]);
            let words = [at(2), at(1), view.strides[rank - 2], view.strides[rank - 1]];
            Argument::Structure(None, words.map(i64::cast_unsigned).to_vec())
        };
        let arguments = vec![
            address(a),
            kind(a),
            operand(a, 0, ra),
            address(b),
            kind(b),
            operand(b, 1, rb),
            Argument::Address(bias),
            address(out),
            kind(out),
            m_arg,
            n_arg,
            k_arg,
            self.int(inner)?,
            Argument::Int(activation as i32),
        ];
        let shared = Kernel::GemmAny.shared_bytes_most() as usize;
        self.call(Kernel::GemmAny, [n.div_ceil(64), m.div_ceil(64), batch], shared, arguments)
    }

    /// A product by the library, which wants the bias in the type of the result.
    fn library_product(
        &mut self,
        [x, w, out]: [&View; 3],
        bias: Option<Place>,
        shape: ProductShape,
        workspace: usize,
    ) -> Result<(), CudaError> {
        let bias = bias.map(|place| View::new(place, Element::F32, &[shape.n]));
        let bias = bias.map(|b| self.ordered(&b, Some(shape.element()))).transpose()?;
        let scratch = (workspace > 0).then(|| self.buffer(Element::I8, &[workspace]));
        let mut arguments = vec![address(x), address(w)];
        arguments.push(Argument::Address(bias.map(|b| b.place)));
        arguments.push(address(out));
        arguments.push(Argument::Address(scratch.map(|s| s.place)));
        self.plan.calls.push(Call { what: What::Product(shape), arguments });
        Ok(())
    }

    fn attention(
        &mut self,
        step: &Step,
        [q, k, v]: [&View; 3],
        bias: Option<&View>,
        scale: f32,
    ) -> Result<View, CudaError> {
        let (&[batch, nq, heads, d], &[kb, nk, kh, kd]) = (&q.shape[..], &k.shape[..]) else {
            return self.fail("queries and keys must have batch, tokens, heads and channels");
        };
        if (kb, kh, kd) != (batch, heads, d) || k.shape != v.shape || nk == 0 {
            return self.fail(format!("queries {:?}, keys {:?}, values {:?}", q.shape, k.shape, v.shape));
        }
        if d > HEAD_MOST {
            if bias.is_some() || scale <= 0.0 {
                return self
                    .fail(format!("heads of {d} channels; attention with a bias takes {HEAD_MOST} at most"));
            }
            return self.attention_in_products(step, [q, k, v], scale);
        }
        let bias = match bias {
            None => Argument::Structure(Some(None), vec![0; 4]),
            Some(bias) => {
                let bias = if bias.element == Element::F32 {
                    bias.clone()
                } else {
                    self.ordered(bias, Some(Element::F32))?
                };
                let Some(strides) = bias.broadcast(&[batch, heads, nq, nk]) else {
                    return self.fail(format!(
                        "a bias of {:?} on scores {:?}",
                        bias.shape,
                        [batch, heads, nq, nk]
                    ));
                };
                Argument::Structure(
                    Some(Some(bias.place)),
                    strides.into_iter().map(i64::cast_unsigned).collect(),
                )
            }
        };
        let special = Kernel::attention_bf16(d).filter(|_| self.bf16);
        let wanted = special.map(|_| Element::Bf16);
        let (q, k, v) = (self.ordered(q, wanted)?, self.ordered(k, wanted)?, self.ordered(v, wanted)?);
        let sizes = [self.int(nq)?, self.int(nk)?, self.int(heads)?];
        if let Some(kernel) = special {
            let out = self.buffer(Element::Bf16, &q.shape);
            let mut arguments = vec![address(&q), address(&k), address(&v), address(&out), bias];
            arguments.extend(sizes);
            arguments.push(Argument::Float(scale));
            self.call(
                kernel,
                [nq.div_ceil(64), heads, batch],
                kernel.shared_bytes_most() as usize,
                arguments,
            )?;
            return Ok(out);
        }
        let out = self.result(step, &q.shape);
        let mut arguments: Vec<Argument> =
            [&q, &k, &v, &out].iter().flat_map(|v| [address(v), kind(v)]).collect();
        arguments.push(bias);
        arguments.extend(sizes);
        arguments.extend([self.int(d)?, Argument::Float(scale)]);
        self.call(Kernel::AttentionAny, [nq.div_ceil(4), heads, batch], 16 * d, arguments)?;
        Ok(out)
    }

    /// Attention of large heads, with its scores in memory.
    fn attention_in_products(
        &mut self,
        step: &Step,
        [q, k, v]: [&View; 3],
        scale: f32,
    ) -> Result<View, CudaError> {
        let element = if self.bf16 { Element::Bf16 } else { Element::F32 };
        let turned = |view: &View, order: [usize; 4]| View {
            shape: order.map(|i| view.shape[i]).to_vec(),
            strides: order.map(|i| view.strides[i]).to_vec(),
            ..view.clone()
        };
        let q = self.ordered(&turned(q, [0, 2, 1, 3]), Some(element))?;
        let k = self.ordered(&turned(k, [0, 2, 3, 1]), Some(element))?;
        let v = self.ordered(&turned(v, [0, 2, 1, 3]), Some(element))?;
        let shape = [&q.shape[..3], &k.shape[3..]].concat();
        let scores = self.buffer(Element::F32, &shape);
        self.product(&q, &k, None, &scores, Activation::None)?;
        let weights = self.buffer(element, &shape);
        self.softmax(&scores, &weights, scale)?;
        let out = self.result(step, &q.shape);
        self.product(&weights, &v, None, &out, Activation::None)?;
        Ok(turned(&out, [0, 2, 1, 3]))
    }

    /// Softmax of the rows of `x`, times `scale`, both in order.
    fn softmax(&mut self, x: &View, out: &View, scale: f32) -> Result<(), CudaError> {
        let mut arguments = vec![address(x), kind(x), address(out), kind(out)];
        arguments.extend([self.int(x.rows())?, self.int(x.last())?, Argument::Float(scale)]);
        self.call(Kernel::SoftmaxRows, [x.rows().div_ceil(4), 1, 1], 0, arguments)
    }

    /// A convolution; pictures may overlap in memory, each of them lies in order.
    fn conv(
        &mut self,
        step: &Step,
        [x, weights]: [&View; 2],
        bias: Option<&View>,
        strides: [usize; 2],
        pads: [usize; 4],
        enlarged: bool,
    ) -> Result<View, CudaError> {
        let (&[n, channels, height, width], &[made, of, kernel_height, kernel_width]) =
            (&x.shape[..], &weights.shape[..])
        else {
            return self.fail(format!("convolves {:?} with {:?}", x.shape, weights.shape));
        };
        let (shift, kernel) = (usize::from(enlarged), [kernel_height, kernel_width]);
        let read = [height << shift, width << shift];
        let size =
            |i: usize| Some((read[i] + pads[i] + pads[i + 2]).checked_sub(kernel[i])? / strides[i] + 1);
        let (Some(out_height), Some(out_width), true) = (size(0), size(1), of == channels) else {
            return self.fail(format!("convolves {:?} with {:?}", x.shape, weights.shape));
        };
        let depth = channels * kernel_height * kernel_width;
        let special = Kernel::conv_bf16(kernel_height).filter(|_| {
            let fits = kernel_height == kernel_width && depth.is_multiple_of(8);
            self.bf16 && fits && weights.element == Element::Bf16
        });
        let weights = self.ordered(weights, None)?;
        let element = special.map_or(x.element, |_| Element::Bf16);
        let one = View { shape: x.shape[1..].to_vec(), strides: x.strides[1..].to_vec(), ..x.clone() };
        let as_it_is = one.is_in_order() && x.element == element;
        let x = if as_it_is { x.clone() } else { self.ordered(x, Some(element))? };
        let bias = match bias {
            Some(bias) if bias.count() != made => {
                return self.fail(format!("a bias of {:?} on {made} channels", bias.shape));
            }
            Some(bias) => Some(self.ordered(bias, Some(Element::F32))?.place),
            None => None,
        };
        let out = self.result(step, &[n, made, out_height, out_width]);
        let pixels = out_height * out_width;
        for size in [channels * height * width, depth, pixels] {
            self.int(size)?;
        }
        let sizes = [
            [channels, read[0]],
            [read[1], made],
            [out_height, out_width],
            kernel,
            strides,
            [pads[0], pads[1]],
            [shift, 0],
        ];
        let mut words = vec![x.strides[0].cast_unsigned()];
        words.extend(sizes.map(|[low, high]| low as u64 | (high as u64) << 32));
        let mut arguments = vec![address(&x)];
        if special.is_none() {
            arguments.push(kind(&x));
        }
        arguments.push(address(&weights));
        if special.is_none() {
            arguments.push(kind(&weights));
        }
        arguments.extend([Argument::Address(bias), address(&out), kind(&out)]);
        arguments.push(Argument::Structure(None, words));
        let blocks = pixels.div_ceil(128) * made.div_ceil(128) * n;
        let (kernel, tile) = match special {
            Some([large, _]) if made > 64 && blocks >= 64 => (large, 128),
            Some([_, small]) => (small, 64),
            None => (Kernel::ConvAny, 64),
        };
        let shared = kernel.shared_bytes_most() as usize;
        self.call(kernel, [pixels.div_ceil(tile), made.div_ceil(tile), n], shared, arguments)?;
        Ok(out)
    }

    fn channel_norm(
        &mut self,
        step: &Step,
        x: &View,
        gamma: &View,
        least: f32,
        silu: bool,
    ) -> Result<View, CudaError> {
        let &[n, channels, height, width] = &x.shape[..] else {
            return self.fail(format!("normalises the channels of {:?}", x.shape));
        };
        if gamma.count() != channels {
            return self.fail(format!("gains of {:?} for {channels} channels", gamma.shape));
        }
        let (x, gamma) = (self.ordered(x, None)?, self.ordered(gamma, Some(Element::F32))?);
        let out = self.result(step, &x.shape);
        let pixels = height * width;
        let arguments = vec![
            address(&x),
            kind(&x),
            address(&gamma),
            address(&out),
            kind(&out),
            self.int(channels)?,
            self.int(pixels)?,
            Argument::Float(least),
            Argument::Int(i32::from(silu)),
        ];
        let shared = Kernel::NormChannels.shared_bytes_most() as usize;
        self.call(Kernel::NormChannels, [pixels.div_ceil(32), n, 1], shared, arguments)?;
        Ok(out)
    }

    fn enlarge(&mut self, step: &Step, x: &View) -> Result<View, CudaError> {
        let (&[n, c, height, width], &[sn, sc, sy, sx]) = (&x.shape[..], &x.strides[..]) else {
            return self.fail(format!("enlarges {:?}", x.shape));
        };
        let out = self.result(step, &[n, c, 2 * height, 2 * width]);
        let squares = vec![n, c, height, 2, width, 2];
        let from = View { shape: squares.clone(), strides: vec![sn, sc, sy, 0, sx, 0], ..x.clone() };
        self.copy(&View::new(out.place, out.element, &squares), &from)?;
        Ok(out)
    }

    /// Rows of `x` that share one row of modulation, where its shape says so: that of `x`, with 1 for the last axes.
    fn rows_per_modulation(x: &View, modulation: &View) -> Option<usize> {
        let (lead, of) = (x.shape.split_last()?.1, modulation.shape.split_last()?.1);
        let same = lead.len() == of.len() && modulation.last() == x.last();
        let shared = of.iter().rev().take_while(|&&s| s == 1).count();
        let front = lead.len().checked_sub(shared)?;
        (same && lead[..front] == of[..front]).then(|| lead[front..].iter().product())
    }

    fn norm(
        &mut self,
        step: &Step,
        x: &View,
        [weight, bias, scale, shift]: [Option<&View>; 4],
        centred: bool,
        epsilon: f32,
    ) -> Result<View, CudaError> {
        let x = self.ordered(x, None)?;
        let f32_of = |planner: &mut Self, view: Option<&View>| match view {
            Some(v) => planner.ordered(v, Some(Element::F32)).map(Some),
            None => Ok(None),
        };
        let (weight, bias) = (f32_of(self, weight)?, f32_of(self, bias)?);
        if [&weight, &bias].iter().any(|w| w.as_ref().is_some_and(|w| w.count() != x.last())) {
            return self.fail(format!("weights of a norm over {}", x.last()));
        }
        let (scale, shift) = (f32_of(self, scale)?, f32_of(self, shift)?);
        let pair = scale.as_ref().zip(shift.as_ref());
        let per_row = pair.and_then(|(a, b)| Self::rows_per_modulation(&x, a).filter(|_| a.shape == b.shape));
        let out = self.result(step, &x.shape);
        let fused = |view: &Option<View>| {
            Argument::Address(view.as_ref().filter(|_| per_row.is_some()).map(|v| v.place))
        };
        let optional = |view: &Option<View>| Argument::Address(view.as_ref().map(|v| v.place));
        let arguments = vec![
            address(&x),
            kind(&x),
            address(&out),
            kind(&out),
            self.int(x.rows())?,
            self.int(x.last())?,
            Argument::Float(epsilon),
            Argument::Int(i32::from(centred)),
            optional(&weight),
            optional(&bias),
            fused(&scale),
            fused(&shift),
            self.int(per_row.unwrap_or(1).max(1))?,
        ];
        self.call(Kernel::NormRows, [x.rows().div_ceil(4), 1, 1], 0, arguments)?;
        let (Some((scale, shift)), None) = (pair, per_row) else { return Ok(out) };
        // Modulation of another shape, in two more calls.
        let scaled = self.buffer(Element::F32, &x.shape);
        self.element(ElementOp::AddProduct, &scaled, &[&out, &out, scale])?;
        let shape = self.common(&[&x.shape, &shift.shape])?;
        let shifted = self.result(step, &shape);
        self.element(ElementOp::Add, &shifted, &[&scaled, shift])?;
        Ok(shifted)
    }

    fn rotate(&mut self, step: &Step, x: &View, cos: &View, sin: &View) -> Result<View, CudaError> {
        let &[batch, tokens, heads, d] = &x.shape[..] else {
            return self.fail(format!("rotates {:?}", x.shape));
        };
        if cos.shape != [tokens, d / 2] || sin.shape != cos.shape {
            return self.fail(format!("tables {:?} and {:?} for {:?}", cos.shape, sin.shape, x.shape));
        }
        let (x, cos, sin) = (
            self.ordered(x, None)?,
            self.ordered(cos, Some(Element::F32))?,
            self.ordered(sin, Some(Element::F32))?,
        );
        let out = self.result(step, &x.shape);
        let arguments = vec![
            address(&x),
            kind(&x),
            address(&cos),
            address(&sin),
            address(&out),
            kind(&out),
            self.int(tokens)?,
            self.int(heads)?,
            self.int(d)?,
        ];
        self.call(Kernel::RotateHeads, [batch * tokens, 1, 1], 0, arguments)?;
        Ok(out)
    }

    fn reduce(
        &mut self,
        step: &Step,
        x: &View,
        axis: i64,
        keep: bool,
        root: bool,
    ) -> Result<View, CudaError> {
        let axis = self.axis(axis, x.shape.len())?;
        let x = self.ordered(x, None)?;
        let (outer, inner) =
            (x.shape[..axis].iter().product::<usize>(), x.shape[axis + 1..].iter().product::<usize>());
        let mut shape = x.shape.clone();
        if keep {
            shape[axis] = 1;
        } else {
            shape.remove(axis);
        }
        let out = self.result(step, &shape);
        let arguments = vec![
            address(&x),
            kind(&x),
            address(&out),
            kind(&out),
            self.int(outer)?,
            self.int(x.shape[axis])?,
            self.int(inner)?,
            Argument::Int(i32::from(root)),
        ];
        // As the kernel does it: by a warp, or by a thread where neighbours lie side by side.
        let of_a_block = if inner < 32 { 4 } else { 128 };
        self.call(Kernel::ReduceAxis, [(outer * inner).div_ceil(of_a_block), 1, 1], 0, arguments)?;
        Ok(out)
    }

    fn gather(&mut self, step: &Step, table: &View, index: &View) -> Result<View, CudaError> {
        let Some((&rows, row)) = table.shape.split_first() else { return self.fail("a table without rows") };
        if index.element != Element::I32 {
            return self.fail("indices that are no integers");
        }
        let one = View { shape: row.to_vec(), strides: table.strides[1..].to_vec(), ..table.clone() };
        let table = if one.is_in_order() { table.clone() } else { self.ordered(table, None)? };
        let index = self.ordered(index, None)?;
        self.plan.index_limits.push((step.inputs[1].clone(), rows));
        let out = self.result(step, &[&index.shape[..], row].concat());
        let width: usize = row.iter().product();
        let arguments = vec![
            address(&table),
            kind(&table),
            address(&index),
            address(&out),
            kind(&out),
            self.int(rows)?,
            self.int(width)?,
            Argument::Long(table.strides[0]),
        ];
        self.call(Kernel::GatherRows, [index.count(), 1, 1], 0, arguments)?;
        Ok(out)
    }
}

fn address(view: &View) -> Argument {
    Argument::Address(Some(view.place))
}

fn kind(view: &View) -> Argument {
    Argument::Int(view.element as i32)
}

/// Sizes and strides without axes of size 1, neighbours joined where all lists step through them as through one.
fn joined_axes(sizes: &[usize], strides: &[Vec<i64>]) -> (Vec<usize>, Vec<Vec<i64>>) {
    let mut out: (Vec<usize>, Vec<Vec<i64>>) = (Vec::new(), vec![Vec::new(); strides.len()]);
    for (axis, &size) in sizes.iter().enumerate().filter(|(_, s)| **s != 1) {
        let joins =
            strides.iter().zip(&out.1).all(|(s, o)| o.last().is_some_and(|&o| o == s[axis] * size as i64));
        if joins && !out.0.is_empty() {
            *out.0.last_mut().unwrap_or(&mut 0) *= size;
            for (s, o) in strides.iter().zip(&mut out.1) {
                if let Some(last) = o.last_mut() {
                    *last = s[axis];
                }
            }
        } else {
            out.0.push(size);
            strides.iter().zip(&mut out.1).for_each(|(s, o)| o.push(s[axis]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_join_where_all_step_alike() {
        let order = in_order(&[2, 1, 3, 4]);
        assert_eq!(
            joined_axes(&[2, 1, 3, 4], &[order.clone(), order.clone()]),
            (vec![24], vec![vec![1], vec![1]])
        );
        // A row that repeats joins with nothing before it.
        let row = vec![0, 0, 0, 1];
        assert_eq!(joined_axes(&[2, 1, 3, 4], &[order, row]), (vec![6, 4], vec![vec![4, 1], vec![0, 1]]));
        assert_eq!(joined_axes(&[1, 1], &[vec![7, 7]]), (vec![], vec![vec![]]));
    }

    /// A chain of steps needs two buffers at a time beside its input, however long it is; lives that meet never share.
    #[test]
    fn buffers_whose_lives_do_not_meet_share_memory() {
        let step = |i: usize| Step {
            op: Op::Element(ElementOp::Negate),
            inputs: vec![format!("v{i}")],
            output: format!("v{}", i + 1),
        };
        let program = Program { steps: (0..20).map(step).collect(), ..Program::default() };
        let mut planner = Planner::new(&program, false);
        planner.input("v0", Element::F32, &[100]);
        planner.steps().unwrap();
        let last = planner.output("v20").unwrap();
        let plan = planner.finish();
        assert_eq!(plan.calls.len(), 20);
        assert_eq!(plan.arena_bytes, 4 * 512, "input, output and two in between");
        let at = |slot: usize| plan.offsets[slot];
        for call in &plan.calls {
            let places: Vec<usize> = call.slots().map(at).collect();
            assert_ne!(places[0], places[1]);
        }
        assert_eq!(last.shape, [100]);
    }

    #[test]
    fn shapes_change_without_a_copy_where_strides_allow_it() {
        let view = |shape: &[usize], strides: &[i64]| View {
            place: Place { slot: 0, offset: 0 },
            element: Element::F32,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        let turned = view(&[4, 6], &[1, 4]);
        assert_eq!(strides_under(&turned, &[2, 2, 1, 3, 2]), Some(vec![2, 1, 1, 8, 4]));
        assert_eq!(strides_under(&turned, &[24]), None);
        assert_eq!(strides_under(&turned, &[8, 3]), None);
        assert_eq!(strides_under(&view(&[2, 3, 4], &[12, 4, 1]), &[6, 4]), Some(vec![4, 1]));
        // A repeated axis splits, and joins with no other.
        let repeated = view(&[3, 4, 5], &[5, 0, 1]);
        assert_eq!(strides_under(&repeated, &[3, 2, 2, 5]), Some(vec![5, 0, 0, 1]));
        assert_eq!(strides_under(&repeated, &[12, 5]), None);
        assert_eq!(strides_under(&repeated, &[3, 20]), None);
    }

    /// Frames over time, joined on the channels, are windows over memory that begin one frame apart.
    #[test]
    fn parts_that_lie_side_by_side_are_joined_without_a_copy() {
        let frames = View::new(Place { slot: 0, offset: 0 }, Element::Bf16, &[4, 2, 3, 5]);
        let program = Program::default();
        let planner = Planner::new(&program, true);
        let tap = |i: i64| planner.slice(&frames, 0, i, i + 2).unwrap();
        let joined = side_by_side(&[tap(0), tap(1), tap(2)], 1).unwrap();
        assert_eq!((joined.shape, joined.strides), (vec![2, 6, 3, 5], vec![30, 15, 5, 1]));
        assert_eq!(side_by_side(&[tap(0), tap(2)], 1), None, "a frame is missing");
        assert_eq!(side_by_side(&[tap(1), tap(0)], 1), None);
        let one = |i: i64| planner.slice(&frames, 0, i, i + 1).unwrap();
        let repeated = side_by_side(&[one(1), one(1), one(1)], 0).unwrap();
        assert_eq!((repeated.shape[0], repeated.strides[0], repeated.place.offset), (3, 0, 60));
    }

    #[test]
    fn what_cannot_be_done_is_told_with_its_place() {
        let check = |op: Op, shapes: &[&[usize]], wanted: &str| {
            let inputs: Vec<String> = (0..shapes.len()).map(|i| format!("i{i}")).collect();
            let program = Program {
                steps: vec![Step { op, inputs: inputs.clone(), output: "out".into() }],
                ..Program::default()
            };
            let mut planner = Planner::new(&program, true);
            for (name, shape) in inputs.iter().zip(shapes) {
                planner.input(name, Element::F32, shape);
            }
            assert_eq!(planner.steps().unwrap_err().to_string(), wanted);
        };
        let heads: &[usize] = &[1, 4, 2, 320];
        check(
            Op::Attention { scale: 1.0, rows_of: None },
            &[heads, heads, heads, &[4, 4]],
            "out: heads of 320 channels; attention with a bias takes 256 at most",
        );
        let rows: &[usize] = &[1, 4, 10];
        let wanted = "out: 3 heads in rows of [1, 4, 10]";
        check(Op::Attention { scale: 1.0, rows_of: Some(3) }, &[rows, rows, rows], wanted);
        check(Op::Rotate { rows_of: Some(2) }, &[rows, &[2, 4, 5], &[2, 4, 5]], "out: a table of [2, 4, 5]");
        let conv = Op::Conv { strides: [1, 1], pads: [0; 4], enlarged: false };
        let pictures: &[usize] = &[1, 3, 2, 2];
        let wanted = "out: convolves [1, 3, 2, 2] with [4, 3, 3, 3]";
        check(conv.clone(), &[pictures, &[4, 3, 3, 3]], wanted);
        check(conv.clone(), &[pictures, &[4, 2, 1, 1]], "out: convolves [1, 3, 2, 2] with [4, 2, 1, 1]");
        check(conv, &[pictures, &[4, 3, 1, 1], &[3]], "out: a bias of [3] on 4 channels");
        check(Op::MatMul, &[&[2, 3], &[4, 5]], "out: [2, 3] times [4, 5]");
        check(Op::Element(ElementOp::Add), &[&[2], &[3]], "out: [[2], [3]] do not fit each other");
        check(Op::Reshape(vec![4, -1]), &[&[2, 3]], "out: [2, 3] cannot become [4, -1]");
        check(Op::Slice { axis: 2, start: 0, end: 1 }, &[&[2, 3]], "out: axis 2 of 2");
        check(Op::Gather, &[&[2, 3], &[1]], "out: indices that are no integers");
    }
}
