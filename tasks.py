"""What is learnt: worlds of items and of numbers, in-context sequences over them, and the exact levels of a learner.

Items: images here, texts in exp_nlp.py. A sequence asks one factor (say wall hue) under one mapping, a permutation of
its values to labels. It holds n items, each followed by its label; the pairs so far tell which factor and mapping.
`difficulty` m is the number of mappings in play: 1 = always the same one, inf = a fresh one for every sequence.
(4 values have only 24 permutations, as the paper's `shape` has: there all m far beyond 24 are much the same.)
Regression: a sequence holds n pairs x, y = w.x with a hidden vector w; `difficulty` is the dimension d.

Every random choice is a hash of (seed, stream, number of the sequence, place). So a sequence is a pure function of its
number: the same on CPU and GPU, and a run's data do not depend on which runs share the program.
"""

import argparse
import hashlib
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn import functional as F

FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
SIZES = (10, 10, 10, 8, 4, 15)  # the paper's; image index = mixed radix in this order, orientation fastest
N_IMAGES = math.prod(SIZES)  # 480,000
# RGB (10, 3) of ten saturated hues around the circle
HUES = np.clip(np.abs((np.arange(10)[:, None] / 10 * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1).astype(np.float32)
INFINITE = 2**53  # as many mappings as a double can count: as good as a fresh one for every sequence
MOST = 20_000  # finite mappings, as in the paper: the Bayes level goes through all of them
HELD_OUT = 2**50  # held-out sequences are numbered from here on, training ones from 0; `held_out=` chooses the images
ASKED, MAPPING, PERMUTATION, ITEMS, SHUFFLE, WEIGHTS, INPUTS = range(7)  # streams: what a hash is for


class UsageError(ValueError):
    """Input that cannot be served; the message names the flag and the cure. Scripts print it and exit with code 2."""


def random_bits(*key) -> torch.Tensor:
    """63-bit hash of integers and integer tensors that broadcast (SplitMix64 finaliser, folded over the key)."""
    h = torch.zeros((), dtype=torch.int64)
    for part in key:  # integers stay on the host; the masks make a shift of int64 a logical one
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
    small = pool < 8 * n
    place = torch.arange(pool if small else 2 * n + 8, device=key[-1].device)
    key = [part[..., None] if torch.is_tensor(part) else part for part in key]
    if small:  # shuffle the pool, several times over if a sequence is longer than it
        rounds = [random_bits(*key, round_, place).argsort(-1) for round_ in range(-(-n // pool))]
        return torch.stack(rounds, -2).flatten(-2)[..., :n]
    draw = random_int(pool, *key, place)  # draw too many, keep the first n different ones
    value, order = draw.sort(dim=-1, stable=True)
    repeated = F.pad(value[..., 1:] == value[..., :-1], (1, 0))
    late = torch.zeros_like(repeated).scatter(-1, order, repeated)
    first = late.long().argsort(dim=-1, stable=True)  # first occurrences first, in drawing order
    return draw.gather(-1, first[..., :n])


def sequence_numbers(seed: torch.Tensor, step: int, batch: int, finite: int = 0) -> torch.Tensor:
    """Numbers (r, batch) of a step's sequences: new ones, or the authors' `finite` many in a new order each epoch."""
    place = torch.arange(batch, device=seed.device)
    if not finite:
        return (step * batch + place).expand(len(seed), batch)
    epoch, at = divmod(step, finite // batch)  # the last, smaller batch of an epoch is left out
    return epoch_order(seed, epoch, finite)[:, at * batch + place]


@lru_cache(maxsize=1)
def epoch_order(seed: torch.Tensor, epoch: int, finite: int) -> torch.Tensor:
    """The order (r, finite) of an epoch; kept until the next one, since sorting it at every step would be slow."""
    return random_bits(seed[:, None], SHUFFLE, epoch, torch.arange(finite, device=seed.device)).argsort(-1)


@dataclass
class Sequences:  # a batch of them
    x: torch.Tensor  # (r, b, n, d) vectors or words
    y: torch.Tensor  # (r, b, n, c) as the model reads it: one-hot labels, or numbers (c = 1)
    values: torch.Tensor  # (r, b, n, f) of items; of regression x
    asked: torch.Tensor  # (r, b) index into world.asked; of regression the hidden vector (r, b, d)
    item: torch.Tensor | None = None  # (r, b, n) numbers
    label: torch.Tensor | None = None  # (r, b, n)
    dimension: torch.Tensor | None = None  # (r,) d of regression


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
    oracle: torch.Tensor | None = None  # (r,) runs that see `clean` in place of the table, see show_clean
    clean: torch.Tensor | None = None  # (item, d) the factor values themselves
    weight: torch.Tensor | None = None  # (item,) how often to draw it, summing to 1 in each part; None = equally often
    n_word: int = 0  # vocabulary, when items are words

    def __post_init__(self):
        device = self.values.device
        self.n_label = max(self.sizes[f] for f in self.asked)
        self.asked_sizes = torch.tensor([self.sizes[f] for f in self.asked], device=device)
        self.varying = [f for f, size in enumerate(self.sizes) if size > 1]
        self.value_sizes = [self.sizes[f] for f in self.varying]
        self.read = self.varying  # by the extra losses; a script may choose fewer
        self.asked_varying = [self.varying.index(f) for f in self.asked]  # the asked ones among them
        self.n_value, self.n_asked = sum(self.value_sizes), len(self.asked)  # outputs of the extra losses' read-outs
        self.asked_columns = torch.tensor(self.asked, device=device)
        self.other = torch.randperm(len(self.values), generator=torch.Generator().manual_seed(0)).to(device)
        if self.weight is not None:  # summed on the CPU, since a GPU's order of adding changes
            self.cumulated = [self.weight[part].cpu().cumsum(0).to(device) for part in (self.train, self.test)]

    @property
    def inputs(self) -> dict:
        """What model.Config has to know."""
        if self.n_word:
            return dict(d_x=0, d_y=self.n_label, n_word=self.n_word, n_token=self.table.shape[1])
        return dict(d_x=self.table.shape[1], d_y=self.n_label)

    def show_clean(self, runs: list[bool]) -> None:
        """These runs are oracles: they see the factor values, so their weights component is perfect from step 0."""
        self.oracle, clean = torch.tensor(runs, device=self.values.device), one_hot_values(self.values, self.sizes)
        wider = clean.shape[1] - self.table.shape[1]
        self.clean, self.table = F.pad(clean, (0, max(0, -wider))), F.pad(self.table, (0, max(0, wider)))

    def look(self, item: torch.Tensor) -> torch.Tensor:
        """What each run sees of these items: (r, ...) numbers -> (r, ..., d)."""
        if self.oracle is None:
            return self.table[item]
        return torch.where(self.oracle.view(-1, *[1] * item.dim()), self.clean[item], self.table[item])

    def permutation(self, seed, mapping, asked) -> torch.Tensor:
        """Label of each value under a mapping: seed (r, ...), mapping, asked (broadcast) -> (..., n_label)."""
        size = self.asked_sizes[asked][..., None]
        value = torch.arange(self.n_label, device=size.device)
        key = random_bits(seed[..., None], PERMUTATION, mapping[..., None], asked[..., None], value)
        return key.masked_fill(value >= size, (1 << 63) - 1).argsort(-1)

    def sample(self, seed, m, number, n: int, held_out: bool = False) -> Sequences:
        """The sequences with these numbers. seed (r,), m (r,) or (r, b) mappings in play, number (r, b)."""
        seed, pool = seed[:, None], self.test if held_out else self.train
        asked = random_int(self.n_asked, seed, ASKED, number)
        mapping = random_int(m if m.dim() == 2 else m[:, None], seed, MAPPING, number)  # all that depends on m
        if self.weight is None:
            item = pool[distinct(len(pool), n, seed, ITEMS, number)]
        else:  # drawn one by one
            u = random_unit(seed[..., None], ITEMS, number[..., None], torch.arange(n, device=number.device))
            item = pool[torch.searchsorted(self.cumulated[held_out], u).clamp(max=len(pool) - 1)]
        values = self.values[item]
        value = values.gather(-1, repeat(self.asked_columns[asked], "r b -> r b n 1", n=n))[..., 0]
        label = self.permutation(seed, mapping, asked).gather(-1, value)
        return Sequences(self.look(item), F.one_hot(label, self.n_label).float(), values, asked, item, label)

    def to_probe(self, seed, m, n: int, count: int) -> list[tuple]:
        """What a probe learns from and is tested on, each x (r, i, ...) and varying values (1, 1, i, f): up to count
        items and a quarter, whole sequences of n, since the identity probe may not meet positions never trained."""
        generator, parts = torch.Generator().manual_seed(0), []
        for many, held_out in ((count, False), (count // 4, True)):
            item = self.draw(many, held_out, generator)
            item = item[: max(1, len(item) // n) * n]
            parts.append((self.look(item.expand(len(seed), -1)), self.values[item][None, None, :, self.varying]))
        return parts

    def draw(self, count: int, held_out: bool, generator) -> torch.Tensor:
        """Numbers of up to `count` items for a probe: all different, or by weight."""
        pool = self.test if held_out else self.train
        if self.weight is None:
            picked = torch.randperm(len(pool), generator=generator)[:count]
        else:
            picked = torch.multinomial(self.weight[pool].cpu(), min(count, len(pool)), True, generator=generator)
        return pool[picked.to(pool.device)]

    def loss(self, logits, batch: Sequences) -> torch.Tensor:
        """Cross-entropy of the labels in nats: logits (r, b, n, n_label) -> (r, b, n)."""
        return cross_entropy(logits, batch.label)

    def value_loss(self, logits, values) -> torch.Tensor:
        """Mean cross-entropy of the factors read: logits (r, b, n, n_value), values (r, b, n, f) -> (r, b, n)."""
        parts = zip(self.varying, logits.split(self.value_sizes, -1))
        return torch.stack([cross_entropy(part, values[..., f]) for f, part in parts if f in self.read]).mean(0)

    def asked_loss(self, logits, batch: Sequences) -> torch.Tensor:
        """Cross-entropy of the asked factor: logits (r, b, n, n_asked) -> (r, b, n)."""
        return cross_entropy(logits, repeat(batch.asked, "r b -> r b n", n=logits.shape[2]))

    def other_values(self, batch: Sequences) -> torch.Tensor:
        """The values of another, fixed item in the place of each: as much to predict, but only memorising helps."""
        return self.values[self.other[batch.item]]

    def references(self, seed: int, difficulty: float, n: int, sequences: int = 1024) -> dict:
        """Levels for one run: losses in nats, accuracies as fractions; computed from the world and the run's mappings.

        chance, no_context_loss: the best prediction from x alone, over the held-out items. bayes_*: the best from x
        and the pairs before it, on held-out sequences.
        For a learner that sees the factors of x: where x does not show them fully (texts that are cut), bounds.
        """
        device, sizes = self.values.device, [self.sizes[f] for f in self.asked]
        seeds, labels = torch.tensor([seed], device=device), torch.arange(self.n_label, device=device)
        if difficulty == math.inf:
            tables, chunk = None, sequences
            per_value = torch.stack([((labels < size).double() / size).expand(self.n_label, -1) for size in sizes])
        else:
            mapping = torch.arange(int(difficulty), device=device)[:, None]
            tables = self.permutation(seeds, mapping, torch.arange(len(sizes), device=device))
            chunk = max(1, int(2e7 / tables.numel()))  # little memory
            per_value = torch.stack([(tables == label).double().mean(0) for label in labels], -1)
        prior = sum(per_value[i][self.values[self.test, f]] for i, f in enumerate(self.asked)) / len(sizes)  # (item, c)
        share = torch.full_like(prior[:, 0], 1 / len(prior)) if self.weight is None else self.weight[self.test]
        number = HELD_OUT + torch.arange(sequences, device=device)[None]
        batch = self.sample(seeds, mapping_counts([difficulty], device), number, n, held_out=True)
        seen, label = batch.values[0][..., self.asked], batch.label[0]
        p = torch.cat([bayes(v, y, sizes, tables) for v, y in zip(seen.split(chunk), label.split(chunk))])
        return {
            "chance": (share @ prior.max(-1).values).item(),
            "no_context_loss": (share @ torch.special.entr(prior).sum(-1)).item(),
            "bayes_loss": -p.gather(-1, label[..., None]).log().mean().item(),
            "bayes_accuracy": p.max(-1).values.mean().item(),
        }


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In nats: logits (..., c), target (...) -> (...)."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


@dataclass
class Regression:
    """Linear regression in context (Garg et al. 2022, arXiv 2208.01066): y = w.x, w and x from N(0, I_d)."""

    width: int  # x is zero-padded to it, so that runs of several d share a program
    device: torch.device | str = "cpu"
    n_label = 0  # numbers, not classes

    def __post_init__(self):
        self.n_value = self.n_asked = self.width
        self.value_sizes, self.asked_varying = None, [0]  # numbers, probed as one
        self.inputs = dict(d_x=self.width, d_y=1)

    def sample(self, seed, m, number, n: int, held_out: bool = False) -> Sequences:
        """The sequences with these numbers, which alone decide what is held out. seed (r,), m (r,) d, number (r, b)."""
        pair, dim = torch.arange(n, device=number.device), torch.arange(self.width, device=number.device)
        present = rearrange(dim < m[:, None], "r d -> r 1 d")
        seed, number = seed[:, None, None], number[..., None]
        w = random_normal(seed, WEIGHTS, number, dim) * present
        x = random_normal(seed[..., None], INPUTS, number[..., None], pair[:, None], dim) * present[:, :, None]
        y = torch.einsum("rbnd,rbd->rbn", x, w)
        return Sequences(x, y[..., None], x, w, dimension=m)

    def to_probe(self, seed, m, n: int, count: int) -> list[tuple]:
        """As of Items: what is read is x itself."""
        number = 3 * HELD_OUT + torch.arange(max(5, 5 * count // (4 * n)), device=seed.device).expand(len(seed), -1)
        parts = number.tensor_split([-(number.shape[1] // 5)], 1)
        x = [self.sample(seed, m, part, n).x.flatten(1, 2) for part in parts]
        return [(part, part[:, None]) for part in x]

    def loss(self, guess, batch: Sequences) -> torch.Tensor:
        """Squared error / d: guess (r, b, n, 1) -> (r, b, n)."""
        return (guess.float() - batch.y)[..., 0].square() / batch.dimension[:, None, None]

    def value_loss(self, guess, values) -> torch.Tensor:
        """Squared error of x, mean over its d dimensions: guess, values (r, b, n, width) with padding -> (r, b, n)."""
        present = (values != 0).any((1, 2), keepdim=True)
        return ((guess.float() - values).square() * present).sum(-1) / present.sum(-1)

    def asked_loss(self, guess, batch: Sequences) -> torch.Tensor:
        """Squared error of w, mean over its d dimensions: guess (r, b, n, width) -> (r, b, n)."""
        return self.value_loss(guess, batch.asked[:, :, None].expand_as(guess))

    def other_values(self, batch: Sequences) -> torch.Tensor:
        """The x of another sequence: as much to predict, and nothing to learn from."""
        return batch.values.roll(1, 1)

    def references(self, seed: int, difficulty: float, n: int, sequences: int = 512) -> dict:
        """Mean squared error / d over the sequence, as in Garg et al. no_context_loss: predicting zero, the best from x
        alone (exact). bayes: the posterior mean of w, which is least squares of least norm."""
        d, seeds = int(difficulty), torch.tensor([seed], device=self.device)
        number = HELD_OUT + torch.arange(sequences, device=self.device)[None]
        batch = self.sample(seeds, torch.tensor([d], device=self.device), number, n)
        x, y = batch.x[0, :, :, :d].double(), batch.y[0].double()
        errors = []
        for k in range(n):
            guess = x[:, k : k + 1] @ ridge(x[:, :k], y[:, :k], 0.0)
            errors.append((guess[:, 0, 0] - y[:, k, 0]).square().mean().item() / d)
        return {"no_context_loss": 1.0, "bayes_loss": float(np.mean(errors)), "bayes_last_loss": errors[-1]}


def ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weights (..., d, c) of ridge regression on x (..., k, d), y (..., k, c); penalty 0: least squares of least
    norm. A broken run does not stop the others: its weights are no numbers."""
    k, d = x.shape[-2:]
    if k < d:  # the smaller of the two equal forms
        return x.mT @ torch.linalg.solve_ex(x @ x.mT + penalty * torch.eye(k, dtype=x.dtype, device=x.device), y)[0]
    return torch.linalg.solve_ex(x.mT @ x + penalty * torch.eye(d, dtype=x.dtype, device=x.device), x.mT @ y)[0]


def parse_difficulty(text: str) -> float:
    """'10' -> 10.0, 'inf' -> inf."""
    try:
        m = float(text)
    except ValueError:
        m = 0.0
    if not (m == math.inf or (1 <= m <= MOST and m == int(m))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST:,}, nor inf")
    return m


def mapping_counts(difficulty: list[float], device) -> torch.Tensor:
    """Difficulties as a tensor of numbers of mappings (r,)."""
    return torch.tensor([INFINITE if m == math.inf else int(m) for m in difficulty], device=device)


@lru_cache
def render() -> np.ndarray:
    """Shaded masks (480, 3, 16, 16) of floor, walls and object for every (scale, shape, orientation).

    A camera looks into a room, the object stands in its middle, both turn together from -30 to 30 degrees. Shading does
    not depend on hue, so any of the 480,000 images is masks x hues. Rays are cast at 64 x 64 and averaged to 16 x 16.
    """
    eye, light, right = np.array([0.0, -4.6, 2.4]), np.array([-0.55, -0.6, 0.7]), np.array([1, 0, 0])
    forward = [0, 0, 0.75] - eye
    forward = forward / np.linalg.norm(forward)
    screen = (np.arange(64) + 0.5) / 64 * 2 - 1  # left to right, and top to bottom
    ray = forward + 0.46 * (screen[:, None] * right - screen[:, None, None] * np.cross(right, forward))
    turn = np.radians(np.linspace(-30, 30, SIZES[5]))  # into coordinates in which room and object stay put
    cos, sin, zero = np.cos(turn), np.sin(turn), 0 * turn
    to_room = np.array([[cos, sin, zero], [-sin, cos, zero], [zero, zero, 1 + zero]]).transpose(2, 0, 1)
    o, d = to_room @ eye, np.einsum("oij,yxj->oyxi", to_room, ray)
    o, light = o[:, None, None], (to_room @ (light / np.linalg.norm(light)))[:, None, None]
    masks = []  # (scale shape), each (orientation, y, x, floor walls object)
    with np.errstate(divide="ignore", invalid="ignore"):
        # the room is a box without a ceiling, seen from inside: its walls are 3.4 from the middle
        reach = (np.where(d < 0, [-3.4, -3.4, 0], [3.4, 3.4, np.inf]) - o) / d
        first = reach == reach.min(-1, keepdims=True)
        for scale in np.linspace(0.55, 1.25, SIZES[3]):
            for shape in ("cube", "cylinder", "sphere", "capsule"):
                closest, normal = np.inf, -np.sign(d) * first
                for body in bodies(shape, scale):
                    t, across = enter(o - [0, 0, scale], d, *body)  # it stands on the floor
                    closest, nearer = np.minimum(t, closest), t < closest
                    normal = np.where(nearer[..., None], across, normal)
                normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
                shade = 0.35 + 0.65 * np.clip((normal * light).sum(-1), 0, None)
                seen = np.where(np.isfinite(closest), 2, ~first[..., 2])  # 0 floor, 1 wall, 2 object
                masks.append(shade[..., None] * (seen[..., None] == np.arange(3)))
    return rearrange(masks, "g o (y s) (x t) c -> (g o) c y x (s t)", s=4, t=4).mean(-1).astype(np.float32)


def bodies(shape: str, s: float) -> list[tuple]:
    """The parts of an object of half height s: its centre's height, and the (axes, distance from it) that bound it."""
    x, y, z, level, every = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
    return {
        "cube": [(-0.15 * s, [(axis, 0.85 * s) for axis in (x, y, z)])],  # about the cylinder's volume
        "cylinder": [(0, [(level, 0.8 * s), (z, s)])],
        "sphere": [(0, [(every, s)])],
        "capsule": [(0, [(level, 0.55 * s), (z, 0.45 * s)]), *((h * s, [(every, 0.55 * s)]) for h in (-0.45, 0.45))],
    }[shape]


def enter(o: np.ndarray, d: np.ndarray, height: float, bounds: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Where rays o + t d enter a part: t, infinite where they miss it, and the normal."""
    enters, leaves, normal = -math.inf, math.inf, 0 * d
    for axes, radius in bounds:
        p, q = (o - [0, 0, height]) * axes, d * axes
        a, b, c = (q * q).sum(-1), (p * q).sum(-1), (p * p).sum(-1) - radius**2
        root = np.sqrt(b * b - a * c)  # not a number where the ray misses
        normal = np.where(((-b - root) / a > enters)[..., None], p - ((b + root) / a)[..., None] * q, normal)
        enters, leaves = np.maximum(enters, (-b - root) / a), np.minimum(leaves, (root - b) / a)
    return np.where(enters < leaves, enters, math.inf), normal


def image(values: np.ndarray) -> np.ndarray:
    """Images (..., 3, 16, 16) in 0 .. 1 of full-size factor values (..., 6)."""
    geometry = (values[..., 3] * SIZES[4] + values[..., 4]) * SIZES[5] + values[..., 5]
    return np.einsum("...syx,...sc->...cyx", render()[geometry], HUES[values[..., :3]])


def one_hot_values(values: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """What an oracle sees, the varying factors' values, one-hot and standardised: (item, f) -> (item, sum of sizes)."""
    columns = torch.cat([F.one_hot(values[:, f], size) for f, size in enumerate(sizes) if size > 1], 1).float()
    return (columns - columns.mean(0)) / columns.std(0, correction=0)


def code(values: np.ndarray, sizes: tuple[int, ...], width: int, gain: float, seed: int = 0) -> np.ndarray:
    """A fixed random two-layer tanh network of the factor values: (image, 6) -> (image, width).

    gain is the entanglement: near 0 the code is linear in the one-hot values, a large one folds factors together.
    """
    rng = np.random.default_rng(seed)
    varying = [f for f, size in enumerate(sizes) if size > 1]
    first = rng.normal(size=(sum(sizes[f] for f in varying), width)) / len(varying) ** 0.5
    second = rng.normal(size=(width, width)) / width**0.5
    parts = []
    for part in np.array_split(values, -(-len(values) // 8192)):  # little memory
        one_hot = np.concatenate([np.eye(sizes[f])[part[:, f]] for f in varying], 1)
        parts.append(np.tanh(gain * np.tanh(gain * one_hot @ first) @ second))
    return np.concatenate(parts)


def vae(values: np.ndarray, latent: int = 64, steps: int = 3000, beta: float = 0.1) -> np.ndarray:
    """Latent means (image, latent) of a small VAE trained here, without labels, on random images of the full world."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(768, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2 * latent))
    decoder = torch.nn.Sequential(torch.nn.Linear(latent, 512), torch.nn.ReLU(), torch.nn.Linear(512, 768))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    rng = np.random.default_rng(0)
    print("training a VAE for --embedding vae: a minute or two", flush=True)
    for _ in range(steps):
        x = torch.from_numpy(image(rng.integers(SIZES, size=(256, 6)))).flatten(1)
        mean, log_var = encoder(x).chunk(2, -1)
        out = decoder(mean + torch.randn_like(mean) * (log_var / 2).exp())
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
        loss = (100 * (out - x).square().sum(-1) + beta * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = np.array_split(values, -(-len(values) // 8192))
        return np.concatenate([encoder(torch.from_numpy(image(v)).flatten(1))[:, :latent].numpy() for v in parts])


def cached_vae(values: np.ndarray, cache: str) -> np.ndarray:
    """The latents of `vae`, kept in a folder for the next time. Raises UsageError for a damaged file."""
    name = hashlib.sha256(values.tobytes() + repr((vae.__defaults__, torch.__version__)).encode()).hexdigest()[:16]
    file = Path(cache) / f"vae-{name}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}.npy")
        np.save(aside, vae(values))
        os.replace(aside, file)
    try:
        return np.load(file)
    except (ValueError, EOFError):
        raise UsageError(f"--embedding vae: {file} is damaged; remove it") from None


def load_embedding(path: str) -> np.ndarray:
    """The paper's file layout: an .npz whose key `repre` is (480000, any). Raises UsageError."""
    try:
        with np.load(path) as file:
            table = file["repre"]
        if not (table.ndim == 2 and len(table) == N_IMAGES and table.dtype.kind == "f" and np.abs(table).max() <= 1e6):
            raise ValueError
        return table.astype(np.float32, copy=False)
    except MemoryError:
        raise
    except Exception:  # of a file that is no archive numpy raises nearly anything
        need = f"a readable .npz whose array 'repre' is ({N_IMAGES}, any) finite floating-point numbers up to a million"
        raise UsageError(f"--embedding {path}: must be code, pixels, vae, onehot or {need}") from None


def shapes(
    factors=SIZES, ask=(), embedding="code", code_width=32, code_gain=2.0, code_seed=0, device="cpu", cache="out/cache"
) -> Items:
    """The image world, a 3D-Shapes look-alike: all combinations of six factors, of these many values.

    ask: names of the factors that may be asked (default: all that vary). embedding: code, pixels, vae, onehot (the
    factor values themselves: the oracle) or the paper's file. code_seed: of the code and of the split into training and
    held-out images. Raises UsageError, naming the flag, for counts or files that cannot be served.
    """
    factors = tuple(factors)
    if len(factors) != 6 or any(not 1 <= n <= size for n, size in zip(factors, SIZES)):
        raise UsageError(f"--factors: give six counts, from 1 to {' '.join(map(str, SIZES))} ({', '.join(FACTORS)})")
    asked = [FACTORS.index(name) for name in ask] or [f for f, n in enumerate(factors) if n > 1]
    if not asked or any(factors[f] == 1 for f in asked):
        raise UsageError("--ask: a factor with one value (--factors) cannot be asked; give it at least two")
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in factors], indexing="ij"), -1).reshape(-1, 6)
    cut = round(0.8 * len(grid))
    if not 0 < cut < len(grid):
        raise UsageError(f"--factors: {len(grid)} images leave none to hold out; give more values")
    # evenly spread values of the full world: hues lie on a circle, the others on a line
    spread = [np.arange(n) * s // n for n, s in zip(factors[:3], SIZES)]
    spread += [np.linspace(0, s - 1, n).round().astype(int) for n, s in zip(factors[3:], SIZES[3:])]
    full = np.stack([spread[f][grid[:, f]] for f in range(6)], -1)
    if embedding == "code":
        table = code(grid, factors, code_width, code_gain, code_seed)
    elif embedding == "pixels":
        table = image(full).reshape(-1, 768)
    elif embedding == "vae":
        table = cached_vae(full, cache)
    elif embedding == "onehot":
        table = one_hot_values(torch.from_numpy(grid), factors).numpy()
    else:
        table = load_embedding(embedding)[np.ravel_multi_index(full.T, SIZES)]
    if embedding in ("code", "pixels", "vae"):
        mean, deviation = table.mean(0), table.std(0) + 1e-6
        table -= mean  # in place: at paper scale this is gigabytes
        table /= deviation
    order = np.random.default_rng(code_seed).permutation(len(grid))
    parts = [grid, table.astype(np.float32, copy=False), order[:cut], order[cut:], full]
    return Items(FACTORS, factors, asked, *(torch.as_tensor(part, device=device) for part in parts))


def bayes(values, label, sizes: list[int], tables=None) -> torch.Tensor:
    """The exact Bayes prediction of every label from the pairs before it: (b, n, n_label) probabilities.

    values (b, n, f) of the factors that may be asked, label (b, n), sizes (f,). The asked factor is uniform, and so is
    the mapping: over all permutations (tables=None), or over the m given ones, tables (m, f, value) -> label.
    """
    b, n, f = values.shape
    every = torch.arange(max(sizes), device=values.device)
    out = torch.zeros(b, n, len(every), dtype=torch.float64, device=values.device)
    if tables is None:
        weight = torch.full((b, f), 1 / f, dtype=torch.float64, device=values.device)  # posterior of the asked factor
        allowed = (every < torch.tensor(sizes, device=values.device)[:, None, None]).expand(b, f, len(every), -1)
        for j in range(n):
            here, right = every == values[:, j, :, None], every == label[:, j, None]
            free = (allowed & here[..., None]).any(2)
            p = (free / free.sum(-1, keepdim=True).clamp(min=1)).double()
            out[:, j] = torch.einsum("bf,bfc->bc", weight, p)
            weight = weight * (p * right[:, None]).sum(-1)  # the evidence a pair gives is how well it was predicted
            weight = weight / weight.sum(-1, keepdim=True)
            allowed = allowed & (here[..., None] == right[:, None, None])  # (b, f, value, label): no other has it
        return out
    alive = torch.ones(b, len(tables), f, dtype=torch.bool, device=values.device)
    for j in range(n):
        guess = torch.stack([tables[:, i][:, values[:, j, i]].T for i in range(f)], -1)  # (b, m, f)
        out[:, j].scatter_add_(-1, guess.flatten(1), alive.flatten(1).double())
        alive &= guess == label[:, j, None, None]
    return out / out.sum(-1, keepdim=True)
