//! Resizes of a running disk that are interrupted at each step by a kill, a power cut, an error or a drop, on a
//! simulated machine.

use std::path::Path;
use std::sync::Arc;

use diffdisk::disk::live_resize::ResizeRun;
use diffdisk::disk::{ChangeStep, Disk, DiskOptions, Outcome, Work};
use diffdisk::error::{ErrorKind, Result};
use diffdisk::format::Severity;
use diffdisk::image::{self, Durability, ImageKind, ImageSpec, ParentLink};
use diffdisk::storage::sim::{Fault, FaultPlan, Random, SimHost};
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SectorRange};

use crate::testing::{TestDisk, TestMemory};

const PATH: &str = "/d/disk.vhd";
/// Sectors of the disk before the resize.
const OLD: u64 = 301;

/// A disk, and its size after the resize.
struct Case {
    name: &'static str,
    new: u64,
    make: fn(&SimHost),
}

fn create(host: &SimHost, path: &str, kind: ImageKind, sectors: u64) {
    let spec =
        ImageSpec { kind, size: sectors * 512, block_size: BlockSize::from_bytes(4096).expect("legal"), reserve: 0 };
    image::create(host, Path::new(path), &spec).expect("a new image");
}

/// Creates a child of a parent with `parent_sectors` sectors. All bytes of the parent's disk are 1.
fn create_over(host: &SimHost, parent_sectors: u64) {
    create(host, "/d/parent.vhd", ImageKind::Dynamic, parent_sectors);
    let parent = Disk::open(Arc::new(host.clone()), &DiskOptions::new("/d/parent.vhd")).expect("it opens");
    let mut parent = TestDisk::new(parent, EngineKind::Auto);
    parent.write(SectorRange::between(0, parent_sectors), &vec![1; parent_sectors as usize * 512], &[]);
    parent.close();
    let image =
        image::Image::open(host.open(Path::new("/d/parent.vhd"), Access::Read).expect("a file")).expect("an image");
    let modified = image.file().stat().expect("a file").modified;
    let link = ParentLink {
        uuid: image.uuid(),
        modified,
        relative: Some("parent.vhd".into()),
        absolute: None,
        name: "parent.vhd".into(),
    };
    drop(image);
    create(host, PATH, ImageKind::Differencing(link), OLD);
}

const CASES: [Case; 5] = [
    Case { name: "same table", new: OLD + 20, make: |host| create(host, PATH, ImageKind::Dynamic, OLD) },
    Case { name: "new table", new: 6000, make: |host| create(host, PATH, ImageKind::Dynamic, OLD) },
    Case { name: "fixed", new: OLD + 100, make: |host| create(host, PATH, ImageKind::Fixed, OLD) },
    Case { name: "child", new: OLD + 100, make: |host| create_over(host, OLD) },
    Case { name: "larger parent", new: OLD + 100, make: |host| create_over(host, OLD + 50) },
];

/// A disk with one lane, and the expected contents of the sectors that it has before the resize: a byte for each
/// sector.
struct Run {
    disk: TestDisk,
    sectors: Vec<u8>,
}

/// Opens the disk as a daemon does.
fn open(host: &SimHost) -> Result<TestDisk> {
    let folder = host.runtime_folder(Path::new("/run")).expect("every folder is in memory");
    let keep = Durability::Journal { folders: vec![folder], required: true };
    let disk = Disk::open(Arc::new(host.clone()), &DiskOptions { keep, ..DiskOptions::new(PATH) })?;
    Ok(TestDisk::new(disk, EngineKind::Auto))
}

/// Reads the first byte of each sector. All bytes of a sector must be equal.
fn contents(disk: &mut TestDisk, end: u64) -> Vec<u8> {
    let bytes = disk.read(SectorRange::between(0, end));
    assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])), "a torn sector");
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

impl Case {
    /// Makes the disk on a new machine. Some data is durable, and some is only acknowledged, also in the last block.
    fn start(&self) -> (SimHost, Run) {
        let host = SimHost::new(21);
        (self.make)(&host);
        let mut disk = open(&host).expect("it opens");
        let mut sectors = contents(&mut disk, OLD);
        let mut write = |disk: &mut TestDisk, from: u64, to: u64, byte: u8| {
            disk.write(SectorRange::between(from, to), &vec![byte; (to - from) as usize * 512], &[]);
            sectors[from as usize..to as usize].fill(byte);
        };
        write(&mut disk, 3, 30, 2);
        write(&mut disk, 290, 300, 3);
        disk.flush();
        write(&mut disk, 20, 24, 4);
        write(&mut disk, 100, 101, 5);
        write(&mut disk, 300, 301, 6);
        (host, Run { disk, sectors })
    }

