//! Weights as constants of a graph: read and rearranged while they are written.

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::Arc;

use mindseye_engines::onnx::{DataType, Initializer, LazyTensor, Origin, Step, TensorData, WeightError};

use super::weights::WeightSource;

/// A constant that holds a weight of `source`, after the steps of `origin`.
pub(super) fn stored_weight(name: &str, origin: Origin, source: &Arc<dyn WeightSource>) -> Initializer {
    let shape = origin.stored_shape().unwrap_or_default();
    let lazy = WeightTensor { source: source.clone(), origin: origin.clone(), shape: shape.clone() };
    Initializer {
        name: name.to_owned(),
        dtype: DataType::F32,
        shape,
        data: TensorData::Lazy(Arc::new(lazy)),
        origin: Some(origin),
    }
}

struct WeightTensor {
    source: Arc<dyn WeightSource>,
    origin: Origin,
    shape: Vec<usize>,
}

/// Elements per write where a weight is copied as it is.
const CHUNK: usize = 1 << 20;

fn put(values: &[f32], bytes: &mut Vec<u8>, sink: &mut dyn Write) -> io::Result<()> {
    for part in values.chunks(CHUNK) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|v| v.to_le_bytes()));
        sink.write_all(bytes)?;
    }
    Ok(())
}

impl WeightTensor {
    fn read(&self, offset: usize, out: &mut [f32]) -> io::Result<()> {
        let weight = &self.origin.weight;
        self.source.read(weight, offset as u64, out).map_err(io::Error::other)?;
        if let Some(at) = out.iter().position(|v| !v.is_finite()) {
            let error = WeightError::NotFinite { name: weight.clone(), element: offset + at, value: out[at] };
            return Err(io::Error::other(error));
        }
        Ok(())
    }

    fn write(&self, bytes: &mut Vec<u8>, sink: &mut dyn Write) -> io::Result<()> {
        let total: usize = self.origin.shape.iter().product();
        if self.origin.steps.iter().all(|s| matches!(s, Step::Reshape(_))) {
            let mut buffer = vec![0f32; total.min(CHUNK)];
            let mut done = 0;
            while done < total {
                let n = buffer.len().min(total - done);
                self.read(done, &mut buffer[..n])?;
                put(&buffer[..n], bytes, sink)?;
                done += n;
            }
            return Ok(());
        }
        let mut data = vec![0f32; total];
        self.read(0, &mut data)?;
        if let Some(order) = self.transposed_columns() {
            return put_transposed(&data, self.shape[0], &order, bytes, sink);
        }
        let mut shape = self.origin.shape.clone();
        for step in &self.origin.steps {
            (shape, data) = step.rearrange(&shape, data);
            if let Step::Scale(k) = step {
                data.iter_mut().for_each(|v| *v *= k);
            }
        }
        put(&data, bytes, sink)
    }

    /// For a matrix that is transposed and then only reordered within its rows: which row of the matrix each column
    /// of the result is. These are nearly all bytes of a large model, and need no second copy.
    fn transposed_columns(&self) -> Option<Vec<usize>> {
        // A matrix, or what only becomes one by its first steps.
        let mut steps = self.origin.steps.iter().skip_while(|s| matches!(s, Step::Reshape(_)));
        let &[rows, columns] = self.shape.as_slice() else { return None };
        (*steps.next()? == Step::Permute(vec![1, 0])).then_some(())?;
        // What comes after must leave the first axis alone: then it does the same to every row.
        let mut order = (vec![1, columns], (0..columns).collect::<Vec<usize>>());
        for step in steps {
            let step = match step {
                Step::Reshape(new) if new.first() == Some(&rows) => {
                    Step::Reshape([&[1][..], &new[1..]].concat())
                }
                Step::Permute(perm) if perm.first() == Some(&0) => step.clone(),
                _ => return None,
            };
            step.shape(&order.0)?;
            order = step.rearrange(&order.0, order.1);
        }
        Some(order.1)
    }
}

impl LazyTensor for WeightTensor {
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()> {
        thread_local! {
            // One buffer of bytes for all tensors that a thread writes.
            static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BYTES.with_borrow_mut(|bytes| self.write(bytes, sink))
    }
}

/// Writes the `[rows, order.len()]` matrix whose column `c` is row `order[c]` of `data[.., rows]`, a few rows in
/// memory at a time.
fn put_transposed(
    data: &[f32],
    rows: usize,
    order: &[usize],
    bytes: &mut Vec<u8>,
    sink: &mut dyn Write,
) -> io::Result<()> {
    const BLOCK: usize = 64;
    let columns = order.len();
    let mut buffer = vec![0f32; BLOCK * columns];
    for first in (0..rows).step_by(BLOCK) {
        let n = BLOCK.min(rows - first);
        for (column, from) in order.iter().enumerate() {
            let from = from * rows + first;
            for (i, &v) in data[from..from + n].iter().enumerate() {
                buffer[i * columns + column] = v;
            }
        }
        put(&buffer[..n * columns], bytes, sink)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::MemoryWeights;

    /// The streamed forms and the plain one give the same values.
    #[test]
    fn streaming_changes_no_value() {
        let values: Vec<f32> = (0..130 * 12).map(|i| i as f32).collect();
        let source: Arc<dyn WeightSource> =
            Arc::new(MemoryWeights::from([("w", vec![12, 130], values.clone())]));
        let transposed = Step::Permute(vec![1, 0]);
        let halves = [
            Step::Reshape(vec![130, 2, 3, 2]),
            Step::Permute(vec![0, 1, 3, 2]),
            Step::Reshape(vec![130, 12]),
        ];
        let part = Step::Slice { axis: 1, start: 2, end: 7 };
        for steps in [
            vec![Step::Reshape(vec![130, 12])],
            vec![transposed.clone()],
            [vec![transposed.clone()], halves.to_vec()].concat(),
            vec![transposed, part.clone()],
            vec![part, Step::Scale(0.5)],
        ] {
            let origin = Origin { weight: "w".into(), shape: vec![12, 130], steps };
            let (mut shape, mut want) = (origin.shape.clone(), values.clone());
            for step in &origin.steps {
                (shape, want) = step.rearrange(&shape, want);
                if let Step::Scale(k) = step {
                    want.iter_mut().for_each(|v| *v *= k);
                }
            }
            let tensor = stored_weight("w", origin, &source);
            assert_eq!(tensor.shape, shape, "{:?}", tensor.origin);
            assert_eq!(tensor.to_f32().unwrap(), want, "{:?}", tensor.origin);
        }
    }
}
