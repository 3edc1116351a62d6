//! The checksum that the filesystems which Python reads have on their structures.

use pyo3::prelude::*;

/// CRC-32C (Castagnoli) of `data`, going on from `seed`, the CRC of what comes before it.
#[pyfunction]
#[pyo3(signature = (data, seed = 0))]
pub fn crc32c(python: Python<'_>, data: &[u8], seed: u32) -> u32 {
    python.detach(|| ::crc32c::crc32c_append(seed, data))
}
