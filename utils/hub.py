"""Without network access, find that out once and in seconds, not by retries of every request."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlparse

from utils.logging import logger


@cache
def go_offline_if_unreachable(timeout: float = 3.0) -> None:
    """Switch the hub's libraries to their caches if the hub does not answer.

    Behind a proxy the direct connection says nothing, so nothing is decided there.
    """
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout).close()
    except OSError:
        import datasets.config

        logger.info("The model hub cannot be reached: only what is cached can be loaded.")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
