"""Figures as parts of a web page: SVG that brings no fonts, scripts, dates or addresses along.

Text stays text, in the font of the page. The drawing is transparent and keeps to a light palette; a dark
page inverts it.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from rlhf_cli.figures.style import RC
from rlhf_cli.printable import visible

INK, FAINT = "#3a3f47", "#d6dade"
INLINE: dict[str, Any] = RC | {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "xtick.color": "#9aa1ab",
    "ytick.color": "#9aa1ab",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",  # text stays text
}
"""Matplotlib settings of a drawing in a page; draw and convert under the same ones."""

_UNDATED = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_FONT = re.compile(r"font: (?:[a-z]+ )?([\d.]+px)[^;]*")
_REFERENCE = re.compile(r"#([\w-]+)")
_NUMBER = re.compile(r"\d+\.\d{3,}")


def inline(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element as wide as its place, called `title` for those who cannot see it.

    name: tells the ids within from those of the page's other figures. The same figure gives the same text.
    """
    buffer = io.BytesIO()
    with rc_context(INLINE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_UNDATED)
    root = _bare(ElementTree.fromstring(buffer.getvalue()))
    for side in ("width", "height", "version"):
        del root.attrib[side]
    root.attrib |= {"role": "img", "aria-label": visible(title)}
    called = ElementTree.Element("title")
    called.text = visible(title)
    root.insert(0, called)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _bare(root: ElementTree.Element) -> ElementTree.Element:
    """Without namespaces, which HTML knows, styles for all of a page, and ids that nothing refers to."""
    for parent in root.iter():
        for child in [*parent]:
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {_local(name): _short(value) for name, value in element.attrib.items()}
    values = (value for each in root.iter() for value in each.attrib.values())
    wanted = {found for value in values for found in _REFERENCE.findall(value)}
    for element in root.iter():
        if element.get("id") not in wanted:
            element.attrib.pop("id", None)
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _short(value: str) -> str:
    """A font of the page's own, and hundredths of a point, finer than any screen."""
    return _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", _FONT.sub(r"font-size: \1", value))
