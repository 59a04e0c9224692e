"""Lite: an untrained one is the auto-tone; what it can predict; batches, samples and sizes."""

import functools

import numpy as np
import pytest
import torch

from autohdr.autotone import luma, pinning, thumbnail, walls_of
from autohdr.data.synthetic import photograph, render_scene
from autohdr.edits import (
    LOST,
    MOST_SHARED,
    SHARED,
    SHARES,
    SHIPPED,
    SURE,
    TILT,
    TRUST,
    ArrayLite,
    Edit,
    Prediction,
    edited_by,
    edited_walls,
    neutral,
    of_property,
    shared,
    shipped,
)
from autohdr.errors import UserError
from autohdr.kernels import apply_edit
from autohdr.metrics import delta_e2000, srgb_to_lab
from autohdr.models import create_model, load_checkpoint, save_weights
from autohdr.models.lite import Lite
from autohdr.train import lite


def photo(batch=1, height=40, width=56, seed=0):
    g = torch.Generator().manual_seed(seed)
    walls = torch.tensor([0.5, 0.45, 0.38])[:, None, None]
    x = walls * torch.linspace(0.3, 1, width) + 0.1 * torch.rand(batch, 3, height, width, generator=g)
    x[..., height // 2 :, :] *= 0.4
    return x


def trained(**settings):
    """One whose predictions are not zero."""
    torch.manual_seed(0)
    model = create_model("lite", **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(model.tilt.bias, 0.5)
    torch.nn.init.normal_(model.tilt.weight, std=0.01)
    return model


def test_an_untrained_one_is_the_auto_tone():
    x = photo(2)
    model = create_model("lite").eval()
    torch.testing.assert_close(model(x), apply_edit(x, *pinning(thumbnail(x))[:2]))
    assert sum(p.numel() for p in model.parameters()) < 300_000


def test_edits_are_as_apply_edit_takes_them():
    """Where they are not tilted, at half the height."""
    model, x = trained(members=2), photo(3, height=41)
    edit = model.predict(x).edit
    torch.testing.assert_close(model(x)[..., 20, :], apply_edit(x, *edit[:2])[..., 20, :])
    assert edit.tilt.min() > 0.01
    assert (edit.curves.diff(dim=2) >= 0).all()
    torch.testing.assert_close(edit.matrix[..., :3].sum(2), torch.ones(3, 3))  # grey stays grey
    torch.testing.assert_close(edit.curves[..., -1], torch.ones(3, 3))  # white stays white


def test_a_photo_in_a_batch_is_edited_as_alone():
    model, x = trained(), torch.cat([photo(seed=0), 0.5 * photo(seed=1)])
    for together, alone in zip(model(x), x, strict=True):
        torch.testing.assert_close(together, model(alone[None])[0], rtol=1e-4, atol=1e-5)


def test_the_edit_hardly_depends_on_the_size():
    model, x = trained(), photo(height=256, width=256)
    larger = x.repeat_interleave(8, 2).repeat_interleave(8, 3)
    for small, large in zip(model.predict(x).edit, model.predict(larger).edit, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_takes_samples(dtype):
    model, white = trained(), torch.iinfo(dtype).max
    samples = (photo() * white).round().to(dtype)
    edited = model(samples)
    assert edited.dtype == dtype
    difference = edited.double() - model(samples.float() / white).double().clamp(0, 1) * white
    assert difference.abs().max() <= 0.51 + white * 1e-5
    with pytest.raises(UserError, match="expected a floating-point image batch"):
        model(samples.to(torch.int32))


def test_the_edit_is_the_mean_of_the_members():
    model, x = trained(members=3), photo(2)
    inputs = model.inputs(x)
    for i, part in enumerate(model.predict(x).edit):
        torch.testing.assert_close(part, sum(model.edit(inputs, number, TRUST)[i] for number in range(3)) / 3)
    model(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_photos_stay_finite(value):
    assert trained()(torch.full((1, 3, 5, 7), value)).isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"members": 2, "width": 4}])
def test_checkpoints_tell_their_settings(settings, tmp_path):
    model = trained(**settings)
    save_weights(tmp_path / "a.safetensors", model, {})
    torch.save(model.state_dict(), tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        assert torch.equal(load_checkpoint(tmp_path / file)(photo()), model(photo()))


@pytest.mark.parametrize("settings", [{"members": 0}, {"width": 1.5}])
def test_refuses_settings(settings):
    with pytest.raises(UserError, match=f"lite: {next(iter(settings))} must be a whole number"):
        create_model("lite", **settings)


def test_a_finished_photo_stays_as_it_is():
    finished = photo() ** 0.2
    torch.testing.assert_close(trained()(finished), finished)


def test_far_from_what_it_was_fitted_to_it_changes_less():
    model, x = trained(), photo()
    inputs = model.inputs(x)
    model.spread.fill_(1), model.centre.copy_(inputs.features[0])
    assert model.predict(x).share == 1 and not model.distances(inputs).any()
    moves = []
    for far in (0, SURE, (SURE + LOST) / 2, LOST):
        model.centre[: 2 * len(SHARES)] = inputs.features[0, : 2 * len(SHARES)] + far * (20 / 18) ** 0.5  # 18 of 20 of light
        prediction = model.predict(x)
        torch.testing.assert_close(prediction.distances, torch.tensor([[float(far), 0]]))
        moves.append((model(x) - x).abs().mean().item())
        torch.testing.assert_close(prediction.share, torch.tensor([{LOST: 0.0, 7.5: 0.5}.get(far, 1.0)]), atol=1e-4, rtol=0)
    assert 0.3 * moves[1] < moves[2] < 0.7 * moves[1] and moves[3] < 1e-6


def pages():
    """What is no lit room, [3, 96, 128] each: a night with lamps, a page of text, a grey card, a red wall, black."""
    g = torch.Generator().manual_seed(0)
    night = 0.03 * torch.rand(3, 96, 128, generator=g)
    for top, left in torch.randint(0, 90, (6, 2), generator=g).tolist():
        night[:, top : top + 4, left : left + 4] = torch.tensor([1, 0.85, 0.5])[:, None, None]
    page = torch.full((3, 96, 128), 0.97)
    page[:, 8:88:4, 8:120:3] = 0.1
    red = torch.tensor([0.7, 0.15, 0.2])[:, None, None].expand(3, 96, 128)
    return {"night": night, "page": page, "grey": torch.full_like(page, 0.46), "red": red, "black": torch.zeros_like(page)}


def test_the_shipped_one_spoils_nothing_that_it_does_not_know(monkeypatch):
    model = load_checkpoint()
    for name, x in pages().items():
        y = model(x[None])[0]
        assert ((y > 0.98).all(0) & (x <= 0.98).all(0)).float().mean() < 0.01, name  # nothing turns white
        cast = [(z.mean((1, 2)) - z.mean()).abs().max() for z in (x, y)]
        assert cast[1] < cast[0] + 0.02, name
        with monkeypatch.context() as patch:
            patch.setattr(Lite, "share", lambda self, inputs: torch.ones(1))
            whole = (model(x[None])[0] - x).abs().mean()
        if name != "grey":  # which may be a wall
            assert (y - x).abs().mean() <= whole / 3, name


def test_the_shipped_one_knows_rooms_and_leaves_finished_photos():
    """Of two rooms that it was not fitted to."""
    made = [lite.takes(seed, 3, 48, 64) for seed in (31_000_000, 31_000_001)]
    sources, targets = (torch.from_numpy(np.concatenate(side)).permute(0, 3, 1, 2) / 255 for side in zip(*made, strict=True))
    model = load_checkpoint()
    prediction = model.predict(sources)
    assert (prediction.share == 1).all() and prediction.edit.tilt.mean() > 0.8 * TILT
    assert delta_e2000(model(targets).clamp(0, 1), targets).mean() < 2 < delta_e2000(model(sources).clamp(0, 1), sources).mean()


def test_the_shipped_one_knows_exteriors():
    """Of houses that it was not fitted to: it comes nearer to their edits than the auto-tone, which takes a sky for a wall."""
    made = [lite.takes(seed, 3, 48, 64, exterior=True) for seed in range(31_000_000, 31_000_004)]
    sources, targets = (torch.from_numpy(np.concatenate(side)).permute(0, 3, 1, 2) / 255 for side in zip(*made, strict=True))
    model, auto_tone = load_checkpoint(), create_model("lite")
    prediction = model.predict(sources)
    assert (prediction.share == 1).all() and prediction.edit.tilt.mean() < 0.2 * TILT
    assert lite.psnr(model, sources, targets) > lite.psnr(auto_tone, sources, targets) + 0.3


def test_the_shipped_one():
    model = load_checkpoint()
    assert SHIPPED.stat().st_size <= 1_000_000 and model.config.name == "lite" and model.metadata["trained_on"] == []
    dim = photo()
    assert model(dim).isfinite().all() and model(dim).mean() > dim.mean() + 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("size", [(41, 56), (130, 700), (1100, 64)], ids=str)
def test_the_shipped_one_predicts_the_same_of_arrays(dtype, size):
    """All that becomes of a photo, by the network and by its twin for arrays, and the same thumbnail to the bit."""
    white = torch.iinfo(dtype).max if dtype != torch.float32 else 1
    x = (photo(2, *size) * white).to(dtype).contiguous(memory_format=torch.channels_last)
    by_network, by_arrays = [model.predict(image) for model, image in ((load_checkpoint(), x), (shipped(), x.numpy()))]
    assert torch.equal(thumbnail(x), torch.from_numpy(thumbnail(x.numpy())))
    for one, other in zip([*by_network.edit, *by_network[1:]], [*by_arrays.edit, *by_arrays[1:]], strict=True):
        assert other.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(other), one, rtol=1e-5, atol=2e-6)
    assert by_network.needed.max() == 1
    look = torch.tensor([0.8, 0.7, 0.75])
    edits = [
        (neutral(prediction.edit), shared(prediction, colour), edited_walls(prediction))
        for prediction, colour in ((by_network, look), (by_arrays, look.numpy()))
    ]
    for one, other in zip(sum(edits[0], ()), sum(edits[1], ()), strict=True):
        torch.testing.assert_close(torch.from_numpy(other), one, rtol=1e-4, atol=1e-5)


def test_a_twin_for_arrays_of_any_lite():
    model, x = trained(members=2, width=3), photo()
    model.centre.normal_(generator=torch.Generator().manual_seed(1))
    model.spread.fill_(0.13)
    twin = ArrayLite({name: value.numpy() for name, value in model.state_dict().items()})
    prediction, of_twin = model.predict(x), twin.predict(x.numpy())
    assert prediction.share < 1
    for one, other in zip(prediction.edit, of_twin.edit, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), one.detach(), rtol=1e-4, atol=1e-5)


