//! Histograms of durations: log-linear, 16 steps an octave from 256 ns to 68 s.
//!
//! A step is at most one sixteenth of its durations wide, so a quantile is exact to 6 %, or to 3 % if durations are
//! spread evenly within a step. Shorter durations count in the first step, longer ones in the last. A histogram has 28
//! octaves, 448 words.

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::counter::Counter;

/// Steps of an octave, as a power of two.
const STEP_BITS: u32 = 4;
/// Steps of an octave.
const OCTAVE_STEPS: usize = 1 << STEP_BITS;
/// The shortest duration that is distinguished is two to the power of this number, in nanoseconds.
const FIRST_OCTAVE: u32 = 8;
/// Number of octaves.
const OCTAVES: usize = 28;
/// Number of steps.
const STEPS: usize = OCTAVES * OCTAVE_STEPS;
/// Durations from here on count in the last step: 68.7 s.
const END_NANOS: u64 = 1 << (FIRST_OCTAVE as usize + OCTAVES);

/// A histogram with one writer.
#[derive(Debug)]
pub struct Histogram {
    steps: [Counter; STEPS],
    sum_nanos: Counter,
}

impl Histogram {
    pub(super) const fn new() -> Histogram {
        Histogram { steps: [const { Counter::new() }; STEPS], sum_nanos: Counter::new() }
    }

    /// Counts `count` durations of `nanos` each. Only the thread of the lane may call this.
    #[inline]
    pub fn record(&self, nanos: u64, count: u64) {
        self.steps[step_of(nanos)].add(count);
        self.sum_nanos.add(nanos.wrapping_mul(count));
    }

    /// Adds the counts to `snapshot`.
    pub(super) fn add_to(&self, snapshot: &mut HistogramSnapshot) {
        for (sum, step) in snapshot.steps.iter_mut().zip(&self.steps) {
            *sum += step.get();
        }
        snapshot.sum_nanos = snapshot.sum_nanos.wrapping_add(self.sum_nanos.get());
    }
}

/// The contents of one histogram, or the sum of several, at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HistogramSnapshot {
    steps: Box<[u64; STEPS]>,
    /// Sum of all durations, in nanoseconds.
    pub sum_nanos: u64,
}

impl Default for HistogramSnapshot {
    fn default() -> HistogramSnapshot {
        HistogramSnapshot { steps: Box::new([0; STEPS]), sum_nanos: 0 }
    }
}

impl HistogramSnapshot {
    /// Adds the counts of another snapshot.
    pub fn add(&mut self, other: &HistogramSnapshot) {
        self.steps.iter_mut().zip(&*other.steps).for_each(|(sum, step)| *sum += step);
        self.sum_nanos = self.sum_nanos.wrapping_add(other.sum_nanos);
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.steps.iter().sum()
    }

    /// Returns the duration in nanoseconds that the share `q` (0 to 1) of all durations does not exceed, interpolated
    /// within a step. Returns `None` if the histogram is empty.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let count = self.count();
        let rank = (q.clamp(0.0, 1.0) * count as f64).max(1.0);
        let mut before = 0;
        for (step, n) in self.steps.iter().enumerate().filter(|(_, n)| **n > 0) {
            if (before + n) as f64 >= rank {
                let (from, to) = bounds(step);
                let share = (rank - before as f64) / *n as f64;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two durations")]
                return Some(from + ((to - from) as f64 * share) as u64);
            }
            before += n;
        }
        None
    }

    /// Returns the steps that are not empty, each with its upper bound in nanoseconds and its number of durations. The
    /// last step of the histogram also counts durations beyond its upper bound of 68 s.
    pub fn steps(&self) -> impl Iterator<Item = (u64, u64)> {
        self.steps.iter().enumerate().filter(|(_, n)| **n > 0).map(|(step, n)| (bounds(step).1, *n))
    }

    /// Returns for each octave but the last its upper bound in nanoseconds, and the number of durations below.
    pub fn cumulative_octaves(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut below = 0;
        let octaves = self.steps.chunks_exact(OCTAVE_STEPS).take(OCTAVES - 1);
        octaves.zip(FIRST_OCTAVE + 1..).map(move |(steps, octave)| {
            below += steps.iter().sum::<u64>();
            (1 << octave, below)
        })
    }
}

impl Serialize for HistogramSnapshot {
    /// Serializes the number of durations, their sum and quantiles in microseconds, and the steps that are not empty.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Histogram", 7)?;
        fields.serialize_field("count", &self.count())?;
        fields.serialize_field("sum_us", &micros(self.sum_nanos))?;
        for (name, q) in [("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("p999_us", 0.999)] {
            fields.serialize_field(name, &self.quantile(q).map(micros))?;
        }
        let steps: Vec<(f64, u64)> = self.steps().map(|(bound, count)| (micros(bound), count)).collect();
        fields.serialize_field("steps", &steps)?;
        fields.end()
    }
}

