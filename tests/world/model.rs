//! The values that each sector may contain after a crash: its value at the last completed flush, and every value
//! written since.

use std::collections::BTreeMap;
use std::path::PathBuf;

use diffdisk::units::SectorRange;

/// The contents of a sector: 0 for zeros, otherwise the number of the action that wrote it.
pub(crate) type Value = u32;
/// The value of sectors with data of the parent.
pub(crate) const PARENT: Value = 1;
/// The value of a sector whose bytes no action wrote to that sector.
pub(crate) const GARBAGE: Value = u32::MAX;

/// The possible values of a sector, oldest first, each with the number of its action.
#[derive(Clone, Debug)]
struct Sector {
    values: Vec<(u32, Value)>,
    /// Index of the last acknowledged value. Reads return this or a later one.
    acknowledged: usize,
}

/// The possible values of each sector of a disk, and of the images that snapshots have kept.
#[derive(Clone, Debug)]
pub(crate) struct Model(Vec<Sector>, Vec<Kept>);

/// An image that a snapshot keeps.
#[derive(Clone, Debug)]
struct Kept {
    path: PathBuf,
    /// The possible values of its sectors.
    sectors: Vec<Sector>,
    /// Whether the snapshot is complete, so that the image must exist.
    is_complete: bool,
}

/// The contents of the images that snapshots have kept, by path.
pub(crate) type KeptContents = BTreeMap<PathBuf, Vec<Value>>;

impl Model {
    pub(crate) fn new(values: &[Value]) -> Model {
        Model(values.iter().map(|&v| Sector { values: vec![(0, v)], acknowledged: 0 }).collect(), Vec::new())
    }

    /// Records that a snapshot keeps the contents of `moment` at `path`.
    pub(crate) fn keep(&mut self, path: PathBuf, moment: &Model) {
        self.1.push(Kept { path, sectors: moment.0.clone(), is_complete: false });
    }

    /// Removes the last kept image, whose snapshot was not switched.
    pub(crate) fn forget_kept(&mut self) {
        self.1.pop();
    }

    /// Records that the last snapshot is complete.
    pub(crate) fn complete_snapshot(&mut self) {
        self.1.last_mut().expect("a snapshot was taken").is_complete = true;
    }

    /// Checks the kept images. The images of complete snapshots must exist. Each image that exists must have all that
    /// was acknowledged at the moment of its snapshot.
    pub(crate) fn check_kept(&self, found: &KeptContents) -> Result<(), String> {
        for kept in &self.1 {
            let name = kept.path.display();
            match found.get(&kept.path) {
                Some(values) => {
                    let moment = Model(kept.sectors.clone(), Vec::new());
                    moment.check(values, true).map_err(|e| format!("the kept image {name}: {e}"))?;
                }
                None if kept.is_complete => return Err(format!("the kept image {name} is gone")),
                None => {}
            }
        }
        match found.keys().find(|path| self.1.iter().all(|kept| kept.path != **path)) {
            Some(path) => Err(format!("the image {} was kept before the switch", path.display())),
            None => Ok(()),
        }
    }

    /// Replaces the possible values of the kept images by their contents, and removes images that were not found. The
    /// images never change from now on.
    pub(crate) fn settle_kept(&mut self, found: &KeptContents) {
        self.1.retain(|kept| found.contains_key(&kept.path));
        for kept in &mut self.1 {
            *kept = Kept { sectors: Model::new(&found[&kept.path]).0, is_complete: true, path: kept.path.clone() };
        }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.0.len() as u64
    }

    fn range(&mut self, range: SectorRange) -> &mut [Sector] {
        &mut self.0[range.start() as usize..range.end() as usize]
    }

    /// Adds `value` to the possible values of each sector, as the write of action `act`.
    pub(crate) fn begin(&mut self, range: SectorRange, act: u32, value: Value) {
        self.range(range).iter_mut().for_each(|s| s.values.push((act, value)));
    }

    /// Records that action `act` was acknowledged: reads return its value or a later one.
    pub(crate) fn acknowledge(&mut self, range: SectorRange, act: u32) {
        for sector in self.range(range) {
            let at = sector.values.iter().position(|(a, _)| *a == act).expect("it began");
            sector.acknowledged = sector.acknowledged.max(at);
        }
    }

