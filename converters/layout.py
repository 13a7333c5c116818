"""A layout: where the elements of one format lie, as a key template over dims.

    model.layers.{layer}.self_attn.q_proj.weight: (group rep q dim) hidden
    decoder.layers.{layer/pp}.self_attention.linear_qkv.weight: (group [(rep q) k v] dim)/tp hidden
    embedding.word_embeddings.weight @first: [vocab (zero pad)]/tp hidden

Braces hold an expression of the same grammar whose position is the number in the key. `@first`, `@last` and
`@last-not-first` place a tensor on a pipeline stage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from converters import axes
from converters.axes import Box, Expr, Product
from converters.errors import LayoutError
from converters.topology import STAGES, Mesh

PATTERN = re.compile(r"^(?P<key>[^\s:@]+(?:\{[^{}]*\}[^\s:@{]*)*)(?:\s+@(?P<stage>[\w-]+))?\s*:(?P<dims>.*)$")
FIELD = re.compile(r"\{([^{}]*)\}")
SEGMENT = re.compile(r"^\{[^{}]*\}\.?|\.?\{[^{}]*\}")


@dataclass(frozen=True)
class Cell:
    """One cell of a layout at one place: a box of indices, its key numbers and its flat positions in the tensor.

    Attributes:
        name: The axes of the cell; what it is paired by.
        fields: For each brace of the key, the map from indices to the number in the key.
        tensor: The map from indices to the flat position in the tensor.
        ranges: Half-open range of global indices along each axis.
    """

    name: frozenset[str]
    fields: tuple[Box, ...]
    tensor: Box
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """A key template, a pipeline stage where it lives (or `None`: any), and dims."""

    key: str
    dims: tuple[Expr, ...]
    stage: str | None = None

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that `text` spells.

        Raises:
            LayoutError: It does not read `key: dims` or `key @stage: dims`, or an expression in it is wrong.
        """
        match = PATTERN.match(text.strip())
        if match is None:
            raise LayoutError(f"a layout reads 'key: dims' or 'key @stage: dims', found {text!r}")
        stage = match["stage"]
        if stage is not None and stage not in STAGES:
            raise LayoutError(f"unknown stage '@{stage}' in {text!r}, expected one of @{', @'.join(STAGES)}")
        layout = cls(match["key"], axes.parse(match["dims"]), stage)
        try:
            axes.parse(" ".join(map(str, (*layout.fields, *layout.dims))))
        except LayoutError as error:
            raise LayoutError(f"key and dims of {text!r} together: {error}") from None
        if layout.cuts & {"tp", "cp", "dp"} and layout.cuts & {"ep", "etp"}:
            raise LayoutError(
                f"{text!r} is cut over {_cut_names(layout.cuts)}: /ep and /etp see the ranks as experts do, /tp, /cp "
                "and /dp as the rest does, and one tensor can be cut in one of the two views only"
            )
        ways = {cuts for _, cuts in axes.ways(Product((*layout.fields, *layout.dims)))}
        if len(ways) > 1:
            raise LayoutError(
                f"parts of {text!r} are cut over different mesh dims ({' and '.join(sorted(map(_cut_names, ways)))}): "
                "all of a tensor's elements are cut over the same ones, or a rank would hold some of them as a replica"
            )
        return layout

    def __str__(self) -> str:
        stage = f" @{self.stage}" if self.stage else ""
        return f"{self.key}{stage}: {' '.join(map(str, self.dims))}".rstrip()

    @cached_property
    def fields(self) -> tuple[Expr, ...]:
        """The expressions in the braces of the key."""
        out = []
        for text in FIELD.findall(self.key):
            parsed = axes.parse(text)
            if not parsed:
                raise LayoutError(f"empty braces in key {self.key!r}")
            out.append(parsed[0] if len(parsed) == 1 else Product(parsed))
        return tuple(out)

    @cached_property
    def names(self) -> list[frozenset[str]]:
        """The names of the cells, without sizes."""
        return axes.cells(Product((*self.fields, *self.dims)))

    @cached_property
    def cuts(self) -> frozenset[str]:
        """The mesh dims over which this layout is cut; over the others it is replicated."""
        placed = frozenset({"pp"}) if self.stage else frozenset()
        return axes.cuts(Product((*self.fields, *self.dims))) | placed

    def replica(self, mesh: Mesh | None) -> bool:
        """Whether the same elements are also held at a place that comes first in the mesh.

        Expert layouts (cut over `ep` or `etp`) see the ranks as etp x ep x edp, the others as tp x cp x dp.
        """
        if mesh is None:
            return False
        expert = bool(self.cuts & {"ep", "etp"})
        dims = {"etp", "ep", "edp", "pp", "chunk"} if expert else {"tp", "cp", "dp", "pp", "chunk"}
        cut = self.cuts | ({"chunk"} if "pp" in self.cuts else set())
        return any(getattr(mesh.coord, dim) for dim in dims - cut)

    def held(self, mesh: Mesh | None) -> bool:
        """Whether the tensor lives at this place of the pipeline; the whole (`None`) is first and last at once."""
        if self.stage is None:
            return True
        return mesh.holds(self.stage) if mesh else self.stage != "last-not-first"

    def shape(self, sizes: Mapping[str, int], mesh: Mesh | None = None) -> tuple[int, ...]:
        """Shape of each tensor, whole or at one place of a mesh."""
        return tuple(axes.size(dim, sizes, mesh) for dim in self.dims)

    def keys(self, sizes: Mapping[str, int], mesh: Mesh | None = None) -> list[str]:
        """The keys of the tensors at this place."""
        if not self.held(mesh):
            return []
        return [self.name(at) for at in itertools.product(*(range(axes.size(f, sizes, mesh)) for f in self.fields))]

    def stacked(self) -> Layout:
        """The same elements with the numbers of the key as leading dims, and their segments gone from the key.

        `decoder.layers.{layer/pp}.mlp.linear_fc2.weight: hidden ffn/tp` becomes
        `decoder.layers.mlp.linear_fc2.weight: layer/pp hidden ffn/tp`.
        """
        return replace(self, key=SEGMENT.sub("", self.key), dims=(*self.fields, *self.dims))

    def name(self, numbers: tuple[int, ...]) -> str:
        """The key with `numbers` in its braces."""
        left = iter(numbers)
        return FIELD.sub(lambda _: str(next(left)), self.key)

    def cells(self, sizes: Mapping[str, int], mesh: Mesh | None = None) -> list[Cell]:
        """The cells at this place; none where the tensor does not live."""
        if not self.held(mesh):
            return []
        tensor = axes.boxes(Product(self.dims), sizes, mesh)
        fields = [axes.boxes(part, sizes, mesh) for part in self.fields]
        out = []
        for *at, body in itertools.product(*fields, tensor):
            ranges: dict[str, tuple[int, int]] = {}
            for box in (*at, body):
                ranges |= box.ranges
            out.append(Cell(frozenset(ranges), tuple(at), body, ranges))
        return out


def _cut_names(cuts: frozenset[str]) -> str:
    return ", ".join(sorted(cuts)) or "none"
