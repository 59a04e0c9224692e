import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autohdr import kernels
from autohdr.errors import UserError
from autohdr.kernels.backends import as_on_a_gpu
from autohdr.models import create_model, list_models, load_checkpoint, load_weights, save_weights
from autohdr.models.diffusion import cosine_schedule
from autohdr.models.mamba_diffusion import (
    SSM,
    Block,
    ChannelAttention,
    Group,
    MambaDiffusion,
    MambaDiffusionConfig,
    WindowAttention,
)

COUNTS = {
    "mamba_small": 14_471_443,
    "mamba_base": 150_815_563,
    "mamba_large": 435_656_811,
    "mamba_diffusion_base": 150_852_811,
    "mamba_diffusion_large": 435_740_331,
}
STRUCTURES = {  # dim, groups, blocks, dstate, conv_size, dual_attention, time_embedding; tensors
    "mamba_small": ((48, 3, 4, 8, 3, False, False), 1035),
    "mamba_large": ((96, 4, 8, 16, 4, True, False), 2648),
    "mamba_diffusion_base": ((64, 4, 6, 16, 4, True, True), 2010),
    "mamba_diffusion_large": ((96, 4, 8, 16, 4, True, True), 2658),
}
TINY = MambaDiffusionConfig("tiny", 8, 2, 1, dstate=3, conv_size=3)


