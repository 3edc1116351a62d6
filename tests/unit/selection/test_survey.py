"""Terms on filesystems: two steps, who claims what, and what stays where something is not known."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.errors import ClosedError, ExcludedError, OriginIOError, RuleError
from stillblock.extents import intersect, subtract, total_bytes
from stillblock.model import Extents
from stillblock.selection import (
    Known,
    Pending,
    Phase,
    Resolution,
    Rules,
    frozen,
    resolve,
    resolve_frozen,
)
from stillblock.selection.disk import Disk
from stillblock.selection.facts import Readers
from stillblock.selection.filesystems import FileKind
from unit.selection.fake_filesystems import (
    FakeFile,
    FakeFilesystem,
    FakeReaders,
    partitioned,
    put_filesystem,
    swap_head,
)
from unit.selection.lvm_images import group_text, physical_volume, segment, volume
from unit.selection.partition_images import (
    MIB,
    BytesDisk,
    FailingDisk,
    GptPart,
    blank,
    gpt_disk,
)

KIB = 1024
AT = MIB
"""Where the first partition begins."""


def rules_of(*terms: str) -> Rules:
    """`+all` includes, `-part:2` excludes, `~part:2` includes what matters less."""
    actions = {"+": "include", "-": "exclude", "~": "include-low"}
    return Rules.parse([(actions[term[0]], term[1:]) for term in terms])


def both(
    disk: Disk, readers: Readers, *terms: str, block_size: int = 4096
) -> tuple[Resolution, Resolution]:
    """Resolve before the instant and on the frozen view, through JSON as after a crash."""
    instant = resolve(rules_of(*terms), disk, block_size=block_size, readers=readers)
    if instant.pending is None:
        return instant, instant
    pending = Pending.from_json(json.loads(json.dumps(instant.pending.to_json())))
    assert pending == instant.pending
    final = resolve_frozen(pending, disk, readers=readers)
    assert final.is_final
    assert not subtract(final.extents, instant.extents)
    return instant, final


def left_out(resolution: Resolution) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for part in resolution.excluded:
        found.setdefault(part.because, []).append((part.start - AT, part.end - AT))
    return found


def file(*extents: tuple[int, int], **how: object) -> FakeFile:
    found = FakeFile([(start * KIB, end * KIB) for start, end in extents])
    for name, value in how.items():
        setattr(found, name, value)
    return found


def kib(*extents: tuple[int, int]) -> list[tuple[int, int]]:
    return [(start * KIB, end * KIB) for start, end in extents]


# Paths ------------------------------------------------------------------------------------------


def test_files_that_match_are_left_out_after_the_instant_and_not_before() -> None:
    filesystem = FakeFilesystem(
        {
            "/var/cache/a": file((100, 200), (300, 304)),
            "/var/cache/apt/b": file((400, 500)),
            "/etc/fstab": file((600, 604)),
        }
    )
    disk, readers = partitioned(filesystem)
    instant, final = both(disk, readers, "-path:/var/cache/**", "+path:/var/cache/apt/**")
    assert instant.extents == ((0, disk.size),)
    assert not instant.is_final
    assert left_out(final) == {"path:/var/cache/**": kib((100, 200), (300, 304))}
    assert [term.file_count for term in final.terms] == [2, 1]
    assert final.terms[0].contributed_bytes == 104 * KIB
    assert final.terms[0].phase is Phase.FROZEN
    assert final.unresolved == ()


def test_directories_links_and_other_things_stay() -> None:
    filesystem = FakeFilesystem(
        {
            "/d/link": file((100, 104), kind=FileKind.SYMLINK),
            "/d/fifo": file((200, 204), kind=FileKind.OTHER),
            "/d/data": file((300, 304)),
        }
    )
    _, final = both(*partitioned(filesystem), "-path:/d")
    assert left_out(final) == {"path:/d": kib((300, 304))}


def test_an_inclusion_of_files_takes_the_metadata_that_makes_them_readable() -> None:
    """What is neither a file's nor free: superblocks, directories, and what lies past the end."""
    filesystem = FakeFilesystem(
        {"/keep": file((100, 200)), "/other": file((200, 300))},
        free_extents=((400 * KIB, 900 * KIB),),
        size=1000 * KIB,
    )
    disk, readers = partitioned(filesystem, FakeFilesystem())
    instant, final = both(disk, readers, "+path:/keep")
    assert instant.extents == ((AT, AT + 2 * MIB),)
    assert final.extents == (
        (AT, AT + 200 * KIB),
        (AT + 300 * KIB, AT + 400 * KIB),
        (AT + 900 * KIB, AT + MIB),
    )
    assert final.terms[0].note == ""


