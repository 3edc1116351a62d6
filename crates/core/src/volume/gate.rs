//! Which writes are admitted, and which are on their way to the origin without a slot.

use crate::extent::{Extent, ExtentSet};
use std::sync::Arc;

/// Which writers wait for an instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quiet {
    /// All of them.
    #[default]
    Device,
    /// Those of blocks that the snapshot selects.
    Selected,
}

/// Which blocks a closed gate is about.
#[derive(Debug, Clone)]
pub(super) enum Guarded {
    All,
    Blocks(Arc<ExtentSet>),
}

impl Guarded {
    /// True if one of these blocks is among them.
    pub(super) fn touches(&self, blocks: Extent) -> bool {
        match self {
            Self::All => true,
            Self::Blocks(set) => set.within(blocks).next().is_some(),
        }
    }
}

/// Where writes are admitted, unless an instant or a growth holds them.
#[derive(Debug, Default)]
pub(super) struct Gate(Option<Guarded>);

impl Gate {
    /// No write of these blocks is admitted from here on.
    pub(super) fn close(&mut self, guarded: Guarded) {
        self.0 = Some(guarded);
    }

    pub(super) fn open(&mut self) {
        self.0 = None;
    }

    /// True if a write of these blocks has to wait.
    pub(super) fn holds(&self, blocks: Extent) -> bool {
        self.0.as_ref().is_some_and(|guarded| guarded.touches(blocks))
    }

    /// True if nobody waits for writes in flight, or for none of these.
    pub(super) fn is_drained(&self, in_flight: &InFlight) -> bool {
        self.0.as_ref().is_none_or(|guarded| in_flight.count(guarded) == 0)
    }

    /// True if somebody may be waiting for writes in flight.
    pub(super) fn is_closed(&self) -> bool {
        self.0.is_some()
    }
}

/// Straight writes that are not on the origin yet, in no order: as many as there are requests at one
/// time, some dozens.
#[derive(Debug, Default)]
pub(super) struct InFlight(Vec<Extent>);

impl InFlight {
    pub(super) fn begin(&mut self, blocks: Extent) {
        self.0.push(blocks);
    }

    /// One of these blocks has landed.
    pub(super) fn end(&mut self, blocks: Extent) {
        let at = self.0.iter().position(|&one| one == blocks);
        self.0.swap_remove(at.expect("a write that lands was begun"));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.0.iter().copied()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many of them touch one of these blocks.
    pub(super) fn count(&self, guarded: &Guarded) -> usize {
        self.0.iter().filter(|&&blocks| guarded.touches(blocks)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_guards_some_blocks_holds_and_waits_for_writes_of_those_only() {
        let set = ExtentSet::from_unsorted(vec![Extent::new(4, 8), Extent::new(20, 21)]);
        let guarded = Guarded::Blocks(Arc::new(set));
        let (mut gate, mut in_flight) = (Gate::default(), InFlight::default());
        assert!(!gate.holds(Extent::new(4, 5)));
        in_flight.begin(Extent::new(8, 20));
        in_flight.begin(Extent::new(0, 5));
        in_flight.begin(Extent::new(0, 5));
        gate.close(guarded.clone());
        assert!(gate.holds(Extent::new(7, 30)) && !gate.holds(Extent::new(8, 20)));
        assert_eq!(in_flight.count(&guarded), 2);
        in_flight.end(Extent::new(0, 5));
        assert!(!gate.is_drained(&in_flight), "its equal is still on its way");
        in_flight.end(Extent::new(0, 5));
        assert!(gate.is_drained(&in_flight) && !in_flight.is_empty());
        gate.close(Guarded::All);
        assert!(!gate.is_drained(&in_flight));
        gate.open();
        assert!(!gate.holds(Extent::new(4, 5)));
    }
}
