//! Images into which a merge was begun and not ended: whoever writes to one meanwhile would change what the merge goes on
//! with.
//!
//! A merge leaves a note beside the image that it folds, `.<uuid of that image>.merge`; a line of it names what receives:
//! `ancestor <uuid> …`. Writing and reading all of it is the merge's own (`ops::merge`).

use std::ffi::OsStr;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, folder_of};
use crate::storage::{Access, Env, File, Folder};

/// A note of more bytes is none: a chain has few layers, and a path at most 4096 bytes.
pub const MAX_NOTE_BYTES: u64 = 2 << 20;

/// The UUID in the name of a merge's note: that of the image that is folded.
pub fn folded_by_note(name: &OsStr) -> Option<Uuid> {
    name.to_str()?.strip_prefix('.')?.strip_suffix(".merge")?.parse().ok()
}

/// Fails where a note beside `image` says that a merge into it was begun; that of `own` does not count.
///
/// # Errors
/// `Refused`, naming the note; `Io`. A folder or a note that we may not read tells nothing.
pub fn refuse_if_receiving(env: &dyn Env, image: &Image, own: Option<Uuid>) -> Result<()> {
    let path = image.file().path();
    let folder = real_folder(env, image.file())?;
    for note in passed_over(folder.list())?.unwrap_or_default() {
        let Some(folded) = folded_by_note(&note).filter(|folded| Some(*folded) != own) else { continue };
        let Some(file) = passed_over(folder.open(&note, Access::Read))? else { continue };
        if receives(&file)? == Some(image.uuid()) {
            let what = format!(
                "a merge of image {folded} into it was begun: end that first, by the same `diffdisk merge` ({})",
                file.path().display()
            );
            return Err(Error::new(ErrorKind::Refused, what).at_path(path));
        }
    }
    Ok(())
}

/// The folder in which a file really lies: that of what a symbolic link leads to, if an operator's path ends in one.
fn real_folder(env: &dyn Env, file: &File) -> Result<Folder> {
    let folder = file.folder();
    match folder.open(file.name(), Access::Read) {
        Err(e) if e.kind() == ErrorKind::Refused => {
            Ok(passed_over(env.canonical(file.path()).and_then(|path| env.folder(folder_of(&path))))?.unwrap_or(folder))
        }
        _ => Ok(folder),
    }
}

/// The image that the note in `file` names as the one that receives.
fn receives(file: &File) -> Result<Option<Uuid>> {
    let mut bytes = vec![0; usize::try_from(file.stat()?.len.min(MAX_NOTE_BYTES)).expect("2 MiB at most")];
    file.read_at(&mut bytes, 0)?;
    let named = |line: &[u8]| {
        let rest = std::str::from_utf8(line.strip_prefix(b"ancestor ")?).ok()?;
        rest.split(' ').next()?.parse().ok()
    };
    Ok(bytes.split(|byte| *byte == b'\n').find_map(named))
}

/// `None` for what is gone or closed to us, and where a file system lists no folders.
fn passed_over<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound) => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::Rig;
    use super::*;
    use crate::chain::Use;
    use crate::storage::host::Host;

    #[test]
    fn a_note_names_who_receives() {
        let rig = Rig::new();
        rig.dynamic("root", 2 << 20, 100);
        rig.dynamic("other", 2 << 20, 100);
        let (root, other) = (rig.chain("root", Use::Look).unwrap(), rig.chain("other", Use::Look).unwrap());
        let (root, other) = (root.youngest(), other.youngest());
        let folded = Uuid::from_u128(5);
        let note = folder_of(root.file().path()).join(format!(".{folded}.merge"));
        let check = |image: &Image, own| refuse_if_receiving(&Host, image, own).map_err(|e| e.kind());
        assert_eq!(check(root, None), Ok(()));
        std::fs::write(&note, format!("diffdisk\nlayer {} x\nancestor {} 1 p\n", other.uuid(), root.uuid())).unwrap();
        assert_eq!(check(root, None), Err(ErrorKind::Refused));
        assert_eq!((check(root, Some(folded)), check(other, None)), (Ok(()), Ok(())));
        std::fs::write(&note, b"ancestor \xFF\nancestor\nancestor x\n").unwrap();
        assert_eq!(check(root, None), Ok(()), "no note of ours");
    }
}
