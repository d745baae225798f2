"""Whether adapters go together: figures against dense ones in float64, and verdicts on adapters made to go or not to go."""

import json

import pytest
import torch
from adapters.test_combine import folders, updates
from conftest import make_mixture, make_model

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.report.interference import analyze, describe, plot

SETTINGS = {"r": 4, "targets": ["q_proj", "up_proj"]}


def test_figures_are_those_of_the_dense_updates(tmp_path):
    paths = folders(tmp_path, {"a": SETTINGS, "b": {"r": 3, "rslora": True, "targets": ["q_proj"]}})
    (pair,) = analyze(paths)["pairs"]
    a, b = (updates(path) for path in paths)
    shared = sorted(a.keys() & b.keys())
    assert pair["layers"] == len(shared) == 2
    x, y = (torch.cat([d[name].flatten() for name in shared]) for d in (a, b))
    assert pair["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    least = torch.minimum(x.abs(), y.abs())
    assert pair["sign_conflict"] == pytest.approx(float(least[x * y < 0].sum() / least.sum()), abs=1e-5)
    for row in pair["by_layer"]:
        d, e = a[f"{row['layer']} 0"], b[f"{row['layer']} 0"]
        u, v = (torch.linalg.svd(m, full_matrices=False)[0][:, :r] for m, r in ((d, 4), (e, 3)))
        assert row["overlap_written"] == pytest.approx(float((u.T @ v).square().sum()) / 3, abs=1e-5)
        u, v = (torch.linalg.svd(m, full_matrices=False)[2][:r].T for m, r in ((d, 4), (e, 3)))
        assert row["overlap_read"] == pytest.approx(float((u.T @ v).square().sum()) / 3, abs=1e-5)
        assert row["random_written"] == row["random_read"] == pytest.approx(4 / 48)


def changed(path, out, change):
    model = veneer.load_adapter(make_model(), path)
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, "default").items():
            change(key, parameter, g)
    return veneer.save_adapter(model, out)


def test_verdicts(tmp_path):
    (a, b) = folders(tmp_path, {"a": SETTINGS, "b": SETTINGS})
    opposite = changed(a, tmp_path / "opposite", lambda k, p, g: p.neg_() if "lora_B" in k else None)
    same_space = changed(
        a, tmp_path / "space", lambda k, p, g: p.copy_(torch.randn(p.shape, generator=g)) if "lora_B" in k else None
    )
    (apart,) = folders(tmp_path, {"apart": {"r": 2, "targets": ["v_proj"]}})
    for other, verdict in (
        (a, "much the same"), (b, "unrelated"), (opposite, "undo one another"), (same_space, "shared directions"),
        (apart, "no layer in common"),
    ):  # fmt: skip
        found = analyze([a, other])
        assert verdict in found["pairs"][0]["verdict"], other
        assert verdict in describe(found)
    assert analyze([a, opposite])["pairs"][0]["sign_conflict"] == pytest.approx(1)


def test_experts_and_three_adapters(tmp_path):
    settings = {name: {"r": 2, "targets": "all-linear"} for name in "abc"}
    paths = folders(tmp_path, settings, make_mixture)
    found = analyze(paths)
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    a, b = (torch.cat([d.flatten() for _, d in sorted(updates(path).items())]) for path in paths[:2])
    assert found["pairs"][0]["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert found["norms"][0] == pytest.approx(float(a.norm()), rel=1e-6)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    paths = folders(tmp_path, {"a": SETTINGS, "b": SETTINGS, "c": {"r": 2, "targets": ["v_proj", "q_proj"]}})
    path = plot(analyze(paths), tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(veneer.VeneerError, match=r"expected a name ending in .png or .svg"):
        plot(analyze(paths), tmp_path / "p.jpg")


def test_what_cannot_be_compared(tmp_path):
    (a,) = folders(tmp_path, {"a": SETTINGS})
    (b,) = folders(tmp_path, {"b": SETTINGS}, lambda: make_model(hidden_size=32))
    with pytest.raises(veneer.VeneerError, match="found 1 adapter, expected two or more"):
        analyze([a])
    with pytest.raises(veneer.VeneerError, match="different base models"):
        analyze([a, b])
    (tmp_path / "none").mkdir()
    with pytest.raises(veneer.VeneerError, match=r"missing file(.|\n)*no such folder"):
        analyze([a, tmp_path / "none", tmp_path / "nowhere"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(veneer.VeneerError, match="IA3"):
        analyze([a, tmp_path / "c"])
