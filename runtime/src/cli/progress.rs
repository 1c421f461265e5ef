//! Lines and bars on stderr. Bars appear on terminals only; elsewhere each stage is one line.

use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Shows what happens as it happens.
pub struct ProgressBar {
    quiet: bool,
    terminal: bool,
    open: bool,
    began: Instant,
    last: (String, usize),
}

const WIDTH: usize = 28;

impl ProgressBar {
    /// Silent when `quiet`.
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { quiet, terminal, open: false, began: Instant::now(), last: (String::new(), 0) }
    }

    /// One line, with the time since the start.
    pub fn line(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        self.close();
        eprintln!("{:6.1} s  {text}", self.began.elapsed().as_secs_f64());
    }

    /// A stage that is `done` of `of`; drawn in place on a terminal.
    pub fn bar(&mut self, stage: &str, done: usize, of: usize) {
        if self.quiet || of == 0 {
            return;
        }
        if !self.terminal {
            if done >= of {
                self.line(&format!("{stage}: {of} of {of}"));
            }
            return;
        }
        if self.last.0 != stage {
            self.close();
        }
        if self.last == (stage.to_owned(), done) {
            return;
        }
        self.last = (stage.to_owned(), done);
        let filled = WIDTH * done.min(of) / of;
        let bar: String = (0..WIDTH).map(|i| if i < filled { '█' } else { '░' }).collect();
        eprint!("\r{:6.1} s  {stage:<22} {bar} {done:>4}/{of}", self.began.elapsed().as_secs_f64());
        // A terminal that cannot be flushed shows the bar a little later.
        let _ = std::io::stderr().flush();
        self.open = true;
        if done >= of {
            self.close();
        }
    }

    fn close(&mut self) {
        if self.open {
            eprintln!();
            self.open = false;
        }
    }
}

impl Drop for ProgressBar {
    fn drop(&mut self) {
        self.close();
    }
}
