"""Results files and the report made of them."""

import dataclasses
import json

import pytest

from bench.errors import UsageError
from bench.goals import judge
from bench.report import BEGIN, END, as_document, replace_block
from bench.results import Conditions, Machine, Results, Run, Session, load, merge, save
from bench.tables import (
    Table,
    as_markdown,
    as_text,
    goal_table,
    overview_tables,
    result_tables,
)

MACHINE = Machine(
    kernel="6.1", processor="any", cpu_count=2, memory_gib=8.0, versions={"fio": "fio-3.33"}
)


def results(kind="io", *, iops=100.0):
    conditions = Conditions(
        filesystem="tmpfs",
        is_direct=False,
        qemu_aio="threads",
        others_before_cores=0.0,
        size_bytes=1 << 30,
        seconds=1.0,
        scale=1.0,
        round_count=1,
        sync_cost={"origin_us_1": 1.0},
    )
    figures = {"iops": iops, "mb_per_s": iops * 0.0041, "p50_us": 1.0, "p99_us": 2.0}
    sessions = (
        Session(
            target="qsd-raw",
            round_index=0,
            rows={"rr4k_q32": figures},
            figures={"pss_mib": 3.0},
            is_view_intact=None,
        ),
        Session(target="qsd-cbw", round_index=0, failures={"session": "did not start"}),
        Session(target="qsd-cbw@half", round_index=0, is_view_intact=True),
    )
    run = Run(kind=kind, conditions=conditions, sessions=sessions)
    return Results(machine=MACHINE, runs={kind: run})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "out.json"
    save(results(), path)
    assert load(path) == results()


def test_saving_leaves_no_draft_behind(tmp_path):
    save(results(), tmp_path / "out.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "stillblock-bench", "version": 9}']
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"other\.json"):
        load(path)


def test_later_files_win_where_a_kind_of_run_occurs_twice():
    merged = merge([results(iops=1.0), results("sync"), results(iops=2.0)])
    assert sorted(merged.runs) == ["io", "sync"]
    assert merged.runs["io"].sessions[0].figure("rr4k_q32", "iops") == 2.0


def test_merging_nothing_is_refused():
    with pytest.raises(UsageError):
        merge([])


def test_results_name_no_host_and_no_directory(tmp_path):
    path = tmp_path / "out.json"
    save(results(), path)
    assert set(json.loads(path.read_text())["machine"]) == {
        "kernel",
        "processor",
        "cpu_count",
        "memory_gib",
        "versions",
    }


def test_a_report_tells_void_runs_and_failures_first():
    document = as_document(results(), judge(results()))
    assert document.startswith("**Not to be quoted")
    assert "VOID io: 1 rounds" in document
    assert "FAILED io: qsd-cbw session: did not start" in document
    assert "| rr4k_q32 | 100 ~0% |" in document


def test_the_block_between_the_markers_is_replaced_and_nothing_else():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    replaced = replace_block(document, "new")
    assert replaced == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replace_block(replaced, "new") == replaced


@pytest.mark.parametrize("document", ["nothing", BEGIN, END, f"{END}{BEGIN}"])
def test_a_document_without_both_markers_is_refused(document):
    with pytest.raises(UsageError, match="no place for results"):
        replace_block(document, "new")


def test_words_stand_left_and_figures_right():
    table = Table(title="t", rows=(("row", "x"), ("a", "10.5")))
    assert as_text(table).splitlines() == ["## t", "row     x", "a    10.5"]
    assert as_markdown(table).splitlines()[3] == "| --- | ---: |"


def test_the_overview_holds_ratio_spread_and_cpu_in_one_cell():
    other = Session(
        target="nbdkit",
        round_index=0,
        rows={"rr4k_q32": {"iops": 250.0, "mb_per_s": 1.0, "cpu_us_per_request": 7.0}},
    )
    run = results().runs["io"]
    both = dataclasses.replace(run, sessions=(*run.sessions, other))
    (table,) = overview_tables(Results(machine=MACHINE, runs={"io": both}))
    cells = dict(zip(table.rows[0], table.rows[1], strict=True))
    assert cells["row"] == "rr4k_q32"
    assert cells["qsd-raw"] == "100 ~0%"
    assert cells["nbdkit"] == "2.50 (2.50-2.50), 7.0 us"


def test_others_are_compared_with_a_target_that_was_measured():
    run = results().runs["io"]
    failed = Session(target="stillblock", round_index=0, failures={"session": "did not start"})
    both = dataclasses.replace(run, sessions=(failed, *run.sessions))
    (table,) = overview_tables(Results(machine=MACHINE, runs={"io": both}))
    assert "against qsd-raw" in table.title


def test_a_brief_table_of_goals_leaves_out_what_was_not_measured():
    outcomes = judge(results())
    assert len(goal_table(outcomes).rows) == len(outcomes) + 1
    brief = goal_table(outcomes, is_complete=False)
    assert len(brief.rows) == 1
    assert f"{len(outcomes)} not measured" in brief.title


def test_a_table_without_a_single_figure_is_left_out():
    titles = [table.title for table in result_tables(results())]
    assert not [title for title in titles if "bytes kept" in title]
    assert [title for title in titles if "throughput, requests/s" in title]
