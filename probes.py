"""What is measured, and the record that every script writes.

The weights component is what the weights alone make of ONE input, without any context. Its score: how well a linear
read-out finds the ASKED factors of a held-out image in the hidden state of that image (regression: returns x; error).
  weights_score             `alone`: a prompt of one image. Probe: Adam 1e-3, 782 steps of 128 raw states
  weights_score_identity    `identity`, the paper's: attention hands back its normed input in every block; same probe,
                            while the authors' steps hold 128 x 40 states
  weights_score_unasked     as weights_score, of the factors that vary but are never asked
  weights_score_converged   closed-form ridge on the standardised states: is the information there at all?
  weights_score_after_norm  the same after the LayerNorm through which the next block reads; lower only there: drowned
  spread, first_share, cosine, alike   of states: see `geometry`
The context score: how well which factor is asked (regression: w) is read in the second half of a sequence.
Everything is measured in fp32 on held-out data. An error is normalised: 1 = nothing known, LOWER is better.

    python probes.py assets/*.json > assets/results.md      tables and verdicts of trainings
"""

import argparse
import hashlib
import io
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures go to files, whatever a notebook has set

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn import functional as F

from tasks import FACTORS, HELD_OUT, UsageError, mapping_counts, ridge

try:
    import fcntl  # a lock that dies with its process
except ImportError:  # Windows
    fcntl = None
matplotlib.rcdefaults()  # the same figure for everybody; words of users are no formulas
matplotlib.rcParams |= {"text.parse_math": False, "text.usetex": False, "savefig.dpi": 90}

