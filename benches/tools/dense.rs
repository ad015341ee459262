//! Copying, merging and comparing of dense disks.

use std::fs;
use std::path::Path;

use crate::bench::{Bench, Candidate};
use crate::disks::{create, create_child, verify};
use crate::run::{dd, diffdisk, program, qemu_convert};

/// Target: minimum speed as a share of dd's speed for a copy of the same number of bytes.
const OF_DD: f64 = 0.8;
/// Options of qemu-img for a dynamic and a fixed VHD of exactly the given size.
const DYNAMIC: &[&str] = &["subformat=dynamic,force_size=on"];
const FIXED: &[&str] = &["subformat=fixed,force_size=on"];

/// A format of a disk, with the names of the format in `diffdisk` and in `qemu-img`.
struct DiskForm<'a> {
    ours: &'a str,
    theirs: &'a str,
    options: &'a [&'a str],
}

const RAW: DiskForm<'_> = DiskForm { ours: "raw", theirs: "raw", options: &[] };
const DYNAMIC_VHD: DiskForm<'_> = DiskForm { ours: "dynamic", theirs: "vpc", options: DYNAMIC };
const FIXED_VHD: DiskForm<'_> = DiskForm { ours: "fixed", theirs: "vpc", options: FIXED };

impl DiskForm<'_> {
    /// Returns the name of the format for the option `--from`.
    fn source(&self) -> &str {
        if self.ours == "raw" { "raw" } else { "vhd" }
    }
}

pub fn convert(bench: &mut Bench) {
    let (raw, vhd) = (bench.dense(), bench.dense_vhd());
    convert_one(bench, "raw to dynamic", (&RAW, &raw), &DYNAMIC_VHD);
    convert_one(bench, "dynamic to raw", (&DYNAMIC_VHD, &vhd), &RAW);
    convert_one(bench, "raw to fixed", (&RAW, &raw), &FIXED_VHD);
}

fn convert_one(bench: &mut Bench, work: &str, (from, source): (&DiskForm<'_>, &Path), to: &DiskForm<'_>) {
    let (raw, ours) = (bench.dense(), ["--from", from.source(), "--to", to.ours]);
    let [copy, theirs, mine] = ["copy", "theirs", "mine"].map(|name| bench.path(name));
    let all = vec![
        Candidate::new("dd", || dd(&raw, removed(&copy))),
        Candidate::new("qemu-img", || qemu_convert((from.theirs, source), (to.theirs, removed(&theirs)), to.options)),
        Candidate::new("diffdisk", || diffdisk("convert", &[source, removed(&mine)], &ours)),
    ];
    bench.compare(work, bench.pace.size, all);
    verify((to.source(), &mine), ("raw", &raw));
    bench.require_speed(work, "dd", OF_DD);
    bench.require_speed(work, "qemu-img", 1.0);
    for path in [copy, theirs, mine] {
        removed(&path);
    }
}

pub fn chain(bench: &mut Bench) {
    let (raw, top, work) = (bench.dense(), bench.spread(4), "chain of 4 to raw");
    let [copy, mine] = ["copy", "mine"].map(|name| bench.path(name));
    let all = vec![
        Candidate::new("dd", || dd(&raw, removed(&copy))),
        Candidate::new("diffdisk", || diffdisk("convert", &[&top, removed(&mine)], &["--to", "raw"])),
    ];
    bench.compare(work, bench.pace.size, all);
    verify(("raw", &mine), ("raw", &raw));
    bench.require_speed(work, "dd", OF_DD);
    for path in [copy, mine] {
        removed(&path);
    }
}

/// Measures merges of a child with all data into an empty parent, and into a parent that has all blocks.
pub fn merge(bench: &mut Bench) {
    let (raw, copy) = (bench.dense(), bench.path("copy"));
    let [empty, kept, parent, child] = ["empty.vhd", "kept.vhd", "parent.vhd", "child.vhd"].map(|n| bench.path(n));
    create(&parent, bench.pace.size);
    fs::copy(&parent, &empty).expect("there is room");
    bench.dense_child(&kept, &parent);
    // A merge unlinks the child at the end. A second hard link preserves the file for the next run.
    let again = || {
        removed(&child);
        fs::hard_link(&kept, &child).expect("names in one folder");
        diffdisk("merge", &[&child], &[])
    };
    for (work, full) in [("dense child into an empty parent", false), ("dense child into a full parent", true)] {
        let all = vec![
            Candidate::new("dd", || dd(&raw, removed(&copy))),
            Candidate::new("diffdisk", || {
                if !full {
                    fs::copy(&empty, removed(&parent)).expect("there is room");
                }
                again()
            }),
        ];
        bench.compare(work, bench.pace.size, all);
        verify(("vhd", &parent), ("raw", &raw));
        bench.require_speed(work, "dd", OF_DD);
    }
    for path in [copy, empty, kept, parent, child] {
        removed(&path);
    }
}

pub fn flatten(bench: &mut Bench) {
    let (raw, parent, work) = (bench.dense(), bench.dense_vhd(), "flatten on a dense parent");
    let [copy, child] = ["copy", "child.vhd"].map(|name| bench.path(name));
    let all = vec![
        Candidate::new("dd", || dd(&raw, removed(&copy))),
        Candidate::new("diffdisk", || {
            create_child(removed(&child), &parent);
            diffdisk("flatten", &[&child], &[])
        }),
    ];
    bench.compare(work, bench.pace.size, all);
    verify(("vhd", &child), ("raw", &raw));
    bench.require_speed(work, "dd", OF_DD);
    for path in [copy, child] {
        removed(&path);
    }
}

/// Measures comparisons of equal disks in two files.
pub fn compare(bench: &mut Bench) {
    let (raw, vhd, copy) = (bench.dense(), bench.dense_vhd(), bench.path("copy"));
    fs::copy(&raw, &copy).expect("there is room");
    let work = "compare raw with raw";
    let all = vec![
        Candidate::new("cmp", || program("cmp", [&raw, &copy])),
        Candidate::new("qemu-img", || {
            let mut command = program("qemu-img", ["compare", "-f", "raw", "-F", "raw"]);
            command.args([&raw, &copy]);
            command
        }),
        Candidate::new("diffdisk", || diffdisk("compare", &[&raw, &copy], &["--from", "raw"])),
    ];
    bench.compare(work, bench.pace.size, all);
    bench.require_speed(work, "cmp", 1.0);
    bench.require_speed(work, "qemu-img", 1.0);
    let work = "compare raw with dynamic";
    let all = vec![
        Candidate::new("cmp", || program("cmp", [&raw, &copy])),
        Candidate::new("diffdisk", || diffdisk("compare", &[&raw, &vhd], &["--from", "raw", "--from", "vhd"])),
    ];
    bench.compare(work, bench.pace.size, all);
    bench.require_speed(work, "cmp", 1.0);
    removed(&copy);
}

/// Removes the file at `path`, if it exists, and returns `path`.
pub fn removed(path: &Path) -> &Path {
    let _ = fs::remove_file(path);
    path
}
