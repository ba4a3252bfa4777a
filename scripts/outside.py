"""Names of files that others chose, and text that is printed: each is checked in this one place."""

import os
import re
import unicodedata
from fnmatch import fnmatchcase

# user:password@, ?query=..., the tokens of the hub and of OpenAI
SECRET = re.compile(r"(?<=//)[^/\s]+@|\?[^\s'\"]*=[^\s'\"]*|\bhf_\w{8,}|\bsk-[\w-]{16,}")


def checked_name(name: str) -> str:
    """`name`, if it is the path of a file below a folder. Raises ValueError if it could lead out of that folder, or
    forge a line of a log or a list: an empty, "." or ".." part, a backslash, a control character, a line separator, a
    part of more than 255 bytes, or what the file system cannot encode."""
    parts = name.split("/")
    try:
        fits = all(0 < len(os.fsencode(part)) <= 255 for part in parts)
    except UnicodeEncodeError:
        fits = False
    odd = [letter for letter in name if letter == "\\" or unicodedata.category(letter) in ("Cc", "Zl", "Zp")]
    if not fits or {".", ".."} & set(parts) or odd:
        raise ValueError(
            f"{name[:200]!a} leads out of its folder, or is no plain name: no empty, '.' or '..' part, no backslash, "
            "no control character"
        )
    return name


def matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*` stays within a folder, and a leading `**/` stands for any folders."""
    if pattern.startswith("**/"):
        name, pattern = name.rsplit("/", 1)[-1], pattern[3:]
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def scrub(text: str) -> str:
    """`text` as one line that may be shown: no password or query of a URL, no token, no control character."""
    text = SECRET.sub("", text)
    return "".join(
        letter if unicodedata.category(letter) not in ("Cc", "Cf", "Zl", "Zp") else ascii(letter)[1:-1]
        for letter in text
    )
