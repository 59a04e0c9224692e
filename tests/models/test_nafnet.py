import pytest
import torch
import torch.nn.functional as F

from autohdr.errors import UserError
from autohdr.models import create_model, in_strips, list_models, load_checkpoint, load_weights, save_weights
from autohdr.models.layers import Conv2d

SIDD = (2, 2, 4, 8), 12, (2, 2, 2, 2)
GOPRO = (1, 1, 1, 28), 1, (1, 1, 1, 1)
COUNTS = {("nafnet_32", SIDD): 29_159_715, ("nafnet_64", SIDD): 115_982_915}
COUNTS |= {("nafnet_32", GOPRO): 17_111_907, ("nafnet_64", GOPRO): 67_888_835}


def on_meta(name, blocks):
    with torch.device("meta"):
        return create_model(name, **dict(zip(("encoder_blocks", "middle_blocks", "decoder_blocks"), blocks, strict=True)))


def shapes_of(width, encoder, middle, decoder):
    """Names and shapes of the tensors in the authors' checkpoints."""
    shapes = {"intro.weight": (width, 3, 3, 3), "intro.bias": (width,), "ending.weight": (3, width, 3, 3), "ending.bias": (3,)}

    def convolution(name, channels_in, channels_out, size=1):
        shapes.update({f"{name}.weight": (channels_out, channels_in, size, size), f"{name}.bias": (channels_out,)})

    def run(name, number, c):
        for prefix in (f"{name}.{i}" for i in range(number)):
            shapes.update({f"{prefix}.{scale}": (1, c, 1, 1) for scale in ("beta", "gamma")})
            shapes.update({f"{prefix}.{norm}.{kind}": (c,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")})
            convolution(f"{prefix}.conv1", c, 2 * c)
            convolution(f"{prefix}.conv2", 1, 2 * c, 3)
            convolution(f"{prefix}.sca.1", c, c)
            convolution(f"{prefix}.conv3", c, c)
            convolution(f"{prefix}.conv4", c, 2 * c)
            convolution(f"{prefix}.conv5", c, c)

    levels = len(encoder)
    for i in range(levels):
        run(f"encoders.{i}", encoder[i], width << i)
        convolution(f"downs.{i}", width << i, width << i + 1, 2)
        above = width << levels - 1 - i
        shapes[f"ups.{i}.0.weight"] = (4 * above, 2 * above, 1, 1)
        run(f"decoders.{i}", decoder[i], above)
    run("middle_blks", middle, width << levels)
    return shapes


@pytest.mark.parametrize(("name", "blocks"), COUNTS)
def test_parameters_are_the_authors(name, blocks):
    """The counts are 29.16, 115.98, 17.11 and 67.89 million, as the authors give them."""
    model = on_meta(name, blocks)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name, blocks]
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes_of(model.config.width, *blocks)


def test_registered():
    assert {name for name in list_models() if name.startswith("nafnet")} == {"nafnet_nano", "nafnet_32", "nafnet_64"}
    for name in ("nafnet_32", "nafnet_64"):
        assert create_model(name, width=4).state_dict().keys() == shapes_of(4, *SIDD).keys()


@pytest.mark.parametrize(("blocks", "overrides"), [(SIDD, {}), (GOPRO, dict(encoder_blocks=GOPRO[0], middle_blocks=1))])
def test_a_published_checkpoint_loads_whole(tmp_path, blocks, overrides):
    """One value repeated, so that the file stays small."""
    state = {name: torch.full((), 0.5).expand(shape) for name, shape in shapes_of(32, *blocks).items()}
    torch.save({"params": state}, tmp_path / "NAFNet.pth")
    model = load_checkpoint(tmp_path / "NAFNet.pth")
    decoder = {"decoder_blocks": blocks[2]} if overrides else {}
    assert (model.config.name, model.config.overrides) == ("nafnet_32", overrides | decoder)
    assert all((tensor == 0.5).all() for tensor in model.state_dict().values())
    report = load_weights(model, tmp_path / "NAFNet.pth")
    assert (report.place, len(report.loaded)) == ("params", len(state))
    assert not (report.missing or report.mismatched or report.unexpected or report.left_out)


def test_saved_and_loaded(small, tmp_path):
    model = small("nafnet_nano", encoder_blocks=(1, 0), middle_blocks=2, decoder_blocks=(0, 1))
    save_weights(tmp_path / "own.safetensors", model, {"epoch": 3})
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for path in ("own.safetensors", "bare.pth"):
        loaded = load_checkpoint(tmp_path / path)
        assert (loaded.config.width, loaded.config.encoder_blocks, loaded.config.middle_blocks) == (8, (1, 0), 2)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def plain_nafnet(image, weights, levels):
    """The network spelt out, one block a run."""

    def convolve(x, name, **geometry):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **geometry)

    def normalise(x, name):
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (variance + 1e-6).sqrt() * scale + shift

    def gate(x):
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]

    def block(x, name):
        y = convolve(normalise(x, f"{name}.norm1"), f"{name}.conv1")
        y = gate(convolve(y, f"{name}.conv2", padding=1, groups=y.shape[1]))
        y = y * convolve(F.adaptive_avg_pool2d(y, 1), f"{name}.sca.1")
        x = x + convolve(y, f"{name}.conv3") * weights[f"{name}.beta"]
        y = gate(convolve(normalise(x, f"{name}.norm2"), f"{name}.conv4"))
        return x + convolve(y, f"{name}.conv5") * weights[f"{name}.gamma"]

    x, skips = convolve(image, "intro", padding=1), []
    for i in range(levels):
        x = block(x, f"encoders.{i}.0")
        skips.append(x)
        x = convolve(x, f"downs.{i}", stride=2)
    x = block(x, "middle_blks.0")
    for i in range(levels):
        x = F.pixel_shuffle(convolve(x, f"ups.{i}.0"), 2) + skips.pop()
        x = block(x, f"decoders.{i}.0")
    return convolve(x, "ending", padding=1) + image


