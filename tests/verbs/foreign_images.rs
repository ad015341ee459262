//! Small images as other programs make them: `check` accepts the valid ones and names the defects of the others.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::temp::scratch;
use crate::common::tool::{Finished, diffdisk};
use crate::common::vhd_bytes::{DIFFERENCING, VhdFile, VhdSpec, footer, header, id, utf16le, write_file};

fn run(folder: &Path, args: &[&str]) -> Finished {
    let args = args.iter().map(|arg| match folder.join(arg) {
        path if path.exists() || arg.ends_with(".vhd") || arg.ends_with(".raw") => path.display().to_string(),
        _ => (*arg).to_owned(),
    });
    diffdisk(args)
}

fn kinds(folder: &Path, name: &str) -> (Option<i32>, Vec<String>) {
    let done = run(folder, &["check", name, "--json"]);
    let report = done.json();
    let defects = report["defects"].as_array().expect("a list");
    (done.code, defects.iter().map(|d| d["kind"].as_str().expect("a word").to_owned()).collect())
}

#[track_caller]
fn assert_healthy(folder: &Path, name: &str) {
    assert_eq!(kinds(folder, name), (Some(0), vec![]), "{name}");
}

/// Makes a child as Windows does, with 64 KiB reserved for the relative path.
fn windows(folder: &Path) -> VhdFile {
    let parent = VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[1]).with_uuid(id(7));
    VhdFile::create(&folder.join("win-parent.vhd"), parent);
    let vhd =
        VhdFile::create(&folder.join("win-child.vhd"), VhdSpec::child(256 << 10, 64 << 10, id(7), "win-parent.vhd"));
    let mut footer = [0; 512];
    vhd.file.read_exact_at(&mut footer, 0).expect("a footer");
    let (table, place) = (8192_u64, 81408);
    vhd.set_header(header::TABLE_OFFSET, &table.to_be_bytes());
    // Zeros that are written, not holes.
    vhd.put(1536, &vec![0; 81408 - 1536 + 512 + (64 << 10)]);
    vhd.put(table, &[0xFF; 512]);
    vhd.put(table, &u32::try_from(place / 512).expect("a place").to_be_bytes());
    for (slot, code, text, space, at) in
        [(0, b"W2ku", "C:\\VMs\\win-parent.vhd", 4096, 4096), (1, b"W2ru", ".\\win-parent.vhd", 64 << 10, 12288)]
    {
        let text = utf16le(text);
        vhd.put(at, &text);
        vhd.set_locator(slot, code, space, u32::try_from(text.len()).expect("short"), at);
    }
    vhd.put(place, &[0x20]);
    vhd.put(place + 512 + 1024, &[0x77; 512]);
    vhd.put(place + vhd.stride(), &footer);
    vhd
}

#[test]
fn space_that_windows_reserves_for_a_locator_is_no_leak() {
    let scratch = scratch("field");
    let folder = scratch.path();
    windows(folder);
    assert_healthy(folder, "win-child.vhd");
    for verb in [&["resize", "win-child.vhd", "1M"][..], &["flatten", "win-child.vhd"]] {
        windows(folder);
        run(folder, verb).ok();
        assert_healthy(folder, "win-child.vhd");
    }
    windows(folder);
    fs::copy(folder.join("win-parent.vhd"), folder.join("other.vhd")).expect("a copy");
    run(folder, &["rebase", "win-child.vhd", "--parent", "other.vhd"]).ok();
    assert_healthy(folder, "win-child.vhd");
}

#[test]
fn an_export_of_xen_orchestra_has_no_batmap() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let spec = VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[0]);
    let vhd = VhdFile::create(&folder.join("tap.vhd"), spec);
    vhd.set_footers(footer::CREATOR, b"tap\0").set_footers(footer::CREATOR_VERSION, &0x0001_0003_u32.to_be_bytes());
    assert_healthy(folder, "tap.vhd");
    // The blocks begin right after the BAT, as in exports of Xen Orchestra.
    let mut bytes = fs::read(&vhd.path).expect("the image");
    let (table, block) = (2048, usize::try_from(vhd.blocks_at).expect("small"));
    let moved = bytes.split_off(block);
    bytes.truncate(table);
    bytes.extend(moved);
    bytes[1536..1540].copy_from_slice(&4_u32.to_be_bytes());
    fs::write(&vhd.path, &bytes).expect("it is written");
    assert_healthy(folder, "tap.vhd");
    run(folder, &["convert", "tap.vhd", "tap.raw", "--to", "raw"]).ok();
    run(folder, &["resize", "tap.vhd", "1M"]).ok();
    assert_healthy(folder, "tap.vhd");
    // Unreferenced bytes at the place of a batmap's header are reported as a damaged batmap.
    let spec = VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[0]);
    let vhd = VhdFile::create(&folder.join("damaged.vhd"), spec);
    vhd.set_footers(footer::CREATOR, b"tap\0").set_footers(footer::CREATOR_VERSION, &0x0001_0003_u32.to_be_bytes());
    vhd.put(2048, b"tdbatmaX");
    assert_eq!(kinds(folder, "damaged.vhd"), (Some(3), vec!["batmap-header".to_owned()]));
}

