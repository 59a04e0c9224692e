import pytest
import torch
import torch.nn.functional as F

from autohdr.models import guided
from autohdr.models.guided import FACTOR, carry_up, reduced


def photo(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_a_cell_is_the_mean_of_its_pixels():
    image = photo(7, 9)
    small = reduced(image)
    assert small.shape == (1, 3, 3, 3)
    torch.testing.assert_close(small[0, :, 0, 1], image[0, :, :3, 3:6].mean((1, 2)))
    torch.testing.assert_close(small[0, :, 2, 2], image[0, :, 6:, 6:].mean((1, 2)))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (20, 31)])
def test_no_edit_changes_nothing(size):
    image = photo(*size)
    small = reduced(image)
    torch.testing.assert_close(carry_up(image, 0, small, small), image)


def test_an_affine_edit_is_found():
    image = F.interpolate(photo(9, 7).double(), (91, 70), mode="bicubic")
    small = reduced(image)
    matrix = torch.tensor([[1.2, 0.1, 0.0], [0.0, 0.9, 0.2], [-0.1, 0.0, 1.1]], dtype=torch.float64)

    def edit(x):
        return torch.einsum("ij,bjhw->bihw", matrix, x) + 0.05

    torch.testing.assert_close(carry_up(image, 0, small, edit(small)), edit(image), atol=5e-3, rtol=0)


def test_an_edge_stays_where_it_is():
    """A bright window in a dark wall, each with a gain of its own, beside what interpolating the difference would make of it."""
    image = torch.full((1, 3, 60, 60), 0.2)
    image[..., 20:41] = 0.9
    wanted = torch.where(image < 0.5, image * 2, image * 0.9)
    small, edited = reduced(image), reduced(wanted)
    carried = carry_up(image, 0, small, edited)
    smeared = image + F.interpolate(edited - small, scale_factor=FACTOR, mode="bilinear")
    assert (smeared - wanted).abs().max() > 0.1
    assert (carried - wanted).abs().max() < 0.03


def test_parts_are_carried_up_as_the_whole(monkeypatch):
    image = photo(50, 47)
    small = reduced(image)
    edited = small.sqrt() + 0.2 * photo(*small.shape[2:], seed=1)
    whole = carry_up(image, 0, small, edited)
    monkeypatch.setattr(guided, "COLUMNS", 5)
    parts = [carry_up(image[:, :, row : row + 4 * FACTOR], row // FACTOR, small, edited) for row in range(0, 50, 4 * FACTOR)]
    torch.testing.assert_close(torch.cat(parts, 2), whole)
