//! The image tool end to end: arguments, output, files left on disk, and the documented exit codes.
#![allow(clippy::cast_possible_truncation, reason = "the disks of these tests are small")]

#[path = "common/temp.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod temp;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use assert_cmd::Command;
use diffdisk::storage::host::Host;
use diffdisk::storage::{Access, Env, Lock};
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn folder() -> TempDir {
    temp::scratch("tools")
}

/// Runs `diffdisk` with the words of `line` in `folder`.
fn run(folder: &TempDir, line: &str) -> Output {
    let mut command = Command::cargo_bin("diffdisk").unwrap();
    command.current_dir(folder).args(line.split_whitespace()).output().unwrap()
}

#[track_caller]
fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs `diffdisk` and returns its standard output. Panics unless the program exits with `code` and prints nothing on
/// standard error.
#[track_caller]
fn run_expecting(folder: &TempDir, line: &str, code: i32) -> String {
    let out = run(folder, line);
    assert_eq!(out.status.code(), Some(code), "{line}: {}", text(&out.stderr));
    assert_eq!(text(&out.stderr), "", "{line}");
    text(&out.stdout).to_owned()
}

#[track_caller]
fn ok(folder: &TempDir, line: &str) -> String {
    run_expecting(folder, line, 0)
}

#[track_caller]
fn json(folder: &TempDir, line: &str) -> Value {
    serde_json::from_str(&ok(folder, line)).unwrap()
}

/// Runs `diffdisk`. Panics unless `diffdisk` fails with one line that begins with "diffdisk: ", `start` and a colon,
/// and that contains `why`, and prints nothing else.
#[track_caller]
fn assert_fails(folder: &TempDir, line: &str, start: &str, why: &str) {
    let out = run(folder, line);
    let message = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{line}: {message}");
    assert_eq!((message.lines().count(), text(&out.stdout)), (1, ""), "{line}: {message}");
    assert!(message.starts_with(&format!("diffdisk: {start}:")) && message.contains(why), "{line}: {message}");
}