def test_an_exception_for_files_is_not_credited_with_metadata_that_stays_anyway() -> None:
    filesystem = FakeFilesystem({"/etc/a": file((100, 200)), "/b": file((200, 300))})
    _, final = both(*partitioned(filesystem), "-path:/**", "+path:/etc")
    assert left_out(final) == {"path:/**": kib((200, 300))}
    assert final.terms[1].contributed_bytes == final.terms[1].bytes == 100 * KIB


def test_a_path_that_matches_nothing_is_a_note() -> None:
    _, final = both(*partitioned(FakeFilesystem({"/a": file((100, 200))})), "-path:/b")
    assert final.excluded == ()
    assert final.terms[0].note == "no file matched"


def test_case_is_the_filesystems() -> None:
    files = {"/Temp/A.TMP": file((100, 200))}
    for is_case_sensitive, expected in ((True, {}), (False, {"path:/temp/*.tmp": kib((100, 200))})):
        filesystem = FakeFilesystem(dict(files), is_case_sensitive=is_case_sensitive)
        _, final = both(*partitioned(filesystem), "-path:/temp/*.tmp")
        assert left_out(final) == expected


@pytest.mark.parametrize("name", ["data", "90C5CA8F-0000-4000-8000-00000000ABCD", "2"])
def test_one_filesystem_can_be_named(name: str) -> None:
    files = {"/x": file((100, 200))}
    disk, readers = partitioned(
        FakeFilesystem(dict(files), label="root"),
        FakeFilesystem(dict(files), label="data", uuid="90c5ca8f-0000-4000-8000-00000000abcd"),
    )
    _, final = both(disk, readers, f"-path:{name}:/x")
    assert left_out(final) == {f"path:{name}:/x": kib((1124, 1224))}
    assert readers.filesystems[0].surveys == 0
    _, final = both(disk, readers, f"-fs:{name}")
    assert left_out(final) == {f"fs:{name}": kib((1024, 2048))}


@pytest.mark.parametrize(
    "text", ["path:data:/x", "fs:data", "fs:7", "fs:2", "lv:vg/x", "path:vg/x:/"]
)
def test_a_name_that_is_not_there_is_refused(text: str) -> None:
    disk, readers = partitioned(FakeFilesystem(label="root", uuid="1234"), swap=True)
    for sign in "+-":
        with pytest.raises(RuleError) as caught:
            resolve(rules_of("+all", sign + text), disk, block_size=4096, readers=readers)
        assert str(caught.value).startswith(f'"{text}": ')
        if "data" in text:
            assert 'part:1 ext4 "root" 1234' in str(caught.value)


def test_a_filesystem_that_cannot_say_its_name_is_not_guessed_at() -> None:
    """Left out is nothing, taken in is all that it might be."""
    disk, readers = partitioned(
        FakeFilesystem(label="root"), FakeFilesystem(open_error="the superblock is torn")
    )
    instant, final = both(disk, readers, "-fs:data")
    assert (instant.excluded, final.excluded) == ((), ())
    assert "torn" in final.unresolved[0].reason
    instant, final = both(disk, readers, "+fs:data")
    assert final.extents == ((2 * MIB, 3 * MIB),)
    _, final = both(disk, readers, "+path:data:/x")
    assert final.extents == ((2 * MIB, 3 * MIB),)


def test_a_name_that_is_gone_at_the_instant_is_a_note() -> None:
    filesystem = FakeFilesystem({"/x": file((100, 200))}, label="data")
    disk, readers = partitioned(filesystem)
    instant = resolve(rules_of("-path:data:/x"), disk, block_size=4096, readers=readers)
    assert instant.pending
    filesystem.label = "other"
    final = resolve_frozen(instant.pending, disk, readers=readers)
    assert final.excluded == ()
    assert "no filesystem of that name" in final.terms[0].note


# Claims -----------------------------------------------------------------------------------------


def test_a_file_with_two_names_is_left_out_only_if_both_are() -> None:
    both_names = {
        "/a.tmp": file((100, 200), number=7, links=2),
        "/b.log": file((100, 200), number=7, links=2),
    }
    disk, readers = partitioned(FakeFilesystem(both_names))
    _, final = both(disk, readers, "-path:/*.tmp")
    assert final.excluded == ()
    _, final = both(disk, readers, "-path:/*.tmp", "-path:/*.log")
    assert left_out(final) == {"path:/*.log": kib((100, 200))}


