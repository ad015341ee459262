//! The arguments of `diffdisk ctl`.

use std::path::PathBuf;

use clap::{Args as Group, Subcommand, ValueEnum};

use super::ctl_snapshot_args::{EXAMPLES, SnapshotArgs};
use super::size::parse_size;

#[derive(Group, Debug)]
pub(super) struct CtlArgs {
    /// The control socket of the daemon [default: $DIFFDISK_CONTROL, or the only socket *.control in the runtime folder
    /// on which a daemon listens]
    #[arg(long, value_name = "PATH", global = true)]
    pub(super) control: Option<PathBuf>,
    /// Print the result as JSON; with `watch`, one line for each event
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) verb: CtlVerb,
}

#[derive(Subcommand, Debug)]
pub(super) enum CtlVerb {
    /// Show the version of the daemon and of the protocol
    Version,
    /// List the disks of the daemon
    Disks,
    /// Show a disk: its size, socket, front-end, state, and the files of its chain
    Disk {
        /// Name of the disk
        disk: String,
    },
    /// Show the statistics of one disk, or of all disks
    Stats {
        /// Name of the disk [default: all disks]
        disk: Option<String>,
        /// JSON, or the text format of Prometheus [default: tables]
        #[arg(long, value_enum)]
        format: Option<StatsFormatArg>,
    },
    /// Keep the present contents of one or several disks, at one moment, while their guests continue
    ///
    /// The contents of each disk are kept in an image with a new name. The disk's own path then leads to a new child of
    /// that image, which takes the guest's writes. Each disk is followed by its own --keep-as, or one --keep-as serves
    /// for all disks.
    ///
    /// Prints where the contents are kept, and how long writes and flushes waited. The command waits until the snapshot
    /// has ended. If the command is interrupted, the daemon still takes the snapshot.
    #[command(after_help = EXAMPLES)]
    Snapshot(SnapshotArgs),
    /// Make a disk larger while it is served
    ///
    /// The added space reads as zeros. The guest's writes wait meanwhile, for some milliseconds, and its reads do not. The
    /// front-end gets a message, by which QEMU informs the guest. Other front-ends may need a command of their own, or a
    /// restart of the guest. The partitions and file systems of the guest keep their sizes.
    ///
    /// Prints the new size, how long writes waited, and whether the front-end was told. A disk is made smaller by
    /// `diffdisk resize --shrink`, while it is not served.
    Resize {
        /// Name of the disk, as `diffdisk ctl disks` prints it
        disk: String,
        /// New size of the disk in bytes, or with a unit (512M, 20G)
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Print events of the disks until the daemon ends
    Watch {
        /// Kinds of events: front_end, disk_full, room_again, poisoned, snapshot, resized [default: all]
        #[arg(value_name = "EVENT")]
        events: Vec<String>,
    },
    /// Print JSON Schemas of the methods, events and errors of the protocol
    Schema,
    /// End the daemon as SIGTERM does, and wait until it has ended
    Shutdown {
        /// Time in seconds after which the daemon exits even if its disks are not closed; the next daemon then recovers
        /// the acknowledged writes
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout_s: Option<u64>,
    },
}

/// The values of `--format`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum StatsFormatArg {
    Json,
    Prometheus,
}
