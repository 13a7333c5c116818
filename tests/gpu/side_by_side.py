"""One module of Transformer Engine's and the reference's with the same weights, what they answer, and how near that is.

Both are held against the reference in float64: in float32 the real one may be ten times as far from it as the reference
is (ten noise floors), in bfloat16 and below as near to it as the reference, in the project's own form (parity/bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from on_gpu import DEVICE, transformer_engine
from torch import Tensor, nn

from converters.te import reference
from parity import bounds

Outcome = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor], Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the CPU, the same whatever the dtype but for rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    """Random parameters, each element of `dtype` whatever the module's own: norms around one, the rest around zero."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(module.named_parameters()):
            noise = random(*parameter.shape, seed=100 + index)
            is_norm = name.endswith("layer_norm_weight") or (parameter.ndim == 1 and name == "weight")
            width = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(((1 if is_norm else 0) + width * noise).to(dtype))


def trio(name: str, dtype: torch.dtype, **arguments: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A class of both libraries with the same weights: the real one, the reference, and the reference in float64."""
    if name != "DotProductAttention":
        arguments["device"] = "cpu"
    typed: dict[str, Any] = {"dtype" if name == "RMSNorm" else "params_dtype": dtype}
    wide: dict[str, Any] = dict.fromkeys(typed, torch.float64)
    if name == "DotProductAttention":
        typed, wide = {}, {}
    ours: nn.Module = getattr(reference, name)(**arguments, **typed)
    oracle: nn.Module = getattr(reference, name)(**arguments, **wide)
    for module in (ours, oracle):
        fill(module, dtype)
    placed = arguments if name == "DotProductAttention" else arguments | {"device": DEVICE}
    real: nn.Module = getattr(transformer_engine(), name)(**placed, **typed)
    copy_weights(ours, real)
    return real, ours, oracle


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Every parameter by its name."""
    wanted, found = dict(target.named_parameters()), dict(source.named_parameters())
    assert wanted.keys() == found.keys()
    with torch.no_grad():
        for name, parameter in wanted.items():
            assert parameter.shape == found[name].shape, name
            parameter.copy_(found[name])


def moved(given: Any, device: str | torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors, in dictionaries and tuples too, on a device; floating ones in `dtype`, angles excepted (float32)."""
    if isinstance(given, Tensor):
        return given.to(device=device, dtype=dtype if dtype and given.is_floating_point() else None, copy=True)
    if isinstance(given, Mapping):
        return {name: moved(each, device, None if name == "rotary_pos_emb" else dtype) for name, each in given.items()}
    return type(given)(moved(each, device, dtype) for each in given) if isinstance(given, (tuple, list)) else given


def outcome(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
    *,
    device: str,
    dtype: torch.dtype,
    real: Tensor | None = None,
    **options: Any,
) -> Outcome:
    """Forward and backward: the output, and the gradients of inputs and parameters, on the CPU.

    Args:
        module: Is called with `inputs` and `options`.
        inputs: Differentiated by.
        gradient: Of the output. Zero where `real` is False.
        device: Where the module is.
        dtype: Of the inputs.
        real: Which rows (leading dimensions) of the output mean anything; all by default.
        **options: Of the call.
    """
    module.zero_grad()
    own = [moved(each, device, dtype).requires_grad_() for each in inputs]
    out = module(*own, **moved(options, device, dtype))
    assert isinstance(out, Tensor)
    assert out.dtype == dtype
    out.backward(moved(gradient, device, dtype).view(out.shape))
    kept = out if real is None else out[real.to(out.device)]
    found = {"output": kept}
    found |= {f"gradient of input {index}": each.grad for index, each in enumerate(own)}
    found |= {f"gradient of {name}": each.grad for name, each in module.named_parameters()}
    return {name: each.detach().cpu() for name, each in found.items()}


def flat(tensor: Tensor) -> Any:
    """As a vector of float64 for the bounds."""
    return np.asarray(tensor.detach().cpu().double().reshape(-1).numpy())


def distances(actual: Tensor, expected: Tensor | Sequence[Tensor], oracle: Tensor) -> tuple[float, float]:
    """How far an evaluation may be from the oracle as others are measured, and how far it is.

    Largest difference in float32, root mean square below it. The others count as no nearer than the oracle itself,
    rounded once to the dtype of the result.
    """
    others = [expected] if isinstance(expected, Tensor) else list(expected)
    wanted, dtype = flat(oracle), others[0].dtype
    if dtype == torch.float32:
        floor = max(bounds.largest(flat(other), wanted).value for other in others)
        return bounds.allowed(floor, float(np.abs(wanted).max())), bounds.largest(flat(actual), wanted).value
    once = bounds.rms(flat(oracle.to(dtype)), wanted).value
    theirs = max(once, *(bounds.rms(flat(other), wanted).value for other in others))
    return bounds.nearness(theirs, tp=1), bounds.rms(flat(actual), wanted).value


def compare(actual: Outcome, expected: Outcome, oracle: Outcome, record: Callable[[str, object], None]) -> None:
    """Hold every tensor of the real module to its bound, report all that are beyond, and record the worst of them."""
    assert actual.keys() == expected.keys() == oracle.keys()
    wrong, worst = [], ("", 0.0)
    for name, found in actual.items():
        assert found.dtype == expected[name].dtype, f"{name}: {found.dtype}, expected {expected[name].dtype}"
        if not found.isfinite().all():
            wrong.append(f"{name}: {int((~found.isfinite()).sum())} of {found.numel()} values are not finite")
            continue
        limit, distance = distances(found, expected[name], oracle[name])
        share = distance / limit if limit else float(distance > 0)
        worst = max(worst, (name, share), key=lambda each: each[1])
        if not distance <= limit:
            wrong.append(f"{name}: {distance:.3g} from the float64 oracle, allowed {limit:.3g}")
    record("nearest to its bound", f"{worst[0]} at {worst[1]:.2f} of it")
    assert not wrong, "\n".join(["Transformer Engine's module differs from the reference:", *wrong])
