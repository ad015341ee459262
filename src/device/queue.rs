//! One virtqueue in service: a ring on one side, a lane of the disk on the other, and turns between them.
//!
//! ```text
//!   serve:  poll ─ complete ─ (signal) ─ take up to 16 ─ submit ─ poll ─ complete ─ (signal: `interrupt.rs`)
//! ```
//!
//! A turn makes one submit (two where a copy fails, or the host is told to write early) and no other system call but a signal
//! where the driver wants one; behind that, while it is still being found out what the host has in memory, some to ask
//! (`Lane::learn`). The vring's lock is held for moments, never across I/O, so that the control thread does not wait for a
//! disk.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use super::guest_memory::GuestView;
use super::inflight::InFlightRecord;
use super::interrupt::InterruptCoalescing;
use super::parse::RequestRules;
use super::spec::{MAX_QUEUE_SIZE, feature};
use super::split_ring::{RingError, RingLayout, SplitRing};
use super::virtqueue::{PopResult, Virtqueue};
use super::{Device, SharedMemory, Vring};
use crate::disk::{Answer, Lane};
use crate::error::Result;

/// Requests of a turn before the clock is asked: with two in flight it cost 7 per cent.
const UNTIMED_REQUESTS: u32 = 3;

/// What is to be done after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServeResult {
    /// Nothing: wait for a kick (see [`Queue::enable_kicks`]) or a wake fd.
    Idle,
    /// There is work left: come again (V17).
    More,
    /// The ring is broken: nothing is taken any more, only what is in flight completes. Wait for a wake fd.
    Broken,
}

/// One virtqueue, owned by the thread that serves it.
pub struct Queue {
    device: Arc<Device>,
    lane: Lane,
    index: usize,
    /// While in service.
    virtqueue: Option<Virtqueue>,
    answers: Vec<Answer>,
    /// Whether the last turn left chains where they are for want of room.
    no_capacity: bool,
    /// Whether a signal that could not be given has been logged.
    interrupt_failure_logged: bool,
    pub(super) interrupts: InterruptCoalescing,
}

impl Queue {
    /// Queue `index` of `device`, not in service.
    pub fn new(device: Arc<Device>, lane: Lane, index: usize) -> Queue {
        Queue {
            device,
            lane,
            index,
            virtqueue: None,
            answers: Vec::new(),
            no_capacity: false,
            interrupt_failure_logged: false,
            interrupts: InterruptCoalescing::default(),
        }
    }

