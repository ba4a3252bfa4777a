"""Public LLaVA forks at fixed commits: patched, or refused with the reason; and what their real classes then compute.

Each class runs in a process of its own (`python -m tests.test_forks ...`), since the forks share package names. A
module or a name that this environment lacks is replaced by an empty class, which the classes tested here do not use;
where the fork's vision tower cannot be built, its image features come from a linear layer instead. The table, printed
at the end, says so.
"""

import importlib
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from vista_patch.__main__ import main
from vista_patch.source import plan

REPO = Path(__file__).parents[1]
LLAMA = "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM"
# repository, commit, generation, classes that run here; or, for a refusal, what its reason says.
SUPPORTED = [
    ("haotian-liu/LLaVA", "a0bdc71789e586d991c96490e8e17826a93cb44e", "A", [LLAMA]),
    ("haotian-liu/LLaVA", "4a77fb46181b9354261648613b0b8b7eb35b815c", "B", [LLAMA]),
    (
        "haotian-liu/LLaVA",
        "c121f0432da27facab705978f83c4ada465e46fd",
        "C",
        [LLAMA, LLAMA.replace("llama", "mistral").replace("Llama", "Mistral")],
    ),
    (
        "LLaVA-VL/LLaVA-NeXT",
        "df179663ae8b83207df100a1f7af24caec633ff9",
        "D",
        [LLAMA, LLAMA.replace("llama", "qwen").replace("Llama", "Qwen")],
    ),
    (
        "TinyLLaVA/TinyLLaVA_Factory",
        "48a0bf1abb18b13ef485bd7b4a83c9b4ee085e8a",
        "C",
        ["tinyllava.model.modeling_tinyllava:TinyLlavaForConditionalGeneration"],
    ),
    (
        "BAAI-DCAI/Bunny",
        "08273acbd83b6836c03dce25cc134eb6b9cedba5",
        "B",
        [
            "bunny.model.language_model.bunny_phi:BunnyPhiForCausalLM",
            "bunny.model.language_model.bunny_qwen:BunnyQwen2ForCausalLM",
        ],
    ),
    (
        "PKU-YuanGroup/MoE-LLaVA",
        "6cb5f66e12d69e57c584a0062f7943d391540676",
        "B",
        [
            "moellava.model.language_model.llava_llama:LlavaLlamaForCausalLM",
            "moellava.model.language_model.llava_phi:LlavaPhiForCausalLM",
        ],
    ),
    (
        "apple/ml-fastvlm",
        "592b4add3c1c8a518e77d95dc6248e76c1dd591f",
        "C",
        [LLAMA.replace("llama", "qwen").replace("LlavaLlama", "LlavaQwen2")],
    ),
    ("aimagelab/LLaVA-MORE", "2460d393bd7fbb1baedc820a64f43c9312370e53", "C", ["src." + LLAMA]),
    (
        "dvlab-research/MGM",
        "769820cb71afc7c2b9a2166ca3ce92db1636215c",
        "B",
        [
            "mgm.model.language_model.mgm_llama:MGMLlamaForCausalLM",
            "mgm.model.language_model.mgm_mistral:MGMMistralForCausalLM",
        ],
    ),
    (
        "Meituan-AutoML/MobileVLM",
        "688fdec914810485c8766da96c63d9d2ce15f750",
        "A",
        ["mobilevlm.model.mobilellama:MobileLlamaForCausalLM"],
    ),
    (
        "dvlab-research/LISA",
        "3cb2d4301f1af4691bd4f3938335ef06e76f155a",
        "A",
        ["model.llava.model.language_model.llava_llama:LlavaLlamaForCausalLM"],
    ),
    (
        "foundation-multimodal-models/CAL",
        "9d99569503859cb163c85b3f9f03bc97e0b6f991",
        "C",
        [LLAMA],
    ),  # its Mistral class cannot train: -300 in the labels
    (
        "Haochen-Wang409/ross",
        "20ffc6b7ba1605a51111ea5f420f9a08e74e22f9",
        "C",
        ["ross.model.language_model.ross_llama:RossLlamaForCausalLM"],
    ),
]
REFUSED = [
    (
        "Theia-4869/FasterVLM",
        "f5d5f12037e105a51865ecb4b28a73cd86eb4921",
        r"llava_llama\.py:88: [^;]* unpacks 6 values, but [^;]* returns 8",
    ),
    (
        "Cooperx521/PyramidDrop",
        "6444f304aee4b7edcb022839fb9e8cd07859704a",
        r"llava_llama_pdrop\.py:195: [^;]* self\.model\.pdrop_forward, [^;]* may drop tokens",
    ),
    (
        "cambrian-mllm/cambrian",
        "539ffc3254bba004e5d012b65c0ad6cb308897c5",
        r"cambrian_llama\.py:\d+: [^;]* hands [^;]*feature_list to self\.model: images enter",
    ),
    (
        "NVlabs/VILA",
        "b760c34b9487fd736b4075f5111fbef3d80a37e9",
        r"llava_llama\.py:130: [^;]* makes its embeddings by self\.repack_multimodal_data",
    ),
    (
        "PhoenixZ810/MG-LLaVA",
        "3237152d4697416baa739a8b4eaa544d4ea3499c",
        r"box_model\.py:264: [^;]*, no model's forward, calls prepare_inputs_labels_for_multimodal",
    ),
    (
        "X-PLUG/mPLUG-Owl",
        "0f3068fdb47b77aedc71fc39f5735cd7aa35e8f9",
        r"modeling_mplug_owl2\.py:255: [^;]* hands modality_indicators to self\.model: images enter",
    ),
]

