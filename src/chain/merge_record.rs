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

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::file_stamp::FileStamp;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::image::folder_of;
use crate::storage::{Access, Env, Folder, ModifiedTime};

const FORMAT_LINE: &str = "diffdisk merge 3";
/// Bytes of a record at most: a chain has few layers, and a path at most 4096 bytes.
const MAX_BYTES: u64 = 2 << 20;

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

/// What is found of an earlier start of a merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExistingRecord {
    /// Nothing: it was not begun.
    None,
    /// Its record.
    Record(Box<MergeRecord>),
    /// A record at this path that cannot be read.
    Unreadable(PathBuf),
}

impl MergeRecord {
    /// Finds the record of a merge of the image at `child` that was begun and not finished; `present` is the image
    /// that has the name now.
    ///
    /// # Errors
    /// - `Refused` if another image has the name than when it was begun
    /// - `Invalid` for a record that cannot be read while no image has the name
    /// - `Io`
    pub fn find(env: &dyn Env, child: &Path, present: Option<Uuid>) -> Result<ExistingRecord> {
        let folder = env.folder(folder_of(child))?.absolute()?;
        let Some(name) = child.file_name() else { return Ok(ExistingRecord::None) };
        for record_name in folder.list()? {
            let Some(uuid) = child_uuid_in_name(&record_name) else { continue };
            let path = folder.path().join(&record_name);
            let record = match (MergeRecord::load(&folder, &record_name), present) {
                (Ok(record), _) => record,
                (Err(e), Some(present)) if e.kind() == ErrorKind::Invalid && present == uuid => {
                    return Ok(ExistingRecord::Unreadable(path));
                }
                (Err(e), Some(_)) if e.kind() == ErrorKind::Invalid => {
                    log::warn!("{}", e.line());
                    continue;
                }
                (Err(e), _) => return Err(e),
            };
            let is_named = record.layers[0].path.as_os_str() == name;
            match present {
                Some(present) if present == uuid => return Ok(ExistingRecord::Record(Box::new(record))),
                None if is_named => return Ok(ExistingRecord::Record(Box::new(record))),
                Some(_) if is_named => {
                    let what = format!(
                        "another image of this name was being merged ({}): give this one another name and run the same \
                         command to finish that merge",
                        path.display()
                    );
                    return Err(Error::new(ErrorKind::Refused, what).at_path(child));
                }
                _ => {}
            }
        }
        Ok(ExistingRecord::None)
    }

    /// Returns the records in a folder that can be read. What may not be read, and a folder that cannot be listed, is passed
    /// over.
    ///
    /// # Errors
    /// `Io`.
    pub fn all_in(folder: &Folder) -> Result<Vec<MergeRecord>> {
        let mut records = Vec::new();
        for name in skip_inaccessible(folder.list())?.unwrap_or_default() {
            if child_uuid_in_name(&name).is_none() {
                continue;
            }
            match skip_inaccessible(MergeRecord::load(folder, &name)) {
                Err(e) if e.kind() == ErrorKind::Invalid => log::debug!("{}", e.line()),
                loaded => records.extend(loaded?),
            }
        }
        Ok(records)
    }

    /// Returns the UUID in the path of a record: that of the image that is folded.
    pub fn child_uuid_of(path: &Path) -> Option<Uuid> {
        child_uuid_in_name(path.file_name()?)
    }

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

    fn load(folder: &Folder, name: &OsStr) -> Result<MergeRecord> {
        let file = folder.open(name, Access::Read)?;
        let len = file.stat()?.len;
        let mut bytes = vec![0; usize::try_from(len.min(MAX_BYTES)).expect("2 MiB at most")];
        file.read_at(&mut bytes, 0)?;
        let read = std::str::from_utf8(&bytes).ok().and_then(|text| decode(text, folder.path()));
        read.filter(|record| child_uuid_in_name(name) == Some(record.layers[0].uuid)).ok_or_else(|| {
            let what =
                "the record of a merge cannot be read; `diffdisk merge CHILD --abandon` removes it if CHILD is gone";
            Error::new(ErrorKind::Invalid, what).at_path(file.path())
        })
    }

    /// Its own path.
    pub fn path(&self) -> PathBuf {
        self.folder.join(self.name())
    }

    fn name(&self) -> OsString {
        format!(".{}.merge", self.layers[0].uuid).into()
    }

    fn temporary_name(&self) -> OsString {
        format!(".{}.merge.new", self.layers[0].uuid).into()
    }

    /// Says it durably, in the place of what it said before. `home` is the folder in which it lies, held open.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: it says what it said before.
    pub fn save(&self, home: &Folder) -> Result<()> {
        let fresh = self.temporary_name();
        let saved = self.write(home, &fresh).and_then(|()| {
            failpoint::reached("merge.note-written");
            home.rename(&fresh, home, &self.name())
        });
        if saved.is_err() {
            let _ = home.remove(&fresh);
        }
        saved?;
        failpoint::reached("merge.note-named");
        home.sync()
    }

    fn write(&self, home: &Folder, fresh: &OsStr) -> Result<()> {
        // What a killed predecessor left.
        if home.exists(fresh)? {
            home.remove(fresh)?;
        }
        let file = home.create(fresh)?;
        file.write_at(self.encode().as_bytes(), 0)?;
        file.sync()
    }

    /// Ends it: the last act of a merge.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, home: &Folder) -> Result<()> {
        for name in [self.temporary_name(), self.name()] {
            if home.exists(&name)? {
                home.remove(&name)?;
            }
        }
        home.sync()
    }

    fn encode(&self) -> String {
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
}

/// The UUID in the name of a record: that of the image that is folded.
fn child_uuid_in_name(name: &OsStr) -> Option<Uuid> {
    name.to_str()?.strip_prefix('.')?.strip_suffix(".merge")?.parse().ok()
}

/// `None` for what is gone or closed to us, and for a file system that lists no folders.
fn skip_inaccessible<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound) || e.is_denied() => Ok(None),
        Err(e) => Err(e),
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

/// What a note says; `None` where it is broken.
fn decode(text: &str, folder: &Path) -> Option<MergeRecord> {
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

/// FNV-1a: it is accidents that are to be found.
fn checksum(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

pub(super) fn percent_encode(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => text.push(char::from(byte)),
            _ => write!(text, "%{byte:02X}").expect("a string takes all"),
        }
    }
    text
}

pub(super) fn percent_decode(text: &str) -> Option<PathBuf> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    Some(OsStr::from_bytes(&bytes).into())
}

#[cfg(test)]
#[path = "merge_record_tests.rs"]
mod tests;
