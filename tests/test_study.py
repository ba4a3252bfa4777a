"""The study's bookkeeping: what is there is kept, what is cut off continues, what is foreign is named."""

import json
import signal
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval", reason="needs the miniature's environment")

from scripts import config
from scripts.miniature import study
from tests.helpers import ROOT


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A study of two runs in an empty folder, whose steps only leave a mark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "PLAN", [("one", 100), ("two", 100)])
    monkeypatch.setattr(study, "steps", lambda name, seed: [["touch", f"{name}.trained"]])
    monkeypatch.setattr(study, "collect", lambda name, seed: {"experiment": name, "seed": seed, "cpu": study.cpu()})
    return tmp_path


def test_a_run_with_its_result_is_not_run_again(small_study):
    assert study.main(1) == 0
    written = {path: path.read_bytes() for path in small_study.glob("docs/study/results/seed100/*")}
    assert sorted(path.name for path in written) == ["one.json", "two.json"]
    for mark in small_study.glob("*.trained"):
        mark.unlink()
    study.result_file("two", 100).unlink()
    assert study.main(2) == 0
    assert [path.name for path in small_study.glob("*.trained")] == ["two.trained"]
    assert {path: path.read_bytes() for path in small_study.glob("docs/study/results/seed100/*")} == written


def test_a_step_that_fails_is_told_and_leaves_no_result(small_study, monkeypatch, capsys):
    monkeypatch.setattr(study, "steps", lambda name, seed: [["false" if name == "one" else "true"]])
    assert study.main(1) == 1
    assert "study: one, seed 100:" in capsys.readouterr().err
    assert [path.name for path in small_study.glob("docs/study/results/seed100/*")] == ["two.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"experiment": "one", "seed": 100, "cpu": "another"}, "seed 100 was begun on another"),
        ({"experiment": "two", "seed": 100, "cpu": "another"}, "is the result of two, seed 100"),
        ({"seed": 100}, "is not a whole result (KeyError"),
    ],
)
def test_a_foreign_result_is_named(small_study, content, message):
    path = study.result_file("one", 100)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"^study: ") as refused:
        study.main(1)
    assert message in str(refused.value) and not list(small_study.glob("*.trained"))


def test_sigterm_ends_the_steps_and_the_same_command_continues(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.miniature import study
study.PLAN = [("one", 100)]
study.steps = lambda name, seed: [["sh", "-c", "touch begun; exec sleep {{}}".format(sys.argv[1])]]
study.collect = lambda name, seed: {{}}
sys.exit(study.main(1))
"""
    running = subprocess.Popen([sys.executable, "-c", code, "600"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 143 and "the same command continues" in running.stderr.read()
    assert not list(tmp_path.glob("docs/**/*.json"))
    assert subprocess.run([sys.executable, "-c", code, "0"], cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("docs/**/*.json"))) == 1


def test_every_experiment_of_the_plan_is_a_config():
    for name in {name for name, _ in study.PLAN}:
        for stage in config.STAGES:
            assert config.flags(config.load(name), stage)
