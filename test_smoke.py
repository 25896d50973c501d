"""pytest: the core against independent references, then every script, README command and table end to end."""

import contextlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # everything is tiny, and commands run beside each other

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import exp_nlp
import probes
from model import GPT, Adam, Block, Config, compile_blocks
from tasks import (
    ASKED,
    FACTORS,
    HELD_OUT,
    ITEMS,
    MAPPING,
    PERMUTATION,
    SIZES,
    Regression,
    UsageError,
    bayes,
    code,
    image,
    load_embedding,  # fmt: skip
    mappings,
    sequence_numbers,
    shapes,
    vae,
)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
TINY = dict(d_x=6, d_y=3, n_pair=4, n_layer=2, n_head=2, d_model=8)
FEW = (4, 3, 2, 1, 2, 3)


# -------------------------------------------------------------------------------- model.py


def tiny_batch(runs: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (runs, 5, 4), generator=g)
    return torch.randn(runs, 5, 4, 6, generator=g), F.one_hot(label, 3).float(), label


def disturbed(model, seed: int = 0):
    """Random biases and norms too, so that a term that is left out shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return model


def slow_gpt(model, run: int, x: np.ndarray, y: np.ndarray, mixing: str) -> np.ndarray:
    """GPT-2 for one run and sequence, position by position in float64: x (n, t) words or (n, d), y (n, c) -> (n, c)."""
    w = {name: p[run].detach().double().numpy() for name, p in model.named_parameters()}

    def linear(v, name):
        return v @ w[name + ".weight"] + w[name + ".bias"][0]

    def norm(v, name):
        return (v - v.mean()) / np.sqrt(v.var() + 1e-5) * w[name + ".weight"][0] + w[name + ".bias"][0]

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def pad(v):
        return np.pad(v, (0, len(w["read_in.weight"]) - len(v)))

    tokens = []
    for x_i, y_i in zip(x, y):
        tokens += [w["words"][i] for i in x_i] if "words" in w else [linear(pad(x_i), "read_in")]
        tokens.append(linear(pad(y_i), "read_in"))
    h = [v + w["position"][t] for t, v in enumerate(tokens)]
    heads, size = model.config.n_head, model.config.d_model // model.config.n_head
    for k in range(model.config.n_layer):
        q, key, value = zip(*(np.split(linear(norm(v, f"blocks.{k}.norm_1"), f"blocks.{k}.qkv"), 3) for v in h))
        for t in range(len(h)):
            out = []
            for s in (slice(i * size, (i + 1) * size) for i in range(heads)):
                score = np.array([q[t][s] @ key[j][s] / math.sqrt(size) for j in range(t + 1)])
                p = np.exp(score - score.max())
                out.append(sum(a * value[j][s] for j, a in enumerate(p / p.sum())))
            own = norm(h[t], f"blocks.{k}.norm_1")
            h[t] = h[t] + (own if mixing == "identity" else linear(np.concatenate(out), f"blocks.{k}.attention_out"))
            h[t] = h[t] + linear(
                gelu(linear(norm(h[t], f"blocks.{k}.norm_2"), f"blocks.{k}.mlp_in")), f"blocks.{k}.mlp_out"
            )
    per_pair = model.config.n_token + 1
    return np.stack([linear(norm(v, "norm"), "read_out") for v in h[per_pair - 2 :: per_pair]])


@pytest.mark.parametrize("words, mixing", [(False, "attention"), (True, "attention"), (False, "identity")])
def test_gpt_equals_slow_gpt2(words, mixing):
    config = Config(**TINY, n_word=11, n_token=2) if words else Config(**TINY)
    model = disturbed(GPT(config, [3, 4]))
    x, y, _ = tiny_batch(2)
    if words:
        x = torch.randint(11, (2, 5, 4, 2), generator=torch.Generator().manual_seed(0))
    got = model(x, y, mixing)
    for run, sequence in itertools.product(range(2), range(2)):
        want = slow_gpt(model, run, x[run, sequence].numpy(), y[run, sequence].numpy(), mixing)
        np.testing.assert_allclose(got[run, sequence].detach(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x[:, :, :1], mixing=mixing), got[:, :, :1])  # a prompt of one item and no label


def test_attention_is_causal_and_identity_mixes_nothing():
    model = disturbed(GPT(Config(**TINY), [0]))
    x, y, _ = tiny_batch(1)
    other_y, other_x = y.clone(), x.clone()
    other_y[:, :, 1] = 1 - other_y[:, :, 1]
    other_x[:, :, 2] += 1  # pair 2, so predictions 0 and 1 may not notice
    a, b, c = model(x, y), model(x, other_y), model(other_x, y)
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and torch.equal(a[:, :, :2], c[:, :, :2])
    assert not torch.allclose(a[:, :, 2:], b[:, :, 2:]) and not torch.allclose(a[:, :, 3], c[:, :, 3])
    a, c = model(x, y, "identity"), model(other_x, y, "identity")
    assert torch.equal(a[:, :, 3], c[:, :, 3]) and not torch.allclose(a[:, :, 2], c[:, :, 2])


def train_tiny(seeds, rows, rates, steps=5, device="cpu"):
    world = shapes(FEW, code_width=6, device=device)
    seed, m = torch.tensor(seeds, device=device), mappings([2.0, 7.0, math.inf], device)[rows]
    model = GPT(Config(d_x=6, d_y=world.n_label, n_pair=4, n_layer=2, n_head=2, d_model=8), seeds).to(device)
    optimizer = Adam(model, rates)
    for step in range(steps):
        batch = world.sample(seed, m, sequence_numbers(seed, step, 8), 4)
        world.loss(model(batch.x, batch.y), batch).mean((1, 2)).sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_a_run_alone_equals_the_run_among_others_bit_for_bit():
    together = train_tiny([5, 6, 7], [0, 1, 2], [1e-3, 2e-3, 1e-2])
    alone = train_tiny([6], [1], [2e-3])
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone))
    assert not torch.equal(together[0][0], together[0][1])
    diverging = train_tiny([5, 6, 7], [0, 1, 2], [1e-3, 2e-3, math.inf])  # a run that blows up spares the others
    assert all(torch.equal(a[1], b[0]) for a, b in zip(diverging, alone)) and diverging[0][2].isnan().any()


def test_adam_equals_torch_for_every_run():
    # in float64: keys' biases have no gradient but rounding noise, which Adam would blow up
    model = disturbed(GPT(Config(**TINY), [0, 1, 2])).double()
    singles = []
    for run, (lr, eps, decay) in enumerate([(1e-3, 1e-8, 0.0), (1e-2, 1e-4, 0.1), (3e-3, 1e-8, 0.0)]):
        one = GPT(Config(**TINY), [0]).double()
        with torch.no_grad():
            for p, q in zip(one.parameters(), model.parameters()):
                p.copy_(q[run : run + 1])
        singles.append((one, torch.optim.AdamW(one.parameters(), lr=lr, eps=eps, weight_decay=decay)))
    ours = Adam(model, [1e-3, 1e-2, 3e-3], [1e-8, 1e-4, 1e-8], [0.0, 0.1, 0.0], [math.inf, math.inf, 0.1])
    for step in range(4):
        x, y, label = (t.double() if t.is_floating_point() else t for t in tiny_batch(3, step))
        sum(F.cross_entropy(z.flatten(0, 1), t.flatten()) for z, t in zip(model(x, y), label)).backward()
        ours.step()
        state, ours = (
            ours.state_dict(),
            Adam(model, 1.0, [1e-8, 1e-4, 1e-8], [0.0, 0.1, 0.0], [math.inf, math.inf, 0.1]),
        )
        ours.load_state_dict(state)  # the rates too
        for run, (one, optimizer) in enumerate(singles):
            optimizer.zero_grad()
            F.cross_entropy(one(x[run, None], y[run, None])[0].flatten(0, 1), label[run].flatten()).backward()
            if run == 2:
                assert torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1) > 0.1
            optimizer.step()
            for p, q in zip(model.parameters(), one.parameters()):
                torch.testing.assert_close(p[run], q[0], atol=1e-6, rtol=1e-5)


def test_bf16_keeps_the_residual_stream_in_fp32_and_gives_nearly_the_same_logits():
    model, (x, y, _) = GPT(Config(**TINY), [0]), tiny_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits, states = model(x, y, hidden=True)
    assert logits.dtype == torch.bfloat16 and all(h.dtype == torch.float32 for h in states)
    torch.testing.assert_close(logits.float(), model(x, y), atol=3e-2, rtol=3e-2)


def test_one_compilation_serves_every_layer_and_no_measure(monkeypatch):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr("shutil.which", str)
    monkeypatch.setattr(Block, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    model, (x, y, _) = disturbed(GPT(Config(**TINY), [0, 1])), tiny_batch(2)
    plain = model(x, y)
    compile_blocks(model)
    torch.testing.assert_close(model(x, y), plain)
    assert len(compiled) == 1
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :3, :2], y[:, :3, :2]), plain[:, :3, :2])
    assert len(compiled) == 1


# -------------------------------------------------------------------------------- tasks.py


def slow_bits(*key: int) -> int:
    """SplitMix64's finaliser folded over the key, in Python integers."""
    h, mask = 0, 2**64 - 1
    for part in key:
        h = ((h ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h & (2**63 - 1)


def slow_int(high: int, *key: int) -> int:
    return int((slow_bits(*key) >> 10) * 2.0**-53 * high)


@pytest.mark.parametrize("held_out", [False, True])
def test_sampler_equals_a_slow_loop(held_out):
    world = shapes(FEW, FACTORS[:2] + FACTORS[5:], code_width=5)
    seeds, difficulty, n = [3, 8], [4, 2**53], 6
    number = sequence_numbers(torch.tensor(seeds), 7, 3) + HELD_OUT * held_out
    got = world.sample(torch.tensor(seeds), torch.tensor(difficulty), number, n, held_out)
    for r, b in itertools.product(range(2), range(3)):
        seed, sequence = seeds[r], 7 * 3 + b + HELD_OUT * held_out
        asked = slow_int(3, seed, ASKED, sequence)
        mapping = slow_int(difficulty[r], seed, MAPPING, sequence)
        pool, column = (world.test if held_out else world.train).tolist(), [0, 1, 5][asked]
        keys = [slow_bits(seed, PERMUTATION, mapping, asked, v) for v in range(FEW[column])]
        label_of = sorted(range(FEW[column]), key=keys.__getitem__)
        picks = []
        if len(pool) >= 8 * n:
            draws = [slow_int(len(pool), seed, ITEMS, sequence, i) for i in range(2 * n + 8)]
            picks = list(dict.fromkeys(draws))[:n]
        else:
            picks = sorted(range(len(pool)), key=lambda i: slow_bits(seed, ITEMS, sequence, 0, i))[:n]
        assert got.asked[r, b] == asked and got.item[r, b].tolist() == [pool[i] for i in picks]
        for i, pick in enumerate(picks):
            values = np.unravel_index(pool[pick], FEW)
            assert got.values[r, b, i].tolist() == list(values)
            assert got.label[r, b, i] == label_of[values[column]]
            assert torch.equal(got.x[r, b, i], world.table[pool[pick]])


def test_difficulty_is_the_number_of_mappings_and_changes_nothing_else():
    world, seed = shapes((4, 4, 4, 4, 4, 1), FACTORS[:3]), torch.zeros(3, dtype=torch.long)
    batch = world.sample(seed, mappings([1.0, 5.0, math.inf], "cpu"), sequence_numbers(seed, 0, 2000), 12)
    assert torch.equal(batch.item[0], batch.item[2]) and torch.equal(batch.asked[0], batch.asked[2])
    assert set(batch.item.flatten().tolist()) == set(world.train.tolist()) and len(world.train) == 819
    used = [set(), set(), set()]  # every (asked factor, value -> label) seen, as whole permutations
    for r, b in itertools.product(range(3), range(2000)):
        value = batch.values[r, b].gather(1, batch.asked[r, b].expand(12, 1))[:, 0].tolist()
        table = dict(zip(value, batch.label[r, b].tolist()))
        if len(table) == 4:
            used[r].add((batch.asked[r, b].item(), *(table[v] for v in range(4))))
    assert len(used[0]) == 3 and 10 <= len(used[1]) <= 15 and len(used[2]) == 3 * 24


def test_a_finite_set_of_sequences_is_seen_once_an_epoch():
    seed = torch.tensor([1, 2])
    steps = torch.stack([sequence_numbers(seed, step, 5, finite=20) for step in range(8)])
    for r, epoch in itertools.product(range(2), range(2)):
        assert sorted(steps[4 * epoch : 4 * epoch + 4, r].flatten().tolist()) == list(range(20))
    assert not torch.equal(steps[:4], steps[4:]) and not torch.equal(steps[:, 0], steps[:, 1])
    assert sequence_numbers(seed, 10**8, 10**5).max() < HELD_OUT  # the longest training meets no held-out sequence


def test_bayes_equals_enumeration():
    sizes, g = [3, 2], torch.Generator().manual_seed(0)
    values = torch.stack([torch.randint(s, (30, 5), generator=g) for s in sizes], -1)
    every = [list(itertools.permutations(range(s))) for s in sizes]
    label = torch.tensor(
        [[every[b % 2][b % len(every[b % 2])][v[b % 2]] for v in values[b].tolist()] for b in range(30)]
    )
    got = bayes(values, label, sizes)
    tables = torch.tensor([[[*a], [*b, 0]] for a, b in itertools.product(*every)])
    listed = bayes(values, label, sizes, tables)
    for b, j in itertools.product(range(30), range(5)):
        p = np.zeros(3)
        for f in range(2):
            for table in every[f]:
                if all(table[values[b, i, f]] == label[b, i] for i in range(j)):
                    p[table[values[b, j, f]]] += 1 / len(every[f])
        np.testing.assert_allclose(got[b, j], p / p.sum(), atol=1e-12)
        np.testing.assert_allclose(listed[b, j], p / p.sum(), atol=1e-12)


def test_reference_levels_of_the_full_world():
    """The levels without context in closed form, and a Bayes accuracy just below that of a learner told the factor."""
    level = shapes(code_width=2).references(0, math.inf, 40, sequences=512)
    assert level["no_context_loss"] == pytest.approx(2.445, abs=5e-4)
    assert level["label_set_loss"] == pytest.approx(np.mean(np.log(SIZES)), abs=1e-6)
    assert level["chance"] == pytest.approx(0.1236, abs=5e-5)
    assert 0.79 < level["bayes_accuracy"] < 0.834 and level["bayes_loss"] > 0.362  # 0.834, 0.362: the factor known


def test_extra_targets_equal_a_slow_loop():
    world, seed, g = shapes(FEW, FACTORS[:2], code_width=5), torch.tensor([3, 8]), torch.Generator().manual_seed(0)
    batch = world.sample(seed, mappings([4.0, math.inf], "cpu"), sequence_numbers(seed, 0, 3), 4)
    sizes = [4, 3, 2, 2, 3]
    guess, which = torch.randn(2, 3, 4, sum(sizes), generator=g), torch.randn(2, 3, 4, 2, generator=g)
    got, asked, other = world.value_loss(guess, batch.values), world.asked_loss(which, batch), world.other_values(batch)

    def nll(z, t):
        return float(np.log(np.exp(z.double().numpy()).sum()) - z[t].item())

    for r, b, n in itertools.product(range(2), range(3), range(4)):
        values = [v for v, size in zip(np.unravel_index(batch.item[r, b, n].item(), FEW), FEW) if size > 1]
        parts = guess[r, b, n].split(sizes)
        assert got[r, b, n].item() == pytest.approx(np.mean([nll(z, v) for z, v in zip(parts, values)]), abs=1e-5)
        assert asked[r, b, n].item() == pytest.approx(nll(which[r, b, n], batch.asked[r, b].item()), abs=1e-5)
    again = world.other_values(world.sample(seed, mappings([4.0, math.inf], "cpu"), sequence_numbers(seed, 0, 3), 4))
    assert (
        torch.equal(other, again) and (other != batch.values).any(-1).float().mean() > 0.9
    )  # fixed per image, and another image


def test_extra_targets_of_regression_equal_a_slow_loop():
    world, seed, g = Regression(4), torch.tensor([3, 8]), torch.Generator().manual_seed(0)
    dimension = [2, 4]
    batch = world.sample(seed, torch.tensor(dimension), sequence_numbers(seed, 0, 3), 5)
    guess = torch.randn(2, 3, 5, 4, generator=g)
    got, asked, other = world.value_loss(guess, batch.values), world.asked_loss(guess, batch), world.other_values(batch)
    for r, b, n in itertools.product(range(2), range(3), range(5)):
        d = dimension[r]
        for have, target in ((got, batch.x[r, b, n]), (asked, batch.asked[r, b])):
            squared = ((guess[r, b, n, :d] - target[:d]) ** 2).mean().item()
            assert have[r, b, n].item() == pytest.approx(squared, abs=1e-5)
        assert torch.equal(other[r, b, n], batch.x[r, b - 1, n])


def test_regression_sequences_are_linear_and_padding_changes_nothing():
    seed, d, number = torch.tensor([1, 2]), torch.tensor([3, 5]), torch.arange(4000).expand(2, -1)
    wide, narrow = Regression(7).sample(seed, d, number, 6), Regression(3).sample(seed[:1], d[:1], number[:1], 6)
    assert torch.equal(wide.x[0, ..., :3], narrow.x[0]) and torch.equal(wide.asked[0, :, :3], narrow.asked[0])
    assert torch.equal(wide.y[0], narrow.y[0]) and not wide.x[0, ..., 3:].any() and not wide.x[1, ..., 5:].any()
    b, i = 17, 4
    assert wide.y[1, b, i, 0].item() == pytest.approx(
        sum(wide.x[1, b, i, j].item() * wide.asked[1, b, j].item() for j in range(5)), abs=1e-5
    )
    for r, size in enumerate((3, 5)):
        assert abs(wide.y[r].square().mean() / size - 1) < 0.1 and abs(wide.x[r, ..., :size].var() - 1) < 0.02
    noisy = Regression(7, noise=2.0).sample(seed, d, number, 6)
    assert torch.equal(noisy.x, wide.x) and abs((noisy.y - wide.y).std() - 2) < 0.05
    # the model: zeros add nothing, so only the scale of the read-in's first weights knows the padding
    size = dict(n_pair=6, n_layer=2, n_head=2, d_model=8)
    small, large = GPT(Config(**Regression(3).inputs, **size), [0]), GPT(Config(**Regression(7).inputs, **size), [0])
    state = small.state_dict()
    state["read_in.weight"] = torch.cat([state["read_in.weight"], torch.randn(1, 4, 8)], 1)
    large.load_state_dict(state)
    torch.testing.assert_close(large(wide.x[:1, :9], wide.y[:1, :9]), small(narrow.x[:, :9], narrow.y[:, :9]))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_regression_references_equal_numpy(noise):
    d, n, count = 3, 7, 40
    level = Regression(5, noise).references(4, d, n, sequences=count)
    batch = Regression(5, noise).sample(torch.tensor([4]), torch.tensor([d]), HELD_OUT + torch.arange(count)[None], n)
    x, y = batch.x[0, :, :, :d].double().numpy(), batch.y[0, :, :, 0].double().numpy()
    error = dict(bayes=np.zeros((n, count)), nearest=np.zeros((n, count)), averaging=np.zeros((n, count)))
    for k, i in itertools.product(range(n), range(count)):
        past, value = x[i, :k], y[i, :k]
        w = np.linalg.lstsq(past, value, rcond=None)[0] if k else np.zeros(d)
        if noise:
            w = np.linalg.inv(past.T @ past + noise**2 * np.eye(d)) @ past.T @ value
        near = np.argsort(((past - x[i, k]) ** 2).sum(1))[:3]
        error["bayes"][k, i] = x[i, k] @ w - y[i, k]
        error["nearest"][k, i] = (value[near].mean() if k else 0) - y[i, k]
        error["averaging"][k, i] = x[i, k] @ (past.T @ value) / max(1, k) - y[i, k]
    for name, values in error.items():
        assert level[f"{name}_loss"] == pytest.approx((values**2).mean() / d, rel=1e-6)
    assert level["bayes_last_loss"] == pytest.approx((error["bayes"][-1] ** 2).mean() / d, rel=1e-6, abs=1e-9)
    assert level["no_context_loss"] == 1 + noise**2 / d


def test_images_show_every_factor():
    base = np.array([1, 4, 7, 5, 0, 7])
    for f, size in enumerate(SIZES):
        values = np.repeat(base[None], size, 0)
        values[:, f] = np.arange(size)
        flat = image(values).reshape(size, -1)
        apart = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 10 * np.eye(size)
        assert flat.min() >= 0 and flat.max() <= 1 and apart.min() > 0.3, FACTORS[f]
    world = shapes((2, 2, 2, 2, 2, 2), embedding="pixels")
    index = np.ravel_multi_index(world.full.numpy().T, SIZES)
    assert (
        index[0] == 0 and index[-1] == np.ravel_multi_index((5, 5, 5, 7, 3, 14), SIZES) and (np.diff(index) > 0).all()
    )


def test_code_is_entangled_by_its_gain():
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in FEW], indexing="ij"), -1).reshape(-1, 6)
    one_hot = np.concatenate([np.eye(n)[grid[:, f]] for f, n in enumerate(FEW)], 1)
    rest = []
    for gain in (0.05, 3.0):
        y = code(grid, FEW, 16, gain)
        fit = one_hot @ np.linalg.lstsq(one_hot, y, rcond=None)[0]
        rest.append(np.linalg.norm(y - fit) / np.linalg.norm(y - y.mean(0)))
    assert rest[0] < 0.01 < 0.2 < rest[1]
    one, same, other = (shapes(FEW, code_seed=seed) for seed in (0, 0, 1))  # another code and another split
    assert torch.equal(one.table, same.table) and not torch.allclose(one.table, other.table)
    assert torch.equal(one.train, same.train) and not torch.equal(one.train, other.train)


