//! Output formats: aligned fields, trees and tables for people, JSON for programs.

use std::borrow::Cow;
use std::io::{Result, Write};
use std::path::Path;

use serde::Serialize;

use super::size::human_size;
use crate::ops::{check, children, diff, info, map};

/// Maximum number of lost ranges in the output for people.
const MAX_LISTED_RANGES: usize = 100;

/// Escapes control characters, so that text from an image cannot control the terminal.
pub(super) fn escape_controls(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Formats a path with control characters escaped.
pub(super) fn display_path(path: &Path) -> String {
    escape_controls(&path.display().to_string()).into_owned()
}

/// Prints one JSON document and a line break.
pub(super) fn json(out: &mut dyn Write, document: &impl Serialize) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, document)?;
    writeln!(out)
}

fn bytes(n: u64) -> String {
    if n < 1024 { format!("{n} bytes") } else { format!("{} ({n} bytes)", human_size(n)) }
}

/// Prints the result of `info` for people.
pub(super) fn info(out: &mut dyn Write, info: &info::ImageInfo) -> Result<()> {
    let mut field = |name: &str, text: &str| writeln!(out, "{:<15} {}", format!("{name}:"), escape_controls(text));
    field("path", &info.path)?;
    field("format", info.format)?;
    field("type", info.disk_type)?;
    field("virtual size", &bytes(info.virtual_size))?;
    field("file size", &bytes(info.file_size))?;
    field("allocated", &bytes(info.allocated_bytes))?;
    field("written", &bytes(info.written_bytes))?;
    if let (Some(size), Some(blocks), Some(allocated)) = (info.block_size, info.blocks, info.blocks_allocated) {
        field("block size", &bytes(size.into()))?;
        field("blocks", &format!("{allocated} of {blocks} allocated"))?;
    }
    if let Some(session) = &info.session {
        let state = if session.open { "open" } else { "ended by a restart of the machine" };
        field("session", &format!("{state}; {} on {}, {}", session.user, session.host, session.folder))?;
    }
    if let Some(user) = &info.in_use {
        field("in use", &in_use(user))?;
    }
    field("uuid", &info.uuid)?;
    field("created", &info.created)?;
    field("creator", &format!("{} on {}", info.creator_app, info.creator_host))?;
    if let Some(parent) = &info.parent {
        field("parent", &parent.name)?;
        field("  uuid", &parent.uuid)?;
        for locator in &parent.locators {
            field(&format!("  {}", locator.platform), &locator.path)?;
        }
        if let Some(resolved) = &parent.resolved {
            field("  resolved", resolved)?;
        }
    }
    for damage in &info.damage {
        field("damage", damage)?;
    }
    if let Some(snapshot) = &info.unfinished_snapshot {
        let kept = snapshot.kept.as_ref().map_or(String::new(), |kept| format!(", kept as {kept}"));
        field("snapshot", &format!("unfinished: {}{kept}", snapshot.state))?;
    }
    let Some(chain) = &info.chain else { return Ok(()) };
    writeln!(out, "chain:")?;
    tree(out, chain)
}

/// Formats the process that has an image in use.
fn in_use(user: &info::InUse) -> String {
    let process = match (user.pid, &user.program) {
        (Some(pid), Some(program)) => format!("by {program} (process {pid})"),
        _ => "by another process".to_owned(),
    };
    match &user.since {
        Some(since) => format!("{process}, since {since}"),
        None => process,
    }
}

/// Prints a chain as a tree, the top layer first, with type, size and allocation of each layer in columns.
fn tree(out: &mut dyn Write, chain: &[info::ImageInfo]) -> Result<()> {
    let name = |(depth, layer): (usize, &info::ImageInfo)| {
        let branch = if depth == 0 { String::new() } else { format!("{}└─ ", "   ".repeat(depth - 1)) };
        format!("{branch}{}", escape_controls(&layer.path))
    };
    let names: Vec<String> = chain.iter().enumerate().map(name).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    for (name, layer) in names.iter().zip(chain) {
        let blocks = match (layer.blocks_allocated, layer.blocks) {
            (Some(allocated), Some(blocks)) => format!("  {allocated} of {blocks} blocks"),
            _ => String::new(),
        };
        let (size, room) = (human_size(layer.virtual_size), human_size(layer.allocated_bytes));
        writeln!(out, "  {name:<width$}  {:<12}  {size:>10}  {room:>10} allocated{blocks}", layer.disk_type)?;
    }
    Ok(())
}

/// Prints the result of `children` for people, one image per line.
pub(super) fn children(out: &mut dyn Write, children: &[children::ChildImage]) -> Result<()> {
    children.iter().try_for_each(|child| writeln!(out, "{}  {}", child.uuid, escape_controls(&child.path)))
}

