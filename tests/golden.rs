//! Images made by other programs. The tool and the daemon must read them exactly as independent readers do.

mod common;

use std::path::Path;

use common::client::MAX_REQUEST_BYTES;
use common::daemon::Daemon;
use common::digest::{sha256_of_bytes, sha256_of_file};
use common::golden::{Golden, number, text};
use common::{pattern, temp, tool};
use serde_json::Value;

/// Unpacks the golden images into a private folder. Returns the manifest and the folder.
fn corpus(name: &str) -> (Golden, tempfile::TempDir) {
    let (golden, folder) = (Golden::load(), temp::scratch(name));
    golden.unpack(folder.path());
    (golden, folder)
}

/// Returns the option that allows the folder of golden images as a folder of parents, which chains with parents outside
/// the child's folder need.
fn allow(root: &Path) -> [String; 2] {
    ["--allow-parents".into(), root.display().to_string()]
}

#[test]
fn convert_reads_every_image_correctly() {
    let (golden, folder) = corpus("golden-convert");
    let root = folder.path();
    for image in golden.images() {
        let (name, path) = (text(image, "file"), root.join(text(image, "file")));
        let to = |to: &str| {
            let args = ["convert".into(), path.display().to_string(), to.into(), "--to".into(), "raw".into()];
            tool::diffdisk(args.into_iter().chain(allow(root)))
        };
        let stream = to("-").ok();
        assert_eq!(stream.stdout.len() as u64, number(image, "virtual_size"), "{name}: length of the stream");
        assert_eq!(sha256_of_bytes(&stream.stdout), text(image, "virtual_sha256"), "{name} to a stream");
        let raw = root.join("out.raw");
        to(&raw.display().to_string()).ok();
        assert_eq!(sha256_of_file(&raw), text(image, "virtual_sha256"), "{name} to a file");
        std::fs::remove_file(raw).expect("the converted file can be removed");
        assert_eq!(sha256_of_file(&path), text(image, "file_sha256"), "{name}: convert changed its source");
    }
}

#[test]
fn info_agrees_with_the_manifest() {
    let (golden, folder) = corpus("golden-info");
    for image in golden.images() {
        let name = text(image, "file");
        let info = tool::diffdisk(["info".into(), folder.path().join(name), "--json".into()]).ok().json();
        assert_eq!(info["format"], "vhd", "{name}");
        for key in ["type", "virtual_size", "file_size"] {
            assert_eq!(info[key], image[key], "{name}: {key}");
        }
        let plain = |text: &Value| text.as_str().map(|t| t.replace('-', "").to_lowercase());
        assert_eq!(plain(&info["uuid"]), plain(&image["unique_id"]), "{name}: uuid");
        let tag = |text: &Value| text.as_str().map(|t| t.trim_end_matches(['\0', ' ']).to_owned());
        assert_eq!(tag(&info["creator_app"]), tag(&image["creator_app"]), "{name}: creator_app");
        if let Some(blocks) = image["allocated_blocks"].as_object() {
            assert_eq!(info["block_size"], image["block_size"], "{name}: block_size");
            assert_eq!(info["blocks"], image["max_table_entries"], "{name}: blocks");
            assert_eq!(info["blocks_allocated"], blocks.len(), "{name}: blocks_allocated");
        }
        if text(image, "type") == "differencing" {
            assert_eq!(plain(&info["parent"]["uuid"]), plain(&image["parent_unique_id"]), "{name}: parent's uuid");
            assert_eq!(info["parent"]["name"], image["parent_name"], "{name}: parent's name");
            let listed = info["parent"]["locators"].as_array().expect("locators are listed");
            let made = image["parent_locators"].as_array().expect("the manifest lists locators");
            assert_eq!(listed.len(), made.len(), "{name}: locators");
            for (listed, made) in listed.iter().zip(made) {
                assert_eq!(listed["platform"], made["code"], "{name}: platform of a locator");
                assert_eq!(listed["path"], made["text"], "{name}: path of a locator");
            }
        } else {
            assert!(info["parent"].is_null(), "{name}: {}", info["parent"]);
        }
    }
}

