//! Fixed-width little-endian fields, written to and read from byte strings; reading checks every
//! length.

use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};

/// The bytes ended early or a field has a value it cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed at byte {at}")]
pub struct Malformed {
    /// Where.
    pub at: usize,
}

/// Appends fields.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Bytes of a length both sides know.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A length of eight bytes, then the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u64(to_u64(bytes.len())).raw(bytes)
    }

    /// Seven bits a byte, the low ones first; the highest bit says that more follow.
    pub fn varint(&mut self, mut value: u64) -> &mut Self {
        loop {
            let low = u8::try_from(value & 0x7f).expect("seven bits");
            value >>= 7;
            if value == 0 {
                return self.u8(low);
            }
            self.u8(low | 0x80);
        }
    }

    /// A count of eight bytes, then of each how far it begins after the last one's end, and its
    /// length: three or four bytes for most, where [`Writer::extents`] takes sixteen.
    pub fn packed_extents(&mut self, set: &ExtentSet) -> &mut Self {
        self.u64(to_u64(set.as_slice().len()));
        let mut end = 0;
        for extent in set.iter() {
            self.varint(extent.start - end).varint(extent.len());
            end = extent.end;
        }
        self
    }

    /// A count of eight bytes, then start and end of each.
    pub fn extents(&mut self, set: &ExtentSet) -> &mut Self {
        self.u64(to_u64(set.as_slice().len()));
        for extent in set.iter() {
            self.u64(extent.start).u64(extent.end);
        }
        self
    }
}

/// Takes fields off the front.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// From the first byte.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    const fn malformed(&self) -> Malformed {
        Malformed { at: self.at }
    }

    /// True if nothing is left.
    pub const fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// Bytes of a known length.
    pub fn raw(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or(self.malformed())?;
        let found = &self.bytes[self.at..end];
        self.at = end;
        Ok(found)
    }

    /// Bytes of a known length, as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let error = self.malformed();
        self.raw(N)?.try_into().map_err(|_| error)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length, then the bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u64()?;
        if length > to_u64(self.bytes.len()) {
            return Err(self.malformed());
        }
        self.raw(to_usize(length))
    }

    /// What [`Writer::varint`] wrote.
    pub fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(self.malformed());
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed())
    }

    /// What [`Writer::packed_extents`] wrote.
    pub fn packed_extents(&mut self) -> Result<ExtentSet, Malformed> {
        let count = self.u64()?;
        let mut set = ExtentSet::new();
        let mut end = 0_u64;
        for _ in 0..count {
            let (gap, length) = (self.varint()?, self.varint()?);
            let start = end.checked_add(gap).ok_or(self.malformed())?;
            end = start.checked_add(length).filter(|&e| e > start).ok_or(self.malformed())?;
            set.push_sorted(Extent { start, end });
        }
        Ok(set)
    }

    /// A count, then sorted, disjoint extents.
    pub fn extents(&mut self) -> Result<ExtentSet, Malformed> {
        let count = self.u64()?;
        let mut set = ExtentSet::new();
        let mut end = 0;
        for _ in 0..count {
            let extent = Extent { start: self.u64()?, end: self.u64()? };
            if extent.is_empty() || extent.start < end {
                return Err(self.malformed());
            }
            end = extent.end;
            set.push_sorted(extent);
        }
        Ok(set)
    }
}
