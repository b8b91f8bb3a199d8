"""Without network access, find that out once and in seconds, not by retries of every request."""

from __future__ import annotations

import os
import ssl
import threading
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
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


def adapter_folder(args) -> Path:
    """The local folder of --load-lora-path, downloaded first if it lies in a hub repo.

    Raises:
        UsageError: it cannot be downloaded.
    """
    if not args.load_lora_huggingface_repo:
        return Path(args.load_lora_path)
    return _downloaded(args.load_lora_huggingface_repo, args.load_lora_path.strip("/"))


def _downloaded(repo: str, path: str) -> Path:
    """The folder `path` of a hub repo; "." is its root, without a training's checkpoints."""
    from huggingface_hub import snapshot_download

    if ".." in Path(path).parts or not path:
        raise UsageError(
            f"--load-lora-path {quoted(path)}: it must be a folder inside of the hub repo {repo}; "
            "a single dot is the repo itself."
        )
    wanted: dict[str, list[str]] = {"allow_patterns": [f"{path}/*"]}
    if path == ".":
        wanted = {
            "allow_patterns": ["*.json", "*.safetensors"],
            "ignore_patterns": ["checkpoint-*"],
        }
    go_offline_if_unreachable()
    try:
        return Path(snapshot_download(repo, **wanted)) / path
    except Exception as error:
        raise UsageError(
            f"--load-lora-huggingface-repo {repo} cannot be read: "
            f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}\n"
            "Without network access pass a local folder as --load-lora-path alone."
        ) from None
