"""An adapter trained by TRL's SFTTrainer on a 4-bit base.

python examples/trl_sft.py
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import veneer


def main(
    name: str = "smollm2", out: str = "runs/sft", steps: int = 12, quantize: str | None = "nf4", **settings: Any
) -> SFTTrainer:
    model, tokenizer = veneer.load(name, quantize=quantize)
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16), seed=0)
    rows = Dataset.from_list([
        {
            "prompt": [{"role": "user", "content": f"lamp {i}, on please"}],
            "completion": [{"role": "assistant", "content": f"on({i})"}],
        }
        for i in range(32)
    ])  # fmt: skip
    given = {
        "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-3,
        "lr_scheduler_type": "constant", "max_length": 128, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "bf16": False,  # no autocast: the model computes in its own type
        "gradient_checkpointing": False,  # TRL's default is on: less memory, slower
    }  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**(given | settings)), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")  # PEFT's files
    return trainer


if __name__ == "__main__":
    main()
