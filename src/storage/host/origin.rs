//! User, boot and machine of this process.

use std::fs;
use std::path::Path;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::types::Origin;

/// Implements [`Env::origin`](crate::storage::Env::origin).
pub(super) fn origin() -> Result<Origin> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|e| Error::io("cannot read", e).at_path(path))?;
    let boot = Uuid::parse_str(text.trim())
        .map_err(|e| Error::new(ErrorKind::Invalid, "not a boot id").at_path(path).caused_by(e))?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let user_id = rustix::process::geteuid().as_raw();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = user_name(user_id, &passwd).unwrap_or_else(|| user_id.to_string());
    let id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].iter().find_map(|path| fs::read_to_string(path).ok());
    // A container may have no machine id. The id is then derived from the host name.
    let machine = derive_id(id.as_deref().map(str::trim).filter(|id| !id.is_empty()).unwrap_or(&host));
    Ok(Origin { boot, machine, user_id, user, host })
}

/// Returns the name of a user, from the text of /etc/passwd.
fn user_name(user_id: u32, passwd: &str) -> Option<String> {
    let mut users = passwd.lines().map(|line| line.split(':'));
    users.find_map(|mut fields| {
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(user_id)).then(|| name.to_owned())
    })
}

/// Derives an id from a machine id, so that images do not contain the machine id itself: machine-id(5) forbids its
/// publication, and images are copied to other machines.
fn derive_id(id: &str) -> Uuid {
    let sum = |salt: u64| {
        id.bytes().fold(salt, |sum, byte| {
            let z = (sum ^ u64::from(byte)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (z ^ (z >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB).rotate_left(31)
        })
    };
    Uuid::from_u64_pair(sum(u64::from_be_bytes(*b"diffdisk")), sum(u64::from_be_bytes(*b"sessions")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_origin_is_stable_and_has_the_user_name() {
        let here = origin().unwrap();
        assert_eq!(here, origin().unwrap());
        assert!(!here.boot.is_nil() && !here.machine.is_nil() && !here.user.is_empty());
        let passwd = "root:x:0:0:root:/root:/bin/bash\nqemu:x:107:107::/:/sbin/nologin\nbroken\n";
        assert_eq!((user_name(107, passwd).as_deref(), user_name(7, passwd)), (Some("qemu"), None));
        assert_ne!(derive_id("a"), derive_id("b"));
    }
}
