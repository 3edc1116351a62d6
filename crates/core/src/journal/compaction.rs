//! Writing a journal anew, beside the one in force: what lies in that, the new file, and the moment
//! at which the name leads to the new one. What still matters is not decided here.
//!
//! The new file is durable before it gets the name, and says the same as the old one until its name
//! is durable. The number of its last record is that of the old one's: numbers never begin anew, so
//! that nothing that was ever written before can be taken for what comes next.

use super::{
    HEADER_BYTES, JOURNAL_NAME, JOURNAL_NEW_NAME, Journal, JournalError, RESERVE_BYTES, UNIT,
    check_length, encode_record, first_sequence, read_header, read_payload, read_record,
};
use crate::journal::{Entry, kind};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use std::io;
use std::sync::Arc;

/// So much is written at once.
const PIECE_BYTES: usize = 1 << 20;

/// Where a record is, and what it is about: enough to tell whether it still matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outline {
    /// Its first byte, and those it takes in the file.
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    pub(crate) sequence: u64,
    pub(crate) kind: u8,
    /// The epoch it is about, 0 if it is about none.
    pub(crate) epoch: u32,
}

/// A journal as it was at one moment. What lies in it stays as it is while more is appended, so that
/// it can be read without the committer role.
pub(crate) struct Seen {
    directory: Arc<dyn Directory>,
    file: Arc<dyn Storage>,
    first_sequence: u64,
    next_sequence: u64,
    end: u64,
}

impl Seen {
    /// Bytes of all records.
    pub(crate) fn bytes(&self) -> u64 {
        self.end
    }

    /// What each record is about, in order. Reads little of each, and verifies no checksum.
    pub(crate) fn outlines(&self) -> Outlines<'_> {
        outlines(&*self.file, 0, self.end, self.first_sequence)
    }

    /// One record, verified.
    pub(crate) fn entry(&self, outline: &Outline) -> Result<Entry, JournalError> {
        let payload = verified(&*self.file, outline, self.end)?;
        let damaged = |_| JournalError::Damaged { at: outline.at };
        Entry::decode(outline.kind, &payload).map_err(damaged)
    }

    /// That a record is intact, and is about what its outline says. One that is not may look as if
    /// nothing depended on it: left out, nobody would ever learn of the damage.
    pub(crate) fn verify(&self, outline: &Outline) -> Result<(), JournalError> {
        verified(&*self.file, outline, self.end).map(drop)
    }

    /// Begin a journal of so many records and bytes. An error if there is no room for it and its
    /// reserve.
    pub(crate) fn begin(&self, records: u64, bytes: u64) -> Result<Replacement, JournalError> {
        assert!(records < self.next_sequence - self.first_sequence, "the first numbers differ");
        let replaces = identity(&*self.file)?.ok_or(JournalError::Damaged { at: 0 })?;
        let directory = Arc::clone(&self.directory);
        check_name(&*directory, replaces)?;
        // Made anew, never emptied: nobody can tell what an old one's name leads to.
        if directory.list()?.iter().any(|name| name == JOURNAL_NEW_NAME) {
            directory.remove(JOURNAL_NEW_NAME)?;
        }
        let file = directory.create(JOURNAL_NEW_NAME)?;
        let first_sequence = self.next_sequence - records;
        let replacement = Replacement {
            file,
            first_sequence,
            next_sequence: first_sequence,
            end: 0,
            last_start: 0,
            allocated: bytes + RESERVE_BYTES,
            read_until: self.end,
            piece: Vec::new(),
            replaces,
            is_renamed: None,
        };
        match replacement.file.allocate(0, replacement.allocated) {
            Ok(()) => Ok(replacement),
            Err(error) => {
                self.give_up();
                Err(error.into())
            }
        }
    }

    /// Bring a record over as it is but for its number.
    pub(crate) fn copy(&self, from: &Outline, to: &mut Replacement) -> Result<(), JournalError> {
        to.copy(&*self.file, from, self.end)
    }

    /// Leave no trace of what was begun. What cannot be removed is removed at the next opening.
    pub(crate) fn give_up(&self) {
        let _ = self.directory.remove(JOURNAL_NEW_NAME);
    }
}

/// A journal that is being written.
pub(crate) struct Replacement {
    file: Arc<dyn Storage>,
    first_sequence: u64,
    next_sequence: u64,
    /// Where the next record goes, and where the last one went.
    end: u64,
    last_start: u64,
    allocated: u64,
    /// What the journal in force has behind this byte is not in here yet.
    read_until: u64,
    /// Records that are not written yet.
    piece: Vec<u8>,
    /// What the journal in force is.
    replaces: Identity,
    /// The name leads here, or does not; `None` if that is not known.
    is_renamed: Option<bool>,
}

