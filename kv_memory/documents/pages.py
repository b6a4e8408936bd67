"""From an HTML page to its title and its text as Markdown, at whose headings and code blocks `split_passages` cuts.

`justhtml` builds the tree that browsers build (WHATWG), in time that grows with the page's length only. Of the others,
`html.parser` loses text behind malformed tags, `html5lib` takes minutes for deeply nested elements, and lxml's parser
is not the browsers'. markdownify writes the Markdown; a converter of our own was rejected.
"""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

# What is no text of a page: scripts and styles, navigation, form controls, what is hidden or embedded, and annotations
# of words (the reading of Chinese characters, the source of a formula).
NO_TEXT = (
    "script, style, template, noscript, noframes, head, nav, [role=navigation], [hidden], button, select, datalist, "
    "textarea, input, progress, meter, iframe, object, canvas, audio, video, svg, img, rt, rp, rtc, annotation, "
    "annotation-xml"
)
# Elements that browsers display as blocks, and markdownify takes for parts of a line.
_BLOCKS = (
    "address, aside, center, details, dialog, fieldset, figure, footer, form, frameset, header, hgroup, legend, main, "
    "search, summary"
)
_ATTRIBUTES = {"colspan", "start"}  # those that markdownify looks at; of others, any name may be malformed
_SAME_AS = {"dir": "ul", "menu": "ul", "listing": "pre", "xmp": "pre", "plaintext": "pre"}
_PADDED = re.compile(r"(?<![ \t])[ \t]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


class Page(NamedTuple):
    """The title and the text of a page, empty where it lacks them."""

    title: str
    text: str


def read_page(html: str) -> Page:
    """The title of a page, or else its first heading, and its text as Markdown."""
    from justhtml import JustHTML

    tree = JustHTML(html, sanitize=False)
    titles = [node for node in tree.query("title") if node.namespace != "svg"]  # a picture's title is not the page's
    headings = titles or tree.query("h1, h2")
    title = " ".join(headings[0].to_text().split()) if headings else ""
    for node in tree.query(NO_TEXT):
        if node.parent is not None:
            node.parent.remove_child(node)
    for node in tree.query(", ".join((_BLOCKS, *_SAME_AS))):
        node.name = _SAME_AS.get(node.name, "div")
    for node in tree.query("*"):
        node.attrs = {name: value for name, value in (node.attrs or {}).items() if name in _ATTRIBUTES}
    # Parsed a second time, for markdownify: what `to_html` writes is well-formed. Only a style sheet keeps links apart
    # that follow one another, as in menus.
    text = _to_markdown(tree.to_html(pretty=False).replace("</a><a>", "</a> <a>")) or tree.to_text()
    return Page(title, _BLANK_LINES.sub("\n\n", _PADDED.sub("\n", text.replace("\xa0", " "))).strip())


def _to_markdown(html: str) -> str:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from markdownify import ATX, MarkdownConverter

    # Link targets are dropped: they cost many tokens and carry little information.
    converter = MarkdownConverter(
        heading_style=ATX, bullets="-", strip=["a"], escape_asterisks=False, escape_underscores=False
    )
    try:
        with warnings.catch_warnings():
            # A page that looks like a file name, or like XML, is parsed all the same.
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
            return converter.convert_soup(BeautifulSoup(html, "html.parser"))
    except RecursionError:  # nested hundreds of levels deep
        return ""
