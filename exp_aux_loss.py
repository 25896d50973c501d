"""Extra losses on the plateau (claim 7; the paper's Fig. 5C), the controls that could explain them away, and `norm`, our own.

    python exp_aux_loss.py                                              hardest task, laptop scale
    python exp_aux_loss.py --loss none weights:0.1 weights:1 norm       a weight after the colon
    python exp_aux_loss.py --loss none weights norm weights+norm        losses added up
    python exp_aux_loss.py --lr 5e-4 1e-3 2e-3                          every arm also at its own best learning rate
    python exp_aux_loss.py --task linear                                linear regression; difficulty is the dimension (claim 8)

Total loss = label loss + weight x extra loss, the extra loss read from the final layer at every x position, with context visible:
  weights   all factor values of x_i (cross-entropy)             context  which factor the sequence asks for
  shuffled  the values of another, fixed image instead of x_i's: the same gradient load, no information about the factors
            (it can only be met by telling images apart one by one)
  norm      mean square of the residual stream after each block; needs no labels
In regression: weights = x_i itself (squared error / d), context = the hidden w, shuffled = the x_i of another sequence.
Cheap explanations, as further arms: decay (decoupled weight decay), clip (gradient norm), epsilon (Adam's).
Arms of one seed start from the same weights and see the same batches; all are judged on the plain target task.
"""

import argparse
import math
from pathlib import Path

import torch
from einops import rearrange

import probes
from model import GPT, Adam, Config, Linear, autocast, compile_blocks, pick_device
from tasks import FACTORS, SIZES, Regression, UsageError, mappings, parse_difficulty, sequence_numbers, shapes

LOSSES = dict(
    none=0.0, weights=None, context=None, shuffled=None, norm=0.01, decay=1.0, clip=0.2, epsilon=1e-4
)  # default weight; None: --weight

EXTRAS = ["none", "weights", "context", "shuffled", "norm"]
SCALES = {  # defaults only: any flag overrides them
    ("shapes", "laptop"): dict(loss=["none", "weights", "norm"], difficulty=[math.inf], lr=[1e-3], embedding="code",
                               factors=(4, 4, 4, 4, 4, 1), ask=FACTORS[:3], code_width=32, code_gain=2.5, sequences=0, steps=1400, batch=48,
                               pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=100, probes=5),
    ("shapes", "paper"): dict(loss=EXTRAS, difficulty=[20000], lr=[1e-4], embedding="code",
                              factors=SIZES, ask=FACTORS, code_width=768, code_gain=2.5, sequences=100_000, steps=46860, batch=128,
                              pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240, probes=30),
    ("linear", "laptop"): dict(loss=["none", "weights", "norm"], difficulty=[2, 4], lr=[1e-3], noise=0.0, sequences=0, steps=2000,
                               batch=32, n_layer=3, n_head=2, d_model=32, evaluations=80, probes=5),
    ("linear", "paper"): dict(loss=["none", "weights", "norm"], difficulty=[5, 10, 20, 30, 40, 50], lr=[1e-4], noise=0.0, sequences=0,
                              steps=200_000, batch=64, n_layer=12, n_head=4, d_model=128, evaluations=400, probes=20),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser, exp = probes.script_parser(__file__, __doc__, SCALES)
    exp.add_argument("--task", choices=("shapes", "linear"), default="shapes", help="images with factors, or linear regression")
    exp.add_argument("--difficulty", type=parse_difficulty, nargs="+",
                     help="shapes: mappings in play, inf = always fresh; linear: dimension d; one or several")  # fmt: skip
    exp.add_argument("--loss", type=parse_arm, nargs="+",
                     help=f"arms: {', '.join(LOSSES)}; weights:0.3 sets a weight, weights+norm adds losses up")  # fmt: skip
    exp.add_argument("--weight", type=float, nargs="+", default=[0.1],
                     help="of the losses without one of their own: weights, context, shuffled (default 0.1)")  # fmt: skip
    exp.add_argument("--noise", type=float, help="linear: standard deviation of the noise on y (default 0)")
    exp.add_argument("--pairs", type=int, help="(x, y) pairs per sequence; linear: 2 x the largest d + 1 by default")
    exp.add_argument("--n-layer", type=int, help="blocks")
    exp.add_argument("--d-model", type=int, help="width")
    args = parser.parse_args()
    probes.check(args, SCALES[args.task, args.scale])
    args.pairs = args.pairs or 2 * int(max(args.difficulty)) + 1
    if args.task == "shapes" and len(args.ask) == 1 and any("context" in text for text in args.loss):
        raise UsageError("--ask: with one asked factor the context loss has nothing to read; ask two or leave that arm out")
    if args.task == "linear" and args.batch == 1 and any("shuffled" in text for text in args.loss):
        raise UsageError("--batch 1: leaves no other sequence for the shuffled loss; give at least 2")
    return args


def parse_arm(text: str) -> str:
    names = []
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        if name not in LOSSES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(LOSSES)}")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1e6 or (value == 0 and name in ("clip", "epsilon")):
            raise argparse.ArgumentTypeError(f"{part!r}: the weight must be a number from 0 to 1,000,000 (clip and epsilon: above 0)")
        if name == "none" and text != "none":
            raise argparse.ArgumentTypeError(f"{text!r}: none takes no weight and no second loss")
        if name in names:
            raise argparse.ArgumentTypeError(f"{text!r}: names {name} twice")
        names.append(name)
    return text


