"""Run settings: pydantic models that refuse unknown keys, read from YAML with "optim.lr=1e-4" overrides."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from modalora.errors import ConfigError

T = TypeVar("T")


class Settings(BaseModel):
    """Base of every group of settings: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FittedRate(Settings):
    """A learning rate found best for a number of training tokens; another number D gets lr (D / tokens)^exponent.

    Source: arXiv:2503.01743, section 3.1, after Bjorck et al. 2024.
    """

    lr: float = Field(gt=0)
    tokens: float = Field(gt=0)
    exponent: float = -0.32

    def rate(self, tokens: float) -> float:
        """Return the learning rate for a run over so many tokens."""
        return self.lr * (tokens / self.tokens) ** self.exponent


class MediaConfig(Settings):
    """Limits on training media. None: the model's own."""

    max_crops: int | None = Field(None, ge=1)  # of one picture
    max_seconds: float | None = Field(None, gt=0)  # of one sound


class OptimConfig(Settings):
    """The optimiser and its schedule: linear warm-up, then a cosine or a line down to final_lr_ratio, or no change."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: hidden matrices by Muon, the rest by AdamW
    lr: float = Field(1e-3, gt=0)
    fitted: FittedRate | None = None  # gives lr from the tokens of the run
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    lr_scale: dict[str, float] = Field(default_factory=dict)  # part -> factor on lr
    state_bits: Literal[8, 16, 32] = 32  # of each of AdamW's two moments; 8 and 16 are for name: adamw

    @model_validator(mode="after")
    def _moments_move(self) -> OptimConfig:
        if self.state_bits < 32 and self.name != "adamw":
            raise ConfigError(f"state_bits={self.state_bits} is for name: adamw; {self.name} keeps 32")
        if self.state_bits == 16 and self.betas[1] > 0.99:
            raise ConfigError(
                f"betas[1]={self.betas[1]} moves a bf16 moment by less than it can hold; use 0.99 or less, or 8 bits"
            )
        return self


class SourceConfig(Settings):
    """One source of a mixture.

    weight: its share of the rows against the others' weights. Several phases of a run: {0: 3, 0.8: 1} is weight 3 from
    the start and 1 from 80 % of the steps on. epochs: how often a source that ends is read; None: as long as the run.
    window: tokens of its rows, for sources that cut text into windows; None: the run's.
    name: what its rows are called in reports; by default the source.
    """

    source: str
    name: str = Field("", pattern=r"^[\w.-]*$")
    weight: float | dict[float, float] = 1.0
    epochs: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=8)
    route: str | None = None  # of its rows: "none" or an adapter, such as a language's; None: by their media
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

    def weight_at(self, share: float) -> float:
        """Return the weight at a share of the run, 0 to 1."""
        if not isinstance(self.weight, dict):
            return self.weight
        return self.weight[max(start for start in self.weight if start <= share)]


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
    output: str
    modalities: dict[str, dict[str, Any]] = Field(default_factory=dict)  # modality to add -> its sizes
    rope: dict[str, Any] | None = None  # rotary positions (nn/rope.py) and window that the start gets; None: its own
    modality_files: list[str] = Field(default_factory=list)  # Python files that set MODALITY; they are run
    adapters: dict[str, dict[str, Any]] = Field(default_factory=dict)  # adapter to add -> fields of LoraConfig
    take: dict[str, str] = Field(default_factory=dict)  # part pattern -> folder that gives its weights
    copy_parts: dict[str, str] = Field(default_factory=dict)  # part -> part of the same shape that it starts from
    int8: bool = False  # store the matrices of the written model as int8
    train: list[str]  # parts that train, e.g. "decoder", "image.*", "adapter.vision"; all others are frozen
    preserve: list[str] = Field(default_factory=list)  # parts that must not train, whatever train: matches
    mixture: list[SourceConfig] = Field(min_length=1)
    weigh: Literal["rows", "tokens"] = "rows"  # what the weights of the mixture's sources are shares of
    media: MediaConfig = Field(default_factory=MediaConfig)
    whiten: list[str] = Field(
        default_factory=list
    )  # modalities whose fresh projectors start from their features' statistics
    objective: Literal["next_token", "ctc", "cells"] = "next_token"
    rows: int = Field(16, ge=1)  # conversations or windows per micro-batch
    tokens: int = Field(0, ge=0)  # instead of rows: the budget that rows of a micro-batch fill together
    accumulate: int = Field(1, ge=1)  # micro-batches per step, over all processes
    workers: int = Field(0, ge=0)  # processes that prepare rows ahead
    quarantine_most: float = Field(0.01, ge=0, lt=1)  # share of bad rows that stops the run
    window: int = Field(256, ge=8)  # tokens of a plain text window
    steps: int = Field(ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    base_bits: Literal[4, 8, 16] | None = None  # of the frozen decoder's Linears in training; None: as they are
    # layers run again in the backward pass instead of keeping what they computed; offload: their inputs lie on the CPU
    recompute: bool | Literal["offload"] = False
    seed: int = 0
    log_every: int = Field(10, ge=1)
    save_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)  # resume checkpoints kept
    save_in_background: bool = False  # training goes on while a copy of what trains is written
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does to its step
    nonfinite_most: int = Field(5, ge=1)  # steps skipped in a row after which the run stops all the same
    ledger: bool = False  # write the samples of every step to ledger.jsonl
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    peak_tflops: float | None = Field(None, gt=0)  # of the machine at this precision, for the share of it that is used
    device: str = "cpu"  # a torch device
    engine: Literal["fsdp", "zero1", "zero2", "zero3"] = "fsdp"  # what spreads a model over many processes
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    offload: bool = False  # keep parameters and moments of many processes on the CPU
    patience_seconds: int = Field(600, ge=1)  # how long a process waits for another
    threads: int = Field(0, ge=0)  # 0: torch's default
    data: str = "../shared/data"  # the folder of docs/nano.md
    cache: str = "runs/cache"
    optim: OptimConfig = Field(default_factory=OptimConfig)

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
            raise ConfigError(f"rows={self.rows} and tokens={self.tokens} both set the micro-batch; leave one out")
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
            raise ValueError(f"optim.lr={self.optim.lr:g} and optim.fitted, which gives {rate:g}: leave one out")
        object.__setattr__(self, "optim", self.optim.model_copy(update={"lr": rate}))  # frozen once it is made
        return self


class SearchConfig(Settings):
    """The search for rotary divisors of a longer window (LongRoPE2, arXiv:2502.20082, section 3.2 and appendix B)."""

    space: Literal["longrope2", "longrope"] = "longrope2"  # longrope: every pair from 1 to 1.25 stretches
    anchor: int | None = Field(None, ge=1)  # the first pair that is searched; None: it is searched for too
    method: Literal["evolution", "random"] = "evolution"  # random: as many candidates, none made from another
    population: int = Field(64, ge=4)  # of which the better half are parents
    iterations: int = Field(40, ge=0)  # each gives half a population of children
    mutation: float = Field(0.3, gt=0, le=1)  # probability that a pair of a child changes
    crossover: float = Field(0.0, ge=0, le=1)  # share of the children that have two parents
    seed: int = 0
    temperature: Literal["su", "yarn", "none"] = "su"  # of every candidate alike
    together: int = Field(4, ge=1)  # candidates that are judged in one call
    racing: bool = True  # drop a candidate once a part of the documents shows that it cannot become a parent
    race_from: int = Field(4, ge=2)  # documents read before the first look; each look doubles them
    race_error: float = Field(0.05, gt=0, lt=0.5)  # chance that a look drops a candidate that would become a parent
    proposals: int = Field(1, ge=1)  # children made for each one that is judged; above 1 a surrogate chooses

    @model_validator(mode="after")
    def _check_space(self) -> SearchConfig:
        if self.space == "longrope" and self.anchor is not None:
            raise ConfigError(f"anchor={self.anchor}: space=longrope searches every pair; leave the anchor out")
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
    output: str  # stages write output/NAME
    set: dict[str, Any] = Field(default_factory=dict)  # settings of every stage, by dotted key
    stages: list[StageConfig] = Field(min_length=1)


class NeedleConfig(Settings):
    """Documents with facts hidden in them that are asked for at their end (evaluation/documents.py)."""

    style: Literal["digits", "words"] = "digits"  # digits: for any model; words: for one trained on `retrieval` rows
    documents: int = Field(10, ge=1)  # of each length
    needles: int = Field(1, ge=1)  # facts of a document that are asked for
    distractors: int = Field(0, ge=0)  # and that are not
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)  # 0: the start of the text
    seed: int = 0


class GuideConfig(NeedleConfig):
    """What guides a search. score: the answers alone, or every token of the same texts (plain perplexity)."""

    score: Literal["answers", "text"] = "answers"


class ScoresConfig(NeedleConfig):
    """What an extended model is measured by. lengths: tokens of documents; none: half the trained window to the target.

    methods: that are compared, untrained, all with the search's temperature.
    """

    lengths: list[int] = Field(default_factory=list)
    methods: list[Literal["none", "linear", "ntk", "scaling_law_ntk", "yarn", "longrope2"]] = Field(
        default=["none", "linear", "ntk", "scaling_law_ntk", "yarn", "longrope2"]
    )


class ExtendConfig(Settings):
    """A recipe that extends a model's window: search, training and evaluation (LongRoPE2, arXiv:2502.20082)."""

    kind: Literal["extend"]
    init: str  # the model: a folder, bundled/nano, or a name of models/sizes.py for fresh weights
    output: str
    target: int = Field(ge=16)  # tokens that the model is to read [L']
    guide: GuideConfig = Field(default_factory=lambda: GuideConfig())
    search: SearchConfig = Field(default_factory=lambda: SearchConfig())
    training: dict[str, Any] | None = None  # fields of a run, but for init, output and rope; None: factors alone
    scores: ScoresConfig = Field(default_factory=lambda: ScoresConfig())
    rows: int = Field(4, ge=1)  # documents of one forward pass
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights while searching and measuring
    device: str = "cpu"
    patience_seconds: int = Field(600, ge=1)  # how long a process waits for another
    threads: int = Field(0, ge=0)  # 0: torch's default
    data: str = "../shared/data"  # the folder of docs/nano.md
    cache: str = "runs/cache"

    @model_validator(mode="after")
    def _training_is_a_run(self) -> ExtendConfig:
        if taken := sorted({"init", "output", "rope"} & set(self.training or {})):
            raise ConfigError(f"training: {', '.join(taken)} is set by the extension itself; leave it out")
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


