"""A part of a training list, which follows from the whole one by the rule in its table of sources.toml.

of: the whole list. below: of its rows only those whose picture lies there; what it is called below it is kept.
every: of these rows the first, and each that comes so many after.
"""

import json
from pathlib import Path

from scripts.data import rows
from scripts.data.catalog import DataError


def rule(of: Path, below: str, every: int) -> str:
    where = f" with a picture below {below}" if below else ""
    return f"one in {every} of the rows of {of}{where}"


def part(of: Path, below: str, every: int) -> bytes:
    """The list as a file: the same bytes everywhere. Raises DataError where the rule gives no rows."""
    found = rows.read(of)
    if below:
        found = [row for row in found if isinstance(row, dict) and str(row.get("image", "")).startswith(below)]
        found = [row | {"image": row["image"].removeprefix(below)} for row in found]
    if not found:
        raise DataError(f"{of} has no row with a picture below {below}: no part of it can be drawn")
    return json.dumps(found[::every], indent=0).encode()
