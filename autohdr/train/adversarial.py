"""The adversarial loss: a discriminator that learns, beside the network, to tell its outputs from targets, patch by patch."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from autohdr.train.distributed import Ranks

WIDTH = 32
"""Channels of the discriminator's first layer."""
LR, BETAS = 2e-4, (0.5, 0.999)
"""Its AdamW's, from pix2pix. The rate is constant, and no weight decays: the spectral norm bounds them."""


class Discriminator(nn.Sequential):
    """PatchGAN: images (B, 3, H, W), H and W at least 24, to a number for each of their overlapping 70 x 70 patches.

    The number, (B, 1, H // 8 - 2, W // 8 - 2), is high where the patch looks like a target's. Isola et al., "Image-to-image
    translation with conditional adversarial networks", 2017, with half as many channels and, in place of batch norm, spectral
    norm: Miyato et al., "Spectral normalization for generative adversarial networks", 2018.
    """

    def __init__(self):
        layers, channels = [], 3
        for width, stride in ((WIDTH, 2), (2 * WIDTH, 2), (4 * WIDTH, 2), (8 * WIDTH, 1)):
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride, 1)), nn.LeakyReLU(0.2)]
            channels = width
        super().__init__(*layers, spectral_norm(nn.Conv2d(channels, 1, 4, 1, 1)))


class Adversary:
    """A discriminator and its optimiser. It is whole in every process, and the same in all, however the network is divided.

    Hinge loss (Lim and Ye, "Geometric GAN", 2017): it minimises mean max(0, 1 - D(target)) + mean max(0, 1 + D(output)), the
    network mean -D(output). In float32, also under autocast.
    """

    def __init__(self, weight: float, start: int, device: torch.device):
        """weight: of the network's loss. start: the first epoch, counted from 1, in which the discriminator acts and learns.

        Draws from torch's global generator.
        """
        self.weight, self.start = weight, start
        self.network = Discriminator().to(device).eval()  # the spectral norm's vectors follow the weights in `step` alone
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
        # The moments are there from the beginning, so that a state is always made of the same tensors: a step of nothing.
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.param_groups[0]["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] = LR
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def judge(self, output: Tensor, target: Tensor, epoch: int, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's loss, weighted, and {name: value} of both losses, unweighted, for images (B, 3, H, W).

        epoch: counted from 0; before the start the loss is 0, and both values are nan. share: the weight of this batch in the
        step. The discriminator's gradient of it is added to what is there.
        """
        if epoch + 1 < self.start:
            nothing = torch.zeros((), device=output.device)
            return nothing, dict.fromkeys(("adversarial", "discriminator"), nothing + math.nan)
        output, target = (output if self.weight else output.detach()).float(), target.float()
        with torch.autocast(output.device.type, enabled=False):
            self.network.requires_grad_(False)
            loss = -self.network(output).mean()
            self.network.requires_grad_(True)
            real, made = self.network(torch.cat((target, output.detach()))).chunk(2)
            own = (1 - real).relu().mean() + (1 + made).relu().mean()
            (own * share).backward()
        return self.weight * loss, {"adversarial": loss.detach(), "discriminator": own.detach()}

    def forget(self) -> None:
        """Drop the gradient."""
        self.optimizer.zero_grad()

    def step(self, loss: float, ranks: Ranks) -> str | None:
        """Sum the gradient over the processes, and make a step with it, if there is one. loss: the discriminator's mean over the
        step.

        Where either is not finite no weight changes, and the answer says so. All processes find the same.
        """
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        if not gradients:  # before the start
            return None
        ranks.add_up(gradients)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the discriminator's loss or gradient is not finite (loss {loss}, gradient norm {norm})"
        self.optimizer.step()
        self.network.train()
        for layer in self.network:
            getattr(layer, "weight", None)  # to ask for it is one power iteration
        self.network.eval()
        return None

    def tensors(self) -> list[Tensor]:
        """All that a step changes in place, always in the same order: weights, vectors of the spectral norm, moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*(weight.detach() for weight in self.network.parameters()), *self.network.buffers(), *moments]

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
