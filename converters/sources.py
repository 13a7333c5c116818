"""Where a model comes from: a folder, a hub repository, or a packaged config.

The rule for a config, first match wins:

1. a local folder;
2. for a hub id, the config.json of that revision in the local hub cache: what was published beats a copy of it;
3. a packaged config (`converters/models/configs`), by hub id or bare name in any case, when no revision is asked for;
4. the hub.

So a named model can be planned without a network, and nothing is fetched for a question that is already answered.
Weights come from a folder or from the hub, as safetensors only: pickled files are never fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from converters.errors import SourceError, listing, near
from converters.files import place

Config = dict[str, Any]

PACKAGED: dict[str, str | None] = {
    "Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Llama-3.1-405B",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "lingua-1B": None,
    "SmolLM2-135M": None,
}
"""Packaged configs, and the hub repository that each describes (`None`: no repository with these weights)."""

_METADATA = ["*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "README.md"]
_WEIGHTS = ["*.safetensors"]
_NEVER = ["original/*", "consolidated*", "onnx/*", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that was found.

    Attributes:
        name: What was asked for.
        folder: Its files, or `None` where only the config is known.
        config: Its config.json, as read.
        revision: The commit of the hub snapshot, or `None`.
        origin: Where it was found.
    """

    name: str
    folder: Path | None
    config: Config
    revision: str | None = None
    origin: Literal["folder", "hub", "packaged config"]


def packaged(model: str) -> str | None:
    """The name of the packaged config for a hub id or a bare name, in any case, or `None`."""
    wanted = model.casefold()
    for name, repo in PACKAGED.items():
        if wanted == name.casefold() or (repo is not None and wanted == repo.casefold()):
            return name
    return None


def read_config(model: str, *, revision: str | None = None, token: str | None = None) -> Config:
    """The config.json of `model`, by the rule of this module.

    Args:
        model: A folder, a hub id (`owner/name`), or the bare name of a packaged config.
        revision: Branch, tag or commit on the hub; a packaged config answers only without one.
        token: Access token for the hub; the default is the one that its client finds (`HF_TOKEN`, login).

    Raises:
        SourceError: No such model; the message says what was tried and what to do.
    """
    folder = _folder(model)
    if folder is not None:
        return _config_in(folder)
    name, repo = packaged(model), _repo(model)
    if repo is not None:
        cached = _cached_config(repo, revision)
        if cached is not None:
            return _config_in(cached)
    if name is not None and (revision is None or repo is None):
        return _packaged_config(name)
    if repo is None:
        raise _unknown(model)
    return _config_in(_snapshot(repo, revision, token, ["config.json"]))


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Source:
    """Find a model and, for a hub id, bring its files into the local hub cache.

    Honours the hub client's own settings: `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.

    Args:
        model: A folder, a hub id (`owner/name`), or the bare name of a packaged config.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; the default is the one that its client finds.
        weights: Require safetensors weights. Without them a packaged config is an answer, offline.
        trust_remote_code: Fetch the repository's Python files too.

    Raises:
        SourceError: No such model, revision or access, no connection, or no safetensors weights; the message says
            what was tried and what to do.
    """
    folder = _folder(model)
    if folder is not None:
        if weights:
            _require_weights(folder, model)
        return Source(name=model, folder=folder, config=_config_in(folder), origin="folder")
    name, repo = packaged(model), _repo(model)
    published = repo is not None and (revision is not None or _cached_config(repo, None) is not None)
    if not weights and name is not None and not published:
        return Source(name=model, folder=None, config=_packaged_config(name), origin="packaged config")
    if repo is None:
        raise _unknown(model) if name is None else _config_only(name)
    patterns = _METADATA + _WEIGHTS * weights + ["*.py"] * trust_remote_code
    snapshot = _snapshot(repo, revision, token, patterns)
    if weights:
        _require_weights(snapshot, model)
    return Source(name=model, folder=snapshot, config=_config_in(snapshot), revision=snapshot.name, origin="hub")


def without_credentials(text: str) -> str:
    """`text` with the user and password of any URL, and anything that looks like a token, blotted out."""
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
    return re.sub(r"\b(hf_|Bearer )[A-Za-z0-9_\-.]{4,}", r"\1***", text)


