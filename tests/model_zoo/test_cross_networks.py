# SPDX-License-Identifier: Apache-2.0
"""Fields that DCNv3 and SDCNv3 cannot cut into heads and halves are named."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT
from fuxictr.features import FeatureMap

from ctrbench.zoo import load_model_class

TAGS = {"type": "sequence", "source": "", "padding_idx": 0, "vocab_size": 9, "max_len": 3}


@pytest.mark.parametrize("name", ["DCNv3", "SDCNv3"])
@pytest.mark.parametrize(
    ("spec", "num_heads", "message"),
    [
        ({}, 1, None),
        ({"embedding_dim": 16}, 2, None),
        (
            {"embedding_dim": 10},
            2,
            "num_heads = 2 does not divide the embedding of field 'user' into even parts, its emb",
        ),
        ({"embedding_dim": 4}, 1, r"field 'user' is 4 wide, every field must be embedding_dim \* num_heads = 8"),
        ({"emb_output_dim": 6}, 1, "field 'user' is 6 wide"),
        ({**TAGS}, 1, "sequence 'user' needs a feature_encoder that pools it to one vector"),
        ({**TAGS, "feature_encoder": "layers.MaskedSumPooling()"}, 1, None),
    ],
)
def test_fields(name: str, spec: dict[str, Any], num_heads: int, message: str | None) -> None:
    feature_map = FeatureMap("test", "unused")
    plain = {"type": "categorical", "source": "", "padding_idx": 0, "vocab_size": 9}
    feature_map.features.update({"item": dict(plain), "user": {**plain, **spec}, "session": {"type": "meta"}})
    feature_map.num_fields = 2
    settings = {"optimizer": "adam", "loss": "bce", "metrics": ["AUC"], "verbose": 0, "model_root": "unused"}
    model_class = load_model_class(ROOT / "model_zoo" / name, name)
    if message is None:
        model_class(feature_map, embedding_dim=8, num_heads=num_heads, **settings)
    else:
        with pytest.raises(ValueError, match=message):
            model_class(feature_map, embedding_dim=8, num_heads=num_heads, **settings)
