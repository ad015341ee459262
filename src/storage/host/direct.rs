//! O_DIRECT: its alignment rules, and reads and writes through aligned bounce buffers.

use std::io;

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use super::file::HostFile;
use crate::error::Result;
use crate::storage::payload::{BUFFER_ALIGN, Buffer};
use crate::storage::types::DirectRules;
use crate::units::SECTOR;

/// Size of a bounce buffer.
pub(super) const BOUNCE_BYTES: usize = 1 << 20;

impl HostFile {
    /// Reads the aligned range that contains the requested one, in pieces, through a bounce buffer.
    #[allow(clippy::cast_possible_truncation, reason = "a remainder of the unit, at most a sector")]
    pub(super) fn read_direct(&self, into: &mut [u8], offset: u64, unit: u64) -> io::Result<()> {
        let end = offset.checked_add(into.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        let room = usize::try_from((end - offset / unit * unit).next_multiple_of(unit))
            .unwrap_or(BOUNCE_BYTES)
            .min(BOUNCE_BYTES);
        let mut bounce = Buffer::zeroed(room);
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let start = at / unit * unit;
            let skip = (at % unit) as usize;
            let request = (skip + into.len() - done).next_multiple_of(unit as usize).min(room);
            let got = self.read_up_to(&mut bounce[..request], start)?;
            let n = (into.len() - done).min(request - skip);
            if got < skip + n {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into[done..done + n].copy_from_slice(&bounce[skip..skip + n]);
            done += n;
        }
        Ok(())
    }

    pub(super) fn write_direct(&self, from: &[u8], offset: u64, unit: u64) -> io::Result<()> {
        if !offset.is_multiple_of(unit) || !(from.len() as u64).is_multiple_of(unit) {
            // Reading and rewriting the rest of the unit could overwrite a concurrent write to it.
            let what = format!("a direct write must begin and end on a multiple of {unit} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut bounce = Buffer::zeroed(from.len().min(BOUNCE_BYTES));
        for (i, piece) in from.chunks(BOUNCE_BYTES).enumerate() {
            bounce[..piece.len()].copy_from_slice(piece);
            self.write_buffered(&bounce[..piece.len()], offset + (i * BOUNCE_BYTES) as u64)?;
        }
        Ok(())
    }

    /// Returns whether O_DIRECT is enabled.
    pub(in crate::storage) fn is_direct(&self) -> bool {
        self.direct.get().is_some()
    }

    pub(super) fn set_direct(&self) -> Result<Option<DirectRules>> {
        if let Some(rules) = self.direct.get() {
            return Ok(Some(*rules));
        }
        let s = match rustix::fs::statx(self, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(s) => s,
            Err(Errno::NOSYS) => return Ok(None),
            Err(e) => return Err(self.fail("cannot read the alignment rules of O_DIRECT", e)),
        };
        let rules = DirectRules { memory: s.stx_dio_mem_align as usize, offset: u64::from(s.stx_dio_offset_align) };
        let reported = s.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let sane = rules.memory.is_power_of_two() && rules.offset.is_power_of_two();
        if !reported || !sane || rules.offset > SECTOR || rules.memory > BUFFER_ALIGN {
            return Ok(None);
        }
        let flags = rustix::fs::fcntl_getfl(self).map_err(|e| self.fail("cannot read the flags", e))?;
        match rustix::fs::fcntl_setfl(self, flags | OFlags::DIRECT) {
            Ok(()) => Ok(Some(*self.direct.get_or_init(|| rules))),
            Err(Errno::INVAL) => Ok(None),
            Err(e) => Err(self.fail("cannot enable O_DIRECT", e)),
        }
    }
}
