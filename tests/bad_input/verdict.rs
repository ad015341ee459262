//! What a case expects, and showing it to the four ways in.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::common::daemon::Daemon;
use crate::common::digest::sha256_of_file;
use crate::common::temp;
use crate::common::tool::{DIFFDISK, DIFFDISKD};
use crate::measure::{self, Run};

/// Disks up to this size are converted when accepted.
const CONVERTED: u64 = 64 << 20;

/// Where the error line must failpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ErrorLocation {
    /// The defect has no place in the file.
    Nowhere,
    /// Either footer.
    Footer,
    /// The dynamic header.
    Header,
    /// The BAT, or what it points at.
    Table,
}

/// What must happen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// Read and served writable.
    Accepted,
    /// Read and served read-only; a writable start is not judged.
    Readable,
    /// Read and served read-only; a writable start is refused.
    ReadOnly,
    /// The file alone is sound: `info` and `check` look at it only. What opens the chain refuses it, one of the words
    /// in the reason, within this much memory.
    ChainRefused { words: &'static [&'static str], memory_mib: i64 },
    /// Refused by all, one of the words in the reason; `check` exits with one of `check`.
    Refused { check: &'static [i32], words: &'static [&'static str], place: ErrorLocation },
}

/// One hostile (or barely legal) file.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) want: Expected,
    /// Makes the files in an empty folder; returns the one to open.
    pub(crate) build: Box<dyn Fn(&Path) -> PathBuf>,
}

impl Case {
    pub(crate) fn new(name: &'static str, want: Expected, build: impl Fn(&Path) -> PathBuf + 'static) -> Case {
        Case { name, want, build: Box::new(build) }
    }
}

/// An image whose bytes are corrupt: `check` says so with 3.
pub(crate) fn corrupt(place: ErrorLocation, words: &'static [&'static str]) -> Expected {
    Expected::Refused { check: &[3], words, place }
}

/// Nothing `check` could call an image, or a matter of policy: 1, or 3 where it lists it among the defects.
pub(crate) fn refused(words: &'static [&'static str]) -> Expected {
    Expected::Refused { check: &[1, 3], words, place: ErrorLocation::Nowhere }
}

/// Shows the case to every way in. The error names the case.
pub(crate) fn run_case(case: &Case) -> Result<(), String> {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let folder = temp::scratch("bad");
        let images = folder.path().join("images");
        fs::create_dir(&images).expect("a folder for the images");
        let image = (case.build)(&images);
        let before = snapshot(&images);
        match case.want {
            Expected::Refused { check, words, place } => assert_refused(case.name, &image, check, words, place),
            Expected::ChainRefused { words, memory_mib } => assert_chain_refused(&image, words, memory_mib),
            Expected::Accepted | Expected::Readable | Expected::ReadOnly => assert_read(case, &image, folder.path()),
        }
        assert_eq!(snapshot(&images), before, "a file was changed");
        if matches!(case.want, Expected::Accepted) {
            // Last: a writable start may prepare room in the file.
            Daemon::start(&image, &[]).stop();
        }
    }));
    result.map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        format!("{}: {}", case.name, said.unwrap_or("panicked"))
    })
}

/// Hash and modification time of every regular file.
pub(crate) fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (String, SystemTime)> {
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("the folder is readable") {
        let path = entry.expect("an entry").path();
        let meta = fs::symlink_metadata(&path).expect("the entry is there");
        // Huge sparse files are told by length and time: hashing terabytes of holes takes hours.
        if meta.is_file() {
            let hash = if meta.len() > 1 << 30 { meta.len().to_string() } else { sha256_of_file(&path) };
            seen.insert(path, (hash, meta.modified().expect("a modification time")));
        }
    }
    seen
}

fn tool_run(args: &[&str], image: &Path, rest: &[&str]) -> Run {
    measure::run(Command::new(DIFFDISK).args(args).arg(image).args(rest))
}

/// The daemon's options for one disk, its socket in a short-lived folder.
pub(crate) fn daemon_command(image: &Path, folder: &Path) -> Command {
    let mut command = Command::new(DIFFDISKD);
    command.arg(format!("--socket-path={}", folder.join("sock").display()));
    command.arg(format!("--blk-file={}", image.display()));
    command
}

