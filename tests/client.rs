//! The test client itself, tested against an independent back-end: qemu-storage-daemon.

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::client::{self, Client, Options};
use common::{pattern, tool};

/// A running qemu-storage-daemon.
struct StorageDaemon(std::process::Child);

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_client_works_with_qemu_storage_daemon() {
    tool::require(&["qemu-storage-daemon"]);
    let folder = tempfile::tempdir().expect("a folder");
    let (image, socket) = (folder.path().join("disk"), folder.path().join("sock"));
    let size = 5 * client::MAX_REQUEST_BYTES + 3 * 512;
    let mut model = pattern::sectors("base", 0, size / 512);
    fs::write(&image, &model).expect("a raw disk");
    let _served = StorageDaemon(
        Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("file,node-name=d,discard=unmap,filename={}", image.display()), "--export"])
            .arg(format!(
                "vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts"),
    );
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-storage-daemon made no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut guest =
        Client::connect_with(&socket, &Options { queues: 2, depth: 8, ..Options::default() }).expect("a connection");
    assert_eq!(guest.capacity().expect("a configuration"), size as u64);
    pattern::assert_same("first read", &guest.read_all(client::MAX_REQUEST_BYTES).expect("reads"), &model);

    let fresh = pattern::sectors("new", 3, 5000);
    guest.write(3 * 512, &fresh).expect("a write");
    model[3 * 512..5003 * 512].copy_from_slice(&fresh);
    guest.write_zeroes(512, 512 * 2, false).expect("zeroes");
    model[512..3 * 512].fill(0);
    guest.flush().expect("a flush");
    guest.discard((size - 4096 - 512) as u64, 4096).expect("a discard");
    let beyond = guest.read(size as u64, 512).expect_err("a read beyond the end");
    assert_eq!(beyond.raw_os_error(), Some(libc::EIO));
    let kept = size - 4096 - 512;
    pattern::assert_same("second read", &guest.read_all(60 * 512).expect("reads")[..kept], &model[..kept]);
    drop(guest);
    let mut again = Client::connect(&socket).expect("a second connection");
    pattern::assert_same("the file", &fs::read(&image).expect("the file")[..kept], &model[..kept]);
    assert_eq!(again.read(0, 512).expect("a read"), model[..512]);
}
