//! Tests of `journal.rs`: kills between the stores of a commit, on the simulated host.

use std::path::Path;
use std::sync::Arc;

use super::super::{Commit, Growth, Keep, Kind, Spec, Step, Writable, create, drive};
use super::*;
use crate::storage::sim::{Random, SimHost};
use crate::storage::{Access, Payload, Slot};
use crate::units::{BlockSize, SectorRange};

const PATH: &str = "/d/a.vhd";

fn open(host: &SimHost) -> Result<Arc<Writable>> {
    let keep = Keep::Journal { folder: "/run".into(), discard: false };
    let image = Image::open(host.open(Path::new(PATH), Access::Write)?)?;
    let image = Arc::new(Writable::new(host, image, &keep)?);
    if let Some(mut growth) = Growth::begin(&image, Slot(0)) {
        drive(host, image.file(), Slot(0), |failed, ops| growth.next(failed, ops))?;
    }
    Ok(image)
}

fn write(image: &Writable, block: u32) {
    let place = u64::from(image.reserve(block).unwrap());
    let first = u64::from(block) * 4096;
    image.file().write_at(&[7; 512], (place + 1) * 512).unwrap();
    assert!(image.mark(SectorRange::between(first, first + 1)), "the journal keeps it");
}

/// A commit that is killed after `steps` of its steps.
fn commit(host: &SimHost, image: &Arc<Writable>, steps: usize) -> bool {
    let (mut commit, mut ops) = (Commit::new(image.clone(), Slot(0)), Vec::new());
    for _ in 0..steps {
        if commit.next(None, &mut ops).unwrap() != Step::Wait {
            return true;
        }
        for op in ops.drain(..) {
            match op.payload {
                Payload::Own(bytes) => image.file().write_at(&bytes, op.offset).unwrap(),
                _ => image.file().sync().unwrap(),
            }
        }
    }
    host.halt();
    std::mem::forget(commit);
    false
}

#[test]
fn places_of_a_commit_that_was_killed_are_counted_by_its_successor() {
    // A commit of a dynamic root: pointers, sync, and the journal's header.
    for steps in 0..3 {
        let random = &mut Random::new(steps as u64);
        let first = SimHost::new(1);
        let spec = Spec { kind: Kind::Dynamic, size: 64 << 20, block_size: BlockSize::DEFAULT, reserve: 0 };
        create(&first, Path::new(PATH), &spec).unwrap();
        let image = open(&first).unwrap();
        write(&image, 3);
        assert!(commit(&first, &image, 9), "the first commit is whole");
        write(&image, 5);
        write(&image, 6);
        assert!(!commit(&first, &image, steps), "the second is killed after {steps} steps");

        let second = first.kill(random);
        let image = open(&second).unwrap_or_else(|e| panic!("killed after {steps} steps: {}", e.line()));
        write(&image, 8);
        assert!(commit(&second, &image, 9));
        write(&image, 10);
        assert!(!commit(&second, &image, 0));

        let third = second.kill(random);
        let image = open(&third).unwrap_or_else(|e| panic!("after the successor of {steps} steps: {}", e.line()));
        for block in [3, 5, 6, 8, 10] {
            let bitmaps = image.bitmaps().unwrap();
            let known = bitmaps.get(bitmaps.index_of(u64::from(block) * 4096));
            let place = image.image().bat().unwrap().place(block);
            assert!(place.is_some() && known.is_none_or(|granule| granule.run(0, 1).0), "block {block} is lost");
        }
    }
}