fn assert_refused(name: &str, image: &Path, check: &[i32], words: &[&str], place: ErrorLocation) {
    let len = fs::symlink_metadata(image).map_or(0, |meta| meta.len());
    let judge_line = |who: &str, run: &Run| {
        run.assert_sane(who);
        println!("{name}: {who}: {} KiB, {:?}: {}", run.rss_kib, run.elapsed, run.stderr.trim_end());
        let line = run.error_line(who);
        assert!(line.contains(&image.display().to_string()), "{who}: does not name the file: {line}");
        let lower = line.to_lowercase();
        assert!(words.iter().any(|word| lower.contains(word)), "{who}: none of {words:?} in: {line}");
        assert!(points_at(line, place, len), "{who}: no offset of the {place:?} in: {line}");
    };
    for (who, run) in
        [("info", tool_run(&["info"], image, &[])), ("convert", tool_run(&["convert"], image, &["-", "--to", "raw"]))]
    {
        judge_line(who, &run);
        assert_eq!(run.code, 1, "{who}: exit code");
        assert_eq!(run.stderr.lines().count(), 1, "{who}: more than its line on stderr: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{who}: showed {} bytes", run.stdout.len());
    }
    let run = tool_run(&["check"], image, &[]);
    run.assert_sane("check");
    assert!(check.contains(&run.code), "check: exit code {} is none of {check:?}: {}", run.code, run.stderr);
    for read_only in [false, true] {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let mut command = daemon_command(image, folder.path());
        if read_only {
            command.arg("--read-only");
        }
        let run = measure::run(&mut command);
        judge_line("diffdiskd", &run);
        assert_eq!(run.code, 1, "diffdiskd: exit code");
        assert!(!folder.path().join("sock").exists(), "diffdiskd: left a socket behind");
    }
}

fn assert_chain_refused(image: &Path, words: &[&str], memory_mib: i64) {
    for (who, args) in [("info", "info"), ("check", "check")] {
        let run = tool_run(&[args], image, &[]);
        run.assert_sane(who);
        // What its own bytes show of a parent that is never opened is a defect of the file.
        let names_none = who == "check" && run.code == 3 && run.stderr.contains("parent");
        assert!(matches!(run.code, 0 | 4) || names_none, "{who} alone: exit code {}: {}", run.code, run.stderr);
    }
    let socket = tempfile::tempdir().expect("a folder for the socket");
    for (who, run) in [
        ("info --chain", tool_run(&["info", "--chain"], image, &[])),
        ("map", tool_run(&["map"], image, &[])),
        ("convert", tool_run(&["convert"], image, &["-", "--to", "raw"])),
        ("diffdiskd", measure::run(&mut daemon_command(image, socket.path()))),
    ] {
        run.assert_sane_within(who, memory_mib);
        if who == "info --chain" && run.stderr.contains("the parent is not there") {
            // The chain is shown as far as it is found.
            assert_eq!(run.code, 0, "{who}: exit code: {}", run.stderr);
            assert!(run.stderr.starts_with("warn: the chain is shown without what is below "), "{who}: {}", run.stderr);
            continue;
        }
        assert_eq!(run.code, 1, "{who}: exit code: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{who}: showed {} bytes", run.stdout.len());
        let line = run.error_line(who);
        let folder = image.parent().expect("an image lies in a folder").display().to_string();
        assert!(line.contains(&folder), "{who}: names no file: {line}");
        let lower = line.to_lowercase();
        assert!(words.iter().any(|word| lower.contains(word)), "{who}: none of {words:?} in: {line}");
    }
}

/// True if the line says `at byte N` for an N in `place`.
fn points_at(line: &str, place: ErrorLocation, len: u64) -> bool {
    let offsets = line.split("at byte ").skip(1).filter_map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    });
    let mut offsets = offsets.peekable();
    match place {
        ErrorLocation::Nowhere => true,
        ErrorLocation::Footer => offsets.any(|at| at < 512 || at <= len && len - at <= 512),
        ErrorLocation::Header => offsets.any(|at| at < 1536),
        ErrorLocation::Table => offsets.any(|at| at >= 512),
    }
}

fn assert_read(case: &Case, image: &Path, folder: &Path) {
    let info = tool_run(&["info", "--json"], image, &[]);
    info.assert_sane("info");
    assert_eq!(info.code, 0, "info: {}", info.stderr);
    let told: serde_json::Value = serde_json::from_slice(&info.stdout).expect("info prints JSON");
    let size = told["virtual_size"].as_u64().expect("info tells the size");
    let check = measure::run(Command::new(DIFFDISK).arg("check").arg(image));
    check.assert_sane("check");
    let fine: &[i32] = if matches!(case.want, Expected::Accepted) { &[0, 4] } else { &[0, 3, 4] };
    assert!(fine.contains(&check.code), "check: exit code {}: {}", check.code, check.stderr);
    if size <= CONVERTED {
        let raw = folder.join("raw");
        let run = tool_run(&["convert"], image, &[&raw.display().to_string(), "--to", "raw"]);
        run.assert_sane("convert");
        assert_eq!(run.code, 0, "convert: {}", run.stderr);
        assert_eq!(fs::metadata(&raw).expect("the raw disk").len(), size, "convert: length");
    }
    let daemon = Daemon::start(image, &["--read-only"]);
    let capacity = daemon.connect().capacity().expect("a configuration");
    assert_eq!(capacity, size, "diffdiskd: capacity");
    daemon.stop();
    if matches!(case.want, Expected::ReadOnly) {
        let folder = tempfile::tempdir().expect("a folder for the socket");
        let run = measure::run(&mut daemon_command(image, folder.path()));
        run.assert_sane("diffdiskd");
        assert_eq!(run.code, 1, "diffdiskd: a writable start must be refused: {}", run.stderr);
        run.error_line("diffdiskd");
    }
}
