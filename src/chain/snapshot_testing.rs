//! Test support for snapshots: a daemon takes a snapshot of one or two disks on a simulated host and ends. Then the
//! disks are resolved and checked.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::open_mode::OpenMode;
use super::super::parent_time;
use super::super::snapshot_note::{SnapshotMember, SnapshotNote, SnapshotState};
use super::super::snapshot_note_file::uuid_of;
use super::super::testing::read_sector_bytes;
use super::super::{Chain, Policy};
use super::resolve_within;
use crate::error::{Result, none_if_not_found};
use crate::image::{self, Commit, Durability, Growth, Image, ImageKind, ImageSpec, ParentLink, Writable};
use crate::random::Random;
use crate::storage::sim::{DurableUnit, SimHost};
use crate::storage::{Access, Env, FileSlot, Folder, Lock, RuntimeFolder};
use crate::units::{BlockIndex, BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

pub(super) const SLOT: FileSlot = FileSlot(0);
pub(super) const SECTORS: u64 = 128;
pub(super) const RUNTIME: &str = "/run";
pub(super) const FOLDERS: [&str; 2] = ["/a", "/b"];

/// The last byte of each sector that a guest has written, as each kind of event must leave it.
#[derive(Clone, Default, Debug)]
pub(super) struct WrittenBytes {
    /// Before the switch: what the snapshot contains.
    pub(super) before: Vec<(u64, u8)>,
    /// Acknowledged: survives a kill.
    pub(super) acknowledged: Vec<(u64, u8)>,
    /// Flushed: survives a power cut.
    pub(super) flushed: Vec<(u64, u8)>,
}

/// How a process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Kill,
    /// A power cut, and what survives of that which is not durable.
    PowerCut(Survival),
}

/// The changes that survive a power cut, among those that are not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Survival {
    Nothing,
    /// All changes of names, and no others.
    Names,
    /// The last change of a name, and no others.
    LastName,
    /// Each change by chance.
    Any(u64),
}

pub(super) fn folder(host: &SimHost, index: usize) -> Folder {
    host.folder(Path::new(FOLDERS[index])).unwrap()
}

pub(super) fn path(index: usize, name: &str) -> PathBuf {
    Path::new(FOLDERS[index]).join(name)
}

pub(super) fn runtime(host: &SimHost) -> Vec<RuntimeFolder> {
    vec![host.runtime_folder(Path::new(RUNTIME)).unwrap()]
}

pub(super) fn journal(host: &SimHost) -> Durability {
    Durability::Journal { folders: runtime(host), required: true }
}

pub(super) fn spec(kind: ImageKind) -> ImageSpec {
    ImageSpec { kind, size: SECTORS * SECTOR, block_size: BlockSize::from_bytes(64 << 10).unwrap(), reserve: 0 }
}

/// Creates a host with the disks of a snapshot, and the note of that snapshot.
pub(super) fn setup(members: usize) -> (SimHost, SnapshotNote) {
    let host = SimHost::new(5);
    let members = (0..members).map(|index| {
        let active_uuid = image::create(&host, &path(index, "disk"), &spec(ImageKind::Dynamic)).unwrap();
        SnapshotMember {
            folder: FOLDERS[index].into(),
            active: "disk".into(),
            kept: "kept".into(),
            child: "new".into(),
            active_uuid,
            child_uuid: Uuid::from_u128(100 + index as u128),
        }
    });
    let members = members.collect();
    (host, SnapshotNote { group: Uuid::from_u128(7), members, state: SnapshotState::Begun })
}

pub(super) fn open_writable(host: &SimHost, path: &Path) -> Result<Arc<Writable>> {
    let file = host.open(path, Access::Write)?;
    file.lock(Lock::Exclusive)?;
    Ok(Arc::new(Writable::new(host, Image::open(file)?, &journal(host))?))
}

pub(super) fn commit(host: &SimHost, image: &Arc<Writable>) -> Result<()> {
    let mut commit = Commit::new(image.clone(), SLOT);
    image::run_to_completion(host, image.file(), SLOT, |failed, ops| commit.next(failed, ops))
}

/// Writes a sector as a lane does. The write is acknowledged when this function returns.
pub(super) fn write(host: &SimHost, image: &Arc<Writable>, sector: u64, byte: u8) -> Result<()> {
    let place = loop {
        if let Ok(place) = image.reserve(BlockIndex::new(0)) {
            break place;
        }
        let mut growth = Growth::begin(image, SLOT).expect("room is short");
        image::run_to_completion(host, image.file(), SLOT, |failed, ops| growth.next(failed, ops))?;
    };
    image.note_content_change();
    image.file().write_at(&[byte; SECTOR_BYTES], (place.sector() + 1 + sector).byte_offset())?;
    assert_eq!(image.mark(SectorRange::between(sector, sector + 1)), Ok(true));
    Ok(())
}

