"""The README's Python, run in a rank."""

from __future__ import annotations

import re
from pathlib import Path


def run(readme: Path, folder: Path, target: Path) -> tuple[list[str], int]:
    """Execute the block that converts, on a checkpoint in `folder`, and say what it exported and how it is cut."""
    from converters.megatron import runtime

    (block,) = [code for code in re.findall(r"```python\n(.*?)```", readme.read_text(), re.S) if "_provider()" in code]
    code = block.replace("meta-llama/Llama-3.2-1B", str(folder)).replace('"exported"', repr(str(target)))
    assert code != block
    runtime.install()
    names: dict[str, object] = {}
    exec(compile(code, str(readme), "exec"), names)  # our own README
    return [name for name, _ in names["bridge"].export_hf_weights(names["model"])], len(names["model"])  # type: ignore[attr-defined,arg-type]


def generate(readme: Path, folder: Path) -> tuple[list[int], list[int], bool]:
    """Execute the block about Transformer Engine on a checkpoint in `folder`.

    Returns:
        The shapes of the prompt and of what was generated, and whether the model that came back holds the same bits.
    """
    import torch

    (block,) = [code for code in re.findall(r"```python\n(.*?)```", readme.read_text(), re.S) if "_te_to_hf" in code]
    code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder))
    code = code.replace("model.generate(", "made = model.generate(")
    assert code.count(str(folder)) == 2
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    exec(compile(code, str(readme), "exec"), names)  # our own README
    before, after = (names[name].state_dict() for name in ("hf", "back"))  # type: ignore[attr-defined]
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return list(names["batch"]["input_ids"].shape), list(names["made"].shape), same  # type: ignore[index,attr-defined]
