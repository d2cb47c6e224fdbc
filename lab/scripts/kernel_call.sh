#!/usr/bin/env bash
# Check and time the attention kernels on one Hopper GPU in about five minutes; wheels of pytest and peers in .whl/.
#   bash lab/scripts/kernel_call.sh OUT [SECONDS] [CHECKS]
# Logs and JSON go to OUT, short tables to the output. Checks compile in 24 processes for CHECKS seconds; then come the
# times. What does not fit into SECONDS is left out, from the end.
set -u
out=$1
checks=${3:-150}
logs=$(mktemp -d)
keep() { tail -n +1 "$logs"/*.txt | tail -c 3000000 > "$out/kernels-log.txt"; }
until=$((SECONDS + ${2:-300}))
left() { echo $((until - SECONDS > 4 ? until - SECONDS : 4)); }
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
export OMP_NUM_THREADS=3 TORCHINDUCTOR_COMPILE_THREADS=1
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
python3 -c "import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)"
times="python3 lab/scripts/kernel_times.py --no-flex --commit ${COMMIT:-unknown}"
cases="equal 512,equal 1024,equal 2048,heads 1,narrow local,narrow sliding 136,narrow sliding 300"
kernel_tests=tests/ops/test_triton_kernels.py

echo "== tests and checks ($SECONDS s)"
jobs=()
start() { # name command...
    local name=$1
    shift
    timeout "$checks" "$@" > "$logs/$name.txt" 2>&1 &
    jobs+=("$name:$!")
}
tests() { # name keyword file...
    local name=$1 keyword=$2
    shift 2
    start "tests-$name" python3 -m pytest -vv --tb=short -p no:cacheprovider -k "$keyword" "$@"
}
start mask python3 lab/scripts/kernel_mask.py --prepare
start compile $times --compile-only --no-peers --only "$cases"
for part in 0 2 3; do start "checks-$part" python3 lab/scripts/kernel_checks.py --runs 0 --part $part/6; done
start memcheck compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --stages 4
tests slowest "hopper_backward and 8-1-128-dtype1" $kernel_tests
for shard in 0 1 2; do tests "layer-$shard" "never_waits and True" --shard $shard/3 tests/mixers/test_launch_sequence.py; done
tests nsa "nsa_trains" tests/mixers/test_gpu.py
tests lists "lists" $kernel_tests
tests expiry-of "expiry_of" $kernel_tests
tests expiry "expiry_is_the_definition" $kernel_tests
for shard in 0 1 2 3 4 5 6 7; do
    tests "half-$shard" "hopper and (dtype0 or 32-dtype) and not odd_pieces" --shard $shard/8 $kernel_tests
done
for shard in 0 1; do
    tests "pieces-$shard" "odd_pieces and (chunk-3 or alone-3 or spans-3 or legs-3)" --shard $shard/2 $kernel_tests
done
for job in "${jobs[@]}"; do
    wait "${job#*:}"
    code=$?
    [ $code = 0 ] || echo "${job%:*} exit $code ($SECONDS s)"
done
echo "checks ok: $(cat "$logs"/checks-*.txt | grep -ac ^ok); passed: $(cat "$logs"/tests-*.txt | grep -ac PASSED)"
grep -ah "^WRONG\|Error\|Warning" "$logs"/checks-*.txt "$logs/mask.txt" | cut -c1-250 | tail -8
grep -ah "^wrong\|WRONG" "$logs/mask.txt" | cut -c1-250 | tail -3
grep -ah "FAILED\|^E  " "$logs"/tests-*.txt | cut -c1-170 | tail -24
grep -ah "error\|ERROR\|done" "$logs/memcheck.txt" | cut -c1-120 | tail -4
tail -qn 1 "$logs"/tests-*.txt | cut -c1-120
keep

echo "== times ($SECONDS s)"
timeout "$(left)" $times --out "$out/kernels-times.json" --only "$cases" 2>&1 | grep -av Warning | cut -c1-420
keep
echo "== mask ($SECONDS s)"
timeout "$(left)" python3 lab/scripts/kernel_mask.py --out "$out/kernels-mask.json" --seconds 60 2>&1 | cut -c1-420
timeout "$(left)" $times --mask --out "$out/kernels-share.json" 2>&1 | cut -c1-200
echo "== short rows ($SECONDS s)"
timeout "$(left)" $times --dense --out "$out/kernels-short.json" 2>&1 | cut -c1-420
keep
echo "== done ($SECONDS s)"
