"""An adapter trained by transformers.Trainer: its checkpoints hold the adapter only, and it resumes from them.

python examples/transformers_trainer.py
"""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import veneer


def encode(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    """Token ids of a short chat, and labels that learn the answer and its end, not the question."""
    turn = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def main(
    name: str = "smollm2", out: str = "runs/trainer", steps: int = 12, quantize: str | None = "nf4", **settings: Any
) -> Trainer:
    model, tokenizer = veneer.load(name, quantize=quantize)
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16), seed=0)
    rows = [encode(tokenizer, f"lamp {i}, on please", f"on({i})") for i in range(32)]
    resume = settings.pop("resume", None)
    given = {
        "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-3,
        "lr_scheduler_type": "constant", "save_steps": steps // 2, "logging_steps": 1, "report_to": "none",
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(given | settings)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100; the end token stays learned
        processing_class=tokenizer,
    )
    veneer.adapter_checkpoints(trainer)  # so that it can read its checkpoints back
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{out}/adapter")  # PEFT's files
    return trainer


if __name__ == "__main__":
    main()
