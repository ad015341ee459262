//! Random sequences of verbs on random chains, with a flat array as the model of each disk. After every verb each disk
//! equals its array, and no file has a defect.

use std::path::Path;

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops;
use diffdisk::ops::merge::PreparedMerge;
use diffdisk::storage::Env;
use diffdisk::storage::sim::SimHost;

use crate::common::rng::{Rng, seed_of_env};
use crate::common::temp::is_temporary;
use crate::fixture::{Fill, Fixture, overwrite};
use crate::sweep::FOLDER;

/// Maximum number of images in a sequence.
const IMAGES: usize = 7;
/// Defects that are expected here: sizes of parents and children may differ.
const ALLOWED: [&str; 1] = ["parent-size"];

/// An image, and its expected disk.
struct ModelImage {
    name: String,
    parent: Option<usize>,
    fixed: bool,
    disk: Vec<u8>,
}

struct SequenceRun<'a> {
    host: &'a SimHost,
    fixture: Fixture<'a>,
    images: Vec<ModelImage>,
    rng: Rng,
    step: u64,
    refused: u64,
    merged: u64,
}

impl SequenceRun<'_> {
    fn pick(&mut self, fits: impl Fn(usize, &ModelImage) -> bool) -> Option<usize> {
        let fitting: Vec<usize> = (0..self.images.len()).filter(|n| fits(*n, &self.images[*n])).collect();
        (!fitting.is_empty()).then(|| self.rng.pick(&fitting))
    }

    /// Returns the image and its parents, youngest first.
    fn chain(&self, of: usize) -> Vec<usize> {
        std::iter::successors(Some(of), |n| self.images[*n].parent).collect()
    }

    fn create(&mut self) -> String {
        let (name, number) = (format!("i{}.vhd", self.step), self.images.len());
        let block = self.rng.pick(&[4096, 8192, 65536]);
        let parent = if self.rng.below(4) > 0 { self.pick(|_, _| true) } else { None };
        let sectors = 1 + self.rng.below(300);
        let (fixed, disk) = match parent {
            Some(parent) => {
                let (mut disk, more) = (self.images[parent].disk.clone(), self.rng.below(3) * self.rng.below(40));
                disk.resize(disk.len() + usize::try_from(more * 512).expect("small"), 0);
                let sectors = Some(disk.len() as u64 / 512);
                self.fixture.sized_child(&name, &self.images[parent].name, block, sectors);
                (false, disk)
            }
            None => {
                let fixed = self.rng.below(4) == 0;
                match fixed {
                    true => self.fixture.fixed(&name, sectors),
                    false => self.fixture.dynamic(&name, block, sectors),
                }
                (fixed, vec![0; usize::try_from(sectors * 512).expect("small")])
            }
        };
        self.images.push(ModelImage { name: name.clone(), parent, fixed, disk });
        format!("create {name} ({number}) on {parent:?}")
    }

    /// Writes to an image without children, since a write to a parent would change the disks of its children.
    fn write(&mut self) -> String {
        let parents: Vec<_> = self.images.iter().filter_map(|image| image.parent).collect();
        let Some(of) = self.pick(|n, _| !parents.contains(&n)) else { return "-".into() };
        let (tag, mut runs) = (format!("W{}", self.step), Vec::new());
        let sectors = self.images[of].disk.len() as u64 / 512;
        for _ in 0..1 + self.rng.below(4) {
            let from = self.rng.below(sectors);
            let to = (from + 1 + self.rng.below(30)).min(sectors);
            runs.push((from, to, if self.rng.below(3) == 0 { Fill::Zeros } else { Fill::Tag(&tag) }));
        }
        self.fixture.write(&self.images[of].name, &runs);
        overwrite(&mut self.images[of].disk, &runs);
        format!("write {of}: {runs:?}")
    }

    fn flatten(&mut self) -> String {
        let Some(of) = self.pick(|_, image| image.parent.is_some()) else { return "-".into() };
        let parents = self.chain(of);
        let keep = (self.rng.below(2) == 0).then(|| self.rng.pick(&parents[1..]));
        let path = keep.map(|keep| self.fixture.path(&self.images[keep].name));
        let policy = Policy::default();
        let outcome = ops::flatten::flatten(
            self.host,
            &self.fixture.path(&self.images[of].name),
            path.as_deref(),
            &policy,
            &mut |_| Ok(()),
        );
        outcome.unwrap_or_else(|e| panic!("flatten {of} on {keep:?}: {}", e.line()));
        self.images[of].parent = keep;
        format!("flatten {of} on {keep:?}")
    }

    fn rebase(&mut self) -> String {
        let Some(of) = self.pick(|_, image| image.parent.is_some()) else { return "-".into() };
        let to = self.pick(|_, _| true).expect("there is an image");
        let circle = self.chain(to).contains(&of);
        let (path, parent) = (self.fixture.path(&self.images[of].name), self.fixture.path(&self.images[to].name));
        let outcome = ops::rebase::rebase(self.host, &path, &parent, false, &Policy::default(), &mut |_| Ok(()));
        self.expect(outcome.map(drop), circle, &format!("rebase {of} on {to}"));
        if !circle {
            self.images[of].parent = Some(to);
        }
        format!("rebase {of} on {to}")
    }

    /// Merges an image, and perhaps some of its parents, into one of its parents. The merge is refused if another child
    /// would change or the sizes do not fit.
    fn merge(&mut self) -> String {
        let Some(of) = self.pick(|_, image| image.parent.is_some()) else { return "-".into() };
        let chain = self.chain(of);
        let depth = 1 + usize::try_from(self.rng.below(chain.len() as u64 - 1)).expect("small");
        let (folded, into) = (&chain[..depth], chain[depth]);
        let above = |parent: usize| chain[..=depth].iter().position(|n| *n == parent)?.checked_sub(1);
        let others = self.images.iter().enumerate().any(|(n, image)| {
            let sibling = image.parent.and_then(above).map(|place| chain[place]);
            sibling.is_some_and(|sibling| sibling != n)
        });
        let has_children = self.images.iter().any(|image| image.parent == Some(of));
        let (size, received) = (self.images[of].disk.len(), self.images[into].disk.len());
        let refused = others || !(size == received || size < received && has_children);
        let path = self.fixture.path(&self.images[of].name);
        let target = self.fixture.path(&self.images[into].name);
        let outcome = PreparedMerge::prepare(
            self.host,
            &path,
            (depth > 1).then_some(target.as_path()),
            false,
            &Policy::default(),
        )
        .and_then(|merge| merge.run(&mut |_| Ok(())));
        let said = format!("merge {of} into {into}, {}", if refused { "refused" } else { "done" });
        let folded = folded.to_vec();
        self.expect(outcome.map(drop), refused, &said);
        if !refused {
            let mut disk = std::mem::take(&mut self.images[of].disk);
            disk.resize(received, 0);
            self.images[into].disk = disk;
            self.remove_images(&folded, into);
            self.merged += 1;
        }
        said
    }

    /// Removes the images `gone` from the model and replaces them as parents by `instead`. The other images are
    /// renumbered.
    fn remove_images(&mut self, gone: &[usize], instead: usize) {
        let number = |old: usize| old - gone.iter().filter(|n| **n < old).count();
        for image in &mut self.images {
            image.parent = image.parent.map(|p| number(if gone.contains(&p) { instead } else { p }));
        }
        let mut n = 0..;
        self.images.retain(|_| !gone.contains(&n.next().expect("endless")));
    }

    fn compact(&mut self) -> String {
        let Some(of) = self.pick(|_, image| !image.fixed) else { return "-".into() };
        let path = self.fixture.path(&self.images[of].name);
        let outcome = ops::compact::compact(self.host, &path, &Policy::default(), &mut |_| Ok(()));
        outcome.unwrap_or_else(|e| panic!("compact {of}: {}", e.line()));
        format!("compact {of}")
    }

    fn resize(&mut self) -> String {
        let of = self.pick(|_, _| true).expect("there is an image");
        let old = self.images[of].disk.len();
        let shrink = self.rng.below(2) == 0;
        let most = if self.rng.below(8) == 0 { 20_000 } else { 400 };
        let sectors = 1 + if shrink { self.rng.below(old as u64 / 512) } else { self.rng.below(most) };
        let new = usize::try_from(sectors * 512).expect("small");
        let lost = new < old && (!shrink || self.images[of].disk[new..].iter().any(|byte| *byte != 0));
        let path = self.fixture.path(&self.images[of].name);
        let outcome = ops::resize::resize(self.host, &path, new as u64, shrink, &Policy::default(), &mut |_| Ok(()));
        self.expect(outcome.map(drop), lost, &format!("resize {of} to {sectors}"));
        if !lost {
            self.images[of].disk.resize(new, 0);
        }
        format!("resize {of} to {sectors}, {}", if lost { "refused" } else { "done" })
    }

    fn expect(&mut self, outcome: Result<()>, refused: bool, what: &str) {
        match outcome {
            Ok(()) => assert!(!refused, "{what} should be refused"),
            Err(e) => assert!(refused && e.kind() == ErrorKind::Refused, "{what}: {}", e.line()),
        }
        self.refused += u64::from(refused);
    }

    fn check_all(&self, trace: &[String]) {
        for image in &self.images {
            let seen =
                self.fixture.read_disk(&image.name).unwrap_or_else(|e| panic!("{}\n{}", e.line(), trace.join("\n")));
            let differs = seen.iter().zip(&image.disk).position(|(a, b)| a != b).map(|at| at / 512);
            let (len, wanted) = (seen.len() / 512, image.disk.len() / 512);
            assert!(
                differs.is_none() && len == wanted,
                "{}: sector {differs:?} differs, {len} sectors of {wanted}\n{}",
                image.name,
                trace.join("\n")
            );
            let defects: Vec<_> =
                self.fixture.defects(&image.name).into_iter().filter(|kind| !ALLOWED.contains(kind)).collect();
            assert_eq!(defects, [""; 0], "{}\n{}", image.name, trace.join("\n"));
        }
        let strange = self.host.names().into_iter().find(|name| is_temporary(name));
        assert_eq!(strange, None, "{}", trace.join("\n"));
    }
}

