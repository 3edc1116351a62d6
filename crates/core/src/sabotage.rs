//! The rules that keep the promises, each of which a test can break on purpose.
//!
//! Built with the feature `simulation`, one rule at a time can be switched off, and the simulation
//! must notice. In all other builds [`is_broken`] is `false`, which the compiler knows.

/// A rule of the engine, and what happens while it is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Batches of the log are not synced.
    LogSync,
    /// New content goes to the origin before the originals are in the log.
    LogFirst,
    /// Slots are dropped before their content is on the origin.
    SlotsUntilWritten,
    /// A rewrite changes the slot in place that the committer may be reading.
    SlotsImmutable,
    /// Reads do not look for slots.
    ReadsSeeSlots,
    /// Blocks stay unsettled after they were recorded: a second record of one epoch.
    Settle,
    /// The payload of the last batch is not verified at opening.
    LastBatchVerified,
    /// The log goes on behind a torn batch.
    TornTailCut,
    /// What is left of a torn batch stays behind the end of the log.
    TornTailReleased,
    /// The last batch may lose its payload to a deletion.
    SealBeforePunch,
    /// The name of a new segment is not made durable.
    NameDurable,
    /// Decisions are not synced.
    JournalSync,
    /// What a failed decision left in the journal stays there.
    FailedDecisionsUndone,
    /// A segment whose header cannot be read is removed with its records.
    UnknownLogKept,
    /// The bits of a narrowed snapshot are made while others commit.
    NarrowInRole,
    /// Space is given back before the deletion is durable.
    RecordBeforeFree,
    /// A copy is freed though an older snapshot reads it.
    OlderSnapshotsKeepCopies,
    /// A flush does not wait for slots.
    FlushCommits,
    /// A flush does not sync the origin.
    FlushSyncs,
    /// A failed sync of the origin is tried again and believed.
    FailedSyncLatches,
    /// An instant does not wait for writes in flight.
    DrainBeforeInstant,
    /// The origin is not synced at an instant.
    OriginDurableAtInstant,
    /// Slots newer than an instant are committed before its header.
    HeaderBeforeNewer,
    /// Slots older than an instant are treated by the bits after it.
    ClassesFrozen,
    /// A view does not look again for a record after it read the origin.
    SecondLook,
    /// A discard does not ask who needs the content.
    TrimSparesNeeded,
    /// The last, partial block is not preserved.
    LastBlockWhole,
    /// Restored blocks are called done before the origin is durable.
    DoneAfterSync,
    /// Blocks are called done without a record.
    DoneRecorded,
    /// Writes to blocks that are still to be restored go straight.
    RestoringHoldsSlots,
    /// A changed set does not hold what is on its way.
    ChangedSeesSlots,
    /// What a killed process had acknowledged is not replayed.
    LeftReplayed,
    /// The store says that all is well before the writes of a killed process are replayed.
    ReplayBeforeClosed,
    /// Old segments go before the name of the merged one is durable.
    MergedNameDurable,
    /// Pages of an index file are believed without a look at their checksums.
    IndexPagesVerified,
    /// A compacted journal gets the name before it is durable.
    CompactedDurable,
    /// Decisions are made before the name of a compacted journal is durable.
    CompactedNamed,
    /// What was decided while the journal was compacted is not in the new one.
    DecisionsMeanwhileCopied,
    /// A compacted journal does not know the highest epoch number.
    HighestEpochKept,
    /// A compacted journal does not know which restores have ended.
    EndedRestoresKept,
    /// A clone's map names blocks whose content is not durable.
    CloneDataFirst,
    /// A clone's map is not synced.
    CloneMapSync,
    /// What was written to a clone lately counts after the kernel is gone.
    CloneRecentOfBoot,
    /// A first write to a part of a clone's block loses the rest of it.
    CloneBlockWhole,
    /// Blocks of a region are written before its record is durable.
    RegionFirst,
    /// A block of a region is marked after it was written.
    RegionMarkedFirst,
    /// What was written in regions is forgotten at an instant.
    RegionsKeptAtInstant,
    /// After a power cut a region left open counts as unchanged.
    RegionsWholeAfterCut,
    /// Where only writers of selected blocks wait, they do not either.
    SelectedWritersWait,
    /// The gates of a group close one after the other.
    GroupGatesTogether,
    /// A group is decided before all headers are durable.
    GroupHeadersFirst,
    /// A header of a group is believed before anybody knows how the group ended.
    GroupAsks,
    /// A group is decided before those who may object are asked.
    GroupObjectionsFirst,
    /// A journal that is written anew does not say how groups ended.
    GroupEndsKept,
}

impl Rule {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::LogSync,
        Self::LogFirst,
        Self::SlotsUntilWritten,
        Self::SlotsImmutable,
        Self::ReadsSeeSlots,
        Self::Settle,
        Self::LastBatchVerified,
        Self::TornTailCut,
        Self::TornTailReleased,
        Self::SealBeforePunch,
        Self::NameDurable,
        Self::JournalSync,
        Self::FailedDecisionsUndone,
        Self::UnknownLogKept,
        Self::NarrowInRole,
        Self::RecordBeforeFree,
        Self::OlderSnapshotsKeepCopies,
        Self::FlushCommits,
        Self::FlushSyncs,
        Self::FailedSyncLatches,
        Self::DrainBeforeInstant,
        Self::OriginDurableAtInstant,
        Self::HeaderBeforeNewer,
        Self::ClassesFrozen,
        Self::SecondLook,
        Self::TrimSparesNeeded,
        Self::LastBlockWhole,
        Self::DoneAfterSync,
        Self::DoneRecorded,
        Self::RestoringHoldsSlots,
        Self::ChangedSeesSlots,
        Self::LeftReplayed,
        Self::ReplayBeforeClosed,
        Self::MergedNameDurable,
        Self::IndexPagesVerified,
        Self::CompactedDurable,
        Self::CompactedNamed,
        Self::DecisionsMeanwhileCopied,
        Self::HighestEpochKept,
        Self::EndedRestoresKept,
        Self::CloneDataFirst,
        Self::CloneMapSync,
        Self::CloneRecentOfBoot,
        Self::CloneBlockWhole,
        Self::RegionFirst,
        Self::RegionMarkedFirst,
        Self::RegionsKeptAtInstant,
        Self::RegionsWholeAfterCut,
        Self::SelectedWritersWait,
        Self::GroupGatesTogether,
        Self::GroupHeadersFirst,
        Self::GroupAsks,
        Self::GroupObjectionsFirst,
        Self::GroupEndsKept,
    ];
}

#[cfg(feature = "simulation")]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Break a rule from now on in this thread, or none.
#[cfg(feature = "simulation")]
pub fn break_rule(rule: Option<Rule>) {
    BROKEN.set(rule);
}

/// True if the rule is broken.
#[cfg(feature = "simulation")]
pub fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// False: nobody can break a rule in this build.
#[cfg(not(feature = "simulation"))]
pub const fn is_broken(_rule: Rule) -> bool {
    false
}
