"""What gold.py lets through and what it finds, on drawn errors: a correct kernel's are like the reference's, a wrong one's are
larger."""

import pytest
import torch
from gold import assert_as_good_as_reference, rms_factor

TRIALS, DRAWS = 2000, 9  # draws of the reference: of the same inputs, and of eight neighbours


def found(count, size):
    """In which share of trials a kernel fails by its RMS whose errors of so many numbers are `size` times the reference's."""
    g = torch.Generator().manual_seed(0)
    rms = torch.randn(TRIALS, 1 + DRAWS, count, generator=g).square().mean(2).sqrt()
    return (size * rms[:, 0] > rms_factor(count, torch.bfloat16, 1) * rms[:, 1:].amax(1)).double().mean().item()


@pytest.mark.parametrize("count", [1, 7, 24, 100, 400])
def test_a_correct_kernel_passes(count):
    """Nearly always, however few its numbers are. With a factor of 1.1 one of 24 numbers failed in 3 of 100, one of 7 in 5."""
    assert found(count, 1.0) <= 2e-3


@pytest.mark.parametrize(
    ("count", "size", "share"), [(7, 8, 0.99), (24, 4, 0.99), (48, 2, 0.95), (100, 1.6, 0.95), (400, 1.3, 0.95)]
)
def test_a_wrong_one_is_found(count, size, share):
    """Whose errors are so many times the reference's, by the RMS alone; the largest error has a limit of its own."""
    assert found(count, size) >= share


def test_many_numbers_have_the_factor_of_before():
    assert all(rms_factor(count, dtype, 0) == 1.1 for count in (400, 10**6) for dtype in (torch.bfloat16, torch.float16))
    assert [rms_factor(count, torch.float32, kind) for count in (4, 10**6) for kind in (0, 1)] == [2.0, 3.0, 2.0, 3.0]


@pytest.mark.parametrize("count", [7, 24, 4096])
def test_assertion(count):
    """The rule in use: errors like the reference's pass, ones four times as large do not."""
    g = torch.Generator().manual_seed(0)
    gold = torch.zeros(count, dtype=torch.float64)
    errors = [torch.randn(count, generator=g) for _ in range(10)]
    actual, reference, *others = [e.bfloat16() for e in errors]
    pairs = [([o], [gold]) for o in others]
    assert_as_good_as_reference([actual], [reference], [gold], torch.bfloat16, 1, pairs)
    with pytest.raises(AssertionError, match="output 0: .* error"):
        assert_as_good_as_reference([4 * actual], [reference], [gold], torch.bfloat16, 1, pairs)
