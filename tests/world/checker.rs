//! Checks the state after a crash: the image opens, `check` finds no corruption except, in some outcomes, a missing
//! trailing footer, and each sector has an allowed value.
//!
//! A crash outcome is the set of unsynced writes, lengths and names ("units") that survive the crash.

use std::collections::HashMap;
use std::sync::Arc;

use diffdisk::chain::{Chain, OpenMode, PlanBuffer, Policy};
use diffdisk::disk::Disk;
use diffdisk::format::{Defect, Severity};
use diffdisk::image::{self, Durability};
use diffdisk::storage::sim::{DurableUnit, Random, SimHost};
use diffdisk::storage::{Access, Env};
use diffdisk::units::SectorRange;

use crate::layouts::{self, top};
use crate::model::{self, KeptContents, Model, Value};

/// Limit of exhaustive checks: with fewer units than this, every crash outcome is checked, otherwise a sample. The
/// limit is half of this if snapshots are taken.
const EXHAUSTIVE_LIMIT: usize = 9;

/// The contents of an image after recovery.
#[derive(Clone)]
struct ImageContents {
    values: Vec<Value>,
    /// The images that snapshots have kept.
    kept: KeptContents,
    /// Whether the trailing footer was present before recovery.
    has_trailing_footer: bool,
}

/// Checks crash outcomes. Results are cached by the contents of the image, so an image is checked again only after the
/// cache was cleared.
#[derive(Default)]
pub(crate) struct Checker {
    checked: HashMap<u64, Result<Arc<ImageContents>, String>>,
    /// Whether the trailing footer may be missing because an earlier crash lost it and the recovery from that crash is
    /// not complete.
    pub(crate) trailing_footer_may_be_missing: bool,
    /// Number of checked states.
    pub(crate) states: u64,
    /// Number of checked states whose image was not in the cache.
    pub(crate) distinct: u64,
    /// Whether the last checked image had its trailing footer before recovery.
    pub(crate) had_trailing_footer: bool,
    /// Number of checked crashes during a recovery.
    pub(crate) recovery_crashes: u64,
    /// Number of checked states with torn sectors.
    pub(crate) torn: u64,
    /// Number of completed changes of the version.
    pub(crate) changes: u64,
    /// Whether snapshots are taken, so that the recovery depends on all files.
    pub(crate) snapshots: bool,
}

impl Checker {
    /// Clears the cache of results, to limit memory. The counts stay.
    pub(crate) fn clear_cache(&mut self) {
        self.checked.clear();
    }

    /// Adds the counts of another checker.
    pub(crate) fn add_counts(&mut self, other: &Checker) {
        self.states += other.states;
        self.distinct += other.distinct;
        self.recovery_crashes += other.recovery_crashes;
        self.torn += other.torn;
        self.changes += other.changes;
    }

    /// Checks crash outcomes of a machine. With fewer units than the limit of exhaustive checks, checks every outcome
    /// without torn sectors, and some with torn sectors. Otherwise checks a sample of `sample` outcomes, but at least
    /// two, some with torn sectors.
    pub(crate) fn explore(
        &mut self,
        host: &SimHost,
        model: &Model,
        sample: u64,
        random: &mut Random,
    ) -> Result<(), String> {
        let units = host.unsynced_steps();
        let count = units.len();
        // With snapshots there are several images, which take longer to check.
        if count < if self.snapshots { EXHAUSTIVE_LIMIT / 2 } else { EXHAUSTIVE_LIMIT } {
            for mask in 0_u64..1 << count {
                self.check_crash(host, &units, model, &|i| mask >> i & 1 == 1, None)?;
            }
            let torn = if count > 0 { 4 } else { 0 };
            for _ in 0..torn {
                self.check_crash(host, &units, model, &|_| true, Some(random.next_u64()))?;
            }
            return Ok(());
        }
        self.check_crash(host, &units, model, &|_| false, None)?;
        self.check_crash(host, &units, model, &|_| true, None)?;
        for n in 0..sample.saturating_sub(2) {
            let (salt, yes) = (random.next_u64(), 1 + random.below(7));
            let lone = random.index(count);
            let torn = random.chance(1, 4).then(|| random.next_u64());
            let survives = |i: usize| match n % 4 {
                0 => i == lone,
                1 => i != lone,
                // Whole pages of 4 KiB survive or are lost.
                2 => {
                    let place = match units[i].1 {
                        DurableUnit::Sector(_, at) => at / 8,
                        _ => 1 << 40,
                    };
                    Random::new(salt ^ place).chance(yes, 8)
                }
                _ => Random::new(salt ^ i as u64).chance(yes, 8),
            };
            self.check_crash(host, &units, model, &survives, torn)?;
        }
        Ok(())
    }

