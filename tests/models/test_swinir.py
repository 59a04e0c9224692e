import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autohdr.errors import UserError
from autohdr.models import create_model, list_models, load_checkpoint, load_weights, save_weights

LAYOUTS = {"swinir": (180, (6,) * 6), "swinir_light": (60, (6,) * 4)}
COUNTS = {"swinir": 11_504_163, "swinir_light": 905_283}
HEADS = 6


def shapes_of(dim, depths, window=8, trained_on=64):
    """Names and shapes of the tensors in the authors' checkpoints, with the masks of the images they were trained on."""
    shapes, tokens = {}, window**2

    def layer(name, channels_in, channels_out, *size):
        shapes.update({f"{name}.weight": (channels_out, channels_in, *size), f"{name}.bias": (channels_out,)})

    def norm(name):
        shapes.update({f"{name}.{kind}": (dim,) for kind in ("weight", "bias")})

    layer("conv_first", 3, dim, 3, 3)
    norm("patch_embed.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.residual_group.blocks.{j}"
            if j % 2:
                shapes[f"{block}.attn_mask"] = ((trained_on // window) ** 2, tokens, tokens)
            norm(f"{block}.norm1")
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, HEADS)
            shapes[f"{block}.attn.relative_position_index"] = (tokens, tokens)
            layer(f"{block}.attn.qkv", dim, 3 * dim)
            layer(f"{block}.attn.proj", dim, dim)
            norm(f"{block}.norm2")
            layer(f"{block}.mlp.fc1", dim, 2 * dim)
            layer(f"{block}.mlp.fc2", 2 * dim, dim)
        layer(f"layers.{i}.conv", dim, dim, 3, 3)
    norm("norm")
    layer("conv_after_body", dim, dim, 3, 3)
    layer("conv_last", dim, 3, 3, 3)
    return shapes


def published(shapes):
    """A state dict of these shapes, one value repeated, so that its file stays small."""
    state = {name: torch.full((), 0.5).expand(shape) for name, shape in shapes.items()}
    return {n: torch.zeros((), dtype=torch.int64).expand(t.shape) if n.endswith("_index") else t for n, t in state.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_the_authors(name):
    """Light for twice the size has 910,152: conv_last's 1,623 less, 6,492 of its pixelshuffle's convolution more."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    expected = {k: v for k, v in shapes_of(*LAYOUTS[name]).items() if not k.endswith("attn_mask")}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert {name for name in list_models() if name.startswith("swinir")} == {"swinir_nano", "swinir_light", "swinir"}


@pytest.mark.parametrize(("window", "overrides"), [(8, {}), (7, {"window": 7, "img_range": 255.0})], ids=["noise", "JPEG"])
def test_a_published_checkpoint_loads_whole(tmp_path, window, overrides):
    state = published(shapes_of(*LAYOUTS["swinir_light"], window=window, trained_on=128 // window * window))
    torch.save({"params": state}, tmp_path / "m.pth")
    model = load_checkpoint(tmp_path / "m.pth")
    assert (model.config.name, model.config.overrides) == ("swinir_light", overrides)
    report = load_weights(model, tmp_path / "m.pth")
    assert (report.place, len(report.loaded)) == ("params", len(model.state_dict()))
    assert not (report.missing or report.mismatched or report.unexpected)
    assert len(report.left_out) == 12 and all(name.endswith("attn_mask") for name in report.left_out)


def test_what_enlarges_loads_but_for_its_last_layers(tmp_path):
    """Published for super-resolution: there is no network here that changes the size."""
    state = published(shapes_of(*LAYOUTS["swinir_light"]))
    del state["conv_last.weight"], state["conv_last.bias"]
    state |= {"upsample.0.weight": torch.zeros(12, 60, 3, 3), "upsample.0.bias": torch.zeros(12)}
    torch.save({"params": state}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="do not make a whole model"):
        load_checkpoint(tmp_path / "m.pth")
    report = load_weights(create_model("swinir_light"), tmp_path / "m.pth")
    assert report.missing == ["conv_last.weight", "conv_last.bias"]
    assert report.unexpected == ["upsample.0.weight", "upsample.0.bias"] and not report.mismatched


def test_saved_and_loaded(tmp_path):
    model = create_model("swinir_nano", dim=8, depths=[1, 3], heads=[1, 4], window=4, mlp_ratio=1.5)
    save_weights(tmp_path / "own.safetensors", model, {"epoch": 3})
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for path in ("own.safetensors", "bare.pth"):
        loaded = load_checkpoint(tmp_path / path)
        assert loaded.config.__dict__ | {"overrides": {}} == model.config.__dict__ | {"overrides": {}}
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def plain_swinir(image, weights, depths, heads, window, img_range):
    """The network spelt out, window by window, with the authors' additive masks."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"]

    def convolve(x, name):
        return F.conv2d(x.movedim(-1, 1), weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).movedim(1, -1)

    def normalise(x, name):
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(x, name, shift):
        batch, height, width, dim = x.shape
        x = x.roll((-shift, -shift), (1, 2))
        region, number, out = torch.zeros(height, width), 0, torch.empty_like(x)
        cuts = slice(0, -window), slice(-window, -shift), slice(-shift, None)
        for rows in cuts if shift else ():
            for columns in cuts:
                region[rows, columns] = number = number + 1
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1).flatten(0, 1)
        apart = place[:, None] - place + window - 1
        bias = weights[f"{name}.relative_position_bias_table"][apart[..., 0] * (2 * window - 1) + apart[..., 1]].movedim(-1, 0)
        for top in range(0, height, window):
            for left in range(0, width, window):
                here = slice(top, top + window), slice(left, left + window)
                own = region[here].flatten()
                mask = torch.where(own[:, None] == own, 0.0, -100.0)
                qkv = linear(x[:, *here].flatten(1, 2), f"{name}.qkv").unflatten(-1, (3, heads, dim // heads))
                q, k, v = (t.movedim(2, 1) for t in qkv.unbind(2))
                y = ((q @ k.mT / (dim // heads) ** 0.5 + bias + mask).softmax(-1) @ v).movedim(1, 2).flatten(2)
                out[:, *here] = y.unflatten(1, (window, window))
        return linear(out, f"{name}.proj").roll((shift, shift), (1, 2))

    mean = torch.tensor((0.4488, 0.4371, 0.4040))
    first = convolve((image.movedim(1, -1) - mean) * img_range, "conv_first")
    x = normalise(first, "patch_embed.norm")
    for i, depth in enumerate(depths):
        y = x
        for j in range(depth):
            name = f"layers.{i}.residual_group.blocks.{j}"
            y = y + attend(normalise(y, f"{name}.norm1"), f"{name}.attn", j % 2 * (window // 2))
            y = y + linear(F.gelu(linear(normalise(y, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        x = x + convolve(y, f"layers.{i}.conv")
    x = convolve(convolve(normalise(x, "norm"), "conv_after_body") + first, "conv_last")
    return image + x.movedim(-1, 1) / img_range


def far_from_even(model):
    """Attention that differs from pixel to pixel, so that a wrong bias or mask shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("size", [(12, 20), (4, 8), (16, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("img_range", [1.0, 255.0])
def test_matches_the_papers_formulas(size, img_range):
    """The mean that the authors take off is float32 in their code, and here."""
    settings = {"depths": (2, 3), "window": 4, "img_range": img_range}
    model = far_from_even(create_model("swinir_nano", dim=8, **settings)).double()
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_swinir(image, model.state_dict(), heads=2, **settings)
        torch.testing.assert_close(model(image), expected, atol=1e-9, rtol=1e-9)


def test_masks_of_each_window_are_those_of_the_parts(monkeypatch):
    """A compiled network gives each window its bias, an eager one the last row's, the last column's and the rest's."""
    model, image = far_from_even(create_model("swinir_nano", dim=8, window=4)), torch.rand(2, 3, 12, 20)
    with torch.no_grad():
        eager = model(image)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(model(image), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (33, 41), (8, 24)], ids=str)
def test_any_size(size):
    image = torch.rand(2, 3, *size)
    with torch.inference_mode():
        output = create_model("swinir_nano").eval()(image)
    assert output.shape == image.shape and output.isfinite().all()


def test_gradients_reach_every_parameter():
    model = create_model("swinir_nano")
    model(torch.rand(1, 3, 17, 16)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_half_precision(check_half):
    check_half(far_from_even(create_model("swinir_nano")), torch.rand(1, 3, 16, 24), 0.03)


@pytest.mark.parametrize(
    "override",
    [
        {"dim": 0},
        {"depths": (2, 0)},
        {"depths": 2},
        {"heads": (2, 5)},
        {"heads": (2,)},
        {"window": 1},
        {"mlp_ratio": 0},
        {"img_range": float("nan")},
    ],
    ids=str,
)
def test_rejects_an_impossible_override(override):
    (setting,) = override
    with pytest.raises(UserError, match=f"swinir_nano: {setting} must be .*, got "):
        create_model("swinir_nano", **override)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.add(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "overrides"), [("swinir_nano", {}), ("mamba_diffusion_nano", {"dim": 8, "num_groups": 1})])
@pytest.mark.parametrize("size", [(16, 24), (13, 24)], ids=["whole windows", "parts of windows"])
def test_attention_in_windows_is_pytorchs_fused_one(name, overrides, size):
    """A quarter of the time of the one in parts, which PyTorch takes without a word where the bias has three axes."""
    model = create_model(name, **overrides).eval()
    with torch.no_grad(), Called() as called:
        model(torch.rand(1, 3, *size))
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in called.ops