TORCHRUN = dist.is_torchelastic_launched()  # RANK and WORLD_SIZE of anything else are not meant for us
RANK, PROCESSES = (int(os.environ[key]) if TORCHRUN else n for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
SAVE_SECONDS = 60  # between two checkpoints
PROBE_STEPS, PROBE_BATCH, PROBE_RATE = 782, 128, 1e-3  # steps and rate of the paper
PROBE_ITEMS, MOST_TOKENS = 4096, 2**15  # states that a probe is trained on; tokens of one pass, which fit a cache
ESCAPE = 0.8  # of the best loss without context: Kim et al. (arXiv 2410.05448)
COMPLETE = 0.95  # of the Bayes accuracy; in regression: last loss within 0.1 of the Bayes loss
DAMAGE = 0.015  # a fall of the asked score by more; a standard error of 410 read-outs is 0.014 at 0.91, 0.024 at 0.6
SCORES = [f"weights_score{kind}" for kind in ("", "_identity", "_converged", "_after_norm")]  # in tables
MAY_CHANGE = ("out", "device", "no_compile", "resume", "replot", "overwrite")  # flags of a resumed training
COLOURS = 100 * "black tab:blue tab:orange tab:green tab:red tab:purple tab:brown tab:pink tab:olive".split()


def by_value(out: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Read-outs (..., f * v, i) -> (..., f, v, i), v = the largest of sizes; -inf for values that a factor lacks."""
    lacks = torch.arange(max(sizes))[:, None] >= torch.tensor(sizes)[:, None, None]
    return out.unflatten(-2, (len(sizes), -1)).masked_fill(lacks.to(out.device), -math.inf)


def read_score(out: torch.Tensor, target: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    """Accuracy (..., f) of read-outs (..., f * v, i) against values (..., i, f); sizes None: squared error (..., 1)
    over the variance of the numbers (..., i, c) that vary (padding does not)."""
    if sizes:
        return (by_value(out, sizes).argmax(-2) == target.mT).float().mean(-1)
    variance = target.var(-2, correction=0)
    error = (out.mT - target).square().mean(-2) * (variance > 0)
    return (error.sum(-1) / variance.sum(-1))[..., None]


@torch.no_grad()
def linear_probe(train, target, test, test_target, sizes: list[int] | None) -> torch.Tensor:
    """Held-out score (..., f) of linear read-outs, trained as the paper's: cross-entropy, Adam 1e-3, 782 steps.

    train (..., i, d) raw states, target (..., i, f) values, test and test_target likewise, sizes (f,) of factors;
    None: numbers, squared error. The gradient is written out: many small probes in one matmul make probing cheap.
    """
    wanted = F.one_hot(target, max(sizes)).flatten(-2).float() if sizes else target  # (..., i, c)
    d, generator = train.shape[-1], torch.Generator().manual_seed(0)
    start = [torch.rand((wanted.shape[-1], n), generator=generator) * 2 - 1 for n in (d, 1)]  # as nn.Linear, for all
    weight = (torch.cat(start, 1) * d**-0.5).to(train.device).repeat(*train.shape[:-2], 1, 1)  # last column: the bias
    items, batch = train.shape[-2], min(PROBE_BATCH, train.shape[-2])
    order = torch.randperm(items, generator=generator).to(train.device)
    order = torch.cat([order, order[: batch - 1]])  # so that a window may run over the end
    train, wanted = F.pad(train, (0, 1), value=1.0)[..., order, :], wanted[..., order, :].mT.contiguous()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, PROBE_STEPS + 1):
        at = t * batch % items  # pass after pass over the shuffled items
        x = train[..., at : at + batch, :]
        out = weight @ x.mT
        if sizes:
            out = by_value(out, sizes).softmax(-2).flatten(-3, -2)
        gradient = (out - wanted[..., at : at + batch]) @ x / batch
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient * gradient, 0.001)
        weight.addcdiv_(mean, (square / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-PROBE_RATE / (1 - 0.9**t))
    return read_score(weight @ F.pad(test, (0, 1), value=1.0).mT, test_target, sizes)


@torch.no_grad()
def converged_probe(train, target, test, test_target, sizes: list[int] | None) -> torch.Tensor:
    """As linear_probe, of the closed-form ridge read-out from standardised states: held-out score (..., f)."""
    mean, std = train.mean(-2, keepdim=True), train.std(-2, keepdim=True) + 1e-6
    a, b = (F.pad((s - mean) / std, (0, 1), value=1.0).double() for s in (train, test))
    wanted = (F.one_hot(target, max(sizes)).flatten(-2) if sizes else target).double()
    return read_score((b @ ridge(a, wanted, 1e-3 * a.shape[-2])).mT, test_target, sizes)


@torch.no_grad()
def states(model, x: torch.Tensor, y: torch.Tensor | None = None, mixing: str = "attention", first: int = 0):
    """Finite states after every block at the x from place `first` on: x (r, b, n, d) -> (r, k, b * (n - first), d)."""
    tokens = len(x) * x.shape[2] * (model.config.n_token + (y is not None))  # of one sequence, all runs
    size = max(1, min(MOST_TOKENS // tokens, 65_000 // (len(x) * model.config.n_head)))  # what a GPU's kernels take
    out = []
    for at in range(0, x.shape[1], size):
        _, hidden = model(x[:, at : at + size], None if y is None else y[:, at : at + size], mixing, hidden=True)
        at_x = [model.at_x(h, with_labels=y is not None)[:, :, first:].flatten(1, 2) for h in hidden]
        out.append(torch.stack(at_x, 1))
    return torch.cat(out, 2).nan_to_num(0, 0, 0)


def alike(state: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine of two states (..., i, d) -> (...): 1 / d where they use all directions evenly, 1 where they
    share one (the frame potential of Benedetto & Fickus 2003)."""
    unit = F.normalize(state, dim=-1)
    return (unit.mT @ unit / state.shape[-2]).square().sum((-2, -1))  # as of all pairs, and cheaper


def cosine(state: torch.Tensor) -> torch.Tensor:
    """Mean cosine of two states (..., i, d) -> (...), a state and itself among them: square of the mean direction."""
    return F.normalize(state, dim=-1).mean(-2).square().sum(-1)


def mean_square(states: list[torch.Tensor]) -> torch.Tensor:
    """Mean square of the states after some blocks, each (r, b, tokens, d) -> (r,)."""
    return torch.stack([h.square().mean((1, 2, 3)) for h in states]).mean(0)


def geometry(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of states (r, k, i, d), each (r, k): spread, share of the variance in the first direction, mean cosine of two
    states, and its mean square."""
    n, state = state.shape[2], state.double()
    centred = state - state.mean(2, keepdim=True)
    variance = torch.linalg.eigvalsh(centred.mT @ centred / (n - 1)).clamp(min=0)  # ascending
    total = variance.sum(-1)
    share = variance[..., -1] / total.clamp(min=1e-12)
    of_others = (n * cosine(state) - 1) / (n - 1)  # without a state and itself
    return {"spread": total.sqrt(), "first_share": share, "cosine": of_others, "alike": alike(state)}


class Prober:
    """What is probed, on items and sequences drawn once: prober(model) -> {name: (r, k), or by factor (r, k, f)}."""

    def __init__(self, world, seed: torch.Tensor, m: torch.Tensor, n: int):
        self.n, self.half, self.sizes, self.asked = n, n // 2, world.value_sizes, world.asked_varying
        self.context_sizes = [world.n_asked] if self.sizes else None
        self.items = world.to_probe(seed, m, n, PROBE_ITEMS)
        many = -(-PROBE_ITEMS // (n - self.half))  # sequences, each with the states of its second half
        number = 2 * HELD_OUT + torch.arange(many + many // 4, device=seed.device).expand(len(seed), -1)
        parts = ((number[:, :many], False), (number[:, many:], True))
        self.batch = [world.sample(seed, m, part, n, held_out) for part, held_out in parts]
        asked = [b.asked.reshape(len(seed), 1, -1, 1, b.asked[0, 0].numel()) for b in self.batch]  # which factor, or w
        self.context = [a.expand(-1, -1, -1, n - self.half, -1).flatten(2, 3) for a in asked]

    def __call__(self, model) -> dict[str, torch.Tensor]:
        norms = [*(block.norm_1 for block in model.blocks[1:]), model.norm]
        alone = [states(model, x[:, :, None]) for x, _ in self.items]
        after = [torch.stack([norm(s[:, k]) for k, norm in enumerate(norms)], 1).detach() for s in alone]
        every = [("weights_score", linear_probe, alone), ("weights_score_converged", converged_probe, alone),
                 ("weights_score_after_norm", converged_probe, after)]  # fmt: skip
        if model.config.n_token == 1:
            parts = [x.unflatten(1, (-1, min(self.n, x.shape[1]))) for x, _ in self.items]  # sequences
            identity = [states(model, x, x.new_zeros(*x.shape[:3], model.config.d_y), "identity") for x in parts]
            every.append(("weights_score_identity", linear_probe, identity))
        (_, value), (_, test_value) = self.items
        by_factor = {name: probe(s[0], value, s[1], test_value, self.sizes) for name, probe, s in every}
        scores = {name: score[..., self.asked].mean(-1) for name, score in by_factor.items()}
        by_factor = by_factor["weights_score"]
        unasked = [i for i in range(by_factor.shape[-1]) if i not in self.asked]
        if unasked:
            scores["weights_score_unasked"] = by_factor[..., unasked].mean(-1)
        if self.context_sizes != [1]:
            a, b = (states(model, b.x, b.y, first=self.half) for b in self.batch)
            scores["context_score"] = linear_probe(a, self.context[0], b, self.context[1], self.context_sizes).mean(-1)
        return scores | {"weights_score_by_factor": by_factor, **geometry(alone[0])}


def plateau_length(steps: list[int], loss: list[float], level: float) -> int | None:
    """First step at which the held-out loss is below `level`; None = censored, never within the budget."""
    return next((step for step, value in zip(steps, loss) if value is not None and value < level), None)


def doubling(metrics: dict, run: dict, block: int) -> float:
    """First probed step at which the spread of this block's states is twice that of the start, else infinite."""
    spread = [by_block[block] or 0 for by_block in run["spread"]]
    return next((step for step, now in zip(metrics["probe_steps"], spread) if now > 2 * spread[0]), math.inf)


def at_least(metrics: dict, run: dict) -> int:
    """The plateau length of a run; of a censored one the budget."""
    return metrics["steps"][-1] if run["plateau_length"] is None else run["plateau_length"]


def score_change(run: dict, block: int, key: str = "weights_score") -> float:
    """Asked weights score, last probe minus first; not a number for a run that diverged."""
    start, end = (run[key][at][block] for at in (0, -1))
    return math.nan if None in (start, end) else end - start


def sign_test(less: int, more: int) -> float:
    """Two-sided p-value of so many signs if either were as likely; pairs without a difference do not count."""
    n = less + more
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(less, more) + 1)) / 2**n)


