//! The NBD session as bytes in, bytes out: one test for each rule of the protocol that clients rely
//! on.

#[path = "../examples/serve_memory/memory.rs"]
mod memory;

use std::sync::Arc;

use memory::MemoryDisk;
use proptest::prelude::*;
use stillblock_core::export::{BlockSizes, Export, ExportError, StatusExtent, ZeroRequest};
use stillblock_core::nbd::handshake::{Directory, Found};
use stillblock_core::nbd::reply::Output;
use stillblock_core::nbd::session::{Session, Step};
use stillblock_core::nbd::wire::{
    self, chunk, command, command_flag, export_flag, info, option, option_reply,
};
use stillblock_core::nbd::{Patience, execute};

const SIZE: u64 = 1 << 20;

/// A huge disk that holds nothing: for ranges no memory has, contexts, and a minimum block size.
struct Strange {
    size_bytes: u64,
    minimum: u32,
    contexts: usize,
}

impl Export for Strange {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes { minimum: self.minimum, preferred: 4096, maximum: 1 << 30 }
    }
    fn description(&self) -> String {
        "ü".repeat(4000)
    }
    fn try_read(&self, _: u64, _: &mut [u8]) -> Result<bool, ExportError> {
        Err(ExportError::Io)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
        Err(ExportError::Io)
    }
    fn write(&self, _: u64, _: &[u8], _: bool) -> Result<(), ExportError> {
        Err(ExportError::NotSupported)
    }
    fn write_zeroes(&self, _: u64, _: u64, how: ZeroRequest) -> Result<(), ExportError> {
        if how.fast_only { Err(ExportError::NotSupported) } else { Ok(()) }
    }
    fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), ExportError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    fn cache(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        (0..self.contexts).map(|index| format!("x-stillblock:changed:{index}")).collect()
    }
    fn block_status(
        &self,
        context: &str,
        start: u64,
        length: u64,
        _: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        let end = start + length;
        match context {
            "x-stillblock:changed:1" => Ok(vec![]),
            _ => Ok(vec![StatusExtent { start, end, flags: 1 }]),
        }
    }
}

struct Shelf {
    exports: Vec<Found>,
    is_stopping: bool,
}

impl Directory for Shelf {
    fn list(&self) -> Vec<Found> {
        self.exports.clone()
    }
    fn find(&self, name: &str) -> Option<Found> {
        let name = if name.is_empty() { "disk" } else { name };
        self.exports.iter().find(|found| found.name == name).cloned()
    }
    fn attach(&self, name: &str) -> Option<Found> {
        self.find(name)
    }
    fn is_stopping(&self) -> bool {
        self.is_stopping
    }
}

fn shelf() -> Shelf {
    let pattern: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).expect("< 251")).collect();
    let found = |name: &str, export: Arc<dyn Export>| Found { name: name.to_owned(), export };
    let exports = vec![
        found("disk", Arc::new(MemoryDisk::new(pattern, false))),
        found("frozen", Arc::new(MemoryDisk::new(vec![0; 4096], true))),
        found("huge", Arc::new(Strange { size_bytes: 1 << 62, minimum: 512, contexts: 3 })),
        found("many", Arc::new(Strange { size_bytes: 4096, minimum: 1, contexts: 40 })),
    ];
    Shelf { exports, is_stopping: false }
}

/// What a conversation came to.
#[derive(Debug, PartialEq, Eq)]
struct Talk {
    replies: Vec<u8>,
    is_open: bool,
}

/// Feed pieces as a connection does: keep what is not consumed, execute inline.
fn talk_in_pieces<'a>(shelf: &Shelf, pieces: impl Iterator<Item = &'a [u8]>) -> Talk {
    let mut out = Output::default();
    let mut session = Session::new(&mut out);
    let mut inbox: Vec<u8> = Vec::new();
    for piece in pieces {
        inbox.extend_from_slice(piece);
        loop {
            let consumed = match session.advance(&inbox, shelf, &mut out) {
                Step::Need(bytes) => {
                    assert!(bytes > inbox.len(), "a message that is there must be taken");
                    assert!(bytes <= (32 << 20) + 32, "more than any acceptable message");
                    break;
                }
                Step::Continue(consumed) | Step::Enter(consumed) => consumed,
                Step::Request(consumed, request) => {
                    let agreed = session.agreed().expect("entered");
                    assert!(execute(agreed, &request, Patience::AsNeeded, &mut out));
                    consumed
                }
                Step::Disconnect | Step::Close => {
                    return Talk { replies: out.written().to_vec(), is_open: false };
                }
            };
            inbox.drain(..consumed);
        }
    }
    Talk { replies: out.written().to_vec(), is_open: true }
}

fn talk(input: &[u8]) -> Talk {
    talk_in_pieces(&shelf(), std::iter::once(input))
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];

