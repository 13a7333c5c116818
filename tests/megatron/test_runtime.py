"""The CPU runtime: what it redirects, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from converters.megatron import runtime
from parity.observation.observe import Observation, hf_observation
from parity.ranks import Zygote


def redirected() -> None:
    """In a rank: CUDA calls in each of their spellings."""
    runtime.install()
    runtime.install()
    assert runtime.installed()
    cpu = torch.device("cpu")
    made = [
        torch.zeros([], dtype=torch.int, device="cuda"),
        torch.ones(2, device=torch.device("cuda", 0)),
        torch.empty(2, device=0),
        torch.tensor([1, 2], device="cpu", pin_memory=True).cuda(non_blocking=True),
        torch.zeros_like(torch.ones(2), device="cuda:0"),
        torch.arange(2).to("cuda"),
        torch.arange(2).to(device="cuda", dtype=torch.float32),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.empty(1, device=torch.cuda.current_device()),
    ]
    assert [tensor.device for tensor in made] == [cpu] * len(made)
    assert not any(tensor.is_pinned() for tensor in made)
    assert made[6].dtype == torch.float32
    assert torch.empty(1, device="meta").is_meta
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.Event().record(stream)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda.manual_seed(5)
    drawn = torch.rand(3)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime is for machines without a GPU")
def test_cuda_is_redirected(zygote: Zygote) -> None:
    zygote.run(redirected, timeout=60)


def loaded_after(tiny: Tiny) -> Observation:
    """In a rank: transformers loads and runs with the redirects live."""
    runtime.install()
    return hf_observation(tiny.folder, tiny_llama.asked(tiny))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime is for machines without a GPU")
def test_transformers_sees_no_difference(models: dict[str, Tiny], zygote: Zygote) -> None:
    """With torch's factories patched instead, the reference itself would be garbage, without an error."""
    tiny = models["untied"]
    (live,) = zygote.run(loaded_after, tiny, timeout=60)
    np.testing.assert_array_equal(live.logits, hf_observation(tiny.folder, tiny_llama.asked(tiny)).logits)


def test_a_gpu_is_never_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    with pytest.raises(runtime.RuntimeUnavailableError, match="CUDA_VISIBLE_DEVICES"):
        runtime.install()
    assert torch.cuda.current_device is before
    assert not runtime.installed()


def checkpointed(tiny: Tiny, folder: str) -> bool:
    """In a rank: save by Megatron-Core's own dist_checkpointing, forget, and load again."""
    import multiprocessing

    from megatron.core import dist_checkpointing

    from converters.topology import Topology

    (model,), _ = tiny_llama.build(tiny, Topology(tp=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), folder)
    assert not multiprocessing.active_children()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(prefix=""), folder), strict=False)
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime is for machines without a GPU")
def test_saving_starts_no_process(models: dict[str, Tiny], tmp_path: object, zygote: Zygote) -> None:
    assert zygote.run(checkpointed, models["untied"], str(tmp_path), world=2, timeout=60) == [True, True]
