"""What is learnt: worlds of items and of numbers, in-context sequences over them, and the exact levels a learner can reach.

Items: images here, texts in exp_nlp.py. A sequence asks one factor (say wall hue) and one mapping, a permutation of that
factor's values to labels. It holds n items, each followed by its label. The learner has to find out from the pairs so far
which factor and which mapping. `difficulty` m is the number of mappings in play: 1 = always the same one, inf = drawn afresh
for every sequence. (A factor of 4 values has only 24 permutations, as the paper's `shape` has, so there all m far beyond 24
are much the same.)
Regression: a sequence holds n pairs x, y = w.x with a hidden vector w; `difficulty` is the dimension d.

Every random choice in a sequence is a hash of (seed, stream, number, place). So a sequence is a pure function of its number:
no generator state, the same sequences on CPU and GPU, and a run's data do not depend on which runs share the program.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn import functional as F

FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
SIZES = (10, 10, 10, 8, 4, 15)  # the paper's; image index = mixed radix in this order, orientation fastest
N_IMAGES = math.prod(SIZES)  # 480,000
INFINITE = 2**53  # as many mappings as a double can count: as good as a fresh one for every sequence
MOST = 1_000_000  # finite mappings, all of which the Bayes level goes through
HELD_OUT = 2**50  # held-out sequences are numbered from here on, training sequences from 0


class UsageError(ValueError):
    """Input that cannot be served; the message names the flag and the cure. Scripts print it and exit with code 2."""


# streams of random numbers: which choice of a sequence a hash is for
ASKED, MAPPING, PERMUTATION, ITEMS, SHUFFLE, WEIGHTS, INPUTS, NOISE = range(8)


# ---------------------------------------------------------------------------------------------- random numbers


def random_bits(*key) -> torch.Tensor:
    """63-bit hash of integers and integer tensors that broadcast together (SplitMix64 finaliser, folded over the key)."""
    h = torch.zeros((), dtype=torch.int64)
    for part in key:  # integers stay on the host: nothing is copied to a GPU
        h = (h ^ part) + -7046029254386353131  # the golden-ratio increment; int64 wraps
        h = (h ^ (h >> 30 & (1 << 34) - 1)) * -4658895280553007687
        h = (h ^ (h >> 27 & (1 << 37) - 1)) * -7723592293110705685
        h = h ^ (h >> 31 & (1 << 33) - 1)
    return h & (1 << 63) - 1


def random_unit(*key) -> torch.Tensor:
    """Uniform doubles in [0, 1)."""
    return (random_bits(*key) >> 10).double() * 2.0**-53


def random_int(high, *key) -> torch.Tensor:
    """Uniform integers in 0 .. high-1; high may be a tensor."""
    return (random_unit(*key) * high).long()


def random_normal(*key) -> torch.Tensor:
    """Standard normal numbers (Box and Muller), one hash each: half of its bits for the radius, half for the angle."""
    bits = random_bits(*key)
    radius = (((bits >> 32).double() + 0.5) * 2.0**-31).log_().mul_(-2).sqrt_()
    return ((bits & (1 << 32) - 1).double() * (2 * math.pi * 2.0**-32)).cos_().mul_(radius).float()


def distinct(pool: int, n: int, *key) -> torch.Tensor:
    """n uniform integers below pool, all different where pool >= n: key tensors (...) -> (..., n)."""
    place = lambda count: torch.arange(count, device=key[-1].device)
    key = [part[..., None] if torch.is_tensor(part) else part for part in key]
    if pool < 8 * n:  # small pool: shuffle it, several times over if a sequence is longer than the pool
        rounds = torch.stack([random_bits(*key, round_, place(pool)).argsort(-1) for round_ in range(-(-n // pool))], -2)
        return rounds.flatten(-2)[..., :n]
    draw = random_int(pool, *key, place(2 * n + 8))  # large pool: draw too many, keep the first n different ones
    value, order = draw.sort(dim=-1, stable=True)
    repeated = F.pad(value[..., 1:] == value[..., :-1], (1, 0))
    late = torch.zeros_like(repeated).scatter(-1, order, repeated)
    return draw.gather(-1, late.long().argsort(dim=-1, stable=True)[..., :n])


def sequence_numbers(seed: torch.Tensor, step: int, batch: int, finite: int = 0) -> torch.Tensor:
    """Numbers (r, batch) of the sequences of a training step.

    finite = 0: every step has new sequences. Otherwise the authors' setting: `finite` sequences, a new order each epoch,
    finite // batch steps an epoch (their last, smaller batch is left out).
    """
    place = torch.arange(batch, device=seed.device)
    if not finite:
        return (step * batch + place).expand(len(seed), batch)
    epoch, at = divmod(step, finite // batch)
    return epoch_order(seed, epoch, finite)[:, at * batch + place]


@lru_cache(maxsize=1)
def epoch_order(seed: torch.Tensor, epoch: int, finite: int) -> torch.Tensor:
    """The order (r, finite) of an epoch; kept until the next one, since sorting it at every step would be slow."""
    return random_bits(seed[:, None], SHUFFLE, epoch, torch.arange(finite, device=seed.device)).argsort(-1)


# ---------------------------------------------------------------------------------------------- items with factors


@dataclass
class Sequences:
    """x (r, b, n, d) vectors or words; y (r, b, n, c) as the model reads it: one-hot labels, or numbers (c = 1).

    Of items also: item (r, b, n) numbers, label (r, b, n), values (r, b, n, f), asked (r, b) index into world.asked.
    Of regression: values = x, asked = the hidden vector (r, b, d), dimension (r,).
    """

    x: torch.Tensor
    y: torch.Tensor
    values: torch.Tensor
    asked: torch.Tensor
    item: torch.Tensor | None = None
    label: torch.Tensor | None = None
    dimension: torch.Tensor | None = None


@dataclass
class Items:
    """A world of items with factor values: images from `shapes(...)`, texts from exp_nlp.py."""

    names: tuple[str, ...]  # of the factors
    sizes: tuple[int, ...]  # values per factor, 1 = constant
    asked: list[int]  # factors that a sequence may ask for
    values: torch.Tensor  # (item, f) value of each factor, 0 .. size-1
    table: torch.Tensor  # (item, d) what the model sees: a vector, or words
    train: torch.Tensor  # item numbers used in training
    test: torch.Tensor  # held-out item numbers
    full: torch.Tensor | None = None  # (image, 6) values as those of the full world, 0 .. SIZES-1
    weight: torch.Tensor | None = None  # (item,) how often to draw it, summing to 1 in each part; None = equally often
    n_word: int = 0  # vocabulary, when items are words
    n_label: int = field(init=False)

    def __post_init__(self):
        device = self.values.device
        self.n_label = max(self.sizes[f] for f in self.asked)
        self.varying = [f for f, size in enumerate(self.sizes) if size > 1]
        self.value_sizes = [self.sizes[f] for f in self.varying]
        self.n_value, self.n_asked = sum(self.value_sizes), len(self.asked)  # outputs of a read-out of all values, of the asked factor
        self.asked_columns = torch.tensor(self.asked, device=device)
        self.asked_sizes = torch.tensor([self.sizes[f] for f in self.asked], device=device)
        self.other = torch.randperm(len(self.values), generator=torch.Generator().manual_seed(0)).to(device)
        words = dict(d_x=0, n_word=self.n_word, n_token=self.table.shape[1])
        self.inputs = dict(d_y=self.n_label, **(words if self.n_word else dict(d_x=self.table.shape[1])))  # for model.Config
        if self.weight is not None:
            # by held_out; on the CPU, since a GPU's order of adding changes
            self.cumulated = [self.weight[part].cpu().cumsum(0).to(self.weight.device) for part in (self.train, self.test)]

    def permutation(self, seed, mapping, asked) -> torch.Tensor:
        """Label of each value under a mapping: seed (r, ...), mapping, asked (broadcast) -> (..., n_label)."""
        size = self.asked_sizes[asked][..., None]
        value = torch.arange(self.n_label, device=size.device)
        key = random_bits(seed[..., None], PERMUTATION, mapping[..., None], asked[..., None], value)
        return key.masked_fill(value >= size, (1 << 63) - 1).argsort(-1)

    def sample(self, seed, m, number, n: int, held_out: bool = False) -> Sequences:
        """The sequences with these numbers. seed (r,), m (r,) or (r, b) mappings in play, number (r, b).

        Only the mapping depends on m: the same number asks the same factor of the same items at every difficulty.
        """
        seed, pool = seed[:, None], self.test if held_out else self.train
        asked = random_int(self.n_asked, seed, ASKED, number)
        mapping = random_int(m if m.dim() == 2 else m[:, None], seed, MAPPING, number)
        if self.weight is None:
            item = pool[distinct(len(pool), n, seed, ITEMS, number)]
        else:  # drawn one by one
            u = random_unit(seed[..., None], ITEMS, number[..., None], torch.arange(n, device=number.device))
            item = pool[torch.searchsorted(self.cumulated[held_out], u).clamp(max=len(pool) - 1)]
        values = self.values[item]
        value = values.gather(-1, repeat(self.asked_columns[asked], "r b -> r b n 1", n=n))[..., 0]
        label = self.permutation(seed, mapping, asked).gather(-1, value)
        return Sequences(self.table[item], F.one_hot(label, self.n_label).float(), values, asked, item, label)

    def draw(self, count: int, held_out: bool, generator) -> torch.Tensor:
        """Numbers of up to `count` items for a probe: all different, or by weight."""
        pool = self.test if held_out else self.train
        if self.weight is None:
            picked = torch.randperm(len(pool), generator=generator)[:count]
        else:
            picked = torch.multinomial(self.weight[pool].cpu(), min(count, len(pool)), replacement=True, generator=generator)
        return pool[picked.to(pool.device)]

    def loss(self, logits, batch: Sequences) -> torch.Tensor:
        """Cross-entropy of the labels in nats: logits (r, b, n, n_label) -> (r, b, n)."""
        return cross_entropy(logits, batch.label)

    def value_loss(self, logits, values) -> torch.Tensor:
        """Cross-entropy of all varying factors, their mean: logits (r, b, n, n_value), values (r, b, n, f) -> (r, b, n)."""
        parts = zip(logits.split(self.value_sizes, -1), (values[..., f] for f in self.varying))
        return torch.stack([cross_entropy(part, value) for part, value in parts]).mean(0)

    def asked_loss(self, logits, batch: Sequences) -> torch.Tensor:
        """Cross-entropy of the asked factor: logits (r, b, n, n_asked) -> (r, b, n)."""
        return cross_entropy(logits, repeat(batch.asked, "r b -> r b n", n=logits.shape[2]))

    def other_values(self, batch: Sequences) -> torch.Tensor:
        """The values of another, fixed item in the place of each item: as much to predict, and nothing to learn from."""
        return self.values[self.other[batch.item]]

    def references(self, seed: int, difficulty: float, n: int, sequences: int = 1024) -> dict:
        """Levels for one run: losses in nats, accuracies as fractions; all computed from the world and the run's mappings.

        chance, no_context_loss: the best prediction from x alone, over all items. label_set_loss: from knowing which factor is
        asked, but no mapping. bayes_*: the best prediction from x and the pairs before it, on held-out sequences. pairwise_*: from
        each of these pairs by itself, without ever inferring which factor is asked, see `pairwise`. All for a learner that sees the
        factors of x: where x does not show them fully (texts that are cut), they are bounds.
        """
        device, sizes = self.values.device, [self.sizes[f] for f in self.asked]
        seeds, asked = torch.tensor([seed], device=device), torch.arange(len(sizes), device=device)
        tables = None
        uniform = torch.stack([(torch.arange(max(sizes), device=device) < s).double() / s for s in sizes])
        per_value = repeat(uniform, "f c -> f v c", v=max(sizes))  # P(label | factor, value)
        if difficulty != math.inf:
            tables = self.permutation(seeds, torch.arange(int(difficulty), device=device)[:, None], asked)
            per_value = torch.stack([(tables == label).double().mean(0) for label in range(max(sizes))], -1)
        values = self.values[:, self.asked]
        if self.weight is not None or len(values) > 20_000:
            values = values[self.draw(20_000, True, torch.Generator().manual_seed(0))]
        prior = torch.stack([per_value[i][values[:, i]] for i in range(len(sizes))]).mean(0)
        number = HELD_OUT + torch.arange(sequences, device=device)[None]
        batch = self.sample(seeds, mappings([difficulty], device), number, n, held_out=True)
        chunk = max(1, int(2e7 / (1 if tables is None else tables.numel())))
        seen, label = batch.values[0][..., self.asked], batch.label[0]
        p = torch.cat([bayes(v, y, sizes, tables) for v, y in zip(seen.split(chunk), label.split(chunk))])
        one_by_one = pairwise(seen, label, sizes)
        hits = (one_by_one.argmax(-1) == label).double()
        loss = lambda p: -p.gather(-1, label[..., None]).log().mean().item()
        return {
            "chance": prior.max(-1).values.mean().item(),
            "no_context_loss": torch.special.entr(prior).sum(-1).mean().item(),
            "label_set_loss": float(np.log(sizes).mean()),
            "bayes_loss": loss(p),
            "bayes_accuracy": p.max(-1).values.mean().item(),
            "bayes_accuracy_by_position": p.max(-1).values.mean(0).tolist(),
            "pairwise_loss": loss(one_by_one),
            "pairwise_accuracy": hits.mean().item(),
            "pairwise_accuracy_by_position": hits.mean(0).tolist(),
        }


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In nats: logits (..., c), target (...) -> (...)."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


# ---------------------------------------------------------------------------------------------- linear regression


@dataclass
class Regression:
    """Linear regression in context (Garg et al. 2022, arXiv 2208.01066): y = w.x + noise, w and x from N(0, I_d); difficulty is d.

    x is zero-padded to `width` (their device), so that runs of several d share a program. Losses are squared errors / d.
    """

    width: int
    noise: float = 0.0  # standard deviation
    device: torch.device | str = "cpu"

    def __post_init__(self):
        self.n_label = 0  # numbers, not classes
        self.n_value = self.n_asked = self.width
        self.inputs = dict(d_x=self.width, d_y=1)

    def sample(self, seed, m, number, n: int, held_out: bool = False) -> Sequences:
        """The sequences with these numbers. seed (r,), m (r,) dimensions, number (r, b). Held out or not is a matter of the number."""
        pair, dim = torch.arange(n, device=number.device), torch.arange(self.width, device=number.device)
        present = rearrange(dim < m[:, None], "r d -> r 1 d")
        w = random_normal(seed[:, None, None], WEIGHTS, number[..., None], dim) * present
        x = random_normal(seed[:, None, None, None], INPUTS, number[..., None, None], pair[:, None], dim) * present[:, :, None]
        y = torch.einsum("rbnd,rbd->rbn", x, w)
        if self.noise:
            y = y + self.noise * random_normal(seed[:, None, None], NOISE, number[..., None], pair)
        return Sequences(x, y[..., None], x, w, dimension=m)

    def loss(self, guess, batch: Sequences) -> torch.Tensor:
        """Squared error / d: guess (r, b, n, 1) -> (r, b, n)."""
        return (guess.float() - batch.y)[..., 0].square() / batch.dimension[:, None, None]

    def value_loss(self, guess, values) -> torch.Tensor:
        """Squared error of x, mean over its d dimensions: guess, values (r, b, n, width) -> (r, b, n). Padding is not asked."""
        present = (values != 0).any((1, 2), keepdim=True)
        return ((guess.float() - values).square() * present).sum(-1) / present.sum(-1)

    def asked_loss(self, guess, batch: Sequences) -> torch.Tensor:
        """Squared error of w, mean over its d dimensions: guess (r, b, n, width) -> (r, b, n)."""
        return self.value_loss(guess, batch.asked[:, :, None].expand_as(guess))

    def other_values(self, batch: Sequences) -> torch.Tensor:
        """The x of another sequence: as much to predict, and nothing to learn from."""
        return batch.values.roll(1, 1)

    def references(self, seed: int, difficulty: float, n: int, sequences: int = 512) -> dict:
        """Mean squared error / d of learners that are told the task family, over the sequence and by position.

        no_context_loss: predicting zero, the best from x alone (exact). bayes: the posterior mean of w, which is ridge with the
        noise variance, and least squares (of least norm) without noise. The others as in Garg et al.; ridge has penalty 1.
        """
        d, seeds = int(difficulty), torch.tensor([seed], device=self.device)
        number = HELD_OUT + torch.arange(sequences, device=self.device)[None]
        batch = self.sample(seeds, torch.tensor([d], device=self.device), number, n)
        x, y = batch.x[0, :, :, :d].double(), batch.y[0].double()
        errors = {name: [] for name in ("least_squares", "ridge", "bayes", "nearest", "averaging")}
        for k in range(n):
            past, value, now = x[:, :k], y[:, :k], x[:, k : k + 1]
            nearest = (past - now).square().sum(-1).topk(min(3, k), largest=False).indices
            guess = {
                "least_squares": now @ ridge(past, value, 0.0),
                "ridge": now @ ridge(past, value, 1.0),
                "bayes": now @ ridge(past, value, self.noise**2),
                "nearest": value.gather(1, nearest[..., None]).sum(1, keepdim=True) / max(1, min(3, k)),
                "averaging": now @ (past.mT @ value) / max(1, k),
            }
            for name, value in guess.items():
                errors[name].append((value[:, 0, 0] - y[:, k, 0]).square().mean().item() / d)
        levels = {"no_context_loss": 1 + self.noise**2 / d}
        for name, by_position in errors.items():
            levels |= {f"{name}_loss": float(np.mean(by_position)), f"{name}_loss_by_position": by_position}
        return levels


def ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights (b, d, 1) of ridge regression on x (b, k, d), y (b, k, 1); penalty 0: least squares of least norm."""
    k, d = x.shape[1:]
    if k < d:  # the smaller of the two equal forms
        return x.mT @ torch.linalg.solve(x @ x.mT + penalty * torch.eye(k, dtype=x.dtype, device=x.device), y)
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(d, dtype=x.dtype, device=x.device), x.mT @ y)


