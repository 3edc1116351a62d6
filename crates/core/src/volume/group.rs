//! One instant of several volumes: all of them have their snapshots, or none has.
//!
//! Every member has a store and a journal of its own, and each may be opened alone. So each journal
//! says that a group begins, before any header is written; a header of such an epoch says nothing
//! until the group is decided; and the journal of the first member decides. The others write down
//! what was decided there. Whoever is opened before that asks the first one's store, and leaves
//! there what it concluded: nobody can come to another conclusion later. Whoever cannot ask does not
//! guess: the snapshot is kept, says so, and gives nothing (`docs/adr/0012-groups.md`).

mod ending;

pub(super) use self::ending::OpenGroup;

use super::gate::Quiet;
use super::host::bytes_of;
use super::instant::{DRAIN_ROUNDS, Flip, Instant, NextBits, Prepared, WrittenHeader};
use super::watch::Told;
use super::{Committer, SnapshotRequest, Volume};
use crate::error::{Error, Result};
use crate::journal::{Entry, GROUP_MEMBERS_MAX, Group, GroupMember};
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, MutexGuard, run_together, unix_ns};
use std::sync::Arc;
use std::time::Duration;

/// Times that a group begins anew because a restore began on one of its volumes.
const RESTORES_MAX: u32 = 3;
/// Longest that the first changes of some members may wait in the buffer for others before the gates
/// close: for a role, or for the last round of draining. A disk that takes longer is not well.
const GATHER_TIME: Duration = Duration::from_secs(10);

/// Said of a snapshot of a group that failed, until that is written down.
const FAILED: &str =
    "its group failed, and a store could not take that down yet; it is tried again";

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

/// Somebody who may still say that nothing is to be taken, and why.
pub type Objects<'a> = Box<dyn FnOnce() -> Option<String> + Send + 'a>;

/// Whom a group tells, and whom it asks.
#[derive(Default)]
pub struct GroupMoment<'a> {
    /// As in [`super::Moment`]; once, when the gates of all are open again.
    pub passed: Option<Told<'a>>,
    /// Asked once, when all is durable but the decision: a reason means that there are to be no
    /// snapshots. The roles of all are held meanwhile: it must not wait for anything that writes to,
    /// flushes or locks one of them, a thaw for example.
    pub objects: Option<Objects<'a>>,
}

/// A member between the preparation of the instant and its end.
struct Part<'a> {
    volume: &'a Volume,
    committer: MutexGuard<'a, Committer>,
    prepared: Prepared,
    quiet: Option<Duration>,
    flip: Option<Flip>,
    header: Option<WrittenHeader>,
}

