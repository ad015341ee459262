//! Checks the floors of the crate: a module uses only modules of lower floors, itself, and the shared modules. Modules
//! on one floor do not use each other. An external crate in `HOMES` is used only by the modules that are listed for it.

mod circles;
mod citations;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Floor of each top-level module (see `src/lib.rs`).
const FLOORS: &[(&str, u32)] = &[
    ("format", 0),
    ("storage", 0),
    ("image", 1),
    ("chain", 2),
    ("disk", 3),
    ("device", 4),
    ("ops", 4),
    ("vhost", 5),
    ("control", 6),
    ("cli", 7),
];

/// Shared modules, which any floor may use.
const WORDS: &[&str] = &["units", "error", "event", "mutant", "failpoint", "random"];

/// The modules that may use each external crate.
const HOMES: &[(&str, &[&str])] = &[
    ("vhost", &["vhost"]),
    ("vhost_user_backend", &["vhost", "device"]),
    ("virtio_queue", &["vhost", "device"]),
    ("virtio_bindings", &["vhost", "device"]),
    ("vm_memory", &["vhost", "device"]),
    ("vmm_sys_util", &["vhost", "device"]),
    ("epoll", &["vhost"]),
    ("io_uring", &["storage"]),
    ("memmap2", &["storage"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("nix", &["cli"]),
    ("toml", &["cli"]),
    ("env_logger", &["cli"]),
];

/// Files that may contain `unsafe`: for memory that other processes share, calls into the kernel, descriptors given by
/// number, and tests that act as the guest.
const UNSAFE: &[&str] = &[
    "cli/inherited_fd.rs",
    "device/guest_memory.rs",
    "device/queue_tests.rs",
    "storage/blocking.rs",
    "storage/pagecache/copy_nofault.rs",
    "storage/host/lock.rs",
    "storage/pagecache/file_map.rs",
    "storage/shm.rs",
    "storage/payload.rs",
    "storage/uring/mod.rs",
    "storage/sigbus.rs",
    "storage/engine_tests.rs",
    "storage/pagecache/range.rs",
    "storage/pagecache/reader.rs",
    "storage/pagecache/reader_tests.rs",
    "storage/prefetch.rs",
    "storage/timestamp.rs",
    "vhost/inflight.rs",
    "vhost/memory.rs",
];

#[test]
fn every_path_leads_down() {
    let mut bad = Vec::new();
    for (module, file, text) in sources() {
        let here = floor(&module);
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
            for used in line.match_indices("crate::").map(|(at, found)| word(&line[at + found.len()..])) {
                let fine = used == module || WORDS.contains(&used) || floor(used) < here;
                if !fine && !used.is_empty() && !used.starts_with('{') {
                    bad.push(format!("{}:{}: {module} (floor {here}) uses {used}", file.display(), number + 1));
                }
            }
            if line.contains("use crate::{") {
                bad.push(format!("{}:{}: name each module in its own `use`", file.display(), number + 1));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn crates_from_outside_stay_at_home() {
    let mut bad = Vec::new();
    for (module, file, text) in sources() {
        for (outside, homes) in HOMES {
            let names = |line: &str| {
                let path = format!("{outside}::");
                let found = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c));
                line.match_indices(&path).any(|(at, _)| found(at)) && !line.trim_start().starts_with("//")
            };
            if !homes.contains(&module.as_str()) && text.lines().any(names) {
                bad.push(format!("{}: {outside} is at home in {homes:?}", file.display()));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn files_say_what_they_do_and_stay_readable() {
    let mut bad = Vec::new();
    for (_, file, text) in sources() {
        let lines = text.lines().count();
        if !text.starts_with("//!") {
            bad.push(format!("{}: begins without saying what it does", file.display()));
        }
        if lines > 400 {
            bad.push(format!("{}: {lines} lines", file.display()));
        }
        let name = file.strip_prefix(root()).expect("below src").display().to_string();
        let attributes = text.lines().filter(|line| line.starts_with("#![") || line.starts_with("#["));
        match (attributes.into_iter().any(|line| line.contains("unsafe_code")), UNSAFE.contains(&name.as_str())) {
            (true, false) => bad.push(format!("{name}: unsafe is not at home here")),
            (false, true) => bad.push(format!("{name}: has no need of unsafe any more")),
            _ => {}
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// Type names must be unique in the crate, so that a name identifies one type.
#[test]
fn names_of_types_are_unique() {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (_, file, text) in sources() {
        for line in text.lines() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
            let indent = line.len() - line.trim_start().len();
            let first = words.find(|word| !["pub", "crate", "super", "unsafe"].contains(word)).unwrap_or_default();
            if indent <= 4
                && ["struct", "enum", "trait", "union"].contains(&first)
                && !line.trim_start().starts_with("//")
            {
                let name = words.next().unwrap_or_default().to_owned();
                found.entry(name).or_default().push(file.display().to_string());
            }
        }
    }
    let twice: Vec<_> = found.iter().filter(|(_, files)| files.len() > 1).collect();
    assert!(twice.is_empty(), "{twice:#?}");
    assert!(found.len() > 300, "only {} types were found", found.len());
}

/// Returns the source files in the folders of `src/`, except `bin`: the top-level module, the path and the text of
/// each. Files directly in `src/` are left out.
fn sources() -> Vec<(String, PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).expect("src can be listed") {
            let path = entry.expect("src can be listed").path();
            let below = path.strip_prefix(root()).expect("below src").to_path_buf();
            let first = below.components().next().expect("a name").as_os_str().to_string_lossy().into_owned();
            if path.is_dir() && first != "bin" {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && below.components().count() > 1 {
                let text = fs::read_to_string(&path).expect("a source file");
                found.push((first, path, text));
            }
        }
    }
    assert!(found.len() > 40, "the walk found only {} files", found.len());
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn floor(module: &str) -> u32 {
    FLOORS.iter().find(|(name, _)| *name == module).map_or(u32::MAX, |(_, floor)| *floor)
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '{')).unwrap_or(text.len());
    &text[..end]
}
