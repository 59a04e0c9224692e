"""Hooks on layers that are never called, and adapters in their place, run or are refused; a parametrised weight is right."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from autohdr.errors import UserError
from autohdr.models import create_model, in_strips, load_checkpoint, save_weights
from autohdr.models.layers import Conv2d

pytestmark = pytest.mark.no_cover  # tracing the lines of PyTorch takes as long again


WITH_KERNELS = ["restormer_nano", "restormer_official", "mamba_diffusion_nano", "nafnet_nano"]
WITHOUT = ["swinir_nano"]


@pytest.fixture(params=WITH_KERNELS)
def model(request, small):
    if request.param.startswith("mamba"):
        torch.manual_seed(0)
        return create_model(request.param, dim=8, num_groups=1, dstate=3)
    return small(request.param)


IMAGE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward with keywords": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "full backward": lambda module, hook: module.register_full_backward_hook(hook),
    "full backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("model", [*WITH_KERNELS, *WITHOUT], indirect=True)
def test_a_hook_on_any_module_runs_or_is_refused(model, kind):
    # One of the modules of a class whose names differ in numbers alone: the same lines call them, or don't.
    kinds = {(type(module), re.sub(r"\d+", "", name)): (name, module) for name, module in model.named_modules()}
    refused = 0
    for name, module in kinds.values():
        if isinstance(module, nn.Identity):  # where another layer of the layout would be
            continue
        ran = []
        handle = HOOKS[kind](module, lambda *args, ran=ran, **keywords: ran.append(1) and None)
        try:
            model(IMAGE.clone().requires_grad_()).sum().backward()
            assert ran, name
        except UserError as error:
            refused += 1
            assert f"{model.config.name}: {name} has a hook." in str(error) and "docs/fine_tuning.md" in str(error)
        handle.remove()
    # Without kernels only what holds others is not called: SwinIR's dictionaries.
    assert refused == 2 if model.config.name in WITHOUT else refused > 10
    model(IMAGE)


def never_called(model):
    """(name, module) of each layer that the forward pass takes the weight of without calling it."""
    called, layers = set(), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(module))
    with torch.no_grad():
        model(IMAGE)
    handle.remove()
    return [(name, module) for name, module in model.named_modules() if isinstance(module, layers) and module not in called]


class Lora(nn.Module):
    """An adapter around a layer, as peft's: its weight, were it taken, would be the old one."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(torch.zeros(()))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) * (1 + self.scale)


def subclassed(module):
    """As loralib's: the same layer with another forward."""
    module = copy.copy(module)
    module.__class__ = type("LoraLayer", (type(module),), {"forward": lambda self, x: 2 * type(module).forward(self, x)})
    return module


def patched(module):
    """As tools do that dispatch a model over devices."""
    module = copy.copy(module)
    module.forward = lambda x: x
    return module


REPLACEMENTS = {"wrapped": Lora, "subclassed": subclassed, "patched": patched}


def replace(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_an_adapter_in_the_place_of_a_layer_that_is_never_called_is_refused(model, kind):
    found = never_called(model)
    assert len(found) >= 12
    for name, module in found:
        replace(model, name, REPLACEMENTS[kind](module))
        with pytest.raises(UserError, match=rf"{name} expected {type(module).__name__}, got .* with a forward of its own"):
            model(IMAGE)
        replace(model, name, module)
    assert model(IMAGE).isfinite().all()


def test_a_norm_or_a_block_of_another_kind_is_refused(small):
    model = small()
    for name in ("latent.blocks.0.norm1", "latent.blocks.0", "latent", "up2_1", "up2_1.body"):
        kept = model.get_submodule(name)
        replace(model, name, Lora(kept) if "norm" not in name else nn.LayerNorm(64))
        with pytest.raises(UserError, match=f"restormer_nano: {name} expected "):
            model(IMAGE)
        replace(model, name, kept)


def test_an_adapter_around_a_layer_that_is_called_works(small):
    model = small()
    expected = model(IMAGE)
    for name in ("patch_embed", "down1_2.body.0", "output", "latent.blocks.0.attn", "latent.blocks.0.ffn"):
        module = model.get_submodule(name)

        class Doubled(Lora):
            def forward(self, *args):
                return 2 * self.base_layer(*args)

        replace(model, name, Doubled(module))
        assert not torch.allclose(model(IMAGE), expected)
        replace(model, name, module)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("latent.blocks.0.attn.qkv", "bias", nn.Parameter(torch.ones(192))),
        ("latent.blocks.0.ffn.project_out", "bias", nn.Parameter(torch.ones(64))),
        ("latent.blocks.0.attn.project_out", "stride", (2, 2)),
        ("latent.blocks.0.attn.qkv_dwconv", "dilation", (2, 2)),
        ("latent.blocks.0.attn.qkv_dwconv", "padding", (2, 2)),
        ("latent.blocks.0.ffn.dwconv", "padding_mode", "reflect"),
        ("latent.blocks.0.ffn.dwconv", "groups", 1),
        ("reduce_chan_level2", "bias", nn.Parameter(torch.ones(16))),
        ("reduce_chan_level2", "stride", (2, 2)),
        ("encoder_groups.0.blocks.0.ssm_forward.in_proj", "bias", nn.Parameter(torch.ones(32))),
        ("encoder_groups.0.blocks.0.ssm_backward.conv1d", "dilation", (2,)),
        ("encoder_groups.0.blocks.0.ssm_backward.conv1d", "padding", (1,)),
        ("skip_convs.1", "groups", 2),
    ],
)
def test_a_layer_whose_kernel_would_leave_something_out_is_refused(small, name, attribute, value):
    model = (
        small() if "latent" in name or "reduce" in name else create_model("mamba_diffusion_nano", dim=8, num_groups=2, dstate=3)
    )
    setattr(model.get_submodule(name), attribute, value)
    with pytest.raises(UserError, match=rf"{name} expected {attribute} .*, got {'a bias' if attribute == 'bias' else attribute}"):
        model(IMAGE)


