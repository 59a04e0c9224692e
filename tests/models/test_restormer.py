import pytest
import torch

from autohdr.errors import UserError
from autohdr.models import create_model, list_models

COUNTS = {
    "restormer_tiny": 3_723_494,
    "restormer_small": 8_732_275,
    "restormer_base": 25_437_220,
    "restormer_large": 62_054_354,
    "restormer_official": 26_111_668,
}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert parameters(on_meta(name)) == COUNTS[name]


def test_parameter_count_of_the_rest():
    assert parameters(on_meta("restormer_official", norm_bias=True)) == 26_126_644
    assert parameters(on_meta("restormer_nano")) < 500_000
    assert {name for name in list_models() if name.startswith("restormer")} == {*COUNTS, "restormer_nano"}
    assert list_models() == sorted(list_models())


@pytest.mark.parametrize(
    ("name", "structure", "tensors"),
    [
        ("restormer_tiny", (24, (2, 3, 3, 4), 2), 253),
        ("restormer_base", (48, (4, 6, 6, 8), 4), 495),
        ("restormer_official", (48, (4, 6, 6, 8), 4, False, False), 406),
    ],
)
def test_key_layout(model_shapes, name, structure, tensors):
    expected = model_shapes(*structure)
    assert {k: tuple(v.shape) for k, v in on_meta(name).state_dict().items()} == expected
    assert len(expected) == tensors


@pytest.mark.parametrize(("name", "eps", "norm_bias"), [("restormer_base", 1e-6, True), ("restormer_official", 1e-5, False)])
def test_every_block_gets_the_models_eps_and_norm(name, eps, norm_bias):
    model = on_meta(name)
    blocks = [m for m in model.modules() if hasattr(m, "norm1")]
    assert len(blocks) == 44
    assert {part.eps for b in blocks for part in (b.attn, b.ffn)} == {eps}
    assert {norm.bias is not None for b in blocks for norm in (b.norm1, b.norm2)} == {norm_bias}


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 13), (33, 41), (8, 24)], ids=str)
@pytest.mark.parametrize("name", ["restormer_nano", "restormer_official"])
def test_any_size(small, name, size):
    image = torch.rand(2, 3, *size)
    with torch.inference_mode():
        output = small(name).eval()(image)
    assert output.shape == image.shape and output.dtype == torch.float32
    assert output.isfinite().all()


def test_padding_is_a_reflection_cropped_off_again(small):
    model, image = small().eval(), torch.rand(1, 3, 21, 16)
    reflected = torch.cat((image, image[:, :, [19, 18, 17]]), dim=2)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(reflected)[:, :, :21])


def test_padding_repeats_the_edge_of_an_image_too_small_to_reflect(small):
    model, image = small().eval(), torch.rand(1, 3, 2, 8)
    repeated = torch.cat((image, image[:, :, [1] * 6]), dim=2)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(repeated)[:, :, :2])


@pytest.mark.parametrize("overrides", [{}, {"norm_bias": False}, {"reduce_level1": False}], ids=str)
def test_matches_the_papers_formulas(small, overrides):
    """The whole network spelt out plainly, in float64."""
    model = small(**overrides).double().eval()
    weights = model.state_dict()
    for name in weights:
        if "norm" in name or "temperature" in name:
            weights[name].uniform_(0.5, 1.5)
    image = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), plain_restormer(image, weights), atol=1e-9, rtol=1e-9)