impl Replacement {
    /// Add a decision.
    pub(crate) fn push(&mut self, entry: &Entry) -> Result<(), JournalError> {
        let (kind, payload) = entry.encode();
        self.add(kind, &payload)
    }

    fn add(&mut self, kind: u8, payload: &[u8]) -> Result<(), JournalError> {
        check_length(payload)?;
        let record = encode_record(self.next_sequence, kind, payload);
        self.last_start = self.end;
        self.end += to_u64(record.len());
        self.next_sequence += 1;
        self.piece.extend(record);
        if self.piece.len() >= PIECE_BYTES { self.write() } else { Ok(()) }
    }

    fn copy(
        &mut self,
        file: &dyn Storage,
        from: &Outline,
        length: u64,
    ) -> Result<(), JournalError> {
        self.add(from.kind, &verified(file, from, length)?)
    }

    /// What it is once it has the name.
    fn identity(&self) -> Identity {
        Identity { first_sequence: self.first_sequence, ..self.replaces }
    }

    fn write(&mut self) -> Result<(), JournalError> {
        let piece = std::mem::take(&mut self.piece);
        Ok(self.file.write_at(self.end - to_u64(piece.len()), &piece)?)
    }

    /// Make all of it durable.
    pub(crate) fn sync(&mut self) -> Result<(), JournalError> {
        self.write()?;
        if is_broken(Rule::CompactedDurable) { Ok(()) } else { Ok(self.file.sync()?) }
    }
}

impl Journal {
    /// What there is now.
    pub(crate) fn seen(&self) -> Seen {
        Seen {
            directory: Arc::clone(&self.directory),
            file: Arc::clone(&self.file),
            first_sequence: self.first_sequence,
            next_sequence: self.next_sequence,
            end: self.end,
        }
    }

    /// Put a journal in the place of this one that says the same as this one did when it was
    /// [`Self::seen`]: with what was decided since, which is little. After an error this one is in
    /// force, or nothing is decided until it is known which.
    pub(crate) fn replace(&mut self, mut new: Replacement) -> Result<(), JournalError> {
        let ready = self.heal().and_then(|()| self.bring_up_to_date(&mut new));
        if let Err(error) = ready.and_then(|()| check_name(&*self.directory, new.replaces)) {
            self.seen().give_up();
            return Err(error);
        }
        assert_eq!(new.next_sequence, self.next_sequence, "no decision is left out");
        self.replacement = Some(new);
        let renamed = self.directory.rename(JOURNAL_NEW_NAME, JOURNAL_NAME);
        self.settle_name()?;
        Ok(renamed?)
    }

    /// Decisions made since, with the numbers they have.
    fn bring_up_to_date(&self, new: &mut Replacement) -> Result<(), JournalError> {
        if new.read_until == self.end {
            return Ok(());
        }
        if is_broken(Rule::DecisionsMeanwhileCopied) {
            new.next_sequence = self.next_sequence;
            return Ok(());
        }
        for outline in outlines(&*self.file, new.read_until, self.end, new.next_sequence) {
            new.copy(&*self.file, &outline?, self.end)?;
        }
        new.sync()
    }

    /// Learn which file the name leads to, and make that durable. Until it is, a power cut may bring
    /// back the other one: nothing may be decided that only one of them says.
    pub(super) fn settle_name(&mut self) -> Result<(), JournalError> {
        let Some(new) = &mut self.replacement else { return Ok(()) };
        let is_renamed = settle(&*self.directory, new).map_err(JournalError::Unsettled)?;
        let Some(new) = self.replacement.take().filter(|_| is_renamed) else { return Ok(()) };
        self.file = new.file;
        self.first_sequence = new.first_sequence;
        self.end = new.end;
        self.last_start = new.last_start;
        self.allocated = new.allocated.max(new.end);
        Ok(())
    }

    /// Before anything is decided by who has just opened the store: what is left of a compaction is
    /// removed, and the name made durable, which may be as new as a process that was killed.
    pub fn settle_left(&self) -> Result<(), JournalError> {
        let is_left = self.directory.list()?.iter().any(|name| name == JOURNAL_NEW_NAME);
        if is_left {
            self.directory.remove(JOURNAL_NEW_NAME)?;
        }
        let is_compacted = self.first_sequence > 1;
        if is_left || is_compacted { Ok(self.directory.sync()?) } else { Ok(()) }
    }
}

