//! Truncated images: small images of every type, cut at every 512 bytes and inside sectors. Each verb, and each open
//! that serves a disk, shows the guest's data or refuses the image; no repair makes other bytes visible.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::chain::{Chain, OpenMode, Policy};
use diffdisk::disk::{self, DiskOptions};
use diffdisk::image::Durability;
use diffdisk::ops::create::{ChildSpec, Locators};
use diffdisk::ops::{self, convert, salvage};
use diffdisk::storage::host::Host;
use diffdisk::units::SECTOR;

use crate::common::pattern;
use crate::common::temp::scratch;
use crate::common::tool::lock_spawns;
use crate::common::vhd_bytes::{VhdFile, VhdSpec, id};
use crate::fixture::{Fill, Fixture};

const DISK: u64 = 6 * 4096 + 1024;
const PARENT: &str = "parent.vhd";

/// The files of a chain, and the name of the file to cut.
struct TruncationCase {
    name: &'static str,
    /// Youngest first.
    files: &'static [&'static str],
    cut: &'static str,
    make: fn(&Path),
}

/// Results of all cuts.
#[derive(Default, Debug)]
struct Counts {
    cuts: u32,
    read: u32,
    refused: u32,
    lost: u32,
    repaired: u32,
    salvaged: u32,
    verbs_done: u32,
    verbs_refused: u32,
}

fn root(folder: &Path) {
    VhdFile::create(&folder.join("disk.vhd"), VhdSpec::dynamic(DISK, 4096).with_blocks(&[2, 0, 6, 3]));
}

/// Sets the bitmaps of the blocks in file order, as XenServer does: a bit for each sector that was written.
fn sparse_bits(vhd: &VhdFile, bits: &[u8]) {
    for (place, bits) in bits.iter().enumerate() {
        let at = vhd.blocks_at + place as u64 * vhd.stride();
        vhd.put(at, &[*bits]);
        // Absent sectors are zero.
        for sector in (0..8).filter(|sector| bits & (0x80 >> sector) == 0) {
            vhd.put(at + 512 + sector * 512, &[0; 512]);
        }
    }
}

fn sparse_root(folder: &Path) {
    let vhd = VhdFile::create(&folder.join("disk.vhd"), VhdSpec::dynamic(DISK, 4096).with_blocks(&[2, 0, 3]));
    sparse_bits(&vhd, &[0xF0, 0x01, 0xC0]);
}

fn parent(folder: &Path) {
    let spec = VhdSpec { tag: "OLD".into(), ..VhdSpec::dynamic(DISK, 4096) }.with_blocks(&[0, 1, 2, 3, 5]);
    VhdFile::create(&folder.join(PARENT), spec.with_uuid(id(7)));
}

fn child(folder: &Path) {
    parent(folder);
    let spec = VhdSpec::child(DISK, 4096, id(7), PARENT).with_blocks(&[2, 0, 6, 3]);
    sparse_bits(&VhdFile::create(&folder.join("disk.vhd"), spec), &[0xF0, 0x81, 0xC0, 0x60]);
}

fn full_child(folder: &Path) {
    parent(folder);
    VhdFile::create(&folder.join("disk.vhd"), VhdSpec::child(DISK, 4096, id(7), PARENT).with_blocks(&[3, 1]));
}

fn fixed(folder: &Path) {
    VhdFile::create(&folder.join("disk.vhd"), VhdSpec::fixed(DISK));
}

/// Makes the images with this library.
fn ours(folder: &Path) {
    let fixture = Fixture::new(&Host, folder);
    fixture.dynamic(PARENT, 4096, DISK / SECTOR);
    fixture.write(PARENT, &[(0, 30, Fill::Tag("OLD"))]);
    fixture.child("disk.vhd", PARENT, 4096);
    fixture.write("disk.vhd", &[(3, 5, Fill::Tag("NEW")), (20, 41, Fill::Tag("NEW")), (9, 10, Fill::Zeros)]);
}

