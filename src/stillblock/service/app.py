"""The control API, version 1: every verb of the table as a route, plus the index and events.

Requests and replies are JSON; an error is `{"error": {code, message, ...}}`. Calls into the engine
block, so each runs in a thread of the pool.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import typing
from typing import TYPE_CHECKING, Any, Final, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from stillblock import codec
from stillblock.catalog import Catalog
from stillblock.errors import (
    Blame,
    ExitCode,
    InternalError,
    NotFoundError,
    StillblockError,
    UsageError,
)
from stillblock.operations.groups import (
    GroupPlan,
    GroupReceipt,
    GroupRequest,
    create_group,
    plan_group,
)
from stillblock.service.verbs import GROUPS_PATH, PLAN_GROUP_PATH, Verb, all_verbs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from starlette.requests import Request

    from stillblock.config import Config
    from stillblock.model import Event
    from stillblock.operations.volume import OpenVolume

_LOG: Final = logging.getLogger("stillblock.service")
BODY_BYTES_MAX: Final = 1024 * 1024
"""Rules are lines that a person writes; a larger request is a mistake."""
EVENT_POLL_S: Final = 0.5
"""Events are for people to watch; a local SQLite query costs well under a millisecond."""
_VOLUME_PATH: Final = "/v1/volumes/{volume}"


_GROUP_VERBS: Final = ((GROUPS_PATH, create_group), (PLAN_GROUP_PATH, plan_group))


class Host(Protocol):
    """What the API works on: the volumes of one serve process."""

    @property
    def config(self) -> Config:
        """Where things are."""

    @property
    def is_stopping(self) -> bool:
        """Whether streams should end."""

    def volumes(self) -> Mapping[str, OpenVolume]:
        """The volumes served now."""


def create_app(host: Host) -> Starlette:
    """Return the application for a host."""
    routes = [
        Route("/v1", _index, methods=["GET"]),
        Route("/v1/volumes", _volumes(host), methods=["GET"]),
        Route("/v1/events", _events(host), methods=["GET"]),
    ]
    routes += [Route(path, _group(host, run), methods=["POST"]) for path, run in _GROUP_VERBS]
    routes += [
        Route(_VOLUME_PATH + verb.path, _endpoint(host, verb), methods=[verb.method])
        for verb in all_verbs()
    ]
    return Starlette(
        routes=routes,
        exception_handlers={StillblockError: _on_error, Exception: _on_defect, 404: _on_no_route},
    )


def status_of(error: StillblockError) -> int:
    """Return the HTTP status for an error: whose fault it is, and whether a retry may help."""
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, NotFoundError):
        return 404
    if error.exit_code is ExitCode.LOCKED or error.blame in {Blame.USER, Blame.PEER}:
        return 409
    return 503 if error.is_retryable else 500


def _endpoint(host: Host, verb: Verb[Any, Any]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        volume = _volume(host, request.path_params["volume"])
        try:
            asked = codec.from_json(verb.request, await _fields(request, verb))
        except codec.CodecError as error:
            raise UsageError(f"{verb.name}: {error}") from error
        result = await run_in_threadpool(verb.run, volume, asked)
        return _json(codec.document(verb.name, result))

    return endpoint


def _group(
    host: Host, run: Callable[[list[OpenVolume], GroupRequest], object]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            asked = codec.from_json(GroupRequest, _parse(await _body(request), "body"))
        except codec.CodecError as error:
            raise UsageError(f"group: {error}") from error
        served = host.volumes()
        missing = [m.volume for m in asked.members if m.volume not in served]
        if missing:
            raise UsageError(
                f"this process serves {', '.join(sorted(served)) or 'nothing'} and not "
                f"{', '.join(missing)}: one instant needs one process",
                hint="stop them, and serve all with one `stillblock serve`",
            )
        volumes = [served[member.volume] for member in asked.members]
        return _json(codec.document("group", await run_in_threadpool(run, volumes, asked)))

    return endpoint


async def _fields(request: Request, verb: Verb[Any, Any]) -> dict[str, object]:
    """Gather a request's fields from its body, its query and its path."""
    fields: dict[str, object] = {}
    if verb.method in {"GET", "DELETE"}:
        hints = typing.get_type_hints(verb.request)
        for name, text in request.query_params.items():
            if name not in hints:
                raise UsageError(f"{name!r} is no field of {verb.name} ({', '.join(hints)})")
            fields[name] = text if _takes_text(hints[name]) else _parse(text, name)
    else:
        body = await _body(request)
        found = _parse(body, "body") if body else {}
        if not isinstance(found, dict):
            raise UsageError("the body must be a JSON object")
        fields.update(found)
    path = {name: value for name, value in request.path_params.items() if name != "volume"}
    return fields | path


