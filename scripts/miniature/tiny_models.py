"""The miniature's pre-trained parts, from scratch on the training split of scripts/miniature/tiny_data.py.

    python -m scripts.miniature.tiny_models DATA FOLDER... [--vision-steps N] [--language-steps N]

The last part of each FOLDER's name says what to make; tests train it for fewer steps.

clip-tiny, siglip-tiny   CLIPVisionModel or SiglipVisionModel and its image processor. Supervised by the annotations
                         (shape, color, the digit in each quarter) on the patch tokens that the multimodal models
                         read: hidden_states[-2], without the first token.
llama-tiny, phi-tiny     LlamaForCausalLM and a SentencePiece BPE LlamaTokenizer, or PhiForCausalLM and a byte-level
                         BPE CodeGenTokenizer, trained on the stage 2 conversations, captions and lists of facts. Words
                         for what an image token shows stand in its place. It sees no image and no held-out row.

A model that is there already is skipped. Each is written under another name and renamed when whole.
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CodeGenTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PhiConfig,
    PhiForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from scripts.miniature.tiny_data import (
    COLORS,
    GRID,
    SEED,
    SHAPES,
    SHORT,
    SIDE,
    anew,
    caption,
    digit_scenes,
    easyvqa_split,
    facts,
    grid,
    size,
)

# Stock LLaVA's "v1" and TinyLLaVA's "phi" conversations open with this sentence: the language model meets it here.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VISION = {"steps": 1500, "batch": 64, "lr": 1e-3}
LANGUAGE = {"steps": 3000, "batch": 16, "lr": 2.5e-3}
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LAYERS = 3  # of the language model
PATCH = SIDE // GRID  # pixels
IMAGE = -200  # an image token among ids, as in llava/constants.py
WORDS = 5  # at most, for what an image token shows


def train(name, parameters, loss_of_step, steps, lr, **_):
    """AdamW with warm-up and cosine decay; loss_of_step() returns the loss of a fresh batch."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    start = time.time()
    for step in range(1, steps + 1):
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shape.step()
        if step % 50 == 0 or step == steps:
            seconds = time.time() - start
            print(
                f"{name} step {step}/{steps} loss {loss.item():.3f} {seconds:.0f} s, "
                f"{seconds / step * (steps - step):.0f} s left",
                flush=True,
            )


# Vision --------------------------------------------------------------------------------------------------------------


def targets(notes):
    """[N, 6] int64: shape, color, digit in each quarter (10: empty); -100: not known or not asked of this image."""
    index = {None: -100, **{v: i for values in (SHAPES, COLORS) for i, v in enumerate(values)}}
    return torch.tensor(
        [
            [-100, -100, *(10 if d is None else d for d in note["digits"])]
            if "digits" in note
            else [index[note["shape"]], index[note["color"]], *[-100] * 4]
            for note in notes
        ]
    )


