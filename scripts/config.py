"""Named experiments: scripts/configs/NAME.toml as flags of stock train.py.

python -m scripts.config NAME get KEY...        top-level keys, one value per line
python -m scripts.config NAME pretrain|finetune the stage's flags, one word per line

A config changes keys of its `base` and adds none; a stage may have [vista]'s keys of its own. A wrong name, key or
type is one error that names the nearest right one, and exit code 2. What a machine may differ in, the environment can
say instead of the config: RANKS (GPUs in all), PER_DEVICE (per_device_train_batch_size), REPORT_TO and RUN_FOLDER (run:
where results go); the global batch stays.
"""

import difflib
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from scripts.common import Arguments
from vista_patch.config import FLAGS, VistaConfig, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

USAGE = "python -m scripts.config NAME get KEY... | NAME pretrain|finetune"
CONFIGS = Path(__file__).parent / "configs"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of an experiment and of a task: a folder's name
STAGES = ("pretrain", "finetune")
PROFILES = ("tiny", "small", "public", "full")  # of setup/doctor.sh
CHOICES = {"backbone": ("llava", "tinyllava"), "profile": PROFILES, "unlabelled": ("stop", "skip")}
VARIABLES = {  # what the environment can say, and the key that it takes the place of
    "RANKS": "ranks", "PER_DEVICE": "per_device_train_batch_size", "REPORT_TO": "report_to", "RUN_FOLDER": "run",
}  # fmt: skip
Config = dict[str, Any]


class ConfigError(Exception):
    pass


def load(name: str, ranks: int | None = None, tasks: list[str] | None = None) -> Config:
    """The named config over its bases, and over it what the environment (or `ranks`) says. Raises ConfigError.

    tasks: in the place of the config's, if there are any."""
    config = _read(name)
    for key in (*STAGES, "train", "vista", "tasks", "run", "checkpoint", *CHOICES):
        if key not in config:
            raise ConfigError(f"{name} has no key {key!r}: give it a base")
    variables = os.environ if ranks is None else {**os.environ, "RANKS": str(ranks)}
    for variable, key in VARIABLES.items():
        if not (given := variables.get(variable)):
            continue
        for table in (config, config["pretrain"], config["finetune"], config["train"]):
            if isinstance(table.get(key), int):
                if not re.fullmatch(r"[1-9][0-9]{0,8}", given, re.ASCII):
                    raise ConfigError(f"{variable}={given}: give a whole number from 1 on")
                table[key] = int(given)
            elif key in table:
                table[key] = given
    config["tasks"] = tasks or config["tasks"]
    _check(config, name)
    return config


def _check(config: Config, where: str) -> None:
    """What holds for every config. Its strings become paths, words of commands and lines of files."""
    for key, value in config.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, dict):
                _check(text, f"{where}: [{key}]")
            elif isinstance(text, str) and not text.isprintable():
                raise ConfigError(f"{where}: {key} = {text!r} has a control character in it")
        if value == []:
            raise ConfigError(f"{where}: {key} = [] must not be empty")
        if key == "tasks" and not all(isinstance(task, str) and NAME.fullmatch(task) for task in value):
            raise ConfigError(f"{where}: tasks = {value!r}: each must be the name of a task")
        if key in CHOICES and value not in CHOICES[key]:
            *first, last = CHOICES[key]
            raise ConfigError(f"{where}: {key} = {value!r}: choose {', '.join(first)} or {last}")


def seed(text: str) -> str:
    """A seed as it stands in a folder's name. Raises ConfigError."""
    if not re.fullmatch(r"0|[1-9][0-9]*", text, re.ASCII) or int(text) >= 2**32:
        raise ConfigError(f"seed {text!r}: give a number from 0 on, below 2^32")
    return text


def _read(name: str, above: tuple[str, ...] = ()) -> Config:
    path = CONFIGS / f"{name}.toml"
    if not (isinstance(name, str) and NAME.fullmatch(name) and path.is_file()):
        raise ConfigError(f"no experiment {name!r}: {_nearest(str(name), [p.stem for p in CONFIGS.glob('*.toml')])}")
    if name in above:
        raise ConfigError(f"{path}: the bases go round: {' -> '.join([*above, name])}")
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path}: {error}") from None
    base = config.pop("base", None)
    return _override(_read(base, (*above, name)), config, f"{path}: ") if base else config


def _override(base: Config, changes: Config, where: str, also: Config | None = None) -> Config:
    """base with changes. also: keys that base has not, and changes may have."""
    merged, base = dict(base), {**(also or {}), **base}
    for key, value in changes.items():
        if key not in base:
            hint = nearest(key, {name: flag for flag, name in FLAGS.items()}) if "vista_weight" in merged else None
            raise ConfigError(f"{where}unknown key {key!r}: {hint or _nearest(key, list(base))}")
        if isinstance(base[key], dict) and isinstance(value, dict):
            value = _override(base[key], value, f"{where}[{key}] ", base.get("vista") if key in STAGES else None)
        elif isinstance(base[key], float) and type(value) is int:
            value = float(value)
        elif type(value) is not type(base[key]):
            right = "a table" if isinstance(base[key], dict) else f"{type(base[key]).__name__}, as {base[key]!r}"
            raise ConfigError(f"{where}{key} = {value!r} must be {right}")
        merged[key] = value
    return merged


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(words))}"


def vista(config: Config, stage: str) -> Config:
    """[vista] as one stage has it."""
    return {key: config[stage].get(key, value) for key, value in config["vista"].items()}


def settings(config: Config, stage: str) -> dict[str, str]:
    """{flag: value} of one stage of stock.py. Accumulation keeps the global batch whatever the number of ranks."""
    stage_flags = dict(config[stage])
    global_batch, per_device = stage_flags.pop("global_batch"), stage_flags["per_device_train_batch_size"]
    at_once = per_device * config["ranks"]
    accumulate, rest = divmod(global_batch, at_once) if at_once > 0 else (0, 0)
    if rest or accumulate < 1:
        raise ConfigError(
            f"[{stage}] global_batch {global_batch} is not a multiple of per_device_train_batch_size {per_device} "
            f"x ranks {config['ranks']}: change one of the three (PER_DEVICE and RANKS set the last two)"
        )
    try:
        VistaConfig.from_arguments(vista(config, stage))
    except ValueError as error:
        raise ConfigError(f"[vista] {error}") from None
    values = {**config["train"], **stage_flags, **vista(config, stage), "gradient_accumulation_steps": accumulate}
    if config["unlabelled"] != "stop":  # stock.py's own flag
        values["unlabelled"] = config["unlabelled"]
    return {key: str(value) for key, value in values.items()}


def flags(config: Config, stage: str) -> list[str]:
    """`settings` as words of a command."""
    return [word for key, value in settings(config, stage).items() for word in (f"--{key}", value)]


def main(argv: list[str]) -> int:
    parser = Arguments(prog="config", usage=USAGE, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("what", nargs="+")
    args = parser.parse_args(argv)
    try:
        config = load(args.experiment)
        match args.what:
            case ["get", *keys] if keys:
                values: list[object] = []
                for key in keys:
                    if key not in config or isinstance(config[key], dict):
                        raise ConfigError(f"{args.experiment} has no key {key!r}: {_nearest(key, list(config))}")
                    values += config[key] if isinstance(config[key], list) else [config[key]]
                print(*values, sep="\n")
            case ["pretrain" | "finetune" as stage]:
                print(*flags(config, stage), sep="\n")
            case [stage, *_]:
                raise ConfigError(f"no stage {stage!r}: choose pretrain or finetune")
    except ConfigError as error:
        print(f"config: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
