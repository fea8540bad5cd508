"""From a model's name to a decoder that is ready to run, and the record of what was decided.

Everything is checked against the file's headers before the first weight is read: family, config,
the presence and shape of every tensor. Then one block at a time is read, packed by the kernel that
`kernels.dispatch` chooses, and let go, so the peak is the packed model and one block. What was
chosen for which layer, and why, is kept in `LoadedModel.kernels` and printed by whoever starts a
server; nothing falls back silently.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from qtool.arch import Architecture, DecoderConfig, Role, find_architecture
from qtool.convert.formats import WeightReader, open_weights
from qtool.errors import FormatError, UnknownName, UsageError
from qtool.kernels.dispatch import describe
from qtool.progress import bar
from qtool.runtime.config import Device, Dtype
from qtool.runtime.layers import Fused, Linear, pack
from qtool.runtime.models.decoder import Block, Decoder, attention_specs
from qtool.runtime.models.model import causal_logits
from qtool.runtime.tokenizer import Tokenizer
from qtool.source import Source, resolve
from qtool.weights import DenseWeight, Weight

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class KernelUse:
    """`count` layers of one kind, stored one way, run by one kernel for one reason."""

    layer: str
    weight: str
    kernel: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory. `tokenizer` is None where the source has none."""

    source: Source
    decoder: Decoder
    model_type: str
    max_position_embeddings: int
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    dtype_reason: str
    device: torch.device
    format: str
    kernels: tuple[KernelUse, ...]
    nbytes: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Independent sequences [batch, tokens] int64 -> float32 [batch, tokens, vocab]."""
        return causal_logits(self.decoder, tokens)

    def kernel_table(self) -> Table:
        """The start-up table: which kernel runs which layers, and why."""
        table = Table("layers", "stored as", "kernel", "count", "because", title=self._title())
        alike: dict[tuple[str, str, str], list[KernelUse]] = {}
        for use in self.kernels:
            alike.setdefault((use.weight, use.kernel, use.reason), []).append(use)
        for (weight, kernel, reason), uses in alike.items():
            count = sum(use.count for use in uses)
            layers = " ".join(use.layer for use in uses)
            table.add_row(layers, weight, kernel, str(count), reason)
        return table

    def _title(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.source.short_name}: {self.model_type}, {self.format}, "
            f"{self.nbytes / 1e6:,.1f} MB, {name} on {self.device.type} ({self.dtype_reason})"
        )


def load_model(
    model: str, *, dtype: Dtype = "auto", device: Device = "auto", revision: str | None = None
) -> LoadedModel:
    """Load any model this tool writes or reads: a folder, a GGUF file, builtin:NAME or a Hub id."""
    source = resolve(model, revision)
    reader = open_weights(source)
    architecture = find_architecture(reader.config)
    config = DecoderConfig.from_hf(reader.config)
    where = choose_device(device)
    chosen, reason = choose_dtype(dtype, config.dtype, where)
    _check_tensors(reader, architecture, config)
    with torch.inference_mode():
        decoder, kernels, nbytes = _Loader(reader, architecture, config, chosen, where).load()
    tokenizer = Tokenizer.load(source, reader)
    eos = config.eos_token_ids if tokenizer is None else tokenizer.eos_token_ids
    return LoadedModel(
        source=source,
        decoder=decoder,
        model_type=config.model_type,
        max_position_embeddings=config.max_position_embeddings,
        tokenizer=tokenizer,
        eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos))),
        dtype=chosen,
        dtype_reason=reason,
        device=where,
        format=reader.format,
        kernels=kernels,
        nbytes=nbytes,
    )


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device is cuda, and this PyTorch finds no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch",
        )
    return torch.device(device)


def choose_dtype(dtype: Dtype, model_dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of activations and unquantized weights, and why."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UnknownName("dtype", dtype, ["auto", *DTYPES])
        return DTYPES[dtype], "as asked"
    if model_dtype == "float32":
        return torch.float32, "as the model"
    if model_dtype == "float16" and device.type == "cpu":
        # float16 products of more than one row run 10 times slower than bfloat16 on AVX-512.
        return torch.bfloat16, "the model is float16, which CPUs are slow at"
    if model_dtype in DTYPES:
        return DTYPES[model_dtype], "as the model"
    return torch.bfloat16, f"the model is {model_dtype}"


def expected_shapes(
    architecture: Architecture, config: DecoderConfig
) -> dict[Role, tuple[int, ...]]:
    """The shape of every role's weight; the head's only where it is not the embedding."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[Role, tuple[int, ...]] = {
        "embed": (config.vocab_size, hidden),
        "norm": (hidden,),
        "head": (config.vocab_size, hidden),
        "attn_norm": (hidden,),
        "mlp_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    tied = config.tie_word_embeddings
    return {role: shapes[role] for role in architecture.tensors if not (tied and role == "head")}


