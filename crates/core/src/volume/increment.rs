//! What an increment from one instant to another must hold beside what changed: the blocks that the
//! later one selects and the earlier one did not hold.

use super::Volume;
use crate::epochs::Epoch;
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use std::sync::Arc;

/// What a copy of the instant holds at least: a snapshot may have been narrowed since it was
/// bookmarked, never widened.
fn held(epoch: &Epoch) -> Option<&Arc<ExtentSet>> {
    epoch.selection.as_ref().or_else(|| epoch.bookmark.as_ref().map(|b| &b.baseline))
}

impl Volume {
    /// The blocks that `until` selects and `since` did not hold. Whoever has a copy of `since` only
    /// needs them whole, changed or not: nobody tracked them.
    pub fn newly_selected(&self, since: u32, until: u32) -> Result<ExtentSet> {
        let epochs = self.epochs.read();
        let find = |epoch: u32| {
            let found = epochs.0.get(&epoch).and_then(held);
            found.ok_or_else(|| {
                Error::NotFound(format!("epoch {epoch} has no snapshot or bookmark"))
            })
        };
        let (from, to) = (find(since)?, find(until)?);
        Ok(if Arc::ptr_eq(from, to) { ExtentSet::new() } else { to.difference(from) })
    }
}
