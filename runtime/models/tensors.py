"""Which tensors a model must have, and of which shape, before the first of them is read."""

from collections.abc import Iterator
from dataclasses import dataclass

from qtool.arch import Architecture, Role
from qtool.convert.formats import WeightReader
from qtool.decoder_config import DecoderConfig
from qtool.errors import FormatError
from qtool.role_shapes import LATENT_SHAPES, SHAPES

DENSE: tuple[Role, ...] = ("gate", "up", "gate_up", "down")
EXPERTS: tuple[Role, ...] = ("experts_gate", "experts_up", "experts_down")
SHARED: tuple[Role, ...] = ("shared_gate", "shared_up", "shared_down", "shared_router")
SPARSE: tuple[Role, ...] = ("router", "router_bias", *EXPERTS, *SHARED)
# Names that are a tensor's own: neither ".weight" nor ".bias" is added.
WHOLE: tuple[Role, ...] = ("router_bias",)
NORMS: tuple[Role, ...] = ("norm", "attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that has to be there; `held` is the name that the reader describes it by where it
    is packed.
    """

    name: str
    held: str
    shape: tuple[int, ...]
    optional: bool = False


def check_tensors(reader: WeightReader, architecture: Architecture, config: DecoderConfig) -> None:
    """Raise one FormatError that names every tensor which is missing or of another shape."""
    packed = set(reader.modules())
    wrong: list[str] = []
    for tensor in expected_tensors(architecture, config):
        if reader.has(tensor.name):
            held = tensor.held if tensor.held in packed else tensor.name
            found = tuple(reader.describe(held).shape)
            if found != tensor.shape:
                wrong.append(f"{tensor.name} has shape {list(found)}, not {list(tensor.shape)}")
        elif not tensor.optional:
            wrong.append(f"{tensor.name} is missing")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise FormatError(
            f"{reader.source.name}: {'; '.join(wrong[:5])}{more}",
            hint="the weights and config.json do not belong together, or the file is incomplete",
        )


def expected_tensors(architecture: Architecture, config: DecoderConfig) -> Iterator[Expected]:
    """Every weight and bias of a model, block by block."""
    shapes = role_shapes(architecture, config)
    in_blocks = set(architecture.block_roles)
    biases = required_biases(architecture, config)
    for block in (None, *range(config.num_layers)):
        for role in architecture.tensors:
            if (role in in_blocks) != (block is not None) or not has(config, role, block):
                continue
            count = config.experts.count if config.experts and role in EXPERTS else 0
            for expert in range(count) if role in EXPERTS else (None,):
                module = architecture.hf_name(role, block, expert)
                if role in WHOLE:
                    yield Expected(module, module, shapes[role])
                    continue
                yield Expected(f"{module}.weight", module, shapes[role])
                bias = f"{module}.bias"
                yield Expected(bias, bias, shapes[role][:1], optional=role not in biases)


def has(config: DecoderConfig, role: Role, block: int | None) -> bool:
    """Whether a model has a tensor of a role that its family has, in a block or outside them."""
    experts, latent = config.experts, config.latent
    if role == "head":
        return not config.tie_word_embeddings
    if block is not None and role in DENSE and config.layers[block].sparse:
        return False
    if block is not None and role in SPARSE and not config.layers[block].sparse:
        return False
    if role in SHARED:
        return experts is not None and experts.shared_size > 0
    if latent is not None and role in ("q", "q_a", "q_a_norm", "q_b"):
        return (role == "q") == (latent.query_rank is None)
    return True


def required_biases(architecture: Architecture, config: DecoderConfig) -> set[Role]:
    """Roles whose bias cannot be missing; others may have one."""
    roles = set(architecture.biases)
    if config.attention_bias and config.latent is None:
        roles |= {"q", "k", "v"}
    if config.all_biases:
        roles |= {"q", "k", "v", "o", "up", "down"}
    if architecture.norm == "layer":
        roles |= set(NORMS)
    return roles


def role_shapes(architecture: Architecture, config: DecoderConfig) -> dict[Role, tuple[int, ...]]:
    """The shape [out, in] of every role's weight."""
    sizes, shapes = _sizes(config), dict(SHAPES)
    if config.latent is not None:
        shapes |= LATENT_SHAPES
    if architecture.qk_norm == "all":
        shapes |= {"q_norm": ("queries",), "k_norm": ("keys",)}
    return {
        role: tuple(sizes[name] for name in shape)
        for role, shape in shapes.items()
        if sizes.keys() >= set(shape)
    }


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Those that the model has."""
    heads, width = config.num_heads, config.head_dim
    queries, keys = heads * width, config.num_kv_heads * width
    sizes = {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "fused_gate_up": 2 * config.intermediate_size,
        "head_dim": width,
        "queries": queries,
        "keys": keys,
        "fused_qkv": queries + 2 * keys,
    }
    experts, latent = config.experts, config.latent
    if experts is not None:
        sizes |= {
            "experts": experts.count,
            "expert_inner": experts.intermediate_size,
            "shared_inner": experts.shared_size,
        }
    if latent is not None:
        sizes |= {
            "latent": latent.rank,
            "values": heads * latent.value,
            "q_latent": latent.query_rank or 0,
            "queries_latent": heads * (latent.nope + latent.rope),
            "queries_direct": heads * (latent.nope + latent.rope),
            "latent_and_rope": latent.rank + latent.rope,
            "keys_and_values": heads * (latent.nope + latent.value),
        }
    return sizes
