#!/usr/bin/env bash
# Check and time the attention kernels on one Hopper GPU in about four minutes; wheels of pytest and peers in .whl/.
#   bash lab/scripts/kernel_call.sh OUT [SECONDS]
# Logs and JSON go to OUT, short tables to the output. Checks compile in many processes at once, for almost three minutes;
# then come the times. What does not fit into SECONDS is left out, from the end.
set -u
out=$1
logs=$(mktemp -d)
keep() { tail -n +1 "$logs"/*.txt | tail -c 8000000 > "$out/log.txt"; }
until=$((SECONDS + ${2:-250}))
left() { echo $((until - SECONDS > 4 ? until - SECONDS : 4)); }
export PYTHONPATH=.:lab PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
python3 -m pip install -q --no-index --no-deps .whl/*.whl > "$logs/pip.txt" 2>&1 || echo "pip: $(tail -1 "$logs/pip.txt")"
python3 -c "import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)"
times="python3 lab/scripts/kernel_times.py --no-flex --commit ${COMMIT:-unknown}"
wide="equal 512,equal 1024,equal 2048,heads 1"
narrow="narrow local,narrow sliding 136,narrow sliding 300"

echo "== tests and checks ($SECONDS s)"
jobs=()
start() { # name seconds command...
    local name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$@" > "$logs/$name.txt" 2>&1 &
    jobs+=("$name:$!")
}
for part in 0 1 2 3; do start "checks-$part" 172 python3 lab/scripts/kernel_checks.py --runs 0 --part $part/4; done
start checks-runs 172 python3 lab/scripts/kernel_checks.py --runs 100 --part 9/10
start compile 172 $times --compile-only --no-peers --only "$wide"
start compile-narrow 172 $times --compile-only --no-peers --only "$narrow"
start memcheck 172 compute-sanitizer --tool memcheck --error-exitcode 3 python3 lab/scripts/sanitize.py --stages 4
start layer 172 python3 -m pytest -q -x -p no:cacheprovider tests/mixers/test_launch_sequence.py -k "never_waits and False"
python3 lab/scripts/gpu_tests.py --processes 7 --seconds 170 --keyword "hopper and not odd_pieces and not dtype0 and not 32-dtype" \
    tests/ops/test_triton_kernels.py > "$logs/tests.txt" 2>&1
for job in "${jobs[@]}"; do
    wait "${job#*:}"
    echo "${job%:*} exit $? ($SECONDS s)"
done
echo "checks ok: $(cat "$logs"/checks-*.txt | grep -ac ^ok), tests passed: $(grep -ac PASSED "$logs/tests.txt")"
grep -ah "^WRONG\|Error\|Warning" "$logs"/checks-*.txt | cut -c1-250 | tail -12
grep -a "FAILED\|^E  \|exit " "$logs/tests.txt" | cut -c1-150 | tail -24
grep -a "error\|ERROR\|done" "$logs/memcheck.txt" | cut -c1-120 | tail -6
tail -3 "$logs/layer.txt" | cut -c1-200
keep

echo "== times ($SECONDS s)"
timeout "$(left)" $times --out "$out/times.json" --only "$wide,$narrow" 2>&1 | grep -av Warning | cut -c1-420
echo "== short rows ($SECONDS s)"
timeout "$(left)" $times --dense --out "$out/times-short.json" 2>&1 | cut -c1-420
keep
echo "== done ($SECONDS s)"
