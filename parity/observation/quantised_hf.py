"""transformers' Llama with quantised matrix products: what a precision below bfloat16 costs, said a second time.

Nothing here is the converter's or Transformer Engine's. Each recipe is written from its definition, in float32: a
number is divided by the scale of its block, rounded to the format's grid and multiplied again, and the product is taken
of those numbers. What differs from Transformer Engine is of the size of a rounding in bfloat16. Blocks and amaxes are
those of the fused matrices: query, key and value are one, with rows in the order of groups, and so are gate and up.

Forward, inputs are quantised along `in` and weights along `in`; backward, gradients along `out` and the weight along
`out` for the input's gradient, inputs and gradients along the tokens for the weight's. A recipe whose scales belong to
whole tensors does not see the difference.

Source: NVIDIA/TransformerEngine v2.20.2, common/recipe/__init__.py (defaults of each recipe), and the papers: arXiv
    2209.05433 (FP8 formats, per-tensor scales), 2310.10537 (MX formats), 2412.19437 (1 x 128 and 128 x 128 blocks),
    2509.25149 (NVFP4: two-level scales, 16 x 16 for weights, Hadamard transforms and stochastic rounding of gradients).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

E4M3, E5M2, FP4 = 448.0, 57344.0, 6.0
"""The largest number of each format."""
_DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
ROUNDOFF = 2.0**-9
"""Half a step of bfloat16 at most, of a number's own size."""
CALIBRATIONS = 2
"""Times that a model with delayed scales is asked before its answer counts: what saturates in the first pass changes
the amaxes behind it, and in the second finds scales that hold it."""
MOVES = 4
"""Evaluations whose numbers are moved (see `moved`), for the spread of the worst token."""
HADAMARD = 16
"""Tokens that one transform mixes."""
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Of those tokens before they are mixed: drawn once, for all models and steps.

Source: NVIDIA/TransformerEngine v2.20.2, pytorch/tensor/nvfp4_tensor.py, `get_wgrad_sign_vector`.
"""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """How each operand of a layer's products is quantised; each maps a float32 matrix to one on the grid.

    Args:
        input: `[t in]`, along `in`.
        weight: `[out in]`, along `in`.
        gradient: `[t out]`, along `out`.
        weight_back: `[out in]`, along `out`.
        input_back: `[t in]`, along the tokens.
        gradient_back: `[t out]`, along the tokens.
        known: What a weight that nobody trains is quantised by, besides itself: alike as long as that is.
    """

    input: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    weight_back: Callable[[Tensor], Tensor]
    input_back: Callable[[Tensor], Tensor]
    gradient_back: Callable[[Tensor], Tensor]
    known: Callable[[], float] = lambda: 0.0


def quantise(model: Any, precision: str) -> None:
    """Have every product of a `LlamaForCausalLM`'s layers taken in `precision`; its head, embedding and norms stay.

    Args:
        model: In bfloat16; with plain attention or fused.
        precision: `fp8-delayed`, `fp8-current`, `fp8-block`, `mxfp8` or `nvfp4`. Delayed scales belong to the layers:
            the first use of one has the scale 1, as in a model that was not calibrated (see `calibrated`).
    """
    config = model.config
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        rows = _grouped(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
        _fuse([attention.q_proj, attention.k_proj, attention.v_proj], ROLES[precision](), rows)
        _fuse([attention.o_proj], ROLES[precision]())
        _fuse([mlp.gate_proj, mlp.up_proj], ROLES[precision]())
        _fuse([mlp.down_proj], ROLES[precision]())


@contextlib.contextmanager
def moved(model: Any, seed: int) -> Iterator[None]:
    """Every number that enters a quantised product is moved at random, by half a step of bfloat16 at most.

    So may any evaluation move it that rounds at other places, and the few numbers of a coarse format turn some of that
    into steps of their own. A token with an activation far above all others hangs on a handful of such steps, and how
    far it is off is another draw in each evaluation: two that share all roundings but the last say little of the worst.

    Args:
        model: Given to `quantise` before.
        seed: Of the moves.
    """
    asked = [getattr(linear, "forward", None) for linear in model.model.layers.modules()]
    products: set[_Fused] = {one.func.__self__ for one in asked if isinstance(one, functools.partial)}  # type: ignore[attr-defined]
    assert products, "a model whose products are not quantised"
    random = torch.Generator().manual_seed(seed)
    for product in products:
        product.random = random
    try:
        yield
    finally:
        for product in products:
            product.random = None


def restore(model: Any) -> Any:
    """The model with products as they were, in the dtype of its weights."""
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        linear.__dict__.pop("forward", None)
    return model


def _grouped(heads: int, groups: int, head_dim: int) -> Tensor:
    """Rows of the stacked query, key and value matrices in the order of groups: its query heads, its key, its value."""
    per_group = heads // groups
    order: list[int] = []
    for group in range(groups):
        order += range(group * per_group, (group + 1) * per_group)
        order += [heads + group, heads + groups + group]
    return (torch.tensor(order)[:, None] * head_dim + torch.arange(head_dim)).flatten()


class _Fused:
    """Linear layers of one input, whose weights are one matrix: asked one by one, computed once for all."""

    def __init__(self, linears: Sequence[torch.nn.Linear], roles: Roles, rows: Tensor | None) -> None:
        self._linears, self._roles, self._rows = linears, roles, rows
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._held: tuple[float, Tensor] | None = None
        self.random: torch.Generator | None = None

    def ask(self, index: int, x: Tensor) -> Tensor:
        """What linear `index` says to `x` `[... in]`; the first of them is asked first."""
        if index == 0:
            self._outputs = list(self._computed(x).split([linear.out_features for linear in self._linears], dim=-1))
            self._input = x
        assert self._input is x, "linear layers that are one matrix were given different inputs"
        bias = self._linears[index].bias
        found = self._outputs[index]
        return found if bias is None else found + bias

    def _computed(self, x: Tensor) -> Tensor:
        made = self._product(x)
        return made if self._rows is None else made[..., self._rows.to(x.device).argsort()]

    def _weight(self) -> Tensor:
        """The one matrix, its rows in the order of groups."""
        weight = torch.cat([linear.weight for linear in self._linears])
        return weight if self._rows is None else weight[self._rows.to(weight.device)]

    def _product(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.random is not None:
            move = torch.rand(x.shape, generator=self.random).to(x.device) * 2 - 1
            x = x.float() * (1 + move * ROUNDOFF)
        if torch.is_grad_enabled():
            found: Tensor = _Product.apply(x, self._weight(), self._roles, dtype)  # type: ignore[no-untyped-call]
            return found
        known = self._roles.known()
        if self._held is None or self._held[0] != known:
            self._held = known, self._roles.weight(self._weight().float())
        product = self._roles.input(x.flatten(0, -2).float()) @ self._held[1].T
        return product.to(dtype).reshape(*x.shape[:-1], -1)


def _fuse(linears: Sequence[torch.nn.Linear], roles: Roles, rows: Tensor | None = None) -> None:
    fused = _Fused(linears, roles, rows)
    for index, linear in enumerate(linears):
        linear.forward = functools.partial(fused.ask, index)  # type: ignore[method-assign]


class _Product(torch.autograd.Function):
    """`x @ weight.T` and its gradients, each of three products with its own quantised operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, roles: Roles, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.roles = roles
        product = roles.input(x.flatten(0, -2).float()) @ roles.weight(weight.float()).T
        return product.to(dtype).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        roles, flat = ctx.roles, gradient.flatten(0, -2).float()
        inward = roles.gradient(flat) @ roles.weight_back(weight.float())
        outward = roles.gradient_back(flat).T @ roles.input_back(x.flatten(0, -2).float())
        return inward.to(x.dtype).view_as(x), outward.to(weight.dtype), None, None


