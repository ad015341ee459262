//! `check --repair` with kills at every failpoint, and with power cuts and faults at every step: the guest's disk does
//! not change, the undo file contains all replaced bytes, and the next repair completes the work.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy};
use diffdisk::error::{Error, ErrorKind, Result};
use diffdisk::image::Image;
use diffdisk::ops::{self, check::CheckReport};
use diffdisk::storage::host::Host;
use diffdisk::storage::sim::{Fault, FaultPlan, Random, SimHost};
use diffdisk::storage::{Access, Env};
use diffdisk::units::SectorRange;

use crate::common::golden::Golden;
use crate::common::rng::seed_or;
use crate::common::temp::scratch;
use crate::common::tool::diffdisk;
use crate::failpoints;
use crate::fixture::{self, Fill, Fixture};
use crate::sweep::FOLDER;

/// The bytes of a VHD, with access to its fields.
struct VhdBytes(Vec<u8>);

impl VhdBytes {
    fn read(path: &Path) -> VhdBytes {
        VhdBytes(fs::read(path).expect("the image is readable"))
    }

    fn number(&self, at: usize, len: usize) -> usize {
        self.0[at..at + len].iter().fold(0, |n, byte| n << 8 | usize::from(*byte))
    }

    fn entry_at(&self, block: usize) -> usize {
        self.number(512 + 16, 8) + block * 4
    }

    fn place(&self, block: usize) -> usize {
        self.number(self.entry_at(block), 4) * 512
    }

    fn set_place(&mut self, block: usize, place: usize) {
        let (at, sector) = (self.entry_at(block), u32::try_from(place / 512).expect("a small file"));
        self.0[at..at + 4].copy_from_slice(&sector.to_be_bytes());
    }

    /// Returns the size in bytes of a block with its bitmap of one sector.
    fn stride(&self) -> usize {
        self.number(512 + 32, 4) + 512
    }

    /// Returns the number of the block with the highest offset.
    fn last(&self) -> usize {
        let entries = (0..self.number(512 + 28, 4)).filter(|block| self.place(*block) != 0xFFFF_FFFF * 512);
        entries.max_by_key(|block| self.place(*block)).expect("a block")
    }

    fn take_footer(&mut self) -> Vec<u8> {
        self.0.split_off(self.0.len() - 512)
    }
}

/// Damages the footer at the start, and adds unreferenced space between blocks and at the end.
fn front_and_space(bytes: &mut VhdBytes) {
    let footer = bytes.take_footer();
    let (last, stride) = (bytes.last(), bytes.stride());
    let from = bytes.place(last);
    let block = bytes.0[from..from + stride].to_vec();
    bytes.0.extend(vec![0xAB; 5 * 4096]);
    bytes.0.resize(bytes.0.len().next_multiple_of(4096) + 4096 - 512, 0);
    let to = bytes.0.len();
    bytes.0.extend(block);
    bytes.set_place(last, to);
    bytes.0.extend(vec![0xCD; 9 * 4096]);
    bytes.0.extend(footer);
    bytes.0[300] ^= 1;
}

/// Replaces the trailing footer by other bytes, and adds a block and bits beyond the end of the disk.
fn tail_and_pointers(bytes: &mut VhdBytes) {
    bytes.take_footer();
    let (to, stride) = (bytes.0.len().next_multiple_of(512), bytes.stride());
    bytes.0.resize(to, 0);
    bytes.0.extend(vec![0xEE; stride]);
    let entries = bytes.number(512 + 28, 4);
    bytes.set_place(entries - 1, to);
    bytes.0.extend([0xC7; 512]);
    let blocks = bytes.number(48, 8).div_ceil(bytes.number(512 + 32, 4));
    let last = bytes.place(blocks - 1);
    bytes.0[last] = 0x81;
}

/// Makes a child that has 64 blocks of 4 KiB, a last block of four sectors, and spare BAT entries. Then damages the
/// child with `f`, which must not change the child's disk.
fn broken(folder: &Path, f: impl FnOnce(&mut VhdBytes)) -> PathBuf {
    let (root, child) = (folder.join("root.vhd"), folder.join("child.vhd"));
    let size = (64 * 4096 + 2048).to_string();
    diffdisk(["create", root.to_str().expect("text"), "--size", &size, "--block-size", "4K"]).ok();
    diffdisk([
        "create",
        child.to_str().expect("text"),
        "--parent",
        root.to_str().expect("text"),
        "--reserve-size",
        "1M",
    ])
    .ok();
    fill(&root, &[(0, 40), (500, 512)], 1);
    fill(&child, &[(3, 30), (77, 78), (400, 410), (512, 513)], 2);
    let mut bytes = VhdBytes::read(&child);
    f(&mut bytes);
    fs::write(&child, &bytes.0).expect("the image is written");
    child
}

