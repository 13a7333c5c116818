from __future__ import annotations

import json
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from converters.errors import CheckpointError, ConfigError, SourceError
from parity import cache, smollm2
from parity.cache import complete, made_once
from parity.seeded import key_table, write_checkpoint
from parity.subjects import config_of, slug_of, subject
from parity.tiny import odd_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        odd_config(), tmp_path_factory.mktemp("models") / "My Odd_Model", shards=3, dtype="bfloat16"
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every tensor as the safetensors library reads it, as bytes: equal bits or not."""
    import torch

    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                out[key] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return out


def test_a_tiny_subject_is_made_once_and_is_what_collection_was_told(tmp_path: Path) -> None:
    first = subject("meta-llama/Llama-3.2-1B", size="tiny", cache=tmp_path)
    assert (first.slug, first.weights, first.origin) == ("llama-3.2-1b-tiny", "seeded", "config")
    assert first.config == config_of("meta-llama/Llama-3.2-1B", size="tiny") | {"dtype": "float32"}
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert subject("llama-3.2-1b", size="tiny", weights="seeded", cache=tmp_path).folder == first.folder
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    others = [
        subject("Llama-3.2-1B", size="tiny", cache=tmp_path, **change).folder  # type: ignore[arg-type]
        for change in ({"seed": 1}, {"dtype": "bfloat16"}, {"layers": 2})
    ]
    assert len({first.folder, *others}) == 4


def test_a_tiny_size_with_checkpoint_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"Leave --weights out .* --layers N"):
        subject("Llama-3.2-1B", size="tiny", weights="checkpoint", cache=tmp_path)


def test_seeded_weights_beyond_the_limit_or_the_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match=r"8,030,261,248 parameters, 32\.1 GB in float32, more than the limit"):
        subject("Llama-3.1-8B", weights="seeded", cache=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match=r"has 0\.0 GB free"):
        subject("Llama-3.1-8B", weights="seeded", seeded_limit=10**12, cache=tmp_path)


def test_a_folder_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    found = subject(str(checkpoint), cache=tmp_path)
    assert found.folder == checkpoint.resolve()
    assert (found.slug, found.weights, found.origin) == ("my-odd-model", "real", "folder")


def test_the_first_layers_of_real_weights_are_kept_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = subject(str(checkpoint), layers=2, cache=tmp_path)
    assert (found.slug, found.weights) == ("my-odd-model-2layers", "real")
    assert found.config == json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": 2}
    kept, whole = bytes_of(found.folder), bytes_of(checkpoint)
    assert kept.keys() == key_table(found.config).keys()
    assert all(kept[key] == whole[key] for key in kept)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found.folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (found.folder / "model.safetensors.index.json").exists(), "one file needs no index"
    with pytest.raises(ConfigError, match="from 1 to the model's 6"):
        subject(str(checkpoint), layers=7, cache=tmp_path)


def test_a_changed_checkpoint_gives_other_layers(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    before = subject(str(source), layers=1, cache=tmp_path).folder
    path = next(source.glob("*.safetensors"))
    os.utime(path, ns=(1, 1))
    assert subject(str(source), layers=1, cache=tmp_path).folder != before


def test_a_truncated_checkpoint_leaves_no_derived_folder(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    path = max(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        subject(str(source), layers=6, cache=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "made").iterdir() if p.is_dir()] == []


def test_slugs_say_what_was_changed() -> None:
    assert slug_of("meta-llama/Llama-3.1-405B", size="tiny", layers=4) == "llama-3.1-405b-tiny-4layers"
    assert slug_of("LLAMA-3.2-1b", weights="seeded") == "llama-3.2-1b-seeded"
    assert slug_of("smollm2-135m") == "smollm2-135m"


def test_configs_are_known_at_collection_without_weights_network_or_torch() -> None:
    code = (
        "import sys; from parity.subjects import config_of; "
        "print([config_of(m, size='tiny')['hidden_size'] for m in ('smollm2-135m', 'meta-llama/Llama-3.1-8B')], "
        "sorted({'torch', 'transformers', 'gguf', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[72, 72] []"


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARITY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "llama-parity"
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"
    assert cache.cache_root(tmp_path) == tmp_path


def test_a_failed_making_leaves_nothing_and_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == [], "leavings of an earlier attempt"
        (folder / "small").write_text("right")
        (folder / "large").write_bytes(bytes(cache._DIGEST_UP_TO + 1))

    folder = made_once(tmp_path / "x", make)
    for name, damage in (("small", b"wrong"), ("large", b"short"), (cache.MANIFEST, b"{"), (cache.MANIFEST, b"{}")):
        assert complete(folder)
        (folder / name).write_bytes(damage)
        assert not complete(folder)
        made_once(folder, make)
    (folder / "small").unlink()
    assert not complete(folder)


def _make_slowly(folder: Path, entered: multiprocessing.synchronize.Event, log: Path, die: bool) -> None:
    def make(aside: Path) -> None:
        (aside / "file").write_text(str(os.getpid()))
        with log.open("a") as file:
            file.write("made\n")
        entered.set()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)

    made_once(folder, make)


def test_several_processes_make_it_once_even_after_one_was_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    entered, log = context.Event(), tmp_path / "log"
    killed = context.Process(target=_make_slowly, args=(tmp_path / "x", entered, log, True))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert entered.is_set()
    assert not (tmp_path / "x").exists()
    log.unlink()
    workers = [context.Process(target=_make_slowly, args=(tmp_path / "x", entered, log, False)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "made\n"
    assert complete(tmp_path / "x")
    assert not (tmp_path / "x.part").exists()


def test_packaged_weights_are_a_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_checkpoint(config_of("smollm2-135m", size="tiny"), tmp_path / "stand-in")
    monkeypatch.setattr(smollm2, "prepare", lambda cache, progress: made)
    found = subject("smollm2-135m", cache=tmp_path)
    assert (found.slug, found.weights, found.origin) == ("smollm2-135m", "real, dequantised 4-bit", "package")
    assert subject("SmolLM2-135M", layers=3, cache=tmp_path).config["num_hidden_layers"] == 3
