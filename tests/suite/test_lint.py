"""`parity lint`: a good folder has nothing said of it, and each way of breaking it is named by its rule alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converters.sources import read_config
from parity.__main__ import main
from parity.cache import cache_root
from parity.lint.run import Linted, lint, rules
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.1."
Break = Callable[[Path], Any]
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which no rule has anything to say: a token for each row, one set of stop tokens, a licence."""
    folder = write_checkpoint(with_layers(odd_config(), 2), tmp_path_factory.mktemp("lint") / "odd", shards=2)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"row{row}": row for row in range(509) if row not in set(vocab.values())}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "LICENSE").write_text("as you like")
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


@pytest.fixture
def good(original: Path, tmp_path: Path) -> Path:
    folder: Path = shutil.copytree(original, tmp_path / "odd")
    return folder


def fields(name: str, **changes: Any) -> Break:
    """Set fields of a JSON file; `None` removes one."""

    def change(folder: Path) -> None:
        held = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return change


def config(**changes: Any) -> Break:
    return fields("config.json", **changes)


def generation(**changes: Any) -> Break:
    return fields("generation_config.json", **changes)


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def removed(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*breaks: Break) -> Break:
    return lambda folder: [step(folder) for step in breaks]


def tensors(change: Callable[[Tensors], Any]) -> Break:
    """Rewrite every shard after a change, with an index that agrees."""

    def rewrite(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        first, *_ = shards = sorted(set(index["weight_map"].values()))
        held = {key: values for name in shards for key, values in load_file(folder / name).items()}
        change(held)
        where = {key: index["weight_map"].get(key, first) for key in held}
        for name in shards:
            mine = {key: np.ascontiguousarray(held[key]) for key in held if where[key] == name}
            save_file(mine, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)  # which the library makes its user's alone
        total = sum(values.nbytes for values in held.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))

    return rewrite


def put(key: str, where: Any, value: Any) -> Break:
    return tensors(lambda held: held[key].__setitem__(where, value))


def shard(change: Callable[[bytes], bytes]) -> Break:
    """Change the bytes of the first shard."""

    def rewrite(folder: Path) -> None:
        path = min(folder.glob("*.safetensors"))
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def index(change: Callable[[dict[str, Any]], Any]) -> Break:
    def rewrite(folder: Path) -> None:
        held = json.loads((folder / INDEX).read_text())
        change(held)
        (folder / INDEX).write_text(json.dumps(held))

    return rewrite


def overlapping(held: bytes) -> bytes:
    size = int.from_bytes(held[:8], "little")
    header = json.loads(held[8 : 8 + size])
    keys = sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    one, two = next(pair for pair in pairwise(keys) if _same_size(header, *pair))
    header[two]["data_offsets"] = header[one]["data_offsets"]
    said = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    return held[:8] + said + held[8 + size :]


def _same_size(header: dict[str, Any], one: str, two: str) -> bool:
    left, right = (np.ptp(header[key]["data_offsets"]) for key in (one, two))
    return bool(left == right)


def vocabulary(change: Callable[[dict[str, int]], Any]) -> Break:
    def rewrite(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        change(held["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(held))

    return rewrite


def norms(change: Callable[[np.ndarray], np.ndarray]) -> Break:
    return tensors(lambda held: held.update({key: change(held[key]) for key in held if "norm" in key}))


def halves(held: Tensors) -> None:
    held.update({key: values.astype(np.float16) for key, values in held.items()})


SCALING = odd_config()["rope_scaling"]
THETA = odd_config()["rope_theta"]
MODERN = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**SCALING, "rope_theta": THETA}}
Q, K, UP, O_PROJ = (
    LAYER + name for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "self_attn.o_proj")
)