    /// Checks one crash outcome: `survives` returns whether a unit survives. If `torn` is a seed, metadata sectors are
    /// torn at random.
    fn check_crash(
        &mut self,
        host: &SimHost,
        units: &[(u64, DurableUnit)],
        model: &Model,
        survives: &dyn Fn(usize) -> bool,
        torn: Option<u64>,
    ) -> Result<(), String> {
        let (mut tear, mut torn_here) = (sector_tearing(torn), false);
        let after = host.crash_torn(survives, &mut |old, new| tear(old, new).inspect(|_| torn_here = true));
        self.torn += u64::from(torn_here);
        // The file must end with a footer if each new length survives exactly when the write that caused it survives
        // (crash-safety A4).
        let needs_tail = units.iter().enumerate().all(|(i, (step, unit))| {
            let DurableUnit::Len(inode, len) = unit else { return true };
            let last = DurableUnit::Sector(*inode, (len - 1) / 512);
            let cause = units.iter().position(|(s, u)| s == step && *u == last);
            cause.is_none_or(|cause| survives(cause) == survives(i))
        });
        self.check_state(&after, model, needs_tail, false).map(|_| ()).map_err(|e| {
            let survived: Vec<_> = (0..units.len()).filter(|&i| survives(i)).map(|i| &units[i].1).collect();
            let lost: Vec<_> = (0..units.len()).filter(|&i| !survives(i)).map(|i| &units[i].1).collect();
            format!("{e}\n  survived: {survived:?}\n  lost: {lost:?}")
        })
    }

    /// Checks a machine after a crash or kill. With `needs_tail` the trailing footer must be present, unless
    /// `trailing_footer_may_be_missing` is set. With `acknowledged` every acknowledged action must be kept. Returns the
    /// contents of the disk.
    pub(crate) fn check_state(
        &mut self,
        after: &SimHost,
        model: &Model,
        needs_tail: bool,
        acknowledged: bool,
    ) -> Result<Vec<Value>, String> {
        self.states += 1;
        let digest = after.digest(&top()).ok_or("the image's name is lost")?;
        let digest = if self.snapshots { after.digest_of_all() } else { digest };
        if !self.checked.contains_key(&digest) {
            self.distinct += 1;
            let found = if self.distinct % if self.snapshots { 512 } else { 64 } == 1 {
                self.check_with_recovery_crashes(after)
            } else {
                check_image(after, self.distinct % 8 == 2, self.snapshots)
            };
            self.checked.insert(digest, found.map(Arc::new));
        }
        let found = self.checked[&digest].clone()?;
        if needs_tail && !found.has_trailing_footer && !self.trailing_footer_may_be_missing {
            return Err("the trailing footer is missing".into());
        }
        self.had_trailing_footer = found.has_trailing_footer;
        model.check(&found.values, acknowledged)?;
        model.check_kept(&found.kept)?;
        Ok(found.values.clone())
    }

    /// Checks an image and its recovery, then crashes at every step of the recovery. After each of these crashes the
    /// disk must have the same contents.
    fn check_with_recovery_crashes(&mut self, after: &SimHost) -> Result<ImageContents, String> {
        after.start_recording();
        let found = check_image(after, true, self.snapshots)?;
        let mut random = Random::new(self.distinct);
        let moments = after.take_recording();
        for (step, moment) in moments.iter().chain([after]).enumerate() {
            let count = moment.unsynced().len();
            for n in 0..4.min(1_u64 << count.min(3)) {
                let outcome: Vec<bool> = (0..count).map(|_| if n < 2 { n == 1 } else { random.chance(1, 2) }).collect();
                let mut tear = sector_tearing((n > 1).then(|| random.next_u64()));
                let crashed = moment.crash_torn(&|i| outcome[i], &mut tear);
                let again = check_image(&crashed, false, self.snapshots);
                let again = again.map_err(|e| format!("after a crash at step {step} of the recovery: {e}"))?;
                self.recovery_crashes += 1;
                Model::new(&found.values)
                    .check(&again.values, false)
                    .map_err(|e| format!("after a crash at step {step} of the recovery: {e}"))?;
                if again.kept != found.kept {
                    return Err(format!("a crash at step {step} of the recovery changes the kept images"));
                }
            }
        }
        Ok(found)
    }
}

