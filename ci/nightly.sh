#!/usr/bin/env bash
# The nightly run: each model in every layout that this machine's GPUs allow (two CPU ranks where it has none), the
# self-test with fifty clean seeds, and the golden values. Goes on after a failure, and exits with 1 if there was one.
#
#   ci/nightly.sh [MODEL ...]        under Slurm: sbatch --gpus-per-node=8 ci/nightly.sh meta-llama/Llama-3.2-1B
#
# OUT (default: nightly) receives a report of each model and of the self-test. PARITY_OPTIONS is added to each run.
#SBATCH --job-name=parity-nightly
#SBATCH --nodes=1
#SBATCH --time=04:00:00
set -uo pipefail

models=("${@:-smollm2-135m}")
out=${OUT:-nightly}
read -ra options <<<"${PARITY_OPTIONS:-}"
mkdir -p "$out"
failed=0

gpus=$(find /proc/driver/nvidia/gpus -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)
ranks=$((gpus > 0 ? gpus : 2))

# Every tp x pp x cp x dp of at most that many ranks, in powers of two; sequence parallelism and vpp where they apply.
layouts=()
for tp in 1 2 4 8; do for pp in 1 2 4 8; do for cp in 1 2 4; do for dp in 1 2; do
    ((tp * pp * cp * dp <= ranks)) || continue
    layouts+=("--tp $tp --pp $pp --cp $cp --dp $dp --sp off$( ((tp > 1)) && echo ,on) --vpp 1$( ((pp > 1)) && echo ,2) --precision fp32,bf16")
done; done; done; done

# Transformer Engine's layers: tp x cp, every precision; those that the device lacks are left out with the reason.
recipes=fp32,bf16,fp8-delayed,fp8-current,fp8-block,mxfp8,nvfp4
for tp in 1 2 4 8; do for cp in 1 2 4; do
    ((tp * cp <= ranks)) && layouts+=("--backend te --tp $tp --cp $cp --precision $recipes")
done; done

for model in "${models[@]}"; do
    name=$(basename "$model" | tr '[:upper:]' '[:lower:]')
    for layout in "${layouts[@]}"; do
        label=$(tr -d ' ' <<<"$layout" | tr -s -- '-,' '_' | sed 's/^_//')
        read -ra words <<<"$layout"
        pytest --model "$model" "${words[@]}" "${options[@]}" \
            --parity-report "$out/$name-$label.json,$out/$name-$label.md,$out/$name-$label.html" || failed=1
        if [[ -n ${GITHUB_STEP_SUMMARY:-} ]]; then cat "$out/$name-$label.md" >>"$GITHUB_STEP_SUMMARY"; fi
    done
done
parity self-test --seeds 50 --json "$out/self-test.json" || failed=1
parity golden verify || failed=1
exit $failed
