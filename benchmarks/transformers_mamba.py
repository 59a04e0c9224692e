"""transformers' Mamba by its own formulas and on autohdr.kernels.compat: tokens a second of both, best of some rounds.

python benchmarks/transformers_mamba.py runs each path in a process of its own, in turn, with random weights: reading a prompt,
decoding one token at a time, and a training step. transformers is not among autohdr's dependencies: pip install transformers.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

PATHS = ("transformers", "autohdr")
WORK = ("prompt", "decoding", "training")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each kind of work, in this process."""
    if args.path == "autohdr":
        from autohdr.kernels import compat

        compat.take_over()
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, hidden_size=args.hidden, num_hidden_layers=args.layers)
    model = MambaForCausalLM(config).to(args.device)
    prompt = torch.randint(1000, (args.batch, args.prompt), device=args.device)

    def seconds(function) -> float:
        function()
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def generate(count: int):
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    with torch.no_grad():
        model.eval()
        reading = seconds(lambda: model(prompt))
        decoding = seconds(lambda: generate(args.tokens + 1)) - seconds(lambda: generate(1))
    model.train()
    training = seconds(lambda: model(prompt, labels=prompt).loss.backward())
    read = args.batch * args.prompt
    return dict(zip(WORK, (read / reading, args.batch * args.tokens / decoding, read / training), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 256, "layers": 4, "batch": 2, "prompt": 512, "tokens": 64, "rounds": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--path", choices=PATHS, help="of this process alone, which prints JSON")
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(args)))
        return
    best = {path: dict.fromkeys(WORK, 0.0) for path in PATHS}
    for _ in range(args.rounds):
        for path in PATHS:
            command = [sys.executable, *sys.argv, "--path", path]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            best[path] = {work: max(best[path][work], found[work]) for work in WORK}
    print(f"{'tokens a second':16}" + "".join(f"{work:>12}" for work in WORK))
    for path in PATHS:
        print(f"{path:16}" + "".join(f"{best[path][work]:12.0f}" for work in WORK))


if __name__ == "__main__":
    main()
