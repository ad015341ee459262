//! The live journal, tested with the real programs: verbs that read data refuse the image of a killed daemon, as does a
//! read-only daemon. The next daemon that opens the image for writing replays the acknowledged writes.

mod common;

use common::chain::Chain;
use common::daemon::Daemon;
use common::temp::RuntimeDir;
use common::tool::{DIFFDISKD, diffdisk, run};
use std::process::Command;
use std::time::Duration;

#[test]
fn the_tool_refuses_a_killed_image_until_a_daemon_has_replayed_its_journal() {
    let mut chain = Chain::with_root(8, 8);
    chain.push_child("child.vhd");
    let image = chain.top().to_str().expect("a plain path").to_owned();
    let runtime = RuntimeDir::new();
    let runtime_option = runtime.option();
    let daemon = Daemon::start(chain.top(), &[runtime_option]);
    let mut guest = daemon.connect();
    guest.write(5 << 20, &[0xA5; 4096]).expect("a write that is never flushed");
    drop(guest);
    daemon.kill();

    for verb in [&["check"][..], &["convert", "--to", "raw"], &["map"]] {
        let target = if verb[0] == "convert" { &["-"][..] } else { &[] };
        let refused = diffdisk(
            verb[..1].iter().chain(&[image.as_str()]).chain(target).chain(&verb[1..]).chain(&[runtime_option]),
        );
        assert_eq!(refused.code, Some(1), "{verb:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("did not end cleanly") && refused.stdout.is_empty(), "{}", refused.stderr);
    }
    let root = chain.top().with_file_name("root.vhd");
    let refused =
        diffdisk(["convert", &root.display().to_string(), &image, "--to", "dynamic", "--force", runtime_option]);
    assert_eq!(refused.code, Some(1), "nor replace it: {}", refused.stderr);
    let socket = runtime.path().join("s");
    let refused = run(
        Command::new(DIFFDISKD)
            .args(["--read-only", "--blk-file", &image, "--socket-path"])
            .arg(&socket)
            .arg(runtime_option),
        Duration::from_secs(10),
    );
    assert_eq!(refused.code, Some(1), "a daemon that only reads: {}", refused.stderr);
    assert!(refused.stderr.contains("did not end cleanly"), "{}", refused.stderr);
    assert_eq!(diffdisk(["info", &image, runtime_option]).code, Some(0), "headers may be looked at");

    let daemon = Daemon::start(chain.top(), &[runtime_option]);
    assert_eq!(daemon.connect().read(5 << 20, 4096).expect("a read"), [0xA5; 4096]);
    daemon.stop();
    diffdisk(["check", &image, runtime_option]).ok();
    let disk = diffdisk(["convert", &image, "-", "--to", "raw", runtime_option]).ok().stdout;
    assert_eq!(disk[5 << 20..(5 << 20) + 4096], [0xA5; 4096]);
    chain.assert_sound();
    assert_eq!(runtime.journals().len(), 0, "a clean end leaves no journal");
}
