//! A batch under construction: old contents are read straight into their place in it.

use super::format::{
    BATCH_BLOCKS_MAX, BATCH_HEADER_BYTES, BatchHeader, DESCRIPTOR_BYTES, Descriptor, Kind,
    LOST_AT_SOURCE, PAGE, payload_checksum,
};
use crate::extent::Extent;
use crate::number::{to_u64, to_usize};

/// Descriptors a batch holds: a preserved block each, as many runs of zero originals, and as many
/// of changes.
pub const DESCRIPTORS_MAX: usize = 3 * BATCH_BLOCKS_MAX;

/// The content a block had, as the index will know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preserved {
    /// Which block.
    pub block: u64,
    /// Page of its payload, counted from the start of the batch.
    pub page: u32,
    /// Checksum of the payload.
    pub checksum: u32,
}

/// Collects records; reused from batch to batch, so that its memory stays warm.
pub struct BatchBuilder {
    uuid: [u8; 16],
    block_size: u64,
    epoch: u32,
    bytes: Vec<u8>,
    head_pages: usize,
    payload_blocks: usize,
    descriptors: Vec<Descriptor>,
    preserved: Vec<Preserved>,
}

impl BatchBuilder {
    /// For batches of one volume.
    pub fn new(uuid: [u8; 16], block_size: u64) -> Self {
        Self {
            uuid,
            block_size,
            epoch: 0,
            bytes: Vec::new(),
            head_pages: 0,
            payload_blocks: 0,
            descriptors: Vec::new(),
            preserved: Vec::new(),
        }
    }

    /// Start over: a batch of `epoch` with room for `descriptors_max` descriptors.
    pub fn begin(&mut self, epoch: u32, descriptors_max: usize) {
        assert!(descriptors_max <= DESCRIPTORS_MAX, "a batch is bounded");
        let head_bytes = BATCH_HEADER_BYTES + descriptors_max * DESCRIPTOR_BYTES;
        self.epoch = epoch;
        self.head_pages = head_bytes.div_ceil(to_usize(PAGE));
        self.payload_blocks = 0;
        self.descriptors.clear();
        self.preserved.clear();
    }

    /// True if nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
    }

    fn payload_start(&self) -> usize {
        self.head_pages * to_usize(PAGE) + self.payload_blocks * to_usize(self.block_size)
    }

    /// Room for the old contents of `block_count` blocks; fill it, then call [`Self::keep`].
    pub fn room(&mut self, block_count: u64) -> &mut [u8] {
        let start = self.payload_start();
        let end = start + to_usize(block_count * self.block_size);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[start..end]
    }

    /// Record the contents that were put into [`Self::room`] as those of `blocks`; zeroes take no
    /// space.
    pub fn keep(&mut self, blocks: Extent) {
        let size = to_usize(self.block_size);
        let mut source = self.payload_start();
        for block in blocks.start..blocks.end {
            let content = &self.bytes[source..source + size];
            if is_zero(content) {
                self.note(Kind::PreserveZero, Extent::single(block));
            } else {
                let checksum = payload_checksum(block, self.epoch, content);
                let target = self.payload_start();
                if target != source {
                    self.bytes.copy_within(source..source + size, target);
                }
                let page = u32::try_from(target / to_usize(PAGE)).expect("a batch is bounded");
                self.preserved.push(Preserved { block, page, checksum });
                self.descriptors.push(Descriptor {
                    kind: Kind::Preserve,
                    blocks: Extent::single(block),
                    checksum,
                });
                self.payload_blocks += 1;
            }
            source += size;
        }
    }

    /// Record something that has no payload.
    pub fn note(&mut self, kind: Kind, blocks: Extent) {
        debug_assert!(kind != Kind::Preserve && !blocks.is_empty());
        let run_max = u64::from(u32::MAX);
        if let Some(last) = self.descriptors.last_mut() {
            let joined = Extent { start: last.blocks.start, end: blocks.end };
            if last.kind == kind
                && last.checksum == 0
                && last.blocks.end == blocks.start
                && joined.len() <= run_max
            {
                last.blocks = joined;
                return;
            }
        }
        let mut start = blocks.start;
        while start < blocks.end {
            let end = blocks.end.min(start + run_max);
            self.descriptors.push(Descriptor {
                kind,
                blocks: Extent::new(start, end),
                checksum: 0,
            });
            start = end;
        }
    }

    /// Record that the old content could not be read from the origin.
    pub fn note_lost_at_source(&mut self, blocks: Extent) {
        self.descriptors.push(Descriptor { kind: Kind::Lost, blocks, checksum: LOST_AT_SOURCE });
    }

    /// What was recorded, in order.
    pub fn descriptors(&self) -> &[Descriptor] {
        &self.descriptors
    }

    /// What was preserved with payload, in order; pages count from the start of the batch.
    pub fn preserved(&self) -> &[Preserved] {
        &self.preserved
    }

    /// The finished batch.
    pub fn finish(&mut self, sequence: u64) -> &[u8] {
        let page = to_usize(PAGE);
        let (head_bytes, payload_end) = (self.head_pages * page, self.payload_start());
        let total = payload_end + head_bytes;
        self.bytes.resize(total.max(self.bytes.len()), 0);
        let (front, tail) = self.bytes[..total].split_at_mut(payload_end);
        let head = &mut front[..head_bytes];
        head.fill(0);
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            let at = BATCH_HEADER_BYTES + index * DESCRIPTOR_BYTES;
            descriptor.encode(&mut head[at..at + DESCRIPTOR_BYTES]);
        }
        let described = BATCH_HEADER_BYTES + self.descriptors.len() * DESCRIPTOR_BYTES;
        let count = |pages: usize| u32::try_from(pages).expect("a batch is bounded");
        let header = BatchHeader {
            uuid: self.uuid,
            sequence,
            epoch: self.epoch,
            descriptor_count: count(self.descriptors.len()),
            head_pages: count(self.head_pages),
            payload_pages: count((payload_end - head_bytes) / page),
            descriptors_crc: crc32c::crc32c(&head[BATCH_HEADER_BYTES..described]),
        };
        tail.copy_from_slice(head);
        header.encode(false, head);
        header.encode(true, tail);
        &self.bytes[..total]
    }

    /// Bytes the finished batch has.
    pub fn total_bytes(&self) -> u64 {
        to_u64(self.payload_start() + self.head_pages * to_usize(PAGE))
    }
}

