//! `Volume` and `View`.

use crate::clones::{Clone, CloneEntry};
use crate::error::{detached, from_core, raise};
use crate::values::{
    Epoch, Inspection, Instant, Ranges, RestoreStatus, Statistics, StoreUsage, overlaid, to_blocks,
    to_ranges,
};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use stillblock_core::journal::Settled;
use stillblock_core::log::verify::Severity;
use stillblock_core::number::to_usize;
use stillblock_core::view::{ExcludedReads, View as CoreView};
use stillblock_core::volume as core;
use stillblock_core::volume::open::{self, Cache, CreateRequest, OpenRequest, Recover};
use stillblock_core::volume::{OnFull, Quiet, StorePolicy};

/// One read into a Python object; larger ones are the caller's loop.
const READ_BYTES_MAX: u64 = 1 << 30;
/// What happens to first changes when the store is full.
const ON_FULL: [(&str, OnFull); 3] =
    [("degrade", OnFull::Degrade), ("hold", OnFull::Hold), ("fail", OnFull::Fail)];
/// Which writers wait for an instant.
const HOLDS: [(&str, Quiet); 2] = [("device", Quiet::Device), ("selected", Quiet::Selected)];
/// What reading a block gives that a snapshot does not select.
const EXCLUDED_READS: [(&str, ExcludedReads); 2] =
    [("zeros", ExcludedReads::Zeros), ("error", ExcludedReads::Error)];

fn hex(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

/// One of a few words.
fn choose<T: Copy>(what: &str, word: &str, choices: &[(&str, T)]) -> PyResult<T> {
    let found = choices.iter().find(|(name, _)| *name == word).map(|(_, value)| *value);
    found.ok_or_else(|| raise("usage", format!("{what} cannot be {word:?}")))
}

/// Read into a new bytes object without a copy in between.
pub fn read_bytes(
    py: Python<'_>,
    length: u64,
    read: impl FnOnce(&mut [u8]) -> Result<(), stillblock_core::error::Error> + Send,
) -> PyResult<Bound<'_, PyBytes>> {
    if length > READ_BYTES_MAX {
        let message = format!("{length} bytes are more than one read takes ({READ_BYTES_MAX})");
        return Err(raise("usage", message));
    }
    PyBytes::new_with(py, to_usize(length), |buffer| py.detach(|| read(buffer)).map_err(from_core))
}

/// Volume, selection, low, meta, milliseconds of pause at most, of quiet at least, who waits.
type GroupMember = (Py<Volume>, Ranges, Ranges, Vec<u8>, u64, Option<u64>, String);

#[pyclass(frozen)]
pub struct Volume(pub Arc<core::Volume>);

impl Drop for Volume {
    fn drop(&mut self) {
        // A volume nobody closed is left as a kill would leave it; the next opening recovers. Views
        // keep the engine itself alive.
        self.0.abandon();
    }
}

impl Volume {
    fn blocks(&self, ranges: &[(u64, u64)]) -> PyResult<stillblock_core::extent::ExtentSet> {
        to_blocks(ranges, self.0.block_size(), self.0.size_bytes())
    }
}

#[pymethods]
impl Volume {
    #[staticmethod]
    #[pyo3(signature = (*, store, origin, block_size, meta, on_full="degrade", limit_bytes=0))]
    fn create(
        py: Python<'_>,
        store: PathBuf,
        origin: PathBuf,
        block_size: u64,
        meta: Vec<u8>,
        on_full: &str,
        limit_bytes: u64,
    ) -> PyResult<String> {
        let policy = StorePolicy { on_full: choose("on_full", on_full, &ON_FULL)?, limit_bytes };
        let request = CreateRequest { store, origin, block_size, meta, policy };
        detached(py, || open::create(&request)).map(hex)
    }

