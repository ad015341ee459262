//! The control socket in the file system: mode, a second daemon, the remains of a killed daemon, the end.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::common::daemon::Daemon;
use super::common::tool::{DIFFDISKD, Finished, run};
use super::{Served, create_chain, diffdisk};

/// Runs a daemon that is expected to fail, on a disk of its own in `folder`.
fn fail_to_start(folder: &std::path::Path, options: &[&str]) -> Finished {
    let image = create_chain(folder);
    let mut command = Command::new(DIFFDISKD);
    command.arg("--blk-file").arg(&image).arg(format!("--runtime-dir={}", folder.display())).args(options);
    let failed = run(command.current_dir(folder), Duration::from_secs(20));
    assert!(!failed.killed, "it ends by itself");
    failed
}

#[test]
fn only_the_owner_may_connect_and_a_second_daemon_is_refused() {
    let served = Served::start(&[]);
    let found = fs::symlink_metadata(&served.control).expect("the socket");
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let other = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let control = format!("--control={}", served.control.display());
    let refused = fail_to_start(other.path(), &["--socket-path=s", &control]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("another daemon serves this socket"), "{}", refused.stderr);
    assert!(!other.path().join("s").exists(), "a failed start leaves no socket");
    assert!(!refused.stderr.contains("disk child.vhd"), "the disk was opened: {}", refused.stderr);
    diffdisk(["check", other.path().join(super::DISK).to_str().expect("a plain path")]).ok();
    served.connect().call("version", &json!({}));
    let folder = served.stop();
    let left: Vec<_> =
        fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".vhd")), "{left:?}");
}

#[test]
fn a_killed_daemon_is_replaced() {
    let served = Served::start(&[]);
    let (control, option) = (served.control.clone(), format!("--control={}", served.control.display()));
    served.daemon.kill();
    assert!(control.exists());
    let image = served.folder.path().join(super::DISK);
    let daemon = Daemon::start(&image, &[&option, served.runtime.option()]);
    daemon.wait_for_log("control socket on", 1);
    super::Rpc::connect(&control).call("version", &json!({}));
    daemon.stop();
    assert!(!control.exists());
}

#[test]
fn other_files_and_the_sockets_of_disks_are_not_replaced() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    fs::write(folder.path().join("precious"), "x").expect("a file");
    for (control, why) in
        [("precious", "not a socket"), ("none/c", "cannot open the folder"), ("s", "both the control")]
    {
        let _ = fs::remove_file(folder.path().join("root.vhd"));
        let _ = fs::remove_file(folder.path().join(super::DISK));
        let failed = fail_to_start(folder.path(), &["--socket-path=s", &format!("--control={control}")]);
        assert_eq!(failed.code, Some(1), "{control}: {}", failed.stderr);
        let last = failed.stderr.lines().last().expect("a message");
        assert!(last.starts_with("diffdisk: ") && last.contains(why), "{control}: {}", failed.stderr);
    }
    assert_eq!(fs::read(folder.path().join("precious")).expect("the file"), b"x");
}

#[test]
fn the_configuration_file_names_the_control_socket() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let image = create_chain(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "control = {:?}\n[[disk]]\npath = {image:?}\nsocket = {:?}\n[[disk]]\npath = {:?}\nsocket = {:?}\nid = \"b\"\nreadonly = true\n",
        path("c"),
        path("s"),
        path("root.vhd"),
        path("t")
    );
    fs::write(path("config.toml"), text).expect("a file");
    for (options, control) in [(vec![], "c"), (vec![format!("--control={}", path("d"))], "d")] {
        let mut command = Command::new(DIFFDISKD);
        command.args(["--config", &path("config.toml")]).arg(format!("--runtime-dir={}", path("")));
        let log = fs::File::create(path("log")).expect("a log");
        let mut daemon = super::common::tool::start(command.args(options).stderr(log)).expect("a daemon");
        while !fs::read_to_string(path("log")).expect("the log").contains("control socket on") {
            assert_eq!(
                daemon.try_wait().expect("a daemon"),
                None,
                "{}",
                fs::read_to_string(path("log")).expect("the log")
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let disks = super::Rpc::connect(path(control).as_ref()).call("disks", &json!({}));
        let names: Vec<&str> =
            disks.as_array().expect("disks").iter().filter_map(|disk| disk["name"].as_str()).collect();
        assert_eq!(names, [super::DISK, "b"]);
        assert_eq!((&disks[0]["read_only"], &disks[1]["read_only"]), (&json!(false), &json!(true)));
        super::Rpc::connect(path(control).as_ref()).call("shutdown", &json!({}));
        assert!(daemon.wait().expect("a daemon").success());
    }
}
