//! Changes of the version of a disk that this process serves over its real socket. Queues without a ring also take
//! part.

use diffdisk::disk::VersionChange;
use diffdisk::image::{ImageKind, ImageSpec, create};
use diffdisk::storage::host::Host;
use diffdisk::units::BlockSize;

use super::client::Command;
use super::statistics::Served;

#[test]
fn the_version_changes_whether_queues_run_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.vhd"), folder.path().join("s"));
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 16 << 20, block_size: BlockSize::DEFAULT, reserve: 0 };
    create(&Host, &image, &spec).unwrap_or_else(|e| panic!("{}", e.line()));
    let served = Served::start(&image, &socket, |_| ());
    let change = || {
        let change = VersionChange::move_top(&served.disk).unwrap_or_else(|e| panic!("{}", e.line()));
        change.run().unwrap_or_else(|e| panic!("{}", e.line()))
    };
    change();
    for round in 0..3 {
        let mut client = served.connect(&socket);
        client.submit(0, Command::Write { offset: round << 12, data: &[round as u8 + 1; 4096] }).unwrap();
        change();
        client.wait().unwrap().result.unwrap();
        change();
        for earlier in 0..=round {
            assert_eq!(client.read(earlier << 12, 4096).unwrap(), [earlier as u8 + 1; 4096]);
        }
        client.flush().unwrap();
        drop(client);
        change();
    }
    served.end();
}
