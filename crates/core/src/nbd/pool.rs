//! Threads for requests that have to wait for a device, so that a connection goes on meanwhile.
//!
//! Each export has its own: if a disk hangs, all its workers may hang with it, and no other export
//! notices.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::execute::{OwnedRequest, Patience, execute};
use super::handshake::Agreed;
use super::link::{Charge, Link};
use super::reply::Output;

/// A worker without work ends after this; making a new one costs some 30 us.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A request given away by its connection.
pub struct Job {
    /// Dropped before the charge, so that a connection with nothing in flight is the only one to
    /// hold its export.
    pub agreed: Arc<Agreed>,
    /// What to do.
    pub request: OwnedRequest,
    /// Where the reply goes.
    pub link: Arc<Link>,
    /// Held until the reply is sent.
    pub charge: Charge,
}

impl Job {
    fn run(self, out: &mut Output) {
        // In this order, so that a panic too drops the charge last.
        let Self { charge, link, request, agreed } = self;
        execute(&agreed, &request.request(), Patience::AsNeeded, out);
        drop(agreed);
        link.deliver(out, charge);
        out.clear();
    }
}

/// The workers of one export; they start when there is work. Writes that a full store holds have
/// workers of their own: however many wait, all other requests go on.
#[derive(Clone)]
pub struct Pool {
    ordinary: Arc<Shared>,
    held: Arc<Shared>,
}

struct Shared {
    workers_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    workers: usize,
    idle: usize,
    is_closing: bool,
}

impl Pool {
    /// A pool without workers yet.
    pub fn new(workers_max: usize) -> Self {
        let shared = || {
            let state = Mutex::default();
            Arc::new(Shared { workers_max, state, changed: Condvar::new() })
        };
        Self { ordinary: shared(), held: shared() }
    }

    /// Have it run by a worker. The queue is bounded by what connections may have in flight.
    pub fn submit(&self, job: Job) {
        Self::submit_to(&self.ordinary, job);
    }

    /// As [`Self::submit`], for a write that may be held for long.
    pub fn submit_held(&self, job: Job) {
        Self::submit_to(&self.held, job);
    }

    fn submit_to(shared: &Arc<Shared>, job: Job) {
        let mut state = shared.state.lock();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() {
            drop(state);
            shared.changed.notify_one();
            return;
        }
        if state.workers >= shared.workers_max {
            return;
        }
        state.workers += 1;
        drop(state);
        let shared = Arc::clone(shared);
        let working = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("nbd-worker".to_owned());
        if thread.spawn(move || working.work()).is_err() {
            // No thread to be had: the other workers do it, or this one if there are none.
            let mut state = shared.state.lock();
            state.workers -= 1;
            let job = if state.workers == 0 { state.queue.pop_back() } else { None };
            drop(state);
            if let Some(job) = job {
                run_guarded(job, &mut Output::default());
            }
        }
    }

    /// End the workers, once the queue is empty, and wait for that.
    pub fn close(&self) {
        for shared in [&self.ordinary, &self.held] {
            let mut state = shared.state.lock();
            state.is_closing = true;
            shared.changed.notify_all();
            shared.changed.wait_while(&mut state, |state| state.workers > 0);
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut out = Output::default();
        while let Some(job) = self.next_job() {
            run_guarded(job, &mut out);
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.state.lock();
        let mut is_late = false;
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if is_late || state.is_closing {
                state.workers -= 1;
                drop(state);
                self.changed.notify_all();
                return None;
            }
            state.idle += 1;
            is_late = self.changed.wait_for(&mut state, IDLE_MAX).timed_out();
            state.idle -= 1;
        }
    }
}

/// A panic is our bug; it ends the connection whose request it was, and nothing else.
fn run_guarded(job: Job, out: &mut Output) {
    let link = Arc::clone(&job.link);
    if catch_unwind(AssertUnwindSafe(|| job.run(out))).is_err() {
        link.socket().cut();
        *out = Output::default();
    }
}
