//! The data path of stillblock: what happens for every request, and nothing that happens for an
//! operation.
//!
//! Read first: [`volume`] (one origin with its store), then [`log`] (what is kept), then [`buffer`]
//! and `volume::commit` (how a first change is made safe before it reaches the origin).

pub mod bitmap;
pub mod buffer;
pub mod clone;
pub mod codec;
pub mod epochs;
pub mod error;
pub mod export;
pub mod exports;
pub mod extent;
pub mod index;
pub mod journal;
pub mod log;
pub mod nbd;
pub mod number;
pub mod regions;
pub mod sabotage;
pub mod storage;
pub mod sync;
pub mod view;
pub mod volume;
