//! Metadata of a file: modification time and extended attributes.

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::call::retry;
use super::file::HostFile;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::FileBackend;
use crate::storage::types::ModifiedTime;

/// Maximum size of an attribute (Linux, XATTR_SIZE_MAX).
const ATTRIBUTE_BYTES: usize = 64 << 10;

impl HostFile {
    pub(super) fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() },
        };
        retry(|| rustix::fs::futimens(self, &times)).map_err(|e| self.fail("cannot set the modification time", e))
    }

    pub(super) fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let mut value = vec![0; ATTRIBUTE_BYTES];
        match retry(|| rustix::fs::fgetxattr(self, name, value.as_mut_slice())) {
            Ok(len) => {
                value.truncate(len);
                Ok(Some(value))
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(None),
            Err(e) => Err(self.fail(&format!("cannot read the attribute {name}"), e)),
        }
    }

    pub(super) fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        let done = match value {
            Some(value) => retry(|| rustix::fs::fsetxattr(self, name, value, XattrFlags::empty())),
            None => match retry(|| rustix::fs::fremovexattr(self, name)) {
                Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                removed => removed,
            },
        };
        done.map_err(|e| match e {
            Errno::OPNOTSUPP | Errno::NOSYS => {
                let what = "this file system has no extended attributes";
                Error::new(ErrorKind::Unsupported, what).caused_by(std::io::Error::from(e)).at_path(self.path())
            }
            e => self.fail(&format!("cannot change the attribute {name}"), e),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::host::Host;
    use crate::storage::{Access, Env};

    #[test]
    fn times_and_attributes_change_and_bytes_do_not() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("f");
        let file = Host.folder(folder.path()).unwrap().create("f".as_ref()).unwrap();
        file.write_at(b"x", 0).unwrap();
        let time = ModifiedTime { seconds: 1_000_000_000, nanos: 123_456_789 };
        file.set_modified(time).unwrap();
        assert_eq!(file.stat().unwrap().last_change(), time);
        // Attributes of a file that is open for reading can be set, too: a merge sets attributes of parents.
        let reader = Host.open(&path, Access::Read).unwrap();
        assert_eq!(reader.attribute("user.diffdisk.test").unwrap(), None);
        match reader.set_attribute("user.diffdisk.test", Some(b"a\0b")) {
            Err(e) if e.kind() == ErrorKind::Unsupported => return println!("skipped: no attributes here"),
            set => set.unwrap(),
        }
        assert_eq!(file.attribute("user.diffdisk.test").unwrap().as_deref(), Some(&b"a\0b"[..]));
        file.set_attribute("user.diffdisk.test", None).unwrap();
        file.set_attribute("user.diffdisk.test", None).unwrap();
        assert_eq!((file.attribute("user.diffdisk.test").unwrap(), file.stat().unwrap().last_change()), (None, time));
        file.write_at(b"y", 0).unwrap();
        assert!(file.stat().unwrap().last_change() > time);
    }
}
