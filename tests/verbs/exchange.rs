//! Folders, files and links are exchanged while images are opened and merged: no file outside the folder in which the
//! child was found is read, written or removed. The test takes some seconds; `DIFFDISK_EXCHANGE_SECONDS=60` makes it
//! run longer.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diffdisk::chain::{Chain, OpenMode, Policy};
use diffdisk::ops::merge::PreparedMerge;
use diffdisk::storage::host::Host;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::fixture::{Fill, Fixture};

const BLOCK: u32 = 2 << 20;

fn seconds() -> Duration {
    let asked = std::env::var("DIFFDISK_EXCHANGE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(asked.unwrap_or(3))
}

/// Exchanges two names. Returns false if the exchange fails, for example because one name does not exist.
fn exchange(one: &Path, other: &Path) -> bool {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
}

/// Sets its flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Exchanges the pairs in turn, without a pause, while `work` runs. Returns the result of `work` and the number of
/// exchanges.
fn while_exchanging<T>(pairs: &[(PathBuf, PathBuf)], work: impl FnOnce() -> T) -> (T, u64) {
    let (done, exchanges) = (AtomicBool::new(false), AtomicU64::new(0));
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (one, other) in pairs {
                    exchanges.fetch_add(exchange(one, other).into(), Ordering::Relaxed);
                }
            }
        });
        // Stops the thread even if `work` panics, since the scope waits for it.
        let _ends = SetOnDrop(&done);
        work()
    });
    (outcome, exchanges.into_inner())
}

/// Makes a folder `vm` in each of two folders, with the image `p.vhd` and its child `c.vhd`. Names and UUIDs are the
/// same in both, but the data differs.
fn two_copies(root: &Path, folders: [&str; 2]) {
    let [one, other] = folders.map(|folder| root.join(folder).join("vm"));
    fs::create_dir_all(&one).expect("a folder");
    fs::create_dir_all(&other).expect("a folder");
    let fixture = Fixture::new(&Host, &one);
    fixture.dynamic("p.vhd", BLOCK, 4096);
    fixture.child("c.vhd", "p.vhd", BLOCK);
    for name in ["p.vhd", "c.vhd"] {
        fs::copy(one.join(name), other.join(name)).expect("a copy");
    }
    fixture.write("p.vhd", &[(0, 8, Fill::Tag("one"))]);
    fixture.write("c.vhd", &[(8, 16, Fill::Tag("one's child"))]);
    let fixture = Fixture::new(&Host, &other);
    fixture.write("p.vhd", &[(0, 8, Fill::Tag("other"))]);
    fixture.write("c.vhd", &[(8, 16, Fill::Tag("other's child"))]);
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").ino()
}

#[test]
fn a_chain_stays_in_one_folder_during_exchanges() {
    let d = tempfile::tempdir().expect("a folder");
    let root = d.path().canonicalize().expect("a path");
    two_copies(&root, ["a", "b"]);
    let at = |path: &str| root.join(path);
    // A folder and a file are exchanged with links that lead out of the folder.
    fs::create_dir(at("outside")).expect("a folder");
    fs::copy(at("b/vm/p.vhd"), at("outside/p.vhd")).expect("a copy");
    symlink("../../outside/p.vhd", at("a/vm/link")).expect("a link");
    symlink("outside", at("way")).expect("a link");
    fs::create_dir(at("deep")).expect("a folder");
    fs::copy(at("a/vm/p.vhd"), at("deep/p.vhd")).expect("a copy");
    let sides = ["a/vm", "b/vm"].map(|side| (inode(&at(side).join("c.vhd")), inode(&at(side).join("p.vhd"))));
    let inside = inode(&at("deep/p.vhd"));
    let fixture = Fixture::new(&Host, &root);
    fixture.child("top.vhd", "deep/p.vhd", BLOCK);

    let file = (at("a/vm/p.vhd"), at("a/vm/link"));
    let pairs = [(at("a"), at("b")), (at("deep"), at("way")), (at("a/vm"), at("b/vm")), file];
    let ((opened, refused), exchanges) = while_exchanging(&pairs, || {
        let (mut opened, mut refused, until) = ([0u64; 3], 0u64, Instant::now() + seconds());
        while Instant::now() < until {
            match Chain::open(&Host, &at("a/vm/c.vhd"), &Policy::default(), OpenMode::Inspect) {
                Ok(chain) => {
                    let [child, parent] = [0, 1].map(|n| chain.images()[n].file().stat().expect("a file").id.ino);
                    let side = sides.iter().position(|side| side.0 == child).expect("one of the children");
                    assert_eq!(parent, sides[side].1, "a child in one folder was opened with the parent in the other");
                    opened[side] += 1;
                }
                Err(_) => refused += 1,
            }
            match Chain::open(&Host, &at("top.vhd"), &Policy::default(), OpenMode::Inspect) {
                Ok(chain) => {
                    let parent = chain.images()[1].file().stat().expect("a file").id.ino;
                    assert_eq!(parent, inside, "a file outside was opened through a link");
                    opened[2] += 1;
                }
                Err(_) => refused += 1,
            }
        }
        (opened, refused)
    });
    println!("{exchanges} exchanges, chains opened {opened:?}, {refused} refused");
    assert!(opened.iter().all(|n| *n > 0) && exchanges > 100, "too few exchanges, or a chain was never opened");
}

#[test]
fn a_merge_changes_one_folder_during_exchanges() {
    let (until, mut merged, mut refused, mut exchanged, mut beside) = (Instant::now() + seconds(), 0, 0, 0, 0);
    while Instant::now() < until || merged == 0 {
        let d = tempfile::tempdir().expect("a folder");
        let root = d.path().canonicalize().expect("a path");
        two_copies(&root, ["a", "b"]);
        let at = |path: &str| root.join(path);
        // The folders are accessed through open descriptors, since after an exchange each path may lead to the other
        // folder.
        let folders = ["a/vm", "b/vm"].map(|path| fs::File::open(at(path)).expect("a folder"));
        let held = |n: usize| {
            use std::os::fd::AsRawFd;
            PathBuf::from(format!("/proc/self/fd/{}", folders[n].as_raw_fd()))
        };
        let before = [0, 1].map(|n| ["p.vhd", "c.vhd"].map(|name| fs::read(held(n).join(name)).expect("a file")));
        let (outcome, exchanges) = while_exchanging(&[(at("a"), at("b"))], || {
            let merge = PreparedMerge::prepare(&Host, &at("a/vm/c.vhd"), None, true, &Policy::default())?;
            merge.run(&mut |_| Ok(()))
        });
        exchanged += exchanges;
        let after = [0, 1].map(|n| ["p.vhd", "c.vhd"].map(|name| fs::read(held(n).join(name)).ok()));
        let changed = |n: usize| (0..2).any(|file| after[n][file].as_ref() != Some(&before[n][file]));
        let gone = |n: usize| after[n][1].is_none();
        match outcome {
            Ok(_) => {
                merged += 1;
                let done = usize::from(gone(1));
                assert!(gone(done) && !changed(1 - done), "two folders were changed by one merge");
                // After a single exchange the path may have led to one folder during the whole merge.
                beside += u64::from(exchanges > 1);
            }
            Err(_) => {
                refused += 1;
                assert!(!gone(0) && !gone(1), "an image was removed by a merge that failed");
                assert!(!(changed(0) && changed(1)), "two folders were changed by one merge");
            }
        }
    }
    println!("{merged} merges, {beside} of them under exchanges, {refused} refused, {exchanged} exchanges");
}
