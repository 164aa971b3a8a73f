"""How long does a new modality take from `adapter new` to answers, on one core, with nothing filled in?

    python benchmarks/modality.py

The scaffold's own recipe trains on the frozen nano; then 200 series that no training row held are asked about.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import modalora
from modalora.config import load_run
from modalora.modality import load_file
from modalora.processing.questions import question_messages
from modalora.scaffold import new_package
from modalora.training.run import run_recipe

SERIES = 200


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "modalora-signal"
        new_package("signal", package)
        load_file(package / "modalora_signal.py")
        own = sys.modules["modalora_file_modalora_signal"]
        before = modalora.load("nano").logits("The old man went home.")
        started, spent = time.perf_counter(), time.process_time()
        overrides = [f"output={folder}/run", "threads=1"]
        model = run_recipe(load_run(package / "recipe.yaml", overrides))
        seconds, cpu = time.perf_counter() - started, time.process_time() - spent

        assistant = modalora.load("nano")
        verdict = assistant.load_adapter(model.parent / "adapters" / "signal", "signal")
        rng = np.random.default_rng(10_000)
        cases = [(kind, own.make(kind, rng)) for kind in own.KINDS for _ in range(SERIES // len(own.KINDS))]
        right = 0
        for at in range(0, SERIES, 20):
            part = cases[at : at + 20]
            asked = [question_messages(own.QUESTION, media={"signal": series}) for _, series in part]
            answers = assistant.ask_many(asked, max_tokens=6)
            right += sum(answer.text == kind for answer, (kind, _) in zip(answers, part, strict=True))
        size = sum(path.stat().st_size for path in (model.parent / "adapters" / "signal").iterdir())
        report = {
            "training, wall seconds": round(seconds, 1),
            "training, CPU seconds": round(cpu, 1),
            "right answers of 200": right,
            "modules in the adapter's folder": verdict.modules,
            "folder, bytes": size,
            "text logits bit-identical": bool(torch.equal(before, assistant.logits("The old man went home."))),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
