"""Rules on weight files: the index, the shards, their headers, and what the config promises of them."""

from __future__ import annotations

from collections.abc import Iterator

from converters.errors import CheckpointError
from converters.tensors import FLOATS
from parity.lint.folder import EMBEDDING, HEAD, INDEX, SINGLE, Folder, Unavailable
from parity.lint.rules import Remark, rule, some

AGAIN = "export again, or fetch the files again"


@rule("weight-files", "index against shards against headers: keys, offsets, overlaps, holes, sizes, paths")
def weight_files(folder: Folder) -> Iterator[Remark]:
    try:
        _ = folder.files
    except CheckpointError as error:
        first, *problems = str(error).splitlines()
        for problem in problems or [first]:
            yield Remark(
                severity="error",
                where="weights",
                expected="an index, shards and headers that agree, and every byte of a shard in one tensor",
                found=problem.strip().removeprefix(f"{folder.path}: "),
                advice=AGAIN,
            )


@rule("stray-weights", "no safetensors file beside those that belong to the checkpoint")
def stray_weights(folder: Folder) -> Iterator[Remark]:
    if folder.has(INDEX):
        index = folder.object(INDEX) or {}
        named = index.get("weight_map")
        if not isinstance(named, dict):
            raise Unavailable(f"{INDEX} has no weight_map (rule weight-files)")
        belong = {str(file) for file in named.values()}
    else:
        belong = {SINGLE}
    # One that is called as a checkpoint of a single file is a contradiction, and weight-files says so.
    ours = belong | ({SINGLE} if folder.has(INDEX) else set())
    strays = [path.name for path in folder.entries if path.suffix == ".safetensors" and len(path.parts) == 1]
    strays = [name for name in strays if name not in ours]
    if strays and (folder.has(INDEX) or folder.has(SINGLE)):
        yield Remark(
            severity="error",
            where=some(strays),
            expected=f"no safetensors file but {some(sorted(belong))}",
            found=f"{len(strays)} that no index names",
            advice="remove what is stale; if its tensors are missing from the index, export again",
            items=tuple(strays),
        )


@rule("index-totals", "total_size and total_parameters of the index are what the shards hold")
def index_totals(folder: Folder) -> Iterator[Remark]:
    index = folder.object(INDEX)
    if index is None:
        return  # one file, which needs none
    metadata = index.get("metadata")
    tensors = folder.tensors
    if not isinstance(metadata, dict):
        metadata = {}
    sizes = [sum(info.nbytes for info in tensors.values())]
    counts = [sum(info.elements for info in tensors.values())]
    if HEAD in tensors and folder.config.get("tie_word_embeddings"):
        counts.append(counts[0] - tensors[HEAD].elements)  # a tied head is no parameter of its own
    for name, right, needed in (("total_size", sizes, True), ("total_parameters", counts, False)):
        found = metadata.get(name)
        if (found is None and needed) or (found is not None and found not in right):
            yield Remark(
                severity="error" if found is not None else "warning",
                where=f"{INDEX}: metadata.{name}",
                expected=" or ".join(f"{value:,}" for value in right),
                found="nothing" if found is None else repr(found),
                advice="set it right: loaders plan their memory by it; a wrong one often means that a shard is stale",
            )


@rule("missing-tensors", "every tensor that the config promises is there")
def missing_tensors(folder: Folder) -> Iterator[Remark]:
    promised = folder.plan.source_tensors
    missing = [key for key in promised if key not in folder.tensors and key != HEAD]
    if missing:
        yield Remark(
            severity="error",
            where="weights",
            expected=f"the {len(promised)} tensors of this config",
            found=f"{len(missing)} missing: {some(missing)}",
            advice="a loader would leave them at random values: export again, or correct the sizes in config.json",
            items=tuple(missing),
        )


@rule("unknown-tensors", "no tensor that this architecture does not have")
def unknown_tensors(folder: Folder) -> Iterator[Remark]:
    promised = folder.plan.source_tensors
    unknown = [key for key in folder.tensors if key not in promised]
    if unknown:
        yield Remark(
            severity="error",
            where="weights",
            expected=f"the {len(promised)} tensors of this config and no others",
            found=f"{len(unknown)} that no row of the {folder.family.name} table names: {some(unknown)}",
            advice="a loader drops them: rename them, or correct config.json (layers, biases)",
            items=tuple(unknown),
        )


