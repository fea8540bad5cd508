"""A report of `qtool eval` in the card of the artifact that was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.artifact import Manifest, verify_checksums
from qtool.card_report import BEGIN, END, add_report, with_report
from qtool.cli import main
from qtool.errors import FormatError, UsageError
from qtool.hub import accept_edited_card


def test_a_report_goes_to_the_end_and_a_later_one_takes_its_place() -> None:
    once = with_report("# Card\ntext\n", "# Report\n```\n# code\n```\n")
    assert once == f"# Card\ntext\n\n{BEGIN}\n## Report\n```\n# code\n```\n{END}\n"
    edited = once + "by hand\n"
    again = with_report(edited, "# Other")
    assert again == f"# Card\ntext\n\n{BEGIN}\n## Other\n{END}\nby hand\n"
    assert with_report("", "# Other") == f"{BEGIN}\n## Other\n{END}\n"


def test_a_report_is_put_only_into_the_card_of_the_weights_it_measured(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, text = str(tiny_checkpoint("llama")), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a model that told short stories. " * 40)
    for recipe in ("rtn-int4", "rtn-int8"):
        main(["quantize", source, "--recipe", recipe, "--out", str(tmp_path / recipe)])
    measured, other = tmp_path / "rtn-int4", tmp_path / "rtn-int8"
    report = tmp_path / "eval"
    main(["eval", str(measured), "--text", str(text), "--out", str(report)])
    before = Manifest.load(other)
    with pytest.raises(UsageError, match="measured other weights"):
        add_report(other, report)
    assert verify_checksums(other) == before
    for _ in range(2):
        add_report(measured, report)
    assert accept_edited_card(measured)
    verify_checksums(measured)
    card = (measured / "README.md").read_text(encoding="utf-8")
    assert card.count("## qtool evaluation") == 1
    assert "\n## Load it\n" in card


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qtool.json").write_text('{"qtool": 1, "format": "gptq", "source": "s"}')
    with pytest.raises(FormatError, match=r"report\.json"):
        add_report(tmp_path, tmp_path)