def test_matches_the_papers_formulas(small):
    model = small("nafnet_nano", middle_blocks=1).double().eval()
    weights = model.state_dict()
    for name in weights:
        if "norm" in name:
            weights[name].uniform_(-1, 1)
    image = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), plain_nafnet(image, weights, 3), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (33, 41), (8, 24)], ids=str)
def test_any_size(small, size):
    model, image = small("nafnet_nano").eval(), torch.rand(2, 3, *size)
    with torch.inference_mode():
        output = model(image)
        assert output.shape == image.shape and output.isfinite().all()
        torch.testing.assert_close(in_strips(model, image, 10**11), output, atol=1e-5, rtol=0)


def test_fresh_blocks_add_nothing():
    """Their learned scales start at zero, as the authors': the gradient of these alone is there in the first step."""
    model = create_model("nafnet_nano", width=4)
    model(torch.rand(1, 3, 16, 16)).square().mean().backward()
    without = {n.rpartition(".")[2] for n, p in model.encoders[0].named_parameters() if p.grad is not None and p.grad.any()}
    assert without == {"beta", "gamma"}


def test_gradients_reach_every_parameter(small):
    model = small("nafnet_nano")
    model(torch.rand(1, 3, 17, 16)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_half_precision(small, check_half):
    model, streams = small("nafnet_nano").eval(), []
    model.decoders[2][0].register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    check_half(model, torch.rand(1, 3, 16, 24), 0.01)
    assert streams == [torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    "override",
    [
        {"width": 0},
        {"width": 8.0},
        {"encoder_blocks": ()},
        {"encoder_blocks": 3},
        {"encoder_blocks": (1,) * 9},
        {"middle_blocks": -1},
        {"decoder_blocks": (1, 1)},
        {"decoder_blocks": (1, 1, -1)},
    ],
    ids=str,
)
def test_rejects_an_impossible_override(override):
    (setting,) = override
    with pytest.raises(UserError, match=f"nafnet_nano: {setting} must be .*, got "):
        create_model("nafnet_nano", **override)


@pytest.mark.parametrize(
    ("name", "layer", "refused"),
    [
        ("conv2", lambda c: Conv2d(2 * c, 2 * c, 5, padding=2, groups=2 * c), r"kernel_size \(3, 3\), got kernel_size \(5, 5\)"),
        ("conv4", lambda c: Conv2d(c, 2 * c, 1, bias=False), "a bias, got none"),
        ("norm2", torch.nn.InstanceNorm2d, "Norm, got InstanceNorm2d"),
        ("sca.0", lambda c: torch.nn.AvgPool2d(4), "Mean, got AvgPool2d"),
    ],
    ids=["wider", "bias", "norm", "pool"],
)
def test_a_layer_that_the_kernel_would_not_be_is_refused(small, name, layer, refused):
    model = small("nafnet_nano").eval()
    parent, _, last = f"encoders.0.0.{name}".rpartition(".")
    setattr(model.get_submodule(parent), last, layer(8))
    with torch.inference_mode(), pytest.raises(UserError, match=f"nafnet_nano: encoders.0.0.{name} expected {refused}"):
        model(torch.rand(1, 3, 16, 16))
