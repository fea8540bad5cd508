"""What the engine is asked to do: one frozen value, with vLLM's names, checked when it is built.

The command line reads its defaults from here, so help text, code and documentation cannot drift
apart. What the engine decides from it (the number of KV blocks, the data type that "auto" became)
is a second value, `runtime.engine.client.ModelInfo`, and never written back.

How long a prompt may hold up everybody else's next token is `target_itl_ms`: the engine measures
what its steps cost and cuts prompts accordingly (`runtime.engine.pace`). `max_num_batched_tokens`
bounds a step also where nobody is held up yet, so that a request that comes a moment later does not
wait long: vLLM's 2048 would take seconds on a CPU that prefills at a few hundred tokens a second,
and 512 costs little prefill speed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from qtool.errors import UnknownName, UsageError
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.settings import Activations

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
SchedulingPolicy = Literal["fcfs", "priority"]
KvCacheDtype = Literal["auto", "int8", "fp8"]
GpuLayers = int | Literal["auto", "all"]
LmHead = Literal["auto", "bf16", "int8", "int4"]

# What a step may take beside which others decode, in milliseconds.
TARGET_ITL_MS = {"cpu": 200.0, "cuda": 50.0}
# Requests that may wait, for each that runs.
WAITING_PER_RUNNING = 16


# No slots: they would hide the defaults, which the command line reads as EngineConfig.max_num_seqs.
@dataclass(frozen=True)
class EngineConfig:
    """How to load and run one model.

    model                    folder, .gguf file, builtin:NAME or Hub id
    activations              int8: on a CPU quantized layers round their inputs to 8 bits and
                             multiply whole numbers, also in float32; bf16: they do not; None:
                             int8 where inputs are in bfloat16 already (QTOOL_ACTIVATIONS)
    lm_head                  what a head that is stored in floating point is rounded to; auto: int8
                             beside layers that round their inputs to 8 bits, else it stays
    cache_packed             keep the form that the kernels read in a file beside the model, and map
                             it at the next start
    max_model_len            longest prompt plus answer; None: what the model was made for
    max_num_seqs             sequences in one step
    max_num_batched_tokens   tokens in one step, prompts and answers together
    max_num_waiting          requests that may wait in a server's engine before more are refused;
                             None: 16 for each of max_num_seqs
    scheduling_policy        fcfs: first come, first served; priority: by the requests' priority,
                             lower first, and then so
    target_itl_ms            milliseconds that a step may take beside which others decode: bounds
                             the gap between two tokens of an answer; None: 200 on a CPU, 50 on a
                             GPU; 0: no bound
    enable_prefix_caching    use again what the cache holds of a prompt's beginning
    block_size               tokens in one KV block
    gpu_memory_utilization   share of the memory, 0 to 1, for weights and KV pool together: of all
                             of a GPU's, or of what is free at the start on a CPU; None: a quarter
                             of what is free once the weights are there
    kv_cache_dtype           auto: keys and values are cached in the model's type; int8: in 8 bits
                             with a scale for each token and head, in little more than half of it;
                             fp8: in 8-bit floats, on a GPU
    kv_cache_memory_bytes    size of the KV pool, exactly; None: by the share above, and never more
                             than max_num_seqs sequences of max_model_len tokens can use
    speculative_config       guess tokens ahead and verify them at once; a mapping or its JSON will
                             do: {"method": "ngram"} or {"method": "draft", "model": ...}, with
                             num_speculative_tokens; None: do not. A draft model and its cache
                             are within the memory above
    enable_lora              whether requests may name LoRA adapters
    tensor_parallel_size     ranks that the model is shared out among, a process each: with a GPU
                             each, or with a part of the CPU's threads
    distributed_timeout_seconds
                             after which a rank that is not heard of ends the service
    lora_modules             adapters to load at the start: a mapping from names to peft's folders,
                             or "name=folder" each
    n_gpu_layers             layers on the GPU, the last ones of all blocks and the head, the others
                             being on the CPU: a number, "auto" (as many as fit) or -1, "all"; 0:
                             none; None: all of them on the device
    enforce_eager            on a GPU: record no steps (CUDA graphs), launch every kernel
    async_scheduling         where tokens are drawn on a device: launch a step before the tokens of
                             the one before it are read
    seed                     what requests without a seed of their own are sampled from
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    activations: Activations | None = None
    lm_head: LmHead = "auto"
    cache_packed: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    target_itl_ms: float | None = None
    enable_prefix_caching: bool = True
    block_size: int = 32
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    kv_cache_memory_bytes: int | None = None
    speculative_config: SpeculativeConfig | None = None
    enable_lora: bool = False
    lora_modules: tuple[tuple[str, str], ...] = ()
    tensor_parallel_size: int = 1
    distributed_timeout_seconds: float = 60.0
    n_gpu_layers: GpuLayers | None = None
    enforce_eager: bool = False
    async_scheduling: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_modules", _lora_modules(self.lora_modules))
        if self.speculative_config is not None:
            parsed = SpeculativeConfig.parse(self.speculative_config)
            object.__setattr__(self, "speculative_config", parsed)
        if self.dtype not in get_args(Dtype):
            raise UnknownName("dtype", self.dtype, get_args(Dtype))
        if self.device not in get_args(Device):
            raise UnknownName("device", self.device, get_args(Device))
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            known = get_args(SchedulingPolicy)
            raise UnknownName("scheduling policy", self.scheduling_policy, known)
        if self.kv_cache_dtype not in get_args(KvCacheDtype):
            known = get_args(KvCacheDtype)
            raise UnknownName("KV cache dtype", self.kv_cache_dtype, known)
        if self.activations not in (None, *get_args(Activations)):
            raise UnknownName("activations", str(self.activations), get_args(Activations))
        if self.lm_head not in get_args(LmHead):
            raise UnknownName("head", self.lm_head, get_args(LmHead))
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization is {share}, must be above 0 and at most 1")
        if not self.distributed_timeout_seconds > 0:
            raise UsageError(
                f"distributed_timeout_seconds is {self.distributed_timeout_seconds}, must be above "
                "0",
                "a busy machine needs 10 and more",
            )
        for name in ("max_num_waiting", "target_itl_ms"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name} is {value}, must be at least 0")
        for name in (
            *("max_num_seqs", "max_num_batched_tokens", "block_size"),
            "tensor_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("max_model_len", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, must be at least 1")
        self._check_gpu_layers()
        if self.tensor_parallel_size > 1 and self.cache_packed:
            raise UsageError(
                f"cache_packed is for a model in one piece, not in {self.tensor_parallel_size}",
                "use one of --cache-packed and --tensor-parallel-size",
            )
        if self.tensor_parallel_size > 1 and self.kv_cache_dtype == "fp8":
            raise UsageError(
                f"a KV cache in fp8 is not offered in {self.tensor_parallel_size} ranks",
                "use --kv-cache-dtype int8",
            )

    def _check_gpu_layers(self) -> None:
        layers = self.n_gpu_layers
        if isinstance(layers, bool) or not (
            layers in (None, "auto", "all") or (isinstance(layers, int) and layers >= -1)
        ):
            raise UsageError(
                f"n_gpu_layers is {layers!r}, must be a number of layers, auto or all",
                "-1 is all of them, 0 none",
            )
        if layers == 0:
            if self.device == "cuda":
                raise UsageError(
                    "n_gpu_layers is 0 and device is cuda", "use one of -ngl 0 and --device cuda"
                )
            object.__setattr__(self, "device", "cpu")
        if layers in (None, 0):
            return
        if self.device == "cpu":
            raise UsageError(
                f"n_gpu_layers is {layers} and device is cpu", "use one of -ngl and --device cpu"
            )
        if not self.divides_layers:
            return
        if self.tensor_parallel_size > 1:
            raise UsageError(
                f"n_gpu_layers is {layers}, and the model is shared out in "
                f"{self.tensor_parallel_size} ranks",
                "use one of --n-gpu-layers and --tensor-parallel-size",
            )
        if self.speculative_config is not None and self.speculative_config.model is not None:
            raise UsageError(
                f"n_gpu_layers is {layers}, and a draft model would need a device of its own",
                'use --n-gpu-layers all, or guess without a model: --speculative-model "[ngram]"',
            )

    @property
    def divides_layers(self) -> bool:
        """Whether some layers may be on a GPU and some on the CPU."""
        return self.n_gpu_layers not in (None, "all", -1, 0)

    @property
    def uses_lora(self) -> bool:
        return self.enable_lora or bool(self.lora_modules)

    @property
    def num_waiting_limit(self) -> int:
        """Requests that may wait."""
        if self.max_num_waiting is not None:
            return self.max_num_waiting
        return WAITING_PER_RUNNING * self.max_num_seqs

    def target_step_seconds(self, device: str) -> float | None:
        """How long a step may take beside which others decode; None: no bound."""
        target = TARGET_ITL_MS.get(device) if self.target_itl_ms is None else self.target_itl_ms
        return target / 1000 if target else None


def _lora_modules(value: object) -> tuple[tuple[str, str], ...]:
    items = value.items() if isinstance(value, Mapping) else value
    modules: list[tuple[str, str]] = []
    for item in items if isinstance(items, Iterable) else ():
        name, folder = _lora_module(item)
        if not name or not folder:
            raise UsageError(
                f"lora_modules has {item!r}, must be NAME=FOLDER",
                hint="the folder as peft's save_pretrained writes it",
            )
        modules.append((str(name), str(folder)))
    names = [name for name, _ in modules]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"lora_modules names {twice} twice")
    return tuple(modules)


def _lora_module(item: object) -> tuple[object, object]:
    """One adapter, in vLLM's two forms as text: NAME=FOLDER, and {"name": ..., "path": ...}."""
    if isinstance(item, str) and item.lstrip().startswith("{"):
        try:
            item = json.loads(item)
        except json.JSONDecodeError:
            return None, None
    if isinstance(item, str):
        name, _, folder = item.partition("=")
        return name, folder
    if isinstance(item, Mapping):
        return item.get("name"), item.get("path")
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    return None, None
