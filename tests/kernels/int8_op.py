"""The tests that every op in 8 bits passes, as a base class; an op's own file adds its arguments, definition and refusals."""

import pytest
import torch
from calls import threads
from image_op import shifted


class Int8OpTests:
    """A subclass sets ``name``, ``op``, ``small`` (a shape) and ``second`` (of a shape, what stands between channels and height),
    and has ``arguments(shape, dtype) -> (tensors, dy, keywords)``."""

    def image(self, batch, height, width):
        """The tensors for such an image of 8 channels, and the op as a function of them and a backend."""
        return self.function_of((batch, 8, self.second, height, width, True))

    def function_of(self, shape):
        tensors, _, keywords = self.arguments(shape, torch.float32)
        return tensors, lambda backend: self.op(*tensors, **keywords, backend=backend)

    @pytest.mark.parametrize("layout", ["channels_last", "sliced", "shifted"])
    def test_noncontiguous(self, layout):
        tensors, run = self.image(2, 6, 5)
        x, expected = tensors[0], run("cpu")
        if layout == "channels_last":
            tensors[0] = x.contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            tensors[0] = torch.cat([x, x], 3)[..., : x.shape[3]]
            tensors[3] = torch.stack([tensors[3], tensors[3]], -1)[..., 0]
        else:
            tensors[0] = shifted(x)
        assert torch.equal(run("cpu"), expected)

    def test_threads(self):
        _, run = self.image(1, 33, 40)
        for count in (1, 2, 5):
            with threads(count):
                assert torch.equal(run("cpu"), run("cpu"))

    def test_a_nan_reaches_the_output(self):
        tensors, run = self.image(1, 7, 9)
        tensors[0][0, 3, 2, 4] = torch.nan
        for backend in ("cpu", "reference"):
            assert run(backend)[0, 3, 2, 4].isnan()

    def test_has_no_gradient(self):
        tensors, run = self.function_of(self.small)
        tensors[0].requires_grad_()
        y = run("cpu")
        with pytest.raises(RuntimeError, match=f"{self.name}: a derivative is not implemented"):
            y.sum().backward()