const CASES: &[TruncationCase] = &[
    TruncationCase { name: "fixed", files: &["disk.vhd"], cut: "disk.vhd", make: fixed },
    TruncationCase { name: "dynamic", files: &["disk.vhd"], cut: "disk.vhd", make: root },
    TruncationCase { name: "dynamic, bits by the sector", files: &["disk.vhd"], cut: "disk.vhd", make: sparse_root },
    TruncationCase { name: "child", files: &["disk.vhd", PARENT], cut: "disk.vhd", make: child },
    TruncationCase { name: "child of whole blocks", files: &["disk.vhd", PARENT], cut: "disk.vhd", make: full_child },
    TruncationCase { name: "child of a parent that is cut", files: &["disk.vhd", PARENT], cut: PARENT, make: child },
    TruncationCase { name: "child by our writer", files: &["disk.vhd", PARENT], cut: "disk.vhd", make: ours },
];

fn read_disk(folder: &Path) -> Option<Vec<u8>> {
    Fixture::new(&Host, folder).read_disk("disk.vhd").ok()
}

/// Copies the files of a case, one of them cut to `len` bytes.
fn cut_copy(case: &TruncationCase, whole: &Path, to: &Path, len: u64) {
    if to.exists() {
        fs::remove_dir_all(to).expect("it goes");
    }
    fs::create_dir(to).expect("a folder");
    for name in case.files {
        fs::copy(whole.join(name), to.join(name)).expect("a copy");
    }
    let file = fs::File::options().write(true).open(to.join(case.cut)).expect("it opens");
    file.set_len(len).expect("it is cut");
}

/// Returns the path of the disk before the cut, whose folder is next to that of the cut copy.
fn whole_disk(folder: &Path) -> PathBuf {
    folder.with_file_name("whole").join("disk.vhd")
}

fn changed_runs(path: &Path) -> diffdisk::error::Result<Vec<ops::diff::ChangedRun>> {
    let mut runs = Vec::new();
    ops::diff::diff(&Host, path, None, &Policy::default(), |run| {
        runs.push(run);
        Ok(())
    })?;
    Ok(runs)
}

/// Function that runs a verb on the image in a folder and returns the path of the image that shows the disk afterwards.
type Verb = fn(&Path) -> diffdisk::error::Result<PathBuf>;

const VERBS: &[(&str, Verb)] = &[
    ("serve", |folder| {
        let options = DiskOptions::new(folder.join("disk.vhd"));
        drop(disk::Disk::open(Arc::new(Host), &options)?);
        Ok(folder.join("disk.vhd"))
    }),
    ("serve read-only", |folder| {
        let options = DiskOptions { read_only: true, ..DiskOptions::new(folder.join("disk.vhd")) };
        drop(disk::Disk::open(Arc::new(Host), &options)?);
        Ok(folder.join("disk.vhd"))
    }),
    ("open to write", |folder| {
        let path = folder.join("disk.vhd");
        drop(
            Chain::open(&Host, &path, &Policy::default(), OpenMode::Write)?
                .into_writable(&Host, &Durability::FlushOnly)?,
        );
        Ok(path)
    }),
    ("map", |folder| {
        ops::map::map(&Host, &folder.join("disk.vhd"), &Policy::default(), |_| Ok(()))?;
        Ok(folder.join("disk.vhd"))
    }),
    ("compare", |folder| {
        let open = |path: &Path| ops::SourceDisk::open(&Host, path, ops::SourceFormat::Vhd, &Policy::default());
        let (path, whole) = (folder.join("disk.vhd"), open(&whole_disk(folder)).expect("the whole disk opens"));
        let difference = ops::compare::compare(&open(&path)?, &whole, &mut |_| Ok(()))?;
        assert_eq!(difference, None, "a cut disk that opens differs from the whole one");
        Ok(path)
    }),
    ("diff", |folder| {
        let path = folder.join("disk.vhd");
        let runs = changed_runs(&path)?;
        let all = changed_runs(&whole_disk(folder)).expect("the whole disk opens");
        assert_eq!(runs, all, "the changes of a cut disk that opens");
        Ok(path)
    }),
    ("create", |folder| {
        let (parent, path) = (folder.join("disk.vhd"), folder.join("new.vhd"));
        let spec = ChildSpec {
            parent,
            size: None,
            block_size: None,
            reserve: 0,
            locators: Locators::Both,
            preallocate: false,
        };
        ops::create::child(&Host, &path, &spec, &Policy::default())?;
        Ok(path)
    }),
    ("convert", |folder| {
        let path = folder.join("disk.vhd");
        let disk = ops::SourceDisk::open(&Host, &path, ops::SourceFormat::Vhd, &Policy::default())?;
        let new = folder.join("new.vhd");
        let how = convert::Conversion { to: convert::TargetFormat::Fixed, align: 1, replace: false, uuid: None };
        convert::convert(&Host, &disk, &new, &how, &mut |_| Ok(()))?;
        Ok(new)
    }),
    ("flatten", |folder| {
        let path = folder.join("disk.vhd");
        ops::flatten::flatten(&Host, &path, None, &Policy::default(), &mut |_| Ok(()))?;
        Ok(path)
    }),
    ("rebase", |folder| {
        let (path, new) = (folder.join("disk.vhd"), folder.join("other.vhd"));
        VhdFile::create(
            &new,
            VhdSpec { tag: "OTHER".into(), ..VhdSpec::dynamic(DISK, 4096) }.with_blocks(&[1]).with_uuid(id(9)),
        );
        ops::rebase::rebase(&Host, &path, &new, false, &Policy::default(), &mut |_| Ok(()))?;
        Ok(path)
    }),
    ("resize", |folder| {
        let path = folder.join("disk.vhd");
        ops::resize::resize(&Host, &path, DISK + 9 * 4096, false, &Policy::default(), &mut |_| Ok(()))?;
        Ok(path)
    }),
    ("compact", |folder| {
        let path = folder.join("disk.vhd");
        ops::compact::compact(&Host, &path, &Policy::default(), &mut |_| Ok(()))?;
        Ok(path)
    }),
    ("merge", |folder| {
        let path = folder.join("disk.vhd");
        let merge = ops::merge::PreparedMerge::prepare(&Host, &path, None, false, &Policy::default())?;
        merge.run(&mut |_| Ok(()))?;
        Ok(folder.join(PARENT))
    }),
];

