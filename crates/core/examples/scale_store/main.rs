//! A store as it is after years of use, made without the years: many epochs, each a live snapshot of
//! the whole disk, with records scattered over it. `python -m bench scale` opens it and measures.
//!
//!     scale_store make DIRECTORY EPOCHS ZERO_BLOCKS PAYLOAD_BLOCKS   writes the log
//!     scale_store index DIRECTORY                                    opens it, index and all
//!     scale_store open DIRECTORY                                     opens it and tells what it took
//!     scale_store read DIRECTORY READS                               reads blocks of old snapshots

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use stillblock_core::error::{Error, Result};
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::log::batch::BatchBuilder;
use stillblock_core::log::format::{BATCH_BLOCKS_MAX, EpochHeader, Kind, PAGE};
use stillblock_core::log::writer::{LogEnd, LogWriter, Segments};
use stillblock_core::storage::FileDirectory;
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::open::{Cache, CreateRequest, OpenRequest, Recover, create, open};
use stillblock_core::volume::{Effort, StorePolicy, Volume};

const BLOCK: u64 = 4096;
const DISK_BYTES: u64 = 15 << 40;

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

fn make(directory: &Path, epochs: u64, zero_blocks: u64, payload_blocks: u64) -> Result<()> {
    let writing = || Error::store("making the store");
    std::fs::create_dir_all(directory).map_err(writing())?;
    let origin = directory.join("disk.img");
    std::fs::File::create(&origin).and_then(|f| f.set_len(DISK_BYTES)).map_err(writing())?;
    let store = directory.join("store");
    let request = CreateRequest {
        store: store.clone(),
        origin,
        block_size: BLOCK,
        meta: Vec::new(),
        policy: StorePolicy::default(),
    };
    let uuid = create(&request)?;
    let segments = Arc::new(Segments::new(Arc::new(FileDirectory::new(&store.join("log")))));
    let mut log = LogWriter::new(uuid, segments, LogEnd::default()).map_err(writing())?;
    let mut batch = BatchBuilder::new(uuid, BLOCK);
    let blocks = DISK_BYTES / BLOCK;
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    for epoch in 1..=u32::try_from(epochs).expect("few") {
        let header = EpochHeader {
            epoch,
            predecessor: epoch - 1,
            created_unix_ns: u64::from(epoch),
            origin_bytes: DISK_BYTES,
            selection: ExtentSet::from_extent(Extent::new(0, blocks)),
            restore: None,
            meta: Vec::new(),
            low: ExtentSet::new(),
        };
        log.commit_epoch(epoch, &header.encode(), 0).map_err(writing())?;
        let (zero, payload) = (zero_blocks / epochs, payload_blocks / epochs);
        let mut scattered: Vec<u64> = (0..zero + payload).map(|_| dice.below(blocks)).collect();
        scattered.sort_unstable();
        scattered.dedup();
        let every = (zero + payload).div_ceil(payload.max(1));
        for (group, part) in scattered.chunks(BATCH_BLOCKS_MAX).enumerate() {
            batch.begin(epoch, part.len());
            for (at, &block) in part.iter().enumerate() {
                let count = u64::try_from(group * BATCH_BLOCKS_MAX + at).expect("few");
                if payload > 0 && count % every == 0 {
                    batch.room(1).fill(u8::try_from(block % 255).expect("a byte") + 1);
                    batch.keep(Extent::single(block));
                } else {
                    batch.note(Kind::PreserveZero, Extent::single(block));
                }
            }
            log.grow(batch.total_bytes() / PAGE).map_err(writing())?;
            log.append(&mut batch).map_err(writing())?;
        }
    }
    Ok(())
}

fn opened(directory: &Path) -> Result<Arc<Volume>> {
    open(OpenRequest {
        store: directory.join("store"),
        origin: None,
        cache: Cache::WriteBack,
        direct: false,
        buffer_dir: None,
        buffer_bytes: 64 << 20,
        recover: Recover::Refuse,
        has_background: false,
        peers: Vec::new(),
    })
}

/// Bytes of memory the process took at most, as the kernel counts.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

fn measure(directory: &Path) -> Result<()> {
    let started = Instant::now();
    let volume = opened(directory)?;
    let seconds = started.elapsed().as_secs_f64();
    let count = volume.gauges().into_iter().find(|(name, _)| *name == "index_entries");
    let entries = count.map_or(0, |(_, count)| count);
    let peak = peak_bytes();
    println!("{{\"open_s\": {seconds:.3}, \"peak_bytes\": {peak}, \"entries\": {entries}}}");
    volume.close()
}

fn read(directory: &Path, reads: u64) -> Result<()> {
    let volume = opened(directory)?;
    let mut dice = Dice(0xD1B5_4A32_D192_ED03);
    let mut content = vec![0; 4096];
    let mut nanoseconds: Vec<u128> = Vec::new();
    let newest = u64::from(volume.current_epoch());
    for _ in 0..reads {
        let epoch = u32::try_from(1 + dice.below(newest)).expect("an epoch");
        let view = View::open(&volume, epoch, ExcludedReads::Error)?;
        let at = dice.below(DISK_BYTES / BLOCK) * BLOCK;
        let started = Instant::now();
        view.read(at, &mut content)?;
        nanoseconds.push(started.elapsed().as_nanos());
    }
    nanoseconds.sort_unstable();
    let at = |percent: usize| {
        nanoseconds.get(nanoseconds.len() * percent / 100).copied().unwrap_or(0) / 1000
    };
    println!("{{\"read_p50_us\": {}, \"read_p99_us\": {}}}", at(50), at(99));
    volume.close()
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<u64>().ok());
    let directory = arguments.get(1).map(PathBuf::from).unwrap_or_default();
    let done = match (arguments.first().map(String::as_str), number(2), number(3), number(4)) {
        (Some("make"), Some(epochs), Some(zero), Some(payload)) if epochs > 0 => {
            make(&directory, epochs, zero, payload)
        }
        (Some("index"), ..) => {
            opened(&directory).and_then(|v| v.maintain(Effort::All).and_then(|()| v.close()))
        }
        (Some("open"), ..) => measure(&directory),
        (Some("read"), Some(reads), ..) => read(&directory, reads),
        _ => {
            eprintln!("usage: scale_store make|index|open|read DIRECTORY [NUMBERS]");
            return std::process::ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
