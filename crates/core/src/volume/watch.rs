//! Looking at the traffic of the live disk: is it quiet, and does this read come through here?
//!
//! Both serve whoever quiesces the users of a disk before an instant. Nothing is looked at unless
//! somebody asked for it.

use super::gate::Quiet;
use super::{State, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::number::to_u64;
use crate::sync::{Clock, Mutex};
use std::sync::atomic::{AtomicU64 as Count, Ordering};
use std::time::Duration;

/// Offsets that are remembered; whoever probes with reads makes far fewer.
const SEEN_MAX: usize = 256;

/// Somebody who is told that an instant has passed.
pub type Told<'a> = Box<dyn FnOnce() + Send + 'a>;

/// What an instant waits for and whom it tells.
#[derive(Default)]
pub struct Moment<'a> {
    /// Fail, with nothing taken, unless no watched write was admitted for so long when the gate
    /// closes. Needs [`Volume::watch_writes`].
    pub quiet: Option<Duration>,
    /// Which writers wait.
    pub holds: Quiet,
    /// Called once the gate is open again, before the snapshot is durable: whoever held still for
    /// the instant may go on. Not called if there was no instant.
    pub passed: Option<Told<'a>>,
}

/// Which writes are looked at, and when the last one came.
pub(super) struct WatchedWrites {
    /// None: all of them.
    blocks: Option<ExtentSet>,
    last: Clock,
}

/// Where reads of one length were made.
#[derive(Default)]
pub(super) struct WatchedReads {
    /// 0: nobody looks.
    length: Count,
    seen: Mutex<Vec<u64>>,
}

impl WatchedReads {
    /// Costs one load unless somebody looks for just this length.
    pub(super) fn note(&self, offset: u64, length: usize) {
        if self.length.load(Ordering::Relaxed) != to_u64(length) || length == 0 {
            return;
        }
        let mut seen = self.seen.lock();
        if seen.len() < SEEN_MAX {
            seen.push(offset);
        }
    }
}

impl State {
    /// A write to these blocks is admitted.
    pub(super) fn note_write(&mut self, blocks: Extent) {
        let Some(watched) = &mut self.watched_writes else { return };
        if watched.blocks.as_ref().is_none_or(|set| set.within(blocks).next().is_some()) {
            watched.last = Clock::now();
        }
    }

    /// How long no watched write came; nothing if nobody watches.
    fn quiet(&self) -> Option<Duration> {
        self.watched_writes.as_ref().map(|watched| watched.last.elapsed())
    }

    /// At the closing of the gate: was it quiet for so long?
    pub(super) fn check_quiet(&self, wanted: Duration) -> Result<()> {
        let quiet = self.quiet().ok_or_else(|| {
            Error::Usage("an instant that waits for quiet needs writes to be watched".into())
        })?;
        let is_whole = self.watched_writes.as_ref().is_some_and(|w| w.blocks.is_none());
        if quiet >= wanted && (!is_whole || self.in_flight.is_empty()) {
            return Ok(());
        }
        Err(Error::NotQuiet(format!(
            "the last write came {} ms before the instant, {} ms without one were asked for; no \
             snapshot was taken",
            quiet.as_millis(),
            wanted.as_millis()
        )))
    }
}

impl Volume {
    /// Look at writes, zeroes and discards of these blocks from now on; None: of the whole disk.
    pub fn watch_writes(&self, blocks: Option<ExtentSet>) {
        self.state.lock().watched_writes = Some(WatchedWrites { blocks, last: Clock::now() });
    }

    /// Look no more.
    pub fn unwatch_writes(&self) {
        self.state.lock().watched_writes = None;
    }

    /// How long none of the watched writes was admitted; nothing if nobody watches.
    pub fn quiet(&self) -> Option<Duration> {
        self.state.lock().quiet()
    }

    /// Remember where the live disk is read by requests of just this length; 0: look no more.
    pub fn watch_reads(&self, length: u64) {
        self.watched_reads.length.store(length, Ordering::Relaxed);
        self.watched_reads.seen.lock().clear();
    }

    /// The offsets of such reads so far, in the order they came.
    pub fn reads_seen(&self) -> Vec<u64> {
        self.watched_reads.seen.lock().clone()
    }
}