def rate(lr: float) -> str:
    """As it is typed on a command line: 5e-4."""
    return np.format_float_scientific(lr, trim="-", exp_digits=1)


def rows(metrics: dict) -> list[dict]:
    """A dict per arm, difficulty and rate, over its seeds; `main` says what the words mean. length {seed: steps}: a
    censored run counts as the budget, in `until` as infinite. bound: "at least " where half or more is censored: the
    median is a bound. damaged: by `alone`, `identity` and ridge, as far as they were measured."""
    worse, groups, out = 1 if metrics["error"] else -1, {}, []
    for run in metrics["runs"]:
        groups.setdefault((run["arm"], run["difficulty"], run["lr"]), []).append(run)
    for (arm, m, lr), runs in groups.items():
        row = {"arm": arm, "difficulty": m, "lr": lr, "runs": runs}
        row["length"] = {run["seed"]: at_least(metrics, run) for run in runs}
        row["until"] = row["length"] | {run["seed"]: math.inf for run in runs if run["plateau_length"] is None}
        row["median"] = statistics.median(row["length"].values())
        row["loss"] = statistics.median(math.inf if run["loss"][-1] is None else run["loss"][-1] for run in runs)
        row["left"] = sum(run["plateau_length"] is not None for run in runs)
        row["bound"] = "at least " if row["left"] <= len(runs) // 2 else ""
        row["completed"] = sum(run["completion_step"] is not None for run in runs)
        fallen = lambda run, key: worse * score_change(run, metrics["block"], key) > DAMAGE
        row["damaged"] = {key: sum(fallen(run, key) for run in runs) for key in SCORES[:3] if key in runs[0]}
        out.append(row)
    for row in out:
        same = [r for r in out if (r["arm"], r["difficulty"]) == (row["arm"], row["difficulty"])]
        row["best"] = len(same) > 1 and row is min(same, key=lambda r: (r["median"], r["loss"]))
        rates = [r["lr"] for r in same]  # of this arm: a joined file has not every arm at every rate
        row["edge"] = row["best"] and row["lr"] in (min(rates), max(rates))
    return out


