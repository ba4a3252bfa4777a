"""The scripts' own duties: named configs, the plan of a run, and one clear error for what is wrong."""

import os
import shutil
import socket
import subprocess
import time

import pytest

from tests.helpers import ROOT

PAPER = {  # section 5.1 and appendix; LLaVA's own recipe, which the paper says it follows
    "pretrain": {"learning_rate": "0.001", "global_batch": 256, "version": "plain"},
    "finetune": {"learning_rate": "2e-05", "global_batch": 128, "version": "v1"},
}


def run(*command, **environment):
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def flags(experiment, stage):
    code, out, err = run(ROOT / ".venv/bin/python", "-m", "scripts.config", experiment, stage)
    assert code == 0, err
    words = out.split()
    return dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))


@pytest.mark.parametrize("baseline", ("llava-v1.5-7b", "tinyllava-3b"))
@pytest.mark.parametrize("stage", PAPER)
def test_the_full_experiments_hold_the_papers_values_and_differ_in_vista_alone(baseline, stage):
    values = flags(baseline, stage)
    paper = {**PAPER[stage], "conv_version": {"pretrain": "pretrain", "finetune": "phi"}[stage]}
    del paper["version" if baseline.startswith("tiny") else "conv_version"]
    batch = int(values["per_device_train_batch_size"]) * 8 * int(values["gradient_accumulation_steps"])
    assert {key: values.get(key, batch) for key in paper} == paper
    assert values["bf16"] == "True" and values["model_max_length"] == "2048" and values["vista"] == "off"
    for experiment, metric in ((f"{baseline}-vista", "l2"), (f"{baseline}-vista-cosine", "cosine")):
        assert flags(experiment, stage) == values | {"vista": metric}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """write(text) makes an experiment "mine" in a copy of scripts/configs."""

    from scripts import config as module

    shutil.copytree(module.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")

    def write(text):
        (tmp_path / "configs/mine.toml").write_text('base = "llava-v1.5-7b"\n' + text)
        return module

    return write


@pytest.mark.parametrize(
    "text,message",
    [
        ("[train]\nlerning_rate = 1", r"\[train\] unknown key 'lerning_rate'"),
        ("[pretrain]\nlerning_rate = 1.0", "did you mean 'learning_rate'"),
        ("rank = 4", "did you mean 'ranks'"),
        ('[vista]\nvista_weight = "1"', "must be float"),
        ('[vista]\nvista_metric = "l2"', r"\[vista\] unknown key 'vista_metric': did you mean vista\?"),
        ("[vista]\nvista_wieght = 1.0", r"did you mean vista_weight\?"),
        ("ranks = 3", "global_batch 256 is not a multiple of per_device_train_batch_size 32 x ranks 3"),
        ("ranks =", "Invalid value"),
    ],
)
def test_a_wrong_config_is_one_error_that_names_the_nearest(config, capsys, text, message):
    module = config(text)
    assert module.main(["mine", "pretrain"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    with pytest.raises(module.ConfigError, match=message):
        module.flags(module.load("mine"), "pretrain")


def test_fewer_gpus_keep_the_global_batch_by_accumulation(config):
    module = config("ranks = 2")
    words = module.flags(module.load("mine"), "finetune")
    assert words[words.index("--gradient_accumulation_steps") + 1] == "4"


def test_dry_run_prints_every_resolved_command_and_does_nothing():
    before = sorted((ROOT / "results").rglob("*")) if (ROOT / "results").exists() else []
    code, out, err = run("scripts/reproduce.sh", "--profile", "full", "--backbone", "both", "--dry-run")
    assert code == 0, err
    commands = [line for line in out.splitlines() if line.startswith("deepspeed ")]
    assert len(commands) == 12 and sum("--vista l2" in line for line in commands) == 4
    assert "disk" in out
    after = sorted((ROOT / "results").rglob("*")) if (ROOT / "results").exists() else []
    assert before == after


def test_the_small_profiles_dry_run_tells_hours_disk_and_the_smallest_effect_of_nine_runs():
    code, out, err = run("scripts/reproduce.sh", "--profile", "small", "--dry-run")
    assert code == 0, err
    commands = [line for line in out.splitlines() if line.startswith("deepspeed --num_gpus 1 ")]
    assert len(commands) == 18 and {line.split()[-1] for line in commands} == {"0", "1", "2"}
    for metric in ("off", "l2", "cosine"):
        assert sum(f"--vista {metric} " in line for line in commands) == 6
    before = out[: out.index("deepspeed --num_gpus 1 ")]
    assert "in all, 9 runs of tinyllava-0.5b; disk" in before and "the smallest true difference" in before


def test_a_public_checkpoint_is_downloaded_evaluated_and_reported_and_nothing_is_trained():
    code, out, err = run("scripts/reproduce.sh", "--experiment", "llava-v1.5-7b-public", "--dry-run")
    assert code == 0, err
    steps = [line.split("] ")[1] for line in out.splitlines() if line.startswith("[")]
    assert steps[-4:] == [
        "scripts/data.sh llava-v1.5-7b-public",
        "python3 -m scripts.reporting.manifest --seeds 1 llava-v1.5-7b-public",
        "scripts/eval.sh llava-v1.5-7b-public 0",
        "python3 -m scripts.reporting.report results/full",
    ]
    assert "data/models/llava-v1.5-7b from liuhaotian/llava-v1.5-7b@4481d27" in out
    assert "data/models/clip-vit-large-patch14-336 from openai/" in out and "vicuna" not in out
    assert "  vqav2_val ok_vqa_val2014 gqa" in out and "evaluation: 301,921 questions of 18 tasks" in out
    for command, message in (
        (("scripts/reproduce.sh", "--experiment", "llava-v1.5-7b-public", "--seeds", "2"), "no seed changes: leave"),
        (
            ("scripts/train.sh", "llava-v1.5-7b-public", "pretrain"),
            "it is not trained. scripts/eval.sh llava-v1.5-7b-p",
        ),
        (("scripts/eval.sh", "llava-v1.5-7b-public", "0", "../x"), "each must be the name of a task"),
        (("scripts/data.sh", "llava-v1.5-7b-public", "--tasks", "../x"), "each must be the name of a task"),
    ):
        code, out, err = run(*command)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


@pytest.fixture
def reproduce(tmp_path):
    """reproduce(*options, **environment): the real reproduce.sh and upstream.sh, without GitHub; every other step only
    writes down that it was called, and train.sh fails on $FAIL and takes a minute on $SLOW."""
    shutil.copytree(ROOT / "patches", tmp_path / "patches")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "vista_patch").symlink_to(ROOT / "vista_patch")
    for name in ("setup/doctor", "setup/env", "setup/patch", "data", "train", "eval", "probe"):
        (tmp_path / f"scripts/{name}.sh").write_text('#!/bin/sh\necho "$0" "$@" >>called\n')
    with open(tmp_path / "scripts/train.sh", "a") as script:
        script.write('[ "$1" != "$FAIL" ] || exit 1\n[ "$1" != "$SLOW" ] || exec sleep 60\n')
    for name in ("manifest", "report"):
        (tmp_path / f"scripts/reporting/{name}.py").write_text("")
    for script in (tmp_path / "scripts").rglob("*.sh"):
        script.chmod(0o755)
    (tmp_path / "upstream/llava").mkdir(parents=True)
    (tmp_path / "upstream/llava.source").write_text("there\n")
    # No GitHub: git clones nothing over https.
    nowhere = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_COUNT": "1"}
    nowhere |= {"GIT_CONFIG_KEY_0": "protocol.https.allow", "GIT_CONFIG_VALUE_0": "never"}

    def start(*options, **environment):
        command, variables = [tmp_path / "scripts/reproduce.sh", *options], os.environ | nowhere | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=variables, text=True, **pipes)

    return start


def test_without_tinyllavas_source_the_rest_goes_on(reproduce, tmp_path):
    running = reproduce("--backbone", "both")
    _, err = running.communicate()
    assert running.returncode == 0 and "no package index carries it" in err and "going on without" in err
    called = (tmp_path / "called").read_text()
    assert called.count("train.sh llava-tiny") == 6 and called.count("tinyllava") == 1  # the doctor is asked about both
    assert not list((tmp_path / "upstream").glob("tinyllava*"))
    assert reproduce("--backbone", "tinyllava").wait() == 1


def test_a_bare_clone_goes_on_with_the_python_that_it_has_made(reproduce, tmp_path):
    """Also where `python3` is pyenv's, which puts its own folder before all others on the PATH."""
    (tmp_path / ".venv").unlink()
    for folder, text in (
        ("shims", f'PATH={tmp_path}/system:$PATH exec python3 "$@"'),
        (
            "system",
            f'case $2 in *.report) echo "the system Python" >&2; exit 9; esac\nexec {ROOT}/.venv/bin/python "$@"',
        ),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "python3").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / folder / "python3").chmod(0o755)
    with open(tmp_path / "scripts/setup/env.sh", "a") as script:
        script.write(f"ln -sfn {ROOT}/.venv .venv\n")
    running = reproduce(PATH=f"{tmp_path}/shims:/usr/bin:/bin")
    _, err = running.communicate()
    assert running.returncode == 0, err


