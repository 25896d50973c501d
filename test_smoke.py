"""pytest: the core against independent references, and every script and README command end to end at tiny size."""

import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import exp_mixture
import exp_nlp
import exp_plateau
import exp_warmup
import probes
import tasks
from model import GPT, Adam, Block, Config, autocast, compile_blocks, pick_device
from model import SIZES as BENCHMARK
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
    distinct,
    image,
    load_embedding,
    mappings,
    pairwise,
    random_bits,
    random_normal,
    render,
    sequence_numbers,
    shapes,
    vae,
)  # fmt: skip

torch.set_num_threads(1)  # everything is tiny, and commands run beside each other
os.environ["OMP_NUM_THREADS"] = "1"  # of those in processes of their own
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
TINY = dict(d_x=6, d_y=3, n_pair=4, n_layer=2, n_head=2, d_model=8)
FEW = (4, 3, 2, 1, 2, 3)


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


# ---------------------------------------------------------------------------------------------- model.py


def slow_gpt(model, run: int, x: np.ndarray, y: np.ndarray, mixing: str) -> np.ndarray:
    """GPT-2 for one run and one sequence, position by position in float64: x (n, t) words or (n, d), y (n, c) -> (n, c)."""
    w = {name: p[run].detach().double().numpy() for name, p in model.named_parameters()}
    linear = lambda v, name: v @ w[name + ".weight"] + w[name + ".bias"][0]

    def norm(v, name):
        return (v - v.mean()) / np.sqrt(v.var() + 1e-5) * w[name + ".weight"][0] + w[name + ".bias"][0]

    gelu = lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    pad = lambda v: np.pad(v, (0, len(w["read_in.weight"]) - len(v)))
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
            h[t] = h[t] + linear(gelu(linear(norm(h[t], f"blocks.{k}.norm_2"), f"blocks.{k}.mlp_in")), f"blocks.{k}.mlp_out")
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


def test_states_are_those_of_the_x_positions_also_in_parts(monkeypatch):
    model, (x, y, _) = disturbed(GPT(Config(**TINY), [0, 1])), tiny_batch(2)
    want = torch.stack(model(x, y, hidden=True)[1], 1)[..., 0::2, :]  # x, label, x, label ...
    for most in (10**6, 2 * 2 * 8):  # all five sequences at once, two by two
        monkeypatch.setattr(probes, "MOST_TOKENS", most)
        torch.testing.assert_close(probes.states(model, x, y), want)
        torch.testing.assert_close(probes.states(model, x, y, last=True), want[..., -1:, :])


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_does_what_a_cpu_does(device="cuda"):
    """Model and gradients in fp64, fp32 and bf16, sequences, and five steps of training."""
    for dtype, precision, close in ((torch.float64, "fp32", 1e-9), (torch.float32, "fp32", 1e-4), (torch.float32, "bf16", 5e-2)):
        results = []
        for there in ("cpu", device):
            model = disturbed(GPT(Config(**TINY), [3, 4])).to(there, dtype)
            x, y, label = (t.to(there, dtype) if t.is_floating_point() else t.to(there) for t in tiny_batch(2))
            with autocast(torch.device(there), precision if there == device else "fp32"):
                logits = model(x, y)
            F.cross_entropy(logits.to(dtype).flatten(0, -2), label.flatten()).backward()
            results.append([logits.to(dtype), *(p.grad for p in model.parameters())])
        for want, got in zip(*results):
            torch.testing.assert_close(got.cpu(), want, atol=close * max(1e-2, want.abs().max().item()), rtol=close)
    for world in (
        lambda where: shapes(FEW, FACTORS[:2] + FACTORS[5:], code_width=5, device=where),
        lambda where: Regression(5, 0.5, where),
    ):
        drawn = []
        for where in ("cpu", device):
            seed = torch.tensor([3, 8], device=where)
            drawn.append(world(where).sample(seed, torch.tensor([4, 5], device=where), sequence_numbers(seed, 7, 3), 6))
        for key, want in vars(drawn[0]).items():
            got = getattr(drawn[1], key)
            if want is not None:
                torch.testing.assert_close(got.cpu(), want, atol=1e-5 * want.is_floating_point(), rtol=0)
    for want, got in zip(*(train_tiny([5, 6, 7], [0, 1, 2], [1e-3, 2e-3, 1e-2], device=where) for where in ("cpu", device))):
        torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-3)


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
    ours = Adam(model, [1e-3, 1e-2, 3e-3], eps=[1e-8, 1e-4, 1e-8], weight_decay=[0.0, 0.1, 0.0], clip=[math.inf, math.inf, 0.1])
    for step in range(4):
        x, y, label = (t.double() if t.is_floating_point() else t for t in tiny_batch(3, step))
        sum(F.cross_entropy(z.flatten(0, 1), t.flatten()) for z, t in zip(model(x, y), label)).backward()
        ours.step()
        for run, (one, optimizer) in enumerate(singles):
            optimizer.zero_grad()
            F.cross_entropy(one(x[run, None], y[run, None])[0].flatten(0, 1), label[run].flatten()).backward()
            if run == 2:
                assert torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1) > 0.1
            optimizer.step()
            for p, q in zip(model.parameters(), one.parameters()):
                torch.testing.assert_close(p[run], q[0], atol=1e-6, rtol=1e-5)


def test_a_schedule_survives_a_checkpoint():
    optimizer, resumed = (Adam(GPT(Config(**TINY), [0, 1]), [1e-3, 2e-3]) for _ in range(2))
    start, base = optimizer.lr.clone(), resumed.lr
    optimizer.lr = optimizer.lr * torch.tensor([0.5, 1.0]).view(-1, 1, 1)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.lr, optimizer.lr) and not torch.equal(resumed.lr, start) and torch.equal(base, start)


def test_bf16_keeps_the_residual_stream_in_fp32_and_gives_nearly_the_same_gradients():
    model = GPT(Config(**TINY), [0])
    x, y, label = tiny_batch(1)
    with autocast(torch.device("cpu"), "bf16"):
        logits, states = model(x, y, hidden=True)
    assert logits.dtype == torch.bfloat16 and all(h.dtype == torch.float32 for h in states)
    F.cross_entropy(logits.float().flatten(0, -2), label.flatten()).backward()
    half = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = model(x, y)
    F.cross_entropy(plain.flatten(0, -2), label.flatten()).backward()
    torch.testing.assert_close(logits.float(), plain, atol=3e-2, rtol=3e-2)
    for a, b in zip(half, (p.grad for p in model.parameters())):
        torch.testing.assert_close(a, b, atol=0.02 * b.abs().max().item() + 1e-6, rtol=0.1)


def test_a_cpu_trains_in_fp32_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert [pick_device("cpu", precision)[1] for precision in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]


def test_one_compilation_serves_every_layer_and_no_measure(monkeypatch):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(Block, "compile", lambda block: torch.nn.Module.compile(block, backend=backend))
    model, (x, y, _) = disturbed(GPT(Config(**TINY), [0, 1])), tiny_batch(2)
    plain = model(x, y)
    compile_blocks(model)
    torch.testing.assert_close(model(x, y), plain)
    assert len(compiled) == 1
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :3, :2], y[:, :3, :2]), plain[:, :3, :2])
    assert len(compiled) == 1


FAULTS = """
import resource, torch, model
model.pick_device("cpu", "fp32")
for i in range(20):
    if i == 10:  # the heap grows twice, the second time at one of the first few
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="asks glibc's malloc")
def test_freed_memory_stays_with_the_process():
    """Otherwise each of the ten 64 MB costs 16,384 page faults."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) < 1000, done.stderr


def test_the_benchmark_counts_the_work_of_a_step():
    done = run("model.py --runs 1 3 --steps 1 --no-compile --device cpu --precision fp32", fresh=True)
    one, three = ([float(v.replace(",", "")) for v in line.split()] for line in done.stdout.strip().splitlines()[-2:])
    assert one[0] == 1 and three[0] == 3 and min(one[:8]) > 0
    # flops of a step, from time and rate: 6 per weight and token forward and backward, attention apart
    tokens, d, layers = 48 * 24, 64, 3
    weights = tokens * 12 * d * d * layers + tokens / 2 * ((32 + 4) * d + 4 * d)
    attention = layers * 2 * 48 * 24 * 24 * d
    assert one[1] * one[6] * 1e9 == pytest.approx(6 * (weights + attention), rel=0.1)
    for flags in ("--runs 0", "--device cuda:99"):
        assert flags.split()[0] in run(f"model.py {flags}", expect=2).stderr


# ---------------------------------------------------------------------------------------------- tasks.py


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


def test_sequences_are_what_the_paper_says():
    world = shapes((4, 4, 4, 4, 4, 1), FACTORS[:3])
    assert len(world.train) == 819 and not set(world.train.tolist()) & set(world.test.tolist())
    seed = torch.arange(3)
    batch = world.sample(seed, mappings([1.0, 5.0, math.inf], "cpu"), sequence_numbers(seed, 0, 2000), 12)
    assert all(len(set(s)) == 12 for s in batch.item.flatten(0, 1).tolist())  # distinct images
    assert set(batch.item.flatten().tolist()) == set(world.train.tolist())
    used = [set(), set(), set()]  # every (asked factor, value -> label) seen, as whole permutations
    for r, b in itertools.product(range(3), range(2000)):
        value = batch.values[r, b].gather(1, batch.asked[r, b].expand(12, 1))[:, 0].tolist()
        table = dict(zip(value, batch.label[r, b].tolist()))
        if len(table) == 4:
            used[r].add((batch.asked[r, b].item(), *(table[v] for v in range(4))))
    assert len(used[0]) == 3 and 10 <= len(used[1]) <= 15 and len(used[2]) == 3 * 24
    assert all(abs((batch.asked[r] == a).float().mean() - 1 / 3) < 0.05 for r in range(3) for a in range(3))
    again = world.sample(seed[1:2], mappings([5.0], "cpu"), sequence_numbers(seed[1:2], 0, 2000), 12)
    assert torch.equal(again.label[0], batch.label[1])


def test_a_finite_set_of_sequences_is_seen_once_an_epoch():
    seed = torch.tensor([1, 2])
    steps = torch.stack([sequence_numbers(seed, step, 5, finite=20) for step in range(8)])
    for r, epoch in itertools.product(range(2), range(2)):
        assert sorted(steps[4 * epoch : 4 * epoch + 4, r].flatten().tolist()) == list(range(20))
    assert not torch.equal(steps[:4], steps[4:]) and not torch.equal(steps[:, 0], steps[:, 1])


@pytest.mark.parametrize("pool", [5, 12, 1000])
def test_distinct_draws_are_uniform(pool):
    draws = distinct(pool, 8, 1, torch.arange(4000))
    if pool >= 8:
        assert all(len(set(row)) == 8 for row in draws.tolist())
    counts = torch.bincount(draws.flatten(), minlength=pool).float()
    assert (counts - 32000 / pool).abs().max() < 6 * (32000 / pool) ** 0.5


def test_hash_bits_are_fair():
    bits = random_bits(torch.arange(4)[:, None], 7, torch.arange(20_000))
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(63)])
    assert (ones - 0.5).abs().max() < 0.01
    assert abs(np.corrcoef((bits[0] >> 10).numpy(), (bits[1] >> 10).numpy())[0, 1]) < 0.03


def test_bayes_equals_enumeration():
    sizes, g = [3, 2], torch.Generator().manual_seed(0)
    values = torch.stack([torch.randint(s, (30, 5), generator=g) for s in sizes], -1)
    every = [list(itertools.permutations(range(s))) for s in sizes]
    label = torch.tensor([[every[b % 2][b % len(every[b % 2])][v[b % 2]] for v in values[b].tolist()] for b in range(30)])
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


def test_pairwise_equals_a_slow_loop():
    sizes, g = [3, 4, 2], torch.Generator().manual_seed(0)
    values = torch.stack([torch.randint(s, (20, 6), generator=g) for s in sizes], -1)
    label = torch.stack([torch.randperm(sizes[b % 3], generator=g)[values[b, :, b % 3]] for b in range(20)])
    got, v, y = pairwise(values, label, sizes), values.tolist(), label.tolist()
    exists = lambda f, c: (c < sizes[f]) / sizes[f]  # P(label | factor)
    prior = [sum(exists(f, c) for f in range(3)) / 3 for c in range(4)]
    for b, i in itertools.product(range(20), range(6)):
        p = list(prior)
        for j, c in itertools.product(range(i), range(4)):
            by_factor = [(c == y[b][j]) if v[b][i][f] == v[b][j][f] else (c != y[b][j]) * (c < s) / (s - 1) for f, s in enumerate(sizes)]
            weight = [exists(f, y[b][j]) for f in range(3)]
            p[c] *= sum(w * x for w, x in zip(weight, by_factor)) / sum(weight) / prior[c]
        np.testing.assert_allclose(got[b, i], np.array(p) / sum(p), atol=1e-6)
    level = shapes(FEW, FACTORS[:2], code_width=5).references(0, math.inf, 6)
    assert level["bayes_loss"] < level["pairwise_loss"] < level["no_context_loss"]


def test_reference_levels_of_the_full_world():
    world = shapes(code_width=2)
    level = world.references(0, math.inf, 40, sequences=512)
    assert level["no_context_loss"] == pytest.approx(2.445, abs=5e-4)
    assert level["label_set_loss"] == pytest.approx(2.180, abs=5e-4)
    assert level["chance"] == pytest.approx(0.1236, abs=5e-5)
    # factor known: accuracy after j pairs in closed form, P(value seen) + (1 - P(seen)) E[1 / labels left]
    known, computed = np.zeros(40), np.zeros(40)
    for s in SIZES:
        left = np.zeros((40, s + 1))  # distribution over the number of values seen after j pairs
        left[0, 0] = 1
        for j, k in itertools.product(range(39), range(s)):
            left[j + 1, k] += left[j, k] * k / s
            left[j + 1, k + 1] += left[j, k] * (s - k) / s
        for j in range(1, 39):
            left[j + 1, s] += left[j, s]
        known += [sum(left[j, k] * (k / s + (s - k) / s / (s - k)) for k in range(s)) + left[j, s] for j in range(40)]
        g = torch.Generator().manual_seed(0)
        values = torch.randint(s, (3000, 40, 1), generator=g)
        label = torch.rand(3000, s, generator=g).argsort(-1).gather(1, values[..., 0])
        computed += bayes(values, label, [s]).max(-1).values.mean(0).numpy()
    np.testing.assert_allclose(known[[0, 1, 5, 10, 20, 30, 39]] / 6, [0.124, 0.247, 0.576, 0.779, 0.946, 0.986, 0.996], atol=1e-3)
    np.testing.assert_allclose(computed / 6, known / 6, atol=0.02)
    one = world.references(0, 1.0, 40, sequences=512)
    assert one["bayes_accuracy"] > level["bayes_accuracy"] and one["no_context_loss"] < level["no_context_loss"]


def test_extra_targets_equal_a_slow_loop():
    world, seed, g = shapes(FEW, FACTORS[:2], code_width=5), torch.tensor([3, 8]), torch.Generator().manual_seed(0)
    batch = world.sample(seed, mappings([4.0, math.inf], "cpu"), sequence_numbers(seed, 0, 3), 4)
    sizes = [4, 3, 2, 2, 3]
    guess, which = torch.randn(2, 3, 4, sum(sizes), generator=g), torch.randn(2, 3, 4, 2, generator=g)
    got, asked, other = world.value_loss(guess, batch.values), world.asked_loss(which, batch), world.other_values(batch)
    nll = lambda z, t: float(np.log(np.exp(z.double().numpy()).sum()) - z[t].item())
    for r, b, n in itertools.product(range(2), range(3), range(4)):
        values = [v for v, size in zip(np.unravel_index(batch.item[r, b, n].item(), FEW), FEW) if size > 1]
        parts = guess[r, b, n].split(sizes)
        assert got[r, b, n].item() == pytest.approx(np.mean([nll(z, v) for z, v in zip(parts, values)]), abs=1e-5)
        assert asked[r, b, n].item() == pytest.approx(nll(which[r, b, n], batch.asked[r, b].item()), abs=1e-5)
    again = world.other_values(world.sample(seed, mappings([4.0, math.inf], "cpu"), sequence_numbers(seed, 0, 3), 4))
    assert torch.equal(other, again) and (other != batch.values).any(-1).float().mean() > 0.9  # fixed per image, and another image


