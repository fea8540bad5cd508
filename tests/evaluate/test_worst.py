"""Worst tokens in their context, agreement of texts, size against divergence, reports compared."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import FormatError, UsageError
from qtool.runtime.evaluate.agreement import agreement, first_difference, passages
from qtool.runtime.evaluate.comparison import comparison_notes, read_report
from qtool.runtime.evaluate.divergence import TokenDivergence
from qtool.runtime.evaluate.perplexity import llama_cpp_protocol
from qtool.runtime.evaluate.plots import free_span, is_best, pareto_plot
from qtool.runtime.evaluate.rows import visible
from qtool.runtime.evaluate.worst import worst_tokens
from qtool.runtime.svg import round_numbers


def test_worst_tokens_are_found_where_they_stand() -> None:
    # Windows of 8: positions 4, 5 and 6 are scored, they predict tokens 5, 6 and 7 of the window.
    protocol = llama_cpp_protocol(context=8, num_tokens=24, bos_token_id=None)
    assert (protocol.window, protocol.scored_per_window) == (8, 3)
    tokens = torch.arange(100, 124)
    kld = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.05, 0.4, 0.0, 0.8, 0.1], dtype=torch.float64)
    nll = torch.full((9,), 0.5, dtype=torch.float64)
    divergence = TokenDivergence(nll, 2 * nll, kld, kld, torch.arange(9), torch.arange(9) + 50)
    first, second = worst_tokens(
        divergence, tokens, protocol, lambda ids: " ".join(map(str, ids)), count=2
    )
    assert (first.kld, first.token) == (pytest.approx(0.9), "107")
    assert first.before == "100 101 102 103 104 105 106"
    assert (first.top, first.original_top) == ("2", "52")
    assert first.p == pytest.approx(0.60653, abs=1e-5)
    assert first.original_p == pytest.approx(0.36788, abs=1e-5)
    # Scored token 7 is the second of the third window.
    assert (second.token, second.before) == ("122", "116 117 118 119 120 121")


def test_white_space_is_seen() -> None:
    assert visible(" the\n") == "␣the↵"


def test_texts_part_at_their_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    found = agreement([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 0, 6], [0, 8, 9]])
    assert (found.num_prompts, found.num_identical, found.num_tokens) == (3, 1, 3)
    assert found.first_differences == (None, 1, 0)
    assert found.median_common_tokens == 1


def test_passages_lie_in_the_text_and_spread_over_it() -> None:
    found = passages(torch.arange(1000), context=512)
    assert len(found) == 8
    assert all(len(passage) == 64 for passage in found)
    assert (found[0][0], found[-1][-1]) == (0, 999)
    assert passages(torch.arange(10), context=512) == [list(range(10))]


def test_no_other_model_is_better_in_both() -> None:
    points = {
        "a": (10, 0.1),
        "b": (20, 0.01),
        "c": (21, 0.02),
        "d": (10, 0.2),
        "same as b": (20, 0.01),
    }
    assert [name for name in points if is_best(points, name)] == ["a", "b", "same as b"]
    drawn = pareto_plot({"<a>": (10, 0.1), "b": (20, 0.01)})
    assert "&lt;a&gt;" in drawn
    assert drawn.count("<circle") == 2


def test_labels_of_models_alike_do_not_cover_each_other() -> None:
    assert free_span(0.0, 50.0, 100.0, []) == (0.0, 50.0, 100.0)
    assert free_span(60.0, 50.0, 100.0, [(0.0, 50.0, 100.0)]) == (60.0, 110.0, 100.0)
    assert free_span(10.0, 50.0, 100.0, [(0.0, 50.0, 100.0)]) == (10.0, 60.0, 118.0)
    drawn = pareto_plot(dict.fromkeys(("one", "two", "three", "four"), (20, 0.01)))
    heights = [
        float(found)
        for found in re.findall(r'<text[^>]* y="([^"]+)"[^>]*>(?:one|two|three|four)<', drawn)
    ]
    assert len(heights) == 4
    assert min(b - a for a, b in pairwise(sorted(heights))) >= 18
    # The second's name would lie on the first's mark.
    drawn = pareto_plot({"first": (95, 0.02), "second, of a long name": (100, 0.02)})
    marks = [float(found) for found in re.findall(r' cy="([^"]+)"', drawn)]
    (height,) = re.findall(r'<text[^>]* y="([^"]+)"[^>]*>second', drawn)
    assert abs(float(height) - marks[0] - 4) >= 18


@pytest.mark.parametrize("largest", [5.8, 1.0, 9.99e9, 0.0123, 4e6])
def test_axis_numbers_are_round_and_few(largest: float) -> None:
    found = round_numbers(largest)
    assert 3 <= len(found) <= 6
    assert found[0] == 0
    assert found[-1] <= largest
    assert f"{found[1]:e}"[0] in "125"


def report_of(name: str, text: str, kld: float) -> dict[str, object]:
    perplexity = [
        {"value": 40.0, "error": 1.0, "protocol": {"name": "llama.cpp", "label": "llama.cpp, 512"}}
    ]
    model = {
        "name": name,
        "size_bytes": 5_000_000,
        "bits_per_weight": 4.5,
        "perplexity": perplexity,
        "divergence": {
            "kld": {"value": kld, "error": 0.001},
            "same_top": {"value": 0.9, "error": 0.01},
        },
    }
    original = {**model, "name": "original", "divergence": None}
    return {
        "qtool_report": 1,
        "text": {"sha256": text, "num_tokens_used": 4096, "name": text},
        "reference": original,
        "models": [model],
    }


def test_reports_are_set_side_by_side(tmp_path: Path) -> None:
    paths = []
    for name, text, kld in (("a", "books", 0.25), ("b", "books", 0.125), ("c", "news", 0.5)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report_of(name, text, kld)), encoding="utf-8")
        paths.append(str(path))
    result = CliRunner().invoke(qtool, ["eval", "--compare", *paths[:2]], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.count("original") == 1
    assert "0.25000" in result.stdout
    assert "0.12500" in result.stdout
    result = CliRunner().invoke(qtool, ["eval", "--compare", "--json", paths[0], paths[2]])
    found = json.loads(result.stdout)
    assert found["rows"][-1]["KL divergence"] == "another text"
    assert "different texts" in found["notes"][0]
    assert not comparison_notes({path: read_report(Path(path)) for path in paths[:2]})


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"models": []}', encoding="utf-8")
    with pytest.raises(FormatError, match="qtool_report is None"):
        read_report(file)
    with pytest.raises(FormatError, match="not readable"):
        read_report(tmp_path)


def test_a_folder_that_comparing_would_not_write_is_refused(tmp_path: Path) -> None:
    words = ["eval", "--compare", "a.json", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="writes no files"):
        CliRunner().invoke(qtool, words, catch_exceptions=False)
