"""Opening what a reference names for reading, wherever its volume is open."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from stillblock.errors import UsageError
from stillblock.operations.held import Held
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.config import Config
    from stillblock.model import Reference
    from stillblock.service.session import Session


@contextmanager
def open_reference(config: Config, reference: Reference) -> Iterator[Held]:
    """Give what a reference with an instant names; it is held until the context ends."""
    if reference.repository is not None:
        raise UsageError(f"{reference}: backups are not read yet; name a snapshot")
    with open_session(config, reference.volume) as session, held(session, reference) as found:
        yield found


@contextmanager
def held(session: Session, reference: Reference) -> Iterator[Held]:
    """Give the same within a session that is there."""
    if reference.snapshot is None:
        raise UsageError(
            f"{reference.volume} is the live disk, which does not stand still",
            hint=f"name a snapshot: {reference.volume}@latest",
        )
    receipt = session.wait_final(session.receipt(reference.snapshot))
    clone = None
    if reference.clone is not None:
        # By id: the name could mean another snapshot by now.
        clone = session.show_clone(receipt.snapshot.id, reference.clone)
    disk = session.open_disk(receipt.snapshot, clone)
    try:
        yield Held(disk, receipt, clone=None if clone is None else clone.reference)
    finally:
        disk.close()
