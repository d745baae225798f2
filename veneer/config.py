"""Every setting there is: the recipe and its three parts, with the only set of defaults.

Strict: an unknown key is an error that names the nearest known one, and all problems are reported at once.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from veneer.errors import VeneerError

RECIPE_LIMIT = 1 << 20  # bytes; a recipe is a page of text
LORA_PLUS = 16.0  # the ratio its paper proposes (Hayou et al. 2024, arXiv 2402.12354)
TARGET_PRESETS = ("attention", "qv", "mlp", "all-linear")
IGNORED = -100  # the label of a token that is not learned, as in transformers
TOKEN_BUDGET = 2048  # tokens in one packed sequence: enough for full-speed products, little memory
ROUND_TO = 64  # packed lengths: every new matrix shape makes torch compile and keep another kernel
EVALUATED = 16  # rows of a forward pass of evaluation, where they are padded

_NO_TARGET = "expected attention, qv, mlp, all-linear, a list of name suffixes, or a regex; found nothing"

Quantization = Literal["nf4", "fp4", "int8"]
Dtype = Literal["bfloat16", "float16", "float32"]
DataFormat = Literal["prompt_completion", "alpaca", "messages", "text"]
Method = Literal["lora", "full"]


def pass_budget(max_length: int) -> int:
    """Tokens of a packed sequence at most: a single row may be longer than the usual ones."""
    return max(TOKEN_BUDGET, max_length)


def _no_truth(value: Any) -> Any:
    """YAML's true is Python's, which would pass for 1."""
    if isinstance(value, bool):
        raise ValueError(f"found {str(value).lower()}, expected a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Strict(ModelMetaclass):
    """Makes `LoraConfig(r=0)` raise our own error; pydantic's own nested validation does not pass here."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise VeneerError(_explain(cast(type[BaseModel], cls), error)) from None


