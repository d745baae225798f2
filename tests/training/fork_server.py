"""Runs of a tiny model, each in a process of its own, without paying for the imports each time: they are forked.

python fork_server.py JOBS.json     a list of lists of jobs; the lists run side by side, the jobs of one after each other

A job is {"out": folder, "data": file, "resume": bool, "stop": null or [step, batches], "steps": n, ...}. With `stop` the run is
asked to end, as by SIGTERM, once it is in that batch of that step.
"""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has no other threads
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from conftest import make_model, make_tokenizer

import veneer.config
from veneer.training import loop

torch.set_num_threads(1)
AT_ONCE = 2


def train(job):
    if job.get("model") == "smollm2":
        model, tokenizer = veneer.load("smollm2", quantize="nf4")
        targets = "attention"
    else:
        shape = {**job.get("shape", {})}
        if "dtype" in shape:
            shape["dtype"] = getattr(torch, shape["dtype"])
        model, tokenizer, targets = make_model(**shape), make_tokenizer(), "all-linear"
    veneer.attach(model, veneer.LoraConfig(r=4, dropout=0.2, targets=targets, **job.get("lora", {})), seed=1)
    config = veneer.TrainConfig(
        batch_size=2, grad_accumulation=3, max_steps=job["steps"], epochs=100, learning_rate=job.get("rate", 0.01),
        save_every=job.get("save_every", 7), eval_every=9, out=job["out"],
    )  # fmt: skip
    data = veneer.DataConfig(train=job["data"], eval=0.1, packing=True, max_length=64)
    if job.get("budget"):
        veneer.config.TOKEN_BUDGET = job["budget"]  # several packed sequences a batch
    if job.get("stop"):
        step, batches = job["stop"]
        loss, seen = loop.batch_loss, {}

        class Stops(loop.StopSignals):
            def __enter__(self):
                seen["signals"] = self
                return super().__enter__()

        def counted(model, batch, items):
            run = seen["run"]
            if model.training and (run.done, len(run.losses)) >= (step, batches):
                seen["signals"].number = 15
            return loss(model, batch, items)

        original = loop._Run.run

        def runs(self):
            seen["run"] = self
            return original(self)

        loop._Run.run, loop.batch_loss, loop.StopSignals = runs, counted, Stops
    return veneer.train(
        model, tokenizer, None, config, data_config=data, resume=job.get("resume", False), progress=False
    )


def work(jobs):
    """A process for each job, one after the other; the exit code is the first that is not what was asked for."""
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(job)
                code = 0
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != (143 if job.get("stop") else 0):
            print(f"{job}: exit code {code}", file=sys.stderr, flush=True)
            return 1
    return 0


def main():
    queue, running, failed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), set(), 0
    while queue or running:
        while queue and len(running) < AT_ONCE:
            jobs = queue.pop(0)
            if (child := os.fork()) == 0:
                os._exit(work(jobs))
            running.add(child)
        child, status = os.wait()
        running.discard(child)
        failed += os.waitstatus_to_exitcode(status) != 0
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
