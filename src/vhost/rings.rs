//! What a front-end has said of its rings, and running those that are complete.
//!
//! A ring runs when everything it needs is there: features, memory, size, addresses, a kick, and the word to enable
//! it. What a running ring uses is changed only after the ring is drained and stopped; then it goes on where it was.
//! Dropped, the rings are drained. Addresses of rings stay as the front-end gave them until a ring is started, so they
//! may come before the memory they lie in.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::inflight::InflightRecords;
use super::memory::MemoryTable;
use super::memory_sharing::{SHARE_HINT, SharingCheck};
use super::queue_thread::ReadyRing;
use super::worker::{EXIT_TIMEOUT, WaitOutcome, Worker, wait_for_reply};
use crate::device::{AtomicMemory, InFlightRecord, Vring};

/// How long a front-end may wait for the requests in flight: longer than a disk takes that wakes, or a path that fails over.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The rings of one connection.
pub(super) struct Rings<'a> {
    /// Readable when the daemon is to end.
    stop: BorrowedFd<'a>,
    pub(super) workers: &'a [Worker],
    /// The disk's name, for the log.
    pub(super) name: &'a str,
    pub(super) memory: MemoryTable,
    /// Where the front-end keeps what is in flight, if it does.
    pub(super) inflight: Option<InflightRecords>,
    /// What the front-end accepted of the features; none before it did.
    pub(super) features: Option<u64>,
    pub(super) setups: Vec<RingSetup>,
    sharing: SharingCheck,
    /// Whether the log has it that a ring has no in-flight record.
    has_warned_no_record: bool,
    /// Requests did not end in time, so where a ring stands is unknown: the connection is to be closed.
    is_stuck: bool,
}

/// What the front-end has said about a ring.
#[derive(Default)]
pub(super) struct RingSetup {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// Where it starts, or where it stopped.
    pub(super) base: u16,
    pub(super) kick: Option<Kick>,
    pub(super) call: Option<File>,
    pub(super) err: Option<File>,
    pub(super) enabled: bool,
    pub(super) running: bool,
}

/// How the guest announces requests in a ring.
#[derive(Clone)]
pub(super) enum Kick {
    /// By this event counter.
    EventFd(Arc<File>),
    /// Not at all: the ring is to be polled.
    Polled,
}

/// Where a ring lies, in the front-end's own address space.
#[derive(Clone, Copy)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A refusal, with the reason for the log.
pub(super) fn refusal(why: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(why.into()))
}

