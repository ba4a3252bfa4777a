"""What training an experiment will take, before it is started: steps, tokens, GPU-hours, memory per GPU, disk.

    python -m scripts.training.cost EXPERIMENT [--gpus N] [--gpu-memory GB]

For N GPUs (otherwise 1 to 32) of that memory (otherwise 40 and 80 GB): the largest per-device batch up to the config's
that fits, and the accumulation that keeps the global batch; scripts/train.sh takes them as RANKS and PER_DEVICE.

The model. A forward pass costs 2 FLOPs per weight and token, and causal attention 2 L d T per token. Gradient
checkpointing runs it twice; the backward pass costs two more where the weights train (stage 2), one where gradients
only pass through (stage 1). The vision tower runs forward once. An A100 gives UTILISATION of its dense bf16 peak.
Memory, for the longest batch that there can be: weights, gradients and Adam's fp32 states (2 + 2 + 12 bytes a weight)
as ZeRO shards them, the layers ZeRO-3 has gathered, one checkpoint per layer, and the logits. PUBLIC holds runs that
others report; each prediction is printed beside them. Not in it: VISTA's own small cost, and communication, of which
small per-device batches under ZeRO-3 pay more (LLaVA issue 560: about 24 h for 8 x 4 x 4 on 40 GB).
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts import config

PEAK = 312e12  # FLOP/s: A100, bf16, dense (NVIDIA's data sheet)
UTILISATION = 0.34  # one figure for all: the middle of what PUBLIC's runs reached, 0.23 to 0.43
GIB = 2**30


@dataclass(frozen=True)
class Transformer:
    layers: int
    d: int
    ffn: int
    ffn_matrices: int
    tokens: int = 0  # that the vision tower runs on
    to_decoder: int = 0  # of them
    vocab: int = 0

    @property
    def matmul(self):  # weights that a token is multiplied with; the embedding is looked up
        return self.layers * (4 * self.d**2 + self.ffn_matrices * self.d * self.ffn) + self.vocab * self.d

    @property
    def weights(self):
        return self.matmul + self.vocab * self.d


@dataclass(frozen=True)
class Data:
    rows: int
    with_image: float  # share of the rows
    text: int  # tokens a row, on average
    longest: int  # text tokens, at most


MODELS = {  # their config.json
    "vicuna-7b-v1.5": Transformer(layers=32, d=4096, ffn=11008, ffn_matrices=3, vocab=32000),
    "phi-2": Transformer(layers=32, d=2560, ffn=10240, ffn_matrices=2, vocab=51200),
    "clip-vit-large-patch14-336": Transformer(24, 1024, 4096, 2, tokens=577, to_decoder=576),
    # TinyLLaVA drops the tower's first token, which in SigLIP is a patch.
    "siglip-so400m-patch14-384": Transformer(27, 1152, 4304, 2, tokens=729, to_decoder=728),
}
DATA = {
    # 181 MB of JSON: 324 bytes a row, of which a BLIP caption is about 60. The longest is not known: assumed.
    "blip_laion_cc_sbu_558k.json": Data(rows=558_128, with_image=1, text=20, longest=128),
    # Rows: LLaVA issue 657 (40,688 have no image). Text: 1,548 bytes of JSON a row, less about a fifth of markup, at 4
    # bytes a token: assumed. Text-only rows reach model_max_length.
    "llava_v1_5_mix665k.json": Data(rows=665_298, with_image=1 - 40_688 / 665_298, text=300, longest=2048),
}
PUBLIC = [  # (language model, vision tower), stage, A100s, hours, source
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "pretrain", 8, 3.5, "LLaVA's README"),
    (("vicuna-7b-v1.5", "clip-vit-large-patch14-336"), "finetune", 8, 10, "LLaVA's README, 40 GB"),
    (("phi-2", "siglip-so400m-patch14-384"), "pretrain", 4, 5, "TinyLLaVA_Factory issue 67, 40 GB"),
    (("phi-2", "siglip-so400m-patch14-384"), "finetune", 4, 14, "TinyLLaVA_Factory issue 67, 40 GB"),
]


class Cost:
    """One stage of one experiment."""

    def __init__(self, experiment: dict, stage: str):
        train, self.stage = {**experiment["train"], **experiment[stage]}, stage
        self.names = tuple(Path(train[key]).name for key in ("model_name_or_path", "vision_tower"))
        data = Path(train["data_path"]).name
        for name, known in ((self.names[0], MODELS), (self.names[1], MODELS), (data, DATA)):
            if name not in known:
                raise config.ConfigError(f"nothing is known of {name}: it is reckoned for {', '.join(known)}")
        (self.llm, self.tower), self.data = (MODELS[name] for name in self.names), DATA[data]
        self.global_batch, self.per_device = train["global_batch"], train["per_device_train_batch_size"]
        self.passes = (2 if train["gradient_checkpointing"] else 1) + (1 if stage == "pretrain" else 2)
        self.longest = min(self.tower.to_decoder + self.data.longest, train["model_max_length"])
        self.kept = train["save_total_limit"] + 1  # the oldest goes when the next one is written
        self.steps = math.ceil(self.data.rows / self.global_batch)
        self.row_tokens = self.data.text + self.data.with_image * self.tower.to_decoder

    def hours(self, gpus: int) -> float:
        forward = 2 * self.llm.matmul + 2 * self.llm.layers * self.llm.d * self.row_tokens
        row = forward * self.passes * self.row_tokens + 2 * self.tower.matmul * self.tower.tokens * self.data.with_image
        return self.data.rows * row / (PEAK * UTILISATION * gpus) / 3600

    def memory(self, gpus: int, per_device: int) -> float:
        """GiB on each GPU at the longest batch."""
        frozen = 2 * self.llm.weights  # ZeRO-2, whole on each GPU; the projector's states are small
        sharded = 16 * self.llm.weights / gpus + (2e9 if gpus > 1 else 0)  # ZeRO-3; stage3_max_live_parameters, bf16
        state = frozen if self.stage == "pretrain" else sharded
        tokens = per_device * self.longest
        checkpoints = 2 * self.llm.layers * self.llm.d * tokens
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

    def disk(self) -> float:
        """GB at its peak: checkpoints hold the weights, and DeepSpeed's weights and fp32 states of what trains."""
        checkpoint = self.llm.weights * (4 if self.stage == "pretrain" else 16)
        final = 0 if self.stage == "pretrain" else 2 * self.llm.weights
        return (self.kept * checkpoint + final) / 1e9

    def table(self, counts: list[int], memories: list[int]) -> str:
        number = 1 if self.stage == "pretrain" else 2
        lines = [
            f"stage {number} ({self.stage}): {self.data.rows:,} rows in {self.steps:,} steps of {self.global_batch}; "
            f"{self.row_tokens:.0f} tokens a row, {self.data.rows * self.row_tokens / 1e6:,.0f} M in all; "
            f"{self.hours(1):.0f} A100-hours; disk: {self.disk():.0f} GB",
            "   GPUs   hours" + "".join(f"{f'{memory} GB: per device x accumulation':>42}" for memory in memories),
        ]
        for gpus in counts:
            cells = []
            for gib in memories:
                if self.global_batch % gpus:
                    said = f"{self.global_batch} rows do not divide"
                elif fit := self.batch(gpus, gib):
                    said = f"{fit[0]} x {fit[1]} ({self.memory(gpus, fit[0]):.0f} GB)"
                else:
                    said = f"does not fit ({self.memory(gpus, 1):.0f} GB)"
                cells.append(f"{said:>42}")
            lines.append(f"{gpus:7} {self.hours(gpus):7.1f}" + "".join(cells))
        for names, stage, gpus, hours, source in PUBLIC:
            if (names, stage) == (self.names, self.stage):
                lines.append(
                    f"   this model for {gpus} A100s: {self.hours(gpus):.1f} h; reported: {hours:g} h ({source})"
                )
        return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu-memory", type=int, metavar="GB")
    args = parser.parse_args(argv)
    for flag, value in (("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: give a number from 1 on")
    try:
        experiment = config.load(args.experiment)
        stages = [Cost(experiment, stage) for stage in ("pretrain", "finetune")]
    except config.ConfigError as error:
        print(f"cost: {args.experiment}: {error}", file=sys.stderr)
        return 2
    counts = [args.gpus] if args.gpus else [1, 2, 4, 8, 16, 32]
    memories = [args.gpu_memory] if args.gpu_memory else [40, 80]
    print(f"{args.experiment} on A100s, reckoned (scripts.training.cost), beside data and weights (scripts/data.sh):")
    print(*(stage.table(counts, memories) for stage in stages), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
