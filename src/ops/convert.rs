//! `convert`: the disk as its guest sees it, in another form. Holes stay holes.

use std::cell::RefCell;
use std::io::Write;
use std::path::Path;

use uuid::Uuid;

use super::device_sink::DeviceSink;
use super::file_sink::{FileSink, NewFile};
use super::source::{CHUNK_BYTES, Progress, SourceDisk, for_each_data_run};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{ImageKind, ImageSpec, refuse_if_file_is_live};
use crate::storage::{Access, Buffer, Env, RuntimeFolder};
use crate::units::{BlockSize, SECTOR};

/// What a disk is converted to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TargetFormat {
    /// The disk itself, sparse.
    Raw,
    /// A fixed VHD.
    Fixed,
    /// A dynamic VHD with blocks of this size.
    Dynamic(BlockSize),
}

/// A conversion.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// What is made.
    pub to: TargetFormat,
    /// Its size is rounded up to a multiple of so many bytes.
    pub align: u64,
    /// It takes the place of the file that has its name, or is written over a block device.
    pub replace: bool,
    /// The identity of an image that is made; a new one if none.
    pub uuid: Option<Uuid>,
}

/// Refuses to replace an image whose daemon was killed: what it acknowledged would be lost, and its journal left behind.
///
/// # Errors
/// `Refused`, saying what to do; `Io`.
pub fn check_replaceable(env: &dyn Env, path: &Path, runtime: &[RuntimeFolder]) -> Result<()> {
    if !env.exists(path) {
        return Ok(());
    }
    let file = env.open_disk(path, Access::Read)?;
    if file.is_block_device() {
        return Ok(()); // no daemon serves one
    }
    refuse_if_file_is_live(env, runtime, &file)
}

/// Copies `disk` to a new file at `path`. The name appears when the copy is whole and durable; to replace a file, it then
/// takes the place of what has the name. A VHD gets whole sectors: what the last one lacks is zero.
///
/// A block device at `path` is overwritten in place with a raw disk: if that fails, what it holds is of no use.
///
/// # Errors
/// `Refused` where the name exists, or for a device that is too small or is to hold a VHD; `Busy` where the file to be
/// replaced or the device is in use; `Invalid` for sizes that a VHD does not have; `Io`, `NoSpace`; what `progress` fails
/// with. No file is left behind.
pub fn convert(
    env: &dyn Env,
    disk: &SourceDisk,
    path: &Path,
    how: &Conversion,
    progress: &mut Progress<'_>,
) -> Result<()> {
    if is_device(env, path)? {
        return convert_to_device(env, disk, path, how, progress);
    }
    let size = (disk.sectors() * SECTOR).next_multiple_of(how.align);
    let spec = match how.to {
        TargetFormat::Raw => None,
        TargetFormat::Fixed => {
            Some(ImageSpec { kind: ImageKind::Fixed, size, block_size: BlockSize::DEFAULT, reserve: size })
        }
        TargetFormat::Dynamic(block_size) => {
            Some(ImageSpec { kind: ImageKind::Dynamic, size, block_size, reserve: size })
        }
    };
    let raw = NewFile::Raw(disk.bytes().next_multiple_of(how.align));
    let uuid = how.uuid.unwrap_or_else(|| env.uuid());
    let make = spec.as_ref().map_or(raw, |spec| NewFile::Image(spec, uuid));
    let mut sink = FileSink::new(env, path, &make, how.replace)?;
    for_each_data_run(disk, progress, |range, bytes| sink.put(range, bytes))?;
    sink.finish()
}

/// Whether there is a block device at `path`. It is not asked of names that lead nowhere, nor of files that are closed to
/// this user: what opens them later reports that.
fn is_device(env: &dyn Env, path: &Path) -> Result<bool> {
    match env.open_disk(path, Access::Read) {
        Ok(file) => Ok(file.is_block_device()),
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::EACCES) => Ok(false),
        Err(e) => Err(e),
    }
}

fn convert_to_device(
    env: &dyn Env,
    disk: &SourceDisk,
    path: &Path,
    how: &Conversion,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let refused = |what| Err(Error::new(ErrorKind::Refused, what).at_path(path));
    if how.to != TargetFormat::Raw {
        return refused(
            "it is a block device, and VHDs are written to regular files only; --to raw writes the disk itself",
        );
    }
    if !how.replace {
        return refused("it is a block device; give --force to overwrite what it holds");
    }
    let mut sink = DeviceSink::open(env, path, disk.bytes().next_multiple_of(how.align))?;
    // Both the reader and the writer report progress.
    let progress = RefCell::new(progress);
    let mut report = |bytes| (progress.borrow_mut())(bytes);
    for_each_data_run(disk, &mut report, |range, bytes| {
        sink.put(range, bytes, &mut |bytes| (progress.borrow_mut())(bytes))
    })?;
    sink.finish(&mut |bytes| (progress.borrow_mut())(bytes))
}

/// Writes `disk` to `out` from its first byte to its last, zeros as zeros, and zeros up to a multiple of `align` bytes.
///
/// # Errors
/// `Io`, also where nobody reads `out` any more; what `progress` fails with.
pub fn stream(disk: &SourceDisk, out: &mut dyn Write, align: u64, progress: &mut Progress<'_>) -> Result<()> {
    let failed = |e| Error::io("cannot write to standard output", e);
    let zeros = Buffer::zeroed(CHUNK_BYTES);
    let (end, mut done) = (disk.bytes(), 0);
    let fill = |out: &mut dyn Write, done: &mut u64, until: u64| -> Result<()> {
        while *done < until {
            let len = (until - *done).min(CHUNK_BYTES as u64);
            out.write_all(&zeros[..usize::try_from(len).expect("a chunk")]).map_err(failed)?;
            *done += len;
        }
        Ok(())
    };
    for_each_data_run(disk, progress, |range, bytes| {
        fill(out, &mut done, range.start() * SECTOR)?;
        let len = (end - done).min(bytes.len() as u64);
        out.write_all(&bytes[..usize::try_from(len).expect("a chunk")]).map_err(failed)?;
        done += len;
        Ok(())
    })?;
    fill(out, &mut done, end.next_multiple_of(align))?;
    out.flush().map_err(failed)
}