/// True if all bytes are zero.
pub fn is_zero(content: &[u8]) -> bool {
    let chunks = content.chunks_exact(32);
    let rest = chunks.remainder();
    // Whole chunks compare as words; most blocks are told apart by the first.
    chunks.into_iter().all(|chunk| chunk == [0; 32]) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_batch_costs_at_most_64_bytes_a_block_beyond_its_content() {
        let mut batch = BatchBuilder::new([7; 16], 4096);
        for blocks in [252_u64, 1020] {
            batch.begin(1, to_usize(blocks));
            batch.room(blocks).fill(1);
            batch.keep(Extent::new(0, blocks));
            let total = to_u64(batch.finish(1).len());
            assert!(total <= blocks * (4096 + 64), "{total} bytes for {blocks} blocks");
        }
    }

    #[test]
    fn head_and_tail_tell_the_same_and_zero_blocks_take_no_payload() {
        let mut batch = BatchBuilder::new([7; 16], 4096);
        batch.begin(3, 10);
        batch.room(4)[4096..8192].fill(9);
        batch.keep(Extent::new(20, 24));
        batch.note(Kind::Changed, Extent::new(100, 200));
        batch.note(Kind::Changed, Extent::new(200, 300));
        let bytes = batch.finish(77).to_vec();
        let head = BatchHeader::decode(false, &bytes).expect("head");
        assert_eq!(bytes.len(), to_usize(head.total_pages() * PAGE));
        let tail_at = to_usize((u64::from(head.head_pages) + u64::from(head.payload_pages)) * PAGE);
        let tail = BatchHeader::decode(true, &bytes[tail_at..]).expect("tail");
        assert_eq!(head, tail);
        let descriptors = head.descriptors(&bytes).expect("intact");
        assert_eq!(Some(&descriptors), tail.descriptors(&bytes[tail_at..]).as_ref());
        let told: Vec<_> = descriptors.iter().map(|d| (d.kind, d.blocks)).collect();
        let expected = vec![
            (Kind::PreserveZero, Extent::new(20, 21)),
            (Kind::Preserve, Extent::new(21, 22)),
            (Kind::PreserveZero, Extent::new(22, 24)),
            (Kind::Changed, Extent::new(100, 300)),
        ];
        assert_eq!(told, expected);
        let payload = &bytes[4096..8192];
        assert_eq!(descriptors[1].checksum, payload_checksum(21, 3, payload));
        assert_ne!(descriptors[1].checksum, payload_checksum(22, 3, payload));
    }
}
