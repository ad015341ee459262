//! The arguments of one served disk. `--disk` and a configuration file have the same keys and rules.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::disk::Allocation;
use crate::error::{Error, ErrorKind, Result};
use crate::vhost::{MAX_QUEUE_SIZE, MAX_QUEUES, SocketAccess};

/// Default queue size: QEMU's maximum. (crosvm's default is 32768.)
const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// Default number of queues. The number does not depend on the machine, because the configuration of a front-end
/// contains it. The number is small, because crosvm uses all queues that are offered, and each queue has a thread.
const DEFAULT_QUEUES: u16 = 4;
/// Maximum length of a virtio-blk serial number in bytes.
const MAX_SERIAL_BYTES: usize = 20;

/// Cache mode that the guest sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CacheMode {
    /// The disk has a write cache, which the guest flushes
    #[default]
    Writeback,
    /// Every write is durable when it completes
    Writethrough,
}

/// When the file system allocates space for new blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AllocationArg {
    /// Space is allocated when data is written
    #[default]
    Sparse,
    /// Space for whole blocks is allocated in advance
    Block,
}

impl From<AllocationArg> for Allocation {
    fn from(arg: AllocationArg) -> Allocation {
        match arg {
            AllocationArg::Sparse => Allocation::Sparse,
            AllocationArg::Block => Allocation::Block,
        }
    }
}

/// Arguments of one served disk.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DiskArgs {
    pub(super) path: PathBuf,
    /// Path of the socket to create; `None` if the starting process hands a socket over.
    pub(super) socket: Option<PathBuf>,
    #[serde(skip)]
    pub(super) fd: Option<RawFd>,
    pub(super) id: Option<String>,
    #[serde(default)]
    pub(super) readonly: bool,
    pub(super) serial: Option<String>,
    pub(super) queues: Option<u16>,
    pub(super) queue_size: Option<u16>,
    #[serde(default)]
    pub(super) cache: CacheMode,
    #[serde(default)]
    pub(super) direct: bool,
    pub(super) allocation: Option<AllocationArg>,
    #[serde(default)]
    pub(super) allow_writable_parent: bool,
    /// Folders in which parents of this disk are accepted, in addition to the folders for all disks.
    #[serde(default)]
    pub(super) allow_parents: Vec<PathBuf>,
    /// Group of the socket, by name or number.
    pub(super) socket_group: Option<String>,
    /// Mode of the socket.
    #[serde(default, deserialize_with = "deserialize_socket_mode")]
    pub(super) socket_mode: Option<u32>,
}

/// The contents of a configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigFile {
    /// Path of the control socket.
    pub(super) control: Option<PathBuf>,
    #[serde(default)]
    pub(super) disk: Vec<DiskArgs>,
}

impl DiskArgs {
    /// Creates the arguments of a disk with a path and default values.
    pub(super) fn new(path: PathBuf) -> DiskArgs {
        DiskArgs {
            path,
            socket: None,
            fd: None,
            id: None,
            readonly: false,
            serial: None,
            queues: None,
            queue_size: None,
            cache: CacheMode::default(),
            direct: false,
            allocation: None,
            allow_writable_parent: false,
            allow_parents: Vec::new(),
            socket_group: None,
            socket_mode: None,
        }
    }

    /// Returns whether the group or the mode of the socket is given.
    pub(super) fn has_socket_access(&self) -> bool {
        self.socket_group.is_some() || self.socket_mode.is_some()
    }

    /// Returns group and mode of the socket to create. By default the owner may connect, and the group if one is given.
    ///
    /// # Errors
    /// * `NotFound`: the group does not exist.
    /// * `Io`: the group cannot be looked up.
    pub(super) fn socket_access(&self) -> Result<SocketAccess> {
        let group = self.socket_group.as_deref().map(resolve_group).transpose()?;
        let usual = if group.is_some() { 0o660 } else { 0o600 };
        Ok(SocketAccess { group, mode: self.socket_mode.unwrap_or(usual) })
    }

    /// Returns the name of the disk in the log and for clients: its id, or else its file name.
    pub(super) fn name(&self) -> String {
        let of_path = || self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned();
        self.id.clone().unwrap_or_else(of_path)
    }

