//! The command line of `diffdisk`.

use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};

use super::size::{parse_alignment, parse_block_size, parse_size};
use super::system_config::SystemConfig;
use crate::image::FooterChoice;
use crate::ops::SourceFormat;
use crate::ops::create::Locators;
use crate::units::BlockSize;

/// Makes, inspects, checks, merges, converts and compares VHD images and chains of them.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage, 3 check found corruption, 4 check found only leaks or cosmetic faults,
/// 5 compare found a difference.
#[derive(Parser, Debug)]
#[command(name = "diffdisk", version)]
pub(super) struct ToolArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

/// What all verbs take.
#[derive(Group, Debug)]
pub(super) struct CommonArgs {
    /// Where parents may lie besides the folder of the image that is named (repeatable)
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) allow_parents: Vec<PathBuf>,
    /// Where the live journals of this user's daemons are: what they acknowledged and did not write yet
    /// [default: /run/diffdisk or diffdisk in $XDG_RUNTIME_DIR; in /dev/shm where those are not on tmpfs]
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) runtime_dir: Option<PathBuf>,
    /// Give up what a killed daemon acknowledged and did not write to the image that is named: its guest must be gone
    #[arg(long, global = true)]
    pub(super) discard_journal: bool,
    /// Do not read /etc/diffdisk/diffdisk.toml (its keys: allow-parents, runtime-dir)
    #[arg(long, global = true)]
    pub(super) no_system_config: bool,
    /// No progress bar, and nothing on standard output that was not asked for
    #[arg(long, short, global = true)]
    pub(super) quiet: bool,
    /// What is logged to standard error
    #[arg(long, value_enum, default_value = "warn", value_name = "LEVEL", global = true)]
    pub(super) log_level: LogLevel,
}

impl CommonArgs {
    /// Adds what the machine's configuration says and the command line does not.
    pub(super) fn add_system_config(&mut self, config: SystemConfig) {
        self.allow_parents.extend(config.allow_parents);
        self.runtime_dir = self.runtime_dir.take().or(config.runtime_dir);
    }
}

/// Levels of the log.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub(super) fn filter(self) -> log::LevelFilter {
        match self {
            LogLevel::Off => log::LevelFilter::Off,
            LogLevel::Error => log::LevelFilter::Error,
            LogLevel::Warn => log::LevelFilter::Warn,
            LogLevel::Info => log::LevelFilter::Info,
            LogLevel::Debug => log::LevelFilter::Debug,
            LogLevel::Trace => log::LevelFilter::Trace,
        }
    }
}

/// Sizes are numbers of bytes, or with K, M, G, T as powers of 1024.
#[derive(Subcommand, Debug)]
pub(super) enum Verb {
    /// Make a new root image, or with --parent a differencing child
    Create(CreateArgs),
    /// Tell what an image says of itself; it may be in use
    Info(InfoArgs),
    /// Hold an image against every rule of the format; nothing is changed without --repair
    Check(CheckArgs),
    /// List the images that stand on an image: those that record its UUID as their parent's
    Children(ChildrenArgs),
    /// Tell which file of the chain answers each range of the disk
    Map(MapArgs),
    /// Copy the disk as its guest sees it; holes stay holes
    Convert(ConvertArgs),
    /// Tell what was written since an ancestor, by the sector: the input of an incremental backup
    Diff(DiffArgs),
    /// Compare what guests see of two disks
    Compare(CompareArgs),
    /// Fold a child, and all between, into its parent or another ancestor
    ///
    /// The ancestor's file receives what the child says, and keeps its name: afterwards it shows the child's disk. The
    /// child's file is removed, with those between. Children of the child that lie in a folder of the chain (or in one
    /// given by --allow-parents) become children of the ancestor. Nobody may have the files open meanwhile.
    ///
    /// Refused where the ancestor, or an image between, has another child in one of these folders, whose disk would
    /// change. Whatever ends a merge (Ctrl-C, a full host, a power cut) leaves every image valid and the disk as it was;
    /// the same command continues, and --abandon gives it up. Until then nobody reads a half-merged image by mistake.
    Merge(MergeArgs),
    /// Make a child stand alone, or on one of its ancestors: what it shows of its parents is copied into it
    Flatten(FlattenArgs),
    /// Give a child another parent
    Rebase(RebaseArgs),
    /// Give back room that an image takes without need
    Compact(CompactArgs),
    /// Give a disk another size
    Resize(ResizeArgs),
    /// Write to an image what its killed daemon acknowledged, without serving it
    Settle(SettleArgs),
}