/// Take one snapshot of each volume, all at one instant during this call, or none; in the order of
/// `members`. Fails for a group of one, of more than 64, or with a volume in it twice; with
/// [`Error::NotHeld`] if somebody objects. `id` is given to no other group, nor to a second try.
pub fn snapshot_group(
    id: [u8; 16],
    members: Vec<Member>,
    moment: GroupMoment<'_>,
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
    let taken = take(id, &volumes, members, moment);
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

/// The roles of all, in the order of their uuids, while no restore runs. What takes long is done
/// before, one volume after the other, while nobody waits for another volume's sake.
fn roles(volumes: &[Arc<Volume>]) -> Result<Vec<MutexGuard<'_, Committer>>> {
    for _ in 0..RESTORES_MAX {
        for volume in volumes {
            let mut committer = volume.role()?;
            volume.close_regions_first(&mut committer)?;
            // It gives the role to others in between.
            volume.finish_restore_first(&mut committer)?;
            for _ in 0..DRAIN_ROUNDS {
                volume.drain_once(&mut committer)?;
            }
        }
        let deadline = Clock::now() + GATHER_TIME;
        let roles = volumes.iter().map(|volume| volume.role_until(deadline));
        let roles = roles.collect::<Result<Vec<_>>>()?;
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
    moment: GroupMoment<'_>,
) -> Result<Vec<Instant>> {
    let mut parts = prepare(volumes, members)?;
    let begun = gather(&mut parts).and_then(|()| begin(id, &mut parts));
    let opened = match begun.and_then(|()| flip_all(&mut parts)) {
        Ok(()) => Clock::now(),
        Err(error) => return Err(give_up(&mut parts, error)),
    };
    if let Some(passed) = moment.passed {
        passed();
    }
    let is_decided_before = is_broken(Rule::GroupHeadersFirst);
    if is_decided_before {
        let _ = decide(&mut parts, id);
    }
    let written = each_at_once(&mut parts, |part| {
        let flip = part.flip.as_ref().expect("flipped");
        let header = part.volume.write_header(part.committer, part.prepared, flip, None)?;
        *part.header = Some(header);
        Ok(())
    });
    let objects = || match moment.objects.and_then(|objects| objects()) {
        Some(why) => Err(Error::NotHeld(why)),
        None => Ok(()),
    };
    if is_broken(Rule::GroupObjectionsFirst) && written.is_ok() {
        let _ = decide(&mut parts, id);
    }
    let agreed = written.and_then(|()| objects());
    let decided = match agreed {
        Ok(()) if is_decided_before => Ok(()),
        Ok(()) => decide(&mut parts, id),
        Err(error) => return Err(abort(&mut parts, true, error)),
    };
    if let Err(error) = decided {
        return Err(abort(&mut parts, false, error));
    }
    for part in &mut parts {
        part.begin_epoch("");
    }
    each_at_once(&mut parts, |part| {
        // It is decided. What the others cannot write now is written by upkeep, or asked for at the
        // next opening.
        part.committer.note_group_or_owe(part.prepared.epoch, true);
        Ok(())
    })?;
    Ok(parts.iter_mut().map(|part| part.end(opened)).collect())
}

/// All roles, and on every volume what an instant needs before.
fn prepare(volumes: &[Arc<Volume>], members: Vec<Member>) -> Result<Vec<Part<'_>>> {
    let mut committers = roles(volumes)?;
    let works = volumes.iter().zip(&mut committers).zip(members);
    let works = works.map(|((volume, committer), member)| {
        let committer: &mut Committer = committer;
        move || {
            let prepared = volume.prepare_instant(committer, member.request, member.holds);
            prepared.map(|prepared| (prepared, member.quiet))
        }
    });
    let prepared = run_together(works.collect());
    let (mut parts, mut failure) = (Vec::new(), None);
    for ((volume, committer), prepared) in volumes.iter().zip(committers).zip(prepared) {
        match prepared {
            Ok((prepared, quiet)) => {
                parts.push(Part { volume, committer, prepared, quiet, flip: None, header: None });
            }
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) => Err(give_up(&mut parts, error)),
        None => Ok(parts),
    }
}

