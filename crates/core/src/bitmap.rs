//! One bit a block, by uniform regions: a region whose bits are all equal costs no words.

use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Blocks a region spans: its words then fill one page of 4 KiB.
pub(crate) const REGION_BLOCKS: u64 = 32_768;
const WORDS: usize = 512;

#[derive(Clone)]
enum Region {
    Zeros,
    Ones,
    /// Shared until one side changes: a copy of a bitmap costs no words.
    Mixed(Arc<Mixed>),
}

#[derive(Clone)]
struct Mixed {
    words: [u64; WORDS],
    ones: u64,
}

/// A bit for each of a fixed number of blocks.
#[derive(Clone)]
pub struct Bitmap {
    regions: Vec<Region>,
    block_count: u64,
}

/// Bits `[from, to)` of a word, `0 <= from < to <= 64`.
const fn mask(from: u64, to: u64) -> u64 {
    let high = if to == 64 { u64::MAX } else { (1 << to) - 1 };
    high & !((1 << from) - 1)
}

impl Mixed {
    fn uniform(value: bool) -> Arc<Self> {
        let (word, ones) = if value { (u64::MAX, REGION_BLOCKS) } else { (0, 0) };
        Arc::new(Self { words: [word; WORDS], ones })
    }

    fn assign(&mut self, start: u64, end: u64, value: bool) {
        let mut at = start;
        while at < end {
            let word = &mut self.words[to_usize(at / 64)];
            let upto = end.min((at / 64 + 1) * 64);
            let bits = mask(at % 64, at % 64 + (upto - at));
            let before = u64::from((*word & bits).count_ones());
            if value {
                *word |= bits;
                self.ones += upto - at - before;
            } else {
                *word &= !bits;
                self.ones -= before;
            }
            at = upto;
        }
    }

