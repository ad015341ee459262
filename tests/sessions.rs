//! Sessions, tested with the real programs: the image of a killed daemon is opened by another user, with another
//! runtime folder, after a move or a restore, as a parent, by the tool, and with hostile folders and journals.
#![allow(clippy::host_endian_bytes, clippy::cast_possible_truncation, reason = "words of a journal, small numbers")]

mod common;

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::client::Client;
use common::daemon::Daemon;
use common::rng::Rng;
use common::temp::{RuntimeDir, scratch};
use common::tool::{DIFFDISK, DIFFDISKD, Finished, diffdisk, run};

const MIB: u64 = 1 << 20;

fn created(folder: &Path, name: &str, parent: Option<&Path>) -> PathBuf {
    let image = folder.join(name);
    let mut args = vec!["create".to_owned(), image.display().to_string()];
    match parent {
        Some(parent) => args.extend(["--parent".into(), parent.display().to_string()]),
        None => args.extend(["--size".into(), "64M".into()]),
    }
    diffdisk(args).ok();
    image
}

/// Starts a daemon, writes without a flush, and kills the daemon.
fn write_and_kill(image: &Path, runtime: &RuntimeDir, offset: u64, byte: u8) {
    let daemon = Daemon::start(image, &[runtime.option(), "--allow-writable-parent"]);
    daemon.connect().write(offset, &[byte; 4096]).expect("a write that is never flushed");
    daemon.kill();
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Runs a daemon that must fail to start. Returns its error message.
#[track_caller]
fn daemon_refused(image: &Path, extra: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let mut command = Command::new(DIFFDISKD);
    let ended = run(
        command.args(["--blk-file", text(image), "--socket-path", text(&socket)]).args(extra),
        Duration::from_secs(20),
    );
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    ended.stderr
}

#[track_caller]
fn assert_refused(finished: &Finished, words: &[&str]) {
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    for word in words {
        assert!(finished.stderr.contains(word), "no {word:?} in: {}", finished.stderr);
    }
}

fn read_byte(image: &Path, runtime: &RuntimeDir, offset: u64) -> u8 {
    let disk = diffdisk(["convert", text(image), "-", "--to", "raw", runtime.option()]).ok().stdout;
    disk[usize::try_from(offset).expect("a small disk")]
}

#[test]
fn another_user_gets_the_command_to_run() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let (folder, runtime, empty) = (scratch("session-user"), RuntimeDir::new(), RuntimeDir::new());
    let image = created(folder.path(), "a.vhd", None);
    write_and_kill(&image, &runtime, 5 * MIB, 0xA5);
    // The user `nobody` has no journal of the image in its runtime folder.
    let own = RuntimeDir::new();
    std::os::unix::fs::chown(own.path(), Some(65534), Some(65534)).expect("root may");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("ours");
    fs::set_permissions(&image, Permissions::from_mode(0o666)).expect("ours");
    let program = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir().expect("a folder");
    let copy = program.path().join("diffdisk");
    fs::copy(DIFFDISK, &copy).expect("a copy of the program");
    let visible = program.path().join("a.vhd");
    fs::hard_link(&image, &visible).or_else(|_| fs::copy(&image, &visible).map(|_| ())).expect("a copy");
    fs::set_permissions(&visible, Permissions::from_mode(0o666)).expect("ours");
    let as_nobody = |args: &[&str]| {
        use std::os::unix::process::CommandExt;
        run(Command::new(&copy).args(args).uid(65534).gid(65534), Duration::from_secs(20))
    };
    let folder_of_root = runtime.path().display().to_string();
    let words = ["did not end cleanly", "user root (0)", "sudo -u root", &folder_of_root, "settle"];
    for verb in [&["check"][..], &["compact"], &["settle"], &["map"]] {
        let args: Vec<&str> = verb.iter().copied().chain([text(&visible)]).collect();
        assert_refused(&as_nobody(&args), &words);
    }
    assert_refused(&as_nobody(&["convert", text(&visible), "-", "--to", "raw", own.option()]), &words);
    // `nobody` names root's folder, which belongs to another user.
    assert_refused(&as_nobody(&["check", text(&visible), runtime.option()]), &["runtime folder"]);
    // Root uses another runtime folder.
    assert_refused(
        &diffdisk(["convert", text(&image), "-", "--to", "raw", empty.option()]),
        &["did not end cleanly", &folder_of_root],
    );
    diffdisk(["settle", text(&image), runtime.option()]).ok();
    assert_eq!((read_byte(&image, &empty, 5 * MIB), runtime.journals().len()), (0xA5, 0));
}

