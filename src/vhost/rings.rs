//! The rings of one connection: their setup as the front-end sent it, and the commands that start and stop them.
//!
//! A ring is complete when features, memory, size, addresses and a kick are set, and the ring is enabled. A complete
//! ring runs. Before its setup is changed, a running ring is drained and stopped; it resumes at the same index. Only
//! the call and error eventfds are replaced while the ring runs. Ring addresses are translated when a ring starts, so a
//! front-end may send them before the memory that contains the ring. Dropping [`Rings`] drains all rings.

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

/// Maximum time to wait for requests in flight: longer than a disk takes to spin up or a multipath device to fail over.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The rings of one connection.
pub(super) struct Rings<'a> {
    /// A descriptor that is readable after the stop signal.
    stop: BorrowedFd<'a>,
    pub(super) workers: &'a [Worker],
    /// Name of the disk, for the log.
    pub(super) name: &'a str,
    pub(super) memory: MemoryTable,
    /// The in-flight region of the front-end, or `None` if the front-end has not set one.
    pub(super) inflight: Option<InflightRecords>,
    /// The features that the front-end accepted; `None` before SET_FEATURES.
    pub(super) features: Option<u64>,
    pub(super) setups: Vec<RingSetup>,
    sharing: SharingCheck,
    /// Whether the warning about a ring that is served without its in-flight record was logged.
    has_warned_no_record: bool,
    /// Whether requests did not complete in time. Then the index of a ring is unknown, and the connection must be
    /// closed.
    is_stuck: bool,
}

/// Setup of one ring by the front-end, and whether the ring runs.
#[derive(Default)]
pub(super) struct RingSetup {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// Index of the next available entry, at which the ring starts. Updated when the ring stops.
    pub(super) base: u16,
    pub(super) kick: Option<Kick>,
    pub(super) call: Option<File>,
    pub(super) err: Option<File>,
    pub(super) enabled: bool,
    pub(super) running: bool,
}

/// The way in which the guest announces requests.
#[derive(Clone)]
pub(super) enum Kick {
    /// The guest writes to this eventfd.
    EventFd(Arc<File>),
    /// The guest announces nothing, so the ring must be polled.
    Polled,
}

/// Addresses of the three parts of a ring: in the front-end's address space before translation, guest addresses after
/// it.
#[derive(Clone, Copy)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// Returns the error that refuses a message, with the reason for the log.
pub(super) fn refusal(why: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(why.into()))
}

