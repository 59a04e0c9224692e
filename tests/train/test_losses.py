import torch

from autohdr.train import losses


def test_l1_is_the_mean_absolute_error():
    output, target = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.5, 1.0, 0.25])
    assert losses.l1(output.view(1, 3, 1, 1), target.view(1, 3, 1, 1)).item() == 0.25


def test_l1_of_half_precision_is_taken_in_float32():
    output = torch.full((1, 3, 64, 64), 0.1, dtype=torch.bfloat16, requires_grad=True)
    loss = losses.l1(output, torch.zeros(1, 3, 64, 64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), output[0, 0, 0, 0].item(), rtol=1e-6, atol=0)