/// Creates a raw disk of `len` bytes with data at several offsets, among them both ends and unaligned ones.
fn raw(folder: &TempDir, name: &str, len: u64) -> PathBuf {
    let path = folder.path().join(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len(len).unwrap();
    let mut places = vec![(0, 700), (len / 2 + 77, 3000), (len.saturating_sub(5), 5)];
    places.push((len / 3 / 512 * 512, 200_000));
    for (number, (at, count)) in (1..).zip(places) {
        let bytes: Vec<u8> = (0..count).map(|n: u64| (n * 7 % 251) as u8 | number << 6 | 1).collect();
        let there = len.saturating_sub(at).min(bytes.len() as u64);
        file.write_all_at(&bytes[..there as usize], at).unwrap();
    }
    file.sync_all().unwrap();
    path
}

fn allocated(folder: &TempDir, name: &str) -> u64 {
    fs::metadata(folder.path().join(name)).unwrap().blocks() * 512
}

/// Writes a sector of a dynamic or differencing image as another program would: adds a new block of 2 MiB with `bytes`
/// as its sector `sector`, and sets that sector's bit in the bitmap and the BAT entry of the block.
fn write_block(image: &Path, block: u32, sector: u64, bytes: &[u8; 512]) {
    let mut file = fs::read(image).unwrap();
    let footer = file.split_off(file.len() - 512);
    let table = u64::from_be_bytes(file[512 + 16..512 + 24].try_into().unwrap()) as usize;
    let entry = (file.len() / 512) as u32;
    file[table + block as usize * 4..][..4].copy_from_slice(&entry.to_be_bytes());
    let mut room = vec![0; 512 + 2 * MIB as usize];
    room[sector as usize / 8] |= 0x80 >> (sector % 8);
    room[512 + sector as usize * 512..][..512].copy_from_slice(bytes);
    file.extend(room);
    file.extend(footer);
    fs::write(image, file).unwrap();
}

#[test]
fn create_info_and_check_of_roots() {
    let d = folder();
    let message = ok(&d, "create r.vhd --size 10M");
    assert_eq!(message, "created r.vhd: dynamic, blocks of 2 MiB, 10 MiB\n");
    assert_eq!(ok(&d, "create q.vhd --size 1T --block-size 64M --reserve-size 2T --quiet"), "");
    ok(&d, "create f.vhd --size 3M --type fixed");
    assert_fails(&d, "create r.vhd --size 10M", "create: r.vhd", "exists");
    assert_fails(&d, "create none/r.vhd --size 10M", "create", "No such file");
    assert_fails(&d, "create t.vhd --size 2041G", "create", "2040 GiB");
    assert_fails(&d, "create t.vhd --size 1000", "create", "multiple of 512");
    assert_fails(&d, "create t.vhd --size 1T --block-size 4K", "create", "entries");
    let names: Vec<_> = fs::read_dir(&d).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");

    let info = json(&d, "info r.vhd --json");
    let keys = "allocated_bytes block_size blocks blocks_allocated created creator_app creator_host file_size format \
                in_use parent path session type uuid virtual_size written_bytes";
    let mut printed: Vec<_> = info.as_object().unwrap().keys().map(String::as_str).collect();
    printed.sort_unstable();
    assert_eq!(printed.join(" "), keys);
    assert_eq!((&info["path"], &info["format"], &info["type"]), (&"r.vhd".into(), &"vhd".into(), &"dynamic".into()));
    assert_eq!((info["virtual_size"].as_u64(), info["block_size"].as_u64()), (Some(10 * MIB), Some(2 * MIB)));
    assert_eq!((info["blocks"].as_u64(), info["blocks_allocated"].as_u64()), (Some(5), Some(0)));
    let len = fs::metadata(d.path().join("r.vhd")).unwrap().len();
    assert_eq!((info["file_size"].as_u64(), info["parent"].is_null()), (Some(len), true));
    assert_eq!((&info["creator_app"], &info["creator_host"]), (&"win".into(), &"Wi2k".into()));
    let created = info["created"].as_str().unwrap();
    assert!(created.len() == 20 && created.starts_with("20") && created.ends_with('Z'), "{created}");
    assert_eq!(info["uuid"].as_str().unwrap().len(), 36);
    assert_eq!(json(&d, "info q.vhd --json")["blocks"], 2 << 14);

    let fixed = json(&d, "info f.vhd --json --chain");
    assert_eq!((&fixed["type"], &fixed["file_size"]), (&"fixed".into(), &(3 * MIB + 512).into()));
    for key in ["block_size", "blocks", "blocks_allocated"] {
        assert!(fixed[key].is_null(), "{key}");
    }
    assert!(allocated(&d, "f.vhd") < 64 << 10);
    assert_eq!(fixed["chain"].as_array().unwrap().len(), 1);
    for image in ["r.vhd", "q.vhd", "f.vhd"] {
        let check = json(&d, &format!("check {image} --json"));
        assert_eq!(check["ok"], true, "{check}");
        assert_eq!((&check["corruptions"], &check["leaks"]), (&0.into(), &0.into()));
        assert_eq!((&check["path"], check["defects"].as_array().unwrap().len()), (&image.into(), 0));
    }
    assert!(ok(&d, "info r.vhd").contains("virtual size:   10 MiB (10485760 bytes)"));
}

#[test]
fn wrong_usage_ends_with_2() {
    let d = folder();
    for line in [
        "",
        "frobnicate",
        "create",
        "create x",
        "create x --size 1.5G",
        "create x --size 10M --block-size 3M",
        "create x --size 10M --type vhdx",
        "create x --size 10M --locator both",
        "create x --parent p --type fixed",
        "convert a b",
        "convert a b --to qcow2",
        "compare a",
        "info",
    ] {
        assert_eq!(run(&d, line).status.code(), Some(2), "{line}");
    }
    ok(&d, "--help");
    ok(&d, "convert --help");
    assert!(ok(&d, "--version").starts_with("diffdisk "));
}

#[test]
fn parents_are_opened_only_below_allowed_folders() {
    let d = folder();
    fs::create_dir_all(d.path().join("a/b")).unwrap();
    fs::create_dir(d.path().join("c")).unwrap();
    ok(&d, "create a/r.vhd --size 10M");
    // The child is created, and a warning names the option that is needed to open it.
    let out = run(&d, "create a/b/child.vhd --parent a/r.vhd");
    let folder = d.path().canonicalize().unwrap().join("a");
    assert_eq!(out.status.code(), Some(0));
    assert!(text(&out.stderr).ends_with(&format!("--allow-parents {}\n", folder.display())), "{}", text(&out.stderr));
    assert_fails(&d, "map a/b/child.vhd", "map: a/b/child.vhd", "r.vhd is there but not below an allowed folder");
    ok(&d, "create c/leaf.vhd --parent a/b/child.vhd --size 12M --locator relative --allow-parents a");
    assert_fails(&d, "create x.vhd --parent c/leaf.vhd", "create: c/leaf.vhd", "--allow-parents");
    assert_fails(&d, "create x.vhd --parent a/r.vhd --size 9M", "create: x.vhd", "less than");
    assert_fails(&d, "create x.vhd --parent nothing.vhd", "create: nothing.vhd", "No such file");

    let alone = json(&d, "info c/leaf.vhd --json");
    let parent = &alone["parent"];
    assert!(parent["resolved"].is_null());
    assert_eq!((&parent["name"], &alone["virtual_size"]), (&"../a/b/child.vhd".into(), &(12 * MIB).into()));
    let locators = parent["locators"].as_array().unwrap();
    assert_eq!(locators.len(), 1);
    assert_eq!((&locators[0]["platform"], &locators[0]["path"]), (&"W2ru".into(), &".\\..\\a\\b\\child.vhd".into()));
    let child = json(&d, "info a/b/child.vhd --json");
    let platforms: Vec<_> = child["parent"]["locators"].as_array().unwrap().iter().map(|l| &l["platform"]).collect();
    assert_eq!(platforms, ["W2ru", "W2ku"]);

    // The part of the chain that may be opened is printed, and the warning names the option that allows the rest.
    let out = run(&d, "info c/leaf.vhd --chain --json");
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(0), "{message}");
    assert!(message.contains("a/b/child.vhd is there") && message.contains("--allow-parents"), "{message}");
    let cut: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(cut["chain"].as_array().unwrap().len(), 1);
    assert!(cut["parent"]["resolved"].is_null() && cut["chain"][0]["parent"]["resolved"].is_null());
    // A parent outside the allowed folders is an error, and not reported as corruption.
    assert_fails(&d, "check c/leaf.vhd --chain", "check: c/leaf.vhd", "--allow-parents");
    let chain = json(&d, "info c/leaf.vhd --chain --json --allow-parents a");
    let chain = chain["chain"].as_array().unwrap();
    let types: Vec<_> = chain.iter().map(|image| &image["type"]).collect();
    assert_eq!(types, ["differencing", "differencing", "dynamic"]);
    assert_eq!(chain[0]["parent"]["resolved"], chain[1]["path"]);
    assert_eq!(chain[1]["parent"]["uuid"], chain[2]["uuid"]);
    let tree = ok(&d, "info c/leaf.vhd --chain --allow-parents a");
    assert!(tree.contains("\n     └─ "), "{tree}");

    assert_eq!(json(&d, "check c/leaf.vhd --json")["ok"], true); // the parent is not opened
    let sound = json(&d, "check c/leaf.vhd --chain --json --allow-parents a --allow-parents a/b");
    assert_eq!((&sound["ok"], sound["chain"].as_array().unwrap().len()), (&true.into(), 3));

    // Another image replaces the parent.
    fs::remove_file(d.path().join("a/r.vhd")).unwrap();
    ok(&d, "create a/r.vhd --size 10M");
    let out = run(&d, "check c/leaf.vhd --chain --json --allow-parents a");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), &report["corruptions"]), (Some(3), &1.into()));
    assert_eq!(report["defects"][0]["kind"], "parent-uuid");
    assert!(report["defects"][0]["path"].as_str().unwrap().ends_with("a/b/child.vhd"));
    assert_fails(&d, "map c/leaf.vhd --allow-parents a", "map", "UUID");
    assert_fails(&d, "convert c/leaf.vhd - --to raw --allow-parents a", "convert", "UUID");
}

