"""scripts/data/sources.toml, where its keys are explained: where the data and weights of the experiments come from.

Needs nothing but Python's own library: a dry run of a bare clone reads it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts import config

DATA = Path("data")
CATALOG = Path(__file__).with_name("sources.toml")


class DataError(Exception):
    """What the user must mend; its text is the whole message."""


class Expected(NamedTuple):
    """What is known of a file before it is downloaded."""

    bytes: int
    sha256: str = ""  # as the source itself tells it, or as it is pinned
    pinned: bool = False  # by the catalog, or by data/sources.lock.json


@dataclass
class Source:
    """A table of scripts/data/sources.toml, where its keys are explained."""

    name: str
    to: Path
    licence: str = ""
    url: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    repo: str = ""
    type: str = "model"
    revision: str = ""
    only: list[str] = field(default_factory=list)
    unpack: bool = False
    files: int = 0
    of: str = ""
    below: str = ""
    every: int = 0
    parts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    generation_config: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.to = Path(self.to)
        self.sums = DATA / ".sums" / self.name
        self.partial = self.to.with_name(self.to.name + ".partial")
        self.downloads = self.partial / "download"
        self.expected: dict[str, Expected] = {}  # plan() fills it in


def needed(loaded: config.Config) -> tuple[list[Source], list[Path]]:
    """Of a config: its sources, and the paths that no source provides. Raises DataError."""
    try:
        sources = [Source(name, **table) for name, table in config.tomllib.loads(CATALOG.read_text("utf-8")).items()]
    except (config.tomllib.TOMLDecodeError, TypeError) as error:
        raise DataError(f"{CATALOG}: {error}") from None
    if loaded["checkpoint"]:
        paths = {Path(loaded["checkpoint"])}
    else:
        stages = [loaded["train"] | loaded[stage] for stage in config.STAGES]
        keys = ("data_path", "image_folder", "model_name_or_path", "vision_tower")
        paths = {Path(stage[key]) for stage in stages for key in keys}
        paths |= {Path(source.of) for source in sources if source.of and source.to in paths}
    chosen = [s for s in sources if paths & {s.to, *s.to.parents} or set(loaded["tasks"]) & set(s.tasks)]
    parts = {part for source in chosen for part in source.parts}
    chosen += [source for source in sources if source.name in parts and source not in chosen]
    provided = {path for source in chosen for path in (source.to, *source.to.parents)}
    return chosen, sorted(paths - provided)