def test_extra_targets_of_regression_equal_a_slow_loop():
    world, seed, g = Regression(4), torch.tensor([3, 8]), torch.Generator().manual_seed(0)
    dimension = [2, 4]
    batch = world.sample(seed, torch.tensor(dimension), sequence_numbers(seed, 0, 3), 5)
    guess = torch.randn(2, 3, 5, 4, generator=g)
    got, asked, other = world.value_loss(guess, batch.values), world.asked_loss(guess, batch), world.other_values(batch)
    for r, b, n in itertools.product(range(2), range(3), range(5)):
        d = dimension[r]
        squared = lambda target: ((guess[r, b, n, :d] - target[:d]) ** 2).mean().item()
        assert got[r, b, n].item() == pytest.approx(squared(batch.x[r, b, n]), abs=1e-5)
        assert asked[r, b, n].item() == pytest.approx(squared(batch.asked[r, b]), abs=1e-5)
        assert torch.equal(other[r, b, n], batch.x[r, b - 1, n])


def test_normal_numbers_are_normal():
    z = random_normal(torch.arange(3)[:, None], torch.arange(100_000)).double()
    for k, moment in enumerate([0, 1, 0, 3, 0, 15], 1):
        assert abs((z**k).mean() - moment) < 6 * (z**k).std() / z.numel() ** 0.5
    assert 4 < z.abs().max() < 6.7 and abs(np.corrcoef(z.numpy())[0, 1]) < 0.02


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
    small, large = GPT(Config(**Regression(3).inputs, **MODEL), [0]), GPT(Config(**Regression(7).inputs, **MODEL), [0])
    state = small.state_dict()
    state["read_in.weight"] = torch.cat([state["read_in.weight"], torch.randn(1, 4, 8)], 1)
    large.load_state_dict(state)
    torch.testing.assert_close(large(wide.x[:1, :9], wide.y[:1, :9]), small(narrow.x[:, :9], narrow.y[:, :9]))


MODEL = dict(n_pair=6, n_layer=2, n_head=2, d_model=8)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_regression_references_equal_numpy(noise):
    d, n, count = 3, 7, 40
    level = Regression(5, noise).references(4, d, n, sequences=count)
    batch = Regression(5, noise).sample(torch.tensor([4]), torch.tensor([d]), HELD_OUT + torch.arange(count)[None], n)
    x, y = batch.x[0, :, :, :d].double().numpy(), batch.y[0, :, :, 0].double().numpy()
    for k in range(n):
        error = dict(least_squares=[], bayes=[], ridge=[], nearest=[], averaging=[])
        for a, b in zip(x, y):
            past, value = a[:k], b[:k]
            solve = lambda penalty, past=past, value=value: np.linalg.inv(past.T @ past + penalty * np.eye(d)) @ past.T @ value
            w = np.linalg.lstsq(past, value, rcond=None)[0] if k else np.zeros(d)
            error["least_squares"].append((a[k] @ w - b[k]) ** 2)
            error["bayes"].append((a[k] @ (solve(noise**2) if noise else w) - b[k]) ** 2)
            error["ridge"].append((a[k] @ solve(1.0) - b[k]) ** 2)
            near = np.argsort(((past - a[k]) ** 2).sum(1))[:3]
            error["nearest"].append(((value[near].mean() if k else 0) - b[k]) ** 2)
            error["averaging"].append((a[k] @ (past.T @ value) / max(1, k) - b[k]) ** 2)
        for name, values in error.items():
            assert level[f"{name}_loss_by_position"][k] == pytest.approx(np.mean(values) / d, rel=1e-6, abs=1e-9), (name, k)
    assert level["no_context_loss"] == 1 + noise**2 / d
    exact = Regression(4).references(0, 4, 9, sequences=4000)["least_squares_loss_by_position"]
    np.testing.assert_allclose(exact, [max(0, 1 - k / 4) for k in range(9)], atol=0.08)  # the closed form without noise


def test_a_small_model_learns_regression_in_context_and_beats_averaging():
    world, seed, d = Regression(2), torch.tensor([3]), torch.tensor([2])
    model = GPT(Config(**world.inputs, n_pair=5, n_layer=2, n_head=2, d_model=32), [3])
    optimizer = Adam(model, 5e-3)
    for step in range(400):
        batch = world.sample(seed, d, sequence_numbers(seed, step, 64), 5)
        world.loss(model(batch.x, batch.y), batch).mean((1, 2)).sum().backward()
        optimizer.step()
    batch = world.sample(seed, d, HELD_OUT + torch.arange(512)[None], 5)  # the sequences of the reference levels
    loss, level = probes.evaluate(model, world, batch)[0][0, -1], world.references(3, 2, 5)
    assert level["least_squares_loss_by_position"][-1] < loss < 0.8 * level["averaging_loss_by_position"][-1]


def test_images_show_every_factor():
    masks = render()
    assert masks.shape == (480, 3, 16, 16) and masks.min() >= 0 and masks.max() <= 1
    base = np.array([1, 4, 7, 5, 0, 7])
    for f, size in enumerate(SIZES):
        values = np.repeat(base[None], size, 0)
        values[:, f] = np.arange(size)
        flat = image(values, masks).reshape(size, -1)
        apart = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 10 * np.eye(size)
        assert apart.min() > 0.3, FACTORS[f]
    world = shapes((2, 2, 2, 2, 2, 2), embedding="pixels")
    index = np.ravel_multi_index(world.full.numpy().T, SIZES)
    assert index[0] == 0 and index[-1] == np.ravel_multi_index((5, 5, 5, 7, 3, 14), SIZES) and (np.diff(index) > 0).all()


def test_code_is_entangled_by_its_gain():
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in FEW], indexing="ij"), -1).reshape(-1, 6)
    one_hot = np.concatenate([np.eye(n)[grid[:, f]] for f, n in enumerate(FEW)], 1)
    fit = lambda y: np.linalg.norm(y - one_hot @ np.linalg.lstsq(one_hot, y, rcond=None)[0]) / np.linalg.norm(y - y.mean(0))
    assert fit(code(grid, FEW, 16, 0.05)) < 0.01 < 0.2 < fit(code(grid, FEW, 16, 3.0))


def test_vae_latents_are_repeatable_and_tell_images_apart():
    world, masks = shapes((2, 2, 2, 1, 1, 1), embedding="pixels"), render()
    one, two = (vae(masks, world.full.numpy(), latent=8, steps=30) for _ in range(2))
    assert one.shape == (8, 8) and np.isfinite(one).all() and (one == two).all()
    assert np.linalg.norm(one[:, None] - one[None], axis=-1)[~np.eye(8, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize(
    "content, message",
    [
        ({"other": np.zeros((480_000, 1), np.float32)}, "repre"),
        ({"repre": np.zeros((10, 3), np.float32)}, "480000"),
        ({"repre": np.zeros((480_000, 1), np.int64)}, "floating"),
        ({"repre": np.full((480_000, 1), np.nan, np.float32)}, "finite"),
        (None, "not a readable"),
    ],
)
def test_a_wrong_embedding_file_is_named(tmp_path, content, message):
    path = tmp_path / "e.npz"
    np.savez(path, **content) if content else path.write_text("no archive")
    with pytest.raises(UsageError, match=f"--embedding .*{message}"):
        load_embedding(str(path))


def test_a_damaged_cache_is_named_and_one_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "vae", lambda masks, values: np.eye(len(values)))
    monkeypatch.setattr(tasks, "render", lambda: np.zeros(3))
    world = lambda folder: shapes((2, 2, 1, 1, 1, 1), embedding="vae", cache=folder)
    first = world(tmp_path / "cache").table
    assert torch.equal(world(tmp_path / "cache").table, first)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UsageError, match=f"--embedding vae: {kept} is damaged"):
        world(tmp_path / "cache")
    assert torch.equal(world(kept).table, first) and "cannot be written" in capsys.readouterr().out


def test_an_embedding_file_is_read_in_the_papers_order(tmp_path):
    np.savez(tmp_path / "e.npz", repre=np.arange(480_000, dtype=np.float32)[:, None])
    world = shapes((2, 1, 1, 1, 1, 3), embedding=str(tmp_path / "e.npz"))
    assert world.table[:, 0].tolist() == [0, 7, 14, 240_000, 240_007, 240_014]


# ---------------------------------------------------------------------------------------------- probes.py


def test_probes_score_chance_on_noise_and_one_on_one_hot():
    g = torch.Generator().manual_seed(0)
    target = torch.stack([torch.randint(s, (3000,), generator=g) for s in (4, 2)], -1)
    one_hot = torch.cat([F.one_hot(target[:, i], s).float() for i, s in enumerate((4, 2))], 1)
    both = torch.stack([torch.randn(3000, 6, generator=g), one_hot * 5])
    for probe in (probes.linear_probe, probes.converged_probe):
        noise, exact = probe(both[:, :2000], target[:2000], both[:, 2000:], target[2000:], [4, 2]).mean(1).tolist()
        assert abs(noise - 0.375) < 0.05 and exact == 1.0


def test_a_drowned_state_lowers_the_papers_probe_but_not_the_converged_one():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(4, (3000, 1), generator=g)
    clear = torch.cat([F.one_hot(target[:, 0], 4).float(), torch.randn(3000, 12, generator=g)], 1)
    loud = clear * torch.tensor([0.01] * 4 + [30.0] * 12)
    states = torch.stack([clear, loud])
    score = lambda probe: probe(states[:, :2000], target[:2000], states[:, 2000:], target[2000:], [4])[:, 0].tolist()
    trained, converged = score(probes.linear_probe), score(probes.converged_probe)
    assert trained[0] > 0.95 and trained[1] < 0.6 and min(converged) > 0.95


def test_regression_probes_score_the_normalised_error():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3000, 4, generator=g)
    x[..., 3] = 5  # constant, as padding is: not counted, though 782 steps cannot learn so large a bias
    seen = torch.cat([x[..., :2] * 2 + 1, torch.randn(1, 3000, 5, generator=g)], -1)  # two of three dimensions can be read
    for probe in (probes.linear_probe, probes.converged_probe):
        score = probe(seen[:, :2000], x[:, :2000], seen[:, 2000:], x[:, 2000:], None)
        assert score.shape == (1, 1) and abs(score.item() - 1 / 3) < 0.05


def test_plateau_length_on_made_curves():
    steps = [0, 10, 20, 30]
    assert probes.plateau_length(steps, [1.0, 0.9, 0.7, 0.9], 0.8) == 20
    assert probes.plateau_length(steps, [1.0, 0.9, 0.85, 0.8], 0.8) is None
    assert probes.plateau_length(steps, [1.0, None, None, None], 0.8) is None
    assert probes.plateau_length(steps, [0.5, 0.5, 0.5, 0.5], 0.8) == 0


def made_run(arm, seed, length, lr=1.0, change=0.1):
    return dict(arm=arm, difficulty=3, lr=lr, seed=seed, censored=length is None, plateau_length=length, steps=[0, 100], loss=[1.0, 0.5],
                no_context_loss=1.0, initial_weights_score=0.5, final_weights_score=0.5 + change)  # fmt: skip


def test_summary_pairs_by_seed_and_counts_censored_runs():
    runs = [made_run("baseline", s, v) for s, v in enumerate([40, None, 60])] + [
        made_run("new", s, v) for s, v in enumerate([10, 50, None])
    ]
    runs += [made_run("new", s, 90, lr=2.0) for s in range(3)] + [made_run("baseline", s, 30, lr=2.0) for s in range(3)]
    base, new, fast, fast_base = probes.summarise(runs)
    assert base["plateau_length_median"] == 60 and base["censored"] == 1 and base["paired_differences"] == []
    assert new["paired_differences"] == [-30, -50, 40] and new["plateau_lengths"] == [10, 50, None]
    assert [row["best_lr"] for row in (base, new, fast, fast_base)] == [False, True, False, True]
    assert new["paired_differences_best"] == [-20, 20, 70] and fast["paired_differences_best"] == []
    assert fast["paired_differences"] == [60, 60, 60] and fast["paired_differences_median"] == 60
    runs[3]["loss"] = [1.0, 0.4]
    said = "new, m = 3: leaves sooner than the baseline in 1 of 3 seeds, later in 2 (sign test p = 1), median +20 steps; " \
           "mean loss lower in 1 of 3, higher in 0 (p = 1), median +0"  # fmt: skip
    assert probes.verdicts({"summary": probes.summarise(runs), "args": {"lr": [1.0, 2.0]}}) == said
    assert probes.verdicts({"summary": probes.summarise(runs), "args": {"lr": [1.0]}}).startswith(f"{said}\nnote: one learning rate")
    stuck = {"summary": probes.summarise([made_run(arm, 0, None) for arm in ("baseline", "new")]), "args": {"lr": [1.0, 2.0]}}
    assert "note: no run left" in probes.verdicts(stuck)
    runs[3] |= {"final_weights_score": None, "loss": [1.0, None]}  # diverged: its place stays
    assert probes.summarise(runs)[1]["paired_mean_losses_best"] == [None, 0, 0]
    said = said.replace("in 1 of 3, higher", "in 0 of 2, higher") + "; 1 of the pairs diverged"
    assert probes.verdicts({"summary": probes.summarise(runs), "args": {"lr": [1.0, 2.0]}}) == said
    for name, part in {"aux10": "9 of 10 seeds, later in 0 (sign test p = 0.0039)", "linear_aux": "norm:0.01, d = 2: ",
                       "mixture_long": "50% easy, m = inf, 3 x 64: "}.items():  # fmt: skip
        assert part in probes.verdicts(dict_of(HERE / "assets" / f"{name}.json"))
    lines = probes.table({"summary": probes.summarise(runs), "args": {"lr": [1.0, 2.0]}}).splitlines()
    assert lines[0].endswith("| steps against the baseline, both at their best rate | both at 1; 2 |") and len(lines) == 4
    assert lines[3] == "| baseline | 2 | 30 30 30 | 30 | 3 of 3 | +0.100 +0.100 +0.100 |  |  |"
    assert lines[2] == "| new | 1 | 10 50 - | 50 | 2 of 3 | - +0.100 +0.100 | -20 +20 +70 (+20) | -30 -50 +40; +60 +60 +60 |"
    stayed = made_run("baseline", 2, None)  # and so did "new": no difference was measured
    lines = probes.table({"summary": probes.summarise([*runs[:2], stayed, *runs[3:]]), "args": {"lr": [1.0, 2.0]}}).splitlines()
    assert lines[2].endswith("| -30 -50 \u00b7; +60 +60 +60 |")


def test_mean_loss_is_the_area_under_the_curve_and_what_lies_above_the_level_counts_as_the_level():
    curve = dict(steps=[0, 10, 40], loss=[3.0, 1.0, 0.5], no_context_loss=2.0)
    assert probes.mean_loss(curve) == pytest.approx((10 * 0.75 + 30 * 0.375) / 40)
    assert probes.mean_loss(curve | {"loss": [2.0, None, None]}) is None