#[test]
fn a_link_to_an_image_is_followed_and_a_chain_has_an_end() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    symlink("r.vhd", d.path().join("link.vhd")).unwrap();
    ok(&d, "create n1.vhd --parent link.vhd --block-size 512K");
    assert_eq!(json(&d, "info n1.vhd --json")["parent"]["name"], "r.vhd");
    for n in 1..63 {
        ok(&d, &format!("create n{}.vhd --parent n{n}.vhd", n + 1));
    }
    assert_eq!(json(&d, "info n63.vhd --chain --json")["chain"].as_array().unwrap().len(), 64);
    assert_eq!(json(&d, "info n63.vhd --json")["block_size"], 512 << 10, "a child has its parent's block size");
    assert_fails(&d, "create n64.vhd --parent n63.vhd", "create: n64.vhd", "more than 64 files");
    assert!(!d.path().join("n64.vhd").exists());
    let map = json(&d, "map n63.vhd --json");
    assert_eq!(map.as_array().unwrap().len(), 1);
}

#[test]
fn check_distinguishes_corruption_from_leaks() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    write_block(&d.path().join("r.vhd"), 1, 0, &[1; 512]);
    let image = fs::read(d.path().join("r.vhd")).unwrap();
    ok(&d, "check r.vhd");
    let write = |bytes: &[u8]| fs::write(d.path().join("r.vhd"), bytes).unwrap();

    // After this change no BAT entry points to the first of the two blocks.
    write_block(&d.path().join("r.vhd"), 2, 0, &[1; 512]);
    let mut two = fs::read(d.path().join("r.vhd")).unwrap();
    two[4096 + 4..4096 + 8].copy_from_slice(&[0xFF; 4]);
    write(&two);
    let leak: Value = serde_json::from_str(&run_expecting(&d, "check r.vhd --json", 4)).unwrap();
    assert_eq!((&leak["ok"], &leak["leaks"], &leak["corruptions"]), (&false.into(), &1.into(), &0.into()));
    let defect = leak["defects"][0].as_object().unwrap();
    assert_eq!(defect.keys().map(String::as_str).collect::<Vec<_>>(), ["detail", "kind", "offset", "repairable"]);
    assert_eq!((&defect["offset"], &defect["repairable"]), (&4608.into(), &true.into())); // after the BAT
    assert!(run_expecting(&d, "check r.vhd", 4).contains("leaks 1"));

    let mut bad = image.clone();
    let entry: [u8; 4] = bad[4096 + 4..4096 + 8].try_into().unwrap();
    bad[4096..4100].copy_from_slice(&entry);
    write(&bad);
    let out = run(&d, "check r.vhd");
    let line = text(&out.stderr);
    assert_eq!((out.status.code(), line.lines().count()), (Some(3), 1), "{line}");
    assert!(line.starts_with("diffdisk: check: r.vhd: blocks ") && line.contains("(at byte "), "{line}");
    assert!(text(&out.stdout).starts_with("block-duplicate: "), "{}", text(&out.stdout));
    assert_fails(&d, "info r.vhd", "info: r.vhd", "(at byte ");
    assert_fails(&d, "convert r.vhd - --to raw", "convert: r.vhd", "(at byte ");

    write(&[]);
    let out = run(&d, "check r.vhd --json");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), &report["defects"][0]["kind"]), (Some(3), &"file-too-short".into()));
    assert_fails(&d, "check nothing.vhd", "check: nothing.vhd", "No such file");
    assert_fails(&d, "check .", "check: .", "not a regular file");
}

