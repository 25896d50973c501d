"""Extra losses on the plateau (claim 7; the paper's Fig. 5C), controls, and two of our own without labels.

    python exp_aux_loss.py                                            hardest task, laptop scale
    python exp_aux_loss.py --loss none weights:0.1 weights:1 norm     a weight after the colon
    python exp_aux_loss.py --loss none weights norm weights+norm      losses added up
    python exp_aux_loss.py --embedding onehot                         for an oracle, its weights component perfect
    python exp_aux_loss.py --start 1000                               only from this step on, when runs are stuck
    python exp_aux_loss.py --task linear                              linear regression (claim 8)

Total loss = label loss + weight x extra loss, which is read from the last block (--read-block), with context visible,
all but alike, cosine and norm behind the model's final LayerNorm, and trains all blocks up to there (--stop-block):
  weights   all factor values (--read-factors) of x_i at x_i: cross-entropy, mean over factors
  previous  the values of x_(i-1) instead          labels    the values of x_i, read at its label
  shuffled  the values of another, fixed image: as many outputs, but only memorising the pairs helps
  context   which factor the sequence asks for, at every x
  alike     mean squared cosine between the states of two x (probes.alike); knows nothing of factors, needs no labels
  cosine    mean cosine of the states of two x (probes.cosine), how far they share one direction; needs no labels
  norm      mean square of the residual stream after each block up to there; needs no labels
In regression: weights = x_i itself (squared error / d), context = the hidden w, shuffled = the x_i of another sequence.
Cheap explanations, as further arms: decay (decoupled weight decay), clip (gradient norm), epsilon (Adam's), ramp (steps
over which the rate rises), anneal (1: the rate falls to 0 by the end), input (times the initial size of the read-in).
Arms of one seed start from the same weights and see the same batches; all are judged on the plain target task.
"""

import argparse
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import torch

import probes
from model import GPT, Adam, Config, Linear, compile_blocks, pick_device
from tasks import FACTORS, SIZES, Regression, mapping_counts, parse_difficulty, sequence_numbers, shapes

LOSSES = dict(weights=0.3, previous=0.3, labels=0.3, shuffled=0.3, context=0.3, alike=1.0, cosine=1.0, norm=0.01)
WEIGHTS = LOSSES | dict(decay=1.0, clip=0.2, epsilon=1e-4, ramp=500.0, anneal=1.0, input=3.0)  # defaults
DEFAULTS = {
    "laptop": dict(difficulty=[math.inf],
                   lr=[5e-4], steps=1200, batch=48, pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=48, probes=4,
                   embedding="code", code_width=32, code_gain=2.5, code_seed=0, factors=[4, 4, 4, 4, 4, 1],
                   ask=["floor_hue", "wall_hue"], sequences=0),
    "paper": dict(difficulty=[20000],
                  lr=[1e-4], steps=46860, batch=128, pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240,
                  probes=30, embedding="vae", code_width=768, code_gain=2.5, code_seed=0, factors=list(SIZES),
                  ask=list(FACTORS), sequences=100_000),
}  # fmt: skip
LINEAR = {
    "laptop": dict(difficulty=[2, 4], lr=[1e-3], steps=2000, batch=32, pairs=9, n_layer=3, n_head=2, d_model=32,
                   evaluations=80, probes=5, sequences=0),
    "paper": dict(difficulty=[5, 10, 20, 30, 40, 50], lr=[1e-4], steps=200_000, batch=64, pairs=101, n_layer=12,
                  n_head=4, d_model=128, evaluations=400, probes=20, sequences=0),
}  # fmt: skip


def parse_args():
    linear = probes.early("--task", "shapes") == "linear"
    parser = probes.flags(__doc__, LINEAR if linear else DEFAULTS, images=not linear)
    add, between = parser.add_argument, probes.between
    add("--task", choices=("shapes", "linear"), default="shapes", help="images, or linear regression")
    add("--loss", type=loss_arm, nargs="+", default=["baseline", "weights:0.3"],
        help=f"arms: none, {', '.join(WEIGHTS)}; weights:0.3 sets a weight, weights+norm adds up")  # fmt: skip
    add("--read-block", type=between(0, 1000), default=0, help="block after which extra losses are read, 0 = the last")
    add("--stop-block", type=between(0, 1000), default=0, help="extra losses (not norm) train only later blocks")
    add("--start", type=between(0, 1e8), default=0, help="step from which extra losses count: do they free stuck runs?")
    difficulty = between(1, 64) if linear else parse_difficulty
    add("--difficulty", type=difficulty, nargs="+", help="mappings in play, inf = always fresh; linear: d")
    add("--sequences", type=between(0, 1e8), help="size of the training set, 0 = always fresh sequences")
    if not linear:
        add("--read-factors", choices=FACTORS, nargs="+", help="factors that extra losses read; default all that vary")
    args = probes.checked(parser)
    if not linear and len(args.ask) == 1 and any("context" in text for text in args.loss):
        parser.error("--ask: with one asked factor the context loss has nothing to read; ask two or leave it out")
    args.read_block = args.read_block or args.n_layer
    for name, most in ("read_block", args.n_layer), ("stop_block", args.read_block), ("start", args.steps - 1):
        if vars(args)[name] > most:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]}: give at most {most}")
    if not linear and any(args.factors[FACTORS.index(name)] == 1 for name in args.read_factors or ()):
        parser.error("--read-factors: a factor of one value has nothing to read")
    return args


