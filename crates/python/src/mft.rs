//! Records of NTFS's master file table, for the reader in Python.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use stillblock_readers::mft::{self, Layout};

type PlainFile = (u16, Vec<(u64, Py<PyBytes>)>, u64, u64, Option<Layout>);

/// What MFT record `number` says, `raw` as on disk, if it is one whole file in a plain record.
#[pyfunction]
#[pyo3(signature = (raw, *, number, cluster_size, cluster_count))]
pub fn plain_file(
    python: Python<'_>,
    raw: &[u8],
    number: u64,
    cluster_size: u64,
    cluster_count: u64,
) -> Option<PlainFile> {
    let found = mft::PlainFile::read(raw, number, cluster_size, cluster_count)?;
    let names = found
        .names
        .iter()
        .map(|(parent, name)| (*parent, PyBytes::new(python, name).unbind()))
        .collect();
    Some((found.sequence, names, found.changed, found.size, found.layout))
}
