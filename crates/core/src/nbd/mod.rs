//! Network Block Device: the server side of the protocol.
