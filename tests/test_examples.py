"""The examples, on a tiny model: each learns, and what it writes is read back."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

import veneer
from veneer.adapters.attach import lora_layers

EXAMPLES = Path(__file__).parent.parent / "examples"
IDS = torch.arange(20)[None]
FAST = {"learning_rate": 1e-2}  # a model of random weights learns slowly at the examples' own rate


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(veneer.save_model(make_model(), make_tokenizer(), tmp_path_factory.mktemp("base") / "model"))


def logits(model):
    """Without a cache: trainers switch it off, and with one fused layers run as transformers wrote them."""
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def reads_back(model, folder, adapter, quantize=None):
    """What was written gives the logits of the model that was trained, and changes the base's."""
    other, _ = veneer.load(folder, quantize=quantize, device="cpu")
    base = logits(other)
    veneer.load_adapter(other, adapter)
    found = logits(other)
    return torch.equal(logits(model), found) and not torch.allclose(base, found, atol=1e-3)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_transformers_trainer(folder, tmp_path, quantize):
    trainer = example("transformers_trainer").main(folder, str(tmp_path), 12, quantize, **FAST)
    found = losses(trainer)
    assert found[-1] < found[0] - 0.4, found
    assert reads_back(trainer.model, folder, tmp_path / "adapter", quantize)
    checkpoint = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in checkpoint and not any(n.startswith("model") for n in checkpoint)


def test_transformers_trainer_resumes_to_the_same_adapter(folder, tmp_path):
    run = example("transformers_trainer").main
    whole = run(folder, str(tmp_path / "whole"), 8, None, save_steps=4)
    resumed = run(folder, str(tmp_path / "whole"), 8, None, save_steps=100, resume=str(tmp_path / "whole/checkpoint-4"))
    assert resumed.state.global_step == 8
    for mine, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_transformers_trainer_refuses_a_checkpoint_of_another_adapter(folder, tmp_path):
    run = example("transformers_trainer").main
    trainer = run(folder, str(tmp_path), 2, None)
    veneer.remove_adapter(trainer.model, "default")
    veneer.attach(trainer.model, veneer.LoraConfig(r=4, targets="qv"), seed=0)
    with pytest.raises(veneer.VeneerError, match=r"32 problems[\s\S]*of another adapter"):
        trainer._load_from_checkpoint(str(tmp_path / "adapter"))


def test_transformers_trainer_refuses_a_checkpoint_of_another_scaling(folder, tmp_path):
    trainer = example("transformers_trainer").main(folder, str(tmp_path), 2, None)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    with pytest.raises(veneer.VeneerError, match=r"found a scaling of 12.375, expected 2 as on the model"):
        trainer._load_from_checkpoint(str(tmp_path / "adapter"))


def test_transformers_trainer_takes_the_best_back(folder, tmp_path):
    trainer = example("transformers_trainer").main(folder, str(tmp_path), 4, None, save_steps=2, learning_rate=1e-3)
    last = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    best = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(last, best, strict=True))
    assert reads_back(trainer.model, folder, tmp_path / "checkpoint-2")


def test_accelerate(folder, tmp_path):
    for quantize in (None, "nf4"):
        out = tmp_path / str(quantize)
        found = example("accelerate_loop").main(folder, str(out), 16, quantize, cpu=True, gradient_accumulation_steps=2)
        assert found[-1] < found[0] - 0.1, found
        other, tokenizer = veneer.load(folder, quantize=quantize)
        tokens = tokenizer(
            [f"lamp {i}, on please: on({i}){tokenizer.eos_token}" for i in range(4)], padding=True, return_tensors="pt"
        )
        before = other(**tokens, labels=tokens.input_ids).loss
        veneer.load_adapter(other, out / "adapter")
        assert float(other(**tokens, labels=tokens.input_ids).loss) < float(before) - 0.1  # it is what was trained


@pytest.mark.parametrize(
    ("quantize", "settings"),
    [
        (None, {}),
        ("nf4", {"gradient_checkpointing": True}),
        (None, {"packing": True, "max_length": 96}),
        ("nf4", {"bf16": True}),
    ],
    ids=["plain", "checkpointing", "packing", "autocast"],
)
def test_trl_sft(folder, tmp_path, quantize, settings):
    pytest.importorskip("trl")
    trainer = example("trl_sft").main(folder, str(tmp_path), 12, quantize, use_cpu=True, **FAST, **settings)
    found = losses(trainer)
    assert found[-1] < found[0] - 0.4, found
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert reads_back(trainer.model, folder, tmp_path / "adapter", quantize)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_trl_dpo_with_the_adapter_off_as_the_reference(folder, tmp_path, quantize):
    pytest.importorskip("trl")
    trainer = example("trl_dpo").main(folder, str(tmp_path), 12, quantize, use_cpu=True)
    found = losses(trainer)
    assert found[0] == pytest.approx(0.6931, abs=2e-3)  # log 2: at step 0 policy and reference are the same model
    assert found[-1] < 0.7 * found[0], found
    weights = {t.data_ptr() for t in (*trainer.model.parameters(), *trainer.model.buffers())}
    reference = trainer.ref_model
    assert {t.data_ptr() for t in (*reference.parameters(), *reference.buffers())} <= weights
    base, _ = veneer.load(folder, quantize=quantize, device="cpu")
    base.requires_grad_(False)  # as under an adapter: layers that train take another way
    assert torch.equal(logits(reference), logits(base))
    assert not lora_layers(reference) and reads_back(trainer.model, folder, tmp_path / "adapter", quantize)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 16