def _folder(model: str) -> Path | None:
    """The local folder that `model` names, or `None`; what can only be a path must exist, and no file is a model."""
    path = Path(place.expanded(model))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SourceError(f"no model {place.shortened(model)}: {why}") from error
    if path.is_dir():
        return path.resolve()
    file = path.exists() and packaged(model) is None
    if file or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        there = path if path.parent.is_dir() else path.parent
        hint = near(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        kind = "it is a file, expected the folder that holds it" if path.exists() else f"{there} does not exist"
        raise SourceError(f"no model folder {model!r}: {kind}{hint}")
    return None


def _repo(model: str) -> str | None:
    """The hub repository of a hub id or of a packaged name."""
    name = packaged(model)
    return PACKAGED[name] if name is not None else (model if model.count("/") == 1 else None)


def _packaged_config(name: str) -> Config:
    text = resources.files("converters.models").joinpath("configs", f"{name}.json").read_text()
    config: Config = json.loads(text)
    return config


def _config_in(folder: Path) -> Config:
    path = folder / "config.json"
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise SourceError(
            f"no config.json in {folder} (found {found}): expected the folder of a Hugging Face checkpoint"
        )
    return config_text(path)[1]


def config_text(path: Path) -> tuple[str, Config]:
    """The text of a `config.json`, and its fields.

    Raises:
        SourceError: It cannot be read, or is not a JSON object.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error}): the file is damaged, fetch or write it again") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds a JSON {type(config).__name__}, expected an object of config fields")
    return text, config


def _require_weights(folder: Path, model: str) -> None:
    """Refuse a folder without safetensors weights, or with an index that names files which are not there."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        missing = [name for name in _named_in(index) if not (folder / name).exists()]
        if missing:
            raise SourceError(listing(f"{index} names weight files that are not in the folder", missing))
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    found = (
        f"found only pickled weights ({', '.join(pickled[:4])}), which are never loaded" if pickled else "found none"
    )
    raise SourceError(
        f"{model} has no safetensors weights: {found} in {folder}. Save the model as safetensors, choose a revision "
        "that has them, or use --weights seeded, which needs the config alone"
    )


def _named_in(index: Path) -> set[str]:
    """The files that an index names. What else it says is held against them when they are read."""
    try:
        where = json.loads(index.read_text())["weight_map"].values()
        return {name for name in where if isinstance(name, str) and len(name) < 256 and "\0" not in name}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is no index with a weight_map ({error!r}): fetch or write it again") from None


def _unknown(model: str) -> SourceError:
    return SourceError(
        f"no model {model!r}{_near(model)}: there is no folder of that name here, no packaged config "
        f"({', '.join(PACKAGED)}), and it is not a hub id, which reads owner/name"
    )


def _near(model: str) -> str:
    """The packaged names and hub ids that look like `model`, in any case, for an error."""
    known = {name.casefold(): name for name in [*PACKAGED, *(repo for repo in PACKAGED.values() if repo)]}
    hint = near(model.casefold(), known)
    for lower, name in known.items():
        hint = hint.replace(f"'{lower}'", f"'{name}'")
    return hint


def _config_only(name: str) -> SourceError:
    what = f"{name} is a packaged config without a hub repository: its weights cannot be fetched"
    if name == "SmolLM2-135M":
        return SourceError(f"{what}. `python -m parity.smollm2` prepares them and prints their folder: give that")
    return SourceError(f"{what}. Give a folder that holds them, or use --weights seeded")


def _cached_config(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder in the local hub cache that holds the config of `repo`, or `None`."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        path = try_to_load_from_cache(repo, "config.json", revision=revision)
    except ValueError:  # not a valid repository id: the hub, asked later, says why
        return None
    return Path(path).parent if isinstance(path, str) else None


def _snapshot(repo: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    with _hub_errors(repo, revision, token=token is not None):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=_NEVER)
        )


@contextmanager
def _hub_errors(repo: str, revision: str | None, *, token: bool) -> Iterator[None]:
    """Turn whatever the hub's client raises into a `SourceError` that says what to do next.

    The client's exceptions are not chained: their frames hold the request's headers, and with them the token.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise SourceError(f"{repo} is on the hub, and huggingface_hub is not installed: pip install it") from None
    place = without_credentials(constants.ENDPOINT)
    asked = f"{repo}{f' at revision {revision!r}' if revision else ''} ({place}/{repo})"
    hint = "" if packaged(repo) else _near(repo)
    offline = "give a folder instead, or use --weights seeded, which needs the config alone"
    try:
        yield
        return
    except errors.GatedRepoError:
        known = "is not on its list" if token or _has_token() else "was not sent (none is set)"
        why = (
            f"access to {asked} is gated, and your token {known}. Accept the licence at {place}/{repo}, then set "
            "HF_TOKEN to a token of that account"
        )
    except errors.RevisionNotFoundError:
        why = f"{asked} does not exist: the repository does, the revision does not. Check its branches and tags"
    except errors.RepositoryNotFoundError:
        why = (
            f"no model {asked}{hint}: it does not exist, or it is private. Check the spelling, or set HF_TOKEN to a "
            "token that may read it"
        )
    except errors.HFValidationError as error:
        why = f"{repo!r} is not a hub id (owner/name): {without_credentials(str(error))}"
    except errors.LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            why = (
                f"{asked}{hint} is not, or not completely, in the local cache {constants.HF_HUB_CACHE}, and "
                f"HF_HUB_OFFLINE forbids fetching it. Unset it and run once online, or {offline}"
            )
        else:
            why = (
                f"cannot reach the hub for {asked}{hint}, and it is not in the local cache. Check the network, or "
                f"{offline}"
            )
    except errors.HfHubHTTPError as error:
        why = _http_status(asked, error)
    except OSError as error:
        why = f"cannot fetch {asked}: {type(error).__name__}: {without_credentials(str(error))[:200]}"
    except Exception as error:
        # The transport's own errors are of its library (requests or httpx), which is not ours to import.
        if not type(error).__module__.startswith(("httpx", "requests", "urllib3", "httpcore")):
            raise
        why = f"cannot reach the hub for {asked} ({type(error).__name__}). Check the network, or {offline}"
    raise SourceError(why) from None


def _http_status(asked: str, error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"the hub refuses your token for {asked} (HTTP {status}). Set HF_TOKEN to a valid one, or unset it"
    return f"the hub answered HTTP {status} for {asked}. Try again later, or give a folder instead"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(os.environ.get("HF_TOKEN") or get_token())
