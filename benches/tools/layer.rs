//! Fills images by writing their bytes: blocks one after another, BAT entries, and the footer after the blocks. So a
//! layer of thousands of blocks with holes is created quickly, and without the writers of the tool that is measured.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

const SECTOR: u64 = 512;
/// Data bytes of a block. The bitmap of a block has one sector.
pub const BLOCK: u64 = 2 << 20;
/// File offsets in a new image: of the header, and of the header's fields for the offset and the length of the BAT.
const HEADER: u64 = 512;
const TABLE_OFFSET: u64 = HEADER + 16;
const TABLE_LEN: u64 = HEADER + 28;

/// A new image with blocks of 2 MiB.
pub struct Layer {
    file: File,
    table: u64,
    entries: u64,
    /// End of the used part of the file.
    end: u64,
}

impl Layer {
    pub fn new(path: &Path) -> Layer {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("it was just made");
        let (mut table, mut entries) = ([0; 8], [0; 4]);
        file.read_exact_at(&mut table, TABLE_OFFSET).expect("it has a header");
        file.read_exact_at(&mut entries, TABLE_LEN).expect("it has a header");
        let end = file.metadata().expect("it is open").len() - SECTOR;
        Layer { file, table: u64::from_be_bytes(table), entries: u32::from_be_bytes(entries).into(), end }
    }

    /// Adds a block with the given bitmap and with runs of data, as (offset in the block, bytes). The rest of the block
    /// is a hole.
    pub fn add(&mut self, block: u64, bitmap: &[u8; 512], data: &[(u64, &[u8])]) {
        assert!(block < self.entries, "block {block} is not on the disk");
        if self.end == self.file.metadata().expect("it is open").len() - SECTOR {
            self.write(&[0; 512], self.end); // overwrites the trailing footer, which `finish` writes at the new end
        }
        // The data is aligned to a page. The bitmap is in the sector before the data.
        let start = (self.end + SECTOR).next_multiple_of(4096);
        let place = u32::try_from(start / SECTOR - 1).expect("places have 32 bits");
        self.write(&place.to_be_bytes(), self.table + block * 4);
        self.write(bitmap, start - SECTOR);
        for (offset, bytes) in data {
            self.write(bytes, start + offset);
        }
        self.end = start + BLOCK;
    }

    /// Copies the footer at the start of the file to the end of the file.
    pub fn finish(self) {
        let mut footer = [0; 512];
        self.file.read_exact_at(&mut footer, 0).expect("there is a copy of the footer");
        self.write(&footer, self.end);
    }

    fn write(&self, bytes: &[u8], at: u64) {
        self.file.write_all_at(bytes, at).expect("the target folder can be written");
    }
}