def test_quantised_linear_layers_are_refused():
    model = create_model("mamba_diffusion_nano", dim=8, num_groups=2, dstate=3).eval()

    class Quantised(nn.Module):  # as torch.ao.nn.quantized.dynamic.Linear: weight is a method
        def weight(self):
            raise AssertionError

    replace(model, "middle.0.blocks.0.ssm_forward.in_proj", Quantised())
    with pytest.raises(UserError, match="ssm_forward.in_proj expected Linear, got Quantised"):
        model(IMAGE)


class LowRank(nn.Module):
    """As docs/fine_tuning.md has it."""

    def __init__(self, weight, rank=2):
        super().__init__()
        out, ins = weight.shape[0], math.prod(weight.shape[1:])
        self.down = nn.Parameter(torch.randn(rank, ins) / math.sqrt(ins))
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def test_the_example_of_the_docs(small, tmp_path, monkeypatch):
    """Frozen but for the low-rank parts, and a plain network in the end, that differs in its pointwise weights alone."""
    before = small()
    save_weights(tmp_path / "weights.safetensors", before, {"epoch": 3})
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "fine_tuning.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    exec(compile(example, page, "exec"), {})
    tuned = load_checkpoint("tuned.safetensors")
    assert tuned.metadata == {"epoch": 3}
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, p in before.named_parameters() if p.ndim == 4 and p.shape[2:] == (1, 1)}


def test_a_parametrised_weight_is_what_is_computed_with(model):
    names = [name for name, _ in never_called(model)]
    plain = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        nn.init.normal_(layer.parametrizations.weight[0].up, std=0.05)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(layer.weight)
    output = model(IMAGE)
    torch.testing.assert_close(output, plain(IMAGE), rtol=0, atol=1e-6)
    output.square().mean().backward()
    for name in names:
        assert model.get_submodule(name).parametrizations.weight[0].up.grad.any()
    for name in names:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IMAGE), output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weight_and_spectral_norm(small, norm):
    model = small().eval()
    before, layer = model(IMAGE), model.latent.blocks[0].attn.qkv
    norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2) if norm is parametrizations.weight_norm else layer.weight
    assert not torch.allclose(model(IMAGE), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "hooked", [weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)], ids=["norm", "prune"]
)
def test_weights_that_a_hook_of_the_layer_would_renew_are_refused(small, hooked):
    model = small()
    hooked(model.latent.blocks[0].ffn.project_in)
    with pytest.raises(UserError, match=r"latent.blocks.0.ffn.project_in has a hook.* \(torch.nn.utils.parametrize\)"):
        model(IMAGE)


@pytest.mark.long
def test_compiled_and_exported_networks_refuse_too(small):
    model = small()
    torch.compile(model, backend="eager", fullgraph=True)(IMAGE)
    model.latent.blocks[0].attn.qkv.register_forward_hook(lambda *args: None)
    torch.compiler.reset()
    for build in (
        lambda: torch.compile(model, backend="eager", fullgraph=True)(IMAGE),
        lambda: torch.export.export(model, (IMAGE,)),
    ):
        with pytest.raises(Exception, match="latent.blocks.0.attn.qkv has a hook|Uncalled"):
            build()


def test_a_hook_on_anything_is_refused_in_strips(small):
    model = small().eval()
    for name in ("", "patch_embed", "latent.blocks.0.attn", "latent.blocks.0.ffn", "down1_2.body.1"):
        handle = model.get_submodule(name).register_forward_hook(lambda *args: None)
        with torch.inference_mode(), pytest.raises(UserError, match=f"restormer_nano: {name}.* has a hook"):
            in_strips(model, IMAGE, 10**10)
        handle.remove()


@pytest.mark.parametrize("name", ["patch_embed", "down2_3.body.0", "up2_1.body.0", "output"])
def test_a_convolution_that_reads_further_is_refused_in_strips(small, name):
    model = small().eval()
    conv = model.get_submodule(name)
    replace(model, name, Conv2d(conv.in_channels, conv.out_channels, 5, padding=2, bias=False))
    with (
        torch.inference_mode(),
        pytest.raises(UserError, match=rf"{name} expected kernel_size \(3, 3\), got kernel_size \(5, 5\)"),
    ):
        assert model(IMAGE).isfinite().all()
        in_strips(model, IMAGE, 10**10)


def test_a_wrapped_half_is_refused_in_strips(small):
    model = small().eval()
    model.latent.blocks[0].attn = Lora(model.latent.blocks[0].attn)
    with torch.inference_mode(), pytest.raises(UserError, match="latent.blocks.0.attn expected Attention, got Lora"):
        in_strips(model, IMAGE, 10**10)
