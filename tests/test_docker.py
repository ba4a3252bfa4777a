"""The image's cpu target, really built and run on a Docker engine that ci/engine.sh makes from Debian packages.

What this says nothing about: the CUDA base, the target cuda, a GPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.docker


def told(*command, **environment):
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Starts the engine and makes the stand-in base; sets DOCKER_HOST."""
    folder = tmp_path_factory.mktemp("engine")
    started = subprocess.run(["ci/engine.sh", "start", folder], cwd=ROOT, capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no engine could be started: {started.stderr.strip()}")
    os.environ["DOCKER_HOST"] = started.stdout.strip()
    try:
        subprocess.run(["ci/engine.sh", "base", folder], cwd=ROOT, check=True)
        yield
    finally:
        subprocess.run(["ci/engine.sh", "stop", folder], cwd=ROOT, check=True)


BUILD = ("build", "--base", "vista-kit:base", "--network", "host", "--build-arg", "BACKBONES=llava", "cpu")


def run(folder, *command, target="cpu"):
    folders = ["--results", folder / "results", "--data", folder / "data"]
    return [sys.executable, "docker/kit.py", "run", "--network", "host", *map(str, folders), target, *command]


@pytest.fixture(scope="session")
def image(engine):
    code, out, err = told(sys.executable, "docker/kit.py", *BUILD)
    assert code == 0, out[-3000:] + err
    return out


def test_smoke(image, tmp_path):
    code, out, err = told(*run(tmp_path, "smoke"))
    assert code == 0, out[-3000:] + err
    assert 'failures="0"' in (tmp_path / "results/smoke.xml").read_text()
    assert (tmp_path / "results/smoke.xml").stat().st_uid == (os.getuid() or 1000)


def test_the_image_holds_what_is_pinned(image, tmp_path):
    code, out, err = told(*run(tmp_path, "verify"))
    assert code == 0 and ".venv, upstream/llava: no differences" in out, out + err


def test_a_changed_line_rebuilds_the_last_layers_alone(image, tmp_path):
    copy = tmp_path / "kit"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".uv", "results", "upstream", "__pycache__"))
    with open(copy / "vista_patch/loss.py", "a") as file:
        file.write("# changed\n")
    done = subprocess.run([sys.executable, copy / "docker/kit.py", *BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cached = {lines[i].split(" : ", 1)[1] for i in range(len(lines) - 1) if lines[i + 1].strip() == "---> Using cache"}
    assert "RUN scripts/env.sh cpu" in cached and not any("vista_patch" in step for step in cached)


@pytest.mark.parametrize(
    "command, code, message",
    [
        (["train", "llava-tiny-vist", "pretrain"], 2, "did you mean 'llava-tiny-vista'"),
        (["trian"], 2, "no command 'trian'"),
        (["shell", "-c", "id -u; touch /opt/vista/x"], 1, "Read-only file system"),
        (["shell", "-c", "exit 37"], 37, ""),
    ],
)
def test_exit_codes_and_messages_come_out(image, tmp_path, command, code, message):
    got, out, _ = told(*run(tmp_path, *command))
    assert got == code and message in out


def test_sigterm_stops_the_run(image, tmp_path):
    running = subprocess.Popen(run(tmp_path, "reproduce"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if "files written" in line:  # the data step is done, the models have begun
            break
    start = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 128 + signal.SIGTERM and time.monotonic() - start < 15
    listed = subprocess.run(["/usr/bin/docker", "ps", "-aq"], capture_output=True, text=True, check=True)
    assert listed.stdout == ""


def test_what_is_wrong_is_one_line(image, tmp_path):
    def refused(*command, **environment):
        code, out, err = told(*command, **environment)
        assert code == 1 and out == "" and len(err.splitlines()) == 1, out + err
        return err

    doctor = run(tmp_path, "doctor", "tiny")
    assert "no engine answers at unix:///none" in refused(*doctor, DOCKER_HOST="unix:///none")
    assert "no image vista-kit:cuda: build it first" in refused(*run(tmp_path, "doctor", "full", target="cuda"))
    subprocess.run(["/usr/bin/docker", "tag", "vista-kit:cpu", "vista-kit:cuda"], check=True)
    assert "cannot hand out GPUs" in refused(*run(tmp_path, "doctor", "full", target="cuda"))
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(*run(tmp_path / "file", "doctor", "tiny"))


def test_labels_and_user(image):
    shown = subprocess.run(["/usr/bin/docker", "inspect", "vista-kit:cpu"], capture_output=True, text=True, check=True)
    config = json.loads(shown.stdout)[0]["Config"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert config["Labels"]["org.opencontainers.image.revision"] == commit and config["User"] == "1000:1000"


def test_dry_run_prints_a_docker_line():
    command = [sys.executable, "docker/kit.py", "run", "--dry-run", "cuda", "reproduce", "--profile", "full"]
    code, out, _ = told(*command)
    assert code == 0 and out.startswith("docker run --rm --init --read-only") and "--gpus all" in out
    assert out.endswith("vista-kit:cuda reproduce --profile full\n")
