"""Matrix products of a model on Transformer Engine's layers beside a second statement of its recipe.

What a model computes of text shows a wrong scale hardly: its numbers lie within a few powers of two. So the output
projection, the one linear that is nothing but a product, is given numbers that do not: each block has a magnitude of
its own, and a few large ones, which a scale is made of, stand where the other operand is zero, so that the sum is of
small ones. They must come out as the statement says, but for one rounding of the result to bfloat16.

Gradients in NVFP4 are rounded by chance, without bias. So the backward products are taken several times, here and in
the statement, and the mean of the ones must be as near to that of the others as the spread of all of them makes it: a
gradient rounded to the nearest is off its mean in each draw alike, and so is an input that was not transformed before
it was rounded. A wider spread about the right mean is not seen.
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
from parity.observation.quantised_hf import ROLES, Roles, halfway
from parity.observation.taps import with_bias
from parity.observation.te.observe import everyones

TOKENS, EVERY = 64, 16
"""Tokens that enter, and the distance of large numbers in a row."""
NEAR, FAR = (-5.0, -1.0), (-18.0, -11.0)
"""Powers of two, of a block's largest number, between which the others lie."""
FAR_FP4 = (-4.0, -2.5)
"""The same for E2M1, whose least number is a twelfth of its largest: what is below half of that is nothing."""
DRAWS, SPLITS, SIGMAS = 16, 1024, 6.0
"""Of products rounded by chance: draws of each side; divisions of all draws into two sides by lot, that say how far two
means are apart by chance; and standard deviations over their mean that are allowed. Each row of a product is rounded
by itself, and of a sum over 64 rows as independent as that, six are passed by chance once in 10^6 at most (chi-squared
of 64 degrees of freedom); of thousands of numbers, more rarely."""
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
        size: Root mean square of what is stated; where it is 0, nothing was measured.
        drawn: Whether the product is rounded by chance: then `off` is how far the means of actual and of stated draws
            are apart, over how far those of two sides chosen by lot are.
    """

    name: str
    where: str
    off: float
    bound: float
    plain: float
    size: float
    drawn: bool = False

    @property
    def over(self) -> bool:
        """Whether it is further off than allowed, or measures nothing."""
        return self.size == 0 or not self.off <= self.bound


def compared(converter: Converter, folder: Path, settings: Settings, vocab_size: int) -> list[Product]:
    """The products of the first and the last layer, and the head. Collective."""
    alone = replace(settings, topology=replace(settings.topology, sp=False))
    (model,) = backend.of(alone).built(converter, folder, alone)
    place = alone.topology.coord(dist.get_rank())
    found = [_of_head(model, vocab_size, str(place))]
    layers = list(model.model.layers)
    far = FAR_FP4 if settings.precision == "nvfp4" else FAR
    for number in dict.fromkeys((0, len(layers) - 1)):
        for text, x, weight in (("near", NEAR, NEAR), ("small inputs", far, NEAR), ("small weights", NEAR, far)):
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
        draws = DRAWS if settings.precision == "nvfp4" else 1
        said = [_said(model, number, (x0 * step).to(device), (g0 * step).to(device)) for _ in range(draws)]
        quantised = [_stated(roles, x0 * step, w0, g0 * step) for _ in range(draws)]
        plain = _stated(_PLAIN, x0 * step, w0, g0 * step)
        for index, name in enumerate(NAMES):
            # Where the other operand is zero is not looked at: there large numbers meet large ones.
            keep = torch.ones(plain[index].shape[-1], dtype=torch.bool)
            if index:
                keep[0::EVERY] = keep[EVERY // 2 :: EVERY] = False
            if index and draws > 1:
                if index == 2:  # mixed inputs can lie halfway between two codes, whatever numbers are mixed
                    keep &= ~halfway(x0 * step)
                actual, stated = (
                    torch.stack([one[index].float() for one in side])[..., keep] for side in (said, quantised)
                )
                off, bound = _by_chance(actual, stated)
                size, apart = _rms(stated), _rms(actual.mean(0) - plain[index].float()[..., keep])
                yield Product(
                    name=name, where=where, off=off, bound=bound, plain=apart / (size or 1.0), size=size, drawn=True
                )
                continue
            stated, exact = (
                torch.stack(everyones(one[index], topology, "tp")).sum(0) if index == 0 else one[index]
                for one in (quantised[0], plain)
            )
            actual, stated, exact = (one.float().cpu()[..., keep] for one in (said[0][index], stated, exact))
            size = _rms(stated)
            off, apart = (_rms(actual - one) / (size or 1.0) for one in (stated, exact))
            bound = 2.0**-8 * (topology.tp if index == 0 else 1)
            yield Product(name=name, where=where, off=off, bound=bound, plain=apart, size=size)


def _said(model: Any, number: int, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a layer's projection, and the gradients of its input and weight; on the CPU."""
    proj = model.model.layers[number].self_attention.proj
    x = x.clone().requires_grad_()
    proj.weight.grad = None
    with model.model.get_autocast_context(None, outer=True), model.model.get_autocast_context(number):
        out = with_bias(proj(x))
    out.backward(gradient)
    assert x.grad is not None
    assert proj.weight.grad is not None
    return out.detach().cpu(), x.grad.cpu(), proj.weight.grad.cpu()


def _by_chance(actual: Tensor, stated: Tensor) -> tuple[float, float]:
    """How far the means of two sets of draws are apart, and how far they may be.

    Were all of them draws of one product, any division of them into two sides would be as likely as the one that is.
    So those by lot say what the distance is by chance, however the numbers of a product depend on each other.

    Args:
        actual: `[draws ...]` fp32.
        stated: Of the same shape.

    Returns:
        The distance and its bound, each over the root of the mean square of the distances by lot; numbers of a product
        count in their own spread over all draws.
    """
    draws = torch.cat([actual, stated]).flatten(1).double()
    draws = draws - draws.mean(0)
    spread = draws.pow(2).mean(0).sqrt()
    draws = draws / spread.where(spread > 0, 1.0)
    products = draws @ draws.T
    sides = torch.cat([torch.ones(len(actual)), -torch.ones(len(stated))]).double()
    random = torch.Generator().manual_seed(5)
    lots = torch.stack([sides[torch.randperm(len(sides), generator=random)] for _ in range(SPLITS)])
    by_lot = ((lots @ products) * lots).sum(1)
    usual, apart = float(by_lot.mean()), float(sides @ products @ sides)
    if usual == 0:  # no draw differs from any other
        return 0.0, 1.0
    return (apart / usual) ** 0.5, (1 + SIGMAS * float(by_lot.std()) / usual) ** 0.5


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
    size = _rms(stated)
    off = _rms(found - stated) / (size or 1.0)
    return Product(name="head", where=where, off=off, bound=2.0**-8, plain=off, size=size)


def _rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt()) if x.numel() else 0.0