fn opt(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::MAGIC_OPTION.to_be_bytes().to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
    bytes.extend(data);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).expect("short").to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn go_data(name: &str, items: &[u16]) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend(u16::try_from(items.len()).expect("few").to_be_bytes());
    bytes.extend(items.iter().flat_map(|item| item.to_be_bytes()));
    bytes
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend(u32::try_from(queries.len()).expect("few").to_be_bytes());
    bytes.extend(queries.iter().flat_map(|query| text(query)));
    bytes
}

fn request(kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::MAGIC_REQUEST.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(0xc00c_1e00_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn request_extended(kind: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::MAGIC_REQUEST_EXTENDED.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(0xc00c_1e00_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A reply to an option: option, reply type, data.
type OptionReply = (u32, u32, Vec<u8>);

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn number32(bytes: &[u8]) -> u32 {
    u32::try_from(number(bytes)).expect("four bytes")
}

fn length(bytes: &[u8]) -> usize {
    usize::try_from(number(bytes)).expect("a length")
}

/// Option replies after the greeting, up to the first ACK of a GO; and what is left.
fn option_replies(replies: &[u8]) -> (Vec<OptionReply>, &[u8]) {
    let mut rest = &replies[18..];
    let mut found = Vec::new();
    while rest.len() >= 20 && number(&rest[..8]) == wire::MAGIC_OPTION_REPLY {
        let end = 20 + length(&rest[16..20]);
        let reply = (number32(&rest[8..12]), number32(&rest[12..16]), rest[20..end].to_vec());
        rest = &rest[end..];
        found.push(reply);
    }
    (found, rest)
}

/// Reply types to these options.
fn types(options: &[Vec<u8>]) -> (Vec<u32>, bool) {
    let mut input = FLAGS.to_vec();
    input.extend(options.concat());
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    (replies.iter().map(|reply| reply.1).collect(), talk.is_open)
}

#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Simple(u32, Vec<u8>),
    Chunk { flags: u16, kind: u16, data: Vec<u8> },
}

fn parse_replies(mut rest: &[u8], simple_data: usize) -> Vec<Reply> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let magic = number32(&rest[..4]);
        let flags = u16::try_from(number(&rest[4..6])).expect("two bytes");
        let kind = u16::try_from(number(&rest[6..8])).expect("two bytes");
        let (reply, end) = if magic == wire::MAGIC_REPLY_SIMPLE {
            let error = number32(&rest[4..8]);
            let end = 16 + if error == 0 { simple_data } else { 0 };
            assert_eq!(number(&rest[8..16]), 0xc00c_1e00);
            (Reply::Simple(error, rest[16..end].to_vec()), end)
        } else {
            let start = if magic == wire::MAGIC_REPLY_EXTENDED { 32 } else { 20 };
            let length_at = if start == 32 { 24..32 } else { 16..20 };
            let end = start + length(&rest[length_at]);
            assert_eq!(number(&rest[8..16]), 0xc00c_1e00);
            (Reply::Chunk { flags, kind, data: rest[start..end].to_vec() }, end)
        };
        found.push(reply);
        rest = &rest[end..];
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

fn opening(mode: Mode, name: &str, contexts: &[&str]) -> Vec<u8> {
    let mut input = FLAGS.to_vec();
    match mode {
        Mode::Simple => {}
        Mode::Structured => input.extend(opt(option::STRUCTURED_REPLY, b"")),
        Mode::Extended => input.extend(opt(option::EXTENDED_HEADERS, b"")),
    }
    if !contexts.is_empty() {
        input.extend(opt(option::SET_META_CONTEXT, &meta_data(name, contexts)));
    }
    input.extend(opt(option::GO, &go_data(name, &[])));
    input
}

fn ask_with(mode: Mode, name: &str, contexts: &[&str], requests: &[u8], data: usize) -> Vec<Reply> {
    let mut input = opening(mode, name, contexts);
    input.extend(requests);
    let talk = talk(&input);
    assert!(talk.is_open, "the connection must survive");
    parse_replies(option_replies(&talk.replies).1, data)
}

fn ask(mode: Mode, name: &str, requests: &[u8]) -> Vec<Reply> {
    ask_with(mode, name, &[], requests, 0)
}

fn error_of(reply: &Reply) -> u32 {
    match reply {
        Reply::Simple(error, _) => *error,
        Reply::Chunk { kind: chunk::ERROR, data, .. } => number32(&data[..4]),
        Reply::Chunk { .. } => 0,
    }
}

/// The error of one request without payload, in all three modes alike.
fn error(name: &str, kind: u16, flags: u16, offset: u64, length: u32) -> u32 {
    let compact = request(kind, flags, offset, length, b"");
    let extended = request_extended(kind, flags, offset, u64::from(length), b"");
    let errors = [
        error_of(&ask(Mode::Simple, name, &compact)[0]),
        error_of(&ask(Mode::Structured, name, &compact)[0]),
        error_of(&ask(Mode::Extended, name, &extended)[0]),
    ];
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    errors[0]
}

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

#[test]
fn greeting_offers_fixed_newstyle_and_no_zeroes_and_nothing_else() {
    let talk = talk(b"");
    assert_eq!(talk.replies, b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    assert!(!talk(&[0, 0, 0, 4]).is_open);
    assert!(!talk(&[0x80, 0, 0, 3]).is_open);
    assert!(talk(&[0, 0, 0, 0]).is_open);
}

#[test]
fn unknown_options_are_answered_and_skipped() {
    let (types, is_open) = types(&[opt(4, b"junk"), opt(77, &[7; 300]), opt(option::LIST, b"")]);
    assert_eq!(types[..2], [option_reply::ERR_UNSUP, option_reply::ERR_UNSUP]);
    assert_eq!(types[2..], [2, 2, 2, 2, 1]);
    assert!(is_open);
}

#[test]
fn wrong_option_magic_ends_the_connection() {
    let mut input = FLAGS.to_vec();
    input.extend([0; 16]);
    assert!(!talk(&input).is_open);
}

#[test]
fn option_data_over_64_kib_is_too_big_and_ends_the_connection_before_it_arrives() {
    let mut input = FLAGS.to_vec();
    input.extend(&opt(option::GO, &vec![0; 65537])[..16]);
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    assert_eq!(replies[0].1, option_reply::ERR_TOO_BIG);
    assert!(!talk.is_open);
}

#[test]
fn abort_is_acknowledged_whatever_data_it_has() {
    assert_eq!(types(&[opt(option::ABORT, b"bye")]), (vec![option_reply::ACK], false));
}

#[test]
fn options_without_data_refuse_data() {
    for kind in [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS]
    {
        assert_eq!(types(&[opt(kind, b"x")]), (vec![option_reply::ERR_INVALID], true));
    }
}

#[test]
fn starttls_is_refused_by_policy() {
    assert_eq!(types(&[opt(option::STARTTLS, b"")]), (vec![option_reply::ERR_POLICY], true));
}

#[test]
fn a_65th_option_is_let_pass_only_as_far_as_exports_explain_it() {
    let options = |count: usize| vec![opt(option::LIST, b"x"); count];
    assert!(types(&options(64 + 4 * 4)).1);
    assert!(!types(&options(64 + 4 * 4 + 1)).1);
}

#[test]
fn export_name_gets_124_zeroes_unless_agreed_otherwise() {
    let ask = |flags: u8| {
        let mut input = vec![0, 0, 0, flags];
        input.extend(opt(option::EXPORT_NAME, b"disk"));
        input.extend(request(command::READ, 0, 1, 4, b""));
        talk(&input).replies
    };
    assert_eq!(ask(3).len(), 18 + 10 + 16 + 4);
    let padded = ask(1);
    assert_eq!(padded.len(), 18 + 10 + 124 + 16 + 4);
    assert_eq!(number(&padded[18..26]), SIZE);
    assert_eq!(padded[padded.len() - 4..], [1, 2, 3, 4]);
}

#[test]
fn export_name_that_cannot_be_served_ends_the_connection_without_a_word() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::EXPORT_NAME, b"nope"));
    assert_eq!(talk(&input).replies.len(), 18);
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::EXTENDED_HEADERS, b""));
    input.extend(opt(option::EXPORT_NAME, b"disk"));
    assert!(!talk(&input).is_open);
}

