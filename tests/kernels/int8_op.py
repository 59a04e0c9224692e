"""The tests that every op in 8 bits passes, as a base class; an op's own file adds its arguments, definition and refusals."""

import pytest
import torch
from calls import threads
from image_op import shifted


def int8_call(tests, shape):
    """Of a subclass of Int8OpTests, as calls.image_call."""
    tensors = tests.arguments(shape)
    given = [t for t in tensors if t is not None]

    def function(*leaves, backend="cpu"):
        leaves = iter(leaves)
        return tests.op([t if t is None else next(leaves) for t in tensors], backend=backend)

    return function, given, torch.randn_like(tensors[0])


class Int8OpTests:
    """A subclass sets ``name``, ``small`` (a shape) and ``second`` (of a shape, what stands between channels and height), and has
    ``arguments(shape) -> tensors`` and ``op(tensors, backend)``."""

    def image(self, batch, height, width):
        """The tensors for such an image of 8 channels."""
        return self.arguments((batch, 8, self.second, height, width, True))

    @pytest.mark.parametrize("layout", ["channels_last", "sliced", "shifted"])
    def test_noncontiguous(self, layout):
        tensors = self.image(2, 6, 5)
        x, expected = tensors[0], self.op(tensors, backend="cpu")
        if layout == "channels_last":
            tensors[0] = x.contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            tensors[0] = torch.cat([x, x], 3)[..., : x.shape[3]]
            tensors[3] = torch.stack([tensors[3], tensors[3]], -1)[..., 0]
        else:
            tensors[0] = shifted(x)
        assert torch.equal(self.op(tensors, backend="cpu"), expected)

    def test_threads(self):
        tensors = self.image(1, 33, 40)
        for count in (1, 2, 5):
            with threads(count):
                assert torch.equal(self.op(tensors, backend="cpu"), self.op(tensors, backend="cpu"))

    def test_a_nan_reaches_the_output(self):
        tensors = self.image(1, 7, 9)
        tensors[0][0, 3, 2, 4] = torch.nan
        for backend in ("cpu", "reference"):
            assert self.op(tensors, backend=backend)[0, 3, 2, 4].isnan()

    def test_has_no_gradient(self):
        tensors = self.arguments(self.small)
        y = self.op([tensors[0].requires_grad_(), *tensors[1:]], backend="cpu")
        with pytest.raises(RuntimeError, match=f"{self.name}: a derivative is not implemented"):
            y.sum().backward()
