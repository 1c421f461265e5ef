//! Calibration inputs that are dear to make are made once and kept in a temporary file: calibration, the check and
//! the comparison without SmoothQuant all read the same items.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use super::{CalibrationSource, Inputs, Scratch, SuppliedError};
use mindseye_engines::backend::{Elements, Tensor};

/// A source whose items are taken from another one the first time, and from a file after that. One item is in memory.
pub struct Spooled {
    inner: Box<dyn CalibrationSource>,
    file: File,
    /// Where each item that was made begins.
    starts: Vec<u64>,
    position: usize,
    /// True when the inner source has come to its end.
    complete: bool,
    _folder: Scratch,
}

impl Spooled {
    /// Spools `inner`, which must be at its first item.
    ///
    /// # Errors
    /// The temporary file cannot be made.
    pub fn new(inner: Box<dyn CalibrationSource>) -> Result<Spooled, SuppliedError> {
        let folder = Scratch::new().map_err(|e| failed(&e))?;
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(folder.0.join("items"))
            .map_err(|e| failed(&e))?;
        Ok(Spooled { inner, file, starts: Vec::new(), position: 0, complete: false, _folder: folder })
    }
}

fn failed(e: &std::io::Error) -> SuppliedError {
    SuppliedError::new(format!("temporary file in {}: {e}", std::env::temp_dir().display()))
}

impl CalibrationSource for Spooled {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn count(&self) -> Option<u64> {
        if self.complete { Some(self.starts.len() as u64) } else { self.inner.count() }
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.position = 0;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        if let Some(&start) = self.starts.get(self.position) {
            self.file.seek(SeekFrom::Start(start)).map_err(|e| failed(&e))?;
            let item = read_tensors(&mut BufReader::new(&self.file)).map_err(|e| failed(&e))?;
            self.position += 1;
            return Ok(Some(item));
        }
        if self.complete {
            return Ok(None);
        }
        let Some(item) = self.inner.next()? else {
            self.complete = true;
            return Ok(None);
        };
        let start = self.file.seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        let mut sink = BufWriter::new(&self.file);
        write_tensors(&mut sink, &item).and_then(|()| sink.flush()).map_err(|e| failed(&e))?;
        self.starts.push(start);
        self.position += 1;
        Ok(Some(item))
    }
}

/// Number of tensors; for each its name, element type, shape and values, all little-endian with lengths before them.
pub(super) fn write_tensors(sink: &mut impl Write, item: &Inputs) -> std::io::Result<()> {
    let number = |sink: &mut dyn Write, n: usize| sink.write_all(&(n as u64).to_le_bytes());
    number(sink, item.len())?;
    for (name, tensor) in item {
        number(sink, name.len())?;
        sink.write_all(name.as_bytes())?;
        number(sink, tensor.shape.len())?;
        tensor.shape.iter().try_for_each(|&d| number(sink, d))?;
        number(sink, tensor.data.len())?;
        match &tensor.data {
            Elements::F32(v) => {
                number(sink, 0)?;
                v.iter().try_for_each(|x| sink.write_all(&x.to_le_bytes()))?;
            }
            Elements::I64(v) => {
                number(sink, 1)?;
                v.iter().try_for_each(|x| sink.write_all(&x.to_le_bytes()))?;
            }
            Elements::I32(v) => {
                number(sink, 2)?;
                v.iter().try_for_each(|x| sink.write_all(&x.to_le_bytes()))?;
            }
        }
    }
    Ok(())
}

/// What [`write_tensors`] wrote.
pub(super) fn read_tensors(from: &mut impl Read) -> std::io::Result<Inputs> {
    fn number(from: &mut impl Read) -> std::io::Result<usize> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes) as usize)
    }
    fn values<const N: usize, T>(
        from: &mut impl Read,
        count: usize,
        of: fn([u8; N]) -> T,
    ) -> std::io::Result<Vec<T>> {
        // A damaged count is found at the end of the file.
        let mut all = Vec::with_capacity(count.min(1 << 24));
        let mut bytes = [0; N];
        for _ in 0..count {
            from.read_exact(&mut bytes)?;
            all.push(of(bytes));
        }
        Ok(all)
    }
    let mut item = Vec::new();
    for _ in 0..number(from)? {
        let length = number(from)?;
        let name =
            String::from_utf8(values(from, length, |b: [u8; 1]| b[0])?).map_err(std::io::Error::other)?;
        let rank = number(from)?;
        let shape = (0..rank).map(|_| number(from)).collect::<std::io::Result<Vec<_>>>()?;
        let count = number(from)?;
        let data = match number(from)? {
            0 => Elements::F32(values(from, count, f32::from_le_bytes)?),
            1 => Elements::I64(values(from, count, i64::from_le_bytes)?),
            _ => Elements::I32(values(from, count, i32::from_le_bytes)?),
        };
        item.push((name, Tensor { shape, data }));
    }
    Ok(item)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::InMemory;

    /// A source that counts how often an item is made.
    struct Dear {
        items: InMemory,
        made: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    }

    impl CalibrationSource for Dear {
        fn describe(&self) -> String {
            "dear".into()
        }
        fn count(&self) -> Option<u64> {
            self.items.count()
        }
        fn restart(&mut self) -> Result<(), SuppliedError> {
            Err(SuppliedError::new("asked to start again"))
        }
        fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
            self.made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.items.next()
        }
    }

    #[test]
    fn items_are_made_once_and_come_back_the_same() {
        let item = |i: usize| -> Inputs {
            vec![
                ("x".into(), Tensor::f32(&[2, i], (0..2 * i).map(|v| v as f32 + 0.1).collect())),
                ("rows".into(), Tensor::i64(&[1, 2], vec![-1, i as i64])),
                ("none".into(), Tensor { shape: vec![0], data: Elements::I32(vec![]) }),
            ]
        };
        let items: Vec<Inputs> = (1..5).map(item).collect();
        let made = std::sync::Arc::default();
        let dear = Dear { items: InMemory::new("", items.clone()), made: std::sync::Arc::clone(&made) };
        let mut source = Spooled::new(Box::new(dear)).unwrap();
        assert_eq!(source.count(), Some(4));
        // A short pass, then longer ones.
        for length in [2, 4, 4, 1] {
            source.restart().unwrap();
            for want in &items[..length] {
                assert_eq!(source.next().unwrap().as_ref(), Some(want));
            }
        }
        source.restart().unwrap();
        for _ in 0..4 {
            source.next().unwrap();
        }
        assert_eq!(source.next().unwrap(), None);
        assert_eq!(source.next().unwrap(), None);
        assert_eq!(made.load(std::sync::atomic::Ordering::Relaxed), 5, "each item once, and the end once");
    }
}
