"""The package as others install it: a wheel and an sdist, used from an environment that has torch and nothing else."""

import os
import subprocess
import tarfile
import zipfile

import pytest

import vista_patch
from tests.helpers import ROOT

USE = """
import sys, torch, vista_patch
from types import SimpleNamespace
from torch import nn

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)
    def forward(self, inputs_embeds):
        return (self.layer(inputs_embeds),)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.config = Table(), SimpleNamespace(image_token_id=8)
    def get_input_embeddings(self):
        return self.decoder.table
    def forward(self, input_ids, labels, images):
        x = torch.where((input_ids == 8)[..., None], images, self.decoder.table(input_ids))
        return {"loss": self.decoder(x)[0].sum()}

model = Model()
inputs = {"input_ids": torch.tensor([[1, 8, 2]]), "labels": torch.tensor([[1, 8, 2]]), "images": torch.randn(1, 1, 4)}
before = model(**inputs)["loss"]
with vista_patch.patch(model):
    model(**inputs)["loss"].backward()
    print(vista_patch.__version__, vista_patch.vista_metrics(model)["vista_share"], "transformers" in sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([ROOT / ".uv/bin/uv", "build", "--quiet", "--out-dir", out, ROOT], check=True)
    return out


def test_the_wheel_holds_the_package_and_its_licence(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"vista_patch/{path.name}" for path in (ROOT / "vista_patch").glob("*.py")} | {"vista_patch/py.typed"}
    assert {name for name in names if ".dist-info" not in name} == modules
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())


def test_the_wheel_works_where_there_is_torch_alone(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run(
        [ROOT / ".uv/bin/uv", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel],
        check=True,
    )
    subprocess.run([ROOT / "scripts/setup/env.sh", "torch"], check=True)
    code = "import sys, importlib.metadata as m\n"
    code += f"sys.path[:] = [p for p in sys.path if {str(ROOT)!r} != p]\n" + USE
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [ROOT / ".venv-torch/bin/python", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [vista_patch.__version__, "1.0", "False"], done.stderr[-2000:]
    command = [ROOT / ".venv-torch/bin/python", tmp_path / "site/bin/vista-patch", "check", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "other:" in done.stdout, done.stdout + done.stderr


def test_every_public_name_is_there():
    assert all(hasattr(vista_patch, name) for name in vista_patch.__all__)
    assert sorted(name for names in vista_patch._HOMES.values() for name in names) == vista_patch.__all__
    with pytest.raises(AttributeError, match="no attribute 'vista_los'"):
        vista_patch.vista_los  # noqa: B018
