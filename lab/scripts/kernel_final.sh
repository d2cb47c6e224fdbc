#!/usr/bin/env bash
# Every goal of the attention kernels on one Hopper GPU: compiled first, then checked, then timed on a quiet card.
#   bash lab/scripts/kernel_final.sh OUT [COMPILE] [CHECKS] [END]
# For COMPILE seconds kernels are compiled by many processes, which launch next to nothing, on GPU $SPARE (default: the
# same, and checks run beside them); then CHECKS seconds of checks and, until second END, times on GPU $CARD. Wheels lie in .whl/, FlashAttention 3
# unpacked in .fa3/ (its library by xz). Rows whose names hold one of $ONLY are timed, all by default. Rows are written
# as they come; what does not fit is left out, from the end. $PARTS: of the checks; $CHECK: their options; $RUNS: of
# deterministic mode; $TESTS, $STAGES: of the tests and of the sanitizer, between bars.
set -u
out=$1
compile=$((SECONDS + ${2:-80}))
checks=${3:-30}
end=$((SECONDS + ${4:-250}))
card=${CARD:-0}
only=${ONLY:-}
logs=$out/logs
mkdir -p "$logs"
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/triton-cache-final OMP_NUM_THREADS=1
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
if [ -f .fa3/fa3_fwd/_C.abi3.so.xz ]; then
    python3 -c "
import lzma, shutil
with lzma.open('.fa3/fa3_fwd/_C.abi3.so.xz') as packed, open('.fa3/fa3_fwd/_C.abi3.so', 'wb') as library:
    shutil.copyfileobj(packed, library, 1 << 22)" &
    export PYTHONPATH=.:lab:.fa3
fi
table="python3 lab/scripts/kernel_times.py --no-flex --commit ${COMMIT:-unknown}"
until=$compile
begin() { # name command..., in the background, ended at $until
    local name=$1
    shift
    timeout $((until - SECONDS > 2 ? until - SECONDS : 2)) "$@" > "$logs/$(echo "$name" | tr -dc 'a-zA-Z0-9-').txt" 2>&1 &
}
IFS='|' read -ra tests <<< "${TESTS-test_lists|keeps_nan|hopper_backward and 6-2-64|hopper_backward and 12-2-64|hopper_forward and 6-2}"
IFS='|' read -ra stages <<< "${STAGES-H/G = 1|H/G = 3|masks|decoding}"
runs=${RUNS:-100}
export CUDA_VISIBLE_DEVICES=${SPARE:-$card}
until=$((compile + checks - 6))
for chosen in "${tests[@]}"; do # these launch, and may run beside the checks
    begin "tests-$chosen" nice -n 5 python3 -m pytest --tb=short -p no:cacheprovider tests/ops/test_triton_kernels.py -k "$chosen"
done
run_checks() { # until $until
    begin deterministic python3 lab/scripts/kernel_checks.py --runs "$runs" --part 20/20
    for part in ${PARTS:-0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19}; do
        begin "checks-$part" python3 lab/scripts/kernel_checks.py --runs 0 ${CHECK:-} --part "$part/20"
    done
    for part in ${MORE_PARTS:-}; do
        begin "checks-more-$part" python3 lab/scripts/kernel_checks.py --runs 0 ${MORE_CHECK:-} --part "$part/20"
    done
    for stage in "${stages[@]}"; do
        begin "memcheck-$stage" compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --only "$stage"
    done
}
apart=0
[ "${SPARE:-$card}" = "$card" ] || apart=1
until=$((compile + checks))
[ $apart = 1 ] || run_checks
until=$compile
(
    if [ $apart = 1 ]; then
        for part in ${PARTS:-0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19}; do
            begin "ahead-checks-$part" nice -n 10 python3 lab/scripts/kernel_checks.py --prepare --runs 0 ${CHECK:-} --part "$part/20"
        done
        [ "$runs" = 0 ] || begin ahead-deterministic nice -n 10 python3 lab/scripts/kernel_checks.py --prepare --part 20/20
        for stage in "${stages[@]}"; do
            begin "ahead-sanitize-$stage" nice -n 10 python3 lab/scripts/sanitize.py --prepare --only "$stage"
        done
    fi
    for part in 0 1 2 3 4 5; do begin "ahead-table-$part" nice -n 10 $table --table --only "$only" --prepare $part/6; done
    for part in 0 1 2 3; do begin "ahead-variants-$part" nice -n 10 $table --variants --prepare $part/4; done
    [ -n "$only" ] || begin ahead-future nice -n 10 python3 lab/scripts/future_attention_gpu.py --dim 128 --no-variants --prepare
    wait
)
[ "$SECONDS" -lt "$compile" ] && [ $apart = 1 ] && sleep $((compile - SECONDS))
echo "== compiled ($SECONDS s)"
export CUDA_VISIBLE_DEVICES=$card
until=$((SECONDS + checks))
[ $apart = 0 ] || run_checks
wait
echo "float64 and deterministic ok: $(cat "$logs"/checks-*.txt "$logs/deterministic.txt" | grep -ac ^ok)"
grep -ah "^WRONG\|runs" "$logs"/checks-*.txt "$logs/deterministic.txt" | cut -c1-200
tail -qn 3 "$logs"/memcheck*.txt | cut -c1-140
tail -n 2 "$logs"/tests-*.txt | cut -c1-200
echo "== times ($SECONDS s)"
until=$end
left() { echo $((until - SECONDS > 4 ? until - SECONDS : 4)); }
timeout "$(left)" $table --table --variants --only "$only" --seconds $(($(left) - 6)) --out "$out/table.json" 2>&1 | grep -av Warn | cut -c1-420
if [ -z "$only" ]; then
    timeout "$(left)" python3 lab/scripts/future_attention_gpu.py --dim 128 --no-variants > "$out/future.txt" 2>&1
    grep -a "|\|fa3" "$out/future.txt" | cut -c1-200
fi
echo "== goals ($SECONDS s)"
python3 lab/scripts/kernel_goals.py "$out/table.json" | tee "$out/goals.txt"
