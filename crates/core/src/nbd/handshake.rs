//! The handshake: the client's flags, then options, until one of them starts the transmission
//! phase.
//!
//! Each option is taken whole (its data has at most 64 KiB) and must be consumed exactly; what does
//! not parse or leaves bytes over is `ERR_INVALID` and changes nothing, and the stream stays in
//! step.

use std::sync::Arc;

use super::reply::{Output, ReplyStyle};
use super::transmission::{Terms, told_block_sizes};
use super::wire::{self, Cursor, export_flag, handshake_flag, info, option, option_reply};
use crate::export::{BlockSizes, Export};

/// Data of one option. No honest option comes near; larger ones only cost memory and time.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options of one handshake, beyond those for listing. Real clients send fewer than ten.
const OPTIONS_MAX: usize = 64;
/// More options allowed for each export, because clients that list ask about each over one
/// connection.
const OPTIONS_PER_EXPORT: usize = 4;
/// Contexts one connection may select: each adds a chunk to every status reply.
const CONTEXTS_MAX: usize = 16;
/// The context every export has.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";

/// An export as a client may find it.
#[derive(Clone)]
pub struct Found {
    /// The name it is registered under.
    pub name: String,
    /// The export.
    pub export: Arc<dyn Export>,
}

/// What the handshake asks of the server that runs it.
pub trait Directory {
    /// All exports.
    fn list(&self) -> Vec<Found>;

    /// The export of this name; the empty name means the default.
    fn find(&self, name: &str) -> Option<Found>;

    /// The same, to be used from now on by this connection, until that ends.
    fn attach(&self, name: &str) -> Option<Found>;

    /// True once the server finishes what it has and takes nothing new.
    fn is_stopping(&self) -> bool;
}

/// What the client and the server agreed on.
#[derive(Clone)]
pub struct Agreed {
    /// What is served.
    pub export: Arc<dyn Export>,
    /// How requests are judged.
    pub terms: Terms,
    /// Names of the selected metadata contexts; the id of each is its index plus one.
    pub contexts: Vec<String>,
}

/// What became of the bytes.
pub enum Outcome {
    /// That many bytes are needed in all before anything can happen.
    Need(usize),
    /// That many bytes are done with.
    Continue(usize),
    /// The same, and the next byte belongs to the transmission phase.
    Enter(usize, Box<Agreed>),
    /// Send what is written, then close.
    Close,
}

/// The state of one handshake.
#[derive(Default)]
pub struct Handshake {
    has_client_flags: bool,
    no_zeroes: bool,
    style: ReplyStyle,
    option_count: usize,
    selection: Option<Selection>,
}

struct Selection {
    export_name: String,
    contexts: Vec<String>,
}

/// The first bytes a client gets.
pub fn put_greeting(out: &mut Output) {
    out.put_u64(wire::MAGIC_GREETING);
    out.put_u64(wire::MAGIC_OPTION);
    out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
}

