//! Looking at every copy of everything in the log that is there twice: what an opening passes over
//! because the other copy serves is told here.

use super::format::{Descriptor, PAGE, SegmentHeader};
use super::scan::{Cursor, PageReader, Step, read_header_at};
use super::writer::Segments;
use std::collections::BTreeMap;
use std::io;

/// How bad something is that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// One of two copies is gone; nothing is lost yet.
    Degraded,
    /// Something is gone.
    Damaged,
}

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What, where and how much, for people.
    pub message: String,
}

/// Where the log ends for sure: what lies behind may just be being written.
#[derive(Debug, Clone, Copy)]
pub struct VerifiedEnd {
    /// The last segment, 0 if none is open.
    pub segment: u32,
    /// Page after its last durable batch.
    pub page: u64,
}

/// A segment whose batches can be walked.
pub struct Walk {
    reader: PageReader,
    header: SegmentHeader,
    limit: u64,
}

/// The headers of these segments, told by number with the epoch each is of; what is wrong with them goes
/// to `findings`. Numbers that are gone by now are left out.
pub fn verify_headers(
    segments: &Segments,
    uuid: [u8; 16],
    numbers: &BTreeMap<u32, u32>,
    end: VerifiedEnd,
    findings: &mut Vec<Finding>,
) -> io::Result<Vec<Walk>> {
    let mut found: BTreeMap<u32, Walk> = BTreeMap::new();
    for (&segment, &epoch) in numbers {
        let reader = match segments.get(segment) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => PageReader::new(file?)?,
        };
        let is_ours = |h: &SegmentHeader| h.uuid == uuid && h.segment == segment;
        let first = read_header_at(&reader, 0).ok().filter(|(h, _)| is_ours(h));
        let copies = first.as_ref().map_or(1..reader.pages, |(h, _)| {
            let at = h.data_start_page() / 2;
            at..at + 1
        });
        let second =
            copies.filter_map(|page| read_header_at(&reader, page).ok()).find(|(h, _)| is_ours(h));
        let is_whole =
            first.is_some() && first.as_ref().map(|f| f.0) == second.as_ref().map(|s| s.0);
        let Some((header, _)) = first.or(second) else {
            findings.push(Finding {
                severity: Severity::Damaged,
                message: format!("segment {segment:08x} (epoch {epoch}): neither header is intact"),
            });
            continue;
        };
        if !is_whole {
            findings.push(Finding {
                severity: Severity::Degraded,
                message: format!(
                    "segment {segment:08x} (epoch {epoch}): one of two headers is gone"
                ),
            });
        }
        let limit = match header.merged {
            Some(merged) => u64::from(merged.end_page),
            None if segment == end.segment => end.page,
            None => reader.pages,
        };
        found.insert(*header.places().start(), Walk { reader, header, limit });
    }
    close_each(&mut found, findings);
    Ok(found.into_values().collect())
}

/// Where each ends, as the one after it tells. `found` has them by the first number each stands for.
fn close_each(found: &mut BTreeMap<u32, Walk>, findings: &mut Vec<Finding>) {
    let headers: Vec<SegmentHeader> = found.values().map(|walk| walk.header).collect();
    for (at, header) in headers.iter().enumerate() {
        let previous = header.previous_segment;
        let before = found.range_mut(..=previous).next_back().map(|(_, walk)| walk);
        match before.filter(|walk| walk.header.places().contains(&previous)) {
            // A merged one says itself where it ends.
            Some(before) if before.header.merged.is_some() => {}
            Some(before) => before.limit = u64::from(header.previous_end_page),
            None if at == 0 => {}
            None => findings.push(Finding {
                severity: Severity::Damaged,
                message: format!(
                    "segment {previous:08x}, which {:08x} follows, is missing or has no header",
                    header.segment
                ),
            }),
        }
    }
}

impl Walk {
    /// Its number.
    pub fn segment(&self) -> u32 {
        self.header.segment
    }

    /// Pages of the segment.
    pub fn pages(&self) -> u64 {
        self.limit.min(self.reader.pages)
    }

    /// Look at both copies of every batch; each descriptor of payload goes to `preserved` with the
    /// page of that.
    pub fn verify(
        &self,
        block_size: u64,
        findings: &mut Vec<Finding>,
        mut preserved: impl FnMut(&Descriptor, u64),
    ) {
        let (segment, epoch) = (self.header.segment, self.header.epoch);
        let mut cursor = Cursor {
            reader: &self.reader,
            uuid: self.header.uuid,
            epoch,
            expected: self.header.first_batch,
            page: self.header.data_start_page(),
            limit: self.pages(),
        };
        let mut damaged_at = |page: u64| {
            findings.push(Finding {
                severity: Severity::Damaged,
                message: format!(
                    "segment {segment:08x} (epoch {epoch}), byte {}: a batch of records is gone",
                    page * PAGE
                ),
            });
        };
        let mut single = Vec::new();
        while cursor.page < cursor.limit {
            let start = cursor.page;
            match cursor.next_batch() {
                Step::Batch(header, descriptors) => {
                    if !self.is_there_twice(start, &header, &descriptors) {
                        single.push(start);
                    }
                    let mut page = start + u64::from(header.head_pages);
                    for descriptor in &descriptors {
                        if descriptor.kind == super::format::Kind::Preserve {
                            preserved(descriptor, page);
                            page += block_size / PAGE;
                        }
                    }
                }
                Step::Damage => damaged_at(start),
                Step::End => break,
            }
        }
        if cursor.page < self.limit {
            damaged_at(cursor.page);
        }
        findings.extend(single.into_iter().map(|page| Finding {
            severity: Severity::Degraded,
            message: format!(
                "segment {segment:08x} (epoch {epoch}), byte {}: one of two copies of a batch's \
                 records is gone",
                page * PAGE
            ),
        }));
    }

    fn is_there_twice(
        &self,
        start: u64,
        header: &super::format::BatchHeader,
        descriptors: &[Descriptor],
    ) -> bool {
        let pages = u64::from(header.head_pages);
        let tail = start + header.total_pages() - pages;
        [(false, start), (true, tail)].into_iter().all(|(is_tail, page)| {
            let Ok(bytes) = self.reader.pages(page, pages) else { return false };
            let found = super::format::BatchHeader::decode(is_tail, &bytes);
            let is_equal = found.as_ref() == Some(header);
            is_equal && header.descriptors(&bytes).as_deref() == Some(descriptors)
        })
    }
}
