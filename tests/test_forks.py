"""Public LLaVA forks at fixed commits: patched, or refused with the reason; and what their real classes then compute.

Each class runs in a process of its own, since the forks share package names; they are forked from one that has torch
and transformers. A module or a name that this environment lacks is replaced by an empty class, which the classes tested
here do not use; where the fork's vision tower cannot be built, its image features come from a linear layer instead. The
table, printed at the end, says so.
"""

import importlib
import importlib.machinery
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vista_patch.__main__ import main
from vista_patch.source import plan

REPO = Path(__file__).parents[1]
LLAMA = "llava.model.language_model.llava_llama:LlavaLlamaForCausalLM"
MISTRAL, QWEN = (LLAMA.replace("llama", name.lower()).replace("Llama", name) for name in ("Mistral", "Qwen"))


@dataclass(frozen=True)
class Fork:
    """A row of the table. `says`: what `check` must say beside its verdict, as a pattern. `raises`: what the first
    training step must say instead of adding the term, by the number of rows in its batch."""

    repository: str
    commit: str
    generation: str  # of the splice: A does not know padding on the left; "" where `apply` refuses
    classes: tuple[str, ...] = ()  # those that run here
    folder: str = "."  # where their package lies
    says: str = ""
    raises: dict[int, str] = field(default_factory=dict)


