//! The arguments of `diffdiskd`: one disk by options, many by `--disk` or a file, all becoming [`DiskArgs`].

use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use clap::{Parser, ValueEnum};
use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::EngineKind;
use crate::vhost::{MAX_QUEUE_SIZE, MAX_QUEUES};

/// A queue's size unless told otherwise: what QEMU allows at most. crosvm's own default is 32768.
const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// Queues unless told otherwise, at most: crosvm takes as many as are offered, and each has a thread here.
const DEFAULT_QUEUES: usize = 4;
/// Bytes of a virtio-blk serial.
const SERIAL: usize = 20;

/// What becomes of writes while the host's file system is full.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OnEnospc {
    /// They are held until there is room again; reads and flushes go on
    Park,
    /// They fail
    Error,
}

/// Serves differencing VHD chains to virtual machines over vhost-user-blk.
#[derive(Parser, Debug)]
#[command(name = "diffdiskd", version, about, max_term_width = 100)]
pub(super) struct Args {
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub(super) print_capabilities: bool,

    /// The image to serve (one disk)
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["disk", "config"],
          required_unless_present_any = ["disk", "config", "print_capabilities"])]
    blk_file: Option<PathBuf>,

    /// Listen on this socket (made with mode 0600, removed at exit)
    #[arg(long, value_name = "PATH", conflicts_with_all = ["fd", "disk", "config"])]
    socket_path: Option<PathBuf>,

    /// Use this open file descriptor: a listening socket, or one connected to the front-end
    #[arg(long, value_name = "N", conflicts_with_all = ["disk", "config"])]
    fd: Option<RawFd>,

    /// Refuse writes
    #[arg(long, conflicts_with_all = ["disk", "config"])]
    read_only: bool,

    /// Queues offered, 1 to 64 [default: the number of CPUs, at most 4]
    #[arg(long, value_name = "N", value_parser = queues, conflicts_with_all = ["disk", "config"])]
    num_queues: Option<u16>,

    /// Entries of a queue at most, a power of two up to 32768 [default: 1024]
    #[arg(long, value_name = "N", value_parser = queue_size, conflicts_with_all = ["disk", "config"])]
    queue_size: Option<u16>,

    /// Whether the guest sees a write cache [default: writeback]
    #[arg(long, value_name = "MODE", conflicts_with_all = ["disk", "config"])]
    cache: Option<Cache>,

    /// Bypass the host's page cache
    #[arg(long, conflicts_with_all = ["disk", "config"])]
    direct: bool,

    /// The serial number that the guest sees, at most 20 bytes
    #[arg(long, value_name = "TEXT", value_parser = serial, conflicts_with_all = ["disk", "config"])]
    serial: Option<String>,

    /// A disk (repeatable): path=IMAGE,socket=PATH[,id=NAME][,readonly=on|off][,serial=TEXT][,queues=N]
    /// [,queue-size=N][,cache=writeback|writethrough][,direct=on|off]; a comma in a value is doubled
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = disk)]
    disk: Vec<DiskArgs>,

    /// A TOML file with a [[disk]] table a disk, of the same keys
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// A folder where parents may lie besides the child's own (repeatable)
    #[arg(long, value_name = "DIR")]
    pub(super) allow_parents: Vec<PathBuf>,

    /// Where to keep what must outlive this process but not the host: a folder on tmpfs
    /// [default: /run/diffdisk, or diffdisk in $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR")]
    pub(super) runtime_dir: Option<PathBuf>,

    /// Give up what a killed predecessor acknowledged to a guest that is gone
    #[arg(long)]
    pub(super) discard_journal: bool,

    /// What becomes of writes while the host's file system is full
    #[arg(long, value_name = "POLICY", default_value = "park")]
    pub(super) on_enospc: OnEnospc,

    /// How much to tell on standard error
    #[arg(long, value_name = "LEVEL", default_value = "info",
          value_parser = clap::builder::PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"]))]
    pub(super) log_level: String,

    /// Microseconds for which a queue is polled after it was busy, before its thread sleeps
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub(super) poll_us: u64,

    /// What carries out I/O
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    io_engine: IoEngine,
}

/// The guest's view of caching.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Cache {
    /// There is a write cache, which the guest flushes.
    #[default]
    Writeback,
    /// Every write is durable when it is complete.
    Writethrough,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum IoEngine {
    /// io_uring where the host allows it, else blocking calls
    Auto,
    /// io_uring, or an error
    IoUring,
    /// Plain calls, one an operation
    Blocking,
}

