//! Chains: O11 and O17 of the opener's rules. All files lie in one folder; parent_traps.rs tests parents outside this
//! folder.

use std::path::{Path, PathBuf};

use crate::common::vhd_bytes::{DIFFERENCING, DYNAMIC, VhdFile, VhdSpec, id, utf16le, write_file};
use crate::verdict::{Case, Expected};

/// Default maximum number of files in a chain.
pub(crate) const MAX_DEPTH: u8 = 64;

pub(crate) const BLOCK: u32 = 4096;
pub(crate) const SIZE: u64 = 16 * BLOCK as u64;

/// Creates `files` images, each the parent of the next. Blocks 0 and 1 of the root are allocated. Returns the leaf.
pub(crate) fn chain(dir: &Path, files: u8) -> PathBuf {
    let root =
        VhdFile::create(&dir.join("n0.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0, 1]).with_uuid(id(0)));
    (1..files).fold(root.path, |_, n| {
        let spec = VhdSpec::child(SIZE, BLOCK, id(n - 1), &format!("n{}.vhd", n - 1)).with_uuid(id(n));
        VhdFile::create(&dir.join(format!("n{n}.vhd")), spec).path
    })
}

/// Creates `files` differencing images in a cycle.
pub(crate) fn ring(dir: &Path, files: u8) -> PathBuf {
    for n in 0..files {
        let parent = (n + 1) % files;
        let spec = VhdSpec::child(SIZE, BLOCK, id(parent), &format!("r{parent}.vhd")).with_uuid(id(n));
        VhdFile::create(&dir.join(format!("r{n}.vhd")), spec);
    }
    dir.join("r0.vhd")
}

/// Creates a child `c.vhd` of `p.vhd`. `parent` creates `p.vhd`, which may be invalid, or creates nothing.
fn pair(dir: &Path, parent: impl Fn(&Path)) -> PathBuf {
    parent(&dir.join("p.vhd"));
    VhdFile::create(&dir.join("c.vhd"), VhdSpec::child(SIZE, BLOCK, id(1), "p.vhd")).path
}

/// Returns a case with a valid parent and child. The header of the child contains the name of the parent, and `add`
/// sets locators, or changes that name.
fn with_locator(name: &'static str, add: impl Fn(&VhdFile) + 'static) -> Case {
    Case::new(name, Expected::Accepted, move |dir| {
        VhdFile::create(&dir.join("p.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[3]));
        let child = VhdFile::create(&dir.join("c.vhd"), VhdSpec::child(SIZE, BLOCK, id(1), "p.vhd"));
        add(&child);
        child.path
    })
}

/// Expects that the chain is refused when it is opened. `info` accepts the leaf alone, and `check` finds at most a
/// defect of the leaf's parent strings.
pub(crate) fn refused_as_chain(words: &'static [&'static str]) -> Expected {
    Expected::ChainRefused { words, memory_mib: 64 }
}

pub(crate) fn cases() -> Vec<Case> {
    [depths(), parents(), locators()].into_iter().flatten().collect()
}

fn depths() -> Vec<Case> {
    let deep = refused_as_chain(&["deep", "depth", "64"]);
    let cycle = refused_as_chain(&["cycle", "loop", "itself", "twice", "own"]);
    vec![
        Case::new("O17 a chain one file below the limit", Expected::Accepted, |dir| chain(dir, MAX_DEPTH - 1)),
        Case::new("O17 a chain of as many files as may be", Expected::Accepted, |dir| chain(dir, MAX_DEPTH)),
        Case::new("O17 a chain of one file too many", deep, |dir| chain(dir, MAX_DEPTH + 1)),
        Case::new("O17 a chain of 250 files", deep, |dir| chain(dir, 250)),
        Case::new("O17 its own parent", cycle, |dir| ring(dir, 1)),
        Case::new("O17 two files, each the other's parent", cycle, |dir| ring(dir, 2)),
        Case::new("O17 a ring of three files", cycle, |dir| ring(dir, 3)),
        Case::new(
            "O17 a ring longer than the limit",
            refused_as_chain(&["cycle", "deep", "depth", "twice", "64"]),
            |dir| ring(dir, MAX_DEPTH + 10),
        ),
        Case::new("O17 one file under two names", cycle, |dir| {
            ring(dir, 1);
            std::fs::hard_link(dir.join("r0.vhd"), dir.join("other.vhd")).expect("a second name");
            dir.join("other.vhd")
        }),
        Case::new(
            "O17 a copy of the child as its parent",
            refused_as_chain(&["twice", "same", "cycle", "id"]),
            |dir| {
                let spec = VhdSpec::child(SIZE, BLOCK, id(2), "copy.vhd");
                let child = VhdFile::create(&dir.join("c.vhd"), spec);
                std::fs::copy(&child.path, dir.join("copy.vhd")).expect("a copy");
                child.path
            },
        ),
    ]
}

fn parents() -> Vec<Case> {
    let wrong = refused_as_chain(&["uuid", "id", "expected"]);
    let bad = refused_as_chain(&["p.vhd"]);
    vec![
        Case::new("O17 no parent there", refused_as_chain(&["parent"]), |dir| pair(dir, |_| ())),
        Case::new("O17 parent of another id", wrong, |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::dynamic(SIZE, BLOCK).with_uuid(id(9)))))
        }),
        Case::new("O17 parent's id differs in one bit", wrong, |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::dynamic(SIZE, BLOCK).with_uuid(id(0)))))
        }),
        Case::new("O17 parent is a text file", bad, |dir| pair(dir, |p| drop(write_file(p, &[b'x'; 4096])))),
        Case::new("O17 parent is empty", bad, |dir| pair(dir, |p| drop(write_file(p, b"")))),
        Case::new("O17 parent's header is broken", bad, |dir| {
            pair(dir, |p| VhdFile::create(p, VhdSpec::dynamic(SIZE, BLOCK)).put(520, &[7; 64]))
        }),
        Case::new("O17 grandparent is missing", refused_as_chain(&["parent", "gone.vhd"]), |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::child(SIZE, BLOCK, id(7), "gone.vhd").with_uuid(id(1)))))
        }),
        Case::new("O17 a child without any parent", refused_as_chain(&["parent"]), |dir| {
            let spec = VhdSpec { kind: DIFFERENCING, ..VhdSpec::dynamic(SIZE, BLOCK) };
            VhdFile::create(&dir.join("c.vhd"), spec).path
        }),
        Case::new("a dynamic image that names a parent has none", Expected::Accepted, |dir| {
            let spec = VhdSpec { kind: DYNAMIC, ..VhdSpec::child(SIZE, BLOCK, id(9), "missing.vhd") };
            VhdFile::create(&dir.join("c.vhd"), spec).path
        }),
        Case::new("a fixed parent", Expected::Accepted, |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::fixed(SIZE))))
        }),
        Case::new("a smaller parent of other blocks", Expected::Accepted, |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::dynamic(SIZE / 2 - 512, 2 * BLOCK).with_blocks(&[1]))))
        }),
        Case::new("a larger parent", Expected::Accepted, |dir| {
            pair(dir, |p| drop(VhdFile::create(p, VhdSpec::dynamic(SIZE * 2, BLOCK).with_blocks(&[30]))))
        }),
        Case::new(
            "O17 BATs of more than 128 MiB in a chain",
            Expected::ChainRefused { words: &["mib", "table", "bat", "memory"], memory_mib: 64 + 128 },
            |dir| {
                let root = VhdSpec::dynamic(16 << 30, BLOCK).with_uuid(id(0));
                let mut leaf = VhdFile::create(&dir.join("n0.vhd"), root).path;
                for n in 1..9 {
                    let spec = VhdSpec::child(16 << 30, BLOCK, id(n - 1), &format!("n{}.vhd", n - 1)).with_uuid(id(n));
                    leaf = VhdFile::create(&dir.join(format!("n{n}.vhd")), spec).path;
                }
                leaf
            },
        ),
    ]
}

