"""Starts of an adapter that know the weights or the data: PiSSA, LoftQ and EVA. Linear layers only.

    PiSSA   scaling B A = W_r, the first r singular terms of W; the base becomes W - W_r      (Meng et al. 2024, arXiv 2404.02948)
    LoftQ   Q = q(W - scaling B A), scaling B A = (W - Q)_r, in turns; the base becomes Q     (Li et al. 2023, arXiv 2310.08659)
    EVA     A = first right singular vectors of the layer's inputs, B = 0; ranks go where     (Paischer et al. 2024, arXiv 2410.07170)
            they explain most of the inputs' variance

PiSSA and LoftQ start with B A other than zero, on a base of their own that stands in the layer while the adapter is active
(`LoraLayer.bases`); the layer's own is kept, so switching off gives it back bit for bit. No random number of the user's
is drawn: the same weights give the same start, which a resumed run needs.

The SVD is randomised (Halko et al. 2011, algorithm 4.4), twice the rank wide. Of SmolLM2-135M's 210 linears 17 of every kind were
taken, one core, CPU seconds scaled to 210; beside them how much longer than the least possible what is left of W is, the worst layer:

    rank   exact    torch.svd_lowrank, niter 4, 16       here, niter 1, 2, 4 (the default), 8
    16     12.2 s   0.8 s 0.9%     2.3 s 0.10%           0.7 s 1.6%   0.9 s 0.8%   1.2 s 0.25%   1.8 s 0.05%
    64     12.5 s   2.3 s 1.5%     7.0 s 0.17%           2.5 s 1.9%   3.2 s 0.7%   4.8 s 0.15%   8.0 s 0.01%

The 4-bit error that PiSSA and LoftQ leave is the same to 0.2% with niter 4, with 16 and with the exact SVD.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters.lora import LoraLayer, LoraLinear
from veneer.config import LoraConfig
from veneer.errors import VeneerError
from veneer.ops import all_finite
from veneer.quant.linear import QuantizedLinear, quantize

OF_WEIGHTS = ("pissa", "loftq")
MOMENT_BYTES = 1 << 30  # of the inputs' covariances kept at once: layers beyond it wait for another pass over the data
_EVA_NITER = (
    4  # of a covariance, whose spectrum falls twice as fast as the inputs': the same to 4 digits as the exact one
)
NEAR = 1.1  # a quantised weight this many times as far from its original as rounding makes it is of another original


class Start(NamedTuple):
    """A (r, in) and B (out, r) in fp32, and what stands in the base's place under them; None: the base as it is."""

    a: Tensor
    b: Tensor
    base: nn.Module | None = None


# ---- PiSSA and LoftQ: of the weights ---------------------------------------------------------------------------------


def top_svd(w: Tensor, r: int, niter: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular terms of w (m, n) fp32: U (m, r), S (r,) descending, Vh (r, n).

    niter: rounds of subspace iteration from a fixed random start; None: the exact SVD. The signs are fixed.
    """
    width = min(*w.shape, 2 * r)
    if niter is None or width == min(w.shape):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        sketch = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0)).to(w)
        q = torch.linalg.qr(w @ sketch)[0]
        for _ in range(niter):
            q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q)[0])[0]
        u, s, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    return u[:, :r], s[:r], vh[:r]


def factors(w: Tensor, r: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with scaling * B A = w_r, the singular values shared by both alike, as PEFT has it.

    In fp32, rounded to what the adapter is kept in: the base has to miss what the factors are, not what they were.
    """
    u, s, vh = top_svd(w, r, config.svd_niter)
    root, kept = (s / scaling).sqrt(), getattr(torch, config.dtype)
    return (root[:, None] * vh).contiguous().to(kept).float(), (u * root).contiguous().to(kept).float()


@torch.no_grad()
def of_weights(layer: LoraLinear, weight: Tensor, r: int, scaling: float, config: LoraConfig) -> Start:
    """PiSSA's or LoftQ's start of a layer whose dense weight, in the base's layout, is `weight`."""
    base = layer.base_of(None)
    weight = weight.to(device=base.weight.device, dtype=torch.float32)
    dense = weight.T if isinstance(base, Conv1D) else weight  # (out, in)
    if config.init == "pissa":
        a, b = factors(dense, r, scaling, config)
        return Start(a, b, _with_weight(base, weight - scaling * layer._update(a, b)))
    rounded = base
    a, b = factors(weight - base.dequantize(torch.float32), r, scaling, config)
    for _ in range(config.loftq_iterations - 1):
        rounded = _with_weight(base, weight - scaling * (b @ a))
        a, b = factors(weight - rounded.dequantize(torch.float32), r, scaling, config)
    return Start(a, b, None if rounded is base else rounded)  # after one iteration Q is q(W), the base there is


def _with_weight(base: Any, weight: Tensor) -> Any:
    """A frozen layer like `base` with another weight, rounded to its type or quantised as it is."""
    if isinstance(base, QuantizedLinear):
        quantized = quantize(weight, base.kind, double_quant=base.double_quant)
        made = QuantizedLinear(quantized, None, base.compute_dtype).train(base.training)
        made.bias, made.outlier_threshold = base.bias, base.outlier_threshold
        return made
    made = copy.copy(base)
    made._parameters = {**base._parameters, "weight": nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)}
    return made