FORKS = [
    Fork("haotian-liu/LLaVA", "a0bdc71789e586d991c96490e8e17826a93cb44e", "A", (LLAMA,)),
    Fork("haotian-liu/LLaVA", "4a77fb46181b9354261648613b0b8b7eb35b815c", "B", (LLAMA,)),
    Fork("haotian-liu/LLaVA", "c121f0432da27facab705978f83c4ada465e46fd", "C", (LLAMA, MISTRAL)),
    Fork(
        "LLaVA-VL/LLaVA-NeXT",
        "df179663ae8b83207df100a1f7af24caec633ff9",
        "D",
        (LLAMA, QWEN),
        says="LLaVADPOTrainer makes its own loss",
    ),
    Fork(
        "TinyLLaVA/TinyLLaVA_Factory",
        "48a0bf1abb18b13ef485bd7b4a83c9b4ee085e8a",
        "C",
        ("tinyllava.model.modeling_tinyllava:TinyLlavaForConditionalGeneration",),
    ),
    Fork(
        "BAAI-DCAI/Bunny",
        "08273acbd83b6836c03dce25cc134eb6b9cedba5",
        "B",
        (
            "bunny.model.language_model.bunny_phi:BunnyPhiForCausalLM",
            "bunny.model.language_model.bunny_qwen:BunnyQwen2ForCausalLM",
        ),
    ),
    Fork(
        "PKU-YuanGroup/MoE-LLaVA",
        "6cb5f66e12d69e57c584a0062f7943d391540676",
        "B",
        (
            "moellava.model.language_model.llava_llama:LlavaLlamaForCausalLM",
            "moellava.model.language_model.llava_phi:LlavaPhiForCausalLM",
        ),
    ),
    Fork(
        "apple/ml-fastvlm",
        "592b4add3c1c8a518e77d95dc6248e76c1dd591f",
        "C",
        (QWEN.replace("LlavaQwen", "LlavaQwen2"),),
    ),
    Fork("aimagelab/LLaVA-MORE", "2460d393bd7fbb1baedc820a64f43c9312370e53", "C", ("src." + LLAMA,)),
    Fork(
        "dvlab-research/MGM",
        "769820cb71afc7c2b9a2166ca3ce92db1636215c",
        "B",
        (
            "mgm.model.language_model.mgm_llama:MGMLlamaForCausalLM",
            "mgm.model.language_model.mgm_mistral:MGMMistralForCausalLM",
        ),
    ),
    Fork(
        "Meituan-AutoML/MobileVLM",
        "688fdec914810485c8766da96c63d9d2ce15f750",
        "A",
        ("mobilevlm.model.mobilellama:MobileLlamaForCausalLM",),
    ),
    Fork(
        "dvlab-research/LISA",
        "3cb2d4301f1af4691bd4f3938335ef06e76f155a",
        "A",
        ("model.llava.model.language_model.llava_llama:LlavaLlamaForCausalLM",),
        says=r"train_ds\.py:305: trains without HfArgumentParser, so without --vista",
    ),
    Fork(  # its Mistral class cannot train: -300 in the labels
        "foundation-multimodal-models/CAL", "9d99569503859cb163c85b3f9f03bc97e0b6f991", "C", (LLAMA,)
    ),
    Fork(
        "Haochen-Wang409/ross",
        "20ffc6b7ba1605a51111ea5f420f9a08e74e22f9",
        "C",
        ("ross.model.language_model.ross_llama:RossLlamaForCausalLM",),
    ),
    Fork(  # its splice reads the labels' values
        "AIDC-AI/Parrot",
        "989d6d01df5c39cbe9a58172896f06e7b1792798",
        "C",
        ("parrot.model.language_model.parrot_qwen2:ParrotQwen2ForCausalLM",),
    ),
    Fork(  # images are placeholders in input_ids
        "DAMO-NLP-SG/VideoLLaMA3",
        "05cee23deb854fd6ff82dcff1243a4f682e4d617",
        "B",
        ("videollama3.model.videollama3_qwen2:Videollama3Qwen2ForCausalLM",),
    ),
    Fork(  # splice and decoder run once for each scale, and the loss is the mean
        "mu-cai/matryoshka-mm", "ec30cd37f54934789501c6bf78ddc59e950b8d9a", "C", (LLAMA,)
    ),
    Fork(
        "shufangxun/LLaVA-MoD",
        "481ca57856c8ed060438808554aaed3a71f6cd4f",
        "B",
        ("llavamod.model.language_model.llava_qwen1_5:LlavaQwen1_5ForCausalLM",),
        says=r"dpo_train\.py:546: DPOTrainer makes its own loss",
    ),
    Fork(
        "huangb23/VTimeLLM",
        "c34ae56455c470ecbe002cbc53e30d5e67b03948",
        "B",
        ("vtimellm.model.vtimellm_llama:VTimeLLMLlamaForCausalLM",),
    ),
    Fork(  # its decoder takes [positions, rows, d]; 11 rows are as many as there are positions
        "huangb23/VTimeLLM",
        "c34ae56455c470ecbe002cbc53e30d5e67b03948",
        "B",
        ("vtimellm.model.vtimellm_chatglm:VTimeLLMChatGLMForCausalLM",),
        raises={1: "or not the first axis", 11: "did not arrive as its embedding gave it"},
    ),
    Fork(
        "Beckschen/LLaVolta",
        "31ec1516ac282b7aa53a0d11e476f7295523ed3e",
        "C",
        (LLAMA,),
        says=r"llava_mistral\.py:81: [^;]* unpacks 6 values, but [^;]* returns 7",
        raises={1: "rows are packed or dropped on the way"},
    ),
    Fork("Yxxxb/VoCo-LLaMA", "3b6e14d9fe9d6b5793c48aa2665aeca45660a082", "C", (LLAMA.replace("ma:", "ma_1stg:"),)),
    Fork(
        "FreedomIntelligence/ALLaVA",
        "896b77f0ac48c95031cf31ce1b95ccaa380e68bf",
        "B",
        ("allava.model.language_model.llava_vicuna:LlavaVicunaForCausalLM",),
        says=r"no train script here uses HfArgumentParser",
    ),
    Fork(
        "EvolvingLMMs-Lab/LongVA",
        "f4c8781d22d45e3a6ffd017f04aa33dfcc432fc9",
        "D",
        ("longva." + QWEN.removeprefix("llava."),),
        "longva",
        says="LLaVADPOTrainer makes its own loss",
    ),
    Fork(
        "PKU-YuanGroup/Video-LLaVA",
        "984e65bf8e8fd97072258547c4c8061fdd2416b7",
        "B",
        ("videollava.model.language_model.llava_llama:LlavaLlamaForCausalLM",),
    ),
    Fork(
        "snap-research/MyVLM",
        "0a2a8146a888965caefa1a30dc37274acd11cb33",
        "C",
        ("vlms." + LLAMA,),
        says=r"llava_mistral\.py:77: [^;]* unpacks 6 values, but [^;]* returns 7",
    ),
    Fork(
        "SHI-Labs/OLA-VLM",
        "6032a6c189a7f1e2e94a2202b0f8e35899a34b9f",
        "C",
        ("ola_vlm.model.language_model.llava_llama:LlavaLlamaForCausalLM",),
        says=r"probe_llava_llama\.py:214: [^;]* unpacks 7 values, but [^;]* returns 6",
    ),
    Fork(
        "deepglint/unicom",
        "ae7141123532a471f082753b993e8d504104a6fb",
        "D",
        (LLAMA,),
        "mlcd_vl",
        says=r"downstream/llava/[^;]*llava_llama\.py:89: [^;]* unpacks 6 values, but [^;]* returns 9",
    ),
    Fork(
        "OpenGVLab/VideoChat-Flash", "2f8e2f578897895519f11c7d3f9ff26a256b4743", "D", (QWEN,), "llava-train_videochat"
    ),
    Fork(
        "opendatalab/HA-DPO",
        "42f72c536984c6ded016e89b70266f29f2428f33",
        "B",
        (LLAMA,),
        "ha_dpo/models/llava-v1_5",
        says="LlavaDPOTrainer makes its own loss",
    ),
    Fork(
        "SHI-Labs/VCoder",
        "4e85acef896cee7843257d5d844ec945407efb13",
        "A",
        (
            "vcoder_llava.model.language_model.llava_llama:LlavaLlamaForCausalLM",
            "vcoder_llava.model.language_model.vcoder_it_llava_llama:VCoderITLlavaLlamaForCausalLM",
        ),
    ),
    Fork(  # where it gets segmentation maps, its text comes from a copy of the token embedding
        "SHI-Labs/VCoder",
        "4e85acef896cee7843257d5d844ec945407efb13",
        "A",
        ("vcoder_llava.model.language_model.vcoder_ds_llava_llama:VCoderDSLlavaLlamaForCausalLM",),
        raises={1: r"got embeddings that its get_input_embeddings\(\) did not give"},
    ),
    Fork(  # it skips the tokens <mask> and <pos>, for which a region's features come: the config must name them
        "CircleRadon/Osprey",
        "deb0e57d7e771e8d2a8652236b0e348efb9b5c6a",
        "A",
        ("osprey.model.language_model.osprey_llama:OspreyLlamaForCausalLM",),
    ),
    Fork(
        "apple/ml-ferret",
        "3c9e5c93c2c3048638f73848343d03f37824eb2b",
        "A",
        ("ferret.model.language_model.ferret_llama:FERRETLlamaForCausalLM",),
        says=r"ferret_mpt\.py:73: [^;]* unpacks 5 values, but [^;]* returns 6",
    ),
    Fork(
        "DLCV-BUAA/TinyLLaVABench",
        "2d2105fc7d44781464e7f503986bbfac270a8e22",
        "C",
        (
            "tinyllava.model.language_model.llava_llama:TinyLlavaLlamaForCausalLM",
            "tinyllava.model.language_model.llava_phi:TinyLlavaPhiForCausalLM",
        ),
    ),
    Fork(
        "Gumpest/SparseVLMs",
        "26a5f48813c46cd1c7364160354e7fdd3febaa67",
        "C",
        (LLAMA,),
        says=r"sparse_train\.py:836: makes LlavaLlamaDynamicForCausalLM, whose forward [^;]* VISTA does not reach",
    ),
    Fork(
        "UX-Decoder/LLaVA-Grounding",
        "668b7cc3d536ee721d09d04eeff56f8221d72e62",
        "A",
        (),
        says=r"train_joint_1st\.py:814: makes LlavaLlamaForCausalLM_joint, whose forward [^;]* VISTA does not reach",
    ),
    Fork(
        "Theia-4869/FasterVLM",
        "f5d5f12037e105a51865ecb4b28a73cd86eb4921",
        "",
        says=r"llava_llama\.py:88: [^;]* unpacks 6 values, but [^;]* returns 8",
    ),
    Fork(
        "Cooperx521/PyramidDrop",
        "6444f304aee4b7edcb022839fb9e8cd07859704a",
        "C",
        (LLAMA.replace("ma:", "ma_pdrop:") + "_PDrop",),
        raises={1: "did not run"},
    ),
    Fork(  # with a plain projector; its spatial aggregator writes into the decoder's image positions, on TPUs
        "cambrian-mllm/cambrian",
        "539ffc3254bba004e5d012b65c0ad6cb308897c5",
        "C",
        ("cambrian.model.language_model.cambrian_llama:CambrianLlamaForCausalLM",),
        says=r"cambrian_gemma\.py:94: [^;]* unpacks 6 values, but [^;]* returns 10",
    ),
    Fork(
        "NVlabs/VILA",
        "b760c34b9487fd736b4075f5111fbef3d80a37e9",
        "",
        says="no class here has a forward that calls self.prepare_inputs_labels_for_multimodal",
    ),
    Fork(
        "PhoenixZ810/MG-LLaVA",
        "3237152d4697416baa739a8b4eaa544d4ea3499c",
        "",
        says=r"box_model\.py:264: [^;]* calls prepare_inputs_labels_for_multimodal, but is no `forward`",
    ),
    Fork(  # its splice returns modality indicators, which its decoder gets beside the embeddings
        "X-PLUG/mPLUG-Owl",
        "0f3068fdb47b77aedc71fc39f5735cd7aa35e8f9",
        "A",
        ("mplug_owl2.model.modeling_mplug_owl2:MPLUGOwl2LlamaForCausalLM",),
        "mPLUG-Owl2",
    ),
    Fork(
        "RLHF-V/RLAIF-V",
        "83d917b2e8118ca8e7877a796d72af9bb3e6b356",
        "",
        says=r"train_llava15\.py:320: LLaVA15DPOTrainer makes its own loss from the logits and drops the model's",
    ),
]

