//! The note of a snapshot: the disks of the snapshot, the names of their files, and whether the snapshot is decided. It
//! survives a crash of the process and of the system.
//!
//! A snapshot of a disk keeps its active image X under another name and continues in a new child Y of X. The daemon
//! takes snapshots of several disks (*members*) at the same moment. Each member has a note in its folder, with the same
//! text: `.<uuid of X>.snapshot` (`snapshot_note_file`). The first member is the *coordinator*: only its note changes
//! its state, and that state counts for all members. docs/crash-safety.md has the steps (crash-safety 12).
//!
//! ```text
//! diffdisk snapshot 1
//! group <uuid of the snapshot>
//! member <uuid of X> <uuid of Y> <folder> <A> <K> <T>     one line for each member, the coordinator first
//! state begun                          X is the active image of every member
//!     | switched <boot id> journal     a daemon with live journals writes to Y, during this boot of the machine
//!     | switched <boot id> commit      the same, by a daemon without live journals
//!     | decided                        Y is the active image of every member
//! sum <FNV-1a of all lines above, 16 hexadecimal digits>
//! ```
//!
//! A is the name of the active image, K is the name that X keeps, and T is the name of Y until Y is called A. All three
//! are in the member's folder. In folders and names, spaces, bytes that are not printable ASCII, and `%` are escaped as
//! `%XX`.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::note_text::{append_checksum, verify_checksum};
use super::paths::{percent_decode, percent_encode};

const FORMAT_LINE: &str = "diffdisk snapshot 1";

/// A disk of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotMember {
    /// The absolute path of the folder, without symbolic links. The folder of the note's own member may have moved
    /// since.
    pub folder: PathBuf,
    /// The name A of the active image, before and after the snapshot.
    pub active: OsString,
    /// The name K that the previous active image keeps.
    pub kept: OsString,
    /// The name T of the new child until it becomes the active image.
    pub child: OsString,
    /// The UUID of the image X that is active before the snapshot.
    pub active_uuid: Uuid,
    /// The UUID of the new child Y.
    pub child_uuid: Uuid,
}

impl SnapshotMember {
    /// The path of the active image.
    pub fn active_path(&self) -> PathBuf {
        self.folder.join(&self.active)
    }
}

/// The state of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SnapshotState {
    /// The previous active images receive the writes.
    Begun,
    /// The new children receive the writes, and no flush that covers such a write is acknowledged yet.
    Switched {
        /// The boot id of the machine on which the daemon runs or ran.
        boot: Uuid,
        /// Whether live journals record the acknowledged writes to the children. If not, no write to a child is
        /// acknowledged yet.
        has_journal: bool,
    },
    /// The previous active images are durable and do not change any more.
    Decided,
}

/// The note of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotNote {
    /// A random UUID, the same in the notes of all members.
    pub group: Uuid,
    /// The disks of the snapshot; the first one is the coordinator.
    pub members: Vec<SnapshotMember>,
    /// The state. Only that of the coordinator's note counts.
    pub state: SnapshotState,
}

impl SnapshotNote {
    /// The file name of the note of member `index`.
    ///
    /// # Panics
    /// If there is no such member.
    pub fn name(&self, index: usize) -> OsString {
        note_name(self.members[index].active_uuid)
    }

    /// The second name of a member's note. The coordinator's next text is prepared under the second name of its note.
    pub(super) fn second_name(&self, index: usize) -> OsString {
        format!(".{}.switched", self.members[index].active_uuid).into()
    }

    /// Returns the position of the member whose active image was `active_uuid`.
    pub(super) fn position(&self, active_uuid: Uuid) -> Option<usize> {
        self.members.iter().position(|member| member.active_uuid == active_uuid)
    }

