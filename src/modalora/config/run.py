"""The settings of a training run, and of a chain of runs."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from modalora.config.strict import Settings
from modalora.errors import ConfigError

MOST_RATE = 1e3  # far beyond any that learns; products of much larger ones leave float32


class FittedRate(Settings):
    """A learning rate found best for a number of training tokens; another number D gets lr (D / tokens)^exponent.

    Source: arXiv:2503.01743, section 3.1, after Bjorck et al. 2024.
    """

    lr: float = Field(gt=0)  # the rate found best
    tokens: float = Field(gt=0)  # of the runs that it was found with
    exponent: float = -0.32  # how the best rate changes with tokens

    def rate(self, tokens: float) -> float:
        """Return the learning rate for a run over so many tokens."""
        try:
            rate = self.lr * (tokens / self.tokens) ** self.exponent
        except OverflowError:
            rate = inf
        if not 0 < rate <= MOST_RATE:
            raise ConfigError(
                f"optim.fitted gives a rate of {rate:g} for {tokens:g} tokens; it needs tokens of the order of those "
                "that lr was found for, and an exponent such as -0.32"
            )
        return rate


class MediaConfig(Settings):
    """Limits on training media. None: the model's own."""

    max_crops: int | None = Field(None, ge=1)  # of one picture
    max_seconds: float | None = Field(None, gt=0)  # of one sound


class OptimConfig(Settings):
    """The optimiser and its schedule: linear warm-up, then a cosine or a line down to final_lr_ratio, or no change."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, the rest by AdamW
    lr: float = Field(1e-3, gt=0, le=MOST_RATE)  # the highest rate, which warm-up reaches
    fitted: FittedRate | None = None  # gives lr from the tokens of the run
    # how slowly AdamW's two moments change
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)  # added to the divisor of AdamW's step
    weight_decay: float = Field(0.01, ge=0)  # of tensors of two axes and more, a step, times the rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # from the end of warm-up to the last step
    warmup_steps: int = Field(50, ge=0)  # in which the rate rises from 0
    final_lr_ratio: float = Field(0.1, ge=0, le=1)  # share of lr that a decay reaches one step behind the last
    # longest gradient of a step, others are scaled down; .inf: none
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    # part, with * for any text -> factor on lr; of several that fit a part the last counts
    lr_scale: dict[str, Annotated[float, Field(ge=0, le=MOST_RATE)]] = Field(default_factory=dict)
    state_bits: Literal[8, 16, 32] = 32  # of each of AdamW's two moments; 8 and 16 are for name: adamw

    @model_validator(mode="after")
    def _moments_move(self) -> OptimConfig:
        if self.state_bits < 32 and self.name != "adamw":
            raise ConfigError(f"state_bits={self.state_bits} is for name: adamw; {self.name} keeps 32")
        if self.state_bits == 16 and self.betas[1] > 0.99:
            raise ConfigError(
                f"betas[1]={self.betas[1]} moves a bf16 moment by less than it can hold; use 0.99 or less, or 8 bits"
            )
        most = {8: 0.95, 16: 0.99, 32: 1.0}[self.state_bits]
        if self.betas[0] > most:
            raise ConfigError(
                f"betas[0]={self.betas[0]} moves a first moment of {self.state_bits} bits by less than it can hold; "
                f"use {most} or less, or state_bits: 32"
            )
        return self


class SourceConfig(Settings):
    """One source of a mixture."""

    source: str  # files, documents, a name of data/sources.py:SOURCES, or MODALITY.SOURCE
    name: str = Field("", pattern=r"^[\w.-]*$")  # what its rows are called in reports; "": the source
    # its share of the rows against the others' weights, or phases of a run: {0: 3, 0.8: 1} is 3 from the start and 1
    # from 80 % of the steps on
    weight: float | dict[float, float] = 1.0
    epochs: int | None = Field(None, ge=1)  # how often a source that ends is read; None: as long as the run
    window: int | None = Field(None, ge=8)  # tokens of its rows where it cuts text into windows; None: the run's
    media: MediaConfig = Field(default_factory=MediaConfig)  # limits on its pictures and sounds; None: the run's
    route: str | None = None  # of its rows: "none" or an adapter, such as a language's; None: by their media
    # what the source itself takes; docs/data.md has those of files
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: float | dict[float, float]) -> float | dict[float, float]:
        if isinstance(weight, dict):
            if 0 not in weight or not all(0 <= share < 1 for share in weight):
                raise ConfigError(
                    f"weight={weight}: phases are shares of the run, the first 0, all below 1, such as {{0: 3, 0.8: 1}}"
                )
            if not all(0 <= value < inf for value in weight.values()) or not any(weight.values()):
                raise ConfigError(f"weight={weight}: the weights of phases must be 0 or more, and one of them above 0")
        elif not 0 < weight < inf:
            raise ConfigError(f"weight={weight} must be greater than 0, such as 1")
        return weight

    @model_validator(mode="after")
    def _holds_out_a_share(self) -> SourceConfig:
        share = self.options.get("held_out", 0)
        if self.source == "files" and (type(share) not in (int, float) or not 0 <= share < 1):
            raise ConfigError(
                f"held_out={share!r} of source {self.name or self.source!r} must be a share of its rows, a number from "
                "0 to below 1, such as 0.05"
            )
        return self

    @property
    def holds_out(self) -> bool:
        """Whether a share of its files' rows is scored and never trained on (data/corpus.py:open_corpus)."""
        return self.source == "files" and self.options.get("held_out", 0) > 0

    def weight_at(self, share: float) -> float:
        """Return the weight at a share of the run, 0 to 1."""
        if not isinstance(self.weight, dict):
            return self.weight
        return self.weight[max(start for start in self.weight if start <= share)]


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """Return what each source is called in the names of samples: its own name, numbered where that is not unique."""
    names = [source.name or source.source for source in sources]
    return [name if names.count(name) == 1 else f"{name}.{place}" for place, name in enumerate(names)]


