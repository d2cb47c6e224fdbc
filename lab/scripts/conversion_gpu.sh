#!/usr/bin/env bash
# Run the study `conversion` on a machine without a package registry, from carried files.
#
#     conversion_gpu.sh keep CARRIED              keep carried files until the rest has arrived
#     conversion_gpu.sh run CARRIED SECONDS       set up once, then run both lanes for so long
#     conversion_gpu.sh spread CARRIED SECONDS    set up once, then run two lanes on each GPU (GPUS="0 1 2 3"), list `levers`
#     conversion_gpu.sh start CARRIED SECONDS     set up once, then leave list `final` running for so long, behind this call
#     conversion_gpu.sh collect - SECONDS         wait for so long, or until `start`'s runs end, and copy what they wrote
#     conversion_gpu.sh speed CARRIED SECONDS     cache bytes and tokens per second, alone on the GPU
#
# CARRIED holds the parts of the model's file (fetch_models.py --parts), data.tar.xz (conversion_data.py --pack),
# benchmarks.tar.xz, the wheels of gguf and kvpress, and, to continue elsewhere, results of earlier runs (*.jsonl) and
# what they trained (ranks-*.pt, windows.tar). EXTRA holds further arguments of the study, such as "--plan levers".
# MODEL and PLAN name another model's folder and list for `start`, such as gemma3-270m and gemma.
# `start` puts a trainer and an evaluator on each of GPUS="0 1 2", and on LATE="3" once nothing else runs there.
# ROLES names others than both ("trainer trainer2 evaluator": two trainings at a time on each GPU, trainer3: one more), APPEND=1 leaves the processes of an earlier `start` in the list that `collect` waits for.
# Everything is kept in $CONVERSION_WORK (default: a folder in the system's temporary one), results go to $OUT too.
set -uo pipefail
what=$1 carried=$2 seconds=${3:-500}
work=${CONVERSION_WORK:-${TMPDIR:-/tmp}/conversion}
out=${OUT:-$work/out}
mkdir -p "$work/carried" "$work/site" "$work/data" "$work/benchmarks" "$work/state" "$out"
collect() {
    cat "$work"/results-*.jsonl 2>/dev/null | xz -1 >"$out/results.new" && mv "$out/results.new" "$out/results.jsonl.xz"
    tail -qn 200 "$work"/log-*.txt 2>/dev/null | sort -n >"$out/log.new" && mv "$out/log.new" "$out/log.txt"
    tar -C "$work/state" -cf "$out/windows.tar" --exclude '*.pt' --exclude claims . 2>/dev/null
}
if [ "$what" = collect ]; then
    for ((; SECONDS < seconds; )); do
        collect
        running=0
        for pid in $(cat "$work/pids"); do kill -0 "$pid" 2>/dev/null && running=1; done
        [ "$running" = 1 ] || break
        sleep 5
    done
    collect
    cp "$work"/state/ranks-*.pt "$out/" 2>/dev/null
    tail -qn 3 "$work"/log-*.txt
    exit 0
fi
cp -r "$carried/." "$work/carried/"
[ "$what" = keep ] && { du -sm "$work/carried"; exit 0; }

model=$work/models/${MODEL:-smollm2-135m-instruct}
export PYTHONPATH=$PWD:$PWD/lab:$work/site PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=$work/triton HF_HUB_OFFLINE=1
if [ ! -f "$work/ready" ]; then
    find "$work/carried" -name '*.whl' -exec python3 -m pip install -q --no-index --no-deps --target "$work/site" {} +
    find "$work/carried" -name data.tar.xz -exec tar -C "$work/data" -xf {} \;
    find "$work/carried" -name data-more.tar.xz -exec tar -C "$work/data" -xf {} \; # more training tokens
    find "$work/carried" -name benchmarks.tar.xz -exec tar -C "$work/benchmarks" -xf {} \;
    python3 lab/scripts/fetch_models.py "$work/models" --join "$work/carried" || exit 1
    # What was trained on a machine before, as it came back from there.
    find "$work/carried" -name 'ranks-*.pt' -exec cp -n {} "$work/state/" \;
    find "$work/carried" -name windows.tar -exec tar -C "$work/state" --skip-old-files -xf {} \;
    touch "$work/ready"
    echo "ready after $SECONDS s"
fi
mapfile -t done < <(find "$work/carried" -name '*.jsonl')

