"""What learns: R independent GPT-2s in one program.

Every parameter and every activation has a leading run axis, so one batched matmul moves all runs of a figure.
Nothing crosses that axis: the gradient of the summed loss is each run's own gradient, and Adam is elementwise.
Axis letters, here and in every file: r run, b batch, n pair, t token, d dim, h head, k block, f factor.

Architecture and initialisation are GPT-2's. x and y share one linear read-in, as in the paper's code.
Run by itself it is a benchmark: how fast does this machine train R runs in one program?
"""

import argparse
import ctypes
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from tasks import UsageError, cross_entropy

WRITTEN_OUT = "cpu"  # where GELU and attention are written out, which is faster there


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
    def initialise(self, seeds: list[int], number: int = 0) -> None:
        """nn.Linear's default, run r from seeds[r]; for read-outs that a script adds to a GPT, each with its number."""
        bound = self.weight.shape[1] ** -0.5
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(2**27 * number + seed)  # of which torch takes 32 bits
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
    """GPT-2's GELU, 0.5 x (1 + tanh(u)) = x sigmoid(2u): compiled for a CPU the exponential is the faster one."""
    if x.device.type != WRITTEN_OUT:
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

    def forward(self, x: torch.Tensor, tokens: int, mixing: str = "attention") -> torch.Tensor:
        mixed = self.norm_1(x)
        if mixing == "attention":  # else the authors' probe: the (normed) input itself, so no token sees another
            q, k, v = rearrange(self.qkv(mixed), "r (b t) (c h d) -> c (r b) h t d", c=3, h=self.n_head, t=tokens)
            if x.device.type != WRITTEN_OUT:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:  # written out: on a CPU the fused kernel's backward is slower than this at 20 to 80 tokens
                future = torch.full((tokens, tokens), -math.inf, dtype=q.dtype).triu(1)
                mixed = ((q @ k.mT) * q.shape[-1] ** -0.5 + future).softmax(-1) @ v
            mixed = self.attention_out(rearrange(mixed, "(r b) h t d -> r (b t) (h d)", r=len(x)))
        x = x + mixed
        return x + self.mlp_out(gelu(self.mlp_in(self.norm_2(x))))


class GPT(nn.Module):
    """R GPT-2s for sequences x_1 y_1 ... x_n y_n. Run r is initialised from seeds[r] alone.

    forward(x, y) -> logits (r, b, n, d_y), the prediction of each y from its x and the pairs before it.
    x: vectors (r, b, n, d_x), or words (r, b, n, n_token) when config.n_word; y: one-hot labels or numbers
    (r, b, n, d_y). y=None leaves the labels out: with n = 1 that is an input without any context.
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
        for run, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, p in self.named_parameters():
                weights = p.detach()[run]
                if name.startswith(("read_in", "read_out")):  # nn.Linear's default, as in the authors' code
                    bound = getattr(self, name.split(".")[0]).weight.shape[1] ** -0.5
                    weights.uniform_(-bound, bound, generator=generator)
                elif name.endswith("_out.weight"):  # the two projections that write to the residual stream
                    weights.normal_(0, 0.02 / math.sqrt(2 * config.n_layer), generator=generator)
                elif name.endswith(("qkv.weight", "mlp_in.weight", "position", "words")):
                    weights.normal_(0, 0.02, generator=generator)

    def embed(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """Tokens before the first block, (r, b, tokens, d_model)."""
        if self.config.n_word:
            row = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1) * self.config.n_word
            tokens = F.embedding(x + row, self.words.flatten(0, 1))
        else:
            tokens = (x.flatten(1, 2) @ self.read_in.weight[:, : x.shape[-1]]).unflatten(1, (*x.shape[1:3], 1))
            tokens = tokens + self.read_in.bias[:, :, None, None].to(tokens.dtype)
        if y is not None:  # a one-hot matmul, not a gather: its backward is a matmul as well
            label = y.flatten(1, 2) @ self.read_in.weight[:, : y.shape[-1]] + self.read_in.bias
            tokens = torch.cat([tokens, label.unflatten(1, (*y.shape[1:3], 1)).to(tokens.dtype)], dim=3)
        tokens = rearrange(tokens, "r b n t d -> r b (n t) d")
        return tokens + self.position[:, None, : tokens.shape[2]]

    def forward(self, x, y=None, mixing: str = "attention", hidden: bool = False):
        h = self.embed(x, y)
        batch, tokens = h.shape[1:3]
        h, states = h.flatten(1, 2), []
        for block in self.blocks:
            call = block if torch.is_grad_enabled() else block.forward  # measures have other shapes: not compiled
            h = call(h, tokens, mixing)
            if hidden:
                states.append(h.unflatten(1, (batch, tokens)))
        at_x = self.at_x(h.unflatten(1, (batch, tokens)), with_labels=y is not None)
        logits = self.read_out(self.norm(at_x.flatten(1, 2))).unflatten(1, at_x.shape[1:3])
        return (logits, states) if hidden else logits

    def at_x(self, states: torch.Tensor, with_labels: bool = True) -> torch.Tensor:
        """States (r, b, tokens, d) at the last token of each x, where its y is predicted: (r, b, n, d)."""
        t = self.config.n_token
        return states[:, :, t - 1 :: t + with_labels]


class Adam:
    """Adam (Kingma & Ba 2015; its betas, 0.9 and 0.999). A number, or one per run: lr, eps, decoupled weight_decay, and
    clip of the norm of a run's gradient (inf = off); kept as (r, 1). Moments (r, all parameters): few large calls."""

    def __init__(self, model: nn.Module, lr, eps=1e-8, weight_decay=0.0, clip=math.inf):
        self.params = list(model.parameters())
        runs, device = len(self.params[0]), self.params[0].device
        settings = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in (lr, eps, weight_decay, clip)]
        self.lr, self.eps, self.weight_decay, self.clip = (v.expand(runs).clone().view(-1, 1) for v in settings)
        self.clips = bool(torch.isfinite(torch.as_tensor(clip)).any())  # on the CPU: asking a GPU would stall it
        self.sizes = [p[0].numel() for p in self.params]
        self.mean, self.square = torch.zeros(2, runs, sum(self.sizes), dtype=self.params[0].dtype, device=device)
        self.beta_t = torch.ones((2, runs, 1), device=device)  # 0.9^t, 0.999^t of each run, which may start afresh

    @torch.no_grad()
    def step(self) -> None:
        grad = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten(1) for p in self.params], 1)
        if self.clips:
            grad *= (self.clip / grad.norm(dim=1, keepdim=True)).clamp(max=1.0)
        self.beta_t = torch.stack((self.beta_t[0] * 0.9, self.beta_t[1] * 0.999))  # a power rounds by a run's place
        step, scale = self.lr / (1 - self.beta_t[0]), 1 - self.beta_t[1]
        self.mean.lerp_(grad, 0.1)
        self.square.lerp_(grad * grad, 0.001)
        change = step * self.mean / (self.square / scale).sqrt_().add_(self.eps)
        keep = (1 - self.lr * self.weight_decay)[..., None]  # (r, 1, 1)
        for p, part in zip(self.params, change.split(self.sizes, 1)):
            p.mul_(keep).sub_(part.view_as(p))
            p.grad = None

    def state_dict(self) -> dict:
        return {key: vars(self)[key] for key in ("mean", "square", "beta_t", "lr")}  # a schedule may have changed lr

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({key: state[key] for key in self.state_dict()})


