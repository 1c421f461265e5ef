#!/usr/bin/env python3
"""The training step of the small model in plain PyTorch: the peer of `cargo bench -p mindseye-tests --bench train_step`.

    python train_step.py BATCH.safetensors SPEC.json

reads weights, one batch and the sizes that the bench wrote, computes the losses once (they must agree with ours), then
obeys lines on stdin: `step N` does N optimiser steps and `grad N` N forward and backward passes, each answered with one
line of JSON, until end of file. Needs torch and numpy only; runs on the CPU with as many threads as the bench says.
"""

import json
import struct
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F


def load(path):
    """A safetensors file, read by hand: an 8-byte length, a JSON head, raw little-endian data."""
    with open(path, "rb") as file:
        raw = file.read()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    kinds = {"F32": np.float32, "I64": np.int64}
    out = {}
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        a, b = entry["data_offsets"]
        flat = np.frombuffer(raw[8 + size + a : 8 + size + b], dtype=kinds[entry["dtype"]])
        out[name] = torch.from_numpy(flat.copy().reshape(entry["shape"]))
    return out


class Step:
    def __init__(self, tensors, spec):
        self.spec, self.dit = spec, spec["dit"]
        self.w = {k[2:]: v.requires_grad_(True) for k, v in tensors.items() if k.startswith("w.")}
        self.x = {k[2:]: v for k, v in tensors.items() if k.startswith("x.")}
        self.muon, self.matrix, self.vector = [], [], []
        for name, w in self.w.items():
            rule = spec["rules"][name]
            {"Muon": self.muon, "Matrix": self.matrix, "Vector": self.vector}[rule].append(w)
        optim = spec["optim"]
        betas = tuple(optim["betas"])
        groups = [
            {"params": self.matrix, "weight_decay": optim["weight_decay"]},
            {"params": self.vector, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=optim["lr"], betas=betas, eps=1e-8)
        self.momentum = [torch.zeros_like(w) for w in self.muon]
        self.ema = [w.detach().clone() for w in self.w.values()]

    def dense(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def rms(self, x, name):
        return F.rms_norm(x, (x.shape[-1],), self.w[name], self.dit["eps"])

    def rotate(self, x, cos, sin):
        # (batch, heads, tokens, head_dim): adjacent pairs
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def forward(self):
        x, d, w = self.x, self.dit, self.w
        dim, eps = d["heads"] * d["head_dim"], d["eps"]
        batch, _, frames = x["latents"].shape[:3]
        tokens = d["latent_height"] * d["latent_width"]

        def split(t):
            return t.view(batch, -1, d["heads"], d["head_dim"]).transpose(1, 2)

        text = F.embedding(x["ids"], w["text.shared.weight"])
        text = F.rms_norm(text, (text.shape[-1],), w["text.encoder.final_layer_norm.weight"], spec_eps(self.spec))
        text = text * x["keep"]
        h = x["latents"].permute(0, 2, 3, 4, 1).reshape(batch, frames * tokens, d["in_channels"])
        h = F.linear(h, w["patch_embedding.weight"].view(dim, -1), w["patch_embedding.bias"])
        h = h + self.dense(x["camera"].view(batch, frames * tokens, -1), "camera_embedding")
        text = self.dense(text, "condition_embedder.text_embedder.linear_1")
        text = self.dense(F.gelu(text, approximate="tanh"), "condition_embedder.text_embedder.linear_2")
        temb = F.silu(self.dense(x["time"], "condition_embedder.time_embedder.linear_1"))
        temb = self.dense(temb, "condition_embedder.time_embedder.linear_2")
        pooled = self.dense(text.mean(1), "condition_embedder.text_pool")
        temb = temb + pooled[x["row_batch"]]
        time = self.dense(F.silu(temb), "condition_embedder.time_proj").view(-1, 6, dim)
        cos = x["cos"].view(batch, 1, frames * tokens, -1)
        sin = x["sin"].view(batch, 1, frames * tokens, -1)

        def rows(t):  # one row per frame, the same for its tokens: (batch, frame, 1, dim)
            return t[x["rows"]].unsqueeze(2)

        def modulated(h, shift, scale):
            n = F.layer_norm(h, (dim,), eps=eps).view(batch, frames, tokens, dim)
            return (n * (1 + scale) + shift).view(batch, frames * tokens, dim)

        def gated(h, y, gate):
            return h + (y.view(batch, frames, tokens, dim) * gate).view(batch, frames * tokens, dim)

        for layer in range(d["layers"]):
            p = f"blocks.{layer}."
            m = [rows(t) for t in (time + w[p + "scale_shift_table"]).unbind(1)]
            n = modulated(h, m[0], m[1])
            q = split(self.rms(self.dense(n, p + "attn1.to_q"), p + "attn1.norm_q.weight"))
            k = split(self.rms(self.dense(n, p + "attn1.to_k"), p + "attn1.norm_k.weight"))
            v = split(self.dense(n, p + "attn1.to_v"))
            a = F.scaled_dot_product_attention(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v)
            a = self.dense(a.transpose(1, 2).reshape(batch, -1, dim), p + "attn1.to_out.0")
            h = gated(h, a, m[2])
            n = F.layer_norm(h, (dim,), w[p + "norm2.weight"], w[p + "norm2.bias"], eps)
            q = split(self.rms(self.dense(n, p + "attn2.to_q"), p + "attn2.norm_q.weight"))
            k = split(self.rms(self.dense(text, p + "attn2.to_k"), p + "attn2.norm_k.weight"))
            v = split(self.dense(text, p + "attn2.to_v"))
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, dim)
            h = h + self.dense(a, p + "attn2.to_out.0")
            n = self.dense(modulated(h, m[3], m[4]), p + "ffn.net.0.proj")
            h = gated(h, self.dense(F.gelu(n, approximate="tanh"), p + "ffn.net.2"), m[5])
        m = [rows(t) for t in (temb.view(-1, 1, dim) + w["scale_shift_table"]).unbind(1)]
        sample = self.dense(modulated(h, m[0], m[1]), "proj_out")
        n = F.layer_norm(h, (dim,), eps=eps)
        token = F.silu(self.dense(n, "lift.token"))
        frame = n.view(batch, frames, tokens, dim).mean(2)
        return {
            "sample": sample.view(batch, frames, tokens, -1),
            "mask": self.dense(token, "lift.mask").view(batch, frames, tokens),
            "locate": self.dense(token, "lift.locate").view(batch, frames, tokens, 2),
            "attributes": self.dense(token, "lift.attributes").view(batch, frames, tokens, -1),
            "pose": self.dense(F.silu(self.dense(frame, "lift.frame")), "lift.pose"),
        }

    def losses(self, out):
        """The same sums as the trainer's, each weight of an element precomputed by the bench."""
        x, k = self.x, self.spec["loss"]
        video = (x["video_weight"] * (out["sample"] - x["clean"]) ** 2).sum()
        pose = (x["pose_weight"] * (out["pose"] - x["pose"]) ** 2).sum()
        bce = F.binary_cross_entropy_with_logits
        mask = (x["mask_weight"] * bce(out["mask"], x["mask"], reduction="none")).sum()
        e = (out["locate"] - x["locate"]).abs()
        locate = (x["locate_weight"] * torch.where(e < 0.5, e * e, e - 0.25)).sum()
        attributes = (x["attributes_weight"] * bce(out["attributes"], x["attributes"], reduction="none")).sum()
        return k["video"] * video + pose + mask + locate + attributes

    def backward(self):
        for w in self.w.values():
            w.grad = None
        loss = self.losses(self.forward())
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def update(self):
        optim = self.spec["optim"]
        torch.nn.utils.clip_grad_norm_(list(self.w.values()), optim["clip"], foreach=True)
        self.adam.step()
        lr, mu = optim["lr"], optim["momentum"]
        for w, m in zip(self.muon, self.momentum):
            m.lerp_(w.grad, 1 - mu)
            d = orthogonalise(torch.lerp(w.grad, m, mu))
            w.mul_(1 - lr * optim["weight_decay"]).add_(d, alpha=-lr * 0.2 * max(w.shape) ** 0.5)
        torch._foreach_lerp_(self.ema, [w.detach() for w in self.w.values()], 0.001)


def spec_eps(spec):
    return spec["text_eps"]


def orthogonalise(g):
    """Four quintic Newton-Schulz steps on the short side's Gram matrix."""
    x = g / (g.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(4):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if wide else x.T


def main():
    with open(sys.argv[2]) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    step = Step(load(sys.argv[1]), spec)
    loss = step.losses(step.forward()).item()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "loss": loss}), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        began = time.perf_counter()
        for _ in range(int(count)):
            step.backward()
            if what == "step":
                step.update()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
