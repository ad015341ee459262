//! The command line of `diffdisk`.

use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};

use super::ctl_args::CtlArgs;
use super::log_level::LogLevel;
use super::size::{parse_alignment, parse_block_size, parse_size};
use super::system_config::SystemConfig;
use crate::image::FooterChoice;
use crate::ops::SourceFormat;
use crate::ops::create::Locators;
use crate::units::BlockSize;

/// Creates, inspects, checks, merges, converts and compares VHD images and chains of them.
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

/// Options of all verbs.
#[derive(Group, Debug)]
pub(super) struct CommonArgs {
    /// A folder in which parents are accepted, besides the folder of the image (repeatable)
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) allow_parents: Vec<PathBuf>,
    /// The folder with the live journals of this user's daemons, which contain acknowledged writes that are not in the
    /// images yet [default: /run/diffdisk or $XDG_RUNTIME_DIR/diffdisk; a folder in /dev/shm if that is not on tmpfs]
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) runtime_dir: Option<PathBuf>,
    /// Discard the live journal of the image, and so the acknowledged writes that a killed daemon did not write to the
    /// image. The guest must have ended
    #[arg(long, global = true)]
    pub(super) discard_journal: bool,
    /// Do not read /etc/diffdisk/diffdisk.toml (its keys: allow-parents, runtime-dir)
    #[arg(long, global = true)]
    pub(super) no_system_config: bool,
    /// No progress bar, and no summary on standard output
    #[arg(long, short, global = true)]
    pub(super) quiet: bool,
    /// The most detailed level that is logged to standard error
    #[arg(long, value_enum, default_value = "warn", value_name = "LEVEL", global = true)]
    pub(super) log_level: LogLevel,
}

impl CommonArgs {
    /// Adds the settings of the system configuration. A runtime folder on the command line has priority.
    pub(super) fn add_system_config(&mut self, config: SystemConfig) {
        self.allow_parents.extend(config.allow_parents);
        self.runtime_dir = self.runtime_dir.take().or(config.runtime_dir);
    }
}

/// Sizes are numbers of bytes, or with K, M, G, T as powers of 1024.
#[derive(Subcommand, Debug)]
pub(super) enum Verb {
    /// Create a root image, or with --parent a differencing child
    Create(CreateArgs),
    /// Show the header fields and the allocation of an image; the image may be in use
    Info(InfoArgs),
    /// Check an image against all rules of the format; changes nothing without --repair
    Check(CheckArgs),
    /// List the children of an image: the images that record its UUID as the UUID of their parent
    Children(ChildrenArgs),
    /// Show which file of the chain contains each range of the disk
    Map(MapArgs),
    /// Copy a disk as its guest sees it; holes stay holes
    Convert(ConvertArgs),
    /// List the sectors that changed since an ancestor: the input of an incremental backup
    Diff(DiffArgs),
    /// Compare two disks as their guests see them
    Compare(CompareArgs),
    /// Merge a child, and the images between, into its parent or another ancestor
    ///
    /// The contents of the child and of the images between are copied into the ancestor, which keeps its file name and
    /// then shows the child's disk. The files of the child and of the images between are removed. Children of the child
    /// become children of the ancestor if they are in a folder of the chain or in one given by --allow-parents. No
    /// other process may have the files open.
    ///
    /// The merge is refused if the ancestor, or an image between, has another child in one of these folders, since the
    /// disk of that child would change. If a merge is interrupted (Ctrl-C, a full file system, a power cut), all images
    /// are valid and the disk is unchanged. The same command continues the merge, and --abandon abandons it. Until then
    /// a partly overwritten ancestor cannot be opened by itself.
    Merge(MergeArgs),
    /// Copy the contents of the parents into a child, so that it needs no parent, or only the given ancestor
    Flatten(FlattenArgs),
    /// Change the parent of a child
    Rebase(RebaseArgs),
    /// Free the space that an image does not need
    Compact(CompactArgs),
    /// Change the size of a disk
    Resize(ResizeArgs),
    /// Replay the live journal of a killed daemon into its image, without serving the image
    Settle(SettleArgs),
    /// Ask a running daemon about its disks, take snapshots, watch its events, or end it
    Ctl(CtlArgs),
}

#[derive(Group, Debug)]
pub(super) struct SettleArgs {
    /// The image
    pub(super) path: PathBuf,
}

#[derive(Group, Debug)]
pub(super) struct MergeArgs {
    /// The image to merge; its file is removed at the end
    pub(super) child: PathBuf,
    /// The image to merge into [default: the parent]
    #[arg(long, value_name = "ANCESTOR")]
    pub(super) into: Option<PathBuf>,
    /// Abandon an unfinished merge of CHILD
    ///
    /// If nothing or everything was copied, no trace of the merge remains. If a part was copied, the ancestor can only
    /// be read as part of the chain of CHILD, and the merge can still be finished.
    #[arg(long, conflicts_with = "changed_parent")]
    pub(super) abandon: bool,
    /// Merge although a parent file was modified after its child recorded the modification time
    #[arg(long)]
    pub(super) changed_parent: bool,
}

