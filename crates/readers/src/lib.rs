//! What the readers of filesystems, which are Python, do once for every file and where a bench
//! asked for more. No code here decides what is damaged: it knows the usual, and leaves the rest.

pub mod mft;
