//! Other formats of disk images, known by their first bytes. For messages only: no program here reads one of them, and no
//! format is ever chosen by these bytes, since the guest of a raw disk can write them.

/// Bytes at the start of a file that tell the format.
pub const HEAD_BYTES: usize = 512;

/// A format of disk images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Container {
    /// Hyper-V's newer format.
    Vhdx,
    /// QEMU's own format, version 2 or 3.
    Qcow2,
    /// QEMU's first format.
    Qcow,
    /// VMware's format, also its text descriptor.
    Vmdk,
    /// VirtualBox' format.
    Vdi,
    /// A VHD, by the copy of a footer.
    Vhd,
}

impl Container {
    /// The format of a file that begins with `head`; `None` if it is none of these.
    pub fn of(head: &[u8]) -> Option<Container> {
        let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
        match () {
            () if at(0, b"vhdxfile") => Some(Container::Vhdx),
            () if at(0, b"QFI\xFB\0\0\0\x01") => Some(Container::Qcow),
            () if at(0, b"QFI\xFB") => Some(Container::Qcow2),
            () if at(0, b"KDMV") || at(0, b"COWD") || at(0, b"# Disk DescriptorFile") => Some(Container::Vmdk),
            () if at(64, &[0x7F, 0x10, 0xDA, 0xBE]) => Some(Container::Vdi),
            () if at(0, b"conectix") => Some(Container::Vhd),
            () => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Container::Vhdx => "VHDX",
            Container::Qcow2 => "qcow2",
            Container::Qcow => "qcow",
            Container::Vmdk => "VMDK",
            Container::Vdi => "VDI",
            Container::Vhd => "VHD",
        }
    }

    /// Its name in QEMU.
    pub fn qemu_driver(self) -> &'static str {
        match self {
            Container::Vhdx => "vhdx",
            Container::Qcow2 => "qcow2",
            Container::Qcow => "qcow",
            Container::Vmdk => "vmdk",
            Container::Vdi => "vdi",
            Container::Vhd => "vpc",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_name_a_format() {
        let mut vdi = [0; HEAD_BYTES];
        vdi[..4].copy_from_slice(b"<<< ");
        vdi[64..68].copy_from_slice(&[0x7F, 0x10, 0xDA, 0xBE]);
        assert_eq!(Container::of(&vdi), Some(Container::Vdi));
        assert_eq!(Container::of(&vdi[..66]), None);
        assert_eq!(Container::of(b"vhdxfilexx"), Some(Container::Vhdx));
        assert_eq!(Container::of(b"QFI\xFB\0\0\0\x03"), Some(Container::Qcow2));
        assert_eq!(Container::of(b"QFI\xFB\0\0\0\x01"), Some(Container::Qcow));
        assert_eq!(Container::of(b"KDMV\x01"), Some(Container::Vmdk));
        assert_eq!(Container::of(b"# Disk DescriptorFile\n"), Some(Container::Vmdk));
        assert_eq!(
            (Container::of(b"conectix"), Container::of(b""), Container::of(&[0; 512])),
            (Some(Container::Vhd), None, None)
        );
    }
}
