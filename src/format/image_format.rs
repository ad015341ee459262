//! Recognises formats of disk images by their first bytes. Only errors and warnings use the result: diffdisk
//! never chooses a format by these bytes, since the guest of a raw disk can write them.

/// Number of bytes at the start of a file that [`ImageFormat::probe`] needs.
pub const PROBE_BYTES: usize = 512;

/// A format of disk images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    /// Hyper-V's newer format.
    Vhdx,
    /// QEMU's own format, version 2 or 3.
    Qcow2,
    /// QEMU's first format.
    Qcow,
    /// VMware's format, also its text descriptor.
    Vmdk,
    /// VirtualBox's format.
    Vdi,
    /// A VHD, by the copy of its footer.
    Vhd,
}

impl ImageFormat {
    /// Recognises the format of a file that begins with `head`; `None` if the bytes match no format.
    pub fn probe(head: &[u8]) -> Option<ImageFormat> {
        let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
        match () {
            () if at(0, b"vhdxfile") => Some(ImageFormat::Vhdx),
            () if at(0, b"QFI\xFB\0\0\0\x01") => Some(ImageFormat::Qcow),
            () if at(0, b"QFI\xFB") => Some(ImageFormat::Qcow2),
            () if at(0, b"KDMV") || at(0, b"COWD") || at(0, b"# Disk DescriptorFile") => Some(ImageFormat::Vmdk),
            () if at(64, &[0x7F, 0x10, 0xDA, 0xBE]) => Some(ImageFormat::Vdi),
            () if at(0, b"conectix") => Some(ImageFormat::Vhd),
            () => None,
        }
    }

    /// Returns the name of the format.
    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::Vhdx => "VHDX",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Qcow => "qcow",
            ImageFormat::Vmdk => "VMDK",
            ImageFormat::Vdi => "VDI",
            ImageFormat::Vhd => "VHD",
        }
    }

    /// Returns the name of QEMU's block driver for the format.
    pub fn qemu_driver(self) -> &'static str {
        match self {
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Qcow => "qcow",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vdi => "vdi",
            ImageFormat::Vhd => "vpc",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_name_a_format() {
        let mut vdi = [0; PROBE_BYTES];
        vdi[..4].copy_from_slice(b"<<< ");
        vdi[64..68].copy_from_slice(&[0x7F, 0x10, 0xDA, 0xBE]);
        assert_eq!(ImageFormat::probe(&vdi), Some(ImageFormat::Vdi));
        assert_eq!(ImageFormat::probe(&vdi[..66]), None);
        assert_eq!(ImageFormat::probe(b"vhdxfilexx"), Some(ImageFormat::Vhdx));
        assert_eq!(ImageFormat::probe(b"QFI\xFB\0\0\0\x03"), Some(ImageFormat::Qcow2));
        assert_eq!(ImageFormat::probe(b"QFI\xFB\0\0\0\x01"), Some(ImageFormat::Qcow));
        assert_eq!(ImageFormat::probe(b"KDMV\x01"), Some(ImageFormat::Vmdk));
        assert_eq!(ImageFormat::probe(b"# Disk DescriptorFile\n"), Some(ImageFormat::Vmdk));
        assert_eq!(
            (ImageFormat::probe(b"conectix"), ImageFormat::probe(b""), ImageFormat::probe(&[0; 512])),
            (Some(ImageFormat::Vhd), None, None)
        );
    }
}