def pixels(processor, pngs):
    """[N, 3, 64, 64] float32, preprocessed as LLaVA will, but all at once: the processor takes 3 ms for an image."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pngs]
    x_NCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    x_NCHW = (x_NCHW - mean) / std
    torch.testing.assert_close(x_NCHW[:8], processor.preprocess(images[:8], return_tensors="pt")["pixel_values"])
    return x_NCHW


class Heads(torch.nn.Module):
    """Linear read-outs of the patch tokens, thrown away after training."""

    def __init__(self, width, tokens):
        super().__init__()
        self.shape, self.color = torch.nn.Linear(width, len(SHAPES)), torch.nn.Linear(width, len(COLORS))
        self.digit = torch.nn.Linear(width, 11)
        place = torch.arange(GRID**2)[-tokens:]
        quarter = place // GRID // 2 * 2 + place % GRID // 2
        pool_QN = (quarter == torch.arange(4)[:, None]).float()
        self.register_buffer("pool_QN", pool_QN / pool_QN.sum(1, keepdim=True))

    def forward(self, model, x_BCHW):
        """Logits [B, classes] for each of the six targets."""
        # CLIP's first token is its class token; SigLIP's is its first patch, which TinyLLaVA drops all the same.
        patches_BND = model(x_BCHW, output_hidden_states=True).hidden_states[-2][:, 1:]
        mean_BD = patches_BND.mean(1)
        return [self.shape(mean_BD), self.color(mean_BD), *self.digit(self.pool_QN @ patches_BND).unbind(1)]


def clip():
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    config = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=SHAPE["hidden_size"], **SHAPE)
    return processor, CLIPVisionModel(config)


def siglip():
    config = SiglipVisionConfig(image_size=SIDE, patch_size=PATCH, **SHAPE)
    return SiglipImageProcessor(size={"height": SIDE, "width": SIDE}), SiglipVisionModel(config)


def make_vision(name, new, data, out):
    notes = json.loads((data / "annotations.json").read_text())
    processor, model = new()
    x, y = pixels(processor, [(data / "images" / name).read_bytes() for name in notes]), targets(notes.values())
    tokens = GRID**2 - ("siglip" in name)
    heads = Heads(SHAPE["hidden_size"], tokens)

    def loss():
        rows = torch.randint(len(x), (VISION["batch"],))
        mirror = (torch.rand(len(rows)) < 0.5) & (y[rows, 2] == -100)  # a mirrored shape is one, a digit is not
        logits = heads(model, torch.where(mirror[:, None, None, None], x[rows].flip(3), x[rows]))
        return sum(F.cross_entropy(z, t) for z, t in zip(logits, y[rows].T, strict=True) if (t >= 0).any())

    train(name, [*model.parameters(), *heads.parameters()], loss, **VISION)
    held_out = easyvqa_split("validation") + digit_scenes(500, "validation", random.Random(SEED + 1))
    y = targets([picture.note for picture in held_out])
    with torch.no_grad():
        parts = [heads(model, x) for x in pixels(processor, [picture.png for picture in held_out]).split(250)]
    logits = [torch.cat(z) for z in zip(*parts, strict=True)]
    right = [(z.argmax(-1) == t)[t >= 0].float() for z, t in zip(logits, y.T, strict=True)]
    shape, color, *quarters = (sum(r) / len(r) for r in right)
    quarter = sum(quarters) / len(quarters)
    print(f"{name} validation accuracy: shape {shape:.3f}, color {color:.3f}, quarter {quarter:.3f}")
    model.save_pretrained(out)
    processor.save_pretrained(out)


# Language ------------------------------------------------------------------------------------------------------------


def lessons(data, rng):
    """[(text, note)]: every stage 2 conversation in the v1 format; of each training picture its caption, as stage 1
    asks for it, and its facts as "key: value" in random order. "<image>" stands in the image's place; the note says
    what the image shows, and is None where there is none."""
    notes = json.loads((data / "annotations.json").read_text())
    found = []
    for row in json.loads((data / "finetune.json").read_text()):
        turns = [turn["value"] for turn in row["conversations"]]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        text = "".join(f"USER: {human} ASSISTANT: {gpt}</s>" for human, gpt in pairs)
        found.append((f"{SYSTEM} {text}", notes.get(row.get("image"))))
    for note in notes.values():
        known = facts(note)
        listed = ", ".join(f"{key}: {value}" for key, value in rng.sample(known, len(known)))
        found += [(f"<image>{caption(note, rng)}\n", note), (f"<image>{listed}\n", note)]
    return rng.sample(found, len(found))


def lines(texts):
    """What a tokenizer is trained on."""
    return sorted({line for text in texts for line in re.split("<image>|</s>|\n", text) if line})


def encoded(tokenizer, text, tokens):
    """ids and targets [L] int64 of a lesson. ids has IMAGE at the image's tokens. targets is -100 outside of the
    answers; where there are no roles, all that follows the image is an answer."""
    before, *after = text.replace("</s>", tokenizer.eos_token).split("<image>")
    ids = tokenizer(before).input_ids
    for part in after:
        ids += [IMAGE] * tokens + tokenizer(part, add_special_tokens=False).input_ids
    if "ASSISTANT" not in text:
        targets = [-100 if token == IMAGE else token for token in ids]
        return torch.tensor(ids), torch.tensor(targets)
    start = tokenizer(" ASSISTANT:", add_special_tokens=False).input_ids[-2:]
    targets, answer = [], False
    for i, token in enumerate(ids):
        answer = answer or ids[max(0, i - 2) : i] == start
        targets.append(token if answer else -100)
        answer = answer and token != tokenizer.eos_token_id
    return torch.tensor(ids), torch.tensor(targets)


def llama(lines, out):
    """SYSTEM and SHORT are one token each: they say nothing here, and would be most of a short row.

    Stock LLaVA masks a later turn's question on the assumption that "USER" alone is one token more than right after
    </s> (train.py, preprocess_v1: `round_len -= 1`), as in Llama's vocabulary: USER must be a piece that never merges
    with the space before it, else training ignores the row ("tokenization mismatch")."""
    import sentencepiece

    with open(out / "tokenizer.model", "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            model_type="bpe",
            vocab_size=1000,
            byte_fallback=True,
            user_defined_symbols=["USER", *".,:?", *(text.replace(" ", "▁") for text in (f" {SYSTEM}", SHORT))],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = LlamaTokenizer(str(out / "tokenizer.model"), legacy=False, pad_token="<unk>", model_max_length=2048)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **SHAPE | {"num_hidden_layers": LAYERS},
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)


def phi(lines, out):
    """As phi-2: one special token that is beginning, end and unknown, and words that carry the space before them."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(out))
    tokenizer = CodeGenTokenizer(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=2048)
    tokenizer.add_tokens([SYSTEM, SHORT])
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, partial_rotary_factor=0.4,
        bos_token_id=end, eos_token_id=end, **SHAPE | {"num_hidden_layers": LAYERS},
    )  # fmt: skip
    return tokenizer, PhiForCausalLM(config)