CASES: dict[str, list[tuple[str, str, Break]]] = {
    "json": [
        ("no JSON", "error", text("quantize.json", "{")),
        ("a key twice", "error", text("extra.json", '{"a": 1, "a": 2}')),
        ("deep", "error", text("deep.json", "[" * 100_000)),
        ("no UTF-8", "error", lambda folder: (folder / "extra.json").write_bytes(b'"\xff"')),
    ],
    "config": [("lost", "error", removed("config.json")), ("a list", "error", text("config.json", "[]"))],
    "architectures": [
        ("model_type", "error", config(model_type="mixtral")),
        ("class", "error", config(architectures=["MistralForCausalLM"])),
        ("none", "error", config(architectures=None)),
    ],
    "config-fields": [
        ("unknown", "error", config(rms_norm_epsilon=1e-5)),
        ("value", "error", config(sliding_window=4096)),
        ("sizes", "error", config(num_key_value_heads=4)),
        ("no end", "error", config(num_hidden_layers=10**6)),
    ],
    "rope-spellings": [
        ("theta", "error", config(rope_parameters={**SCALING, "rope_theta": 1e4})),
        ("factor", "error", config(rope_parameters={**SCALING, "factor": 8.0, "rope_theta": THETA})),
        ("scaling lost", "error", config(rope_parameters={"rope_type": "default", "rope_theta": THETA})),
        ("only transformers 5", "warning", config(**MODERN)),
        ("written by 4", "warning", config(**MODERN, transformers_version="4.57.3")),
        ("written by it", "note", config(**MODERN, transformers_version="5.23.0")),
    ],
    "permissions": [
        ("unreadable", "warning", lambda folder: (folder / "config.json").chmod(0o600)),
        ("writable", "warning", lambda folder: (folder / "config.json").chmod(0o666)),
    ],
    "links": [
        ("outside", "error", lambda folder: (folder / "NOTICE").symlink_to("/etc/hostname")),
        ("nowhere", "error", lambda folder: (folder / "NOTICE").symlink_to("gone")),
    ],
    "pickles": [("training_args", "warning", text("training_args.bin", ""))],
    "code": [
        ("python", "warning", text("modeling.py", "")),
        ("auto_map", "warning", config(auto_map={"AutoModel": "modeling.Model"})),
    ],
    "leftovers": [
        ("inside", "warning", text("model.safetensors.partial", "")),
        ("beside", "warning", lambda folder: (folder.parent / f".{folder.name}.partial").mkdir()),
    ],
    "license": [("lost", "note", removed("LICENSE"))],
    "chat-template-twice": [("jinja", "error", text("chat_template.jinja", "{{ messages }}"))],
    "chat-template-syntax": [
        ("unclosed", "error", fields("tokenizer_config.json", chat_template="{% for m in messages %}")),
        ("named", "error", lambda folder: _named_template(folder, "{{ messages")),
    ],
    "chat-template-tokens": [
        ("another model's", "warning", fields("tokenizer_config.json", chat_template="<|im_start|>{{ messages }}"))
    ],
    "tokenizer": [
        ("lost", "warning", removed("tokenizer.json", "tokenizer_config.json")),
        ("settings lost", "warning", removed("tokenizer_config.json")),
    ],
    "vocabulary": [("beyond", "error", vocabulary(lambda held: held.update({"new": 509})))],
    "unused-rows": [("one", "note", vocabulary(lambda held: held.pop("row300")))],
    "token-range": [
        ("beyond", "error", both(config(eos_token_id=[505, 501, 509]), generation(eos_token_id=[505, 501, 509]))),
        ("no padding", "warning", config(pad_token_id=-1)),
    ],
    "generation-config": [
        ("lost", "note", removed("generation_config.json")),
        ("a list", "error", text("generation_config.json", "[]")),
    ],
    "eos-lists": [
        ("several become one", "error", generation(eos_token_id=505)),
        ("never stops", "error", generation(eos_token_id=None)),
        ("disagree", "error", generation(eos_token_id=[505, 17])),
        ("config has one", "warning", config(eos_token_id=505)),
        ("config has none", "note", config(eos_token_id=None)),
    ],
    "special-tokens": [
        ("no token", "error", fields("tokenizer_config.json", bos_token="<s>")),
        ("bos", "warning", fields("tokenizer_config.json", bos_token="<eos>")),
        ("eos", "warning", fields("tokenizer_config.json", eos_token={"content": "<bos>"})),
        ("pad", "warning", generation(pad_token_id=498)),
    ],
    "weight-files": [
        ("truncated", "error", shard(lambda held: held[:-4])),
        ("overlapping", "error", shard(overlapping)),
        (
            "index promises a key",
            "error",
            index(lambda held: held["weight_map"].update(x=min(held["weight_map"].values()))),
        ),
        ("index lacks a key", "error", index(lambda held: held["weight_map"].pop(UP + ".weight"))),
        ("shard lost", "error", lambda folder: min(folder.glob("*.safetensors")).unlink()),
        ("no index", "error", removed(INDEX)),
        ("outside", "error", index(lambda held: held["weight_map"].update(x="../x.safetensors"))),
    ],
    "stray-weights": [("another", "error", text("model-00009-of-00009.safetensors", ""))],
    "index-totals": [
        ("size", "error", index(lambda held: held["metadata"].update(total_size=1))),
        ("parameters", "error", index(lambda held: held["metadata"].update(total_parameters=1))),
        ("none", "warning", index(lambda held: held.pop("metadata"))),
    ],
    "missing-tensors": [
        ("a layer", "error", tensors(lambda held: [held.pop(key) for key in list(held) if key.startswith(LAYER)])),
    ],
    "unknown-tensors": [
        ("one more", "error", tensors(lambda held: held.update({LAYER + "extra": np.arange(9, dtype=np.float32)}))),
    ],
    "tensor-shapes": [("ffn", "error", config(intermediate_size=436))],
    "tied-head": [
        ("head ignored", "error", config(tie_word_embeddings=True)),
        ("head lost", "error", tensors(lambda held: held.pop(HEAD))),
        (
            "a copy",
            "note",
            both(tensors(lambda held: held.update({HEAD: held[EMBEDDING]})), config(tie_word_embeddings=True)),
        ),
    ],
    "dtype": [
        ("other", "error", config(torch_dtype="bfloat16")),
        ("two", "error", config(dtype="bfloat16")),
        ("none", "warning", both(tensors(halves), config(torch_dtype=None))),
    ],
    "mixed-dtypes": [
        ("one", "warning", tensors(lambda held: held.update({Q + ".weight": held[Q + ".weight"].astype(np.float16)})))
    ],
    "non-finite": [
        ("nan", "error", put(UP + ".weight", (3, 4), np.nan)),
        ("-inf", "error", put(UP + ".weight", (3, 4), -np.inf)),
    ],
    "constant-tensors": [
        ("k", "error", put(K + ".weight", ..., 0)),
        ("bias", "note", put(K + ".bias", ..., 0)),
    ],
    "constant-rows": [
        ("last shard, rows", "warning", put(UP + ".weight", slice(218, None), 0)),
        ("last shard, columns", "warning", put(O_PROJ + ".weight", np.s_[:, 180:], -0.0)),
    ],
    "equal-rows": [
        ("zero", "warning", put(EMBEDDING, 7, 0)),
        ("twice", "note", tensors(lambda held: held[HEAD].__setitem__(7, held[HEAD][8]))),
    ],
    "duplicate-tensors": [
        (
            "layer",
            "warning",
            tensors(lambda held: held.update({Q + ".weight": held[(Q + ".weight").replace("1", "0")]})),
        )
    ],
    "norm-ones": [("all", "warning", norms(np.ones_like))],
    "norm-negative": [("not shifted back", "warning", norms(lambda held: held - 1))],
}


