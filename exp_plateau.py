"""The learning plateau, and what happens to the weights component on it (claims 1 to 4; the paper's Fig. 3 and 4).

    python exp_plateau.py                                       the whole figure, laptop scale
    python exp_plateau.py --difficulty 1 10 inf --seeds 5       your own sweep
    python exp_plateau.py --difficulty inf --lr 5e-4 1e-3 2e-3  plateau length and spread against the learning rate
    python exp_plateau.py --task linear                         linear regression; difficulty is the dimension (claim 8)

Runs = difficulties x learning rates x seeds, all trained in one program. Writes metrics.json, figure.png, checkpoint.pt.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import probes
from model import GPT, Adam, Config, autocast, compile_blocks, pick_device
from tasks import FACTORS, SIZES, Regression, image, mappings, parse_difficulty, render, sequence_numbers, shapes

SCALES = {  # defaults only: any flag overrides them
    ("shapes", "laptop"): dict(difficulty=[1, 8, math.inf], lr=[2e-3], embedding="code",
                               factors=(4, 4, 4, 4, 4, 1), ask=FACTORS[:3], code_width=32, code_gain=2.5, sequences=0, steps=1800, batch=48,
                               pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=100, probes=5),
    ("shapes", "paper"): dict(difficulty=[1, 10, 100, 1000, 5000, 20000, math.inf], lr=[1e-4], embedding="code",
                              factors=SIZES, ask=FACTORS, code_width=768, code_gain=2.5, sequences=100_000, steps=46860, batch=128,
                              pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240, probes=30),
    ("linear", "laptop"): dict(difficulty=[1, 2, 4, 6], lr=[1e-3], noise=0.0, sequences=0, steps=2000,
                               batch=32, n_layer=3, n_head=2, d_model=32, evaluations=80, probes=5),
    ("linear", "paper"): dict(difficulty=[5, 10, 20, 30, 40, 50], lr=[1e-4], noise=0.0, sequences=0, steps=200_000,
                              batch=64, n_layer=12, n_head=4, d_model=128, evaluations=400, probes=20),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser, exp = probes.script_parser(__file__, __doc__, SCALES)
    exp.add_argument("--task", choices=("shapes", "linear"), default="shapes", help="images with factors, or linear regression")
    exp.add_argument("--difficulty", type=parse_difficulty, nargs="+",
                     help="shapes: mappings in play, inf = always fresh; linear: dimension d; one or several")  # fmt: skip
    exp.add_argument("--noise", type=float, help="linear: standard deviation of the noise on y (default 0)")
    exp.add_argument("--pairs", type=int, help="(x, y) pairs per sequence; linear: 2 x the largest d + 1 by default")
    exp.add_argument("--n-layer", type=int, help="blocks")
    exp.add_argument("--d-model", type=int, help="width")
    args = parser.parse_args()
    probes.check(args, SCALES[args.task, args.scale])
    args.pairs = args.pairs or 2 * int(max(args.difficulty)) + 1
    return args


def runs_of(args: argparse.Namespace) -> list[dict]:
    return [dict(arm="baseline", difficulty=m, lr=lr, seed=s) for m in args.difficulty for lr in args.lr for s in range(args.seeds)]


def train(args: argparse.Namespace, runs: list[dict], checkpoint: str) -> dict:
    device, args.precision = pick_device(args.device, args.precision)
    if args.task == "linear":
        world = Regression(int(max(args.difficulty)), args.noise, device)
    else:
        world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, device)
    column = lambda key: [run[key] for run in runs]
    seed, m = torch.tensor(column("seed"), device=device), mappings(column("difficulty"), device)
    model = GPT(Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer,
                       n_head=args.n_head, d_model=args.d_model), column("seed")).to(device)  # fmt: skip
    optimizer = Adam(model, column("lr"))
    record = probes.Record(args, runs, world, model, optimizer, checkpoint)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.training_steps():
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with autocast(device, args.precision):
            logits = model(batch.x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    return record.metrics(device) | ({"example": example(world, args.pairs)} if args.task == "shapes" else {})


def example(world, n: int) -> dict:
    """One worked sequence for the picture: asked factor, labels, and factor values from which a replot renders the images."""
    one = torch.tensor([0], device=world.values.device)
    batch = world.sample(one, mappings([math.inf], one.device), one[None] + 3, n)
    full = world.full[batch.item[0, 0]]
    return {"asked": FACTORS[world.asked[batch.asked.item()]], "label": batch.label[0, 0].tolist(), "values": full.tolist()}


def best_rate(metrics: dict) -> float:
    """The sweep's own best learning rate: shortest plateau, median over seeds, summed over difficulties (ties: final loss)."""
    total = lambda lr, key: sum(math.inf if row[key] is None else row[key] for row in metrics["summary"] if row["lr"] == lr)
    rank = lambda lr: (total(lr, "plateau_length_median"), total(lr, "final_loss_median"))
    return min(metrics["args"]["lr"], key=rank)