lane() { # lane, seconds left, further arguments
    python3 -m dynamask_lab.studies.conversion.study --model "$model" --data "$work/data" \
        --benchmarks "$work/benchmarks" --state "$work/state" --out "$work/results-$1.jsonl" \
        --copy "$out/results-$1.jsonl" --done "${done[@]}" --lane "$1" --seconds "$2" "${@:3}" 2>&1 |
        grep --line-buffered -v "it/s\]" | tee "$out/log-$1.txt"
}
spread() { # part, parts, GPU
    CUDA_VISIBLE_DEVICES=$3 OMP_NUM_THREADS=2 python3 -m dynamask_lab.studies.conversion.study --model "$model" \
        --data "$work/data" --benchmarks "$work/benchmarks" --state "$work/state" --out "$work/results-$1.jsonl" \
        --done "${done[@]}" --plan levers --part "$1/$2" --processes 6 --seconds "$((seconds - SECONDS))" ${EXTRA:-} \
        2>&1 | grep --line-buffered -v "it/s\]" >"$work/log-$1.txt"
}
earlier=$(find lab/results -name 'conversion*.jsonl' ! -name '*gemma*') # of the same model
[ "${MODEL:-smollm2-135m-instruct}" = smollm2-135m-instruct ] || earlier=$(find lab/results -name "conversion-${MODEL%%3-*}*.jsonl")
member() { # role, GPU, processes
    local segments=True # a trainer records CUDA graphs
    [ "${1%[0-9]}" = trainer ] && segments=False
    CONVERSION_SLOT=${1#trainer} CUDA_VISIBLE_DEVICES=$2 OMP_NUM_THREADS=2 \
        PYTORCH_CUDA_ALLOC_CONF=expandable_segments:$segments \
        setsid nohup timeout "$((seconds - SECONDS + 20))" python3 -m dynamask_lab.studies.conversion.study \
        --model "$model" --data "$work/data" --benchmarks "$work/benchmarks" --state "$work/state" \
        --out "$work/results-$1-$2.jsonl" --done "${done[@]}" $earlier --plan "${PLAN:-final}" \
        --role "${1%[0-9]}" --name "$1 $2" --processes "$3" --seconds "$((seconds - SECONDS))" ${EXTRA:-} \
        >"$work/log-$1-$2.txt" 2>&1 </dev/null &
    echo $! >>"$work/pids"
}
if [ "$what" = start ]; then
    [ -n "${APPEND:-}" ] || : >"$work/pids"
    for gpu in ${GPUS:-0 1 2}; do
        for role in ${ROLES:-trainer evaluator}; do
            member "$role" "$gpu" "$([ "${role%[0-9]}" = trainer ] && echo 2 || echo 8)"
        done
    done
    if [ -n "${LATE:-}" ]; then
        setsid nohup bash "$0" late "$carried" "$((seconds - SECONDS))" >"$work/log-late.txt" 2>&1 </dev/null &
        echo $! >>"$work/pids"
    fi
    sleep 20
    tail -qn 2 "$work"/log-*.txt
    exit 0
elif [ "$what" = late ]; then
    sleep "${LATE_AFTER:-120}"
    idle=0
    while ((SECONDS < seconds - 100 && idle < 5)); do # five looks in a row at which nothing holds its memory
        sleep 2
        used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --id="$LATE")
        ((used < 1500)) && idle=$((idle + 1)) || idle=0
    done
    if ((idle == 5)); then
        member trainer "$LATE" 4
        member evaluator "$LATE" 4
    fi
    exit 0
elif [ "$what" = speed ]; then
    lane speed "$seconds" ${EXTRA:-}
elif [ "$what" = spread ]; then
    read -ra gpus <<<"${GPUS:-0 1 2 3}"
    parts=${PARTS:-$((2 * ${#gpus[@]}))}
    for part in ${RUN_PARTS:-$(seq 0 $((parts - 1)))}; do
        spread "$part" "$parts" "${gpus[$((part % ${#gpus[@]}))]}" &
    done
    wait
    tail -n 12 "$work"/log-[0-9]*.txt
    cat "$work"/results-[0-9]*.jsonl | xz -T4 >"$out/results-levers.jsonl.xz"
    tar -C "$work" -cJf "$out/logs.tar.xz" $(cd "$work" && ls log-[0-9]*.txt)
else
    lane converted "$((seconds - SECONDS))" ${EXTRA:-} &
    lane dense "$((seconds - SECONDS))" --after "$work/state/ranks-hidden-seed0.pt" ${EXTRA:-} &
    wait
fi
cp "$work"/state/ranks-*.pt "$out/" 2>/dev/null
tar -C "$work/state" -cf "$out/windows.tar" --exclude '*.pt' . 2>/dev/null
ls -la "$out"
