"""The HTML page and the Markdown: nothing from elsewhere, nothing unescaped, pictures of any numbers."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from report_samples import ACCOUNT, LINES, MAP, TP1, TP2, case, measurement, pictured, run

from parity.findings import Lines, Map
from parity.report.html import html
from parity.report.markdown import markdown
from parity.report.pictures import CELLS, picture, pooled

HOSTILE = (
    "</pre></title></svg><script>alert('x')</script><img src=http://a.b/c onerror=alert(1)> `a` | [b](http://c) @d"
)
CAUSE = {"kind": "keys exchanged", "what": ["k_proj", "v_proj"], "where": "layer 0", "detail": ""}
SELF_TEST = {
    "summary": {"caught": 2, "survivors": 1, "false_alarms": 1},
    "faults": [{"name": "k and v swapped", "equivalent": ""}, {"name": "bf16 to fp16", "equivalent": "in range"}],
    "variants": [
        {"fault": "k and v swapped", "killed": True, "verdicts": {"import": "caught", "loss": "passed"}},
        {"fault": "k and v swapped", "killed": True, "verdicts": {"import": "passed", "loss": "not applicable"}},
        {"fault": "eps", "killed": False, "verdicts": {"loss": "passed"}},
        {"fault": "bf16 to fp16", "killed": False, "verdicts": {"loss": "passed"}},
        {"fault": None, "killed": True, "verdicts": {"loss": "caught"}},
    ],
}


class Tags(HTMLParser):
    """Every tag with its attributes, every script's text, and the text between tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "rect", "path", "image", "circle"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.said.setdefault(self._open[-1] if self._open else "", []).append(data)


def everything(text: str = "") -> dict[str, Any]:
    """A record with one of each, and `text` wherever a text may stand."""
    failing = {**measurement(f"logits{text}", margin=0.01, detail=f"d{text}", where=f"w{text}", unit=f"u{text}")}
    failing["causes"] = [CAUSE, {"kind": f"k{text}", "what": text, "where": text, "detail": text}]
    account = {"title": f"t{text}", "rows": [{"name": text, "side": text, "class": text, "reason": text}]}
    lines = Lines(title=text, x=text, y=text, curves={text: [1.0, 2.0], "b": [1.0]}, marks={text: 1.5}, ticks=[text])
    grid = Map(title=text, x=text, y=text, values=[[1.0, 2.0]], unit=text, rows=[text], columns=[text, text])
    first = case(f"{TP1}{text}", [failing, measurement("loss")], note=text, command=f"pytest {text}", model=text)
    first |= {"pictures": [pictured(LINES), pictured(MAP), pictured(lines), pictured(grid)]}
    first |= {"accounts": [{"test": "logits", **ACCOUNT}, {"test": "logits", **account}]}
    second = case(TP2, [], verdict="skip", cause=f"no GPU{text}", accounts=[{"test": "logits", **ACCOUNT}])
    model = {"name": f"m{text}", "revision": text, "size": "tiny", "layers": 2, "weights": text, "config": "0" * 64}
    return run(
        first,
        second,
        case(f"e{text}", [], verdict="error", cause=f"RuntimeError{text}"),
        left_out=[(f"x{text}", f"y{text}")],
        errors=[{"where": f"f{text}", "text": f"g{text}"}],
        models=[model],
        command=f"pytest {text}",
        versions={f"v{text}": text},
        interrupted=True,
    )