/// Returns the kinds of the entries in the list `list` of a report.
fn kinds(report: &Value, list: &str) -> Vec<String> {
    report[list].as_array().unwrap().iter().map(|d| d["kind"].as_str().unwrap().to_owned()).collect()
}

/// Runs `check --json` and returns the report. Panics unless it exits with `code`.
#[track_caller]
fn checked(folder: &TempDir, line: &str, code: i32) -> Value {
    let out = run(folder, &format!("check {line} --json"));
    assert_eq!(out.status.code(), Some(code), "{line}: {}{}", text(&out.stdout), text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn a_repair_reports_its_changes_and_can_be_undone() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    write_block(&d.path().join("r.vhd"), 1, 0, &[1; 512]);
    ok(&d, "create c.vhd --parent r.vhd");
    write_block(&d.path().join("c.vhd"), 2, 5, &[2; 512]);
    let (path, root) = (d.path().join("c.vhd"), d.path().join("r.vhd"));
    let disk = run(&d, "convert c.vhd - --to raw").stdout;
    assert_eq!(json(&d, "check c.vhd --json --repair")["repaired"], Value::Null, "nothing to do, nothing done");
    assert_eq!(fs::read_dir(&d).unwrap().count(), 2);

    let mut broken = fs::read(&path).unwrap();
    broken[100] ^= 1;
    fs::write(&path, &broken).unwrap();
    let mut longer = fs::read(&root).unwrap();
    let footer = longer.split_off(longer.len() - 512);
    longer.extend(vec![0xEE; 58 * 512]);
    longer.extend(footer);
    fs::write(&root, &longer).unwrap();
    let found = checked(&d, "c.vhd --chain", 3);
    assert_eq!(kinds(&found, "defects"), ["front-footer-invalid", "space-unreferenced"]);
    assert!(found["defects"].as_array().unwrap().iter().all(|d| d["repairable"] == true), "{found}");
    assert_eq!((&found["corruptions"], &found["leaks"], &found["cosmetic"]), (&1.into(), &1.into(), &0.into()));

    // Without --chain only the file itself is repaired.
    let out = ok(&d, "check c.vhd --repair");
    let mut lines = out.lines();
    assert!(lines.next().unwrap().starts_with("repaired: c.vhd: front-footer-invalid: "), "{out}");
    let kept = lines.next().unwrap().strip_prefix("c.vhd: the replaced bytes are saved in ").unwrap();
    let undo = fs::read(d.path().join(kept)).unwrap();
    assert!(kept.starts_with("c.vhd.repair-") && kept.ends_with(".undo"), "{kept}");
    assert_eq!((&undo[..16], undo[512 + 16 + 100]), (&b"diffdisk undo 2\n"[..], broken[100]));
    assert_eq!(lines.next(), Some("c.vhd: no defects"));
    assert_eq!(checked(&d, "c.vhd --chain", 4)["defects"][0]["path"], found["defects"][1]["path"]);

    let mended = checked(&d, "c.vhd --chain --repair", 0);
    assert_eq!((kinds(&mended, "defects").len(), mended["ok"].as_bool()), (0, Some(true)));
    let repaired = &mended["repaired"][0];
    assert_eq!(kinds(repaired, "defects"), ["space-unreferenced"]);
    assert_eq!(repaired["path"], found["defects"][1]["path"]);
    assert!(fs::metadata(d.path().join(repaired["undo"].as_str().unwrap())).unwrap().len() >= 58 * 512);
    assert!(run(&d, "convert c.vhd - --to raw").stdout == disk);
    assert_eq!(fs::read_dir(&d).unwrap().count(), 4);

    // Defects whose repair would be a guess are reported and not repaired.
    let mut twice = fs::read(&path).unwrap();
    let entry: [u8; 4] = twice[4096 + 8..4096 + 12].try_into().unwrap();
    twice[4096..4100].copy_from_slice(&entry);
    twice[100] ^= 1;
    fs::write(&path, &twice).unwrap();
    let left = checked(&d, "c.vhd --repair", 3);
    assert_eq!(kinds(&left, "defects"), ["block-duplicate"]);
    assert_eq!(kinds(&left["repaired"][0], "defects"), ["front-footer-invalid"]);
    assert_eq!(left["defects"][0]["repairable"], false);

    let mut broken = fs::read(&root).unwrap();
    broken[100] ^= 1;
    fs::write(&root, &broken).unwrap();
    let reader = Host.open(&root, Access::Read).unwrap();
    reader.lock(Lock::Shared).unwrap();
    assert_fails(&d, "check r.vhd --repair", "check", "has it open");
    assert!(fs::read(&root).unwrap() == broken);
}

#[test]
fn diff_lists_the_changes_since_an_ancestor() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    write_block(&d.path().join("r.vhd"), 1, 3, &[1; 512]);
    ok(&d, "create m.vhd --parent r.vhd");
    write_block(&d.path().join("m.vhd"), 1, 4, &[2; 512]);
    ok(&d, "create c.vhd --parent m.vhd");
    write_block(&d.path().join("c.vhd"), 1, 5, &[3; 512]);
    write_block(&d.path().join("c.vhd"), 3, 0, &[4; 512]);
    let block = 2 * MIB;
    let runs = |line: &str| -> Vec<(u64, u64)> {
        let printed = json(&d, &format!("diff {line} --json"));
        let run = |run: &Value| {
            assert_eq!(run.as_object().unwrap().len(), 2);
            (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap())
        };
        printed.as_array().unwrap().iter().map(run).collect()
    };
    assert_eq!(runs("c.vhd"), [(block + 5 * 512, 512), (3 * block, 512)]);
    assert_eq!(runs("c.vhd --since m.vhd"), runs("c.vhd"));
    assert_eq!(runs("c.vhd --since r.vhd"), [(block + 4 * 512, 1024), (3 * block, 512)]);
    assert_eq!(runs("c.vhd --since c.vhd"), []);
    assert_eq!(ok(&d, "diff m.vhd --since m.vhd"), "total 0 bytes in 0 ranges\n");
    let table = ok(&d, "diff c.vhd");
    assert_eq!(table.lines().count(), 4);
    assert!(table.lines().take(3).all(|line| line.len() == 33), "{table}");
    assert!(table.ends_with("total 1 KiB (1024 bytes) in 2 ranges\n"), "{table}");
    assert_eq!(ok(&d, "diff c.vhd --quiet").lines().count(), 3);
    assert_fails(&d, "diff r.vhd", "diff: r.vhd", "no parent");
    assert_fails(&d, "diff m.vhd --since c.vhd", "diff: c.vhd", "no ancestor");
    assert_fails(&d, "diff c.vhd --since none.vhd", "diff: none.vhd", "No such file");
}

