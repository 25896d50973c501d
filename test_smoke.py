"""pytest: the core against independent references, then every script, README command and table end to end."""

import contextlib
import fnmatch
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count, permutations, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # everything is tiny, and commands run beside each other

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import exp_nlp
import exp_plateau
import probes
import tasks
from model import GPT, Adam, Block, Config, Linear, compile_blocks, pick_device
from tasks import FACTORS, HELD_OUT, SIZES, Regression, UsageError, bayes, mapping_counts, sequence_numbers, shapes

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
TINY = dict(d_x=6, d_y=3, n_pair=4, n_layer=2, n_head=2, d_model=8)
FEW = (4, 3, 2, 1, 2, 3)


# -------------------------------------------------------------------------------- model.py
def tiny_batch(runs: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (runs, 5, 4), generator=g)
    return torch.randn(runs, 5, 4, 6, generator=g), F.one_hot(label, 3).float(), label


def disturbed(model):
    """Random biases and norms too, so that a term that is left out shows."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return model


def torch_gpt(model, run: int, x: torch.Tensor, y: torch.Tensor, mixing: str) -> torch.Tensor:
    """GPT-2 for one run, of torch's layers, in float64: x (b, n, t) words or (b, n, d), y (b, n, c) -> (b, n, c)."""
    w, c = {name: p[run].detach().double() for name, p in model.named_parameters()}, model.config
    parts = dict(qkv="self_attn.in_proj_", attention_out="self_attn.out_proj.", mlp_in="linear1.", mlp_out="linear2.",
                 norm_1="norm1.", norm_2="norm2.")  # fmt: skip
    linear = lambda v, name: v @ w[name + ".weight"][: v.shape[-1]] + w[name + ".bias"]  # as if padded with zeros
    tokens = w["words"][x] if c.n_word else linear(x.double(), "read_in")[:, :, None]
    h = torch.cat([tokens, linear(y.double(), "read_in")[:, :, None]], 2).flatten(1, 2) + w["position"]
    gelu, future = lambda v: F.gelu(v, approximate="tanh"), torch.ones(h.shape[1], h.shape[1]).triu(1).bool()
    for k in range(c.n_layer):
        sizes = (c.d_model, c.n_head, 4 * c.d_model)
        layer = torch.nn.TransformerEncoderLayer(*sizes, 0.0, gelu, batch_first=True, norm_first=True).double()
        names = {to + kind: f"blocks.{k}.{part}.{kind}" for part, to in parts.items() for kind in ("weight", "bias")}
        layer.load_state_dict({name: w[ours].mT.squeeze(-1) for name, ours in names.items()})
        if mixing == "identity":
            layer.self_attn.forward = lambda v, *_, **__: (v, None)
        h = layer(h, future)
    at_x = h[:, c.n_token - 1 :: c.n_token + 1]
    return linear(F.layer_norm(at_x, at_x.shape[-1:]) * w["norm.weight"] + w["norm.bias"], "read_out")


@pytest.mark.parametrize("words, mixing, fused", [
    (False, "attention", False), (True, "attention", False), (True, "attention", True), (False, "identity", False),
])  # fmt: skip
def test_gpt_equals_one_of_torchs_layers(words, mixing, fused, monkeypatch):
    if fused:
        monkeypatch.setattr("model.WRITTEN_OUT", "")  # as on a GPU
    model = disturbed(GPT(Config(**TINY, n_word=11, n_token=2) if words else Config(**TINY), [3, 4]))
    x, y, _ = tiny_batch(2)
    if words:
        x = torch.randint(11, (2, 5, 4, 2), generator=torch.Generator().manual_seed(0))
    got = model(x, y, mixing)
    for run in range(2):
        want = torch_gpt(model, run, x[run], y[run], mixing)
        torch.testing.assert_close(got[run].double(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x[:, :, :1], mixing=mixing), got[:, :, :1])  # a prompt of one item and no label


def train(world, seeds: list, every_m: list, rates, pairs: int = 4, extra=None) -> GPT:
    """By hand, one step for every m (r,) or (r, b). extra(model, states of each block, batch) is added to the loss."""
    model, seed = GPT(Config(**world.inputs, n_pair=pairs, n_layer=2, n_head=2, d_model=16), seeds), torch.tensor(seeds)
    if extra:
        model.extra = Linear(len(seeds), 16, world.n_value + world.n_asked)
        model.extra.initialise(seeds)
    optimizer = Adam(model, rates)
    for step, m in enumerate(every_m):
        batch = world.sample(seed, m, sequence_numbers(seed, step, 4), pairs)
        logits, states = model(batch.x, batch.y, hidden=True)
        loss = world.loss(logits, batch).mean((1, 2)).sum()
        if extra:
            loss = loss + extra(model, states, batch)
        loss.backward()
        optimizer.step()
    return model


def test_a_run_alone_equals_the_run_among_others_bit_for_bit():
    world = shapes(FEW, code_width=6)
    many = mapping_counts([2.0, 7.0, math.inf, *[3.0] * 37], "cpu")  # so many that vector units are used up to a rest
    together = train(world, [*range(40)], [many] * 170, [1e-3, 2e-3, *[1e-2] * 38])  # long: powers differ late
    alone = train(world, [1], [many[1:2]] * 170, [2e-3])
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together.parameters(), alone.parameters()))


def test_read_outs_of_a_script_differ_by_seed_and_by_number():
    one, two = Linear(2, 3, 3), Linear(2, 3, 3)
    one.initialise([0, 1])
    two.initialise([1, 0])
    assert torch.equal(one.weight, two.weight.flip(0)) and not torch.equal(one.weight, two.weight)
    two.initialise([0, 1], number=1)
    assert not (one.weight == two.weight).any()


def test_adam_equals_torch_for_every_run_and_goes_on_from_its_state():
    model, singles = disturbed(GPT(Config(**TINY), [0, 1, 2])).double(), []  # in float32 keys' biases get noise
    rates, rest = (1e-3, 1e-2, 3e-3), ([1e-8, 1e-4, 1e-8], [0.0, 0.1, 0.0], [math.inf, math.inf, 0.1])
    for run, (lr, eps, decay) in enumerate(zip(rates, *rest[:2])):
        one = GPT(Config(**TINY), [0]).double()
        one.load_state_dict({name: p[run : run + 1] for name, p in model.state_dict().items()})
        singles.append((one, torch.optim.AdamW(one.parameters(), lr=lr, eps=eps, weight_decay=decay)))
    ours = Adam(model, rates, *rest)
    for step in range(4):
        x, y, label = (t.double() if t.is_floating_point() else t for t in tiny_batch(3, step))
        sum(F.cross_entropy(z.flatten(0, 1), t.flatten()) for z, t in zip(model(x, y), label)).backward()
        ours.step()
        state, ours = ours.state_dict(), Adam(model, 1.0, *rest)
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


