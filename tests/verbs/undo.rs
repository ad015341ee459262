//! `check --undo`, killed at every failpoint and run again: afterwards the image has the same bytes as before the
//! repair.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::temp::scratch;
use crate::common::tool::diffdisk;
use crate::common::vhd_bytes::{VhdFile, VhdSpec};
use crate::failpoints;

/// An image before and after its repair, and the undo file.
struct Repaired {
    path: PathBuf,
    broken: Vec<u8>,
    mended: Vec<u8>,
    undo: PathBuf,
    kept: Vec<u8>,
}

fn repaired(folder: &Path, name: &str, break_it: fn(&VhdFile)) -> Repaired {
    let spec = VhdSpec::dynamic(64 << 10, 4096).with_entries(200).with_blocks(&[3, 1, 2]);
    let vhd = VhdFile::create(&folder.join(name), spec);
    break_it(&vhd);
    let broken = fs::read(&vhd.path).expect("the image");
    diffdisk(["check", vhd.path.to_str().expect("text"), "--repair"]).ok();
    let files = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let is_undo = |path: &PathBuf| {
        path.extension().is_some_and(|e| e == "undo") && path.display().to_string().contains(&format!("/{name}."))
    };
    let undo = files.into_iter().find(is_undo).expect("an undo file");
    let (mended, kept) = (fs::read(&vhd.path).expect("the image"), fs::read(&undo).expect("what was kept"));
    Repaired { path: vhd.path, broken, mended, undo, kept }
}

/// Damages an image: a wrong footer at the start, BAT entries of 0, a block beyond the end of the disk, a leak at the
/// end.
fn many_defects(vhd: &VhdFile) {
    vhd.set_entry(5, 0).set_entry(130, 0);
    let footer = fs::read(&vhd.path).expect("the image").split_off(usize::try_from(vhd.footer_at).expect("small"));
    vhd.put(vhd.footer_at, &vec![0xAB; 40_000]);
    let behind = (vhd.footer_at + 8192).next_multiple_of(512);
    vhd.set_entry(150, u32::try_from(behind / 512).expect("a place"));
    vhd.put((vhd.footer_at + 40_000).next_multiple_of(512), &footer);
    vhd.put(100, b"x");
}

/// Removes the trailing footer, and sets a BAT entry to 0.
fn missing_trailing_footer(vhd: &VhdFile) {
    vhd.set_entry(7, 0).set_len(vhd.footer_at);
}

#[test]
fn a_killed_undo_is_completed_by_the_next() {
    let mut kills = 0;
    for break_it in [many_defects as fn(&VhdFile), missing_trailing_footer] {
        let scratch = scratch("undo");
        let made = repaired(scratch.path(), "disk.vhd", break_it);
        let args = || ["check", made.path.to_str().expect("text"), "--undo", made.undo.to_str().expect("text")];
        assert!(made.broken != made.mended);
        for point in failpoints::of("undo") {
            for count in 1.. {
                fs::write(&made.path, &made.mended).expect("it is written");
                fs::write(&made.undo, &made.kept).expect("it is written");
                let killed = failpoints::killed(&point, count, args());
                if killed && point != "undo.done" {
                    let again = diffdisk(args());
                    assert_eq!(again.code, Some(0), "{point}:{count}: {}", again.stderr);
                }
                assert!(fs::read(&made.path).expect("the image") == made.broken, "{point}:{count}: other bytes");
                let twice = diffdisk(args());
                assert!(twice.code == Some(1) && twice.stderr.contains("applied already"), "{}", twice.stderr);
                kills += u32::from(killed);
                if !killed {
                    break;
                }
            }
        }
    }
    println!("{kills} kills");
    assert!(kills > 8, "{kills} kills");
}

#[test]
fn an_undo_is_refused_for_another_or_changed_image() {
    let scratch = scratch("undo");
    let made = repaired(scratch.path(), "disk.vhd", many_defects);
    let refused = |image: &Path, undo: &Path, why: &str| {
        let before = fs::read(image).expect("the image");
        let done = diffdisk(["check".as_ref(), image, "--undo".as_ref(), undo]);
        assert!(done.code == Some(1) && done.stderr.contains(why), "{why}: {}", done.stderr);
        assert!(fs::read(image).expect("the image") == before, "{why}: the image was changed");
    };
    // The undo file is applied to another image.
    let other = VhdFile::create(&scratch.path().join("other.vhd"), VhdSpec::fixed(4096).with_uuid([9; 16]));
    refused(&other.path, &made.undo, "another image");
    refused(&made.path, &other.path, "not an undo file");
    // The image has changed since the repair: a BAT entry, a byte of the footer, the length.
    let image = fs::File::options().write(true).open(&made.path).expect("it opens");
    let put =
        |at: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&image, bytes, at).expect("it is written");
    for (at, byte) in [(1536 + 4 * 150, 0), (100, b'y'), (made.mended.len() as u64, 1)] {
        put(at, &[byte]);
        refused(&made.path, &made.undo, "changed since");
        fs::write(&made.path, &made.mended).expect("it is written");
    }
    // The undo has begun, and the image has changed since then.
    let mut kept = made.kept.clone();
    kept[48..56].copy_from_slice(&2_u64.to_be_bytes());
    fs::write(&made.undo, &kept).expect("it is written");
    put(100, b"y");
    refused(&made.path, &made.undo, "changed since");
    fs::write(&made.path, &made.mended).expect("it is written");
    // The undo file is incomplete, or has invalid offsets and lengths.
    kept[48..56].fill(0);
    fs::write(&made.undo, &kept).expect("it is written");
    refused(&made.path, &made.undo, "not finished");
    for (at, number) in [(24, u64::MAX), (72, u64::MAX), (24, 513), (520, u64::MAX), (512, u64::MAX)] {
        let mut kept = made.kept.clone();
        kept[at..at + 8].copy_from_slice(&number.to_be_bytes());
        fs::write(&made.undo, &kept).expect("it is written");
        refused(&made.path, &made.undo, "undo file");
    }
}
