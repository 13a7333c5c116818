from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Repo, serve

from converters.errors import SourceError
from converters.sources import PACKAGED, packaged, read_config, resolve, without_credentials
from parity.seeded import parameters, write_checkpoint
from parity.tiny import odd_config

ROOT = Path(__file__).parents[2]
ASK = """
import json, sys, traceback
from converters.sources import SourceError, read_config, resolve
verb, model, options = json.loads(sys.argv[1])
try:
    if verb == "read_config":
        answer = read_config(model, **options)
    else:
        source = resolve(model, **options)
        answer = {"folder": str(source.folder), "revision": source.revision, "origin": source.origin,
                  "files": sorted(p.name for p in source.folder.rglob("*")) if source.folder else None,
                  "hidden": source.config["hidden_size"]}
    print(json.dumps({"answer": answer, "heavy": sorted({"torch", "transformers"} & set(sys.modules))}))
except SourceError as error:
    print(json.dumps({"error": str(error), "shown": "".join(traceback.format_exception(error))}))
"""


def ask(home: Path, url: str, verb: str, model: str, *, env: dict[str, str] | None = None, **options: object) -> Any:
    """Ask in a fresh process, whose hub client reads its settings from the environment as anybody's does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", ASK, json.dumps([verb, model, options])]
    done = subprocess.run(
        command, env=clean | (env or {}), capture_output=True, text=True, timeout=60, cwd=home, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(odd_config(), tmp_path_factory.mktemp("hub") / "model", shards=2, dtype="bfloat16")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "modeling_x.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def dead_url() -> str:
    """A URL of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_every_packaged_config_answers_by_name_and_by_hub_id_without_a_network(tmp_path: Path) -> None:
    for name, repo in PACKAGED.items():
        assert read_config(name.upper())["model_type"] == "llama"
        assert packaged(name.lower()) == name
        if repo is not None:
            assert packaged(repo) == name
            assert ask(tmp_path, dead_url(), "read_config", repo)["answer"] == read_config(name)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("lingua-1B", 1_783_732_224),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_packaged_configs_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameters(read_config(name)) == count


def test_every_packaged_file_is_named_and_has_its_source_in_the_readme() -> None:
    configs = ROOT / "converters" / "models" / "configs"
    assert {path.stem for path in configs.glob("*.json")} == set(PACKAGED)
    readme = (configs / "README.md").read_text()
    assert all(f"| {name}.json |" in readme for name in PACKAGED)


def test_a_plan_of_a_named_model_needs_no_weights() -> None:
    source = resolve("llama-3.1-405b", weights=False)
    assert (source.folder, source.origin) == (None, "packaged config")
    assert source.config["num_hidden_layers"] == 126


def test_a_hub_model_comes_with_its_weights_and_without_pickles_or_code(tmp_path: Path, checkpoint: Path) -> None:
    repo = Repo.of(checkpoint)
    with serve({"someone/odd-llama": repo}) as hub:
        first = ask(tmp_path, hub.url, "resolve", "someone/odd-llama")
        assert first["heavy"] == []
        answer = first["answer"]
        assert (answer["origin"], answer["revision"], answer["hidden"]) == ("hub", repo.commit, 210)
        assert {"model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"} <= set(answer["files"])
        assert not any(name.endswith((".bin", ".pth", ".py")) or name == "params.json" for name in answer["files"])
        for path in Path(answer["folder"]).glob("*.safetensors"):
            assert path.read_bytes() == (checkpoint / path.name).read_bytes()
        with_code = ask(tmp_path, hub.url, "resolve", "someone/odd-llama", trust_remote_code=True)
        assert "modeling_x.py" in with_code["answer"]["files"]
    offline = ask(tmp_path, dead_url(), "resolve", "someone/odd-llama", env={"HF_HUB_OFFLINE": "1"})
    assert offline["answer"]["folder"] == answer["folder"]
    unreachable = ask(tmp_path, dead_url(), "resolve", "someone/odd-llama")
    assert unreachable["answer"]["folder"] == answer["folder"]


def test_without_weights_only_metadata_is_fetched(tmp_path: Path, checkpoint: Path) -> None:
    with serve({"someone/odd-llama": Repo.of(checkpoint)}) as hub:
        answer = ask(tmp_path, hub.url, "resolve", "someone/odd-llama", weights=False)["answer"]
        assert "tokenizer.json" in answer["files"]
        assert not any(name.endswith(".safetensors") for name in answer["files"])