def test_sign_test_counts_every_outcome():
    for less, more in ((5, 0), (2, 7), (3, 3), (0, 0)):
        n = less + more
        ups = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        assert probes.sign_test(less, more) == sum(abs(2 * k - n) >= abs(less - more) for k in ups) / 2**n


def test_a_bold_curve_is_the_median_of_the_seeds_that_have_not_diverged():
    ax = plt.figure().gca()
    runs = [dict(steps=[0, 1], loss=loss) for loss in ([1.0, 0.5], [1.0, None], [3.0, 0.75])]
    probes.curves(ax, {"a": ("k", runs)}, "steps", lambda run: run["loss"])
    assert ax.lines[-1].get_ydata().tolist() == [1.0, 0.625]


def test_an_arm_without_a_key_that_another_has_is_named():
    runs = [dict(arm="baseline", difficulty=1, lr=1, seed=0, mine=0), dict(arm="new", difficulty=1, lr=1, seed=0)]
    with pytest.raises(UsageError, match="arm new has no mine"):
        probes.train_programs(None, runs, None)


def test_learning_rates_are_written_as_typed():
    assert [probes.rate(lr) for lr in (5e-4, 1.25e-4, 1e-3, 0.01, 1.0)] == ["5e-4", "1.25e-4", "1e-3", "0.01", "1"]


def test_rank_correlation():
    assert probes.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert probes.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert probes.rank_correlation([1, 1, 2], [5, 5, 5]) is None
    assert probes.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == 0.949  # ties averaged


# ---------------------------------------------------------------------------------------------- exp_nlp.py


def parse(words: list[str]) -> dict[str, str]:
    """The attributes of a sentence of the grammar, read from its words from left to right, with no help from the generator."""
    kind = {noun: name for name, nouns in exp_nlp.KINDS.items() for noun in nouns}
    kind |= {noun + "s": name for noun, name in kind.items()} | {"cactuses": "plant"}
    verbs = {**{v: "base" for v in exp_nlp.VERBS}, **{v + e: "third" for v in exp_nlp.VERBS for e in ("s", "es")}}
    verbs |= {v + e: "past" for v in exp_nlp.VERBS for e in ("d", "ed")}
    nouns = [i for i, word in enumerate(words) if word in kind]
    verb = next(i for i, word in enumerate(words) if word in verbs)
    auxiliary = next((i for i, word in enumerate(words[:verb]) if word in ("do", "does", "did", "will", "have", "has")), None)
    tense = {"do": "present", "does": "present", "did": "past", "will": "future", "have": "perfect", "has": "perfect"}
    plain = {"base": "present", "third": "present", "past": "past"}
    assert len(nouns) == 2 and nouns[0] < verb < nouns[1]
    return dict(
        subject=kind[words[nouns[0]]],
        object=kind[words[nouns[1]]],
        tense=tense[words[auxiliary]] if auxiliary is not None else plain[verbs[words[verb]]],
        number="one" if words[nouns[0]] in sum(exp_nlp.KINDS.values(), []) else "many",
        negation="yes" if {"not", "never"} & set(words) else "no",
        question="yes" if auxiliary is not None and auxiliary < nouns[0] else "no",
        sentiment=next(name for name, some in exp_nlp.ADJECTIVES.items() if set(some) & set(words)),
    )


def nlp_args(**changes):
    given = dict(conllu=None, tsv=None, text="grammar", ask=None, texts=20_000, words=11, vocabulary=1000, pairs=4)
    return type("Args", (), given | changes)


def test_grammar_attributes_equal_an_independent_parse():
    texts, attributes, _ = exp_nlp.grammar(3000)
    assert len(set(texts)) == 3000 and max(map(len, texts)) <= 11
    for i, words in enumerate(texts):
        assert parse(list(words)) == {name: column[i] for name, column in attributes.items()}, words


def test_grammar_hides_its_attributes_from_position_length_and_bags_of_words():
    world, g = exp_nlp.texts(nlp_args(), "cpu"), torch.Generator().manual_seed(0)
    one, two = (world.draw(count, held_out, g) for count, held_out in ((6000, False), (2000, True)))
    assert not set(map(tuple, world.table[world.train].tolist())) & set(map(tuple, world.table[world.test].tolist()))
    values, sizes = world.values, world.value_sizes
    read = lambda f: probes.converged_probe(f(one)[None], values[one], f(two)[None], values[two], sizes)[0]
    hot = lambda t, size: F.one_hot(t, size).float()
    position = torch.stack([read(lambda i, p=p: hot(world.table[i, p], world.n_word)) for p in range(world.table.shape[1] - 1)])
    length = read(lambda i: hot((world.table[i] > 0).sum(1), 20))
    assert position.max() < 0.85 and (length - 1 / torch.tensor(sizes)).max() < 0.15
    bag = exp_nlp.bag_of_words(world)
    assert max(bag["subject"], bag["object"], bag["question"]) < 0.75 and bag["tense"] > 0.95


CONLLU = """# newdoc id = a
# sent_id = mail-1
# text = He doesn't see cats.
1\tHe\the\tPRON\tPRP\tNumber=Sing\t4\tnsubj\t_\t_
2-3\tdoesn't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdoes\tdo\tAUX\tVBZ\tTense=Pres|VerbForm=Fin\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4\tsee\tsee\tVERB\tVB\tVerbForm=Inf\t0\troot\t_\t_
4.1\tghost\tghost\tNOUN\t_\t_\t_\t_\t_\t_
5\tcats\tcat\tNOUN\tNNS\tNumber=Plur\t4\tobj\t_\t_
6\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# newdoc id = b
# sent_id = blog-1
1\tLook\tlook\tVERB\tVB\tMood=Imp|VerbForm=Fin\t0\troot\t_\t_

"""


def made_conllu(path: Path, sentences: int = 600) -> Path:
    """Sentences of three to six words with a random tense, subject and genre, two to a document."""
    rng, text = np.random.default_rng(0), ""
    for i in range(sentences):
        tense, subject, genre = rng.choice(["Pres", "Past"]), rng.choice(["PRON", "NOUN"]), rng.choice(["mail", "blog"])
        noise = rng.choice([f"w{k}" for k in range(30)], rng.integers(1, 5))
        text += (
            f"# newdoc id = {i}\n" * (i % 2 == 0) + f"# sent_id = {genre}-{i}\n1\t{subject}\t_\t{subject}\t_\tNumber=Sing\t2\tnsubj\t_\t_\n"
        )
        text += f"2\t{tense}\t_\tVERB\t_\tTense={tense}|VerbForm=Fin\t0\troot\t_\t_\n"
        text += "".join(f"{3 + k}\t{word}\t_\tX\t_\t_\t2\tdep\t_\t_\n" for k, word in enumerate(noise)) + "\n"
    path.write_text(text)
    return path


def test_conllu_is_read_as_the_format_says(tmp_path):
    (tmp_path / "a.conllu").write_text(CONLLU)
    words, attributes, documents = exp_nlp.conllu([str(tmp_path / "a.conllu")], 5)
    assert words == [["he", "does", "n't", "see", "cats", "."], ["look"]] and attributes["length"] == ["long", "short"]
    assert {name: column for name, column in attributes.items() if name != "length"} == dict(
        verb=["Pres", "Imp"],
        subject=["PRON", "none"],
        number=["Sing", "none"],
        end=[".", "none"],
        genre=["mail", "blog"],
        root=["VERB"] * 2,
    )
    (tmp_path / "b.conllu").write_text(CONLLU.split("# newdoc id = b")[1] * 120)  # no documents: every 50 sentences
    assert len(set(exp_nlp.conllu([str(tmp_path / "b.conllu")], 5)[2])) == 3
    (tmp_path / "c.conllu").write_text(CONLLU * 15)
    documents = exp_nlp.conllu([str(tmp_path / "c.conllu")], 5)[2]
    assert len(set(documents)) == 30 and documents[0] != documents[1]


def made_tsv(path: Path, texts: int = 400) -> Path:
    rng = np.random.default_rng(0)
    colour, size = rng.choice(["red", "green", "blue"], texts, p=[0.6, 0.3, 0.1]), rng.choice(["big", "small"], texts)
    noise = lambda: " ".join(rng.choice(["a", "b", "c", "d", "e", "f"], 4))
    path.write_text("text\tcolour\tsize\tconstant\n" + "".join(f"{noise()} {c} {s}\t{c}\t{s}\tx\n" for c, s in zip(colour, size)))
    return path


def test_texts_are_split_by_document_and_values_are_balanced(tmp_path, capsys, monkeypatch):
    world = exp_nlp.texts(nlp_args(tsv=str(made_tsv(tmp_path / "t.tsv"))), "cpu")
    assert world.names == ("colour", "size") and "constant: left out, one value" in capsys.readouterr().out
    for part in (world.train, world.test):
        for f, size in enumerate(world.sizes):
            share = torch.zeros(size, dtype=torch.float64).index_add_(0, world.values[part, f], world.weight[part])
            torch.testing.assert_close(share, torch.full((size,), 1 / size, dtype=torch.float64), atol=1e-6, rtol=0)
    seed = torch.tensor([0])
    batch = world.sample(seed, mappings([math.inf], "cpu"), torch.arange(2000)[None], 4)
    assert (torch.bincount(batch.values[..., 0].flatten(), minlength=3) / 8000 - 1 / 3).abs().max() < 0.03
    assert set(batch.item.flatten().tolist()) <= set(world.train.tolist())
    assert (world.table[:, -1] == exp_nlp.STOP).all() and world.table.max() < world.n_word
    # a copy of an attribute is left out, and so are held-out texts that the model cannot tell from training texts
    path = made_tsv(tmp_path / "twice.tsv")
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("\n".join("\t".join([*row, f"again {row[1]}"]) for row in rows) + "\n \tred\tbig\tx\ty\n")
    world = exp_nlp.texts(nlp_args(tsv=str(path), vocabulary=6), "cpu")
    assert world.names == ("colour", "size") and "it tells too much about colour" in capsys.readouterr().out
    assert len(world.test) < 80 and not set(map(tuple, world.table[world.train].tolist())) & set(
        map(tuple, world.table[world.test].tolist())
    )
    # documents stay whole: sentences of one document are all in training or all held out
    words, documents = [[str(i % 7), str(i)] for i in range(300)], [i // 3 for i in range(300)]
    made = (words, {"a": [str(i % 2) for i in range(300)]}, documents)
    monkeypatch.setattr(exp_nlp, "grammar", lambda count: made)
    one, two = (
        world.table[part, 1].tolist() for world in [exp_nlp.texts(nlp_args(ask=["a"]), "cpu")] for part in (world.train, world.test)
    )
    assert len(one) == 240 and len(two) > 0 and set(two) == {exp_nlp.UNKNOWN}


def test_word_selection_labels_the_word_of_the_asked_category():
    world, seed = exp_nlp.wordselect("cpu", 500, 6), torch.tensor([3])
    batch = world.sample(seed, mappings([1.0], "cpu"), torch.arange(200)[None], 6)
    for b, i in itertools.product(range(200), range(6)):
        label, listed = batch.label[0, b, i].item(), batch.x[0, b, i, :-1].tolist()
        assert label // 12 == batch.asked[0, b] and label + exp_nlp.FIRST in listed
        assert sorted((word - exp_nlp.FIRST) // 12 for word in listed) == [0, 1, 2, 3, 4]
    level = world.references(3, 1.0, 6)
    assert level["no_context_loss"] == pytest.approx(math.log(5)) and level["bayes_accuracy"] == pytest.approx((0.2 + 5) / 6)


# ---------------------------------------------------------------------------------------------- the scripts

TRAIN = "--steps 12 --batch 4 --n-layer 2 --n-head 2 --d-model 16 --seeds 2 --lr 2e-3 --evaluations 4 --probes 2 " \
        "--no-compile --precision fp32 --device cpu"  # fmt: skip
SMALL = f"{TRAIN} --pairs 4 --factors 3 3 2 2 1 1 --ask floor_hue wall_hue --code-width 8 --sequences 0"
FEW_MEASURES = "--evaluations 2 --probes 1"


def own(script: str, flags: str = "") -> str:
    """What a script's defaults are too large for at 12 steps."""
    texts = "" if "--conllu" in flags or "--tsv" in flags else " --texts 1500"
    return {
        "exp_warmup.py": "--switch 0 5",
        "exp_mixture.py": "--fraction 0 0.5",
        "exp_nlp.py": "--switch 5" * ("warmup" in flags) + texts,
    }.get(script, "")


def run(command: str, expect: int = 0, fresh=False, exact=False, figure=False) -> subprocess.CompletedProcess:
    """A command line, in a fresh process or, saving the import of torch, in this one; there with small probes unless exact,
    and without a figure unless it is asked for."""
    words = shlex.split(command)
    if fresh:
        done = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True)
    else:
        out, error, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
            patch.chdir(HERE)
            patch.setattr(sys, "argv", words)
            if not exact:
                patch.setattr(probes.Prober.__init__, "__defaults__", (256, 64))  # items, sequences
                patch.setattr(probes, "PROBE_STEPS", 40)
            script = importlib.import_module(words[0][:-3])
            if not figure:
                patch.setattr(script, "plot", lambda metrics, path: None, raising=False)
            try:
                script.main()
            except SystemExit as stop:
                code = stop.code
        done = subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def beside(command: str, expect: int = 0):
    """The same in a fresh process, beside what this one does meanwhile: call .result() of what comes back."""
    return ThreadPoolExecutor(1).submit(run, command, expect, fresh=True)


def science(folder: Path) -> dict:
    """metrics.json without what may differ between two equal runs; every key is explained in the README."""
    metrics = json.loads((folder / "metrics.json").read_text())
    explained = lambda key: f"`{key}`" in README or f"`{re.sub('_(by_position|median)$', '', key)}" in README
    parts = (metrics, *metrics["runs"], *metrics["summary"], *metrics["reference"].values())
    assert not {key for part in parts for key in part if not explained(key)}
    return {key: value for key, value in metrics.items() if key not in ("environment", "args")}


def test_exp_plateau_end_to_end_and_resume_equals_unbroken(tmp_path, monkeypatch):
    flags = f"exp_plateau.py {SMALL} --difficulty 2 inf --lr 1e-3 1e-2"
    done = beside(f"{flags} --out {tmp_path}/a")
    run(f"{flags} --out {tmp_path}/b --max-minutes 0", exact=True)
    assert not science(tmp_path / "b")["finished"]
    run(f"{flags} --out {tmp_path}/b --resume", exact=True)
    assert "12 100% |" in done.result().stdout
    whole = science(tmp_path / "a")
    assert len(whole["runs"]) == 8 and whole["finished"] and {r["difficulty"] for r in whole["runs"]} == {2, "inf"}
    one = whole["runs"][0]
    assert len(one["steps"]) == len(one["loss"]) == 5 and len(one["weights_score"]) == len(one["probe_steps"]) == 3
    assert one["loss"][-1] != one["loss"][0] and len(one["spread"][0]) == 2 and set(whole["reference"]) == {"2", "inf"}
    assert science(tmp_path / "b") == whole
    (tmp_path / "a" / "figure.png").unlink()
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(json.loads((tmp_path / "a" / "metrics.json").read_text()) | {"summary": []}))
    run(f"exp_plateau.py --replot --out {tmp_path}/a", figure=True)  # an older summary is no hindrance: it is made of the runs again
    assert (tmp_path / "a" / "figure.png").stat().st_size > 20_000
    with monkeypatch.context() as patch:  # the reader renames an arm, or changes something else, half-way
        plain = exp_plateau.runs_of
        patch.setattr(exp_plateau, "runs_of", lambda args: [run | {"arm": "mine"} for run in plain(args)])
        assert "other runs" in run(f"{flags} --out {tmp_path}/b --resume", expect=2).stderr
        patch.setattr(exp_plateau, "runs_of", plain)
        patch.setattr(probes, "script_hash", lambda: "other")
        assert "the script has changed" in run(f"{flags} --out {tmp_path}/b --resume", exact=True).stdout
        patch.setattr(exp_plateau, "runs_of", lambda args: plain(args) * 2)
        assert "name of its own" in run(f"{flags} --out {tmp_path}/c", expect=2).stderr
    wrong = run(f"{flags} --out {tmp_path}/b --resume --batch 5", expect=2)
    assert "--batch" in wrong.stderr and science(tmp_path / "b") == whole
    other = run(f"exp_warmup.py {SMALL} --switch 0 5 --difficulty 2 inf --lr 1e-3 1e-2 --out {tmp_path}/b --resume", expect=2)
    assert "exp_plateau.py" in other.stderr and science(tmp_path / "b") == whole
    assert "--replot" in run(f"exp_warmup.py --replot --out {tmp_path}/b", expect=2).stderr


