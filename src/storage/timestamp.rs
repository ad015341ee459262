//! Timestamps for statistics: nanoseconds from the processor's counter, or from the system's clock if the kernel does
//! not use the counter.
//!
//! A timestamp by the counter costs half of `Instant::now`, which converts the same counter by tables that the kernel
//! shares (`docs/statistics.md` has the figures). The kernel uses the counter as its clock source only if it runs at a
//! constant rate and agrees between processors, so this file repeats none of these checks. But the kernel alone corrects
//! its clock after a hibernation, which sets the counter back. So timestamps are for durations that may be wrong once,
//! and not for the decision when something is due.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// File that contains the name of the kernel's clock source.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Time over which the rate of the counter is measured, once in a process. A sample is exact to about 50 ns, so the
/// rate is exact to 0.003 %.
const CALIBRATION: Duration = Duration::from_millis(4);
/// Samples of which the most exact one is taken.
const SAMPLES: usize = 16;
/// Rates of the counter that are plausible, in nanoseconds per tick, as 32.32 fixed point: 50 MHz to 20 GHz.
const PLAUSIBLE_RATES: std::ops::RangeInclusive<u64> = (1 << 32) / 20..=20 << 32;

/// Nanoseconds since an arbitrary moment of the process, modulo two to the power of 64.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// Returns the nanoseconds since `earlier`, or 0 if `earlier` is later. Timestamps of two processors may differ by
    /// some nanoseconds.
    #[inline]
    pub fn nanos_since(self, earlier: Timestamp) -> u64 {
        let nanos = self.0.wrapping_sub(earlier.0);
        if nanos > u64::MAX / 2 { 0 } else { nanos }
    }
}

/// The source of timestamps. All copies of a process return comparable timestamps.
#[derive(Clone, Copy, Debug)]
pub struct TimestampClock {
    /// The moment whose timestamp is 0.
    start: Instant,
    /// The counter; `None` if it cannot be used.
    counter: Option<CounterRate>,
}

/// The processor's counter at the moment whose timestamp is 0, and its rate.
#[derive(Clone, Copy, Debug)]
struct CounterRate {
    start: u64,
    /// Nanoseconds per tick, as 32.32 fixed point.
    nanos_per_tick: u64,
}

impl TimestampClock {
    /// Returns the clock of the process. The first call takes a few milliseconds, since it measures the rate of the
    /// counter.
    pub fn new() -> TimestampClock {
        static CLOCK: OnceLock<TimestampClock> = OnceLock::new();
        *CLOCK.get_or_init(TimestampClock::calibrate)
    }

    /// Returns the current time.
    #[inline]
    pub fn now(&self) -> Timestamp {
        Timestamp(match (self.counter, read_counter()) {
            (Some(rate), Some(ticks)) => rate.nanos_at(ticks),
            _ => nanos(self.start.elapsed()),
        })
    }

    /// Whether the timestamps come from the processor's counter.
    pub fn uses_counter(&self) -> bool {
        self.counter.is_some()
    }

    fn calibrate() -> TimestampClock {
        let is_kernel_clock = std::fs::read_to_string(CLOCK_SOURCE).is_ok_and(|name| name.trim() == "tsc");
        let counter = if is_kernel_clock { CounterRate::measure() } else { None };
        TimestampClock { start: Instant::now(), counter }
    }
}

impl Default for TimestampClock {
    fn default() -> TimestampClock {
        TimestampClock::new()
    }
}

impl CounterRate {
    fn measure() -> Option<CounterRate> {
        let (first_ticks, first_time) = sample()?;
        std::thread::sleep(CALIBRATION);
        let (last_ticks, last_time) = sample()?;
        let ticks = last_ticks.checked_sub(first_ticks).filter(|ticks| *ticks > 0)?;
        let elapsed = last_time.duration_since(first_time).as_nanos();
        let nanos_per_tick = u64::try_from((elapsed << 32) / u128::from(ticks)).ok()?;
        PLAUSIBLE_RATES.contains(&nanos_per_tick).then_some(CounterRate { start: last_ticks, nanos_per_tick })
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a timestamp is a number modulo two to the power of 64")]
    fn nanos_at(self, ticks: u64) -> u64 {
        ((u128::from(ticks.wrapping_sub(self.start)) * u128::from(self.nanos_per_tick)) >> 32) as u64
    }
}

/// Reads the counter and the system's clock at the same moment, as exactly as some attempts allow: an attempt that the
/// kernel interrupts takes longer than others.
fn sample() -> Option<(u64, Instant)> {
    let attempt = || {
        let before = read_counter()?;
        let time = Instant::now();
        let took = read_counter()?.saturating_sub(before);
        Some((took, before + took / 2, time))
    };
    let best = (0..SAMPLES).filter_map(|_| attempt()).min_by_key(|(took, ..)| *took);
    best.map(|(_, ticks, time)| (ticks, time))
}

/// Reads the processor's counter; `None` on architectures for which this is not implemented.
#[inline]
fn read_counter() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the instruction exists on every x86-64 processor and accesses no memory. It faults only if the
        // process has forbidden it to itself (prctl, PR_SET_TSC). No code of this program does that, and the fault
        // would be a signal that ends the process, not undefined behavior.
        Some(unsafe { core::arch::x86_64::_rdtsc() })
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measures a sleep by this clock and by the system's clock. Other load may delay the thread between two readings,
    /// so the best of several attempts counts.
    fn difference(clock: TimestampClock) -> f64 {
        let attempt = |_| {
            let (time, stamp) = (Instant::now(), clock.now());
            std::thread::sleep(Duration::from_millis(20));
            let measured = clock.now().nanos_since(stamp);
            (measured as f64 / nanos(time.elapsed()) as f64 - 1.0).abs()
        };
        (0..20).map(attempt).fold(f64::MAX, f64::min)
    }

    #[test]
    fn both_sources_agree_with_the_clock_of_the_system() {
        let clock = TimestampClock::new();
        println!("the processor's counter is used: {}", clock.uses_counter());
        assert!(difference(clock) < 0.01);
        assert!(difference(TimestampClock { counter: None, ..clock }) < 0.01);
    }

    #[test]
    fn timestamps_do_not_decrease_and_a_duration_is_never_negative() {
        let clock = TimestampClock::new();
        let mut last = clock.now();
        for _ in 0..100_000 {
            let now = clock.now();
            assert!(now == last || last.nanos_since(now) == 0);
            last = now;
        }
        assert_eq!((Timestamp(5).nanos_since(Timestamp(9)), Timestamp(9).nanos_since(Timestamp(5))), (0, 4));
    }

    #[test]
    fn durations_are_right_after_the_counter_was_set_back() {
        let rate = CounterRate { start: 1 << 60, nanos_per_tick: (1 << 32) / 3 };
        for at in [1 << 60, 5000, (1 << 60) - 9_000_000, u64::MAX - 9_000_000] {
            let [first, last] = [at, at + 3_000_000].map(|ticks| Timestamp(rate.nanos_at(ticks)));
            assert!(last.nanos_since(first).abs_diff(1_000_000) <= 1, "{at}");
        }
    }
}
