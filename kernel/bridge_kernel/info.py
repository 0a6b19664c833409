"""`kernel_info_reply`: answered by the lane, so that a front end is ready before IPython is imported."""

from __future__ import annotations

import functools
import platform
import sys

import msgspec

from ._version import __version__
from .contract.frames import JUPYTER_VERSION

__all__ = ("BANNER", "kernel_info")

BANNER = (
    f"Bridge {__version__}: a stateless kernel on Python {platform.python_version()}.\n"
    "Each cell runs in a fresh namespace; what must last belongs to `session`, which the attached host owns."
)


@functools.cache
def kernel_info() -> bytes:
    """The content of the reply: the fields are the Jupyter spec's."""
    return msgspec.json.encode(
        {
            "status": "ok",
            "protocol_version": JUPYTER_VERSION,
            "implementation": "bridge",
            "implementation_version": __version__,
            "language_info": {
                "name": "python",
                "version": platform.python_version(),
                "mimetype": "text/x-python",
                "codemirror_mode": {"name": "ipython", "version": sys.version_info[0]},
                "pygments_lexer": "ipython3",
                "nbconvert_exporter": "python",
                "file_extension": ".py",
            },
            "banner": BANNER,
            "debugger": False,
            "help_links": [{"text": "Python Reference", "url": f"https://docs.python.org/{sys.version_info[0]}"}],
            "supported_features": [],
        }
    )
