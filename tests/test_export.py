"""Exported files give what the model gives at any size; what can't be exported is refused, and leaves no file."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import autohdr
from autohdr import export, kernels
from autohdr.autotone import thumbnail
from autohdr.cli import main
from autohdr.data.images import read_rgb
from autohdr.demo import SAMPLES
from autohdr.files import sha256
from autohdr.kernels.backends import default_backend
from autohdr.models import create_model, load_checkpoint, save_weights
from autohdr.models.int8 import quantized
from autohdr.models.lite import LiteConfig
from autohdr.models.network import Network

FREE = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
SIZES = [(1, 1), (33, 47), (130, 131), (520, 130), (1, 1031)]
ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.long, pytest.mark.no_cover, pytest.mark.filterwarnings("ignore")]  # what PyTorch's exporters say


def run(*words):
    return main(["export", *map(str, words)])


def refusal(capsys, out, *words):
    """What a refused call says. It leaves no file."""
    assert run(*words, "--out", out) == 2 and not out.exists() and not (out.parent.exists() and list(out.parent.glob(".*")))
    return capsys.readouterr().err


def largest_difference(program, model, sizes=SIZES):
    images = [torch.rand(1, 3, *size) for size in sizes]
    with torch.no_grad():
        return max(float((program(image) - model(image)).abs().max()) for image in images)


def in_onnx_runtime(file):
    session = onnxruntime.InferenceSession(file)
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


class Convolution(Network):
    def __init__(self):
        super().__init__(LiteConfig("lite"))
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image):
        return self.layer(image)


@pytest.fixture
def convolution(monkeypatch):
    """Every checkpoint's model, for what is the same for all."""
    model = Convolution().eval()
    monkeypatch.setattr(export, "load_checkpoint", lambda path: model)
    return model


def saved(path, name, metadata=(), **settings):
    """A checkpoint whose model, unlike a new one, changes a photo."""
    torch.manual_seed(0)
    model = create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_weights(path, model, dict(metadata))
    return path


class Block(nn.Module):
    """mdta and gdfn of 8 channels, made of an image's."""

    def __init__(self):
        super().__init__()
        model = create_model("restormer_nano", dim=8)
        self.embed, (self.block,) = model.patch_embed, model.encoder_level1.blocks

    def forward(self, image):
        x = self.embed(image)
        return self.block.ffn(self.block.attn(x, self.block.norm1), self.block.norm2)


class Thumbnail(nn.Module):
    def forward(self, image):
        return thumbnail(image)