def _rounded(values: Tensor, largest: float) -> Tensor:
    """To the nearest number of a format, to even between two; what is too large becomes the largest."""
    clamped = values.clamp(-largest, largest)
    if largest != FP4:
        return clamped.to(_DTYPES[largest]).float()
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of a half below 2, of one below 4, of two above.
    step = torch.where(clamped.abs() < 2, 0.5, torch.where(clamped.abs() < 4, 1.0, 2.0))
    return (clamped / step).round() * step


def _by_tensor(largest: float) -> Callable[[Tensor], Tensor]:
    """One scale for the whole tensor, of its own amax."""

    def quantised(x: Tensor) -> Tensor:
        amax = x.abs().max()
        scale = torch.where(amax > 0, largest / amax, 1.0)
        return _rounded(x * scale, largest) / scale

    return quantised


@dataclass
class _Delayed:
    """One scale for the whole tensor, of the largest amax of earlier calls; 1 before the first."""

    largest: float
    history: list[float] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """Of the next tensor."""
        known = max(self.history, default=0.0)
        return self.largest / known if known > 0 else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        scale = self.scale
        self.history = [*self.history[-1022:], float(x.abs().max())]
        return _rounded(x * scale, self.largest) / scale


def _in_blocks(rows: int, columns: int, scale_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """One scale for each block of `rows` by `columns`; `scale_of` maps the blocks' amaxes to scales."""

    def quantised(x: Tensor) -> Tensor:
        height, width = x.shape
        padded = torch.nn.functional.pad(x, (0, -width % columns, 0, -height % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True))
        return (_rounded(blocks * scale, E4M3) / scale).flatten(2, 3).flatten(0, 1)[:height, :width]

    return quantised


def _power_below(amax: Tensor) -> Tensor:
    """The largest power of two that keeps a block within e4m3."""
    return torch.where(amax > 0, torch.exp2(torch.floor(torch.log2(E4M3 / amax.clamp(min=1e-38)))), 1.0)


def _nvfp4(rows: int, *, random: torch.Generator | None = None, by: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Blocks of `rows` by 16, whose scales are e4m3 numbers, and one float32 scale over all of them.

    Args:
        rows: 16 for weights, 1 for all else.
        random: Rounds up with a probability that is the distance, instead of to the nearest.
        by: Multiplies everything right before it is rounded.
    """

    def quantised(x: Tensor) -> Tensor:
        height, width = x.shape
        padded = torch.nn.functional.pad(x, (0, -width % 16, 0, -height % rows))
        blocks = padded.unflatten(1, (-1, 16)).unflatten(0, (-1, rows))
        amax = x.abs().max()
        whole = torch.where(amax > 0, FP4 * E4M3 / amax, 1.0)
        inner = _rounded(blocks.abs().amax(dim=(1, 3), keepdim=True) / FP4 * whole * by, E4M3)
        scale = torch.where(inner > 0, whole / inner, 0.0)
        scaled = blocks * scale * by
        if random is not None:
            size = scaled.abs().clamp(max=FP4)
            step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
            draw = torch.rand(scaled.shape, generator=random).to(x.device)
            scaled = ((size / step + draw).floor() * step) * scaled.sign()
        on_grid = _rounded(scaled, FP4) * inner / whole
        return on_grid.flatten(2, 3).flatten(0, 1)[:height, :width]

    return quantised


def _along_rows(quantised: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with blocks along the first dim."""
    return lambda x: quantised(x.T).T


def _mixed(quantised: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Along the tokens, sixteen of which are mixed before: the product of two operands so mixed is the same.

    What is mixed is rounded to bfloat16, once, before it is quantised. Tokens are filled up with zeros, which add
    nothing to the product: what returns may have more of them.
    """

    def transformed(x: Tensor) -> Tensor:
        matrix = torch.ones(1, 1, device=x.device)
        while len(matrix) < HADAMARD:
            matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
        matrix = matrix * torch.tensor(SIGNS, device=x.device)
        filled = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % HADAMARD))
        turned = torch.einsum("ij,bjc->bic", matrix / HADAMARD**0.5, filled.unflatten(0, (-1, HADAMARD)))
        return quantised(turned.flatten(0, 1).bfloat16().float().T).T

    return transformed


def halfway(x: Tensor) -> Tensor:
    """Where NVFP4 of an input along the tokens hangs on the last bit of whoever computes it.

    Args:
        x: `[t in]`.

    Returns:
        `[in]`, true where a number, once mixed, or a scale lies halfway between two of its format.
    """
    above, below = (_mixed(_nvfp4(1, by=1 + one))(x.float()) for one in (2.0**-18, -(2.0**-18)))
    return (above != below).any(dim=0)


def _roles_by_tensor() -> Roles:
    forward, backward = _by_tensor(E4M3), _by_tensor(E5M2)
    return Roles(
        input=forward,
        weight=forward,
        gradient=backward,
        weight_back=forward,
        input_back=forward,
        gradient_back=backward,
    )


def _roles_delayed() -> Roles:
    """Each tensor is quantised once, and used for both of its products."""
    kept: dict[str, Tensor] = {}
    inputs, weights, gradients = _Delayed(E4M3), _Delayed(E4M3), _Delayed(E5M2)

    def once(name: str, quantised: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def keep(x: Tensor) -> Tensor:
            kept[name] = quantised(x)
            return kept[name]

        return keep

    return Roles(
        input=once("input", inputs),
        weight=once("weight", weights),
        gradient=once("gradient", gradients),
        weight_back=lambda x: kept["weight"],
        input_back=lambda x: kept["input"],
        gradient_back=lambda x: kept["gradient"],
        known=lambda: weights.scale,
    )


def _roles_in_128() -> Roles:
    along, across = _in_blocks(1, 128, _power_below), _in_blocks(128, 1, _power_below)
    square = _in_blocks(128, 128, _power_below)
    return Roles(
        input=along,
        weight=square,
        gradient=along,
        weight_back=square,
        input_back=across,
        gradient_back=across,
    )


def _roles_mx() -> Roles:
    along, across = _in_blocks(1, 32, _power_below), _in_blocks(32, 1, _power_below)
    return Roles(
        input=along,
        weight=along,
        gradient=along,
        weight_back=across,
        input_back=across,
        gradient_back=across,
    )


def _roles_nv() -> Roles:
    random = torch.Generator().manual_seed(16)
    return Roles(
        input=_nvfp4(1),
        weight=_nvfp4(16),
        gradient=_nvfp4(1, random=random),
        weight_back=_along_rows(_nvfp4(16)),
        input_back=_mixed(_nvfp4(1)),
        gradient_back=_mixed(_nvfp4(1, random=random)),
    )


ROLES: dict[str, Callable[[], Roles]] = {
    "fp8-delayed": _roles_delayed,
    "fp8-current": _roles_by_tensor,
    "fp8-block": _roles_in_128,
    "mxfp8": _roles_mx,
    "nvfp4": _roles_nv,
}