def on_meta(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def narrow(**overrides):
    """A network with every kind of module, quick enough to run."""
    torch.manual_seed(0)
    return create_model("mamba_diffusion_nano", **{"dim": 8, "num_groups": 2, "dstate": 3} | overrides)


def randomised(module):
    """All learned scales and biases moved away from what they start at, so that each of them is seen in the output."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 0.9)
    return module


def channels_last(*shape, seed=0, dtype=torch.float64):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return image.contiguous(memory_format=torch.channels_last)


# Structure


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert sum(p.numel() for p in on_meta(name).parameters()) == COUNTS[name]


def test_models_of_the_family():
    assert {name for name in list_models() if name.startswith("mamba")} == {*COUNTS, "mamba_diffusion_nano"}
    assert sum(p.numel() for p in on_meta("mamba_diffusion_nano").parameters()) < 1_000_000


@pytest.mark.parametrize("name", STRUCTURES)
def test_key_layout(name):
    structure, tensors = STRUCTURES[name]
    expected = model_shapes(*structure)
    assert {k: tuple(v.shape) for k, v in on_meta(name).state_dict().items()} == expected
    assert len(expected) == tensors


def linear(name, c_in, c_out, bias=True):
    return {f"{name}.weight": (c_out, c_in)} | ({f"{name}.bias": (c_out,)} if bias else {})


def conv(name, c_in, c_out, size, bias=True):
    return {f"{name}.weight": (c_out, c_in, size, size)} | ({f"{name}.bias": (c_out,)} if bias else {})


def norm(name, c):
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def group_shapes(name, c, blocks, dstate, conv_size):
    shapes = conv(f"{name}.conv", c, c, 3, bias=False)
    for block in (f"{name}.blocks.{i}" for i in range(blocks)):
        shapes |= {f"{block}.gamma1": (c,), f"{block}.gamma2": (c,)} | norm(f"{block}.norm1", c) | norm(f"{block}.norm2", c)
        for ssm in (f"{block}.ssm_forward", f"{block}.ssm_backward"):
            shapes |= {f"{ssm}.A_log": (dstate,), f"{ssm}.D": (2 * c,)}
            shapes |= {f"{ssm}.conv1d.weight": (2 * c, 1, conv_size), f"{ssm}.conv1d.bias": (2 * c,)}
            shapes |= linear(f"{ssm}.in_proj", c, 4 * c, False) | linear(f"{ssm}.x_proj", 2 * c, 1 + 2 * dstate, False)
            shapes |= linear(f"{ssm}.dt_proj", 1, 2 * c) | linear(f"{ssm}.out_proj", 2 * c, c, False)
        for depthwise, pointwise in ((0, 1), (3, 4)):
            shapes |= conv(f"{block}.local_enhance.{depthwise}", 1, c, 3, False)
            shapes |= conv(f"{block}.local_enhance.{pointwise}", c, c, 1, False)
        shapes |= linear(f"{block}.channel_attn.2", c, c // 4) | linear(f"{block}.channel_attn.4", c // 4, c)
        shapes |= linear(f"{block}.ffn.0", c, 4 * c) | linear(f"{block}.ffn.3", 4 * c, c)
    return shapes


def model_shapes(dim, groups, blocks, dstate, conv_size, dual_attention, time_embedding):
    channels = [dim * 2**i for i in range(groups)]
    bottom = channels[-1]
    shapes = conv("conv_first.0", 3, dim, 3) | conv("conv_first.1", dim, dim, 3)
    shapes |= conv("conv_last.0", dim, dim, 3) | conv("conv_last.2", dim, 3, 3)
    for i, c in enumerate(channels):
        shapes |= group_shapes(f"encoder_groups.{i}", c, blocks, dstate, conv_size)
        shapes |= group_shapes(f"decoder_groups.{groups - 1 - i}", c, blocks, dstate, conv_size)
    for i, c in enumerate(channels[:-1]):
        shapes |= conv(f"downsamplers.{i}", c, 2 * c, 4)
        up = groups - 1 - i
        shapes |= {f"upsamplers.{up}.weight": (2 * c, c, 4, 4), f"upsamplers.{up}.bias": (c,)}
        shapes |= conv(f"skip_convs.{up}", 2 * c, c, 1)
    shapes |= group_shapes("middle.0", bottom, blocks, dstate, conv_size)
    if dual_attention:
        shapes |= {f"middle_dat.gamma{i}": (bottom,) for i in (1, 2, 3)}
        shapes |= {"middle_dat.spatial_attn.relative_position_bias_table": (15 * 15, 8)}
        shapes |= {"middle_dat.spatial_attn.relative_position_index": (64, 64)}
        for attention in ("middle_dat.spatial_attn", "middle_dat.channel_attn"):
            shapes |= norm(f"{attention}.norm", bottom) | linear(f"{attention}.proj", bottom, bottom)
            shapes |= linear(f"{attention}.qkv", bottom, 3 * bottom, False)
        shapes |= norm("middle_dat.norm", bottom)
        shapes |= linear("middle_dat.ffn.0", bottom, 4 * bottom) | linear("middle_dat.ffn.3", 4 * bottom, bottom)
    if time_embedding:
        buffers = ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        shapes |= dict.fromkeys(buffers, (1000,))
        shapes |= linear("time_embed.0", dim, 4 * dim) | linear("time_embed.2", 4 * dim, dim) | linear("time_proj", dim, dim)
    return shapes


# The parts, each against its formula spelt out


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_ssm_matches_the_recurrence(reverse):
    torch.manual_seed(0)
    ssm = randomised(SSM(8, TINY, reverse)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    expected = plain_ssm(x.flip(1), ssm).flip(1) if reverse else plain_ssm(x, ssm)
    torch.testing.assert_close(ssm(x), expected, atol=1e-10, rtol=1e-10)


def plain_ssm(x, ssm):
    """Left to right; the backward one sees the sequence flipped."""
    u, z = (x @ ssm.in_proj.weight.T).chunk(2, dim=-1)
    taps, length = ssm.conv1d.weight[:, 0], u.shape[1]
    padded = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
    u = F.silu(sum(padded[:, k : k + length] * taps[:, k] for k in range(taps.shape[1])) + ssm.conv1d.bias)
    projected = u @ ssm.x_proj.weight.T
    delta, B, C = projected[..., :1], projected[..., 1:4], projected[..., 4:]
    delta = F.softplus(delta * ssm.dt_proj.weight[:, 0] + ssm.dt_proj.bias)
    state, out = 0, []
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * -ssm.A_log.exp())
        state = decay * state + delta[:, t, :, None] * u[:, t, :, None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1) + ssm.D * u[:, t])
    return (torch.stack(out, 1) * F.silu(z)) @ ssm.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 2, 5], ids=lambda n: f"L{n}")
def test_backward_ssm_is_the_forward_one_flipped(length):
    torch.manual_seed(0)
    backward = SSM(8, TINY, reverse=True).double()
    forward = SSM(8, TINY, reverse=False).double()
    forward.load_state_dict(backward.state_dict())
    x = torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(backward(x), forward(x.flip(1)).flip(1))


class Copies(TorchDispatchMode):
    """Bytes of what is copied, cast and put together meanwhile, of all pixels."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels, self.bytes = pixels, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        kinds = "_to_copy", "clone", "copy_", "cat", "constant_pad_nd"
        if function._schema.name.removeprefix("aten::") in kinds and out.numel() % self.pixels == 0:
            self.bytes.append(out.nbytes)
        return out


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [
        (torch.float32, [], [40 * 4] * 2),  # what x_proj's gradient is put together from
        # Under autocast: the first norm's output, and Δ, which stays float32.
        (torch.bfloat16, [16 * 2] + [4] * 2, [16 * 2] + [16 * 4] + [2] * 2 + [40 * 2] * 2),
    ],
    ids=["float32", "autocast"],
)
def test_copies_of_a_block(dtype, forward, backward):
    """In bytes a pixel: each must be there for a reason."""
    pixels = 7 * 11
    block, x = Block(16, MambaDiffusionConfig("one", 16, 1, 1)), channels_last(1, 16, 7, 11, dtype=torch.float32).requires_grad_()
    d_y = channels_last(1, 16, 7, 11, dtype=torch.float32)
    with as_on_a_gpu(), Copies(pixels) as copies:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = block(x)
        found, copies.bytes = copies.bytes, []
        y.backward(d_y)
    assert sorted(n / pixels for n in found) == sorted(forward)
    assert sorted(n / pixels for n in copies.bytes) == sorted(backward)


