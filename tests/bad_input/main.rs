//! Hostile images: values at both sides of every limit of the opener, and parents outside the allowed folders.
//!
//! A case builds a file and states the expected result. Then `info`, `check`, `convert` and the daemon open the file. A
//! refusal must be one line that contains the path, the reason, and the offset of the defect if there is one, and must
//! take at most 64 MiB of memory, or the amount that the case allows. Only a daemon that serves an accepted image
//! writable may change a file.

#[path = "../common/mod.rs"]
mod common;

mod bat;
mod builder;
mod chain;
mod footer;
mod header;
mod measure;
mod parent_traps;
mod special_files;
mod verdict;

use verdict::{Case, run_case};

/// Minimum number of cases, without the parent traps.
const CLASSES: usize = 60;

fn all() -> Vec<Case> {
    [footer::cases(), header::cases(), bat::cases(), chain::cases(), special_files::cases()]
        .into_iter()
        .flatten()
        .collect()
}

#[test]
fn every_limit_holds_at_both_sides() {
    let cases = all();
    let mut names: Vec<_> = cases.iter().map(|case| case.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two cases share a name");
    assert!(cases.len() >= CLASSES, "only {} cases", cases.len());
    let failed: Vec<_> = cases.iter().filter_map(|case| run_case(case).err()).collect();
    println!("{} cases of malformed images, {} failed", cases.len(), failed.len());
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}
