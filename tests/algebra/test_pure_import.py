"""The algebra needs no framework: a laptop, or pytest itself, imports it in no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ("converters.plan", "converters.table", "converters.proof", "converters.models")
HEAVY = ("torch", "numpy", "transformers", "megatron", "safetensors", "huggingface_hub")


def test_importing_plans_tables_proofs_and_models_imports_no_framework() -> None:
    code = f"import {', '.join(MODULES)}, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
