//! `info`: describes an image and its chain.

use std::path::Path;

use serde::Serialize;

use crate::chain::{Chain, OpenMode, Policy, unfinished_snapshot, warn_of_unfinished_merges};
use crate::error::{Error, ErrorKind, Result};
use crate::format::footer::time_to_unix;
use crate::format::locator::{decode_texts, header_name};
use crate::format::session_stamp::escape_for_display;
use crate::format::{Consequence, Defect, DiskType, Platform, Severity};
use crate::image::{Image, SessionState, next_data};
use crate::storage::{Access, Env, File, FileSystemSpace, LockHolder, Stat};

/// Maximum number of attempts to read an image that changes while it is read.
const MAX_ATTEMPTS: usize = 4;
/// Free space of a file system that is always sufficient, even if it is a small part of a large file system.
const AMPLE_BYTES: u64 = 10 << 30;

/// Properties of one image. In texts, bytes that are not UTF-8 become replacement characters.
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    /// Path by which the image was opened.
    pub path: String,
    /// Always `vhd`.
    pub format: &'static str,
    /// `fixed`, `dynamic` or `differencing`.
    #[serde(rename = "type")]
    pub disk_type: &'static str,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Bytes that the file occupies in the file system, written or reserved.
    pub allocated_bytes: u64,
    /// Bytes of data and metadata in the file, without holes and reserved space.
    pub written_bytes: u64,
    /// Block size in bytes. `None` for a fixed image.
    pub block_size: Option<u32>,
    /// Entries of the block allocation table. `None` for a fixed image.
    pub blocks: Option<u32>,
    /// Blocks that the file contains. `None` for a fixed image.
    pub blocks_allocated: Option<u64>,
    /// The session of the daemon that has or had the image open. `None` if the image was closed.
    pub session: Option<SessionInfo>,
    /// A process that holds a lock on the image. `None` if no such process was found.
    pub in_use: Option<InUse>,
    /// UUID of the image.
    pub uuid: String,
    /// Time of creation, RFC 3339 in UTC.
    pub created: String,
    /// Tag of the program that created the image.
    pub creator_app: String,
    /// Tag of the host on which that program ran.
    pub creator_host: String,
    /// The recorded parent. `None` for a root.
    pub parent: Option<ParentInfo>,
    /// Defects that were found, as sentences. `check` looks for more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<String>,
    /// The snapshot of the disk that was begun and is not finished. A daemon may be taking it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfinished_snapshot: Option<SnapshotInfo>,
    /// This image and its parents, if the chain was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<Vec<ImageInfo>>,
    /// Free and total space of the file system that contains the image.
    #[serde(skip)]
    host_space: Option<FileSystemSpace>,
}

/// Shortage of space in the file system that contains an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpaceShortage {
    /// Free bytes of the file system.
    pub available: u64,
    /// Bytes by which the image may still grow.
    pub needed: u64,
}

impl ImageInfo {
    /// Returns the shortage if the file system is nearly full: the free space is less than 5 %, less than 10 GiB, and
    /// less than the number of bytes by which the image may still grow.
    pub fn space_shortage(&self) -> Option<SpaceShortage> {
        let room = self.host_space?;
        let wanted = self.virtual_size.saturating_sub(self.allocated_bytes);
        let few = (room.total / 20).min(AMPLE_BYTES).min(wanted);
        (room.available < few).then_some(SpaceShortage { available: room.available, needed: wanted })
    }
}

/// Returns the number of bytes of a file outside its holes.
fn bytes_without_holes(file: &File) -> Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    while let Some(run) = next_data(file, at..u64::MAX)? {
        bytes += run.end - run.start;
        at = run.end;
    }
    Ok(bytes)
}

/// The session of an image, from the session stamp. The daemon of the session has the image open, or ended without
/// closing the image. Control characters in the texts are escaped.
#[derive(Clone, Debug, Serialize)]
pub struct SessionInfo {
    /// Whether the live journal may still exist. If false, the host was restarted after the session began.
    pub open: bool,
    /// Host on which the daemon runs or ran.
    pub host: String,
    /// User of the daemon.
    pub user: String,
    /// Runtime folder with the live journal.
    pub folder: String,
}

/// A process that holds a lock on an image. Fields that this user may not see are `None`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct InUse {
    /// Process id.
    pub pid: Option<u32>,
    /// Start time, RFC 3339 in UTC.
    pub since: Option<String>,
    /// Name of the program.
    #[serde(skip)]
    pub program: Option<String>,
}

