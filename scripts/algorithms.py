"""Writes docs/algorithms, a page per algorithm, from yaml and docstrings. Run as `make algorithms`."""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_cli import catalogue


def pages() -> dict[str, str]:
    """File name to contents."""
    entries = [catalogue.entry(name) for name in catalogue.names()]
    written = {f"{each.name}.md": catalogue.markdown(each) for each in entries}
    return {"README.md": catalogue.index(entries), **written}


def main(folder: Path) -> None:
    """Write every page and remove those of algorithms that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(written) - 1} algorithms: {folder / 'README.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/algorithms"))