    /// Checks the disk after the end of the process: it has the old or the new size, and all flushed data. If
    /// `is_kill`, the disk also has all acknowledged data.
    fn check(&self, host: &SimHost, sectors: &[u8], is_kill: bool, when: &str) {
        let opened = open(host);
        let mut disk = opened.unwrap_or_else(|e| panic!("{}: {when}: it does not open: {}", self.name, e.line()));
        let size = disk.disk.capacity();
        assert!(size == OLD || size == self.new, "{}: {when}: {size} sectors", self.name);
        let seen = contents(&mut disk, size);
        for (sector, byte) in seen.iter().enumerate() {
            let is_flushed = ![20, 21, 22, 23, 100, 300].contains(&sector);
            let want = sectors.get(sector).copied().unwrap_or(0);
            let fits = *byte == want || !is_kill && !is_flushed && [0, 1, 2].contains(byte);
            assert!(fits, "{}: {when}: sector {sector} of {size} contains {byte}, not {want}", self.name);
        }
        // The disk can grow to the new size, and keeps its contents.
        let run = ResizeRun::begin(&disk.disk, self.new * 512).expect("it may grow");
        finish(run, &mut disk).unwrap_or_else(|e| panic!("{}: {when}: it does not grow: {}", self.name, e.line()));
        let last = SectorRange::between(self.new - 1, self.new);
        disk.write(last, &[9; 512], &[]);
        disk.flush();
        disk.close();
        let mut disk = open(host).expect("it opens");
        let mut grown = seen;
        grown.resize(self.new as usize - 1, 0);
        grown.push(9);
        assert!(contents(&mut disk, self.new) == grown, "{}: {when}: other contents after it has grown", self.name);
        disk.close();
        let (report, _) = image::check(host.open(Path::new(PATH), Access::Read).expect("a file")).expect("it is read");
        // Blocks that hide a larger parent become a gap if a resize ends before the size changes, and the guest writes.
        let bad = report.defects.iter().find(|defect| defect.severity() >= Severity::Corruption);
        assert!(bad.is_none(), "{}: {when}: {bad:?}", self.name);
    }
}

/// Takes the steps of a resize, and polls the lane between them.
fn finish(mut run: ResizeRun, disk: &mut TestDisk) -> Result<()> {
    let mut waits = 0;
    while run.step()? != ChangeStep::Done {
        disk.poll();
        waits += 1;
        assert!(waits < 1000, "the resize does not end");
    }
    Ok(())
}

/// Takes at most `steps` steps that are not waits. Returns whether the resize is done.
fn take_steps(run: &mut ResizeRun, disk: &mut TestDisk, steps: u32) -> bool {
    let mut taken = 0;
    while taken < steps {
        match run.step().expect("no fault is planned") {
            ChangeStep::Done => return true,
            ChangeStep::Again => taken += 1,
            ChangeStep::Wait => disk.poll(),
        }
    }
    false
}

#[test]
fn a_power_cut_at_any_moment_leaves_the_old_or_the_new_disk() {
    for case in CASES {
        let (host, Run { mut disk, sectors }) = case.start();
        host.start_recording();
        let run = ResizeRun::begin(&disk.disk, case.new * 512).expect("it may grow");
        finish(run, &mut disk).expect("it grows");
        let (moments, mut random) = (host.take_recording(), Random::new(31));
        for (number, moment) in moments.iter().enumerate() {
            for fate in 0..8 {
                let bits = match fate {
                    0 => 0,
                    1 => u64::MAX,
                    _ => random.next_u64() & random.next_u64() | random.next_u64(),
                };
                // The resize of a fixed image relies on this: a new length survives only with the bytes that caused it
                // (crash-safety A4).
                let units = moment.unsynced_steps();
                let deciding = |unit: usize| match case.name == "fixed" && units[unit].0 != 0 {
                    true => units.iter().position(|(step, _)| *step == units[unit].0).unwrap_or(unit),
                    false => unit,
                };
                let after = moment.crash_with(&|unit| bits >> (deciding(unit) % 61) & 1 == 1);
                case.check(&after, &sectors, false, &format!("power cut before change {number}, survivors {bits:x}"));
            }
        }
        println!("{}: {} moments", case.name, moments.len());
    }
}