/// What went wrong with one option: the reply type, and a sentence for people.
type OptionError = (u32, &'static str);

const MALFORMED: OptionError = (option_reply::ERR_INVALID, "the option data is malformed");
const HAS_DATA: OptionError = (option_reply::ERR_INVALID, "this option has no data");
const UNKNOWN_EXPORT: OptionError = (option_reply::ERR_UNKNOWN, "no such export");

impl Handshake {
    /// Take the next message off the front of `input`.
    pub fn advance(
        &mut self,
        input: &[u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Outcome {
        if !self.has_client_flags {
            return self.take_client_flags(input);
        }
        let mut cursor = Cursor(input);
        let (magic, kind, data_bytes) = match (cursor.u64(), cursor.u32(), cursor.u32()) {
            (Some(magic), _, _) if magic != wire::MAGIC_OPTION => return Outcome::Close,
            (Some(magic), Some(kind), Some(data_bytes)) => (magic, kind, data_bytes),
            _ => return Outcome::Need(wire::OPTION_HEADER_BYTES),
        };
        debug_assert_eq!(magic, wire::MAGIC_OPTION);
        if data_bytes > OPTION_BYTES_MAX {
            if kind != option::EXPORT_NAME {
                put_error(out, kind, (option_reply::ERR_TOO_BIG, "the option data is too long"));
            }
            return Outcome::Close;
        }
        let data_length = usize::try_from(data_bytes).expect("checked against 64 KiB");
        let message_bytes = wire::OPTION_HEADER_BYTES + data_length;
        let Some(data) = cursor.take(data_length) else {
            return Outcome::Need(message_bytes);
        };
        self.option_count += 1;
        if self.option_count > OPTIONS_MAX {
            let allowed = OPTIONS_MAX + OPTIONS_PER_EXPORT * directory.list().len();
            if self.option_count > allowed {
                return Outcome::Close;
            }
        }
        self.take_option(kind, data, message_bytes, directory, out)
    }

    fn take_client_flags(&mut self, input: &[u8]) -> Outcome {
        let Some(flags) = Cursor(input).u32() else {
            return Outcome::Need(4);
        };
        let fixed_newstyle = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        if flags & !(fixed_newstyle | no_zeroes) != 0 {
            return Outcome::Close;
        }
        self.has_client_flags = true;
        self.no_zeroes = flags & no_zeroes != 0;
        Outcome::Continue(4)
    }

    fn take_option(
        &mut self,
        kind: u32,
        data: &[u8],
        message_bytes: usize,
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Outcome {
        match kind {
            option::ABORT => {
                put_reply(out, kind, option_reply::ACK, &[]);
                return Outcome::Close;
            }
            option::EXPORT_NAME => {
                return match self.export_name(data, directory, out) {
                    Some(agreed) => Outcome::Enter(message_bytes, Box::new(agreed)),
                    None => Outcome::Close,
                };
            }
            _ => {}
        }
        // Replies of an option that fails half-way are taken back: an error stands alone.
        let start = out.len();
        let result = if directory.is_stopping() {
            Err((option_reply::ERR_SHUTDOWN, "the server is stopping"))
        } else {
            match kind {
                option::GO => match self.info(kind, data, directory, out) {
                    Ok(agreed) => {
                        put_reply(out, kind, option_reply::ACK, &[]);
                        return Outcome::Enter(message_bytes, Box::new(agreed));
                    }
                    Err(error) => Err(error),
                },
                option::INFO => self.info(kind, data, directory, out).map(|_| ()),
                option::LIST => list(data, directory, out),
                option::STRUCTURED_REPLY => self.structured_reply(data),
                option::EXTENDED_HEADERS => self.extended_headers(data),
                option::LIST_META_CONTEXT => self.list_contexts(data, directory, out),
                option::SET_META_CONTEXT => self.set_contexts(data, directory, out),
                option::STARTTLS if !data.is_empty() => Err(HAS_DATA),
                option::STARTTLS => Err((option_reply::ERR_POLICY, "TLS is not configured")),
                _ => Err((option_reply::ERR_UNSUP, "unknown option")),
            }
        };
        match result {
            Ok(()) => put_reply(out, kind, option_reply::ACK, &[]),
            Err(error) => {
                out.truncate(start);
                put_error(out, kind, error);
            }
        }
        Outcome::Continue(message_bytes)
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), OptionError> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        if self.style == ReplyStyle::Extended {
            return Err((option_reply::ERR_EXT_HEADER_REQD, "extended headers are agreed already"));
        }
        self.style = ReplyStyle::Structured;
        Ok(())
    }

    fn extended_headers(&mut self, data: &[u8]) -> Result<(), OptionError> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        self.style = ReplyStyle::Extended;
        Ok(())
    }

    /// The way of old clients: no error can be sent, so whatever is wrong closes the connection.
    fn export_name(
        &mut self,
        data: &[u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Option<Agreed> {
        if directory.is_stopping() || self.style == ReplyStyle::Extended {
            return None;
        }
        let name = checked_name(data).ok()?;
        let agreed = self.agree(name, &directory.attach(name)?);
        out.put_u64(agreed.terms.size_bytes);
        out.put_u16(export_flags(&agreed.terms));
        if !self.no_zeroes {
            out.put(&[0; 124]);
        }
        Some(agreed)
    }

    fn agree(&mut self, name: &str, found: &Found) -> Agreed {
        let contexts = match self.selection.take() {
            Some(selection) if selection.export_name == name => selection.contexts,
            _ => Vec::new(),
        };
        let mut terms = terms_of(found.export.as_ref(), self.style);
        terms.context_count = contexts.len();
        Agreed { export: Arc::clone(&found.export), terms, contexts }
    }

    /// INFO and GO: the same but for what follows; so an INFO computes what a GO would, and both
    /// answer alike.
    fn info(
        &mut self,
        kind: u32,
        data: &[u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Result<Agreed, OptionError> {
        let mut cursor = Cursor(data);
        let name = cursor.string().ok_or(MALFORMED)?;
        let count = usize::from(cursor.u16().ok_or(MALFORMED)?);
        if cursor.0.len() != 2 * count {
            return Err(MALFORMED);
        }
        let wants = |item: u16| cursor.0.chunks_exact(2).any(|id| *id == item.to_be_bytes());
        let name = checked_name(name)?;
        let is_go = kind == option::GO;
        let found = if is_go { directory.attach(name) } else { directory.find(name) };
        let found = found.ok_or(UNKNOWN_EXPORT)?;

        let terms = terms_of(found.export.as_ref(), self.style);
        let mut item = Output::default();
        item.put_u16(info::EXPORT);
        item.put_u64(terms.size_bytes);
        item.put_u16(export_flags(&terms));
        put_reply(out, kind, option_reply::INFO, item.written());

        let BlockSizes { minimum, preferred, maximum } = terms.block_sizes;
        item.clear();
        item.put_u16(info::BLOCK_SIZE);
        item.put_u32(minimum);
        item.put_u32(preferred);
        item.put_u32(maximum);
        put_reply(out, kind, option_reply::INFO, item.written());

        if wants(info::NAME) {
            item.clear();
            item.put_u16(info::NAME);
            item.put(found.name.as_bytes());
            put_reply(out, kind, option_reply::INFO, item.written());
        }
        if wants(info::DESCRIPTION) {
            item.clear();
            item.put_u16(info::DESCRIPTION);
            item.put(clipped(&found.export.description()).as_bytes());
            put_reply(out, kind, option_reply::INFO, item.written());
        }
        if is_go {
            return Ok(self.agree(name, &found));
        }
        Ok(Agreed { export: found.export, terms, contexts: Vec::new() })
    }

    fn list_contexts(
        &self,
        data: &[u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Result<(), OptionError> {
        let (found, queries) = self.parse_contexts(data, directory)?;
        let matches = |context: &str| {
            queries.is_empty()
                || queries.iter().any(|query| {
                    *query == context.as_bytes()
                        || (query.len() > 1
                            && query.ends_with(b":")
                            && context.as_bytes().starts_with(query))
                })
        };
        for context in offered_contexts(found.export.as_ref()) {
            if matches(&context) {
                put_context(out, option::LIST_META_CONTEXT, 0, &context);
            }
        }
        Ok(())
    }

    /// Replaces the selection, also when it fails.
    fn set_contexts(
        &mut self,
        data: &[u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Result<(), OptionError> {
        self.selection = None;
        let (found, queries) = self.parse_contexts(data, directory)?;
        let mut contexts = offered_contexts(found.export.as_ref());
        contexts.retain(|context| queries.contains(&context.as_bytes()));
        if contexts.len() > CONTEXTS_MAX {
            return Err((option_reply::ERR_TOO_BIG, "at most 16 contexts at a time"));
        }
        for (id, context) in (1..).zip(&contexts) {
            put_context(out, option::SET_META_CONTEXT, id, context);
        }
        let export_name = Cursor(data).string().ok_or(MALFORMED)?;
        let export_name = checked_name(export_name)?.to_owned();
        self.selection = Some(Selection { export_name, contexts });
        Ok(())
    }

    fn parse_contexts<'a>(
        &self,
        data: &'a [u8],
        directory: &dyn Directory,
    ) -> Result<(Found, Vec<&'a [u8]>), OptionError> {
        if !self.style.is_chunked() {
            return Err((option_reply::ERR_INVALID, "agree on structured replies first"));
        }
        let mut cursor = Cursor(data);
        let name = cursor.string().ok_or(MALFORMED)?;
        let count = cursor.u32().ok_or(MALFORMED)?;
        // Grows with what is really there: 64 KiB hold at most 16 Ki queries, whatever `count`
        // says.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(cursor.string().ok_or(MALFORMED)?);
        }
        if !cursor.is_empty() {
            return Err(MALFORMED);
        }
        let found = directory.find(checked_name(name)?).ok_or(UNKNOWN_EXPORT)?;
        Ok((found, queries))
    }
}

fn list(data: &[u8], directory: &dyn Directory, out: &mut Output) -> Result<(), OptionError> {
    if !data.is_empty() {
        return Err(HAS_DATA);
    }
    for found in directory.list() {
        let mut item = Output::default();
        put_string(&mut item, &found.name);
        item.put(clipped(&found.export.description()).as_bytes());
        put_reply(out, option::LIST, option_reply::SERVER, item.written());
    }
    Ok(())
}

fn terms_of(export: &dyn Export, style: ReplyStyle) -> Terms {
    Terms {
        style,
        size_bytes: export.size_bytes(),
        is_read_only: export.is_read_only(),
        block_sizes: told_block_sizes(export.block_sizes()),
        context_count: 0,
    }
}

fn export_flags(terms: &Terms) -> u16 {
    use export_flag::{
        CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH,
        SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
    };
    let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
    if terms.is_read_only {
        flags |= READ_ONLY;
    } else {
        flags |= SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO;
    }
    if terms.style.is_chunked() {
        flags |= SEND_DF;
    }
    flags
}

fn offered_contexts(export: &dyn Export) -> Vec<String> {
    let mut contexts = vec![CONTEXT_ALLOCATION.to_owned()];
    for context in export.contexts() {
        if !contexts.contains(&context) {
            contexts.push(context);
        }
    }
    contexts
}

fn checked_name(name: &[u8]) -> Result<&str, OptionError> {
    if name.len() > wire::STRING_BYTES_MAX {
        return Err((option_reply::ERR_INVALID, "the export name is too long"));
    }
    // A name that is not UTF-8 cannot be one of ours.
    std::str::from_utf8(name).map_err(|_| UNKNOWN_EXPORT)
}

/// As much of a text as the protocol lets a string have.
fn clipped(text: &str) -> &str {
    let mut end = text.len().min(wire::STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_string(out: &mut Output, text: &str) {
    out.put_u32(u32::try_from(text.len()).expect("names are at most 4096 bytes"));
    out.put(text.as_bytes());
}

fn put_reply(out: &mut Output, kind: u32, reply: u32, data: &[u8]) {
    out.put_u64(wire::MAGIC_OPTION_REPLY);
    out.put_u32(kind);
    out.put_u32(reply);
    out.put_u32(u32::try_from(data.len()).expect("replies are a few KiB"));
    out.put(data);
}

fn put_error(out: &mut Output, kind: u32, (reply, message): OptionError) {
    put_reply(out, kind, reply, message.as_bytes());
}

fn put_context(out: &mut Output, kind: u32, id: u32, name: &str) {
    let mut item = Output::default();
    item.put_u32(id);
    item.put(name.as_bytes());
    put_reply(out, kind, option_reply::META_CONTEXT, item.written());
}
