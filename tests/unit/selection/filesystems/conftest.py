"""Failed assertions of the shared contract tell as much as those in a test."""

import pytest

pytest.register_assert_rewrite("unit.selection.filesystems.reader_contract")