def test_block_matches_its_formula():
    torch.manual_seed(0)
    block, x = randomised(Block(8, TINY)).double(), channels_last(2, 8, 5, 3)

    def plain_norm(tokens, norm):
        mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
        return (tokens - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    tokens = x.permute(0, 2, 3, 1).reshape(2, 15, 8)
    normed = plain_norm(tokens, block.norm1)
    both = plain_ssm(normed, block.ssm_forward) + plain_ssm(normed.flip(1), block.ssm_backward).flip(1)
    down, up = block.channel_attn[2], block.channel_attn[4]
    weight = torch.sigmoid(up(F.gelu(down(both.mean(1)))))[:, None]
    first, mix, second, last = (block.local_enhance[i].weight for i in (0, 1, 3, 4))
    local = F.conv2d(normed.mT.reshape(2, 8, 5, 3), first, padding=1, groups=8)
    local = F.conv2d(F.conv2d(F.gelu(F.conv2d(local, mix)), second, padding=1, groups=8), last)
    tokens = tokens + block.gamma1 * (both * weight + local.flatten(2).mT)
    tokens = tokens + block.gamma2 * block.ffn[3](F.gelu(block.ffn[0](plain_norm(tokens, block.norm2))))
    torch.testing.assert_close(block(x), tokens.mT.reshape(2, 8, 5, 3))


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (13, 21), (1, 1), (3, 17)], ids=str)
def test_window_attention_sees_the_pixels_of_its_window_alone(size):
    torch.manual_seed(0)
    attention, x = randomised(WindowAttention(16)).double(), channels_last(2, 16, *size)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    expected = torch.empty_like(x)
    for top in range(0, size[0], 8):
        for left in range(0, size[1], 8):
            window = x[:, :, top : top + 8, left : left + 8]
            expected[:, :, top : top + 8, left : left + 8] = plain_window(window, attention)
    torch.testing.assert_close(attention(x), expected)


