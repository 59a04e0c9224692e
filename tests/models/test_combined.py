import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from autohdr.errors import UserError
from autohdr.models import Bridge, Sampler, combine, create_model, guided
from autohdr.models.combined import LEAST, Ensemble, Reduced, SelfEnsemble, Sharpened, sharpen, soup
from autohdr.models.network import Network, NetworkConfig


class Corner(Network):
    """Adds `amount` to the pixel at the top left, and half of it to the pixel on its right."""

    def __init__(self, amount):
        super().__init__(NetworkConfig(f"corner {amount}"))
        self.amount = nn.Parameter(torch.tensor(float(amount)))

    def forward(self, image):
        mark = torch.zeros_like(image)
        mark[..., 0, 0], mark[..., 0, 1] = self.amount, self.amount / 2
        return image + mark


@pytest.fixture
def image():
    return torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_an_ensemble_is_the_mean_of_what_its_networks_make(image):
    mean = Ensemble([Corner(1), Corner(2), Corner(6)])
    torch.testing.assert_close(mean(image), Corner(3)(image))
    assert mean.config.name == "mean of corner 1, corner 2, corner 6"


@pytest.mark.parametrize("views", [2, 4, 8])
def test_each_view_is_turned_back(image, views):
    """What a network adds in one corner comes back in all the corners, and on the sides of them, that its views have there."""
    added = SelfEnsemble(Corner(8), views)(image) - image
    wanted = torch.zeros(5, 4)
    for row, column, down, right in ((0, 0, 1, 1), (0, 3, 1, -1), (4, 0, -1, 1), (4, 3, -1, -1))[: min(views, 4)]:
        share = 8 / views
        wanted[row, column] += share * (1 + (views == 8))
        wanted[row, column + right] += share / 2
        if views == 8:
            wanted[row + down, column] += share / 2
    torch.testing.assert_close(added, wanted.expand(1, 3, 5, 4), atol=1e-6, rtol=0)


def test_of_a_network_that_treats_all_views_alike_nothing_changes(image):
    class Brighter(Corner):
        def forward(self, image):
            return image.sqrt()

    torch.testing.assert_close(SelfEnsemble(Brighter(0), 8)(image), image.sqrt())