    /// The end of the run of `value` that starts at `start`, at most `end`.
    fn run_end(&self, start: u64, end: u64, value: bool) -> u64 {
        let mut at = start;
        while at < end {
            let word = self.words[to_usize(at / 64)];
            let differing = (if value { !word } else { word }) >> (at % 64);
            if differing != 0 {
                return end.min(at + u64::from(differing.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }
}

impl Bitmap {
    /// All zero.
    pub fn new(block_count: u64) -> Self {
        let regions = to_usize(block_count.div_ceil(REGION_BLOCKS));
        Self { regions: vec![Region::Zeros; regions], block_count }
    }

    /// One for each block of the set that is inside.
    pub fn from_set(block_count: u64, set: &ExtentSet) -> Self {
        let mut bitmap = Self::new(block_count);
        bitmap.set_all(set);
        bitmap
    }

    /// Blocks it has room for.
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    /// More blocks, all zero.
    pub fn grow(&mut self, block_count: u64) {
        assert!(block_count >= self.block_count, "a bitmap never shrinks");
        self.regions.resize(to_usize(block_count.div_ceil(REGION_BLOCKS)), Region::Zeros);
        let (old, region_end) =
            (self.block_count, self.block_count.next_multiple_of(REGION_BLOCKS));
        self.block_count = block_count;
        // A uniform last region said nothing about the blocks that did not exist.
        self.assign(Extent::new(old, region_end.min(block_count)), false);
    }

    /// The bit of one block.
    pub fn get(&self, block: u64) -> bool {
        match &self.regions[to_usize(block / REGION_BLOCKS)] {
            Region::Zeros => false,
            Region::Ones => true,
            Region::Mixed(m) => {
                let at = block % REGION_BLOCKS;
                m.words[to_usize(at / 64)] >> (at % 64) & 1 == 1
            }
        }
    }

    /// Give every block of the extent the value.
    pub fn assign(&mut self, extent: Extent, value: bool) {
        assert!(extent.end <= self.block_count, "block outside the bitmap");
        let mut at = extent.start;
        while at < extent.end {
            let index = at / REGION_BLOCKS;
            let base = index * REGION_BLOCKS;
            let upto = extent.end.min(base + REGION_BLOCKS);
            // Up to the end of the last, partial region counts as the whole of it.
            let whole = at == base && (upto == base + REGION_BLOCKS || upto == self.block_count);
            let region = &mut self.regions[to_usize(index)];
            if whole {
                *region = if value { Region::Ones } else { Region::Zeros };
            } else {
                Self::assign_part(region, at - base, upto - base, value);
            }
            at = upto;
        }
    }

    fn assign_part(region: &mut Region, start: u64, end: u64, value: bool) {
        match region {
            Region::Zeros if !value => return,
            Region::Ones if value => return,
            Region::Zeros => *region = Region::Mixed(Mixed::uniform(false)),
            Region::Ones => *region = Region::Mixed(Mixed::uniform(true)),
            Region::Mixed(_) => {}
        }
        if let Region::Mixed(mixed) = region {
            let mixed = Arc::make_mut(mixed);
            mixed.assign(start, end, value);
            if mixed.ones == 0 {
                *region = Region::Zeros;
            } else if mixed.ones == REGION_BLOCKS {
                *region = Region::Ones;
            }
        }
    }

    /// Set every block of the set; what lies outside is ignored.
    pub fn set_all(&mut self, set: &ExtentSet) {
        for extent in set.within(Extent::new(0, self.block_count)) {
            self.assign(extent, true);
        }
    }

    /// Clear every block of the set; what lies outside is ignored.
    pub fn clear_all(&mut self, set: &ExtentSet) {
        for extent in set.within(Extent::new(0, self.block_count)) {
            self.assign(extent, false);
        }
    }

    /// Set every block that is set in `other`, which has as many blocks. O(regions) where one side
    /// is uniform.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.block_count, other.block_count, "bitmaps of one disk");
        for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
            match (&mut *mine, theirs) {
                (Region::Ones, _) | (_, Region::Zeros) => {}
                (Region::Zeros, _) | (_, Region::Ones) => *mine = theirs.clone(),
                (Region::Mixed(a), Region::Mixed(b)) => {
                    let a = Arc::make_mut(a);
                    a.ones = 0;
                    for (word, more) in a.words.iter_mut().zip(&b.words) {
                        *word |= more;
                        a.ones += u64::from(word.count_ones());
                    }
                    if a.ones == REGION_BLOCKS {
                        *mine = Region::Ones;
                    }
                }
            }
        }
    }

    /// Clear every block that is not set in `other`, which has as many blocks. O(regions) where one
    /// side is uniform.
    pub fn keep_only(&mut self, other: &Self) {
        assert_eq!(self.block_count, other.block_count, "bitmaps of one disk");
        for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
            match (&mut *mine, theirs) {
                (Region::Zeros, _) | (_, Region::Ones) => {}
                (Region::Ones, _) | (_, Region::Zeros) => *mine = theirs.clone(),
                (Region::Mixed(a), Region::Mixed(b)) => {
                    let a = Arc::make_mut(a);
                    a.ones = 0;
                    for (word, kept) in a.words.iter_mut().zip(&b.words) {
                        *word &= kept;
                        a.ones += u64::from(word.count_ones());
                    }
                    if a.ones == 0 {
                        *mine = Region::Zeros;
                    }
                }
            }
        }
    }

    /// The value at `start` and where the run of it ends, at most at `end`.
    pub fn run(&self, start: u64, end: u64) -> (bool, u64) {
        let value = self.get(start);
        let mut at = start;
        while at < end {
            let index = at / REGION_BLOCKS;
            let base = index * REGION_BLOCKS;
            let upto = end.min(base + REGION_BLOCKS);
            match &self.regions[to_usize(index)] {
                Region::Zeros if !value => {}
                Region::Ones if value => {}
                Region::Zeros | Region::Ones => return (value, at),
                Region::Mixed(m) => {
                    let run_end = base + m.run_end(at - base, upto - base, value);
                    if run_end < upto {
                        return (value, run_end);
                    }
                }
            }
            at = upto;
        }
        (value, end)
    }

    /// True if any block of the extent is set.
    pub fn any(&self, extent: Extent) -> bool {
        if extent.is_empty() {
            return false;
        }
        let (value, end) = self.run(extent.start, extent.end);
        value || end < extent.end
    }

    /// The parts of `extent` that are set, ascending.
    pub fn set_within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut at = extent.start;
        std::iter::from_fn(move || {
            while at < extent.end {
                let (value, end) = self.run(at, extent.end);
                let found = Extent::new(at, end);
                at = end;
                if value {
                    return Some(found);
                }
            }
            None
        })
    }

