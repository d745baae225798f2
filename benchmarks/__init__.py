"""Benchmarks C1 to C7, C10, `follow` and `bases`: Veneer beside PEFT, bitsandbytes, TRL and plain torch, on the machine you have.

    make bench                                      all of them, 5 rounds (hours on 2 slow cores, 1-2 on fast ones)
    python -m benchmarks.run c1 c2 --rounds 5       some of them
    python -m benchmarks.run --quick                a smoke run on tiny sizes: the figures mean nothing
    python -m benchmarks.run c1 --isa avx2          every process held to one instruction set

| file | what is compared |
|---|---|
| `c1_lora_step.py` | one LoRA training step, tokens a second |
| `c2_qlora_step.py` | the same on a 4-bit base |
| `c3_memory.py` | peak memory of C1 and C2, with recompute; the same processes |
| `c4_head.py` | frozen head + cross-entropy, time and memory |
| `c5_sft.py` | a whole fine-tune on chat rows |
| `c6_quantize.py` | NF4 quantise and dequantise |
| `c7_linear.py` | a 4-bit linear layer, 1 to 2048 rows |
| `c10_methods.py` | a step of rsLoRA, LoRA+, DoRA and AdaLoRA over one of plain LoRA |
| `ways.py` | what a QLoRA fine-tune keeps when it is merged, and merged into 4 bits |
| `c11_merge.py` | merging and writing, changing merged adapters, combining four |
| `follow.py` | the losses of 20 steps on chat rows, step by step |
| `bases.py` | perplexity of every kind of base |

Beside them `quality.py` (`python -m benchmarks.quality`, with a runner of its own): full fine-tuning, LoRA and its kinds on real
data, how good each is; `quality_report.py` makes its page.

`run.py` is the runner, `plan.py` what a benchmark is made of, `child.py` the process of one contender, `measure.py`
clock, memory and the machine's limits, `training.py` the training steps all contenders share, `data.py` their inputs.
"""
