"""The study's bookkeeping: what is there is kept, what is cut off continues, what is foreign is named."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval", reason="needs the miniature's environment")

from scripts import config
from scripts.miniature import study
from tests.helpers import ROOT


def who(name, seed):
    said = {"experiment": name, "seed": seed, "cpu": study.cpu(), "commit": "abc"}
    return said | {"instrument": study.instrument("llava-tiny")}


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A study of two runs in an empty folder, whose steps only leave a mark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "instrument", lambda backbone: f"the one of {backbone}")
    monkeypatch.setattr(study, "who", who)
    monkeypatch.setattr(study, "PLAN", [("one", 100), ("two", 100)])
    monkeypatch.setattr(study, "steps", lambda name, seed: [["touch", f"{name}.trained"]])
    monkeypatch.setattr(study, "collect", who)
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
        ({"cpu": "another"}, "seed 100 was begun on another"),
        ({"experiment": "two", "cpu": "another"}, "is the result of two, seed 100"),
        ({"instrument": "another"}, "was made by another instrument (commit abc)"),
        ({"experiment": None}, "is not a whole result (KeyError"),
    ],
)
def test_a_foreign_result_is_named(small_study, content, message):
    path = study.result_file("one", 100)
    path.parent.mkdir(parents=True)
    whole = who("one", 100) | content
    path.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))
    with pytest.raises(SystemExit, match=r"^study: ") as refused:
        study.main(1)
    assert message in str(refused.value) and not list(small_study.glob("*.trained"))


def test_a_loss_that_is_not_finite_is_a_result(small_study, monkeypatch):
    """It is told and not tried again; a stage that fails for another reason is."""
    mark = "mkdir -p results/study/seed100/one-pretrain; touch results/study/seed100/one-pretrain/nonfinite.json"
    broken = ["sh", "-c", f"{mark}; exit 1", "pretrain"]
    monkeypatch.setattr(study, "steps", lambda name, seed: [broken if name == "one" else ["true"], ["true"]])
    monkeypatch.setattr(study, "stage_of", lambda command: command[-1])
    assert study.main(1) == 0
    found = json.loads(study.result_file("one", 100).read_text())
    assert found["nonfinite"] == "pretrain" and found["instrument"] == "the one of llava-tiny"
    assert study.todo(study.PLAN) == []
    study.result_file("one", 100).unlink()
    monkeypatch.setattr(study, "stage_of", lambda command: "finetune")
    assert study.main(1) == 1 and not study.result_file("one", 100).exists()


def test_pilots_go_elsewhere_and_no_other_study_is_at_work_beside(small_study, monkeypatch):
    assert {seed for _, seed in study.PILOT}.isdisjoint(seed for _, seed in study.PLAN)
    assert study.main(2, pilot=True) == 0
    assert len(list(small_study.glob("docs/study/pilot/seed*/*.json"))) == len(study.PILOT)
    assert not (small_study / "docs/study/results").exists()
    held = study.lock(study.RUN / ".lock", print)
    with pytest.raises(SystemExit, match="another one is at work"):
        study.main(1)
    os.close(held)


def test_sigterm_ends_the_steps_and_the_same_command_continues(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.miniature import study
study.PLAN = [("one", 100)]
study.steps = lambda name, seed: [["sh", "-c", "touch begun; exec sleep {{}}".format(sys.argv[1])]]
study.who = study.collect = lambda name, seed: {{}}
study.instrument = lambda backbone: ""
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
