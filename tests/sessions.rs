//! Sessions with the real programs: a daemon is killed with writes that it acknowledged and did not flush, and the next one to
//! come is another user, another folder, a tool, a copy, an older copy, or the owner of a child. Each either has these writes or
//! is refused; none opens the image without them. DIFFDISK_SESSION_ROUNDS says how many random rounds (12).

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::chain::Chain;
use common::daemon::Daemon;
use common::rng::Rng;
use common::tool::{DIFFDISK, DIFFDISKD, Finished, diffdisk, run};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Bytes of a disk.
const SIZE: u64 = 8 * MIB;
/// The same, in memory.
const LEN: usize = 8 << 20;
/// Bytes of a write.
const PAGE: usize = 4096;
const PAGES: u64 = SIZE / PAGE as u64;
/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// A child over a root, and a runtime folder.
struct Scene {
    chain: Chain,
    runtime: TempDir,
}

impl Scene {
    fn new() -> Scene {
        let mut chain = Chain::with_root(SIZE / MIB, 15);
        chain.push_child("child.vhd");
        Scene { chain, runtime: folder() }
    }

    fn image(&self) -> &Path {
        self.chain.top()
    }

    /// A daemon acknowledges these pages, flushes the first `flushed` of them, and is killed.
    fn killed(&self, pages: &[(u64, u8)], flushed: usize) {
        let daemon = Daemon::start(self.image(), &[&option(&self.runtime)]);
        let mut guest = daemon.connect();
        for (number, (page, byte)) in pages.iter().enumerate() {
            guest.write(page * PAGE as u64, &[*byte; PAGE]).expect("a write");
            if number + 1 == flushed {
                guest.flush().expect("a flush");
            }
        }
        drop(guest);
        daemon.kill();
    }
}

fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a folder in memory")
}

fn option(runtime: &TempDir) -> String {
    format!("--runtime-dir={}", runtime.path().display())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// What a daemon that cannot serve says.
fn refused_daemon(image: &Path, options: &[&str]) -> Finished {
    let socket = folder();
    let mut command = Command::new(DIFFDISKD);
    command.arg("--blk-file").arg(image).arg("--socket-path").arg(socket.path().join("s")).args(options);
    let ended = run(&mut command, Duration::from_secs(40));
    assert!(!ended.killed, "it is served: {}", ended.stderr);
    ended
}

#[track_caller]
fn assert_refused(ended: &Finished) {
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("did not end cleanly"), "{}", ended.stderr);
    assert!(ended.stdout.is_empty(), "nothing is shown");
}

/// The bytes of a disk, by `convert`.
fn disk(image: &Path, runtime: &str) -> Vec<u8> {
    diffdisk(["convert", text(image), "-", "--to", "raw", runtime]).ok().stdout
}

fn has(disk: &[u8], pages: &[(u64, u8)]) {
    for (page, byte) in pages {
        let at = usize::try_from(page * PAGE as u64).expect("a small disk");
        assert!(disk[at..at + PAGE].iter().all(|b| b == byte), "page {page} is not {byte}");
    }
}

const WRITES: [(u64, u8); 4] = [(3, 1), (700, 2), (1300, 3), (5, 4)];

#[test]
fn another_folder_is_refused_and_its_own_takes_it_in() {
    let scene = Scene::new();
    scene.killed(&WRITES, 2);
    let other = folder();
    assert_refused(&refused_daemon(scene.image(), &[&option(&other)]));
    assert_refused(&diffdisk(["convert", text(scene.image()), "-", "--to", "raw", &option(&other)]));
    assert_eq!(fs::read_dir(other.path()).expect("the folder").count(), 0, "nothing is left there");
    diffdisk(["settle", text(scene.image()), &option(&scene.runtime)]).ok();
    // Closed now: any folder will do.
    has(&disk(scene.image(), &option(&other)), &WRITES);
    scene.chain.assert_sound();
}