fn check(folder: &Path, chain: bool) -> ops::check::CheckReport {
    let policy = Policy::default();
    let parents = chain.then_some(&policy);
    ops::check::check(&Host, &folder.join("disk.vhd"), parents, &[], &mut |_| Ok(())).expect("a check")
}

fn repair(folder: &Path) -> ops::check::CheckReport {
    let (path, policy) = (folder.join("disk.vhd"), Policy::default());
    ops::check::repair(&Host, &path, Some(&policy), &[], None, &mut |_| Ok(())).expect("a repair")
}

/// Salvages the disk: sectors that are given up must be zero, all others must equal `want`. Returns false if nothing
/// can be salvaged.
fn salvaged(folder: &Path, want: &[u8], what: &str) -> bool {
    let before = fs::read(folder.join("disk.vhd")).expect("a file");
    let Ok((disk, given_up)) = salvage::open(&Host, &folder.join("disk.vhd"), &Policy::default()) else { return false };
    let mut want = want.to_vec();
    for run in &given_up {
        let range = usize::try_from(run.start).expect("small")..usize::try_from(run.start + run.length).expect("small");
        want[range].fill(0);
    }
    let mut bytes = Vec::new();
    convert::stream(&disk, &mut bytes, 1, &mut |_| Ok(())).expect("it is read");
    pattern::assert_same(&format!("{what}: salvaged"), &bytes, &want);
    assert!(fs::read(folder.join("disk.vhd")).expect("a file") == before, "{what}: the salvage wrote to its source");
    true
}