# Tokens beside IMAGE in whose place a class puts features of an image or of a region of it, and how many vectors.
PLACES = {
    "VCoderITLlavaLlamaForCausalLM": {-300: 4},
    "VCoderDSLlavaLlamaForCausalLM": {-300: 4},
    "OspreyLlamaForCausalLM": {62: 1, 63: 1},
    "FERRETLlamaForCausalLM": {63: 1},
}
TABLE = []
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.helpers", "transformers.models.llama.modeling_llama"])


@pytest.fixture(scope="session", autouse=True)
def table(request):
    """Prints what the tests found, as Markdown, when all are done; all of it, if whole, goes into docs/forks.md too."""
    yield
    lines = ["| repository | commit | generation | verdict | what ran |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in TABLE]
    absent = sum(row[3] == "not had" for row in TABLE)
    if len(TABLE) == len(FORKS) and not absent:
        page, mark = REPO / "docs/forks.md", "<!-- written by tests/test_forks.py -->\n"
        before, _, after = page.read_text().split(mark)
        page.write_text(mark.join([before, "\n".join(["", *lines, "", ""]), after]))
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
@pytest.mark.parametrize("fork", FORKS, ids=lambda f: f"{f.repository}@{f.commit[:7]}{'-refused' * bool(f.raises)}")
def test_fork(clone, vision_tower, fork, capsys):
    root = clone(fork.repository, fork.commit)
    before, found = files(root), plan(root)
    told = " ".join([*found.skipped, found.refusal or ""])
    assert re.search(fork.says, told), told
    start = time.process_time()
    code = main(["apply", str(root)])
    assert time.process_time() - start < 5  # the largest tree: a second, but coverage and a busy machine treble it
    if not fork.generation:
        assert code == 2 and files(root) == before
        reason = re.search(rf"[^;]*{fork.says}[^;]*", found.refusal).group().strip()
        TABLE.append((fork.repository, fork.commit[:7], "", "`apply` refuses", reason.replace(f"{root}: ", "")))
        return
    assert code == 0
    for f in found.touched:
        compile((root / f.name).read_bytes(), f.name, "exec")
    depth = [in_a_process(exercise, root, fork, name, vision_tower) for name in fork.classes]
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache)
    assert main(["revert", str(root)]) == 0
    assert files(root) == before
    verdict = "patched; the first step refuses" if fork.raises else f"patched, classes: {len(found.classes)}"
    tested = "; ".join(depth) or "nothing: only the patch was made and taken back"
    TABLE.append((fork.repository, fork.commit[:7], fork.generation, verdict, tested))


