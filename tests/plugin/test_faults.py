"""The fault catalogue: every fault is real, named, and changes what it says; what has an inverse is undone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from parity.causes import Cause
from parity.converter import Own
from parity.faults.catalogue import FAMILIES, NEEDS, NOT_YET, Fault, all_faults
from parity.faults.drafts import Draft, Scene
from parity.faults.fp8_folders import CHANGES, change
from parity.faults.mutate import apply
from parity.faults.mutations import ConfigField, Live, Patch, Quantised, Reorder
from parity.faults.on_te import ON_TE
from parity.faults.patches import PATCHES
from parity.faults.te_patches import PATCHES as TE_PATCHES
from parity.folders import read
from parity.observation.fp8_folders import tensors
from parity.selftest.models import Stock, packaged
from parity.selftest.run import Variant, variants
from parity.statement.fp8 import FORMATS, differences

FAULTS = all_faults()


@pytest.fixture(scope="module")
def stock() -> Stock:
    return packaged()


@pytest.fixture(scope="module")
def drafts(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Draft]]:
    """Each model's checkpoint, as a folder and as a draft."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: stock.make(name, folder / name, 0).folder for name in stock.configs}
    return {name: (path, Draft(path)) for name, path in made.items()}


def scene(variant: Variant, stock: Stock, source: Path) -> Scene:
    config = stock.configs[variant.bed.model]
    layers = variant.layers or tuple(range(config["num_hidden_layers"]))
    topology = variant.bed.topology.evenly(config["num_hidden_layers"])
    return Scene(config=config, topology=topology, layers=layers, source=source)


def on_folders(stock: Stock) -> Iterator[Variant]:
    """One variant a fault and scope, of faults that are of folders."""
    for variant in variants(stock=stock, seeds=0):
        if variant.fault is None:  # a clean run on each bed
            continue
        if variant.at == variant.fault.at[0] and not isinstance(variant.fault.does[0], Live | Patch | Quantised):
            yield variant


def test_the_catalogue_is_large_and_its_names_are_unique() -> None:
    assert len(FAULTS) >= 140
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.family for fault in FAULTS} == set(FAMILIES)
    assert all(fault.source and set(fault.needs) <= set(NEEDS) for fault in FAULTS)
    assert NOT_YET


def test_every_fault_has_a_place(stock: Stock) -> None:
    placed = {variant.fault.name for variant in variants(stock=stock, seeds=0) if variant.fault is not None}
    assert placed == {fault.name for fault in FAULTS}


def test_every_patch_is_in_the_catalogue() -> None:
    used = {mutation.name for fault in FAULTS for mutation in fault.does if isinstance(mutation, Patch)}
    assert used == set(PATCHES) | set(TE_PATCHES)


def test_a_patch_is_of_the_backends_that_it_is_tried_on() -> None:
    patches = {"megatron": PATCHES, "te": TE_PATCHES}
    for fault in FAULTS:
        for mutation in fault.does:
            if isinstance(mutation, Patch):
                assert all(mutation.name in patches[backend] for backend in fault.backends), fault.name
    assert {fault.name for fault in FAULTS} >= ON_TE


def test_every_fault_is_tried_on_each_of_its_backends_and_precisions(stock: Stock) -> None:
    placed: dict[str, set[tuple[str, str]]] = {}
    for variant in variants(stock=stock, seeds=0):
        if variant.fault is not None:
            there = placed.setdefault(variant.fault.name, set())
            there.add((variant.bed.backend, variant.bed.precision if variant.fault.precisions else ""))
    for fault in FAULTS:
        wanted = {(backend, precision) for backend in fault.backends for precision in fault.precisions or ("",)}
        assert placed[fault.name] == wanted, fault.name