def loss_arm(text: str) -> str:
    """`weights+norm:0.1` -> `weights:0.3+norm:0.1`, every weight spelled out; `none` is the baseline."""
    parts = {}
    for part in text.split("+") if text not in ("none", "baseline") else []:
        name, colon, weight = part.partition(":")
        if name not in WEIGHTS or name in parts:
            raise argparse.ArgumentTypeError(f"{part!r} must be one of {', '.join(WEIGHTS)}, each once; or none alone")
        parts[name] = probes.between(1e-9, 1e5, float)(weight) if colon else WEIGHTS[name]
    if len(parts.keys() & {"weights", "previous", "labels", "shuffled"}) > 1:
        raise argparse.ArgumentTypeError(f"{text}: weights, previous, labels, shuffled share one read-out; give one")
    return "+".join(f"{name}:{weight:g}" for name, weight in parts.items()) or "baseline"


def main():
    args = parse_args()
    if args.replot:
        return probes.replot(args, plot)
    device, args.precision = pick_device(args.device, args.precision)
    runs = probes.share([dict(arm=arm, difficulty=m, lr=lr, seed=seed) for m in args.difficulty for arm in args.loss
                         for lr in args.lr for seed in args.seeds])  # fmt: skip
    extra = [dict(part.split(":") for part in run["arm"].split("+") if part != "baseline") for run in runs]
    of_runs = lambda name, otherwise: [float(parts.get(name, otherwise)) for parts in extra]  # (r,)
    weight = {name: torch.tensor(of_runs(name, 0), device=device) for name in WEIGHTS}
    used = [name for name in LOSSES if any(name in parts for parts in extra)]  # the others are not computed
    clip, epsilon = of_runs("clip", math.inf), of_runs("epsilon", 1e-8)
    if args.task == "shapes":
        world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, args.code_seed, device)
        if args.read_factors:
            world.read = [FACTORS.index(name) for name in args.read_factors]
    else:
        world = Regression(int(args.difficulty[-1]), device)
    seeds = [run["seed"] for run in runs]
    seed, target = torch.tensor(seeds, device=device), mapping_counts([run["difficulty"] for run in runs], device)
    config = Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model)
    model = GPT(config, seeds)
    model.extra = Linear(len(runs), args.d_model, world.n_value + world.n_asked)  # read-outs of the extra losses
    model.extra.initialise(seeds)
    model = model.to(device)
    model.read_in.weight.data *= torch.tensor(of_runs("input", 1), device=device)[:, None, None]
    optimizer = Adam(model, [run["lr"] for run in runs], eps=epsilon, weight_decay=weight["decay"], clip=clip)
    lr = optimizer.lr  # (r, 1)
    record = probes.Record(args, runs, world, model, optimizer)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.steps():  # in between it measures, prints and saves
        rise, fall = (step + 1) / weight["ramp"], 1 - weight["anneal"] * step / args.steps  # (r,), of the rate
        optimizer.lr = lr * (rise.clamp(max=1) * fall.clamp(min=0))[:, None]
        batch = world.sample(seed, target, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits, states = model(batch.x, batch.y, hidden=True)  # states: after each block, (r, b, tokens, d)
            read = states[args.read_block - 1]
            if args.stop_block:  # the same states, by a path on which no gradient goes further down
                read = states[args.stop_block - 1].detach()
                for block in model.blocks[args.stop_block : args.read_block]:
                    read = block(read.flatten(1, 2), read.shape[2]).unflatten(1, read.shape[1:3])
            at_x, at_label = model.at_x(read), model.at_x(read[:, :, 1:])  # (r, b, n, d)
            heads = lambda h: model.extra(model.norm(h.flatten(1, 2))).unflatten(1, h.shape[1:3])
            guess, guess_at_label = heads(at_x), heads(at_label)
        value, which = guess.split([world.n_value, world.n_asked], -1)
        losses = dict(
            weights=(world.value_loss, value, batch.values),
            previous=(world.value_loss, value[:, :, 1:], batch.values[:, :, :-1]),
            labels=(world.value_loss, guess_at_label[..., : world.n_value], batch.values),
            shuffled=(world.value_loss, value, world.other_values(batch)),
            context=(world.asked_loss, which, batch),
            alike=(probes.alike, at_x.flatten(1, 2).float()),
            cosine=(probes.cosine, at_x.flatten(1, 2).float()),
            norm=(probes.mean_square, states[: args.read_block]),
        )  # a function and what it is given; it returns (r, b, n), or one per run
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        for name in used:
            function, *given = losses[name]
            loss = loss + (step >= args.start) * weight[name] * function(*given).view(len(runs), -1).mean(1)
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    plot(record.finish(), args.out)


def plot(metrics: dict, out: str) -> None:
    figure, d, groups = probes.draw(metrics)
    for colour, runs in zip(probes.COLOURS, groups.values()):
        alike = [[by_block[-1] for by_block in run["alike"]] for run in runs]
        probes.curves(d, metrics["probe_steps"], alike, colour)
    d.set(title="(d) Do states share one direction (last block)?", xlabel="step", ylabel="mean squared cosine")
    d.set(xlim=(0, metrics["steps"][-1]), ylim=(0, 1))
    figure.savefig(f"{out}/figure.png")


if __name__ == "__main__":
    probes.run(main)
