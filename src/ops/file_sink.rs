//! Output file of `convert`. The file gets its name when the file is complete and durable.

use std::path::Path;

use uuid::Uuid;

use super::image_writer::ImageWriter;
use crate::chain::{Chain, OpenMode, Policy};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::image::{AtomicFile, Durability, Image, ImageSpec, file_name, folder_of, write_new};
use crate::storage::{Access, Env, File, Lock};
use crate::units::{SECTOR, SectorRange};

/// A new file that is being filled. If the sink is dropped before [`FileSink::finish`], no file is left.
pub(super) struct FileSink<'a> {
    draft: AtomicFile,
    replace: bool,
    /// The file to replace, with its lock.
    _replaced: Option<File>,
    output: SinkOutput<'a>,
}

enum SinkOutput<'a> {
    Raw(File, u64),
    Image(Box<ImageWriter<'a>>),
}

/// Kind of the new file.
pub(super) enum NewFile<'a> {
    /// A raw file of this length in bytes.
    Raw(u64),
    /// An image without parent, with this UUID.
    Image(&'a ImageSpec, Uuid),
}

impl<'a> FileSink<'a> {
    /// Creates a file, to which [`FileSink::finish`] gives the name `path`. If `replace` is set, a file at `path` is
    /// replaced.
    ///
    /// # Errors
    /// - `Refused` if `path` exists, or if `replace` is set and `path` is no regular file
    /// - `NotFound` if the folder of `path` does not exist
    /// - `Busy` if the file to replace is in use
    /// - `Invalid` if the format does not allow the size
    /// - `Io`, `NoSpace`
    pub(super) fn new(env: &'a dyn Env, path: &Path, make: &NewFile<'_>, replace: bool) -> Result<FileSink<'a>> {
        let (folder, name, old) = match env.canonical(path) {
            Ok(found) if replace => {
                // The old file stays locked until it is replaced. Otherwise a daemon could open the old file and serve
                // it after the replacement, when the file has no name. If `path` is a symbolic link, its target is
                // replaced.
                let file = env.open(&found, Access::Write)?;
                file.lock(Lock::Exclusive)?;
                (file.folder(), file.name().to_os_string(), Some(file))
            }
            Ok(_) => {
                let what = "the file exists already; give --force to replace it";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            Err(_) => (env.folder(folder_of(path))?, file_name(path)?.to_os_string(), None),
        };
        let draft = AtomicFile::begin(env, path, folder, &name)?;
        let form = match make {
            NewFile::Raw(len) => draft.file().set_len(*len).map(|()| SinkOutput::Raw(draft.file().clone(), *len)),
            NewFile::Image(spec, uuid) => {
                create_image(env, draft.file(), spec, *uuid).map(|writer| SinkOutput::Image(Box::new(writer)))
            }
        };
        let form = form.map_err(|e| draft.with_requested_path(e))?;
        Ok(FileSink { draft, replace, _replaced: old, output: form })
    }

    /// Writes a range. Ranges may be written in any order.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        self.write(range, bytes).map_err(|e| self.draft.with_requested_path(e))
    }

    fn write(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        failpoint::reached("convert.run-copied");
        match &mut self.output {
            SinkOutput::Raw(file, len) => {
                let start = range.start() * SECTOR;
                // The last sector of a raw disk may be partial.
                let len = usize::try_from(len.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
                file.write_at(&bytes[..len], start)
            }
            SinkOutput::Image(writer) => writer.put(range, bytes),
        }
    }

    /// Makes the file durable, and gives it its name.
    pub(super) fn finish(mut self) -> Result<()> {
        self.complete().map_err(|e| self.draft.with_requested_path(e))
    }

    fn complete(&mut self) -> Result<()> {
        match &mut self.output {
            SinkOutput::Raw(file, _) => file.sync()?,
            SinkOutput::Image(writer) => {
                writer.commit()?;
                writer.close()?;
            }
        }
        if self.replace { self.draft.replace() } else { self.draft.publish() }
    }
}

/// Writes a new image into an empty file and opens it for writing.
fn create_image<'a>(env: &'a dyn Env, file: &File, spec: &ImageSpec, uuid: Uuid) -> Result<ImageWriter<'a>> {
    write_new(file, env, uuid, spec)?;
    file.lock(Lock::Exclusive)?;
    let chain = Chain::from_image(env, Image::open(file.clone())?, &Policy::default(), OpenMode::Write)?;
    ImageWriter::open(env, chain, &Durability::FlushOnly)
}