#[derive(Group, Debug)]
pub(super) struct SettleArgs {
    /// The image
    pub(super) path: PathBuf,
}

#[derive(Group, Debug)]
pub(super) struct MergeArgs {
    /// The image to fold; it is removed in the end
    pub(super) child: PathBuf,
    /// What receives it [default: its parent]
    #[arg(long, value_name = "ANCESTOR")]
    pub(super) into: Option<PathBuf>,
    /// Give up a merge of CHILD that was begun and not finished
    ///
    /// If nothing was copied, or everything, nothing is left of it. If a part was copied, the image that received it stays
    /// readable only below CHILD, and the merge may still be finished.
    #[arg(long, conflicts_with = "changed_parent")]
    pub(super) abandon: bool,
    /// Merge although a parent was written to after its child recorded the time of that parent's file
    #[arg(long)]
    pub(super) changed_parent: bool,
}

#[derive(Group, Debug)]
pub(super) struct CreateArgs {
    /// The image to make; it must not exist
    pub(super) path: PathBuf,
    /// Size of the disk: 512, 64K, 10M, 2G, 1T. With --parent the parent's if not given
    #[arg(long, value_parser = parse_size, required_unless_present = "parent")]
    pub(super) size: Option<u64>,
    /// Kind of root
    #[arg(long = "type", value_enum, default_value = "dynamic", conflicts_with = "parent")]
    pub(super) kind: RootKind,
    /// Size of a block, a power of two from 4K to 256M [default: the parent's, or 2M]
    #[arg(long, value_parser = parse_block_size)]
    pub(super) block_size: Option<BlockSize>,
    /// Leave room in the block table to grow to this size
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(super) reserve_size: Option<u64>,
    /// Give every block its place and its room on the host now: the file has its full size and is not fragmented.
    /// `compact` gives back what was not written
    #[arg(long)]
    pub(super) preallocate: bool,
    /// Make a child of this image
    #[arg(long)]
    pub(super) parent: Option<PathBuf>,
    /// Which paths to the parent the child records
    #[arg(long, value_enum, default_value = "both", requires = "parent")]
    pub(super) locator: LocatorArg,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RootKind {
    Dynamic,
    Fixed,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum LocatorArg {
    Relative,
    Absolute,
    Both,
}

impl From<LocatorArg> for Locators {
    fn from(locator: LocatorArg) -> Locators {
        match locator {
            LocatorArg::Relative => Locators::Relative,
            LocatorArg::Absolute => Locators::Absolute,
            LocatorArg::Both => Locators::Both,
        }
    }
}

#[derive(Group, Debug)]
pub(super) struct InfoArgs {
    /// The image
    pub(super) path: PathBuf,
    /// Open its parents, too, and tell of each file of the chain
    #[arg(long)]
    pub(super) chain: bool,
    /// One JSON document. For a fixed image block_size, blocks and blocks_allocated are null; `resolved` is null
    /// without --chain
    #[arg(long, verbatim_doc_comment)]
    pub(super) json: bool,
}

#[derive(Group, Debug)]
pub(super) struct CheckArgs {
    /// The image
    pub(super) path: PathBuf,
    /// Check its parents, too, and the links between them
    #[arg(long)]
    pub(super) chain: bool,
    /// Mend what needs no guessing (with --chain in its parents, too); what is replaced is kept in IMAGE.repair-*.undo.
    /// An image that has lost sectors is left as it is
    #[arg(long)]
    pub(super) repair: bool,
    /// Of two valid footers that contradict each other, the one that is right
    #[arg(long, value_enum, value_name = "FOOTER", requires = "repair")]
    pub(super) take: Option<FooterArg>,
    /// Undo a repair: make the image byte by byte what it was, by the undo file that the repair left
    #[arg(long, value_name = "FILE", conflicts_with_all = ["repair", "chain", "json"])]
    pub(super) undo: Option<PathBuf>,
    /// One JSON document
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FooterArg {
    /// The copy at the start of the file
    Front,
    /// The one at the end of the file
    End,
}

impl From<FooterArg> for FooterChoice {
    fn from(take: FooterArg) -> FooterChoice {
        match take {
            FooterArg::Front => FooterChoice::Front,
            FooterArg::End => FooterChoice::End,
        }
    }
}

#[derive(Group, Debug)]
pub(super) struct ChildrenArgs {
    /// The image. Its own folder is searched
    pub(super) path: PathBuf,
    /// Search this folder, too (repeatable)
    #[arg(long = "in", value_name = "DIR")]
    pub(super) folders: Vec<PathBuf>,
    /// One JSON array of path and uuid
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Group, Debug)]
pub(super) struct DiffArgs {
    /// The image
    pub(super) child: PathBuf,
    /// The ancestor to compare with [default: its parent]
    #[arg(long, value_name = "ANCESTOR")]
    pub(super) since: Option<PathBuf>,
    /// One JSON array of start and length in bytes
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Group, Debug)]
pub(super) struct MapArgs {
    /// The image
    pub(super) path: PathBuf,
    /// One JSON array; depth 0 is the image itself, and where no file answers depth, file and offset are null
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Group, Debug)]
pub(super) struct ConvertArgs {
    /// The disk to copy: an image, or with --from raw a file or a block device
    pub(super) source: PathBuf,
    /// The file to make, or - for standard output, or (with --force) a block device to overwrite; these two only with
    /// --to raw
    pub(super) destination: PathBuf,
    /// What to make
    #[arg(long, value_enum)]
    pub(super) to: TargetFormatArg,
    /// What the source is; it is never guessed, since a guest could write what looks like an image
    #[arg(long, value_enum, default_value = "vhd")]
    pub(super) from: SourceFormatArg,
    /// Size of a block of a dynamic image, a power of two from 4K to 256M
    #[arg(long, value_parser = parse_block_size, default_value = "2M")]
    pub(super) block_size: BlockSize,
    /// Round the size of the disk up to a multiple of this; Azure asks for fixed disks of whole 1M
    #[arg(long, value_parser = parse_alignment, value_name = "SIZE", default_value = "1", hide_default_value = true)]
    pub(super) align: u64,
    /// Give the copy the UUID of the source, from an image to an image. Children take either of the two for their parent
    #[arg(long)]
    pub(super) keep_uuid: bool,
    /// Replace an existing file, at the end and all at once; or overwrite a block device, in place
    #[arg(long)]
    pub(super) force: bool,
    /// Copy what is left of a disk whose files have lost sectors; what is given up becomes zeros, and is listed. The source
    /// is never written to
    #[arg(long)]
    pub(super) salvage: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TargetFormatArg {
    Raw,
    Fixed,
    Dynamic,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SourceFormatArg {
    Raw,
    Vhd,
}

impl From<SourceFormatArg> for SourceFormat {
    fn from(source: SourceFormatArg) -> SourceFormat {
        match source {
            SourceFormatArg::Raw => SourceFormat::Raw,
            SourceFormatArg::Vhd => SourceFormat::Vhd,
        }
    }
}

#[derive(Group, Debug)]
pub(super) struct CompareArgs {
    /// One disk
    pub(super) a: PathBuf,
    /// The other one
    pub(super) b: PathBuf,
    /// What the disks are; given twice, the first is for A and the second for B
    #[arg(long, value_enum, default_value = "vhd")]
    pub(super) from: Vec<SourceFormatArg>,
}

#[derive(Group, Debug)]
pub(super) struct FlattenArgs {
    /// The child; its parents are only read
    pub(super) child: PathBuf,
    /// Stand on this one of its parents instead of alone
    #[arg(long, value_name = "ANCESTOR")]
    pub(super) keep: Option<PathBuf>,
}

#[derive(Group, Debug)]
pub(super) struct RebaseArgs {
    /// The child. What it shows does not change: what the new parent would show differently is copied into it
    pub(super) child: PathBuf,
    /// The image it is to stand on
    #[arg(long, value_name = "NEW")]
    pub(super) parent: PathBuf,
    /// Copy nothing: the parent was moved, or is known to be a copy of the old one. The old one need not be there. With
    /// the parent that the child has, only the time of the parent's file is recorded again
    #[arg(long)]
    pub(super) r#unsafe: bool,
}

#[derive(Group, Debug)]
pub(super) struct CompactArgs {
    /// The image: blocks go that say nothing but what the chain beneath says, zeros become holes, gaps are closed
    pub(super) path: PathBuf,
}

#[derive(Group, Debug)]
pub(super) struct ResizeArgs {
    /// The image. Its children keep their own sizes and contents
    pub(super) path: PathBuf,
    /// The new size of the disk, a multiple of 512; what is added reads as zeros
    #[arg(value_parser = parse_size)]
    pub(super) size: u64,
    /// The disk may become smaller, where nothing but zeros is cut off
    #[arg(long)]
    pub(super) shrink: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        ToolArgs::command().debug_assert();
    }
}
