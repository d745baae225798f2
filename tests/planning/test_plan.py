"""Plans: what they say against what was measured, what makes a run fit, and what cannot be asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_mixture, make_model

import veneer
from veneer import cli
from veneer.models.known import MODELS
from veneer.models.load import skeleton
from veneer.ops import native
from veneer.planning import plan as planning
from veneer.planning.memory import CannotPlanError, Run, estimate

GB = 10**9
MEASURED = """
import json, sys, tempfile
import veneer, veneer.training.loop, veneer.adapters.files
import transformers.models.llama.modeling_llama
from veneer.machine import current_bytes, peak_bytes, reset_peak, release_memory
name, method, recompute, batch, length = sys.argv[1:4] + [int(x) for x in sys.argv[4:]]
rows = [{"text": "one row that is long enough to fill all the length there is; " * (length // 8 + 8)}] * (2 * batch)
release_memory(); before = current_bytes(); reset_peak()
model, tokenizer = veneer.load(name, quantize="nf4" if method == "qlora" else None)
if method != "full":
    veneer.attach(model, veneer.LoraConfig(r=16, alpha=32), seed=0)
with tempfile.TemporaryDirectory() as out:
    veneer.train(model, tokenizer, rows, veneer.TrainConfig(batch_size=batch, recompute=recompute, learning_rate=1e-5, guard=False),
                 method="full" if method == "full" else "lora", out=out + "/run", progress=False,
                 data_config=veneer.DataConfig(train="-", max_length=length))
print(json.dumps(peak_bytes() - before))
"""


@pytest.mark.skipif(native.missing() is not None, reason="no native kernels here")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not say what the peak was")
@pytest.mark.parametrize(
    ("method", "recompute", "batch", "length"),
    [("lora", "none", 1, 512), ("qlora", "none", 1, 256), ("qlora", "full", 1, 256), ("full", "mlp", 1, 64)],
)
def test_the_planned_peak_is_the_measured_one(method, recompute, batch, length):
    """The small version of C12: within 5%, and not more than 2% under."""
    command = [sys.executable, "-c", MEASURED, "smollm2", method, recompute, str(batch), str(length)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    found = veneer.plan("smollm2", method=method, batch_size=batch, seq_len=length, recompute=recompute, evaluate=False,
                        guard=False)  # fmt: skip
    assert 0.98 * measured <= found["peak_bytes"] <= 1.05 * measured


def test_the_copy_to_go_back_to_is_what_an_adapter_and_its_moments_take():
    found, without = (veneer.plan("smollm2", seq_len=64, evaluate=False, guard=guard) for guard in (True, False))
    apart = 12 * found["trainable_parameters"]
    assert found["phases"]["train"] - without["phases"]["train"] == found["parts"]["point to go back to"] == apart
    assert veneer.plan("smollm2", method="full", seq_len=64)["parts"]["point to go back to"] == 0


def test_the_parts_are_the_whole_and_weights_are_counted_by_hand():
    found = veneer.plan("smollm2", method="qlora", rank=16)
    run = {phase: size for phase, size in found["phases"].items() if phase != "merge"}
    assert list(run) == ["load", "train", "evaluate", "save"]
    assert found["peak_bytes"] == max(run.values()) and sum(found["parts"].values()) == found["phases"]["train"]
    linears = 106_168_320
    assert found["parts"]["weights"] == linears // 2 + 2 * (134_515_008 - linears)
    blocks = linears // 64
    assert abs(found["parts"]["quantisation constants"] - (blocks + blocks / 64)) < 0.01 * blocks
    assert found["trainable_parameters"] == 4_884_480
    assert found["parts"]["adapter"] == found["parts"]["gradients"] == 4 * 4_884_480
    assert found["parts"]["optimizer"] == 8 * 4_884_480 and min(found["parts"].values()) >= 0
    full = veneer.plan("smollm2", method="full", seq_len=64)["parts"]
    assert full["masters"] == full["gradients"] == 4 * 134_515_008 and full["optimizer"] == 8 * 134_515_008
    assert full["weights"] == 2 * 134_515_008 and full["adapter"] == 0


@pytest.fixture
def mini(monkeypatch):
    """SmolLM2 with 3 layers: as large a step a layer, a tenth of the time."""
    sizes = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(MODELS, "mini", ("llama", sizes))
    return "mini"


def test_more_takes_more(mini):
    def peak(**settings):
        return veneer.plan(mini, **{"method": "lora", "seq_len": 512, "packing": False, "evaluate": False, **settings})[
            "peak_bytes"
        ]

    base = peak()
    assert base < peak(batch_size=2) < peak(batch_size=4) and base < peak(seq_len=1024) and base < peak(rank=64)
    assert peak(recompute="full") < peak(recompute="mlp") < base and peak(method="qlora") < base < peak(method="full")
    assert peak(targets="qv") < base < peak(grad_accumulation=2)
    packed = peak(packing=True, batch_size=64)
    assert packed == peak(packing=True, batch_size=8) < peak(batch_size=8)  # cut into sequences of 2048 tokens


def test_an_architecture_without_fused_layers_is_planned_too():
    from veneer.models.load import skeleton_of

    model = skeleton_of("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=256)
    found = estimate(model, Run(lora=veneer.LoraConfig(r=4, targets=["c_attn"]), seq_len=64))
    assert found.parts["activations"] > 0 and found.phases["train"] > found.parts["libraries"]


def test_what_would_make_it_fit(mini):
    own, spare = planning.current_bytes(), 10**7
    asked = {"method": "lora", "batch_size": 4, "seq_len": 512, "packing": False, "evaluate": False}
    whole = veneer.plan(mini, **asked, budget=100 * GB)
    assert whole["fits"] and whole["changes"] == []
    tight = veneer.plan(mini, **asked, budget=whole["peak_bytes"] + own - spare)
    assert not tight["fits"]
    names = [change["change"] for change in tight["changes"]]
    assert names[:3] == ["batch_size 2, grad_accumulation 2", "recompute mlp", "recompute full"]
    more = {**asked, "batch_size": 16}  # in one pass of 8,192 tokens; packed in four
    tight = veneer.plan(mini, **more, budget=whole["peak_bytes"] + own + spare)
    assert tight["changes"][0]["change"].startswith("packing")
    assert all(change["peak_bytes"] + own <= tight["budget_bytes"] + spare for change in tight["changes"])
    several = veneer.plan(mini, **{**asked, "method": "full"}, budget=own + 10**8)
    (only,) = several["changes"]
    assert "method lora" in only["change"] and only["peak_bytes"] <= 10**8 + spare
    assert veneer.plan(mini, budget=1)["changes"] == []


@pytest.mark.parametrize("what", ["batch", "length", "rank"])
def test_the_largest_that_fits(mini, what):
    name = {"batch": "batch_size", "length": "seq_len", "rank": "rank"}[what]
    asked = {"seq_len": 128, "rank": 8, "packing": False, "evaluate": False, "guard": False}
    room, spare = 2 * 10**8, 10**7
    value = veneer.plan(mini, **asked, budget=planning.current_bytes() + room, largest=what)["largest"][what]
    assert veneer.plan(mini, **{**asked, name: value})["peak_bytes"] <= room + spare
    if what == "rank":  # key and value are 192 wide
        assert value == 192
    else:
        assert veneer.plan(mini, **{**asked, name: value + value // 8})["peak_bytes"] > room - spare


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GB),
        ("24GiB", 24 << 30),
        ("1.5g", 1_500_000_000),
        ("512 MiB", 512 << 20),
        ("7000000000", 7 * GB),
        (5, 5),
    ],
)
def test_budgets(text, size):
    assert planning.bytes_of(text) == size


def test_changes_of_a_batch_keep_the_steps_and_are_of_the_rows_that_are_known():
    run = Run("lora", batch_size=15, seq_len=64, rows=(64, 32, 16), passes=5, grad_accumulation=2)
    change = next(planning._smaller(run))
    assert change.what == "batch_size 5, grad_accumulation 6" and change.run.passes == 15
    assert change.run.rows == run.rows  # a packed pass of three rows stays as it is
    assert next(planning._smaller(run._replace(batch_size=2, rows=(64, 64)))).run.rows == (64,)


def test_a_change_that_cannot_be_is_left_out(monkeypatch):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    monkeypatch.setitem(MODELS, "two", ("gpt2", sizes))
    found = veneer.plan("two", method="lora", targets=["c_attn"], batch_size=4, seq_len=64, budget=1)
    assert not found["fits"] and found["changes"] == []  # NF4 is not for GPT-2's layers


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("settings", [{}, {"method": "full"}, {"targets": "attention"}, {"recompute": "full"}])
def test_mixtures_are_planned(tmp_path, tokenizer, kind, settings):
    veneer.save_model(make_mixture(kind), tokenizer, tmp_path / "model")
    asked = {"method": "lora", "rank": 2, "seq_len": 64, **settings}
    found = veneer.plan(str(tmp_path / "model"), **asked)
    assert found["parts"]["activations"] > 0
    assert (
        found["phases"]["train"] < veneer.plan(str(tmp_path / "model"), **{**asked, "seq_len": 256})["phases"]["train"]
    )


def test_a_model_whose_code_looks_at_numbers_cannot_be_planned(mini, monkeypatch):
    monkeypatch.setattr("veneer.planning.memory.batch_loss", lambda *_: torch.zeros(1, device="meta").item())
    with pytest.raises(CannotPlanError, match=r"memory of a LlamaForCausalLM cannot be planned: RuntimeError.*item"):
        veneer.plan(mini, seq_len=64)


def test_rows_that_are_held_out_may_be_longer(mini):
    run = Run(lora=veneer.LoraConfig(r=4), seq_len=128, rows=(128, 128), packing=False)
    short, long = (estimate(skeleton(mini), run._replace(held_out=n)).phases for n in (128, 1024))
    assert long["evaluate"] > short["evaluate"] and long["train"] == short["train"]


def test_a_path_is_a_model_too(tmp_path, tokenizer):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    assert (
        veneer.plan(folder, rank=2, seq_len=64)["peak_bytes"]
        == veneer.plan(str(folder), rank=2, seq_len=64)["peak_bytes"]
    )


@pytest.mark.parametrize("text", ["9" * 400, "24 G b", "-1GB", "0", "", "lots", "24GBB", "nan", True, "1e9", "24 XB"])
def test_budgets_that_are_none(text):
    with pytest.raises(veneer.VeneerError, match=r"budget: found .*expected a size like 24GB"):
        planning.bytes_of(text)


def test_all_that_cannot_be_asked_at_once():
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.plan(
            "smollm2",
            method="magic",
            batch_size=0,
            seq_len=-5,
            rank=True,
            recompute="some",
            largest="model",
            dtype="int4",
        )
    assert len(caught.value.problems) == 7
    for wrong in ({"batch_size": 10**12}, {"seq_len": 10**12}, {"batch_size": 2**20, "seq_len": 2**13},
                  {"method": "full", "largest": "rank"}, {"largest": ["rank"]}):  # fmt: skip
        with pytest.raises(veneer.VeneerError, match=r"(batch_size|seq_len|largest).*expected"):
            veneer.plan("smollm2", **wrong)
    with pytest.raises(veneer.VeneerError, match="no such folder"):
        veneer.plan("nowhere")
    with pytest.raises(veneer.VeneerError, match="rank"):
        veneer.plan("smollm2", rank=5000)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -64},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "many"},
        {"num_key_value_heads": 3},
        {"model_type": "new", "head_dim": 5},
    ],
)
def test_configs_that_cannot_be(tmp_path, tokenizer, changes):
    veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(veneer.VeneerError, match=r"config\.json"):
        veneer.plan(str(tmp_path / "model"))


def test_a_known_model_needs_no_files(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["veneer", "plan", "llama-7b", "--seq-len", "512", "--budget", "12GB", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and found["parameters"] == sum(p.numel() for p in skeleton("llama-7b").parameters())
    assert found["fits"] and 4 * GB < found["peak_bytes"] < 8 * GB and torch.get_default_dtype() == torch.float32
    monkeypatch.setattr(
        sys, "argv", ["veneer", "plan", "llama-7b", "--seq-len", "512", "--method", "full", "--budget", "12GB"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "does NOT fit" in text and "method lora" in text and "optimizer" in text


def test_the_phases_of_a_run():
    asked = {"method": "lora", "seq_len": 128, "guard": False}
    found = veneer.plan("smollm2", **asked)
    assert found["phases"]["evaluate"] > found["phases"]["train"]  # 16 rows at once
    without = veneer.plan("smollm2", **asked, evaluate=False)
    assert without["phases"].keys() == {"load", "train", "save", "merge"}
    assert without["phases"]["train"] == found["phases"]["train"] >= without["phases"]["save"]
    assert without["peak_bytes"] < found["peak_bytes"] < found["phases"]["merge"]
    assert "merge" not in veneer.plan("smollm2", method="full", seq_len=128)["phases"]
    assert veneer.plan("smollm2", seq_len=128)["phases"]["merge"] > found["phases"]["merge"]  # both bases are tried


def test_a_second_base_is_counted(mini):
    def parts(**lora):
        return veneer.plan(mini, method="lora", lora=veneer.LoraConfig(r=8, **lora))

    plain, pissa = parts(), parts(init="pissa")
    linears = 3 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert plain["parts"]["second base"] == 0
    assert pissa["parts"]["second base"] == 2 * linears + plain["parts"]["adapter"]
    assert pissa["phases"]["load"] > plain["phases"]["load"]
    four = veneer.plan(mini, lora=veneer.LoraConfig(r=8, init="loftq", loftq_iterations=2))["parts"]
    assert 0.5 * linears < four["second base"] - four["adapter"] < 0.53 * linears
    assert veneer.plan(mini, lora=veneer.LoraConfig(r=8, init="loftq", loftq_iterations=1))["parts"]["second base"] == 0


def test_files_of_another_type_are_in_memory_twice_while_they_are_loaded(tmp_path, tokenizer):
    model = make_model()
    count = sum(p.numel() for p in model.parameters())
    for dtype in ("float32", "bfloat16"):
        veneer.save_model(model.to(getattr(torch, dtype)), tokenizer, tmp_path / dtype)
    wide, same = (
        veneer.plan(str(tmp_path / dtype), method="lora", rank=2, seq_len=64)["phases"]["load"]
        for dtype in ("float32", "bfloat16")
    )
    assert wide - same == 6 * count


def test_a_run_on_a_gpu(mini):
    asked = {"method": "lora", "seq_len": 256, "recompute": "full"}
    found = veneer.plan(mini, **asked, budget="rtx-4090")
    assert found["device"] == "cuda" and found["fits"] and found["budget_bytes"] == int(23.5 * (1 << 30))
    phases = found["phases"]
    assert sum(found["parts"].values()) == phases["train"] > phases["load"]
    assert phases["save"] == phases["evaluate"] >= phases["train"]  # segments stay
    assert found["parts"]["weights"] == 2 * found["parameters"]
    assert found["host"]["phases"]["load"] > found["parts"]["weights"] and found["host"]["budget_bytes"] is None
    assert not veneer.plan(mini, **asked, device="cuda", budget=found["peak_bytes"])["fits"]  # the context is not in it
    with pytest.raises(veneer.VeneerError, match="no memory for device cpu"):
        veneer.plan(mini, device="cpu", budget="t4")
    if not torch.cuda.is_available():
        with pytest.raises(veneer.VeneerError, match=r"no GPU(.|\n)*rtx-4090"):
            veneer.plan(mini, device="cuda")
        untimed = veneer.plan(mini, seq_len=64, budget="t4", time=True)
        assert "no GPU" in untimed["notes"][-1] and "seconds_per_step" not in untimed


def test_on_a_gpu_full_fine_tuning_has_masters_sums_and_moments_and_a_moment_more_in_the_step(mini):
    found = veneer.plan(mini, method="full", seq_len=64, device="cuda", budget="t4", evaluate=False)["parts"]
    count = found["weights"] // 2
    assert found["masters"] == found["gradients"] == 4 * count and found["optimizer"] == 8 * count
    assert sum(found[part] for part in ("activations", "logits", "scratch")) >= 4 * count


def test_recompute_on_a_gpu_is_of_whole_layers(mini):
    asked = {"device": "cuda", "method": "lora", "seq_len": 2048, "evaluate": False}
    whole = veneer.plan(mini, **asked, budget="10GB")
    budget = whole["peak_bytes"] + whole["process_bytes"] - 10**7
    found = veneer.plan(mini, **asked, budget=budget)
    assert whole["fits"] and not found["fits"]
    assert [x["change"] for x in found["changes"] if "recompute" in x["change"]] == ["recompute full"]


def test_names_of_machines():
    assert planning.bytes_of("RTX-4090") == int(23.5 * (1 << 30)) and planning.bytes_of("pc-16gb") == 14 << 30
    with pytest.raises(veneer.VeneerError, match=r"(.|\n)*rtx-4090"):
        planning.bytes_of("rtx-9999")
