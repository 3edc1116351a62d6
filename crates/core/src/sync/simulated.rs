//! The locks of [`super`] under a seeded scheduler. Every call is a point at which another thread
//! may go on; which one, and how time passes, follows from the seed alone.

use shuttle::rand::Rng;
pub use shuttle::sync::atomic::{AtomicBool, AtomicU64};
pub use shuttle::thread::JoinHandle;
use std::ops::{Add, Deref, DerefMut};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64 as PlainU64, Ordering};
use std::time::Duration;

/// The clock moves by up to this whenever a thread waits for time to pass.
const TICK_NS_MAX: u64 = 10_000_000;
/// Time at which every simulation begins: some day in 2026.
const DAWN_UNIX_NS: u64 = 1_780_000_000_000_000_000;

thread_local! {
    static NOW_NS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// A simulation begins: its time depends on nothing before it.
pub fn begin() {
    NOW_NS.set(0);
}

fn tick() {
    let by = shuttle::rand::thread_rng().gen_range(1..=TICK_NS_MAX);
    NOW_NS.set(NOW_NS.get() + by);
}

/// A moment of simulated time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Clock(Duration);

impl Clock {
    /// Now.
    pub fn now() -> Self {
        Self(Duration::from_nanos(NOW_NS.get()))
    }

    /// Time from an earlier moment to this one.
    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Time since.
    pub fn elapsed(&self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

impl Add<Duration> for Clock {
    type Output = Self;
    fn add(self, by: Duration) -> Self {
        Self(self.0 + by)
    }
}

/// Nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    DAWN_UNIX_NS + NOW_NS.get()
}

/// Let others go on.
pub fn breathe() {
    shuttle::thread::yield_now();
}

/// Run `work` as a thread of the simulation.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    shuttle::thread::Builder::new().name(name.into()).spawn(work)
}

/// Do all of it at once, each part in a thread of the simulation.
pub fn run_together<T: Send, W: FnOnce() -> T + Send>(works: Vec<W>) -> Vec<T> {
    shuttle::thread::scope(|scope| {
        let threads: Vec<_> = works.into_iter().map(|work| scope.spawn(work)).collect();
        let end = |thread: shuttle::thread::ScopedJoinHandle<'_, T>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(end).collect()
    })
}

/// As `parking_lot::Mutex`.
#[derive(Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

/// As `parking_lot::MutexGuard`.
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    held: Option<shuttle::sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    /// Unlocked.
    pub fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    /// Wait for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: self, held: Some(self.acquire()) }
    }

    fn acquire(&self) -> shuttle::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait for it, not longer than `timeout`.
    pub fn try_lock_for(&self, timeout: Duration) -> Option<MutexGuard<'_, T>> {
        let deadline = Clock::now() + timeout;
        loop {
            match self.0.try_lock() {
                Ok(held) => return Some(MutexGuard { mutex: self, held: Some(held) }),
                Err(_) if Clock::now() >= deadline => return None,
                Err(_) => {
                    tick();
                    breathe();
                }
            }
        }
    }
}

impl<T> MutexGuard<'_, T> {
    /// Let one who waits have it first.
    pub fn bump(guard: &mut Self) {
        guard.held = None;
        breathe();
        guard.held = Some(guard.mutex.acquire());
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.held.as_ref().expect("held but while it waits")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("held but while it waits")
    }
}

/// As `parking_lot::RwLock`.
#[derive(Default)]
pub struct RwLock<T>(shuttle::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// Unlocked.
    pub fn new(value: T) -> Self {
        Self(shuttle::sync::RwLock::new(value))
    }

    /// Shared.
    pub fn read(&self) -> shuttle::sync::RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Alone.
    pub fn write(&self) -> shuttle::sync::RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As `parking_lot::WaitTimeoutResult`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// True if the time was up.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

/// As `parking_lot::Condvar`.
#[derive(Default)]
pub struct Condvar {
    inner: shuttle::sync::Condvar,
    /// Grows with every notification, for those who wait with a limit.
    notified: PlainU64,
}

impl Condvar {
    /// Nobody waits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wake one who waits; those who wait with a limit all look.
    pub fn notify_one(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        self.inner.notify_one();
    }

    /// Wake all who wait.
    pub fn notify_all(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        self.inner.notify_all();
    }

    /// Wait until notified.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.held.take().expect("held");
        let held = self.inner.wait(held).unwrap_or_else(PoisonError::into_inner);
        guard.held = Some(held);
    }

    /// Wait until notified, not longer than `timeout`.
    pub fn wait_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        timeout: Duration,
    ) -> WaitTimeoutResult {
        self.wait_until(guard, Clock::now() + timeout)
    }

    /// Wait until notified, not beyond `deadline`.
    pub fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        deadline: Clock,
    ) -> WaitTimeoutResult {
        let seen = self.notified.load(Ordering::Relaxed);
        guard.held = None;
        let timed_out = loop {
            breathe();
            if self.notified.load(Ordering::Relaxed) != seen {
                break false;
            }
            tick();
            if Clock::now() >= deadline {
                break true;
            }
        };
        guard.held = Some(guard.mutex.acquire());
        WaitTimeoutResult(timed_out)
    }
}
