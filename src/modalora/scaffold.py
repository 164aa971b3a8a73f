"""A new modality as a small package that works as it stands: `modalora adapter new`, from templates/modality."""

from __future__ import annotations

from pathlib import Path
from string import Template

from modalora.checkpoint.files import write_folder
from modalora.modality import check_name, check_unshipped

TEMPLATES = Path(__file__).parent / "templates" / "modality"


def new_package(name: str, folder: Path) -> list[str]:
    """Write the package of a modality into a new folder and return its files' names.

    Raises ConfigError for a name that no modality can have, CheckpointError when the folder exists.
    """
    check_name(name)
    check_unshipped(name, f"the package in {folder}")
    words = {"name": name, "dashed": name.replace("_", "-")}
    files = {
        f"modalora_{name}.py": "modality.py.txt",
        "pyproject.toml": "pyproject.toml.txt",
        "recipe.yaml": "recipe.yaml.txt",
        f"test_{name}.py": "test_modality.py.txt",
        "README.md": "README.md.txt",
    }

    def fill(draft: Path) -> None:
        for target, source in files.items():
            text = (TEMPLATES / source).read_text(encoding="utf-8")
            (draft / target).write_text(Template(text).substitute(words), encoding="utf-8")

    write_folder(folder, fill, manifest=False)
    return list(files)
