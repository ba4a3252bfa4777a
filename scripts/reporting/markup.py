"""Markdown and HTML in which nothing that a file or a folder's name says is taken for markup.

Every string is escaped but a `Markdown`. The page loads nothing and runs nothing: pictures are inside it, and a content
security policy forbids the rest.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markdown import markdown
from markupsafe import Markup

from scripts.outside import scrub

TEMPLATES = jinja2.FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
# What Markdown reads as markup, wherever it stands in a line or a table's cell.
MARKUP = re.compile(r"[&>*`|\\]|<(?=\S)|(?<![^\W_])_|_(?![^\W_])|\](?=\s*[\[(:])|^\s*[#+>~=-](?!\d)|^\s*\d+(?=[.)]\s)")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def plain(text: str) -> str:
    """Text to show, on one line and without secrets. Bytes of a name that the locale could not read are read as UTF-8,
    and shown as \\xff where they are none."""
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, which JSON may hold
        text = text.encode("utf-8", "backslashreplace").decode()
    return scrub(text)


def escape(value: Any) -> Any:
    """A string as the Markdown that shows it. Anything else as it is."""
    if isinstance(value, Markdown) or not isinstance(value, str):
        return value
    return Markdown(MARKUP.sub(lambda m: "".join(f"&#{ord(letter)};" for letter in m[0]), plain(value)))


def clean(value: Any) -> Any:
    """What JSON can hold, with each string of it as it may be shown."""
    if isinstance(value, Mapping):
        return {plain(str(key)): clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    return plain(value) if isinstance(value, str) else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    lines = [header, *rows]
    drawn = [f"| {' | '.join(escape(cell) for cell in line)} |" for line in lines]
    return Markdown("\n".join([drawn[0], "|" + "---|" * len(header), *drawn[1:]]))


def picture(alt: str, path: str) -> Markdown:
    """A picture by its path below the report's folder."""
    shown = escape(alt).replace("[", "&#91;").replace("]", "&#93;")
    return Markdown(f"![{shown}]({address(path)})")


def address(path: str) -> str:
    return quote(os.fsencode(path))


def render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=TEMPLATES, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=escape
    )
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(values))


def page(text: str, title: str, pictures: Mapping[str, bytes]) -> str:
    """report.html of report.md's text. pictures: PNGs by their path; an image of any other path stays empty."""
    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r"<table>.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.DOTALL)
    inside = {address(path): base64.b64encode(png).decode() for path, png in pictures.items()}

    def embed(match: re.Match[str]) -> str:
        return f'{match[1]}data:image/png;base64,{inside.get(match[2], "")}"'

    body = re.sub(r'(<img [^>]*?src=")([^"]*)"', embed, body)
    style = (Path(__file__).parent / "templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(loader=TEMPLATES, autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.get_template("report.html.j2")
    return template.render(
        body=Markup(body),
        style=Markup(style),
        digest=digest,
        title=plain(title),
    )
