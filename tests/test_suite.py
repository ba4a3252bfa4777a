"""scripts/eval.sh over the paper's suite: lmms-eval's stock tasks, unmodified, on what standins.py makes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import tomllib

from scripts.data import weights
from scripts.evaluation.results import read
from tests.helpers import ROOT

COLUMNS = tomllib.loads((ROOT / "scripts/evaluation/suite.toml").read_text())["column"]
TASKS = list(dict.fromkeys(column["task"] for column in COLUMNS))
WORDS = ["A", "B", "C", "D", "red", "circle", "yes", "no", "one"]  # all that the random model says


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    subprocess.run([sys.executable, "-m", "scripts.miniature.standins", folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, llava, vision_tower):
    """A random LLaVA as training leaves it, whose answers are a few of WORDS."""
    import sentencepiece
    import torch
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "llava"
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(
        "A chat between a curious user and an artificial intelligence assistant. what color is the shape?\n"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        user_defined_symbols=WORDS, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False, pad_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = llava.LlavaLlamaForCausalLM(
        llava.LlavaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=2048, mm_vision_tower=str(vision_tower), mm_hidden_size=16,
            mm_projector_type="linear", mm_vision_select_layer=-2, mm_use_im_patch_token=False, initializer_range=0.5,
        )
    )  # fmt: skip
    words = tokenizer.convert_tokens_to_ids(WORDS)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[words] = torch.randn(len(words), 32)
    # An answer ends with "circle" or a letter: no 1,024 tokens.
    model.generation_config.eos_token_id = [2, *words[:4], words[5]]
    model.save_pretrained(folder)
    (folder / "done").touch()
    return folder


@pytest.fixture
def suite(tmp_path, standins, checkpoint):
    """suite(tasks=..., ranks=1, **environment) runs eval.sh in a folder that looks like the repository; its .out is
    where results go, and .start the same without waiting."""
    root = tmp_path / "kit"
    root.mkdir()
    for entry in (".venv", "upstream", "vista_patch"):
        (root / entry).symlink_to(ROOT / entry)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    run = root / "results/suite/seed0"
    run.mkdir(parents=True)
    (run / "llava-mine-finetune").symlink_to(checkpoint)

    def start(tasks=TASKS, ranks=1, public="", **environment):
        config = f'base = "llava-tiny-suite"\ntasks = {json.dumps(tasks)}\nranks = {ranks}\n'
        config += f'checkpoint = "{public}"\nprofile = "full"\n' if public else ""
        (root / "scripts/configs/llava-mine.toml").write_text(config)
        environment = {"EVAL_DATA": str(standins), "MMBENCH_JUDGE": "rules"} | environment
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MMBENCH", "OPENAI"))}
        command, environment = [root / "scripts/eval.sh", "llava-mine"], inherited | environment
        log = (root / "log.txt").open("w")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def evaluate(*args, **environment):
        return start(*args, **environment).wait(), (root / "log.txt").read_text()

    evaluate.start, evaluate.out, evaluate.root = start, run / "eval/llava-mine", root
    return evaluate


def results(folder):
    (file,) = folder.glob("*/[0-9]*_results.json")
    (samples,) = folder.glob("*/*_samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(file.read_text())["results"][folder.name], sorted(rows, key=lambda row: row["doc_id"])


def answers(folder):
    return [row["filtered_resps"] for row in results(folder)[1]]


def check_columns(out, tasks):
    """Each column of the paper's tables is a number in its task's results."""
    for column in COLUMNS:
        if column["task"] in tasks:
            value = results(out / column["task"])[0][column["key"]]
            value = value[column["field"]] if "field" in column else value
            assert 0 <= value * column["scale"] <= {"MME perception": 2000, "OCRBench": 1000}.get(column["name"], 800)


@pytest.mark.suite
def test_all_18_tasks_run_and_give_the_papers_19_columns(suite):
    assert len(TASKS) == 18 and len(COLUMNS) == 19
    start = time.time()
    code, log = suite()
    print(f"{time.time() - start:.0f} s\n{log}")
    assert code == 0, log
    check_columns(suite.out, TASKS)
    # MMMU's rules find a letter before a space or the end, MMT-Bench's one that stands alone; else one is drawn.
    for task, finds in (
        ("mmmu_val", lambda answer: answer[-1] in "ABCD"),
        ("mmt_val", lambda answer: answer in "ABCD"),
    ):
        rows = [row for row in results(suite.out / task)[1] if row["doc"].get("question_type") != "open"]
        named = [finds(row["filtered_resps"][0]) for row in rows]
        counts = json.loads((suite.out / task / "no_option.json").read_text())
        assert counts == {"rows": 8, "no_option": named.count(False), "then": "a random letter"}
        assert any(named) and not all(named)
    code, log = suite()
    assert code == 0 and log.count("is whole, skipped") == 18


def says(row):
    """The letter that MMBench's rules should find in an answer of WORDS: the letter alone, or the one option named."""
    answer = row["filtered_resps"][0]
    named = [letter for letter in "ABCD" if row["doc"][letter] in answer]
    return answer if answer in "ABCD" else named[0] if len(named) == 1 else None