#[derive(Group, Debug)]
pub(super) struct CreateArgs {
    /// The image to create; it must not exist
    pub(super) path: PathBuf,
    /// Size of the disk: 512, 64K, 10M, 2G, 1T [default with --parent: the parent's]
    #[arg(long, value_parser = parse_size, required_unless_present = "parent")]
    pub(super) size: Option<u64>,
    /// Type of the root image
    #[arg(long = "type", value_enum, default_value = "dynamic", conflicts_with = "parent")]
    pub(super) kind: RootKind,
    /// Block size, a power of two from 4K to 256M [default: the parent's, or 2M]
    #[arg(long, value_parser = parse_block_size)]
    pub(super) block_size: Option<BlockSize>,
    /// Reserve entries in the block allocation table, so that the disk can grow to this size
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(super) reserve_size: Option<u64>,
    /// Allocate all blocks now: the file has its full size and is not fragmented. `compact` frees what was not written
    #[arg(long)]
    pub(super) preallocate: bool,
    /// Create a child of this image
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
    /// Open the parents, too, and show each file of the chain
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
    /// Check the parents, too, and the links between them
    #[arg(long)]
    pub(super) chain: bool,
    /// Repair all defects that have only one possible repair (with --chain in the parents, too). The replaced bytes are
    /// saved in IMAGE.repair-*.undo. An image that has lost sectors is not changed
    #[arg(long)]
    pub(super) repair: bool,
    /// The footer to use, if both footers are valid but contradict each other
    #[arg(long, value_enum, value_name = "FOOTER", requires = "repair")]
    pub(super) take: Option<FooterArg>,
    /// Undo a repair: restore every byte of the image from the undo file of the repair
    #[arg(long, value_name = "FILE", conflicts_with_all = ["repair", "chain", "json"])]
    pub(super) undo: Option<PathBuf>,
    /// One JSON document
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FooterArg {
    /// The copy at the beginning of the file
    Front,
    /// The footer at the end of the file
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
    /// The image, whose folder is searched
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
    /// One JSON array. Depth 0 is the image itself. Depth, file and offset are null if no file contains the range
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Group, Debug)]
pub(super) struct ConvertArgs {
    /// The disk to copy: an image, or with --from raw a file or a block device
    pub(super) source: PathBuf,
    /// The file to create; with --to raw also - for standard output, or (with --force) a block device to overwrite
    pub(super) destination: PathBuf,
    /// Format of the destination
    #[arg(long, value_enum)]
    pub(super) to: TargetFormatArg,
    /// Format of the source. It is never detected, since a guest could write data that looks like an image
    #[arg(long, value_enum, default_value = "vhd")]
    pub(super) from: SourceFormatArg,
    /// Block size of a dynamic image, a power of two from 4K to 256M
    #[arg(long, value_parser = parse_block_size, default_value = "2M")]
    pub(super) block_size: BlockSize,
    /// Round the size of the disk up to a multiple of this; Azure requires fixed disks of a multiple of 1M
    #[arg(long, value_parser = parse_alignment, value_name = "SIZE", default_value = "1", hide_default_value = true)]
    pub(super) align: u64,
    /// Give the copy the UUID of the source; both must be VHDs. Children accept either of the two as their parent
    #[arg(long)]
    pub(super) keep_uuid: bool,
    /// Replace an existing file, atomically at the end; or overwrite a block device in place
    #[arg(long)]
    pub(super) force: bool,
    /// Copy what can be read of a disk whose files have lost sectors. Lost ranges become zeros and are listed. The
    /// source is never written
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
    /// The first disk
    pub(super) a: PathBuf,
    /// The second disk
    pub(super) b: PathBuf,
    /// Format of the disks; if given twice, the first is for A and the second for B
    #[arg(long, value_enum, default_value = "vhd")]
    pub(super) from: Vec<SourceFormatArg>,
}

#[derive(Group, Debug)]
pub(super) struct FlattenArgs {
    /// The child; the parents are only read
    pub(super) child: PathBuf,
    /// Keep this ancestor as the parent, instead of none
    #[arg(long, value_name = "ANCESTOR")]
    pub(super) keep: Option<PathBuf>,
}

#[derive(Group, Debug)]
pub(super) struct RebaseArgs {
    /// The child. Its disk does not change: sectors that differ in the new parent are copied into the child
    pub(super) child: PathBuf,
    /// The new parent
    #[arg(long, value_name = "NEW")]
    pub(super) parent: PathBuf,
    /// Copy nothing: the new parent is the old one under another path, or an exact copy of it. The old parent need not
    /// exist. If NEW is the current parent, only the modification time of its file is recorded again
    #[arg(long)]
    pub(super) r#unsafe: bool,
}

#[derive(Group, Debug)]
pub(super) struct CompactArgs {
    /// The image. Blocks that do not change the disk are removed, zeros become holes, gaps are closed
    pub(super) path: PathBuf,
}

#[derive(Group, Debug)]
pub(super) struct ResizeArgs {
    /// The image. Its children keep their sizes and contents
    pub(super) path: PathBuf,
    /// The new size of the disk, a multiple of 512; added sectors read as zeros
    #[arg(value_parser = parse_size)]
    pub(super) size: u64,
    /// Allow a smaller size, provided that the removed sectors are zeros
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