#[test]
fn info_and_go_say_the_same() {
    let items = [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 4711];
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::STRUCTURED_REPLY, b""));
    input.extend(opt(option::INFO, &go_data("", &items)));
    input.extend(opt(option::GO, &go_data("", &items)));
    let talk = talk(&input);
    let (replies, rest) = option_replies(&talk.replies);
    assert!(rest.is_empty(), "no padding after GO");
    let of = |kind| {
        replies.iter().filter(move |reply| reply.0 == kind).map(|reply| (reply.1, reply.2.clone()))
    };
    assert!(of(option::INFO).eq(of(option::GO)));
    assert_eq!(of(option::GO).count(), 5);
    assert_eq!(replies[1].2[..10], [&[0, 0][..], &SIZE.to_be_bytes()].concat());
    assert!(replies.iter().any(|reply| reply.2 == b"\x00\x01disk"));
}

#[test]
fn block_sizes_are_told_unasked_and_within_the_protocol() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::GO, &go_data("huge", &[])));
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    let item = replies.iter().find(|reply| reply.2.starts_with(&[0, 3])).expect("told");
    assert_eq!(number(&item.2[2..6]), 512);
    assert_eq!(number(&item.2[10..14]), 32 << 20);
}

#[test]
fn descriptions_are_cut_at_4096_bytes_within_a_character() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::INFO, &go_data("huge", &[info::DESCRIPTION])));
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    let item = replies.iter().find(|reply| reply.2.starts_with(&[0, 2])).expect("told");
    assert_eq!(std::str::from_utf8(&item.2[2..]).expect("whole characters").len(), 4096);
}

#[test]
fn unknown_export_gets_no_info_and_never_its_name_back() {
    let name = "n".repeat(4096);
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::GO, &go_data(&name, &[])));
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0].1, option_reply::ERR_UNKNOWN);
    assert!(replies[0].2.len() < 100);
    assert!(talk.is_open);
}

