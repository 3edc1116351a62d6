"""Damaged ext2/3/4: the reader ends, raises one class of error, gives away nothing in use."""

import collections

import pytest

from stillblock.selection.filesystems import open_filesystem
from unit.selection.filesystems.ext_images import SMALL, invisible, small_image
from unit.selection.filesystems.mutation import examine, try_one

pytestmark = [pytest.mark.needs("mkfs.ext4"), pytest.mark.slow]
CASES = 400


@pytest.mark.parametrize("name", SMALL)
def test_no_damage_lets_the_reader_give_away_what_is_used(tmp_path, name):
    content = small_image(tmp_path, name)
    subject = examine(content, open_filesystem, blind=invisible(content))
    outcomes = collections.Counter(try_one(seed, subject) for seed in range(CASES))
    print(name, dict(outcomes))
    assert outcomes["unresolved"] > CASES / 10, "the damage does not reach what is read"
    assert outcomes["resolved"] > CASES / 50, "nothing harmless was among it"