@pytest.mark.upstream
def test_a_trainer_that_drops_the_models_loss(clone, vision_tower):
    fork = next(fork for fork in FORKS if fork.repository == "shufangxun/LLaVA-MoD")
    root = clone(fork.repository, fork.commit)
    assert main(["apply", str(root)]) == 0
    in_a_process(distil, root, fork, vision_tower)


def in_a_process(what, *args):
    receive, send = PROCESSES.Pipe(duplex=False)
    PROCESSES.Process(target=report, args=(send, what, *args)).start()
    send.close()
    right, told = receive.recv()
    assert right, told[-6000:]
    return told


# What follows runs in a fork's process.


def report(send, what, *args):
    try:
        send.send((True, what(*args)))
    except BaseException:
        send.send((False, traceback.format_exc()))


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


class StandIn(type):
    """Its instances are empty classes; whatever else is asked of them is an empty class too."""

    def __getattr__(cls, name):
        return make_class(name)


def make_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, *args: args[0]})


def load(root, module):
    """The module, imported with as many stand-ins as that takes, and what they stand for."""
    import transformers

    sys.path.insert(0, str(root))
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoModel):
        auto.register = classmethod(lambda *args, **kwargs: None)  # older forks take names that transformers now has
    transformers.AutoTokenizer.from_pretrained = lambda *args, **kwargs: None
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