#[test]
fn check_finds_no_corruption() {
    let (golden, folder) = corpus("golden-check");
    for image in golden.images() {
        let path = folder.path().join(text(image, "file"));
        let args = ["check".into(), path.display().to_string(), "--chain".into(), "--json".into()];
        let check = tool::diffdisk(args.into_iter().chain(allow(folder.path())));
        assert!(matches!(check.code, Some(0 | 4)), "{}: {check:?}", path.display());
        assert_eq!(check.json()["corruptions"], 0, "{}", path.display());
        assert_eq!(sha256_of_file(&path), text(image, "file_sha256"), "{}: check changed the image", path.display());
    }
}

#[test]
fn a_guest_reads_every_image_through_the_socket() {
    let (golden, folder) = corpus("golden-guest");
    for image in golden.images() {
        let (name, path) = (text(image, "file"), folder.path().join(text(image, "file")));
        let [option, root] = allow(folder.path());
        let daemon = Daemon::start(&path, &["--read-only", &option, &root]);
        let mut guest = daemon.connect();
        assert_eq!(guest.capacity().expect("a configuration"), number(image, "virtual_size"), "{name}: capacity");
        let disk = guest.read_all(MAX_REQUEST_BYTES).expect("reads in flight");
        assert_eq!(sha256_of_bytes(&disk), text(image, "virtual_sha256"), "{name} in requests of 1 MiB");
        let disk = guest.read_all(12 * 512).expect("reads in flight");
        assert_eq!(sha256_of_bytes(&disk), text(image, "virtual_sha256"), "{name} in requests of 6 KiB");
        guest.write(0, &[1; 512]).expect_err("a read-only disk took a write");
        drop(guest);
        daemon.stop();
        assert_eq!(sha256_of_file(&path), text(image, "file_sha256"), "{name}: a read-only daemon changed it");
    }
}

#[test]
fn a_guest_writes_on_top_of_every_image() {
    let golden = Golden::load();
    for image in golden.images() {
        // The images are unpacked again for each image, since a write to a parent changes the contents of its children.
        let folder = temp::scratch("golden-write");
        golden.unpack(folder.path());
        let (name, path) = (text(image, "file"), folder.path().join(text(image, "file")));
        let [option, root] = allow(folder.path());
        let daemon = Daemon::start(&path, &[&option, &root, "--allow-writable-parent"]);
        let mut guest = daemon.connect();
        let mut disk = guest.read_all(MAX_REQUEST_BYTES).expect("reads in flight");
        assert_eq!(sha256_of_bytes(&disk), text(image, "virtual_sha256"), "{name} before the writes");
        let last = disk.len() / 512 - 1;
        for (first, count) in [(0, 1), (4, 9), (1023, 3), (1500, 300), (last, 1)] {
            let fresh = pattern::sectors("guest", first as u64, count);
            guest.write((first * 512) as u64, &fresh).expect("a write");
            disk[first * 512..(first + count) * 512].copy_from_slice(&fresh);
        }
        guest.flush().expect("a flush");
        pattern::assert_same(
            &format!("{name} after the writes"),
            &guest.read_all(MAX_REQUEST_BYTES).expect("reads"),
            &disk,
        );
        drop(guest);
        daemon.stop();
        let daemon = Daemon::start(&path, &["--read-only", &option, &root]);
        let kept = daemon.connect().read_all(MAX_REQUEST_BYTES).expect("reads in flight");
        pattern::assert_same(&format!("{name} after a restart"), &kept, &disk);
        daemon.stop();
        // Some of XenServer's images have a batmap, which must be correct after the writes.
        let check = ["check".into(), path.display().to_string(), "--chain".into(), option, root];
        let check = tool::diffdisk(check);
        assert!(matches!(check.code, Some(0 | 4)), "{name} after the writes: {check:?}");
        for other in golden.images().iter().filter(|other| other["file"] != image["file"]) {
            let untouched = sha256_of_file(&folder.path().join(text(other, "file")));
            assert_eq!(untouched, text(other, "file_sha256"), "writing to {name} changed {}", other["file"]);
        }
    }
}
