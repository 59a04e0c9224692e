"""Fitting Lite: it learns, the same twice; the rooms that it learns from."""

import numpy as np
import torch

from autohdr.edits import TILT
from autohdr.kernels import apply_edit
from autohdr.models import create_model
from autohdr.train import lite


def pairs(count=24):
    """Dim pictures, and edits that no recipe makes: red goes up, shadows come down."""
    g = torch.Generator().manual_seed(0)
    sources = 0.6 * torch.rand(count, 3, 8, 8, generator=g).repeat_interleave(16, 2).repeat_interleave(16, 3)
    curves = (torch.linspace(0, 1.4, 9).clamp(max=1) ** 1.3).expand(count, 3, 9) * torch.tensor([1.2, 1, 0.9])[:, None]
    return sources, apply_edit(sources, curves, torch.eye(3, 4).expand(count, 3, 4)).clamp(0, 1)


def fitted(steps):
    torch.manual_seed(0)
    model = create_model("lite", members=2)
    sources, targets = pairs()
    lite.fit(model, sources, targets, steps)
    return model, lite.psnr(model, sources, targets)


def test_fit_learns_and_gives_the_same_twice():
    (_, before), (model, after), (again, _) = fitted(0), fitted(40), fitted(40)
    assert after > before + 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_pairs_after_the_usual_ones_do_not_change_what_is_usual():
    torch.manual_seed(0)
    alone, among = create_model("lite", members=1), create_model("lite", members=1)
    sources, targets = pairs()
    lite.fit(alone, sources[:16], targets[:16], 1)
    lite.fit(among, torch.cat([sources[:16], 0.2 * sources[16:]]), targets, 1, usual=16)
    assert torch.equal(alone.centre, among.centre) and torch.equal(alone.spread, among.spread)


def test_the_usual_ones_are_tilted_and_others_are_not():
    model, (sources, targets) = create_model("lite", members=1), pairs()
    sources[12:, 2] *= 0.7
    lite.fit(model, sources, targets, 1, usual=12)
    tilts = model.predict(sources).edit.tilt.flatten() / TILT
    assert tilts[:12].mean() > 0.8 and tilts[12:].mean() < 0.2 and 0 <= tilts.min() and tilts.max() <= 1


def test_members_are_fitted_beside_the_tilt():
    """Of rooms light above and dark below, edited by the recipe and the tilt, they have nothing to learn."""
    torch.manual_seed(0)
    sources = pairs()[0] * torch.linspace(1, 0.3, 128)[:, None]
    model = create_model("lite", members=1)
    lite.fit(model, sources, sources, 0)
    targets = model(sources).detach()
    assert model.predict(sources).edit.tilt.mean() > 0.8 * TILT
    lite.fit(model, sources, targets, 40)
    assert lite.psnr(model, sources, targets) > 55


def test_takes_differ_and_are_the_same_twice():
    sources, targets = lite.takes(3, count=2, height=32, width=48)
    assert sources.shape == targets.shape == (2, 128, 128, 3) and sources.dtype == np.uint8
    assert (sources[0] != sources[1]).any() and (targets[0] != targets[1]).any()
    assert all(np.array_equal(a, b) for a, b in zip((sources, targets), lite.takes(3, 2, 32, 48), strict=True))
    assert (lite.takes(3, 2, 32, 48, exterior=True)[1] != targets).any()
