//! Sector contents that name their writer and their sector number, and a comparison of disks that prints differing
//! contents.

/// Bytes in a sector.
pub(crate) const SECTOR: usize = 512;

/// Fills `data` with the pattern of `tag` for the sectors from `first` on: `<tag s=N>`, repeated and cut to 512 bytes,
/// as vm-images/golden/manifest.json defines it.
pub(crate) fn fill(data: &mut [u8], tag: &str, first: u64) {
    for (sector, chunk) in (first..).zip(data.chunks_mut(SECTOR)) {
        let text = format!("<{tag} s={sector}>");
        for (byte, from) in chunk.iter_mut().zip(text.bytes().cycle()) {
            *byte = from;
        }
    }
}

/// Returns the pattern of `count` sectors from `first` on.
pub(crate) fn sectors(tag: &str, first: u64, count: usize) -> Vec<u8> {
    let mut data = vec![0; count * SECTOR];
    fill(&mut data, tag, first);
    data
}

/// Panics if the disks differ. The message contains the first differing sector and the beginning of its contents in
/// both disks, or the sizes if one disk is the beginning of the other.
pub(crate) fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    let differs = got.chunks(SECTOR).zip(want.chunks(SECTOR)).position(|(a, b)| a != b);
    if let Some(sector) = differs {
        let show = |data: &[u8]| {
            let from = sector * SECTOR;
            String::from_utf8_lossy(&data[from..data.len().min(from + 24)]).replace('\0', "0")
        };
        panic!("{what}: sector {sector} contains {:?}, expected {:?}", show(got), show(want));
    }
    assert_eq!(got.len(), want.len(), "{what}: size of the disk");
}

#[test]
fn a_sector_names_its_writer_and_place() {
    let data = sectors("A1", 4106, 2);
    assert!(data.starts_with(b"<A1 s=4106><A1 s=4106>"));
    assert!(data[SECTOR..].starts_with(b"<A1 s=4107>"));
    assert_eq!(data.len(), 2 * SECTOR);
}
