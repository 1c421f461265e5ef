#!/usr/bin/env python3
"""What a user would otherwise run: the Wan2.2-5B DiT (random weights, bf16) in plain PyTorch, at the paper's size.

Times one joint forward (context + target), the cached variant (target queries over stored context keys and values)
and, with --compile, the same under torch.compile. Prints one JSON document. Needs PyTorch and a CUDA device
(--device cpu --small to try it anywhere). Sizes: 85 + 46 latents of 104 tokens.
"""
import argparse, json, time
import torch, torch.nn as nn, torch.nn.functional as F

a = argparse.ArgumentParser()
a.add_argument("--device", default="cuda"); a.add_argument("--small", action="store_true"); a.add_argument("--compile", action="store_true")
a.add_argument("--layers", type=int, default=30); a.add_argument("--dim", type=int, default=3072); a.add_argument("--ffn", type=int, default=14336)
a.add_argument("--heads", type=int, default=24); a.add_argument("--ctx", type=int, default=85); a.add_argument("--tgt", type=int, default=46)
a.add_argument("--tokens", type=int, default=104); a.add_argument("--text", type=int, default=512); a.add_argument("--runs", type=int, default=7)
o = a.parse_args()
if o.small: o.layers, o.dim, o.ffn, o.heads, o.ctx, o.tgt, o.tokens, o.runs = 2, 96, 224, 4, 5, 3, 6, 2
dev, dt = torch.device(o.device), torch.bfloat16
torch.manual_seed(0); torch.set_grad_enabled(False)
D, H, hd = o.dim, o.heads, o.dim // o.heads


def rms(x, w): return F.rms_norm(x, (x.shape[-1],), w, 1e-6)
def rope(x, cos, sin):
    x = x.unflatten(-1, (-1, 2)); p, q = x[..., 0], x[..., 1]
    return torch.stack([p * cos - q * sin, p * sin + q * cos], -1).flatten(-2)
def heads(x): return x.unflatten(-1, (H, hd)).transpose(1, 2)


class Block(nn.Module):
    def __init__(s):
        super().__init__()
        lin = lambda i, u: nn.Linear(i, u, device=dev, dtype=dt)
        s.q, s.k, s.v, s.o = (lin(D, D) for _ in range(4)); s.cq, s.ck, s.cv, s.co = (lin(D, D) for _ in range(4))
        s.f1, s.f2 = lin(D, o.ffn), lin(o.ffn, D); s.mod = nn.Parameter(torch.randn(1, 6, D, device=dev) * .02)
        s.ng = nn.ParameterList([nn.Parameter(torch.ones(D, device=dev, dtype=dt)) for _ in range(4)])
        s.n3 = nn.LayerNorm(D, eps=1e-6, device=dev)
    def forward(s, x, temb, text, cos, sin, cache=None, emit=False):
        m = (s.mod[:, None] + temb).unbind(2)                                   # temb: (1, tokens or 1, 6, D) float32
        h = (F.layer_norm(x.float(), (D,), eps=1e-6) * (1 + m[1]) + m[0]).to(dt)
        q, k, v = rms(s.q(h), s.ng[0]), rms(s.k(h), s.ng[1]), heads(s.v(h))
        q, k = rope(heads(q), cos, sin), rope(heads(k), cos, sin)
        kv = (k, v) if emit else None
        if cache is not None: k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        at = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = (x.float() + s.o(at).float() * m[2]).to(dt)
        h = s.n3(x.float()).to(dt)
        at = F.scaled_dot_product_attention(heads(rms(s.cq(h), s.ng[2])), heads(rms(s.ck(text), s.ng[3])), heads(s.cv(text)))
        x = x + s.co(at.transpose(1, 2).flatten(2))
        h = (F.layer_norm(x.float(), (D,), eps=1e-6) * (1 + m[4]) + m[3]).to(dt)
        x = (x.float() + s.f2(F.gelu(s.f1(h), approximate="tanh")).float() * m[5]).to(dt)
        return (x, kv) if emit else x


blocks = nn.ModuleList([Block() for _ in range(o.layers)])
def tables(n):
    ang = torch.rand(n, hd // 2, device=dev) * 6; return ang.cos().to(dt), ang.sin().to(dt)
def run(x, temb, text, cos, sin, caches=None):
    for i, b in enumerate(blocks): x = b(x, temb, text, cos, sin, None if caches is None else caches[i])
    return x
nc, nt = o.ctx * o.tokens, o.tgt * o.tokens
text = torch.randn(1, o.text, D, device=dev, dtype=dt)
rnd = lambda n: torch.randn(1, n, D, device=dev, dtype=dt)
temb2 = torch.randn(1, nc + nt, 6, D, device=dev) * .02; tembt = temb2[:, nc:].contiguous()
caches = [(torch.randn(1, H, nc, hd, device=dev, dtype=dt), torch.randn(1, H, nc, hd, device=dev, dtype=dt)) for _ in blocks]
sync = (lambda: torch.cuda.synchronize()) if dev.type == "cuda" else (lambda: None)


def clock(f):
    for _ in range(2): f()
    sync(); t = []
    for _ in range(o.runs):
        s = time.perf_counter(); f(); sync(); t.append(time.perf_counter() - s)
    return sorted(t)[len(t) // 2]


def flops(q, kv): return o.layers * (q * (12 * D * D + 4 * D * o.ffn) + 4 * q * kv * D + 4 * q * o.text * D + 4 * o.text * D * D)
fn = torch.compile(run) if o.compile else run
xj, xt, tj, tt = rnd(nc + nt), rnd(nt), tables(nc + nt), tables(nt)
j, c = clock(lambda: fn(xj, temb2, text, *tj)), clock(lambda: fn(xt, tembt, text, *tt, caches))
out = dict(device=torch.cuda.get_device_name() if dev.type == "cuda" else "cpu", torch=torch.__version__, compiled=o.compile, dtype="bf16",
           layers=o.layers, tokens=dict(context=nc, target=nt), joint_s=j, cached_s=c, joint_tflops=flops(nc + nt, nc + nt) / j / 1e12,
           cached_tflops=flops(nt, nc + nt) / c / 1e12, joint_flop=flops(nc + nt, nc + nt), cached_flop=flops(nt, nc + nt),
           paper_50x2_s=j * 100, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if dev.type == "cuda" else None)
print(json.dumps(out))
