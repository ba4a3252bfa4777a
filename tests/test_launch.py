"""How the launchers start, share and end what they run: devices, locks, children, settings, and a bare clone."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts import common, config
from scripts.evaluation import launch as evaluation
from scripts.evaluation.results import record
from scripts.training import launch
from tests.helpers import ROOT, write_task

SHELL = (
    "reproduce",
    "train",
    "eval",
    "data",
    "probe",
    *(f"setup/{name}" for name in ("doctor", "env", "patch", "upstream")),
)
MODULES = (
    "config", "reproduce", "training.launch", "training.cost", "evaluation.launch", "data.launch", "setup.upstream",
    "reporting.manifest",
)  # fmt: skip


@pytest.fixture
def bare(tmp_path):
    """A fresh clone: nothing is set up, and no other Python package is in reach."""
    for name in ("docker", "patches", "scripts", "vista_patch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*command, **environment):
        environment = variables | {"PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_bare_clone_plans_and_says_what_sets_it_up(bare, tmp_path):
    code, out, err = bare("scripts/reproduce.sh", "--profile", "full", "--backbone", "both", "--dry-run")
    assert code == 0, err
    assert sum(line.startswith("deepspeed ") for line in out.splitlines()) == 12
    assert bare("scripts/train.sh", "llava-tiny", "pretrain", DRY_RUN="1")[0] == 0
    done = tmp_path / "results/tiny/seed0/llava-tiny-finetune/done"
    done.parent.mkdir(parents=True)
    done.touch()
    (tmp_path / "upstream/llava").mkdir(parents=True)
    for command in (
        ("train", "llava-tiny", "pretrain"), ("eval", "llava-tiny"), ("data", "llava-tiny"), ("probe", "llava-tiny"),
    ):  # fmt: skip
        code, out, err = bare(f"scripts/{command[0]}.sh", *command[1:])
        assert code == 2 and err.endswith("run make setup\n") and err.count("\n") == 1, (command, err)


@pytest.mark.parametrize("script", SHELL)
def test_help_of_a_script(bare, script):
    code, out, err = bare(f"scripts/{script}.sh", "--help")
    assert code == 0 and "usage: scripts/" in out and not err


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{module}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


@pytest.fixture
def stage(monkeypatch):
    """stage(**variables): llava-tiny's first stage, under these variables."""

    def make(**variables):
        for name in ("CUDA_VISIBLE_DEVICES", "NNODES", "NODE_RANK", "MASTER_ADDR", "HOSTFILE", "RANKS", "PER_DEVICE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launch.plan("llava-tiny", "pretrain")

    return make


@pytest.mark.parametrize(
    "visible, gpus, ranks, given",
    [
        (None, 2, "2", "0,1"),
        ("6", 1, "1", "6"),
        ("7,3", 2, "2", "7,3"),
        ("7,3,5", 3, "2", "7,3"),
        ("GPU-5ebe9f43,MIG-1b2c", 2, "2", "GPU-5ebe9f43,MIG-1b2c"),
        ("", 0, "2", "-1,-1"),  # hidden GPUs stay hidden: -1 is none
    ],
)
def test_the_ranks_get_the_devices_that_are_visible(stage, tmp_path, visible, gpus, ranks, given):
    """Under the real launcher, which needs no GPU to hand them out."""
    planned = stage(RANKS=ranks, PER_DEVICE="8", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    program = tmp_path / "rank.py"
    program.write_text(
        'import os; rank, devices = os.environ["LOCAL_RANK"], os.environ["CUDA_VISIBLE_DEVICES"]\n'
        'os.write(1, f"rank {rank} {devices}\\n".encode())'
    )
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*planned.launched(gpus), program], env=variables, capture_output=True, text=True)
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert told == [f"rank {rank} {given}" for rank in range(int(ranks))], done.stderr[-2000:]


