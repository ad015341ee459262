//! Command line and results that the comparing benches share.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::rng::{Rng, seed_or};
use super::target::{self, Target};

/// The name and the function of a part of a bench.
pub type Section<B> = (&'static str, fn(&mut B));

/// The load of the machine (`/proc/loadavg`) before and after the bench.
pub struct RunReport {
    load: [String; 2],
}

/// Returns whether the command line has `--full`.
pub fn is_full() -> bool {
    std::env::args().any(|a| a == "--full")
}

/// Runs the parts that the command line names. If it names none, runs all.
pub fn run<B>(bench: &mut B, parts: &[Section<B>]) -> RunReport {
    seed();
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let load = || fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned();
    let before = load();
    for (name, part) in parts {
        if words.is_empty() || words.iter().any(|w| w == name) {
            eprintln!("{name}");
            part(bench);
        }
    }
    RunReport { load: [before, load()] }
}

impl RunReport {
    /// Prints the targets and the load of the machine.
    pub fn print(&self, targets: &[Target]) {
        target::print(targets);
        println!("\nload of the machine before and after: {}", self.load.join(" | "));
    }

    /// Returns the results of a bench with `bytes` bytes of data as JSON.
    pub fn as_json(&self, full: bool, bytes: u64, rows: Vec<Value>, targets: &[Target]) -> String {
        let all = json!({
            "full": full,
            "bytes": bytes,
            "load": self.load,
            "rows": rows,
            "targets": target::as_json(targets),
        });
        format!("{all:#}\n")
    }
}

/// Writes a file of results and prints the path of the file.
pub fn write(path: &Path, text: String) {
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    println!("written: {}", path.display());
}

/// Returns the seed of this run: the number in `DIFFDISK_SEED`, or a constant. The first call prints the seed.
fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| seed_or(0x9e37_79b9_7f4a_7c15))
}

/// Returns the stream of random numbers with number `stream`. The stream depends only on this number and the seed.
pub(crate) fn random_stream(stream: u64) -> Rng {
    Rng::new(seed() ^ stream)
}
