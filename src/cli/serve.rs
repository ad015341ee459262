//! `diffdiskd`: opens the disks, makes their sockets, serves until told to stop.
//!
//! Everything that can be refused is refused before READY: all disks are open, all lanes stand and all sockets are
//! bound by then. Each disk has its own control thread; a signal reaches them all through one pipe that is never
//! read, so it stays readable for every one of them.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::adopt::adopt;
use super::disk_args::{Cache, DiskArgs};
use super::runtime;
use super::serve_args::{Args, OnEnospc};
use super::systemd;
use crate::disk::{Disk, DiskOptions, WhenFull};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Keep, sweep};
use crate::storage::Env;
use crate::storage::host::Host;
use crate::units::SECTOR;
use crate::vhost::{Daemon, Service, Socket};

/// What QEMU's conventions for back-end programs ask to be told.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// How long to wait for the files of a disk. A daemon that was killed holds them until its last I/O is over.
const PREDECESSORS_IO: Duration = Duration::from_secs(30);
/// How long to wait for the socket of a disk. A daemon that was killed holds it until its process is taken apart.
const PREDECESSORS_SOCKET: Duration = Duration::from_secs(1);

/// Runs the daemon with the arguments of the process.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    log_to_stderr(&args.log_level);
    let host: Arc<dyn Env> = Arc::new(Host);
    match serve(&args, &host) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            super::complain("serve", &e);
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(level: &str) {
    let mut logger = env_logger::Builder::new();
    logger.parse_filters(level);
    logger.format(|out, record| {
        let line = record.args().to_string().replace(['\n', '\r'], " ");
        writeln!(out, "{} {:5} {line}", out.timestamp_millis(), record.level())
    });
    logger.init();
    std::panic::set_hook(Box::new(|panic| error!("a fault of our own: {panic}")));
}

fn serve(args: &Args, host: &Arc<dyn Env>) -> Result<()> {
    let disks = args.disks()?;
    // File descriptors by number first: later the numbers may be our own.
    let mut handed_over = hand_over(&disks)?;
    // Signals before sockets: from the moment somebody can see us, we can be stopped in good order.
    let stop = stop_signal()?;
    raise_file_limit();
    let keep = keep(args, &**host)?;
    let mut daemons = Vec::new();
    for disk in &disks {
        let service = service(args, disk);
        let options = DiskOptions {
            path: disk.path.clone(),
            read_only: disk.readonly,
            serial: disk.serial.clone(),
            direct: disk.direct,
            allow_parents: args.allow_parents.clone(),
            write_through: !service.write_back,
            keep: keep.clone(),
            discard_journal: args.discard_journal && !disk.readonly,
            when_full: match args.on_enospc {
                OnEnospc::Park => WhenFull::Park,
                OnEnospc::Error => WhenFull::Fail,
            },
        };
        let opened = when_free(PREDECESSORS_IO, &service.name, &stop, || Disk::open(host.clone(), &options))?;
        let socket = when_free(PREDECESSORS_SOCKET, &service.name, &stop, || socket_of(disk, &mut handed_over))?;
        let size = opened.capacity().saturating_mul(SECTOR);
        let mode = if opened.is_read_only() { ", read-only" } else { "" };
        let place = socket.path().map_or("the connection handed over".into(), |p| p.display().to_string());
        info!(
            "disk {}: {} of {size} bytes{mode} on {place}, {} queues of {}",
            service.name,
            disk.path.display(),
            service.queues,
            service.queue_size,
        );
        daemons.push((service.name.clone(), Daemon::new(opened, &service, socket)?));
    }
    if !handed_over.is_empty() {
        let why = format!("{} of the sockets in LISTEN_FDS belong to no disk", handed_over.len());
        return Err(Error::new(ErrorKind::Refused, why));
    }
    tell_manager("READY=1");
    let outcome = run_all(daemons, &stop);
    tell_manager("STOPPING=1");
    outcome
}

/// How acknowledged writes outlive this process: by a journal in the runtime folder, or, where there is none, by commits.
fn keep(args: &Args, host: &dyn Env) -> Result<Keep> {
    let Some(runtime) = runtime::for_daemon(args.runtime_dir.as_deref())? else { return Ok(Keep::Commit) };
    if let Err(e) = sweep(host, &runtime) {
        warn!("journals that belong to no image may be left: {}", e.line());
    }
    Ok(Keep::Journal(runtime))
}