    /// Returns the actions that a flush which begins now makes durable: the last acknowledged action of each sector.
    pub(crate) fn flush_point(&self) -> Vec<u32> {
        self.0.iter().map(|s| s.values[s.acknowledged].0).collect()
    }

    /// Removes the values that are older than the flush point `covered` of an acknowledged flush.
    pub(crate) fn complete_flush(&mut self, covered: &[u32]) {
        for (sector, act) in self.0.iter_mut().zip(covered) {
            if let Some(at) = sector.values.iter().position(|(a, _)| a == act) {
                sector.values.drain(..at);
                sector.acknowledged -= at;
            }
        }
    }

    /// Checks the contents of a disk. With `acknowledged` every acknowledged action must be kept, as after a kill of a
    /// process with a live journal. Otherwise only flushed actions must be kept, as after a crash.
    pub(crate) fn check(&self, values: &[Value], acknowledged: bool) -> Result<(), String> {
        for (number, (sector, value)) in self.0.iter().zip(values).enumerate() {
            let from = if acknowledged { sector.acknowledged } else { 0 };
            if !sector.values[from..].iter().any(|(_, v)| v == value) {
                let may: Vec<_> = sector.values[from..].iter().map(|(_, v)| name(*v)).collect();
                return Err(format!("sector {number} has {}, allowed are {}", name(*value), may.join(" or ")));
            }
        }
        Ok(())
    }

    /// Checks data that was read from the running disk. `None` stands for a sector that was not read.
    pub(crate) fn check_read(&self, values: &[Option<Value>]) -> Result<(), String> {
        let missing = self.0.iter().zip(values).map(|(s, v)| v.unwrap_or(s.values[s.acknowledged].1));
        self.check(&missing.collect::<Vec<_>>(), true)
    }

    /// Replaces the model by the contents of the disk after a crash, which are durable.
    pub(crate) fn reset_after_crash(&mut self, values: &[Value]) {
        self.0 = Model::new(values).0;
    }

    /// Removes the values that are later than the contents of the disk after a kill. The contents count as
    /// acknowledged, but not as durable.
    pub(crate) fn reset_after_kill(&mut self, values: &[Value]) {
        for (sector, value) in self.0.iter_mut().zip(values) {
            let at = sector.values.iter().rposition(|(_, v)| v == value).expect("it was checked");
            sector.values.truncate(at + 1);
            sector.acknowledged = at;
        }
    }
}

fn name(value: Value) -> String {
    match value {
        0 => "zeros".into(),
        PARENT => "the parent's data".into(),
        GARBAGE => "garbage, or another sector's data".into(),
        act => format!("data of action {act}"),
    }
}

/// Returns the bytes that represent `value` in sector number `sector`.
pub(crate) fn bytes(sector: u64, value: Value) -> [u8; 512] {
    let mut bytes = [0; 512];
    if value != 0 {
        let place = u32::try_from(sector).expect("a small disk");
        for pair in bytes.as_chunks_mut::<8>().0 {
            pair[..4].copy_from_slice(&value.to_be_bytes());
            pair[4..].copy_from_slice(&place.to_be_bytes());
        }
    }
    bytes
}

/// Returns the value that the bytes of sector number `sector` represent.
pub(crate) fn value(sector: u64, found: &[u8]) -> Value {
    let pairs = found.as_chunks::<8>().0;
    let value = Value::from_be_bytes(found[..4].try_into().expect("four bytes"));
    let place = u32::from_be_bytes(found[4..8].try_into().expect("four bytes"));
    let whole = pairs.iter().all(|pair| *pair == pairs[0]);
    if whole && u64::from(place) == if value == 0 { 0 } else { sector } { value } else { GARBAGE }
}

/// Returns whether the bytes of a sector are data of the guest or the parent, and neither metadata nor zeros.
pub(crate) fn is_data(found: &[u8]) -> bool {
    let pairs = found.as_chunks::<8>().0;
    let (value, place) = found[..8].split_at(4);
    // A sector of data repeats one pair: its value (the number of an action, or `PARENT`) and its sector number. Both
    // are below 2^16. No sector of metadata has this form.
    let is_small = |bytes: &[u8]| bytes[..2] == [0, 0];
    pairs.iter().all(|pair| *pair == pairs[0]) && value != [0; 4] && is_small(value) && is_small(place)
}