class Settings(BaseModel, metaclass=_Strict):
    """Base of every settings class: unknown keys and wrong types are errors, values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdaLoraConfig(Settings):
    """How AdaLoRA shares its budget of ranks among the layers (Zhang et al. 2023, arXiv 2303.10512)."""

    start: Number = Field(1.5, ge=1, le=16, description="ranks a layer starts with, times lora.r")
    warmup: Number = Field(0.1, ge=0, lt=1, description="share of the steps before the first rank goes")
    settle: Number = Field(0.3, ge=0, lt=1, description="share of the steps, the last, when none goes any more")
    every: Whole = Field(1, ge=1, description="steps between decisions which ranks stay")
    beta: Number = Field(0.85, ge=0, lt=1, description="of the running means of what a rank is worth")
    orthogonality: Number = Field(0.01, ge=0, description="weight of the term that keeps the factors orthogonal")
    steps: Whole | None = Field(
        None, ge=1, description="optimizer steps in all; left out: veneer's training knows, other loops have to say"
    )

    @model_validator(mode="after")
    def _some_time(self) -> AdaLoraConfig:
        if self.warmup + self.settle >= 1:
            raise ValueError(f"found warmup {self.warmup:g} and settle {self.settle:g}, expected less than 1 together")
        return self


class LoraConfig(Settings):
    """Which low-rank adapter is put where (LoRA, Hu et al. 2021, arXiv 2106.09685).

    W' = W + scaling * B @ A with A (r, in), B (out, r), scaling = alpha / r,
    or alpha / sqrt(r) with `rslora` (Kalajdzievski 2023, arXiv 2312.03732).
    With `dora` the rows of W' get a trained length of their own (Liu et al. 2024, arXiv 2402.09353).
    """

    r: Whole = Field(16, ge=1, description="rank")
    alpha: Number = Field(32.0, gt=0, description="numerator of the scaling")
    dropout: Number = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    targets: str | list[str] = Field(
        "all-linear", description="attention, qv, mlp, all-linear, a list of name suffixes, or a regex"
    )
    exclude: str | list[str] = Field([], description="name suffixes, or a regex: layers of `targets` to leave out")
    layers: list[Whole] | None = Field(None, description="numbers of the blocks to adapt, from 0; left out: all")
    rank_pattern: dict[str, Whole] = Field({}, description="other ranks, by name suffix or regex of a name's end")
    alpha_pattern: dict[str, Number] = Field({}, description="other alphas, likewise")
    depth: list[Whole] | None = Field(
        None,
        description="ranks at evenly spaced depths, first to last block, those between interpolated, 0: no adapter; "
        "[32, 8] is more early, [0, 16, 0] the middle; alpha follows, so that the scaling stays",
    )
    dora: bool = Field(False, description="train the lengths of the weight's rows apart from their directions (DoRA)")
    adalora: AdaLoraConfig | None = Field(
        None, description="true, or settings: `r` ranks a layer on average, shared out by what training needs (AdaLoRA)"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="none, all, or lora_only (of the adapted layers): which biases are trained"
    )
    modules_to_save: list[str] = Field([], description="name suffixes of modules that are trained in full")
    init: Literal["kaiming", "gaussian", "pissa", "loftq", "eva"] = Field(
        "kaiming", description="how A and B start: kaiming or gaussian (A random, B zero), pissa, loftq, eva"
    )
    svd_niter: Whole | None = Field(
        4, ge=0, le=100, description="rounds of the fast SVD of pissa and loftq; null: the exact one, slower"
    )
    loftq_iterations: Whole = Field(
        1, ge=1, le=100, description="of loftq; above 1 the adapter has a quantised base of its own"
    )
    eva_rho: Number = Field(
        2.0, ge=1, le=100, description="of eva: a layer's rank is at most so many times r; 1: all have r"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    dtype: Dtype = Field(
        "float32",
        description="of A and B; in 16 bits they are half as large; veneer trains them on fp32 masters, other loops do not",
    )
    lora_bias: bool = Field(False, description="train a bias on B as well, added with the update")
    parameters: list[str] = Field(
        [],
        description="name suffixes of 3-D parameters to adapt, as experts.down_proj of a mixture's experts; "
        "the presets mlp and all-linear take all experts by themselves",
    )
    tokens: list[Whole] | dict[str, list[Whole]] = Field(
        [],
        description="ids of tokens whose embeddings are trained in full, or lists of them by embedding's name suffix",
    )

    @property
    def scaling(self) -> float:
        return self.scaling_at(self.r, self.alpha)

    def scaling_at(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.rslora else r)

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: str | list[str]) -> str | list[str]:
        if value == "" or any(not part for part in value):
            raise ValueError(_NO_TARGET)
        return value

    @field_validator("tokens")
    @classmethod
    def _token_ids(cls, value: list[int] | dict[str, list[int]]) -> list[int] | dict[str, list[int]]:
        for where, ids in value.items() if isinstance(value, dict) else [("", value)]:
            twice = sorted(i for i, times in Counter(ids).items() if times > 1)
            if twice:
                raise ValueError(f"found {twice} more than once, expected each id once")
            if (isinstance(value, dict) and not (where and ids)) or min(ids, default=0) < 0:
                raise ValueError(f"found {value}, expected ids from 0, some for each name")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive_numbers(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = {key: number for key, number in value.items() if number <= 0}
        if wrong:
            raise ValueError(f"found {wrong}, expected numbers above 0")
        return value

    @field_validator("adalora", mode="before")
    @classmethod
    def _usual_budget(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("depth")
    @classmethod
    def _ranks(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (not any(value) or min(value) < 0):
            raise ValueError(f"found {value}, expected ranks from 0, not all 0")
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> LoraConfig:
        problems = []
        if not self.targets and not self.parameters:
            problems.append(f"lora.targets: {_NO_TARGET}")
        if any(not name for name in self.parameters):
            problems.append("lora.parameters: expected name suffixes; found an empty one")
        if self.lora_bias and self.dora:
            problems.append("lora.lora_bias: found true, but with dora there is none: its lengths would not cover it")
        if self.lora_bias and self.init != "kaiming":
            problems.append(f"lora.lora_bias: found true with init {self.init}; other tools read it with kaiming only")
        if self.adalora is not None and self.dora:
            problems.append("lora.adalora: found dora too, which has another form: choose one")
        if self.adalora is not None and self.init != "kaiming":
            problems.append(f"lora.adalora: found init {self.init} too, but its factors have a start of their own")
        if self.adalora is not None and self.dtype != "float32":
            problems.append(f"lora.adalora: found dtype {self.dtype} too, expected float32: it watches what is trained")
        if self.adalora is not None and self.lora_bias:
            problems.append("lora.adalora: found lora_bias too, which a layer left without a rank cannot have")
        for key in ("dropout", "dora", "lora_bias", "adalora"):
            if self.parameters and getattr(self, key):
                problems.append(
                    f"lora.parameters: found {key}, which adapters of parameters do not have: no input of theirs is seen"
                    if key == "dropout"
                    else f"lora.parameters: found {key}, which adapters of parameters do not have"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class DataConfig(Settings):
    """Which rows are trained on, and how they become tokens."""

    train: str | list[str] = Field(description="file or files: .jsonl, .json, .csv, .parquet")
    eval: str | Number | None = Field(None, description="a held-out file, or the share of `train` to hold out")
    format: DataFormat | None = Field(
        None, description="prompt_completion, alpaca, messages or text; left out: detected from the columns"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our name: the file's, as in {completion: label}")
    system: str | None = Field(None, description="system message put before every conversation that has none")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="completion or all: which tokens are learned"
    )
    max_length: Whole = Field(1024, ge=8, description="tokens a row; longer ones lose the start of the prompt")
    packing: bool = Field(True, description="put several rows in one sequence, isolated from one another")
    strict: bool = Field(False, description="refuse the run when any row is bad")
    limit: Whole | None = Field(None, ge=1, description="use only the first so many rows")

    @field_validator("eval")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"found {value:g}, expected a file or a share between 0 and 1")
        return value


class TrainConfig(Settings):
    """How long, how fast and how safely to train."""

    epochs: Number = Field(1.0, gt=0, le=10_000, description="passes over the rows; parts of one are fine")
    max_steps: Whole | None = Field(None, ge=1, description="at most so many optimizer steps")
    batch_size: Whole = Field(16, ge=1, description="rows in one forward and backward")
    grad_accumulation: Whole = Field(1, ge=1, description="batches in one optimizer step")
    learning_rate: Number | Literal["auto"] = Field(
        "auto", description="auto: by the model's width, and a tenth of it with method full"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate after the warm-up: cosine, linear or constant"
    )
    warmup_steps: Whole | None = Field(None, ge=0, description="left out: 3% of the steps")
    min_lr_ratio: Number = Field(0.0, ge=0, le=1, description="share of the learning rate left at the end")
    lora_plus: Number | None = Field(
        None,
        gt=0,
        le=1000,
        description="LoRA+: B learns so many times as fast as A; true: 16 times, as its paper has it",
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's")
    betas: tuple[Number, Number] = Field((0.9, 0.999), description="AdamW's")
    epsilon: Number = Field(1e-8, gt=0, description="AdamW's")
    max_grad_norm: Number | None = Field(1.0, gt=0, description="longer gradients are cut to it; null: none is")
    seed: Whole = Field(
        0, ge=0, lt=2**63, description="of the adapter's start, the order of the rows, the split, and dropout"
    )
    recompute: Literal["none", "mlp", "full"] = Field(
        "none",
        description="none, mlp or full: what the backward pass makes again instead of keeping; less memory, slower",
    )
    eval_every: Whole | None = Field(None, ge=1, description="steps; left out: at each epoch's end, and at the end")
    early_stopping: Whole | None = Field(None, ge=1, description="stop after so many evaluations without a better loss")
    guard: bool = Field(
        True,
        description="go back where the loss jumps, stop where the held-out loss rises, watch adapters and forgetting",
    )
    save_every: Whole = Field(50, ge=1, description="steps between checkpoints")
    keep_last: Whole = Field(2, ge=1, description="checkpoints kept")
    log_every: Whole = Field(1, ge=1, description="steps between lines of metrics.jsonl and speed.jsonl")
    out: str | None = Field(None, description="output folder: new or empty")

    @model_validator(mode="before")
    @classmethod
    def _other_name(cls, values: Any) -> Any:
        """`gradient_checkpointing: true`, as other tools call it, means `recompute: full`."""
        if isinstance(values, dict) and isinstance(values.get("gradient_checkpointing"), bool):
            values = {**values}
            if values.pop("gradient_checkpointing"):
                values.setdefault("recompute", "full")
        return values

    @field_validator("lora_plus", mode="before")
    @classmethod
    def _usual_ratio(cls, value: Any) -> Any:
        return (LORA_PLUS if value else None) if isinstance(value, bool) else value

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"found {value:g}, expected a number above 0 and at most 1, or auto")
        return value

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"found {list(value)}, expected two numbers from 0 up to, not including, 1")
        return value


class Recipe(Settings):
    """One fine-tune, whole: base model, quantised or not, adapter, data, training."""

    model: str = Field("smollm2", min_length=1, description="folder, .gguf file, hub id, or smollm2")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    quantize: Quantization | None = Field(
        None, description="nf4, fp4 or int8: the linears but the head; left out: 16-bit"
    )
    double_quant: bool = Field(
        True, description="the constants of 4-bit weights in 8 bits: 4.13 bits a weight, not 4.5"
    )
    dtype: Dtype = Field("bfloat16", description="bfloat16, float16 or float32: of all that is not quantised")
    device: str = Field("auto", description="auto: cuda when there is one, else cpu")
    method: Method = Field("lora", description="lora, or full: every weight is trained")
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = []
        if self.train.early_stopping is not None and self.data.eval is None:
            problems.append("train.early_stopping needs held-out rows: set data.eval to a file or to a share like 0.05")
        if self.lora.init == "loftq" and self.quantize is None:
            problems.append("lora.init: found loftq, which is for a quantised base: set quantize to nf4, fp4 or int8")
        if self.method == "full":
            if self.quantize is not None:
                problems.append(f"quantize: found {self.quantize}, but method full trains the base: leave it out")
            if self.dtype == "float16":
                problems.append("dtype: found float16, expected bfloat16 or float32 with method full")
            if "lora" in self.model_fields_set:
                problems.append("lora: found settings of an adapter, but method full has none: leave them out")
            if self.train.lora_plus is not None:
                problems.append("train.lora_plus: found a ratio of A's and B's rates, but method full has neither")
        if problems:
            raise ValueError("\n".join(problems))  # `_explain` makes a problem of each line
        return self


def parse_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe given as a dict.

    Raises:
        VeneerError: unknown keys (with the nearest known one), missing keys, wrong types or values; all at once.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise VeneerError([f"{source}: {problem}" for problem in _explain(Recipe, error)]) from None


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe file, or a shipped recipe by its name, and apply `a.b=value` overrides.

    Raises:
        VeneerError: the file is missing, is not YAML, or `parse_recipe` finds something.
    """
    file = Path(path)
    if not file.is_file():
        shipped = shipped_recipes()
        if str(path) not in shipped:
            raise VeneerError(
                f"recipe {path}: no such file",
                hint=f"give the path of a YAML file, or one of the shipped recipes: {', '.join(sorted(shipped))}",
            )
        file = shipped[str(path)]
    if file.stat().st_size > RECIPE_LIMIT:
        raise VeneerError(f"{file}: found {file.stat().st_size:,} bytes, expected a recipe below {RECIPE_LIMIT:,}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date like 2020-13-45
        raise VeneerError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise VeneerError(f"{file}: found {found}, expected `key: value` lines (model, lora, data, train)")
    for override in overrides or []:
        _override(values, override)
    recipe = parse_recipe(values, str(file))
    changed = {key for key in ("r", "alpha") if any(x.startswith(f"lora.{key}=") for x in overrides or [])}
    if len(changed) == 1:  # the other one was left as it was: advice looks at what was set
        recipe.lora.model_fields_set.difference_update({"r", "alpha"} - changed)
    return recipe


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    values = recipe.model_dump(mode="json", exclude={"lora"} if recipe.method == "full" else None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name to file."""
    return {path.stem: path for path in (Path(__file__).parent / "recipes").glob("*.yaml")}


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean X?)` when a known name is close to `name`, else the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise VeneerError(f"--set {override}: expected key.part=value, for example --set train.epochs=2")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise VeneerError(f"--set {override}: {part} is not a group of settings")
    target[parts[-1]] = value


def _explain(root: type[BaseModel], error: ValidationError) -> list[str]:
    """One plain sentence for each problem pydantic found."""
    problems: dict[str, str] = {}
    for item in error.errors():
        location = [part for part in item["loc"] if isinstance(part, str)]
        model, path = root, []
        for part in location:
            if part not in model.model_fields:
                break
            path.append(part)
            annotation = model.model_fields[part].annotation
            for kind in (annotation, *get_args(annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    model = kind
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            unknown = location[len(path)] if len(path) < len(location) else str(item["loc"][-1])
            where = f" in {name}" if name else ""
            problems.setdefault(
                f"{name}.{unknown}",
                f"unknown key {unknown!r}{where}; {nearest(unknown, list(model.model_fields))}",
            )
        elif item["type"] == "missing":
            problems.setdefault(name, f"missing key {name!r}")
        else:
            found = "" if isinstance(item["input"], dict) and not name else f", found {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            if message.startswith(("found", "expected")):
                found = ""
            if name in ("quantize",):
                message = f"expected one of {', '.join(get_args(Quantization))}, or nothing for 16-bit"
            for line in message.splitlines():
                if name and line.startswith(f"{name}."):  # a problem of a part as a whole names its settings itself
                    problems.setdefault(line, line)
                else:
                    problems.setdefault(name or line, f"{name + ': ' if name else ''}{line}{found}")
    return list(problems.values())