    /// All set blocks.
    pub fn to_set(&self) -> ExtentSet {
        let mut set = ExtentSet::new();
        for extent in self.set_within(Extent::new(0, self.block_count)) {
            set.push_sorted(extent);
        }
        set
    }

    /// Number of set blocks.
    pub fn count(&self) -> u64 {
        self.set_within(Extent::new(0, self.block_count)).map(Extent::len).sum()
    }

    /// Bytes of memory its words take.
    pub fn memory_bytes(&self) -> u64 {
        let mixed = self.regions.iter().filter(|r| matches!(r, Region::Mixed(_))).count();
        to_u64(mixed * size_of::<Mixed>() + self.regions.len() * size_of::<Region>())
    }
}

/// One bit a block for sets that are mostly empty or come in large pieces: whole leaves of 512
/// blocks are kept as ranges, others as words, and only where something is set.
#[derive(Clone, Default)]
pub struct SparseBitmap {
    leaves: BTreeMap<u64, Box<[u64; 8]>>,
    /// Start to end of runs of full leaves, in leaves; disjoint, not adjacent.
    full: BTreeMap<u64, u64>,
}

const LEAF_BLOCKS: u64 = 512;

impl SparseBitmap {
    /// Those of a set.
    pub fn from_set(set: &ExtentSet) -> Self {
        let mut bitmap = Self::default();
        set.iter().for_each(|extent| bitmap.insert(extent));
        bitmap
    }

    /// Set every block of the extent.
    pub fn insert(&mut self, extent: Extent) {
        let full = Extent {
            start: extent.start.div_ceil(LEAF_BLOCKS),
            end: (extent.end / LEAF_BLOCKS).max(extent.start.div_ceil(LEAF_BLOCKS)),
        };
        if full.is_empty() {
            return self.insert_words(extent);
        }
        self.insert_full(full);
        self.insert_words(Extent::new(extent.start, full.start * LEAF_BLOCKS));
        self.insert_words(Extent::new(full.end * LEAF_BLOCKS, extent.end));
    }

    fn insert_words(&mut self, extent: Extent) {
        let mut at = extent.start;
        while at < extent.end {
            let leaf = self.leaves.entry(at / LEAF_BLOCKS).or_default();
            let upto = extent.end.min((at / 64 + 1) * 64);
            leaf[to_usize(at % LEAF_BLOCKS / 64)] |= mask(at % 64, at % 64 + (upto - at));
            at = upto;
        }
    }

    fn insert_full(&mut self, leaves: Extent) {
        let mut joined = leaves;
        while let Some((&start, &end)) = self.full.range(..=joined.end).next_back() {
            if end < joined.start {
                break;
            }
            self.full.remove(&start);
            joined = Extent::new(joined.start.min(start), joined.end.max(end));
        }
        self.full.insert(joined.start, joined.end);
        let covered: Vec<u64> =
            self.leaves.range(leaves.start..leaves.end).map(|(&leaf, _)| leaf).collect();
        for leaf in covered {
            self.leaves.remove(&leaf);
        }
    }

    /// Pieces it is kept in.
    pub fn leaf_count(&self) -> usize {
        self.leaves.len() + self.full.len()
    }