def test_vae_latents_are_repeatable_and_tell_images_apart():
    world = shapes((2, 2, 2, 1, 1, 1), embedding="pixels")
    one, two = (vae(world.full.numpy(), latent=8, steps=30) for _ in range(2))
    assert one.shape == (8, 8) and np.isfinite(one).all() and (one == two).all()
    assert np.linalg.norm(one[:, None] - one[None], axis=-1)[~np.eye(8, dtype=bool)].min() > 1e-3


def test_an_oracle_sees_the_factor_values_and_its_neighbours_do_not():
    world, seed = shapes(FEW, FACTORS[:2], code_width=5), torch.tensor([3, 3])
    number, m = torch.arange(6).expand(2, -1), mappings([math.inf] * 2, "cpu")
    plain = world.sample(seed, m, number, 4)
    world.show_clean([False, True])
    batch = world.sample(seed, m, number, 4)
    assert torch.equal(batch.x[0, ..., :5], plain.x[0]) and not batch.x[0, ..., 5:].any() and world.inputs["d_x"] == 14
    assert torch.equal(batch.label, plain.label)
    torch.testing.assert_close(world.clean.square().mean(0), torch.ones(14))  # standardised
    sizes = [4, 3, 2, 2, 3]
    for b, n in itertools.product(range(6), range(4)):
        values = [v for v, size in zip(np.unravel_index(batch.item[1, b, n].item(), FEW), FEW) if size > 1]
        largest = [part.argmax().item() for part in batch.x[1, b, n].split(sizes)]
        assert largest == values