#[expect(clippy::cast_precision_loss, reason = "53 bits are enough for a sum of durations")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

/// Returns the step of a duration.
#[inline]
fn step_of(nanos: u64) -> usize {
    let nanos = nanos.clamp(1 << FIRST_OCTAVE, END_NANOS - 1);
    let octave = nanos.ilog2();
    // The bits after the highest one select the step of the octave.
    let step = (nanos >> (octave - STEP_BITS)) as usize & (OCTAVE_STEPS - 1);
    (octave - FIRST_OCTAVE) as usize * OCTAVE_STEPS + step
}

/// Returns the first duration of a step, and the first one after it, in nanoseconds. The first step begins at 0.
fn bounds(step: usize) -> (u64, u64) {
    let start = |step: usize| {
        let (octave, within) = (step / OCTAVE_STEPS, step % OCTAVE_STEPS);
        ((OCTAVE_STEPS + within) as u64) << (FIRST_OCTAVE - STEP_BITS) << octave
    };
    (if step == 0 { 0 } else { start(step) }, start(step + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn snapshot(histogram: &Histogram) -> HistogramSnapshot {
        let mut snapshot = HistogramSnapshot::default();
        histogram.add_to(&mut snapshot);
        snapshot
    }

    #[test]
    fn steps_adjoin_and_each_duration_is_in_its_step() {
        let mut end = 0;
        for step in 0..STEPS {
            let (from, to) = bounds(step);
            assert_eq!(from, end);
            assert!(step == 0 || (to - from) * OCTAVE_STEPS as u64 <= from, "{step}: at most a sixteenth wide");
            assert_eq!([from, to - 1].map(step_of), [step; 2]);
            end = to;
        }
        assert_eq!(end, END_NANOS);
        assert_eq!((bounds(0), bounds(16).0, bounds(STEPS - 1).1), ((0, 272), 512, 68_719_476_736));
    }

    #[test]
    fn durations_outside_the_range_count_at_its_ends() {
        let histogram = Histogram::new();
        for nanos in [0, 1, 255, END_NANOS - 1, END_NANOS, u64::MAX] {
            histogram.record(nanos, 1);
        }
        let snapshot = snapshot(&histogram);
        assert_eq!(snapshot.steps().collect::<Vec<_>>(), [(272, 3), (END_NANOS, 3)]);
        assert_eq!((snapshot.count(), snapshot.quantile(0.0), snapshot.quantile(1.0)), (6, Some(90), Some(END_NANOS)));
        // The last octave has no bound of its own: it contains durations of any length.
        assert_eq!(snapshot.cumulative_octaves().last(), Some((1 << 35, 3)));
        assert_eq!(HistogramSnapshot::default().quantile(0.5), None);
    }

    #[test]
    fn quantiles_agree_with_sorted_durations() {
        let mut random = Random::from_env(1);
        for round in 0..200 {
            // Durations of all magnitudes, or of a few, or all equal.
            let (lowest, octaves) = (random.below(30), 1 + random.below(6));
            let count = 1 + random.index(3000);
            let (histogram, mut durations) = (Histogram::new(), Vec::new());
            while durations.len() < count {
                let octave = FIRST_OCTAVE as u64 + (lowest + random.below(octaves)) % OCTAVES as u64;
                let nanos = (1 << octave) + random.below(1 << octave);
                let times = 1 + random.index(4).min(count - durations.len() - 1);
                histogram.record(nanos, times as u64);
                durations.extend(std::iter::repeat_n(nanos, times));
            }
            durations.sort_unstable();
            let got = snapshot(&histogram);
            assert_eq!(got.count(), count as u64);
            assert_eq!(got.sum_nanos, durations.iter().sum::<u64>());
            for q in [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0] {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most `count`")]
                let rank = ((q * count as f64).ceil() as usize).clamp(1, count);
                let exact = durations[rank - 1];
                let estimate = got.quantile(q).unwrap();
                let (from, to) = bounds(step_of(exact));
                assert!((from..=to).contains(&estimate), "round {round}, {q} of {count}: {estimate}, exact {exact}");
            }
            for (end, below) in got.cumulative_octaves() {
                assert_eq!(below, durations.partition_point(|d| *d < end) as u64, "below {end}");
            }
        }
    }

    #[test]
    fn the_sum_of_two_histograms_has_the_durations_of_both() {
        let (a, b, both) = (Histogram::new(), Histogram::new(), Histogram::new());
        let mut random = Random::from_env(2);
        for _ in 0..1000 {
            let nanos = 1 << random.below(40);
            [&a, &b][random.index(2)].record(nanos, 2);
            both.record(nanos, 2);
        }
        let mut sum = snapshot(&a);
        sum.add(&snapshot(&b));
        assert_eq!(sum, snapshot(&both));
        let json = serde_json::to_value(&sum).unwrap();
        assert_eq!((json["count"].as_u64(), json["p99_us"].as_f64()), (Some(2000), sum.quantile(0.99).map(micros)));
    }
}
