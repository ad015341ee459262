//! The note of a merge: what is being done, and how far it has come. It outlives the process and the host.
//!
//! It lies beside CHILD as `.<uuid of CHILD>.merge`: lines of ASCII, ended by a sum.
//!
//! ```text
//! diffdisk merge 2
//! layer <uuid> <state> <path>         CHILD first, then what lies between
//! ancestor <uuid> <state> <path>
//! copied <sector>                     all before this sector; or: copied all
//! sum <FNV-1a of all lines above, 16 hexadecimal digits>
//! ```
//!
//! A state is what tells one content of a file from another without reading it: `<inode> <bytes> <last change,
//! seconds.nanoseconds>`. (No device: it may have another number after the next boot.)
//!
//! Paths begin in the note's folder, so that the folder may move; bytes that are not printable ASCII are written `%XX`.
//! A note is replaced as a whole: temporary name, sync, rename, sync of the folder.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::chain::{MAX_NOTE_BYTES, folded_by_note};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Glance, folder_of};
use crate::point;
use crate::storage::{Access, Env, File, Folder};

const FIRST_LINE: &str = "diffdisk merge 2";

/// The state of a file, by which it is known again: the same file, and nobody has written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    /// Its inode.
    ino: u64,
    /// Its length in bytes.
    len: u64,
    /// Its last change, Unix seconds and nanoseconds.
    modified: (i64, u32),
}

impl Seen {
    /// The state of `file` now.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn of(file: &File) -> Result<Seen> {
        let stat = file.stat()?;
        Ok(Seen { ino: stat.id.ino, len: stat.len, modified: (stat.modified, stat.modified_nanos) })
    }

    /// The state of an image; `None` where another file or none is at `path`.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn at(env: &dyn Env, path: &Path, uuid: Uuid) -> Result<Option<Seen>> {
        let file = match env.open(path, Access::Read) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let is_it = Glance::at(&file)?.is_some_and(|glance| glance.uuid == uuid);
        is_it.then(|| Seen::of(&file)).transpose()
    }

    /// The same, made durable: a power cut does not bring back an older one.
    ///
    /// # Errors
    /// `Io`, `Poisoned`.
    pub(super) fn durably(file: &File) -> Result<Seen> {
        file.sync_all()?;
        Seen::of(file)
    }
}

/// An image that is folded into another one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Folded {
    pub(super) uuid: Uuid,
    /// Its state before anything of it was copied.
    pub(super) seen: Seen,
    /// From the note's folder.
    pub(super) path: PathBuf,
}

/// How far a merge has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Copied {
    /// All before this sector is in the ancestor, durably.
    Before(u64),
    /// All is, and the ancestor is complete.
    All,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Intent {
    /// Where the note lies: CHILD's folder.
    pub(super) folder: PathBuf,
    /// CHILD and what lies between, youngest first.
    pub(super) layers: Vec<Folded>,
    pub(super) ancestor: Uuid,
    /// The ancestor's state when all that `copied` says was in it.
    pub(super) ancestor_seen: Seen,
    /// From the note's folder.
    pub(super) ancestor_path: PathBuf,
    pub(super) copied: Copied,
}