def test_changes_do_what_they_say_and_spare_the_others():
    runs = [dict(arm=arm, difficulty=2, lr=lr, seed=0) for arm in ("baseline", *exp_plateau.CHANGES) for lr in (2, 1)]
    zeros = [0] * len(runs)
    start, model, before = GPT(Config(**TINY), zeros), *(disturbed(GPT(Config(**TINY), zeros)) for _ in range(2))
    optimizer, (x, y, _) = Adam(model, rates := torch.ones(len(runs))), tiny_batch(len(runs))
    for tensor in (optimizer.mean, optimizer.square, optimizer.beta_t):
        tensor.fill_(0.5)
    exp_plateau.change(runs, model, start, optimizer, x[:, :, :1])
    alone, alone_0, alone_1 = (probes.states(net, x[:, :, :1])[:, -1].detach() for net in (model, start, before))
    state, state_1 = (probes.states(net, x, y)[:, -1] for net in (model, before))
    assert (rates == 1).all()  # the caller's own
    for r, arm in enumerate(run["arm"] for run in runs):
        fresh, moved = arm in ("fresh", "projected", "reset", "swapped"), arm in ("reset", "swapped")
        moments = torch.stack((optimizer.mean, optimizer.square))[:, r]
        assert arm == "rescaled" or (moments == (0 if fresh else 0.5)).all()
        assert (optimizer.beta_t[:, r] == (1 if fresh else 0.5)).all()
        assert optimizer.lr[r] == (0.25 if arm == "slower" else 1.0)
        for (name, now), then, own in zip(model.named_parameters(), start.parameters(), before.parameters()):
            written = "read_in" in name or "position" in name or "_out" in name and "read" not in name
            if moved and name.startswith(("read_in", "blocks.0.")):
                assert torch.equal(now[r], then[r] if arm == "reset" else own[1 - r % 2])
            else:
                assert torch.equal(now[r], own[r]) or written and arm in ("rescaled", "projected")
        if arm == "rescaled":  # what it computes stays, up to the LayerNorm's epsilon, and so do Adam's steps
            spread, spread_0, spread_1 = (h[r].var(0).sum().sqrt() for h in (alone, alone_0, alone_1))
            torch.testing.assert_close(spread, spread_0, atol=0, rtol=1e-3)
            torch.testing.assert_close(model(x, y)[r], before(x, y)[r], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(2 * optimizer.mean[r], (2 * optimizer.square[r]).sqrt())
            torch.testing.assert_close(2 * optimizer.mean[r, 0], spread_1 / spread_0, atol=0, rtol=1e-3)
        if arm == "projected":  # the direction in which x by itself varies most is gone, and no other
            top = torch.linalg.svd(alone_1[r] - alone_1[r].mean(0)).Vh[0]
            assert (state[r] @ top).abs().max() < 1e-4 < 1 < (state_1[r] @ top).abs().max()
            assert np.linalg.matrix_rank(state[r], tol=1e-4) == TINY["d_model"] - 1


def test_one_compilation_serves_every_layer_and_no_measure(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr("shutil.which", str)
    monkeypatch.setattr(Block, "compile", lambda block: torch.nn.Module.compile(block, backend=counter))
    model, (x, y, _) = disturbed(GPT(Config(**TINY), [0, 1])), tiny_batch(2)
    plain = model(x, y)
    compile_blocks(model)
    torch.testing.assert_close(model(x, y), plain)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :3, :2], y[:, :3, :2]), plain[:, :3, :2])
    assert counter.frame_count == 1


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


@pytest.mark.parametrize("held_out", [False, True])
def test_sampler_equals_a_slow_loop(held_out):
    world = shapes(FEW, FACTORS[:2] + FACTORS[5:], code_width=5)
    slow_int = lambda high, *key: int((slow_bits(*key) >> 10) * 2.0**-53 * high)
    seeds, difficulty, n = [3, 8], [4, 2**53], 6
    assert len(world.train) == 115 and sorted([*world.train.tolist(), *world.test.tolist()]) == list(range(144))
    number = sequence_numbers(torch.tensor(seeds), 7, 3) + HELD_OUT * held_out
    got = world.sample(torch.tensor(seeds), mapping_counts([4.0, math.inf], "cpu"), number, n, held_out)
    for r, b in product(range(2), range(3)):
        seed, sequence = seeds[r], 7 * 3 + b + HELD_OUT * held_out
        asked = slow_int(3, seed, tasks.ASKED, sequence)
        mapping = slow_int(difficulty[r], seed, tasks.MAPPING, sequence)
        pool, column = (world.test if held_out else world.train).tolist(), [0, 1, 5][asked]
        keys = [slow_bits(seed, tasks.PERMUTATION, mapping, asked, v) for v in range(FEW[column])]
        label_of = sorted(range(FEW[column]), key=keys.__getitem__)
        if len(pool) >= 8 * n:
            draws = [slow_int(len(pool), seed, tasks.ITEMS, sequence, i) for i in range(2 * n + 8)]
            picks = list(dict.fromkeys(draws))[:n]
        else:
            picks = sorted(range(len(pool)), key=lambda i: slow_bits(seed, tasks.ITEMS, sequence, 0, i))[:n]
        assert got.asked[r, b] == asked and got.item[r, b].tolist() == [pool[i] for i in picks]
        for i, pick in enumerate(picks):
            values = np.unravel_index(pool[pick], FEW)
            assert got.values[r, b, i].tolist() == list(values)
            assert got.label[r, b, i] == label_of[values[column]]
            assert torch.equal(got.x[r, b, i], world.table[pool[pick]])


def test_a_finite_set_of_sequences_is_seen_once_an_epoch():
    seed = torch.tensor([1, 2])
    steps = torch.stack([sequence_numbers(seed, step, 5, finite=20) for step in range(8)])
    for r, epoch in product(range(2), range(2)):
        assert sorted(steps[4 * epoch : 4 * epoch + 4, r].flatten().tolist()) == list(range(20))
    assert not torch.equal(steps[:4], steps[4:]) and not torch.equal(steps[:, 0], steps[:, 1])
    assert sequence_numbers(seed, 10**8, 10**5).max() < HELD_OUT  # the longest training meets no held-out sequence


def test_bayes_equals_enumeration():
    sizes, g = [3, 2], torch.Generator().manual_seed(0)
    values = torch.stack([torch.randint(s, (30, 5), generator=g) for s in sizes], -1)
    every = [list(permutations(range(s))) for s in sizes]
    true = [every[b % 2][b % len(every[b % 2])] for b in range(30)]
    label = torch.tensor([[true[b][v[b % 2]] for v in values[b].tolist()] for b in range(30)])
    tables = torch.tensor([[[*a], [*b, 0]] for a, b in product(*every)])
    got = torch.stack([bayes(values, label, sizes), bayes(values, label, sizes, tables)], 2)
    for b, j in product(range(30), range(5)):
        p = np.zeros(3)
        for f in range(2):
            for table in every[f]:
                if all(table[values[b, i, f]] == label[b, i] for i in range(j)):
                    p[table[values[b, j, f]]] += 1 / len(every[f])
        np.testing.assert_allclose(got[b, j], [p / p.sum()] * 2, atol=1e-12)


def test_reference_levels_of_the_full_world():
    """The levels without context in closed form, and a Bayes accuracy just below that of a learner told the factor."""
    level = shapes(code_width=2).references(0, math.inf, 40, sequences=512)
    assert level["no_context_loss"] == pytest.approx(2.445, abs=5e-4)
    assert level["chance"] == pytest.approx(0.1236, abs=5e-5)
    assert 0.79 < level["bayes_accuracy"] < 0.834 and level["bayes_loss"] > 0.362  # 0.834, 0.362: the factor known


@pytest.mark.parametrize("weighted", [False, True])
def test_the_level_without_context_equals_a_loop_over_held_out_items(weighted):
    world, seed = shapes([3, 3, 4, 1, 1, 1], ["floor_hue", "wall_hue"]), torch.tensor([7])
    if weighted:
        world = replace(world, weight=torch.arange(1.0, 37, dtype=torch.double))
        world.weight[world.test] /= world.weight[world.test].sum()
    table = world.permutation(seed, torch.arange(3)[:, None], torch.arange(2)).tolist()  # [mapping][factor][value]
    loss, share = 0, world.weight if weighted else torch.full((36,), 1 / len(world.test))
    for item in world.test.tolist():
        count = Counter(row[f][world.values[item, f]] for row in table for f in range(2))
        loss -= share[item].item() * sum(n / 6 * math.log(n / 6) for n in count.values())
    assert world.references(7, 3, 4)["no_context_loss"] == pytest.approx(loss)


