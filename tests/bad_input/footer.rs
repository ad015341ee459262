//! The footer: O2 to O5 and O16 of the opener's rules.

use std::path::{Path, PathBuf};

use crate::common::vhd_bytes::{DYNAMIC, UNUSED, VhdFile, VhdSpec, footer, write_file};
use crate::verdict::{Case, ErrorLocation::Footer, Expected, corrupt, refused};

/// Maximum size in bytes of a disk in this format.
const MAX_SIZE: u64 = 2040 << 30;
const SIZE: u64 = 4 << 20;
const BLOCK: u32 = 2 << 20;

fn dynamic(dir: &Path) -> VhdFile {
    VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[1]))
}

fn fixed(dir: &Path, size: u64) -> VhdFile {
    VhdFile::create(&dir.join("f.vhd"), VhdSpec::fixed(size))
}

/// Returns a case with a dynamic image in which one field of both footers is changed.
fn with_field(name: &'static str, want: Expected, field: u64, bytes: &'static [u8]) -> Case {
    Case::new(name, want, move |dir| dynamic(dir).set_footers(field, bytes).path.clone())
}

/// Returns a case with a dynamic image of a given size and a BAT of the required length.
fn sized(name: &'static str, want: Expected, size: u64) -> Case {
    Case::new(name, want, move |dir| VhdFile::create(&dir.join("d.vhd"), VhdSpec::dynamic(size, BLOCK)).path)
}

/// Returns a case with a dynamic image whose size field has a wrong value.
fn claimed(name: &'static str, want: Expected, size: u64) -> Case {
    Case::new(name, want, move |dir| dynamic(dir).set_footers(footer::SIZE, &size.to_be_bytes()).path.clone())
}

/// Returns a case with a file that is not an image.
fn junk(name: &'static str, bytes: impl Fn() -> Vec<u8> + 'static) -> Case {
    Case::new(name, NO_FOOTER, move |dir| write_file(&dir.join("junk.vhd"), &bytes()))
}

const NO_FOOTER: Expected = Expected::Refused {
    check: &[1, 3],
    words: &["footer", "too short", "too small", "not a vhd"],
    place: crate::verdict::ErrorLocation::Nowhere,
};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(lengths());
    cases.extend(identity());
    cases.extend(copies());
    cases.extend(sizes());
    cases
}

fn lengths() -> Vec<Case> {
    let short = corrupt(Footer, &["short", "smaller", "truncated", "beyond", "hold", "size"]);
    let cut = |bytes: u64| {
        move |dir: &Path| -> PathBuf {
            let vhd = fixed(dir, SIZE);
            // The footer at the new end still contains SIZE.
            let mut footer = vec![0; 512];
            std::os::unix::fs::FileExt::read_exact_at(&vhd.file, &mut footer, vhd.footer_at).expect("its footer");
            vhd.put(vhd.footer_at - bytes, &footer);
            vhd.set_len(vhd.footer_at - bytes + 512).path.clone()
        }
    };
    vec![
        junk("O2 empty file", Vec::new),
        junk("O2 one byte", || vec![0]),
        junk("O2 511 zero bytes", || vec![0; 511]),
        junk("O2 512 zero bytes", || vec![0; 512]),
        junk("O4 a mebibyte of zeros", || vec![0; 1 << 20]),
        junk("O4 a mebibyte of ones", || vec![0xFF; 1 << 20]),
        junk("O4 a text file", || b"root:x:0:0:root:/root:/bin/sh\n".repeat(100)),
        junk("O4 a qcow2 image", || [&b"QFI\xfb\0\0\0\x03"[..], &[0; 4096]].concat()),
        Case::new("O2 fixed, whole", Expected::Accepted, |dir| fixed(dir, SIZE).path),
        Case::new("O2 fixed of one sector", Expected::Accepted, |dir| fixed(dir, 512).path),
        Case::new("O2 fixed, one sector short", short, cut(512)),
        Case::new("O2 fixed, one byte more than a 511-byte footer short", short, cut(2)),
        Case::new("O2 fixed, all data missing", short, cut(SIZE)),
        Case::new("O3 fixed with a 511-byte footer", Expected::Readable, |dir| {
            let vhd = fixed(dir, SIZE);
            vhd.set_len(SIZE + 511).path.clone()
        }),
        Case::new("O2 fixed with a 510-byte footer", NO_FOOTER, |dir| {
            let vhd = fixed(dir, SIZE);
            vhd.set_len(SIZE + 510).path.clone()
        }),
        Case::new("O4 fixed disk's data offset is not followed", Expected::Accepted, |dir| {
            fixed(dir, SIZE).set_footers(footer::DATA_OFFSET, &0_u64.to_be_bytes()).path.clone()
        }),
    ]
}