impl InUse {
    fn from_holder(holder: LockHolder) -> InUse {
        let time = |unix| u64::try_from(unix).ok().map(rfc3339);
        match holder {
            LockHolder::Process { pid, program, since } => {
                InUse { pid: Some(pid), since: since.and_then(time), program: Some(program) }
            }
            LockHolder::Hidden => InUse { pid: None, since: None, program: None },
        }
    }
}

/// An unfinished snapshot of a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SnapshotInfo {
    /// `begun`, `switched`, `decided`; `unknown` if the note of the snapshot is damaged, or if the first disk of the
    /// snapshot was not found.
    pub state: &'static str,
    /// Path that the previous active image keeps. `None` if the note is damaged.
    pub kept: Option<String>,
    /// A sentence that describes the snapshot.
    #[serde(skip)]
    pub description: String,
}

/// The parent that a child records.
#[derive(Clone, Debug, Serialize)]
pub struct ParentInfo {
    /// UUID of the parent.
    pub uuid: String,
    /// Name of the parent in the header.
    pub name: String,
    /// Recorded paths to the parent.
    pub locators: Vec<LocatorInfo>,
    /// Path at which the parent was found. `None` if the parent was not found or the chain was not requested.
    pub resolved: Option<String>,
}

/// A recorded path to the parent.
#[derive(Clone, Debug, Serialize)]
pub struct LocatorInfo {
    /// Platform code: `W2ru`, `W2ku`, `MacX`, ...
    pub platform: String,
    /// The path as recorded.
    pub path: String,
}

/// Returns the properties of the image at `path`, and with a policy those of its parents. Takes no lock, so the image
/// may be in use.
///
/// Without a policy no file that the image names is opened. With a policy, if a parent is not found or may not be
/// opened, the chain ends at the child of that parent, and a warning is logged.
///
/// # Errors
/// `Invalid`, `Refused`, `Unsupported`, `NotFound`, `Io` for the image, or (with a policy) for a parent that was found.
pub fn info(env: &dyn Env, path: &Path, parents: Option<&Policy>) -> Result<ImageInfo> {
    let mut tries = 1;
    loop {
        let before = env.open(path, Access::Read)?.stat()?;
        match inspect(env, path, parents) {
            // If another process wrote to the file during the inspection, the block table and the length of the file
            // may not match. The image is inspected again.
            Err(e) if e.kind() == ErrorKind::Invalid && tries < MAX_ATTEMPTS && has_changed(env, path, &before)? => {
                tries += 1
            }
            // A concurrent write may also look like damage.
            Ok(info) if !info.damage.is_empty() && tries < MAX_ATTEMPTS && has_changed(env, path, &before)? => {
                tries += 1
            }
            result => return result,
        }
    }
}

fn has_changed(env: &dyn Env, path: &Path, before: &Stat) -> Result<bool> {
    Ok(env.open(path, Access::Read)?.stat()? != *before)
}

fn inspect(env: &dyn Env, path: &Path, parents: Option<&Policy>) -> Result<ImageInfo> {
    let image = Image::inspect(env.open(path, Access::Read)?)?;
    // The fields of an image with such a defect cannot be trusted.
    if let Some(defect) = image.notes().iter().find(|defect| defect.consequence() == Consequence::NotReadable) {
        return Err(Error::from(defect.clone()).at_path(path));
    }
    let Some(policy) = parents else {
        warn_of_unfinished_merges(env, &image)?;
        let mut info = describe(env, &image, None)?;
        fill_in_holders(env, &[&image], std::slice::from_mut(&mut info));
        return Ok(info);
    };
    let (chain, missing) = Chain::until_missing(env, image, policy, OpenMode::Inspect)?;
    if let Some(e) = missing {
        log::warn!("the chain is shown without what is below {}", e.line());
    }
    let mut all = Vec::with_capacity(chain.images().len());
    for (number, image) in chain.images().iter().enumerate() {
        all.push(describe(env, image, chain.images().get(number + 1))?);
    }
    fill_in_holders(env, &chain.images().iter().collect::<Vec<_>>(), &mut all);
    let mut youngest = all[0].clone();
    youngest.chain = Some(all);
    Ok(youngest)
}

/// Sets `in_use` of each image. One search finds the processes for all images.
fn fill_in_holders(env: &dyn Env, images: &[&Image], infos: &mut [ImageInfo]) {
    let files: Vec<_> = images.iter().map(|image| image.file()).collect();
    for (info, holder) in infos.iter_mut().zip(env.lock_holders(&files)) {
        info.in_use = holder.map(InUse::from_holder);
    }
}

