"""README and docs: short, plain, every link exists, and every command that they print runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, ROWS, UPSTREAM, batch

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def prose(text):
    """The page without its blocks of code: one string for each heading, list item, table cell or paragraph."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "CODE", text)  # a command or a name counts as a word
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    units = []
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith("|"):
            units += [cell for line in block.splitlines() for cell in line.split("|")]
        else:
            units += re.split(r"^\s*(?:[-*] |\d+\. |#+ )", block, flags=re.MULTILINE)
    return [" ".join(unit.split()) for unit in units if unit.strip()]


def sentences(text):
    return [part for unit in prose(text) for part in re.split(r"(?<=[.!?])[*)]* +|(?<=[a-z]\)\.) +| · ", unit)]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_sentence_is_over_25_words(page):
    assert not [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > 25]


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_exists(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_readmes_python_runs(make_model, tmp_path, capsys):
    """Each block in ten lines at most, on a small LLaVA; each says what the term was."""
    from torch.optim import SGD
    from transformers import Trainer, TrainingArguments

    import vista_patch

    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    rows = [{key: value[0] for key, value in batch([ROWS[0]]).items()}] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    for block in blocks:
        model = make_model()
        names = {
            "vista_patch": vista_patch,
            "model": model,
            "batches": [batch()] * 2,
            "optimizer": SGD(model.parameters(), 0.1),
        }
        assert len(block.splitlines()) <= 10
        exec(block, names | {"Trainer": Trainer, "arguments": arguments, "rows": rows})
        assert "'loss_vista': " in capsys.readouterr().out
    assert len(blocks) == 2


# -- the commands

COMMAND = re.compile(r"(\w+=\S+ )*(make|pip|scripts/\S+|ci/\S+|docker/\S+|\.venv/\S+|python|apt-get|taskset) \S.*")


def printed(page):
    """The commands of a page's ```bash blocks, without comments, and those in its text that have arguments."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*", "", line) for line in blocks.splitlines()]
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code for code in re.findall(r"`([^`]+)`", text) if COMMAND.fullmatch(" ".join(code.split()))]
    return [" ".join(command.split()) for command in lines + inline if command.strip()]


COMMANDS = sorted({command for page in PAGES for command in printed(page)})
PATCHED = "python -m vista_patch apply LLaVA && "
# How a command is tried here where it would take long or wants another machine: a pattern, and what runs in its place.
SHORT = {
    r"make (.+)": r"make --dry-run \1",
    r"(scripts/reproduce\.sh.*--dry-run)": r"\1",
    r"(.*scripts/reproduce\.sh.*)": r"\1 --dry-run",
    r"scripts/docker_run\.sh (?:--dry-run )?(.*)": r"scripts/docker_run.sh --dry-run \1",
    r"(DRY_RUN=1 scripts/train\.sh .*)": r"\1",
    r"((?:\w+=\S+ )?scripts/(?:data|docker_build|eval|probe|train)\.sh) .*": r"\1 --help",
    r"(.*pytest .*)": r"\1 --collect-only -q",
    r"taskset -c 1 (.*) --write": r"\1 --help",
    r"(\.venv/bin/python -m scripts\.reporting\.report) .*": r"\1 --help",
    r"pip install \.": ".uv/bin/uv venv -q new && .uv/bin/uv pip install -q --python new --no-deps . && "
    "new/bin/python -m vista_patch --help",
    r"python -m vista_patch check PATH": "python -m vista_patch check LLaVA || [ $? = 1 ]",  # 1: stock
    r"python -m vista_patch apply PATH": "python -m vista_patch apply LLaVA",
    r"python -m vista_patch revert PATH": PATCHED + "python -m vista_patch revert LLaVA",
    r"deepspeed (llava/train/train)_mem\.py --vista l2 \.\.\.": PATCHED
    + r"cd LLaVA && PYTHONPATH=. python \1.py --help | grep -e --vista",
}
NOT_HERE = {  # and why
    r"sbatch .*": "there is no Slurm here; test_cluster.py runs the script with a stand-in",
    r"scripts/docker_run\.sh cuda X ARGUMENTS": "stands for the commands below it",
    r"scripts/X\.sh ARGUMENTS": "stands for the commands below it",
    r"docker/flash_attn\.sh .*": "downloads a wheel for CUDA; the image's build runs it",
    r"scripts/setup/env\.sh llava": "installs 5 GB; make test-pins does",
    r"scripts/setup/doctor\.sh full llava tinyllava": "fails without a GPU, as it should: test_scripts.py",
    r"apt-get .*": "changes the machine",
    r"\.venv/bin/pre-commit install": "changes the clone's git hooks",
    r"\.ci/run": "runs this test",
}


def here(command):
    """What is run here for a printed command; None for what cannot be."""
    if any(re.fullmatch(pattern, command) for pattern in NOT_HERE):
        return None
    for pattern, short in SHORT.items():
        if match := re.fullmatch(pattern, command):
            return match.expand(short)
    return command


TRIED = sorted({here(command) for command in COMMANDS} - {None})


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """A clone that nothing has been set up in."""
    folder = tmp_path_factory.mktemp("bare") / "kit"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def clone(bare, tmp_path_factory):
    """A clone after `make setup`, with a stock LLaVA beside it."""
    folder = tmp_path_factory.mktemp("set-up") / "kit"
    shutil.copytree(bare, folder)
    for name in (".venv", ".uv", "upstream"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(UPSTREAM, folder / "LLaVA", ignore=shutil.ignore_patterns(".git"))
    subprocess.run([sys.executable, "-m", "vista_patch", "revert", "LLaVA"], cwd=folder, check=True)
    return folder


def run(folder, command):
    path = f"{folder / '.venv/bin'}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | {"PATH": path}
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_is_tried_or_not_here_is_printed_somewhere():
    for pattern in (*SHORT, *NOT_HERE):
        assert any(re.fullmatch(pattern, command) for command in COMMANDS), f"no page prints {pattern}"


@pytest.mark.parametrize("command", TRIED)
def test_a_printed_command_runs(clone, command):
    code, said = run(clone, command)
    assert code == 0 and "Traceback" not in said, said[-3000:]


# One command of each script, the shortest.
BARE = {re.findall(r"scripts/\w+\.sh", c)[0]: c for c in sorted(TRIED, key=len, reverse=True) if ".sh" in c}


@pytest.mark.parametrize("command", BARE.values(), ids=BARE)
def test_on_a_bare_clone_it_runs_or_says_what_sets_it_up(bare, command):
    code, said = run(bare, command)
    assert "Traceback" not in said and (code == 0 or "make setup" in said), said[-3000:]
    assert not (bare / ".venv").exists() and not (bare / "results").exists()


def test_make_alone_prints_the_targets(bare):
    code, said = run(bare, "make")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert code == 0 and all(f"make {target} " in said for target in targets if target != "help")
    assert not (bare / ".venv").exists()
