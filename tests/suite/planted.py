"""Faults planted in a copy of the product, and the shipped suite run on that copy as a user would run it.

A fault is a replacement in the text of a source file, so every process of the run has it, the ranks included: they are
forked from a process that imports the copy as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import parity

ROOT = Path(parity.__file__).parents[1]
PACKAGES = ("converters", "parity")
MEASURED = frozenset({"import", "export", "round_trip", "logits_and_loss"})
IN_THE_MODEL = frozenset({"config_in_the_model", "coverage"})
CHECKS = frozenset({"plan", "config"}) | MEASURED | IN_THE_MODEL
SUITE = tuple(f"parity.suite.test_{name}" for name in ("1_metadata", "2_weights", "3_forward"))
"""What runs: training, decoding and the rest have sabotage of their own in tests/megatron."""
MODEL = ("--model", "meta-llama/Llama-3.2-1B", "--weights", "seeded", "--size", "tiny")
LLAMA, FIELDS = "converters/models/llama.py", "converters/models/llama_fields.py"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """`old` becomes `new` in `file`, where it stands `times` times."""

    file: str
    old: str
    new: str
    times: int = 1

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text()
        assert text.count(self.old) == self.times, f"{self.file} holds {text.count(self.old)} times {self.old!r}"
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault and what the suite must make of it.

    Args:
        name: Its id.
        edits: What plants it; one after the other, so that an exchange goes by way of a third text.
        red: The checks that fail; every other one passes.
        words: What the failing output says, each of them.
        layout: The parallel layout of the run.
    """

    name: str
    edits: tuple[Edit, ...]
    red: frozenset[str]
    words: tuple[str, ...]
    layout: tuple[str, ...] = ("--tp", "2")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of pytest said: its exit status, `passed` or the failing text of each test, all that it printed."""

    status: int
    tests: Mapping[str, str] = field(default_factory=dict)
    output: str

    @property
    def red(self) -> frozenset[str]:
        """The checks that failed, whatever the case."""
        return frozenset(_check(name) for name, said in self.tests.items() if said != "passed")

    @property
    def failures(self) -> str:
        """Everything that failing tests said."""
        return "\n".join(said for said in self.tests.values() if said != "passed")


def _check(name: str) -> str:
    return name.partition("[")[0].removeprefix("test_")


def run(edits: tuple[Edit, ...], layout: tuple[str, ...], folder: Path, cache: Path) -> Outcome:
    """Run the shipped suite on a copy of the product with `edits` in it, in a process of its own."""
    copy, empty, report = folder / "product", folder / "empty", folder / "report.xml"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package)
    for edit in edits:
        edit.apply(copy)
    empty.mkdir()
    plugins = ("-p", "parity.plugin", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environ |= {"PYTHONPATH": str(copy), "PARITY_CACHE": str(cache), "HF_HOME": str(cache / "hub"), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *MODEL, *layout, "-q", f"--junitxml={report}", "--pyargs", *SUITE],
        cwd=empty,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    tests: dict[str, str] = {}
    for test in ElementTree.parse(report).iter("testcase"):  # our own report
        problems = [part for part in test if part.tag in ("failure", "error", "skipped")]
        tests[test.attrib["name"]] = "\n".join(f"{p.get('message')}\n{p.text}" for p in problems) or "passed"
    shutil.rmtree(folder)
    return Outcome(status=done.returncode, tests=tests, output=output)


def exchange(file: str, one: str, other: str) -> tuple[Edit, ...]:
    """`one` where `other` stood, and the reverse."""
    return (
        Edit(file=file, old=one, new="<one>"),
        Edit(file=file, old=other, new=one),
        Edit(file=file, old="<one>", new=other),
    )


# Import, export and logits see it; a round trip does not: there and back, the same fault undoes itself.
CANCELS = frozenset({"import", "export", "logits_and_loss"})
REFUSED = MEASURED | IN_THE_MODEL
LOGITS = frozenset({"logits_and_loss"})
PP2 = ("--pp", "2")

FAULTS = (
    Fault(
        name="k and v swapped",
        edits=exchange(LLAMA, "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        red=CANCELS,
        words=(
            "cause: k_proj and v_proj are exchanged, in layers 0-7",
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "should be model.layers.0.self_attn.k_proj.weight[0, 0], is model.layers.0.self_attn.v_proj.weight[0, 0]",
            "model.layers.3.self_attn.v_proj.weight: 9,216 of 9,216 elements differ",
        ),
    ),
    Fault(
        name="gate and up swapped",
        edits=exchange(LLAMA, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        red=CANCELS,
        words=(
            "cause: gate_proj and up_proj are exchanged, in layers 0-7",
            "decoder.layers.7.mlp.linear_fc1.weight",
            "should be model.layers.0.mlp.gate_proj.weight[0, 0], is model.layers.0.mlp.up_proj.weight[0, 0]",
        ),
    ),
    Fault(
        name="query heads in another order",
        edits=(Edit(file=LLAMA, old="(group rep q dim) hidden", new="(rep group q dim) hidden"),),
        red=CANCELS,
        words=(
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "cause: q_proj: rows permuted, in layers 0-7: (group rep dim) read as (rep group dim)",
            "should be model.layers.0.self_attn.q_proj.weight[32, 0], "
            "is model.layers.0.self_attn.q_proj.weight[128, 0]",
        ),
    ),
    Fault(
        name="layers off by one at a stage boundary",
        edits=(
            Edit(
                file="converters/topology.py",
                old="return chunk.start, chunk.stop",
                new="return chunk.start - (chunk.pp > 0), chunk.stop - (chunk.pp > 0)",
            ),
        ),
        red=MEASURED | {"plan"},
        words=(
            "model.layers.7.mlp.down_proj.weight",
            "should be model.layers.4.mlp.down_proj.weight[0, 0], is model.layers.3.mlp.down_proj.weight[0, 0]",
        ),
        layout=PP2,
    ),
    Fault(
        name="layers off by one all around",
        edits=(
            Edit(
                file="converters/layout.py",
                old="left = iter(numbers)",
                new='left = iter([(n + 1) % 8 for n in numbers] if self.key.startswith("model.") else numbers)',
            ),
        ),
        red=CANCELS,
        words=(
            "cause: layers moved, in layers 0-7: shifted by -1",
            "should be model.layers.0.mlp.down_proj.weight[0, 0], is model.layers.7.mlp.down_proj.weight[0, 0]",
        ),
    ),
    Fault(
        # The independent statement takes the placement of layers from the same place, and so errs with the product:
        # what tells is how Megatron-Core numbers its own layers.
        name="stages exchanged",
        edits=(
            Edit(
                file="converters/topology.py",
                old="ModelChunk(pp=pp, chunk=chunk, start=start",
                new="ModelChunk(pp=self.pp - 1 - pp, chunk=chunk, start=start",
            ),
        ),
        red=LOGITS | {"import"},
        words=(
            "logits, random ids: measured",
            "Megatron holds the layers [0, 1, 2, 3], the placement says [4, 5, 6, 7]",
        ),
        layout=PP2,
    ),
    Fault(
        name="rope factor dropped",
        edits=(Edit(file=FIELDS, old='Pair("rope_factor", "rope_scaling_factor"),', new=""),),
        red=REFUSED | {"config"},
        words=("rope_factor=35.0: no row of the ledger uses it",),
    ),
    Fault(
        name="rope factor always 8",
        edits=(
            Edit(
                file=FIELDS,
                old='Pair("rope_factor", "rope_scaling_factor"),',
                new='Derived(("rope_factor",), ("rope_scaling_factor",), (((35.0,), (8.0,)),)),',
            ),
        ),
        red=LOGITS | {"config_in_the_model"},
        words=("logits", "look at the config ledger (rope,", "cause: config: rope_scaling.factor: factor 8 for 35"),
    ),
    Fault(
        name="eps from another field",
        edits=exchange(FIELDS, 'Pair("rms_norm_eps",', 'Pair("initializer_range",'),
        red=LOGITS | {"config_in_the_model"},
        words=("logits", "cause: config: rms_norm_eps: demanded 3e-05, the model has 0.02"),
    ),
    Fault(
        name="last vocabulary rows lost",
        edits=(
            Edit(
                file="converters/execute.py",
                old="            written += into.numel()",
                new='            if "word_embeddings" in key:\n                into[-2:].zero_()\n'
                "            written += into.numel()",
            ),
        ),
        red=frozenset({"import", "round_trip", "logits_and_loss"}),
        words=(
            "embedding.word_embeddings.weight: 144 of 11,952 elements differ",
            "should be model.embed_tokens.weight[164, 0], is zero",
            "model.embed_tokens.weight: 216 of 23,832 elements differ",
        ),
    ),
    Fault(
        name="vocabulary behind its padding",
        edits=(Edit(file=LLAMA, old="[vocab (zero pad)]", new="[(zero pad) vocab]", times=10),),
        red=CANCELS,
        words=(
            "embedding.word_embeddings.weight",
            "should be model.embed_tokens.weight[0, 0], is zero",
        ),
    ),
    Fault(
        name="tied head from elsewhere",
        edits=(
            Edit(
                file=LLAMA,
                old='value=Tie("megatron"),\n            hf="model.embed_tokens.weight: vocab hidden"',
                new='value=Tie("megatron"),\n            hf="lm_head.weight: vocab hidden"',
            ),
        ),
        red=CHECKS - {"config"},
        words=("lm_head.weight",),
        layout=PP2,
    ),
    Fault(
        name="tensor without a rule",
        edits=(
            Edit(
                file=LLAMA,
                old='        rule(\n            "down",\n            hf=LAYER + "mlp.down_proj.weight: hidden ffn",\n'
                '            megatron=FC2 + "weight: hidden ffn/tp",\n'
                '            te=TE_MLP + "fc2_weight: hidden ffn/tp",\n        ),\n',
                new="",
            ),
        ),
        red=REFUSED | {"plan"},
        words=("tensors that nothing maps (8):", "model.layers.0.mlp.down_proj.weight: the model has (72, 88)"),
    ),
)