@functools.cache
def house():
    """Rooms of three properties, six of each."""
    return [[render_scene(31_500_000 + 6 * number + room, 48, 72) for room in range(6)] for number in range(3)]


@pytest.mark.parametrize("camera", ["of one setting", "of its own balance and exposure"])
def test_the_photos_of_a_property_come_nearer_to_one_another(camera):
    """By the weights that ship: the spread of the walls' a*b* and of lightness, of the walls and of whole photos."""
    model, spreads = load_checkpoint(), []
    for number, scenes in enumerate(house()):
        seeds = [number if "one" in camera else 10 * number + room for room in range(6)]
        made = [photograph(np.random.default_rng(seed), scene) for seed, scene in zip(seeds, scenes, strict=True)]
        photos = [torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 for pixels in made]
        predictions = [model.predict(each) for each in photos]
        look = of_property(predictions)
        assert look is not None
        for edits in ([each.edit for each in predictions], [shared(each, look) for each in predictions]):
            assert all((edit.curves.diff(dim=2) >= 0).all() for edit in edits)
            results = [edited_by(each, edit) for each, edit in zip(photos, edits, strict=True)]
            colours = torch.stack([torch.cat([walls_of(thumbnail(each))[0], each.mean((2, 3))]) for each in results])
            walls, whole = srgb_to_lab(colours.clamp(0, 1).permute(1, 2, 0)[..., None])[..., 0].transpose(1, 2)
            spreads.append(torch.stack([walls[:, 1:].var(0).sum().sqrt(), walls[:, 0].std(), whole[:, 0].std()]))
    without, together = torch.stack(spreads).view(-1, 2, 3).mean(0)
    assert (together < torch.tensor([0.7, 0.8, 0.97]) * without).all(), (without, together)


