#!/usr/bin/env bash
# mcdropout on the paper's six multiple-choice data sets, Llama-2-7B.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_all mcdropout --lora-dropout 0.1 --bayes-eval-n-samples-final 10
