"""Tests that need an NVIDIA GPU and Transformer Engine. Elsewhere each skips and says what is missing.

    python -m pytest tests/gpu -ra                      # everything; two or more GPUs for test_te_parallel.py
    python -m pytest tests/gpu -ra -n 4                 # in four processes on one GPU: they are small
    python -m pytest tests/gpu -ra -k quantization      # the quantisers alone, to the bit
    python ci/bench/te.py --json te.json                # Transformer Engine in bf16 and FP8 beside transformers
    OUT=reports ci/gpu.sh                               # all of it, the suite too; figures and logs under $OUT
    OUT=reports ci/gpu.sh tests                         # one part of it: tests, suite or bench

From a folder of unpacked packages, with nothing to install:

    python -c "import tarfile; tarfile.open('.gpu/site.tar.xz').extractall('.gpu/site', filter='data')"
    PYTHONPATH=$PWD/.gpu/site:$PWD python -m pytest tests/gpu -ra

That folder needs what transformer-engine, transformer-engine-torch and megatron-core import and torch and transformers
do not bring: einops, onnxscript, onnx, onnx-ir, ml-dtypes, protobuf, pydantic, nvdlfw-inspect, pyyaml; and rich with
markdown-it-py, mdurl and pygments, for the commands that print tables.

Transformer Engine multiplies float32 matrices in TF32, whatever torch is told. The comparisons in float32 are meant to
see faults at the fourth decimal place and not that, so TF32 is switched off for the libraries below it, which look at
the environment when they start: before the first test.

Source: TransformerEngine, transformer_engine/common/gemm/cublaslt_gemm.cu, `cublas_gemm`: CUBLAS_COMPUTE_32F_FAST_TF32.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

# The packages run from the checkout too, where they are not installed: here, and in the processes of the suite.
ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), ROOT]))

import pytest  # noqa: E402  # after the switch above
from on_gpu import describe  # noqa: E402


def pytest_report_header(config: pytest.Config) -> str:
    """Which GPU, libraries and switches the tests see."""
    return describe()