# ---------------------------------------------------------------------------------------------- difficulty


def parse_difficulty(text: str) -> float:
    """'10' -> 10.0, 'inf' -> inf."""
    try:
        m = float(text)
    except ValueError:
        m = 0.0
    if not (m == math.inf or (1 <= m <= MOST and m == int(m))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST:,}, nor inf")
    return m


def mappings(difficulty: list[float], device) -> torch.Tensor:
    """Difficulties as a tensor of numbers of mappings (r,)."""
    return torch.tensor([INFINITE if m == math.inf else int(m) for m in difficulty], device=device)


# ---------------------------------------------------------------------------------------------- images and embeddings


@lru_cache
def render() -> np.ndarray:
    """Shaded masks (480, 3, 16, 16) of floor, walls and object for every (scale, shape, orientation).

    A camera looks into a room, the object stands in its middle, both turn together from -30 to 30 degrees. Shading does
    not depend on hue, so any of the 480,000 images is masks x hues. Rays are cast at 64 x 64 and averaged to 16 x 16.
    """
    side, eye, target, light = 64, np.array([0.0, -4.6, 2.4]), np.array([0.0, 0.0, 0.75]), np.array([-0.55, -0.6, 0.7])
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
    screen = (np.arange(side) + 0.5) / side * 2 - 1
    u, v = np.meshgrid(screen, -screen)
    ray = forward + 0.46 * (u[..., None] * right + v[..., None] * np.cross(right, forward))
    turn = np.radians(np.linspace(-30, 30, SIZES[5]))
    cos, sin, zero = np.cos(turn), np.sin(turn), 0 * turn
    to_room = rearrange(
        np.array([[cos, sin, zero], [-sin, cos, zero], [zero, zero, 1 + zero]]), "i j o -> o i j"
    )  # orientation o: world -> room coordinates, where room and object stay put
    o, d = to_room @ eye, np.einsum("oij,yxj->oyxi", to_room, ray)
    o, light = o[:, None, None], (to_room @ (light / np.linalg.norm(light)))[:, None, None]
    shade = lambda normal: 0.35 + 0.65 * np.clip((normal * light).sum(-1), 0, None)

    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(d[..., 2] < 0, -o[..., 2] / d[..., 2], np.inf)
        reach = (3.4 * np.sign(d[..., :2]) - o[..., :2]) / d[..., :2]  # two walls each way, 3.4 from the middle
        wall, axis = reach.min(-1), reach.argmin(-1)
        wall_normal = np.eye(3)[axis] * -np.sign(np.take_along_axis(d, axis[..., None], -1))
        room = np.stack([np.where(floor < wall, shade(np.array([0.0, 0, 1])), 0), np.where(floor < wall, 0, shade(wall_normal))], -1)
        masks = []
        for scale in np.linspace(0.55, 1.25, SIZES[3]):
            for cast in (cast_cube, cast_cylinder, cast_sphere, cast_capsule):
                t, normal = cast(o - [0, 0, scale], d, scale)  # objects stand on the floor, 2 x scale high
                hit = np.isfinite(t)
                normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
                masks.append(np.concatenate([np.where(hit[..., None], 0, room), np.where(hit, shade(normal), 0)[..., None]], -1))
    masks = np.stack(masks)  # (scale shape, orientation, y, x, surface)
    return rearrange(masks, "g o (y s) (x t) c -> (g o) c y x (s t)", s=4, t=4).mean(-1).astype(np.float32)


