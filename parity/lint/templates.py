"""Rules on chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parity.lint.folder import Folder
from parity.lint.rules import Remark, rule, some

FILE = "chat_template.jinja"
SETTING = "tokenizer_config.json: chat_template"
MARKER = re.compile(r"<\|[^|<>\s]+\|>")
"""How the control tokens of chat models are spelled, `<|im_start|>`."""


class Generation(Extension):
    """The block `{% generation %}`, with which templates mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body, as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def templates(folder: Folder) -> dict[str, str]:
    """Every chat template by where it stands; a folder may have several, by name."""
    found: dict[str, str] = {}
    settings = folder.object("tokenizer_config.json") or {}
    value = settings.get("chat_template")
    if isinstance(value, str):
        found[SETTING] = value
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, dict) and isinstance(one.get("template"), str):
                found[f"{SETTING}[{one.get('name')!r}]"] = one["template"]
    for path in folder.entries:
        # Those of transformers: in a file of its own, and named ones in a folder.
        if path.as_posix() == FILE or (path.parts[0] == "additional_chat_templates" and path.suffix == ".jinja"):
            found[path.as_posix()] = folder.text(path.as_posix())
    old = folder.object("chat_template.json") or {}
    if isinstance(old.get("chat_template"), str):
        found["chat_template.json"] = old["chat_template"]
    return found


@rule("chat-template-twice", "a chat template that stands in two files is the same in both")
def twice(folder: Folder) -> Iterator[Remark]:
    found = templates(folder)
    default = found.get(SETTING, found.get(f"{SETTING}['default']"))
    for where in (FILE, "chat_template.json"):
        if default is not None and where in found and found[where] != default:
            yield Remark(
                severity="error",
                where=f"{where}, {SETTING}",
                expected="one template, or the same in both",
                found=f"two that differ; transformers takes {FILE}, what reads tokenizer_config.json takes the other",
                advice="remove the one that is stale",
            )


@rule("chat-template-syntax", "chat templates compile in the sandbox in which transformers runs them")
def syntax(folder: Folder) -> Iterator[Remark]:
    """Source: huggingface/transformers 5.23.0, utils/chat_template_utils.py, _cached_compile_jinja_template."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for where, text in templates(folder).items():
        try:
            sandbox.from_string(text)
        except (TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            yield Remark(
                severity="error",
                where=where + (f", line {line}" if line else ""),
                expected="a Jinja template",
                found=str(error) or type(error).__name__,
                advice="take the template of the model that was exported",
            )


@rule("chat-template-tokens", "the control tokens of a chat template are tokens of the tokenizer")
def tokens(folder: Folder) -> Iterator[Remark]:
    known = folder.tokens
    for where, text in templates(folder).items():
        absent = sorted({token for token in MARKER.findall(text) if token not in known})
        if absent:
            yield Remark(
                severity="warning",
                where=where,
                expected="control tokens that the tokenizer has",
                found=f"{some(absent)}, which it would split into pieces",
                advice="the template is probably another model's: take the one of the model that was exported",
                items=tuple(absent),
            )