/// Prints the result of `check` for people: one line per defect, and a summary.
pub(super) fn check(out: &mut dyn Write, report: &check::CheckReport, quiet: bool) -> Result<()> {
    for repaired in &report.repaired {
        for defect in &repaired.defects {
            writeln!(out, "repaired: {}", defect_line(defect, Some(&repaired.path)))?;
        }
        if let Some(undo) = &repaired.undo {
            writeln!(
                out,
                "{}: the replaced bytes are saved in {}",
                escape_controls(&repaired.path),
                escape_controls(undo)
            )?;
        }
    }
    for defect in &report.defects {
        let suffix = if defect.repairable { " [repairable]" } else { "" };
        writeln!(out, "{}{suffix}", defect_line(defect, None))?;
    }
    for lost in report.lost.iter().take(MAX_LISTED_RANGES) {
        let (start, end) = (lost.start, lost.start + lost.length);
        writeln!(out, "lost: bytes {start} to {end} of the disk, {}", bytes(lost.length))?;
    }
    if let Some(more) = report.lost.len().checked_sub(MAX_LISTED_RANGES).filter(|more| *more > 0) {
        writeln!(out, "lost: {more} more ranges; use --json to list all")?;
    }
    if quiet {
        return Ok(());
    }
    for note in &report.notes {
        writeln!(out, "note: {}", defect_line(note, None))?;
    }
    let files = report.chain.as_ref().map_or(String::new(), |chain| match chain.len() {
        1 => " (1 file)".to_owned(),
        n => format!(" ({n} files)"),
    });
    if report.ok {
        writeln!(out, "{}{files}: no defects", escape_controls(&report.path))?;
        if report.parents_unchecked {
            writeln!(out, "note: only this file was checked; use --chain to check its parents, too")?;
        }
        return Ok(());
    }
    let (corruptions, leaks, other) = (report.corruptions, report.leaks, report.cosmetic);
    writeln!(
        out,
        "{}{files}: corruptions {corruptions}, leaks {leaks}, cosmetic {other}",
        escape_controls(&report.path)
    )
}

fn defect_line(found: &check::FoundDefect, path: Option<&str>) -> String {
    let file = found.path.as_deref().or(path).map_or(String::new(), |path| format!("{}: ", escape_controls(path)));
    let place = found.offset.map_or(String::new(), |at| format!(" (at byte {at})"));
    format!("{file}{}: {}{place}", found.kind, escape_controls(&found.detail))
}

/// Prints the result of `diff`, one range at a time.
pub(super) struct DiffPrinter<W: Write> {
    out: W,
    json: bool,
    quiet: bool,
    runs: u64,
    bytes: u64,
}

impl<W: Write> DiffPrinter<W> {
    pub(super) fn new(out: W, json: bool, quiet: bool) -> DiffPrinter<W> {
        DiffPrinter { out, json, quiet, runs: 0, bytes: 0 }
    }

    pub(super) fn run(&mut self, run: &diff::ChangedRun) -> Result<()> {
        let first = self.runs == 0;
        self.runs += 1;
        self.bytes += run.length;
        if self.json {
            self.out.write_all(if first { b"[" } else { b",\n " })?;
            return Ok(serde_json::to_writer(&mut self.out, run)?);
        }
        if first {
            writeln!(self.out, "{:>16} {:>16}", "start", "length")?;
        }
        writeln!(self.out, "{:>16} {:>16}", run.start, run.length)
    }

    pub(super) fn end(mut self) -> Result<()> {
        match self.json {
            true => self.out.write_all(if self.runs > 0 { b"]\n" } else { b"[]\n" })?,
            false if self.quiet => {}
            false => writeln!(self.out, "total {} in {} ranges", bytes(self.bytes), self.runs)?,
        }
        self.out.flush()
    }
}

/// Prints the result of `map`, one range at a time.
pub(super) struct MapPrinter<W: Write> {
    out: W,
    json: bool,
    begun: bool,
    /// Paths of the files with control characters escaped, by depth.
    paths: Vec<Option<String>>,
}

#[derive(Serialize)]
struct JsonRange<'a> {
    start: u64,
    length: u64,
    depth: Option<u16>,
    file: Option<Cow<'a, str>>,
    offset: Option<u64>,
    zero: bool,
}

impl<W: Write> MapPrinter<W> {
    pub(super) fn new(out: W, json: bool) -> MapPrinter<W> {
        MapPrinter { out, json, begun: false, paths: Vec::new() }
    }

    pub(super) fn run(&mut self, run: &map::MapRun<'_>) -> Result<()> {
        let first = !std::mem::replace(&mut self.begun, true);
        if !self.json {
            if first {
                writeln!(self.out, "{:>16} {:>16} {:>5} {:>16}  file", "start", "length", "depth", "offset")?;
            }
            let Some(found) = &run.position else {
                return writeln!(self.out, "{:>16} {:>16}     -                -  (zero)", run.start, run.length);
            };
            let depth = usize::from(found.depth);
            self.paths.resize(self.paths.len().max(depth + 1), None);
            let file = self.paths[depth].get_or_insert_with(|| display_path(found.file));
            return writeln!(self.out, "{:>16} {:>16} {depth:>5} {:>16}  {file}", run.start, run.length, found.offset);
        }
        self.out.write_all(if first { b"[" } else { b",\n " })?;
        let document = JsonRange {
            start: run.start,
            length: run.length,
            depth: run.position.map(|found| found.depth),
            file: run.position.map(|found| found.file.to_string_lossy()),
            offset: run.position.map(|found| found.offset),
            zero: run.position.is_none(),
        };
        serde_json::to_writer(&mut self.out, &document)?;
        Ok(())
    }

    pub(super) fn end(mut self) -> Result<()> {
        if self.json {
            self.out.write_all(if self.begun { b"]\n" } else { b"[]\n" })?;
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape_controls("a\u{1b}[2Jb\u{9b}\n"), "a\\u{1b}[2Jb\\u{9b}\\n");
        assert!(matches!(escape_controls("päth"), Cow::Borrowed("päth")));
    }
}