    pub(super) fn queues(&self) -> u16 {
        self.queues.unwrap_or(DEFAULT_QUEUES)
    }

    pub(super) fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE)
    }
}

pub(super) fn read_config(file: &Path) -> Result<ConfigFile> {
    let text =
        std::fs::read_to_string(file).map_err(|e| Error::io("cannot read the configuration", e).at_path(file))?;
    parse_config(&text).map_err(|why| Error::new(ErrorKind::Invalid, why).at_path(file))
}

fn parse_config(text: &str) -> Result<ConfigFile, String> {
    let config: ConfigFile = toml::from_str(text).map_err(|e| toml_error(text, &e))?;
    if config.disk.is_empty() {
        return Err("there is no [[disk]] table".into());
    }
    for disk in &config.disk {
        let checks = [
            disk.queues.map(|n| parse_queues(&n.to_string()).map(drop)),
            disk.queue_size.map(|n| parse_queue_size(&n.to_string()).map(drop)),
            disk.serial.as_ref().map(|s| parse_serial(s).map(drop)),
        ];
        let wrong = checks.into_iter().flatten().find_map(|check| check.err());
        if let Some(why) = wrong {
            return Err(format!("disk {}: {why}", disk.name()));
        }
    }
    Ok(config)
}

/// Formats a TOML error with its line number.
pub(super) fn toml_error(text: &str, e: &toml::de::Error) -> String {
    let line = 1 + e.span().map_or(0, |s| text[..s.start].matches('\n').count());
    format!("line {line}: {}", e.message())
}

/// Returns the ID of a group that is given by name or ID.
fn resolve_group(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    match nix::unistd::Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        Ok(None) => Err(Error::new(ErrorKind::NotFound, format!("group {group:?} does not exist"))),
        Err(e) => Err(Error::io(format!("cannot look up the group {group:?}"), e.into())),
    }
}

/// Parses the mode of a socket: octal digits, as for chmod.
pub(super) fn parse_socket_mode(text: &str) -> Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777);
    mode.ok_or_else(|| format!("{text:?} is not a mode in octal digits up to 0777, such as 0660"))
}

fn deserialize_socket_mode<'de, D: Deserializer<'de>>(value: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(value)?;
    parse_socket_mode(&text).map(Some).map_err(D::Error::custom)
}

pub(super) fn parse_queues(text: &str) -> Result<u16, String> {
    let n = text.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
    n.ok_or_else(|| format!("the number of queues must be 1 to {MAX_QUEUES}"))
}

pub(super) fn parse_queue_size(text: &str) -> Result<u16, String> {
    let n = text.parse().ok().filter(|n: &u16| n.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(n));
    n.ok_or_else(|| format!("the queue size must be a power of two from 2 to {MAX_QUEUE_SIZE}"))
}

pub(super) fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() > MAX_SERIAL_BYTES {
        Err(format!("a serial has at most {MAX_SERIAL_BYTES} bytes"))
    } else {
        Ok(text.to_owned())
    }
}

fn parse_on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} must be on or off")),
    }
}

/// Splits at commas. Two commas in sequence are one comma of a value, as in QEMU.
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

