"""Serve core: what the inference system decides, as plain functions without IO, clock or threads.

In: loads as numbers. Out: which unit, how many units, which experts where. The server and the
simulator call the same code. Source: the published V3/R1 inference system's three balancers and its
day's node chart.
"""

from whalefall.serve.core.autoscale import ScaleRule, ScaleState, scale
from whalefall.serve.core.decode import DecodeLoad, choose_decode
from whalefall.serve.core.experts import ExpertBalance, ExpertRule, imbalance
from whalefall.serve.core.prefill import PrefillLoad, attention_work, choose_prefill
from whalefall.serve.core.router import Answer, Effect, Kind, Place, Router

__all__ = [
    "Answer",
    "DecodeLoad",
    "Effect",
    "ExpertBalance",
    "ExpertRule",
    "Kind",
    "Place",
    "PrefillLoad",
    "Router",
    "ScaleRule",
    "ScaleState",
    "attention_work",
    "choose_decode",
    "choose_prefill",
    "imbalance",
    "scale",
]
