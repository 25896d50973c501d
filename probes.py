"""What is measured: accuracy, weights score, context score, plateau length, and the record that becomes metrics.json.

The weights component is what the weights alone make of ONE input, without any context. Its score: how well a linear
read-out finds all factor values of a held-out image in the hidden state of that image alone. Four views of it:
  weights_score            `alone`: a prompt of one image; probe trained with the paper's budget (Adam 1e-3, 782 steps, raw states)
  weights_score_identity   the authors' variant: attention replaced by identity in every block
  weights_score_converged  closed-form ridge on standardised states: is the information there at all?
  spread                   root of the summed variance of the state over images: how far apart they are
Dysfunction = weights_score below its own value at initialisation. All measures are taken in fp32, all scores on held-out data.
In regression the read-out returns the vector x itself and the score is its normalised squared error: 1 = nothing known, LOWER is
better, dysfunction = above its own value at initialisation. A text has no identity variant: its words must meet by attention.

The first third of the file is what is measured; the rest is plumbing that all scripts share: the record, panels, one command,
files, flags.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from datetime import timedelta
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from matplotlib.ticker import LogFormatter
from torch.nn import functional as F

from tasks import FACTORS, HELD_OUT, UsageError, mappings

matplotlib.use("Agg")  # figures go to files

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun

BEGAN = time.perf_counter()  # of the command, for --max-minutes
CAUGHT: list[int] = []  # Ctrl-C or SIGTERM: the step is finished and saved first
SAVE_SECONDS = 60  # between two checkpoints
PROBE_STEPS, PROBE_BATCH, PROBE_RATE = 782, 128, 1e-3  # steps and rate of the paper; a small world is passed over many times
MOST_TOKENS = 2**20  # in one pass of a probe, which keeps the states of every block
ESCAPE = 0.8  # of the best loss without context: Kim et al. (arXiv 2410.05448); a learner of the label set alone stays above
COMPLETE = 0.95  # of the Bayes accuracy; in regression: loss within 0.1 of the Bayes loss
READABLE = dict(fontsize=8, zorder=1.9, bbox=dict(fc="white", ec="none", alpha=0.8, pad=0.5))  # words under the curves, over the levels
COLOURS = {"baseline": "black", "weights": "tab:blue", "norm": "tab:orange", "context": "tab:green"}  # the same in every figure


# ---------------------------------------------------------------------------------------------- accuracy


@torch.no_grad()
def evaluate(model, world, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy by position, both (r, n), on a batch of sequences; regression has no accuracy (NaN)."""
    logits = model(batch.x, batch.y)
    loss = world.loss(logits, batch).mean(1)
    hit = (logits.argmax(-1) == batch.label).float().mean(1) if world.n_label else torch.full_like(loss, math.nan)
    return loss, hit


# ---------------------------------------------------------------------------------------------- linear probes


def read_score(out: torch.Tensor, target: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    """Score of read-outs (g, c, i) against targets (g or 1, i, f): accuracy of each factor (g, f), c = f * largest size.

    sizes None: the squared error over the variance of the target, (g, 1), of the dimensions that are there (padding is constant).
    """
    if sizes is None:
        present = target.var(1, keepdim=True) > 0
        error = (out.mT - target).square() * present
        return error.sum((1, 2))[:, None] / ((target - target.mean(1, keepdim=True)).square() * present).sum((1, 2))[:, None]
    absent = absent_values(sizes, out.device)
    out = rearrange(out, "g (f v) i -> g i f v", f=len(absent)).masked_fill(absent, -math.inf)
    return (out.argmax(-1) == target).float().mean(1)


def absent_values(sizes: list[int], device) -> torch.Tensor:
    return torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]


def goals(target: torch.Tensor, sizes: list[int] | None, dtype) -> torch.Tensor:
    """What a read-out is fitted to: targets (g or 1, i, f) -> (g or 1, i, c), one-hot, or the numbers themselves."""
    return target.to(dtype) if sizes is None else rearrange(F.one_hot(target, max(sizes)).to(dtype), "g i f v -> g i (f v)")


