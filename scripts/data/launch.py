"""The images, conversations, pre-trained parts and evaluation sets that an experiment's config names.

For the miniature it makes them (scripts/miniature/tiny_data.py, tiny_models.py), for the others it downloads them
(scripts/data/download.py, sources.toml). Then it checks every training row and its picture (scripts/data/rows.py).
--tasks: the data sets of these instead of the config's. --offline only checks and names what is missing; --verify
hashes every file again; --decode decodes every picture whole.
TINY_DATA and TINY_MODELS are flags for the first two, by which tests make a smaller miniature: TINY_DATA="--scenes 100"
TINY_MODELS="--vision-steps 20".
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from scripts import common, config
from scripts.common import ROOT, Arguments, Job, fail, need_setup, run_abreast, signals_raise, start


def make_miniature(loaded: config.Config) -> bool:
    data = Path(loaded["pretrain"]["data_path"]).parent
    models = sorted({loaded["train"][key] for key in ("model_name_or_path", "vision_tower")})
    python = (sys.executable, "-m")

    def job(flags: str, threads: dict[str, str], *words: object) -> Job:
        command = [*python, *map(str, words), *os.environ.get(flags, "").split()]
        return Job(lambda: start(command, env={**os.environ, **threads}))

    # Abreast, one thread each: sums over more would depend on their number.
    one = {"OMP_NUM_THREADS": "1"}
    made = [[job("TINY_MODELS", one, "scripts.miniature.tiny_models", data, model)] for model in models]
    with signals_raise():
        return run_abreast([[job("TINY_DATA", {}, "scripts.miniature.tiny_data", data)]], 1) and run_abreast(
            made, len(made), go_on=True
        )


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    usage = "scripts/data.sh EXPERIMENT [--tasks TASK...] [--offline] [--verify] [--decode]"
    parser = Arguments(prog="data", usage=usage, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    args, _ = parser.parse_known_args(argv)
    try:
        loaded = config.load(args.experiment)
    except config.ConfigError as error:
        fail("data", str(error))
    need_setup("data")
    if loaded["profile"] == "tiny" and not make_miniature(loaded):
        return 1
    os.execv(sys.executable, [sys.executable, "-m", "scripts.data.download", *argv])


if __name__ == "__main__":
    common.run("data", main)