def test_a_name_decides_nothing_but_the_folder(reproduce, tmp_path):
    """Neither a step that has "none" in it is skipped, nor is "my" a backbone."""
    for name, base in (("llava-none", "llava-tiny"), ("my-l2", "tinyllava-tiny-vista")):
        (tmp_path / f"scripts/configs/{name}.toml").write_text(f'base = "{base}"\n')
        (tmp_path / "upstream/tinyllava").mkdir(exist_ok=True)
        (tmp_path / "upstream/tinyllava.source").write_text("there\n")
        running = reproduce("--experiment", name)
        _, err = running.communicate()
        assert running.returncode == 0, err
        called = (tmp_path / "called").read_text()
        assert f"train.sh {name} finetune 0" in called and f"probe.sh {name} 0" in called
        assert "doctor.sh tiny" in called
    assert "env.sh cpu-tinyllava" in called and "doctor.sh tiny tinyllava" in called


def test_a_failed_step_stops_the_run(reproduce, tmp_path):
    running = reproduce(FAIL="llava-tiny-vista")
    out, err = running.communicate()
    assert running.returncode == 1 and "the same command continues" in err and "report.py" not in out
    called = (tmp_path / "called").read_text()
    assert "probe.sh llava-tiny 0" in called and "llava-tiny-vista finetune" not in called


