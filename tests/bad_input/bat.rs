//! BAT entries and the blocks that they point to: O12 to O15 of the opener's rules.

use std::path::{Path, PathBuf};

use crate::common::vhd_bytes::{BAT_OFFSET, VhdFile, VhdSpec, footer};
use crate::verdict::{Case, ErrorLocation::Table, Expected, corrupt};

const BLOCK: u32 = 64 << 10;
const SIZE: u64 = 8 * BLOCK as u64;

/// Creates an image with blocks 0, 2 and 5, stored one after another.
fn dynamic(dir: &Path) -> VhdFile {
    VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0, 2, 5]))
}

fn sector(at: u64) -> u32 {
    u32::try_from(at / 512).expect("a BAT entry")
}

/// Returns a case in which the BAT entry of block 7 is set to a given sector.
fn entry(name: &'static str, want: Expected, place: impl Fn(&VhdFile) -> u32 + 'static) -> Case {
    Case::new(name, want, move |dir| {
        let vhd = dynamic(dir);
        vhd.set_entry(7, place(&vhd)).path.clone()
    })
}

/// Creates an image as XenServer does, with a batmap after the BAT. A `keyhash` of 1 marks the image as encrypted.
fn with_batmap(dir: &Path, keyhash: u8) -> VhdFile {
    let vhd = VhdFile::create(&dir.join("t.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
    vhd.set_footers(footer::CREATOR, b"tap\0").set_footers(footer::CREATOR_VERSION, &0x0001_0003_u32.to_be_bytes());
    let (head, map) = (vhd.locators_at, vhd.locators_at + 512);
    vhd.put(head, b"tdbatmap");
    vhd.put(head + 8, &map.to_be_bytes());
    vhd.put(head + 16, &1_u32.to_be_bytes());
    vhd.put(head + 20, &0x0001_0002_u32.to_be_bytes());
    // This is the checksum of a map of zeros.
    vhd.put(head + 24, &u32::MAX.to_be_bytes());
    vhd.put(head + 29, &[keyhash]);
    vhd
}

fn table_cut(dir: &Path, bytes: u64) -> PathBuf {
    let vhd = dynamic(dir);
    vhd.set_len(vhd.footer_at - bytes).path.clone()
}

pub(crate) fn cases() -> Vec<Case> {
    [places(), overlaps(), extensions()].into_iter().flatten().collect()
}

fn places() -> Vec<Case> {
    let inside = corrupt(Table, &["metadata", "header", "footer", "table", "overlap", "before"]);
    let beyond = corrupt(Table, &["beyond", "end", "outside", "past", "lost"]);
    vec![
        Case::new("O12 blocks where they may be", Expected::Accepted, |dir| dynamic(dir).path),
        entry("O12 an entry of 0, which can only mean unused", Expected::Readable, |_| 0),
        entry("O12 block over the header", inside, |_| 1),
        entry("O12 block over the header's end", inside, |_| 2),
        entry("O12 block over the BAT", inside, |_| sector(BAT_OFFSET)),
        Case::new("O12 a block's bitmap directly after the BAT", Expected::Accepted, |dir| {
            let vhd = VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
            vhd.put(vhd.locators_at, &[0xFF; 512]);
            vhd.set_entry(0, sector(vhd.locators_at)).path.clone()
        }),
        Case::new("O12 block over a locator's data", inside, |dir| {
            crate::common::vhd_bytes::write_file(&dir.join("p.vhd"), b"");
            let parent = crate::common::vhd_bytes::id(1);
            VhdFile::create(&dir.join("p.vhd"), VhdSpec::dynamic(SIZE, BLOCK));
            let vhd =
                VhdFile::create(&dir.join("c.vhd"), VhdSpec::child(SIZE, BLOCK, parent, "p.vhd").with_blocks(&[0]));
            vhd.set_locator_data(0, b"W2ru", &crate::common::vhd_bytes::utf16le(".\\p.vhd"));
            vhd.set_entry(1, sector(vhd.locators_at)).path.clone()
        }),
        entry("O12 block at the end of the file", beyond, |vhd| sector(vhd.len())),
        entry("O12 block far after the end", beyond, |_| 0x0100_0000),
        entry("O12 block at 2^31 sectors", beyond, |_| 0x8000_0000),
        entry("O12 block at the last sector an entry can name", beyond, |_| 0xFFFF_FFFE),
        Case::new("O12 the last block lacks present sectors and the footer is missing", beyond, |dir| {
            table_cut(dir, 4096)
        }),
        Case::new("O12 two blocks and the footer are cut off", beyond, |dir| {
            table_cut(dir, 2 * u64::from(BLOCK) + 1024)
        }),
    ]
}

fn overlaps() -> Vec<Case> {
    let overlap = corrupt(Table, &["overlap", "twice", "same", "duplicate", "share"]);
    vec![
        entry("O13 two entries name one block", overlap, |vhd| sector(vhd.blocks_at)),
        entry("O13 blocks overlap by all but a sector", overlap, |vhd| sector(vhd.blocks_at) + 1),
        entry("O13 blocks overlap by a sector", overlap, |vhd| sector(vhd.blocks_at + vhd.stride()) - 1),
        entry("O13 the last block overlaps one between", overlap, |vhd| sector(vhd.blocks_at + vhd.stride() + 512)),
        Case::new("O13 all entries name one block", overlap, |dir| {
            let vhd = dynamic(dir);
            for block in 0..8 {
                vhd.set_entry(block, sector(vhd.blocks_at));
            }
            vhd.path
        }),
        Case::new("O13 blocks in reverse order", Expected::Accepted, |dir| {
            VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[7, 6, 3, 1, 0])).path
        }),
        Case::new("O13 a sector between two blocks", Expected::Accepted, |dir| {
            let vhd = dynamic(dir);
            // Block 5 moves by one sector. Its old bitmap becomes the gap; its new bitmap is all zeros.
            let at = vhd.blocks_at + 2 * vhd.stride();
            let mut last = [0; 512];
            std::os::unix::fs::FileExt::read_exact_at(&vhd.file, &mut last, vhd.footer_at).expect("its footer");
            vhd.put(at + 512, &[0; 512]);
            vhd.put(at + 1024, &vec![0; usize::try_from(BLOCK).expect("small")]);
            vhd.put(vhd.footer_at + 512, &last);
            vhd.set_entry(5, sector(at + 512)).path.clone()
        }),
        Case::new("padding of the BAT is zero, as XenServer leaves it", Expected::Accepted, |dir| {
            let vhd = dynamic(dir);
            vhd.put(BAT_OFFSET + 32, &[0; 512 - 32]);
            vhd.path
        }),
        Case::new("an entry after the disk's end means nothing", Expected::Readable, |dir| {
            let spec = VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]).with_entries(9);
            VhdFile::create(&dir.join("d.vhd"), spec).set_entry(8, 0).path.clone()
        }),
        Case::new("bits after the end of a block and of the disk", Expected::Accepted, |dir| {
            let vhd = VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE - 512, BLOCK).with_blocks(&[7]));
            vhd.put(vhd.blocks_at, &[0xFF; 512]);
            vhd.path
        }),
    ]
}

fn extensions() -> Vec<Case> {
    vec![
        Case::new("O15 XenServer's batmap", Expected::Accepted, |dir| with_batmap(dir, 0).path),
        Case::new(
            "O15 XenServer's key hash",
            Expected::Refused { check: &[1, 3], words: &["encrypt", "key"], place: Table },
            |dir| with_batmap(dir, 1).path,
        ),
        Case::new("O15 block over the batmap's header", corrupt(Table, &["batmap", "metadata", "overlap"]), |dir| {
            let vhd = with_batmap(dir, 0);
            vhd.set_entry(3, sector(vhd.locators_at)).path.clone()
        }),
        Case::new("O15 block over the batmap", corrupt(Table, &["batmap", "metadata", "overlap"]), |dir| {
            let vhd = with_batmap(dir, 0);
            vhd.set_entry(0, sector(vhd.locators_at + 512)).path.clone()
        }),
    ]
}
