//! Rounds of measurements. In each round all systems run the same load one after another. Another system begins each
//! round, so that other load of the machine affects all systems equally. Ratios compare runs of the same round.

use super::stats::{median, spread};
use super::target::{Bound, Target};

/// Number of measurements of a benchmark, and size of its data.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Number of measured runs of each candidate.
    pub rounds: usize,
    /// Bytes of data.
    pub size: u64,
    /// Whether the command line requests the long form.
    pub full: bool,
}

/// All samples of one system under one load.
pub struct Row<S> {
    pub load: String,
    pub system: String,
    pub samples: Vec<S>,
}

impl<S> Row<S> {
    /// Returns the median of a value over all samples.
    pub fn median(&self, of: impl Fn(&S) -> f64) -> f64 {
        median(self.samples.iter().map(of))
    }

    /// Returns half the difference between the largest and the smallest value, as a share of the median.
    pub fn spread(&self, of: impl Fn(&S) -> f64) -> f64 {
        spread(&self.samples.iter().map(of).collect::<Vec<_>>())
    }
}

/// A system that takes part in a comparison, and the function that measures it once.
pub struct Candidate<'a, S> {
    system: String,
    measure: Box<dyn FnMut() -> S + 'a>,
}

impl<'a, S> Candidate<'a, S> {
    pub fn new(system: &str, measure: impl FnMut() -> S + 'a) -> Candidate<'a, S> {
        Candidate { system: system.to_owned(), measure: Box::new(measure) }
    }

    /// Runs one measurement.
    pub fn measure(&mut self) -> S {
        (self.measure)()
    }
}

/// All measurements of a benchmark, and its targets with the measured ratios.
pub struct Results<S> {
    pub rows: Vec<Row<S>>,
    pub targets: Vec<Target>,
}

impl<S> Default for Results<S> {
    fn default() -> Results<S> {
        Results { rows: Vec::new(), targets: Vec::new() }
    }
}

impl<S> Results<S> {
    /// Runs `rounds` rounds. Each round measures each candidate once.
    pub fn compare(&mut self, load: &str, rounds: usize, mut candidates: Vec<Candidate<'_, S>>) {
        for round in 0..rounds {
            self.round(load, round, &mut candidates);
        }
    }

    /// Runs one round: measures each candidate once. The number `round` determines which candidate begins.
    pub fn round(&mut self, load: &str, round: usize, candidates: &mut [Candidate<'_, S>]) {
        let count = candidates.len();
        for turn in 0..count {
            let candidate = &mut candidates[(round + turn) % count];
            let sample = candidate.measure();
            let system = &candidate.system;
            match self.rows.iter_mut().find(|row| row.load == load && row.system == *system) {
                Some(row) => row.samples.push(sample),
                None => self.rows.push(Row { load: load.into(), system: system.clone(), samples: vec![sample] }),
            }
        }
    }

    /// Returns the samples of a system under a load, which must have been measured.
    pub fn row(&self, load: &str, system: &str) -> &Row<S> {
        let row = self.rows.iter().find(|r| r.load == load && r.system == system);
        row.unwrap_or_else(|| panic!("{system} was not measured under {load}"))
    }

    /// Returns the median over all rounds of the value of system `a` divided by the value of system `b`.
    pub fn ratio(&self, load: &str, a: &str, b: &str, of: impl Fn(&S) -> f64) -> f64 {
        let (a, b) = (self.row(load, a), self.row(load, b));
        median(a.samples.iter().zip(&b.samples).map(|(a, b)| of(a) / of(b)))
    }

    /// Records a target and the measured ratio.
    pub fn target(&mut self, what: impl Into<String>, ratio: f64, bound: Bound) {
        self.targets.push(Target { what: what.into(), ratio, bound });
    }
}