/// Returns a function that tears metadata sectors at random. Without a seed the function tears no sector.
fn sector_tearing(seed: Option<u64>) -> impl FnMut(&[u8; 512], &[u8; 512]) -> Option<u128> {
    let mut random = seed.map(Random::new);
    move |old, new| {
        // The model has no value for a torn sector of guest data; `tests/host/guest.rs` covers torn guest data.
        let random = random.as_mut().filter(|_| !model::is_data(old) && !model::is_data(new))?;
        Some(u128::from(random.next_u64()) << 64 | u128::from(random.next_u64()))
    }
}

/// Checks an image, opens it for writing, which recovers it, and reads the whole disk. With `twice` the image is
/// checked again after recovery.
fn check_image(after: &SimHost, twice: bool, snapshots: bool) -> Result<ImageContents, String> {
    let sound = |when: &str| {
        let file = after.open(&top(), Access::Read).map_err(|e| e.line())?;
        let (report, _) = image::check(file).map_err(|e| format!("{when} the check fails: {}", e.line()))?;
        let mut bad = report.defects.into_iter().filter(|d| d.severity() == Severity::Corruption);
        let mut tail = true;
        let worse = bad.find(|d| {
            let missing = matches!(d, Defect::TrailingFooterMissing { .. } | Defect::TrailingFooterInvalid { .. });
            tail &= !missing;
            !missing
        });
        worse.map_or(Ok(tail), |d| Err(format!("{when} the check finds: {d}")))
    };
    let tail = sound("before recovery")?;
    let values = recover(after, snapshots)?;
    let kept = if snapshots { kept_images(after)? } else { KeptContents::new() };
    if twice && !sound("after recovery")? {
        return Err("after recovery the trailing footer is missing".into());
    }
    Ok(ImageContents { values, kept, has_trailing_footer: tail })
}

/// Opens the disk for writing, which recovers it, and returns its contents. With `snapshots` the open also completes or
/// undoes a snapshot.
pub(crate) fn recover(host: &SimHost, snapshots: bool) -> Result<Vec<Value>, String> {
    let env: Arc<dyn Env> = Arc::new(host.clone());
    if snapshots {
        let disk = Disk::open(env, &layouts::options(host, false));
        return read_disk(&disk.map_err(|e| format!("the disk does not open: {}", e.line()))?.version());
    }
    let chain = Chain::open(&*env, &top(), &Policy::default(), OpenMode::Write);
    let version = chain.and_then(|chain| chain.into_writable(&*env, &Durability::FlushOnly));
    let version = version.map_err(|e| format!("the disk does not open: {}", e.line()))?;
    read_disk(&version)
}

/// Returns the contents of the images that snapshots have kept.
pub(crate) fn kept_images(host: &SimHost) -> Result<KeptContents, String> {
    let mut found = KeptContents::new();
    for path in host.names().into_iter().filter(|path| layouts::is_kept_name(path)) {
        let chain = Chain::open(host, &path, &Policy::default(), OpenMode::Read);
        let version = chain.map_err(|e| format!("a kept image does not open: {}", e.line()))?.into_frozen();
        found.insert(path, read_disk(&version)?);
    }
    let more: Vec<_> = host.names().into_iter().filter(|path| !layouts::is_expected_name(path)).collect();
    if more.is_empty() { Ok(found) } else { Err(format!("files are left over: {more:?}")) }
}

/// Returns the contents of a disk.
pub(crate) fn read_disk(version: &diffdisk::chain::Version) -> Result<Vec<Value>, String> {
    let sectors = version.sectors();
    let mut bytes = vec![0; (sectors * 512) as usize];
    let all = SectorRange::between(0, sectors);
    version
        .read_now(all, &mut bytes, &mut PlanBuffer::default())
        .map_err(|e| format!("the disk cannot be read: {}", e.line()))?;
    Ok((0..).zip(bytes.chunks(512)).map(|(sector, found)| model::value(sector, found)).collect())
}