def test_extra_targets_equal_torch_factor_by_factor():
    world, seed, g = shapes(FEW, FACTORS[:2], code_width=5), torch.tensor([3, 8]), torch.Generator().manual_seed(0)
    batch = world.sample(seed, mapping_counts([4.0, math.inf], "cpu"), sequence_numbers(seed, 0, 3), 4)
    guess, which = torch.randn(2, 3, 4, 14, generator=g), torch.randn(2, 3, 4, 2, generator=g)
    nll = lambda part, value: -part.log_softmax(-1).gather(-1, value[..., None])[..., 0]
    parts = zip(guess.split([4, 3, 2, 2, 3], -1), batch.values[..., [0, 1, 2, 4, 5]].unbind(-1))
    torch.testing.assert_close(world.value_loss(guess, batch.values), sum(nll(*part) for part in parts) / 5)
    torch.testing.assert_close(world.asked_loss(which, batch), nll(which, batch.asked[..., None].expand(-1, -1, 4)))
    other = world.other_values(batch)
    assert torch.equal(other, world.other_values(batch)) and (other != batch.values).any(-1).float().mean() > 0.9


def test_regression_is_linear_padding_changes_nothing_and_extra_targets_equal_a_slow_loop():
    world, seed, d, number = Regression(7), torch.tensor([1, 2]), torch.tensor([3, 5]), torch.arange(4000).expand(2, -1)
    wide, narrow = world.sample(seed, d, number, 6), Regression(3).sample(seed[:1], d[:1], number[:1], 6)
    assert torch.equal(wide.x[0, ..., :3], narrow.x[0]) and torch.equal(wide.asked[0, :, :3], narrow.asked[0])
    assert torch.equal(wide.y[0], narrow.y[0]) and not wide.x[0, ..., 3:].any() and not wide.x[1, ..., 5:].any()
    torch.testing.assert_close(wide.y[1, ..., 0], (wide.x[1, ..., :5] * wide.asked[1, :, None, :5]).sum(-1))
    for r, size in enumerate((3, 5)):
        assert abs(wide.y[r].square().mean() / size - 1) < 0.1 and abs(wide.x[r, ..., :size].var() - 1) < 0.02
    guess = torch.linspace(-2, 2, 336_000).view(2, 4000, 6, 7)
    got, asked, other = world.value_loss(guess, wide.values), world.asked_loss(guess, wide), world.other_values(wide)
    for (r, size), b, n in product(enumerate((3, 5)), range(3), range(6)):
        for have, target in ((got, wide.x[r, b, n]), (asked, wide.asked[r, b])):
            torch.testing.assert_close(have[r, b, n], (guess[r, b, n, :size] - target[:size]).square().mean())
        assert torch.equal(other[r, b, n], wide.x[r, b - 1, n])


def test_regression_references_equal_numpy():
    d, n, many = 3, 7, 40
    level = Regression(5).references(4, d, n, sequences=many)
    batch = Regression(5).sample(torch.tensor([4]), torch.tensor([d]), HELD_OUT + torch.arange(many)[None], n)
    x, y = batch.x[0, :, :, :d].double().numpy(), batch.y[0, :, :, 0].double().numpy()
    error = np.zeros((n, many))
    for k, i in product(range(n), range(many)):
        error[k, i] = x[i, k] @ np.linalg.lstsq(x[i, :k], y[i, :k], rcond=None)[0] - y[i, k]  # that of least norm
    assert level["bayes_loss"] == pytest.approx((error**2).mean() / d, rel=1e-6)
    assert level["bayes_last_loss"] == pytest.approx((error[-1] ** 2).mean() / d, rel=1e-6, abs=1e-9)
    assert level["no_context_loss"] == 1


def test_images_show_every_factor():
    for f, size in enumerate(SIZES):
        values = np.repeat([[1, 4, 7, 5, 0, 7]], size, 0)
        values[:, f] = np.arange(size)
        flat = tasks.image(values).reshape(size, -1)
        apart = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 10 * np.eye(size)
        assert flat.min() >= 0 and flat.max() <= 1 and apart.min() > 0.3, FACTORS[f]
    full = shapes((2, 2, 2, 2, 2, 2), embedding="pixels").full.numpy()
    assert full[[0, -1]].tolist() == [[0] * 6, [5, 5, 5, 7, 3, 14]]
    assert (np.diff(np.ravel_multi_index(full.T, SIZES)) > 0).all()


def test_code_is_entangled_by_its_gain():
    one_hot = shapes(FEW, embedding="onehot").table.numpy()
    codes = [shapes(FEW, code_width=16, code_gain=gain).table.numpy() for gain in (0.05, 3.0)]
    rest = [np.linalg.norm(y - one_hot @ np.linalg.lstsq(one_hot, y, rcond=None)[0]) / np.linalg.norm(y) for y in codes]
    assert rest[0] < 0.01 < 0.2 < rest[1]
    one, other = (shapes(FEW, code_seed=seed) for seed in (0, 1))  # another code and another split
    assert not torch.allclose(one.table, other.table) and not torch.equal(one.train, other.train)


def test_vae_latents_are_repeatable_and_tell_images_apart():
    full = shapes((2, 2, 2, 1, 1, 1), embedding="pixels").full.numpy()
    one, two = (tasks.vae(full, latent=8, steps=30) for _ in range(2))
    assert one.shape == (8, 8) and np.isfinite(one).all() and (one == two).all()
    assert np.linalg.norm(one[:, None] - one[None], axis=-1)[~np.eye(8, dtype=bool)].min() > 1e-3


def test_an_oracle_sees_the_factor_values_and_its_neighbours_do_not():
    world, seed = shapes(FEW, FACTORS[:2], code_width=5), torch.tensor([3, 3])
    number, m = torch.arange(6).expand(2, -1), mapping_counts([math.inf] * 2, "cpu")
    plain = world.sample(seed, m, number, 4)
    world.show_clean([False, True])
    batch = world.sample(seed, m, number, 4)
    assert torch.equal(batch.x[0, ..., :5], plain.x[0]) and not batch.x[0, ..., 5:].any() and world.inputs["d_x"] == 14
    torch.testing.assert_close(world.clean.square().mean(0), torch.ones(14))  # standardised
    largest = [part.argmax(-1) for part in batch.x[1].split([4, 3, 2, 2, 3], -1)]
    assert torch.equal(torch.stack(largest, -1), batch.values[1][..., [0, 1, 2, 4, 5]])


def test_an_embedding_file_is_read_in_the_papers_order_or_refused(tmp_path):
    path, table = tmp_path / "e.npz", np.arange(480_000, dtype=np.float32)[:, None]
    np.savez(path, repre=table)
    world = shapes((2, 1, 1, 1, 1, 3), embedding=str(path))
    assert world.table[:, 0].tolist() == [0, 7, 14, 240_000, 240_007, 240_014]
    wrong = (table[:10], table[:, :0], table.astype(int), np.full_like(table, 1e30))
    for content in (dict(other=table), *(dict(repre=part) for part in wrong), None):
        np.savez(path, **content) if content else path.write_text("no archive")
        with pytest.raises(UsageError, match="--embedding"):
            tasks.load_embedding(str(path))