def of(walls, share=1.0, curves=None, tilt=0.0, up=0.0):
    """A prediction of an edit that does nothing but by its curves and its tilt, and of a wall [3] so high up."""
    curves = torch.linspace(0, 1, 33).expand(1, 3, 33) if curves is None else curves
    edit = Edit(curves, torch.eye(3, 4)[None], torch.full((1, 1, 1), tilt))
    return Prediction(edit, torch.tensor([share]), torch.zeros(1, 2), torch.ones(1), torch.tensor([walls]), torch.tensor([up]))


def test_walls_meet_those_of_their_property_part_of_the_way_and_within_bounds():
    grey = torch.tensor([0.8, 0.8, 0.8])
    for walls, part, expected in (
        ((0.78, 0.78, 0.78), 1.0, [0.78 + SHARED * 0.02] * 3),
        ((0.78, 0.78, 0.78), 0.5, [0.78 + 0.5 * SHARED * 0.02] * 3),
        ((0.4, 0.4, 0.4), 1.0, [0.4 + MOST_SHARED] * 3),
    ):
        prediction = of(walls, part)
        edit = shared(prediction, grey)
        torch.testing.assert_close(edited_walls(prediction._replace(edit=edit))[1][0], torch.tensor(expected), atol=2e-3, rtol=0)
        torch.testing.assert_close(edit.curves[..., [0, -1]], torch.tensor([0.0, 1]).expand(1, 3, 2))
    high, low = (of((0.78, 0.78, 0.78), tilt=0.25, up=up) for up in (0.4, -0.4))
    for prediction, own in ((high, 0.78 + 0.1 * 0.78 * 0.22), (low, 0.78 - 0.1 * 0.78 * 0.22)):
        torch.testing.assert_close(edited_walls(prediction)[1][0], torch.full((3,), own), atol=1e-4, rtol=0)
        made = edited_walls(prediction._replace(edit=shared(prediction, grey)))[1][0]
        torch.testing.assert_close(made, torch.full((3,), own + SHARED * (0.8 - own)), atol=2e-3, rtol=0)
    warm = of((0.9, 0.8, 0.5))
    own, made = (edited_walls(each)[1] for each in (warm, warm._replace(edit=shared(warm, grey))))
    tints = [(walls / luma(walls)[:, None]).log() for walls in (own, made)]
    assert MOST_SHARED * 0.9 < (tints[0] - tints[1]).abs().max() < MOST_SHARED * 1.2  # a curve bends between two knots