@torch.no_grad()
def linear_probe(train, target, test, test_target, sizes: list[int] | None) -> torch.Tensor:
    """Held-out score (g, f) of g linear read-outs trained as long as the paper's probe: cross-entropy, Adam 1e-3, 782 steps.

    train (g, i, d) raw states, target (i, f) or (g, i, f) values, test and test_target likewise, sizes (f,) values per target.
    sizes None: numbers instead of classes, squared error instead of cross-entropy, score (g, 1) the normalised error.
    The gradient is written out: g small probes in one matmul are what makes probing cheap.
    """
    groups, items, d = train.shape
    target, test_target = (t if t.dim() == 3 else t[None] for t in (target, test_target))
    generator = torch.Generator().manual_seed(0)
    goal = goals(target, sizes, train.dtype)
    absent = absent_values(sizes, train.device).view(1, -1, 1) if sizes else None
    bound = lambda *shape: ((torch.rand(*shape, generator=generator) * 2 - 1) * d**-0.5).to(train.device).repeat(groups, 1, 1)
    params = [bound(1, goal.shape[2], d), bound(1, goal.shape[2], 1)]  # nn.Linear's default, the same for every group
    order, batch = torch.randperm(items, generator=generator).to(train.device), min(PROBE_BATCH, items)
    order = torch.cat([order, order[: batch - 1]])  # so that a window may run over the end
    train, goal = train[:, order], goal[:, order].mT.contiguous()  # items innermost: fast on a CPU
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for t in range(1, PROBE_STEPS + 1):
        at = t * batch % items  # pass after pass over the shuffled items
        x = train[:, at : at + batch]
        out = torch.baddbmm(params[1], params[0], x.mT)
        if sizes:
            out = rearrange(out.masked_fill_(absent, -math.inf), "g (f v) i -> g f v i", f=len(sizes)).softmax(2).flatten(1, 2)
        error = (out - goal[..., at : at + batch]) / batch
        for p, g, (mean, square) in zip(params, (error @ x, error.sum(2, keepdim=True)), moments):
            mean.lerp_(g, 0.1)
            square.lerp_(g * g, 0.001)
            p.addcdiv_(mean, (square / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-PROBE_RATE / (1 - 0.9**t))
    return read_score(params[0] @ test.mT + params[1], test_target, sizes)


@torch.no_grad()
def converged_probe(train, target, test, test_target, sizes: list[int] | None, ridge: float = 1e-3) -> torch.Tensor:
    """As linear_probe, of the closed-form ridge read-out from standardised states: held-out score (g, f)."""
    target, test_target = (t if t.dim() == 3 else t[None] for t in (target, test_target))
    mean, std = train.mean(1, keepdim=True), train.std(1, keepdim=True) + 1e-6
    a, b = (F.pad((s - mean) / std, (0, 1), value=1.0).double() for s in (train, test))
    y = goals(target, sizes, a.dtype)
    gram = a.mT @ a + ridge * a.shape[1] * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    solved, _ = torch.linalg.solve_ex(gram, a.mT @ y)  # a run that blew up may not stop the others
    return read_score((b @ solved).mT, test_target, sizes)


@torch.no_grad()
def states(model, x: torch.Tensor, y: torch.Tensor | None = None, mixing: str = "attention", last: bool = False) -> torch.Tensor:
    """States at the x positions, or only the last, after every block: x (r, b, n, d) -> (r, k, b, n or 1, d_model), finite."""
    tokens = len(x) * x.shape[2] * (model.config.n_token + (y is not None))  # of one sequence, all runs
    size = max(1, min(MOST_TOKENS // tokens, 65_000 // (len(x) * model.config.n_head)))  # a GPU's attention kernels take no more
    parts = zip(x.split(size, 1), y.split(size, 1) if y is not None else itertools.repeat(None))
    at_x = lambda hidden: torch.stack([model.at_x(h, with_labels=y is not None)[:, :, -1 if last else 0 :] for h in hidden], 1)
    return torch.cat([at_x(model(*part, mixing=mixing, hidden=True)[1]) for part in parts], 2).nan_to_num(0, 0, 0)


class Prober:
    """Everything that is probed, on items and sequences drawn once: call it for a dict of scores, (r, k) or by factor (r, k, f)."""

    def __init__(self, world, seed, m, n: int, items: int = 4096, sequences: int = 768):
        self.runs, self.n, self.d_y = len(seed), n, world.inputs["d_y"]
        numbers = lambda count, first: 2 * HELD_OUT + first + torch.arange(count, device=seed.device).expand(self.runs, -1)
        self.batch = [
            world.sample(seed, m, numbers(sequences, 0), n),
            world.sample(seed, m, numbers(sequences // 4, sequences), n, held_out=True),
        ]
        self.single = world.inputs.get("n_token", 1) == 1  # an item is one token
        if world.n_label:
            generator = torch.Generator().manual_seed(0)
            part = [world.draw(count, held_out, generator) for count, held_out in ((items, False), (items // 4, True))]
            # whole sequences of n items each, so that the identity variant sees the positions of training
            part = [i[: max(1, len(i) // n) * n] for i in part]
            self.x, self.value = [world.table[i][None] for i in part], [world.values[i][None, :, world.varying] for i in part]
            self.sizes, self.asked_sizes = world.value_sizes, [world.n_asked]
            self.asked = [b.asked[..., None] for b in self.batch]
        else:
            vectors = lambda count, first: world.sample(seed, m, numbers(-(-count // n), 2 * sequences + first), n).x
            part = [vectors(items, items), vectors(items // 4, 0)]
            self.x = self.value = [rearrange(x, "r b n d -> r (b n) d") for x in part]
            self.sizes = self.asked_sizes = None
            self.asked = [b.asked for b in self.batch]
        self.raw_score = None  # of the embedding itself
        if self.single:
            self.raw_score = linear_probe(self.x[0], self.value[0], self.x[1], self.value[1], self.sizes).mean().item()
        self.chance = statistics.mean(1 / size for size in self.sizes) if self.sizes else 1.0

    def __call__(self, model) -> dict[str, torch.Tensor]:
        group = lambda h: rearrange(h, "r k b n d -> (r k) (b n) d")
        expand = lambda x: x.expand(self.runs, *x.shape[1:])
        per_block = lambda t: t if len(t) == 1 else t.repeat_interleave(model.config.n_layer, 0)
        split = lambda score: score.view(self.runs, -1, score.shape[-1])  # (r k) f -> r k f

        def probe(f, state, target, sizes):
            return split(f(state[0], per_block(target[0]), state[1], per_block(target[1]), sizes))

        alone = [group(states(model, expand(rearrange(x, "r i d -> r i 1 d")))) for x in self.x]
        by_factor = probe(linear_probe, alone, self.value, self.sizes)
        scores = {
            "weights_score": by_factor.mean(-1),
            "weights_score_by_factor": by_factor,
            "weights_score_converged": probe(converged_probe, alone, self.value, self.sizes).mean(-1),
            "spread": alone[0].var(1).sum(-1).sqrt().view(self.runs, -1),
        }
        if self.single:
            pairs = [expand(rearrange(x, "r (b n) d -> r b n d", n=min(self.n, x.shape[1]))) for x in self.x]
            empty = [torch.zeros(*x.shape[:3], self.d_y, device=x.device) for x in pairs]
            identity = [group(states(model, x, y, "identity")) for x, y in zip(pairs, empty)]
            scores["weights_score_identity"] = probe(linear_probe, identity, self.value, self.sizes).mean(-1)
        if self.asked_sizes != [1]:
            seen = [group(states(model, b.x, b.y, last=True)) for b in self.batch]
            scores["context_score"] = probe(linear_probe, seen, self.asked, self.asked_sizes).mean(-1)
        return scores


# ---------------------------------------------------------------------------------------------- plateau length and summary


def plateau_length(steps: list[int], loss: list[float], level: float) -> int | None:
    """First step at which the held-out loss is below `level`; None = censored, never within the budget."""
    return next((step for step, value in zip(steps, loss) if value is not None and value < level), None)


def budgeted_length(run: dict) -> int:
    """Plateau length, or the budget for a censored run."""
    return run["steps"][-1] if run["censored"] else run["plateau_length"]


def score_change(run: dict) -> float | None:
    """Weights score at the headline block, end minus start; None for a run that diverged."""
    return None if run["final_weights_score"] is None else run["final_weights_score"] - run["initial_weights_score"]


def mean_loss(run: dict) -> float | None:
    """Held-out loss averaged over the training, in units of the best loss without context and never counted above it: 1 = nothing
    learnt from the context. It needs no line, and no budget cuts it off. None: diverged."""
    if None in run["loss"]:
        return None
    steps, loss = (torch.tensor(run[key], dtype=torch.float64) for key in ("steps", "loss"))
    return torch.trapezoid((loss / run["no_context_loss"]).clamp(max=1), steps).item() / run["steps"][-1]


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Spearman's rho, ties averaged; None when one side is constant."""
    ranks = lambda v: [sum(y < x for y in v) + (sum(y == x for y in v) - 1) / 2 for x in v]
    try:
        return round(statistics.correlation(ranks(a), ranks(b)), 3)
    except statistics.StatisticsError:
        return None


def summarise(runs: list[dict]) -> list[dict]:
    """One row per arm, difficulty, learning rate and size: every plateau length, the median, and two paired differences by seed.

    Censored runs count as their budget, so a median equal to it means 'at least'. best_lr marks the rate with the shortest
    median plateau of its arm and difficulty (ties: lowest final loss; chosen on the same seeds that are reported).
    paired_differences: to the baseline at the same rate; ..._best: at its own best rate, given where the arm is at its best;
    paired_mean_losses...: the same of mean_loss; None where one of the two diverged.
    """
    key = lambda run: (run["arm"], run["difficulty"], run["lr"], run.get("size"))
    median = lambda values: statistics.median(values) if values else None
    groups = {group: [run for run in runs if key(run) == group] for group in dict.fromkeys(map(key, runs))}
    rows = []
    for group, mine in groups.items():
        changes = number([*map(score_change, mine)], 4)  # None: diverged
        rows.append({
            "arm": group[0], "difficulty": group[1], "lr": group[2], "size": group[3], "n": len(mine),
            "plateau_length_median": median(list(map(budgeted_length, mine))),
            "plateau_lengths": [run["plateau_length"] for run in mine], "censored": sum(run["censored"] for run in mine),
            "weights_score_change_median": median([value for value in changes if value is not None]), "weights_score_changes": changes,
            "final_loss_median": number(median([math.inf if run["loss"][-1] is None else run["loss"][-1] for run in mine])),
        })  # fmt: skip
    for row in rows:
        rivals = [r for r in rows if all(r[k] == row[k] for k in ("arm", "difficulty", "size"))]
        rank = lambda r: (r["plateau_length_median"], math.inf if r["final_loss_median"] is None else r["final_loss_median"])
        row["best_lr"] = row is min(rivals, key=rank)
    best = {(row["difficulty"], row["size"]): row["lr"] for row in rows if row["best_lr"] and row["arm"] == "baseline"}
    for row, mine in zip(rows, groups.values()):
        own_best = best.get((row["difficulty"], row["size"])) if row["best_lr"] else None
        for name, lr in (("", row["lr"]), ("_best", own_best)):
            baseline = groups.get(("baseline", row["difficulty"], lr, row["size"]), []) if row["arm"] != "baseline" else []
            partner = {run["seed"]: run for run in baseline}
            pairs = [(run, partner[run["seed"]]) for run in mine if run["seed"] in partner]
            row[f"paired_differences{name}"] = [budgeted_length(run) - budgeted_length(other) for run, other in pairs]
            row[f"paired_differences{name}_median"] = median(row[f"paired_differences{name}"])
            losses = [(mean_loss(run), mean_loss(other)) for run, other in pairs]
            row[f"paired_mean_losses{name}"] = number([None if None in pair else pair[0] - pair[1] for pair in losses])
    return rows


def at_best_rate(metrics: dict, **only) -> list[dict]:
    """The runs at the best learning rate of their arm, difficulty and size; only those with these values."""
    key = lambda row: (row["arm"], row["difficulty"], row["lr"], row.get("size"))
    best = {key(row) for row in metrics["summary"] if row["best_lr"]}
    return [run for run in metrics["runs"] if key(run) in best and all(run.get(k) == v for k, v in only.items())]


def rate(lr: float) -> str:
    """As it is typed on a command line: 5e-4."""
    digits, power = f"{lr:e}".split("e")
    return f"{float(digits):g}e{int(power)}" if lr < 0.01 else f"{lr:g}"


def table(metrics: dict) -> str:
    """The summary as a Markdown table (those of the README): a row per arm at its best rate, its differences at all rates last."""
    rows, rates = metrics["summary"], metrics["args"]["lr"]
    steps = lambda values: " ".join("-" if v is None else f"{v:,}" for v in values)
    wide = lambda key: len({row[key] for row in rows}) > 1
    alike = lambda row, arm: [r for r in rows if (r["arm"], r["difficulty"], r["size"]) == (arm, row["difficulty"], row["size"])]
    score = "read-out error" if symbol(metrics) == "d" else "weights score"
    lines = []
    for row in [row for row in rows if row["best_lr"]]:
        cells = {name: str(row[key]) for name, key in (("size", "size"), (symbol(metrics), "difficulty"), ("arm", "arm")) if wide(key)}
        cells |= {
            "best rate": rate(row["lr"]),
            "plateau length, every seed": steps(row["plateau_lengths"]),
            "median": f"{row['plateau_length_median']:,.0f}",
            "left": f"{row['n'] - row['censored']} of {row['n']}",
            f"{score}, end minus start": " ".join("-" if v is None else f"{v:+.3f}" for v in row["weights_score_changes"]),
        }
        if wide("arm"):
            mine, baseline = alike(row, row["arm"]), alike(row, "baseline")
            best = differences(row, "paired_differences_best", [b for b in baseline if b["best_lr"]])
            best += f" ({row['paired_differences_best_median']:+,.0f})" if best else ""
            cells["steps against the baseline, both at their best rate"] = best
            if len(rates) > 1:
                at_rate = [differences(r, "paired_differences", [b for b in baseline if b["lr"] == r["lr"]]) for r in mine]
                cells[f"both at {'; '.join(map(rate, rates))}"] = "; ".join(filter(None, at_rate))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *[cells.values() for cells in lines]))


def verdicts(metrics: dict) -> str:
    """In words, a line per arm, difficulty and size, against the baseline, both at their best rate: in how many seeds it leaves the
    plateau sooner, and in how many its mean loss is lower. Pairs with a diverged run have no mean loss."""
    lines = []
    for row in [row for row in metrics["summary"] if row["paired_differences_best"]]:
        steps, losses = row["paired_differences_best"], [v for v in row["paired_mean_losses_best"] if v is not None]
        (sooner, later), (lower, higher) = signs(steps), signs(losses)
        line = f"{row['arm']}, {symbol(metrics)} = {row['difficulty']}" + f", {row['size']}" * bool(row["size"])
        line += f": leaves sooner than the baseline in {sooner} of {len(steps)} seeds, later in {later} "
        line += f"(sign test p = {sign_test(sooner, later):.2g}), median {row['paired_differences_best_median']:+,.0f} steps"
        if losses:
            line += f"; mean loss lower in {lower} of {len(losses)}, higher in {higher} (p = {sign_test(lower, higher):.2g}), "
            line += f"median {statistics.median(losses):+.2g}"
        lines.append(line + f"; {len(steps) - len(losses)} of the pairs diverged" * (len(losses) < len(steps)))
    if lines and all(row["censored"] == row["n"] for row in metrics["summary"]):
        lines.append("note: no run left the plateau within --steps, so its length says nothing yet")
    if lines and len(metrics["args"]["lr"]) == 1:
        lines.append("note: one learning rate, which may suit one arm more than another; give several, as in --lr 5e-4 1e-3 2e-3")
    return "\n".join(lines)


def signs(values: list[float]) -> tuple[int, int]:
    """How many are below and above zero: of paired differences, how many are better and worse."""
    return sum(value < 0 for value in values), sum(value > 0 for value in values)


def sign_test(less: int, more: int) -> float:
    """Two-sided p-value of so many signs if either were as likely; pairs without a difference do not count."""
    n = less + more
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(less, more) + 1)) / 2**n)


def symbol(metrics: dict) -> str:
    """What a difficulty is called: m mappings, or d dimensions."""
    return "d" if metrics["args"].get("task") == "linear" else "m"


def differences(row: dict, key: str, baseline: list[dict]) -> str:
    """The paired differences of a row of the summary in print, a dot where neither run left the plateau; baseline: its row or none."""
    lengths = zip(row["plateau_lengths"], baseline[0]["plateau_lengths"] if baseline else [])
    shown = lambda value, own, other: "\u00b7" if own is other is None else f"{value:+,}" if value else "0"
    return " ".join(shown(value, *pair) for value, pair in zip(row[key], lengths))


# ---------------------------------------------------------------------------------------------- the record


class Record:
    """The curves and scores of all runs, their checkpoint, and the content of metrics.json.

    runs: one dict per run with at least arm, difficulty, lr, seed. Every run is judged on the plain target task of its own
    difficulty, on held-out sequences drawn once from its seed, whatever it is trained on.
    args: the script's flags; used here: pairs, steps, evaluations, probes, out, resume, max_minutes.
    checkpoint: its file name in args.out. sequences: how many a run is judged on.
    """

    may_change = ("out", "device", "resume", "replot", "overwrite", "max_minutes")  # flags that a resumed run may change
    kept = ("steps", "loss", "accuracy", "probe_steps", "scores", "loss_by_position", "accuracy_by_position", "fresh_accuracy", "seconds")

    def __init__(self, args, runs: list[dict], world, model, optimizer, checkpoint: str = "checkpoint.pt", sequences: int = 64):
        self.args, self.runs, self.world, self.model, self.optimizer, self.budget = args, runs, world, model, optimizer, args.steps
        self.settings = {"script": Path(sys.argv[0]).name, "processes": PROCESSES}
        self.settings |= {key: jsonable(value) for key, value in vars(args).items() if key not in self.may_change}
        evaluations = min(args.evaluations, args.steps)
        self.due = sorted({round(i * args.steps / evaluations) for i in range(evaluations + 1)})
        probings = min(args.probes, evaluations)
        self.due_probes = {self.due[round(i * evaluations / probings)] for i in range(probings + 1)}
        device, difficulty = next(model.parameters()).device, [run["difficulty"] for run in runs]
        seed = torch.tensor([run["seed"] for run in runs], device=device)
        known = {key: world.references(*key, args.pairs) for key in dict.fromkeys(zip(seed.tolist(), difficulty))}
        self.references = [known[key] for key in zip(seed.tolist(), difficulty)]
        if min(level["no_context_loss"] for level in self.references) < 1e-6:
            raise UsageError("--difficulty 1 with one asked factor: nothing is left for the context; ask two factors (--ask) or raise it")
        numbers = HELD_OUT + torch.arange(sequences, device=device).expand(len(runs), -1)
        self.held_out = world.sample(seed, mappings(difficulty, device), numbers, args.pairs, held_out=True)
        self.free = [level["no_context_loss"] for level in self.references]  # (run)
        if not world.n_label:  # predicting zero on the very sequences a run is judged on: w differs between them
            self.free = world.loss(torch.zeros_like(self.held_out.y), self.held_out).mean((1, 2)).tolist()
        else:
            self.fresh = world.sample(seed, mappings([math.inf] * len(runs), device), numbers, args.pairs, held_out=True)
        self.prober = Prober(world, seed, mappings(difficulty, device), args.pairs)
        self.block = max(1, round(model.config.n_layer / 4)) - 1  # whose score is quoted: the paper's third of 12, or the nearest quarter
        self.steps, self.loss, self.accuracy, self.probe_steps, self.scores = [], [], [], [], []
        self.loss_by_position = self.accuracy_by_position = self.fresh_accuracy = None
        self.path = Path(args.out) / checkpoint
        self.seconds = {"total": 0.0, "probing": 0.0}
        self.mark = None

    def training_steps(self):
        """The steps to train, one by one. In between: measure, print, save a checkpoint every minute, stop at the time limit.

        Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the process ends with code 130 or 143; a second Ctrl-C ends it
        at once.
        """
        first = self.load_checkpoint(self.path) if self.args.resume else 0
        if not self.args.resume and self.path.stem.endswith(("checkpoint", "-0")):  # the first program of this process
            for old in earlier_files(self.path.parent):
                old.unlink(missing_ok=True)
        if not RANK:
            print(f"{len(self.runs)} runs x {self.budget} steps: {self.settings}", flush=True)
        CAUGHT.clear()
        before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from self.steps_from(first)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def catch(self, number: int, _) -> None:
        CAUGHT.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            os.write(2, b"finishing this step; Ctrl-C again to stop at once\n")

    def steps_from(self, first: int):
        began, before, saved = time.perf_counter(), self.seconds["total"], -math.inf  # the first save at once: what dies early can resume
        for step in range(first, self.budget + 1):
            stop = step == self.budget
            if step in self.due and step not in self.steps and not CAUGHT:
                self.measure(step)
                if not RANK:
                    print(self.line(first, time.perf_counter() - began), flush=True)
                stop = stop or (step > first and time.perf_counter() - BEGAN > 60 * self.args.max_minutes)
            if stop or CAUGHT or time.perf_counter() - saved > SAVE_SECONDS:
                self.seconds["total"] = before + time.perf_counter() - began
                self.save_checkpoint(self.path, step)
                saved = time.perf_counter()
            if CAUGHT:
                if not RANK:
                    print(f"stopped at step {step}: the same command with --resume goes on", file=sys.stderr)
                sys.exit(128 + CAUGHT[0])
            if stop:
                return
            yield step

    def measure(self, step: int) -> None:
        """Evaluate all runs, and probe them when it is time."""
        self.loss_by_position, self.accuracy_by_position = evaluate(self.model, self.world, self.held_out)
        loss = self.loss_by_position.mean(1)
        broken = ~loss.isfinite()  # a run that blew up has no accuracy and no score
        self.accuracy_by_position = self.accuracy_by_position.masked_fill(broken[:, None], math.nan)
        for r in broken.nonzero()[:, 0].tolist():
            if not self.loss or math.isfinite(self.loss[-1][r]):
                print(f"warning: non-finite loss at step {step} in run {self.runs[r]}: its curve stops, the others go on")
        self.steps.append(step)
        self.loss.append(loss.tolist())
        self.accuracy.append(self.accuracy_by_position.mean(1).tolist())
        if step in self.due_probes:
            began = time.perf_counter()
            self.probe_steps.append(step)
            blank = lambda score: score.masked_fill(broken.view(-1, *[1] * (score.dim() - 1)), math.nan)
            self.scores.append({key: blank(score).tolist() for key, score in self.prober(self.model).items()})
            if self.world.n_label:
                self.fresh_accuracy = blank(evaluate(self.model, self.world, self.fresh)[1].mean(1))
            self.seconds["probing"] += time.perf_counter() - began

    def line(self, first: int, seconds: float) -> str:
        """The newest evaluation: medians over seeds and rates of loss, accuracy and weights score, speed, time left."""
        loss, accuracy = self.loss[-1], self.accuracy[-1]
        weights = [blocks[self.block] for blocks in self.scores[-1]["weights_score"]]
        step, symbol = self.steps[-1], "m" if self.world.n_label else "d"
        arms = [" ".join([run["arm"]] * (run["arm"] != "baseline") + [f"{symbol}={run['difficulty']:.0f}"]) for run in self.runs]
        parts = []
        for arm in dict.fromkeys(arms):
            alive = lambda values: [v for v, other in zip(values, arms) if other == arm and math.isfinite(v)] or [math.nan]
            median = [statistics.median(alive(values)) for values in (loss, accuracy, weights)]
            parts.append(f"{arm} {median[0]:.2f} " + f"{median[1]:3.0%} " * bool(self.world.n_label) + f"{median[2]:.2f}")
        self.mark = self.mark or (step, seconds) if step > first else None  # the first interval holds the compilation
        pace = (seconds - self.mark[1]) / (step - self.mark[0]) if self.mark and step > self.mark[0] else 0
        left = f"{1000 * pace:.0f} ms/step, {(self.budget - step) * pace / 60:.1f} min left"
        left = left if pace else "medians of held-out loss, " + "accuracy, " * bool(self.world.n_label) + "weights score"
        return f"{step:6d} {step / self.budget:4.0%} | " + " | ".join(parts) + f" | {left}"

    def save_checkpoint(self, path: Path, step: int) -> None:
        state = {"settings": self.settings, "step": step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"runs": self.runs, "code": script_hash()}
        state["record"] = {key: getattr(self, key) for key in self.kept}
        write_aside(path, lambda aside: torch.save(state, aside))

    def load_checkpoint(self, path: Path) -> int:
        """Restore everything; returns the step to go on from. UsageError if there is none or it is of other settings."""
        if not path.exists():
            raise UsageError(f"--resume: no checkpoint at {path}; use the same flags and processes, or start afresh with --overwrite")
        if not os.access(path, os.R_OK):
            raise UsageError(f"--resume: {path} may not be read; change its permissions or choose another --out")
        try:
            state = torch.load(path, map_location=self.held_out.x.device, weights_only=True)
            then = state["settings"]
            other = [key for key in self.settings | then if self.settings.get(key) != then.get(key)]
            if other:
                named = lambda key: key if key in ("script", "processes") else f"--{key.replace('_', '-')}"
                flags = ", ".join(f"{named(key)} (then {then.get(key)}, now {self.settings.get(key)})" for key in other)
                raise UsageError(f"--resume: the checkpoint was made with other settings: {flags}; use the same flags or another --out")
            if state["runs"] != self.runs:
                raise UsageError("--resume: the checkpoint holds other runs: the script's arms have changed; start afresh with --overwrite")
            if state["code"] != script_hash() and not RANK:
                print("note: the script has changed since its checkpoint was saved")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for key in self.kept:
                setattr(self, key, state["record"][key])
            return state["step"]
        except (UsageError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of a torn file torch makes an OSError or a RuntimeError
            raise UsageError(f"--resume: {path} is damaged or not of this script; start afresh with --overwrite") from None

    def finished_runs(self) -> list[dict]:
        """The runs of metrics.json."""
        by_run = lambda rows: number([*map(list, zip(*rows))])  # [time][run] ... -> [run][time] ...
        loss, accuracy = by_run(self.loss), by_run(self.accuracy)
        scores = {key: by_run(s[key] for s in self.scores) for key in self.scores[0]}  # [run][probe][block], some [factor]
        if not self.world.n_label:  # on the very sequences that the runs are judged on
            count, last = len(self.held_out.y[0]), "least_squares_loss_by_position"
            keys = {(run["seed"], run["difficulty"]) for run in self.runs}
            least_squares = {key: self.world.references(*key, self.args.pairs, count)[last][-1] for key in keys}
        out = []
        for r, (run, level, free, losses) in enumerate(zip(self.runs, self.references, self.free, loss)):
            length = plateau_length(self.steps, losses, ESCAPE * free)
            row = {
                **run,
                "difficulty": int(run["difficulty"]) if math.isfinite(run["difficulty"]) else "inf",
                "steps": self.steps,
                "loss": losses,
                "loss_by_position": number(self.loss_by_position[r].tolist()),
                "probe_steps": self.probe_steps,
                **{key: value[r] for key, value in scores.items()},
                "no_context_loss": number(free),
                "plateau_length": length,
                "censored": length is None,
                "diverged": losses[-1] is None,
                "plateau_length_other_rules": {
                    "0.9": plateau_length(self.steps, losses, 0.9 * free),
                    "0.7": plateau_length(self.steps, losses, 0.7 * free),
                    "zucchet": plateau_length(self.steps, losses, 0.2 * (losses[0] or 0)),
                },
            }
            if self.world.n_label:
                row["accuracy"], row["accuracy_by_position"] = accuracy[r], number(self.accuracy_by_position[r].tolist())
                row["fresh_accuracy"] = number(self.fresh_accuracy[r].item())
                enough = COMPLETE * level["bayes_accuracy"]
                row["completion_step"] = next((step for step, a in zip(self.steps, accuracy[r]) if (a or 0) >= enough), None)
            else:  # at the last position, in squared error / d
                row["completion_step"] = plateau_length(self.steps, losses, level["bayes_loss"] + 0.1)
                row["gap_to_least_squares"] = number(self.loss_by_position[r, -1].item() - least_squares[run["seed"], run["difficulty"]])
            row["headline_block"] = self.block
            row["initial_weights_score"] = row["weights_score"][0][self.block]
            row["final_weights_score"] = row["weights_score"][-1][self.block]
            out.append(row)
        return out

    def metrics(self, device: torch.device) -> dict:
        """What one program has to say; train_programs makes metrics.json of it."""
        return {
            "script": Path(sys.argv[0]).name,
            "args": {key: jsonable(value) for key, value in vars(self.args).items()},
            "environment": environment(device, self.seconds),
            "finished": self.steps[-1] == self.budget,
            "weights_score_is": "accuracy, higher is better" if self.world.n_label else "normalised error, lower is better",
            "headline_block": self.block,
            "raw_embedding_score": self.prober.raw_score,
            "chance_weights_score": number(self.prober.chance),
            "levels": self.references,
            "runs": self.finished_runs(),
        }


# ---------------------------------------------------------------------------------------------- panels


def curves(ax, groups: dict, x: str, y) -> None:
    """Draw the curves y(run) over run[x]: every seed a thin line, the median over seeds bold. groups: label -> (colour, runs)."""
    for label, (colour, runs) in groups.items():
        stack = np.array([y(run) for run in runs], float)  # None becomes NaN
        ax.plot(runs[0][x], stack.T, color=colour, lw=0.7, alpha=0.4)
        ax.plot(runs[0][x], middle(stack, 0), color=colour, lw=2.2, label=label)


def middle(stack: np.ndarray, axis: int) -> np.ndarray:
    """Median over the seeds that have not diverged."""
    return np.ma.median(np.ma.masked_invalid(stack), axis)


def draw_lengths(ax, runs: list[dict], place: float, colour, width: float, flip: bool = False) -> None:
    """Plateau length of every run side by side around x = place (flip: y), a hollow triangle = not in time; the bar is the median."""
    for i, run in enumerate(runs):
        at = place + width * ((i + 0.5) / len(runs) - 0.5), budgeted_length(run)
        ax.plot(*(at[::-1] if flip else at), color=colour, ms=5, **(dict(marker="^", mfc="none") if run["censored"] else dict(marker="o")))
    median = statistics.median(map(budgeted_length, runs))
    (ax.vlines if flip else ax.hlines)(median, place - width / 2, place + width / 2, color=colour, lw=3)


def draw_groups(ax, names: list, groups: dict) -> None:
    """draw_lengths of several arms beside each other at every name. groups: label -> (colour, one list of runs per name)."""
    for k, (label, (colour, lists)) in enumerate(groups.items()):
        for place, runs in enumerate(lists):
            if runs:
                draw_lengths(ax, runs, place + 0.8 * ((k + 0.5) / len(groups) - 0.5), colour, 0.6 / len(groups))
        ax.plot([], [], color=colour, lw=3, label=label)
    ax.set_xticks(range(len(names)), [str(name).replace("inf", "\u221e") for name in names])
    ax.set(ylabel="plateau length in steps (\u25b3: still on it)", ylim=(0, 1.04 * ax.get_ylim()[1]), xlim=(-0.5, len(names) - 0.5))


def draw_arms(metrics: dict, title: str, target: bool = True):
    """The five panels that every comparison of arms needs, for the hardest difficulty and the last size; a sixth is left to the script.

    target: name the difficulty in the heading.

    Returns figure, sixth axes, colour of each arm.
    """
    rates, last = metrics["args"]["lr"], metrics["runs"][-1]
    m, size, block = last["difficulty"], last.get("size"), last["headline_block"]
    here = [run for run in metrics["runs"] if (run["difficulty"], run.get("size")) == (m, size)]
    at_best = at_best_rate(metrics, size=size)
    best = {run["arm"]: run["lr"] for run in at_best if run["difficulty"] == m}
    others, colours = itertools.cycle([*plt.cm.tab10.colors[3:], *plt.cm.Set2.colors]), {}
    for arm in best:
        known = COLOURS.get(re.sub(r":[^+]*$", "", arm))  # weights:0.1 is weights
        colours[arm] = known if known and known not in colours.values() else next(others)
    mine = lambda arm, lr: [run for run in here if (run["arm"], run["lr"]) == (arm, lr)]
    label = lambda arm, lr: f"{arm} (lr {rate(lr)})" if len(rates) > 1 else arm
    groups = {label(arm, lr): (colours[arm], mine(arm, lr)) for arm, lr in best.items()}
    budget, level, score = last["steps"][-1], metrics["reference"][str(m)], lambda key: lambda run: [row[block] for row in run[key]]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    a, b, c, d, e, f = axes.flat
    left = ", ".join(f"{arm} {sum(not run['censored'] for run in runs)} of {len(runs)}" for arm, (_, runs) in zip(best, groups.values()))
    heading = title + f"; target {symbol(metrics)} = {m}".replace("inf", "\u221e") * target + f", {size}" * bool(size)
    figure.suptitle(f"{heading}. Runs that left the plateau: {left}")

    relative = lambda run: level["no_context_loss"] / run["no_context_loss"]  # runs differ a little in what zero knowledge gives
    curves(a, groups, "steps", lambda run: [v and v * relative(run) for v in run["loss"]])
    marks = {"no_context_loss": "best without context", "pairwise_loss": "each pair by itself", "bayes_loss": "exact Bayes"}
    for value, text in [(level[key], text) for key, text in marks.items() if key in level]:
        a.axhline(value, color="black", ls="--", lw=1)
        a.text(budget, value, text, ha="right", va="bottom", **READABLE)
    a.axhline(ESCAPE * level["no_context_loss"], color="black", ls=":", lw=1)
    a.text(0.01 * budget, ESCAPE * level["no_context_loss"], "below: plateau is over", va="bottom", **READABLE)
    a.set(title="(a) Target task, each arm at its best rate", xlabel="step", ylabel="held-out loss", xlim=0,
          ylim=(0, max(1.3 * level["no_context_loss"], *(1.05 * (run["loss"][0] or 0) for run in here))))  # fmt: skip
    a.legend(fontsize=7, loc="lower left")
    curves(b, groups, "probe_steps", score("weights_score"))
    b.axhline(np.median([run["initial_weights_score"] for run in here]), color="black", ls="--", lw=1)
    error = "error" in metrics.get("weights_score_is", "")
    b.set(title=f"(b) Weights component (block {block + 1}); dashed: at initialisation", xlabel="step", xlim=0,
          ylabel="weights score: error, lower is better" if error else "weights score", yscale="log" if error else "linear")  # fmt: skip
    curves(c, groups, "probe_steps", score("spread"))
    c.set(title="(c) Spread of the states", xlabel="step", ylabel="spread", xlim=0, yscale="log")
    c.yaxis.set_major_formatter("{x:g}")
    c.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # 5, not 5 x 10^0
    for place, (colour, runs) in enumerate(groups.values()):
        draw_lengths(d, runs, place, colour, 0.5, flip=True)
    d.set_yticks(range(len(groups)), list(groups))
    d.invert_yaxis()
    d.set(title="(d) Plateau length (\u25b3: still on it at the end; bar: median)", xlabel="steps", xlim=(0, 1.05 * budget))
    difficulties = list(dict.fromkeys(run["difficulty"] for run in metrics["runs"]))
    if len(difficulties) == len(rates) == 1:  # nothing to compare: what is there at all?
        curves(e, groups, "probe_steps", score("weights_score_converged"))
        e.set(title="(e) Weights component, converged probe", xlabel="step", xlim=0, ylabel=b.get_ylabel())
        return figure, f, colours
    if len(difficulties) == 1:
        against, places, of, name = "learning rate", sorted(rates), mine, rate
    else:
        against, places, name = "difficulty", difficulties, str
        of = lambda arm, difficulty: [run for run in at_best if (run["arm"], run["difficulty"]) == (arm, difficulty)]
    draw_groups(e, [*map(name, places)], {arm: (colour, [of(arm, place) for place in places]) for arm, colour in colours.items()})
    e.set(title=f"(e) Plateau length against {against}", xlabel=against)
    return figure, f, colours


# ---------------------------------------------------------------------------------------------- one command


def command(arguments, runs_of, train, plot, conclude=lambda metrics: {}) -> None:
    """What every script does: read the flags, train, write metrics.json, draw figure.png. An error is one line and exit code 2.

    arguments() -> args; runs_of(args) -> a dict per run; train(args, runs, checkpoint name) -> Record.metrics of one program;
    plot(metrics, path); conclude(metrics) -> further keys for metrics.json.
    """
    code = 2
    try:
        args = arguments()
        out = Path(args.out)
        if not args.replot:
            prepare_out(args)
            metrics = train_programs(args, runs_of(args), train)
            if metrics is None:  # stopped before the end, or not the first process of torchrun
                return
            save_json(out / "metrics.json", metrics | conclude(metrics))
        metrics = read_metrics(out)
        try:
            if args.replot:  # an older one may lack keys
                metrics["summary"] = summarise(metrics["runs"])
            print("\n\n".join(filter(None, (table(metrics), verdicts(metrics)))))
            arms = {row["arm"] for row in metrics["summary"]}
            if len(arms) > 1 and "baseline" not in arms:
                print("note: no arm is called baseline, so nothing is paired")
            plot(metrics, out / "figure.png")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if not args.replot:
                raise
            here = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == Path(__file__).parent]
            where = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}, {Path(here[-1].filename).name} line {here[-1].lineno}"
            raise UsageError(f"--replot: metrics.json in {out} is not what this script writes, or plot has a mistake ({where})") from None
        return
    except (UsageError, OSError) as error:  # OSError: a folder that torch or the system keeps its own files in
        message = f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if CAUGHT:  # Ctrl-C reached the compiler as well
            message, code = "interrupted", 128 + CAUGHT[0]
        elif out_of_memory(error):
            message = "error: out of memory; add --overwrite and --runs-per-program (several programs) or a smaller --batch"
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            message = f"error: torch.compile failed ({str(error).splitlines()[0]}); add --overwrite and --no-compile"
        else:
            raise
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def train_programs(args, runs: list[dict], train) -> dict | None:
    """The content of metrics.json; its keys are the same in every script.

    None on all processes of torchrun but the first, and where --max-minutes stopped the training: then what there is has been saved.

    Runs are dealt out to the processes, and cut into programs of one size and at most --runs-per-program runs (0: all).
    train(args, runs, checkpoint name) trains one program and returns Record.metrics. Processes meet only at the end.
    """
    every = dict.fromkeys(key for run in runs for key in run)
    for run in runs:
        missing = [key for key in every if key not in run]
        if missing:
            raise UsageError(f"arm {run['arm']} has no {missing[0]}: in arms() give every arm every key, the baseline too")
    names = [tuple(str(run.get(key)) for key in ("arm", "difficulty", "lr", "seed", "size")) for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"two runs are called {' '.join(twice[0][:4])} (arm, difficulty, lr, seed): give every arm a name of its own")
    mine = list(enumerate(runs))[RANK::PROCESSES]
    programs = []
    for _, group in itertools.groupby(mine, lambda pair: pair[1].get("size")):
        group = list(group)
        most = args.runs_per_program or len(group)
        programs += [group[i : i + most] for i in range(0, len(group), most)]
    parts = []
    for k, program in enumerate(programs):
        name = "checkpoint.pt" if PROCESSES == len(programs) == 1 else f"checkpoint-{RANK}-{k}.pt"
        resume = args.resume and (k == 0 or (Path(args.out) / name).exists())  # stopped before this one: start it
        if len(programs) > 1 and not RANK:
            print(f"program {k + 1} of {len(programs)}", flush=True)
        part = train(type(args)(**vars(args) | {"resume": resume}), [run for _, run in program], name)
        parts.append(part | {"numbers": [i for i, _ in program]})
        if not part["finished"]:
            break
    if PROCESSES > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to finish waits for the last
        everyone = [None] * PROCESSES
        dist.gather_object(parts, None if RANK else everyone)
        dist.destroy_process_group()
        if RANK:
            return None
        parts = sum(everyone, [])
    ordered = sorted((i, run, level) for part in parts for i, run, level in zip(part["numbers"], part["runs"], part["levels"]))
    levels: dict[str, list] = {}
    for _, run, level in ordered:
        levels.setdefault(str(run["difficulty"]), []).append(level)
    mean = lambda group: {key: np.mean([level[key] for level in group], 0).round(6).tolist() for key in group[0]}
    metrics = parts[0] | {"finished": len(ordered) == len(runs) and all(part["finished"] for part in parts)}
    metrics["environment"] |= {key: round(sum(part["environment"][key] for part in parts), 1) for key in ("seconds", "probing_seconds")}
    metrics["reference"] = {key: mean(group) for key, group in levels.items()}
    metrics["runs"] = [run for _, run, _ in ordered]
    scores = [part["raw_embedding_score"] for part in parts for _ in part["runs"]]
    metrics["raw_embedding_score"] = None if None in scores else number(statistics.mean(scores), 4)
    metrics["summary"] = summarise(metrics["runs"]) if metrics["finished"] else []
    del metrics["levels"], metrics["numbers"]
    if not metrics["finished"]:
        save_json(Path(args.out) / "metrics.json", metrics)
        print("stopped before the end: the same command with --resume goes on, and then draws the figure")
        return None
    return metrics


def environment(device: torch.device, seconds: dict) -> dict:
    """Where and when the numbers come from."""
    here = Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=here).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD") + " and changes" * bool(git("status", "--porcelain", "--", "*.py"))
    except OSError:
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "commit": commit or None,
        "argv": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name,
        "seconds": round(seconds["total"], 1),
        "probing_seconds": round(seconds["probing"], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def jsonable(value):
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return "inf" if value == math.inf else value


def number(value, digits: int = 6):
    """A number, or nested lists of them, for JSON, which has no NaN: a run that diverged has null from there on."""
    if isinstance(value, list):
        return [number(v, digits) for v in value]
    return round(value, digits) if value is not None and math.isfinite(value) else None


def out_of_memory(error: Exception) -> bool:
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of a CPU, of CUDA, of its libraries
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


# ---------------------------------------------------------------------------------------------- files


def prepare_out(args) -> None:
    """Make the folder --out and see that it can be written and holds nothing that would be lost, before anything is trained."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    there = [*out.glob("metrics.json"), *earlier_files(out)]
    if there and not (args.resume or args.overwrite):
        raise UsageError(f"--out {out}: {there[0].name} of an earlier training is there; choose another folder, go on with it (--resume), "
                         "or replace it (--overwrite)")  # fmt: skip


def earlier_files(out: Path) -> list[Path]:
    """What an earlier training left, of this process; other processes of torchrun may be writing theirs already."""
    own = ["checkpoint.pt", f"checkpoint-{RANK if PROCESSES > 1 else '[0-9]*'}-[0-9]*.pt"]
    mine = [*own, *(f".{pattern}.*.pt" for pattern in own)]  # with a dot: killed while saving
    return [path for pattern in mine + ([] if RANK else ["metrics.json", "figure.png"]) for path in out.glob(pattern)]


def script_hash() -> str:
    try:
        return hashlib.sha256(Path(sys.argv[0]).read_bytes()).hexdigest()
    except OSError:
        return ""


def read_metrics(out: Path) -> dict:
    try:
        metrics = dict(json.loads((out / "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"--replot: no readable metrics.json in {out}; train first, or give its folder with --out") from None
    if metrics.get("script") != Path(sys.argv[0]).name:
        raise UsageError(f"--replot: {out} holds the metrics of {metrics.get('script')}; give another --out")
    if not metrics.get("finished"):
        raise UsageError(f"--replot: the training in {out} is not finished; go on with --resume")
    return metrics


def save_json(path: Path, content: dict) -> None:
    write_aside(path, lambda aside: aside.write_text(json.dumps(content, allow_nan=False) + "\n"))


def save_figure(path: Path, figure) -> None:
    write_aside(path, lambda aside: figure.savefig(aside, dpi=80))
    plt.close(figure)


def write_aside(path: Path, write) -> None:
    """write(temporary path), then move it into place: a reader never sees half a file. UsageError if that cannot be done."""
    aside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        if isinstance(error, RuntimeError) and (out_of_memory(error) or str(error).startswith("CUDA")):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UsageError(f"--out {path.parent}: {path.name} cannot be written ({reason}); make room or choose another folder") from None
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- flags


def script_parser(file: str, about: str, scales: dict, images: bool = True):
    """A parser with the flags that scripts share, those of the image world among them, and the group for those of one experiment."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags], explained by -h", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=defaults(scales), allow_abbrev=False
    )  # fmt: skip
    experiment = parser.add_argument_group("experiment")
    if images:
        world = parser.add_argument_group("world")
        world.add_argument("--embedding", help="pixels, code, vae, or a file.npz in the paper's layout (default code)")
        world.add_argument("--code-width", type=int, help="dimensions of the code embedding")
        world.add_argument("--code-gain", type=float, help="entanglement of the code embedding")
        world.add_argument("--factors", type=int, nargs=6, help="values per factor, 1 = constant")
        world.add_argument("--ask", choices=FACTORS, nargs="+", help="factors that may be asked; the others only vary")
        world.add_argument("--sequences", type=int, help="size of the training set of sequences, 0 = always fresh")
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=float, nargs="+", help="Adam's learning rate, one or several")
    training.add_argument("--steps", type=int, help="training steps, the budget")
    training.add_argument("--batch", type=int, help="sequences per step")
    training.add_argument("--n-head", type=int, help="attention heads")
    training.add_argument("--evaluations", type=int, help="points of a curve")
    training.add_argument("--probes", type=int, help="times the states are probed, after the start")
    run = parser.add_argument_group("run")
    run.add_argument("--seeds", type=int, default=3, help="runs per arm, seeds 0 .. n-1 (default 3)")
    run.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    run.add_argument("--out", default="out/" + Path(file).stem.removeprefix("exp_"),
                     help="folder of metrics.json, figure.png, checkpoint.pt (default out/ and the script's name)")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    run.add_argument("--overwrite", action="store_true", help="replace what an earlier training left in --out")
    run.add_argument("--replot", action="store_true", help="redraw figure.png from metrics.json, train nothing")
    run.add_argument("--max-minutes", type=float, default=math.inf,
                     help="stop cleanly at the first evaluation after this; --resume continues")  # fmt: skip
    run.add_argument("--scale", choices=("laptop", "paper"), default="laptop", help="which set of defaults (any flag overrides)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                     help="of training (auto: bf16 on a GPU that multiplies it, else fp32); measures are always fp32")  # fmt: skip
    run.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    run.add_argument("--runs-per-program", type=int, default=0, help="split what does not fit in memory; 0 = all runs in one program")
    return parser, experiment


def defaults(scales: dict) -> str:
    """For -h: what a scale (or task and scale) sets."""
    spelt = lambda v: " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in (v if isinstance(v, (list, tuple)) else [v]))
    lines = ["defaults:"]
    for scale, values in scales.items():
        name = scale if isinstance(scale, str) else "{1} (--task {0})".format(*scale)
        lines += [f"  --scale {name}", *textwrap.wrap(" ".join(f"--{k.replace('_', '-')} {spelt(v)}" for k, v in values.items()), 120,
                  initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)]  # fmt: skip
    return "\n".join(lines)


ALLOWED = (  # flags, what every value of them must satisfy, the same in words
    ("seeds steps batch pairs n_layer n_head d_model evaluations probes code_width words vocabulary texts",
     lambda v: 1 <= v <= 10**8, "must be a whole number from 1 to 100,000,000"),
    ("sequences runs_per_program", lambda v: 0 <= v <= 10**8, "must be a whole number from 0 to 100,000,000"),
    ("lr code_gain", lambda v: 0 < v < math.inf, "must be a positive number"),
    ("weight norm_weight noise", lambda v: 0 <= v <= 1e6, "must be a number from 0 to 1,000,000"),
    ("max_minutes", lambda v: v >= 0, "must be a number from 0 up"),
)  # fmt: skip


def check(args, scale: dict) -> None:
    """Fill in from the scale what was not given; then what every script asks of its flags: raises UsageError.

    Values given twice count once: n seeds are n different runs.
    """
    foreign = "unrelated" in getattr(args, "mix", ())  # that world is a code, of this gain
    if getattr(args, "embedding", None) not in (None, "code") and (args.code_width or (args.code_gain and not foreign)):
        raise UsageError(f"--code-width and --code-gain: have no meaning with --embedding {args.embedding}; leave them out")
    for name, value in scale.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for key, value in vars(args).items():
        flag, values = f"--{key.replace('_', '-')}", value if isinstance(value, list) else [value]
        if isinstance(value, list) and key != "factors":
            setattr(args, key, sorted(set(value)) if key == "difficulty" else list(dict.fromkeys(value)))  # figures draw the last
        for keys, fine, words in ALLOWED:
            if key in keys.split() and value is not None and not all(map(fine, values)):
                raise UsageError(f"{flag} {' '.join(map(str, values))}: {words}")
        whole_rows = lambda f: "mixture" not in getattr(args, "arm", ["mixture"]) or math.isclose(f * args.batch, round(f * args.batch))
        if key == "fraction" and not all(0 <= f <= 1 and whole_rows(f) for f in values):
            raise UsageError(f"{flag} {value}: must lie in 0 .. 1 and make a whole number of the {args.batch} sequences of a --batch")
        if key == "d_model" and any(v % args.n_head for v in values):
            raise UsageError(f"--n-head {args.n_head}: must divide --d-model {value}")
    if not args.out.strip():
        raise UsageError("--out: names no folder; give one, as in --out out/mine")
    if args.resume and args.overwrite:
        raise UsageError("--overwrite: starts afresh, --resume goes on; give one of them")
    if getattr(args, "task", None) == "linear" and max(args.difficulty) > 256:
        raise UsageError(f"--difficulty {max(args.difficulty):g}: with --task linear it is a dimension; give whole numbers from 1 to 256")
    unused = {"linear": ("embedding", "code_width", "code_gain", "factors", "ask"), "shapes": ("noise",)}
    for key in unused.get(getattr(args, "task", None), ()):
        if getattr(args, key) is not None:
            raise UsageError(f"--{key.replace('_', '-')}: has no meaning with --task {args.task}; leave it out")
    sequences = getattr(args, "sequences", 0)
    if 0 < sequences < args.batch:
        raise UsageError(f"--sequences {sequences}: must be 0 (always fresh) or at least --batch {args.batch}")