#[test]
fn names_over_4096_bytes_are_invalid() {
    let name = "n".repeat(4097);
    assert_eq!(types(&[opt(option::GO, &go_data(&name, &[]))]).0, [option_reply::ERR_INVALID]);
}

#[test]
fn lies_about_lengths_in_go_are_invalid_and_the_stream_stays_in_step() {
    let good = go_data("disk", &[1, 2]);
    let mut lies = vec![good[..good.len() - 1].to_vec(), [&good[..], b"x"].concat(), vec![]];
    for claimed in [0_u32, 3, 5, 9, u32::MAX] {
        let mut lie = good.clone();
        lie[..4].copy_from_slice(&claimed.to_be_bytes());
        lies.push(lie);
    }
    for lie in lies {
        let (types, is_open) = types(&[opt(option::GO, &lie), opt(option::STRUCTURED_REPLY, b"")]);
        assert_eq!(types, [option_reply::ERR_INVALID, option_reply::ACK], "{lie:?}");
        assert!(is_open);
    }
}

#[test]
fn leftover_bytes_and_lies_in_context_queries_are_invalid() {
    let good = meta_data("disk", &["base:allocation"]);
    let mut lies = vec![[&good[..], b"x"].concat(), good[..good.len() - 1].to_vec(), vec![]];
    for at in [0, 8, 12] {
        for claimed in [0_u32, 2, u32::MAX] {
            let mut lie = good.clone();
            lie[at..at + 4].copy_from_slice(&claimed.to_be_bytes());
            lies.push(lie);
        }
    }
    for lie in lies {
        for kind in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let (types, is_open) = types(&[opt(option::STRUCTURED_REPLY, b""), opt(kind, &lie)]);
            assert_eq!(types, [option_reply::ACK, option_reply::ERR_INVALID], "{lie:?}");
            assert!(is_open);
        }
    }
}

#[test]
fn contexts_need_structured_replies() {
    let data = meta_data("disk", &["base:allocation"]);
    for kind in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        assert_eq!(types(&[opt(kind, &data)]).0, [option_reply::ERR_INVALID]);
    }
}

/// Names of the contexts that a query selects or lists.
fn contexts(kind: u32, name: &str, queries: &[&str]) -> Vec<String> {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::STRUCTURED_REPLY, b""));
    input.extend(opt(kind, &meta_data(name, queries)));
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    assert_eq!(replies.last().expect("an end").1, option_reply::ACK);
    let of_contexts = replies.iter().filter(|reply| reply.1 == option_reply::META_CONTEXT);
    of_contexts.map(|reply| String::from_utf8(reply.2[4..].to_vec()).expect("UTF-8")).collect()
}

#[test]
fn listing_contexts_knows_wildcards_and_ignores_unknown_namespaces() {
    let list = |queries: &[&str]| contexts(option::LIST_META_CONTEXT, "huge", queries);
    assert_eq!(list(&[]).len(), 4);
    assert_eq!(list(&["base:"]), ["base:allocation"]);
    assert_eq!(list(&["base:allocation"]), ["base:allocation"]);
    assert_eq!(list(&["x-stillblock:"]).len(), 3);
    assert_eq!(list(&["x-stillblock:changed:"]).len(), 3);
    assert_eq!(list(&["x-stillblock:changed:2"]).len(), 1);
    assert_eq!(list(&["other:", "base:nope", "no-colon", ":", ""]), [""; 0]);
}

#[test]
fn setting_contexts_takes_exact_names_only_and_each_once() {
    let set = |queries: &[&str]| contexts(option::SET_META_CONTEXT, "huge", queries);
    assert_eq!(set(&[]), [""; 0]);
    assert_eq!(set(&["base:", "x-stillblock:", "other:thing"]), [""; 0]);
    assert_eq!(set(&["base:allocation", "base:allocation"]), ["base:allocation"]);
}

#[test]
fn context_ids_are_unique() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::STRUCTURED_REPLY, b""));
    let queries = ["base:allocation", "x-stillblock:changed:0", "x-stillblock:changed:2"];
    input.extend(opt(option::SET_META_CONTEXT, &meta_data("huge", &queries)));
    let talk = talk(&input);
    let (replies, _) = option_replies(&talk.replies);
    let ids: Vec<u64> = replies[1..4].iter().map(|reply| number(&reply.2[..4])).collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn more_than_16_contexts_are_too_many() {
    let names: Vec<String> = (0..17).map(|index| format!("x-stillblock:changed:{index}")).collect();
    let queries: Vec<&str> = names.iter().map(String::as_str).collect();
    let set = |count: usize| {
        let data = meta_data("many", &queries[..count]);
        types(&[opt(option::STRUCTURED_REPLY, b""), opt(option::SET_META_CONTEXT, &data)]).0
    };
    assert_eq!(set(16).len(), 1 + 16 + 1);
    assert_eq!(set(17)[1..], [option_reply::ERR_TOO_BIG]);
}

