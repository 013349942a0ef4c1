#!/usr/bin/env bash
# How fast this is on one GPU, in 8 minutes: bash benchmarks/gpu.sh [FOLDER]
#
# FOLDER, or build/gpu, gets gpu.md, gpu.json and what each part printed. python3 must be 3.10 or later. A
# torch that it has serves; what else is missing is installed into FOLDER/venv, but for vLLM, which is only
# raced where it is installed already. Without a network, what can be imported is measured. benchmarks/gpu.py
# says what the parts do, gpu.md what could not be measured, and why.
set -euo pipefail

budget=480 # seconds, all in all
setup=150  # of them, at most, to install what is missing
writing=10 # of them for the page

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/build/gpu}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=disabled

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

sees_cuda() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

nothing() { # WHY
    echo "$1, so nothing was measured."
    (cd "$root" && "$python" -m benchmarks.gpu rows)
    exit 0
}

python=$(command -v python3) || {
    echo "There is no python3 here, so nothing was measured." >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$("$python" --version) is too old: python3 must be 3.10 or later." >&2
    exit 1
}
if [[ -z ${CUDA_VISIBLE_DEVICES-all} ]] || { ! nvidia-smi -L >/dev/null 2>&1 && ! sees_cuda "$python"; }; then
    nothing "No CUDA device was found"
fi

first=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${first%%,*} # TRL would share its batches out over all there are
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$root"
shapes=(160m 1.4b)
for shape in "${shapes[@]}"; do # what an earlier call left
    rm -rf "${folder:?}/$shape" "$folder"/*-"$shape".{json,why,txt}
done

# A virtual environment shows what the base python has; if python3 is one itself, its packages are named too.
if "$python" -m venv --system-site-packages "$folder/venv" >"$folder/setup.txt" 2>&1; then
    outer=$("$python" -c 'import sys, sysconfig
print(sysconfig.get_path("purelib") if sys.prefix != sys.base_prefix else "")')
    had=$("$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        2>/dev/null || true)
    python=$folder/venv/bin/python
    inner=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$outer" >"$inner/outer.pth"
    echo "$had" >"$folder/constraints.txt" # no other torch than the one that is here
    say "installing what is missing; ${had:-torch} $([[ -n $had ]] && echo stays || echo 'is missing')"
    timeout "$setup" "$python" -m pip install -q --retries 1 --timeout 10 -c "$folder/constraints.txt" \
        -e '.[bench]' >>"$folder/setup.txt" 2>&1 ||
        say "not everything could be installed ($(tail -n 1 "$folder/setup.txt")); going on with what is there"
else
    say "no virtual environment could be made ($(tail -n 1 "$folder/setup.txt")); going on with what is there"
fi
sees_cuda "$python" || nothing "torch cannot be imported, or sees no CUDA device"

part() { # PART SHAPE SECONDS: runs it within that and within what is left
    local name=$1-$2 limit=$3 left=$((budget - writing - SECONDS)) code=0 why=
    ((limit < left)) || limit=$left
    if ((limit < 15)); then
        why="skipped: the $budget s were used up"
    else
        timeout -k 5 "$limit" "$python" -m benchmarks.gpu "$1" --shapes "$2" --folder "$folder" \
            >"$folder/$name.txt" 2>&1 </dev/null || code=$?
        case $code in
            0) ;;
            124 | 137) why="stopped after $limit s" ;;
            *) why="ended with code $code: $(grep -v '^[[:space:]]*$' "$folder/$name.txt" | tail -n 1 || true)" ;;
        esac
    fi
    if [[ -n $why ]]; then
        echo "$why" >"$folder/$name.why"
        say "$name NOT MEASURED, $why"
    else
        say "$name done"
    fi
}

part prepare 160m 75
part generation 160m 45
part step 160m 75
part prepare 1.4b 90
part generation 1.4b 60
part trl 160m 75
part step 1.4b 90
part trl 1.4b 90
part trl-vllm 160m 110
part trl-vllm 1.4b 110
"$python" -m benchmarks.gpu page --folder "$folder" && written=yes || written=
for shape in "${shapes[@]}"; do # gigabytes of random weights
    rm -rf "${folder:?}/$shape"
done
if [[ -z $written ]]; then
    say "gpu.md could not be written; $folder/*.why say what failed"
    exit 1
fi
say "$folder/gpu.md has it, $folder/gpu.json every sample"
