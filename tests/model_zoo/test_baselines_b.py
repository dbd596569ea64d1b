# SPDX-License-Identifier: Apache-2.0
"""MaskNet, GDCN, FinalMLP, EulerNet, AFN+, QNN-alpha and FCN against their papers' formulas, written out plainly."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from conftest import ROOT
from fuxictr.features import FeatureMap
from torch import Tensor, nn

from ctrbench.zoo import load_model_class

B, F, D = 6, 4, 8
N = F * D
SETTINGS = {"optimizer": "adam", "loss": "bce", "metrics": ["AUC"], "verbose": 0, "model_root": "unused"}


def layers(name: str) -> Any:
    """The module `src/layers.py` of a model folder."""
    package = load_model_class(ROOT / "model_zoo" / name, name).__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.layers")


def make_feature_map(**changes: Any) -> FeatureMap:
    """F categorical fields f0, f1, ...; `changes` go into the last one."""
    feature_map = FeatureMap("test", "unused")
    for i in range(F):
        feature_map.features[f"f{i}"] = {"type": "categorical", "source": "", "padding_idx": 0, "vocab_size": 9}
    feature_map.features[f"f{F - 1}"].update(changes)
    feature_map.labels, feature_map.num_fields, feature_map.default_emb_dim = ["label"], F, D
    return feature_map


def make_model(name: str, std: float = 0.5, **params: Any) -> Any:
    """A model in eval mode whose every parameter is random, so that no term hides behind a 0 or a 1."""
    torch.manual_seed(0)
    model_class = load_model_class(ROOT / "model_zoo" / name, name)
    model = model_class(make_feature_map(), embedding_dim=D, **SETTINGS, **params)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {f"f{i}": torch.randint(1, 9, (B,), generator=generator) for i in range(F)}
    return {**inputs, "label": (torch.rand(B, generator=generator) < 0.5).float()}


def embeddings(layer: nn.Module) -> Tensor:
    """(B, F, D), looked up field by field."""
    weights = {name.split(".")[-2]: weight for name, weight in layer.state_dict().items() if name.endswith("weight")}
    return torch.stack([weights[f"f{i}"][batch()[f"f{i}"]] for i in range(F)], dim=1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


def mask_block(block: Any, e: Tensor, h: Tensor) -> Tensor:
    s = block.state_dict()
    hidden = torch.relu(e @ s["mask.0.weight"].T + s["mask.0.bias"])
    product = (hidden @ s["mask.2.weight"].T + s["mask.2.bias"]) * h @ s["w.weight"].T
    mean, variance = product.mean(-1, keepdim=True), product.var(-1, correction=0, keepdim=True)
    normal = (product - mean) / torch.sqrt(variance + 1e-5)
    return (normal * s["layer_norm.weight"] + s["layer_norm.bias"]).clamp(min=0)


@pytest.mark.parametrize("structure", ["parallel", "serial"])
def test_masknet(structure: str) -> None:
    model = make_model("MaskNet", 0.2, structure=structure, num_blocks=2, block_dim=5, hidden_units=[7])
    e = embeddings(model.embedding_layer)
    h = torch.cat(
        [functional.layer_norm(e[:, j], (D,), n.weight, n.bias) for j, n in enumerate(model.field_norm.norm)], 1
    )
    first, second = model.blocks
    if structure == "parallel":
        y = torch.cat([mask_block(first, e.flatten(1), h), mask_block(second, e.flatten(1), h)], 1)
    else:
        y = mask_block(second, e.flatten(1), mask_block(first, e.flatten(1), h))
    close(model(batch())["y_pred"], torch.sigmoid(model.mlp(y)))


def test_gdcn() -> None:
    network = layers("GDCN").GatedCrossNetwork(N, 2)
    c0 = torch.randn(B, N)
    c = c0
    for w, gate in zip(network.w, network.gate, strict=True):
        linear = torch.einsum("ij,bj->bi", w.weight, c) + w.bias
        c = c0 * linear / (1 + torch.exp(-torch.einsum("ij,bj->bi", gate.weight, c))) + c
    close(network(c0), c)
    parallel, stacked = (make_model("GDCN", 0.2, structure=s, hidden_units=[7]) for s in ("parallel", "stacked"))
    for model in (parallel, stacked):
        e = embeddings(model.embedding_layer).flatten(1)
        c = model.cross_network(e)
        h = torch.cat([c, model.mlp(e)], 1) if model is parallel else model.mlp(c)
        close(model(batch())["y_pred"], torch.sigmoid(h @ model.fc.weight.T + model.fc.bias))


def test_finalmlp() -> None:
    fusion = layers("FinalMLP").MultiHeadBilinearFusion(6, 9, num_heads=3)
    o1, o2 = torch.randn(B, 6), torch.randn(B, 9)
    full = torch.block_diag(*fusion.w3)  # heads are the diagonal blocks of one matrix
    linear = o1 @ fusion.w1.weight.T + fusion.w1.bias + o2 @ fusion.w2.weight.T
    close(fusion(o1, o2), linear + torch.einsum("bi,ij,bj->b", o1, full, o2)[:, None])
    for context in ([], ["f1", "f2"]):
        model = make_model("FinalMLP", 0.2, gate1_context=context, mlp1_hidden_units=[6], mlp2_hidden_units=[6])
        fields, gate = model.get_inputs(batch()), model.gate1
        x = gate.context
        if context:
            tables = gate.context_embedding.embedding_layer.embedding_layers
            x = torch.cat([tables[field].weight[fields[field]] for field in context], 1)
        e = embeddings(model.embedding_layer).flatten(1)
        first, second = (m for m in gate.mlp.mlp if isinstance(m, nn.Linear))
        close(gate(fields, e), e * 2 * torch.sigmoid(second(torch.relu(first(x)))))
        z = model.fusion(model.mlp1(gate(fields, e)), model.mlp2(model.gate2(fields, e)))
        close(model(batch())["y_pred"], torch.sigmoid(z))


def test_eulernet() -> None:
    model = make_model("EulerNet", 0.3, num_orders=[3, 2], layer_norm=False)
    e = embeddings(model.embedding_layer.embedding_layer).double()
    z = model.embedding_layer.mu.double() * torch.exp(1j * e)  # (B, F, D)
    for layer in model.layers:
        s = {name: value.double() for name, value in layer.state_dict().items()}
        powers = z.unsqueeze(1) ** s["alpha.weight"][None, :, :, None]  # principal values, (B, K, F, D)
        explicit = powers.prod(2) * torch.exp(s["delta_modulus"] + 1j * s["delta_phase"])
        r, p = (torch.relu(x.flatten(1) @ s["implicit.weight"].T + s["implicit.bias"]) for x in (z.real, z.imag))
        z = explicit + torch.complex(r, p).view_as(explicit)  # (B, K, D)
    logit = (z.flatten(1) * model.fc.weight.double()).sum(1, keepdim=True)
    close(model(batch())["y_pred"], torch.sigmoid(logit.real + logit.imag + model.fc.bias))


def test_afnplus() -> None:
    ltl = layers("AFNPlus").LogarithmicTransformation(F, 3).eval()  # running statistics: mean 0 and variance 1
    e = torch.randn(B, F, D)
    scale = math.sqrt(1 + 1e-5)
    powers = e.abs()[:, None] ** (ltl.w[None, :, :, None] / scale)  # (B, K, F, D)
    close(ltl(e), powers.prod(2) / scale)
    model = make_model("AFNPlus", 0.2, afn_hidden_units=[7], dnn_hidden_units=[7], num_logarithmic_neurons=3)
    z_afn = model.afn_mlp(model.ltl(embeddings(model.embedding_layer)).flatten(1))
    z_dnn = model.dnn_mlp(embeddings(model.embedding_layer_dnn).flatten(1))
    w1, w2 = model.fc.weight[0]
    close(model(batch())["y_pred"], torch.sigmoid(w1 * z_afn + w2 * z_dnn + model.fc.bias))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_qnnalpha(num_heads: int) -> None:
    model = make_model("QNNAlpha", num_layers=1, num_heads=num_heads, num_rows=3, net_dropout=0.1)
    e = embeddings(model.embedding_layer)  # (B, F, D)
    x = e.flatten(1)
    (layer,) = model.qnn.layer
    g = torch.relu(torch.einsum("ij,bj->bi", layer.linear[0].weight, x) + layer.linear[0].bias)
    width, outputs = N // num_heads, []
    for h, part in enumerate(e.split(D // num_heads, dim=2)):
        # The Khatri-Rao product: all pairs of a row and an entry, of which the column-wise ones (i = j) are summed.
        rows = g.view(B, num_heads, 3, width)[:, h]
        outer = torch.einsum("bri,bj->brij", rows, part.flatten(1))
        outputs.append(torch.einsum("brii->bi", outer))
    logit = (torch.cat(outputs, 1) + x) @ model.qnn.fc.weight.T + model.qnn.fc.bias
    close(model(batch())["y_pred"], torch.sigmoid(logit))


def test_qnnalpha_self_ensemble_loss() -> None:
    model = make_model("QNNAlpha", 0.2, num_layers=1, net_dropout=0.3).train()
    output = model(batch())
    y1, y2, label = output["y_1"], output["y_2"], batch()["label"][:, None]
    assert not torch.equal(y1, y2)
    close(output["y_pred"], (y1 + y2) / 2)
    y = ((y1 + y2) / 2).detach()
    bce = -sum((t * p.log() + (1 - t) * (1 - p).log()).mean() for p, t in (((y1 + y2) / 2, label), (y1, y), (y2, y)))
    loss = model.add_loss(output, label)
    close(loss, bce)
    gradients = [torch.autograd.grad(x, model.qnn.fc.weight, retain_graph=True)[0] for x in (loss, bce)]
    close(*gradients)
    y_eval = model.eval()(batch())
    assert set(y_eval) == {"y_pred"}
    close(model.add_loss(y_eval, label), functional.binary_cross_entropy(y_eval["y_pred"], label))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_fcn(layer_norm: bool) -> None:
    settings = {"num_deep_cross_layers": 2, "num_shallow_cross_layers": 2, "num_heads": 2, "layer_norm": layer_norm}
    model = make_model("FCN", 0.3, batch_norm=True, **settings)
    e = embeddings(model.embedding_layer.embedding_layer)  # (B, F, H*D)
    heads = [torch.cat([e[..., i : i + D // 2].flatten(1), e[..., i + D // 2 : i + D].flatten(1)], 1) for i in (0, D)]
    logits = []
    for network in (model.ECN, model.LCN):
        scores = []
        for head, x0 in enumerate(heads):
            x = x0
            for w, b, scale, norm in zip(network.w, network.b, network.scale, network.norm, strict=True):
                h = torch.einsum("ij,bj->bi", w.weight, x)
                a = (
                    (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                    if layer_norm
                    else h
                )
                c = torch.cat([h, scale.weight * a + scale.bias], 1)
                c = c / math.sqrt(1 + 1e-5) * norm.weight[head] + norm.bias[head]
                x = (x if network is model.ECN else x0) * (c + b) + x
            scores.append(x @ network.fc.weight.T + network.fc.bias)
        logits.append(sum(scores) / 2)
    output = model(batch())
    for name, logit in (("y_d", logits[0]), ("y_s", logits[1]), ("y_pred", sum(logits) / 2)):
        close(output[name], torch.sigmoid(logit))
    label = batch()["label"][:, None]
    y, y_d, y_s = (functional.binary_cross_entropy(output[n], label) for n in ("y_pred", "y_d", "y_s"))
    close(model.add_loss(output, label), y + y_d * max(0, y_d - y) + y_s * max(0, y_s - y))


@pytest.mark.parametrize(
    ("name", "params", "total"),
    [
        ("QNNAlpha", {"num_layers": 1, "num_heads": 4, "num_rows": 4}, 207_649),
        ("FCN", {"num_deep_cross_layers": 5, "num_shallow_cross_layers": 5}, 221_222),
    ],
)
def test_parameter_totals_of_published_ml_1m_runs(name: str, params: dict[str, Any], total: int) -> None:
    feature_map = FeatureMap("test", "unused")
    for i, size in enumerate([6042, 4, 9, 23, 3643, 10, 20]):
        feature_map.features[f"f{i}"] = {"type": "categorical", "source": "", "padding_idx": 0, "vocab_size": size}
    feature_map.num_fields = 7
    model_class = load_model_class(ROOT / "model_zoo" / name, name)
    model = model_class(feature_map, embedding_dim=16, batch_norm=True, **SETTINGS, **params)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_fcn_is_sdcnv3_but_for_the_mask() -> None:
    settings = {"num_deep_cross_layers": 2, "num_shallow_cross_layers": 2, "num_heads": 2, "layer_norm": False}
    fcn, sdcnv3 = make_model("FCN", **settings), make_model("SDCNv3", **settings)
    with torch.no_grad():
        for scale in (*fcn.ECN.scale, *fcn.LCN.scale):
            scale.weight.zero_(), scale.bias.zero_()
    sdcnv3.ECN.cross = lambda i, x: (sdcnv3.ECN.w[i](x), torch.zeros(()))
    sdcnv3.LCN.cross = lambda i, x: (sdcnv3.LCN.w[i](x), torch.zeros(()))
    fcn.embedding_layer.load_state_dict(sdcnv3.embedding_layer.state_dict())
    for ours, theirs, last in ((fcn.ECN, sdcnv3.ECN, sdcnv3.ECN.dfc), (fcn.LCN, sdcnv3.LCN, sdcnv3.LCN.sfc)):
        ours.w.load_state_dict(theirs.w.state_dict())
        ours.b.load_state_dict(theirs.b.state_dict())
        ours.fc.load_state_dict(last.state_dict())
    close(fcn(batch())["y_pred"], sdcnv3(batch())["y_pred"])


@pytest.mark.parametrize("name", ["AFNPlus", "EulerNet"])
@pytest.mark.parametrize("std", [0.0, 1e-4])
@pytest.mark.parametrize("is_training", [False, True])
def test_logarithms_stay_finite(name: str, std: float, is_training: bool) -> None:
    torch.manual_seed(0)
    options = {"num_orders": [5, 5], "explicit_dropout": 0.5, "implicit_dropout": 0.5} if name == "EulerNet" else {}
    model = load_model_class(ROOT / "model_zoo" / name, name)(
        make_feature_map(), embedding_dim=D, **SETTINGS, **options
    )
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("embedding_layer") and not parameter_name.endswith("mu"):
            nn.init.normal_(parameter, std=std)
    output = model.train(is_training)(batch())
    model.compute_loss(output, batch()["label"][:, None]).backward()
    assert output["y_pred"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_polar_is_finite_at_zero() -> None:
    r, p = (torch.tensor([0.0, 1e-30, -3.0], requires_grad=True) for _ in range(2))
    log_modulus, phase = layers("EulerNet").polar(r, p)
    (log_modulus + phase).sum().backward()
    assert r.grad.isfinite().all() and p.grad.isfinite().all()
    close(log_modulus[2], torch.tensor(math.log(math.sqrt(18))))
    close(phase, torch.tensor([0.0, 0.0, -0.75 * math.pi]))


@pytest.mark.parametrize(
    ("name", "params", "spec", "message"),
    [
        ("MaskNet", {"structure": "both"}, {}, "structure must be 'parallel' or 'serial', got 'both'"),
        ("MaskNet", {}, {"embedding_dim": 6}, None),
        ("GDCN", {"structure": "both"}, {}, "structure must be 'parallel' or 'stacked', got 'both'"),
        ("GDCN", {"hidden_units": []}, {}, "hidden_units must name at least one layer"),
        ("GDCN", {}, {"embedding_dim": 6}, None),
        ("FinalMLP", {"num_heads": 3}, {}, "num_heads = 3 does not divide the last layer of mlp1, 400 wide"),
        (
            "FinalMLP",
            {"gate1_context": ["user"]},
            {},
            "context field 'user' is not a field of the dataset, it has f0, f1",
        ),
        ("FinalMLP", {"mlp1_hidden_units": []}, {}, "mlp1_hidden_units and mlp2_hidden_units must name at least one"),
        ("FinalMLP", {"gate1_context": ["f3"]}, {"embedding_dim": 6}, None),
        ("EulerNet", {}, {"embedding_dim": 6}, "field 'f3' is 6 wide, every field must be embedding_dim = 8"),
        ("EulerNet", {}, {"type": "sequence"}, "sequence 'f3' needs a feature_encoder"),
        ("EulerNet", {"num_orders": []}, {}, "num_orders must name at least one layer"),
        ("AFNPlus", {}, {"embedding_dim": 6}, "field 'f3' is 6 wide, every field must be embedding_dim = 8"),
        ("AFNPlus", {}, {"type": "sequence"}, "sequence 'f3' needs a feature_encoder"),
        ("QNNAlpha", {"num_heads": 2}, {"embedding_dim": 6}, "field 'f3' is 6 wide, every field must be embedding_dim"),
        ("QNNAlpha", {"num_heads": 3}, {}, "num_heads = 3 does not divide embedding_dim = 8"),
        ("QNNAlpha", {}, {"embedding_dim": 6}, None),
        ("FCN", {"num_heads": 2}, {"embedding_dim": 8}, r"field 'f3' is 8 wide, .* embedding_dim \* num_heads = 16"),
        ("FCN", {}, {"type": "sequence"}, "sequence 'f3' needs a feature_encoder"),
    ],
)
def test_fields_and_settings(name: str, params: dict[str, Any], spec: dict[str, Any], message: str | None) -> None:
    model_class = load_model_class(ROOT / "model_zoo" / name, name)
    feature_map = make_feature_map(**spec)
    if message is None:
        assert model_class(feature_map, embedding_dim=D, **SETTINGS, **params)(batch())["y_pred"].shape == (B, 1)
    else:
        with pytest.raises(ValueError, match=message):
            model_class(feature_map, embedding_dim=D, **SETTINGS, **params)


def test_fcn_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="embedding_dim must be even, every embedding is cut in two halves, got 7"):
        load_model_class(ROOT / "model_zoo" / "FCN", "FCN")(make_feature_map(), embedding_dim=7, **SETTINGS)
