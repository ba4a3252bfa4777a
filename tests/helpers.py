"""What several test modules share: the loss's reference, small inputs, and stand-ins for parts of a run."""

import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.training import launch

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT / "upstream" / "llava"

# -- the loss


def reference(x, h, text, image, metric, reduction, ramp):
    """Slow and literal: a loop over samples and tokens, nothing shared with vista_loss."""
    x, h = x.double(), h.double()
    terms = []
    for b in range(len(x)):
        images = [i for i in range(x.shape[1]) if image[b, i]]
        words = [i for i in range(x.shape[1]) if text[b, i]]
        if not images or not words:
            continue
        s, m = h[b, images[-1]], len(words)
        term = 0.0
        for t, i in enumerate(words, start=1):
            f = {"t/m": t / m, "t": t, "one": 1}[ramp]
            if metric == "l2":
                squared = (x[b, i] - s).pow(2)
                term = term + f * (squared.mean() if reduction == "mean" else squared.sum())
            else:
                term = term - f * torch.dot(x[b, i], s) / (x[b, i].norm() * s.norm())
        terms.append(term / m)
    return sum(terms) / len(terms) if terms else 0 * x.sum()


# -- a batch of stock LLaVA's inputs

IMAGE, PAD, PATCHES = -200, 0, 4
ROWS = [  # token ids; IMAGE is the placeholder
    [1, 5, IMAGE, 6, 7, 8, 9, 10],
    [1, 11, 12, 13],  # text only
    [1, IMAGE, 14, 15, IMAGE, 16, 17, 18],  # two images
    [1, 19, 20, 21, 22, 23, 24, 25, 26, 27, IMAGE, 28, 29],  # cut inside the image by max_length 12
    [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, IMAGE, 42],  # cut before the image
    [IMAGE],  # no text
]


def batch(rows=ROWS, left=False, images=None):
    width = max(map(len, rows))
    pad = [[PAD] * (width - len(row)) for row in rows]
    ids = torch.tensor([p + r if left else r + p for r, p in zip(rows, pad, strict=True)])
    real = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for r, p in zip(rows, pad, strict=True)
    ]
    mask = torch.tensor(real).bool()
    # Every third label is ignored, as a prompt is: VISTA reads all text tokens, prompt and answer.
    labels = torch.where(mask & (ids != IMAGE) & (torch.arange(width) % 3 != 1), ids, -100)
    generator = torch.Generator().manual_seed(1)
    count = sum(max(1, row.count(IMAGE)) for row in rows)  # a text-only row takes one dummy image
    if images is None:
        images = torch.randn(count, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images}


def stock(model, **inputs):
    return type(model).forward.__wrapped__(model, **inputs)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- training