def build(cls, vision_tower):
    """A random tiny model of the class, and what its image features come from."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 64, "num_key_value_heads": 4, "use_cache": False, "attn_implementation": "eager"}
    vision = {"mm_hidden_size": 16, "mm_projector_type": "linear", "mm_vision_tower": str(vision_tower)}
    vision |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "tokenizer_model_max_length": 12}
    if cls.__name__ == "TinyLlavaForConditionalGeneration":  # its __init__ loads each part by a name
        config = cls.config_class(tokenizer_model_max_length=12)
        config.text_config = LlamaConfig(**shape)
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model.language_model, model.vision_tower = LlamaForCausalLM(config.text_config), nn.Identity()
    else:
        if "llava_llama" in cls.__module__ and "grouping" in inspect.getsource(sys.modules[cls.__module__]):
            shape["attn_implementation"] = "sdpa"  # LLaVolta knows no other on a CPU
        if cls.__name__.startswith("MPLUG"):
            heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
            part = heads | {"image_size": 28, "grid_size": 2, "encoder_hidden_size": 16, "num_learnable_queries": 4}
            vision["visual_config"] = {"visual_model": part, "visual_abstractor": part}
            # It is written for transformers 4.31, whose layers have no index and whose model makes the mask.
            from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
            from transformers.models.llama import modeling_llama

            layer = modeling_llama.LlamaDecoderLayer
            modeling_llama.LlamaDecoderLayer = lambda config, *_: layer(config)
            modeling_llama.LlamaModel._prepare_decoder_attention_mask = lambda self, *given: (
                _prepare_4d_causal_attention_mask(*given)
            )
        if "VCoder" in cls.__name__:
            vision |= {"mm_vcoder_lm_emb": True, "seg_mm_projector_type": "linear", "seg_mm_hidden_size": 16}
        if "FERRET" in cls.__name__:
            vision |= {"region_fea_adapter": True, "im_region_fea_token": 63}
        if "ChatGLM" in cls.__name__:
            shape = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
            shape |= {"kv_channels": 8, "padded_vocab_size": 64, "seq_length": 64, "model_type": "chatglm"}
            shape |= {"use_cache": False, "torch_dtype": torch.float32, "original_rope": True}
        if "QWen" in cls.__name__:
            shape |= {"kv_channels": 8, "fp32": True, "seq_length": 64, "max_position_embeddings": 64}
        try:
            model = cls(cls.config_class(**shape, **vision))
            model.get_vision_tower().load_model()
            features = model.encode_images(torch.zeros(2, 3, 8, 8))
            assert (features[1] if "FERRET" in cls.__name__ else features).shape == (2, 4, 32)
            return model.train(), "its own CLIP tower"
        except Exception as error:
            print(f"{cls.__name__} without its tower: {error!r}", file=sys.stderr)
            vision.pop("mm_vision_tower")
            model = cls(cls.config_class(**shape, **vision))
    model.stand_in = nn.Linear(48, 32)
    tower = nn.Identity()
    model.get_vision_tower = model.get_image_tower = lambda: tower
    model.get_video_tower = lambda: None
    model.encode_images = lambda images, *_, **__: model.stand_in(images.reshape(len(images), 4, 48))
    return model.train(), "a linear layer for its tower"


def change(model, repository):
    """What a fork's model wants beside stock's settings; done once."""
    import torch
    from torch import nn

    if repository == "AIDC-AI/Parrot":
        model.config.mm_vision_select_feature = "cls_patch"
        sizes = {"num_experts": 2, "moe_hidden_size": 32, "moe_intermediate_size": 16, "moe_top_k": 1}
        flags = {"use_moe": True, "use_moe_residual": True, "moe_weight": 0.5, "mm_vision_select_feature": "cls_patch"}
        model.model.initialize_moe_modules(types.SimpleNamespace(**sizes, **flags))
    if repository == "mu-cai/matryoshka-mm":
        model.config.matryoshka_vis_token_scale = [1, 4]
    if repository == "huangb23/VTimeLLM":
        model.get_model().mm_projector = nn.Linear(48, 32)
    if "ChatGLM" in type(model).__name__:  # which leaves its weights as they lay in memory
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    if repository == "CircleRadon/Osprey":
        model.mask_extractor = type(model.mask_extractor)(mask_shape=4, out_dim=32)
        model.config.image_token_ids = [62, 63]
        model.tokenizer = types.SimpleNamespace(convert_tokens_to_ids=lambda names: [62])
        model.encode_images = lambda images: (
            model.stand_in(images.reshape(-1, 4, 48)),
            {f"res{i + 2}": images[:, :1].repeat(1, 192 * 2**i, 1, 1) for i in range(4)},
        )
    if repository == "DAMO-NLP-SG/VideoLLaMA3":
        model.config.image_token_index, model.config.use_token_compression = 63, False
        model.get_vision_encoder = model.get_vision_tower
        model.encode_images = lambda pixels, *_: model.stand_in(pixels.reshape(-1, 48))
    if repository == "OpenGVLab/VideoChat-Flash":
        model.config.transformers_version = ""
        model.encode_image = lambda images: [model.encode_images(image) for image in images]
    if repository == "Beckschen/LLaVolta":
        sys.modules[type(model).__module__].VISUAL_LENGTH = 4
        model.model.grouping, model.model.groupingLayer, model.model.stride = "avgpool1d", 1, 2
    if repository == "Cooperx521/PyramidDrop":
        model.model.layer_list, model.model.image_token_ratio_list = [1], [1.0, 0.5]
        model.model._use_flash_attention_2 = True  # its forward knows no other; the layers are eager all the same
        code = sys.modules[type(model.model).__mro__[2].__module__]
        whole = code._prepare_4d_causal_attention_mask
        code._prepare_4d_causal_attention_mask = lambda mask, *args, **kwargs: whole(mask.long(), *args, **kwargs)
    if repository == "cambrian-mllm/cambrian":
        model.config.image_token_len, model.config.query_num_list, model.config.connector_only = 4, [4], True
        model.model.mm_projector, model.model.image_newline = nn.Linear(48, 32), nn.Parameter(torch.randn(32))
        model.model.get_vision_tower_aux_list = lambda: [None]
        model.encode_images = lambda images: [images[0].reshape(-1, 4, 48)]
    decoder = decoder_of(model)
    newer = [name for name in inspect.signature(model.forward).parameters if name == "cache_position"]
    if newer and newer[0] not in inspect.signature(decoder.forward).parameters:  # written for a newer transformers
        whole = decoder.forward
        decoder.forward = lambda inputs_embeds=None, cache_position=None, **kwargs: whole(
            inputs_embeds=inputs_embeds, **kwargs
        )
    return newer


def rows_of(model):
    """ROWS with the class's other places of images after the last image of a row."""
    from tests.helpers import IMAGE, ROWS

    more, rows = PLACES.get(type(model).__name__, {}), []
    for row in ROWS:
        if "FERRET" in type(model).__name__ and row.count(IMAGE) > 1:  # it takes one a row
            row = row[: row.index(IMAGE)] + [token for token in row if token != IMAGE]
        at = len(row) - row[::-1].index(IMAGE) if IMAGE in row else 0
        rows.append([*row[:at], *more, *row[at:]] if at else row)
    return rows