#[test]
fn two_folders_never_undo_each_other() {
    let (folder, first, second) = (scratch("session-folders"), RuntimeDir::new(), RuntimeDir::new());
    let image = created(folder.path(), "a.vhd", None);
    write_and_kill(&image, &first, 5 * MIB, 1);
    let error_text = daemon_refused(&image, &[second.option()]);
    assert!(
        error_text.contains("did not end cleanly") && error_text.contains(&first.path().display().to_string()),
        "{error_text}"
    );
    let info = diffdisk(["info", text(&image), "--json"]).ok().json();
    assert_eq!(info["session"]["open"], true, "{info}");
    assert_eq!(info["session"]["folder"], first.path().display().to_string());
    // The journal is discarded explicitly: the acknowledged writes are lost and must not reappear.
    let daemon = Daemon::start(&image, &[second.option(), "--discard-journal"]);
    daemon.connect().write(5 * MIB, &[2; 4096]).expect("a write");
    daemon.stop();
    let daemon = Daemon::start(&image, &[first.option()]);
    assert_eq!(daemon.connect().read(5 * MIB, 4096).expect("a read"), [2; 4096]);
    daemon.stop();
    assert!(diffdisk(["info", text(&image), "--json"]).ok().json()["session"].is_null());
    assert_eq!(diffdisk(["check", text(&image)]).code, Some(0));
}

#[test]
fn an_older_copy_put_back_in_place_is_refused() {
    let (folder, runtime) = (scratch("session-restore"), RuntimeDir::new());
    let root = created(folder.path(), "root.vhd", None);
    let image = created(folder.path(), "a.vhd", Some(&root));
    let daemon = Daemon::start(&image, &[runtime.option()]);
    let mut guest = daemon.connect();
    guest.write(5 * MIB, &[1; 4096]).expect("a write");
    guest.flush().expect("a flush");
    let backup = fs::read(&image).expect("a backup of the running image");
    std::thread::sleep(Duration::from_millis(1500));
    guest.write(5 * MIB + 8192, &[2; 4096]).expect("a write");
    daemon.kill();
    let last = fs::read(&image).expect("the killed image");
    let restore = |bytes: &[u8]| {
        let file = OpenOptions::new().write(true).open(&image).expect("the same file");
        file.set_len(0).and_then(|()| file.write_all_at(bytes, 0)).expect("it can be restored");
    };
    restore(&backup);
    let error_text = daemon_refused(&image, &[runtime.option()]);
    assert!(error_text.contains("does not fit") && error_text.contains("older copy"), "{error_text}");
    assert_refused(&diffdisk(["settle", text(&image), runtime.option()]), &["does not fit"]);
    restore(&last);
    diffdisk(["settle", text(&image), runtime.option()]).ok();
    assert_eq!(read_byte(&image, &runtime, 5 * MIB + 8192), 2);
}

