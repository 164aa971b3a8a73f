"""Rows of folders that Hugging Face's `datasets` reads."""

from __future__ import annotations

from pathlib import Path

from modalora.data.files.limits import Fields
from modalora.errors import DataError


class Saved:
    """Rows of a folder that `datasets` saved, or of local files that it reads; media stay bytes or paths."""

    unit = "row"

    def __init__(self, path: Path, cache: Path, split: str | None) -> None:
        """split: of a folder that holds several."""
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(f"{path} is a folder, read by `datasets`; pip install -e '.[hf]' in your clone") from None
        try:
            if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path.resolve()), cache_dir=str(cache / "datasets"))
        except Exception as error:  # every builder fails in its own way
            raise DataError(f"{path} is no folder that `datasets` reads ({error}); name the files in it") from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"{path} holds the splits {', '.join(found)}; name one as split")
            found = found[split]
        elif split is not None:
            raise DataError(f"{path} holds no splits; leave split={split!r} out")
        self.identity = f"{split}-{found._fingerprint}"
        raw = {"Image": datasets.Image(decode=False), "Audio": datasets.Audio(decode=False)}
        for name, feature in found.features.items():
            inner = feature.feature if isinstance(feature, datasets.List) else feature
            if type(inner).__name__ in raw:
                kept = raw[type(inner).__name__]
                found = found.cast_column(name, datasets.List(kept) if inner is not feature else kept)
        self.path, self._rows = path, found

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def read(self, number: int) -> Fields:
        """Return one row."""
        return dict(self._rows[number])

    def line(self, number: int) -> int:
        """Return its row, counted from 1."""
        return number + 1