def nearest(t: np.ndarray, normal: np.ndarray, valid: np.ndarray):
    """The closest valid hit of several: t (c, ...), normal (c, ..., 3) -> t (...), inf where the ray misses, and its normal."""
    t = np.where(valid, t, np.inf)
    best = t.argmin(0)[None]
    return np.take_along_axis(t, best, 0)[0], np.take_along_axis(normal, best[..., None], 0)[0]


def cast_cube(o, d, s):
    s = 0.85 * s  # about the cylinder's volume; it still stands on the floor, see the shift below
    o = o + [0, 0, 0.15 / 0.85 * s]
    t_1, t_2 = (-s - o) / d, (s - o) / d
    t_in, t_out = np.minimum(t_1, t_2), np.maximum(t_1, t_2).min(-1)
    axis = t_in.argmax(-1)[..., None]
    t = np.take_along_axis(t_in, axis, -1)[..., 0]
    normal = np.eye(3)[axis[..., 0]] * -np.sign(np.take_along_axis(d, axis, -1))
    return np.where(t < t_out, t, np.inf), normal


def cast_round(o, d, centre, radius, dims):
    """First hit of a sphere (dims = 3) or of an endless upright cylinder (dims = 2), with its normal."""
    p, q = (o - centre)[..., :dims], d[..., :dims]
    a, b, c = (q * q).sum(-1), (p * q).sum(-1), (p * p).sum(-1) - radius**2
    t = (-b - np.sqrt(b * b - a * c)) / a  # not a number where the ray misses
    point = o + t[..., None] * d
    normal = (point - centre) * ([1, 1, 1] if dims == 3 else [1, 1, 0])
    return t, normal, point


