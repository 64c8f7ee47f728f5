"""Bundled checkpoint: the DeepSeek-V3 architecture in torch, for training on a CPU.

In: token ids [T] of several rows laid end to end. Out: the losses of the main head and of the
multi-token-prediction (MTP) layer. Truth: Transformers' `DeepseekV3ForCausalLM` on the exported
weights (see `evaluate.py`). Source: DeepSeek-V3 report, 2.1 and 2.2.
T tokens, H hidden, E experts, K experts a token, I expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The numbers of `config.json` that this recipe sets."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    num_attention_heads: int = 4
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    def config(self) -> dict:
        """The checkpoint's `config.json`."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": None,
            "rope_scaling": None,
            "routed_scaling_factor": 1.0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


@dataclass
class Rows:
    """Rows of one length, laid end to end: `rows * length` tokens and who may see whom."""

    rows: int
    length: int
    mask: Tensor | None  # [rows, 1, length, length] bool; None: causal


# With a bf16 dot (AVX-512 BF16, AMX) products of bf16 take a quarter of fp32's time; weights, sums,
# norms, softmax and the gate stay fp32.
PRODUCT = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class _Product(torch.autograd.Function):
    """`x @ weight.T` and its two gradients with operands in `PRODUCT`."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.to(PRODUCT), weight.to(PRODUCT)
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).float()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(PRODUCT)
        return (grad @ weight).float(), (grad.t() @ x).float()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, in bf16 where the machine multiplies bf16 faster."""
    return _Product.apply(x, weight) if torch.float32 != PRODUCT else F.linear(x, weight)