/// One disk to serve.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DiskArgs {
    pub(super) path: PathBuf,
    /// Where to listen; none: a socket is handed over.
    pub(super) socket: Option<PathBuf>,
    #[serde(skip)]
    pub(super) fd: Option<RawFd>,
    id: Option<String>,
    #[serde(default)]
    pub(super) readonly: bool,
    pub(super) serial: Option<String>,
    queues: Option<u16>,
    queue_size: Option<u16>,
    #[serde(default)]
    pub(super) cache: Cache,
    #[serde(default)]
    pub(super) direct: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    disk: Vec<DiskArgs>,
}

impl DiskArgs {
    fn of(path: PathBuf) -> DiskArgs {
        let (socket, fd, id, serial, queues, queue_size) = Default::default();
        let cache = Cache::default();
        DiskArgs { path, socket, fd, id, readonly: false, serial, queues, queue_size, cache, direct: false }
    }

    /// Its name in the log.
    pub(super) fn name(&self) -> String {
        let of_path = || self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned();
        self.id.clone().unwrap_or_else(of_path)
    }

    pub(super) fn queues(&self) -> u16 {
        let cpus = || available_parallelism().map_or(1, NonZeroUsize::get).min(DEFAULT_QUEUES);
        self.queues.unwrap_or_else(|| u16::try_from(cpus()).expect("at most 4"))
    }

    pub(super) fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE)
    }
}

impl Args {
    /// What carries out I/O.
    pub(super) fn engine(&self) -> EngineKind {
        match self.io_engine {
            IoEngine::Auto => EngineKind::Auto,
            IoEngine::IoUring => EngineKind::Ring,
            IoEngine::Blocking => EngineKind::Blocking,
        }
    }

    /// All disks to serve, from whichever form of arguments.
    ///
    /// # Errors
    /// Where the file cannot be read or is wrong, or two disks have one name or one socket.
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
                ..DiskArgs::of(path.clone())
            });
        }
        if let Some(file) = &self.config {
            disks.extend(read_config(file)?);
        }
        for (i, disk) in disks.iter().enumerate() {
            let earlier = &disks[..i];
            let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why));
            if earlier.iter().any(|d| d.name() == disk.name()) {
                return refuse(format!("two disks are called {:?}: tell them apart with id=", disk.name()));
            }
            if let Some(socket) = &disk.socket
                && earlier.iter().any(|d| d.socket.as_ref() == Some(socket))
            {
                return refuse(format!("two disks have the socket {}", socket.display()));
            }
        }
        Ok(disks)
    }
}

fn read_config(file: &Path) -> Result<Vec<DiskArgs>> {
    let text =
        std::fs::read_to_string(file).map_err(|e| Error::io("cannot read the configuration", e).at_path(file))?;
    parse_config(&text).map_err(|why| Error::new(ErrorKind::Invalid, why).at_path(file))
}

fn parse_config(text: &str) -> Result<Vec<DiskArgs>, String> {
    let config: Config = toml::from_str(text).map_err(|e| {
        let line = 1 + e.span().map_or(0, |s| text[..s.start].matches('\n').count());
        format!("line {line}: {}", e.message())
    })?;
    if config.disk.is_empty() {
        return Err("there is no [[disk]] table".into());
    }
    for disk in &config.disk {
        let checks = [
            disk.queues.map(|n| queues(&n.to_string()).map(drop)),
            disk.queue_size.map(|n| queue_size(&n.to_string()).map(drop)),
            disk.serial.as_ref().map(|s| serial(s).map(drop)),
        ];
        let wrong = checks.into_iter().flatten().find_map(|check| check.err());
        if let Some(why) = wrong {
            return Err(format!("disk {}: {why}", disk.name()));
        }
    }
    Ok(config.disk)
}

fn queues(text: &str) -> Result<u16, String> {
    let n = text.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
    n.ok_or_else(|| format!("the number of queues is 1 to {MAX_QUEUES}"))
}

fn queue_size(text: &str) -> Result<u16, String> {
    let n = text.parse().ok().filter(|n: &u16| n.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(n));
    n.ok_or_else(|| format!("the size of a queue is a power of two from 2 to {MAX_QUEUE_SIZE}"))
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL { Err(format!("a serial has at most {SERIAL} bytes")) } else { Ok(text.to_owned()) }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither on nor off")),
    }
}

/// Splits at commas; a doubled one is a comma of the value, as with QEMU.
fn split_pairs(text: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let last = pairs.last_mut().expect("never empty");
        match c {
            ',' if rest.next_if_eq(&',').is_some() => last.push(','),
            ',' => pairs.push(String::new()),
            c => last.push(c),
        }
    }
    pairs
}

