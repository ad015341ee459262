//! Starting the disks: everything that can be refused is refused before READY, and a start that fails leaves nothing behind,
//! neither a socket nor a live journal.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::disk_args::{CacheMode, DiskArgs};
use super::runtime_dir;
use super::serve_args::{DaemonArgs, OnEnospc};
use crate::disk::{Disk, DiskOptions, WhenFull};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Durability, JOURNAL_BYTES, remove_stale_journals};
use crate::storage::Env;
use crate::units::SECTOR;
use crate::vhost::{DiskServer, ServeOptions, Socket, fds_of_disk};

/// The version of the programs, with the commit they are built from.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("DIFFDISK_COMMIT"), ")");
/// How long to wait for the files of a disk. A daemon that was killed holds them until its last I/O is over.
const PREDECESSOR_IO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for the socket of a disk. A daemon that was killed holds it until its process is taken apart.
const PREDECESSOR_SOCKET_TIMEOUT: Duration = Duration::from_secs(1);
/// Descriptors of the process itself: the standard streams, signals, the log, what libraries open for a moment.
const PROCESS_FDS: u64 = 32;

/// A disk that is ready to be served.
pub(super) struct ReadyDisk {
    // Dropped first: it removes the socket and ends the threads of the queues.
    daemon: DiskServer,
    disk: Arc<Disk>,
    name: String,
}

impl ReadyDisk {
    /// Its name for the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Serves it until `stop` is readable.
    ///
    /// # Errors
    /// As [`Daemon::run`].
    pub(super) fn run(self, stop: &UnixStream) -> Result<()> {
        self.daemon.run(stop)
    }
}

/// Opens the disks, makes their sockets and starts their threads. `None` if the stop signal came first.
///
/// # Errors
/// Whatever keeps one of the disks from being served; then none of them is, and nothing is left behind.
pub(super) fn start_all(
    args: &DaemonArgs,
    disks: &[DiskArgs],
    mut handed_over: Vec<Option<Socket>>,
    host: &Arc<dyn Env>,
    stop: &UnixStream,
) -> Result<Option<Vec<ReadyDisk>>> {
    for (disk, socket) in disks.iter().zip(&handed_over) {
        if socket.is_none() && disk.socket.is_none() {
            let why = "no socket is given, and none was handed over";
            return Err(Error::new(ErrorKind::Refused, why).at_path(&disk.path));
        }
    }
    raise_fd_limit();
    // Before the chains are known each has at least one file.
    check_fd_limit(disks, disks.iter().map(|_| 1))?;
    let keep = durability(args, disks, &**host)?;
    let mut ready: Vec<ReadyDisk> = Vec::new();
    for (disk, handed_over) in disks.iter().zip(&mut handed_over) {
        let access = disk.socket_access()?;
        let service = serve_options(args, disk);
        let options = disk_options(args, disk, &keep);
        let open = || Disk::open(host.clone(), &options);
        let Some(opened) = retry_while_busy(PREDECESSOR_IO_TIMEOUT, &service.name, stop, open)? else {
            return Ok(None);
        };
        let depths = ready.iter().map(|r| &r.disk).chain([&opened]).map(|disk| disk.version().depth());
        check_fd_limit(disks, depths.chain(std::iter::repeat(1)))?;
        let bind = || match (handed_over.take(), &disk.socket) {
            (Some(socket), _) => Ok(socket),
            (None, Some(path)) => Socket::bind(path, access),
            (None, None) => unreachable!("refused above"),
        };
        let Some(socket) = retry_while_busy(PREDECESSOR_SOCKET_TIMEOUT, &service.name, stop, bind)? else {
            return Ok(None);
        };
        let place = socket.path().map_or("the connection handed over".into(), |p| p.display().to_string());
        let daemon = DiskServer::new(opened.clone(), &service, socket)?;
        info!("{}", describe(&service, disk, &opened, &place, daemon.engine()));
        ready.push(ReadyDisk { daemon, disk: opened, name: service.name });
    }
    Ok(Some(ready))
}