/// Writes ranges of sectors with a commit, as the daemon does.
fn fill(path: &Path, ranges: &[(u64, u64)], byte: u8) {
    let filled = ranges.iter().map(|&(from, to)| {
        let range = SectorRange::between(from, to);
        (range, vec![byte; usize::try_from(range.bytes()).expect("little")])
    });
    fixture::write(&Host, path, filled).expect("it can be written");
}

/// Reads the whole disk of an image.
fn read_disk(env: &dyn Env, path: &Path, policy: &Policy) -> Vec<u8> {
    let chain = Chain::open(env, path, policy, OpenMode::Read).unwrap_or_else(|e| panic!("{}", e.line()));
    let version = chain.into_frozen();
    let range = SectorRange::between(0, version.sectors());
    let mut bytes = vec![0xEE; usize::try_from(range.bytes()).expect("a small disk")];
    version.read_now(range, &mut bytes, &mut PlanBuffer::default()).expect("it is readable");
    bytes
}

/// Applies an undo file to a repaired image. Returns `None` if the undo file contains no replaced bytes.
fn apply_undo(mut image: Vec<u8>, undo: &[u8]) -> Option<Vec<u8>> {
    let number =
        |at: usize| usize::try_from(u64::from_be_bytes(undo[at..at + 8].try_into().expect("8"))).expect("small");
    if undo.len() < 512 || undo[..512] == [0; 512] {
        return None;
    }
    assert_eq!(undo[..16], *b"diffdisk undo 2\n");
    image.resize(number(16), 0);
    let (mut pieces, mut at) = (Vec::new(), 512);
    while at < number(24) {
        pieces.push((number(at), &undo[at + 16..at + 16 + number(at + 8)]));
        at += 16 + number(at + 8);
    }
    for (offset, bytes) in pieces.into_iter().rev() {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    Some(image)
}

/// Lists the files in a folder: images with their bytes, and undo files, oldest first.
fn list_files(folder: &Path) -> (BTreeMap<PathBuf, Vec<u8>>, Vec<PathBuf>) {
    let (mut images, mut undo) = (BTreeMap::new(), Vec::new());
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        match path.extension().is_some_and(|e| e == "undo") {
            true => undo.push(path),
            false => drop(images.insert(path.clone(), fs::read(path).expect("a file"))),
        }
    }
    undo.sort_by_key(|path| fs::metadata(path).expect("a file").modified().expect("a time"));
    (images, undo)
}

/// Repairs `image` once for each time that a failpoint is reached: kills the repair there and runs it again. Returns
/// the number of kills.
fn killed_everywhere(image: &Path, want: &[u8], policy: &Policy, options: &[&str]) -> u32 {
    let folder = image.parent().expect("a folder");
    let (before, _) = list_files(folder);
    let repair = || ["check", image.to_str().expect("text"), "--repair"].into_iter().chain(options.iter().copied());
    let mut kills = 0;
    for point in failpoints::of("check") {
        for count in 1.. {
            let (_, old) = list_files(folder);
            old.iter().for_each(|path| fs::remove_file(path).expect("it goes"));
            before.iter().for_each(|(path, bytes)| fs::write(path, bytes).expect("it is written"));
            let killed = failpoints::killed(&point, count, repair());
            let what = format!("{point}:{count}");
            assert!(read_disk(&Host, image, policy) == want, "{what}: the disk has changed");
            let again = diffdisk(repair());
            assert_eq!(again.code, Some(0), "{what}: {}{}", String::from_utf8_lossy(&again.stdout), again.stderr);
            let check = ["check", image.to_str().expect("text")].into_iter().chain(options.iter().copied());
            assert_eq!(diffdisk(check).code, Some(0), "{what}: defects are left");
            assert!(read_disk(&Host, image, policy) == want, "{what}: the disk has changed after the second repair");
            let (mut now, undo) = list_files(folder);
            assert!(now.keys().eq(before.keys()), "{what}: {:?}", now.keys());
            assert!(!undo.is_empty(), "{what}: there is no undo file");
            for path in undo.iter().rev() {
                let name = path.to_str().expect("text");
                let of = PathBuf::from(name.split(".repair-").next().expect("a name"));
                let image = now.get_mut(&of).expect("an undo file is in the folder of its image");
                let earlier = apply_undo(image.clone(), &fs::read(path).expect("a file"));
                *image = earlier.unwrap_or_else(|| image.clone());
            }
            assert!(now == before, "{what}: the undo files do not restore the images");
            kills += u32::from(killed);
            if !killed {
                break;
            }
        }
    }
    kills
}

