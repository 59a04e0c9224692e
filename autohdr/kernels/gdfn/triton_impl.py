"""gdfn in Triton; what it shares with mdta is in autohdr/kernels/image.

Forward, a step: norm and 1×1 (hidden), 3×3 and gate, 1×1 and residual. Backward, a step: hidden again, the gradient of the gate's
value, the 3×3 and the gradients of the gate's operands in one (d, and the gated values for project_out's gradient), and the
expansion's backward pass.
"""

import torch
from torch import Tensor

from autohdr.kernels.image.depthwise import convolve
from autohdr.kernels.image.expansion import Expansion, ExpansionBackward, Hidden
from autohdr.kernels.image.product import outer, product, slots_of
from autohdr.kernels.image.repack import Axis, Repack, round_up
from autohdr.kernels.image.steps import BACKWARD_BUDGET, FORWARD_BUDGET, Buffer, Steps
from autohdr.kernels.image.view import View


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Nothing is kept."""
    y = torch.empty_like(x)
    from_, to = View.of(x), View.of(y)
    repack = Repack()
    expansion = Expansion(from_, norm_weight, norm_bias, project_in_weight, dwconv_weight, 2, eps, repack)
    padded, hidden_axis = expansion.groups.padded, Axis.plain(*expansion.groups.axis[1:])
    weight = repack.make(project_out_weight.flatten(1), Axis.plain(x.shape[1]), hidden_axis, x.dtype)[None, None]
    repack.run()
    steps = Steps(from_, (expansion.channels + padded) * x.element_size(), 1, FORWARD_BUDGET)
    memory, gated = Hidden(expansion, steps, 1), Buffer(steps, padded, 0, x.dtype)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        own = gated.view(images, rows)
        convolve(hidden.at(rows), expansion.taps, own, gate="gelu")
        product(own, weight, to.at(rows, images), added=from_.at(rows, images), add="plain")
    return y, x.new_empty(0)


def backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    kept: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x)
    from_, back, to = View.of(x), View.of(dy), View.of(dx)
    repack = Repack()
    expansion = Expansion(from_, norm_weight, norm_bias, project_in_weight, dwconv_weight, 2, eps, repack)
    padded, (channels, hidden_size) = expansion.groups.padded, project_out_weight.shape[:2]
    hidden_axis, axis = Axis.plain(hidden_size, padded), Axis.plain(channels, round_up(channels))
    transposed = repack.make(project_out_weight.flatten(1).T, hidden_axis, axis, x.dtype)[None, None]
    steps = Steps(from_, (3 * expansion.channels + padded) * x.element_size() + 4 * channels, 2, BACKWARD_BUDGET)
    memory = Hidden(expansion, steps, 2)
    d_memory, gated_memory = Buffer(steps, expansion.channels, 1, x.dtype), Buffer(steps, padded, 1, x.dtype)
    expansion_backward = ExpansionBackward(expansion, project_in_weight, steps, repack)
    repack.run()
    slots = slots_of(channels, hidden_size, 1, steps.pixels)
    d_project_out = torch.zeros((slots, 1, channels, hidden_size), dtype=torch.float32, device=x.device)
    for images, rows in steps:
        near, (hidden, norm) = steps.around(rows, 1), memory.of(images, rows)
        d, gated = d_memory.view(images, near), gated_memory.view(images, near)
        product(back.at(near, images), transposed, d.channels(0, padded))
        convolve(hidden.at(near), expansion.taps, gated, gate="gelu", d=d)
        here = back.at(rows, images)
        outer(here, gated.at(rows), d_project_out)
        expansion_backward.step(from_.at(rows, images), here, to.at(rows, images), hidden, d, norm, images)
    gradients = expansion_backward.finish(repack)
    gradients.append(repack.add_up(d_project_out[:, 0], Axis.plain(channels), Axis.plain(hidden_size)))
    repack.run()
    parameters = norm_weight, norm_bias, project_in_weight, dwconv_weight, project_out_weight
    return dx, *(d if p is None else d.view_as(p) for d, p in zip(gradients, parameters, strict=True))
