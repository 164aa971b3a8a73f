"""Is anything lost when training stops? Random cuts, kill -9, missing parts of a state, and how long a stop takes.

python benchmarks/resume.py [--cuts 100] [--kills 200] [--stops 40]

A tiny model with every kind of media, dropout, accumulation, warm-up, two adapters and a pool of rows carried over from
step to step is trained whole once; then it is stopped or killed at random and resumed until it ends. Compared are the
bits of every logged figure, of the weights, and the ledger of samples. Each protection is also switched off once, here
alone, to show that the test can see a loss. torch is imported once: every run is a fork of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modalora import disk
from modalora.checkpoint import resume
from modalora.checkpoint.files import MANIFEST, seal
from modalora.checkpoint.store import load_model
from modalora.config import OptimConfig, RunConfig, SourceConfig
from modalora.contracts import IGNORED, Batch, Media, Route, image_tokens, subsampled
from modalora.disk import read_json, write_json
from modalora.errors import ModaloraError
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from modalora.training import loop, states
from modalora.training.signals import Interrupted

STEPS, ROWS, MICRO = 12, 3, 2
KINDS = (None, "vision", "speech", "both")
NANO = Path(__file__).parents[1] / "src" / "modalora" / "bundled" / "nano"


class Pool:
    """Rows drawn by number from four kinds; more are drawn than a step takes, and the longest wait for the next."""

    def __init__(self, seed: int, config: ModelConfig) -> None:
        self.seed, self.config = seed, config
        assert config.vision is not None
        side = config.vision.side
        self.picture = image_tokens(side, side, side)
        self.time = self.picture + 39  # a picture, a sound, and words
        self.drawn, self.waiting = 0, []

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "waiting": list(self.waiting)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn, self.waiting = state["drawn"], list(state["waiting"])

    def take(self) -> list[Batch]:
        while len(self.waiting) < ROWS * MICRO + 2:
            self.waiting.append(self.drawn)
            self.drawn += 1
        self.waiting.sort(key=lambda number: (self.length(number) + 5 * (number < self.drawn - 10), number))
        taken, self.waiting = self.waiting[: ROWS * MICRO], self.waiting[ROWS * MICRO :]
        return [self.batch(taken[at : at + ROWS]) for at in range(0, len(taken), ROWS)]

    def length(self, number: int) -> int:
        return int(np.random.default_rng((self.seed, number)).integers(self.time - 12, self.time))

    def batch(self, numbers: list[int]) -> Batch:
        media, ids, kinds = [], torch.zeros(len(numbers), self.time, dtype=torch.long), []
        lengths = torch.tensor([self.length(number) for number in numbers])
        vision = self.config.vision
        assert vision is not None
        for row, number in enumerate(numbers):
            rng = np.random.default_rng((self.seed, number))
            ids[row] = torch.from_numpy(rng.integers(0, self.config.decoder.vocab_size, self.time))
            kind = KINDS[number % len(KINDS)]
            kinds.append("vision" if kind == "both" else kind)
            if kind in ("vision", "both"):
                pixels = torch.from_numpy(rng.normal(size=(2, 3, vision.crop, vision.crop)).astype(np.float32))
                mask = torch.ones(2, vision.side, vision.side, dtype=torch.bool)
                features = {"pixels": pixels, "mask": mask, "grid": torch.tensor([1, 1])}
                media.append(Media("image", features, row, 1, self.picture, "vision"))
            if kind in ("speech", "both"):
                mel = torch.from_numpy(rng.normal(size=(37, 80)).astype(np.float32))
                branch = "vision" if kind == "both" else "speech"
                media.append(Media("audio", {"mel": mel}, row, self.picture + 7, subsampled(37), branch))
        labels = torch.where(torch.arange(self.time) < lengths[:, None], ids, IGNORED)
        labels[:, : self.picture + 17] = IGNORED
        names = tuple(f"{KINDS[number % len(KINDS)] or 'text'}:{number}" for number in numbers)
        return Batch(ids, lengths, Route(tuple(kinds)), tuple(media), labels, samples=names)


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    folder: Path
    seed: int = 0
    save_every: int = 3
    steps: int = STEPS

    def settings(self) -> RunConfig:
        return RunConfig(
            init="tiny", output=str(self.folder), train=["adapter.*", "*.projector.*"], steps=self.steps,
            mixture=[SourceConfig(source="books")], precision="fp32", log_every=1, save_every=self.save_every,
            seed=self.seed, ledger=True, optim=OptimConfig(lr=1e-3, warmup_steps=4, schedule="linear"),
        )  # fmt: skip

    def run(self) -> None:
        base = tiny()
        adapters = {name: replace(lora, lora_dropout=0.1) for name, lora in base.adapters.items()}
        config = replace(base, adapters=adapters)
        torch.manual_seed(self.seed)
        model = Multimodal(config)
        loop.train(self.settings(), model, Pool(self.seed, config))
        found = hashlib.sha256()
        for own in model.state_dict().values():
            found.update(own.numpy().tobytes())
        (self.folder / "weights.sha256").write_text(found.hexdigest())

    def outcome(self) -> tuple[list[str], str, list[Any]]:
        """Return every logged figure in hexadecimal, the hash of the weights, and the samples of each step."""
        timed = ("tokens_per_second", "labels_per_second", "remaining_seconds", "memory_mb")
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        told = [
            " ".join(f"{key}={float(value).hex()}" for key, value in line.items() if key not in timed) for line in lines
        ]
        ledger = [json.loads(line) for line in (self.folder / "ledger.jsonl").read_text().splitlines()]
        return told, (self.folder / "weights.sha256").read_text(), [(own["step"], own["samples"]) for own in ledger]


def fork(work: Callable[[], None], folder: Path) -> int:
    """Run in a child; return its process id. It exits with 0, 3 when interrupted, 4 with the error in FOLDER/error."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 4
    try:
        work()
        code = 0
    except Interrupted as stopped:
        code = 3 if stopped.exit_code == 0 else stopped.exit_code
    except BaseException as error:  # whatever ends a run is counted
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Return a child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(folder: Path, seed: int, save_every: int = 3) -> tuple[Any, float]:
    case = Case(folder, seed, save_every)
    started = time.perf_counter()
    assert wait(fork(case.run, folder)) == 0, (folder / "error").read_text()
    return case.outcome(), time.perf_counter() - started


