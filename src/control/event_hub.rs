//! The queue of events between the threads that report them and the thread that sends them to clients.
//!
//! A thread that reports an event takes one lock, formats the event, and appends it. If the server thread is late, the
//! oldest events are dropped and counted, so the queue stays short and no thread waits.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::message;
use crate::error::Result;
use crate::event::{DiskEvent, EventReporter};
use crate::ops::info::rfc3339;
use crate::storage::Notifier;

/// Maximum number of events that wait for the server thread.
const MAX_QUEUED: usize = 4096;

/// Kinds of events, by which clients select them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EventKind {
    FrontEnd,
    DiskFull,
    RoomAgain,
    Poisoned,
    Snapshot,
    Resized,
}

impl EventKind {
    pub(super) const ALL: [EventKind; 6] = [
        EventKind::FrontEnd,
        EventKind::DiskFull,
        EventKind::RoomAgain,
        EventKind::Poisoned,
        EventKind::Snapshot,
        EventKind::Resized,
    ];

    fn of(event: &DiskEvent) -> EventKind {
        match event {
            DiskEvent::FrontEnd { .. } => EventKind::FrontEnd,
            DiskEvent::DiskFull { .. } => EventKind::DiskFull,
            DiskEvent::RoomAgain { .. } => EventKind::RoomAgain,
            DiskEvent::Poisoned { .. } => EventKind::Poisoned,
            DiskEvent::Snapshot { .. } => EventKind::Snapshot,
            DiskEvent::Resized { .. } => EventKind::Resized,
        }
    }
}

/// An event as clients receive it. All clients share its text.
#[derive(Debug)]
pub(super) struct ControlEvent {
    pub(super) seq: u64,
    pub(super) kind: EventKind,
    /// The notification, with its line break.
    pub(super) line: Vec<u8>,
}

/// The events of all disks that the server thread has not taken yet.
pub struct EventHub {
    queue: Mutex<EventQueue>,
    notifier: Notifier,
}

#[derive(Default)]
struct EventQueue {
    waiting: VecDeque<Arc<ControlEvent>>,
    /// Number of the last event.
    seq: u64,
    /// Number of events that were dropped since the last call of `take`.
    lost: u64,
}

/// Events for the clients.
pub(super) struct TakenEvents {
    /// Number of older events that were dropped.
    pub(super) lost: u64,
    pub(super) events: VecDeque<Arc<ControlEvent>>,
}

impl EventHub {
    /// Creates an empty queue.
    ///
    /// # Errors
    /// `Io` if the process has no file descriptors left.
    pub fn new() -> Result<Arc<EventHub>> {
        Ok(Arc::new(EventHub { queue: Mutex::default(), notifier: Notifier::new()? }))
    }

    /// Returns a reporter for the events of the disk with this name.
    pub fn reporter(self: &Arc<EventHub>, disk: &str) -> EventReporter {
        let (hub, disk) = (self.clone(), disk.to_owned());
        EventReporter::new(move |event| hub.append(&disk, &event))
    }

    fn append(&self, disk: &str, event: &DiskEvent) {
        let kind = EventKind::of(event);
        let mut queue = self.lock();
        queue.seq += 1;
        let mut params = fields(event);
        params["seq"] = queue.seq.into();
        params["time"] = now().into();
        params["kind"] = json!(kind);
        params["disk"] = disk.into();
        let event = ControlEvent { seq: queue.seq, kind, line: message::notification(&params) };
        if queue.waiting.len() == MAX_QUEUED {
            queue.waiting.pop_front();
            queue.lost += 1;
        }
        queue.waiting.push_back(Arc::new(event));
        drop(queue);
        self.notifier.notify();
    }

    /// Removes and returns all events.
    pub(super) fn take(&self) -> TakenEvents {
        self.notifier.drain();
        let mut queue = self.lock();
        TakenEvents { lost: std::mem::take(&mut queue.lost), events: std::mem::take(&mut queue.waiting) }
    }

    /// Returns the number of the last event.
    pub(super) fn last_seq(&self) -> u64 {
        self.lock().seq
    }

    fn lock(&self) -> MutexGuard<'_, EventQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for EventHub {
    /// Returns the descriptor that is readable while events wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}

/// Returns the members that only this kind of event has.
fn fields(event: &DiskEvent) -> Value {
    match event {
        DiskEvent::FrontEnd { connected, pid, uid } => json!({"connected": connected, "pid": pid, "uid": uid}),
        DiskEvent::DiskFull { path } | DiskEvent::RoomAgain { path } => json!({"path": path.display().to_string()}),
        DiskEvent::Resized { size } => json!({"size": size}),
        DiskEvent::Poisoned { path, reason } => json!({"path": path.display().to_string(), "reason": reason}),
        DiskEvent::Snapshot { kept, uuid, pause } => json!({
            "kept": kept.display().to_string(),
            "uuid": uuid.to_string(),
            "pause_us": micros(*pause),
        }),
    }
}

/// Returns a duration in whole microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Returns the time in UTC, with milliseconds.
pub(super) fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = rfc3339(since.as_secs());
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn events_are_numbered_and_the_oldest_are_dropped() {
        let hub = EventHub::new().unwrap();
        let reporter = hub.reporter("a");
        for _ in 0..MAX_QUEUED + 10 {
            reporter.report(DiskEvent::DiskFull { path: PathBuf::from("/x.vhd") });
        }
        let taken = hub.take();
        let seqs: Vec<u64> = taken.events.iter().map(|event| event.seq).collect();
        assert_eq!((taken.lost, seqs.len(), seqs[0]), (10, MAX_QUEUED, 11));
        assert_eq!(hub.last_seq(), MAX_QUEUED as u64 + 10);
        let text: Value = serde_json::from_slice(&taken.events[0].line).unwrap();
        assert_eq!(text["method"], "event");
        let params = &text["params"];
        assert_eq!((&params["kind"], &params["disk"], &params["seq"]), (&"disk_full".into(), &"a".into(), &11.into()));
        assert_eq!(params["path"], "/x.vhd");
        let time = params["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && time.starts_with("20"), "{time}");
        let taken = hub.take();
        assert_eq!((taken.lost, taken.events.len()), (0, 0));
    }
}
