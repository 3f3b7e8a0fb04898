"""The other sides of the benchmarks: nanoGPT's model written anew, and transformers' classes of the same shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoBlock(nn.Module):
    """A layer of GPT-2's shape, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        batch, time, width = x.shape
        parts = self.qkv(self.norm(x)).split(width, 2)
        q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in parts)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(gathered.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class NanoGPT(nn.Module):
    """GPT-2's shape as nanoGPT trains it: learned positions, GELU, a tied head."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, 0.0, 0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the targets."""
        return F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())

    def optimizer(self, rate: float, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)) -> Any:
        """AdamW as nanoGPT sets it up: no decay of what is not a matrix."""
        matrices = [weight for weight in self.parameters() if weight.dim() > 1]
        others = [weight for weight in self.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=betas)


def transformers_model(config: Any) -> nn.Module:
    """The class of transformers that trains a model of this configuration, with fresh weights."""
    import transformers

    classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "bert": ("BertConfig", "BertForMaskedLM"),
        "t5": ("T5Config", "T5ForConditionalGeneration"),
    }
    values = config.to_huggingface()
    for name in ("architectures", "model_type"):
        values.pop(name)
    settings, model = (getattr(transformers, name) for name in classes[config.family])
    torch.manual_seed(0)
    return model(settings(**values))