def run_stock(
    module, flags, tree, driver=("scripts/training/stock.py",), launcher=(), python=sys.executable, **environment
):
    """Runs a stock train.py, --output_dir in `flags`; returns the trainer's log, one dict per step."""
    command = [*(launcher or [python]), *driver, "--train_module", module]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment |= {
        "PYTHONPATH": f"{tree}:{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    # The exact pins' deepspeed wants Intel's extension of torch for DS_ACCELERATOR=cpu.
    inherited = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR" or python == sys.executable}
    extensions = launch.extensions(Path(python).parents[1], Path(flags["output_dir"]))
    environment["TORCH_EXTENSIONS_DIR"] = str(extensions)
    if launcher:
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "LOCAL_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started, out = subprocess.Popen(command, cwd=ROOT, env=inherited | environment, **pipes), None
    while out is None:
        try:
            out, err = started.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            launch.remove_stale_locks(extensions)  # a compiler that was killed with an earlier run of the tests
    launch.remove_left_buffers()
    assert started.returncode == 0, out[-2000:] + err[-4000:]
    state = json.loads((Path(flags["output_dir"]) / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def python_of(name):
    """The Python of an environment of docker/locks/, which is made where it is missing; skips without a Python 3.10."""
    made = subprocess.run(["scripts/setup/env.sh", name], cwd=ROOT, capture_output=True, text=True)
    if "No interpreter found for Python 3.10" in made.stderr:
        pytest.skip("no Python 3.10 on this machine, and none could be downloaded")
    assert made.returncode == 0, made.stderr
    return str(ROOT / f".venv-{name}/bin/python")


def patched_tinyllava():
    """upstream/tinyllava, patched; skips where GitHub is out of reach."""
    for script in ("upstream", "patch"):
        done = subprocess.run([f"scripts/setup/{script}.sh", "tinyllava"], cwd=ROOT, capture_output=True, text=True)
        if (script, done.returncode) == ("upstream", 3):
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return ROOT / "upstream/tinyllava"


def small_experiment(tree, base, parts, models, stages, train):
    """Writes the config "small": six steps of these stages on a folder's data and models, over `base`."""
    train = {"model_name_or_path": f"{parts}/{models[0]}", "vision_tower": f"{parts}/{models[1]}"} | train
    tables = {"train": train | {"dataloader_num_workers": 0}}
    for stage in stages:
        tables[stage] = {"data_path": f"{parts}/{stage}.json", "image_folder": f"{parts}/images"}
        tables[stage] |= {"max_steps": 6, "global_batch": 8, "per_device_train_batch_size": 4}
    lines = [f'base = "{base}"', 'run = "results"']
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (tree / "scripts/configs/small.toml").write_text("\n".join(lines))


def qwen2(lines, out):
    """A small random Qwen2 and its tokenizer, as Qwen2-0.5B: one token is end and padding, keys and values have fewer
    heads, and one matrix is the embedding and the head."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(out))
    tokenizer = Qwen2Tokenizer(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=2048)
    end = tokenizer.eos_token_id
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    return tokenizer, Qwen2ForCausalLM(config)


# -- a checkout whose runs are short

SMALLER = {  # file below scripts: what stands there, and what makes the run short
    "configs/llava-tiny.toml": {"max_steps = 300": "max_steps = 4", "max_steps = 800": "max_steps = 8"}
    | {"save_steps = 200": "save_steps = 3", '["easyvqa", "digits", "easyvqa_blind", ': '["digits", '},
    "configs/llava-tiny-vista.toml": {'["easyvqa", "digits"]': '["digits"]'},
    "configs/llava-tiny-vista-cosine.toml": {'["easyvqa", "digits"]': '["digits"]'},
}  # fmt: skip


def small_kit(folder, smaller=SMALLER):
    """A checkout that `make setup` has not seen yet, but for its environment; its whole run takes minutes."""
    for name in ("docker/locks", "patches", "scripts", "vista_patch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".venv", ".uv"):
        (folder / name).symlink_to(ROOT / name)
    for name, changes in smaller.items():
        text = (folder / "scripts" / name).read_text()
        for before, after in changes.items():
            assert before in text, (name, before)
            text = text.replace(before, after)
        (folder / "scripts" / name).write_text(text)
    return folder


# -- a hub, and a catalog that names it

COMMIT = "c" * 40


def packed(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def picture(kind="PNG", after=0):
    """A small picture, and that many bytes that no reader of it looks at."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue() + os.urandom(after)


def pickled(tensors):
    """A file of torch's, as bytes."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def row(image=None, question="What is it?", **more):
    """A row of a training JSON that both stages take."""
    question = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}]
    return {"conversations": turns} | ({"image": image} if image else {}) | more


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """server.hub: {"datasets/OWNER/NAME": {file: bytes}}, server.plain: {path: bytes}; server.fault(handler, path) may
    answer itself. server.log: (method, path, first byte asked for, bytes of body sent)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        if self.server.fault and self.server.fault(self, path):
            return
        if match := re.fullmatch(r"/api/(?:models|(datasets))/(.*)/revision/(.*)", path):
            commit = match[3] if len(match[3]) == 40 else COMMIT
            files = self.server.hub["/".join(filter(None, match.groups()[:2]))]
            siblings = [
                {"rfilename": name, "size": self.server.claimed.get(name, len(data)), "blobId": "b" * 40}
                | ({"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 134}} if len(data) > 100 else {})
                for name, data in files.items()
            ]
            body = {"id": match[2], "sha": commit, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
            return self.answer(path, json.dumps(body).encode())
        if match := re.fullmatch(r"/(.*)/resolve/([^/]*)/(.*)", path):
            data = self.server.hub[match[1]][match[3]]
            extra = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": match[2]}
            return self.answer(path, self.server.altered.get(path, data), extra)
        data = self.server.altered.get(path, self.server.plain.get(path))
        return self.refuse(404) if data is None else self.answer(path, data)

    def refuse(self, status, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        return True

    def answer(self, path, data, extra=None, stop=None, hold=None):
        """stop: sends that many bytes of the body, waits for the event `hold` and hangs up."""
        first, last = 0, len(data) - 1
        if asked := self.headers.get("Range"):
            begin, end = asked.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        body = b"" if self.command == "HEAD" else data[first : last + 1][:stop]
        self.server.log.append((self.command, path, first, len(body)))
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
            self.wfile.flush()
        if stop is not None:
            hold and hold.wait(60)
            self.close_connection = True
        return True


def write_catalog(folder, catalog):
    def value(v):
        return (
            "{" + ", ".join(f"{json.dumps(k)} = {json.dumps(x)}" for k, x in v.items()) + "}"
            if isinstance(v, dict)
            else json.dumps(v)
        )

    lines = [
        f'["{name}"]\n' + "".join(f"{k} = {value(v)}\n" for k, v in table.items()) for name, table in catalog.items()
    ]
    (folder / "scripts/data/sources.toml").write_text("\n".join(lines))


@contextlib.contextmanager
def serving():
    """A server whose hub and plain are still to be filled."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.plain, server.log, server.fault, server.altered, server.claimed = {}, {}, [], None, {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# -- a finished run

VARIANTS = ["llava-tiny", "llava-tiny-vista", "llava-tiny-vista-cosine"]
ACCURACY = {"llava-tiny": 0.7, "llava-tiny-vista": 0.85, "llava-tiny-vista-cosine": 0.7}
N = 120


def write_task(folder, right):
    """lmms-eval 0.3.0's two files of one task, with the keys that it writes."""
    task, folder = folder.name, folder / "seed0__llava"
    folder.mkdir(parents=True)
    kinds = itertools.cycle([("a 3?", "yes"), ("a 3?", "no")] * 2 + [("left?", digit) for digit in "1234"])
    rows = []
    for i, (ok, (question, answer)) in enumerate(zip(right, kinds, strict=False)):
        doc = {"question_id": f"{task.removesuffix('_blind')}-{i}", "question": question, "answer": answer}
        rows.append({"doc_id": i, "doc": doc, "target": answer, "exact_match": float(ok)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"20260101_000000_samples_{task}.jsonl").write_text(lines)
    scores = {"alias": task, "exact_match,none": float(np.mean(right)), "exact_match_stderr,none": 0.04}
    n = {"original": len(rows), "effective": len(rows)}
    results = {"results": {task: scores}, "versions": {task: 1.0}, "n-samples": {task: n}}
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))


def make_run(root, seeds=1, blind_accuracy=0.2, variants=VARIANTS):
    """A whole run's tree: the files that training, evaluation and the probe leave behind."""
    from scripts.reporting import comparison

    rng = np.random.default_rng(0)
    for seed, name in itertools.product(range(seeds), variants):
        base = root / f"seed{seed}"
        for task in ("digits", "easyvqa"):
            write_task(base / "eval" / name / task, rng.random(N) < ACCURACY[name.removeprefix("tiny")])
            if name.endswith("-tiny"):
                write_task(base / "eval" / name / f"{task}_blind", rng.random(N) < blind_accuracy)
        log = [{"step": s, "loss": 3 / s} for s in range(1, 41)]
        for row in log if "vista" in name else []:
            row.update(loss_ce=2 / row["step"], loss_vista=1 / row["step"], vista_share=row["step"] % 10 and 1.0)
        log.append({"step": 40, "train_runtime": 1.0, "train_loss": 0.5})
        for folder in (f"{name}-pretrain", f"{name}-finetune"):
            (base / folder).mkdir()
            (base / folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        kl = np.exp(-np.arange(30) / 10) * rng.uniform(0.5, 1.5, (16, 1))
        kl[::2, 20:] = np.nan
        arrays = {key: np.full(16, 0.5) for key in comparison.TERMS} | {"kl": kl, "hidden_size": np.array(64)}
        maps = rng.normal(size=(2, 4, 4))
        maps[:, 0, 0] = np.nan if name.startswith("tiny") else 0
        arrays |= {"map": maps, "question": np.array(["what?", "where?"])}
        arrays["image"] = rng.integers(0, 255, (2, 64, 64, 3)).astype("uint8")
        more = np.random.default_rng(1)
        arrays |= {"fact_token": np.tile([3, 9, 15], (16, 1)), "fact_right": more.integers(0, 2, (16, 3)) + 0.0}
        arrays |= {"stage_1_ce": more.random(8), "stage_1_ce_swapped": 1 + more.random(8)}
        arrays |= {key: more.random(6) for key in ("auroc", "hit", "hit_chance")}
        arrays["map_type"] = np.array(["digits"] * 6)
        for term in ("ce", "l2", "cosine"):
            arrays |= {f"size_{term}": 1 + more.random(4), f"grad_{term}": 1 + more.random((4, 3))}
        (base / "probe").mkdir(exist_ok=True)
        np.savez(base / "probe" / f"{name}.npz", **arrays)
    suffix = "\nAnswer the question using a single word or phrase."
    asked = [("a 3?", "yes"), ("a 3?", "no"), ("a 3?", "yes"), *(("left?", digit) for digit in "1234"), ("left?", "1")]
    turns = [{"from": "human", "value": f"<image>\n{q}{suffix}"} for q, _ in asked]
    rows = [{"conversations": [turn, {"from": "gpt", "value": a}]} for turn, (_, a) in zip(turns, asked, strict=True)]
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "finetune.json").write_text(json.dumps(rows))
    (root / "manifest-llava.json").write_text(json.dumps({"kit": {"commit": "c121f04"}}))
    return root
