//! Resizes of a served disk, as front-ends see them: the message about the configuration, and the new capacity.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use diffdisk::disk::live_resize::resize;
use diffdisk::image::{ImageKind, ImageSpec, create};
use diffdisk::storage::host::Host;
use diffdisk::units::BlockSize;
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::raw::*;
use super::setup::{MIB, event, memory};
use super::statistics::Served;

const REPLY_ACK: u64 = 1 << 3;
const BACKEND_REQ: u64 = 1 << 5;
const CONFIG: u64 = 1 << 9;

fn make(image: &Path) {
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 16 * MIB, block_size: BlockSize::DEFAULT, reserve: 0 };
    create(&Host, image, &spec).unwrap_or_else(|e| panic!("{}", e.line()));
}

/// Returns the capacity in bytes that a front-end reads.
fn capacity(front_end: &mut FrontEnd) -> u64 {
    U64::read_from_bytes(&front_end.config(0, 8)).unwrap().get() * 512
}

/// Grows the disk, and tells the front-end. Returns whether the front-end was told.
fn grow(served: &Served, size: u64) -> bool {
    assert_eq!(resize(&served.disk, size).unwrap_or_else(|e| panic!("{}", e.line())).size, size);
    served.status.send_config_change()
}

#[test]
fn a_front_end_with_a_back_end_channel_is_told_that_the_disk_has_grown() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.vhd"), folder.path().join("s"));
    make(&image);
    let served = Served::start(&image, &socket, |_| ());
    let connect = || UnixStream::connect(&socket).unwrap();
    assert!(!grow(&served, 17 * MIB), "nobody is connected");
    let mut front_end = FrontEnd::negotiated(connect());
    assert_eq!(capacity(&mut front_end), 17 * MIB);
    let (mut channel, other) = UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert!(!grow(&served, 18 * MIB), "the front-end has set no channel");
    // Descriptors that are no sockets, or none at all, are refused, and the connection stays.
    assert!(!front_end.set(SET_BACKEND_REQ_FD, &[], &[event().as_fd()]));
    assert!(!front_end.set(SET_BACKEND_REQ_FD, &[], &[memory(4096).as_fd()]));
    assert!(!front_end.set(SET_BACKEND_REQ_FD, &[], &[]));
    assert!(front_end.set(SET_BACKEND_REQ_FD, &[], &[other.as_fd()]));
    drop(other);
    for size in [19 * MIB, 40 * MIB + 512] {
        assert!(grow(&served, size));
        let mut message = [0; 12];
        channel.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "CONFIG_CHANGE_MSG that requests no reply");
        assert_eq!(capacity(&mut front_end), size);
    }
    // The channel ends with its connection.
    drop(front_end);
    let mut rest = Vec::new();
    channel.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    // Front-ends that have not negotiated both features are not told.
    for features in [REPLY_ACK | CONFIG, REPLY_ACK | BACKEND_REQ] {
        // A front-end that connects while another one is connected is refused.
        while served.status.front_end().is_some() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut front_end = FrontEnd::negotiated_with(connect(), features);
        let (_channel, other) = UnixStream::pair().unwrap();
        assert_eq!(front_end.set(SET_BACKEND_REQ_FD, &[], &[other.as_fd()]), features & BACKEND_REQ != 0);
        let size = served.disk.capacity() * 512 + MIB;
        assert!(!grow(&served, size));
        assert_eq!(front_end.get(GET_FEATURES) & FEATURES, FEATURES, "the connection stays");
    }
    served.end();
}

#[test]
fn a_guest_uses_the_added_sectors() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.vhd"), folder.path().join("s"));
    make(&image);
    let served = Served::start(&image, &socket, |_| ());
    let mut client = served.connect(&socket);
    client.write(4096, &[1; 4096]).unwrap();
    assert!(client.read(16 * MIB, 4096).is_err(), "after the end");
    grow(&served, 24 * MIB);
    assert_eq!(client.config().unwrap().capacity.to_native() * 512, 24 * MIB);
    assert_eq!(client.read(16 * MIB, 4096).unwrap(), [0; 4096]);
    client.write(24 * MIB - 4096, &[2; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(
        (client.read(4096, 4096).unwrap(), client.read(24 * MIB - 4096, 4096).unwrap()),
        (vec![1; 4096], vec![2; 4096])
    );
    assert!(client.read(24 * MIB, 512).is_err(), "after the end");
    drop(client);
    served.end();
}
