//! The images of the test builder are valid: independent programs read them.

use std::process::Command;
use std::time::Duration;

use crate::common::vhd_bytes::{VhdFile, VhdSpec, id};
use crate::common::{pattern, temp, tool};

#[test]
fn other_programs_read_the_builders_images() {
    tool::require(&["7zz", "qemu-img"]);
    let folder = temp::scratch("builder");
    let size = 5 * 65536 - 512;
    let count = usize::try_from(size / 512).expect("small");
    let sevenzip = |name: &str| {
        let mut command = Command::new("7zz");
        command.current_dir(folder.path()).args(["e", "-so", "-tVHD", name]);
        tool::run(&mut command, Duration::from_secs(30)).ok().stdout
    };

    VhdFile::create(&folder.path().join("fixed.vhd"), VhdSpec::fixed(size));
    pattern::assert_same("fixed", &sevenzip("fixed.vhd"), &pattern::sectors("R", 0, count));

    VhdFile::create(&folder.path().join("root.vhd"), VhdSpec::dynamic(size, 65536).with_blocks(&[4, 1]));
    let mut disk = vec![0; count * 512];
    pattern::fill(&mut disk[65536..2 * 65536], "R", 128);
    pattern::fill(&mut disk[4 * 65536..], "R", 512);
    pattern::assert_same("dynamic", &sevenzip("root.vhd"), &disk);
    let raw = folder.path().join("raw");
    let mut qemu = Command::new("qemu-img");
    let source =
        format!("driver=vpc,force_size_calc=current_size,file.filename={}", folder.path().join("root.vhd").display());
    qemu.args(["convert", "-O", "raw", "--image-opts", &source]).arg(&raw);
    tool::run(&mut qemu, Duration::from_secs(30)).ok();
    pattern::assert_same("dynamic by QEMU", &std::fs::read(raw).expect("its output"), &disk);

    let child = VhdSpec::child(size, 65536, id(1), "root.vhd").with_blocks(&[1, 2]);
    VhdFile::create(&folder.path().join("child.vhd"), child);
    pattern::fill(&mut disk[65536..3 * 65536], "C", 128);
    pattern::assert_same("differencing", &sevenzip("child.vhd"), &disk);
}