def test_a_name_that_was_not_found_keeps_its_file() -> None:
    disk, readers = partitioned(FakeFilesystem({"/a.tmp": file((100, 200), links=2)}))
    _, final = both(disk, readers, "-path:/*.tmp")
    assert final.excluded == ()
    assert "1 files have names elsewhere" in final.terms[0].note


def test_shared_blocks_are_left_out_only_if_all_who_share_them_are() -> None:
    filesystem = FakeFilesystem(
        {"/a.tmp": file((100, 200)), "/b.tmp": file((150, 250)), "/keep": file((240, 300))}
    )
    _, final = both(*partitioned(filesystem), "-path:/*.tmp")
    assert left_out(final) == {"path:/*.tmp": kib((100, 240))}


def test_metadata_is_never_left_out_by_a_file_or_as_free() -> None:
    filesystem = FakeFilesystem(
        {"/a.tmp": file((0, 100))},
        fixed_extents=((0, 8 * KIB), (60 * KIB, 64 * KIB), (500 * KIB, 504 * KIB)),
        free_extents=((400 * KIB, 600 * KIB),),
    )
    _, final = both(*partitioned(filesystem), "-path:/*.tmp", "-free")
    assert left_out(final) == {
        "path:/*.tmp": kib((8, 60), (64, 100)),
        "free": kib((400, 500), (504, 600)),
    }


def test_free_space_that_a_file_claims_is_kept() -> None:
    filesystem = FakeFilesystem({"/a": file((500, 520))}, free_extents=((400 * KIB, 600 * KIB),))
    _, final = both(*partitioned(filesystem), "-free")
    assert left_out(final) == {"free": kib((400, 500), (520, 600))}


def test_a_range_leaves_out_whatever_lies_there() -> None:
    """Bytes are the user's to give away; files that reach outside keep what is outside."""
    filesystem = FakeFilesystem({"/a": file((0, 200))})
    disk, readers = partitioned(filesystem)
    _, final = both(disk, readers, "-path:/a", "-1MiB+64KiB", "+1MiB+4KiB")
    assert left_out(final) == {"1MiB+64KiB": kib((4, 64)), "path:/a": kib((64, 200))}


# Free space, swap, zeros ------------------------------------------------------------------------


def test_free_space_is_left_out_by_every_filesystem() -> None:
    disk, readers = partitioned(
        FakeFilesystem(free_extents=((100 * KIB, 200 * KIB),)),
        FakeFilesystem(free_extents=((300 * KIB, 400 * KIB),)),
    )
    _, final = both(disk, readers, "-free")
    assert left_out(final) == {"free": kib((100, 200), (1324, 1424))}


def test_swap_partitions_hold_from_the_first_write_and_keep_their_header() -> None:
    disk, readers = partitioned(FakeFilesystem(), swap=True)
    instant, final = both(disk, readers, "-swap")
    assert left_out(instant) == left_out(final) == {"swap": kib((1024 + 64, 2048))}
    assert final.terms[0].note == "means part:2"
    instant, final = both(disk, readers, "+swap")
    assert final.extents == ((2 * MIB, 3 * MIB),)


def test_what_was_left_out_as_swap_and_was_none_is_said() -> None:
    disk, readers = partitioned(swap=True)
    instant = resolve(rules_of("-swap"), disk, block_size=4096, readers=readers)
    assert instant.pending
    disk.content[MIB + 4086 : MIB + 4096] = bytes(10)
    final = resolve_frozen(instant.pending, disk, readers=readers)
    assert final.extents == instant.extents
    assert "was swap before the instant and nothing known at the instant" in (
        final.unresolved[0].reason
    )


@pytest.mark.parametrize("page", [4096, 65536])
def test_swap_files_are_told_by_content(page: int) -> None:
    filesystem = FakeFilesystem(
        {
            "/swapfile": file((100, 300), head=swap_head(page), mode=0o644),
            "/var/hidden": file((300, 400), head=swap_head(page), mode=0o600, uid=0),
            "/home/image": file((400, 500), head=swap_head(page)),
            "/swap/not": file((500, 600), head=bytes(page)),
            "/swap.img": file((600, 604), head=swap_head(page)),
        }
    )
    _, final = both(*partitioned(filesystem), "-swap", block_size=1024)
    page_kib = page // KIB
    assert left_out(final) == {"swap": kib((100 + page_kib, 300), (300 + page_kib, 400))}
    assert final.terms[0].file_count == 2


