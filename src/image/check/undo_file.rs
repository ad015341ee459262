//! The undo file of a repair: a copy of all that the repair replaces, in the image's folder.
//!
//! Its name is `IMAGE.repair-UUID.undo`. Bytes are durable in the undo file before the repair replaces them in the
//! image. *Old pieces* contain bytes from before the repair, *new pieces* those from after it. All numbers are
//! big-endian, 64 bits, in bytes:
//!
//! ```text
//!   0   "diffdisk undo 2\n"                          512   old pieces, each:
//!  16   length of the image before the repair              offset in the image   16 bytes
//!  24   end of the old pieces in this file                 length                of head
//!  32   the image's UUID, 16 bytes                         the original bytes
//!  48   state
//!  56   length of the image after the repair         then  new pieces of the same form:
//!  64   checksum of the block table after the repair       the new contents of the same ranges,
//!  72   end of the new pieces in this file                 without pieces that are all zeros
//!  80   zeros to 512
//! ```
//!
//! The header (the first 512 bytes) is written after a sync of the pieces that it covers. If the header is zeros, the
//! repair was interrupted before it changed the image. States: 0, repair not finished; 1, repair finished; 2, undo
//! begun; 3, undo finished. To undo a repair (`apply_undo.rs`): restore the image's length, then write the old pieces
//! back, the last one first. Bytes that the repair cut off and that no old piece contains were zero.

use std::ops::Range;
use std::path::PathBuf;

use crate::error::Result;
use crate::image::atomic_file::AtomicFile;
use crate::image::journal_id::table_sum;
use crate::image::open::Image;
use crate::storage::{Env, File};
use crate::storage::{is_zero, next_data};
use crate::units::{SECTOR, SECTOR_BYTES};

pub(super) const MAGIC: [u8; 16] = *b"diffdisk undo 2\n";
/// Bytes of the image per read, and maximum length of a piece.
const CHUNK: usize = 64 << 10;

/// The header of an undo file: its first 512 bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct UndoHeader {
    /// Length of the image before the repair.
    pub(super) len: u64,
    /// Offset in the undo file at which the old pieces end.
    pub(super) before: u64,
    pub(super) uuid: uuid::Uuid,
    pub(super) state: UndoState,
    /// Length of the image after the repair.
    pub(super) len_after: u64,
    /// Checksum of the block table after the repair.
    pub(super) table_sum: u64,
    /// Offset in the undo file at which the new pieces end.
    pub(super) after: u64,
}

/// The progress of a repair and of its undo.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum UndoState {
    Repairing,
    Repaired,
    Undoing,
    Undone,
}

impl UndoHeader {
    /// Decodes a header; `None` if the bytes are not one.
    pub(super) fn decode(bytes: &[u8; SECTOR_BYTES]) -> Option<UndoHeader> {
        let number = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().expect("inside the sector"));
        let state = match number(48) {
            0 => UndoState::Repairing,
            1 => UndoState::Repaired,
            2 => UndoState::Undoing,
            3 => UndoState::Undone,
            _ => return None,
        };
        let uuid = uuid::Uuid::from_bytes(*bytes[32..].first_chunk().expect("inside the sector"));
        let (len, before, after) = (number(16), number(24), number(72));
        let head = UndoHeader { len, before, uuid, state, len_after: number(56), table_sum: number(64), after };
        bytes.starts_with(&MAGIC).then_some(head)
    }

    /// Encodes the header as 512 bytes.
    pub(super) fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[32..48].copy_from_slice(self.uuid.as_bytes());
        let state: u64 = match self.state {
            UndoState::Repairing => 0,
            UndoState::Repaired => 1,
            UndoState::Undoing => 2,
            UndoState::Undone => 3,
        };
        let numbers = [
            (16, self.len),
            (24, self.before),
            (48, state),
            (56, self.len_after),
            (64, self.table_sum),
            (72, self.after),
        ];
        for (at, number) in numbers {
            bytes[at..at + 8].copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// Writes the header to an undo file and syncs the file.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn write(&self, undo: &File) -> Result<()> {
        undo.write_at(&self.encode(), 0)?;
        undo.sync()
    }
}

/// An undo file that a running repair fills. If it is dropped before the first [`UndoFile::seal`], no file remains.
pub(super) struct UndoFile {
    image: File,
    uuid: uuid::Uuid,
    /// Length of the image before the repair.
    len: u64,
    draft: AtomicFile,
    end: u64,
    sealed: bool,
    /// The ranges of the image that are saved in pieces.
    saved: Vec<Range<u64>>,
}

