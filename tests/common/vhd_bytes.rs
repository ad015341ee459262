//! Builder of valid and invalid VHD files, written from the specification of the format. It shares no code with
//! `diffdisk::format`, so that an error in that module is not repeated here.
//!
//! A dynamic or differencing image of [`VhdFile::create`] consists of a footer copy at 0, the header at 512, the BAT at
//! 1536, eight sectors for locator data, blocks without gaps, and a footer. A fixed image consists of data, of which at
//! most the first MiB is written, and a footer. The bytes are written to the file in pieces, so huge images take little
//! memory.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::pattern;

/// Disk type in the footer.
pub(crate) const FIXED: u32 = 2;
pub(crate) const DYNAMIC: u32 = 3;
pub(crate) const DIFFERENCING: u32 = 4;
/// Offsets of header and BAT in a dynamic or differencing image of [`VhdFile::create`].
pub(crate) const HEADER_OFFSET: u64 = 512;
pub(crate) const BAT_OFFSET: u64 = 1536;
/// BAT entry of an unallocated block.
pub(crate) const UNUSED: u32 = 0xFFFF_FFFF;

/// Fields of the footer, by offset.
pub(crate) mod footer {
    pub(crate) const VERSION: u64 = 12;
    pub(crate) const DATA_OFFSET: u64 = 16;
    pub(crate) const CREATOR: u64 = 28;
    pub(crate) const CREATOR_VERSION: u64 = 32;
    pub(crate) const SIZE: u64 = 48;
    pub(crate) const TYPE: u64 = 60;
    pub(crate) const CHECKSUM: u64 = 64;
    pub(crate) const UUID: u64 = 68;
    pub(crate) const SAVED_STATE: u64 = 84;
    pub(crate) const HIDDEN: u64 = 85;
}

/// Fields of the dynamic header, by offset from its start.
pub(crate) mod header {
    pub(crate) const DATA_OFFSET: u64 = 8;
    pub(crate) const TABLE_OFFSET: u64 = 16;
    pub(crate) const VERSION: u64 = 24;
    pub(crate) const ENTRIES: u64 = 28;
    pub(crate) const BLOCK_SIZE: u64 = 32;
    pub(crate) const CHECKSUM: u64 = 36;
    pub(crate) const PARENT_UUID: u64 = 40;
    pub(crate) const PARENT_NAME: u64 = 64;
    pub(crate) const LOCATORS: u64 = 576;
}

/// Description of an image to build.
#[derive(Clone, Debug)]
pub(crate) struct VhdSpec {
    pub(crate) kind: u32,
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    /// Number of BAT entries; `None` for one entry per block of the disk.
    pub(crate) entries: Option<u32>,
    /// Allocated blocks, in file order, with every sector written.
    pub(crate) blocks: Vec<u32>,
    pub(crate) uuid: [u8; 16],
    pub(crate) parent: [u8; 16],
    /// The parent's name in the header.
    pub(crate) parent_name: String,
    /// Tag of the pattern in written sectors.
    pub(crate) tag: String,
}

impl VhdSpec {
    /// Describes a fixed image.
    pub(crate) fn fixed(size: u64) -> VhdSpec {
        VhdSpec { kind: FIXED, ..VhdSpec::dynamic(size, 0) }
    }

    /// Describes a dynamic image without blocks.
    pub(crate) fn dynamic(size: u64, block_size: u32) -> VhdSpec {
        VhdSpec {
            kind: DYNAMIC,
            size,
            block_size,
            entries: None,
            blocks: Vec::new(),
            uuid: id(1),
            parent: [0; 16],
            parent_name: String::new(),
            tag: "R".into(),
        }
    }

    /// Describes a differencing image without blocks, whose parent has the UUID `parent` and the file name `name`.
    pub(crate) fn child(size: u64, block_size: u32, parent: [u8; 16], name: &str) -> VhdSpec {
        let (kind, uuid) = (DIFFERENCING, id(2));
        VhdSpec { kind, uuid, parent, parent_name: name.into(), tag: "C".into(), ..VhdSpec::dynamic(size, block_size) }
    }

    pub(crate) fn with_blocks(self, blocks: &[u32]) -> VhdSpec {
        VhdSpec { blocks: blocks.to_vec(), ..self }
    }

    pub(crate) fn with_entries(self, entries: u32) -> VhdSpec {
        VhdSpec { entries: Some(entries), ..self }
    }