    #[staticmethod]
    #[pyo3(signature = (*, store, origin=None, cache="writeback", direct=false, buffer_dir=None,
        buffer_bytes=67_108_864, recover="refuse", peers=Vec::new()))]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    fn open(
        py: Python<'_>,
        store: PathBuf,
        origin: Option<PathBuf>,
        cache: &str,
        direct: bool,
        buffer_dir: Option<PathBuf>,
        buffer_bytes: u64,
        recover: &str,
        peers: Vec<PathBuf>,
    ) -> PyResult<Self> {
        let caches = [("writeback", Cache::WriteBack), ("writethrough", Cache::WriteThrough)];
        let recoveries = [
            ("refuse", Recover::Refuse),
            ("replay", Recover::Replay),
            ("discard", Recover::Discard),
        ];
        let request = OpenRequest {
            store,
            origin,
            cache: choose("cache", cache, &caches)?,
            direct,
            buffer_dir,
            buffer_bytes,
            recover: choose("recover", recover, &recoveries)?,
            has_background: true,
            peers,
        };
        detached(py, || open::open(request)).map(Self)
    }

    #[staticmethod]
    #[pyo3(signature = (*, store))]
    fn peek(py: Python<'_>, store: PathBuf) -> PyResult<(String, String, u64, Py<PyBytes>)> {
        let info = detached(py, || open::peek(&store))?;
        let origin = info.origin.to_string_lossy().into_owned();
        Ok((hex(info.uuid), origin, info.block_size, PyBytes::new(py, &info.meta).unbind()))
    }

    #[staticmethod]
    #[pyo3(signature = (*, store, origin=None))]
    fn inspect(py: Python<'_>, store: PathBuf, origin: Option<PathBuf>) -> PyResult<Inspection> {
        let found = detached(py, || core::inspect::inspect(&store, origin.as_deref()))?;
        Ok(Inspection::new(py, found))
    }

    #[staticmethod]
    #[pyo3(signature = (*, store))]
    fn check_unused(py: Python<'_>, store: PathBuf) -> PyResult<()> {
        detached(py, || core::inspect::check_unused(&store))
    }

    #[staticmethod]
    #[pyo3(signature = (*, store))]
    fn waits_for(py: Python<'_>, store: PathBuf) -> PyResult<Vec<String>> {
        let info = detached(py, || open::peek(&store))?;
        Ok(info.waits_for.into_iter().map(hex).collect())
    }

    #[pyo3(signature = (*, places))]
    fn settle_groups(&self, py: Python<'_>, places: Vec<PathBuf>) -> PyResult<usize> {
        detached(py, || self.0.settle_groups(&places))
    }

    #[pyo3(signature = (*, epoch, meta))]
    fn keep_undecided(&self, py: Python<'_>, epoch: u32, meta: Vec<u8>) -> PyResult<()> {
        detached(py, || self.0.keep_undecided(epoch, meta))
    }

    fn accept_origin(&self, py: Python<'_>, note: &str) -> PyResult<usize> {
        detached(py, || self.0.accept_origin(note))
    }

    fn check_structure(&self, py: Python<'_>) -> PyResult<Vec<(bool, String)>> {
        let findings = detached(py, || self.0.check_structure())?;
        Ok(findings.into_iter().map(|f| (f.severity == Severity::Damaged, f.message)).collect())
    }

    #[pyo3(signature = (*, share=10_000, seed=0))]
    fn check_content(&self, py: Python<'_>, share: u64, seed: u64) -> PyResult<ContentCheck> {
        let check = detached(py, || core::check::ContentCheck::new(&self.0, share, seed))?;
        Ok(ContentCheck(Mutex::new(check)))
    }

    fn damaged(&self, py: Python<'_>) -> PyResult<Vec<(u32, Ranges)>> {
        let found = detached(py, || self.0.damaged())?;
        Ok(by_epoch(&found, self.0.block_size(), self.0.size_bytes()))
    }

    fn note_damaged(&self, found: Vec<(u32, Ranges)>) -> PyResult<()> {
        let blocks = |(epoch, ranges): (u32, Ranges)| Ok((epoch, self.blocks(&ranges)?));
        self.0.note_damaged(&found.into_iter().map(blocks).collect::<PyResult<Vec<_>>>()?);
        Ok(())
    }

    #[getter]
    fn uuid(&self) -> String {
        hex(self.0.uuid())
    }

    #[getter]
    fn origin(&self) -> String {
        self.0.origin_path().to_string_lossy().into_owned()
    }

    #[getter]
    fn store(&self) -> String {
        self.0.store_path().to_string_lossy().into_owned()
    }

    #[getter]
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    #[getter]
    fn block_size(&self) -> u64 {
        self.0.block_size()
    }

    #[getter]
    fn current_epoch(&self) -> u32 {
        self.0.current_epoch()
    }

    fn meta<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.meta())
    }

    fn set_meta(&self, py: Python<'_>, meta: Vec<u8>) -> PyResult<()> {
        detached(py, || self.0.set_meta(meta))
    }

    #[pyo3(signature = (*, offset, length))]
    fn pread<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        read_bytes(py, length, |buffer| self.0.read(offset, buffer))
    }

    #[pyo3(signature = (data, *, offset, fua=false))]
    fn pwrite(&self, py: Python<'_>, data: PyBuffer<u8>, offset: u64, fua: bool) -> PyResult<()> {
        // Another thread could change the caller's buffer while it is written: take it first.
        let data = data.to_vec(py)?;
        detached(py, || self.0.write(offset, &data, fua))
    }

    #[pyo3(signature = (*, offset, length, may_punch=true, fua=false))]
    fn write_zeroes(
        &self,
        py: Python<'_>,
        offset: u64,
        length: u64,
        may_punch: bool,
        fua: bool,
    ) -> PyResult<()> {
        detached(py, || self.0.write_zeroes(offset, length, may_punch, fua))
    }

    #[pyo3(signature = (*, offset, length))]
    fn trim(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        detached(py, || self.0.trim(offset, length, false))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.flush())
    }

    #[pyo3(signature = (*, selection, low=Vec::new(), meta, pause_limit_ms=2000, quiet_ms=None,
        holds="device", passed=None))]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    fn snapshot(
        &self,
        py: Python<'_>,
        selection: Ranges,
        low: Ranges,
        meta: Vec<u8>,
        pause_limit_ms: u64,
        quiet_ms: Option<u64>,
        holds: &str,
        passed: Option<Py<PyAny>>,
    ) -> PyResult<Instant> {
        let request = core::SnapshotRequest {
            selection: self.blocks(&selection)?,
            low: self.blocks(&low)?,
            meta,
            pause_limit: Duration::from_millis(pause_limit_ms),
        };
        let quiet = quiet_ms.map(Duration::from_millis);
        let holds = choose("holds", holds, &HOLDS)?;
        let moment = core::Moment { quiet, holds, passed: passed.map(told) };
        detached(py, || self.0.snapshot_at(request, moment)).map(Instant::from)
    }

    #[staticmethod]
    #[pyo3(signature = (*, group_id, members, passed=None, objects=None))]
    fn snapshot_group(
        py: Python<'_>,
        group_id: &str,
        members: Vec<GroupMember>,
        passed: Option<Py<PyAny>>,
        objects: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Instant>> {
        let id = u128::from_str_radix(group_id, 16).ok().filter(|_| group_id.len() == 32);
        let id = id.ok_or_else(|| raise("usage", format!("{group_id:?} is no group id")))?;
        let member = |member: GroupMember| -> PyResult<core::Member> {
            let (volume, selection, low, meta, pause_limit_ms, quiet_ms, holds) = member;
            let holds = choose("holds", &holds, &HOLDS)?;
            let volume = volume.get();
            let request = core::SnapshotRequest {
                selection: volume.blocks(&selection)?,
                low: volume.blocks(&low)?,
                meta,
                pause_limit: Duration::from_millis(pause_limit_ms),
            };
            let quiet = quiet_ms.map(Duration::from_millis);
            Ok(core::Member { volume: Arc::clone(&volume.0), request, quiet, holds })
        };
        let members = members.into_iter().map(member).collect::<PyResult<Vec<_>>>()?;
        let moment =
            core::GroupMoment { passed: passed.map(told), objects: objects.map(objection) };
        let taken = detached(py, || core::snapshot_group(id.to_be_bytes(), members, moment))?;
        Ok(taken.into_iter().map(Instant::from).collect())
    }

    #[pyo3(signature = (*, ranges=None))]
    fn watch_writes(&self, ranges: Option<Ranges>) -> PyResult<()> {
        let blocks = ranges.map(|ranges| self.blocks(&ranges)).transpose()?;
        self.0.watch_writes(blocks);
        Ok(())
    }

    fn unwatch_writes(&self) {
        self.0.unwatch_writes();
    }

    fn quiet_ns(&self) -> Option<u64> {
        self.0.quiet().map(core::nanoseconds)
    }

    #[pyo3(signature = (*, length))]
    fn watch_reads(&self, length: u64) {
        self.0.watch_reads(length);
    }

    fn reads_seen(&self) -> Vec<u64> {
        self.0.reads_seen()
    }

    fn epochs(&self, py: Python<'_>) -> PyResult<Vec<Epoch>> {
        let infos = detached(py, || self.0.epochs())?;
        Ok(infos.into_iter().map(|info| Epoch::new(py, info, self.0.block_size())).collect())
    }

    #[pyo3(signature = (*, epoch, meta))]
    fn set_epoch_meta(&self, py: Python<'_>, epoch: u32, meta: Vec<u8>) -> PyResult<()> {
        detached(py, || self.0.set_epoch_meta(epoch, meta))
    }

    #[pyo3(signature = (*, epoch))]
    fn selection(&self, py: Python<'_>, epoch: u32) -> PyResult<Ranges> {
        let (set, size_bytes) = detached(py, || self.0.selection(epoch))?;
        Ok(to_ranges(&set, self.0.block_size(), size_bytes))
    }

    #[pyo3(signature = (*, epoch, selection, low=Vec::new(), meta))]
    fn narrow(
        &self,
        py: Python<'_>,
        epoch: u32,
        selection: Ranges,
        low: Ranges,
        meta: Vec<u8>,
    ) -> PyResult<u64> {
        let blocks = self.blocks(&selection)?;
        let settled = Settled { meta, low: self.blocks(&low)? };
        detached(py, || self.0.narrow_with(epoch, &blocks, Some(settled)))
    }

    #[pyo3(signature = (*, epoch, force=false))]
    fn delete_snapshot(&self, py: Python<'_>, epoch: u32, force: bool) -> PyResult<u64> {
        detached(py, || self.0.delete_snapshot(epoch, force))
    }

    #[pyo3(signature = (*, epoch, meta))]
    fn bookmark(&self, py: Python<'_>, epoch: u32, meta: Vec<u8>) -> PyResult<()> {
        detached(py, || self.0.bookmark(epoch, meta))
    }

    #[pyo3(signature = (*, epoch))]
    fn delete_bookmark(&self, py: Python<'_>, epoch: u32) -> PyResult<()> {
        detached(py, || self.0.delete_bookmark(epoch))
    }

    #[pyo3(signature = (*, since, until=None))]
    fn changed(&self, py: Python<'_>, since: u32, until: Option<u32>) -> PyResult<Ranges> {
        let set = detached(py, || self.0.changed(since, until))?;
        Ok(to_ranges(&set, self.0.block_size(), self.0.size_bytes()))
    }

    #[pyo3(signature = (*, since, until))]
    fn newly_selected(&self, py: Python<'_>, since: u32, until: u32) -> PyResult<Ranges> {
        let set = detached(py, || self.0.newly_selected(since, until))?;
        Ok(to_ranges(&set, self.0.block_size(), self.0.size_bytes()))
    }

    #[pyo3(signature = (*, epoch, excluded_reads="zeros"))]
    fn view(&self, epoch: u32, excluded_reads: &str) -> PyResult<View> {
        let excluded = choose("excluded_reads", excluded_reads, &EXCLUDED_READS)?;
        let view = CoreView::open(&self.0, epoch, excluded).map_err(from_core)?;
        Ok(View(Arc::new(view)))
    }

    #[pyo3(signature = (*, epoch, meta))]
    fn create_clone(&self, py: Python<'_>, epoch: u32, meta: Vec<u8>) -> PyResult<u32> {
        detached(py, || self.0.create_clone(epoch, &meta))
    }

    fn clones(&self, py: Python<'_>) -> PyResult<Vec<CloneEntry>> {
        let infos = detached(py, || self.0.clones())?;
        let block_size = self.0.block_size();
        Ok(infos.into_iter().map(|info| CloneEntry::new(py, info, block_size)).collect())
    }

    #[pyo3(signature = (*, number, excluded_reads="zeros"))]
    fn open_clone(&self, py: Python<'_>, number: u32, excluded_reads: &str) -> PyResult<Clone> {
        let excluded = choose("excluded_reads", excluded_reads, &EXCLUDED_READS)?;
        detached(py, || self.0.open_clone(number, excluded)).map(Clone)
    }

    #[pyo3(signature = (*, number))]
    fn reset_clone(&self, py: Python<'_>, number: u32) -> PyResult<u64> {
        detached(py, || self.0.reset_clone(number))
    }

    #[pyo3(signature = (*, number))]
    fn delete_clone(&self, py: Python<'_>, number: u32) -> PyResult<u64> {
        detached(py, || self.0.delete_clone(number))
    }

    #[pyo3(signature = (*, number, meta))]
    fn set_clone_meta(&self, py: Python<'_>, number: u32, meta: Vec<u8>) -> PyResult<()> {
        detached(py, || self.0.set_clone_meta(number, meta))
    }

    #[pyo3(signature = (*, epoch, request, safety_selection, safety_low=Vec::new(), meta,
        pause_limit_ms=2000))]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    fn restore(
        &self,
        py: Python<'_>,
        epoch: u32,
        request: Ranges,
        safety_selection: Ranges,
        safety_low: Ranges,
        meta: Vec<u8>,
        pause_limit_ms: u64,
    ) -> PyResult<RestoreStatus> {
        let request = core::RestoreRequest {
            source_epoch: epoch,
            request: self.blocks(&request)?,
            safety_selection: self.blocks(&safety_selection)?,
            safety_low: self.blocks(&safety_low)?,
            meta,
            pause_limit: Duration::from_millis(pause_limit_ms),
        };
        detached(py, || self.0.restore(&request)).map(RestoreStatus::from)
    }

    #[pyo3(signature = (*, epoch, request))]
    fn restore_plan(&self, py: Python<'_>, epoch: u32, request: Ranges) -> PyResult<Ranges> {
        let blocks = self.blocks(&request)?;
        let set = detached(py, || self.0.restore_plan(epoch, &blocks))?;
        Ok(to_ranges(&set, self.0.block_size(), self.0.size_bytes()))
    }

    fn restore_status(&self) -> Option<RestoreStatus> {
        self.0.restore_status().map(RestoreStatus::from)
    }

    #[pyo3(signature = (*, timeout_ms))]
    fn restore_wait(&self, py: Python<'_>, timeout_ms: u64) -> PyResult<bool> {
        detached(py, || self.0.wait_restored(Duration::from_millis(timeout_ms)))
    }

    fn resize(&self, py: Python<'_>) -> PyResult<u64> {
        detached(py, || self.0.resize())
    }

    fn statistics(&self) -> Statistics {
        let counters = self.0.counters.list().into_iter();
        Statistics(counters.chain(self.0.gauges()).collect())
    }

    #[pyo3(signature = (*, on_full, limit_bytes))]
    fn set_store_policy(&self, py: Python<'_>, on_full: &str, limit_bytes: u64) -> PyResult<()> {
        let on_full = choose("on_full", on_full, &ON_FULL)?;
        detached(py, || self.0.set_store_policy(StorePolicy { on_full, limit_bytes }))
    }

    fn store_usage(&self, py: Python<'_>) -> PyResult<StoreUsage> {
        detached(py, || self.0.store_usage()).map(|usage| {
            let on_full = ON_FULL.iter().find(|(_, kind)| *kind == usage.policy.on_full);
            StoreUsage::new(usage, on_full.map_or("", |(name, _)| name))
        })
    }

    #[pyo3(signature = (*, epoch))]
    fn low(&self, epoch: u32) -> Ranges {
        to_ranges(&self.0.low(epoch), self.0.block_size(), self.0.size_bytes())
    }

    fn store_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        detached(py, || self.0.store_bytes())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.close())
    }
}

