"""Delayed scaling over steps against a history written out by hand, contexts, and `_extra_state`."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_ranks import reduced_scales
from torch import Tensor

from converters import pickled
from converters.errors import ConversionError
from converters.te.quantization import autocast, extra_state, state
from converters.te.quantization.delayed import DelayedState
from converters.te.quantization.formats import E4M3, E5M2
from converters.te.quantization.recipes import DelayedScaling, Float8CurrentScaling, Format
from converters.te.reference import Linear
from converters.te.reference.module import Module
from parity.ranks import Zygote


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    state.reset()


def operand(rows: int, cols: int, largest: float) -> Tensor:
    """Values up to `largest`, which is there, both signs."""
    x = torch.linspace(-0.9, 0.8, rows * cols).view(rows, cols) * largest
    x[rows // 2, cols // 3] = -largest
    return x


class Step:
    """A layer of one GEMM, whose operands have a given largest magnitude in each step."""

    def __init__(self, recipe: Any, *, gemms: int = 1) -> None:
        self.module, self.recipe = Module(gemms=gemms), recipe

    def __call__(self, x: float, weight: float, grad: float, *, index: int = 0) -> Tensor:
        inputs, parameter = operand(8, 16, x).requires_grad_(), torch.nn.Parameter(operand(16, 16, weight))
        with autocast(recipe=self.recipe):
            out = self.module.gemm(inputs, parameter, index=index)
        out.backward(operand(8, 16, grad))
        return out.detach()

    @property
    def state(self) -> DelayedState:
        assert self.module.delayed is not None
        return self.module.delayed


def f32(value: float) -> float:
    return float(torch.tensor(value))


def test_scales_and_history_over_steps_by_hand() -> None:
    step = Step(DelayedScaling(amax_history_len=3, margin=1))
    first = step(7.0, 0.5, 3.0)
    # Rows: the step in progress, then the older ones, the newest last. Slots: input, weight, output.
    assert step.state.forward.amax_history.tolist() == [[0, 0, 0], [0, 0, 0], [7, 0.5, 0]]
    assert step.state.forward.scale.tolist() == [32.0, 448.0, 1.0]
    assert step.state.backward.amax_history.tolist() == [[0, 0], [0, 0], [3, 0]]
    assert step.state.backward.scale.tolist() == [f32(57344 / 2 / 3), 1.0]

    second = step(3.5, 4.0, 6.0)
    assert step.state.forward.amax_history.tolist() == [[0, 0, 0], [7, 0.5, 0], [3.5, 4, 0]]
    assert step.state.forward.scale.tolist() == [32.0, 56.0, 1.0]
    step(1.75, 0.25, 2.0)
    assert step.state.forward.amax_history.tolist() == [[0, 0, 0], [3.5, 4, 0], [1.75, 0.25, 0]]
    assert step.state.forward.scale.tolist() == [32.0, 56.0, 1.0]
    # The row that drops out in a step still counts in that step; the 7 is gone for the next one.
    step(1.0, 0.25, 2.0)
    assert step.state.forward.amax_history.tolist() == [[0, 0, 0], [1.75, 0.25, 0], [1, 0.25, 0]]
    assert step.state.forward.scale.tolist() == [64.0, 56.0, 1.0]
    assert step.state.backward.scale[0] == f32(57344 / 2 / 6)

    def product(x: float, x_scale: float, weight: float, weight_scale: float) -> Tensor:
        a, b = operand(8, 16, x) * x_scale, operand(16, 16, weight) * weight_scale
        return (E4M3.decode(E4M3.encode(a)) @ E4M3.decode(E4M3.encode(b)).T) / (x_scale * weight_scale)

    torch.testing.assert_close(first, product(7.0, 1, 0.5, 1))
    torch.testing.assert_close(second, product(3.5, 32, 4.0, 448))


def test_most_recent_takes_the_last_step_alone() -> None:
    step = Step(DelayedScaling(amax_history_len=4, amax_compute_algo="most_recent"))
    for x in (7.0, 56.0, 3.5):
        step(x, 1.0, 1.0)
        assert step.state.forward.scale[0] == 448 / x


def test_a_history_of_one() -> None:
    step = Step(DelayedScaling(amax_history_len=1))
    for x in (7.0, 56.0, 3.5):
        step(x, 1.0, 1.0)
        assert step.state.forward.scale[0] == 448 / x
        assert step.state.forward.amax_history.tolist() == [[0, 0, 0]]


def test_functions_as_algorithms() -> None:
    def second_largest(history: Tensor) -> Tensor:
        return history.sort(0).values[-2]

    def halved(amax: Tensor, scale: Tensor, largest: float, recipe: Any) -> Tensor:
        return torch.where(amax > 0, largest / amax / 2, scale)

    step = Step(
        DelayedScaling(amax_history_len=3, amax_compute_algo=second_largest, scaling_factor_compute_algo=halved)
    )
    for x, scale in ((7.0, 1.0), (3.5, 64.0), (14.0, 32.0)):
        step(x, 1.0, 1.0)
        assert step.state.forward.scale[0] == scale
    with pytest.raises(ConversionError, match="a function as amax_compute_algo and scaling_factor_compute_algo"):
        step.module.get_extra_state()


@pytest.mark.parametrize("amax", [float("inf"), 0.0, 2.0**-140])
def test_scales_at_the_edges(amax: float) -> None:
    delayed = DelayedState(DelayedScaling(amax_history_len=2), 1)
    direction = delayed.forward
    direction.scale[:] = 5.0
    direction.update(delayed.recipe, 448.0, torch.full((3,), amax))
    expected = torch.finfo(torch.float32).max if amax == 2.0**-140 else 5.0
    assert direction.scale.tolist() == [expected] * 3


def test_a_slot_that_saw_nothing_keeps_its_history() -> None:
    step = Step(DelayedScaling(amax_history_len=3), gemms=2)
    step(7.0, 0.5, 3.0, index=1)
    step(3.5, 0.5, 3.0, index=0)
    assert step.state.forward.amax_history[:, 3].tolist() == [0, 0, 7]
    assert step.state.forward.amax_history[:, 0].tolist() == [0, 0, 3.5]
    assert step.state.forward.scale.tolist() == [128, 896, 1, 64, 896, 1]
    assert step.state.backward.amax_history[:, 2].tolist() == [0, 0, 3]


def test_the_largest_of_several_passes_in_one_step_counts() -> None:
    module, recipe = Module(), DelayedScaling(amax_history_len=3)
    weight = torch.nn.Parameter(operand(16, 16, 1.0))
    with autocast(recipe=recipe):
        for largest in (3.5, 7.0, 1.0):
            module.gemm(operand(8, 16, largest), weight)
        assert module.delayed is not None
        assert module.delayed.forward.amax_history[0, 0] == 7.0
    assert module.delayed.forward.scale[0] == 64.0


def test_without_gradients_scales_stand_still_and_magnitudes_are_recorded() -> None:
    step = Step(DelayedScaling(amax_history_len=3))
    step(7.0, 0.5, 3.0)
    before = copy.deepcopy(step.state.forward)
    weight = torch.nn.Parameter(operand(16, 16, 2.0))
    with torch.no_grad():
        for _ in range(2):
            with autocast(recipe=step.recipe):
                step.module.gemm(operand(8, 16, 28.0), weight)
            assert torch.equal(step.state.forward.scale, before.scale)
            assert torch.equal(step.state.forward.amax_history[1:], before.amax_history[1:])
            assert step.state.forward.amax_history[0].tolist() == [28, 2, 0]
            step.state.forward.amax_history[0] = 0


def test_backward_scales_move_once_at_the_end_of_the_first_layers_backward() -> None:
    recipe, modules = DelayedScaling(amax_history_len=3), [Module(), Module()]
    weights = [torch.nn.Parameter(torch.eye(16)), torch.nn.Parameter(torch.eye(16) * 2)]
    x = operand(8, 16, 1.0).requires_grad_()
    seen = []
    with autocast(recipe=recipe):
        middle = modules[0].gemm(x, weights[0])
        out = modules[1].gemm(middle, weights[1])

    def record(grad: Tensor) -> None:
        delayed = modules[1].delayed
        assert delayed is not None
        seen.append((delayed.backward.scale[0].item(), delayed.backward.amax_history[0, 0].item()))

    middle.register_hook(record)
    out.backward(operand(8, 16, 7.0))
    # Between the two layers' backwards the second has recorded, and nothing has been updated.
    assert seen == [(1.0, 7.0)]
    scales = [module.delayed.backward.scale[0].item() for module in modules if module.delayed is not None]
    assert scales == [57344 / 14, 57344 / 7]


def test_only_the_outermost_autocast_ends_a_step() -> None:
    module, recipe = Module(), DelayedScaling(amax_history_len=3)
    weight = torch.nn.Parameter(operand(16, 16, 1.0))
    with autocast(recipe=recipe):
        with autocast(recipe=recipe):
            module.gemm(operand(8, 16, 7.0), weight)
        assert module.delayed is not None
        assert module.delayed.forward.scale[0] == 1.0
        with autocast(enabled=False):
            assert state.current().enabled is False
        assert state.current().recipe is recipe
    assert module.delayed.forward.scale[0] == 64.0
    assert state.current().recipe is None


def test_an_autocast_is_entered_once_at_a_time_and_restores_after_an_error() -> None:
    context = autocast(recipe=DelayedScaling())
    with context, pytest.raises(ConversionError, match="already in force"), context:
        pass
    with pytest.raises(ValueError, match="inside"), context:
        raise ValueError("inside")
    assert not state.current().enabled


def test_calibration_records_and_computes_plainly() -> None:
    module, weight, x = Module(), torch.nn.Parameter(operand(16, 16, 0.5)), operand(8, 16, 7.0)
    with autocast(enabled=False, calibrating=True, recipe=DelayedScaling(amax_history_len=3)):
        assert torch.equal(module.gemm(x, weight), torch.nn.functional.linear(x, weight))
    assert module.delayed is not None
    assert module.delayed.forward.amax_history.tolist() == [[7, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    assert module.delayed.forward.scale.tolist() == [1, 1, 1]


def test_a_recipe_of_another_length_keeps_the_history() -> None:
    step = Step(DelayedScaling(amax_history_len=2))
    step(7.0, 0.5, 3.0)
    step.recipe = DelayedScaling(amax_history_len=4)
    step(3.5, 0.5, 3.0)
    # New rows come after the newest of the shorter history, which so is the first to age: as in Transformer Engine.
    assert step.state.forward.amax_history[:, 0].tolist() == [0, 0, 0, 3.5]
    assert step.state.forward.scale[0] == 64.0


def test_layers_that_are_gone_are_forgotten() -> None:
    step = Step(DelayedScaling())
    step(1.0, 1.0, 1.0)
    assert len(state._manager.registered) == 1
    del step
    gc.collect()
    assert len(state._manager.registered) == 0


def test_ranks_of_a_group_share_scales(zygote: Zygote) -> None:
    found = zygote.run(reduced_scales, world=2)
    for shared, own in found:
        assert shared == [448 / 7, 448 / 2, 1.0, 57344 / 7]
        assert own in ([448 / 7, 448 / 1, 1.0, 57344 / 7], [448 / 3.5, 448 / 2, 1.0, 57344 / 3.5])
    assert found[0][1] != found[1][1]


# --- extra state ------------------------------------------------------------------------------------------------------


def trained(gemms: int = 2, **options: Any) -> Module:
    step = Step(DelayedScaling(**({"amax_history_len": 4} | options)), gemms=gemms)
    for i in range(3):
        for index in range(gemms):
            step(1.7 + i + index, 0.3 * (i + 1), 0.1 + 5 * index, index=index)
    return step.module


def same(left: DelayedState | None, right: DelayedState | None) -> bool:
    assert left is not None
    assert right is not None
    pairs = [(left.forward, right.forward), (left.backward, right.backward)]
    return all(torch.equal(a.scale, b.scale) and torch.equal(a.amax_history, b.amax_history) for a, b in pairs)


def test_without_delayed_scaling_it_is_empty_bytes() -> None:
    module = Module()
    with autocast(recipe=Float8CurrentScaling()):
        module.gemm(operand(8, 16, 1.0), torch.nn.Parameter(operand(16, 16, 1.0)))
    assert list(module.state_dict()) == ["_extra_state"]
    saved = module.state_dict()["_extra_state"]
    assert saved.dtype == torch.uint8
    assert saved.shape == (0,)
    module.load_state_dict({"_extra_state": saved})


@pytest.mark.parametrize(
    "options", [{}, {"margin": 2, "fp8_format": Format.E4M3}, {"amax_compute_algo": "most_recent"}]
)
def test_a_layer_goes_on_where_it_was_saved(options: dict[str, Any], tmp_path: Path) -> None:
    module, other = trained(**options), Module(gemms=2)
    torch.save(module.state_dict(), tmp_path / "saved.pt")
    other.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert same(module.delayed, other.delayed)
    assert other.delayed is not None
    assert repr(other.delayed.recipe) == repr(module.delayed.recipe if module.delayed else None)
    step = Step(other.delayed.recipe, gemms=2)
    outs = []
    for each in (module, other):
        step.module = each
        outs.append(step(2.0, 0.7, 0.3))
    assert torch.equal(outs[0], outs[1])
    assert same(module.delayed, other.delayed)


def transformer_engine() -> Any:
    try:
        from transformer_engine.common import recipe
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"Transformer Engine's recipes cannot be imported: {error}")
    return recipe


def test_transformer_engine_reads_what_is_written_and_the_reverse() -> None:
    """As its `set_extra_state` unpickles it, and as its `get_extra_state` pickles it."""
    real = transformer_engine()
    module = trained(margin=1)
    assert module.delayed is not None
    content = pickle.loads(bytes(module.get_extra_state().numpy()))
    assert type(content["recipe"]) is real.DelayedScaling
    assert repr(content["recipe"]) == repr(real.DelayedScaling(amax_history_len=4, margin=1))
    assert torch.equal(content["scale_fwd"], module.delayed.forward.scale)
    assert torch.equal(content["amax_history_bwd"], module.delayed.backward.amax_history)
    assert content["extra_fp8_variables"]["num_gemms"] == 2

    theirs = {
        "recipe": real.DelayedScaling(amax_history_len=4, margin=1),
        "scale_fwd": module.delayed.forward.scale.clone(),
        "amax_history_fwd": module.delayed.forward.amax_history.clone(),
        "scale_bwd": module.delayed.backward.scale.clone(),
        "amax_history_bwd": module.delayed.backward.amax_history.clone(),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 2, "fp8_max_fwd": 448, "fp8_max_bwd": 57344},
    }
    other = Module(gemms=2)
    other.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(theirs)), dtype=torch.uint8))
    assert same(module.delayed, other.delayed)


def written(change: Callable[[DelayedState], object]) -> Tensor:
    delayed = copy.deepcopy(trained().delayed)
    assert delayed is not None
    change(delayed)
    return extra_state.write(delayed)


def shrink(delayed: DelayedState) -> None:
    delayed.forward.amax_history = delayed.forward.amax_history[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.forward.amax_history.zero_(),
            r"scale [\d.]+ of slot 0 with an empty history: missing amax \(fwd\)",
        ),
        (lambda d: d.forward.scale.mul_(4), r"slot 0 with magnitudes up to 3.7, which allow 121.*: stale amax"),
        (lambda d: d.backward.amax_history.mul_(3), r"stale amax \(bwd\)"),
        (lambda d: d.backward.scale.fill_(float("nan")), r"scale nan of slot 0 \(bwd\)"),
        (lambda d: d.backward.scale.fill_(0.0), r"scale 0.0 of slot 0 \(bwd\)"),
        (lambda d: d.forward.amax_history.neg_(), "below zero or NaN in slot 0"),
        (shrink, r"amax_history_fwd is \[3, 6\] torch.float32, expected \[4, 6\]"),
        (lambda d: setattr(d.forward, "scale", d.forward.scale[:3]), r"scale_fwd is \[3\] .*expected \[6\]"),
        (lambda d: setattr(d.forward, "scale", d.forward.scale.double()), r"scale_fwd is \[6\] torch.float64"),
    ],
)
def test_stale_missing_and_misshapen_state_is_an_error_that_says_so(
    change: Callable[[DelayedState], object], message: str
) -> None:
    with pytest.raises(ConversionError, match=rf"(?s)Module: .*{message}.*calibrate anew"):
        Module(gemms=2).set_extra_state(written(change))


def test_a_weight_is_kept_between_microbatches_with_the_scale_of_the_first() -> None:
    recipe = DelayedScaling(amax_history_len=4)
    layer = Linear(16, 16, bias=False, device="cpu")
    x = operand(8, 16, 1.0).sign()  # on the grid at every scale, and out of it again within one rounding

    def step(first: bool | None) -> Tensor:
        with autocast(recipe=recipe):
            made: Tensor = layer(x, is_first_microbatch=first)
        return made.detach()

    with torch.no_grad():
        layer.weight.copy_(operand(16, 16, 900.0))
    saturated = step(True)  # with the scale 1: nothing above 448 is told apart
    assert layer.delayed is not None
    history = layer.delayed.forward.amax_history
    assert history[-1, 1] == 900
    recorded = history[:, 1].clone()
    torch.testing.assert_close(step(False), saturated, rtol=2.0**-22, atol=0)
    assert torch.equal(history[:, 1], recorded)  # as of a slot that saw nothing
    anew = step(None)
    assert (anew - saturated).abs().max() > 0.1 * saturated.abs().max()  # scales have moved on
    assert torch.equal(step(True), anew)


def test_a_layer_of_another_number_of_gemms() -> None:
    with pytest.raises(ConversionError, match=r"expected \[3\].*1 GEMMs"):
        Module(gemms=1).set_extra_state(trained(gemms=2).get_extra_state())


def test_no_state_for_a_layer_that_has_one() -> None:
    module = trained()
    with pytest.raises(
        ConversionError, match=r"scales and largest magnitudes of other weights\. Call reset_quantization"
    ):
        module.load_state_dict({"_extra_state": torch.empty(0, dtype=torch.uint8)})
    module.reset_quantization()
    module.load_state_dict({"_extra_state": torch.empty(0, dtype=torch.uint8)})
    assert module.delayed is None


def encoded(content: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def test_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_state, "VERSION", 2)
    saved = trained().get_extra_state()
    monkeypatch.undo()
    with pytest.raises(ConversionError, match="of version 2; this release reads version 1"):
        Module(gemms=2).set_extra_state(saved)
    first = encoded({"scale_fwd": torch.ones(3), "scale_inv_fwd": torch.ones(3)})
    with pytest.raises(ConversionError, match=r"Transformer Engine 1\.x wrote it \(scale_fwd, scale_inv_fwd\)"):
        Module().set_extra_state(first)


def test_another_recipe_is_an_error() -> None:
    saved = bytes(trained().get_extra_state().numpy()).replace(b"\nDelayedScaling\n", b"\nFloat8CurrentScaling\n")
    with pytest.raises(ConversionError, match="of the recipe Float8CurrentScaling, which keeps none"):
        Module(gemms=2).set_extra_state(torch.frombuffer(bytearray(saved), dtype=torch.uint8))


class Hostile:
    """Calls what it is told to when it is unpickled."""

    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.reduced = call, args

    def __reduce__(self) -> Any:
        return self.reduced


def test_nothing_else_is_called(tmp_path: Path) -> None:
    """Not directly, and not from within the bytes of a tensor's storage."""
    marker = tmp_path / "called"
    hostile = Hostile(Path.touch, marker)
    with pytest.raises(ConversionError, match=r"calls pathlib.*: it is not read"):
        Module().set_extra_state(encoded({"recipe": hostile}))
    inner = io.BytesIO()
    torch.save(hostile, inner, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="no FP8 state of Transformer Engine"):
        Module().set_extra_state(encoded({"recipe": Hostile(torch.storage._load_from_bytes, inner.getvalue())}))
    assert not marker.exists()


