"""What ranks do with the Transformer Engine model. Every function here is called in a rank.

What must come out is said by transformers in float64, one sequence after another, and cut over ranks by the independent
statement of the weights: neither knows padding, packing, or parallelism. How far a float32 evaluation may be from it is
measured with transformers' own two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from converters.topology import Topology
from parity.bounds import allowed, nearness
from parity.statement.te_weights import expected_shard

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Sequences, and how the model gets them.

    Attributes:
        layout: `bshd` or `thd`, what the layers are built for.
        lengths: Tokens of each sequence.
        room: What each has with its padding.
        left: The rows whose padding comes first.
        packed: One row of tokens with boundaries; else rows, with a mask where there is padding.
    """

    layout: str
    lengths: tuple[int, ...]
    room: tuple[int, ...]
    left: tuple[int, ...] = ()
    packed: bool = False

    def sequences(self, vocabulary: int) -> list[Tensor]:
        drawn = torch.Generator().manual_seed(20)
        every = torch.randperm(vocabulary, generator=drawn)  # the last rows too, where padding begins
        drawn_ids = torch.randint(vocabulary, (sum(self.lengths),), generator=drawn)
        drawn_ids[: min(len(every), len(drawn_ids))] = every[: len(drawn_ids)]
        return list(drawn_ids.split(list(self.lengths)))

    def lay(self, parts: list[Tensor], fill: float) -> Tensor:
        """Values of each token of each sequence as the model has them: `[t ...]` or `[b s ...]`, `fill` at padding."""
        rows = []
        for index, (part, room) in enumerate(zip(parts, self.room, strict=True)):
            padding = part.new_full((room - len(part), *part.shape[1:]), fill)
            rows.append(torch.cat([padding, part] if index in self.left else [part, padding]))
        return torch.cat(rows) if self.packed else torch.stack(rows)

    def batch(self, sequences: list[Tensor]) -> dict[str, Any]:
        """The whole batch, labels shifted."""
        shifted = [torch.cat([ids[1:], ids.new_tensor([IGNORED])]) for ids in sequences]
        ids, labels = self.lay(sequences, 0), self.lay(shifted, IGNORED)
        if not self.packed:
            keep = self.lay([torch.ones_like(ids) for ids in sequences], 0)
            mask = {} if bool(keep.all()) else {"attention_mask": keep}
            return {"input_ids": ids, "shift_labels": labels, **mask}
        ends, slots = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (self.lengths, self.room))
        boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        if self.lengths != self.room:
            boundaries |= {"cu_seq_lens_q_padded": slots, "cu_seq_lens_k_padded": slots}
        longest = {"max_length_q": max(self.room), "max_length_k": max(self.room)}
        return {"input_ids": ids[None], "shift_labels": labels[None], **boundaries, **longest}

    def mine(self, whole: Tensor, size: int, rank: int) -> Tensor:
        """The part of `[t ...]` or `[b s ...]` that a context-parallel rank has."""
        from converters.zigzag import packed_positions, zigzag_split

        if size == 1:
            return whole
        if self.packed:
            return whole[packed_positions([0, *accumulate(self.room)], size, rank)]
        return zigzag_split(whole, size, rank)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Logits of each sequence `[n v]`, loss, and gradients by name."""

    logits: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """How far a rank was from the oracle, and how far it may be."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # NaN does not pass


def of_transformers(folder: Path, sequences: list[Tensor], dtype: torch.dtype, attention: str) -> Answer:
    """Sequence by sequence, without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).to(dtype)
    logits = [model(input_ids=ids[None]).logits[0] for ids in sequences]
    total = sum(len(ids) - 1 for ids in sequences)
    losses = [cross_entropy(one[:-1], ids[1:], reduction="sum") for one, ids in zip(logits, sequences, strict=True)]
    loss = torch.stack(losses).sum() / total
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Answer(logits=[one.detach() for one in logits], loss=loss.detach(), gradients=gradients)


def answers(folder: Path, probes: list[Probe], dtype: torch.dtype = torch.float32) -> list[tuple[Answer, list[Answer]]]:
    """To each probe, what must come out, and two evaluations in `dtype` that tell how far off one may be."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    out = []
    for sequences in (probe.sequences(vocabulary) for probe in probes):
        others = [of_transformers(folder, sequences, dtype, kind) for kind in ("eager", "sdpa")]
        out.append((of_transformers(folder, sequences, torch.float64, "eager"), others))
    return out


