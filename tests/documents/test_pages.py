"""HTML as browsers take it: malformed markup, what is no text, and what separates words."""

from __future__ import annotations

import re
import time

import pytest

from kv_memory.documents.pages import read_page
from kv_memory.retrieval.tokenize import words_of


@pytest.mark.parametrize(
    "page",
    [
        "<script>1</script/><p>TEXT</p><script>2</script>",
        "<script>1</script ><p>TEXT</p>",
        "<style>p{}</style\n><p>TEXT</p>",
        "<!-- a --!><p>TEXT</p><!-- b -->",
        "<!--><p>TEXT</p>-->",
        "<![CDATA[x]]><p>TEXT</p>",
        '<p =x 1"=y>TEXT</p>',
        '<a href="x><p>TEXT</p>" >TEXT</a>',
        "<table><p>TEXT</p><tr></tr></table>",
        "<svg><p>TEXT</p>",
        "<title/>x</title><p>TEXT</p>",
        "<noscript><p>x</noscript><p>TEXT</p>",
        "<textarea>x</textarea><p>TEXT</p>",
        "</p><//x><? y><p>TEXT",
    ],
)
def test_malformed_pages_keep_their_text(page):
    assert "TEXT" in read_page(page).text


BLOCKS = re.findall(
    r"\w+",
    "summary legend header footer address aside main section article figcaption dt dd details fieldset form hgroup "
    "search dialog center menu dir div p li h3 blockquote caption td th pre xmp listing",
)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_separate_words(block):
    around = {"td": "table><tr", "th": "table><tr", "caption": "table"}.get(block, "div")
    page = read_page(f"<{around}><{block}>Times</{block}><{block}>Aurora</{block}>")
    assert words_of(page.text) == ["times", "aurora"]


def test_links_that_only_a_style_sheet_keeps_apart_are_separate_words():
    assert words_of(read_page("<div><a href=1>Home</a><a href=2>News</a></div>").text) == ["home", "news"]


def test_parts_of_a_word_stay_together():
    assert read_page("<p>un<b>believ</b>able, H<sub>2</sub>O</p>").text == "un**believ**able, H2O"


NO_TEXT = """
    <rt>x</rt>
    <rp>x</rp>
    <select><option>x</select>
    <datalist><option>x</datalist>
    <button>x</button>
    <textarea>x</textarea>
    <input value=x>
    <progress>x</progress>
    <nav>x<nav>x</nav></nav>
    <div role=navigation>x</div>
    <div hidden>x</div>
    <svg><text>x</text></svg>
    <img alt=x src="data:image/png;base64,x">
    <math><semantics><annotation>x</annotation></semantics></math>
    <noscript>x</noscript>
    <template>x</template>
    <iframe>x</iframe>
    <object>x</object>
    <canvas>x</canvas>
    <video>x</video>
    <audio>x</audio>
    <style>x</style>
    <script>x</script>
""".strip().splitlines()


@pytest.mark.parametrize("no_text", NO_TEXT)
def test_what_is_no_text_is_left_out(no_text):
    assert words_of(read_page(f"<p>before</p>{no_text}<p>after</p>").text) == ["before", "after"]


def test_annotations_are_not_part_of_words():
    assert read_page("<p><ruby>渡<rp>(</rp><rt>と</rt>船<rt>せん</rt></ruby>が出る").text == "渡船が出る"


def test_the_title_is_the_pages_and_not_a_pictures():
    assert read_page("<svg><title>icon</title></svg><title> The\n title </title><h1>Heading</h1>").title == "The title"
    assert read_page("<svg><title>icon</title></svg><h1>Heading</h1>").title == "Heading"


@pytest.mark.parametrize(
    "hard",
    ["<div>", "<p>x", "<b>", "<ul><li>x", "<table><tr><td>x", "<blockquote>x", "<a>x", "<br>", "<select>", "<svg>"],
)
def test_the_time_grows_with_the_length_only(hard):
    started = time.perf_counter()
    read_page(hard * 5000 + "x")
    assert time.perf_counter() - started < 20  # html5lib takes minutes for the first of them