TABLE = []


@pytest.fixture(scope="session", autouse=True)
def table(request):
    """Prints what the tests found, as Markdown, when all are done."""
    yield
    lines = ["| repository | commit | generation | verdict | tested |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in TABLE]
    absent = sum(row[3] == "not had" for row in TABLE)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"{len(TABLE)} repositories, {absent} of them could not be cloned here", sep="\n")


@pytest.fixture
def clone(tmp_path):
    """clone(repository, commit): the Python files of a fork."""

    def clone(repository, commit):
        url, root = f"https://github.com/{repository}", tmp_path / "fork"
        for command in (
            ["git", "clone", "-q", "--filter=blob:none", "--no-checkout", url, root],
            ["git", "-C", root, "sparse-checkout", "set", "--no-cone", "*.py"],
            ["git", "-C", root, "checkout", "-q", commit],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}
            )
            if done.returncode:
                TABLE.append((repository, commit[:7], "", "not had", ""))
                pytest.skip(f"{url} cannot be cloned here: {done.stderr.strip()}")
        shutil.rmtree(root / ".git")
        return root

    return clone


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.upstream
@pytest.mark.parametrize("repository, commit, reason", REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(clone, repository, commit, reason, capsys):
    root = clone(repository, commit)
    before = files(root)
    assert main(["apply", str(root)]) == 2
    told = capsys.readouterr().err
    assert re.search(reason, told), told
    assert files(root) == before
    short = re.search(rf"[^;]*{reason}[^;]*", told).group().strip()
    TABLE.append(
        (repository, commit[:7], "", "refused", short.removeprefix("vista_patch apply: refused, tree untouched: "))
    )


@pytest.mark.upstream
@pytest.mark.parametrize(
    "repository, commit, generation, classes", SUPPORTED, ids=[f"{r[0]}@{r[1][:7]}" for r in SUPPORTED]
)
def test_supported(clone, vision_tower, repository, commit, generation, classes, capsys):
    root = clone(repository, commit)
    before = files(root)
    found = plan(root)
    assert found.refusal is None and generation in {c["generation"] for c in found.classes}
    start = time.process_time()
    assert main(["apply", str(root)]) == 0
    assert time.process_time() - start < 2
    for f in found.touched:
        compile((root / f.name).read_bytes(), f.name, "exec")
    depth = []
    for name in classes:
        command = [sys.executable, "-m", "tests.test_forks", root, name, generation, vision_tower]
        path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr[-6000:]
        depth.append(json.loads(done.stdout.splitlines()[-1]))
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache)
    assert main(["revert", str(root)]) == 0
    assert files(root) == before
    TABLE.append((repository, commit[:7], generation, f"supported, {len(found.classes)} classes", "; ".join(depth)))


