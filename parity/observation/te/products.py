"""Matrix products of a model on Transformer Engine's layers beside a second statement of its recipe.

What a model computes of text shows a wrong scale hardly: its numbers lie within a few powers of two. So the output
projection, the one linear that is nothing but a product, is given numbers that do not: each block has a magnitude of
its own, and a few large ones, which a scale is made of, stand where the other operand is zero, so that the sum is of
small ones. They must come out as the statement says, but for one rounding of the result to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parity.converter import Converter, Settings
from parity.observation import backend
from parity.observation.quantised_hf import ROLES, Roles
from parity.observation.taps import with_bias
from parity.observation.te.observe import everyones

TOKENS, EVERY = 64, 16
"""Tokens that enter, and the distance of large numbers in a row."""
NEAR, FAR = (-5.0, -1.0), (-18.0, -11.0)
"""Powers of two, of a block's largest number, between which the others lie."""
STEPS = (0.75, 1.0, 1.5)
"""Of a delayed scale: what is seen grows from step to step."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of one layer, on this rank.

    Attributes:
        name: `forward`, `backward, input`, `backward, weight` or `head`.
        where: Layer, numbers, rank.
        off: Root mean square of the difference from the statement, over that of the statement.
        bound: What is allowed of it.
        plain: The same difference from the product that is not quantised.
    """

    name: str
    where: str
    off: float
    bound: float
    plain: float


def compared(converter: Converter, folder: Path, settings: Settings, vocab_size: int) -> list[Product]:
    """The products of the first and the last layer, and the head. Collective."""
    alone = replace(settings, topology=replace(settings.topology, sp=False))
    (model,) = backend.of(alone).built(converter, folder, alone)
    place = alone.topology.coord(dist.get_rank())
    found = [_of_head(model, vocab_size, str(place))]
    layers = list(model.model.layers)
    for number in dict.fromkeys((0, len(layers) - 1)):
        for text, x, weight in (("near", NEAR, NEAR), ("small inputs", FAR, NEAR), ("small weights", NEAR, FAR)):
            where = f"layer {number}, {text}, {place}"
            found += _of_projection(model, number, alone, (x, weight), where)
    return found


def _of_projection(
    model: Any, number: int, settings: Settings, powers: tuple[tuple[float, float], ...], where: str
) -> Iterator[Product]:
    proj, roles = model.model.layers[number].self_attention.proj, ROLES[settings.precision]()
    topology = settings.topology
    here = torch.Generator().manual_seed(1 + 10 * number + topology.coord(dist.get_rank()).tp)
    outputs, inputs = proj.weight.shape
    device = proj.weight.device
    x0 = _numbers(TOKENS, inputs, powers[0], large=0, zero=EVERY // 2, random=here)
    w0 = _numbers(outputs, inputs, powers[1], large=EVERY // 2, zero=0, random=here)
    g0 = _numbers(TOKENS, outputs, NEAR, large=0, zero=None, random=torch.Generator().manual_seed(7))
    with torch.no_grad():
        proj.weight.copy_(w0)
    if hasattr(proj, "reset_quantization"):
        proj.reset_quantization()
    for step in STEPS if settings.precision == "fp8-delayed" else STEPS[1:2]:
        x = (x0 * step).to(device).requires_grad_()
        proj.weight.grad = None
        with model.model.get_autocast_context(None, outer=True), model.model.get_autocast_context(number):
            out = with_bias(proj(x))
        out.backward((g0 * step).to(device))
        said = (out.detach(), x.grad, proj.weight.grad)
        quantised = _stated(roles, x0 * step, w0, g0 * step)
        plain = _stated(_PLAIN, x0 * step, w0, g0 * step)
        random = settings.precision == "nvfp4"
        for index, (name, found) in enumerate(zip(NAMES, said, strict=True)):
            assert found is not None, name
            stated, exact = (
                torch.stack(everyones(one[index], topology, "tp")).sum(0) if index == 0 else one[index]
                for one in (quantised, plain)
            )
            # Where the other operand is zero is not looked at: there large numbers meet large ones.
            keep = torch.ones(stated.shape[-1], dtype=torch.bool)
            if index:
                keep[0::EVERY] = keep[EVERY // 2 :: EVERY] = False
            actual, stated, exact = (one.float().cpu()[..., keep] for one in (found, stated, exact))
            off, apart, own = (_rms(a - b) for a, b in ((actual, stated), (actual, exact), (stated, exact)))
            size = _rms(stated) or 1.0
            if random and index:  # rounded by chance: as far from the plain product as the statement, not as it
                ratio = apart / own if own else float(apart > 0)
                yield Product(name=name, where=where, off=max(ratio, 1 / max(ratio, 1e-9)), bound=2.0, plain=apart)
                continue
            bound = 2.0**-8 * (topology.tp if index == 0 else 1)
            yield Product(name=name, where=where, off=off / size, bound=bound, plain=apart / size)


NAMES = ("forward", "backward, input", "backward, weight")


def _as_it_is(x: Tensor) -> Tensor:
    return x


_PLAIN = Roles(
    input=_as_it_is,
    weight=_as_it_is,
    gradient=_as_it_is,
    weight_back=_as_it_is,
    input_back=_as_it_is,
    gradient_back=_as_it_is,
)


def _stated(roles: Roles, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the output, and the gradients of input and weight; each rounded once."""
    x, weight, gradient = x.float(), weight.float(), gradient.float()
    out = roles.input(x) @ roles.weight(weight).T
    inward = roles.gradient(gradient) @ roles.weight_back(weight)
    outward = roles.gradient_back(gradient).T @ roles.input_back(x)
    return out.bfloat16(), inward.bfloat16(), outward.bfloat16()


def _numbers(
    rows: int, columns: int, powers: tuple[float, float], *, large: int, zero: int | None, random: torch.Generator
) -> Tensor:
    """A matrix in bfloat16 whose blocks of 16 by 16 are of diverse magnitudes; the largest number is on every rank."""
    low, high = powers
    values = torch.exp2(low + (high - low) * torch.rand(rows, columns, generator=random))
    values *= torch.where(torch.rand(rows, columns, generator=random) < 0.5, -1.0, 1.0)
    values[:, large::EVERY] = 1.0
    if zero is not None:
        values[:, zero::EVERY] = 0.0
    blocks = torch.exp2(6 * torch.rand(-(-rows // EVERY), -(-columns // EVERY), generator=random) - 3)
    values *= blocks.repeat_interleave(EVERY, 0)[:rows].repeat_interleave(EVERY, 1)[:, :columns]
    values[0, large] = 62.75  # 251 quarters, a prime: under scales of it, no other mantissa lies halfway between codes
    found = values.bfloat16()
    same = torch.frexp(found.float()).mantissa.abs() == 251 / 256
    same[0, large] = False
    return found.masked_fill(same, 0.0)


def _of_head(model: Any, vocab_size: int, where: str) -> Product:
    """The head of the model itself: its product is in the precision of the weights."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.lm_head.register_forward_hook(lambda _, given, out: seen.append((given[0], with_bias(out))))
    ids = torch.arange(TOKENS, device=model.lm_head.weight.device)[None] % vocab_size
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    hidden, found = (one.float().cpu() for one in seen[0])
    stated = hidden @ model.lm_head.weight.detach().float().cpu().T
    off = _rms(found - stated) / (_rms(stated) or 1.0)
    return Product(name="head", where=where, off=off, bound=2.0**-8, plain=off)


def _rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())
