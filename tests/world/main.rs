//! The production code on a simulated machine with power cuts, kills and failing operations, and a model of the values
//! that each sector may contain (crash-safety 1, 11).
//!
//! A failure of the random runs prints its seed; `DIFFDISK_SEED=<seed> cargo test --features sim,mutants --test world
//! random` runs only that seed. With `DIFFDISK_MUTANT=<name>`, the searches for mutants search for that mutant only.
#![allow(unreachable_pub, clippy::cast_possible_truncation)]

mod checker;
mod exhaustive;
mod faults;
mod full;
mod layouts;
#[path = "../common/memory.rs"]
mod memory;
mod model;
mod mutants;
mod random;
mod sessions;
mod world;

use std::time::{Duration, Instant};

use checker::Checker;
use diffdisk::mutant::{self, Mutant};
use world::CheckOptions;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn show(what: &str, runs: u64, checker: &Checker, took: Duration) {
    let rate = checker.states as f64 / took.as_secs_f64();
    println!(
        "{what}: {runs} runs, {} crash states ({} different images, {} with torn sectors, {} crashes during recovery), {} changes of the version, {:.1} s, {rate:.0} states/s",
        checker.states,
        checker.distinct,
        checker.torn,
        checker.recovery_crashes,
        checker.changes,
        took.as_secs_f64()
    );
}

#[test]
fn random_work_and_crashes() {
    let checks = CheckOptions { sample: 24, interval: 3, journal: true };
    let start = Instant::now();
    let (states, limit) = (
        number("DIFFDISK_STATES").unwrap_or(2_500_000),
        Duration::from_secs(number("DIFFDISK_SECONDS").unwrap_or(300)),
    );
    let only = number("DIFFDISK_SEED");
    let threads = [0_u64, 1].map(|thread| {
        std::thread::spawn(move || {
            let layouts = layouts::all_layouts(20);
            let mut checker = Checker::default();
            let mut runs = 0;
            while checker.states < states && start.elapsed() < limit {
                let seed = only.unwrap_or(runs * 2 + thread);
                if let Err(e) = random::run(&layouts, seed, checks, &mut checker) {
                    panic!("seed {seed}: {e}\nreplay: DIFFDISK_SEED={seed} cargo test --features sim,mutants --test world random");
                }
                checker.clear_cache();
                runs += 1;
                if only.is_some() {
                    break;
                }
            }
            (runs, checker)
        })
    });
    for thread in threads {
        let (runs, checker) = thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        show("random", runs, &checker, start.elapsed());
    }
}

