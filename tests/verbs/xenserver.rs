//! Images of XenServer: a batmap after the BAT, byte by byte (format 5.1).

use diffdisk::storage::{Access, File};

use crate::fixture::Fixture;

fn sum(bytes: &[u8]) -> [u8; 4] {
    (!bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()))).to_be_bytes()
}

fn number(file: &File, at: u64, bytes: usize) -> u64 {
    let mut field = [0; 8];
    file.read_at(&mut field[8 - bytes..], at).expect("it lies in the file");
    u64::from_be_bytes(field)
}

/// Returns the offset of the batmap's header.
fn header_at(file: &File) -> u64 {
    number(file, 512 + 16, 8) + (number(file, 512 + 28, 4) * 4).next_multiple_of(512)
}

/// Turns an image of this library into an image of tapdisk, with a batmap that marks all allocated blocks as fully
/// present. The image must have two free sectors after the BAT.
pub(crate) fn make(fixture: &Fixture<'_>, name: &str) {
    let file = fixture.env.open(&fixture.path(name), Access::Write).expect("it opens");
    let (table, entries, at) = (number(&file, 512 + 16, 8), number(&file, 512 + 28, 4), header_at(&file));
    let mut map = [0; 512];
    for block in 0..entries {
        if number(&file, table + block * 4, 4) != 0xFFFF_FFFF {
            map[usize::try_from(block / 8).expect("small")] |= 0x80 >> (block % 8);
        }
    }
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"tdbatmap");
    header[8..16].copy_from_slice(&(at + 512).to_be_bytes());
    header[16..24].copy_from_slice(&[0, 0, 0, 1, 0, 1, 0, 2]);
    header[24..28].copy_from_slice(&sum(&map));
    file.write_at(&header, at).expect("a header");
    file.write_at(&map, at + 512).expect("a map");
    for at in [0, file.stat().expect("it is there").len - 512] {
        let mut footer = [0; 512];
        file.read_at(&mut footer, at).expect("a footer");
        footer[28..36].copy_from_slice(b"tap\0\0\x01\0\x03");
        footer[64..68].fill(0);
        let sum = sum(&footer);
        footer[64..68].copy_from_slice(&sum);
        file.write_at(&footer, at).expect("a footer");
    }
    file.sync().expect("it is durable");
}

/// Returns the blocks that the batmap marks as fully present. Panics if the checksum of the batmap is wrong.
pub(crate) fn whole(fixture: &Fixture<'_>, name: &str) -> Vec<u64> {
    let file = fixture.env.open(&fixture.path(name), Access::Read).expect("it opens");
    let at = header_at(&file);
    let mut header = [0; 512];
    file.read_at(&mut header, at).expect("it lies in the file");
    assert_eq!(&header[..8], b"tdbatmap");
    let mut map = vec![0; usize::try_from(number(&file, at + 16, 4) * 512).expect("small")];
    file.read_at(&mut map, number(&file, at + 8, 8)).expect("it lies in the file");
    assert_eq!(header[24..28], sum(&map), "the checksum of the batmap");
    (0..map.len() as u64 * 8)
        .filter(|bit| map[usize::try_from(bit / 8).expect("small")] & 0x80 >> (bit % 8) != 0)
        .collect()
}
