//! Power cuts under a real file system: daemons serve images in ext4 or XFS on a loop device, whose medium logs all
//! requests. From the log the test rebuilds the states in which power cuts at many moments could leave the medium, and
//! mounts each state. The images are compared with the writes and flushes of their guests up to the moment of the cut
//! (crash-safety 11; R8: S1, S2, S4).
//!
//! After a power cut the medium has all changes up to the last sync, and any subset of the later changes, page by page.
//! A sync covers a write if the sync reached the medium after the write.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::fuse::{self, Entry, Event, FuseDisk};
use super::guest::{Content, Guest, History, SECTOR, Tearing, tagged};
use super::loopdev::{FsKind, LoopDevice, Mounted, can_mount, run_ok};
use super::pages::{PAGE, Pages};
use crate::common::daemon::Daemon;
use crate::common::rng::Rng;
use crate::common::temp::{self, RuntimeDir};
use crate::common::tool::{self, diffdisk};

/// Size in bytes of the guests' disks.
const DISK: u64 = 12 << 20;
/// Block size of the images: small, so that the files grow several times.
const BLOCK: &str = "256K";
/// Number of requests of each guest.
const REQUESTS: usize = 500;
/// Tag of the data in the root.
const ROOT: u64 = 1 << 40;

/// The images under test: a child of a root, and a dynamic image without a parent.
const TOPS: [&str; 2] = ["child.vhd", "alone.vhd"];

// The small journal of this file system wraps around, so that the log contains more of the file system's own writes.
#[test]
fn power_fails_under_ext4() {
    power_fails(
        "power_fails_under_ext4",
        FsKind::Ext4,
        &["-b", "1024", "-J", "size=4"],
        ["--direct", "--cache=writeback"],
    );
}

// This file system has the block size that mkfs chooses for ext4 on disks of usual size.
#[test]
fn power_fails_under_ext4_with_large_blocks() {
    power_fails(
        "power_fails_under_ext4_with_large_blocks",
        FsKind::Ext4,
        &["-b", "4096", "-J", "size=4"],
        ["--cache=writeback", "--direct"],
    );
}

#[test]
fn power_fails_under_xfs() {
    power_fails("power_fails_under_xfs", FsKind::Xfs, &[], ["--cache=writeback", "--direct"]);
}

