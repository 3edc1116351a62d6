//! A clone as a server hands it out.

use super::view::CloneView;
use crate::export::{BlockSizes, Export, ExportError, StatusExtent, ZeroRequest};
use crate::exports::{ContextKind, Contexts, sizes_of};
use std::sync::Arc;

/// A clone.
pub struct CloneExport {
    clone: Arc<CloneView>,
    description: String,
    is_read_only: bool,
    /// Offered to clients.
    pub contexts: Contexts,
}

impl CloneExport {
    /// Hand out a clone.
    pub fn new(clone: Arc<CloneView>, description: String, is_read_only: bool) -> Self {
        Self { clone, description, is_read_only, contexts: Contexts::default() }
    }
}

impl Export for CloneExport {
    fn size_bytes(&self) -> u64 {
        self.clone.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        sizes_of(self.clone.volume())
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn try_read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool, ExportError> {
        self.clone.try_read(offset_bytes, buffer).map_err(|e| e.to_export())
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.clone.read(offset_bytes, buffer).map_err(|e| e.to_export())
    }

    fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        self.clone.write(offset_bytes, data, fua).map_err(|e| e.to_export())
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        how: ZeroRequest,
    ) -> Result<(), ExportError> {
        if how.fast_only && !how.may_punch {
            return Err(ExportError::NotSupported);
        }
        let zeroed = self.clone.write_zeroes(offset_bytes, length_bytes, how.may_punch, how.fua);
        zeroed.map_err(|e| e.to_export())
    }

    fn trim(&self, offset_bytes: u64, length_bytes: u64, fua: bool) -> Result<(), ExportError> {
        self.clone.trim(offset_bytes, length_bytes, fua).map_err(|e| e.to_export())
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.clone.flush().map_err(|e| e.to_export())
    }

    fn cache(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), ExportError> {
        self.clone.prefetch(offset_bytes, length_bytes);
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
        let status = match self.contexts.find(context) {
            Some(ContextKind::Selected) => {
                self.clone.selected(offset_bytes, length_bytes, extents_max)
            }
            _ => self.clone.allocation(offset_bytes, length_bytes, extents_max),
        };
        status.map_err(|e| e.to_export())
    }
}