@pytest.mark.parametrize(
    "content, message",
    [
        ({"other": np.zeros((480_000, 1), np.float32)}, "repre"),
        ({"repre": np.zeros((10, 3), np.float32)}, "480000"),
        ({"repre": np.zeros((480_000, 0), np.float32)}, "480000"),
        ({"repre": np.zeros((480_000, 1), np.int64)}, "floating"),
        ({"repre": np.full((480_000, 1), 1e300)}, "finite"),
        (None, "readable"),
    ],
)
def test_a_wrong_embedding_file_is_named(tmp_path, content, message):
    path = tmp_path / "e.npz"
    np.savez(path, **content) if content else path.write_text("no archive")
    with pytest.raises(UsageError, match=f"--embedding .*{message}"):
        load_embedding(str(path))


def test_an_embedding_file_is_read_in_the_papers_order(tmp_path):
    np.savez(tmp_path / "e.npz", repre=np.arange(480_000, dtype=np.float32)[:, None])
    world = shapes((2, 1, 1, 1, 1, 3), embedding=str(tmp_path / "e.npz"))
    assert world.table[:, 0].tolist() == [0, 7, 14, 240_000, 240_007, 240_014]


# -------------------------------------------------------------------------------- probes.py


def test_after_the_norm_a_drowned_state_is_lost_though_it_can_still_be_read_before_it():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(4, (1, 3000, 1), generator=g)
    clear = torch.cat(
        [F.one_hot(target[0, :, 0], 4) + 0.1 * torch.randn(3000, 4, generator=g), torch.zeros(3000, 12)], 1
    )
    loud = clear.clone()
    loud[:, 4] = 1000 * torch.randn(3000, generator=g)  # one direction swamps the others
    both = torch.stack([clear, loud])
    normed = F.layer_norm(both, both.shape[-1:])
    score = {}
    for name, state in (("raw", both), ("normed", normed)):
        score[name] = probes.converged_probe(state[:, :2000], target[:, :2000], state[:, 2000:], target[:, 2000:], [4])[
            :, 0
        ].tolist()
    assert min(score["raw"]) > 0.99 and score["normed"][0] > 0.99 and score["normed"][1] < 0.8
    shape = {key: value[:, 0].tolist() for key, value in probes.geometry(both[:, None]).items()}
    assert shape["first_share"][0] < 0.5 and shape["first_share"][1] > 0.999
    centred = both[1] - both[1].mean(0)
    assert shape["spread"][1] == pytest.approx((centred**2).sum().div(2999).sqrt().item(), rel=1e-4)
    unit = F.normalize(both[0, :50], dim=-1)
    cosine = probes.geometry(both[:1, None, :50])["cosine"].item()
    assert cosine == pytest.approx(((unit @ unit.T).sum().item() - 50) / (50 * 49), abs=1e-4)


