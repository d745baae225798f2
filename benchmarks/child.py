"""The process of one cell: python -m benchmarks.child MODULE:FUNCTION ARGUMENTS OPTIONS OUT (JSON, JSON, a file)."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path

from benchmarks.plan import Options


def main() -> None:
    function, arguments, options, out = sys.argv[1:]
    warnings.filterwarnings("ignore")
    module, _, name = function.partition(":")
    record = getattr(importlib.import_module(module), name)(Options.from_json(options), **json.loads(arguments))
    Path(out).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