def cuts(place: Path, count: int, rng: random.Random) -> str:
    """Stop by SIGTERM at a random moment, go on, compare."""
    same = stopped = 0
    expected: dict[int, Any] = {}
    seconds = 1.0
    for number in range(count):
        seed = number % 3
        if seed not in expected:
            expected[seed], seconds = whole_run(place / f"whole-{seed}", seed)
        case = Case(place / f"cut-{number}", seed)
        child = fork(case.run, case.folder)
        reached = rng.randrange(STEPS)
        while _steps_done(case.folder) < reached and not _ended(child):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1.5) * seconds / STEPS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        code = wait(child)
        stopped += code == 3
        for _ in range(2):
            if code == 0:
                break
            code = wait(fork(case.run, case.folder))
        same += code == 0 and case.outcome() == expected[seed]
        shutil.rmtree(case.folder)
    return f"{same} of {count} equal in every figure, every weight and every sample ({stopped} were under way when cut)"


def kills(place: Path, count: int, rng: random.Random, patch: Callable[[], None] = lambda: None) -> dict[str, int]:
    """Kill -9 again and again, at random and during saves, until each run has ended; count what is lost."""
    expected, seconds = whole_run(place / "whole", 7, save_every=1)
    samples = [name for _, names in expected[2] for name in names]
    found = {"kills": 0, "during a save": 0, "runs": 0, "lost": 0, "doubled": 0, "corrupt": 0, "other bits": 0}
    while found["kills"] < count:
        case = Case(place / f"run-{found['runs']}", 7, save_every=1)
        case.folder.mkdir(parents=True)
        found["runs"] += 1

        def work(case: Case = case) -> None:
            patch()
            case.run()

        code = -9
        for life in range(25):
            child = fork(work, case.folder)
            if life < 20 and found["kills"] < count:
                _kill_some_time(child, case.folder, seconds, rng)
            code = wait(child)
            if code != -signal.SIGKILL:
                break
            found["kills"] += 1
            found["during a save"] += _saves(case.folder)
        if code != 0:
            found["corrupt"] += 1
            continue
        told, weights, ledger = case.outcome()
        seen = [name for _, names in ledger for name in names]
        found["lost"] += len(set(samples) - set(seen))
        found["doubled"] += len(seen) - len(set(seen))
        found["other bits"] += (told, weights) != expected[:2]
        shutil.rmtree(case.folder)
    return found


def _kill_some_time(child: int, folder: Path, seconds: float, rng: random.Random) -> None:
    """Kill at a random time, or a random moment after the next save has begun."""
    until = time.perf_counter() + rng.uniform(0.05, 0.5) * seconds
    in_save = rng.random() < 0.5
    saves = rng.randint(1, 4)
    while time.perf_counter() < until or in_save:
        if _ended(child):
            return
        if in_save and _saves(folder):
            saves -= 1
            if not saves:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.01)
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saves(folder: Path) -> bool:
    """Tell whether a state is there that is not whole."""
    return any(not (path / MANIFEST).exists() for path in (folder / "resume").glob("*0*"))


def in_place() -> None:
    """Switch off: write into the state's folder itself, without manifest; believe the newest folder."""
    states.draft_of = lambda run, step: run / "resume" / f"{step:08d}"
    states.commit = lambda draft: draft
    states.newest = lambda run, say: next(iter(resume.states(run)[::-1]), None)


def no_position() -> None:
    """Switch off: the place in the data is not restored."""
    Pool.restore = lambda self, state: None  # type: ignore[method-assign]


def no_truncation() -> None:
    """Switch off: what was logged behind the state stays."""
    disk.step_of = lambda line: 0


def _missing(name: str) -> Callable[[Path, Path], None]:
    return lambda state, stale: (state / name).unlink()


def _stale(name: str) -> Callable[[Path, Path], None]:
    return lambda state, stale: (state / name).write_bytes((stale / name).read_bytes())