class ReadsOnly(GPT):
    """A network whose states are the one-hot value of one factor of x and nothing else."""

    def forward(self, x, y=None, mixing="attention", hidden=False):
        h = torch.zeros(*x.shape[:2], x.shape[2] * (1 + (y is not None)), self.config.d_model)
        h[:, :, :: 1 + (y is not None), :3] = x[..., self.columns]
        return None, [h] * self.config.n_layer


@pytest.mark.parametrize("readable", [0, 1])
def test_only_the_asked_factors_are_the_score_and_the_others_have_their_own(readable, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_STEPS", 3000)
    world = shapes((3, 3, 2, 2, 2, 2), FACTORS[:1], embedding="onehot")
    model = ReadsOnly(Config(**world.inputs, n_pair=4, n_layer=1, n_head=1, d_model=8), [0])
    model.columns = slice(3 * readable, 3 * readable + 3)
    score = probes.Prober(world, torch.tensor([0]), mappings([math.inf], "cpu"), 4)(model)
    for name in ("weights_score", "weights_score_identity", "weights_score_converged"):
        assert (score[name].item() > 0.99) == (readable == 0) and (score[name].item() < 0.5) == (readable == 1)
    by_factor = score["weights_score_by_factor"][0, 0]
    assert score["weights_score_unasked"].item() == pytest.approx(by_factor[1:].mean().item()) and len(by_factor) == 6
    assert by_factor[readable] > 0.99


def made(arm, seed, length, lr, score=0.9):
    run = dict(
        arm=arm, difficulty="inf", lr=lr, seed=seed, plateau_length=length, completion_step=None, loss=[1.4, 1.0]
    )
    return run | {"weights_score": [[0.9], [score]], "weights_score_after_norm": [[0.9], [score]]}


def test_rows_pair_by_seed_at_the_common_rate_and_at_each_arms_best_and_mark_the_edge():
    runs = [made("baseline", s, v, 1e-3, 0.8) for s, v in enumerate([40, None, 60])]
    runs += [made("new", s, v, 1e-3) for s, v in enumerate([10, 50, None])]
    runs += [made("baseline", s, 30, 2e-3) for s in range(3)] + [made("new", s, 90, 2e-3) for s in range(3)]
    runs += [made("new", s, 5, 5e-4) for s in range(3)]
    metrics = {"steps": [0, 100], "lr": [1e-3, 5e-4, 2e-3], "block": 0, "error": False, "symbol": "m", "runs": runs}
    base, new, base_fast, new_fast, new_slow = probes.rows(metrics)
    assert base["median"] == 60 and base["left"] == 2 and base["damaged"] == 3 and new["damaged"] == 0
    assert [row["best"] for row in (base, new, base_fast, new_fast, new_slow)] == [False, False, True, False, True]
    assert base_fast["edge"] and new_slow["edge"]
    text = probes.report(metrics)
    assert (
        "| new | inf | 5e-4 best (edge) | 5 5 5 | 5 | 3 of 3 | 0 of 3 | 0 of 3 | 0.900 to 0.900 | - | 0.900 to 0.900 |"
        in text
    )
    assert "| baseline | inf | 1e-3 | 40 - 60 | at least 60 | 2 of 3 |" in text
    assert "new, m = inf, 1e-3: 2 of 3 leave the plateau, 0 complete; same rate: leaves sooner than the baseline in " \
           "2 of 3 seeds, later in 1 (sign test p = 1), median -30 steps." in text  # fmt: skip
    assert "each at its best rate: leaves sooner than the baseline in 3 of 3 seeds, later in 0 (sign test " \
           "p = 0.25), median -25 steps." in text  # fmt: skip


def test_probes_score_chance_on_noise_and_one_on_one_hot():
    g = torch.Generator().manual_seed(0)
    target = torch.stack([torch.randint(s, (3000,), generator=g) for s in (4, 2)], -1)
    one_hot = torch.cat([F.one_hot(target[:, i], s).float() for i, s in enumerate((4, 2))], 1)
    both = torch.stack([torch.randn(3000, 6, generator=g), one_hot * 5])
    for probe in (probes.linear_probe, probes.converged_probe):
        noise, exact = (
            probe(both[:, :2000], target[None, :2000], both[:, 2000:], target[None, 2000:], [4, 2]).mean(1).tolist()
        )
        assert abs(noise - 0.375) < 0.05 and exact == 1.0


def test_regression_probes_score_the_normalised_error():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3000, 4, generator=g)
    x[..., 3] = 5  # constant, as padding is: not counted, though 782 steps cannot learn so large a bias
    seen = torch.cat(
        [x[..., :2] * 2 + 1, torch.randn(1, 3000, 5, generator=g)], -1
    )  # two of three dimensions can be read
    for probe in (probes.linear_probe, probes.converged_probe):
        score = probe(seen[:, :2000], x[:, :2000], seen[:, 2000:], x[:, 2000:], None)
        assert score.shape == (1, 1) and abs(score.item() - 1 / 3) < 0.05


