//! The record of a merge: what is being done, and how far it has come. It outlives the process and the host.
//!
//! It lies beside CHILD as `.<uuid of CHILD>.merge`: lines of ASCII, ended by a sum.
//!
//! ```text
//! diffdisk merge 3
//! layer <uuid> <state> <path>         CHILD first, then what lies between
//! ancestor <uuid> <state> <path>
//! copied nothing                      no byte of the ancestor's disk has changed
//!      | <sector>                     all before this sector is copied, and some behind it may be
//!      | all                          the ancestor shows CHILD's disk
//! abandoned                           only if the merge was given up; it may still be finished
//! sum <FNV-1a of all lines above, 16 hexadecimal digits>
//! ```
//!
//! A state identifies one content of a file without reading it: `<inode> <bytes> <last change, seconds.nanoseconds>`.
//! (No device: it may have another number after the next boot.)
//!
//! Paths begin in the record's folder, so that the folder may move; bytes that are not printable ASCII are written `%XX`.
//! A record is replaced as a whole: temporary name, sync, rename, sync of the folder.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::file_stamp::FileStamp;
use super::paths::{percent_decode, percent_encode};
use crate::storage::ModifiedTime;

const FORMAT_LINE: &str = "diffdisk merge 3";

/// An image that is folded into another one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergedLayer {
    /// Its identity.
    pub uuid: Uuid,
    /// Its state before anything of it was copied.
    pub stamp: FileStamp,
    /// From the note's folder.
    pub path: PathBuf,
}

/// How far a merge has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied {
    /// No byte of the ancestor's disk has changed.
    Nothing,
    /// All before this sector is in the ancestor, durably; some behind it may be.
    Before(u64),
    /// All is, and the ancestor is complete.
    All,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeRecord {
    /// Where the note lies: CHILD's folder.
    pub folder: PathBuf,
    /// CHILD and what lies between, youngest first.
    pub layers: Vec<MergedLayer>,
    /// The identity of what receives.
    pub ancestor: Uuid,
    /// The ancestor's state when all that `copied` says was in it.
    pub ancestor_stamp: FileStamp,
    /// From the note's folder.
    pub ancestor_path: PathBuf,
    /// How far it has come.
    pub copied: Copied,
    /// Whether it was given up after something was copied. It may still be finished.
    pub abandoned: bool,
}

impl MergeRecord {
    /// The path of CHILD.
    pub fn child(&self) -> PathBuf {
        self.folder.join(&self.layers[0].path)
    }

    /// The command that finishes it.
    pub fn command(&self) -> String {
        let into = match self.layers.len() {
            1 => String::new(),
            _ => format!(" --into {}", self.folder.join(&self.ancestor_path).display()),
        };
        format!("diffdisk merge {}{into}", self.child().display())
    }

    /// The text of the record.
    pub(super) fn encode(&self) -> String {
        let mut text = format!("{FORMAT_LINE}\n");
        for layer in &self.layers {
            text += &encode_image_line("layer", layer.uuid, layer.stamp, &layer.path);
        }
        text += &encode_image_line("ancestor", self.ancestor, self.ancestor_stamp, &self.ancestor_path);
        match self.copied {
            Copied::Nothing => writeln!(text, "copied nothing"),
            Copied::Before(sector) => writeln!(text, "copied {sector}"),
            Copied::All => writeln!(text, "copied all"),
        }
        .expect("a string takes all");
        if self.abandoned {
            text.push_str("abandoned\n");
        }
        let sum = checksum(&text);
        writeln!(text, "sum {sum:016x}").expect("a string takes all");
        text
    }

    /// What a note says; `None` where it is broken.
    pub(super) fn decode(text: &str, folder: &Path) -> Option<MergeRecord> {
        let end = text.strip_suffix('\n')?.rfind('\n')? + 1;
        let (said, last) = text.split_at(end);
        if last.trim_end().strip_prefix("sum ")? != format!("{:016x}", checksum(said)) {
            return None;
        }
        let mut lines = said.lines().filter(|line| !line.is_empty());
        if lines.next()? != FORMAT_LINE {
            return None;
        }
        let (mut layers, mut ancestor, mut copied, mut abandoned) = (Vec::new(), None, None, false);
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "abandoned" => abandoned = true,
                "layer" => {
                    let (uuid, seen, path) = decode_image_line(rest)?;
                    layers.push(MergedLayer { uuid, stamp: seen, path });
                }
                "ancestor" => ancestor = Some(decode_image_line(rest)?),
                "copied" if rest == "nothing" => copied = Some(Copied::Nothing),
                "copied" if rest == "all" => copied = Some(Copied::All),
                "copied" => copied = Some(Copied::Before(rest.parse().ok()?)),
                _ => return None,
            }
        }
        let (ancestor, ancestor_seen, ancestor_path) = ancestor?;
        let folder = folder.to_path_buf();
        let copied = copied?;
        let record =
            MergeRecord { folder, layers, ancestor, ancestor_stamp: ancestor_seen, ancestor_path, copied, abandoned };
        (!record.layers.is_empty()).then_some(record)
    }
}

/// The line of a file.
fn encode_image_line(word: &str, uuid: Uuid, seen: FileStamp, path: &Path) -> String {
    let FileStamp { ino, len, modified: ModifiedTime { seconds, nanos } } = seen;
    format!("{word} {uuid} {ino} {len} {seconds}.{nanos:09} {}\n", percent_encode(path))
}

/// What such a line says behind its word.
fn decode_image_line(text: &str) -> Option<(Uuid, FileStamp, PathBuf)> {
    let mut words = text.splitn(5, ' ');
    let (uuid, ino, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let (seconds, nanos) = words.next()?.split_once('.')?;
    let modified = ModifiedTime { seconds: seconds.parse().ok()?, nanos: nanos.parse().ok()? };
    Some((uuid, FileStamp { ino, len, modified }, percent_decode(words.next()?)?))
}

/// FNV-1a: it is accidents that are to be found.
fn checksum(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}