#[test]
fn a_killed_image_is_recovered_after_a_move() {
    let (folder, runtime) = (scratch("session-move"), RuntimeDir::new());
    let image = created(folder.path(), "a.vhd", None);
    write_and_kill(&image, &runtime, 5 * MIB, 7);
    let moved = folder.path().join("moved.vhd");
    fs::copy(&image, &moved).expect("a copy on a larger disk");
    let daemon = Daemon::start(&moved, &[runtime.option()]);
    assert_eq!(daemon.connect().read(5 * MIB, 4096).expect("a read"), [7; 4096]);
    // The journal was replayed into the copy and belongs to the copy now.
    assert_refused(&diffdisk(["check", text(&image), runtime.option()]), &["did not end cleanly"]);
    daemon.stop();
    let error_text = daemon_refused(&image, &[runtime.option()]);
    assert!(error_text.contains("replayed into a copy of this image"), "{error_text}");
    assert_refused(&diffdisk(["check", text(&image), runtime.option()]), &["did not end cleanly"]);
    diffdisk(["check", text(&image), runtime.option(), "--discard-journal"]);
    assert_ne!(diffdisk(["check", text(&image), runtime.option()]).code, Some(1), "given up");
}

#[test]
fn the_journal_of_a_killed_parent_is_respected() {
    let (folder, runtime) = (scratch("session-parent"), RuntimeDir::new());
    let parent = created(folder.path(), "parent.vhd", None);
    let child = created(folder.path(), "child.vhd", Some(&parent));
    write_and_kill(&parent, &runtime, 5 * MIB, 9);
    let (before, other) = (fs::read(&parent).expect("the parent"), folder.path().join("other.vhd"));
    assert_refused(&diffdisk(["create", text(&other), "--parent", text(&parent)]), &["did not end cleanly"]);
    for args in [
        &["convert", text(&child), "-", "--to", "raw"][..],
        &["check", text(&child), "--chain"],
        &["check", text(&child), "--chain", "--repair"],
        &["map", text(&child)],
        &["merge", text(&child)],
        &["flatten", text(&child)],
    ] {
        assert_refused(
            &diffdisk(args.iter().copied().chain([runtime.option()])),
            &["did not end cleanly", "parent.vhd"],
        );
    }
    assert!(fs::read(&parent).expect("the parent") == before, "nothing was cut out of it");
    let daemon = Daemon::start(&child, &[runtime.option()]);
    assert_eq!(daemon.connect().read(5 * MIB, 4096).expect("a read"), [9; 4096]);
    daemon.stop();
    diffdisk(["check", text(&child), "--chain", runtime.option()]).ok();
    assert_eq!((read_byte(&child, &runtime, 5 * MIB), runtime.journals().len()), (9, 0));
}

#[test]
fn hostile_folders_and_journals_are_refused() {
    let (folder, runtime) = (scratch("session-hostile"), RuntimeDir::new());
    let image = created(folder.path(), "a.vhd", None);
    write_and_kill(&image, &runtime, 5 * MIB, 3);
    let open = Permissions::from_mode(0o777);
    fs::set_permissions(runtime.path(), open).expect("ours");
    let error_text = daemon_refused(&image, &[runtime.option()]);
    assert!(error_text.contains("open to other users") && error_text.contains("777"), "{error_text}");
    fs::set_permissions(runtime.path(), Permissions::from_mode(0o700)).expect("ours");
    let journal = runtime.journals().pop().expect("the journal");
    let whole = fs::read(&journal).expect("the journal");
    fs::hard_link(&journal, folder.path().join("link"))
        .or_else(|_| fs::hard_link(&journal, runtime.path().join("x")))
        .expect("a link");
    let error_text = daemon_refused(&image, &[runtime.option()]);
    assert!(error_text.contains("2 names"), "{error_text}");
    for name in [folder.path().join("link"), runtime.path().join("x")] {
        let _ = fs::remove_file(name);
    }
    fs::set_permissions(&journal, Permissions::from_mode(0o644)).expect("ours");
    assert!(daemon_refused(&image, &[runtime.option()]).contains("mode is 644"));
    fs::set_permissions(&journal, Permissions::from_mode(0o600)).expect("ours");
    // Invalid words in the journal must be refused without a panic.
    let slot = 512 * 8;
    let file = OpenOptions::new().write(true).open(&journal).expect("ours");
    let used = (0..4096).find(|n| whole[slot + n * 68 * 8..][..8] != [0; 8]).expect("a slot in use");
    for (at, word) in [(0, u64::MAX), (0, 1 << 62), (1, u64::MAX), (2, u64::MAX), (3, 1 << 61)] {
        let at = (slot + used * 68 * 8 + at * 8) as u64;
        file.write_all_at(&word.to_ne_bytes(), at).expect("a word");
        let error_text = daemon_refused(&image, &[runtime.option()]);
        assert!(error_text.contains("damaged") && !error_text.contains("panic"), "{error_text}");
        file.write_all_at(&whole, 0).expect("as it was");
    }
    file.set_len(4096).expect("cut");
    assert!(daemon_refused(&image, &[runtime.option()]).contains("4096 bytes"));
    file.write_all_at(&whole, 0).expect("as it was");
    diffdisk(["settle", text(&image), runtime.option()]).ok();
    assert_eq!(read_byte(&image, &runtime, 5 * MIB), 3);
}

