//! Identifies files without a valid footer at their start or end. An open uses the result only for its error, since the
//! guest of a raw disk can write the identified bytes. `repair` removes the padding after a fixed disk.

use crate::error::Result;
use crate::format::footer::FOOTER_BYTES;
use crate::format::image_format::PROBE_BYTES;
use crate::format::{Defect, DiskType, Footer, ImageFormat};
use crate::storage::File;
use crate::units::{SECTOR, SECTOR_BYTES};

/// Maximum number of zeros after a footer that are searched.
const MAX_PADDING: u64 = 8 << 20;
/// Bytes per read.
const CHUNK: u64 = 64 << 10;

/// Identifies a file of `len` bytes without a footer as a padded fixed disk or an image of another format, if it is
/// one.
///
/// # Errors
/// `Io`.
pub(super) fn diagnose(file: &File, len: u64) -> Result<Option<Defect>> {
    let mut head = [0; PROBE_BYTES];
    let there = head.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    file.read_at(&mut head[..there], 0)?;
    match ImageFormat::probe(&head[..there]).filter(|format| *format != ImageFormat::Vhd) {
        Some(format) => Ok(Some(Defect::OtherFormat { format })),
        None => {
            let at = find_padded_footer(file, len)?.map(|footer| footer.current_size);
            Ok(at.map(|at| Defect::FixedPadded { at, padding: len - at - FOOTER_BYTES }))
        }
    }
}

/// Finds the footer of a fixed disk that is padded with zeros: a valid footer whose offset equals the disk's size,
/// followed by zeros only.
///
/// # Errors
/// `Io`.
pub(super) fn find_padded_footer(file: &File, len: u64) -> Result<Option<Footer>> {
    let mut end = len;
    let last = loop {
        let start = end.saturating_sub(CHUNK);
        if end == 0 || len - end >= MAX_PADDING {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(end - start).expect("a chunk")];
        file.read_at(&mut bytes, start)?;
        if let Some(at) = bytes.iter().rposition(|byte| *byte != 0) {
            break start + at as u64;
        }
        end = start;
    };
    let at = last / SECTOR * SECTOR;
    if at + FOOTER_BYTES > len {
        return Ok(None);
    }
    let mut bytes = [0; SECTOR_BYTES];
    file.read_at(&mut bytes, at)?;
    let footer = Footer::decode(&bytes).ok();
    Ok(footer.filter(|footer| footer.disk_type == DiskType::Fixed && footer.current_size == at))
}
