"""`transformer_engine.pytorch.LayerNormLinear`: a norm and the linear after it, with one set of parameters.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/layernorm_linear.py, `LayerNormLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.linear import add_linear, joined
from converters.te.reference.norm import add_norm, normalize
from converters.te.reference.parameters import Init, Layer, normal, refuse


class LayerNormLinear(Layer):
    """`y = norm(x) W^T + b`, of which a rank may hold some rows of `W` (`parallel_mode="column"`).

    Args:
        eps: Of the norm.
        normalization: `RMSNorm` or `LayerNorm`.
        zero_centered_gamma: The norm's weight is stored less one.

    The others are those of `Linear`.

    Raises:
        ConversionError: An option that the reference lacks, sizes that do not divide, or `parallel_mode="row"`.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None

    OFF: Mapping[str, object] = {
        "fuse_wgrad_accumulation": False,
        "get_rng_state_tracker": None,
        "return_layernorm_output": False,
        "return_layernorm_output_gathered": False,
        "ub_overlap_ag": False,
        "ub_overlap_rs": False,
        "ub_overlap_rs_dgrad": False,
        "ub_bulk_wgrad": False,
        "ub_bulk_dgrad": False,
        "ub_name": None,
        "delay_wgrad_compute": False,
        "symmetric_ar_type": None,
        "name": None,
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        tp_group: distributed.Group | None = None,
        tp_size: int = 1,
        init_method: Init | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Mapping[str, int] | tuple[str, ...] | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        refuse("LayerNormLinear", options, self.OFF, {"normalization": None, "zero_centered_gamma": None})
        if parallel_mode == "row":
            raise ConversionError(
                "LayerNormLinear: a norm needs whole rows, so parallel_mode='row' is not possible (nor in Transformer "
                "Engine); use 'column' or None"
            )
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else distributed.world_size(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.in_features = in_features
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        dtype = params_dtype or torch.get_default_dtype()
        add_norm(
            self,
            in_features,
            kind=normalization,
            zero_centered_gamma=zero_centered_gamma,
            sequence_parallel=self.sequence_parallel,
            dtype=dtype,
            device=device,
        )
        self.weight_names, self.bias_names = add_linear(
            self,
            in_features,
            out_features,
            mode=parallel_mode,
            tp_size=self.tp_size,
            split=parameters_split,
            bias=bias,
            init=init_method or normal,
            sequence_parallel=self.sequence_parallel,
            dtype=dtype,
            device=device,
        )
        self.reset_parameters(defer_init=self.layer_norm_weight.is_meta)

    def set_tensor_parallel_group(self, tp_group: distributed.Group | None) -> None:
        """The ranks that share the layer."""
        self.tp_group = tp_group

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """`[... in]` to `[... out]` (`out / tp` under `column`), and the bias where `return_bias`.

        Raises:
            ConversionError: No tensor-parallel group has been set.
        """
        distributed.require_group("LayerNormLinear", self.tp_group, self.tp_size if self.parallel_mode else 1)
        inp = normalize(
            inp,
            self.layer_norm_weight,
            self.layer_norm_bias,
            eps=self.eps,
            zero_centered_gamma=self.zero_centered_gamma,
            rounded=not self.wants_unrounded("norm"),
        )
        if self.parallel_mode == "column":
            inp = (distributed.gather if self.sequence_parallel else distributed.copy)(inp, self.tp_group)
        bias = joined(self, self.bias_names) if self.use_bias else None
        weight, plain = joined(self, self.weight_names), None if self.return_bias else bias
        out = self.gemm(inp, weight, plain, is_first_microbatch=is_first_microbatch)
        return (out, bias) if self.return_bias else out
