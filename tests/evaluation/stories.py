"""Running text for tests: sentences of common words, so that a small tokenizer learns whole words."""

from __future__ import annotations

import numpy as np

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service "
    "father power hour game line end member law car city community name president team minute idea kid body "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy friend age policy music market sense nation college "
    "interest death experience effect use class control care field development role effort rate heart drug show leader"
).split()


def story(seed: int, words: int) -> str:
    """Return sentences of four to nine words, with an empty line now and then."""
    rng = np.random.default_rng(seed)
    pieces: list[str] = []
    while len(pieces) < words:
        one = rng.choice(WORDS, size=int(rng.integers(4, 10))).tolist()
        pieces += [one[0].capitalize(), *one[1:-1], one[-1] + (".\n\n" if rng.random() < 0.1 else ".")]
    return " ".join(pieces).replace("\n\n ", "\n\n")


TEXTS = [story(seed, 3000) for seed in (0, 1, 2)]
