//! One queue of the device: moves requests and answers between a virtqueue and a lane of the disk, batch by batch.
//!
//! ```text
//!   serve:  poll ─ complete ─ (interrupt) ─ pop up to 16 ─ submit ─ poll ─ complete ─ (interrupt, see `interrupt.rs`)
//! ```
//!
//! A batch usually makes one submit (more if a copy fails, early writeback is due, or requests of earlier batches push
//! further operations), and one system call for each of at most two interrupts. `Lane::refresh_residency` may then make
//! a few more system calls. The lock of the vring is never held across I/O, so the control thread does not wait for the
//! disk.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use super::config::Device;
use super::guest_memory::{AtomicMemory, GuestView, SharedMemory};
use super::inflight::InFlightRecord;
use super::interrupt::InterruptCoalescing;
use super::parse::RequestRules;
use super::request_times::RequestTimes;
use super::spec::{MAX_QUEUE_SIZE, feature};
use super::split_ring::{RingError, RingLayout, SplitRing};
use super::virtqueue::{PopResult, Virtqueue};
use crate::disk::{Answer, Lane};
use crate::error::Result;

/// The state of a virtqueue as the front-end has sent it.
pub type Vring = vhost_user_backend::VringRwLock<AtomicMemory>;

/// Number of requests of a batch up to which its time does not matter to interrupt coalescing.
const UNTIMED_REQUESTS: u32 = 3;

/// The next action of a queue's thread after a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServeResult {
    /// Wait for a kick (requires [`Queue::enable_kicks`]) or a wake descriptor.
    Idle,
    /// Serve the next batch, after the thread has handled other events (V17).
    More,
    /// Wait for a wake descriptor: the ring is broken. Requests in flight complete, but no more chains are popped.
    Broken,
}

/// One virtqueue, owned by the thread that serves it.
pub struct Queue {
    device: Arc<Device>,
    lane: Lane,
    index: usize,
    /// `None` while the queue is stopped.
    virtqueue: Option<Virtqueue>,
    answers: Vec<Answer>,
    /// Whether the last batch left chains in the ring because the lane or the number of bytes in flight was at its
    /// limit.
    no_capacity: bool,
    /// Whether a failure to send an interrupt has been logged.
    interrupt_failure_logged: bool,
    pub(super) interrupts: InterruptCoalescing,
    request_times: RequestTimes,
}

impl Queue {
    /// Creates queue `index` of `device`, stopped.
    pub fn new(device: Arc<Device>, lane: Lane, index: usize) -> Queue {
        let request_times = RequestTimes::new(lane.counters().clone(), index);
        Queue {
            device,
            lane,
            index,
            virtqueue: None,
            answers: Vec::new(),
            no_capacity: false,
            interrupt_failure_logged: false,
            interrupts: InterruptCoalescing::default(),
            request_times,
        }
    }

    /// Starts to serve the ring that `vring` describes. Requires that the driver has acknowledged features.
    ///
    /// The used index is read from the ring. Without a record, the next available index is that of `vring`. With a
    /// record, the next available index is the used index plus the number of chains that the record has in flight, and
    /// these chains are resubmitted first.
    ///
    /// # Errors
    /// The queue stays stopped.
    /// - `Invalid` if the ring violates V1, or the record is not valid.
    /// - `Io` if there is a record, and a page of the guest's memory or of the record is lost.
    pub fn start(&mut self, vring: &Vring, memory: Arc<SharedMemory>, record: Option<InFlightRecord>) -> Result<()> {
        assert!(self.virtqueue.is_none(), "a queue is stopped before it is started again");
        let (layout, next_avail) = {
            let state = vring.get_ref();
            let q = state.get_queue();
            let layout =
                RingLayout { size: q.size(), table: q.desc_table(), avail: q.avail_ring(), used: q.used_ring() };
            (layout, q.next_avail())
        };
        let view = GuestView::new(memory);
        let event_idx = self.device.acked() & feature::EVENT_IDX != 0;
        let ring = SplitRing::new(&view, layout, MAX_QUEUE_SIZE, event_idx, next_avail)?;
        let virtqueue = Virtqueue::new(view, ring, record)?;
        if virtqueue.chains_to_resubmit() > 0 {
            log::info!(
                "queue {}: {} requests that were in flight are carried out again",
                self.index,
                virtqueue.chains_to_resubmit()
            );
        }
        self.request_times.start_ring(layout.size);
        self.virtqueue = Some(virtqueue);
        self.interrupt_failure_logged = false;
        Ok(())
    }

