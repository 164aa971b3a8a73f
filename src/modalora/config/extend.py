"""The settings of an extension: search, training and evaluation of a longer window."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modalora.config.run import RunConfig
from modalora.config.strict import Settings, parse
from modalora.errors import ConfigError

MOST_NEEDLES, MOST_DISTRACTORS = 99, 9999  # facts of one document


class SearchConfig(Settings):
    """The search for rotary divisors of a longer window (LongRoPE2, arXiv:2502.20082, section 3.2 and appendix B)."""

    space: Literal["longrope2", "longrope"] = "longrope2"  # longrope: every pair from 1 to 1.25 stretches
    anchor: int | None = Field(None, ge=1)  # the first pair that is searched; None: it is searched for too
    method: Literal["evolution", "random"] = "evolution"  # random: as many candidates, none made from another
    population: int = Field(64, ge=4)  # of which the better half are parents
    iterations: int = Field(40, ge=0)  # each gives half a population of children
    mutation: float = Field(0.3, gt=0, le=1)  # probability that a pair of a child changes
    crossover: float = Field(0.0, ge=0, le=1)  # share of the children that have two parents
    seed: int = Field(0, ge=0)  # of all that is random
    temperature: Literal["su", "yarn", "none"] = "su"  # of every candidate alike
    # of rows within the trained window; own: as the model has it; same: that of longer rows, as transformers needs it
    short_temperature: Literal["own", "same"] = "own"
    together: int = Field(4, ge=1)  # candidates that are judged in one call
    racing: bool = True  # drop a candidate once a part of the documents shows that it cannot become a parent
    race_from: int = Field(4, ge=2)  # documents read before the first look; each look doubles them
    race_error: float = Field(0.05, gt=0, lt=0.5)  # chance that a look drops a candidate that would become a parent
    proposals: int = Field(1, ge=1)  # children made for each one that is judged; above 1 a surrogate chooses

    @model_validator(mode="after")
    def _check_space(self) -> SearchConfig:
        if self.space == "longrope" and self.anchor is not None:
            raise ConfigError(f"anchor={self.anchor}: space=longrope searches every pair; leave the anchor out")
        if self.method == "random" and self.crossover:
            raise ConfigError(f"crossover={self.crossover}: method=random makes no child of two; leave crossover out")
        for key in ("race_from", "race_error"):  # a folder's own settings name every key
            if not self.racing and getattr(self, key) != SearchConfig.model_fields[key].default:
                raise ConfigError(f"{key}={getattr(self, key)} is for racing: true; leave it out")
        return self


class NeedleConfig(Settings):
    """Documents with facts hidden in them that are asked for at their end (evaluation/documents.py)."""

    style: Literal["digits", "words"] = "digits"  # digits: for any model; words: for one trained on `retrieval` rows
    documents: int = Field(10, ge=1)  # of each length
    needles: int = Field(1, ge=1, le=MOST_NEEDLES)  # facts of a document that are asked for
    distractors: int = Field(0, ge=0, le=MOST_DISTRACTORS)  # and that are not
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)  # 0: the start of the text
    seed: int = Field(0, ge=0)  # of all that is random


class GuideConfig(NeedleConfig):
    """What guides a search."""

    score: Literal["answers", "text"] = "answers"  # text: every token of the same texts, plain perplexity


class ScoresConfig(NeedleConfig):
    """What an extended model is measured by."""

    # tokens of documents; []: half the trained window to the target
    lengths: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)
    # that are compared, untrained, all with the search's temperature
    methods: list[Literal["none", "linear", "ntk", "scaling_law_ntk", "yarn", "longrope2"]] = Field(
        default=["none", "linear", "ntk", "scaling_law_ntk", "yarn", "longrope2"]
    )


class ExtendConfig(Settings):
    """A recipe that extends a model's window: search, training and evaluation (LongRoPE2, arXiv:2502.20082)."""

    kind: Literal["extend"]  # what tells it from a run
    init: str  # the model: a folder, bundled/nano, or a name of models/sizes.py for fresh weights
    output: str = Field(min_length=1)  # the folder of search, training and scores
    target: int = Field(ge=16)  # tokens that the model is to read [L']
    guide: GuideConfig = Field(default_factory=lambda: GuideConfig())  # what the search reads
    search: SearchConfig = Field(default_factory=lambda: SearchConfig())  # how divisors are searched
    training: dict[str, Any] | None = None  # fields of a run, but for init, output and rope; None: factors alone
    scores: ScoresConfig = Field(default_factory=lambda: ScoresConfig())  # what is measured in the end
    rows: int = Field(4, ge=1)  # documents of one forward pass
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights while searching and measuring
    device: str = "cpu"  # a torch device
    patience_seconds: int = Field(600, ge=1)  # how long a process waits for another
    threads: int = Field(0, ge=0)  # 0: torch's default
    data: str = "../shared/data"  # the folder of docs/nano.md
    cache: str = "runs/cache"  # the folder of files that are made once

    @model_validator(mode="after")
    def _training_is_a_run(self) -> ExtendConfig:
        if taken := sorted({"init", "output", "rope"} & set(self.training or {})):
            raise ConfigError(f"training: {', '.join(taken)} is set by the extension itself; leave it out")
        if not self.scores.methods and self.training is None:
            raise ConfigError("scores.methods=[]: without training there is nothing else to measure; name some")
        self.run(rope={})
        return self

    def score_lengths(self, window: int) -> list[int]:
        """Return the lengths to measure at: those asked for, or from half the trained window on, doubled.

        Raises ConfigError for a length beyond the target.
        """
        if asked := self.scores.lengths:
            if max(asked) > self.target:
                raise ConfigError(f"scores.lengths={asked} must not exceed target={self.target}")
            return sorted(set(asked))
        lengths = [self.target]
        while lengths[-1] >= window:
            lengths.append(lengths[-1] // 2)
        return lengths[::-1]

    def run(self, rope: dict[str, Any]) -> RunConfig | None:
        """Return the training on the extended model, None where there is none. Raises ConfigError."""
        if self.training is None:
            return None
        shared = {"device": self.device, "threads": self.threads, "data": self.data, "cache": self.cache}
        own = {"init": self.init, "output": f"{self.output}/train", "rope": rope}
        return parse(RunConfig, {**shared, **self.training, **own}, "training")
