//! What can go wrong with a volume, by who must act: each kind is an exception class and an exit
//! code above.

use crate::export::ExportError;
use crate::extent::ExtentSet;
use crate::journal::JournalError;
use crate::log::scan::ScanError;
use std::io;

/// An error of the engine. The message says what, where, how much and what now.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The call makes no sense: out of range, not aligned, contradicting.
    #[error("{0}")]
    Usage(String),
    /// Somebody else has it open.
    #[error("{0}")]
    Locked(String),
    /// The origin's device failed.
    #[error("origin: {what}: {source}")]
    Origin {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The origin is not what it was.
    #[error("{0}")]
    OriginChanged(String),
    /// The store's device failed.
    #[error("store: {what}: {source}")]
    Store {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room in the store.
    #[error("{0}")]
    StoreFull(String),
    /// The store's content is not intact.
    #[error("{0}")]
    Damaged(String),
    /// The store was written by a newer version.
    #[error("{0}")]
    Version(String),
    /// No such snapshot or bookmark.
    #[error("{0}")]
    NotFound(String),
    /// Something holds it.
    #[error("{0}")]
    InUse(String),
    /// Writes did not drain in time; the snapshot was not taken, writes go on.
    #[error("{0}")]
    PauseTimeout(String),
    /// Writes came while quiet was asked for; the snapshot was not taken.
    #[error("{0}")]
    NotQuiet(String),
    /// What was asked for was not held until the instant; no snapshot was taken.
    #[error("{0}")]
    NotHeld(String),
    /// A snapshot's content that could not be kept.
    #[error("{message}")]
    Lost {
        /// For people.
        message: String,
        /// Which blocks.
        blocks: ExtentSet,
    },
    /// Content the snapshot does not select.
    #[error("{0}")]
    Excluded(String),
    /// A person must decide before the volume can be opened.
    #[error("{0}")]
    RecoveryNeeded(String),
    /// Whether a snapshot exists is decided in a store that is not there.
    #[error("{0}")]
    Undecided(String),
    /// Not while a restore runs.
    #[error("{0}")]
    RestoreRunning(String),
    /// The volume or view was closed.
    #[error("the volume is closed")]
    Closed,
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The stable name of the kind.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Locked(_) => "locked",
            Self::Origin { .. } => "origin_io",
            Self::OriginChanged(_) => "origin_changed",
            Self::Store { .. } => "store_io",
            Self::StoreFull(_) => "store_full",
            Self::Damaged(_) => "store_damaged",
            Self::Version(_) => "unsupported_version",
            Self::NotFound(_) => "not_found",
            Self::InUse(_) => "in_use",
            Self::PauseTimeout(_) => "pause_timeout",
            Self::NotQuiet(_) => "not_quiet",
            Self::NotHeld(_) => "quiesce",
            Self::Lost { .. } => "snapshot_lost",
            Self::Excluded(_) => "excluded",
            Self::RecoveryNeeded(_) => "recovery_needed",
            Self::Undecided(_) => "undecided",
            Self::RestoreRunning(_) => "restore_running",
            Self::Closed => "closed",
        }
    }

    /// The origin failed while `what`.
    pub fn origin(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Origin { what, source }
    }

    /// The store failed while `what`.
    pub fn store(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| {
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
                return Self::StoreFull(format!(
                    "the store is full: {what}: {source}; delete a snapshot, give it room or raise \
                     --store-limit"
                ));
            }
            Self::Store { what, source }
        }
    }

    /// The NBD errors are few: what a client needs to know is whether to retry elsewhere.
    pub fn to_export(&self) -> ExportError {
        match self {
            Self::Usage(_) => ExportError::Invalid,
            Self::Closed => ExportError::ShuttingDown,
            Self::StoreFull(_) => ExportError::NoSpace,
            Self::Origin { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ExportError::NoSpace
            }
            _ => ExportError::Io,
        }
    }
}

impl From<JournalError> for Error {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Io(source) => Self::store("volume journal")(source),
            JournalError::Version(_) => {
                Self::Version(format!("{error}; use a newer stillblock to open this store"))
            }
            JournalError::TooLarge { .. } => Self::Usage(error.to_string()),
            JournalError::Broken(source) => Self::store(
                "an earlier write of the volume journal failed and cannot be undone yet",
            )(source),
            JournalError::Unsettled(source) => Self::store(
                "the volume journal was compacted and its name is not known to be durable yet",
            )(source),
            JournalError::Damaged { .. } | JournalError::Replaced => {
                Self::Damaged(error.to_string())
            }
        }
    }
}

impl From<ScanError> for Error {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Io(source) => Self::store("reading the log")(source),
            ScanError::Version { .. } => {
                Self::Version(format!("{error}; use a newer stillblock to open this store"))
            }
        }
    }
}
