"""Restormers with products in 8 bits: near the one in floats, and read from their files as any other."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, load_weights, save_weights, tiling
from autohdr.models.int8 import quantized
from autohdr.models.tiling import FILED, MEMORY, PARKED, Plan


@pytest.fixture(scope="module")
def photos():
    g = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, *size, generator=g) for size in ((40, 56), (61, 43))]


@pytest.fixture(scope="module", params=[{}, {"norm_bias": False}], ids=["bias", "biasfree"])
def models(request, small, photos):
    """A model in floats and in 8 bits."""
    model = small(**request.param).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # channels of unlike size
            if "norm" in name or "dwconv" in name:
                parameter.mul_(torch.logspace(-0.3, 0.3, len(parameter)).view(-1, *[1] * (parameter.ndim - 1)))
    return model, quantized(model, photos)


def change(model, image):
    with torch.inference_mode():
        return model(image) - image


def test_is_near_the_model_in_floats(models, photos):
    model, coded = models
    for photo in [*photos, photos[0].flip(3)]:
        expected, actual = change(model, photo), change(coded, photo)
        assert 0 < (actual - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_holds_a_byte_a_weight_in_each_half_of_a_block(models):
    state = models[1].state_dict()
    coded = {name for name, value in state.items() if value.dtype == torch.int8}
    layers = "attn.qkv.weight", "ffn.project_in.weight", "ffn.project_out.weight"
    assert coded == {name for name in state if name.endswith(layers)}
    for name in coded:
        assert state[name].abs().amax((1, 2, 3)).eq(127).all() and len(state[name.replace("weight", "scale")]) == len(state[name])


def test_a_channel_without_a_value_has_a_scale(small, photos):
    model = small().eval()
    with torch.no_grad():
        block = model.latent.blocks[0]
        for layer in (block.attn.qkv_dwconv, block.ffn.dwconv, block.norm1, block.norm2):
            layer.weight.zero_()
        block.norm1.bias.zero_()
        block.norm2.bias.zero_()
    assert change(quantized(model, photos), photos[0]).isfinite().all()


def test_its_file_is_read_as_any_other(models, photos, tmp_path):
    model, coded = models
    for name, network in (("float", model), ("coded", coded)):
        save_weights(tmp_path / name, network, {"epoch": 3})
    codes = sum(value.numel() for value in coded.state_dict().values() if value.dtype == torch.int8)
    assert (tmp_path / "float").stat().st_size - (tmp_path / "coded").stat().st_size > 2 * codes  # of 3, but for scales and names
    loaded = load_checkpoint(tmp_path / "coded")
    assert loaded.metadata == {"epoch": 3} and torch.equal(change(loaded, photos[0]), change(coded, photos[0]))
    torch.save(coded.state_dict(), tmp_path / "bare")
    assert torch.equal(change(load_checkpoint(tmp_path / "bare"), photos[0]), change(coded, photos[0]))
    before = [copy.deepcopy(network.state_dict()) for network in (model, coded)]
    for file in ("coded", "bare"):
        with pytest.raises(UserError, match=f"{file}: holds products in 8 bits, for inference"):
            load_weights(model, tmp_path / file)
    with pytest.raises(UserError, match="float: expected products in 8 bits, as the model has them, got floats"):
        load_weights(coded, tmp_path / "float")
    for network, state in zip((model, coded), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_works_in_strips(models, photos):
    coded = models[1]
    with torch.inference_mode():
        strips = tiling.run(coded, photos[1], Plan(6, (FILED, PARKED, MEMORY, MEMORY), 0, 0))
        whole = coded(photos[1])
    # As near as to the model in floats: sums that are rounded otherwise make other codes.
    assert (strips - whole).square().mean().sqrt() < 0.05 * (whole - photos[1]).square().mean().sqrt()


def test_is_not_trained(models, photos):
    coded = create_model(models[1].config.name, **models[1].config.overrides)
    with pytest.raises(UserError, match="a model in 8 bits is for inference on a CPU, but it is being trained"):
        coded.train()(photos[0])


def test_refuses_other_models(models, photos):
    for model, got in ((create_model("nafnet_nano"), "nafnet_nano$"), (models[1], "restormer_nano in 8 bits")):
        with pytest.raises(UserError, match=f"expected a Restormer in floats, got {got}"):
            quantized(model, photos)
    with pytest.raises(UserError, match="expected at least one photo to calibrate with, got none"):
        quantized(models[0], [])


def test_refuses_what_is_not_merged(small, photos):
    """A parametrisation and an adapter, each of a layer that is called and of one that is not; merged, it is quantised."""
    for name in ("latent.blocks.0.attn.qkv", "patch_embed"):
        model = small().eval()
        layer = model.get_submodule(name)
        parametrizations.weight_norm(layer)
        with pytest.raises(UserError, match=f"the tensors of restormer_nano, got {name}.parametrizations.*: merge"):
            quantized(model, photos)
        parametrize.remove_parametrizations(layer, "weight")
        quantized(model, photos)
    model.output = torch.nn.Sequential(model.output)
    with pytest.raises(UserError, match="expected the tensors of restormer_nano, got output.0.weight: merge"):
        quantized(model, photos)
