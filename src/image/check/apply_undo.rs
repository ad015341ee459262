//! Undoes a repair: restores the image byte by byte from the undo file that the repair left (`undo_file.rs`).
//!
//! ```text
//!   1  verify     the undo file belongs to the image, and the image is as the repair left it
//!   2  begin      state 2, durable: from now on, repeating the call completes the undo
//!   3  end        restore the old length and the end of the file, with any trailing footer    sync
//!   4  middle     restore pointers and data                                                   sync
//!   5  front      restore the footer's copy at the start                                      sync
//!   6  length     cut the file to its old length, if the repair made it longer                sync
//!   7  finish     state 3, durable
//! ```
//!
//! The image has a valid footer before and after the repair (in a padded fixed image, before the padding). The trailing
//! footer is restored before the copy at the start is replaced. A call that completes an interrupted undo accepts each
//! saved sector only if its contents are those from before or from after the repair.

use super::undo_file::{UndoHeader, UndoState};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::image::identity::ImageIdentity;
use crate::image::journal_id::table_sum;
use crate::image::open::Image;
use crate::storage::File;
use crate::units::{SECTOR, SECTOR_BYTES};

/// Bytes per comparison and write, and maximum length of a piece.
const CHUNK: u64 = 64 << 10;
/// Length of a piece's head in bytes.
const PIECE_HEAD: usize = 16;

/// Undoes the repair of the image in `file` with the undo file `undo`. Both files are locked exclusively.
///
/// # Errors
/// - `Invalid` if `undo` is not an undo file, or if the metadata of the image cannot be read. Nothing was changed.
/// - `Refused` if the undo file belongs to another image, the image was changed since, or the repair was not finished
///   or is undone already. Nothing was changed.
/// - `Io`, `NoSpace`: repeating the call completes the undo.
pub fn undo_repair(file: &File, undo: &File) -> Result<()> {
    let invalid =
        || Error::new(ErrorKind::Invalid, "not an undo file of this version of diffdisk").at_path(undo.path());
    let refused = |why: &str| Err(Error::new(ErrorKind::Refused, why).at_path(undo.path()));
    let mut bytes = [0; SECTOR_BYTES];
    let len = undo.stat()?.len;
    if len < SECTOR {
        return Err(invalid());
    }
    undo.read_at(&mut bytes, 0)?;
    let head = UndoHeader::decode(&bytes).ok_or_else(invalid)?;
    if !(SECTOR <= head.before && head.before <= head.after && head.after <= len) {
        return Err(invalid());
    }
    let pieces = |from, to| read_pieces(undo, from, to)?.ok_or_else(invalid);
    let (before, mut after) = (pieces(SECTOR, head.before)?, pieces(head.before, head.after)?);
    after.sort_unstable_by_key(|piece| piece.offset);
    match head.state {
        UndoState::Repairing => {
            return refused("the repair was not finished. Run `check --repair` again, and undo that repair");
        }
        UndoState::Undone => return refused("the undo file was applied already"),
        UndoState::Repaired => {
            if ImageIdentity::peek(file)?.map(|glance| glance.uuid) != Some(head.uuid) {
                return refused("the undo file belongs to another image");
            }
            let same = file.stat()?.len == head.len_after
                && table_sum(&Image::inspect(file.clone())?) == head.table_sum
                && is_unchanged(file, undo, &before, &after, false)?;
            if !same {
                return refused("the image was changed since the repair");
            }
        }
        UndoState::Undoing if !is_unchanged(file, undo, &before, &after, true)? => {
            return refused("the image was changed since the undo was interrupted");
        }
        UndoState::Undoing => {}
    }
    UndoHeader { state: UndoState::Undoing, ..head.clone() }.write(undo)?;
    failpoint::reached("undo.begun");
    apply(file, undo, &head, &before)?;
    UndoHeader { state: UndoState::Undone, ..head }.write(undo)?;
    failpoint::reached("undo.done");
    Ok(())
}

