"""The report as words, JSON, Markdown and a page: right, complete, and safe to open."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from qtool.artifact import LayerReport
from qtool.runtime.evaluate.divergence import Divergence, Estimate, compare, summarize
from qtool.runtime.evaluate.markdown import to_markdown
from qtool.runtime.evaluate.page import to_html
from qtool.runtime.evaluate.perplexity import (
    llama_cpp_protocol,
    next_token_nll,
    papers_protocol,
    perplexity,
)
from qtool.runtime.evaluate.plots import divergence_plot, error_map, layer_plots, split_module
from qtool.runtime.evaluate.report import (
    EvaluationReport,
    ModelReport,
    Speed,
    TextUsed,
    grade,
    to_json,
    verdict,
    verdict_line,
)
from qtool.runtime.evaluate.rows import footnotes, table_rows
from qtool.units import size_text

HOSTILE = '<img src=x onerror="alert(1)">|`&amp;'
PROTOCOLS = (
    llama_cpp_protocol(context=512, num_tokens=1024, bos_token_id=1),
    papers_protocol(context=512, num_tokens=1024),
)
LAYERS = tuple(
    LayerReport(
        f"model.layers.{block}.{kind}",
        "int4-g128-sym",
        "gptq",
        error=0.01 * (block + 1),
        rtn_error=0.02 * (block + 1),
    )
    for block in range(3)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
)


def divergence_of(noise: float) -> Divergence:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(510, 64, generator=generator)
    logits = reference + noise * torch.randn(510, 64, generator=generator)
    return summarize(compare(logits, reference, torch.arange(510) % 64))


def model(name: str, size: int, divergence: Divergence | None) -> ModelReport:
    nll = next_token_nll(torch.zeros(510, 50), torch.zeros(510, dtype=torch.long))
    return ModelReport(
        name=name,
        model=f"./{name}",
        format="compressed-tensors",
        scored_by="qtool runtime",
        dtype="float32",
        size_bytes=size,
        num_weights=7_000_000,
        bits_per_weight=8 * size / 7_000_000,
        quantized_bits_per_weight=4.125,
        sha256={"model.safetensors": "ab" * 32},
        perplexity=tuple(perplexity(nll, protocol) for protocol in PROTOCOLS),
        divergence=divergence,
        speed=Speed(123.4, 64, "bfloat16", "cpu", 2, 1.25, 6_000_000),
        layers=LAYERS,
        unquantized={"model.layers.0.mlp.down_proj": "172 inputs: neither 128, 64 nor 32 divides"},
    )


def report_of(*names: str) -> EvaluationReport:
    return EvaluationReport(
        text=TextUsed("the text", "cd" * 32, 4000, 2000, 1024, "no paragraph shared"),
        reference=model("original", 14_000_000, None),
        models=tuple(model(name, 5_000_000, divergence_of(0.1)) for name in names),
        command="qtool eval ./small --against ./original",
        environment={"qtool": "0.1.0"},
        notes=("Compared with ./original, which qtool.json names as the source.",),
    )


def test_the_verdict_says_size_top_token_and_perplexity() -> None:
    report = report_of("small")
    same = 100 * divergence_of(0.1).same_top.value
    assert verdict(report.models[0], report.reference) == (
        f"2.8x smaller, {same:.1f} % same top token, perplexity 50.00 -> 50.00"
    )


def test_the_verdict_of_a_model_without_an_original_does_not_compare() -> None:
    assert verdict_line(model("alone", 5_000_000, None), None) == (
        "perplexity 50.00, 5 MB, not compared with an original."
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [(14_000_000, "same size"), (28_000_000, "2.0x larger"), (7_000_000, "2.0x smaller")],
)
def test_the_verdict_on_size_goes_both_ways(size: int, words: str) -> None:
    report = report_of("small")
    assert verdict(replace(report.models[0], size_bytes=size), report.reference).startswith(words)


@pytest.mark.parametrize(
    ("kld", "words"),
    [
        (0.0, "practically the same"),
        (0.03, "close to"),
        (0.1, "noticeably different"),
        (0.5, "far from"),
    ],
)
def test_more_divergence_is_called_worse(kld: float, words: str) -> None:
    assert grade(replace(divergence_of(0.1), kld=Estimate(kld, 0.0))).startswith(words)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 B"),
        (1000, "1 kB"),
        (14_696_792, "14.7 MB"),
        (1_234_000_000, "1.23 GB"),
        (2e12, "2 TB"),
    ],
)
def test_sizes_are_decimal(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_table_has_the_original_first_and_as_many_cells_in_every_row() -> None:
    rows = table_rows(report_of("a", "b"))
    assert [row[0] for row in rows] == ["original", "a", "b"]
    assert rows[0][1] == "compressed-tensors, original"
    assert {len(row) for row in rows} == {9}


def test_json_holds_every_number_with_its_protocol() -> None:
    data = json.loads(json.dumps(to_json(report_of("small")), allow_nan=False))
    assert data["qtool_report"] == 1
    for result in data["models"][0]["perplexity"]:
        assert result["num_scored"] > 0
        assert {"name", "window", "stride", "bos_rule", "label"} <= set(result["protocol"])
    assert data["models"][0]["perplexity"][0]["protocol"]["bos_rule"] == (
        "first token of each window replaced by BOS (1)"
    )
    divergence = data["models"][0]["divergence"]
    assert set(divergence["kld"]) == {"value", "error"}
    assert divergence["kld_percentiles"]["99.9"] <= divergence["kld_max"]
    assert data["models"][0]["layers"][0]["rtn_error"] == 0.02
    assert data["text"]["sha256"] == "cd" * 32


def test_markdown_tables_are_rectangular_and_escape_what_names_hold() -> None:
    text = to_markdown(report_of(HOSTILE))
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        lines = [line.replace("\\|", "") for line in table.strip().splitlines()]
        assert len({line.count("|") for line in lines}) == 1
    assert "<img" not in text
    assert "PPL (llama.cpp): 512-token windows, second half scored; stride 512" in text
    assert "512-token windows (context is 512), all tokens scored" in text


class Page(HTMLParser):
    """Collects the tags of a page and checks that they nest."""

    VOID = frozenset({"meta", "br", "img", "link", "rect", "line", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_shows_the_verdict_first() -> None:
    page = Page(to_html(report_of("small")))
    headline = page.text.index("2.8x smaller")
    assert headline < page.text.index("Summary") < page.text.index("How to reproduce")
    assert "qtool eval ./small --against ./original" in page.text
    assert "cd" * 32 in page.text
    assert "172 inputs: neither 128, 64 nor 32 divides" in page.text


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text = to_html(report_of("small"))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href"} & names
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_escapes_what_names_and_commands_hold() -> None:
    report = replace(report_of(HOSTILE), command=f"qtool eval '{HOSTILE}'")
    report = replace(report, text=replace(report.text, name=HOSTILE), notes=(HOSTILE,))
    text = to_html(report)
    assert "<img" not in text
    assert "&lt;img" in text
    assert Page(text).text.count(HOSTILE) >= 5


def test_the_page_stands_without_an_original_layers_or_speed() -> None:
    bare = replace(model("bare", 5_000_000, None), layers=(), speed=None, unquantized={})
    report = replace(report_of("x"), reference=None, models=(bare,), notes=())
    page = Page(to_html(report))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "not compared with an original" in page.text
    assert "## Against" not in to_markdown(report)


def test_each_kind_of_linear_has_a_panel_with_a_bar_for_each_block() -> None:
    panels = layer_plots(LAYERS)
    assert len(panels) == 2
    for panel in panels:
        assert panel.count("<rect") == 3
        assert panel.count('class="rtn"') == 3
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="bar"', panels[0])]
    assert heights == pytest.approx([heights[0], 2 * heights[0], 3 * heights[0]], abs=0.2)


def test_models_that_hold_the_same_layers_share_one_plot() -> None:
    report = report_of("int4", "marlin")
    text = Page(to_html(report)).text
    assert text.count("Error of each layer") == 1
    assert "Error of each layer: int4, marlin" in text
    other = replace(report.models[1], layers=LAYERS[:2])
    apart = to_html(replace(report, models=(report.models[0], other)))
    assert Page(apart).text.count("Error of each layer") == 2


def test_layers_without_an_error_are_not_drawn_as_perfect() -> None:
    assert layer_plots([LayerReport("model.layers.0.x", None, "rtn")]) == []


def test_marks_of_the_divergence_plot_stand_in_order() -> None:
    text = divergence_plot({"a": divergence_of(0.2)})
    dots = [float(x) for x in re.findall(r'<circle class="dot" cx="([\d.]+)"', text)]
    assert dots == sorted(dots)
    assert all(math.isfinite(x) and 170 <= x <= 760 for x in dots)


def test_a_model_equal_to_the_original_can_be_drawn() -> None:
    Page(divergence_plot({"same": divergence_of(0.0)}))


def test_modules_split_into_block_and_kind() -> None:
    assert split_module("model.layers.12.mlp.down_proj") == ("12", "mlp.down_proj")
    assert split_module("transformer.h.0.attn.c_attn") == ("0", "attn.c_attn")
    assert split_module("lm_head") == ("", "lm_head")


def test_the_error_map_has_a_row_a_block_and_a_column_a_linear() -> None:
    text = error_map(LAYERS[:-1])
    assert text.count("<rect") == len(LAYERS) - 1
    assert text.count("\N{MULTIPLICATION SIGN}") == 1
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"', text)]
    errors = [layer.error or 0.0 for layer in LAYERS[:-1]]
    by_error = [shade for _, shade in sorted(zip(errors, sorted(shades), strict=True))]
    assert max(shades) == 1.0
    assert by_error == sorted(shades)
    # Columns stand apart, and so do rows.
    places = {tuple(found) for found in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', text)}
    assert len(places) == len(LAYERS) - 1
    assert error_map([LayerReport("model.layers.0.x", None, "rtn")]) == ""


def test_loading_and_memory_stand_beside_the_speed() -> None:
    (line,) = [note for note in footnotes(report_of("small")) if note.startswith("Loading")]
    assert "small 1.2 s, 6 MB" in line
