//! `Server`.

use crate::clones::Clone as ClonedDisk;
use crate::error::{from_server, raise};
use crate::volume::{View, Volume};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use stillblock_core::clone::export::CloneExport;
use stillblock_core::export::Export;
use stillblock_core::exports::{ContextKind, Contexts, ViewExport, VolumeExport};
use stillblock_core::nbd::server::{Limits, Server as CoreServer};

type Specs = Vec<(String, String, u32)>;

fn contexts_of(specs: Specs) -> PyResult<Vec<(String, ContextKind)>> {
    let kind = |(name, kind, since): (String, String, u32)| match kind.as_str() {
        "selected" => Ok((name, ContextKind::Selected)),
        "changed" => Ok((name, ContextKind::Changed { since })),
        "dirty" => Ok((name, ContextKind::Dirty { since })),
        _ => Err(raise("usage", format!("a context cannot show {kind:?}"))),
    };
    specs.into_iter().map(kind).collect()
}

enum Known {
    Volume(Arc<VolumeExport>),
    View(Arc<ViewExport>),
    Clone(Arc<CloneExport>),
}

impl Known {
    fn export(&self) -> Arc<dyn Export> {
        match self {
            Self::Volume(export) => Arc::clone(export) as Arc<dyn Export>,
            Self::View(export) => Arc::clone(export) as Arc<dyn Export>,
            Self::Clone(export) => Arc::clone(export) as Arc<dyn Export>,
        }
    }

    fn contexts(&self) -> &Contexts {
        match self {
            Self::Volume(export) => &export.contexts,
            Self::View(export) => &export.contexts,
            Self::Clone(export) => &export.contexts,
        }
    }
}

#[pyclass(frozen)]
pub struct Server {
    server: CoreServer,
    known: Mutex<HashMap<String, Known>>,
}

impl Server {
    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The export that clients know by this name.
    pub fn export(&self, name: &str) -> PyResult<Arc<dyn Export>> {
        let known = self.known();
        let found = known.get(name);
        found.map(Known::export).ok_or_else(|| raise("not_found", format!("no export {name}")))
    }

    fn add(&self, name: String, export: Arc<dyn Export>, known: Known) -> PyResult<()> {
        self.server.add(&name, export).map_err(from_server)?;
        self.known().insert(name, known);
        Ok(())
    }
}

#[pymethods]
impl Server {
    #[new]
    #[pyo3(signature = (*, connections_max=64))]
    fn new(connections_max: usize) -> Self {
        let limits = Limits { connections_max, ..Limits::default() };
        Self { server: CoreServer::new(limits), known: Mutex::default() }
    }

    fn listen_unix(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.server.listen_unix(&path)).map_err(from_server)
    }

    fn listen_tcp(&self, py: Python<'_>, host: &str, port: u16) -> PyResult<u16> {
        let host: IpAddr = if host == "localhost" { "127.0.0.1" } else { host }
            .parse()
            .map_err(|_| raise("usage", format!("{host} is not an IP address or localhost")))?;
        let address = SocketAddr::new(host, port);
        let bound = py.detach(|| self.server.listen_tcp(address)).map_err(from_server)?;
        Ok(bound.port())
    }

    #[pyo3(signature = (name, volume, *, description, contexts, read_only=false))]
    fn add_volume(
        &self,
        name: String,
        volume: &Volume,
        description: String,
        contexts: Specs,
        read_only: bool,
    ) -> PyResult<()> {
        let export = VolumeExport::new(Arc::clone(&volume.0), description, read_only);
        let export = Arc::new(export);
        export.contexts.set(contexts_of(contexts)?);
        self.add(name, Arc::clone(&export) as Arc<dyn Export>, Known::Volume(export))
    }

    #[pyo3(signature = (name, view, *, description, contexts))]
    fn add_view(
        &self,
        name: String,
        view: &View,
        description: String,
        contexts: Specs,
    ) -> PyResult<()> {
        let export = Arc::new(ViewExport::new(Arc::clone(&view.0), description));
        export.contexts.set(contexts_of(contexts)?);
        self.add(name, Arc::clone(&export) as Arc<dyn Export>, Known::View(export))
    }

    #[pyo3(signature = (name, clone, *, description, contexts, read_only=false))]
    fn add_clone(
        &self,
        name: String,
        clone: &ClonedDisk,
        description: String,
        contexts: Specs,
        read_only: bool,
    ) -> PyResult<()> {
        let export = CloneExport::new(Arc::clone(&clone.0), description, read_only);
        let export = Arc::new(export);
        export.contexts.set(contexts_of(contexts)?);
        self.add(name, Arc::clone(&export) as Arc<dyn Export>, Known::Clone(export))
    }

    fn set_contexts(&self, name: &str, contexts: Specs) -> PyResult<()> {
        let contexts = contexts_of(contexts)?;
        let known = self.known();
        let found = known.get(name);
        let found = found.ok_or_else(|| raise("not_found", format!("no export {name}")))?;
        found.contexts().set(contexts);
        Ok(())
    }

    fn set_default(&self, name: Option<&str>) -> PyResult<()> {
        self.server.set_default(name).map_err(from_server)
    }

    #[pyo3(signature = (name, *, force=false))]
    fn remove(&self, py: Python<'_>, name: &str, force: bool) -> PyResult<usize> {
        let cut = py.detach(|| self.server.remove(name, force)).map_err(from_server)?;
        self.known().remove(name);
        Ok(cut)
    }

    fn connections(&self) -> Vec<(String, String, u64)> {
        let of = |c: stillblock_core::nbd::server::ConnectionInfo| {
            (c.export.unwrap_or_default(), c.peer, c.since.elapsed().as_secs())
        };
        self.server.connections().into_iter().map(of).collect()
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.server.stop());
        self.known().clear();
    }
}
