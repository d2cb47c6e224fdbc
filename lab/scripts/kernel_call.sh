#!/usr/bin/env bash
# Check and time the attention kernels on one Hopper GPU in about six minutes; wheels of pytest and peers in .whl/.
#   bash lab/scripts/kernel_call.sh OUT [SECONDS]
# Logs and JSON go to OUT, short tables to the output. What does not fit into SECONDS is left out, from the end.
set -u
out=$1
logs=$(mktemp -d)
keep() { tail -n +1 "$logs"/*.txt | tail -c 8000000 > "$out/log.txt"; }
until=$((SECONDS + ${2:-380}))
left() { echo $((until - SECONDS > 5 ? until - SECONDS : 5)); }
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
python3 -c "import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)"

echo "== tests and checks ($SECONDS s)"
times="python3 lab/scripts/kernel_times.py --no-flex --commit ${COMMIT:-unknown}"
$times --compile-only --no-peers > "$logs/compile.txt" 2>&1 &
compile=$!
timeout 170 python3 lab/scripts/kernel_checks.py --runs 100 > "$logs/checks.txt" 2>&1 &
checks=$!
rows="hopper.forward.WHOLE_ROWS=1 hopper.backward_dq.WHOLE_ROWS=1"
few="equal 512,equal 1024,narrow sliding 136"
timeout 175 python3 lab/scripts/kernel_checks.py --runs 5 --set $rows > "$logs/checks-rows.txt" 2>&1 &
checks_rows=$!
$times --compile-only --no-peers --only "$few" --set $rows > "$logs/compile-rows.txt" 2>&1 &
compile_rows=$!
python3 lab/scripts/gpu_tests.py --processes 8 --seconds 165 > "$logs/tests.txt" 2>&1
echo "gpu_tests exit $?"
grep -a "exit \|^FAILED\|^E  " "$logs/tests.txt" | cut -c1-150 | tail -32
wait $checks
echo "kernel_checks exit $?"
wait $checks_rows
echo "kernel_checks of the candidate exit $?"
grep -c ^ok "$logs"/checks*.txt
grep -av ^ok "$logs/checks.txt" | cut -c1-300 | tail -12
grep -av ^ok "$logs/checks-rows.txt" | cut -c1-300 | tail -6
kill $compile $compile_rows 2> /dev/null
keep

echo "== times ($SECONDS s)"
timeout "$(left)" $times --out "$out/times.json" --seconds 75 2>&1 | tee "$logs/times.txt" | grep -av Warning | cut -c1-420
echo "== output in whole rows ($SECONDS s)"
timeout "$(left)" $times --no-peers --only "$few" --out "$out/times-rows.json" --set $rows 2>&1 | cut -c1-300
echo "== short rows: atomics, then the walk ($SECONDS s)"
timeout "$(left)" $times --dense --out "$out/times-short.json" 2>&1 | cut -c1-420
timeout "$(left)" $times --dense --set triton.backward.WALK_FROM=1024 --out "$out/times-short-walk.json" 2>&1 | cut -c1-300
echo "== mask ($SECONDS s)"
timeout "$(left)" $times --mask --out "$out/times-mask.json" 2>&1 | cut -c1-200
echo "== sanitizer ($SECONDS s)"
if command -v compute-sanitizer > /dev/null; then
    timeout "$(left)" python3 lab/scripts/sanitize.py > "$logs/sanitize.txt" 2>&1
    timeout "$(left)" compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py \
        > "$logs/sanitize-memcheck.txt" 2>&1
    echo "memcheck exit $?"
    grep -a "error\|done\|ERROR" "$logs/sanitize-memcheck.txt" | cut -c1-120 | tail -12
fi
keep
echo "== done ($SECONDS s)"