def plain_restormer(image, weights):
    conv = torch.nn.functional.conv2d
    shuffle, unshuffle = torch.nn.functional.pixel_shuffle, torch.nn.functional.pixel_unshuffle

    def normalise(x, name):
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        bias = weights.get(f"{name}.bias")
        x = x if bias is None else x - mean
        x = x / (variance + 1e-6).sqrt() * weights[f"{name}.weight"][:, None, None]
        return x if bias is None else x + bias[:, None, None]

    def block(x, name):
        def local(x, name):
            return conv(x, weights[f"{name}.weight"], padding=1, groups=x.shape[1])

        temperature = weights[f"{name}.attn.temperature"]
        qkv = local(conv(normalise(x, f"{name}.norm1"), weights[f"{name}.attn.qkv.weight"]), f"{name}.attn.qkv_dwconv")
        q, k, v = qkv.flatten(2).unflatten(1, (3, len(temperature), -1)).unbind(1)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        attended = ((q @ k.mT * temperature).softmax(-1) @ v).flatten(1, 2).unflatten(2, x.shape[2:])
        x = x + conv(attended, weights[f"{name}.attn.project_out.weight"])
        hidden = conv(normalise(x, f"{name}.norm2"), weights[f"{name}.ffn.project_in.weight"])
        a, b = local(hidden, f"{name}.ffn.dwconv").chunk(2, dim=1)
        return x + conv(torch.nn.functional.gelu(a) * b, weights[f"{name}.ffn.project_out.weight"])

    def conv3(x, name):
        return conv(x, weights[f"{name}.weight"], padding=1)

    def merge(x, skip, level):
        both, name = torch.cat((x, skip), dim=1), f"reduce_chan_level{level}.weight"
        return conv(both, weights[name]) if name in weights else both

    e1 = block(conv3(image, "patch_embed"), "encoder_level1.blocks.0")
    e2 = block(unshuffle(conv3(e1, "down1_2.body.0"), 2), "encoder_level2.blocks.0")
    e3 = block(unshuffle(conv3(e2, "down2_3.body.0"), 2), "encoder_level3.blocks.0")
    x = block(unshuffle(conv3(e3, "down3_4.body.0"), 2), "latent.blocks.0")
    x = block(merge(shuffle(conv3(x, "up4_3.body.0"), 2), e3, 3), "decoder_level3.blocks.0")
    x = block(merge(shuffle(conv3(x, "up3_2.body.0"), 2), e2, 2), "decoder_level2.blocks.0")
    x = block(merge(shuffle(conv3(x, "up2_1.body.0"), 2), e1, 1), "decoder_level1.blocks.0")
    return conv3(block(x, "refinement.blocks.0"), "output") + image


@pytest.mark.parametrize("name", ["restormer_nano", "restormer_official"])
def test_gradients_reach_every_parameter(small, name):
    model = small(name)
    model(torch.rand(1, 3, 17, 16)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_autocast_keeps_the_images_dtype(small):
    model, image = small().eval(), torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        exact = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(image)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, exact, atol=0.05, rtol=0.05)


def test_bfloat16_model(small):
    with torch.inference_mode():
        assert small().bfloat16()(torch.rand(1, 3, 9, 16).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "image",
    [torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.rand(1, 3, 0, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["no batch", "grey", "empty", "bytes"],
)
def test_rejects_what_is_no_image(small, image):
    with pytest.raises(UserError, match=r"\[B, 3, H, W\], got"):
        small()(image)


def test_rejects_an_unknown_name():
    with pytest.raises(UserError, match="'restormer_huge'; there are .*restormer_base.*restormer_tiny"):
        create_model("restormer_huge")


def test_rejects_an_unknown_override():
    with pytest.raises(UserError, match="restormer_tiny has no setting width; there are dim, .*norm_bias"):
        create_model("restormer_tiny", width=3)


@pytest.mark.parametrize(
    "override",
    [
        {"dim": 0},
        {"dim": 7},
        {"dim": "24"},
        {"num_blocks": (1, 1, 1)},
        {"num_blocks": 4},
        {"num_refinement_blocks": -1},
        {"num_heads": (5, 1, 1, 1)},
        {"expansion": 0.5},
        {"norm_bias": 1},
        {"eps": 0},
        {"reduce_level1": None},
    ],
    ids=str,
)
def test_rejects_an_impossible_override(override):
    (setting,) = override
    with pytest.raises(UserError, match=f"restormer_tiny: {setting} must be .*, got "):
        create_model("restormer_tiny", **override)


def test_config_can_build_the_model_again():
    config = create_model("restormer_nano", dim=8, num_heads=[1, 1, 2, 2]).config
    assert config.overrides == {"dim": 8, "num_heads": (1, 1, 2, 2)}
    assert create_model(config.name, **config.overrides).config == config