fn disk(text: &str) -> Result<DiskArgs, String> {
    let mut seen = Vec::new();
    let mut disk = DiskArgs::of(PathBuf::new());
    for pair in split_pairs(text) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not key=value"))?;
        if value.is_empty() {
            return Err(format!("{key} has no value"));
        }
        if seen.contains(&key.to_owned()) {
            return Err(format!("{key} is given twice"));
        }
        seen.push(key.to_owned());
        match key {
            "path" => disk.path = value.into(),
            "socket" => disk.socket = Some(value.into()),
            "id" => disk.id = Some(value.into()),
            "readonly" => disk.readonly = switch(value)?,
            "serial" => disk.serial = Some(serial(value)?),
            "queues" => disk.queues = Some(queues(value)?),
            "queue-size" => disk.queue_size = Some(queue_size(value)?),
            "cache" => disk.cache = Cache::from_str(value, false)?,
            "direct" => disk.direct = switch(value)?,
            _ => return Err(format!("there is no key {key:?}")),
        }
    }
    if disk.path.as_os_str().is_empty() {
        return Err("path is missing".into());
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["diffdiskd"], list].concat())
    }

    #[test]
    fn one_disk_by_options() {
        let args = args(&["--socket-path=/run/s", "--blk-file=/a/b.vhd", "--read-only", "--num-queues=2"]).unwrap();
        let disks = args.disks().unwrap();
        let expected = DiskArgs {
            socket: Some("/run/s".into()),
            readonly: true,
            queues: Some(2),
            ..DiskArgs::of("/a/b.vhd".into())
        };
        assert_eq!(disks, [expected]);
        assert_eq!((disks[0].name(), disks[0].queue_size()), ("b.vhd".into(), 1024));
        assert!((1..=4).contains(&DiskArgs::of("x".into()).queues()));
    }

    #[test]
    fn a_disk_by_keys() {
        let d = disk(
            "path=/a,,b.vhd,socket=/s,id=x,readonly=on,serial=S 1,queues=64,queue-size=32768,\
                      cache=writethrough,direct=on",
        )
        .unwrap();
        let expected = DiskArgs {
            path: "/a,b.vhd".into(),
            socket: Some("/s".into()),
            fd: None,
            id: Some("x".into()),
            readonly: true,
            serial: Some("S 1".into()),
            queues: Some(64),
            queue_size: Some(32768),
            cache: Cache::Writethrough,
            direct: true,
        };
        assert_eq!(d, expected);
        for bad in [
            "",
            "socket=/s",
            "path=/a,colour=red",
            "path=/a,path=/b",
            "path=/a,queues=0",
            "path=/a,queues=65",
            "path=/a,queue-size=48",
            "path=/a,queue-size=65536",
            "path=/a,readonly=yes",
            "path=/a,cache=none",
            "path=/a,serial=123456789012345678901",
            "path=",
            "path=/a,",
        ] {
            assert!(disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_by_file() {
        let text = "[[disk]]\npath = \"/a\"\nsocket = \"/s\"\nreadonly = true\nqueue-size = 256\n\
                    [[disk]]\npath = \"/b\"\ncache = \"writethrough\"\n";
        let disks = parse_config(text).unwrap();
        assert_eq!((disks.len(), disks[0].queue_size(), disks[1].cache), (2, 256, Cache::Writethrough));
        assert_eq!(disk("path=/a,socket=/s,readonly=on,queue-size=256").unwrap(), disks[0]);
        let why = parse_config("[[disk]]\npath = \"/a\"\ncolour = \"red\"\n").unwrap_err();
        assert!(why.starts_with("line 3: unknown field `colour`"), "{why}");
        for bad in ["", "[[disk]]\npath=\"/a\"\nqueues=0\n", "[[disk]]\nsocket=\"/a\"\n", "disk = 1", "[other]\n"] {
            assert!(parse_config(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn wrong_usage() {
        for bad in [
            &[][..],
            &["--socket-path=/s"],
            &["--blk-file=/a", "--disk=path=/b"],
            &["--blk-file=/a", "--fd=3", "--socket-path=/s"],
            &["--disk=path=/a", "--read-only"],
            &["--disk=path=/a,x=y"],
            &["--blk-file=/a", "--log-level=loud"],
            &["--blk-file=/a", "--io-engine=magic"],
        ] {
            assert_eq!(args(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
        assert!(args(&["--print-capabilities"]).unwrap().print_capabilities);
        let engine = args(&["--blk-file=/a", "--io-engine=io_uring"]).unwrap().engine();
        assert_eq!(engine, EngineKind::Ring);
    }

    #[test]
    fn disks_are_told_apart() {
        let twice = args(&["--disk=path=/a/x,socket=/s", "--disk=path=/b/x,socket=/t"]).unwrap();
        assert!(twice.disks().unwrap_err().line().contains("id="));
        let shared = args(&["--disk=path=/a,socket=/s", "--disk=path=/b,socket=/s"]).unwrap();
        assert!(shared.disks().is_err());
        let fine = args(&["--disk=path=/a/x,socket=/s", "--disk=path=/b/x,socket=/t,id=y"]).unwrap();
        assert_eq!(fine.disks().unwrap().len(), 2);
    }
}
