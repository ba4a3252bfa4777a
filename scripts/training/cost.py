"""What an experiment will take, before it is started: steps, tokens, GPU-hours of training and evaluation, memory per
GPU, disk, and how small an effect its seeds can show.

    python -m scripts.training.cost EXPERIMENT... [--runs N] [--gpus N] [--gpu-memory GB]

For N GPUs (otherwise 1 to 32) of that memory (otherwise 24, 40 and 80 GB): the largest per-device batch up to the
config's that fits, and the accumulation that keeps the global batch; scripts/train.sh takes them as RANKS and
PER_DEVICE. --runs: how many trainings there are of each EXPERIMENT; its variants cost the same.

Training. A forward pass costs 2 FLOPs per weight and token, and causal attention 2 L d T per token. Gradient
checkpointing runs it twice; the backward pass costs two more where the weights train (stage 2), one where gradients
only pass through (stage 1). The vision tower runs forward once. A GPU gives UTILISATION of its dense bf16 peak, or
waits for the CPU, which takes LAYER seconds to start the kernels of a layer.
Memory, for the longest batch that there can be: weights, gradients and Adam's fp32 states (2 + 2 + 12 bytes a weight)
as ZeRO shards them, the layers ZeRO-3 has gathered, one checkpoint per layer or what it keeps without, and the logits.

Evaluation, one question at a time (lmms-eval at batch size 1; a larger batch changes answers): the vision tower and the
prompt as above, then each further token waits for all weights to be read or for each layer's kernels to be started,
whichever takes longer; and PREPARE for what the CPU does alone. Questions are spread over the GPUs.

PUBLIC and PUBLIC_EVALUATION hold what others report; each prediction is printed beside it. Not in it: VISTA's own small
cost, and communication, of which small per-device batches under ZeRO-3 pay more (LLaVA issue 560: about 24 h for
8 x 4 x 4 on 40 GB).
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts import config

UTILISATION = 0.34  # one figure for all: the middle of what PUBLIC's runs reached, 0.23 to 0.43
GIB = 2**30
# Seconds. A layer: Llama 7B in transformers, batch 1, fp16, on an A100 takes 36 ms a token (CTranslate2 issue 1276).
LAYER, PREPARE = 0.036 / 32, 0.04  # to prepare: decode a picture, resize it, tokenize, collect: assumed
START_STAGE, START_TASK = 60, 40  # imports, and loading the weights: assumed
SUITE = Path(__file__).parents[1] / "evaluation/suite.toml"


@dataclass(frozen=True)
class Card:
    name: str
    gib: int
    peak: float  # FLOP/s, bf16, dense
    bandwidth: float  # bytes/s


CARDS = [  # NVIDIA's data sheets; of each size the slowest that is common: an A10G is an RTX 3090's equal
    Card("RTX 3090", 24, 71e12, 936e9),
    Card("A100", 40, 312e12, 1555e9),
    Card("A100", 80, 312e12, 2039e9),
]
A100 = CARDS[1]


@dataclass(frozen=True)
class Transformer:
    layers: int
    d: int
    ffn: int
    ffn_matrices: int
    tokens: int = 0  # that the vision tower runs on
    to_decoder: int = 0  # of them
    vocab: int = 0
    kv: int = 0  # the width of keys and of values, where it is not d
    tied: bool = False  # one matrix is the embedding and the head

    @property
    def matmul(self) -> int:  # weights that a token is multiplied with; the embedding is looked up
        attention = 2 * self.d**2 + 2 * self.d * (self.kv or self.d)
        return self.layers * (attention + self.ffn_matrices * self.d * self.ffn) + self.vocab * self.d

    @property
    def weights(self) -> int:
        return self.matmul + (0 if self.tied else self.vocab * self.d)


@dataclass(frozen=True)
class Data:
    rows: int
    with_image: float  # share of the rows
    text: int  # tokens a row, on average
    longest: int  # text tokens, at most


@dataclass(frozen=True)
class Asked:
    """How a task of lmms-eval asks. All but rows are assumed; rows are suite.toml's where 0."""

    text: int  # tokens of a prompt, LLaVA's system sentence and the template among them
    answer: int  # tokens that are generated, the end among them
    rows: int = 0
    images: float = 1
    counts: bool = True  # its score is the share of right answers, a question each