# -------------------------------------------------------------------------------- probes.py
def test_a_drowned_state_can_be_read_and_geometry_equals_numpy():
    g = torch.Generator().manual_seed(0)
    target, both = torch.randint(4, (1, 3000, 1), generator=g), torch.zeros(2, 3000, 16)
    both[:, :, :4] = F.one_hot(target[0, :, 0], 4) + 0.1 * torch.randn(3000, 4, generator=g)
    both[1, :, 4] = 1000 * torch.randn(3000, generator=g)  # one direction swamps the others
    score = probes.converged_probe(both[:, :2000], target[:, :2000], both[:, 2000:], target[:, 2000:], [4])
    assert score.min() > 0.99
    got = probes.geometry(both[:, None])
    for run, state in enumerate(both.double().numpy()):
        variance = np.linalg.svd(state - state.mean(0), compute_uv=False) ** 2 / 2999
        unit = state / np.linalg.norm(state, axis=1, keepdims=True)
        assert got["spread"][run].item() == pytest.approx(math.sqrt(variance.sum()), rel=1e-4)
        assert got["first_share"][run].item() == pytest.approx(variance[0] / variance.sum(), rel=1e-4)
        assert got["cosine"][run].item() == pytest.approx(((unit @ unit.T).sum() - 3000) / (3000 * 2999), abs=1e-4)
        assert got["alike"][run].item() == pytest.approx(((unit @ unit.T) ** 2).mean(), rel=1e-4)