def test_two_processes_answer_as_one_and_without_a_judge_no_option_is_wrong(suite):
    task = "mmbench_en_dev"
    code, log = suite([task])
    assert code == 0, log
    check_columns(suite.out, [task])
    one = suite.out.rename(suite.out.with_name("one"))
    code, log = suite([task], ranks=2)
    assert code == 0 and "on 2 x cpu" in log, log
    assert answers(suite.out / task) == answers(one / task)
    _, rows = results(one / task)
    assert len({row["filtered_resps"][0] for row in rows}) > 4  # the model does not say one thing always
    right = {row["doc"]["index"] % 1_000_000 for row in rows}
    right -= {row["doc"]["index"] % 1_000_000 for row in rows if says(row) != row["doc"]["answer"]}
    for folder in (one, suite.out):
        assert results(folder / task)[0]["gpt_eval_score,none"] == 100 * len(right) / 4
        counts = json.loads((folder / task / "no_option.json").read_text())
        assert counts == {"rows": 16, "no_option": sum(says(row) is None for row in rows), "then": "wrong"}
        assert 0 < counts["no_option"] < 16


@pytest.fixture
def judge():
    """judge(reply, ...): a server's address that gives these replies, the last one ever after; .asked are the requests'
    models and keys."""
    servers, asked = [], []

    def serve(*replies):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((request["model"], self.headers["Authorization"]))
                reply = replies[min(len(asked), len(replies)) - 1]
                self.send_response(200 if reply else 503)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1/chat/completions"

    serve.asked = asked
    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.suite
def test_a_judge_is_asked_and_what_it_cannot_tell_is_wrong_not_random(suite, judge, tmp_path):
    task, key = "mmbench_en_dev", tmp_path / "key"
    key.write_text("secret\n")
    url = judge("A", "I cannot tell")
    settings = {"MMBENCH_JUDGE": url, "MMBENCH_MODEL": "some-model", "OPENAI_API_KEY_FILE": str(key)}
    code, log = suite([task], **settings)
    assert code == 0, log
    assert len(judge.asked) > 3 and set(judge.asked) == {("some-model", "Bearer secret")}
    counts = json.loads((suite.out / task / "no_option.json").read_text())
    assert counts["then"] == f"some-model at {url}" and counts["no_option"] > 0
    assert "secret" not in (suite.out / task / "log.txt").read_text() + log
    shutil.rmtree(suite.out / task)
    assert suite([task])[0] == 0  # by the rules alone
    assert results(suite.out / task)[0]["gpt_eval_score,none"] == 0


@pytest.mark.suite
def test_a_judge_that_goes_away_ends_the_run(suite, judge):
    code, log = suite(["mmbench_en_dev"], MMBENCH_JUDGE=judge("A", ""))
    assert code == 1 and "does not answer" in log and not (suite.out / "mmbench_en_dev").exists()


@pytest.mark.parametrize(
    "tasks,environment,message",
    [
        (["mme", "mmbench_en_dev"], {"MMBENCH_JUDGE": ""}, "MMBENCH_JUDGE=rules calls them wrong"),
        (["mmbench_en_dev"], {"MMBENCH_JUDGE": "gpt"}, "MMBENCH_JUDGE=rules calls them wrong"),
        (["mmbench_en_dev"], {"MMBENCH_JUDGE": "http://127.0.0.1:9/v1"}, "at http://127.0.0.1:9/v1, does not answer"),
        (["mme", "gqa"], {"EVAL_DATA": "/nowhere"}, "the data set lmms-lab/GQA is not in /nowhere/lmms-lab/GQA"),
        (["mme", "refcoco_bbox_val"], {"PATH": "{without_java}"}, "install Java"),
    ],
)
def test_what_a_task_lacks_is_told_before_the_first_one_starts(suite, tmp_path, tasks, environment, message):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mkdir", "flock", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool))
    environment = {key: value.format(without_java=tools) for key, value in environment.items()}
    code, log = suite(tasks, **environment)
    assert code == 2 and message in log and "Traceback" not in log
    assert [path.name for path in suite.out.iterdir()] == [".lock"]