/// The steps of a daemon that takes a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
pub(super) enum Step {
    Noted,
    ChildrenMade,
    Prepared,
    Switched,
    Committed,
    Decided,
    Flushed,
    Named,
    Done,
}

/// Takes a snapshot of all members, and ends after the step `last`. The guest writes before and after the switch.
pub(super) fn take(
    host: &SimHost,
    note: &SnapshotNote,
    written: &mut [WrittenBytes],
    last: Step,
    has_journal: bool,
) -> Result<()> {
    let members = || note.members.iter().enumerate();
    let previous = members().map(|(n, _)| open_writable(host, &path(n, "disk"))).collect::<Result<Vec<_>>>()?;
    for ((image, written), (index, _)) in previous.iter().zip(&mut *written).zip(members()) {
        host.advance_clock(10);
        write(host, image, 0, 1)?;
        (written.before, written.acknowledged) = (vec![(0, 1)], vec![(0, 1)]);
        commit(host, image)?;
        written.flushed = vec![(0, 1)];
        note.write_new(host, &folder(host, index), index)?;
    }
    if last == Step::Noted {
        return Ok(());
    }
    let mut children = Vec::new();
    for (index, member) in members() {
        let folder = folder(host, index);
        let modified = folder.open(&member.active, Access::Read)?.stat()?.modified;
        let link = ParentLink {
            uuid: member.active_uuid,
            modified,
            relative: Some("kept".into()),
            absolute: None,
            name: "kept".into(),
        };
        let file = folder.create_unnamed(&member.child)?;
        image::write_new(&file, host, member.child_uuid, &spec(ImageKind::Differencing(link)))?;
        folder.link_unnamed(&file, &member.child)?;
        folder.sync()?;
        drop(file);
        children.push(open_writable(host, &path(index, "new"))?);
    }
    host.advance_clock(10);
    for (image, written) in previous.iter().zip(&mut *written) {
        write(host, image, 1, 2)?;
        written.before.push((1, 2));
        written.acknowledged.push((1, 2));
    }
    if last == Step::ChildrenMade {
        return Ok(());
    }
    let coordinator = folder(host, 0);
    let boot = host.origin()?.boot;
    let switched = SnapshotNote { state: SnapshotState::Switched { boot, has_journal }, ..note.clone() };
    switched.prepare(host, &coordinator)?;
    if last == Step::Prepared {
        return Ok(());
    }
    switched.switch(&coordinator)?;
    if has_journal {
        for (image, written) in children.iter().zip(&mut *written) {
            write(host, image, 2, 3)?;
            written.acknowledged.push((2, 3));
        }
    }
    if last == Step::Switched {
        return Ok(());
    }
    for (index, image) in previous.iter().enumerate() {
        commit(host, image)?;
        image.end_session();
        image.trim()?;
        image.remove_journal()?;
        let child = Image::open(host.open(&path(index, "new"), Access::Read)?)?;
        parent_time::restore(&child, image.file())?;
    }
    if last == Step::Committed {
        return Ok(());
    }
    let decided = SnapshotNote { state: SnapshotState::Decided, ..note.clone() };
    decided.replace(host, &coordinator)?;
    if last == Step::Decided {
        return Ok(());
    }
    for (image, written) in children.iter().zip(&mut *written) {
        commit(host, image)?;
        written.flushed = written.acknowledged.clone();
    }
    if last == Step::Flushed {
        return Ok(());
    }
    for (index, _) in members() {
        decided.name_files(host, &folder(host, index), index)?;
    }
    if last == Step::Named {
        return Ok(());
    }
    for (index, _) in members().rev() {
        decided.remove(&folder(host, index), index)?;
    }
    Ok(())
}

pub(super) fn end(host: &SimHost, how: End) -> SimHost {
    match how {
        End::Kill => host.kill(&mut Random::new(3)),
        End::PowerCut(Survival::Any(seed)) => host.crash(&mut Random::new(seed)),
        End::PowerCut(survival) => {
            let units = host.unsynced();
            let is_name = |at: usize| matches!(units[at], DurableUnit::Name(_));
            let last = (0..units.len()).rfind(|at| is_name(*at));
            host.crash_with(&|at| match survival {
                Survival::Names => is_name(at),
                Survival::LastName => Some(at) == last,
                Survival::Nothing | Survival::Any(_) => false,
            })
        }
    }
}