#[test]
fn every_mutant_is_found() {
    let checks = CheckOptions { sample: 24, interval: 2, journal: true };
    let half = |thread: usize| {
        std::thread::spawn(move || {
            let layouts = layouts::all_layouts(20);
            let all = selected_mutants().filter(|m| !sessions::MUTANTS.contains(m));
            let mine = all.skip(thread).step_by(2);
            let found = mine.map(|m| (m, mutants::find(m, &layouts, checks)));
            found.inspect(|(m, how)| println!("{m:?}: {}", how.as_deref().unwrap_or("NOT FOUND"))).collect::<Vec<_>>()
        })
    };
    let found = [half(0), half(1)].map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
    let missed: Vec<_> = found.iter().flatten().filter(|(_, how)| how.is_none()).map(|(m, _)| m).collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn sessions_outlive_kills_copies_and_restores() {
    on_two_threads("sessions", |share, _| {
        let layouts = layouts::all_layouts(20);
        let mine = layouts.iter().skip(share).step_by(2);
        mine.map(|layout| sessions::run_all(layout, 1).map(|()| 1)).sum()
    });
}

#[test]
fn every_mutant_of_sessions_is_found() {
    let layouts = layouts::all_layouts(20);
    let mine = selected_mutants().filter(|m| sessions::MUTANTS.contains(m));
    let found: Vec<_> = mine.map(|m| (m, sessions::find(m, &layouts))).collect();
    found.iter().for_each(|(m, how)| println!("{m:?}: {}", how.as_deref().unwrap_or("NOT FOUND")));
    let missed: Vec<_> = found.iter().filter(|(_, how)| how.is_none()).map(|(m, _)| m).collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// The mutants that the tests of another target find, and the command that runs those tests.
///
/// `StaleBits` needs two readers of one bitmap sector, and an eviction of that sector between their reads.
/// `image/write/clock_tests.rs` finds it with threads; 12 million states of the random runs did not.
///
/// `chain/resolve_snapshot_crash_tests.rs` finds the mutants of the notes of snapshots: it ends the daemon, and then
/// the resolution, at every step, and also takes snapshots of several disks.
const FOUND_ELSEWHERE: [(Mutant, &str); 7] = [
    (Mutant::StaleBits, "make test-one T=lib F=clock_tests"),
    (Mutant::SnapshotKeptUnsynced, SNAPSHOT_TESTS),
    (Mutant::SnapshotNoteUnsynced, SNAPSHOT_TESTS),
    (Mutant::SnapshotAlwaysForward, SNAPSHOT_TESTS),
    (Mutant::SnapshotSwitchedAfterBoot, SNAPSHOT_TESTS),
    (Mutant::SnapshotIgnored, SNAPSHOT_TESTS),
    (Mutant::SnapshotOnlyOwnSettled, SNAPSHOT_TESTS),
];
const SNAPSHOT_TESTS: &str = "make test-one T=lib F=resolve_snapshot::crash_tests";

/// Returns the mutant that `DIFFDISK_MUTANT` names, or all that the tests of this target must find. Panics if the named
/// mutant does not exist, or if no test of this target searches for it.
fn selected_mutants() -> impl Iterator<Item = Mutant> {
    let elsewhere = |m: &Mutant| FOUND_ELSEWHERE.iter().find(|(mutant, _)| mutant == m);
    let Ok(name) = std::env::var("DIFFDISK_MUTANT") else {
        return mutant::ALL.into_iter().filter(|m| elsewhere(m).is_none()).collect::<Vec<_>>().into_iter();
    };
    let named = mutant::ALL.into_iter().find(|m| format!("{m:?}") == name);
    let named = named.unwrap_or_else(|| panic!("DIFFDISK_MUTANT={name} is not a mutant"));
    if let Some((_, command)) = elsewhere(&named) {
        panic!("no test of this target searches for {named:?}; the tests that find it: {command}");
    }
    vec![named].into_iter()
}

/// Runs `work` on two threads, each with its own share of the runs, and prints the counts of both.
fn on_two_threads(what: &str, work: impl Fn(usize, &mut Checker) -> Result<u64, String> + Send + Copy + 'static) {
    let start = Instant::now();
    let threads = [0, 1].map(|share| {
        std::thread::spawn(move || {
            let mut checker = Checker::default();
            let runs = work(share, &mut checker).unwrap_or_else(|e| panic!("{e}"));
            (runs, checker)
        })
    });
    let mut all = (0, Checker::default());
    for thread in threads {
        let (runs, checker) = thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        all.0 += runs;
        all.1.add_counts(&checker);
    }
    show(what, all.0, &all.1, start.elapsed());
}

#[test]
fn every_short_workload() {
    let longest = number("DIFFDISK_WORLD_K").map_or(5, |k| u32::try_from(k).expect("a small number"));
    on_two_threads(&format!("every workload of up to {longest} actions"), move |share, checker| {
        let mut runs = 0;
        for layout in &layouts::all_layouts(4)[..4] {
            for len in 1..=longest {
                // To save time, workloads of more than three actions use only the first eight kinds of actions.
                let kinds = if len > 3 { 8 } else { exhaustive::ALL.len() };
                runs += exhaustive::run_all(layout, len, kinds, (share, 2), checker)?;
            }
            checker.clear_cache();
        }
        Ok(runs)
    });
}

#[test]
fn every_operation_fails_once() {
    let acts = number("DIFFDISK_WORLD_ACTS").unwrap_or(100);
    on_two_threads(&format!("every operation of {acts} actions fails"), move |share, checker| {
        let mut runs = 0;
        let layouts = layouts::all_layouts(20);
        let layout = &layouts[share * 3];
        for wrong in
            [faults::FaultKind::Io, faults::FaultKind::NoSpace, faults::FaultKind::Short, faults::FaultKind::Late]
        {
            for at in 1.. {
                runs += 1;
                if !faults::run(layout, acts, wrong, at, checker)? {
                    break;
                }
                checker.clear_cache();
            }
        }
        Ok(runs)
    });
}

#[test]
fn a_full_host_in_every_phase() {
    on_two_threads("a full host in every phase", |share, checker| {
        full::run_all(&layouts::large_blocks()[share], checker)
    });
}