def batch_for(fork, model, left, number=None):
    """Stock's batch as the fork takes it, and the number of image tokens for an image in each run of its decoder.

    number: of rows like the first one, in place of all."""
    import torch

    from tests.helpers import IMAGE, ROWS, batch

    if fork.repository == "DAMO-NLP-SG/VideoLLaMA3":
        given = batch([[t for token in row for t in ([63] * 4 if token == IMAGE else [token])] for row in ROWS], left)
        given["labels"][given["input_ids"] == 63] = -100
        modals = [kind for row in ROWS for kind in (["image"] * row.count(IMAGE) or ["text"])]
        sizes = torch.tensor([[1, 4, 4]] * len(modals)), torch.tensor([2] * len(modals))
        given["pixel_values"] = torch.randn(len(modals) * 16, 12, generator=torch.Generator().manual_seed(1))
        del given["images"]
        return given | {"grid_sizes": sizes[0], "merge_sizes": sizes[1], "modals": modals}, [4]
    rows = rows_of(model)
    given = batch(rows if number is None else rows[:1] * number, left)
    given["labels"][given["input_ids"] < 0] = -100
    if "segs" in inspect.signature(model.forward).parameters:
        given["segs"] = given["images"][: len(given["input_ids"])].flip(0)
    if fork.repository == "CircleRadon/Osprey":
        model.model.to(torch.float32 if left else torch.bfloat16)  # its forward casts it, the embeddings too late
        given["masks"] = [(torch.arange(16).view(1, 4, 4) < 4 + i).float() for i in range(len(given["input_ids"]))]
    if fork.repository == "apple/ml-ferret":
        given["region_masks"] = [[torch.arange(16).view(4, 4) < 4 + i] * (63 in row) for i, row in enumerate(rows)]
    model.cached_image_features = None  # ALLaVA's, which holds a graph that is gone
    if "modalities" in inspect.signature(model.forward).parameters:
        given |= {"modalities": ["image"] * len(ROWS), "images": [image[None] for image in given["images"]]}
    if fork.repository == "huangb23/VTimeLLM":
        given["images"] = given["images"].reshape(-1, 4, 48)
    if fork.repository == "cambrian-mllm/cambrian":
        sizes = [(8, 8)] * len(given["images"])
        return given | {"images": [given["images"]], "image_sizes": sizes}, [6]  # with a newline after each row of two
    return given, getattr(model.config, "matryoshka_vis_token_scale", [4])


def decoder_of(model):
    """The innermost module around the token embedding that takes inputs_embeds."""
    table = model.get_input_embeddings()
    around = [m for m in model.modules() if any(part is table for part in m.modules())]
    return [m for m in around if "inputs_embeds" in inspect.signature(m.forward).parameters][-1]