/// Takes what somebody may still have in use: tries until it is free, at most for `limit`, and not beyond the stop signal.
fn when_free<T>(limit: Duration, disk: &str, stop: &UnixStream, mut take: impl FnMut() -> Result<T>) -> Result<T> {
    let (begun, mut pause) = (Instant::now(), Duration::from_millis(2));
    let mut told = false;
    loop {
        let busy = match take() {
            Err(e) if e.kind() == ErrorKind::Busy && begun.elapsed() < limit => e,
            outcome => {
                if told && outcome.is_ok() {
                    info!("disk {disk}: free after {} ms", begun.elapsed().as_millis());
                }
                return outcome;
            }
        };
        if !told {
            info!("disk {disk}: waits up to {} s: {}", limit.as_secs(), busy.line());
            told = true;
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
        match poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => pause = (pause * 2).min(Duration::from_millis(100)),
            Ok(_) => return Err(busy),
            Err(e) => return Err(Error::io("cannot wait", e.into())),
        }
    }
}

fn service(args: &Args, disk: &DiskArgs) -> Service {
    Service {
        name: disk.name(),
        queues: disk.queues(),
        queue_size: disk.queue_size(),
        engine: args.engine(),
        poll: Duration::from_micros(args.poll_us),
        write_back: disk.cache == Cache::Writeback,
    }
}

/// The sockets in `--fd` and `LISTEN_FDS`, in this order.
fn hand_over(disks: &[DiskArgs]) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    if let Some(fd) = disks.iter().find_map(|d| d.fd) {
        let owned = adopt(fd).map_err(|e| Error::io(format!("cannot use file descriptor {fd}"), e))?;
        sockets.push(Socket::adopt(owned)?);
    }
    let from_manager = systemd::sockets().map_err(|e| Error::io("cannot use the sockets in LISTEN_FDS", e))?;
    for fd in from_manager {
        sockets.push(Socket::adopt(fd)?);
    }
    Ok(sockets)
}

/// The socket of a disk: the one handed over under the name it asks for, else one made of that name; without a name,
/// the next that was handed over.
fn socket_of(disk: &DiskArgs, handed_over: &mut Vec<Socket>) -> Result<Socket> {
    match &disk.socket {
        Some(path) => match handed_over.iter().position(|s| s.path().as_ref() == Some(path)) {
            Some(at) => Ok(handed_over.remove(at)),
            None => Socket::bind(path),
        },
        None if handed_over.is_empty() => {
            Err(Error::new(ErrorKind::Refused, "no socket is given, and none was handed over").at_path(&disk.path))
        }
        None => Ok(handed_over.remove(0)),
    }
}

/// Readable for ever after the first SIGTERM or SIGINT.
fn stop_signal() -> Result<Arc<UnixStream>> {
    let cannot = |e| Error::io("cannot listen to signals", e);
    let (stop, raised) = UnixStream::pair().map_err(cannot)?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let end = raised.try_clone().map_err(cannot)?;
        signal_hook::low_level::pipe::register(signal, end).map_err(cannot)?;
    }
    Ok(Arc::new(stop))
}

/// A disk of 64 queues needs some 400 descriptors; the default limit is 1024 for the sake of `select`.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        warn!("the limit of open files stays at {:?}: {e}", limit.current);
    }
}

fn tell_manager(state: &str) {
    if let Err(e) = systemd::notify(state) {
        warn!("the service manager cannot be told {state}: {e}");
    }
}

/// Serves every disk on a thread of its own until all have ended; the first failure is the outcome.
fn run_all(daemons: Vec<(String, Daemon)>, stop: &Arc<UnixStream>) -> Result<()> {
    let start = |(name, daemon): (String, Daemon)| {
        let stop = stop.clone();
        let thread = thread::Builder::new().name(format!("disk-{name}")).spawn(move || daemon.run(&*stop));
        thread.map(|thread| (name, thread)).map_err(|e| Error::io("cannot start the thread of a disk", e))
    };
    let threads: Vec<_> = daemons.into_iter().map(start).collect();
    let mut outcome = Ok(());
    for started in threads {
        let ended = started.and_then(|(name, thread)| {
            let fault = |_| Err(Error::new(ErrorKind::Io, format!("disk {name} ended by a fault of our own")));
            thread.join().unwrap_or_else(fault)
        });
        outcome = outcome.and(ended);
    }
    outcome
}
