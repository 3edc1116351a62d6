//! A volume and a snapshot's view as a server hands them out.

use crate::error::Error;
use crate::export::{BlockSizes, Export, ExportError, StatusExtent, ZeroRequest};
use crate::extent::ExtentSet;
use crate::view::{View, status_of};
use crate::volume::{Volume, push_status};
use parking_lot::RwLock;
use std::sync::Arc;

/// Largest payload taken in one request: what clients send at most, and what the protocol says not
/// to refuse.
const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// What a metadata context beside `base:allocation` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContextKind {
    /// Flag 1 where the snapshot selects.
    Selected,
    /// Flag 1 where blocks changed since the instant of this epoch: to the view's own instant, or
    /// to now. Flag 2 where the view selects blocks that this epoch did not hold.
    Changed {
        /// Since when.
        since: u32,
    },
    /// Flag 1 where either of the two holds: what a copy of that instant lacks.
    Dirty {
        /// Since when.
        since: u32,
    },
}

/// Contexts by the names clients ask for; they come and go with snapshots.
#[derive(Default)]
pub struct Contexts(RwLock<Vec<(String, ContextKind)>>);

impl Contexts {
    /// Offer these from now on.
    pub fn set(&self, contexts: Vec<(String, ContextKind)>) {
        *self.0.write() = contexts;
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.read().iter().map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn find(&self, name: &str) -> Option<ContextKind> {
        let contexts = self.0.read();
        contexts.iter().find(|(known, _)| known == name).map(|(_, kind)| *kind)
    }
}

/// Two maps of the same range in one: flag 1 where the first says so, flag 2 where the second does;
/// as far as both go.
fn overlaid(
    first: &[StatusExtent],
    second: &[StatusExtent],
    extents_max: usize,
) -> Vec<StatusExtent> {
    let mut found = Vec::new();
    let (mut ones, mut twos) = (first.iter().peekable(), second.iter().peekable());
    while let (Some(one), Some(two)) = (ones.peek(), twos.peek()) {
        let (start, end) = (one.start.max(two.start), one.end.min(two.end));
        let (one_ends, two_ends) = (one.end == end, two.end == end);
        push_status(&mut found, start, end, one.flags | two.flags << 1);
        if found.len() > extents_max {
            break;
        }
        if one_ends {
            ones.next();
        }
        if two_ends {
            twos.next();
        }
    }
    found.truncate(extents_max);
    found
}

pub(crate) fn sizes_of(volume: &Volume) -> BlockSizes {
    let preferred = u32::try_from(volume.block_size()).unwrap_or(4096);
    BlockSizes { minimum: 1, preferred, maximum: PAYLOAD_BYTES_MAX }
}

fn refused(error: &Error) -> ExportError {
    error.to_export()
}

/// The live disk.
pub struct VolumeExport {
    volume: Arc<Volume>,
    description: String,
    is_read_only: bool,
    /// Offered to clients.
    pub contexts: Contexts,
}

impl VolumeExport {
    /// Hand out a volume.
    pub fn new(volume: Arc<Volume>, description: String, is_read_only: bool) -> Self {
        volume.set_holding(true);
        Self { volume, description, is_read_only, contexts: Contexts::default() }
    }
}

impl Export for VolumeExport {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        sizes_of(&self.volume)
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn try_read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool, ExportError> {
        self.volume.try_read(offset_bytes, buffer).map_err(|e| refused(&e))
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.volume.read(offset_bytes, buffer).map_err(|e| refused(&e))
    }

    fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        self.volume.write(offset_bytes, data, fua).map_err(|e| refused(&e))
    }

    fn may_hold(&self) -> bool {
        self.volume.may_hold()
    }

    fn end_holding(&self) {
        self.volume.set_holding(false);
    }

    fn try_write(&self, offset_bytes: u64, data: &[u8]) -> Result<bool, ExportError> {
        self.volume.try_write(offset_bytes, data).map_err(|e| refused(&e))
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        how: ZeroRequest,
    ) -> Result<(), ExportError> {
        if how.fast_only && !self.volume.is_zeroing_fast(offset_bytes, length_bytes) {
            return Err(ExportError::NotSupported);
        }
        let zeroed = self.volume.write_zeroes(offset_bytes, length_bytes, how.may_punch, how.fua);
        zeroed.map_err(|e| refused(&e))
    }