pub(super) fn resolve(host: &SimHost, index: usize) -> Result<bool> {
    resolve_within(host, &path(index, "disk"), &runtime(host), false, Duration::ZERO)
}

pub(super) fn uuid_at(host: &SimHost, path: &Path) -> Option<Uuid> {
    let file = none_if_not_found(host.open(path, Access::Read)).unwrap()?;
    uuid_of(&file).unwrap()
}

pub(super) fn names(host: &SimHost, index: usize) -> Vec<String> {
    let folder = Path::new(FOLDERS[index]);
    let mut names: Vec<PathBuf> = host.names().into_iter().filter(|name| name.starts_with(folder)).collect();
    names.sort();
    names.iter().map(|name| name.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

pub(super) fn read(host: &SimHost, path: &Path, mode: OpenMode) -> Result<Vec<u8>> {
    let policy = Policy { runtime: runtime(host), ..Policy::default() };
    let chain = Chain::open(host, path, &policy, mode)?;
    let version = match mode {
        OpenMode::Write => chain.into_writable(host, &journal(host))?,
        _ => chain.into_frozen(),
    };
    Ok(read_sector_bytes(&version, 0, 8))
}

/// Opens all resolved disks. Checks that all or none have the snapshot, and the bytes of disks and snapshots.
pub(super) fn check(
    host: &SimHost,
    note: &SnapshotNote,
    written: &[WrittenBytes],
    is_cut: bool,
) -> Result<bool, String> {
    let mut forward = Vec::new();
    for (index, (member, written)) in note.members.iter().zip(written).enumerate() {
        let uuid = uuid_at(host, &path(index, "disk"));
        let is_forward = uuid == Some(member.child_uuid);
        if !is_forward && uuid != Some(member.active_uuid) {
            return Err(format!("member {index} has the image {uuid:?}"));
        }
        let expected: &[&str] = if is_forward { &["disk", "kept"] } else { &["disk"] };
        if names(host, index) != expected {
            return Err(format!("member {index} has the files {:?}", names(host, index)));
        }
        let read = |name: &str, mode| {
            read(host, &path(index, name), mode).map_err(|e| format!("member {index}, {name}: {}", e.line()))
        };
        let lacks = |bytes: &[u8], values: &[(u64, u8)]| {
            values.iter().find(|(sector, byte)| bytes[usize::try_from(*sector).unwrap()] != *byte).copied()
        };
        if is_forward {
            if uuid_at(host, &path(index, "kept")) != Some(member.active_uuid) {
                return Err(format!("member {index} has another image as snapshot"));
            }
            let kept = read("kept", OpenMode::Read)?;
            if lacks(&kept, &written.before).is_some() || kept[2] != 0 {
                return Err(format!("the snapshot of member {index} has {kept:?}"));
            }
        }
        let disk = read("disk", OpenMode::Write)?;
        let promised = if is_cut { &written.flushed } else { &written.acknowledged };
        if let Some(lost) = lacks(&disk, promised) {
            return Err(format!("member {index} lacks {lost:?}: {disk:?}"));
        }
        forward.push(is_forward);
    }
    let first = forward[0];
    if forward.iter().any(|is_forward| *is_forward != first) { Err(format!("{forward:?}")) } else { Ok(first) }
}

/// Resolves the members in the given order, and checks them.
pub(super) fn resolve_and_check(
    host: &SimHost,
    note: &SnapshotNote,
    written: &[WrittenBytes],
    order: &[usize],
    is_cut: bool,
) -> Result<bool, String> {
    for &index in order {
        resolve(host, index).map_err(|e| format!("member {index}: {}", e.line()))?;
    }
    // The first member may wait for the others with its note.
    for &index in order {
        if resolve(host, index).map_err(|e| format!("member {index} again: {}", e.line()))? && index != order[0] {
            return Err(format!("member {index} was resolved twice"));
        }
    }
    check(host, note, written, is_cut)
}

/// Takes a snapshot of `members` disks up to a step, and kills the daemon.
pub(super) fn killed_after(members: usize, last: Step) -> (SimHost, SnapshotNote, Vec<WrittenBytes>) {
    let (host, note) = setup(members);
    let mut written = vec![WrittenBytes::default(); members];
    take(&host, &note, &mut written, last, true).unwrap();
    (end(&host, End::Kill), note, written)
}