def test_zeros_are_read_only_where_it_matters() -> None:
    disk = blank(4 * MIB)
    disk.content[MIB + 5000] = 1
    disk.content[3 * MIB] = 1
    instant, final = both(disk, FakeReaders([]), "-zero", "-2MiB-3MiB")
    assert instant.extents == ((0, 2 * MIB), (3 * MIB, 4 * MIB))
    assert final.extents == ((MIB + 4096, MIB + 8192), (3 * MIB, 3 * MIB + 4096))
    reads = [(offset, offset + length) for offset, length in disk.reads[-4:]]
    assert not any(start < 3 * MIB and end > 2 * MIB for start, end in reads)
    _, final = both(disk, FakeReaders([]), "+zero", "+3MiB+1")
    assert final.extents == (
        (0, MIB + 4096),
        (MIB + 8192, 4 * MIB),
    )


def test_nothing_is_started_where_nothing_can_be_left_out() -> None:
    filesystem = FakeFilesystem(free_extents=((100 * KIB, 200 * KIB),))
    disk, readers = partitioned(filesystem, swap=True)
    for terms in (
        ("-free", "-part:1"),
        ("-free", "+all"),
        ("-part:1", "-free"),
        ("-zero", "+all"),
        ("+part:2", "-free"),
    ):
        assert resolve(rules_of(*terms), disk, block_size=4096, readers=readers).is_final, terms
    assert resolve(
        rules_of("-free", "-swap"), blank(MIB), block_size=4096, readers=readers
    ).is_final
    assert filesystem.surveys == 0


def test_an_inclusion_of_files_on_a_disk_without_any_is_refused() -> None:
    with pytest.raises(RuleError, match="there is no filesystem on this disk"):
        resolve(rules_of("+path:/etc"), blank(MIB), block_size=4096, readers=FakeReaders([]))
    instant, _ = both(blank(MIB), FakeReaders([]), "-free", "-swap")
    assert [term.note for term in instant.terms] == ["nothing on this disk that it could mean"] * 2


# What is not known ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tree_error", "open_error"])
def test_a_filesystem_that_cannot_be_read_is_kept_whole_and_costs_no_other(how: str) -> None:
    good = FakeFilesystem({"/a": file((100, 200))}, free_extents=((300 * KIB, 400 * KIB),))
    bad = FakeFilesystem({"/a": file((100, 200))}, free_extents=((300 * KIB, 400 * KIB),))
    setattr(bad, how, "it is torn")
    disk, readers = partitioned(good, bad)
    _, final = both(disk, readers, "-path:/a", "-free")
    assert left_out(final) == {"path:/a": kib((100, 200)), "free": kib((300, 400))}
    assert [(u.place, u.reason) for u in final.unresolved] == [("part:2", "it is torn")]
    _, final = both(disk, readers, "+path:/a")
    assert intersect(final.extents, ((2 * MIB, 3 * MIB),)) == ((2 * MIB, 3 * MIB),)


def test_a_map_that_cannot_be_read_leaves_nothing_out_as_free() -> None:
    filesystem = FakeFilesystem({"/a": file((100, 200))}, free_error="no map")
    disk, readers = partitioned(filesystem)
    _, final = both(disk, readers, "-path:/a", "-free")
    assert left_out(final) == {"path:/a": kib((100, 200))}
    assert final.terms[1].unresolved[0].reason == "no map"
    _, final = both(disk, readers, "+free")
    assert final.extents == ((MIB, 2 * MIB),)
    _, final = both(disk, readers, "+path:/a", "-free")
    assert final.extents == ((MIB, 2 * MIB),)


def test_a_file_that_cannot_be_placed_is_kept_or_widens_to_its_filesystem() -> None:
    filesystem = FakeFilesystem(
        {"/a.tmp": file((100, 200), error="it is compressed"), "/b.tmp": file((200, 300))}
    )
    disk, readers = partitioned(filesystem)
    _, final = both(disk, readers, "-path:/*.tmp")
    assert left_out(final) == {"path:/*.tmp": kib((200, 300))}
    assert final.unresolved[0].reason == "1 files could not be placed: it is compressed"
    _, final = both(disk, readers, "+path:/*.tmp")
    assert final.extents == ((MIB, 2 * MIB),)


