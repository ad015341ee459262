//! `--page-cache-reads`: whether the daemon maps the image.

use super::blk::Guest;
use super::daemon::Daemon;
use super::setup::MIB;
use super::{image, temp};

/// File systems on which images are mapped and tests may run: ext4, XFS, btrfs.
const MAPPED_FILE_SYSTEMS: [u64; 3] = [0xEF53, 0x5846_5342, 0x9123_683E];

#[test]
fn the_image_is_mapped_unless_reads_from_the_page_cache_are_off() {
    let folder = temp::scratch("page-cache");
    let image = folder.path().join("disk.vhd");
    image::make_fixed(&image, 4 * MIB);
    let file_system = rustix::fs::statfs(folder.path()).unwrap().f_type as u64;
    for (options, is_on) in [(&[][..], true), (&["--page-cache-reads=on"], true), (&["--page-cache-reads=off"], false)]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(dir.path(), &image, options);
        let mut guest = Guest::connect(daemon.socket(), 1, 128);
        for _ in 0..8 {
            assert_eq!(guest.read(0, 0, 4096).unwrap(), [0; 4096]);
        }
        let can_map = cfg!(target_arch = "x86_64")
            && MAPPED_FILE_SYSTEMS.contains(&file_system)
            && daemon.log().contains("engine io_uring");
        assert_eq!(daemon.has_mapped(&image), is_on && can_map, "{options:?}");
        drop(guest);
        assert!(daemon.terminate().success());
    }
}
