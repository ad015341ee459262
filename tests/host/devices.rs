//! Raw disks on block devices: reading, and overwriting all old contents.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISK, Finished, diffdisk, run};
use crate::loopdev::{FsKind, LoopDevice, Mounted, can_mount, run_ok};

const MIB: usize = 1 << 20;
/// The byte that devices are filled with.
const OLD: u8 = 0xD7;

/// A folder with the backing file of a device, which is full of old contents, and with a disk to write to the device.
/// The disk has data at both ends and between holes.
struct DeviceFixture {
    folder: TempDir,
    disk: Vec<u8>,
}

impl DeviceFixture {
    fn new(device: usize, disk: usize) -> DeviceFixture {
        let folder = scratch("devices");
        fs::write(folder.path().join("device"), vec![OLD; device]).expect("the file of a device");
        let mut bytes = vec![0; disk];
        for (at, len) in [(0, 700), (3 * MIB + 512, 5000), (disk / 2, 512), (disk - 9, 9)] {
            bytes[at..at + len].fill(0x5A);
        }
        fs::write(folder.path().join("a.raw"), &bytes).expect("a disk");
        let fixture = DeviceFixture { folder, disk: bytes };
        fixture.diffdisk("convert a.raw a.vhd --from raw --to dynamic").ok();
        fixture
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn diffdisk(&self, line: &str) -> Finished {
        let mut command = Command::new(DIFFDISK);
        run(command.current_dir(&self.folder).args(line.split(' ')), std::time::Duration::from_secs(60))
    }

    /// Returns the contents of the device, read from its backing file.
    fn written(&self) -> Vec<u8> {
        fs::read(self.at("device")).expect("the file of the device")
    }

    #[track_caller]
    fn refused(&self, line: &str, why: &str) {
        let failed = self.diffdisk(line);
        assert!(failed.code == Some(1) && failed.stderr.contains(why), "{line}: {}", failed.stderr);
        assert!(self.written().iter().all(|&byte| byte == OLD), "{line}: the device has changed");
    }
}

fn attach(file: &Path, sector: &str) -> LoopDevice {
    let made = LoopDevice::attach(file);
    if sector != "512" {
        run_ok(Command::new("losetup").args(["--sector-size", sector]).arg(made.path()));
    }
    made
}

#[test]
fn a_disk_is_written_over_all_that_a_device_held_and_read_back() {
    if !can_mount("devices") {
        return;
    }
    for sector in ["512", "4096"] {
        // One device has the size of the disk. The others are larger, and their contents beyond the end of the disk
        // must not change.
        for (device, disk) in [(40 * MIB, 40 * MIB), (40 * MIB, 11 * MIB + 1536), (8 * MIB, 8 * MIB - 512)] {
            let fixture = DeviceFixture::new(device, disk);
            let there = attach(&fixture.at("device"), sector);
            let dev = there.path().display();
            for source in ["a.vhd", "a.raw --from raw"] {
                fixture.diffdisk(&format!("convert {source} {dev} --to raw --force")).ok();
                let written = fixture.written();
                assert!(written[..disk] == fixture.disk, "{source}: the disk on sectors of {sector}");
                assert!(written[disk..].iter().all(|&byte| byte == OLD), "{source}: the contents after the disk");
                let file = fs::OpenOptions::new().write(true).open(there.path()).expect("the device");
                file.write_all_at(&vec![OLD; device], 0).expect("it is full again");
                file.sync_all().expect("durable");
            }
            fixture.diffdisk(&format!("convert a.vhd {dev} --to raw --force --quiet")).ok();
            // If the device is the source, the whole device is the disk.
            fixture.diffdisk(&format!("convert {dev} back.vhd --from raw --to dynamic")).ok();
            fixture.diffdisk("check back.vhd").ok();
            fixture.diffdisk(&format!("compare {dev} back.vhd --from raw --from vhd")).ok();
            let stream = fixture.diffdisk(&format!("convert {dev} - --from raw --to raw")).ok().stdout;
            assert!(stream.len() == device && stream[..disk] == fixture.disk);
            let compared = fixture.diffdisk(&format!("compare a.vhd {dev} --from vhd --from raw"));
            assert_eq!(compared.code, Some(if device == disk { 0 } else { 5 }), "{}", compared.stderr);
        }
    }
}

#[test]
fn a_device_is_not_overwritten_unasked_nor_in_use_nor_too_small() {
    if !can_mount("devices") {
        return;
    }
    let fixture = DeviceFixture::new(8 * MIB, 8 * MIB + 512);
    let there = LoopDevice::attach(&fixture.at("device"));
    let dev = there.path().display();
    fixture.refused(&format!("convert a.vhd {dev} --to raw"), "give --force to overwrite");
    fixture.refused(
        &format!("convert a.vhd {dev} --to raw --force"),
        "the disk has 8389120 bytes, and the device only 8388608",
    );
    for to in ["fixed", "dynamic"] {
        fixture.refused(&format!("convert a.vhd {dev} --to {to} --force"), "VHDs are written to regular files only");
    }
    // Another program holds the device exclusively, as LVM and mdadm do.
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let held = rustix::fs::open(there.path(), flags, rustix::fs::Mode::empty()).expect("it is free");
    fs::write(fixture.at("small.raw"), [1; 512]).expect("a disk");
    let write = format!("convert small.raw {dev} --from raw --to raw --force");
    fixture.refused(&write, "the block device is in use");
    drop(held);
    // A VHD inside a device, as in XenServer's volumes.
    for line in ["info DEV", "check DEV", "map DEV", "convert DEV x.raw --to raw", "create x.vhd --parent DEV"] {
        fixture.refused(&line.replace("DEV", &dev.to_string()), "VHDs inside devices are not supported");
    }
    fixture.diffdisk(&write).ok();
    assert_eq!(fixture.written()[..513], [&[1; 512][..], &[OLD]].concat());
}

#[test]
fn a_mounted_device_is_not_overwritten() {
    if !can_mount("devices") {
        return;
    }
    let folder = scratch("devices");
    let file = folder.path().join("device");
    fs::File::create(&file).and_then(|f| f.set_len(FsKind::Ext4.size())).expect("a sparse file");
    let there = LoopDevice::attach(&file);
    FsKind::Ext4.make(there.path(), &[]);
    let source = folder.path().join("a.raw").display().to_string();
    fs::write(&source, vec![1; MIB]).expect("a disk");
    let device = there.path().display().to_string();
    let write = ["convert", &source, &device, "--from", "raw", "--to", "raw", "--force"];
    let mounted = Mounted::mount(FsKind::Ext4, there.path());
    let failed = diffdisk(write);
    assert!(failed.code == Some(1) && failed.stderr.contains("in use: it is mounted"), "{}", failed.stderr);
    mounted.unmount();
    diffdisk(write).ok();
}

#[test]
fn other_special_files_stay_refused() {
    let folder = scratch("devices");
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO");
    let new = folder.path().join("x").display().to_string();
    for path in ["/dev/zero", "/dev/null", &fifo.display().to_string(), &folder.path().display().to_string()] {
        for args in [
            ["convert", path, &new, "--from", "raw", "--to", "raw"],
            ["compare", path, path, "--from", "raw", "--from", "raw"],
        ] {
            let failed = diffdisk(args);
            assert!(
                failed.code == Some(1) && failed.stderr.contains("not a regular file"),
                "{path}: {}",
                failed.stderr
            );
        }
        fs::write(&new, [1; 512]).expect("a disk");
        let failed = diffdisk(["convert", &new, path, "--from", "raw", "--to", "raw", "--force"]);
        assert!(failed.code == Some(1) && failed.stderr.contains("not a regular file"), "{path}: {}", failed.stderr);
        fs::remove_file(&new).expect("it is there");
    }
}
