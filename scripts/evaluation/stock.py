"""Runs stock lmms-eval in this process, its own command line, with the three things that no flag of it can do.

1. MMBench: where stock's rules find no option in an answer, a judge is asked, and where that fails too stock draws a
   random letter. Here MMBENCH_JUDGE=rules asks no one, and such an answer is wrong. With MMBENCH_JUDGE=URL, a judge
   (MMBENCH_MODEL) that names no option makes the answer wrong, and one that is out of reach ends the run.
2. no_option.json, beside lmms-eval's folder, counts the answers in which the rules of MMBench, MMMU and MMT-Bench find
   no option. For the last two stock draws a letter at random: from seed 0, the same each time on as many processes.
3. Without CUDA the stock models refuse to run on several processes: they are told that these are GPUs, and get the CPU.
"""

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.pop(0)  # this folder, whose names must not hide anyone's

os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # a data set's own script is never run

import torch
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

from scripts.common import die_with_parent


def argument(name):
    return sys.argv[sys.argv.index(name) + 1]


def never_guess(judge):
    """MMBench_Evaluator without random letters: "Z" is no option, and so is never right."""
    stock_extract, stock_ask = MMBench_Evaluator.extract_answer_from_item, MMBench_Evaluator.get_chat_response

    def ask(self, prompt, **settings):
        reply = stock_ask(self, prompt, **settings)
        if "Failed to obtain answer via API" in reply:
            raise ConnectionError(f"MMBench's judge, {self.model_version} at {self.API_URL}, does not answer")
        return reply

    def extract(self, item):
        if judge == "rules":
            return "Z", ""
        self.model_version = os.environ.get("MMBENCH_MODEL", self.model_version)
        letter, why = stock_extract(self, item)
        return ("Z" if "randomly generate" in why else letter), why

    MMBench_Evaluator.extract_answer_from_item, MMBench_Evaluator.get_chat_response = extract, ask


def names_option(task, row):
    """Whether stock's own rules find an option in a logged sample's answer; None where they look for none."""
    answer, doc = row["filtered_resps"][0], row["doc"]
    if task.startswith("mmbench"):
        item = {"prediction": answer.strip()} | {letter: doc[letter] for letter in "ABCD"}
        return bool(MMBench_Evaluator().prefetch_answer(item))
    stock = importlib.import_module(f"lmms_eval.tasks.{task.split('_')[0]}.utils")
    stock.random = SimpleNamespace(choice=lambda letters: None)  # what it would draw
    if task == "mmt_val":
        letters = [letter for letter in "ABCDEFGHI" if doc.get(letter)]
        return bool(stock.parse_multi_choice_response(answer.strip(), letters))
    if doc["question_type"] != "multiple-choice":
        return None
    options, letters = stock.get_multi_choice_info(stock.ast.literal_eval(doc["options"]))
    return bool(stock.parse_multi_choice_response(answer, letters, options))


def count_no_option(task, judge):
    out = Path(argument("--output_path"))
    for samples in out.glob(f"*/*_samples_{task}.jsonl"):
        named = [names_option(task, json.loads(line)) for line in samples.open(encoding="utf-8")]
        counts = {"rows": len(named), "no_option": named.count(False), "then": judge}
        (out / "no_option.json").write_text(json.dumps(counts) + "\n")
        print(f"{task}: the rules find no option in {named.count(False)} of {len(named)} answers; then: {judge}")


def processes_without_cuda(model):
    """In the names that lmms_eval/models/MODEL.py looks up."""
    stock = importlib.import_module(f"lmms_eval.models.{model}")
    kinds = stock.DistributedType
    stock.DistributedType = SimpleNamespace(FSDP=kinds.FSDP, DEEPSPEED=kinds.DEEPSPEED, MULTI_GPU=kinds.MULTI_CPU)
    load = stock.load_pretrained_model
    stock.load_pretrained_model = lambda *args, **settings: load(*args, **{**settings, "device_map": "auto"})
    stock.torch = SimpleNamespace(**{**vars(torch), "device": lambda name: torch.device("cpu")})


def main():
    if "LOCAL_RANK" in os.environ:  # under a launcher
        die_with_parent()
    task, judge = argument("--tasks"), os.environ.get("MMBENCH_JUDGE", "")
    if task.startswith("mmbench"):
        never_guess(judge)
        judge = "wrong" if judge == "rules" else f"{os.environ.get('MMBENCH_MODEL', 'the stock model')} at {judge}"
    else:
        judge = "a random letter"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available():
        processes_without_cuda(argument("--model"))
    runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
    if os.environ.get("RANK", "0") == "0" and task.startswith(("mmbench", "mmmu", "mmt")):
        count_no_option(task, judge)


main()
