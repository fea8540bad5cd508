"""A packed form kept in a file: the same model mapped, and never another one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.convert.gguf.options import GgufOptions
from qtool.convert.run import convert_model
from qtool.errors import UsageError
from qtool.kernels.cpu.native import Native, load
from qtool.runtime import packed_cache
from qtool.runtime.config import EngineConfig
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.models import layer_store
from qtool.runtime.models.layer_store import LayerReader, LayerWriter

TOKENS = torch.tensor([[5, 6, 7, 8]])

pytestmark = pytest.mark.skipif(
    not isinstance(load(), Native), reason="only the compiled kernels have a packed form of files"
)


@pytest.fixture(scope="session")
def packed_gguf(books_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model.gguf"
    return convert_model(str(books_7m), to="gguf", type="Q4_K_M", out=out)


@pytest.fixture
def model(packed_gguf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy2(packed_gguf, tmp_path / "model.gguf"))


def loaded(model: Path, **options: object) -> LoadedModel:
    return load_model(str(model), dtype="bfloat16", cache_packed=True, **options)  # type: ignore[arg-type]


def test_the_second_load_maps_the_file_and_computes_the_same(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_model(str(model), dtype="bfloat16")
    first = loaded(model)
    assert "packed form kept in" in capfd.readouterr().err
    monkeypatch.setattr(LayerWriter, "__init__", None)  # nothing is written
    second = loaded(model)
    assert "packed form mapped from model.gguf.packed" in capfd.readouterr().err
    for one in (first, second):
        assert torch.equal(one.logits(TOKENS), plain.logits(TOKENS))
        assert one.kernels == plain.kernels
        assert one.nbytes == plain.nbytes


def test_biases_go_along_and_layers_that_are_not_packed_are_read_from_the_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Query and key in Q8_0 with biases, value in 16 bits, so that the three are not one layer."""
    options = GgufOptions(tensor_types=("attn_v|ffn_down=BF16",))
    plain, out = str(tiny_checkpoint("qwen2")), tmp_path / "model.gguf"
    model = convert_model(plain, to="gguf", type="Q8_0", out=out, gguf=options)
    fresh = load_model(str(model), dtype="bfloat16")
    loaded(model)
    again = loaded(model)
    assert "mapped from model.gguf.packed" in capfd.readouterr().err
    assert {use.kernel for use in again.kernels} > {"native_w4a8"}
    assert again.kernels == fresh.kernels
    assert torch.equal(again.logits(TOKENS), fresh.logits(TOKENS))


def change_file(model: Path) -> None:
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)


def touch(model: Path) -> None:
    os.utime(model, ns=(1, 1))


def cut(model: Path) -> None:
    path = packed_cache.packed_path(load_source(model))
    path.write_bytes(path.read_bytes()[:-100])


def overwrite_index(model: Path) -> None:
    path = packed_cache.packed_path(load_source(model))
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)


def empty(model: Path) -> None:
    packed_cache.packed_path(load_source(model)).write_bytes(b"")


def load_source(model: Path) -> packed_cache.Source:
    return packed_cache.Source(str(model), model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change_file, "the model's files have changed"),
        (touch, "the model's files have changed"),
        (cut, "incomplete"),
        (overwrite_index, "damaged"),
        (empty, "incomplete"),
    ],
)
def test_a_stale_or_torn_file_is_ignored_with_a_line_and_made_again(
    spoil: Callable[[Path], None],
    words: str,
    model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded(model)
    spoil(model)
    plain = load_model(str(model), dtype="bfloat16")
    capfd.readouterr()
    again = loaded(model)
    said = capfd.readouterr().err
    assert "is ignored and made again" in said
    assert words in said
    assert "packed form kept" in said
    assert torch.equal(again.logits(TOKENS), plain.logits(TOKENS))
    loaded(model)
    assert "packed form mapped" in capfd.readouterr().err


def test_other_settings_another_cpu_or_another_version_are_not_mixed_up(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(model)
    loaded(model, rules=PackingRules(lm_head="int8"))
    assert "made for other settings" in capfd.readouterr().err
    monkeypatch.setattr(packed_cache, "cpu_flags", lambda: frozenset(("avx9",)))
    loaded(model, rules=PackingRules(lm_head="int8"))
    assert "made for another CPU" in capfd.readouterr().err
    monkeypatch.setattr(packed_cache, "CODE", packed_cache.CODE[1:])
    loaded(model, rules=PackingRules(lm_head="int8"))
    assert "made by another version of qtool" in capfd.readouterr().err
    # Another way of reading a format is another layer, whatever the kernels are.
    readers = model.parent / "readers"
    shutil.copytree(packed_cache.READERS, readers, ignore=shutil.ignore_patterns("__pycache__"))
    with (readers / "gguf" / "import_.py").open("a") as changed:
        changed.write("# mended\n")
    monkeypatch.setattr(packed_cache, "READERS", readers)
    loaded(model, rules=PackingRules(lm_head="int8"))
    assert "made by another version of qtool" in capfd.readouterr().err


def test_a_load_that_fails_leaves_no_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LayerWriter, identity: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerWriter, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        loaded(model)
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("step", ["_append", "finish"])
def test_a_disk_without_room_costs_the_file_and_not_the_model(
    step: str, model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first layer, or at the end."""

    def full(self: LayerWriter, written: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LayerWriter, step, full)
    assert loaded(model).logits(TOKENS).isfinite().all()
    assert "No space left on device" in capfd.readouterr().err
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]


def test_a_model_that_cannot_be_read_is_not_a_file_that_cannot_be_written(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LayerWriter, name: str, make: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LayerWriter, "layer", broken)
    with pytest.raises(OSError, match="Input/output error"):
        loaded(model)
    assert "not kept" not in capfd.readouterr().err
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]


def test_float32_has_no_packed_form_and_says_so(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(str(model), dtype="float32", cache_packed=True)
    assert "no packed form is kept" in capfd.readouterr().err
    assert not model.with_name("model.gguf.packed").exists()


def test_tensors_lie_at_multiples_of_a_cache_line(model: Path) -> None:
    loaded(model)
    native = load()
    assert isinstance(native, Native)
    reader = LayerReader(model.with_name("model.gguf.packed"), native)
    parts = [part for entry in reader._layers.values() for part in entry["parts"]]
    offsets = [place["offset"] for part in parts for place in part["tensors"].values()]
    assert offsets
    assert not any(offset % layer_store.ALIGNMENT for offset in offsets)


def test_ranks_that_share_a_model_have_no_packed_form() -> None:
    with pytest.raises(UsageError, match="not in 2"):
        EngineConfig("m", cache_packed=True, tensor_parallel_size=2)
