//! One instant of several volumes: all of them have their snapshots, or none has.
//!
//! Every member has a store and a journal of its own, and each may be opened alone. So each journal
//! says that a group begins, before any header is written; a header of such an epoch says nothing
//! until the group is decided; and the journal of the first member decides. The others write down
//! what was decided there. Whoever is opened before that asks the first one's store, and leaves
//! there what it concluded: nobody can come to another conclusion later. Whoever cannot ask does not
//! guess: the snapshot is kept, says so, and gives nothing (`docs/adr/0012-groups.md`).

use super::decided::{Decided, apply};
use super::gate::Quiet;
use super::host::{Host, bytes_of, hex, path_of};
use super::instant::{DRAIN_ROUNDS, Flip, Instant, NextBits, Prepared, WrittenHeader};
use super::watch::Told;
use super::{Committer, SnapshotRequest, Volume};
use crate::error::{Error, Result};
use crate::journal::{Entry, GROUP_MEMBERS_MAX, Group, GroupMember, Journal};
use crate::log::scan::Scan;
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, MutexGuard};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Times that a group begins anew because a restore began on one of its volumes.
const RESTORES_MAX: u32 = 3;

/// One volume's part in a group.
pub struct Member {
    /// Which volume.
    pub volume: Arc<Volume>,
    /// Its snapshot.
    pub request: SnapshotRequest,
    /// As in [`super::Moment`].
    pub quiet: Option<Duration>,
    /// The same.
    pub holds: Quiet,
}

/// A member between the preparation of the instant and its end.
struct Part<'a> {
    volume: &'a Volume,
    committer: MutexGuard<'a, Committer>,
    prepared: Prepared,
    quiet: Option<Duration>,
    flip: Option<Flip>,
}