# What follows runs in a fork's process.


class StandIns(importlib.machinery.ModuleSpec):
    """Finds the modules that are not installed: each name in them is an empty class."""

    def __init__(self):
        self.names = set()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = lambda name: make_class(name)


def make_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, *args: args[0]})


def load(root, module):
    """The module, imported with as many stand-ins as that takes, and what they stand for."""
    import transformers

    sys.path.insert(0, str(root))
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoModel):
        auto.register = classmethod(lambda *args, **kwargs: None)  # older forks take names that transformers now has
    for at in range(module.count(".")):  # packages without their __init__, which imports every class there is
        package = types.ModuleType(".".join(module.split(".")[: at + 1]))
        package.__path__ = [str(Path(root, *package.__name__.split(".")))]
        sys.modules[package.__name__] = package
    finder, missing, packages = StandIns(), set(), {n for n in sys.modules if module.startswith(f"{n}.")}
    sys.meta_path.append(finder)
    own = {path.stem for path in Path(root).iterdir()}
    for _ in range(50):
        try:
            return importlib.import_module(module), missing
        except ModuleNotFoundError as error:
            lacking = error.name.split(".")[0]
            assert lacking not in finder.names | own, error
            finder.names.add(lacking)
            missing.add(lacking)
        except (ImportError, RuntimeError) as error:  # the latter from transformers' lazy modules
            name, source = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error)).groups()
            assert source.split(".")[0] not in own or source in packages, error
            setattr(sys.modules[source], name, make_class(name))
            missing.add(name)
        for name in [n for n in sys.modules if n.split(".")[0] in own and n not in packages]:
            del sys.modules[name]
    raise AssertionError(f"{module} lacks too much: {missing}")


