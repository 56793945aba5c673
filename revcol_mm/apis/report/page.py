# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""An HTML page that needs no other file: pictures are in it, and there are no scripts."""
import base64
import math
from html import escape
from typing import Any, Iterable, Sequence

STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto } figure { margin: 1em 0 }
figcaption { color: #555; font-size: .9em; overflow-wrap: anywhere }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title (str): heading, as plain text.
        parts (Iterable[str]): of this module's other functions.
    """
    body = '\n'.join(parts)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f'<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n')


def heading(text: str) -> str:
    return f'<h2>{escape(text)}</h2>'


def paragraph(text: str) -> str:
    return f'<p>{escape(text)}</p>'


def table(name: str, columns: Sequence[tuple[str, Sequence[Any]]]) -> str:
    """A table.

    Args:
        name (str): its id in the page, by which programs find it.
        columns (Sequence[tuple[str, Sequence]]): head of each column, which may repeat, and its values; the first one names
            the rows.
    """
    rows = ''.join('<tr>' + ''.join(f'<td>{escape(_text(value))}</td>' for value in row) + '</tr>\n'
                   for row in zip(*(values for _, values in columns)))
    head = ''.join(f'<th>{escape(column)}</th>' for column, _ in columns)
    return f'<table id="{escape(name)}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'


def picture(content: bytes, caption: str, kind: str = 'png') -> str:
    data = base64.b64encode(content).decode('ascii')
    return (f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
            f'<figcaption>{escape(caption)}</figcaption></figure>')


def _text(value: Any) -> str:
    if isinstance(value, float):
        return '–' if math.isnan(value) else f'{value:.3f}'
    return str(value)
