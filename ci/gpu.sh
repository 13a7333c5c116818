#!/usr/bin/env bash
# What needs an NVIDIA GPU: the tests of tests/gpu, the shipped suite on Transformer Engine's layers, and the benchmark.
# Goes on after a failure, and exits with 1 if there was one. A machine without GPU or Transformer Engine is a failure.
#
#   ci/gpu.sh [tests] [suite] [bench]      all three by default
#
# OUT (default: nightly) receives machine.txt, and of each part a log and its figures. PYTHON (default: python3) runs it;
# packages unpacked in .gpu/site, or packed in .gpu/site.tar.xz, are used where they are. JOBS (default: 4) processes
# share the GPU in the tests. BENCH_OPTIONS is added to the benchmark, SUITE_OPTIONS to the suite.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-nightly}
parts=("$@")
(($#)) || parts=(tests suite bench)
read -ra bench_options <<<"${BENCH_OPTIONS:-}"
read -ra suite_options <<<"${SUITE_OPTIONS:-}"
mkdir -p "$out"
failed=0

if [[ -f .gpu/site.tar.xz && ! -d .gpu/site ]]; then
    "$python" -c "import tarfile; tarfile.open('.gpu/site.tar.xz').extractall('.gpu/site', filter='data')" || exit 1
fi
export PYTHONPATH=$PWD/.gpu/site:$PWD${PYTHONPATH:+:$PYTHONPATH}

(cd tests/gpu && "$python" - <<'PYTHON'
import os
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
import on_gpu
print(on_gpu.describe())
reason = on_gpu.lacking()
if not reason:
    on_gpu.transformer_engine()
raise SystemExit(reason or 0)
PYTHON
) 2>&1 | tee "$out/machine.txt" || exit 1

for part in "${parts[@]}"; do
    case $part in
    tests)
        # The suite has a part of its own.
        "$python" -m pytest tests/gpu --ignore tests/gpu/test_suite_on_gpu.py -ra -n "${JOBS:-4}" --dist worksteal \
            --junitxml "$out/tests.xml" 2>&1 | tee "$out/tests.log" || failed=1
        ;;
    suite)
        # Transformer Engine multiplies float32 in TF32 otherwise, which is no noise of float32.
        NVIDIA_TF32_OVERRIDE=0 "$python" -m pytest -p parity.plugin --model meta-llama/Llama-3.2-1B --size tiny \
            --weights seeded --backend megatron,te --device cuda \
            --precision fp32,bf16,fp8-delayed,fp8-current,fp8-block,mxfp8,nvfp4 \
            --parity-report "$out/suite.json,$out/suite.md" "${suite_options[@]}" 2>&1 | tee "$out/suite.log" || failed=1
        ;;
    bench)
        "$python" ci/bench/te.py --json "$out/bench.json" "${bench_options[@]}" 2>&1 | tee "$out/bench.log" || failed=1
        ;;
    *)
        echo "no part is called $part; there are tests, suite and bench" >&2
        exit 1
        ;;
    esac
done
exit $failed
