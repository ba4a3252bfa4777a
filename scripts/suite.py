"""What scripts/eval.sh asks about the paper's suite (scripts/suite.toml), before and after lmms-eval runs.

python scripts/suite.py data TASK...           "OWNER/NAME SNAPSHOT" for each data set of these tasks in the hub's cache
                                               ($HF_HOME, data/hub if that is not set)
python scripts/suite.py judge                  whether MMBench's judge at $MMBENCH_JUDGE answers, in one request
python scripts/suite.py whole FOLDER TASK OLD  whether FOLDER/*/ holds whole results of TASK, newer than the file OLD

What is missing is one error each, and exit code 2. `whole` exits with 1 where it says no.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import tomllib

COLUMNS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["column"]
STOCK_JUDGE = "gpt-3.5-turbo-0613"  # of lmms_eval/tasks/mmbench/mmbench.yaml


def snapshot(name: str) -> Path:
    """The folder of a data set in the hub's cache. Raises ValueError where it is not there, or not all of it."""
    folder = Path(os.environ.get("HF_HOME", "data/hub"), "hub", f"datasets--{name.replace('/', '--')}")
    found = list(folder.glob("snapshots/*/"))
    if len(found) > 1 and (folder / "refs/main").exists():
        found = [folder / "snapshots" / (folder / "refs/main").read_text()]
    if len(found) != 1 or not (found[0] / "README.md").exists():
        raise ValueError(f"the data set {name} is not in {folder}: download it (scripts/data.sh)")
    shards = {}  # data/validation-00003-of-00068.parquet
    for path in found[0].rglob("*.parquet"):
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(-[0-9a-f]+)?", path.stem):
            shards.setdefault((path.parent, match[1], int(match[3])), []).append(path.exists())
    for (parent, split, count), there in shards.items():
        if sum(there) < count:
            raise ValueError(f"{parent}/{split} has {sum(there)} of {count} files: download {name} again")
    if not shards:
        raise ValueError(f"{found[0]} holds no parquet files: download {name} again")
    return found[0].resolve()


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
            f"MMBench's judge, {model} at {url}, does not answer ({type(error).__name__}: {error}): "
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
        case ["data", *tasks]:
            for name in dict.fromkeys(column["data"] for column in COLUMNS if column["task"] in tasks):
                try:
                    print(name, snapshot(name))
                except ValueError as error:
                    problems.append(str(error))
        case _:
            problems = [__doc__.strip()]
    for problem in problems:
        print(f"eval: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
