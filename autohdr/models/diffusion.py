"""The diffusion process: a bridge that starts from the source photo instead of noise, and its sampler.

With y the source photo and x_0 the target, every image on the way is

    x_t = y + sqrt(ᾱ_t) (x_0 - y) + sqrt(1 - ᾱ_t) λ ε,    t = 0 ... 999,    ε ~ N(0, 1),

which is the usual diffusion process (Ho et al., 2020, equation 4) of the difference x_0 - y with noise of size λ: it interpolates
from the target at t = 0 to the source at t = 999, plus noise. The last step knows the source, so that the network needs no
further input channels, and it is λ away from the source, so that a few steps, or one, will do. A black source and λ = 1 are the
usual process itself. Everything here is linear and works on the difference d_t = x_t - y, with n = λ ε.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autohdr.models.network import Network

STEPS = 1000


def cosine_schedule(steps: int = STEPS, s: float = 0.008) -> tuple[Tensor, Tensor]:
    """(betas, ᾱ), each [steps], float64: how much noise each step adds, and what is left of the signal after it.

    ᾱ_t = f(t + 1) / f(0) with f(t) = cos²((t / steps + s) / (1 + s) · π / 2), but no β exceeds 0.999: ᾱ never becomes 0.
    Source: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021), equation 17.
    """
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    signal = torch.cos((time + s) / (1 + s) * (math.pi / 2)) ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return betas, torch.cumprod(1 - betas, dim=0)


@dataclass(frozen=True)
class Bridge:
    """The process from target to source and back. Its `network` arguments are called as network(x_t, t) and return an image.

    Shapes: images x, source, target and noise (B, 3, H, W), nominally in [0, 1] (noise: ε, of variance 1); t (B,) of int64,
    0 ... 999. Images come back in at least float32.
    """

    prediction: Literal["x0", "v", "noise"] = "x0"
    """What the network is trained to say: the target, v = sqrt(ᾱ) n - sqrt(1 - ᾱ) (x_0 - y), or ε.

    noise says next to nothing about the target at the last steps, where ᾱ is near 0: it needs many steps to sample.
    v: Salimans and Ho, Progressive Distillation (2022), appendix D."""
    noise_scale: float = 0.05
    """λ: standard deviation of the noise at the source's end; a twentieth of the range from black to white."""

    def __post_init__(self):
        if self.prediction not in ("x0", "v", "noise"):
            raise ValueError(f"Bridge: prediction must be 'x0', 'v' or 'noise', got {self.prediction!r}")
        if not 0 < self.noise_scale < math.inf:
            raise ValueError(f"Bridge: noise_scale must be a number above 0, got {self.noise_scale!r}")

    def diffuse(self, target: Tensor, source: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t."""
        signal, spread = _levels(t, target)
        return source + signal * (target - source) + spread * self.noise_scale * noise

    def wanted(self, target: Tensor, source: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a perfect network would predict for the x_t of these."""
        signal, spread = _levels(t, target)
        if self.prediction == "x0":
            return target
        return noise if self.prediction == "noise" else signal * self.noise_scale * noise - spread * (target - source)

    def split(self, predicted: Tensor, x: Tensor, source: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, ε) that a prediction for x = x_t amounts to: diffuse() of them is x again."""
        signal, spread = _levels(t, x)
        difference = x - source
        if self.prediction == "x0":
            start = predicted
        elif self.prediction == "v":
            start = source + signal * difference - spread * predicted
        else:
            start = source + (difference - spread * self.noise_scale * predicted) / signal
        return start, self._noise_in(x, start, source, t)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """The network's prediction for x = x_t. Its output is x and a difference; v and noise are the difference alone."""
        output = network(x, t)
        return output if self.prediction == "x0" else output - x

    def example(self, target: Tensor, source: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A training example (x_t, t, wanted) with t and the noise drawn at random; the loss compares predict() with wanted."""
        device = target.device
        t = torch.randint(STEPS, (len(target),), device=device, generator=generator)
        noise = torch.randn(target.shape, device=device, generator=generator)
        return self.diffuse(target, source, t, noise), t, self.wanted(target, source, t, noise)

    @torch.no_grad()
    def sample(self, network: nn.Module, source: Tensor, steps: int = 4, seed: int = 0) -> Tensor:
        """From the source to an image in [0, 1] in `steps` calls of the network, the same for the same seed.

        DDIM's deterministic sampler (Song et al., 2021, equation 12 with σ = 0) on the difference to the source: only the noise
        at the start is drawn, on the CPU, so that every device gets the same.
        """
        if not 1 <= steps <= STEPS:
            raise ValueError(f"Bridge: steps must be 1 to {STEPS}, got {steps}")
        times = [round(STEPS * (1 - i / steps)) - 1 for i in range(steps)]
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(source.device)
        x, start = source + self.noise_scale * noise, source
        for i, time in enumerate(times):
            t = torch.full((len(source),), time, device=source.device)
            if i > 0:
                x = self.diffuse(start, source, t, noise)
            start = self.split(self.predict(network, x, t), x, source, t)[0].clamp(0, 1)
            noise = self._noise_in(x, start, source, t)
        return start

    def _noise_in(self, x: Tensor, start: Tensor, source: Tensor, t: Tensor) -> Tensor:
        """The ε with which diffuse() takes start to x = x_t."""
        signal, spread = _levels(t, x)
        return (x - source - signal * (start - source)) / (spread * self.noise_scale)


class Sampler(Network):
    """A network and its bridge as a model that maps an image to an image, to evaluate and enhance with.

    forward(source): (B, 3, H, W) in [0, 1] to the same shape.
    """

    def __init__(self, network: Network, bridge: Bridge, steps: int = 4, seed: int = 0):
        super().__init__(network.config)
        self.network, self.bridge, self.steps, self.seed = network, bridge, steps, seed

    def forward(self, source: Tensor) -> Tensor:
        return self.bridge.sample(self.network, source, self.steps, self.seed)


def _levels(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(ᾱ_t), sqrt(1 - ᾱ_t)), each (B, 1, 1, 1), in at least float32."""
    kept = _ALPHAS_CUMPROD.to(t.device)[t][:, None, None, None]
    wide = torch.promote_types(like.dtype, torch.float32)
    return kept.sqrt().to(wide), (1 - kept).sqrt().to(wide)


_ALPHAS_CUMPROD = cosine_schedule()[1]