def original_weights(
    model: nn.Module, layers: dict[str, nn.Module], original: nn.Module | None
) -> Callable[[str], Tensor]:
    """Where the weights of the layers to adapt are read: in the model, or of quantised ones in the model before that.

    Args:
        layers: by their names in the plain model.
        original: that model; left out, what `veneer.load` read is read again.

    Raises:
        VeneerError: it cannot be had.
    """
    reread = model.__dict__.get("veneer_original")
    quantized = {path: base for path, base in layers.items() if isinstance(base, QuantizedLinear)}
    if quantized and original is None:
        if reread is None:
            path, base = next(iter(quantized.items()))
            raise VeneerError(
                f"lora.init: pissa and loftq need the weights before they were quantised, and this base is stored in "
                f"{base.kind} ({path}, ...)",
                hint="load the 16-bit model with quantize, or pass it as attach(..., original=model)",
            )
        original = reread()

    def weight(path: str) -> Tensor:
        base = layers[path]
        if path not in quantized:
            return base.weight.detach()  # type: ignore[no-any-return,union-attr,operator]
        assert original is not None
        found = _weight_at(original, path)
        if found is None or found.shape != (base.out_features, base.in_features):
            shape = None if found is None else tuple(found.shape)
            raise VeneerError(f"{path}: found {shape} in the original model, expected a dense weight of this layer")
        found = found.to(base.weight.device, torch.float32)  # type: ignore[arg-type]
        near = quantize(found, base.kind, double_quant=base.double_quant).dequantize(torch.float32)  # type: ignore[arg-type]
        if torch.dist(base.dequantize(torch.float32), found) > NEAR * torch.dist(near, found):  # type: ignore[operator]
            raise VeneerError(f"{path}: its weight is not that of the original model in {base.kind}")
        return found

    return weight


def _weight_at(model: nn.Module, path: str) -> Tensor | None:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return None
    return layer.weight.detach() if isinstance(getattr(layer, "weight", None), nn.Parameter) else None  # type: ignore[operator]