#[test]
fn sizes_are_rounded_up_on_request() {
    let d = folder();
    let wanted = fs::read(raw(&d, "a.raw", 3 * MIB + 512)).unwrap();
    for (to, len) in [("fixed", 4 * MIB + 512), ("raw", 4 * MIB)] {
        ok(&d, &format!("convert a.raw b --from raw --to {to} --align 1M --force"));
        assert_eq!(fs::metadata(d.path().join("b")).unwrap().len(), len);
        let copy = fs::read(d.path().join("b")).unwrap();
        assert!(copy[..wanted.len()] == wanted && copy[wanted.len()..4 * MIB as usize].iter().all(|b| *b == 0));
    }
    let stream = run(&d, "convert a.raw - --from raw --to raw --align 64K").stdout;
    assert_eq!(stream.len() as u64, 3 * MIB + (64 << 10));
    ok(&d, "convert a.raw c.vhd --from raw --to dynamic --align 1M");
    assert_eq!(json(&d, "info c.vhd --json")["virtual_size"], 4 * MIB);
    ok(&d, "convert a.raw e.vhd --from raw --to fixed");
    assert_eq!(json(&d, "info e.vhd --json")["virtual_size"], 3 * MIB + 512, "exact unless asked otherwise");
    assert_eq!(run(&d, "convert a.raw f.vhd --from raw --to fixed --align 1000").status.code(), Some(2));
    assert_eq!(run(&d, "convert a.raw f.vhd --from raw --to fixed --align 0").status.code(), Some(2));
}

