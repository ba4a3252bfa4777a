"""What a user can get wrong: each ends in a non-zero exit code and one error that names it, and leaves no trace."""

import io
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.helpers import ROOT, UPSTREAM, make_run
from vista_patch import VistaConfig

PYTHON = ".venv/bin/python"
TINY_DATA, TINY_MODELS, STANDINS = (
    (PYTHON, "-m", f"scripts.miniature.{n}") for n in ("tiny_data", "tiny_models", "standins")
)
CONFIG = (PYTHON, "-m", "scripts.config", "mine", "pretrain")
TREE = (PYTHON, "-m", "vista_patch", "apply", "tree")
DATA = "results/tiny/data"
SEED = "results/tiny/seed0"
MAKE_DATA = ("scripts/data.sh", "llava-tiny")
MANIFEST = (PYTHON, "-m", "scripts.reporting.manifest")
FINETUNE = ("scripts/train.sh", "llava-tiny", "finetune")
REPORT = (PYTHON, "-m", "scripts.reporting.report", "run")


def file(name, content=""):
    """A damage: this file has this content."""

    def write(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def mine(text):
    return file("scripts/configs/mine.toml", text if isinstance(text, bytes) else f'base = "llava-tiny"\n{text}')


def tree(name, before, after):
    """A damage: a LLaVA in tree/ whose file `name` has `after` for `before`."""

    def write(folder):
        shutil.copytree(UPSTREAM, folder / "tree", ignore=shutil.ignore_patterns(".git", "__pycache__"))
        path = folder / "tree" / name
        assert before in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(before, after))

    return write


def without(name):
    return lambda folder: (folder / name).unlink()


def run(name, change):
    """A damage: a whole run in run/ with one file changed."""

    def write(folder):
        (folder / "run").mkdir()
        (path,) = make_run(folder / "run").glob(name)
        path.write_bytes(change(path.read_bytes()))

    return write