/// Runs the test on a file system. `options` are arguments of mkfs, and `modes` has one option for the daemon of each
/// image.
fn power_fails(test: &str, kind: FsKind, options: &[&str], modes: [&'static str; 2]) {
    if !can_mount(test) {
        return;
    }
    let cuts = std::env::var("DIFFDISK_CUTS").map_or(100, |n| n.parse().expect("a number of cuts"));
    let started = Instant::now();
    let mut rng = Rng::from_env(test);
    let (base, log, histories) = record(kind, options, modes, &mut rng);
    let flushes: usize = histories.iter().map(History::flushes).sum();
    let syncs: Vec<usize> = (0..log.len()).filter(|n| matches!(log[*n].event, Event::Sync)).collect();
    println!(
        "{test}: {} events, {} syncs, {flushes} flushes noted in {:.1} s",
        log.len(),
        syncs.len(),
        started.elapsed().as_secs_f64()
    );
    assert!(flushes > 50 && syncs.len() > 50, "the load has too few flushes and syncs");

    let mut places: Vec<usize> = (0..cuts)
        .map(|n| match n % 2 {
            // Directly before a sync, most writes can be lost.
            0 => syncs[usize::try_from(rng.below(syncs.len() as u64)).expect("an index")],
            _ => usize::try_from(rng.below(log.len() as u64 + 1)).expect("an index"),
        })
        .collect();
    places.sort_unstable();
    let mut medium = MediumReplay { synced: base, log: &log, at: 0 };
    // The folder is in memory, since its contents need not be durable.
    let folder = temp::in_memory();
    let sectors = modes.map(|mode| if mode == "--direct" { Tearing::Whole } else { Tearing::Torn });
    // Each cut gets a new file: if an old loop device still uses a file, a mount of this file may reuse that device.
    // The cache of the old device may contain the superblock of the previous cut, according to which there is no
    // journal to replay.
    let look = |pages: &Pages, name: String, cut: usize, serve: bool| {
        let device = folder.path().join(name);
        pages.save(&device).expect("room in memory");
        let wrong = check_after_cut(kind, &device, folder.path(), (&histories, sectors), cut, serve);
        fs::remove_file(&device).expect("the device file can be removed");
        wrong
    };
    let (mut violations, mut report) = (0, String::new());
    for (n, &cut) in places.iter().enumerate() {
        let (pages, serve) = (medium.cut(cut, &mut rng), n % 5 == 0);
        let wrong = look(&pages, format!("device-{n}"), cut, serve);
        if wrong.is_empty() {
            continue;
        }
        violations += wrong.len();
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{cut}.img"));
        pages.save(&kept).expect("room for the evidence");
        // If the second examination finds nothing, the test itself is unreliable.
        let again = look(&pages, format!("device-{n}-again"), cut, serve).len();
        let (count, of, kept) = (wrong.len(), log.len(), kept.display());
        report +=
            &format!("\ncut at {cut} of {of}, kept as {kept}: {count} violations, at a second examination {again}:");
        wrong.iter().take(10).for_each(|line| report += &format!("\n  {line}"));
    }
    println!("{test}: {cuts} cuts, {violations} violations, {:.1} s", started.elapsed().as_secs_f64());
    // The failure message contains the whole report, since often only the end of a log is kept.
    assert_eq!(violations, 0, "{report}");
}

/// Runs the guests. Returns the contents of the medium at the start, the medium's log, and the guests' histories.
fn record(
    kind: FsKind,
    options: &[&str],
    modes: [&'static str; 2],
    rng: &mut Rng,
) -> (Pages, Vec<Entry>, Vec<History>) {
    let disk = fuse::blank(kind.size());
    let device = LoopDevice::attach(&disk.path());
    kind.make(device.path(), options);
    let mounted = Mounted::mount(kind, device.path());
    let initial = make_images(mounted.path());
    mounted.unmount();
    let mounted = Mounted::mount(kind, device.path());
    let base = disk.start_log();
    let histories = work(&disk, &mounted, initial, modes, rng);
    mounted.unmount();
    drop(device);
    (base, disk.log(), histories)
}

/// Makes the images. Returns the initial contents of [`TOPS`].
fn make_images(folder: &Path) -> [Vec<Content>; 2] {
    let sectors = DISK / SECTOR as u64;
    // Data and zeros alternate every MiB.
    let of_root = |sector: u64| if sector >> 11 & 1 == 0 { Content::Tag(ROOT) } else { Content::Zero };
    let mut raw = Vec::new();
    for sector in 0..sectors {
        match of_root(sector) {
            Content::Zero => raw.extend([0; SECTOR]),
            Content::Tag(tag) => raw.extend(tagged(tag, sector)),
        }
    }
    let scratch = tempfile::tempdir().expect("a folder");
    let source = scratch.path().join("root.raw");
    fs::write(&source, raw).expect("room for the root");
    let path = |name: &str| folder.join(name).to_str().expect("a plain name").to_owned();
    let source = source.to_str().expect("a plain name");
    diffdisk(["convert", source, &path("root.vhd"), "--to", "dynamic", "--from", "raw"]).ok();
    diffdisk(["create", &path(TOPS[0]), "--parent", &path("root.vhd"), "--block-size", BLOCK]).ok();
    diffdisk(["create", &path(TOPS[1]), "--size", &DISK.to_string(), "--block-size", BLOCK]).ok();
    [(0..sectors).map(of_root).collect(), vec![Content::Zero; usize::try_from(sectors).expect("a small disk")]]
}

/// Runs two daemons, each with a guest that makes random requests, at the same time.
fn work(
    disk: &FuseDisk,
    mounted: &Mounted,
    initial: [Vec<Content>; 2],
    modes: [&'static str; 2],
    rng: &mut Rng,
) -> Vec<History> {
    let runtime = RuntimeDir::new();
    let start =
        |(top, mode): (&&str, &'static str)| Daemon::start(&mounted.path().join(top), &[mode, runtime.option()]);
    let daemons: Vec<Daemon> = TOPS.iter().zip(modes).map(start).collect();
    let histories = thread::scope(|scope| {
        let guests: Vec<_> = daemons
            .iter()
            .zip(initial)
            .map(|(daemon, initial)| {
                let mut rng = Rng::new(rng.next());
                scope.spawn(move || {
                    let position = || disk.position();
                    let mut guest = Guest::connect(&daemon.socket(), History::of(initial), &position);
                    (0..REQUESTS).for_each(|_| guest.step(&mut rng));
                    guest.finish()
                })
            })
            .collect();
        guests.into_iter().map(|guest| guest.join().expect("the guest ends well")).collect()
    });
    daemons.into_iter().for_each(Daemon::stop);
    histories
}

/// Rebuilds the medium for a sequence of cuts at increasing positions.
struct MediumReplay<'a> {
    log: &'a [Entry],
    /// The contents after the first `at` events, the last of which is a sync.
    synced: Pages,
    at: usize,
}

impl MediumReplay<'_> {
    /// Returns contents that a power cut at `cut` may leave: all changes up to the last sync before `cut`, and a random
    /// subset of the pages changed between that sync and `cut`. The cuts must not decrease.
    fn cut(&mut self, cut: usize, rng: &mut Rng) -> Pages {
        let is_sync = |entry: &Entry| matches!(entry.event, Event::Sync);
        if let Some(sync) = self.log[self.at..cut].iter().rposition(is_sync) {
            for entry in &self.log[self.at..=self.at + sync] {
                match &entry.event {
                    Event::Write { offset, data } => self.synced.write(*offset, data),
                    Event::Zero { offset, len } => self.synced.zero(*offset, *len),
                    Event::Sync => {}
                }
            }
            self.at += sync + 1;
        }
        let mut pages = self.synced.clone();
        // On average one eighth, half, or seven eighths of the changes survive.
        let chance = rng.pick(&[1, 4, 7]);
        let mut survives = || rng.below(8) < chance;
        for entry in &self.log[self.at..cut] {
            match &entry.event {
                Event::Write { offset, data } => {
                    // File systems rely on whole blocks, so pages survive whole. A write smaller than a page survives
                    // or is lost as a whole.
                    for (at, piece) in (*offset..).step_by(PAGE).zip(data.chunks(PAGE)) {
                        if survives() {
                            pages.write(at, piece);
                        }
                    }
                }
                Event::Zero { offset, len } if survives() => pages.zero(*offset, *len),
                Event::Zero { .. } | Event::Sync => {}
            }
        }
        pages
    }
}

/// Mounts the medium after a power cut and checks the images against their guests' histories. With `serve` daemons
/// recover the images, too. Returns the violations.
fn check_after_cut(
    kind: FsKind,
    device: &Path,
    scratch: &Path,
    (histories, sectors): (&[History], [Tearing; 2]),
    cut: usize,
    serve: bool,
) -> Vec<String> {
    let mounted = match Mounted::try_mount(kind, device) {
        Ok(mounted) => mounted,
        Err(why) => return vec![format!("the file system does not mount: {why}")],
    };
    let mut wrong = Vec::new();
    for ((top, history), sectors) in TOPS.iter().zip(histories).zip(sectors) {
        let image = mounted.path().join(top);
        let mut note = |what: String| wrong.push(format!("{top}: {what}"));
        // If the new footer is missing, `check` reports this, and the daemon writes the footer.
        let short = kind == FsKind::Ext4 && lacks_new_footer(&image);
        if !short {
            footers_are_valid(&image).into_iter().for_each(&mut note);
        }
        // This machine was not restarted, so the sessions of its daemons are still valid. The option discards their
        // journals.
        let check = diffdisk([Path::new("check"), &image, Path::new("--chain"), Path::new("--discard-journal")]);
        // Exit code 4 is allowed because a crash may leave leaks.
        if !matches!((check.code, short), (Some(0 | 4), _) | (Some(3), true)) {
            note(format!("check: {}", check.stderr));
        }
        match read_disk(&image, &scratch.join("raw")) {
            Ok(disk) => history.check(&disk, cut, sectors).into_iter().for_each(&mut note),
            Err(why) => note(why),
        }
        if serve {
            let before = fs::read(scratch.join("raw")).unwrap_or_default();
            check_recovery(&image, &before, &scratch.join("raw")).into_iter().for_each(&mut note);
        }
    }
    mounted.unmount();
    wrong
}

/// Returns whether a growing file has its new length but not its new footer.
///
/// ext4 (fs/ext4/inode.c, `mpage_map_and_submit_extent`) updates the length on disk before it writes the page, and a
/// journal commit in between makes a length durable that was never synced. In this state the footer at the start is
/// valid, the old trailing footer is not wiped yet, no block has moved, and recovery writes the new trailing footer.
/// The contents are checked as at any other cut.
fn lacks_new_footer(image: &Path) -> bool {
    let Ok(bytes) = fs::read(image) else { return false };
    let (front, tail) = (&bytes[..SECTOR.min(bytes.len())], bytes.len().saturating_sub(SECTOR));
    let has_old_one = bytes[SECTOR..tail].chunks(SECTOR).any(|sector| sector == front);
    front.starts_with(b"conectix") && bytes[tail..].iter().all(|byte| *byte == 0) && has_old_one
}

/// Checks that both footers of an image are valid and equal (S4). Returns the violations.
fn footers_are_valid(image: &Path) -> Vec<String> {
    let ends = File::open(image).and_then(|file| {
        let (mut front, mut tail) = ([0; SECTOR], [0; SECTOR]);
        let len = file.metadata()?.len();
        file.read_exact_at(&mut front, 0)?;
        file.read_exact_at(&mut tail, len.saturating_sub(SECTOR as u64))?;
        Ok((front, tail))
    });
    let (front, tail) = match ends {
        Ok(ends) => ends,
        Err(e) => return vec![format!("cannot be read: {e}")],
    };
    let mut wrong = Vec::new();
    for (name, footer) in [("front", &front), ("trailing", &tail)] {
        let sum: u32 =
            footer.iter().enumerate().filter(|(at, _)| !(64..68).contains(at)).map(|(_, b)| u32::from(*b)).sum();
        if &footer[..8] != b"conectix" || footer[64..68] != (!sum).to_be_bytes() {
            wrong.push(format!("the {name} footer is not valid"));
        }
    }
    if front != tail {
        wrong.push("the footers differ".into());
    }
    wrong
}

fn read_disk(image: &Path, raw: &PathBuf) -> Result<Vec<u8>, String> {
    let _ = fs::remove_file(raw);
    let mut convert = Command::new(tool::DIFFDISK);
    let ended = tool::run(convert.arg("convert").arg(image).arg(raw).args(["--to", "raw"]), Duration::from_secs(60));
    if ended.code != Some(0) {
        return Err(format!("convert: {}", ended.stderr));
    }
    fs::read(raw).map_err(|e| e.to_string())
}

/// Checks that a daemon opens the image for writing, shows the same disk, takes a write, and closes the image cleanly.
/// Returns the violations.
fn check_recovery(image: &Path, before: &[u8], raw: &PathBuf) -> Vec<String> {
    // The runtime folder is new, since a power cut loses the live journals in the machine's memory.
    let runtime = RuntimeDir::new();
    let daemon = Daemon::start(image, &[runtime.option()]);
    let mut client = daemon.connect();
    let shown = client.read_all(1 << 20).expect("reads after recovery");
    let fresh = super::guest::tagged_run(u64::MAX >> 1, 20_000, 40);
    client.write(20_000 * SECTOR as u64, &fresh).expect("a write after recovery");
    client.flush().expect("a flush after recovery");
    drop(client);
    daemon.stop();
    let mut wrong = Vec::new();
    if shown != before {
        wrong.push("the daemon and the tool show different disks".to_owned());
    }
    let check = diffdisk([Path::new("check"), image]);
    // Space of blocks that were reserved but not committed may be leaked between other blocks.
    if !matches!(check.code, Some(0 | 4)) {
        wrong.push(format!("after recovery and a clean end `check` ends with {:?}: {}", check.code, check.stderr));
    }
    let mut want = before.to_vec();
    want[20_000 * SECTOR..20_040 * SECTOR].copy_from_slice(&fresh);
    match read_disk(image, raw) {
        Ok(disk) if disk == want => {}
        Ok(_) => wrong.push("after recovery and one write the disk has other contents".into()),
        Err(why) => wrong.push(why),
    }
    wrong
}

/// A replay of the whole log must equal the real contents of the medium.
#[test]
fn a_replay_of_everything_is_the_medium() {
    if !can_mount("a_replay_of_everything_is_the_medium") {
        return;
    }
    let disk = fuse::blank(FsKind::Ext4.size());
    let device = LoopDevice::attach(&disk.path());
    FsKind::Ext4.make(device.path(), &[]);
    let base = disk.start_log();
    let mounted = Mounted::mount(FsKind::Ext4, device.path());
    run_ok(Command::new("cp").arg(tool::DIFFDISK).arg(mounted.path()));
    mounted.unmount();
    drop(device);
    let log = disk.log();
    let last = log.iter().rposition(|e| matches!(e.event, Event::Sync)).expect("unmounting syncs");
    let mut medium = MediumReplay { synced: base.clone(), log: &log, at: 0 };
    let replayed = medium.cut(last + 1, &mut Rng::new(1));
    let (all, first) = (disk.contents(), base);
    let whole = usize::try_from(all.len()).expect("a small disk");
    assert!(first.read(0, whole) != all.read(0, whole), "nothing was written");
    assert_eq!(log.len(), last + 1, "events after the last sync");
    assert!(replayed.read(0, whole) == all.read(0, whole), "the replay has other contents");
}
