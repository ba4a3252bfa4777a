"""Measure what the report's model-based figures show, on held-out rows, and store it beside the checkpoint.

    python -m scripts.reporting.probe CHECKPOINT EVAL_DATA        (scripts/probe.sh calls it)
    python -m scripts.reporting.probe CHECKPOINT IMAGE PROMPT OUT.npz

In the first form CHECKPOINT is .../EXPERIMENT-finetune, .../EXPERIMENT-pretrain lies beside it, and
.../probe/EXPERIMENT.npz is written, from n long answers of at most T tokens with at most F facts
(EVAL_DATA/describe.parquet), m captions (caption.parquet) and q questions for one object (maps.parquet), k of them
shown, with S x S image tokens. In the second CHECKPOINT is any of the two upstreams', and map, question and image are
written alone, k = 1, the image as the tower gets it:
    kl              [n, T] fp32, nats, NaN past an answer's end: KL(p || q) at each answer token, the answer's
                    earlier tokens given; p with the true image, q with that of a row with another answer
    ce, ce_swapped  [n] fp32, nats per answer token, with the true and with the swapped image
    vista_mean, vista_sum, vista_cosine  [n] fp32: the VISTA term as Eq. 10 times 1/d, as Eq. 10, as cosine
    fact_token      [n, F] int32: the answer's tokens (from 0 on) at which a word begins that only the image tells;
                    -1 past an answer's last
    fact_right      [n, F] fp32: 1 where that word is the most probable one, the earlier tokens given, else 0; or NaN
    stage_1_ce, stage_1_ce_swapped  [m] fp32, nats per caption token, after stage 1 alone, prompted as in stage 1
    map             [k, S, S] fp32: cosine similarity of the question's mean token embedding to each image token
                    (projector output), as the paper's Figures 2 and 3; NaN where the model has no token
    image, question [k, H, W, 3] uint8 and [k] str; mask [k, H, W] bool: the pixels of what the question asks for
    auroc           [q] fp32: how probable it is that a pixel in the mask has a higher similarity than one outside
    hit, hit_chance [q] fp32: whether the most similar image token's place has a pixel of the mask; the share of places
                    that have one. In all three NaN where no place with a token has one
    map_type        [q] str: image set and question type
    size_ce, size_l2, size_cosine  [4] fp32, by SIZE_STATES: CE (nats per answer token) and the VISTA terms (mean over
                    d; weight 1, t/m) on m captions, then on n long answers
    grad_ce, grad_l2, grad_cosine  [4, 3] fp32, by SIZE_STATES and PARTS: the norms of their gradients
    hidden_size     d
Forward passes are fp32, on the GPU if there is one. A file newer than its checkpoint is kept.
"""

import io
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image

from vista_patch import vista_loss

MAPS_PER_TYPE = 2
SIZE_ROWS = 16  # of each image set
SIZE_STATES = ("start of stage 1", "end of stage 1", "start of stage 2", "end of stage 2")
PARTS = ("projector", "embeddings", "decoder")
IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100  # llava/constants.py, tinyllava/utils/constants.py
TERMS = {
    "vista_mean": {"reduction": "mean"},
    "vista_sum": {"reduction": "sum"},
    "vista_cosine": {"metric": "cosine"},
}


def held_out(folder):
    """The rows of describe, maps and caption, their `image` (and a map's `mask`) decoded."""
    found = []
    for name in ("describe", "maps", "caption"):
        rows = pd.read_parquet(folder / f"{name}.parquet").to_dict("records")
        for row in rows:
            row["image"] = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            if "mask" in row:
                row["mask"] = np.asarray(Image.open(io.BytesIO(row["mask"])).convert("L")) > 0
        found.append(rows)
    return found


def swapped(rows, i):
    """The image of the next row after i of the same image set that has another answer."""
    others = [row for row in rows[i + 1 :] + rows[:i] if row["question_type"] == rows[i]["question_type"]]
    return next(row["image"] for row in others if row["answer"] != rows[i]["answer"])