#[test]
fn a_killed_repair_is_completed_by_the_next() {
    for (name, f) in [("front", front_and_space as fn(&mut VhdBytes)), ("tail", tail_and_pointers)] {
        let folder = scratch("check-kill");
        let child = broken(folder.path(), f);
        let policy = Policy::default();
        let want = read_disk(&Host, &child, &policy);
        assert!(want[..512] == [1; 512] && want[77 * 512..78 * 512] == [2; 512], "{name}");
        let kills = killed_everywhere(&child, &want, &policy, &[]);
        assert!(kills >= 5, "{name}: killed only {kills} times");
    }
}

#[test]
fn images_of_xenserver_are_repaired_with_their_batmaps() {
    let folder = scratch("check-tap");
    let golden = Golden::load();
    golden.unpack(folder.path());
    let folder = folder.path().join("vhdutil-chain");
    let (leaf, base) = (folder.join("s4.vhd"), folder.join("base.vhd"));
    let policy = Policy::default();
    let want = read_disk(&Host, &leaf, &policy);
    // The batmap wrongly marks block 0 of the root as fully present. The checksum of the batmap is updated.
    let mut bytes = VhdBytes::read(&base);
    let (header, map) = (2048, 2560);
    assert_eq!(&bytes.0[header..header + 8], b"tdbatmap");
    bytes.0[map] |= 0x80;
    let sum = !bytes.0[map..map + 512].iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes.0[header + 24..header + 28].copy_from_slice(&sum.to_be_bytes());
    fs::write(&base, &bytes.0).expect("it is written");
    let mut bytes = VhdBytes::read(&leaf);
    bytes.take_footer();
    bytes.0.extend([0xC7; 512]);
    fs::write(&leaf, &bytes.0).expect("it is written");
    let check = diffdisk(["check", leaf.to_str().expect("text"), "--chain", "--json"]);
    let kinds: Vec<_> = check.json()["defects"].as_array().expect("a list").iter().map(|d| d["kind"].clone()).collect();
    assert_eq!((check.code, kinds), (Some(3), vec!["trailing-footer-missing".into(), "batmap-wrong".into()]));
    let kills = killed_everywhere(&leaf, &want, &policy, &["--chain"]);
    assert!(kills >= 4, "killed only {kills} times");
}

const CHILD: &str = "/disk/child.vhd";

/// Makes a simulated machine with durable copies of the two images.
fn simulated_host(folder: &Path) -> SimHost {
    let host = SimHost::new(7);
    let disk = host.folder(Path::new("/disk")).expect("a folder");
    for name in ["root.vhd", "child.vhd"] {
        let file = disk.create(name.as_ref()).expect("it is made");
        file.write_at(&fs::read(folder.join(name)).expect("a file"), 0).expect("it is written");
        file.sync().expect("it is durable");
    }
    disk.sync().expect("names are durable");
    host
}

/// Copies a machine; all unsynced changes become durable in the copy.
fn copy(host: &SimHost) -> SimHost {
    host.crash_with(&|_| true)
}

fn repair(host: &SimHost, path: &Path) -> Result<CheckReport> {
    ops::check::repair(host, path, None, &[], None, &mut |_| Ok(()))
}

/// Checks a machine on which a repair of `before` was interrupted, then repairs again.
fn assert_repaired(host: &SimHost, before: &[u8], want: &[u8], what: &str) {
    let path = Path::new(CHILD);
    assert!(read_disk(host, path, &Policy::default()) == want, "{what}: the disk has changed");
    let undo: Vec<_> = host.names().into_iter().filter(|name| name.extension().is_some_and(|e| e == "undo")).collect();
    assert!(undo.len() < 2, "{what}: {undo:?}");
    let image = host.bytes(path).expect("it is there");
    let kept = undo.first().and_then(|undo| apply_undo(image.clone(), &host.bytes(undo).expect("it is there")));
    assert!(kept.unwrap_or(image) == before, "{what}: the undo files do not restore the images");
    let report = repair(host, path).unwrap_or_else(|e| panic!("{what}: {}", e.line()));
    assert!(report.ok, "{what}: {:?}", report.defects);
    assert!(read_disk(host, path, &Policy::default()) == want, "{what}: the disk has changed after the second repair");
}

