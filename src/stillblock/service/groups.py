"""A group of volumes to take snapshots of: with the one process that serves them, or here."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self, TypeVar

from stillblock import codec
from stillblock.errors import UsageError
from stillblock.operations.groups import (
    GroupPlan,
    GroupReceipt,
    GroupRequest,
    check_members,
    create_group,
    plan_group,
)
from stillblock.operations.volumes import open_volume
from stillblock.service.client import RemoteSession, fetch, find_server
from stillblock.service.session import LocalSession, Session
from stillblock.service.verbs import GROUPS_PATH, PLAN_GROUP_PATH

if TYPE_CHECKING:
    from pathlib import Path

    from stillblock.config import Config
    from stillblock.operations.volume import OpenVolume

R = TypeVar("R", GroupPlan, GroupReceipt)


class GroupSession:
    """Several volumes to work with, for as long as the context lasts.

    They are served by one process, or by none and then open in this one; else a `UsageError`.
    """

    def __init__(self, config: Config, request: GroupRequest) -> None:
        check_members(request)
        self._config = config
        self._request = request
        self._opened = ExitStack()
        self._server: Path | None = None
        self.sessions: dict[str, Session] = {}
        """One for each volume, by name."""

    def __enter__(self) -> Self:
        names = [member.volume for member in self._request.members]
        servers = {name: find_server(self._config, name) for name in names}
        alone = [name for name, server in servers.items() if server is None]
        if alone and len(alone) < len(names):
            served = [name for name in names if name not in alone]
            raise UsageError(
                f"{', '.join(served)} is served and {', '.join(alone)} is not: one instant needs "
                "one process",
                hint=f"stop, then `stillblock serve {' '.join(names)}`",
            )
        with ExitStack() as opening:
            for name, server in servers.items():
                session: Session
                if server is None:
                    session = LocalSession(open_volume(self._config, name))
                else:
                    # Any of them leads to the process, which looks whether it serves all.
                    self._server = self._server or server
                    session = RemoteSession(server, name)
                self.sessions[name] = opening.enter_context(session)
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._opened.__exit__(*details)  # type: ignore[arg-type] # handed through

    def plan(self) -> GroupPlan:
        """Return what the snapshots would hold if they were taken now."""
        if self._server is not None:
            return self._ask(PLAN_GROUP_PATH, GroupPlan)
        return plan_group(self._volumes(), self._request)

    def create(self) -> GroupReceipt:
        """Take the snapshots at one instant, or none."""
        if self._server is not None:
            return self._ask(GROUPS_PATH, GroupReceipt)
        return create_group(self._volumes(), self._request)

    def _ask(self, path: str, result: type[R]) -> R:
        assert self._server is not None
        body = json.dumps(codec.to_json(self._request)).encode()
        return codec.from_json(result, fetch(self._server, "POST", path, body=body))

    def _volumes(self) -> list[OpenVolume]:
        here = [s for s in self.sessions.values() if isinstance(s, LocalSession)]
        return [session.opened for session in here]
