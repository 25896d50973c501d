"""The learning plateau, and what happens to the weights component on it (claims 1 to 4; the paper's Fig. 3 and 4).

    python exp_plateau.py                                     the figure, laptop scale
    python exp_plateau.py --difficulty 1 10 inf --seeds 5     your own sweep
    python exp_plateau.py --task linear                       linear regression; difficulty is the dimension (claim 8)
    python exp_plateau.py --change reset rescaled --at 1000   what is to blame? arms that are changed at a step

Runs = difficulties x learning rates x seeds, trained in one program; and at the hardest difficulty the oracle: the same
task for a network that sees the clean factor values, so that its weights component is perfect from step 0. What it
needs to leave the plateau is the context component's own time.
Writes metrics.json, figure.png and checkpoint.pt to --out.

Changes at step --at, each an arm of the hardest difficulty:
  fresh      Adam starts afresh, nothing else: the control of the last three
  slower     a quarter of the rate
  rescaled   all weights that write to the residual stream are scaled until the spread of the states is that of step 0;
             the network computes the same as before, since every block reads through a LayerNorm
  projected  these weights lose the direction in which the states vary most; a fresh Adam
  reset      read-in and first block back to step 0; a fresh Adam
  swapped    read-in and first block of the baseline with the other of two rates and the same seed; a fresh Adam
"""

import math
import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import numpy as np
import torch
from matplotlib.ticker import LogLocator

import probes
from model import GPT, Adam, Config, compile_blocks, pick_device
from tasks import FACTORS, SIZES, Regression, image, mapping_counts, parse_difficulty, sequence_numbers, shapes

DEFAULTS = {
    "laptop": dict(difficulty=[1, math.inf],
                   lr=[5e-4], steps=2000, batch=48, pairs=12, n_layer=3, n_head=2, d_model=64, evaluations=80, probes=4,
                   embedding="code", code_width=32, code_gain=2.5, code_seed=0, factors=[4, 4, 4, 4, 4, 1],
                   ask=["floor_hue", "wall_hue"], sequences=0),
    "paper": dict(difficulty=[1, 10, 100, 1000, 20000, math.inf],
                  lr=[1e-4], steps=46860, batch=128, pairs=40, n_layer=12, n_head=4, d_model=128, evaluations=240,
                  probes=30, embedding="vae", code_width=768, code_gain=2.5, code_seed=0, factors=list(SIZES),
                  ask=list(FACTORS), sequences=100_000),
}  # fmt: skip
LINEAR = {
    "laptop": dict(difficulty=[1, 2, 4, 6], lr=[1e-3], steps=2000, batch=32, pairs=13, n_layer=3, n_head=2, d_model=32,
                   evaluations=80, probes=5, sequences=0),
    "paper": dict(difficulty=[5, 10, 20, 30, 40, 50], lr=[1e-4], steps=200_000, batch=64, pairs=101, n_layer=12,
                  n_head=4, d_model=128, evaluations=400, probes=20, sequences=0),
}  # fmt: skip
CHANGES = ("fresh", "slower", "rescaled", "projected", "reset", "swapped")
TIMES = (("black", "the plateau is left"), ("tab:red", "the spread has doubled"))  # of the race


def parse_args():
    linear = probes.early("--task", "shapes") == "linear"
    parser = probes.flags(__doc__, LINEAR if linear else DEFAULTS, images=not linear)
    add, between = parser.add_argument, probes.between
    add("--task", choices=("shapes", "linear"), default="shapes", help="images, or linear regression")
    add("--no-oracle", action="store_true", help="shapes: leave out the oracle")
    add("--change", choices=CHANGES, nargs="+", default=[], help="arms that are changed once, see above")
    add("--at", type=between(0, 1e8), help="the step of the changes, else half of --steps")
    difficulty = between(1, 64) if linear else parse_difficulty
    add("--difficulty", type=difficulty, nargs="+", help="mappings in play, inf = always fresh; linear: d")
    add("--sequences", type=between(0, 1e8), help="size of the training set, 0 = always fresh sequences")
    args = probes.checked(parser)
    if "swapped" in args.change and (len(args.lr) != 2 or probes.PROCESSES > 1):
        parser.error("--change swapped: needs two rates (--lr), and one process")
    args.at = args.steps // 2 if args.at is None else args.at
    if args.change and args.at >= args.steps:
        parser.error(f"--at {args.at}: must lie inside the budget, 0 .. {args.steps - 1} (--steps)")
    return args


