"""Procedural before/after pairs: rooms ray-cast in linear light, photographed by a camera, finished by an editor.

A seed makes a room (walls, openings, furniture, lamps, a view outside), the room makes one linear picture of high dynamic
range, and two hands develop that picture: `photograph` as a camera would, `edit` as a retoucher would. No file is read.

Coordinates are metres, x to the right, y away from the camera, z up. Points and directions are (3, N) float32 arrays. All
work on pixels is elementwise, without BLAS, so that the bits don't depend on the number of threads or workers.
"""

from autohdr.data.synthetic.pairs import render_pair, synthesize

__all__ = ["render_pair", "synthesize"]
