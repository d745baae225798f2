"""Memory of known models by method, beside figures that are in circulation, and why they differ: `veneer plan --matrix`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veneer.planning.machines import GIB, MACHINES
from veneer.planning.plan import CONTEXT, plan

SIZES = {
    "7B": "llama-7b", "8B": "llama3-8b", "13B": "llama-13b", "33B": "llama-33b", "65B": "llama-65b", "70B": "llama2-70b",
}  # fmt: skip
METHODS = ("full", "lora", "qlora")
# GB that texts on LoRA give for training: at rank 16, all linears, 2,048 tokens. "33B on a 24 GB GPU", "65B on 48 GB".
GIVEN = {
    ("7B", "full"): 56, ("7B", "lora"): 16, ("7B", "qlora"): 6,
    ("13B", "full"): 104, ("13B", "lora"): 28, ("13B", "qlora"): 10,
    ("33B", "qlora"): 24, ("65B", "qlora"): 48,
    ("70B", "full"): 560, ("70B", "lora"): 140, ("70B", "qlora"): 48,
}  # fmt: skip
# GB that they give for the weights alone, in fp32, 16 bits, 8 bits and 4 bits.
WEIGHTS = {"7B": (28, 14, 7, 3.5), "13B": (52, 26, 13, 6.5), "70B": (280, 140, 70, 35)}


def matrix(
    batch_size: int = 1, seq_len: int = 2048, rank: int = 16, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Plans of all sizes and methods on a GPU, with and without recompute; and the bytes of their weights.

    Args:
        progress: called with how many are done, of how many.
    """
    rows: list[dict[str, Any]] = []
    for name, model in SIZES.items():
        for method in METHODS:
            asked: dict[str, Any] = {
                "method": method, "batch_size": batch_size, "seq_len": seq_len, "rank": rank, "evaluate": False,
            }  # fmt: skip
            kept, again = (
                plan(model, device="cuda", budget="h200", recompute=how, **asked) for how in ("none", "full")
            )
            parts = kept["parts"]
            rows.append({
                "size": name, "model": model, "method": method, "parameters": kept["parameters"],
                "weights": parts["weights"], "constants": parts["quantisation constants"],
                "trained": sum(parts[part] for part in ("adapter", "masters", "gradients", "optimizer")),
                "peak_bytes": kept["peak_bytes"] + CONTEXT, "recompute_bytes": again["peak_bytes"] + CONTEXT,
                "fits": _smallest(again["peak_bytes"] + CONTEXT), "given_gb": GIVEN.get((name, method)),
            })  # fmt: skip
            if progress is not None:
                progress(len(rows), len(SIZES) * len(METHODS))
    return {"batch_size": batch_size, "seq_len": seq_len, "rank": rank, "rows": rows, "weights": _weights(rows)}


def _smallest(needed: int) -> str | None:
    """The GPU with the least memory that has so much."""
    enough = [(machine.vram, name) for name, machine in MACHINES.items() if machine.vram >= needed]
    return min(enough)[1] if enough else None


def _weights(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """GB of all parameters in 4, 2, 1 and half a byte, beside those in circulation; and what NF4 takes in fact."""
    found = []
    for row in rows:
        if row["method"] == "qlora":
            count = row["parameters"]
            found.append({
                "size": row["size"], "parameters": count, "gb": [count * width / 1e9 for width in (4, 2, 1, 0.5)],
                "nf4_gb": (row["weights"] + row["constants"]) / 1e9, "given_gb": WEIGHTS.get(row["size"]),
            })  # fmt: skip
    return found


def describe(table: dict[str, Any]) -> str:
    """Both tables in Markdown, and what the differences come from."""
    lines = [
        f"GB on a GPU (10^9 bytes), {table['batch_size']} x {table['seq_len']:,} tokens, rank {table['rank']} on all linears:",
        "",
        "| | method | weights | trained | in all | recompute full | fits on | in circulation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        given = "" if row["given_gb"] is None else f"{row['given_gb']}"
        weights, trained, peak, again = (
            f"{value / 1e9:,.1f}"
            for value in (row["weights"] + row["constants"], row["trained"], row["peak_bytes"], row["recompute_bytes"])
        )
        lines.append(
            f"| {row['size']} | {row['method']} | {weights} | {trained} | {peak} | {again} | {row['fits'] or 'none'} | {given} |"
        )
    lines += ["", "The weights alone:", "", "| | parameters | fp32 | 16 bits | 8 bits | 4 bits | NF4 in fact | in circulation |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in table["weights"]:
        gb = " | ".join(f"{value:,.1f}" for value in row["gb"])
        given = "" if row["given_gb"] is None else ", ".join(map(str, row["given_gb"]))
        lines.append(f"| {row['size']} | {row['parameters']:,} | {gb} | {row['nf4_gb']:,.1f} | {given} |")
    return "\n".join([*lines, "", *_why(table)])


def _why(table: dict[str, Any]) -> list[str]:
    """A sentence for each kind of difference, with the 7B model's figures."""
    row = {r["method"]: r for r in table["rows"] if r["size"] == "7B"}
    count = row["full"]["parameters"]
    lora, qlora = row["lora"], row["qlora"]
    activations = (lora["peak_bytes"] - lora["weights"] - lora["trained"] - CONTEXT) / 1e9
    half = count / 2e9
    return [
        f"- Full: the figures in circulation are 8 bytes a parameter ({8 * count / 1e9:.0f} GB at 7B): weights, gradients and both of "
        f"Adam's moments in 16 bits. Steps smaller than 16 bits' rounding are lost so; here masters, sums of gradients and moments "
        f"are fp32, 18 bytes a parameter ({18 * count / 1e9:.0f} GB), and AdamW on a GPU takes 4 more for a moment. "
        f"None of them counts activations.",
        f"- LoRA: {lora['given_gb']} GB are the 16-bit weights ({lora['weights'] / 1e9:.1f} GB) and "
        f"about 2 more. That is so with recompute ({lora['recompute_bytes'] / 1e9:.1f} GB in all); without it activations, logits and "
        f"scratch of {table['batch_size']} x {table['seq_len']:,} tokens are {activations:.1f} GB.",
        f"- QLoRA: half a byte a parameter would be {half:.1f} GB. Embedding and head stay in 16 bits, and the constants of the blocks "
        f"add 0.127 bits: {(qlora['weights'] + qlora['constants']) / 1e9:.1f} GB. The rest of {qlora['recompute_bytes'] / 1e9:.1f} GB "
        f"(with recompute) is the adapter with gradients and moments in fp32 ({qlora['trained'] / 1e9:.1f} GB), activations, and on a GPU "
        f"scratch: torch's own operations decode a whole matrix, with an index of 8 bytes a number.",
        "- Names are not counts: 7B is 6.7 billion, 33B 32.5, 65B 65.3; there is no Llama-3 of 7B or 13B, and Llama-3's 128,256 tokens "
        "make embedding and head 2 billion bytes larger than Llama-2's.",
        f"- GB are 10^9 bytes; a 24 GB GPU has {MACHINES['rtx-4090'].vram / GIB:.1f} GiB for programs, a 16 GB T4 "
        f"{MACHINES['t4'].vram / GIB:.1f}.",
    ]