def kinds(fork, model, x, patches, left):
    """Which positions of x are text and which are image, counted out from the rows."""
    import torch

    from tests.helpers import IMAGE

    rows, places = rows_of(model), PLACES.get(type(model).__name__, {})
    text, image = torch.zeros(x.shape[:2]).bool(), torch.zeros(x.shape[:2]).bool()
    a, width = fork.generation == "A", max(map(len, rows))  # A leaves the padding where it is, and cuts nothing
    for b, row in enumerate(rows):
        pad = ["P"] * (width - len(row)) if a else []
        row = [kind for t in row for kind in ["I"] * (patches if t == IMAGE else places.get(t, 0)) or ["T"]]
        row = row if a or fork.repository == "DAMO-NLP-SG/VideoLLaMA3" else row[:12]
        row = pad + row if left else row + pad
        start = x.shape[1] - len(row) if left and not a else 0
        for i, kind in enumerate(row):
            text[b, start + i], image[b, start + i] = kind == "T", kind == "I"
    words = model.get_input_embeddings()
    for b, row in enumerate(rows):
        kept = [token for token in row if token not in (IMAGE, *places)][: text[b].sum()]
        torch.testing.assert_close(x[b, text[b]], words(torch.tensor(kept, dtype=torch.long)), rtol=0, atol=0)
    return text, image


def exercise(root, fork, name, vision_tower):
    """What the patched class computes; returns how deep that went."""
    import torch

    import vista_patch
    from tests.helpers import gradients, reference

    module, missing = load(Path(root, fork.folder), name.partition(":")[0])
    cls = getattr(module, name.partition(":")[2])
    owner = next(c for c in cls.__mro__ if hasattr(vars(c).get("forward"), "adds_vista"))
    stock = vars(owner)["forward"].__wrapped__
    model, images_by = build(cls, vision_tower)
    missing |= set(change(model, fork.repository))

    def run(forward, left, term=None, number=None, **more):
        """Loss, logits, gradients, inputs afterwards, and what the decoder took and gave in runs with a gradient.

        `term`: of those runs, is added to the loss before its gradients are taken."""
        seen, (given, _) = [], batch_for(fork, model, left, number)

        def see(_, args, kwargs, output):
            if torch.is_grad_enabled():
                seen.append((kwargs["inputs_embeds"], output[0]))

        hook = decoder_of(model).register_forward_hook(see, with_kwargs=True)
        torch.manual_seed(1)
        try:
            out = forward(**given, **more)
        finally:
            hook.remove()
        loss, logits = (out[0], out[1]) if isinstance(out, tuple) else (out.loss, out.logits)
        logits = loss.new_zeros(()) if logits is None else logits  # VideoLLaMA3's training makes none
        if loss.numel() == 1:
            (loss if term is None else loss + term(seen)).backward()
        grads = gradients(model)
        model.zero_grad()
        given = {key: value for key, value in given.items() if torch.is_tensor(value)}
        return (loss.detach(), logits.detach(), grads, given), [(x.detach(), h.detach()) for x, h in seen]

    checked, told = 0, []
    if hasattr(model.config, "image_token_ids"):
        ids, model.config.vista = vars(model.config).pop("image_token_ids"), {"metric": "l2"}
        with pytest.raises(RuntimeError, match=rf"name it: model.config.image_token_ids = \[{ids[0]}\]"):
            run(model, False)
        del model.config.vista
        model.config.image_token_ids = ids
    for left in (False,) if fork.raises else (False, True):
        model.config.tokenizer_padding_side = "left" if left else "right"
        for number, says in fork.raises.items():
            run(lambda **kwargs: stock(model, **kwargs), left, number=number)
            model.config.vista = {"metric": "l2"}
            with pytest.raises(RuntimeError, match=f"VISTA: .*{says}") as error:
                run(model, left, number=number)
            told.append(f"`{error.value}`")
            del model.config.vista
            with pytest.raises(RuntimeError, match=says), vista_patch.patch(model, "l2"):
                run(model, left, number=number)
        if fork.raises:
            continue
        plain, seen = run(lambda **kwargs: stock(model, **kwargs), left)
        patches = batch_for(fork, model, left)[1]
        for off in (None, {"metric": "off"}, {"metric": "l2", "weight": 0.0}):
            model.config.vista = off
            torch.testing.assert_close(run(model, left)[0], plain, rtol=0, atol=0)
        for metric in ("l2", "cosine"):

            def term(seen, metric=metric, left=left, patches=patches):
                assert len(seen) == len(patches)
                runs = [
                    (x, h, *kinds(fork, model, x.detach(), n, left)) for (x, h), n in zip(seen, patches, strict=True)
                ]
                return 0.5 * sum(reference(*one, metric, "mean", "t/m") for one in runs) / len(runs)

            model.config.vista = {"metric": metric, "weight": 0.5}
            vista_patch.vista_metrics(model)  # of the steps before
            ours, _ = run(model, left)
            figures = vista_patch.vista_metrics(model)
            assert figures["loss_ce"] == plain[0].item()
            assert 0.5 * figures["loss_vista"] == pytest.approx(term(seen).item(), rel=1e-5, abs=1e-6)
            del model.config.vista
            expected, _ = run(lambda **kwargs: stock(model, **kwargs), left, term)
            rough = ours[0].dtype == torch.bfloat16
            added = {"rtol": 0, "atol": 2**-7 * ours[0].item()} if rough else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close((ours[0] - plain[0]).double(), term(seen), **added)
            close = {"rtol": 2e-2, "atol": 1e-4} if rough else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(ours[2], expected[2], **close)
            torch.testing.assert_close((ours[1], ours[3]), (plain[1], plain[3]), rtol=0, atol=0)
            assert not all(torch.equal(g, plain[2][n]) for n, g in ours[2].items())
            if "dpo_forward" in inspect.signature(stock).parameters:
                model.config.vista = {"metric": metric, "weight": 0.5}
                both = [run(f, left, dpo_forward=True)[0] for f in (model, lambda **kwargs: stock(model, **kwargs))]
                torch.testing.assert_close(*both, rtol=0, atol=0)
                del model.config.vista
            decorated, owner.forward = owner.forward, stock  # the same class as if its source were stock
            with vista_patch.patch(model, metric, weight=0.5):
                live, _ = run(model, left)
            torch.testing.assert_close(live, ours, rtol=0, atol=0)
            assert owner.forward is stock and not hasattr(model.config, "vista")
            torch.testing.assert_close(run(model, left)[0], plain, rtol=0, atol=0)
            owner.forward = decorated
            checked += 1
    assert checked == (0 if fork.raises else 4)
    model.config.vista = {"metric": "l2"}
    out = None if fork.raises else model(**batch_for(fork, model, left)[0])
    logits = out[1] if isinstance(out, tuple) else getattr(out, "logits", None)
    if logits is not None:
        with pytest.raises(RuntimeError, match="is trained without its term"):  # as by LLaVA-MoD's only_kd
            logits.float().pow(2).mean().backward()
    without = f", without {', '.join(sorted(missing))}" if missing else ""
    says = f": {told[0]}" if told else ""
    return f"{cls.__name__}: real class, {images_by}{without}{says}"


