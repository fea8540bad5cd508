"""Where results are written."""

import shutil
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.output import require_disk_space


def test_a_small_disk_is_told_in_units_that_show_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_150_000))
    require_disk_space(tmp_path, 3_150_000)
    require_disk_space(tmp_path, None)
    with pytest.raises(QtoolError, match=r"needs 10\.7 MB, .* has 3\.15 MB free"):
        require_disk_space(tmp_path, 10_700_000)
