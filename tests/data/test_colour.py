"""Colour spaces against lcms, as Pillow and imagecodecs have it."""

import struct

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import ImageCms

from autohdr.data.colour import ColourSpace, colour_space, is_damaged
from autohdr.metrics import srgb_to_lab

D65, D50 = (0.3127, 0.329), (0.3457, 0.3585)
SPACES = {
    "Adobe RGB": ((*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 2.19921875),
    "P3": ((*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), 2.2),
    "ProPhoto": ((*D50, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001), 1.8),
    "linear": ((*D65, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), 1.0),
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(name):
    corners, gamma = SPACES[name]
    primaries = [part for x, y in zip(corners[2::2], corners[3::2], strict=True) for part in (x, y, 1.0)]
    return imagecodecs.cms_profile("rgb", whitepoint=[*corners[:2], 1.0], primaries=primaries, gamma=gamma)


def by_lcms(pixels, one, other):
    return imagecodecs.cms_transform(pixels, one, other, colorspace="rgb", outcolorspace="rgb", outdtype=np.float32, intent=1)


def delta(a, b):
    """The largest ΔE76 of two sRGB images."""
    one, other = (srgb_to_lab(torch.from_numpy(x.clip(0, 1)).permute(2, 0, 1)[None].float()) for x in (a, b))
    return float((one - other).norm(dim=1).max())


def colours(count=40):
    return np.random.default_rng(0).random((count, count, 3)).astype(np.float32)


def table_profile():
    """A profile with tables in place of a matrix: of Lab, where the three are Lab's own."""
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    corners = b"".join(struct.pack(">3H", *(65280 * (i >> b & 1) for b in (2, 1, 0))) for i in range(8))
    inverse = b"".join(struct.pack(">3H", *(65535 * (i >> b & 1) for b in (2, 1, 0))) for i in range(8))
    line = struct.pack(">2H", 0, 65535) * 3
    tags = []
    for name, clut in ((b"A2B0", corners), (b"B2A0", inverse)):
        tags.append((name, b"mft2" + bytes(4) + bytes([3, 3, 2, 0]) + identity + struct.pack(">2H", 2, 2) + line + clut + line))
    tags.append((b"wtpt", b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)))
    places, data, at = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags:
        tag += bytes(-len(tag) % 4)
        places += name + struct.pack(">II", at + len(data), len(tag))
        data += tag
    head = struct.pack(">I4s4s4s4s4s", at + len(data), b"lcms", b"\x02\x40\0\0", b"mntr", b"RGB ", b"Lab ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + places + data


@pytest.mark.parametrize("name", SPACES)
def test_to_srgb_and_back_as_lcms_does(name):
    icc, pixels = profile(name), colours()
    space = colour_space(icc)
    seen = space.to_srgb(pixels)
    assert delta(seen, by_lcms(pixels, icc, SRGB)) < 0.3
    edited = (seen.clip(0, 1) * 0.9 + 0.05).astype(np.float32)
    inside = np.repeat(((seen > 0) & (seen < 1)).all(2, keepdims=True), 3, 2)
    back = space.edited(pixels, seen, edited)
    assert delta(np.where(inside, space.to_srgb(back), 0), np.where(inside, edited, 0)) < 0.1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("name", [*SPACES, "tables"])
def test_what_is_not_edited_stays_as_it_is_beyond_srgb_too(name, dtype):
    space = colour_space(table_profile() if name == "tables" else profile(name))
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = (colours() * white).astype(dtype)
    seen = space.to_srgb(pixels)
    assert name == "linear" or seen.min() < 0
    np.testing.assert_allclose(space.edited(pixels, seen, seen.clip(0, 1)) * white, pixels, atol=1e-6 * white)


def test_a_profile_of_tables_goes_through_lcms():
    icc, pixels = table_profile(), np.full((2, 2, 3), (0.5, 128 / 255, 128 / 255), np.float32)
    space = colour_space(icc)
    seen = space.to_srgb(pixels)
    assert np.ptp(seen) < 0.02 and abs(seen.mean() - 0.466) < 0.01  # L* of 50
    brighter = (seen + 0.1).astype(np.float32)
    assert delta(space.to_srgb(space.edited(pixels, seen, brighter)), brighter) < 0.5


def test_srgb_needs_no_conversion_and_a_damaged_profile_says_nothing():
    assert colour_space(SRGB) is colour_space(None) is colour_space(SRGB[:200]) is None
    assert colour_space(b"\0" * 16 + b"RGB " + bytes(200)) is None
    assert colour_space(None, {b"gAMA": struct.pack(">I", 45455)}) is None
    assert colour_space(None, {b"sRGB": b"\0", b"gAMA": struct.pack(">I", 100_000)}) is None


def test_a_curve_beyond_all_numbers_is_damage(recwarn):
    at = SRGB.index(b"para") + 12
    damaged = SRGB[:at] + struct.pack(">2i", 2**31 - 1, 2**31 - 1) + SRGB[at + 8 :]
    assert is_damaged(damaged) and colour_space(damaged) is None and not is_damaged(SRGB)
    assert not recwarn.list


def test_pngs_colour_chunks_mean_what_profiles_mean():
    chromaticities = struct.pack(">8I", *(round(100_000 * value) for value in SPACES["Adobe RGB"][0]))
    by_chunks = colour_space(None, {b"gAMA": struct.pack(">I", 100_000), b"cHRM": chromaticities}).to_srgb(colours())
    corners, _ = SPACES["Adobe RGB"]
    primaries = [part for x, y in zip(corners[2::2], corners[3::2], strict=True) for part in (x, y, 1.0)]
    linear = imagecodecs.cms_profile("rgb", whitepoint=[*D65, 1.0], primaries=primaries, gamma=1.0)
    assert delta(by_chunks, by_lcms(colours(), linear, SRGB)) < 0.3
    p3 = colour_space(SRGB, {b"cICP": bytes([12, 13, 0, 1])}).to_srgb(np.float32([[[1, 1, 1], [1, 0, 0], [0.5, 0.5, 0.5]]]))
    np.testing.assert_allclose(p3, [[[1, 1, 1], [1.0930, -0.2267, -0.1501], [0.5, 0.5, 0.5]]], atol=2e-3)


def test_white_of_pq_and_hlg_is_white():
    """203 cd/m² are 58 % of PQ's signal, and 75 % of HLG's (ITU-R BT.2408, table 1)."""
    for transfer, signal in ((16, 0.58), (18, 0.75)):
        space = colour_space(None, {b"cICP": bytes([9, transfer, 0, 1])})
        np.testing.assert_allclose(space.to_srgb(np.full((1, 1, 3), signal, np.float32)), 1, atol=0.01)


def test_linear_grey():
    """64 of 255 in linear light are 137 in sRGB."""
    space = colour_space(imagecodecs.cms_profile("gray", whitepoint=[*D65, 1.0], gamma=1.0))
    assert isinstance(space, ColourSpace)
    np.testing.assert_allclose(space.to_srgb(np.full((2, 2, 3), 64, np.uint8)) * 255, 137.2, atol=0.1)
