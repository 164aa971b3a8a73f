"""The search: it finds, it never gets worse, and what kills it or how many processes share it changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hills import SMALL, STRETCH, TINY, Hill, KilledError, Mortal, find, search_tiny
from torch import Tensor

from modalora.config import SearchConfig
from modalora.errors import ConfigError, TrainingError, WorkError
from modalora.longrope2.factors import Factors
from modalora.longrope2.search import LOG, Outcome, is_worse, rank_correlation, search
from modalora.longrope2.space import space_of
from modalora.training.signals import Interrupted

ROOT = Path(__file__).parents[2]


def hill(config: SearchConfig, judge: Hill | None = None, **given: Any) -> Outcome:
    return search(space_of(STRETCH, config), judge or Hill(), config, **given)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- finding


def test_the_best_candidate_never_gets_worse() -> None:
    found = hill(SearchConfig(population=16, iterations=12))
    losses = [told["loss"] for told in found.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert found.loss == losses[-1]


@pytest.mark.parametrize("crossover", [0.0, 0.5, 1.0])
def test_evaluations_are_the_population_and_half_of_it_for_each_iteration(crossover: float) -> None:
    found = hill(SearchConfig(population=16, iterations=6, crossover=crossover))
    assert found.evaluations == 16 + 6 * 8
    assert [told["evaluations"] for told in found.history] == [16 + 8 * number for number in range(7)]


def test_the_loss_is_the_mean_over_all_documents() -> None:
    found = hill(SMALL)
    for factors, loss in found.parents:
        assert loss == pytest.approx(float(Hill().losses([factors], range(16)).mean()), rel=1e-12)
    assert found.parents[0] == (found.best, found.loss)
    assert [loss for _, loss in found.parents] == sorted(loss for _, loss in found.parents)


def test_it_beats_random_search_at_equal_evaluations() -> None:
    """On every one of three seeds, and half of what random search leaves above the best at least."""
    floor = float(Hill().level.mean())  # of the best vector
    for seed in range(3):
        config = SearchConfig(population=32, iterations=15, seed=seed)
        ours, blind = hill(config), hill(config.model_copy(update={"method": "random"}))
        assert ours.evaluations == blind.evaluations == 32 + 15 * 16
        assert ours.loss - floor < 0.5 * (blind.loss - floor)


def test_a_fixed_anchor_stays_and_a_search_of_all_pairs_has_none() -> None:
    fixed = hill(SearchConfig(population=8, iterations=3, anchor=7))
    assert {factors.anchor for factors, _ in fixed.parents} == {7}
    every = hill(SearchConfig(population=8, iterations=3, space="longrope"))
    assert {factors.anchor for factors, _ in every.parents} == {0}


def test_a_small_space_ends_with_fewer_candidates() -> None:
    config = SearchConfig(population=4, iterations=4, anchor=31)
    space = replace(space_of(STRETCH, config), lowest=800, highest=804)  # five divisors for one pair
    assert search(space, Hill(), config).evaluations == 5


# -------------------------------------------------------------------------------------------------------------- racing


def test_racing_reads_less_and_finds_as_much() -> None:
    plain, raced, gaps = 0, 0, []
    for seed in range(2):
        config = SearchConfig(population=32, iterations=15, seed=seed)
        whole = hill(config.model_copy(update={"racing": False}), Hill(64))
        fast = hill(config, Hill(64))
        assert whole.passes == whole.evaluations * 64
        plain, raced = plain + whole.passes, raced + fast.passes
        gaps.append(fast.loss - whole.loss)
    assert raced < 0.6 * plain
    assert float(np.mean(gaps)) < 0.02  # nats; a random search of this size ends 0.5 above


def test_a_parent_was_read_to_the_end() -> None:
    seen: dict[tuple[float, ...], set[int]] = {}

    class Watched(Hill):
        def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
            for own in candidates:
                known = seen.setdefault(own.long, set())
                assert not known & set(documents)  # nothing is asked twice
                known.update(documents)
            return super().losses(candidates, documents)

    judge = Watched()
    found = hill(SMALL, judge)
    assert all(len(seen[factors.long]) == 16 for factors, _ in found.parents)
    assert any(len(known) == 4 for known in seen.values())  # and some were dropped at the first look
    assert judge.passes == found.passes


@pytest.mark.parametrize("read", [4, 8, 16])
def test_a_candidate_that_is_no_worse_is_dropped_as_rarely_as_promised(read: int) -> None:
    """Gaps drawn with a mean of exactly 0 over all 32 documents: at most 5 of 100 may look worse at a look."""
    rng = np.random.default_rng(read)
    dropped = 0
    for _ in range(4000):
        gaps = rng.normal(size=32)
        gaps -= gaps.mean()
        dropped += is_worse(rng.permutation(gaps)[:read], 32, 0.05)
    assert 0.03 < dropped / 4000 < 0.06  # three standard errors of 0.0034 around 0.05, and the expansion's own error


def test_a_candidate_that_is_much_worse_is_dropped_at_once_and_a_better_one_never() -> None:
    rng = np.random.default_rng(0)
    assert all(is_worse(rng.normal(5.0, 1.0, 4), 32, 0.05) for _ in range(100))
    assert not any(is_worse(rng.normal(-5.0, 1.0, 4), 32, 0.05) for _ in range(100))
    assert is_worse(np.array([1.0, -0.9]), 2, 0.05)  # all documents: the mean decides
    assert not is_worse(np.array([0.9, -1.0]), 2, 0.05)


# ----------------------------------------------------------------------------------------------- killed, and continued


def test_a_search_killed_at_any_call_and_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = find(tmp_path / "whole")
    told = (tmp_path / "whole" / LOG).read_bytes()
    calls = told.count(b"\n") - 1
    rng = np.random.default_rng(5)
    for kill in {0, 1, calls - 1, *rng.integers(2, calls - 1, size=6).tolist()}:
        folder = tmp_path / f"killed-{kill}"
        with pytest.raises(KilledError):
            find(folder, kill)
        assert find(folder) == whole
        assert (folder / LOG).read_bytes() == told


def test_one_killed_again_and_again_gets_there_too(tmp_path: Path) -> None:
    whole = find(tmp_path / "whole")
    kills = 0
    while True:
        try:
            found = find(tmp_path / "often", 7)
            break
        except KilledError:
            kills += 1
    assert kills > 5
    assert found.parents == whole.parents
    assert (tmp_path / "often" / LOG).read_bytes() == (tmp_path / "whole" / LOG).read_bytes()


@pytest.mark.parametrize("torn", [1, 7, 60])
def test_a_torn_last_line_is_judged_again(tmp_path: Path, torn: int) -> None:
    whole = find(tmp_path)
    told = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(told[:-torn])
    assert find(tmp_path).parents == whole.parents
    assert (tmp_path / LOG).read_bytes() == told


def test_a_finished_search_asks_nothing_and_may_go_on(tmp_path: Path) -> None:
    whole = find(tmp_path)
    assert find(tmp_path, 0).parents == whole.parents
    longer = SMALL.model_copy(update={"iterations": 8})
    went_on = find(tmp_path, config=longer)
    assert went_on.parents == find(tmp_path / "new", config=longer).parents
    assert went_on.evaluations == whole.evaluations + 3 * 8


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seed": 4}, "settings"), ({"anchor": 9}, "space and settings"), ({"racing": False}, "settings")],
)
def test_the_log_of_another_search_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    find(tmp_path)
    with pytest.raises(ConfigError, match=f"the log of a search with other {told}; give another folder"):
        find(tmp_path, config=SMALL.model_copy(update=change))
    with pytest.raises(ConfigError, match="other fingerprints"):
        hill(SMALL, folder=tmp_path, fingerprints={"model": "another"})
    with pytest.raises(ConfigError, match="other documents"):
        hill(SMALL, Hill(17), folder=tmp_path)


def test_an_altered_log_is_refused(tmp_path: Path) -> None:
    find(tmp_path)
    told = lines(tmp_path)
    told[5]["candidates"][0][1][-1] += 1
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in told))
    with pytest.raises(ConfigError, match=r"line 6 of search.jsonl is not what this search asks next"):
        find(tmp_path)


def test_every_evaluation_stands_in_the_log(tmp_path: Path) -> None:
    found = find(tmp_path)
    calls = lines(tmp_path)[1:]
    assert sum(len(call["candidates"]) * len(call["documents"]) for call in calls) == found.passes
    assert len({json.dumps(own) for call in calls for own in call["candidates"]}) == found.evaluations
    judge = Hill()
    space = space_of(STRETCH, SMALL)
    for call in calls:
        for (anchor, tail), row in zip(call["candidates"], call["losses"], strict=True):
            factors = Factors.meeting(STRETCH, anchor, [value / 100 for value in tail], space.temperature)
            # one product of several candidates sums in another order
            assert judge.losses([factors], call["documents"]).tolist()[0] == pytest.approx(row, rel=1e-12)


RUN = "import sys; from pathlib import Path; sys.path.insert(0, {here!r}); import torch; torch.set_num_threads(1); "
RUN += "from hills import search_tiny; search_tiny(Path(sys.argv[1]), int(sys.argv[2]))"


def test_a_process_killed_by_the_system_goes_on_from_its_log(tmp_path: Path) -> None:
    """SIGKILL in the middle of a search over a real model, in a process of its own; the rest runs here."""
    whole = search_tiny(tmp_path / "whole")
    command = [sys.executable, "-c", RUN.format(here=str(Path(__file__).parent)), str(tmp_path / "killed"), "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert len(lines(tmp_path / "killed")) == 1 + 5
    resumed = search_tiny(tmp_path / "killed")
    assert resumed.parents == whole.parents
    assert (tmp_path / "killed" / LOG).read_bytes() == (tmp_path / "whole" / LOG).read_bytes()
    assert whole.evaluations == 6 + 2 * 3


class Interrupting(Hill):
    """Gets a signal while it judges, as from Ctrl-C, and would go on for ever."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__()
        self.at, self.number = at, number

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        if self.asked == self.at:
            signal.raise_signal(self.number)
            threading.Event().wait(20)
            raise AssertionError("it was not broken off")
        return super().losses(candidates, documents)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize(("calls", "judged"), [(0, 0), (2, 6), (9, 16)])  # of three candidates, 16 in the first round
