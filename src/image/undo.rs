//! What a repair replaces, kept beside the image, so that nothing is lost by it.
//!
//! The file is called `IMAGE.repair-UUID.undo`. What is going to be replaced is durable in it before it is replaced. All
//! numbers are big-endian, 64 bits, in bytes:
//!
//! ```text
//!   0   "diffdisk undo 1\n"                          512   offset in the image   16 bytes
//!  16   length of the image before                         length                of head
//!  24   where the pieces end in this file                  the bytes that were there
//!  32   the image's UUID, 16 bytes                         the next piece ...
//!  48   zeros to 512
//! ```
//!
//! The first 512 bytes are written after a sync of the pieces that they count in. Where they are zeros, the repair ended
//! before it changed anything. To undo a repair: give the image the length that it had, then write the pieces back, the
//! last one first. What was cut off and is in no piece was zero.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::draft::Draft;
use super::holes::{is_zero, next_data};
use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Env, File};
use crate::units::{SECTOR, SECTOR_BYTES};

const MAGIC: [u8; 16] = *b"diffdisk undo 1\n";
/// Bytes of the image that are looked at, and kept, together.
const CHUNK: usize = 64 << 10;

/// The file that keeps. Dropped before the first [`Undo::seal`] it vanishes.
pub(super) struct Undo<'a> {
    image: File,
    uuid: uuid::Uuid,
    /// Length of the image before the repair.
    len: u64,
    draft: Draft<'a>,
    path: PathBuf,
    end: u64,
    sealed: bool,
}

impl<'a> Undo<'a> {
    /// Begins the file for a repair of an image.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn begin(env: &'a dyn Env, image: &Image) -> Result<Undo<'a>> {
        let path = path_of(image.file().path(), env.uuid())?;
        let (uuid, image) = (image.uuid(), image.file().clone());
        let len = image.stat()?.len;
        let draft = Draft::begin(env, &path, &path)?;
        Ok(Undo { image, uuid, len, draft, path, end: SECTOR, sealed: false })
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps a range of the image that is going to be replaced; all of it.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn keep(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.image.stat()?.len);
        let mut at = range.start;
        while at < end {
            let len = usize::try_from((end - at).min(CHUNK as u64)).expect("a chunk");
            let mut bytes = vec![0; len];
            self.image.read_at(&mut bytes, at)?;
            self.record(at, &bytes)?;
            at += len as u64;
        }
        Ok(())
    }

    /// Keeps a range of the image that is going to be zeros, or cut off: of it all that is not zero.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn keep_data(&mut self, range: Range<u64>) -> Result<()> {
        let mut rest = range.start..range.end.min(self.image.stat()?.len);
        let mut bytes = vec![0; CHUNK];
        while let Some(found) = next_data(&self.image, rest.clone())? {
            let len = usize::try_from((found.end - found.start).min(CHUNK as u64)).expect("a chunk");
            let bytes = &mut bytes[..len];
            self.image.read_at(bytes, found.start)?;
            for (number, piece) in (0u64..).zip(bytes.chunks(4096)).filter(|(_, piece)| !is_zero(piece)) {
                self.record(found.start + number * 4096, piece)?;
            }
            rest.start = found.start + len as u64;
        }
        Ok(())
    }

    fn record(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let record = [&offset.to_be_bytes(), &len.to_be_bytes()[..], bytes].concat();
        self.draft.file().write_at(&record, self.end).map_err(|e| self.draft.blame(e))?;
        self.end += record.len() as u64;
        Ok(())
    }

    /// Makes durable what it keeps, and its name: now that may be replaced.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn seal(&mut self) -> Result<()> {
        self.draft.file().sync()?;
        let mut head = [0; SECTOR_BYTES];
        head[..16].copy_from_slice(&MAGIC);
        head[16..24].copy_from_slice(&self.len.to_be_bytes());
        head[24..32].copy_from_slice(&self.end.to_be_bytes());
        head[32..48].copy_from_slice(self.uuid.as_bytes());
        self.draft.file().write_at(&head, 0)?;
        self.draft.file().sync()?;
        if !self.sealed {
            self.draft.publish()?;
        }
        self.sealed = true;
        Ok(())
    }
}

fn path_of(image: &Path, uuid: uuid::Uuid) -> Result<PathBuf> {
    let name = image.file_name().ok_or_else(|| Error::new(ErrorKind::Refused, "not a file name").at_path(image))?;
    let mut name = name.to_os_string();
    name.push(format!(".repair-{}.undo", uuid.simple()));
    Ok(image.with_file_name(name))
}