def cast_sphere(o, d, s):
    return cast_round(o, d, np.zeros(3), s, 3)[:2]


def cast_cylinder(o, d, s):
    radius = 0.8 * s
    t, normal, point = cast_round(o, d, np.zeros(3), radius, 2)
    top = (s - o[..., 2]) / d[..., 2]
    on_top = ((o + top[..., None] * d)[..., :2] ** 2).sum(-1) < radius**2
    up = np.broadcast_to(np.array([0.0, 0, 1]), normal.shape)
    return nearest(np.stack([t, top]), np.stack([normal, up]), np.stack([np.abs(point[..., 2]) < s, on_top]))


def cast_capsule(o, d, s):
    radius = 0.55 * s
    half = s - radius
    side = cast_round(o, d, np.zeros(3), radius, 2)
    caps = [cast_round(o, d, np.array([0, 0, z]), radius, 3) for z in (-half, half)]
    t, normal, point = (np.stack(a) for a in zip(side, *caps))
    return nearest(t, normal, np.stack([np.abs(point[0, ..., 2]) < half, ~np.isnan(t[1]), ~np.isnan(t[2])]))


# RGB (10, 3) of ten saturated hues around the circle
HUES = np.clip(np.abs((np.arange(10)[:, None] / 10 * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1).astype(np.float32)


def image(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Images (..., 3, 16, 16) in 0 .. 1 of full-size factor values (..., 6); masks from render()."""
    geometry = (values[..., 3] * SIZES[4] + values[..., 4]) * SIZES[5] + values[..., 5]
    return np.einsum("...syx,...sc->...cyx", masks[geometry], HUES[values[..., :3]])


def code(values: np.ndarray, sizes: tuple[int, ...], width: int, gain: float, seed: int = 0) -> np.ndarray:
    """A fixed random two-layer tanh network of the factor values: (image, 6) -> (image, width).

    gain is the entanglement: near 0 the code is linear in the one-hot values, a large one folds the factors into each other.
    """
    rng = np.random.default_rng(seed)
    varying = [f for f, size in enumerate(sizes) if size > 1]
    first = rng.normal(size=(sum(sizes[f] for f in varying), width)) / len(varying) ** 0.5
    second = rng.normal(size=(width, width)) / width**0.5

    def embed(part):
        one_hot = np.concatenate([np.eye(sizes[f])[part[:, f]] for f in varying], 1)
        return np.tanh(gain * np.tanh(gain * one_hot @ first) @ second)

    return np.concatenate([embed(part) for part in np.array_split(values, -(-len(values) // 8192))])  # parts: little memory


def vae(masks: np.ndarray, values: np.ndarray, latent: int = 64, steps: int = 3000, beta: float = 0.1) -> np.ndarray:
    """Latent means (image, latent) of a small VAE trained here, without labels, on random images of the full world."""
    torch.manual_seed(0)
    mlp = lambda *d: torch.nn.Sequential(torch.nn.Linear(d[0], d[1]), torch.nn.ReLU(), torch.nn.Linear(d[1], d[2]))
    encoder, decoder = mlp(768, 512, 2 * latent), mlp(latent, 512, 768)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    rng = np.random.default_rng(0)
    pixels = lambda v: torch.from_numpy(image(v, masks)).flatten(1)
    for step in range(steps):
        x = pixels(rng.integers(SIZES, size=(256, 6)))
        mean, log_var = encoder(x).chunk(2, -1)
        out = decoder(mean + torch.randn_like(mean) * (log_var / 2).exp())
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
        loss = (100 * (out - x).square().sum(-1) + beta * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"vae: step {step}/{steps}, loss {loss.item():.1f}", flush=True)
    with torch.no_grad():
        return np.concatenate([encoder(pixels(v))[:, :latent].numpy() for v in np.array_split(values, -(-len(values) // 8192))])


def keep(file: Path, table: np.ndarray) -> None:
    """Save a table for the next time; a folder that cannot be written only costs that."""
    aside = file.with_suffix(f".{os.getpid()}.npy")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.save(aside, table)
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): made again the next time")


def load_embedding(path: str) -> np.ndarray:
    """The paper's file layout: an .npz whose key `repre` is (480000, any). Raises UsageError."""
    try:
        with np.load(path) as file:
            table = file["repre"]
    except KeyError:
        raise UsageError(f"--embedding {path}: no array named 'repre' in it") from None
    except MemoryError:
        raise
    except Exception:
        raise UsageError(f"--embedding {path}: not a readable .npz file (or give pixels, code or vae)") from None
    if table.ndim != 2 or len(table) != N_IMAGES:
        raise UsageError(f"--embedding {path}: 'repre' has shape {table.shape}, it must be ({N_IMAGES}, any)")
    if table.dtype.kind != "f" or not np.isfinite(table).all():
        raise UsageError(f"--embedding {path}: 'repre' must hold finite floating-point numbers, found {table.dtype} or NaN/inf")
    return table


def shapes(factors=SIZES, ask=(), embedding="code", code_width=32, code_gain=2.0, device="cpu", cache="out/cache", code_seed=0) -> Items:
    """The image world, a 3D-Shapes look-alike: all combinations of six factors.

    factors: values per factor; ask: names of the factors that may be asked (default: all that vary).

    Raises UsageError, naming the flag, for counts or files that cannot be served.
    """
    factors = tuple(factors)
    if len(factors) != 6 or any(not 1 <= n <= size for n, size in zip(factors, SIZES)):
        raise UsageError(f"--factors: give six counts, each from 1 to {' '.join(map(str, SIZES))} ({', '.join(FACTORS)})")
    asked = [FACTORS.index(name) for name in ask] or [f for f, n in enumerate(factors) if n > 1]
    if not asked or any(factors[f] == 1 for f in asked):
        raise UsageError("--ask: a factor with one value (--factors) cannot be asked; give it at least two")
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in factors], indexing="ij"), -1).reshape(-1, 6)
    # evenly spread values of the full world: hues lie on a circle, the others on a line
    spread = [np.arange(n) * s // n if f < 3 else np.linspace(0, s - 1, n).round() for f, (n, s) in enumerate(zip(factors, SIZES))]
    full = np.stack([np.asarray(spread[f], int)[grid[:, f]] for f in range(6)], -1)
    if embedding == "code":
        table = code(grid, factors, code_width, code_gain, code_seed)
    elif embedding == "pixels":
        table = image(full, render()).reshape(-1, 768)
    elif embedding == "vae":
        masks = render()
        name = hashlib.sha256(masks.tobytes() + repr((factors, vae.__defaults__, torch.__version__)).encode()).hexdigest()[:16]
        file = Path(cache) / f"vae-{name}.npy"
        try:
            table = np.load(file)
        except (ValueError, EOFError):
            raise UsageError(f"--embedding vae: {file} is damaged; remove it") from None
        except OSError:  # not there, or out of reach
            table = vae(masks, full)
            keep(file, table)
    else:
        table = load_embedding(embedding)[np.ravel_multi_index(full.T, SIZES)]
    if embedding in ("code", "pixels", "vae"):
        mean, deviation = table.mean(0), table.std(0) + 1e-6
        table -= mean  # in place: at paper scale this is gigabytes
        table /= deviation
    order = np.random.default_rng(0).permutation(len(grid))
    cut = round(0.8 * len(grid))
    if not 0 < cut < len(grid):
        raise UsageError(f"--factors: {len(grid)} images leave none to hold out; give more values")
    to = lambda a: torch.as_tensor(a, device=device)
    return Items(FACTORS, factors, asked, to(grid), to(table.astype(np.float32, copy=False)), to(order[:cut]), to(order[cut:]), to(full))


# ---------------------------------------------------------------------------------------------- reference levels


def bayes(values, label, sizes: list[int], tables=None) -> torch.Tensor:
    """The exact Bayes prediction of every label from the pairs before it: (b, n, n_label) probabilities.

    values (b, n, f) of the factors that may be asked, label (b, n), sizes (f,). The asked factor is uniform, and so is the
    mapping: over all permutations (tables=None), or over the m given ones, tables (m, f, value) -> label.
    """
    b, n, f = values.shape
    n_label = max(sizes)
    out = torch.zeros(b, n, n_label, dtype=torch.float64, device=values.device)
    if tables is None:
        exists = torch.arange(n_label, device=values.device) < torch.tensor(sizes, device=values.device)[:, None]
        weight = torch.full((b, f), 1 / f, dtype=torch.float64, device=values.device)  # posterior of the asked factor
        known = torch.full((b, f, n_label), -1, device=values.device)  # label of each value seen so far
        free = exists.expand(b, -1, -1).clone()  # labels not yet given to a value
        for j in range(n):
            value = values[:, j, :, None]
            seen = known.gather(-1, value)
            guess = free / free.sum(-1, keepdim=True).clamp(min=1)
            p = torch.where(seen >= 0, F.one_hot(seen[..., 0].clamp(min=0), n_label).double(), guess.double())
            out[:, j] = torch.einsum("bf,bfc->bc", weight, p)
            y = label[:, j, None, None].expand(b, f, 1)
            weight = weight * p.gather(-1, y)[..., 0]  # the evidence a pair gives is how well it was predicted
            weight = weight / weight.sum(-1, keepdim=True)
            known.scatter_(-1, value, y)
            free.scatter_(-1, y, False)
        return out
    alive = torch.ones(b, len(tables), f, dtype=torch.bool, device=values.device)
    for j in range(n):
        guess = torch.stack([tables[:, i][:, values[:, j, i]].T for i in range(f)], -1)  # (b, m, f)
        out[:, j].scatter_add_(-1, guess.flatten(1), alive.flatten(1).double())
        alive &= guess == label[:, j, None, None]
    return out / out.sum(-1, keepdim=True)


def pairwise(values, label, sizes: list[int]) -> torch.Tensor:
    """Prediction of every label by what each earlier pair says by itself: (b, n, n_label) probabilities, arguments as for `bayes`.

    A pair whose item agrees in the asked factor has the same label, otherwise another one, all equally likely; which factor is asked
    is never inferred: it stays uniform over those that have the pair's label. The pairs' messages are multiplied (naive Bayes).
    """
    size = torch.tensor(sizes, dtype=torch.float64, device=values.device)
    every = torch.arange(max(sizes), device=values.device)
    exists = (every < size[:, None]).double()  # (f, c)
    prior = (exists / size[:, None]).mean(0)  # (c,)
    factor = exists.T[label] / size  # (b, n, f): which factor has the pair's label
    factor = factor / factor.sum(-1, keepdim=True)
    log_p = prior.log().repeat(*label.shape, 1)
    for j in range(label.shape[1] - 1):
        agrees = values[:, j + 1 :] == values[:, j, None]  # (b, later n, f)
        same = (agrees * factor[:, j, None]).sum(-1, keepdim=True)
        other = torch.einsum("bnf,fc->bnc", ~agrees * factor[:, j, None] / (size - 1), exists)
        message = torch.where(every == label[:, j, None, None], same, other)
        log_p[:, j + 1 :] += (message / prior).log()
    return log_p.softmax(-1)
