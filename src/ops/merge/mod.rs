//! `merge`: CHILD, and all between, folded into an ancestor.
//!
//! ```text
//!    before           after            before               after
//!    grandchild ─┐    grandchild ─┐
//!    CHILD ──────┤                │    CHILD ────┐
//!    parent <────┘    parent <────┘    parent <──┘          parent, with CHILD's disk
//! ```
//!
//! The ancestor's file receives, and keeps its name; CHILD and all between are removed; CHILD's own children are linked
//! to the ancestor. Nobody has the files meanwhile: the ancestor and the children are locked exclusively, what is folded
//! is locked against writing.
//!
//! Each step is durable before the next:
//!
//! 1. room for all blocks that the ancestor lacks and that get data: a full host is found before anything is copied;
//! 2. the note of what is being done (`intent.rs`);
//! 3. what the layers say is copied into the ancestor, by its own order of commits; how far it has come is noted after a
//!    commit, never before;
//! 4. the ancestor is closed, and the note says that all is copied;
//! 5. each child is linked to the ancestor ([`mod@crate::image::relink`], whole at every moment);
//! 6. CHILD's name is removed, then those of the layers between, downwards;
//! 7. the note is removed.
//!
//! Whoever is ended anywhere starts again with the same command. Until 5 every reader of CHILD or of its children sees
//! the same disk: only sectors change that the folded layers hide. In 5 a child has CHILD or the ancestor for its parent,
//! and both show the same. In 6 nobody refers any more to what goes, and it goes from the top, so that what is still
//! there still has its parents. Doing any of it again changes nothing.
//!
//! What the note says is held against the files, by UUID and after they were opened (and recovered: an ancestor without
//! its trailing footer is what a power cut leaves). And by their state (`intent::Seen`): where a layer or the ancestor is
//! not what the note knows any more (written to, or restored from a backup), all is copied again from the beginning, which
//! changes nothing as long as CHILD is there to hide it; without CHILD nothing more is done. Copying changes the ancestor,
//! too: a killed start goes on where it was only if nothing came behind its last note.

mod copy;
mod intent;
mod survey;

use std::path::{Path, PathBuf};

use self::intent::{Copied, Folded, Intent, Seen};
use self::survey::{Survey, link, survey};
use super::create::relative;
use super::kin;
use super::mover::Progress;
use super::writer::{Writer, at_rest};
use crate::chain::{Chain, Policy, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Glance, Image, Keep, folder_of, is_settled, refuse_if_live, relink};
use crate::point;
use crate::storage::{Access, Env, File, FileId, Lock};
use crate::units::SECTOR;

/// Bytes of the disk between two notes of progress: a quarter of it, but no more than this.
const NOTE_BYTES: u64 = 512 << 20;

/// What one start of a merge did; one that was ended before it may have done the rest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merged {
    /// The image that has received.
    pub ancestor: PathBuf,
    /// Bytes of data that were copied by this start.
    pub copied: u64,
    /// Children that this start linked to the ancestor.
    pub relinked: Vec<PathBuf>,
    /// Images that this start removed.
    pub removed: Vec<PathBuf>,
}

/// A merge that may be done; nothing is changed yet.
pub struct Merge<'a> {
    env: &'a dyn Env,
    policy: Policy,
    intent: Intent,
    /// What is to be copied; none where all is.
    survey: Option<Survey>,
    /// Where children of CHILD may be.
    folders: Vec<PathBuf>,
    /// Whether the note is there.
    begun: bool,
}