def test_a_file_that_cannot_be_placed_may_share_blocks_where_files_do() -> None:
    files = {"/a.tmp": file((100, 200)), "/b": file((200, 300), error="it is odd")}
    for kind, expected in (("ext4", {"path:/*.tmp": kib((100, 200))}), ("xfs", {})):
        filesystem = FakeFilesystem(dict(files), kind=kind, free_extents=((400 * KIB, 500 * KIB),))
        _, final = both(*partitioned(filesystem), "-path:/*.tmp", "-free")
        assert left_out(final) == expected | {"free": kib((400, 500))}
    assert final.unresolved[0].reason == (
        "1 files could not be placed, and may share what others have: it is odd"
    )


def test_free_space_in_too_many_pieces_is_told_by_its_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stillblock.selection.survey.FREE_PIECES_MAX", 2)
    filesystem = FakeFilesystem(
        free_extents=tuple((n * 100 * KIB, (n * 100 + n * 4) * KIB) for n in range(1, 5))
    )
    _, final = both(*partitioned(filesystem), "-free")
    assert left_out(final) == {"free": kib((300, 312), (400, 416))}
    assert final.notes == ("part:1: only the 2 largest pieces of free space are left out",)


def test_files_in_too_many_pieces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillblock.selection.survey.PIECES_MAX", 1)
    filesystem = FakeFilesystem({"/a": file((100, 200), (300, 400))})
    _, final = both(*partitioned(filesystem), "-path:/a")
    assert final.excluded == ()
    assert "its files lie in 2 pieces" in final.unresolved[0].reason


def test_a_file_that_is_said_to_lie_outside_is_kept() -> None:
    filesystem = FakeFilesystem({"/a": file((1000, 1100))})
    _, final = both(*partitioned(filesystem), "-path:/a")
    assert final.excluded == ()
    assert "outside the filesystem" in final.unresolved[0].reason


@pytest.mark.parametrize("error", [OriginIOError("bad sector"), ExcludedError("left out")])
def test_zeros_that_cannot_be_read_are_kept(error: Exception) -> None:
    disk = blank(4 * MIB)
    instant = resolve(rules_of("-zero"), disk, block_size=4096, readers=FakeReaders([]))
    assert instant.pending
    final = resolve_frozen(instant.pending, FailingDisk(disk, (MIB, MIB + 1), error))
    assert final.extents == ((MIB, 2 * MIB),)
    assert error.message in final.unresolved[0].reason  # type: ignore[attr-defined]


def striped(size: int) -> BytesDisk:
    """A disk of which each other block is zero."""
    disk = blank(size)
    for at in range(0, size, 8192):
        disk.content[at] = 1
    return disk


def test_zeros_in_too_many_pieces_are_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "ZERO_PIECES_MAX", 300)
    instant, final = both(striped(4 * MIB), FakeReaders([]), "-zero")
    assert total_bytes(instant.extents) == 4 * MIB
    # Of each MiB 128 blocks are zero, and it is known after three that they are too many.
    assert total_bytes(intersect(final.extents, ((0, 3 * MIB),))) == 3 * MIB // 2
    assert intersect(final.extents, ((3 * MIB, 4 * MIB),)) == ((3 * MIB, 4 * MIB),)
    (unresolved,) = final.unresolved
    assert unresolved.reason == (
        f"there are more than 300 pieces of zeros, which were not looked for any more from byte "
        f"{3 * MIB} on"
    )

    _, included = both(striped(4 * MIB), FakeReaders([]), "+zero")
    assert total_bytes(intersect(included.extents, ((0, 3 * MIB),))) == 3 * MIB // 2
    assert intersect(included.extents, ((3 * MIB, 4 * MIB),)) == ((3 * MIB, 4 * MIB),)


def test_a_disk_of_zeros_is_one_piece_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "ZERO_PIECES_MAX", 3)
    _, final = both(blank(8 * MIB), FakeReaders([]), "-zero", "+8KiB-12KiB")
    assert final.extents == ((8 * KIB, 12 * KIB),)
    assert final.unresolved == ()


def test_a_volume_that_is_closed_meanwhile_ends_the_work() -> None:
    disk = blank(MIB)
    instant = resolve(rules_of("-zero"), disk, block_size=4096, readers=FakeReaders([]))
    assert instant.pending
    with pytest.raises(ClosedError):
        resolve_frozen(instant.pending, FailingDisk(disk, (0, MIB), ClosedError("closed")))


