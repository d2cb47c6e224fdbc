#!/usr/bin/env bash
# Every goal of the attention kernels on one Hopper GPU: compiled first, then checked, then timed on a quiet card.
#   bash lab/scripts/kernel_final.sh OUT [COMPILE] [CHECKS] [TIMES]
# For COMPILE seconds kernels are compiled by many processes, which launch next to nothing, on GPU $SPARE (default: the
# same); then CHECKS seconds of checks and TIMES seconds of times on GPU $CARD. Wheels lie in .whl/, FlashAttention 3
# unpacked in .fa3/ (its library by xz). Rows are written as they come; what does not fit is left out, from the end.
set -u
out=$1
compile=$((SECONDS + ${2:-80}))
checks=${3:-30}
times=${4:-140}
card=${CARD:-0}
logs=$out/logs
mkdir -p "$logs"
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/triton-cache-final OMP_NUM_THREADS=1
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
if [ -f .fa3/fa3_fwd/_C.abi3.so.xz ]; then
    python3 -c "
import lzma, shutil
with lzma.open('.fa3/fa3_fwd/_C.abi3.so.xz') as packed, open('.fa3/fa3_fwd/_C.abi3.so', 'wb') as library:
    shutil.copyfileobj(packed, library, 1 << 22)" && export PYTHONPATH=.:lab:.fa3
fi
table="python3 lab/scripts/kernel_times.py --table --no-flex --commit ${COMMIT:-unknown}"
left() { echo $((compile - SECONDS > 2 ? compile - SECONDS : 2)); }
ahead() { # name command...
    local name=$1
    shift
    CUDA_VISIBLE_DEVICES=${SPARE:-$card} timeout "$(left)" nice -n 10 "$@" > "$logs/$name.txt" 2>&1 &
}
for part in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do ahead "ahead-table-$part" $table --prepare $part/16; done
for part in 0 1 2 3 4 5; do ahead "ahead-checks-$part" python3 lab/scripts/kernel_checks.py --prepare --part $part/6; done
for stage in "H/G = 1" "D = 64, H/G = 4" "masks" "decoding"; do
    ahead "ahead-sanitize-${stage// /}" python3 lab/scripts/sanitize.py --prepare --only "$stage"
done
ahead ahead-future python3 lab/scripts/future_attention_gpu.py --dim 128 --no-variants --prepare
sleep "$(left)"
wait
echo "== compiled ($SECONDS s)"
export CUDA_VISIBLE_DEVICES=$card
until=$((SECONDS + checks))
start() { # name command...
    local name=$1
    shift
    timeout $((until - SECONDS)) "$@" > "$logs/$name.txt" 2>&1 &
}
start deterministic python3 lab/scripts/kernel_checks.py --runs 100 --part 9/6
for part in 0 1 2 3 4 5; do start "checks-$part" python3 lab/scripts/kernel_checks.py --runs 0 --part $part/6; done
for stage in "H/G = 1" "D = 64, H/G = 4" "masks" "decoding"; do
    start "memcheck-${stage// /}" compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --only "$stage"
done
wait
echo "float64 and deterministic ok: $(cat "$logs"/checks-*.txt "$logs/deterministic.txt" | grep -ac ^ok)"
grep -ah "^WRONG\|runs\|gave way" "$logs"/checks-*.txt "$logs/deterministic.txt" | cut -c1-200
tail -qn 3 "$logs"/memcheck*.txt | cut -c1-140
echo "== times ($SECONDS s)"
until=$((SECONDS + times))
timeout 20 python3 lab/scripts/future_attention_gpu.py --dim 128 --no-variants > "$out/future.txt" 2>&1
grep -a "|\|fa3" "$out/future.txt" | cut -c1-200
timeout $((until - SECONDS)) $table --seconds $((until - SECONDS - 6)) --out "$out/table.json" 2>&1 | grep -av Warn | cut -c1-420
echo "== goals ($SECONDS s)"
python3 lab/scripts/kernel_goals.py "$out/table.json" | tee "$out/goals.txt"