/// Runs one sequence. Returns the numbers of refusals and of completed merges.
fn run(seed: u64, steps: u64) -> (u64, u64) {
    let host = SimHost::new(seed);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    let mut world =
        SequenceRun { host: &host, fixture, images: Vec::new(), rng: Rng::new(seed), step: 0, refused: 0, merged: 0 };
    let mut trace = vec![format!("replay: DIFFDISK_SEED={seed}"), world.create()];
    for step in 1..steps {
        world.step = step;
        let said = match world.rng.below(14) {
            0 | 1 if world.images.len() < IMAGES => world.create(),
            0..=4 => world.write(),
            5 | 6 => world.flatten(),
            7 | 8 => world.rebase(),
            9 => world.compact(),
            10 | 11 => world.merge(),
            _ => world.resize(),
        };
        trace.push(said);
        world.check_all(&trace);
    }
    assert!(host.canonical(Path::new(FOLDER)).is_ok());
    (world.refused, world.merged)
}

#[test]
fn random_sequences_keep_every_disk() {
    if let Some(seed) = seed_of_env() {
        run(seed, 60);
        return;
    }
    let first = Rng::from_env("sequences").next() % 1_000_000;
    let worlds = std::env::var("DIFFDISK_WORLDS").map_or(60, |text| text.parse().expect("a decimal number"));
    let all = (first..first + worlds).map(|seed| run(seed, 60));
    let (refused, merged) = all.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    assert!(refused > worlds && merged * 4 > worlds, "too few refusals or merges: {refused} refusals, {merged} merges");
}
