//! One virtqueue in service: a ring on one side, a lane of the disk on the other, and turns between them.
//!
//! ```text
//!   serve:  poll ─ complete ─ (signal) ─ take up to 16 ─ submit ─ poll ─ complete ─ (signal: `signal.rs`)
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

use super::exchange::{Exchange, Pause};
use super::guest::View;
use super::inflight::Record;
use super::parse::Rules;
use super::ring::{Broken, Layout, Ring};
use super::signal::Signals;
use super::spec::{MAX_QUEUE_SIZE, feature};
use super::{Device, SharedMemory, Vring};
use crate::disk::{Answer, Lane};
use crate::error::Result;

/// Requests of a turn before the clock is asked: with two in flight it cost 7 per cent.
const UNTIMED: u32 = 3;

/// What is to be done after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Nothing: wait for a kick (see [`Queue::rest`]) or a wake fd.
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
    exchange: Option<Exchange>,
    answers: Vec<Answer>,
    /// Whether the last turn left chains where they are for want of room.
    full: bool,
    /// Whether a signal that could not be given has been logged.
    deaf: bool,
    pub(super) signals: Signals,
}

impl Queue {
    /// Queue `index` of `device`, not in service.
    pub fn new(device: Arc<Device>, lane: Lane, index: usize) -> Queue {
        Queue {
            device,
            lane,
            index,
            exchange: None,
            answers: Vec::new(),
            full: false,
            deaf: false,
            signals: Signals::default(),
        }
    }

    /// Takes the ring that `vring` describes into service. It goes on at the used index that the ring itself holds, and
    /// at the vring's next avail index; or, with a record, behind the chains that the record has in flight, which are
    /// carried out first. The features must have been acknowledged before.
    ///
    /// # Errors
    /// `Invalid` where the ring breaks V1, or the record is of no use; the queue is then not in service.
    pub fn start(&mut self, vring: &Vring, memory: Arc<SharedMemory>, record: Option<Record>) -> Result<()> {
        assert!(self.exchange.is_none(), "a queue is stopped before it is started again");
        let (layout, next_avail) = {
            let state = vring.get_ref();
            let q = state.get_queue();
            let layout = Layout { size: q.size(), table: q.desc_table(), avail: q.avail_ring(), used: q.used_ring() };
            (layout, q.next_avail())
        };
        let view = View::new(memory);
        let event_idx = self.device.acked() & feature::EVENT_IDX != 0;
        let ring = Ring::new(&view, layout, MAX_QUEUE_SIZE, event_idx, next_avail)?;
        let exchange = Exchange::new(view, ring, record)?;
        if exchange.owed() > 0 {
            log::info!("queue {}: {} requests that were in flight are carried out again", self.index, exchange.owed());
        }
        self.exchange = Some(exchange);
        self.deaf = false;
        Ok(())
    }

    /// One turn: completes what is over, takes chains while the ring is enabled and the lane has room, submits them
    /// together, and completes those that are over already.
    ///
    /// # Errors
    /// Where the lane's engine fails, which ends this disk's service.
    pub fn serve(&mut self, vring: &Vring) -> io::Result<Turn> {
        let turn = self.turn(vring);
        if turn.is_err() {
            self.signal(vring);
        }
        turn
    }

    fn turn(&mut self, vring: &Vring) -> io::Result<Turn> {
        self.lane.poll(&mut self.answers)?;
        let late = self.settle();
        let Some(exchange) = &self.exchange else { return Ok(Turn::Idle) };
        let is_broken = exchange.broken().is_some();
        let is_served = !is_broken && vring.get_ref().is_enabled();
        // What had to wait for the disk does not wait for a turn, too.
        if late || !is_served {
            self.signal(vring);
        } else {
            self.signal_if_due(vring);
        }
        if !is_served {
            return Ok(if is_broken { Turn::Broken } else { Turn::Idle });
        }
        let exchange = self.exchange.as_mut().expect("in service");
        let rules = rules(&self.device);
        exchange.ring().refuse_kicks();
        let lane = &mut self.lane;
        let (mut pushed, mut begin) = (0, None);
        let room = lane.room();
        let push = |request| {
            lane.push(request);
            // A few are not worth asking the clock, and the work is done behind this.
            if pushed == UNTIMED {
                begin = Some(Instant::now());
            }
            pushed += 1;
            lane.room()
        };
        let pause = match exchange.owed() {
            0 => exchange.take(&rules, room, push),
            _ => match exchange.take_owed(&rules, room, push) {
                // What is new has its turn after what is old.
                Pause::Empty => Pause::Turn,
                pause => pause,
            },
        };
        self.full = pause == Pause::Full;
        if pushed > 0 {
            self.lane.submit()?;
            self.lane.poll(&mut self.answers)?;
        }
        match begin {
            Some(begin) => self.signals.turn(pushed, begin.elapsed()),
            None if pause == Pause::Turn => self.signals.large_turn(),
            None => {}
        }
        let completed = self.settle();
        self.signal_if_due(vring);
        if pushed > 0 {
            self.lane.learn();
        }
        let exchange = self.exchange.as_mut().expect("in service");
        Ok(match pause {
            Pause::Empty if pushed == 0 && !completed && !self.lane.is_to_punch() => Turn::Idle,
            Pause::Empty | Pause::Turn => Turn::More,
            // Without an answer there is nothing to come again for before the lane wakes us.
            Pause::Full if completed || self.lane.is_to_punch() => Turn::More,
            Pause::Full => Turn::Idle,
            Pause::Broken => {
                // Memory that is lost concerns all queues: the control thread logs it, once.
                if let Some(rule) = exchange.broken().filter(|rule| *rule != Broken::Lost) {
                    log::error!("queue {}: the driver broke its ring ({rule:?}); it is served no more", self.index);
                }
                Turn::Broken
            }
        })
    }

