//! Tests of `check.rs` and `masked_parent.rs`: children to which QEMU has written.

use crate::format::footer::time_from_unix;
use std::fs::File as HostFile;
use std::os::unix::fs::FileExt;

use super::super::testing::ChainFolder;
use super::*;
use crate::format::bat::BlockPlace;
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::{BlockIndex, FileSector};

const BLOCK: u32 = 512 << 10;

fn checked(chains: &ChainFolder, name: &str) -> Vec<CheckedFile> {
    let youngest = Host.open(&chains.path(name), Access::Read).unwrap();
    check(&Host, youngest, Some(&Policy::default()), &[], &mut |_| Ok(())).unwrap()
}

/// The defects of the youngest file, without notes on different sizes and times.
fn found(chains: &ChainFolder, name: &str) -> Vec<Defect> {
    let mut all = checked(chains, name).remove(0).defects;
    all.retain(|d| !matches!(d, Defect::ParentChanged { .. } | Defect::ParentSize { .. }));
    all
}

/// Writes a sector of the disk as QEMU 7.2 does: a block without a place gets one directly after the last block, and
/// all sectors of the block are marked.
fn qemu_writes(chains: &ChainFolder, name: &str, sector: u64, byte: u8) {
    let image = Image::open(Host.open(&chains.path(name), Access::Read).unwrap()).unwrap();
    let file = HostFile::options().read(true).write(true).open(chains.path(name)).unwrap();
    let (table, block_size) = (image.table_offset().unwrap(), image.block_size().unwrap());
    let block = block_size.block_at(sector);
    let place = image.bat().unwrap().place(block).unwrap_or_else(|| {
        let place = BlockPlace::from_sector(FileSector::containing(image.used_end())).unwrap();
        file.write_all_at(&image.footer().encode(), place.end(block_size).byte_offset()).unwrap();
        file.write_all_at(&[0; 512], place.sector().byte_offset()).unwrap();
        file.write_all_at(&place.entry().to_be_bytes(), table + u64::from(block.get()) * 4).unwrap();
        place
    });
    file.write_all_at(&[0xFF; 512], place.sector().byte_offset()).unwrap();
    let data = place.sector() + 1 + u64::from(block_size.sector_in_block(sector));
    file.write_all_at(&[byte; 512], data.byte_offset()).unwrap();
}

fn chains(block: u32) -> ChainFolder {
    let chains = ChainFolder::new();
    chains.dynamic("root", block, 10_000);
    chains.fill("root", &[(0, 19, 1), (3_000, 3_100, 1)]);
    chains.child("leaf", "root", block, 10_000);
    chains
}

#[test]
fn a_write_by_qemu_is_detected() {
    let chains = chains(BLOCK);
    qemu_writes(&chains, "leaf", 15, 7);
    // The block begins after the table: its first sectors are the rest of the table's page and the old footer.
    let defects = found(&chains, "leaf");
    assert!(
        matches!(defects[..], [Defect::ParentHidden { block, sector: 7, .. }] if block == BlockIndex::new(0)),
        "{defects:?}"
    );
    // A check without the parents cannot report defects that depend on their data.
    let leaf = Host.open(&chains.path("leaf"), Access::Read).unwrap();
    let alone = check(&Host, leaf, None, &[], &mut |_| Ok(())).unwrap().remove(0).defects;
    assert!(matches!(alone[..], [Defect::PlacedByAnother { .. }]), "{alone:?}");
}

#[test]
fn blocks_over_nothing_hide_nothing() {
    let chains = chains(BLOCK);
    qemu_writes(&chains, "leaf", 8_000, 7);
    assert_eq!(found(&chains, "leaf"), []);
    // The only sector that the parent has is overwritten with data; zeros lie over zeros.
    let chains = ChainFolder::new();
    chains.dynamic("root", BLOCK, 10_000);
    chains.fill("root", &[(2_000, 2_001, 1)]);
    chains.child("leaf", "root", BLOCK, 10_000);
    qemu_writes(&chains, "leaf", 2_000, 7);
    assert_eq!(found(&chains, "leaf"), []);
}

#[test]
fn zeroing_by_a_guest_is_not_taken_for_qemu() {
    let chains = chains(BLOCK);
    chains.fill("leaf", &[(0, 1024, 0), (2_048, 3_072, 0), (3_050, 3_051, 5)]);
    assert_eq!(found(&chains, "leaf"), []);
}

#[test]
fn parents_may_have_other_block_sizes() {
    let chains = ChainFolder::new();
    chains.dynamic("root", 4 << 10, 10_000);
    chains.fill("root", &[(3_001, 3_002, 1)]);
    chains.child("middle", "root", 2 << 20, 9_000);
    chains.fill("middle", &[(3_500, 3_501, 1), (8_999, 9_000, 1)]);
    chains.child("leaf", "middle", BLOCK, 10_000);
    qemu_writes(&chains, "leaf", 2_060, 7);
    qemu_writes(&chains, "leaf", 9_900, 7);
    qemu_writes(&chains, "leaf", 4_100, 7);
    let defects = found(&chains, "leaf");
    assert!(
        matches!(defects[..], [Defect::ParentHidden { block, sector: 953, .. }] if block == BlockIndex::new(2)),
        "{defects:?}"
    );
    // Without the root, the check reports only that another program placed the blocks.
    std::fs::rename(chains.path("root"), chains.path("elsewhere")).unwrap();
    let mut alone = checked(&chains, "leaf").remove(0).defects;
    alone.retain(|d| !matches!(d, Defect::ParentSize { .. }));
    assert!(matches!(alone[..], [Defect::PlacedByAnother { blocks: 3, .. }]), "{alone:?}");
}

#[test]
fn images_of_other_creators_get_only_a_note() {
    let chains = chains(BLOCK);
    qemu_writes(&chains, "leaf", 5, 7);
    for at in [0, std::fs::metadata(chains.path("leaf")).unwrap().len() - 512] {
        let file = HostFile::options().read(true).write(true).open(chains.path("leaf")).unwrap();
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, at).unwrap();
        let mut footer = crate::format::Footer::decode(&bytes).unwrap();
        footer.creator = *b"dutl";
        file.write_all_at(&footer.encode(), at).unwrap();
    }
    let defects = found(&chains, "leaf");
    assert!(
        matches!(defects[..], [Defect::ZerosOverParent { block, blocks: 1, .. }] if block == BlockIndex::new(0)),
        "{defects:?}"
    );
    assert_eq!(defects[0].severity(), Severity::Note);
}

#[test]
fn a_changed_parent_is_a_note() {
    let chains = chains(BLOCK);
    assert!(checked(&chains, "leaf")[0].defects.is_empty(), "the children record no time");
    let image = Image::open(Host.open(&chains.path("leaf"), Access::Read).unwrap()).unwrap();
    let file = HostFile::options().write(true).open(chains.path("leaf")).unwrap();
    let modified = Host.open(&chains.path("root"), Access::Read).unwrap().stat().unwrap().modified;
    let modified = time_from_unix(u64::try_from(modified).unwrap());
    let record = |time: u32| {
        let mut header = image.header().unwrap().clone();
        header.parent_timestamp = time;
        file.write_all_at(&header.encode(), image.footer().data_offset).unwrap();
        checked(&chains, "leaf").remove(0).defects
    };
    assert_eq!(record(modified - 1), [Defect::ParentChanged { recorded: modified - 1, found: modified }]);
    assert_eq!((record(modified), record(modified + 1)), (vec![], vec![]));
}