def _check_tensors(reader: WeightReader, architecture: Architecture, config: DecoderConfig) -> None:
    """Raise one FormatError that names every tensor which is missing or of another shape."""
    packed = set(reader.modules())
    wrong: list[str] = []

    def check(name: str, held: str, shape: tuple[int, ...]) -> None:
        found = tuple(reader.describe(held).shape)
        if found != shape:
            wrong.append(f"{name} has shape {list(found)}, not {list(shape)}")

    for role, shape in expected_shapes(architecture, config).items():
        needs_bias = config.attention_bias and role in ("q", "k", "v")
        blocks = range(config.num_layers) if role in architecture.block_roles else (None,)
        for module in (architecture.hf_name(role, block) for block in blocks):
            weight, bias = f"{module}.weight", f"{module}.bias"
            if reader.has(weight):
                check(weight, module if module in packed else weight, shape)
            else:
                wrong.append(f"{weight} is missing")
            if reader.has(bias):
                check(bias, bias, shape[:1])
            elif needs_bias:
                wrong.append(f"{bias} is missing")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise FormatError(
            f"{reader.source.name}: {'; '.join(wrong[:5])}{more}",
            hint="the weights and config.json do not belong together, or the file is incomplete",
        )


class _Loader:
    """Reads and packs block by block, counting what was chosen."""

    def __init__(
        self,
        reader: WeightReader,
        architecture: Architecture,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._reader = reader
        self._architecture = architecture
        self._config = config
        self._dtype = dtype
        self._device = device
        self._uses: Counter[tuple[str, str, str, str]] = Counter()
        self._nbytes = 0

    def load(self) -> tuple[Decoder, tuple[KernelUse, ...], int]:
        config = self._config
        embedding = self._plain("embed", None)
        blocks = []
        with bar(f"loading {self._reader.source.name}", config.num_layers) as progress:
            for index in range(config.num_layers):
                blocks.append(self._block(index))
                progress.advance()
        tied = DenseWeight(embedding) if config.tie_word_embeddings else None
        head = self._linear(("head",), None, tied).layer
        if isinstance(head, Linear) and head.shares(embedding):
            self._nbytes -= embedding.nbytes
        decoder = Decoder(
            config=config,
            attention=attention_specs(config),
            embedding=embedding,
            inverse_frequencies=torch.tensor(
                config.rope.inverse_frequencies(config.head_dim),
                dtype=torch.float32,
                device=self._device,
            ),
            blocks=tuple(blocks),
            norm=self._plain("norm", None),
            head=head,
        )
        uses = tuple(KernelUse(*key, count) for key, count in self._uses.items())
        return decoder, uses, self._nbytes

    def _block(self, index: int) -> Block:
        qk_norm = None
        if self._architecture.qk_norm:
            heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
            q_norm, k_norm = self._plain("q_norm", index), self._plain("k_norm", index)
            qk_norm = torch.cat((q_norm.expand(heads, -1), k_norm.expand(kv_heads, -1)))
        return Block(
            attn_norm=self._plain("attn_norm", index),
            qkv=self._linear(("q", "k", "v"), index).layer,
            qk_norm=qk_norm,
            o=self._linear(("o",), index).layer,
            mlp_norm=self._plain("mlp_norm", index),
            gate_up=self._linear(("gate", "up"), index).layer,
            down=self._linear(("down",), index).layer,
        )

    def _plain(self, role: Role, index: int | None) -> Tensor:
        name = f"{self._architecture.hf_name(role, index)}.weight"
        tensor = self._reader.tensor(name).to(self._device, self._dtype).contiguous()
        self._nbytes += tensor.nbytes
        return tensor

    def _linear(
        self, roles: Sequence[Role], index: int | None, given: Weight | None = None
    ) -> Fused:
        modules = [self._architecture.hf_name(role, index) for role in roles]
        weights = [given or self._reader.weight(module) for module in modules]
        biases = [self._bias(module) for module in modules]
        fused = pack(weights, biases, self._dtype, self._device)
        self._nbytes += fused.layer.nbytes
        for role, weight, choice in zip(roles, weights, fused.choices, strict=True):
            stored = "the embedding" if given is not None else describe(weight)
            self._uses[role, stored, choice.kernel.name, choice.reason] += 1
        return fused

    def _bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self._reader.tensor(name) if self._reader.has(name) else None