#[test]
fn a_failed_selection_replaces_the_one_before() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::STRUCTURED_REPLY, b""));
    input.extend(opt(option::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])));
    input.extend(opt(option::SET_META_CONTEXT, &meta_data("nope", &["base:allocation"])));
    input.extend(opt(option::GO, &go_data("disk", &[])));
    input.extend(request(command::BLOCK_STATUS, 0, 0, 4096, b""));
    let talk = talk(&input);
    assert_eq!(error_of(&parse_replies(option_replies(&talk.replies).1, 0)[0]), EINVAL);
}

#[test]
fn contexts_of_another_export_name_do_not_hold() {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::STRUCTURED_REPLY, b""));
    input.extend(opt(option::SET_META_CONTEXT, &meta_data("huge", &["base:allocation"])));
    input.extend(opt(option::GO, &go_data("disk", &[])));
    input.extend(request(command::BLOCK_STATUS, 0, 0, 4096, b""));
    let talk = talk(&input);
    assert_eq!(error_of(&parse_replies(option_replies(&talk.replies).1, 0)[0]), EINVAL);
}

#[test]
fn extended_headers_supersede_structured_replies() {
    let options = [
        opt(option::STRUCTURED_REPLY, b""),
        opt(option::EXTENDED_HEADERS, b""),
        opt(option::STRUCTURED_REPLY, b""),
    ];
    let (ack, again) = (option_reply::ACK, option_reply::ERR_EXT_HEADER_REQD);
    assert_eq!(types(&options).0, [ack, ack, again]);
}

#[test]
fn export_flags_tell_what_is_agreed() {
    let flags = |mode, name| {
        let talk = talk(&opening(mode, name, &[]));
        let (replies, _) = option_replies(&talk.replies);
        let item = replies.iter().find(|reply| reply.2.starts_with(&[0, 0])).expect("told");
        u16::try_from(number(&item.2[10..12])).expect("two bytes")
    };
    assert_eq!(flags(Mode::Simple, "disk") & export_flag::SEND_DF, 0);
    assert_ne!(flags(Mode::Structured, "disk") & export_flag::SEND_DF, 0);
    assert_ne!(flags(Mode::Extended, "disk") & export_flag::SEND_DF, 0);
    for name in ["disk", "frozen"] {
        assert_ne!(flags(Mode::Simple, name) & export_flag::CAN_MULTI_CONN, 0);
    }
    let frozen = flags(Mode::Simple, "frozen");
    assert_ne!(frozen & export_flag::READ_ONLY, 0);
    assert_eq!(frozen & (export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES), 0);
}

#[test]
fn a_stopping_server_errors_options_and_requests() {
    let mut shelf = shelf();
    shelf.is_stopping = true;
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::LIST, b""));
    input.extend(opt(option::ABORT, b""));
    let talk = talk_in_pieces(&shelf, std::iter::once(&input[..]));
    let (replies, _) = option_replies(&talk.replies);
    assert_eq!(replies[0].1, option_reply::ERR_SHUTDOWN);
    assert_eq!(replies[1].1, option_reply::ACK);

    let mut out = Output::default();
    let mut session = Session::new(&mut out);
    shelf.is_stopping = false;
    let input = opening(Mode::Simple, "disk", &[]);
    let mut rest = &input[..];
    while !rest.is_empty() {
        match session.advance(rest, &shelf, &mut out) {
            Step::Continue(bytes) | Step::Enter(bytes) => rest = &rest[bytes..],
            other => panic!("{other:?}"),
        }
    }
    shelf.is_stopping = true;
    out.clear();
    session.advance(&request(command::READ, 0, 0, 512, b""), &shelf, &mut out);
    assert_eq!(parse_replies(out.written(), 0), [Reply::Simple(ESHUTDOWN, vec![])]);
}

#[test]
fn past_the_end_writes_have_no_space_and_the_rest_is_invalid() {
    assert_eq!(error("disk", command::WRITE_ZEROES, 0, SIZE - 1, 2), ENOSPC);
    assert_eq!(error("disk", command::READ, 0, SIZE - 1, 2), EINVAL);
    assert_eq!(error("disk", command::TRIM, 0, SIZE, 1), EINVAL);
    assert_eq!(error("disk", command::CACHE, 0, SIZE, 1), EINVAL);
    let write = request(command::WRITE, 0, SIZE - 1, 2, b"ab");
    assert_eq!(ask(Mode::Simple, "disk", &write), [Reply::Simple(ENOSPC, vec![])]);
}

#[test]
fn sums_that_overflow_are_past_the_end() {
    for offset in [1 << 63, u64::MAX - 1, u64::MAX] {
        assert_eq!(error("disk", command::READ, 0, offset, 2), EINVAL);
        assert_eq!(error("disk", command::WRITE_ZEROES, 0, offset, u32::MAX), ENOSPC);
        assert_eq!(error("disk", command::TRIM, 0, offset, u32::MAX), EINVAL);
        let request = request_extended(command::TRIM, 0, offset, u64::MAX, b"");
        assert_eq!(error_of(&ask(Mode::Extended, "disk", &request)[0]), EINVAL);
    }
}

