"""Every error that modalora raises on purpose, as one tree.

ModaloraError
├── InputError            what was given is wrong (command line: exit code 2)
│   ├── ConfigError       a setting or config file breaks a rule
│   ├── ShapeError        a tensor has the wrong shape
│   ├── CheckpointError   a checkpoint folder is incomplete, altered or does not fit its config
│   ├── MediaError        an image or a sound cannot be used
│   ├── PromptError       messages, placeholders or prompt length break a rule
│   ├── RouteError        a route or adapter is unknown or does not fit the media
│   └── DataError         a data set is missing or a record is wrong
└── WorkError             the input was fine, the work failed (exit code 1)
    └── TrainingError     training met a state it must not go on from

A message says what, where, the rule, and what to do.
"""


class ModaloraError(Exception):
    """Base of every deliberate error."""

    exit_code = 1


class InputError(ModaloraError):
    """What was given is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting or config file breaks a rule."""


class ShapeError(InputError):
    """A tensor has the wrong shape."""


class CheckpointError(InputError):
    """A checkpoint folder is incomplete, altered or does not fit its config."""


class MediaError(InputError):
    """An image or a sound cannot be used."""


class PromptError(InputError):
    """Messages, placeholders or prompt length break a rule."""


class RouteError(InputError):
    """A route or adapter is unknown or does not fit the media."""


class DataError(InputError):
    """A data set is missing or a record is wrong."""


class WorkError(ModaloraError):
    """The input was fine, the work failed."""


class TrainingError(WorkError):
    """Training met a state it must not go on from."""


def listed(told: list[str] | tuple[str, ...], most: int = 8, between: str = "; ") -> str:
    """Return the first of what a message has to tell, and how many more there are."""
    return between.join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