class _Strict(Settings, Generic[T]):
    """Holds a value to be read: the plain dataclasses in it inherit that unknown keys are refused."""

    fields: T


def parse(kind: type[T], fields: Any, where: str) -> T:
    """Return `fields` as a `kind` (dataclass or Settings), strictly. Raises ConfigError naming key, value and rule."""
    try:
        return _Strict[kind].model_validate({"fields": fields}).fields  # type: ignore[valid-type]
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_explain(error, kind))}") from None


def check_sizes(config: Any) -> None:
    """Refuse whole numbers of a dataclass outside 1 .. 2^31 - 1. Raises ConfigError naming the field."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is int and value < 1:
            raise ConfigError(f"{field.name}={value} must be at least 1")
        if type(value) is int and value >= 2**31:
            raise ConfigError(f"{field.name}={str(value)[:20]} must be below 2^31")


def load_extension(path: Path, overrides: Sequence[str] = ()) -> ExtendConfig:
    """Read a recipe of kind extend and apply "key.sub=value" overrides (values are YAML)."""
    fields = _read(path)
    if fields.get("kind") != "extend":
        raise ConfigError(f"{path} is no recipe of kind extend; `modalora train` carries out the others")
    for override in overrides:
        _set(fields, *_override(override))
    return parse(ExtendConfig, fields, str(path))


def is_extension(path: Path) -> bool:
    """Tell whether a file is a recipe of kind extend."""
    return path.is_file() and _read(path).get("kind") == "extend"


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply "key.sub=value" overrides (values are YAML)."""
    fields = _read(path)
    if fields.get("kind") == "extend":
        raise ConfigError(f"{path} extends a model's window; `modalora extend` carries it out")
    if "stages" in fields:
        raise ConfigError(f"{path} is a chain of recipes; this takes one of its stages: a recipe with its settings")
    for override in overrides:
        _set(fields, *_override(override))
    return parse(RunConfig, fields, str(path))