def test_the_frozen_view_need_not_hold_the_partition_table() -> None:
    filesystem = FakeFilesystem({"/a": file((100, 200)), "/b": file((200, 300))})
    disk, readers = partitioned(filesystem)
    instant = resolve(rules_of("+part:1", "-path:/a"), disk, block_size=4096, readers=readers)
    assert instant.pending
    view = FailingDisk(disk, (0, MIB), ExcludedError("not selected"))
    final = resolve_frozen(instant.pending, view, readers=readers)
    assert final.extents == ((MIB, MIB + 100 * KIB), (MIB + 200 * KIB, 2 * MIB))


# Logical volumes --------------------------------------------------------------------------------


def test_terms_reach_into_logical_volumes_in_pieces() -> None:
    """64 KiB extents: the volume's second half lies before its first."""
    text = group_text(
        volume("root", segment(0, 8, "pv0", 20), segment(8, 8, "pv0", 0)),
        volume("swap", segment(0, 4, "pv0", 40)),
        volume("odd", 'segment1 { start_extent = 0 extent_count = 1 type = "thin" }'),
    )
    disk = BytesDisk(physical_volume(text))
    extent = 64 * KIB
    put_filesystem(disk, MIB + 20 * extent, 0)
    disk.content[MIB + 40 * extent :][:4096] = swap_head()
    start = MIB + 40 * extent
    disk.content[start : start + 4096] = swap_head()
    filesystem = FakeFilesystem({"/a": FakeFile([(7 * extent, 9 * extent)])})
    _, final = both(disk, FakeReaders([filesystem]), "-path:vg0/root:/a", "-swap")
    assert left_out(final) == {
        "path:vg0/root:/a": [(0, extent), (27 * extent, 28 * extent)],
        "swap": [(41 * extent, 44 * extent)],
    }
    instant, _ = both(disk, FakeReaders([filesystem]), "-lv:vg0/swap")
    assert left_out(instant) == {"lv:vg0/swap": [(40 * extent, 44 * extent)]}
    instant, _ = both(disk, FakeReaders([filesystem]), "-lv:vg0/odd")
    assert instant.excluded == ()
    assert 'type "thin"' in instant.unresolved[0].reason
    instant, _ = both(disk, FakeReaders([filesystem]), "+lv:vg0/odd")
    assert instant.extents == ((0, disk.size),)


# Any terms in any order ---------------------------------------------------------------------------

TERMS = st.sampled_from(
    [
        "all",
        "free",
        "swap",
        "zero",
        "path:/a/**",
        "path:/**/*.t",
        "path:/b",
        "path:/a/x.t",
        "path:data:/**",
        "fs:data",
        "fs:1",
        "part:2",
        "unpartitioned",
        "1MiB-1100KiB",
        "1200KiB+300KiB",
    ]
)
PIECES = st.integers(0, 14).map(lambda n: (n * 64 * KIB, (n + 2) * 64 * KIB))


@st.composite
def filesystems(draw: st.DrawFn, label: str) -> FakeFilesystem:
    names = ["/a/x.t", "/a/y", "/b", "/c.t", "/swapfile"]
    files = {}
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        files[name] = FakeFile(
            draw(st.lists(PIECES, max_size=2)),
            number=draw(st.integers(10, 12)) if draw(st.booleans()) else 0,
            links=draw(st.integers(1, 2)),
            error=draw(st.sampled_from(["", "", "", "odd"])),
            head=draw(st.sampled_from([b"", swap_head()])),
            size=MIB,
        )
    by_number: dict[int, FakeFile] = {}
    for name, one in files.items():
        if one.number:
            files[name] = by_number.setdefault(one.number, one)
    return FakeFilesystem(
        files,
        free_extents=tuple(sorted({draw(PIECES)})) if draw(st.booleans()) else (),
        label=label,
        kind=draw(st.sampled_from(["ext4", "xfs"])),
        free_error=draw(st.sampled_from(["", "", "no map"])),
        tree_error=draw(st.sampled_from(["", "", "", "torn"])),
        open_error=draw(st.sampled_from(["", "", "", "", "", "shut"])),
    )


def is_meant_by_path(glob: str, path: str) -> bool:
    return {
        "/a/**": path.startswith("/a/"),
        "/**/*.t": path.endswith(".t"),
        "/b": path == "/b",
        "/a/x.t": path == "/a/x.t",
        "/**": True,
    }[glob]