fn by_epoch(
    found: &[(u32, stillblock_core::extent::ExtentSet)],
    block_size: u64,
    size_bytes: u64,
) -> Vec<(u32, Ranges)> {
    found.iter().map(|(epoch, set)| (*epoch, to_ranges(set, block_size, size_bytes))).collect()
}

#[pyclass(frozen)]
pub struct ContentCheck(Mutex<core::check::ContentCheck>);

impl ContentCheck {
    fn lock(&self) -> MutexGuard<'_, core::check::ContentCheck> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl ContentCheck {
    #[getter]
    fn total_bytes(&self) -> u64 {
        self.lock().total_bytes()
    }

    #[getter]
    fn done_bytes(&self) -> u64 {
        self.lock().done_bytes()
    }

    fn step(&self, py: Python<'_>, bytes_max: u64) -> PyResult<bool> {
        detached(py, || self.lock().step(bytes_max))
    }

    fn damaged_blocks(&self) -> usize {
        let of = |(_, set): &(u32, stillblock_core::extent::ExtentSet)| to_usize(set.block_count());
        self.lock().damaged().iter().map(of).sum()
    }
}

#[pyclass(frozen)]
pub struct View(pub Arc<CoreView>);

#[pymethods]
impl View {
    #[getter]
    fn epoch(&self) -> u32 {
        self.0.epoch()
    }