def build(folder: Path, parallel: Any, layout: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint, loaded rank by rank, and held to the bit against the statement."""
    from converters.te.convert import load

    options = {"attn_input_format": layout, "self_attn_mask_type": "padding_causal"}
    model = load(folder, parallel=parallel, dtype=dtype, device=device, **options)
    config = json.loads((folder / "config.json").read_text())
    stated = cut(load_file(folder / "model.safetensors"), config, model.model.parallel)
    held = dict(model.named_parameters())
    assert set(held) == set(stated), set(held) ^ set(stated)
    unlike = [name for name, tensor in stated.items() if not torch.equal(held[name].detach().cpu(), tensor)]
    assert not unlike, unlike
    return model


def cut(tensors: dict[str, Tensor], config: dict[str, Any], parallel: Any) -> dict[str, Tensor]:
    """What this rank has of tensors named as in Hugging Face's checkpoint."""
    topology = parallel.topology
    groups = -(-config["num_key_value_heads"] // topology.tp) * topology.tp
    return expected_shard(tensors, config, topology, parallel.coord, padded_query_groups=groups)


def compared(
    folder: Path,
    topology: Topology,
    probes: list[Probe],
    answered: list[tuple[Answer, list[Answer]]],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cp_comm_type: str = "p2p",
) -> list[Compared]:
    """Logits, loss and every gradient of this rank against those of `answers`, probe by probe."""
    from converters.te.parallel import Parallel, reduce_gradients

    parallel = Parallel.of(topology, cp_comm_type=cp_comm_type)
    config = json.loads((folder / "config.json").read_text())
    out = []
    for probe, (oracle, others) in zip(probes, answered, strict=True):
        sequences = probe.sequences(config["vocab_size"])
        model = build(folder, parallel, probe.layout, device, dtype)
        batch = _part(probe, probe.batch(sequences), parallel)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        made = model(**batch)
        made.loss.backward()
        reduce_gradients(model)

        def laid(answer: Answer, probe: Probe = probe) -> Tensor:
            whole = probe.lay(answer.logits, float("nan"))
            return probe.mine(whole, parallel.cp_size, parallel.cp_rank).flatten(0, -2)

        name = f"{probe.layout}{' packed' * probe.packed}{' padded' * (probe.lengths != probe.room)}"
        keep = ~laid(oracle)[:, 0].isnan()
        assert made.logits.shape[-1] == config["vocab_size"], made.logits.shape
        logits = made.logits.detach().cpu().flatten(0, -2)
        tp = topology.tp
        beside = [laid(one)[keep] for one in others]
        out.append(_compared(f"{name}: logits", logits[keep], laid(oracle)[keep], beside, tp))
        out.append(_compared(f"{name}: loss", made.loss.detach().cpu(), oracle.loss, [one.loss for one in others], tp))
        expected = cut(oracle.gradients, config, parallel)
        again = [cut(one.gradients, config, parallel) for one in others]
        for key, parameter in model.named_parameters():
            gradient = torch.full_like(parameter, float("nan")) if parameter.grad is None else parameter.grad
            out.append(_compared(f"{name}: {key}", gradient.cpu(), expected[key], [one[key] for one in again], tp))
    return out


def _part(probe: Probe, batch: dict[str, Any], parallel: Any) -> dict[str, Any]:
    """The batch as this context-parallel rank gets it."""
    size, rank = parallel.cp_size, parallel.cp_rank
    if size == 1:
        return batch
    cut_here = {}
    for name in ("input_ids", "shift_labels"):
        whole = batch[name]
        cut_here[name] = probe.mine(whole[0], size, rank)[None] if probe.packed else probe.mine(whole, size, rank)
    return batch | cut_here


def _compared(name: str, actual: Tensor, expected: Tensor, others: list[Tensor], tp: int) -> Compared:
    """In float32 by the largest difference, within floors; in bfloat16 as near to the oracle as transformers is."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, found {tuple(actual.shape)}")
    if not expected.numel():
        return Compared(name=name, value=0.0, bound=0.0)
    off, *floors = ((one.double() - expected).abs() for one in (actual, *others))
    if all(one.dtype == torch.float32 for one in others):
        floor, scale = max(float(one.max()) for one in floors), float(expected.abs().max())
        return Compared(name=name, value=float(off.max()), bound=allowed(floor, scale))
    value, *reference = (float(one.square().mean().sqrt()) for one in (off, *floors))
    return Compared(name=name, value=value, bound=nearness(max(reference), tp))


def generated(folder: Path, topology: Topology, layout: str, **options: Any) -> Tensor:
    """The tokens that this rank generates."""
    from converters.te.parallel import Parallel

    model = build(folder, Parallel.of(topology), layout).eval()
    config = model.config
    prompt = Probe(layout=layout, lengths=(7, 4), room=(7, 7), left=(1,))
    batch = prompt.batch(prompt.sequences(config.vocab_size))
    del batch["shift_labels"]
    torch.manual_seed(11)
    tokens: Tensor = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **options)
    return tokens


def alone(folder: Path, topology: Topology) -> dict[str, bool]:
    """Whether one rank with and without groups asked for is one model, to the bit and in structure."""
    from converters.te.parallel import Parallel, reduce_gradients

    probe = Probe(layout="bshd", lengths=(16, 16), room=(16, 16))
    made = []
    for parallel in (None, Parallel.of(topology), None):
        model = build(folder, parallel, probe.layout)
        out = model(**probe.batch(probe.sequences(model.config.vocab_size)))
        out.loss.backward()
        reduce_gradients(model)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        made.append((str(model), out.logits, out.loss, gradients))
    (text, logits, loss, gradients), *others = made
    return {
        "structure": all(other[0] == text for other in others),
        "logits": all(torch.equal(other[1], logits) for other in others),
        "loss": all(torch.equal(other[2], loss) for other in others),
        "gradients": all(torch.equal(other[3][key], grad) for other in others for key, grad in gradients.items()),
    }


def started(folder: Path, topology: Topology) -> dict[str, Any]:
    """Of a model that was only initialised: which padding is not zero, and of what all else is."""
    from converters.te.config import NVLlamaConfig
    from converters.te.modeling import NVLlamaForCausalLM
    from converters.te.parallel import Parallel

    config = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype", "dtype")}
    torch.manual_seed(dist.get_rank())
    parallel = Parallel.of(topology)
    model = NVLlamaForCausalLM(NVLlamaConfig(**fields, dtype=torch.float32), parallel=parallel, device="cpu")
    ones = {key: torch.ones_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    real = cut(ones, config, parallel)
    return {
        name: (int(parameter[real[name] == 0].count_nonzero()), int((real[name] == 0).sum()))
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and real[name].count_nonzero() < parameter.numel()
    }


def refused(folder: Path, topology: Topology, layout: str, lengths: tuple[int, ...], **given: Any) -> str:
    """What the model says to sequences that it cannot cut."""
    from converters.errors import ConversionError
    from converters.te.parallel import Parallel

    probe = Probe(layout=layout, lengths=lengths, room=lengths, packed=layout == "thd")
    parallel = Parallel.of(topology)
    model = build(folder, parallel, layout)
    batch = probe.batch(probe.sequences(model.config.vocab_size)) | given
    try:
        model(**batch)
    except ConversionError as error:
        return str(error)
    return ""


def meshes_refused(folder: Path, meshes: list[Topology]) -> list[str]:
    """What is said to meshes that the model, or this one, cannot have."""
    from transformers import AutoConfig

    from converters.errors import TopologyError
    from converters.te.parallel import Parallel

    out = []
    for mesh in meshes:
        try:
            Parallel(topology=mesh).check(AutoConfig.from_pretrained(folder))
            Parallel.of(mesh)
        except TopologyError as error:
            out.append(str(error))
        else:
            out.append("")
    return out


def sampled(folder: Path, topology: Topology) -> Tensor:
    """The tokens that this rank draws, its random numbers being its own."""
    from converters.te.parallel import Parallel

    model = build(folder, Parallel.of(topology), "thd").eval()
    torch.manual_seed(dist.get_rank())
    ids = Probe(layout="thd", lengths=(7, 7), room=(7, 7)).sequences(model.config.vocab_size)
    tokens: Tensor = model.generate(torch.stack(ids), max_new_tokens=8, min_new_tokens=8, do_sample=True)
    return tokens


def saved(folder: Path, topology: Topology, target: Path) -> list[str]:
    """What is said to each way of writing this rank's part as if it were the model."""
    from converters.errors import TopologyError
    from converters.te.parallel import Parallel

    model = build(folder, Parallel.of(topology), "thd")
    out = []
    for write in (model.save_pretrained, model.save_extra_states):
        try:
            write(target)
        except TopologyError as error:
            out.append(str(error))
    return out