/// The line of the log that has all that a reader of it asks first: which program, which files, how they are served.
fn describe(service: &ServeOptions, args: &DiskArgs, disk: &Disk, place: &str, engine: &str) -> String {
    let size = disk.capacity().saturating_mul(SECTOR);
    let mode = if disk.is_read_only() { ", read-only" } else { "" };
    let chain: Vec<String> = disk.version().files().map(|(_, file)| file.path().display().to_string()).collect();
    let cache = if args.cache == CacheMode::Writeback { "writeback" } else { "writethrough" };
    let direct = if args.direct { ", direct" } else { "" };
    let runtime = disk.journal_folder().unwrap_or(Path::new("none")).display();
    format!(
        "disk {}: {size} bytes{mode} on {place}, {} queues of {}, chain {}, runtime folder {runtime}, engine {engine}, cache \
         {cache}{direct}, diffdiskd {}",
        service.name,
        service.queues,
        service.queue_size,
        chain.join(" <- "),
        VERSION,
    )
}

/// How acknowledged writes outlive this process: by a journal in the runtime folder, or without one by commits.
fn durability(args: &DaemonArgs, disks: &[DiskArgs], host: &dyn Env) -> Result<Durability> {
    let writable = disks.iter().filter(|disk| !disk.readonly).count() as u64;
    let folders = runtime_dir::prepare(args.runtime_dir.as_deref(), writable * JOURNAL_BYTES)?;
    for folder in &folders {
        if let Err(e) = remove_stale_journals(host, folder) {
            warn!("journals that belong to no image may be left: {}", e.line());
        }
    }
    match folders.is_empty() {
        true => Ok(Durability::Commit),
        false => Ok(Durability::Journal { folders, required: args.runtime_dir.is_some() }),
    }
}

fn disk_options(args: &DaemonArgs, disk: &DiskArgs, keep: &Durability) -> DiskOptions {
    DiskOptions {
        allow_writable_parent: disk.allow_writable_parent,
        path: disk.path.clone(),
        read_only: disk.readonly,
        serial: disk.serial.clone(),
        direct: disk.direct,
        allow_parents: args.allow_parents.iter().chain(&disk.allow_parents).cloned().collect(),
        write_through: disk.cache == CacheMode::Writethrough,
        keep: keep.clone(),
        discard_journal: args.discard_journal && !disk.readonly,
        when_full: match args.on_enospc {
            OnEnospc::Park => WhenFull::Park,
            OnEnospc::Error => WhenFull::Fail,
        },
        allocation: disk.allocation.unwrap_or(args.allocation).into(),
    }
}

fn serve_options(args: &DaemonArgs, disk: &DiskArgs) -> ServeOptions {
    ServeOptions {
        name: disk.name(),
        queues: disk.queues(),
        queue_size: disk.queue_size(),
        engine: args.engine(),
        poll: Duration::from_micros(args.poll_us),
        write_back: disk.cache == CacheMode::Writeback,
    }
}

/// Takes what another process may still hold: tries until it is free, at most for `limit`. `None` if the stop signal comes
/// first.
fn retry_while_busy<T>(
    limit: Duration,
    disk: &str,
    stop: &UnixStream,
    mut take: impl FnMut() -> Result<T>,
) -> Result<Option<T>> {
    let (begun, mut pause) = (Instant::now(), Duration::ZERO);
    let mut told = false;
    loop {
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
        match poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => pause = (pause * 2).clamp(Duration::from_millis(2), Duration::from_millis(100)),
            Ok(_) => return Ok(None),
            Err(e) => return Err(Error::io("cannot wait", e.into())),
        }
        let busy = match take() {
            Err(e) if e.kind() == ErrorKind::Busy && begun.elapsed() < limit => e,
            outcome => {
                if told && outcome.is_ok() {
                    info!("disk {disk}: free after {} ms", begun.elapsed().as_millis());
                }
                return outcome.map(Some);
            }
        };
        if !told {
            info!("disk {disk}: waits up to {} s: {}", limit.as_secs(), busy.line());
            told = true;
        }
    }
}

/// A disk of 64 queues takes some 700 descriptors; the default limit is 1024 for the sake of `select`.
fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        warn!("the limit of open files stays at {:?}: {e}", limit.current);
    }
}

/// Refuses disks that take more descriptors than the process may have. `files`: of each disk's chain.
fn check_fd_limit(disks: &[DiskArgs], files: impl Iterator<Item = usize>) -> Result<()> {
    let needed = disks.iter().zip(files).map(|(disk, files)| fds_of_disk(disk.queues(), files)).sum::<u64>();
    let needed = needed + PROCESS_FDS;
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < needed => {
            let why = format!(
                "the disks take up to {needed} file descriptors, and the process may have {limit}: raise the limit (ulimit \
                 -n, LimitNOFILE= of a unit) or give the disks fewer queues"
            );
            Err(Error::new(ErrorKind::Refused, why))
        }
        _ => Ok(()),
    }
}
