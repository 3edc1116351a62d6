//! `Images` and `ImageMount`.

use crate::error::raise;
use crate::server::Server;
use pyo3::prelude::*;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use stillblock_fuse::image::Access;
use stillblock_fuse::session::Serving;
use stillblock_fuse::tree::{FileSpec, Tree, TreeError};

fn from_tree(error: TreeError) -> PyErr {
    let kind = match &error {
        TreeError::InUse { .. } | TreeError::Busy { .. } => "in_use",
        TreeError::Unknown { .. } => "not_found",
        TreeError::Path { .. } | TreeError::Piece { .. } => "usage",
    };
    raise(kind, error.to_string())
}

#[pyclass(frozen)]
pub struct Images(Arc<Tree>);

#[pymethods]
impl Images {
    #[new]
    fn new() -> Self {
        Self(Arc::default())
    }

    #[pyo3(signature = (name, server, *, files, access, created_unix_ns))]
    fn add(
        &self,
        py: Python<'_>,
        name: &str,
        server: &Server,
        files: Vec<FileSpec>,
        access: &str,
        created_unix_ns: u64,
    ) -> PyResult<()> {
        let access = match access {
            "constant" => Access::Constant,
            "watched" => Access::Watched,
            "writable" => Access::Writable,
            _ => return Err(raise("usage", format!("a file's access cannot be {access:?}"))),
        };
        let export = server.export(name)?;
        py.detach(|| self.0.add(name, export, access, created_unix_ns, &files)).map_err(from_tree)
    }

    #[pyo3(signature = (name, *, files))]
    fn extend(&self, py: Python<'_>, name: &str, files: Vec<FileSpec>) -> PyResult<()> {
        py.detach(|| self.0.extend(name, &files)).map_err(from_tree)
    }

    #[pyo3(signature = (name, *, force=false))]
    fn remove(&self, py: Python<'_>, name: &str, force: bool) -> PyResult<usize> {
        py.detach(|| self.0.remove(name, force)).map_err(from_tree)
    }

    fn opens(&self) -> HashMap<String, usize> {
        self.0.opens().into_iter().collect()
    }

    fn serve(&self, py: Python<'_>, device: RawFd) -> PyResult<ImageMount> {
        // SAFETY: only duplicated here; the caller has it open for as long as the call takes.
        let device = unsafe { BorrowedFd::borrow_raw(device) };
        let tree = Arc::clone(&self.0);
        let serving = device
            .try_clone_to_owned()
            .and_then(|device| py.detach(|| Serving::start(tree, device)))
            .map_err(|error| raise("fuse", format!("the kernel does not speak FUSE: {error}")))?;
        Ok(ImageMount(serving))
    }
}

#[pyclass(frozen)]
pub struct ImageMount(Serving);

#[pymethods]
impl ImageMount {
    #[getter]
    fn is_over(&self) -> bool {
        self.0.is_over()
    }
}
