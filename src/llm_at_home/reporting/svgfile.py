"""A figure of the page as an SVG file of its own: the same drawing with its style and size inside it."""

from __future__ import annotations

import re
from pathlib import Path

_WIDTH = 720  # of a figure that takes the page's width
_OPENING = re.compile(r"<svg [^>]*>")
_BOX = re.compile(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"')
_FONT = 'font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif'


def write(drawing: str, style: str, path: Path) -> None:
    """Write one drawing, ``<svg ...>...</svg>`` as it stands on the page, with ``style``, which knows light and dark.

    Raises:
        ValueError: for a drawing without an opening tag.
    """
    opening = _OPENING.search(drawing)
    if opening is None:
        raise ValueError("no <svg> in the drawing")
    tag = opening[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    box = _BOX.search(tag)
    if box:
        tag = tag.replace("viewBox", f'width="{box[1]}" height="{box[2]}" viewBox', 1)
    else:
        tag = tag.replace('width="100%"', f'width="{_WIDTH}"', 1)
    inside = f"<style>{style}\nsvg {{ background: var(--paper); {_FONT}; }}</style>"
    path.write_text(tag + inside + drawing[opening.end() :].strip() + "\n", encoding="utf-8")