def _named_template(folder: Path, template: str) -> None:
    (folder / "additional_chat_templates").mkdir(mode=0o755)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template)


def said(found: Linted) -> set[tuple[str, str]]:
    return {(remark.rule, remark.severity) for remark in found.remarks}


def test_every_rule_has_a_case_and_tells_what_it_looks_at() -> None:
    assert {*CASES, "loads"} == {*rules()}
    assert all(rule.about and len(rule.about) < 120 for rule in rules().values())


def test_nothing_is_said_of_a_good_folder(good: Path) -> None:
    found = lint(good, loading=False)
    assert not found.remarks, found.remarks
    assert found.skipped == {"loads": "--no-load"}
    assert {*found.clean} == {*rules()} - {"loads"}


@pytest.mark.parametrize(
    ("rule", "severity", "breaks"),
    [pytest.param(rule, *case[1:], id=f"{rule}-{case[0]}") for rule, cases in CASES.items() for case in cases],
)
def test_one_rule_names_what_is_wrong(rule: str, severity: str, breaks: Break, good: Path) -> None:
    breaks(good)
    found = lint(good, loading=False)
    assert said(found) == {(rule, severity)}, found.remarks
    assert all(remark.where and remark.expected and remark.found and remark.advice for remark in found.remarks)
    assert found.passed() == (severity != "error")
    assert found.passed(strict=True) == (severity == "note")
    ignoring = lint(good, ignore=[rule], loading=False)
    assert not ignoring.remarks
    assert ignoring.ignored == (rule,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (generation(eos_token_id=505), "goes on past 501"),
        (generation(eos_token_id=None), "never stops"),
        (generation(eos_token_id=[505, 17]), "disagree on where to stop"),
        (config(eos_token_id=505), "read only config.json go on past 501"),
    ],
)
def test_what_stop_tokens_mean_to_each_loader_is_said(change: Break, said: str, good: Path) -> None:
    change(good)
    (remark,) = lint(good, loading=False).remarks
    assert said in remark.found