    /// Takes the ring that `vring` describes into service. It goes on at the used index that the ring itself holds, and
    /// at the vring's next avail index; or, with a record, behind the chains that the record has in flight, which are
    /// carried out first. The features must have been acknowledged before.
    ///
    /// # Errors
    /// `Invalid` where the ring breaks V1, or the record is of no use; the queue is then not in service.
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
        let exchange = Virtqueue::new(view, ring, record)?;
        if exchange.chains_to_resubmit() > 0 {
            log::info!(
                "queue {}: {} requests that were in flight are carried out again",
                self.index,
                exchange.chains_to_resubmit()
            );
        }
        self.virtqueue = Some(exchange);
        self.interrupt_failure_logged = false;
        Ok(())
    }

    /// One turn: completes what is over, takes chains while the ring is enabled and the lane has room, submits them
    /// together, and completes those that are over already.
    ///
    /// # Errors
    /// Where the lane's engine fails, which ends this disk's service.
    pub fn serve(&mut self, vring: &Vring) -> io::Result<ServeResult> {
        let turn = self.serve_batch(vring);
        if turn.is_err() {
            self.send_interrupt(vring);
        }
        turn
    }

    fn serve_batch(&mut self, vring: &Vring) -> io::Result<ServeResult> {
        self.lane.poll(&mut self.answers)?;
        let late = self.complete_answers();
        let Some(exchange) = &self.virtqueue else { return Ok(ServeResult::Idle) };
        let is_broken = exchange.broken().is_some();
        let is_served = !is_broken && vring.get_ref().is_enabled();
        // What had to wait for the disk does not wait for a turn, too.
        if late || !is_served {
            self.send_interrupt(vring);
        } else {
            self.interrupt_if_due(vring);
        }
        if !is_served {
            return Ok(if is_broken { ServeResult::Broken } else { ServeResult::Idle });
        }
        let exchange = self.virtqueue.as_mut().expect("in service");
        let rules = request_rules(&self.device);
        exchange.ring().disable_kicks();
        let lane = &mut self.lane;
        let (mut pushed, mut begin) = (0, None);
        let room = lane.push_capacity();
        let push = |request| {
            lane.push(request);
            // A few are not worth asking the clock, and the work is done behind this.
            if pushed == UNTIMED_REQUESTS {
                begin = Some(Instant::now());
            }
            pushed += 1;
            lane.push_capacity()
        };
        let pause = match exchange.chains_to_resubmit() {
            0 => exchange.pop_chains(&rules, room, push),
            _ => match exchange.pop_resubmitted(&rules, room, push) {
                // What is new has its turn after what is old.
                PopResult::Empty => PopResult::BatchFull,
                pause => pause,
            },
        };
        self.no_capacity = pause == PopResult::NoCapacity;
        if pushed > 0 {
            self.lane.submit()?;
            self.lane.poll(&mut self.answers)?;
        }
        match begin {
            Some(begin) => self.interrupts.record_batch(pushed, begin.elapsed()),
            None if pause == PopResult::BatchFull => self.interrupts.record_large_batch(),
            None => {}
        }
        let completed = self.complete_answers();
        self.interrupt_if_due(vring);
        if pushed > 0 {
            self.lane.refresh_residency();
        }
        let exchange = self.virtqueue.as_mut().expect("in service");
        Ok(match pause {
            PopResult::Empty if pushed == 0 && !completed && !self.lane.has_queued_punch() => ServeResult::Idle,
            PopResult::Empty | PopResult::BatchFull => ServeResult::More,
            // Without an answer there is nothing to come again for before the lane wakes us.
            PopResult::NoCapacity if completed || self.lane.has_queued_punch() => ServeResult::More,
            PopResult::NoCapacity => ServeResult::Idle,
            PopResult::Broken => {
                // Memory that is lost concerns all queues: the control thread logs it, once.
                if let Some(rule) = exchange.broken().filter(|rule| *rule != RingError::MemoryLost) {
                    log::error!("queue {}: the driver broke its ring ({rule:?}); it is served no more", self.index);
                }
                ServeResult::Broken
            }
        })
    }

    /// To be called after an idle turn, before sleeping: asks the driver for kicks. True where there is work after all.
    pub fn enable_kicks(&mut self, vring: &Vring) -> bool {
        // What is full goes on with answers, not with kicks.
        let Some(exchange) = self.virtqueue.as_mut().filter(|x| x.broken().is_none() && !self.no_capacity) else {
            return false;
        };
        vring.get_ref().is_enabled() && exchange.ring().enable_kicks()
    }

    /// Whether the ring in service looks as if no driver had used it.
    pub fn is_unused(&self) -> bool {
        self.virtqueue.as_ref().is_some_and(Virtqueue::is_unused)
    }

    /// Completes all that is in flight and ends the service; gives the index of the avail ring at which to go on, which
    /// `vring` knows then too.
    ///
    /// # Errors
    /// Where the lane's engine fails.
    pub fn stop(&mut self, vring: &Vring) -> io::Result<u16> {
        self.send_interrupt(vring);
        self.lane.drain(&mut self.answers)?;
        self.complete_answers();
        // The index we give counts what a predecessor left as taken, so that has to be carried out, too.
        while let Some(exchange) =
            self.virtqueue.as_mut().filter(|x| x.chains_to_resubmit() > 0 && x.broken().is_none())
        {
            let lane = &mut self.lane;
            exchange.pop_resubmitted(&request_rules(&self.device), lane.push_capacity(), |request| {
                lane.push(request);
                lane.push_capacity()
            });
            self.lane.submit()?;
            self.lane.drain(&mut self.answers)?;
            self.complete_answers();
        }
        self.send_interrupt(vring);
        let mut state = vring.get_mut();
        let q = state.get_queue_mut();
        if let Some(mut exchange) = self.virtqueue.take() {
            let ring = exchange.ring();
            q.set_next_avail(ring.next_avail());
            q.set_next_used(ring.next_used());
        }
        Ok(q.next_avail())
    }

    /// Whether the ring is broken since a page of the guest's memory, or of the record, could not be had.
    pub fn is_memory_lost(&self) -> bool {
        self.virtqueue.as_ref().and_then(Virtqueue::broken) == Some(RingError::MemoryLost)
    }

    /// What to wait for beside the kick.
    pub fn wake_fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.lane.wake_fd(), Some(self.lane.mailbox_fd())]
    }

    /// The lane.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    /// Gives the driver all answers, and notes whether it wants a signal; whether there were answers.
    fn complete_answers(&mut self) -> bool {
        let Some(exchange) = &mut self.virtqueue else {
            assert!(self.answers.is_empty(), "a queue out of service has nothing in flight");
            return false;
        };
        let any = !self.answers.is_empty();
        self.answers.drain(..).for_each(|answer| exchange.complete(answer));
        if exchange.publish() {
            self.interrupts.request();
        }
        any
    }

    /// Gives the driver the signal that it is owed, unless what is left to be taken at once lets it wait.
    fn interrupt_if_due(&mut self, vring: &Vring) {
        if !self.interrupts.is_pending() {
            return;
        }
        // For what waits for room or lies in a broken ring, there is no next turn at once.
        let left = match &self.virtqueue {
            Some(exchange) if !self.no_capacity && exchange.broken().is_none() => exchange.available_chains(),
            _ => 0,
        };
        if self.interrupts.is_due(left, Instant::now) {
            self.send_interrupt(vring);
        }
    }

    /// Gives the driver the signal that it is owed.
    fn send_interrupt(&mut self, vring: &Vring) {
        if !self.interrupts.take() {
            return;
        }
        match vring.get_ref().signal_used_queue() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock && !self.interrupt_failure_logged => {
                // Its own harm; other queues go on.
                log::warn!("queue {}: the front-end's call descriptor takes no signals: {e}", self.index);
                self.interrupt_failure_logged = true;
            }
            // WouldBlock: a counter at its limit is a signal that was not yet looked at.
            _ => (),
        }
    }
}

fn request_rules(device: &Device) -> RequestRules<'_> {
    let disk = device.disk();
    RequestRules {
        capacity: disk.capacity(),
        read_only: disk.is_read_only(),
        features: device.acked(),
        serial: disk.serial(),
    }
}