def padded(rows, fill, dtype):
    """Rows of different lengths as one array."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def localisation(map_SS, mask_HW):
    """auroc, hit and hit_chance of one map. Its pixels have the similarity of their image token, so ties count half."""
    side = len(map_SS)
    cell = len(mask_HW) // side
    places = mask_HW[: cell * side, : cell * side].reshape(side, cell, side, cell).sum((1, 3)).ravel()
    map_N, known = map_SS.ravel(), np.isfinite(map_SS.ravel())
    map_N, inside_N = map_N[known], places[known].astype(float)
    outside_N = cell**2 - inside_N
    if not inside_N.any() or not outside_N.any():
        return {"auroc": np.nan, "hit": np.nan, "hit_chance": np.nan}
    above_NN = (map_N[:, None] > map_N) + 0.5 * (map_N[:, None] == map_N)
    auroc = inside_N @ above_NN @ outside_N / (inside_N.sum() * outside_N.sum())
    return {"auroc": auroc, "hit": inside_N[map_N.argmax()] > 0, "hit_chance": (inside_N > 0).mean()}


def cross_entropy(logp_tV, answer_t):
    """Nats per token."""
    return -logp_tV.gather(1, answer_t[:, None]).mean()


def finite(*values):
    if not all(np.isfinite(value).all() for value in values):
        sys.exit("probe.py: the model's predictions are not finite: train this checkpoint again")


class Probe:
    """One checkpoint, loaded by its stock upstream, in fp32 and eval mode."""

    def __init__(self, model):
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").float().eval()

    def forward(self, row, image, caption=False):
        """Teacher-forced on row's answer, in stage 2's format or, a caption, in stage 1's: log-probabilities [t, V] of
        its t tokens, their ids [t], and vista_loss's x [1, L, d], h [1, L, d], text [1, L] and image [1, L]."""
        ids_l, t = self.tokens(row, caption)
        ids_l = ids_l.to(self.model.device)
        inputs = ids_l[None], None, None, None, None, self.pixels(image)
        x_1Ld = self.model.prepare_inputs_labels_for_multimodal(*inputs)[4]
        h_1Ld = self.model.get_decoder()(inputs_embeds=x_1Ld).last_hidden_state
        logp_tV = self.model.get_output_embeddings()(h_1Ld[0, -t - 1 : -1]).log_softmax(-1)
        first = (ids_l == IMAGE_TOKEN_INDEX).nonzero().item()
        image_1L = torch.zeros(x_1Ld.shape[:2], dtype=torch.bool, device=x_1Ld.device)
        image_1L[:, first : first + x_1Ld.shape[1] - len(ids_l) + 1] = True
        return logp_tV, ids_l[-t:], (x_1Ld, h_1Ld, ~image_1L, image_1L)

    def describe(self, rows):
        """kl, ce, ce_swapped, the vista_ and the fact_ arrays."""
        kls, figures, tokens, rights = [], [], [], []
        for i, row in enumerate(rows):
            logp_tV, answer_t, states = self.forward(row, row["image"])
            logq_tV, *_ = self.forward(row, swapped(rows, i))
            kls.append((logp_tV.exp() * (logp_tV - logq_tV)).sum(-1).cpu().numpy())
            figure = {name: vista_loss(*states, **setting).loss for name, setting in TERMS.items()}
            for name, log_tV in {"ce": logp_tV, "ce_swapped": logq_tV}.items():
                figure[name] = cross_entropy(log_tV, answer_t)
            figures.append({name: float(value) for name, value in figure.items()})
            right_t = (logp_tV.argmax(-1) == answer_t).cpu().numpy()
            spans = self.facts(row, answer_t)
            tokens.append([first for first, _ in spans])
            rights.append([right_t[first:end].all() for first, end in spans])
        arrays = {name: np.array([f[name] for f in figures], "float32") for name in figures[0]}
        finite(*kls, *arrays.values())
        arrays |= {"kl": padded(kls, np.nan, "float32"), "fact_token": padded(tokens, -1, "int32")}
        return arrays | {"fact_right": padded(rights, np.nan, "float32")}

    def facts(self, row, answer_t):
        """The tokens [first, end) of each of the answer's words that only the image tells."""
        texts = [
            self.tokenizer.decode(answer_t[:k], skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip()
            for k in range(len(answer_t) + 1)
        ]
        if texts[-1] != row["answer"]:
            sys.exit(f"probe.py: the tokens of {row['question_id']}'s answer spell {texts[-1]!r}")
        lengths = np.array(list(map(len, texts)))
        return [(int((lengths[1:] > begin).argmax()), int((lengths[:-1] < end).sum())) for begin, end in row["facts"]]

    def captions(self, rows):
        """stage_1_ce and stage_1_ce_swapped of the weights that are loaded."""
        arrays = {"stage_1_ce": [], "stage_1_ce_swapped": []}
        for i, row in enumerate(rows):
            for name, image in {"stage_1_ce": row["image"], "stage_1_ce_swapped": swapped(rows, i)}.items():
                arrays[name].append(float(cross_entropy(*self.forward(row, image, caption=True)[:2])))
        finite(*arrays.values())
        return {name: np.array(values, "float32") for name, values in arrays.items()}

    def sizes(self, rows, caption):
        """{ce, l2, cosine: (its value, the norms of its gradient for PARTS)}, of the mean over rows."""
        parts = [list(part.parameters()) for part in self.parts()]
        parameters = [parameter.requires_grad_(True) for part in parts for parameter in part]
        values, sums = defaultdict(float), {}
        for row in rows:
            with torch.enable_grad():
                logp_tV, answer_t, states = self.forward(row, row["image"], caption)
                terms = {"ce": cross_entropy(logp_tV, answer_t)}
                terms |= {metric: vista_loss(*states, metric=metric).loss for metric in ("l2", "cosine")}
                for name, term in terms.items():
                    found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
                    values[name] += term.item() / len(rows)
                    sums[name] = [
                        a + g / len(rows) for a, g in zip(sums.get(name, [0] * len(found)), found, strict=True)
                    ]
        out = {}
        for name, gradient in sums.items():
            of_part = iter(gradient)
            norms = [float(torch.stack([next(of_part).norm() for _ in part]).norm()) for part in parts]
            finite([values[name], *norms])
            out[name] = values[name], norms
        return out

    def seen(self, image):
        """The image as the vision tower gets it, padded or cropped: [H, W, 3] uint8."""
        pixels_HW3 = self.pixels(image)[0].permute(1, 2, 0).cpu().numpy()
        unit_HW3 = pixels_HW3 * self.processor.image_std + self.processor.image_mean
        return (255 * unit_HW3).round().clip(0, 255).astype("uint8")

    def map(self, row):
        ids_1t = self.tokenizer(row["question"], add_special_tokens=False, return_tensors="pt").input_ids
        text_1d = self.model.get_input_embeddings()(ids_1t.to(self.model.device)).mean(1)
        tokens_Nd = self.model.encode_images(self.pixels(row["image"]))[0]
        cosine_N = torch.cosine_similarity(tokens_Nd, text_1d, dim=-1).cpu().numpy()
        side = math.ceil(len(cosine_N) ** 0.5)
        # TinyLLaVA drops its tower's first token, which in SigLIP is the first patch.
        return np.concatenate([np.full(side**2 - len(cosine_N), np.nan, "float32"), cosine_N]).reshape(side, side)


class LLaVA(Probe):
    def __init__(self, checkpoint):
        from llava.model.builder import load_pretrained_model

        name = (
            checkpoint.name if "llava" in checkpoint.name.lower() else f"llava-{checkpoint.name}"
        )  # decides its class
        self.tokenizer, model, self.processor, _ = load_pretrained_model(
            str(checkpoint), None, name, device="cpu", device_map="cpu"
        )
        super().__init__(model)

    def pixels(self, image):
        from llava.mm_utils import process_images

        return process_images([image], self.processor, self.model.config).to(self.model.device, torch.float32)

    def tokens(self, row, caption=False):
        """ids [l] of prompt and answer, and the number of the answer's."""
        from llava.conversation import conv_templates
        from llava.mm_utils import tokenizer_image_token

        if caption:  # as preprocess_plain: the image alone, then the caption
            texts = ("<image>", f"<image>{row['answer']}{conv_templates['plain'].sep}")
            ids = [tokenizer_image_token(text, self.tokenizer, return_tensors="pt") for text in texts]
            return ids[1], len(ids[1]) - len(ids[0])
        ids = []
        for answer in (None, row["answer"]):
            chat = conv_templates["v1"].copy()
            chat.append_message(chat.roles[0], f"<image>\n{row['question']}")
            chat.append_message(chat.roles[1], answer)
            ids.append(tokenizer_image_token(chat.get_prompt(), self.tokenizer, return_tensors="pt"))
        return ids[1], len(ids[1]) - len(ids[0])

    def parts(self):
        decoder = self.model.get_decoder()
        return decoder.mm_projector, decoder.embed_tokens, decoder.layers

    def load_stage_1(self, folder):
        """The language model that stage 1 started from, and stage 1's projector."""
        base = transformers.LlamaForCausalLM.from_pretrained(
            json.loads((folder / "config.json").read_text())["_name_or_path"]
        )
        projector = torch.load(folder / "mm_projector.bin", map_location="cpu", weights_only=True)
        replace(self.model, base.state_dict() | projector)


class TinyLLaVA(Probe):
    def __init__(self, checkpoint):
        from tinyllava.data import ImagePreprocess, TextPreprocess
        from tinyllava.model import load_pretrained_model

        model, self.tokenizer, self.processor, _ = load_pretrained_model(str(checkpoint), device_map="cpu")
        self.image, self.text = ImagePreprocess(self.processor, model.config), TextPreprocess(self.tokenizer, "phi")
        self.caption = TextPreprocess(self.tokenizer, "pretrain")
        super().__init__(model)

    def pixels(self, image):
        return self.image(image)[None].to(self.model.device)

    def tokens(self, row, caption=False):
        """ids [l] of prompt and answer, and the number of the answer's."""
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
        encoded = (self.caption if caption else self.text)(turns)
        return encoded["input_ids"], int((encoded["labels"] != IGNORE_INDEX).sum())

    def parts(self):
        return self.model.connector, self.model.get_input_embeddings(), self.model.get_decoder().layers

    def load_stage_1(self, folder):
        """The language model that stage 1 started from, and stage 1's connector."""
        for name in ("language_model", "connector"):
            weights = torch.load(folder / name / "pytorch_model.bin", map_location="cpu", weights_only=True)
            replace(getattr(self.model, name), weights)


def replace(module, weights):
    """Loads weights that must all be the module's; it may have more."""
    if unexpected := module.load_state_dict(weights, strict=False).unexpected_keys:
        sys.exit(f"probe.py: stage 1 left weights that the model does not have: {', '.join(unexpected)}")


def load(checkpoint):
    config = checkpoint / "config.json"
    if not config.exists():
        sys.exit(f"probe.py: there is no {config}: train first")
    transformers.logging.set_verbosity_error()  # it would list every weight of the vision tower
    tiny = json.loads(config.read_text())["model_type"] == "tinyllava"
    return TinyLLaVA(checkpoint) if tiny else LLaVA(checkpoint)


def save(out, arrays):
    partial = out.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, out)