#[test]
fn names_from_images_do_not_reach_the_terminal_raw() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    ok(&d, "create c.vhd --parent r.vhd");
    fs::rename(d.path().join("r.vhd"), d.path().join("\u{1b}]0;x.vhd")).unwrap();
    let mut command = Command::cargo_bin("diffdisk").unwrap();
    command.current_dir(&d).args(["create", "e.vhd", "--parent", "\u{1b}]0;x.vhd"]);
    command.assert().success();
    assert!(!ok(&d, "info e.vhd --chain").contains('\u{1b}'));
    fs::remove_file(d.path().join("\u{1b}]0;x.vhd")).unwrap();
    let out = run(&d, "info e.vhd --chain");
    // The warning and the fields contain the missing parent's name.
    assert!(text(&out.stderr).contains("the parent is not there") && out.status.code() == Some(0));
    assert!(!out.stderr.contains(&0x1b) && !out.stdout.contains(&0x1b));
}

#[test]
fn a_map_covers_the_disk() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    ok(&d, "create c.vhd --parent r.vhd --size 11M");
    write_block(&d.path().join("r.vhd"), 1, 3, &[1; 512]);
    write_block(&d.path().join("c.vhd"), 1, 4, &[2; 512]);
    write_block(&d.path().join("c.vhd"), 4, 0, &[3; 512]);
    let runs = json(&d, "map c.vhd --json");
    let runs = runs.as_array().unwrap();
    let block = 2 * MIB;
    let printed: Vec<_> = runs.iter().map(|r| (r["start"].as_u64().unwrap(), r["depth"].as_u64())).collect();
    let wanted = [
        (0, None),
        (block + 3 * 512, Some(1)),
        (block + 4 * 512, Some(0)),
        (block + 5 * 512, None),
        (4 * block, Some(0)),
        (4 * block + 512, None),
    ];
    assert_eq!(printed, wanted);
    let mut at = 0;
    for run in runs {
        assert_eq!(run["start"], at);
        at += run["length"].as_u64().unwrap();
        assert_eq!(run.as_object().unwrap().len(), 6);
        let answered = !run["zero"].as_bool().unwrap();
        assert!(answered == run["file"].is_string() && answered == run["offset"].is_u64(), "{run}");
        if answered {
            let mut sector = [0; 512];
            let file = fs::File::open(d.path().join(run["file"].as_str().unwrap())).unwrap();
            file.read_exact_at(&mut sector, run["offset"].as_u64().unwrap()).unwrap();
            assert!(sector.iter().all(|&b| b > 0), "{run}");
        }
    }
    assert_eq!(at, 11 * MIB);
    assert_eq!(ok(&d, "map c.vhd").lines().count(), 7);
    ok(&d, "create f.vhd --size 3M --type fixed");
    assert_eq!(json(&d, "map f.vhd --json")[0]["length"], 3 * MIB);
    ok(&d, "create huge.vhd --size 2040G");
    assert_eq!(json(&d, "map huge.vhd --json")[0]["length"], 2040u64 << 30);
    let stream = run(&d, "convert c.vhd - --to raw").stdout;
    assert_eq!(stream.len() as u64, 11 * MIB);
    for (at, byte) in [(block + 3 * 512, 1), (block + 4 * 512, 2), (4 * block, 3), (4 * block + 512, 0), (0, 0)] {
        assert_eq!(stream[at as usize..][..512], [byte; 512], "{at}");
    }
}

