#!/bin/sh
# Times of whole converted models on one GPU: profiles of the steps first, then rows against the dense model.
#   CUDA_VISIBLE_DEVICES=3 sh lab/scripts/host_call.sh OUT SECONDS_PROFILE SECONDS_ROWS ["PARTS --skip N"] ["PARTS OF PROFILES"]
# Everything is written as it comes into OUT.
out=$1 profile=$2 rows=$3 parts=${4:-"train distillation"} profiled=${5:-"decode eager train"}
export PYTHONPATH="$PWD:$PWD/lab" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=8
mkdir -p "$out"
if [ "$profile" -gt 0 ]; then
    # shellcheck disable=SC2086
    timeout $((profile + 45)) python3 lab/scripts/step_profile_gpu.py --out "$out" --seconds "$profile" --parts $profiled \
        >"$out/profile-out.txt" 2>&1
fi
# shellcheck disable=SC2086
timeout "$rows" python3 lab/scripts/decode_gpu.py --out "$out" --seconds $((rows - 8)) --parts $parts \
    >>"$out/rows-log.txt" 2>&1
