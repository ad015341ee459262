//! Opening a chain for serving.

use std::sync::Arc;

use super::file_table::FileTable;
use super::options::DiskOptions;
use super::shared::Disk;
use super::snapshot::SERIAL_ATTRIBUTE;
use crate::chain::{
    Chain, ImageChange, OpenMode, Policy, refuse_change, refuse_if_parent, resolve_snapshot, settle_parents,
};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Image};
use crate::storage::Env;

/// Length of a serial in bytes.
const SERIAL_BYTES: usize = 20;

impl Disk {
    /// Opens a chain. If the disk is writable, finishes or undoes an unfinished snapshot of the disk, and recovers
    /// images that were not closed.
    ///
    /// # Errors
    /// - `Busy` if another process holds a conflicting lock on a file of the chain.
    /// - `Refused` if the disk is writable, and an unfinished merge forbids changes, or other images have the top as
    ///   their parent and `allow_writable_parent` is not set.
    /// - `Refused` if the disk is read-only and has an unfinished snapshot that a writable open must resolve, or if the
    ///   disk is writable and its unfinished snapshot can be neither finished nor undone without a loss of acknowledged
    ///   writes.
    /// - `Unsupported` if the serial is longer than 20 bytes.
    /// - Any error of a file of the chain, with its path and offset.
    pub fn open(env: Arc<dyn Env>, options: &DiskOptions) -> Result<Arc<Disk>> {
        let how = if options.read_only { OpenMode::Read } else { OpenMode::Write };
        // If a live journal of an image of the chain holds acknowledged writes, a read-only open fails and a writable
        // open replays the journal, also that of a parent.
        let runtime = options.keep.folders().to_vec();
        let policy = Policy { allowed: options.allow_parents.clone(), runtime, ..Policy::default() };
        if how == OpenMode::Write {
            resolve_snapshot(&*env, &options.path, &policy.runtime, options.discard_journal)?;
        }
        if options.discard_journal {
            image::discard_session(&*env, &policy.runtime, &options.path)?;
        }
        let open = || Chain::open(&*env, &options.path, &policy, how);
        let mut chain = match open() {
            Err(e) if how == OpenMode::Write && e.kind() == ErrorKind::Refused => {
                match settle_parents(&*env, &options.path, &policy) {
                    Ok(settled) if settled > 0 => open()?,
                    Err(e) if e.kind() != ErrorKind::Refused => return Err(e),
                    _ => return Err(e),
                }
            }
            opened => opened?,
        };
        if how == OpenMode::Write {
            refuse_change(&*env, chain.youngest(), ImageChange::Contents, &policy.allowed, None)?;
            if !options.allow_writable_parent {
                refuse_if_parent(&*env, chain.youngest())?;
            }
            chain.reconcile_footers(&*env, &policy)?;
        }
        let serial = match &options.serial {
            Some(given) => padded_serial(given)?,
            None => default_serial(chain.youngest())?,
        };
        let version = match how {
            OpenMode::Write => chain.into_writable(&*env, &options.keep)?,
            _ => chain.into_frozen(),
        };
        if let Some(top) = version.top() {
            top.image.set_allocation(options.allocation);
            top.image.report_events_to(options.events.clone());
        }
        let files = FileTable::new(&version, options.direct)?;
        Ok(Arc::new(Disk::new(env, version, files, serial, options)))
    }
}

/// Returns the serial that the guest reads by default. This is the serial that a snapshot has recorded in the active
/// image, since the guest has read that serial before. If none is recorded, or the recorded text is no valid serial,
/// the default is the first 20 hexadecimal digits of the UUID.
///
/// # Errors
/// `Io`.
fn default_serial(youngest: &Image) -> Result<[u8; 20]> {
    let recorded = youngest.file().attribute(SERIAL_ATTRIBUTE)?.and_then(|text| String::from_utf8(text).ok());
    match recorded.filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())) {
        Some(text) if text.len() <= SERIAL_BYTES => padded_serial(&text),
        _ => padded_serial(&youngest.uuid().simple().to_string()[..SERIAL_BYTES]),
    }
}

/// Pads a serial with zeros.
///
/// # Errors
/// `Unsupported` if the serial is longer than 20 bytes.
fn padded_serial(text: &str) -> Result<[u8; SERIAL_BYTES]> {
    let mut serial = [0; SERIAL_BYTES];
    match serial.get_mut(..text.len()) {
        Some(room) => room.copy_from_slice(text.as_bytes()),
        None => return Err(Error::new(ErrorKind::Unsupported, format!("serial {text:?} is longer than 20 bytes"))),
    }
    Ok(serial)
}
