//! How groups ended of which this journal does not say it: who knows, what is believed, and how it
//! is written down here. `docs/adr/0012-groups.md` has the table.

use super::super::decided::{Decided, apply};
use super::super::host::{Host, hex, path_of};
use super::super::open::read_decisions;
use super::super::release::check_header;
use super::super::{Committer, Volume};
use crate::error::{Error, Result};
use crate::journal::{Entry, Group};
use crate::log::scan::Scan;
use crate::sabotage::{Rule, is_broken};
use std::path::{Path, PathBuf};

/// A group begun here whose end this journal does not say.
#[derive(Debug)]
pub(in crate::volume) struct OpenGroup {
    group: Group,
    /// How it ended, if that is known: it only has to be written down.
    known: Option<bool>,
}

impl OpenGroup {
    pub(in crate::volume) fn new(group: Group) -> Self {
        Self { group, known: None }
    }
}

/// How a group ended, as far as the store that decides can say.
enum Verdict {
    Committed,
    Aborted,
    /// Why that is not known.
    Unknown(String),
}

impl Group {
    /// For people, where it is not known how it ended.
    pub(in crate::volume) fn where_it_is_decided(&self) -> String {
        let first = &self.members[0];
        format!(
            "it is one of {} snapshots of group {}, and whether they exist is decided in the store \
             {} of volume {}",
            self.members.len(),
            hex(self.id),
            path_of(&first.store).display(),
            hex(first.uuid)
        )
    }
}

impl Committer {
    /// Write down how the group of an instant ended. Nothing if this journal says it.
    pub(in crate::volume) fn note_group(&mut self, epoch: u32, is_committed: bool) -> Result<()> {
        let Some(open) = self.groups.get(&epoch) else { return Ok(()) };
        let entry = Entry::GroupDecided { epoch, id: open.group.id, is_committed };
        self.journal.append(&entry)?;
        self.groups.remove(&epoch);
        if !is_committed {
            // The journal takes it for a deletion: somebody has to say that nothing is owed.
            self.decisions += 1;
        }
        Ok(())
    }

    /// The same where nothing depends on it: what cannot be written down now is later.
    pub(in crate::volume) fn note_group_or_owe(&mut self, epoch: u32, is_committed: bool) -> bool {
        let is_noted = self.note_group(epoch, is_committed).is_ok();
        if let Some(open) = self.groups.get_mut(&epoch) {
            open.known = Some(is_committed);
        }
        is_noted
    }

    /// Before the volume is closed: what was only owed. Whatever fails is asked for at the next opening.
    pub(in crate::volume) fn note_owed_groups(&mut self) {
        let known = self.groups.iter().filter_map(|(&epoch, open)| Some((epoch, open.known?)));
        for (epoch, is_committed) in known.collect::<Vec<_>>() {
            self.note_group_or_owe(epoch, is_committed);
        }
    }

    /// Before a snapshot is deleted. True if that was the deletion: whether there is one was not
    /// known, and now there is none.
    pub(in crate::volume) fn end_group_before_deletion(&mut self, epoch: u32) -> Result<bool> {
        let known = self.groups.get(&epoch).map(|open| open.known);
        let is_committed = known == Some(Some(true));
        self.note_group(epoch, is_committed)?;
        Ok(known.is_some() && !is_committed)
    }
}