def plain_window(window, attention):
    height, width = window.shape[-2:]
    pixels = [(i, j) for i in range(height) for j in range(width)]
    bias = torch.stack(
        [
            torch.stack([attention.relative_position_bias_table[(a - c + 7) * 15 + (b - d + 7)] for c, d in pixels])
            for a, b in pixels
        ]
    )  # (queries, keys, heads)
    qkv = attention.qkv(attention.norm(window.flatten(2).mT)).unflatten(-1, (3, 8, 2))
    q, k, v = qkv.unbind(2)  # each (B, pixels, heads, 2)
    logits = torch.einsum("bqhc,bkhc->bqkh", q, k) / math.sqrt(2) + bias
    y = torch.einsum("bqkh,bkhc->bqhc", logits.softmax(2), v).flatten(2)
    return attention.proj(y).mT.unflatten(2, (height, width))


def test_channel_attention_matches_its_formula():
    torch.manual_seed(0)
    attention, x = randomised(ChannelAttention(32)).double(), channels_last(2, 32, 5, 3)
    q, k, v = attention.qkv(attention.norm(x.flatten(2).mT)).mT.unflatten(1, (3, 8, 4)).unbind(1)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    y = (2 * torch.einsum("bhcl,bhdl->bhcd", q, k)).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(y.flatten(1, 2).mT).mT.reshape(2, 32, 5, 3))


def test_group_adds_a_convolution_of_the_blocks_output():
    torch.manual_seed(0)
    group, x = Group(8, TINY).double(), channels_last(1, 8, 4, 4)
    y = group.blocks[0](x)
    torch.testing.assert_close(group(x), y + F.conv2d(y, group.conv.weight, padding=1))


def test_network_is_a_u_of_its_parts():
    model = narrow(num_groups=3).double()
    image, t = channels_last(2, 3, 8, 12), torch.tensor([10, 990])
    frequencies = 10_000 ** (-torch.arange(4) / 4)
    angles = t[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), 1).double()
    embedded = model.time_proj(model.time_embed[2](F.silu(model.time_embed[0](waves))))
    x = model.conv_first[1](model.conv_first[0](image)) + embedded[:, :, None, None]
    first = model.encoder_groups[0](x)
    second = model.encoder_groups[1](model.downsamplers[0](first))
    x = model.middle[0](model.encoder_groups[2](model.downsamplers[1](second)))
    x = model.decoder_groups[0](model.middle_dat(x))
    x = model.decoder_groups[1](model.skip_convs[1](torch.cat((model.upsamplers[1](x), second), 1)))
    x = model.decoder_groups[2](model.skip_convs[2](torch.cat((model.upsamplers[2](x), first), 1)))
    x = model.conv_last[2](F.gelu(model.conv_last[0](x)))
    torch.testing.assert_close(model(image, t), image + x, atol=1e-6, rtol=1e-6)  # the angles are float32


# Sizes and steps


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 13), (33, 20), (8, 24)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_any_size(size, groups):
    image = torch.rand(2, 3, *size)
    with torch.inference_mode():
        output = narrow(num_groups=groups).eval()(image)
    assert output.shape == image.shape and output.dtype == torch.float32
    assert output.isfinite().all()


def test_padding_is_a_reflection_cropped_off_again():
    model, image = narrow(num_groups=3).eval(), torch.rand(1, 3, 9, 8)
    reflected = torch.cat((image, image[:, :, [7, 6, 5]]), dim=2)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(reflected)[:, :, :9])


def test_each_image_has_its_own_step():
    model, image = narrow().eval(), torch.rand(1, 3, 8, 8).expand(3, -1, -1, -1)
    with torch.inference_mode():
        output = model(image, torch.tensor([0, 500, 999]))
        assert not torch.equal(output[0], output[1]) and not torch.equal(output[1], output[2])
        torch.testing.assert_close(model(image)[0], output[2])


