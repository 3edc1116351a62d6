//! A disk in memory: the smallest complete [`Export`].

use parking_lot::RwLock;
use stillblock_core::export::{
    BlockSizes, Export, ExportError, STATE_HOLE, STATE_ZERO, StatusExtent, ZeroRequest,
};

const BLOCK_BYTES: u64 = 4096;

/// Bytes, and whether they may change.
pub struct MemoryDisk {
    bytes: RwLock<Vec<u8>>,
    is_read_only: bool,
}

impl MemoryDisk {
    /// A disk with this content.
    pub fn new(bytes: Vec<u8>, is_read_only: bool) -> Self {
        Self { bytes: RwLock::new(bytes), is_read_only }
    }
}

fn index(offset_bytes: u64) -> usize {
    usize::try_from(offset_bytes).expect("the disk fits in memory")
}

impl Export for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.read().len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }

    fn description(&self) -> String {
        "a disk in memory".to_owned()
    }

    fn try_read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool, ExportError> {
        self.read(offset_bytes, buffer).map(|()| true)
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        let start = index(offset_bytes);
        buffer.copy_from_slice(&self.bytes.read()[start..start + buffer.len()]);
        Ok(())
    }

    fn write(&self, offset_bytes: u64, data: &[u8], _fua: bool) -> Result<(), ExportError> {
        let start = index(offset_bytes);
        self.bytes.write()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        _how: ZeroRequest,
    ) -> Result<(), ExportError> {
        self.bytes.write()[index(offset_bytes)..index(offset_bytes + length_bytes)].fill(0);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.write_zeroes(offset, length, ZeroRequest { fua, ..ZeroRequest::default() })
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    fn cache(&self, _offset_bytes: u64, _length_bytes: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    fn block_status(
        &self,
        _context: &str,
        offset_bytes: u64,
        length_bytes: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let bytes = self.bytes.read();
        let mut extents: Vec<StatusExtent> = Vec::new();
        let (mut start, stop) = (offset_bytes, offset_bytes + length_bytes);
        while start < stop {
            let end = ((start / BLOCK_BYTES + 1) * BLOCK_BYTES).min(stop);
            let is_zero = bytes[index(start)..index(end)].iter().all(|byte| *byte == 0);
            let flags = if is_zero { STATE_HOLE | STATE_ZERO } else { 0 };
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.end = end,
                _ if count == extents_max => break,
                _ => extents.push(StatusExtent { start, end, flags }),
            }
            start = end;
        }
        Ok(extents)
    }
}