def report(metrics: dict) -> str:
    """Table and verdict of a training as Markdown: each arm and difficulty at every rate, the common first."""
    name, every, words = metrics["symbol"], rows(metrics), []
    head = ["arm", name, "rate", "plateau length of every seed", "median", "left", "completed",
            "damaged by alone, identity, ridge", "asked score, alone", "identity (the paper's)", "alone, ridge",
            "after the norm, ridge"]  # fmt: skip
    probed = all("spread" in run for run in metrics["runs"]) and len(metrics["probe_steps"]) > 6
    race = {"block 1": 0, "last block": -1} if probed else {}
    head += [f"spread doubled, {block}" for block in race]
    lines = [head, ["---"] * len(head)]
    for row in every:
        arm, m, runs, n = row["arm"], row["difficulty"], row["runs"], len(row["runs"])
        lr = rate(row["lr"]) + (" best" if row["best"] else "") + (" (edge)" if row["edge"] else "")
        never = lambda run: "nan" if run["loss"][-1] is None else "-"
        lengths = [never(run) if run["plateau_length"] is None else f"{run['plateau_length']:,}" for run in runs]
        cells = [arm, str(m), lr, " ".join(lengths), f"{row['bound']}{row['median']:,.0f}"]
        cells += [f"{row[key]} of {n}" for key in ("left", "completed")]
        cells.append(", ".join(str(row["damaged"].get(key, "-")) for key in SCORES[:3]))
        for key in SCORES:
            ends = [[run[key][at][metrics["block"]] for run in runs if key in run] for at in (0, -1)]
            ends = [[value for value in end if value is not None] for end in ends]
            cells.append(" to ".join(f"{statistics.median(end):.3f}" for end in ends) if all(ends) else "-")
        for block in race.values():
            cells.append(" ".join(f"{doubling(metrics, run, block):,.0f}".replace("inf", "-") for run in runs))
        lines.append(cells)
        others = [r for r in every if r["difficulty"] == m and r["arm"] != arm]
        pairs = [(r, "same rate") for r in others if r["lr"] == row["lr"]]
        pairs += [(r, "each at its best rate") for r in others if r["best"] and row["best"] and r["lr"] != row["lr"]]
        said = f"- {arm}, {name} = {m}, {lr}: {row['left']} of {n} leave the plateau, {row['completed']} complete"
        for r, where in pairs:
            both = row["until"].keys() & r["until"].keys()
            if r["arm"] == "baseline" and both and not row["left"] + r["left"]:
                said += f"; {where}: nor does the baseline, so no verdict"
            elif r["arm"] == "baseline" and both:
                sooner = sum(row["until"][s] < r["until"][s] for s in both)
                later = sum(row["until"][s] > r["until"][s] for s in both)
                said += f"; {where}: leaves sooner than the baseline in {sooner} of {len(both)} seeds, "
                said += f"later in {later} (sign test p = {sign_test(sooner, later):.2g})"
                least = statistics.median(row["length"][s] - r["until"][s] for s in both)  # as far as censoring tells
                most = statistics.median(row["until"][s] - r["length"][s] for s in both)
                said += f", median {least:+,.0f} steps" if least == most else ""
            if (arm, r["arm"], where) == ("baseline", "oracle", "same rate") and not r["bound"]:
                said += f"; the plateau is {row['bound']}{row['median'] / max(1, r['median']):.2g} times the oracle's"
        words.append(f"{said}.")
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *words]).rstrip()


