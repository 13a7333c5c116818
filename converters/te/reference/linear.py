"""`transformer_engine.pytorch.Linear`, and the parameters that it shares with `LayerNormLinear`.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/linear.py, `Linear.__init__`, `reset_parameters` and
`_linear_forward_impl`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.parameters import Init, Layer, Slot, normal, part, refuse

MODES = (None, "column", "row")


def add_linear(
    layer: Layer,
    in_features: int,
    out_features: int,
    *,
    mode: str | None,
    tp_size: int,
    split: Mapping[str, int] | tuple[str, ...] | None,
    bias: bool,
    init: Init,
    sequence_parallel: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[list[str], list[str]]:
    """Give a layer this rank's weight and bias, or one of each for every name in `split`.

    Returns:
        Names of the weights and of the biases. A layer without biases has them as None.

    Raises:
        ConversionError: Sizes that tensor parallelism cannot cut, or splits that do not add up.
    """
    if mode not in MODES:
        raise ConversionError(f"expected parallel_mode to be one of {MODES}, found {mode!r}")
    prefixes = {"": out_features} if split is None else _sizes(split, out_features)
    rows = tp_size if mode == "column" else 1
    columns = part(in_features, tp_size, what="in_features") if mode == "row" else in_features
    weights = [f"{prefix}weight" for prefix in prefixes]
    biases = [f"{prefix}bias" for prefix in prefixes]
    sizes = [
        part(size, rows, what=f"out_features of {name}") for name, size in zip(weights, prefixes.values(), strict=True)
    ]
    for name, size in zip(weights, sizes, strict=True):
        value = torch.empty(size, columns, dtype=dtype, device=device)
        layer.add(name, value, Slot(init=init, cut=1 if mode == "row" else 0))
    for name, size in zip(biases, sizes, strict=True):
        if not bias:
            layer.register_parameter(name, None)
            continue
        cut, whole = (0 if mode == "column" else None), (sequence_parallel if mode == "row" else None)
        slot = Slot(init=torch.nn.init.zeros_, cut=cut, sequence_parallel=whole)
        layer.add(name, torch.empty(size, dtype=dtype, device=device), slot)
    return weights, biases


def _sizes(split: Mapping[str, int] | tuple[str, ...], out_features: int) -> dict[str, int]:
    sizes = split if isinstance(split, Mapping) else {name: out_features // len(split) for name in split}
    if not sizes or sum(sizes.values()) != out_features:
        raise ConversionError(f"expected parameters_split to add up to out_features {out_features}, found {sizes}")
    return {f"{name.rstrip('_')}_": size for name, size in sizes.items()}


def joined(layer: Layer, names: list[str]) -> Tensor:
    """The parameters under each other, as the one weight or bias of a GEMM."""
    tensors: list[Tensor] = [layer.get_parameter(name) for name in names]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class Linear(Layer):
    """`y = x W^T + b`, of which a rank may hold some rows (`column`) or some columns (`row`) of `W`.

    Args:
        in_features: Of the whole layer.
        out_features: Of the whole layer.
        sequence_parallel: The first dimension of activations outside the tensor-parallel region is cut over ranks.
        tp_group: The ranks that share the layer.
        tp_size: How many they are where the group comes later, by `set_tensor_parallel_group`.
        init_method: Sets a weight's first value in place.
        bias: Whether there is a bias.
        return_bias: Leave the bias to the caller: `forward` returns `(y, bias)`.
        params_dtype: Of parameters; torch's default dtype where None.
        parallel_mode: `column` cuts rows of the weight, `row` columns.
        parameters_split: The weight as several parameters: names with sizes, or names of equal parts.
        device: Where parameters are made; `meta` leaves them to `reset_parameters`.

    Raises:
        ConversionError: An option that the reference lacks, or sizes that do not divide.
    """

    OFF: Mapping[str, object] = {
        "fuse_wgrad_accumulation": False,
        "get_rng_state_tracker": None,
        "rng_tracker_name": None,
        "ub_overlap_ag": False,
        "ub_overlap_rs": False,
        "ub_overlap_rs_dgrad": False,
        "ub_bulk_dgrad": False,
        "ub_bulk_wgrad": False,
        "ub_name": None,
        "delay_wgrad_compute": False,
        "symmetric_ar_type": None,
        "save_original_input": False,
        "name": None,
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: distributed.Group | None = None,
        tp_size: int = 1,
        init_method: Init | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Mapping[str, int] | tuple[str, ...] | None = None,
        device: torch.device | str | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        refuse("Linear", options, self.OFF, {"parallel_mode": None, "params_dtype": None, "init_method": None})
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else distributed.world_size(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
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
            dtype=params_dtype or torch.get_default_dtype(),
            device=device,
        )
        self.reset_parameters(defer_init=self.get_parameter(self.weight_names[0]).is_meta)

    def set_tensor_parallel_group(self, tp_group: distributed.Group | None) -> None:
        """The ranks that share the layer."""
        self.tp_group = tp_group

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """Apply the layer.

        Args:
            inp: `[... in]`; `in / tp` under `row`; the first dimension is this rank's part under `column` with
                `sequence_parallel`.
            is_first_microbatch: See `Module.gemm`.

        Returns:
            `[... out]`, `out / tp` under `column`; and the bias where `return_bias`.

        Raises:
            ConversionError: No tensor-parallel group has been set.
        """
        distributed.require_group("Linear", self.tp_group, self.tp_size if self.parallel_mode else 1)
        weight = joined(self, self.weight_names)
        bias = joined(self, self.bias_names) if self.use_bias else None
        row = self.parallel_mode == "row"
        if self.parallel_mode == "column":
            inp = (distributed.gather if self.sequence_parallel else distributed.copy)(inp, self.tp_group)
        # After a row-parallel GEMM the bias comes once, to the sum of the ranks.
        plain = None if self.return_bias or row else bias
        out = self.gemm(inp, weight, plain, is_first_microbatch=is_first_microbatch)
        if row:
            out = (distributed.reduce_scatter if self.sequence_parallel else distributed.reduce)(out, self.tp_group)
            out = out if bias is None or self.return_bias else out + bias
        return (out, bias) if self.return_bias else out
