#!/bin/sh
# Times of whole converted models on one GPU, part by part; a part that fails or is late does not end the others.
#   CUDA_VISIBLE_DEVICES=3 sh lab/scripts/host_call.sh OUT PART:SECONDS[:ARGUMENTS] ...
# Parts: warm (one-layer models of the parts ARGUMENTS, all at once, to fill the compilers' caches), tests (GPU cases of
# decoding and recorded steps, by the wheels in .whl where there are any), sweep (sizes of the decoding step's kernels),
# profile (step_profile_gpu.py --parts ARGUMENTS), rows (decode_gpu.py --parts ARGUMENTS).
# cache-in and cache-out read and write the compilers' caches: pieces of an archive in .host-cache and OUT. Parts that
# + joins in warm are one process, one after the other. some-tests: the tests ARGUMENTS, in one process.
# Everything is written as it comes into OUT.
out=$1
shift
export TRITON_CACHE_DIR=/tmp/host-cache/triton TORCHINDUCTOR_CACHE_DIR=/tmp/host-cache/inductor
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
mkdir -p /tmp/host-cache
export PYTHONPATH="$PWD:$PWD/lab:/tmp/host-wheels" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=8
mkdir -p "$out"
for part in "$@"; do
    name=${part%%:*} rest=${part#*:}
    seconds=${rest%%:*} arguments=""
    case $rest in *:*) arguments=${rest#*:} ;; esac
    echo "$(date +%T) $part" >>"$out/parts.txt"
    case $name in
        warm)
            for each in $arguments; do
                # shellcheck disable=SC2046
                timeout "$seconds" python3 lab/scripts/decode_gpu.py --one-layer --unchecked --out "$out/warm-$each" \
                    --seconds "$seconds" --parts $(echo "$each" | tr + " ") >"$out/warm-$each.txt" 2>&1 &
            done
            wait
            ;;
        cache-in)
            cat .host-cache/cache-*.pt | tar -C /tmp/host-cache -xzf - 2>"$out/cache-in.txt"
            ;;
        cache-out)
            tar -C /tmp/host-cache -cf - . | timeout "$seconds" gzip -7 | split -b 4800000 - "$out/cache-"
            for each in "$out"/cache-??; do mv "$each" "$each.pt"; done
            du -s /tmp/host-cache/* >"$out/cache-out.txt"
            ;;
        tests)
            python3 -m pip install -q --no-index --no-deps --target /tmp/host-wheels .whl/pytest*.whl .whl/plug*.whl \
                .whl/ini*.whl .whl/pack*.whl .whl/pyg*.whl .whl/hyp*.whl .whl/sort*.whl >"$out/pip.txt" 2>&1
            timeout "$seconds" python3 lab/scripts/gpu_tests.py --all --processes "${arguments:-6}" --seconds $((seconds - 5)) \
                tests/convert/test_decode_step.py tests/training/test_recorded_gradients.py \
                tests/models/test_cuda_graph.py tests/ops/test_cache_insert_kernels.py \
                tests/ops/test_ragged_decode_kernels.py tests/convert/test_decode_by_graph.py \
                tests/convert/test_recorded_step.py tests/training/test_recorded_steps.py \
                tests/ops/test_cache_keep_kernels.py tests/test_cache.py tests/convert/test_recorded_prompts.py \
                >"$out/tests.txt" 2>&1
            ;;
        some-tests)
            # shellcheck disable=SC2086
            timeout "$seconds" python3 -m pytest -p no:cacheprovider --tb=short -v $arguments >>"$out/some-tests.txt" 2>&1
            ;;
        sweep)
            # shellcheck disable=SC2086
            timeout "$seconds" python3 lab/scripts/decode_sweep_gpu.py --out "$out" --seconds $((seconds - 6)) \
                $arguments >>"$out/sweep-log.txt" 2>&1
            ;;
        profile)
            # shellcheck disable=SC2086
            timeout "$seconds" python3 lab/scripts/step_profile_gpu.py --out "$out" --seconds $((seconds - 15)) \
                --parts $arguments >>"$out/profile-out.txt" 2>&1
            ;;
        rows)
            # shellcheck disable=SC2086
            timeout "$seconds" python3 lab/scripts/decode_gpu.py --out "$out" --seconds $((seconds - 8)) \
                --parts $arguments >>"$out/rows-log.txt" 2>&1
            ;;
    esac
done
date +%T >>"$out/parts.txt"
