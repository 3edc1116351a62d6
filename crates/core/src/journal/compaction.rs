//! Writing a journal anew, beside the one in force: what lies in that, the new file, and the moment
//! at which the name leads to the new one. What still matters is not decided here.
//!
//! The new file is durable before it gets the name, and says the same as the old one until its name
//! is durable. The number of its last record is that of the old one's: numbers never begin anew, so
//! that nothing that was ever written before can be taken for what comes next.

use super::{
    HEADER_BYTES, JOURNAL_NAME, JOURNAL_NEW_NAME, Journal, JournalError, RESERVE_BYTES, UNIT,
    encode_record, first_sequence, read_header, read_payload, read_record,
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

    /// What each record is about, in order. Reads little of each.
    pub(crate) fn outlines(&self) -> Result<Vec<Outline>, JournalError> {
        outlines(&*self.file, 0, self.end, self.first_sequence)
    }

    /// One record, verified.
    pub(crate) fn entry(&self, outline: &Outline) -> Result<Entry, JournalError> {
        let found = read_record(&*self.file, outline.at, self.end, outline.sequence)?;
        found.map(|(entry, _)| entry).ok_or(JournalError::Damaged { at: outline.at })
    }

    /// Begin a journal of so many records and bytes. An error if there is no room for it and its
    /// reserve.
    pub(crate) fn begin(&self, records: u64, bytes: u64) -> Result<Replacement, JournalError> {
        assert!(records < self.next_sequence - self.first_sequence, "the first numbers differ");
        let directory = Arc::clone(&self.directory);
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
        let damaged = || JournalError::Damaged { at: from.at };
        let header = read_header(file, from.at, length)?.ok_or_else(damaged)?;
        let payload = read_payload(file, from.at, length, &header)?.ok_or_else(damaged)?;
        self.add(from.kind, &payload)
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
        if let Err(error) = self.heal().and_then(|()| self.bring_up_to_date(&mut new)) {
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
        let since = outlines(&*self.file, new.read_until, self.end, new.next_sequence)?;
        for outline in &since {
            new.copy(&*self.file, outline, self.end)?;
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
        let named = directory.open(JOURNAL_NAME)?;
        let length = named.len()?;
        let first = first_sequence(&*named, length).map_err(io::Error::other)?;
        first == new.first_sequence
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

fn outlines(
    file: &dyn Storage,
    from: u64,
    end: u64,
    first_sequence: u64,
) -> Result<Vec<Outline>, JournalError> {
    let (mut found, mut at, mut sequence) = (Vec::new(), from, first_sequence);
    while at < end {
        let damaged = || JournalError::Damaged { at };
        let header = read_header(file, at, end)?.filter(|header| header.sequence == sequence);
        let header = header.ok_or_else(damaged)?;
        let kind = u8::try_from(header.kind).map_err(|_| damaged())?;
        let mut epoch = [0; 4];
        if is_of_an_epoch(kind) {
            file.read_at(at + to_u64(HEADER_BYTES), &mut epoch)?;
        }
        let bytes = (to_u64(HEADER_BYTES) + u64::from(header.length)).next_multiple_of(UNIT);
        found.push(Outline { at, bytes, sequence, kind, epoch: u32::from_le_bytes(epoch) });
        at += bytes;
        sequence += 1;
    }
    Ok(found)
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
    )
}
