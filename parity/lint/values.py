"""Rules on the numbers in the tensors; `--no-weights` leaves them out."""

from __future__ import annotations

from collections.abc import Iterator

from parity.lint.folder import EMBEDDING, HEAD, Folder, Unavailable
from parity.lint.rules import Remark, rule, some

BELOW_ZERO = 0.25
"""Share of the elements of a norm that are below zero, from which it looks centred on zero. Real models have single
norms like that (the first of SmolLM2-135M: 0.47), and not most."""
TINY = 2
"""Tensors of fewer elements are constant, or equal, by chance."""


@rule("non-finite", "no NaN and no infinity")
def non_finite(folder: Folder) -> Iterator[Remark]:
    found = {key: values for key, values in folder.scan.items() if values.nonfinite}
    if found:
        first = next(iter(found))
        yield Remark(
            severity="error",
            where=some([f"{key}{list(values.first)}" for key, values in found.items()], 2),
            expected="numbers",
            found=f"{sum(v.nonfinite for v in found.values()):,} NaN or Inf in {len(found)} tensors",
            advice=f"a model that holds them answers with NaN: look at the run that made {first}",
            items=tuple(
                f"{key}: {values.nonfinite}, the first at {list(values.first)}" for key, values in found.items()
            ),
        )


@rule("constant-tensors", "no weight or bias whose elements are all the same")
def constant_tensors(folder: Folder) -> Iterator[Remark]:
    named = folder.named
    flat = [key for key, values in folder.scan.items() if values.constant and folder.tensors[key].elements > TINY]
    flat = [key for key in flat if "norm" not in named.get(key, "")]
    weights = [key for key in flat if not key.endswith(".bias")]
    biases = [key for key in flat if key.endswith(".bias")]
    if weights:
        yield Remark(
            severity="error",
            where=some(weights),
            expected="weights that differ",
            found=f"{len(weights)} tensors whose elements all have one value",
            advice="nothing was copied into them: export again",
            items=tuple(weights),
        )
    if biases:
        yield Remark(
            severity="note",
            where=some(biases),
            expected="biases that were trained",
            found=f"{len(biases)} whose elements all have one value",
            advice="nothing if the model has none and its format wants them; otherwise they were lost",
            items=tuple(biases),
        )


@rule("constant-rows", "no matrix with rows of one value or columns of zeros, as a lost shard leaves them")
def constant_rows(folder: Folder) -> Iterator[Remark]:
    items = []
    for key, values in folder.scan.items():
        if values.constant or key in (EMBEDDING, HEAD):
            continue
        for kind, places in (("rows of one value", values.constant_rows), ("columns of zeros", values.zero_columns)):
            if places:
                items.append(f"{key}: {len(places)} {kind}, {places[0]} to {places[-1]}")
    if items:
        yield Remark(
            severity="warning",
            where=items[0].partition(":")[0],
            expected="rows and columns that differ",
            found=some(items, 2),
            advice="a shard of a tensor-parallel rank, or padding, that was left at zero: export again",
            items=tuple(items),
        )


@rule("equal-rows", "rows of the embedding and of the head are trained, each on its own")
def equal_rows(folder: Folder) -> Iterator[Remark]:
    try:
        reached = set(folder.tokens.values())
    except Unavailable:
        reached = set()
    for key in (EMBEDDING, HEAD):
        values = folder.scan.get(key)
        if values is None or values.constant:
            continue
        flat, again = set(values.constant_rows), set(values.repeated_rows)
        lost = sorted(flat & reached)
        if flat | again:
            yield Remark(
                severity="warning" if lost else "note",
                where=key,
                expected="as many different rows as there are rows",
                found=f"{len(flat):,} of one value, {len(lost):,} of them of tokens; "
                f"{len(again):,} equal to an earlier one",
                advice="a token whose row is zero was lost: export again"
                if lost
                else "nothing: rows that were never trained, reserved tokens or padding",
                items=tuple(str(row) for row in sorted(flat | again)),
            )


@rule("duplicate-tensors", "no two tensors with the same bytes, but for a tied head")
def duplicate_tensors(folder: Folder) -> Iterator[Remark]:
    by: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, values in folder.scan.items():
        if not values.constant and folder.tensors[key].elements > TINY:
            by.setdefault((values.digest, folder.tensors[key].shape), []).append(key)
    groups = [keys for keys in by.values() if len(keys) > 1 and set(keys) != {EMBEDDING, HEAD}]
    if groups:
        yield Remark(
            severity="warning",
            where=some(groups[0], 2),
            expected="tensors that differ",
            found=f"{sum(map(len, groups)):,} tensors, of {len(groups):,} different contents",
            advice="a layer that was written twice, at the boundary of a pipeline stage or of a shard: export again",
            items=tuple(" = ".join(keys) for keys in groups),
        )


@rule("norm-ones", "no norm whose weights are all the same, as before training")
def norm_ones(folder: Folder) -> Iterator[Remark]:
    norms = _norms(folder)
    flat = [key for key in norms if folder.scan[key].constant]
    if flat:
        yield Remark(
            severity="warning",
            where=some(flat),
            expected="norms that were trained",
            found=f"{len(flat)} of {len(norms)} whose weights all have one value",
            advice="left at their initial values, nothing was copied into them: export again",
            items=tuple(flat),
        )


@rule("norm-negative", "norms are centred on one, not on zero")
def norm_negative(folder: Folder) -> Iterator[Remark]:
    norms = [key for key in _norms(folder) if not folder.scan[key].constant]
    low = [key for key in norms if folder.scan[key].negative >= BELOW_ZERO * folder.tensors[key].elements]
    if len(low) * 2 > len(norms):
        yield Remark(
            severity="warning",
            where=some(low),
            expected="most weights of most norms above zero",
            found=f"{len(low)} of {len(norms)} norms with at least {BELOW_ZERO:.0%} of their weights below",
            advice="trained as an offset from one (Megatron's layernorm_zero_centered_gamma) and not shifted back",
            items=tuple(low),
        )


def _norms(folder: Folder) -> list[str]:
    """The keys of norms, by the family's table."""
    return [key for key, rule in folder.named.items() if "norm" in rule and key in folder.scan]