#[test]
fn a_journal_that_is_cut_or_removed_in_use_loses_no_data() {
    for cut in [true, false] {
        let (folder, runtime) = (scratch("session-cut"), RuntimeDir::new());
        let image = created(folder.path(), "a.vhd", None);
        let daemon = Daemon::start(&image, &[runtime.option()]);
        let mut guest = daemon.connect();
        guest.write(MIB, &[1; 4096]).expect("a write");
        let journal = runtime.journals().pop().expect("the journal");
        if cut {
            OpenOptions::new().write(true).open(&journal).and_then(|f| f.set_len(0)).expect("ours");
        } else {
            fs::remove_file(&journal).expect("ours");
        }
        for n in 1..20 {
            guest.write(n * 3 * MIB, &[2; 4096]).expect("a write");
        }
        assert_eq!(guest.read(57 * MIB, 4096).expect("a read"), [2; 4096]);
        assert_eq!(daemon.log().contains("its file was cut"), cut, "{}", daemon.log());
        drop(guest);
        daemon.stop();
        diffdisk(["check", text(&image), runtime.option()]).ok();
        assert_eq!((read_byte(&image, &runtime, MIB), read_byte(&image, &runtime, 57 * MIB)), (1, 2));
        assert_eq!(runtime.journals().len(), 0);
    }
}

#[test]
fn a_guest_that_only_reads_does_not_change_the_image() {
    let (folder, runtime) = (scratch("session-reader"), RuntimeDir::new());
    let root = created(folder.path(), "root.vhd", None);
    let image = created(folder.path(), "a.vhd", Some(&root));
    // The first open recovers the new image, which was never closed: the space after the last block is zeroed and cut
    // off.
    Daemon::start(&image, &[runtime.option()]).stop();
    let before = fs::read(&image).expect("the image");
    let daemon = Daemon::start(&image, &[runtime.option()]);
    let mut guest = daemon.connect();
    guest.read(5 * MIB, 4096).expect("a read");
    guest.flush().expect("a flush");
    assert!(runtime.journals().is_empty(), "a journal");
    assert!(fs::read(&image).expect("the image") == before, "the image has changed");
    daemon.kill();
    diffdisk(["check", text(&image), "--chain", runtime.option()]).ok();
}