async def _body(request: Request) -> str:
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > BODY_BYTES_MAX:
            raise UsageError(f"the body is larger than {BODY_BYTES_MAX} bytes")
    try:
        return parts.decode()
    except UnicodeDecodeError as error:
        raise UsageError("the body is not UTF-8") from error


def _parse(text: str, what: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{what} is not JSON: {error}") from error
    return found


def _takes_text(hint: object) -> bool:
    return hint is str or str in typing.get_args(hint)


def _volume(host: Host, name: str) -> OpenVolume:
    volumes = host.volumes()
    if name in volumes:
        return volumes[name]
    served = ", ".join(sorted(volumes)) or "none"
    raise NotFoundError(f"this process does not serve {name} (it serves: {served})")


async def _index(_: Request) -> Response:
    described = [
        {
            "name": verb.name,
            "method": verb.method,
            "path": _VOLUME_PATH + verb.path,
            "summary": verb.summary,
            "request": _shape(verb.request),
            "result": _shape(verb.result),
        }
        for verb in all_verbs()
    ]
    described += [
        {
            "name": run.__name__,
            "method": "POST",
            "path": path,
            "summary": (run.__doc__ or "").splitlines()[0],
            "request": _shape(GroupRequest),
            "result": _shape(result),
        }
        for (path, run), result in zip(_GROUP_VERBS, (GroupReceipt, GroupPlan), strict=True)
    ]
    return _json(codec.document("index", {"routes": described}))


def _shape(of: type) -> dict[str, str]:
    hints = typing.get_type_hints(of)
    return {
        field.name: hints[field.name].__name__
        if isinstance(hints[field.name], type)
        else str(hints[field.name]).replace("stillblock.model.", "")
        for field in dataclasses.fields(of)
    }


def _volumes(host: Host) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        found = [await run_in_threadpool(volume.info) for volume in tuple(host.volumes().values())]
        return _json(codec.document("volumes", {"volumes": found}))

    return endpoint


def _events(host: Host) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        after_id = _parse(request.query_params.get("after", "0"), "after")
        follow = _parse(request.query_params.get("follow", "false"), "follow")
        if not isinstance(after_id, int):
            raise UsageError("after must be the id of an event")
        lines = _event_lines(host, after_id=after_id, follow=follow is True)
        return StreamingResponse(lines, media_type="application/jsonl")

    return endpoint


async def _event_lines(host: Host, *, after_id: int, follow: bool) -> AsyncIterator[str]:
    while True:
        for event in await run_in_threadpool(_read_events, host.config, after_id):
            after_id = event.id
            yield json.dumps(codec.document("event", event)) + "\n"
        if host.is_stopping or not follow:
            return
        await asyncio.sleep(EVENT_POLL_S)


def _read_events(config: Config, after_id: int) -> tuple[Event, ...]:
    with Catalog(config.catalog_path) as catalog:
        return catalog.events(after_id=after_id)


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StillblockError)
    return _json(codec.document("error", {"error": error.to_json()}), status=status_of(error))


async def _on_defect(request: Request, error: Exception) -> Response:
    _LOG.error("defect in %s %s", request.method, request.url.path, exc_info=error)
    return await _on_error(
        request, InternalError(f"{type(error).__name__}: {error}", hint="see the server's log")
    )


async def _on_no_route(request: Request, _: Exception) -> Response:
    return await _on_error(
        request, NotFoundError(f"no route {request.method} {request.url.path}; see /v1")
    )


def _json(document: dict[str, Any], *, status: int = 200) -> Response:
    body = json.dumps(codec.to_json(document)) + "\n"
    return Response(body, status_code=status, media_type="application/json")
