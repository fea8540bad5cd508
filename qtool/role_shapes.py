"""The shape of every role's tensor, in names of sizes.

Readers of configs give the sizes: `convert.gguf.sizes` of all that GGUF can hold, and
`runtime.models.tensors` of what the decoder runs.
"""

from __future__ import annotations

from qtool.arch import Role

# Of one matrix: [out, in], whatever a checkpoint's order; stacks have one an expert.
SHAPES: dict[Role, tuple[str, ...]] = {
    "embed": ("vocab", "hidden"),
    "positions": ("positions", "hidden"),
    "norm": ("hidden",),
    "head": ("vocab", "hidden"),
    "attn_norm": ("hidden",),
    "attn_post_norm": ("hidden",),
    "q": ("queries", "hidden"),
    "k": ("keys", "hidden"),
    "v": ("keys", "hidden"),
    "qkv": ("fused_qkv", "hidden"),
    "o": ("hidden", "queries"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "mlp_norm": ("hidden",),
    "mlp_post_norm": ("hidden",),
    "gate": ("inner", "hidden"),
    "up": ("inner", "hidden"),
    "gate_up": ("fused_gate_up", "hidden"),
    "down": ("hidden", "inner"),
    "router": ("experts", "hidden"),
    "router_bias": ("experts",),
    "experts_gate": ("expert_inner", "hidden"),
    "experts_up": ("expert_inner", "hidden"),
    "experts_down": ("hidden", "expert_inner"),
    "shared_gate": ("shared_inner", "hidden"),
    "shared_up": ("shared_inner", "hidden"),
    "shared_down": ("hidden", "shared_inner"),
    "shared_router": ("one", "hidden"),
    "q_a": ("q_latent", "hidden"),
    "q_a_norm": ("q_latent",),
    "q_b": ("queries_latent", "q_latent"),
    "kv_a": ("latent_and_rope", "hidden"),
    "kv_a_norm": ("latent",),
    "kv_b": ("keys_and_values", "latent"),
}
# Where keys and values are kept in one latent vector (DeepSeek).
LATENT_SHAPES: dict[Role, tuple[str, ...]] = {
    "q": ("queries_direct", "hidden"),
    "o": ("hidden", "values"),
}