def pick_device(device: str, precision: str) -> tuple[torch.device, str]:
    """--device and --precision, with auto resolved: a GPU if there is one; bf16 on a GPU that multiplies it, else fp32,
    so that a command is the same experiment on every CPU. Raises UsageError for a device that is not there."""
    name = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    local = int(os.environ["LOCAL_RANK"]) if torch.distributed.is_torchelastic_launched() else 0
    try:  # torchrun: a GPU for each process
        found = torch.zeros(1, device=torch.device("cuda", local) if name == "cuda" else name).device
    except (RuntimeError, AssertionError, ImportError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: not available here; use --device cpu, or fewer processes")
    fast = found.type == "cuda" and torch.cuda.get_device_capability(found) >= (8, 0)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # what the compiler asks for
        torch.set_float32_matmul_precision("highest")  # measures are fp32, whatever the system's default
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums over all tokens of a run
        torch.backends.cuda.enable_cudnn_sdp(False)  # which releases choose it differs, and so do its results
    elif sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # freed memory stays with the process, else Linux clears tens of megabytes anew at every step; glibc's
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX: never map, never trim, grow by 256 MB, one arena
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28), (-8, 1)):
            mallopt(option, value)
    return found, precision.replace("auto", "bf16" if fast else "fp32")


def compile_blocks(model: GPT) -> None:
    """One compiled block serves all layers. Without a compiler (C++, for a GPU C) training is uncompiled and slower."""
    named, *usual = ("CC", "gcc", "clang") if next(model.parameters()).is_cuda else ("CXX", "c++", "g++")
    if any(map(shutil.which, [os.environ.get(named, usual[0]), *usual])):
        for block in model.blocks:
            block.compile()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps of R runs in one program.")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8], help="numbers of runs R (default 1 4 8)")
    parser.add_argument("--scale", choices=("laptop", "paper"), default="laptop", help="size of model and batch")
    args = parser.parse_args()
    device, precision = pick_device("auto", "auto")
    config, batch = Config(n_layer=3, n_head=2), 48
    side = 8192 if device.type == "cuda" else 1024  # of the square product
    if args.scale == "paper":
        config, batch = Config(d_x=768, d_y=15, n_pair=40, n_layer=12, d_model=128), 128
    print(f"{device}, {torch.get_num_threads()} threads, {precision}, batch {batch}, {config}")
    for runs in args.runs:
        torch.compiler.reset()  # else the next R is compiled for any R, which is slower
        model = GPT(config, list(range(runs))).to(device)
        compile_blocks(model)
        optimizer, square = Adam(model, 1e-4), torch.randn(side, side, device=device)
        x = torch.randn(runs, batch, config.n_pair, config.d_x, device=device)
        label = torch.randint(config.d_y, (runs, batch, config.n_pair), device=device)
        y = F.one_hot(label, config.d_y).float()
        times = []
        for _ in range(9):  # product and step in turn: their ratio does not depend on how busy the machine is
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                torch.mm(square, square)[0, 0].item()  # reading a number waits for a GPU
                between = time.perf_counter()
                logits = model(x, y)
            cross_entropy(logits, label).mean((1, 2)).sum().backward()
            optimizer.step()
            optimizer.beta_t[0, 0].item()
            times.append((between - began, time.perf_counter() - between))
        product, step = torch.tensor(times[2:]).median(0).values.tolist()  # the first ones compile
        took, rate = step / runs, 2e-9 * side**3 / product
        print(f"R = {runs:2d}: {1e3 * took:.2f} ms a run-step; {side} x {side} product {rate:,.0f} GFLOP/s; ", end="")
        print(f"a run-step takes as long as {took * rate:.2f} GFLOP of product", flush=True)


if __name__ == "__main__":
    main()
