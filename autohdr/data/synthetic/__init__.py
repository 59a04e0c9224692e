"""Procedural before/after pairs: rooms and exteriors ray-cast in linear light, photographed by a camera, finished by an editor.

Three stages. `render_scene`: a seed makes a room (walls, openings, furniture, lamps, a view outside) or a house from its street,
and either one linear picture of high dynamic range, which takes most of the time and can be kept on disk. `photograph` and
`edit`: two hands develop that picture, as a camera would and as a retoucher would; another random generator, another photo or
edit of the same scene.
look.py has the numbers that both are brought to, and `statistics`, by which rooms are compared with real pairs.

Coordinates are metres, x to the right, y away from the camera, z up. Points and directions are (3, N) float32 arrays. All
work on pixels is elementwise, without BLAS, so that the bits don't depend on the number of threads or workers.
"""

from autohdr.data.synthetic.camera import photograph
from autohdr.data.synthetic.editor import edit
from autohdr.data.synthetic.look import statistics
from autohdr.data.synthetic.pairs import Degraded, degrade, render_pair, synthesize
from autohdr.data.synthetic.scene import Scene, render_scene

__all__ = [
    "Degraded",
    "Scene",
    "degrade",
    "edit",
    "photograph",
    "render_pair",
    "render_scene",
    "statistics",
    "synthesize",
]