    /// To be called after an idle turn, before sleeping: asks the driver for kicks. True where there is work after all.
    pub fn rest(&mut self, vring: &Vring) -> bool {
        // What is full goes on with answers, not with kicks.
        let Some(exchange) = self.exchange.as_mut().filter(|x| x.broken().is_none() && !self.full) else {
            return false;
        };
        vring.get_ref().is_enabled() && exchange.ring().want_kicks()
    }

    /// Whether the ring in service looks as if no driver had used it.
    pub fn is_blank(&self) -> bool {
        self.exchange.as_ref().is_some_and(Exchange::is_blank)
    }

    /// Completes all that is in flight and ends the service; gives the index of the avail ring at which to go on, which
    /// `vring` knows then too.
    ///
    /// # Errors
    /// Where the lane's engine fails.
    pub fn stop(&mut self, vring: &Vring) -> io::Result<u16> {
        self.signal(vring);
        self.lane.drain(&mut self.answers)?;
        self.settle();
        // The index we give counts what a predecessor left as taken, so that has to be carried out, too.
        while let Some(exchange) = self.exchange.as_mut().filter(|x| x.owed() > 0 && x.broken().is_none()) {
            let lane = &mut self.lane;
            exchange.take_owed(&rules(&self.device), lane.room(), |request| {
                lane.push(request);
                lane.room()
            });
            self.lane.submit()?;
            self.lane.drain(&mut self.answers)?;
            self.settle();
        }
        self.signal(vring);
        let mut state = vring.get_mut();
        let q = state.get_queue_mut();
        if let Some(mut exchange) = self.exchange.take() {
            let ring = exchange.ring();
            q.set_next_avail(ring.next_avail());
            q.set_next_used(ring.next_used());
        }
        Ok(q.next_avail())
    }

    /// Whether the ring is broken since a page of the guest's memory, or of the record, could not be had.
    pub fn is_memory_lost(&self) -> bool {
        self.exchange.as_ref().and_then(Exchange::broken) == Some(Broken::Lost)
    }

    /// What to wait for beside the kick.
    pub fn wake_fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.lane.wake_fd(), Some(self.lane.bell_fd())]
    }

    /// The lane.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }

    /// Gives the driver all answers, and notes whether it wants a signal; whether there were answers.
    fn settle(&mut self) -> bool {
        let Some(exchange) = &mut self.exchange else {
            assert!(self.answers.is_empty(), "a queue out of service has nothing in flight");
            return false;
        };
        let any = !self.answers.is_empty();
        self.answers.drain(..).for_each(|answer| exchange.complete(answer));
        if exchange.publish() {
            self.signals.owe();
        }
        any
    }

    /// Gives the driver the signal that it is owed, unless what is left to be taken at once lets it wait.
    fn signal_if_due(&mut self, vring: &Vring) {
        if !self.signals.is_owed() {
            return;
        }
        // For what waits for room or lies in a broken ring, there is no next turn at once.
        let left = match &self.exchange {
            Some(exchange) if !self.full && exchange.broken().is_none() => exchange.left(),
            _ => 0,
        };
        if self.signals.is_due(left, Instant::now) {
            self.signal(vring);
        }
    }

    /// Gives the driver the signal that it is owed.
    fn signal(&mut self, vring: &Vring) {
        if !self.signals.settle() {
            return;
        }
        match vring.get_ref().signal_used_queue() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock && !self.deaf => {
                // Its own harm; other queues go on.
                log::warn!("queue {}: the front-end's call descriptor takes no signals: {e}", self.index);
                self.deaf = true;
            }
            // WouldBlock: a counter at its limit is a signal that was not yet looked at.
            _ => (),
        }
    }
}

fn rules(device: &Device) -> Rules<'_> {
    let disk = device.disk();
    Rules { capacity: disk.capacity(), read_only: disk.is_read_only(), features: device.acked(), serial: disk.serial() }
}