def test_plateau_length_on_made_curves():
    steps = [0, 10, 20, 30]
    assert probes.plateau_length(steps, [1.0, 0.9, 0.7, 0.9], 0.8) == 20
    assert probes.plateau_length(steps, [1.0, 0.9, 0.85, 0.8], 0.8) is None
    assert probes.plateau_length(steps, [1.0, None, None, None], 0.8) is None
    assert probes.plateau_length(steps, [0.5, 0.5, 0.5, 0.5], 0.8) == 0


def test_sign_test_counts_every_outcome():
    for less, more in ((5, 0), (2, 7), (3, 3), (0, 0)):
        n = less + more
        ups = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        assert probes.sign_test(less, more) == sum(abs(2 * k - n) >= abs(less - more) for k in ups) / 2**n


# -------------------------------------------------------------------------------- exp_nlp.py


def given(**changes):
    flags = dict(conllu=[], tsv=None, text="grammar", ask=[], texts=3000, words=11, vocabulary=1000, pairs=4)
    return SimpleNamespace(**flags | changes)


def parse(words):
    """The attributes of a sentence of the grammar, read from its words, with no help from the generator."""
    kind = {noun: name for name, nouns in exp_nlp.KINDS.items() for noun in nouns}
    kind |= {noun + "s": name for noun, name in kind.items()} | {"cactuses": "plant"}
    verbs = {
        v + e: t for v in exp_nlp.VERBS for e, t in (("d", "past"), ("ed", "past"), ("s", "present"), ("es", "present"))
    }
    verbs |= dict.fromkeys(exp_nlp.VERBS, "present")
    nouns = [i for i, word in enumerate(words) if word in kind]
    verb = next(i for i, word in enumerate(words) if word in verbs)
    tense = dict(do="present", does="present", did="past", will="future", have="perfect", has="perfect")
    auxiliary = next((i for i, word in enumerate(words[:verb]) if word in tense), None)
    return dict(
        subject=kind[words[nouns[0]]], object=kind[words[nouns[1]]],
        tense=verbs[words[verb]] if auxiliary is None else tense[words[auxiliary]],
        number="one" if words[nouns[0]] in sum(exp_nlp.KINDS.values(), []) else "many",
        negation="yes" if {"not", "never"} & set(words) else "no",
        question="yes" if auxiliary is not None and auxiliary < nouns[0] else "no",
        sentiment=next(name for name, some in exp_nlp.ADJECTIVES.items() if set(some) & set(words)))  # fmt: skip


def test_grammar_attributes_equal_an_independent_parse():
    texts, attributes, _ = exp_nlp.grammar(given())
    assert len(set(texts)) == 3000 and max(map(len, texts)) <= 11
    for i, words in enumerate(texts):
        assert parse(list(words)) == {name: column[i] for name, column in attributes.items()}, words