def main():
    args = parse_args()
    if args.replot:
        return probes.replot(args, plot)
    device, args.precision = pick_device(args.device, args.precision)
    arms = [("baseline", m) for m in args.difficulty]
    if args.task == "shapes" and not args.no_oracle:
        arms.append(("oracle", args.difficulty[-1]))
    arms += [(name, args.difficulty[-1]) for name in args.change]
    runs = probes.share([dict(arm=arm, difficulty=m, lr=lr, seed=seed) for arm, m in arms
                         for lr in args.lr for seed in args.seeds])  # fmt: skip
    if args.task == "shapes":
        world = shapes(args.factors, args.ask, args.embedding, args.code_width, args.code_gain, args.code_seed, device)
        if not args.no_oracle:
            world.show_clean([run["arm"] == "oracle" for run in runs])
    else:
        world = Regression(int(args.difficulty[-1]), device)
    seeds = [run["seed"] for run in runs]
    seed, target = torch.tensor(seeds, device=device), mapping_counts([run["difficulty"] for run in runs], device)
    config = Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model)
    model = GPT(config, seeds).to(device)
    optimizer = Adam(model, [run["lr"] for run in runs])
    record = probes.Record(args, runs, world, model, optimizer)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.steps():  # in between it measures, prints and saves
        if args.change and step == args.at:
            change(runs, model, GPT(config, seeds).to(device), optimizer, record.prober.items[0][0][:, :, None])
        batch = world.sample(seed, target, sequence_numbers(seed, step, args.batch, args.sequences), args.pairs)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(batch.x, batch.y)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    plot(record.finish(example=example(world, args.pairs) if args.task == "shapes" else None), args.out)


@torch.no_grad()
def change(runs: list[dict], model: GPT, start: GPT, optimizer: Adam, x: torch.Tensor) -> None:
    """Change the arms of --change in place. start: the model at step 0; x (r, i, 1, d): inputs without context."""
    now, then = (probes.states(net, x)[:, -1:] for net in (model, start))  # (r, 1, i, d), after the last block
    scale = (probes.geometry(then)["spread"] / probes.geometry(now)["spread"])[:, 0]
    names, values = zip(*model.named_parameters())
    mean, square = (moment.split(optimizer.sizes, 1) for moment in (optimizer.mean, optimizer.square))
    writing = [i for i, name in enumerate(names) if re.match(r"read_in|position|blocks.*_out", name)]
    first = [i for i, name in enumerate(names) if name.startswith(("read_in", "blocks.0."))]
    for r, run in enumerate(runs):
        arm, source, donor = run["arm"], list(start.parameters()), r
        if arm == "swapped":
            same = lambda other: other["arm"] == "baseline" and all(other[k] == run[k] for k in ("seed", "difficulty"))
            source, donor = values, next(i for i, o in enumerate(runs) if same(o) and o["lr"] != run["lr"])
        if arm in ("reset", "swapped"):
            for i in first:
                values[i][r] = source[i][donor]
        if arm == "projected":
            direction = torch.linalg.eigh(now[r, 0].double().T.cov()).eigenvectors[:, -1].float()
            for i in writing:
                values[i][r] -= (values[i][r] @ direction)[..., None] * direction
        if arm == "rescaled":  # Adam's moments of a gradient that is now larger, so that its steps stay what they were
            for i in writing:
                values[i][r] *= scale[r]
                mean[i][r] /= scale[r]
                square[i][r] /= scale[r] ** 2
        if arm == "slower":
            optimizer.lr[r] /= 4
        if arm in ("fresh", "projected", "reset", "swapped"):
            optimizer.mean[r], optimizer.square[r], optimizer.beta_t[:, r] = 0, 0, 1


def example(world, n: int) -> dict:
    """One worked sequence for the picture: asked factor, labels, factor values from which a replot draws the images."""
    one = torch.tensor([0], device=world.values.device)
    batch = world.sample(one, mapping_counts([math.inf], one.device), one[None] + 3, n)
    values = world.full[batch.item[0, 0]].tolist()
    return {"asked": FACTORS[world.asked[batch.asked.item()]], "label": batch.label[0, 0].tolist(), "values": values}


def plot(metrics: dict, out: str) -> None:
    figure, d, groups = probes.draw(metrics, by="difficulty")
    if len(metrics["lr"]) > 2:
        draw_race(*figure.axes[1:], metrics)
    else:
        for run, dot in probes.dots(groups):
            d.plot(probes.score_change(run, metrics["block"]), probes.at_least(metrics, run), **dot)
        d.axvline(0, color="grey", ls="--", lw=1)
        d.set(title="(d) Do long plateaus go with a damaged component?", xlabel="weights score, end minus start",
              ylabel="plateau length in steps", ylim=0)  # fmt: skip
    if metrics["example"]:
        figure.set_figheight(10)
        figure.get_layout_engine().set(rect=(0, 0.21, 1, 0.79))
        if "context_score" in metrics["runs"][0]:  # not with one asked factor
            draw_context(figure.add_axes((0.67, 0.05, 0.32, 0.12)), metrics, groups)
        draw_example(figure.add_axes((0.01, 0.0, 0.6, 0.19)), metrics["example"])
    figure.savefig(f"{out}/figure.png")


