//! Tests of `check.rs` and `masked_parent.rs`: children as QEMU leaves them.

use crate::format::footer::time_from_unix;
use std::fs::File as HostFile;
use std::os::unix::fs::FileExt;

use super::super::testing::ChainFolder;
use super::*;
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::SECTOR;

const BLOCK: u32 = 512 << 10;

fn checked(rig: &ChainFolder, name: &str) -> Vec<CheckedFile> {
    let youngest = Host.open(&rig.path(name), Access::Read).unwrap();
    check(&Host, youngest, Some(&Policy::default()), &[], &mut |_| Ok(())).unwrap()
}

/// The defects of the youngest file that are no notes of how sizes and times differ.
fn found(rig: &ChainFolder, name: &str) -> Vec<Defect> {
    let mut all = checked(rig, name).remove(0).defects;
    all.retain(|d| !matches!(d, Defect::ParentChanged { .. } | Defect::ParentSize { .. }));
    all
}

/// Writes a sector of the disk as QEMU 7.2 does: a block without a place gets one right behind the last, all of it marked;
/// a block with a place gets all of it marked.
fn qemu_writes(rig: &ChainFolder, name: &str, sector: u64, byte: u8) {
    let image = Image::open(Host.open(&rig.path(name), Access::Read).unwrap()).unwrap();
    let file = HostFile::options().read(true).write(true).open(rig.path(name)).unwrap();
    let (table, block_size) = (image.table_offset().unwrap(), image.block_size().unwrap());
    let block = block_size.block_at(sector);
    let place = image.bat().unwrap().place(block).unwrap_or_else(|| {
        let place = u32::try_from(image.used_end() / SECTOR).unwrap();
        file.write_all_at(
            &image.footer().encode(),
            (u64::from(place) + u64::from(block_size.stride_sectors())) * SECTOR,
        )
        .unwrap();
        file.write_all_at(&[0; 512], u64::from(place) * SECTOR).unwrap();
        file.write_all_at(&place.to_be_bytes(), table + u64::from(block) * 4).unwrap();
        place
    });
    file.write_all_at(&[0xFF; 512], u64::from(place) * SECTOR).unwrap();
    let data = u64::from(place) + 1 + u64::from(block_size.sector_in_block(sector));
    file.write_all_at(&[byte; 512], data * SECTOR).unwrap();
}

fn rig(block: u32) -> ChainFolder {
    let rig = ChainFolder::new();
    rig.dynamic("root", block, 10_000);
    rig.fill("root", &[(0, 19, 1), (3_000, 3_100, 1)]);
    rig.child("leaf", "root", block, 10_000);
    rig
}

#[test]
fn a_write_by_qemu_is_recognised() {
    let rig = rig(BLOCK);
    qemu_writes(&rig, "leaf", 15, 7);
    // The block begins behind the table, so that its first sectors are the rest of the table's page and the old footer.
    let defects = found(&rig, "leaf");
    assert!(matches!(defects[..], [Defect::ParentHidden { block: 0, sector: 7, .. }]), "{defects:?}");
    // Alone, nothing is said that only the parent's data can tell.
    let leaf = Host.open(&rig.path("leaf"), Access::Read).unwrap();
    let alone = check(&Host, leaf, None, &[], &mut |_| Ok(())).unwrap().remove(0).defects;
    assert!(matches!(alone[..], [Defect::PlacedByAnother { .. }]), "{alone:?}");
}

#[test]
fn where_nothing_is_hidden_nothing_is_said_to_be() {
    let rig = rig(BLOCK);
    qemu_writes(&rig, "leaf", 8_000, 7);
    assert_eq!(found(&rig, "leaf"), []);
    // The one sector that the parent has, written anew; zeros stand over zeros.
    let rig = ChainFolder::new();
    rig.dynamic("root", BLOCK, 10_000);
    rig.fill("root", &[(2_000, 2_001, 1)]);
    rig.child("leaf", "root", BLOCK, 10_000);
    qemu_writes(&rig, "leaf", 2_000, 7);
    assert_eq!(found(&rig, "leaf"), []);
}

#[test]
fn a_guest_that_zeroes_is_no_qemu() {
    let rig = rig(BLOCK);
    rig.fill("leaf", &[(0, 1024, 0), (2_048, 3_072, 0), (3_050, 3_051, 5)]);
    assert_eq!(found(&rig, "leaf"), []);
}

#[test]
fn the_parents_need_not_have_the_childs_blocks() {
    let rig = ChainFolder::new();
    rig.dynamic("root", 4 << 10, 10_000);
    rig.fill("root", &[(3_001, 3_002, 1)]);
    rig.child("middle", "root", 2 << 20, 9_000);
    rig.fill("middle", &[(3_500, 3_501, 1), (8_999, 9_000, 1)]);
    rig.child("leaf", "middle", BLOCK, 10_000);
    qemu_writes(&rig, "leaf", 2_060, 7);
    qemu_writes(&rig, "leaf", 9_900, 7);
    qemu_writes(&rig, "leaf", 4_100, 7);
    let defects = found(&rig, "leaf");
    assert!(matches!(defects[..], [Defect::ParentHidden { block: 2, sector: 953, .. }]), "{defects:?}");
    // While the root is away, it is told that there is something to look at.
    std::fs::rename(rig.path("root"), rig.path("elsewhere")).unwrap();
    let mut alone = checked(&rig, "leaf").remove(0).defects;
    alone.retain(|d| !matches!(d, Defect::ParentSize { .. }));
    assert!(matches!(alone[..], [Defect::PlacedByAnother { blocks: 3, .. }]), "{alone:?}");
}

#[test]
fn of_strangers_images_only_a_note_is_made() {
    let rig = rig(BLOCK);
    qemu_writes(&rig, "leaf", 5, 7);
    for at in [0, std::fs::metadata(rig.path("leaf")).unwrap().len() - 512] {
        let file = HostFile::options().read(true).write(true).open(rig.path("leaf")).unwrap();
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, at).unwrap();
        let mut footer = crate::format::Footer::decode(&bytes).unwrap();
        footer.creator = *b"dutl";
        file.write_all_at(&footer.encode(), at).unwrap();
    }
    let defects = found(&rig, "leaf");
    assert!(matches!(defects[..], [Defect::ZerosOverParent { block: 0, blocks: 1, .. }]), "{defects:?}");
    assert_eq!(defects[0].severity(), Severity::Note);
}

#[test]
fn a_parent_that_was_changed_is_a_note() {
    let rig = rig(BLOCK);
    assert!(checked(&rig, "leaf")[0].defects.is_empty(), "the rig's children record no time");
    let image = Image::open(Host.open(&rig.path("leaf"), Access::Read).unwrap()).unwrap();
    let file = HostFile::options().write(true).open(rig.path("leaf")).unwrap();
    let modified = Host.open(&rig.path("root"), Access::Read).unwrap().stat().unwrap().modified;
    let modified = time_from_unix(u64::try_from(modified).unwrap());
    let record = |time: u32| {
        let mut header = image.header().unwrap().clone();
        header.parent_timestamp = time;
        file.write_all_at(&header.encode(), image.footer().data_offset).unwrap();
        checked(&rig, "leaf").remove(0).defects
    };
    assert_eq!(record(modified - 1), [Defect::ParentChanged { recorded: modified - 1, found: modified }]);
    assert_eq!((record(modified), record(modified + 1)), (vec![], vec![]));
}