def arms(args: argparse.Namespace) -> list[dict]:
    """--loss and --weight spelled out: {"arm": "weights:0.1", "extra": {"weights": 0.1}} and so on; `none` is the baseline."""
    out = []
    for text in args.loss:
        for default in args.weight:
            extra = {}
            for part in text.split("+"):
                name, _, weight = part.partition(":")
                extra[name] = float(weight) if weight else default if LOSSES[name] is None else LOSSES[name]
            name = "baseline" if set(extra) == {"none"} else "+".join(f"{k}:{v:g}" for k, v in extra.items())
            out.append({"arm": name, "extra": extra})
    return list({arm["arm"]: arm for arm in out}.values())  # --weight changes only some of them: each arm once


def runs_of(args: argparse.Namespace) -> list[dict]:
    return [dict(**arm, difficulty=m, lr=lr, seed=s) for m in args.difficulty for arm in arms(args) for lr in args.lr
            for s in range(args.seeds)]  # fmt: skip


def train(args: argparse.Namespace, runs: list[dict], checkpoint: str) -> dict:
    device, args.precision = pick_device(args.device, args.precision)
    if args.task == "linear":
        world = Regression(int(max(args.difficulty)), args.noise, device)
    else:
        world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, device)
    column = lambda key: [run[key] for run in runs]
    weight = lambda name, absent=0.0: torch.tensor([run["extra"].get(name, absent) for run in runs], device=device)
    seed, m = torch.tensor(column("seed"), device=device), mappings(column("difficulty"), device)
    model = GPT(Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer,
                       n_head=args.n_head, d_model=args.d_model), column("seed"))  # fmt: skip
    model.extra = Linear(len(runs), args.d_model, world.n_value + world.n_asked)  # read-outs of the extra losses
    model.extra.initialise(column("seed"))
    model = model.to(device)
    optimizer = Adam(model, column("lr"), eps=weight("epsilon", 1e-8), weight_decay=weight("decay"), clip=weight("clip", math.inf))
    record = probes.Record(args, runs, world, model, optimizer, checkpoint)
    weights, context, shuffled, norm = (weight(name) for name in ("weights", "context", "shuffled", "norm"))
    if not args.no_compile:
        compile_blocks(model)

    for step in record.training_steps():
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with autocast(device, args.precision):
            logits, states = model(batch.x, batch.y, hidden=True)  # states: after each block, (r, b, tokens, d)
            guess = model.extra(model.norm(rearrange(model.at_x(states[-1]), "r b n d -> r (b n) d")))
        value, asked = rearrange(guess, "r (b n) o -> r b n o", b=args.batch).split([world.n_value, world.n_asked], -1)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss = loss + weights * world.value_loss(value, batch.values).mean((1, 2))
        loss = loss + shuffled * world.value_loss(value, world.other_values(batch)).mean((1, 2))
        loss = loss + context * world.asked_loss(asked, batch).mean((1, 2))
        loss = loss + norm * torch.stack([h.square().mean((1, 2, 3)) for h in states]).mean(0)
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    return record.metrics(device)


# ---------------------------------------------------------------------------------------------- the picture


def plot(metrics: dict, path: Path) -> None:
    figure, f, colours = probes.draw_arms(metrics, "Extra losses")
    linear = metrics["args"].get("task") == "linear"
    same = lambda run: (run["seed"], run["lr"], run["difficulty"])
    baseline = {same(run): run for run in metrics["runs"] if run["arm"] == "baseline"}
    for run in metrics["runs"]:
        base = baseline.get(same(run))
        if base and run is not base and run["arm"] in colours and probes.score_change(base) is not None:
            saved, face = probes.budgeted_length(base) - probes.budgeted_length(run), colours[run["arm"]]
            neither = run["censored"] and base["censored"]
            f.plot(probes.score_change(base), saved, "^" if neither else "o", ms=4, color=face, mfc="none" if neither else face)
    f.axhline(0, color="black", lw=1)
    f.axvline(0, color="black", ls="--", lw=1)
    if linear:
        f.set_xscale("symlog", linthresh=1e-4)
    else:
        f.locator_params(axis="x", nbins=6)
    f.set(title="(f) Steps saved (\u25b3: neither leaves)", ylabel="steps saved (same seed and rate)",
          xlabel="baseline's weights score, end minus start" + " (an error)" * linear)  # fmt: skip
    probes.save_figure(path, figure)


def main() -> None:
    probes.command(arguments, runs_of, train, plot)


if __name__ == "__main__":
    main()
