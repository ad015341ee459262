//! The main function of `diffdiskd`: reads the arguments, starts the disks, serves them until a signal.
//!
//! All errors of the start are reported before `READY=1` (module `start`). Each disk has its own control thread. A
//! signal makes one socket readable, which all control threads poll. No thread reads the socket, so it stays readable.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Parser;
use log::{error, info, warn};

use super::exit::print_failure;
use super::inherited_fd::InheritedFds;
use super::serve_args::DaemonArgs;
use super::start::ReadyDisk;
use super::system_config::SystemConfig;
use super::{handover, print, serve_control, signals, start, systemd};
use crate::control::{DiskRegistry, EventHub};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Env;
use crate::storage::host::Host;

/// Output of `--print-capabilities`, as QEMU's conventions for vhost-user back-end programs require.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// Runs the daemon with the arguments of the process and its inherited descriptors.
pub fn main(inherited: InheritedFds) -> ExitCode {
    let args = DaemonArgs::parse();
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    log_to_stderr(&args.log_level);
    let host: Arc<dyn Env> = Arc::new(Host);
    match serve(args, inherited, &host) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            print_failure("serve", &e);
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(level: &str) {
    let mut logger = env_logger::Builder::new();
    logger.parse_filters(level);
    logger.format(|out, record| {
        // Names from images and messages of front-ends may contain control characters, which could forge log lines.
        let line = record.args().to_string();
        writeln!(out, "{} {:5} {}", out.timestamp_millis(), record.level(), print::escape_controls(&line))
    });
    logger.init();
    std::panic::set_hook(Box::new(|panic| error!("{panic}")));
}

fn serve(mut args: DaemonArgs, inherited: InheritedFds, host: &Arc<dyn Env>) -> Result<()> {
    args.load_config()?;
    let disks = args.disks()?;
    let handed_over = handover::take_sockets(&disks, inherited)?;
    args.add_system_config(SystemConfig::load(args.no_system_config)?);
    signals::survive_file_size_limit();
    // The signal handlers are installed before the sockets exist: as soon as a front-end can connect, a signal must not
    // kill the daemon without a commit.
    let stop = signals::stop_socket()?;
    let events = args.control.is_some().then(EventHub::new).transpose()?;
    // The control socket is bound before the disks are opened: a second daemon with the same path must not touch them.
    let listener = match &args.control {
        Some(path) => match serve_control::bind(path, &stop)? {
            Some(listener) => Some(listener),
            None => return Ok(()),
        },
        None => None,
    };
    let Some(ready) = start::start_all(&args, &disks, handed_over, host, &stop.stop, events.as_ref())? else {
        info!("stopped by a signal during the start");
        return Ok(());
    };
    let registry = Arc::new(DiskRegistry::default());
    ready.iter().for_each(|disk| registry.add(disk.served()));
    let control = match (listener, events) {
        (Some(listener), Some(events)) => Some(serve_control::start(listener, &registry, events, &stop)?),
        _ => None,
    };
    notify_manager("READY=1");
    let outcome = run_all(ready, &stop.stop, &registry);
    notify_manager("STOPPING=1");
    // The control socket serves until the disks are closed, so its last event is the end of the daemon.
    if let Some(control) = control {
        control.stop(&outcome);
    }
    outcome
}

fn notify_manager(state: &str) {
    if let Err(e) = systemd::notify(state) {
        warn!("cannot send {state} to the service manager: {e}");
    }
}

/// Serves each disk in a thread of its own, and removes the disk from the registry when it is no longer served. Returns
/// when all threads have ended, with the first error.
fn run_all(ready: Vec<ReadyDisk>, stop: &Arc<UnixStream>, registry: &Arc<DiskRegistry>) -> Result<()> {
    let start = |ready: ReadyDisk| {
        let (stop, registry) = (stop.clone(), registry.clone());
        let name = ready.name().to_owned();
        let body = {
            let name = name.clone();
            move || {
                let outcome = ready.run(&stop);
                registry.remove(&name);
                outcome
            }
        };
        let thread = thread::Builder::new().name(format!("disk-{name}")).spawn(body);
        thread.map(|thread| (name, thread)).map_err(|e| Error::io("cannot start the thread of a disk", e))
    };
    let threads: Vec<_> = ready.into_iter().map(start).collect();
    let mut outcome = Ok(());
    for started in threads {
        let ended = started.and_then(|(name, thread)| {
            let fault = |_| Err(Error::new(ErrorKind::Io, format!("the thread of disk {name} panicked")));
            thread.join().unwrap_or_else(fault)
        });
        outcome = outcome.and(ended);
    }
    outcome
}
