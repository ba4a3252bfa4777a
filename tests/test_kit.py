"""docker/ without an engine: what a run is given, what is said before one, and what docker/verify.py sees."""

import csv
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import tomllib

from scripts import config
from scripts.evaluation import suite
from tests.helpers import ROOT, UPSTREAM

sys.path.insert(0, str(ROOT / "docker"))
import verify

sys.path.pop(0)
VARIABLES = tomllib.loads((ROOT / "docker/variables.toml").read_text())


def told(*command, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if name.upper() not in VARIABLES}
    environment |= {"HOME": str(cwd)} | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr or "env.sh" in str(command), done.stderr
    return done.returncode, done.stdout, done.stderr


def dry(*options, command=("cuda", "reproduce"), **variables):
    return told(sys.executable, "docker/kit.py", "run", *options, "--dry-run", *command, **variables)


# -- variables


def test_every_variable_that_the_scripts_read_is_in_the_table():
    found = dict.fromkeys(config.VARIABLES, ROOT / "scripts/config.py")
    for path in sorted(p for top in ("scripts", "docker", "ci") for p in (ROOT / top).rglob("*")):
        if path.suffix not in (".sh", ".py", ".sbatch") and path.name != "run":
            continue
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            read = re.findall(r"number\(\"([A-Z_]+)\"", text) + re.findall(
                r"environ(?:\.get\(|\.pop\(|\.setdefault\(|\[)\s*\"([A-Z][A-Z0-9_]+)\"", text
            )
            read += re.findall(r"getenv\(\"([A-Z][A-Z0-9_]+)\"", text)
            own = set(re.findall(r"environ\[\"([A-Z0-9_]+)\"\] = ", text))
        else:
            text = re.sub(r"(?m)^\s*#.*$", "", text)
            read = re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", text)
            own = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", text)) - {"RANKS", "OPENAI_API_KEY"}
            own |= {"PWD", "PATH", "SECONDS", "BASH_SOURCE"}  # bash's and the system's
        found |= {name: path for name in read if name not in own}
    assert {"RANKS", "CUDA_VISIBLE_DEVICES", "EVAL_DATA", "HF_HUB_OFFLINE"} & VARIABLES.keys() and len(found) > 15
    assert not {name: str(path) for name, path in found.items() if name not in VARIABLES}


def test_the_docs_table_is_the_table():
    code, out, _ = told(sys.executable, "docker/kit.py", "variables")
    assert code == 0 and out == (ROOT / "docs/variables.md").read_text("utf-8")


def test_what_the_docs_offer_reaches_the_container_and_no_secret_is_printed(tmp_path):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "token, mine").write_text("secret")
    (tmp_path / "sets").mkdir()
    passed = {name: "secret" for name, about in VARIABLES.items() if about["container"] == "passed"}
    passed |= {"https_proxy": "http://me:secret@proxy"}
    files = {"OPENAI_API_KEY_FILE": tmp_path / "key", "HF_TOKEN_PATH": tmp_path / "token, mine"}
    code, out, err = dry(**passed, **files, EVAL_DATA=tmp_path / "sets")
    assert code == 0 and "secret" not in out + err and err == ""
    words = out.split()
    assert all(words[words.index(name) - 1] == "--env" for name in passed)
    assert {"WANDB_API_KEY", "HTTPS_PROXY", "CUDA_VISIBLE_DEVICES", "MASTER_PORT"} <= passed.keys()
    for name in (*files, "EVAL_DATA"):
        assert f"--env {name}=/run/vista/{name} " in out
    assert f"source={tmp_path}/key,target=/run/vista/OPENAI_API_KEY_FILE,readonly" in out
    assert f"source={tmp_path}/sets,target=/run/vista/EVAL_DATA " in out


def test_env_passes_any_other_and_prints_no_value():
    code, out, err = dry("--env", "MINE", "--env", "KEY=secret", MINE="secret")
    assert code == 0 and "--env MINE --env KEY " in out and "secret" not in out + err
    assert err == "docker: set KEY before you run this line, which has no values\n"
    for wrong, message in (
        (["--env", "MINE"], "MINE: this variable is not set here"),
        (["--env", "a b=c"], "give NAME or"),
    ):
        code, out, err = dry(*wrong)
        assert code == 1 and message in err and len(err.splitlines()) == 1


def test_a_path_adds_no_mount_option(tmp_path):
    for name in ("a,readonly,bind-propagation=shared", 'b"c'):
        code, out, _ = dry("--results", str(tmp_path / name))
        (word,) = [word for word in __import__("shlex").split(out) if "target=/opt/vista/results" in word]
        assert code == 0 and next(csv.reader([word])) == [
            "type=bind",
            f"source={tmp_path}/{name}",
            "target=/opt/vista/results",
        ]
    code, _, err = dry("--data", str(tmp_path / "a\nb"))
    assert code == 1 and "control characters" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name, kind", [("HF_TOKEN_PATH", "file"), ("EVAL_DATA", "folder")])
