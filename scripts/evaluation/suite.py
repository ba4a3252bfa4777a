"""What scripts/eval.sh asks about the paper's suite (scripts/evaluation/suite.toml), before and after lmms-eval runs.

python -m scripts.evaluation.suite data FOLDER TASK...
    the data sets that these tasks read, FOLDER/OWNER/NAME, made ready as FOLDER/.cache/sets/OWNER/NAME
python -m scripts.evaluation.suite judge
    whether MMBench's judge at $MMBENCH_JUDGE answers, in one request
python -m scripts.evaluation.suite whole FOLDER TASK OLD
    whether FOLDER/*/ holds whole results of TASK, newer than the file OLD

What is missing is one error each, and exit code 2. `whole` exits with 1 where it says no.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import tomllib
import yaml

from scripts.outside import checked_name, scrub

COLUMNS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["column"]
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
            there, count = len(list(path.parent.glob(f"{match[1]}*-of-{match[2]}*"))), int(match[2])
            if there < count:
                raise ValueError(f"{path.parent} has {there} of {count} {match[1]}* files: download {name} again")
    text = card.read_text("utf-8")
    try:
        head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
        text = narrowed(folder, head) or text
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{card} is no card of a data set: {scrub(str(error))}") from None
    view = data / ".cache/sets" / name
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
        partial = view / f"{os.getpid()}.partial"
        partial.write_text(text, "utf-8")
        partial.rename(view / card.name)
    return view


def narrowed(folder: Path, head: dict) -> str:
    """A card's text with those of its configs whose files are in the folder; "" where it has no configs."""
    if "configs" in head:

        def there(data_files: str | dict | list) -> bool:
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


def patterns(data_files: str | dict | list) -> list[str]:
    """The paths in a config's data_files, in each form that a card may have."""
    if isinstance(data_files, list):
        return [pattern for entry in data_files for pattern in patterns(entry)]
    return patterns(data_files["path"]) if isinstance(data_files, dict) else [data_files]


def whole(folder: Path, task: str, old: Path) -> bool:
    """lmms-eval exits 0 even when a run fails, so its files decide: the columns (of a task that is none of the paper's:
    every metric) are numbers, and each sample is logged."""
    files = list(folder.glob("*/[0-9]*_results.json"))
    if len(files) != 1 or files[0].stat().st_mtime < old.stat().st_mtime:
        return False
    results = json.loads(files[0].read_text())
    values = results["results"].get(task, {})
    if columns := [column for column in COLUMNS if column["task"] == task]:
        metrics = [values.get(column["key"]) for column in columns]
        metrics = [
            metric.get(column["field"]) if isinstance(metric, dict) and "field" in column else metric
            for metric, column in zip(metrics, columns, strict=True)
        ]
    else:
        metrics = [value for key, value in values.items() if "," in key and "_stderr" not in key]
    samples = files[0].with_name(files[0].name.replace("_results.json", f"_samples_{task}.jsonl"))
    lines = samples.read_text().count("\n") if samples.exists() else 0
    numbers = metrics and all(isinstance(metric, int | float) and math.isfinite(metric) for metric in metrics)
    return bool(numbers) and lines == results["n-samples"][task]["effective"]


def judge() -> str | None:
    """What is wrong with the judge, or None."""
    import requests

    url, model = os.environ["MMBENCH_JUDGE"], os.environ.get("MMBENCH_MODEL", STOCK_JUDGE)
    question = {"model": model, "messages": [{"role": "user", "content": "Say A."}], "temperature": 0, "max_tokens": 16}
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


def main(argv: list[str]) -> int:
    problems = []
    match argv:
        case ["whole", folder, task, old]:
            return not whole(Path(folder), task, Path(old))
        case ["judge"]:
            problems = [problem for problem in [judge()] if problem]
        case ["data", folder, *tasks]:
            for name in dict.fromkeys(column["data"] for column in COLUMNS if column["task"] in tasks):
                try:
                    view(Path(folder), name)
                except ValueError as error:
                    problems.append(str(error))
        case _:
            problems = [__doc__.strip()]
    for problem in problems:
        print(f"eval: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
