//! Writing to standard output.

use std::io::{self, Write};
use std::path::Path;

use super::args::CommonArgs;
use super::exit::Exit;
use super::print::escape_controls;
use crate::error::{Error, Result};

/// Prints to standard output. It is no error if the reader closes the pipe (`| head`).
pub(super) fn print_to_stdout(f: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match f(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("cannot write to standard output", e)),
        _ => Ok(()),
    }
}

/// Prints a summary line, unless `--quiet` is given.
pub(super) fn print_outcome(common: &CommonArgs, line: &str) -> Result<Exit> {
    if !common.quiet {
        print_to_stdout(|out| writeln!(out, "{}", escape_controls(line)))?;
    }
    Ok(Exit::Done)
}

/// Prints a list while the list is computed. It is no error if the reader closes the pipe (`| head`).
pub(super) fn print_list(
    print: impl FnOnce(&mut dyn FnMut(io::Result<()>) -> Result<()>) -> Result<()>,
) -> Result<Exit> {
    let mut is_closed = false;
    let done = print(&mut |outcome| {
        outcome.map_err(|e| {
            is_closed = e.kind() == io::ErrorKind::BrokenPipe;
            Error::io("cannot write to standard output", e)
        })
    });
    match done {
        Err(_) if is_closed => Ok(Exit::Done),
        done => done.map(|()| Exit::Done),
    }
}

/// Returns whether a path names standard output.
pub(super) fn is_standard_output(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// Standard output without the line buffer of the standard library.
pub(super) struct UnbufferedStdout;

impl Write for UnbufferedStdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(io::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