impl Intent {
    /// The note of a merge of the image at `child` that was begun and not ended, if there is one; `present` is the image
    /// that has the name now.
    ///
    /// # Errors
    /// `Refused` where another image has the name than when it was begun; `Invalid` for a broken note; `Io`.
    pub(super) fn find(env: &dyn Env, child: &Path, present: Option<Uuid>) -> Result<Option<Intent>> {
        let folder = env.folder(folder_of(child))?.absolute()?;
        let Some(name) = child.file_name() else { return Ok(None) };
        for note in folder.list()? {
            let Some(uuid) = folded_by_note(&note) else { continue };
            let path = folder.path().join(&note);
            let intent = match Intent::load(&folder, &note) {
                Ok(intent) => intent,
                Err(e) if e.kind() == ErrorKind::Invalid && present.is_some_and(|present| present != uuid) => {
                    log::warn!("{}", e.line());
                    continue;
                }
                Err(e) => return Err(e),
            };
            let is_named = intent.layers[0].path.as_os_str() == name;
            match present {
                Some(present) if present == uuid => return Ok(Some(intent)),
                None if is_named => return Ok(Some(intent)),
                Some(_) if is_named => {
                    let what = format!(
                        "a merge of another image of this name was not ended ({}): give this one another name and run \
                         the same command, which ends it",
                        path.display()
                    );
                    return Err(Error::new(ErrorKind::Refused, what).at_path(child));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    fn load(folder: &Folder, note: &OsStr) -> Result<Intent> {
        let file = folder.open(note, Access::Read)?;
        let len = file.stat()?.len;
        let mut bytes = vec![0; usize::try_from(len.min(MAX_NOTE_BYTES)).expect("2 MiB at most")];
        file.read_at(&mut bytes, 0)?;
        let read = std::str::from_utf8(&bytes).ok().and_then(|text| decode(text, folder.path()));
        read.filter(|intent| folded_by_note(note) == Some(intent.layers[0].uuid)).ok_or_else(|| {
            let what = "the note of a merge cannot be read; if the image that was being merged is still there, remove the \
                        note and merge it again";
            Error::new(ErrorKind::Invalid, what).at_path(file.path())
        })
    }

    /// Its own path.
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join(self.name())
    }

    fn name(&self) -> OsString {
        format!(".{}.merge", self.layers[0].uuid).into()
    }

    fn fresh_name(&self) -> OsString {
        format!(".{}.merge.new", self.layers[0].uuid).into()
    }

    /// Says it durably, in the place of what it said before. `home` is the folder in which it lies, held open.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: it says what it said before.
    pub(super) fn save(&self, home: &Folder) -> Result<()> {
        let fresh = self.fresh_name();
        let saved = self.write(home, &fresh).and_then(|()| {
            point::reached("merge.note-written");
            home.rename(&fresh, home, &self.name())
        });
        if saved.is_err() {
            let _ = home.remove(&fresh);
        }
        saved?;
        point::reached("merge.note-named");
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
    pub(super) fn remove(&self, home: &Folder) -> Result<()> {
        for name in [self.fresh_name(), self.name()] {
            if home.exists(&name)? {
                home.remove(&name)?;
            }
        }
        home.sync()
    }

    fn encode(&self) -> String {
        let mut text = format!("{FIRST_LINE}\n");
        for layer in &self.layers {
            text += &named("layer", layer.uuid, layer.seen, &layer.path);
        }
        text += &named("ancestor", self.ancestor, self.ancestor_seen, &self.ancestor_path);
        match self.copied {
            Copied::Before(sector) => writeln!(text, "copied {sector}"),
            Copied::All => writeln!(text, "copied all"),
        }
        .expect("a string takes all");
        let sum = sum(&text);
        writeln!(text, "sum {sum:016x}").expect("a string takes all");
        text
    }
}

/// The line of a file.
fn named(word: &str, uuid: Uuid, seen: Seen, path: &Path) -> String {
    let Seen { ino, len, modified: (seconds, nanos) } = seen;
    format!("{word} {uuid} {ino} {len} {seconds}.{nanos:09} {}\n", escaped(path))
}

/// What such a line says behind its word.
fn decode_named(text: &str) -> Option<(Uuid, Seen, PathBuf)> {
    let mut words = text.splitn(5, ' ');
    let (uuid, ino, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let (seconds, nanos) = words.next()?.split_once('.')?;
    let modified = (seconds.parse().ok()?, nanos.parse().ok()?);
    Some((uuid, Seen { ino, len, modified }, unescaped(words.next()?)?))
}

/// What a note says; `None` where it is broken.
fn decode(text: &str, folder: &Path) -> Option<Intent> {
    let end = text.strip_suffix('\n')?.rfind('\n')? + 1;
    let (said, last) = text.split_at(end);
    if last.trim_end().strip_prefix("sum ")? != format!("{:016x}", sum(said)) {
        return None;
    }
    let mut lines = said.lines().filter(|line| !line.is_empty());
    if lines.next()? != FIRST_LINE {
        return None;
    }
    let (mut layers, mut ancestor, mut copied) = (Vec::new(), None, None);
    for line in lines {
        let (word, rest) = line.split_once(' ')?;
        match word {
            "layer" => {
                let (uuid, seen, path) = decode_named(rest)?;
                layers.push(Folded { uuid, seen, path });
            }
            "ancestor" => ancestor = Some(decode_named(rest)?),
            "copied" if rest == "all" => copied = Some(Copied::All),
            "copied" => copied = Some(Copied::Before(rest.parse().ok()?)),
            _ => return None,
        }
    }
    let (ancestor, ancestor_seen, ancestor_path) = ancestor?;
    let folder = folder.to_path_buf();
    let copied = copied?;
    (!layers.is_empty()).then_some(Intent { folder, layers, ancestor, ancestor_seen, ancestor_path, copied })
}

/// FNV-1a: it is accidents that are to be found.
fn sum(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => text.push(char::from(byte)),
            _ => write!(text, "%{byte:02X}").expect("a string takes all"),
        }
    }
    text
}

fn unescaped(text: &str) -> Option<PathBuf> {
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
mod tests {
    use super::*;
    use crate::storage::host::Host;

    fn intent(folder: &Path) -> Intent {
        let seen = |ino, modified| Seen { ino, len: 1 << 50, modified };
        let odd = OsStr::from_bytes(b"a b%41\n\xFF.vhd");
        let layers = vec![
            Folded { uuid: Uuid::from_u128(1), seen: seen(7, (-5, 7)), path: odd.into() },
            Folded { uuid: Uuid::from_u128(2), seen: seen(8, (1 << 40, 999_999_999)), path: "../x/m.vhd".into() },
        ];
        let (ancestor, ancestor_path) = (Uuid::from_u128(3), "p.vhd".into());
        let ancestor_seen = seen(u64::MAX, (0, 0));
        Intent { folder: folder.into(), layers, ancestor, ancestor_seen, ancestor_path, copied: Copied::Before(77) }
    }

    #[test]
    fn what_is_saved_is_found_by_name_or_by_identity() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().canonicalize().unwrap();
        let home = Host.folder(&at).unwrap();
        let mut note = intent(&at);
        let child = at.join(&note.layers[0].path);
        assert_eq!(Intent::find(&Host, &child, None).unwrap(), None);
        note.save(&home).unwrap();
        std::fs::write(at.join(note.fresh_name()), "left by a killed one").unwrap();
        note.copied = Copied::All;
        note.save(&home).unwrap();
        assert_eq!(Intent::find(&Host, &child, None).unwrap().as_ref(), Some(&note));
        let other = at.join("renamed.vhd");
        assert_eq!(Intent::find(&Host, &other, Some(Uuid::from_u128(1))).unwrap().as_ref(), Some(&note));
        assert_eq!(Intent::find(&Host, &other, None).unwrap(), None);
        assert_eq!(Intent::find(&Host, &other, Some(Uuid::from_u128(9))).unwrap(), None);
        let e = Intent::find(&Host, &child, Some(Uuid::from_u128(9))).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Refused, "another image has the name");
        note.remove(&home).unwrap();
        assert_eq!(home.list().unwrap().len(), 0);
    }

    #[test]
    fn a_broken_note_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().canonicalize().unwrap();
        let note = intent(&at);
        let text = note.encode();
        assert_eq!(decode(&text, &at), Some(note.clone()));
        for cut in 0..text.len() {
            assert_eq!(decode(&text[..cut], &at), None, "cut at {cut}");
        }
        for at_byte in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at_byte] ^= 1;
            let read = std::str::from_utf8(&bytes).ok().and_then(|text| decode(text, &at));
            assert_eq!(read, None, "byte {at_byte}");
        }
        std::fs::write(note.path(), &text[1..]).unwrap();
        let child = at.join("c.vhd");
        assert_eq!(Intent::find(&Host, &child, Some(Uuid::from_u128(1))).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(Intent::find(&Host, &child, None).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(Intent::find(&Host, &child, Some(Uuid::from_u128(2))).unwrap(), None, "another one's");
        // The same under the name of another image.
        std::fs::rename(note.path(), at.join(format!(".{}.merge", Uuid::from_u128(2)))).unwrap();
        assert!(Intent::find(&Host, &child, Some(Uuid::from_u128(2))).is_err());
    }
}
