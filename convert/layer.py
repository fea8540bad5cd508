"""What config.json says of one packed linear, before its tensors are read.

A codec's `unpack` needs this beside the tensors: the words of a file do not say how many bits a
code has, whether its zero points are stored less one, or which version of a layout wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One packed linear as its checkpoint's config declares it.

    module  its name in the model, "model.layers.0.mlp.up_proj"; named in errors
    scheme  bits, group and symmetry by the config
    layout  which variant of the format wrote it where there are several, "" where there is one:
            gptq: "gptq" (zeros stored less one) or "gptq_v2"; compressed-tensors: its version
    file    where the tensors lie, for errors
    """

    module: str
    scheme: QuantScheme
    layout: str = ""
    file: str = ""
