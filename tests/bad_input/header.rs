//! The dynamic header: O6 to O10 of the opener's rules.

use std::os::unix::fs::FileExt;

use crate::common::vhd_bytes::{BAT_OFFSET, HEADER_OFFSET, VhdFile, VhdSpec, footer, header};
use crate::verdict::{Case, ErrorLocation, Expected, corrupt};

const SIZE: u64 = 4 << 20;
const BLOCK: u32 = 2 << 20;

fn dynamic(dir: &std::path::Path) -> VhdFile {
    VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[1]))
}

/// Returns a case with one changed field of the header.
fn with_field(name: &'static str, want: Expected, field: u64, bytes: &'static [u8]) -> Case {
    Case::new(name, want, move |dir| dynamic(dir).set_header(field, bytes).path.clone())
}

/// Returns a case in which the footers contain another offset of the header.
fn header_at(name: &'static str, place: impl Fn(&VhdFile) -> u64 + 'static) -> Case {
    let want = corrupt(ErrorLocation::Footer, &["header", "data offset"]);
    Case::new(name, want, move |dir| {
        let vhd = dynamic(dir);
        vhd.set_footers(footer::DATA_OFFSET, &place(&vhd).to_be_bytes()).path.clone()
    })
}

/// Returns a case in which the header contains another offset of the BAT.
fn table_at(name: &'static str, place: impl Fn(&VhdFile) -> u64 + 'static) -> Case {
    let want = corrupt(ErrorLocation::Header, &["table", "bat"]);
    Case::new(name, want, move |dir| {
        let vhd = dynamic(dir);
        vhd.set_header(header::TABLE_OFFSET, &place(&vhd).to_be_bytes()).path.clone()
    })
}

/// Returns a case in which the header contains a wrong block size.
fn block_claimed(name: &'static str, bytes: u32) -> Case {
    let want = Expected::Refused { check: &[1, 3], words: &["block size"], place: ErrorLocation::Header };
    Case::new(name, want, move |dir| dynamic(dir).set_header(header::BLOCK_SIZE, &bytes.to_be_bytes()).path.clone())
}

/// Returns a case with an image of a given block size.
fn block_real(name: &'static str, size: u64, bytes: u32) -> Case {
    Case::new(name, Expected::Accepted, move |dir| {
        let blocks: &[u32] = if bytes <= BLOCK { &[0] } else { &[] };
        VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(size, bytes).with_blocks(blocks)).path
    })
}

/// Returns a case in which the header contains a wrong number of BAT entries.
fn entries(name: &'static str, count: u32) -> Case {
    let want = Expected::Refused { check: &[1, 3], words: &["entries", "table", "bat"], place: ErrorLocation::Header };
    Case::new(name, want, move |dir| dynamic(dir).set_header(header::ENTRIES, &count.to_be_bytes()).path.clone())
}

pub(crate) fn cases() -> Vec<Case> {
    [places(), identity(), blocks(), counts(), tables()].into_iter().flatten().collect()
}

fn places() -> Vec<Case> {
    vec![
        header_at("O6 header at 0", |_| 0),
        header_at("O6 header at 1", |_| 1),
        header_at("O6 header at 511", |_| 511),
        header_at("O6 header at 513", |_| 513),
        header_at("O6 header at 1000", |_| 1000),
        header_at("O6 header a sector too near the end", |vhd| vhd.len() - 512),
        header_at("O6 header at the end", VhdFile::len),
        header_at("O6 header a mebibyte after the end", |vhd| vhd.len() + (1 << 20)),
        header_at("O6 header's end overflows", |_| u64::MAX - 511),
        header_at("O6 no header, as in a fixed disk", |_| u64::MAX),
        header_at("O6 header at 2^63", |_| 1 << 63),
        Case::new("O6 header after the BAT", Expected::Accepted, |dir| {
            let vhd = dynamic(dir);
            let mut moved = [0; 1024];
            vhd.file.read_exact_at(&mut moved, HEADER_OFFSET).expect("its header");
            vhd.put(HEADER_OFFSET, &[0; 1024]);
            vhd.put(vhd.locators_at, &moved);
            vhd.set_footers(footer::DATA_OFFSET, &vhd.locators_at.to_be_bytes()).path.clone()
        }),
    ]
}

fn identity() -> Vec<Case> {
    let version = corrupt(ErrorLocation::Header, &["version"]);
    vec![
        with_field(
            "O7 header cookie",
            corrupt(ErrorLocation::Header, &["cookie", "cxsparse", "header"]),
            0,
            b"cxsparsE",
        ),
        with_field(
            "O7 header is zeros",
            corrupt(ErrorLocation::Header, &["cookie", "cxsparse", "header"]),
            0,
            &[0; 1024],
        ),
        Case::new("O7 header checksum", corrupt(ErrorLocation::Header, &["checksum"]), |dir| {
            let vhd = dynamic(dir);
            vhd.put(HEADER_OFFSET + header::CHECKSUM, &[1, 2, 3, 4]);
            vhd.path
        }),
        Case::new("O7 one bit of the header", corrupt(ErrorLocation::Header, &["checksum"]), |dir| {
            let vhd = dynamic(dir);
            vhd.put(HEADER_OFFSET + 1023, &[1]);
            vhd.path
        }),
        with_field("O7 version 0", version, header::VERSION, &[0; 4]),
        with_field("O7 version 2", version, header::VERSION, &[0, 2, 0, 0]),
        with_field(
            "O6 header's own data offset names itself",
            Expected::Accepted,
            header::DATA_OFFSET,
            &[0, 0, 0, 0, 0, 0, 2, 0],
        ),
        with_field(
            "O6 header's own data offset has 32 ones",
            Expected::Accepted,
            header::DATA_OFFSET,
            &[0, 0, 0, 0, 255, 255, 255, 255],
        ),
        with_field("reserved bytes of the header are not zero", Expected::Accepted, 768, &[0xAA; 256]),
    ]
}

