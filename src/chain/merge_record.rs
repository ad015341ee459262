//! The record of a merge: its images and its progress. It survives a crash of the process and of the system.
//!
//! The file of the record is `.<uuid of CHILD>.merge` in the folder of CHILD (`merge_record_file`): lines of ASCII with
//! a checksum at the end.
//!
//! ```text
//! diffdisk merge 3
//! layer <uuid> <stamp> <path>         CHILD first, then the layers between CHILD and the ancestor
//! ancestor <uuid> <stamp> <path>      the receiver
//! copied nothing                      no byte of the ancestor's disk has changed
//!      | <sector>                     all sectors before this one are copied, and some after it may be
//!      | all                          the ancestor has CHILD's disk
//! abandoned                           only if the merge was abandoned; it may still be finished
//! sum <FNV-1a of all lines above, 16 hexadecimal digits>
//! ```
//!
//! A stamp is a [`FileStamp`]: `<inode> <bytes> <last change, seconds.nanoseconds>`. It has no device number, which may
//! change at the next boot.
//!
//! Paths are relative to the record's folder, so that the folder may move. Bytes that are not printable ASCII, and `%`,
//! are escaped as `%XX`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::file_stamp::FileStamp;
use super::note_text::{append_checksum, verify_checksum};
use super::paths::{percent_decode, percent_encode};
use crate::storage::ModifiedTime;

const FORMAT_LINE: &str = "diffdisk merge 3";

/// An image that a merge copies into its receiver.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergedLayer {
    /// The UUID of the image.
    pub uuid: Uuid,
    /// The stamp of its file before the merge.
    pub stamp: FileStamp,
    /// The path relative to the record's folder.
    pub path: PathBuf,
}

/// The progress of a merge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied {
    /// No byte of the ancestor's disk has changed.
    Nothing,
    /// All sectors before this one are durable in the ancestor; some after it may be.
    Before(u64),
    /// All sectors are durable in the ancestor.
    All,
}

/// The record of an unfinished merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeRecord {
    /// The folder of the record and of CHILD.
    pub folder: PathBuf,
    /// CHILD and the layers between CHILD and the ancestor, youngest first.
    pub layers: Vec<MergedLayer>,
    /// The UUID of the ancestor that receives the data.
    pub ancestor: Uuid,
    /// The stamp that the ancestor's file had when the progress `copied` was recorded.
    pub ancestor_stamp: FileStamp,
    /// The path of the ancestor relative to the record's folder.
    pub ancestor_path: PathBuf,
    /// The progress.
    pub copied: Copied,
    /// Whether the merge was abandoned after data was copied. It may still be finished.
    pub abandoned: bool,
}

impl MergeRecord {
    /// The path of CHILD.
    pub fn child(&self) -> PathBuf {
        self.folder.join(&self.layers[0].path)
    }

    /// The command that finishes the merge.
    pub fn command(&self) -> String {
        let into = match self.layers.len() {
            1 => String::new(),
            _ => format!(" --into {}", self.folder.join(&self.ancestor_path).display()),
        };
        format!("diffdisk merge {}{into}", self.child().display())
    }

    /// Encodes the record as text.
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
        .expect("writing to a string cannot fail");
        if self.abandoned {
            text.push_str("abandoned\n");
        }
        append_checksum(text)
    }

    /// Decodes the text of a record in `folder`; `None` if it is damaged.
    pub(super) fn decode(text: &str, folder: &Path) -> Option<MergeRecord> {
        let mut lines = verify_checksum(text)?.lines().filter(|line| !line.is_empty());
        if lines.next()? != FORMAT_LINE {
            return None;
        }
        let (mut layers, mut ancestor, mut copied, mut abandoned) = (Vec::new(), None, None, false);
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "abandoned" => abandoned = true,
                "layer" => {
                    let (uuid, stamp, path) = decode_image_line(rest)?;
                    layers.push(MergedLayer { uuid, stamp, path });
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

/// Encodes the line of an image.
fn encode_image_line(word: &str, uuid: Uuid, stamp: FileStamp, path: &Path) -> String {
    let FileStamp { ino, len, modified: ModifiedTime { seconds, nanos } } = stamp;
    format!("{word} {uuid} {ino} {len} {seconds}.{nanos:09} {}\n", percent_encode(path))
}

/// Decodes the line of an image after its first word.
fn decode_image_line(text: &str) -> Option<(Uuid, FileStamp, PathBuf)> {
    let mut words = text.splitn(5, ' ');
    let (uuid, ino, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let (seconds, nanos) = words.next()?.split_once('.')?;
    let modified = ModifiedTime { seconds: seconds.parse().ok()?, nanos: nanos.parse().ok()? };
    Some((uuid, FileStamp { ino, len, modified }, percent_decode(words.next()?)?))
}