def test_a_published_config_in_the_cache_beats_the_packaged_one(tmp_path: Path, checkpoint: Path) -> None:
    with serve({"meta-llama/Llama-3.2-1B": Repo.of(checkpoint)}) as hub:
        assert ask(tmp_path, hub.url, "read_config", "meta-llama/Llama-3.2-1B")["answer"]["hidden_size"] == 2048
        assert hub.requests == [], "a packaged config is read without asking the hub"
        ask(tmp_path, hub.url, "resolve", "llama-3.2-1b")
    config = ask(tmp_path, dead_url(), "read_config", "meta-llama/Llama-3.2-1B")["answer"]
    assert config["hidden_size"] == 210


def test_a_gated_model_names_the_licence_and_the_token_and_opens_with_the_right_one(
    tmp_path: Path, checkpoint: Path
) -> None:
    with serve({"meta-llama/Llama-3.2-1B": Repo.of(checkpoint, gated=True)}) as hub:
        error = ask(tmp_path, hub.url, "resolve", "meta-llama/Llama-3.2-1B")["error"]
        assert "gated" in error
        assert f"Accept the licence at {hub.url}/meta-llama/Llama-3.2-1B" in error
        assert "HF_TOKEN" in error
        assert "none is set" in error
        refused = ask(tmp_path, hub.url, "resolve", "meta-llama/Llama-3.2-1B", env={"HF_TOKEN": "wrong-token"})
        assert "not on its list" in refused["error"]
        assert "wrong-token" not in json.dumps(refused)
        assert refused["shown"].count("Traceback") == 1, "a chained exception's frames would show the token"
        (tmp_path / "a").mkdir()
        by_env = ask(tmp_path / "a", hub.url, "resolve", "llama-3.2-1b", env={"HF_TOKEN": "right-token"})
        assert by_env["answer"]["origin"] == "hub"
        (tmp_path / "b").mkdir()
        by_argument = ask(tmp_path / "b", hub.url, "resolve", "llama-3.2-1b", token="right-token")
        assert by_argument["answer"]["origin"] == "hub"


def test_a_model_that_does_not_exist_is_answered_with_near_misses(tmp_path: Path, checkpoint: Path) -> None:
    with serve({"meta-llama/Llama-3.2-1B": Repo.of(checkpoint)}) as hub:
        error = ask(tmp_path, hub.url, "resolve", "meta-llama/Lama-3.2-1B")["error"]
        assert "did you mean 'meta-llama/Llama-3.2-1B'" in error
        assert "private" in error
        wrong = ask(tmp_path, hub.url, "resolve", "meta-llama/Llama-3.2-1B", revision="nightly")["error"]
        assert "'nightly'" in wrong
        assert "revision does not" in wrong


def test_a_model_without_safetensors_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    repo = Repo.of(checkpoint)
    repo.files = {k: v for k, v in repo.files.items() if "safetensors" not in k}
    with serve({"someone/pickled": repo}) as hub:
        error = ask(tmp_path, hub.url, "resolve", "someone/pickled")["error"]
        assert "no safetensors weights" in error
        assert "--weights seeded" in error


def test_no_connection_and_offline_are_told_apart(tmp_path: Path) -> None:
    error = ask(tmp_path, dead_url(), "resolve", "meta-llama/Llama-3.2-1B")["error"]
    assert "cannot reach the hub" in error
    assert "--weights seeded" in error
    offline = ask(tmp_path, dead_url(), "resolve", "meta-llama/Llama-3.2-1B", env={"HF_HUB_OFFLINE": "1"})["error"]
    assert "HF_HUB_OFFLINE forbids" in offline


def test_a_folder_must_be_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    assert resolve(str(checkpoint)).config["hidden_size"] == 210
    with pytest.raises(SourceError, match=r"no config\.json .*found nothing"):
        read_config(str(tmp_path))
    with pytest.raises(SourceError, match="does not exist"):
        read_config(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="expected an object"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        resolve(str(tmp_path))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"not in the folder \(2\)"):
        resolve(str(tmp_path))


def test_names_that_are_nothing_say_what_there_is() -> None:
    with pytest.raises(SourceError, match=r"did you mean .*'Llama-3\.2-1B'.*owner/name"):
        read_config("Llama-3.2-1")
    with pytest.raises(SourceError, match="without a hub repository"):
        resolve("lingua-1b")


def test_credentials_are_blotted_out() -> None:
    text = "GET https://user:secret@host/simple failed, Authorization: Bearer abcdef123, hf_abcdefgh"
    assert without_credentials(text) == "GET https://***@host/simple failed, Authorization: Bearer ***, hf_***"
