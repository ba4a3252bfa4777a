"""README and docs: short, plain, every link exists, and every command that they print runs."""

import re
import subprocess

import pytest

from tests.helpers import ROOT, ROWS, batch

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


def test_make_alone_prints_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    done = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True)
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    assert done.returncode == 0 and all(f"make {target} " in done.stdout for target in targets if target != "help")