impl Group {
    /// For people, where it is not known how it ended.
    pub(super) fn where_it_is_decided(&self) -> String {
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

/// Take one snapshot of each volume, all at one instant during this call, or none; in the order of
/// `members`. `passed` is called as that of a [`super::Moment`]. Fails for a group of one, of more
/// than 64, or with a volume in it twice.
pub fn snapshot_group(
    id: [u8; 16],
    members: Vec<Member>,
    passed: Option<Told<'_>>,
) -> Result<Vec<Instant>> {
    let count = members.len();
    let mut ordered: Vec<(usize, Member)> = members.into_iter().enumerate().collect();
    ordered.sort_by_key(|(_, member)| member.volume.uuid);
    let is_twice = ordered.windows(2).any(|w| w[0].1.volume.uuid == w[1].1.volume.uuid);
    if is_twice || !(2..=GROUP_MEMBERS_MAX).contains(&count) {
        return Err(Error::Usage(format!(
            "a group has from 2 to {GROUP_MEMBERS_MAX} volumes, each once; {count} were named"
        )));
    }
    let volumes: Vec<Arc<Volume>> = ordered.iter().map(|(_, m)| Arc::clone(&m.volume)).collect();
    let (places, members): (Vec<usize>, Vec<Member>) = ordered.into_iter().unzip();
    let taken = take(id, &volumes, members, passed);
    for volume in &volumes {
        // An origin that failed is noted in its own store before anybody is told.
        if taken.is_err() {
            volume.note_failure();
        }
    }
    let mut taken: Vec<(usize, Instant)> = places.into_iter().zip(taken?).collect();
    taken.sort_by_key(|(place, _)| *place);
    Ok(taken.into_iter().map(|(_, instant)| instant).collect())
}

/// The roles of all, in the order of their uuids, while no restore runs.
fn roles(volumes: &[Arc<Volume>]) -> Result<Vec<MutexGuard<'_, Committer>>> {
    for _ in 0..RESTORES_MAX {
        for volume in volumes {
            // One at a time: it gives the role to others in between.
            volume.finish_restore_first(&mut volume.role()?)?;
        }
        let roles = volumes.iter().map(|volume| volume.role()).collect::<Result<Vec<_>>>()?;
        if volumes.iter().all(|volume| volume.restore_status().is_none()) {
            return Ok(roles);
        }
    }
    Err(Error::RestoreRunning(
        "restores of these volumes follow one another; take the snapshots when they are done"
            .into(),
    ))
}

fn take(
    id: [u8; 16],
    volumes: &[Arc<Volume>],
    members: Vec<Member>,
    passed: Option<Told<'_>>,
) -> Result<Vec<Instant>> {
    let mut parts: Vec<Part<'_>> = Vec::new();
    for ((volume, mut committer), member) in volumes.iter().zip(roles(volumes)?).zip(members) {
        match volume.prepare_instant(&mut committer, member.request, member.holds) {
            Ok(prepared) => {
                parts.push(Part { volume, committer, prepared, quiet: member.quiet, flip: None });
            }
            Err(error) => return Err(give_up(&mut parts, id, error)),
        }
    }
    let opened = match begin(id, &mut parts).and_then(|()| flip_all(&mut parts)) {
        Ok(()) => Clock::now(),
        Err(error) => return Err(give_up(&mut parts, id, error)),
    };
    for part in &mut parts {
        part.committer.epoch_max = part.prepared.epoch;
    }
    if let Some(passed) = passed {
        passed();
    }
    if is_broken(Rule::GroupHeadersFirst) {
        let _ = decide(&mut parts, id);
    }
    let mut headers: Vec<WrittenHeader> = Vec::new();
    for part in &mut parts {
        let flip = part.flip.as_ref().expect("flipped");
        match part.volume.write_header(&mut part.committer, &part.prepared, flip, None) {
            Ok(header) => headers.push(header),
            Err(error) => return Err(abort(&mut parts, headers, id, error)),
        }
    }
    if !is_broken(Rule::GroupHeadersFirst)
        && let Err(error) = decide(&mut parts, id)
    {
        return Err(abort(&mut parts, headers, id, error));
    }
    for (part, header) in parts.iter_mut().zip(headers) {
        part.begin_epoch(header);
    }
    for part in parts.iter_mut().skip(1) {
        // It is decided. Where this cannot be written the next opening asks the first one's store.
        let _ = part.note_decided(id, true);
    }
    Ok(parts.iter_mut().map(|part| part.end(opened)).collect())
}

/// Every journal says what is about to happen; then everything that waits is drained, with writes
/// going on.
fn begin(id: [u8; 16], parts: &mut [Part<'_>]) -> Result<()> {
    let member = |part: &Part<'_>| GroupMember {
        uuid: part.volume.uuid,
        epoch: part.prepared.epoch,
        store: bytes_of(
            &part
                .volume
                .host
                .canonical(&part.volume.store_path)
                .unwrap_or_else(|_| part.volume.store_path.clone()),
        ),
    };
    let group = Group { id, members: parts.iter().map(member).collect() };
    for part in parts.iter_mut() {
        let epoch = part.prepared.epoch;
        let entry = Entry::GroupBegun { epoch, group: group.clone() };
        part.committer.journal.append(&entry)?;
        // The journal says it of this number: no other instant gets it.
        part.committer.epoch_max = epoch;
    }
    let limit = parts.iter().map(|part| part.prepared.pause_limit).min().unwrap_or_default();
    for part in parts.iter_mut() {
        part.prepared.pause_limit = limit;
    }
    for _ in 0..DRAIN_ROUNDS {
        for part in parts.iter_mut() {
            part.volume.drain_once(&mut part.committer)?;
        }
    }
    Ok(())
}

/// **The instant**: from the closing of the last gate to the opening of the first one no write is
/// admitted anywhere and none is in flight. Whatever was acknowledged before, on any of the volumes,
/// is in; a write that somebody sent because of one that is not in was not admitted before.
fn flip_all(parts: &mut [Part<'_>]) -> Result<()> {
    let mut next: Vec<NextBits> = Vec::new();
    for part in parts.iter() {
        next.push(part.volume.next_bits(&part.prepared.selection));
    }
    if is_broken(Rule::GroupGatesTogether) {
        for (part, next) in parts.iter_mut().zip(next) {
            part.volume.drain_once(&mut part.committer)?;
            let closed = Clock::now();
            let in_flight = part.volume.close_gate(&part.prepared.guarded, None)?;
            part.volume.wait_drained(&part.prepared, closed)?;
            part.flip = Some(part.volume.switch(&part.prepared, next, in_flight));
            part.volume.open_gate(closed);
        }
        return Ok(());
    }
    let mut closed: Vec<(Clock, u64)> = Vec::new();
    let mut shut = || -> Result<()> {
        for part in parts.iter() {
            closed.push((Clock::now(), 0));
            let in_flight = part.volume.close_gate(&part.prepared.guarded, part.quiet)?;
            closed.last_mut().expect("just pushed").1 = in_flight;
        }
        let first = closed[0].0;
        parts.iter().try_for_each(|part| part.volume.wait_drained(&part.prepared, first))
    };
    let shut = shut();
    if shut.is_ok() {
        for ((part, next), (_, in_flight)) in parts.iter_mut().zip(next).zip(&closed) {
            part.flip = Some(part.volume.switch(&part.prepared, next, *in_flight));
        }
    }
    for (part, (closed, _)) in parts.iter_mut().zip(&closed) {
        let pause = part.volume.open_gate(*closed);
        if let Some(flip) = &mut part.flip {
            flip.pause = pause;
        }
    }
    shut
}

/// The first member's journal decides: **the commit of the group**.
fn decide(parts: &mut [Part<'_>], id: [u8; 16]) -> Result<()> {
    let first = &mut parts[0];
    let epoch = first.prepared.epoch;
    let entry = Entry::GroupDecided { epoch, id, is_committed: true };
    Ok(first.committer.journal.append(&entry)?)
}

/// There was no instant: nothing was written that could be taken for a snapshot.
fn give_up(parts: &mut [Part<'_>], id: [u8; 16], error: Error) -> Error {
    for part in parts {
        Volume::forget_instant(&mut part.committer);
        if part.committer.epoch_max == part.prepared.epoch {
            // Without it the next opening comes to the same.
            let _ = part.note_decided(id, false);
        }
    }
    error
}

/// There was an instant, and it is to be none. Members whose headers are durable have an epoch
/// without a snapshot from here on; the others go on with the epoch they had.
fn abort(parts: &mut [Part<'_>], headers: Vec<WrittenHeader>, id: [u8; 16], error: Error) -> Error {
    // A decision that failed may be durable all the same, until the journal has wiped it out and
    // says the contrary. Nobody may act on that before. Short of a header nothing was decided.
    let is_denied = parts[0].note_decided(id, false).is_ok();
    let is_certain = is_denied || headers.len() < parts.len();
    let mut told = error;
    let mut headers = headers.into_iter();
    for (at, part) in parts.iter_mut().enumerate() {
        let Some(header) = headers.next() else {
            told = part.volume.abort_instant(&mut part.committer, &part.prepared, told);
            continue;
        };
        part.begin_epoch(header);
        let is_noted =
            is_certain && if at == 0 { is_denied } else { part.note_decided(id, false).is_ok() };
        if is_noted {
            part.drop_snapshot();
        } else {
            part.leave_undecided();
        }
    }
    told
}

impl Part<'_> {
    fn note_decided(&mut self, id: [u8; 16], is_committed: bool) -> Result<()> {
        let epoch = self.prepared.epoch;
        let entry = Entry::GroupDecided { epoch, id, is_committed };
        Ok(self.committer.journal.append(&entry)?)
    }

    fn begin_epoch(&mut self, header: WrittenHeader) {
        let flip = self.flip.as_ref().expect("flipped");
        self.volume.begin_epoch(&mut self.committer, &self.prepared, flip, header);
    }

    /// As a deletion that the journal says already.
    fn drop_snapshot(&mut self) {
        {
            let mut epochs = self.volume.epochs.write();
            let epoch = self.prepared.epoch;
            let entry = Entry::GroupDecided { epoch, id: [0; 16], is_committed: false };
            apply(&mut epochs, &entry);
            epochs.drop_dead();
        }
        self.volume.note_decision(&mut self.committer);
        self.volume.want_upkeep();
    }

    /// Nobody can say yet: what it selects is preserved until an opening knows.
    fn leave_undecided(&mut self) {
        let mut epochs = self.volume.epochs.write();
        if let Some(found) = epochs.0.get_mut(&self.prepared.epoch) {
            found.undecided = "its group failed while it was decided, and the store that decides \
                               could not take it back; stop its volumes and serve them again"
                .into();
        }
    }

    fn end(&mut self, opened: Clock) -> Instant {
        let flip = self.flip.as_ref().expect("flipped");
        self.volume.end_instant(&mut self.committer, &self.prepared, flip, opened)
    }
}

/// How a group ended, as far as the store that decides can say.
enum Verdict {
    Committed,
    Aborted,
    /// Why that is not known.
    Unknown(String),
}

impl Decided {
    /// Find out how groups ended that this journal does not tell of. Tells what is to be written
    /// down here before anything else is recorded, and takes it for written.
    pub(super) fn settle_groups(
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
    let mut verdict = Verdict::Unknown("it is not there".into());
    for store in std::iter::once(&was).chain(peers.iter().filter(|peer| **peer != was)) {
        let Ok((journal, decided)) = super::open::read_decisions(host.directory(store), store)
        else {
            continue;
        };
        if decided.uuid != group.members[0].uuid {
            continue;
        }
        verdict = match host.lock_store(store) {
            Ok(_held) => conclude(host, store, group),
            Err(_) => overhear(&journal, &decided, group),
        };
        if !matches!(verdict, Verdict::Unknown(_)) {
            break;
        }
    }
    verdict
}

/// The end of a group in the journal of the store that decides; nothing if it only began there.
fn said_of(group: &Group, entries: &[Entry]) -> Option<(usize, bool)> {
    let mut said = entries.iter().enumerate().rev();
    said.find_map(|(at, entry)| match entry {
        Entry::GroupDecided { id, is_committed, .. } if *id == group.id => {
            Some((at, *is_committed))
        }
        _ => None,
    })
}

fn begun_at(group: &Group, entries: &[Entry]) -> Option<usize> {
    let is_it =
        |entry: &Entry| matches!(entry, Entry::GroupBegun { group: g, .. } if g.id == group.id);
    entries.iter().rposition(is_it)
}

/// Nobody has it open. What it says is made durable, or what it does not say is denied for good:
/// what a kill or a failed sync left there must not be another answer for whoever asks next.
fn conclude(host: &dyn Host, store: &Path, group: &Group) -> Verdict {
    let concluded = || -> Result<Verdict> {
        // Once more: somebody may have had it open until now.
        let (mut journal, decided) = super::open::read_decisions(host.directory(store), store)?;
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
fn overhear(journal: &Journal, decided: &Decided, group: &Group) -> Verdict {
    let entries = &decided.entries;
    let last = usize::try_from(journal.last_sequence()).unwrap_or(usize::MAX);
    match (said_of(group, entries), begun_at(group, entries)) {
        (Some((at, true)), _) if at + 1 < last => Verdict::Committed,
        (Some((_, false)), _) => Verdict::Aborted,
        (None, Some(begun)) if is_reopened(&entries[begun..]) => Verdict::Aborted,
        _ => Verdict::Unknown(
            "another process has it open, and it does not say yet; serve both volumes with one \
             process"
                .into(),
        ),
    }
}

/// Whoever has it open came after the group: it is not decided any more.
fn is_reopened(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| matches!(entry, Entry::Opened { .. } | Entry::Closed { .. }))
}