#[test]
fn a_repair_survives_power_cuts_and_faults_at_every_step() {
    let mut random = Random::new(seed_or(20_261_122));
    let (mut cuts, mut faults) = (0, 0);
    for f in [front_and_space as fn(&mut VhdBytes), tail_and_pointers] {
        let folder = scratch("check-cut");
        broken(folder.path(), f);
        let whole = simulated_host(folder.path());
        let path = Path::new(CHILD);
        let (want, before) = (read_disk(&whole, path, &Policy::default()), whole.bytes(path).expect("it is there"));
        let all = copy(&whole);
        assert!(repair(&all, path).expect("a repair").ok);
        let steps = all.counts().steps;
        for step in 1..=steps {
            let host = copy(&whole);
            host.stop_at(step);
            repair(&host, path).expect_err("the machine has stopped");
            let units = host.unsynced().len();
            for fate in 0..30 {
                let (few, salt) = (random.below(8), random.next_u64());
                // In the first 22 outcomes one unit alone survives or is lost, which detects writes in the wrong order.
                // Lengths are the last units, and footers are among the first.
                let lone = if fate < 20 { units.saturating_sub(1 + fate / 2) } else { random.index(units.max(1)) };
                let survives = |unit: usize| match fate {
                    0..22 if fate % 2 == 0 => unit == lone,
                    0..22 => unit != lone,
                    22 => false,
                    23 => true,
                    _ => Random::new(salt ^ unit as u64).chance(few + 1, 9),
                };
                let what = format!("step {step} of {steps}, outcome {fate} of {units} units, salt {salt}, {few}");
                assert_repaired(&host.crash_with(&survives), &before, &want, &what);
                cuts += 1;
            }
            for fault in [Fault::NoSpace, Fault::Io, Fault::Short] {
                let host = copy(&whole);
                host.set_faults(FaultPlan { fail: vec![(step, fault)], ..FaultPlan::default() });
                let done = repair(&host, path);
                host.set_faults(FaultPlan::default());
                faults += u32::from(done.is_err());
                if done.is_err() {
                    // Nothing is lost: the second repair sees all changes that the first one made before the fault.
                    let what = format!("step {step} of {steps}, {fault:?}");
                    assert_repaired(&host, &before, &want, &what);
                    let image = Image::open(host.open(path, Access::Read).expect("it opens"));
                    assert!(image.is_ok(), "{what}");
                }
            }
        }
    }
    println!("{cuts} power cuts, {faults} faults");
    assert!(cuts > 200 && faults > 50, "{cuts} power cuts, {faults} faults");
}

#[test]
fn a_check_reports_progress_and_can_be_interrupted() {
    let host = SimHost::new(3);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("root.vhd", 4096, 600 * 8);
    fixture.write("root.vhd", &(0..600).map(|block| (block * 8, block * 8 + 1, Fill::Tag("R"))).collect::<Vec<_>>());
    fixture.child("child.vhd", "root.vhd", 4096);
    let (path, policy) = (fixture.path("child.vhd"), Policy::default());
    let len = |name: &str| host.bytes(&fixture.path(name)).expect("it is there").len() as u64;
    let (first, all) = (len("child.vhd"), len("child.vhd") + len("root.vhd"));
    let check = |progress: &mut dyn FnMut(u64) -> Result<()>| {
        ops::check::check(&host, &path, Some(&policy), &[], progress).map(|report| report.ok)
    };
    let mut told = Vec::new();
    let ok = check(&mut |bytes| {
        told.push(bytes);
        Ok(())
    });
    assert!(ok.expect("it can be read") && told.is_sorted(), "{told:?}");
    assert_eq!((told.last(), ops::check::bytes_to_check(&host, &path, Some(&policy))), (Some(&all), all));
    assert!(
        told.iter().filter(|bytes| (first + 1..all).contains(*bytes)).count() > 1,
        "no progress within a file: {told:?}"
    );
    for moment in 0..told.len() {
        let mut left = moment;
        let ended = check(&mut |_| match left.checked_sub(1) {
            Some(fewer) => {
                left = fewer;
                Ok(())
            }
            None => Err(Error::new(ErrorKind::Refused, "interrupted")),
        });
        assert_eq!(ended.expect_err("the check was interrupted").line(), "interrupted", "at moment {moment}");
    }
    assert_eq!(ops::check::bytes_to_check(&host, &fixture.path("root.vhd"), None), all - first);
}
