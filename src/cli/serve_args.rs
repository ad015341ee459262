//! The command line of `diffdiskd`: one disk by options, or several disks by `--disk` or a configuration file.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use super::disk_args::{
    AllocationArg, CacheMode, DiskArgs, parse_disk, parse_queue_size, parse_queues, parse_serial, parse_socket_mode,
    read_config,
};
use super::system_config::SystemConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::EngineKind;

/// Policy for writes while the file system is full.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OnEnospc {
    /// Writes wait until there is space again; reads and flushes continue
    Park,
    /// Writes fail
    Error,
}

/// Reads of data that is in the page cache.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PageCacheReads {
    /// They are copies from mapped image files, without system calls
    On,
    /// They are I/O operations like all other reads, and no image file is mapped
    Off,
}

/// Serves differencing VHD chains to virtual machines over vhost-user-blk.
#[derive(Parser, Debug)]
#[command(name = "diffdiskd", version, max_term_width = 100)]
pub(super) struct DaemonArgs {
    /// Print the capabilities of this program as JSON, and exit
    #[arg(long)]
    pub(super) print_capabilities: bool,

    /// The image to serve (one disk)
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["disk", "config"],
          required_unless_present_any = ["disk", "config", "print_capabilities"])]
    blk_file: Option<PathBuf>,

    /// Create this socket and listen on it. Only its owner may connect unless --socket-group or --socket-mode is given.
    /// The socket is removed at exit
    #[arg(long, value_name = "PATH", conflicts_with_all = ["fd", "disk", "config"])]
    socket_path: Option<PathBuf>,

    /// Use this inherited file descriptor: a listening socket, or one that is connected to the front-end
    #[arg(long, value_name = "N", conflicts_with_all = ["disk", "config"])]
    fd: Option<RawFd>,

    /// Serve the disk read-only
    #[arg(long, conflicts_with_all = ["disk", "config"])]
    read_only: bool,

    /// Number of queues offered, 1 to 64; a front-end may use fewer, but not more [default: 4]
    #[arg(long, value_name = "N", value_parser = parse_queues, conflicts_with_all = ["disk", "config"])]
    num_queues: Option<u16>,

    /// Expected size of a queue, a power of two up to 32768; larger queues work, too [default: 1024]
    #[arg(long, value_name = "N", value_parser = parse_queue_size, conflicts_with_all = ["disk", "config"])]
    queue_size: Option<u16>,

    /// Whether the guest sees a write cache [default: writeback]
    #[arg(long, value_name = "MODE", conflicts_with_all = ["disk", "config"])]
    cache: Option<CacheMode>,

    /// Use direct I/O, which bypasses the page cache
    #[arg(long, conflicts_with_all = ["disk", "config"])]
    direct: bool,

    /// The serial number that the guest sees, at most 20 bytes
    #[arg(long, value_name = "TEXT", value_parser = parse_serial, conflicts_with_all = ["disk", "config"])]
    serial: Option<String>,

    /// Serve an image for writing although it has children: writes change the disks of the children
    #[arg(long, conflicts_with_all = ["disk", "config"])]
    allow_writable_parent: bool,

    /// A disk (repeatable): path=IMAGE,socket=PATH[,id=NAME][,readonly=on|off][,serial=TEXT][,queues=N]
    /// [,queue-size=N][,cache=writeback|writethrough][,direct=on|off][,allocation=sparse|block]
    /// [,allow-writable-parent=on|off][,allow-parents=DIR (repeatable)][,socket-group=NAME][,socket-mode=MODE]. Write a
    /// comma in a value as two commas
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = parse_disk)]
    disk: Vec<DiskArgs>,

    /// A TOML file with one [[disk]] table per disk, with the keys of --disk
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Create this control socket, by which `diffdisk ctl` and other programs of this user ask about the disks, watch
    /// events and end the daemon; for --config also the key control. No control socket is created by default
    #[arg(long, value_name = "PATH")]
    pub(super) control: Option<PathBuf>,

    /// Disks of the configuration file
    #[arg(skip)]
    configured: Vec<DiskArgs>,

    /// Group of the created sockets, which may connect, by name or number; for one disk use socket-group=
    #[arg(long, value_name = "NAME", conflicts_with = "fd")]
    socket_group: Option<String>,

    /// Mode of the created sockets in octal digits; for one disk use socket-mode= [default: 0600, with a group 0660]
    #[arg(long, value_name = "MODE", value_parser = parse_socket_mode, conflicts_with = "fd")]
    socket_mode: Option<u32>,

    /// Do not read /etc/diffdisk/diffdisk.toml (its keys: allow-parents, runtime-dir)
    #[arg(long)]
    pub(super) no_system_config: bool,

    /// A folder in which parents are accepted, besides the folder of the child (repeatable)
    #[arg(long, value_name = "DIR")]
    pub(super) allow_parents: Vec<PathBuf>,

    /// A folder on tmpfs for the live journals, from which acknowledged writes are recovered if the daemon is killed
    /// [default: /run/diffdisk or $XDG_RUNTIME_DIR/diffdisk; a folder in /dev/shm if that is not on tmpfs]
    #[arg(long, value_name = "DIR")]
    pub(super) runtime_dir: Option<PathBuf>,

    /// Discard the live journals of the images, and so the acknowledged writes that a killed daemon did not write to
    /// the images. The guests must have ended
    #[arg(long)]
    pub(super) discard_journal: bool,

    /// Policy for writes while the file system is full
    #[arg(long, value_name = "POLICY", default_value = "park")]
    pub(super) on_enospc: OnEnospc,

    /// Allocation of space for new blocks, for disks without the key allocation=
    #[arg(long, value_name = "HOW", default_value = "sparse")]
    pub(super) allocation: AllocationArg,

    /// The most detailed level that is logged to standard error
    #[arg(long, value_name = "LEVEL", default_value = "info",
          value_parser = clap::builder::PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"]))]
    pub(super) log_level: String,

    /// Longest time in microseconds for which the thread of a queue polls before it sleeps; adapted to the load (0: no
    /// polling)
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub(super) poll_us: u64,

    /// Reads of data that is in the page cache. Always off without io_uring, and for files with direct I/O
    #[arg(long, value_name = "MODE", default_value = "on")]
    pub(super) page_cache_reads: PageCacheReads,

    /// I/O engine
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: IoEngine,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum IoEngine {
    /// io_uring if the kernel allows it, otherwise blocking calls
    Auto,
    /// io_uring; fails if the kernel does not allow it
    IoUring,
    /// Blocking system calls, one per operation
    Blocking,
}