def distil(root, fork, vision_tower):
    """Steps of LLaVA-MoD's own trainer, which can train on a teacher's probabilities alone."""
    import torch
    from torch import nn
    from transformers import TrainingArguments

    import vista_patch
    from tests.helpers import gradients, reference

    module, name = fork.classes[0].split(":")
    cls = getattr(load(root, module)[0], name)
    trainers = importlib.import_module("llavamod.train.align_trainer")
    student, teacher = build(cls, vision_tower)[0], build(cls, vision_tower)[0]
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    change(student, fork.repository)

    def step(loss_type, attach=False, wanted=False):
        """A training step's loss and gradients. `wanted`: the term is the reference's."""
        arguments = TrainingArguments(root / "out", use_cpu=True, report_to=[])
        arguments.moe_enable = arguments.distill_all_tokens = False
        trainer = trainers.AlignTrainer(student, nn.DataParallel(teacher), arguments, loss_type=loss_type)
        own, seen = trainer.compute_loss, []

        def compute_loss(*args):
            loss = own(*args)
            ((x, h),) = seen
            return loss + 0.5 * reference(x, h, *kinds(fork, student, x.detach(), 4, False), "l2", "mean", "t/m")

        if wanted:
            trainer.compute_loss = compute_loss
        if attach:
            vista_patch.attach(trainer, "l2", weight=0.5)
        hook = decoder_of(student).register_forward_hook(
            lambda _, args, kwargs, output: seen.append((kwargs["inputs_embeds"], output[0])), with_kwargs=True
        )
        try:
            loss = trainer.training_step(student, batch_for(fork, student, False)[0])
            return loss.double(), gradients(student)
        finally:
            hook.remove()
            student.zero_grad()

    decorated = cls.forward
    for loss_type in ("only_kd", "align_and_lm"):
        cls.forward = decorated.__wrapped__
        plain, wanted = step(loss_type), step(loss_type, wanted=True)
        cls.forward = decorated
        assert wanted[0] > plain[0] + 0.01
        student.config.vista = {"metric": "off"}
        torch.testing.assert_close(step(loss_type), plain, rtol=0, atol=0)
        student.config.vista = {"metric": "l2", "weight": 0.5}
        if loss_type == "only_kd":
            why = "the loss that its forward returns is not the one that is trained on"
            with pytest.raises(
                RuntimeError, match=f"VISTA: {name} is trained without its term: {why}. vista_patch.attach"
            ):
                step(loss_type)
        else:
            torch.testing.assert_close(step(loss_type), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(step(loss_type, attach=True), wanted, rtol=1e-4, atol=1e-6)