#[test]
fn a_refused_write_has_its_payload_consumed() {
    let mut requests = request(command::WRITE, 0, SIZE, 5, b"abcde");
    requests.extend(request(command::WRITE, 1 << 9, 0, 3, b"abc"));
    requests.extend(request(command::WRITE, 0, 7, 3, b"abc"));
    let replies = ask(Mode::Simple, "disk", &requests);
    let errors: Vec<u32> = replies.iter().map(error_of).collect();
    assert_eq!(errors, [ENOSPC, EINVAL, 0]);
}

#[test]
fn a_payload_over_the_maximum_is_consumed_and_invalid() {
    let payload = vec![1; (32 << 20) + 1];
    let mut requests = request(command::WRITE, 0, 0, (32 << 20) + 1, &payload);
    requests.extend(request(command::FLUSH, 0, 0, 0, b""));
    let replies = ask(Mode::Simple, "huge", &requests);
    assert_eq!(replies.iter().map(error_of).collect::<Vec<_>>(), [EINVAL, 0]);
}

#[test]
fn an_extended_payload_over_the_maximum_ends_the_connection() {
    let mut input = opening(Mode::Extended, "huge", &[]);
    let flags = command_flag::PAYLOAD_LEN;
    input.extend(request_extended(command::WRITE, flags, 0, (32 << 20) + 1, b""));
    assert!(!talk(&input).is_open);
}

#[test]
fn an_extended_payload_on_another_command_is_consumed_and_invalid() {
    let flags = command_flag::PAYLOAD_LEN;
    let mut requests = request_extended(command::BLOCK_STATUS, flags, 0, 12, &[1; 12]);
    requests.extend(request_extended(command::FLUSH, 0, 0, 0, b""));
    let replies = ask(Mode::Extended, "disk", &requests);
    assert_eq!(replies.iter().map(error_of).collect::<Vec<_>>(), [EINVAL, 0]);
}

/// QEMU 10 sends extended writes without the flag.
#[test]
fn an_extended_write_has_a_payload_even_without_the_flag() {
    for flags in [0, command_flag::PAYLOAD_LEN] {
        let mut requests = request_extended(command::WRITE, flags, 2, 3, b"abc");
        requests.extend(request_extended(command::READ, 0, 1, 5, b""));
        let replies = ask(Mode::Extended, "disk", &requests);
        assert_eq!(error_of(&replies[0]), 0);
        let data = [&1_u64.to_be_bytes()[..], b"\x01abc\x05"].concat();
        assert_eq!(replies[1], Reply::Chunk { flags: 1, kind: chunk::OFFSET_DATA, data });
    }
}

#[test]
fn read_only_exports_refuse_writes_with_eperm() {
    for kind in [command::WRITE_ZEROES, command::TRIM] {
        assert_eq!(error("frozen", kind, 0, 0, 512), EPERM);
    }
    let write = request(command::WRITE, 0, 0, 2, b"ab");
    assert_eq!(ask(Mode::Simple, "frozen", &write), [Reply::Simple(EPERM, vec![])]);
    assert_eq!(error("frozen", command::FLUSH, 0, 0, 0), 0);
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    assert_eq!(error("disk", 8, 0, 0, 0), EINVAL);
    assert_eq!(error("disk", 999, 0, 0, 512), EINVAL);
    assert_eq!(error("disk", command::READ, 1 << 15, 0, 512), EINVAL);
    assert_eq!(error("disk", command::READ, command_flag::NO_HOLE, 0, 512), EINVAL);
    assert_eq!(error("disk", command::TRIM, command_flag::FAST_ZERO, 0, 512), EINVAL);
    assert_eq!(error("disk", command::CACHE, command_flag::DF, 0, 512), EINVAL);
    let df = request(command::READ, command_flag::DF, 0, 512, b"");
    assert_eq!(error_of(&ask(Mode::Simple, "disk", &df)[0]), EINVAL);
    assert_eq!(error_of(&ask(Mode::Structured, "disk", &df)[0]), 0);
}

#[test]
fn fua_is_accepted_on_every_command() {
    for kind in [command::TRIM, command::CACHE, command::WRITE_ZEROES] {
        assert_eq!(error("disk", kind, command_flag::FUA, 0, 512), 0);
    }
    assert_eq!(error("disk", command::FLUSH, command_flag::FUA, 0, 0), 0);
    let read = request(command::READ, command_flag::FUA, 0, 4, b"");
    let replies = ask_with(Mode::Simple, "disk", &[], &read, 4);
    assert_eq!(replies, [Reply::Simple(0, vec![0, 1, 2, 3])]);
}

#[test]
fn a_flush_with_offset_or_length_is_invalid() {
    assert_eq!(error("disk", command::FLUSH, 0, 512, 0), EINVAL);
    assert_eq!(error("disk", command::FLUSH, 0, 0, 512), EINVAL);
}

#[test]
fn requests_below_the_minimum_are_invalid() {
    assert_eq!(error("huge", command::TRIM, 0, 1, 512), EINVAL);
    assert_eq!(error("huge", command::WRITE_ZEROES, 0, 512, 511), EINVAL);
    assert_eq!(error("huge", command::TRIM, 0, 512, 512), 0);
}