def _without(key: str) -> Callable[[Path, Path], None]:
    def change(state: Path, stale: Path) -> None:
        fields = read_json(state / "state.json")
        del fields[key]
        write_json(state / "state.json", fields)

    return change


def _old(key: str) -> Callable[[Path, Path], None]:
    def change(state: Path, stale: Path) -> None:
        write_json(state / "state.json", read_json(state / "state.json") | {key: read_json(stale / "state.json")[key]})

    return change


def _inner(key: str, inner: str) -> Callable[[Path, Path], None]:
    def change(state: Path, stale: Path) -> None:
        fields = read_json(state / "state.json")
        held = fields[key].get("state", fields[key])
        del held[inner]
        write_json(state / "state.json", fields)

    return change


def _fewer_tensors(name: str) -> Callable[[Path, Path], None]:
    def change(state: Path, stale: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(state / name, framework="pt") as file:
            notes = file.metadata()
            held = {key: file.get_tensor(key) for key in sorted(file.keys())[1:]}
        save_file(held, state / name, metadata=notes)

    return change


FILES = ("weights.safetensors", "optimizer.safetensors", "random-00000.safetensors", "state.json")
ABLATIONS: dict[str, Callable[[Path, Path], None]] = {
    **{f"{name} missing": _missing(name) for name in FILES},
    **{f"{name} of an earlier step": _stale(name) for name in FILES},
    **{f"{name} without its first tensor": _fewer_tensors(name) for name in FILES[:3]},
    **{f"state.json without {key}": _without(key) for key in states._PARTS},
    **{f"state.json with {key} of an earlier step": _old(key) for key in ("step", "rate", "progress", "data")},
    **{f"progress without {key}": _inner("progress", key) for key in states.Progress.__dataclass_fields__},
    **{f"data without {key}": _inner("data", key) for key in ("drawn", "waiting")},
}


def ablations(place: Path) -> dict[str, str]:
    """Take each part out of a state, or put an older one in, with a new manifest; return what resuming said."""
    case = Case(place / "ablated", 5)
    case.folder.mkdir(parents=True)
    child = fork(case.run, case.folder)
    while not (case.folder / "resume" / "00000009").exists():
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    wait(child)
    found = {}
    for name, change in ABLATIONS.items():
        folder = place / "one"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case.folder, folder)
        newest = sorted((folder / "resume").glob("0*"))
        change(newest[-1], newest[-2])
        (newest[-1] / MANIFEST).unlink()
        seal(newest[-1])
        for other in newest[:-1]:
            shutil.rmtree(other)
        code = wait(fork(Case(folder, 5).run, folder))
        found[name] = "not noticed" if code == 0 else (folder / "error").read_text()
    return found


def stops(place: Path, count: int, rng: random.Random) -> list[tuple[int, float]]:
    """Stop training of the bundled model at random by either signal; return exit codes and seconds until the end."""
    found = []
    base = load_model(NANO).model
    config = base.config

    def work(folder: Path) -> None:
        settings = Case(folder).settings().model_copy(update={"steps": 10_000, "train": ["decoder", "adapter.*"]})
        loop.train(settings.model_copy(update={"optim": OptimConfig()}), base, Pool(0, config))

    for number in range(count):
        folder = place / f"stop-{number}"
        child = fork(lambda folder=folder: work(folder), folder)
        time.sleep(rng.uniform(0.3, 12))
        started = time.perf_counter()
        os.kill(child, signal.SIGTERM if number % 2 else signal.SIGINT)
        found.append((wait(child), time.perf_counter() - started))
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("cuts", 100), ("kills", 200), ("stops", 40), ("controls", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch, which else every fork would do
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if given.cuts:
            print(f"cuts: {cuts(place / 'cuts', given.cuts, rng)}", flush=True)
        noticed = ablations(place / "parts")
        missed = [name for name, told in noticed.items() if told == "not noticed"]
        ours = sum(told.startswith(tuple(kind.__name__ for kind in _kinds(ModaloraError))) for told in noticed.values())
        print(f"parts of a state: {len(noticed) - len(missed)} of {len(noticed)} noticed, {ours} in words", flush=True)
        for name in missed:
            print(f"  not noticed: {name}")
        if given.kills:
            print(f"kill -9: {kills(place / 'kills', given.kills, rng)}", flush=True)
        for control in (in_place, no_position, no_truncation) if given.controls else ():
            found = kills(place / control.__name__, given.controls, rng, control)
            blind = not (found["corrupt"] or found["lost"] or found["doubled"] or found["other bits"])
            print(f"control {control.__name__}: {found}{'  BLIND' if blind else ''}", flush=True)
        if given.stops:
            ended = stops(place / "stops", given.stops, rng)
            codes = sorted({code for code, _ in ended})
            seconds = sorted(spent for _, spent in ended)
            print(
                f"stops at nano size: exit codes {codes} (3 stands for 0 with the state saved), "
                f"median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s"
            )


def _kinds(kind: type[BaseException]) -> list[type[BaseException]]:
    return [kind, *(inner for own in kind.__subclasses__() for inner in _kinds(own))]


if __name__ == "__main__":
    sys.exit(main())