#[test]
fn conversions_between_all_formats_keep_the_disk() {
    let d = folder();
    for len in [512, 4096, 70_000 * 512, 37 * MIB + 512] {
        let source = raw(&d, "a.raw", len);
        let wanted = fs::read(&source).unwrap();
        let mut images = vec!["fixed".to_owned()];
        images.extend(["4K", "64K", "512K", "2M", "16M", "256M"].map(|size| format!("dynamic --block-size {size}")));
        for to in images {
            assert_eq!(ok(&d, &format!("convert a.raw b.vhd --from raw --to {to}")), "");
            ok(&d, "check b.vhd");
            assert_eq!(json(&d, "info b.vhd --json")["virtual_size"], len, "{to}");
            ok(&d, "convert b.vhd c.raw --to raw");
            assert!(fs::read(d.path().join("c.raw")).unwrap() == wanted, "{to}, {len}");
            assert!(run(&d, "convert b.vhd - --to raw").stdout == wanted, "{to}, {len}, streamed");
            assert_eq!(ok(&d, "compare a.raw b.vhd --from raw --from vhd"), "equal\n");
            ok(&d, "convert b.vhd d.vhd --to dynamic");
            assert_eq!(ok(&d, "compare b.vhd d.vhd --quiet"), "");
            // An image with blocks of 4 KiB needs a page for the bitmap of each block, and a large BAT.
            let dense = if to.ends_with(" 4K") { 2 } else { 1 };
            for (name, times) in [("b.vhd", dense), ("c.raw", 1), ("d.vhd", 1)] {
                let (got, of) = (allocated(&d, name), allocated(&d, "a.raw"));
                assert!(got <= of * times + (96 << 10), "{name} ({to}, {len}): {got} bytes of room for {of}");
                fs::remove_file(d.path().join(name)).unwrap();
            }
        }
    }
}

#[test]
fn a_raw_disk_of_odd_length_is_padded() {
    let d = folder();
    let wanted = fs::read(raw(&d, "a.raw", 3 * MIB + 77)).unwrap();
    let out = run(&d, "convert a.raw b.vhd --from raw --to dynamic");
    assert!(out.status.success() && text(&out.stderr).contains("filled up with zeros"), "{out:?}");
    assert_eq!(json(&d, "info b.vhd --json")["virtual_size"], 3 * MIB + 512);
    let stream = run(&d, "convert b.vhd - --to raw").stdout;
    assert!(stream[..wanted.len()] == wanted && stream[wanted.len()..].iter().all(|&b| b == 0));
    ok(&d, "convert a.raw c.raw --from raw --to raw");
    assert!(fs::read(d.path().join("c.raw")).unwrap() == wanted);
    assert!(ok(&d, "compare a.raw b.vhd --from raw --from vhd").ends_with("equal\n"));
    fs::write(d.path().join("none.raw"), []).unwrap();
    assert_fails(&d, "convert none.raw x.vhd --from raw --to fixed", "convert", "virtual size of 0 bytes");
    assert_fails(&d, "convert a.raw x.raw --to raw", "convert: a.raw", "--from raw");
    assert_eq!(ok(&d, "convert none.raw - --from raw --to raw"), "");
}

#[test]
fn compare_finds_the_first_difference() {
    let d = folder();
    let path = raw(&d, "a.raw", 5 * MIB);
    ok(&d, "convert a.raw a.vhd --from raw --to dynamic");
    let file = fs::File::options().write(true).open(&path).unwrap();
    let compare = "compare a.raw a.vhd --from raw --from vhd";
    for at in [5 * MIB - 1, 4 * MIB, 3 * MIB + 1, 2 * MIB - 1, 1] {
        file.write_all_at(&[0xEE], at).unwrap();
        assert_eq!(run_expecting(&d, compare, 5), format!("different from byte {at} on\n"));
        assert_eq!(
            run_expecting(&d, "compare a.vhd a.raw --from vhd --from raw", 5),
            format!("different from byte {at} on\n")
        );
    }
    raw(&d, "b.raw", 5 * MIB);
    fs::File::options().write(true).open(d.path().join("b.raw")).unwrap().set_len(6 * MIB).unwrap();
    let message = ok(&d, "compare b.raw a.vhd --from raw --from vhd");
    assert!(message.starts_with("sizes differ") && message.ends_with("equal\n"), "{message}");
    let longer = fs::File::options().write(true).open(d.path().join("b.raw")).unwrap();
    longer.write_all_at(&[1], 5 * MIB + 100).unwrap();
    assert!(
        run_expecting(&d, "compare a.vhd b.raw --from vhd --from raw", 5).contains(&format!("byte {}", 5 * MIB + 100))
    );
    ok(&d, "compare b.raw b.raw --from raw");
    assert_fails(&d, "compare a.vhd nothing", "compare: nothing", "No such file");
}

