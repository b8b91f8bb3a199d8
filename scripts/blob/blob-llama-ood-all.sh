#!/usr/bin/env bash
# blob trained on OBQA, evaluated there and on shifted data sets.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_all blob "${BLOB_LLAMA[@]}"