def build(cls, generation, vision_tower):
    """A random tiny model of the class, and what its image features come from."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 64, "num_key_value_heads": 4, "use_cache": False, "attn_implementation": "eager"}
    vision = {"mm_hidden_size": 16, "mm_projector_type": "linear", "mm_vision_tower": str(vision_tower)}
    vision |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "tokenizer_model_max_length": 12}
    if cls.__name__.startswith("TinyLlava"):  # its __init__ loads each part by a name
        config = cls.config_class(tokenizer_model_max_length=12)
        config.text_config = LlamaConfig(**shape)
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model.language_model, model.vision_tower = LlamaForCausalLM(config.text_config), nn.Identity()
    else:
        if "QWen" in cls.__name__:
            shape |= {"kv_channels": 8, "fp32": True, "seq_length": 64, "max_position_embeddings": 64}
        try:
            model = cls(cls.config_class(**shape, **vision))
            model.get_vision_tower().load_model()
            assert model.encode_images(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 32)
            return model.train(), "its own CLIP tower"
        except Exception as error:
            print(f"{cls.__name__} without its tower: {error!r}", file=sys.stderr)
            vision.pop("mm_vision_tower")
            model = cls(cls.config_class(**shape, **vision))
    model.stand_in = nn.Linear(48, 32)
    tower = nn.Identity()
    model.get_vision_tower = model.get_image_tower = lambda: tower
    model.get_video_tower = lambda: None
    model.encode_images = lambda images, *_: model.stand_in(images.reshape(len(images), 4, 48))
    return model.train(), "a linear layer for its tower"


def exercise(root, name, generation, vision_tower):
    """What the patched class computes; prints how deep that went."""
    import inspect

    import torch

    import vista_patch
    from tests.helpers import IMAGE, PATCHES, ROWS, batch, gradients, reference
    from vista_patch.observe import locate

    module, missing = load(root, name.partition(":")[0])
    cls = getattr(module, name.partition(":")[2])
    stock = next(vars(c)["forward"] for c in cls.__mro__ if hasattr(vars(c).get("forward"), "adds_vista")).__wrapped__
    model, images_by = build(cls, generation, vision_tower)
    if name.startswith("ross"):  # written for a newer transformers, whose decoders know cache_position
        whole = model.model.forward
        model.model.forward = lambda cache_position=None, **kwargs: whole(**kwargs)
        missing.add("cache_position")

    def inputs(left):
        made = batch(left=left)
        parameters = inspect.signature(stock).parameters
        return made | ({"modalities": ["image"] * len(ROWS)} if "modalities" in parameters else {})

    def run(forward, left, **more):
        """Loss, logits, gradients, and what the decoder took and gave in the run that has a gradient."""
        seen, given = [], inputs(left)

        def see(_, args, kwargs, output):
            seen[:] = [(kwargs["inputs_embeds"], output[0])] if torch.is_grad_enabled() else seen

        hook = locate(model)[1].register_forward_hook(see, with_kwargs=True)
        torch.manual_seed(1)
        out = forward(**given, **more)
        hook.remove()
        loss, logits = (out[0], out[1]) if isinstance(out, tuple) else (out.loss, out.logits)
        if loss.numel() == 1:
            loss.backward()
        grads = gradients(model)
        model.zero_grad()
        given.pop("modalities", None)  # which are no tensors to compare
        return loss.detach(), logits.detach(), grads, given, *(t.detach() for t in seen[0])

    checked = 0
    cut = None if generation == "A" else 12
    for left in (False, True):
        model.config.tokenizer_padding_side = "left" if left else "right"
        plain = run(lambda **kwargs: stock(model, **kwargs), left)
        x, h = plain[4:]
        text, image = torch.zeros(x.shape[:2]).bool(), torch.zeros(x.shape[:2]).bool()
        width = max(map(len, ROWS))
        for b, row in enumerate(ROWS):
            pad = ["P"] * (width - len(row)) if generation == "A" else []  # which keeps the padding where it is
            kinds = [kind for token in row for kind in (["I"] * PATCHES if token == IMAGE else ["T"])][:cut]
            kinds = pad + kinds if left else kinds + pad
            start = x.shape[1] - len(kinds) if left and generation != "A" else 0
            for i, kind in enumerate(kinds):
                text[b, start + i], image[b, start + i] = kind == "T", kind == "I"
        words = model.get_input_embeddings()
        for b, row in enumerate(ROWS):
            kept = [token for token in row if token != IMAGE][: text[b].sum()]
            torch.testing.assert_close(x[b, text[b]], words(torch.tensor(kept, dtype=torch.long)), rtol=0, atol=0)
        for off in (None, {"metric": "off"}, {"metric": "l2", "weight": 0.0}):
            model.config.vista = off
            ours = run(model, left)
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        for metric in ("l2", "cosine"):
            model.config.vista = {"metric": metric, "weight": 0.5}
            ours = run(model, left)
            term = 0.5 * reference(x, h, text, image, metric, "mean", "t/m")
            torch.testing.assert_close((ours[0] - plain[0]).double(), term, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours[1:2] + ours[3:], plain[1:2] + plain[3:], rtol=0, atol=0)
            assert ours[2].keys() == plain[2].keys(), ours[2].keys() ^ plain[2].keys()
            assert not all(torch.equal(g, plain[2][n]) for n, g in ours[2].items())
            if "dpo_forward" in inspect.signature(stock).parameters:
                both = [run(f, left, dpo_forward=True) for f in (model, lambda **kwargs: stock(model, **kwargs))]
                torch.testing.assert_close(*both, rtol=0, atol=0)
            owner = next(c for c in cls.__mro__ if hasattr(vars(c).get("forward"), "adds_vista"))
            decorated, owner.forward = owner.forward, stock  # the same class as if its source were stock
            del model.config.vista
            with vista_patch.patch(model, metric, weight=0.5):
                live = run(model, left)
            torch.testing.assert_close(live, ours, rtol=0, atol=0)
            assert owner.forward is stock and not hasattr(model.config, "vista")
            torch.testing.assert_close(run(model, left), plain, rtol=0, atol=0)
            owner.forward = decorated
            checked += 1
    assert checked == 4
    without = f", without {', '.join(sorted(missing))}" if missing else ""
    print(json.dumps(f"{cls.__name__}: real class, {images_by}{without}"))


if __name__ == "__main__":
    exercise(*sys.argv[1:])