impl<'a> Rings<'a> {
    /// Creates one ring per worker, without a setup.
    pub(super) fn new(workers: &'a [Worker], name: &'a str, stop: BorrowedFd<'a>) -> Rings<'a> {
        let setups = workers.iter().map(|_| RingSetup::default()).collect();
        Rings {
            stop,
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

    /// Starts the ring if it is complete and does not run.
    ///
    /// # Errors
    /// * A refusal if requests of an earlier ring are still in flight.
    /// * A refusal if a part of the ring does not lie in one memory region, or the worker cannot start the ring.
    /// * Any error of duplicating the call or error eventfd.
    pub(super) fn start_if_complete(&mut self, index: usize) -> VhostResult<()> {
        let ring = &self.setups[index];
        let (Some(features), Some(addresses), Some(kick)) = (self.features, ring.addresses, &ring.kick) else {
            return Ok(());
        };
        if ring.running || !ring.enabled || ring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        // A write that is still in flight in any queue could overwrite a later write of this ring.
        if self.workers.iter().any(Worker::has_unanswered_stop) {
            self.is_stuck = true;
            return Err(refusal("the storage does not respond: requests of an earlier ring are still in flight"));
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

    /// Returns the in-flight record of a ring if the front-end has one that is large enough. A guest may choose a
    /// larger ring than the front-end expects (virtio-mmio allows this). A ring that is larger than its record is
    /// served without the record.
    fn inflight_record(&mut self, index: usize) -> Option<InFlightRecord> {
        let size = self.setups[index].size;
        let record = self.inflight.as_ref()?.record(index);
        let room = record.as_ref().map_or(0, InFlightRecord::entries);
        if size <= room {
            return record;
        }
        if !std::mem::replace(&mut self.has_warned_no_record, true) {
            warn!(
                "disk {}: ring {index} has {size} descriptors, but the front-end's in-flight record has only {room}. The ring is \
                 served without the record, so requests in flight may be lost if this daemon is killed. Set the front-end's \
                 queue size to {size} or more (QEMU: queue-size={size})",
                self.name
            );
        }
        None
    }

    /// Returns whether at least one ring lacks nothing but guest memory.
    pub(super) fn waits_for_memory(&self) -> bool {
        let complete =
            |ring: &RingSetup| ring.enabled && ring.size > 0 && ring.addresses.is_some() && ring.kick.is_some();
        self.memory.is_empty() && self.features.is_some() && self.setups.iter().any(complete)
    }

    /// Builds the vring that the device serves.
    ///
    /// # Errors
    /// A refusal if a part of the ring does not lie in one memory region, or the vhost crates reject the ring.
    fn build_vring(&self, ring: &RingSetup, at: RingAddresses, features: u64) -> VhostResult<Vring> {
        let at = self.guest_addresses(at, ring.size)?;
        let refused = |e| refusal(format!("cannot set up the ring: {e}"));
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

    /// Translates the addresses of a ring to guest addresses.
    ///
    /// # Errors
    /// A refusal if a part of the ring does not lie in one memory region.
    pub(super) fn guest_addresses(&self, at: RingAddresses, size: u16) -> VhostResult<RingAddresses> {
        let size = u64::from(size);
        // Layout of a split ring. The descriptor table has 16 bytes per descriptor. The available ring has flags,
        // index, 2 bytes per entry, and event index. The used ring has flags, index, 8 bytes per entry, and event
        // index.
        let place = |what: &str, user, len| {
            let guest = self.memory.guest_address(user, len);
            guest.ok_or_else(|| {
                refusal(format!(
                    "the {what} at {user:#x} is outside the memory that the front-end shares. {SHARE_HINT}"
                ))
            })
        };
        Ok(RingAddresses {
            descriptors: place("descriptor table", at.descriptors, 16 * size)?,
            available: place("available ring", at.available, 6 + 2 * size)?,
            used: place("used ring", at.used, 6 + 8 * size)?,
        })
    }

    /// Stops the running rings of `range`, and waits until all are drained. Then each setup contains the index at which
    /// its ring resumes; if the thread of a ring has ended, the index stays as it was.
    ///
    /// # Errors
    /// A refusal if the requests of a queue do not complete in time. The ring then counts as stopped, and its index is
    /// unknown.
    pub(super) fn stop(&mut self, range: Range<usize>) -> VhostResult<()> {
        let running: Vec<usize> = range.filter(|i| self.setups[*i].running).collect();
        let answers: Vec<_> = running.iter().map(|i| self.workers[*i].stop_ring()).collect();
        let (begun, mut outcome) = (Instant::now(), Ok(()));
        for (index, answer) in running.iter().zip(answers) {
            let ring = &mut self.setups[*index];
            ring.running = false;
            match wait_for_reply(&answer, || is_drain_overdue(self.stop, begun.elapsed())) {
                WaitOutcome::Answer(base) => ring.base = base,
                WaitOutcome::ThreadLost => warn!("disk {}: the thread of queue {index} has ended", self.name),
                WaitOutcome::TimedOut => {
                    self.workers[*index].keep_unanswered_stop(answer);
                    self.is_stuck = true;
                    let what = format!("the storage does not respond: requests of queue {index} do not complete");
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

    /// Returns whether the connection must be closed because requests in flight do not complete. The front-end may
    /// connect again, and is served after the requests have completed.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_stuck
    }

    /// Returns whether an access to guest memory or to the in-flight region failed.
    pub(super) fn is_memory_lost(&self) -> bool {
        self.memory.is_lost() || self.inflight.as_ref().is_some_and(InflightRecords::is_lost)
    }

    /// Starts all complete rings. A ring that cannot be started stays stopped until its setup changes.
    pub(super) fn start_all(&mut self) {
        for index in 0..self.setups.len() {
            if let Err(e) = self.start_if_complete(index) {
                warn!("disk {}: cannot start ring {index}: {e}", self.name);
            }
        }
    }

    /// Stops all rings, replaces the memory table, and starts the complete rings again.
    ///
    /// # Errors
    /// A refusal if requests in flight do not complete in time. Then the table is not replaced.
    pub(super) fn change_memory(&mut self, table: MemoryTable) -> VhostResult<()> {
        self.stop_all()?;
        self.memory = table;
        self.start_all();
        Ok(())
    }

    /// Stops a ring, changes its setup, and starts the ring again if it is complete.
    ///
    /// # Errors
    /// * A refusal if requests in flight do not complete in time. Then the setup is not changed.
    /// * Any error of [`Rings::start_if_complete`].
    pub(super) fn change_ring(&mut self, index: usize, change: impl FnOnce(&mut RingSetup)) -> VhostResult<()> {
        self.stop(index..index + 1)?;
        change(&mut self.setups[index]);
        self.start_if_complete(index)
    }
}

impl Drop for Rings<'_> {
    fn drop(&mut self) {
        // `stop` has logged the timeout, if there was one.
        let _ = self.stop_all();
    }
}

/// Returns whether a drain that has taken `waited` is overdue. After the stop signal, the limit is [`EXIT_TIMEOUT`]
/// instead of [`DRAIN_TIMEOUT`].
fn is_drain_overdue(stop: BorrowedFd<'_>, waited: Duration) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let is_stopping = || poll(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0);
    waited > DRAIN_TIMEOUT || waited > EXIT_TIMEOUT && is_stopping()
}
