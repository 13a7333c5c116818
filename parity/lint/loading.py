"""The rule that asks transformers itself, in a process of its own: config, tokenizer, the model without numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parity.lint.folder import TOKENIZERS, Folder, Unavailable
from parity.lint.rules import Remark, rule, some

TIMEOUT = 300.0  # seconds; imports take some


@rule("loads", "transformers reads config, tokenizer and generation config, and its model has these very tensors")
def loads(folder: Folder) -> Iterator[Remark]:
    if not folder.loading:
        raise Unavailable("--no-load")
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    if folder.column != "hf":
        raise Unavailable(f"a folder of the {folder.column!r} column is not transformers' own")
    tensors = folder.tensors
    asked = {
        "folder": str(folder.path.resolve()),
        "tokenizer": any(folder.has(name) for name in TOKENIZERS),
        "generation": folder.has("generation_config.json"),
        "tensors": {} if folder.quantized else {key: list(info.shape) for key, info in tensors.items()},
    }
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "parity.lint.loading"],
            input=json.dumps(asked),
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        said = (
            f"it took longer than {TIMEOUT:g} s" if isinstance(error, subprocess.TimeoutExpired) else done.stderr[-500:]
        )
        answer = {"version": "", "problems": [["all", f"the process that asked ended badly: {said}"]]}
    for what, problem in answer["problems"]:
        yield Remark(
            severity="error",
            where=what,
            expected=f"transformers {answer['version']} to load it".replace("  ", " "),
            found=problem,
            advice="correct what the other rules say first; if they say nothing, try it in Python",
        )


def _ask(asked: dict[str, Any]) -> dict[str, Any]:
    """What transformers says of a folder: pairs of what was loaded, and what went wrong."""
    import torch
    import transformers

    folder, problems = asked["folder"], []
    config = None

    def attempt(what: str, step: Any) -> Any:
        try:
            return step()
        except Exception as error:  # whatever a loader does with a bad file
            problems.append([what, f"{type(error).__name__}: {str(error)[:400]}"])

    config = attempt("AutoConfig", lambda: transformers.AutoConfig.from_pretrained(folder))
    if asked["tokenizer"]:
        attempt("AutoTokenizer", lambda: transformers.AutoTokenizer.from_pretrained(folder))
    if asked["generation"]:

        def generation() -> None:
            transformers.GenerationConfig.from_pretrained(folder).validate()

        attempt("GenerationConfig", generation)
    if config is not None and asked["tensors"]:
        with torch.device("meta"):
            model = attempt("AutoModelForCausalLM", lambda: transformers.AutoModelForCausalLM.from_config(config))
        if model is not None:
            model.tie_weights()
            problems += [["AutoModelForCausalLM", problem] for problem in _compare(model, asked["tensors"])]
    return {"version": transformers.__version__, "problems": problems}


def _compare(model: Any, stored: dict[str, list[int]]) -> Iterator[str]:
    held = model.state_dict(keep_vars=True)
    there = {id(held[key]) for key in stored if key in held}
    missing = [key for key, tensor in held.items() if key not in stored and id(tensor) not in there]
    # Buffers that old checkpoints store and that are computed.
    unknown = [key for key in stored if key not in held and not key.endswith("rotary_emb.inv_freq")]
    shapes = [key for key in stored if key in held and list(held[key].shape) != stored[key]]
    for what, keys in (("has, and the folder lacks", missing), ("lacks, and the folder has", unknown)):
        if keys:
            yield f"{len(keys)} tensors that the model {what}: {some(keys)}"
    if shapes:
        first = shapes[0]
        yield f"{len(shapes)} of another shape: {first} is {list(held[first].shape)} there, {stored[first]} here"


if __name__ == "__main__":
    print(json.dumps(_ask(json.load(sys.stdin))))
