//! Operations whose cost must depend on the amount of data and not on the size of the disk: copy and comparison of a
//! sparse disk, and inspection of a deep chain.

use crate::bench::{Bench, Candidate};
use crate::dense::removed;
use crate::disks::{BLOCKS, LAYERS, verify};
use crate::run::{diffdisk, qemu_convert, run};

/// Bytes of data of the sparse disk.
const DATA: u64 = 64 << 20;
/// Maximum time. A program that reads the holes takes minutes.
const SECONDS: f64 = 1.0;
const MEBIBYTES: f64 = 100.0;
/// Maximum time of a check, which reads all metadata.
const CHECK_SECONDS: f64 = 3.0;

pub fn sparse(bench: &mut Bench) {
    let raw = bench.sparse(DATA);
    let [vhd, mine, theirs] = ["sparse.vhd", "mine", "theirs"].map(|name| bench.path(name));
    let ours = ["--from", "raw", "--to", "dynamic"];
    let options = ["subformat=dynamic,force_size=on"];
    let work = "1 TiB with 64 MiB of data, raw to dynamic";
    let all = vec![
        Candidate::new("qemu-img", || qemu_convert(("raw", &raw), ("vpc", removed(&theirs)), &options)),
        Candidate::new("diffdisk", || diffdisk("convert", &[&raw, removed(&vhd)], &ours)),
    ];
    bench.compare(work, DATA, all);
    bench.require_at_most(work, SECONDS, MEBIBYTES);
    let work = "1 TiB with 64 MiB of data, dynamic to raw";
    let all = vec![
        Candidate::new("qemu-img", || qemu_convert(("vpc", &vhd), ("raw", removed(&theirs)), &[])),
        Candidate::new("diffdisk", || diffdisk("convert", &[&vhd, removed(&mine)], &["--to", "raw"])),
    ];
    bench.compare(work, DATA, all);
    verify(("raw", &mine), ("raw", &raw));
    bench.require_at_most(work, SECONDS, MEBIBYTES);
    let work = "1 TiB with 64 MiB of data, raw compared with dynamic";
    let compare = || diffdisk("compare", &[&raw, &vhd], &["--from", "raw", "--from", "vhd"]);
    bench.compare(work, DATA, vec![Candidate::new("diffdisk", compare)]);
    bench.require_at_most(work, SECONDS, MEBIBYTES);
    for path in [raw, vhd, mine, theirs] {
        removed(&path);
    }
}

pub fn deep(bench: &mut Bench) {
    let (top, root) = bench.deep();
    let of = |what: &str| format!("{what} of 2040 GiB, {LAYERS} layers of {BLOCKS} blocks");
    let root = root.to_str().expect("our own names");
    let looks: [(&str, &str, &[&str], f64); 6] = [
        ("info --chain", "info", &["--chain"], SECONDS),
        ("map", "map", &[], SECONDS),
        ("map --json", "map", &["--json"], SECONDS),
        ("diff", "diff", &[], SECONDS),
        ("diff --since the root", "diff", &["--since", root], SECONDS),
        ("check --chain", "check", &["--chain"], CHECK_SECONDS),
    ];
    for (what, verb, options, seconds) in looks {
        let look = || diffdisk(verb, &[&top], options);
        run(&mut look()); // brings the files into the page cache
        bench.compare(&of(what), 0, vec![Candidate::new("diffdisk", look)]);
        bench.require_at_most(&of(what), seconds, MEBIBYTES);
    }
}
