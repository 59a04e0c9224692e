"""What made MambaDiffusion explode, each cause switched back on by itself: python benchmarks/stability.py [--model NAME] ...

Seventy-two blocks as at full size, narrow and on small pictures by default; --model mamba_diffusion_large --size 384 --steps 300
--device cuda is the full-size drill. The learning rate is the original 2e-4, without warm-up and without clipping. Prints one row
for each construction and precision: how far the residual stream has grown at the bottom of the network, the norm of the first
step's gradient, the loss at the start and the end, and the first step that was not finite. Exits 1 if our own construction fails.
"""

import argparse
import math
import platform
import sys

import torch
from torch import nn

from autohdr.models import create_model
from autohdr.models.mamba_diffusion import GAMMA

LR = 2e-4


def scales_at_one(model: nn.Module) -> None:
    """Every block adds all of its output to the residual stream, as a plain residual network does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1].startswith("gamma"):
                parameter.fill_(1.0)
        for group in (*model.encoder_groups, *model.middle, *model.decoder_groups):
            for parameter in group.conv.parameters():
                parameter.div_(GAMMA)
        for parameter in model.conv_last[-1].parameters():
            parameter.div_(GAMMA)


def default_delta(model: nn.Module) -> None:
    """The step size's bias as nn.Linear draws it: Δ is then about 0.7, so that a state forgets within a token or two."""
    for name, module in model.named_modules():
        if name.endswith("dt_proj"):
            module.reset_parameters()


VARIANTS = {
    "ours": (),
    "learned scales at 1": (scales_at_one,),
    "Δ as nn.Linear draws it": (default_delta,),
    "both": (scales_at_one, default_delta),
}


def drill(options: argparse.Namespace, variant: str, precision: str) -> dict:
    torch.manual_seed(0)
    model = create_model(options.model, **({"dim": options.dim} if options.dim else {}))
    for change in VARIANTS[variant]:
        change(model)
    model.to(options.device, memory_format=torch.channels_last)
    source = 0.6 * torch.rand(1, 3, options.size // 4, options.size // 4)
    source = nn.functional.interpolate(source, size=options.size, mode="bicubic").clamp(0, 1).to(options.device)
    target = source.sqrt()
    stream = []
    handles = [model.encoder_groups[0].register_forward_pre_hook(lambda _, args: stream.append(args[0].float().std().item()))]
    handles.append(model.middle[0].register_forward_hook(lambda _, args, out: stream.append(out.float().std().item())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    scaler = torch.amp.GradScaler(options.device, enabled=precision == "float16")
    row = {"construction": variant, "precision": precision, "parameters": sum(p.numel() for p in model.parameters())}
    for step in range(options.steps):
        with torch.autocast(options.device, getattr(torch, precision), enabled=precision != "float32"):
            output = model(source)
        loss = (output.float() - target).abs().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        if step == 0:
            for handle in handles:
                handle.remove()
            row |= {"growth": stream[1] / stream[0], "gradient": norm, "loss": loss.item()}
        # An infinite gradient in float16 may be the scale's fault, and is skipped; a loss that is no number is the network's.
        if not math.isfinite(loss.item()) or (not scaler.is_enabled() and not math.isfinite(norm)):
            return row | {"end": float("nan"), "failed": step + 1}
        scaler.step(optimizer)
        scaler.update()
    return row | {"end": loss.item(), "failed": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba_diffusion_large")
    parser.add_argument("--dim", type=int, default=8, help="width; 0: the model's own")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    print("| construction | precision | growth | gradient norm | first loss | last loss | first step not finite |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for variant in options.variants:
        for precision in options.precisions:
            r = drill(options, variant, precision)
            failed |= variant == "ours" and (r["failed"] is not None or r["end"] >= r["loss"])
            print(
                f"| {variant} | {precision} | {r['growth']:.3g}× | {r['gradient']:.3g} | {r['loss']:.3g} | {r['end']:.3g} | "
                f"{r['failed'] or 'none'} |",
                flush=True,
            )
    print(
        f"\n{options.model}, dim {options.dim or 'own'}, {r['parameters']:,} parameters, {options.size}×{options.size}, ", end=""
    )
    print(f"{options.steps} steps, {options.device}, torch {torch.__version__}, {platform.machine()}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
