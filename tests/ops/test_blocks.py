"""The fused halves of a layer against their definitions in plain torch: outputs and every gradient, each ISA."""

import pytest
import torch

from veneer.ops import blocks, native, reference
from veneer.ops.blocks import AdaptedLinear, Attention, Mlp, Norm
from veneer.quant.linear import QuantizedTensor, quantize

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no compiler built the kernels")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(out, inner, r, g, *, kind=None, bias=False, scaling=0.5, dropout=0.0, dora=False, diagonal=False):
    w = torch.randn(out, inner, generator=g) / inner**0.5
    weight = quantize(w.bfloat16(), kind) if kind else w.bfloat16()
    b = torch.randn(out, generator=g).bfloat16() if bias else None
    if r is None:
        return AdaptedLinear(weight, b)
    factors = (torch.randn(r, inner, generator=g) / inner**0.5, torch.randn(out, r, generator=g) / r**0.5)
    seed = int(torch.randint(2**32, (), generator=g)) if dropout else 0
    scale = None
    if dora:  # any sign, one of them 0, which must not hide its own gradient
        scale = torch.randn(out, generator=g)
        scale[out // 2] = 0
        scale.requires_grad_()
    e = torch.randn(r, generator=g).requires_grad_() if diagonal else None
    return AdaptedLinear(weight, b, *(f.requires_grad_() for f in factors), scaling, dropout, seed, scale, e)


def wide(value):
    """The same, in fp32 and with gradients of its own: what the definition is computed on."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, QuantizedTensor):
        return value.dequantize(torch.bfloat16).float()
    if isinstance(value, list):
        return [wide(item) for item in value]
    return type(value)(*(wide(item) for item in value)) if isinstance(value, tuple) else value


def factors(group):
    return [
        f
        for layer in group
        for f in (layer.a, layer.b, layer.weight, layer.bias, layer.scale, layer.diagonal)
        if wants_gradient(f)
    ]


def wants_gradient(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def norms(block):
    there = [getattr(block, name, None) for name in ("norm", "q_norm", "k_norm")]
    return [norm.weight for norm in there if norm is not None and norm.weight.requires_grad]


def train_all(block, group):
    """Weights, biases and norms too, as full fine-tuning has it."""
    for linear in group:
        for value in (linear.weight, linear.bias):
            if value is not None:
                value.requires_grad_()
    for norm in (block.norm, getattr(block, "q_norm", None), getattr(block, "k_norm", None)):
        if norm is not None:
            norm.weight.requires_grad_()
    return block


def compare(native_form, definition, x, block, group, exact_group, exact):
    dy = torch.randn(x.shape, generator=generator(9)).bfloat16()
    g = generator(8)
    rest = (torch.randn(x.shape, generator=g) * x.detach().float().abs() / 512).bfloat16()
    y, more = native_form(x, block, rest)
    x_ = x.detach().float().requires_grad_()
    y_ = definition(x_, exact, rest)[0]
    found = [y, *torch.autograd.grad(y, [x, *factors(group), *norms(block)], dy)]
    wanted = [y_, *torch.autograd.grad(y_, [x_, *factors(exact_group), *norms(exact)], dy.float())]
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert not a.isnan().any(), n
        # of one token's softmax the exact gradient is 0: what is left is the rounding of what flows through it
        assert float((a.float() - b).norm()) < 0.015 * float(b.norm()) + 0.01 * float(dy.float().norm()), n
    assert not more.requires_grad and bool((more.float().abs() <= y.detach().float().abs() / 256).all())
    return found


def layer(x, a, m):
    return blocks.mlp_block(blocks.attention_block(x, a)[0], m)[0]


def attention(tokens, *, heads=4, kv_heads=2, width=16, model=48, r=4, kind=None, bias=False, fused=False,
              rotary=8, qk_norm=False, starts=None, recompute="none", dropout=0.0, dora=False,
              diagonal=False):  # fmt: skip
    g = generator()
    sizes = [(heads + 2 * kv_heads) * width] if fused else [heads * width, kv_heads * width, kv_heads * width]
    ranks, drops, doras = (v if isinstance(v, list) else [v] * (len(sizes) + 1) for v in (r, dropout, dora))
    qkv = [
        linear(n, model, rank, g, kind=kind, bias=bias, dropout=drop, dora=scaled, diagonal=diagonal)
        for n, rank, drop, scaled in zip(sizes, ranks, drops, doras, strict=False)
    ]
    out = linear(
        model, heads * width, ranks[-1], g, kind=kind, dropout=drops[-1], dora=doras[-1], bias=dora and bias,
        diagonal=diagonal,
    )  # fmt: skip
    norm = [Norm(1 + 0.1 * torch.randn(n, generator=g).bfloat16(), 1e-5) for n in (model, width, width)]
    angle = torch.rand(tokens, rotary, generator=g) * 6
    places = (angle.cos(), angle.sin()) if rotary else (None, None)
    starts = torch.tensor([0, tokens] if starts is None else starts, dtype=torch.int32)
    norms = (norm[1], norm[2]) if qk_norm else (None, None)
    return Attention(norm[0], qkv, out, heads, kv_heads, width, 0.3, *places, starts, *norms, recompute)


ATTENTION = {
    "one token": {"tokens": 1},
    "odd": {"tokens": 67},
    "packed": {"tokens": 150, "starts": [0, 1, 66, 66, 130, 150]},
    "many rows": {"tokens": 40, "starts": list(range(0, 41, 4))},
    "4 bits": {"tokens": 33, "kind": "nf4"},
    "FP4": {"tokens": 33, "kind": "fp4"},
    "8 bits": {"tokens": 33, "kind": "int8"},
    "bias": {"tokens": 20, "bias": True},
    "one linear": {"tokens": 20, "fused": True},
    "norms on q and k": {"tokens": 20, "qk_norm": True},
    "half rotated": {"tokens": 70, "width": 32, "rotary": 8},
    "not rotated": {"tokens": 20, "rotary": 0},
    "ranks differ": {"tokens": 20, "r": [1, 3, None, 5]},
    "wide head": {"tokens": 66, "width": 128, "rotary": 64, "heads": 2, "kv_heads": 1},
    "odd head width": {"tokens": 66, "width": 80, "rotary": 16, "heads": 2, "kv_heads": 2},
    "dropout": {"tokens": 67, "dropout": 0.3, "r": [1, 3, None, 5]},
    "dropout differs": {"tokens": 20, "dropout": [0.0, 0.5, 0.1, 0.2], "qk_norm": True},
    "dropout, 4 bits": {"tokens": 33, "dropout": 0.05, "kind": "nf4", "recompute": "full"},
    "dropout, one linear": {"tokens": 150, "dropout": 0.2, "fused": True, "starts": [0, 1, 66, 150]},
    "DoRA": {"tokens": 67, "dora": True},
    "DoRA, one token": {"tokens": 1, "dora": True},
    "DoRA, bias": {"tokens": 67, "dora": True, "bias": True, "r": [1, 3, 2, 5]},
    "DoRA, bias, again": {"tokens": 20, "dora": True, "bias": True, "recompute": "full", "dropout": 0.3},
    "DoRA here and there": {"tokens": 40, "dora": [True, False, True, False], "r": [1, 3, 4, None]},
    "DoRA, 4 bits": {"tokens": 33, "dora": True, "kind": "nf4", "recompute": "full"},
    "DoRA, 8 bits": {"tokens": 5, "dora": True, "kind": "int8"},
    "DoRA, one linear": {"tokens": 150, "dora": True, "fused": True, "bias": True, "starts": [0, 1, 66, 150]},
    "AdaLoRA": {"tokens": 67, "diagonal": True, "r": [1, 3, 2, 5]},
    "AdaLoRA, 4 bits": {"tokens": 33, "diagonal": True, "kind": "nf4", "recompute": "full", "dropout": 0.3},
    "DoRA, norms on q and k": {"tokens": 67, "dora": True, "qk_norm": True, "dropout": [0.0, 0.5, 0.1, 0.2]},
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_block(isa, nan_empties, case):
    block = attention(**ATTENTION[case])
    x = torch.randn(ATTENTION[case]["tokens"], 48, generator=generator(1)).bfloat16().requires_grad_()
    exact = wide(block)
    compare(
        blocks.attention_block,
        reference.attention_block,
        x,
        block,
        [*block.qkv, block.out],
        [*exact.qkv, exact.out],
        exact,
    )


def mlp(*, inner=96, model=48, r=4, kind=None, fused=False, activation="silu", shift=0.0, recompute="none",
        dropout=0.0, bias=False, dora=False, diagonal=False):  # fmt: skip
    g = generator()
    ranks, drops, doras = (v if isinstance(v, list) else [v] * 3 for v in (r, dropout, dora))
    sizes = [2 * inner] if fused else [inner, inner]
    group = [
        linear(n, model, rank, g, kind=kind, bias=bias, dropout=drop, dora=scaled, diagonal=diagonal)
        for n, rank, drop, scaled in zip(sizes, ranks, drops, doras, strict=False)
    ]
    down = linear(
        model, inner, ranks[-1], g, kind=kind, bias=bias, dropout=drops[-1], dora=doras[-1], diagonal=diagonal
    )
    norm = Norm(1 - shift + 0.1 * torch.randn(model, generator=g).bfloat16(), 1e-5, shift)
    return Mlp(norm, group, down, activation, recompute)


MLP = {
    "plain": {},
    "4 bits": {"kind": "nf4"},
    "FP4": {"kind": "fp4"},
    "8 bits": {"kind": "int8"},
    "one linear": {"fused": True},
    "gelu": {"activation": "gelu_tanh", "shift": 1.0},
    "odd width": {"inner": 102},
    "some without adapter": {"r": [None, 3, None]},
    "dropout": {"inner": 102, "dropout": 0.3, "r": [3, 4, 5]},
    "dropout differs": {"dropout": [0.5, 0.0, 0.0], "recompute": "mlp"},
    "dropout, 4 bits": {"dropout": 0.05, "kind": "nf4"},
    "dropout, 8 bits": {"dropout": 0.05, "kind": "int8"},
    "dropout, one linear": {"dropout": 0.2, "fused": True, "activation": "gelu_tanh"},
    "AdaLoRA": {"diagonal": True, "r": [3, 4, 5]},
    "AdaLoRA, again": {"diagonal": True, "dropout": 0.05, "kind": "int8", "recompute": "mlp"},
    "DoRA": {"dora": True},
    "DoRA, odd width, again": {"dora": True, "inner": 102, "recompute": "mlp", "r": [3, 4, 5]},
    "DoRA, bias": {"dora": True, "bias": True, "inner": 102},
    "DoRA, bias, 4 bits": {"dora": True, "bias": True, "kind": "nf4"},
    "DoRA, 4 bits": {"dora": True, "kind": "nf4", "dropout": 0.05},
    "DoRA, 8 bits": {"dora": True, "kind": "int8", "recompute": "full"},
    "DoRA, one linear": {"dora": True, "fused": True, "activation": "gelu_tanh", "inner": 102, "dropout": 0.2},
    "DoRA here and there": {"dora": [False, True, False], "r": [None, 4, 4]},
    "DoRA of down alone": {"dora": [False, False, True], "r": [4, None, 4]},
}


@pytest.mark.parametrize("tokens", [1, 2, 75])
@pytest.mark.parametrize("case", MLP)
def test_mlp_block(isa, nan_empties, case, tokens):
    block = mlp(**MLP[case])
    x = torch.randn(tokens, 48, generator=generator(1)).bfloat16().requires_grad_()
    exact = wide(block)
    compare(
        blocks.mlp_block,
        reference.mlp_block,
        x,
        block,
        [*block.gate_up, block.down],
        [*exact.gate_up, exact.down],
        exact,
    )


@pytest.mark.parametrize(("dropout", "dora"), [(0.0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_recompute_changes_no_bit_and_keeps_less(recompute, dropout, dora):
    x = torch.randn(70, 48, generator=generator(1)).bfloat16().requires_grad_()
    results, kept = [], []
    for how in ("none", recompute):
        given = {"recompute": how, "dropout": dropout, "dora": dora, "bias": dora}
        a, m = attention(70, **given), mlp(**given)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            y = layer(x, a, m)
        kept.append(sum(sizes))
        results.append(
            torch.autograd.grad(y.float().square().sum(), [x, *factors([*a.qkv, a.out, *m.gate_up, m.down])])
        )
    assert kept[1] <= kept[0] - 70 * 96
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_dropout_saves_nothing_and_without_it_no_kernel_is_added(monkeypatch):
    x = torch.randn(70, 48, generator=generator(1)).bfloat16().requires_grad_()
    calls, kept, run = [], [], blocks.native._run
    monkeypatch.setattr(blocks.native, "_run", lambda name, *rest: calls.append(name) or run(name, *rest))
    counts = []
    for dropout in (0.0, 0.2):
        a, m = attention(70, dropout=dropout), mlp(dropout=dropout)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            y = layer(x, a, m)
        y.float().sum().backward()
        kept.append(sum(sizes))
        counts.append((calls.count("masked"), calls.count("product"), calls.count("outer_sum")))
        calls.clear()
    assert kept[0] == kept[1]
    # of each of the 7 linears the mask is made for h, dx and dA
    assert counts == [(0, 4 + 7 + 7 + 4, 4 + 7), (21, 7 + 7 + 7 + 4 + 7, 7 + 7)]


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_up_is_kept_unless_the_base_is_4_bit(kind):
    sizes: dict[str, int] = {}
    for recompute in ("none", "mlp"):
        m = mlp(recompute=recompute, inner=96, kind=kind)
        x = torch.randn(70, 48, generator=generator(1)).bfloat16().requires_grad_()
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=held: s.append(t.numel()) or t, lambda t: t):
            blocks.mlp_block(x, m)
        sizes[recompute] = sum(held)
    assert sizes["none"] - sizes["mlp"] == 70 * 96 * (1 if kind else 2)


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_what_is_made_again_is_what_it_was(isa, nan_empties, monkeypatch, recompute, kind):
    made: dict[str, list[torch.Tensor]] = {}

    def watch(name, inputs):
        run, made[name] = getattr(blocks.native, name), []
        monkeypatch.setattr(
            blocks.native, name, lambda *a, **k: made[name].extend(t.clone() for t in a[inputs]) or run(*a, **k)
        )

    watch("attention_forward", slice(0, 3))
    watch("attention_backward", slice(0, 3))
    watch("gated", slice(0, 2))
    watch("gated_backward", slice(1, 3))
    a = attention(75, recompute=recompute, r=[1, 3, None, 5], qk_norm=True, kind=kind, dropout=0.2, dora=True)
    m = mlp(recompute=recompute, inner=102, r=[3, None, 4], kind=kind, dora=True)
    x = torch.randn(75, 48, generator=generator(1)).bfloat16().requires_grad_()
    layer(x, a, m).float().square().sum().backward()
    for forth, back in (("attention_forward", "attention_backward"), ("gated", "gated_backward")):
        assert len(made[forth]) == len(made[back]) > 0
        assert all(torch.equal(p, q) for p, q in zip(made[forth], made[back], strict=True))


@pytest.mark.parametrize(("dora", "bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_a_second_backward_pass_gives_the_same(recompute, fused, kind, dora, bias):
    a = attention(70, fused=fused, recompute=recompute, kind=kind, dora=dora, bias=bias)
    m = mlp(fused=fused, recompute=recompute, kind=kind, dora=dora, bias=bias)
    x = torch.randn(70, 48, generator=generator(1)).bfloat16().requires_grad_()
    loss = layer(x, a, m).float().square().sum()
    wanted = [x, *factors([*a.qkv, a.out, *m.gate_up, m.down])]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(first, torch.autograd.grad(loss, wanted), strict=True))


@pytest.mark.parametrize(("trained", "bias", "more"), [(True, False, 2), (True, True, 7), (False, True, 0)])
def test_of_a_dora_layer_only_hidden_sums_are_kept(trained, bias, more):
    """In widths of the model (48) a token: o and down; with biases q 64, k and v 32 each, gate and up 96 each as well."""
    kept = []
    for dora in (False, True):
        a, m = attention(70, dora=dora, bias=bias, model=64), mlp(dora=dora, bias=bias, model=64)
        for linear in (*a.qkv, a.out, *m.gate_up, m.down):
            if dora:
                linear.scale.requires_grad_(trained)
        x = torch.randn(70, 64, generator=generator(1)).bfloat16().requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            layer(x, a, m)
        kept.append(sum(n for n in sizes if n >= 70 * 32))
    assert kept[1] - kept[0] == 70 * 64 * more


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_factors_changed_before_the_backward_pass_are_an_error(half):
    block = attention(5) if half == "attention" else mlp()
    x = torch.randn(5, 48).bfloat16().requires_grad_()
    y = (blocks.attention_block(x, block) if half == "attention" else blocks.mlp_block(x, block))[0]
    with torch.no_grad():
        (block.out if half == "attention" else block.gate_up[1]).b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_no_gradient_is_made_below_the_lowest_adapter():
    block = attention(5)
    x = torch.randn(5, 48).bfloat16()
    y = blocks.attention_block(x, block)[0]
    y.float().sum().backward()
    assert x.grad is None and all(f.grad is not None for f in factors([*block.qkv, block.out]))


@pytest.mark.parametrize("starts", [[0, 130], [0, 1, 65, 65, 130], list(range(0, 131, 10))])
def test_attention_alone(isa, nan_empties, starts):
    g = generator()
    q, k, v = (torch.randn(130, h, 48, generator=g).bfloat16().requires_grad_() for h in (6, 2, 2))
    angle = torch.rand(130, 24, generator=g) * 6
    rest = (angle.cos(), angle.sin(), torch.tensor(starts, dtype=torch.int32), 48**-0.5)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    dy = torch.randn(130, 6, 48, generator=g).bfloat16()
    y, y_ = blocks.attention(q, k, v, *rest), reference.attention(*exact, *rest)
    found = [y, *torch.autograd.grad(y, (q, k, v), dy)]
    for a, b in zip(found, [y_, *torch.autograd.grad(y_, exact, dy.float())], strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("width", [101, 576])
def test_rms_norm(isa, nan_empties, width, zeros):
    torch.manual_seed(0)
    weight = torch.randn(width).bfloat16()
    weight[::7] = -1 if zeros else 0.5  # with the shift: 0, from which x cannot be told
    norm = Norm(weight.requires_grad_(), 1e-5, 1.0)
    x, dy = torch.randn(9, width).bfloat16().requires_grad_(), torch.randn(9, width).bfloat16()
    rest = (torch.randn(9, width) * x.detach().abs() / 512).bfloat16()
    x_ = x.detach().float().requires_grad_()
    weight_ = weight.detach().float().requires_grad_()
    y, y_ = blocks.rms_norm(x, norm, rest), reference.rms_norm(x_, weight_, 1e-5, 1.0, rest)
    torch.testing.assert_close(y.float(), y_, rtol=4e-3, atol=1e-6)  # half a step of bf16: of x without rest, two
    (dx, dw), (dx_, dw_) = torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(y_, (x_, weight_), dy.float())
    torch.testing.assert_close(dx.float(), dx_, rtol=8e-3, atol=2e-2)
    torch.testing.assert_close(dw.float(), dw_, rtol=1e-2, atol=6e-2)  # rest is not kept: x in 8 digits


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("tokens", [1, 5, 75])
def test_the_residual_stream_has_twice_the_digits(isa, nan_empties, tokens, kind):
    """80 halves that each add little: 16 bits alone lose it, or add up the errors of 80 roundings."""
    x = torch.randn(tokens, 48, generator=generator(1)).bfloat16()
    a, m = attention(tokens, kind=kind), mlp(kind=kind)
    a, m = (half._replace(norm=half.norm._replace(weight=half.norm.weight / 64)) for half in (a, m))
    exact = x.float(), wide(a), wide(m)
    y, y_alone, (y_, a_, m_), rest = x, x, exact, None
    with torch.no_grad():
        for _ in range(40):
            y, rest = blocks.attention_block(y, a, rest)
            y, rest = blocks.mlp_block(y, m, rest)
            y_alone = layer(y_alone, a, m)
            y_ = reference.mlp_block(reference.attention_block(y_, a_)[0], m_)[0]
    moved = float((y_ - x.float()).norm())
    assert float((y.float() + rest.float() - y_).norm()) < 0.01 * moved < 0.2 * float((y_alone.float() - y_).norm())


TRAINED_ATTENTION = {
    "plain": {"tokens": 67, "r": None},
    "one token": {"tokens": 1, "r": None},
    "bias, norms": {"tokens": 33, "r": None, "bias": True, "qk_norm": True},
    "one linear, packed": {"tokens": 150, "r": None, "fused": True, "bias": True, "starts": [0, 1, 66, 150]},
    "adapters too": {"tokens": 40, "r": [1, 3, None, 5], "dropout": 0.3, "recompute": "full"},
    "DoRA too": {"tokens": 40, "r": [1, 3, None, 5], "dora": True, "bias": True},
}
TRAINED_MLP = {
    "plain": {"r": None},
    "odd width, again": {"r": None, "inner": 102, "recompute": "mlp"},
    "one linear, shift": {"r": None, "fused": True, "activation": "gelu_tanh", "shift": 1.0},
    "adapters too": {"r": [3, None, 5], "dropout": 0.3},
    "DoRA too": {"r": [3, None, 5], "dora": True, "bias": True},
}


@pytest.mark.parametrize("case", TRAINED_ATTENTION)
def test_weights_of_the_attention_half_can_be_trained(isa, nan_empties, case):
    block = attention(**TRAINED_ATTENTION[case])
    train_all(block, [*block.qkv, block.out])
    x = torch.randn(TRAINED_ATTENTION[case]["tokens"], 48, generator=generator(1)).bfloat16().requires_grad_()
    exact = wide(block)
    groups = [*block.qkv, block.out], [*exact.qkv, exact.out]
    found = compare(blocks.attention_block, reference.attention_block, x, block, *groups, exact)
    assert len(found) >= 2 + 1 + len(groups[0])  # y, x, norm, and each weight


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("case", TRAINED_MLP)
def test_weights_of_the_mlp_half_can_be_trained(isa, nan_empties, case, zeros):
    block = mlp(**TRAINED_MLP[case])
    if zeros:  # then y does not tell x
        block.norm.weight[::5] = -block.norm.shift
    train_all(block, [*block.gate_up, block.down])
    x = torch.randn(75, 48, generator=generator(1)).bfloat16().requires_grad_()
    exact = wide(block)
    groups = [*block.gate_up, block.down], [*exact.gate_up, exact.down]
    found = compare(blocks.mlp_block, reference.mlp_block, x, block, *groups, exact)
    assert len(found) >= 2 + 1 + len(groups[0])


def test_only_what_is_trained_gets_a_gradient():
    a, m = attention(20, r=None, qk_norm=True), mlp(r=None)
    a.qkv[1].weight.requires_grad_()
    a.k_norm.weight.requires_grad_()
    m.norm.weight.requires_grad_()
    x = torch.randn(20, 48, generator=generator(1)).bfloat16()  # needs none: the first layer after frozen embeddings
    layer(x, a, m).float().square().sum().backward()
    everything = [t for linear in (*a.qkv, a.out, *m.gate_up, m.down) for t in (linear.weight,)]
    everything += [norm.weight for norm in (a.norm, a.q_norm, a.k_norm, m.norm)]
    with_gradient = [t for t in everything if t.grad is not None and float(t.grad.float().abs().sum()) > 0]
    assert {id(t) for t in with_gradient} == {id(t) for t in (a.qkv[1].weight, a.k_norm.weight, m.norm.weight)}
