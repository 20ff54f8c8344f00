"""Values in Markdown stay values: a renderer makes neither markup nor HTML of them."""

import re

import pytest

from slimfront.trainables.markdown import code, text

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://host/x.png)",
    "javascript:alert(1)",
    "https://host/x",
    "a | b | c",
    "**bold** _it_ ~~no~~",
    "`code` ``more``",
    "&lt;b&gt;",
    "# head\n\n- item\n\n<b>x</b>",
    "\\`x\\|",
    "$x$",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_text_has_nothing_that_markdown_reads(value: str) -> None:
    escaped = text(value)
    without = re.sub(r"\\[\\`*_\[\]()#!~$]|&(amp|lt|gt|#124|#58);", "", escaped)
    assert not re.search(r"[\\`*_\[\]()#!~$<>|:\n]", without), escaped


@pytest.mark.parametrize("value", HOSTILE)
def test_code_is_one_span_of_one_cell(value: str) -> None:
    for cell in (False, True):
        span = code(value, cell=cell)
        fence = re.match("`+", span)
        assert fence is not None
        assert span.endswith(fence[0])
        inside = span[len(fence[0]) : -len(fence[0])]
        assert fence[0] not in re.findall("`+", inside)
        assert "\n" not in span
        assert not (cell and re.search(r"(?<!\\)\|", span))


def test_entities_are_not_escaped_themselves() -> None:
    assert text("my_module:load | #1") == "my\\_module&#58;load &#124; \\#1"


def test_what_is_harmless_stays_as_it_is() -> None:
    assert text("mlp") == "mlp"
    assert text(0.5) == "0.5"
    assert text("trial-007@30/3") == "trial-007@30/3"
    assert code("sparsifier.sparsity") == "`sparsifier.sparsity`"
    assert code("") == "` `"
    assert len(code("x" * 9_000)) < 250
