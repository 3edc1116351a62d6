//! One connection's side of the conversation as a state machine without I/O: bytes in; requests and
//! replies out.
//!
//! The caller owns the bytes. It calls [`Session::advance`] with everything received and not yet
//! consumed, until that asks for more; how the bytes were split on the way makes no difference.

use super::handshake::{self, Agreed, Directory, Handshake, Outcome};
use super::reply::{Output, Refusal, ReplyHead};
use super::transmission::{self, Decoded, Request};
use super::wire::ErrorNumber;

/// What became of the bytes given.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Nothing is consumed; call again with at least this many bytes.
    Need(usize),
    /// Consumed that many bytes, and wrote what reply there is; call again.
    Continue(usize),
    /// The same, and the transmission phase begins: [`Session::agreed`] has a value from here on.
    Enter(usize),
    /// A request to execute; consumed that many bytes, its payload included.
    Request(usize, Request<'a>),
    /// The client says goodbye: finish what is in flight, send it, close.
    Disconnect,
    /// The conversation cannot go on: send what is written, close.
    Close,
}

enum Phase {
    Handshake(Handshake),
    Transmission { agreed: Box<Agreed>, skip: Option<Skip> },
}

/// A refused request whose payload is still to come.
struct Skip {
    bytes: u64,
    head: ReplyHead,
    refusal: Refusal,
}

/// The conversation with one client.
pub struct Session {
    phase: Phase,
}

impl Session {
    /// A new conversation; writes the greeting.
    pub fn new(out: &mut Output) -> Self {
        handshake::put_greeting(out);
        Self { phase: Phase::Handshake(Handshake::default()) }
    }

    /// What the handshake settled, once it is over.
    pub fn agreed(&self) -> Option<&Agreed> {
        match &self.phase {
            Phase::Handshake(_) => None,
            Phase::Transmission { agreed, .. } => Some(agreed),
        }
    }

    /// Take the next message off the front of `input`.
    pub fn advance<'a>(
        &mut self,
        input: &'a [u8],
        directory: &dyn Directory,
        out: &mut Output,
    ) -> Step<'a> {
        match &mut self.phase {
            Phase::Handshake(handshake) => match handshake.advance(input, directory, out) {
                Outcome::Need(bytes) => Step::Need(bytes),
                Outcome::Continue(bytes) => Step::Continue(bytes),
                Outcome::Enter(bytes, agreed) => {
                    self.phase = Phase::Transmission { agreed, skip: None };
                    Step::Enter(bytes)
                }
                Outcome::Close => Step::Close,
            },
            Phase::Transmission { agreed, skip } => {
                if let Some(skipping) = skip {
                    let step = skip_payload(skipping, agreed, input, out);
                    if skipping.bytes == 0 {
                        *skip = None;
                    }
                    return step;
                }
                next_request(agreed, skip, input, directory.is_stopping(), out)
            }
        }
    }

    /// True if `input` starts with a complete message, or one that needs no more bytes to be
    /// refused.
    pub fn has_complete(&self, input: &[u8]) -> bool {
        let Phase::Transmission { agreed, skip: None } = &self.phase else {
            return !input.is_empty();
        };
        match transmission::decode(agreed.terms.style, input) {
            Decoded::Incomplete => false,
            Decoded::Breach => true,
            Decoded::Header(header) => match header.payload_bytes(&agreed.terms) {
                Some(payload_bytes) => {
                    let have = input.len() - transmission::header_bytes(agreed.terms.style);
                    u64::try_from(have).is_ok_and(|have| have >= payload_bytes)
                }
                None => true,
            },
        }
    }
}

fn next_request<'a>(
    agreed: &Agreed,
    skip: &mut Option<Skip>,
    input: &'a [u8],
    is_stopping: bool,
    out: &mut Output,
) -> Step<'a> {
    let terms = &agreed.terms;
    let header_bytes = transmission::header_bytes(terms.style);
    let header = match transmission::decode(terms.style, input) {
        Decoded::Incomplete => return Step::Need(header_bytes),
        Decoded::Breach => return Step::Close,
        Decoded::Header(header) => header,
    };
    if header.is_disconnect() {
        return Step::Disconnect;
    }
    let Some(payload_bytes) = header.payload_bytes(terms) else {
        return Step::Close;
    };
    let verdict = if is_stopping {
        Err(Refusal::new(ErrorNumber::Eshutdown, "the server is stopping"))
    } else {
        header.check(terms)
    };
    if let Err(refusal) = verdict {
        if payload_bytes == 0 {
            terms.style.put_error(out, header.head, refusal);
        } else {
            *skip = Some(Skip { bytes: payload_bytes, head: header.head, refusal });
        }
        return Step::Continue(header_bytes);
    }
    let payload_length =
        usize::try_from(payload_bytes).expect("a payload that was accepted has at most 32 MiB");
    let message_bytes = header_bytes + payload_length;
    match input.get(header_bytes..message_bytes) {
        Some(payload) => Step::Request(message_bytes, header.request(payload)),
        None => Step::Need(message_bytes),
    }
}

fn skip_payload<'a>(
    skip: &mut Skip,
    agreed: &Agreed,
    input: &'a [u8],
    out: &mut Output,
) -> Step<'a> {
    if input.is_empty() {
        return Step::Need(1);
    }
    let have = u64::try_from(input.len()).expect("usize has at most 64 bits");
    let skipped = have.min(skip.bytes);
    skip.bytes -= skipped;
    if skip.bytes == 0 {
        agreed.terms.style.put_error(out, skip.head, skip.refusal);
    }
    Step::Continue(usize::try_from(skipped).expect("not more than the input"))
}