def test_what_a_variable_names_and_is_not_there_is_told(name, kind):
    code, out, err = dry(**{name: "none"})
    assert code == 1 and f"{name}=none: there is no such {kind}" in err and out == ""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_root_gives_away_no_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "own").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    command = [sys.executable, "docker/kit.py", "run", "--results", tmp_path / "link", "cpu", "doctor"]
    code, _, err = told(*command, DOCKER_HOST="unix:///none")
    assert code == 1 and "user 1000 may not write to" in err and "chown 1000" in err
    assert (tmp_path / "own").stat().st_uid == 0
    command[4] = tmp_path / "new"
    code, _, err = told(*command, "--", DOCKER_HOST="unix:///none")
    assert (tmp_path / "new").stat().st_uid == 1000


def test_each_command_of_the_entrypoint_is_one_that_it_names():
    text = (ROOT / "docker/entrypoint.sh").read_text()
    named = re.search(r"choose (.*?)\"", text)[1].replace(" or ", ", ").split(", ")
    taken = {word for line in re.findall(r"(?m)^    ([a-z |]+)\)", text) for word in line.split(" | ")}
    assert taken == set(named) and "cost" in named


@pytest.mark.parametrize("script", ["docker_build.sh", "docker_run.sh"])
def test_a_bare_clone_is_told_what_to_do(tmp_path, script):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    code, out, err = told(f"scripts/{script}", "cpu", cwd=tmp_path)
    assert code == 2 and err == "docker: .venv is missing: run make setup\n"
    code, out, _ = told(ROOT / "scripts" / script, "--help")
    assert code == 0 and out.startswith("usage: docker/kit.py")


def test_secrets_stay_out_of_images():
    url = "https://me:secret@host/x.whl"
    for argument in (f"FLASH_ATTN={url}", "FLASH_ATTN=https://host/x.whl?sig=secret"):
        code, _, err = told(sys.executable, "docker/kit.py", "build", "--build-arg", argument, "cuda")
        assert code == 1 and "would stay in the image's history" in err and "secret" not in err
    for address in (url, "https://host/x.whl?sig=secret"):
        code, _, err = told("docker/flash_attn.sh", ".venv", address)
        assert code == 2 and "which the image would keep" in err and "secret" not in err


def test_a_missing_hash_of_flash_attn_is_told_at_every_build():
    assert not (ROOT / "docker/locks/flash_attn.sha256").exists()
    for _ in range(2):
        _, _, err = told(sys.executable, "docker/kit.py", "build", "cuda", DOCKER_HOST="unix:///none")
        assert "flash-attn's wheel is trusted as it comes" in err


# -- verify


def test_the_pinned_hash_is_of_the_commits_own_files():
    """Not of what lies here: git's own objects, but for the files that the patch changes."""
    pins = tomllib.loads((ROOT / "patches/upstreams.toml").read_text())["llava"]
    if not (UPSTREAM / ".git").exists():
        pytest.skip("upstream/llava is not a git clone here")

    def git(*words):
        return subprocess.run(["git", "-C", UPSTREAM, *words], check=True, capture_output=True).stdout

    names = git("ls-tree", "-r", "--name-only", pins["commit"]).decode().splitlines()
    lines = []
    for name in names:
        if name in pins["files"] or ("/" in name and name.split("/")[0] not in pins["sparse"]):
            continue
        lines.append((name, hashlib.sha256(git("show", f"{pins['commit']}:{name}")).hexdigest()))
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines))
    assert hashlib.sha256(text.encode()).hexdigest() == pins["others"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "llava/mm_utils.py").write_text("import os\n"),
        lambda tree: (tree / "torch.py").write_text("import os\n"),
        lambda tree: (tree / "llava/constants.py").unlink(),
        lambda tree: (tree / "llava/eval/extra").symlink_to("/etc"),
    ],
)
def test_a_change_in_a_file_that_the_patch_does_not_touch_is_seen(tmp_path, change):
    pins = tomllib.loads((ROOT / "patches/upstreams.toml").read_text())["llava"]
    shutil.copytree(UPSTREAM, tmp_path / "llava", ignore=shutil.ignore_patterns(".git"))
    shutil.copy(f"{UPSTREAM}.source", tmp_path)
    assert verify.upstream(tmp_path / "llava", pins) == []
    change(tmp_path / "llava")
    (line,) = verify.upstream(tmp_path / "llava", pins)
    assert "a file that the patch does not touch is not the pinned one" in line


def test_a_change_in_an_environment_is_seen(tmp_path):
    site = tmp_path / "lib/python3.11/site-packages"
    (site / "x.dist-info").mkdir(parents=True)
    (site / "x.py").write_text("1")
    (site / "x.dist-info/RECORD").write_text(
        "x.py,sha256=a4ayc_80_OGda4BO_1o_V0etpOqiLx1JwB5S3beHW0s,1\nx.dist-info/RECORD,,\n"
    )
    assert verify.packages(tmp_path) == []
    (site / "x.py").write_text("2")
    (site / "sitecustomize.py").write_text("")
    changed, strange = verify.packages(tmp_path)
    assert "x.py is not the file that its package's RECORD tells" in changed
    assert "sitecustomize.py is in no package's RECORD" in strange
    (site / "x.py").unlink()
    assert "x.py: No such file" in verify.packages(tmp_path)[0]