def test_a_reduced_network_sees_a_third_and_small_images_whole():
    seen = []

    class Brighter(Corner):
        def forward(self, image):
            seen.append(tuple(image.shape))
            return image * 1.5

    network = Reduced(Brighter(0))
    blurred = torch.rand(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    photo = F.interpolate(blurred, (70, 100), mode="bicubic")
    torch.testing.assert_close(network(photo), photo * 1.5, atol=0.01, rtol=0)
    assert seen == [(1, 3, 24, 34)] * 2
    seen.clear()
    small = photo[:1, :, : LEAST - 1]
    torch.testing.assert_close(network(small), small * 1.5)
    assert seen == [(1, 3, 63, 100)]
    assert network.config.name == "corner 0, at a third" and network.reduction == guided.FACTOR


def test_a_model_of_thumbnails_is_not_reduced():
    with pytest.raises(UserError, match="fast: lite sees no more than a thumbnail"):
        combine([Corner(1), create_model("lite")], flips=2, fast=True)
    with pytest.raises(UserError, match="flips: lite lightens ceilings, .* expected 1 or 2, got 4"):
        combine([Corner(1), create_model("lite")], flips=4)


def test_what_is_carried_up_is_float32_under_autocast():
    network = combine([nano(0)], fast=True)
    photo = torch.rand(1, 3, 66, 66, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = network(photo)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(photo)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.02, rtol=0)
    assert (half.bfloat16().float() != half).any()


def test_sharpening_adds_detail_of_the_luma_alone():
    edge = torch.full((1, 3, 9, 32), 0.3)
    edge[..., 16:] = 0.6
    sharp = sharpen(edge, 0.5)
    assert sharp[..., 15].max() < 0.3 < 0.6 < sharp[..., 16].min()  # on both sides of the edge
    torch.testing.assert_close(sharp[:, 0], sharp[:, 2])  # grey stays grey
    torch.testing.assert_close(sharp[..., :10], edge[..., :10])
    torch.testing.assert_close(sharp[..., 22:], edge[..., 22:])
    grain = 0.5 + 0.005 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(sharpen(grain, 2.0), grain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sharpen(edge, 0.5), sharp)


def test_parts_are_combined_in_this_order(image):
    reduced = combine([Corner(2)], flips=2, fast=True, sharpen=0.5)
    assert reduced.config.name == "corner 2, 2 views, at a third, sharpened by 0.5" and reduced.reduction == guided.FACTOR
    network = combine([Corner(2), Corner(4)], flips=2, sharpen=0.5)
    assert isinstance(network, Sharpened) and network.reduction == 1
    (mirrored,) = network.networks
    assert isinstance(mirrored, SelfEnsemble) and isinstance(mirrored.networks[0], Ensemble)
    assert network.config.name == "mean of corner 2, corner 4, 2 views, sharpened by 0.5"
    torch.testing.assert_close(network(image), sharpen(SelfEnsemble(Corner(3), 2)(image), 0.5))
    assert [part.config.name for part in network.parts()] == ["corner 2", "corner 4"]
    alone = Corner(1)
    assert combine([alone]) is alone


def test_each_network_goes_over_the_image_as_asked(image):
    seen = []

    def run(network, view):
        seen.append((network.config.name, tuple(view.shape)))
        return network(view)

    network = combine([Corner(2), Corner(4)], flips=8)
    torch.testing.assert_close(network.over(image, run), network(image))
    assert len(seen) == 16 and seen[0] == ("corner 2", (1, 3, 5, 4)) and seen[-1] == ("corner 4", (1, 3, 4, 5))


def test_half_precision_is_averaged_in_float32(image):
    result = Ensemble([Corner(1).bfloat16(), Corner(1).bfloat16()])(image.bfloat16())
    assert result.dtype == torch.float32


def nano(seed, **metadata):
    torch.manual_seed(seed)
    network = create_model("restormer_nano")
    network.metadata = metadata
    return network


def test_a_soup_is_the_mean_of_weights_of_one_run():
    networks = [nano(seed, run="a", trained_on=[str(seed)]) for seed in range(3)]
    wanted = sum(network.output.weight.detach().double() for network in networks) / 3
    before = networks[0].output.weight.detach().clone()
    made = soup(networks)
    torch.testing.assert_close(made.output.weight.detach(), wanted.float())
    assert made.metadata == {"run": "a", "trained_on": ["0", "1", "2"]}
    assert torch.equal(networks[0].output.weight, before) and networks[0].metadata["trained_on"] == ["0"]
    assert soup([networks[0], nano(1, run="a")]).metadata == {"run": "a"}  # one does not say it


def test_no_soup_of_several_runs_or_models():
    with pytest.raises(UserError, match="one run, got several; a mean of outputs takes any"):
        soup([nano(0, run="a"), nano(1, run="b")])
    with pytest.raises(UserError, match="one run, got several"):
        soup([nano(0), nano(1)])
    with pytest.raises(UserError, match="one model, got several: lite, restormer_nano"):
        soup([nano(0, run="a"), create_model("lite")])


def test_no_soup_of_codes_or_of_what_is_not_merged():
    """Codes have no mean, and the mean of an adapter's factors is not that of the weights that they make."""
    coded = [create_model("restormer_nano", int8=True) for _ in range(2)]
    adapted = [nano(0, run="a"), nano(1, run="a")]
    layer = adapted[1].latent.blocks[0].attn.qkv
    parametrizations.weight_norm(layer)
    for network in coded:
        network.metadata = {"run": "a"}
    with pytest.raises(UserError, match="a mean of weights: expected weights in floats, got restormer_nano in 8 bits"):
        soup(coded)
    name = "latent.blocks.0.attn.qkv.parametrizations.weight.original0"
    with pytest.raises(UserError, match=f"a mean of weights: expected the tensors of restormer_nano, got {name}: merge"):
        soup(adapted)
    parametrize.remove_parametrizations(layer, "weight")
    soup(adapted)


def test_a_soup_of_a_bridges_checkpoints():
    networks = [Sampler(create_model("mamba_diffusion_nano", dim=8, num_groups=1, dstate=3), Bridge()) for _ in range(2)]
    for network in networks:
        network.metadata = {"run": "a"}
    made, wanted = soup(networks), sum(network.network.conv_last[0].weight.detach() for network in networks) / 2
    torch.testing.assert_close(made.network.conv_last[0].weight.detach(), wanted)


def test_what_they_were_trained_on_is_known_if_all_say_it():
    assert Ensemble([nano(0, trained_on=["b"]), nano(0, trained_on=["a", "b"])]).metadata == {"trained_on": ["a", "b"]}
    assert Ensemble([nano(0, trained_on=["b"]), nano(0)]).metadata == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flips": 3}, "flips: expected 1, 2, 4 or 8, got 3"),
        ({"sharpen": -0.5}, "sharpen: expected a number above 0, up to 2, got -0.5"),
        ({"average": "logits"}, "average: expected outputs or weights, got 'logits'"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        combine([Corner(1)], **settings)
