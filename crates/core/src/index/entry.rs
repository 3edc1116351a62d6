//! One record as the index knows it, and sets of epochs. Pure.

use crate::extent::Extent;
use crate::log::format::{Kind, Position};

/// What is recorded of a run of blocks in one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which blocks; one if their content was kept.
    pub blocks: Extent,
    /// In which epoch they changed.
    pub epoch: u32,
    /// What is said of them; never one of [`Kind::Done`] and after.
    pub kind: Kind,
    /// Where the content lies, if it was kept.
    pub position: Position,
    /// Of the content, if it was kept; of a loss what the log has in its place.
    pub checksum: u32,
}

impl Entry {
    /// An entry without content of its own.
    pub const fn bare(kind: Kind, epoch: u32, blocks: Extent) -> Self {
        Self { blocks, epoch, kind, position: Position(0), checksum: 0 }
    }

    /// Lost content; `reason` is what the log has in the place of a checksum.
    pub const fn lost(epoch: u32, blocks: Extent, reason: u32) -> Self {
        Self { checksum: reason, ..Self::bare(Kind::Lost, epoch, blocks) }
    }

    /// The order of an index: by block, then epoch, then what is worth more.
    pub const fn key(&self) -> (u64, u32, u8) {
        (self.blocks.start, self.epoch, self.kind as u8)
    }

    /// The part inside `window`.
    #[must_use]
    pub fn clipped(&self, window: Extent) -> Self {
        Self { blocks: self.blocks.intersection(window), ..*self }
    }
}

/// A set of epochs, as inclusive ranges, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EpochSet(Vec<(u32, u32)>);

impl EpochSet {
    /// Add an epoch that is larger than all before.
    pub fn push(&mut self, epoch: u32) {
        match self.0.last_mut() {
            Some(last) if last.1 + 1 == epoch => last.1 = epoch,
            _ => self.0.push((epoch, epoch)),
        }
    }

    /// True if the epoch is in the set.
    pub fn contains(&self, epoch: u32) -> bool {
        let at = self.0.partition_point(|range| range.1 < epoch);
        self.0.get(at).is_some_and(|range| range.0 <= epoch)
    }

    /// True if it has no epoch.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The last epoch.
    pub fn last(&self) -> Option<u32> {
        self.0.last().map(|range| range.1)
    }

    /// Every epoch, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().flat_map(|range| range.0..=range.1)
    }

    /// Take out epochs.
    pub fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        let kept: Vec<u32> = self.iter().filter(|&epoch| keep(epoch)).collect();
        *self = kept.into_iter().collect();
    }
}

impl FromIterator<u32> for EpochSet {
    fn from_iter<I: IntoIterator<Item = u32>>(epochs: I) -> Self {
        let mut set = Self::default();
        for epoch in epochs {
            set.push(epoch);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_epochs_has_what_was_put_in_and_nothing_else() {
        let epochs = [1, 2, 3, 7, 9, 10];
        let mut set: EpochSet = epochs.into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), epochs);
        assert!((0..12).all(|epoch| set.contains(epoch) == epochs.contains(&epoch)));
        set.retain(|epoch| epoch != 2 && epoch < 9);
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 3, 7]);
        assert_eq!(set.last(), Some(7));
    }
}