def load_stages(path: Path, bundled: Path, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """Read a recipe or a chain of recipes: the runs by name, in order. bundled: the folder of named recipes.

    An override holds for every stage, or for one of a chain where its name comes first: "vision-2-joint.steps=10".
    """
    fields = _read(path)
    if "stages" not in fields:
        return {path.stem: load_run(path, overrides)}
    chain = parse(ChainConfig, fields, str(path))
    titles = [stage.title for stage in chain.stages]
    if len(set(titles)) < len(titles):
        raise ConfigError(f"{path}: two stages have one name ({', '.join(titles)}); give one of them another `name`")
    given: dict[str, list[str]] = {title: [] for title in titles}
    for override in overrides:
        first, _, rest = override.partition(".")
        for title in [first] if first in given else titles:
            given[title].append(rest if first in given else override)
    runs: dict[str, RunConfig] = {}
    before = chain.init
    for stage in chain.stages:
        found = [own for own in (bundled / f"{stage.recipe}.yaml", path.parent / stage.recipe) if own.is_file()]
        if not found:
            raise ConfigError(f"{path}: stage {stage.title!r}: there is no recipe {stage.recipe!r}")
        own = _read(found[0])
        own |= {"init": before, "output": f"{chain.output}/{stage.title}"}
        where = f"{path}, stage {stage.title}"
        for key, value in (chain.set | stage.set).items():
            _set(own, key.split("."), deepcopy(value), f"{where}: {key}")
        for override in given[stage.title]:
            _set(own, *_override(override))
        runs[stage.title] = parse(RunConfig, own, where)
        before = f"{runs[stage.title].output}/model"
    return runs


def load_chain_start(path: Path) -> str | None:
    """Return what the first stage of a chain starts from; None for a plain recipe."""
    fields = _read(path)
    return parse(ChainConfig, fields, str(path)).init if "stages" in fields else None


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; bundled ones are named by `modalora train --help`") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings; it holds {type(fields).__name__}")
    return fields


