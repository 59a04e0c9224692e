"""One op with autograd: a step of gradient descent through mdta, its output and gradients checked against the reference.

    python examples/op_with_autograd.py

backend="auto" takes the fastest kernels that can run here; the reference is plain PyTorch, and in float64 the definition.
"""

import argparse

import torch

from autohdr.kernels import backends, mdta

NAMES = ("x", "norm_weight", "norm_bias", "qkv_weight", "dwconv_weight", "temperature", "project_out_weight")


def inputs(channels: int, heads: int, side: int) -> list[torch.Tensor]:
    """x and the parameters of one attention block, at random, as leaves that collect gradients."""
    torch.manual_seed(0)
    tensors = [
        torch.rand(1, channels, side, side),
        torch.ones(channels),
        torch.zeros(channels),
        torch.randn(3 * channels, channels, 1, 1) / channels**0.5,
        torch.randn(3 * channels, 1, 3, 3) / 3,
        torch.ones(heads, 1, 1),
        torch.randn(channels, channels, 1, 1) / channels**0.5,
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def run(tensors: list[torch.Tensor], heads: int, target: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """The output, and the gradient of its mean squared distance to `target` with regard to each tensor."""
    out = mdta(*tensors, num_heads=heads, backend=backend)
    return [out.detach(), *torch.autograd.grad((out - target).square().mean(), tensors)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--side", type=int, default=128, help="height and width of x")
    args = parser.parse_args()

    for name, state in backends("mdta").items():
        print(f"{name:<10} {state}")

    tensors, target = inputs(args.channels, args.heads, args.side), torch.rand(1, args.channels, args.side, args.side)
    found = run(tensors, args.heads, target, "auto")
    exact = run([t.detach().double().requires_grad_() for t in tensors], args.heads, target.double(), "reference")

    print("\nlargest error, as a share of the largest value")
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    for name, error in zip(("output", *NAMES), errors, strict=True):
        print(f"{name:<20} {error:.1e}")
    print("right" if max(errors) < 1e-3 else "WRONG")

    out, _, *gradients = found
    with torch.no_grad():
        for parameter, gradient in zip(tensors[1:], gradients, strict=True):
            parameter -= gradient
    after = mdta(*tensors, num_heads=args.heads)
    print(f"loss {(out - target).square().mean():.4f}, after one step {(after - target).square().mean():.4f}")


if __name__ == "__main__":
    main()
