"""`transformer_engine.pytorch.LayerNormMLP`: norm, fc1, activation, fc2.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/layernorm_mlp.py, `LayerNormMLP`;
common/util/math.h (the activations, in float32) and common/activation (a gated one acts on the first half).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.norm import add_norm, compute_dtype, normalize
from converters.te.reference.parameters import Init, Layer, Slot, normal, part, refuse

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "srelu": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
}
GATED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "geglu": ACTIVATIONS["gelu"],
    "glu": torch.sigmoid,
    "qgeglu": ACTIVATIONS["qgelu"],
    "reglu": ACTIVATIONS["relu"],
    "sreglu": ACTIVATIONS["srelu"],
    "swiglu": ACTIVATIONS["silu"],
}


def activate(x: Tensor, name: str, *, rounded: bool = True) -> Tensor:
    """The activation, computed in float32 and rounded once.

    Args:
        x: `[... f]`, or `[... (gate up) f]` for a gated one, whose result is `act(gate) * up`.
        name: As Transformer Engine has it.
        rounded: False hands on what was computed, for a GEMM that quantises it.
    """
    wide = x.to(compute_dtype(x.dtype))
    dtype = x.dtype if rounded else wide.dtype
    if name in GATED:
        gate, up = wide.chunk(2, dim=-1)
        return (GATED[name](gate) * up).to(dtype)
    return ACTIVATIONS[name](wide).to(dtype)


class LayerNormMLP(Layer):
    """`fc2(activation(fc1(norm(x))))`; with `set_parallel_mode`, fc1 is cut by rows over ranks and fc2 by columns.

    Args:
        hidden_size: Of input and output.
        ffn_hidden_size: Between fc1 and fc2; a gated activation's fc1 has twice as many rows, `[gate up]` in a rank.
        eps: Of the norm.
        return_bias: Leave fc2's bias to the caller: `forward` returns `(y, bias)`.
        activation: One of `ACTIVATIONS` or `GATED`.
        output_layer_init_method: Sets the first value of fc2's weight, `init_method` of fc1's.

    The others are those of `LayerNormLinear`.

    Raises:
        ConversionError: An option that the reference lacks, or sizes that do not divide.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None
    fc1_weight: torch.nn.Parameter
    fc1_bias: torch.nn.Parameter | None
    fc2_weight: torch.nn.Parameter
    fc2_bias: torch.nn.Parameter | None

    OFF: Mapping[str, object] = {
        "get_rng_state_tracker": None,
        "activation_params": None,
        "fuse_wgrad_accumulation": False,
        "return_layernorm_output": False,
        "return_layernorm_output_gathered": False,
        "seq_length": None,
        "micro_batch_size": None,
        "ub_overlap_ag": False,
        "name": None,
        "ub_overlap_rs": False,
        "ub_overlap_rs_dgrad": False,
        "ub_bulk_dgrad": False,
        "ub_bulk_wgrad": False,
        "delay_wgrad_compute": False,
        "symmetric_ar_type": None,
        "checkpoint": False,
    }

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        tp_group: distributed.Group | None = None,
        tp_size: int = 1,
        init_method: Init | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        output_layer_init_method: Init | None = None,
        params_dtype: torch.dtype | None = None,
        set_parallel_mode: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__(gemms=2)
        refuse("LayerNormMLP", options, self.OFF, {"activation": None, "normalization": None})
        if activation not in ACTIVATIONS and activation not in GATED:
            known = ", ".join(sorted([*ACTIVATIONS, *GATED]))
            raise ConversionError(f"LayerNormMLP: expected an activation among {known}, found {activation!r}")
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else distributed.world_size(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.set_parallel_mode, self.use_bias, self.return_bias = set_parallel_mode, bias, return_bias
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.activation = activation
        width = part(ffn_hidden_size, self.tp_size, what="ffn_hidden_size")
        rows = 2 * width if activation in GATED else width
        dtype = params_dtype or torch.get_default_dtype()
        add_norm(
            self,
            hidden_size,
            kind=normalization,
            zero_centered_gamma=zero_centered_gamma,
            sequence_parallel=self.sequence_parallel,
            dtype=dtype,
            device=device,
        )
        zeros = torch.nn.init.zeros_
        whole = self.sequence_parallel if set_parallel_mode else None
        slots = {
            "fc1_weight": ((rows, hidden_size), Slot(init=init_method or normal, cut=0)),
            "fc1_bias": ((rows,), Slot(init=zeros, cut=0)),
            "fc2_weight": ((hidden_size, width), Slot(init=output_layer_init_method or normal, cut=1)),
            "fc2_bias": ((hidden_size,), Slot(init=zeros, sequence_parallel=whole)),
        }
        for name, (shape, slot) in slots.items():
            if name.endswith("bias") and not bias:
                self.register_parameter(name, None)
            else:
                self.add(name, torch.empty(shape, dtype=dtype, device=device), slot)
        self.reset_parameters(defer_init=self.layer_norm_weight.is_meta)

    def set_tensor_parallel_group(self, tp_group: distributed.Group | None) -> None:
        """The ranks that share the layer."""
        self.tp_group = tp_group

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """`[... h]` to `[... h]`, and fc2's bias where `return_bias`.

        Raises:
            ConversionError: No tensor-parallel group has been set.
        """
        parallel = self.set_parallel_mode
        distributed.require_group("LayerNormMLP", self.tp_group, self.tp_size)
        x = normalize(
            inp,
            self.layer_norm_weight,
            self.layer_norm_bias,
            eps=self.eps,
            zero_centered_gamma=self.zero_centered_gamma,
            rounded=not self.wants_unrounded("norm"),
        )
        if parallel:
            x = (distributed.gather if self.sequence_parallel else distributed.copy)(x, self.tp_group)
        x = self.gemm(x, self.fc1_weight, self.fc1_bias, index=0, is_first_microbatch=is_first_microbatch)
        x = activate(x, self.activation, rounded=not self.wants_unrounded("activation"))
        plain = None if self.return_bias or parallel else self.fc2_bias
        out = self.gemm(x, self.fc2_weight, plain, index=1, is_first_microbatch=is_first_microbatch)
        if parallel:
            # The bias comes once, to the sum of the ranks.
            out = (distributed.reduce_scatter if self.sequence_parallel else distributed.reduce)(out, self.tp_group)
            out = out if self.fc2_bias is None or self.return_bias else out + self.fc2_bias
        return (out, self.fc2_bias) if self.return_bias else out
