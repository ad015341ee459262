//! Settings of the machine: the system configuration and the available runtime folders. Each test runs in a mount
//! namespace of its own, which needs root.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;

use super::temp;

/// Runs a shell script in a new mount namespace, in the folder `dir`. Returns `None` without root.
fn in_mount_namespace(dir: &Path, script: &str) -> Option<Output> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let tool = cargo_bin!("diffdisk").parent().unwrap();
    let script = format!("set -eu; PATH={}:$PATH; {script}", tool.display());
    let mut command = Command::new("unshare");
    Some(command.args(["--mount", "sh", "-c", &script]).current_dir(dir).output().unwrap())
}

fn output_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

/// Script that creates a writable disk, starts the daemon, waits until it serves or has ended, stops it, and prints its
/// log.
const SERVE: &str = "diffdisk create a.vhd --size 8M --quiet --no-system-config; \
    diffdiskd --no-system-config --blk-file=a.vhd --socket-path=a.sock 2>log & daemon=$!; \
    while kill -0 $daemon 2>/dev/null && ! grep -q 'queues of' log; do sleep 0.02; done; \
    kill $daemon 2>/dev/null || true; wait $daemon && echo ended well || echo failed; cat log";

#[test]
fn the_start_falls_back_to_another_runtime_folder() {
    let small = "mount -t tmpfs -o size=64k small /run";
    let read_only = "mount -t tmpfs -o ro none /run";
    let taken = "mount -t tmpfs mine /run; mkdir /run/diffdisk; chown 1234 /run/diffdisk";
    let taken_too = "mkdir /dev/shm/diffdisk-0; chown 1234 /dev/shm/diffdisk-0";
    for (run, shm, folder, why) in [
        (small, "true", "/dev/shm/diffdisk-0", "are free"),
        (read_only, "true", "/dev/shm/diffdisk-0", "/run/diffdisk"),
        (taken, "true", "/dev/shm/diffdisk-0", "belongs to user 1234"),
        (taken, taken_too, "none", "belongs to user 1234"),
    ] {
        let dir = temp::scratch("system");
        let script = format!("{run}; mount -t tmpfs shm /dev/shm; {shm}; {SERVE}");
        let Some(output) = in_mount_namespace(dir.path(), &script) else { return };
        let message = output_text(&output);
        assert!(message.contains("ended well"), "{run}: {message}");
        assert!(message.contains(&format!("runtime folder {folder}, ")), "{run}: {message}");
        assert_eq!(message.matches("WARN").count(), 1, "{run}: {message}");
        assert!(message.lines().find(|line| line.contains("WARN")).unwrap().contains(why), "{run}: {message}");
    }
}

#[test]
fn an_explicit_runtime_folder_is_used_or_refused() {
    let dir = temp::scratch("system");
    let script = format!(
        "mount -t tmpfs -o ro none /run; {}",
        SERVE.replace("diffdiskd ", "diffdiskd --runtime-dir=/run/diffdisk ")
    );
    let Some(output) = in_mount_namespace(dir.path(), &script) else { return };
    assert!(
        output_text(&output).contains("failed") && output_text(&output).contains("/run/diffdisk"),
        "{}",
        output_text(&output)
    );
}

#[test]
fn the_system_configuration_applies_to_both_programs() {
    let dir = temp::scratch("system");
    let path = |name: &str| dir.path().join(name);
    for folder in ["etc/diffdisk", "images", "vms"] {
        fs::create_dir_all(path(folder)).unwrap();
    }
    let config = format!("allow-parents = [{:?}]\n", path("images"));
    let with = |config: &str, command: &str| {
        fs::write(path("etc/diffdisk/diffdisk.toml"), config).unwrap();
        let output = in_mount_namespace(dir.path(), &format!("mount --bind etc /etc; {command}"))?;
        Some((output.status.code(), output_text(&output)))
    };
    let make = "diffdisk create images/root.vhd --size 8M; diffdisk create vms/a.vhd --parent images/root.vhd";
    let Some((code, printed)) = with("", make) else { return };
    assert_eq!(code, Some(0), "{printed}");
    let hint = format!("so the image can be opened only with --allow-parents {}", path("images").display());
    assert!(printed.contains(&hint), "{printed}");
    let (_, printed) = with(&config, &make.replace("root.vhd", "root2.vhd").replace("a.vhd", "a2.vhd")).unwrap();
    assert!(!printed.contains("warn"), "a folder that is allowed needs no option: {printed}");
    let info = "diffdisk info vms/a.vhd --chain";
    // Without `rm`, the shell may read the log of the previous daemon, and kill the new daemon before its start is
    // complete.
    let serve = "rm -f log; diffdiskd --blk-file=vms/a.vhd --socket-path=a.sock 2>log & daemon=$!; \
        while kill -0 $daemon 2>/dev/null && ! grep -q 'queues of' log; do sleep 0.02; done; \
        kill $daemon 2>/dev/null || true; wait $daemon || { cat log; exit 1; }";
    for command in [info, serve] {
        let (code, printed) = with("", command).unwrap();
        let is_missed = printed.contains("not below an allowed folder");
        assert!(is_missed && (code == Some(1) || command == info), "{command}: the parent lies elsewhere: {printed}");
        let (code, printed) = with(&config, command).unwrap();
        assert_eq!(code, Some(0), "{command}: {printed}");
        let (code, printed) = with("colour = 1\n", command).unwrap();
        assert!(
            code == Some(1) && printed.contains("/etc/diffdisk/diffdisk.toml") && printed.contains("colour"),
            "{printed}"
        );
        let writable = format!("chmod g+w /etc/diffdisk/diffdisk.toml; {command}");
        let (code, printed) = with(&config, &writable).unwrap();
        fs::remove_file(path("etc/diffdisk/diffdisk.toml")).unwrap();
        assert!(code == Some(1) && printed.contains("write to it"), "{printed}");
    }
    let without = format!("{info} --no-system-config");
    assert!(with(&config, &without).unwrap().1.contains("not below an allowed folder"));
    let of_the_disk = serve.replace(
        "--blk-file=vms/a.vhd --socket-path=a.sock",
        "--disk path=vms/a.vhd,socket=a.sock,allow-parents=images",
    );
    assert_eq!(with("", &of_the_disk).unwrap().0, Some(0));
}
