//! Tests of the live journal: a process that is killed is one that drops its image without closing it.

use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::image::{
    Commit, Durability, Growth, ImageKind, ImageSpec, JobStep, ParentLink, Writable, create, run_to_completion,
};
use crate::storage::host::Host;
use crate::storage::{Access, Env, FileSlot, Op, Payload};
use crate::units::{BlockSize, SectorRange};

const SLOT_OF_FILE: FileSlot = FileSlot(3);
const BLOCK: u64 = 4096;

struct KilledImage {
    folder: TempDir,
    runtime: TempDir,
}

impl KilledImage {
    fn new(kind: ImageKind) -> KilledImage {
        let rig =
            KilledImage { folder: tempfile::tempdir().unwrap(), runtime: tempfile::tempdir_in("/dev/shm").unwrap() };
        create(&Host, &rig.path(), &ImageSpec { kind, size: 64 << 20, block_size: BlockSize::DEFAULT, reserve: 0 })
            .unwrap();
        rig
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("a.vhd")
    }

    /// Replaces the journals by copies, as the `Writable` of a killed process in this test still has the old files
    /// locked.
    fn unlock(&self) {
        for entry in self.runtime.path().read_dir().unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        }
    }

    /// Opens the image as the next daemon does.
    fn open(&self) -> Arc<Writable> {
        self.unlock();
        let image = Image::open(Host.open(&self.path(), Access::Write).unwrap()).unwrap();
        let keep =
            Durability::Journal { folders: vec![Host.runtime_folder(self.runtime.path()).unwrap()], required: true };
        let image = Arc::new(Writable::new(&Host, image, &keep).unwrap());
        while let Some(mut growth) = Growth::begin(&image, SLOT_OF_FILE) {
            run_to_completion(&Host, image.file(), SLOT_OF_FILE, |failed, ops| growth.next(failed, ops)).unwrap();
        }
        image
    }
}

fn write(image: &Writable, block: u32, sector: u64) {
    image.reserve(BlockIndex::new(block)).unwrap();
    let at = u64::from(block) * BLOCK + sector;
    assert_eq!(image.mark(SectorRange::between(at, at + 8)), Ok(true), "the journal has free slots");
}

/// The blocks, of the first eight, in which the bit of `sector` is set, in memory or in the file.
fn marked(image: &Writable, sector: u32) -> Vec<u32> {
    let has = |block: &u32| {
        let block = BlockIndex::new(*block);
        let Some(place) = image.image().bat().unwrap().place(block) else { return false };
        let bitmaps = image.bitmaps().unwrap();
        let mut bytes = [0; 512];
        match bitmaps.run(bitmaps.first_sector_of(block), sector, sector + 1) {
            Some((set, _)) => return set,
            None => image.file().read_at(&mut bytes, place.sector().byte_offset()).unwrap(),
        }
        bytes[sector as usize / 8] >> (7 - sector % 8) & 1 == 1
    };
    (0..8).filter(has).collect()
}

/// Carries out `operations` operations of a commit, and then abandons it. Returns true if the commit ended before.
fn commit(image: &Arc<Writable>, operations: usize) -> bool {
    let (mut commit, mut ops, mut left) = (Commit::new(image.clone(), SLOT_OF_FILE), Vec::<Op>::new(), operations);
    while commit.next(None, &mut ops).unwrap() == JobStep::Wait {
        for op in ops.drain(..) {
            if left == 0 {
                std::mem::forget(commit);
                return false;
            }
            left -= 1;
            if let Payload::Own(bytes) = op.payload {
                image.file().write_at(&bytes, op.offset).unwrap();
            }
        }
    }
    true
}

fn kinds() -> [ImageKind; 2] {
    let uuid = uuid::Uuid::from_u128(7);
    let link = ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() };
    [ImageKind::Dynamic, ImageKind::Differencing(link)]
}

#[test]
fn places_written_by_a_killed_commit_are_accounted_for_by_the_next_daemon() {
    for kind in kinds() {
        for (first, second) in (0..8).flat_map(|a| [0, 3, 5, 6].map(|b| (a, b))) {
            let rig = KilledImage::new(kind.clone());
            let image = rig.open();
            assert!(commit(&image, 100), "syncs data of a previous process");
            (0..3).for_each(|block| write(&image, block, 8));
            commit(&image, first);
            write(&image, 3, 8);
            drop(image);
            let image = rig.open();
            assert!(marked(&image, 8).starts_with(&[0, 1, 2, 3]), "{first} {second}");
            write(&image, 4, 8);
            write(&image, 4, 16);
            commit(&image, second);
            drop(image);
            // The image is opened again, since a wrong sum is detected only at the open after the next commit.
            let image = rig.open();
            assert!(marked(&image, 8).starts_with(&[0, 1, 2, 3, 4]), "{first} {second}");
            assert!(marked(&image, 16).contains(&4));
            assert!(commit(&image, 100));
            write(&image, 5, 8);
            drop(image);
            assert!(marked(&rig.open(), 8).contains(&5));
        }
    }
}

/// More blocks than slots between two commits, and a kill during the commit: BAT entries without a slot must not be
/// taken for those of another writer.
#[test]
fn a_full_journal_is_replayed_after_a_kill() {
    let (folder, runtime) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let rig = KilledImage { folder, runtime };
    let block_size = BlockSize::from_bytes(4096).unwrap();
    create(&Host, &rig.path(), &ImageSpec { kind: ImageKind::Dynamic, size: 40 << 20, block_size, reserve: 0 })
        .unwrap();
    let image = rig.open();
    let mut kept = 0;
    for block in 0..JOURNAL_SLOTS + 200 {
        while image.reserve(BlockIndex::new(block)).is_err() {
            let mut growth = Growth::begin(&image, SLOT_OF_FILE).unwrap();
            run_to_completion(&Host, image.file(), SLOT_OF_FILE, |failed, ops| growth.next(failed, ops)).unwrap();
        }
        let at = u64::from(block) * 8;
        kept += u32::from(image.mark(SectorRange::between(at, at + 8)) == Ok(true));
    }
    assert_eq!(kept, JOURNAL_SLOTS, "the other writes need a commit before they are acknowledged");
    // The commit is abandoned after it has written all bitmaps and most sectors of the BAT.
    assert!(!commit(&image, JOURNAL_SLOTS as usize + 200 + 25));
    drop(image);
    let image = rig.open();
    assert!(
        (0..JOURNAL_SLOTS).all(|block| image.image().bat().unwrap().place(BlockIndex::new(block)).is_some()),
        "journaled blocks have places"
    );
    assert!(commit(&image, usize::MAX));
    drop(image);
    rig.open();
}
