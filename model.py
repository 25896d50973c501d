"""What learns: R independent GPT-2s in one program.

Every parameter and every activation has a leading run axis, so one batched matmul moves all runs of a figure.
Nothing crosses that axis: the gradient of the summed loss is each run's own gradient, and Adam is elementwise.
Axis letters, here and in every file: r run, b batch, n pair, t token, d dim, h head, k block, f factor.

Architecture and initialisation are GPT-2's (pre-norm, learned positions, tanh GELU, N(0, 0.02), residual projections
N(0, 0.02 / sqrt(2 n_layer))). x and y share one linear read-in, as in the paper's code; predictions are read at x only.

    python model.py --runs 1 4 8 20 32       how fast does this machine train R runs in one program?
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import shutil
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tasks import UsageError, cross_entropy


@dataclass
class Config:
    d_x: int = 32  # size of an input vector; 0 = inputs are words
    d_y: int = 4  # size of a label: number of classes (one-hot), or 1 for a real number
    n_word: int = 0  # vocabulary, when inputs are words
    n_pair: int = 12  # (x, y) pairs in a sequence
    n_token: int = 1  # tokens of one x
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 64


class Linear(nn.Module):
    """R independent linear maps: x (r, t, d_in) -> (r, t, d_out), one batched matmul."""

    def __init__(self, runs: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(runs, d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(runs, 1, d_out))

    @torch.no_grad()
    def initialise(self, seeds: list[int]) -> None:
        """nn.Linear's default, run r from seeds[r]; for read-outs that a script adds to a GPT."""
        bound = self.weight.shape[1] ** -0.5
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(2**40 + seed)
            self.weight[run].uniform_(-bound, bound, generator=generator)
            self.bias[run].uniform_(-bound, bound, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y + self.bias.to(y.dtype)  # an fp32 bias would promote everything after it under autocast


class LayerNorm(nn.Module):
    def __init__(self, runs: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(runs, 1, d_model))
        self.bias = nn.Parameter(torch.zeros(runs, 1, d_model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's GELU, 0.5 x (1 + tanh(u)) = x sigmoid(2u): on a CPU the compiled exponential is faster than the tanh."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


class Block(nn.Module):
    """One pre-norm GPT-2 block on x (r, b*t, d)."""

    def __init__(self, runs: int, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = LayerNorm(runs, d_model), LayerNorm(runs, d_model)
        self.qkv = Linear(runs, d_model, 3 * d_model)
        self.attention_out = Linear(runs, d_model, d_model)
        self.mlp_in = Linear(runs, d_model, 4 * d_model)
        self.mlp_out = Linear(runs, 4 * d_model, d_model)

    def attention(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        runs = x.shape[0]
        q, k, v = rearrange(self.qkv(x), "r (b t) (three h d) -> three (r b) h t d", three=3, h=self.n_head, t=tokens)
        if x.device.type != "cpu":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # written out: on a CPU the fused kernel's backward is slower than this at 20 to 80 tokens
            future = torch.full((tokens, tokens), -math.inf, dtype=q.dtype).triu(1)
            mixed = ((q @ k.mT) * q.shape[-1] ** -0.5 + future).softmax(-1) @ v
        return self.attention_out(rearrange(mixed, "(r b) h t d -> r (b t) (h d)", r=runs))

    def forward(self, x: torch.Tensor, tokens: int, mixing: str = "attention") -> torch.Tensor:
        normed = self.norm_1(x)
        # "identity" is the authors' probe: attention hands back its own (normed) input, so no token sees another
        x = x + (self.attention(normed, tokens) if mixing == "attention" else normed)
        return x + self.mlp_out(gelu(self.mlp_in(self.norm_2(x))))


class GPT(nn.Module):
    """R GPT-2s for sequences x_1 y_1 ... x_n y_n. Run r is initialised from seeds[r] alone.

    forward(x, y) -> logits (r, b, n, d_y), the prediction of each y from its x and the pairs before it.
    x: vectors (r, b, n, d_x), or words (r, b, n, n_token) when config.n_word; y: one-hot labels or numbers (r, b, n, d_y).
    y=None leaves the labels out: with n = 1 that is an input without any context.
    hidden=True also returns the states after each block, a list of n_layer tensors (r, b, tokens, d_model).
    """

    def __init__(self, config: Config, seeds: list[int]):
        super().__init__()
        runs, d = len(seeds), config.d_model
        self.config = config
        if config.n_word:
            self.words = nn.Parameter(torch.zeros(runs, config.n_word, d))
        self.read_in = Linear(runs, max(config.d_x, config.d_y), d)
        self.position = nn.Parameter(torch.zeros(runs, config.n_pair * (config.n_token + 1), d))
        self.blocks = nn.ModuleList(Block(runs, d, config.n_head) for _ in range(config.n_layer))
        self.norm = LayerNorm(runs, d)
        self.read_out = Linear(runs, d, config.d_y)
        self._initialise(seeds)

    @torch.no_grad()
    def _initialise(self, seeds: list[int]) -> None:
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, p in self.named_parameters():
                if name.startswith(("read_in", "read_out")):  # nn.Linear's default, as in the authors' code
                    fan_in = getattr(self, name.split(".")[0]).weight.shape[1]
                    p[run].uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                elif name.endswith("_out.weight"):  # the two projections that write to the residual stream
                    p[run].normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer), generator=generator)
                elif name.endswith(("qkv.weight", "mlp_in.weight", "position", "words")):
                    p[run].normal_(0, 0.02, generator=generator)

    def embed(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """Tokens before the first block, (r, b, tokens, d_model)."""
        if self.config.n_word:
            runs, n_word = self.words.shape[:2]
            row = torch.arange(runs, device=x.device).view(-1, 1, 1, 1) * n_word
            tokens = F.embedding(x + row, rearrange(self.words, "r w d -> (r w) d"))
        else:
            weight = self.read_in.weight[:, : x.shape[-1]]
            tokens = rearrange(rearrange(x, "r b n d -> r (b n) d") @ weight, "r (b n) d -> r b n 1 d", b=x.shape[1])
            tokens = tokens + self.read_in.bias[:, :, None, None].to(tokens.dtype)
        if y is not None:  # a one-hot matmul, not a gather: its backward is a matmul as well
            label = rearrange(y, "r b n c -> r (b n) c") @ self.read_in.weight[:, : y.shape[-1]] + self.read_in.bias
            tokens = torch.cat([tokens, rearrange(label, "r (b n) d -> r b n 1 d", b=y.shape[1]).to(tokens.dtype)], dim=3)
        tokens = rearrange(tokens, "r b n t d -> r b (n t) d")
        return tokens + self.position[:, None, : tokens.shape[2]]

    def forward(self, x, y=None, mixing: str = "attention", hidden: bool = False):
        h = self.embed(x, y)
        batch, tokens = h.shape[1:3]
        h = rearrange(h, "r b t d -> r (b t) d")
        states = []
        for block in self.blocks:
            step = block if torch.is_grad_enabled() else block.forward  # measures use other shapes: never compile again for them
            h = step(h, tokens, mixing)
            if hidden:
                states.append(rearrange(h, "r (b t) d -> r b t d", b=batch))
        at_x = self.at_x(rearrange(h, "r (b t) d -> r b t d", b=batch), with_labels=y is not None)
        logits = self.read_out(self.norm(rearrange(at_x, "r b n d -> r (b n) d")))
        logits = rearrange(logits, "r (b n) c -> r b n c", b=batch)
        return (logits, states) if hidden else logits

    def at_x(self, states: torch.Tensor, with_labels: bool = True) -> torch.Tensor:
        """States (r, b, tokens, d) at the last token of each x, where its y is predicted: (r, b, n, d)."""
        t = self.config.n_token
        return states[:, :, t - 1 :: t + with_labels]


class Adam:
    """Adam (Kingma & Ba 2015; its betas, 0.9 and 0.999) with a learning rate per run; every parameter has the run axis first.

    lr (r,). eps, weight_decay (decoupled) and clip (gradient norm of one run, inf = off): a number, or one per run.
    """

    def __init__(self, model: nn.Module, lr, eps=1e-8, weight_decay=0.0, clip=math.inf):
        self.params = list(model.parameters())
        like = self.params[0]
        per_run = lambda v: torch.as_tensor(v, dtype=torch.float32).expand(like.shape[0]).to(like.device).view(-1, 1, 1)
        self.lr, self.eps, self.weight_decay, self.clip = map(per_run, (lr, eps, weight_decay, clip))
        self.clips = bool(torch.isfinite(self.clip).any())  # decided once: asking later would stall a GPU
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]
        self.count = torch.zeros(len(self.params), like.shape[0], 1, 1, device=like.device)  # of steps since the start, or since forget()

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        if self.clips:
            norm = sum(g.square().sum((1, 2), keepdim=True) for g in grads).sqrt()
            for g in grads:
                g.mul_((self.clip / norm).clamp(max=1.0))
        self.count += 1
        steps, scales, keep = self.lr / (1 - 0.9**self.count), 1 - 0.999**self.count, 1 - self.lr * self.weight_decay
        for p, g, mean, square, step, scale in zip(self.params, grads, self.mean, self.square, steps, scales):
            mean.lerp_(g, 0.1)
            square.lerp_(g * g, 0.001)
            p.mul_(keep).sub_(step * mean / (square / scale).sqrt_().add_(self.eps))
            p.grad = None

    @torch.no_grad()
    def forget(self, param: int, run: int) -> None:
        """Start afresh for one parameter of one run."""
        for state in (self.mean, self.square, self.count):
            state[param][run] = 0

    def state_dict(self) -> dict:
        """Tensors; lr is among them, since a schedule may have changed it."""
        return {"mean": self.mean, "square": self.square, "count": self.count, "lr": self.lr}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name in ("mean", "square", "count"):
            for a, b in zip(getattr(self, name), state[name], strict=True):
                a.copy_(b)
        self.lr = state["lr"]  # not in place: a script may hold the old tensor, to compute a schedule from


# ---------------------------------------------------------------------------------------------- the machine


def pick_device(device: str, precision: str) -> tuple[torch.device, str]:
    """--device and --precision, with auto resolved: a GPU if there is one; bf16 on a GPU that multiplies it, else fp32.

    A CPU trains in fp32 unless told otherwise, so that a command gives the same experiment on every CPU.

    Raises UsageError, naming the flag, for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what the compiler asks for
            torch.set_float32_matmul_precision("highest")  # measures are fp32, whatever the system's default
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums over all tokens of a run
            torch.backends.cuda.enable_cudnn_sdp(False)  # which releases choose it differs, and so do its results
        else:
            keep_memory()
    except (RuntimeError, AssertionError):
        many = ", or start no more processes than there are GPUs" * ("LOCAL_RANK" in os.environ)
        raise UsageError(f"--device {device}: not available here; use --device cpu{many}") from None
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return device, precision


def keep_memory() -> None:
    """Freed memory stays with the process: else Linux takes and clears tens of megabytes anew at every step of a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # of glibc: never map, never trim, grow by 256 MB, one arena for all threads
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28), (-8, 1)):
            mallopt(option, value)


def autocast(device: torch.device, precision: str):
    """The context of a training forward pass: matrix products in bf16, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def compile_blocks(model: GPT) -> None:
    """One compiled block serves all layers. A machine without a compiler (C for a GPU, C++ for a CPU) trains uncompiled, slower."""
    torch.compiler.reset()  # what another size compiled before must not matter
    named, *usual = ("CC", "gcc", "clang") if next(model.parameters()).is_cuda else ("CXX", "c++", "g++")
    if any(map(shutil.which, [os.environ.get(named, usual[0]), *usual])):
        for block in model.blocks:
            block.compile()
    else:
        print("no C or C++ compiler found: training without torch.compile, slower")


# ---------------------------------------------------------------------------------------------- how fast

SIZES = {  # of a training step: the experiments' laptop and paper scale
    "laptop": dict(d_x=32, d_y=4, n_pair=12, n_layer=3, n_head=2, d_model=64, batch=48),
    "paper": dict(d_x=768, d_y=15, n_pair=40, n_layer=12, n_head=4, d_model=128, batch=128),
}


class ByteCounter(TorchDispatchMode):
    """Bytes in and out of every operation that is not a view: what an unfused step moves."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.total += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t))
        return out


def seconds(f, device: torch.device, repeats: int = 5, inner: int = 1) -> float:
    """Median over repeats of the time of one call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(inner):
            f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) / inner)
    return statistics.median(times[1:])


def peak_of_process() -> float:
    """Largest memory of this process so far in bytes, where the system tells."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    about = "Time training steps of R runs in one program, beside a copy and a matrix product."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8], help="numbers of runs R (default 1 4 8)")
    parser.add_argument("--scale", choices=SIZES, default="laptop", help="size of the model and the batch (default laptop)")
    parser.add_argument("--steps", type=int, default=5, help="steps in each of five blocks (default 5)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    if min(args.runs) < 1 or args.steps < 1:
        parser.error("--runs and --steps must be at least 1")
    try:
        device, precision = pick_device(args.device, args.precision)
    except UsageError as error:
        parser.error(str(error))
    size = dict(SIZES[args.scale])
    batch, pairs = size.pop("batch"), size["n_pair"]
    big = 2**28 if device.type == "cuda" else 2**25
    a, b = torch.ones(big, device=device), torch.ones(big, device=device)
    n, inner = (8192, 50) if device.type == "cuda" else (2048, 1)  # a GPU takes a while to reach its speed
    copy = 8 * big / seconds(lambda a=a, b=b: a.copy_(b), device, inner=inner)
    square = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    product = 2 * n**3 / seconds(lambda square=square: square @ square, device, inner=inner)
    del a, b, square
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {precision}, {args.scale}: {size}, batch {batch}; medians of 5 blocks of {args.steps} steps")
    print(f"copy {copy / 1e9:.0f} GB/s, {n} x {n} matrix product {product / 1e12:.3f} TFLOP/s; bytes are those of an unfused step")
    print(
        "    R  ms/step  ms/run-step   tokens/s     GB/s  of copy  TFLOP/s  of product  compile s  peak GB"
    )  # on a CPU: of the process so far
    for runs in args.runs:
        gc.collect()  # a compiled model keeps itself alive until then
        model = GPT(Config(**size), list(range(runs))).to(device)
        optimizer = Adam(model, 1e-4)
        x = torch.randn(runs, batch, pairs, size["d_x"], device=device)
        label = torch.randint(size["d_y"], (runs, batch, pairs), device=device)
        y = F.one_hot(label, size["d_y"]).float()

        def step():
            with autocast(device, precision):
                logits = model(x, y)
            cross_entropy(logits, label).mean((1, 2)).sum().backward()
            optimizer.step()

        with FlopCounterMode(display=False) as flops:
            step()
        with ByteCounter() as moved:
            step()
        if not args.no_compile:
            compile_blocks(model)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        compiling = time.perf_counter() - began
        t = seconds(step, device, inner=args.steps)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_of_process()
        print(f"{runs:5d} {1e3 * t:8.1f} {1e3 * t / runs:12.2f} {runs * batch * 2 * pairs / t:10,.0f} {moved.total / t / 1e9:8.1f} "
              f"{moved.total / t / copy:8.2f} {flops.get_total_flops() / t / 1e12:8.3f} {flops.get_total_flops() / t / product:11.2f} "
              f"{compiling:10.1f} {peak / 1e9:8.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