def _override(text: str) -> tuple[list[str], Any, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} must look like key=value, e.g. optim.lr=1e-4")
    try:
        return key.split("."), _number(yaml.safe_load(value)), text
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: {value!r} is not YAML; quote text that holds symbols") from None


def dump(settings: BaseModel) -> str:
    """Return the settings as YAML."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(fields: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    inner: Any = fields
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(inner, list) and key.isdigit() and int(key) < len(inner):
            place: Any = int(key)  # mixture.0.weight=2
        elif isinstance(inner, dict):
            place = key
        else:
            raise ConfigError(f"override {override!r}: nothing can be set at {key!r}")
        if following is None:
            inner[place] = value
        elif isinstance(inner, dict):
            inner = inner.setdefault(place, {})
        else:
            inner = inner[place]


def _explain(error: ValidationError, kind: Any) -> list[str]:
    lines: dict[tuple[str, ...], list[str]] = {}  # by the members of unions that an error went through
    for item in error.errors():
        *path, last = item["loc"][1:] or ("",)
        groups, taken, keys = _groups(kind), [], []
        for piece in path:
            named = [group for group in groups if group.__name__ == piece]
            if len(groups) > 1 and named:
                groups = named
                taken.append(str(piece))
            else:
                groups = [inner for group in groups for inner in _groups(_keys(group).get(str(piece)))] or groups
                keys.append(str(piece))
        key = ".".join([*keys, str(last)])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = sorted({name for group in groups for name in _keys(group)})
            close = get_close_matches(str(last), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            line = f"unknown key {key!r}; {hint}"
        elif item["type"] in ("missing", "missing_argument"):
            line = f"{key} is missing"
        else:
            line = f"{key or 'the whole'}={item['input']!r:.60}: {item['msg']}"
        lines.setdefault(tuple(taken), []).append(line)
    # Of a union, the member that was meant is the one that knows the most of the keys.
    members = [own for taken, own in lines.items() if taken]
    members.sort(key=lambda own: (sum(line.startswith("unknown") for line in own), len(own)))
    return lines.get((), []) + (members[0] if members else [])


def _groups(kind: Any) -> list[type]:
    """Return the groups of settings that a value of this type may hold: X in X | None, list[X], Mapping[str, X]."""
    if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel)):
        return [kind]
    return [group for inner in get_args(kind) for group in _groups(inner)]


def _keys(group: Any) -> dict[str, Any]:
    if issubclass(group, BaseModel):
        return {name: field.annotation for name, field in group.model_fields.items()}
    types = get_type_hints(group)
    return {field.name: types[field.name] for field in fields(group)}