#[test]
fn a_kill_at_any_step_loses_nothing() {
    let mut random = Random::new(32);
    for case in CASES {
        for step in 1.. {
            let (host, Run { mut disk, sectors }) = case.start();
            host.stop_at(host.counts().steps + step);
            let mut run = ResizeRun::begin(&disk.disk, case.new * 512).ok();
            while let Some(run) = run.as_mut().filter(|_| !host.is_dead())
                && !matches!(run.step(), Ok(ChangeStep::Done))
            {
                if !host.is_dead() {
                    disk.poll();
                }
            }
            let is_done = !host.is_dead();
            run.into_iter().for_each(ResizeRun::abandon);
            let after = host.kill(&mut random);
            case.check(&after, &sectors, true, &format!("killed at step {step}"));
            if is_done {
                println!("{}: {step} steps", case.name);
                break;
            }
        }
    }
}

#[test]
fn a_resize_that_is_given_up_holds_nothing() {
    for case in CASES {
        for steps in 0.. {
            let (host, Run { mut disk, mut sectors }) = case.start();
            let mut run = ResizeRun::begin(&disk.disk, case.new * 512).expect("it may grow");
            let is_done = take_steps(&mut run, &mut disk, steps);
            let from = TestMemory::new(&[8; 512]).iovecs(&[]);
            let written = disk.submit(Work::Write { range: SectorRange::between(50, 51), from });
            let flushed = disk.submit(Work::Flush);
            disk.poll();
            drop(run);
            let done = disk.finish();
            assert!([written, flushed].iter().all(|tag| done.contains(&(*tag, Outcome::Done))), "{steps}: {done:?}");
            sectors[50] = 8;
            let size = disk.disk.capacity();
            let seen = contents(&mut disk, size);
            assert!(seen[..OLD as usize] == sectors && seen[OLD as usize..].iter().all(|byte| *byte == 0));
            // What is flushed now survives a power cut.
            disk.flush();
            let after = host.crash_with(&|_| false);
            case.check(&after, &sectors, true, &format!("given up after {steps} steps"));
            if is_done {
                break;
            }
        }
    }
}

#[test]
fn an_error_at_any_step_ends_the_resize_and_not_the_disk() {
    for case in CASES {
        let mut poisoned = 0;
        for fault in [Fault::NoSpace, Fault::Io, Fault::Short] {
            for step in 1.. {
                let (host, Run { mut disk, mut sectors }) = case.start();
                let at = host.counts().steps + step;
                host.set_faults(FaultPlan { fail: vec![(at, fault)], ..FaultPlan::default() });
                let run = ResizeRun::begin(&disk.disk, case.new * 512);
                let result = run.and_then(|run| finish(run, &mut disk));
                let is_reached = host.counts().steps >= at;
                host.set_faults(FaultPlan::default());
                let when = format!("{fault:?} at step {step}, which ended in {result:?}");
                // The lane may have to adopt another size.
                disk.poll();
                let size = disk.lane.capacity();
                assert!(size == OLD || size == case.new, "{}: {when}: {size} sectors", case.name);
                let seen = contents(&mut disk, size);
                assert!(seen[..OLD as usize] == sectors, "{}: {when}", case.name);
                let from = TestMemory::new(&[8; 512]).iovecs(&[]);
                let written = disk.run(Work::Write { range: SectorRange::between(50, 51), from });
                let flushed = disk.run(Work::Flush);
                if flushed == Outcome::Done {
                    assert_eq!(written, Outcome::Done, "{}: {when}", case.name);
                    sectors[50] = 8;
                    case.check(&host.crash_with(&|_| false), &sectors, true, &when);
                } else {
                    assert!(disk.disk.is_poisoned(), "{}: {when}", case.name);
                    poisoned += 1;
                    case.check(&host.crash_with(&|_| false), &sectors, false, &when);
                }
                assert!(result.is_ok() || is_reached, "{}: {when}", case.name);
                if let Err(e) = &result {
                    assert!(e.kind() != ErrorKind::Busy, "{}: {when}", case.name);
                }
                if !is_reached {
                    break;
                }
            }
        }
        println!("{}: {poisoned} faults poisoned the image", case.name);
    }
}