fn locators() -> Vec<Case> {
    let longest = |len: usize| {
        // The path consists of whole `.\` components, with one more separator if the length is odd.
        let before = len / 2 - "p.vhd".len();
        ".\\".repeat(before / 2) + &"\\".repeat(before % 2) + "p.vhd"
    };
    vec![
        with_locator("O11 unknown platform", |c| {
            c.set_locator_data(0, b"ABCD", b"whatever");
        }),
        with_locator("O11 Mac alias", |c| {
            c.set_locator_data(3, b"Mac ", &[0xFF; 100]);
        }),
        with_locator("O11 data space 0", |c| {
            c.set_locator(0, b"W2ru", 0, 14, c.locators_at);
        }),
        with_locator("O11 data space no multiple of 512", |c| {
            c.set_locator(0, b"W2ru", 513, 14, c.locators_at);
        }),
        with_locator("O11 length 0", |c| {
            c.set_locator(0, b"W2ru", 512, 0, c.locators_at);
        }),
        with_locator("O11 length one more than a path may have", |c| {
            c.set_locator(0, b"W2ru", 8192, 4097, c.locators_at);
        }),
        with_locator("O11 length of all ones", |c| {
            c.set_locator(0, b"W2ru", u32::MAX, u32::MAX, 512);
        }),
        with_locator("O11 offset in the front footer", |c| {
            c.set_locator(1, b"W2ku", 512, 20, 100);
        }),
        with_locator("O11 offset at the end of the file", |c| {
            c.set_locator(1, b"W2ku", 512, 20, c.len());
        }),
        with_locator("O11 offset + length overflows", |c| {
            c.set_locator(1, b"W2ku", 512, 20, u64::MAX - 10);
        }),
        with_locator("O11 offset 2^63", |c| {
            c.set_locator(1, b"MacX", 512, 20, 1 << 63);
        }),
        with_locator("O11 length longer than its space", |c| {
            c.set_locator(0, b"W2ru", 512, 600, c.locators_at);
        }),
        with_locator("O11 odd length of UTF-16", |c| {
            c.set_locator_data(0, b"W2ru", &utf16le(".\\p.vhd")[..13]);
        }),
        with_locator("O11 lone surrogates", |c| {
            c.set_locator_data(0, b"W2ru", &[0x00, 0xD8, 0x41, 0, 0x00, 0xDC]);
        }),
        with_locator("O11 NULs only", |c| {
            c.set_locator_data(0, b"W2ru", &[0; 64]);
        }),
        with_locator("O11 NUL inside a path", |c| {
            c.set_locator_data(0, b"W2ru", &utf16le("p\0/q.vhd"));
        }),
        with_locator("O11 bytes that are no UTF-8", |c| {
            c.set_locator_data(0, b"MacX", b"file://\xFF\xFE\x80p.vhd");
        }),
        with_locator("O11 broken percent signs", |c| {
            c.set_locator_data(0, b"MacX", b"file://./%zz%%2");
        }),
        with_locator("O11 a right path after seven wrong ones", |c| {
            for slot in 0..7 {
                c.set_locator_data(slot, b"W2ru", &utf16le(&format!(".\\no{slot}.vhd")));
            }
            c.set_locator_data(7, b"W2ru", &utf16le(".\\p.vhd")).set_parent_name(&[]);
        }),
        with_locator("O11 a path as long as a sector", move |c| {
            c.set_locator_data(0, b"W2ru", &utf16le(&longest(512))).set_parent_name(&[]);
        }),
    ]
}