#[test]
fn an_entry_of_zero_is_unused() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let vhd = VhdFile::create(&folder.join("zero.vhd"), VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[1]));
    vhd.set_entry(2, 0).set_entry(3, 0);
    assert_eq!(kinds(folder, "zero.vhd"), (Some(4), vec!["entry-zero".to_owned()]));
    let warned = run(folder, &["convert", "zero.vhd", "before.raw", "--to", "raw"]).ok();
    assert_eq!(warned.stderr.lines().filter(|line| line.starts_with("warn")).count(), 1, "{}", warned.stderr);
    run(folder, &["check", "zero.vhd", "--repair"]).ok();
    assert_healthy(folder, "zero.vhd");
    let table = fs::read(&vhd.path).expect("the image")[1536 + 8..1536 + 16].to_vec();
    assert_eq!(table, [0xFF; 8]);
    run(folder, &["convert", "zero.vhd", "after.raw", "--to", "raw"]).ok();
    let read = |name: &str| fs::read(folder.join(name)).expect("a disk");
    assert!(read("before.raw") == read("after.raw"));
}

#[test]
fn fixed_images_with_extra_bytes() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let vhd = VhdFile::create(&folder.join("padded.vhd"), VhdSpec::fixed(64 << 10));
    let whole = fs::read(&vhd.path).expect("the image");
    vhd.set_len(vhd.len() + 3584);
    assert_eq!(kinds(folder, "padded.vhd"), (Some(3), vec!["fixed-padded".to_owned()]));
    for verb in
        [&["convert", "padded.vhd", "a.raw", "--to", "raw"][..], &["info", "padded.vhd"], &["map", "padded.vhd"]]
    {
        let refused = run(folder, verb);
        assert!(refused.code == Some(1) && refused.stderr.contains("padded"), "{}", refused.stderr);
    }
    run(folder, &["check", "padded.vhd", "--repair"]).ok();
    assert_healthy(folder, "padded.vhd");
    assert!(fs::read(&vhd.path).expect("the image") == whole);
    let more = [vec![0x55; 32 << 10], whole].concat();
    write_file(&folder.join("more.vhd"), &more);
    assert_eq!(kinds(folder, "more.vhd"), (Some(4), vec!["fixed-more".to_owned()]));
    let warned = run(folder, &["convert", "more.vhd", "more.raw", "--to", "raw"]).ok();
    assert!(warned.stderr.contains("32768 bytes after the end of the disk"), "{}", warned.stderr);
}

#[test]
fn footers_of_different_types_need_a_choice() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let vhd = VhdFile::create(&folder.join("kinds.vhd"), VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[1]));
    let whole = fs::read(&vhd.path).expect("the image");
    vhd.set_footer(vhd.footer_at, footer::TYPE, &DIFFERENCING.to_be_bytes());
    let broken = fs::read(&vhd.path).expect("the image");
    for verb in [&["check", "kinds.vhd", "--repair"][..], &["resize", "kinds.vhd", "1M"], &["compact", "kinds.vhd"]] {
        let done = run(folder, verb);
        assert!(matches!(done.code, Some(1 | 3)) && done.stderr.contains("--take"), "{verb:?}: {}", done.stderr);
        assert!(fs::read(&vhd.path).expect("the image") == broken, "{verb:?}");
    }
    // The image is a child without a parent now, which is a defect.
    run(folder, &["check", "kinds.vhd", "--repair", "--take", "end"]);
    assert_eq!(kinds(folder, "kinds.vhd"), (Some(3), vec!["parent-raw".to_owned()]));
    fs::write(&vhd.path, &broken).expect("it is written");
    run(folder, &["check", "kinds.vhd", "--repair", "--take", "front"]).ok();
    assert!(fs::read(&vhd.path).expect("the image") == whole);
    assert_eq!(diffdisk(["check", "x", "--take", "front"]).code, Some(2));
}

