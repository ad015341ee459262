//! `convert`: the disk as its guest sees it, in another form. Holes stay holes.

use std::io::Write;
use std::path::Path;

use super::mover::{CHUNK, Disk, Progress, each_run};
use super::sink::{Make, Sink};
use crate::error::{Error, Result};
use crate::image::{Kind, Spec, refuse_live_file};
use crate::storage::{Access, Buffer, Env, Runtime};
use crate::units::{BlockSize, SECTOR};

/// What a disk is converted to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum To {
    /// The disk itself, sparse.
    Raw,
    /// A fixed VHD.
    Fixed,
    /// A dynamic VHD with blocks of this size.
    Dynamic(BlockSize),
}

/// Refuses to replace an image whose daemon was killed: what it acknowledged would be lost, and its journal left behind.
///
/// # Errors
/// `Refused`, saying what to do; `Io`.
pub fn check_replaced(env: &dyn Env, path: &Path, runtime: Option<&Runtime>) -> Result<()> {
    if !env.exists(path) {
        return Ok(());
    }
    refuse_live_file(env, runtime, &env.open(path, Access::Read)?)
}

/// Copies `disk` to a new file at `path`, its size rounded up to a multiple of `align` bytes. The name appears when the copy
/// is whole and durable; with `replace` it then takes the place of what has the name. A VHD gets whole sectors: what the
/// last one lacks is zero.
///
/// # Errors
/// `Refused` where the name exists; `Busy` where the file to be replaced is in use; `Invalid` for sizes that a VHD does
/// not have; `Io`, `NoSpace`; what `progress` fails with. Nothing is left behind.
pub fn convert(
    env: &dyn Env,
    disk: &Disk,
    path: &Path,
    to: To,
    align: u64,
    replace: bool,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let size = (disk.sectors() * SECTOR).next_multiple_of(align);
    let spec = match to {
        To::Raw => None,
        To::Fixed => Some(Spec { kind: Kind::Fixed, size, block_size: BlockSize::DEFAULT, reserve: size }),
        To::Dynamic(block_size) => Some(Spec { kind: Kind::Dynamic, size, block_size, reserve: size }),
    };
    let make = spec.as_ref().map_or(Make::Raw(disk.bytes().next_multiple_of(align)), Make::Image);
    let mut sink = Sink::new(env, path, &make, replace)?;
    each_run(disk, progress, |range, bytes| sink.put(range, bytes))?;
    sink.finish()
}

/// Writes `disk` to `out` from its first byte to its last, zeros as zeros, and zeros up to a multiple of `align` bytes.
///
/// # Errors
/// `Io`, also where nobody reads `out` any more; what `progress` fails with.
pub fn stream(disk: &Disk, out: &mut dyn Write, align: u64, progress: &mut Progress<'_>) -> Result<()> {
    let failed = |e| Error::io("cannot write to standard output", e);
    let zeros = Buffer::zeroed(CHUNK);
    let (end, mut done) = (disk.bytes(), 0);
    let fill = |out: &mut dyn Write, done: &mut u64, until: u64| -> Result<()> {
        while *done < until {
            let len = (until - *done).min(CHUNK as u64);
            out.write_all(&zeros[..usize::try_from(len).expect("a chunk")]).map_err(failed)?;
            *done += len;
        }
        Ok(())
    };
    each_run(disk, progress, |range, bytes| {
        fill(out, &mut done, range.start() * SECTOR)?;
        let len = (end - done).min(bytes.len() as u64);
        out.write_all(&bytes[..usize::try_from(len).expect("a chunk")]).map_err(failed)?;
        done += len;
        Ok(())
    })?;
    fill(out, &mut done, end.next_multiple_of(align))?;
    out.flush().map_err(failed)
}