def half(data):
    return data[: len(data) // 2]


def older(data):
    """A probe as the kit measured it before it knew of facts."""
    arrays, out = dict(np.load(io.BytesIO(data))), io.BytesIO()
    np.savez(out, **{name: array for name, array in arrays.items() if not name.startswith("fact")})
    return out.getvalue()


def nan(text):
    return text.replace(b"3.0", b"NaN")


MODEL = "llava/model/language_model/llava_llama.py"
MALFORMED = {  # what is wrong: damage, command, what the error says
    # configs
    "config: no such experiment": (None, CONFIG, "no experiment 'mine'"),
    "config: near to one": (None, (*CONFIG[:3], "llava-tinny", "pretrain"), "did you mean 'llava-tiny'?"),
    "config: no TOML": (mine("ranks =\n"), CONFIG, "mine.toml: Invalid value (at line 2"),
    "config: no UTF-8": (mine(b'base = "llava-tiny"\nrun = "\xff"\n'), CONFIG, "mine.toml: 'utf-8' codec can't"),
    "config: unknown key": (mine("[pretrain]\nlerning_rate = 1.0"), CONFIG, "did you mean 'learning_rate'?"),
    "config: unknown section": (mine("[pretrian]\nlearning_rate = 1.0"), CONFIG, "did you mean 'pretrain'?"),
    "config: key in the wrong section": (mine("learning_rate = 1.0"), CONFIG, "unknown key 'learning_rate'"),
    "config: text for a number": (mine('[train]\nsave_steps = "5"'), CONFIG, "save_steps = '5' must be int, as 200"),
    "config: bool for a number": (mine("ranks = true"), CONFIG, "ranks = True must be int"),
    "config: value for a table": (mine("train = 3"), CONFIG, "train = 3 must be a table"),
    "config: unknown base": (mine(b'base = "llava-tini"'), CONFIG, "did you mean 'llava-tiny'?"),
    "config: its own base": (mine(b'base = "mine"'), CONFIG, "mine -> mine"),
    "config: base is no name": (mine(b"base = 3"), CONFIG, "no experiment 3"),
    "config: no base": (mine(b'run = "x"'), CONFIG, "has no key 'pretrain'"),
    "config: no ranks": (mine("ranks = 0"), CONFIG, "ranks 0"),
    "config: negative batch": (mine("[pretrain]\nglobal_batch = -32"), CONFIG, "global_batch -32"),
    "config: batch that ranks do not divide": (mine("ranks = 3"), CONFIG, "change one of the three"),
    "config: unknown metric": (mine('[vista]\nvista = "L2"'), CONFIG, "'L2': choose from off, l2, cosine"),
    "config: unknown ramp": (mine('[vista]\nvista_ramp = "t*m"'), CONFIG, "'t*m': choose from t/m, t, one"),
    "config: weight that is no number": (mine("[vista]\nvista_weight = nan"), CONFIG, "give a finite number"),
    "config: no tasks": (mine("tasks = []"), CONFIG, "tasks = [] must not be empty"),
    "config: a task that is a path": (mine('tasks = ["../other"]'), CONFIG, "each must be the name of a task"),
    "config: a task that is no text": (mine("tasks = [1]"), CONFIG, "each must be the name of a task"),
    "config: a string of two lines": (mine('run = "results\\n--bf16"'), CONFIG, "has a control character in it"),
    "config: unknown backbone": (mine('backbone = "qwen"'), CONFIG, "choose llava or tinyllava"),
    "config: a name that is a path": (None, (*CONFIG[:3], "../configs/llava-tiny", "pretrain"), "no experiment '../"),
    "config: unknown key to get": (None, (*CONFIG[:3], "llava-tiny", "get", "tsks"), "did you mean 'tasks'?"),
    "config: unknown stage": (None, (*CONFIG[:3], "llava-tiny", "pretran"), "'pretran'"),
    # flags
    "reproduce: unknown profile": (None, ("scripts/reproduce.sh", "--profile", "large"), "choose tiny, small or full"),
    "reproduce: flag without value": (None, ("scripts/reproduce.sh", "--seeds"), "give a number from 1 on"),
    "reproduce: unknown backbone": (
        None, ("scripts/reproduce.sh", "--backbone", "LLaVA"), "choose llava, tinyllava or both"
    ),
    "reproduce: no seeds": (None, ("scripts/reproduce.sh", "--seeds", "0"), "give a number from 1 on"),
    "reproduce: unknown flag": (None, ("scripts/reproduce.sh", "--sedes", "1"), "unknown option --sedes"),
    "reproduce: backbone of another profile": (
        None,
        ("scripts/reproduce.sh", "--profile", "small", "--backbone", "llava"),
        "--backbone llava: profile small has tinyllava alone",
    ),
    "doctor: unknown profile": (None, ("scripts/setup/doctor.sh", "huge"), "choose tiny, small, public or full"),
    "doctor: no profile": (None, ("scripts/setup/doctor.sh",), "usage: scripts/setup/doctor.sh tiny|small|public|full"),
    "env: unknown environment": (None, ("scripts/setup/env.sh", "gpu"), "choose cpu, cpu-tinyllava"),
    "upstream: unknown": (None, ("scripts/setup/upstream.sh", "LLaVA"), "choose llava, tinyllava"),
    "patch: unknown": (None, ("scripts/setup/patch.sh", "LLaVA"), "upstream/LLaVA: is no folder"),
    "train: near to an experiment": (
        None, ("scripts/train.sh", "llava-tiny-vist", "pretrain"), "did you mean 'llava-tiny-vista'"
    ),
    "train: no stage": (None, ("scripts/train.sh", "llava-tiny"), "usage: scripts/train.sh EXPERIMENT"),
    "train: unknown stage": (None, ("scripts/train.sh", "llava-tiny", "pretran"), "'pretran'"),
    "train: seed is no number": (None, ("scripts/train.sh", "llava-tiny", "pretrain", "x"), "seed 'x'"),
    "config: a stage's own term": (mine('[pretrain]\nvista = "L2"'), CONFIG, "[vista] "),
    "config: a stage's own term, a number": (mine('[finetune]\nvista = 1'), CONFIG, "[finetune] vista = 1 must be"),
    "manifest: unknown experiment": (None, (*MANIFEST, "llava-tinny"), "did you mean 'llava-tiny'"),
    "docker: unknown target": (None, (PYTHON, "docker/kit.py", "run", "gpu"), "invalid choice: 'gpu'"),
    "docker: build argument without value": (
        None, (PYTHON, "docker/kit.py", "build", "--build-arg", "BASE", "cpu"), "'BASE': give NAME=VALUE"
    ),
    "docker: results cannot be a folder": (
        file("there"), (PYTHON, "docker/kit.py", "run", "--results", "there/x", "cpu"), "there/x cannot be made"
    ),
    "tiny_data: unknown flag": (None, (*TINY_DATA, "--scene", "9"), "unrecognized"),
    "tiny_data: no scenes": (None, (*TINY_DATA, "--scenes", "0"), "'0': give a whole"),
    "tiny_data: a user's work folder": (
        file("mine.partial/photo.png"), (*TINY_DATA, "mine"), "mine.partial was not made by this"
    ),
    "tiny_models: a user's work folder": (
        lambda folder: [file("data/manifest.json", "{}")(folder), file("llama-tiny.partial/photo.png")(folder)],
        (*TINY_MODELS, "data", "llama-tiny"), "llama-tiny.partial was not made by this kit"
    ),
    "standins: a real data set lies there": (
        file("sets/lmms-lab/MME/data/test-00000-of-00001.parquet", "real"), (*STANDINS, "sets"),
        "sets/lmms-lab/MME was not made by this kit, which would replace it: move it away"
    ),
    "tiny_models: unknown model": (
        file("data/manifest.json", "{}"),
        (*TINY_MODELS, "data", "gpt"),
        "there is no model 'gpt'",
    ),
    # files that a step needs
    "data: nothing there": (None, ("scripts/data.sh", "llava-v1.5-7b"), "data/models/vicuna-7b-v1.5"),
    "data: no conversations": (None, ("scripts/data.sh", "llava-v1.5-7b"), "blip_laion_cc_sbu_558k.json"),
    "data: a changed file": (file(f"{DATA}/pretrain.json", "[]"), MAKE_DATA, "delete that folder"),
    "data: half a manifest": (file(f"{DATA}/manifest.json", '{"script": "'), MAKE_DATA, "delete that folder"),
    "train: no first stage": (None, FINETUNE, "run the pretrain stage first"),
    "train: no upstream": (
        lambda folder: [file(f"{SEED}/llava-tiny-pretrain/done")(folder), without("upstream")(folder)],
        FINETUNE, "run scripts/setup/upstream.sh llava"
    ),
    "train: no environment": (
        lambda folder: [mine('environment = ".venv-none"')(folder), file(f"{SEED}/mine-pretrain/done")(folder)],
        ("scripts/train.sh", "mine", "finetune"), "make it with scripts/setup/env.sh"
    ),
    "train: begun with other settings": (
        file(f"{SEED}/llava-tiny-pretrain/command", "deepspeed --num_gpus 2"),
        ("scripts/train.sh", "llava-tiny", "pretrain"), "begun with other settings: remove it"
    ),
    "train: begun with another learning rate": (
        file(
            f"{SEED}/llava-tiny-pretrain/command",
            "1 ranks: scripts/train.py --train_module llava.train.train --learning_rate 0.5\n",
        ),
        ("scripts/train.sh", "llava-tiny", "pretrain"), "learning_rate was 0.5, is 0.005"
    ),
    "train: a lock that is a link": (
        lambda folder: [
            (folder / SEED / "llava-tiny-pretrain").mkdir(parents=True),
            (folder / SEED / "llava-tiny-pretrain/.lock0").symlink_to(folder / "docker/Dockerfile"),
        ],
        ("scripts/train.sh", "llava-tiny", "pretrain"), "Remove it if it is a link"
    ),
    "upstream: a user's own checkout": (
        lambda folder: [(folder / "upstream").unlink(), file("upstream/llava/mine.py")(folder)],
        ("scripts/setup/upstream.sh", "llava"), "upstream/llava was not made by this script"
    ),
    "eval: a seed that is a path": (None, ("scripts/eval.sh", "llava-tiny", "0/../../x"), "seed '0/../../x'"),
    "eval: not trained": (None, ("scripts/eval.sh", "llava-tiny"), "train this experiment first"),
    "manifest: no upstream": (without("upstream"), (*MANIFEST, "llava-tiny"), "scripts/setup/upstream.sh llava"),
    "manifest: no environment": (None, (*MANIFEST, "llava-v1.5-7b"), ".venv-llava is missing: make it with"),
    # source trees
    "source: no folder": (None, TREE, "tree: is no folder"),
    "source: a file": (file("tree"), TREE, "tree: is no folder"),
    "source: no LLaVA": (file("tree/train.py", "print()"), TREE, "tree: "),
    "source: syntax error": (tree(MODEL, b"def forward(", b"def forward(("), TREE, f"{MODEL}:"),
    "source: edited lines": (tree(MODEL, b"import vista_patch\n", b"import vista_patch as v\n"), TREE, f"{MODEL}:28: "),
    "source: splice of another shape": (
        tree(MODEL, b"inputs_embeds,\n                labels\n", b"inputs_embeds\n"), TREE, MODEL
    ),
    # result files
    "report: no folder": (None, REPORT, "run: is not a folder"),
    "report: half a result": (run("seed0/eval/llava-tiny-vista/digits/*/*_results.json", half), REPORT, "eval.sh"),
    "report: half a log": (run("seed0/llava-tiny-finetune/trainer_state.json", half), REPORT, "not a trainer state"),
    "report: a NaN loss": (run("seed0/llava-tiny-finetune/trainer_state.json", nan), REPORT, "not finite"),
    "report: half a probe": (run("seed0/probe/llava-tiny-vista.npz", half), REPORT, "probe.sh llava-tiny-vista 0"),
    "report: a probe of an older kit": (
        run("seed0/probe/llava-tiny-vista.npz", older), REPORT, "without fact_right, fact_token"
    ),
    "report: half a manifest": (run("manifest-llava.json", half), REPORT, "scripts.reporting.manifest"),
    "report: half the conversations": (run("data/finetune.json", half), REPORT, "scripts/data.sh"),
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """What a user has after `make setup`, to damage."""
    for name in ("docker", "patches", "scripts", "vista_patch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "upstream").symlink_to(ROOT / "upstream")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("damage, command, message", MALFORMED.values(), ids=MALFORMED)
def test_is_one_error_that_names_it(checkout, damage, command, message):
    if damage:
        damage(checkout)
    before = contents(checkout)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ".", "DOCKER_HOST": "unix:///nowhere"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode > 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(checkout) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metric": "L2"}, "choose from off, l2, cosine"),
        ({"reduction": "avg"}, "choose from mean, sum"),
        ({"weight": float("inf")}, "give a finite number, 0 or more"),
        ({"weight": "1"}, "give a finite number, 0 or more"),
        ({"detach_text": 1}, "give true or false"),
        ({"metrik": "l2"}, "did you mean metric?"),
        ("l2", "model.config.vista is 'l2'"),
    ],
)
def test_settings_of_a_model(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VistaConfig.from_dict(settings)
