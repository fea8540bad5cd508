"""GGUF files that are well formed and still no model: refused by key or tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.plan import plan_export
from qtool.convert.gguf.types import TENSOR_TYPES, ValueType
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import FormatError, QtoolError
from qtool.source import Source

Rewrite = Callable[..., Path]


@pytest.fixture(scope="module")
def model(books_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    out = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf(plan_export(open_weights(Source("books-7m", books_7m)), "Q8_0"), out)
    return GgufFile.open(out)


@pytest.fixture
def rewrite(model: GgufFile, tmp_path: Path) -> Rewrite:
    """The model with keys changed (None: left out), tensors changed, dropped or added."""

    def make(
        keys: dict[str, Any] | None = None,
        tensors: dict[str, tuple[tuple[int, ...], str] | None] | None = None,
    ) -> Path:
        keys, tensors = dict(keys or {}), dict(tensors or {})
        entries = []
        for entry in model.entries:
            value = keys.pop(entry.key, entry.value)
            if value is not None:
                kind = ValueType.STRING if isinstance(value, str) else entry.type
                entries.append(KeyValue(entry.key, value, kind, entry.element))
        for key, value in keys.items():
            kind = ValueType.STRING if isinstance(value, str) else ValueType.UINT32
            entries.append(KeyValue(key, value, kind))
        wanted = {name: (found.shape, found.type.name) for name, found in model.tensors.items()}
        wanted |= {name: change for name, change in tensors.items() if change is not None}
        infos = [
            TensorInfo(name, shape, TENSOR_TYPES[type])
            for name, (shape, type) in wanted.items()
            if tensors.get(name, True) is not None
        ]
        path = tmp_path / "changed.gguf"
        with GgufWriter(path, GgufLayout.of(entries, infos), force=True) as writer:
            for info in infos:
                writer.write(info, torch.zeros(info.nbytes, dtype=torch.uint8))
        return path

    return make


def test_an_unchanged_model_opens(rewrite: Rewrite) -> None:
    assert GgufWeights(Source("x", rewrite())).config["num_hidden_layers"] == 8


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported"),
        ({"general.architecture": None}, "None is not supported"),
        ({"llama.block_count": None}, r"no key llama\.block_count"),
        ({"llama.block_count": 9}, r"no tensor blk\.8\.attn_norm\.weight"),
        ({"llama.block_count": 7}, r"blk\.7\.attn_k\.weight"),
        ({"llama.block_count": 2**31 - 1}, "block_count is 2147483647, with"),
        ({"llama.block_count": "8"}, "block_count is '8', not int"),
        ({"llama.embedding_length": 0}, "embedding_length is 0"),
        ({"llama.embedding_length": 512}, "its metadata says"),
        ({"llama.attention.head_count": 3}, "multiple"),
        ({"llama.attention.head_count_kv": 4}, r"blk\.0\.attn_k\.weight has shape \[128, 256\]"),
        ({"llama.rope.dimension_count": 32}, "not the head dimension 64"),
        ({"llama.rope.scaling.type": "yarn"}, r"no key llama\.rope\.scaling\.factor"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.expert_count": 4}, "expert_count is 4, with 0 matrices"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"split.count": 3}, "part 1 of 3"),
    ],
)
def test_metadata_that_lies_is_named(keys: dict[str, Any], message: str, rewrite: Rewrite) -> None:
    path = rewrite(keys)
    with pytest.raises(QtoolError, match=message):
        GgufWeights(Source("x", path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"output_norm.weight": None}, r"no tensor output_norm\.weight"),
        ({"token_embd.weight": None}, r"no tensor token_embd\.weight"),
        ({"token_embd.weight": ((4096, 128), "F32")}, r"token_embd\.weight has shape"),
        ({"output_norm.weight": ((256,), "I32")}, "type I32"),
        ({"blk.0.attn_q.weight": ((256, 256), "Q8_K")}, "Q8_K cannot be read"),
        ({"blk.0.ssm_in.weight": ((2, 2), "F32")}, r"blk\.0\.ssm_in"),
        ({"rope_freqs.weight": ((31,), "F32")}, r"rope_freqs\.weight is F32 \[31\]"),
    ],
)
def test_tensors_that_are_no_model_are_named(
    tensors: dict[str, Any], message: str, rewrite: Rewrite
) -> None:
    path = rewrite(tensors=tensors)
    with pytest.raises(QtoolError, match=message):
        GgufWeights(Source("x", path))


def test_an_unknown_name_is_refused(model: GgufFile) -> None:
    reader = GgufWeights(Source("x", model.path))
    for ask in (reader.weight, reader.tensor, reader.describe):
        with pytest.raises(FormatError, match="no tensor"):
            ask("model.layers.9.mlp.up_proj")
    assert not reader.has("lm_head.weight")
    assert reader.has("model.norm.weight")


def test_what_is_held_is_told_without_reading(model: GgufFile) -> None:
    reader = GgufWeights(Source("x", model.path))
    assert "model.embed_tokens" in reader.modules()
    assert "model.layers.0.input_layernorm.weight" in reader.tensor_names()
    held = reader.describe("model.layers.0.mlp.up_proj")
    assert (held.shape, held.kind, held.scheme) == ((768, 256), "Q8_0", None)
    norm = reader.describe("model.norm.weight")
    assert (norm.shape, norm.kind) == ((256,), "float32")
    assert reader.format == "gguf"
    assert reader.config["dtype"] == "bfloat16"


def test_a_vocabulary_file_holds_no_model(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "gguf-vocab" / "ggml-vocab-llama-spm.gguf"
    with pytest.raises(FormatError, match="no tensor"):
        GgufWeights(Source("vocab", path))