#[test]
fn empty_requests_succeed_without_a_disconnect() {
    for kind in [command::TRIM, command::CACHE, command::WRITE_ZEROES, command::READ] {
        assert_eq!(error("disk", kind, 0, 0, 0), 0);
        assert_eq!(error("disk", kind, 0, SIZE, 0), 0);
    }
    let read = request(command::READ, 0, 0, 0, b"");
    let none = Reply::Chunk { flags: 1, kind: chunk::NONE, data: vec![] };
    assert_eq!(ask(Mode::Structured, "disk", &read), [none]);
    let write = request(command::WRITE, 0, 0, 0, b"");
    assert_eq!(ask(Mode::Simple, "disk", &write), [Reply::Simple(0, vec![])]);
}

#[test]
fn only_fast_zeroing_may_be_not_supported() {
    let zero = command::WRITE_ZEROES;
    assert_eq!(error("huge", zero, command_flag::FAST_ZERO, 0, 512), ENOTSUP);
    assert_eq!(error("huge", zero, command_flag::NO_HOLE, 0, 512), 0);
    let write = request(command::WRITE, 0, 0, 512, &[1; 512]);
    assert_eq!(ask(Mode::Simple, "huge", &write), [Reply::Simple(EINVAL, vec![])]);
}

#[test]
fn a_failed_read_sends_no_data_in_any_mode() {
    assert_eq!(error("huge", command::READ, 0, 0, 512), EIO);
}

#[test]
fn reads_over_the_maximum_overflow_where_chunks_could_have_carried_them() {
    let read = request(command::READ, 0, 0, (32 << 20) + 512, b"");
    assert_eq!(error_of(&ask(Mode::Simple, "huge", &read)[0]), EINVAL);
    assert_eq!(error_of(&ask(Mode::Structured, "huge", &read)[0]), EOVERFLOW);
    let read = request_extended(command::READ, 0, 0, 1 << 40, b"");
    assert_eq!(error_of(&ask(Mode::Extended, "huge", &read)[0]), EOVERFLOW);
}

#[test]
fn zeroes_are_read_as_a_hole_unless_unfragmented_data_is_asked_for() {
    let mut requests = request(command::READ, 0, 1024, 512, b"");
    requests.extend(request(command::READ, command_flag::DF, 1024, 512, b""));
    let replies = ask(Mode::Structured, "frozen", &requests);
    let hole = [&1024_u64.to_be_bytes()[..], &512_u32.to_be_bytes()].concat();
    assert_eq!(replies[0], Reply::Chunk { flags: 1, kind: chunk::OFFSET_HOLE, data: hole });
    let data = [&1024_u64.to_be_bytes()[..], &[0; 512]].concat();
    assert_eq!(replies[1], Reply::Chunk { flags: 1, kind: chunk::OFFSET_DATA, data });
    let plain = request(command::READ, 0, 1024, 512, b"");
    let replies = ask_with(Mode::Simple, "frozen", &[], &plain, 512);
    assert_eq!(replies, [Reply::Simple(0, vec![0; 512])]);
}

#[test]
fn extended_replies_repeat_the_offset_of_the_request() {
    let mut input = opening(Mode::Extended, "disk", &[]);
    input.extend(request_extended(command::TRIM, 0, 4096, 512, b""));
    let talk = talk(&input);
    let reply = option_replies(&talk.replies).1;
    assert_eq!(reply.len(), 32);
    assert_eq!(number(&reply[16..24]), 4096);
}

#[test]
fn long_extents_are_split_below_32_bits_and_whole_with_64() {
    let name = &["base:allocation"];
    let compact = request(command::BLOCK_STATUS, 0, 0, 0xffff_fe00, b"");
    let replies = ask_with(Mode::Structured, "huge", name, &compact, 0);
    let Reply::Chunk { flags: 1, kind: chunk::BLOCK_STATUS, data } = &replies[0] else {
        panic!("{replies:?}");
    };
    let lengths: Vec<u64> = data[4..].chunks(8).map(|item| number(&item[..4])).collect();
    assert_eq!(lengths, [0xffff_0000, 0xfe00]);

    let one = request(command::BLOCK_STATUS, command_flag::REQ_ONE, 0, 0xffff_fe00, b"");
    let replies = ask_with(Mode::Structured, "huge", name, &one, 0);
    assert!(matches!(&replies[0], Reply::Chunk { data, .. } if data.len() == 12));

    let long = request_extended(command::BLOCK_STATUS, 0, 512, 1 << 61, b"");
    let replies = ask_with(Mode::Extended, "huge", name, &long, 0);
    let Reply::Chunk { flags: 1, kind: chunk::BLOCK_STATUS_EXT, data } = &replies[0] else {
        panic!("{replies:?}");
    };
    assert_eq!(number(&data[..8]), 1 << 32 | 1);
    assert_eq!(number(&data[8..16]), 1 << 61);
}

