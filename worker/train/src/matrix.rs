//! Numbers in rows: what networks take and give, on the host.

/// A dense matrix, row after row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Numbers a row.
    pub cols: usize,
    /// `rows × cols` numbers.
    pub data: Vec<f32>,
}

impl Matrix {
    /// The numbers of one row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }
}

/// What is to be predicted, by row.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// The number of the class.
    Classes {
        /// By row, each below `count`.
        index: Vec<u32>,
        /// How many classes there are.
        count: usize,
    },
    /// A number.
    Values(Vec<f32>),
}

impl Targets {
    /// Rows.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Classes { index, .. } => index.len(),
            Self::Values(values) => values.len(),
        }
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Outputs that a network needs for them.
    #[must_use]
    pub const fn width(&self) -> usize {
        match self {
            Self::Classes { count, .. } => *count,
            Self::Values(_) => 1,
        }
    }
}

/// Rows and what is to be predicted for them.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// One row each.
    pub inputs: Matrix,
    /// One target each.
    pub targets: Targets,
}