impl DaemonArgs {
    /// Returns the I/O engine.
    pub(super) fn engine(&self) -> EngineKind {
        match self.io_engine {
            IoEngine::Auto => EngineKind::Auto,
            IoEngine::IoUring => EngineKind::Uring,
            IoEngine::Blocking => EngineKind::Blocking,
        }
    }

    /// Adds the settings of the system configuration. A runtime folder on the command line has priority.
    pub(super) fn add_system_config(&mut self, config: SystemConfig) {
        self.allow_parents.extend(config.allow_parents);
        self.runtime_dir = self.runtime_dir.take().or(config.runtime_dir);
    }

    /// Reads the configuration file, if one is given. A control socket on the command line has priority.
    ///
    /// # Errors
    /// * `Invalid`: the configuration file is malformed.
    /// * `Io`, `NotFound`: the configuration file cannot be read.
    pub(super) fn load_config(&mut self) -> Result<()> {
        if let Some(file) = &self.config {
            let config = read_config(file)?;
            self.configured = config.disk;
            self.control = self.control.take().or(config.control);
        }
        Ok(())
    }

    /// Applies `--socket-group` and `--socket-mode` to each disk with a socket to create, unless the disk sets the same
    /// key.
    fn add_socket_access(&self, disks: &mut [DiskArgs]) -> Result<()> {
        if self.socket_group.is_none() && self.socket_mode.is_none() {
            return Ok(());
        }
        if disks.iter().all(|disk| disk.socket.is_none()) {
            let why = "--socket-group and --socket-mode apply to created sockets, and no disk has a socket path";
            return Err(Error::new(ErrorKind::Refused, why));
        }
        for disk in disks.iter_mut().filter(|disk| disk.socket.is_some()) {
            disk.socket_group = disk.socket_group.take().or_else(|| self.socket_group.clone());
            disk.socket_mode = disk.socket_mode.or(self.socket_mode);
        }
        Ok(())
    }

