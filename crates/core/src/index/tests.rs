//! Index files against a plain list of entries, and what happens to damaged ones.

use super::entry::{Entry, EpochSet};
use super::memory::{Memory, Record};
use super::parts::{Layer, Parts, Walk};
use super::run::{Run, RunWriter, Wait, run_name};
use super::{Content, Index};
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{Kind, Position};
use crate::storage::{Directory, FileDirectory};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

const UUID: [u8; 16] = [7; 16];
const BLOCKS: u64 = 3000;

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let length = prop_oneof![5 => Just(1_u64), 2 => 2_u64..40, 1 => 40_u64..2000];
    let one = (0..BLOCKS - 1, length, 1_u32..9, 0_u8..4, any::<u32>());
    prop::collection::vec(one, 0..400).prop_map(|list| {
        let mut entries: Vec<Entry> = Vec::new();
        for (start, length, epoch, kind, checksum) in list {
            let end = (start + length).min(BLOCKS);
            let kinds = [Kind::Preserve, Kind::PreserveZero, Kind::Lost, Kind::Changed];
            let kind = kinds[usize::from(kind)];
            let blocks = Extent::new(start, end);
            entries.push(if kind == Kind::Lost {
                Entry { checksum: checksum % 2, ..Entry::bare(kind, epoch, blocks) }
            } else if kind == Kind::Preserve {
                let position = Position::new(checksum % 77, checksum % 16_384);
                Entry { blocks: Extent::single(start), epoch, kind, position, checksum }
            } else {
                Entry::bare(kind, epoch, blocks)
            });
        }
        entries.sort_by_key(Entry::key);
        entries.dedup_by_key(|entry| entry.key());
        entries
    })
}

fn write(directory: &dyn Directory, number: u32, entries: &[Entry]) -> Run {
    let mut writer = RunWriter::create(directory, UUID, number).expect("created");
    for entry in entries {
        writer.push(entry).expect("written");
    }
    writer.finish((1..9).map(|epoch| (epoch, epoch)).collect()).expect("finished")
}

fn sorted(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.sort_by_key(|entry| (entry.key(), entry.blocks.end));
    entries
}

