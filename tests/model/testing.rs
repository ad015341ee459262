//! A disk with one lane for tests, whose requests use memory of the test.

use std::sync::Arc;

use diffdisk::disk::{Answer, Disk, Lane, Outcome, Request, Work, ZeroRange};
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

pub use crate::memory::TestMemory;

/// A disk with one lane, and the answers that the test has not taken yet.
pub struct TestDisk {
    pub disk: Arc<Disk>,
    pub lane: Lane,
    answers: Vec<Answer>,
    next_tag: u64,
}

impl TestDisk {
    pub fn new(disk: Arc<Disk>, engine: EngineKind) -> TestDisk {
        let lane = disk.lane(engine, 64).expect("a lane");
        TestDisk { disk, lane, answers: Vec::new(), next_tag: 0 }
    }

    /// Submits a request. Returns its tag.
    pub fn submit(&mut self, work: Work) -> u64 {
        while self.lane.push_capacity() == 0 {
            self.poll();
        }
        self.next_tag += 1;
        self.lane.push(Request { tag: self.next_tag, work });
        self.next_tag
    }

    pub fn poll(&mut self) {
        self.lane.submit().expect("the engine works");
        self.lane.poll(&mut self.answers).expect("the engine works");
    }

    /// Returns the answers that [`TestDisk::finish`] has not returned yet.
    #[cfg(feature = "sim")]
    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Waits for all requests in flight. Returns their tags and outcomes.
    pub fn finish(&mut self) -> Vec<(u64, Outcome)> {
        self.lane.drain(&mut self.answers).expect("the engine works");
        self.answers.drain(..).map(|a| (a.tag, a.outcome)).collect()
    }

    /// Runs one request. Returns its outcome.
    pub fn run(&mut self, work: Work) -> Outcome {
        let tag = self.submit(work);
        let done = self.finish();
        done.into_iter().find(|(t, _)| *t == tag).expect("every request is answered").1
    }

    pub fn read(&mut self, range: SectorRange) -> Vec<u8> {
        let memory = TestMemory::new(&vec![0xEE; range.bytes() as usize]);
        let outcome = self.run(Work::Read { range, into: memory.iovecs(&[512]) });
        assert_eq!(outcome, Outcome::Done, "reading {range}");
        memory.bytes()
    }

    pub fn write(&mut self, range: SectorRange, bytes: &[u8], cuts: &[usize]) {
        let memory = TestMemory::new(bytes);
        let outcome = self.run(Work::Write { range, from: memory.iovecs(cuts) });
        assert_eq!(outcome, Outcome::Done, "writing {range}");
    }

    pub fn flush(&mut self) {
        assert_eq!(self.run(Work::Flush), Outcome::Done);
    }

    pub fn discard(&mut self, ranges: Vec<SectorRange>) {
        assert_eq!(self.run(Work::Discard { ranges }), Outcome::Done);
    }

    pub fn zero(&mut self, ranges: &[SectorRange], unmap: bool) {
        let ranges = ranges.iter().map(|range| ZeroRange { range: *range, unmap }).collect();
        assert_eq!(self.run(Work::WriteZeroes { ranges }), Outcome::Done);
    }

    /// Closes the disk cleanly.
    pub fn close(self) {
        let TestDisk { disk, lane, .. } = self;
        assert!(lane.is_idle());
        drop(lane);
        disk.close().expect("a clean close");
    }

    /// Drops the disk without closing it, like a killed daemon.
    pub fn abandon(self) {}
}