def test_the_look_of_a_property_is_the_median_of_what_its_photos_become():
    finished = of((0.9, 0.9, 0.9))._replace(needed=torch.zeros(1))
    walls = [(0.8, 0.7, 0.6), (0.8, 0.8, 0.8), (0.6, 0.6, 0.6)]
    look = of_property([*map(of, walls), finished, of((0.1, 0.1, 0.9), share=0.2)])
    assert look is not None and torch.equal((look * 255).round(), look * 255)
    torch.testing.assert_close(luma(look[None]), luma(torch.tensor([walls[0]])), atol=0.003, rtol=0)
    assert (look.max() - look.min()) < 0.003
    torch.testing.assert_close(shared(finished, look).curves, finished.edit.curves)
    assert of_property([of(walls[0]), finished]) is None


def test_a_neutral_edit_leaves_grey_grey_and_as_light_as_the_edit_does():
    model = trained()
    edit = model.predict(photo()).edit
    grey = torch.linspace(0, 1, 50).expand(1, 3, 1, 50)
    kept, usual = edited_by(grey, neutral(edit)), edited_by(grey, edit)
    torch.testing.assert_close(kept, kept[:, :1].expand_as(kept))
    assert (usual - usual[:, :1]).abs().max() > 0.01
    torch.testing.assert_close(luma(kept), luma(usual))
    tilted = edited_by(grey.expand(1, 3, 9, 50), neutral(edit))
    torch.testing.assert_close(tilted, tilted[:, :1].expand_as(tilted))


def unchanged(batch=1, tilt=0.0):
    """The edit that does nothing but tilt."""
    return Edit(
        torch.linspace(0, 1, 33).repeat(batch, 3, 1), torch.eye(3, 4).repeat(batch, 1, 1), torch.full((batch, 1, 1), tilt)
    )


@pytest.mark.parametrize("tilt", [0.25, -0.9])
def test_a_tilted_edit_lightens_towards_the_top_and_keeps_black_white_and_order(tilt):
    ramp = torch.linspace(0, 1, 101).expand(2, 3, 40, 101).contiguous()
    result = edited_by(ramp, unchanged(2, tilt))
    torch.testing.assert_close(result[..., [0, -1]], ramp[..., [0, -1]])
    assert (result.diff(dim=3) > 0).all()  # of two tones in a row
    assert (result[..., 1:-1].diff(dim=2) * tilt < 0).all()  # of one tone in two rows
    torch.testing.assert_close((result + result.flip(2)) / 2, ramp)
    expected = ramp[..., 0, :] * (1 + tilt * (1 - 1 / 40) * (1 - ramp[..., 0, :]))
    torch.testing.assert_close(result[..., 0, :], expected, atol=3e-4, rtol=0)  # between two knots


def test_a_pixel_is_tilted_by_its_place_alone():
    """So that there are no halos: what is beside it does not count."""
    edges = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0)).round()
    edges[..., 10:30] = 0.4
    result, flat = (edited_by(x, unchanged(tilt=0.3)) for x in (edges, torch.full((1, 3, 30, 40), 0.4)))
    assert torch.equal(result[..., 10:30], flat[..., 10:30])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (47, 31)], ids=str)
def test_tilted_edits_of_any_size_are_the_same_of_arrays_and_by_bands(size, dtype):
    edit, white = trained().predict(photo(2)).edit, torch.iinfo(dtype).max if dtype != torch.float32 else 1
    edit = Edit(*(part.detach() for part in edit))
    x = (photo(2, *size) * white).to(dtype)
    whole, arrays = edited_by(x, edit), Edit(*(part.numpy() for part in edit))
    assert whole.shape == x.shape and whole.dtype == dtype
    np.testing.assert_array_equal(edited_by(x.numpy(), arrays), whole.numpy())
    bands = [edited_by(x[:, :, first : first + 10], edit, first, size[0]) for first in range(0, size[0], 10)]
    np.testing.assert_array_equal(torch.cat(bands, 2).numpy(), whole.numpy())
    if size[0] == 1:
        torch.testing.assert_close(whole.float(), apply_edit(x, *edit[:2]).float())
