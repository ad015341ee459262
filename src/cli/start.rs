//! Start of the disks. All errors are reported before `READY=1`, and a failed start leaves no socket and no new live
//! journal.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::disk_args::{CacheMode, DiskArgs};
use super::runtime_dir;
use super::serve_args::{DaemonArgs, OnEnospc, PageCacheReads};
use crate::control::{EventHub, ServedDisk, fds_of_control};
use crate::disk::{Disk, DiskOptions, WhenFull};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventReporter;
use crate::image::{Durability, JOURNAL_BYTES, remove_stale_journals};
use crate::storage::Env;
use crate::units::SECTOR;
use crate::vhost::{DiskServer, ServeOptions, Socket, fds_of_disk};

/// Version of the programs, with the commit of the build.
pub(super) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("DIFFDISK_COMMIT"), ")");
/// Maximum time to wait for the files of a disk. A killed daemon keeps its file locks until its last I/O has completed.
const PREDECESSOR_IO_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum time to wait for a socket. A killed daemon keeps its socket until the kernel has removed the
/// process.
pub(super) const PREDECESSOR_SOCKET_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of file descriptors that belong to no disk: standard streams, signal sockets, the log, and temporary
/// descriptors of libraries.
const PROCESS_FDS: u64 = 32;

/// A disk that is ready to be served.
pub(super) struct ReadyDisk {
    // This field is dropped first. The drop removes the socket and ends the threads of the queues, which use `disk`.
    server: DiskServer,
    disk: Arc<Disk>,
    name: String,
}

impl ReadyDisk {
    /// Returns the name of the disk in the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the disk for the registry of the control socket.
    pub(super) fn served(&self) -> ServedDisk {
        ServedDisk { name: self.name.clone(), disk: self.disk.clone(), server: self.server.status().clone() }
    }

    /// Serves the disk until `stop` is readable, or until the front-end of a connection that was handed over
    /// disconnects. Then closes the disk.
    ///
    /// # Errors
    /// - `Io` if requests in flight do not complete, or if waiting on the sockets fails
    /// - any error of closing the disk; writes that were not flushed may then be lost
    pub(super) fn run(self, stop: &UnixStream) -> Result<()> {
        self.server.run(stop)
    }
}

/// Opens the disks, creates their sockets and starts their threads. Returns `None` if a stop signal arrives before all
/// disks are ready.
///
/// # Errors
/// The first error of any disk. In this case no disk is served, and the sockets and live journals that were created are
/// removed.
pub(super) fn start_all(
    args: &DaemonArgs,
    disks: &[DiskArgs],
    mut handed_over: Vec<Option<Socket>>,
    host: &Arc<dyn Env>,
    stop: &UnixStream,
    events: Option<&Arc<EventHub>>,
) -> Result<Option<Vec<ReadyDisk>>> {
    for (disk, socket) in disks.iter().zip(&handed_over) {
        if socket.is_none() && disk.socket.is_none() {
            let why =
                "no socket for this disk: give --socket-path, --fd or socket=, or hand a socket over by LISTEN_FDS";
            return Err(Error::new(ErrorKind::Refused, why).at_path(&disk.path));
        }
    }
    raise_fd_limit();
    // The lengths of the chains are not known yet, so this check assumes one file per disk.
    let process_fds = PROCESS_FDS + if events.is_some() { fds_of_control() } else { 0 };
    check_fd_limit(disks, disks.iter().map(|_| 1), process_fds)?;
    let durability = durability(args, disks, &**host)?;
    let mut ready: Vec<ReadyDisk> = Vec::new();
    for (disk, handed_over) in disks.iter().zip(&mut handed_over) {
        let access = disk.socket_access()?;
        let serve_options = serve_options(args, disk);
        let events = events.map(|hub| hub.reporter(&serve_options.name)).unwrap_or_default();
        let disk_options = DiskOptions { events, ..disk_options(args, disk, &durability) };
        let user = format!("disk {}", serve_options.name);
        let open = || Disk::open(host.clone(), &disk_options);
        let Some(opened) = retry_while_busy(PREDECESSOR_IO_TIMEOUT, &user, stop, open)? else {
            return Ok(None);
        };
        let depths = ready.iter().map(|r| &r.disk).chain([&opened]).map(|disk| disk.version().depth());
        check_fd_limit(disks, depths.chain(std::iter::repeat(1)), process_fds)?;
        let bind = || match (handed_over.take(), &disk.socket) {
            (Some(socket), _) => Ok(socket),
            (None, Some(path)) => Socket::bind(path, access),
            (None, None) => unreachable!("refused above"),
        };
        let Some(socket) = retry_while_busy(PREDECESSOR_SOCKET_TIMEOUT, &user, stop, bind)? else {
            return Ok(None);
        };
        let place = socket.path().map_or("the connection handed over".into(), |p| p.display().to_string());
        let server = DiskServer::new(opened.clone(), &serve_options, socket)?;
        info!("{}", describe(&serve_options, disk, &opened, &place, server.status().engine()));
        ready.push(ReadyDisk { server, disk: opened, name: serve_options.name });
    }
    Ok(Some(ready))
}

