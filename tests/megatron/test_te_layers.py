"""The table's names under Transformer Engine's layer spec, against the real layers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import te_layers

from converters.sources import read_config
from parity.ranks import Zygote
from parity.tiny import odd_config, shrink

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)

CONFIGS = {"odd": odd_config, "tied": lambda: shrink(read_config("meta-llama/Llama-3.2-1B"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_table_has_the_names_and_shapes_of_the_real_layers(name: str, zygote: Zygote) -> None:
    config: dict[str, Any] = CONFIGS[name]()
    config = {**config, "dtype": "float32"}
    config.pop("torch_dtype", None)
    ((count, differing),) = zygote.run(te_layers.compare, config)
    assert count
    assert not differing