def test_only_the_asked_factors_are_the_score_and_the_others_have_their_own(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_STEPS", 3000)
    world = shapes((3, 3, 2, 2, 2, 2), FACTORS[:1], embedding="onehot")
    model = GPT(Config(**world.inputs, n_pair=4, n_layer=1, n_head=1, d_model=8), [0, 1])
    for name, p in model.named_parameters():
        p.data *= "norm" in name
    for run_ in range(2):  # whose states are the value of this factor of x, and nothing else
        model.read_in.weight.data[run_, 3 * run_ : 3 * run_ + 3, :3] = torch.eye(3)
    prober = probes.Prober(world, torch.tensor([0, 1]), mapping_counts([math.inf] * 2, "cpu"), 4)
    for (x, _), items in zip(prober.items, (world.train, world.test), strict=True):
        assert set(map(tuple, x[0].tolist())) <= set(map(tuple, world.table[items].tolist()))
    score = prober(model)
    for name in probes.SCORES:
        assert score[name][0] > 0.99 and score[name][1] < 0.5, name
    by_factor = score["weights_score_by_factor"][:, 0]
    assert by_factor.shape == (2, 6) and by_factor[0, 0] > 0.99 and by_factor[1, 1] > 0.99
    torch.testing.assert_close(score["weights_score_unasked"][:, 0], by_factor[:, 1:].mean(1))


def test_the_context_score_is_read_from_labels_in_the_second_half(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_STEPS", 3000)
    world = shapes((4, 2, 2, 2, 2, 1), FACTORS[:2], code_width=1)  # labels 2 and 3: the factor of four values is asked
    model = GPT(Config(**world.inputs, n_pair=24, n_layer=1, n_head=1, d_model=8), [0, 1])
    for name, p in model.named_parameters():
        p.data *= "norm" in name
    model.read_in.weight.data[:, 2:4, :2] = torch.eye(2)  # of which x, of width 1, has no part
    model.blocks[0].qkv.weight.data[:, :, 16:] = model.blocks[0].attention_out.weight.data[:] = torch.eye(8)
    model.blocks[0].qkv.weight.data[1, :, 16:] = 0  # this run does not look back
    score = probes.Prober(world, torch.tensor([0, 1]), mapping_counts([math.inf] * 2, "cpu"), 24)(model)
    assert score["context_score"][0] > 0.99 and score["context_score"][1] < 0.7


def test_rows_pair_by_seed_at_the_common_rate_and_at_each_arms_best_and_mark_the_edge():
    runs = []
    for arm, lr, score, *lengths in (("baseline", 1e-3, 0.8, 40, None, 60), ("baseline", 2e-3, 0.9, 30, 30, 30),
                                     ("new", 1e-3, 0.9, 10, 50, None), ("new", 4e-3, 0.9, 90, 90, 90),
                                     ("new", 5e-4, 0.9, 5, 5, 5)):  # fmt: skip
        same = dict(arm=arm, difficulty="inf", lr=lr, completion_step=None, loss=[1.4, 1.0])
        same |= dict.fromkeys(("weights_score", "weights_score_after_norm"), [[0.9], [score]])
        runs += [same | dict(seed=seed, plateau_length=length) for seed, length in enumerate(lengths)]
    metrics = dict(steps=[0, 100], lr=[1e-3, 5e-4, 2e-3, 4e-3], block=0, error=False, symbol="m", runs=runs)
    base, base_fast, new, new_fast, new_slow = probes.rows(metrics)
    assert base["median"] == 60 and base["left"] == 2
    assert [row["damaged"]["weights_score"] for row in (base, new)] == [3, 0]
    for key in ("best", "edge"):
        assert [row[key] for row in probes.rows(metrics)] == [False, True, False, False, True]
    said = probes.report(metrics)
    assert "| 60 | 2 of 3 |" in said and "2 of 3 seeds, later in 1 (sign test p = 1), median -30 steps" in said
    assert "| 5e-4 best (edge) |" in said and "3 of 3 seeds, later in 0 (sign test p = 0.25), median -25 steps" in said
    assert "| at least 80 | 1 of 2 |" in probes.report(metrics | dict(runs=runs[1:3]))  # half is censored
    last = [run | dict(plateau_length=100) if run["arm"] == "new" else run for run in runs if run["lr"] == 1e-3]
    assert "sooner than the baseline in 1 of 3 seeds, later in 2" in probes.report(metrics | dict(runs=last))
    assert "so no verdict" in probes.report(metrics | dict(runs=[run | dict(plateau_length=None) for run in runs]))
    spread = [[1.0, 3.0, 1.0], [2.0, 6.5, 1.5], [None] * 3, [2.5, 6.5, 1.0], *[[1.0, 3.0, 3.0]] * 8]  # per block
    wide = metrics | dict(probe_steps=[*range(0, 120, 10)], runs=[run | dict(spread=spread) for run in runs])
    assert "| 30 30 30 | 40 40 40 |" in probes.report(wide)
    assert probes.doubling(wide, dict(spread=spread[:3]), 0) == math.inf


def test_regression_probes_score_the_normalised_error():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3000, 4, generator=g)
    x[..., 3] = 5  # constant, as padding is: not counted, though 782 steps cannot learn so large a bias
    seen = torch.cat([x[..., :2] * 2 + 1, torch.randn(1, 3000, 5, generator=g)], -1)  # two of three can be read
    for probe in (probes.linear_probe, probes.converged_probe):
        score = probe(seen[:, :2000], x[:, :2000], seen[:, 2000:], x[:, 2000:], None)
        assert score.shape == (1, 1) and abs(score.item() - 1 / 3) < 0.05


def test_plateau_lengths_and_sign_tests_counted_by_hand():
    curves = [1.0, 0.9, 0.7, 0.9], [1.0, 0.9, 0.85, 0.8], [1.0, None, None, None], [0.5] * 4
    assert [probes.plateau_length([0, 10, 20, 30], loss, 0.8) for loss in curves] == [20, None, None, 0]
    assert [probes.sign_test(*signs) for signs in ((5, 0), (2, 7), (3, 3), (0, 0))] == [1 / 16, 23 / 128, 1, 1]


# -------------------------------------------------------------------------------- exp_nlp.py
def given(**changes):
    flags = dict(conllu=[], tsv=None, text="grammar", ask=[], texts=3000, words=11, vocabulary=1000, pairs=4)
    return SimpleNamespace(**flags | changes)


def parse(words):
    """The attributes of a sentence of the grammar, read from its words, with no help from the generator."""
    kind = {noun: name for name, nouns in exp_nlp.KINDS.items() for noun in nouns}
    kind |= {noun + "s": name for noun, name in kind.items()} | {"cactuses": "plant"}
    ends = dict(d="past", ed="past", s="present", es="present") | {"": "present"}
    verbs = {verb + end: tense for verb in exp_nlp.VERBS for end, tense in ends.items()}
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


@pytest.mark.parametrize("read, parse, many", [
    (exp_nlp.grammar, parse, 3000), (exp_nlp.oracle, lambda words: dict(word.split() for word in words), 1536),
])  # fmt: skip
def test_attributes_of_made_texts_equal_an_independent_parse(read, parse, many):
    texts, attributes, _ = read(given())
    assert len(set(map(tuple, texts))) == many and max(map(len, texts)) <= 11
    for i, words in enumerate(texts):
        assert parse(list(words)) == {name: column[i] for name, column in attributes.items()}, words


def test_word_selection_labels_the_word_of_the_asked_category():
    world, seed = exp_nlp.wordselect(given(texts=500), "cpu"), torch.tensor([3])
    batch = world.sample(seed, mapping_counts([1.0], "cpu"), torch.arange(200)[None], 6)
    for b, i in product(range(200), range(6)):
        label, listed = batch.label[0, b, i].item(), batch.x[0, b, i, :-1].tolist()
        assert label // 12 == batch.asked[0, b] and label + exp_nlp.FIRST in listed
        assert sorted((word - exp_nlp.FIRST) // 12 for word in listed) == [0, 1, 2, 3, 4]
    level = world.references(3, 1.0, 6)
    assert level["no_context_loss"] == math.log(5) and level["bayes_accuracy"] == pytest.approx((0.2 + 5) / 6)


def tree(head="", verb="Tense=Past|VerbForm=Fin", form="He", ids="1 2 3"):
    rows = (f"{form}\t_\tPRON\t_\tNumber=Sing\t2\tnsubj", f"sees\t_\tVERB\t_\t{verb}\t0\troot",
            ".\t_\tPUNCT\t_\t_\t2\tpunct")  # fmt: skip
    return head + "".join(f"{i}\t{row}\t_\t_\n" for i, row in zip(ids.split(" "), rows)) + "\n"


@pytest.mark.parametrize("text, name, values", [
    (tree("# newdoc\n# genre = a\n") + tree() + tree("# newdoc\n"), "genre", ["a", "a", ""]),
    (tree("# genre = a\n1-2\tHe's" + 8 * "\t_" + "\n0.1\tx" + 8 * "\t_" + "\n"), "subject", ["PRON"]),
    (tree("# meta::genre = a\n# sent_id = x-1\n") + tree("# genre = b\n"), "genre", ["a", "b"]),
    (tree("# sent_id = web-1\n") + tree("# sent_id = mail-2\n"), "genre", ["web", "mail"]),
    (tree("# sent_id = web-1\n") * 2, "genre", ["", ""]),  # one value
    (tree("# sent_id = dev-1\n") + tree("# sent_id = test-2\n"), "genre", ["", ""]),
    (tree() + tree(verb="Mood=Imp|VerbForm=Fin") + tree(verb="VerbForm=Fin"), "verb", ["Past", "Imp", "Fin"]),
    (tree(verb="Mood=Ind") + tree(verb="Tense=Pres") + tree(verb="_"), "verb", ["Ind", "Pres", "none"]),
    (tree(verb="Tense=Past|VerbForm=Part") + tree(), "verb", ["none", "Past"]),
    (tree().replace("\t0\t", "\t_\t") + tree(), "root", ["", "VERB"]),
    (tree().replace("PUNCT", "_") + tree().replace("PUNCT", "X") + tree(), "end", ["", "none", "."]),
    ("\ufeff" + tree().replace("\n", "\r\n"), "subject", ["PRON"]),
])  # fmt: skip
def test_a_treebank_is_read_as_its_own_customs_say(tmp_path, text, name, values):
    (tmp_path / "a.conllu").write_bytes(text.encode())
    words, attributes, _ = exp_nlp.conllu(given(conllu=[str(tmp_path / "a.conllu")]))
    assert words == [["he", "sees", "."]] * len(values) and attributes[name] == values


@pytest.mark.parametrize("text, line", [
    (tree().strip() + "\n" + tree("# x\n"), 4), (tree().strip() + "\n" + tree(), 4),
    (tree(ids="1 3 4"), 2), (tree(ids="1 2 \ufeff3"), 3), (tree(ids="1 2 3 ").replace("3\t", "3 \t"), 3),
    (tree().replace("\n", "\r\r\n"), 1), (tree().replace("sees", ""), 2), ("1\tHe\n", 1), ("1\t\udce9\n", 1),
    (tree() + tree(form="_").replace("sees", "_").replace("\t.", "\t_"), 8),
])  # fmt: skip
def test_a_broken_treebank_is_refused_by_file_and_line(tmp_path, text, line):
    (tmp_path / "a.conllu").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=rf"a\.conllu: line {line} "):
        exp_nlp.conllu(given(conllu=[str(tmp_path / "a.conllu")]))


def test_words_of_a_table_in_any_script(tmp_path):
    text = "Don't e-mail! E\u0301 tu\u0301 हिन्दी में 我们 go。 ทำได้ می\u200cروم"
    words = "don ' t e - mail ! é tú".split()
    words += "हिन्दी में 我 们 go 。 ท ำ ไ ด้ می\u200cروم".split()
    (tmp_path / "t.tsv").write_text(f"text\ta\n{text}\t x \n\t1\nb\t \n", encoding="utf-8")
    found, attributes, _ = exp_nlp.tsv(given(tsv=str(tmp_path / "t.tsv")))
    assert found == [words, ["b"]] and attributes == {"a": ["x", ""]}


def test_every_loss_is_said_and_what_is_left_is_split_and_balanced(tmp_path, capsys):
    rng, rows, path = np.random.default_rng(0), ["text\tcolour\tsize\tagain\tid"], tmp_path / "t.tsv"
    colour = rng.choice(["red", "other", "", *map(str, range(20))], 900, p=[0.3, 0.3, 0.1] + [0.015] * 20)
    for i, (c, s) in enumerate(zip(colour, rng.choice(["l", "s"], 900))):
        rows.append(f"{' '.join(rng.choice([*'abcde'], 4))} {c} {s}\t{c}\t{s}\t{s}{s}\t{i}")
    path.write_text("\n".join([*rows, "\tred\tl\tl\t9"]))
    world, said = exp_nlp.texts(given(tsv=str(path)), "cpu"), capsys.readouterr().out
    assert world.names == ("colour", "size") and world.sizes == (3, 2)
    lost = (colour == "").sum()
    for words in ("901 rows read, 1 of", "rarer values together", f"{lost} texts have none", f"{lost} lack a value",
                  "id: left out, every value is rarer than 4%", "again: left out, together with size"):  # fmt: skip
        assert words in said
    assert not set(map(tuple, world.table[world.train].tolist())) & set(map(tuple, world.table[world.test].tolist()))
    for part, f in product((world.train, world.test), (0, 1)):
        share = torch.bincount(world.values[part, f], world.weight[part])
        torch.testing.assert_close(share, torch.full_like(share, 1 / world.sizes[f]), atol=1e-6, rtol=0)
    exp_nlp.texts(given(tsv=str(path), words=4), "cpu")
    assert "warning: most held-out texts are dropped" in capsys.readouterr().out
    for changes, why in ((dict(vocabulary=1), r"(\d+) of \1 held-out texts are"), (dict(ask=["id"]), "id: left out")):
        with pytest.raises(UsageError, match=why):
            exp_nlp.texts(given(tsv=str(path), **changes), "cpu")


# -------------------------------------------------------------------------------- the scripts
SIZE = "--steps 12 --batch 4 --n-layer 2 --n-head 2 --d-model 16 --seeds 2 --lr 2e-3 --evaluations 4 --probes 2 " \
       "--no-compile --precision fp32 --device cpu"  # fmt: skip
SMALL = f"{SIZE} --pairs 4 --factors 3 3 2 2 1 1 --ask floor_hue wall_hue --code-width 12 --sequences 0"
EACH = {
    "exp_plateau.py": f"{SMALL} --difficulty 2 inf",
    "exp_plateau.py --change rescaled swapped": f"{SMALL} --difficulty 2 --lr 1e-3 2e-3",
    "exp_plateau.py --no-oracle": f"{SMALL} --difficulty 2 --lr 1e-3 2e-3 4e-3",
    "exp_plateau.py --change fresh": f"{SMALL} --difficulty 2 --lr 1e-3 2e-3 4e-3",
    "exp_warmup.py": f"{SMALL} --switch 0 5",
    "exp_mixture.py": f"{SMALL} --mix easy unrelated",
    "exp_aux_loss.py": f"{SMALL} --sequences 64 --loss none weights context shuffled norm decay clip weights+norm",
    "exp_plateau.py --task linear": f"{SIZE} --difficulty 2 3 --pairs 7",
    "exp_aux_loss.py --task linear": f"{SIZE} --difficulty 2 3 --pairs 7 --loss none weights context shuffled norm",
    "exp_nlp.py": f"{SIZE} --texts 1500 --switch 5 --arm baseline warmup mixture weights context alike norm",
    "exp_nlp.py --text wordselect": f"{SIZE} --texts 1500",
}


@patch.multiple(probes, PROBE_ITEMS=128, PROBE_STEPS=40, fcntl=None)  # a lock lives as long as its process
def run(command: str, expect: int = 0) -> str:
    """A command line in this process, which saves the import of torch, with small probes. Returns what it printed."""
    words, code, out = shlex.split(command), 0, io.TextIOWrapper(io.BytesIO(), "utf8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), patch.object(sys, "argv", words):
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


def weights_of(folder: Path, name: str = "read_out.weight") -> torch.Tensor:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"][name]


def test_the_benchmark_times_every_number_of_runs(monkeypatch):
    monkeypatch.setattr("model.compile_blocks", str)
    assert re.findall(r"R = +(\d): \d+\.\d\d ms a run-step", run("model.py --runs 2 1")) == ["2", "1"]


@pytest.mark.parametrize("command", EACH)
def test_each_script_end_to_end(command, tmp_path):
    said = run(f"{command} {EACH[command]} --out {tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "12 100% |" in said and probes.report(metrics) in said
    assert len(weights_of(tmp_path).unique(dim=0)) == len(metrics["runs"]) > 3  # each its own way
    for run_ in metrics["runs"]:
        assert len(run_["loss"]) == 5 and len(run_["weights_score"]) == 3
        level = metrics["reference"][str(run_["difficulty"])]  # of the first seed
        enough = -0.1 - level["bayes_last_loss"] if metrics["error"] else 0.95 * level["bayes_accuracy"]
        done = [step for step, value in zip(metrics["steps"], run_["accuracy"]) if value >= enough]
        assert run_["seed"] or run_["completion_step"] == min(done, default=None)
    first = (tmp_path / "figure.png").read_bytes()
    (tmp_path / "figure.png").unlink()
    run(f"{command} {EACH[command]} --out {tmp_path} --replot")
    assert (tmp_path / "figure.png").read_bytes() == first


def test_killed_interrupted_or_shared_by_two_processes_a_training_gives_the_same_numbers(tmp_path):
    flags = f"exp_plateau.py {SMALL} --difficulty 2 inf --steps 300 --evaluations 6"
    tiny, path = tmp_path / "tiny.py", dict(PYTHONPATH=str(HERE))
    tiny.write_text("import probes, runpy, sys; probes.PROBE_ITEMS, probes.PROBE_STEPS = 128, 40; "
                    "probes.SAVE_SECONDS, sys.argv = 0, sys.argv[1:]; "
                    "runpy.run_path(sys.argv[0], run_name='__main__')")  # fmt: skip
    killed = start(f"{tiny} {flags} --out {tmp_path}/killed", **path)
    two = start(f"-m torch.distributed.run --nproc_per_node=2 {tiny} {flags} --out {tmp_path}/two", **path)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(0.5)  # some steps
    killed.send_signal(signal.SIGSTOP)  # it lives and holds its lock, but cannot get to its end
    locked = start(f"{flags} --out {tmp_path}/killed --resume")
    run(f"{flags} --out {tmp_path}/whole")
    assert "another training is running" in locked.communicate()[0] and locked.returncode == 2
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    with patch.object(probes.Record, "measure", side_effect=KeyboardInterrupt):  # Ctrl-C some steps later
        assert "--resume" in run(f"{flags} --out {tmp_path}/killed --resume", expect=130)
    run(f"{flags} --out {tmp_path}/killed --resume")
    assert two.wait() == 0, two.stdout.read()
    assert science(tmp_path / "killed") == science(tmp_path / "two") == science(tmp_path / "whole")


def test_a_checkpoint_that_is_damaged_or_of_another_command_or_data_is_refused_and_left_alone(tmp_path):
    table, path = tmp_path / "data.tsv", tmp_path / "x" / "checkpoint.pt"
    table.write_text("text\tlabel\n" + "\n".join(f"a{i % 7} b{i} c{i % 3}\t{'ny'[i % 2]}" for i in range(200)))
    flags = f"exp_nlp.py {SIZE} --pairs 4 --arm baseline weights --tsv {table} --out {tmp_path}/x"
    run(flags)
    whole = path.read_bytes()
    half = len(whole) // 2  # in a tensor
    for content in (b"", whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]):
        path.write_bytes(content)
        assert "is damaged" in run(f"{flags} --resume", expect=2) and path.read_bytes() == content
    path.write_bytes(whole)
    assert "--batch (then 4, now 5)" in run(f"{flags} --resume --batch 5", expect=2)
    table.write_text(table.read_text().replace("a0", "a9"))
    assert f"the contents of {table}" in run(f"{flags} --resume", expect=2)
    assert "--overwrite" in run(flags, expect=2) and path.read_bytes() == whole
    for wrong in (f"{table}x", ""):
        said = run(flags.replace(str(table), shlex.quote(wrong)), expect=2)
        assert f"--tsv or --conllu {wrong}: there is no" in said
    with patch.object(torch, "load", side_effect=torch.OutOfMemoryError("out of memory")):  # a good checkpoint stays
        assert "out of memory; --resume" in run(f"{flags} --resume", expect=2)
    run(f"{flags} --overwrite")


def test_scripts_train_as_by_hand_and_arms_that_do_nothing_are_the_baseline(tmp_path):
    run(f"exp_plateau.py {SMALL} --difficulty 1 inf --out {tmp_path}/plain")
    run(f"exp_warmup.py {SMALL} --switch 0 11 --out {tmp_path}/warm")  # its last step is on the target
    run(f"exp_mixture.py {SMALL} --fraction 0 0.5 1 --out {tmp_path}/mix")
    run(f"exp_aux_loss.py {SMALL} --loss none clip:1e5 --out {tmp_path}/aux")
    run(f"exp_nlp.py {SIZE} --texts 1500 --arm baseline warmup mixture --switch 0 --fraction 0 --out {tmp_path}/nlp")
    images, seed = shapes((3, 3, 2, 2, 1, 1), FACTORS[:2], code_width=12, code_gain=2.5), torch.tensor([0, 1])
    texts = exp_nlp.texts(given(texts=1500, pairs=6), "cpu")
    easy, hard = mapping_counts([1.0, 1.0], "cpu"), mapping_counts([math.inf, math.inf], "cpu")
    plans = [easy] * 12, [hard] * 12, [easy] * 11 + [hard], [torch.stack([easy, easy, hard, hard], 1)] * 12
    held_out = images.sample(seed, hard, HELD_OUT + torch.arange(64).expand(2, -1), 4, held_out=True)
    easy, hard, switched, mixed = (train(images, [0, 1], plan, 2e-3) for plan in plans)
    logits, measured = mixed(held_out.x, held_out.y), science(tmp_path / "mix")["runs"][2:4]
    for key, values in (("loss", images.loss(logits, held_out)), ("accuracy", logits.argmax(-1) == held_out.label)):
        assert [run_[key][-1] for run_ in measured] == pytest.approx(values.float().mean((1, 2)).tolist(), rel=1e-3)
    images.show_clean([True, True])
    oracle = train(images, [0, 1], plans[1], 2e-3)
    text = train(texts, [0, 1], [mapping_counts([4.0, 4.0], "cpu")] * 12, 2e-3, pairs=6)
    for name, models in (("plain", [easy, hard, oracle]), ("warm", [hard, switched]), ("aux", [hard, hard]),
                         ("mix", [hard, mixed, easy]), ("nlp", [text, text, text])):  # fmt: skip
        for got, by_hand in zip(weights_of(tmp_path / name).split(2), models, strict=True):
            assert torch.equal(got, by_hand.read_out.weight), name


def test_extra_losses_train_as_by_hand(tmp_path):
    run(f"exp_aux_loss.py {SMALL} --loss alike:2 norm:2 cosine:2 --start 3 --out {tmp_path}/last")
    run(f"exp_aux_loss.py {SMALL} --loss weights previous labels norm:2 --read-block 1 "
        f"--read-factors shape floor_hue --factors 3 3 2 2 4 1 --out {tmp_path}/first")  # fmt: skip

    cosines = lambda h: [F.cosine_similarity(s[:, None], s[None], dim=-1) for s in h[1][:, :, ::2].flatten(1, 2)]
    alike = lambda power: lambda _, states, __: sum(2 * c.pow(power).mean() for c in cosines(states))
    norm = lambda k: lambda _, states, __: sum(2 * h.square().mean((1, 2, 3)).sum() / k for h in states[:k])

    def values_read(token, back, model, states, batch):
        guess = model.extra(model.norm(states[0][:, :, 2 * back + token :: 2].flatten(1, 2)))
        values = batch.values[:, :, : 4 - back].flatten(0, 2)
        hue, shape = guess[..., :3].flatten(0, 1), guess[..., 10:14].flatten(0, 1)  # of two runs, two factors
        return 0.3 * (F.cross_entropy(hue, values[:, 0]) + F.cross_entropy(shape, values[:, 4]))

    reads = [partial(values_read, *of) for of in ((0, 0), (0, 1), (1, 0))]
    for name, first, shape, every in (("last", 3, (3, 3, 2, 2, 1, 1), (alike(2), norm(2), alike(1))),
                                      ("first", 0, (3, 3, 2, 2, 4, 1), (*reads, norm(1)))):  # fmt: skip
        world = shapes(shape, FACTORS[:2], code_width=12, code_gain=2.5)
        for got, extra in zip(weights_of(tmp_path / name, "blocks.0.mlp_out.weight").split(2), every, strict=True):
            m, step = [mapping_counts([math.inf, math.inf], "cpu")] * 12, count()
            late = lambda *given: (next(step) >= first) * extra(*given)
            by_hand = train(world, [0, 1], m, 2e-3, extra=late)
            torch.testing.assert_close(got, by_hand.blocks[0].mlp_out.weight, atol=1e-5, rtol=0)


def test_strategies_on_text_train_as_by_hand(tmp_path):
    run(f"exp_nlp.py {SIZE} --texts 1500 --arm baseline warmup mixture weights context alike norm --switch 5 "
        f"--fraction 0.5 --weight 0.5 --out {tmp_path}")  # fmt: skip
    world = exp_nlp.texts(given(texts=1500, pairs=6), "cpu")
    easy, hard = (mapping_counts([m, m], "cpu") for m in (1.0, 4.0))
    at_x = lambda states: states[-1][:, :, 11::13].flatten(1, 2)  # eleven words and a stop before each label
    read = lambda model, states: model.extra(model.norm(at_x(states))).unflatten(1, (4, 6))
    cosines = lambda states: [F.cosine_similarity(s[:, None], s[None], dim=-1) for s in at_x(states)]
    extras = (  # each of two runs has half of it
        lambda model, states, batch: world.value_loss(read(model, states)[..., :-2], batch.values).mean(),
        lambda model, states, batch: world.asked_loss(read(model, states)[..., -2:], batch).mean(),
        lambda model, states, batch: sum(c.square().mean() for c in cosines(states)),
        lambda model, states, batch: 0.01 * sum(s.square().mean() for s in states),
    )
    plans = [hard] * 12, [easy] * 5 + [hard] * 7, [torch.stack([easy, easy, hard, hard], 1)] * 12
    models = [train(world, [0, 1], plan, 2e-3, pairs=6) for plan in plans]
    models += [train(world, [0, 1], plans[0], 2e-3, pairs=6, extra=extra) for extra in extras]
    for got, by_hand in zip(weights_of(tmp_path, "blocks.0.mlp_out.weight").split(2), models, strict=True):
        torch.testing.assert_close(got, by_hand.blocks[0].mlp_out.weight, atol=1e-5, rtol=0)


def test_rates_rise_and_fall_and_a_read_in_starts_small_as_they_say(tmp_path):
    config = Config(d_x=12, d_y=3, n_pair=4, n_layer=2, n_head=2, d_model=16)
    zero = GPT(config, [0, 1]).read_in.weight
    for steps in (1, 2):
        run(f"exp_aux_loss.py {SMALL} --steps {steps} --loss none ramp:2 anneal input:0.5 --out {tmp_path}/{steps}")
    one, two = (weights_of(tmp_path / f"{steps}", "read_in.weight").split(2) for steps in (1, 2))
    torch.testing.assert_close(one[1] - zero, (one[0] - zero) / 2)  # half the rate at the first step of two
    torch.testing.assert_close(two[2] - one[2], (two[0] - one[0]) / 2)  # at the last one
    assert torch.equal(one[2], one[0]) and (one[3] - zero / 2).abs().max() < 2.1e-3


def test_extra_losses_stop_at_their_block(tmp_path):
    stopped = []  # read-in, first and second block after one step, of the baselines and with the loss
    for stop in range(3):
        run(f"exp_aux_loss.py {SMALL} --steps 1 --loss none weights --stop-block {stop} --out {tmp_path}/{stop}")
        names = "read_in.weight", "blocks.0.mlp_out.weight", "blocks.1.mlp_out.weight"
        stopped.append([weights_of(tmp_path / f"{stop}", name).split(2) for name in names])
        assert [torch.equal(*both) for both in stopped[-1]] == [stop > 0, stop > 0, stop > 1]
    torch.testing.assert_close(stopped[1][2], stopped[0][2], atol=1e-6, rtol=0)


def test_a_run_that_diverges_is_null_and_spares_the_others(tmp_path):
    said = run(f"exp_plateau.py {SMALL} --difficulty inf --no-oracle --lr 1e-3 1e9 --out {tmp_path}/both")
    run(f"exp_plateau.py {SMALL} --difficulty inf --no-oracle --lr 1e-3 --out {tmp_path}/alone")
    both, alone = science(tmp_path / "both")["runs"], science(tmp_path / "alone")["runs"]
    assert both[:2] == alone and all(run["loss"][-1] is None and run["plateau_length"] is None for run in both[2:])
    assert "| nan nan |" in said and "| - - |" in said
    with pytest.raises(ValueError, match="JSON"):  # before it is trained
        probes.Record(None, [dict(difficulty=math.inf, strength=math.inf)], None, None, None)
    run(f"exp_plateau.py {SIZE} --task linear --difficulty 2 --pairs 3 --lr 1e9 --out {tmp_path}/none")
    assert (tmp_path / "none" / "figure.png").exists()


def test_the_environment_is_not_believed_and_a_closed_output_ends_nothing(tmp_path, monkeypatch):
    """Ranks without torchrun, a notebook's backend, another alphabet, names as formulas, a broken pipe, a full disk."""
    table, labels = tmp_path / "$x_1$ \u0416.tsv", ["no", "$\u0416^$"]
    table.write_text("text\t$a^$\n" + "\n".join(f"w{i % 9} v{i} u{i % 4}\t{labels[i % 2]}" for i in range(300)))
    flags = f"--pairs 4 --arm baseline --tsv {shlex.quote(str(table))} --out {tmp_path}/odd"
    odd = start(f"exp_nlp.py {SIZE} {flags}", WORLD_SIZE="2", RANK="1", PYTHONIOENCODING="ascii",
                MPLBACKEND="module://matplotlib_inline.backend_inline")  # fmt: skip
    closed = start(f"exp_plateau.py {SMALL} --difficulty inf --out {tmp_path}/closed")
    closed.stdout.close()
    limit = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (9999, 9999)); sys.argv[:1] = []; "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    full = start(f'-c "{limit}" exp_plateau.py {SMALL} --difficulty inf --out {tmp_path}/full')
    said = full.communicate()[0].strip().splitlines()
    assert full.returncode == 2 and "make room" in said[-1] and "Traceback" not in str(said)
    assert not [*(tmp_path / "full").iterdir()]
    said = odd.communicate()[0]
    assert odd.returncode == 0 and "\\u0416" in said, said
    assert len(science(tmp_path / "odd")["runs"]) == 2 and (tmp_path / "odd" / "figure.png").exists()
    assert closed.wait() == 0 and (tmp_path / "closed" / "figure.png").exists()
    monkeypatch.setenv("LOCAL_RANK", "3")
    with patch.object(torch, "zeros", side_effect=RuntimeError) as zeros, pytest.raises(UsageError, match="available"):
        pick_device("cuda", "auto")
    assert zeros.call_args.kwargs["device"] == torch.device("cuda", 0)


@pytest.mark.parametrize("command", [
    "plateau --difficulty 1.5", "plateau --difficulty 1000000", "plateau --factors 4 4 4 4 5 1", "plateau --n-head 3",
    "plateau --ask orientation", "plateau --device cuda:77", "plateau --lr nan", "plateau --resume", "plateau --replot",
    "plateau --sequences 3", "plateau --out requirements.txt/x", "plateau --embedding nowhere.npz",
    "plateau --difficulty 1 --ask floor_hue", "plateau --pairs 2", "plateau --at 12 --change fresh",
    "plateau --change swapped", "warmup --switch 12",
    "warmup --warmup-difficulty inf --switch 5", "mixture --fraction 0.3", "aux_loss --loss magic",
    "aux_loss --loss weights:0.1+weights:1", "aux_loss --loss weights+labels",
    "aux_loss --read-block 3", "aux_loss --stop-block 3", "aux_loss --start 12", "aux_loss --read-factors shape",
    "aux_loss --ask floor_hue --loss context",
])  # fmt: skip
def test_wrong_input_ends_in_one_line_that_names_the_flag_and_leaves_nothing_behind(command, tmp_path):
    script, flags = command.split(" ", 1)
    said = run(f"exp_{script}.py {SMALL} --out {tmp_path}/x {flags}", expect=2).strip().splitlines()
    assert flags.split()[0] in said[-1] and "Traceback" not in str(said) and not [*tmp_path.glob("x/*")]


@pytest.mark.parametrize("device", ["meta", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("command", [c for c in EACH if "nlp" not in c and "change" not in c])
def test_a_training_step_never_asks_its_device_for_a_number(command, device, tmp_path, monkeypatch):
    """Tensors on meta have no values: what a step would fetch from a GPU or leave on the CPU fails. A GPU refuses."""
    refuse = torch.cuda.set_sync_debug_mode if device == "cuda" else str

    def steps():
        refuse("error")
        yield from range(7)
        refuse("default")
        raise KeyboardInterrupt  # trained; nothing to measure

    monkeypatch.setattr(probes, "Record", lambda *_: SimpleNamespace(steps=steps))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(f"{command.split('.')[0]}.pick_device", lambda *_: (torch.device(device), "fp32"))
    assert "interrupted" in run(f"{command} {EACH[command]} --out {tmp_path}/x", expect=130)


def test_results_are_made_by_the_command_and_hold_every_number_of_the_readmes_tables():
    results = (HERE / "assets" / "results.md").read_text()
    assert run(shlex.join(["probes.py", *sorted(map(str, (HERE / "assets").glob("*.json")))])) == results
    assert "README.md: is not a metrics.json" in run(shlex.join(["probes.py", str(HERE / "README.md")]), expect=2)
    sections = dict(part.split("\n", 1) for part in results.split("\n## ")[1:])
    verdicts = re.findall(r"^\| \d+ \| [^|]*\|(.*)\| ([^|]*) \|$", README, re.M)
    assert len(verdicts) == 15
    for said, names in verdicts:  # every number stands in the results that the row names
        text = "".join(sections[name] for part in names.split(", ") for name in fnmatch.filter(sections, part))
        for number in re.findall(r"(?<![\w.`-])\d[\d,.]*\d(?![\w`])", said):
            assert re.search(rf"(?<![\d.,])({number}|{number.replace(',', '')})(?![\d,]|\.\d)", text), (number, names)
        for sooner, later, n in re.findall(r"sooner (\d+), later (\d+) of (\d+)", said):
            assert f"sooner than the baseline in {sooner} of {n} seeds, later in {later} " in text, said
        for left in re.findall(r"left (\d+ of \d+)", said):
            assert f"| {left} |" in text, said


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^python (exp_\w+\.py[^\n#>`]*)", README, re.M))))
def test_every_command_of_the_readme_runs_at_tiny_size(command, tmp_path, monkeypatch):
    script, _, flags = re.sub(r"--(steps|seeds|evaluations|probes|switch)( \d+)+", "", command).partition(" ")
    if not (HERE / script).exists():  # the reader's copy, with the edit that the README shows
        ((original, text),) = re.findall(rf"^cp (\w+\.py) {script}$.*?```diff\n(.*?)```", README, re.M | re.S)
        old, new = ("".join(f"{line[1:]}\n" for line in text.splitlines() if line[0] == sign) for sign in "-+")
        code = (HERE / original).read_text()
        assert code.count(old) == 1
        (tmp_path / script).write_text(code.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
    small = SIZE if "nlp" in script or "linear" in flags else SMALL
    small += " --switch 0 5" if script in ("exp_warmup.py", "exp_mine.py") else ""
    run(f"{script} {small} {flags} {'--difficulty 1 100' if 'paper' in flags else ''} --out {tmp_path}/out")
    assert (tmp_path / "out" / "figure.png").exists()
