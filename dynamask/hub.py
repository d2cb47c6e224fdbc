"""Tell local paths from names on the hub, so that a mistyped folder costs no network traffic."""

from __future__ import annotations

import re
from pathlib import Path

from dynamask.errors import UsageError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LISTED = 8


def is_hub_name(name: str | Path) -> bool:
    """Return whether a name is spelled as one on the hub, `owner/name`, and is no path here."""
    text, path = str(name), Path(name).expanduser()
    local = path.exists() or (str(path.parent) != "." and path.parent.is_dir())
    return not local and not text.startswith("runs/") and _HUB_NAME.fullmatch(text) is not None


def check_local_or_hub(name: str | Path, what: str) -> None:
    """Refuse a name that is neither an existing path nor spelled as a hub name.

    A hub name is `owner/name`. Where a folder `owner` exists here, the name is a path: a mistyped `runs/nam` must not
    be looked up on the hub.

    Args:
        name: path or hub name.
        what: what the name stands for in the message, such as "folder" or "file or folder".

    Raises:
        UsageError: no such path, and no hub name. The message lists what the parent folder holds.
    """
    if not str(name).strip():
        raise UsageError(f"there is no {what} of an empty name")
    path = Path(name).expanduser()
    if path.exists():
        return
    text = str(name)
    parent = path.parent
    beside = parent if str(parent) != "." and parent.is_dir() else None
    if beside is None and _HUB_NAME.fullmatch(text) and not text.startswith("runs/"):
        return
    if beside is None:
        hint = "" if "/" in text else "; a name on the hub is written owner/name"
        raise UsageError(f"there is no {what} {text}{hint}")
    entries = sorted(entry.name for entry in beside.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(entries[:_LISTED]) + (", ..." if len(entries) > _LISTED else "")
    raise UsageError(f"there is no {what} {text}; {parent}/ holds {shown or 'nothing'}")
