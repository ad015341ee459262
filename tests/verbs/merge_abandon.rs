//! A merge that was not finished, on the simulated host: ended at every step, after which no image is read wrongly by
//! itself, and the merge can be finished or abandoned, which is ended at every step, too.

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
    case.scene.path(Path::new("/disk"), layer)
}

fn host(case: &MergeCase) -> SimHost {
    let host = SimHost::new(1);
    case.scene.build(&host, Path::new("/disk")).expect("a scene");
    host.crash_with(&|_| true)
}

fn merge(case: &MergeCase, host: &SimHost) -> Result<Merged> {
    let into = at(case, case.into);
    let into = (case.merged_layers.len() > 1).then_some(into.as_path());
    PreparedMerge::prepare(host, &at(case, case.merged_layers[0]), into, false, &Policy::default())?
        .run(&mut |_| Ok(()))
}

/// The disk of an image by itself; `None` if that is refused.
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

/// What an image shows by itself is its own disk, or CHILD's, or refused; and CHILD shows what it showed.
fn check(case: &MergeCase, host: &SimHost) -> Result<bool, String> {
    let disk = |mut values: Vec<u8>, layer: usize| {
        values.resize(usize::try_from(case.scene.sectors(layer)).expect("small"), 0);
        bytes(SectorRange::between(0, values.len() as u64), |sector| values[usize::try_from(sector).unwrap()])
    };
    let child = case.merged_layers[0];
    let mut refused = false;
    for &layer in case.merged_layers[1..].iter().chain([&case.into]) {
        if !host.exists(&at(case, layer)) {
            continue;
        }
        let own = disk(case.scene.expected(layer), layer);
        let childs = disk(case.scene.expected(child), layer);
        match read(host, &at(case, layer))? {
            None => refused = true,
            Some(shown) if shown == own || shown == childs => {}
            Some(_) => return Err(format!("{} is read by itself and is neither disk", case.scene.layers[layer].name)),
        }
    }
    if host.exists(&at(case, child)) {
        check_disk(host, &at(case, child), &case.scene.expected(child))?;
    }
    for &kept in &case.kept {
        check_disk(host, &at(case, kept), &case.scene.expected(kept))?;
    }
    Ok(refused)
}

/// Gives the merge up; `None` if there is none.
fn abandon_merge(case: &MergeCase, host: &SimHost) -> Result<Option<Abandoned>, String> {
    match abandon(host, &at(case, case.merged_layers[0]), None, &Policy::default()) {
        Ok(done) => Ok(Some(done)),
        Err(e) if e.line().contains("no merge of it was begun") => Ok(None),
        Err(e) => Err(e.line()),
    }
}

/// A merge that is ended at a step, and then abandoned; the abandoning is ended at each of its steps.
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
        // Ended at each of its steps for one of the fates, and not ended for the others.
        let first_stop = if fate == step % 4 { 1 } else { 1 << 32 };
        for stop in first_stop.. {
            let host = after.crash_with(&|_| true);
            let steps = host.counts().steps;
            host.stop_at(steps + stop);
            let done = abandon_merge(case, &host);
            host.stop_at(u64::MAX);
            let host = if host.is_dead() { host.crash(random) } else { host };
            let before = check(case, &host)?;
            // Again, until it is done; it is done at most once in vain.
            let again = abandon_merge(case, &host)?;
            let after = check(case, &host)?;
            let here = host.exists(&at(case, case.merged_layers[0]));
            match again {
                Some(Abandoned::Partial(_)) => {
                    seen[0] += 1;
                    if !after || !before {
                        return Err("partly overwritten, and read by itself".into());
                    }
                }
                Some(Abandoned::Undone | Abandoned::Whole(_)) | None => {
                    seen[1] += 1;
                    if after {
                        return Err("refused, and nothing is left to be finished".into());
                    }
                }
            }
            if here {
                // Finished after all, unless a child that is linked already would change.
                match merge(case, &host) {
                    Ok(_) => seen[2] += 1,
                    Err(e) if e.line().contains("another child") && !after => {}
                    Err(e) => return Err(format!("finished: {}", e.line())),
                }
                check(case, &host)?;
            }
            if done.is_ok() {
                break; // it came to its end
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
    println!("partly overwritten {}, nothing left {}, finished after all {}", seen[0], seen[1], seen[2]);
    assert!(seen.iter().all(|n| *n > 100), "{seen:?}");
}
