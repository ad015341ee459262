//! Runs the verbs on images: converts arguments, calls `ops`, prints results.

use std::io::{self, IsTerminal};
use std::path::Path;

use super::args::{
    CheckArgs, ChildrenArgs, CommonArgs, CompactArgs, CompareArgs, ConvertArgs, CreateArgs, DiffArgs, FlattenArgs,
    InfoArgs, MapArgs, MergeArgs, RebaseArgs, ResizeArgs, RootKind, SourceFormatArg, TargetFormatArg, ToolArgs, Verb,
};
use super::ctl;
use super::exit::{Exit, print_failure};
use super::output::{UnbufferedStdout, is_standard_output, print_list, print_outcome, print_to_stdout};
use super::print;
use super::progress::ProgressDisplay;
use super::runtime_dir;
use super::settle;
use super::size::human_size;
use crate::chain::Policy;
use crate::error::{Error, ErrorKind, Result};
use crate::format::ImageFormat;
use crate::ops::convert::{Conversion, TargetFormat};
use crate::ops::merge::Abandoned;
use crate::ops::{self, SourceDisk, SourceFormat};
use crate::storage::host::Host;
use crate::units::BlockSize;

/// Runs a verb. Returns its name and its outcome.
pub(super) fn run(args: ToolArgs) -> (&'static str, Result<Exit>) {
    let common = args.common;
    if common.discard_journal
        && let Err(e) = settle::discard(&args.verb, &common)
    {
        return ("--discard-journal", Err(e));
    }
    match args.verb {
        Verb::Create(a) => ("create", create(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Info(a) => ("info", info(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Check(a) => ("check", check(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Children(a) => ("children", children(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Map(a) => ("map", map(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Diff(a) => ("diff", diff(&a, &common).map_err(|e| e.at_path(&a.child))),
        Verb::Convert(a) => ("convert", convert(&a, &common).map_err(|e| e.at_path(&a.source))),
        Verb::Merge(a) => ("merge", merge(&a, &common).map_err(|e| e.at_path(&a.child))),
        Verb::Compare(a) => ("compare", compare(&a, &common).map_err(|e| e.at_path(&a.a))),
        Verb::Flatten(a) => ("flatten", flatten(&a, &common).map_err(|e| e.at_path(&a.child))),
        Verb::Rebase(a) => ("rebase", rebase(&a, &common).map_err(|e| e.at_path(&a.child))),
        Verb::Compact(a) => ("compact", compact(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Resize(a) => ("resize", resize(&a, &common).map_err(|e| e.at_path(&a.path))),
        Verb::Ctl(a) => ctl::run(&a, &common),
        Verb::Settle(a) => ("settle", settle::settle(&a, &common).map_err(|e| e.at_path(&a.path))),
    }
}

fn policy(common: &CommonArgs) -> Result<Policy> {
    let runtime = runtime_dir::existing_folders(common.runtime_dir.as_deref())?;
    Ok(Policy { allowed: common.allow_parents.clone(), runtime, ..Policy::default() })
}

fn create(args: &CreateArgs, common: &CommonArgs) -> Result<Exit> {
    let summary = match &args.parent {
        Some(parent) => {
            let child = ops::create::ChildSpec {
                parent: parent.clone(),
                size: args.size,
                block_size: args.block_size,
                reserve: args.reserve_size.unwrap_or(0),
                locators: args.locator.into(),
                preallocate: args.preallocate,
            };
            let made = ops::create::child(&Host, &args.path, &child, &policy(common)?)?;
            if !made.folders_not_allowed.is_empty() {
                let options =
                    made.folders_not_allowed.iter().map(|folder| format!(" --allow-parents {}", folder.display()));
                let (path, options) = (args.path.display(), options.collect::<String>());
                log::warn!("{path}: parents are in other folders, so the image can be opened only with{options}");
            }
            format!("differencing, {}, child of {}", human_size(made.size), made.parent.display())
        }
        None => {
            let size = args.size.expect("clap requires it");
            let fixed = args.kind == RootKind::Fixed;
            let reserve = args.reserve_size.unwrap_or(0);
            let block_size = args.block_size.unwrap_or(BlockSize::DEFAULT);
            let root = ops::create::RootSpec { fixed, size, block_size, reserve, preallocate: args.preallocate };
            ops::create::root(&Host, &args.path, &root)?;
            let kind = if fixed { "fixed".to_owned() } else { format!("dynamic, blocks of {block_size}") };
            format!("{kind}, {}", human_size(size))
        }
    };
    if !common.quiet {
        print_to_stdout(|out| {
            writeln!(out, "created {}: {}", print::display_path(&args.path), print::escape_controls(&summary))
        })?;
    }
    Ok(Exit::Done)
}

fn info(args: &InfoArgs, common: &CommonArgs) -> Result<Exit> {
    let policy = args.chain.then(|| policy(common)).transpose()?;
    let info = ops::info::info(&Host, &args.path, policy.as_ref())?;
    for damage in &info.damage {
        log::warn!("{}: {damage}; run `diffdisk check`", args.path.display());
    }
    if let Some(snapshot) = &info.unfinished_snapshot {
        log::warn!("{}: {}", args.path.display(), snapshot.description);
    }
    print_to_stdout(|out| if args.json { print::json(out, &info) } else { print::info(out, &info) })?;
    if let Some(short) = info.space_shortage() {
        let (left, more) = (human_size(short.available), human_size(short.needed));
        log::warn!(
            "{}: the file system has {left} left, but the image may grow by up to {more}; writes wait or fail when \
             the file system is full",
            print::display_path(&args.path)
        );
    }
    Ok(Exit::Done)
}

fn check(args: &CheckArgs, common: &CommonArgs) -> Result<Exit> {
    let policy = args.chain.then(|| policy(common)).transpose()?;
    let runtime = runtime_dir::existing_folders(common.runtime_dir.as_deref())?;
    if let Some(undo) = &args.undo {
        ops::check::undo(&Host, &args.path, undo, &runtime)?;
        return print_outcome(common, &format!("{}: repair undone from {}", args.path.display(), undo.display()));
    }
    let work = ProgressDisplay::new(ops::check::bytes_to_check(&Host, &args.path, policy.as_ref()), common.quiet)?;
    let (parents, runtime, progress) = (policy.as_ref(), runtime.as_slice(), &mut |bytes| work.report(bytes));
    let report = match args.repair {
        true => ops::check::repair(&Host, &args.path, parents, runtime, args.take.map(Into::into), progress)?,
        false => ops::check::check(&Host, &args.path, parents, runtime, progress)?,
    };
    drop(work);
    print_to_stdout(|out| match args.json {
        true => print::json(out, &report),
        false => print::check(out, &report, common.quiet),
    })?;
    if report.corruptions > 0 {
        // Reports the first of the defects with the worst consequence.
        let corrupt = report.defects.iter().rev().filter(|defect| defect.corrupt);
        let worst = corrupt.max_by_key(|defect| defect.consequence).expect("corruptions > 0");
        let mut e = Error::new(ErrorKind::Invalid, worst.detail.clone());
        if report.corruptions > 1 {
            let more = report.corruptions - 1;
            e = Error::new(ErrorKind::Invalid, format!("{} (and {more} more)", worst.detail));
        }
        let e = worst.offset.into_iter().fold(e, Error::at_offset);
        print_failure("check", &e.at_path(worst.path.as_ref().unwrap_or(&report.path)));
        return Ok(Exit::Corrupt);
    }
    Ok(if report.ok { Exit::Done } else { Exit::Leaks })
}

fn children(args: &ChildrenArgs, common: &CommonArgs) -> Result<Exit> {
    let found = ops::children::children(&Host, &args.path, &args.folders)?;
    if found.is_empty() && !args.json {
        return print_outcome(common, &format!("{}: no children in the folders searched", args.path.display()));
    }
    print_to_stdout(|out| if args.json { print::json(out, &found) } else { print::children(out, &found) })?;
    Ok(Exit::Done)
}

fn map(args: &MapArgs, common: &CommonArgs) -> Result<Exit> {
    let mut table = print::MapPrinter::new(io::BufWriter::new(io::stdout().lock()), args.json);
    print_list(|written| {
        ops::map::map(&Host, &args.path, &policy(common)?, |run| written(table.run(&run)))?;
        written(table.end())
    })
}

fn diff(args: &DiffArgs, common: &CommonArgs) -> Result<Exit> {
    let mut table = print::DiffPrinter::new(io::BufWriter::new(io::stdout().lock()), args.json, common.quiet);
    print_list(|written| {
        ops::diff::diff(&Host, &args.child, args.since.as_deref(), &policy(common)?, |run| written(table.run(&run)))?;
        written(table.end())
    })
}

fn open(path: &Path, from: SourceFormatArg, common: &CommonArgs) -> Result<SourceDisk> {
    let format = SourceFormat::from(from);
    let disk = SourceDisk::open(&Host, path, format, &policy(common)?).map_err(|e| match e.kind() {
        // The advice is given only if the error concerns the image itself. For a parent the advice would be wrong.
        ErrorKind::Invalid
            if format == SourceFormat::Vhd && e.path() == Some(path) && e.line().contains("no footer") =>
        {
            Error::new(ErrorKind::Invalid, "not a VHD; for a raw disk use --from raw").at_path(path).caused_by(e)
        }
        _ => e,
    })?;
    if let Some(container) = disk.container()? {
        let (name, driver) = (container.name(), container.qemu_driver());
        let way = match container {
            ImageFormat::Vhd => "omit `--from raw` to read it as one".to_owned(),
            _ => format!("to convert it as one, use `qemu-img convert -f {driver}`"),
        };
        log::warn!("{}: looks like a {name} image, but is read as a raw disk; {way}", path.display());
    }
    Ok(disk)
}

fn convert(args: &ConvertArgs, common: &CommonArgs) -> Result<Exit> {
    let streamed = is_standard_output(&args.destination);
    if streamed && args.to != TargetFormatArg::Raw {
        return Err(Error::new(ErrorKind::Unsupported, "only --to raw can be written to standard output").at_path("-"));
    }
    if streamed && io::stdout().is_terminal() {
        return Err(Error::new(ErrorKind::Refused, "standard output is a terminal; redirect it").at_path("-"));
    }
    if args.keep_uuid && (args.to == TargetFormatArg::Raw || args.from == SourceFormatArg::Raw) {
        let what = "--keep-uuid needs a VHD as source and destination, since only an image has a UUID";
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let disk = if args.salvage { salvage(args, common)? } else { open(&args.source, args.from, common)? };
    let work = ProgressDisplay::new(disk.bytes(), common.quiet)?;
    let mut progress = |bytes| work.report(bytes);
    if streamed {
        ops::convert::stream(&disk, &mut UnbufferedStdout, args.align, &mut progress)?;
        return Ok(Exit::Done);
    }
    if disk.bytes() % 512 != 0 && args.to != TargetFormatArg::Raw {
        log::warn!("{}: {} bytes are filled up with zeros to a multiple of 512", args.source.display(), disk.bytes());
    }
    if args.force {
        ops::convert::check_replaceable(&Host, &args.destination, &policy(common)?.runtime)?;
    }
    let to = match args.to {
        TargetFormatArg::Raw => TargetFormat::Raw,
        TargetFormatArg::Fixed => TargetFormat::Fixed,
        TargetFormatArg::Dynamic => TargetFormat::Dynamic(args.block_size),
    };
    let uuid = if args.keep_uuid { disk.uuid() } else { None };
    let how = Conversion { to, align: args.align, replace: args.force, uuid };
    ops::convert::convert(&Host, &disk, &args.destination, &how, &mut progress)
        .map_err(|e| e.at_path(&args.destination))?;
    if args.keep_uuid {
        let (copy, source) = (args.destination.display(), args.source.display());
        log::warn!(
            "{copy} has the UUID of {source}: a child of one accepts the other as its parent. Keep only one of them in the \
             folders in which children look for parents"
        );
    }
    Ok(Exit::Done)
}

/// Opens a damaged disk for salvage, and logs the lost ranges.
fn salvage(args: &ConvertArgs, common: &CommonArgs) -> Result<SourceDisk> {
    if args.from == SourceFormatArg::Raw {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "--salvage needs a VHD: a raw disk does not record lost sectors",
        ));
    }
    let (disk, given_up) = ops::salvage::open(&Host, &args.source, &policy(common)?)?;
    for run in &given_up {
        let (start, end) = (run.start, run.start + run.length);
        log::warn!("{}: given up: bytes {start} to {end} of the disk, {} bytes", run.file.display(), run.length);
    }
    let bytes = given_up.iter().map(|run| run.length).sum();
    if bytes > 0 {
        log::warn!("{} of the disk are given up, and are zeros in the copy", human_size(bytes));
    }
    Ok(disk)
}

fn compare(args: &CompareArgs, common: &CommonArgs) -> Result<Exit> {
    let (of_a, of_b) = match args.from.as_slice() {
        [both] => (*both, *both),
        [a, b] => (*a, *b),
        _ => return Err(Error::new(ErrorKind::Unsupported, "--from may be given at most twice")),
    };
    let (a, b) = (open(&args.a, of_a, common)?, open(&args.b, of_b, common)?);
    let work = ProgressDisplay::new(a.bytes().max(b.bytes()), common.quiet)?;
    let difference = ops::compare::compare(&a, &b, &mut |bytes| work.report(bytes))?;
    drop(work);
    print_to_stdout(|out| {
        if a.bytes() != b.bytes() && !common.quiet {
            writeln!(
                out,
                "sizes differ: {} and {} bytes; the rest of the larger disk is compared with zeros",
                a.bytes(),
                b.bytes()
            )?;
        }
        match difference {
            Some(at) => writeln!(out, "different from byte {at} on"),
            None if common.quiet => Ok(()),
            None => writeln!(out, "equal"),
        }
    })?;
    Ok(if difference.is_some() { Exit::Different } else { Exit::Done })
}

fn merge(args: &MergeArgs, common: &CommonArgs) -> Result<Exit> {
    if args.abandon {
        return abandon(args, common);
    }
    let (into, changed) = (args.into.as_deref(), args.changed_parent);
    let merge = ops::merge::PreparedMerge::prepare(&Host, &args.child, into, changed, &policy(common)?)?;
    let work = ProgressDisplay::new(merge.bytes(), common.quiet)?;
    let merged = merge.run(&mut |bytes| work.report(bytes))?;
    drop(work);
    if common.quiet {
        return Ok(Exit::Done);
    }
    let images = |n: usize| if n == 1 { "1 image".to_owned() } else { format!("{n} images") };
    let mut summary = format!("{} copied, {} removed", human_size(merged.copied), images(merged.removed.len()));
    if !merged.relinked.is_empty() {
        summary.push_str(&format!(", {} linked to it", images(merged.relinked.len())));
    }
    let (child, ancestor) = (print::display_path(&args.child), print::display_path(&merged.ancestor));
    print_to_stdout(|out| writeln!(out, "merged {child} into {ancestor}: {summary}"))?;
    Ok(Exit::Done)
}

fn abandon(args: &MergeArgs, common: &CommonArgs) -> Result<Exit> {
    let child = args.child.display();
    let line = match ops::merge::abandon(&Host, &args.child, args.into.as_deref(), &policy(common)?)? {
        Abandoned::Undone => format!("abandoned the merge of {child}: all images are as before the merge"),
        Abandoned::Whole(into) => {
            format!("abandoned the merge of {child}: {} has received all data and shows the same disk", into.display())
        }
        Abandoned::Partial(into) => format!(
            "abandoned the merge of {child}: {} is partly overwritten, and can only be read as part of the chain of {child}. \
             Run the same command without --abandon to finish the merge",
            into.display()
        ),
    };
    print_outcome(common, &line)
}

fn flatten(args: &FlattenArgs, common: &CommonArgs) -> Result<Exit> {
    let work = ProgressDisplay::new(ops::info::info(&Host, &args.child, None)?.virtual_size, common.quiet)?;
    let progress = &mut |bytes| work.report(bytes);
    let copied = ops::flatten::flatten(&Host, &args.child, args.keep.as_deref(), &policy(common)?, progress)?;
    drop(work);
    let parent = args.keep.as_ref().map_or("no parent".to_owned(), |parent| format!("the parent {}", parent.display()));
    print_outcome(common, &format!("{} now has {parent}: {} copied", args.child.display(), human_size(copied)))
}

fn rebase(args: &RebaseArgs, common: &CommonArgs) -> Result<Exit> {
    let work = ProgressDisplay::new(ops::info::info(&Host, &args.child, None)?.virtual_size, common.quiet)?;
    let progress = &mut |bytes| work.report(bytes);
    let done = ops::rebase::rebase(&Host, &args.child, &args.parent, args.r#unsafe, &policy(common)?, progress)?;
    drop(work);
    let (child, parent) = (args.child.display(), args.parent.display());
    if args.r#unsafe && done.same_parent {
        return print_outcome(
            common,
            &format!("{child} keeps its parent {parent}; the time of that file is recorded again"),
        );
    }
    print_outcome(common, &format!("{child} now has the parent {parent}: {} copied", human_size(done.copied)))
}

fn compact(args: &CompactArgs, common: &CommonArgs) -> Result<Exit> {
    let work = ProgressDisplay::new(ops::info::info(&Host, &args.path, None)?.file_size, common.quiet)?;
    let done = ops::compact::compact(&Host, &args.path, &policy(common)?, &mut |bytes| work.report(bytes))?;
    drop(work);
    let (given, blocks) = (human_size(done.freed_bytes), done.freed_blocks);
    print_outcome(common, &format!("{}: {given} freed, {blocks} blocks removed", args.path.display()))
}

fn resize(args: &ResizeArgs, common: &CommonArgs) -> Result<Exit> {
    let work = ProgressDisplay::new(args.size, common.quiet)?;
    let progress = &mut |bytes| work.report(bytes);
    let done = ops::resize::resize(&Host, &args.path, args.size, args.shrink, &policy(common)?, progress)?;
    drop(work);
    let (from, to) = (human_size(done.from), human_size(done.to));
    print_outcome(common, &format!("{}: resized from {from} to {to} ({} bytes)", args.path.display(), done.to))
}