def test_the_statement_of_fp8_sees_every_change_of_a_folder(
    drafts: dict[str, tuple[Path, Draft]], tmp_path: Path
) -> None:
    """And nothing where nothing was changed."""
    source = drafts["aligned"][0]
    for scheme, form in FORMATS.items():
        target = tmp_path / scheme
        Own().quantize(source, target, scheme)
        config = json.loads((target / "config.json").read_text())
        assert not differences(read(source), tensors(target), config, form)
    used = [one for fault in FAULTS for one in fault.does if isinstance(one, Quantised)]
    assert {one.how for one in used} == set(CHANGES)
    for one in used:
        target = tmp_path / "changed"
        shutil.copytree(tmp_path / one.scheme, target)
        change(one.how, source, target)
        config = json.loads((target / "config.json").read_text())
        assert differences(read(source), tensors(target), config, FORMATS[one.scheme]), one
        shutil.rmtree(target)


def test_every_fault_changes_something_and_its_inverse_undoes_it(
    stock: Stock, drafts: dict[str, tuple[Path, Draft]]
) -> None:
    idle, kept = [], []
    for variant in on_folders(stock):
        fault = variant.fault
        assert fault is not None
        source, clean = drafts[variant.bed.model]
        where, draft = scene(variant, stock, source), clean.copy()
        for mutation in fault.does:
            apply(mutation, draft, where)
        if draft.same(clean) and not fault.equivalent:
            idle.append(variant.id)
        if "cancel" in fault.at:
            for mutation in fault.mutations("cancel")[1]:
                apply(mutation, draft, where)
            if not draft.same(clean):
                kept.append(variant.id)
    assert not idle
    assert not kept


def test_an_unchanged_draft_is_written_as_it_was_read(drafts: dict[str, tuple[Path, Draft]], tmp_path: Path) -> None:
    for name, (source, draft) in drafts.items():
        draft.write(tmp_path / name)
        written = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert written == {path.name: path.read_bytes() for path in source.iterdir()}


def test_one_layer_alone_is_touched(stock: Stock, drafts: dict[str, tuple[Path, Draft]]) -> None:
    for variant in on_folders(stock):
        if not variant.layers:
            continue
        assert variant.fault is not None
        source, clean = drafts[variant.bed.model]
        draft = clean.copy()
        for mutation in variant.fault.does:
            apply(mutation, draft, scene(variant, stock, source))
        differing = {key for key, tensor in draft.tensors.items() if tensor is not clean.tensors.get(key)}
        differing |= set(clean.tensors) - set(draft.tensors)
        assert differing, variant.id
        assert all(key.startswith(f"model.layers.{variant.layers[0]}.") for key in differing), variant.id


def test_a_reorder_is_what_its_expressions_say(stock: Stock, drafts: dict[str, tuple[Path, Draft]]) -> None:
    """Against a plain reshape: heads that lie rep by group, taken for group by rep."""
    variant = next(v for v in on_folders(stock) if v.fault and v.fault.name == "query heads not group by group")
    source, clean = drafts[variant.bed.model]
    where, draft = scene(variant, stock, source), clean.copy()
    apply(Reorder(("self_attn.q_proj",), "rows", written="(group rep dim)", read="(rep group dim)"), draft, where)
    sizes, key = where.sizes, "model.layers.0.self_attn.q_proj.weight"
    before = clean.tensors[key].view(sizes["group"], sizes["rep"], sizes["dim"], -1)
    assert draft.tensors[key].equal(before.transpose(0, 1).reshape(clean.tensors[key].shape))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "cancel" in fault.at], ids=lambda fault: fault.name)
def test_what_cancels_is_wrong_on_both_sides(fault: Fault) -> None:
    there, back = fault.mutations("cancel")
    assert there == fault.does
    assert len(back) == len(there)


def test_config_faults_name_the_field() -> None:
    for fault in FAULTS:
        for mutation in fault.does:
            if isinstance(mutation, ConfigField):
                name = mutation.field.replace("rope.", "rope_scaling.").replace("torch_dtype", "dtype")
                wanted = Cause(kind="config", what=("rope_scaling",) if name == "rope" else (name,))
                assert any(wanted.names(cause) for cause in fault.causes), fault.name
