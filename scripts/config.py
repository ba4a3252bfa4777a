"""Named experiments: scripts/configs/NAME.toml as flags of stock train.py.

python -m scripts.config NAME get KEY           a top-level key, one value per line
python -m scripts.config NAME pretrain|finetune the stage's flags, one word per line

A config changes keys of its `base` and adds none. A wrong name, key or type is one error that names the nearest
right one, and exit code 2. What a machine may differ in, the environment can say instead of the config: RANKS (GPUs in
all), PER_DEVICE (per_device_train_batch_size) and REPORT_TO; the global batch stays.
"""

import difflib
import os
import sys
from pathlib import Path

from vista_patch.config import FLAGS, VistaConfig, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"


class ConfigError(Exception):
    pass


def load(name: str) -> dict:
    """The named config over its bases, and RANKS, PER_DEVICE and REPORT_TO over that. Raises ConfigError."""
    config = _read(name)
    tables = {
        "RANKS": ("ranks", [config]),
        "PER_DEVICE": ("per_device_train_batch_size", [config["pretrain"], config["finetune"]]),
        "REPORT_TO": ("report_to", [config["train"]]),
    }
    for variable, (key, where) in tables.items():
        if value := os.environ.get(variable):
            if isinstance(where[0][key], int):
                if not value.isdecimal() or int(value) < 1:
                    raise ConfigError(f"{variable}={value}: give a whole number from 1 on")
                value = int(value)
            for table in where:
                table[key] = value
    return config


def _read(name: str, above: tuple[str, ...] = ()) -> dict:
    path = CONFIGS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no experiment {name!r}: {_nearest(str(name), [p.stem for p in CONFIGS.glob('*.toml')])}")
    if name in above:
        raise ConfigError(f"{path}: the bases go round: {' -> '.join([*above, name])}")
    try:
        config = tomllib.loads(path.read_text())
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path}: {error}") from None
    base = config.pop("base", None)
    return _override(_read(base, (*above, name)), config, f"{path}: ") if base else config


def _override(base: dict, changes: dict, where: str) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        if key not in base:
            hint = nearest(key, {name: flag for flag, name in FLAGS.items()}) if "vista_weight" in base else None
            raise ConfigError(f"{where}unknown key {key!r}: {hint or _nearest(key, list(base))}")
        if isinstance(base[key], dict) and isinstance(value, dict):
            value = _override(base[key], value, f"{where}[{key}] ")
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


def flags(config: dict, stage: str) -> list[str]:
    """Flags for one stage of train.py. Accumulation keeps the global batch whatever the number of ranks."""
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
        VistaConfig.from_arguments(config["vista"])
    except ValueError as error:
        raise ConfigError(f"[vista] {error}") from None
    values = {**config["train"], **stage_flags, **config["vista"], "gradient_accumulation_steps": accumulate}
    words = []
    for key, value in values.items():
        words += [f"--{key}", str(value)]
    return words


def main(argv: list[str]) -> int:
    try:
        match argv:
            case [name, "get", key]:
                config = load(name)
                if key not in config or isinstance(config[key], dict):
                    raise ConfigError(f"{name} has no key {key!r}: {_nearest(key, list(config))}")
                value = config[key]
                print(*(value if isinstance(value, list) else [value]), sep="\n")
            case [name, "pretrain" | "finetune" as stage]:
                print(*flags(load(name), stage), sep="\n")
            case [_, stage]:
                raise ConfigError(f"no stage {stage!r}: choose pretrain or finetune")
            case _:
                raise ConfigError(__doc__.strip())
    except KeyError as error:
        print(f"config: {argv[0]} has no key {error}: give it a base", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(f"config: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