    /// Serves one batch: completes answered requests, pops chains if the ring is enabled and the lane has capacity,
    /// submits their requests together, and completes the requests that are answered by then.
    ///
    /// # Errors
    /// Any error of the lane's engine. The disk cannot be served any more.
    pub fn serve(&mut self, vring: &Vring) -> io::Result<ServeResult> {
        let result = self.serve_batch(vring);
        if result.is_err() {
            self.send_interrupt(vring);
        }
        result
    }

    /// Lets the lane handle its events while there is no ring. No request is in flight then.
    ///
    /// # Errors
    /// Any error of the lane's engine.
    pub fn poll_without_ring(&mut self) -> io::Result<()> {
        self.lane.poll(&mut self.answers)
    }

    fn serve_batch(&mut self, vring: &Vring) -> io::Result<ServeResult> {
        self.lane.poll(&mut self.answers)?;
        let late = self.complete_answers();
        let Some(virtqueue) = &self.virtqueue else { return Ok(ServeResult::Idle) };
        let is_broken = virtqueue.broken().is_some();
        let is_served = !is_broken && vring.get_ref().is_enabled();
        // The disk was slow to answer these requests, so their interrupt does not wait for another batch.
        if late || !is_served {
            self.send_interrupt(vring);
        } else {
            self.interrupt_if_due(vring);
        }
        if !is_served {
            return Ok(if is_broken { ServeResult::Broken } else { ServeResult::Idle });
        }
        let virtqueue = self.virtqueue.as_mut().expect("checked above");
        let rules = request_rules(&self.device, &self.lane);
        virtqueue.ring().disable_kicks();
        let (lane, times) = (&mut self.lane, &mut self.request_times);
        times.begin_batch();
        let room = lane.push_capacity();
        let push = |request| {
            times.record_taken(&request);
            lane.push(request);
            lane.push_capacity()
        };
        let popped = match virtqueue.chains_to_resubmit() {
            0 => virtqueue.pop_chains(&rules, room, push),
            _ => match virtqueue.pop_resubmitted(&rules, room, push) {
                // The next batch pops the new chains.
                PopResult::Empty => PopResult::BatchFull,
                popped => popped,
            },
        };
        self.request_times.record_refused(std::mem::take(&mut virtqueue.refused));
        let pushed = self.request_times.end_batch();
        self.no_capacity = popped == PopResult::NoCapacity;
        if pushed > 0 {
            self.lane.submit()?;
            self.lane.poll(&mut self.answers)?;
        }
        if pushed > UNTIMED_REQUESTS {
            self.interrupts.record_batch(pushed, Duration::from_nanos(self.request_times.batch_nanos()));
        } else if popped == PopResult::BatchFull {
            self.interrupts.record_large_batch();
        }
        let completed = self.complete_answers();
        self.interrupt_if_due(vring);
        if pushed > 0 {
            self.lane.refresh_residency();
        }
        let virtqueue = self.virtqueue.as_mut().expect("checked above");
        Ok(match popped {
            PopResult::Empty if pushed == 0 && !completed && !self.lane.has_queued_punch() => ServeResult::Idle,
            PopResult::Empty | PopResult::BatchFull => ServeResult::More,
            // Without an answer there is no new capacity. The lane's descriptors wake the thread when there are
            // answers.
            PopResult::NoCapacity if completed || self.lane.has_queued_punch() => ServeResult::More,
            PopResult::NoCapacity => ServeResult::Idle,
            PopResult::Broken => {
                // The control thread logs lost memory, once for all queues.
                if let Some(rule) = virtqueue.broken().filter(|rule| *rule != RingError::MemoryLost) {
                    log::error!(
                        "queue {}: the driver violated the rules of virtio ({rule:?}); the queue is out of service until \
                         the driver resets the device",
                        self.index
                    );
                }
                ServeResult::Broken
            }
        })
    }

    /// Enables kicks of the driver. The thread must call this before it sleeps. Returns whether the driver added chains
    /// in the meantime. Does nothing and returns false if the ring is stopped, disabled or broken, or if the last batch
    /// ended because the lane had no capacity.
    pub fn enable_kicks(&mut self, vring: &Vring) -> bool {
        // If the lane has no capacity, answers have to wake the thread, not kicks.
        let Some(virtqueue) = self.virtqueue.as_mut().filter(|x| x.broken().is_none() && !self.no_capacity) else {
            return false;
        };
        vring.get_ref().is_enabled() && virtqueue.ring().enable_kicks()
    }