#[test]
fn existing_files_are_replaced_only_with_force_and_atomically() {
    let d = folder();
    raw(&d, "a.raw", MIB);
    fs::write(d.path().join("b.vhd"), "precious").unwrap();
    assert_fails(&d, "convert a.raw b.vhd --from raw --to dynamic", "convert: b.vhd", "--force");
    assert_eq!(fs::read(d.path().join("b.vhd")).unwrap(), b"precious");
    // A failure with --force leaves the existing file, and leaves no other file.
    fs::write(d.path().join("none.raw"), []).unwrap();
    assert_fails(&d, "convert none.raw b.vhd --from raw --to dynamic --force", "convert: b.vhd", "virtual size");
    assert_eq!(fs::read(d.path().join("b.vhd")).unwrap(), b"precious");
    ok(&d, "convert a.raw b.vhd --from raw --to dynamic --force");
    assert_eq!(ok(&d, "compare a.raw b.vhd --from raw --from vhd"), "equal\n");
    assert_fails(&d, "convert a.raw a.raw --from raw --to raw --force", "convert", "open");
    assert_fails(&d, "convert b.vhd . --to raw --force", "convert", "regular file");
    assert_fails(&d, "convert b.vhd - --to fixed", "convert: -", "--to raw");
    assert_eq!(fs::read_dir(&d).unwrap().count(), 3);
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let d = folder();
    // The disk consists of data only, so that the conversion takes long enough to be interrupted.
    let source = fs::File::create(d.path().join("a.raw")).unwrap();
    for n in 0..256 {
        source.write_all_at(&vec![7; MIB as usize], n * MIB).unwrap();
    }
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("diffdisk"));
    command.current_dir(&d).args(["convert", "a.raw", "b.vhd", "--from", "raw", "--to", "dynamic"]);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    // The new file has no name before it is complete. Its file descriptor shows that the conversion has begun.
    let descriptors = format!("/proc/{}/fd", child.id());
    let begun =
        |entry: fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to.display().to_string().contains("/#"));
    while !fs::read_dir(&descriptors).unwrap().flatten().any(begun) {
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(text(&out.stderr), "diffdisk: convert: b.vhd: interrupted\n");
    assert_eq!(fs::read_dir(&d).unwrap().count(), 1);
}

#[test]
fn a_writer_excludes_readers() {
    let d = folder();
    ok(&d, "create r.vhd --size 10M");
    ok(&d, "create c.vhd --parent r.vhd");
    let served = Host.open(&d.path().join("r.vhd"), Access::Write).unwrap();
    served.lock(Lock::Exclusive).unwrap();
    ok(&d, "info r.vhd");
    ok(&d, "info c.vhd --chain");
    ok(&d, "check c.vhd");
    for line in [
        "check r.vhd",
        "check c.vhd --chain",
        "map c.vhd",
        "convert r.vhd x --to raw",
        "convert c.vhd - --to raw",
        "compare c.vhd c.vhd",
        "create x.vhd --parent r.vhd",
        "convert c.vhd r.vhd --to raw --force",
    ] {
        assert_fails(&d, line, line.split(' ').next().unwrap(), "has it open");
    }
    assert!(!d.path().join("x").exists() && !d.path().join("x.vhd").exists());
    served.lock(Lock::Shared).unwrap();
    ok(&d, "check c.vhd --chain");
}

#[test]
fn a_closed_pipe_is_an_error_and_no_panic() {
    let d = folder();
    ok(&d, "create r.vhd --size 64M");
    let program = assert_cmd::cargo::cargo_bin("diffdisk");
    let start = |line: &str| {
        let mut command = std::process::Command::new(&program);
        let command = command.current_dir(&d).args(line.split(' ')).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap()
    };
    let out = start("convert r.vhd - --to raw");
    assert_eq!(out.status.code(), Some(1));
    let message = text(&out.stderr);
    assert!(message.starts_with("diffdisk: convert: ") && message.contains("Broken pipe"), "{message}");
    for line in ["info r.vhd", "map r.vhd", "map r.vhd --json", "check r.vhd"] {
        let out = start(line);
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""), "{line}");
    }
}
