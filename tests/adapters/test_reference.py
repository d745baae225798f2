import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

import veneer
from veneer.adapters.attach import adapter_parameters, adapters, lora_layers
from veneer.errors import VeneerError
from veneer.quant.linear import quantize_model

IDS = torch.arange(24).view(2, 12)


def adapted(dtype=torch.float32, quantize=False, **settings):
    model = make_model(dtype=dtype)
    if quantize:
        quantize_model(model, compute_dtype=dtype)
    with torch.no_grad():
        plain = model(IDS).logits
    veneer.attach(model, veneer.LoraConfig(r=4, **settings), seed=0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for b in layer.lora_B.values():
                b.normal_()
    return model, plain


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_off_is_the_base_and_on_again_as_before(dtype, quantize):
    model, plain = adapted(dtype, quantize)
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)  # by the user: it must stay so
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS).logits
        with veneer.adapter_off(model) as same:
            assert same is model
            torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=0)
        assert torch.equal(model(IDS).logits, before) and not torch.equal(before, plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_on_again_after_an_error():
    model, _ = adapted()
    with pytest.raises(KeyError), veneer.adapter_off(model):
        raise KeyError
    assert {layer.active for layer in lora_layers(model).values()} == {"default"}


def test_a_step_whose_reference_is_the_model_switched_off():
    """Between forward and backward the adapter is off once, as in DPO: the gradient is the one of a plain step."""
    grads = []
    for off in (False, True):
        model, _ = adapted()
        loss = model(input_ids=IDS, labels=IDS).loss
        if off:
            with torch.no_grad(), veneer.adapter_off(model):
                model(IDS)
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_the_base_beside_it_shares_every_weight_and_stays_the_base(dtype, quantize):
    model, plain = adapted(dtype, quantize)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    bare = veneer.base_model(model)
    assert type(bare) is type(model) and bare is not model and not lora_layers(bare) and not adapters(bare)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in (*bare.parameters(), *bare.buffers())} <= ours
    assert not any(p.requires_grad for p in bare.parameters())
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
        assert torch.equal(bare(IDS).logits, plain) and not torch.equal(model(IDS).logits, plain)


def test_save_pretrained_writes_the_adapter_and_leaves_other_files_alone(tmp_path):
    model, _ = adapted()
    (tmp_path / "mine.txt").write_text("x")
    for _ in range(2):  # twice: a loop saves over what it saved
        model.save_pretrained(tmp_path)
    names = {"mine.txt", "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {file.name for file in tmp_path.iterdir()} == names
    other = make_model()
    veneer.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second").exists()
    copy.deepcopy(other).save_pretrained(tmp_path / "third")
    assert json.loads((tmp_path / "third/adapter_config.json").read_text())["r"] == 4


def test_save_pretrained_is_transformers_again_without_adapters(tmp_path):
    model, _ = adapted()
    veneer.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()
    model, _ = adapted(quantize=True)
    veneer.remove_adapter(model, "default")
    with pytest.raises(VeneerError, match=r"veneer\.save_model"):
        model.save_pretrained(tmp_path / "four")


def test_a_trainers_checkpoint_with_a_tied_head_is_read_back(tmp_path):
    """The file has it under both names; the model trains it under one."""
    model = veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    trained = adapter_parameters(model, "default")
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.2)
    kept = {key: parameter.detach().clone() for key, parameter in trained.items()}
    model.save_pretrained(tmp_path)
    trainer = veneer.adapter_checkpoints(SimpleNamespace(model=model))
    for parameter in trained.values():
        torch.nn.init.zeros_(parameter)
    trainer._load_from_checkpoint(str(tmp_path))
    assert all(torch.equal(parameter, kept[key]) for key, parameter in trained.items())