def test_splitting_the_runs_over_programs_or_processes_changes_nothing(tmp_path):
    flags = f"exp_plateau.py {SMALL} --difficulty 2 inf {FEW_MEASURES}"
    two = beside(f"-m torch.distributed.run --nproc_per_node=2 {flags} --out {tmp_path}/two")
    run(f"{flags} --out {tmp_path}/one", exact=True)
    run(f"{flags} --out {tmp_path}/split --runs-per-program 3", exact=True)
    assert science(tmp_path / "split") == science(tmp_path / "one")
    assert two.result().stdout.count("12 100% |") == 1
    assert science(tmp_path / "two") == science(tmp_path / "one")
    # one process finds no checkpoint: the job ends, says why, and the other's checkpoint stays
    (tmp_path / "two" / "checkpoint-1-0.pt").unlink()
    broken = beside(f"-m torch.distributed.run --nproc_per_node=2 {flags} --out {tmp_path}/two --resume", expect=1)
    linear = f"exp_plateau.py {TRAIN} --task linear --difficulty 2 3"
    run(f"{linear} --out {tmp_path}/linear")
    run(f"{linear} --out {tmp_path}/linear-split --runs-per-program 3")
    assert science(tmp_path / "linear-split") == science(tmp_path / "linear")
    assert "--resume: no checkpoint at" in broken.result().stderr and (tmp_path / "two" / "checkpoint-0-0.pt").exists()


def test_a_run_that_diverges_is_null_and_spares_the_others(tmp_path):
    done = run(f"exp_plateau.py {SMALL} --difficulty inf --lr 1e-3 1e30 --out {tmp_path}/both")
    assert "warning: non-finite loss" in done.stdout
    run(f"exp_plateau.py {SMALL} --difficulty inf --lr 1e-3 --out {tmp_path}/alone")
    both, alone = science(tmp_path / "both")["runs"], science(tmp_path / "alone")["runs"]
    assert both[:2] == alone  # bit for bit, every curve and every score
    for diverged in both[2:]:
        assert diverged["diverged"] and diverged["censored"] and diverged["loss"][0] is not None and diverged["loss"][-1] is None
        assert diverged["final_weights_score"] is None and diverged["accuracy"][-1] is None
    for script in ("exp_plateau.py", "exp_aux_loss.py"):  # nothing but a diverged run: there is a figure all the same
        run(f"{script} {TRAIN} --task linear --difficulty 2 --pairs 3 --lr 1e30 --out {tmp_path / script}", figure=True)


KILLED = """
import os, random, signal, sys, time
import torch._dynamo
import exp_plateau, probes
exp_plateau.plot = lambda metrics, path: None
probes.SAVE_SECONDS = 0  # a checkpoint at every step, so that many kills fall into its writing
probes.Prober.__init__.__defaults__, probes.PROBE_STEPS = (256, 64), 40  # as run()
random.seed(0)
folder, kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def start(folder, more):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [*flags, "--out", folder, more]
        exp_plateau.main()
        os._exit(0)
    return child

began = time.time()
os.waitpid(start(folder + "-timed", "--overwrite"), 0)
whole, ended, resumed = time.time() - began, 0, 0
begun = lambda: any(name.startswith("checkpoint") for name in os.listdir(folder))
for i in range(kills + 1):
    resumed += begun()
    child = start(folder, "--resume" if begun() else "--overwrite")
    if i < kills:
        while not begun() and time.time() < began + 100:
            time.sleep(0.01)
        time.sleep(whole * random.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
    ended += os.waitpid(child, 0)[1] != 0
print(ended, resumed)
"""


