//! The control socket of the real daemon: the protocol, statistics, hostile clients, events, snapshots, the socket's
//! life, and `diffdisk ctl`.
#![allow(unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;

mod ctl;
mod events;
mod hostile;
mod protocol;
mod resize;
mod rpc;
mod schema;
mod snapshot;
mod socket;
mod statistics;

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use common::daemon::Daemon;
use common::temp::RuntimeDir;
use common::tool::diffdisk;
use rpc::Rpc;

/// A daemon with a control socket, which serves the child of a root.
struct Served {
    daemon: Daemon,
    control: PathBuf,
    folder: TempDir,
    runtime: RuntimeDir,
}

/// Name of the disk.
const DISK: &str = "child.vhd";
/// Size of the disk.
const SIZE: u64 = 8 << 20;

/// Creates a root and a child in `folder`. Returns the path of the child.
fn create_chain(folder: &Path) -> PathBuf {
    let (root, child) = (folder.join("root.vhd"), folder.join(DISK));
    let (root_text, child_text) = (root.to_str().expect("a plain path"), child.to_str().expect("a plain path"));
    diffdisk(["create", root_text, "--size", "8M"]).ok();
    diffdisk(["create", child_text, "--parent", root_text]).ok();
    child
}

impl Served {
    fn start(extra: &[&str]) -> Served {
        Served::start_with(extra, &[])
    }

    /// Starts the daemon with variables in its environment.
    fn start_with(extra: &[&str], variables: &[(&str, &str)]) -> Served {
        let (folder, runtime) = (tempfile::tempdir().expect("a folder"), RuntimeDir::new());
        let image = create_chain(folder.path());
        let control = folder.path().join("vm.control");
        let option = format!("--control={}", control.display());
        let options = [&[option.as_str(), runtime.option()], extra].concat();
        let daemon = Daemon::start_with(&image, &options, variables);
        daemon.wait_for_log("control socket on", 1);
        Served { daemon, control, folder, runtime }
    }

    fn connect(&self) -> Rpc {
        Rpc::connect(&self.control)
    }

    /// Ends the daemon by SIGTERM. Panics if the exit status is not 0 or the control socket remains.
    fn stop(self) -> TempDir {
        self.daemon.stop();
        assert!(!self.control.exists(), "the socket is removed");
        self.folder
    }
}
