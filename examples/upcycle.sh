#!/usr/bin/env bash
# Makes a Mixtral of a dense Mistral 7B: every expert begins as its MLP, and training lets them become different.
#
#   HF=/hf/mistral-7b BLENDED_DATA=/data/text_document WORK=/work NUM_EXPERTS=4 bash examples/upcycle.sh
#
# What is done already is kept: start it again after it was stopped. DRY_RUN=1 prints the commands instead.
# Layout and learning rate are variables of mixtral_4x7b_example.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${HF:?name the folder of the dense Mistral}" "${WORK:?name a folder for checkpoints}"
export TP="${TP:-4}" PP="${PP:-2}" EP="${EP:-1}" NUM_EXPERTS="${NUM_EXPERTS:-4}"
python="$here/.venv/bin/python"
[[ -x $python ]] || python=python

convert=("$python" "$here/tools/checkpoint/util.py" --loader mistral_hf --saver mixtral --load-dir "$HF"
    --save-dir "$WORK/checkpoints" --num-experts "$NUM_EXPERTS" --expert-noise "${EXPERT_NOISE:-0.001}"
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" --target-expert-parallel-size "$EP")
if [[ ! -e $WORK/checkpoints/latest_checkpointed_iteration.txt ]]; then
    printf '%q ' "${convert[@]}"
    echo
    [[ ${DRY_RUN:-0} != 0 ]] || "${convert[@]}"
fi

export CHECKPOINT_PATH="$WORK/checkpoints" TOKENIZER_MODEL="${TOKENIZER_MODEL:-$HF}"
exec bash "$here/mixtral_4x7b_example.sh" "$@"
