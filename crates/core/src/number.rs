//! Conversions between `u64` offsets and `usize` lengths, which are the same size on every target
//! we build for.

const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "stillblock needs a 64-bit target");

/// A length or index in memory.
#[allow(clippy::cast_possible_truncation)] // usize is 64 bits wide, asserted above
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A length or index on a device.
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}
