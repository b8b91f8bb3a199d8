#!/usr/bin/env bash
# The tests: sets itself up, checks style, runs the default tier (CPU, offline, about six minutes).
#   bash scripts/test.sh              # default tier
#   bash scripts/test.sh -m slow      # embedded real models, minutes; -m gpu: needs CUDA
#   bash scripts/test.sh -k resume    # anything that pytest takes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
if [[ " $* " == *" -m "* ]]; then # real models fill the machine by themselves
    exec "$PYTHON_BIN" -m pytest "$@"
fi
# Two files at a time, a thread each: threads gain nothing on tiny models.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON_BIN" -m pytest -n 2 --dist loadfile "$@"
