"""One exported program, and one compiled one, for every size that the network takes; and networks without data."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from autohdr.models import create_model

SIZES = [
    (64, 72),
    (61, 50),
    (64, 50),
    (16, 9),
    (9, 8),
    (8, 8),
    (7, 7),
    (5, 4),
    (4, 5),
    (2, 3),
    (1, 1),
    (1, 8),
    (8, 1),
    (3, 40),
    (40, 3),
]
ONE_LEVEL = {"encoder_blocks": (1,), "middle_blocks": 0, "decoder_blocks": (0,)}
ONE_GROUP = {"depths": (2,), "heads": (2,)}
ANY = torch.export.Dim.DYNAMIC
pytestmark = pytest.mark.no_cover  # tracing the lines of PyTorch's compiler takes as long again


@pytest.fixture
def network(small, request):
    """In eval mode and without gradients, as one exports it."""
    name, settings = request.param
    torch.manual_seed(0)
    if name.startswith("mamba"):
        model = create_model(name, **{"dim": 8, "num_groups": 2, "dstate": 3} | settings)
    else:
        model = small(name, **settings)
    return model.eval().requires_grad_(False)


def largest_difference(program, network, sizes, batches=(1, 2, 3)):
    """Of its outputs and the network's, over all sizes, with the batches in turn."""
    images = (torch.rand(batch, 3, *size) for batch, size in zip(itertools.cycle(batches), sizes, strict=False))
    return max((program(image) - network(image)).abs().max() for image in images)


@pytest.mark.parametrize(
    ("network", "example", "strict"),
    [
        (("restormer_nano", {}), (40, 48), False),
        (("restormer_nano", {}), (33, 47), True),
        (("restormer_nano", {}), (5, 3), False),
        (("restormer_nano", {"reduce_level1": False, "norm_bias": False}), (33, 47), False),
        (("nafnet_nano", ONE_LEVEL), (33, 47), False),
    ],
    indirect=["network"],
    ids=str,
)
@pytest.mark.long
def test_a_network_of_stages_exports_for_every_size(network, example, strict):
    shapes = ({0: ANY, 2: ANY, 3: ANY},)
    program = torch.export.export(network, (torch.rand(2, 3, *example),), dynamic_shapes=shapes, strict=strict).module()
    assert largest_difference(program, network, SIZES) <= 1e-5


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (("mamba_diffusion_nano", {}), (33, 47)),
        (("mamba_diffusion_nano", {"num_groups": 1, "dual_attention": False}), (40, 48)),
        (("swinir_nano", ONE_GROUP), (33, 47)),
    ],
    indirect=["network"],
    ids=str,
)
@pytest.mark.long
def test_another_network_exports_for_every_size(network, example):
    shapes = ({0: ANY, 2: ANY, 3: ANY},)
    program = torch.export.export(network, (torch.rand(2, 3, *example),), dynamic_shapes=shapes).module()
    assert largest_difference(program, network, SIZES) <= 1e-5


@pytest.mark.parametrize("network", [("restormer_nano", {}), ("mamba_diffusion_nano", {"num_groups": 1})], indirect=True, ids=str)
@pytest.mark.long
def test_one_exported_size_is_one_shape(network):
    program = torch.export.export(network, (torch.rand(1, 3, 21, 16),)).module()
    assert largest_difference(program, network, [(21, 16)], batches=[1]) <= 1e-5


@pytest.mark.parametrize("network", [("restormer_nano", {}), ("restormer_official", {})], indirect=True, ids=str)
@pytest.mark.long
def test_exports_in_bfloat16_on_a_cpu(network):
    network = network.bfloat16()
    shapes = ({2: ANY, 3: ANY},)
    program = torch.export.export(network, (torch.rand(1, 3, 33, 47).bfloat16(),), dynamic_shapes=shapes).module()
    for size in SIZES[::4]:
        image = torch.rand(1, 3, *size).bfloat16()
        torch.testing.assert_close(program(image), network(image), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("network", "least"),
    [
        (("restormer_nano", {}), 9),
        (("mamba_diffusion_nano", {"num_groups": 1}), 9),
        (("nafnet_nano", ONE_LEVEL), 9),
        (("swinir_nano", ONE_GROUP), 9),
    ],
    indirect=["network"],
    ids=str,
)
@pytest.mark.long
def test_compiles_once_for_every_size_but_the_smallest(network, least):
    """From `least` on: PyTorch compiles anew where a dimension is 1, here the deepest level's height, or its windows in a row."""
    torch.compiler.reset()
    counter = CompileCounter()
    program = torch.compile(network, backend=counter, dynamic=True, fullgraph=True)
    sizes = [(max(height, least), max(width, least)) for height, width in SIZES]
    assert largest_difference(program, network, sizes, batches=[2]) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["restormer_base", "restormer_official", "nafnet_64", "swinir", "mamba_diffusion_large"])
def test_counting_parameters_takes_no_data(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) > 10**7 and {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "network",
    [
        ("restormer_nano", {}),
        ("restormer_official", {}),
        ("nafnet_nano", {}),
        ("swinir_nano", ONE_GROUP),
        ("mamba_diffusion_nano", {}),
    ],
    indirect=True,
    ids=str,
)
def test_a_forward_pass_on_meta_gives_the_shape(network):
    network = network.to("meta")
    for dtype in (torch.float32, torch.bfloat16):
        image = torch.empty(2, 3, 21, 13, device="meta", dtype=dtype)
        output = network.to(dtype)(image)
        assert output.device.type == "meta" and output.shape == image.shape and output.dtype == dtype
    assert isinstance(network.to(torch.float32).requires_grad_(True)(image.float()).sum().backward(), type(None))
    assert all(p.grad.shape == p.shape for p in network.parameters())
