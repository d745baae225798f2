"""Preferences learned by TRL's DPOTrainer; the reference is the same model without its adapter, at no memory of its own.

python examples/trl_dpo.py
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import veneer


def main(
    name: str = "smollm2", out: str = "runs/dpo", steps: int = 12, quantize: str | None = "nf4", **settings: Any
) -> DPOTrainer:
    model, tokenizer = veneer.load(name, quantize=quantize)
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16), seed=0)  # TRL turns dropout off in modules: leave ours at 0
    rows = Dataset.from_list([
        {
            "prompt": [{"role": "user", "content": f"lamp {i}, on please"}],
            "chosen": [{"role": "assistant", "content": f"on({i})"}],
            "rejected": [{"role": "assistant", "content": f"Sure! I will switch on lamp {i}."}],
        }
        for i in range(32)
    ])  # fmt: skip
    given = {
        "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "max_length": 128, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        ref_model=veneer.base_model(model),  # shares the weights; without it TRL would load the model once more
        args=DPOConfig(**(given | settings)),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")  # PEFT's files
    return trainer


if __name__ == "__main__":
    main()