def printable(text: str) -> str:
    """Words from outside, fit for a terminal and a figure: control and half characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def say(text: str) -> None:
    """print by the first process only; a closed output ends no training."""
    try:
        if RANK == 0:
            print(printable(text), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def for_json(value):
    """A number, or nested lists of them, for JSON, which has no NaN: a run that diverged has null from there on."""
    if isinstance(value, list):
        return [for_json(v) for v in value]
    return float(f"{value:.4g}") if math.isfinite(value) else None


def spaced(points, count: int) -> list[int]:
    """The first, the last and count - 1 evenly between them."""
    count = min(count, len(points) - 1)
    return [points[round(i * (len(points) - 1) / count)] for i in range(count + 1)]


class Record:
    """The curves and scores of all runs, their checkpoint and their metrics.json.

    runs: one dict per run with at least arm, difficulty, lr, seed. Every run is judged on the plain target task of its
    own difficulty, on 64 held-out sequences drawn once from its seed, whatever it is trained on.
    """

    def __init__(self, args, runs: list[dict], world, model, optimizer):
        self.args, self.world, self.model, self.optimizer = args, world, model, optimizer
        self.runs = [run | {"difficulty": int(m) if math.isfinite(m := run["difficulty"]) else "inf"} for run in runs]
        self.described = json.dumps(self.runs, allow_nan=False)  # what cannot be written fails now, not at the end
        self.due = spaced(range(args.steps + 1), args.evaluations)
        self.due_probes = spaced(self.due, args.probes)
        given, digest = vars(args), lambda content: hashlib.sha256(content).hexdigest()[:12]
        self.settings = {f"--{key.replace('_', '-')}": str(given[key]) for key in given if key not in MAY_CHANGE}
        self.settings |= {"script": Path(sys.argv[0]).name, "processes": PROCESSES}
        for file in (given.get("embedding"), given.get("tsv"), *(given.get("conllu") or ())):
            if file and Path(file).is_file():
                self.settings[f"the contents of {file}"] = digest(Path(file).read_bytes())
        if given.get("embedding") == "vae":  # another release of torch trains another one
            self.settings["the latents of the VAE"] = digest(world.table[:1000].cpu().numpy().tobytes())
        self.path = Path(args.out) / (f"checkpoint-{RANK}.pt" if PROCESSES > 1 else "checkpoint.pt")
        say(f"{len(runs)} runs x {args.steps:,} steps; reference levels and first probing ...")
        keys, self.device = [(run["seed"], run["difficulty"]) for run in runs], next(model.parameters()).device
        level_of = {key: world.references(*key, args.pairs) for key in set(keys)}
        self.levels = [level_of[key] for key in keys]
        self.no_context = [level["no_context_loss"] for level in self.levels]  # (r,)
        for (seed, m), level in level_of.items():
            if level["no_context_loss"] < 1e-6:
                raise UsageError(f"--difficulty {m:g}: seed {seed} needs no context; ask two factors or raise it")
            if level["bayes_loss"] > ESCAPE * level["no_context_loss"]:
                raise UsageError(f"--pairs {args.pairs}: Bayes itself stays on the plateau; give more")
        open_folder(args)
        seed = torch.tensor([seed for seed, _ in keys], device=self.device)
        m = mapping_counts([difficulty for _, difficulty in keys], self.device)
        which = HELD_OUT + torch.arange(64, device=self.device).expand(len(runs), -1)
        self.held_out = world.sample(seed, m, which, args.pairs, held_out=True)
        if not world.n_label:  # predicting zero on the very sequences a run is judged on: w differs between them
            self.no_context = world.loss(torch.zeros_like(self.held_out.y), self.held_out).mean((1, 2)).tolist()
        self.prober = Prober(world, seed, m, args.pairs)
        self.block = max(1, round(model.config.n_layer / 4)) - 1  # whose score is quoted: the paper's third of 12
        self.kept = {"steps": [], "probe_steps": [], "curves": [{} for _ in runs], "seconds": 0.0}
        self.first = self.load() if args.resume else 0

    def steps(self):
        """The steps to train, one by one. In between: measure, save a checkpoint at most a minute old, then print."""
        began, before, saved, mark = time.perf_counter(), self.kept["seconds"], -math.inf, None
        for step in range(self.first, self.args.steps + 1):
            due = step in self.due and step not in self.kept["steps"]
            if due:
                self.measure(step)
            now = time.perf_counter()
            if step == self.args.steps or now - saved > SAVE_SECONDS:
                self.kept["seconds"], saved, content = before + now - began, now, io.BytesIO()
                torch.save({"settings": self.settings, "runs": self.described, "step": step, "kept": self.kept, "model":
                            self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, content)  # fmt: skip
                write_aside(self.path, content.getvalue())
            if due:
                left = "median held-out losses"
                if mark:
                    pace = (now - mark[1]) / (step - mark[0])
                    left = f"{1000 * pace:.0f} ms/step, {(self.args.steps - step) * pace / 60:.1f} min left"
                elif step > self.first:  # the interval before holds the compilation
                    mark = step, now
                say(f"{step:6d} {step / self.args.steps:4.0%} | {self.medians()} | {left}")
            if step < self.args.steps:
                yield step

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Evaluate all runs on their held-out sequences, and probe them when it is time."""
        logits = self.model(self.held_out.x, self.held_out.y)
        loss = self.world.loss(logits, self.held_out).mean(1)  # (r, n)
        now = {"loss": loss.mean(1), "accuracy": -loss[:, -1]}  # regression: minus the last squared error
        if self.world.n_label:
            now["accuracy"] = (logits.argmax(-1) == self.held_out.label).float().mean((1, 2))
        broken = ~now["loss"].isfinite()  # a run that blew up has no accuracy and no score
        self.kept["steps"].append(step)
        if step in self.due_probes:
            self.kept["probe_steps"].append(step)
            now |= self.prober(self.model)
        for key, values in now.items():
            values[broken] = math.nan
            for curve, value in zip(self.kept["curves"], values.tolist()):
                curve.setdefault(key, []).append(value)

    def medians(self) -> str:
        """Newest loss per arm and difficulty at the common rate, over the seeds that have not diverged."""
        groups = {}
        for run, curve in zip(self.runs, self.kept["curves"]):
            if run["lr"] == self.args.lr[0]:
                groups.setdefault(f"{run['arm']} {run['difficulty']}", []).append(curve["loss"][-1])
        return " | ".join(f"{name} {torch.tensor(loss).nanquantile(0.5):.2f}" for name, loss in groups.items())

    def load(self) -> int:
        """Restore everything; returns the step to go on from. UsageError where that cannot be."""
        if not self.path.exists():
            cure = "start without --resume, or with as many processes as then"
            raise UsageError(f"--resume: no {self.path.name} in {self.path.parent}; {cure}")
        try:
            if zipfile.ZipFile(self.path).testzip():  # the archive's own checksums
                raise ValueError
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            then = state["settings"] | {"runs": state["runs"]}
            other = [key for key, now in (self.settings | {"runs": self.described}).items() if then.get(key) != now]
            if not other:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.kept = state["kept"]
                return int(state["step"])
        except (MemoryError, PermissionError, torch.OutOfMemoryError):
            raise
        except Exception:  # of a damaged file torch raises nearly anything
            raise UsageError(f"--resume: {self.path} is damaged or not of this script; use --overwrite") from None
        was = ", ".join(f"{key} (then {then.get(key)}, now {self.settings.get(key)})" for key in other if key != "runs")
        raise UsageError(f"--resume: it is of another command: {was or 'other runs'}; use its flags, or --overwrite")

    def finish(self, **more) -> dict:
        """Write metrics.json, print table and verdict, return the metrics; all processes but the first end here."""
        steps, mine = self.kept["steps"], []
        for run, level, no_context, curve in zip(self.runs, self.levels, self.no_context, self.kept["curves"]):
            enough = COMPLETE * level["bayes_accuracy"] if self.world.n_label else -0.1 - level["bayes_last_loss"]
            row = run | {"plateau_length": plateau_length(steps, curve["loss"], ESCAPE * no_context)}
            row["no_context_loss"] = for_json(no_context)
            row["completion_step"] = next((s for s, a in zip(steps, curve["accuracy"]) if a >= enough), None)
            first_last = {key: [curve[key][0], curve[key][-1]] for key in curve if "by_factor" in key}
            mine.append((row | {key: for_json(values) for key, values in (curve | first_last).items()}, level))
        parts = [mine] * PROCESSES
        if PROCESSES > 1:
            dist.all_gather_object(parts, mine)
            dist.destroy_process_group()
        if RANK:
            sys.exit()
        done = [parts[i % PROCESSES][i // PROCESSES] for i in range(sum(map(len, parts)))]  # undoes `share`
        git = "git describe --always --dirty --exclude=*"  # by a shell: a machine without git is no error
        commit = subprocess.run(git, shell=True, capture_output=True, cwd=Path(__file__).parent).stdout
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        metrics = {
            "script": self.settings["script"], "command": printable(shlex.join(["python", *sys.argv])),
            "settings": self.settings,
            "environment": {"commit": commit.decode(errors="replace").strip(), "torch": torch.__version__,
                            "device": gpu or f"CPU, {torch.get_num_threads()} threads",
                            "minutes": round(self.kept["seconds"] / 60, 1), "date": time.strftime("%Y-%m-%d")},
            "lr": self.args.lr, "block": self.block, "error": not self.world.n_label,
            "symbol": "m" if self.world.n_label else "d", "chance_context": for_json(1 / self.world.n_asked),
            "reference": {str(run["difficulty"]): level for run, level in reversed(done)},  # the first seed's stays
            "steps": steps, "probe_steps": self.kept["probe_steps"], **more, "runs": [run for run, _ in done],
        }  # fmt: skip
        content = json.dumps(metrics, allow_nan=False, separators=(",", ":")) + "\n"
        write_aside(Path(self.args.out) / "metrics.json", content.encode())
        say("\n" + report(metrics))
        return metrics


def open_folder(args) -> None:
    """Make --out, lock it while this process lives, see that nothing in it would be lost, else UsageError. Processes of
    torchrun meet here, before anything is trained, so that a group that cannot be formed costs no training."""
    if PROCESSES > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    if RANK == 0:
        out = Path(args.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if fcntl:
                fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out}: another training is running there; choose another folder") from None
        there = [path for name in ("metrics.json", "figure.png", "checkpoint*.pt*") for path in out.glob(name)]
        if there and not (args.resume or args.overwrite):
            cure = "choose another folder, go on with it (--resume) or replace it (--overwrite)"
            raise UsageError(f"--out {out}: holds {there[0].name} of an earlier training; {cure}")
        for path in there if args.overwrite else []:
            path.unlink()
    if PROCESSES > 1:
        dist.barrier()


def write_aside(path: Path, content: bytes) -> None:
    """Write a file beside its place, then move it there: a reader never sees half of it."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:  # after a full disk
        aside.unlink(missing_ok=True)


def between(low: float, high: float, kind=int):
    """An argparse type: a number of this kind from low to high."""

    def number(text: str):  # the name is what argparse says of a text that is none
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie from {low:g} to {high:g}")
        return value

    return number


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def early(flag: str, default: str) -> str:
    """The value of a flag on which the defaults of others depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", default=default)
    return parser.parse_known_args()[0].value


def flags(doc: str, defaults: dict[str, dict], images: bool = True) -> argparse.ArgumentParser:
    """A parser of the flags that scripts share; each knows their defaults {scale: {name: value}}, and its own."""
    usage = "%(prog)s [flags], explained by -h"
    parser = argparse.ArgumentParser(usage=usage, description=doc, formatter_class=Help, allow_abbrev=False)
    parser.set_defaults(**defaults.get(early("--scale", "laptop"), {}))
    add, out = parser.add_argument, "out/" + Path(sys.argv[0]).stem.removeprefix("exp_")
    add("--scale", choices=list(defaults), default="laptop", help="which defaults")
    add("--lr", type=between(1e-9, 1e9, float), nargs="+", help="Adam's; the first is common, and drawn")
    add("--steps", type=between(1, 1e8), help="training steps, the budget")
    add("--batch", type=between(1, 1e5), help="sequences per step")
    add("--pairs", type=between(1, 512), help="(x, y) pairs per sequence")
    add("--n-layer", type=between(1, 1000), help="blocks")
    add("--n-head", type=between(1, 1000), help="attention heads")
    add("--d-model", type=between(1, 1e5), help="width")
    add("--evaluations", type=between(1, 1e8), help="points of a curve: what a plateau length can be")
    add("--probes", type=between(1, 1e8), help="times the states are probed, after the start")
    if images:  # what tasks.shapes is made of
        add("--embedding", help="what images look like: code, pixels, vae, onehot (the oracle), or a file.npz")
        add("--code-width", type=between(1, 1e5), help="dimensions of the code")
        add("--code-gain", type=between(1e-9, 1e9, float), help="entanglement of the code")
        add("--code-seed", type=between(0, 1e8), help="of the code, and of the split into training and held-out images")
        add("--factors", type=between(1, 15), nargs=6, help="numbers of values, 1 = constant")
        add("--ask", choices=FACTORS, nargs="+", help="factors that may be asked; the others only vary")
    add("--seeds", type=between(1, 1000), default=3, help="runs per arm")
    add("--first-seed", type=between(0, 1e8), default=0, help="the first of them")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    bf16 = "auto: bf16 on a GPU, else fp32; bf16 is faster on CPUs with AVX512-BF16 or AMX only"
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=bf16)
    add("--no-compile", action="store_true", help="train without torch.compile")
    add("--out", default=out, help="folder of metrics.json, figure.png and checkpoint.pt")
    add("--replot", action="store_true", help="draw again from metrics.json in --out")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    group.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, after the checks that every script needs; each value of a list once, the hardest difficulty last."""
    args = parser.parse_args()
    for key, value in vars(args).items():
        if isinstance(value, list) and key != "factors":
            setattr(args, key, list(dict.fromkeys(value)))
    args.difficulty = sorted(map(float, args.difficulty))
    args.seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.d_model % args.n_head:
        parser.error(f"--n-head {args.n_head}: must divide --d-model {args.d_model}")
    if 0 < vars(args).get("sequences", 0) < args.batch:
        parser.error(f"--sequences {args.sequences}: must be 0 (always fresh) or at least --batch {args.batch}")
    return args


def share(runs: list[dict]) -> list[dict]:
    """The runs of this process: all of them, under torchrun every n-th."""
    if len(runs) < PROCESSES:
        raise UsageError(f"--nproc_per_node {PROCESSES}: there are only {len(runs)} runs; start fewer processes")
    return runs[RANK::PROCESSES]


def replot(args, plot) -> None:
    """--replot: table, verdict and figure again, from metrics.json."""
    path = Path(args.out) / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
        if metrics["script"] != Path(sys.argv[0]).name:
            raise ValueError(metrics["script"])
        say(report(metrics))
    except Exception as error:  # whatever somebody wrote there
        raise UsageError(f"--replot: {path} is missing or not of this script ({error!r:.99})") from None
    plot(metrics, args.out)


def run(main) -> None:
    """main(), whose errors in use end in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # a notebook's streams have none
    code = 2
    try:
        return main()
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --resume, in place of --overwrite, goes on from a minute ago at most"
    except UsageError as error:
        message = f"error: {error}"
    except OSError as error:  # a full disk, a folder that is gone
        message = f"error: {error}; mend it, make room or choose another --out; --resume goes on from a checkpoint"
    except (RuntimeError, MemoryError) as error:
        memory = ("MemoryError", "allocate memory", "enough memory", "out of memory", "ALLOC_FAILED")  # CPU and CUDA
        if any(word in repr(error) for word in memory):
            message = "error: out of memory; --resume, or smaller --batch, --d-model or fewer --seeds, and --overwrite"
        elif "torch._inductor" in repr(type(error)) or "torch._dynamo" in repr(type(error)):
            message = f"error: torch.compile failed ({str(error).splitlines()[0]}); add --no-compile and --resume"
        else:
            raise
    print(printable(f"{Path(sys.argv[0]).name}: {message}"), file=sys.stderr)
    sys.exit(code)


def curves(ax, x: list, values: list[list], colour: str, style: str = "-", label: str | None = None) -> None:
    """Values over x: every seed a thin line, the median of those that have not diverged bold."""
    stack = np.ma.masked_invalid(np.array(values, float))
    ax.plot(x, stack.T, style, color=colour, lw=0.6, alpha=0.4)
    ax.plot(x, np.ma.median(stack, 0), style, color=colour, lw=2, label=label)


def dots(groups: dict):
    """Every run with the looks of its dot, which is open if it is still on the plateau at the end."""
    for colour, runs in zip(COLOURS, groups.values()):
        for run in runs:
            yield run, dict(marker="o", color=colour, mfc="none" if run["plateau_length"] is None else colour)


def draw(metrics: dict, by: str = "arm"):
    """Panels (a) loss, (b) weights score, (c) plateau length at the common rate; by = what colours tell apart, arm or
    difficulty. By arm only the hardest difficulty is drawn. Returns figure, axes left to the script, {label: runs}."""
    lr, last, block, groups = metrics["lr"][0], metrics["runs"][-1]["difficulty"], metrics["block"], {}
    steps, level = metrics["steps"], metrics["reference"][str(last)]
    for run in metrics["runs"]:
        plain = by == "difficulty" and run["arm"] == "baseline"
        label = f"{metrics['symbol']} = {run['difficulty']}" if plain else run["arm"]
        if run["lr"] == lr and (plain or run["difficulty"] == last):
            groups.setdefault(printable(label), []).append(run)
    groups = dict(sorted(groups.items(), key=lambda group: group[0] != "oracle"))  # it comes first, always in black
    figure = Figure(figsize=(11, 8), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    for at, (colour, (label, runs)) in enumerate(zip(COLOURS, groups.items())):
        curves(a, steps, [run["loss"] for run in runs], colour, label=label)
        if at == 0 or runs[0]["arm"] == "baseline":
            a.axhline(ESCAPE * runs[0]["no_context_loss"], color=colour, ls=":", lw=1)
        for key, style in (("weights_score", "-"), ("weights_score_identity", ":")):
            if key in runs[0]:
                score = [[by_block[block] for by_block in run[key]] for run in runs]
                curves(b, metrics["probe_steps"], score, colour, style)
        for place, run in zip(np.linspace(at - 0.3, at + 0.3, len(runs) + 2)[1:-1], runs):
            marker, fill = (">", "none") if run["plateau_length"] is None else ("o", colour)
            c.plot(at_least(metrics, run), place, marker, color=colour, mfc=fill, clip_on=False)
    for key, text, va in (("no_context_loss", "best without context", "bottom"), ("bayes_loss", "exact Bayes", "top")):
        a.axhline(level[key], color="grey", ls="--", lw=1)
        text += f" ({metrics['symbol']} = {last})"
        off = (0, 6 if va == "bottom" else -6)  # points: clear of curves that have arrived there
        a.annotate(text, (0.99 * steps[-1], level[key]), off, textcoords="offset points", ha="right", va=va, fontsize=8)
    start = [run["weights_score"][0][block] for runs in groups.values() for run in runs if run["arm"] != "oracle"]
    b.axhline(statistics.median(start), color="grey", ls="--", lw=1)
    what = " (error)" if metrics["error"] else ""
    a.set(title="(a) Held-out loss (below dotted: plateau left; thin: a seed)")
    a.set(ylabel="held-out loss", ylim=(0, 1.2 * level["no_context_loss"]))
    a.legend(fontsize=8, loc="lower left")
    b.set_title(f"(b) Weights component, block {block + 1} (grey: at the start)")
    b.set_ylabel(f"weights score{what}, dotted: identity")
    c.set(title=f"(c) Plateau length of every run, rate {rate(lr)}", ylim=(len(groups) - 0.5, -0.5))
    c.set_yticks(range(len(groups)), list(groups))
    for ax, label in ((a, "step"), (b, "step"), (c, "steps (open: still on it at the end)")):
        ax.set(xlabel=label, xlim=(0, steps[-1]))
    return figure, d, groups


def main() -> None:
    print("# Results, made by `python probes.py assets/*.json > assets/results.md`\n")
    print(f"Left: held-out loss below {ESCAPE} of the best without context; `-`: not in the budget, which then counts,")
    print("and so it does for `nan`, a run that diverged.")
    print(f"Completed: {COMPLETE} of the exact Bayes accuracy. Damaged: the asked score ends {DAMAGE} below its start.")
    print("Scores: medians at start and end. Best: the rate with an arm's shortest median (ties: lowest loss), chosen")
    print("on these seeds; edge: the smallest or largest tried. More: docstring of `probes.py`.")
    for path in map(Path, sys.argv[1:]):
        try:
            metrics = json.loads(path.read_text())
            where = metrics["environment"]
            text = f"`{metrics['command']}` ({where['minutes']:g} minutes, {where['device']})"
            text += f"; {metrics['note']}\n\n" if "note" in metrics else "\n\n"
            text += f"![]({path.stem}.png)\n\n" if path.with_suffix(".png").exists() else ""
            text += report(metrics)
        except Exception as error:  # whatever somebody wrote there
            raise UsageError(f"{path}: is not a metrics.json of these scripts ({error!r:.60})") from None
        print(f"\n## {path.parent.name if path.stem == 'metrics' else path.stem}\n\n{text}")


if __name__ == "__main__":
    run(main)