pub(super) fn parse_disk(text: &str) -> Result<DiskArgs, String> {
    let mut seen = Vec::new();
    let mut disk = DiskArgs::new(PathBuf::new());
    for pair in split_pairs(text) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not key=value"))?;
        if value.is_empty() {
            return Err(format!("key {key:?} has no value"));
        }
        if key != "allow-parents" && seen.contains(&key.to_owned()) {
            return Err(format!("key {key:?} is given twice"));
        }
        seen.push(key.to_owned());
        match key {
            "path" => disk.path = value.into(),
            "socket" => disk.socket = Some(value.into()),
            "id" => disk.id = Some(value.into()),
            "readonly" => disk.readonly = parse_on_off(value)?,
            "serial" => disk.serial = Some(parse_serial(value)?),
            "queues" => disk.queues = Some(parse_queues(value)?),
            "queue-size" => disk.queue_size = Some(parse_queue_size(value)?),
            "cache" => disk.cache = CacheMode::from_str(value, false)?,
            "direct" => disk.direct = parse_on_off(value)?,
            "allocation" => disk.allocation = Some(AllocationArg::from_str(value, false)?),
            "allow-writable-parent" => disk.allow_writable_parent = parse_on_off(value)?,
            "allow-parents" => disk.allow_parents.push(value.into()),
            "socket-group" => disk.socket_group = Some(value.into()),
            "socket-mode" => disk.socket_mode = Some(parse_socket_mode(value)?),
            _ => return Err(format!("unknown key {key:?}")),
        }
    }
    if disk.path.as_os_str().is_empty() {
        return Err("key \"path\" is missing".into());
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_parsed_from_keys() {
        let d = parse_disk(
            "path=/a,,b.vhd,socket=/s,id=x,readonly=on,serial=S 1,queues=64,queue-size=32768,\
                      cache=writethrough,direct=on,allocation=block,allow-writable-parent=on,allow-parents=/i,,j,allow-parents=/k,\
                      socket-group=kvm,socket-mode=0660",
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
            cache: CacheMode::Writethrough,
            direct: true,
            allocation: Some(AllocationArg::Block),
            allow_writable_parent: true,
            allow_parents: vec!["/i,j".into(), "/k".into()],
            socket_group: Some("kvm".into()),
            socket_mode: Some(0o660),
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
            "path=/a,allocation=thin",
            "path=/a,serial=123456789012345678901",
            "path=/a,socket-mode=rw",
            "path=/a,socket-mode=0888",
            "path=/a,socket-mode=1777",
            "path=/a,socket-mode=+660",
            "path=/a,socket-group=x,socket-group=y",
            "path=",
            "path=/a,",
        ] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_are_read_from_a_configuration_file() {
        let text = "[[disk]]\npath = \"/a\"\nsocket = \"/s\"\nreadonly = true\nqueue-size = 256\n\
                    allow-writable-parent = true\n\
                    [[disk]]\npath = \"/b\"\ncache = \"writethrough\"\nallocation = \"block\"\n";
        let disks = parse_config(text).unwrap().disk;
        assert_eq!((disks.len(), disks[0].queue_size(), disks[1].cache), (2, 256, CacheMode::Writethrough));
        assert_eq!((disks[0].allocation, disks[1].allocation), (None, Some(AllocationArg::Block)));
        assert_eq!(
            parse_disk("path=/a,socket=/s,readonly=on,queue-size=256,allow-writable-parent=on").unwrap(),
            disks[0]
        );
        let text =
            "[[disk]]\npath = \"/a\"\nallow-parents = [\"/i\", \"/j\"]\nsocket-group = \"9\"\nsocket-mode = \"660\"\n";
        let same = parse_disk("path=/a,allow-parents=/i,allow-parents=/j,socket-group=9,socket-mode=660").unwrap();
        assert_eq!(parse_config(text).unwrap().disk, [same]);
        let text = "control = \"/run/c\"\n[[disk]]\npath = \"/a\"\n";
        assert_eq!(parse_config(text).unwrap().control, Some("/run/c".into()));
        assert!(parse_config("[[disk]]\npath = \"/a\"\nsocket-mode = 660\n").is_err(), "a decimal number is no mode");
        let why = parse_config("[[disk]]\npath = \"/a\"\ncolour = \"red\"\n").unwrap_err();
        assert!(why.starts_with("line 3: unknown field `colour`"), "{why}");
        for bad in ["", "[[disk]]\npath=\"/a\"\nqueues=0\n", "[[disk]]\nsocket=\"/a\"\n", "disk = 1", "[other]\n"] {
            assert!(parse_config(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn group_and_mode_of_the_socket() {
        let access = |text: &str| parse_disk(&format!("path=/a{text}")).unwrap().socket_access();
        assert_eq!(access("").unwrap(), SocketAccess { group: None, mode: 0o600 });
        assert_eq!(access(",socket-group=77").unwrap(), SocketAccess { group: Some(77), mode: 0o660 });
        assert_eq!(access(",socket-group=root").unwrap().group, Some(0));
        assert_eq!(access(",socket-mode=666").unwrap(), SocketAccess { group: None, mode: 0o666 });
        assert_eq!(access(",socket-group=no-such-group").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