fn describe(env: &dyn Env, image: &Image, resolved: Option<&Image>) -> Result<ImageInfo> {
    let (stat, footer) = (image.file().stat()?, image.footer());
    let parent = match image.header().filter(|_| image.kind() == DiskType::Differencing) {
        None => None,
        Some(header) => Some(ParentInfo {
            uuid: header.parent_uuid.to_string(),
            name: lossy(&header_name(&header.parent_name)),
            locators: locator_infos(image)?,
            resolved: resolved.map(|parent| parent.file().path().display().to_string()),
        }),
    };
    Ok(ImageInfo {
        path: image.file().path().display().to_string(),
        format: "vhd",
        disk_type: image.kind().word(),
        virtual_size: image.size(),
        file_size: stat.len,
        allocated_bytes: stat.allocated,
        written_bytes: bytes_without_holes(image.file())?,
        block_size: image.block_size().map(|size| size.bytes()),
        blocks: image.bat().map(|table| table.len()),
        blocks_allocated: image.bat().map(|table| table.used().count() as u64),
        session: session_info(env, image)?,
        in_use: None,
        uuid: image.uuid().to_string(),
        created: rfc3339(time_to_unix(footer.timestamp)),
        creator_app: tag_text(footer.creator),
        creator_host: tag_text(footer.creator_host),
        parent,
        unfinished_snapshot: snapshot_info(env, image)?,
        damage: image.notes().iter().filter(|defect| defect.severity() > Severity::Note).map(describe_defect).collect(),
        chain: None,
        host_space: image.file().file_system_space().ok(),
    })
}

fn session_info(env: &dyn Env, image: &Image) -> Result<Option<SessionInfo>> {
    let Some((stamp, _)) = image.stamp()? else { return Ok(None) };
    let open = SessionState::of(env, image)? != SessionState::Closed;
    let (host, user, folder) =
        (escape_for_display(&stamp.host), escape_for_display(&stamp.user), escape_for_display(&stamp.folder));
    Ok(Some(SessionInfo { open, host, user, folder }))
}

fn snapshot_info(env: &dyn Env, image: &Image) -> Result<Option<SnapshotInfo>> {
    let found = match unfinished_snapshot(env, image) {
        Err(e) if e.kind() == ErrorKind::Invalid => {
            return Ok(Some(SnapshotInfo { state: "unknown", kept: None, description: e.line() }));
        }
        found => found?,
    };
    Ok(found.map(|found| {
        let (active, kept, state) = (found.active.display(), found.kept.display().to_string(), found.state);
        let description = format!(
            "a snapshot of {active} as {kept} is not finished ({state}); if no daemon is taking it, run `diffdisk settle \
             {active}`"
        );
        SnapshotInfo { state, kept: Some(kept), description }
    }))
}

/// Formats a defect, with a prefix if the defect makes the image read-only.
fn describe_defect(defect: &Defect) -> String {
    match defect.consequence() {
        Consequence::Warning => defect.to_string(),
        Consequence::NotWritable => format!("read-only: {defect}"),
        Consequence::NotReadable => unreachable!("refused before"),
    }
}

fn locator_infos(image: &Image) -> Result<Vec<LocatorInfo>> {
    let recorded = image.parent_locators()?.into_iter().map(|(_, platform, data)| LocatorInfo {
        platform: tag_text(platform.code().to_be_bytes()),
        path: decode_texts(platform, &data).first().map_or_else(|| placeholder_path(platform), |text| lossy(text)),
    });
    Ok(recorded.collect())
}

/// Returns the text to show if a path cannot be decoded.
fn placeholder_path(platform: Platform) -> String {
    match platform {
        Platform::Mac => "(a Mac alias)".to_owned(),
        _ => String::new(),
    }
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn tag_text(bytes: [u8; 4]) -> String {
    lossy(&bytes).trim_end_matches(['\0', ' ']).to_owned()
}

/// Formats Unix time in seconds as `2000-01-01T00:00:00Z`.
pub fn rfc3339(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    // Howard Hinnant's algorithm `civil_from_days`: years begin in March, so that a leap day is the last day of a year.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_follows_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (946_684_800, "2000-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (946_684_800 + 0xFFFF_FFFF, "2136-02-07T06:28:15Z"),
        ] {
            assert_eq!(rfc3339(unix), text);
        }
    }

    #[test]
    fn tag_text_drops_the_padding() {
        assert_eq!(
            (tag_text(*b"win "), tag_text(*b"tap\0"), tag_text(*b"\0\0\0\0")),
            ("win".into(), "tap".into(), String::new())
        );
    }
}