fn identity() -> Vec<Case> {
    let version = corrupt(Footer, &["version"]);
    let kind = corrupt(Footer, &["type"]);
    let broken_sum = |copies: fn(&VhdFile) -> Vec<u64>| {
        move |dir: &Path| -> PathBuf {
            let vhd = dynamic(dir);
            for at in copies(&vhd) {
                vhd.put(at + footer::CHECKSUM, &[1, 2, 3, 4]);
            }
            vhd.path
        }
    };
    vec![
        with_field("O4 cookie in the wrong case", NO_FOOTER, 0, b"Conectix"),
        with_field("O4 cookie of the header", NO_FOOTER, 0, b"cxsparse"),
        with_field("O4 cookie of a resize that was interrupted", corrupt(Footer, &["resize"]), 0, b"v_poison"),
        Case::new("O4 fixed with a broken cookie", NO_FOOTER, |dir| {
            fixed(dir, SIZE).set_footers(0, b"conectiX").path.clone()
        }),
        Case::new("O4 both checksums wrong", corrupt(Footer, &["checksum"]), broken_sum(|vhd| vhd.footer_copies())),
        Case::new("O3 trailing checksum wrong", Expected::Readable, broken_sum(|vhd| vec![vhd.footer_at])),
        Case::new("O3 front checksum wrong", Expected::Readable, broken_sum(|_| vec![0])),
        with_field("O4 version 0", version, footer::VERSION, &[0, 0, 0, 0]),
        with_field("O4 version 0.FFFF", version, footer::VERSION, &[0, 0, 0xFF, 0xFF]),
        with_field("O4 version 1.FFFF", Expected::Readable, footer::VERSION, &[0, 1, 0xFF, 0xFF]),
        with_field("O4 version 2", version, footer::VERSION, &[0, 2, 0, 0]),
        with_field("O4 type 0", kind, footer::TYPE, &[0, 0, 0, 0]),
        with_field("O4 type 1", kind, footer::TYPE, &[0, 0, 0, 1]),
        with_field("O4 type 5", kind, footer::TYPE, &[0, 0, 0, 5]),
        with_field("O4 type 6", kind, footer::TYPE, &[0, 0, 0, 6]),
        with_field("O4 type of all ones", kind, footer::TYPE, &[0xFF; 4]),
        with_field("O16 saved state", Expected::ReadOnly, footer::SAVED_STATE, &[1]),
        with_field("O16 hidden", Expected::ReadOnly, footer::HIDDEN, &[1]),
    ]
}

fn copies() -> Vec<Case> {
    vec![
        Case::new("O3 trailing footer missing", Expected::Readable, |dir| {
            let vhd = dynamic(dir);
            vhd.set_len(vhd.footer_at).path.clone()
        }),
        Case::new("O3 trailing footer overwritten", Expected::Readable, |dir| {
            let vhd = dynamic(dir);
            vhd.put(vhd.footer_at, &[0xC7; 512]);
            vhd.path
        }),
        Case::new("O3 both footers missing", NO_FOOTER, |dir| {
            let vhd = dynamic(dir);
            vhd.put(0, &[0; 512]);
            vhd.set_len(vhd.footer_at).path.clone()
        }),
        // An interrupted resize leaves such footers. The next open for writing completes the resize.
        Case::new("O3 valid footers of different size", Expected::Readable, |dir| {
            let vhd = dynamic(dir);
            vhd.set_footer(0, footer::SIZE, &(SIZE - 512).to_be_bytes()).path.clone()
        }),
        Case::new("O3 valid footers of different identity", Expected::ReadOnly, |dir| {
            let vhd = dynamic(dir);
            vhd.set_footer(0, footer::UUID, &[9; 16]).path.clone()
        }),
        Case::new("O3 a guest forged a dynamic image into its fixed disk", Expected::Accepted, |dir| {
            let vhd = fixed(dir, SIZE);
            let forged =
                VhdFile::create(&dir.join("forged"), VhdSpec { kind: DYNAMIC, ..VhdSpec::dynamic(SIZE, BLOCK) });
            forged.set_entry(0, 0).set_entry(1, UNUSED);
            let mut head = vec![0; 2048];
            std::os::unix::fs::FileExt::read_exact_at(&forged.file, &mut head, 0).expect("its head");
            vhd.put(0, &head);
            vhd.path
        }),
        Case::new("O3 trailing footer says dynamic, front holds nothing", Expected::Readable, |dir| {
            let vhd = dynamic(dir);
            vhd.put(0, &[0; 512]);
            vhd.path
        }),
    ]
}

fn sizes() -> Vec<Case> {
    let multiple = corrupt(Footer, &["512", "sector", "multiple"]);
    let large = Expected::Refused { check: &[1, 3], words: &["2040", "large", "limit", "size"], place: Footer };
    vec![
        claimed("O5 size 0", corrupt(Footer, &["size", "512", "empty"]), 0),
        claimed("O5 size 1", multiple, 1),
        claimed("O5 size 511", multiple, 511),
        sized("O5 size 512", Expected::Accepted, 512),
        claimed("O5 size 513", multiple, 513),
        claimed("O5 size 1 byte less than whole sectors", multiple, SIZE - 1),
        sized("O5 size 2040 GiB less a sector", Expected::Accepted, MAX_SIZE - 512),
        sized("O5 size 2040 GiB", Expected::Accepted, MAX_SIZE),
        sized("O5 size 2040 GiB and a sector", large, MAX_SIZE + 512),
        claimed("O5 size 2^63", large, 1 << 63),
        claimed("O5 largest size of whole sectors", large, u64::MAX - 511),
        Case::new("O5 fixed of size 0", refused(&["size", "512", "empty", "short", "small"]), |dir| fixed(dir, 0).path),
    ]
}
