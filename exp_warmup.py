"""Weights warm-up: train on an easy task first, then switch to the hard one (claim 5; the paper's Fig. 5A).

    python exp_warmup.py                                          hardest task, laptop scale
    python exp_warmup.py --difficulty 10                          another target
    python exp_warmup.py --switch 0 100 500 --keep all early late what has to be kept of the warm-up?
    python exp_warmup.py --lr 5e-4 1e-3 2e-3                      every arm also at its own best learning rate

Before its switch step a run trains on --warmup-difficulty, after it on --difficulty; switch 0 is the baseline. Steps spent in
the warm-up count: every run has the same budget and is judged on the plain target task from step 0.
--keep asks what it is that transfers. At the switch the rest of the network goes back to its own initial weights:
  all     nothing is reset      early  read-in, positions, blocks up to the headline block are kept      late  all the others
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
    "laptop": dict(switch=[0, 500], difficulty=[math.inf], lr=[5e-4], embedding="code",
                   factors=(4, 4, 4, 4, 4, 1), ask=FACTORS[:3], code_width=32, code_gain=2.5, sequences=0, steps=2500, batch=48, pairs=12,
                   n_layer=3, n_head=2, d_model=64, evaluations=100, probes=5),
    "paper": dict(switch=[0, 1562, 3905, 7810], difficulty=[20000], lr=[1e-4], embedding="code",
                  factors=SIZES, ask=FACTORS, code_width=768, code_gain=2.5, sequences=100_000, steps=46860, batch=128, pairs=40,
                  n_layer=12, n_head=4, d_model=128, evaluations=240, probes=30),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser, exp = probes.script_parser(__file__, __doc__, SCALES)
    exp.add_argument("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, one or several; inf = always fresh")
    exp.add_argument("--warmup-difficulty", type=parse_difficulty, default=1.0, help="mappings in play before the switch (default 1)")
    exp.add_argument("--switch", type=int, nargs="+", help="steps at which to switch; 0 = baseline")
    exp.add_argument(
        "--keep", choices=("all", "early", "late"), nargs="+", default=["all"], help="what is kept at the switch (default all)"
    )
    exp.add_argument("--pairs", type=int, help="(image, label) pairs per sequence")
    exp.add_argument("--n-layer", type=int, help="blocks")
    exp.add_argument("--d-model", type=int, help="width")
    args = parser.parse_args()
    probes.check(args, SCALES[args.scale])
    for step in args.switch:
        if not 0 <= step < args.steps:
            raise UsageError(f"--switch {step}: must lie inside the budget, 0 .. {args.steps - 1} (--steps)")
    if args.warmup_difficulty >= min(args.difficulty):
        raise UsageError(f"--warmup-difficulty {args.warmup_difficulty:g}: must be easier than every --difficulty")
    return args


def runs_of(args: argparse.Namespace) -> list[dict]:
    return [dict(**arm, difficulty=m, lr=lr, seed=s) for m in args.difficulty for arm in arms(args) for lr in args.lr
            for s in range(args.seeds)]  # fmt: skip


def train(args: argparse.Namespace, runs: list[dict], checkpoint: str) -> dict:
    device, args.precision = pick_device(args.device, args.precision)
    world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, device)
    column = lambda key: [run[key] for run in runs]
    seed, target = torch.tensor(column("seed"), device=device), mappings(column("difficulty"), device)
    switch, easy = torch.tensor(column("switch"), device=device), mappings([args.warmup_difficulty], device)
    model = GPT(Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer,
                       n_head=args.n_head, d_model=args.d_model), column("seed")).to(device)  # fmt: skip
    optimizer = Adam(model, column("lr"))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = probes.Record(args, runs, world, model, optimizer, checkpoint)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.training_steps():
        if step in args.switch:
            reset(model, optimizer, initial, [r for r, run in enumerate(runs) if run["switch"] == step], column("keep"), record.block)
        m = torch.where(step < switch, easy, target)  # (r,): the warm-up
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with autocast(device, args.precision):
            logits = model(batch.x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    metrics = record.metrics(device)
    for run in metrics["runs"]:
        run["plateau_after_switch"] = None if run["censored"] else max(0, run["plateau_length"] - run["switch"])
    return metrics


def arms(args: argparse.Namespace) -> list[dict]:
    """Every switch step with every --keep; switch 0, whatever is kept, is the one baseline."""
    out = [dict(arm="baseline", switch=0, keep="all")] if 0 in args.switch else []
    return out + [dict(arm=f"switch {s}" + f", keep {k}" * (k != "all"), switch=s, keep=k) for k in args.keep for s in args.switch if s]


@torch.no_grad()
def reset(model, optimizer, initial: dict, switching: list[int], keep: list[str], last_early: int) -> None:
    """At their switch, runs that keep only a part get the initial weights, and a fresh Adam, in the other part."""
    for i, (name, p) in enumerate(model.named_parameters()):
        block = int(name.split(".")[1]) if name.startswith("blocks") else None
        part = "early" if name.startswith(("read_in", "position")) or (block is not None and block <= last_early) else "late"
        for run in switching:
            if keep[run] not in ("all", part):
                p[run] = initial[name][run]
                optimizer.forget(i, run)


# ---------------------------------------------------------------------------------------------- the picture


def plot(metrics: dict, path: Path) -> None:
    figure, f, colours = probes.draw_arms(metrics, "Weights warm-up")
    for axes in figure.axes[:2]:
        for switch in metrics["args"]["switch"]:
            axes.axvline(switch, color="grey", ls="--", lw=0.7)
    last, switches = metrics["runs"][-1]["difficulty"], sorted(metrics["args"]["switch"])
    if switches[-1]:
        figure.axes[0].text(switches[-1], figure.axes[0].get_ylim()[1], " until here: warm-up", va="top", fontsize=8)
    at_best = probes.at_best_rate(metrics, difficulty=last)
    here = lambda keep, switch: [
        run for run in at_best if run["switch"] == switch and (run["keep"] == keep if switch else run["arm"] == "baseline")
    ]
    groups = {f"keep {keep}": (colour, [here(keep, switch) for switch in switches])
              for keep, colour in zip(metrics["args"]["keep"], plt.cm.tab10.colors)}  # fmt: skip
    probes.draw_groups(f, switches, groups)
    f.plot(range(len(switches)), switches, "k:", lw=1, label="the warm-up itself")
    f.legend(fontsize=8, loc=(0.02, 0.22))
    f.set(title="(f) Against the switch point", xlabel="switch at step")
    probes.save_figure(path, figure)


def main() -> None:
    probes.command(arguments, runs_of, train, plot)


if __name__ == "__main__":
    main()