def test_killed_at_any_moment_a_training_resumes_to_the_same_numbers(tmp_path):
    """Twenty kills were tried by hand; the last start is left alone."""
    flags = f"exp_plateau.py {SMALL} --evaluations 12 --difficulty inf"
    run(f"{flags} --out {tmp_path}/whole")
    (tmp_path / "killed").mkdir()
    words = [sys.executable, "-c", KILLED, f"{tmp_path}/killed", "4", *shlex.split(flags)]
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended, resumed = map(int, done.stdout.split())
    assert ended >= 2 and resumed >= 2
    assert science(tmp_path / "killed") == science(tmp_path / "whole")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on_and_twice_stops_at_once(tmp_path, monkeypatch):
    flags = f"exp_plateau.py {SMALL} --difficulty inf"
    run(f"{flags} --out {tmp_path}/whole")
    adam_step = Adam.step
    finished = "stopped at step 5: the same command with --resume goes on"
    for name, signals, status, message in (
        ("once", [signal.SIGINT], 130, finished),
        ("twice", [signal.SIGINT] * 2, 130, "exp_plateau.py: interrupted"),  # at once: what the last checkpoint holds is kept
        ("term", [signal.SIGTERM], 143, finished),
    ):
        steps = itertools.count(1)

        def step(self, steps=steps, signals=signals):
            if next(steps) == 5:
                for number in signals:
                    os.kill(os.getpid(), number)
            adam_step(self)

        monkeypatch.setattr(Adam, "step", step)
        said = run(f"{flags} --out {tmp_path}/{name}", expect=status).stderr
        assert message in said.splitlines() and next(steps) == 6
        run(f"{flags} --out {tmp_path}/{name} --resume")
        assert science(tmp_path / name) == science(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    flags = f"exp_plateau.py {SMALL.replace('--no-compile', '')} --difficulty inf"
    monkeypatch.setattr("shutil.which", lambda name: name)  # so a machine without a compiler is tested as well

    def broken(*_):
        raise RuntimeError("no such instruction\nand so on")

    with monkeypatch.context() as patch:
        patch.setattr(Block, "compile", lambda block: torch.nn.Module.compile(block, backend=broken))
        said = run(f"{flags} --out {tmp_path}/a", expect=2).stderr.splitlines()
    assert len(said) == 1 and "torch.compile failed" in said[0] and "--no-compile" in said[0]
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")  # cannot be made
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    said = run(f"{flags} --out {tmp_path}/b", expect=2).stderr.splitlines()
    assert len(said) == 1 and folder in said[0]
    assert not [*tmp_path.glob("*/metrics.json")]


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path):
    flags = f"exp_plateau.py {SMALL} --difficulty inf --out {tmp_path}"
    run(f"{flags} --max-minutes 0")
    path = tmp_path / "checkpoint.pt"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    damaged = {"empty": b"", "torn": whole[: len(whole) // 2], "scrap": whole[: len(whole) // 4], "text": b"no checkpoint"}
    parts = {"foreign": {"model": 1}, "a list": [1, 2], "half": state | {"record": {}}, "other": state | {"model": {}}, "code": Path()}
    for name, content in parts.items():
        torch.save(content, tmp_path / "x")
        damaged[name] = (tmp_path / "x").read_bytes()
    for name, content in damaged.items():
        path.write_bytes(content)
        said = run(f"{flags} --resume", expect=2).stderr.splitlines()
        assert len(said) == 1 and "checkpoint.pt is damaged" in said[0], name
        assert path.read_bytes() == content and "of an earlier training is there" in run(flags, expect=2).stderr  # nor is it overwritten
    path.write_bytes(whole)
    run(f"{flags} --resume")


def test_a_result_is_overwritten_on_demand_only_and_the_same_command_gives_the_same_bytes(tmp_path):
    flags = f"exp_plateau.py {SMALL} --difficulty 2 inf --out {tmp_path}"
    (tmp_path / "figure.png").touch()  # the user's own
    assert "figure.png" in run(flags, expect=2).stderr
    (tmp_path / "figure.png").unlink()
    (tmp_path / "checkpoint_mine.pt").touch()  # as well, and no hindrance
    run(flags)
    first = (tmp_path / "metrics.json").read_text()
    assert "--overwrite" in run(flags, expect=2).stderr
    assert "--overwrite" in run(f"{flags} --resume --overwrite", expect=2).stderr
    assert (tmp_path / "metrics.json").read_text() == first
    run(f"{flags} --overwrite")
    again = (tmp_path / "metrics.json").read_text()
    without = lambda text: re.sub(r'"overwrite": (true|false)|"environment": {[^}]*}', "", text)
    assert without(again) == without(first) != first and (tmp_path / "checkpoint_mine.pt").exists()
    start = '{"script": "exp_plateau.py", "finished": true'
    empty = start + ', "args": {"lr": [1]}, "reference": {"2": 1}, "runs": [{}], "summary": [{}]}'
    for text in ("", "[]", start + "}", first.replace('"runs"', '"ruins"'), empty, re.sub(r'"args": {[^}]*}', '"args": [1]', first)):
        (tmp_path / "metrics.json").write_text(text)
        said = run(f"exp_plateau.py --replot --out {tmp_path}", expect=2, figure=True).stderr.splitlines()
        assert len(said) == 1 and "--replot" in said[0]
    assert "plot has a mistake (" in said[0] and re.search(r"\.py line \d+\)$", said[0])


def test_full_disk_and_full_memory_are_one_line(tmp_path, monkeypatch):
    flags = f"exp_plateau.py {SMALL} --difficulty inf --out {tmp_path}"
    run(f"{flags} --max-minutes 0")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def failing(error):
        def fail(*_, **__):
            raise error

        return fail

    def half(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nand so on")

    for save, reason in (
        (half, "failed writing file)"),
        (failing(OSError(28, "No space left on device", "memory/CUDA.pt")), "No space left"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save)
            said = run(f"{flags} --resume", expect=2).stderr.splitlines()
        assert len(said) == 1 and "--out" in said[0] and reason in said[0]
        assert (tmp_path / "checkpoint.pt").read_bytes() == before and not [*tmp_path.glob(".*")]
    monkeypatch.setattr(GPT, "forward", failing(torch.OutOfMemoryError("CUDA out of memory")))
    said = run(f"{flags} --overwrite", expect=2).stderr.splitlines()
    assert len(said) == 1 and "--runs-per-program" in said[0]


def weights_of(folder: Path, checkpoint: str = "checkpoint.pt") -> dict:
    return torch.load(folder / checkpoint, weights_only=True)["model"]


def test_before_its_switch_a_warm_up_run_is_the_easy_run_and_after_it_is_not(tmp_path):
    run(f"exp_plateau.py {SMALL} --difficulty 1 --max-minutes 0 --out {tmp_path}/easy")  # stops at step 3
    flags = f"exp_warmup.py {SMALL} --difficulty inf --switch 0 3 5 --keep all early late --out {tmp_path}/warm"
    run(f"{flags} --max-minutes 0", fresh=True)
    easy, warm = weights_of(tmp_path / "easy"), weights_of(tmp_path / "warm")
    assert all(torch.equal(warm[key][run : run + 2], easy[key]) for key in easy for run in range(2, 14, 2))
    assert not torch.equal(warm["read_out.weight"][:2], easy["read_out.weight"])  # the baseline
    run(f"{flags} --resume")
    metrics = science(tmp_path / "warm")
    arms = [row["arm"] for row in metrics["summary"]]
    assert arms[:3] == ["baseline", "switch 3", "switch 5"] and "switch 5, keep late" in arms and len(arms) == 7
    last = {row["arm"]: row["loss"][-1] for row in metrics["runs"]}
    assert len(set(last.values())) == 7  # every arm went its own way
    assert all(len(row["paired_differences"]) == 2 for row in metrics["summary"] if row["arm"] != "baseline")
    # the same by hand: steps 0, 1, 2 easy, from step 3 on the target
    world, seed = shapes((3, 3, 2, 2, 1, 1), FACTORS[:2], code_width=8, code_gain=2.5), torch.tensor([0, 1])
    model = GPT(Config(d_x=8, d_y=3, n_pair=4, n_layer=2, n_head=2, d_model=16), [0, 1])
    optimizer = Adam(model, 2e-3)
    for step in range(12):
        batch = world.sample(seed, mappings([1.0 if step < 3 else math.inf] * 2, "cpu"), sequence_numbers(seed, step, 4), 4)
        world.loss(model(batch.x, batch.y), batch).mean((1, 2)).sum().backward()
        optimizer.step()
    assert torch.equal(model.read_out.weight.detach(), weights_of(tmp_path / "warm")["read_out.weight"][2:4])


def test_reset_keeps_the_stated_part():
    model = GPT(Config(**TINY), [0, 1, 2])
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Adam(disturbed(model), 1e-3)
    for moment in (*optimizer.mean, *optimizer.square, *optimizer.count):
        moment += 1
    warm = {name: p.detach().clone() for name, p in model.named_parameters()}
    exp_warmup.reset(model, optimizer, initial, [1, 2], ["early", "early", "late"], last_early=0)
    for (name, p), *moments in zip(model.named_parameters(), optimizer.mean, optimizer.square, optimizer.count):
        early = name.startswith(("read_in", "position", "blocks.0"))
        assert torch.equal(p[0], warm[name][0])
        assert torch.equal(p[1], (warm if early else initial)[name][1]) and torch.equal(p[2], (initial if early else warm)[name][2])
        assert all(moment[1].max() == (1 if early else 0) and moment[0].min() == 1 for moment in moments)


def test_arms_that_do_nothing_are_the_baseline_bit_for_bit(tmp_path):
    flags = f"exp_mixture.py {SMALL} --difficulty inf --fraction 0 0.5 1 --mix easy unrelated {FEW_MEASURES} --out {tmp_path}/mixture"
    done = beside(flags)
    run(f"exp_plateau.py {SMALL} --difficulty 1 inf --out {tmp_path}/plain")
    arms = "none weights:0 weights context shuffled norm decay clip:0.01 epsilon weights+norm"
    run(f"exp_aux_loss.py {SMALL} --difficulty inf --loss {arms} {FEW_MEASURES} --out {tmp_path}/aux")
    done.result()
    easy, hard = weights_of(tmp_path / "plain")["read_out.weight"].split(2)
    mixture = weights_of(tmp_path / "mixture", "checkpoint.pt")["read_out.weight"].split(2)
    names = [row["arm"] for row in science(tmp_path / "mixture")["summary"]]
    assert names == ["baseline", "50% easy", "100% easy", "50% unrelated", "100% unrelated"]
    assert torch.equal(mixture[0], hard) and torch.equal(mixture[2], easy)
    assert not any(torch.equal(a, b) for i, a in enumerate(mixture) for b in mixture[:i])
    aux = weights_of(tmp_path / "aux")["read_out.weight"].split(2)
    assert torch.equal(aux[0], hard) and torch.equal(aux[1], hard)
    assert not any(torch.equal(a, b) for i, a in enumerate(aux[1:]) for b in aux[1 : i + 1])
    summary = science(tmp_path / "aux")["summary"]
    assert [row["arm"] for row in summary][-1] == "weights:0.1+norm:0.01" and summary[1]["paired_differences"] == [0, 0]


def test_a_mixed_batch_holds_exactly_the_stated_fraction():
    assert exp_mixture.easy_rows([0.0, 0.25, 0.5, 1.0], 48).sum(1).tolist() == [0, 12, 24, 48]


def test_several_sizes_make_several_programs(tmp_path):
    flags = f"exp_mixture.py {SMALL} --difficulty inf --fraction 0 0.5 --n-layer 8 1 --out {tmp_path}"
    run(flags)
    whole = science(tmp_path)
    assert len(whole["runs"]) == 8 and {row["size"] for row in whole["summary"]} == {"8 x 16", "1 x 16"}
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "checkpoint-0-1.pt").unlink()
    run(f"{flags} --resume")
    assert science(tmp_path) == whole
    done = run(f"{flags} --max-minutes 0 --overwrite")  # stops in the first size
    assert len(science(tmp_path)["runs"]) == 4 and not science(tmp_path)["finished"] and "--resume" in done.stdout
    assert "--resume" in run(f"exp_mixture.py --replot --out {tmp_path}", expect=2).stderr
    assert not (tmp_path / "checkpoint-0-1.pt").exists()  # of the earlier command: may not be taken for this one's


@pytest.mark.parametrize("script, arms", [("exp_plateau.py", 1), ("exp_aux_loss.py", 3)])
def test_linear_regression_end_to_end(script, arms, tmp_path):
    run(f"{script} {TRAIN} --task linear --noise 0.5 --difficulty 2 3 --out {tmp_path}", figure=True)
    metrics = science(tmp_path)
    assert len(metrics["runs"]) == 2 * 2 * arms and (tmp_path / "figure.png").exists()
    one = metrics["runs"][0]
    assert "accuracy" not in one and len(one["loss_by_position"]) == 7
    least = Regression(3, 0.5).references(0, 2, 7, sequences=64)["least_squares_loss_by_position"][-1]  # the very held-out sequences
    assert one["gap_to_least_squares"] == pytest.approx(one["loss_by_position"][-1] - least, abs=2e-6)
    assert metrics["weights_score_is"].startswith("normalised error") and len(one["weights_score"][0]) == 2
    assert len({tuple(run["loss"]) for run in metrics["runs"]}) == len(metrics["runs"])  # every run went its own way


def test_exp_nlp_end_to_end(tmp_path):
    made_conllu(tmp_path / "made.conllu")
    every = f"--arm {' '.join(exp_nlp.ARMS)}"
    sources = {"grammar": every, "wordselect": "--text wordselect", "tsv": f"{every} --tsv {made_tsv(tmp_path / 'made.tsv')}"}
    command = lambda name: (
        f"exp_nlp.py {TRAIN} {FEW_MEASURES} --pairs 4 {own('exp_nlp.py', sources[name])} {sources[name]} --out {tmp_path}/{name}"
    )
    done = beside(command("tsv"))
    for name in ("grammar", "wordselect"):
        run(command(name), figure=True)
    done.result()
    for name in sources:
        metrics = science(tmp_path / name)
        assert (tmp_path / name / "figure.png").exists() and len(metrics["runs"]) == (8 if name == "wordselect" else 12)
        assert len({tuple(run["loss"]) for run in metrics["runs"]}) == len(metrics["runs"])
        assert set(metrics["bag_of_words"]) == set(metrics["attributes"])
    plain = f"exp_nlp.py {TRAIN} --pairs 4 --conllu {tmp_path}/made.conllu"
    run(f"{plain} --arm baseline mixture weights --weight 0 --fraction 0 --out {tmp_path}/conllu")
    base, mixture, weights = weights_of(tmp_path / "conllu")["read_out.weight"].split(2)
    assert torch.equal(base, mixture) and torch.equal(base, weights)  # nothing mixed in and weight 0 are the baseline bit for bit


@pytest.mark.parametrize("command", [
    f"exp_plateau.py {SMALL}", f"exp_plateau.py {TRAIN} --pairs 9 --task linear --difficulty 2 4 --noise 0.1",
    f"exp_warmup.py {SMALL} --switch 0 5 --keep all early late", f"exp_mixture.py {SMALL} --fraction 0 0.5 --mix easy unrelated",
    f"exp_aux_loss.py {SMALL} --sequences 64 --loss none weights context shuffled norm decay clip epsilon",
    f"exp_aux_loss.py {TRAIN} --pairs 9 --task linear --difficulty 2 4",
    f"exp_nlp.py {TRAIN} --pairs 4 --texts 1500 --switch 5 --arm {' '.join(exp_nlp.ARMS)}",
    f"exp_nlp.py {TRAIN} --pairs 4 --texts 1500 --text wordselect",
])  # fmt: skip
@pytest.mark.parametrize("device", ["meta", *["cuda"] * torch.cuda.is_available()])
def test_a_training_step_never_asks_its_device_for_a_number(device, command, tmp_path, monkeypatch):
    """On torch's meta device tensors have no values and mix with no others: what a step would fetch from a GPU, and wait for, or
    leave on the CPU, is an error here. A GPU itself is told to refuse."""
    training, refuse = False, torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None

    def value_of(real, made_up):
        def asked(tensor, *rest):
            assert not (training and tensor.is_meta), "a training step asks for a number"
            return made_up(tensor) if tensor.is_meta else real(tensor, *rest)

        return asked

    def steps(record):
        nonlocal training
        for step in range(7):
            training = True
            refuse("error")
            try:
                yield step
            finally:
                refuse("default")
            training = False

    ones = lambda t: torch.ones(t.shape, dtype=t.dtype)
    for name, made_up in dict(item=lambda t: 1, tolist=lambda t: ones(t).tolist(), cpu=ones, __bool__=lambda t: True).items():
        monkeypatch.setattr(torch.Tensor, name, value_of(getattr(torch.Tensor, name), made_up))
    monkeypatch.setattr(probes.Record, "training_steps", steps)
    monkeypatch.setattr(probes.Record, "metrics", lambda record, device: {"runs": []})
    monkeypatch.setattr(probes, "PROBE_STEPS", 2)
    monkeypatch.setattr(sys, "argv", shlex.split(f"{command} --out {tmp_path}"))
    script = importlib.import_module(command.split(".")[0])
    monkeypatch.setattr(script, "pick_device", lambda *_: (torch.device(device), "fp32"))
    args = script.arguments()
    script.train(args, script.runs_of(args), "checkpoint.pt")


COMMON = [
    ("--difficulty 0", "--difficulty"),
    ("--difficulty 1.5", "--difficulty"),
    ("--factors 4 4 4 4 5 1", "--factors"),
    ("--ask orientation", "--ask"),
    ("--embedding pixels", "--code-width"),
    ("--n-head 3", "--n-head"),
    ("--seeds 0", "--seeds"),
    ("--device cuda:77", "--device"),
    ("--device meta", "--device"),
    ("--lr nan", "--lr"),
    ("--lr 0", "--lr"),
    ("--sequences 3", "--sequences"),
    ("--ask floor_hue --difficulty 1", "--ask"),
    ("--factors 2 1 1 1 1 1 --ask floor_hue", "--factors"),
    ("--resume", "--resume"),
    ("--replot", "--replot"),
    ("--no-such-flag", "--no-such-flag"),
    ("--out requirements.txt/x", "--out"),
    ("--out ''", "--out"),
    ("--seed 2", "--seed"),
    ("--max-minutes nan", "--max-minutes"),
    ("--lr", "--lr"),
    ("--steps 1e3", "--steps"),
    ("--factors 4 4", "--factors"),
    ("--code-gain inf", "--code-gain"),
    ("--precision fp8", "--precision"),
]
OWN = [
    ("exp_warmup.py", "--switch 0 -1", "--switch -1"),
    ("exp_warmup.py", "--switch 12", "--switch 12"),
    ("exp_warmup.py", "--difficulty 10 --warmup-difficulty 10", "--warmup-difficulty"),
    ("exp_mixture.py", "--fraction 1.5", "--fraction"),
    ("exp_mixture.py", "--fraction 0.3", "--fraction"),
    ("exp_mixture.py", "--difficulty 10 --easy-difficulty inf", "--easy-difficulty"),
    ("exp_aux_loss.py", "--weight -1", "--weight"),
    ("exp_aux_loss.py", "--weight inf", "--weight"),
    ("exp_aux_loss.py", "--loss weights:-1", "--loss"),
    ("exp_aux_loss.py", "--loss epsilon:0", "--loss"),
    ("exp_aux_loss.py", "--loss weights:1e9", "--loss"),
    ("exp_aux_loss.py", "--loss none:5", "--loss"),
    ("exp_aux_loss.py", "--loss magic", "--loss"),
    ("exp_aux_loss.py", "--loss weights:0.1+weights:1", "--loss"),
]
OWN += [(script, "--seeds 0", "--seeds") for script in ("exp_warmup.py", "exp_mixture.py", "exp_aux_loss.py")]
FILES = {
    "short.conllu": "1\tHe\the\n",
    "empty.conllu": "",
    "one.conllu": CONLLU.split("# newdoc id = b")[1] * 40,
    "latin.conllu": b"1\t\xe9",
    "notext.tsv": "a\tb\n1\t2\n",
    "ragged.tsv": "text\ta\nx y\n",
    "empty.tsv": "",
    "bare.tsv": "text\ta\n",
    "few.tsv": "text\ta\nx y\t1\nx z\t2\nu v\t1\nu w\t2\n",
}
TEXT = [
    (f"--conllu {{}}/{name}" if name.endswith("u") else f"--tsv {{}}/{name}", "--conllu" if name.endswith("u") else "--tsv")
    for name in FILES
]
TEXT += [
    ("--conllu nowhere.conllu", "--conllu"),
    ("--tsv nowhere.tsv", "--tsv"),
    ("--tsv a --conllu b", "--tsv"),
    ("--ask colour", "--ask"),
    ("--text wordselect --difficulty 5", "--text"),
    ("--text wordselect --arm warmup", "--text"),
    ("--text wordselect --ask animal", "--ask"),
    ("--text wordselect --words 9", "--words"),
    ("--tsv few.tsv --text grammar", "--text"),
    ("--arm warmup --switch 12", "--switch"),
    ("--switch 5", "--switch"),
    ("--fraction 0.5", "--fraction"),
    ("--arm mixture --fraction 0.3", "--fraction"),
    ("--arm mixture --fraction inf", "--fraction"),
    ("--weight -1", "--weight"),
    ("--norm-weight nan", "--norm-weight"),
    ("--arm warmup --difficulty 1", "--difficulty"),
    ("--words 0", "--words"),
    ("--texts 10", "--text"),
    ("--vocabulary 0", "--vocabulary"),
    ("--arm magic", "--arm"),
    ("--ask tense --arm baseline context", "--ask"),
    ("--text wordselect --texts 2", "--texts"),
]
LINEAR = [
    ("--difficulty inf", "--difficulty"),
    ("--difficulty 1000", "--difficulty"),
    ("--noise -1", "--noise"),
    ("--noise 1e200", "--noise"),
    ("--difficulty 2.5", "--difficulty"),
    ("--embedding pixels", "--embedding"),
    ("--ask wall_hue", "--ask"),
    ("--pairs 0", "--pairs"),
]
CASES = [("exp_plateau.py", f"{SMALL} {flags}", named) for flags, named in [*COMMON, ("--noise 1", "--noise"), ("--task magic", "--task")]]
CASES += [(script, f"{SMALL} {own(script)} {flags}", named) for script, flags, named in OWN]
CASES += [("exp_nlp.py", f"{TRAIN} --pairs 4 {own('exp_nlp.py', flags)} {flags}", named) for flags, named in TEXT]
CASES += [(script, f"{TRAIN} --task linear --difficulty 2 {flags}", named) for flags, named in LINEAR
          for script in ("exp_plateau.py", "exp_aux_loss.py")]  # fmt: skip
CASES += [("exp_aux_loss.py", f"{TRAIN} --task linear --difficulty 2 --loss none shuffled --batch 1", "--batch 1")]
CASES += [
    ("exp_plateau.py", f"{TRAIN} --pairs 4 --embedding nowhere.npz", "--embedding nowhere.npz"),
    ("exp_aux_loss.py", f"{SMALL} --ask floor_hue --loss none context", "--ask"),
]


@pytest.mark.parametrize("script, flags, named", CASES)
def test_wrong_input_ends_in_one_line_that_names_the_flag(script, flags, named, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = run(f"{script} --out {tmp_path}/x {flags.format(tmp_path)}", expect=2).stderr.strip().splitlines()
    assert named in said[-1] and not any("Traceback" in line for line in said)
    assert not [*tmp_path.glob("x/*")]


COMMANDS = re.findall(r"(?:^ *|`|&& )python (exp_\w+\.py[^\n#`]*)", README, re.M)  # in blocks and in the text
DIFFS = re.findall(r"```diff\n--- (\w+)\.py\n\+\+\+ (\w+)\.py\n(.*?)```", README, re.S)
TABLES = re.findall(r"<!-- (assets/\w+\.json) -->\n((?:\|.*\n)+)", README)


def test_the_readme_has_commands_diffs_and_tables():
    assert len(COMMANDS) >= 10 and len(DIFFS) == 5 and len(TABLES) >= 5


@pytest.mark.parametrize("command", sorted({c.strip() for c in COMMANDS if c.split(".")[0] not in {mine for _, mine, _ in DIFFS}}))
def test_every_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    script, _, flags = re.sub("--(steps|seeds|probes|evaluations|batch|pairs) [0-9]+", "", command).partition(" ")
    original = script
    if not (HERE / script).exists():  # the reader's copy
        (original,) = re.findall(rf"^cp (\w+\.py) {script}$", README, re.M)
        (tmp_path / script).write_text((HERE / original).read_text())
        monkeypatch.syspath_prepend(tmp_path)
    small = f"{TRAIN} --pairs 9" if "--task linear" in flags else f"{TRAIN} --pairs 4" if script == "exp_nlp.py" else SMALL
    small = small.replace("--code-width 8", "") if "--embedding" in flags else small
    small += f" {FEW_MEASURES}"
    if "--scale paper" in flags and "--difficulty" not in flags:
        small += " --difficulty 1 1000 inf"  # the Bayes levels of 20,000 mappings take seconds
    if "--conllu" in flags:  # the reader's own file
        made_conllu(tmp_path / "made.conllu")
        flags = re.sub(r"--conllu( \S+conllu)+", f"--conllu {tmp_path}/made.conllu", flags)
    if "--replot" in flags:
        shutil.copy(HERE / "assets" / "plateau.json", tmp_path / "metrics.json")
    monkeypatch.setattr(probes, "save_figure", lambda path, figure: plt.close(figure))  # drawn, not saved
    monkeypatch.setattr(vae, "__defaults__", (64, 20, 0.1))  # latent, steps, beta
    monkeypatch.setattr(tasks, "keep", lambda file, table: None)
    run(f"{script} {small} {flags} {own(original, flags)} --seeds 1 --out {tmp_path}", figure=True)
    assert science(tmp_path)["finished"]


def test_every_training_result_has_its_command_in_the_readme(monkeypatch):
    """All flags, but for the precision and those that a resumed run may change."""
    plain = lambda value: str(float(value)) if isinstance(value, (int, float)) else str(value)
    free = (*probes.Record.may_change, "precision", "conllu")  # the reader's own file
    flags = lambda args: {key: sorted(map(plain, value if isinstance(value, list) else [value])) for key, value in args.items()
                          if key not in free}  # fmt: skip
    told = []
    for command in set(COMMANDS):
        script = HERE / command.split()[0]
        if script.exists() and "--replot" not in command:
            monkeypatch.setattr(sys, "argv", shlex.split(command))
            args = vars(importlib.import_module(script.stem).arguments())
            told.append((script.name, flags({key: probes.jsonable(value) for key, value in args.items()})))
    for path in (HERE / "assets").glob("*.json"):
        if "runs" in dict_of(path) and path.stem not in ("rates_bf16", "nlp_order_older"):  # of earlier settings
            assert (dict_of(path)["script"], flags(dict_of(path)["args"])) in told, path.stem


@pytest.mark.parametrize("script, mine, diff", DIFFS)
def test_every_edit_of_the_readme_applies_to_a_copied_script_and_runs(script, mine, diff, tmp_path, monkeypatch):
    code_ = (HERE / f"{script}.py").read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
        assert code_.count(old) == 1, old
        code_ = code_.replace(old, new)
    (tmp_path / f"{mine}.py").write_text(code_)
    monkeypatch.syspath_prepend(tmp_path)
    (flags,) = re.findall(rf"^python {mine}\.py(.*)$", README, re.M)
    small = f"{TRAIN} --pairs 4" if script == "exp_nlp" else SMALL
    run(f"{mine}.py {small} {own(script + '.py')} {flags} --out {tmp_path}/out", figure=True)
    assert science(tmp_path / "out")["finished"]


@pytest.mark.parametrize("path, table", TABLES)
def test_every_table_of_the_readme_is_its_json(path, table):
    metrics = json.loads((HERE / path).read_text())
    assert probes.table(metrics) == table.strip()
    assert metrics["summary"] == probes.summarise(metrics["runs"])


def test_every_plateau_quoted_in_the_readme_is_in_a_json():
    """Quoted as 'median (every seed)' or 'median (every seed) [median of the paired differences, at best rates]'."""
    shown = lambda value: "-" if value is None else f"{value:,}"
    rows = [row for path in (HERE / "assets").glob("*.json") for row in dict_of(path).get("summary", [])]
    measured = set()
    for row in rows:
        length, seeds = f"{row['plateau_length_median']:,.0f}", " ".join(map(shown, row["plateau_lengths"]))
        difference = row.get("paired_differences_best_median")
        measured |= {(length, seeds, ""), (length, seeds, difference is not None and f"{difference:+,.0f}")}
    quoted = re.findall(r"([\d,]+) \(([\d,-]+(?: [\d,-]+)+)\)(?: \[([+-][\d,]+)\])?", README)
    assert len(quoted) >= 10 and any(quote[2] for quote in quoted) and not set(quoted) - measured


@lru_cache
def dict_of(path: Path) -> dict:
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def core_minutes(path: Path) -> float:
    """Of the training that a JSON is of."""
    where = dict_of(path).get("environment", {})
    if "core_minutes" in where:  # begun on one core, ended on two
        return where["core_minutes"]
    cores = re.search(r"CPU, (\d+) threads", where.get("device", ""))
    return where["seconds"] / 60 * int(cores[1]) if cores else 0


TEN = (  # the comparisons that have ten seeds
    ("weights loss, images (1e-3 only)", "aux10_controls", "weights:0.1"),
    ("penalty, images", "aux10", "norm:0.01"),
    ("both, images (1e-3 only)", "aux10_controls", "weights:0.1+norm:0.01"),
    ("mixing, images", "mixture10", "50% easy"),
    ("warm-up, images", "warmup10", "switch 1000"),
    ("weights loss, text", "nlp_arms", "weights"),
    ("penalty, text", "nlp_arms", "norm"),
    ("context loss, text", "nlp_arms", "context"),
    ("mixing, text", "nlp_arms", "mixture"),
    ("warm-up, text", "nlp_arms", "warmup"),
    ("penalty, regression", "norm", "norm:0.01"),
)


def facts():
    """Sentences of the README, computed."""
    asset = lambda name: dict_of(HERE / "assets" / f"{name}.json")
    at = lambda run, key, probe=-1: run[key][probe][run["headline_block"]]
    change = lambda run, key, probe=-1: at(run, key, probe) - at(run, key, 0)
    steps = lambda values: " ".join("-" if value is None else f"{value:,}" for value in values)
    lengths = lambda runs, key="plateau_length": steps(run[key] for run in runs)
    leave = lambda runs, lr=None: sum(not run["censored"] for run in runs if lr in (None, run["lr"]))
    past = lambda runs: sum(run["plateau_length_other_rules"]["0.9"] is not None for run in runs)
    show = lambda values, digits=2: " ".join(f"{value:.{digits}f}" for value in values)
    of = lambda name, **what: [run for run in asset(name)["runs"] if all(run[key] == value for key, value in what.items())]

    def falling(run):
        """The step at which the loss begins to fall: three evaluations in a row below 0.97 of the best loss without context."""
        below = [value < 0.97 * run["no_context_loss"] for value in run["loss"]]
        return next((step for i, step in enumerate(run["steps"]) if below[i : i + 3] == [True] * 3), None)

    def rising(run, enough=0.015, key="weights_score"):
        """The step from which a score is that much above its start, at two probes in a row."""
        above = [change(run, key, k) > enough for k in range(len(run["probe_steps"]))]
        return next((step for i, step in enumerate(run["probe_steps"]) if above[i : i + 2] == [True] * 2), None)

    def lead(run, key="weights_score"):
        """How much a score has changed at the last probe before the loss begins to fall."""
        return change(run, key, sum(step <= falling(run) for step in run["probe_steps"]) - 1)

    changes = lambda runs: " ".join(f"{probes.score_change(run):+.3f}" for run in runs)
    for m in (1, 8, "inf"):
        runs = of("rates", difficulty=m, lr=2e-3)
        yield f"{changes(runs)} at m = {m}"
        context, where = [run["context_score"][-1][-1] for run in runs], "inf" if m == "inf" else f"m = {m}"
        yield f"{min(context):.2f} to {max(context):.2f} at {where}"
        if m != 8:
            yield f"{show(context)} at {where}"
    totals = {}
    for lr in (5e-4, 1e-3, 2e-3):
        runs = of("rates", lr=lr)
        rho = probes.rank_correlation(*zip(*((probes.score_change(run), probes.budgeted_length(run)) for run in runs)))
        yield f"{rho:.2f} at {probes.rate(lr)}"
        totals[lr] = sum(row["plateau_length_median"] for row in asset("rates")["summary"] if row["lr"] == lr)

    def agreeing(difficulties, score):
        """Of the pairs of seeds at the same m and rate that differ, those in which the higher score goes with the shorter plateau."""
        products = [math.prod(f(one) - f(two) for f in (probes.budgeted_length, score)) for m, lr in itertools.product(difficulties, totals)
                    for one, two in itertools.combinations(of("rates", difficulty=m, lr=lr), 2)]  # fmt: skip
        return f"{sum(product < -1e-9 for product in products)} of {sum(abs(product) > 1e-9 for product in products)} pairs"

    assert of("rates")[0]["probe_steps"][3] == 750
    assert min(falling(run) or math.inf for run in of("rates") if run["difficulty"] != 1) > 750
    early = agreeing((8, 64, "inf"), lambda run: change(run, "weights_score", 3))
    yield f"the one with the higher score has the shorter plateau in {early}"
    yield ", ".join(f"{total:,.0f} at {probes.rate(lr)}" for lr, total in totals.items()) + " steps"
    falls = {lr: [-probes.score_change(run) for run in of("rates", difficulty="inf", lr=lr)] for lr in totals}
    far = f"{min(falls[2e-3]):.3f} to {max(falls[2e-3]):.3f}"
    yield f"at m = inf it falls by {far} at 2e-3, by {max(falls[5e-4]):.3f} at most at 5e-4"
    easier = min(probes.score_change(run) for run in of("rates", lr=2e-3) if run["difficulty"] in (1, 8))
    yield f"At 2e-3 it falls at m = inf in all five runs, by {far}, and none leaves; at m = 8 and 1 by {-easier:.3f} at most"
    sweeps = [lengths(of(name, difficulty=m, lr=5e-4)[:3]) for name in ("rates_bf16", "rates") for m in (1, "inf")]
    yield "at 5e-4 plateaus end at {} for m = 1 and {} for m = inf, in fp32 at {} and {}".format(*sweeps)
    stay = [fall for fall, run in zip(falls[1e-3], of("rates", difficulty="inf", lr=1e-3)) if run["censored"]]
    assert (
        len(stay) == 4
        and sum(fall < 0 for fall in falls[1e-3]) == 1
        and max(-probes.score_change(run) for run in of("rates", lr=5e-4)) < 0.0075
    )
    yield f"At 1e-3 and m = inf four of five fall, by {min(stay):.3f} to {max(stay):.3f}, and stay"
    yield f"({changes(of('rates', difficulty='inf', lr=5e-4))} at m = inf)"
    newer = [of("plateau_newer", difficulty=m) for m in (8, "inf")]
    yield f"ends {leave(newer[0])} of 3 plateaus at m = 8, and at m = inf the score changes by {changes(newer[1])}"
    for step in (0, 1530, 1800):  # the lines of the log
        parts = []
        for m in (1, 8, "inf"):
            runs = of("plateau", difficulty=m)
            probe = sum(probed <= step for probed in runs[0]["probe_steps"]) - 1
            loss, accuracy = (np.median([run[key][run["steps"].index(step)] for run in runs]) for key in ("loss", "accuracy"))
            parts.append(f"m={m} {loss:.2f} {accuracy:.0%} {np.median([at(run, 'weights_score', probe) for run in runs]):.2f}")
        yield f"{step} {step / 1800:.0%} | {' | '.join(parts)} |"
    runs = of("plateau", difficulty="inf")
    falls = lambda key: sorted(-change(run, key) for run in runs)
    for key, words in (("weights_score", "the paper's probe"), ("weights_score_converged", "the converged one")):
        yield f"{words} falls by {falls(key)[0]:.3f} to {falls(key)[-1]:.3f}"
    yield f"from {at(runs[0], 'spread', 0):.1f} to {show([at(run, 'spread') for run in runs], 0)}"
    twins: dict = {}  # the same run in several programs, unless equal to the last digit
    for path in (HERE / "assets").glob("*.json"):
        args = dict_of(path).get("args", {})
        if args.get("embedding") == "code":
            world = [args[key] for key in ("factors", "ask", "code_width", "code_gain", "batch", "pairs")]
            for run in dict_of(path)["runs"]:
                size = run.get("size") or re.sub(r"[][]", "", "{n_layer} x {d_model}".format(**args))
                key = f"{world} {size} {run['difficulty']} {run['arm']} {run['seed']}"
                twins.setdefault((run["lr"], key), {})[run["steps"][-1], run["loss"][-1]] = run
    apart = lambda values: max(values) - min(values) if values else 0
    moved, wandered = [], []
    for lr in (5e-4, 1e-3, 2e-3):
        here = [list(runs.values()) for (rate, _), runs in twins.items() if rate == lr]
        moved.append(max(apart([run["plateau_length"] for run in runs if not run["censored"]]) for runs in here))
        same = [[probes.score_change(run) for run in runs if run["steps"][-1] == end] for runs in here for end in (1700, 2500, 3000, 4000)]
        wandered.append(max(map(apart, same)))
    yield "moved by up to {:,}, {:,} and {:,} steps at 5e-4, 1e-3 and 2e-3 where it left each time".format(*moved)
    yield "its score by {:.2f}, {:.2f} and {:.2f}".format(*wandered)
    fallen = [run for runs in twins.values() for run in runs.values() if run["arm"] == "baseline" and probes.score_change(run) < -0.015]
    different = lambda chosen: sum(any(run is one for run in runs.values() for one in chosen) for runs in twins.values())
    lost = sorted(-change(run, "weights_score_converged") for run in fallen)
    small = [fall for fall in lost if fall < 0.0105]
    yield f"in {len(fallen)} baselines it falls by more than 0.015; the converged score falls by at most 0.01 in {len(small)} of them"
    yield f"{len(fallen)} baselines the weights score falls by more than 0.015, the converged score falls by at most 0.01 in {len(small)}"
    yield f"of them, by up to {lost[-1]:.3f} in the others"
    for name, one, two in (("nlp", "on the plateau", 1), ("wordselect", "at step 200", 1)):
        runs = of(name, arm="baseline")
        start, low = ([at(run, "weights_score_converged", probe) for run in runs] for probe in (0, two))
        yield f"from {show(start)} to {show(low)} {one}"
    left = [run for runs in twins.values() for run in runs.values() if run["difficulty"] == "inf" and not run["censored"]]
    left = [run for run in left if len(run["weights_score"][0]) < 6 and "context_score" in run]
    ends = [[run["loss"][-1] for run in left], [run["accuracy"][-1] for run in left], [run["context_score"][-1][-1] for run in left]]
    spans = [f"{min(values):.2f} to {max(values):.2f}" for values in ends]
    assert all(run["completion_step"] is None for run in left)
    yield f"All {len(left)} runs of this page ({different(left)} different seeds and settings) that leave at m = inf with 3 blocks or"
    yield f"fewer end above it, at {spans[0]}"
    yield f"all {len(left)} runs that leave end above the loss of a learner"
    yield "with an accuracy of {} (Bayes 0.80), and their context score ends at {} (last".format(*spans[1:])
    level = asset("plateau")["reference"]["inf"]
    assert level["pairwise_loss"] < min(ends[0])
    yield f"reaches a loss of {level['pairwise_loss']:.2f} (*each"
    begin, end = (show(run["context_score"][probe][-1] for run in of("larger", arm="weights:0.1")) for probe in (0, -1))
    yield f"(from {begin} to {end}, 6 blocks)"
    after = of("aux_after")
    yield f"the loss is {show(run['loss'][run['steps'].index(3000)] for run in after)} at step 3,000"
    yield f"and {show(run['loss'][-1] for run in after)} at the end"
    yield f"(each pair by itself {level['pairwise_accuracy']:.2f}) and"
    yield f"and a context score of {show(run['context_score'][-1][-1] for run in after)}"
    world = shapes((4, 4, 4, 4, 4, 1), FACTORS[:3], "code", 32, 2.5)
    levels = [world.references(run["seed"], math.inf, 12) for run in after]
    rows = [[run["accuracy_by_position"] for run in after]]
    rows += [[level[f"{key}_accuracy_by_position"] for level in levels] for key in ("pairwise", "bayes")]
    trained, alone, exact = (np.mean(row, 0) for row in rows)
    yield f"the accuracy is {show(trained[3:7])}, that of each pair by itself {show(alone[3:7])}, of exact Bayes {show(exact[3:7])}"
    rises = sorted(map(probes.score_change, after))
    yield f"with a weights score {rises[0]:.3f} to {rises[-1]:.3f} above its start"
    scores = [run["context_score"][-1][-1] for run in of("aux_loss", arm="context:0.1")]
    yield f"the context score of its runs ends at chance ({min(scores):.2f} to {max(scores):.2f})"
    share, scores = {"weights:0.1": [], "norm:0.01": []}, []
    for m, name in ((1, "aux_difficulties"), (8, "aux_difficulties"), ("inf", "aux_loss")):
        best = [run for run in probes.at_best_rate(asset(name), difficulty=m) if run["arm"] in ("baseline", *share)]
        length = {(run["arm"], run["seed"]): probes.budgeted_length(run) for run in best}
        scores += [probes.score_change(run) for run in best if run["arm"] == "baseline"]
        for arm in share:
            gains = [1 - length[arm, seed] / length["baseline", seed] for seed in range(5)]
            assert arm == "norm:0.01" or min(gains) > 0
            share[arm].append(f"{np.median(gains):.0%}")
    yield f"By a sign test five of five is p = {probes.sign_test(5, 0):.1g}."
    best_rates = lambda rows: {row["arm"]: row["lr"] for row in rows if row["best_lr"]}
    first_five = {name: best_rates(probes.summarise([run for run in of(name) if run["seed"] < 5])) for _, name, _ in set(TEN)}
    # its budget ends before any of these baselines leaves: picked in the sweep, with the same seeds
    first_five["aux10"]["baseline"] = best_rates(asset("aux_loss")["summary"])["baseline"]
    ten = {}
    for label, name, arm in TEN:
        (row,) = [row for row in asset(name)["summary"] if row["arm"] == arm and row["best_lr"]]
        length, loss = row["paired_differences_best"], row["paired_mean_losses_best"]
        rates = best_rates(asset(name)["summary"])
        assert row["n"] == 10 and all(first_five[name][which] == rates[which] for which in (arm, "baseline"))
        ten[label] = all_ten, fresh, by_loss = [probes.signs(values) for values in (length, length[5:], loss)]
        cells = "{}, {} | {:.1g} | {}, {} | {}, {}".format(*all_ten, probes.sign_test(*all_ten), *fresh, *by_loss)
        yield f"| {label} | {cells} | [{name}](assets/{name}.json) |"
    later = [ten[f"{what}, text"][0][1] for what in ("warm-up", "mixing", "context loss")]
    yield "ten seeds: sooner in {} with the weights loss, later in {}; warm-up, mixing and the context loss later in {}, {} and {};".format(
        *ten["weights loss, text"][0], *later
    )
    yield "ten seeds, best rates: after 1,000 steps of it sooner in {}, later in {};".format(*ten["warm-up, images"][0])
    assert later == [7, 8, 8] and ten["weights loss, text"][2] == (9, 1) and ten["mixing, images"][2] == (5, 5)
    wide = json.loads((HERE / "assets" / "world_search.json").read_text())
    (wide,) = [row for row in wide if (row["batch"], row["lr"], row["difficulty"]) == (96, 5e-4, "inf")]
    twice, plain_batch = wide["plateau_lengths"], [run["plateau_length"] for run in of("aux_loss", arm="weights:0.1", lr=5e-4)]
    yield "({:,} and {:,} steps at 5e-4, with the loss {:,} and {:,}, seeds 0 and 1;".format(*twice, *plain_batch[:2])
    yield "saves {}, at least {} and at least {} (median".format(*share["weights:0.1"])
    yield "the weights loss saves {}, at least {} and at least {} (median of the seeds".format(*share["weights:0.1"])
    yield "the penalty {}, at least {} and at least {}.".format(*share["norm:0.01"])
    yield f"the scores of the {len(scores)} change by {min(scores):+.3f} to {max(scores):+.3f}"
    lost = [-change(run, "weights_score_converged") for run in of("aux_loss", arm="shuffled:0.1") if run["lr"] > 5e-4]
    lost = [fall for fall in lost if fall > 0.05]
    yield f"the converged score falls by {min(lost):.2f} to {max(lost):.2f} in {len(lost)} of 10 runs"
    runs, asked = of("nlp_arms"), [list(asset("nlp_arms")["attributes"]).index(name) for name in ("tense", "sentiment")]
    reads = lambda run, factors, probe=-1: [max(block[f] for block in run["weights_score_by_factor"][probe]) for f in factors]
    read = [reads(run, asked) for run in runs]
    reading, idle_readers = ([min(both) > 0.9 for both, run in zip(read, runs) if run["censored"] == stays] for stays in (False, True))
    yield f"{sum(reading)} of the {len(reading)} runs that leave read both, {sum(idle_readers)} of the {len(idle_readers)} that stay"
    mixed = [(min(both) > 0.9, not run["censored"]) for both, run in zip(read, runs) if run["arm"] == "mixture"]
    yield f"all {sum(a for a, _ in mixed)} mixed runs read both, and {sum(b for _, b in mixed)} leave"
    runs, older = of("nlp_order_long"), of("nlp_order_older")
    then, now = ({(run["arm"], run["seed"]): run["loss"] for run in some} for some in (older, runs))
    assert max(abs(a - b) for key in then for a, b in zip(then[key][:2], now[key])) < 5e-4 and older[0]["steps"][1] == 60
    both = runs + older
    left = [leave(run for run in both if run["arm"] == arm) for arm in ("weights", "norm", "baseline")]
    assert sum(run["arm"] == "norm" for run in both) == 8
    yield "Counted as eight draws of each arm, {} runs leave with the weights loss, {} with the penalty, {} without".format(*left)
    assert min(min(reads(run, (0, 1))) for run in both if run["arm"] == "weights") > 0.99
    ends = [[run["context_score"][-1][-1] for run in both if run["censored"] == stays] for stays in (False, True)]
    yield "ends at {:.2f} to {:.2f} in the runs that leave, at {:.2f} to {:.2f} in the others".format(
        *(f(e) for e in ends for f in (min, max))
    )
    ends = [[run["loss"][-1] for run in of("ewt", arm=arm)] for arm in ("weights", "baseline")]
    assert sum(a < b for a, b in zip(*ends)) == 3
    yield f"a grammar of {len({word for text in exp_nlp.grammar(3000)[0] for word in text})} words"
    error = lambda score, readings: (score * (1 - score) / readings) ** 0.5
    start = np.mean([run["initial_weights_score"] for run in of("plateau")])
    yield f"1,020 held-out readings make a standard error of about {error(start, 1020):.3f}"
    yield f"192 held-out sequences make a standard error of about {error(1 / 3, 192):.3f}"
    yield f"The untrained network scores {start:.2f} already (the image vectors themselves {asset('plateau')['raw_embedding_score']:.2f})"
    best = {row["arm"]: row for row in asset("wordselect")["summary"]}
    sooner = sorted(-steps for steps in best["weights"]["paired_differences"])
    yield f"four of five seeds are sooner, by {sooner[1]} to {sooner[-1]} steps, one {-sooner[0]} later"
    assert 5 - best["context"]["censored"] == 2
    assert all(row["best_lr"] for row in asset("nlp_arms")["summary"] if (row["arm"], row["lr"]) in (("weights", 2e-3), ("baseline", 1e-3)))
    rows = {(row["arm"], row["lr"]): row for row in asset("nlp_arms")["summary"]}
    saved = sorted(-v for v in rows["weights", 2e-3]["paired_differences_best"])
    yield f"in eight of ten seeds, by {saved[2]} to {saved[-1]} steps, and {-saved[0]} later in one; its mean loss is lower in nine"
    assert [probes.signs(rows["weights", lr]["paired_differences"]) for lr in (1e-3, 2e-3)] == [(3, 4), (7, 2)]
    pairs = zip(of("nlp_arms", arm="mixture", lr=1e-3), of("nlp_arms", arm="baseline", lr=1e-3))
    seen = [0.5 * run["plateau_length"] / base["plateau_length"] for run, base in pairs if not run["censored"]]
    yield f"the five mixed runs that leave see {min(seen):.0%} to {max(seen):.0%} of the target sequences"
    assert len(seen) == 5
    for arm in ("baseline", "weights:0.1", "norm:0.01"):
        runs = of("timing", arm=arm)
        leads = " ".join("-" if falling(run) is None else f"{lead(run):+.3f}" for run in runs)
        cells = [steps(map(falling, runs)), steps(map(rising, runs)), leads, lengths(runs)]
        yield f"| {arm} | {' | '.join(cells)} |"
    trained, key = of("timing", arm="weights:0.1"), "weights_score_converged"
    alone = [run for run in of("timing") if run["arm"] != "weights:0.1" and falling(run)]
    lag = lambda runs, *line: [up and up - falling(run) for run in runs for up in [rising(run, *line)]]  # None: never up
    grown = [lead(run, key) for run in trained]
    yield f"it has changed by {min(grown):+.3f} to {max(grown):+.3f} when the loss begins to fall"
    assert sum(late < 0 for late in lag(trained, 0.01, key) if late) == 1
    yield f"it is up at least {min(late for late in lag(alone) if late)} steps later or not at all"
    yield f"does the score move first, by {-max(lag(trained))} steps and more"
    unaided = re.compile("baseline|norm|context|shuffled|.*unrelated")  # without help for the weights component, probed often enough
    held = [[run for run in runs.values() if unaided.match(run["arm"]) and run["difficulty"] == "inf" and not run["censored"]
             and run["probe_steps"][1] <= 500] for runs in twins.values()]  # fmt: skip
    assert max(lead(run) for runs in held for run in runs) < 0.01 and min(probes.score_change(run) for runs in held for run in runs) > 0
    yield f"of {sum(map(bool, held))} runs without help for the component"
    yield f"Of the {sum(map(bool, held))} different runs of this page"
    helped = [[lead(run) > 0.01 for run in of(name, arm=arm) if not run["censored"]]
              for name, arm in (("aux_loss", "weights:0.1"), ("mixture_long", "50% easy"))]  # fmt: skip
    yield "{} of {} with the weights loss and {} of {} mixed with the easy task".format(*[f(h) for h in helped for f in (sum, len)])
    yield "with the weights loss {} of {}, mixed {} of {}".format(*[f(h) for h in helped for f in (sum, len)])
    yield f"{sum(core_minutes(path) for path in (HERE / 'assets').glob('*.json')) / 60:.0f} hours of one CPU core"
    for row in re.findall(r"^\| .+assets/.+ \| \d+ \|$", README, re.M):
        minutes = sum(core_minutes(HERE / "assets" / f"{name}.json") for name in dict.fromkeys(re.findall(r"assets/(\w+).json", row)))
        yield f"{row.rpartition('|')[0].rpartition('|')[0]}| {minutes:.0f} |"
    yield from probes.verdicts(asset("warmup_10")).splitlines()
    yield f"four on 2 newer ones ({asset('default_times')['exp_plateau.py']['newer_seconds']} s)"
    older, newer = (asset(name)["environment"]["seconds"] for name in ("plateau", "plateau_newer"))
    yield f"of a newer one, about {older / newer:.1f} times as fast"
    for command, took in asset("default_times").items():
        if command != "about":
            (row,) = re.findall(rf"^\| `{re.escape(command)}` \|.*(?=\|.* s \|$)", README, re.M)
            whole = took["seconds"] if "seconds" in took else f"about {5 * round(took['ms_per_step'] * took['steps'] / 5000)}"
            yield f"{row}| {whole} s |"
    least = lambda run: Regression(6).references(run["seed"], run["difficulty"], 13, 64)["least_squares_loss_by_position"][-1]
    gaps = []
    for arm, lr in (("baseline", 1e-3), ("weights:0.1", 2e-3), ("norm:0.01", 2e-3)):
        runs = of("linear_aux", arm=arm, difficulty=4, lr=lr)
        gaps.append(np.median([run["loss_by_position"][-1] - least(run) for run in runs]))
    yield "at d = 4 the median gap to least squares at the last position is {:.2f} without, {:.2f} with the weights loss".format(*gaps)
    yield f"{gaps[2]:.2f} with the penalty"
    plain = {lr: of("linear_aux", arm="baseline", lr=lr) for lr in (1e-3, 2e-3)}
    medians = [
        sum(r["plateau_length_median"] for r in asset("linear_aux")["summary"] if (r["arm"], r["lr"]) == ("baseline", lr)) for lr in plain
    ]
    yield "({:,.0f} steps against {:,.0f} at 2e-3)".format(*medians)
    rises = sorted(map(probes.score_change, plain[1e-3]))
    yield f"rises by {rises[0]:.3f} to {rises[-1]:.3f} in the {len(rises)} baselines"
    most = [max(probes.score_change(run) for run in plain[2e-3] if run["difficulty"] == d) for d in (2, 4, 6)]
    yield "at 2e-3 by up to {:.3f} at d = 2, {:.3f} at 4, {:.3f} at 6".format(*most)
    yield f"and {leave(plain[2e-3])} of {len(rises)} leave instead of {leave(plain[1e-3])}."
    assert max(error for run in plain[1e-3] + plain[2e-3] for error in run["weights_score_converged"][-1]) < 0.015
    best = {(row["difficulty"], row["arm"]): row["paired_differences_best"] for row in asset("linear_aux")["summary"] if row["best_lr"]}
    assert [sum(steps < 0 for steps in best[d, "weights:0.1"]) for d in (2, 4, 6)] == [4, 5, 0]
    assert max(steps for d in (2, 4, 6) for steps in best[d, "norm:0.01"]) < 0
    four = sorted(-steps for steps in best[4, "weights:0.1"])
    two = sorted(-steps for steps in best[2, "weights:0.1"])
    yield f"at d = 2 in four, by {two[1]} to {two[-1]}, and {-two[0]} later in one"
    under = sorted(probes.score_change(run) for run in of("linear_aux", arm="norm:0.01", difficulty=6, lr=1e-3))
    yield f"than in the stuck baseline (it rises by {under[0]:.3f} to {under[-1]:.3f})"
    yield f"at d = 4 in five of five seeds, by {four[0]} to {four[-1]} steps"
    slow = {row["difficulty"]: row["paired_differences_median"] for row in asset("linear_aux")["summary"]
            if (row["arm"], row["lr"]) == ("weights:0.1", 1e-3)}  # fmt: skip
    yield f"(With both at 1e-3 the medians are {slow[2]:.0f} and {slow[4]:.0f}.)"
    runs = of("warmup_long")
    risen = lambda run, step: change(run, "weights_score", run["probe_steps"].index(step))
    fell = [run["censored"] for run in runs if risen(run, 1500) < -0.015]
    early_fallen = [run for run in runs if risen(run, 1500) < -0.015 and run["lr"] == 1e-3]
    short = sum(run["switch"] == 250 for run in early_fallen)
    yield f"({len(early_fallen)} of the {len(fell)} are at 1e-3, {short} of them after 250 steps of warm-up"
    assert all(fell) and all(run["censored"] or run["plateau_length"] > 1500 for run in runs)
    yield f"the {len(fell)} runs that are damaged by then all stay, and of the other {len(runs) - len(fell)} {leave(runs)} leave"
    warm = [run for run in runs if run["switch"]]
    assert all(risen(run, run["switch"]) > 0 for run in warm)
    yield f"above its start in all {len(warm)} runs when the warm-up ends"
    ends = {switch: [probes.score_change(run) < 0 for run in warm if run["switch"] == switch] for switch in (250, 500, 1000)}
    yield ", ".join(f"{sum(worse)} of {len(worse)} after {switch:,} steps" for switch, worse in ends.items())
    of_1000 = {lr: [run for run in warm if (run["switch"], run["lr"]) == (1000, lr)] for lr in (5e-4, 1e-3)}
    plain = {lr: of("warmup_long", arm="baseline", lr=lr) for lr in of_1000}
    assert leave(run for run in warm if run["switch"] == 250) == 0
    yield f"at 1e-3 {leave(of_1000[1e-3])} of 5 leave after 1,000 steps of it and {leave(plain[1e-3])} of 5 baselines"
    warm10, plain10 = ({lr: of("warmup10", arm=arm, lr=lr) for lr in of_1000} for arm in ("switch 1000", "baseline"))
    again = [leave(run for run in some[1e-3] if run["seed"] < 5) for some in (warm10, plain10)]
    yield "(above) {} and {} of the same five seeds do".format(*again)
    counted = [(warm["plateau_after_switch"] or 4000) - probes.budgeted_length(run) for warm, run in zip(warm10[5e-4], plain10[5e-4])]
    assert probes.signs(counted) == (6, 3)
    up, fell = ([sum(f(probes.score_change(run)) for run in some[1e-3]) for some in (warm10, plain10)]
                for f in (lambda value: value > 0, lambda value: value < -0.015))  # fmt: skip
    yield f"where {fell[1]} of 10 baselines are damaged, it keeps the component whole (the score of {up[0]} of 10 ends above its start)"
    late = [leave(some[1e-3]) for some in (warm10, plain10)]
    yield f"but {late[0]} of 10 leave within 4,000 steps, of the baselines {late[1]};"
    yield f"{late[0]} of 10 leave, {late[1]} of 10 baselines; after 250"
    yield "without context, {} and {}.".format(*(past(some[1e-3]) for some in (warm10, plain10)))
    high = [of("warmup_high", arm=arm) for arm in ("switch 1000", "baseline")]
    assert leave(of("warmup_high")) == 0 and all(probes.score_change(a) > probes.score_change(b) for a, b in zip(*high))
    yield f"({lengths(of_1000[5e-4], 'plateau_after_switch')} against {lengths(plain[5e-4])})"
    for name in ("pixels", "vae"):
        runs = of(name)
        assert max(map(probes.score_change, runs)) < 0 and not any(run["censored"] for run in runs if run["difficulty"] == 1)
        begin, end = (sorted(at(run, "weights_score_converged", probe) for run in runs) for probe in (0, -1))
        yield f"from {begin[0]:.2f}-{begin[-1]:.2f} to between {end[0]:.2f} and {end[-1]:.2f}"
        rho = asset(name)["weights_score_change_against_plateau_length"]["rho"]
        yield f"plateau length {rho:.2f}, n = 20" if name == "vae" else f"equally everywhere ({rho:.2f})"
    early = sorted(at(run, "weights_score", 1) for run in of("pixels"))
    yield f"within 250 steps from 0.85 to between {early[0]:.2f} and {early[-1]:.2f}"
    runs = of("mixture_long")
    mixed, plain, foreign = ([run for run in runs if run["arm"] == arm] for arm in ("50% easy", "baseline", "50% unrelated"))
    assert [leave(mixed, lr) for lr in totals] == [5, 5, 5] and leave(plain, 2e-3) == 0
    yield f"of the baselines {leave(plain, 5e-4)} of 5 at 5e-4, {leave(plain, 1e-3)} of 5 at 1e-3 and none at 2e-3"
    early = sorted(change(run, "weights_score", run["probe_steps"].index(480)) for run in mixed)
    assert min(run["loss"][run["steps"].index(480)] for run in mixed) > asset("mixture_long")["reference"]["inf"]["no_context_loss"]
    yield f"all {len(mixed)} mixed runs is up by {early[0]:.3f} to {early[-1]:.3f} at step 480, while no loss is below"
    saved = [[-v for v in row["paired_differences"]] for row in asset("mixture_long")["summary"] if row["arm"] == "50% easy"]
    assert [probes.signs(row) for row in saved] == [(3, 2), (1, 4), (0, 5)]
    yield f"four of five seeds at 1e-3, by {sorted(saved[1])[1]:,} steps and more; five of five at 2e-3, by at least {min(saved[2])})"
    yield f"the unrelated task {leave(foreign)} of {len(foreign)} runs leaves"
    yield f"({leave(plain)} of {len(plain)} baselines leave)"
    small = of("mixture_batch24")
    yield f"{leave(small)} of its 15 runs leaves, of those mixed with the easy task all {leave(mixed)}"
    yield f"of the baselines {leave(small)} of 15 with as much of the target task (batch 24), {leave(plain)} of 15 with twice as much"
    yield f"{past(foreign)} of 15 are below it, and {past(small)} of the 15 baselines with as much"
    of_context = [run["context_score"][-1][-1] for run in of("context") if run["arm"] != "baseline"]
    yield f"(its context score ends at {min(of_context):.2f} to {max(of_context):.2f}, chance 0.33; `python exp_aux_loss"
    yield "{} of 5 leave at weight 1, {} at 10, {} without it.".format(
        *(leave(of("context", arm=arm)) for arm in ("context:1", "context:10", "baseline"))
    )
    for name in ("mixture_fractions", "mixture_sizes"):
        runs = of(name)
        up, below = ([probes.score_change(run) > 0 for run in runs if bool(run["fraction"]) == mixed] for mixed in (True, False))
        part = f"all {len(up)}" if all(up) else f"{sum(up)} of {len(up)}"
        yield f"the score of {part} mixed runs ends above its start, that of {below.count(False)} of {len(below)} baselines below"
    sized = lambda size, mixed: [run for run in runs if run["size"].endswith(size) and bool(run["fraction"]) == mixed]
    sizes = ("3 x 64", "2 x 64", "2 x 32", "3 x 32", "1 x 64", "1 x 32")
    assert [leave(sized(size, True)) for size in sizes] == [5, 3, 1, 0, 0, 0]
    assert [leave(sized(size, False)) for size in sizes] == [1, 2, 0, 0, 0, 0]
    assert [past(sized("x 32", mixed)) for mixed in (True, False)] == [3, 0]
    spreads = [at(run, "spread") for run in of("larger", arm="baseline")]
    yield f"their spread grows from {at(of('larger')[0], 'spread', 0):.0f} to {min(spreads):.0f} and more"
    ends = [at(run, "weights_score") for run in of("larger", arm="baseline")]
    yield f"score falls from 0.88 to between {min(ends):.2f} and {max(ends):.2f}"
    low = {lr: of("larger_low", arm="baseline", lr=lr) for lr in (2.5e-4, 1.25e-4)}
    yield f"At 2.5e-4 the baseline's score changes by {changes(low[2.5e-4])};"
    ends = [run["loss"][-1] for run in low[1.25e-4]]
    yield f"({changes(low[1.25e-4])}) and the loss of four has begun to fall (at the end {show(ends)},"
    assert sum(falling(run) is not None for run in low[1.25e-4]) == 4
    assert leave(of("larger_low", arm="baseline") + of("larger", arm="baseline")) == 0
    two = [of("larger_low", arm=arm) for arm in ("weights:0.1", "norm:0.01")]
    assert [[leave(runs, lr) for lr in (2.5e-4, 1.25e-4)] for runs in two] == [[5, 2], [5, 1]]
    paired = [row["paired_mean_losses"] for name in ("larger", "larger_low") for row in asset(name)["summary"]]
    assert max(sum(paired, [])) < 0
    yield f"in all {sum(map(len, paired))} pairs, whether it is damaged or not"
    yield f"the mean loss is lower in all {sum(map(len, paired))} pairs"
    spread = lambda name, **what: [at(run, "spread") for run in of(name, **what)]
    with_penalty, low = spread("norm", arm="norm:0.01"), spread("norm", arm="baseline", lr=1e-3)
    yield f"their spread ends at {min(with_penalty):.1f} to {max(with_penalty):.1f}"
    assert sum(value < 5.3 for value in low) == 8

    # graded by difficulty, at every rate
    assert min(run["plateau_length"] or math.inf for run in of("rates")) > of("rates")[0]["probe_steps"][1] == 250
    graded = {lr: [probes.rank_correlation(range(4), [change(run, "weights_score", 1) for m in (1, 8, 64, "inf")
                                                      for run in of("rates", lr=lr, difficulty=m, seed=seed)])
                   for seed in range(5)] for lr in totals}  # fmt: skip
    assert max(max(rhos) for rhos in graded.values()) < 0
    yield f"rank correlation of its change with m, within seeds, {show(map(np.mean, graded.values()))} at the three rates"
    easy = [probes.score_change(run) for lr in (5e-4, 1e-3) for run in of("rates", difficulty=1, lr=lr)]
    yield f"m = 1 up to 1e-3 it rises, by {min(easy):.3f} to {max(easy):.3f} in {sum(value > 0 for value in easy)} of {len(easy)} runs"
    searched = json.loads((HERE / "assets" / "world_search.json").read_text())
    fell = [(row["lr"] > 5e-4, value < -0.015) for row in searched if row["difficulty"] == "inf" for value in row["weights_score_changes"]]
    low, high = ([damaged for above, damaged in fell if above == rate] for rate in (False, True))
    yield f"in all worlds searched {sum(low)} of {len(low)} runs at 5e-4 and below, {sum(high)} of {len(high)} above"
    late = agreeing((1, 8, 64, "inf"), probes.score_change)
    yield f"the one that ends with the higher score has the shorter plateau in {late}"
    above = []
    for run in [run for lr in (5e-4, 1e-3) for run in of("rates", difficulty=1, lr=lr)]:
        on_it = [loss for step, loss in zip(run["steps"], run["loss"]) if 100 <= step < run["plateau_length"]]
        above.append(np.mean([loss > 1.03 * run["no_context_loss"] for loss in on_it]))
    yield f"{min(above):.0%} to {max(above):.0%} of the steps on it the loss is above"
    leads = [lead(run) for m in (1, 8) for lr in (5e-4, 1e-3) for run in of("rates", difficulty=m, lr=lr)]
    up = [sum(value > line for value in leads) for line in (0.01, 0)]
    yield f"up by 0.01 in {up[0]} of {len(leads)} baselines, above its start in {up[1]}"
    falling_runs = [run for m in (64, "inf") for lr in (5e-4, 1e-3) for run in of("rates", difficulty=m, lr=lr) if falling(run)]
    assert max(map(lead, falling_runs)) < 0.01
    for words, low, high in (("in the 250 steps before the fall it is {:+.3f} \u00b1 {:.3f}", -250, 0),
                             ("250 to 500 steps after it {:+.3f} \u00b1 {:.3f}", 250, 500)):  # fmt: skip
        seeds: dict = {}
        for run in alone:
            here = [k for k, step in enumerate(run["probe_steps"]) if low < step - falling(run) <= high]
            seeds.setdefault(run["seed"], []).append(np.mean([change(run, "weights_score", k) for k in here]))
        values = [np.mean(runs) for runs in seeds.values()]
        yield words.format(np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5)
    # mean loss over the training
    lower = lambda name, arm: [v < 0 for row in asset(name)["summary"] if row["arm"] == arm for v in row["paired_mean_losses"]]
    assert all(lower("aux10", "norm:0.01")) and len(lower("aux10", "norm:0.01")) == 20 and all(lower("aux_loss", "weights:0.1"))
    shuffled = {(run["lr"], run["seed"]): probes.mean_loss(run) for run in of("aux_loss", arm="shuffled:0.1")}
    under = [probes.mean_loss(run) < shuffled[run["lr"], run["seed"]] for run in of("aux_loss", arm="weights:0.1")]
    yield f"lower with the weights loss than with the control in {sum(under)} of {len(under)} pairs"
    control = lower("aux_loss", "shuffled:0.1")
    yield f"lower with the control than in the baseline in {sum(control)} of {len(control)}"
    yield f"its mean loss is lower than the baseline's in {sum(control)} of {len(control)}"
    both = {run["seed"]: run["plateau_length"] for run in of("aux10_controls", arm="weights:0.1+norm:0.01")}
    single = of("aux10_controls", arm="weights:0.1") + of("aux10", arm="norm:0.01", lr=1e-3)
    assert all(both[run["seed"]] < probes.budgeted_length(run) for run in single)
    long = {run["seed"]: probes.budgeted_length(run) for run in of("warmup_long", arm="baseline", lr=5e-4)}
    for arm in ("weights:0.1", "norm:0.01"):
        gains = [1 - run["plateau_length"] / long[run["seed"]] for run in of("aux_loss", arm=arm, lr=1e-3)]
        yield f"{np.median(gains):.0%} ({' '.join(f'{gain:.0%}' for gain in gains)})"
    # mixing, by target sequences
    target = lambda arm, share: {(run["lr"], run["seed"]): share * probes.budgeted_length(run) for run in of("mixture10", arm=arm)}
    part, whole = target("50% easy", 24), target("baseline", 48)
    assert all(part[key] < whole[key] for key in whole)
    saved = np.median([part[1e-3, seed] / whole[5e-4, seed] for seed in range(10)])
    yield f"with {saved:.0%} of the baseline's (median)"
    sooner, later = ten["mixing, images"][0]
    yield f"ten seeds, best rates: sooner in {sooner}, later in {later}, with {saved:.0%} of the target sequences"
    mixed10, plain10 = (of("mixture10", arm=arm) for arm in ("50% easy", "baseline"))
    left = [leave(plain10, lr) for lr in (5e-4, 1e-3)]
    yield f"All {leave(mixed10)} mixed runs leave, of the baselines {left[0]} of 10 at 5e-4 and {left[1]} of 10 at 1e-3"
    up = [sum(probes.score_change(run) > 0 for run in runs) for runs in (mixed10, plain10)]
    yield f"The score of all {up[0]} ends above its start, that of {20 - up[1]} of the 20 baselines below"
    rows = {row["lr"]: row for row in asset("mixture10")["summary"] if row["arm"] == "50% easy"}
    best = sorted(rows[1e-3]["paired_differences_best"])
    yield f"is sooner in six of ten seeds, by up to {-best[0]:,} steps, and later in four, by up to {best[-1]:,}"
    assert [probes.signs(rows[lr]["paired_differences"]) for lr in (5e-4, 1e-3)] == [(4, 6), (8, 2)]
    began = [sum(falling(run) is not None for run in of(name, arm=arm)) for name, arm in
             (("mixture_long", "50% unrelated"), ("mixture_batch24", "baseline"))]  # fmt: skip
    yield f"begins to fall in {began[0]} of 15 runs (batch 24: {began[1]})"
    yield f"with an unrelated task {began[0]} of 15 begin to, one does"
    assert leave(foreign) == 1
    ends = lambda name, arm: {(run["lr"], run["seed"]): run["loss"][-1] for run in of(name, arm=arm)}
    other, fair, best_mix = ends("mixture_long", "50% unrelated"), ends("mixture_batch24", "baseline"), ends("mixture_long", "50% easy")
    assert all(best_mix[key] < other[key] for key in other)
    yield f"ends lower in {sum(other[key] < fair[key] for key in other)} of 15"
    # drowned or lost, by the size of the fall
    far = [(-change(run, "weights_score_converged"), -probes.score_change(run)) for run in fallen if probes.score_change(run) < -0.15]
    yield f"of those that fall by more than 0.15 {sum(lost > 0.0105 for lost, _ in far)} of {len(far)} lose information as well"
    yield f"as well, in the median {np.median([lost / fall for lost, fall in far]):.0%} of the fall"
    usual = [run for (_, key), runs in twins.items() if "3 x 64" in key for run in runs.values() if run["arm"] == "baseline"]
    r = np.corrcoef([math.log(at(run, "spread")) for run in usual], [probes.score_change(run) for run in usual])[0, 1]
    yield f"over all {len(usual)} baselines of this size the logarithm of the spread explains {r * r:.0%} of the variance"

    size = dict(BENCHMARK["paper"])
    batch, pairs = size.pop("batch"), size["n_pair"]
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        model = GPT(Config(**size), [0])
        model(torch.zeros(1, batch, pairs, size["d_x"]), torch.zeros(1, batch, pairs, size["d_y"])).sum().backward()
    params = sum(p.numel() for p in model.parameters())
    steps_ = exp_plateau.SCALES["shapes", "paper"]["steps"]
    yield f"{params / 1e6:.1f} million parameters and takes {steps_:,} steps of {flops.get_total_flops() / 1e12:.2f} TFLOP"
    ten_last = [np.mean(run["accuracy"][-10:]) for run in of("aux_after")]
    yield f"averaged over the last ten evaluations, of {show(ten_last)} (each pair by itself {level['pairwise_accuracy']:.2f})"


def test_every_computed_sentence_is_in_the_readme():
    text = " ".join(README.split())
    computed = list(facts())
    assert len(computed) > 50 and not [fact for fact in computed if fact not in text]