_FORMATS = b"ctransformer_engine.common.recipe\n"
ATTACKS = {
    # BUILD with (None, {name: value}) sets attributes of whatever is on the stack, and so of a class.
    "an attribute set": _FORMATS + b"_FormatHelper\nN}X\x05\x00\x00\x00owned\x88s\x86b",
    "a method replaced": _FORMATS + b"_FormatHelper\nN}X\x07\x00\x00\x00__new__" + _FORMATS + b"Format\ns\x86b",
    "a format built upon": _FORMATS + b"Format\n}X\x05\x00\x00\x00owned\x88sb",
    "a tensor's function built upon": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00owned\x88sb",
    "a class built upon": b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00owned\x88sb",
    "a command": b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
    "a command by instance": b"(X\x04\x00\x00\x00trueios\nsystem\n",
    "a name from the stack": b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R",
    "a name of a copy registry": b"\x82\x01",
    "an outer object": b"X\x01\x00\x00\x00aQ",
    "memory without end": b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
    b"%sK\x00J%s\x85K\x00\x85tR",
}


def _storage_of_one() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.ones(1).storage(), buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    return b"B" + len(content).to_bytes(4, "little") + content + b"\x85R"


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", ATTACKS)
def test_a_crafted_state_changes_nothing_of_the_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def system(command: str) -> int:
        raise AssertionError(f"{command} was run")

    monkeypatch.setattr(os, "system", system)
    attack = ATTACKS[name]
    if b"%s" in attack:
        attack %= (_storage_of_one(), (2**30).to_bytes(4, "little"))
    content = b"\x80\x04}X\x06\x00\x00\x00recipe" + attack + b"s."
    modules = (extra_state, pickled)
    before = [{k: dict(vars(v)) for k, v in vars(each).items() if isinstance(v, type)} for each in modules]
    with pytest.raises(ConversionError, match=r"a layer: `_extra_state` (calls|changes|has)"):
        extra_state.read(torch.frombuffer(bytearray(content), dtype=torch.uint8), 1, None, where="a layer")
    assert before == [{k: dict(vars(v)) for k, v in vars(each).items() if isinstance(v, type)} for each in modules]
    assert extra_state.read(trained().get_extra_state(), 2, None, where="a layer") is not None


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"", [1, 2], "text"])
def test_bytes_of_another_kind(content: object) -> None:
    saved = (
        torch.frombuffer(bytearray(content or b"x"), dtype=torch.uint8)
        if isinstance(content, bytes)
        else encoded(content)
    )
    with pytest.raises(ConversionError, match="_extra_state"):
        Module().set_extra_state(saved)


def test_a_loaded_scale_is_of_the_backward_format() -> None:
    module, other = trained(), Module(gemms=2)
    other.load_state_dict(module.state_dict())
    assert other.delayed is not None
    formats = other.delayed.operands(0)
    assert (formats.input.format, formats.grad.format) == (E4M3, E5M2)  # type: ignore[attr-defined]


def _somebody_elses(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def test_a_state_names_torch_whoever_replaced_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron-Core 0.19 does when it is imported."""
    monkeypatch.setattr(torch.storage, "_load_from_bytes", _somebody_elses)
    saved = extra_state.write(DelayedState(DelayedScaling(), 1))
    assert _somebody_elses.__name__.encode() not in saved.numpy().tobytes()
    assert extra_state.read(saved, 1, None, where="a layer") is not None
