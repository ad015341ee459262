//! Power fails under a real file system: daemons work on images in ext4 or XFS on a loop device on a disk that notes
//! everything; afterwards the disk is put together as a power cut at many moments could have left it, mounted, and the
//! images are held against what their guests knew by then (crash-safety 5.2, R8: S1, S2, S4).
//!
//! At a cut, everything up to the last sync is there, and any part of what came after, page by page. A write counts as
//! covered by a sync that reached the disk after it.

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

/// Bytes of the guests' disks.
const DISK: u64 = 12 << 20;
/// Small blocks, so that the files grow several times.
const BLOCK: &str = "256K";
/// Requests of each guest.
const REQUESTS: usize = 500;
/// Tag of the root's contents.
const ROOT: u64 = 1 << 40;

/// The images under test: a child of a root, and a dynamic image without a parent.
const TOPS: [&str; 2] = ["child.vhd", "alone.vhd"];

// A small log wraps around, and more of the file system's own work is in the record.
#[test]
fn power_fails_under_ext4() {
    power_fails(
        "power_fails_under_ext4",
        FsKind::Ext4,
        &["-b", "1024", "-J", "size=4"],
        ["--direct", "--cache=writeback"],
    );
}

/// As file systems of usual size have them.
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

/// `options` go to mkfs. `modes`: an option of each image's daemon.
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
    assert!(flushes > 50 && syncs.len() > 50, "the load did not do what the test is about");

    let mut places: Vec<usize> = (0..cuts)
        .map(|n| match n % 2 {
            // Right before a sync the most is at stake.
            0 => syncs[usize::try_from(rng.below(syncs.len() as u64)).expect("an index")],
            _ => usize::try_from(rng.below(log.len() as u64 + 1)).expect("an index"),
        })
        .collect();
    places.sort_unstable();
    let mut medium = MediumReplay { synced: base, log: &log, at: 0 };
    // A tmpfs: nothing here has to survive.
    let folder = temp::in_memory();
    let sectors = modes.map(|mode| if mode == "--direct" { Tearing::Whole } else { Tearing::Torn });
    // In a file of its own each time: in one that a dying loop device still has, a mount may find that device again, and in
    // its cache a superblock of the cut before, which says that there is no journal to replay.
    let look = |pages: &Pages, name: String, cut: usize, serve: bool| {
        let device = folder.path().join(name);
        pages.save(&device).expect("room in memory");
        let wrong = check_after_cut(kind, &device, folder.path(), (&histories, sectors), cut, serve);
        fs::remove_file(&device).expect("it is there");
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
        // Where nothing is wrong the second time, it is the test that is to be doubted.
        let again = look(&pages, format!("device-{n}-again"), cut, serve).len();
        let (count, of, kept) = (wrong.len(), log.len(), kept.display());
        report += &format!("\ncut at {cut} of {of}, kept as {kept}: {count} violations, looked at again {again}:");
        wrong.iter().take(10).for_each(|line| report += &format!("\n  {line}"));
    }
    println!("{test}: {cuts} cuts, {violations} violations, {:.1} s", started.elapsed().as_secs_f64());
    // All of it in the failure itself: whoever sees only a log's end needs it most.
    assert_eq!(violations, 0, "{report}");
}

/// Works on the images. Returns the medium at the start, what happened to it, and what the guests know.
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
    // One MiB of data, one MiB of nothing.
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

/// Two daemons and two guests, each at random work at the same time.
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

/// What the medium holds, from cut to later cut.
struct MediumReplay<'a> {
    log: &'a [Entry],
    /// With all events before `at`, behind the last sync looked at.
    synced: Pages,
    at: usize,
}

impl MediumReplay<'_> {
    /// The medium as it may be when the events from `cut` on never happened, and since the last sync before it each page
    /// by itself reached the medium or not.
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
        // Little, half, or nearly all of it.
        let chance = rng.pick(&[1, 4, 7]);
        let mut survives = || rng.below(8) < chance;
        for entry in &self.log[self.at..cut] {
            match &entry.event {
                Event::Write { offset, data } => {
                    // File systems trust that a block is whole; a sector is, where nothing larger was written.
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

/// Mounts what the power cut left, and holds the images against their guests' knowledge. `serve`: daemons recover them,
/// too. Returns what is wrong.
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
        // Then the tool says so, and the daemon mends it: see below.
        let short = kind == FsKind::Ext4 && lacks_new_footer(&image);
        if !short {
            footers_are_valid(&image).into_iter().for_each(&mut note);
        }
        // This host was not restarted, so an open session still counts here: it is given up.
        let check = diffdisk([Path::new("check"), &image, Path::new("--chain"), Path::new("--discard-journal")]);
        // 4: leaks, which a crash may leave.
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

/// Whether a growing file got a new length, and nothing of its new footer.
///
/// ext4 (fs/ext4/inode.c, `mpage_map_and_submit_extent`) notes how far it has come as the length on disk before it writes that
/// page, and a journal commit in between makes it durable: a length that nobody has synced. The footer at the start is whole
/// then, the old trailing one is not wiped yet, all blocks are where they were, and recovery writes the one at the end;
/// contents are held against all promises as in any other cut.
fn lacks_new_footer(image: &Path) -> bool {
    let Ok(bytes) = fs::read(image) else { return false };
    let (front, tail) = (&bytes[..SECTOR.min(bytes.len())], bytes.len().saturating_sub(SECTOR));
    let has_old_one = bytes[SECTOR..tail].chunks(SECTOR).any(|sector| sector == front);
    front.starts_with(b"conectix") && bytes[tail..].iter().all(|byte| *byte == 0) && has_old_one
}

/// Both footers are there and are the same (S4).
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

/// A daemon opens it for writing, shows the same disk, takes a write, and closes it in good order.
fn check_recovery(image: &Path, before: &[u8], raw: &PathBuf) -> Vec<String> {
    // What lived in the host's memory is gone with it.
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
        wrong.push("the daemon shows another disk than the tool".to_owned());
    }
    let check = diffdisk([Path::new("check"), image]);
    // Places of blocks that never came to be are lost between others.
    if !matches!(check.code, Some(0 | 4)) {
        wrong.push(format!("after recovery and a clean end check says {:?}: {}", check.code, check.stderr));
    }
    let mut want = before.to_vec();
    want[20_000 * SECTOR..20_040 * SECTOR].copy_from_slice(&fresh);
    match read_disk(image, raw) {
        Ok(disk) if disk == want => {}
        Ok(_) => wrong.push("after recovery and one write the disk is another".into()),
        Err(why) => wrong.push(why),
    }
    wrong
}

/// The record and the replay agree with what the medium really held.
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
    assert!(first.read(0, whole) != all.read(0, whole), "something was written");
    assert_eq!(log.len(), last + 1, "nothing comes after the last sync");
    assert!(replayed.read(0, whole) == all.read(0, whole), "the replay is another disk");
}