/// Kills a daemon repeatedly. After a kill, an older copy of the image or a daemon with another runtime folder is tried
/// in some rounds and must be refused, and the image may be moved or settled. No read of the next daemon returns a
/// wrong byte, and no write is lost. DIFFDISK_SESSION_ROUNDS sets the number of rounds (12 by default).
#[test]
fn random_successors_of_killed_daemons_lose_nothing_silently() {
    let rounds: u64 = std::env::var("DIFFDISK_SESSION_ROUNDS").map_or(12, |n| n.parse().expect("a number"));
    let mut rng = Rng::from_env("successors");
    let (folder, runtime, other) = (scratch("session-loop"), RuntimeDir::new(), RuntimeDir::new());
    let root = created(folder.path(), "root.vhd", None);
    let mut image = created(folder.path(), "a.vhd", Some(&root));
    let mut known = vec![0u8; 64 * 256];
    let (mut refusals, mut taken) = (0, 0);
    for round in 0..rounds {
        let daemon = Daemon::start(&image, &[runtime.option()]);
        let mut guest = daemon.connect();
        for (n, byte) in known.iter().enumerate().filter(|_| rng.below(16) == 0) {
            let found = guest.read(n as u64 * 4096, 4096).expect("a read");
            assert!(found == [*byte; 4096], "round {round}: 4 KiB at {n} are {} instead of {byte}", found[0]);
        }
        let mut write = |guest: &mut Client, n: u64, byte: u8| {
            guest.write(n * 4096, &[byte; 4096]).expect("a write");
            known[usize::try_from(n).expect("small")] = byte;
        };
        write(&mut guest, rng.below(16), 1 + (rng.below(255) as u8));
        // In a third of the rounds the image is copied during the session. More writes follow, over a second later.
        let older = (rng.below(3) == 0).then(|| fs::read(&image).expect("a copy of the running image"));
        if older.is_some() {
            std::thread::sleep(Duration::from_millis(1100));
        }
        write(&mut guest, 16 * 1024 - 1 - round, 1 + (rng.below(255) as u8));
        for _ in 0..1 + rng.below(60) {
            let (n, byte) = (rng.below(8 * 1024), 1 + (rng.below(255) as u8));
            write(&mut guest, n, byte);
            if rng.below(10) == 0 {
                guest.flush().expect("a flush");
            }
        }
        drop(guest);
        daemon.kill();
        let last = fs::read(&image).expect("the killed image");
        if let Some(older) = older {
            let file = OpenOptions::new().write(true).open(&image).expect("the same file");
            file.set_len(0).and_then(|()| file.write_all_at(&older, 0)).expect("restored");
            daemon_refused(&image, &[runtime.option()]);
            file.set_len(0).and_then(|()| file.write_all_at(&last, 0)).expect("as it was");
            refusals += 1;
        }
        if rng.below(2) == 0 {
            daemon_refused(&image, &[other.option()]);
            assert_refused(&diffdisk(["map", text(&image), other.option()]), &["did not end cleanly"]);
            refusals += 1;
        }
        match rng.below(3) {
            0 => {
                let moved = folder.path().join(format!("moved{round}.vhd"));
                fs::copy(&image, &moved).expect("a copy");
                fs::remove_file(&image).expect("a move");
                image = moved;
            }
            1 => {
                diffdisk(["settle", text(&image), runtime.option()]).ok();
            }
            _ => {}
        }
        taken += 1;
    }
    diffdisk(["settle", text(&image), runtime.option()]).ok();
    let disk = diffdisk(["convert", text(&image), "-", "--to", "raw"]).ok().stdout;
    assert!(known.iter().zip(disk.chunks(4096)).all(|(byte, found)| found.iter().all(|b| b == byte)));
    println!("{taken} kills, {refusals} successors refused");
}

