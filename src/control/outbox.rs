//! What a client has not read yet: answers, and events of which the oldest are dropped if there are too many.
//!
//! Answers are sent before events. A message is sent to its end before the next one begins.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::SendFlags;
use serde_json::json;

use super::event_hub::{ControlEvent, now};
use super::message;

/// Number of bytes of unread answers from which on no more requests of the client are answered.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Maximum number of events that wait for one client.
pub(super) const MAX_EVENTS: usize = 1024;

/// The messages for one client.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// The message that is being sent, and the number of its bytes that were sent.
    current: Vec<u8>,
    sent: usize,
    answers: VecDeque<Vec<u8>>,
    answer_bytes: usize,
    events: VecDeque<Arc<ControlEvent>>,
    /// Number of dropped events that no message to the client has reported.
    lost: u64,
    /// Number of the last dropped event.
    last_lost: u64,
}

impl Outbox {
    /// Appends an answer.
    pub(super) fn push_answer(&mut self, line: Vec<u8>) {
        self.answer_bytes += line.len();
        self.answers.push_back(line);
    }

    /// Appends an event. Drops the oldest event if there are too many.
    pub(super) fn push_event(&mut self, event: Arc<ControlEvent>) {
        if self.events.len() == MAX_EVENTS
            && let Some(oldest) = self.events.pop_front()
        {
            self.count_lost(1, oldest.seq);
        }
        self.events.push_back(event);
    }

    /// Counts events that were dropped before they reached this outbox. The last one has the number `last`.
    pub(super) fn count_lost(&mut self, count: u64, last: u64) {
        self.lost += count;
        self.last_lost = self.last_lost.max(last);
    }

    /// Drops all events, for a client that watches others from now on.
    pub(super) fn clear_events(&mut self) {
        self.events.clear();
        self.lost = 0;
    }

    /// Whether the client has so many unread answers that its requests must wait.
    pub(super) fn is_full(&self) -> bool {
        self.answer_bytes >= MAX_ANSWER_BYTES
    }

    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.current.len() && self.answers.is_empty() && self.events.is_empty() && self.lost == 0
    }

    /// Sends as much as the socket takes without waiting.
    ///
    /// # Errors
    /// Any error of send(2) except that the socket is full, for example if the client has disconnected.
    pub(super) fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        while self.sent < self.current.len() || self.next_message() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&socket, &self.current[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Makes the next message the current one. Returns false if there is none.
    fn next_message(&mut self) -> bool {
        self.sent = 0;
        if let Some(answer) = self.answers.pop_front() {
            self.answer_bytes -= answer.len();
            self.current = answer;
        } else if self.lost > 0 {
            // The dropped events are older than all that wait.
            let params = json!({"seq": self.last_lost, "time": now(), "kind": "lost", "lost": self.lost});
            self.lost = 0;
            self.current = message::notification(&params);
        } else if let Some(event) = self.events.pop_front() {
            self.current.clear();
            self.current.extend_from_slice(&event.line);
        } else {
            self.current = Vec::new();
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use serde_json::Value;

    use super::super::event_hub::EventHub;
    use super::*;
    use crate::event::DiskEvent;

    /// Sends everything to a client that reads now. Returns the messages.
    fn read_all(outbox: &mut Outbox, near: &UnixStream, far: &mut UnixStream) -> Vec<Value> {
        far.set_nonblocking(true).unwrap();
        let (mut bytes, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        while !outbox.is_empty() {
            outbox.flush(near).unwrap();
            while let Ok(count) = far.read(&mut piece) {
                bytes.extend_from_slice(&piece[..count]);
            }
        }
        bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect()
    }

    #[test]
    fn a_slow_client_loses_the_oldest_events_and_learns_how_many() {
        let hub = EventHub::new().unwrap();
        let reporter = hub.reporter("a");
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut outbox = Outbox::default();
        let mut total = 0;
        for _ in 0..10 {
            for connected in [true, false].into_iter().cycle().take(1000) {
                reporter.report(DiskEvent::FrontEnd { connected, pid: Some(1), uid: None });
                total += 1;
            }
            hub.take().events.into_iter().for_each(|event| outbox.push_event(event));
            outbox.flush(&near).unwrap();
            assert!(outbox.events.len() <= MAX_EVENTS);
        }
        outbox.push_answer(message::line(&json!({"id": 1})));
        let messages = read_all(&mut outbox, &near, &mut far);
        let lost: Vec<u64> = messages.iter().filter_map(|m| m["params"]["lost"].as_u64()).collect();
        assert_eq!(lost.len(), 1, "one gap");
        let seqs: Vec<u64> = messages.iter().filter_map(|m| m["params"]["seq"].as_u64()).collect();
        assert!(seqs.is_sorted() && seqs.last() == Some(&total));
        assert_eq!(lost[0] + (seqs.len() as u64 - 1), total, "each event was sent or counted");
        assert_eq!(messages.iter().filter(|m| m["id"] == 1).count(), 1, "answers are not dropped");
    }

    #[test]
    fn unread_answers_make_the_outbox_full() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut outbox = Outbox::default();
        let mut pushed = 0;
        while !outbox.is_full() {
            outbox.push_answer(message::line(&json!({"id": pushed, "text": "x".repeat(1000)})));
            outbox.flush(&near).unwrap();
            pushed += 1;
        }
        assert!(pushed > 1000 && !outbox.is_empty());
        let ids: Vec<u64> = read_all(&mut outbox, &near, &mut far).iter().filter_map(|m| m["id"].as_u64()).collect();
        assert!(ids.iter().copied().eq(0..pushed) && !outbox.is_full());
        drop(far);
        outbox.push_answer(b"x\n".to_vec());
        assert!(outbox.flush(&near).is_err(), "the client has disconnected");
    }
}
