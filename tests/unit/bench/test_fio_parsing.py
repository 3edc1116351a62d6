"""fio's JSON and command line."""

import json

import pytest

from bench.errors import PeerError
from bench.fio import Job, command, parse


def side(requests, iops=0.0):
    return {
        "total_ios": requests,
        "iops": iops,
        "bw_bytes": iops * 4096,
        "clat_ns": {
            "mean": 20500.0,
            "percentile": {"50.000000": 10000, "99.000000": 90000, "99.900000": 150000},
        },
    }


def report(*, read=0, write=0, error=0, iops=1000.0):
    jobs = [{"error": error, "read": side(read, iops), "write": side(write, iops)}]
    return json.dumps({"jobs": jobs})


def test_a_write_job_is_read_from_the_write_side():
    figures = parse(report(write=500))
    assert figures["requests"] == 500
    assert figures["iops"] == 1000.0
    assert figures["mb_per_s"] == pytest.approx(4.096)
    assert (figures["p50_us"], figures["p99_us"], figures["p999_us"]) == (10.0, 90.0, 150.0)
    assert figures["mean_us"] == 20.5


def test_a_read_job_is_read_from_the_read_side():
    assert parse(report(read=7))["requests"] == 7


def test_warnings_before_the_results_are_skipped():
    assert parse("nbd: some warning\n" + report(read=7))["requests"] == 7


def test_a_latency_without_percentiles_has_its_mean_alone():
    body = json.loads(report(read=1))
    del body["jobs"][0]["read"]["clat_ns"]["percentile"]
    figures = parse(json.dumps(body))
    assert "p99_us" not in figures
    assert figures["mean_us"] == 20.5


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "no results"),
        ("{", "cannot be read"),
        ("{}", "fio jobs"),
        ('{"jobs": []}', "0 jobs"),
        (report(read=1, error=5), "job error 5"),
        (report(), "no request"),
    ],
)
def test_results_that_cannot_be_used_are_refused_with_the_reason(output, reason):
    with pytest.raises(PeerError, match=reason):
        parse(output)


JOB = Job(uri="nbd+unix:///", pattern="randread", request_bytes=4096, depth=32, offset=0, length=1)


def test_a_steady_job_runs_for_its_time():
    line = command(Job(**{**slots(JOB), "runtime_s": 2.0}))
    assert "--runtime=2" in line
    assert "--time_based" in line


def test_a_counted_job_ends_with_its_count_even_if_it_is_timed():
    line = command(Job(**{**slots(JOB), "runtime_s": 2.0, "request_count": 9}))
    assert "--number_ios=9" in line
    assert "--time_based" not in line


def test_a_job_without_flushes_does_not_mention_them():
    assert not [word for word in command(JOB) if word.startswith("--fsync")]


def slots(job):
    return {name: getattr(job, name) for name in job.__slots__}