/// Root runs the tool on the image of a killed daemon of another user, as with `sudo diffdisk`.
#[test]
fn root_gets_the_name_of_the_killed_daemons_user() {
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let program = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir().expect("a folder");
    let [daemon, tool] = [(DIFFDISKD, "diffdiskd"), (DIFFDISK, "diffdisk")].map(|(from, name)| {
        let copy = program.path().join(name);
        fs::copy(from, &copy).expect("a copy of the program");
        copy
    });
    // The images are outside the project's folder, which the other user may not enter.
    let (folder, runtime) = (tempfile::tempdir().expect("a folder"), RuntimeDir::new());
    let root = created(folder.path(), "root.vhd", None);
    let image = created(folder.path(), "a.vhd", Some(&root));
    for path in [folder.path(), &root, &image, runtime.path()] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("root may");
    }
    let as_nobody = |program: &Path| {
        let mut command = Command::new(program);
        command.uid(65534).gid(65534);
        command
    };
    let socket = folder.path().join("s");
    let mut served = as_nobody(&daemon)
        .args(["--blk-file", text(&image), "--socket-path", text(&socket), runtime.option(), "--log-level=error"])
        .spawn()
        .expect("it starts");
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut guest = loop {
        match Client::connect(&socket) {
            Ok(guest) => break guest,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    guest.write(5 * MIB, &[6; 4096]).expect("a write that is never flushed");
    drop(guest);
    served.kill().and_then(|()| served.wait()).expect("it is killed");
    for args in [&["convert", text(&image), "-", "--to", "raw"][..], &["merge", text(&image)]] {
        assert_refused(&diffdisk(args), &["did not end cleanly", "sudo -u ", "settle"]);
    }
    run(as_nobody(&tool).args(["settle", text(&image), runtime.option()]), Duration::from_secs(20)).ok();
    assert_eq!(read_byte(&image, &RuntimeDir::new(), 5 * MIB), 6);
}

/// A backup of a closed image is valid. The live journal of a later session is not replayed into the backup.
#[test]
fn a_closed_backup_put_back_in_place_keeps_its_contents() {
    let (folder, runtime) = (scratch("session-backup"), RuntimeDir::new());
    let root = created(folder.path(), "root.vhd", None);
    let image = created(folder.path(), "a.vhd", Some(&root));
    write_and_kill(&image, &runtime, 5 * MIB, 1);
    diffdisk(["settle", text(&image), runtime.option()]).ok();
    let backup = fs::read(&image).expect("the closed image");
    write_and_kill(&image, &runtime, 5 * MIB + 4096, 2);
    let file = OpenOptions::new().write(true).open(&image).expect("the same file");
    file.set_len(backup.len() as u64).and_then(|()| file.write_all_at(&backup, 0)).expect("it can be restored");
    assert_eq!((runtime.journals().len(), read_byte(&image, &runtime, 5 * MIB)), (1, 1));
    let seen = diffdisk(["convert", text(&image), "-", "--to", "raw", runtime.option()]).ok().stdout;
    let daemon = Daemon::start(&image, &[runtime.option()]);
    let mut guest = daemon.connect();
    assert!(guest.read(0, seen.len()).expect("a read") == seen, "the daemon shows another disk than the tool");
    assert!(daemon.log().contains("holds what was acknowledged"), "the journal that stays is named: {}", daemon.log());
    drop(guest);
    daemon.stop();
    diffdisk(["check", text(&image), "--chain", runtime.option()]).ok();
}

/// Of an image and its copy, the one opened first replays the journal. The other one is refused.
#[test]
fn only_one_of_an_image_and_its_copy_replays_the_journal() {
    for copy_first in [true, false] {
        let (folder, runtime) = (scratch("session-copy"), RuntimeDir::new());
        let image = created(folder.path(), "a.vhd", None);
        write_and_kill(&image, &runtime, 5 * MIB, 8);
        let copy = folder.path().join("copy.vhd");
        fs::copy(&image, &copy).expect("a copy");
        let (first, second) = if copy_first { (&copy, &image) } else { (&image, &copy) };
        diffdisk(["settle", text(first), runtime.option()]).ok();
        assert_eq!(read_byte(first, &runtime, 5 * MIB), 8);
        assert_refused(&diffdisk(["settle", text(second), runtime.option()]), &["did not end cleanly"]);
        assert!(daemon_refused(second, &[runtime.option()]).contains("did not end cleanly"));
    }
}
