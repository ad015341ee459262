//! Where a copied disk goes: a file under another name until it is whole and durable.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::writer::Writer;
use crate::chain::{Chain, Policy, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Keep, Spec, file_name, folder_of, fresh_name, publish, write_new};
use crate::storage::{Access, Env, File, Folder, Lock};
use crate::units::{SECTOR, SectorRange};

/// A new file that is being filled. Dropped before [`Sink::finish`] it vanishes.
pub(super) struct Sink<'a> {
    /// Where it is made, and will be named.
    folder: Folder,
    fresh: OsString,
    name: OsString,
    /// The path under which it is made, and the one that was asked for.
    made: PathBuf,
    asked: PathBuf,
    replace: bool,
    /// What is to be replaced, with its lock.
    _old: Option<File>,
    form: Form<'a>,
    named: bool,
}

enum Form<'a> {
    Raw(File, u64),
    Image(Box<Writer<'a>>),
}

/// What to make.
pub(super) enum Make<'a> {
    /// A raw file of so many bytes.
    Raw(u64),
    /// An image without parent.
    Image(&'a Spec),
}

impl<'a> Sink<'a> {
    /// Begins a file that will be called `path`; with `replace` instead of a file of that name.
    ///
    /// # Errors
    /// `Refused` where the name exists (or, with `replace`, is no regular file); `Busy` where the file to be replaced is
    /// in use; else as `image::create`.
    pub(super) fn new(env: &'a dyn Env, path: &Path, make: &Make<'_>, replace: bool) -> Result<Sink<'a>> {
        let asked = path.to_path_buf();
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
        let uuid = env.uuid();
        let fresh = fresh_name(Path::new(&name), uuid)?;
        let file = folder.create(&fresh).map_err(|e| e.renamed(&folder.path().join(&fresh), &asked))?;
        let made = file.path().to_path_buf();
        let form = match make {
            Make::Raw(len) => file.set_len(*len).map(|()| Form::Raw(file, *len)),
            Make::Image(spec) => image(env, file, uuid, spec).map(|writer| Form::Image(Box::new(writer))),
        };
        match form {
            Ok(form) => Ok(Sink { folder, fresh, name, made, asked, replace, _old: old, form, named: false }),
            Err(e) => {
                let _ = folder.remove(&fresh);
                Err(e.renamed(&made, &asked))
            }
        }
    }

    /// The failure of a write, under the name that was asked for.
    fn blame(&self, e: Error) -> Error {
        e.renamed(&self.made, &self.asked).at_path(&self.asked)
    }

    /// Writes a run. Ranges ascend or not, as the caller likes.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        self.write(range, bytes).map_err(|e| self.blame(e))
    }

    fn write(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
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
        self.settle().map_err(|e| self.blame(e))
    }

    fn settle(&mut self) -> Result<()> {
        match &mut self.form {
            Form::Raw(file, _) => file.sync()?,
            Form::Image(writer) => {
                writer.commit()?;
                writer.close()?;
            }
        }
        if self.replace {
            self.folder.rename(&self.fresh, &self.folder, &self.name)?;
            self.named = true;
            return self.folder.sync();
        }
        publish(&self.folder, &self.fresh, &self.name)?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        if !self.named
            && let Err(e) = self.folder.remove(&self.fresh)
        {
            log::warn!("{}", e.line());
        }
    }
}

/// Writes a new image into an empty file, and opens it to be filled.
fn image<'a>(env: &'a dyn Env, file: File, uuid: Uuid, spec: &Spec) -> Result<Writer<'a>> {
    write_new(&file, env, uuid, spec)?;
    file.lock(Lock::Exclusive)?;
    Writer::of(env, Chain::of(env, Image::open(file)?, &Policy::default(), Use::Write)?, &Keep::Nothing)
}
