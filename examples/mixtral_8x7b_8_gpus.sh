#!/usr/bin/env bash
# Trains a Mixtral 8x7B on one machine of 8 GPUs with 80 GB: one expert of each layer on every GPU, the optimizer's state
# in 16 bits (docs/memory.md; the memory is calculated, no GPU has confirmed it yet).
#
#   CHECKPOINT_PATH=/ckpt TOKENIZER_MODEL=/hf BLENDED_DATA=/data/text_document bash examples/mixtral_8x7b_8_gpus.sh
#
# Any variable of mixtral_4x7b_example.sh can be set too; arguments go to pretrain_gpt.py.
set -euo pipefail

export NUM_EXPERTS=8 TP="${TP:-1}" PP="${PP:-1}" EP="${EP:-8}" MEMORY="${MEMORY:-low}"

exec bash "$(dirname "${BASH_SOURCE[0]}")/../mixtral_4x7b_example.sh" "$@"