    pub(crate) fn with_uuid(self, uuid: [u8; 16]) -> VhdSpec {
        VhdSpec { uuid, ..self }
    }
}

/// Returns a UUID with the last byte `n`. All other bytes are 0x11.
pub(crate) fn id(n: u8) -> [u8; 16] {
    let mut id = [0x11; 16];
    id[15] = n;
    id
}

/// A VHD file that a test modifies.
pub(crate) struct VhdFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) spec: VhdSpec,
    /// Offset of the eight sectors for locator data.
    pub(crate) locators_at: u64,
    /// Offset of the first block's bitmap.
    pub(crate) blocks_at: u64,
    /// Offset of the trailing footer.
    pub(crate) footer_at: u64,
}

impl VhdFile {
    /// Creates a file with the valid image that `spec` describes.
    pub(crate) fn create(path: &Path, spec: VhdSpec) -> VhdFile {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let path = path.to_path_buf();
        let mut vhd = VhdFile { file, path, spec, locators_at: 0, blocks_at: 0, footer_at: 0 };
        if vhd.spec.kind == FIXED {
            vhd.footer_at = vhd.spec.size;
            let data = pattern::sectors(&vhd.spec.tag, 0, usize::try_from(vhd.spec.size.min(1 << 20) / 512).unwrap());
            vhd.put(0, &data);
        } else {
            let table = (u64::from(vhd.entries()) * 4).next_multiple_of(512);
            vhd.locators_at = BAT_OFFSET + table;
            vhd.blocks_at = vhd.locators_at + 8 * 512;
            vhd.footer_at = vhd.blocks_at + vhd.spec.blocks.len() as u64 * vhd.stride();
            vhd.write_header();
            vhd.write_table(table);
            vhd.write_footer(0);
        }
        vhd.write_footer(vhd.footer_at);
        vhd
    }

    /// Returns the number of entries in the BAT.
    pub(crate) fn entries(&self) -> u32 {
        let needed = || u32::try_from(self.spec.size.div_ceil(u64::from(self.spec.block_size))).expect("fits a BAT");
        self.spec.entries.unwrap_or_else(needed)
    }

    /// Returns the size in bytes of a block with its bitmap.
    pub(crate) fn stride(&self) -> u64 {
        let block = u64::from(self.spec.block_size);
        (block / 512).div_ceil(8).next_multiple_of(512) + block
    }

    fn write_header(&self) {
        let mut h = [0; 1024];
        h[..8].copy_from_slice(b"cxsparse");
        h[8..16].fill(0xFF);
        h[16..24].copy_from_slice(&BAT_OFFSET.to_be_bytes());
        h[24..28].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
        h[28..32].copy_from_slice(&self.entries().to_be_bytes());
        h[32..36].copy_from_slice(&self.spec.block_size.to_be_bytes());
        h[40..56].copy_from_slice(&self.spec.parent);
        self.put(HEADER_OFFSET, &h);
        self.set_parent_name(&self.spec.parent_name.encode_utf16().collect::<Vec<_>>());
    }

    fn write_table(&self, table: u64) {
        let unused = [0xFF; 1 << 16];
        for at in (0..table).step_by(unused.len()) {
            let rest = usize::try_from(table - at).expect("a small rest").min(unused.len());
            self.put(BAT_OFFSET + at, &unused[..rest]);
        }
        for (place, &block) in self.spec.blocks.iter().enumerate() {
            let at = self.blocks_at + place as u64 * self.stride();
            self.set_entry(block, u32::try_from(at / 512).expect("a BAT entry"));
            let sectors = u64::from(self.spec.block_size) / 512;
            let bitmap = self.stride() - u64::from(self.spec.block_size);
            self.put(at, &vec![0xFF; usize::try_from(sectors.div_ceil(8)).expect("small")]);
            let count = usize::try_from(sectors).expect("small");
            self.put(at + bitmap, &pattern::sectors(&self.spec.tag, u64::from(block) * sectors, count));
        }
    }

    fn write_footer(&self, at: u64) {
        let mut f = [0; 512];
        f[..8].copy_from_slice(b"conectix");
        f[11] = 2;
        f[12..16].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
        f[16..24].copy_from_slice(&if self.spec.kind == FIXED { u64::MAX } else { HEADER_OFFSET }.to_be_bytes());
        f[24..28].copy_from_slice(&600_000_000_u32.to_be_bytes());
        f[28..32].copy_from_slice(b"test");
        f[34] = 1;
        f[36..40].copy_from_slice(b"Wi2k");
        f[40..48].copy_from_slice(&self.spec.size.to_be_bytes());
        f[48..56].copy_from_slice(&self.spec.size.to_be_bytes());
        f[60..64].copy_from_slice(&self.spec.kind.to_be_bytes());
        f[68..84].copy_from_slice(&self.spec.uuid);
        self.put(at, &f);
        self.update_checksum(at, 512, footer::CHECKSUM);
    }