impl<'a> Rings<'a> {
    /// Rings of which nothing has been said, one a worker.
    pub(super) fn new(workers: &'a [Worker], name: &'a str, end: BorrowedFd<'a>) -> Rings<'a> {
        let setups = workers.iter().map(|_| RingSetup::default()).collect();
        Rings {
            stop: end,
            workers,
            name,
            memory: MemoryTable::default(),
            inflight: None,
            features: None,
            setups,
            sharing: SharingCheck::default(),
            has_warned_no_record: false,
            is_stuck: false,
        }
    }

    /// Starts the ring if it has all it needs and does not run.
    pub(super) fn start_if_complete(&mut self, index: usize) -> VhostResult<()> {
        let ring = &self.setups[index];
        let (Some(features), Some(addresses), Some(kick)) = (self.features, ring.addresses, &ring.kick) else {
            return Ok(());
        };
        if ring.running || !ring.enabled || ring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        // A late write of any queue could land on top of what this ring's requests write.
        if self.workers.iter().any(Worker::has_unanswered_stop) {
            self.is_stuck = true;
            return Err(refusal("requests of an earlier ring are still in flight: the storage does not answer"));
        }
        let vring = self.build_vring(ring, addresses, features)?;
        let cloned = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let (call, err) = (cloned(&ring.call), cloned(&ring.err));
        vring.set_call(call.map_err(VhostError::ReqHandlerError)?);
        let err = err.map_err(VhostError::ReqHandlerError)?;
        let kick = match kick {
            Kick::EventFd(file) => Some(file.clone()),
            Kick::Polled => None,
        };
        let base = ring.base;
        let (memory, record, sharing) =
            (self.memory.shared_memory(), self.inflight_record(index), self.sharing.clone());
        let ring = ReadyRing { vring, memory, record, kick, err, base, sharing };
        let begun = Instant::now();
        let started = self.workers[index].start_ring(ring, || is_drain_overdue(self.stop, begun.elapsed()));
        started.map_err(|e| {
            self.is_stuck |= self.workers[index].has_unanswered_stop();
            refusal(e.line())
        })?;
        debug!("disk {}: ring {index} runs from {base}", self.name);
        self.setups[index].running = true;
        Ok(())
    }

    /// The in-flight record of a ring, if the front-end keeps one that is large enough. A guest may choose a larger ring than
    /// the front-end expects (virtio-mmio lets it). Such a ring is served without a record, as if the front-end kept none.
    fn inflight_record(&mut self, index: usize) -> Option<InFlightRecord> {
        let size = self.setups[index].size;
        let record = self.inflight.as_ref()?.record(index);
        let room = record.as_ref().map_or(0, InFlightRecord::entries);
        if size <= room {
            return record;
        }
        if !std::mem::replace(&mut self.has_warned_no_record, true) {
            warn!(
                "disk {}: the front-end's in-flight record of ring {index} is for {room} descriptors, and the ring has {size}: it \
                 is served without the record, and requests in flight may be lost if this daemon is killed. Set the \
                 front-end's queue size to {size} or more (QEMU: queue-size={size})",
                self.name
            );
        }
        None
    }

    /// Whether a ring has everything but memory.
    pub(super) fn waits_for_memory(&self) -> bool {
        let complete =
            |ring: &RingSetup| ring.enabled && ring.size > 0 && ring.addresses.is_some() && ring.kick.is_some();
        self.memory.is_empty() && self.features.is_some() && self.setups.iter().any(complete)
    }

    /// A ring's state as the device works on it.
    fn build_vring(&self, ring: &RingSetup, at: RingAddresses, features: u64) -> VhostResult<Vring> {
        let at = self.guest_addresses(at, ring.size)?;
        let refused = |e| refusal(format!("the ring cannot be laid out: {e}"));
        let vring = Vring::new(AtomicMemory::from(self.memory.shared_memory().regions().clone()), ring.size)
            .map_err(refused)?;
        vring.set_queue_size(ring.size);
        vring.set_queue_info(at.descriptors, at.available, at.used).map_err(refused)?;
        vring.set_queue_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        vring.set_queue_next_avail(ring.base);
        vring.set_queue_next_used(vring.queue_used_idx().map_err(refused)?);
        vring.set_enabled(true);
        vring.set_queue_ready(true);
        Ok(vring)
    }

    /// The ring's places as guest addresses; each part must lie in one region.
    pub(super) fn guest_addresses(&self, at: RingAddresses, size: u16) -> VhostResult<RingAddresses> {
        let size = u64::from(size);
        // A split ring: 16 bytes a descriptor; flags, index and 2 bytes an entry; flags, index and 8 bytes an entry;
        // and the event index after each of the latter.
        let place = |what: &str, user, len| {
            let guest = self.memory.guest_address(user, len);
            guest.ok_or_else(|| {
                refusal(format!(
                    "the {what} at {user:#x} lies outside the memory that the front-end shares. {SHARE_HINT}"
                ))
            })
        };
        Ok(RingAddresses {
            descriptors: place("descriptor table", at.descriptors, 16 * size)?,
            available: place("available ring", at.available, 6 + 2 * size)?,
            used: place("used ring", at.used, 6 + 8 * size)?,
        })
    }

    /// Drains and stops these rings, all at once; they keep their place.
    ///
    /// # Errors
    /// If the requests of a queue do not end in time. The ring then counts as stopped at an unknown place.
    pub(super) fn stop(&mut self, range: Range<usize>) -> VhostResult<()> {
        let running: Vec<usize> = range.filter(|i| self.setups[*i].running).collect();
        let answers: Vec<_> = running.iter().map(|i| self.workers[*i].stop_ring()).collect();
        let (begun, mut outcome) = (Instant::now(), Ok(()));
        for (index, answer) in running.iter().zip(answers) {
            let ring = &mut self.setups[*index];
            ring.running = false;
            match wait_for_reply(&answer, || is_drain_overdue(self.stop, begun.elapsed())) {
                WaitOutcome::Answer(base) => ring.base = base,
                WaitOutcome::ThreadLost => warn!("disk {}: the thread of queue {index} is lost", self.name),
                WaitOutcome::TimedOut => {
                    self.workers[*index].keep_unanswered_stop(answer);
                    self.is_stuck = true;
                    let what = format!("the requests of queue {index} do not end: the storage does not answer");
                    warn!("disk {}: {what}", self.name);
                    outcome = Err(refusal(what));
                }
            }
        }
        outcome
    }

    pub(super) fn stop_all(&mut self) -> VhostResult<()> {
        self.stop(0..self.setups.len())
    }

    /// Whether the connection is to be closed because requests do not end. The front-end may connect again, and is served
    /// once they have ended.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_stuck
    }

    /// Whether a page of the guest's memory, or of the in-flight region, could not be had.
    pub(super) fn is_memory_lost(&self) -> bool {
        self.memory.is_lost() || self.inflight.as_ref().is_some_and(InflightRecords::is_lost)
    }

    /// Starts every ring that is complete. One that cannot be started stays stopped until it is set up anew.
    pub(super) fn start_all(&mut self) {
        for index in 0..self.setups.len() {
            if let Err(e) = self.start_if_complete(index) {
                warn!("disk {}: ring {index} does not start: {e}", self.name);
            }
        }
    }

    /// Puts another memory table in place while no ring runs.
    ///
    /// # Errors
    /// As [`Rings::stop`].
    pub(super) fn change_memory(&mut self, table: MemoryTable) -> VhostResult<()> {
        self.stop_all()?;
        self.memory = table;
        self.start_all();
        Ok(())
    }

    /// Changes a ring while it does not run.
    pub(super) fn change_ring(&mut self, index: usize, change: impl FnOnce(&mut RingSetup)) -> VhostResult<()> {
        self.stop(index..index + 1)?;
        change(&mut self.setups[index]);
        self.start_if_complete(index)
    }
}

impl Drop for Rings<'_> {
    fn drop(&mut self) {
        // What does not end in time was logged.
        let _ = self.stop_all();
    }
}

/// Whether a wait of so long for a queue is too long.
fn is_drain_overdue(end: BorrowedFd<'_>, waited: Duration) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let is_ending = || poll(&mut [PollFd::from_borrowed_fd(end, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0);
    waited > DRAIN_TIMEOUT || waited > EXIT_TIMEOUT && is_ending()
}