def test_a_record_that_is_wrong_as_published_is_known(tmp_path):
    """decord 0.6.0's, of both upstreams' pins. What the published wheel has is right, and nothing else."""
    info = tmp_path / "lib/python3.10/site-packages/decord-0.6.0.dist-info"
    info.mkdir(parents=True)
    line = f"{info.name}/top_level.txt,sha256=8TBMC8W9caRfSBphoy47j2wFImKqCOgWKD3JVELo5e0,17\n"
    (info / "RECORD").write_text(line)
    (info / "top_level.txt").write_text("decord\n")
    assert verify.packages(tmp_path) == []
    (info / "top_level.txt").write_text("other\n")
    assert "top_level.txt is not the file" in verify.packages(tmp_path)[0]


# -- env.sh


def test_uv_takes_pips_index_and_is_itself_locked_by_hash(tmp_path):
    """A package that only the index of PIP_INDEX_URL has; then pip.conf's, which the variable goes before."""
    wheel = tmp_path / "index/vista-nothing/vista_nothing-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vista_nothing.py", "")
        archive.writestr(
            "vista_nothing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vista-nothing\nVersion: 1.0\n"
        )
        archive.writestr(
            "vista_nothing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("vista_nothing-1.0.dist-info/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    for name in ("scripts/setup/env.sh", "docker/locks/uv.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "docker/locks/cpu.txt").write_text(f"vista-nothing==1.0 --hash=sha256:{digest}\n")
    (tmp_path / ".uv").symlink_to(ROOT / ".uv")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "index")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        for variables, there in (
            ({"PIP_INDEX_URL": here}, True),
            ({"PIP_INDEX_URL": f"{here}/none", "PIP_EXTRA_INDEX_URL": f"{here} {here}/none"}, True),
            ({"PIP_INDEX_URL": here, "UV_DEFAULT_INDEX": "http://127.0.0.1:9/none"}, False),
        ):
            shutil.rmtree(tmp_path / ".venv", ignore_errors=True)
            _, _, err = told("scripts/setup/env.sh", cwd=tmp_path, UV_NO_CACHE=1, no_proxy="127.0.0.1", **variables)
            assert bool(list(tmp_path.rglob(".venv/**/vista_nothing.py"))) == there, err
        server.shutdown()
    lock = (ROOT / "docker/locks/uv.txt").read_text()
    assert lock.startswith("uv==") and "--hash=sha256:" in lock
    assert "--require-hashes -r docker/locks/uv.txt" in (ROOT / "scripts/setup/env.sh").read_text()


# -- the evaluation's view of a data set


@pytest.fixture
def data_set(tmp_path):
    """data_set(card): a folder of data sets, with one of that card, that has a script as harmful sets do."""
    import pandas as pd

    folder = tmp_path / "sets/lmms-lab/MME"
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"a": [1, 2]}).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "MME.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")

    def make(card):
        (folder / "README.md").write_text(card, "utf-8")
        return tmp_path / "sets"

    return make


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: {}\n---\né\n"


def test_a_data_sets_own_script_is_never_run(data_set, tmp_path):
    sets = data_set(CARD.format("data/test-*"))
    earlier = sets / ".cache/sets/lmms-lab/MME"
    earlier.mkdir(parents=True)
    (earlier / "MME.py").symlink_to(sets / "lmms-lab/MME/MME.py")  # an earlier kit linked all
    seen = suite.view(sets, "lmms-lab/MME")
    assert sorted(os.listdir(seen)) == ["README.md", "data"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/lmms-lab").symlink_to(seen.parent)  # as eval.sh does
    script = "import datasets, json; print(json.dumps(datasets.load_dataset('lmms-lab/MME')['test'].to_dict()))"
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "work",
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"a": [1, 2]}, done.stderr
    assert not (tmp_path / "harm").exists()
    assert '"HF_DATASETS_TRUST_REMOTE_CODE"] = "0"' in (ROOT / "scripts/evaluation/stock.py").read_text()


@pytest.mark.parametrize(
    "card",
    [
        CARD.format("../../../secret.parquet"), CARD.format("/etc/passwd"), CARD.format("https://host/x.parquet"),
        CARD.format('"a\\u2028b"'), CARD.format("data/test-*").replace("default", "default\n  data_dir: ../.."),
        "---\nconfigs: 3\n---\n", "---\n[\n---\n", "---\n",
    ],
)  # fmt: skip
def test_a_card_that_names_files_outside_or_is_none_is_one_error(data_set, card):
    with pytest.raises(ValueError, match=r"README\.md is no card of a data set"):
        suite.view(data_set(card), "lmms-lab/MME")
