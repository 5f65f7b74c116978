#!/usr/bin/env bash
# Continued pre-training: a Mixtral from Hugging Face goes on learning from folders of jsonl, and comes back.
#
#   HF=/hf/mixtral-8x7b DATA=/data/text WORK=/work OUT=/hf/mixtral-8x7b-continued \
#   NUM_EXPERTS=8 TP=1 PP=1 EP=8 MEMORY=low bash examples/continue_from_hugging_face.sh
#
# It is for one machine: preprocessing and both conversions run on it too. What is done already is kept: start it again
# after it was stopped. DRY_RUN=1 prints the commands instead.
# Sizes, layout and learning rate are variables of mixtral_4x7b_example.sh; they must be those of the model in HF.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${HF:?name the folder of the Hugging Face model}" "${DATA:?name the folder of jsonl files}"
: "${WORK:?name a folder for data sets and checkpoints}" "${OUT:?name the folder of the trained model}"
export TP="${TP:-4}" PP="${PP:-2}" EP="${EP:-1}"
export CHECKPOINT_PATH="$WORK/checkpoints" TOKENIZER_MODEL="$HF" BLENDED_DATA="'$WORK/data_text_document'"
python="$here/.venv/bin/python"
[[ -x $python ]] || python=python

run() {
    printf '%q ' "$@"
    echo
    [[ ${DRY_RUN:-0} != 0 ]] || "$@"
}

# What the training would be refused for is said now, not after hours.
DRY_RUN=1 bash "$here/mixtral_4x7b_example.sh" "$@" >/dev/null

[[ -e $WORK/data_text_document.idx ]] ||
    run "$python" "$here/tools/preprocess_data.py" --input "$DATA" --output-prefix "$WORK/data" --append-eod \
        --tokenizer-type PretrainedTokenizerFromHF --tokenizer-model "$HF" --workers "${WORKERS:-8}" --resume

[[ -e $WORK/checkpoints/latest_checkpointed_iteration.txt ]] ||
    run "$python" "$here/tools/checkpoint/util.py" --loader mixtral_hf --saver mixtral --load-dir "$HF" \
        --save-dir "$WORK/checkpoints" --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
        --target-expert-parallel-size "$EP"

bash "$here/mixtral_4x7b_example.sh" "$@"

# The weights of an earlier export are replaced when the new ones are complete.
[[ ! -e $OUT/config.json ]] || HF="$OUT"
run "$python" "$here/tools/checkpoint/convert_megatron_to_hf_mixtral.py" --megatron-checkpoint-path \
    "$WORK/checkpoints" --huggingface-config-path "$HF" --huggingface-checkpoint-path "$OUT"
