"""Importance matrices: both file formats, hostile files, the pass that makes them, and exports."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from qtool.cli import main
from qtool.convert.formats import open_weights
from qtool.convert.gguf.blocks.codecs import quantize
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.imatrix import (
    Importance,
    ImportanceMatrix,
    default_format,
    read_imatrix,
    write_imatrix,
)
from qtool.convert.gguf.plan import plan_export
from qtool.convert.imatrix_command import measure
from qtool.errors import FormatError, OutputExists, QtoolError, UnsupportedModel
from qtool.recipe import Calibration
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]


def entry(sums: list[list[float]], counts: list[float]) -> Importance:
    return Importance(torch.tensor(sums), torch.tensor(counts))


def example() -> ImportanceMatrix:
    return ImportanceMatrix(
        {
            "blk.0.ffn_up.weight": entry([[2.0, 8.0, 0.0]], [4.0]),
            "blk.0.ffn_down_exps.weight": entry([[9.0, 3.0], [0.0, 0.0]], [3.0, 0.0]),
        },
        ("a text.txt",),
        chunk_count=2,
        chunk_size=2,
    )


def tiny_matrix(model: Path, *, without: str = "-") -> ImportanceMatrix:
    """Made-up importance for every linear of a model."""
    plan = plan_export(open_weights(Source("m", model)), "Q8_0")
    generator = torch.Generator().manual_seed(5)
    entries = {
        t.info.name: Importance(
            torch.rand(1, t.info.shape[-1], generator=generator) * 7, torch.tensor([3.0])
        )
        for t in plan.tensors
        if t.how == "quantize" and t.info.name.startswith("blk.") and without not in t.info.name
    }
    return ImportanceMatrix(entries, ("made up",), 3, 16, "made-up.gguf")


def test_the_mean_is_the_sum_by_the_count_and_one_where_nothing_was_seen() -> None:
    entries = example().entries
    assert entries["blk.0.ffn_up.weight"].mean.tolist() == [[0.5, 2.0, 0.0]]
    assert entries["blk.0.ffn_down_exps.weight"].mean.tolist() == [[3.0, 1.0], [1.0, 1.0]]


def test_a_dat_file_byte_by_byte(tmp_path: Path) -> None:
    matrix = ImportanceMatrix({"ab": entry([[2.0, 8.0]], [4.0])}, ("t",), 2, 2)
    write_imatrix(matrix, tmp_path / "m.dat", "dat")
    # one entry; its name; 4 vectors are 2 chunks of 2, so means 0.5 and 2 are stored twofold
    expected = struct.pack("<ii2sii2f", 1, 2, b"ab", 2, 2, 1.0, 4.0) + struct.pack(
        "<ii1s", 2, 1, b"t"
    )
    assert (tmp_path / "m.dat").read_bytes() == expected


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_what_is_written_reads_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_imatrix(example(), path, default_format(path))
    found = read_imatrix(path)
    assert found.datasets == ("a text.txt",)
    assert found.chunk_count == 2
    assert found.entries.keys() == example().entries.keys()
    for weight, meant in example().entries.items():
        assert found.entries[weight].mean.flatten().equal(meant.mean.flatten())
    with pytest.raises(OutputExists):
        write_imatrix(example(), path, default_format(path))


def test_the_gguf_package_reads_the_gguf_form(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(example(), path, "gguf")
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [
        "blk.0.ffn_down_exps.weight.in_sum2",
        "blk.0.ffn_down_exps.weight.counts",
        "blk.0.ffn_up.weight.in_sum2",
        "blk.0.ffn_up.weight.counts",
    ]
    assert numpy.array_equal(reader.tensors[0].data, [[9, 3], [0, 0]])
    assert list(reader.tensors[1].shape) == [1, 2]
    assert reader.get_field("imatrix.chunk_size").contents() == 2
    assert reader.get_field("imatrix.datasets").contents() == ["a text.txt"]
    assert reader.get_field("general.type").contents() == "imatrix"


def test_dat_files_without_calls_or_dataset_are_read_as_means(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii1sii2f", 1, 1, b"a", 0, 2, 0.5, 3.0))
    found = read_imatrix(path)
    assert found.entries["a"].mean.tolist() == [[0.5, 3.0]]
    assert (found.datasets, found.chunk_count) == ((), 0)


BAD_DAT = {
    "no entries": struct.pack("<i", 0),
    "many entries": struct.pack("<i", 1 << 30),
    "a negative name": struct.pack("<ii", 1, -5),
    "a huge name": struct.pack("<ii", 1, 1 << 30),
    "a huge entry": struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 30),
    "an empty entry": struct.pack("<ii1sii", 1, 1, b"a", 1, 0),
    "a name that is no text": struct.pack("<ii1siif", 1, 1, b"\xff", 1, 1, 1.0),
    "infinite values": struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("inf")),
    "negative values": struct.pack("<ii1siif", 1, 1, b"a", 1, 1, -1.0),
    "a name twice": struct.pack("<i", 2) + 2 * struct.pack("<i1siif", 1, b"a", 1, 1, 1.0),
    "more than it needs": struct.pack("<ii1siif", 1, 1, b"a", 1, 1, 1.0) + bytes(12),
    "nothing": b"",
}


@pytest.mark.parametrize("case", BAD_DAT)
def test_bad_dat_files_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(BAD_DAT[case])
    with pytest.raises(FormatError, match=r"bad\.dat"):
        read_imatrix(path)


def test_gguf_files_that_are_no_importance_matrix_are_refused(tmp_path: Path) -> None:
    def write(change: Callable[[gguf.GGUFWriter], None], kind: str = "imatrix") -> Path:
        path = tmp_path / "bad.gguf"
        writer = gguf.GGUFWriter(path, None)
        writer.add_type(kind)
        writer.add_array("imatrix.datasets", ["t"])
        writer.add_uint32("imatrix.chunk_size", 4)
        change(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def tensors(**arrays: numpy.ndarray) -> Callable[[gguf.GGUFWriter], None]:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_uint32("imatrix.chunk_count", 4)
            for name, array in arrays.items():
                writer.add_tensor(f"w.{name}", array)

        return change

    ones = numpy.ones((1, 4), numpy.float32)
    good = tensors(in_sum2=ones, counts=ones[:, :1])
    assert read_imatrix(write(good)).entries["w"].mean.tolist() == [[1.0] * 4]
    with pytest.raises(FormatError, match="no imatrix"):
        read_imatrix(write(good, "model"))
    with pytest.raises(FormatError, match=r"w\.counts is not"):
        read_imatrix(write(tensors(in_sum2=ones)))
    with pytest.raises(FormatError, match="with 2 counts"):
        read_imatrix(write(tensors(in_sum2=ones, counts=numpy.ones((2, 1), numpy.float32))))
    with pytest.raises(FormatError, match="F16"):
        read_imatrix(write(tensors(in_sum2=ones.astype(numpy.float16), counts=ones[:, :1])))
    with pytest.raises(FormatError, match=r"w\.counts' is F16"):
        read_imatrix(write(tensors(in_sum2=ones, counts=numpy.ones((1, 1), numpy.float16))))
    with pytest.raises(FormatError, match="neither sums nor counts"):
        read_imatrix(write(tensors(other=ones)))
    with pytest.raises(FormatError, match="chunk_count"):
        read_imatrix(write(lambda writer: writer.add_tensor("w.counts", ones)))


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_imatrix(example(), path, default_format(path))
    whole = path.read_bytes()
    chance = random.Random(1)
    refused = 0
    for _ in range(300):
        data = bytearray(
            whole[: chance.randrange(len(whole) + 1)] if chance.random() < 0.4 else whole
        )
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read_imatrix(path)
        except QtoolError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_pass_finds_what_hooks_on_the_whole_model_see(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    wanted = Calibration(str(text), num_samples=3, sequence_length=32, seed=0)
    matrix, notes = measure(Source("tiny", folder), wanted)
    assert matrix.chunk_count == 3
    assert matrix.chunk_size == 32
    assert any("few" in note for note in notes)

    from qtool.calibration.dataset import load_calibration, load_tokenizer

    tokens = load_calibration(wanted, load_tokenizer(folder)).tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    names = {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for block, layer in enumerate(model.model.layers):
        for module, name in names.items():

            def see(
                _: object, inputs: tuple[torch.Tensor], key: str = f"blk.{block}.{name}.weight"
            ) -> None:
                seen[key] = inputs[0].double().pow(2).sum((0, 1))

            layer.get_submodule(module).register_forward_pre_hook(see)
    with torch.no_grad():
        model(tokens)
    assert len(matrix.entries) == 14
    for key, sums in seen.items():
        assert torch.allclose(matrix.entries[key].sums[0].double(), sums, rtol=1e-4), key
        assert matrix.entries[key].counts.tolist() == [96.0]
    shared = [matrix.entries[f"blk.1.attn_{letter}.weight"].sums for letter in "qkv"]
    assert shared[0].equal(shared[1])
    assert shared[0].equal(shared[2])


def test_an_export_rounds_with_the_importance_of_each_weight(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3")  # no permutation: rows can be compared as they are
    matrix = tiny_matrix(folder, without="attn_k")
    reader = open_weights(Source("tiny", folder))
    plan = plan_export(reader, "Q3_K_M", importance=matrix)
    assert any("blk.0.attn_k.weight, blk.1.attn_k.weight" in warning for warning in plan.warnings)
    out = tmp_path / "out.gguf"
    write_gguf(plan, out, progress=lambda size: None)
    file = GgufFile.open(out)
    for name, module in (("ffn_up", "mlp.up_proj"), ("attn_k", "self_attn.k_proj")):
        rows = reader.tensor(f"model.layers.0.{module}.weight").float()
        importance = matrix.vector(f"blk.0.{name}.weight", rows.shape[1])
        assert (importance is None) == (name == "attn_k")
        type = file.tensors[f"blk.0.{name}.weight"].type.name
        assert file.data(f"blk.0.{name}.weight").equal(quantize(type, rows, importance))
    metadata = file.metadata
    assert metadata["quantize.imatrix.file"] == "made-up.gguf"
    assert metadata["quantize.imatrix.dataset"] == "made up"
    assert metadata["quantize.imatrix.entries_count"] == len(matrix.entries)
    assert metadata["quantize.imatrix.chunks_count"] == 3


def test_importance_changes_the_mix_where_llama_quantize_has_it_so(
    books_7m: Path,
) -> None:
    reader = open_weights(Source("books", books_7m))
    types = {
        name: {
            t.info.name: t.info.type.name for t in plan_export(reader, "Q4_0", importance=m).tensors
        }
        for name, m in (("with", tiny_matrix(books_7m)), ("without", None))
    }
    changed = {k for k, v in types["with"].items() if types["without"][k] != v}
    assert changed == {"blk.0.ffn_down.weight"}  # the first eighth of 8 blocks
    assert types["with"]["blk.0.ffn_down.weight"] == "Q4_1"


def test_a_matrix_of_another_model_is_refused_or_named(tiny_checkpoint: TinyCheckpoint) -> None:
    reader = open_weights(Source("tiny", tiny_checkpoint("llama")))
    wrong = ImportanceMatrix({"blk.0.attn_q.weight": entry([[1.0, 2.0]], [1.0])}, (), 1, 1)
    with pytest.raises(
        QtoolError, match=r"2 values for blk\.0\.attn_q\.weight, whose rows are 256"
    ):
        plan_export(reader, "Q4_K_M", importance=wrong)
    strange = ImportanceMatrix({"x.weight": entry([[1.0, 2.0]], [1.0])}, (), 1, 1)
    warnings = plan_export(reader, "Q4_K_M", importance=strange).warnings
    assert any("none of this model's weights" in warning for warning in warnings)


def test_a_value_for_the_embedding_is_ignored(tiny_checkpoint: TinyCheckpoint) -> None:
    reader = open_weights(Source("tiny", tiny_checkpoint("llama")))
    odd = ImportanceMatrix({"token_embd.weight": entry([[1.0, 2.0]], [1.0])}, (), 1, 1)
    plan = plan_export(reader, "Q4_K_M", importance=odd)
    assert next(t for t in plan.tensors if t.info.name == "token_embd.weight").importance is None


def test_types_that_need_importance_are_allowed_with_it(books_7m: Path) -> None:
    reader = open_weights(Source("books", books_7m))
    with pytest.raises(QtoolError, match="useless"):
        plan_export(reader, "Q2_K_S")
    plan = plan_export(reader, "Q2_K_S", importance=tiny_matrix(books_7m))
    assert "Q2_K" in plan.counts()
    with pytest.raises(QtoolError, match="ffn_up"):
        plan_export(reader, "Q2_K_S", importance=tiny_matrix(books_7m, without="ffn_up"))


def test_the_command_writes_either_format(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama")
    small = ["--num-samples", "2", "--sequence-length", "32"]
    for name in ("m.gguf", "m.dat"):
        main(["imatrix", str(folder), "--out", str(tmp_path / name), *small, "--json"])
        assert json.loads(capsys.readouterr().out)["entries"] == 14
    ours, old = (read_imatrix(tmp_path / name) for name in ("m.gguf", "m.dat"))
    for name, value in ours.entries.items():
        assert torch.allclose(value.mean, old.entries[name].mean)
    assert ours.datasets == old.datasets == ("builtin",)
    for bad in (["--format", "pickle"], []):
        with pytest.raises(SystemExit) as exit_:
            main(["imatrix", str(folder), "--out", str(tmp_path / "m.dat"), *small, *bad])
        assert exit_.value.code == 2


def test_a_gguf_model_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UnsupportedModel, match="GGUF"):
        measure(Source("m.gguf", tmp_path / "m.gguf"), Calibration())