fn sweep(case: &TruncationCase, figures: &mut Counts) {
    let scratch = scratch("truncation");
    let (whole, copy) = (scratch.path().join("whole"), scratch.path().join("copy"));
    fs::create_dir(&whole).expect("a folder");
    (case.make)(&whole);
    let want = read_disk(&whole).expect("the whole image is readable");
    let len = fs::metadata(whole.join(case.cut)).expect("it is there").len();
    for cut in (0..len).step_by(512).chain([len - 1, len - 511, len - 700, len - 5000]) {
        let what = format!("{}, {cut} of {len} bytes", case.name);
        cut_copy(case, &whole, &copy, cut);
        figures.cuts += 1;
        let report = check(&copy, true);
        // A footer without its last byte is valid in the form that was written before 2004, but is reported.
        assert!(!report.ok, "{what}: the check reports nothing");
        let readable = match read_disk(&copy) {
            Some(bytes) => {
                pattern::assert_same(&what, &bytes, &want);
                assert!(
                    report.lost.is_empty(),
                    "{what}: the disk is readable, but {:?} are reported as lost",
                    report.lost
                );
                figures.read += 1;
                true
            }
            None => {
                figures.refused += 1;
                false
            }
        };
        figures.lost += u32::from(!report.lost.is_empty());
        if salvaged(&copy, &want, &what) {
            figures.salvaged += 1;
        } else {
            assert!(!readable && report.lost.is_empty(), "{what}: the rest cannot be salvaged");
        }
        let mended = repair(&copy);
        assert_eq!(mended.lost, report.lost, "{what}: the repair changes the lost ranges");
        assert_eq!(mended.corruptions > 0, !readable, "{what}: {:?}", mended.defects);
        match read_disk(&copy) {
            Some(bytes) => pattern::assert_same(&format!("{what}: repaired"), &bytes, &want),
            None => assert!(!readable && !mended.ok, "{what}: the image has no defects but does not open"),
        }
        figures.repaired += u32::from(mended.ok);
        for (name, verb) in VERBS {
            cut_copy(case, &whole, &copy, cut);
            match verb(&copy) {
                Ok(path) => {
                    let what = format!("{what}: {name}");
                    assert!(readable, "{what}: the verb succeeds on an image that is not readable");
                    let policy = Policy::default();
                    let disk =
                        ops::SourceDisk::open(&Host, &path, ops::SourceFormat::Vhd, &policy).expect("the result opens");
                    let mut bytes = Vec::new();
                    convert::stream(&disk, &mut bytes, 1, &mut |_| Ok(())).expect("it is read");
                    let rest = bytes.split_off(want.len());
                    assert!(rest.iter().all(|byte| *byte == 0), "{what}: the added part is not zero");
                    pattern::assert_same(&what, &bytes, &want);
                    figures.verbs_done += 1;
                }
                // The refused verbs include `merge` and `diff` of a root and `compact` of a fixed image.
                Err(_) => figures.verbs_refused += 1,
            }
        }
    }
}

#[test]
fn a_truncated_image_is_read_right_or_refused() {
    let _lock = lock_spawns();
    for case in CASES {
        let mut figures = Counts::default();
        sweep(case, &mut figures);
        println!("{}: {figures:?}", case.name);
        assert!(figures.cuts > 30 && figures.refused > 15, "{figures:?}");
        // A fixed image without its footer cannot be salvaged.
        assert_eq!(figures.salvaged > 20, case.name != "fixed", "{figures:?}");
        assert!(figures.verbs_done > 0, "{figures:?}");
    }
}

#[test]
fn a_lost_sector_never_shows_the_parents_data() {
    let _lock = lock_spawns();
    let scratch = scratch("truncation");
    child(scratch.path());
    let file = fs::File::options().write(true).open(scratch.path().join("disk.vhd")).expect("it opens");
    // Cuts off block 3, the last one in the file, and all sectors except the first of block 6, which precedes block 3
    // in the file and has two marked sectors.
    let len = file.metadata().expect("its length").len();
    file.set_len(len - 512 - 4608 - 4096 + 512).expect("it is cut");
    let report = check(scratch.path(), false);
    let lost: Vec<(u64, u64)> = report.lost.iter().map(|run| (run.start / SECTOR, run.length / SECTOR)).collect();
    assert_eq!(lost, [(24, 8), (49, 1)]);
    let (disk, given_up) =
        salvage::open(&Host, &scratch.path().join("disk.vhd"), &Policy::default()).expect("it opens");
    assert_eq!(given_up.iter().map(|run| (run.start / SECTOR, run.length / SECTOR)).collect::<Vec<_>>(), lost);
    let mut bytes = Vec::new();
    convert::stream(&disk, &mut bytes, 1, &mut |_| Ok(())).expect("it is read");
    let sector = |number: usize| &bytes[number * 512..][..512];
    assert!((24..32).all(|number| sector(number) == [0; 512]), "lost sectors are not zeros");
    assert_eq!(sector(48), &pattern::sectors("C", 48, 1)[..]);
    assert_eq!(
        sector(40),
        &pattern::sectors("OLD", 40, 1)[..],
        "a sector that the child never had is not the parent's"
    );
}
