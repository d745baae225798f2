"""Rows of some tokens, trained in full: embeddings and a tied head, beside LoRA, on the fused path, in files."""

import copy
import json

import pytest
import torch
from conftest import make_model, randomised
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from veneer import ops
from veneer.adapters.attach import adapter_parameters
from veneer.adapters.tokens import TokenRows, token_rows
from veneer.ops import cross_entropy, reference
from veneer.quant.linear import quantize_model

IDS = torch.arange(1, 30)[None]
TOKENS = [257, 5, 12]
NAME = f"model.embed_tokens.{TokenRows.KEY}"


def attached(tokens=TOKENS, fused=True, model=None, **changes):
    model = model or make_model(fused=fused, **changes)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"], tokens=tokens), seed=0)
    return model


def replaced(model):
    """The same model with a plain weight that holds the rows, differentiable in them."""
    rows = token_rows(model)["model.embed_tokens"]
    return rows.base.weight.detach().index_copy(0, torch.tensor(TOKENS), rows.rows["default"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_loss_and_gradients_are_those_of_a_weight_with_these_rows(tied, fused, skip_logits):
    model = make_model(fused=fused, tie_word_embeddings=tied)
    before = model(input_ids=IDS).logits.detach()
    attached(model=model)
    # a product of three rows alone may add up in another order than in one of all rows: not bit for bit on every CPU
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), before, rtol=1e-5, atol=1e-6)
    randomised(model)
    kwargs = {"skip_logits": True} if skip_logits and fused else {}
    loss = model(input_ids=IDS, labels=IDS, **kwargs).loss
    weight = replaced(model)
    names = {"model.embed_tokens.weight": weight} | ({"lm_head.weight": weight} if tied else {})
    plain = copy.deepcopy(model)
    token_rows(plain)["model.embed_tokens"].activate(plain, None)
    own = dict(model.named_parameters())
    names |= {name: own[name] for name in own if "lora" in name}
    expected = torch.func.functional_call(plain, names, (), {"input_ids": IDS, "labels": IDS}).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    parameters = list(adapter_parameters(model, "default").values())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["torch", "native"])
def test_head_and_cross_entropy_with_changed_rows_equal_the_definition(dtype, form):
    if form == "native" and (dtype != torch.bfloat16 or ops.choose("linear_cross_entropy")[1] != "native"):
        pytest.skip("native is bf16 only")
    g = torch.Generator().manual_seed(0)
    hidden, weight, rows = (torch.randn(*shape, generator=g).to(dtype) for shape in ((700, 32), (50, 32), (3, 32)))
    ids, labels = torch.tensor([49, 0, 7]), torch.randint(50, (700,), generator=g)
    run = cross_entropy.native_form if form == "native" else cross_entropy.torch_form
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, rows)]
    loss = run(leaves[0], leaves[1], labels, 7, (ids, leaves[2]))
    exact = [t.float().clone().requires_grad_() for t in (hidden, weight, rows)]
    expected = reference.linear_cross_entropy(exact[0], exact[1], labels, 7, (ids, exact[2]))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(loss, expected, **close)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        limit = close["atol"] * float(theirs.abs().max())
        torch.testing.assert_close(mine.float(), theirs, rtol=close["rtol"], atol=limit)
    frozen = run(hidden, weight, labels, 7, (ids, rows.clone().requires_grad_()))  # nothing else learns
    assert torch.equal(frozen, loss) and frozen.requires_grad


def test_only_the_rows_are_trained_and_counted():
    model = attached()
    assert adapter_parameters(model, "default")[NAME].shape == (3, 48)
    assert veneer.count_parameters(model).trainable == 2 * 2 * (48 + 48) + 3 * 48
    model(input_ids=IDS, labels=IDS, skip_logits=True).loss.backward()
    with torch.no_grad():
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.grad.numel() for p in trained) == veneer.count_parameters(model).trainable


