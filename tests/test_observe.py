"""What the observer takes for text and image, and what it refuses, on the smallest model that has a decoder."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vista_patch
from tests.helpers import reference
from vista_patch import vista_metrics

IMAGE, D = 30, 48
ROWS = [[1, 5, IMAGE, IMAGE, 6, 7, 8], [1, 2, 3, 4, 9, 10, 11]]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(32, D), nn.Linear(D, D)

    def forward(self, inputs_embeds=None, attention_mask=None, position_ids=None, cross_attention_states=None):
        self.seen = inputs_embeds, self.layer(inputs_embeds.cumsum(1))
        return (self.seen[1],)


class Model(nn.Module):
    """`change` is what a model may do to its embeddings before they reach the decoder."""

    def __init__(self, change=lambda x: x, **given):
        super().__init__()
        torch.manual_seed(0)
        self.decoder, self.head, self.config = Decoder(), nn.Linear(D, 32), SimpleNamespace(image_token_id=IMAGE)
        self.change, self.given = change, given

    def get_input_embeddings(self):
        return self.decoder.table

    def forward(self, input_ids, images=None, labels=None, attention_mask=None, position_ids=None, **more):
        x = self.decoder.table(input_ids)
        if images is not None:
            x = torch.where((input_ids == IMAGE)[..., None], images, x)
        logits = self.head(self.decoder(inputs_embeds=self.change(x), attention_mask=attention_mask, **self.given)[0])
        return {"loss": None if labels is None else logits.square().mean(), "logits": logits}


def inputs(rows=ROWS):
    ids = torch.tensor(rows)
    images = torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "images": images}


def expected(model, given):
    ids = given["input_ids"]
    return reference(*model.decoder.seen, ids != IMAGE, ids == IMAGE, "l2", "mean", "t/m")


def altered(at, number=slice(None)):
    def change(x):
        x = x.clone()
        x[:, at, number] = x[:, at, number] + 1
        return x

    return change


@pytest.mark.parametrize(
    "change,token",
    [
        (altered(5), 7),
        (altered(5, -1), 7),
        (altered(slice(4, 6)), 6),
        (lambda x: x[:, [0, 1, 2, 3, 5, 4, 6]], 6),
        (lambda x: torch.cat([x[:, :5], x[:, 4:5], x[:, 6:]], 1), 7),
        (lambda x: x.bfloat16().float(), 1),
    ],
    ids=["one token altered", "the last number of one", "two", "two swapped", "one doubled", "rounded"],
)
def test_text_that_does_not_arrive_as_it_was_is_named(change, token):
    """A single token, too: nothing of the text may be missing without a word."""
    model = Model(change)
    with (
        vista_patch.patch(model),
        pytest.raises(RuntimeError, match=f"VISTA: Model: row 0: token {token} of input_ids did not arrive"),
    ):
        model(**inputs())


def test_the_place_of_an_image_that_no_config_names_is_asked_for():
    model = Model()
    model.config = SimpleNamespace()
    with vista_patch.patch(model):
        with pytest.raises(RuntimeError, match=rf"name it: model\.config\.image_token_ids = \[{IMAGE}\]"):
            model(**inputs())
        model.config.image_token_ids = [IMAGE]  # as the message says
        loss = model(**inputs())["loss"]
    torch.testing.assert_close(
        (loss - model(**inputs())["loss"]).double(), expected(model, inputs()), rtol=1e-5, atol=1e-6
    )


def test_images_that_do_not_arrive_are_named():
    model = Model()
    with vista_patch.patch(model), pytest.raises(RuntimeError, match=r"images enter by another way|no image arrives"):
        model(**inputs() | {"images": None, "labels": inputs()["labels"]}, pixel_values=torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize(
    "given,match",
    [
        (
            {"cross_attention_states": torch.zeros(1)},
            "VISTA: Model: its decoder, Decoder, reads images by cross-attention",
        ),
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "VISTA: Model: its image tokens attend to later text"),
    ],
    ids=["as Mllama", "as PaliGemma"],
)
def test_models_on_which_the_term_has_no_meaning_are_refused_by_name(given, match):
    model = Model()
    model.decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | given), with_kwargs=True)
    with vista_patch.patch(model), pytest.raises(RuntimeError, match=match):
        model(**inputs())


class Blocks(Decoder):
    """Makes the mask of its blocks itself."""

    class Block(nn.Module):
        def forward(self, hidden_states, attention_mask=None):
            return hidden_states

    def __init__(self, mask):
        super().__init__()
        self.mask, self.blocks = mask, nn.ModuleList([self.Block()])

    def forward(self, inputs_embeds=None, attention_mask=None):
        return super().forward(self.blocks[0](inputs_embeds, self.mask))


SEEN = {  # which of the later positions a token attends to; the last image is at 3
    "causal": (lambda b, h, q, k: k <= q, False),
    "all": (lambda b, h, q, k: k < 7, True),
    "images, each other": (lambda b, h, q, k: (k <= q) | (q >= 2) & (q < 4) & (k >= 2) & (k < 4), False),
}


@pytest.mark.parametrize("form", ("bool", "bool of what is hidden", "added", "flex"))
@pytest.mark.parametrize("attends,leaks", SEEN.values(), ids=SEEN)
def test_images_that_attend_to_later_text_are_seen_in_every_form_of_a_mask(attends, leaks, form):
    from torch.nn.attention.flex_attention import create_block_mask

    at = torch.arange(7)
    mask = attends(0, 0, at[:, None], at).expand(1, 1, 7, 7)
    mask = {
        "bool": mask,
        "bool of what is hidden": ~mask,
        "added": torch.zeros(mask.shape).masked_fill(~mask, -1e9),
        "flex": create_block_mask(attends, 2, 1, 7, 7, device="cpu"),
    }[form]
    model = Model()
    model.decoder = Blocks(mask)
    error = pytest.raises(RuntimeError, match="its image tokens attend to later text") if leaks else nullcontext()
    with vista_patch.patch(model), error:
        model(**inputs())


def test_tokens_that_share_a_vector_are_no_alarm():
    """Tokens that are added to a vocabulary often begin as copies of one vector; so does padding as zeros."""
    model = Model()
    with torch.no_grad():
        model.decoder.table.weight[6] = model.decoder.table.weight[IMAGE]
        model.decoder.table.weight[7] = model.decoder.table.weight[2]
        model.decoder.table.weight[0] = 0
    given = inputs([[1, 5, IMAGE, IMAGE, 6, 7, 0], [1, 2, 3, 4, 9, 0, 0]])
    given["attention_mask"] = (given["input_ids"] != 0).long()
    stock = model(**given)["loss"]
    ids, real = given["input_ids"], given["attention_mask"].bool()
    term = reference(*model.decoder.seen, real & (ids != IMAGE), real & (ids == IMAGE), "l2", "mean", "t/m")
    with vista_patch.patch(model):
        torch.testing.assert_close((model(**given)["loss"] - stock).double(), term, rtol=1e-5, atol=1e-6)


def test_noise_on_the_embeddings_is_part_of_x():
    """NEFTune: a hook on the embedding that was there before us, and one that came after us."""

    def noise(module, args, output):
        return output + torch.rand(output.shape, generator=torch.Generator().manual_seed(3))

    model = Model()
    model.decoder.table.register_forward_hook(noise)
    with vista_patch.patch(model):
        model.decoder.table.register_forward_hook(noise)
        loss = model(**inputs())["loss"]
        stock = model.eval()(**inputs())["loss"]
    torch.testing.assert_close((loss - stock).double(), expected(model, inputs()), rtol=1e-5, atol=1e-6)


class Scaling(Decoder):
    """As Gemma's: scales its embeddings on their way to its first block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, inputs_embeds=None, attention_mask=None):
        x = self.blocks[0](7 * inputs_embeds)
        self.seen = x, self.layer(x.cumsum(1))
        return (self.seen[1],)


