"""The data sets and the judge that the paper's suite needs (suite.toml), before lmms-eval runs."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts.common import write_whole
from scripts.evaluation.results import load_challenges, load_columns
from scripts.outside import checked_name, scrub

VIEWS = ".cache/sets"  # below EVAL_DATA: what `view` makes
STOCK_JUDGE = "gpt-3.5-turbo-0613"  # of lmms_eval/tasks/mmbench/mmbench.yaml


def view(data: Path, name: str) -> Path:
    """The data set data/OWNER/NAME for datasets 2.16.1, which fails where the first config of its card is not there: a
    folder of links to what holds data files alone (`datasets` runs a script OWNER/NAME/NAME.py), with a card that names
    what is there. At the same place each time, by which its conversions are cached. Raises ValueError where the data
    set is not there, or not all of it, or its card names files outside."""
    folder, card = data / name, data / name / "README.md"
    files = list(folder.rglob("*.parquet"))
    if not files or not card.exists():
        raise ValueError(f"the data set {name} is not in {folder}: download it (scripts/data.sh)")
    for path in files:  # test-00003-of-00068.parquet
        if match := re.fullmatch(r"(.*-)\d+-of-(\d+).*", path.name):
            have, count = len(list(path.parent.glob(f"{match[1]}*-of-{match[2]}*"))), int(match[2])
            if have < count:
                raise ValueError(f"{path.parent} has {have} of {count} {match[1]}* files: download {name} again")
    text = card.read_text("utf-8")
    try:
        head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
        text = narrowed(folder, head) or text
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{card} is no card of a data set: {scrub(str(error))}") from None
    view = data / VIEWS / name
    view.mkdir(parents=True, exist_ok=True)
    # Folders, not files: `datasets` finds no file that is a link.
    links = {view / part: folder / part for part in {path.relative_to(folder).parts[0] for path in files}}
    for old in view.iterdir():  # of an earlier kit, or of files that are gone
        if old.is_symlink() and old not in links:
            old.unlink()
    for link, path in links.items():
        if not link.is_symlink() or link.readlink() != path.absolute():
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())
    if not (view / card.name).exists() or (view / card.name).read_text("utf-8") != text:
        write_whole(view / card.name, text)
    return view


def narrowed(folder: Path, head: dict[str, Any]) -> str:
    """A card's text with those of its configs whose files are in the folder; "" where it has no configs."""
    if "configs" in head:

        def there(data_files: Any) -> bool:
            return any(any(folder.glob(checked_name(pattern))) for pattern in patterns(data_files))

        for config in head["configs"]:
            checked_name(config.get("data_dir") or "x")
        configs = [config for config in head["configs"] if there(config.get("data_files", "*"))]
        for config in configs:  # and of its splits those that are there, without the row counts of all
            if isinstance(config.get("data_files"), list):
                config["data_files"] = [entry for entry in config["data_files"] if there(entry)]
        infos = head.get("dataset_info", [])
        for info in infos if isinstance(infos, list) else [infos]:
            info.pop("splits", None)
        return f"---\n{yaml.safe_dump(head | {'configs': configs})}---\n"
    return ""


def patterns(data_files: Any) -> list[str]:
    """The paths in a config's data_files, in each form that a card may have."""
    if isinstance(data_files, list):
        return [pattern for entry in data_files for pattern in patterns(entry)]
    return patterns(data_files["path"]) if isinstance(data_files, dict) else [data_files]


def data_of(task: str) -> str | None:
    """The data set that a task of the paper's suite reads: its folder below EVAL_DATA, whose last two parts are the
    hub's name."""
    if challenge := load_challenges().get(task):
        return challenge.data
    return next((column.data for column in load_columns({task}) if column.data), None)


def make_ready(data: Path, tasks: Sequence[str]) -> list[str]:
    """Makes the `view` of each data set that these tasks read. What is missing, a line each."""
    problems = []
    for name in dict.fromkeys(filter(None, map(data_of, tasks))):
        try:
            view(data, name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def judge() -> str | None:
    """What is wrong with the judge, or None."""
    import requests

    url, model = os.environ["MMBENCH_JUDGE"], os.environ.get("MMBENCH_MODEL", STOCK_JUDGE)
    message = {"role": "user", "content": "Say A."}
    question: dict[str, Any] = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 16}
    key = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    try:
        reply = requests.post(url, json=question, headers=key, timeout=60)
        reply.raise_for_status()
        reply.json()["choices"][0]["message"]["content"].strip()
    except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
        return (
            f"MMBench's judge, {model} at {scrub(url)}, does not answer ({type(error).__name__}: {scrub(str(error))}): "
            "check MMBENCH_JUDGE, MMBENCH_MODEL and OPENAI_API_KEY"
        )
    return None
