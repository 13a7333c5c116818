"""A checkpoint folder of any format: its config, its tensors, and its plan to every other column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, ConfigError, SourceError, listing
from converters.files import place
from converters.files.extents import Extent, TensorFiles
from converters.files.identity import Identity
from converters.files.rank_tensors import RankTensors
from converters.files.safetensors import SafetensorsFiles
from converters.models import Family, column_of, family_of
from converters.plan import Plan
from converters.rows import Entry
from converters.sources import Source, resolve
from converters.tensors import TensorInfo, check_layers

if TYPE_CHECKING:
    from converters.execute import Store
    from converters.files.gather import Part
    from converters.files.iterations import Iteration
    from converters.files.megatron_folder import MegatronFolder

EXTRA_STATE = "_extra_state"
HF_LIKE = ("hf", "te")
"""Columns whose folders are `config.json` and safetensors."""


class Checkpoint:
    """A folder of weights.

    Attributes:
        source: Where it was found, with its `config.json` (of a Megatron checkpoint: that of the model it holds).
        folder: Its files.
        column: The column that its tensors are in.
        family: The model family.
        config: The `config.json` as Hugging Face would have it.
        hf: Its fields by the names of the family's table.
        dropped: The fields that no column uses.
        files: Its tensors, as boxes in files.
        artefacts: The folder of config, tokenizer and all else that is no weight; `None` where there is none.
        text: The text of its `config.json`.
        remarks: What is odd about it and changes nothing.
        megatron: The Megatron folder, where it is one.
    """

    def __init__(
        self,
        source: Source,
        files: TensorFiles,
        *,
        column: str,
        text: str,
        artefacts: Path | None,
        remarks: tuple[str, ...] = (),
        megatron: MegatronFolder | None = None,
    ) -> None:
        assert source.folder is not None
        self.source, self.folder, self.files, self.column = source, source.folder, files, column
        self.text, self.artefacts, self.remarks, self.megatron = text, artefacts, remarks, megatron
        self.family: Family = family_of(source.config)
        self.config: dict[str, Any] = self.family.hf_config(source.config)
        hf, dropped = self.family.fields.check(self.config)
        self.hf: Mapping[str, Any] = hf
        self.dropped: tuple[Entry, ...] = dropped

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        column: str | None = None,
        iteration: Iteration | None = None,
        like: str | Path | Source | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """The checkpoint in a folder, or of a hub id.

        Args:
            path: A folder of any format, or a hub id.
            column: What it must be: `hf`, `te` or `megatron`; by default whatever it is.
            iteration: Of a Megatron checkpoint with several; by default the one that its tracker names.
            like: The Hugging Face model (folder, hub id, or found already) that a Megatron checkpoint is of, where it
                carries no config of its own, or another one.
            revision: Branch, tag or commit on the hub.
            token: Access token for the hub.
            trust_remote_code: Fetch and carry the source's Python files too.

        Raises:
            SourceError: No such model, or no weights.
            ConfigError: Another column than `column`, or a config that no column knows.
            CheckpointError: Files that cannot be trusted.
        """
        path = place.expanded(path)
        if _is_megatron(path):
            made = cls._megatron(Path(path), iteration, like, code=trust_remote_code)
        else:
            if wrong := [name for name, value in (("iteration", iteration), ("like", like)) if value is not None]:
                flags = " and ".join(f"--{name} (in Python {name}=...)" for name in wrong)
                raise CheckpointError(
                    f"{path} is no Megatron checkpoint, and other sources have no use for {flags}: drop it"
                )
            source = resolve(str(path), revision=revision, token=token, trust_remote_code=trust_remote_code)
            if source.folder is None:
                raise CheckpointError(f"{source.name}: only a config is known, there are no weights to convert")
            text = (source.folder / "config.json").read_text()
            files = SafetensorsFiles(source.folder)
            made = cls(source, files, column=column_of(source.config), text=text, artefacts=source.folder)
        if column not in (None, made.kind, "megatron" if made.megatron is not None else None):
            raise ConfigError(f"{made.source.name} is in the {made.kind!r} column, expected {column!r}")
        return made

    @classmethod
    def _megatron(
        cls, path: Path, iteration: Iteration | None, like: str | Path | Source | None, *, code: bool
    ) -> Checkpoint:
        from converters.files.megatron_folder import MegatronFolder
        from converters.megatron_checkpoint import model_of

        if like is not None and not isinstance(like, Source):
            like = resolve(str(like), weights=False, trust_remote_code=code)
        folder = MegatronFolder.open(path, iteration=iteration)
        model = model_of(folder, str(path), like)
        return cls(
            model.source,
            folder.files,
            column=folder.column,
            text=model.text,
            artefacts=model.artefacts,
            remarks=model.remarks,
            megatron=folder,
        )

    @property
    def kind(self) -> str:
        """The column as a person says it: `megatron` for all styles of its keys."""
        return self.column if self.column in HF_LIKE else "megatron"

    @cached_property
    def weights(self) -> Store:
        """The tensors of a folder of safetensors as torch has them, without states of quantisation."""
        from converters.execute import Only
        from converters.stores.safetensors import SafetensorsFolder

        return Only(SafetensorsFolder(self.folder), list(self.tensors))

    @cached_property
    def extra_states(self) -> tuple[str, ...]:
        """Names of the states of quantisation: amax histories and scales of a run, no weights."""
        if self.column != "te":
            return ()
        return tuple(key for key in self.files.tensors() if key.rpartition(".")[2].startswith(EXTRA_STATE))

    @cached_property
    def stored(self) -> frozenset[str]:
        """Features of what it stores beyond the model, and of how."""
        found = self.family.stored(self.column, self.tensors.keys(), tied=bool(self.hf["tie_word_embeddings"]))
        settings = self.megatron.settings if self.megatron is not None else None
        centred = settings is not None and settings.fields["layernorm_zero_centered_gamma"]
        return found | ({"layernorm_zero_centered_gamma"} if centred else set())

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight."""
        states = set(self.extra_states)
        return {key: info for key, info in self.files.tensors().items() if key not in states}

    @cached_property
    def held(self) -> TensorFiles:
        """Its files, with the weights alone."""
        return OnlyTensors(self.files, self.tensors) if self.extra_states else self.files

    @cached_property
    def padding(self) -> dict[str, int]:
        """Its padded sizes, from the shapes of its tensors: rows of the embedding, key-value groups."""
        if self.megatron is None or self.column == "hf":
            return {}
        from converters.megatron_checkpoint import padding

        return padding(self.tensors, self.hf)

    def check(self) -> None:
        """Hold what it stores beyond the weights, or of them a second time, against the model.

        Raises:
            CheckpointError: Rotary frequencies that are not those of the config, with which the converted model would
                turn by other angles; copies on several ranks that differ.
        """
        if isinstance(self.files, RankTensors):
            self.files.check_copies()
        if not self.stored & {"stored_te_inv_freq", "stored_inv_freq"}:
            return
        from converters.megatron.rope import are_frequencies

        stored = [key for key in self.tensors if key.endswith("rotary_emb.inv_freq")]
        wrong = [key for key in stored if not are_frequencies(self.weights.tensor(key), self.hf)]
        if wrong:
            raise CheckpointError(
                listing(f"{self.folder}: frequencies that are not what the config's rope fields give", wrong)
                + "\nNo other format stores them. Correct rope_theta and rope_parameters in config.json, or remove the "
                "tensors"
            )

    def shards(self) -> Mapping[str, list[str]] | None:
        """The tensors of each of its files, in the order of their bytes; `None` of a Megatron checkpoint."""
        return self.files.shards() if isinstance(self.files, SafetensorsFiles) else None

    def config_text(self, column: str, options: Mapping[str, Any] | None = None) -> str:
        """The text of the same model's config.json in another column, or in this one with other options.

        Args:
            column: `hf`, or that of a dialect.
            options: Fields of the dialect.

        Raises:
            ConfigError: A model that the column cannot have, or an option that it does not know.
        """
        text = self.text
        here, there = self.family.dialect(self.column), self.family.dialect(column)
        if here is not None:
            options = {**(here.read(self.source.config) if there is here else {}), **(options or {})}
            text = here.to_hf(text)
        if there is not None:
            there.check(self.hf)
            return there.from_hf(text, **(options or {}))
        if options:
            raise ConfigError(f"a Hugging Face config has no options, found {', '.join(options)}")
        return text

    def plan(self, column: str, **sizes: Any) -> Plan:
        """The whole plan to another column.

        Args:
            column: Any of the table.
            **sizes: As in `Family.plan`; features are added to those of what is stored.
        """
        check_layers(self.hf["num_hidden_layers"], self.files.tensors(), str(self.folder))
        features = self.stored | sizes.pop("features", frozenset())
        return self.family.plan(self.column, column, self.config, features=features, **sizes)

    def parts(
        self, column: str, padding: Mapping[str, int] | None = None, features: frozenset[str] = frozenset()
    ) -> list[Part]:
        """What a conversion to another column reads: a plan for each set of files that holds some of the weights.

        Args:
            column: Any of the table.
            padding: Padded sizes of the target, as in `Family.plan`; by default none.
            features: Of what the target stores beyond the model.

        Raises:
            CheckpointError: Tensors that are not those of the model.
        """
        plan = self.plan(column, features=features, **(padding or {}))
        if self.padding != (padding or {}):
            mine = self.plan(column, features=features, **self.padding)
            own = {axis: size for axis, size in mine.sizes.items() if size != plan.sizes[axis]}
            plan = replace(plan, source_padding=own)
        if self.megatron is not None:
            return list(self.megatron.parts(plan))
        return [(plan, self.held)]


@dataclass(frozen=True)
class OnlyTensors:
    """Some tensors of a checkpoint.

    Attributes:
        files: The checkpoint.
        held: Those that are seen.
    """

    files: TensorFiles
    held: Mapping[str, TensorInfo]

    @property
    def root(self) -> Path:
        """The folder."""
        return self.files.root

    @property
    def left_alone(self) -> Mapping[str, str]:
        """What is there besides weights."""
        return self.files.left_alone

    @property
    def identities(self) -> Mapping[Path, Identity]:
        """Which files they are."""
        return self.files.identities

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of each."""
        return self.held

    def extents(self, key: str) -> Sequence[Extent]:
        """Where its boxes are."""
        return self.files.extents(key)


def _is_megatron(path: str | Path) -> bool:
    """Whether a folder is none of Hugging Face: whatever else it is, Megatron's reader says.

    Raises:
        SourceError: It cannot be looked into, or no file can have this name.
    """
    folder = Path(path)
    try:
        folder.stat()
        if not folder.is_dir() or any(folder.glob("*.safetensors")):
            return False
        return (folder / ".metadata").is_file() or not (folder / "config.json").is_file()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SourceError(f"no model {place.shortened(path)}: {why}") from error
