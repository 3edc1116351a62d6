//! Locks, threads and time, as the engine uses them.
//!
//! Those of the system; or, built with the feature `simulation`, those of a seeded scheduler that
//! runs one thread at a time and decides which goes on at every one of these calls. The engine is
//! the same code in both. Plain counters stay with `std`: nothing is decided by them.

#[cfg(feature = "simulation")]
mod simulated;

#[cfg(feature = "simulation")]
pub use simulated::begin;

#[cfg(feature = "simulation")]
pub use simulated::{
    AtomicBool, AtomicU64, Clock, Condvar, JoinHandle, Mutex, MutexGuard, RwLock, breathe,
    run_together, spawn, unix_ns,
};

#[cfg(not(feature = "simulation"))]
pub use system::{
    AtomicBool, AtomicU64, Clock, Condvar, JoinHandle, Mutex, MutexGuard, RwLock, breathe,
    run_together, spawn, unix_ns,
};

#[cfg(not(feature = "simulation"))]
mod system {
    use std::panic::resume_unwind;
    use std::thread::ScopedJoinHandle;

    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
    pub use std::sync::atomic::{AtomicBool, AtomicU64};
    pub use std::thread::JoinHandle;
    pub use std::time::Instant as Clock;

    /// Run `work` in a thread of its own.
    pub fn spawn(
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name.into()).spawn(work)
    }

    /// Do all of it at once, each part in a thread of its own; what they return, in their order.
    pub fn run_together<T: Send, W: FnOnce() -> T + Send>(works: Vec<W>) -> Vec<T> {
        let run = |slot: &Mutex<Option<W>>| {
            let work = slot.lock().take().expect("each is run once");
            work()
        };
        let slots: Vec<_> = works.into_iter().map(|work| Mutex::new(Some(work))).collect();
        std::thread::scope(|scope| {
            let begin = |slot| std::thread::Builder::new().spawn_scoped(scope, move || run(slot));
            let threads: Vec<_> = slots.iter().map(|slot| (slot, begin(slot))).collect();
            let end = |(slot, thread): (_, std::io::Result<ScopedJoinHandle<'_, T>>)| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
                // The system has no thread left: one after the other, then.
                Err(_) => run(slot),
            };
            threads.into_iter().map(end).collect()
        })
    }

    /// Nanoseconds since 1970.
    pub fn unix_ns() -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Let others go on, in the simulation; here they do.
    #[inline]
    pub fn breathe() {}
}
