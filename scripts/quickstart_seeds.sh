#!/usr/bin/env bash
# Is what the quickstart prints true for most seeds? Its two runs for ten seeds (more than an hour on two
# cores), then for how many of them BLoB's ECE and NLL are lower than MAP's. A finished run is skipped,
# an interrupted one resumed.
#   SEEDS="1 2 3" bash scripts/quickstart_seeds.sh
set -euo pipefail
SEEDS="${SEEDS:-1 2 3 4 5 6 7 8 9 10}" exec bash "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"
