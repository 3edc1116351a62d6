//! The epoch log: what is preserved and recorded, in batches, in segment files.
//!
//! [`format`] is the layout, pure; [`writer`] appends, one durable batch after another; [`scan`]
//! reads a log back and tells a torn tail from damage; [`verify`] looks at every copy of
//! everything. The page for people is `docs/formats/log.md`.

pub mod batch;
pub mod format;
pub mod merged;
pub mod scan;
pub mod verify;
pub mod writer;