class Oracle:
    """Decides each block of 4 KiB alone, from who claims it; slow, and without extents."""

    def __init__(self, terms: list[str], disk: BytesDisk, found: list[FakeFilesystem]) -> None:
        self.terms = [(term[0] == "+", term[1:]) for term in terms]
        self.disk, self.found = disk, found

    def selected(self) -> set[int]:
        return {block for block in range(0, self.disk.size, 4096) if not self.is_out(block)}

    def is_out(self, block: int) -> bool:
        index = block // MIB - 1
        by_bytes = {n for n, term in enumerate(self.terms) if self.is_meant(*term, block)}
        claims = [by_bytes]
        if 0 <= index < len(self.found) and not self.found[index].open_error:
            claims = self.claims(index, block % MIB, by_bytes)
        return all(self.says_out(claim) for claim in claims)

    def says_out(self, claim: set[int]) -> bool:
        return not self.terms[max(claim)][0] if claim else self.terms[0][0]

    def is_meant(self, include: bool, text: str, block: int) -> bool:
        index = block // MIB - 1
        if text == "swap" and index == 2:
            return include or block % MIB >= 64 * KIB
        if text in ("free", "swap") or text.startswith("path:"):
            return include and self.is_unresolved(text, index)
        if text == "fs:data":
            # What cannot be opened may have the name too.
            silent = [n for n, one in enumerate(self.found) if one.open_error]
            return include if index in silent else index == 1
        ranges = {"1MiB-1100KiB": (MIB, 1100 * KIB), "1200KiB+300KiB": (1200 * KIB, 1500 * KIB)}
        if text in ranges:
            start, end = ranges[text]
            assert start % 4096 == end % 4096 == 0
            return start <= block < end
        return {
            "all": True,
            "zero": not any(self.disk.content[block : block + 4096]),
            "fs:1": index == 0,
            "part:2": index == 1,
            "unpartitioned": not 0 <= index <= 2,
        }[text]

    def concerns(self, text: str, index: int) -> bool:
        if not 0 <= index < len(self.found):
            return False
        if not text.startswith("path:data:"):
            return True
        return index == 1 or bool(self.found[index].open_error)

    def is_unresolved(self, text: str, index: int) -> bool:
        if not self.concerns(text, index):
            return False
        one = self.found[index]
        if one.open_error:
            return True
        if text.startswith("path:data:") and index != 1:
            return False
        if one.tree_error or (text == "free" and one.free_error):
            return True
        if text != "free" and self.may_hide_shares(one):
            return True
        return any(
            file.error and self.means(text, path, file, 0) for path, file in one.files.items()
        )

    def may_hide_shares(self, one: FakeFilesystem) -> bool:
        return one.kind == "xfs" and any(file.error for file in one.files.values())

    def means(self, text: str, path: str, file: FakeFile, offset: int) -> bool:
        if text == "swap":
            return path == "/swapfile" and bool(file.head) and not file.error and offset >= 4096
        if not text.startswith("path:"):
            return False
        return is_meant_by_path(text.removeprefix("path:").removeprefix("data:"), path)

    def claims(self, index: int, at: int, by_bytes: set[int]) -> list[set[int]]:
        one = self.found[index]
        if one.tree_error:
            return [by_bytes]
        kinds = [
            (n, include, text)
            for n, (include, text) in enumerate(self.terms)
            if not (text.startswith("path:data:") and index != 1)
            if text == "free" or not self.may_hide_shares(one)
        ]
        found = []
        seen: dict[int, int] = {}
        for path, file in one.files.items():
            seen[file.number] = seen.get(file.number, 0) + 1
            offset = 0
            for start, end in file.extents if not file.error else []:
                if start <= at < end:
                    place = offset + at - start
                    found.append(
                        by_bytes | {n for n, _, t in kinds if self.means(t, path, file, place)}
                    )
                offset += end - start + 4096
        in_file = bool(found)
        for file in one.files.values():
            if seen[file.number] < file.links and not file.error:
                found += [by_bytes for start, end in file.extents if start <= at < end]
        if at < 4096:
            found.append(by_bytes)
        is_free = any(start <= at < end for start, end in one.free_extents)
        if is_free and not in_file and at >= 4096 and not one.free_error:
            found.append(by_bytes | {n for n, _, t in kinds if t == "free"})
        elif not in_file or at < 4096:
            readable = {
                n
                for n, include, text in kinds
                if include and any(self.means(text, p, f, 0) for p, f in one.files.items())
                if text.startswith("path:")
            }
            found.append(by_bytes | readable)
        return found


