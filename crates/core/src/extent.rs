//! Half-open ranges of blocks, sets of them, and the only places where bytes are rounded to blocks.

/// A half-open range `[start, end)` of block indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First block.
    pub start: u64,
    /// One past the last block.
    pub end: u64,
}

impl Extent {
    /// The range `[start, end)`; `start <= end`.
    pub const fn new(start: u64, end: u64) -> Self {
        debug_assert!(start <= end);
        Self { start, end }
    }

    /// One block.
    pub const fn single(block: u64) -> Self {
        Self { start: block, end: block + 1 }
    }

    /// Number of blocks.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// True if it holds no block.
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// True if `block` lies inside.
    pub const fn contains(self, block: u64) -> bool {
        self.start <= block && block < self.end
    }

    /// The common part, empty if there is none.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// The same range in bytes: `(offset, length)`.
    pub const fn to_bytes(self, block_size: u64) -> (u64, u64) {
        (self.start * block_size, (self.end - self.start) * block_size)
    }

    /// The part of it in bytes that lies in a byte range: from and to.
    pub fn bytes_within(self, block_size: u64, offset: u64, length: u64) -> (u64, u64) {
        let (start, bytes) = self.to_bytes(block_size);
        (start.max(offset), (start + bytes).min(offset + length))
    }
}

/// The blocks that a byte range touches, even with one byte.
pub const fn round_out(offset_bytes: u64, length_bytes: u64, block_size: u64) -> Extent {
    if length_bytes == 0 {
        let at = offset_bytes / block_size;
        return Extent { start: at, end: at };
    }
    Extent {
        start: offset_bytes / block_size,
        end: (offset_bytes + length_bytes).div_ceil(block_size),
    }
}

/// The blocks that a byte range covers whole. The last block of a volume counts as covered when the
/// range reaches `size_bytes`, whatever the block would hold beyond.
pub fn round_in(offset_bytes: u64, length_bytes: u64, block_size: u64, size_bytes: u64) -> Extent {
    let end_bytes = offset_bytes + length_bytes;
    let start = offset_bytes.div_ceil(block_size);
    let end = if end_bytes >= size_bytes {
        size_bytes.div_ceil(block_size)
    } else {
        end_bytes / block_size
    };
    Extent { start, end: end.max(start) }
}

/// A set of blocks: sorted, disjoint, non-adjacent, non-empty extents.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExtentSet(Vec<Extent>);

impl ExtentSet {
    /// No block.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// One extent.
    pub fn from_extent(extent: Extent) -> Self {
        if extent.is_empty() { Self::new() } else { Self(vec![extent]) }
    }

    /// Any extents, in any order, overlapping or not.
    pub fn from_unsorted(mut extents: Vec<Extent>) -> Self {
        extents.retain(|e| !e.is_empty());
        extents.sort_unstable();
        let mut set = Self(Vec::with_capacity(extents.len()));
        for extent in extents {
            set.push_sorted(extent);
        }
        set.0.shrink_to_fit();
        set
    }