def test_word_selection_labels_the_word_of_the_asked_category():
    world, seed = exp_nlp.wordselect(given(texts=500), "cpu"), torch.tensor([3])
    batch = world.sample(seed, mappings([1.0], "cpu"), torch.arange(200)[None], 6)
    for b, i in itertools.product(range(200), range(6)):
        label, listed = batch.label[0, b, i].item(), batch.x[0, b, i, :-1].tolist()
        assert label // 12 == batch.asked[0, b] and label + exp_nlp.FIRST in listed
        assert sorted((word - exp_nlp.FIRST) // 12 for word in listed) == [0, 1, 2, 3, 4]
    level = world.references(3, 1.0, 6)
    assert level["no_context_loss"] == math.log(5) and level["bayes_accuracy"] == pytest.approx((0.2 + 5) / 6)


def sentence(head="", verb="Tense=Past|VerbForm=Fin", form="He", ids="1 2 3"):
    rows = [
        f"{form}\t_\tPRON\t_\tNumber=Sing\t2\tnsubj",
        f"sees\t_\tVERB\t_\t{verb}\t0\troot",
        ".\t_\tPUNCT\t_\t_\t2\tpunct",
    ]
    return head + "".join(f"{i}\t{row}\t_\t_\n" for i, row in zip(ids.split(" "), rows)) + "\n"


MULTI = "1-2\tHe's\t_\t_\t_\t_\t_\t_\t_\t_\n0.1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n"


@pytest.mark.parametrize("text, name, values", [
    (sentence("# newdoc\n# genre = a\n" + MULTI) + sentence() + sentence("# newdoc\n"), "genre", ["a", "a", ""]),
    (sentence("# meta::genre = a\n# sent_id = x-1\n") + sentence("# genre = b\n"), "genre", ["a", "b"]),
    (sentence("# sent_id = web-1\n") + sentence("# sent_id = mail-2\n"), "genre", ["web", "mail"]),
    (sentence("# sent_id = web-1\n") * 2, "genre", ["", ""]),  # one value
    (sentence("# sent_id = dev-1\n") + sentence("# sent_id = test-2\n"), "genre", ["", ""]),
    (sentence() + sentence(verb="Mood=Imp|VerbForm=Fin") + sentence(verb="VerbForm=Fin"), "verb",
     ["Past", "Imp", "Fin"]),
    (sentence(verb="Mood=Ind") + sentence(verb="Tense=Pres") + sentence(verb="_"), "verb", ["Ind", "Pres", "none"]),
    (sentence(verb="Tense=Past|VerbForm=Part") + sentence(), "verb", ["none", "Past"]),
    (sentence().replace("\t0\t", "\t_\t") + sentence(), "root", ["", "VERB"]),
    (sentence().replace("PUNCT", "_") + sentence().replace("PUNCT", "X") + sentence(), "end", ["", "none", "."]),
    ("\ufeff" + sentence().replace("\n", "\r\n"), "subject", ["PRON"]),
])  # fmt: skip
def test_a_treebank_is_read_as_its_own_customs_say(tmp_path, text, name, values):
    (tmp_path / "a.conllu").write_bytes(text.encode())
    words, attributes, _ = exp_nlp.conllu(given(conllu=[str(tmp_path / "a.conllu")]))
    assert words == [["he", "sees", "."]] * len(values) and attributes[name] == values


@pytest.mark.parametrize("text, line", [
    (sentence().strip() + "\n" + sentence("# x\n"), 4), (sentence().strip() + "\n" + sentence(), 4),
    (sentence(ids="1 3 4"), 2), (sentence(ids="1 2 \ufeff3"), 3), (sentence(ids="1 2 3 ").replace("3\t", "3 \t"), 3),
    (sentence().replace("\n", "\r\r\n"), 1), (sentence().replace("sees", ""), 2), ("1\tHe\n", 1), ("1\t\udce9\n", 1),
    (sentence() + sentence(form="_").replace("sees", "_").replace("\t.", "\t_"), 8),
])  # fmt: skip
def test_a_broken_treebank_is_refused_by_file_and_line(tmp_path, text, line):
    (tmp_path / "a.conllu").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=rf"a\.conllu: line {line} "):
        exp_nlp.conllu(given(conllu=[str(tmp_path / "a.conllu")]))


@pytest.mark.parametrize("text, words", [
    ("Don't e-mail!", ["don", "'", "t", "e", "-", "mail", "!"]),
    (unicodedata.normalize("NFD", "É tú"), ["é", "tú"]),
    ("हिन्दी में", ["हिन्दी", "में"]),
    ("我们 go。", ["我", "们", "go", "。"]), ("ทำได้", ["ท", "ำ", "ไ", "ด้"]), ("می‌روم", ["می‌روم"]),
])  # fmt: skip
def test_words_of_a_table_in_any_script(tmp_path, text, words):
    (tmp_path / "t.tsv").write_text(f"text\ta\n{text}\t x \n\t1\nb\t \n", encoding="utf-8")
    found, attributes, _ = exp_nlp.tsv(given(tsv=str(tmp_path / "t.tsv")))
    assert found == [words, ["b"]] and attributes == {"a": ["x", ""]}


def test_every_loss_is_said_and_what_is_left_is_split_and_balanced(tmp_path, capsys):
    rng = np.random.default_rng(0)
    colour, size = (
        rng.choice(["red", "other", "", *map(str, range(20))], 900, p=[0.3, 0.3, 0.1] + [0.015] * 20),
        rng.choice(["l", "s"], 900),
    )
    rows = [
        f"{' '.join(rng.choice([*'abcde'], 4))} {c} {s}\t{c}\t{s}\t{s}{s}\t{i}\n"
        for i, (c, s) in enumerate(zip(colour, size))
    ]
    (tmp_path / "t.tsv").write_text("text\tcolour\tsize\tagain\tid\n" + "".join(rows) + "\tred\tl\tl\t9\n")
    world, said = exp_nlp.texts(given(tsv=str(tmp_path / "t.tsv")), "cpu"), capsys.readouterr().out
    lost = (colour == "").sum()
    assert (
        world.names == ("colour", "size")
        and world.sizes == (3, 2)
        and "901 rows read, 1 of them without a text" in said
    )
    assert (
        "rarer values together" in said
        and f"{lost} texts have none of these" in said
        and f"{lost} lack a value" in said
    )
    assert "id: left out, every value is rarer than 4%" in said and "again: left out, together with size" in said
    assert not set(map(tuple, world.table[world.train].tolist())) & set(map(tuple, world.table[world.test].tolist()))
    for part, f in itertools.product((world.train, world.test), (0, 1)):
        share = torch.bincount(world.values[part, f], world.weight[part])
        torch.testing.assert_close(share, torch.full_like(share, 1 / world.sizes[f]), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match=r"(\d+) of \1 held-out texts are dropped as twins"):
        exp_nlp.texts(given(tsv=str(tmp_path / "t.tsv"), vocabulary=1), "cpu")
    exp_nlp.texts(given(tsv=str(tmp_path / "t.tsv"), words=4), "cpu")
    assert "warning: most held-out texts are dropped" in capsys.readouterr().out
    with pytest.raises(UsageError, match="id: left out, every value is rarer than 4%"):
        exp_nlp.texts(given(tsv=str(tmp_path / "t.tsv"), ask=["id"]), "cpu")


# -------------------------------------------------------------------------------- the scripts

SIZE = "--steps 12 --batch 4 --n-layer 2 --n-head 2 --d-model 16 --seeds 2 --lr 2e-3 --evaluations 4 --probes 2 " \
       "--no-compile --precision fp32 --device cpu"  # fmt: skip
SMALL = f"{SIZE} --pairs 4 --factors 3 3 2 2 1 1 --ask floor_hue wall_hue --code-width 12 --sequences 0"
EACH = {
    "exp_plateau.py": f"{SMALL} --difficulty 2 inf",
    "exp_warmup.py": f"{SMALL} --switch 0 5",
    "exp_mixture.py": f"{SMALL} --mix easy unrelated",
    "exp_aux_loss.py": f"{SMALL} --sequences 64 --loss none weights context shuffled norm decay clip weights+norm",
    "exp_plateau.py --task linear": f"{SIZE} --difficulty 2 3 --pairs 7 --noise 0.1",
    "exp_aux_loss.py --task linear": f"{SIZE} --difficulty 2 3 --pairs 7 --loss none weights context shuffled norm",
    "exp_nlp.py": f"{SIZE} --texts 1500 --switch 5 --arm baseline warmup mixture weights context norm",
    "exp_nlp.py --text wordselect": f"{SIZE} --texts 1500",
}


