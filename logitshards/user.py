"""Name a user who has no entry in passwd, as in some containers.

torch needs the name of the user and vLLM a home; both end with a traceback without one. A cache in
"~" would become a folder of that name.
"""

from __future__ import annotations

import os
import stat


def name_the_user() -> None:
    """Set USER and HOME if neither the environment nor passwd has them."""
    if "HOME" in os.environ and {"USER", "LOGNAME"} & os.environ.keys():
        return
    import pwd

    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("USER", f"user{user}")
        if "HOME" not in os.environ:
            os.environ["HOME"] = _home(user)


def _home(user: int) -> str:
    """A folder that is this user's alone, the same one each time."""
    import tempfile

    path = os.path.join(tempfile.gettempdir(), f"logitshards-{user}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        status = os.lstat(path)
        private = stat.S_ISDIR(status.st_mode) and status.st_uid == user
        if not private or status.st_mode & 0o077:
            return tempfile.mkdtemp()
    return path