impl Volume {
    /// Ask again about snapshots of which it is not known whether they exist, and write down what
    /// could not be written. `places` are stores to look in as well, from now on. Tells how many
    /// snapshots are left of which it is not known.
    pub fn settle_groups(&self, places: &[PathBuf]) -> Result<usize> {
        self.peers.lock().extend(places.iter().cloned());
        let groups: Vec<(u32, Group, Option<bool>)> = {
            let committer = self.role()?;
            let all = committer.groups.iter();
            all.map(|(&epoch, open)| (epoch, open.group.clone(), open.known)).collect()
        };
        if groups.is_empty() {
            return Ok(0);
        }
        let peers: Vec<PathBuf> = self.peers.lock().iter().cloned().collect();
        for (epoch, group, known) in groups {
            // Others are asked without the role: they may be slow.
            let verdict = match known {
                Some(true) => Verdict::Committed,
                Some(false) => Verdict::Aborted,
                None => ask(&*self.host, &group, &peers),
            };
            match verdict {
                Verdict::Committed => self.settle_group(epoch, true)?,
                Verdict::Aborted => self.settle_group(epoch, false)?,
                Verdict::Unknown(why) => {
                    if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
                        found.undecided = format!("{}: {why}", group.where_it_is_decided());
                    }
                }
            }
        }
        let epochs = self.epochs.read();
        Ok(epochs.0.values().filter(|epoch| !epoch.undecided.is_empty()).count())
    }

    fn settle_group(&self, epoch: u32, is_committed: bool) -> Result<()> {
        let mut committer = self.role()?;
        // Somebody may have deleted it meanwhile.
        let Some(open) = committer.groups.get_mut(&epoch) else { return Ok(()) };
        open.known = Some(is_committed);
        committer.note_group(epoch, is_committed)?;
        if is_committed {
            if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
                found.undecided.clear();
            }
        } else {
            self.drop_denied(&mut committer, epoch);
        }
        Ok(())
    }

    /// As a deletion that the journal says already.
    pub(super) fn drop_denied(&self, committer: &mut Committer, epoch: u32) {
        {
            let mut epochs = self.epochs.write();
            apply(&mut epochs, &Entry::Deleted { epoch });
            epochs.drop_dead();
        }
        self.note_decision(committer);
        self.want_upkeep();
    }

    /// Keep a snapshot of which nobody can tell any more whether it exists: it is right, but others
    /// of its group may be gone. `meta` replaces its opaque bytes, to say so.
    pub fn keep_undecided(&self, epoch: u32, meta: Vec<u8>) -> Result<()> {
        let mut committer = self.role()?;
        match committer.groups.get(&epoch).map(|open| open.known) {
            Some(None) => {}
            Some(Some(false)) => {
                return Err(Error::Undecided(format!(
                    "the group of snapshot {epoch} failed, and that could not be written down yet; \
                     it goes once the store takes it"
                )));
            }
            Some(Some(true)) | None => {
                return Err(Error::NotFound(format!("no snapshot {epoch} is undecided")));
            }
        }
        // First: what is kept says with whose word.
        committer.journal.append(&Entry::EpochMeta { epoch, meta: meta.clone() })?;
        committer.note_group(epoch, true)?;
        if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
            found.meta = meta;
            found.undecided.clear();
        }
        Ok(())
    }

    /// An error unless it is known that this snapshot exists.
    pub(in crate::volume) fn check_decided(&self, epoch: u32) -> Result<()> {
        let epochs = self.epochs.read();
        let found = epochs.0.get(&epoch).filter(|found| !found.undecided.is_empty());
        found.map_or(Ok(()), |found| check_header(epoch, found))
    }
}

impl Decided {
    /// Find out how groups ended that this journal does not tell of. Tells what is to be written
    /// down here before anything else is recorded, and takes it for written.
    pub(in crate::volume) fn settle_groups(
        &mut self,
        host: &dyn Host,
        scan: &Scan,
        peers: &[PathBuf],
    ) -> Vec<Entry> {
        let mut found = Vec::new();
        for (epoch, group) in std::mem::take(&mut self.groups) {
            let verdict = if is_broken(Rule::GroupAsks) {
                Verdict::Committed
            } else if group.members[0].uuid == self.uuid {
                // Nobody else decides, and nothing was decided.
                Verdict::Aborted
            } else {
                ask(host, &group, peers)
            };
            let has_header = scan
                .segments
                .values()
                .any(|s| s.epoch_header.as_ref().is_some_and(|header| header.epoch == epoch));
            match verdict {
                Verdict::Unknown(_) if !has_header => {
                    // Nothing to be decided: without its header there is no snapshot, unless the
                    // group was committed and it was lost since.
                    self.groups.insert(epoch, group);
                }
                Verdict::Unknown(why) => {
                    let words = format!("{}: {why}", group.where_it_is_decided());
                    self.doubts.insert(epoch, words);
                    self.groups.insert(epoch, group);
                }
                known => {
                    let is_committed = matches!(known, Verdict::Committed);
                    let entry = Entry::GroupDecided { epoch, id: group.id, is_committed };
                    self.take(&entry);
                    self.entries.push(entry.clone());
                    found.push(entry);
                }
            }
        }
        found
    }
}

