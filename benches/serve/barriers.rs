//! Number of syncs per guest flush, after many writes, in different situations. The syncs are counted and not timed.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use diffdisk::disk::{Disk, DiskOptions, Lane, Outcome, Request, WhenFull, Work};
use diffdisk::storage::{EngineKind, GuestIovecs, host::Host};
use diffdisk::units::SectorRange;

use crate::compare::Bench;
use crate::disks::Format;
use crate::harness::Bound;

const WRITES: u64 = 500;

pub fn barriers(bench: &mut Bench) {
    let child = bench.disks.fresh_child(Format::Vhd, &[]);
    let root = bench.disks.writable(Format::Vpc).with_extension("root");
    let _ = std::fs::remove_file(&root);
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_diffdisk"))
        .args(["create", "--quiet", "--size", "1G"])
        .arg(&root)
        .status();
    assert!(made.is_ok_and(|s| s.success()), "an image can be made");
    for (image, what, new) in [(&child, "a child", 2.0), (&root, "a dynamic root", 1.0)] {
        let mut guest = Guest::new(image);
        guest.flush();
        let clean = guest.flush();
        let fresh = guest.write_and_flush();
        let again = guest.write_and_flush();
        bench.results.target(format!("syncs of a flush, {what}, nothing written"), clean, Bound::Exactly(0.0));
        bench.results.target(
            format!("syncs of a flush, {what}, {WRITES} writes of new sectors"),
            fresh,
            Bound::AtMost(new),
        );
        bench.results.target(
            format!("syncs of a flush, {what}, {WRITES} writes over old ones"),
            again,
            Bound::Exactly(1.0),
        );
    }
}

/// A disk that is open in this process, and one of its lanes.
struct Guest {
    disk: Arc<Disk>,
    lane: Lane,
    page: Arc<Box<[u8]>>,
}

impl Guest {
    fn new(image: &Path) -> Guest {
        let options = DiskOptions { when_full: WhenFull::Fail, ..DiskOptions::new(image) };
        let disk = Disk::open(Arc::new(Host), &options).unwrap_or_else(|e| panic!("{}", e.line()));
        let lane = disk.lane(EngineKind::Auto, 64).expect("a lane");
        Guest { disk, lane, page: Arc::new(vec![7; 4096].into()) }
    }

    fn run(&mut self, work: Work) {
        let mut answers = Vec::new();
        self.lane.push(Request { tag: 0, work });
        self.lane.drain(&mut answers).expect("the engine works");
        assert!(answers.iter().all(|a| a.outcome == Outcome::Done), "{answers:?}");
    }

    /// Flushes, and returns the number of syncs of the flush.
    fn flush(&mut self) -> f64 {
        let count = |guest: &Guest| guest.disk.counters().syncs.load(Ordering::Relaxed);
        let before = count(self);
        self.run(Work::Flush);
        (count(self) - before) as f64
    }

    fn write_and_flush(&mut self) -> f64 {
        for i in 0..WRITES {
            let start = i * 7919 % (1 << 17) * 8;
            let mut from = GuestIovecs::new(self.page.clone(), 1);
            // SAFETY: `push` requires that the range stays mapped as long as the owner of the list exists. The owner is
            // `self.page`, and the range is exactly its memory, which is never reallocated. A write request only reads
            // the range, and no code changes the page.
            unsafe { from.push(self.page.as_ptr().cast_mut(), self.page.len()) };
            self.run(Work::Write { range: SectorRange::between(start, start + 8), from });
        }
        self.flush()
    }
}
