"""Run one command line: errors become one line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.cli.app import SUMMARIES, build
from stillblock.config import Config, is_debug
from stillblock.errors import ExitCode, InternalError, StillblockError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
"""The log holds defects only; one that fills it repeats itself."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    from cyclopts import CycloptsError  # noqa: PLC0415 - after our own modules

    words = list(sys.argv[1:] if arguments is None else arguments)
    is_json = "--json" in words
    logging.basicConfig(
        level=logging.DEBUG if is_debug() else logging.ERROR,
        format="stillblock: %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        result = build()(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        return _report(
            {"code": "usage", "message": str(error), "exit_code": int(ExitCode.USAGE)},
            is_json=is_json,
            advice=f"try `{_help_command(words)}`",
        )
    except StillblockError as error:
        if is_debug():
            traceback.print_exc()
        return _report(error.to_json(), is_json=is_json)
    except KeyboardInterrupt:
        print("stillblock: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, as `head` does. Keep Python from failing at exit too.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    except Exception as error:  # noqa: BLE001 - the last place before a traceback
        return _report_defect(error, words, is_json=is_json)
    return result if isinstance(result, int) else ExitCode.OK


def _report(document: dict[str, object], *, is_json: bool, advice: str = "") -> int:
    code = document["exit_code"]
    assert isinstance(code, int)
    if is_json:
        from stillblock import codec  # noqa: PLC0415

        print(json.dumps(codec.document("error", {"error": document})), file=sys.stderr)
    else:
        message = " ".join(str(document["message"]).split())
        print(f"stillblock: {message}" + (f"; {advice}" if advice else ""), file=sys.stderr)
    return code


def _report_defect(error: Exception, words: Sequence[str], *, is_json: bool) -> int:
    if is_debug():
        traceback.print_exc()
    summary = f"{type(error).__name__}: {error}"
    path = _log(error, words)
    where = f"details are in {path}" if path else "STILLBLOCK_DEBUG=1 shows details"
    defect = InternalError(f"a defect in stillblock, {summary}", hint=where)
    return _report(defect.to_json(), is_json=is_json)


def _log(error: Exception, words: Sequence[str]) -> Path | None:
    """Write a traceback to the log; return where, None if that is not possible either."""
    try:
        path = Config.load(state_dir=_state_dir(words)).log_path
        if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(path.with_suffix(".log.old"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            log.write(f"{stamp} stillblock {' '.join(words)}\n")
            log.writelines(traceback.format_exception(error))
    except OSError:
        return None
    return path


def _state_dir(words: Sequence[str]) -> Path | None:
    """Find `--state-dir` in words that may not have been parsed."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--state-dir" and (value if equals else following):
            return Path(value if equals else following)
    return None


def _help_command(words: Sequence[str]) -> str:
    named = [word for word in words[:1] if word in SUMMARIES]
    return " ".join(["stillblock", *named, "--help"])
