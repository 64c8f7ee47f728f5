"""The numpy definition against Transformers, form by form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.model import truth
from tests.model.forms import FORMS

from whalefall.model import Checkpoint, load_config, load_weights, reference
from whalefall.model.synth import synth


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_reference_gives_transformers_logits(form: str, fp8: bool, tmp_path: Path) -> None:
    folder = synth(tmp_path / "model", FORMS[form], fp8=fp8, seed=1)
    config = load_config(folder)
    weights = load_weights(Checkpoint(folder), config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, 90).tolist()
    wanted = truth.logits(truth.load_transformers(folder, tmp_path / "fp32"), tokens)
    # float64 against Transformers' fp32: three layers of rounding, logits of size 1
    np.testing.assert_allclose(reference.forward(tokens, weights, config), wanted, atol=2e-5)