@torch.no_grad()
def one(checkpoint, image, prompt, out):
    try:
        row = {"image": Image.open(image).convert("RGB"), "question": prompt}
    except (OSError, ValueError) as error:
        sys.exit(f"probe.py: {image} is not an image that can be read: {error}")
    probe = load(checkpoint)
    arrays = {"map": probe.map(row), "image": probe.seen(row["image"]), "question": np.array(prompt)}
    save(out, {name: array[None] for name, array in arrays.items()})


@torch.no_grad()
def main(checkpoint, eval_data):
    out = checkpoint.parent / "probe" / f"{checkpoint.name.removesuffix('-finetune')}.npz"
    config = checkpoint / "config.json"
    if out.exists() and config.exists() and out.stat().st_mtime > config.stat().st_mtime:
        return print(f"{out}: whole, kept")
    stage_1 = checkpoint.with_name(checkpoint.name.removesuffix("-finetune") + "-pretrain")
    if not (stage_1 / "config.json").exists():
        sys.exit(f"probe.py: {checkpoint} has no {stage_1.name} beside it: train stage 1")
    probe = load(checkpoint)
    describe, mapped, captions = held_out(eval_data)
    arrays = probe.describe(describe) | {"hidden_size": np.array(probe.model.config.hidden_size)}
    maps = [probe.map(row) for row in mapped]
    found = [localisation(map_SS, row["mask"]) for map_SS, row in zip(maps, mapped, strict=True)]
    arrays |= {name: np.array([f[name] for f in found], "float32") for name in found[0]}
    arrays["map_type"] = np.array([row["question_type"] for row in mapped])
    shown = [
        i
        for kind in sorted(set(arrays["map_type"]))
        for i in np.flatnonzero(arrays["map_type"] == kind)[:MAPS_PER_TYPE]
    ]
    arrays |= {
        "map": np.stack([maps[i] for i in shown]),
        "image": np.stack([np.asarray(mapped[i]["image"]) for i in shown]),
        "mask": np.stack([mapped[i]["mask"] for i in shown]),
        "question": np.array([mapped[i]["question"] for i in shown]),
    }
    sizes = {SIZE_STATES[3]: probe.sizes(some(describe), False)}
    probe.load_stage_1(stage_1)
    arrays |= probe.captions(captions)
    sizes |= {SIZE_STATES[1]: probe.sizes(some(captions), True), SIZE_STATES[2]: probe.sizes(some(describe), False)}
    torch.manual_seed(0)
    for module in probe.parts()[0].modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sizes[SIZE_STATES[0]] = probe.sizes(some(captions), True)
    for name in ("ce", "l2", "cosine"):
        value, norms = zip(*(sizes[state][name] for state in SIZE_STATES), strict=True)
        arrays |= {f"size_{name}": np.array(value, "float32"), f"grad_{name}": np.array(norms, "float32")}
    out.parent.mkdir(exist_ok=True)
    save(out, arrays)
    print(f"{out}: {len(describe)} answers, {len(captions)} captions, {len(mapped)} maps")


def some(rows):
    """The first SIZE_ROWS of each image set."""
    kinds = sorted({row["question_type"] for row in rows})
    return [row for kind in kinds for row in [row for row in rows if row["question_type"] == kind][:SIZE_ROWS]]


if __name__ == "__main__":
    match sys.argv[1:]:
        case [checkpoint, eval_data]:
            main(Path(checkpoint), Path(eval_data))
        case [checkpoint, image, prompt, out]:
            one(Path(checkpoint), Path(image), prompt, Path(out))
        case _:
            sys.exit(__doc__)