    /// Encodes the note as text.
    pub(super) fn encode(&self) -> String {
        let mut text = format!("{FORMAT_LINE}\ngroup {}\n", self.group);
        for member in &self.members {
            let SnapshotMember { folder, active, kept, child, active_uuid, child_uuid } = member;
            let [folder, active, kept, child] =
                [folder.as_os_str(), active, kept, child].map(|name| encode_word(name.as_ref()));
            writeln!(text, "member {active_uuid} {child_uuid} {folder} {active} {kept} {child}")
                .expect("writing to a string cannot fail");
        }
        match self.state {
            SnapshotState::Begun => text.push_str("state begun\n"),
            SnapshotState::Switched { boot, has_journal } => {
                let how = if has_journal { "journal" } else { "commit" };
                writeln!(text, "state switched {boot} {how}").expect("writing to a string cannot fail");
            }
            SnapshotState::Decided => text.push_str("state decided\n"),
        }
        append_checksum(text)
    }

    /// Decodes the text of a note. Returns `None` unless it is exactly the text of a valid note.
    pub(super) fn decode(text: &str) -> Option<SnapshotNote> {
        let mut lines = verify_checksum(text)?.lines();
        if lines.next()? != FORMAT_LINE {
            return None;
        }
        let group = lines.next()?.strip_prefix("group ")?.parse().ok()?;
        let (mut members, mut state) = (Vec::new(), None);
        for line in lines {
            match line.split_once(' ')? {
                ("member", rest) => members.push(decode_member(rest)?),
                ("state", rest) => state = Some(decode_state(rest)?),
                _ => return None,
            }
        }
        let note = SnapshotNote { group, members, state: state? };
        // A UUID can be spelled in several ways, and lines can be in another order: only the text of `encode` is valid.
        (note.is_valid() && note.encode() == text).then_some(note)
    }

    /// Whether there is a member, no two members have the same previous image, all folders are absolute, all names are
    /// single components, and the names and the UUIDs of each member differ.
    fn is_valid(&self) -> bool {
        let is_name = |name: &OsStr| {
            let mut parts = Path::new(name).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == name)
        };
        let is_sound = |member: &SnapshotMember| {
            let SnapshotMember { folder, active, kept, child, active_uuid, child_uuid } = member;
            folder.is_absolute()
                && [active, kept, child].into_iter().all(|name| is_name(name) && !name.as_bytes().contains(&0))
                && active != kept
                && active != child
                && kept != child
                && active_uuid != child_uuid
        };
        let mut uuids: Vec<Uuid> = self.members.iter().map(|member| member.active_uuid).collect();
        uuids.sort_unstable();
        !self.members.is_empty() && self.members.iter().all(is_sound) && uuids.windows(2).all(|two| two[0] != two[1])
    }
}

/// Returns the file name of the note of the member whose active image was `active_uuid`.
pub(super) fn note_name(active_uuid: Uuid) -> OsString {
    format!(".{active_uuid}.snapshot").into()
}

/// Whether a name has the form of a note's name.
pub(super) fn is_note_name(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b".") && name.ends_with(b".snapshot")
}

/// Encodes a path as printable ASCII without spaces.
fn encode_word(path: &Path) -> String {
    percent_encode(path).replace(' ', "%20")
}

/// Decodes the line of a member after its first word.
fn decode_member(text: &str) -> Option<SnapshotMember> {
    let mut words = text.split(' ');
    let (active_uuid, child_uuid) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let mut word = || percent_decode(words.next()?);
    let (folder, active, kept, child) = (word()?, word()?.into(), word()?.into(), word()?.into());
    Some(SnapshotMember { folder, active, kept, child, active_uuid, child_uuid })
}

/// Decodes the line of the state after its first word.
fn decode_state(text: &str) -> Option<SnapshotState> {
    let mut words = text.split(' ');
    Some(match (words.next()?, words.next(), words.next()) {
        ("begun", None, None) => SnapshotState::Begun,
        ("decided", None, None) => SnapshotState::Decided,
        ("switched", Some(boot), Some(how)) => {
            SnapshotState::Switched { boot: boot.parse().ok()?, has_journal: how == "journal" }
        }
        _ => return None,
    })
}

#[cfg(test)]
#[path = "snapshot_note_tests.rs"]
mod tests;