    /// Returns all disks to serve, from options, `--disk` and the configuration file that was read.
    ///
    /// # Errors
    /// `Refused`: two disks have the same name or socket, the control socket is also the socket of a disk, or
    /// `--socket-group` or `--socket-mode` applies to no disk.
    pub(super) fn disks(&self) -> Result<Vec<DiskArgs>> {
        let mut disks = self.disk.clone();
        if let Some(path) = &self.blk_file {
            disks.push(DiskArgs {
                socket: self.socket_path.clone(),
                fd: self.fd,
                readonly: self.read_only,
                serial: self.serial.clone(),
                queues: self.num_queues,
                queue_size: self.queue_size,
                cache: self.cache.unwrap_or_default(),
                direct: self.direct,
                allow_writable_parent: self.allow_writable_parent,
                ..DiskArgs::new(path.clone())
            });
        }
        disks.extend(self.configured.iter().cloned());
        self.add_socket_access(&mut disks)?;
        for (i, disk) in disks.iter().enumerate() {
            let earlier = &disks[..i];
            let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why));
            if earlier.iter().any(|d| d.name() == disk.name()) {
                return refuse(format!(
                    "two disks have the name {:?}: give one of them another name with id=",
                    disk.name()
                ));
            }
            if let Some(socket) = &disk.socket
                && earlier.iter().any(|d| d.socket.as_ref() == Some(socket))
            {
                return refuse(format!("two disks have the socket {}", socket.display()));
            }
            if let (Some(socket), Some(control)) = (&disk.socket, &self.control)
                && socket == control
            {
                return refuse(format!("{} is both the control socket and the socket of a disk", control.display()));
            }
        }
        Ok(disks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> Result<DaemonArgs, clap::Error> {
        DaemonArgs::try_parse_from([&["diffdiskd"], list].concat())
    }

    #[test]
    fn one_disk_is_given_by_options() {
        let args = args(&["--socket-path=/run/s", "--blk-file=/a/b.vhd", "--read-only", "--num-queues=2"]).unwrap();
        let disks = args.disks().unwrap();
        let expected = DiskArgs {
            socket: Some("/run/s".into()),
            readonly: true,
            queues: Some(2),
            ..DiskArgs::new("/a/b.vhd".into())
        };
        assert_eq!(disks, [expected]);
        assert_eq!((disks[0].name(), disks[0].queue_size()), ("b.vhd".into(), 1024));
        assert_eq!(DiskArgs::new("x".into()).queues(), 4, "on every machine");
    }

    #[test]
    fn wrong_usage_has_exit_code_2() {
        for bad in [
            &[][..],
            &["--socket-path=/s"],
            &["--blk-file=/a", "--disk=path=/b"],
            &["--blk-file=/a", "--fd=3", "--socket-path=/s"],
            &["--disk=path=/a", "--read-only"],
            &["--disk=path=/a,x=y"],
            &["--blk-file=/a", "--log-level=loud"],
            &["--blk-file=/a", "--allocation=thin"],
            &["--blk-file=/a", "--io-engine=magic"],
            &["--blk-file=/a", "--page-cache-reads=never"],
            &["--blk-file=/a", "--page-cache-reads"],
        ] {
            assert_eq!(args(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
        assert!(args(&["--print-capabilities"]).unwrap().print_capabilities);
        let engine = args(&["--blk-file=/a", "--io-engine=io_uring"]).unwrap().engine();
        assert_eq!(engine, EngineKind::Uring);
    }

    #[test]
    fn disks_need_different_names_and_sockets() {
        let twice = args(&["--disk=path=/a/x,socket=/s", "--disk=path=/b/x,socket=/t"]).unwrap();
        assert!(twice.disks().unwrap_err().line().contains("id="));
        let shared = args(&["--disk=path=/a,socket=/s", "--disk=path=/b,socket=/s"]).unwrap();
        assert!(shared.disks().is_err());
        let fine = args(&["--disk=path=/a/x,socket=/s", "--disk=path=/b/x,socket=/t,id=y"]).unwrap();
        assert_eq!(fine.disks().unwrap().len(), 2);
    }
}