class MeshConfig(Settings):
    """How the processes of a run stand: replicate x shard x sequence x tensor of them."""

    replicate: int = Field(1, ge=1)  # copies of the model
    shard: int = Field(0, ge=0)  # processes that a copy's parameters are cut over; 0: all that are left
    sequence: int = Field(1, ge=1)  # processes that share the tokens of every micro-batch
    ring: int = Field(1, ge=1)  # of these, how many keys and values travel through; the others share heads
    ulysses: Literal["own", "deepspeed"] = "own"  # whose all-to-all shares heads
    tensor: int = Field(1, ge=1)  # processes that share the heads and channels of every layer

    @model_validator(mode="after")
    def _fit_ring(self) -> MeshConfig:
        if self.sequence % self.ring:
            raise ConfigError(f"mesh: ring={self.ring} must divide sequence={self.sequence}")
        if self.ulysses == "deepspeed" and (self.ring > 1 or self.sequence == 1):
            raise ConfigError(
                f"mesh: ulysses=deepspeed shares heads among mesh.sequence processes, without a ring; given "
                f"sequence={self.sequence}, ring={self.ring}"
            )
        return self

    @property
    def copies(self) -> int:
        """Processes that read the same rows."""
        return self.sequence * self.tensor


class RunConfig(Settings):
    """One training run."""

    init: str  # a folder to start from, bundled/nano, or a name of models/sizes.py for fresh weights
    output: str = Field(min_length=1)  # the folder of the run: model, states, metrics
    modalities: dict[str, dict[str, Any]] = Field(default_factory=dict)  # modality to add -> its sizes
    rope: dict[str, Any] | None = None  # rotary positions (nn/rope.py) and window that the start gets; None: its own
    # Python files that set MODALITY; they are run (docs/modality.md)
    modality_files: list[str] = Field(default_factory=list)
    adapters: dict[str, dict[str, Any]] = Field(default_factory=dict)  # adapter to add -> fields of LoraConfig
    take: dict[str, str] = Field(default_factory=dict)  # part pattern -> folder that gives its weights
    copy_parts: dict[str, str] = Field(default_factory=dict)  # part -> part of the same shape that it starts from
    int8: bool = False  # store the matrices of the written model as int8
    train: list[str]  # parts that train, e.g. "decoder", "image.*", "adapter.vision"; all others are frozen
    preserve: list[str] = Field(default_factory=list)  # parts that must not train, whatever train: matches
    mixture: list[SourceConfig] = Field(min_length=1)  # where rows come from
    weigh: Literal["rows", "tokens"] = "rows"  # what the weights of the mixture's sources are shares of
    # where rows come from that are scored and never trained on, beside what sources of mixture hold out
    eval_mixture: list[SourceConfig] = Field(default_factory=list)
    eval_every: int | None = Field(None, ge=1)  # steps between scores, beside the first and the last; None: save_every
    eval_rows: int = Field(256, ge=1)  # of each source that are scored, the same ones every time
    media: MediaConfig = Field(default_factory=MediaConfig)  # limits on pictures and sounds
    # modalities whose fresh projectors start from their features' statistics
    whiten: list[str] = Field(default_factory=list)
    # encoder, e.g. "audio.encoder" -> share of what each of its blocks hands on that training drops
    dropout: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)
    objective: Literal["next_token", "ctc", "cells"] = "next_token"  # ctc and cells pretrain encoders
    rows: int = Field(16, ge=1)  # conversations or windows per micro-batch
    tokens: int = Field(0, ge=0)  # instead of rows: the budget that rows of a micro-batch fill together
    accumulate: int = Field(1, ge=1)  # micro-batches per step, over all processes
    workers: int = Field(0, ge=0)  # processes that prepare rows ahead
    quarantine_most: float = Field(0.01, ge=0, lt=1)  # share of bad rows that stops the run
    window: int = Field(256, ge=8)  # tokens of a plain text window
    steps: int = Field(ge=1)  # of the optimiser
    precision: Literal["bf16", "fp32"] = "bf16"  # of products in training
    base_bits: Literal[4, 8, 16] | None = None  # of the frozen decoder's Linears in training; None: as they are
    # layers run again in the backward pass instead of keeping what they computed; offload: their inputs lie on the CPU
    recompute: bool | Literal["offload"] = False
    seed: int = Field(0, ge=0, lt=2**63)  # of all that is random
    log_every: int = Field(10, ge=1)  # steps between lines of metrics
    save_every: int = Field(200, ge=1)  # steps between resume checkpoints
    keep: int = Field(2, ge=1)  # resume checkpoints kept
    save_in_background: bool = False  # training goes on while a copy of what trains is written
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does to its step
    nonfinite_most: int = Field(5, ge=1)  # steps skipped in a row after which the run stops all the same
    ledger: bool = False  # write the samples of every step to ledger.jsonl
    # that get the metrics, too
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    peak_tflops: float | None = Field(None, gt=0)  # of the machine at this precision, for the share of it that is used
    device: str = "cpu"  # a torch device
    engine: Literal["fsdp", "zero1", "zero2", "zero3"] = "fsdp"  # what spreads a model over many processes
    mesh: MeshConfig = Field(default_factory=MeshConfig)  # how many processes share the work
    offload: bool = False  # keep parameters and moments of many processes on the CPU
    patience_seconds: int = Field(600, ge=1)  # how long a process waits for another
    threads: int = Field(0, ge=0, le=1024)  # 0: torch's default
    data: str = "../shared/data"  # the folder of docs/nano.md
    cache: str = "runs/cache"  # the folder of files that are made once
    optim: OptimConfig = Field(default_factory=OptimConfig)  # the optimiser and its schedule

    @field_validator("rope")
    @classmethod
    def _as_yaml_holds_it(cls, rope: dict[str, Any] | None) -> dict[str, Any] | None:
        return rope and {key: list(own) if isinstance(own, tuple) else own for key, own in rope.items()}

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all processes: the budget, or whole text windows."""
        return self.accumulate * (self.tokens or self.rows * self.window)

    @model_validator(mode="after")
    def _check_budget(self) -> RunConfig:
        if self.tokens and self.rows != RunConfig.model_fields["rows"].default:
            raise ConfigError(
                f"rows={self.rows} and tokens={self.tokens} both set the micro-batch; leave rows out, or add "
                "tokens=0 to use rows"
            )
        return self

    @property
    def scored(self) -> list[SourceConfig]:
        """Sources whose rows are scored: eval_mixture, and those of the mixture of which a share is held out.

        These keep the names that their rows have in training; one of eval_mixture that is called the same is eval.NAME.
        """
        held_out = [
            source.model_copy(update={"name": name, "weight": 1.0, "epochs": None})
            for name, source in zip(source_names(self.mixture), self.mixture, strict=True)
            if source.holds_out
        ]
        taken = [source.name for source in held_out]
        others = [
            source.model_copy(update={"name": f"eval.{name}" if name in taken else name})
            for name, source in zip(source_names(self.eval_mixture), self.eval_mixture, strict=True)
        ]
        return others + held_out

    @model_validator(mode="after")
    def _scores_what_is_held_out(self) -> RunConfig:
        for source in self.eval_mixture:
            if (source.weight, source.epochs, source.holds_out) != (1, None, False):
                raise ConfigError(
                    f"eval_mixture: eval_rows rows of source {source.name or source.source!r} are scored, each once, "
                    "so its weight, epochs or held_out says nothing; leave it out"
                )
        for key in ("eval_every", "eval_rows"):
            if not self.scored and (value := getattr(self, key)) != RunConfig.model_fields[key].default:
                raise ConfigError(
                    f"{key}={value} and no row to score; give eval_mixture, or a source of files in mixture the option "
                    "held_out: 0.05"
                )
        if self.eval_every is None and self.scored:
            object.__setattr__(self, "eval_every", self.save_every)  # frozen once it is made
        return self

    @model_validator(mode="after")
    def _cuts_what_has_tokens(self) -> RunConfig:
        if self.mesh.sequence > 1 and self.objective != "next_token":
            raise ConfigError(
                f"mesh.sequence={self.mesh.sequence} shares the decoder's tokens, and objective={self.objective} does "
                "not run it; leave mesh.sequence out"
            )
        return self

    @model_validator(mode="after")
    def _offloads_from_a_gpu(self) -> RunConfig:
        if self.recompute == "offload" and self.device == "cpu":
            raise ConfigError(
                "recompute=offload moves inputs from a GPU to the CPU; with device=cpu use recompute=true"
            )
        return self

    @model_validator(mode="after")
    def _has_the_engine_of_its_ulysses(self) -> RunConfig:
        if self.mesh.ulysses == "deepspeed" and not self.engine.startswith("zero"):
            raise ConfigError(
                f"mesh.ulysses=deepspeed needs DeepSpeed as engine (zero1, zero2, zero3), not {self.engine}"
            )
        return self

    @model_validator(mode="after")
    def _freezes_a_small_base(self) -> RunConfig:
        if self.base_bits is not None and any(fnmatchcase("decoder", pattern) for pattern in self.train):
            raise ConfigError(
                "base_bits keeps the decoder's matrices in few bits, so it must be frozen: train adapters"
            )
        return self

    @model_validator(mode="after")
    def _fit_rate(self) -> RunConfig:
        if (law := self.optim.fitted) is None:
            return self
        rate = law.rate(self.steps * self.step_tokens)
        if "lr" in self.optim.model_fields_set and self.optim.lr != rate:
            raise ConfigError(f"optim.lr={self.optim.lr:g} and optim.fitted, which gives {rate:g}: leave one out")
        object.__setattr__(self, "optim", self.optim.model_copy(update={"lr": rate}))  # frozen once it is made
        return self


class StageConfig(Settings):
    """One stage of a chain: a recipe, and what differs from it here."""

    recipe: str  # a bundled recipe, or a YAML file seen from the chain's folder
    name: str = ""  # "": the recipe's
    set: dict[str, Any] = Field(default_factory=dict)  # settings by dotted key

    @property
    def title(self) -> str:
        """The stage's name, which is also its folder's."""
        return self.name or Path(self.recipe).stem


class ChainConfig(Settings):
    """Recipes in a row: each starts from the model that the one before it wrote, unless it sets `init` itself."""

    init: str  # what the first stage starts from
    output: str = Field(min_length=1)  # stages write output/NAME
    set: dict[str, Any] = Field(default_factory=dict)  # settings of every stage, by dotted key
    stages: list[StageConfig] = Field(min_length=1)  # in order