fn layer(run: Run) -> Layer {
    Layer { run: Arc::new(run), epochs: (1..9).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn an_index_file_gives_back_what_overlaps_and_nothing_else(
        entries in entries(),
        windows in prop::collection::vec((0..BLOCKS, 1_u64..300, 1_u32..9), 12),
    ) {
        let dir = tempfile::tempdir().expect("directory");
        let directory = FileDirectory::new(dir.path());
        write(&directory, 1, &entries);
        let run = Run::open(&directory, UUID, 1).expect("read").expect("complete");
        for (start, length, epoch) in windows {
            for blocks in [Extent::new(start, start + length), Extent::single(start)] {
                let mut found = Vec::new();
                let each = &mut |entry: &Entry| found.push(*entry);
                run.overlapping(blocks, epoch, Wait::Long, each).expect("read");
                // Older ones may come along; newer ones must.
                found.retain(|entry| entry.epoch >= epoch);
                let overlaps = |e: &&Entry| {
                    e.epoch >= epoch && !e.blocks.intersection(blocks).is_empty()
                };
                let expected: Vec<Entry> = entries.iter().filter(overlaps).copied().collect();
                prop_assert_eq!(sorted(found), sorted(expected));
            }
        }
        let parts = Parts::of_layers(vec![layer(run)]);
        let (mut walk, mut window, mut all) = (Walk::new(0, BLOCKS), Vec::new(), Vec::new());
        while parts.next_sorted(&mut walk, &mut window).expect("read") {
            all.extend_from_slice(&window);
        }
        prop_assert_eq!(&all, &entries, "in order, each once");
        let changed: ExtentSet =
            entries.iter().filter(|e| (3..6).contains(&e.epoch)).map(|e| e.blocks).collect();
        prop_assert_eq!(parts.changed(3, 6).expect("read"), changed);
    }

    #[test]
    fn a_damaged_index_file_is_refused_or_an_error_and_never_another_answer(
        entries in entries(),
        at in any::<prop::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let dir = tempfile::tempdir().expect("directory");
        let directory = FileDirectory::new(dir.path());
        write(&directory, 1, &entries);
        let path = dir.path().join(run_name(1));
        let mut bytes = std::fs::read(&path).expect("read");
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        std::fs::write(&path, &bytes).expect("written");
        let Some(run) = Run::open(&directory, UUID, 1).expect("read") else { return Ok(()) };
        let mut found = Vec::new();
        let all = Extent::new(0, BLOCKS);
        match run.overlapping(all, 0, Wait::Long, &mut |entry| found.push(*entry)) {
            // What is damaged was padding behind the last byte that says something.
            Ok(_) => prop_assert_eq!(sorted(found), sorted(entries)),
            Err(_) => prop_assert!(run.is_damaged()),
        }
    }
}

#[test]
fn an_index_file_that_was_not_finished_is_none() {
    let dir = tempfile::tempdir().expect("directory");
    let directory = FileDirectory::new(dir.path());
    let mut writer = RunWriter::create(&directory, UUID, 3).expect("created");
    for block in 0..100_000 {
        let zero = Entry::bare(Kind::PreserveZero, 1, Extent::single(2 * block));
        writer.push(&zero).expect("written");
    }
    drop(writer);
    assert!(Run::open(&directory, UUID, 3).expect("read").is_none());
}

#[test]
fn a_renamed_index_file_and_one_of_another_volume_are_none() {
    let dir = tempfile::tempdir().expect("directory");
    let directory = FileDirectory::new(dir.path());
    write(&directory, 1, &[]);
    assert!(Run::open(&directory, [8; 16], 1).expect("read").is_none());
    std::fs::rename(dir.path().join(run_name(1)), dir.path().join(run_name(2))).expect("renamed");
    assert!(Run::open(&directory, UUID, 2).expect("read").is_none());
}

#[test]
fn an_epoch_is_told_by_the_file_that_took_it_over_and_by_no_other() {
    let dir = tempfile::tempdir().expect("directory");
    let directory = FileDirectory::new(dir.path());
    let record = Record { block: 5, position: Position::new(1, 4), epoch: 2, checksum: 9 };
    let kept = Entry {
        blocks: Extent::single(5),
        epoch: 2,
        kind: Kind::Preserve,
        position: record.position,
        checksum: 9,
    };
    let mut index = Index::default();
    let mut memory = Memory::default();
    memory.insert(record);
    index.adopt(2, memory, false);
    let look = |index: &Index| {
        let mut found = Vec::new();
        let lookup = index.look_up(Extent::new(0, 10), 1);
        lookup.finish(Wait::Long, &mut found).expect("read");
        found
    };
    let before = look(&index);
    assert_eq!(before, [(5, Content::Preserved(record))]);
    let of_two: EpochSet = std::iter::once(2).collect();
    let first = Layer { run: Arc::new(write(&directory, 1, &[kept])), epochs: of_two.clone() };
    assert!(index.file(Some(&first), &BTreeSet::default()).is_empty());
    assert_eq!(look(&index), before, "from the file as from memory");
    let moved = Entry { position: Position::new(9, 9), ..kept };
    let second = Layer { run: Arc::new(write(&directory, 2, &[moved])), epochs: of_two };
    assert_eq!(index.file(Some(&second), &BTreeSet::default()), [1], "the first is of no use");
    assert_eq!(
        look(&index),
        [(5, Content::Preserved(Record { position: moved.position, ..record }))]
    );
    assert_eq!(index.forget_before(3), [2]);
    assert!(look(&index).is_empty());
}

#[test]
fn a_copy_that_was_given_up_is_lost_wherever_its_record_is() {
    let dir = tempfile::tempdir().expect("directory");
    let directory = FileDirectory::new(dir.path());
    let record = |block| Record { block, position: Position::new(1, 4), epoch: 2, checksum: 9 };
    let mut index = Index::default();
    index.adopt(2, Memory::from_records(vec![record(5), record(6)]), false);
    let all = Extent::new(0, 10);
    let look = |index: &Index| {
        let mut found = Vec::new();
        index.look_up(all, 1).finish(Wait::Long, &mut found).expect("read");
        found
    };
    index.give_up(&[(2, ExtentSet::from_extent(Extent::single(5)))]);
    let expected = [(5, Content::Lost), (6, Content::Preserved(record(6)))];
    assert_eq!(look(&index), expected);
    let memories = index.unfiled().into_iter().map(|(_, memory)| memory).collect();
    let (parts, mut entries) = (Parts::of_memories(memories), Vec::new());
    parts.next_sorted(&mut Walk::new(0, 10), &mut entries).expect("read");
    let layer = Layer { run: Arc::new(write(&directory, 1, &entries)), epochs: (2..3).collect() };
    index.file(Some(&layer), &BTreeSet::new());
    assert_eq!(look(&index), expected, "in an index file too");
    let lost = index.parts().lost_since(1, 10).expect("read");
    assert_eq!(lost, ExtentSet::from_extent(Extent::single(5)));
    let changed = index.parts().changed(1, 3).expect("read");
    assert_eq!(changed, ExtentSet::from_extent(Extent::new(5, 7)), "P5: it changed all the same");
}
