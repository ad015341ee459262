//! Crash tests of unfinished snapshots: a daemon ends at any step of a snapshot, by a kill or by a power cut. Then the
//! disks are opened, and the resolution ends at any step, too.

#[cfg(feature = "mutants")]
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::testing::{End, Step, Survival, WrittenBytes, end, resolve, resolve_and_check, setup, take};
use super::*;

const ENDS: [End; 6] = [
    End::Kill,
    End::PowerCut(Survival::Nothing),
    End::PowerCut(Survival::Names),
    End::PowerCut(Survival::LastName),
    End::PowerCut(Survival::Any(1)),
    End::PowerCut(Survival::Any(2)),
];

/// Ends the daemon at every step.
fn end_the_daemon_everywhere(members: usize) -> Result<(), String> {
    let (base, note) = setup(members);
    let order: Vec<usize> = (0..members).collect();
    for at in 1.. {
        let host = base.fork();
        host.stop_at(host.counts().steps + at);
        let mut written = vec![WrittenBytes::default(); members];
        let is_done = take(&host, &note, &mut written, Step::Done, true).is_ok();
        for (number, how) in ENDS.into_iter().enumerate() {
            let next = end(&host.fork(), how);
            let order: Vec<usize> = if number % 2 == 0 { order.clone() } else { order.iter().rev().copied().collect() };
            resolve_and_check(&next, &note, &written, &order, how != End::Kill)
                .map_err(|e| format!("{members} members, step {at}, {how:?}: {e}"))?;
        }
        if is_done {
            return Ok(());
        }
    }
    unreachable!("a snapshot has an end")
}

/// Ends the daemon after each step of the protocol, and the first resolution at every step.
fn end_the_resolution_everywhere(members: usize) -> Result<(), String> {
    let (base, note) = setup(members);
    let steps = [Step::ChildrenMade, Step::Prepared, Step::Switched, Step::Committed, Step::Flushed, Step::Named];
    for last in steps {
        let host = base.fork();
        let mut written = vec![WrittenBytes::default(); members];
        take(&host, &note, &mut written, last, true).map_err(|e| e.line())?;
        for first_end in [End::Kill, End::PowerCut(Survival::Names)] {
            let killed = end(&host.fork(), first_end);
            for first in 0..members {
                let orders: Vec<Vec<usize>> = if members == 1 { vec![vec![0]] } else { vec![vec![0, 1], vec![1, 0]] };
                for at in 1.. {
                    let host = killed.fork();
                    host.stop_at(host.counts().steps + at);
                    let is_done = resolve(&host, first).is_ok();
                    let power_cut = ENDS[1 + usize::try_from(at).unwrap() % 5];
                    for (number, how) in [End::Kill, power_cut, End::PowerCut(Survival::LastName)].iter().enumerate() {
                        let next = end(&host.fork(), *how);
                        let order = &orders[number % orders.len()];
                        let is_cut = first_end != End::Kill || *how != End::Kill;
                        let outcome = resolve_and_check(&next, &note, &written, order, is_cut).map_err(|e| {
                            format!("{members} members, {last:?}, {first_end:?}, {first} at step {at}, {how:?}: {e}")
                        })?;
                        let is_open = is_cut && !is_done && matches!(last, Step::Switched | Step::Committed);
                        if first_end == End::Kill && !is_open && outcome != (last >= Step::Switched) {
                            return Err(format!("{members} members, {last:?}, step {at}, {how:?}: forward: {outcome}"));
                        }
                    }
                    if is_done {
                        break;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_daemon_that_ends_at_any_step_leaves_a_disk_with_or_without_the_snapshot() {
    end_the_daemon_everywhere(1).unwrap();
    end_the_daemon_everywhere(2).unwrap();
}

#[test]
fn a_resolution_that_ends_at_any_step_is_repeated() {
    end_the_resolution_everywhere(1).unwrap();
    end_the_resolution_everywhere(2).unwrap();
}

#[cfg(feature = "mutants")]
#[test]
fn every_mutant_of_the_note_is_found() {
    let all = [
        Mutant::SnapshotKeptUnsynced,
        Mutant::SnapshotNoteUnsynced,
        Mutant::SnapshotAlwaysForward,
        Mutant::SnapshotSwitchedAfterBoot,
        Mutant::SnapshotIgnored,
        Mutant::SnapshotOnlyOwnSettled,
    ];
    for mutant in all {
        mutant::enable(Some(mutant));
        let found = catch_unwind(AssertUnwindSafe(|| {
            end_the_daemon_everywhere(1).and_then(|()| end_the_resolution_everywhere(2))
        }));
        mutant::enable(None);
        println!("{mutant:?}: {found:?}");
        assert!(!matches!(found, Ok(Ok(()))), "{mutant:?} is not found");
    }
}
