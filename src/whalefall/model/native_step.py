"""Model room: the forward step as one native call.

In: `Weights` in place. Out: a `step.Step` whose calls hand two structs to native/step.cpp; the
products, experts, gate and attention are their rooms' own native entries, passed by address.
Agrees with `reference.forward`; a token's bits depend on nothing but its own sequence.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from whalefall.attention.native_calls import paged_entry
from whalefall.attention.structs import TYPES
from whalefall.ep.routing import library as gate_library
from whalefall.errors import WhalefallError
from whalefall.gemm.linear import refuse_mixed_kinds, weight_struct
from whalefall.gemm.native_calls import library as gemm_library
from whalefall.gemm.structs import ACTIVATIONS, FORMS, Expert, Weight
from whalefall.model import step_library
from whalefall.model.config import ModelConfig
from whalefall.model.gate import rules
from whalefall.model.step import StepBatch
from whalefall.model.weights import Experts, Layer, Linear, Mlp, MtpLayer, Weights

__all__ = ["STEP_ACTIVATIONS", "NativeStep"]

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
STEP_ACTIVATIONS = {"fp32": "keep", "w8a8": "e4m3", "w8a16": "half"}
_ATTENTION_TYPES = {
    np.dtype(np.float32): TYPES["float32"],
    np.dtype(ml_dtypes.bfloat16): TYPES["bfloat16"],
    np.dtype(np.uint8): TYPES["fp8"],
}


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _P),
        ("post_norm", _P),
        ("q_a", Weight),
        ("q_a_norm", _P),
        ("q_b", Weight),
        ("kv_a", Weight),
        ("kv_a_norm", _P),
        ("k_up", _P),
        ("v_up", _P),
        ("o", Weight),
        ("experts", _P),
        ("dense", _P),
        ("gate", Weight),
        ("gate_bias", _P),
        ("load", _P),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("logits", "bias", "index", "weight")),
        *((name, _N) for name in ("tokens", "experts", "top_k", "groups", "top_groups")),
        *((name, _I) for name in ("softmax", "normalize")),
        ("scale", _F),
    )


class _Mtp(ctypes.Structure):
    _fields_ = (("enorm", _P), ("hnorm", _P), ("eh_proj", Weight))


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", _P),
        *((name, _N) for name in ("num_layers", "hidden", "heads", "nope", "rope", "value")),
        *((name, _N) for name in ("latent", "q_lora", "num_experts")),
        ("embed", Weight),
        ("head", Weight),
        ("norm", _P),
        ("rope_table", _P),
        ("mtp", _P),
        ("gate", _Gate),
        *((name, _F) for name in ("eps", "latent_eps", "softmax_scale")),
        *((name, _I) for name in ("activations", "bf16_rows")),
        *((name, _P) for name in ("linear", "run_experts", "route", "attention")),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("tokens", "positions", "tables")),
        ("count", _N),
        ("logit_rows", _P),
        ("num_logit_rows", _N),
        ("kv", _P),
        ("kv_layer_bytes", _N),
        ("kv_blocks", _N),
        ("kv_type", _I),
        ("form", _I),
        ("logits", _P),
        ("hidden", _P),
        ("workspace", _P),
    )


def _address(entry: Any) -> int:
    """The address of a C function, to be called from another unit."""
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


class _Builder:
    """Fills the native structs, and keeps alive what they point to."""

    def __init__(self, config: ModelConfig, expert_load: np.ndarray) -> None:
        self.config = config
        self.expert_load = expert_load
        self.keep: list[Any] = []

    def vector(self, array: np.ndarray | None) -> int | None:
        if array is None:
            return None
        self.keep.append(array)
        return int(array.ctypes.data)

    def weight(self, linear: Linear | None, name: str) -> Weight:
        if linear is None:
            return Weight()
        self.keep.append(linear)
        return weight_struct(linear.weight, linear.scale, name)

    def heads(self, kv_b: Linear, start: int, count: int) -> int:
        """Rows [start, start + count) of each head of kv_b, as parts with their global row."""
        c = self.config
        pitch = c.qk_nope_head_dim + c.v_head_dim
        parts = (Weight * c.num_heads)()
        for head in range(c.num_heads):
            first = head * pitch + start
            rows = kv_b.weight[first : first + count]
            parts[head] = weight_struct(rows, kv_b.scale, "kv_b", first_row=first)
        self.keep += [kv_b, parts]
        return ctypes.addressof(parts)

    def mlps(self, mlps: tuple[Mlp, ...], name: str) -> int:
        structs = (Expert * len(mlps))()
        for struct, mlp in zip(structs, mlps, strict=True):
            struct.w1 = self.weight(mlp.gate, "gate_proj")
            struct.w3 = self.weight(mlp.up, "up_proj")
            struct.w2 = self.weight(mlp.down, "down_proj")
        refuse_mixed_kinds(f"model: {name}", structs)
        self.keep.append(structs)
        return ctypes.addressof(structs)

    def layer(self, layer: Layer, index: int) -> _Layer:
        a, c = layer.attention, self.config
        native = _Layer(
            input_norm=self.vector(layer.input_norm),
            post_norm=self.vector(layer.post_norm),
            q_a=self.weight(a.q_a, "q_a_proj"),
            q_a_norm=self.vector(a.q_a_norm),
            q_b=self.weight(a.q_b if a.q is None else a.q, "q_b_proj"),
            kv_a=self.weight(a.kv_a, "kv_a_proj"),
            kv_a_norm=self.vector(a.kv_a_norm),
            k_up=self.heads(a.kv_b, 0, c.qk_nope_head_dim),
            v_up=self.heads(a.kv_b, c.qk_nope_head_dim, c.v_head_dim),
            o=self.weight(a.o, "o_proj"),
        )
        if isinstance(layer.mlp, Experts):
            shared = layer.mlp.shared
            native.experts = self.mlps(layer.mlp.experts, f"layer {index}")
            native.dense = self.mlps((shared,), f"layer {index}, shared") if shared else None
            native.gate = self.weight(layer.mlp.gate_weight, "gate")
            native.gate_bias = self.vector(layer.mlp.gate_bias)
            native.load = self.expert_load[index].ctypes.data
        else:
            native.dense = self.mlps((layer.mlp,), f"layer {index}, dense")
        return native

    def model(self, weights: Weights, compute: str, max_positions: int) -> _Model:
        c = self.config
        layers = (_Layer * c.num_layers)()
        for index, layer in enumerate(weights.layers):
            layers[index] = self.layer(layer, index)
        self.keep.append(layers)
        gemm = gemm_library()
        return _Model(
            layers=ctypes.addressof(layers),
            num_layers=c.num_layers,
            hidden=c.hidden_size,
            heads=c.num_heads,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            value=c.v_head_dim,
            latent=c.kv_lora_rank,
            q_lora=c.q_lora_rank or 0,
            num_experts=c.num_experts,
            embed=self.weight(Linear(weights.embed), "embed_tokens"),
            head=self.weight(weights.head, "lm_head"),
            norm=self.vector(weights.norm),
            rope_table=self.vector(c.rope.table(max_positions)),
            gate=self.gate(),
            eps=c.rms_norm_eps,
            latent_eps=c.norm_eps_latent,
            softmax_scale=c.softmax_scale,
            activations=ACTIVATIONS[STEP_ACTIVATIONS[compute]],
            bf16_rows=compute != "fp32",
            linear=_address(gemm.wf_linear),
            run_experts=_address(gemm.wf_experts),
            route=_address(gate_library().wf_route),
        )

    def mtp(self, main: _Model, mtp: MtpLayer) -> _Model:
        """The main model with the MTP layer in place of its layers, norm and head."""
        native = _Model.from_buffer_copy(main)
        layers = (_Layer * 1)(self.layer(mtp.layer, self.config.num_layers))
        before = _Mtp(
            enorm=self.vector(mtp.enorm),
            hnorm=self.vector(mtp.hnorm),
            eh_proj=self.weight(mtp.eh_proj, "eh_proj"),
        )
        self.keep += [layers, before]
        native.layers, native.num_layers = ctypes.addressof(layers), 1
        native.mtp = ctypes.addressof(before)
        native.norm = self.vector(mtp.norm)
        native.head = self.weight(mtp.head, "shared_head.head")
        return native

    def gate(self) -> _Gate:
        if not self.config.num_experts:
            return _Gate()
        rule = rules(self.config)
        return _Gate(
            experts=self.config.num_experts,
            top_k=rule["top_k"],
            groups=rule["num_groups"],
            top_groups=rule["topk_groups"],
            softmax=rule["scoring"] == "softmax",
            normalize=rule["normalize"],
            scale=rule["scale"],
        )


class NativeStep:
    """A `step.Step` in C++."""

    def __init__(
        self, weights: Weights, config: ModelConfig, compute: str, max_positions: int
    ) -> None:
        """Compile (or find compiled) the kernels, and describe the model to them.

        Raises: MissingError without a compiler; DtypeError for experts of a layer in two dtypes.
        """
        self.hidden_size = config.hidden_size
        # the row after the layers' is the MTP layer's own
        load = np.zeros((config.num_layers + 1, max(config.num_experts, 1)), np.int64)
        self.expert_load = load[:-1]
        self._library = step_library.library()
        self._config = config
        self._bf16_q = compute != "fp32"  # core attention in bf16, as published
        self._entries: dict[int, int] = {}
        self._builder = _Builder(config, load)
        self._model = self._builder.model(weights, compute, max_positions)
        self._mtp = self._builder.mtp(self._model, weights.mtp[0]) if weights.mtp else None

    def __call__(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray:
        """See `step.Step`. Raises: WhalefallError where a layer's router meets a NaN."""
        return self._run(self._model, batch, kv, hidden)

    def mtp(self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `step.Step`. Raises: as a step."""
        assert self._mtp is not None
        return self._run(self._mtp, batch, kv[self._config.num_layers :], hidden)

    def _run(
        self, model: _Model, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None
    ) -> np.ndarray:
        native, keep = self._batch(model, batch, kv, hidden)
        self._check(self._library.wf_step(ctypes.addressof(model), ctypes.addressof(native)))
        return keep[0]

    def _check(self, status: int) -> None:
        if status:
            raise WhalefallError(
                f"model: NaN reached the router of layer {-1 - status}; is the checkpoint intact?"
            )

    def _batch(
        self, model: _Model, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None
    ) -> tuple[_Batch, list[np.ndarray]]:
        """The native batch, and what it points to: the logits first."""
        kind = _ATTENTION_TYPES[kv.dtype]
        model.attention = self._attention(kind)
        logits = np.empty((len(batch.logit_rows), self._config.vocab_size), np.float32)
        sequences, width = batch.block_tables.shape[0], batch.block_tables.strides[0]
        first = batch.block_tables.ctypes.data
        rows = np.uint64(first) + np.uint64(width) * np.arange(sequences, dtype=np.uint64)
        tables = rows.repeat(batch.starts[1:] - batch.starts[:-1])
        native = _Batch(
            tokens=batch.tokens.ctypes.data,
            positions=batch.positions.ctypes.data,
            tables=tables.ctypes.data,
            count=len(batch.tokens),
            logit_rows=batch.logit_rows.ctypes.data,
            num_logit_rows=len(batch.logit_rows),
            kv=kv.ctypes.data,
            kv_layer_bytes=kv.strides[0],
            kv_blocks=kv.shape[1],
            kv_type=kind,
            form=FORMS["many" if batch.in_prompt else "few"],
            logits=logits.ctypes.data,
            hidden=None if hidden is None else hidden.ctypes.data,
        )
        return native, [logits, tables]

    def _attention(self, kind: int) -> int:
        """The address of core attention over a cache of this kind."""
        if kind not in self._entries:
            entry = paged_entry(kind, self._config.num_heads, self._bf16_q)
            self._entries[kind] = _address(entry)
        return self._entries[kind]

    def parts(
        self, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None = None
    ) -> StepParts:
        """The step of `batch` in pieces, for whoever moves tokens between them."""
        return StepParts(self, batch, kv, hidden)


class _PartCall(ctypes.Structure):
    _fields_ = (
        ("part", _I),
        ("unused", _I),
        ("layer", _N),
        *((name, _P) for name in ("routed", "normed", "index", "weight")),
    )


_PARTS = ("EMBED", "ATTN-0", "ATTN-1", "SHARED", "FINISH", "LOGITS")


class StepParts:
    """One batch's step, piece by piece: EMBED; for each layer ATTN-0, ATTN-1, SHARED, FINISH; then
    LOGITS. Several may be under way at once, each with a workspace of its own.

    Attributes:
        logits: [R, vocab] fp32, filled by LOGITS.
        normed: [T, hidden] fp32, what the experts of the layer take; after ATTN-1.
        index: [T, top_k] int64, the experts that the gate chose; after ATTN-1.
        weight: [T, top_k] fp32, their weights; after ATTN-1.
    """

    def __init__(
        self, step: NativeStep, batch: StepBatch, kv: np.ndarray, hidden: np.ndarray | None
    ) -> None:
        self._step, config = step, step._config
        self._native, self._keep = step._batch(step._model, batch, kv, hidden)
        self._keep += [batch.tokens, batch.positions, batch.block_tables, batch.logit_rows]
        self.logits = self._keep[0]
        model, address = ctypes.addressof(step._model), ctypes.addressof(self._native)
        floats = step._library.wf_step_workspace(model, address)
        self._workspace = np.empty(max(1, floats) + 16, np.float32)
        start = self._workspace.ctypes.data
        self._native.workspace = start + -start % 64
        self._addresses = model, address
        self.count = len(batch.tokens)
        top_k = config.num_experts_per_tok
        self.normed = np.empty((0, config.hidden_size), np.float32)
        self.index = np.empty((0, top_k), np.int64)
        self.weight = np.empty((0, top_k), np.float32)

    def run(self, part: str, layer: int = 0, routed: np.ndarray | None = None) -> None:
        """Compute a piece.

        Args:
            part: its name.
            layer: which layer's.
            routed: for FINISH of a layer with experts, [T, hidden] fp32: their rows' weighted sum.
        Raises: WhalefallError where the layer's router meets a NaN.
        """
        if not self.count:
            return
        call = _PartCall(part=_PARTS.index(part), layer=layer)
        if routed is not None:
            call.routed = routed.ctypes.data
        status = self._step._library.wf_step_part(*self._addresses, ctypes.addressof(call))
        self._step._check(status)
        if part == "ATTN-1" and self._step._config.is_moe(layer):
            self.normed = self._array(call.normed, ctypes.c_float, self.normed.shape[1])
            self.index = self._array(call.index, ctypes.c_int64, self.index.shape[1])
            self.weight = self._array(call.weight, ctypes.c_float, self.index.shape[1])

    def _array(self, address: int, kind: Any, columns: int) -> np.ndarray:
        length = self.count * columns
        flat = np.ctypeslib.as_array((kind * length).from_address(address))
        return flat.reshape(self.count, columns)