/// Restores the image: steps 3 to 6.
fn apply(file: &File, undo: &File, head: &UndoHeader, before: &[UndoPiece]) -> Result<()> {
    let end = head.len_after.saturating_sub(SECTOR);
    let groups: [fn(u64, u64) -> bool; 3] =
        [|at, end| at >= end, |at, end| at < end && at >= SECTOR, |at, end| at < end && at < SECTOR];
    if file.stat()?.len < head.len {
        file.set_len(head.len)?;
    }
    for group in groups {
        // Pieces are written back in reverse order: if a range was replaced twice, its first piece has the original
        // contents.
        for piece in before.iter().rev().filter(|piece| group(piece.offset, end)) {
            piece.each_chunk(undo, |at, bytes| file.write_at(bytes, at))?;
        }
        file.sync()?;
        failpoint::reached("undo.group-written");
    }
    if file.stat()?.len != head.len {
        file.set_len(head.len)?;
        file.sync()?;
        failpoint::reached("undo.length-restored");
    }
    Ok(())
}

/// Returns whether each saved sector of the image is as the repair left it or, with `or_before`, as it was before the
/// repair.
fn is_unchanged(file: &File, undo: &File, before: &[UndoPiece], after: &[UndoPiece], or_before: bool) -> Result<bool> {
    let mut known = true;
    for piece in before {
        piece.each_chunk(undo, |at, old| {
            let mut now = vec![0; old.len()];
            let there = usize::try_from(file.stat()?.len.saturating_sub(at)).unwrap_or(usize::MAX).min(now.len());
            if there > 0 {
                file.read_at(&mut now[..there], at)?;
            }
            let new = content_after_repair(undo, after, at, old.len())?;
            let sectors = (0u64..).zip(now.chunks(SECTOR_BYTES).zip(new.chunks(SECTOR_BYTES)));
            for (number, (now, new)) in sectors {
                known &= now == new || (or_before && is_in_pieces(undo, before, at + number * SECTOR, now)?);
            }
            Ok(())
        })?;
    }
    Ok(known)
}

/// Returns whether a piece from before the repair has the bytes `now` at byte `at` of the image.
fn is_in_pieces(undo: &File, before: &[UndoPiece], at: u64, now: &[u8]) -> Result<bool> {
    let (mut bytes, end) = (vec![0; now.len()], at + now.len() as u64);
    for piece in before.iter().filter(|piece| piece.offset <= at && end <= piece.offset + piece.len) {
        undo.read_at(&mut bytes, piece.at + (at - piece.offset))?;
        if bytes == now {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Reads the bytes that the repair left in a range of the image. Bytes that no piece covers are zeros.
fn content_after_repair(undo: &File, after: &[UndoPiece], at: u64, len: usize) -> Result<Vec<u8>> {
    let (mut bytes, end) = (vec![0; len], at + len as u64);
    // Pieces are at most a chunk long.
    let first = after.partition_point(|piece| piece.offset + CHUNK <= at);
    for piece in after[first..].iter().take_while(|piece| piece.offset < end) {
        let (from, to) = (piece.offset.max(at), (piece.offset + piece.len).min(end));
        if from < to {
            let place = |offset: u64| usize::try_from(offset - at).expect("inside the chunk");
            undo.read_at(&mut bytes[place(from)..place(to)], piece.at + (from - piece.offset))?;
        }
    }
    Ok(bytes)
}

/// The location of a piece's bytes: at `offset` in the image, at `at` in the undo file.
#[derive(Clone, Copy, Debug)]
struct UndoPiece {
    offset: u64,
    len: u64,
    at: u64,
}

impl UndoPiece {
    /// Reads the piece and passes its bytes to `f` with their offset in the image.
    fn each_chunk(&self, undo: &File, mut f: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("a chunk")];
        undo.read_at(&mut bytes, self.at)?;
        f(self.offset, &bytes)
    }
}

/// Parses the pieces in a range of an undo file; `None` if the bytes are not pieces. The file's length limits their
/// number.
fn read_pieces(undo: &File, from: u64, to: u64) -> Result<Option<Vec<UndoPiece>>> {
    let (mut all, mut at) = (Vec::new(), from);
    while at < to {
        let mut head = [0; PIECE_HEAD];
        if to - at < head.len() as u64 {
            return Ok(None);
        }
        undo.read_at(&mut head, at)?;
        let number = |at: usize| u64::from_be_bytes(*head[at..].first_chunk().expect("two numbers"));
        let piece = UndoPiece { offset: number(0), len: number(8), at: at + head.len() as u64 };
        let inside = piece.len <= CHUNK && piece.len <= to - piece.at && piece.offset <= i64::MAX as u64 - CHUNK;
        if !inside {
            return Ok(None);
        }
        at = piece.at + piece.len;
        all.push(piece);
    }
    Ok(Some(all))
}