@given(
    st.lists(st.tuples(st.sampled_from("+-"), TERMS).map("".join), min_size=1, max_size=6),
    filesystems("root"),
    filesystems("data"),
)
def test_any_terms_select_what_deciding_each_block_by_its_claims_selects(
    terms: list[str], root: FakeFilesystem, data: FakeFilesystem
) -> None:
    disk, readers = partitioned(root, data, swap=True)
    try:
        instant, final = both(disk, readers, *terms)
    except RuleError:
        return
    assert total_bytes(final.extents) + sum(x.end - x.start for x in final.excluded) == disk.size
    selected = {block for start, end in final.extents for block in range(start, end, 4096)}
    assert selected == Oracle(terms, disk, [root, data]).selected()
    assert selected <= {b for start, end in instant.extents for b in range(start, end, 4096)}


# What matters less ------------------------------------------------------------------------------
# A full store loses low blocks for good and first: doubt about what a low inclusion means must
# select, and must not lower what matters.


def log_and_settings(open_error: str = "") -> tuple[BytesDisk, FakeReaders]:
    files = {"/var/log/a": file((100, 200)), "/etc/b": file((300, 400))}
    return partitioned(FakeFilesystem(files, open_error=open_error))


def test_until_the_frozen_view_is_read_nothing_matters_less_for_its_sake() -> None:
    instant, final = both(*log_and_settings(), "-swap", "~path:/var/log")
    assert instant.low == ()
    assert final.low == ((AT + 100 * KIB, AT + 200 * KIB),)


def test_a_filesystem_that_cannot_be_read_does_not_matter_less() -> None:
    disk, readers = log_and_settings("unknown features")
    _, final = both(disk, readers, "-free", "~path:/var/log")
    assert (final.extents, final.low) == (((0, disk.size),), ())
    _, final = both(disk, readers, "+part:1", "~path:/var/log")
    assert (final.extents, final.low) == (((AT, 2 * AT),), ())


def test_metadata_that_a_file_needs_which_matters_does_not_matter_less() -> None:
    _, final = both(*log_and_settings(), "+path:/etc", "~path:/var/log")
    assert final.low == ((AT + 100 * KIB, AT + 200 * KIB),)
    assert not subtract(((AT, AT + 4 * KIB),), final.extents)


# Names ------------------------------------------------------------------------------------------


def test_a_filesystem_that_may_have_the_name_too_is_included() -> None:
    disk, readers = partitioned(
        FakeFilesystem(label="data"), FakeFilesystem(label="data", open_error="damaged")
    )
    _, final = both(disk, readers, "+fs:data")
    assert final.extents == ((AT, 3 * AT),)
    assert [unresolved.place for unresolved in final.unresolved] == ["part:2"]


def test_what_is_known_of_a_filesystem_is_not_asked_again_but_where_it_lies_is_read_anew() -> None:
    disk, readers = partitioned(FakeFilesystem(label="data"), FakeFilesystem(label="other"))
    known = Known()

    def part_of_data() -> Extents:
        rules = rules_of("+fs:data")
        return resolve(rules, disk, block_size=4096, readers=readers, known=known).extents

    assert part_of_data() == ((AT, 2 * AT),)
    assert part_of_data() == ((AT, 2 * AT),)
    assert readers.identified == ["data", "other"]
    moved = gpt_disk({1: GptPart(4096, 6143)}, size=disk.size)
    put_filesystem(moved, 2 * AT, 0)
    disk.content[:] = moved.content
    assert part_of_data() == ((2 * AT, 3 * AT),)
    assert readers.identified == ["data", "other", "data"]


def test_the_text_of_a_volume_group_is_read_once_while_it_stays_the_same() -> None:
    disk = BytesDisk(physical_volume(group_text(volume("root", segment(0, 4, "pv0", 0)))))
    readers, known = FakeReaders([]), Known()

    def root() -> Extents:
        rules = rules_of("+lv:vg0/root")
        return resolve(rules, disk, block_size=4096, readers=readers, known=known).extents

    first = root()
    assert root() == first
    assert readers.parsed_count == 1
    moved = group_text(volume("root", segment(0, 4, "pv0", 8)), seqno=4)
    disk.content[:] = physical_volume(moved)
    assert total_bytes(root()) == total_bytes(first)
    assert root() != first
    assert readers.parsed_count == 2


def test_a_label_is_found_by_what_is_shown_of_it() -> None:
    filesystem = FakeFilesystem({"/a": file((100, 200))}, label="a\xa0b")
    disk, readers = partitioned(filesystem)
    _, final = both(disk, readers, "-path:a\\xa0b:/a")
    assert left_out(final) == {"path:a\\xa0b:/a": kib((100, 200))}
