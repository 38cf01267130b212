"""Pages show texts of others as texts, whatever stands in them."""

from __future__ import annotations

import pytest

from tests.html.read import Page
from vltrain.html.markup import page, tag, text, visible

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style><svg onload=alert(1)>",
    "<!-- --><![CDATA[ ]]>",
    "&lt;b&gt; &amp; &#60;",
    "javascript:alert(1)",
    "</span></div><iframe srcdoc='<script>1</script>'></iframe>",
)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_text_stays_a_text_wherever_it_stands(hostile):
    shown = Page(page(hostile, tag("p", hostile, title=hostile), text(hostile)))
    assert shown.text.count(hostile) == 4  # in the title, the heading, the paragraph and alone
    assert [one["title"] for one in shown.of("p")] == [hostile]


def test_what_is_hidden_or_obeyed_is_written_out():
    bidi = "abc\u202edcba\u2066x\u200f"
    assert visible(bidi) == "abc\\u202edcba\\u2066x\\u200f"
    assert visible("half \ud83d end") == "half \\ud83d end" and visible("nul\0 bell\a esc\x1b[31m") == (
        "nul\\x00 bell\\x07 esc\\x1b[31m"
    )
    assert visible("two\nlines") == "two\nlines" and visible("naïve 漢字 עברית") == "naïve 漢字 עברית"
    shown = Page(page("half \ud83d", tag("p", bidi, title="\udfff\u202e")))
    assert "\\ud83d" in shown.text and "\u202e" not in shown.text and shown.of("p")[0]["title"] == "\\udfff\\u202e"


def test_only_what_was_made_here_is_markup():
    made = tag("b", "x < y")
    assert (
        made == "<b>x &lt; y</b>"
        and tag("p", made, str(made)) == "<p><b>x &lt; y</b>&lt;b&gt;x &amp;lt; y&lt;/b&gt;</p>"
    )
    assert tag("rect", x=1 / 3, width=None, stroke_width=2) == '<rect x="0.333333" stroke-width="2"/>'
    for name, attribute in (("script src", {}), ("p", {"onclick": "x"})):
        with pytest.raises(AssertionError):
            tag(name, **attribute)