@rule("tensor-shapes", "every tensor has the shape that the config gives it")
def tensor_shapes(folder: Folder) -> Iterator[Remark]:
    wrong = {
        key: (shape, folder.tensors[key].shape)
        for key, shape in folder.plan.source_tensors.items()
        if key in folder.tensors and tuple(folder.tensors[key].shape) != tuple(shape)
    }
    items = [f"{key}: expected {list(right)}, found {list(found)}" for key, (right, found) in wrong.items()]
    if items:
        first = next(iter(wrong))
        yield Remark(
            severity="error",
            where=some(list(wrong), 2),
            expected=f"{list(wrong[first][0])} for {first}",
            found=f"{list(wrong[first][1])}; {len(wrong)} tensors of another shape",
            advice="correct the size in config.json (vocab_size, head_dim, ...) or export again",
            items=tuple(items),
        )


@rule("tied-head", "tie_word_embeddings and lm_head.weight go together")
def tied_head(folder: Folder) -> Iterator[Remark]:
    tied, tensors = bool(folder.hf["tie_word_embeddings"]), folder.tensors
    where = "config.json: tie_word_embeddings"
    if not tied and HEAD not in tensors:
        said = "says false" if "tie_word_embeddings" in folder.config else "is absent, which is false"
        yield Remark(
            severity="error",
            where=where,
            expected=f"{HEAD} in the weights, or a flag that says true",
            found=f"the flag {said}, and there is no {HEAD}",
            advice="set the flag if the head is the embedding; otherwise the head was lost: export again",
        )
    if tied and HEAD in tensors:
        head, embedding = folder.scan.get(HEAD), folder.scan.get(EMBEDDING)
        equal = head is not None and embedding is not None and head.digest == embedding.digest
        yield Remark(
            severity="note" if equal else "error",
            where=where,
            expected=f"no {HEAD}, or the very numbers of {EMBEDDING}",
            found=f"the flag says true, and {HEAD} is stored" + ("; it is the embedding" if equal else ", another one"),
            advice="nothing: it is a copy"
            if equal
            else "transformers ignores the stored head: clear the flag to use it",
        )


@rule("dtype", "the config's dtype is that of the weights")
def dtype(folder: Folder) -> Iterator[Remark]:
    said = {name: folder.config[name] for name in ("dtype", "torch_dtype") if folder.config.get(name) is not None}
    if len(set(map(str, said.values()))) > 1:
        yield Remark(
            severity="error",
            where="config.json: dtype, torch_dtype",
            expected="one dtype in both spellings",
            found=", ".join(f"{name}={value!r}" for name, value in said.items()),
            advice="transformers 5 writes dtype, 4 reads torch_dtype: set both alike, or keep one",
        )
        return
    if folder.quantized:
        raise Unavailable("the weights are quantised")
    held = sorted({info.dtype for info in folder.tensors.values()} & FLOATS)
    value = next(iter(said.values()), None)
    if value is None and held not in ([], ["float32"]):
        yield Remark(
            severity="warning",
            where="config.json: dtype",
            expected=f"dtype {' or '.join(map(repr, held))}",
            found="no dtype; transformers 4 loads the weights as float32",
            advice="add dtype (and torch_dtype, for transformers 4)",
        )
    elif value is not None and held and str(value).removeprefix("torch.") not in held:
        yield Remark(
            severity="error",
            where=f"config.json: {next(iter(said))}",
            expected=" or ".join(map(repr, held)) + ", as the weights are",
            found=repr(value),
            advice="set it to the dtype of the weights: a loader casts to what it says",
        )


@rule("mixed-dtypes", "all weights are of one dtype")
def mixed_dtypes(folder: Folder) -> Iterator[Remark]:
    if folder.quantized:
        raise Unavailable("the weights are quantised")
    by: dict[str, list[str]] = {}
    for key, info in folder.tensors.items():
        by.setdefault(info.dtype, []).append(key)
    most = max(by.values(), key=len, default=[])
    odd = {name: keys for name, keys in by.items() if keys is not most}
    if odd:
        yield Remark(
            severity="warning",
            where=some([key for keys in odd.values() for key in keys], 2),
            expected=f"one dtype; {len(most)} tensors are {folder.tensors[most[0]].dtype}",
            found="; ".join(f"{len(keys)} {name}: {some(keys, 2)}" for name, keys in odd.items()),
            advice="a loader casts all to one dtype, and what was kept wider is rounded: see that this is meant",
            items=tuple(key for keys in odd.values() for key in keys),
        )