def race_times(metrics: dict, run: dict) -> tuple[float, float]:
    """Probed steps by which a run has left the plateau, and its spread has doubled (last block); infinite: not yet."""
    until = math.inf if run["plateau_length"] is None else run["plateau_length"]
    return next((step for step in metrics["probe_steps"] if step >= until), math.inf), probes.doubling(metrics, run, -1)


def draw_race(b, c, ax, metrics: dict) -> None:
    """At the hardest difficulty: how the weights score of the baselines ends and two times, against the rate, both seen
    only when states are probed (--probes); in panel (c) the two times of other arms, if there are any."""
    last, rates, steps = metrics["runs"][-1]["difficulty"], sorted(metrics["lr"]), metrics["probe_steps"]
    hardest = [run for run in metrics["runs"] if run["difficulty"] == last]
    others = [run["lr"] for run in hardest if run["arm"] != "baseline"]
    if others:
        draw_arms(c, [run for run in hardest if run["lr"] == others[0]], metrics)
    runs = [run for run in hardest if run["arm"] == "baseline"]
    lr, times = np.array([run["lr"] for run in runs]), np.array([race_times(metrics, run) for run in runs]).T
    beside, shown = np.outer((0.97, 1.03), lr), np.minimum(times, steps[-1])  # (2, runs)
    ax.plot(beside, shown, color="grey", lw=0.6)
    for i, (colour, label) in enumerate(TIMES):
        ax.plot(beside[i], shown[i], "o", color=colour, mfc="none", ms=4)
        ax.plot(beside[i], times[i], "o", color=colour, ms=4)  # filled: within the budget
        medians = [np.median(times[i][lr == one]) for one in rates]
        seen = [(math.log(one), math.log(time)) for one, time in zip(rates, medians) if 0 < time < math.inf]
        label += f" (slope {np.polyfit(*zip(*seen), 1)[0]:.1f})" if len(seen) > 1 else ""
        ax.plot(rates, medians, color=colour, label=label)
    b.clear()
    for run, dot in probes.dots({"": runs}):
        b.plot(run["lr"], probes.score_change(run, metrics["block"]), **dot)
    b.axhline(probes.DAMAGE * (1 if metrics["error"] else -1), color="grey", ls="--", lw=1)
    b.set(title="(b) Weights component (beyond grey: damaged)", ylabel="weights score, end minus start")
    ax.set(title="(d) The race (grey: a run)", ylabel="steps until", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    for panel, what in ((b, "still on the plateau"), (ax, "not yet")):
        panel.set(xlabel=f"learning rate (open: {what})", xscale="log")
        panel.set_xticks(rates, map(probes.rate, rates))
        panel.minorticks_off()
    ax.legend(fontsize=8)


def draw_arms(c, runs: list[dict], metrics: dict) -> None:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    c.clear()
    for run in runs:
        end = metrics["probe_steps"][len(run["spread"]) - 1]  # an arm may have been trained for fewer steps
        for time, aside, (colour, _) in zip(race_times(metrics, run), (-0.15, 0.15), TIMES):
            fill = colour if time < math.inf else "none"
            c.plot(min(time, end), arms.index(run["arm"]) + aside, "o", color=colour, mfc=fill, ms=4)
    c.set(title=f"(c) The two times of every arm, rate {probes.rate(runs[0]['lr'])}", ylim=(len(arms) - 0.5, -0.5))
    c.set(xlabel="steps until (open: not yet)", xlim=(0, 1.02 * metrics["probe_steps"][-1]))
    c.set_yticks(range(len(arms)), arms)


def draw_context(ax, metrics: dict, groups: dict) -> None:
    for colour, runs in zip(probes.COLOURS, groups.values()):
        score = [[by_block[-1] for by_block in run["context_score"]] for run in runs]
        probes.curves(ax, metrics["probe_steps"], score, colour)
    ax.axhline(metrics["chance_context"], color="grey", ls="--", lw=1)
    ax.set(title="(e) Context score, last block (grey: chance)", xlabel="step")


def draw_example(ax, shown: dict) -> None:
    for i, (values, label) in enumerate(list(zip(shown["values"], shown["label"]))[:8]):
        ax.imshow(image(np.array(values)).transpose(1, 2, 0).clip(0, 1), extent=(18 * i, 18 * i + 16, 0, 16))
        ax.text(18 * i + 8, -3, f"label {label}", ha="center", va="center", fontsize=9)
    title = f"A sequence: the label is the {shown['asked'].replace('_', ' ')}, renamed"
    ax.set(xlim=(-1, 18 * 8 - 1), ylim=(-6, 17), title=title)
    ax.axis("off")


if __name__ == "__main__":
    probes.run(main)