fn blocks() -> Vec<Case> {
    vec![
        block_claimed("O8 block size 0", 0),
        block_claimed("O8 block size 1", 1),
        block_claimed("O8 block size 511", 511),
        block_claimed("O8 block size 2 KiB, under the default limit", 2048),
        block_claimed("O8 block size 4095", 4095),
        block_real("O8 block size 4 KiB", 64 << 10, 4096),
        block_claimed("O8 block size 4097", 4097),
        block_claimed("O8 block size 3 MiB", 3 << 20),
        block_real("O8 block size 4 MiB", SIZE, 4 << 20),
        block_claimed("O8 block size 256 MiB less one", (256 << 20) - 1),
        block_real("O8 block size 256 MiB", 512 << 20, 256 << 20),
        block_claimed("O8 block size 512 MiB", 512 << 20),
        block_claimed("O8 block size 2 GiB", 1 << 31),
        block_claimed("O8 block size of all ones", u32::MAX),
    ]
}

fn counts() -> Vec<Case> {
    /// Size in bytes of a disk whose BAT takes exactly 16 MiB with blocks of 4 KiB.
    const FULL: u64 = 16 << 30;
    let more = |count: u32| VhdSpec::dynamic(SIZE, BLOCK).with_entries(count);
    let limit = Expected::Refused {
        check: &[1, 3],
        words: &["mib", "entries", "table", "bat", "limit"],
        place: ErrorLocation::Nowhere,
    };
    vec![
        entries("O9 no entries", 0),
        entries("O9 an entry too few", 1),
        Case::new("O9 an entry more than needed", Expected::Accepted, move |dir| {
            VhdFile::create(&dir.join("d.vhd"), more(3)).path
        }),
        Case::new("O9 as many entries as XenServer reserves", Expected::Accepted, move |dir| {
            VhdFile::create(&dir.join("d.vhd"), more(1 << 20)).path
        }),
        entries("O9 entries * 4 is 2^32", 1 << 30),
        entries("O9 entries * 4 wraps to 4", (1 << 30) + 1),
        entries("O9 entries of all ones", u32::MAX),
        entries("O9 entries * block size wraps to the disk's size", 0x8000_0002),
        Case::new("O9 BAT of 16 MiB less an entry", Expected::Accepted, |dir| {
            VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(FULL - 4096, 4096)).path
        }),
        Case::new("O9 BAT of 16 MiB", Expected::Accepted, |dir| {
            VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(FULL, 4096)).path
        }),
        Case::new("O9 BAT of 16 MiB and an entry", limit, |dir| {
            VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(FULL + 4096, 4096)).path
        }),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        table_at("O10 BAT at 0", |_| 0),
        table_at("O10 BAT at 1", |_| 1),
        table_at("O10 BAT over the header", |_| HEADER_OFFSET),
        table_at("O10 BAT over the header's second half", |_| HEADER_OFFSET + 512),
        table_at("O10 BAT a byte before its place", |_| BAT_OFFSET - 1),
        table_at("O10 BAT a byte after its place", |_| BAT_OFFSET + 1),
        table_at("O10 BAT 256 bytes after its place", |_| BAT_OFFSET + 256),
        table_at("O10 BAT at the end of the file", VhdFile::len),
        table_at("O10 BAT far after the end", |_| 1 << 40),
        table_at("O10 BAT's end overflows", |_| u64::MAX - 511),
        table_at("O10 BAT at 2^63", |_| 1 << 63),
        Case::new("O10 BAT a sector later", Expected::Accepted, |dir| {
            let vhd = dynamic(dir);
            let mut table = [0; 512];
            vhd.file.read_exact_at(&mut table, BAT_OFFSET).expect("its BAT");
            vhd.put(BAT_OFFSET, &[0; 512]);
            vhd.put(BAT_OFFSET + 512, &table);
            vhd.set_header(header::TABLE_OFFSET, &(BAT_OFFSET + 512).to_be_bytes()).path.clone()
        }),
        Case::new(
            "O10 BAT's last sector is cut off",
            corrupt(ErrorLocation::Header, &["table", "bat", "footer"]),
            |dir| {
                // The BAT has 16 sectors. The file ends after the eighth, which contains the footer.
                let vhd = VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(2048 << 12, 4096));
                let mut copy = [0; 512];
                vhd.file.read_exact_at(&mut copy, 0).expect("its footer");
                vhd.put(BAT_OFFSET + 7 * 512, &copy);
                vhd.set_len(BAT_OFFSET + 8 * 512).path.clone()
            },
        ),
    ]
}
