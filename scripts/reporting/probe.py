"""Measure what the report's model-based figures show, on held-out rows, and store it beside the checkpoint.

    python -m scripts.reporting.probe CHECKPOINT EVAL_DATA        (scripts/probe.sh calls it)
    python -m scripts.reporting.probe CHECKPOINT IMAGE PROMPT OUT.npz

In the first form CHECKPOINT is .../EXPERIMENT-finetune, and .../probe/EXPERIMENT.npz is written, from n long answers of
at most T tokens (EVAL_DATA/describe.parquet) and k images of the other tasks with S x S image tokens. In the second
CHECKPOINT is any of the two upstreams', and map, question and image are written alone, k = 1, the image as the tower
gets it:
    kl              [n, T] fp32, nats, NaN past an answer's end: KL(p || q) at each answer token, the answer's
                    earlier tokens given; p with the true image, q with that of a row with another answer
    ce, ce_swapped  [n] fp32, nats per answer token, with the true and with the swapped image
    vista_mean, vista_sum, vista_cosine  [n] fp32: the VISTA term as Eq. 10 times 1/d, as Eq. 10, as cosine
    map             [k, S, S] fp32: cosine similarity of the question's mean token embedding to each image token
                    (projector output), as the paper's Figures 2 and 3; NaN where the model has no token
    image, question [k, H, W, 3] uint8 and [k] str
    hidden_size     d
Forward passes are fp32, on the GPU if there is one. A file newer than its checkpoint is kept.
"""

import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image

from vista_patch import vista_loss

MAPS_PER_TASK = 3
IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100  # llava/constants.py, tinyllava/utils/constants.py
TERMS = {
    "vista_mean": {"reduction": "mean"},
    "vista_sum": {"reduction": "sum"},
    "vista_cosine": {"metric": "cosine"},
}


def held_out(folder):
    """The n rows to describe and the k rows to map (one per question type), `image` a PIL image."""
    paths = [p for p in sorted(folder.glob("*.parquet")) if p.stem != "describe" and not p.match("*_blind*")]
    tasks = [pd.read_parquet(p).drop_duplicates("question_type").head(MAPS_PER_TASK) for p in paths]
    frames = [pd.read_parquet(folder / "describe.parquet"), pd.concat(tasks)]
    rows = [frame.to_dict("records") for frame in frames]
    for row in [*rows[0], *rows[1]]:
        row["image"] = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return rows


def swapped(rows, i):
    """The image of the next row after i that has another answer."""
    others = rows[i + 1 :] + rows[:i]
    return next(row["image"] for row in others if row["answer"] != rows[i]["answer"])


class Probe:
    """One checkpoint, loaded by its stock upstream, in fp32 and eval mode."""

    def __init__(self, model):
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").float().eval()

    def forward(self, row, image):
        """Teacher-forced on row's answer: log-probabilities [t, V] of its t tokens, their ids [t], and
        vista_loss's x [1, L, d], h [1, L, d], text [1, L] and image [1, L]."""
        ids_l, t = self.tokens(row)
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
        """kl, ce, ce_swapped and the vista_ arrays."""
        kls, figures = [], []
        for i, row in enumerate(rows):
            logp_tV, answer_t, states = self.forward(row, row["image"])
            logq_tV, *_ = self.forward(row, swapped(rows, i))
            kls.append((logp_tV.exp() * (logp_tV - logq_tV)).sum(-1).cpu().numpy())
            figure = {name: vista_loss(*states, **setting).loss for name, setting in TERMS.items()}
            for name, log_tV in {"ce": logp_tV, "ce_swapped": logq_tV}.items():
                figure[name] = -log_tV.gather(1, answer_t[:, None]).mean()
            figures.append({name: float(value) for name, value in figure.items()})
        kl_nT = np.full((len(kls), max(map(len, kls))), np.nan, "float32")
        for kl_T, kl_t in zip(kl_nT, kls, strict=True):
            kl_T[: len(kl_t)] = kl_t
        arrays = {name: np.array([f[name] for f in figures], "float32") for name in figures[0]}
        if not all(np.isfinite(values).all() for values in (*kls, *arrays.values())):
            sys.exit("probe.py: the model's predictions are not finite: train this checkpoint again")
        return arrays | {"kl": kl_nT}

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

    def tokens(self, row):
        """ids [l] of prompt and answer, and the number of the answer's."""
        from llava.conversation import conv_templates
        from llava.mm_utils import tokenizer_image_token

        ids = []
        for answer in (None, row["answer"]):
            chat = conv_templates["v1"].copy()
            chat.append_message(chat.roles[0], f"<image>\n{row['question']}")
            chat.append_message(chat.roles[1], answer)
            ids.append(tokenizer_image_token(chat.get_prompt(), self.tokenizer, return_tensors="pt"))
        return ids[1], len(ids[1]) - len(ids[0])


class TinyLLaVA(Probe):
    def __init__(self, checkpoint):
        from tinyllava.data import ImagePreprocess, TextPreprocess
        from tinyllava.model import load_pretrained_model

        model, self.tokenizer, self.processor, _ = load_pretrained_model(str(checkpoint), device_map="cpu")
        self.image, self.text = ImagePreprocess(self.processor, model.config), TextPreprocess(self.tokenizer, "phi")
        super().__init__(model)

    def pixels(self, image):
        return self.image(image)[None].to(self.model.device)

    def tokens(self, row):
        """ids [l] of prompt and answer, and the number of the answer's."""
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
        encoded = self.text(turns)
        return encoded["input_ids"], int((encoded["labels"] != IGNORE_INDEX).sum())


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


@torch.inference_mode()
def one(checkpoint, image, prompt, out):
    try:
        row = {"image": Image.open(image).convert("RGB"), "question": prompt}
    except (OSError, ValueError) as error:
        sys.exit(f"probe.py: {image} is not an image that can be read: {error}")
    probe = load(checkpoint)
    arrays = {"map": probe.map(row), "image": probe.seen(row["image"]), "question": np.array(prompt)}
    save(out, {name: array[None] for name, array in arrays.items()})


@torch.inference_mode()
def main(checkpoint, eval_data):
    out = checkpoint.parent / "probe" / f"{checkpoint.name.removesuffix('-finetune')}.npz"
    config = checkpoint / "config.json"
    if out.exists() and config.exists() and out.stat().st_mtime > config.stat().st_mtime:
        return print(f"{out}: whole, kept")
    probe = load(checkpoint)
    describe, mapped = held_out(eval_data)
    arrays = probe.describe(describe) | {
        "map": np.stack([probe.map(row) for row in mapped]),
        "image": np.stack([np.asarray(row["image"]) for row in mapped]),
        "question": np.array([row["question"] for row in mapped]),
        "hidden_size": np.array(probe.model.config.hidden_size),
    }
    out.parent.mkdir(exist_ok=True)
    save(out, arrays)
    print(f"{out}: {len(describe)} answers, {len(mapped)} maps")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [checkpoint, eval_data]:
            main(Path(checkpoint), Path(eval_data))
        case [checkpoint, image, prompt, out]:
            one(Path(checkpoint), Path(image), prompt, Path(out))
        case _:
            sys.exit(__doc__)