@pytest.mark.parametrize("four_bit", [False, True])
def test_bf16_on_the_fused_path(four_bit):
    model = make_model(dtype=torch.bfloat16)
    if four_bit:
        quantize_model(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        attached(model=model)
        assert torch.equal(model(input_ids=IDS).logits, before)
    randomised(model)
    losses = [model(input_ids=IDS, labels=IDS, skip_logits=skip).loss for skip in (True, False)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=2e-2)
    (mine,) = torch.autograd.grad(losses[0], [adapter_parameters(model, "default")[NAME]])
    (theirs,) = torch.autograd.grad(losses[1], [adapter_parameters(model, "default")[NAME]])
    assert mine.dtype == torch.float32 and float((mine - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_switching_saving_merging_and_removing(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    names = [name for name, _ in model.named_modules()]
    logits = {None: model(input_ids=IDS).logits.detach()}
    attached(model=model)
    logits["default"] = randomised(model)(input_ids=IDS).logits.detach()
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["embed_tokens", "v_proj"]), name="other")
    logits["other"] = randomised(model, "other")(input_ids=IDS).logits.detach()
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["v_proj"], tokens={"embed_tokens": [3, 4]}), name="more")
    logits["more"] = randomised(model, "more")(input_ids=IDS).logits.detach()
    for name in ("default", "other", None, "more", "default", None, "default"):
        veneer.set_adapter(model, name)
        assert torch.equal(model(input_ids=IDS).logits, logits[name]), name
        assert {n for n, p in model.named_parameters() if p.requires_grad and "token_rows" in n} == (
            {f"model.embed_tokens.base_layer.token_rows.rows.{name}"} if name in ("default", "more") else set()
        )
    bare = veneer.base_model(model)
    assert [name for name, _ in bare.named_modules()] == names and torch.equal(bare(input_ids=IDS).logits, logits[None])
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, logits["default"])
    veneer.save_adapter(model, tmp_path / "a")
    other = veneer.load_adapter(make_model(tie_word_embeddings=tied), tmp_path / "a")
    assert torch.equal(other(input_ids=IDS).logits, logits["default"])
    veneer.save_adapter(other, tmp_path / "b")
    assert (tmp_path / "a/adapter_config.json").read_text() == (tmp_path / "b/adapter_config.json").read_text()
    merged = veneer.merge(other)
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits["default"], rtol=1e-4, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied == merged.config.tie_word_embeddings
    assert [name for name, _ in merged.named_modules()] == names
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits["default"], rtol=1e-4, atol=1e-5)
    for name in ("default", "other", "more"):
        veneer.remove_adapter(model, name)
    assert [name for name, _ in model.named_modules()] == names
    assert not model.lm_head._forward_hooks and not model.model.embed_tokens._forward_hooks
    assert torch.equal(model(input_ids=IDS).logits, logits[None])


def test_generation_sees_the_rows():
    model = attached()
    with torch.no_grad():
        adapter_parameters(model, "default")[NAME][0].copy_(100 * model.model(input_ids=IDS).last_hidden_state[0, -1])
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=256, pad_token_id=256)
    assert int(out[0, IDS.shape[1]]) == TOKENS[0]


def test_the_row_of_padding_has_no_gradient_from_the_embedding():
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=3), nn.Linear(4, 2))
    veneer.attach(model, veneer.LoraConfig(r=1, targets=["1"], tokens={"0": [3, 5]}))
    model(torch.tensor([[3, 5, 1]])).sum().backward()
    grad = adapter_parameters(model, "default")[f"0.{TokenRows.KEY}"].grad
    assert bool((grad[0] == 0).all()) and bool((grad[1] != 0).any())


def test_words_for_tokens_are_checked_all_at_once():
    for bad in ([1, 1], [-1], {"embed_tokens": []}, {"": [1]}, {"embed_tokens": [2, 2]}):
        with pytest.raises(veneer.VeneerError, match="tokens"):
            veneer.LoraConfig(tokens=bad)
    config = veneer.LoraConfig(
        r=64, targets=["embed_tokens"], tokens={"embed_tokens": [300, 258], "wte": [1], "lm_head": [4]},
    )  # fmt: skip
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.attach(make_model(), config)
    text = str(caught.value)
    assert "found [300, 258], expected ids below 258" in text and "'wte' matches no embedding" in text
    assert "lm_head is tied to model.embed_tokens" in text and "at most 48 for embed_tokens" in text
    with pytest.raises(veneer.VeneerError, match=r"is also in lora.targets \(model.embed_tokens\)"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["embed_tokens"], tokens=[1]))
    with pytest.raises(veneer.VeneerError, match=r"is also in lora.targets \(lm_head\)"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["lm_head"], tokens=[1]))
    with pytest.raises(veneer.VeneerError, match="trained in full already"):
        veneer.attach(
            make_model(), veneer.LoraConfig(r=2, targets=["q_proj"], tokens=[1], modules_to_save=["embed_tokens"])
        )


FILE_KEY = f"base_model.model.{NAME}"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (lambda c: c.update(trainable_token_indices=[257, 5]), None, r"found \(3, 48\), expected \(2, 48\)"),
        (lambda c: c.update(trainable_token_indices=[257, 5, 258]), None, r"found \[258\], expected ids below 258"),
        (lambda c: c.update(trainable_token_indices=[5, 5, 1]), None, "each once"),
        (lambda c: c.update(trainable_token_indices={"wte": [1]}), None, "'wte' matches no embedding"),
        (lambda c: c.update(trainable_token_indices=None), None, "expected names like"),
        (None, lambda t: t.pop(FILE_KEY), "model.embed_tokens: in trainable_token_indices, but not in"),
        (None, lambda t: t[FILE_KEY].fill_(float("nan")), "NaN"),
        (None, lambda t: t.update({FILE_KEY.replace("embed_tokens", "x"): t[FILE_KEY].clone()}), "does not mean it"),
    ],
)
def test_bad_files_are_refused_whole(tmp_path, config, tensors, words):
    veneer.save_adapter(randomised(attached()), tmp_path / "a")
    raw = json.loads((tmp_path / "a/adapter_config.json").read_text())
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    (config or (lambda c: None))(raw)
    (tensors or (lambda t: None))(found)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(raw))
    save_file(found, tmp_path / "a/adapter_model.safetensors")
    model = make_model()
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.load_adapter(model, tmp_path / "a")
    assert not token_rows(model) and not [n for n, _ in model.named_modules() if "lora" in n]