def test_a_second_run_is_refused_and_sigterm_stops_the_first(reproduce, tmp_path):
    first = reproduce(SLOW="llava-tiny-vista")
    called = tmp_path / "called"
    while not called.exists() or "train.sh llava-tiny-vista " not in called.read_text():
        time.sleep(0.05)
    second = reproduce()
    assert "another run is at work" in second.communicate()[1] and second.returncode == 2
    first.terminate()
    assert first.wait(timeout=10) == 143
    assert reproduce().wait() == 0  # nothing of the first is left that holds the lock


def test_a_machine_without_a_gpu_is_told_so():
    code, _, err = run("scripts/setup/doctor.sh", "full")
    assert code != 0 and "needs a GPU" in err and "Traceback" not in err


def test_the_doctor_names_an_old_driver_a_taken_port_and_an_empty_token(tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 470.42.01\necho 470.42.01\n")
    driver.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": port}
        variables["HF_TOKEN_PATH"] = f"{tmp_path}/none"
        code, out, err = run("scripts/setup/doctor.sh", "full", **variables)
    assert code == 2 and "driver is 470.42.01: CUDA 12.1 needs 525" in err and f"port {port} is taken" in err
    assert f"HF_TOKEN_PATH={tmp_path}/none: no such file" in err and "a flash-attn that loads" in err
    assert "sources of data and weights are in data/" in out
    driver.write_text("#!/bin/sh\necho 550.54.15\n")
    assert "driver" not in run("scripts/setup/doctor.sh", "full", **variables)[2]