#[test]
fn another_user_is_refused_with_the_command_that_helps() {
    if !rustix::process::geteuid().is_root() {
        println!("needs root");
        return;
    }
    let scene = Scene::new();
    let folder = scene.image().parent().expect("a folder");
    for path in [folder, scene.image(), &folder.join("root.vhd"), scene.runtime.path()] {
        chown(path, Some(NOBODY), Some(NOBODY)).expect("it is given away");
    }
    // The programs, where that user can reach them.
    let programs = tempfile::tempdir().expect("a folder");
    fs::set_permissions(programs.path(), Permissions::from_mode(0o755)).expect("a mode");
    let daemon = programs.path().join("diffdiskd");
    let tool = programs.path().join("diffdisk");
    fs::copy(DIFFDISKD, &daemon).expect("a copy");
    fs::copy(DIFFDISK, &tool).expect("a copy");
    let as_nobody = |program: &Path, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program).args(arguments);
        command
    };
    let socket = folder.join("s");
    let runtime = option(&scene.runtime);
    let mut killed = as_nobody(
        &daemon,
        &["--blk-file", text(scene.image()), "--socket-path", text(&socket), &runtime, "--log-level=error"],
    )
    .spawn()
    .expect("it starts");
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let mut guest = loop {
        match common::client::Client::connect(&socket) {
            Ok(guest) => break guest,
            Err(e) => assert!(std::time::Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    for (page, byte) in WRITES {
        guest.write(page * PAGE as u64, &[byte; PAGE]).expect("a write");
    }
    drop(guest);
    killed.kill().expect("it is killed");
    killed.wait().expect("it ends");

    // Root, with its own folders: `sudo diffdisk`.
    for verb in [&["convert", text(scene.image()), "-", "--to", "raw"][..], &["merge", text(scene.image())]] {
        let ended = diffdisk(verb);
        assert_refused(&ended);
        assert!(ended.stderr.contains("sudo -u ") && ended.stderr.contains("settle"), "{}", ended.stderr);
    }
    // As that user, in another folder, as without XDG_RUNTIME_DIR; then in its own.
    let elsewhere = run(&mut as_nobody(&tool, &["check", text(scene.image())]), Duration::from_secs(20));
    assert_eq!(elsewhere.code, Some(1), "{}", elsewhere.stderr);
    run(&mut as_nobody(&tool, &["settle", text(scene.image()), &runtime]), Duration::from_secs(20)).ok();
    has(&disk(scene.image(), &option(&self::folder())), &WRITES);
}

#[test]
fn a_backup_put_back_in_place_does_not_fit_the_journal() {
    let scene = Scene::new();
    scene.killed(&WRITES[..1], 1);
    diffdisk(["settle", text(scene.image()), &option(&scene.runtime)]).ok();
    let backup = fs::read(scene.image()).expect("the image");
    scene.killed(&WRITES[1..], 2);
    // The same inode, UUID and place of the table.
    let file = fs::File::options().write(true).open(scene.image()).expect("the image");
    file.set_len(backup.len() as u64).and_then(|()| file.write_all_at(&backup, 0)).expect("it is put back");
    // The backup was closed: it is what it is, and nothing of the later journal gets in.
    let journal = || fs::read_dir(scene.runtime.path()).expect("the folder").count();
    assert_eq!(journal(), 1);
    let seen = disk(scene.image(), &option(&scene.runtime));
    has(&seen, &WRITES[..1]);
    let daemon = Daemon::start(scene.image(), &[&option(&scene.runtime)]);
    let mut guest = daemon.connect();
    assert!(guest.read(0, LEN).expect("reads") == seen, "the daemon shows another disk than the tool");
    assert!(daemon.log().contains("holds what was acknowledged"), "the journal that stays is named: {}", daemon.log());
    drop(guest);
    daemon.stop();
    scene.chain.assert_sound();
}

#[test]
fn an_older_copy_of_the_same_session_is_refused() {
    let scene = Scene::new();
    let daemon = Daemon::start(scene.image(), &[&option(&scene.runtime)]);
    let mut guest = daemon.connect();
    guest.write(WRITES[0].0 * PAGE as u64, &[WRITES[0].1; PAGE]).expect("a write");
    guest.flush().expect("a flush");
    let older = fs::read(scene.image()).expect("the image");
    std::thread::sleep(Duration::from_millis(1100));
    for (page, byte) in &WRITES[1..] {
        guest.write(page * PAGE as u64, &[*byte; PAGE]).expect("a write");
        guest.flush().expect("a flush");
    }
    drop(guest);
    daemon.kill();
    let newer = fs::read(scene.image()).expect("the image");
    let put = |bytes: &[u8]| {
        let file = fs::File::options().write(true).open(scene.image()).expect("the image");
        file.set_len(bytes.len() as u64).and_then(|()| file.write_all_at(bytes, 0)).expect("it is put back");
    };
    put(&older);
    let refused = refused_daemon(scene.image(), &[&option(&scene.runtime)]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    // The true one is as good as before.
    put(&newer);
    diffdisk(["settle", text(scene.image()), &option(&scene.runtime)]).ok();
    has(&disk(scene.image(), &option(&scene.runtime)), &WRITES);
}

#[test]
fn a_copy_elsewhere_or_its_original_has_it_and_the_other_is_refused() {
    for original_first in [true, false] {
        let scene = Scene::new();
        scene.killed(&WRITES, 1);
        let copy = scene.image().with_file_name("copy.vhd");
        fs::copy(scene.image(), &copy).expect("a copy");
        let runtime = option(&scene.runtime);
        // A folder that does not have the journal: a copy on another host's disk, so to speak.
        assert_refused(&refused_daemon(&copy, &[&option(&folder())]));
        let (first, second) = if original_first { (scene.image(), &*copy) } else { (&*copy, scene.image()) };
        diffdisk(["settle", text(first), &runtime]).ok();
        has(&disk(first, &runtime), &WRITES);
        assert_refused(&diffdisk(["settle", text(second), &runtime]));
        assert_refused(&refused_daemon(second, &[&runtime]));
    }
}

#[test]
fn the_child_of_a_killed_parent_does_not_hide_what_was_acknowledged() {
    let mut scene = Scene::new();
    let parent = scene.image().to_owned();
    scene.chain.push_child("grandchild.vhd");
    let child = scene.image().to_owned();
    let runtime = option(&scene.runtime);
    let daemon = Daemon::start(&parent, &[&runtime, "--allow-writable-parent"]);
    let mut guest = daemon.connect();
    for (page, byte) in WRITES {
        guest.write(page * PAGE as u64, &[byte; PAGE]).expect("a write");
    }
    drop(guest);
    daemon.kill();
    let before = fs::read(&parent).expect("the parent");
    for verb in [
        &["convert", text(&child), "-", "--to", "raw"][..],
        &["check", text(&child), "--chain"],
        &["check", text(&child), "--chain", "--repair"],
    ] {
        let ended = diffdisk(verb.iter().copied().chain([&*runtime]));
        assert!(ended.code == Some(1) || ended.code == Some(3), "{verb:?}: {:?}, {}", ended.code, ended.stderr);
        assert!(ended.stderr.contains("did not end cleanly"), "{verb:?}: {}", ended.stderr);
        assert!(fs::read(&parent).expect("the parent") == before, "{verb:?} has changed the parent");
    }
    // A daemon that writes to the child takes the parent's journal in.
    let daemon = Daemon::start(&child, &[&runtime, "--allow-writable-parent"]);
    let mut guest = daemon.connect();
    has(&guest.read(0, LEN).expect("reads"), &WRITES);
    drop(guest);
    daemon.stop();
    has(&disk(&parent, &runtime), &WRITES);
}

/// Where the image is, and what its disk must hold.
struct Known {
    image: PathBuf,
    pages: Vec<Option<u8>>,
}

impl Known {
    fn check(&self, disk: &[u8]) {
        for (page, byte) in self.pages.iter().enumerate().filter_map(|(page, byte)| byte.map(|b| (page, b))) {
            let found = &disk[page * PAGE..(page + 1) * PAGE];
            assert!(found.iter().all(|b| *b == byte), "page {page} is not {byte} but {:?}", &found[..8]);
        }
    }
}

#[test]
fn kills_moves_copies_and_strangers_in_any_order() {
    let mut rng = Rng::from_env("sessions");
    let rounds = std::env::var("DIFFDISK_SESSION_ROUNDS").map_or(12, |n| n.parse().expect("a number"));
    let scene = Scene::new();
    let runtime = option(&scene.runtime);
    let mut known = Known { image: scene.image().to_owned(), pages: vec![None; usize::try_from(PAGES).expect("few")] };
    for round in 0..rounds {
        let daemon = Daemon::start(&known.image, &[&runtime]);
        let mut guest = daemon.connect();
        known.check(&guest.read(0, LEN).expect("reads"));
        let older = fs::read(&known.image).expect("the image");
        for number in 0..rng.below(40) + 1 {
            let (page, byte) = (rng.below(PAGES), u8::try_from(rng.below(255)).expect("a byte") + 1);
            guest.write(page * PAGE as u64, &[byte; PAGE]).expect("a write");
            known.pages[usize::try_from(page).expect("few")] = Some(byte);
            if rng.below(8) == 0 || number == 0 {
                guest.flush().expect("a flush");
            }
        }
        drop(guest);
        daemon.kill();
        let event = rng.below(5);
        println!("round {round}: event {event}");
        match event {
            // Strangers come and go.
            0 => assert_refused(&refused_daemon(&known.image, &[&option(&folder())])),
            1 => assert_refused(&diffdisk(["check", text(&known.image), "--repair", &option(&folder())])),
            2 => {
                let moved = known.image.with_file_name(format!("moved{round}.vhd"));
                fs::rename(&known.image, &moved).expect("it is moved");
                known.image = moved;
            }
            // An older copy is tried, from before this daemon's writes or amid them, and the true one comes back.
            3 => {
                let newer = fs::read(&known.image).expect("the image");
                fs::write(&known.image, &older).expect("it is put back");
                let ended = diffdisk(["convert", text(&known.image), "-", "--to", "raw", &runtime]);
                assert!(ended.code == Some(1) || ended.code == Some(0), "{}", ended.stderr);
                fs::write(&known.image, &newer).expect("the true one comes back");
            }
            _ => {}
        }
    }
    diffdisk(["settle", text(&known.image), &runtime]).ok();
    known.check(&disk(&known.image, &runtime));
    diffdisk(["check", text(&known.image), "--chain", &runtime]).ok();
}