def relation(metrics: dict) -> dict:
    """Does a long plateau go with a damaged weights component? Over all runs at the sweep's best rate."""
    lr = best_rate(metrics)
    points = [(probes.score_change(run), probes.budgeted_length(run)) for run in metrics["runs"]
              if run["lr"] == lr and probes.score_change(run) is not None]  # fmt: skip
    rho = probes.rank_correlation(*map(list, zip(*points))) if points else None
    print(f"rank correlation of weights score change and plateau length, lr {probes.rate(lr)}: {rho}, n = {len(points)}")
    return {"best_lr": lr, "weights_score_change_against_plateau_length": {"rho": rho, "n": len(points)}}


# ---------------------------------------------------------------------------------------------- the picture


def plot(metrics: dict, path: Path) -> None:
    args, block, lr = metrics["args"], metrics["headline_block"], metrics["best_lr"]
    runs = [run for run in metrics["runs"] if run["lr"] == lr]
    difficulties = list(dict.fromkeys(run["difficulty"] for run in runs))
    colours = dict(zip(difficulties, plt.cm.viridis_r(np.linspace(0.05, 0.95, len(difficulties)))))
    linear = args.get("task") == "linear"  # then the score is an error: worse is up
    label = lambda m: f"{probes.symbol(metrics)} = {m}".replace("inf", "\u221e")
    groups = {label(m): (colours[m], [run for run in runs if run["difficulty"] == m]) for m in difficulties}
    several = len(args["lr"]) > 1
    figure, axes = plt.subplots(2 + several, 3, figsize=(15, 8.4 + 4 * several), layout="constrained")
    (a, b, c), (d, e, f) = axes[:2]
    budget = runs[0]["steps"][-1]
    score = lambda key: lambda run: [row[block] for row in run[key]]
    change = lambda run: math.nan if probes.score_change(run) is None else probes.score_change(run)
    start = [float(np.median([run["initial_weights_score"] for run in runs if run["difficulty"] == m])) for m in difficulties]
    count = lambda true: ", ".join(f"{name}: {sum(map(true, runs))} of {len(runs)}" for name, (_, runs) in groups.items())
    heading = f"Runs that left the plateau: {count(lambda run: not run['censored'])}"
    if not linear:  # there every read-out starts perfect
        heading += f"\nRuns whose weights component ends below its start: {count(lambda run: change(run) < 0)}"
    if several:
        heading = f"Learning rate {probes.rate(lr)}, the sweep's best; against the learning rate: below\n{heading}"
    figure.suptitle(heading)

    probes.curves(a, groups, "steps", lambda run: [v and v / run["no_context_loss"] for v in run["loss"]])
    for m, colour in colours.items():
        level = metrics["reference"][str(m)]
        a.axhline(level["bayes_loss"] / level["no_context_loss"], color=colour, ls="--", lw=1)
    a.axhline(1, color="black", ls="--", lw=1)
    a.axhline(probes.ESCAPE, color="black", ls=":", lw=1)
    a.text(budget, 1.005, "best without context", ha="right", va="bottom", **probes.READABLE)
    a.text(0.01 * budget, probes.ESCAPE - 0.005, "below: plateau is over", va="top", **probes.READABLE)
    a.text(budget, 0.01, "dashed: exact Bayes level", ha="right", va="bottom", fontsize=8)
    if "pairwise_loss" in level:  # of the hardest: a learner that compares items and never infers which factor is asked
        alone = level["pairwise_loss"] / level["no_context_loss"]
        a.axhline(alone, color=colour, ls="-.", lw=1)
        a.text(budget, alone, f"each pair by itself, {label(m)}", ha="right", va="bottom", fontsize=8)
    a.set(title="(a) Training stalls before it improves", xlabel="step", xlim=0, ylim=(0, 1.4),
          ylabel="held-out loss / best loss without context")  # fmt: skip

    shown = lambda run: [v if v is None else max(v, 1e-6) for v in score("weights_score")(run)]  # no zero on a log axis
    probes.curves(b, groups, "probe_steps", shown if linear else score("weights_score"))
    for colour, level in zip(colours.values(), start):
        b.axhline(level, color=colour, ls="--", lw=1)
    if linear:
        b.set_yscale("log")
    b.axhspan(*((max(start), b.get_ylim()[1]) if linear else (b.get_ylim()[0], min(start))), color="tab:red", alpha=0.07, lw=0)
    b.text(budget, np.median(start), "at initialisation", ha="right", va="top", **probes.READABLE)
    b.set(title=f"(b) Weights component (block {block + 1}, no context)", xlabel="step", xlim=0,
          ylabel="weights score: error, lower is better" if linear else "weights score")  # fmt: skip
    b.legend(fontsize=8, title="dimension" if linear else "mappings", title_fontsize=8)

    if "context_score" in runs[0]:
        probes.curves(c, groups, "probe_steps", lambda run: [row[-1] for row in run["context_score"]])
        chance = 1 if linear else 1 / len(args["ask"])
        c.axhline(chance, color="black", ls="--", lw=1)
        c.text(budget, chance, "chance", ha="right", va="top" if linear else "bottom", **probes.READABLE)
    c.set(title="(c) Context component (last block)", xlabel="step", xlim=0,
          ylabel="hidden vector w: error, lower is better" if linear else "which factor is asked: accuracy")  # fmt: skip

    place = np.arange(len(difficulties))
    end = lambda key: np.array([[run[key][-1][block] for run in runs if run["difficulty"] == m] for m in difficulties], float)
    for key, (colour, text) in {
        "weights_score": ("tab:blue", "score (the paper's probe)"),
        "weights_score_identity": ("tab:cyan", "score, attention = identity"),
        "weights_score_converged": ("tab:green", "converged probe"),
    }.items():
        d.plot(place, probes.middle(end(key), 1), color=colour, lw=2, label=text)
        d.plot(place, end(key), ".", color=colour, ms=5, alpha=0.6)
    d.plot(place, start, color="black", ls="--", lw=1)
    d.fill_between(place, start, d.get_ylim()[linear], color="tab:red", alpha=0.07, lw=0)
    wide = d.twinx()
    wide.plot(place, probes.middle(end("spread"), 1), color="tab:orange", lw=1.5, ls="-.", label="spread of the states (right)")
    wide.set(yscale="log", ylabel="spread", ylim=(min(1, wide.get_ylim()[0]), 3 * wide.get_ylim()[1]))
    if linear:
        d.set_yscale("log")
        d.set_ylim(top=100 * d.get_ylim()[1])  # room for the legend
    else:
        d.set_yticks([tick for tick in d.get_yticks() if 0 <= tick <= 1])
    d.set_xticks(place, [str(m).replace("inf", "\u221e") for m in difficulties])
    d.set(title="(d) Weights component at the end: lost or drowned?", xlabel="dimension d" if linear else "mappings m",
          ylabel="weights score: error" if linear else "weights score")  # fmt: skip
    d.legend(*[sum(pair, []) for pair in zip(d.get_legend_handles_labels(), wide.get_legend_handles_labels())], fontsize=7,
             loc="upper left" if linear else "lower left")  # fmt: skip

    for run in runs:
        colour = colours[run["difficulty"]]
        marker, face = ("^", "none") if run["censored"] else ("o", colour)
        e.scatter(change(run), probes.budgeted_length(run), marker=marker, edgecolor=colour, facecolor=face)
    e.axvspan(*((0, max(e.get_xlim()[1], 0.02)) if linear else (min(e.get_xlim()[0], -0.02), 0)), color="tab:red", alpha=0.07, lw=0)
    found = metrics["weights_score_change_against_plateau_length"]
    e.set(title=f"(e) Plateau against weights score: rho = {found['rho']}, n = {found['n']}",
          xlabel="weights score, end minus start", ylabel="plateau length (steps)", ylim=(0, 1.08 * budget))  # fmt: skip
    e.text(0.02, 0.02, "\u25b3 = still on the plateau at the end", transform=e.transAxes, fontsize=8)

    draw_positions(f, metrics, groups) if linear else draw_example(f, metrics["example"])

    if several:
        rates, (g, h, i) = sorted(args["lr"]), axes[2]
        names = [*map(probes.rate, rates)]
        here = lambda m, rate: [run for run in metrics["runs"] if (run["difficulty"], run["lr"]) == (m, rate)]
        probes.draw_groups(g, names, {label(m): (colour, [here(m, rate) for rate in rates]) for m, colour in colours.items()})
        g.set(title="(g) Plateau length against learning rate", xlabel="learning rate")
        spread = lambda run: run["spread"][-1][block]
        for ax, title, value in ((h, "(h) weights score, end minus start", change), (i, "(i) spread of the states at the end", spread)):
            for m, colour in colours.items():
                points = np.array([[value(run) for run in here(m, rate)] for rate in rates], float)
                ax.plot(rates, points, ".", color=colour, alpha=0.6)
                ax.plot(rates, probes.middle(points, 1), color=colour, lw=2, label=label(m))
            ax.axvline(lr, color="black", ls=":", lw=1)
            ax.set(title=title, xscale="log", yscale="log" if value is spread else "linear",
                   xlabel="learning rate (dotted: the sweep's best)")  # fmt: skip
            ax.minorticks_off()
            ax.set_xticks(rates, names)
        h.legend(fontsize=8)
    probes.save_figure(path, figure)


