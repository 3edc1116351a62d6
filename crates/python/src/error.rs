//! Every error of the core becomes one exception with the name of its kind; classes are Python's
//! business.

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use stillblock_core::error::Error;
use stillblock_core::nbd::server::ServerError;

pyo3::create_exception!(_native, NativeError, PyException, "args == (kind, message)");

/// An error that knows its kind.
pub fn raise(kind: &'static str, message: String) -> PyErr {
    NativeError::new_err((kind, message))
}

pub fn from_core(error: Error) -> PyErr {
    raise(error.kind(), error.to_string())
}

pub fn from_server(error: ServerError) -> PyErr {
    let kind = match &error {
        ServerError::ExportInUse { .. } | ServerError::ExportBusy { .. } => "in_use",
        ServerError::ExportUnknown { .. } => "not_found",
        ServerError::AddressInUse { .. } => "locked",
        ServerError::Stopped => "closed",
        ServerError::ExportExists { .. }
        | ServerError::ExportName { .. }
        | ServerError::NotASocket { .. }
        | ServerError::NotLoopback { .. } => "usage",
        ServerError::Listen { .. } => "internal",
    };
    raise(kind, error.to_string())
}

/// Run without the GIL and translate the error.
pub fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(from_core)
}