def test_x_holds_the_scale_of_a_decoder_that_scales_its_embeddings():
    """Also where the first batch has no text to tell it by."""
    model = Model()
    model.decoder = Scaling()
    with vista_patch.patch(model):
        model(**inputs([[IMAGE] * 4]))
        loss = model(**inputs())["loss"]
        stock = model.eval()(**inputs())["loss"]
    torch.testing.assert_close((loss - stock).double(), expected(model, inputs()), rtol=1e-5, atol=1e-6)


def test_images_deep_in_what_a_model_is_given_are_seen():
    """A loss without the term raises there too."""

    class Nested(Model):
        def forward(self, input_ids, batch, labels=None):
            return super().forward(input_ids, batch["pictures"][0], labels)

    model, given = Nested(), inputs()
    with vista_patch.patch(model), pytest.raises(RuntimeError, match="is trained without its term"):
        model(given["input_ids"], {"pictures": [given["images"]]}, given["labels"])["logits"].sum().backward()


PACKED = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 6]])},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 7, 8, 15], dtype=torch.int32)},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 7 + [1] + [2] * 7])},
    "four planes": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 6]]).expand(4, 1, 15)},
}


@pytest.mark.parametrize("how", PACKED.values(), ids=PACKED)
def test_packed_samples_are_each_their_own(how):
    """With one of a single token between two that have images: as the two alone."""
    model = Model()
    rows = [ROWS[0], [9], [3, IMAGE, IMAGE, 4, 2, 2, 8]]
    given = inputs([[t for row in rows for t in row]])
    with vista_patch.patch(model):
        model(**given, **how)
        x, h = (t[0] for t in model.decoder.seen)
        metrics = vista_metrics(model)
    terms = []
    for at, row in ((0, rows[0]), (8, rows[2])):
        image, cut = torch.tensor([row]) == IMAGE, slice(at, at + len(row))
        terms.append(reference(x[None, cut], h[None, cut], ~image, image, "l2", "mean", "t/m").item())
    assert metrics["loss_vista"] == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert metrics["vista_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "how",
    [
        {"attention_mask": torch.tensor([[1] * 7 + [2] * 7])},
        {"attention_mask": torch.zeros(1, 1, 14, 14)},
        {"position_ids": torch.tensor([[*range(7), *range(7)]]).expand(3, 1, 14)},
        {"position_ids": torch.tensor([[*range(6), *range(6)]])},
    ],
    ids=["mask of numbers", "4-D mask", "three planes", "another length"],
)
def test_packing_that_does_not_say_where_samples_begin_is_refused(how):
    model = Model()
    with vista_patch.patch(model), pytest.raises(RuntimeError, match=r"VISTA: Model: .*packed in a row"):
        model(**inputs([[*ROWS[0], *ROWS[0]]]), **how)


@pytest.mark.parametrize("decoder", (Decoder, Scaling))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_compiled_model_gives_the_eager_ones_numbers(backend, decoder):
    eager, compiled = Model(), Model()
    for model in (eager, compiled):
        torch.manual_seed(0)
        model.decoder = decoder()
    torch._dynamo.reset()
    run = torch.compile(compiled, backend=backend)
    with vista_patch.patch(eager), vista_patch.patch(compiled):
        for _ in range(3):
            losses = [model(**inputs())["loss"] for model in (eager, run)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