def draw_example(ax, shown: dict) -> None:
    masks = render()
    for i, (values, label) in enumerate(list(zip(shown["values"], shown["label"]))[:8]):
        x, y = 18 * (i % 4), -24 * (i // 4)
        ax.imshow(image(np.array(values), masks).transpose(1, 2, 0).clip(0, 1), extent=(x, x + 16, y, y + 16))
        ax.text(x + 8, y - 3.5, f"label {label}", ha="center", va="center", fontsize=10)
    ax.set(xlim=(-1, 71), ylim=(-31, 17))
    ax.set_title(f"(f) 8 pairs of a sequence (asks for {shown['asked'].replace('_', ' ')})")
    ax.axis("off")


def draw_positions(ax, metrics: dict, groups: dict) -> None:
    """Regression: loss at the end by position, beside learners that are told what the task is."""
    pairs = np.arange(metrics["args"]["pairs"])
    for colour, runs in groups.values():
        ax.plot(pairs, probes.middle(np.array([run["loss_by_position"] for run in runs], float), 0), color=colour, lw=2)
        ax.plot(pairs, metrics["reference"][str(runs[0]["difficulty"])]["least_squares_loss_by_position"], color=colour, ls="--", lw=1)
    level = metrics["reference"][str(runs[0]["difficulty"])]
    for name, style in {"nearest": ":", "averaging": "-."}.items():
        ax.plot(pairs, level[f"{name}_loss_by_position"], color="grey", ls=style, lw=1, label=f"{name} (largest d)")
    ax.legend(fontsize=8)
    ax.set(title="(f) By position, at the end; dashed: least squares", xlabel="pairs seen", ylabel="squared error / d", ylim=(0, 1.6))


def main() -> None:
    probes.command(arguments, runs_of, train, plot, relation)


if __name__ == "__main__":
    main()