/// Whether the name leads to the new file; durable when this returns.
fn settle(directory: &dyn Directory, new: &mut Replacement) -> io::Result<bool> {
    let is_renamed = if let Some(known) = new.is_renamed {
        known
    } else {
        let named = identity(&*directory.open(JOURNAL_NAME)?).map_err(io::Error::other)?;
        if named != Some(new.identity()) && named != Some(new.replaces) {
            return Err(io::Error::other("it leads to a journal that somebody else put there"));
        }
        named == Some(new.identity())
    };
    new.is_renamed = Some(is_renamed);
    if !is_renamed && directory.list()?.iter().any(|name| name == JOURNAL_NEW_NAME) {
        directory.remove(JOURNAL_NEW_NAME)?;
    }
    if !is_broken(Rule::CompactedNamed) {
        directory.sync()?;
    }
    Ok(is_renamed)
}

/// What tells a journal from every other that may have its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    uuid: [u8; 16],
    first_sequence: u64,
}

/// What a file is the journal of; `None` if it is not one.
fn identity(file: &dyn Storage) -> Result<Option<Identity>, JournalError> {
    let length = file.len()?;
    let first_sequence = first_sequence(file, length)?;
    let mut found = read_record(file, 0, length, first_sequence)?;
    if let Some((Entry::Compacted(_), next)) = found {
        found = read_record(file, next, length, first_sequence + 1)?;
    }
    Ok(match found {
        Some((Entry::Created { uuid, .. }, _)) => Some(Identity { uuid, first_sequence }),
        _ => None,
    })
}

/// Names are looked up anew each time: what was put in the journal's place must not be lost.
fn check_name(directory: &dyn Directory, expected: Identity) -> Result<(), JournalError> {
    let is_it = identity(&*directory.open(JOURNAL_NAME)?)? == Some(expected);
    if is_it { Ok(()) } else { Err(JournalError::Replaced) }
}

/// The payload of a record that is intact and what its outline says.
fn verified(file: &dyn Storage, outline: &Outline, length: u64) -> Result<Vec<u8>, JournalError> {
    let damaged = || JournalError::Damaged { at: outline.at };
    let header = read_header(file, outline.at, length)?.ok_or_else(damaged)?;
    let payload = read_payload(file, outline.at, length, &header)?.ok_or_else(damaged)?;
    let epoch = payload.first_chunk().filter(|_| is_of_an_epoch(outline.kind));
    let is_same = header.sequence == outline.sequence
        && header.kind == u32::from(outline.kind)
        && epoch.map_or(0, |bytes| u32::from_le_bytes(*bytes)) == outline.epoch;
    if is_same { Ok(payload) } else { Err(damaged()) }
}

/// What records are about, in order; ends with the first error.
pub(crate) struct Outlines<'a> {
    file: &'a dyn Storage,
    at: u64,
    end: u64,
    sequence: u64,
}

fn outlines(file: &dyn Storage, from: u64, end: u64, first_sequence: u64) -> Outlines<'_> {
    Outlines { file, at: from, end, sequence: first_sequence }
}

impl Iterator for Outlines<'_> {
    type Item = Result<Outline, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let found = self.read();
        match &found {
            Ok(outline) => {
                self.at += outline.bytes;
                self.sequence += 1;
            }
            Err(_) => self.at = self.end,
        }
        Some(found)
    }
}

impl Outlines<'_> {
    fn read(&self) -> Result<Outline, JournalError> {
        let (at, sequence) = (self.at, self.sequence);
        let damaged = || JournalError::Damaged { at };
        let header = read_header(self.file, at, self.end)?;
        let header = header.filter(|header| header.sequence == sequence).ok_or_else(damaged)?;
        let kind = u8::try_from(header.kind).map_err(|_| damaged())?;
        let mut epoch = [0; 4];
        if is_of_an_epoch(kind) {
            self.file.read_at(at + to_u64(HEADER_BYTES), &mut epoch)?;
        }
        let bytes = (to_u64(HEADER_BYTES) + u64::from(header.length)).next_multiple_of(UNIT);
        Ok(Outline { at, bytes, sequence, kind, epoch: u32::from_le_bytes(epoch) })
    }
}

