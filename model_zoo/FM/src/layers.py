# SPDX-License-Identifier: Apache-2.0
"""What the fields must be for products of two embeddings and a weight of the first order."""

from __future__ import annotations

from fuxictr.features import FeatureMap


def check_fields(feature_map: FeatureMap, embedding_dim: int) -> None:
    """Refuses a field that cannot be multiplied with the others, or cannot have weights of the first order.

    Raises:
        ValueError: a field is a given vector, is not `embedding_dim` wide, or is a sequence that is not pooled.
    """
    for field, spec in feature_map.features.items():
        if spec["type"] == "meta":
            continue
        if spec["type"] == "embedding":
            raise ValueError(f"field '{field}' is of type embedding, it has no ids for weights of the first order")
        width = spec.get("emb_output_dim") or spec.get("embedding_dim") or embedding_dim
        if width != embedding_dim:
            raise ValueError(f"field '{field}' is {width} wide, every field must be embedding_dim = {embedding_dim}")
        if spec["type"] == "sequence" and not spec.get("feature_encoder"):
            raise ValueError(f"sequence '{field}' needs a feature_encoder that pools it to one vector")