#[test]
fn block_status_has_one_chunk_for_each_context() {
    let names = &["base:allocation", "x-stillblock:changed:0"];
    let status = request(command::BLOCK_STATUS, 0, 0, 4096, b"");
    let replies = ask_with(Mode::Structured, "huge", names, &status, 0);
    let flags: Vec<u16> = replies
        .iter()
        .map(|reply| match reply {
            Reply::Chunk { flags, kind: chunk::BLOCK_STATUS, .. } => *flags,
            _ => panic!("{reply:?}"),
        })
        .collect();
    assert_eq!(flags, [0, 1]);
}

/// An export that answers nonsense must not make a client skip what it should copy.
#[test]
fn block_status_that_makes_no_progress_is_an_error_and_nothing_else() {
    let names = &["base:allocation", "x-stillblock:changed:1"];
    let status = request(command::BLOCK_STATUS, 0, 0, 4096, b"");
    let replies = ask_with(Mode::Structured, "huge", names, &status, 0);
    assert_eq!(replies.iter().map(error_of).collect::<Vec<_>>(), [EIO]);
}

#[test]
fn block_status_of_nothing_or_without_context_is_invalid() {
    assert_eq!(error("disk", command::BLOCK_STATUS, 0, 0, 512), EINVAL);
    let empty = request(command::BLOCK_STATUS, 0, 0, 0, b"");
    let replies = ask_with(Mode::Structured, "disk", &["base:allocation"], &empty, 0);
    assert_eq!(replies.iter().map(error_of).collect::<Vec<_>>(), [EINVAL]);
}

#[test]
fn a_wrong_request_magic_ends_the_connection() {
    let mut input = opening(Mode::Simple, "disk", &[]);
    input.extend(request_extended(command::READ, 0, 0, 512, b""));
    assert!(!talk(&input).is_open);
}

/// A conversation with something of everything.
fn conversation(mode: Mode) -> Vec<u8> {
    let mut input = FLAGS.to_vec();
    input.extend(opt(option::LIST, b""));
    input.extend(opt(99, &[1; 40]));
    input.extend(
        &opening(mode, "disk", if mode == Mode::Simple { &[] } else { &["base:allocation"] })[4..],
    );
    for step in 0..6_u32 {
        let offset = u64::from(step) * 1000;
        let payload = vec![u8::try_from(step).expect("few"); 700];
        let any = |kind, flags, offset, length: u32, payload: &[u8]| match mode {
            Mode::Extended => request_extended(kind, flags, offset, u64::from(length), payload),
            Mode::Simple | Mode::Structured => request(kind, flags, offset, length, payload),
        };
        input.extend(any(command::WRITE, command_flag::FUA, offset, 700, &payload));
        input.extend(any(command::READ, 0, offset, 900, b""));
        input.extend(any(command::WRITE, 0, SIZE - 1, 700, &payload));
        input.extend(any(command::BLOCK_STATUS, 0, 0, 100_000, b""));
        input.extend(any(command::WRITE_ZEROES, 0, offset + 300, 5000, b""));
        input.extend(any(command::READ, 0, offset + 300, 5000, b""));
    }
    input
}

#[test]
fn byte_by_byte_gives_what_whole_gives() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let input = conversation(mode);
        let whole = talk(&input);
        assert!(whole.is_open && whole.replies.len() > 10_000);
        assert_eq!(talk_in_pieces(&shelf(), input.chunks(1)), whole);
    }
}

fn split<'a>(input: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.extend([0, input.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| &input[pair[0]..pair[1]]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn splits_make_no_difference(
        mode in prop_oneof![Just(Mode::Simple), Just(Mode::Structured), Just(Mode::Extended)],
        cuts in prop::collection::vec(any::<usize>(), 0..40),
        damage in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut input = conversation(mode);
        if let Some((at, byte)) = damage {
            let at = at.index(input.len());
            input[at] = byte;
        }
        let whole = talk(&input);
        let pieces = split(&input, &cuts);
        prop_assert!(talk_in_pieces(&shelf(), pieces.into_iter()) == whole);
    }

    #[test]
    fn garbage_never_panics(
        has_handshake: bool,
        mode in prop_oneof![Just(Mode::Simple), Just(Mode::Structured), Just(Mode::Extended)],
        parts in prop::collection::vec(
            (0_u32..13, 0_u16..10, any::<u16>(), any::<u64>(), any::<u32>(),
             prop::collection::vec(any::<u8>(), 0..60)), 0..12),
    ) {
        let mut input = FLAGS.to_vec();
        if has_handshake {
            input = opening(mode, "huge", &["base:allocation"]);
        }
        for (kind, command, flags, offset, length, data) in parts {
            if !has_handshake {
                input.extend(opt(kind, &data));
            } else if mode == Mode::Extended {
                let length = u64::from(length);
                input.extend(request_extended(command, flags & 0x3f, offset, length, &data));
            } else {
                input.extend(request(command, flags & 0x1f, offset, length, &data));
            }
        }
        talk(&input);
    }
}