def run(command: str, expect: int = 0) -> str:
    """A command line in this process, which saves the import of torch, with small probes. Returns what it printed."""
    words, code, out = shlex.split(command), 0, io.TextIOWrapper(io.BytesIO(), "utf8", write_through=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", words)
        for key, value in {
            "ITEMS": 128,
            "PROBE_STEPS": 40,
            "fcntl": None,
        }.items():  # a lock lives as long as its process
            patch.setattr(probes, key, value)
        try:
            probes.run(importlib.import_module(words[0][:-3]).main)
        except SystemExit as stop:
            code = stop.code
    said = out.buffer.getvalue().decode()
    assert code == expect, said
    return said


def start(command: str, **environ) -> subprocess.Popen:
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, *shlex.split(command)], cwd=HERE, env=os.environ | environ, text=True,
                            encoding="utf8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def science(folder: Path) -> dict:
    """metrics.json without what may differ between two equal trainings."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("environment", "command", "settings")}


def weights_of(folder: Path) -> torch.Tensor:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]["read_out.weight"]


@pytest.mark.parametrize("command", EACH)
def test_each_script_end_to_end(command, tmp_path):
    said = run(f"{command} {EACH[command]} --out {tmp_path}")
    metrics = science(tmp_path)
    assert "12 100% |" in said and probes.report(json.loads((tmp_path / "metrics.json").read_text())) in said
    assert (
        len({tuple(w.flatten().tolist()) for w in weights_of(tmp_path)}) == len(metrics["runs"]) > 3
    )  # each its own way
    assert all(len(run["loss"]) == 5 and len(run["weights_score"]) == 3 for run in metrics["runs"])
    first = (tmp_path / "figure.png").read_bytes()
    (tmp_path / "figure.png").unlink()
    run(f"{command} {EACH[command]} --out {tmp_path} --replot")
    assert (tmp_path / "figure.png").read_bytes() == first
    if command == "exp_plateau.py":
        oracles = [run["weights_score_converged"] for run in metrics["runs"] if run["arm"] == "oracle"]
        assert len(oracles) == 2 and np.min(oracles) == 1.0 > np.min(metrics["runs"][0]["weights_score_converged"])


def test_killed_interrupted_or_shared_by_two_processes_a_training_gives_the_same_numbers(tmp_path, monkeypatch):
    flags = f"exp_plateau.py {SMALL} --difficulty 2 inf --steps 600 --evaluations 6"
    tiny = "import probes; probes.ITEMS, probes.PROBE_STEPS, probes.SAVE_SECONDS = 128, 40, 0; import runpy, sys; " \
           "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    killed = start(f"-c {shlex.quote(tiny)} {flags} --out {tmp_path}/killed")
    (tmp_path / "tiny.py").write_text(tiny)
    two = start(
        f"-m torch.distributed.run --nproc_per_node=2 {tmp_path}/tiny.py {flags} --out {tmp_path}/two",
        PYTHONPATH=str(HERE),
    )
    run(f"{flags} --out {tmp_path}/whole")
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    locked = start(f"{flags} --out {tmp_path}/killed --resume")
    assert "another training is running" in locked.communicate()[0] and locked.returncode == 2
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    steps = itertools.count()
    adam_step = Adam.step

    def step(optimizer):  # Ctrl-C some steps later
        if next(steps) == 20:
            raise KeyboardInterrupt
        adam_step(optimizer)

    assert not (tmp_path / "killed" / "metrics.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", step)
        assert "--resume goes on" in run(f"{flags} --out {tmp_path}/killed --resume", expect=130)
    run(f"{flags} --out {tmp_path}/killed --resume")
    assert science(tmp_path / "killed") == science(tmp_path / "whole")
    assert two.wait() == 0, two.stdout.read()
    assert science(tmp_path / "two") == science(tmp_path / "whole")


def test_a_checkpoint_that_is_damaged_or_of_another_command_or_data_is_refused_and_left_alone(tmp_path):
    table = tmp_path / "data.tsv"
    rows = [f"a{i % 7} b{i} c{i % 3}\t{'yes' if i % 2 else 'no'}" for i in range(200)]
    table.write_text("text\tlabel\n" + "\n".join(rows))
    flags = f"exp_nlp.py {SIZE} --pairs 4 --arm baseline weights --tsv {table} --out {tmp_path}/x"
    run(flags)
    path = tmp_path / "x" / "checkpoint.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of a tensor
    for content in (b"", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        assert "is damaged" in run(f"{flags} --resume", expect=2) and path.read_bytes() == content
    path.write_bytes(whole)
    assert "--batch (then 4, now 5)" in run(f"{flags} --resume --batch 5", expect=2)
    table.write_text(table.read_text().replace("a0", "a9"))
    assert f"the contents of {table}" in run(f"{flags} --resume", expect=2)
    assert "of an earlier training" in run(flags, expect=2) and path.read_bytes() == whole
    run(f"{flags} --overwrite")


def test_before_its_switch_a_run_is_the_easy_run_and_arms_that_do_nothing_are_the_baseline(tmp_path):
    run(f"exp_plateau.py {SMALL} --difficulty 1 inf --no-oracle --out {tmp_path}/plain")
    run(f"exp_warmup.py {SMALL} --switch 0 11 --out {tmp_path}/warm")
    run(f"exp_mixture.py {SMALL} --fraction 0 0.5 1 --out {tmp_path}/mix")
    run(f"exp_aux_loss.py {SMALL} --loss none weights:1e-9 clip:1e5 --out {tmp_path}/aux")
    easy_weights, hard = weights_of(tmp_path / "plain").split(2)
    warm, mix, aux = (weights_of(tmp_path / name).split(2) for name in ("warm", "mix", "aux"))
    assert torch.equal(warm[0], hard) and torch.equal(mix[0], hard) and torch.equal(mix[2], easy_weights)
    assert not torch.equal(mix[1], easy_weights) and not torch.equal(mix[1], hard)
    assert torch.equal(aux[0], hard) and torch.equal(aux[2], hard)
    run(f"exp_nlp.py {SIZE} --texts 1500 --arm baseline warmup mixture --switch 0 --fraction 0 --out {tmp_path}/nlp")
    base, warm_text, mixed_text = weights_of(tmp_path / "nlp").split(2)
    assert torch.equal(base, warm_text) and torch.equal(base, mixed_text)
    # by hand: a warm-up whose last step is on the target, and text that is on its target from step 0
    for world, pairs, easy, target, want in (
        (shapes((3, 3, 2, 2, 1, 1), FACTORS[:2], code_width=12, code_gain=2.5), 4, 11, math.inf, warm[1]),
        (exp_nlp.texts(given(texts=1500, pairs=6), "cpu"), 6, 0, 4.0, base),
    ):
        seed = torch.tensor([0, 1])
        model = GPT(Config(**world.inputs, n_pair=pairs, n_layer=2, n_head=2, d_model=16), [0, 1])
        optimizer = Adam(model, 2e-3)
        for step in range(12):
            m = mappings([1.0 if step < easy else target] * 2, "cpu")
            batch = world.sample(seed, m, sequence_numbers(seed, step, 4), pairs)
            world.loss(model(batch.x, batch.y), batch).mean((1, 2)).sum().backward()
            optimizer.step()
        assert torch.equal(model.read_out.weight, want)
    assert not torch.equal(warm[1], easy_weights)


def test_a_run_that_diverges_is_null_and_spares_the_others(tmp_path):
    run(f"exp_plateau.py {SMALL} --difficulty inf --no-oracle --lr 1e-3 1e9 --out {tmp_path}/both")
    run(f"exp_plateau.py {SMALL} --difficulty inf --no-oracle --lr 1e-3 --out {tmp_path}/alone")
    both, alone = science(tmp_path / "both")["runs"], science(tmp_path / "alone")["runs"]
    assert both[:2] == alone and all(run["loss"][-1] is None and run["plateau_length"] is None for run in both[2:])
    run(f"exp_plateau.py {SIZE} --task linear --difficulty 2 --pairs 3 --lr 1e9 --out {tmp_path}/none")
    assert (tmp_path / "none" / "figure.png").exists()


def test_the_environment_is_not_believed_and_a_closed_output_ends_nothing(tmp_path):
    """Ranks without torchrun, a notebook's backend, another alphabet, names that are formulas, a broken pipe."""
    table = tmp_path / "$x_1$ \u0416.tsv"
    labels = ["no", "$\u0416^$"]
    table.write_text("text\t$a_b$\n" + "\n".join(f"w{i % 9} v{i} u{i % 4}\t{labels[i % 2]}" for i in range(300)))
    environ = dict(
        WORLD_SIZE="2", RANK="1", MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONIOENCODING="ascii"
    )
    odd = start(
        f"exp_nlp.py {SIZE} --pairs 4 --arm baseline --tsv {shlex.quote(str(table))} --out {tmp_path}/odd", **environ
    )
    closed = start(f"exp_plateau.py {SMALL} --difficulty inf --out {tmp_path}/closed")
    closed.stdout.close()
    said = odd.communicate()[0]
    assert odd.returncode == 0 and "\\u0416" in said, said
    assert len(science(tmp_path / "odd")["runs"]) == 2 and (tmp_path / "odd" / "figure.png").exists()
    assert closed.wait() == 0 and (tmp_path / "closed" / "figure.png").exists()


