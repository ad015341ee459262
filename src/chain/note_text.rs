//! The text of a note. A note is a small file in the folder of an image. It records an unfinished operation, such as a
//! merge or a snapshot. A note consists of lines. Its last line is a checksum of the lines above, so that damage is
//! detected.

use std::fmt::Write;

use crate::error::Result;
use crate::storage::File;

/// Maximum size of a note in bytes. A note names few images, and a path has at most 4096 bytes.
const MAX_NOTE_BYTES: u64 = 2 << 20;

/// Appends the line with the checksum to the lines of a note.
pub(super) fn append_checksum(mut lines: String) -> String {
    let sum = checksum(&lines);
    writeln!(lines, "sum {sum:016x}").expect("writing to a string cannot fail");
    lines
}

/// Returns the lines of a note above its checksum; `None` if the checksum is missing or wrong.
pub(super) fn verify_checksum(text: &str) -> Option<&str> {
    let end = text.strip_suffix('\n')?.rfind('\n')? + 1;
    let (summed, last) = text.split_at(end);
    (last.trim_end().strip_prefix("sum ")? == format!("{:016x}", checksum(summed))).then_some(summed)
}

/// Reads the text of a note. Returns `None` if the file is not UTF-8. Reads at most 2 MiB, so a larger file has no
/// valid checksum.
///
/// # Errors
/// `Io`.
pub(super) fn read_note(file: &File) -> Result<Option<String>> {
    let len = file.stat()?.len.min(MAX_NOTE_BYTES);
    let mut bytes = vec![0; usize::try_from(len).expect("2 MiB at most")];
    file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8(bytes).ok())
}

/// FNV-1a. It detects damage, not manipulation.
fn checksum(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}
