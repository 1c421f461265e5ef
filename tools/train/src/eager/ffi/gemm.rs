//! Matrix product over strided slices.

/// A matrix inside a slice: element `(r, c)` is at `offset + r * row + c * col`.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Index of element (0, 0).
    pub offset: usize,
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub col: usize,
}

impl View {
    /// A matrix whose rows are `row` apart and whose columns are neighbours.
    #[must_use]
    pub fn rows(offset: usize, row: usize) -> Self {
        Self { offset, row, col: 1 }
    }

    /// The same matrix, transposed.
    #[must_use]
    pub fn t(self) -> Self {
        Self { offset: self.offset, row: self.col, col: self.row }
    }

    fn last(self, rows: usize, cols: usize) -> usize {
        self.offset + (rows - 1) * self.row + (cols - 1) * self.col
    }
}

/// `c[m, n] = keep * c + scale * a[m, k] @ b[k, n]`.
///
/// # Panics
/// When a matrix reaches beyond its slice.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    [m, n, k]: [usize; 3],
    c: &mut [f32],
    cv: View,
    keep: f32,
    a: &[f32],
    av: View,
    b: &[f32],
    bv: View,
    scale: f32,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for i in 0..m {
            for j in 0..n {
                c[cv.offset + i * cv.row + j * cv.col] *= keep;
            }
        }
        return;
    }
    assert!(
        cv.last(m, n) < c.len() && av.last(m, k) < a.len() && bv.last(k, n) < b.len(),
        "matrix out of bounds"
    );
    // SAFETY: the assertion above keeps every element that the product touches inside its slice (strides are not
    // negative), `c` is borrowed mutably so nothing overlaps it, and all three hold initialised f32 values.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr().add(cv.offset),
            cv.col as isize,
            cv.row as isize,
            keep != 0.0,
            a.as_ptr().add(av.offset),
            av.col as isize,
            av.row as isize,
            b.as_ptr().add(bv.offset),
            bv.col as isize,
            bv.row as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