    /// Whether the queue serves a ring whose indices are all zero, as if no driver had used it.
    pub fn is_unused(&self) -> bool {
        self.virtqueue.as_ref().is_some_and(Virtqueue::is_unused)
    }

    /// Stops the queue after all requests in flight have completed. Returns the next available index, and stores it in
    /// `vring`.
    ///
    /// # Errors
    /// Any error of the lane's engine.
    pub fn stop(&mut self, vring: &Vring) -> io::Result<u16> {
        self.send_interrupt(vring);
        self.lane.drain(&mut self.answers)?;
        self.complete_answers();
        // The returned index counts the chains of the previous daemon as popped. So these chains have to be completed,
        // too.
        while let Some(virtqueue) =
            self.virtqueue.as_mut().filter(|x| x.chains_to_resubmit() > 0 && x.broken().is_none())
        {
            let (lane, times) = (&mut self.lane, &mut self.request_times);
            times.begin_batch();
            let rules = request_rules(&self.device, lane);
            virtqueue.pop_resubmitted(&rules, lane.push_capacity(), |request| {
                times.record_taken(&request);
                lane.push(request);
                lane.push_capacity()
            });
            times.end_batch();
            self.lane.submit()?;
            self.lane.drain(&mut self.answers)?;
            self.complete_answers();
        }
        self.send_interrupt(vring);
        let mut state = vring.get_mut();
        let q = state.get_queue_mut();
        if let Some(mut virtqueue) = self.virtqueue.take() {
            let ring = virtqueue.ring();
            q.set_next_avail(ring.next_avail());
            q.set_next_used(ring.next_used());
        }
        Ok(q.next_avail())
    }

    /// Whether the ring is broken because a page of the guest's memory or of the in-flight record is lost.
    pub fn is_memory_lost(&self) -> bool {
        self.virtqueue.as_ref().and_then(Virtqueue::broken) == Some(RingError::MemoryLost)
    }

    /// Descriptors that wake the thread of the queue, in addition to the kick.
    pub fn wake_fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.lane.wake_fd(), Some(self.lane.mailbox_fd())]
    }

    /// The queue's lane of the disk.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    /// Completes and publishes all answered requests, and requests an interrupt if the driver requires one. Returns
    /// whether there were answers.
    fn complete_answers(&mut self) -> bool {
        let Some(virtqueue) = &mut self.virtqueue else {
            assert!(self.answers.is_empty(), "a stopped queue has nothing in flight");
            return false;
        };
        let any = !self.answers.is_empty();
        self.request_times.record_answers(&self.answers);
        self.answers.drain(..).for_each(|answer| virtqueue.complete(answer));
        if virtqueue.publish() {
            self.interrupts.request();
        }
        any
    }

    /// Sends the pending interrupt, unless the interrupt may wait until the chains that are available now are served.
    fn interrupt_if_due(&mut self, vring: &Vring) {
        if !self.interrupts.is_pending() {
            return;
        }
        // If the lane has no capacity or the ring is broken, no batch follows at once.
        let left = match &self.virtqueue {
            Some(virtqueue) if !self.no_capacity && virtqueue.broken().is_none() => virtqueue.available_chains(),
            _ => 0,
        };
        if self.interrupts.is_due(left, Instant::now) {
            self.send_interrupt(vring);
        }
    }

    /// Sends a pending interrupt.
    fn send_interrupt(&mut self, vring: &Vring) {
        if !self.interrupts.take() {
            return;
        }
        match vring.get_ref().signal_used_queue() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock && !self.interrupt_failure_logged => {
                // The failure harms only the front-end's own guest.
                log::warn!(
                    "queue {}: cannot send an interrupt to the driver by the front-end's call descriptor: {e}",
                    self.index
                );
                self.interrupt_failure_logged = true;
            }
            // WouldBlock: the counter of the eventfd is at its limit, so an interrupt is pending already.
            _ => (),
        }
    }
}

fn request_rules<'a>(device: &'a Device, lane: &Lane) -> RequestRules<'a> {
    let disk = device.disk();
    RequestRules {
        capacity: lane.capacity(),
        read_only: disk.is_read_only(),
        features: device.acked(),
        serial: disk.serial(),
    }
}