def test_a_data_set_of_which_a_part_is_missing_is_told(suite, standins, tmp_path):
    shutil.copytree(standins / "lmms-lab/MME", tmp_path / "lmms-lab/MME")
    (file,) = tmp_path.glob("lmms-lab/MME/*/*.parquet")
    file.rename(file.with_name("test-00000-of-00002.parquet"))
    code, log = suite(["mme"], EVAL_DATA=str(tmp_path))
    assert code == 2 and "data has 1 of 2 test-* files: download lmms-lab/MME again" in log


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


@pytest.mark.suite
def test_killed_and_continued_ends_as_if_it_had_not_been(suite):
    """SIGKILL of all, SIGKILL of eval.sh alone (its task goes on, and is waited for), SIGTERM."""
    tasks = ["mmmu_val", "mme"]
    code, log = suite(tasks)
    assert code == 0, log
    whole = suite.out.rename(suite.out.with_name("whole"))
    log = suite.out / ".mmmu_val.partial/log.txt"

    def running():
        return [p for p in psutil.process_iter(["cmdline"]) if str(suite.root) in " ".join(p.info["cmdline"] or ())]

    for kill in (
        lambda process: os.killpg(process.pid, signal.SIGKILL),
        lambda process: process.kill(),
        lambda process: process.terminate(),
    ):
        process = suite.start(tasks)
        wait_for(lambda: log.exists() and "Running generate_until" in log.read_text())
        kill(process)
        code = process.wait()
        if code == 143:
            wait_for(lambda: not running())
    code, out = suite(tasks)
    assert code == 0, out
    for task in tasks:
        assert results(suite.out / task)[0] == results(whole / task)[0]
        assert answers(suite.out / task) == answers(whole / task)


# -- the test split of VQAv2


@pytest.mark.suite
def test_vqav2s_test_split_leaves_a_file_for_its_server(suite):
    code, log = suite(["vqav2_test"])
    assert code == 0, log
    sent = read(suite.out / "vqav2_test", "vqav2_test").submission
    assert (sent.questions, sent.whole, sent.score) == (8, False, None) and sent.challenge.column == "VQAv2"
    rows = json.loads(sent.path.read_text())
    assert sorted(row["question_id"] for row in rows) == list(range(8)) and {
        row.keys() == {"question_id", "answer"} for row in rows
    } == {True}
    assert any(row["answer"] for row in rows)
    code, log = suite(["vqav2_test"])
    assert code == 0 and log.count("is whole, skipped") == 1


# -- a public checkpoint

PUBLIC = Path("data/models/llava-v1.5-7b")
TOWER = Path("data/models/clip-vit-large-patch14-336")


@pytest.fixture
def public(suite, checkpoint, vision_tower):
    """suite(["mmstar"], public=PUBLIC) evaluates the suite's checkpoint as if it came from the hub: in several files,
    with the hub's name of its vision tower, and taken by data.sh."""
    import torch
    from safetensors.torch import load_file

    folder, tower = suite.root / PUBLIC, suite.root / TOWER
    shutil.copytree(vision_tower, tower)
    (tower / "merges.txt").touch()
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "done"))
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    torch.save({name: tensors[name] for name in names if "mm_projector" in name}, folder / "mm_projector.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    weights.convert(folder)
    change(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    suite(["mmstar"], public=PUBLIC)  # writes the config, and is refused
    command = ["scripts/data.sh", "llava-mine", "--offline"]
    done = subprocess.run(command, cwd=suite.root, capture_output=True, text=True)
    assert "eval-MMStar is missing" in done.stderr and "llava-v1.5-7b" not in done.stderr.split("hashes it")[-1]
    return suite


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.suite
def test_a_public_checkpoint_answers_as_the_same_one_trained_here(public):
    code, log = public(["mmstar"])
    assert code == 0, log
    trained = public.out.rename(public.out.with_name("trained"))
    code, log = public(["mmstar"], public=PUBLIC)
    assert code == 0 and f"eval: {PUBLIC} mmstar took" in log, log
    assert answers(public.out / "mmstar") == answers(trained / "mmstar")
    code, log = public(["mmstar"], public=PUBLIC)
    assert code == 0 and f"{PUBLIC} mmstar is whole, skipped" in log


def test_a_public_checkpoint_of_another_class_is_told_before_the_first_task_starts(public):
    """test_public.py has what else can be wrong with one."""
    change(public.root / PUBLIC / "config.json", architectures=["LlavaForConditionalGeneration"])
    code, log = public(["mmstar"], public=PUBLIC)
    assert code == 2 and "the backbone llava evaluates LlavaLlamaForCausalLM" in log and len(log.splitlines()) == 1, log
    assert not public.out.exists()