def linear(out_features: int, in_features: int, gain: float = 1.0) -> nn.Parameter:
    """A matrix drawn with standard deviation gain / sqrt(in_features)."""
    return nn.Parameter(torch.randn(out_features, in_features) * gain * in_features**-0.5)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of the last dimension, as DeepSeek's RoPE does."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form, without query compression."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        heads, nope, rope, v = (
            s.num_attention_heads,
            s.qk_nope_head_dim,
            s.qk_rope_head_dim,
            s.v_head_dim,
        )
        self.q_proj = linear(heads * (nope + rope), s.hidden_size)
        self.kv_a_proj_with_mqa = linear(s.kv_lora_rank + rope, s.hidden_size)
        self.kv_a_layernorm = RMSNorm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = linear(heads * (nope + v), s.kv_lora_rank)
        self.o_proj = linear(s.hidden_size, heads * v, (2 * s.num_hidden_layers) ** -0.5)
        frequency = s.rope_theta ** (-torch.arange(0, rope, 2) / rope)
        angle = torch.arange(s.max_position_embeddings)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x_TH: Tensor, groups: list[Rows]) -> Tensor:
        q = product(x_TH, self.q_proj)
        latent = product(x_TH, self.kv_a_proj_with_mqa)
        kv = product(self.kv_a_layernorm(latent[:, : self.s.kv_lora_rank]), self.kv_b_proj)
        k_rope = latent[:, self.s.kv_lora_rank :]
        out, start = [], 0
        for group in groups:
            end = start + group.rows * group.length
            out.append(self._core(q[start:end], k_rope[start:end], kv[start:end], group))
            start = end
        return product(torch.cat(out), self.o_proj)

    def _core(self, q: Tensor, k_rope: Tensor, kv: Tensor, group: Rows) -> Tensor:
        s, rows, length = self.s, group.rows, group.length
        heads, nope = s.num_attention_heads, s.qk_nope_head_dim
        cos, sin = self.cos[:length], self.sin[:length]
        q = q.view(rows, length, heads, -1).transpose(1, 2)
        kv = kv.view(rows, length, heads, -1).transpose(1, 2)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), -1)
        k_rope = rotate(k_rope.view(rows, 1, length, -1), cos, sin).expand(-1, heads, -1, -1)
        k = torch.cat((kv[..., :nope], k_rope), -1)
        out = F.scaled_dot_product_attention(
            q, k, kv[..., nope:], attn_mask=group.mask, is_causal=group.mask is None
        )
        return out.transpose(1, 2).reshape(rows * length, -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, s.hidden_size)
        self.up_proj = linear(width, s.hidden_size)
        self.down_proj = linear(s.hidden_size, width, (2 * s.num_hidden_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return product(
            F.silu(product(x, self.gate_proj)) * product(x, self.up_proj), self.down_proj
        )


class _Experts(torch.autograd.Function):
    """Every expert's SwiGLU over the rows routed to it, one product an expert and matrix."""

    @staticmethod
    def forward(ctx, x, topk_idx, topk_weight, gate_up, down):
        experts, width = down.shape[0], down.shape[2]
        k = topk_idx.shape[1]
        order = topk_idx.flatten().argsort()
        counts = topk_idx.flatten().bincount(minlength=experts).tolist()
        token = order // k
        weight = topk_weight.flatten()[order].unsqueeze(1)
        gate_up, down = gate_up.to(PRODUCT), down.to(PRODUCT)
        rows = x.to(PRODUCT).index_select(0, token)
        hidden = rows.new_empty(len(order), 2 * width)
        act = rows.new_empty(len(order), width)
        y = torch.empty_like(rows)
        for e, part in enumerate(_parts(counts)):
            torch.mm(rows[part], gate_up[e].t(), out=hidden[part])
            torch.mul(F.silu(hidden[part, :width]), hidden[part, width:], out=act[part])
            torch.mm(act[part], down[e].t(), out=y[part])
        out = torch.zeros_like(x).index_add_(0, token, y * weight)
        ctx.save_for_backward(rows, hidden, act, y, weight, order, token, gate_up, down)
        ctx.counts, ctx.k, ctx.shape = counts, k, topk_weight.shape
        return out

    @staticmethod
    def backward(ctx, grad_out):
        rows, hidden, act, y, weight, order, token, gate_up, down = ctx.saved_tensors
        width = down.shape[2]
        grad_y = grad_out.index_select(0, token)
        grad_weight = (grad_y * y).sum(1)
        grad_y = (grad_y * weight).to(PRODUCT)
        grad_rows = torch.empty_like(rows)
        grad_hidden = torch.empty_like(hidden)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for e, part in enumerate(_parts(ctx.counts)):
            grad_act = grad_y[part] @ down[e]
            torch.mm(grad_y[part].t(), act[part], out=grad_down[e])
            gate, up = hidden[part, :width], hidden[part, width:]
            sig = torch.sigmoid(gate)
            silu = gate * sig
            grad_hidden[part, width:] = grad_act * silu
            grad_hidden[part, :width] = grad_act * up * (sig + silu * (1 - sig))
            torch.mm(grad_hidden[part], gate_up[e], out=grad_rows[part])
            torch.mm(grad_hidden[part].t(), rows[part], out=grad_gate_up[e])
        grad_x = torch.zeros_like(grad_out).index_add_(0, token, grad_rows.to(grad_out.dtype))
        grad_topk = torch.empty_like(grad_weight).scatter_(0, order, grad_weight).view(ctx.shape)
        return grad_x, None, grad_topk, grad_gate_up.float(), grad_down.float()


def _parts(counts: list[int]) -> list[slice]:
    parts, start = [], 0
    for count in counts:
        parts.append(slice(start, start + count))
        start += count
    return parts


class MoE(nn.Module):
    """Routed experts by a sigmoid gate with an auxiliary-loss-free bias, and a shared expert."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        width, hidden, gain = (
            s.moe_intermediate_size,
            s.hidden_size,
            (2 * s.num_hidden_layers) ** -0.5,
        )
        self.k = s.num_experts_per_tok
        self.gate = linear(s.n_routed_experts, hidden)
        self.register_buffer("bias", torch.zeros(s.n_routed_experts))
        self.register_buffer("load", torch.zeros(s.n_routed_experts), persistent=False)
        self.gate_up = nn.Parameter(
            torch.randn(s.n_routed_experts, 2 * width, hidden) * hidden**-0.5
        )
        self.down = nn.Parameter(
            torch.randn(s.n_routed_experts, hidden, width) * gain * width**-0.5
        )
        self.shared_experts = MLP(s, width * s.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.gate).sigmoid()
        topk_idx = (scores.detach() + self.bias).topk(self.k, dim=-1).indices
        weight = scores.gather(1, topk_idx)
        weight = weight / weight.sum(1, keepdim=True)
        if self.training:
            self.load += topk_idx.flatten().bincount(minlength=len(self.load))
        return _Experts.apply(x, topk_idx, weight, self.gate_up, self.down) + self.shared_experts(x)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, s: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s, s.intermediate_size) if dense else MoE(s)

    def forward(self, x: Tensor, groups: list[Rows]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), groups)
        return x + self.mlp(self.post_attention_layernorm(x))


class _CrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ head.T`, its gradients made on the way forward.

    Logits exist for 512 rows at a time, so they stay in the cache and are never kept.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, weight):
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros(())
        hidden, head = hidden.to(PRODUCT), head.to(PRODUCT)
        for start in range(0, len(labels), 512):
            part = slice(start, start + 512)
            logits = (hidden[part] @ head.t()).float()
            logp = F.log_softmax(logits, -1)
            picked = logp.gather(1, labels[part, None])
            total -= (picked[:, 0] * weight[part]).sum()
            grad = logp.exp_()
            grad.scatter_add_(1, labels[part, None], torch.full_like(picked, -1.0))
            grad *= weight[part, None]
            grad = grad.to(PRODUCT)
            grad_hidden[part] = grad @ head
            grad_head += grad.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_total, grad_head * grad_total, None, None


class MTP(nn.Module):
    """The multi-token-prediction layer: from h_i and token i+1 it predicts token i+2."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.enorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.hnorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.eh_proj = linear(s.hidden_size, 2 * s.hidden_size)
        self.layer = Layer(s, dense=False)
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, h: Tensor, embedded_next: Tensor, groups: list[Rows]) -> Tensor:
        x = product(torch.cat((self.enorm(embedded_next), self.hnorm(h)), -1), self.eh_proj)
        return self.norm(self.layer(x, groups))


class Model(nn.Module):
    """The main model and its MTP layer, which share embedding and head."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed_tokens = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size) * 0.1)
        self.layers = nn.ModuleList(
            Layer(s, i < s.first_k_dense_replace) for i in range(s.num_hidden_layers)
        )
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.lm_head = linear(s.vocab_size, s.hidden_size)
        self.mtp = MTP(s)

    def hidden(self, tokens_T: Tensor, groups: list[Rows]) -> Tensor:
        """The main model's output after its final norm, [T, H]."""
        x = F.embedding(tokens_T, self.embed_tokens)
        for layer in self.layers:
            x = layer(x, groups)
        return self.norm(x)

    def mtp_hidden(self, h: Tensor, tokens_T: Tensor, groups: list[Rows]) -> Tensor:
        """The MTP layer's output: row i, times the head, predicts token i + 2 of its row."""
        embedded = F.embedding(tokens_T.roll(-1), self.embed_tokens)
        return self.mtp(h, embedded, groups)

    def loss(self, hidden: Tensor, labels_T: Tensor, weight_T: Tensor) -> Tensor:
        """Cross entropy summed over the labelled rows; a label of -1 is none."""
        rows = (labels_T >= 0).nonzero()[:, 0]
        return _CrossEntropy.apply(
            hidden.index_select(0, rows), self.lm_head, labels_T[rows], weight_T[rows]
        )

    def moe_layers(self) -> list[MoE]:
        """All MoE blocks, the MTP layer's last."""
        blocks = [layer.mlp for layer in [*self.layers, self.mtp.layer]]
        return [block for block in blocks if isinstance(block, MoE)]