    #[getter]
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    #[pyo3(signature = (*, offset, length))]
    fn pread<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        read_bytes(py, length, |buffer| self.0.read(offset, buffer))
    }

    #[pyo3(signature = (*, offset, length))]
    fn extents(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<Vec<(u64, u64, u32)>> {
        let (selected, allocated, lost) = detached(py, || {
            let selected = self.0.selected(offset, length, usize::MAX)?;
            let allocated = self.0.allocation(offset, length, usize::MAX)?;
            Ok((selected, allocated, self.0.lost()?))
        })?;
        let block_size = self.0.volume().block_size();
        let lost = stillblock_core::view::status_of(&lost, block_size, offset, length, usize::MAX);
        Ok(overlaid(&selected, &allocated, &lost))
    }

    fn close(&self) {
        self.0.close();
    }
}

fn told(call: Py<PyAny>) -> core::Told<'static> {
    Box::new(move || tell(&call))
}

/// Whether somebody in Python objects, and why. Whoever cannot say so does.
fn objection(call: Py<PyAny>) -> core::Objects<'static> {
    Box::new(move || {
        Python::attach(|py| {
            let said = call.call0(py).and_then(|said| said.extract::<Option<String>>(py));
            said.unwrap_or_else(|error| Some(error.to_string()))
        })
    })
}

/// Call back into Python from a thread of the engine; what it raises is nobody's to catch there.
fn tell(call: &Py<PyAny>) {
    Python::attach(|py| {
        if let Err(error) = call.call0(py) {
            error.write_unraisable(py, Some(call.bind(py)));
        }
    });
}
