#!/usr/bin/env bash
# The tests: sets itself up, checks style, runs the default tier (CPU, offline, about five minutes).
#   bash scripts/test.sh              # default tier
#   bash scripts/test.sh -m slow      # embedded real models, minutes; -m gpu: needs CUDA
#   bash scripts/test.sh -k resume    # anything that pytest takes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
exec "$PYTHON_BIN" -m pytest "$@"
