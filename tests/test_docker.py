"""The image, both targets really built, cpu really run, on a Docker engine that ci/engine.sh makes from packages alone.

What this says nothing about: the CUDA base, flash-attn, a GPU.
"""

import base64
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from scripts import config
from tests.helpers import ROOT

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


BUILD = ("build", "--base", "vista-kit:base", "--network", "host", "cpu")
DOCKER = "/usr/bin/docker"


def run(folder, *command, target="cpu"):
    folders = ["--results", folder / "results", "--data", folder / "data"]
    return [sys.executable, "docker/kit.py", "run", "--network", "host", *map(str, folders), target, *command]


@pytest.fixture(scope="session")
def image(engine):
    code, out, err = told(sys.executable, "docker/kit.py", *BUILD)
    assert code == 0, out[-3000:] + err
    return out


def test_target_cuda_is_built_on_the_stand_in_base(engine, tmp_path):
    """All of it but the CUDA base and flash-attn, whose wheel is an empty one here: both backbones' pins, verified.

    The first test: it asks for the most free disk."""
    with zipfile.ZipFile(tmp_path / "flash_attn-2.5.8-py3-none-any.whl", "w") as wheel:
        info = "flash_attn-2.5.8.dist-info"
        wheel.writestr("flash_attn/__init__.py", "__version__ = 'a stand-in'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.5.8\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        digests = {
            name: base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()) for name in wheel.namelist()
        }
        lines = [f"{name},sha256={digest.decode().rstrip('=')},\n" for name, digest in digests.items()]
        wheel.writestr(f"{info}/RECORD", "".join(lines))  # verify compares it
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/flash_attn-2.5.8-py3-none-any.whl"
        code, out, err = told(sys.executable, "docker/kit.py", *BUILD[:-1], "--build-arg", f"FLASH_ATTN={url}", "cuda")
        server.shutdown()
    assert code == 0, out[-3000:] + err
    code, out, err = told(DOCKER, "run", "--rm", "--read-only", "--network", "host", "vista-kit:cuda", "verify")
    assert code == 0 and ".venv-llava, .venv-tinyllava, upstream/llava, upstream/tinyllava: no differences" in out, out


