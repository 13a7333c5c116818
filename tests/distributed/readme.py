"""The README's Python, run in a rank."""

from __future__ import annotations

import re
from pathlib import Path


def run(readme: Path, folder: Path, target: Path) -> tuple[list[str], int]:
    """Execute the block that converts, on a checkpoint in `folder`, and say what it exported and how it is cut."""
    from converters.megatron import runtime

    (block,) = [code for code in re.findall(r"```python\n(.*?)```", readme.read_text(), re.S) if "AutoBridge" in code]
    code = block.replace("meta-llama/Llama-3.2-1B", str(folder)).replace('"exported"', repr(str(target)))
    assert code != block
    runtime.install()
    names: dict[str, object] = {}
    exec(compile(code, str(readme), "exec"), names)  # our own README
    return [name for name, _ in names["bridge"].export_hf_weights(names["model"])], len(names["model"])  # type: ignore[attr-defined,arg-type]
