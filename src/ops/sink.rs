//! Where a copied disk goes: a file that gets its name when it is whole and durable.

use std::path::Path;

use uuid::Uuid;

use super::writer::Writer;
use crate::chain::{Chain, Policy, OpenMode};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{AtomicFile, Image, Durability, ImageSpec, file_name, folder_of, write_new};
use crate::failpoint;
use crate::storage::{Access, Env, File, Lock};
use crate::units::{SECTOR, SectorRange};

/// A new file that is being filled. Dropped before [`Sink::finish`] it vanishes.
pub(super) struct Sink<'a> {
    draft: AtomicFile,
    replace: bool,
    /// What is to be replaced, with its lock.
    _old: Option<File>,
    form: Form<'a>,
}

enum Form<'a> {
    Raw(File, u64),
    Image(Box<Writer<'a>>),
}

/// What to make.
pub(super) enum Make<'a> {
    /// A raw file of so many bytes.
    Raw(u64),
    /// An image without parent, with this identity.
    Image(&'a ImageSpec, Uuid),
}

impl<'a> Sink<'a> {
    /// Begins a file that will be called `path`; with `replace` instead of a file of that name.
    ///
    /// # Errors
    /// `Refused` where the name exists (or, with `replace`, is no regular file); `Busy` where the file to be replaced is
    /// in use; else as `image::create`.
    pub(super) fn new(env: &'a dyn Env, path: &Path, make: &Make<'_>, replace: bool) -> Result<Sink<'a>> {
        let (folder, name, old) = match env.canonical(path) {
            Ok(found) if replace => {
                // Locked until it is replaced: a daemon that opened it meanwhile would go on with a file without a name.
                // The file that a link leads to is replaced, not the link.
                let file = env.open(&found, Access::Write)?;
                file.lock(Lock::Exclusive)?;
                (file.folder(), file.name().to_os_string(), Some(file))
            }
            Ok(_) => {
                let what = "it exists already; give --force to replace it";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            Err(_) => (env.folder(folder_of(path))?, file_name(path)?.to_os_string(), None),
        };
        let draft = AtomicFile::begin(env, path, folder, &name)?;
        let form = match make {
            Make::Raw(len) => draft.file().set_len(*len).map(|()| Form::Raw(draft.file().clone(), *len)),
            Make::Image(spec, uuid) => {
                image(env, draft.file(), spec, *uuid).map(|writer| Form::Image(Box::new(writer)))
            }
        };
        let form = form.map_err(|e| draft.with_requested_path(e))?;
        Ok(Sink { draft, replace, _old: old, form })
    }

    /// Writes a run. Ranges ascend or not, as the caller likes.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        self.write(range, bytes).map_err(|e| self.draft.with_requested_path(e))
    }

    fn write(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        failpoint::reached("convert.run-copied");
        match &mut self.form {
            Form::Raw(file, len) => {
                let start = range.start() * SECTOR;
                // The last sector of a raw disk need not be full.
                let there = usize::try_from(len.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
                file.write_at(&bytes[..there], start)
            }
            Form::Image(writer) => writer.put(range, bytes),
        }
    }

    /// Makes all of it durable, and gives it its name.
    pub(super) fn finish(mut self) -> Result<()> {
        self.settle().map_err(|e| self.draft.with_requested_path(e))
    }

    fn settle(&mut self) -> Result<()> {
        match &mut self.form {
            Form::Raw(file, _) => file.sync()?,
            Form::Image(writer) => {
                writer.commit()?;
                writer.close()?;
            }
        }
        if self.replace { self.draft.replace() } else { self.draft.publish() }
    }
}

/// Writes a new image into an empty file, and opens it to be filled.
fn image<'a>(env: &'a dyn Env, file: &File, spec: &ImageSpec, uuid: Uuid) -> Result<Writer<'a>> {
    write_new(file, env, uuid, spec)?;
    file.lock(Lock::Exclusive)?;
    let chain = Chain::from_image(env, Image::open(file.clone())?, &Policy::default(), OpenMode::Write)?;
    Writer::of(env, chain, &Durability::FlushOnly)
}
