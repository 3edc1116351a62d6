//! The shipped engine in a machine that is stopped at every step.
//!
//! One thread runs at a time, and which one goes on at each lock, each wait and each access of a disk
//! follows from a seed. At every step of every disk the machine is stopped as well: the power is cut,
//! and of what was not synced any part survives; or the process is killed. The volume is opened again,
//! stopped again while it is opened, and held to its promises (ARCHITECTURE.md).
//!
//! A seed that fails is printed; `STILLBLOCK_SEED=n` runs it alone, `STILLBLOCK_SEEDS=n` that many.

mod check;
mod clones;
mod dice;
mod disk;
mod exhaustive;
mod group;
mod machine;
mod model;
mod program;

use check::{Stops, Tally, Way, check_all};
use dice::Dice;
use machine::Stop;
use program::Faults;
use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use stillblock_core::sabotage::{Rule, break_rule};

/// Run something under the scheduler of a seed; a panic is a failure like any other.
fn scheduled<T: Send + 'static>(
    seed: u64,
    work: impl Fn() -> Result<T, String> + Send + Sync + 'static,
) -> Result<T, String> {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(steps_max());
    config.silence_warnings = true;
    let result = Arc::new(Mutex::new(None));
    let told = Arc::clone(&result);
    let runner = Runner::new(RandomScheduler::new_from_seed(seed, 1), config);
    stillblock_core::sync::begin();
    let ran = catch_unwind(AssertUnwindSafe(|| {
        runner.run(move || {
            let done = work();
            let failure = done.as_ref().err().cloned();
            *told.lock().expect("no panic") = Some(done);
            if let Some(why) = failure {
                // Threads of volumes that were given up still run: only this ends them.
                std::panic::panic_any(why);
            }
        });
    }));
    if let Some(done) = result.lock().expect("no panic").take() {
        return done;
    }
    if let Err(panic) = ran {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        return Err(format!("panic: {}", text.unwrap_or_default()));
    }
    Err("it never ended".into())
}

/// Stops that are looked at together.
const GROUP: usize = 8;

/// Run a program, then look at where it was stopped. Each few stops have a scheduler of their own:
/// it looks at every thread there ever was at each of its steps.
fn stopped_everywhere(
    seed: u64,
    program: impl Fn() -> Result<Stops, String> + Send + Sync + 'static,
    check: fn(&[Stop], Way, Dice) -> Result<Tally, String>,
) -> Result<Tally, String> {
    let Stops { way, all: mut stops, mut dice, mut tally } = scheduled(seed, program)?;
    while !stops.is_empty() {
        let group = stops.split_off(stops.len().saturating_sub(GROUP));
        let (seed, dice) = (dice.next(), dice.fork());
        tally.add(&scheduled(seed, move || check(&group, way, dice.clone()))?);
    }
    Ok(tally)
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|s| s.parse().ok())
}

fn seeds(count: u64) -> std::ops::RangeInclusive<u64> {
    match from_env("STILLBLOCK_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=from_env("STILLBLOCK_SEEDS").unwrap_or(count),
    }
}

/// Run programs, and tell how many stops were looked at.
fn run_all<P: std::fmt::Debug + Clone>(
    programs: impl Iterator<Item = P>,
    run: impl Fn(P) -> Result<Tally, String>,
) -> Tally {
    let mut all = Tally::default();
    for program in programs {
        std::panic::set_hook(Box::new(|_| {}));
        let tally = run(program.clone());
        drop(std::panic::take_hook());
        match tally {
            Ok(tally) => all.add(&tally),
            Err(why) => panic!("STILLBLOCK_SEED={program:?} fails: {why}"),
        }
    }
    println!("{all:?}");
    all
}

fn run_seeds(seeds: impl Iterator<Item = u64>, faults: Faults) -> Tally {
    run_all(seeds, |seed| {
        stopped_everywhere(seed, move || program::run(seed, faults, usize::MAX), check_all)
    })
}

#[test]
fn without_faults_every_promise_holds_after_a_stop_at_every_step() {
    run_seeds(seeds(40), Faults::None);
}

#[test]
fn with_faults_nothing_is_wrong_that_does_not_say_so() {
    run_seeds(seeds(40), Faults::Any);
}

#[test]
fn a_group_is_whole_or_not_there_and_of_one_moment_after_a_stop_at_every_step() {
    let program = |seed| move || group::run(seed, Faults::None, usize::MAX);
    let run = |seed| stopped_everywhere(seed, program(seed), group::check_all);
    let tally = run_all(seeds(30), run);
    assert!(tally.stops >= 5_000, "every step is a stop: {tally:?}");
}

