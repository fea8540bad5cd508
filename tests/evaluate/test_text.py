"""The texts that ship are apart from each other, and a text that cannot be used is refused."""

from pathlib import Path

import pytest

from qtool.builtin import calibration_text, evaluation_text
from qtool.errors import UsageError
from qtool.runtime.evaluate.text import paragraphs, read_text


def test_the_evaluation_text_shares_no_paragraph_with_the_calibration_text() -> None:
    evaluation = paragraphs(evaluation_text().read_text(encoding="utf-8"))
    calibration = paragraphs(calibration_text().read_text(encoding="utf-8"))
    assert len(evaluation) > 200
    assert len(calibration) > 500
    assert not evaluation & calibration


def test_the_default_text_is_the_one_that_ships_and_is_said_to_be_apart() -> None:
    text = read_text(None)
    assert text.content == evaluation_text().read_text(encoding="utf-8")
    assert text.num_shared_paragraphs == 0
    assert text.overlap == "no paragraph shared with the calibration text that ships"


def test_paragraphs_of_the_calibration_text_are_found_in_another_wrapping(tmp_path: Path) -> None:
    shared = sorted(paragraphs(calibration_text().read_text(encoding="utf-8")))[:3]
    file = tmp_path / "leaky.txt"
    wrapped = "\r\n\r\n".join(paragraph.replace(" ", "\r\n", 4) for paragraph in shared)
    file.write_bytes(f"A paragraph of our own.\r\n\r\n{wrapped}".encode())
    text = read_text(file)
    assert text.num_shared_paragraphs == 3
    assert text.overlap.startswith("3 paragraphs are also in the calibration text")
    assert text.name == str(file)


def test_line_ends_reach_the_model_as_the_file_has_them(tmp_path: Path) -> None:
    file = tmp_path / "crlf.txt"
    file.write_bytes(b"one\r\ntwo")
    assert read_text(file).content == "one\r\ntwo"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no text at"), (b"caf\xe9 au lait", "byte 3"), (b" \n\n", "holds no text")],
)
def test_a_text_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_text(file)
    assert words in error.value.message
    assert str(file) in error.value.message
    assert error.value.hint


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path)
