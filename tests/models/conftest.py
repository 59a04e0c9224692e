import pytest
import torch

from autohdr.models import create_model


def _small(name="restormer_nano", **overrides):
    """A model of the named family with every kind of module, quick enough to run, none of which adds nothing."""
    torch.manual_seed(0)
    if name.startswith("nafnet"):
        model = create_model(name, **{"width": 8} | overrides)
        for parameter in (p for n, p in model.named_parameters() if n.endswith(("beta", "gamma"))):
            torch.nn.init.normal_(parameter)
        return model
    if name.startswith("swinir"):
        return create_model(name, **overrides)
    return create_model(name, dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, **overrides)


def _block_shapes(level, blocks, channels, heads, bias=True):
    """Names and shapes of a level's tensors, from the paper's formulas."""
    hidden = int(channels * 2.66)
    for prefix in (f"{level}.blocks.{i}" for i in range(blocks)):
        for norm in ("norm1", "norm2"):
            yield f"{prefix}.{norm}.weight", (channels,)
            if bias:
                yield f"{prefix}.{norm}.bias", (channels,)
        yield f"{prefix}.attn.temperature", (heads, 1, 1)
        yield f"{prefix}.attn.qkv.weight", (3 * channels, channels, 1, 1)
        yield f"{prefix}.attn.qkv_dwconv.weight", (3 * channels, 1, 3, 3)
        yield f"{prefix}.attn.project_out.weight", (channels, channels, 1, 1)
        yield f"{prefix}.ffn.project_in.weight", (2 * hidden, channels, 1, 1)
        yield f"{prefix}.ffn.dwconv.weight", (2 * hidden, 1, 3, 3)
        yield f"{prefix}.ffn.project_out.weight", (channels, hidden, 1, 1)


def _model_shapes(dim, blocks, refinement, bias=True, reduce_level1=True):
    c1, c2, c3, c4 = dim, 2 * dim, 4 * dim, 8 * dim
    out = c1 if reduce_level1 else c2
    shapes = {"patch_embed.weight": (c1, 3, 3, 3), "output.weight": (3, out, 3, 3)}
    for name, c in (("down1_2", c1), ("down2_3", c2), ("down3_4", c3)):
        shapes[f"{name}.body.0.weight"] = (c // 2, c, 3, 3)
    for name, c in (("up4_3", c4), ("up3_2", c3), ("up2_1", c2)):
        shapes[f"{name}.body.0.weight"] = (2 * c, c, 3, 3)
    for level, c in ((1, c1), (2, c2), (3, c3)):
        if level > 1 or reduce_level1:
            shapes[f"reduce_chan_level{level}.weight"] = (c, 2 * c, 1, 1)
    for level, c, n, heads in ((1, c1, blocks[0], 1), (2, c2, blocks[1], 2), (3, c3, blocks[2], 4)):
        shapes |= _block_shapes(f"encoder_level{level}", n, c, heads, bias)
        shapes |= _block_shapes(f"decoder_level{level}", n, out if level == 1 else c, heads, bias)
    shapes |= _block_shapes("latent", blocks[3], c4, 8, bias)
    return shapes | dict(_block_shapes("refinement", refinement, out, 1, bias))


@pytest.fixture(scope="session")
def small():
    return _small


@pytest.fixture(scope="session")
def model_shapes():
    return _model_shapes


@pytest.fixture
def check_half():
    """check(model, image, share): under autocast and in bfloat16 itself the output has its dtype, and an error of less than that
    share of what the model changes."""

    def check(model, image, share):
        with torch.inference_mode():
            exact = model(image)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(image)
            half = model.bfloat16()(image.bfloat16())
        assert (output.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        for actual in (output, half.float()):
            assert (actual - exact).square().mean().sqrt() < share * (exact - image).square().mean().sqrt()

    return check