    fn trim(&self, offset_bytes: u64, length_bytes: u64, fua: bool) -> Result<(), ExportError> {
        self.volume.trim(offset_bytes, length_bytes, fua).map_err(|e| refused(&e))
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.volume.flush().map_err(|e| refused(&e))
    }

    fn cache(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), ExportError> {
        self.volume.prefetch(offset_bytes, length_bytes);
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        self.contexts.names()
    }

    fn block_status(
        &self,
        context: &str,
        offset_bytes: u64,
        length_bytes: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        match self.contexts.find(context) {
            None => self.volume.allocation(offset_bytes, length_bytes, extents_max),
            Some(ContextKind::Selected) => Err(Error::Usage("a live disk selects nothing".into())),
            Some(ContextKind::Changed { since } | ContextKind::Dirty { since }) => {
                self.volume.changed(since, None).map(|set| {
                    let block_size = self.volume.block_size();
                    status_of(&set, block_size, offset_bytes, length_bytes, extents_max)
                })
            }
        }
        .map_err(|e| refused(&e))
    }
}

/// A snapshot.
pub struct ViewExport {
    view: Arc<View>,
    description: String,
    /// Offered to clients.
    pub contexts: Contexts,
}

impl ViewExport {
    /// Hand out a view.
    pub fn new(view: Arc<View>, description: String) -> Self {
        Self { view, description, contexts: Contexts::default() }
    }

    /// What changed since an instant, and what the view selects that it did not hold.
    fn lacking(&self, since: u32) -> crate::error::Result<(ExtentSet, ExtentSet)> {
        let (volume, epoch) = (self.view.volume(), self.view.epoch());
        Ok((volume.changed(since, Some(epoch))?, volume.newly_selected(since, epoch)?))
    }

    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }
}

impl Export for ViewExport {
    fn size_bytes(&self) -> u64 {
        self.view.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn block_sizes(&self) -> BlockSizes {
        sizes_of(self.view.volume())
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn try_read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool, ExportError> {
        self.view.try_read(offset_bytes, buffer).map_err(|e| refused(&e))
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.view.read(offset_bytes, buffer).map_err(|e| refused(&e))
    }

    fn write(&self, _: u64, _: &[u8], _: bool) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroRequest) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    fn cache(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), ExportError> {
        self.view.volume().prefetch(offset_bytes, length_bytes);
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        self.contexts.names()
    }

    fn block_status(
        &self,
        context: &str,
        offset_bytes: u64,
        length_bytes: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let block_size = self.view.volume().block_size();
        // Each border of one of two maps may split an extent of the other.
        let limit = extents_max.saturating_add(1);
        match self.contexts.find(context) {
            None => self.view.allocation(offset_bytes, length_bytes, extents_max),
            Some(ContextKind::Selected) => {
                self.view.selected(offset_bytes, length_bytes, extents_max)
            }
            Some(ContextKind::Changed { since }) => self.lacking(since).map(|(changed, newly)| {
                let changed = status_of(&changed, block_size, offset_bytes, length_bytes, limit);
                let newly = status_of(&newly, block_size, offset_bytes, length_bytes, limit);
                overlaid(&changed, &newly, extents_max)
            }),
            Some(ContextKind::Dirty { since }) => self.lacking(since).map(|(changed, newly)| {
                let dirty = changed.union(&newly);
                status_of(&dirty, block_size, offset_bytes, length_bytes, extents_max)
            }),
        }
        .map_err(|e| refused(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(list: &[(u64, u64, u32)]) -> Vec<StatusExtent> {
        list.iter().map(|&(start, end, flags)| StatusExtent { start, end, flags }).collect()
    }

    #[test]
    fn two_maps_are_laid_over_one_another_as_far_as_both_go() {
        let first = extents(&[(0, 4, 0), (4, 12, 1), (12, 20, 0)]);
        let second = extents(&[(0, 8, 0), (8, 16, 1)]);
        let both = extents(&[(0, 4, 0), (4, 8, 1), (8, 12, 3), (12, 16, 2)]);
        assert_eq!(overlaid(&first, &second, 10), both);
        assert_eq!(overlaid(&first, &second, 2), both[..2]);
        assert_eq!(overlaid(&first, &[], 10), []);
    }
}