/// Ask the store that decides: where it was, and wherever else stores are known to be.
fn ask(host: &dyn Host, group: &Group, peers: &[PathBuf]) -> Verdict {
    let was = path_of(&group.members[0].store);
    let mut why = "it is not there".to_owned();
    for store in std::iter::once(&was).chain(peers.iter().filter(|peer| **peer != was)) {
        let (decided, entries) = match read_decisions(host.directory(store), store) {
            Ok((_, decided)) => (decided.uuid, decided.entries),
            // Whose it is is not known; where it was, it is most likely the one.
            Err(error) => {
                if store == &was && !matches!(error, Error::NotFound(_)) {
                    why = error.to_string();
                }
                continue;
            }
        };
        if decided != group.members[0].uuid {
            continue;
        }
        let verdict = match host.lock_to_ask(store) {
            Ok(_held) => conclude(host, store, group),
            Err(Error::Locked(_)) => overhear(&entries, group),
            Err(error) => Verdict::Unknown(error.to_string()),
        };
        let Verdict::Unknown(reason) = verdict else { return verdict };
        why = reason;
    }
    Verdict::Unknown(why)
}

/// The end of a group in the journal of the store that decides; nothing if it only began there.
fn said_of(group: &Group, entries: &[Entry]) -> Option<(usize, bool)> {
    let mut said = entries.iter().enumerate().rev();
    said.find_map(|(at, entry)| match entry {
        Entry::GroupDecided { epoch, id, is_committed }
            if *id == group.id && *epoch == group.members[0].epoch =>
        {
            Some((at, *is_committed))
        }
        _ => None,
    })
}

fn begun_at(group: &Group, entries: &[Entry]) -> Option<usize> {
    let is_it = |entry: &Entry| match entry {
        Entry::GroupBegun { epoch, group: known } => {
            known.id == group.id && *epoch == group.members[0].epoch
        }
        _ => false,
    };
    entries.iter().rposition(is_it)
}

/// Nobody has it open. What it says is made durable, or what it does not say is denied for good:
/// what a kill or a failed sync left there must not be another answer for whoever asks next.
fn conclude(host: &dyn Host, store: &Path, group: &Group) -> Verdict {
    let concluded = || -> Result<Verdict> {
        // Once more: somebody may have had it open until now.
        let (mut journal, decided) = read_decisions(host.directory(store), store)?;
        // The name may be as new as a process that was killed.
        journal.settle_left()?;
        if let Some((_, is_committed)) = said_of(group, &decided.entries) {
            journal.rewrite_last()?;
            return Ok(if is_committed { Verdict::Committed } else { Verdict::Aborted });
        }
        if begun_at(group, &decided.entries).is_none() {
            return Ok(Verdict::Unknown(
                "it knows nothing of the group, so it is older than the snapshot, or a copy from \
                 before it"
                    .into(),
            ));
        }
        journal.rewrite_last()?;
        let epoch = group.members[0].epoch;
        journal.append(&Entry::GroupDecided { epoch, id: group.id, is_committed: false })?;
        Ok(Verdict::Aborted)
    };
    concluded().unwrap_or_else(|error| Verdict::Unknown(error.to_string()))
}

/// Another process has it open, or this one. The group is over there, since nobody holds our store;
/// but the last record may still be wiped out, if its sync failed.
fn overhear(entries: &[Entry], group: &Group) -> Verdict {
    match (said_of(group, entries), begun_at(group, entries)) {
        (Some((at, true)), _) if at + 1 < entries.len() => Verdict::Committed,
        (Some((_, false)), _) => Verdict::Aborted,
        (None, Some(begun)) if is_reopened(&entries[begun..]) => Verdict::Aborted,
        _ => Verdict::Unknown(
            "it is open, and does not say yet; it is asked again when snapshots are listed, and at \
             each opening"
                .into(),
        ),
    }
}

/// Whoever has it open came after the group: it is not decided any more.
fn is_reopened(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| matches!(entry, Entry::Opened { .. } | Entry::Closed { .. }))
}
