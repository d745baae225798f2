"""Against PEFT: the same training, and each other's files."""

import copy

import pytest
import torch
from conftest import make_model

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.models.fuse import batch_loss
from veneer.training.batches import batches
from veneer.training.data import prepare_data

peft = pytest.importorskip("peft")

IDS = torch.arange(1, 40)[None]


def peft_model(model, **config):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def randomise(parameters):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout_off_packing", [True, False])
def test_ten_steps_give_the_same_losses_and_weights(tmp_path, tokenizer, commands, rslora, dropout_off_packing):
    theirs = peft_model(make_model(fused=False), use_rslora=rslora)
    theirs.save_pretrained(tmp_path / "start")
    ours = make_model()
    veneer.load_adapter(ours, tmp_path / "start")
    data = veneer.DataConfig(train=str(commands), packing=dropout_off_packing)
    train_set, _, _ = prepare_data(None, data, tokenizer, 0)
    parameters = adapter_parameters(ours, "default")
    their_parameters = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert parameters.keys() == their_parameters.keys()
    optimizers = [torch.optim.AdamW(p.values(), lr=3e-3, weight_decay=0.01) for p in (parameters, their_parameters)]
    for step in range(10):
        rows = train_set.samples[3 * step : 3 * step + 3]
        items = sum(row.supervised for row in rows)
        (padded,) = batches(rows, False, tokenizer, 512, torch.device("cpu"))
        our_loss = sum(
            batch_loss(ours, b, items) for b in batches(rows, dropout_off_packing, tokenizer, 512, torch.device("cpu"))
        )
        their_loss = theirs(**padded).loss
        torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
        for loss, optimizer in zip((our_loss, their_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in parameters.items():
        torch.testing.assert_close(value, their_parameters[name], rtol=1e-3, atol=2e-5)
    assert float(our_loss) < 6


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": r".*layers\.0\..*proj"},
     {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 32}}, {"layers_to_transform": [1], "target_modules": ["q_proj"]}],
)  # fmt: skip
def test_each_reads_the_others_files(tmp_path, config):
    theirs = peft_model(make_model(fused=False), **config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_model(fused=False)
    veneer.load_adapter(ours, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        veneer.save_adapter(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "targets", ["all-linear", "attention", "mlp", ["v_proj"], r".*layers\.1\.self_attn\.(q|k)_proj"]
)
def test_peft_loads_what_we_attached(tmp_path, targets):
    ours = make_model(fused=False)
    veneer.attach(ours, veneer.LoraConfig(r=3, alpha=7, targets=targets, rslora=True))
    randomise(adapter_parameters(ours, "default").values())
    veneer.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
        plain = peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "ours").merge_and_unload()
        torch.testing.assert_close(
            veneer.merge(ours)(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_smollm2_logits_with_an_adapter_of_theirs(tmp_path):
    base, tokenizer = veneer.load("smollm2", dtype="float32")
    ids = tokenizer("The house on the hill was built in", return_tensors="pt").input_ids
    theirs = peft_model(copy.deepcopy(base), r=16, lora_alpha=32)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)
        expected = theirs(input_ids=ids).logits
        theirs.save_pretrained(tmp_path / "theirs")
        del theirs
        plain = base(input_ids=ids).logits
        veneer.load_adapter(base, tmp_path / "theirs")
        found = base(input_ids=ids).logits
        assert float((expected - plain).abs().max()) > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        veneer.save_adapter(base, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(veneer.load("smollm2", dtype="float32")[0], tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