fn is_of_an_epoch(kind: u8) -> bool {
    matches!(
        kind,
        kind::EPOCH_META
            | kind::NARROWED
            | kind::NARROWED_AS
            | kind::DELETED
            | kind::BOOKMARKED
            | kind::BOOKMARK_DELETED
            | kind::RESIZED
            | kind::ABORTED
            | kind::LOST
            | kind::SUSPECT
            | kind::RESTORE_ENDED
            | kind::ACCEPTED
            | kind::GIVEN_UP
            | kind::RESTORED
            | kind::GROUP_BEGUN
            | kind::GROUP_DECIDED
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{OriginIdentity, RECORD_BYTES_MAX};
    use crate::number::to_usize;
    use crate::storage::FileDirectory;
    use std::path::{Path, PathBuf};

    fn created(uuid: u8) -> Entry {
        Entry::Created {
            uuid: [uuid; 16],
            block_size: 4096,
            origin: b"/disk".to_vec(),
            identity: OriginIdentity::default(),
            meta: Vec::new(),
        }
    }

    /// A journal of five records, in a directory of its own.
    fn journal(uuid: u8) -> (tempfile::TempDir, Journal) {
        let base = Path::new("/dev/shm");
        let dir = if base.is_dir() { tempfile::tempdir_in(base) } else { tempfile::tempdir() };
        let dir = dir.expect("temporary directory");
        let directory = Arc::new(FileDirectory::new(dir.path()));
        let mut journal = Journal::create(directory, &created(uuid)).expect("made");
        for meta in 0..4 {
            journal.append(&Entry::VolumeMeta(vec![meta])).expect("appended");
        }
        (dir, journal)
    }

    /// Three records that say the same.
    fn compacted(journal: &Journal) -> Replacement {
        let mut new = journal.seen().begin(3, 1 << 20).expect("begun");
        let entries = [Entry::Compacted(super::super::Compacted::default()), created(7)];
        for entry in entries.iter().chain([&Entry::VolumeMeta(vec![3])]) {
            new.push(entry).expect("written");
        }
        new.sync().expect("synced");
        new
    }

    fn path(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        dir.path().join(name)
    }

    /// Another volume's journal takes the name; the file that had it is kept as `kept`.
    fn take_the_name(dir: &tempfile::TempDir) -> Vec<u8> {
        let (other, _) = journal(9);
        let content = std::fs::read(path(&other, JOURNAL_NAME)).expect("read");
        std::fs::rename(path(dir, JOURNAL_NAME), path(dir, "kept")).expect("renamed");
        std::fs::write(path(dir, JOURNAL_NAME), &content).expect("written");
        content
    }

    #[test]
    fn a_journal_that_somebody_put_in_the_place_of_ours_is_left_alone() {
        let (dir, mut journal) = journal(7);
        let new = compacted(&journal);
        let other = take_the_name(&dir);
        assert!(matches!(journal.replace(new), Err(JournalError::Replaced)));
        assert!(matches!(journal.seen().begin(3, 1 << 20), Err(JournalError::Replaced)));
        assert_eq!(std::fs::read(path(&dir, JOURNAL_NAME)).expect("read"), other);
        assert!(!path(&dir, JOURNAL_NEW_NAME).exists());
        // It comes back, and all is as before.
        std::fs::rename(path(&dir, "kept"), path(&dir, JOURNAL_NAME)).expect("renamed");
        journal.replace(compacted(&journal)).expect("replaced");
        let (again, entries) =
            Journal::open(Arc::new(FileDirectory::new(dir.path()))).expect("read");
        assert_eq!((again.first_sequence(), again.last_sequence(), entries.len()), (3, 5, 3));
    }

    /// The rename failed, and what the name leads to is neither of the two.
    #[test]
    fn nothing_is_decided_while_the_name_leads_to_a_third_journal() {
        let (dir, mut journal) = journal(7);
        journal.replacement = Some(compacted(&journal));
        take_the_name(&dir);
        let later = Entry::VolumeMeta(b"later".to_vec());
        assert!(matches!(journal.append(&later), Err(JournalError::Unsettled(_))), "P10");
        std::fs::rename(path(&dir, "kept"), path(&dir, JOURNAL_NAME)).expect("renamed");
        journal.append(&later).expect("the old one is in force");
        let (_, entries) = Journal::open(Arc::new(FileDirectory::new(dir.path()))).expect("read");
        assert_eq!(entries.last(), Some(&later));
    }

    #[test]
    fn a_record_that_could_not_be_read_back_is_not_written() {
        let (_dir, journal) = journal(7);
        let mut new = journal.seen().begin(3, 1 << 20).expect("begun");
        let payload = vec![0; to_usize(u64::from(RECORD_BYTES_MAX)) + 1];
        let refused = new.add(kind::VOLUME_META, &payload);
        assert!(matches!(refused, Err(JournalError::TooLarge { .. })));
    }
}
