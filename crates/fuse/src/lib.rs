//! Images as files: the exports of a server as a FUSE tree, beside NBD and over the same
//! [`Export`](stillblock_core::export::Export).
//!
//! [`tree`] says which files there are, [`image`] what reading and writing one does to its export,
//! [`pieces`] where its bytes lie. [`filesystem`] answers the kernel, [`session`] has the threads.
//! Who mounts, where, and who unmounts is not decided here: a session is given a descriptor.

pub mod filesystem;
pub mod image;
pub mod pieces;
pub mod session;
pub mod tree;