def test_one_page_that_needs_nothing_else() -> None:
    page = Tags(html({**everything(), "self_test": SELF_TEST}))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert links
    assert all(str(link).startswith(("#", "data:image/png;base64,")) for link in links)
    assert not {"link", "iframe", "img", "object", "form", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", "".join(page.said["style"]))
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert str(policy).startswith("default-src 'none'")


def test_the_page_shows_what_there_is() -> None:
    text = html({**everything(), "self_test": SELF_TEST})
    for words in (
        "k_proj and v_proj are exchanged, in layer 0",
        "Error by layer",
        "rope_theta",
        "no GPU",
        "RuntimeError",
    ):
        assert words in text
    assert "the same 1 rows as in" in text, "an account that two cases share stands there once"
    for kind, name, check, said in (
        ("wide", "k and v swapped", "import", "1 of 2"),
        ("none", "k and v swapped", "loss", "·"),
        ("fail", "eps", "loss", "missed"),
        ("exact", "bf16 to fp16", "loss", "passed"),
        ("fail", "no fault", "loss", "false alarm"),
    ):
        assert f'<td class="{kind}" title="{name}, {check}: {said}">{said}</td>' in text
    assert "interrupted" in text
    assert text.index("Failures</h2>") < text.index("Cases</h2>")


@pytest.mark.parametrize("name", ["html", "markdown"])
def test_hostile_texts_stay_texts(name: str) -> None:
    hostile = {
        **everything(HOSTILE),
        "self_test": {"variants": [{"fault": HOSTILE, "killed": True, "verdicts": {HOSTILE: HOSTILE}}]},
    }
    if name == "html":
        page, plain = Tags(html(hostile)), Tags(html({**everything("x"), "self_test": SELF_TEST}))
        assert len(page.said["script"]) == len(plain.said["script"]) == 1
        assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
        assert "img" not in {tag for tag, _ in page.tags}
        assert "alert('x')" in "".join(page.said["pre"])
        return
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", markdown(hostile))
    outside = re.sub("`[^`\n]*`", "", outside)
    assert "<script" not in outside
    assert "http:" not in outside
    assert "@d" not in outside
    assert not re.search(r"(?<!\\)\[b\]\(", outside.replace("\\]", "]"))


def test_unknown_self_tests_are_shown_as_they_are() -> None:
    assert "&#34;gate&#34;: 7" in html({**everything(), "self_test": {"gate": 7}})


def test_markdown_has_failures_first_and_passing_cases_folded() -> None:
    text = markdown(run(case(TP1, [measurement("logits")]), case(TP2, [measurement("loss", margin=0.1)])))
    assert text.startswith("## ❌ parity: 2 checks in 2 cases: 1 passed, 1 failed\n")
    assert text.index("### 1 failure") < text.index(f"<details><summary>✅ {TP1}: 1 check</summary>")
    assert f"<details open><summary>❌ {TP2}: 1 check, 1 failed</summary>" in text
    assert "```bash\npytest --model llama -k test_logits\n```" in text
    assert "| logits | 2.0e-05 | 2.0e-04 | 10x | pass |" in text


def test_equal_failures_of_many_cases_are_told_once() -> None:
    failing = [measurement("logits", margin=0.1)]
    many = run(*(case(f"llama-tp{tp}", failing) for tp in range(1, 15)))
    assert markdown(many).count("**logits: measured") == 1
    assert "and 4 more cases" in markdown(many)
    assert html(many).count("<h3>logits: measured") == 1


def test_a_long_curve_keeps_its_peak_and_the_page_its_size() -> None:
    values = [1e-6] * 100_000
    values[77_777] = 5.0
    assert max(pooled(values, 400)) == 5.0
    assert len(picture(pictured(Lines(title="t", x="x", y="y", curves={"a": values})))) < 12_000
    peak = Map(title="t", x="x", y="y", values=[[float(x == y == 70) for x in range(100)] for y in range(100)])
    assert len(picture(pictured(peak))) < 40 * CELLS
    pictures = [pictured(LINES), pictured(peak)]
    cases = [case(f"c{n}", [measurement("a")], pictures=pictures) for n in range(8)]
    assert len(html(run(*cases))) < 200_000


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan], [], [1.0], [-1.0, 2.0], [1e-300, 1e300], [math.inf, 1.0]])
def test_pictures_of_any_numbers(values: list[float], log: bool) -> None:
    for one in (
        Lines(title="t", x="x", y="y", curves={"a": values, "b": []}, log=log, marks={"gate": math.inf}),
        Lines(title="t", x="x", y="y", curves={}, log=log),
        Map(title="t", x="x", y="y", values=[values, values], log=log),
        Map(title="t", x="x", y="y", values=[], log=log),
    ):
        drawn = picture(json.loads(json.dumps(pictured(one), allow_nan=False)))
        assert "nan" not in re.sub(r"<title>.*?</title>", "", drawn)
        assert not re.search(r'="-?inf', drawn)
