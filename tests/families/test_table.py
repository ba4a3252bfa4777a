"""docs/models.md has a row for every family and trainer that the suite tries, and README points to it."""

from tests.families.conftest import RELEASES, table
from tests.families.registry import FAMILIES
from tests.families.test_trainers import TRAINERS
from tests.helpers import ROOT


def test_the_table_is_whole():
    rows = table()
    assert [*rows] == ["Model", *FAMILIES, "Trainer", *TRAINERS]
    for name, cells in rows.items():
        if name not in ("Model", "Trainer"):
            assert set(cells) <= {"equal", "refused", "-", "stock fails"}, f"{name}: {cells}"
            assert set(cells) & {"equal", "refused"}, f"{name} runs nowhere"
    for release in RELEASES:
        pin = (ROOT / f"docker/locks/families-{release}.in").read_text()
        assert f"transformers=={rows['Model'][RELEASES.index(release)]}" in pin
    assert "docs/models.md" in (ROOT / "README.md").read_text()
