//! The Python extension module: registration only. What each class does is written in
//! `_native.pyi`.
// The conversions that PyO3 generates need their arguments by value.
#![allow(clippy::needless_pass_by_value)]

mod checksum;
mod clones;
mod error;
mod images;
mod mft;
mod server;
mod values;
mod volume;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("NativeError", module.py().get_type::<error::NativeError>())?;
    module.add_class::<values::Instant>()?;
    module.add_class::<values::Epoch>()?;
    module.add_class::<values::RestoreStatus>()?;
    module.add_class::<values::Inspection>()?;
    module.add_class::<volume::ContentCheck>()?;
    module.add_class::<values::Statistics>()?;
    module.add_class::<values::StoreUsage>()?;
    module.add_class::<volume::Volume>()?;
    module.add_class::<volume::View>()?;
    module.add_class::<clones::CloneEntry>()?;
    module.add_class::<clones::Clone>()?;
    module.add_class::<server::Server>()?;
    module.add_class::<images::Images>()?;
    module.add_class::<images::ImageMount>()?;
    module.add_function(wrap_pyfunction!(checksum::crc32c, module)?)?;
    module.add_function(wrap_pyfunction!(mft::plain_file, module)?)
}
