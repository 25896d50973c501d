"""Weights warm-up: train on an easy task first, then switch to the hard one (claim 5; the paper's Fig. 5A).

    python exp_warmup.py                                      hardest task, laptop scale
    python exp_warmup.py --difficulty 10                      another target
    python exp_warmup.py --switch 0 100 300 1000 --seeds 10   when to switch?

Before its switch step a run trains on --warmup-difficulty, after it on --difficulty; switch 0 is the baseline. Steps of
the warm-up count: every run has the same budget and is judged on the plain target task from step 0.
Writes metrics.json, figure.png and checkpoint.pt to --out.
"""

import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import torch

import probes
from model import GPT, Adam, Config, compile_blocks, pick_device
from tasks import FACTORS, SIZES, mapping_counts, parse_difficulty, sequence_numbers, shapes

DEFAULTS = {
    "laptop": dict(difficulty=[math.inf], switch=[0, 300],
                   lr=[5e-4], steps=2000, batch=48, pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=80, probes=4,
                   embedding="code", code_width=32, code_gain=2.5, code_seed=0, factors=[4, 4, 4, 4, 4, 1],
                   ask=["floor_hue", "wall_hue"], sequences=0),
    "paper": dict(difficulty=[20000], switch=[0, 1562, 3905, 7810],
                  lr=[1e-4], steps=46860, batch=128, pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240,
                  probes=30, embedding="vae", code_width=768, code_gain=2.5, code_seed=0, factors=list(SIZES),
                  ask=list(FACTORS), sequences=100_000),
}  # fmt: skip


def parse_args():
    parser = probes.flags(__doc__, DEFAULTS)
    add, between = parser.add_argument, probes.between
    add("--switch", type=between(0, 1e8), nargs="+", help="steps at which to switch; 0 = baseline")
    add("--warmup-difficulty", type=parse_difficulty, default=1.0, help="mappings in play before that")
    add("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, inf = always fresh")
    add("--sequences", type=between(0, 1e8), help="size of the training set, 0 = always fresh sequences")
    args = probes.checked(parser)
    if max(args.switch) >= args.steps:
        parser.error(f"--switch {max(args.switch)}: must lie inside the budget, 0 .. {args.steps - 1} (--steps)")
    if max(args.switch) and args.warmup_difficulty >= args.difficulty[0]:
        parser.error(f"--warmup-difficulty {args.warmup_difficulty:g}: must be easier than every --difficulty")
    return args


def main():
    args = parse_args()
    if args.replot:
        return probes.replot(args, plot)
    device, args.precision = pick_device(args.device, args.precision)
    arms = [dict(arm=f"switch {s}" if s else "baseline", switch=s) for s in args.switch]
    runs = probes.share([dict(**arm, difficulty=m, lr=lr, seed=seed) for m in args.difficulty for arm in arms
                         for lr in args.lr for seed in args.seeds])  # fmt: skip
    world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, args.code_seed, device)
    seeds = [run["seed"] for run in runs]
    seed, target = torch.tensor(seeds, device=device), mapping_counts([run["difficulty"] for run in runs], device)
    switch = torch.tensor([run["switch"] for run in runs], device=device)
    easy = mapping_counts([args.warmup_difficulty], device)
    config = Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model)
    model = GPT(config, seeds).to(device)
    optimizer = Adam(model, [run["lr"] for run in runs])
    record = probes.Record(args, runs, world, model, optimizer)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.steps():  # in between it measures, prints and saves
        m = torch.where(step < switch, easy, target)  # (r,): the warm-up, and all there is to it
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(batch.x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    plot(record.finish(), args.out)


def plot(metrics: dict, out: str) -> None:
    figure, d, groups = probes.draw(metrics)
    for run, dot in probes.dots(groups):
        d.plot(run["switch"], probes.at_least(metrics, run) - run["switch"], **dot)
    d.axhline(0, color="grey", lw=1)
    d.set(title="(d) Steps on the target task itself", xlabel="switch at step (open: still on the plateau at the end)",
          ylabel="plateau length after it")  # fmt: skip
    figure.savefig(f"{out}/figure.png")


if __name__ == "__main__":
    probes.run(main)
