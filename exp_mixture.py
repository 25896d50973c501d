"""Mixed training: a part of every batch is an easy task (claim 6; the paper's Fig. 5B).

    python exp_mixture.py                                     hardest task, laptop scale
    python exp_mixture.py --fraction 0 0.25 0.5 0.75          how much of it?
    python exp_mixture.py --mix easy unrelated                is it the easy task, or any second task?

A fraction of the sequences of every batch is drawn at --easy-difficulty, the rest at --difficulty; the batch keeps its
size.
  easy       the same images and factors with few mappings
  unrelated  the easy task on another world, the same grid in an unrelated code: task diversity without the weights
             component that the target needs (the explanation of Kim et al., arXiv 2410.05448)
All runs are judged on the plain target task, never on the mixture. Writes metrics.json, figure.png and checkpoint.pt.
"""

import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import torch

import probes
from model import GPT, Adam, Config, compile_blocks, pick_device
from tasks import FACTORS, SIZES, mapping_counts, parse_difficulty, sequence_numbers, shapes

DEFAULTS = {
    "laptop": dict(difficulty=[math.inf],
                   lr=[5e-4], steps=2000, batch=48, pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=80, probes=4,
                   embedding="code", code_width=32, code_gain=2.5, code_seed=0, factors=[4, 4, 4, 4, 4, 1],
                   ask=["floor_hue", "wall_hue"], sequences=0),
    "paper": dict(difficulty=[20000],
                  lr=[1e-4], steps=46860, batch=128, pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240,
                  probes=30, embedding="vae", code_width=768, code_gain=2.5, code_seed=0, factors=list(SIZES),
                  ask=list(FACTORS), sequences=100_000),
}  # fmt: skip


def parse_args():
    parser = probes.flags(__doc__, DEFAULTS)
    add, between = parser.add_argument, probes.between
    add("--fraction", type=between(0, 1, float), nargs="+", default=[0.0, 0.5], help="easy part; 0 = baseline")
    add("--mix", choices=("easy", "unrelated"), nargs="+", default=["easy"], help="what is mixed in")
    add("--easy-difficulty", type=parse_difficulty, default=1.0, help="mappings in play in the easy part")
    add("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, inf = always fresh")
    add("--sequences", type=between(0, 1e8), help="size of the training set, 0 = always fresh sequences")
    args = probes.checked(parser)
    for fraction in args.fraction:
        if not math.isclose(fraction * args.batch, round(fraction * args.batch)):
            parser.error(f"--fraction {fraction:g}: must be a whole number of the {args.batch} sequences of a --batch")
    if args.easy_difficulty >= args.difficulty[0]:
        parser.error(f"--easy-difficulty {args.easy_difficulty:g}: must be easier than every --difficulty")
    return args


def main():
    args = parse_args()
    if args.replot:
        return probes.replot(args, plot)
    device, args.precision = pick_device(args.device, args.precision)
    arms = [dict(arm="baseline", fraction=0.0, mix="easy")] if 0 in args.fraction else []
    arms += [dict(arm=f"{100 * f:g}% {mix}", fraction=f, mix=mix) for mix in args.mix for f in args.fraction if f]
    runs = probes.share([dict(**arm, difficulty=m, lr=lr, seed=seed) for m in args.difficulty for arm in arms
                         for lr in args.lr for seed in args.seeds])  # fmt: skip
    world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, args.code_seed, device)
    foreign, width = world.table, world.table.shape[1]
    if "unrelated" in args.mix:
        foreign = shapes(args.factors, args.ask, "code", width, args.code_gain, args.code_seed + 1, device).table
    seeds = [run["seed"] for run in runs]
    seed, target = torch.tensor(seeds, device=device), mapping_counts([run["difficulty"] for run in runs], device)
    rows = torch.tensor([round(run["fraction"] * args.batch) for run in runs])
    mixed = (torch.arange(args.batch) < rows[:, None]).to(device)  # (r, b): the first sequences of a batch are easy
    unrelated = torch.tensor([run["mix"] == "unrelated" for run in runs], device=device)[:, None]
    easy = mapping_counts([args.easy_difficulty], device)
    config = Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model)
    model = GPT(config, seeds).to(device)
    optimizer = Adam(model, [run["lr"] for run in runs])
    record = probes.Record(args, runs, world, model, optimizer)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.steps():  # in between it measures, prints and saves
        m = torch.where(mixed, easy, target[:, None])  # (r, b): the mixture
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        x = torch.where((mixed & unrelated)[..., None, None], foreign[batch.item], batch.x)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    plot(record.finish(), args.out)


def plot(metrics: dict, out: str) -> None:
    figure, d, groups = probes.draw(metrics)
    for run, dot in probes.dots(groups):
        d.plot(run["fraction"], probes.at_least(metrics, run) * (1 - run["fraction"]), **dot)
    d.set(title="(d) The same in batches of the target task alone", xlabel="part of the batch that is mixed in",
          ylabel="plateau length x part that is the target task", ylim=0)  # fmt: skip
    figure.savefig(f"{out}/figure.png")


if __name__ == "__main__":
    probes.run(main)
