//! Expected results of a case, and the check of `info`, `check`, `convert` and the daemon against them.

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

/// Maximum size in bytes of an accepted disk that is also converted.
const CONVERTED: u64 = 64 << 20;

/// The part of the file to which the offset in the error line must point.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ErrorLocation {
    /// The defect has no offset in the file.
    Nowhere,
    /// Either footer.
    Footer,
    /// The dynamic header.
    Header,
    /// The BAT, or a block.
    Table,
}

/// The expected result of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// The image can be read and served writable.
    Accepted,
    /// The image can be read and served read-only. A writable start is not tested.
    Readable,
    /// The image can be read and served read-only. A writable start is refused.
    ReadOnly,
    /// `info` accepts the file alone, and `check` finds at most a defect of the file's parent strings. Every command
    /// that opens the chain refuses the chain within `memory_mib`, and the reason contains one of `words`. If the
    /// parent does not exist, `info --chain` only warns.
    ChainRefused { words: &'static [&'static str], memory_mib: i64 },
    /// All programs refuse the image, and the reason contains one of `words`. `check` exits with one of the codes in
    /// `check`.
    Refused { check: &'static [i32], words: &'static [&'static str], place: ErrorLocation },
}

/// One hostile (or barely legal) file.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) want: Expected,
    /// Creates the files in an empty folder. Returns the file to open.
    pub(crate) build: Box<dyn Fn(&Path) -> PathBuf>,
}

impl Case {
    pub(crate) fn new(name: &'static str, want: Expected, build: impl Fn(&Path) -> PathBuf + 'static) -> Case {
        Case { name, want, build: Box::new(build) }
    }
}

/// Expects a corrupt image: `check` exits with 3.
pub(crate) fn corrupt(place: ErrorLocation, words: &'static [&'static str]) -> Expected {
    Expected::Refused { check: &[3], words, place }
}

/// Expects a file that is not an image, or that is refused by policy: `check` exits with 1, or with 3 if it lists a
/// defect.
pub(crate) fn refused(words: &'static [&'static str]) -> Expected {
    Expected::Refused { check: &[1, 3], words, place: ErrorLocation::Nowhere }
}

/// Runs every program on the case. Fails with a message that names the case if a result is unexpected.
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
            // The writable start comes last, because it may preallocate space in the file.
            Daemon::start(&image, &[]).stop();
        }
    }));
    result.map_err(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        format!("{}: {}", case.name, message.unwrap_or("panicked"))
    })
}

/// Returns the hash and the modification time of every regular file in a folder. Instead of the hash of a file above 1
/// GiB, returns its length.
pub(crate) fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (String, SystemTime)> {
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("the folder is readable") {
        let path = entry.expect("an entry").path();
        let meta = fs::symlink_metadata(&path).expect("the entry is there");
        // Huge sparse files are compared by length and time: hashing terabytes of holes takes hours.
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

/// Returns the command of a daemon that serves one disk, with its socket in `folder`.
pub(crate) fn daemon_command(image: &Path, folder: &Path) -> Command {
    let mut command = Command::new(DIFFDISKD);
    command.arg(format!("--socket-path={}", folder.join("sock").display()));
    command.arg(format!("--blk-file={}", image.display()));
    command
}

fn assert_refused(name: &str, image: &Path, check: &[i32], words: &[&str], place: ErrorLocation) {
    let len = fs::symlink_metadata(image).map_or(0, |meta| meta.len());
    let assert_error_line = |program: &str, run: &Run| {
        run.assert_sane(program);
        println!("{name}: {program}: {} KiB, {:?}: {}", run.rss_kib, run.elapsed, run.stderr.trim_end());
        let line = run.error_line(program);
        assert!(line.contains(&image.display().to_string()), "{program}: does not name the file: {line}");
        let lower = line.to_lowercase();
        assert!(words.iter().any(|word| lower.contains(word)), "{program}: none of {words:?} in: {line}");
        assert!(points_at(line, place, len), "{program}: no offset of the {place:?} in: {line}");
    };
    for (program, run) in
        [("info", tool_run(&["info"], image, &[])), ("convert", tool_run(&["convert"], image, &["-", "--to", "raw"]))]
    {
        assert_error_line(program, &run);
        assert_eq!(run.code, 1, "{program}: exit code");
        assert_eq!(run.stderr.lines().count(), 1, "{program}: more than its line on stderr: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{program}: printed {} bytes", run.stdout.len());
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
        assert_error_line("diffdiskd", &run);
        assert_eq!(run.code, 1, "diffdiskd: exit code");
        assert!(!folder.path().join("sock").exists(), "diffdiskd: left a socket behind");
    }
}

fn assert_chain_refused(image: &Path, words: &[&str], memory_mib: i64) {
    for (program, args) in [("info", "info"), ("check", "check")] {
        let run = tool_run(&[args], image, &[]);
        run.assert_sane(program);
        // A defect of the parent strings is visible without opening the parent, so `check` may report it.
        let names_none = program == "check" && run.code == 3 && run.stderr.contains("parent");
        assert!(matches!(run.code, 0 | 4) || names_none, "{program} alone: exit code {}: {}", run.code, run.stderr);
    }
    let socket = tempfile::tempdir().expect("a folder for the socket");
    for (program, run) in [
        ("info --chain", tool_run(&["info", "--chain"], image, &[])),
        ("map", tool_run(&["map"], image, &[])),
        ("convert", tool_run(&["convert"], image, &["-", "--to", "raw"])),
        ("diffdiskd", measure::run(&mut daemon_command(image, socket.path()))),
    ] {
        run.assert_sane_within(program, memory_mib);
        if program == "info --chain" && run.stderr.contains("the parent is not there") {
            // `info --chain` prints the images that exist.
            assert_eq!(run.code, 0, "{program}: exit code: {}", run.stderr);
            assert!(
                run.stderr.starts_with("warn: the chain is shown without what is below "),
                "{program}: {}",
                run.stderr
            );
            continue;
        }
        assert_eq!(run.code, 1, "{program}: exit code: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{program}: printed {} bytes", run.stdout.len());
        let line = run.error_line(program);
        let folder = image.parent().expect("an image lies in a folder").display().to_string();
        assert!(line.contains(&folder), "{program}: names no file: {line}");
        let lower = line.to_lowercase();
        assert!(words.iter().any(|word| lower.contains(word)), "{program}: none of {words:?} in: {line}");
    }
}

/// Returns whether the line contains `at byte N` such that the offset N can lie in `place`. Returns true for
/// [`ErrorLocation::Nowhere`].
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
    let report: serde_json::Value = serde_json::from_slice(&info.stdout).expect("info prints JSON");
    let size = report["virtual_size"].as_u64().expect("info prints the size");
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