def make_language(name, new, data, out):
    """In an image's place stand GRID x GRID vectors (one less for Phi, as SigLIP's image tokens), each the sum of the
    embeddings of the words for what is there (tiny_data.grid). A linear projector can give just such vectors."""
    rng, tokens = random.Random(SEED), GRID**2 - ("phi" in name)
    taught = lessons(data, rng)
    tokenizer, model = new(lines(text for text, _ in taught), out)
    tokenizer.save_pretrained(out)
    known = {}  # a word's token, after a space

    def words(note):
        """[tokens, WORDS] int64; 0, which is no word's, past the last."""
        found = torch.zeros(tokens, WORDS, dtype=torch.long)
        for line, cell in zip(found, grid(note)[-tokens:], strict=True):
            for i, word in enumerate(cell):
                if word not in known:
                    known[word] = tokenizer(f" {word}", add_special_tokens=False).input_ids[-1]
                line[i] = known[word]
        return found

    rows = [(*encoded(tokenizer, text, tokens), note and words(note)) for text, note in taught]
    rows.sort(key=lambda row: len(row[0]))  # neighbours in length: little padding
    print(
        f"{name}: {len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(rows)} texts of {np.mean([len(ids) for ids, *_ in rows]):.0f} tokens"
    )
    embedding = model.get_input_embeddings()
    with torch.no_grad():  # what is read can be said: a copy is learned in a tenth of the steps
        embedding.weight.normal_(std=SHAPE["hidden_size"] ** -0.5)
        model.get_output_embeddings().weight.copy_(embedding.weight)

    def loss():
        first = rng.randrange(len(rows) - LANGUAGE["batch"])
        ids, targets, shown = zip(*rows[first : first + LANGUAGE["batch"]], strict=True)
        ids, targets = (torch.nn.utils.rnn.pad_sequence(part, True, -100) for part in (ids, targets))
        x_BLd = embedding(ids.clamp(min=0))
        shown = [part for part in shown if part is not None]
        if shown:
            # A projector's vectors will miss a word here and there, and lie a little beside the others.
            words_NW = torch.cat(shown)
            words_NW = words_NW * (torch.rand(words_NW.shape) > 0.1)
            image_Nd = F.embedding_bag(words_NW, embedding.weight, mode="sum", padding_idx=0)
            image_Nd = image_Nd + 0.3 * image_Nd.std().detach() * torch.randn_like(image_Nd)
            x_BLd = x_BLd.masked_scatter((ids == IMAGE)[:, :, None], image_Nd)
        return model(inputs_embeds=x_BLd, attention_mask=(ids != -100).long(), labels=targets).loss

    train(name, list(model.parameters()), loss, **LANGUAGE)
    model.save_pretrained(out)


MAKE = {
    "clip-tiny": (make_vision, clip),
    "siglip-tiny": (make_vision, siglip),
    "llama-tiny": (make_language, llama),
    "phi-tiny": (make_language, phi),
}


def main(data, folders):
    manifest = data / "manifest.json"
    if not manifest.exists():
        sys.exit(f"{data} holds no data: run scripts/miniature/tiny_data.py {data} first")
    settings = json.dumps([VISION, LANGUAGE]).encode()
    made_from = hashlib.sha256(manifest.read_bytes() + Path(__file__).read_bytes() + settings).hexdigest() + "\n"
    for final in folders:
        if final.name not in MAKE:
            sys.exit(f"{final}: there is no model {final.name!r}: choose {', '.join(MAKE)}")
        if final.exists():
            if not (final / "made_from.sha256").exists() or (final / "made_from.sha256").read_text() != made_from:
                sys.exit(
                    f"{final} was made from other data, for other steps or by another tiny_models.py: "
                    "move or delete that folder and run again"
                )
            print(f"{final}: whole, nothing to do")
            continue
        partial = final.with_name(final.name + ".partial")
        anew(partial)
        torch.manual_seed(SEED)
        make, new = MAKE[final.name]
        make(final.name, new, data, partial)
        (partial / "made_from.sha256").write_text(made_from)
        os.replace(partial, final)
        print(f"{final}: written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    parser.add_argument("--vision-steps", type=size, default=VISION["steps"])
    parser.add_argument("--language-steps", type=size, default=LANGUAGE["steps"])
    given = parser.parse_args()
    VISION["steps"], LANGUAGE["steps"] = given.vision_steps, given.language_steps
    main(given.data, given.folders)