/// Formats the log line of a started disk: its size, socket, queues, chain and modes, and the version of the program.
fn describe(options: &ServeOptions, args: &DiskArgs, disk: &Disk, place: &str, engine: &str) -> String {
    let size = disk.capacity().saturating_mul(SECTOR);
    let mode = if disk.is_read_only() { ", read-only" } else { "" };
    let chain: Vec<String> = disk.version().files().map(|(_, file)| file.path().display().to_string()).collect();
    let cache = if args.cache == CacheMode::Writeback { "writeback" } else { "writethrough" };
    let direct = if args.direct { ", direct" } else { "" };
    let runtime = disk.journal_folder().unwrap_or_else(|| "none".into()).display().to_string();
    format!(
        "disk {}: {size} bytes{mode} on {place}, {} queues of {}, chain {}, runtime folder {runtime}, engine {engine}, cache \
         {cache}{direct}, diffdiskd {}",
        options.name,
        options.queues,
        options.queue_size,
        chain.join(" <- "),
        VERSION,
    )
}

/// Chooses the mechanism by which acknowledged writes survive a kill of this process: live journals, or commits if
/// there is no runtime folder. Removes stale live journals from the runtime folders.
fn durability(args: &DaemonArgs, disks: &[DiskArgs], host: &dyn Env) -> Result<Durability> {
    let writable = disks.iter().filter(|disk| !disk.readonly).count() as u64;
    let folders = runtime_dir::prepare(args.runtime_dir.as_deref(), writable * JOURNAL_BYTES)?;
    for folder in &folders {
        if let Err(e) = remove_stale_journals(host, folder) {
            warn!("cannot remove stale live journals: {}", e.line());
        }
    }
    match folders.is_empty() {
        true => Ok(Durability::Commit),
        false => Ok(Durability::Journal { folders, required: args.runtime_dir.is_some() }),
    }
}

fn disk_options(args: &DaemonArgs, disk: &DiskArgs, durability: &Durability) -> DiskOptions {
    DiskOptions {
        allow_writable_parent: disk.allow_writable_parent,
        path: disk.path.clone(),
        read_only: disk.readonly,
        serial: disk.serial.clone(),
        direct: disk.direct,
        allow_parents: args.allow_parents.iter().chain(&disk.allow_parents).cloned().collect(),
        write_through: disk.cache == CacheMode::Writethrough,
        keep: durability.clone(),
        discard_journal: args.discard_journal && !disk.readonly,
        when_full: match args.on_enospc {
            OnEnospc::Park => WhenFull::Park,
            OnEnospc::Error => WhenFull::Fail,
        },
        allocation: disk.allocation.unwrap_or(args.allocation).into(),
        page_cache_reads: args.page_cache_reads == PageCacheReads::On,
        events: EventReporter::default(),
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

/// Calls `take` repeatedly while it fails with `Busy`, for at most `limit`. Returns `None` if a stop signal arrives.
pub(super) fn retry_while_busy<T>(
    limit: Duration,
    user: &str,
    stop: &UnixStream,
    mut take: impl FnMut() -> Result<T>,
) -> Result<Option<T>> {
    let (begun, mut pause) = (Instant::now(), Duration::ZERO);
    let mut has_logged = false;
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
                if has_logged && outcome.is_ok() {
                    info!("{user}: free after {} ms", begun.elapsed().as_millis());
                }
                return outcome.map(Some);
            }
        };
        if !has_logged {
            info!("{user}: waiting up to {} s: {}", limit.as_secs(), busy.line());
            has_logged = true;
        }
    }
}

/// Raises the soft limit of open files to the hard limit: a disk with 64 queues needs about 700 descriptors, and the
/// usual soft limit is 1024.
fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        warn!("cannot raise the limit of open files from {:?}: {e}", limit.current);
    }
}

/// Checks that the disks need no more descriptors than the process may have. `files` yields the number of files in the
/// chain of each disk, `process_fds` is the number of descriptors that belong to no disk.
///
/// # Errors
/// `Refused` if the limit is too low.
fn check_fd_limit(disks: &[DiskArgs], files: impl Iterator<Item = usize>, process_fds: u64) -> Result<()> {
    let needed = disks.iter().zip(files).map(|(disk, files)| fds_of_disk(disk.queues(), files)).sum::<u64>();
    let needed = needed + process_fds;
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < needed => {
            let why = format!(
                "the disks need up to {needed} file descriptors, and the process may have {limit}: raise the limit (ulimit \
                 -n, LimitNOFILE= of a unit) or give the disks fewer queues"
            );
            Err(Error::new(ErrorKind::Refused, why))
        }
        _ => Ok(()),
    }
}
