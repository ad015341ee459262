//! Counts the requests of one queue, and the time that each takes, for the statistics of its lane.
//!
//! The clock is read once for the chains of a batch, when the first request is taken, and once when answers are found.
//! A batch that counts for interrupt coalescing reads the clock once more, at its end. So all requests of a batch have
//! the same time of arrival, and all answers that are found together the same time of completion. Answers are counted
//! in runs of equal requests: most batches consist of one run.

use std::sync::Arc;

use crate::disk::statistics::{LaneCounters, RequestKind, TakenRequest};
use crate::disk::{Answer, Outcome, Request};
use crate::storage::{Timestamp, TimestampClock};
use crate::units::SECTOR;

/// The requests of one queue that are in flight, and the counters of its lane.
pub(super) struct RequestTimes {
    counters: Arc<LaneCounters>,
    clock: TimestampClock,
    /// The request of each head. The tag of a request is its head.
    in_flight: Vec<TakenRequest>,
    /// Time at which the current batch was taken.
    batch_taken: Timestamp,
    /// Requests of the current batch.
    batch_requests: u32,
}

/// Consecutive answers to requests of the same kind and batch.
struct AnswerRun {
    kind: RequestKind,
    taken_at: Timestamp,
    requests: u64,
}

impl RequestTimes {
    /// Creates the state for queue `index`, without requests in flight.
    pub(super) fn new(counters: Arc<LaneCounters>, index: usize) -> RequestTimes {
        counters.set_queue(index);
        RequestTimes {
            counters,
            clock: TimestampClock::new(),
            in_flight: Vec::new(),
            batch_taken: Timestamp::default(),
            batch_requests: 0,
        }
    }

    /// Prepares for a ring of `size` descriptors. No request is in flight.
    pub(super) fn start_ring(&mut self, size: u16) {
        self.in_flight.resize(usize::from(size), TakenRequest::default());
    }

    /// Begins a batch.
    pub(super) fn begin_batch(&mut self) {
        self.batch_requests = 0;
    }

    /// Records a request of the current batch.
    #[inline]
    pub(super) fn record_taken(&mut self, request: &Request) {
        if self.batch_requests == 0 {
            self.batch_taken = self.clock.now();
        }
        self.batch_requests += 1;
        if let Some(entry) = usize::try_from(request.tag).ok().and_then(|head| self.in_flight.get_mut(head)) {
            *entry = TakenRequest::new(&request.work, self.batch_taken);
        }
    }

    /// Ends a batch: counts its requests as taken. Must be called before the answers to these requests are counted.
    /// Returns the number of the requests.
    pub(super) fn end_batch(&mut self) -> u32 {
        if self.batch_requests > 0 {
            self.counters.taken.add(self.batch_requests.into());
        }
        self.batch_requests
    }

    /// Returns the nanoseconds since the current batch was taken.
    pub(super) fn batch_nanos(&self) -> u64 {
        self.clock.now().nanos_since(self.batch_taken)
    }

    /// Counts chains that were refused.
    pub(super) fn record_refused(&mut self, chains: u64) {
        if chains > 0 {
            self.counters.refused.add(chains);
        }
    }

    /// Counts answers that were found together.
    pub(super) fn record_answers(&self, answers: &[Answer]) {
        let Some(first) = answers.first() else { return };
        let now = self.clock.now();
        let first = self.request_of(first);
        let mut run = AnswerRun { kind: first.kind, taken_at: first.taken_at, requests: 0 };
        let mut sectors = 0;
        for answer in answers {
            let request = self.request_of(answer);
            if (request.kind, request.taken_at) != (run.kind, run.taken_at) {
                self.end_run(&run, std::mem::take(&mut sectors), now);
                run = AnswerRun { kind: request.kind, taken_at: request.taken_at, requests: 0 };
            }
            run.requests += 1;
            match answer.outcome {
                Outcome::Done => sectors += u64::from(request.sectors),
                Outcome::Failed | Outcome::Unsupported => self.counters.kind(request.kind).errors.add(1),
            }
        }
        self.end_run(&run, sectors, now);
    }

    #[inline]
    fn end_run(&self, run: &AnswerRun, sectors: u64, now: Timestamp) {
        let counters = self.counters.kind(run.kind);
        counters.latency.record(now.nanos_since(run.taken_at), run.requests);
        counters.bytes.add(sectors * SECTOR);
    }

    #[inline]
    fn request_of(&self, answer: &Answer) -> TakenRequest {
        usize::try_from(answer.tag).ok().and_then(|head| self.in_flight.get(head)).copied().unwrap_or_default()
    }
}
