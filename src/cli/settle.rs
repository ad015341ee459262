//! The verb `settle`, and the option `--discard-journal`.

use std::path::{Path, PathBuf};

use super::args::{CommonArgs, SettleArgs, SourceFormatArg, Verb};
use super::exit::Exit;
use super::output::print_outcome;
use super::runtime_dir;
use crate::error::Result;
use crate::ops;
use crate::storage::host::Host;

/// Discards the live journals of the images whose disks are arguments of `verb`. Does nothing for `create`, `info`,
/// `children` and `ctl`. The journals of ancestors and of a new parent are not discarded.
///
/// # Errors
/// - `Busy` if another process holds a lock on an image
/// - `Refused`, `Invalid`, `NotFound` if an image cannot be opened
/// - `Refused` if the folder of `--runtime-dir` belongs to another user, or other users may write to it
/// - `Io`
pub(super) fn discard(verb: &Verb, common: &CommonArgs) -> Result<()> {
    let vhd = |path, from| (from == SourceFormatArg::Vhd).then_some(path);
    let named: Vec<Option<&PathBuf>> = match verb {
        Verb::Create(_) | Verb::Info(_) | Verb::Children(_) | Verb::Ctl(_) => Vec::new(),
        Verb::Check(a) => vec![Some(&a.path)],
        Verb::Map(a) => vec![Some(&a.path)],
        Verb::Diff(a) => vec![Some(&a.child)],
        Verb::Convert(a) => vec![vhd(&a.source, a.from)],
        Verb::Merge(a) => vec![Some(&a.child)],
        Verb::Compare(a) => {
            let from = |n: usize| a.from.get(n).or(a.from.first()).copied().unwrap_or(SourceFormatArg::Vhd);
            vec![vhd(&a.a, from(0)), vhd(&a.b, from(1))]
        }
        Verb::Flatten(a) => vec![Some(&a.child)],
        Verb::Rebase(a) => vec![Some(&a.child)],
        Verb::Compact(a) => vec![Some(&a.path)],
        Verb::Resize(a) => vec![Some(&a.path)],
        Verb::Settle(a) => vec![Some(&a.path)],
    };
    let named: Vec<&Path> = named.into_iter().flatten().map(PathBuf::as_path).collect();
    ops::settle::discard(&Host, &named, &runtime_dir::existing_folders(common.runtime_dir.as_deref())?)
}

/// Runs the verb `settle`.
///
/// # Errors
/// - `Busy` if another process holds a lock on the image, or has its journal open
/// - `Refused` if the live journal is not found or does not belong to the image in its present state, if the session is
///   of another machine, or if the image must not be written
/// - `Refused` if the folder of `--runtime-dir` belongs to another user, or other users may write to it
/// - `Poisoned` if a sync of the killed daemon failed
/// - `Invalid`, `NotFound`, `NoSpace`, `Io`
pub(super) fn settle(args: &SettleArgs, common: &CommonArgs) -> Result<Exit> {
    let runtime = runtime_dir::existing_folders(common.runtime_dir.as_deref())?;
    let settled = ops::settle::settle(&Host, &args.path, &runtime)?;
    let result = if settled { "settled" } else { "nothing to settle" };
    print_outcome(common, &format!("{}: {result}", args.path.display()))
}
