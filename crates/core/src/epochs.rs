//! The instants a volume knows, and the rule for which copies somebody still needs. Pure.

use crate::extent::ExtentSet;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A bookmark: tracks what its selection was, preserves nothing.
#[derive(Debug, Clone)]
pub struct Bookmark {
    /// What a backup of it held.
    pub baseline: Arc<ExtentSet>,
    /// Opaque bytes.
    pub meta: Vec<u8>,
}

/// One instant.
#[derive(Debug, Clone, Default)]
pub struct Epoch {
    /// Size of the origin then.
    pub origin_bytes: u64,
    /// For people.
    pub created_unix_ns: u64,
    /// What the snapshot selects; `None` once it is deleted.
    pub selection: Option<Arc<ExtentSet>>,
    /// What of it matters less, and is given up first.
    pub low: Arc<ExtentSet>,
    /// The bookmark, if there is one.
    pub bookmark: Option<Bookmark>,
    /// Opaque bytes of the snapshot.
    pub meta: Vec<u8>,
    /// Why the snapshot is in doubt; empty if it is not.
    pub suspect: String,
    /// Which records are gone that it may need; empty if none are.
    pub losses: String,
    /// Who accepted an earlier doubt, and when; empty if nobody had to.
    pub accepted: String,
    /// Why nothing of the snapshot can be read, its header being gone; empty if it is there.
    pub damage: String,
    /// Why it is not known whether the snapshot exists, one of a group; empty if it is.
    pub undecided: String,
    /// Views, restores and exports that hold it.
    pub pins: usize,
}

impl Epoch {
    /// True if anything still begins here.
    pub fn is_live(&self) -> bool {
        self.has_snapshot() || self.bookmark.is_some()
    }

    /// True if there is a snapshot, be it one whose header is gone.
    pub fn has_snapshot(&self) -> bool {
        self.selection.is_some() || !self.damage.is_empty()
    }

    /// The blocks whose changes are wanted since here.
    pub fn tracked(&self) -> impl Iterator<Item = &Arc<ExtentSet>> {
        self.selection.iter().chain(self.bookmark.iter().map(|b| &b.baseline))
    }
}

/// What each live snapshot selects, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Selections(pub BTreeMap<u32, Arc<ExtentSet>>);

impl Selections {
    /// True if a copy of `block` made in `epoch` is the one that some live snapshot reads, given
    /// that the copy before it was made in `previous` (0 if there was none).
    pub fn needs(&self, block: u64, epoch: u32, previous: u32) -> bool {
        self.0.range(previous + 1..=epoch).any(|(_, set)| set.contains(block))
    }
}

/// All instants that are live.
#[derive(Debug, Clone, Default)]
pub struct Epochs(pub BTreeMap<u32, Epoch>);

impl Epochs {
    /// Live snapshots with what they select, ascending.
    pub fn snapshots(&self) -> impl Iterator<Item = (u32, &Arc<ExtentSet>)> {
        self.0.iter().filter_map(|(&epoch, e)| Some((epoch, e.selection.as_ref()?)))
    }

    /// What each live snapshot selects.
    pub fn selections(&self) -> Selections {
        Selections(self.snapshots().map(|(epoch, set)| (epoch, Arc::clone(set))).collect())
    }

    /// Blocks that anything live tracks.
    pub fn tracked(&self) -> ExtentSet {
        let sets = self.0.values().flat_map(Epoch::tracked);
        let mut last: Option<&Arc<ExtentSet>> = None;
        let mut sum = ExtentSet::new();
        for set in sets {
            // Snapshots of one rule set share theirs.
            if last.is_some_and(|seen| Arc::ptr_eq(seen, set)) {
                continue;
            }
            sum = sum.union(set);
            last = Some(set);
        }
        sum
    }

    /// The first live instant.
    pub fn first(&self) -> Option<u32> {
        self.0.keys().next().copied()
    }

    /// Forget instants at which nothing begins any more.
    pub fn drop_dead(&mut self) {
        self.0.retain(|_, epoch| epoch.is_live());
    }
}