def test_schedule_is_the_diffusion_process_own():
    model, (betas, kept) = narrow(), cosine_schedule()
    torch.testing.assert_close(model.betas, betas.float())
    torch.testing.assert_close(model.alphas_cumprod, kept.float())
    torch.testing.assert_close(model.sqrt_alphas_cumprod, kept.sqrt().float())
    torch.testing.assert_close(model.sqrt_one_minus_alphas_cumprod, (1 - kept).sqrt().float())


@pytest.mark.parametrize(
    "image",
    [torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.rand(1, 3, 0, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["no batch", "grey", "empty", "bytes"],
)
def test_rejects_what_is_no_image(image):
    with pytest.raises(UserError, match=r"mamba_diffusion_nano: expected .*\[B, 3, H, W\], got"):
        narrow()(image)


def test_rejects_a_step_it_has_no_place_for():
    image = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="has no time embedding; expected no t"):
        narrow(time_embedding=False)(image, torch.tensor([3, 4]))
    with pytest.raises(UserError, match=r"expected t of \[2\], one step for each image, got \[1\]"):
        narrow()(image, torch.tensor([3]))


@pytest.mark.parametrize(
    "override",
    [
        {"dim": 0},
        {"dim": 12},
        {"dim": "24"},
        {"num_groups": 0},
        {"num_blocks": 0},
        {"num_blocks": (1, 1)},
        {"dstate": 257},
        {"conv_size": 0},
        {"dual_attention": 1},
        {"time_embedding": None},
    ],
    ids=str,
)
def test_rejects_an_impossible_override(override):
    (setting,) = override
    with pytest.raises(UserError, match=f"mamba_small: {setting} must be .*, got "):
        create_model("mamba_small", **override)


# Stability


def test_delta_a_and_the_scales_start_where_they_should():
    model = narrow(dim=16, num_groups=1)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        assert block.gamma1.eq(0.01).all() and block.gamma2.eq(0.01).all()
        for ssm in (block.ssm_forward, block.ssm_backward):
            delta = F.softplus(ssm.dt_proj.bias)
            assert delta.min() >= 0.99e-3 and delta.max() <= 0.101 and delta.max() > 5 * delta.min()
            torch.testing.assert_close(ssm.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]))
            assert ssm.D.eq(1).all()
    assert all(gamma.eq(0.01).all() for gamma in model.middle_dat.parameters(recurse=False) if gamma.ndim == 1)


def test_72_blocks_start_near_the_identity():
    model = narrow(num_groups=4, num_blocks=8)
    assert sum(isinstance(m, Block) for m in model.modules()) == 72
    groups = [m for m in model.modules() if isinstance(m, Group)]
    change = []

    def compare(group, inputs, output):
        change.append((output - inputs[0]).std() / inputs[0].std())

    for group in groups:
        group.register_forward_hook(compare)
    image = torch.rand(1, 3, 16, 16)
    output = model(image)
    assert len(change) == 9 and max(change) < 0.25
    assert (output - image).abs().max() < 0.02
    output.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


@pytest.mark.parametrize("time_embedding", [False, True])
def test_gradients_reach_every_parameter(time_embedding):
    model = narrow(time_embedding=time_embedding)
    model(torch.rand(1, 3, 17, 16)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_stays_close_and_keeps_the_images_dtype(dtype):
    model, image = randomised(narrow()), torch.rand(1, 3, 16, 24)
    exact = model(image).detach()
    with torch.autocast("cpu", dtype=dtype):
        output = model(image)
        output.square().mean().backward()
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, exact, atol=0.05, rtol=0.05)
    assert not [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]