def test_ctrl_c_breaks_off_what_is_judged_and_keeps_the_rest(
    tmp_path: Path, number: int, code: int, calls: int, judged: int
) -> None:
    whole = find(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped after {judged} of 56 evaluations; its log holds") as stopped:
        hill(SMALL, Interrupting(calls, number), folder=tmp_path / "stopped")
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) == before
    assert len(lines(tmp_path / "stopped")) == 1 + calls
    assert find(tmp_path / "stopped").parents == whole.parents


# ---------------------------------------------------------------------------------------------------- many processes


def share(folder: Path, calls: int) -> Any:
    torch.set_num_threads(1)
    try:
        found = find(folder, calls)
    except (KilledError, TrainingError):  # killed itself, or waited for one that was
        return None
    return found.best, found.loss, found.parents, found.passes


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_finds_the_same(tmp_path: Path, ranks: Callable[..., list[Any]], world: int) -> None:
    alone = share(tmp_path / "alone", 10**9)
    assert ranks(world, share, tmp_path / "many", 10**9) == [alone] * world
    assert (tmp_path / "many" / LOG).read_bytes() == (tmp_path / "alone" / LOG).read_bytes()


def test_a_search_killed_in_one_process_goes_on_in_two_and_in_one_again(
    tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    alone = share(tmp_path / "alone", 10**9)
    assert share(tmp_path / "many", 8) is None
    assert ranks(2, share, tmp_path / "many", 6) == [None, None]
    assert share(tmp_path / "many", 10**9) == alone
    assert (tmp_path / "many" / LOG).read_bytes() == (tmp_path / "alone" / LOG).read_bytes()


def stop_one(folder: Path) -> str:
    judge = Interrupting(10**9, signal.SIGINT)
    if os.environ["RANK"] == "1":

        class Late(Hill):
            def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
                if self.asked == 4:
                    signal.raise_signal(signal.SIGTERM)
                return super().losses(candidates, documents)

        judge = Late()
    try:
        hill(SMALL, judge, folder=folder)
    except Interrupted as stopped:
        return str(stopped)
    return "ended"


def test_a_signal_to_one_process_stops_all_at_the_same_call(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    one, other = ranks(2, stop_one, tmp_path)
    assert "search stopped after" in one
    assert "search stopped after" in other
    whole = find(tmp_path / "whole")
    assert 10 <= len(lines(tmp_path)) < len(lines(tmp_path / "whole"))
    assert find(tmp_path).parents == whole.parents


# ------------------------------------------------------------------------------------------------- surrogate, messages


class Near(Hill):
    """Another judge of the same candidates, cheaper by what it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.documents = 2
        self.first: list[Factors] = []
        self.ranked = 0

    def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
        self.first.append(candidates[0])
        self.ranked += len(candidates) - 1
        return super().losses(candidates, documents)


def test_a_surrogate_chooses_which_proposals_are_judged(tmp_path: Path) -> None:
    config = SearchConfig(population=16, iterations=6, proposals=4, seed=1)
    near = Near()
    found = hill(config, surrogate=near, folder=tmp_path)
    assert near.ranked == 6 * 4 * 8
    assert found.evaluations == 16 + 6 * 8
    plain = hill(config.model_copy(update={"proposals": 1}))
    assert found.loss < plain.loss
    assert all(-1 <= told["surrogate_correlation"] <= 1 for told in found.history[1:])
    assert np.mean([told["surrogate_correlation"] for told in found.history[1:]]) > 0.3
    assert any(call["by"] == "surrogate" for call in lines(tmp_path)[1:])
    best = {told["iteration"]: told for told in found.history}
    assert near.first[0].anchor == best[0]["anchor"]  # it is told the best so far first
    again = hill(config, Mortal(0), surrogate=Near(), folder=tmp_path)  # and nothing is asked again
    assert again.parents == found.parents


def test_a_surrogate_without_use_and_proposals_without_surrogate_are_refused() -> None:
    with pytest.raises(ConfigError, match="proposals=4 are chosen among by a surrogate, and none was given"):
        hill(SearchConfig(proposals=4))
    with pytest.raises(ConfigError, match="set proposals, such as 4"):
        hill(SMALL, surrogate=Near())


def test_a_loss_that_is_no_number_is_an_error_and_no_rank() -> None:
    class Broken(Hill):
        def losses(self, candidates: Sequence[Factors], documents: Sequence[int]) -> Tensor:
            found = super().losses(candidates, documents)
            if self.asked == 3:
                found[-1, -1] = torch.nan
            return found

    with pytest.raises(WorkError, match=r"anchor \d+ and divisors .* is nan, which cannot be ranked"):
        hill(SMALL, Broken())


def test_progress_is_reported_after_every_call() -> None:
    seen: list[dict[str, Any]] = []
    judge = Hill()
    found = hill(SMALL, judge, report=lambda figures: seen.append(dict(figures)))
    assert len(seen) == judge.asked
    assert seen[-1]["iteration"] == seen[-1]["iterations"] == SMALL.iterations
    assert [told["evaluations"] for told in seen[:6]] == [3, 6, 9, 12, 15, 16]
    assert [told["evaluations"] for told in seen] == sorted(told["evaluations"] for told in seen)
    assert seen[-1]["planned"] == found.evaluations == 16 + 5 * 8
    assert {"loss", "perplexity", "anchor", "first_stretched", "remaining_seconds"} <= set(seen[-1])


def test_rank_correlation_is_spearmans() -> None:
    """Against the textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)), which holds without equals."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.permutation(9), rng.permutation(9)
        told = 1 - 6 * float(((one - other) ** 2).sum()) / (9 * 80)
        assert rank_correlation(np.exp(one).tolist(), other.tolist()) == pytest.approx(told)
    assert rank_correlation([1.0, 1.0, 2.0], [3.0, 3.0, 4.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 1.0, 1.0], [3.0, 1.0, 4.0]) == 0.0


def test_settings_of_the_tiny_search_stand_in_its_log(tmp_path: Path) -> None:
    search_tiny(tmp_path)
    told = lines(tmp_path)[0]["search"]
    assert told["settings"] == TINY.model_dump(exclude={"iterations"})
    assert told["space"]["anchors"] == [1, 2, 3]