def on_the_original(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """A' (2r, in) and B' (out, 2r) with scaling * B' A' = scaling * (B A - B_0 A_0): the update of the layer's own base.

    W - scaling B_0 A_0 + scaling B A, PiSSA's paper, appendix on conversion. An adapter without a base of its own: A and B.
    """
    a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    if name not in layer.began:
        return a, b
    a0, b0 = (start.to(a.device) for start in layer.began[name])
    return torch.cat([a, a0]), torch.cat([b, -b0], 1)


def fingerprint(layers: dict[str, LoraLayer], name: str) -> str | None:
    """sha256 of the starts that the bases of an adapter depend on; None: it is on the model's own base."""
    digest = hashlib.sha256()
    began = {path: layer.began[name] for path, layer in layers.items() if name in layer.began}
    for path, tensors in began.items():
        digest.update(path.encode())
        for tensor in tensors:
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest() if began else None


# ---- EVA: of the inputs ----------------------------------------------------------------------------------------------


class Moments:
    """Count, mean (in,) and centred second moments (in, in) of a layer's inputs, fp32, added to batch by batch.

    By deviations from the batch's mean (Chan et al. 1979): inputs of language models have means far from zero.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(width, device=device)
        self.scatter = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:
        """x (tokens, in)."""
        n = len(x)
        if not n:
            return
        x = x.float()
        mean = x.mean(0)
        apart = mean - self.mean
        between = apart * (self.count * n / (self.count + n)) ** 0.5  # one more row: what the two means differ by
        rows = torch.cat([x - mean, between[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += apart * (n / (self.count + n))
        self.count += n

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k principal directions (k, in), and the share of the variance each explains (k,), on the CPU."""
        _, values, vectors = top_svd(self.scatter, k, _EVA_NITER)  # symmetric: its singular vectors are eigenvectors
        return vectors.cpu().contiguous(), (values / self.scatter.trace().clamp(min=1e-30)).cpu()


@torch.no_grad()
def input_directions(
    model: nn.Module, ranks: dict[str, int], batches: Iterable[dict[str, Any]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The principal directions of each layer's inputs and what they explain, up to a rank for each.

    Counted are the tokens that are learned (`labels` other than -100), or else those of `attention_mask`, or all. Layers
    that are given the same tensor (q, k and v) share one covariance; layers are done in groups, a pass over the data
    each, so that these take at most MOMENT_BYTES.

    Raises:
        VeneerError: no batches, a layer that was given no tokens, or inputs that are not finite.
    """
    batches = list(batches)
    if not batches:
        raise VeneerError("lora.init: eva: found no batches of data", hint="give rows to train on")
    modules = {path: model.get_submodule(path) for path in ranks}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with _layer_by_layer(model):
        for group in _groups({path: modules[path].in_features for path in ranks}):  # type: ignore[misc]
            owner, moments = _moments(model, {path: modules[path] for path in group}, batches)
            for path, moment in moments.items():
                sharing = [other for other in owner if owner[other] == path]
                if not moment.count or not all_finite(moment.scatter):
                    what = "inputs that are not finite" if moment.count else "no tokens"
                    raise VeneerError(f"lora.init: eva: {path}: found {what} in the data")
                vectors, shares = moment.directions(max(ranks[other] for other in sharing))
                found |= {other: (vectors[: ranks[other]], shares[: ranks[other]]) for other in sharing}
    missing = [path for path in ranks if path not in found]
    if missing:
        raise VeneerError(
            [f"lora.init: eva: {path}: the data does not reach this layer" for path in missing],
            hint="leave it out of lora.targets",
        )
    return found


def spread_ranks(ranks: dict[str, int], shares: dict[str, Tensor]) -> dict[str, int]:
    """EVA's ranks: the sum of `ranks`, given to the directions that explain most of their layer's variance.

    A layer has at least 1, so that none drops out, and at most as many as it has shares.
    """
    spread = dict.fromkeys(ranks, 1)
    candidates = [(-float(share), path) for path in ranks for share in shares[path][1:]]
    candidates.sort(key=lambda candidate: candidate[0])  # stable: equal shares in model order
    for _, path in candidates[: sum(ranks.values()) - len(ranks)]:
        spread[path] += 1
    return spread


def _counted(batch: dict[str, Any]) -> Tensor | None:
    """Which tokens count (rows, length); as PEFT, by the label at the token itself."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    counted = None if labels is None else labels != -100
    if isinstance(mask, Tensor) and mask.dim() == 2:
        counted = mask.bool() if counted is None else counted & mask.bool()
    return counted


def _groups(widths: dict[str, int]) -> Iterator[list[str]]:
    """Layers whose covariances fit into MOMENT_BYTES together; one that does not fit alone is a group of its own."""
    group: list[str] = []
    size = 0
    for path, width in widths.items():
        if group and size + 4 * width * width > MOMENT_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += 4 * width * width
    if group:
        yield group


def _moments(
    model: nn.Module, modules: dict[str, nn.Module], batches: list[dict[str, Any]]
) -> tuple[dict[str, str], dict[str, Moments]]:
    """One pass over the data: moments of what these layers are given, and whose moments each layer's are: its own, or
    those of the layer called right before it with the very same tensor."""
    owner: dict[str, str] = {}
    moments: dict[str, Moments] = {}
    last: tuple[Any, str] = (None, "")
    counted: Tensor | None = None

    def look(path: str, module: Any, x: Tensor) -> None:
        nonlocal last
        if owner.setdefault(path, last[1] if x is last[0] else path) != path:
            return
        last = (x, path)
        if path not in moments:
            moments[path] = Moments(module.in_features, x.device)
        moments[path].add(x[counted] if counted is not None and x.shape[:-1] == counted.shape else x.flatten(0, -2))

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: look(path, module, args[0])

    takes = inspect.signature(type(model).forward).parameters
    handles = [module.register_forward_pre_hook(hook(path)) for path, module in modules.items()]
    try:
        for batch in batches:
            counted, last = _counted(batch), (None, "")
            given = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
            model(**given, **({"logits_to_keep": 1} if "logits_to_keep" in takes else {}))  # nobody looks at them
    finally:
        for handle in handles:
            handle.remove()
    return owner, moments


@contextmanager
def _layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every linear is called as a module: fused layers (`models/fuse.py`) go past them else."""
    training = [module for module in model.modules() if module.training]
    fused = {
        module: module.__dict__.pop("forward") for module in model.modules() if hasattr(module, "veneer_recompute")
    }
    model.eval()
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.__dict__["forward"] = forward
        for module in training:
            module.training = True


def require_linear(init: str, layers: dict[str, LoraLayer], quantized_only: Sequence[str] = ("loftq",)) -> None:
    """Raise VeneerError for every layer that a start cannot be made for."""
    problems = [
        f"lora.init: {init} is for linear layers, found {type(layer.base_layer).__name__} at {path}"
        for path, layer in layers.items()
        if not isinstance(layer, LoraLinear)
    ]
    if init in quantized_only:
        problems += [
            f"lora.init: {init} is for quantised layers, found a {str(layer.weight.dtype).removeprefix('torch.')} one at {path}"
            for path, layer in layers.items()
            if isinstance(layer, LoraLinear) and not isinstance(layer.base_layer, QuantizedLinear)
        ]
    if problems:
        raise VeneerError(
            problems[:8] + ([f"and {len(problems) - 8} more"] if problems[8:] else []),
            hint="load the base with quantize, or leave these layers out of lora.targets"
            if init == "loftq"
            else "leave them out of lora.targets, or take init: kaiming",
        )
