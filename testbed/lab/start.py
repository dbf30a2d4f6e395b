"""`kvstream lab start DIR`: a folder to work in."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvstream.testbed.errors import SpecError

FILES = Path(__file__).with_name("files")


def start(folder: Path) -> list[Path]:
    """Copy the student file and the worked examples into `folder`; returns what was written.

    Raises SpecError if a policy.py exists: work is never overwritten.
    """
    if (folder / "policy.py").exists():
        raise SpecError(f"{folder / 'policy.py'} already exists; choose another folder")
    written = []
    for file in sorted(FILES.rglob("*")):
        if file.is_file() and file.suffix in (".py", ".md"):
            target = folder / file.relative_to(FILES)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            written.append(target)
    return written
