"""An adapter trained in a loop of one's own with accelerate.

python examples/accelerate_loop.py        (or: accelerate launch examples/accelerate_loop.py)
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

import veneer


def main(
    name: str = "smollm2", out: str = "runs/accelerate", steps: int = 12, quantize: str | None = "nf4", **settings: Any
) -> list[float]:
    accelerator = Accelerator(**settings)
    model, tokenizer = veneer.load(name, quantize=quantize, device=str(accelerator.device))
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    texts = [f"lamp {i}, on please: on({i}){tokenizer.eos_token}" for i in range(32)]
    loader = torch.utils.data.DataLoader(texts, batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=2e-3), loader)
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        for batch in loader:
            tokens = tokenizer(batch, padding=True, padding_side="right", return_tensors="pt").to(accelerator.device)
            labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)  # padding, not the end token
            with accelerator.accumulate(model):
                loss = model(**tokens, labels=labels).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(f"{out}/adapter", is_main_process=accelerator.is_main_process)
    return losses


if __name__ == "__main__":
    main()