@pytest.mark.parametrize("command, named", [
    ("exp_plateau.py --difficulty 1.5", "--difficulty"), ("exp_plateau.py --difficulty 1000000", "--difficulty"),
    ("exp_plateau.py --factors 4 4 4 4 5 1", "--factors"), ("exp_plateau.py --ask orientation", "--ask"),
    ("exp_plateau.py --n-head 3", "--n-head"), ("exp_plateau.py --device cuda:77", "--device"),
    ("exp_plateau.py --lr nan", "--lr"), ("exp_plateau.py --resume", "--resume"),
    ("exp_plateau.py --replot", "--replot"),
    ("exp_plateau.py --out requirements.txt/x", "--out"), ("exp_plateau.py --embedding nowhere.npz", "--embedding"),
    ("exp_plateau.py --difficulty 1 --ask floor_hue", "--difficulty"), ("exp_plateau.py --sequences 3", "--sequences"),
    ("exp_warmup.py --switch 12", "--switch"),
    ("exp_warmup.py --switch 5 --warmup-difficulty inf", "--warmup-difficulty"),
    ("exp_mixture.py --fraction 0.3", "--fraction"), ("exp_aux_loss.py --loss weights:0.1+weights:1", "--loss"),
    ("exp_aux_loss.py --loss magic", "--loss"), ("exp_aux_loss.py --ask floor_hue --loss context", "--ask"),
])  # fmt: skip
def test_wrong_input_ends_in_one_line_that_names_the_flag_and_leaves_nothing_behind(command, named, tmp_path):
    script, flags = command.split(" ", 1)
    said = run(f"{script} {SMALL} --out {tmp_path}/x {flags}", expect=2).strip().splitlines()
    assert named in said[-1] and not any("Traceback" in line for line in said) and not [*tmp_path.glob("x/*")]


@pytest.mark.parametrize("device", ["meta", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("command", [command for command in EACH if "nlp" not in command])
def test_a_training_step_never_asks_its_device_for_a_number(command, device, tmp_path, monkeypatch):
    """On torch's meta device tensors have no values and mix with no others: what a step would fetch from a GPU,
    or leave on the CPU, is an error here. A GPU itself is told to refuse."""
    script = importlib.import_module(command.split(".")[0])

    class Steps:
        def __init__(self, *_):
            pass

        def steps(self):
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            yield from range(7)
            torch.cuda.set_sync_debug_mode("default") if device == "cuda" else None
            raise KeyboardInterrupt  # trained; nothing to measure

    monkeypatch.setattr(probes, "Record", Steps)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(script, "pick_device", lambda *_: (torch.device(device), "fp32"))
    assert "interrupted" in run(f"{command} {EACH[command]} --out {tmp_path}/x", expect=130)


COMMANDS = sorted(set(re.findall(r"^python ((?:exp_\w+|model|probes)\.py[^\n#>`]*)", README, re.M)))


def test_results_are_made_by_the_command_and_hold_every_number_of_the_readmes_tables(capsys, monkeypatch):
    made_of = sorted(map(str, (HERE / "assets").glob("*.json")))
    monkeypatch.setattr(sys, "argv", ["probes.py", *made_of])
    probes.main()
    results = (HERE / "assets" / "results.md").read_text()
    assert capsys.readouterr().out == results
    verdicts = re.findall(r"^\| \d+ \|(.*)\|$", README, re.M)
    numbers = {number for line in verdicts for number in re.findall(r"(?<![\w.`-])\d[\d,.]*\d(?![\w`])", line)}
    assert len(verdicts) == 10 and len(numbers) > 5 and not {number for number in numbers if number not in results}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_runs_at_tiny_size(command, tmp_path, monkeypatch):
    script, _, flags = re.sub(r"--(steps|seeds|evaluations|probes|switch)( \d+)+", "", command).partition(" ")
    if not script.startswith("exp_") or "FILE" in flags:
        pytest.skip("not a training, or of the reader's own file")
    if not (HERE / script).exists():  # the reader's copy, with the edit that the README shows
        ((original, text),) = re.findall(rf"^cp (\w+\.py) {script}$.*?```diff\n(.*?)```", README, re.M | re.S)
        old, new = ("".join(f"{line[1:]}\n" for line in text.splitlines() if line[0] == sign) for sign in "-+")
        code_ = (HERE / original).read_text()
        assert code_.count(old) == 1
        (tmp_path / script).write_text(code_.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        flags += " --switch 0 5"
    small = SIZE if "nlp" in script or "linear" in flags else SMALL
    small += " --switch 0 5" if script == "exp_warmup.py" else ""
    run(f"{script} {small} {flags} {'--difficulty 1 100' if 'paper' in flags else ''} --out {tmp_path}/out")
    assert (tmp_path / "out" / "figure.png").exists()
