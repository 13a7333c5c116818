"""What a fault does, as data: to a checkpoint folder, to a live model, or to what it computes.

Every exact conversion only moves elements. So a wrong import is an honest import of a mutated checkpoint, a wrong
export an honest export whose folder is mutated afterwards, and neither needs to know the converter. A mutation that has
an inverse can be applied in both directions such that the round trip is clean.

Tensors are named without `model.layers.N.` and `.weight`; a name stands for the weight and, where there is one, the
bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

ROPE = ("rope_parameters", "rope_scaling")  # transformers 5, transformers 4


class _OnFolder:
    """What mutations of folders share."""

    @property
    def idle(self) -> bool:
        """Whether it may well change nothing."""
        return False


@dataclass(frozen=True)
class Exchange(_OnFolder):
    """Each of two tensors holds the other's elements."""

    one: str
    other: str
    part: Literal["weight", "bias", "both"] = "both"

    def inverse(self) -> Exchange:
        return self


@dataclass(frozen=True)
class Reorder(_OnFolder):
    """Elements that lie as `written` says are taken for what `read` says, in the grammar of `converters.axes`.

    Args:
        names: The tensors; several are joined along their rows, and parted again at the same places.
        along: What the expressions describe: a tensor's rows, its columns, or all of its elements.
        read: Where the wrong code looks for an element.
        written: Where it is.
        part: Weights, biases, or both. Columns and elements are of weights alone.
    """

    names: tuple[str, ...]
    along: Literal["rows", "columns", "elements"]
    written: str
    read: str
    part: Literal["weight", "bias", "both"] = "both"

    def inverse(self) -> Reorder:
        return replace(self, written=self.read, read=self.written)


@dataclass(frozen=True)
class Shards(_OnFolder):
    """The tensor-parallel shards of tensors stand in reverse order."""

    names: tuple[str, ...]
    along: Literal["rows", "columns"]

    def inverse(self) -> Shards:
        return self


@dataclass(frozen=True)
class Layers(_OnFolder):
    """Layer n holds what layer f(n) should: a name of `parity.faults.mutate.MOVES`."""

    move: Literal["next", "previous", "exchanged", "stages", "chunks", "boundary", "first twice"]

    def inverse(self) -> Layers | None:
        back: dict[str, Any] = {"next": "previous", "previous": "next", "exchanged": "exchanged", "stages": "stages"}
        return Layers(back[self.move]) if self.move in back else None


@dataclass(frozen=True)
class Roll(_OnFolder):
    """The rows of a tensor move on by some, the last to the front."""

    name: str
    by: int

    def inverse(self) -> Roll:
        return Roll(self.name, -self.by)


@dataclass(frozen=True)
class SwapRows(_OnFolder):
    """Two rows of a tensor, counted from the end where negative, change places."""

    name: str
    one: int
    other: int

    def inverse(self) -> SwapRows:
        return self


@dataclass(frozen=True)
class Values(_OnFolder):
    """The values of tensors, all or some of them, become others.

    Args:
        names: The tensors.
        how: `initial`: as if nothing had been loaded; `minus one`: zero-centred; `rounded`, `truncated`: to bf16, kept
            in the dtype; `last bit`: the lowest of the mantissa, flipped; `scaled`: by 1.01; `half`: to float16 and
            back.
        rows: Which of them: a slice of rows over (tensor-parallel) shards or single rows.
        columns: Likewise.
        part: Weights, biases, or both.
    """

    names: tuple[str, ...]
    how: Literal[
        "zeros", "ones", "initial", "nan", "infinity", "minus one", "rounded", "truncated", "last bit", "scaled", "half"
    ]
    rows: Literal["all", "last shard", "last", "first half"] = "all"
    columns: Literal["all", "last shard", "last"] = "all"
    part: Literal["weight", "bias", "both"] = "weight"

    def inverse(self) -> Values | None:
        return self if self.how == "last bit" else None  # what rounds or overwrites cannot be undone

    @property
    def idle(self) -> bool:
        return self.how == "half"


@dataclass(frozen=True)
class Duplicate(_OnFolder):
    """A tensor holds a copy of another's elements."""

    name: str
    of: str

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Presence(_OnFolder):
    """Tensors that are lost, of one that nobody asked for."""

    names: tuple[str, ...]
    how: Literal["lost", "added"]
    part: Literal["weight", "bias", "both"] = "both"

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Resize(_OnFolder):
    """A tensor with more (zero) or fewer rows, and with `config` the config says so."""

    name: str
    by: int
    config: bool = False

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Retype(_OnFolder):
    """Tensors in another dtype, a name of safetensors."""

    names: tuple[str, ...]
    dtype: str

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class ConfigField(_OnFolder):
    """A field of config.json with another value.

    Args:
        field: Its name; `rope.NAME` is a field of the rope parameters in whichever spelling the config has, `rope` all
            of them but theta, and `rope_theta` is looked for in both places.
        how: `set` to `value`, `times` it, `negate`, or `lost`.
        value: See `how`.
    """

    field: str
    how: Literal["set", "times", "negate", "lost"]
    value: Any = None

    def inverse(self) -> Restored:
        return Restored("config.json")


@dataclass(frozen=True)
class Restored(_OnFolder):
    """A file as the source has it."""

    name: str

    @property
    def idle(self) -> bool:
        return True

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class File(_OnFolder):
    """Another file than the weights: lost, of other content, or with a list of ids shortened to its first."""

    name: str
    how: Literal["lost", "stale", "one id"]

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Broken(_OnFolder):
    """Weight files and index that cannot be trusted."""

    how: Literal[
        "truncated",
        "overlapping",
        "index promises",
        "index lacks",
        "shard lost",
        "boundary shard never written",
        "straddling layer skipped",
        "nothing saved",
        "stale file beside shards",
        "shard that no index names",
        "header dtype",
        "the source's files",
    ]

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Live:
    """Parameters of the live model, after loading or before saving.

    Args:
        pattern: A regular expression that finds the names of parameters, of either layer spec.
        how: `initial`, `zeros`, `ones`, or `row below`: each row holds the next one's values; `padding`: the rows
            behind the vocabulary are not zero; `last row`: that one is not zero.
        where: On which ranks: the last along a mesh dim, or all.
    """

    pattern: str
    how: Literal["initial", "zeros", "ones", "row below", "padding", "last row", "minus one"]
    where: Literal["tp", "pp", "cp", "all"] = "all"

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Patch:
    """What a rank computes: a name of `PATCHES` in `parity.faults.patches`, or in `te_patches`."""

    name: str

    def inverse(self) -> None:
        return None


@dataclass(frozen=True)
class Quantised:
    """An FP8 checkpoint after it was written.

    Args:
        how: A name of `parity.faults.fp8_folders.CHANGES`.
        scheme: Its format.
    """

    how: str
    scheme: str

    def inverse(self) -> None:
        return None


OnFolder = (
    Exchange
    | Reorder
    | Shards
    | Layers
    | Roll
    | SwapRows
    | Values
    | Duplicate
    | Presence
    | Resize
    | Retype
    | ConfigField
    | Restored
    | File
    | Broken
)
Mutation = OnFolder | Live | Patch | Quantised
