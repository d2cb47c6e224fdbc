#!/usr/bin/env bash
# The goals of the attention kernels on one Hopper GPU in three minutes: checks first, then times; wheels in .whl/.
#   bash lab/scripts/kernel_final.sh OUT [SECONDS] [CHECKS]
# Checks run in parallel for CHECKS seconds, and warm Triton's cache; then one process times. What does not fit into
# SECONDS is left out, from the end.
set -u
out=$1
checks=${3:-80}
until=$((SECONDS + ${2:-180}))
left() { echo $((until - SECONDS > 4 ? until - SECONDS : 4)); }
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/triton-cache-final OMP_NUM_THREADS=2
logs=$(mktemp -d)
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
times="python3 lab/scripts/kernel_times.py --no-flex --commit ${COMMIT:-unknown}"
start() { # name command...
    local name=$1
    shift
    timeout "$checks" "$@" > "$logs/$name.txt" 2>&1 &
}
start prepare-mask $times --compile-only --no-peers --mask
start prepare-dense $times --compile-only --no-peers --dense
for only in "equal 512" "equal 1024" "sliding 136" "heads 1" "local" "sliding 300"; do
    start "prepare-${only// /-}" $times --compile-only --no-peers --only "$only"
done
start memcheck compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --only masks
start memcheck-forward compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --only "H/G = 1"
start deterministic python3 lab/scripts/kernel_checks.py --runs 100 --part 2/6
for part in 3 4 5; do start "checks-$part" python3 lab/scripts/kernel_checks.py --runs 0 --part $part/6; done
for part in 0 1 2; do start "masks-$part" python3 lab/scripts/kernel_variants.py --check $((checks - 20)); done
for name in expiry_is_the_definition test_lists expiry_of; do
    start "tests-$name" python3 -m pytest -q --tb=short -p no:cacheprovider -k $name tests/ops/test_triton_kernels.py
done
for part in 0 1 2 3 4 5 6 7 8; do start "prepare-$part" python3 lab/scripts/kernel_variants.py --prepare $part/9; done
start future python3 lab/scripts/future_attention_gpu.py --no-check
wait
tail -n +1 "$logs"/*.txt > "$out/kernels-log.txt"
echo "== checks ($SECONDS s)"
echo "float64 and deterministic ok: $(cat "$logs"/checks-*.txt "$logs/deterministic.txt" | grep -ac ^ok)"
grep -ah "^WRONG\|deterministic runs\|gave way" "$logs"/checks-*.txt "$logs/deterministic.txt" | cut -c1-200
tail -qn 1 "$logs"/masks-*.txt "$logs"/tests-*.txt | cut -c1-300
grep -ah "WRONG" "$logs"/prepare-*.txt | cut -c1-300
grep -ah "ERROR SUMMARY\|error 0\|done\|: error" "$logs"/memcheck*.txt | cut -c1-140
goals() { python3 lab/scripts/kernel_goals.py "$out"/times*.json "$out/share.json" "$out/dense.json" | tee "$out/goals.txt"; }
echo "== times ($SECONDS s)"
timeout "$(left)" $times --out "$out/times.json" --only "equal 512,equal 1024,narrow sliding 136" 2>&1 | grep -av Warning | cut -c1-420
timeout "$(left)" $times --mask --out "$out/share.json" 2>&1 | cut -c1-200
timeout "$(left)" $times --dense --only "3w,short" --out "$out/dense.json" 2>&1 | cut -c1-420
goals > "$logs/goals.txt"
echo "== variants ($SECONDS s)"
timeout "$(left)" python3 lab/scripts/kernel_variants.py --seconds 14 --out "$out/variants.json" 2>&1 | grep -av Warn | cut -c1-900
echo "== others ($SECONDS s)"
timeout 14 python3 lab/scripts/future_attention_gpu.py --no-check --dim 128 2>&1 | grep -a "|" | tee "$out/future.txt" | cut -c1-300
timeout "$(left)" $times --out "$out/times-more.json" --only "heads 1,narrow local,narrow sliding 300" 2>&1 | grep -av Warning | cut -c1-420
echo "== goals ($SECONDS s)"
goals