def test_delta_a_d_and_the_residual_stream_are_float32_under_autocast(monkeypatch):
    seen, scan = [], kernels.selective_scan

    def recorded(u, delta, A, B, C, D, **rest):
        seen.append((u, rest["z"], delta, A, D, rest["delta_bias"], rest["delta_weight"]))
        return scan(u, delta, A, B, C, D, **rest)

    monkeypatch.setattr(kernels, "selective_scan", recorded)
    torch.manual_seed(0)
    block = Block(8, TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(channels_last(2, 8, 4, 4, dtype=torch.float32))
    assert output.dtype == torch.float32
    for u, z, *rest in seen:
        assert u.dtype == z.dtype == torch.bfloat16 and {tensor.dtype for tensor in rest} == {torch.float32}


def test_images_stay_channels_last(monkeypatch):
    """The scan reads its big tensors where the projections and the convolution wrote them."""
    scan, seen = kernels.selective_scan, []

    def recorded(u, *arguments, **rest):
        seen.append(u.is_contiguous() and rest["z"].is_contiguous())
        return scan(u, *arguments, **rest)

    monkeypatch.setattr(kernels, "selective_scan", recorded)
    block, x = Block(8, TINY), channels_last(2, 8, 6, 4, dtype=torch.float32)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [True, True]


def test_recomputing_changes_the_memory_alone(monkeypatch):
    torch.manual_seed(0)
    model, image, calls = MambaDiffusion(TINY), channels_last(1, 3, 9, 12, dtype=torch.float32), []
    monkeypatch.setattr(Block, "forward", lambda self, x, forward=Block.forward: calls.append(len(x)) or forward(self, x))
    results = []
    for model.recompute in (False, True):
        calls.clear()
        output = model(image)
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))))
        assert len(calls) == 5 * (1 + model.recompute)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    calls.clear()
    with torch.no_grad():
        model(image)
    assert len(calls) == 5


def test_bfloat16_model():
    with torch.inference_mode():
        assert narrow().bfloat16()(torch.rand(1, 3, 9, 16).bfloat16()).dtype == torch.bfloat16


# Checkpoints


def assert_same_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("overrides", [{}, {"dual_attention": False, "time_embedding": False, "num_blocks": 2}], ids=str)
def test_round_trip_is_bitwise(tmp_path, overrides):
    model = randomised(narrow(**overrides))
    save_weights(tmp_path / "m.safetensors", model, {"epoch": 3})
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert_same_weights(again, model.state_dict())
    assert again.config == model.config and again.metadata == {"epoch": 3} and not again.training
    image = torch.rand(1, 3, 9, 8)
    with torch.inference_mode():
        assert torch.equal(again(image), model.eval()(image))


@pytest.mark.parametrize(
    "overrides", [{}, {"dstate": 5, "conv_size": 2, "num_blocks": 2}, {"dual_attention": False, "time_embedding": False}], ids=str
)
def test_a_bare_state_dict_says_which_network_it_is(tmp_path, overrides):
    model = narrow(**overrides)
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 7}, tmp_path / "m.pt")
    again = load_checkpoint(tmp_path / "m.pt")
    assert_same_weights(again, model.state_dict())
    assert again.metadata == {"epoch": 7}
    assert len(load_weights(narrow(**overrides), tmp_path / "m.pt").loaded) == len(model.state_dict())


def test_weights_of_a_shorter_network_into_a_longer_one(tmp_path):
    save_weights(tmp_path / "m.safetensors", narrow(), {})
    report = load_weights(narrow(num_blocks=2), tmp_path / "m.safetensors")
    assert report.loaded and not report.mismatched and not report.unexpected
    assert all(".blocks.1." in name for name in report.missing)
    assert "leave the mean in" not in str(report)


def test_a_checkpoint_of_the_original_project_is_its_model(tmp_path):
    """One value repeated, so that it stays small."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in model_shapes(*STRUCTURES["mamba_small"][0]).items()}
    torch.save({"epoch": 7, "model_state_dict": state}, tmp_path / "best.pt")
    config = load_checkpoint(tmp_path / "best.pt").config
    assert (config.name, config.overrides) == ("mamba_small", {})


def test_rejects_a_part_of_a_network(tmp_path):
    torch.save({"encoder_groups.0.blocks.0.ssm_forward.A_log": torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(UserError, match="holds no MambaDiffusion: expected a tensor 'conv_first.0.weight'"):
        load_checkpoint(tmp_path / "m.pt")


def test_config_can_build_the_network_again():
    config = narrow(conv_size=2).config
    assert create_model(config.name, **config.overrides).config == config
