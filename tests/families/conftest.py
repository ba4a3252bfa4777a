"""Keeps docs/models.md: each run of the suite checks its release's column, or writes it with TABLE=write."""

import os
from collections import defaultdict

import pytest

from tests.helpers import ROOT

PAGE = ROOT / "docs/models.md"
RELEASES = ("4.46", "4.51", "4.57", "5")
outcomes: dict[str, list[str]] = defaultdict(list)  # row of the table: what its tests came to


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if item.get_closest_marker("families") and (report.when == "call" or report.skipped):
        row = getattr(item, "callspec", None) and item.callspec.params.get("family", item.callspec.params.get("name"))
        why = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
        outcomes[row].append("refused" if report.passed and "refused_by_name" in item.name else why)


def cell(found: list[str]) -> str:
    for word in ("failed", "refused", "passed"):
        if word in found:
            return {"failed": "**wrong**", "passed": "equal"}.get(word, word)
    return "stock fails" if any(why.startswith("stock fails") for why in found) else "-"


def table() -> dict[str, list[str]]:
    """The committed rows: a name, and a cell for each release."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows if len(cells) == len(RELEASES)}


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    whole = not config.option.keyword and config.option.markexpr == "families" and exitstatus in (0, 1)
    if not whole:
        return
    import transformers

    version = transformers.__version__
    column = next(i for i, release in enumerate(RELEASES) if version.startswith(release + "."))
    lines = PAGE.read_text().splitlines()
    for number, line in enumerate(lines):
        name, *cells = line.strip("| ").split(" | ")
        if name in outcomes and len(cells) == len(RELEASES):
            cells[column] = cell(outcomes[name])
            lines[number] = f"| {' | '.join([name, *cells])} |"
    text = "\n".join(lines) + "\n"
    if os.environ.get("TABLE") == "write":
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        session.exitstatus = 1
        print(f"\n{PAGE} does not say what transformers {version} does: run again with TABLE=write")