MODELS = {  # their config.json
    "vicuna-7b-v1.5": Transformer(layers=32, d=4096, ffn=11008, ffn_matrices=3, vocab=32000),
    "phi-2": Transformer(layers=32, d=2560, ffn=10240, ffn_matrices=2, vocab=51200),
    "qwen2-0.5b": Transformer(layers=24, d=896, ffn=4864, ffn_matrices=3, vocab=151936, kv=128, tied=True),
    "clip-vit-large-patch14-336": Transformer(24, 1024, 4096, 2, tokens=577, to_decoder=576),
    # TinyLLaVA drops the tower's first token, which in SigLIP is a patch.
    "siglip-so400m-patch14-384": Transformer(27, 1152, 4304, 2, tokens=729, to_decoder=728),
}
DATA = {
    # 181 MB of JSON: 324 bytes a row, of which a BLIP caption is about 60. The longest is not known: assumed.
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": Data(rows=558_128, with_image=1, text=20, longest=128),
    # Rows: LLaVA issue 657 (40,688 have no image). Text: 1,548 bytes of JSON a row, less about a fifth of markup, at 4
    # bytes a token: assumed. Text-only rows reach model_max_length.
    "data/llava_v1_5_mix665k.json": Data(rows=665_298, with_image=1 - 40_688 / 665_298, text=300, longest=2048),
    # The parts of both, by the rules of scripts/data/sources.toml. Of the second, 364,100 rows have a picture of COCO
    # (LLaVA issue 657); their text is taken to be as long as that of all.
    "data/small/blip_laion_cc_sbu_558k.json": Data(rows=math.ceil(558_128 / 72), with_image=1, text=20, longest=128),
    "data/small/llava_v1_5_mix665k.json": Data(rows=math.ceil(364_100 / 38), with_image=1, text=300, longest=2048),
}
ASKED = {
    "vqav2_val": Asked(60, 3),
    "vqav2_test": Asked(60, 3, rows=447_793),
    "ok_vqa_val2014": Asked(60, 3),
    "gqa": Asked(60, 3),
    "textvqa_val": Asked(60, 5),
    "realworldqa": Asked(90, 3),
    "docvqa_val": Asked(65, 6),
    "seedbench": Asked(90, 2, rows=17_990, images=(14_233 + 8 * 3_757) / 17_990),  # videos too, of 8 frames
    "ai2d": Asked(90, 2),
    "mmmu_val": Asked(160, 4),
    "mmstar": Asked(110, 2),
    "mmt_val": Asked(110, 2, images=1.2),
    "ocrbench": Asked(60, 8),
    "mmbench_en_dev": Asked(110, 2, counts=False),
    "mmbench_cn_dev": Asked(180, 2, counts=False),
    "mme": Asked(60, 2, counts=False),
    "refcoco_bbox_val": Asked(55, 15, counts=False),
    "refcoco+_bbox_val": Asked(55, 15, counts=False),
    "refcocog_bbox_val": Asked(55, 15, counts=False),
}
PUBLIC = [  # (language model, vision tower), stage, A100s, hours, source
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "pretrain", 8, 3.5, "LLaVA's README"),
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "finetune", 8, 10, "LLaVA's README, 40 GB"),
    (("phi-2", "siglip-so400m-patch14-384"), "pretrain", 4, 5, "TinyLLaVA_Factory issue 67, 40 GB"),
    (("phi-2", "siglip-so400m-patch14-384"), "finetune", 4, 14, "TinyLLaVA_Factory issue 67, 40 GB"),
]
PUBLIC_EVALUATION = [  # (language model, vision tower), task, minutes on one A100, source
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "mmbench_en_dev", 15, "VLMEvalKit issue 33"),
    # InternLM2 7B with the same tower; the shapes of both language models are nearly the same.
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "mmbench_en_dev", 20, "XTuner issue 376, InternLM2 7B"),
]
# {seeds: the true difference, in standard deviations of the seeds' differences, that a paired t-test sees at p < 0.05
# (two-sided) with a power of 80%}: scripts/reporting/statistics.py computes them, and needs scipy.
POWER = {3: 3.264, 5: 1.682, 10: 0.996, 20: 0.660}
# Two trainings that differ in their seed alone are assumed to be right and wrong on this share of the questions the
# other way round, each question by itself. Over n questions their difference then has the variance DISAGREE / n.
DISAGREE = 0.25
EFFECTS = f"""\
   = POWER[seeds] x SD. POWER is a paired t-test's over the seeds: p < 0.05, seen four times in five. SD, of the seeds'
   differences, is the root of {DISAGREE:g} / questions: two trainings that differ in their seed alone are assumed to
   disagree on {DISAGREE:.0%} of the questions, each by itself. The report has the SD that there was."""


