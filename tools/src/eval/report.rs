//! Tables and files.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use mindseye_base::file::replace;

/// A Markdown table.
pub struct Table {
    columns: usize,
    text: String,
}

impl Table {
    /// An empty table with this head.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        let text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
        Self { columns: head.len(), text }
    }

    /// Adds a row; cells that are missing stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.text.push('|');
        let mut n = 0;
        for cell in cells {
            let _ = write!(self.text, " {} |", cell.replace('|', "/"));
            n += 1;
        }
        for _ in n..self.columns {
            self.text.push_str("  |");
        }
        self.text.push('\n');
    }

    /// The table.
    #[must_use]
    pub fn text(self) -> String {
        self.text
    }
}

/// Writes a file under a temporary name beside it and renames it.
///
/// # Errors
/// With the path.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    replace(path, bytes).with_context(|| path.display().to_string())
}
