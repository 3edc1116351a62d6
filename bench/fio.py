"""fio: its command line and its JSON."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import fields
from bench.errors import PeerError

MARGIN_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What fio is to do."""

    uri: str
    pattern: str
    request_bytes: int
    depth: int
    offset: int
    length: int
    runtime_s: float | None = None
    request_count: int | None = None
    flush_every: int = 0
    connection_count: int = 1
    requests_per_s: int | None = None
    """By each connection; None: as many as there is room for."""
    latency_log: Path | None = None
    """Files that begin so get every request's latency, with the Unix time of its reply."""


def command(job: Job) -> list[str]:
    """The command line of a job; its seed differs at each run."""
    line = [
        *("fio", "--output-format=json", "--name=j", "--ioengine=nbd", f"--uri={job.uri}"),
        *(f"--rw={job.pattern}", f"--bs={job.request_bytes}", f"--iodepth={job.depth}"),
        *(f"--offset={job.offset}", f"--size={job.length}", "--thread", "--group_reporting"),
        *("--randrepeat=0", "--refill_buffers=0", "--percentile_list=50:99:99.9"),
        f"--numjobs={job.connection_count}",
    ]
    if job.runtime_s is not None:
        line.append(f"--runtime={job.runtime_s:g}")
        if job.request_count is None:
            line.append("--time_based")
    if job.request_count is not None:
        line.append(f"--number_ios={job.request_count}")
    if job.requests_per_s is not None:
        line.append(f"--rate_iops={job.requests_per_s}")
    if job.latency_log is not None:
        line += [f"--write_lat_log={job.latency_log}", "--log_unix_epoch=1"]
    if job.flush_every:
        line.append(f"--fsync={job.flush_every}")
    return line


def parse(output: str) -> dict[str, float]:
    """The figures of the one job in fio's JSON; raise PeerError if there are none or the job
    failed.

    fio prints warnings before the object when an engine has something to say.
    """
    start = output.find("{")
    if start < 0:
        raise PeerError(f"fio printed no results: {output[-300:]!r}")
    try:
        report = json.loads(output[start:])
    except ValueError as error:
        raise PeerError(f"fio's results cannot be read: {error}") from error
    jobs = fields.sequence(fields.mapping(report, "fio").get("jobs"), "fio jobs")
    if len(jobs) != 1:
        raise PeerError(f"fio reported {len(jobs)} jobs instead of one")
    job = fields.mapping(jobs[0], "fio job")
    if job.get("error"):
        raise PeerError(f"fio: job error {job['error']}")
    sides = [fields.mapping(job.get(name), name) for name in ("write", "read")]
    side = sides[0] if fields.number(sides[0].get("total_ios"), "total_ios") else sides[1]
    figures = {
        "iops": fields.number(side.get("iops"), "iops"),
        "mb_per_s": fields.number(side.get("bw_bytes"), "bw_bytes") / 1e6,
        "requests": fields.number(side.get("total_ios"), "total_ios"),
    }
    if not figures["requests"]:
        raise PeerError("fio made no request")
    return {**figures, **_latencies(fields.mapping(side.get("clat_ns"), "clat_ns"))}


def _latencies(latency: Mapping[str, object]) -> dict[str, float]:
    figures = {"mean_us": fields.number(latency.get("mean"), "clat mean") / 1e3}
    percentiles = fields.mapping(latency.get("percentile", {}), "percentile")
    for key, name in (("50.000000", "p50_us"), ("99.000000", "p99_us"), ("99.900000", "p999_us")):
        if key in percentiles:
            figures[name] = fields.number(percentiles[key], key) / 1e3
    return figures


def start(job: Job) -> subprocess.Popen[str]:
    """Start a job beside another; hand it to `finish`."""
    return subprocess.Popen(command(job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(running: subprocess.Popen[str], *, limit_s: float = MARGIN_S) -> dict[str, float]:
    """Wait for a job and return its figures; raise PeerError if it failed or hangs."""
    try:
        out, err = running.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"fio: no end within {limit_s:.0f} s") from error
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()
    if running.returncode:
        raise PeerError(f"fio: exit {running.returncode}: {(err or out)[-300:]}")
    return parse(out)


def run(job: Job) -> dict[str, float]:
    """Run a job to its end."""
    return finish(start(job), limit_s=MARGIN_S + (job.runtime_s or 0))