    /// True if no block is set.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty() && self.full.is_empty()
    }

    /// True if the block is set.
    pub fn contains(&self, block: u64) -> bool {
        self.within(Extent::single(block)).next().is_some()
    }

    /// The parts of `extent` that are set, in no particular order.
    pub fn within(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let leaves = extent.start / LEAF_BLOCKS..extent.end.div_ceil(LEAF_BLOCKS);
        let before = self.full.range(..=leaves.start).next_back();
        let full = before
            .into_iter()
            .chain(self.full.range(leaves.start + 1..leaves.end.max(leaves.start + 1)));
        let full = full.map(|(&start, &end)| Extent::new(start * LEAF_BLOCKS, end * LEAF_BLOCKS));
        let words = self.leaves.range(leaves).flat_map(|(&index, leaf)| {
            leaf.iter().enumerate().flat_map(move |(word_index, &word)| {
                let base = index * LEAF_BLOCKS + to_u64(word_index) * 64;
                let mut rest = word;
                std::iter::from_fn(move || {
                    if rest == 0 {
                        return None;
                    }
                    let start = u64::from(rest.trailing_zeros());
                    let length = u64::from((rest >> start).trailing_ones());
                    rest &= !mask(start, start + length);
                    Some(Extent::new(base + start, base + start + length))
                })
            })
        });
        full.chain(words).map(move |e| e.intersection(extent)).filter(|e| !e.is_empty())
    }

    /// The set blocks.
    pub fn to_set(&self) -> ExtentSet {
        self.within(Extent::new(0, u64::MAX / 2)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 3 * REGION_BLOCKS + 1000;

    fn extent() -> impl Strategy<Value = Extent> {
        prop_oneof![
            (0..BLOCKS, 1u64..200).prop_map(|(s, n)| Extent::new(s, (s + n).min(BLOCKS))),
            (0..BLOCKS, 0..BLOCKS).prop_map(|(a, b)| Extent::new(a.min(b), a.max(b))),
            (0u64..4).prop_map(|r| Extent::new(
                r * REGION_BLOCKS,
                ((r + 1) * REGION_BLOCKS).min(BLOCKS)
            )),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_bitmap_is_a_set_of_blocks(
            steps in prop::collection::vec((extent(), any::<bool>()), 1..20),
            probes in prop::collection::vec(0..BLOCKS, 20),
        ) {
            let (mut bitmap, mut model) = (Bitmap::new(BLOCKS), ExtentSet::new());
            let mut sparse = SparseBitmap::default();
            let mut inserted = ExtentSet::new();
            for (extent, value) in steps {
                bitmap.assign(extent, value);
                let one = ExtentSet::from_extent(extent);
                model = if value { model.union(&one) } else { model.difference(&one) };
                if value {
                    sparse.insert(extent);
                    inserted = inserted.union(&one);
                }
            }
            prop_assert_eq!(&bitmap.to_set(), &model);
            prop_assert_eq!(bitmap.count(), model.block_count());
            prop_assert_eq!(&sparse.to_set(), &inserted);
            for probe in probes {
                prop_assert_eq!(bitmap.get(probe), model.contains(probe));
                prop_assert_eq!(sparse.contains(probe), inserted.contains(probe));
                let (value, end) = bitmap.run(probe, BLOCKS);
                prop_assert_eq!(value, model.contains(probe));
                prop_assert!((probe..end).all(|b| model.contains(b) == value));
                prop_assert!(end == BLOCKS || model.contains(end) != value);
            }
            let mut merged = Bitmap::from_set(BLOCKS, &inserted);
            merged.merge(&bitmap);
            prop_assert_eq!(merged.to_set(), inserted.union(&model));
            let mut kept = Bitmap::from_set(BLOCKS, &inserted);
            kept.keep_only(&bitmap);
            prop_assert_eq!(kept.count(), model.intersection(&inserted).block_count());
            prop_assert_eq!(kept.to_set(), inserted.intersection(&model));
            let mut cleared = bitmap.clone();
            cleared.clear_all(&model);
            prop_assert_eq!(cleared.count(), 0);
            prop_assert_eq!(Bitmap::from_set(BLOCKS, &model).to_set(), model);
        }
    }

    #[test]
    fn uniform_regions_cost_no_words() {
        let mut bitmap = Bitmap::new(1 << 28);
        bitmap.assign(Extent::new(0, 1 << 28), true);
        assert!(bitmap.memory_bytes() < 256 * 1024);
    }
}