def test_what_a_hostfile_and_the_variable_cannot_agree_on_is_refused(stage, tmp_path, capsys):
    (tmp_path / "hosts").write_text("# slots=9\none slots=1\ntwo slots=3\n")
    planned = stage(HOSTFILE=str(tmp_path / "hosts"), PER_DEVICE="8", CUDA_VISIBLE_DEVICES="6")
    assert planned.ranks == 4
    with pytest.raises(SystemExit):
        launch.check_machine(planned)
    assert "CUDA_VISIBLE_DEVICES=6 cannot agree" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NNODES": "x[$(touch pwned)]"}, "NNODES='x[$(touch pwned)]': give a whole number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK='2': give a whole number from 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a b"}, "MASTER_ADDR='a b'"),
        ({"NNODES": "2"}, "MASTER_ADDR='': give the host of node 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ({"REPORT_TO": "none\n--bf16"}, "control character"),
        ({"RANKS": "1_0"}, "RANKS=1_0"),
    ],
)
def test_a_variable_is_checked_where_it_enters(stage, variables, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage(**variables)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# -- settings


def changed(monkeypatch, tmp_path, before, checkpoint=True, done=False, **now):
    """What `check_settings` says of a stage that was begun with `before` and goes on with `now`."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANKS", "PER_DEVICE", "REPORT_TO"):
        monkeypatch.delenv(name, raising=False)
    planned = launch.plan("llava-tiny", "pretrain")
    planned.out.mkdir(parents=True, exist_ok=True)
    if checkpoint:
        (planned.out / "checkpoint-50").mkdir(exist_ok=True)
    if done:
        (planned.out / "done").touch()
    (planned.out / "command").write_text(json.dumps(planned.described | before))
    return launch.check_settings(planned)


def test_a_smaller_batch_of_the_same_rows_goes_on_in_mid_stage(monkeypatch, tmp_path):
    more = {"per_device_train_batch_size": "64", "gradient_accumulation_steps": "0"}
    said = changed(monkeypatch, tmp_path, more)
    assert "per_device_train_batch_size (PER_DEVICE) was 64, is 32" in said and "the same rows" in said
    assert changed(monkeypatch, tmp_path, {"report_to": "wandb", "unlabelled": "skip"}) is None
    assert changed(monkeypatch, tmp_path, {"ranks": "8"}, done=True) is None


def test_what_changed_is_named_and_how_to_go_on(monkeypatch, tmp_path, capsys):
    for before, message in (
        ({"ranks": "8"}, "remove it to start over, or go on with RANKS=8: ranks (RANKS) was 8, is 1"),
        ({"learning_rate": "0.5"}, "remove it, or undo the change: learning_rate was 0.5, is 0.005"),
        ({"odd": "1"}, "odd was 1, is not set"),
    ):
        with pytest.raises(SystemExit):
            changed(monkeypatch, tmp_path, before)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    assert changed(monkeypatch, tmp_path, {"ranks": "8"}, checkpoint=False) is None  # nothing is lost yet


def test_a_run_that_began_before_settings_were_json_is_read(tmp_path):
    old = "1 ranks: scripts/train.py --train_module llava.train.train --image_folder /a b/c --seed 0\n"
    (tmp_path / "command").write_text(old)
    assert launch.read_settings(tmp_path / "command") == {
        "ranks": "1", "train_module": "llava.train.train", "image_folder": "/a b/c", "seed": "0"
    }  # fmt: skip


@pytest.mark.parametrize("seed", ("x", "", "-1", "0/../../x", "01", "\u0661", "4294967296", "1 "))
def test_a_seed_is_a_number(seed):
    with pytest.raises(config.ConfigError):
        config.seed(seed)


# -- locks and files


def test_a_lock_is_held_by_one_and_by_its_children(tmp_path):
    held = common.lock(tmp_path / "lock", pytest.fail)
    with pytest.raises(common.Busy):
        common.lock(tmp_path / "lock", pytest.fail)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held])
    os.close(held)
    with pytest.raises(common.Busy):
        common.lock(tmp_path / "lock", pytest.fail)
    child.kill()
    child.wait()
    os.close(common.lock(tmp_path / "lock", pytest.fail))


def test_a_lock_follows_no_link_and_empties_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        common.lock(tmp_path / "link", pytest.fail)
    os.close(common.lock(tmp_path / "mine", pytest.fail))
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_locks_on_the_file_system_runs_are_told_so_and_kept_apart(tmp_path):
    """No file system here lacks them: the system call is answered as Lustre does, in two real processes."""
    code = (
        "import errno, fcntl, os, sys; from pathlib import Path; from scripts import common\n"
        "def flock(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        "fcntl.flock = flock\n"
        f"try: common.lock(Path({str(tmp_path / 'lock')!r}), print)\n"
        "except common.Busy: print('busy')\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    told = first.stdout.readline()
    assert "has no locks (Function not implemented)" in told and "start no other on another machine" in told
    second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input="", stdout=subprocess.PIPE, text=True)
    assert second.stdout == "busy\n"
    first.communicate("")
    third = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input="", stdout=subprocess.PIPE, text=True)
    assert third.stdout == told


@pytest.mark.parametrize("path", (".", "..", "../other", "/", "a/.."))
def test_only_what_is_below_its_folder_is_removed(tmp_path, path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is not removed"):
        common.remove_below(tmp_path / "mine" / path, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and (tmp_path / "other").is_dir()


def test_a_link_is_removed_and_not_what_it_names(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "mine/link").symlink_to(tmp_path / "other")
    common.remove_below(tmp_path / "mine/link", tmp_path / "mine")
    assert not (tmp_path / "mine/link").is_symlink() and (tmp_path / "other").is_dir()


def test_the_users_own_torch_extensions_are_left_alone(stage, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    planned = stage()
    assert launch.variables(planned, 0)["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    own = Path(launch.variables(planned, 0)["TORCH_EXTENSIONS_DIR"])
    assert own.is_relative_to(ROOT)
    for name in ("ops/lock", "ops/new/lock", "lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    launch.remove_stale_locks(tmp_path)
    assert (
        not (tmp_path / "ops/lock").exists() and (tmp_path / "ops/new/lock").exists() and (tmp_path / "lock").exists()
    )


def test_a_compiler_that_takes_long_keeps_its_lock(tmp_path):
    """Until it ends, however that is: then the lock that it left is removed."""
    path = tmp_path / "ops/lock"
    path.parent.mkdir()
    code = f"import os, time; os.open({str(path)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as compiler:
        compiler.stdout.readline()
        os.utime(path, (0, 0))
        launch.remove_stale_locks(tmp_path)
        assert path.exists()
        compiler.kill()
    launch.remove_stale_locks(tmp_path)
    assert not path.exists()


def test_the_memory_that_ranks_leave_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SHARED", tmp_path)
    left, used, others = (tmp_path / f"deepspeed_allreduce_buffer_{os.getuid() + user}_127.0.0.1_{port}_0"
                          for user, port in ((0, 1), (0, 2), (1, 1)))  # fmt: skip
    for path in (left, used, others):
        path.touch()
    with used.open():
        launch.remove_left_buffers()
        assert sorted(tmp_path.iterdir()) == sorted([used, others])


# -- children


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_whatever_ends_a_launcher_ends_its_children(tmp_path, number):
    code = (
        "import signal, sys; from scripts import common\n"
        # A job in a shell's background inherits that SIGINT is ignored.
        "for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)\n"
        "job = common.Job(lambda: common.start(['sleep', sys.argv[1]]))\n"
        "with common.signals_raise(): common.run_abreast([[job], [job]], 2)"
    )
    marker = f"60.{os.getpid()}{int(number)}"
    parent = subprocess.Popen([sys.executable, "-c", code, marker], cwd=ROOT)

    def sleeping():
        return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", marker]]

    while len(sleeping()) < 2:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 10
    while sleeping() and time.monotonic() < until:
        time.sleep(0.05)
    assert not sleeping()


def test_lanes_stop_at_a_failure_or_go_on(tmp_path):
    def job(name, code=0):
        return common.Job(lambda: common.start(["sh", "-c", f"echo {name} >>{tmp_path}/ran; exit {code}"]))

    for go_on, ran in ((False, {"a"}), (True, {"a", "c"})):
        (tmp_path / "ran").write_text("")
        assert not common.run_abreast([[job("a", 1), job("b")], [job("c")]], 1, go_on)
        assert set((tmp_path / "ran").read_text().split()) == ran


def test_a_full_disk_is_one_line(bare, tmp_path):
    for name in (".venv", "upstream"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "results").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "results"]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("may not mount a file system here (root may)")
    try:
        with open(tmp_path / "results/full", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        code, _, err = bare("scripts/train.sh", "llava-tiny", "pretrain")
        assert code == 1 and "No space left on device" in err and err.count("\n") == 1
    finally:
        subprocess.run(["umount", tmp_path / "results"], check=True)


# -- evaluations


def test_wholeness_hangs_on_contents_and_nothing_whole_is_removed(tmp_path):
    checkpoint, out = tmp_path / "small-finetune", tmp_path / "eval"
    checkpoint.mkdir()
    (checkpoint / "done").write_text("2026-01-01T00:00:00Z\n")
    write_task(out / "digits", [True, False, True, True])
    record(out / "digits", "of-this")
    os.utime(checkpoint / "done")  # newer than the results, as in a copy
    assert evaluation.is_whole(out / "digits", "digits", checkpoint, "of-this")
    assert not evaluation.is_whole(out / "digits", "digits", checkpoint, "of-another")
    before = {path.name: path.read_bytes() for path in (out / "digits").rglob("*") if path.is_file()}
    evaluation.move_aside(out / "digits", "digits")
    kept = out / ".replaced/digits.1"
    assert before == {path.name: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert not (out / "digits").exists()


def test_half_a_results_file_is_evaluated_again_without_a_traceback(tmp_path):
    write_task(tmp_path / "digits", [True, False])
    (file,) = (tmp_path / "digits").glob("*/*_results.json")
    file.write_bytes(file.read_bytes()[:40])
    (tmp_path / "done").touch()
    assert not evaluation.is_whole(tmp_path / "digits", "digits", tmp_path, "of-this")
    evaluation.move_aside(tmp_path / "digits", "digits")
    assert not (tmp_path / "digits").exists() and not (tmp_path / ".replaced").exists()


def test_results_from_before_they_named_their_checkpoint_are_kept(tmp_path, capsys):
    write_task(tmp_path / "digits", [True, False])
    (tmp_path / "done").touch()
    assert evaluation.is_whole(tmp_path / "digits", "digits", tmp_path, "of-this")
    assert "did not say which checkpoint" in capsys.readouterr().err
    assert not evaluation.is_whole(tmp_path / "digits", "digits", tmp_path, "of-another")
