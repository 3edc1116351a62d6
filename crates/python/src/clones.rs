//! `Clone` and `CloneEntry`.

use crate::error::detached;
use crate::values::overlaid;
use crate::volume::read_bytes;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;
use stillblock_core::clone::CloneInfo;
use stillblock_core::clone::view::CloneView;
use stillblock_core::view::status_of;

#[pyclass(frozen, get_all)]
pub struct CloneEntry {
    number: u32,
    epoch: Option<u32>,
    size_bytes: u64,
    created_unix_ns: u64,
    meta: Py<PyBytes>,
    own_bytes: u64,
    allocated_bytes: u64,
    damage: String,
    failure: String,
}

impl CloneEntry {
    pub fn new(py: Python<'_>, info: CloneInfo, block_size: u64) -> Self {
        Self {
            number: info.number,
            epoch: info.epoch,
            size_bytes: info.size_bytes,
            created_unix_ns: info.created_unix_ns,
            meta: PyBytes::new(py, &info.meta).unbind(),
            own_bytes: info.own_blocks * block_size,
            allocated_bytes: info.allocated_bytes,
            damage: info.damage,
            failure: info.failure,
        }
    }
}

#[pyclass(frozen)]
pub struct Clone(pub Arc<CloneView>);

#[pymethods]
impl Clone {
    #[getter]
    fn number(&self) -> u32 {
        self.0.number()
    }

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

    #[pyo3(signature = (*, offset, length))]
    fn extents(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<Vec<(u64, u64, u32)>> {
        let (selected, allocated, lost) = detached(py, || {
            let selected = self.0.selected(offset, length, usize::MAX)?;
            let allocated = self.0.allocation(offset, length, usize::MAX)?;
            Ok((selected, allocated, self.0.lost()?))
        })?;
        let block_size = self.0.volume().block_size();
        let lost = status_of(&lost, block_size, offset, length, usize::MAX);
        Ok(overlaid(&selected, &allocated, &lost))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.volume().close_clone(self.0.number()))
    }
}