impl UndoFile {
    /// Creates the undo file, still without its name, for a repair of `image`.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn begin(env: &dyn Env, image: &File, uuid: uuid::Uuid) -> Result<UndoFile> {
        let (image, len) = (image.clone(), image.stat()?.len);
        let mut name = image.name().to_os_string();
        name.push(format!(".repair-{}.undo", env.uuid().simple()));
        let folder = image.folder();
        let draft = AtomicFile::begin(env, &folder.path_to(&name), folder.clone(), &name)?;
        Ok(UndoFile { image, uuid, len, draft, end: SECTOR, sealed: false, saved: Vec::new() })
    }

    /// Returns the undo file's path.
    pub(super) fn path(&self) -> PathBuf {
        self.draft.path()
    }

    /// Saves a whole range of the image that the repair is going to replace.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn save(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.image.stat()?.len);
        let mut at = range.start;
        while at < end {
            let len = usize::try_from((end - at).min(CHUNK as u64)).expect("a chunk");
            let mut bytes = vec![0; len];
            self.image.read_at(&mut bytes, at)?;
            self.append(at, &bytes)?;
            self.saved.push(at..at + len as u64);
            at += len as u64;
        }
        Ok(())
    }

    /// Saves the non-zero parts of a range of the image that the repair is going to zero or cut off.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn save_nonzero(&mut self, range: Range<u64>) -> Result<()> {
        let mut rest = range.start..range.end.min(self.image.stat()?.len);
        let mut bytes = vec![0; CHUNK];
        while let Some(found) = next_data(&self.image, rest.clone())? {
            let len = usize::try_from((found.end - found.start).min(CHUNK as u64)).expect("a chunk");
            let bytes = &mut bytes[..len];
            self.image.read_at(bytes, found.start)?;
            for (number, piece) in (0u64..).zip(bytes.chunks(4096)).filter(|(_, piece)| !is_zero(piece)) {
                let at = found.start + number * 4096;
                self.append(at, piece)?;
                self.saved.push(at..at + piece.len() as u64);
            }
            rest.start = found.start + len as u64;
        }
        Ok(())
    }

    fn append(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let record = [&offset.to_be_bytes(), &len.to_be_bytes()[..], bytes].concat();
        self.draft.file().write_at(&record, self.end).map_err(|e| self.draft.with_requested_path(e))?;
        self.end += record.len() as u64;
        Ok(())
    }

    /// Makes the saved pieces and the file's name durable. After that, the repair may replace the saved ranges.
    ///
    /// # Errors
    /// `Io`, `NoSpace`.
    pub(super) fn seal(&mut self) -> Result<()> {
        self.draft.file().sync()?;
        let (len, before, uuid) = (self.len, self.end, self.uuid);
        let head =
            UndoHeader { len, before, uuid, state: UndoState::Repairing, len_after: 0, table_sum: 0, after: before };
        head.write(self.draft.file())?;
        if !self.sealed {
            self.draft.publish()?;
        }
        self.sealed = true;
        Ok(())
    }

    /// Records the repaired image's contents, so that an undo can detect later changes. Returns the undo file's path.
    ///
    /// # Errors
    /// The errors of [`Image::inspect`], and `NoSpace`: the repair is done, but an undo may refuse this undo file.
    pub(super) fn finish(mut self) -> Result<PathBuf> {
        let (before, len_after) = (self.end, self.image.stat()?.len);
        for range in std::mem::take(&mut self.saved) {
            let there = range.end.min(len_after).saturating_sub(range.start);
            if there == 0 {
                continue;
            }
            let mut bytes = vec![0; usize::try_from(there).expect("a chunk")];
            self.image.read_at(&mut bytes, range.start)?;
            if !is_zero(&bytes) {
                self.append(range.start, &bytes)?;
            }
        }
        self.draft.file().sync()?;
        let image = Image::inspect(self.image.clone())?;
        let (uuid, table, after) = (image.uuid(), table_sum(&image), self.end);
        let head =
            UndoHeader { len: self.len, before, uuid, state: UndoState::Repaired, len_after, table_sum: table, after };
        head.write(self.draft.file())?;
        Ok(self.path())
    }
}