class Edit(nn.Module):
    """apply_edit with all that it takes: curves, a matrix and a grid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.curves, self.matrix, self.grid = torch.rand(1, 3, 5), torch.rand(1, 3, 4), torch.rand(1, 4, 5, 3, 3, 4)

    def forward(self, image):
        return kernels.apply_edit(image, self.curves, self.matrix, self.grid)


@pytest.mark.parametrize("part", [Block, Thumbnail])
def test_the_parts_of_models_are_right_in_onnx(part, tmp_path):
    module = part().eval().requires_grad_(False)
    with torch.no_grad(), default_backend("reference"):
        program = torch.export.export(module, (torch.zeros(1, 3, 40, 48),), dynamic_shapes=(FREE,))
        run = export._onnx(program, tmp_path / "part.onnx", {})
        assert largest_difference(run, module) <= 1e-5


@pytest.mark.parametrize("part", [Block, Edit])
def test_the_older_exporter_is_right_at_its_size(part, tmp_path):
    """It wrote a broken graph where the reference moved a negative axis."""
    module, file = part().eval().requires_grad_(False), tmp_path / "part.onnx"
    with torch.no_grad(), default_backend("reference"):
        torch.onnx.export(module, (torch.zeros(1, 3, 33, 47),), file, dynamo=False, input_names=["image"], opset_version=17)
    assert largest_difference(in_onnx_runtime(file), module, [(33, 47)]) <= 1e-5


def test_a_file_says_what_it_is_and_runs_as_the_docs_have_it(convolution, tmp_path):
    out = tmp_path / "model.onnx"
    assert run("--to", "onnx", "--out", out) == 0 and list(tmp_path.iterdir()) == [out]
    session = onnxruntime.InferenceSession(out)
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, got.name) == ("image", [1, 3, "height", "width"], "edited")
    said = session.get_modelmeta().custom_metadata_map
    assert said["model"] == "lite" and said["autohdr"] == autohdr.__version__ and "sRGB" in said["input"]
    assert said["weights_sha256"] == sha256(export.SHIPPED) and said["sides"] == "any, from 1 on"
    assert json.loads(said["settings"]) == {"members": 5, "width": 24}

    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text("utf-8"), re.DOTALL)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    subprocess.run([sys.executable, "-c", snippet.replace("photo.jpg", "photo.png")], cwd=tmp_path, check=True)
    edited = convolution((torch.from_numpy(pixels) / 255).permute(2, 0, 1)[None]).clamp(0, 1)[0].permute(1, 2, 0)
    assert np.abs(np.asarray(Image.open(tmp_path / "edited.png")) - 255 * edited.detach().numpy()).max() <= 0.51


def test_large_weights_are_beside_the_program(convolution, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "EMBEDDED", 0)
    assert run("--to", "onnx", "--out", tmp_path / "lite.onnx") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lite.onnx", "lite.onnx.data"]
    said = capsys.readouterr().out
    assert re.search(r"lite.onnx \(0.00 MB\), \S+lite.onnx.data \(0.00 MB\): at .* at most 0\.\d+ / 255 from the model", said)
    moved = shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert largest_difference(in_onnx_runtime(Path(moved) / "lite.onnx"), convolution) <= 1e-5


def test_what_differs_is_not_kept(convolution, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "FARTHEST", -1.0)
    assert "not written: 0.00 / 255 from the model" in refusal(capsys, tmp_path / "lite.pt2", "--to", "torch-export")


def test_what_does_not_run_is_not_kept(convolution, tmp_path, monkeypatch, capsys):
    """Here a program for photos of less than 512 rows alone."""
    monkeypatch.setattr(convolution, "forward", lambda image: image * (2 if image.shape[2] < 512 else 3))
    assert "does not run" in refusal(capsys, tmp_path / "lite.pt2", "--to", "torch-export")


def test_lite_for_torch_export(tmp_path):
    checkpoint, out = saved(tmp_path / "lite.safetensors", "lite", members=1), tmp_path / "lite.pt2"
    assert run(checkpoint, "--to", "torch-export", "--out", out) == 0
    said = {"autohdr.json": ""}
    program = torch.export.load(out, extra_files=said).module()
    said = json.loads(said["autohdr.json"])
    assert (
        said["model"] == "lite" and json.loads(said["settings"])["members"] == 1 and said["weights_sha256"] == sha256(checkpoint)
    )
    assert largest_difference(program, load_checkpoint(checkpoint)) <= 1e-5


def test_a_network_in_aoti(tmp_path, capsys):
    """AOTInductor's convolutions of images with sides that it can't follow back were wrong without a word."""
    quick = {"cpp.simdlen": 1, "aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    one_level = {"encoder_blocks": (1,), "middle_blocks": 0, "decoder_blocks": (0,)}
    checkpoint, out = saved(tmp_path / "nafnet.safetensors", "nafnet_nano", **one_level), tmp_path / "nafnet.pt2"
    with torch._inductor.config.patch(quick):
        assert run(checkpoint, "--to", "aoti", "--out", out) == 0
    assert re.search(r"at 61×97, 5×1031, 1031×3 pixels at most 0\.0\d+ / 255 from the model", capsys.readouterr().out)
    program, model = torch._inductor.aoti_load_package(str(out)), load_checkpoint(checkpoint)
    said = program.get_metadata()
    assert said["model"] == "nafnet_nano" and json.loads(said["settings"])["encoder_blocks"] == [1]
    assert said["weights_sha256"] == sha256(checkpoint) and said["sides"] == "any, from 3 on"
    assert largest_difference(program, model, [(3, 3), (33, 47), (4, 131), (64, 3)]) <= 1e-5
    for size in [(2, 33), (33, 1)]:
        with pytest.raises(RuntimeError, match="Expected"):
            program(torch.rand(1, 3, *size))


def test_what_aoti_can_not_compile_is_named(convolution, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-compiler",))
    said = refusal(capsys, tmp_path / "lite.pt2", "--to", "aoti")
    assert "lite.pt2: not written: AOTInductor: InvalidCxxCompiler: No working C++ compiler found" in said


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_weights_in_half_are_loaded_as_they_are(weights, tmp_path, capsys):
    checkpoint, out = saved(tmp_path / "a.safetensors", "lite", {"trained_on": ["x"]}, members=4), tmp_path / "b.safetensors"
    assert run(checkpoint, "--to", "safetensors", "--weights", weights, "--out", out) == 0
    assert f"b.safetensors ({out.stat().st_size / 1e6:.2f} MB): at" in capsys.readouterr().out
    assert out.stat().st_size < 0.6 * checkpoint.stat().st_size
    model, kept, tensors = load_checkpoint(checkpoint), load_checkpoint(out), safetensors.torch.load_file(out)
    assert (kept.config, kept.metadata) == (model.config, model.metadata) and kept.metadata["trained_on"] == ["x"]
    for name, values in model.state_dict().items():
        assert torch.equal(tensors[name], values.to(getattr(torch, weights)))
        assert kept.state_dict()[name].dtype == torch.float32 and torch.equal(kept.state_dict()[name], tensors[name].float())


@pytest.fixture
def in_8_bits(tmp_path):
    """A checkpoint of whose codes some change by any rounding before them, by more than 1/255 in a few pixels."""
    photo = torch.from_numpy(read_rgb(SAMPLES.parent / "dining_room_src.jpg")).permute(2, 0, 1)[None, :, ::8, ::8]
    model = quantized(load_checkpoint(saved(tmp_path / "float.safetensors", "restormer_nano")), [photo])
    save_weights(tmp_path / "coded.safetensors", model, {"epoch": 3})
    return tmp_path / "coded.safetensors"


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_what_is_not_in_8_bits_becomes_half(in_8_bits, weights, tmp_path, capsys):
    out, dtype = tmp_path / "half.safetensors", getattr(torch, weights)
    assert run(in_8_bits, "--to", "safetensors", "--weights", weights, "--out", out) == 0
    assert "pixels on average 0." in capsys.readouterr().out and out.stat().st_size < 0.75 * in_8_bits.stat().st_size
    state, kept = (load_checkpoint(file).state_dict() for file in (in_8_bits, out))
    tensors = safetensors.torch.load_file(out)
    for name, values in state.items():
        coded = values.dtype == torch.int8 or name.endswith("scale")
        assert torch.equal(tensors[name], values if coded else values.to(dtype)) and (coded or tensors[name].dtype == dtype)
        assert kept[name].dtype == values.dtype and torch.equal(kept[name], tensors[name].to(values.dtype))


def test_a_file_of_8_bits_that_differs_is_not_kept(in_8_bits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "FARTHEST", 0.05 / 255)
    said = refusal(capsys, tmp_path / "half.safetensors", in_8_bits, "--to", "safetensors", "--weights", "bfloat16")
    assert re.search(r"not written: 0\.\d\d / 255 from the model", said)
    said = refusal(capsys, tmp_path / "coded.onnx", in_8_bits, "--to", "onnx")
    assert "in 8 bits: not for onnx; torch-export has the op itself" in said


def test_any_checkpoint_becomes_a_smaller_one(tmp_path):
    torch.manual_seed(0)
    model = create_model("restormer_nano", dim=4, num_heads=(1, 1, 1, 1))
    torch.save({"params_ema": model.state_dict()}, tmp_path / "others.pth")
    assert run(tmp_path / "others.pth", "--to", "safetensors", "--weights", "float16", "--out", tmp_path / "r.safetensors") == 0
    assert torch.equal(load_checkpoint(tmp_path / "r.safetensors").output.weight, model.output.weight.half().float())
    bridge = {"bridge": {"steps": 2, "prediction": "x0", "noise_scale": 0.05}}
    sampler = saved(tmp_path / "bridge.safetensors", "mamba_diffusion_nano", bridge, dim=8, num_groups=1, num_blocks=1)
    assert run(sampler, "--to", "safetensors", "--weights", "float16", "--out", tmp_path / "s.safetensors") == 0
    assert load_checkpoint(tmp_path / "s.safetensors").steps == 2


def test_weights_beyond_half_precision_are_refused(tmp_path, capsys):
    checkpoint, out = tmp_path / "weights.safetensors", tmp_path / "m.safetensors"
    model = create_model("lite", members=1)
    with torch.no_grad():
        model.members[0].hidden.weight[0] = 65520.0  # the first that rounds to infinity
    save_weights(checkpoint, model, {})
    said = refusal(capsys, out, checkpoint, "--to", "safetensors", "--weights", "float16")
    assert f"float16 has values up to 65504, {checkpoint} more in 1 tensors: members.0.hidden.weight" in said


def test_refusals(tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.onnx"
    mamba = saved(tmp_path / "mamba.safetensors", "mamba_small", dim=8, num_groups=1, num_blocks=1)
    said = refusal(capsys, out, mamba, "--to", "onnx")
    assert "mamba_small can't become onnx: selective_scan" in said and "torch-export has the op itself" in said
    bridge = {"bridge": {"steps": 2, "prediction": "x0", "noise_scale": 0.05}}
    sampler = saved(tmp_path / "sampler.safetensors", "mamba_diffusion_nano", bridge, dim=8, num_groups=1)
    assert "bridge" in refusal(capsys, out, sampler, "--to", "onnx")
    assert "float32 for onnx, got float16" in refusal(capsys, out, "--to", "onnx", "--weights", "float16")
    assert "ends in .pt2" in refusal(capsys, out, "--to", "torch-export")
    assert "a folder that exists" in refusal(capsys, tmp_path / "none" / "m.onnx", "--to", "onnx")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert 'onnx needs onnxscript and onnxruntime: pip install "autohdr[onnx]"' in refusal(capsys, out, "--to", "onnx")
    assert kernels.backends("mdta") and sorted(file.suffix for file in tmp_path.iterdir()) == [".safetensors"] * 2


@pytest.mark.drill
@pytest.mark.parametrize(("name", "settings"), [("lite", {}), ("restormer_nano", {})], ids=str)
def test_whole_models_in_onnx_runtime_and_openvino(name, settings, tmp_path):
    checkpoint, out = saved(tmp_path / "weights.safetensors", name, **settings), tmp_path / "model.onnx"
    assert run(checkpoint, "--to", "onnx", "--out", out) == 0
    model = load_checkpoint(checkpoint)
    assert largest_difference(in_onnx_runtime(out), model) <= 1e-4
    compiled = pytest.importorskip("openvino").Core().compile_model(str(out), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert largest_difference(lambda image: torch.from_numpy(compiled(image.numpy())[0]), model) <= 1e-4


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lite", {}),
        ("restormer_nano", {}),
        ("nafnet_nano", {}),
        ("swinir_nano", {}),
        ("mamba_small", {"dim": 8, "num_groups": 2, "num_blocks": 1}),
    ],
    ids=str,
)
def test_whole_models_in_aoti(name, settings, tmp_path):
    checkpoint, out = saved(tmp_path / "weights.safetensors", name, **settings), tmp_path / "model.pt2"
    assert run(checkpoint, "--to", "aoti", "--out", out) == 0
    model = load_checkpoint(checkpoint)
    least = model.multiple + 1
    sizes = [(max(height, least), max(width, least)) for height, width in SIZES]
    assert largest_difference(torch._inductor.aoti_load_package(str(out)), model, sizes) <= 1e-4