def card_of(gib: int) -> Card:
    return max((card for card in CARDS if card.gib <= gib), key=lambda card: card.gib, default=CARDS[0])


def names_of(experiment: config.Config) -> tuple[str, str]:
    language, tower = (Path(experiment["train"][key]).name for key in ("model_name_or_path", "vision_tower"))
    return language, tower


def known(name: str, of: Mapping[str, object]) -> None:
    if name not in of:
        raise config.ConfigError(f"nothing is known of {name}: it is reckoned for {', '.join(of)}")


def told(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def grid(what: str, counts: list[int], memories: list[int], cell: Callable[[int, int], str]) -> list[str]:
    """The lines of a table: a row for each number of GPUs, a column for each memory (GB)."""
    heads = (f"{card_of(gib).name}, {gib} GB" for gib in memories)
    return ["   GPUs" + "".join(f"{head:>34}" for head in heads) + f"   {what}"] + [
        f"{gpus:7}" + "".join(f"{cell(gpus, gib):>34}" for gib in memories) for gpus in counts
    ]


class Cost:
    """One stage of one experiment."""

    def __init__(self, experiment: config.Config, stage: str):
        train, self.stage = {**experiment["train"], **experiment[stage]}, stage
        self.names = names_of(experiment)
        for name in self.names:
            known(name, MODELS)
        known(train["data_path"], DATA)
        (self.llm, self.tower), self.data = (MODELS[name] for name in self.names), DATA[train["data_path"]]
        self.backbone = experiment["backbone"]
        self.global_batch, self.per_device = train["global_batch"], train["per_device_train_batch_size"]
        self.checkpointing = train["gradient_checkpointing"]
        self.passes = (2 if self.checkpointing else 1) + (1 if stage == "pretrain" else 2)
        self.longest = min(self.tower.to_decoder + self.data.longest, train["model_max_length"])
        self.gathers = train["deepspeed"].endswith("zero3.json")
        self.steps = math.ceil(self.data.rows / self.global_batch)
        # Those that stay when the stage is done.
        self.checkpoints = min(train["save_total_limit"], self.steps // train["save_steps"])
        self.row_tokens = self.data.text + self.data.with_image * self.tower.to_decoder

    def hours(self, gpus: int, card: Card = A100, per_device: int | None = None) -> float:
        """per_device: the config's, if it is not given."""
        per_device = per_device or self.per_device
        forward = 2 * self.llm.matmul + 2 * self.llm.layers * self.llm.d * self.row_tokens
        row = forward * self.passes * self.row_tokens + 2 * self.tower.matmul * self.tower.tokens * self.data.with_image
        # A small model on a fast GPU waits for the CPU, which starts each layer's kernels in each pass.
        started = (self.llm.layers * self.passes + self.tower.layers) * LAYER
        return self.data.rows / gpus * max(row / (card.peak * UTILISATION), started / per_device) / 3600

    def memory(self, gpus: int, per_device: int) -> float:
        """GiB on each GPU at the longest batch."""
        frozen = 2 * self.llm.weights  # ZeRO-2, whole on each GPU; the projector's states are small
        # Of ZeRO-3 also stage3_max_live_parameters, in bf16. ZeRO-2 keeps weights and gradients whole.
        sharded = 16 * self.llm.weights / gpus + (2e9 if gpus > 1 else 0)
        if not self.gathers:
            sharded = (4 + 12 / gpus) * self.llm.weights
        state = frozen if self.stage == "pretrain" else sharded
        tokens = per_device * self.longest
        # A checkpoint is a layer's input. Without, what a layer keeps: 16 d + 8 ffn bytes of what bf16 matrices take
        # and give, and 16 d of the two norms, which work in fp32.
        kept = 2 * self.llm.d if self.checkpointing else 32 * self.llm.d + 8 * self.llm.ffn
        checkpoints = self.llm.layers * kept * tokens
        # fp32 logits, their log-softmax, the gradient and a bf16 copy. More than a layer's recomputed activations (34 d
        # bytes a token, Korthikanti et al. 2022), which come later.
        logits = 14 * self.llm.vocab * tokens
        context = 2 * GIB  # CUDA, NCCL, what the allocator does not give back: assumed
        return (state + 2 * self.tower.weights + checkpoints + logits + context) / GIB

    def batch(self, gpus: int, gib: float) -> tuple[int, int] | None:
        """The largest per-device batch that fits, and its accumulation; None where none does."""
        for per_device in range(min(self.per_device, self.global_batch // gpus), 0, -1):
            if self.global_batch % (gpus * per_device) == 0 and self.memory(gpus, per_device) <= gib:
                return per_device, self.global_batch // (gpus * per_device)
        return None

    @property
    def checkpoint(self) -> float:
        """GB: the weights, and DeepSpeed's weights and fp32 states of what trains."""
        return self.llm.weights * (4 if self.stage == "pretrain" else 16) / 1e9

    @property
    def final(self) -> float:
        """GB that the stage ends with. Of stage 1 LLaVA saves the projector alone, which is small."""
        if self.backbone == "tinyllava":
            return 2 * (self.llm.weights + self.tower.weights) / 1e9
        return 0 if self.stage == "pretrain" else 2 * self.llm.weights / 1e9

    @property
    def stays(self) -> float:
        """GB when the stage is done."""
        return self.checkpoints * self.checkpoint + self.final

    def disk(self) -> float:
        """GB at its peak: the oldest checkpoint goes when the next one is written. One is written where it is stopped,
        however short the stage is."""
        return (self.checkpoints + 1) * self.checkpoint + self.final

    def cell(self, gpus: int, gib: int) -> str:
        if self.global_batch % gpus:
            return f"{self.global_batch} rows do not divide"
        if fit := self.batch(gpus, gib):
            takes = told(self.hours(gpus, card_of(gib), fit[0]))
            return f"{takes} h, {fit[0]} x {fit[1]} ({self.memory(gpus, fit[0]):.0f} GB)"
        return f"does not fit ({self.memory(gpus, 1):.0f} GB)"

    def table(self, counts: list[int], memories: list[int]) -> str:
        number = 1 if self.stage == "pretrain" else 2
        lines = [
            f"stage {number} ({self.stage}): {self.data.rows:,} rows in {self.steps:,} steps of {self.global_batch}; "
            f"{self.row_tokens:.0f} tokens a row, {self.data.rows * self.row_tokens / 1e6:,.0f} M in all; "
            f"{told(self.hours(1))} A100-hours; disk: {self.disk():.0f} GB",
            *grid("hours, per device x accumulation (memory)", counts, memories, self.cell),
        ]
        for names, stage, gpus, hours, source in PUBLIC:
            if (names, stage) == (self.names, self.stage):
                lines.append(
                    f"   this model for {gpus} A100s: {self.hours(gpus):.1f} h; reported: {hours:g} h ({source})"
                )
        return "\n".join(lines)


class Evaluation:
    """All tasks of one trained model. It runs as lmms-eval loads it: LLaVA in fp16, TinyLLaVA in fp32, whose products
    are TF32's at half of bf16's peak."""

    def __init__(self, experiment: config.Config):
        self.names = names_of(experiment)
        for name in self.names:
            known(name, MODELS)
        self.llm, self.tower = (MODELS[name] for name in self.names)
        self.bytes = 4 if experiment["backbone"] == "tinyllava" else 2
        columns = config.tomllib.loads(SUITE.read_text(encoding="utf-8"))["column"]
        self.rows = {name: asked.rows or sum(c.get("n", 0) for c in columns if c["task"] == name)
                     for name, asked in ASKED.items()}  # fmt: skip
        self.columns = [column for column in columns if column["task"] in experiment["tasks"]]
        self.tasks = [task for task in experiment["tasks"] if task in ASKED]
        self.unknown = [task for task in experiment["tasks"] if task not in ASKED]

    def question(self, task: str, card: Card) -> float:
        """Seconds."""
        asked, speed = ASKED[task], card.peak * UTILISATION * 2 / self.bytes
        tokens = asked.text + asked.images * self.tower.to_decoder
        look = asked.images * max(2 * self.tower.matmul * self.tower.tokens / speed, self.tower.layers * LAYER)
        prompt = (2 * self.llm.matmul + 2 * self.llm.layers * self.llm.d * tokens) * tokens / speed
        token = max(self.bytes * self.llm.matmul / card.bandwidth, self.llm.layers * LAYER)
        return PREPARE + look + max(prompt, self.llm.layers * LAYER) + (asked.answer - 1) * token

    def hours(self, gpus: int, card: Card = A100) -> float:
        asking = sum(self.rows[task] * self.question(task, card) for task in self.tasks)
        return (asking / gpus + START_TASK * len(self.tasks)) / 3600

    def table(self, counts: list[int], memories: list[int]) -> str:
        longest = max(self.tasks, key=lambda task: self.rows[task] * self.question(task, A100))
        share = self.rows[longest] * self.question(longest, A100) / 3600 / self.hours(1)
        rows = sum(self.rows[task] for task in self.tasks)
        lines = [
            f"evaluation: {rows:,} questions of {len(self.tasks)} tasks, one at a time; {told(self.hours(1))} "
            f"A100-hours, {share:.0%} of them {longest}",
            *grid("hours", counts, memories, lambda gpus, gib: f"{told(self.hours(gpus, card_of(gib)))} h"),
        ]
        for names, task, minutes, source in PUBLIC_EVALUATION:
            if names == self.names and task in self.tasks:
                here = self.rows[task] * self.question(task, A100) / 60
                lines.append(
                    f"   this model for {task} on one A100: {here:.0f} min; reported: {minutes} min ({source})"
                )
        if self.unknown:
            lines.append(f"   not reckoned: {', '.join(self.unknown)}")
        return "\n".join(lines)

    def effects(self) -> str:
        """How small an effect so many seeds show."""
        counted = {column["name"]: self.rows[column["task"]] if column["task"] != "seedbench" else column["n"]
                   for column in self.columns if ASKED[column["task"]].counts}  # fmt: skip
        lines = [
            "the smallest true difference to the baseline that so many seeds of both show, in points of % right:",
            f"   {'column':20}{'questions':>10}" + "".join(f"{f'{seeds} seeds':>10}" for seeds in POWER),
        ]
        for name, rows in counted.items():
            cells = "".join(f"{100 * smallest(seeds, [rows]):10.1f}" for seeds in POWER)
            lines.append(f"   {name:20}{rows:10,}{cells}")
        if len(counted) > 1:
            cells = "".join(f"{100 * smallest(seeds, list(counted.values())):10.1f}" for seeds in POWER)
            lines.append(f"   {'the mean of these':20}{'':10}{cells}")
        return "\n".join([*lines, EFFECTS])


def smallest(seeds: int, rows: list[int]) -> float:
    """The smallest difference that is seen, as a share of the questions, in the mean of columns of so many rows."""
    return POWER[seeds] * math.sqrt(sum(DISAGREE / n for n in rows)) / len(rows)


class Experiment:
    """Both stages and the evaluation of one run."""

    def __init__(self, name: str):
        loaded = config.load(name)
        stages = () if loaded.get("checkpoint") else config.STAGES  # a public checkpoint is not trained
        self.name, self.trained = name, [Cost(loaded, stage) for stage in stages]
        self.evaluated = Evaluation(loaded)

    def hours(self, gpus: int, gib: int) -> tuple[float, float]:
        """Of training and of evaluation."""
        fits = [(stage.batch(gpus, gib) or (None,))[0] for stage in self.trained]
        hours = (stage.hours(gpus, card_of(gib), n) for stage, n in zip(self.trained, fits, strict=True))
        return sum(hours) + START_STAGE * len(self.trained) / 3600, self.evaluated.hours(gpus, card_of(gib))

    def fits(self, gpus: int, gib: int) -> bool:
        return all(not stage.global_batch % gpus and stage.batch(gpus, gib) for stage in self.trained)

    def disk(self, runs: int) -> float:
        """GB of so many runs, while the last stage of them is at its peak."""
        left = runs * sum(stage.stays for stage in self.trained)
        return left + max((stage.disk() - stage.stays for stage in self.trained), default=0)


def totals(experiments: list[Experiment], runs: int, counts: list[int], memories: list[int]) -> str:
    what = f"{runs} {'run' if runs == 1 else 'runs'} of {' and of '.join(one.name for one in experiments)}"
    disk = sum(one.disk(runs) for one in experiments)

    def cell(gpus: int, gib: int) -> str:
        if not all(one.fits(gpus, gib) for one in experiments):
            return "does not fit"
        both = [sum(part) * runs for part in zip(*(one.hours(gpus, gib) for one in experiments), strict=True)]
        return f"{both[0]:.1f} + {both[1]:.1f} = {sum(both):.1f} h ({sum(both) * gpus:.0f})"

    return "\n".join(
        [
            f"in all, {what}; disk beside the data, with the checkpoints that finished stages keep: {disk:.0f} GB",
            *grid("hours of training + evaluation (GPU-hours)", counts, memories, cell),
        ]
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="+")
    parser.add_argument("--runs", type=int, default=1, metavar="N")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu-memory", type=int, metavar="GB")
    args = parser.parse_args(argv)
    for flag, value in (("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory), ("--runs", args.runs)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: give a number from 1 on")
    experiments = []
    for name in args.experiment:
        try:
            experiments.append(Experiment(name))
        except config.ConfigError as error:
            print(f"cost: {name}: {error}", file=sys.stderr)
            return 2
    counts = [args.gpus] if args.gpus else [1, 2, 4, 8, 16, 32]
    memories = [args.gpu_memory] if args.gpu_memory else [24, 40, 80]
    for one in experiments:
        print(f"{one.name}, reckoned (scripts.training.cost), beside data and weights (scripts/data.sh):")
        for stage in one.trained:
            print(stage.table(counts, memories))
        print(one.evaluated.table(counts, memories))
        if one.trained:
            print(one.evaluated.effects())
    print(totals(experiments, args.runs, counts, memories))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