/// The last round of draining, of all at once, with writes going on; then a last look whether it is
/// quiet where it has to be: nothing has been written down so far.
fn gather(parts: &mut [Part<'_>]) -> Result<()> {
    let begun = Clock::now();
    each_at_once(parts, |part| part.volume.drain_once(part.committer))?;
    if begun.elapsed() > GATHER_TIME {
        return Err(Error::PauseTimeout(format!(
            "making what was written durable took {} s, and first changes to {} volumes waited for \
             it; no snapshot was taken; try again when their disks have less to do",
            begun.elapsed().as_secs(),
            parts.len()
        )));
    }
    for part in parts.iter() {
        part.quiet.map_or(Ok(()), |wanted| part.volume.state.lock().check_quiet(wanted))?;
    }
    let limit = parts.iter().map(|part| part.prepared.pause_limit).min().unwrap_or_default();
    for part in parts {
        part.prepared.pause_limit = limit;
    }
    Ok(())
}

/// Every journal says what is about to happen.
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
    each_at_once(parts, |part| {
        let epoch = part.prepared.epoch;
        let entry = Entry::GroupBegun { epoch, group: group.clone() };
        part.committer.journal.append(&entry)?;
        part.committer.groups.insert(epoch, OpenGroup::new(group.clone()));
        // The journal says it of this number: no other instant gets it.
        part.committer.epoch_max = epoch;
        Ok(())
    })
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
            part.flip = Some(part.volume.switch(&part.prepared, next, in_flight, unix_ns()));
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
        // One instant has one time.
        let now = unix_ns();
        for ((part, next), (_, in_flight)) in parts.iter_mut().zip(next).zip(&closed) {
            part.flip = Some(part.volume.switch(&part.prepared, next, *in_flight, now));
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
    first.committer.journal.append(&entry)?;
    first.committer.groups.remove(&epoch);
    Ok(())
}

/// There was no instant: nothing was written that could be taken for a snapshot.
fn give_up(parts: &mut [Part<'_>], error: Error) -> Error {
    for part in parts {
        Volume::forget_instant(&mut part.committer);
        let epoch = part.prepared.epoch;
        if part.committer.groups.contains_key(&epoch) {
            part.committer.note_group_or_owe(epoch, false);
            part.volume.want_upkeep();
        }
    }
    error
}

/// There was an instant, and it is to be none. Members whose headers are durable have an epoch
/// without a snapshot from here on; the others go on with the epoch they had.
///
/// Unless nothing can have been decided, `is_certain`: a decision that failed may be durable all the
/// same, until the journal has wiped it out and says the contrary. Nobody may act on that before.
fn abort(parts: &mut [Part<'_>], is_certain: bool, error: Error) -> Error {
    let is_denied = parts[0].committer.note_group_or_owe(parts[0].prepared.epoch, false);
    let mut told = error;
    for (at, part) in parts.iter_mut().enumerate() {
        let epoch = part.prepared.epoch;
        if part.header.is_none() {
            told = part.volume.abort_instant(&mut part.committer, &part.prepared, told);
            continue;
        }
        // Never listed as one that exists.
        part.begin_epoch(FAILED);
        let is_noted = if at == 0 {
            is_denied
        } else {
            (is_denied || is_certain) && part.committer.note_group_or_owe(epoch, false)
        };
        if is_noted {
            part.volume.drop_denied(&mut part.committer, epoch);
        } else {
            // Nobody can say yet: what it selects is preserved until somebody can.
            part.volume.want_upkeep();
        }
    }
    told
}

/// What one thread has of a member.
struct Share<'a> {
    volume: &'a Volume,
    committer: &'a mut Committer,
    prepared: &'a Prepared,
    flip: &'a mut Option<Flip>,
    header: &'a mut Option<WrittenHeader>,
}

/// Do something with each member, all at once: their disks are different ones, and whoever is done
/// waits for the slowest. The first error, once all are done.
fn each_at_once(
    parts: &mut [Part<'_>],
    work: impl Fn(Share<'_>) -> Result<()> + Sync,
) -> Result<()> {
    let shares = parts.iter_mut().map(|part| Share {
        volume: part.volume,
        committer: &mut part.committer,
        prepared: &part.prepared,
        flip: &mut part.flip,
        header: &mut part.header,
    });
    let work = &work;
    let works: Vec<_> = shares.map(|share| move || work(share)).collect();
    run_together(works).into_iter().collect()
}

impl Part<'_> {
    fn begin_epoch(&mut self, undecided: &str) {
        let flip = self.flip.as_ref().expect("flipped");
        let header = self.header.take().expect("written");
        self.volume.begin_epoch(&mut self.committer, &self.prepared, flip, header, undecided);
    }

    fn end(&mut self, opened: Clock) -> Instant {
        let flip = self.flip.as_ref().expect("flipped");
        self.volume.end_instant(&mut self.committer, &self.prepared, flip, opened)
    }
}
