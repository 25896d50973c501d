"""Mixed training: a part of every batch is an easy task (claim 6; the paper's Fig. 5B).

    python exp_mixture.py                                        hardest task, laptop scale
    python exp_mixture.py --difficulty 64 --fraction 0 0.5       another target
    python exp_mixture.py --mix easy unrelated                   is it the easy task, or any second task?
    python exp_mixture.py --n-layer 1 2 3 --fraction 0 0.5       smaller models with and without mixing
    python exp_mixture.py --lr 5e-4 1e-3 2e-3                    every arm also at its own best learning rate

A fraction of the sequences of every batch is drawn at --easy-difficulty, the rest at --difficulty; the batch stays the same size.
  easy       the same images and factors with few mappings
  unrelated  the easy task on another world: the same grid in a different, unrelated code. Task diversity without the weights
             component that the target needs (the explanation of Kim et al., arXiv 2410.05448)
All runs are judged on the plain target task, never on the mixture.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import probes
from model import GPT, Adam, Config, autocast, compile_blocks, pick_device
from tasks import FACTORS, SIZES, UsageError, mappings, parse_difficulty, sequence_numbers, shapes

SCALES = {  # defaults only: any flag overrides them
    "laptop": dict(fraction=[0, 0.5], difficulty=[math.inf], lr=[1e-3], embedding="code",
                   factors=(4, 4, 4, 4, 4, 1), ask=FACTORS[:3], code_width=32, code_gain=2.5, sequences=0, steps=2500, batch=48, pairs=12,
                   n_layer=[3], n_head=2, d_model=[64], evaluations=100, probes=5),
    "paper": dict(fraction=[0, 0.25, 0.5, 0.75], difficulty=[20000], lr=[1e-4], embedding="code",
                  factors=SIZES, ask=FACTORS, code_width=768, code_gain=2.5, sequences=100_000, steps=46860, batch=128, pairs=40,
                  n_layer=[12], n_head=4, d_model=[128], evaluations=240, probes=30),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser, exp = probes.script_parser(__file__, __doc__, SCALES)
    exp.add_argument("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, one or several; inf = always fresh")
    exp.add_argument("--easy-difficulty", type=parse_difficulty, default=1.0, help="mappings in play in the easy part (default 1)")
    exp.add_argument("--fraction", type=float, nargs="+", help="part of every batch that is easy; 0 = baseline")
    exp.add_argument("--mix", choices=("easy", "unrelated"), nargs="+", default=["easy"], help="what is mixed in (default easy)")
    exp.add_argument("--pairs", type=int, help="(image, label) pairs per sequence")
    exp.add_argument("--n-layer", type=int, nargs="+", help="blocks; several = one program each")
    exp.add_argument("--d-model", type=int, nargs="+", help="width; several = one program each")
    args = parser.parse_args()
    probes.check(args, SCALES[args.scale])
    if args.easy_difficulty >= min(args.difficulty):
        raise UsageError(f"--easy-difficulty {args.easy_difficulty:g}: must be easier than every --difficulty")
    return args


def runs_of(args: argparse.Namespace) -> list[dict]:
    """Width and depth cannot differ inside one program: one each."""
    return [dict(**arm, size=f"{n_layer} x {d_model}", difficulty=m, lr=lr, seed=s) for n_layer in args.n_layer for d_model in args.d_model
            for m in args.difficulty for arm in arms(args) for lr in args.lr for s in range(args.seeds)]  # fmt: skip


def train(args: argparse.Namespace, runs: list[dict], checkpoint: str) -> dict:
    device, args.precision = pick_device(args.device, args.precision)
    n_layer, d_model = map(int, runs[0]["size"].split(" x "))
    world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, device)
    foreign = None
    if "unrelated" in args.mix:
        foreign = shapes(args.factors, args.ask, "code", world.table.shape[1], args.code_gain, device, code_seed=1)
    column = lambda key: [run[key] for run in runs]
    seed, target = torch.tensor(column("seed"), device=device), mappings(column("difficulty"), device)
    easy = mappings([args.easy_difficulty], device)
    mixed = easy_rows(column("fraction"), args.batch).to(device)
    unrelated = torch.tensor([run["mix"] == "unrelated" for run in runs], device=device)[:, None]
    model = GPT(Config(**world.inputs, n_pair=args.pairs, n_layer=n_layer,
                       n_head=args.n_head, d_model=d_model), column("seed")).to(device)  # fmt: skip
    optimizer = Adam(model, column("lr"))
    record = probes.Record(args, runs, world, model, optimizer, checkpoint)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.training_steps():
        m = torch.where(mixed, easy, target[:, None])  # (r, b): the mixture
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        x = torch.where((mixed & unrelated)[..., None, None], foreign.table[batch.item], batch.x) if foreign else batch.x
        with autocast(device, args.precision):
            logits = model(x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()
    return record.metrics(device)


def easy_rows(fractions: list[float], batch: int) -> torch.Tensor:
    """Which sequences of a batch are easy, (r, batch): the first ones, exactly the stated fraction."""
    return torch.arange(batch) < torch.tensor([round(f * batch) for f in fractions])[:, None]


def arms(args: argparse.Namespace) -> list[dict]:
    """Every fraction with every --mix; fraction 0 is the one baseline."""
    out = [dict(arm="baseline", fraction=0.0, mix="easy")] if 0 in args.fraction else []
    return out + [dict(arm=f"{100 * f:g}% {mix}", fraction=f, mix=mix) for mix in args.mix for f in args.fraction if f]


# ---------------------------------------------------------------------------------------------- the picture


def plot(metrics: dict, path: Path) -> None:
    figure, f, colours = probes.draw_arms(metrics, "Mixed training")
    args, at_best = metrics["args"], probes.at_best_rate(metrics, difficulty=metrics["runs"][-1]["difficulty"])
    sizes = list(dict.fromkeys(run["size"] for run in at_best))
    if len(sizes) > 1:
        here = lambda arm, size: [run for run in at_best if (run["arm"], run["size"]) == (arm, size)]
        probes.draw_groups(f, sizes, {arm: (colour, [here(arm, size) for size in sizes]) for arm, colour in colours.items()})
        f.set(title="(f) Against the size of the model", xlabel="blocks x width")
    else:
        here = lambda mix, fraction: [
            run for run in at_best if run["fraction"] == fraction and (run["mix"] == mix if fraction else run["arm"] == "baseline")
        ]
        fractions = sorted(args["fraction"])
        groups = {f"mixed with {mix}": (colour, [here(mix, fraction) for fraction in fractions])
                  for mix, colour in zip(args["mix"], plt.cm.tab10.colors)}  # fmt: skip
        probes.draw_groups(f, fractions, groups)
        f.set(title="(f) Against the mixture", xlabel="fraction of the batch")
    f.legend(fontsize=8)
    probes.save_figure(path, figure)


def main() -> None:
    probes.command(arguments, runs_of, train, plot)


if __name__ == "__main__":
    main()
