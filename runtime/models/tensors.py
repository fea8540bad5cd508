"""Which tensors a model must have, and of which shape, before the first of them is read."""

from collections.abc import Iterator
from dataclasses import dataclass

from qtool.arch import Architecture, Role
from qtool.convert.formats import WeightReader
from qtool.decoder_config import DecoderConfig
from qtool.errors import FormatError

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
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads
    q, kv = heads * config.head_dim, config.num_kv_heads * config.head_dim
    q_norm, k_norm = config.head_dim, config.head_dim
    if architecture.qk_norm == "all":
        q_norm, k_norm = q, kv
    shapes: dict[Role, tuple[int, ...]] = {
        "embed": (config.vocab_size, hidden),
        "norm": (hidden,),
        "head": (config.vocab_size, hidden),
        "attn_norm": (hidden,),
        "attn_post_norm": (hidden,),
        "mlp_norm": (hidden,),
        "mlp_post_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "q_norm": (q_norm,),
        "k_norm": (k_norm,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    experts, latent = config.experts, config.latent
    if experts is not None:
        size, shared = experts.intermediate_size, experts.shared_size
        shapes |= {
            "router": (experts.count, hidden),
            "router_bias": (experts.count,),
            "experts_gate": (size, hidden),
            "experts_up": (size, hidden),
            "experts_down": (hidden, size),
            "shared_gate": (shared, hidden),
            "shared_up": (shared, hidden),
            "shared_down": (hidden, shared),
            "shared_router": (1, hidden),
        }
    if latent is not None:
        queries = heads * (latent.nope + latent.rope)
        shapes |= {
            "q": (queries, hidden),
            "q_b": (queries, latent.query_rank or 0),
            "q_a": (latent.query_rank or 0, hidden),
            "q_a_norm": (latent.query_rank or 0,),
            "kv_a": (latent.rank + latent.rope, hidden),
            "kv_a_norm": (latent.rank,),
            "kv_b": (heads * (latent.nope + latent.value), latent.rank),
            "o": (hidden, heads * latent.value),
        }
    return shapes
