//! Abandoning a merge, on the simulated host. The merge is stopped at every step. After each stop no image shows a
//! wrong disk, and the merge can be finished or abandoned. Abandoning is stopped at every step, too.

use std::path::{Path, PathBuf};

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy};
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops::merge::{Abandoned, Merged, PreparedMerge, abandon};
use diffdisk::storage::Env;
use diffdisk::storage::sim::{Random, SimHost};
use diffdisk::units::SectorRange;

use crate::chain_spec::{bytes, check_disk};
use crate::merge_cases::{MergeCase, all};

fn at(case: &MergeCase, layer: usize) -> PathBuf {
    case.chain.path(Path::new("/disk"), layer)
}

fn host(case: &MergeCase) -> SimHost {
    let host = SimHost::new(1);
    case.chain.build(&host, Path::new("/disk")).expect("a chain");
    host.crash_with(&|_| true)
}

fn merge(case: &MergeCase, host: &SimHost) -> Result<Merged> {
    let into = at(case, case.into);
    let into = (case.merged_layers.len() > 1).then_some(into.as_path());
    PreparedMerge::prepare(host, &at(case, case.merged_layers[0]), into, false, &Policy::default())?
        .run(&mut |_| Ok(()))
}

/// Reads the disk of an image by itself; `None` if the open is refused because the image is partly overwritten.
fn read(host: &SimHost, path: &Path) -> Result<Option<Vec<u8>>, String> {
    let version = match Chain::open(host, path, &Policy::default(), OpenMode::Read) {
        Ok(chain) => chain.into_frozen(),
        Err(e) if e.kind() == ErrorKind::Refused && e.line().contains("partly overwritten") => return Ok(None),
        Err(e) => return Err(e.line()),
    };
    let range = SectorRange::between(0, version.sectors());
    let mut disk = vec![0; usize::try_from(range.bytes()).expect("small")];
    version.read_now(range, &mut disk, &mut PlanBuffer::default()).map_err(|e| e.line())?;
    Ok(Some(disk))
}

/// Checks that each parent of CHILD down to the receiver, opened by itself, shows its own disk or CHILD's, or is
/// refused, and that CHILD and the kept descendants show their disks. Returns whether an image was refused.
fn check(case: &MergeCase, host: &SimHost) -> Result<bool, String> {
    let disk = |mut values: Vec<u8>, layer: usize| {
        values.resize(usize::try_from(case.chain.sectors(layer)).expect("small"), 0);
        bytes(SectorRange::between(0, values.len() as u64), |sector| values[usize::try_from(sector).unwrap()])
    };
    let child = case.merged_layers[0];
    let mut refused = false;
    for &layer in case.merged_layers[1..].iter().chain([&case.into]) {
        if !host.exists(&at(case, layer)) {
            continue;
        }
        let own = disk(case.chain.expected(layer), layer);
        let childs = disk(case.chain.expected(child), layer);
        match read(host, &at(case, layer))? {
            None => refused = true,
            Some(shown) if shown == own || shown == childs => {}
            Some(_) => {
                return Err(format!(
                    "{} by itself shows neither its own disk nor CHILD's",
                    case.chain.layers[layer].name
                ));
            }
        }
    }
    if host.exists(&at(case, child)) {
        check_disk(host, &at(case, child), &case.chain.expected(child))?;
    }
    for &kept in &case.kept {
        check_disk(host, &at(case, kept), &case.chain.expected(kept))?;
    }
    Ok(refused)
}

/// Abandons the merge. Returns `None` if no merge was begun.
fn abandon_merge(case: &MergeCase, host: &SimHost) -> Result<Option<Abandoned>, String> {
    match abandon(host, &at(case, case.merged_layers[0]), None, &Policy::default()) {
        Ok(done) => Ok(Some(done)),
        Err(e) if e.line().contains("no merge of it was begun") => Ok(None),
        Err(e) => Err(e.line()),
    }
}

/// Stops a merge at a step and abandons the merge. For one of four outcomes of the stop, abandoning is stopped at each
/// of its steps, too.
fn abandoned_after(case: &MergeCase, step: u64, random: &mut Random, seen: &mut [u64; 3]) -> Result<(), String> {
    let first = host(case);
    first.stop_at(step);
    let _ = merge(case, &first);
    for fate in 0..4u64 {
        let after = match fate {
            0 => first.crash_with(&|_| false),
            1 => first.crash_with(&|_| true),
            2 => first.kill(random),
            _ => first.crash(random),
        };
        check(case, &after)?;
        // Abandoning is stopped at each step for one of the four outcomes of the merge, and not stopped for the others.
        let first_stop = if fate == step % 4 { 1 } else { 1 << 32 };
        for stop in first_stop.. {
            let host = after.crash_with(&|_| true);
            let steps = host.counts().steps;
            host.stop_at(steps + stop);
            let done = abandon_merge(case, &host);
            host.stop_at(u64::MAX);
            let host = if host.is_dead() { host.crash(random) } else { host };
            let before = check(case, &host)?;
            // The second attempt is not stopped.
            let again = abandon_merge(case, &host)?;
            let after = check(case, &host)?;
            let here = host.exists(&at(case, case.merged_layers[0]));
            match again {
                Some(Abandoned::Partial(_)) => {
                    seen[0] += 1;
                    if !after || !before {
                        return Err("a partly overwritten image is not refused".into());
                    }
                }
                Some(Abandoned::Undone | Abandoned::Whole(_)) | None => {
                    seen[1] += 1;
                    if after {
                        return Err("an image is refused without a merge to finish".into());
                    }
                }
            }
            if here {
                // The merge can be finished. It may be refused if no image is partly overwritten and a child whose
                // parent link was already changed would show another disk.
                match merge(case, &host) {
                    Ok(_) => seen[2] += 1,
                    Err(e) if e.line().contains("another child") && !after => {}
                    Err(e) => return Err(format!("finished: {}", e.line())),
                }
                check(case, &host)?;
            }
            if done.is_ok() {
                break; // abandoning was not stopped
            }
        }
    }
    Ok(())
}

#[test]
fn abandoned_after_every_step() {
    let mut seen = [0; 3];
    for case in all(1).into_iter().filter(|case| ["leaf", "inner", "two levels", "fixed root"].contains(&case.name)) {
        let whole = host(&case);
        merge(&case, &whole).expect("a merge");
        let steps = whole.counts().steps;
        let mut random = Random::new(steps);
        for step in 1..=steps {
            let done = abandoned_after(&case, step, &mut random, &mut seen);
            done.unwrap_or_else(|e| panic!("{}, step {step} of {steps}: {e}", case.name));
        }
    }
    println!("partly overwritten {}, without a merge {}, finished {}", seen[0], seen[1], seen[2]);
    assert!(seen.iter().all(|n| *n > 100), "{seen:?}");
}
