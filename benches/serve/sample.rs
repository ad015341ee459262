//! Measurements of one run of a load.

use std::time::Duration;

/// Number of buckets per doubling of the latency.
const PARTS: usize = 32;

/// Histogram of latencies, with a precision of 3 %.
pub struct Latencies {
    counts: Vec<u64>,
    sum: u128,
    total: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { counts: vec![0; 64 * PARTS], sum: 0, total: 0 }
    }
}

impl Latencies {
    pub fn add(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(PARTS as u64);
        let octave = nanos.ilog2();
        let part = usize::try_from(nanos >> (octave - PARTS.ilog2())).expect("two times PARTS at most") - PARTS;
        self.counts[octave as usize * PARTS + part] += 1;
        self.sum += u128::from(nanos);
        self.total += 1;
    }

    /// Returns a quantile of the latency in microseconds. The share `share` of all requests has at most this latency.
    fn quantile(&self, share: f64) -> f64 {
        let wanted = (self.total as f64 * share) as u64;
        let mut seen = 0;
        for (i, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen > wanted {
                let (octave, part) = (i / PARTS, i % PARTS);
                return (1u64 << octave) as f64 * (1.0 + (part as f64 + 0.5) / PARTS as f64) / 1000.0;
            }
        }
        0.0
    }
}

/// Measurements of one run.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Requests per second.
    pub iops: f64,
    /// Number of requests.
    pub count: u64,
    /// Latency in microseconds: mean, median, and 99th percentile.
    pub mean: f64,
    pub p50: f64,
    pub p99: f64,
    /// Processor time of the server per request, in microseconds.
    pub cpu: f64,
}

impl Sample {
    pub fn new(count: u64, seconds: f64, latencies: &Latencies) -> Sample {
        Sample {
            iops: count as f64 / seconds,
            count,
            mean: latencies.sum as f64 / latencies.total.max(1) as f64 / 1000.0,
            p50: latencies.quantile(0.5),
            p99: latencies.quantile(0.99),
            cpu: 0.0,
        }
    }

    /// Returns the sample of a run whose only result is a time in microseconds.
    pub fn time(taken: Duration) -> Sample {
        let mean = taken.as_secs_f64() * 1e6;
        Sample { iops: 1e6 / mean, count: 1, mean, p50: mean, p99: mean, cpu: 0.0 }
    }
}