    /// Writes bytes without updating a checksum.
    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap_or_else(|e| panic!("{} at {at}: {e}", self.path.display()));
    }

    /// Recomputes the checksum of the structure of `len` bytes at `at`. `checksum` is the offset of the checksum in the
    /// structure.
    pub(crate) fn update_checksum(&self, at: u64, len: usize, checksum: u64) {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).expect("the structure lies in the file");
        let field = usize::try_from(checksum).expect("a small offset");
        bytes[field..field + 4].fill(0);
        let sum = bytes.iter().fold(0_u32, |sum, &b| sum.wrapping_add(u32::from(b)));
        self.put(at + checksum, &(!sum).to_be_bytes());
    }

    /// Changes a field of every footer and updates the checksums.
    pub(crate) fn set_footers(&self, field: u64, bytes: &[u8]) -> &VhdFile {
        for at in self.footer_copies() {
            self.set_footer(at, field, bytes);
        }
        self
    }

    /// Changes a field of the footer at `at` and updates its checksum.
    pub(crate) fn set_footer(&self, at: u64, field: u64, bytes: &[u8]) -> &VhdFile {
        self.put(at + field, bytes);
        self.update_checksum(at, 512, footer::CHECKSUM);
        self
    }

    /// Returns the offsets of all footers.
    pub(crate) fn footer_copies(&self) -> Vec<u64> {
        if self.spec.kind == FIXED { vec![self.footer_at] } else { vec![0, self.footer_at] }
    }

    /// Changes a field of the header and updates its checksum.
    pub(crate) fn set_header(&self, field: u64, bytes: &[u8]) -> &VhdFile {
        self.put(HEADER_OFFSET + field, bytes);
        self.update_checksum(HEADER_OFFSET, 1024, header::CHECKSUM);
        self
    }

    /// Sets the BAT entry of `block` to `sector`.
    pub(crate) fn set_entry(&self, block: u32, sector: u32) -> &VhdFile {
        self.put(BAT_OFFSET + 4 * u64::from(block), &sector.to_be_bytes());
        self
    }

    /// Sets the parent's name in the header to UTF-16 code units, which need not be valid.
    pub(crate) fn set_parent_name(&self, units: &[u16]) -> &VhdFile {
        let mut field = [0; 512];
        for (place, unit) in field.chunks_mut(2).zip(units) {
            place.copy_from_slice(&unit.to_be_bytes());
        }
        self.set_header(header::PARENT_NAME, &field)
    }

    /// Sets a locator entry to arbitrary values.
    pub(crate) fn set_locator(&self, slot: u64, code: &[u8; 4], space: u32, len: u32, offset: u64) -> &VhdFile {
        let mut entry = [0; 24];
        entry[..4].copy_from_slice(code);
        entry[4..8].copy_from_slice(&space.to_be_bytes());
        entry[8..12].copy_from_slice(&len.to_be_bytes());
        entry[16..].copy_from_slice(&offset.to_be_bytes());
        self.set_header(header::LOCATORS + slot * 24, &entry)
    }

    /// Writes `data` to the sector of a locator, and points the locator's entry to that sector.
    pub(crate) fn set_locator_data(&self, slot: u64, code: &[u8; 4], data: &[u8]) -> &VhdFile {
        assert!(data.len() <= 512, "a sector per locator");
        let at = self.locators_at + slot * 512;
        self.put(at, data);
        self.set_locator(slot, code, 512, u32::try_from(data.len()).expect("at most a sector"), at)
    }

    /// Returns the length of the file in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.file.metadata().expect("the file is there").len()
    }

    /// Truncates or extends the file to `len` bytes.
    pub(crate) fn set_len(&self, len: u64) -> &VhdFile {
        self.file.set_len(len).expect("the file takes its length");
        self
    }
}

/// Encodes text as UTF-16LE, as in `W2ru` and `W2ku` locators.
pub(crate) fn utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(|unit| [unit.to_be_bytes()[1], unit.to_be_bytes()[0]]).collect()
}

/// Writes `bytes` to a file and returns the file's path.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path.to_path_buf()
}