def test_rules_that_cannot_look_say_why(good: Path) -> None:
    put(UP + ".weight", (3, 4), np.nan)(good)
    headers = lint(good, weights=False, loading=False)
    assert not headers.remarks
    assert headers.skipped["non-finite"] == "--no-weights"
    shard(lambda held: held[:-4])(good)
    config(vocab_size=0)(good)
    found = lint(good, loading=False)
    assert {"tensor-shapes", "non-finite", "index-totals"} <= set(found.skipped)
    assert "weight-files" in found.skipped["non-finite"]


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-2-7b-hf", "SmolLM2-135M"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packaged_models_have_one_thing_to_warn_of(name: str, dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(with_layers(shrink(read_config(name)), 2), tmp_path / "made", dtype=dtype)
    found = lint(folder, loading=False)
    # They are made with one stop token in config.json and two in generation_config.json.
    assert {pair for pair in said(found) if pair[1] != "note"} == {("eos-lists", "warning")}, found.remarks


def test_real_weights_lint_clean() -> None:
    folders = sorted(cache_root(None).glob("smollm2-135m-*/config.json"))
    if not folders:
        pytest.skip("SmolLM2-135M is not in the cache: python -m parity check smollm2-135m puts it there")
    found = lint(folders[-1].parent, loading=False)
    assert {remark.severity for remark in found.remarks} <= {"note"}, found.remarks


def test_transformers_loads_it(good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    status = main(["lint", str(good), "--strict", "--json", str(tmp_path / "said.json")])
    printed = capsys.readouterr()
    assert status == 0, printed
    assert f"{good}: nothing to say; {len(rules())} rules hold, 0 not asked" in printed.out
    written = json.loads((tmp_path / "said.json").read_text())
    assert written["summary"] == {"error": 0, "warning": 0, "note": 0}
    assert "loads" in written["clean"]


def test_what_transformers_cannot_load_is_said(good: Path) -> None:
    pytest.importorskip("transformers")
    config(intermediate_size=436, num_hidden_layers=3)(good)
    fields("tokenizer.json", model={"type": "BPE"})(good)
    generation(max_new_tokens=-1)(good)
    found = [(remark.where, remark.found) for remark in lint(good).remarks if remark.rule == "loads"]
    for where, said in (
        ("AutoModelForCausalLM", "tensors that the model has, and the folder lacks: model.layers.2."),
        ("AutoModelForCausalLM", "of another shape"),
        ("AutoTokenizer", "vocab"),
        ("GenerationConfig", "max_new_tokens"),
    ):
        assert any(where == at and said in text for at, text in found), found


def test_wrong_usage_and_the_list_of_rules(good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--ignore", "tied-heads", str(good)], [str(tmp_path / "nowhere")], []):
        assert main(["lint", *arguments]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'tied-head'" in said
    assert "nowhere" in said
    assert main(["lint", "--rules"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in rules())


def test_the_command_fails_and_says_everything(good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config(torch_dtype="bfloat16")(good)
    (good / "LICENSE").unlink()
    out = tmp_path / "said.json"
    assert main(["lint", str(good), "--no-load", "--json", str(out)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    for part in ("error dtype", "config.json: torch_dtype", "as the weights are", "1 error, 1 note", "--no-load"):
        assert part in text, text
    assert [remark["rule"] for remark in json.loads(out.read_text())["remarks"]] == ["dtype", "license"]
    assert main(["lint", str(good), "--no-load", "--ignore", "dtype,license"]) == 0
    assert "ignored: dtype, license" in capsys.readouterr().out


def paths(held: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = held.items() if isinstance(held, dict) else enumerate(held[:3]) if isinstance(held, list) else ()
    return [at, *(path for key, value in list(inner)[:40] for path in paths(value, (*at, key)))]


ODD = st.sampled_from([None, True, -1, 2**70, 0.5, float("nan"), "", "\x00", [], [[1]], {}, {"a": [{}]}, ["x", None]])


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_files_hold_it_is_said_and_nothing_breaks(data: st.DataObject, good: Path) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in good.glob("*.json"))))
    text = (good / name).read_text()
    try:
        held = json.loads(text)
        *parents, last = data.draw(st.sampled_from(paths(held)[1:]))
        at = held
        for step in parents:
            at = at[step]
        at[last] = data.draw(ODD)
        (good / name).write_text(json.dumps(held))
        found = lint(good, loading=False)
        json.dumps(found.as_json())
    finally:
        (good / name).write_text(text)
