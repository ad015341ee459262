//! `convert`: copies the contents of a disk, as its guest reads them, into another format. Holes stay holes in
//! files.

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

/// Format of the copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TargetFormat {
    /// A sparse file, or a block device, with the bytes of the disk.
    Raw,
    /// A fixed VHD.
    Fixed,
    /// A dynamic VHD with blocks of this size.
    Dynamic(BlockSize),
}

/// Parameters of a conversion.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// Format of the copy.
    pub to: TargetFormat,
    /// The size is rounded up to a multiple of this number of bytes.
    pub align: u64,
    /// Whether an existing file is replaced, or a block device overwritten.
    pub replace: bool,
    /// UUID of the new image. By default a new one.
    pub uuid: Option<Uuid>,
}

/// Checks that the file at `path` may be replaced. An image with an open session must not be replaced: acknowledged
/// writes would be lost, and the live journal would remain.
///
/// # Errors
/// - `Refused`, with a message that contains the command to run, if the image has an open session
/// - `Refused` if `path` leads neither to a regular file nor to a block device
/// - `Io`
pub fn check_replaceable(env: &dyn Env, path: &Path, runtime: &[RuntimeFolder]) -> Result<()> {
    if !env.exists(path) {
        return Ok(());
    }
    let file = env.open_disk(path, Access::Read)?;
    if file.is_block_device() {
        return Ok(()); // daemons serve no devices
    }
    refuse_if_file_is_live(env, runtime, &file)
}

/// Copies `disk` to a new file at `path`. The file gets its name, or replaces an old file, when it is complete and
/// durable. In a VHD, a partial last sector of the disk is padded with zeros.
///
/// If `path` is a block device, the device is overwritten in place with the bytes of the disk. If the call then fails,
/// the contents of the device are undefined.
///
/// # Errors
/// After an error no new file is left, unless only the sync of its name failed.
/// - `Refused` if `path` exists and `how.replace` is not set, if a device is too small, or if a VHD would be written to
///   a device
/// - `NotFound` if the folder of `path` does not exist
/// - `Busy` if the file to replace or the device is in use
/// - `Invalid` if the format does not allow the size
/// - `Io`, `NoSpace`; errors of `progress`
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

/// Returns whether there is a block device at `path`. Returns false for a name that does not exist, which may be the
/// name of a new file, and for a file that this user may not read: the caller fails when it opens that file.
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
            "it is a block device, and VHDs are written to regular files only; give --to raw to write the contents of the disk",
        );
    }
    if !how.replace {
        return refused("it is a block device; give --force to overwrite its contents");
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

/// Writes all bytes of `disk` to `out`, followed by zeros up to a multiple of `align` bytes.
///
/// # Errors
/// `Io`, also if `out` is a closed pipe; errors of `progress`.
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
