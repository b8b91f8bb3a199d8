#!/usr/bin/env bash
# mcdropout trained on OBQA, evaluated there and on shifted data sets.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_all mcdropout --lora-dropout 0.1 --bayes-eval-n-samples-final 10
