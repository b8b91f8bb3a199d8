"""Without network access, find that out once and in seconds, not by retries of every request."""

from __future__ import annotations

import os
import ssl
import threading
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import ParseResult, urlparse

from utils.errors import UsageError, quoted
from utils.logging import logger


@cache
def go_offline_if_unreachable(timeout: float = 3.0) -> None:
    """Switch the hub's libraries to their caches if the hub does not answer.

    Behind a proxy the direct connection says nothing, so nothing is decided there.

    Raises:
        UsageError: HF_ENDPOINT is no address.
    """
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        address = urlparse(endpoint)
        port = address.port or (443 if address.scheme == "https" else 80)
        is_address = bool(address.hostname) and address.scheme in ("http", "https")
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise UsageError(
            f"HF_ENDPOINT is {quoted(endpoint)}; it must be an address such as "
            "https://huggingface.co."
        )
    if not _answers(address, port, timeout):
        import datasets.config

        logger.info("The model hub cannot be reached: only what is cached can be loaded.")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def _answers(address: ParseResult, port: int, timeout: float) -> bool:
    """Whether a server speaks there: one that takes connections and says nothing counts as none.

    In a thread of its own: a name server that does not answer is waited for much longer, and no
    timeout of a socket shortens that.
    """
    answered = threading.Event()

    def ask() -> None:
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        connection = kind(address.hostname, port, timeout=timeout)
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
        except (HTTPException, ssl.SSLError):  # it spoke; the hub's own libraries say what is wrong
            pass
        except (OSError, ValueError):  # ValueError: a name that no server can have
            return
        finally:
            connection.close()
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3 * timeout)  # looking the name up, connecting, the answer
    return answered.is_set()
