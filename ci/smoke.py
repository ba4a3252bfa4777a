"""The smoke test that runs inside the image: baseline and VISTA (l2) of the miniature, data to evaluation, and whether
what came out is right (ci/smoke_checks.py); then the tests of the loss, the model and stock training on a CPU.

Without BACKBONEs: each that is in upstream/. On a GPU the configs are *-tiny-gpu: bf16, flash-attn, gradient
checkpointing, ZeRO-2 and then ZeRO-3, on the exact pins; CUDA_VISIBLE_DEVICES holds, and hides GPUs where it is empty.
What was cut off continues. Results: results/smoke.xml (JUnit) and results/smoke.md (a page).
"""

import os
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from scripts.common import ROOT, Arguments, Job, need_setup, run_abreast, signals_raise, start

TESTS = (
    "ci/smoke_checks.py",
    "tests/test_loss.py",
    "tests/test_model.py",
    "tests/test_training.py",
    "tests/test_cluster.py",
)


def sees_gpus() -> bool:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        driver = subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except OSError:
        return False
    return driver and first not in ("", "-1", "NoDevFiles")


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    usage = "ci/smoke.sh [BACKBONE]..."
    parser = Arguments(prog="smoke", usage=usage, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*")
    args = parser.parse_args(argv)
    need_setup("smoke")
    here = sorted(path.name for path in Path("upstream").iterdir() if path.is_dir() and path.name[0] != ".")
    gpu = "-gpu" if sees_gpus() else ""
    baselines = [f"{backbone}-tiny" for backbone in args.backbones or here]

    def job(*words: str, **variables: str) -> Job:
        return Job(lambda: start(words, env=os.environ | variables))

    lanes = [
        [
            job("scripts/train.sh", name, "pretrain"),
            job("scripts/train.sh", name, "finetune"),
            job("scripts/eval.sh", name),
            job("scripts/probe.sh", name),
        ]
        for baseline in baselines
        for name in (f"{baseline}{gpu}", f"{baseline}{gpu}-vista")
    ]
    words = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "--junitxml", "results/smoke.xml")
    checks = job(*words, SMOKE=" ".join(f"{baseline}{gpu}" for baseline in baselines))
    with signals_raise():
        well = (
            run_abreast([[job("scripts/data.sh", baseline) for baseline in baselines]], 1)
            and run_abreast(lanes, 1 if gpu else os.cpu_count() or 1, go_on=True)
            and run_abreast([[checks]], 1)
        )
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
