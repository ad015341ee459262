//! Where a copied disk goes: a file that gets its name when it is whole and durable.

use std::path::Path;

use uuid::Uuid;

use super::writer::Writer;
use crate::chain::{Chain, Policy, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Draft, Image, Keep, Spec, write_new};
use crate::point;
use crate::storage::{Access, Env, File, Lock};
use crate::units::{SECTOR, SectorRange};

/// A new file that is being filled. Dropped before [`Sink::finish`] it vanishes.
pub(super) struct Sink<'a> {
    draft: Draft<'a>,
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
    Image(&'a Spec, Uuid),
}

impl<'a> Sink<'a> {
    /// Begins a file that will be called `path`; with `replace` instead of a file of that name.
    ///
    /// # Errors
    /// `Refused` where the name exists (or, with `replace`, is no regular file); `Busy` where the file to be replaced is
    /// in use; else as `image::create`.
    pub(super) fn new(env: &'a dyn Env, path: &Path, make: &Make<'_>, replace: bool) -> Result<Sink<'a>> {
        let (asked, mut path, mut old) = (path.to_path_buf(), path.to_path_buf(), None);
        match env.canonical(&path) {
            Ok(found) if replace => {
                // Locked until it is replaced: a daemon that opened it meanwhile would go on with a file without a name.
                let file = env.open(&found, Access::Write)?;
                file.lock(Lock::Exclusive)?;
                old = Some(file);
                path = found; // the file a link leads to is replaced, not the link
            }
            Ok(_) => {
                let what = "it exists already; give --force to replace it";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            Err(_) => {}
        }
        let draft = Draft::begin(env, &asked, &path)?;
        let form = match make {
            Make::Raw(len) => draft.file().set_len(*len).map(|()| Form::Raw(draft.file().clone(), *len)),
            Make::Image(spec, uuid) => image(env, draft.file(), spec, *uuid),
        };
        let form = form.map_err(|e| draft.blame(e))?;
        Ok(Sink { draft, replace, _old: old, form })
    }

    /// Writes a run. Ranges ascend or not, as the caller likes.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        self.write(range, bytes).map_err(|e| self.draft.blame(e))
    }

    fn write(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        point::reached("convert.run-copied");
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
        self.settle().map_err(|e| self.draft.blame(e))
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

/// Writes an empty image into the file of a draft, and opens it for writing.
fn image<'a>(env: &'a dyn Env, file: &File, spec: &Spec, uuid: Uuid) -> Result<Form<'a>> {
    write_new(file, env, uuid, spec)?;
    file.lock(Lock::Exclusive)?;
    let chain = Chain::of(env, Image::open(file.clone())?, &Policy::default(), Use::Write)?;
    Ok(Form::Image(Box::new(Writer::of(env, chain, &Keep::Nothing)?)))
}
