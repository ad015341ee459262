//! QEMU uses the size that a verb has set, for images of every creator (format 2.3).

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::temp::scratch;
use crate::common::tool::{diffdisk, require, run};
use crate::common::vhd_bytes::{VhdFile, VhdSpec, footer};

const MIB: u64 = 1 << 20;

/// Creator tags: of Microsoft's programs, QEMU, XenServer, VirtualBox, DiscUtils, Xen Orchestra and Azure, and an empty
/// one.
const TAGS: [&[u8; 4]; 14] = [
    b"win ",
    b"vpc ",
    b"vs  ",
    b"d2v\0",
    b"d2v ",
    b"qemu",
    b"qem2",
    b"tap\0",
    b"CTXS",
    b"vbox",
    b"dutl",
    b"xo  ",
    b"wa\0\0",
    b"\0\0\0\0",
];

/// Returns the size that QEMU derives from the footer (`block/vpc.c`): by the rules before version 10, and by those
/// since.
fn by_rules(image: &Path) -> [u64; 2] {
    let bytes = fs::read(image).expect("the image");
    let footer = &bytes[bytes.len() - 512..];
    let creator: [u8; 4] = footer[28..32].try_into().expect("four");
    let current = u64::from_be_bytes(footer[48..56].try_into().expect("eight"));
    let cylinders = u64::from(u16::from_be_bytes([footer[56], footer[57]]));
    let by_geometry = cylinders * u64::from(footer[58]) * u64::from(footer[59]) * 512;
    let largest = by_geometry == 65535 * 16 * 255 * 512;
    let before = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"].contains(&&creator);
    let since = ![b"vpc ", b"qemu"].contains(&&creator);
    [before, since].map(|exact| if exact || largest { current } else { by_geometry })
}

#[track_caller]
fn assert_size(image: &Path, size: u64, what: &str) {
    assert_eq!(by_rules(image), [size; 2], "{what}: by the rules");
    let mut qemu = Command::new("qemu-img");
    let told = run(qemu.args(["info", "-f", "vpc", "--output=json"]).arg(image), Duration::from_secs(60)).ok().json();
    assert_eq!(told["virtual-size"], size, "{what}: by the installed QEMU");
}

fn made_by(tag: &[u8; 4], path: &Path, spec: VhdSpec) {
    VhdFile::create(path, spec).set_footers(footer::CREATOR, tag).set_footers(footer::CREATOR_VERSION, &[0, 1, 0, 0]);
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn resized_disks_have_their_size() {
    require(&["qemu-img"]);
    let folder = scratch("qemu-size");
    for tag in TAGS {
        for spec in [VhdSpec::dynamic(10 * MIB, 2 << 20).with_blocks(&[0]), VhdSpec::fixed(10 * MIB)] {
            let path = folder.path().join("i.vhd");
            let what = format!("{} of type {}", tag.escape_ascii(), spec.kind);
            made_by(tag, &path, spec);
            for size in [23 * MIB + 512, 700 * MIB, 11 * MIB] {
                diffdisk(["resize", &text(&path), &size.to_string(), "--shrink"]).ok();
                assert_size(&path, size, &what);
                diffdisk(["check", &text(&path)]).ok();
            }
        }
    }
}

/// QEMU reads only roots correctly. A child that becomes a root gets a geometry that does not shorten its disk.
#[test]
fn a_child_that_stands_alone_has_its_size() {
    require(&["qemu-img"]);
    for tag in [b"vpc ", b"vbox"] {
        let folder = scratch("qemu-size");
        let [parent, child] = ["p.vhd", "c.vhd"].map(|name| folder.path().join(name));
        let parent_spec = VhdSpec::dynamic(10 * MIB, 2 << 20).with_blocks(&[0]);
        let uuid = parent_spec.uuid;
        made_by(tag, &parent, parent_spec);
        made_by(tag, &child, VhdSpec::child(10 * MIB, 2 << 20, uuid, "p.vhd"));
        diffdisk(["flatten", &text(&child)]).ok();
        assert_size(&child, 10 * MIB, &tag.escape_ascii().to_string());
    }
}