impl<'a> Merge<'a> {
    /// Looks at the image at `child` and its chain, and at who else lives on it; takes the locks. Where a merge of it was
    /// begun, it goes on with that: `child` may be gone by then.
    ///
    /// # Errors
    /// Whatever is wrong with a file of the chain; `Busy` where somebody has one open in a way that does not go with
    /// ours; `Refused` where another child would change, where the sizes do not fit, or where another merge of it was
    /// begun.
    pub fn prepare(env: &'a dyn Env, child: &Path, into: Option<&Path>, policy: &Policy) -> Result<Merge<'a>> {
        // The file a link leads to is what is folded and removed.
        let child = &env.canonical(child).unwrap_or_else(|_| child.to_path_buf());
        let present = match env.open(child, Access::Read) {
            Ok(file) => Glance::at(&file)?.map(|glance| glance.uuid),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let found = Intent::find(env, child, present)?;
        if let Some(intent) = &found {
            is_same(env, intent, child, into)?;
            if intent.copied == Copied::All && is_complete(env, intent, present.is_some())? {
                let mut folders = vec![intent.folder.clone()];
                for path in intent.layers.iter().map(|l| &l.path).chain([&intent.ancestor_path]) {
                    folders.push(env.canonical(folder_of(&intent.folder.join(path)))?);
                }
                for allowed in &policy.allowed {
                    folders.push(env.canonical(allowed)?);
                }
                folders.sort_unstable();
                folders.dedup();
                let (policy, intent) = (policy.clone(), intent.clone());
                return Ok(Merge { env, policy, intent, survey: None, folders, begun: true });
            }
        }
        let survey = survey(env, child, into, policy)?;
        let folder = env.canonical(folder_of(child))?;
        let ancestor_path = relative(&folder, &env.canonical(survey.ancestor.file().path())?);
        let fresh = Intent {
            folder,
            layers: survey.folded.clone(),
            ancestor: survey.ancestor.uuid(),
            ancestor_path,
            // It is looked at again under the lock.
            ancestor_seen: Seen::of(survey.ancestor.file())?,
            copied: Copied::Before(0),
        };
        let same = |layer: &Folded, now: &Folded| layer.uuid == now.uuid && layer.seen == now.seen;
        let goes_on = |begun: &Intent| {
            begun.layers.len() == fresh.layers.len()
                && begun.layers.iter().zip(&fresh.layers).all(|(l, now)| same(l, now))
        };
        let (folders, begun) = (survey.folders.clone(), found.is_some());
        // A note that says more than `Before` was looked at above: something was written since.
        let earlier = found.filter(|begun| goes_on(begun) && begun.copied != Copied::All);
        let intent = match earlier {
            Some(Intent { copied, ancestor_seen, .. }) => Intent { copied, ancestor_seen, ..fresh },
            None => fresh,
        };
        Ok(Merge { env, policy: policy.clone(), intent, survey: Some(survey), folders, begun })
    }

    /// Bytes of the disk, which is what progress is told of; none where only names and links are left to do.
    pub fn bytes(&self) -> u64 {
        self.survey.as_ref().map_or(0, |survey| survey.ancestor.size())
    }

    /// Does it.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`, `Busy`; what `progress` fails with. All images are valid and the disk is the same;
    /// the same command goes on.
    pub fn run(mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let done = self.go(progress);
        done.map_err(|e| match self.begun {
            false => e,
            true => {
                let what = "not ended; every image is valid, and the same command goes on";
                Error::new(e.kind(), what).caused_by(e)
            }
        })
    }

    fn go(&mut self, progress: &mut Progress<'_>) -> Result<Merged> {
        let path = self.intent.folder.join(&self.intent.ancestor_path);
        if self.begun {
            // A killed start may have left its note in memory alone, and what follows builds on it.
            self.env.sync_dir(&self.intent.folder)?;
        }
        // Holds the locks to the end.
        let survey = self.survey.take();
        let (copied, file) = match &survey {
            Some(survey) => self.copy(survey, &path, progress)?,
            None => {
                let file = self.env.open(&path, Access::Read)?;
                file.lock(Lock::Shared)?;
                if Seen::of(&file)? != self.intent.ancestor_seen {
                    return Err(Error::new(ErrorKind::Busy, "it changed while it was looked at").at_path(path));
                }
                (0, file)
            }
        };
        let ancestor = self.is_ancestor(Image::open(file)?)?;
        let relinked = self.relink(&ancestor, survey.as_ref().map_or(&[], |survey| &survey.children))?;
        let removed = self.remove()?;
        self.intent.remove(self.env)?;
        Ok(Merged { ancestor: path, copied, relinked, removed })
    }

    fn is_ancestor(&self, image: Image) -> Result<Image> {
        if image.uuid() == self.intent.ancestor {
            return Ok(image);
        }
        let what = format!("another image has this name now: it should be {}", self.intent.ancestor);
        Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
    }

    /// Steps 1 to 4. The ancestor's file stays locked as long as the one that is returned.
    fn copy(&mut self, survey: &Survey, path: &Path, progress: &mut Progress<'_>) -> Result<(u64, File)> {
        // The ancestor's own parents may lie wherever the child's chain may.
        let mut policy = self.policy.clone();
        policy.allowed.push(self.intent.folder.clone());
        let file = self.env.open(path, Access::Write)?;
        file.lock(Lock::Exclusive)?;
        // Before it is opened as an image, which may recover it.
        if Seen::of(&file)? != self.intent.ancestor_seen {
            self.intent.copied = Copied::Before(0);
        }
        let chain = Chain::of(self.env, Image::open(file.clone())?, &policy, Use::Write)?;
        let mut writer = Writer::of(self.env, chain, &Keep::Nothing)?;
        let (image, seen) = (writer.top().image.image(), survey.ancestor.file().stat()?.id);
        if image.uuid() != self.intent.ancestor || file.stat()?.id != seen || image.size() != survey.ancestor.size() {
            return Err(Error::new(ErrorKind::Busy, "it changed while it was looked at").at_path(path));
        }
        let from = match self.intent.copied {
            Copied::Before(sector) => sector,
            Copied::All => unreachable!("then nothing is copied"),
        };
        let blocks = survey.layers.new_blocks(image)?;
        let begun = writer.make_room(blocks).and_then(|()| {
            point::reached("merge.room-made");
            self.intent.ancestor_seen = Seen::of(&file)?;
            self.intent.save(self.env)
        });
        if let Err(e) = begun {
            return writer.end(Err(e));
        }
        self.begun = true;
        point::reached("merge.begun");

        let every = (writer.version().sectors() * SECTOR / 4).clamp(1, NOTE_BYTES);
        let mut done = from;
        let copied = survey.layers.copy(from, &mut writer, &mut |writer, sector| {
            done = sector;
            if writer.uncommitted() >= every {
                writer.commit()?;
                point::reached("merge.committed");
                self.note(sector, &file)?;
                point::reached("merge.noted");
            }
            progress(sector * SECTOR)
        });
        match copied {
            Ok(copied) => {
                writer.commit()?;
                point::reached("merge.copied");
                writer.close()?;
                point::reached("merge.closed");
                self.intent.copied = Copied::All;
                self.intent.ancestor_seen = Seen::durably(&file)?;
                self.intent.save(self.env)?;
                point::reached("merge.marked");
                Ok((copied, file))
            }
            Err(e) => {
                // What is copied stays copied, and the ancestor is left as an image at rest.
                at_rest(writer.commit().and_then(|()| writer.close()).and_then(|()| self.note(done, &file)));
                Err(e)
            }
        }
    }

    /// Notes that all before a sector is copied, durably. Where there is no room for a note, the last one still holds.
    fn note(&mut self, sector: u64, ancestor: &File) -> Result<()> {
        self.intent.copied = Copied::Before(sector);
        self.intent.ancestor_seen = Seen::of(ancestor)?;
        match self.intent.save(self.env) {
            Err(e) if e.kind() == ErrorKind::NoSpace => Ok(()),
            saved => saved,
        }
    }

    /// Step 5: CHILD's children, those that were found at first and any that came since. And those that are the
    /// ancestor's already, where an earlier start was ended while it linked them: they are tidied up unless in use.
    fn relink(&self, ancestor: &Image, locked: &[(FileId, File)]) -> Result<Vec<PathBuf>> {
        let mut relinked = Vec::new();
        for child in kin::in_folders(self.env, &self.folders)? {
            let is_folded = self.intent.layers.iter().any(|layer| layer.uuid == child.glance.uuid);
            let is_linked = child.glance.parent == Some(ancestor.uuid());
            if is_folded || !(is_linked || child.glance.parent == Some(self.intent.layers[0].uuid)) {
                continue;
            }
            if is_linked && is_settled(&Image::open(self.env.open(&child.path, Access::Read)?)?) {
                continue;
            }
            let file = match locked.iter().find(|(id, _)| *id == child.id) {
                Some((_, file)) => file.clone(),
                None => {
                    let file = self.env.open(&child.path, Access::Write)?;
                    match file.lock(Lock::Exclusive) {
                        Err(e) if is_linked && e.kind() == ErrorKind::Busy => continue,
                        locked => locked?,
                    }
                    file
                }
            };
            let image = Image::open(file.clone())?;
            refuse_if_live(self.env, self.policy.runtime.as_ref(), &image)?;
            relink(self.env, &file, Some(&link(self.env, &image, ancestor)?))?;
            point::reached("merge.child-relinked");
            relinked.push(child.path);
        }
        point::reached("merge.relinked");
        Ok(relinked)
    }

    /// Step 6.
    fn remove(&self) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        for layer in &self.intent.layers {
            let path = self.intent.folder.join(&layer.path);
            let file = match self.env.open(&path, Access::Read) {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    // Whoever removed it may not have come to make that durable.
                    self.env.sync_dir(folder_of(&path))?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            if Glance::at(&file)?.map(|glance| glance.uuid) != Some(layer.uuid) {
                log::warn!("{}: another image has this name now; it stays", path.display());
                continue;
            }
            file.lock(Lock::Shared)?;
            if Seen::of(&file)? != layer.seen {
                let what = "it was changed since it was copied; it stays";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            self.env.remove(&path)?;
            point::reached("merge.layer-removed");
            // Before its parent goes, lest it come back without one.
            self.env.sync_dir(folder_of(&path))?;
            point::reached("merge.layer-gone");
            removed.push(path);
        }
        Ok(removed)
    }
}

/// Whether a merge that was begun is the one that is asked for.
fn is_same(env: &dyn Env, intent: &Intent, child: &Path, into: Option<&Path>) -> Result<()> {
    let ancestor = intent.folder.join(&intent.ancestor_path);
    let same = match into {
        None => intent.layers.len() == 1,
        Some(into) => Glance::at(&env.open(into, Access::Read)?)?.map(|glance| glance.uuid) == Some(intent.ancestor),
    };
    if same {
        return Ok(());
    }
    let what = format!("a merge of it into {0} was begun: end that first, with --into {0}", ancestor.display());
    Err(Error::new(ErrorKind::Refused, what).at_path(child))
}

/// Whether names and links are all that is left of a merge whose note says that all is copied: the ancestor and the
/// layers are what they were then.
///
/// # Errors
/// `Refused` where the ancestor is not and CHILD is gone; `Io`.
fn is_complete(env: &dyn Env, intent: &Intent, is_child_there: bool) -> Result<bool> {
    let ancestor = intent.folder.join(&intent.ancestor_path);
    let same = Seen::at(env, &ancestor, intent.ancestor)? == Some(intent.ancestor_seen);
    if !is_child_there {
        if same {
            return Ok(true);
        }
        let what = format!(
            "it was changed or replaced since all was copied into it, and what was merged is gone: nothing more is \
             removed; if its disk is right, remove the note {}",
            intent.path().display()
        );
        return Err(Error::new(ErrorKind::Refused, what).at_path(ancestor));
    }
    for layer in &intent.layers {
        let state = Seen::at(env, &intent.folder.join(&layer.path), layer.uuid)?;
        if state.is_some_and(|state| state != layer.seen) {
            return Ok(false);
        }
    }
    Ok(same)
}