    /// Append an extent that starts at or after the start of the last one.
    pub fn push_sorted(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if extent.start <= last.end => {
                debug_assert!(last.start <= extent.start);
                last.end = last.end.max(extent.end);
            }
            _ => self.0.push(extent),
        }
    }

    /// The extents, ascending.
    pub fn as_slice(&self) -> &[Extent] {
        &self.0
    }

    /// The extents, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.0.iter().copied()
    }

    /// True if it holds no block.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of blocks.
    pub fn block_count(&self) -> u64 {
        self.0.iter().map(|e| e.len()).sum()
    }

    /// True if `block` is in the set. O(log extents).
    pub fn contains(&self, block: u64) -> bool {
        let at = self.0.partition_point(|e| e.end <= block);
        self.0.get(at).is_some_and(|e| e.start <= block)
    }

    /// The parts of `extent` that are in the set, ascending.
    pub fn within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let from = self.0.partition_point(|e| e.end <= extent.start);
        self.0[from..]
            .iter()
            .take_while(move |e| e.start < extent.end)
            .map(move |e| e.intersection(extent))
    }

    /// Blocks in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut out = Self(Vec::with_capacity(self.0.len() + other.0.len()));
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start <= y.start => a.next(),
                (_, Some(_)) => b.next(),
                (Some(_), None) => a.next(),
                (None, None) => break,
            };
            if let Some(extent) = next {
                out.push_sorted(*extent);
            }
        }
        out.0.shrink_to_fit();
        out
    }

    /// Blocks in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let (mut i, mut j) = (0, 0);
        while let (Some(&x), Some(&y)) = (self.0.get(i), other.0.get(j)) {
            out.push_sorted(x.intersection(y));
            if x.end <= y.end {
                i += 1;
            } else {
                j += 1;
            }
        }
        out
    }

    /// Blocks in this set and not in the other.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut j = 0;
        for &extent in &self.0 {
            let mut start = extent.start;
            while let Some(&hole) = other.0.get(j) {
                if hole.end <= start {
                    j += 1;
                    continue;
                }
                if hole.start >= extent.end {
                    break;
                }
                if hole.start > start {
                    out.push_sorted(Extent::new(start, hole.start));
                }
                start = start.max(hole.end);
                if hole.end > extent.end {
                    break;
                }
                j += 1;
            }
            if start < extent.end {
                out.push_sorted(Extent::new(start, extent.end));
            }
        }
        out
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        Self::from_unsorted(extents.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..200, 0u64..20), 0..20)
            .prop_map(|v| v.into_iter().map(|(s, n)| Extent::new(s, s + n)).collect())
    }

    fn model(extents: &[Extent]) -> BTreeSet<u64> {
        extents.iter().flat_map(|e| e.start..e.end).collect()
    }

    fn blocks(set: &ExtentSet) -> BTreeSet<u64> {
        for pair in set.as_slice().windows(2) {
            assert!(pair[0].end < pair[1].start, "sorted, disjoint, not adjacent");
        }
        model(set.as_slice())
    }

    proptest! {
        #[test]
        fn set_algebra_is_that_of_sets_of_blocks(
            a in extents(),
            b in extents(),
            probe in 0u64..230,
        ) {
            let (x, y) = (ExtentSet::from_unsorted(a.clone()), ExtentSet::from_unsorted(b.clone()));
            let (m, n) = (model(&a), model(&b));
            prop_assert_eq!(blocks(&x), m.clone());
            prop_assert_eq!(blocks(&x.union(&y)), m.union(&n).copied().collect());
            prop_assert_eq!(blocks(&x.intersection(&y)), m.intersection(&n).copied().collect());
            prop_assert_eq!(blocks(&x.difference(&y)), m.difference(&n).copied().collect());
            prop_assert_eq!(x.contains(probe), m.contains(&probe));
            prop_assert_eq!(x.block_count(), m.len() as u64);
            let window = Extent::new(probe, probe + 17);
            let inside: Vec<_> = x.within(window).collect();
            let expected = m.into_iter().filter(|&v| window.contains(v)).collect();
            prop_assert_eq!(model(&inside), expected);
        }

        #[test]
        fn rounding_out_covers_and_rounding_in_is_covered(
            offset in 0u64..10_000,
            length in 0u64..10_000,
        ) {
            let out = round_out(offset, length, 4096);
            let inner = round_in(offset, length, 4096, u64::MAX);
            if length > 0 {
                prop_assert!(out.start * 4096 <= offset && offset + length <= out.end * 4096);
                prop_assert!(out.len() <= length.div_ceil(4096) + 1);
            }
            if !inner.is_empty() {
                prop_assert!(offset <= inner.start * 4096 && inner.end * 4096 <= offset + length);
            }
        }
    }

    #[test]
    fn the_last_partial_block_counts_as_covered_when_the_range_reaches_the_end() {
        assert_eq!(round_in(0, 5000, 4096, 5000), Extent::new(0, 2));
        assert_eq!(round_in(0, 4999, 4096, 5000), Extent::new(0, 1));
    }
}