#[test]
fn with_faults_a_group_is_whole_or_not_there() {
    let program = |seed| move || group::run(seed, Faults::Any, 120);
    run_all(seeds(40), |seed| stopped_everywhere(seed, program(seed), group::check_all));
}

/// All short programs that begin with one of these; at least `stops_min` stops.
fn run_programs(firsts: &[exhaustive::Step], stops_min: u64) {
    let programs = firsts.iter().flat_map(|&first| exhaustive::programs(first));
    let tally = run_all(programs, |program| {
        stopped_everywhere(1, move || exhaustive::run(&program), check_all)
    });
    assert!(tally.stops >= stops_min, "every step is a stop: {tally:?}");
}

#[test]
fn every_short_program_that_begins_with_a_write_survives_a_stop_at_every_step() {
    run_programs(&exhaustive::STEPS[..6], 25_000);
}

#[test]
fn every_other_short_program_survives_a_stop_at_every_step() {
    run_programs(&exhaustive::STEPS[6..], 25_000);
}

#[test]
fn every_short_program_on_a_clone_survives_a_stop_at_every_step() {
    let run = |program: Vec<clones::Step>| {
        stopped_everywhere(1, move || clones::run(&program), check_all)
    };
    let tally = run_all(clones::programs().into_iter(), run);
    assert!(tally.stops >= 25_000, "every step is a stop: {tally:?}");
}

/// Until it is stopped, or for `STILLBLOCK_SEEDS` seeds from `STILLBLOCK_FIRST` on.
#[test]
#[ignore = "runs until stopped: make soak"]
fn soak() {
    const ROUND: u64 = 50;
    let first = from_env("STILLBLOCK_FIRST").unwrap_or(1_000_000);
    let count = from_env("STILLBLOCK_SEEDS").unwrap_or(u64::MAX - first);
    let mut all = Tally::default();
    let mut seed = first;
    while seed < first + count {
        let end = (seed + ROUND).min(first + count);
        all.add(&run_seeds(seed..end, Faults::None));
        all.add(&run_seeds(seed..end, Faults::Any));
        println!("seeds {first} to {end}: {all:?}");
        seed = end;
    }
}

/// Seeds within which each broken rule must be noticed.
const SABOTAGE_SEEDS_MAX: u64 = 2000;

/// What must fail for a rule to matter.
fn faults_for(rule: Rule) -> Faults {
    match rule {
        Rule::FailedDecisionsUndone => Faults::Decisions,
        Rule::FailedSyncLatches | Rule::UnknownLogKept => Faults::Any,
        _ => Faults::None,
    }
}

fn notice(rules: impl Iterator<Item = Rule>) {
    let mut missed = Vec::new();
    let limit = from_env("STILLBLOCK_SEEDS").unwrap_or(SABOTAGE_SEEDS_MAX);
    let wanted = std::env::var("STILLBLOCK_RULE").unwrap_or_default();
    for rule in rules.filter(|rule| format!("{rule:?}").contains(&wanted)) {
        std::panic::set_hook(Box::new(|_| {}));
        break_rule(Some(rule));
        let caught = (1..=limit).find_map(|seed| {
            let ran = match rule {
                Rule::GroupGatesTogether
                | Rule::GroupHeadersFirst
                | Rule::GroupAsks
                | Rule::GroupObjectionsFirst
                | Rule::GroupEndsKept => {
                    let program = move || group::run(seed, faults_for(rule), 40);
                    stopped_everywhere(seed, program, group::check_all)
                }
                _ => {
                    let program = move || program::run(seed, faults_for(rule), 40);
                    stopped_everywhere(seed, program, check_all)
                }
            };
            ran.err().map(|why| (seed, why))
        });
        break_rule(None);
        drop(std::panic::take_hook());
        match caught {
            Some((seed, why)) => {
                println!("{rule:?}: seed {seed}: {}", why.lines().next().unwrap_or_default());
            }
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "not noticed within {limit} seeds: {missed:?}");
}

#[test]
fn every_broken_rule_of_the_first_half_is_noticed() {
    notice(Rule::ALL.iter().copied().step_by(2));
}

#[test]
fn every_broken_rule_of_the_second_half_is_noticed() {
    notice(Rule::ALL.iter().copied().skip(1).step_by(2));
}

/// A program that takes more steps hangs.
fn steps_max() -> usize {
    let steps = from_env("STILLBLOCK_STEPS").unwrap_or(30_000_000);
    usize::try_from(steps).unwrap_or(usize::MAX)
}
