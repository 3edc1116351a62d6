//! Where the bytes of a file lie on a disk: all of it, or stretches one behind the other. Pure.

/// A part of a request: a range of the file, and where it begins on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte, of the file.
    pub file_start: u64,
    /// First byte, of the disk.
    pub disk_start: u64,
    /// How many bytes; at least 1.
    pub length: u64,
}

/// Stretches of a disk that make a file, in its order; none of them is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    /// (first byte of the file, first byte of the disk), ascending by the first.
    starts: Vec<(u64, u64)>,
    size_bytes: u64,
}

/// Why stretches make no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stretch {start}-{end} does not lie on a disk of {disk_bytes} bytes")]
pub struct PieceError {
    start: u64,
    end: u64,
    disk_bytes: u64,
}

impl Pieces {
    /// The file that these half-open ranges of a disk make; empty ones are left out.
    pub fn new(ranges: &[(u64, u64)], disk_bytes: u64) -> Result<Self, PieceError> {
        let mut starts = Vec::with_capacity(ranges.len());
        let mut size_bytes = 0;
        for &(start, end) in ranges {
            if start > end || end > disk_bytes {
                return Err(PieceError { start, end, disk_bytes });
            }
            if start < end {
                starts.push((size_bytes, start));
                size_bytes += end - start;
            }
        }
        Ok(Self { starts, size_bytes })
    }

    /// The file's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The parts that `[start, end)` of the file consists of, in order; what lies past its end is
    /// left out.
    pub fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = Part> + '_ {
        let end = end.min(self.size_bytes);
        let first = self.starts.partition_point(|&(file, _)| file <= start).saturating_sub(1);
        let following = self.starts.iter().skip(first + 1).map(|&(file, _)| file);
        let ends = following.chain(std::iter::once(self.size_bytes));
        self.starts.iter().skip(first).zip(ends).filter_map(move |(&(file, disk), stop)| {
            let (from, to) = (file.max(start), stop.min(end));
            (from < to).then(|| Part {
                file_start: from,
                disk_start: disk + (from - file),
                length: to - from,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(pieces: &Pieces, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        pieces.parts(start, end).map(|p| (p.file_start, p.disk_start, p.length)).collect()
    }

    #[test]
    fn every_range_of_a_file_is_found_byte_by_byte_where_its_pieces_lie() {
        let ranges = [(30, 40), (7, 7), (0, 5), (90, 91), (50, 58)];
        let pieces = Pieces::new(&ranges, 100).unwrap();
        let places: Vec<u64> = ranges.iter().flat_map(|&(start, end)| start..end).collect();
        assert_eq!(pieces.size_bytes(), places.len() as u64);
        for start in 0..30_u64 {
            for end in start..30 {
                let found: Vec<(u64, u64)> = pieces
                    .parts(start, end)
                    .flat_map(|p| (0..p.length).map(move |n| (p.file_start + n, p.disk_start + n)))
                    .collect();
                let wanted: Vec<(u64, u64)> = (start..end)
                    .filter_map(|at| Some((at, *places.get(usize::try_from(at).unwrap())?)))
                    .collect();
                assert_eq!(found, wanted, "{start}..{end}");
            }
        }
    }

    #[test]
    fn a_range_inside_one_piece_is_one_part() {
        let pieces = Pieces::new(&[(100, 200)], 1000).unwrap();
        assert_eq!(parts(&pieces, 10, 20), [(10, 110, 10)]);
        assert_eq!(parts(&pieces, 100, 200), []);
    }

    #[test]
    fn what_does_not_lie_on_the_disk_makes_no_file() {
        assert!(Pieces::new(&[(0, 11)], 10).is_err());
        assert!(Pieces::new(&[(5, 4)], 10).is_err());
        assert_eq!(Pieces::new(&[], 10).unwrap().size_bytes(), 0);
    }
}