def test_smoke_killed_in_stage_2_continues_and_is_green(image, tmp_path):
    smoke = run(tmp_path, "smoke")
    running = subprocess.Popen(smoke, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    steps = config.load("llava-tiny")["finetune"]["max_steps"]
    for line in running.stdout:
        if line.startswith("finetune:") and re.search(rf" [1-9]\d+/{steps} ", line):
            break
    subprocess.run([DOCKER, "kill", *told(DOCKER, "ps", "-q")[1].split()], check=True)
    assert running.wait(timeout=60) == 128 + signal.SIGKILL
    code, out, err = told(*smoke)
    assert code == 0, out[-3000:] + err
    assert "pretrain: results/tiny/seed0/llava-tiny-pretrain is done" in out
    assert 'failures="0"' in (tmp_path / "results/smoke.xml").read_text()
    page = (tmp_path / "results/smoke.md").read_text()
    print(page)
    assert "| | llava-tiny | tinyllava-tiny |" in page and "VISTA term on held-out answers" in page
    assert "failed" not in page.partition("Passed")[0]
    assert (tmp_path / "results/smoke.xml").stat().st_uid == (os.getuid() or 1000)


def test_a_build_that_fails_says_why_and_leaves_no_container(image):
    code, out, err = told(sys.executable, "docker/kit.py", *BUILD[:-1], "--build-arg", "BACKBONES=nothing", "cpu")
    assert code == 1 and "no upstream 'nothing'" in out and "the build of cpu failed" in err
    assert told(DOCKER, "ps", "-aq")[1] == ""


def test_the_image_holds_what_is_pinned(image, tmp_path):
    code, out, err = told(*run(tmp_path, "verify"))
    assert code == 0, out + err
    for name in (".venv", ".venv-cpu-tinyllava", "upstream/llava", "upstream/tinyllava"):
        assert name in re.split("[ ,:]+", out)


@pytest.mark.parametrize("environment, lock", [(".venv", "cpu"), (".venv-cpu-tinyllava", "cpu-tinyllava")])
def test_each_environment_has_a_bill_of_materials(image, tmp_path, environment, lock):
    _, out, _ = told(*run(tmp_path, "shell", "-c", f"cat {environment}/sbom.json"))
    listed = {part["name"].lower().replace("_", "-"): part["version"] for part in json.loads(out)["components"]}
    locked = re.findall(r"(?m)^([\w.-]+)==([^ ]+)", (ROOT / f"docker/locks/{lock}.txt").read_text())
    assert {name.lower().replace("_", "-").replace(".", "-") for name, _ in locked} == {
        name.replace(".", "-") for name in listed
    }


def test_a_changed_line_rebuilds_the_last_layers_alone(image, tmp_path):
    copy = tmp_path / "kit"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".uv", "results", "upstream", "__pycache__"))
    with open(copy / "vista_patch/loss.py", "a") as file:
        file.write("# changed\n")
    done = subprocess.run([sys.executable, copy / "docker/kit.py", *BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cached = {lines[i].split(" : ", 1)[1] for i in range(len(lines) - 1) if lines[i + 1].strip() == "---> Using cache"}
    assert "RUN scripts/setup/env.sh cpu && docker/sbom.sh .venv" in cached and not any(
        "vista_patch" in step for step in cached
    )


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
    got, out, err = told(*run(tmp_path, *command))
    assert got == code and message in out + err


def test_sigterm_stops_the_run(image, tmp_path):
    running = subprocess.Popen(run(tmp_path, "reproduce"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if "files written" in line:  # the data step is done, the models have begun
            break
    start = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 128 + signal.SIGTERM and time.monotonic() - start < 15
    listed = subprocess.run([DOCKER, "ps", "-aq"], capture_output=True, text=True, check=True)
    assert listed.stdout == ""


def test_what_is_wrong_is_one_line(image, tmp_path):
    def refused(*command, **environment):
        code, out, err = told(*command, **environment)
        assert code == 1 and out == "" and len(err.splitlines()) == 1, out + err
        return err

    doctor = run(tmp_path, "doctor", "tiny")
    assert "no engine answers at unix:///none" in refused(*doctor, DOCKER_HOST="unix:///none")
    told(DOCKER, "image", "rm", "--no-prune", "vista-kit:cuda")  # the first test's
    assert "no image vista-kit:cuda: build it first" in refused(*run(tmp_path, "doctor", "full", target="cuda"))
    subprocess.run([DOCKER, "tag", "vista-kit:cpu", "vista-kit:cuda"], check=True)
    assert "cannot hand out GPUs" in refused(*run(tmp_path, "doctor", "full", target="cuda"))
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(*run(tmp_path / "file", "doctor", "tiny"))


def test_a_user_who_may_not_write_results_is_told(image, tmp_path):
    mount = f"type=bind,source={tmp_path},target=/opt/vista/results"
    code, out, err = told(
        DOCKER, "run", "--rm", "--network", "host", "--user", "4242", "--mount", mount, "vista-kit:cpu", "reproduce"
    )
    assert code == 2 and out == "" and "user 4242 may not write to /opt/vista/results" in err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_no_space_is_told_before_the_build(tmp_path):
    """An engine whose folder is a small file system."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        started = told("ci/engine.sh", "start", tmp_path)
        assert started[0] == 0, started[2]
        code, out, err = told(sys.executable, "docker/kit.py", *BUILD, DOCKER_HOST=started[1].strip())
        told("ci/engine.sh", "stop", tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert code == 1 and out == "" and "building cpu takes 20: make room" in err and len(err.splitlines()) == 1


def test_labels_and_user(image):
    shown = subprocess.run([DOCKER, "inspect", "vista-kit:cpu"], capture_output=True, text=True, check=True)
    config = json.loads(shown.stdout)[0]["Config"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    labels = config["Labels"]
    assert labels["org.opencontainers.image.revision"] == commit and config["User"] == "1000:1000"
    assert labels["vista.upstream.llava"].endswith("@c121f0432da27facab705978f83c4ada465e46fd")
    assert labels["vista.lock.llava.torch"] == "2.1.2" and labels["vista.lock.cpu"].startswith("sha256:")


def test_dry_run_prints_a_docker_line():
    command = [sys.executable, "docker/kit.py", "run", "--dry-run", "cuda", "reproduce", "--profile", "full"]
    code, out, _ = told(*command, MMBENCH_JUDGE="rules", OPENAI_API_KEY="secret")
    assert code == 0 and out.startswith("docker run --rm --init --read-only") and "--gpus all" in out
    assert "--env MMBENCH_JUDGE" in out and "secret" not in out
    assert out.endswith("vista-kit:cuda reproduce --profile full\n")