#[test]
fn other_formats_are_named() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let mut vdi = vec![0; 1 << 16];
    vdi[64..68].copy_from_slice(&[0x7F, 0x10, 0xDA, 0xBE]);
    let heads: [(&str, &[u8]); 5] = [
        ("VHDX", b"vhdxfile"),
        ("qcow2", b"QFI\xFB\0\0\0\x03"),
        ("VMDK", b"KDMV"),
        ("VMDK", b"# Disk DescriptorFile\n"),
        ("VDI", &vdi),
    ];
    for (name, head) in heads {
        let path = write_file(&folder.join("really.vhd"), &[head, &[0; 1 << 16]].concat());
        for verb in
            [&["check", "really.vhd"][..], &["info", "really.vhd"], &["convert", "really.vhd", "a.raw", "--to", "raw"]]
        {
            let refused = run(folder, verb);
            let line = refused.stderr.lines().last().expect("a line");
            assert!(line.contains(&format!("a {name} image")) && line.contains("qemu-img convert"), "{line}");
            assert!(matches!(refused.code, Some(1 | 3)) && !line.contains("--from raw"), "{line}");
        }
        let warned = run(folder, &["convert", "really.vhd", "b.raw", "--to", "raw", "--from", "raw", "--force"]).ok();
        assert!(warned.stderr.starts_with("warn") && warned.stderr.contains(name), "{}", warned.stderr);
        assert!(fs::read(folder.join("b.raw")).expect("the copy") == fs::read(path).expect("the source"));
    }
    let raw: PathBuf = write_file(&folder.join("disk.raw"), &[7; 4096]);
    let quiet = run(folder, &["convert", "disk.raw", "c.raw", "--to", "raw", "--from", "raw"]).ok();
    assert_eq!((quiet.stderr.as_str(), raw.exists()), ("", true));
}

#[test]
fn every_verb_warns_of_a_damaged_image_or_refuses_it() {
    let scratch = scratch("field");
    let folder = scratch.path();
    let make = || VhdFile::create(&folder.join("disk.vhd"), VhdSpec::dynamic(256 << 10, 64 << 10).with_blocks(&[1, 0]));
    let readers: [&[&str]; 3] = [
        &["convert", "disk.vhd", "disk.raw", "--to", "raw", "--force"],
        &["map", "disk.vhd"],
        &["create", "child.vhd", "--parent", "disk.vhd"],
    ];
    // A damaged image that is readable causes one warning.
    let vhd = make();
    vhd.set_len(vhd.footer_at);
    for verb in readers {
        let done = run(folder, verb).ok();
        let warnings = done.stderr.lines().filter(|line| line.starts_with("warn") && line.contains("check"));
        assert_eq!(warnings.count(), 1, "{verb:?}: {}", done.stderr);
    }
    fs::remove_file(folder.join("child.vhd")).expect("it goes");
    let told = run(folder, &["info", "disk.vhd"]).ok();
    assert!(String::from_utf8_lossy(&told.stdout).contains("damage:"), "{told:?}");
    // An image whose last block has lost half of its sectors is refused, except by `check` and by `convert --salvage`.
    vhd.set_len(vhd.footer_at - (32 << 10));
    for verb in readers {
        let done = run(folder, verb);
        assert!(done.code == Some(1) && done.stderr.contains("are lost"), "{verb:?}: {}", done.stderr);
    }
    let info = run(folder, &["info", "disk.vhd", "--json"]);
    assert!(info.code == Some(1) && info.stderr.contains("are lost"), "{}", info.stderr);
    let report = run(folder, &["check", "disk.vhd", "--json"]);
    let lost = serde_json::json!([{"start": 32 << 10, "length": 32 << 10}]);
    assert_eq!((report.code, &report.json()["lost"]), (Some(3), &lost));
    let repaired = run(folder, &["check", "disk.vhd", "--json", "--repair"]);
    assert_eq!((repaired.code, &repaired.json()["lost"]), (Some(3), &lost));
    let copied = run(folder, &["convert", "disk.vhd", "saved.vhd", "--to", "dynamic", "--salvage"]).ok();
    assert!(copied.stderr.contains("given up: bytes 32768 to 65536"), "{}", copied.stderr);
    assert_healthy(folder, "saved.vhd");
    // An image whose footers disagree may only be read.
    let vhd = make();
    vhd.set_footer(0, footer::UUID, &[7; 16]);
    run(folder, readers[0]).ok();
    for verb in [&["resize", "disk.vhd", "1M"][..], &["compact", "disk.vhd"]] {
        let done = run(folder, verb);
        assert!(done.code == Some(1) && done.stderr.contains("may only be read"), "{verb:?}: {}", done.stderr);
    }
}
